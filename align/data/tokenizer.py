"""Train a byte-level BPE tokenizer on the text of a recipe's sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.config.parts import Source
from align.data.chat import DEFAULT_TEMPLATE, TURN_END, TURN_START
from align.data.mixture import mixture_rows
from align.data.shapes import DropRow, text
from align.errors import UserError

PAD = "<|pad|>"


def corpus(sources: Sequence[Source], *, seed: int, stage_dirs: Mapping[str, Path] | None = None) -> Iterator[str]:
    """Plain text of the rows of a mixture, of any format, in bounded memory. Rows without text are skipped."""
    for row in mixture_rows(sources, seed=seed, stage_dirs=stage_dirs):
        try:
            yield text(row)
        except DropRow:
            continue


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with at most `vocab_size` entries; fewer if the text has too few pairs to merge.

    Special tokens: padding (id 0), `<|im_start|>` (1), and `<|im_end|>` (2), which ends turns and documents. Encoding
    and decoding a text gives the same text. The same texts in the same order give the same vocabulary. Raises
    `UserError` if there is no text.
    """
    has_text = False

    def noted() -> Iterator[str]:
        nonlocal has_text
        for document in texts:
            has_text = has_text or bool(document.strip())
            yield document

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(noted(), trainer)
    if not has_text:
        raise UserError("model.tokenizer.data: the sources have no text to train on; set other sources.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=DEFAULT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
