"""Verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911): one check for each of its 25 types.

A row has two lists of equal length: the types of its instructions, and the arguments of each. A check returns True,
False, or None if it cannot decide. The definitions are those of the reference implementation, except that keywords are
texts and not patterns, and that a row without an argument is refused instead of checked with a random one. Two tools of
the reference need downloads and are replaced:

    sentences   the rules of `count_sentences` instead of NLTK's trained Punkt model
    languages   py3langid instead of langdetect; text that is too short to identify is undecided
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError, validate_call

from align.data.filters.language import language_of, with_members
from align.errors import UserError
from align.reward.sentences import capital_words, count_sentences
from align.reward.text import Row, accepted_values, is_missing

Relation = Literal["less than", "at least"]
Check = Callable[..., bool | None]
CHECKS: dict[str, Check] = {}
"""Check of each type: f(completion, **arguments) -> followed, or None if undecided."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row.

    name: its type, for example `punctuation:no_comma`.
    arguments: those of the type's check.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One instruction, checked on a completion.

    name: the instruction's type.
    strict: followed by the completion as it is; None if undecided.
    loose: followed by the completion, or by it without its first line, its last line or its asterisks.
    """

    name: str
    strict: bool | None
    loose: bool | None


def read_instructions(row: Row, names: str, arguments: str) -> list[Instruction]:
    """The instructions of a row. Raises UserError if their lists do not belong together.

    names, arguments: columns of the two lists. Arguments that are null are absent.
    """
    listed = [str(value) for value in accepted_values(row.get(names))]
    cell = row.get(arguments)
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise UserError(f"column '{arguments}': the text is not JSON ({error}). Correct the row.") from None
    given = list(cell) if isinstance(cell, list | tuple) else [{}] * len(listed) if is_missing(cell) else [cell]
    if len(given) != len(listed) or not all(isinstance(item, dict) or is_missing(item) for item in given):
        raise UserError(
            f"column '{arguments}': it has {len(given)} values for the {len(listed)} instructions of the column "
            f"'{names}'. Write one object with arguments per instruction, {{}} if it has none."
        )
    return [
        Instruction(name, {key: value for key, value in (item or {}).items() if not is_missing(value)})
        for name, item in zip(listed, given, strict=True)
    ]


def check_arguments(instruction: Instruction) -> None:
    """Raise UserError if the type is unknown or its arguments are not those of its check."""
    if instruction.name not in CHECKS:
        raise UserError(
            f"instruction '{instruction.name}': this type of instruction is unknown. Remove its rows, or use one of "
            f"{', '.join(sorted(CHECKS))}."
        )
    _followed(instruction, "")


def verdicts(completion: str, instructions: list[Instruction]) -> list[Verdict]:
    """Verdict of each instruction on a completion, without its `<think>` section. An unknown type is undecided.

    Raises UserError if a check does not take the instruction's arguments.
    """
    text = completion.rpartition("</think>")[2]
    found = []
    for instruction in instructions:
        strict = _followed(instruction, text)
        loose = strict
        for variant in _variants(text):
            if loose:
                break
            loose = _either(loose, _followed(instruction, variant))
        found.append(Verdict(instruction.name, strict, loose))
    return found


def instruction_score(found: list[Verdict], *, loose: bool, share: bool) -> float | None:
    """1.0 if all instructions are followed, otherwise 0.0, or their share; None if that depends on an undecided one."""
    results = [verdict.loose if loose else verdict.strict for verdict in found]
    if not share and False in results:
        return 0.0
    if None in results or not results:
        return None
    return sum(map(bool, results)) / len(results)


def undecided(found: list[Verdict]) -> str:
    """Reason for a missing score: the names of the undecided instructions."""
    names = [f"'{v.name}'" + ("" if v.name in CHECKS else " (unknown)") for v in found if v.strict is None]
    return f"undecided: {', '.join(names)}" if names else ""


def _followed(instruction: Instruction, text: str) -> bool | None:
    check = CHECKS.get(instruction.name)
    if check is None:
        return None
    try:
        followed = check(text, **instruction.arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"instruction '{instruction.name}': its argument '{where}' is not valid ({problem['msg']}). Correct the "
            "row."
        ) from None
    return followed if text.strip() else False


def _either(a: bool | None, b: bool | None) -> bool | None:
    return True if a or b else None if a is None or b is None else False


def _variants(text: str) -> list[str]:
    """The text without its first line, its last line, both, and each of these and the text without asterisks."""
    lines = text.split("\n")
    cut = ["\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [*cut, *(variant.replace("*", "") for variant in (text, *cut))]
    return [variant for variant in dict.fromkeys(variants) if variant.strip()]


# --- checks ----------------------------------------------------------------------------------------------------


def instruction(name: str) -> Callable[[Check], Check]:
    """Register the decorated function as the check of a type. Its arguments are validated."""

    def register(function: Check) -> Check:
        CHECKS[name] = validate_call(function)
        return CHECKS[name]

    return register


def _compare(found: int, relation: Relation, number: int) -> bool:
    return found < number if relation == "less than" else found >= number


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


@instruction("keywords:existence")
def has_keywords(text: str, keywords: list[str]) -> bool:
    return all(_occurrences(text, word) for word in keywords)


@instruction("keywords:frequency")
def keyword_frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compare(_occurrences(text, keyword.strip()), relation, frequency)


@instruction("keywords:forbidden_words")
def avoids_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


@instruction("language:response_language")
def in_language(text: str, language: str) -> bool | None:
    try:
        accepted = with_members([language])
    except UserError:
        raise UserError(
            f"instruction 'language:response_language': py3langid does not identify the language '{language}'. Use ISO "
            "639 codes: en, zh, de."
        ) from None
    found = language_of(text)
    return None if found is None else found in accepted


@instruction("length_constraints:number_sentences")
def number_of_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


@instruction("length_constraints:number_words")
def number_of_words(text: str, num_words: int, relation: Relation) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by `***`; only the first and the last may be empty, and then do not count."""
    filled = [bool(part.strip()) for part in text.split("***")]
    return all(filled[1:-1]) and sum(filled) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def first_word_of_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line. The word ends at the first of `.,?!'"`."""
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= filled or filled != num_paragraphs or not (words := parts[nth_paragraph - 1].split()):
        return False
    word = words[0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", word)[0].lower() == first_word.lower()


@instruction("detectable_content:number_placeholders")
def number_of_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\n]*?\]", text)) >= num_placeholders


@instruction("detectable_content:postscript")
def has_postscript(text: str, postscript_marker: str) -> bool:
    """The marker, in any case, with or without a space after each inner point."""
    marker = re.sub(r"\.(?=.)", ". ", postscript_marker.strip().lower())
    pattern = re.escape(marker).replace(r"\ ", r"\s?")
    return re.search(pattern, text.lower()) is not None


@instruction("detectable_format:number_bullet_lists")
def number_of_bullets(text: str, num_bullets: int) -> bool:
    """Lines that begin with `-`, or with one `*` and another character."""
    return (
        len(re.findall(r"^\s*\*[^*]", text, re.MULTILINE)) + len(re.findall(r"^\s*-", text, re.MULTILINE))
        == num_bullets
    )


@instruction("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


@instruction("detectable_format:number_highlighted_sections")
def number_of_highlights(text: str, num_highlights: int) -> bool:
    """Parts of a line in single or double asterisks that are not blank."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in [*single, *double]) >= num_highlights


@instruction("detectable_format:multiple_sections")
def number_of_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Section marks with a number, such as `Section 1`. `section_spliter` is the data set's spelling."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


@instruction("detectable_format:json_format")
def is_json(text: str) -> bool:
    """JSON, alone or in a fence that is the whole text."""
    inner = text.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(mark)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def has_title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


@instruction("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different texts separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


@instruction("combination:repeat_prompt")
def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def is_quoted(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


@instruction("change_case:capital_word_frequency")
def capital_word_frequency(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
    return _compare(capital_words(text), capital_relation, capital_frequency)


@instruction("change_case:english_capital")
def english_capitals(text: str) -> bool | None:
    return _is_english(text) if text.isupper() else False


@instruction("change_case:english_lowercase")
def english_lowercase(text: str) -> bool | None:
    return _is_english(text) if text.islower() else False


@instruction("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text


def _is_english(text: str) -> bool | None:
    found = language_of(text.lower())  # py3langid takes words in capitals for other languages
    return None if found is None else found == "en"
