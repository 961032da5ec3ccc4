"""Answers in one spelling: applied alike to a reference and to what a response states, boxed or not, before they are
compared. A rewrite keeps the value; what cannot be read keeps its text. docs/rewards.md lists them with examples."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from stare_megatron.rewards import units

_SYMBOLS = str.maketrans(
    dict.fromkeys("−‐‑‒–—―﹣", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " ")
    | {"∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot "}
    | {"≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "±": r"\pm "}
    | {"∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "≈": r"\approx ", "°": r"^{\circ}"}
    | {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"}
    | {"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta "}
    | {"λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega "}
    | {"Δ": r"\Delta ", "Ω": r"\Omega ", "⟨": r"\langle ", "⟩": r"\rangle ", "∣": "|", "∶": ":", "∕": "/", "⁄": "/"}
    | {"。": ".", "、": ",", "【": "[", "】": "]", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "∖": r"\setminus "}
)
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-()nixy0123456789+-nx")
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ]+")
_VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")
_OVERLINED = re.compile("((?:[0-9][\u0304\u0305])+)")
_ROOT = re.compile(r"([√∛])\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|(?=[({])|)")

# What may stand between groups of three digits.
_SEPARATOR = r"(?:,?\\!|,|\{,\}|\\[,;: ]|~| |')\s*"
_GROUPED = re.compile(rf"(?<![\d.,'])(\d{{1,3}})((?:{_SEPARATOR}\d{{3}})+)(?![\d'])")
_SEPARATORS = re.compile(_SEPARATOR)
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?)(\d+)(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:x|\*)\s*(?=10\s*(?:\^|\*\*))")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbar)\s*(?:\{(\d+)\}|(\d)))(?!\d)")
_BARE_FRACTION = re.compile(r"\\frac\s+(\d)\s+(\d)")
_MIXED = re.compile(r"(-?\d+)[ ~]+(?:(\d+)\s*/\s*(\d+)|(\\frac.*))", re.DOTALL)
_EXPONENT = re.compile(r"\^\s*([+-]?\d{2,}|[+-][\dA-Za-z])(?![\d.])")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|infinity"
    r"|alpha|beta)(?![A-Za-z])"
)
_PLAIN = (
    ("**", "^"),
    ("<=", r"\le "),
    (">=", r"\ge "),
    ("!=", r"\ne "),
    (r"\varnothing", r"\emptyset"),
    (r"\{\}", r"\emptyset"),
    (r"\degree", r"^{\circ}"),
    (r"\leq ", r"\le "),
    (r"\geq ", r"\ge "),
    (r"\displaystyle", ""),
    (r"\infinity", r"\infty"),
    (r"\neq", r"\ne"),
    (r"\log_e", r"\ln "),
    (r"\log_{e}", r"\ln "),
)
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|(?<!\\)~|\s+")
_STYLE = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])|\\limits(?![A-Za-z])")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|normal)|operatorname|mbox|hbox|bf|rm|boldsymbol)\s*\{([^{}]*)\}"
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{(.*)\}", re.DOTALL)
_MARKS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))
_ROWS = re.compile(r"\[\s*\[([^\[\]]*)\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")
_ARRAY = re.compile(r"\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}", re.DOTALL)
_STYLED_SIGN = re.compile(r"\\text\s*\{\s*(\\\$|[€£¥₹])\s*\}")
_TRIGONOMETRY = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_FALLING = re.compile(r"([^<>=]+)(>|\\ge )([^<>=]+)(>|\\ge )([^<>=]+)")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent|pct|per cent)\.?)\s*$", re.IGNORECASE)
_SCALE = re.compile(r"(-?\d+(?:\.\d+)?)\s*(thousand|million|billion|trillion)", re.IGNORECASE)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


@dataclass(frozen=True)
class Answer:
    """An answer in its one spelling. `words`: the same without styles, as text; `unit`: "" if none is known;
    `percent`: whether a percent sign stood at its end, which `text` is without.

    Example:
        Answer(text="12.5", words="12.5 %", unit="", percent=True)
    """

    text: str
    words: str
    unit: str
    percent: bool


@functools.lru_cache(256)  # the samples of a prompt share its reference
def normal(written: str) -> Answer:
    """What an answer comes to: symbols, digits and spaces of Unicode in ASCII or LaTeX; no delimiters, styles, marks
    of emphasis or punctuation around it; numbers without separators; units and percent signs apart."""
    text = _bare(_STYLED_SIGN.sub(r"\1", ascii_of(written)))
    text = _GROUPED.sub(lambda m: m[1] + _SEPARATORS.sub("", m[2]) if _one_separator(m[2]) else m[0], text)
    for old, new in _PLAIN:
        text = text.replace(old, new)
    text = _bare(_FRAC.sub(r"\\frac", _STYLE.sub("", _SPACES.sub(" ", text))))
    words = plain(text)
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text, unit = units.split(text)
    if bare := _PERCENT.search(plain(text) if "percent" in text or "pct" in text else text):
        text = bare.string[: bare.start()].strip()
    text = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    if _ROWS.fullmatch(text):
        rows = [row.strip(" ,[]").replace(",", "&") for row in text.split("]") if row.strip(" ,[]")]
        text = "\\begin{pmatrix}" + "\\\\".join(rows) + "\\end{pmatrix}"
    return Answer(_numbers(text), words, unit, bool(bare))


def ascii_of(text: str) -> str:
    """The text with what Unicode spells otherwise in ASCII or as a LaTeX command: digits of any script, signs, spaces,
    raised and lowered characters, roots, fractions. Linear in its length."""
    if text.isascii():
        return text
    text = _OVERLINED.sub(lambda m: rf"\overline{{{re.sub('[^0-9]', '', m[1])}}}", text)
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SCRIPTS)}}}", text)
    text = _VULGAR.sub(_vulgar, text).translate(_SYMBOLS)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    text = "".join(c if c.isascii() else _one(c) for c in text)
    return _ROOT.sub(lambda m: ("\\sqrt" + ("[3]" if m[1] == "∛" else "")) + (f"{{{m[2]}}}" if m[2] else ""), text)


def _one(char: str) -> str:
    """A digit of another script in ASCII; nothing for a character without a width, a mark or half of a pair."""
    if unicodedata.category(char) in ("Cf", "Cs", "Mn"):
        return ""
    return str(unicodedata.decimal(char, char))


def _vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _bare(text: str) -> str:
    """Without what is written around an answer: math delimiters, a box of its own, emphasis, quotes, punctuation."""
    before = None
    while before != text:
        before, text = text, text.strip()
        if not text.endswith((r"\ldots", r"\dots", "...", "!")):
            text = text.rstrip(" \t\r\n.,;:").removesuffix("\\")
        if box := _BOX.fullmatch(text):
            text = box[1]
        for begin, end in _MARKS:
            inner = text[len(begin) : -len(end)]
            if text.startswith(begin) and text.endswith(end) and len(text) > len(begin + end) and end not in inner:
                text = inner
    return text.strip()


def plain(text: str) -> str:
    """The text without `\\text{...}` and its like around parts of it and outer white space."""
    for _ in range(_DEEPEST):
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    return text.strip()


_DEEPEST = 20  # styles within styles that are taken off: one a pass over the text


def _one_separator(groups: str) -> bool:
    """Groups of three digits are one number only if the same sign parts them; commas with spaces make a list."""
    return len(set(_SEPARATORS.findall(groups))) == 1 and ", " not in groups


def _numbers(text: str) -> str:
    """Numbers as LaTeX has them."""
    text = text.removeprefix("+").strip()
    text = _REPEATING.sub(_repeating, text)
    text = _SCIENTIFIC.sub(lambda m: f"{m[1]} \\times 10^{{{m[2].replace('+', '')}{m[3]}}}", text)
    text = _TIMES_TEN.sub(r" \\times ", text)
    if scale := _SCALE.fullmatch(plain(text)):
        text = f"{scale[1]} \\times 10^{{{_SCALES[scale[2].lower()]}}}"
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}" + (mixed[4] or rf"\frac{{{mixed[2]}}}{{{mixed[3]}}}")
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    if chain := _FALLING.fullmatch(text):  # sympy does not see that 2 > x > 1 is 1 < x < 2
        rising = {">": "<", "\\ge ": "\\le "}
        text = f"{chain[5]}{rising[chain[4]]}{chain[3]}{rising[chain[2]]}{chain[1]}"
    text = _EXPONENT.sub(r"^{\1}", text)
    text = _FUNCTION.sub(lambda m: rf"\{'infty' if m[1] == 'infinity' else m[1]} ", text)
    text = _grouped(text, r"\\sqrt\s*(?:\[\d+\]\s*)?\(", lambda inner: f"{{{inner}}}")
    return _grouped(text, r"\^\s*\(", lambda inner: f"{{({inner})}}")


def _repeating(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` as the fraction it is."""
    whole, fixed, period = match[1], match[2], match[3] or match[4]
    if len(whole + fixed + period) > _MOST_DIGITS:
        return match[0]
    bottom = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + period) - int('0' + whole + fixed)}}}{{{bottom}}}"


_MOST_DIGITS = 100  # of a repeating decimal


def _grouped(text: str, opening: str, made: Callable[[str], str]) -> str:
    """With what stands in the parentheses that end each match of `opening` as `made` writes it. Of parentheses without
    a partner nothing is changed."""
    pieces, at = [], 0
    closing = _partners(text) if "(" in text else {}
    for match in re.finditer(opening, text):
        begin = match.end() - 1
        if begin >= at and begin in closing:
            pieces += [text[at:begin], made(text[begin + 1 : closing[begin]])]
            at = closing[begin] + 1
    return "".join([*pieces, text[at:]])


def _partners(text: str) -> dict[int, int]:
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer("[()]", text):
        if match[0] == "(":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing
