"""Arguments of `keel grade`, and what is called with them. Importing this is quick."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

ROLES = ("answer", "gold", "label", "prompt", "class")


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("answers", help="a JSONL: a text, its gold answer and, where somebody judged it, a label in each line")
    add("--grader", action="append", default=[], help="a name, file.py:function or judge:RUBRIC.toml?model=…; may be repeated")
    for role in ROLES:
        add(f"--{role}", default="", metavar="COLUMN", help=f"the column of the {role}, where its name does not tell")
    add("--feature", action="append", default=[], metavar="COLUMN", help="a column that errors may hang on; may be repeated")
    add("--twice", action="store_true", help="ask again in reverse order, and with answer and gold exchanged")
    add("--callers", type=int, default=0, help="threads that ask a grader at once (default: as the grader likes it)")
    add("--group-size", type=int, default=8, help="completions of a prompt in training (default: %(default)s)")
    add("--markdown", default="", metavar="FILE", help="write the page, and the reliability plot next to it")
    add("--json", action="store_true", help="print the numbers as JSON on stdout")


def run_options(options: Namespace) -> int:
    """The command, from parsed arguments."""
    from keel.grade.command import run

    columns = {role: getattr(options, role) for role in ROLES}
    return run(
        options.answers,
        options.grader,
        columns,
        callers=options.callers,
        twice=options.twice,
        features=options.feature,
        group_size=options.group_size,
        markdown=options.markdown,
        as_json=options.json,
    )
