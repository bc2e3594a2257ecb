"""Frozen weights that several models of one process hold in memory once.

The policy of a PPO run with LoRA, its critic, its reference and its reward models often come from checkpoints that
differ in a few tensors. A frozen parameter whose values another model holds already becomes the same tensor in both.
Each model keeps its own modules, adapters and head, so no pass can run with the adapters of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.adapters import plain_name
from align.models.lora.overlay import Overlay
from align.models.quantized import Nf4, quantizable, quantize, quantized_weights
from align.models.weight_files import StoredTensor, stored_tensors, weight_files
from align.models.weights import (
    empty_model,
    find_pieces,
    load_generation_config,
    read_pieces,
    replace_parameter,
    stored_state,
)

HEAD = "score.weight"
"""A scorer's head is never shared: a critic trains its head, even if everything else is frozen."""


class SharedWeights:
    """Frozen parameters of the models that were offered, for models that are loaded later.

    shared: number of parameters whose memory later models share, counted once per model.
    loaded: number of parameters of all models loaded here.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, list[nn.Parameter]] = {}
        self._quantized: dict[str, list[Nf4]] = {}
        self.shared = self.loaded = 0

    def offer(self, model: Any) -> None:
        """Let later models share the frozen parameters of `model`, plain or wrapped by PEFT.

        Their values must not change as long as the other models are used.
        """
        quantized = quantized_weights(model)
        for name, parameter in model.named_parameters():
            if (weight := quantized.get(id(parameter))) is not None:
                if all(weight is not other for other in self._quantized.setdefault(plain_name(name), [])):
                    self._quantized[plain_name(name)].append(weight)
                continue
            known = self._frozen.setdefault(plain_name(name), [])
            held = {other.data_ptr() for other in known}
            if not parameter.requires_grad and parameter.data_ptr() not in held:
                known.append(parameter)

    def load(
        self,
        model_class: Any,
        config: Any,
        folder: Path,
        dtype: torch.dtype,
        overlay: Overlay | None = None,
        kept: Callable[[str], bool] | None = None,
    ) -> Any:
        """Load a model whose trunk will be frozen, in evaluation mode, as `from_pretrained` does.

        Parameters that were offered with the same values and dtype share their memory. A score head that the files lack
        is random. Raises `UserError` if other weights are missing.

        overlay: adapters that are added to the weights in `folder`.
        kept: as in `align.models.quantized.quantizable`. The weights that it returns are quantised as they are read, so
            at most one of them is in memory in `dtype`. None: no weight is quantised.
        """
        overlay = Overlay((), config) if overlay is None else overlay
        model = empty_model(model_class, config, folder, dtype)
        quantized = {} if kept is None else quantizable(model, kept)
        place = family_of(config).names(config).place
        pieces, _ = find_pieces(stored_state(model), stored_tensors(weight_files(folder)), place)
        for name, empty in list(model.named_parameters()):
            if name not in pieces and name != HEAD:
                raise UserError(f"{folder}: the weights of '{name}' are missing; copy the missing files.")
            if name in quantized:
                weight = self._in_4_bits(name, empty, pieces.pop(name), overlay)
                quantize(quantized[name], name.rpartition(".")[2], weight, empty.dtype)
                self.loaded += empty.numel()
                self.shared += empty.numel() * any(weight is other for other in self._quantized.get(name, ()))
                continue
            held = self._stored(name, empty, pieces[name]) if name in pieces and name not in overlay.changed else None
            parameter = nn.Parameter(torch.empty(empty.shape, dtype=empty.dtype) if held is None else held)
            if held is not None:
                del pieces[name]
            elif name not in pieces:
                nn.init.normal_(parameter, std=config.initializer_range)
            parameter.requires_grad = empty.requires_grad
            replace_parameter(model, empty, parameter)
        read_pieces(pieces, stored_state(model))
        overlay.apply_to(model, without=quantized)
        for name, parameter in model.named_parameters():
            if name in quantized:
                continue
            if name in overlay.changed:
                parameter.data = self._equal(name, parameter.data)
            self.loaded += parameter.numel()
            self.shared += parameter.numel() * any(parameter.data_ptr() == p.data_ptr() for p in self._offered(name))
        load_generation_config(model, folder)
        return model.eval()

    def _in_4_bits(
        self, name: str, empty: nn.Parameter, pieces: Sequence[tuple[StoredTensor, Place]], overlay: Overlay
    ) -> Nf4:
        """The weight in the files, with the adapters added, in 4 bits.

        If a model with the same values was offered, that model's object is returned.
        """
        dense = torch.empty(empty.shape, dtype=empty.dtype)
        for tensor, part in pieces:
            tensor.read_into(part.within(dense))
        overlay.apply(name, dense)
        weight = Nf4.of(dense)
        return next((other for other in self._quantized.get(name, ()) if other.equals(weight)), weight)

    def _offered(self, name: str) -> Sequence[nn.Parameter]:
        return () if name == HEAD else self._frozen.get(name, ())

    def _stored(self, name: str, empty: nn.Parameter, pieces: Sequence[tuple[StoredTensor, Place]]) -> Tensor | None:
        """An offered parameter whose values are those of the files."""
        for parameter in self._offered(name):
            held = parameter.detach()
            fits = held.shape == empty.shape and held.dtype == empty.dtype
            if fits and all(tensor.equals(part.within(held)) for tensor, part in pieces):
                return held
        return None

    def _equal(self, name: str, values: Tensor) -> Tensor:
        """An offered parameter that equals `values`; `values` if there is none."""
        for parameter in self._offered(name):
            held = parameter.detach()
            if held.dtype == values.dtype and torch.equal(held.to(values.device), values):
                return held
        return values
