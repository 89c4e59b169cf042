"""CUDA without a GPU: graphs that say they are on one, and a recorder that runs on the CPU.

In a pretended graph every value's fake tensor is on CUDA, and the constants are where they were: it
is lowered like a real one, and its program runs here.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.backends.eager.cuda.recorder import own_copy
from fxopt.backends.eager.cuda.replays import Recording
from fxopt.backends.eager.program import Function
from fxopt.graph_module import GraphModule


def pretend_cuda(
    graph: GraphModule, device: str = "cuda", *, but: Collection[str] = ()
) -> GraphModule:
    """Let a graph's values be on CUDA, but for the nodes of these names; return the graph."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with graph.info.fake_mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )

    for node in graph.graph.nodes:
        if "val" in node.meta and node.name not in but:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
    return graph


class PretendedRecorder:
    """Records by running; a replay computes from the same memory into the same memory.

    It fails where work is done out of turn.
    """

    def __init__(self, allowed: int = 10**6) -> None:
        self.allowed = allowed  # how many recordings, before CUDA would raise an error
        self.recorded = self.replayed = self.forgotten = 0
        self.busy = False
        self.user_settings = "TF32 off"
        self._in_turn = threading.Lock()

    def index(self) -> int:
        return -1

    def is_busy(self) -> bool:
        return self.busy

    def settings(self) -> Hashable:
        return self.user_settings

    def record(self, function: Function, inputs: Sequence[Any]) -> Recording:
        if self.recorded == self.allowed:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nhint")
            finally:
                raise RuntimeError("capture_end failed")  # as torch.cuda.graph does
        self.recorded += 1
        with torch.inference_mode(False), torch.no_grad():
            own = tuple(map(own_copy, inputs))
            outputs = function(*own)

        def replay() -> None:
            assert self._in_turn.locked()
            self.replayed += 1
            for memory, value in zip(outputs, function(*own), strict=True):
                if isinstance(memory, torch.Tensor):
                    memory.copy_(value)

        def forget() -> None:
            self.forgotten += 1

        return Recording(own, outputs, replay, forget)

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self._in_turn.acquire(blocking=False), "two turns at once"
        try:
            yield
        finally:
            self._in_turn.release()
