"""Signs of a broken answer: repetition, garbled characters, truncation, broken Markdown and JSON, refusals.

Each function returns True if the answer has the fault.
"""

from __future__ import annotations

import json
import re

import numpy as np

from align.data.filters.grams import CHARACTERS, gram_size, ordered_hashes, units

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})(.*)$")
_BULLET = re.compile(r"^\s*(?:[-*+]|\d{1,3}[.)])\s+(?=```|~~~)")
"""Mark of a list item that begins with a code fence."""
_TABLE_RULE = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$")
_CELL = re.compile(r"(?<!\\)\|")
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)\]）】」』*_]*\s")
_BROKEN = re.compile("[\ufffd\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff]")
# UTF-8 bytes of accents, quotes and dashes, read as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("Ã[\x80-\xbf©¨ªª±³º¤¶¼]|â€[™œ\x9d“”˜¦\x93\x94\x99\x9c]|Â[\xa0°·£©®»«]")
_CANNOT = r"\b(?:can(?:no|['’])?t|unable|not able|won['’]t|will not|not going to|do(?:n['’]t| not) have)\b"
_HELP = (
    "help|assist|answer|provide|support|comply|fulfil|do that|discuss|engage|create|generate|write|share|give|"
    "participate|complete"
)
_REFUSALS = (
    # I'm sorry, but I can't ...; I am afraid I am unable ...; but not: I'm sorry to hear that you can't ...
    rf"(?:i['’]?m |i am )?(?:very |really |truly )?(?:sorry|afraid)\b(?! (?:to hear|that you|you|your)\b)"
    rf"[^.!?\n]{{0,60}}?{_CANNOT}",
    rf"(?:i['’]?m |i am )?(?:very |really |truly )?sorry\b[^.!?\n]{{0,80}}?\bi(?: am|['’]m)? {_CANNOT}",
    rf"i (?:apologi[sz]e|regret)\b[^.!?\n]{{0,60}}?{_CANNOT}",
    # I cannot help ...; Unfortunately, I am not able to provide ...
    r"(?:i (?:simply )?|unfortunately,? i )(?:can(?:no|['’])?t|won['’]t|will not|am (?:unable|not able) to|"
    rf"must decline to) (?:\w+ ){{0,2}}?(?:{_HELP})\b(?! but\b)",
    # As an AI language model, I do not ...
    rf"as an? (?:ai|artificial|large|language)\b[^.!?\n]{{0,80}}?(?:{_CANNOT}|\b(?:don['’]t|do not)\b)",
    "(?:很?抱歉|对不起|非常抱歉|不好意思)[^。！？\n]{0,30}?(?:不能|无法|没法|没有办法|不可以|拒绝)",
    "我(?:不能|无法|没法)(?:帮助|协助|提供|回答|满足|讨论|参与)",
    "作为(?:一个|一名)?(?:人工智能|AI|大?语言模型)[^。！？\n]{0,40}?(?:不能|无法|没法|没有)",
)
_REFUSAL = re.compile(r"\W*(?:" + "|".join(_REFUSALS) + ")", re.IGNORECASE)


def repeated_share(answer: str) -> float:
    """Share of an answer's n-grams that occurred earlier in it: 5 words, or 10 characters of unspaced scripts."""
    text_units = units(answer)
    hashes = ordered_hashes(text_units, 10 if gram_size(text_units) == CHARACTERS else 5)
    return 1.0 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def garbled(answer: str) -> bool:
    """Replacement, control or private-use characters, or UTF-8 that was decoded as Latin-1."""
    return bool(_BROKEN.search(answer) or _MOJIBAKE.search(answer))


def truncated(answer: str) -> bool:
    """An answer of at least 200 characters with sentences that ends inside one, outside code, lists and tables."""
    text = answer.rstrip()
    if len(text) < 200 or len(_SENTENCE_END.findall(text)) < 2:
        return False
    last = text.rpartition("\n")[2].strip()
    if broken_markdown(text):  # an unclosed code block
        return True
    if re.match(r"[-*+#|>\d]|https?://|\$", last) or len(last) < 40 or last.endswith(("```", "~~~")):
        return False  # list items, headings, sources, formulas and signatures may end without a full stop
    return last[-1].isalnum() or last[-1] in ",，、;；-–("


def broken_markdown(answer: str) -> bool:
    """An unclosed code fence, or a table with a row whose number of cells differs from the header's."""
    fence, width, previous = "", 0, ""
    for line in answer.splitlines():
        mark = _FENCE.match(line if fence else _BULLET.sub("", line))
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
            continue
        if mark and "`" not in mark[2]:
            fence, width = mark[1], 0
        elif _TABLE_RULE.match(line) and "|" in previous:
            width = _cells(line)
            if _cells(previous) != width:
                return True
        elif width:
            if "|" not in line:
                width = 0
            elif _cells(line) != width:
                return True
        previous = line
    return bool(fence)


def _cells(line: str) -> int:
    return len(_CELL.split(line.strip().removeprefix("|").removesuffix("|")))


def broken_json(answer: str) -> bool:
    """A `json` code block, or an answer in braces or brackets, that is not valid JSON."""
    blocks = re.findall(r"^ {0,3}```json[^\S\n]*\n(.*?)^ {0,3}```", answer, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    text = answer.strip()
    if text.startswith("{") and text.endswith("}") and '"' in text:
        blocks.append(text)
    return any(not _is_json(block) for block in blocks)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def refuses(answer: str) -> bool:
    """An answer that begins with a refusal, in English or Chinese."""
    return _REFUSAL.match(answer) is not None
