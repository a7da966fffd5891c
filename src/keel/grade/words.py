"""What was measured, in sentences: how often a grader is wrong, how far to trust it, and what training on it would do."""

from __future__ import annotations

import math

from keel.grade.agreement import Pairwise
from keel.grade.rates import Interval, Rate
from keel.grade.report import Accuracy, Graded, Report
from keel.grade.surface import Effect

GOOD, FAIR = 0.95, 0.8  # lower ends of J from which a grader is called good, and fair
FEW = 100  # right or wrong answers below which the sentence says that they are few
COMMON = 0.01  # a share of unscorable answers from which it is worth a warning
SHOWN = 5


def told(report: Report) -> str:
    """Everything, for a terminal."""
    parts = [_head(report)]
    for each in report.graders:
        parts += ["", f"── {each.name} " + "─" * max(0, 76 - len(each.name)), *said_of(each)]
    parts += ["", *(compared(pair) for pair in report.agreement)] if report.agreement else []
    return "\n".join(parts)


def said_of(each: Graded) -> list[str]:
    """One grader in sentences, each a line."""
    if each.accuracy is None:
        lines = [
            f"It passes {_in_100(each.passed)} of the answers that it can score.",
            "Nobody has said which answers are right, so how often it errs is unknown. Label some (a column of true and false: 100 "
            "right and 100 wrong ones bound both errors to about ± 5 in 100 at worst), or compare it with another grader.",
        ]
        return [*lines, _unscorable(each), _time(each), *_twice(each)]
    found = each.accuracy
    sentences = [trust(found), *_errors(found), *_classes(found), *_surface(found), *consequences(found), _levels(found)]
    return [line for line in (*sentences, _unscorable(each), _time(each), *_twice(each)) if line]


def trust(found: Accuracy) -> str:
    """How far to trust it, in one sentence."""
    if not (found.tpr.of and found.fpr.of):
        missing = "right" if found.tpr.of == 0 else "wrong"
        return f"There is no {missing} answer among the labelled ones, so only one kind of error can be seen: add some."
    j, worst = found.j, found.passed_by_class.get(found.worst_class)
    numbers = f"J = TPR − FPR = {j.mean:.3f}, 95 % {j.low:.3f} … {j.high:.3f}"
    if j.high < 0:
        return f"It is wrong more often than not ({numbers}): training on it would unlearn what is right."
    if j.low <= 0:
        return f"Do not train on it: its verdicts may say nothing about what is right ({numbers})."
    if worst is not None and worst.mean > 0.5:
        return f"Do not train on it yet: a policy would find class {found.worst_class!r}, of which it pays the most ({numbers})."
    if j.low >= GOOD:
        return f"Trust it as a reward for answers like these ({numbers})." + _few(found)
    if j.low >= FAIR:
        return f"It can be trained on: its errors slow learning and do not turn it round ({numbers})." + _few(found)
    return f"Trust it little: improve it, or train with more samples and look at its verdicts ({numbers})." + _few(found)


def _few(found: Accuracy) -> str:
    least = min(found.tpr.of, found.fpr.of)
    kind = "right" if found.tpr.of == least else "wrong"
    return f" Only {least} {kind} answers say so: label more." if least < FEW else ""


def _errors(found: Accuracy) -> list[str]:
    lines = []
    if found.fpr.of:
        lines.append(f"It passes {_in_100(found.fpr)} wrong answers ({found.fpr.hits} of {found.fpr.of}).")
    if found.tpr.of:
        lost = Rate(found.tpr.of - found.tpr.hits, found.tpr.of, 1 - found.tpr.mean, 1 - found.tpr.high, 1 - found.tpr.low)
        lines.append(f"It fails {_in_100(lost)} right answers ({lost.hits} of {lost.of}).")
    shares = f"recall {_share(found.recall)}, precision {_share(found.precision)}, accuracy {_share(found.accuracy)}"
    return [*lines, f"In this file's mixture of right and wrong: {shares}."]


