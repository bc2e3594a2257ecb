"""Keep the texts of a conversation from becoming control tokens.

A chat template joins the texts of a conversation and control tokens into one string, and a tokenizer turns each text
like "<|im_end|>" in that string into the control token, whoever wrote it. So the control tokens' names in a
conversation's texts are hidden before rendering, and encoded as ordinary text afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from align.data.shapes import DropRow, Message

_HIDDEN, _CONTROL = "\ufdd0", "\ufdd1"
"""First characters of a hidden name and of a control token's other name: Unicode noncharacters, which no text has."""
_FIRST = 0x4E00
"""The second character of a name is this one plus the number of the control token."""
TAGS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})
"""Tags of reasoning, which an assistant may write itself. In most tokenizers they are no special tokens."""
_NOT_TEXT = re.compile(f"[{_HIDDEN}{_CONTROL}\ud800-\udfff]")


class ControlTokens:
    """The control tokens of a tokenizer: hide their names in texts, and encode texts with hidden names.

    tokens: ids of the control tokens beside the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int] = ()):
        added, others = tokenizer.added_tokens_decoder, set(tokens)
        self._tokenizer = tokenizer
        self._names = [str(t) for i, t in added.items() if (t.special or i in others) and str(t)]
        self._number = {name: n for n, name in enumerate(self._names)}
        self._starts = tuple(sorted({name[0] for name in self._names}))
        self._all = alternatives(self._names)
        self._foreign = alternatives(name for name in self._names if name not in TAGS)

    def hide(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> tuple[Sequence[Message], Mapping[str, Any] | None, bool]:
        """(messages, template variables, True if there was a name to hide). Without one, the arguments themselves.

        An assistant's texts keep the tags of reasoning.
        """
        found = [self._contains(m, self._foreign if m.get("role") == "assistant" else self._all) for m in messages]
        in_variables = self._contains(variables, self._all)
        if not in_variables and not any(found):
            return messages, variables, False
        shown = [
            self._hide(m, self._foreign if m.get("role") == "assistant" else self._all) if hit else m
            for m, hit in zip(messages, found, strict=True)
        ]
        return shown, self._hide(variables, self._all) if in_variables else variables, True

    def hide_answer(self, text: str) -> str:
        """An assistant's text with hidden names."""
        return self._hide(text, self._foreign) if self._contains(text, self._foreign) else text

    def _contains(self, value: Any, names: re.Pattern[str]) -> bool:
        found = False
        for text in _texts(value):
            if not text.isascii() and _NOT_TEXT.search(text):
                raise DropRow("a text has a Unicode noncharacter or half of a surrogate pair")
            # The search for one character is many times faster than that for the names.
            found = found or (any(map(text.__contains__, self._starts)) and names.search(text) is not None)
        return found

    def _hide(self, value: Any, names: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return names.sub(lambda found: _HIDDEN + chr(_FIRST + self._number[found[0]]), value)
        if isinstance(value, Mapping):
            return {self._hide(key, names): self._hide(item, names) for key, item in value.items()}
        return [self._hide(item, names) for item in value] if isinstance(value, list | tuple) else value

    @staticmethod
    def has_hidden(text: str) -> bool:
        """True if the text has a hidden name."""
        return _HIDDEN in text

    def shown(self, text: str) -> str:
        """The text with its hidden names spelled out."""
        return re.sub(f"{_HIDDEN}(.)", lambda found: self._names[ord(found[1]) - _FIRST], text)

    def spelled(self, text: str) -> str:
        """The rendered text, with hidden names spelled out and control tokens under their other names."""
        return self.shown(self._all.sub(lambda found: _CONTROL + chr(_FIRST + self._number[found[0]]), text))

    def encode(self, text: str) -> Encoding:
        """Encoding of a rendered text: hidden names become ordinary text, the other names control tokens.

        Its characters are those of `spelled(text)`.
        """
        return self._renamed.encode(self.spelled(text), add_special_tokens=False)

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens."""
        reason = "a message contains the name of a control token, which this tokenizer cannot encode as text"
        if not self._tokenizer.is_fast:
            raise DropRow(reason)
        original: Tokenizer = self._tokenizer.backend_tokenizer
        names = {name: _CONTROL + chr(_FIRST + number) for name, number in self._number.items()}
        definition = json.loads(original.to_str())
        for token in definition["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = definition["model"]
        # The model may know the names too: an unknown token, or pieces of a unigram model.
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        elif "vocab" in model:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        renamed = Tokenizer.from_str(json.dumps(definition))
        renamed.no_padding()
        renamed.no_truncation()
        if any(renamed.token_to_id(new) != original.token_to_id(old) for old, new in names.items()):
            raise DropRow(reason)
        return renamed


def _texts(value: Any) -> list[str]:
    """All strings in a value, keys of objects too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        return []
    texts: list[str] = []
    for part in parts:
        texts += [part] if isinstance(part, str) else _texts(part)
    return texts


def alternatives(names: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches the longest of the names that begin at a position, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
