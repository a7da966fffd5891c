"""How often the doctor is right about a run: every fault of the table, pairs of them, and healthy runs.

    python benchmarks/doctor.py [--folder-only] [--only faults|pairs|healthy] [--part 1/3] [--json FILE]

Each run is a few steps of a bundled model with the fault in the living system. A verdict is right where the parts that it names are
those of the faults, no more and no fewer; a component is named where a finding has it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "faults"))

from broken_runs import HEALTHY, PAIRS, broken, healthy, named, part_is_right  # noqa: E402
from seeded import SEEDED  # noqa: E402

from keel.doctor.triage import Triage  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder-only", action="store_true", help="read the folder, ask the living system nothing")
    parser.add_argument("--only", choices=("faults", "pairs", "healthy"))
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th run from the I-th on, for several processes")
    parser.add_argument("--json", default="", metavar="FILE", help="write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    part, parts = map(int, options.part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, names, make) in enumerate(_cases(options.folder_only)):
            if options.only in (None, kind) and number % parts == part - 1:
                rows.append(_row(kind, names, make(Path(folder) / str(number))))
                print(_line(rows[-1]), flush=True)
    print(*_rates(rows), sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _cases(folder_only: bool):
    """(kind, names, function from a folder to the triage) of every run."""
    for name in SEEDED:
        yield "faults", (name,), lambda out, name=name: broken((name,), out, folder_only=folder_only)
    for pair in PAIRS:
        yield "pairs", pair, lambda out, pair=pair: broken(pair, out, folder_only=folder_only)
    for recipe, settings in HEALTHY:
        yield "healthy", (recipe, str(settings)), lambda out, r=recipe, s=settings: healthy(r, s, out, folder_only=folder_only)


def _row(kind: str, names: tuple[str, ...], told: Triage) -> dict:
    verdict = told.diagnosis.healthy if kind == "healthy" else part_is_right(told, names)
    component = [told.diagnosis.healthy] if kind == "healthy" else named(told, names)
    found = [(f.fault.code, f.says) for f in told.diagnosis.findings]
    return {"kind": kind, "names": names, "verdict": verdict, "named": component, "found": found, "seconds": round(told.seconds, 1)}


def _line(row: dict) -> str:
    right = row["verdict"] and all(row["named"])
    mark = "✓" if right else "✗"
    said = "" if right else " · " + "; ".join(f"{code} {says[:110]}" for code, says in row["found"])
    return f"{mark} {row['kind']:<8} {' + '.join(row['names'])}: {', '.join(code for code, _ in row['found']) or 'healthy'}{said}"


def _rates(rows: list[dict]):
    for kind in ("faults", "pairs"):
        some = [row for row in rows if row["kind"] == kind]
        if some:
            total, verdict = len(some), sum(row["verdict"] for row in some)
            every = sum(all(row["named"]) for row in some)
            yield f"{kind}: verdict right {verdict} of {total} ({verdict / total:.0%})"
            yield f"{kind}: every component named {every} of {total} ({every / total:.0%})"
    some = [row for row in rows if row["kind"] == "healthy"]
    if some:
        yield f"healthy: {sum(not row['verdict'] for row in some)} false alarms in {len(some)} runs"


if __name__ == "__main__":
    main()
