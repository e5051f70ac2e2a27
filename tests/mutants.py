"""Faults put in on purpose, one at a time: `python tests/mutants.py [WORD...]` says which of them
the tests notice.

A mutant is a line of the package made wrong. It is applied to a copy of the package, the tests that
guard it run there until one fails, and the mutant is killed by that failure, or by running longer
than SECONDS, or it survives: then what it breaks could break unseen. The table goes to
results/faults/mutants.md (with words, which choose mutants by file or text, to the screen alone).

A mutant whose line is no longer in its file is stale: it has to be written anew
(test_mutants.py says so in seconds). The tests that guard are run first without any mutant: where
they fail already, or choose no test, their mutants are not run, and say GUARD FAILS. Exit code 1
when one is stale, a guard fails, or fewer than LEAST are killed.

One process imports what tests import besides the package, and forks for each mutant: importing it
again would take most of the time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "results" / "faults" / "mutants.md"
SECONDS = 300.0  # of a mutant's tests, on a busy machine
LEAST = 0.95
IMPORTED = (
    "torch",
    "pytest",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "scipy.stats",
    "safetensors.torch",
    "fsspec",
    "rich.progress",
    "gguf",
    "compressed_tensors",
    "torch.distributed",
    "hydra",
    "tokenizers",
    "psutil",
)


class Mutant(NamedTuple):
    """`old`, once in `file` of the package however it is laid out, becomes `new`; `tests` are
    arguments of pytest below tests/.
    """

    file: str
    old: str
    new: str
    tests: str


LOSSES, SIGNAL, GRIDS = (
    "distill/test_losses.py",
    "distill/test_signals.py",
    "quant/test_grids.py -k not(llama_cpp)",
)
UNEVEN = "quant/test_grids.py -k iq4_nl or uneven or mxfp4 or e2m1 or nvfp4 or searched"
PAIRED, BUDGET, STORE = "score/test_intervals.py -k not(cover)", "test_budget.py", "test_store.py"
STEP = "train/test_training.py -k plain_gradient"
RESUME = "train/test_training.py -k bf16_weights_train_and_resume"
ROUNDING = "train/test_training.py -k stochastic_adamw_follows"
BEST = "train/test_training.py -k best_weights_by_validation"
RATES = "train/test_training.py -k (schedule_warms_up)or(wsd_stays)"
TUNED = "serve/test_tune.py -k paced or load_of_others"
ROOM = "train/test_training.py -k asked_for_before"


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Mutants of one file that the same tests guard."""
    return [Mutant(file, old, new, tests) for old, new in changes]


