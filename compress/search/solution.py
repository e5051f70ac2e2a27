"""All of it: levels, sizes and times of every shape, which of them a budget allows, what the best
of them lose, cut and healed; the choice, its reason, and what each limit costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from compress.budget import Limit, human
from compress.errors import ConfigError
from compress.keys import sources_digest
from compress.models.checkpoint import read_config
from compress.prune.tokenizer_cut import read_bpe
from compress.prune.vocabulary import Usage
from compress.score.latency import Timing
from compress.search.cutting import Workshop, healing_rate
from compress.search.explore import Clock, Damages, Effort, Nats, explore, halve, mutations, singles
from compress.search.kept import Kept
from compress.search.limits import TIMED, Bound, allowed, bounds_of, check_possible, edge
from compress.search.shapes import Family, Shape, steps_of
from compress.search.sizes import Sizes, Skeletons
from compress.search.speed import Bench, SpeedModel, design, fitted, settings_of
from compress.session import Session, check_shapes
from compress.stages.prune_vocab import PruneVocab

LEVELS_ALONE = 3  # of each structure that are measured by themselves
CHECKS = 4  # unfitted shapes that say how far predicted times are off
ROUNDS = 16  # of timing
RELAXED = 0.05  # of a limit, when it is told what it costs
TELLING_TOKENS = 16_384  # of healing: 4,096 bring nothing back (results/prune/search.md)
# Of a limit on bytes, from which on a mixture of grids is worth measuring; and at least so many
# bytes, since records of tensors are counted at their longest there.
ROOM, ROOM_BYTES = 0.03, 200_000
CUTTING_SHARE = 0.55  # of the time; healing has the rest
ALONE_SHARE = 0.35


class Solution(NamedTuple):
    """What a search chose, and of what."""

    shape: Shape
    full: Shape
    bounds: list[Bound]
    figures: dict[Shape, dict[str, float]]  # of every shape that the teacher can be cut to
    damages: Damages
    cut: Nats  # measured after the cut
    healed: list[tuple[int, Nats]]  # after so many tokens, by rung
    prices: dict[str, float]  # limit -> nats that RELAXED of it would give back
    speed: SpeedModel | None
    reason: str
    seconds: float


def solve(
    session: Session,
    limits: Mapping[str, Limit],
    effort: Effort,
    minutes: float,
    *,
    with_speed: bool,
    log: Callable[[str], None],
) -> Solution:
    """The shape within `limits` that loses least. ConfigError for a budget that no shape meets, or
    that limits times which are not to be measured.
    """
    timed = [name for name in limits if name in TIMED]
    if timed and not with_speed:
        raise ConfigError(f"the budget limits {', '.join(timed)}: leave --no-speed out")
    bounds_of(limits, {})  # one that decides nothing is refused before work
    check_shapes(session)  # and a teacher that no student's file could be made of

    # What every shape would be: bytes are exact, times predicted.
    clock = Clock(minutes)
    family, skeletons = opened(session, log)
    sizes = Sizes(family, skeletons.header_bytes)
    figures = sizes_of_all(family, sizes)
    check_possible(figures, [b for b in bounds_of(limits, {}) if b.name not in TIMED])
    workshop = Workshop(session, family.full, log)  # too little text is refused here
    speed = speed_of(session, family, skeletons, log) if with_speed else None
    if speed:
        figures = {shape: values | speed.predict(shape) for shape, values in figures.items()}
    errors = {name: speed.error_p95(name) for name in timed} if speed else {}
    bounds = bounds_of(limits, errors)
    check_possible(figures, bounds)

    # From those that are allowed to one.
    shapes = allowed(figures, bounds)
    starts = edge(shapes, family.levels)
    log(
        f"{len(shapes):,} of {len(figures):,} shapes are within the limits, {len(starts):,} of them"
        f" cut for nothing more; {clock}"
    )
    with session.store.lock(workshop.kept.key):  # two would cut into the same folder
        damages, cut, healed = _tried(workshop, family, shapes, starts, effort, clock, log)
        workshop.close()
    chosen, reason = _choice(cut, healed)
    estimate = damages.corrected(cut)
    prices = {bound.name: _price(bound, bounds, figures, estimate) for bound in bounds}
    return Solution(
        chosen,
        family.full,
        bounds,
        figures,
        damages,
        cut,
        healed,
        prices,
        speed,
        reason,
        clock.spent(),
    )


def opened(session: Session, log: Callable[[str], None]) -> tuple[Family, Skeletons]:
    """The teacher's shapes, and tokenizers of fewer ids."""
    teacher = session.teacher.path

    def usage() -> Usage:
        return PruneVocab().usage(teacher, session.context("vocab", teacher, folder, []))

    # A tokenizer that can't be cut leaves the vocabulary as it is.
    try:
        least_ids = len(read_bpe(teacher).protected)
    except ValueError as error:
        log(f"the vocabulary stays as it is: {error}")
        least_ids = None
    stage = session.recipe.stages[session.recipe.shipped_slot()]
    family = Family(read_config(teacher), stage.layout_name, least_ids)
    folder = session.store.root / "work" / Kept(session.store, _skeleton_settings(session)).key
    return family, Skeletons(teacher, usage, folder)


