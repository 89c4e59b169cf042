"""All that recording and replaying asks of CUDA: streams, memory, graphs.

Written after PyTorch's own uses (torch/cuda/graphs.py, torch/_inductor/cudagraph_trees.py), whose
comments tell the pitfalls:
    a run on the recording's stream goes first, three times, so that libraries make what they need;
    cuBLAS's workspaces are given up before and after, so that a recording has one in its own pool,
    which nobody else is given;
    other threads may go on using CUDA ("thread_local"), but one process records one graph at a
    time;
    graphs share a pool of memory where none runs while another does: those of one recorder, which
    take turns, and no others;
    a pool is shared only by recordings on one stream, so a recorder keeps its own.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxopt.backends.eager.cuda.replays import Recording
from fxopt.backends.eager.program import Function

_WARM_UPS = 3  # as torch.cuda.make_graphed_callables
_one_at_a_time = threading.Lock()


class CudaRecorder:
    """Records CUDA graphs on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()
        self._last: torch.cuda.Stream | None = None  # whose turn it was

    def index(self) -> int:
        """Return what `Tensor.get_device` says of tensors on this device."""
        return self.device.index

    def is_busy(self) -> bool:
        """Whether the caller is recording a CUDA graph of its own."""
        return torch.cuda.is_current_stream_capturing()

    def settings(self) -> Hashable:
        """Return what the user may switch that decides which kernels a run starts."""
        precision = torch._C._get_fp32_precision_getter  # TF32, by operation
        return (
            precision("cuda", "matmul"),
            precision("cuda", "conv"),
            precision("cuda", "rnn"),
            torch.are_deterministic_algorithms_enabled(),
        )

    def record(self, function: Function, inputs: Sequence[Any]) -> Recording:
        """Record one run on copies of the inputs; RuntimeError where CUDA does not allow it."""
        device, stream = self.device, self._stream
        with (
            _one_at_a_time,
            torch.cuda.device(device),
            torch.inference_mode(False),  # later calls, outside of it, write to the copies, too
            torch.no_grad(),
        ):
            current = torch.cuda.current_stream()
            copies = tuple(map(own_copy, inputs))
            stream.wait_stream(current)
            # the outer `stream`: an error at the end leaves that of torch.cuda.graph entered
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(*copies)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    with torch.cuda.graph(
                        graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        outputs = function(*copies)
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
            current.wait_stream(stream)

        def forget() -> None:
            torch.cuda.synchronize(device)
            graph.reset()

        return Recording(copies, outputs, graph.replay, forget)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let work inside follow, on the GPU, that of the turn before."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last is not None and self._last != stream:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
                self._last = stream


def own_copy(value: Any) -> Any:
    """Return memory for an input, laid out like it where that has each element once."""
    return torch.empty_like(value).copy_(value) if isinstance(value, torch.Tensor) else value
