"""Haystacks, and the words and values of needles."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from align.config.long_context import Language, LongContext
from align.config.paths import local_path
from align.data.python_docs import python_docs_rows
from align.errors import UserError

_ADJECTIVES = """amber brave calm dusty early faint gentle hollow icy jolly keen lively mellow narrow olive patient
quiet rapid silver tidy upper velvet wooden young broad copper distant eager frozen golden humble ivory""".split()  # noqa: SIM905
_NOUNS = """anchor bridge candle desert engine feather garden harbor island jacket kettle ladder meadow needle orchard
pepper quarry river saddle temple umbrella valley window yard basket cellar dragon emerald forest glacier hammer
lantern""".split()  # noqa: SIM905
_CHINESE_ADJECTIVES = "安静 古老 明亮 遥远 温柔 金色 清澈 高大 沉默 新鲜 寒冷 宽阔 红色 轻快 神秘 柔软".split()  # noqa: SIM905
_CHINESE_NOUNS = "港湾 花园 灯塔 森林 山谷 图书馆 桥梁 火车 窗户 海岛 湖泊 钟楼 果园 草原 工厂 城墙".split()  # noqa: SIM905
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def haystack(language: Language, settings: LongContext) -> list[str]:
    """The words of the text that hides needles; for Chinese, its characters. White space belongs to the word before it.

    Raises UserError if the file cannot be read or is empty.
    """
    text = _read(settings.haystacks[language]) if language in settings.haystacks else python_text()
    pieces = re.findall(r"\s*[^\s\u3400-\u9fff]+|\s*[\u3400-\u9fff]", text)
    if not pieces:
        raise UserError(f"{settings.haystacks.get(language)}: the haystack is empty. Use a file with text.")
    return pieces


def python_text() -> str:
    """The documentation of Python's standard library."""
    rows = [row for split in ("train", "held_out") for row in python_docs_rows("text", split, 0)]
    return "\n\n".join(row["text"] for row in rows)


def keys(draw: random.Random, count: int, language: Language) -> list[str]:
    """Different keys, such as `quiet-harbor`."""
    first, second = (_ADJECTIVES, _NOUNS) if language == "en" else (_CHINESE_ADJECTIVES, _CHINESE_NOUNS)
    joint = "-" if language == "en" else "的"
    return draw.sample([f"{a}{joint}{b}" for a in first for b in second], count)


def codes(draw: random.Random, count: int) -> list[str]:
    """Different values of seven digits."""
    return [str(number) for number in draw.sample(range(1_000_000, 10_000_000), count)]


def made_up(draw: random.Random, count: int, *, upper: bool = False) -> list[str]:
    """Different made-up words of three syllables, such as `tokira`: of one length, so none contains another."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(3))
        found[word.upper() if upper else word] = None
    return list(found)


def _read(path: str) -> str:
    file = local_path(path)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Set haystacks to a text file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not valid UTF-8. Save the haystack as UTF-8 text.") from None
    if file.suffix != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}, line {number}: it is not a JSON object with a column 'text'. Correct it, or use a text file."
            ) from None
    return "\n\n".join(rows)
