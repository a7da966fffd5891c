"""The reward: extract the answer, compare it with gold; and the hash that says which decisions a run was graded by."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from keel.errors import KeelError
from keel.rewards.answer.equal import Verdict, equal, gold_problem
from keel.rewards.answer.extract import find
from keel.rewards.answer.workers import Workers
from keel.types import Prompt, Score

GOLDEN = Path(__file__).with_name("golden.jsonl")
PAIRS = Path(__file__).with_name("pairs.jsonl")
CACHE = 100_000  # (answer, gold) pairs whose verdict is kept


class AnswerGrader:
    """A grader for `PromptTask.grade`: 1 where the completion's answer says the same as the gold answer, else 0.

    What could not be told (too slow, an unreadable gold answer) is unscorable, with the reason. Safe to call from any thread.

    Args:
        workers: the pool for what needs math-verify; the shared one unless given.
        cache: how many verdicts are kept; 0 keeps none.
    """

    def __init__(self, workers: Workers | None = None, cache: int = CACHE):
        self.workers, self.size = workers, cache
        self._kept: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self.grade(text, prompt.answer).score

    @property
    def version(self) -> str:
        """For the manifest."""
        return answer_grader_version()

    def grade(self, text: object, gold: str, truncated: bool = False) -> Verdict:
        """The verdict on one completion; a truncated one is wrong, whatever stands in it."""
        found = find(text, truncated=truncated) if isinstance(text, str) else None
        if found is None or found.answer is None:
            return Verdict("wrong", f"no answer found: {found.note if found else 'no text'}", "extract")
        return replace(self.compare(found.answer, gold), said=found.answer)

    def compare(self, answer: str, gold: str) -> Verdict:
        """`equal` with the cache. An unscorable verdict is not kept: another try may succeed."""
        key = (answer, gold)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        verdict = equal(answer, gold, self.workers)
        if self.size and verdict.kind != "unscorable":
            with self._lock:
                self._kept[key] = verdict
                while len(self._kept) > self.size:
                    self._kept.popitem(last=False)
        return verdict


def check_golds(golds: Iterable[tuple[str, str]], where: str) -> None:
    """Look at every gold answer of a data set once.

    Args:
        golds: (row, gold answer).
        where: what to call the data.

    Raises:
        KeelError: some cannot be read, so that no answer could be compared with them; says which and why.
    """
    bad = [(row, gold, problem) for row, gold in golds if (problem := gold_problem(gold))]
    if bad:
        shown = "; ".join(f"row {row} ({gold[:60]!r}): {problem}" for row, gold, problem in bad[:5])
        raise KeelError(
            f"{where} has {len(bad)} gold answers that nothing can be compared with: {shown}{' …' if len(bad) > 5 else ''}. "
            f"Expected a number, a formula, a set, a choice or words in each. Mend these rows, or drop them."
        )


def answer_grader_version() -> str:
    """Names the decisions: a hash of the golden table (which a test holds the code to), and math-verify's version."""
    try:
        library = version("math-verify")
    except PackageNotFoundError:
        library = "absent"
    return f"{hashlib.blake2b(GOLDEN.read_bytes(), digest_size=6).hexdigest()}+math-verify-{library}"
