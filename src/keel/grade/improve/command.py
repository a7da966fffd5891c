"""`keel grade improve`: the loop on a tiny judge, told as it goes, with its worth to a policy at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from keel.errors import KeelError
from keel.evaluate.estimates import Interval, mean_interval
from keel.files import json_of, write_atomically
from keel.grade.improve.loop import Improved, Sizes, improve


def run(*, seeds: int = 5, seed: int = 0, out: str = "", as_json: bool = False) -> int:
    """The command.

    Args:
        seeds: policies that are trained against each judge.
        seed: of the judges.
        out: file for the numbers; "" writes none.
    """
    if seeds < 1:
        raise KeelError(f"keel grade improve was asked for {seeds} seeds. Expected at least one policy for each judge.")
    begin = time.perf_counter()
    found = improve(
        seeds, seed, Sizes(), lambda text: print(f"{time.perf_counter() - begin:5.0f} s  {text}", file=sys.stderr, flush=True)
    )
    numbers = json_of(asdict(found))
    if out:
        write_atomically(Path(out), numbers)
    print(numbers if as_json else told(found))
    return 0


def gain(found: Improved) -> Interval:
    """True pass@1 against the last judge minus that against the first, paired by seed, with a 95 % t interval."""
    return mean_interval([after - before for before, after in zip(found.before, found.after, strict=True)])


def told(found: Improved) -> str:
    """The table and two sentences."""
    first, last, difference = found.stages[0], found.stages[-1], gain(found)
    lines = [f"{'judge':<12}  J                        TPR    FPR    levels  reasons  mined"]
    lines += [
        f"{m.after:<12}  {m.j.mean:.3f} ({m.j.low:.3f} to {m.j.high:.3f})  {m.tpr.mean:.3f}  {m.fpr.mean:.3f}  {m.level:.3f}   "
        f"{m.reason:.3f}  {m.mined:>6}"
        for m in found.stages
    ]
    seeds = "  ".join(f"{before:.3f} → {after:.3f}" for before, after in zip(found.before, found.after, strict=True))
    verdict = "higher" if difference.low > 0 else "lower" if difference.high < 0 else "not told apart"
    lines += [
        "",
        f"The judge's J rose by {last.j.mean - first.j.mean:+.3f} on solutions that no step of the loop saw.",
        f"True pass@1 of policies trained against the first and the last judge ({found.untrained:.3f} untrained): {seeds}.",
        f"With the better judge it is {verdict}: {difference.mean:+.3f} (95 % {difference.low:+.3f} to {difference.high:+.3f}).",
    ]
    return "\n".join(lines)
