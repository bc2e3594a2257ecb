r"""Final answers of mathematical problems: extract them from a text, and compare two of them.

Numbers are compared as exact fractions, so `1,234.50`, `$1234.5` and `\frac{2469}{2}` are equal; units are ignored.
Anything else is compared as text without LaTeX's spacing commands: `4\pi i` equals `4 \pi i`, but not `4i\pi`.
A policy may write anything, so every step is linear in the text's length, and numbers are limited to a few hundred
digits.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

AnswerFormat = Literal["any", "boxed", "hash"]

LONGEST = 200
"""Maximum length of an answer in characters; a longer text is not a final answer."""
LARGEST_EXPONENT = 100
"""Largest power of ten in a number; a number with a larger one is compared as text."""
TOLERANCE = Fraction(1, 10**6)
"""Relative tolerance between a decimal and a fraction with infinitely many decimals: 0.3333333 equals 1/3,
0.33 does not."""

_BOXES = ("\\boxed{", "\\fbox{")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])(?:\s*:)?|(?m:^)(?-i:A):|答案(?:是|为|:)", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.])-?[$€£¥]?-?(?:\d{1,9} (?=\d{1,9}/))?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")
_PLAIN = {0xFF01 + i: chr(0x21 + i) for i in range(94)} | {
    ord(sign): plain
    for sign, plain in {
        "\u3000": " ", "\u00a0": " ", "\u202f": " ", "。": ".", "−": "-", "–": "-", "⁄": "/", "²": "^2", "³": "^3",
        "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8",
    }.items()
}  # fmt: skip


def final_answer(text: str, format: AnswerFormat = "any") -> str | None:
    r"""The final answer of a completion, or None if it has none.

    format: `boxed` takes the content of the last \boxed{}, `hash` the text after the last ####. `any` takes whichever
    comes last: a box, #### or a phrase such as "the answer is", "Answer:" or "A:". If there is none of them, `any`
    takes the last number.
    """
    text = plain_characters(text)
    found = [_boxed(text)] if format != "hash" else []
    found += [_after_hashes(text, strict=format == "hash")] if format != "boxed" else []
    if format == "any":
        found.append(_after_phrase(text))
    placed = [place for place in found if place is not None]
    if placed:
        return max(placed)[1]
    if format != "any":
        return None
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def same_answer(answer: str, expected: str) -> bool:
    """True if both are the same number or, if one of them is not a number, the same text."""
    ours, theirs = to_numbers(answer), to_numbers(expected)
    if ours and theirs:
        return any(_close(a, b) for a in ours for b in theirs)
    return canonical(answer) == canonical(expected) != ""


def expected_answer(column: str) -> str:
    """The answer in a data cell, which may be a worked solution that ends with `####` or a box."""
    text = plain_characters(column)
    found = [place for place in (_boxed(text), _after_hashes(text, strict=True)) if place is not None]
    return max(found)[1] if found else text.strip()


# --- extraction -----------------------------------------------------------------------------------------


def plain_characters(text: str) -> str:
    """Replace full-width characters and Unicode's minus, fractions and superscripts by plain ones."""
    return text.translate(_PLAIN)


