"""The process that holds the model: `python -m compress.serve.child`, started by `backend.py`.

Its order is one line of JSON on standard input, which holds the key too: arguments and environment
can be read by others. When it listens, it says where in one line of JSON on standard output. It
lives as long as standard input is open, so that it never outlives the door.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from compress.serve.settings import context_within
from compress.serve.tuning import apply

PARALLEL = 4


def llama_server(order: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's own server on a free port of this machine, kept in `order`."""
    import xllamacpp

    from compress.models.gguf_header import check_file

    # What the file says of itself, read within bounds before llama.cpp reads it.
    path = Path(order["path"])
    fields, _ = check_file(path)
    made_for = fields.get(f"{fields['general.architecture']}.context_length")
    context = context_within(order["context"], made_for, path.name)
    parallel = order["parallel"] or PARALLEL

    # Each slot has its part of the context; nothing is kept of a prompt but in its slot.
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {order["name"]}
    params.n_parallel = parallel
    params.n_ctx = context * parallel
    params.n_batch = params.n_ubatch = min(order["tuning"]["batch"], context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    apply(order["tuning"], params)
    params.fit_params = params.ui = params.endpoint_slots = False
    params.cache_ram_mib = 0
    params.verbosity = -1
    params.api_keys = [order["key"]]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.offline = True

    try:
        order["server"] = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ValueError(f"{path}: llama.cpp can't load it ({error}); export it again") from error
    return {
        "address": order["server"].listening_address,
        "context": context,
        "parallel": parallel,
        "templated": bool(fields.get("tokenizer.chat_template")),
    }


def speaking_server(order: dict[str, Any]) -> dict[str, Any]:
    """The same interface for runtimes without a server, on a thread of this process."""
    from compress.serve.speaking import start

    return start(order)


def main() -> None:
    """Serve until standard input ends."""
    # Who stops a whole service stops the door, which lets this one finish what runs.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    # Standard output is for one line alone: libraries write to standard error instead.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update({"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"})
    order = json.loads(sys.stdin.readline())

    runs = llama_server if order["runtime"] == "llama.cpp" else speaking_server
    try:
        answer = runs(order)
    except Exception as error:
        answer = {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
    print(json.dumps(answer), file=report, flush=True)

    # Nothing has to be saved: a server that is taken down in order can hang.
    if "error" not in answer:
        sys.stdin.read()
    os._exit("error" in answer)


if __name__ == "__main__":
    main()
