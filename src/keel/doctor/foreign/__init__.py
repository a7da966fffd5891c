"""Logs of other frameworks, under keel's names, and what can be checked from metrics alone. Pure but for reading the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from keel.diagnostics.health import impossible
from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.foreign.files import names_in, read_rows
from keel.doctor.foreign.names import FRAMEWORKS, NEVER_IN_A_LOG, WITHOUT_LOG, Framework, in_our_names, recognised
from keel.errors import KeelError

__all__ = ["Log", "checks", "read"]


@dataclass(frozen=True)
class Log:
    """A metric log of another framework.

    Args:
        rows: keel's names → numbers, with "step", in its order.
        unmapped: names in it that mean nothing here.
        missing: what it does not say, in sentences.
    """

    source: str
    framework: Framework
    rows: tuple[Mapping[str, float], ...]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]

    def column(self, name: str) -> list[float]:
        """The numbers under a name, of the rows that have it."""
        return [row[name] for row in self.rows if name in row]


def read(path: str | Path, framework: str = "") -> Log:
    """A file or folder of another framework's metrics.

    Args:
        framework: trl or verl; found by the names in it unless given.

    Raises:
        KeelError: the log cannot be read, or its names are nobody's.
    """
    found = read_rows(Path(path))
    names = names_in(found.values())
    whose = framework or recognised(names)
    if whose not in FRAMEWORKS:
        shown = ", ".join(sorted(names)[:6])
        raise KeelError(
            f"The metrics in {str(path)!r} ({shown} …) are not known as those of {' or '.join(FRAMEWORKS)}"
            f"{f', and --from says {framework!r}' if framework else ''}. Expected a log of one of them."
        )
    rows = tuple({"step": float(step), **told} for step, numbers in found.items() if (told := in_our_names(whose, numbers)))
    ours = names_in(rows)
    known = {meaning.theirs for meaning in FRAMEWORKS[whose]}
    missing = [f"{name} is not in it: {what}" for name, what in WITHOUT_LOG.items() if name not in ours]
    return Log(str(path), whose, rows, tuple(sorted(names - known)), (*missing, NEVER_IN_A_LOG))


def checks(log: Log, updates_per_batch: int | None = None) -> list[Check]:
    """Everything that can be looked at in metrics alone.

    Args:
        updates_per_batch: optimizer steps on one batch, where it is known.
    """
    return [_possible(log), _ratio(log, updates_per_batch), _cut(log), _dead(log), _support(log)]


def _possible(log: Log) -> Check:
    """Numbers that cannot be, by the identities of keel's own metrics."""
    found = [(row["step"], wrong) for row in log.rows for wrong in impossible(row)]
    says = f"{sum(map(len, log.rows)) - len(log.rows)} numbers of {len(log.rows)} rows are possible"
    if not found:
        return Check("possible numbers", says)
    step, wrong = found[0]
    says = f"{len(found)} numbers cannot be; {wrong.metric} is {wrong.value:g} at step {step:g}: {wrong.why}"
    return Check("possible numbers", says, (Finding(fault("K174"), says, wrong.value),))


def _ratio(log: Log, updates: int | None) -> Check:
    """With several updates a batch, weights move between them, and so does the mean log-ratio."""
    moved, norms = log.column("policy/log_ratio_mean_nats"), log.column("train/grad_norm")
    if updates is None or updates < 2:
        why = "how many updates a batch has is not known (--train.updates_per_batch)" if updates is None else "one update a batch"
        return Check("ratio in the log", "", skipped=why)
    if not moved or not any(norms):
        return Check("ratio in the log", "", skipped="the log has no mean log-ratio, or no gradient")
    says = f"with {updates} updates a batch the mean log-ratio is up to {max(map(abs, moved)):.2g} nats from 0"
    found = () if any(moved) else (Finding(fault("K122"), says, 0.0),)
    return Check("ratio in the log", says, found)


def _cut(log: Log) -> Check:
    """Where no completion ever ended, a reward of 0 says nothing of difficulty."""
    rows = [row for row in log.rows if "length/truncated_frac" in row and "reward/mean" in row]
    if not rows:
        return Check("length in the log", "", skipped="the log has not both the share at the cap and the reward")
    cut, reward = fmean(row["length/truncated_frac"] for row in rows), fmean(row["reward/mean"] for row in rows)
    says = f"{cut:.1%} of completions reach the cap, and the mean reward is {reward:.3g}"
    nothing = all(row["reward/mean"] == 0 for row in rows)
    if nothing and all(row["length/truncated_frac"] == 1 for row in rows):
        return Check("length in the log", says, (Finding(fault("K620"), says, cut, 1.0),))
    if nothing:
        says += ": nothing that ended was right, and what was cut off was not judged; read a few completions to tell which it is"
    return Check("length in the log", says)


def _dead(log: Log) -> Check:
    """Groups without signal, of the whole log: none ever had any, so nothing can have been learnt."""
    rows = [row for row in log.rows if "group/zero_advantage_frac" in row and "reward/mean" in row]
    if not rows:
        return Check("groups in the log", "", skipped="the log does not say how many groups have equal rewards")
    dead, reward = fmean(row["group/zero_advantage_frac"] for row in rows), fmean(row["reward/mean"] for row in rows)
    says = f"{dead:.1%} of groups have equal rewards, at a mean reward of {reward:.3g}"
    if dead < 1.0 or _cut(log).findings:
        return Check("groups in the log", says)
    if len({row["reward/mean"] for row in rows}) > 1:
        says += "; the mean moves all the same, so prompts are all-or-nothing, or a prompt's samples repeat each other"
        return Check("groups in the log", says)
    return Check("groups in the log", says, (Finding(fault("K568" if reward <= 0 else "K569"), says, dead),))


def _support(log: Log) -> Check:
    """Mean of exp(gap) = k3 + mean gap + 1, which is 1 where the engine draws from the trainer's whole distribution.

    Rows are batches of their own, so their spread says how near 1 their mean must lie.
    """
    weights = [row["gap/k3_nats"] + row["gap/mean_nats"] + 1 for row in log.rows if {"gap/k3_nats", "gap/mean_nats"} <= row.keys()]
    if len(weights) < 3 or not all(map(math.isfinite, weights)):
        return Check("gap in the log", "", skipped="the log has fewer than 3 rows with the mean gap and its k3")
    mean, error = fmean(weights), stdev(weights) / math.sqrt(len(weights))
    grows = log.column("gap/k3_nats")
    says = f"exp(gap) is {mean:.4f} ± {error:.1g} on average; its k3 goes from {grows[0]:.2g} to {grows[-1]:.2g} nats"
    p = _student_tail((mean - 1) / error, len(weights) - 1) if error > 0 else 1.0
    found = (Finding(fault("K211"), says, mean, 1.0, p),) if mean < 1 and p < chance.ALPHA else ()
    return Check("gap in the log", says, found)


def _student_tail(t: float, freedom: int) -> float:
    from scipy.stats import t as student  # takes its time to import

    return float(2 * student.sf(abs(t), freedom))
