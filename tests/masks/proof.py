"""Compare the rows of random conversations with constructions that share no code with them.

by characters   the text that the template itself renders before and after a turn. The tokenizer has one token per byte,
                so each token of a row is a known part of the text.
by tokens       `tests.masks.by_tokens`, also with a tokenizer that merges bytes.
TRL             the mask of the training template that TRL ships for a template, where it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from trl.chat_template_utils import get_training_chat_template

from align.data import chat
from align.data.shapes import DropRow
from align.data.tokenizer import train_tokenizer
from tests.chat_templates import MORE_SHAPES, SHAPES, Shape, tokenizer_for
from tests.masks import by_tokens
from tests.masks.conversations import Drawn, Generator

TEMPLATES: dict[str, Shape] = SHAPES | MORE_SHAPES
_MERGED = ("user assistant system\n\n", "the answer is 4\n", "你好，世界", "\n \n", "  x = y + 1") * 9


@dataclass
class Report:
    """Counts and deviations for one template.

    turns: trained turns.
    split: conversations that became several rows.
    escaped: conversations in which a text would have become a control token.
    by_tokens: rows that the construction by tokens was compared with, with either tokenizer.
    trl: conversations in which TRL's training template marks the same texts. What some of these mark besides does not
        count: the end of the prompt, the line break after a turn, and the end of the text.
    trl_history: conversations in which TRL trains an earlier turn as the history of a later one, for example without
        its reasoning.
    trl_no_end: other conversations in which TRL does not train the end of a turn.
    refused: {reason: conversations}.
    wrong: descriptions of deviations.
    """

    template: str
    conversations: int = 0
    turns: int = 0
    split: int = 0
    escaped: int = 0
    by_tokens: int = 0
    trl: int = 0
    trl_history: int = 0
    trl_no_end: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def prove(name: str, conversations: int, seed: int = 0) -> Report:
    """Draw conversations for a template and compare."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    chat.prepare_chat_template(tokenizer)
    merging = tokenizer_for(TEMPLATES[name], train_tokenizer(_MERGED, 340))
    merging.chat_template = tokenizer.chat_template
    report, encoder, merged = Report(name), chat.ConversationEncoder(tokenizer), chat.ConversationEncoder(merging)
    generator, training = Generator(encoder.template, f"{name} {seed}"), _trl_template(tokenizer)
    for number in range(conversations):
        drawn = generator.draw()
        report.conversations += 1
        try:
            rows = encoder.rows(drawn.messages, drawn.variables)
        except DropRow as reason:
            report.refused[str(reason)] += 1
            continue
        report.split += len(rows) > 1
        problems = list(_by_characters(tokenizer, encoder.template.end_ids, drawn, rows, report))
        if not drawn.hostile:
            for one, maker in ((tokenizer, encoder), (merging, merged)):
                problems += _by_tokens(one, maker, drawn, report)
            if training and not drawn.weighted:
                problems += _by_trl(tokenizer, training, drawn, rows, report)
        report.wrong += [f"conversation {number}: {problem}" for problem in problems]
    report.escaped = encoder.escaped
    return report


