"""What the batches of a run say of the framework and the engine: identities between what was stored and what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from keel.diagnostics.health import Row
from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.record import Record, Rollout

ROUNDING = 1e-5  # of a mean of 32-bit numbers, relative; and of one log-probability, in nats
ON_POLICY = 1e-6  # nats: what `policy/off_policy_frac` counts from
GROWN = 100.0  # times the first batch's mean square gap: ten times as far, as `probes.gap.SLACK` has it
MOVES = 1e-7  # learning rate from which a step moves 32-bit weights of ordinary size


def whole(record: Record) -> Check:
    """What was measured of each batch, against the same numbers taken from its stored completions."""
    if not record.batches or not record.trained:
        return Check("batches", "", skipped="there are no stored completions with metrics beside them")
    wrong: dict[str, list[tuple[int, float, float]]] = {}
    for step, rows in _updates(record):
        for name, (told, stored) in _both(rows, record.groups[step]).items():
            if not math.isclose(told, stored, rel_tol=ROUNDING, abs_tol=ROUNDING):
                wrong.setdefault(name, []).append((step, told, stored))
    findings = tuple(_mismatch(name, found, len(record.batches)) for name, found in wrong.items() if name == _first(wrong))
    says = f"{len(record.batches)} batches: groups, rewards and lengths that were measured are those of the stored completions"
    return Check("batches", findings[0].says if findings else says, findings)


def _updates(record: Record) -> Iterator[tuple[int, list[Row]]]:
    """Each batch's first step with the rows of its updates; the last batch only where all of them are there."""
    begins = list(record.batches)
    for step, following in pairwise([*begins, math.inf]):
        rows = [row for row in record.trained if step <= row["step"] < following]
        if rows and len(rows) == (record.asked.updates_per_batch or len(rows)):
            yield step, rows


def _both(rows: Sequence[Row], groups: Sequence[Sequence[Rollout]]) -> dict[str, tuple[float, float]]:
    """Name → (as measured, as stored). Means are compared where one update takes the whole batch."""
    scored = [[r for r in group if r.reward is not None and r.finish != "error"] for group in groups]
    seen = [group for group in scored if group]
    told = {}
    if all("group/count" in row for row in rows):
        told["group/count"] = sum(row["group/count"] for row in rows), float(len(seen))
    every = [r for group in groups for r in group if r.finish != "error"]
    if len(rows) > 1 or not seen:
        return told
    stored = {
        "group/live_frac": sum(0 < sum(r.correct for r in g) < len(g) for g in seen) / len(seen),
        "reward/mean": sum(r.reward for g in seen for r in g) / sum(map(len, seen)),
        "length/truncated_frac": sum(r.cut for r in every) / len(every),
    }
    return told | {name: (rows[0][name], value) for name, value in stored.items() if name in rows[0]}


BY_METRIC = {"group/count": "K106", "group/live_frac": "K108", "reward/mean": "K151", "length/truncated_frac": "K174"}


def _first(wrong: Mapping[str, object]) -> str:
    """The mismatch from which the others may follow."""
    return next((name for name in BY_METRIC if name in wrong), "")


def _mismatch(name: str, found: Sequence[tuple[int, float, float]], batches: int) -> Finding:
    step, told, stored = found[0]
    code = "K107" if name == "group/count" and told < stored else BY_METRIC[name]
    says = f"{name} of the batch at step {step} is {told:.6g}, and its stored completions make {stored:.6g}"
    return Finding(fault(code), f"{says}; so in {len(found)} of {batches} batches", told, stored)


def ratio(record: Record) -> Check:
    """On fresh weights the ratio is 1; once weights have moved it is not."""
    if not record.trained or record.asked.updates_per_batch is None or record.asked.staleness != 0 or not record.asked.own_sampler:
        return Check("ratio", "", skipped="the recipe has no ratio that must be 1, or its settings are not known")
    first, later = [], []
    for _, rows in _updates(record):
        first += rows[:1]
        later += [now for before, now in pairwise(rows) if _moved(before)]
    findings = []
    off = [row for row in first if row.get("policy/log_ratio_max_abs", 0.0) > ON_POLICY]
    if off:
        largest = off[0]["policy/log_ratio_max_abs"]
        says = f"on fresh data, before any update, |logp − logp_old| is up to {largest:.2g} nats at step {off[0]['step']:.0f}"
        findings.append(Finding(fault("K145"), f"{says}; so in {len(off)} batches", largest, ON_POLICY))
    still = [row for row in later if row.get("policy/log_ratio_max_abs", 0.0) == 0.0]
    if later and len(still) == len(later):
        says = f"in {len(later)} updates on data that an update had been made on, the ratio is exactly 1"
        findings.append(Finding(fault("K122"), says, 0.0, 0.0))
    measured = sum("policy/log_ratio_max_abs" in row for row in first)
    says = f"the ratio is 1 on fresh data ({measured} batches measured)" + (f", and moves in {len(later)} updates" if later else "")
    return Check("ratio", findings[0].says if findings else says, tuple(findings))


