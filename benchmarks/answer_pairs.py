"""Write the labelled set of answers: `python benchmarks/answer_pairs.py` → src/keel/rewards/answer/pairs.jsonl.

Each family draws values and writes one value in several forms (equal), and other values in the same forms (near misses). The label
is computed from the values, never from a grader. `answer_pairs_by_hand.jsonl` holds what no generator thinks of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

BY_HAND = Path(__file__).with_name("answer_pairs_by_hand.jsonl")
OUT = Path(__file__).parents[1] / "src/keel/rewards/answer/pairs.jsonl"
Row = tuple[str, str, bool]  # answer, gold, label
Family = Callable[[random.Random], Iterator[Row]]


def _commas(n: int) -> str:
    return f"{n:,}"


def integers(rng: random.Random) -> Iterator[Row]:
    n = rng.choice([rng.randint(1000, 9_999_999), -rng.randint(2, 999), rng.randint(2, 99)])
    forms = [str(n), _commas(n), f"${n}$", f"\\boxed{{{n}}}", f"{n}.0", f"{n}.", _commas(n).replace(",", "{,}"), f"\\({n}\\)"]
    yield rng.choice(forms[1:]), str(n), True
    yield str(n), rng.choice(forms[1:]), True
    yield rng.choice(forms[:5]).replace("-", "−"), _commas(n), True
    for other in (n + rng.choice([-1, 1]), -n, n * 10):
        yield rng.choice([str(other), _commas(other), f"${other}$"]), rng.choice(forms), False


def decimals(rng: random.Random) -> Iterator[Row]:
    cents = rng.randint(101, 99_999)
    x = Fraction(cents, 100)
    text = f"{cents / 100:.2f}"
    yield text + "0", text, True
    yield f"{x.numerator}/{x.denominator}", text, True
    yield f"\\frac{{{x.numerator}}}{{{x.denominator}}}", text, True
    yield f"{float(x):.4e}" if cents < 100_000 else text, text, True
    small = rng.randint(1, 9)
    yield f"{small} \\times 10^{{-3}}", f"0.00{small}", True
    yield f".00{small}", f"0.00{small}", True
    yield f"{(cents + 1) / 100:.2f}", text, False
    yield f"{cents / 1000:.3f}", text, False
    yield text.replace(".", ""), text, False


def fractions(rng: random.Random) -> Iterator[Row]:
    x = Fraction(rng.randint(1, 40), rng.choice([3, 6, 7, 9, 11, 12, 13, 15]))
    while x.denominator == 1:
        x = Fraction(rng.randint(1, 40), 7)
    p, q, k, sign = x.numerator, x.denominator, rng.randint(2, 6), rng.choice(["", "-"])
    forms = [
        f"{sign}{p}/{q}",
        f"{sign}\\frac{{{p}}}{{{q}}}",
        f"{sign}\\dfrac{{{p * k}}}{{{q * k}}}",
        f"{sign}\\tfrac{{{p}}}{{{q}}}",
    ]
    forms += [f"${sign}\\frac{{{p}}}{{{q}}}$", f"\\frac{{{sign}{p}}}{{{q}}}", f"{sign}{p * k} / {q * k}"]
    a, b = rng.sample(forms, 2)
    yield a, b, True
    yield b, forms[1], True
    whole, rest = divmod(p, q)
    if whole and not sign:
        yield f"{whole}\\frac{{{rest}}}{{{q}}}", forms[1], True
        yield f"{whole} {rest}/{q}", forms[0], True
    yield f"{sign}{p + 1}/{q}", rng.choice(forms), False
    yield f"{sign}\\frac{{{q}}}{{{p}}}", rng.choice(forms), False
    rounded = f"{float(x):.3f}"
    yield f"{sign}{rounded}", rng.choice(forms), Fraction(rounded) == x
    yield rng.choice([f"{sign}{p}{q}", f"{sign}{p}", f"{sign}\\frac{{{p}}}{{{q + 1}}}"]), rng.choice(forms), False


def percents(rng: random.Random) -> Iterator[Row]:
    n = rng.randint(3, 97)
    x = Fraction(n, 100)
    gold = rng.choice([f"{n}%", f"{n}\\%"])
    yield f"{n / 100}", gold, True
    yield f"{x.numerator}/{x.denominator}", gold, True
    yield rng.choice([f"{n} %", f"{n}.0\\%", f"${n}\\%$", f"{n} percent"]), gold, True
    yield f"{n + 1}%", gold, False
    yield f"{n / 10}%", gold, False
    yield f"{n / 1000}", gold, False


UNITS = [("cm", "\\text{ cm}", "m"), ("km", "\\text{km}", "kg"), ("kg", "\\mathrm{kg}", "g"), ("hours",
"\\text{ hours}", "minutes"),
         ("m^2", "\\text{ m}^2", "m^3"), ("dollars", "\\text{ dollars}", "cents"), ("mph", "\\text{ mph}", "km/h")]  # fmt: skip


def units(rng: random.Random) -> Iterator[Row]:
    n, (plain, latex, other) = rng.randint(2, 400), rng.choice(UNITS)
    yield f"{n} {plain}", str(n), True
    yield f"{n}{latex}", f"{n} {plain}", True
    yield str(n), f"{n}{latex}", True
    yield rng.choice([f"\\${n}", f"${n}$ dollars", f"{n} USD"]), f"{n} dollars", True
    yield f"{n}^\\circ", rng.choice([f"{n} degrees", f"{n}°", str(n)]), True
    yield f"{n} {other}", f"{n} {plain}", False
    yield f"{n + 1} {plain}", f"{n} {plain}", False
    yield f"{n + 3}^\\circ", f"{n}^\\circ", False


def radicals(rng: random.Random) -> Iterator[Row]:
    r, k, a = rng.choice([2, 3, 5, 6, 7, 10]), rng.randint(2, 9), rng.randint(1, 9)
    gold = f"{k}\\sqrt{{{r}}}"
    yield f"\\sqrt{{{k * k * r}}}", gold, True
    yield rng.choice([f"{k}*sqrt({r})", f"\\sqrt{{{r}}}\\cdot {k}", f"{k}√{r}", f"{k}\\sqrt {r}"]), gold, True
    yield f"\\frac{{{k * r}}}{{\\sqrt{{{r}}}}}", gold, True
    yield f"{a}+{gold}", f"{gold} + {a}", True
    yield f"\\frac{{1}}{{\\sqrt{{{r}}}}}", f"\\frac{{\\sqrt{{{r}}}}}{{{r}}}", True
    yield f"{k}\\sqrt[3]{{{r}}}", f"\\sqrt[3]{{{k**3 * r}}}", True
    yield f"{k}\\sqrt{{{r + 1}}}", gold, False
    yield f"{k + 1}\\sqrt{{{r}}}", gold, False
    yield f"\\sqrt{{{k * r}}}" if k != 1 else "7", gold, False
    yield f"{(k * k * r) ** 0.5:.4f}", gold, False
    yield f"{a}-{gold}", f"{a}+{gold}", False
    yield rng.choice([str(k), f"{k}\\sqrt({r})x", f"{k}\\sqrt[3]{{{r}}}"]), gold, False


def constants(rng: random.Random) -> Iterator[Row]:
    k, d = rng.randint(2, 30), rng.choice([3, 4, 7])
    yield f"{k}π", f"{k}\\pi", True
    yield f"{k}*pi", f"{k}\\pi", True
    yield f"\\frac{{{k}\\pi}}{{{d}}}", f"\\frac{{{k}}}{{{d}}}\\pi", True
    yield f"\\ln {k * k}", f"2\\ln {k}", True
    yield f"e^{{{k}}} - 1", f"-1+e^{k}" if k < 10 else f"-1+e^{{{k}}}", True
    yield f"\\log_2 {2**d}", str(d), True
    yield f"{k}", f"{k}\\pi", False
    yield f"{k * 3.14:.2f}", f"{k}\\pi", False
    yield f"e^{{{k + 1}}} - 1", f"e^{{{k}}} - 1", False
    yield f"\\ln {k + 1}", f"\\ln {k}", False


def sets(rng: random.Random) -> Iterator[Row]:
    values = rng.sample(range(-9, 20), rng.randint(2, 4))
    mixed = rng.sample(values, len(values))
    written = ", ".join(map(str, values))
    gold = f"\\{{{written}\\}}"
    yield f"\\{{{', '.join(map(str, mixed))}\\}}", gold, True
    yield f"\\left\\{{{','.join(map(str, mixed))}\\right\\}}", gold, True
    yield ", ".join(map(str, mixed)), gold, True
    yield f"x = {' or x = '.join(map(str, mixed))}", gold, True
    yield " and ".join([", ".join(map(str, mixed[:-1])), str(mixed[-1])]), written, True
    yield f"\\{{{', '.join(map(str, values[:-1]))}\\}}", gold, False
    yield f"\\{{{', '.join(map(str, [*values, 33]))}\\}}", gold, False
    yield f"\\{{{', '.join(map(str, [*values[:-1], values[-1] + 40]))}\\}}", gold, False
    yield f"({written})", gold, False
    yield str(values[0]), gold, False


def tuples(rng: random.Random) -> Iterator[Row]:
    a, b, c = rng.sample(range(-9, 12), 3)
    x = Fraction(a, 7)
    gold = f"({a}, {b}, {c})"
    yield f"\\left({a},{b},{c}\\right)", gold, True
    yield f"$({a},\\ {b},\\ {c})$", gold, True
    yield f"({a}/7, {b}.0)", f"\\left(\\frac{{{a}}}{{7}}, {b}\\right)", True
    yield f"({a},{b})", f"\\left( {a}, {b} \\right)", True
    yield f"({b}, {a}, {c})", gold, False
    yield f"({a}, {b})", gold, False
    yield f"({a}, {b}, {c + 1})", gold, False
    yield f"\\{{{a}, {b}, {c}\\}}", gold, False
    yield f"({float(x):.2f}, {b})", f"(\\frac{{{a}}}{{7}}, {b})" if x.denominator > 1 else "(1/7, 2)", False


def intervals(rng: random.Random) -> Iterator[Row]:
    a = rng.randint(-9, 8)
    b = a + rng.randint(1, 9)
    gold = f"[{a}, {b})"
    yield f"\\left[{a},{b}\\right)", gold, True
    yield f"{a} \\le x < {b}", gold, True
    yield f"x \\in [{a}, {b})", gold, True
    yield f"(-\\infty, {a}) \\cup ({b}, \\infty)", f"({b},\\infty)\\cup(-\\infty,{a})", True
    yield f"x < {a} or x > {b}", f"(-\\infty, {a}) \\cup ({b}, \\infty)", True
    yield f"(-oo, {a}]", f"\\left(-\\infty, {a}\\right]", True
    yield f"({a}, {b})", gold, False
    yield f"[{a}, {b}]", gold, False
    yield f"[{a}, {b + 1})", gold, False
    yield f"{a}, {b}", gold, False
    yield f"(-\\infty, {a}] \\cup ({b}, \\infty)", f"(-\\infty, {a}) \\cup ({b}, \\infty)", False
    yield f"({a}, \\infty)", f"(-\\infty, {a})", False


def inequalities(rng: random.Random) -> Iterator[Row]:
    a, k = rng.randint(-9, 9), rng.randint(2, 6)
    yield f"{a} < x", f"x > {a}", True
    yield f"x ≥ {a}", f"x \\geq {a}", True
    yield f"{k}x > {k * a}", f"x > {a}", True
    yield f"x >= {a}", f"[{a}, \\infty)", True
    yield f"-x < {-a}", f"x > {a}", True
    yield f"x < {a}", f"x > {a}", False
    yield f"x \\geq {a}", f"x > {a}", False
    yield f"x > {a + 1}", f"x > {a}", False
    yield f"y > {a}", f"x > {a}", False
    yield f"{a}", f"x > {a}", False


def matrices(rng: random.Random) -> Iterator[Row]:
    a, b, c, d = (rng.randint(-5, 9) for _ in range(4))
    b = c + 1
    body = f"{a} & {b} \\\\ {c} & {d}"
    gold = f"\\begin{{pmatrix}} {body} \\end{{pmatrix}}"
    yield f"\\begin{{bmatrix}}{body}\\end{{bmatrix}}", gold, True
    yield f"\\left[\\begin{{array}}{{cc}}{body}\\end{{array}}\\right]", gold, True
    yield f"\\begin{{pmatrix}}{a}&{b}\\\\{c}&{2 * d}/2\\end{{pmatrix}}", gold, True
    yield f"[[{a}, {b}], [{c}, {d}]]", gold, True
    yield f"\\begin{{pmatrix}} {a} & {c} \\\\ {b} & {d} \\end{{pmatrix}}", gold, False
    yield f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d + 1} \\end{{pmatrix}}", gold, False
    yield f"\\begin{{pmatrix}} {a} & {b} & {c} & {d} \\end{{pmatrix}}", gold, False
    yield f"{a}, {b}, {c}, {d}", gold, False


def equations(rng: random.Random) -> Iterator[Row]:
    m, b = rng.randint(2, 9), rng.randint(1, 9)
    gold = f"y = {m}x + {b}"
    yield f"y={b}+{m}x", gold, True
    yield f"{m}x - y + {b} = 0", gold, True
    yield f"{m}x+{b}", gold, True
    yield f"2y = {2 * m}x + {2 * b}", gold, True
    yield f"x = {m}", str(m), True
    yield f"{m}", f"x = {m}", True
    yield f"x^2 + y^2 = {m * m}", f"x^2+y^2-{m * m}=0", True
    yield f"y = {m}x - {b}", gold, False
    yield f"y = {b}x + {m}" if b != m else "y = x", gold, False
    yield f"y = {m}", gold, False
    yield f"2x+1={m}", str(m), False
    yield f"y = {m}", f"x = {m}", False
    yield f"x^2 + y^2 = {m}", f"x^2+y^2={m * m}", False


def expressions(rng: random.Random) -> Iterator[Row]:
    a, b, k = rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 6)
    gold = f"x^2 + {a + b}x + {a * b}"
    yield f"(x+{a})(x+{b})", gold, True
    yield f"{a * b} + {a + b}*x + x**2", gold, True
    yield f"x^{{2}}+{a + b}x+{a * b}", gold, True
    yield f"\\frac{{{k}x}}{{{2 * k}}}", "\\frac{x}{2}", True
    yield f"{k}(a - b)", f"{k}a-{k}b", True
    yield "2\\sin x\\cos x", "\\sin(2x)", True
    yield f"x^{{{k}}} \\cdot x", f"x^{{{k + 1}}}", True
    yield f"(x+{a})(x-{b})", gold, False
    yield f"x^2 + {a + b}x + {a * b + 1}", gold, False
    yield f"y^2 + {a + b}y + {a * b}", gold, False
    yield f"x^{{{k}}}", f"{k}x", False
    yield f"{k}a + {k}b", f"{k}a-{k}b", False


def complexes(rng: random.Random) -> Iterator[Row]:
    a, b = rng.randint(1, 9), rng.randint(2, 9)
    yield f"{b}i+{a}", f"{a}+{b}i", True
    yield f"{a} + {b}\\mathrm{{i}}", f"{a}+{b}i", True
    yield f"({a}+{b}i)^2", f"{a * a - b * b}+{2 * a * b}i", True
    yield f"{a}-{b}i", f"{a}+{b}i", False
    yield f"{a}+{b + 1}i", f"{a}+{b}i", False
    yield f"{a + b}", f"{a}+{b}i", False


def choices(rng: random.Random) -> Iterator[Row]:
    right, wrong = rng.sample("ABCDE", 2)
    yield rng.choice([f"({right})", f"{right}.", f"\\text{{{right}}}", f"\\textbf{{({right})}}", f"Option {right}"]), right, True
    yield rng.choice([f"**{right}**", f"{right.lower()}", f"({right})", f"\\boxed{{\\text{{({right})}}}}"]), f"({right})", True
    yield rng.choice([f"{right}) 12", f"({right}) the third one", f"{right}. Paris"]), right, True
    yield rng.choice([wrong, f"({wrong})", f"{wrong}."]), right, False
    yield rng.choice([f"{right} or {wrong}", f"{wrong}, {right}", f"{right}{wrong}", f"not {right}"]), right, False


WORDS = ["Paris", "a right triangle", "Monday", "New York", "blue whale", "even", "increasing", "Marie Curie", "yes", "false"]


def texts(rng: random.Random) -> Iterator[Row]:
    right, wrong = rng.sample(WORDS, 2)
    yield rng.choice([right.lower(), right.upper(), f"{right}.", f" {right} ", f"**{right}**"]), right, True
    yield rng.choice([f"\\text{{{right}}}", f'"{right}"', f"\\boxed{{\\text{{{right}}}}}"]), right, True
    yield wrong, right, False
    yield rng.choice([f"not {right}", f"{right} or {wrong}", f"{right[:-1]}", f"{wrong} {right}"]), right, False


def completions(rng: random.Random) -> Iterator[Row]:
    n, m = rng.sample(range(2, 400), 2)
    yield f"We add and get {m}, then\n\nThe answer is {n}.", str(n), True
    yield f"So 3 + {m} = {m + 3}.\n\n**Answer:** {n}", str(n), True
    yield f"<think>maybe {m}</think>\n<answer>{n}</answer>", str(n), True
    yield f"Thus \\[\\boxed{{\\frac{{{n}}}{{7}}}}.\\]", f"{n}/7", True
    yield f"First I found \\boxed{{{m}}}. But that forgot the sign of the second term, so it is \\boxed{{{n}}}.", str(n), True
    yield f"Step 1: {n}\nStep 2: {m}\nThe final answer is ${m}$.", str(n), False
    yield f"so \\boxed{{{n}}} and then \\boxed{{", str(n), False
    yield f"\\boxed{{{n}}} or \\boxed{{{m}}}", str(n), False
    yield f"It might be {n}, but I cannot tell.", str(n), False


FAMILIES: dict[str, tuple[Family, int]] = {
    "integer": (integers, 9), "decimal": (decimals, 6), "fraction": (fractions, 8), "percent": (percents, 5), "unit": (units, 6),
    "radical": (radicals, 5), "constant": (constants, 4), "set": (sets, 5), "tuple": (tuples, 5), "interval": (intervals, 5),
    "inequality": (inequalities, 4), "matrix": (matrices, 4), "equation": (equations, 5), "expression": (expressions, 4),
    "complex": (complexes, 4), "choice": (choices, 7), "text": (texts, 7), "completion": (completions, 5),
}  # fmt: skip


def build(seed: int = 5) -> list[dict[str, object]]:
    """All rows, each once: generated by family, then those by hand."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for kind, (family, times) in FAMILIES.items():
        rng = random.Random(f"{seed} {kind}")
        for _ in range(times):
            for answer, gold, label in family(rng):
                row = {"answer": answer, "gold": gold, "label": label, "class": "equal" if label else "near_miss", "kind": kind}
                rows.setdefault((answer, gold), row)
    for line in BY_HAND.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["answer"], row["gold"]] = row
    return list(rows.values())


def main() -> None:
    rows = build()
    OUT.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs in {OUT.name}")


if __name__ == "__main__":
    main()
