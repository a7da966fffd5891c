"""One spelling for the many ways of writing the same characters: wrappers, LaTeX dress, typographic signs."""

from __future__ import annotations

import re

from keel.rewards.answer.errors import Unreadable

LONGEST = 4000  # characters of an answer; a longer one is not read
_BAD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\ud800-\udfff\ue000-\uf8ff\U000e0000-\U0010ffff]"
)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_GREEK = dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split(), strict=True))  # fmt: skip
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "∙": "*", "⋅": "*", "•": "*", "÷": "/",
    "∕": "/", "⁄": "/",
    "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "∞": "\\infty ", "π": "\\pi ", "√": "\\sqrt ",
    "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "±": "\\pm ", "∓": "\\mp ", "º": "°",
    "˚": "°", "⟨": "\\langle ",
    "⟩": "\\rangle ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "，": ",", "（": "(", "）": ")", "；": ";",
    "：": ":", "％": "%",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u3000": " ", "∖": "\\setminus ", "≈": "\\approx ",
}  # fmt: skip
_SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
_UPPER, _LOWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
"⅘": "4/5", "⅙": "1/6", "⅚": "5/6",
           "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅐": "1/7", "⅑": "1/9", "⅒": "1/10"}  # fmt: skip
_TABLE = str.maketrans(
    _SIGNS
    | {k: f"\\{v} " for k, v in _GREEK.items()}
    | {k: f"\\frac{{{v.split('/')[0]}}}{{{v.split('/')[1]}}}" for k, v in _VULGAR.items()}
)

_WRAPPERS = (  # what stands around a whole answer: opening, closing
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("__", "__"),
)  # fmt: skip
_TRAILING = re.compile(r"(?<!\\right)(?<![.,;:!?\s])\s*[.]$")
_TRAILING_SPACE = re.compile(r"(?:(?<!\\)\\[ ,;:!]?|~|\s)+$")
_LEADING_EQUALS = re.compile(r"^=\s*(?=[^=\s])")
_INLINE = re.compile(r"(?<!\\)\\[()]")
_PROBABILITY = re.compile(r"^(Pr|E|Var|[A-Za-z])(\^\{-1\}|'*)\s*\(([^()]*)\)\s*=(?=[^=])")
_DERIVATIVE = re.compile(r"^\\frac\{d([a-z])\}\{d([a-z])\}\s*=(?=[^=])")
_LENGTH = re.compile(
    r"^(?:m?\\angle\s*|\\overline\s*|m)?(?:\{([A-Z]{2,3})\}|\|([A-Z]{2})\||([A-Z]{2,3}))\s*=(?=[^=A-Za-z]*(?:\\[a-z]+[^=A-Z]*)*$)"
)
_NAME = re.compile(r"^([A-Za-z]{4,}(?: [A-Za-z]+){0,3})\s*=(?=[^=])")
_UNION = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_TEMPERATURE = re.compile(r"(?:°|\bdegrees?)\s*(C|F)(?:elsius|ahrenheit)?\b", re.I)
_PAIRED_DOLLAR = re.compile(r"(?<!\\)\$")

