"""A pretend GPU: tensors whose values are on the CPU, but which count as tensors on `cuda:0`.

Inside `with PretendDevice() as device:` the code under test sees `cuda:0` as the device of every tensor, and
takes its CUDA branches. Every operation runs on the CPU, and the device counts the events that it would cause on a GPU:

    mixes      operations that PyTorch refuses because one tensor is on the GPU and another on the CPU
    syncs      calls in which the host waits for the GPU: a value or a shape is read, or a tensor is copied to the host
    uploads    copies from the host; `blocking_uploads` counts those for which the host waits, because their source is
               not pinned or they are not `non_blocking`
    launches   operations that compute on the GPU, at least one kernel each; views and allocations launch none

Not covered: how the autocast rules of a GPU differ from those of a CPU, CUDA streams, Triton kernels, and how many
kernels one operation launches.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
WAITS = {
    "aten::_local_scalar_dense": 1,
    "aten::nonzero": 1,
    "aten::masked_select": 1,
    "aten::bincount": 2,  # the smallest and the largest value
    "aten::equal": 1,
    "aten::_unique2": 1,
    "aten::unique_dim": 1,
    "aten::unique_consecutive": 1,
}
"""{operation on CUDA tensors: number of times that the host waits for the GPU}."""
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
COPIES = ("aten::copy_", "aten::_foreach_copy_")
WITHOUT_KERNEL = ("aten::_unsafe_view", "aten::_local_scalar_dense", "aten::lift_fresh", "aten::set_", "aten::resize_")


class PretendTensor(Tensor):
    """A tensor on the pretend GPU. values: the same tensor on the CPU."""

    values_on_cpu: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cpu",  # autograd needs a device that exists; Python code sees CUDA
        )
        tensor.values_on_cpu = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretend tensor outside of its device's `with` block")

    def __repr__(self) -> str:
        return f"PretendTensor({self.values_on_cpu})"


@dataclass
class Counted:
    """Counts of one pass; the keys are (operation, file:line)."""

    mixes: Counter[tuple[str, str]] = field(default_factory=Counter)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    blocking_uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[tuple[str, str]] = field(default_factory=Counter)

    def totals(self) -> dict[str, int]:
        return {name: counter.total() for name, counter in vars(self).items()}


class PretendDevice:
    """The device; its counts are in `counted`."""

    def __init__(self) -> None:
        self.counted = Counted()
        # True if tensors that the current Python call creates are on the device; None outside of Python calls.
        self.creates: bool | None = None

    def __enter__(self) -> PretendDevice:
        self._entered = ExitStack()
        self._entered.enter_context(patch.object(torch.cuda, "_lazy_init", lambda *_: None))
        # To C++ the pretend tensors are on the CPU, so the CPU's autocast acts on them.
        for module, name in (
            (torch, "autocast"),
            (torch, "is_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch.amp, "is_autocast_available"),
        ):
            self._entered.enter_context(patch.object(module, name, _of_the_cpu(getattr(module, name))))
        # vLLM's CPU worker replaces this method for the whole process.
        pin_memory = torch._C.TensorBase.pin_memory  # type: ignore[attr-defined]  # no stub
        self._entered.enter_context(patch.object(Tensor, "pin_memory", pin_memory))
        grouped = _by_device(torch._C._group_tensors_by_device_and_dtype)
        self._entered.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        self._entered.enter_context(_Operations(self))
        self._entered.enter_context(_PythonCalls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count from zero in this block."""
        self.counted = counted = Counted()
        yield counted

    # --- moving things without counting ---------------------------------------------------------------------------

    def tensor(self, values: Tensor) -> Tensor:
        """A CPU tensor's values as a tensor of this device."""
        return PretendTensor(values.detach())

    def module(self, module: nn.Module) -> Any:
        """Move a module's parameters and buffers; tied parameters stay tied."""
        moved: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    new = moved.get(id(parameter))
                    if new is None:
                        new = nn.Parameter(PretendTensor(parameter.detach()), parameter.requires_grad)
                        new.__dict__.update(parameter.__dict__)
                        moved[id(parameter)] = new
                    part._parameters[name] = new
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = PretendTensor(buffer)
        return module

    # --- counting ---------------------------------------------------------------------------------------------------

    def copied(self, name: str, *, to_device: bool, waits: bool = True) -> None:
        key = (name, _place())
        if not to_device:
            self.counted.syncs[key] += 1
            return
        self.counted.uploads[key] += 1
        if waits:
            self.counted.blocking_uploads[key] += 1

    def operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation on the CPU and count it."""
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        on_device = bool(inputs)
        if not tensors:
            # Without tensor inputs, the Python call in progress decides. If there is none, a backward pass creates its
            # tensors on the GPU.
            in_backward = torch._C._current_autograd_node() is not None
            on_device = in_backward if self.creates is None else self.creates
        if on_device:
            if name in COPIES:
                on_device = self._count_copy(name, args)
            else:
                self._count(func, name, args, kwargs, tensors)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        with torch._C.DisableTorchFunction():
            on_cpu = _CUDA_ONLY.get(func, func)(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if inputs and torch.Tag.inplace_view in func.tags:  # changes the shape of the pretend tensor too
            with no_dispatch():
                func(*args, **kwargs)
        known = {id(tensor.values_on_cpu): tensor for tensor in inputs}
        return tree_map(lambda out: self._wrap(out, known) if on_device else known.get(id(out), out), on_cpu)

    def _wrap(self, out: Any, known: dict[int, PretendTensor]) -> Any:
        if isinstance(out, Tensor):
            return known[id(out)] if id(out) in known else PretendTensor(out)
        return out

    def _count_copy(self, name: str, args: Any) -> bool:
        """Count `target.copy_(source)`; returns True if the target is on the device."""
        targets, sources = ([x] if isinstance(x, Tensor) else list(x) for x in args[:2])
        for target, source in zip(targets, sources, strict=True):
            here = isinstance(target, PretendTensor)
            if here != isinstance(source, PretendTensor):
                self.copied(name, to_device=here)
            elif here:
                self.counted.launches[name, _place()] += 1
        return isinstance(targets[0], PretendTensor)

    def _count(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        counted, key = self.counted, (name, _place())
        strangers = [t for t in tensors if not isinstance(t, PretendTensor)]
        # Pointwise operations accept CPU scalars together with CUDA tensors.
        scalars = torch.Tag.pointwise in func.tags or name in INDEXING[1:] or "fill" in name
        refused = [t for t in strangers if t.dim() or not scalars]
        if name in INDEXING and isinstance(args[0], PretendTensor):
            indices = [i for i in args[1] if i is not None]
            for index in indices:
                if not isinstance(index, PretendTensor):  # allowed; PyTorch copies it
                    refused = [t for t in refused if t is not index]
                    self.copied(f"{name} with an index on the CPU", to_device=True)
            filled = name != "aten::index" and not isinstance(args[2], PretendTensor) and args[2].numel() == 1
            masks = sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
            if masks and not filled:  # one value for a mask is a `masked_fill`, which needs no count
                counted.syncs[f"{name} with a mask", key[1]] += masks
        if refused:
            counted.mixes[key] += 1
        if name in WAITS:
            counted.syncs[key] += WAITS[name]
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            counted.syncs[key] += 1
        if not (_is_view(func) or name in WITHOUT_KERNEL or "empty" in name):
            counted.launches[key] += 1


class _Operations(TorchDispatchMode):
    """Pass every operation to the device."""

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.operation(func, args, kwargs or {})


class _PythonCalls(TorchFunctionMode):
    """Report the pretend device to Python code that reads a tensor's device, and apply `device` arguments."""

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        here = isinstance(first, PretendTensor)
        if func in _ANSWERS:
            return _ANSWERS[func](here, func, first)
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy") and here:
            self.device.copied(name, to_device=False)
            return getattr(first.values_on_cpu.detach(), name)(*args[1:], **kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            pinned = first.clone()
            pinned.pretends_pinned = True
            return pinned
        wanted = kwargs.pop("device", None)
        on_device = any(isinstance(leaf, PretendTensor) for leaf in tree_leaves((args, kwargs)))
        if wanted is None:
            return self._run(func, args, kwargs, on_device)
        is_cuda = torch.device(wanted).type == "cuda"
        if func in (torch.tensor, torch.as_tensor):
            made = self._run(func, args, kwargs, False)
            return self._to(Tensor.to, made, CUDA) if is_cuda else made
        if on_device and not is_cuda:
            raise NotImplementedError(f"{name} of a pretend tensor with device={wanted}")
        return self._run(func, args, kwargs, is_cuda)

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
        """`Tensor.backward` with this mode enabled, so that it applies to backward functions written in Python."""
        if gradient is None:
            gradient = self._run(torch.ones_like, (tensor,), {}, True)
        keep, create = options.get("retain_graph"), bool(options.get("create_graph"))
        with self:
            _engine_run_backward(
                (tensor,),
                (gradient,),
                create if keep is None else keep,
                create,
                tuple(options.get("inputs") or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], creates: bool) -> Any:
        before, self.device.creates = self.device.creates, creates
        try:
            return func(*args, **kwargs)
        finally:
            self.device.creates = before

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        here = isinstance(tensor, PretendTensor)
        if func is not Tensor.to:
            wanted, kwargs = CUDA if func is Tensor.cuda else torch.device("cpu"), {}
            dtype, non_blocking = None, False
        elif args and isinstance(args[0], Tensor):
            wanted = CUDA if isinstance(args[0], PretendTensor) else torch.device("cpu")
            dtype, non_blocking = args[0].dtype, False
        else:
            given = {k: v for k, v in kwargs.items() if k != "copy"}
            wanted, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **given)
        if wanted is not None and (wanted.type == "cuda") != here:
            waits = not (non_blocking and getattr(tensor, "pretends_pinned", False))
            self.device.copied("copy", to_device=not here, waits=waits)
            tensor = _Move.apply(tensor)
        elif kwargs.get("copy"):
            tensor = self._run(torch.clone, (tensor,), {}, here)
        return tensor if dtype in (None, tensor.dtype) else self._run(Tensor.to, (tensor, dtype), {}, here)


class _Move(torch.autograd.Function):
    """Move a tensor to the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, PretendTensor):
            return tensor.values_on_cpu.clone()
        return PretendTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Move.forward(ctx, grad)


_ANSWERS = {
    Tensor.device.__get__: lambda here, get, tensor: CUDA if here else get(tensor),
    Tensor.is_cuda.__get__: lambda here, get, tensor: here,
    Tensor.is_cpu.__get__: lambda here, get, tensor: not here,
    Tensor.get_device: lambda here, get, tensor: 0 if here else -1,
}


def _of_the_cpu(function: Any) -> Any:
    """`function` with "cpu" in place of "cuda" in its positional arguments."""
    return lambda *args, **kwargs: function(*("cpu" if arg == "cuda" else arg for arg in args), **kwargs)


def _by_device(group: Any) -> Any:
    """The grouping that optimizers and gradient norms use, with the pretend device in its keys."""

    def run(lists: list[list[Tensor]], with_indices: bool = False) -> dict[Any, Any]:
        found = group(lists, with_indices)
        return {
            (CUDA if isinstance(lists_of_key[0][0], PretendTensor) else device, dtype): (lists_of_key, indices)
            for (device, dtype), (lists_of_key, indices) in found.items()
        }

    return run


def _in_wider_type(product: Any) -> Any:
    """A matrix product with `out_dtype`, which the CPU lacks."""

    def run(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        *tensors, dtype = args
        result = product(*(tensor.to(dtype) for tensor in tensors), **kwargs)
        return result if out is None else out.copy_(result)

    return run


_CUDA_ONLY = {
    operation: _in_wider_type(product)
    for product in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    for operation in (product.dtype, product.dtype_out)
}


def _unwrap(leaf: Any) -> Any:
    if isinstance(leaf, PretendTensor):
        return leaf.values_on_cpu
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _is_view(func: Any) -> bool:
    """True if the operation returns a view of an input and does not write to that input."""
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _place() -> str:
    """file:line of the innermost frame in this project, outside of this file."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and file != __file__ and ".venv" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