def _moved(row: Row) -> bool:
    return row.get("train/grad_norm", 0.0) > 0 and row.get("train/lr", 0.0) >= MOVES


def gap(record: Record) -> Check:
    """exp(gap) has mean 1 over the engine's own tokens, whatever the two policies are; and without stale weights the gap stays
    what it was in the first batch, when both held the weights that they were loaded with.
    """
    rows = [row for row in record.trained if {"gap/weight_mean", "gap/chi2", "gap/k3_nats", "tokens/step"} <= row.keys()]
    rows = [row for row in rows if all(math.isfinite(row[name]) for name in ("gap/weight_mean", "gap/chi2", "gap/k3_nats"))]
    if not rows or not record.asked.own_sampler:
        return Check("gap in the run", "", skipped="no engine gap was measured")
    tokens = sum(row["tokens/step"] for row in rows)
    off = sum(row["tokens/step"] * (row["gap/weight_mean"] - 1.0) for row in rows)
    spread = math.sqrt(sum(row["tokens/step"] * row["gap/chi2"] for row in rows))
    excess = max(0.0, abs(off) - ROUNDING * tokens)
    p = chance.normal_tail(excess / spread) if spread > 0 else 1.0
    largest = max(row.get("gap/max_abs_nats", 0.0) for row in rows)
    says = f"over {tokens:.0f} tokens the mean of exp(gap) is {1 + off / tokens:.6f}; the largest gap is {largest:.1e} nats"
    if p < chance.ALPHA:
        mean = f"{says}: it must be 1, and chance does not explain it (p {p:.1g})"
        return Check("gap in the run", mean, (Finding(fault("K216"), mean, 1 + off / tokens, 1.0, p),))
    begun, squares = rows[0]["gap/k3_nats"], [row["gap/k3_nats"] for row in rows]
    floor = max(begun, ROUNDING**2)
    if record.asked.staleness == 0 and max(squares) > GROWN * floor:
        when = next(row["step"] for row in rows if row["gap/k3_nats"] > GROWN * floor)
        grew = (
            f"KL(engine‖trainer) was {begun:.1e} nats a token in the first batch, and up to {max(squares):.1e} from step {when:.0f}"
        )
        return Check("gap in the run", grew, (Finding(fault("K217"), grew, max(squares), GROWN * floor),))
    return Check("gap in the run", says)


def advantages(record: Record) -> Check:
    """Advantages of single stored completions: right above wrong within each group, adding up to 0, 0 where rewards are equal."""
    if not record.asked.centred or not record.traces:
        return Check("stored advantages", "", skipped="the recipe has no advantages that follow from a group's rewards alone")
    by_name = {(r.step, r.prompt_id, r.sample): r for r in record.rollouts}
    begins, groups = list(record.batches), {}
    for trace in record.traces:
        batch = max((step for step in begins if step <= trace.get("step", -1)), default=None)
        stored = by_name.get((batch, trace.get("prompt_id"), trace.get("sample")))
        value = _value(trace.get("advantage"))
        if stored is not None and stored.reward is not None and value is not None:
            groups.setdefault((batch, stored.prompt_id), []).append((stored.reward, value, batch))
    wrong: Counter[str] = Counter()
    for (batch, prompt), rows in groups.items():
        size = sum(r.prompt_id == prompt and r.reward is not None for r in record.batches[batch])
        wrong[_fault_of(rows, size)] += 1
    bad = {code: count for code, count in wrong.items() if code}
    if not bad:
        return Check("stored advantages", f"in {len(groups)} stored groups advantages follow the rewards, and add up to 0")
    code, count = max(bad.items(), key=lambda each: each[1])
    what = {"K125": "do not follow their rewards, or do not add up to 0", "K128": "differ from 0 although all rewards are equal"}
    says = f"in {count} of {len(groups)} stored groups advantages {what[code]}"
    return Check("stored advantages", says, (Finding(fault(code), says, float(count), 0.0),))


