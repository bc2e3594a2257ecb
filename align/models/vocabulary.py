"""Add special tokens to a checkpoint: resize its embeddings in the safetensors files, without building the model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.models.family import family_of
from align.models.weight_files import stored_tensors, weight_files
from align.run.folder import replace_file, write_json

INDEX = "model.safetensors.index.json"


def added_token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """Add the special tokens that the tokenizer does not have; return the ids of the new ones, in order."""
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    ids = tokenizer.get_vocab()
    return [ids[token] for token in new]


def vocabulary_size(current: int, ids: Collection[int], multiple: int) -> int:
    """Number of embedding rows that `ids` need: `current` if they fit, otherwise the next multiple of `multiple`."""
    needed = max(ids, default=-1) + 1
    return current if needed <= current else -(-needed // multiple) * multiple


def vocabulary_tensors(config: Any) -> list[str]:
    """Published names of the tensors with one row per entry of the vocabulary; a tied head is included."""
    larger = copy.deepcopy(config)
    larger.vocab_size += 1
    shapes = family_of(config).published_shapes
    grown = shapes(larger)
    return [name for name, shape in shapes(config).items() if grown[name] != shape]


@torch.no_grad()
def resized(rows: Tensor, size: int, known: Collection[int]) -> Tensor:
    """Rows [size, ...]: those with the ids `known` are kept; the others, old or new, are the mean of the kept rows.

    Rows beyond the tokenizer's ids were never trained, so they are not a better initial value for a new token.
    """
    index = torch.tensor(sorted(known))
    mean = rows[index].float().mean(0).to(rows.dtype)
    result = mean.expand(size, *rows.shape[1:]).clone()
    result[index] = rows[index]
    return result


def resize_vocabulary(folder: Path, config: Any, size: int, known: Collection[int]) -> None:
    """Resize the embeddings of the checkpoint in `folder` to `size` rows, and set `vocab_size` in its config.json.

    Files of the folder that are links are replaced by files, so the checkpoint that they link to does not change.

    config: the checkpoint's configuration.
    known: ids of the tokens that the model was trained with; see `resized`.
    """
    names = set(vocabulary_tensors(config))
    by_file: dict[Path, set[str]] = {}
    for tensor in stored_tensors(weight_files(folder)):
        if tensor.name in names:
            by_file.setdefault(tensor.file, set()).add(tensor.name)
    for file, found in by_file.items():
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        weights = load_file(file)
        for name in found:
            weights[name] = resized(weights[name], size, known)
        replace_file(file, partial(save_file, weights, metadata=metadata))
    index = folder / INDEX
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        total = sum(math.prod(t.shape) * t.dtype.itemsize for t in stored_tensors(weight_files(folder)))
        write_json(index, {**values, "metadata": {**values.get("metadata", {}), "total_size": total}})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**values, "vocab_size": size})
