"""Certificates in plain words: sentences, tables, and docs/claims.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from keel.audit.certificate import Certificate
from keel.audit.facts import Fact
from keel.audit.identify import Identity
from keel.audit.orders import Order
from keel.audit.side_by_side import Comparison
from keel.audit.whole import Audit
from keel.exact.truths import TRUTHS, parse

NAMES = {
    "J": "the expected reward",
    "J_graded": "the grader's expected verdict",
    "J_group_std": "the expected reward, each prompt times c_G(p)",
    "arcsine": "2·arcsin √p of each prompt",
    "reverse_kl": "the reverse KL",
    "forward_kl": "the forward KL",
    "reverse_kl_positions": "the per-position reverse KL",
    "forward_kl_positions": "the per-position forward KL",
    "reverse_kl_prefixes": "the reverse KLs of prefixes, summed",
    "entropy": "the entropy of completions",
    "entropy_positions": "the per-position entropy",
    "length": "the length",
}


def truth_in_words(expression: str) -> str:
    """ "J - 0.05 reverse_kl" → "follows the expected reward − 0.05 × the reverse KL"; "-reverse_kl" → "descends the reverse KL"."""
    terms = parse(expression)
    down = bool(terms) and all(coefficient < 0 for coefficient, _ in terms)
    parts = []
    for place, (coefficient, name) in enumerate(terms):
        coefficient = -coefficient if down else coefficient
        sign = "−" if coefficient < 0 else "+" if place else ""
        size = "" if abs(coefficient) == 1 else f"{abs(coefficient):g} × "
        parts.append(f"{sign}{' ' if sign else ''}{size}{NAMES[name]}")
    return f"{'descends' if down else 'follows'} {' '.join(parts)}"


def condition_words(certificate: Certificate) -> str:
    """The conditions of a claim in a few words."""
    conditions = certificate.claim.conditions
    tokens = {1: ["one token"], 2: ["two tokens"]}
    words = tokens.get(conditions.get("max_tokens"), [])
    words += [text for name, text in _CONDITIONS.items() if name in conditions for text in [text(conditions[name])] if text]
    off = {"drift", "gap", "top_p"} & set(conditions)
    return ", ".join(words if off else ["on-policy", *words])


_CONDITIONS = {
    "drift": lambda v: f"stale by {v} a logit",
    "gap": lambda v: f"engine gap {v} a logit",
    "top_p": lambda v: f"top-p {v}",
    "replay_mask": lambda v: "its mask replayed" if v else "",
    "reward": lambda v: {"zero": "no reward", "coin": "reward by a coin", "real": "any reward"}.get(v, ""),
    "prompts": lambda v: "one prompt" if v == 1 else f"{v} prompts",
    "group_size": lambda v: f"G {v}",
    "ref": lambda v: f"reference at {v} a logit",
    "tpr": lambda v: f"TPR {v}",
    "fpr": lambda v: f"FPR {v}",
    "favours_long": lambda v: "long wrong answers accepted more often",
    "policy": lambda v: "mixture of experts" if v == "moe" else "",
    "live_only": lambda v: "dead groups drawn again" if v else "",
}


def verdict(certificate: Certificate) -> str:
    """What the claim says and what was found, in one sentence without its subject."""
    said = _said(certificate)
    worst = certificate.worst
    if not certificate.holds:
        return f"{said}: NO, off by {_share(worst.relative_bias)}{_cosine(worst.cosine)}"
    if certificate.claim.says == "biased":
        return f"{said}: up to {_share(worst.relative_bias)} left over{_cosine(worst.cosine)}"
    return said


def _said(certificate: Certificate) -> str:
    claim = certificate.claim
    if claim.truth == "0":
        return "expects no update" if claim.says == "zero" else "expects an update where it should expect none"
    if claim.says == "mixture":
        return f"follows a mix of {' and '.join(NAMES[name] for _, name in parse(claim.truth))}"
    truth = truth_in_words(claim.truth)
    if claim.says == "biased":
        return truth.replace("follows", "does not follow", 1).replace("descends", "does not descend", 1)
    return f"{truth} " + {"unbiased": "exactly", "scaled": f"times {claim.factor}" if claim.factor else "up to a scale"}[claim.says]


def certificate_lines(certificates: Sequence[Certificate]) -> list[str]:
    """One line each: ✓ or ✗, who, what, when, and why."""
    width = max(len(c.objective) for c in certificates)
    lines = []
    for c in certificates:
        because = f" — {c.claim.because}" if c.claim.because else ""
        lines.append(f"{'✓' if c.holds else '✗'} {c.objective:<{width}}  {verdict(c)} [{condition_words(c)}]{because}")
    return lines


def fact_lines(facts: Iterable[Fact]) -> list[str]:
    """One line each, with the number found and the number expected."""
    return [
        f"{'✓' if f.holds else '✗'} {f.about}: {f.says} {_number(f.measured)} ({f.relation} {_number(f.expected)})" for f in facts
    ]


def audit_text(audit: Audit) -> str:
    """Everything, a table a family, and the two questions of the field that it answers."""
    parts = [_heading(family) + "\n" + "\n".join(certificate_lines(found)) for family, found in audit.families.items()]
    parts.append(_heading("numbers") + "\n" + "\n".join(fact_lines(audit.facts)))
    parts.append(_heading("answers") + "\n" + "\n".join(answers(audit)))
    bad = [c.objective for c in audit.certificates if not c.holds] + [f.about for f in audit.facts if not f.holds]
    count = len(audit.certificates) + len(audit.facts)
    end = f"{count} certificates, all hold." if not bad else f"{count} certificates; {len(bad)} do not hold: {', '.join(bad)}."
    return "\n\n".join([*parts, end])


def answers(audit: Audit) -> list[str]:
    """One line for each question of the field that enumeration settles."""
    clip = next(f for f in audit.facts if "one update a batch: clip" in f.says)
    k3 = {
        c.claim.truth: c
        for c in audit.families["KL"]
        if c.objective == "k3_in_loss" and not c.claim.conditions.get("max_tokens") == 1
    }
    reverse = k3["-reverse_kl"].worst
    return [
        f"Does the clip range matter with one update a batch? No: gradients at .2/.2, .2/.28, 3e-4 and unclipped differ by "
        f"{_number(clip.measured)}, bit for bit; it matters once data are stale, or when π/μ is clipped under an engine gap.",
        f"Is k3 in the loss the forward KL? Per token it is the per-position forward KL exactly, not the forward KL of "
        f"completions (up to {_share(k3['-forward_kl'].worst.relative_bias)} left over), and not the reverse KL (up to "
        f"{_share(reverse.relative_bias)} left over, cosine {reverse.cosine:.2f}).",
    ]


def spoken(audit: Audit, name: str) -> str:
    """What was found of one recipe or estimator, in a sentence; "" where there is none of that name.

    What holds for completions of one token only, or for a reward by a coin, is left to the tables.
    """
    narrow = [c.claim.conditions.get("max_tokens") == 1 or c.claim.conditions.get("reward") == "coin" for c in audit.certificates]
    mine = [c for c, special in zip(audit.certificates, narrow, strict=True) if c.objective == name and not special]
    found = [f"{verdict(c)} ({condition_words(c)})" for c in mine]
    found += [
        f"{fact.says}: {_number(fact.measured)} ({fact.relation} {_number(fact.expected)}{'' if fact.holds else ': NO'})"
        for fact in audit.facts
        if fact.about == name
    ]
    return "; ".join(found)


def one_text(title: str, certificates: Sequence[Certificate], identity: Identity) -> str:
    """One recipe, estimator or function: what it follows, and its claims."""
    lines = [title, "", f"follows: {identity.text()}", *comparison_lines(identity)]
    return "\n".join([*lines, *(["", *certificate_lines(certificates)] if certificates else [])])


def compared_text(a: str, b: str, rows: Sequence[tuple[str, Comparison]]) -> str:
    """Two estimators side by side, world by world."""
    head = f"{'':<34} {'cosine':>7} {'scale':>7} {'bias of a':>10} {'variance a/b':>13} {'signal/noise a':>15} {'b':>6}"
    lines = [f"a = {a}, b = {b}; bias: ‖E[a] − E[b]‖/‖E[b]‖ as they are", head]
    for where, c in rows:
        lines.append(
            f"{where:<34} {c.cosine:>7.3f} {c.scale:>7.3f} {_share(c.relative):>10} {c.variance_ratio:>13.3f} "
            f"{c.signal_a:>15.3f} {c.signal_b:>6.3f}"
        )
    return "\n".join(lines)


def comparison_lines(identity: Identity) -> list[str]:
    """Cosine with every truth, the nearest first."""
    ordered = sorted(identity.compared.items(), key=lambda item: item[1][1])
    return [f"  {NAMES[name]:<47} cosine {cosine:+.3f}, {_share(left):>6} left over" for name, (cosine, left) in ordered]


def order_lines(found: Sequence[Order], shares: Mapping[int, Sequence[float]]) -> list[str]:
    """Orders of error, and how much of the gradient error the token ratio leaves at each length."""
    lines = ["importance ratio   objective's error   gradient's error   left at the largest δ   variance / on-policy"]
    for o in found:
        lines.append(f"{o.ratio:<18} {_order(o.objective):<19} {_order(o.gradient):<18} {_number(o.left):<23} {o.variance:.3f}")
    middle = {length: values[len(values) // 2] for length, values in shares.items()}
    lines.append(
        "token ratio, gradient error left by length, median of worlds: " + ", ".join(f"T={t}: {v:.2f}" for t, v in middle.items())
    )
    return lines


def claims_markdown(audit: Audit) -> str:
    """docs/claims.md."""
    parts = [_HEAD, "## In one line each\n", *(f"- {line}" for line in answers(audit))]
    for family, found in audit.families.items():
        rows = [
            (f"`{c.objective}`", verdict(c), condition_words(c), c.claim.because, "holds" if c.holds else "**does not hold**")
            for c in found
        ]
        parts += [f"\n## {family[:1].upper()}{family[1:]}\n", *table(("who", "what", "when", "why", ""), rows)]
    rows = [(f"`{f.about}`", f.says, f"{f.relation} {_number(f.expected)}", _number(f.measured)) for f in audit.facts]
    parts += ["\n## Numbers\n", *table(("about", "statement", "expected", "found"), rows)]
    parts += ["\n## Orders of error\n", _ORDERS, "```", *order_lines(audit.orders, audit.shares), "```\n"]
    return "\n".join(parts)


_HEAD = f"""# What each objective follows

