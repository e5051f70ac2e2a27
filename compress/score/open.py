r"""Open answers: what a model says when it is asked, checked by rule and put beside what its
teacher says.

Likelihood tasks and KL can't see a student that answers in circles: pruned models pass multiple
choice and fail in open generation ("the benchmark illusion", arXiv 2606.17609). So every model
answers short prompts greedily, in at most ANSWER_TOKENS tokens, through its own chat template
(score/talk.py), and an answer is right when all checks of its prompt hold:

    must_contain       every member occurs, as a word, in any case; of a member that is a list,
                       any of its strings
    must_not_contain   none of these strings occurs
    pattern            a regular expression is found (any case, ^ and $ at lines), within
                       PATTERN_SECONDS
    exact              the whole answer is one of these, but for case, white space and
                       punctuation around it

Of one model, shares of its prompts with Jeffreys' interval (score/intervals.py):

    open/right     checks hold          open/loops   it repeats itself (text/repetition.py)
    open/ended     it stopped by itself

Beside the teacher, on the same prompts, paired:

    open/kept             of what the teacher gets right, the share that the model gets right;
                          Jeffreys' interval. Undecided where the teacher gets fewer than
                          TEACHER_RIGHT right
    open/loops_gained     loops minus the teacher's
    open/ended_lost       the teacher's ended minus the model's, both with the paired interval
    open/plausible        nats a token by which the teacher finds the model's answers less likely
                          than its own, the mean over prompts of
                          (log p_T(own) / tokens - log p_T(answer) / tokens), on the fixed quarter;
                          Student's interval. About 0: it says what its teacher would. An answer's
                          end counts as a token where it ended, but not in plain text
    open/form_differing   share of the prompts that reach the model as other token ids than its
                          teacher: a template that lost something, a doubled BOS, another
                          tokenizer; of a smaller vocabulary, as another text. Exact, no interval
    open/choice_gap       accuracy of picking the right one of four minus open/right, on the facts
                          that can be asked in both forms: how much the likelihood form flatters

Intermediate stages answer the fixed quarter of the prompts whose number is divisible by 4; teacher
and what ships answer all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from compress.models.ends import turn_end
from compress.models.model import Model
from compress.models.vocabulary import vocabulary_of
from compress.score.intervals import bootstrap, cells, interval, ratio_interval
from compress.score.likelihood import Likelihoods
from compress.score.prompts import ANSWER_TOKENS, Prompt
from compress.score.quantiles import jeffreys_interval
from compress.score.talk import (
    has_template,
    open_speaker,
    plain_answer,
    prompts_of,
    question_ids,
)
from compress.store import sha256_json
from compress.text.repetition import loops

TEACHER_RIGHT = 20  # right answers of a teacher below which a share of them says nothing
Answers = Sequence[Mapping[str, Any]]
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # a model's answer and its teacher's


def answered(
    model: Model, prompts: Sequence[Prompt], threads: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What a model says to each prompt, as rows {id, kind, prompt, form, answer, ids, ended, loops,
    right}; `form` as `form_of` gives it. ValueError when it can't be asked.

    A pattern that runs away on an answer makes it not right; such rows say `timed_out`.
    """
    tokens = vocabulary_of(model.path).tokens
    templated = has_template(model)
    with open_speaker(model, threads, device=device) as speaker:
        texts = prompts_of(speaker, [prompt.prompt for prompt in prompts], templated)
        forms = [form_of(speaker.prompt_ids(text), tokens) for text in texts]
        answers = speaker.answers(texts, ANSWER_TOKENS)
    if not templated:
        answers = [plain_answer(answer) for answer in answers]

    rows = []
    for prompt, form, answer in zip(prompts, forms, answers, strict=True):
        row: dict[str, Any] = {
            "id": prompt.id,
            "kind": prompt.kind,
            "prompt": prompt.prompt,
            "form": form,
            "answer": answer.text,
            "ids": answer.ids,
            "ended": answer.ended,
            "loops": loops(answer.text),
            "right": False,
        }
        # Checks may be a stranger's: they end in time.
        try:
            row["right"] = prompt.is_right(answer.text)
        except TimeoutError:
            row["timed_out"] = True
        rows.append(row)
    return rows


def form_of(ids: Sequence[int], tokens: Mapping[int, str]) -> str:
    """A name for how a prompt reaches a model with so many `tokens`: digests of its ids and of the
    text that they spell out, and the count.
    """
    spelled = "".join(tokens.get(i, f"[{i}]") for i in ids)
    return "-".join([sha256_json(list(ids))[:16], sha256_json(spelled)[:16], str(len(tokens))])


def same_form(form: str, other: str) -> bool:
    """Whether a prompt reaches two models alike: as the same ids, or, where one has fewer tokens
    than the other, as the same text. Older names have ids alone.
    """
    (ids, *rest), (other_ids, *other_rest) = form.split("-"), other.split("-")
    if len(rest) == len(other_rest) == 2 and rest[1] != other_rest[1]:
        return rest[0] == other_rest[0]
    return ids == other_ids


def choice_gap(
    picked: Mapping[str, bool], answers: Answers
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/choice_gap of one model: `picked` says by id whether it chose the right one of four;
    with the paired interval.
    """
    right_by_id = {row["id"]: bool(row["right"]) for row in answers}
    both = [name for name in picked if name in right_by_id]
    if not both:
        return {}, {}
    gap, spread = difference_of_flags(
        np.array([picked[name] for name in both]), np.array([right_by_id[name] for name in both])
    )
    return {"open/choice_gap": gap}, {"open/choice_gap": spread}


class Wording(Protocol):
    """How a model is asked in token ids: of a question up to where its answer begins, and of an
    answer behind it. `templated`: by a chat template.
    """

    templated: bool

    def question(self, text: str) -> list[int]: ...

    def answer(self, text: str) -> list[int]: ...


class HfWording:
    """By an HF tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)

    def question(self, text: str) -> list[int]:
        return question_ids(self.tokenizer, text)

    def answer(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def picks_right(
    prompts: Sequence[Prompt], likelihoods: Likelihoods, wording: Wording
) -> dict[str, bool]:
    """Id -> whether a model finds the right one of four answers the likeliest, of the fixed
    quarter's facts.
    """
    facts = [prompt for prompt in prompts if prompt.choices and prompt.in_quarter]
    if not facts:
        return {}

    # The right answer comes first; in plain text a space stands before it.
    lead = "" if wording.templated else " "
    requests = []
    for prompt in facts:
        context = wording.question(prompt.prompt)
        for choice in (prompt.answer, *prompt.choices):
            requests.append((("", ""), context, wording.answer(lead + choice)))
    logliks = [loglik for loglik, _ in likelihoods.of_ids(requests, quiet=True)]

    picked: dict[str, bool] = {}
    start = 0
    for prompt in facts:
        end = start + 1 + len(prompt.choices)
        picked[prompt.id] = int(np.argmax(logliks[start:end])) == 0
        start = end
    return picked


def difference_of_flags(
    flags: np.ndarray, reference: np.ndarray
) -> tuple[float, tuple[float, float]]:
    """The mean of `flags` minus that of `reference`, both (N,), of the same prompts, with the
    paired interval of score/intervals.py.
    """
    draws = bootstrap(cells(flags, reference))
    difference = float(flags.mean() - reference.mean())
    low, high = interval(draws[:, 1] - draws[:, 2])
    return difference, (min(low, difference), max(high, difference))


def own_scores(answers: Answers) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/right, open/loops, open/ended of one model's answers, the number of them as n/open, and
    their intervals.
    """
    scores: dict[str, float] = {"n/open": len(answers)}
    spread: dict[str, tuple[float, float]] = {}
    for name in ("right", "loops", "ended"):
        count = sum(bool(row[name]) for row in answers)
        scores[f"open/{name}"] = count / len(answers)
        spread[f"open/{name}"] = jeffreys_interval(count, len(answers))
    return scores, spread


def beside_teacher(
    answers: Answers, teacher: Answers
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """open/kept, open/loops_gained, open/ended_lost of a model's answers beside its teacher's, and
    n/open_kept, what the teacher gets right. ValueError when a prompt was put to the model
    alone.
    """
    by_id = {row["id"]: row for row in teacher}
    unpaired = [
        row["id"]
        for row in answers
        if row["id"] not in by_id or by_id[row["id"]]["prompt"] != row["prompt"]
    ]
    if unpaired:
        raise ValueError(
            f"open prompts {unpaired[:3]} were put to one of the models only; score both with the"
            " same eval.open_prompts"
        )
    pairs = [(row, by_id[row["id"]]) for row in answers]

    # What the teacher gets right, if that is enough to be a share of.
    to_keep = [row for row, reference in pairs if reference["right"]]
    scores: dict[str, float] = {"n/open_kept": len(to_keep)}
    spread: dict[str, tuple[float, float]] = {}
    if len(to_keep) >= TEACHER_RIGHT:
        kept = sum(row["right"] for row in to_keep)
        scores["open/kept"] = kept / len(to_keep)
        spread["open/kept"] = jeffreys_interval(kept, len(to_keep))

    differing = sum(not same_form(row["form"], reference["form"]) for row, reference in pairs)
    scores["open/form_differing"] = differing / len(pairs)

    # Both differences grow with what got worse.
    loops_gained = difference_of_flags(*_flags(pairs, "loops"))
    scores["open/loops_gained"], spread["open/loops_gained"] = loops_gained
    ended, teacher_ended = _flags(pairs, "ended")
    ended_lost = difference_of_flags(teacher_ended, ended)
    scores["open/ended_lost"], spread["open/ended_lost"] = ended_lost
    return scores, spread


def _flags(pairs: Sequence[Pair], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A flag of both answers to each prompt, the model's (N,) and its teacher's (N,)."""
    return (
        np.array([bool(row[name]) for row, _ in pairs]),
        np.array([bool(reference[name]) for _, reference in pairs]),
    )


def plausible(answers: Answers, teacher: Answers, lm: Any, tokenizer: Any) -> dict[str, Any]:
    """{"value", "interval"} of open/plausible over the prompts that both answered with at least a
    token; {} where fewer than two did.

    `lm`: the teacher as an `score.lm.LM`, with its HF `tokenizer`: an answer counts in the
    teacher's own tokens.
    """
    by_id = {row["id"]: row for row in teacher}
    closing = turn_end(tokenizer)
    end = tokenizer.eos_token_id if closing is None else closing
    templated = bool(tokenizer.chat_template)

    # The teacher's own answer and the model's, behind the same question.
    requests = []
    for row in answers:
        if row["id"] not in by_id or not Prompt(row["id"], row["prompt"]).in_quarter:
            continue
        context = question_ids(tokenizer, row["prompt"])
        ids_of_both = []
        for answer in (by_id[row["id"]], row):
            ids = tokenizer(answer["answer"], add_special_tokens=False, verbose=False)["input_ids"]
            ids_of_both.append(ids + [end] * (templated and answer["ended"]))
        if all(ids_of_both):
            requests += [(("", ""), context, ids) for ids in ids_of_both]
    if len(requests) < 4:
        return {}

    # Nats a token by which the teacher prefers its own.
    logprobs = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    means = [
        logprob / len(ids) for (logprob, _), (_, _, ids) in zip(logprobs, requests, strict=True)
    ]
    lost = [teacher_mean - mean for teacher_mean, mean in zip(means[::2], means[1::2], strict=True)]
    return {"value": math.fsum(lost) / len(lost), "interval": ratio_interval(lost, least=-math.inf)}


def worst_first(answers: Answers, teacher: Answers) -> list[dict[str, Any]]:
    """Both answers to each prompt, worst first: what the teacher got right and the model loops on,
    then what it got wrong, then other loops, then the rest; rows {id, kind, prompt, teacher,
    student, teacher_right, right, loops, ended}.
    """
    by_id = {row["id"]: row for row in teacher}
    rows = []
    for row in answers:
        reference = by_id.get(row["id"])
        if reference is None:
            continue

        # "right", "loops" and "ended" are the model's.
        rows.append(
            {
                "id": row["id"],
                "kind": row["kind"],
                "prompt": row["prompt"],
                "teacher": reference["answer"],
                "student": row["answer"],
                "teacher_right": reference["right"],
                "right": row["right"],
                "loops": row["loops"],
                "ended": row["ended"],
            }
        )
    return sorted(rows, key=_goodness)


def _goodness(row: Mapping[str, Any]) -> tuple[int, int, bool, str]:
    """Order of `worst_first`, the worst lowest."""
    lost = row["teacher_right"] and not row["right"]
    return -lost * (1 + row["loops"]), -row["loops"], row["right"], row["id"]
