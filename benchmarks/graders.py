"""keel's answer equality against math-verify called one by one, in the same run: `python benchmarks/graders.py`.

Pairs are distinct and so are their gold answers, no verdict is kept, and both graders have read a few pairs of each kind
before. keel is given all pairs of a kind at once and has two worker processes (which only `calculus` needs); math-verify
parses both sides and verifies, in this process, one pair after the other, with its time limits off. Prints a table;
`--json FILE` writes it too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from answer_pairs import FAMILIES

from keel.rewards.answer import answer_grader_version, equal_all
from keel.rewards.answer.equal import shared_workers

Pair = tuple[str, str, bool]
MIX = {"integer": 36, "decimal": 8, "fraction": 16, "percent": 2, "unit": 4, "radical": 8, "constant": 3, "set": 4,
       "tuple": 4, "interval": 4, "inequality": 2, "matrix": 1,
       "equation": 2, "expression": 4, "complex": 1, "calculus": 1}  # fmt: skip
PLAIN = {"integer": 5.0, "decimal": 5.0, "fraction": 5.0}  # times math-verify's speed that are asked for; 1.8 for the rest


def calculus(rng: random.Random) -> Iterator[Pair]:
    """What only math-verify reads."""
    n, k = rng.randint(1, 10**6), rng.randint(2, 9)
    yield f"\\int_0^{{{n}}} 2x \\, dx", str(n * n), True
    yield f"\\sum_{{j=1}}^{{{k}}} {n} j", str(n * k * (k + 1) // 2), True
    yield f"\\int_0^1 {n} x \\, dx", str(n), False


def pairs_of(kind: str, count: int, seed: int) -> list[Pair]:
    """So many pairs of a kind, no answer and no gold answer twice."""
    family = calculus if kind == "calculus" else FAMILIES[kind][0]
    rng, found, seen = random.Random(f"speed {seed} {kind}"), [], set()
    for _ in range(count * 40):
        rows = list(family(rng))
        rng.shuffle(rows)
        for answer, gold, label in rows:
            if len(found) < count and answer not in seen and gold not in seen:
                found.append((answer, gold, label))
                seen |= {answer, gold}
    return found


def by_keel(pairs: list[Pair]) -> tuple[float, list[bool]]:
    begun = time.perf_counter()
    said = equal_all([(answer, gold) for answer, gold, _ in pairs])
    return time.perf_counter() - begun, [verdict.correct for verdict in said]


def by_math_verify(pairs: list[Pair]) -> tuple[float, list[bool]]:
    from math_verify import parse, verify

    dressed = [(_dressed(answer), _dressed(gold)) for answer, gold, _ in pairs]
    begun = time.perf_counter()
    said = [
        verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)
        for answer, gold in dressed
    ]
    return time.perf_counter() - begun, said


def _dressed(text: str) -> str:
    """In dollars where it is a formula, as math-verify wants it."""
    plain = text.startswith(("$", "\\boxed", "\\(")) or not set(text) & set("\\^=<>≤≥[{(xyz")
    return text if plain else f"${text}$"


def row(kind: str, pairs: list[Pair]) -> dict[str, object]:
    """Both graders on the same pairs, in turns: the one that goes first changes from kind to kind."""
    keel_s, keel_said = by_keel(pairs)
    other_s, other_said = by_math_verify(pairs)
    labels = [label for *_, label in pairs]
    return {
        "kind": kind, "pairs": len(pairs), "keel_per_s": len(pairs) / keel_s, "math_verify_per_s": len(pairs) / other_s,
        "times": other_s / keel_s, "asked": PLAIN.get(kind, 1.8),
        "keel_right": sum(map(lambda a, b: a == b, keel_said, labels)) / len(pairs),
        "math_verify_right": sum(map(lambda a, b: a == b, other_said, labels)) / len(pairs),
    }  # fmt: skip


def show(found: dict[str, object]) -> None:
    print("{kind:<11} {pairs:>5} {keel_per_s:>9,.0f} {math_verify_per_s:>12,.0f} {times:>7.1f}x {asked:>5}x {keel_right:>8.1%} "
          "{math_verify_right:>8.1%}".format(**found), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=150, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    shared_workers().warm()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {answer_grader_version()}; Python {sys.version.split()[0]}")
    print("kind        pairs   keel /s  math-verify /s  times  asked   keel right, math-verify right")
    rows = []
    for kind in MIX:
        for grader in (by_keel, by_math_verify):
            grader(pairs_of(kind, 5, asked.seed + 1))
        rows.append(row(kind, pairs_of(kind, asked.pairs, asked.seed)))
        show(rows[-1])
    mixed = [pair for kind in MIX for pair in pairs_of(kind, MIX[kind] * asked.pairs // 100, asked.seed + 2)]
    random.Random(asked.seed).shuffle(mixed)
    rows.append(row("mix", mixed))
    show(rows[-1])
    if asked.json:
        asked.json.write_text(
            json.dumps({"grader": answer_grader_version(), "load": os.getloadavg()[0], "mix": MIX, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
