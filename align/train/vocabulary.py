"""Tokenizers of checkpoints: load them, check that they fit the model's vocabulary, add special tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.data.chat import prepare_chat_template
from align.errors import UserError
from align.models.family import load_config
from align.models.vocabulary import added_token_ids, resize_vocabulary, vocabulary_size
from align.run.folder import replace_file
from align.run.refusals import tokenizer_problem


def read_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises `UserError` if there is none, or if it has ids beyond `vocab_size`.

    A model may have more embeddings than its tokenizer has tokens. Such a padded id has no text: sampled, it decodes to
    the empty string.
    """
    if problem := tokenizer_problem(folder):
        raise UserError(f"{folder}: {problem}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for files that it cannot use
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again.") from error
    entries = max(tokenizer.get_vocab().values(), default=-1) + 1
    if entries > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {entries} entries, but the model's vocabulary has {vocab_size}; copy the "
            "tokenizer that the model was trained with."
        )
    set_pad_token(tokenizer)
    prepare_chat_template(tokenizer)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token of a tokenizer without one to a special token: end of sequence, if there is such a token.

    Any special token will do. Padding is masked by its position, never by its id, so an end-of-sequence token that is
    also the padding token stays in the loss and in the attention.
    """
    if tokenizer.pad_token is not None:
        return
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    token = next((t for t in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *added) if t), None)
    if token is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no special token; set pad_token and eos_token in "
            "tokenizer_config.json."
        )
    tokenizer.pad_token = token


def train_padding_row(model: nn.Module) -> None:
    """Let the embedding of the padding token have a gradient.

    It may be the end-of-sequence token, which is not padding inside a conversation. Padding itself has no gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def add_tokens(folder: Path, tokens: Sequence[str], multiple: int) -> None:
    """Add special tokens to the checkpoint in `folder`, whose files may be links: tokenizer, embeddings, config.json.

    multiple: if the embeddings need more rows, their number is rounded up to a multiple of this.
    """
    config = load_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = [number for number in tokenizer.get_vocab().values() if number < config.vocab_size]
    new = added_token_ids(tokenizer, tokens)
    if not new:
        return
    resize_vocabulary(folder, config, vocabulary_size(config.vocab_size, new, multiple), known)
    with TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for file in Path(made).iterdir():
            replace_file(folder / file.name, partial(shutil.copyfile, file))
