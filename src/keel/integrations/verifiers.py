"""Tasks of keel as tasksets of verifiers, and single-turn tasksets of verifiers as tasks of keel.

A taskset that verifiers, and with it prime-rl, finds by the name of your module:

    # my_sums.py
    from keel.integrations.verifiers import taskset

    MySums = taskset("arithmetic:medium")
    __all__ = ["MySums"]

The other way round, `--task "verifiers:PACKAGE?gold=answer"` trains on an installed taskset. Its rewards are run on a trace that
holds the completion as the only turn, so that tasks with tools, containers or rewards that look into a running one are refused.

Written for verifiers 0.4 (`verifiers.v1`).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

from keel.errors import KeelError
from keel.tasks.task import PromptTask, get_task, held_out
from keel.tasks.task import Task as KeelTask
from keel.types import Prompt, Score, row_of

try:
    import verifiers.v1 as vf
    from verifiers.v1.utils.loaders import load_taskset
except ImportError as missing:
    raise KeelError(
        f"Tasksets of verifiers need the package verifiers 0.4, which cannot be imported ({missing}). "
        "Install it: pip install 'keel-rl[verifiers]'."
    ) from missing


class Row(vf.TaskData):
    """A prompt of keel's as verifiers keeps it: `split` and `place` find it again when it is graded."""

    answer: str = ""
    split: str = "train"
    place: int = 0


class Graded(vf.Task[Row]):
    """A row that keel's task grades."""

    of: ClassVar[KeelTask]

    @vf.reward
    async def reward(self, trace: vf.Trace) -> float:
        """The task's own value; what cannot be scored is an error, never zero."""
        score = await asyncio.to_thread(self._score, trace)
        if score.value is None:
            raise vf.TaskError(f"unscorable: {score.reason}")
        return score.value

    @vf.metric
    async def correct(self, trace: vf.Trace) -> float:
        """Whether the answer is right."""
        return float((await asyncio.to_thread(self._score, trace)).correct)

    def _score(self, trace: vf.Trace) -> Score:
        prompt = getattr(self.of, self.data.split)[self.data.place]
        return self.of.reward(prompt, trace.last_reply, "length" if trace.is_truncated else "stop")


def taskset(spec: str, split: str = "train") -> type[vf.Taskset]:
    """A taskset class of a keel task, to be exported by a module of yours.

    Args:
        spec: as `keel train --task` takes it.
        split: "train", or "test" for the held-out prompts.
    """
    if split not in ("train", "test"):
        raise KeelError(f"There is no split {split!r}. Expected train or test.")
    task = get_task(spec)
    graded = type("Graded", (Graded,), {"of": task})

    class Prompts(vf.Taskset[graded]):
        def load(self):
            for place, prompt in enumerate(getattr(task, split)):
                row = Row(id=prompt.id, prompt=prompt.text, answer=prompt.answer, split=split, place=place)
                yield graded(row, self.config.task)

    return Prompts


def verifiers(variant: str, gold: str = "", limit: int | str = 100_000, **config: Any) -> PromptTask:
    """The task "verifiers:PACKAGE": an installed taskset.

    Args:
        variant: the taskset's id.
        gold: the field of its data that holds a right answer, so that its rewards can be checked on loading; "" for none.
        limit: most rows that are read.
        config: settings of the taskset.

    Raises:
        KeelError: it cannot be found or loaded, or needs more than a completion to be graded.
    """
    try:
        source = load_taskset(vf.TasksetConfig(id=variant, **config))
    except (ModuleNotFoundError, TypeError, AttributeError, ValueError) as error:
        raise KeelError(f"verifiers cannot load the taskset {variant!r}: {error}. Expected an installed one.") from error
    return as_task(source, f"verifiers:{variant}", gold, int(limit))


def as_task(source: vf.Taskset, name: str, gold: str = "", limit: int = 100_000) -> PromptTask:
    """A taskset as a task of keel: one prompt of eight is held out, by its text. The arguments are those of `verifiers`."""
    tasks = {f"{name}/{number}": task for number, task in enumerate(islice(source, limit))}
    _refuse_more_than_text(name, list(tasks.values()))
    prompts = [_prompt(key, task, gold) for key, task in tasks.items()]
    train, test = ([p for p in prompts if held_out(p.text) is out] for out in (False, True))

    def grade(prompt: Prompt, text: str) -> Score:
        return asyncio.run(_graded(tasks[row_of(prompt.id)], text))

    return PromptTask(name, train, test, grade, own_gold_only=False, **({} if gold else {"checked": 0}))


def _prompt(key: str, task: vf.Task, gold: str) -> Prompt:
    data = task.data
    text = "\n\n".join(part for part in (data.system_prompt, data.prompt_text) if part)
    answer = getattr(data, gold, None) if gold else ""
    if answer is None:
        raise KeelError(f"{key} has no field {gold!r} in its data. Expected one of: {', '.join(type(data).model_fields)}.")
    return Prompt(id=key, text=text, answer=str(answer))


async def _graded(task: vf.Task, text: str) -> Score:
    """A completion's verdict by the taskset's own rewards; unscorable where one of them fails."""
    trace = _trace(task, text)
    try:
        await task.score(trace)
    except vf.RolloutError as error:
        return Score(None, reason=f"{type(error).__name__}: {error}")
    parts: Mapping[str, Any] = {key: held.value for key, held in trace.rewards.items() if held is not None}
    if len(parts) < len(trace.rewards) or not parts:
        return Score(None, reason="a reward did not run")
    value = float(trace.reward)
    return Score(value, correct=value >= 1.0, parts=parts)


def _trace(task: vf.Task, text: str) -> vf.Trace:
    """A run of one turn: the prompt, and this reply."""
    opened = task.data.prompt if isinstance(task.data.prompt, list) else [vf.UserMessage(content=task.data.prompt_text)]
    nodes = [vf.MessageNode(parent=i - 1 if i else None, message=message) for i, message in enumerate(opened)]
    reply = vf.AssistantMessage(content=text)
    nodes.append(vf.MessageNode(parent=len(nodes) - 1, message=reply, sampled=True))
    told = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    trace = vf.Trace(task=told, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes)
    trace.is_completed = trace.ok = True
    return trace


def _refuse_more_than_text(name: str, tasks: list[vf.Task]) -> None:
    if not tasks:
        raise KeelError(f"{name} has no rows. Expected some; look at its settings.")
    first = tasks[0]
    looking = [fn.__name__ for fn in first.hooks("reward") if _needs_runtime(fn)]
    found = {
        "a container": first.NEEDS_CONTAINER,
        "tools": bool(type(first).toolsets(first.config)),
        f"a running box to grade in ({', '.join(looking)})": bool(looking),
        "a user who opens the conversation": any(task.data.prompt is None for task in tasks),
    }
    wanted = [what for what, holds in found.items() if holds]
    if wanted:
        raise KeelError(f"{name} needs {' and '.join(wanted)}. Expected one prompt, one completion and rewards that read it.")


def _needs_runtime(fn: Any) -> bool:
    parameter = inspect.signature(fn).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty
