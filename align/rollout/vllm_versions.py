"""The differences between the versions of vLLM that align supports: 0.32 and 0.33.

`make compat` checks this package against the Python files of each version (tests/compat).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from align.rollout.sync.stream import Bucket


def serve_parser() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """vLLM's `make_arg_parser` and `validate_parsed_serve_args`."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    return make_arg_parser, validate_parsed_serve_args


def weight_source(bucket: Bucket) -> Any:
    """vLLM `WeightSource` over the tensors of one bucket.

    In 0.33 `metadata` is a cached property that must never change, and `iter_full` iterates; in 0.32 these are the
    method `metadata` and `__iter__`.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def declared(_: Any) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket]

    class BucketSource(WeightSource):
        metadata: Any = cached_property(declared) if isinstance(vars(WeightSource)["metadata"], property) else declared

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return iter(bucket)

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(bucket)

    return BucketSource()