def _fault_of(rows: Sequence[tuple[float, float, Any]], size: int) -> str:
    """The code of what is wrong with (reward, advantage) of one group; "" for nothing. Values are stored with four digits."""
    rewards, values = [row[0] for row in rows], [row[1] for row in rows]
    room = 1e-3 * max(1e-3, *map(abs, values))
    if len(set(rewards)) == 1:
        return "K128" if len(rows) == size and max(map(abs, values)) > ROUNDING else ""
    upside = any(a > b and x <= y for a, x in zip(rewards, values, strict=True) for b, y in zip(rewards, values, strict=True))
    uneven = len(rows) == size and abs(sum(values)) > room * len(rows)
    return "K125" if upside or uneven else ""


def _value(told: Any) -> float | None:
    """A completion's advantage: its tokens share one, and a token that is not trained has 0."""
    numbers = told if isinstance(told, list) else [told]
    known = bool(numbers) and all(isinstance(n, int | float) for n in numbers)
    return max(numbers, key=abs) if known else None


def repeats(record: Record) -> Check:
    """Equal completions of one prompt, against how often they must be equal: in the groups whose log-probabilities were kept."""
    again, expected, asked = 0, 0.0, 0
    for group in _traced(record).values():
        seen: dict[tuple[str, ...], float] = {}
        for tokens, chance_of in group:
            again += tokens in seen
            expected += min(1.0, sum(seen.values()))
            seen[tokens] = chance_of
            asked += 1
    if not asked:
        return Check("repeats in the run", "", skipped="no completion's log-probabilities were kept")
    p = chance.more_than_expected(again, expected)
    says = f"of {asked} completions whose tokens were kept, {again} repeat another of their prompt, and {expected:.1f} were due"
    return Check("repeats in the run", says, (Finding(fault("K215"), says, float(again), expected, p),) if p < chance.ALPHA else ())


def _traced(record: Record) -> dict[tuple[int, str], list[tuple[tuple[str, ...], float]]]:
    """(step, prompt) → (tokens, their probability) of each completion."""
    found: dict[tuple[int, str], list[tuple[tuple[str, ...], float]]] = {}
    for trace in record.traces:
        tokens, logp = trace.get("tokens"), trace.get("logp_rollout")
        if isinstance(tokens, list) and (isinstance(logp, list) or len(tokens) == 1):
            total = sum(logp) if isinstance(logp, list) else logp
            entry = (tuple(map(str, tokens)), math.exp(min(0.0, total)))
            found.setdefault((trace.get("step", 0), str(trace.get("prompt_id"))), []).append(entry)
    return found


def weights(record: Record) -> Check:
    """The newest checkpoint: finite, and every tensor reached by a gradient."""
    findings, model, held = [], record.manifest.get("model", {}), record.weights
    every, trained = model.get("parameters"), model.get("trained_parameters")
    if record.asked.all_tensors and every and trained and trained < every:
        says = f"{every - trained:,} of {every:,} parameters are not trained, and no adapters are asked for"
        findings.append(Finding(fault("K153"), says, float(every - trained), 0.0))
    if held is not None and held.not_finite:
        says = (
            f"{len(held.not_finite)} tensors of the checkpoint of step {held.step} are not finite, {held.not_finite[0]} among them"
        )
        findings.append(Finding(fault("K131"), says, float(len(held.not_finite)), 0.0))
    pulled = any(row.get("train/grad_norm", 0.0) > 0 for row in record.trained)
    if held is not None and pulled and held.untouched and len(held.untouched) < len(held.names):
        says = f"no gradient ever reached {len(held.untouched)} of {len(held.names)} tensors, {held.untouched[0]} among them"
        findings.append(Finding(fault("K153"), says, float(len(held.untouched)), 0.0, evidence={"tensors": held.untouched[:20]}))
    if held is None and not findings:
        return Check("stored weights", "", skipped="there is no checkpoint to look at")
    says = f"the {len(held.names) if held else 0} tensors of the newest checkpoint are finite, and a gradient reached each"
    return Check("stored weights", findings[0].says if findings else says, tuple(findings))
