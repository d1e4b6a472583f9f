"""Counts the kernels and bytes of fused functions by PyTorch's own Inductor: the schedule that it makes for a GPU.

Neither a GPU nor Triton is needed: a schedule says which operations share a kernel, and what the kernel reads and
writes; only the code that would be generated from it needs more. A kernel is assumed to read each of its inputs once.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from watch import CUDA, Watch


# an H100's, as torch reports them; they decide how reductions are split
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    total_memory=int(79.1 * 2**30),
    gcnArchName="",
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 * 2**20,
)


class Like(NamedTuple):
    """A tensor of which only the outside matters."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Fused:
    """A function that counts as its compiled form: the watch notes its calls, and not the operations within.

    What the host waits for within would still be found.
    """

    def __init__(self, function: Callable[..., Any], watch: Watch):
        self.function, self.watch = function, watch

    def __call__(self, *arguments: Any) -> Any:
        def like(x: Any) -> Any:
            return Like(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

        self.watch.trace.fused[self.function, tuple(map(like, arguments))] += 1
        with self.watch.within_a_kernel():
            return self.function(*arguments)


@cache
def scheduled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Bytes that each kernel of the function's schedule moves."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda *_: _PROPERTIES),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: _PROPERTIES)),
            (torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None),
            (torch._inductor.scheduler, "has_triton", lambda *_: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        with mode:
            tensors = [_made(x) for x in arguments]
            graph_module = make_fx(_of_tensors(function, tensors), decomposition_table=select_decomp_table())(
                *(x for x in tensors if isinstance(x, torch.Tensor))
            )
        given = [x for x in tensors if isinstance(x, torch.Tensor)]
        graph = GraphLowering(graph_module, given, shape_env=mode.shape_env, is_inference=True)
        for context in (V.set_fake_mode(mode), DebugContext(), V.set_graph_handler(graph)):
            stack.enter_context(context)
        graph.run(*given)
        graph._update_scheduler()
        _, nodes, _ = graph.count_bytes()
        return tuple(int(node.get_read_write_buffers_sizes()) for node, _ in nodes)


def _made(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=CUDA) if isinstance(x, Like) else x


def _of_tensors(function: Callable[..., Any], arguments: list[Any]) -> Callable[..., Any]:
    """The function of its tensors alone."""

    def call(*tensors: torch.Tensor) -> Any:
        left = iter(tensors)
        return function(*(next(left) if isinstance(x, torch.Tensor) else x for x in arguments))

    return call


def add_fused(watch: Watch) -> None:
    """Put what the fused functions take into the watch's traces. Outside the fake device."""
    for trace in watch.traces.values():
        for (function, arguments), number in trace.fused.items():
            for size in scheduled(function, arguments):
                name = f"fused {function.__name__}"
                trace.kernels[name] += number
                trace.bytes[name] += number * size
                trace.work += [(name, 0.0, size)] * number
        trace.fused.clear()


def least(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Bytes of the function's inputs, of what it returns, and of the inputs that it changes."""
    tensors = [
        torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta") if isinstance(x, Like) else x
        for x in arguments
    ]
    inputs = [x for x in tensors if isinstance(x, torch.Tensor)]
    versions = [x._version for x in inputs]
    outputs = function(*tensors)
    changed = [x for x, version in zip(inputs, versions, strict=True) if x._version != version]
    found = outputs if isinstance(outputs, tuple) else [outputs]
    return sum(x.nbytes for x in (*inputs, *found, *changed) if isinstance(x, torch.Tensor))
