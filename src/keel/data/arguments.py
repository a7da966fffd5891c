"""Arguments of `keel data check` and `keel data build`, and what is called with them. Importing this is quick."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def add_check_arguments(parser: ArgumentParser) -> None:
    """Of `keel data check`."""
    add = parser.add_argument
    add("data", help="a task, or a JSONL or Parquet file with a question and an answer in each row")
    add("--against", action="append", default=[], metavar="DATA", help="a set that is evaluated on; may be repeated")
    add("--samples", default="", metavar="RUN", help="a run folder, or a JSONL of completions: pass rates and suspect gold answers")
    add("--grader", default="", help="in place of the task's, as `keel grade` knows it")
    add("--also", action="append", default=[], metavar="FAULT", help="drop rows for this fault too; may be repeated")
    add("--keep", action="append", default=[], metavar="FAULT", help="drop no row for this fault; may be repeated")
    add("--out", default="", metavar="FILE", help="write the cleaned set, and what was dropped and why next to it")
    add("--json", action="store_true", help="print the findings as JSON on stdout")


def check_options(options: Namespace) -> int:
    """`keel data check`, from parsed arguments."""
    from keel.data.command import run_check

    given = {name: getattr(options, name) for name in ("against", "samples", "grader", "also", "keep", "out")}
    return run_check(options.data, **given, as_json=options.json)


def add_build_arguments(parser: ArgumentParser) -> None:
    """Of `keel data build`."""
    add = parser.add_argument
    add("tasks", nargs="+", help="tasks whose training prompts are candidates")
    add("--out", required=True, metavar="FILE", help="the new JSONL; held-out rows, a control and the card come next to it")
    add("--size", type=int, required=True, help="rows wanted")
    add("--pool", type=int, default=2000, help="candidates that are measured (default: %(default)s)")
    add("--variations", action="store_true", help="other sizes and wordings of the tasks too")
    add("--against", action="append", default=[], metavar="TASK", help="whose held-out prompts must not come in; may be repeated")
    add("--model", default="tiny-dense", help="whose pass rates are measured (default: %(default)s)")
    add("--template", default="auto", help="how it is asked (default: %(default)s)")
    add("--samples", type=int, default=8, help="completions of each candidate (default: %(default)s)")
    add("--low", type=float, default=0.1, help="least pass rate (default: %(default)s)")
    add("--high", type=float, default=0.9, help="largest pass rate (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    add("--max-completion-tokens", type=int, default=48, help="of the samples (default: %(default)s)")
    add("--minutes", type=float, default=20.0, help="after which no more candidates are measured (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print the numbers as JSON on stdout")


def build_options(options: Namespace) -> int:
    """`keel data build`, from parsed arguments."""
    from keel.data.command import run_build

    given = {name: value for name, value in vars(options).items() if name not in ("tasks", "json")}
    return run_build(options.tasks, **given, as_json=options.json)
