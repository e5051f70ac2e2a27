"""One OpenAI-compatible door in front of what ships.

    command      the command line: options, what they mean together, the sentence of a refusal
    target       what is served: a verified bundle's judged file, a GGUF, a directory
    settings     limits of the door, and of the cascade behind it
    service      from settings to a running door, and from SIGTERM to its end
    keys         who may come in
    asked        what may be asked: a request's body, checked
    slots        how many are answered at once, how many wait
    backend      the process that holds the model: started, watched, started again
    child        that process
    speaking     the same interface for runtimes without a server of their own; engines, which these
                 are: torch and ONNX Runtime GenAI
    student      the backend as the door asks it: bytes passed through
    door         HTTP: routes, errors, what each request ends with; reply, what is sent for one
    teacher      the larger model behind the student: timed, counted, left alone while it fails
    cascade      which of the two answers
    calibration  from which certainty on the student is believed
    metrics      figures for Prometheus
    log          a line of JSON a request, without a word of what was said

The model lives in a process of its own: the door outlives it, says 502 or 503 while it is gone and
starts it again. Answers go through the door as bytes: what the metrics need is read from the first
and the last piece.
"""