def _boxed(text: str) -> tuple[int, str] | None:
    """(position, content) of the last box; None if there is none, or if it is too long or not closed."""
    start, opening = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    begin, depth = start + len(opening), 1
    for position in range(begin, min(len(text), begin + LONGEST)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return start, text[begin:position]
    return None


def _after_hashes(text: str, *, strict: bool) -> tuple[int, str] | None:
    """(position, answer) after the last ####.

    strict: take the line in any case. Otherwise #### may be a Markdown heading, so the line is taken only if it is a
    number or the last line.
    """
    start = text.rfind("####")
    if start < 0:
        return None
    line, _, rest = text[start + 4 : start + 4 + LONGEST].strip().partition("\n")
    if not strict and rest and not to_numbers(line):
        return None
    return start, _first_answer(line)


def _after_phrase(text: str) -> tuple[int, str] | None:
    """(position, answer) after the last phrase that introduces an answer."""
    last = None
    for last in _PHRASE.finditer(text):  # noqa: B007 (only the last match is used)
        pass
    if last is None:
        return None
    line = text[last.end() : last.end() + LONGEST].lstrip().partition("\n")[0]
    return last.start(), _first_answer(re.split(r"[.;](?:\s|$)", line, maxsplit=1)[0])


def _first_answer(line: str) -> str:
    """The answer in a line: the whole line if it is a number, otherwise the text after the last `=`.

    If that text is not a number, its first number is the answer. A line with LaTeX or without a number is returned
    whole.
    """
    line = line.replace("\\$", "$")
    if to_numbers(line):
        return line
    result = line.rpartition("=")[2] if not _is_latex(line) else line
    if to_numbers(result) or _is_latex(line):
        return result
    number = _NUMBER_IN_TEXT.search(result)
    return number.group() if number else line


def _is_latex(text: str) -> bool:
    return "\\" in text


# --- comparison ----------------------------------------------------------------------------------------------

_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_WRAPPERS = re.compile(r"\\(?:left|right|displaystyle|limits|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])|\\[()\[\]]|\$|\*\*")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_VARIABLE = re.compile(r"^[A-Za-z]=")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:USD?|RMB|[€£¥])?(?P<inner>[-+]?)"
    rf"(?:(?P<whole>\d{{1,20}})?\\frac\{{(?P<top>-?\d{{1,60}})\}}\{{(?P<bottom>\d{{1,60}})\}}"
    rf"|(?P<over>\d{{1,60}})/(?P<under>\d{{1,60}})"
    rf"|(?P<decimal>{_DIGITS})(?:e(?P<e>[-+]?\d{{1,3}})|(?:\\times|\\cdot|x|\*)10\^\{{?(?P<power>-?\d{{1,3}})\}}?)?)"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_MIXED = re.compile(r"(\d{1,20})\s+(\d{1,20}/\d{1,20})")
# A percent or degree sign, a word of two or more letters, a one-letter unit, or Chinese characters; not x, i or \pi.
_UNIT = re.compile(
    r"\\?%|\^?\{?(?:\\circ|°)\}?[CF]?"
    r"|(?!(?:pi|sqrt|log|ln|sin|cos|tan|or|and|to)(?![a-z]))(?:[A-Za-z]{2,}|[mgshlLKNJWVA])"
    r"(?:[-/.]?[A-Za-z]+)*(?:\^\{?[23]\}?)?"
    r"|[\u4e00-\u9fff]+"
)


def canonical(text: str) -> str:
    """Canonical form of an answer: without spaces, dollar signs, LaTeX's layout commands, `x=`, final punctuation."""
    text = plain_characters(text[:LONGEST]).strip()
    if mixed := _MIXED.fullmatch(text.strip("$ ")):
        whole, fraction = mixed.groups()
        top, bottom = fraction.split("/")
        text = rf"{whole}\frac{{{top}}}{{{bottom}}}"
    text = _TEXT.sub(r"\1", text.replace("{,}", ","))
    text = _WRAPPERS.sub("", text.replace("\\$", "").replace("\\%", "%"))
    text = _SPACES.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _VARIABLE.sub("", text).rstrip(".,;:!")
    if len(text) > 2 and text[0] == "(" and text[-1] == ")" and not set("(),") & set(text[1:-1]):
        text = text[1:-1]
    return text.lower() if text.isalpha() else text


def to_numbers(text: str) -> list[Fraction]:
    """Values that a text may have: none if it is not a number, two if it has a percent sign, otherwise one."""
    match = _NUMBER.fullmatch(canonical(text)) if len(text) <= LONGEST else None
    if match is None:
        return []
    unit = match["unit"]
    if unit and not _UNIT.fullmatch(unit):
        return []
    value = _value(match)
    if value is None:
        return []
    return [value, value / 100] if unit == "%" else [value]


def _value(match: re.Match[str]) -> Fraction | None:
    bottom = match["bottom"] or match["under"]
    if bottom is not None:
        if int(bottom) == 0:
            return None
        value = Fraction(int(match["top"] or match["over"]), int(bottom)) + int(match["whole"] or 0)
    else:
        exponent = int(match["e"] or match["power"] or 0)
        if abs(exponent) > LARGEST_EXPONENT:
            return None
        value = Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    return -value if (match["sign"] == "-") != (match["inner"] == "-") else value


def _close(ours: Fraction, theirs: Fraction) -> bool:
    """True if both are equal or, if one of them has infinitely many decimals (1/3), equal up to TOLERANCE."""
    if _is_decimal(ours) and _is_decimal(theirs):
        return ours == theirs
    return abs(ours - theirs) <= TOLERANCE * max(abs(ours), abs(theirs))


def _is_decimal(value: Fraction) -> bool:
    scale: int = 10**LONGEST
    return scale % value.denominator == 0