_WORD = r"(?![A-Za-z])"
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"\\begin\{(?:align|aligned|equation|gather|split)\*?\}([^&\\]*)&?([^&]*)\\end\{\w+\*?\}", r"\1\2"),
        (r"\\left\s*\\\{\s*\\begin\{array\}\{[lcr]*\}(.*?)\\end\{array\}\s*\\right\s*\.", r"\\begin{cases}\1\\end{cases}"),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|middle|[bB]ig{1,2}[lrm]?)(?=\s*(?:[(\[|<)\]>/]|\\[{}|]|\\[lr](?:vert|angle|floor|ceil|brace)))", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut)" + _WORD, ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\(?:q?quad|enspace|thinspace|space)" + _WORD + "|(?<!^)~", " "),
        (
            r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|underline|mathrm|mathbf|mathit|mathsf|mbox|hbox|emph|bm|boldsymbol)\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
            r" \1 ",
        ),
        (r"\\operatorname\*?\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac" + _WORD, r"\\frac"),
        (r"\\[dt]binom" + _WORD, r"\\binom"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*(?=\{)", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"\{([^{}]*)\\choose" + _WORD + r"([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over" + _WORD + r"([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:cdot|times|ast)" + _WORD, "*"),
        (r"\\div" + _WORD, "/"),
        (r"\\(?:leqslant|leqq|leq|le)" + _WORD, "<="),
        (r"\\(?:geqslant|geqq|geq|ge)" + _WORD, ">="),
        (r"\\(?:neq|ne)" + _WORD, "!="),
        (r"\\lt" + _WORD, "<"),
        (r"\\gt" + _WORD, ">"),
        (r"\\(?:lbrace)" + _WORD, r"\\{"),
        (r"\\(?:rbrace)" + _WORD, r"\\}"),
        (r"\\(?:lvert|rvert|vert)" + _WORD, "|"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ" + _WORD + r")|\\degree" + _WORD, "°"),
        (r"\\colon" + _WORD, ":"),
        (r"\\([%$&#_])", r"\1"),
        (r"\\\{\s*([a-z])\s*\|", r"\\{\1\\mid "),
        (r"\\varnothing" + _WORD, r"\\emptyset"),
        (r"\\var(epsilon|phi|theta|rho|sigma)" + _WORD, r"\\\1"),
    ]
]
_PERCENT = re.compile(r"(?<=[\d}])\s*(?:per\s?cent|pct)\b\.?", re.I)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d{1,40})\}")
_GROUPED = re.compile(r"^[-+$€£]?\d{1,3}(?: \d{3})+(?=$|[.]\d|\s*[^\d\s.,;/])")
_MIXED = re.compile(r"(?<![\w.,}^])(\d+) +(\d+) ?/ ?(\d+)(?![\w.])")


def readable(text: object) -> str:
    """The text itself, if its characters can be read.

    Raises:
        Unreadable: no text, too long, or with characters that do not show what they are.
    """
    if not isinstance(text, str):
        raise Unreadable(f"is no text but {type(text).__name__}")
    if len(text) > LONGEST:
        raise Unreadable(f"has {len(text)} characters; at most {LONGEST} are read")
    if not text.isascii() or _BAD.search(text):
        if _BAD.search(text):
            raise Unreadable("has characters that cannot be seen or that change the order of others")
        if _FOREIGN_DIGIT.search(text.translate(_SMALL)):
            raise Unreadable("has digits other than 0 to 9")
    return text


def unwrap(text: str) -> str:
    """Without the signs around a whole answer: dollars, \\(…\\), stars, quotes, one box, a final full stop."""
    if len(text) > LONGEST:  # nobody will read it
        return text
    for _ in range(8):
        before, text = text, _TRAILING.sub("", _TRAILING_SPACE.sub("", text.strip()))
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner and closing not in inner:
                text = inner.strip()
        text = _unboxed(text)
        if text == before:
            break
    return text


def _unboxed(text: str) -> str:
    for command in ("\\boxed", "\\fbox", "\\text", "\\mathrm", "\\textbf", "\\mathbf"):
        opened = len(command)
        if text.startswith(command + "{") and closing_brace(text, opened) == len(text) - 1:
            return text[opened + 1 : -1].strip()
    return text


def closing_brace(text: str, opening: int) -> int:
    """Where the brace closes that opens at `opening`; -1 where it never does. An escaped brace is none."""
    depth, i = 0, opening
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
        i += 1
    return -1


def clean(text: str) -> str:
    """An answer in one spelling: ASCII where there is one, no LaTeX dress. Not yet parsed; may be anything."""
    if not text.isascii():
        text = _UPPER.sub(lambda m: "^{" + m[0].translate(_SMALL) + "}", text)
        text = _LOWER.sub(lambda m: "_{" + m[0].translate(_SMALL) + "}", text).translate(_TABLE)
    text = _LEADING_EQUALS.sub("", unwrap(text))
    if text.count("\\(") == text.count("\\)"):
        text = _INLINE.sub(" ", text)
    if len(_PAIRED_DOLLAR.findall(text)) % 2 == 0:
        text = _PAIRED_DOLLAR.sub("", text)
    if "\\" in text or "~" in text or "{" in text:
        text = _REPEATING.sub(_as_fraction, text)
        for pattern, new in _REWRITES:
            text = pattern.sub(new, text)
    text = _PERCENT.sub("%", text)
    text = _GROUPED.sub(lambda m: m[0].replace(" ", ""), text)
    text = _named(_TEMPERATURE.sub(lambda m: "°" + m[1].upper(), _UNION.sub(r"\\cup ", text)))
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    return unwrap(text)


def _named(text: str) -> str:
    """What an equation defines, as one symbol: f(x) = …, P(X=2) = …, AB = …, area = …."""
    if "=" not in text:
        return text
    text = text.strip()
    text = _PROBABILITY.sub(lambda m: f"{m[1][0]}_{{{_letters(m[2] + m[3])}}} =", text)
    text = _DERIVATIVE.sub(r"D_{\1\2} =", text)
    text = _LENGTH.sub(lambda m: f"L_{{{m[1] or m[2] or m[3]}}} =", text)
    return _NAME.sub(lambda m: f"N_{{{_letters(m[1].lower())}}} =", text)


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text.replace("'", "p")) or "0"


def _as_fraction(match: re.Match[str]) -> str:
    """0.1\\overline{6} → (15/90), the fraction that it is."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    scale, cycle = 10 ** len(fixed), 10 ** len(period) - 1
    return f"({int(whole + fixed) * cycle + int(period)}/{scale * cycle})"


_JOINING = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_SPACE, _ENDS = re.compile(r"\s+"), re.compile(r"^[\s\"'*_`.,;:!]+|[\s\"'*_`.,;:!]+$")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\S)")


def squash(text: str) -> str:
    """Without spaces that separate nothing; single characters in braces stand bare."""
    return _JOINING.sub("", re.sub(r"\{(\w)\}", r" \1", text))


def plain_text(text: str) -> str:
    """Words in one spelling: lower case, single spaces, no signs at the ends, no commas, no article in front."""
    text = _SPACE.sub(" ", text.replace(",", " ").replace("-", " ")).casefold()
    return _ARTICLE.sub("", _ENDS.sub("", text))
