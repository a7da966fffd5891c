"""Write the golden table of decisions: `python benchmarks/answer_golden.py` → src/keel/rewards/answer/golden.jsonl.

Every seventh pair of the labelled set with the grader's verdict on it. A test holds the code to this table and its hash
names the grader, so a change of verdicts is seen twice. Look at the difference before it is committed.
"""

from __future__ import annotations

import json

from keel.rewards.answer import equal
from keel.rewards.answer.grader import GOLDEN, PAIRS


def main() -> None:
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()][::7]
    lines = []
    for row in rows:
        verdict = equal(row["answer"], row["gold"])
        if verdict.kind != "unscorable" or not verdict.by:  # a verdict that the clock had a part in is none
            lines.append({"answer": row["answer"], "gold": row["gold"], "verdict": verdict.kind, "by": verdict.by})
    GOLDEN.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} decisions in {GOLDEN.name}")


if __name__ == "__main__":
    main()
