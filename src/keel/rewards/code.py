"""Programs as completions: run in the sandbox, and compared out here, where they cannot reach.

A test is an input and what has to come out. The sandbox is told the input only; what comes out travels back and is compared in this
process. So a program that exits at once, kills itself, prints "all tests passed" or rewrites the test harness has answered nothing:
it fails. Only where the sandbox could not start a program is the completion unscorable.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keel.errors import KeelError
from keel.rewards.sandbox import Ran, Sandbox
from keel.types import Prompt, Score

DRIVER = Path(__file__).with_name("code_driver.py")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "py", "python", "python3")
CLOSE = 1e-9  # relative difference at which two floats are one


@dataclass(frozen=True)
class Printed:
    """The program reads `stdin` and has to print `stdout`; spaces at the ends of lines, and empty last lines, do not count."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Returned:
    """The function `call` has to return `value`: numbers by value, tuples like lists."""

    call: str
    value: Any
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


Test = Printed | Returned


def program_in(text: str) -> str | None:
    """The last block of a completion that is fenced by ``` as Python, or as nothing; None without one."""
    blocks = [body for _, language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else None


def fenced(program: str) -> str:
    """A completion that is just this program."""
    return f"```python\n{program}\n```"


@dataclass
class CodeGrader:
    """A grader of programs: the share of tests that pass, or 1 for all and else 0.

    Args:
        sandbox: where programs run.
        verdict: "all" (1 where every test passes) or "fraction". `correct` means all of them, either way.
        total_s: seconds for all tests of one completion; those that it does not reach have failed.
        workers: programs that run at a time, where many are graded together.
    """

    sandbox: Sandbox = field(default_factory=Sandbox)
    verdict: Literal["all", "fraction"] = "all"
    total_s: float = 60.0
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __call__(self, prompt: Prompt, text: str) -> Score:
        """The verdict; the tests are the prompt's answer, as `read_tests` reads them."""
        program = program_in(text)
        if program is None:
            return Score(0.0, reason="no program found: expected a block fenced by ```python")
        return self.grade(program, read_tests(prompt.answer, f"prompt {prompt.id!r}"))

    def describe(self) -> dict[str, object]:
        """For the manifest."""
        return {"verdict": self.verdict, "total_s": self.total_s, "sandbox": self.sandbox.describe()}

    def many(self, asked: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The verdicts, in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self(*pair), asked))

    def grade(self, program: str, tests: Sequence[Test]) -> Score:
        """The verdict on a program. Unscorable only where the sandbox failed, which a program cannot bring about."""
        if not tests:
            raise KeelError("There are no tests to run. Expected at least one: a program that is not tested is not right.")
        passed, reason, left = 0, "", self.total_s
        calls = [test for test in tests if isinstance(test, Returned)]
        for group in [calls] * bool(calls) + [[test] for test in tests if isinstance(test, Printed)]:
            if left <= 0:
                reason = reason or f"not all tests were reached in {self.total_s:g} s"
                break
            ran, right, why = self._run(program, group)
            if ran.ended == "failed":
                return Score(None, reason=f"sandbox: {ran.reason}")
            left -= ran.seconds
            passed += right
            reason = reason or why
        share = passed / len(tests)
        value = share if self.verdict == "fraction" else float(passed == len(tests))
        return Score(value, passed == len(tests), reason, {"test.passed_frac": share})

    def _run(self, program: str, tests: Sequence[Test]) -> tuple[Ran, int, str]:
        """How it ran, how many tests passed, and why the first of the others did not."""
        first = tests[0]
        if isinstance(first, Printed):
            ran = self.sandbox.run({"program.py": program}, "program.py", first.stdin.encode("utf-8", "surrogatepass"))
            right = ran.ended == "exit" and ran.status == 0 and _same_print(ran.output, first.stdout)
            return ran, int(right), "" if right else _why(ran, f"printed {_shown(ran.output)}, expected {_shown(first.stdout)}")
        calls = repr([[test.call, test.arguments, test.keywords] for test in tests]).encode("utf-8", "backslashreplace")
        files = {"program.py": program, "driver.py": DRIVER.read_text(encoding="utf-8")}
        ran = self.sandbox.run(files, "driver.py", calls)
        return ran, *_compared(ran, tests)


def _compared(ran: Ran, tests: Sequence[Test]) -> tuple[int, str]:
    answers, passed, reason = _answers(ran.output), 0, ""
    for number, test in enumerate(tests):
        assert isinstance(test, Returned)
        said = answers.get(number)
        if said is not None and "value" in said and same_value(said["value"], test.value):
            passed += 1
        elif not reason and said is None:
            reason = _why(ran, f"{test.call} was never answered")
        elif not reason and said is not None:
            got = f"raised {said['fault']}" if "fault" in said else f"returned {_shown(json.dumps(said.get('value')))}"
            reason = f"{test.call} {got}, expected {_shown(repr(test.value))}"
    return passed, reason


