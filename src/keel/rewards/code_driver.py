"""Runs inside the sandbox, beside a program that nobody trusts: imports it, calls what the tests name, writes down what came back.

It judges nothing and knows no expected value: whatever the program does to this process, it can only change its own answers.
"""

from __future__ import annotations

import ast
import json
import os
import sys


def plain(value: object, depth: int = 0) -> object:
    """A value as JSON can hold it: tuples as lists, sets and other dictionaries under a name, all else refused."""
    if depth > 50:
        raise TypeError("nested more than 50 deep")
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [plain(each, depth + 1) for each in value]
    if kind is dict:
        return {"dict": [[plain(key, depth + 1), plain(each, depth + 1)] for key, each in value.items()]}
    if kind in (set, frozenset):
        return {"set": [plain(each, depth + 1) for each in value]}
    raise TypeError(f"it is a {kind.__name__}")


def main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is no answer
    calls = ast.literal_eval(sys.stdin.read())
    with open(os.path.join(folder, "program.py"), encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    space: dict[str, object] = {"__name__": "program"}
    exec(compile(source, "program.py", "exec"), space)
    for number, (name, arguments, keywords) in enumerate(calls):
        try:
            said = {"number": number, "value": plain(space[name](*arguments, **keywords))}
        except Exception as fault:
            said = {"number": number, "fault": f"{type(fault).__name__}: {fault}"[:200]}
        os.write(answers, (json.dumps(said) + "\n").encode())


if __name__ == "__main__":
    main()
