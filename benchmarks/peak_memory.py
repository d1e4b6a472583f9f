"""Counts the bytes of all live tensors as they are created."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Bytes of all live storages, and their peak since the last `restart`; real tensors count only on request."""

    def __init__(self, *, fake: bool = True):
        super().__init__()
        self.kind = FakeTensor if fake else torch.Tensor
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        self.watch(output)
        return output

    def __enter__(self) -> "PeakMemory":
        # FSDP frees and allocates its buffers through this, which no dispatch mode sees
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    @property
    def _resized(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage)
            return storage

        return resize

    def watch(self, tensors: Any) -> None:
        for x in tree_iter(tensors):
            if isinstance(x, DTensor):
                x = x.to_local()
            if isinstance(x, self.kind) and x.device.type != "meta" and x.layout == torch.strided:
                self._count(x.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._free, key)
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of whose memory only what it returns counts, as if it were compiled."""

        def run(*arguments: Any) -> Any:
            before = self.peak
            outputs = function(*arguments)
            self.peak = max(before, self.now)
            return outputs

        return run

    def restart(self) -> int:
        """Peak bytes since the last call."""
        peak, self.peak = self.peak, self.now
        return peak
