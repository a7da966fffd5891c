"""A measured gap in a short table and in sentences: the noise floor first, then what the figures mean and what would help."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from keel.gap.measure import Bin, Gap
from keel.gap.remedies import Remedy
from keel.gap.temperature import Fit

if TYPE_CHECKING:
    from keel.gap.command import Found

AT_FLOOR = 10.0  # an engine sums in another order than any of the trainer's own ways, so it may differ by some times theirs
HARMLESS = 1e-4  # nats: what fp32 engines reach
MASS = 1e-3  # a mean weight nearer to 1 than this is not worth a sentence
LEANS = 0.1  # from this far away from a half the share of gaps above 0 is called lopsided
EXPLAINED = 0.1  # share of the gap's variance from which its dependence on the probability is called a bias
USUAL = {"format": "fp32", "weight_bits": None, "head_format": None, "order": "fused", "router_noise": 0.0, "sync_every": 1}
WRECKED = 0.4  # share of ratios outside [.9, 1.1] from which nobody should ask whether it is noise
ONE_SIDED = 0.01  # share of ratios above 1.1 up to which a low mean ratio is a cut: a cut makes none
REPLAY_PAYS = 0.7  # share of k3 that is left with replay, from which on down it is recommended
MUCH = 0.9  # share of the sequence weights' effective samples from which whole-sequence corrections cost little


def told(found: Found) -> str:
    """Everything, for a terminal."""
    figures = [*_table(found), "", *_bins(found.gap), "", *_remedies(found.remedies)]
    return "\n".join([_head(found), "", *figures, "", *explained(found)])


def explained(found: Found) -> list[str]:
    """The sentences alone, each a line."""
    first = [_floor(found), _size(found)]
    if at_floor(found):
        return [*first, "Nothing has to be corrected. Ratios and weights between the two are 1 for every purpose."]
    sentences = [
        *first,
        _temperature(found),
        _mass(found),
        _noise(found),
        _where(found.gap),
        _routing(found),
        _sequences(found.gap),
        _advice(found),
    ]
    return [sentence for sentence in sentences if sentence]


def at_floor(found: Found) -> bool:
    """Whether engine and trainer agree as well as the trainer agrees with itself."""
    return found.gap.max_abs_nats <= max(AT_FLOOR * found.floor.max_abs_nats, HARMLESS)


def _head(found: Found) -> str:
    given = {**found.engine, **found.engine.get("numerics", {})}
    given |= {f"hidden {name}": value for name, value in found.engine.get("hidden", {}).items()}
    unusual = [f"{name} {value}" for name, value in given.items() if value != USUAL.get(name, None if "hidden " in name else value)]
    engine = ", ".join([str(found.engine.get("engine", "?")), *unusual])
    return (
        f"{found.model} · {found.task} · engine {engine}\n"
        f"{found.gap.completions:,} completions of the engine, {found.gap.tokens:,} tokens, {found.seconds:.1f} s"
    )


def _table(found: Found) -> list[str]:
    gap, floor, fit = found.gap, found.floor, found.fit
    rows = [
        ("KL(engine ‖ trainer), k3", f"{_n(gap.k3_nats)} nats/token", f"floor {_n(floor.k3_nats)}"),
        ("the same, k1", f"{_n(gap.k1_nats)} nats/token", f"95 % {_n(-gap.gap.high)} … {_n(-gap.gap.low)}"),
        ("largest |gap|", f"{_n(gap.max_abs_nats)} nats", f"floor {_n(floor.max_abs_nats)}"),
        ("χ²", _n(gap.chi2), ""),
        ("ratio outside [.9, 1.1]", f"{_share(gap.outside_frac)} of tokens", ""),
        ("mean ratio", f"{gap.weight.mean:.5f}", f"95 % {gap.weight.low:.5f} … {gap.weight.high:.5f}"),
        ("gaps above 0", _share(gap.positive.mean), f"95 % {_share(gap.positive.low)} … {_share(gap.positive.high)}"),
        ("explained by the probability", f"{_share(gap.explained_frac)} of variance", "noise: 0 %"),
        ("correlation of probabilities", f"{gap.pearson:.6f}", ""),
        ("effective share", f"{_share(gap.ess_frac)} of tokens", f"{_share(gap.sequence_ess_frac)} of completions"),
        ("log weight of a completion", f"{_n(gap.sequence_min_nats)} … {_n(gap.sequence_max_nats)} nats", ""),
        (
            "best-fit temperature",
            f"× {fit.squared:.3f} as reported",
            f"× {fit.likelihood:.2f} as drawn, 95 % {fit.likelihood_low:.2f} … {fit.likelihood_high:.2f}",
        ),
    ]
    if found.routing is not None:
        moe = found.routing
        rows += [
            (
                "experts that differ",
                f"{_share(moe.layers_differ_frac)} of layers",
                f"{_share(moe.tokens_differ_frac)} of tokens in any",
            ),
            (
                "k3 with the engine's experts",
                f"{_n(moe.replayed_k3_nats)} nats/token",
                f"largest |gap| {_n(moe.replayed_max_abs_nats)}",
            ),
            ("load of the busiest expert", f"× {moe.load_max:.2f}", f"{_share(moe.idle_frac)} of experts idle"),
        ]
    width, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return [f"{name:<{width}}  {value:<{second}}  {note}".rstrip() for name, value, note in rows]


def _bins(gap: Gap) -> list[str]:
    lines = [f"{'tokens by':<13} {'':<9} {'share':>7} {'mean gap':>10} {'k3':>9} {'largest':>9} {'of all k3':>10}"]
    for kind, bins in gap.bins.items():
        lines += [_row(kind if number == 0 else "", each) for number, each in enumerate(bins)]
    return lines


def _row(kind: str, each: Bin) -> str:
    numbers = f"{_n(each.mean_nats):>10} {_n(each.k3_nats):>9} {_n(each.max_abs_nats):>9} {_share(each.k3_share):>10}"
    return f"{kind:<13} {each.where:<9} {_share(each.share):>7} {numbers}"


def _remedies(remedies: list[Remedy]) -> list[str]:
    head = f"{'correction':<18} {'tokens kept':>12} {'completions':>12} {'capped':>8} {'mean weight':>12}"
    return [
        head,
        *(
            f"{r.name:<18} {_share(r.kept_frac):>12} {_share(r.kept_completions_frac):>12} {_share(r.capped_frac):>8}"
            f" {r.weight_mean:>12.4f}"
            for r in remedies
        ),
    ]


def _floor(found: Found) -> str:
    ways = ", ".join(f"{name} {_n(value)}" for name, value in found.floor.by.items())
    return f"Noise floor: the trainer against itself differs by at most {_n(found.floor.max_abs_nats)} nats ({ways})."


def _size(found: Found) -> str:
    largest, floor = found.gap.max_abs_nats, found.floor.max_abs_nats
    if at_floor(found):
        return f"The engine differs from it by at most {_n(largest)} nats: the two compute the same, up to rounding in fp32."
    times = f", {largest / floor:,.0f} times the floor" if floor > 0 else ""
    return (
        f"The engine differs from it by up to {_n(largest)} nats{times}: not the order of sums in fp32, but another arithmetic, "
        "other weights, or another distribution."
    )


def _temperature(found: Found) -> str:
    fit, taken = found.fit, _share(_taken(found.fit))
    if not fit.misreported:
        return f"Temperature: no fault. The best fit is × {fit.squared:.3f}, which takes {taken} of the mean square gap away."
    said = f"Temperature fault: at × {fit.squared:.2f} of the trainer's temperature {taken} of the mean square gap is gone. "
    if fit.misdrawn:
        return said + (
            "The tokens themselves are likeliest there too: the engine draws at another temperature than the trainer divides by. "
            "Send the same one to both."
        )
    if fit.misdrawn is None:
        return said + "Whether the tokens were drawn at it too, or only reported, these are too few to say: raise --samples."
    return said + (
        f"But the tokens themselves are likeliest at × {fit.likelihood:.2f}: they were drawn as asked, and only their reported "
        "log-probabilities are raw ones, from before the temperature. Ask the engine for processed log-probabilities."
    )


def _mass(found: Found) -> str:
    weight = found.gap.weight
    if not _biased(found.gap) or found.fit.misreported:
        return ""
    said = f"Mass: the mean ratio is {weight.mean:.4f}, and rounding alone leaves it at 1. "
    if weight.mean > 1:
        return said + "The engine reports less than it draws with: its log-probabilities are not those of its tokens' distribution."
    return said + (
        f"The engine never draws from {_share(1 - weight.mean)} of the trainer's probability: it cuts off (top-p, top-k, min-p) "
        "and the trainer does not know. Replay the kept tokens, or switch truncation off."
    )


def _biased(gap: Gap) -> bool:
    """Whether the mean ratio is off, beyond doubt. One below 1 may hang on high ratios too rare to be drawn; but then some are."""
    off = gap.weight.excludes(1.0) and abs(gap.weight.mean - 1.0) >= MASS
    return off and (gap.weight.mean > 1 or gap.above_frac < ONE_SIDED)


def _noise(found: Found) -> str:
    gap = found.gap
    if gap.outside_frac > WRECKED:
        return (
            f"Wreck: {_share(gap.outside_frac)} of the ratios lie outside [.9, 1.1]. That is another policy, and not a rounded one."
        )
    lopsided = gap.positive.excludes(0.5) and abs(gap.positive.mean - 0.5) > LEANS
    above, explained = _share(gap.positive.mean), _share(gap.explained_frac)
    figures = f"{above} of the gaps are above 0, and a token's probability explains {explained} of their variance"
    if not lopsided and gap.explained_frac < EXPLAINED:
        return f"Noise: {figures}. So it is symmetric, as rounding is."
    fit = found.fit.squared
    shape = "flatter than" if fit > 1.01 else "sharper than" if fit < 0.99 else "neither flatter nor sharper than"
    return f"Bias: {figures} (noise: 50 % and 0 %). The engine's distribution is {shape} the trainer's."


def _where(gap: Gap) -> str:
    parts = []
    for kind in ("probability", "entropy"):
        if kind in gap.bins:
            top = max(gap.bins[kind], key=lambda each: each.k3_share)
            parts.append(f"{_share(top.k3_share)} of k3 from the {_share(top.share)} of tokens of {kind} {top.where}")
    said = f"Where: {'; '.join(parts)}."
    ends = [each for each in gap.bins["position"] if each.where in ("1", "last") and each.k3_nats > 10 * gap.k3_nats > 0]
    if ends:
        places = " and ".join("first" if each.where == "1" else "last" for each in ends)
        said += f" The {places} token stands out by {max(e.k3_nats for e in ends) / gap.k3_nats:.0f} ×: look for a shift by one."
    return said


def _routing(found: Found) -> str:
    moe, k3_nats = found.routing, found.gap.k3_nats
    if moe is None:
        return ""
    if moe.tokens_differ_frac == 0:
        return "Routing: engine and trainer send every token to the same experts, so replay would change nothing."
    left = moe.replayed_k3_nats / k3_nats
    verdict = "Replay of the engine's experts (R3) is worth its memory" if left < REPLAY_PAYS else "R3 would not help much"
    return (
        f"Routing: {_share(moe.tokens_differ_frac)} of the tokens go to other experts in some layer, and {_share(moe.k3_share)} of "
        f"k3 is theirs. With the engine's experts replayed {_share(left)} of k3 is left. {verdict}."
    )


def _sequences(gap: Gap) -> str:
    low, high = math.exp(min(gap.sequence_min_nats, 700)), math.exp(min(gap.sequence_max_nats, 700))
    cost = "little" if gap.sequence_ess_frac > MUCH else "much"
    return (
        f"Whole completions weigh between {low:.3g} and {high:.3g}; weighed so, {_share(gap.sequence_ess_frac)} of them count, so "
        f"corrections by the sequence cost {cost}."
    )


def _advice(found: Found) -> str:
    if found.fit.misreported or _biased(found.gap):
        return "Mend that first: corrections would hide the fault and not remove it."
    mild = [r.name for r in found.remedies if r.kept_frac > 0.99 and r.capped_frac < 0.01]
    harsh = [f"{r.name} ({_share(r.kept_frac)} kept)" for r in found.remedies if r.kept_frac < 0.9]
    said = f"Corrections that touch less than 1 % of the tokens: {', '.join(mild) or 'none'}."
    return said + (f" Those that throw away more than 10 %: {', '.join(harsh)}." if harsh else "")


def _taken(fit: Fit) -> float:
    return 1 - (fit.rms_best_nats / fit.rms_nats) ** 2 if fit.rms_nats > 0 else 0.0


def _n(value: float) -> str:
    return f"{value:.2g}" if 1e-2 <= abs(value) < 100 or value == 0 else f"{value:.1e}"


def _share(value: float) -> str:
    percent = 100 * value
    if 0 < percent < 0.1 or 99.9 < percent < 100:
        return "< 0.1 %" if percent < 50 else "> 99.9 %"
    return f"{percent:.1f} %" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f} %"
