"""Tasks of keel and tasksets of verifiers as each other: the same prompts, the same verdicts, and errors that stay errors."""

from __future__ import annotations

import asyncio
import sys

import pytest

from keel.audit.peers import installed
from keel.errors import KeelError
from keel.tasks.task import get_task, known_tasks

pytestmark = [
    pytest.mark.skipif(not installed("verifiers"), reason="verifiers is not installed: pip install 'keel-rl[verifiers]'"),
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it imports
]

MODULE = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class Sum(vf.Task[Data]):
    @vf.reward
    async def right(self, trace) -> float:
        if trace.last_reply == "fail":
            raise RuntimeError("out of order")
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return -float(len(trace.last_reply) > 8)

    @vf.reward(weight=0.0)
    async def {extra}(self, trace{runtime}) -> float:
        return 1.0

class Sums(vf.Taskset[Sum]):
    def load(self):
        for a in range(8):
            for b in range(8):
                yield Sum(Data(prompt=f"{{a}} + {{b}} =", answer=str(a + b), system_prompt="Add."), self.config.task)

__all__ = ["Sums"]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, runtime="") writes a taskset package of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, runtime=""):
        (tmp_path / f"{name}.py").write_text(MODULE.format(extra="extra", runtime=runtime))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


def test_a_taskset_is_a_task_with_its_own_rewards(module):
    task = get_task(f"verifiers:{module('vf_sums')}?gold=answer")
    prompt = next(p for p in task.train if p.answer == "9")
    assert prompt.text.startswith("Add.\n\n") and len(task.train) + len(task.test) == 64 and len(task.test) > 2
    right, wrong, long = (task.reward(prompt, text) for text in ("9", "8", "99999999999"))
    assert (right.value, right.correct, right.parts) == (1.0, True, {"right": 1.0, "short": 0.0, "extra": 0.0})
    assert (wrong.value, long.value, long.correct) == (0.0, -0.5, False)
    assert task.reward(prompt, "9", "length").value == 0.0


def test_a_reward_that_fails_makes_unscorable_never_wrong(module):
    task = get_task(f"verifiers:{module('vf_sums_failing')}")
    failed = task.reward(task.train[0], "fail")
    assert failed.value is None and "out of order" in failed.reason


def test_what_needs_more_than_a_completion_is_refused(module):
    with pytest.raises(KeelError, match=r"a running box to grade in \(extra\)"):
        get_task(f"verifiers:{module('vf_sums_boxed', ', runtime')}")
    with pytest.raises(KeelError, match="Expected an installed one"):
        get_task("verifiers:no_such_taskset")
    with pytest.raises(KeelError, match="has no field 'gold'"):
        get_task(f"verifiers:{module('vf_sums_plain')}?gold=gold")


def scored(task, text, stop=None):
    from keel.integrations.verifiers import _trace

    trace = _trace(task, text)
    trace.stop_condition = stop
    asyncio.run(task.score(trace))
    return trace


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_is_a_taskset_that_verifiers_loads(split, tmp_path, monkeypatch):
    import verifiers.v1 as vf
    from verifiers.v1.utils.loaders import load_taskset

    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"my_sums_{split}"
    code = "from keel.integrations.verifiers import taskset\nMine = taskset('arithmetic:easy', {!r})\n__all__ = ['Mine']\n"
    (tmp_path / f"{name}.py").write_text(code.format(split))
    rows = list(load_taskset(vf.TasksetConfig(id=name)).take(5))
    own = getattr(get_task("arithmetic:easy"), split)[:5]
    assert [(row.data.prompt, row.data.answer, row.data.id) for row in rows] == [(p.text, p.answer, p.id) for p in own]
    gold = get_task("arithmetic:easy").gold(own[3])
    right, wrong, cut = scored(rows[3], gold), scored(rows[3], "A:0"), scored(rows[3], gold, "max_output_tokens")
    assert (right.reward, right.metrics) == (1.0, {"correct": 1.0})
    assert (wrong.reward, cut.reward) == (0.0, 0.0)


def test_what_keel_cannot_score_is_an_error_there():
    import verifiers.v1 as vf

    from keel.integrations.verifiers import Graded, Row
    from keel.tasks.task import PromptTask
    from keel.types import Prompt, Score

    broken = PromptTask("broken", [Prompt("p", "?", "1")], [], lambda prompt, text: Score(None, reason="the judge is away"))
    row = type("Broken", (Graded,), {"of": broken})(Row(prompt="?"))
    with pytest.raises(vf.TaskError, match="the judge is away"):
        scored(row, "1")


def test_both_ways_round_nothing_is_lost():
    import verifiers.v1 as vf

    from keel.integrations.verifiers import as_task, taskset

    own = get_task("arithmetic:easy")
    back = as_task(taskset("arithmetic:easy")(vf.TasksetConfig()), "back", limit=40)
    for prompt in [*back.train, *back.test]:
        same = own.train[int(prompt.id.partition("/")[2])]
        for text in (own.gold(same), "A:1", "nonsense"):
            assert back.reward(prompt, text).value == own.reward(same, text, "stop").value
            assert back.reward(prompt, text).correct == own.reward(same, text, "stop").correct


def test_it_is_a_known_task():
    assert "verifiers" in known_tasks()
