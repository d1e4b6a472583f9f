"""Runs a step on the fake device and notes what would make the host wait, the copies, the kernels and the bytes.

`library.load()` before torch is imported; then, in `fake_cuda()`, models whose tensors are FakeTensors on "cuda".
"""

import collections
import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


CUDA = torch.device("cuda", 0)
# operations that start no kernel
_VIEWS = {"view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "detach"}
_VIEWS |= {"split", "split_with_sizes", "chunk", "permute", "alias", "as_strided", "reshape", "unbind", "lift_fresh"}
_VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "_reshape_alias", "set_", "is_same_size", "diagonal"}
_VIEWS |= {"narrow", "flatten", "unflatten", "resize_", "new_empty_strided"}
# operations whose result's size the host has to ask for
_ASKING = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "repeat_interleave"}
_MATRIX = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "_scaled_mm", "convolution", "convolution_backward"}


@dataclass
class Trace:
    """What a phase of a step did.

    Args:
        waits: by (what the host waited for, source line).
        pageable: largest bytes copied to the device from memory that is not pinned, by source line.
        kernels, bytes: by operation.
        lines: bytes by source line.
        work: (operation, FLOP, bytes) of each kernel; attention's FLOP, which depend on lengths, are not known here.
        fused: calls of fused functions, by function and arguments, until `add_fused` counts their kernels.
    """

    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    pageable: dict[str, int] = field(default_factory=dict)
    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    lines: collections.Counter[str] = field(default_factory=collections.Counter)
    work: list[tuple[str, float, int]] = field(default_factory=list)
    fused: collections.Counter[Any] = field(default_factory=collections.Counter)


class Watch(TorchDispatchMode):
    """Host tensors are real and device tensors fake; a number that is read from the device is 0.

    Args:
        root: source files below it are named in a trace.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.root = str(root)
        self.traces: dict[str, Trace] = collections.defaultdict(Trace)
        self.phase = ""
        self._is_within = False
        self._places: dict[str, int | None] = {}
        self._pinned: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def within_a_kernel(self) -> Iterator[None]:
        """Context whose operations start no kernel of their own."""
        self._is_within = True
        try:
            yield
        finally:
            self._is_within = False

    @property
    def trace(self) -> Trace:
        return self.traces[self.phase]

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in what counts as pinned memory, as a loader gives it."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        copy._keeps = storage  # type: ignore[attr-defined]
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):  # it asks again with what this process holds
            return NotImplemented
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if isinstance(x, FakeTensor) and x.device.type == "cuda"]
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name == "is_pinned":
            return tensors[0].untyped_storage().data_ptr() in self._pinned
        if name == "_pin_memory":
            with unset_fake_temporarily():
                return self.pinned(tensors[0])
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if on_device:
            self._note_waits(func, name, args, kwargs, tensors, target)
        if name == "_local_scalar_dense" and on_device:
            return 0.0 if tensors[0].is_floating_point() else 0
        if name == "equal" and on_device:
            return True
        if name == "_to_copy" and on_device and target is not None and target.type == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        to_device = target is not None and target.type == "cuda"
        if name == "_to_copy" and not on_device and to_device:
            return self._copied(tensors[0], kwargs)
        if not on_device and not to_device:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if name not in _VIEWS and not self._is_within:
            self._note_kernel(name, on_device, [x for x in tree_iter(out) if isinstance(x, torch.Tensor)])
        return out

    def _note_waits(self, func: Any, name: str, args: Any, kwargs: Any, tensors: Any, target: Any) -> None:
        if name == "_local_scalar_dense":
            self._wait("item")
        elif name in _ASKING and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            self._wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self._wait(f"{name} by mask")
        elif name == "_to_copy" and target is not None and target.type == "cpu":
            self._wait("copy to the host")
        elif name == "copy_" and any(x.device.type == "cpu" for x in tensors):
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self._wait("blocking copy")
            elif args[1].device.type == "cpu":
                self._note_pageable(args[1])

    def _copied(self, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if tensor.numel():  # without numbers nothing is copied
            if kwargs.get("non_blocking"):
                self._note_pageable(tensor)
            else:
                self._wait("blocking copy to the device")
        self.trace.kernels["copy to the device"] += 1
        self.trace.bytes["copy to the device"] += tensor.nbytes
        dtype = kwargs.get("dtype") or tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=CUDA)

    def _note_pageable(self, tensor: torch.Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in self._pinned:
            line = self._line()
            self.trace.pageable[line] = max(tensor.nbytes, self.trace.pageable.get(line, 0))

    def _wait(self, what: str) -> None:
        self.trace.waits[f"{what} at {self._line()}"] += 1

    def _note_kernel(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        size = sum(_held(x) for x in (*inputs, *outputs))
        self.trace.kernels[name] += 2 if name == "index_add" else 1  # it copies first
        self.trace.bytes[name] += size
        self.trace.lines[self._line()] += size
        flops = _matrix_flops(name, inputs, outputs) if name in _MATRIX and len(inputs) >= 2 else 0.0
        self.trace.work.append((name, flops, size))

    def _line(self) -> str:
        """The innermost line of ours, else of Transformers, that is being run."""
        found: dict[int, str] = {}
        frame: FrameType | None = sys._getframe()  # traceback's stacks read the files: ten times as slow
        while frame is not None and 0 not in found:
            place = self._place(frame.f_code.co_filename)
            if place is not None and place not in found:
                found[place] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back
        if found:
            return found[min(found)]
        return "autograd"

    def _place(self, file: str) -> int | None:
        """0 for a file of ours, 1 for one of Transformers, 2 for an optimizer of torch; None for others."""
        if file not in self._places:
            parts = (
                self.root in file and "site-packages" not in file,
                "/transformers/" in file,
                "/torch/optim/" in file,
            )
            is_own = "fake_cuda" in file
            self._places[file] = None if is_own or True not in parts else parts.index(True)
        return self._places[file]


def _held(tensor: torch.Tensor) -> int:
    """Bytes that a tensor really has: an expanded one repeats what it holds."""
    number = tensor.numel()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride == 0 and length > 1:
            number //= length
    return number * tensor.element_size()


def _matrix_flops(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    if name == "convolution":
        return 2.0 * outputs[0].numel() * inputs[1][0].numel()
    if name == "convolution_backward":
        return 4.0 * inputs[0].numel() * inputs[2][0].numel()
    left = inputs[-2] if name in ("addmm", "addmm_", "baddbmm") else inputs[0]
    right = inputs[-1] if name in ("addmm", "addmm_", "baddbmm") else inputs[1]
    return 2.0 * left.numel() * right.shape[-1]


@contextlib.contextmanager
def fake_cuda(watch: Watch, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Context in which code sees one GPU of this capability, and all its tensors are fake."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor would make its numbers on the device
    cuda = torch.cuda
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cuda, "is_available", lambda: True),
            (cuda, "device_count", lambda: 1),
            (cuda, "current_device", lambda: 0),
            (cuda, "get_device_capability", lambda *_: capability),
            (cuda, "is_bf16_supported", lambda *_, **__: True),
            (cuda, "is_initialized", lambda: False),
            (cuda, "set_device", lambda *_: None),
            (cuda, "Stream", torch.cpu.Stream),
            (cuda, "Event", torch.cpu.Event),
            (cuda, "current_stream", torch.cpu.current_stream),
            (cuda, "stream", torch.cpu.stream),
            (cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        try:
            with mode, watch:
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