def _segments(mask: Sequence[int]) -> list[tuple[int, int]]:
    runs = [list(run) for marked, run in groupby(range(len(mask)), key=mask.__getitem__) if marked]
    return [(run[0], run[-1] + 1) for run in runs]


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, token by token: names of added tokens, and the bytes of the others."""
    added, byte_of = tokenizer.added_tokens_decoder, _bytes()
    spelled = b""
    for token in ids:
        text = str(added[token]).encode() if token in added else None
        spelled += text or bytes(byte_of[character] for character in tokenizer.convert_ids_to_tokens(token))
    return spelled.decode()


def _bytes() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def _by_characters(
    tokenizer: Any, end_ids: Sequence[int], drawn: Drawn, rows: Sequence[by_tokens.Masked], report: Report
) -> Iterator[str]:
    """Deviations from the texts that the template renders before and after each turn."""
    ends = [str(tokenizer.added_tokens_decoder[token]) for token in end_ids]
    names = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    words = {name: f"zq{n}zq" for n, name in enumerate(names) if "think" not in name} if drawn.hostile else {}
    messages, variables = _replaced(drawn.messages, words), _replaced(drawn.variables, words)
    back = {word: name for name, word in words.items()}
    expected = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", 1):
            prompt = by_tokens.render(tokenizer, messages[:number], variables, prompt=True)
            text = by_tokens.render(tokenizer, messages[: number + 1], variables)
            if not text.startswith(prompt):  # reasoning of earlier turns is removed once an answer follows
                bare = by_tokens.without_reasoning(messages[:number])
                text = by_tokens.render(tokenizer, [*bare, message], variables)
                cut = by_tokens.render(tokenizer, bare, variables, prompt=True)
                text = prompt + text[len(cut) :] if text.startswith(cut) else ""
            shown = (prompt, text.removeprefix(prompt), message)
            expected.append(tuple(_replaced(part, back) for part in shown))
    found = {}
    for ids, mask in rows:
        for start, end in _segments(mask):
            found[_spelled(tokenizer, ids[:start])] = _spelled(tokenizer, ids[start:end]), ids[end - 1]
    report.turns += len(found)
    if sum(len(_segments(mask)) for _, mask in rows) != len(expected):
        yield f"{len(found)} trained turns instead of {len(expected)}"
    for prompt, generated, message in expected:
        if prompt not in found:
            yield f"no turn is trained after {prompt!r}"
            continue
        text, last = found[prompt]
        if last not in end_ids:
            yield f"{text!r} ends without an end-of-turn token"
        body = text.removesuffix(str(tokenizer.added_tokens_decoder[last]))
        # After the end of the turn, the template may write white space, and Phi-3's an end of the text. GLM's end of a
        # turn is the header of the next.
        rest = generated.removeprefix(text).replace(str(tokenizer.eos_token), "").strip()
        if rest and generated.rstrip() != body.rstrip():
            yield f"{text!r} instead of {generated!r}"
        for part in ("content", *by_tokens.REASONING):
            # DeepSeek-R1's prompt begins the reasoning.
            if (written := str(message.get(part) or "").removeprefix("<think>").strip()) and written not in body:
                yield f"{part} {written!r} is not in {text!r}"
        if not drawn.hostile and any(name in body for name in ends):
            yield f"{text!r} has an end-of-turn token inside"
    if drawn.hostile:
        plain_rows = chat.ConversationEncoder(tokenizer).rows(messages, variables)
        for (ids, _), (plain, _) in zip(rows, plain_rows, strict=True):
            controls = [[i for i in row if i in tokenizer.all_special_ids] for row in (ids, plain)]
            if controls[0] != controls[1]:
                yield f"control tokens {controls[0]} instead of {controls[1]}"


def _replaced(value: Any, texts: Mapping[str, str]) -> Any:
    """The value with other texts in place of some."""
    if isinstance(value, str):
        for old, new in texts.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, texts): _replaced(item, texts) for key, item in value.items()}
    return [_replaced(item, texts) for item in value] if isinstance(value, list) else value


def _by_tokens(tokenizer: Any, encoder: chat.ConversationEncoder, drawn: Drawn, report: Report) -> Iterator[str]:
    template = encoder.template
    ends = {"ids": template.end_ids, "answer": template.ends.answer, "call": template.ends.call}
    rows = encoder.rows(drawn.messages, drawn.variables)
    try:
        slow = by_tokens.rows(tokenizer, drawn.messages, drawn.variables, {**ends, "implied": template.ends.implied})
    except by_tokens.Refused:  # an answer merges with its prompt
        for ids, mask in rows:
            start = mask.index(1)
            if tokenizer.decode(ids) != tokenizer.decode(by_tokens.tokens(tokenizer, tokenizer.decode(ids))):
                yield f"row spells {tokenizer.decode(ids)!r}"
            if tokenizer.decode(ids[:start]) not in tokenizer.decode(ids):
                yield "context"
        return
    report.by_tokens += len(rows)
    if rows != slow:
        yield "rows differ from those by tokens"


def _trl_template(tokenizer: Any) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL does not know the template
        return None


def _by_trl(
    tokenizer: Any, training: str, drawn: Drawn, rows: Sequence[by_tokens.Masked], report: Report
) -> Iterator[str]:
    """Deviations from the texts that TRL's mask marks."""
    shown = by_tokens.shown(drawn.messages)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(shown, chat_template=training, **options, **drawn.variables)
    marked = _segments(encoded["assistant_masks"])
    theirs = [_spelled(tokenizer, encoded["input_ids"][a:b]) for a, b in marked]
    numbers = [n for n, message in enumerate(drawn.messages) if message["role"] == "assistant"]
    prompts = [by_tokens.render(tokenizer, drawn.messages[:n], drawn.variables, prompt=True) for n in numbers]
    segments = [(ids, a, b) for ids, mask in rows for a, b in _segments(mask)]
    found = {_spelled(tokenizer, ids[:a]): _spelled(tokenizer, ids[a:b]) for ids, a, b in segments}
    ours = [found.get(prompt, "") for prompt in prompts]
    if len(ours) != len(theirs):
        yield f"TRL marks {theirs}, not {ours}"
        return
    kinds = set()
    for our, their, prompt, number in zip(ours, theirs, prompts, numbers):
        kind = _compared(our, their, prompt, str(tokenizer.eos_token))
        content = drawn.messages[number]["content"].strip()
        if kind == "other" and number + 1 < len(drawn.messages) and (content in their or content in our):
            kind = "history"
        if kind == "other":
            yield f"TRL marks {their!r}, not {our!r}"
        kinds.add(kind)
    report.trl += kinds == {"same"}
    report.trl_history += "history" in kinds
    report.trl_no_end += "no end" in kinds and "history" not in kinds


def _compared(ours: str, theirs: str, prompt: str, eos: str) -> str:
    """same: equal but for a part of the prompt, a line break and an end of the text, which TRL marks too. no end: TRL
    does not mark the end of the turn."""
    if theirs.endswith((f"{ours}\n", f"{ours}\n{eos}")):
        theirs = theirs[: theirs.rindex(ours) + len(ours)]
    for kept, kind in ((ours, "same"), (ours[: max(0, ours.rfind("<"))].rstrip("\n"), "no end")):
        if kept and theirs.rstrip("\n" * (kind != "same")).endswith(kept):
            before = theirs.rstrip("\n" * (kind != "same")).removesuffix(kept)
            if prompt.endswith(before):
                return kind
    return "other"
