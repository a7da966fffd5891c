"""Any data set of the reasoning-gym package, graded by its own scorer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from keel.errors import KeelError, nearest
from keel.rewards.exact import answer_in
from keel.tasks.arithmetic import size_option
from keel.tasks.task import PromptTask, held_out
from keel.types import Prompt, Score

LONGEST = 4096  # characters an answer may have, or four times gold's: some scorers take quadratic time
FULL = 1.0 - 1e-9
_NOT_A_NUMBER = re.compile(r"\b(nan|inf|infinity)\b", re.IGNORECASE)  # every comparison with NaN fails, as some pass on


def reasoning_gym(
    variant: str, train_size: int | str = 1000, test_size: int | str = 128, seed: int | str = 0, suffix: str = "",
    **config: Any,
) -> PromptTask:  # fmt: skip
    """One data set of reasoning-gym by its own name, for instance "reasoning_gym:basic_arithmetic".

    The answer is taken from the completion's last <answer> tag, or as `rewards.exact.answer_in` finds it, and handed to
    the data set's scorer. Its verdict is the reward, in [0, 1]; 1 counts as correct. A scorer that raises, or says
    anything else, leaves the completion unscorable with the reason. An empty answer, or one far longer than any answer,
    earns 0 and never reaches the scorer.

    Args:
        train_size, test_size: prompts at most; of equal texts one, and none whose right answer is to say nothing.
        seed: of the data set.
        suffix: written after every question.
        config: the data set's own settings, for instance max_terms=3; text is read as a number or bool where it is one.

    Raises:
        KeelError: the package is missing, or it has no such data set or setting.
    """
    sizes = {"train": size_option("train_size", train_size), "test": size_option("test_size", test_size)}
    data = _data(variant, {"seed": int(seed), "size": 2 * (sizes["train"] + 16 * sizes["test"]), **_read(config)})
    splits: dict[str, list[Prompt]] = {"train": [], "test": []}
    seen: set[str] = set()
    for index in range(len(data)):
        entry = data[index]
        if entry["question"] in seen or entry["answer"] == "":
            continue
        seen.add(entry["question"])
        split = "test" if held_out(entry["question"]) else "train"
        if len(splits[split]) < sizes[split]:
            splits[split].append(_prompt(variant, index, entry, suffix))
        if all(len(splits[name]) == sizes[name] for name in splits):
            break
    grade = grader(data.score_answer)
    return PromptTask(f"reasoning_gym:{variant}", splits["train"], splits["test"], grade, _gold, own_gold_only=False)


def grader(score_answer: Callable[[str, Mapping[str, Any]], float]) -> Callable[[Prompt, str], Score]:
    """A data set's scorer as a grader that never raises and never gives anything but a number in [0, 1]."""

    def grade(prompt: Prompt, text: str) -> Score:
        answer = answer_in(text, prompt.answer)
        if not answer:
            return Score(0.0, reason="no answer found")
        if len(answer) > max(LONGEST, 4 * len(prompt.answer)):
            return Score(0.0, reason="answer too long", said=answer)
        if _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(prompt.answer):
            return Score(0.0, reason="not a number", said=answer)
        try:
            value = float(score_answer(answer, prompt.data["entry"]))
        except Exception as error:  # scorers index into what a model wrote, and fail in as many ways
            return Score(None, reason=f"the scorer raised {type(error).__name__}: {error}", said=answer)
        if not 0.0 <= value <= 1.0:  # NaN too
            return Score(None, reason=f"the scorer returned {value}, which is not in [0, 1]", said=answer)
        return Score(value, value >= FULL, said=answer)

    return grade


def _data(variant: str, config: Mapping[str, Any]):
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise KeelError(
            f"Task 'reasoning_gym:{variant}' needs the package reasoning-gym, which cannot be imported ({error}). "
            f"Install it: pip install 'keel-rl[reasoning-gym]'."
        ) from error
    if variant not in DATASETS:
        raise KeelError(
            f"reasoning-gym has no data set {variant!r}: {nearest(variant, DATASETS)}It has {len(DATASETS)}: "
            f"{', '.join(sorted(DATASETS))}. Expected one of these."
        )
    try:
        return create_dataset(variant, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise KeelError(
            f"reasoning-gym's data set {variant!r} refuses the settings {dict(config)}: {error} Expected its own "
            f"settings, as its documentation lists them."
        ) from error


def _prompt(variant: str, index: int, entry: Mapping[str, Any], suffix: str) -> Prompt:
    if entry["answer"] is None:
        raise KeelError(
            f"reasoning-gym's data set {variant!r} gives no gold answer for its row {index}, so nothing can show that "
            f"its scorer works. Expected one in every row; choose another data set."
        )
    return Prompt(id=f"{variant}/{index}", text=entry["question"] + suffix, answer=str(entry["answer"]), data={"entry": entry})


def _gold(prompt: Prompt) -> str:
    return f"<answer>{prompt.answer}</answer>"


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that came as text, as the values they spell."""
    return {key: _value(text) if isinstance(text, str) else text for key, text in config.items()}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