CONVERTED = "formats/test_converted.py -k "
MUTANTS = [
    *of(
        "formats/converter.py",
        CONVERTED + "transposed or two_grids or codes_land",
        ("Place(name, row))", "Place(name, 0))"),
        ("if len(places) < len(rows_RC):", "if not places:"),
        ("if len(kinds) > 1:", "if len(kinds) > 2:"),
        ("if rows > 0]:", "if rows > 1]:"),
    ),
    *of(
        "formats/families.py",
        CONVERTED + "no_file_can_say",
        ("window >= config.max_position_embeddings", "window >= 1"),
        ("c.query_pre_attn_scalar == _head_dim(c)", "c.query_pre_attn_scalar > 0"),
        ("full = [(i + 1) % n == 0", "full = [i % n == 0"),
        ("if kind not in family.ropes:", "if not family.ropes:"),
    ),
    *of(
        "formats/torch_decoding.py",
        "formats/test_torch_decoding.py -k llama or alone or token_left or penalty",
        ("[0] * len(pads)", "[1] * len(pads)"),
        ("kwargs = kwargs | by_row", "kwargs = kwargs"),
        ("(len(ids) - 1 for ids in prompts)", "(len(ids) for ids in prompts)"),
        ("- UNWEIGHTED:", "- UNWEIGHTED and False:"),
    ),
    *of(
        "models/loaded.py",
        "models/test_loading.py -k see_ahead",
        ("shifted_1L[:, half:]]", "ids_1L[:, half:]]"),
    ),
    *of(
        "score/draft.py",
        "score/test_draft.py",
        ("sum(before) / sum(after)", "sum(after) / sum(before)"),
        ("if number % 2 else", "if number else"),
        ("its.get(i) != token", "i not in its"),
    ),
    *of(
        "formats/gguf_sentencepiece.py",
        CONVERTED + "sentencepiece or cut_vocabulary",
        ("scores.setdefault(token, -float(place))", "scores.setdefault(token, float(place))"),
        ("if token in scores and token != last:", "if token in scores and token == last:"),
    ),
    *of(
        "score/parity.py",
        CONVERTED + "another_number",
        ("expected or numbers_of(twin), reloaded", "reloaded.tensors(), reloaded"),
    ),
    *of(
        "prune/vocabulary.py",
        "prune/test_vocabulary_cut.py",
        ("weight[i] += count", "weight[i] = count"),
        ("tokens_added += used[leaf]", "tokens_added += weight[leaf]"),
        ("weight[ids[part]] += weight[leaf]", "pass"),
        ("used[ids[part]] += used[leaf]", "pass"),
        (".softmax(-1).sum(0)", ".softmax(-1).amax(0)"),
    ),
    *of(
        "stages/prune_vocab.py",
        "stages/test_prune_vocab.py -k expects",
        ("read_in(teacher, reading(parent, ctx.teacher))", "read_in(teacher, None)"),
        ("1 - stays / expected", "stays / expected"),
        ("load_stored(ctx.teacher)", "load_stored(parent)"),
    ),
    *of(
        "search/sizes.py",
        "search/test_shapes.py",
        (
            "RECORD_BYTES + len(gguf.gguf_name(name)) + 8 * len(dims)",
            "RECORD_BYTES + 8 * len(dims)",
        ),
        ("padded(round(prod(dims) * bits / 8))", "round(prod(dims) * bits / 8)"),
        ("(len(str(number)) - 1 for number", "(0 for number"),
        ("bits = 32.0 if len(dims) == 1", "bits = 16.0 if len(dims) == 1"),
    ),
    *of(
        "search/speed.py",
        "search/test_speed.py",
        ("rows / scale / measured[:, None]", "rows / scale"),
        ("blocks * shape.kv_heads", "shape.kv_heads"),
        ("reversed(shapes)", "shapes"),
        ("np.median(logs_RS - means_R1, 0)", "np.max(logs_RS - means_R1, 0)"),
        ("np.median(logs_RS - means_R1, 0)", "np.median(logs_RS, 0)"),
        ('else record["times"][::-1]', 'else record["times"]'),
        ("% 2 == 0 and any(signs)", "% 2 == 0"),
    ),
    *of(
        "search/explore.py",
        "search/test_explore.py",
        ("np.maximum.accumulate(", "np.asarray("),
        ("return lowest + others", "return others + lowest"),
        ("results.add(_raised(lowered, levels, allowed, down))", "results.add(lowered)"),
        ("if len(nats) < len(survivors):", "if not nats:"),
        ("estimate = damages.corrected(measured)", "estimate = len"),
    ),
    *of(
        "search/limits.py",
        "search/test_limits.py",
        ("return figure <= self.value * (1 - self.margin)", "return figure <= self.value"),
        ("return figure >= self.value * (1 + self.margin)", "return figure >= self.value"),
        (
            "levels.stepped(shape, name, -1) not in shapes",
            "levels.stepped(shape, name, 1) in shapes",
        ),
    ),
    *of(
        "session.py",
        "test_planning.py -k before",
        ("given = min(rows, stage.calibration_rows())", "given = stage.calibration_rows()"),
        ("_about(slot, parent, check_unquantized, session.teacher.path)", "pass"),
    ),
    *of(
        "report/picture.py",
        "report/test_candidates.py",
        ("[run.final for run in runs], between_runs=True", "[run.final for run in runs]"),
        ("ends = [[p.y - p.ends[0]], [p.ends[1] - p.y]]", "ends = [[0.0], [p.ends[1] - p.y]]"),
    ),
    *of(
        "report/table.py",
        "report/test_candidates.py",
        ("KL if len(tokens) == 1 else BITS", "KL"),
    ),
    *of(
        "search/judge.py",
        "search/test_solve.py -k smaller_vocabulary",
        ("vocabulary_nats=more_nats / self._plain.tokens", "vocabulary_nats=0.0"),
    ),
    *of(
        "distill/losses.py",
        LOSSES,
        ("grad_CV = q_CV.sub_(p_CV)", "grad_CV = p_CV.sub_(q_CV)"),
        ("g_CV = log_q_CV - log_p_CV", "g_CV = log_p_CV - log_q_CV"),
        ("(temperature**2 * kl_C * loss_C)", "(temperature * kl_C * loss_C)"),
        ("grad_CV.mul_(temperature * kl_C[:, None])", "grad_CV.mul_(kl_C[:, None])"),
        ("g_CV = 0.5 * difference_CV.sign()", "g_CV = difference_CV.sign()"),
        (
            "log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta)",
            "log_p_CV + math.log1p(-beta), log_q_CV + math.log(beta)",
        ),
        (
            "torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))",
            "(beta * p_CV + (1 - beta) * q_CV).log()",
        ),
        (
            "loss_C = beta * torch.linalg.vecdot(p_CV",
            "loss_C = (1 - beta) * torch.linalg.vecdot(p_CV",
        ),
        (
            "(target.probs_NK * targets_CK).sum(-1) - target.entropy_N)",
            "(target.probs_NK * targets_CK).sum(-1))",
        ),
        ("-kl_C[:, None] * target.probs_NK", "-target.probs_NK"),
        (
            "grad_CV.scatter_add_(1, labels_C[:, None], -ce_C[:, None])",
            "grad_CV.scatter_add_(1, labels_C[:, None], ce_C[:, None])",
        ),
        (
            "loss * mix.temperature**2, grad_CV.mul_(mix.temperature)",
            "loss * mix.temperature**2, grad_CV",
        ),
        ("grad_CV[:, :shared] -= (", "grad_CV[:, :shared] += ("),
        (
            "weight_C = (mix.kl_weight + mix.ce_weight) * counted_C",
            "weight_C = mix.kl_weight * counted_C",
        ),
        (".pow(2).mean(-1) * mask_N).sum()", ".pow(2).mean(-1)).sum()"),
    ),
    *of(
        "distill/fused_head.py",
        LOSSES,
        ("fresh=into_VH is None and start == 0", "fresh=start == 0"),
        (
            "summed = torch.promote_types(weight_VH.dtype, torch.float32)",
            "summed = weight_VH.dtype",
        ),
        ("not torch.is_grad_enabled()", "False"),
    ),
    *of(
        "train/trainer.py",
        STEP,
        (
            "torch._foreach_mul_(grads, clip * parallel.world() / count)",
            "torch._foreach_mul_(grads, clip * parallel.world())",
        ),
        ("clip = min(1.0, plan.grad_clip / (norm + 1e-6))", "clip = 1.0"),
        ('group["lr"] = rate', 'group["lr"] = plan.lr'),
        ("loss += float(loss_sum.detach())", "loss = float(loss_sum.detach())"),
        ("else norm_tensor) * parallel.world() / count", "else norm_tensor) * parallel.world()"),
    ),
    *of(
        "distill/batches.py",
        STEP,
        ("return loss, torch.count_nonzero(mask_N)", "return loss, torch.tensor(mask_N.numel())"),
    ),
    *of(
        "stages/training.py",
        "train/test_training.py -k no_row_of_the_validation",
        ("rows = min(rows, validation_rows[0])", "rows = min(rows, len(data.ids))"),
    ),
    *of(
        "train/optimizer.py",
        RATES,
        (
            'share = cosine if schedule == "cosine" else wsd',
            'share = wsd if schedule == "cosine" else cosine',
        ),
        ("(step + 1) / max(1, warmup_steps)", "step / max(1, warmup_steps)"),
        ("(LR_FLOOR + (1 - LR_FLOOR) * share)", "share"),
    ),
    *of(
        "train/trainer.py",
        RESUME,
        ("torch.manual_seed(plan.seed * 1_000_003 + step)", "torch.initial_seed()"),
    ),
    *of(
        "train/state.py",
        RESUME,
        ('tensors[f"param/{name}"] = p.detach()', 'tensors[f"param/{name}"] = p.detach().clone()'),
        ('tensors |= {f"{m}/{name}": moment for m, moment in moments.items()}', "pass"),
        ('step = float(state["step"])', "step = 0.0"),
    ),
    *of(
        "train/state.py",
        "train/test_training.py -k where_its_weights_lie",
        ("torch.tensor(step, device=p.device)", "torch.tensor(step)"),
    ),
    *of(
        "train/trainer.py",
        BEST,
        ('if kl < self.state["best_kl"]:', 'if kl > self.state["best_kl"]:'),
        ("parallel.local(self.trained[name]).copy_(p)", "pass"),
    ),
    *of(
        "train/loop.py",
        BEST,
        ("0 < plan.patience <= since_best", "0 < plan.patience < since_best"),
    ),
    *of(
        "train/optimizer.py",
        ROUNDING,
        ("root = (square / (1 - b2**t)).sqrt_()", "root = square.sqrt()"),
        ("value=-lr / (1 - b1**t)", "value=-lr"),
        ("torch.randint(0, 1 << 16, x.shape", "torch.randint(0, 1, x.shape"),
    ),
    *of(
        "train/trainer.py",
        "train/test_training.py -k halves_the_micro_batch",
        ('max(1, self.state["micro"] // 2)', "1"),
    ),
    *of(
        "train/trainer.py",
        "train/test_training.py -k a_nan_stops",
        ("if not math.isfinite(loss) or not math.isfinite(norm):", "if False:"),
    ),
    *of(
        "train/trainer.py",
        "train/test_training.py -k add_up_over_micro_batches",
        ("self.sums_fp32 and len(batches) > 1", "False"),
    ),
    *of(
        "train/optimizer.py",
        "train/test_training.py -k rotary",
        (
            "model.state_dict(keep_vars=True).items()",
            "[*model.named_parameters(), *model.named_buffers()]",
        ),
    ),
    *of(
        "stages/training.py",
        ROOM,
        ('best_device().type == "cpu" and needed > free', "False"),
        ('learns["weights"] * bool(self.validations)', "0"),
    ),
    *of("stages/distill.py", ROOM, ("self.reserve(model, ctx)", "pass")),
    *of(
        "stages/qat.py",
        ROOM,
        ("self.reserve(model, ctx, copies=int(not scales_alone), frozen=frozen)", "pass"),
    ),
    *of(
        "serve/trials.py",
        TUNED,
        ("if low <= 1:", "if mean <= 1:"),
        ("if reached < right:", "if False:"),
        ("share > BUSY", "share > 1"),
        ("geometric_mean(ratios)[1] > 1", "geometric_mean(ratios)[2] > 1"),
        ("[await bench.block(defaults, best)", "[1.5"),
        ("math.sqrt(a1 * a2 / (b1 * b2))", "math.sqrt(b1 * b2 / (a1 * a2))"),
        ("- (after.ours - before.ours)", ""),
    ),
    *of(
        "serve/tuning.py",
        "serve/test_tune.py -k not(paced)",
        ('entry["model"] == model and entry["machine"] == where', 'entry["model"] == model'),
        ('if entry["verdict"] != "faster":', "if False:"),
        ('and entry["verdict"] == "withheld":', "and False:"),
        ("params.cache_type_k = params.cache_type_v = ", "params.cache_type_k = "),
    ),
    *of(
        "score/energy.py",
        "score/test_energy.py",
        ("% (counter.range + 1)", "% counter.range"),
        ('re.compile(r"intel-rapl:\\d+")', 're.compile(r"intel-rapl:.*")'),
        ("Counter(1000 * millijoules", "Counter(millijoules"),
    ),
    *of(
        "score/latency.py",
        "score/test_energy.py",
        ("joules / (timing.repeats * timing.new_tokens)", "joules / timing.new_tokens"),
        ("joules * timing.repeats / runs", "joules"),
        ("while runs < timing.repeats or", "while"),
    ),
    *of(
        "budget.py",
        "test_budget.py",
        ("int(length) not in lengths", "False"),
    ),
    *of(
        "train/parallel.py",
        "train/test_parallel.py -k longer_than_any_stage",
        ("WAIT = timedelta(days=30)", "WAIT = timedelta(minutes=30)"),
    ),
    *of(
        "train/parallel.py",
        "train/test_parallel.py -k shards_train_in_bf16",
        ("cast_forward_inputs=False", "cast_forward_inputs=True"),
    ),
    *of(
        "train/optimizer.py",
        "train/test_parallel.py -k shards_train_in_bf16_as_one_process_does[bf16_stochastic]",
        ("parallel.local(p), parallel.local(p.grad)", "p, p.grad"),
    ),
    *of(
        "quant/shards.py",
        "train/test_parallel_qat.py -k lowrank and give_the_codes",
        ("parallel.add_up(gradient)", "pass"),
    ),
    *of(
        "train/state.py",
        "train/test_state.py -k not(kill)",
        ("self.seconds / SAVE_SHARE", "0.0"),
        ('part.to("cpu", copy=True)', "part"),
    ),
    *of(
        "train/launchers.py",
        "train/test_launchers.py -k variables_of_every or half_an or first_node",
        ("if rank >= world:", "if rank > world:"),
        ('"SLURM_STEP_ID" in environment or', "True or"),
        ("counts[node] if node < len(counts) else world", "world"),
    ),
    *of(
        "train/packed.py",
        "distill/test_signals.py -k windows_of_its_shards",
        (".split(files)", ".split(len(order) + 10**9)"),
        ("places = places[places < size]", "pass"),
    ),
    *of(
        "distill/online.py",
        "stages/test_contract.py -k leaves_the_random_numbers",
        ("torch.random.fork_rng()", "torch.random.fork_rng(enabled=False)"),
    ),
    *of(
        "distill/online.py",
        "stages/test_contract.py -k writes_no_padding",
        ("suppress_tokens=padding", "suppress_tokens=None"),
    ),
    *of(
        "stages/qat.py",
        "stages/test_contract.py -k padded_head_is_quantized",
        ("= common_vocabulary(parent, learned_from)", "= None"),
    ),
    *of(
        "models/tokenizer.py",
        "stages/test_contract.py -k ids_with_gaps",
        ("max(tokenizer.get_vocab().values(), default=-1) + 1", "len(tokenizer)"),
    ),
    *of(
        "stages/lora.py",
        "stages/test_contract.py -k adapters_reach",
        ("isinstance(module, nn.Linear | Conv1D)", "isinstance(module, nn.Linear)"),
        ("parameter.ndim == 3 and", "False and"),
    ),
    *of(
        "distill/signals.py",
        SIGNAL,
        ('if path.rsplit("/", 1)[1] != _name(number, data):', "if False:"),
        ("if recorded.get(key) != asked:", "if False:"),
        ("n % parallel.world() == parallel.rank()", "parallel.world()"),
        (
            "model.to(best_device())",
            'model.to(best_device() if self.load == "plain" else "cpu")',
        ),
    ),
    *of(
        "distill/schemes.py",
        SIGNAL,
        ("(p_CV >= tau).nonzero", "(p_CV >= 2 * tau).nonzero"),
        ("(u_C[draw_token] + number) / draws_C", "(0.5 + number) / draws_C"),
        ("(rest_C.double() / tau).ceil()", "(rest_C.double() / tau).floor()"),
        ("p /= (kept_N + rest_N)[token]", "pass"),
        ("entropy_C = (max_C1 + sum_C1.log())", "entropy_C = (sum_C1.log())"),
        ("torch.where(block_M > 0, ends_CB[token_M, (block_M - 1).clamp_min(0)], 0.0)", "0.0"),
        ('joined["ids_high"].long() << 16', 'joined["ids_high"].long() << 15'),
        ("logits_CV.div_(scheme.temperature)", "logits_CV.mul_(scheme.temperature)"),
        (".round().clamp(-127, 127)", ".round().clamp(-63, 63)"),
    ),
    *of("stages/training.py", "distill/test_signals.py -k listings", ("signals.refresh()", "pass")),
    *of(
        "quant/grids/grid.py",
        GRIDS,
        ("return q.round_().clamp_(self.low, self.high)", "return q.round_()"),
        ("return codes.sub_(self.offset)", "return codes"),
        ("return q.add_(self.offset) if self.offset else q", "return q"),
        ("q.add_(floor)", "q.sub_(floor)"),
        ("return q.round_().clamp_(", "return q.floor_().clamp_("),
        ("return q.round_().clamp_(", "return q.trunc_().clamp_("),
        ("if not (torch.isfinite(least) and torch.isfinite(most)):", "if False:"),
        (
            "legal_columns = max(row, round(columns / row) * row)",
            "legal_columns = block",
        ),
    ),
    *of(
        "quant/grids/grid.py",
        "quant/test_grids.py -k comes_back",
        (
            "torch.where(is_code(x), x, value + (1 - CELL_MARGIN) * share * way)",
            "value + (1 - CELL_MARGIN) * share * way",
        ),
        ("is_code(value + (share + step) * way)", "is_code(value + step * way)"),
    ),
    Mutant(
        "quant/blockwise.py",
        'if self.method == "gptq":\n                made',
        "if False:\n                made",
        "stages/test_qat.py -k every_weight_as_near",
    ),
    *of(
        "quant/grids/grid.py",
        "quant/test_grids.py -k holds",
        ("for rows in (w[:FIRST_ROWS], w)", "for rows in (w[:FIRST_ROWS],)"),
        ("UNMOVED * before.square().sum()", "0.01 * before.square().sum()"),
    ),
    *of(
        "quant/blockwise.py",
        "quant/test_blockwise.py",
        ("and not any(stays)", "and not all(stays)"),
        ("and not all(stays):", "and not any(stays):"),
    ),
    *of(
        "quant/settings.py",
        "quant/test_allocate.py -k bits",
        ("int(self.bits_per_weight * weights / 8)", "int(self.bits_per_weight * weights / 7)"),
        ("if self.file_bytes and self.bits_per_weight:", "if False:"),
    ),
    Mutant(
        "quant/allocate.py",
        "0.0 if lossless else text.divergence(first)",
        "text.divergence(first)",
        "quant/test_allocate.py -k lies",
    ),
    *of(
        "quant/allocate.py",
        "quant/test_allocate.py -k neighbours",
        ("name: lost * (weight.numel() / weights)", "name: lost"),
        ("int(index) // blocks_together", "int(index)"),
        ("takers.setdefault(grid, {})[name] = weight", "takers.setdefault(grid, dict(group))"),
    ),
    *of(
        "stages/ptq.py",
        "test_planning.py -k mixture",
        (
            "groups = PLACES * -(-blocks // self.allocate.blocks_together)",
            "groups = PLACES * blocks",
        ),
        ("-(-groups * len(self.allocate.grids) // 2)", "groups"),
    ),
    Mutant(
        "quant/allocate.py",
        "if len(legal_grids[name]) > 1]",
        "]",
        "quant/test_allocate.py -k no_choice",
    ),
    Mutant(
        "stages/ptq.py",
        '"blocks_together": self.allocate.blocks_together}',
        '"blocks_together": 1}',
        "quant/test_allocate.py -k two_stages",
    ),
    *of(
        "score/parity.py",
        "formats/test_parity.py -k 256",
        ("KL_MOST[together]", "KL_MOST[32]"),
        ("else TOP1_LEAST[together]", "else TOP1_LEAST[32]"),
        ("grids = {matrix.grid for matrix in", "grids = {kind for matrix in"),
    ),
    *of(
        "search/recipe.py",
        "search/test_solve.py -k without_room or becomes_a_mixture",
        ("any(length % alike.block == 0 for length in lengths)", "True"),
        ("if grid != alike.name and bits == alike.bits_per_weight:", "if True:"),
        ('if most_bytes else {"bits_per_weight"', 'if True else {"bits_per_weight"'),
    ),
    *of(
        "quant/allocate.py",
        "quant/test_allocate.py -k lies",
        ("best in (None, grid) or", "best is None or"),
        ("if best in (None, grid) or bits[grid] < bits[best]", "if True"),
        ("// 2}.", "// 3}."),
    ),
    *of(
        "search/solution.py",
        "search/test_solve.py -k heals",
        (
            "_cuts_ids_alone(solution) and not rate_of_healing(solution)",
            "not rate_of_healing(solution)",
        ),
    ),
    *of(
        "search/recipe.py",
        "search/test_solve.py -k finer",
        ('("q5_0", "q8_0", *held)', '("q5_0", "q8_0")'),
    ),
    *of(
        "threads.py",
        "test_threads.py",
        ("if cpu in allowed", "if cpu not in allowed"),
        ("if busy >= BUSY_CPUS:", "if True:"),
        ('os.environ.setdefault("OMP_WAIT_POLICY", "passive")', "pass"),
    ),
    Mutant(
        "pipeline.py",
        "sign_bundle(bundle, Path(key).expanduser())",
        "pass",
        "test_pipeline.py -k signed",
    ),
    *of(
        "quant/grids/grid.py",
        "quant/test_grid_limits.py",
        ("> self.largest:", "> 1.01 * self.largest:"),
    ),
    *of(
        "quant/grids/grid.py",
        "quant/test_fake.py -k oracle",
        (".eq_(q)", ".ne_(q)"),
    ),
    *of(
        "quant/grids/grid.py",
        "quant/test_fake.py -k lsq",
        ("torch.linalg.vecdot(out, x)", "torch.linalg.vecdot(g, x)"),
        ("torch.linalg.vecdot(g, value.float())", "torch.linalg.vecdot(out, value.float())"),
    ),
    *of(
        "models/gguf_header.py",
        "models/test_gguf_header.py -k kept",
        ("stat.st_mtime_ns))", "0))"),
        ("return dict(_metadata(", "return (_metadata("),
    ),
    *of(
        "quant/grids/nonlinear.py",
        UNEVEN,
        ("-22, -10, 1, 13,", "-22, -10, 0, 13,"),
        ("/ 2, right=True)", "/ 2, right=False)"),
        ("return numbers[code], code.float()", "return numbers[code], 15 - code.float()"),
        ("self.rounded(x * inverse(scale)))", "self.rounded(x * inverse(scale.half().float())))"),
        ("range(self.low - 7, self.low + 8)", "range(self.low - 7, self.low + 7)"),
        ("floor() + (EXPONENT - 3)", "floor() + (EXPONENT - 2)"),
        ("8 * (q < 0)", "8 * (q <= 0)"),
        ("abs().mul_(2).ceil_()", "abs().mul_(2).floor_()"),
        ("errors.argmin(0, keepdim=True))[0].half()", "errors.argmax(0, keepdim=True))[0].half()"),
        ("most, tried = 126, range(-3, 10)", "most, tried = 126, range(-3, 7)"),
        ("(target * 512 + 0.5)", "(target * 512)"),
        ("((bits >> 19) + 1) >> 1", "(bits >> 19) >> 1"),
        ("torch.where(coarse < 120, coarse", "torch.where(coarse < 127, coarse"),
        ("x.abs() > step * middle", "x.abs() >= step * middle"),
        ("bytes.view(-1, 4), nibbles", "nibbles, bytes.view(-1, 4)"),
    ),
    *of(
        "formats/onnx_activations.py",
        "formats/test_onnx_activations.py",
        ("while enough - too_few > 1:", "while enough - too_few > 4:"),
        ("key=lambda name: -errors[name]", "key=lambda name: errors[name]"),
        ("keepdims=True) / 127", "keepdims=True) / 120"),
        ("FP32 if name in kept", "FP32 if name not in kept"),
        ("(full.exp() * (full - other))", "(other.exp() * (full - other))"),
    ),
    *of(
        "quant/grids/nonlinear.py",
        "models/test_uneven_ends.py",
        ("for end in (low, high)", "for end in (low,)"),
        ("for end in (low, high)", "for end in (high,)"),
    ),
    *of(
        "quant/grids/nonlinear.py",
        "quant/test_fake.py -k oracle",
        ("self.low - 11.5, self.high + 12.0", "self.low - 0.5, self.high + 0.5"),
    ),
    *of("quant/grids/integer.py", GRIDS, ("return s, -z * s", "return s, z * s")),
    *of(
        "quant/grids/integer.py",
        "quant/test_grid_limits.py",
        ("s = ((most - least) / 15)", "s = ((most - least) / 16)"),
    ),
    *of("quant/grids/kquants.py", GRIDS, (".round_().clamp_(0, 63)", ".round_().clamp_(0, 62)")),
    *of(
        "score/intervals.py",
        PAIRED,
        ("kept = (student + both - chance) /", "kept = (student + both) /"),
        ('"points_lost": teacher - student', '"points_lost": student - teacher'),
        ('"flips": teacher + student', '"flips": teacher'),
        ("min(1.0, 2 * half_binomial_below", "min(1.0, half_binomial_below"),
        ("(len(ordered) - i) *", "len(ordered) *"),
        ("np.maximum.accumulate(raised)", "np.array(raised)"),
        ("dirichlet(counts + 0.5, resamples)", "dirichlet(counts + 1.0, resamples)"),
        ("[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]"),
        ("<= chance_by_task[task]", "<= -1"),
        ("t_quantile(0.975, count - 1)", "1.96"),
        (
            "2 * reference.astype(int) + student.astype(int)",
            "2 * student.astype(int) + reference.astype(int)",
        ),
        ('if item["doc_id"] in docs:', "if False:"),
    ),
    *of(
        "budget.py",
        BUDGET,
        ("inside = [high <= bound, low <= bound]", "inside = [low <= bound, low <= bound]"),
        ("[low >= bound, high >= bound]", "[high >= bound, high >= bound]"),
        ("(FAIL, INCONCLUSIVE) if strict else (FAIL,)", "(FAIL,)"),
        ('v["enforced"] and v["verdict"]', 'v["verdict"]'),
        ("/ (bound - value)) ** 2", "/ (bound - value)) ** 1"),
        ('INCONCLUSIVE, f"{name} was not', 'PASS, f"{name} was not'),
        ("round(n * (factor - 1))", "round(n * factor)"),
        (
            "span[1] - value if value < bound else value - span[0]",
            "value - span[0] if value < bound else span[1] - value",
        ),
    ),
    *of(
        "store.py",
        STORE,
        ("if expected.get(name) != actual.get(name):", "if False:"),
        (
            "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ),
        ("if self.has(key):  # another process", "if False:  # another process"),
        (
            "shutil.rmtree(work, ignore_errors=True)\n            return self.entry(key)",
            "return self.entry(key)",
        ),
    ),
    *of(
        "collect.py",
        STORE,
        ("if (torn or unnamed) and not (key and _held(store, key)):", "if torn or unnamed:"),
        ("unnamed = key not in keep if key else", "unnamed = True if key else"),
        ("for path in doomed if not dry_run else ():", "for path in doomed:"),
    ),
    *of(
        "collect.py",
        "test_collect.py",
        (
            'unnamed = room in ("signals", "data") and not unfinished',
            'unnamed = room in ("signals", "data")',
        ),
        ("or name in (STAGE_JSON, *table)", "or True"),
    ),
    *of(
        "models/walk.py",
        "models/test_walk.py",
        ("not torch.isfinite(out_BLH).all()", "False"),
        ("len(heard) == len(takers)", "False"),
        ("other.states = list(self.states)", "pass"),
        ("self._place.leave()", "pass"),
        ("one = self._noted(self.ids_BL[:1], others)", "one = self._noted(self.ids_BL, others)"),
        ("max(done - self.first, 1e-9)", "max(done, 1e-9)"),
    ),
    *of(
        "models/walk.py",
        "models/test_stored.py -k goes_home",
        ("parameter.data = parameter.data.to(self.stored[name])", "pass"),
    ),
    *of(
        "models/tensor_file.py",
        "models/test_stored.py -k safetensors_own",
        ("(ranks.index(entries[name].dtype), name)", "name"),
        ('text += b" " * (-len(text) % 8)', "pass"),
    ),
    *of(
        "train/moments.py",
        "train/test_moments.py",
        ("start // BLOCK", "0"),
        ("signed=name == MOMENTS[0]", "signed=False"),
    ),
    *of(
        "memory.py",
        "test_memory.py -k 7b or one_phase",
        (
            "item.device + item.host for item in items if item.what != CONTEXT_NAME",
            "item.device for item in items",
        ),
        ('"gradients": size + sums, "moments": moments', '"gradients": size + sums'),
    ),
    *of(
        "prune/compensation.py",
        "prune/test_compensation.py",
        (
            "self.weight_HF.addmm_(self.weight_HF[:, columns_D], solved_DF, alpha=-1)",
            "self.weight_HF.addmm_(self.weight_HF[:, columns_D], solved_DF)",
        ),
        (
            "inverse_FF.addmm_(inverse_FF[:, columns_D], solved_DF, alpha=-1)",
            "inverse_FF[columns_D] = 0",
        ),
        ("rows_KF = damp(gram_FF, damping)[keep_K]", "rows_KF = gram_FF.double()[keep_K]"),
        ("(went < share - keep_share)[group_of_M]", "(went >= 0)[group_of_M]"),
        ("if self.rows % HELD_OUT:", "if self.rows % HELD_OUT != 1:"),
        (
            "return fitted(whole_FF, damping, whole_FF)",
            "return fitted(inputs.fit_FF, damping, whole_FF)",
        ),
    ),
    *of(
        "prune/folding.py",
        "prune/test_folding.py",
        ("self.cross_FH + pull_FF @ old_HF.double().T", "self.cross_FH"),
        ("fit.with_others(held_out).solved(old_HF, damping)", "fit.solved(old_HF, damping)"),
    ),
    *of(
        "prune/folding.py",
        "stages/test_prune_depth.py -k a_fold_is",
        ("rest.append(h_BLH - m_BLH.to(h_BLH.device))", "rest.append(h_BLH)"),
        ("target_BLH = target_BLH - down.bias", "target_BLH = target_BLH"),
        ("walk.states[at] = rest_BLH + given_BLH.to(rest_BLH.device)", "pass"),
        ("for block in range(passed, behind):", "for block in (index,):"),
    ),
    *of(
        "prune/heads.py",
        "stages/test_prune_heads.py -k keeps_as_many or biases",
        (
            "torch.unique(cut.keep_K // (width * present.share))",
            "torch.arange(keep.kv_heads)",
        ),
    ),
    *of(
        "prune/linears.py",
        "stages/test_prune_heads.py -k biases",
        ("linear.bias[rows_K].contiguous()", "linear.bias[: len(rows_K)].contiguous()"),
    ),
    *of(
        "prune/linears.py",
        "prune/test_structures.py -k transposed",
        ("nn.Parameter(weight_RC.T.contiguous()", "nn.Parameter(weight_RC.contiguous()"),
        ("linear.nf, linear.nx = outputs, inputs", "pass"),
    ),
    *of(
        "models/blocks.py",
        "models/test_blocks.py -k parts_are or fused_projection",
        ("rows.view(-1, 3, width).unbind(1)", "rows.view(3, -1, width).unbind(0)"),
        ("shared = (len(rows) - columns) // 2", "shared = columns // 2"),
    ),
    Mutant(
        "distill/taps.py",
        "out[..., rows_K.to(out.device)]",
        "out[..., : len(rows_K)]",
        "models/test_blocks.py -k fused_projection",
    ),
    *of(
        "models/walk.py",
        "models/test_blocks.py -k positional or something_of_each_row",
        ("return x_BLH if others is None else (x_BLH, *others)", "return x_BLH"),
        ("arguments.append((args[1:], given))", "arguments.append(((), given))"),
        ("not _same(one, two)", "False"),
    ),
    *of(
        "prune/importance.py",
        "prune/test_structures.py -k fused_ffn",
        ("cut.keep_K + half * width", "cut.keep_K"),
    ),
    *of(
        "prune/heads.py",
        "prune/test_structures.py -k fused_attention",
        ("part.rows_K[kept_K.cpu()]", "kept_K.cpu()"),
        ("attention.config.num_attention_heads = keep.kv_heads * keep.share", "pass"),
    ),
    *of(
        "prune/folding.py",
        "prune/test_structures.py -k scaled_stream",
        ("(z_BLH - rest[-1]) / scale", "z_BLH - rest[-1]"),
        ("scale * m_BLH.float()", "m_BLH.float()"),
    ),
    *of(
        "prune/shape.py",
        "prune/test_structures.py -k know_their_numbers",
        ("value is True or value not in (None, False, 1, [])", "value is True"),
        ("for key in DEPTH_KEYS if key in config", "for key in DEPTH_KEYS[:1]"),
    ),
    *of(
        "quant/balance.py",
        "quant/test_balance.py -k folding_any",
        (
            "channels[-inputs_of(block.get_submodule(row.down)) :]",
            "channels[: inputs_of(block.get_submodule(row.down))]",
        ),
        ("maker.bias.div_(s_C)", "pass"),
        ("maker if row.gated else None", "maker"),
    ),
    *of(
        "quant/fake.py",
        "quant/test_fake.py -k stacked",
        (
            'return f"quant_{part}" if self.attribute == "weight" else '
            'f"quant_{part}_{self.attribute}"',
            'return f"quant_{part}"',
        ),
    ),
    *of(
        "prune/importance.py",
        "prune/test_importance.py",
        ("influence < lower[-1][0]", "influence > lower[-1][0]"),
        ("at = kept.index(index)", "at = kept.index(index) + 1"),
        ("deque(maxlen=count)", "deque(maxlen=1)"),
    ),
    *of(
        "prune/experts.py",
        "prune/test_cut_experts.py -k worth or twin or below_the_floor or shuffled",
        ("gates_N.double() * size_N", "size_N"),
        ("if error_merged < error:", "if error_merged > error:"),
        ("worth_E[list(rare)] = -1.0", "pass"),
        ("rows = torch.cat([order_F, order_F + len(order_F)])", "rows = slice(None)"),
    ),
    *of(
        "quant/experts.py",
        "quant/test_rounded_experts.py -k moments or balance_leaves",
        ("_gram(z_NC * gates_N[:, None].float())", "_gram(z_NC)"),
        ("lacking * gate * self.all_gram[filler]", "lacking * self.all_gram[filler]"),
        ("ups = slice(mixture.downs.shape[-1], None)", "ups = slice(mixture.downs.shape[-1])"),
    ),
    Mutant(
        "quant/blockwise.py",
        "if id(parameter) not in matrices",
        "if parameter.dim() == 1",
        "quant/test_rounded_experts.py -k killed_run",
    ),
    Mutant(
        "models/blocks.py",
        'return replace(row, router="", gate_up=Row.gate_up, down=Row.down)',
        "return row",
        "quant/test_rounded_experts.py -k plain_ffn",
    ),
    *of(
        "models/ends.py",
        "models/test_ends.py -k union",
        (
            "in stated(checkpoint, tokenizer).values()",
            "in [*stated(checkpoint, tokenizer).values()][:1]",
        ),
    ),
]


def changed(text: str, old: str, new: str) -> str | None:
    """`text` with `new` for `old`; None unless the tokens of `old` are in it exactly once.

    Any whitespace may lie between tokens (words and single other characters), also a comma in front
    of a closing bracket. A comment may not, and a string literal must be cut where `old` cuts it.
    """
    tokens = re.findall(r"\w+|[^\w\s]", old)
    pattern = r"(?<!\w)" if re.match(r"\w", tokens[0]) else ""
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        pattern += re.escape(token)
        if re.match(r"\w", token):
            pattern += r"(?!\w)"
        if following:
            pattern += r"\s*,?\s*" if following in ")]}" else r"\s*"
    places = list(re.finditer(pattern, text))
    if len(places) != 1:
        return None
    return text[: places[0].start()] + new + text[places[0].end() :]


def copy_of_the_package(folder: Path) -> Path:
    """What the tests need, below `folder`."""
    for name in ("compress", "tests", "configs", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def pytest_code(folder: Path, tests: str, output: Path) -> int:
    """pytest's exit code in a fork whose package is the one in `folder`; 1 after SECONDS, too."""
    child = os.fork()
    if not child:
        os.setsid()  # so that what a test starts can be ended with it
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        file, *rest = tests.split(" ", 2)
        os._exit(
            pytest.main(
                [
                    "-x",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    f"--basetemp={folder}/temp",
                    f"tests/{file}",
                    *rest,
                ]
            )
        )
    start = time.monotonic()
    while time.monotonic() - start < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def failing_guards(folder: Path, guards: Iterable[str], output: Path) -> set[str]:
    """Which of the guards do not pass on the package as it is; each runs once."""
    failing = set()
    for tests in dict.fromkeys(guards):
        if code := pytest_code(folder, tests, output):
            failing.add(tests)
            print(f"pytest {tests} ended with {code} without a mutant: {tail(output)}", flush=True)
    return failing


def result_of(mutant: Mutant, folder: Path, output: Path) -> str:
    """What becomes of a mutant in the copy in `folder`, which is left as it was."""
    path = folder / "compress" / mutant.file
    plain = path.read_text()
    text = changed(plain, mutant.old, mutant.new)
    if text is None:
        return "STALE"
    path.write_text(text)
    code = pytest_code(folder, mutant.tests, output)
    path.write_text(plain)
    # Written in the same second with the same length, the next mutant would be taken for this one.
    Path(cache_from_source(str(path))).unlink(missing_ok=True)
    if code not in (0, 1):  # collecting failed
        raise RuntimeError(f"pytest {mutant.tests} ended with {code}: {tail(output)}")
    return "killed" if code else "SURVIVED"


def tail(output: Path) -> str:
    """The end of what pytest said."""
    return output.read_text()[-2000:]


def main(words: list[str]) -> int:
    """Run the mutants that hold any of the words; 0 when enough are killed, none is stale and
    no guard fails.
    """
    chosen = [
        mutant for mutant in MUTANTS if not words or any(word in " ".join(mutant) for word in words)
    ]
    counts = {"killed": 0, "SURVIVED": 0, "STALE": 0, "GUARD FAILS": 0}
    lines, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_of_the_package(Path(temporary))
        for name in IMPORTED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        output = folder / "output"
        failing = failing_guards(folder, (mutant.tests for mutant in chosen), output)
        for mutant in chosen:
            start = time.monotonic()
            result = "GUARD FAILS"
            if mutant.tests not in failing:
                result = result_of(mutant, folder, output)
            counts[result] += 1
            before, after = (
                text.strip().replace("|", "\\|").replace("\n", " ")
                for text in (mutant.old, mutant.new)
            )
            guards = mutant.tests.replace("|", "\\|")
            lines.append(f"| {mutant.file} | `{before}` | `{after or ' '}` | {guards} | {result} |")
            print(
                f"{result:11s} {time.monotonic() - start:6.1f} s  {mutant.file}: {before[:80]}",
                flush=True,
            )
    share = counts["killed"] / max(1, len(chosen))
    summary = (
        f"{len(chosen)} mutants, {counts['killed']} killed ({share:.1%}), {counts['SURVIVED']}"
        f" survived, {counts['STALE']} stale, {counts['GUARD FAILS']} whose guard fails"
    )
    print(f"{summary}, {(time.monotonic() - started) / 60:.1f} minutes")
    if not words:
        heading = (
            "# Mutants\n\nMade by `make test-mutants` (`tests/mutants.py`): each row is one line of"
            " the package made wrong, by itself."
        )
        table = ["| file | line | made | tests | |", "| --- | --- | --- | --- | --- |", *lines]
        REPORT.write_text(
            "\n".join([heading, "", f"{date.today()}: {summary}.", "", *table]) + "\n"
        )
    return int(share < LEAST or counts["STALE"] + counts["GUARD FAILS"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