def _skeleton_settings(session: Session) -> dict[str, Any]:
    """What cut tokenizers depend on."""
    teacher = session.teacher.path
    more = session.vocabulary(teacher)
    texts = [session.text(teacher).digest, more and more.digest]
    return {
        "kind": "skeletons",
        "teacher": session.teacher.digest,
        "texts": texts,
        "stage": asdict(PruneVocab()),
        "precision": session.precision,
        "sources": sources_digest(PruneVocab.__module__),
    }


def sizes_of_all(family: Family, sizes: Sizes) -> dict[Shape, dict[str, float]]:
    """size_bytes and params of every shape that can be made."""
    full = family.full
    return {
        shape: {"size_bytes": sizes.file_bytes(shape), "params": sizes.params(shape)}
        for shape in family.levels.shapes()
        if family.config_of(full._replace(ffn=shape.ffn, kv_heads=shape.kv_heads)) is not None
    }


def speed_of(
    session: Session, family: Family, skeletons: Skeletons, log: Callable[[str], None]
) -> SpeedModel:
    """The times of this machine."""
    settings = session.recipe.eval
    timing = Timing(
        settings.prompt_tokens,
        settings.new_tokens,
        settings.repeats,
        session.threads,
        device=str(settings.device),
    )
    kept = Kept(session.store, settings_of(family, timing))
    bench = Bench(family, skeletons, kept, session.store.root / "work" / kept.key)

    # Shapes to fit, and others to say how far off that is.
    fit, checks = design(family.levels, CHECKS)
    times = bench.times([*fit, *checks], timing, ROUNDS, log)
    model = fitted({s: times[s] for s in fit}, {s: times[s] for s in checks})
    log(f"times of unfitted shapes are predicted to {100 * model.error_p95():.1f}% (p95)")
    return model


def _tried(
    workshop: Workshop,
    family: Family,
    shapes: set[Shape],
    starts: list[Shape],
    effort: Effort,
    clock: Clock,
    log: Callable[[str], None],
) -> tuple[Damages, Nats, list[tuple[int, Nats]]]:
    """Single damages, losses of whole shapes after the cut, and after healing by rung."""
    levels = family.levels
    if family.full in shapes:
        return Damages(family.full, {}), {family.full: 0.0}, []
    damages = Damages(family.full, _alone(workshop, singles(levels, starts, LEVELS_ALONE), clock))

    # The best of them stay on disk until they are healed.
    survivors = max((count for _, count in effort.rungs), default=1)
    cut: Nats = {}

    def measure(waiting: list[Shape]) -> Nats:
        # One shape alone leaves nothing to be healed and decided.
        nats = workshop.losses(
            waiting, clock, CUTTING_SHARE, "shape", keep_cuts=True, at_least=2 if not cut else 1
        )
        cut.update(nats)
        workshop.keep_best(sorted(cut, key=cut.__getitem__)[:survivors])
        return nats

    neighbours = partial(mutations, levels=levels, allowed=shapes)
    cut = explore(starts, neighbours, damages, measure, effort, log)

    # The best of them, a little healed.
    order = sorted(cut, key=cut.__getitem__)
    heal = partial(workshop.healed, clock=clock)
    return damages, cut, halve(order, heal, effort.rungs)


def _alone(workshop: Workshop, shapes: list[Shape], clock: Clock) -> Nats:
    """What single levels lose: the lowest of each structure in any case, others as time allows."""
    lowest = len({tuple(a != b for a, b in zip(s, workshop.full, strict=True)) for s in shapes})
    first, others = shapes[:lowest], shapes[lowest:]
    nats = workshop.losses(first, clock, ALONE_SHARE, "lowest level alone", at_least=lowest)
    return nats | workshop.losses(others, clock, ALONE_SHARE, "level alone", at_least=0)


