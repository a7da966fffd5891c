"""The course of a run: which groups had no signal and why, and whether performance fell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pvariance

from keel.diagnostics.health import Row
from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.data import LIVE
from keel.doctor.record import Record, Rollout

MOVERS = (  # that may move when performance falls, in the order of telling
    "train/staleness_mean",
    "gap/k3_nats",
    "policy/old_kl_nats",
    "kl/ref_k3_nats",
    "policy/entropy_nats",
    "length/mean",
    "length/truncated_frac",
    "train/grad_norm",
)
Groups = Sequence[Sequence[Rollout]]


def length(record: Record) -> Check:
    """Groups all of whose completions were cut off: they have no signal, whatever they would have come to."""
    groups = _every(record)
    if not groups:
        return Check("length in the run", "", skipped="there are no stored completions")
    every = [r for g in groups for r in g]
    cut, ended = [r for r in every if r.cut], [r for r in every if r.finish == "stop"]
    right = f"; of those that end {sum(r.right for r in ended) / len(ended):.1%} are right" if ended else ""
    at = "the cap" if record.asked.cap is None else f"the cap of {record.asked.cap} tokens"
    says = f"{len(cut) / len(every):.1%} of {len(every)} completions reach {at}{right}"
    open_ = sum(any(not r.cut for r in g) for g in groups)
    rewarded = any(r.cut and r.reward for r in every)
    most = chance.at_most_bound(open_, len(groups))
    if rewarded or most >= LIVE:
        return Check("length in the run", says)
    says = f"{says}: in {len(groups) - open_} of {len(groups)} groups all completions are cut off, and none can be rewarded"
    finding = Finding(fault("K620"), says, open_ / len(groups), LIVE, chance.CARD_ALPHA)
    return Check("length in the run", says, (finding,))


def scorable(record: Record) -> Check:
    """Groups that lost their signal because fewer than two of their completions have a verdict."""
    groups = _every(record)
    if not groups:
        return Check("verdicts in the run", "", skipped="there are no stored completions")
    lost = [r for g in groups for r in g if r.reward is None]
    broken = [r for r in lost if "not a finite number" in r.reason]
    if broken:
        says = f"{len(broken)} completions were given a score that is not finite, such as “{broken[0].reason}”"
        return Check("verdicts in the run", says, (Finding(fault("K464"), says, float(len(broken)), 0.0),))
    total = sum(map(len, groups))
    says = f"{len(lost)} of {total} completions have no verdict" + (f", the first: “{lost[0].reason}”" if lost else "")
    able = sum(sum(r.reward is not None for r in g) > 1 for g in groups)
    if not lost or chance.at_most_bound(able, len(groups)) >= LIVE:
        return Check("verdicts in the run", says)
    return Check("verdicts in the run", says, (Finding(fault("K490"), says, len(lost) / total, LIVE, chance.CARD_ALPHA),))


def groups(record: Record) -> Check:
    """Groups of completions that ended and were graded: how many had right and wrong ones, against the binomial.

    Were all prompts alike, 1 − p^G − (1−p)^G of them would; as they differ, fewer do. Where not even the binomial's bound leaves
    one group in ten, the prompts are out of reach, or too easy, for groups of this size.
    """
    size, per_batch = record.asked.group_size, list(record.groups.values())
    if size is None or size < 2 or not per_batch or not record.asked.constant_data:
        return Check("groups in the run", "", skipped="the recipe has no groups that were drawn at random, or none are stored")
    third = max(1, len(per_batch) // 3)
    begun, ended = ([g for batch in part for g in batch] for part in (per_batch[:third], per_batch[-third:]))
    says = f"live groups: {_live(begun):.0%} in the first {third} batches, {_live(ended):.0%} in the last; {_dead(ended)}"
    right, every = _right(begun)
    if right > every / 2 and chance.live_share(chance.at_most_bound(every - right, every), size) < LIVE:
        too = f"{right} of {every} completions are right in the first {third} batches: nothing is left to learn"
        return Check("groups in the run", too, (Finding(fault("K569"), too, _live(begun), LIVE, chance.CARD_ALPHA),))
    right, every = _right([g for batch in per_batch for g in batch])
    late, of_late = _right(ended)
    rates = [chance.at_most_bound(r, n) for r, n in ((right, every), (late, of_late))] if every and of_late else [1.0]
    if max(rates) < 0.5 and max(chance.live_share(rate, size) for rate in rates) < LIVE:
        edge = max(chance.live_share(rate, size) for rate in rates)
        too = f"{right} of {every} completions are right; at the edge of chance {edge:.0%} of groups of {size} can be live"
        return Check("groups in the run", too, (Finding(fault("K568"), too, _live(ended), LIVE, chance.CARD_ALPHA),))
    rare = chance.at_least_bound(min(right, every - right), every) if every else 0.0
    if chance.live_share(rare, size) < LIVE:
        return Check("groups in the run", "", skipped=f"{says}: too few completions to tell whether one group in ten can be live")
    return Check("groups in the run", says)


def _every(record: Record) -> list[list[Rollout]]:
    return [group for groups in record.groups.values() for group in groups]


def _right(groups: Groups) -> tuple[int, int]:
    scored = [r for g in groups for r in g if r.reward is not None]
    return sum(r.correct for r in scored), len(scored)


def _live(groups: Groups) -> float:
    return sum(0 < sum(r.right for r in g) < sum(r.reward is not None for r in g) for g in groups) / max(1, len(groups))


def _dead(groups: Groups) -> str:
    """What the groups without signal are: data, not a fault of the step."""
    scored = [[r for r in g if r.reward is not None] for g in groups]
    scored = [g for g in scored if g]
    cut = sum(all(r.cut for r in g) for g in scored)
    wrong, right = sum(not any(r.correct for r in g) for g in scored) - cut, sum(all(r.correct for r in g) for g in scored)
    return f"without signal there {right} all right, {wrong} all wrong, {cut} all cut off"


def fall(record: Record) -> Check:
    """Held-out pass@1, or else training accuracy, at its best and at the end; and what moved until then.

    The difference is held against its standard error (the evaluation's own interval, or the spread of groups), for as many
    comparisons as there are places where the best may have been. What moved is evidence and no prophecy.
    """
    points = _held_out(record) or _trained_on(record)
    if len(points) < 2:
        return Check("course", "", skipped="performance was not measured twice")
    best = max(points[:-1], key=lambda point: point[1])
    step, end = best[0], points[-1]
    error = math.hypot(best[2], end[2])
    z = (best[1] - end[1]) / error if error > 0 else 0.0
    p = min(1.0, 0.5 * chance.normal_tail(z) * (len(points) - 1)) if z > 0 else 1.0
    says = f"accuracy {points[0][1]:.3f} at first, {best[1]:.3f} at step {step:.0f}, {end[1]:.3f} at step {end[0]:.0f}"
    if p >= chance.ALPHA:
        return Check("course", says)
    moved = movers(record.trained, step, end[0])
    what = "; ".join(moved) or "nothing else that was measured moved"
    finding = Finding(fault("K670"), f"{says}: it fell (p {p:.1g}). With it: {what}", best[1] - end[1], 0.0, p, {"moved": moved})
    return Check("course", finding.says, (finding,))


def _held_out(record: Record) -> list[tuple[float, float, float]]:
    """(step, pass@1, standard error) of every evaluation."""
    found = []
    for row in record.rows:
        value, low, high = (row.get(f"eval/pass@1{end}", math.nan) for end in ("", "_low", "_high"))
        if all(map(math.isfinite, (value, low, high))):
            found.append((row["step"], value, max(high - low, 1e-9) / (2 * 1.96)))
    return found


def _trained_on(record: Record, parts: int = 4) -> list[tuple[float, float, float]]:
    """(last step, mean accuracy of groups, its standard error) of each quarter of the batches."""
    if not record.asked.constant_data or len(record.groups) < 2 * parts:
        return []
    steps, found = list(record.groups), []
    for i in range(parts):
        part = steps[i * len(steps) // parts : (i + 1) * len(steps) // parts]
        counts = [_right([group]) for step in part for group in record.groups[step]]
        means = [right / graded for right, graded in counts if graded]
        if len(means) > 1:
            found.append((float(part[-1]), fmean(means), math.sqrt(max(pvariance(means), 1e-4) / len(means))))
    return found


def movers(rows: Sequence[Row], best: float, end: float) -> list[str]:
    """What left the range that it had up to the best step, by the step at which it did, in words."""
    left = []
    for name in MOVERS:
        before = [row[name] for row in rows if row["step"] <= best and math.isfinite(row.get(name, math.nan))]
        after = [(row["step"], row[name]) for row in rows if best < row["step"] <= end and math.isfinite(row.get(name, math.nan))]
        if len(before) < 3 or not after:
            continue
        low, high = min(before), max(before)
        room = high - low
        first = next(((s, v) for s, v in after if v > high + room or v < low - room), None)
        if first is not None:
            left.append((first[0], f"{name} from {fmean(before):.3g} to {first[1]:.3g} at step {first[0]:.0f}"))
    return [words for _, words in sorted(left)]
