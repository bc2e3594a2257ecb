"""IFEval's instructions: verdicts equal those of the reference implementation, recorded by `instruction_cases`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.errors import UserError
from align.reward.instructions import CHECKS, instruction_score, read_instructions, undecided, verdicts
from align.reward.sentences import capital_words, count_sentences

from .instruction_cases import RECORDED, REPLACED, cases, row

EXPECTED = json.loads(RECORDED.read_text(encoding="utf-8"))


def check(text: str, name: str, **arguments: Any) -> tuple[bool | None, bool | None]:
    found = verdicts(text, read_instructions(row(name, arguments), "instruction_id_list", "kwargs"))[0]
    return found.strict, found.loose


def test_all_types_of_the_paper_have_a_check() -> None:
    assert len(CHECKS) == 25
    assert {key.split()[0] for key in EXPECTED} == set(CHECKS)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_verdicts_are_those_of_the_reference(name: str) -> None:
    found = [check(text, name, **arguments) for text, arguments in cases(name)]
    pairs = []
    for index, key in enumerate(("strict", "loose")):
        expected = [letter == "T" for letter in EXPECTED[f"{name} {key}"]]
        assert True in expected
        assert False in expected
        pairs += [(a[index], b) for a, b in zip(found, expected, strict=True) if a is not None]
    different = sum(a != b for a, b in pairs)
    assert different <= REPLACED.get(name, 0) * len(pairs)
    assert len(pairs) >= (40 if name in REPLACED else 80)


def test_sentences_by_hand() -> None:
    assert count_sentences("") == 0
    assert count_sentences("No mark at the end") == 1
    assert count_sentences("One. Two! Three? “Four.” (Five.) Six") == 6
    assert count_sentences("Dr. A. Smith paid $3.50 at 5 p.m. to Mr. Lee, i.e. to me.") == 1
    assert count_sentences("It ends at 5 p.m. The rest is silence.") == 2
    assert count_sentences("Wait... what? Wait... What?") == 3
    assert count_sentences("今天很好。明天呢？好！") == 3
    assert count_sentences("A title\n\nand a line\nthat goes on.") == 1


def test_words_in_capitals_by_hand() -> None:
    assert capital_words("I DON'T know NASA, ESA/JAXA or the U.S. A-B x1 A1") == 8  # I, DO, N'T, 3 names, A-B, A1


def test_what_cannot_be_decided_has_no_verdict() -> None:
    assert check("ok", "language:response_language", language="en") == (None, None)
    assert check("OK", "change_case:english_capital") == (None, None)
    assert check("Ok", "change_case:english_capital") == (False, False)  # not in capitals in any language
    assert check("anything", "keywords:rhymes") == (None, None)
    instructions = read_instructions(
        {"names": ["punctuation:no_comma", "keywords:rhymes"], "arguments": None}, "names", "arguments"
    )
    found = verdicts("a and b", instructions)
    assert instruction_score(found, loose=False, share=False) is None
    assert undecided(found) == "undecided: 'keywords:rhymes' (unknown)"
    found = verdicts("a, b", instructions)
    assert instruction_score(found, loose=False, share=False) == 0.0  # one failure decides
    assert instruction_score(found, loose=False, share=True) is None


def test_score_of_a_row_with_three_instructions() -> None:
    instructions = read_instructions(
        {
            "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "length_constraints:number_words"],
            "kwargs": [{"keyword": None}, {}, {"relation": "at least", "num_words": 3.0, "keyword": None}],
        },
        "instruction_id_list",
        "kwargs",
    )
    found = verdicts("Sure:\nfour words without commas", instructions)
    assert [verdict.strict for verdict in found] == [True, False, True]
    assert instruction_score(found, loose=False, share=True) == 2 / 3
    assert instruction_score(found, loose=False, share=False) == 0.0
    assert instruction_score(verdicts('Sure:\n"one two three"', instructions), loose=True, share=False) == 1.0
    assert (
        instruction_score(verdicts('<think>a, b</think>"one two three"', instructions), loose=False, share=False) == 1.0
    )


@pytest.mark.parametrize(
    ("name", "followed", "not_followed", "arguments"),
    [
        ("keywords:forbidden_words", "A warm day, postwar.", "A day of War.", {"forbidden_words": ["war"]}),
        ("detectable_format:number_highlighted_sections", "**a** and *b*", "** ** and *b*", {"num_highlights": 2}),
        ("combination:two_responses", "******a******b******", "a************b", {}),
        ("startend:end_checker", '"It ends. Bye!"', "Bye! It ends.", {"end_phrase": "bye!"}),
    ],
)
def test_definitions_by_hand(name: str, followed: str, not_followed: str, arguments: dict[str, Any]) -> None:
    assert check(followed, name, **arguments)[0] is True
    assert check(not_followed, name, **arguments)[0] is False


def test_keywords_are_texts_and_not_patterns() -> None:
    assert check("I like C++ (most).", "keywords:existence", keywords=["c++", "(most)"]) == (True, True)
    assert check("I like C++ most.", "keywords:forbidden_words", forbidden_words=["c++"]) == (False, False)
    assert check("a#b!", "keywords:letter_frequency", letter="#", let_frequency=1, let_relation="at least")[0]


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["punctuation:no_comma"], [{}, {}], "it has 2 values for the 1 instructions"),
        (["keywords:existence"], [{}], "argument 'keywords' is not valid (Missing required argument)"),
        (["length_constraints:number_words"], [{"num_words": "many", "relation": "at least"}], "'num_words'"),
        (["punctuation:no_comma"], "[{", "the text is not JSON"),
        (["language:response_language"], [{"language": "xx"}], "does not identify the language 'xx'"),
    ],
)
def test_a_wrong_row_is_refused(names: list[str], given: Any, said: str) -> None:
    with pytest.raises(UserError, match=r"Correct|Write|Use") as caught:
        verdicts("text", read_instructions({"n": names, "k": given}, "n", "k"))
    assert said in str(caught.value)