def _choice(cut: Nats, healed: list[tuple[int, Nats]]) -> tuple[Shape, str]:
    """The shape, and why it and no other."""
    order = sorted(cut, key=cut.__getitem__)
    when = "right after the cut"
    nats = cut

    # The longest healing decides, where there was one.
    if healed:
        tokens, nats = healed[-1]
        order = sorted(nats, key=nats.__getitem__)
        when = f"after {tokens:,} tokens of healing"
    reason = f"it loses {nats[order[0]]:.4f} nats a token {when}"
    if len(order) > 1:
        reason += f", the next of {len(cut)} measured shapes {nats[order[1]]:.4f} ({order[1]})"
    return order[0], reason


def _price(
    bound: Bound,
    bounds: list[Bound],
    figures: Mapping[Shape, Mapping[str, float]],
    estimate: Callable[[Shape], float],
) -> float:
    """Nats, by the corrected sum, that the best shape would lose less with RELAXED more room."""
    now = min(map(estimate, allowed(figures, bounds)))
    others = [other for other in bounds if other is not bound]
    return now - min(map(estimate, allowed(figures, [*others, bound.relaxed(RELAXED)])))


def frontier(solution: Solution) -> list[Shape]:
    """Measured shapes that no other one beats in bytes, milliseconds and loss at once, by bytes."""
    names = ["size_bytes"] + (["latency_ms_p50"] if solution.speed else [])

    def point(shape: Shape) -> list[float]:
        return [*(solution.figures[shape][name] for name in names), solution.cut[shape]]

    points = {shape: point(shape) for shape in solution.cut}
    return sorted(
        (
            shape
            for shape, values in points.items()
            if not any(
                other != values and all(o <= v for o, v in zip(other, values, strict=True))
                for other in points.values()
            )
        ),
        key=lambda shape: points[shape],
    )


def losses_alone(solution: Solution) -> dict[str, float]:
    """Slot of the recipe -> what its level loses alone."""
    slots = {"depth": "blocks", "vocab": "ids", "heads": "kv_heads", "narrow": "ffn"}
    parts = dict(zip(Shape._fields, solution.damages.parts(solution.shape), strict=True))
    return {slot: float(parts[slots[slot]]) for slot in steps_of(solution.shape, solution.full)}


def rate_of_healing(solution: Solution) -> float:
    """The learning rate of healing the choice at length; 0 where the search saw so many tokens of
    it do no good as tell, or nothing was cut that it could bring back.
    """
    nats = solution.cut[solution.shape]
    telling = [rung for tokens, rung in solution.healed if tokens >= TELLING_TOKENS]
    healed = [rung[solution.shape] for rung in telling if solution.shape in rung]
    helps = min(healed) < nats if healed else not _cuts_ids_alone(solution)
    return float(f"{healing_rate(nats):.2g}") if helps else 0.0


def _cuts_ids_alone(solution: Solution) -> bool:
    return solution.shape._replace(ids=solution.full.ids) == solution.full


def keeps_blocks(solution: Solution) -> bool:
    """Whether the blocks of the choice, before its grid, are the teacher's to the last bit."""
    return _cuts_ids_alone(solution) and not rate_of_healing(solution)


def may_mix(solution: Solution) -> bool:
    """Whether matrices may lie on grids of their own: times and memory are predicted for one."""
    return not {bound.name for bound in solution.bounds} & set(TIMED)


def mixture_bytes(solution: Solution) -> int:
    """What a file with a grid for every matrix may take, where the choice on one grid leaves room
    within a limit on bytes; 0 where it leaves none, or none is limited.
    """
    size = next((bound for bound in solution.bounds if bound.name == "size_bytes"), None)
    if size is None:
        return 0
    room = size.value - solution.figures[solution.shape]["size_bytes"]
    return int(size.value) if room >= max(ROOM * size.value, ROOM_BYTES) else 0


def sentences(solution: Solution) -> list[str]:
    """The choice, its reason and the price of each limit, a line each."""
    values = solution.figures[solution.shape]
    shown = [name for name in ("size_bytes", "params", *TIMED) if name in values]
    figures = ", ".join(f"{name} {human(name, values[name])}" for name in shown)
    lines = [f"choice: {solution.shape}", f"figures: {figures}", f"reason: {solution.reason}"]
    for bound in solution.bounds:
        lines.append(
            f"limit: {bound}; {100 * RELAXED:.0f}% more room would give back about"
            f" {solution.prices[bound.name]:.4f} nats"
        )
    return lines
