"""Conversion of the released tokenizer (hy.tiktoken) to a fast tokenizer, with a template that marks assistant turns.

The released tokenizer is byte-level BPE on text in NFC. Each digit is a token, and the ids of 209 special tokens follow
the last rank. The vocabulary file is Tencent's and not part of this project.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from align.data.tiktoken_file import read_ranks

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces that BPE does not merge across: contractions, words, single digits, punctuation, white space."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"] + [
    f"<|extra_{number}|>" for number in range(204)
]

CHAT_TEMPLATE = (
    "{%- set headed = messages and messages[0]['content'] != '' -%}"
    "{%- for message in messages -%}"
    "{%- set text = message['content'] -%}"
    "{%- if loop.first and message['role'] == 'system' and headed -%}"
    "{{- '<|startoftext|>' + text + '<|extra_4|>' -}}"
    "{%- elif message['role'] == 'user' -%}"
    # Like the released template, write <|startoftext|> twice before a user turn that follows an empty first message.
    "{%- if loop.index0 != 1 or not headed -%}{{- '<|startoftext|>' -}}{%- endif -%}"
    "{%- if loop.index0 == 1 and not headed -%}{{- '<|startoftext|>' -}}{%- endif -%}"
    "{{- text + '<|extra_0|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- text + '<|eos|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- text -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""Renders like the released template: STARTOFTEXT system EXTRA_4 user EXTRA_0 assistant EOS."""


def convert_tokenizer(source: Path, target: Path) -> PreTrainedTokenizerFast:
    """Read a hy.tiktoken file and write tokenizer.json, tokenizer_config.json and the chat template to `target`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(read_ranks(source)),
        bos_token="<|startoftext|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131_072,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    return tokenizer


def build_tokenizer(ranks: dict[bytes, int], special_tokens: list[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Byte-level BPE tokenizer that merges in tiktoken's order: first the pair whose merged token has the lowest
    rank."""
    letters = _byte_letters()

    def spell(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    splits = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    known = [(left, right) for left, right in splits if left in ranks and right in ranks]
    known.sort(key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]], ranks[pair[1]]))
    merges = [(spell(left), spell(right)) for left, right in known]
    model = BPE({spell(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return tokenizer


def _byte_letters() -> list[str]:
    """The printable letter that represents each byte in `tokenizers` (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