Generated by `keel audit --markdown`; do not edit. Every line is recomputed whenever the tests run.

A claim says of which objective the expected update is the gradient. It is checked by enumeration: in small worlds (a few tokens,
one or two prompts, float64) every completion is known, so every group and every batch can be listed with its probability, and the
expectation of the loss's own gradient is a sum, not a sample. The loss is the code that trains. Each claim is judged in four random
worlds; equalities hold to 1e-10, and the truths' own gradients, by autograd, agree with finite differences to 1e-6. "Does not
follow" needs one world that shows it: the largest share of the update that no multiple of the truth explains is given.

Truths: {"; ".join(f"`{name}`, {NAMES[name]}" for name in TRUTHS)}.

A KL is between policy and reference: reverse is KL(π‖π_ref) of whole completions, forward KL(π_ref‖π); "per-position" sums
next-token KLs over prefixes and holds the law of prefixes fixed. The constant divisor of the solid baseline counts as 1. Where
nothing else is said: on-policy, no engine gap, a grader without errors, and a reward of 1 for the right first token, so that
correctness and length are two decisions.
"""

_ORDERS = """How a surrogate's error grows with the mismatch δ of the policy and the one that sampled (slopes in a log-log plot;
"exact" where the error is zero), with a reward that depends on every token. How much of the gradient's error a token ratio removes
depends on the world: less than half in the median, and in some worlds it adds to it.
"""


def _heading(text: str) -> str:
    return f"── {text} " + "─" * max(0, 96 - len(text))


def _share(x: float) -> str:
    return f"{x:.1e}" if x < 5e-4 else f"{x:.1%}"


def _cosine(x: float) -> str:
    return "" if math.isnan(x) else f", cosine {x:.2f}"


def _order(x: float) -> str:
    return "exact" if math.isnan(x) else f"order {x:.2f}"


def _number(x: float) -> str:
    return "0" if x == 0 else "< 1e-9" if abs(x) < 1e-9 else f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a | in a cell stays in it."""
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