def _classes(found: Accuracy) -> list[str]:
    if not found.by_class:
        return []
    bad = sorted(((r.mean, kind, r) for kind, r in found.by_class.items()), key=lambda item: item[0])
    told = ", ".join(f"{kind} {100 * r.mean:.1f} % of {r.of}" for _, kind, r in bad[: 2 * SHOWN])
    more = f" and {len(bad) - 2 * SHOWN} classes more" if len(bad) > 2 * SHOWN else ""
    lines = [f"Graded well by class: {told}{more}."]
    if found.worst_class:
        worst = found.passed_by_class[found.worst_class]
        lines.append(
            f"Of wrong answers it pays class {found.worst_class!r} best ({_in_100(worst)}): a policy that drifts there learns at "
            f"TPR − {worst.mean:.2f} = {found.tpr.mean - worst.mean:.2f} of full strength."
        )
    return lines


def _surface(found: Accuracy) -> list[str]:
    seen = found.surface
    if seen.tried == 0:
        wrong = found.accuracy.of - found.accuracy.hits
        return [f"Its {wrong} errors are too few to ask what they depend on." if wrong else "It makes no error here."]
    if not seen.found:
        return [
            f"None of {seen.tried} surface features (length, format, words) predicts its errors (corrected for all {seen.tried})."
        ]
    lines = [f"Its errors can be read off the surface ({len(seen.found)} of {seen.tried} features tried, corrected for all):"]
    lines += [f"  {effect_said(effect)}" for effect in seen.found[:SHOWN]]
    paid = [e for e in seen.found if e.among == "wrong" and e.with_it is not None and e.size.mean > 0]
    if paid:
        best = max(paid, key=lambda effect: effect.size.low)
        lines.append(
            f"  So a wrong answer with {best.feature} earns {best.size.mean:.2f} more than one without: the expected gradient is "
            "no multiple of the true one, and a policy can raise its reward without being right."
        )
    return lines


def effect_said(effect: Effect) -> str:
    """One effect in a sentence."""
    verb = "passes" if effect.among == "wrong" else "fails"
    if effect.with_it is not None and effect.without is not None:
        with_it, without = 100 * effect.with_it.mean, 100 * effect.without.mean
        return (
            f"{effect.feature}: it {verb} {with_it:.1f} in 100 {effect.among} answers with, {without:.1f} without "
            f"(p {effect.p_corrected:.1g})"
        )
    way = "larger" if effect.size.mean > 0.5 else "smaller"
    at_least = max(effect.size.mean, 1 - effect.size.mean)
    return f"{effect.feature}: {way} where it {verb} {effect.among} answers (AUC {at_least:.2f}, p {effect.p_corrected:.1g})"


def consequences(found: Accuracy) -> list[str]:
    """What training on it would do."""
    if not found.consequence:
        return []
    of = {at.pass_rate: at for at in found.consequence}
    low, middle, high = of[0.05], of[0.5], of[0.95]
    slope = f"{found.slope.mean:.3f} with centred advantages (95 % {found.slope.low:.3f} … {found.slope.high:.3f})"
    by_std = f"{low.by_std:.2f}, {middle.by_std:.2f}, {high.by_std:.2f}"
    by_std += "" if abs(found.slope.mean - found.j.mean) < 1e-9 else " (were passes 1 and fails 0)"
    lines = [
        f"The policy gradient is multiplied by {slope}; divided by the group's std by {by_std} at pass rates .05, .5, .95. For the "
        f"same signal there it takes {_times(low.samples)}, {_times(middle.samples)}, {_times(high.samples)} as many samples.",
    ]
    if low.earned < 0.9:
        lines.append(
            f"On hard prompts (pass rate .05) {100 * (1 - low.earned):.0f} in 100 of the answers that it rewards would be wrong."
        )
    return lines


