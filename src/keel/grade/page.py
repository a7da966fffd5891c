"""The same as a Markdown page: sentences first, then every figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keel.grade.rates import Rate
from keel.grade.report import Accuracy, Report
from keel.grade.words import compared, effect_said, said_of

LONGEST = 60  # characters of an answer that are shown


def page(report: Report, picture: str = "") -> str:
    """The page.

    Args:
        picture: file name of the reliability plot, next to the page; "" without one.
    """
    pairs = report.pairs
    lines = [f"# How far to trust: {', '.join(each.name for each in report.graders)}", ""]
    lines += [f"{len(pairs.rows):,} answers of `{pairs.name}`, {pairs.labelled:,} of them labelled. Intervals are 95 %.", ""]
    if pairs.left_out:
        lines += [
            f"{len(pairs.left_out)} rows could not be read:",
            "",
            *_list(f"row {n}: {why}" for n, why in pairs.left_out.items()),
        ]
    for each in report.graders:
        lines += [f"## {each.name}", "", *_list(said_of(each))]
        lines += _figures(each.accuracy) if each.accuracy else []
    if report.agreement:
        lines += ["## Agreement", "", *_list(map(compared, report.agreement))]
    if picture:
        lines += ["## Reliability", "", f"![Truth against verdict]({picture})", ""]
    return "\n".join([*lines, *NOTES])


NOTES = [
    "## How to read this",
    "",
    "TPR is the share of right answers that pass, FPR of wrong ones; both among answers that got a verdict. Recall counts an "
    "unscorable right answer as missed. Precision depends on how many answers of the file are right; a policy's share is its own.",
    "",
    "Errors that hang on nothing but whether an answer is right multiply the expected gradient of centred advantages by TPR − FPR. "
    "Under a division by the group's standard deviation the factor is (TPR − FPR)·c(p̃)/c(p), with p̃ = p·TPR + (1−p)·FPR. Both are "
    "checked here against an enumeration of every group of 4. Samples: p̃(1−p̃) / ((TPR − FPR)²·p(1−p)). Errors that hang on "
    "something else, as a class or a feature, change what is learned, and no factor says how much.",
    "",
    "Intervals are Wilson's and Newcombe's, with several answers to one question counted as fewer; κ and slope are bootstrapped "
    "over questions. Features are tried one by one: p is the larger of Fisher's (or the rank-sum test's), which takes every answer "
    "as independent, and that of a score test by question; then corrected by Holm for all that were tried.",
    "",
]


def _figures(found: Accuracy) -> list[str]:
    lines = [*_table(["", "share", "95 %", "answers"], _rates(found))]
    if found.by_class:
        rows = [[kind, *_cells(of), _passed(found, kind)] for kind, of in found.by_class.items()]
        lines += _table(["class", "graded well", "95 %", "answers", "wrong ones passed"], rows)
    if found.consequence:
        head = [
            "true pass rate",
            "graded",
            "× centred",
            "× by std",
            "rewarded and right",
            "× samples",
            "dead groups, true",
            "graded",
        ]
        lines += _table(head, [[f"{value:.3g}" for value in vars(at).values()] for at in found.consequence])
        lines += [f"Largest distance of the two factors from their enumeration: {found.enumerated:.1g}.", ""]
    if found.levels:
        head = ["label ╲ verdict", *(f"{level:g}" for level in found.levels.levels)]
        rows = [[f"{level:g}", *map(str, row)] for level, row in zip(found.levels.levels, found.levels.table, strict=True)]
        lines += _table(head, rows)
    if found.surface.effects:
        lines += ["Surface features, the likeliest first:", "", *_list(map(effect_said, found.surface.effects[:8]))]
    for among, of in found.surface.length.items():
        if of.mean == of.mean:
            lines += [f"Length of errors against the rest, {among} answers: AUC {of.mean:.2f} ({of.low:.2f}–{of.high:.2f}).", ""]
    if found.errors:
        head = ["row", "class", "answer", "gold", "verdict", "label"]
        rows = [[str(e.row), e.kind, _code(e.answer), _code(e.gold), f"{e.value:g}", f"{e.label:g}"] for e in found.errors]
        lines += _table(head, rows)
    return lines


def _rates(found: Accuracy) -> list[list[str]]:
    named = [("TPR", found.tpr), ("FPR", found.fpr), ("recall", found.recall), ("precision", found.precision)]
    rows = [[name, *_cells(of)] for name, of in [*named, ("accuracy", found.accuracy)]]
    return [*rows, ["J = TPR − FPR", f"{found.j.mean:.4f}", f"{found.j.low:.4f} … {found.j.high:.4f}", ""]]


def _cells(of: Rate) -> list[str]:
    return [f"{of.mean:.4f}", f"{of.low:.4f} … {of.high:.4f}", str(of.of)] if of.of else ["", "", "0"]


def _passed(found: Accuracy, kind: str) -> str:
    of = found.passed_by_class.get(kind)
    return f"{of.hits} of {of.of}, at most {100 * of.high:.2g} %" if of else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _list(lines: Iterable[str]) -> list[str]:
    return [*(f"- {line.strip()}" for line in lines), ""]


def _code(text: str) -> str:
    """A text in one line that no Markdown in it can leave; what cannot be seen is told by its number."""
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return "`" + shown.replace("`", "'") + "`" if shown else "*empty*"
