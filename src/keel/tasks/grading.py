"""How a table's rows are graded: by the name of a grader, and options that are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.errors import KeelError, nearest
from keel.rewards.answer import AnswerGrader, check_golds
from keel.rewards.code import CodeGrader, fenced, read_tests
from keel.rewards.compose import Gated, Grader, Part, Weighted
from keel.rewards.exact import after_marker, exact, exact_anywhere, in_tag, last_line, last_number
from keel.rewards.format import form_of, written
from keel.rewards.sandbox import Limits, Sandbox
from keel.types import Prompt

EXTRACT: dict[str, Grader] = {
    "auto": exact_anywhere,
    "number": exact(last_number),
    "line": exact(last_line),
    "tag": exact(in_tag),
    "marker": exact(after_marker()),
    "text": exact(str.strip),
}
WRITE = {"tag": "<answer>{}</answer>", "marker": "A:{}"}  # how gold is written where it is not the completion itself
OF_TABLES = ("prompt", "answer", "answer_after", "extract", "suffix", "test", "grader", "form", "solution")
LIMITS = {"wall_s": float, "cpu_s": int, "memory_mb": int, "file_mb": int, "processes": int, "output_kb": int}
OF_CODE = (*LIMITS, "verdict", "packages", "require")
CODE_CHECKED = 16  # programs that are run on load


@dataclass(frozen=True)
class Grading:
    """A grader, and what a task has to know of it.

    Args:
        grade: (prompt, text) → Score.
        write_gold: a completion that is right.
        own_gold_only, checked: as of `PromptTask`; `checked` None is its default.
        check: looks at all prompts on load; raises KeelError where one cannot be graded.
    """

    grade: Grader
    write_gold: Callable[[Prompt], str] = lambda prompt: prompt.answer
    own_gold_only: bool = True
    checked: int | None = None
    check: Callable[[Sequence[Prompt]], None] = lambda prompts: None


def grading_of(name: str, grader: str, extract: str, form: str, options: Mapping[str, Any]) -> Grading:
    """The grading of the task `name`.

    Args:
        grader: "exact", "answer", "code" or "judge"; or several and what each counts, "answer,judge*0.5": their weighted sum, in
            which the first says what is right.
        extract: of "exact", where the answer is looked for.
        form: as `rewards.format.form_of` reads it; a completion without it earns nothing. "" is any.
        options: of "code" and "judge".

    Raises:
        KeelError: no such grader, or an option that it does not take.
    """
    if "," in grader or "*" in grader:
        found = _by_several(name, grader, extract, options)
    else:
        found = _by_one(name, grader, extract, options)
    if not form:
        return found
    gated = Gated(form_of(form), found.grade)
    checked = found.checked if written(form, "") is not None else 0
    return Grading(gated, lambda p: written(form, found.write_gold(p)) or "", found.own_gold_only, checked, found.check)


def _by_one(name: str, grader: str, extract: str, options: Mapping[str, Any]) -> Grading:
    if grader not in GRADERS:
        raise KeelError(f"Task {name!r} got grader={grader!r}: {nearest(grader, GRADERS)}Expected one of {', '.join(GRADERS)}.")
    if extract != "auto" and grader != "exact":
        raise KeelError(f"Task {name!r} got grader={grader!r} with extract={extract!r}. Only 'exact' is told where to look.")
    return GRADERS[grader](name, extract, options)


def _by_several(name: str, graders: str, extract: str, options: Mapping[str, Any]) -> Grading:
    """Options go to the grader that takes them: limits of programs to "code", the rest to "judge". Gold is not scored on load: what
    it should earn in all is not known."""
    weights: dict[str, float] = {}
    for term in graders.split(","):
        kind, _, weight = term.strip().partition("*")
        try:
            weights[kind] = float(weight or 1.0)
        except ValueError:
            raise KeelError(
                f"Task {name!r} got grader={graders!r}: {weight!r} is no weight. Expected a form such as 'answer,judge*0.5'."
            ) from None
    own = {key: value for key, value in options.items() if key in OF_CODE and "code" in weights}
    left = {key: value for key, value in options.items() if key not in own}
    given = {kind: own if kind == "code" else left if kind == "judge" else {} for kind in weights}
    if left and "judge" not in weights:
        _refuse(name, graders, left, OF_CODE if "code" in weights else ())
    found = {kind: _by_one(name, kind, extract if kind == "exact" else "auto", given[kind]) for kind in weights}

    def check(prompts: Sequence[Prompt]) -> None:
        for part in found.values():
            part.check(prompts)

    made = Weighted({kind: Part(part.grade, weights[kind]) for kind, part in found.items()})
    return Grading(made, next(iter(found.values())).write_gold, own_gold_only=False, checked=0, check=check)


def _by_exact(name: str, extract: str, options: Mapping[str, Any]) -> Grading:
    _refuse(name, "exact", options)
    if extract not in EXTRACT:
        known = ", ".join(EXTRACT)
        raise KeelError(f"Task {name!r} got extract={extract!r}: {nearest(extract, EXTRACT)}Expected one of {known}.")
    pattern = WRITE.get(extract, "{}")
    return Grading(EXTRACT[extract], lambda prompt: pattern.replace("{}", prompt.answer))


def _by_answer(name: str, extract: str, options: Mapping[str, Any]) -> Grading:
    _refuse(name, "answer", options)

    def check(prompts: Sequence[Prompt]) -> None:
        check_golds([(prompt.id, prompt.answer) for prompt in prompts], f"Task {name!r}")

    return Grading(AnswerGrader(), lambda prompt: f"\\boxed{{{prompt.answer}}}", own_gold_only=False, check=check)


def _by_code(name: str, extract: str, options: Mapping[str, Any]) -> Grading:
    """Options: verdict (all, fraction), packages, require, and the limits of `rewards.sandbox.Limits`. The answer's column holds
    tests; with a column of solutions, some are run on load."""
    _refuse(name, "code", options, OF_CODE)
    for option, known in (
        ("verdict", ("all", "fraction")),
        ("require", ("bare", "network", "full")),
        ("packages", ("true", "false")),
    ):
        if options.get(option, known[0]) not in known:
            raise KeelError(f"Task {name!r} got {option}={options[option]!r}. Expected one of {', '.join(known)}.")
    try:
        limits = Limits(**{key: kind(options[key]) for key, kind in LIMITS.items() if key in options})
    except ValueError as fault:
        raise KeelError(f"Task {name!r} got a limit that is none: {fault}. Expected numbers above 0.") from None
    sandbox = Sandbox(limits, options.get("packages", "false") == "true", options.get("require", "bare"))

    def check(prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            read_tests(prompt.answer, f"{prompt.id} of {name!r}")

    def gold(prompt: Prompt) -> str:
        return fenced(str(prompt.data.get("solution", "")))

    return Grading(CodeGrader(sandbox, options.get("verdict", "all")), gold, False, CODE_CHECKED, check)


def _by_judge(name: str, extract: str, options: Mapping[str, Any]) -> Grading:
    """Options: rubric (a TOML file), and the settings of `rewards.judge_server.JudgeSettings`. Nothing is asked on load."""
    from keel.rewards.judge import judge_of
    from keel.rewards.rubric import load_rubric

    if "rubric" not in options:
        raise KeelError(f"Task {name!r} has grader=judge and no rubric. Expected rubric=FILE.toml, with the points that count.")
    settings = {key: value for key, value in options.items() if key != "rubric"}
    settings = {key: None if value == "none" else value for key, value in settings.items()}
    return Grading(judge_of(load_rubric(options["rubric"]), **settings), own_gold_only=False, checked=0)


GRADERS: dict[str, Callable[[str, str, Mapping[str, Any]], Grading]] = {
    "exact": _by_exact,
    "answer": _by_answer,
    "code": _by_code,
    "judge": _by_judge,
}


def _refuse(name: str, grader: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    for key in options:
        if key not in known:
            takes = (*known, *OF_TABLES)
            raise KeelError(
                f"Task {name!r} with grader={grader} takes no option {key!r}: {nearest(key, takes)}It takes {', '.join(takes)}."
            )