def _levels(found: Accuracy) -> str:
    if found.levels is None:
        return ""
    kappa, squared = found.levels.kappa, found.levels.kappa_squared
    said = f"Cohen's κ with the labels {_number(kappa)}"
    if len(found.levels.levels) == 2:
        return said + "."
    means = ", ".join(f"{mean:.2f} at {level:g}" for level, mean in zip(found.levels.levels, found.levels.mean, strict=True))
    return f"{said}, {_number(squared)} with squared weights. Its mean verdict by level: {means}."


def _unscorable(each: Graded) -> str:
    if each.unscorable.hits == 0:
        return "Every answer got a verdict."
    reasons = "; ".join(f"{count} × {reason[:80]}" for reason, count in list(each.reasons.items())[:SHOWN])
    said = f"Unscorable, and in no figure above but recall: {each.unscorable.hits} of {each.answers} ({reasons})."
    by = each.unscorable_by_label
    if by and by["right"].of and by["wrong"].of and each.unscorable.mean >= COMMON:
        said += f" Of right answers {_share(by['right'])}, of wrong ones {_share(by['wrong'])}."
    return said + (f" It raised {each.raised} times, which no grader may do." if each.raised else "")


def _time(each: Graded) -> str:
    cost = "" if each.cost_per_1000 is None else f", cost {each.cost_per_1000:.3g} for 1,000"
    slowest = "" if each.slowest_s != each.slowest_s else f"; the slowest took {each.slowest_s:.2g} s"
    return f"{each.seconds_per_1000:.3g} s for 1,000 answers{cost}{slowest}."


def _twice(each: Graded) -> list[str]:
    lines = []
    if each.again is not None:
        lines.append(f"Asked again in reverse order, {100 * each.again:.1f} % of its verdicts change.")
    if each.swap is not None and each.swap == each.swap:
        lines.append(f"With answer and gold exchanged, {100 * each.swap:.1f} % of its verdicts change.")
    return lines


def compared(pair: Pairwise) -> str:
    """Two graders in a sentence."""
    said = f"{pair.a} and {pair.b} agree on {_share(pair.agree)} of {pair.agree.of} answers (κ {_kappa(pair.kappa)})"
    if not pair.only_a + pair.only_b:
        return said + "."
    said += f"; only {pair.a} passes {pair.only_a}, only {pair.b} {pair.only_b}"
    if pair.a_right is not None and pair.p is not None:
        said += f"; where they differ {pair.a} is right {pair.a_right} times, {pair.b} {pair.b_right} (p {pair.p:.2g})"
    return f"{said}. First lines: {', '.join(map(str, pair.rows))}."


def _head(report: Report) -> str:
    pairs = report.pairs
    columns = ", ".join(f"{role} = {column!r}" for role, column in pairs.columns.items())
    labelled = f"{pairs.labelled:,} labelled" if pairs.labelled else "no labels"
    lines = [f"{pairs.name}: {len(pairs.rows):,} answers, {labelled}; columns {columns}"]
    if pairs.left_out:
        number, why = next(iter(pairs.left_out.items()))
        lines.append(f"{len(pairs.left_out)} rows could not be read and are left out; row {number}: {why}.")
    if not pairs.labelled and "correct" in pairs.rows[0].prompt.data:
        lines.append("The column 'correct' is what a reward said; --label correct takes it for the truth all the same.")
    return "\n".join(lines)


def _in_100(share: Rate) -> str:
    return f"{100 * share.mean:.2g} in 100 (95 %: {100 * share.low:.2g} to {100 * share.high:.2g})" if share.of else "none"


def _share(share: Rate) -> str:
    return f"{100 * share.mean:.1f} % ({100 * share.low:.1f}–{100 * share.high:.1f})" if share.of else "unknown"


def _number(value: Interval) -> str:
    return f"{_kappa(value.mean)} ({value.low:.2f}–{value.high:.2f})"


def _kappa(value: float) -> str:
    return "undefined" if value != value else f"{value:.2f}"


def _times(value: float) -> str:
    return "infinitely" if math.isinf(value) else f"{value:,.0f} ×" if value >= 10 else f"{value:.2f} ×"
