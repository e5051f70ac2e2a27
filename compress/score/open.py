r"""Open answers: what a model says when it is asked, checked by rule and put beside what its
teacher says.

Likelihood tasks and KL can't see a student that answers in circles: pruned models pass multiple
choice and fail in open generation ("the benchmark illusion", arXiv 2606.17609). So every model
answers short prompts greedily, in at most ANSWER_TOKENS tokens, through its own chat template
(score/talk.py), and an answer is right when all checks of its prompt hold:

    must_contain       every member occurs, as a word, in any case; of a member that is a list, any
                       of its strings
    must_not_contain   none of these strings occurs
    pattern            a regular expression is found (any case, ^ and $ at lines), within
                       PATTERN_SECONDS
    exact  the whole answer is one of these, but for case, white space and punctuation around it

Of one model, shares of its prompts with Jeffreys' interval (score/intervals.py):

    open/right     checks hold          open/loops   it repeats itself (text/repetition.py)
    open/ended     it stopped by itself

Beside the teacher, on the same prompts, paired:

    open/kept          of what the teacher gets right, the share that the model gets right;
                       Jeffreys' interval. Undecided where the teacher gets fewer than TEACHER_RIGHT
                       right
    open/loops_gained  loops minus the teacher's, with the paired interval
    open/ended_lost    the teacher's ended minus the model's, with the paired interval
    open/plausible     nats a token by which the teacher finds the model's answers less likely than
                       its own, the mean over prompts of (log p_T(own) / tokens - log p_T(answer) /
                       tokens), on the fixed quarter; Student's interval. About 0: it says what its
                       teacher would. An answer's end counts as a token where it ended
    open/form_differing   share of the prompts that reach the model as other token ids than its
                          teacher: a template that lost something, a doubled BOS, another tokenizer.
                          Exact, no interval
    open/choice_gap    accuracy of picking the right one of four minus open/right, on the facts that
                       can be asked in both forms: how much the likelihood form flatters

Intermediate stages answer the fixed quarter of the prompts whose number is divisible by 4; teacher
and what ships answer all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import beta

from compress.models.checkpoint import Model
from compress.models.ends import turn_end
from compress.score.intervals import bootstrap, cells, interval, ratio_interval
from compress.score.prompts import ANSWER_TOKENS, Prompt
from compress.score.talk import has_template, open_speaker, prompts_of, question_ids
from compress.store import sha256_json
from compress.text.repetition import loops

TEACHER_RIGHT = 20  # right answers of a teacher below which a share of them says nothing
Answers = Sequence[Mapping[str, Any]]


def answered(model: Model, prompts: Sequence[Prompt], threads: int) -> list[dict[str, Any]]:
    """What a model says to each prompt, as rows {id, kind, prompt, form, answer, ids, ended, loops,
    right}; `form` names the prompt's token ids. ValueError when it can't be asked.

    A pattern that runs away on an answer makes it not right; such rows say `timed_out`.
    """
    with open_speaker(model, threads) as speaker:
        texts = prompts_of(speaker, [prompt.prompt for prompt in prompts], has_template(model))
        forms = [sha256_json(speaker.prompt_ids(text))[:16] for text in texts]
        said = speaker.answers(texts, ANSWER_TOKENS)
    rows = []
    for prompt, form, answer in zip(prompts, forms, said, strict=True):
        row: dict[str, Any] = {
            "id": prompt.id,
            "kind": prompt.kind,
            "prompt": prompt.prompt,
            "form": form,
            "answer": answer.text,
            "ids": answer.ids,
        }
        row |= {"ended": answer.ended, "loops": loops(answer.text), "right": False}
        try:
            row["right"] = prompt.is_right(answer.text)
        except TimeoutError:
            row["timed_out"] = True
        rows.append(row)
    return rows


def choice_gap(
    picked: Mapping[str, bool], answers: Answers
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/choice_gap of one model: `picked` says by id whether it chose the right one of four;
    with the paired interval.
    """
    by_id = {row["id"]: bool(row["right"]) for row in answers}
    both = [name for name in picked if name in by_id]
    if not both:
        return {}, {}
    value, spread = difference_of_flags(
        np.array([picked[name] for name in both]), np.array([by_id[name] for name in both])
    )
    return {"open/choice_gap": value}, {"open/choice_gap": spread}


def picks_right(prompts: Sequence[Prompt], lm: Any, tokenizer: Any) -> dict[str, bool]:
    """Id -> whether an `score.lm.LM` finds the right one of four answers the likeliest, of the
    fixed quarter's facts; `tokenizer`: HF's, of the model.
    """
    facts = [prompt for prompt in prompts if prompt.choices and prompt.in_quarter]
    if not facts:
        return {}

    # The right answer comes first.
    requests = []
    for prompt in facts:
        context = question_ids(tokenizer, prompt.prompt)
        for choice in (prompt.answer, *prompt.choices):
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            requests.append((("", ""), context, ids))
    logliks = [loglik for loglik, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]

    picked: dict[str, bool] = {}
    start = 0
    for prompt in facts:
        end = start + 1 + len(prompt.choices)
        picked[prompt.id] = int(np.argmax(logliks[start:end])) == 0
        start = end
    return picked


def difference_of_flags(mine: np.ndarray, its: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The mean of `mine` minus that of `its`, flags (N,) of the same prompts, with the paired
    interval of score/intervals.py.
    """
    draws = bootstrap(cells(mine, its))
    value = float(mine.mean() - its.mean())
    low, high = interval(draws[:, 1] - draws[:, 2])
    return value, (min(low, value), max(high, value))


def own_scores(answers: Answers) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/right, open/loops, open/ended of one model's answers, the number of them as n/open, and
    their intervals.
    """
    scores: dict[str, float] = {"n/open": len(answers)}
    spread: dict[str, tuple[float, float]] = {}
    for name in ("right", "loops", "ended"):
        count = sum(bool(row[name]) for row in answers)
        scores[f"open/{name}"] = count / len(answers)
        spread[f"open/{name}"] = _jeffreys(count, len(answers))
    return scores, spread


def beside_teacher(
    answers: Answers, teacher: Answers
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/kept, open/loops_gained, open/ended_lost of a model's answers beside its teacher's, and
    n/open_kept, what the teacher gets right. ValueError when a prompt was put to the model
    alone.
    """
    by_id = {row["id"]: row for row in teacher}
    if lacking := [
        row["id"]
        for row in answers
        if row["id"] not in by_id or by_id[row["id"]]["prompt"] != row["prompt"]
    ]:
        raise ValueError(
            f"open prompts {lacking[:3]} were put to one of the models only; score both with the"
            " same eval.open_prompts"
        )
    pairs = [(row, by_id[row["id"]]) for row in answers]
    known = [mine for mine, its in pairs if its["right"]]
    scores: dict[str, float] = {"n/open_kept": len(known)}
    spread: dict[str, tuple[float, float]] = {}
    if len(known) >= TEACHER_RIGHT:
        both = sum(row["right"] for row in known)
        scores["open/kept"], spread["open/kept"] = both / len(known), _jeffreys(both, len(known))
    scores["open/form_differing"] = sum(mine["form"] != its["form"] for mine, its in pairs) / len(
        pairs
    )
    loops_mine, loops_its = (
        np.array([bool(pair[side]["loops"]) for pair in pairs]) for side in (0, 1)
    )
    scores["open/loops_gained"], spread["open/loops_gained"] = difference_of_flags(
        loops_mine, loops_its
    )
    ended_mine, ended_its = (
        np.array([bool(pair[side]["ended"]) for pair in pairs]) for side in (0, 1)
    )
    scores["open/ended_lost"], spread["open/ended_lost"] = difference_of_flags(
        ended_its, ended_mine
    )
    return scores, spread


def _jeffreys(count: int, n: int) -> tuple[float, float]:
    """Jeffreys' interval of a share, 95%, which always holds the share itself."""
    low, high = beta.ppf([0.025, 0.975], count + 0.5, n - count + 0.5)
    return (0.0 if count == 0 else float(low)), (1.0 if count == n else float(high))


def plausible(answers: Answers, teacher: Answers, lm: Any, tokenizer: Any) -> dict[str, Any]:
    """{"value", "interval"} of open/plausible over the prompts that both answered with at least a
    token; {} where fewer than two did.

    `lm`: the teacher as an `score.lm.LM`, with its HF `tokenizer`: an answer counts in the
    teacher's own tokens.
    """
    by_id = {row["id"]: row for row in teacher}
    closing = turn_end(tokenizer)
    end = tokenizer.eos_token_id if closing is None else closing
    requests, owners = [], []
    for row in answers:
        if row["id"] not in by_id or not Prompt(row["id"], row["prompt"]).in_quarter:
            continue
        context = question_ids(tokenizer, row["prompt"])
        for side in (by_id[row["id"]], row):
            ids = tokenizer(side["answer"], add_special_tokens=False, verbose=False)["input_ids"]
            ids += [end] * side["ended"]
            requests.append((("", ""), context, ids))
        owners.append(row["id"])
    pairs = [
        pair
        for pair in zip(requests[::2], requests[1::2], strict=True)
        if pair[0][2] and pair[1][2]
    ]
    if len(pairs) < 2:
        return {}
    found = lm._loglikelihood_tokens(
        [request for pair in pairs for request in pair], disable_tqdm=True
    )
    means = [
        logprob / len(request[2])
        for (logprob, _), request in zip(found, [r for pair in pairs for r in pair], strict=True)
    ]
    lost = [own - mine for own, mine in zip(means[::2], means[1::2], strict=True)]
    return {"value": math.fsum(lost) / len(lost), "interval": ratio_interval(lost, least=-math.inf)}


def worst_first(answers: Answers, teacher: Answers) -> list[dict[str, Any]]:
    """Both answers to each prompt, worst first: what the teacher got right and the model loops on,
    then what it got wrong, then other loops, then the rest; rows {id, kind, prompt, teacher,
    student, teacher_right, right, loops, ended}.
    """
    by_id = {row["id"]: row for row in teacher}
    rows = []
    for row in answers:
        its = by_id.get(row["id"])
        if its is not None:
            rows.append(
                {
                    "id": row["id"],
                    "kind": row["kind"],
                    "prompt": row["prompt"],
                    "teacher": its["answer"],
                    "student": row["answer"],
                    "teacher_right": its["right"],
                    "right": row["right"],
                    "loops": row["loops"],
                    "ended": row["ended"],
                }
            )
    return sorted(
        rows,
        key=lambda r: (
            -(r["teacher_right"] and not r["right"]) * (1 + r["loops"]),
            -r["loops"],
            r["right"],
            r["id"],
        ),
    )