def _answers(output: bytes) -> dict[int, dict[str, Any]]:
    """What came back, by the number of its call; a number that is answered twice counts as not answered."""
    found: dict[int, dict[str, Any]] = {}
    twice = set()
    for line in output.split(b"\n"):
        try:
            said = json.loads(line)
            number = said["number"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(number) is int:
            twice |= {number} & found.keys()
            found[number] = said
    return {number: said for number, said in found.items() if number not in twice}


def same_value(found: Any, expected: Any) -> bool:
    """Whether a value that came back (as `code_driver.plain` writes it) is the expected one.

    True and 1 differ, 2 and 2.0 do not, and floats may differ by `CLOSE`. NaN is equal to nothing.
    """
    if isinstance(expected, bool) or isinstance(found, bool) or expected is None or isinstance(expected, str):
        return type(found) is type(expected) and found == expected
    if isinstance(expected, int | float):
        return isinstance(found, int | float) and _same_number(found, expected)
    if isinstance(expected, list | tuple):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same_value, found, expected))
    kind, held = ("dict", expected.items()) if isinstance(expected, dict) else ("set", expected)
    members = found.get(kind) if isinstance(found, dict) and set(found) == {kind} else None
    if not isinstance(members, list) or len(members) != len(held):
        return False
    return all(any(same_value(each, one) for each in members) for one in (list(map(list, held)) if kind == "dict" else held))


def _same_number(found: int | float, expected: int | float) -> bool:
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected
    try:
        return math.isclose(found, expected, rel_tol=CLOSE, abs_tol=CLOSE)
    except OverflowError:  # an integer that no float can hold
        return False


def _same_print(output: bytes, expected: str) -> bool:
    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    return lines(output.decode("utf-8", "replace").replace("\r\n", "\n")) == lines(expected)


def _why(ran: Ran, otherwise: str) -> str:
    if ran.ended == "time":
        return f"not done after {ran.seconds:.1f} s"
    if ran.ended == "output":
        return "wrote more than is read"
    if ran.ended == "signal" or ran.status:
        last = ran.errors.decode("utf-8", "replace").strip().splitlines()[-1:]
        return f"ended with status {ran.status}{f': {last[0][:200]}' if last else ''}"
    return otherwise


def _shown(text: str | bytes, most: int = 80) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= most else text[: most - 1] + "…")


# ---- reading tests ---------------------------------------------------------------------------------------------------


def read_tests(text: str, where: str) -> list[Test]:
    """Tests from a gold answer: lines "assert f(1, 2) == 3", or a JSON list of {"stdin", "stdout"} and {"call", "args", "returns"}.

    Raises:
        KeelError: it is neither, or a test compares with something else than a written-down value.
    """
    text = text.strip()
    rows = _json_tests(text, where) if text.startswith(("[", "{")) else [_assertion(node, where) for node in _asserts(text, where)]
    if not rows:
        raise KeelError(f"The tests of {where} are empty. Expected at least one: a program that is not tested is not right.")
    return rows


def _json_tests(text: str, where: str) -> list[Test]:
    try:
        rows = json.loads(text)
    except ValueError as fault:
        raise KeelError(f"The tests of {where} are no JSON: {fault}. Expected a list of objects, or lines of assert.") from None
    return [_json_test(row, where) for row in (rows if isinstance(rows, list) else [rows])]


def _json_test(row: Any, where: str) -> Test:
    if isinstance(row, str):
        (node,) = _asserts(row, where)
        return _assertion(node, where)
    keys = set(row) if isinstance(row, dict) else set()
    if keys == {"stdin", "stdout"} and isinstance(row["stdin"], str) and isinstance(row["stdout"], str):
        return Printed(row["stdin"], row["stdout"])
    if {"call", "returns"} <= keys <= {"call", "args", "kwargs", "returns"} and isinstance(row.get("args", []), list):
        return Returned(str(row["call"]), row["returns"], tuple(row.get("args", [])), dict(row.get("kwargs", {})))
    raise KeelError(
        f"A test of {where} is {_shown(json.dumps(row))}. Expected the keys stdin and stdout, or call, returns and perhaps args (a "
        f"list) and kwargs, or a text such as 'assert f(1) == 2'."
    )


def _asserts(text: str, where: str) -> list[ast.Assert]:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
        raise KeelError(f"The tests of {where} are no Python: {fault}. Expected lines such as 'assert f(1, 2) == 3'.") from None
    for node in body:
        if not isinstance(node, ast.Assert):
            raise KeelError(
                f"The tests of {where} hold the line {ast.unparse(node)[:80]!r}. Expected only lines 'assert CALL == VALUE': a "
                f"program could reach anything more that ran beside it. Write such a test as stdin and stdout."
            )
    return [node for node in body if isinstance(node, ast.Assert)]


def _assertion(node: ast.Assert, where: str) -> Returned:
    """`assert f(…) == value`, either way round, `is` in place of ==, or `assert f(…)` and `assert not f(…)`, which mean True and
    False themselves."""
    test, value = node.test, True
    try:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, value = test.operand, False
        elif isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
            sides = [test.left, test.comparators[0]]
            sides.sort(key=lambda side: not isinstance(side, ast.Call))
            test, value = sides[0], ast.literal_eval(sides[1])
        if not isinstance(test, ast.Call) or not isinstance(test.func, ast.Name):
            raise ValueError("it calls no function by its name")
        arguments = tuple(ast.literal_eval(argument) for argument in test.args)
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in test.keywords}
    except (ValueError, TypeError, SyntaxError) as fault:
        raise KeelError(
            f"The test {ast.unparse(node)[:120]!r} of {where} cannot be kept out of a program's reach: {fault}. Expected 'assert "
            f"f(ARGUMENTS) == VALUE' with written-down values, or stdin and stdout."
        ) from None
    return Returned(test.func.id, value, arguments, keywords)
