"""What this machine can do at best: the two ceilings of a roofline, measured."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.devices import waiter

ROUNDS = 15


@dataclass(frozen=True)
class Machine:
    """The best that was measured on one device, in one dtype, with so many threads."""

    name: str
    flops_per_second: float  # of a large matrix product
    bytes_per_second: float  # of a large copy: bytes read plus bytes written

    @property
    def ridge(self) -> float:
        """The intensity, in FLOPs per byte, from which on arithmetic is what limits."""
        return self.flops_per_second / self.bytes_per_second


def measure_machine(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Machine:
    """Return the ceilings of a device, measured once per process, dtype and number of threads.

    The peak is the best of several products of two square matrices in `dtype` (2 n³ FLOPs); the
    bandwidth the best of several copies of an array that no cache holds. These are the ceilings of
    the roofline model (Williams, Waterman and Patterson, "Roofline: An Insightful Visual
    Performance Model for Multicore Architectures", Communications of the ACM 52(4), 2009).
    Integers are taken for float32.
    """
    device = device or torch.device("cpu")
    dtype = dtype if dtype.is_floating_point else torch.float32
    return _measured(str(device), dtype, torch.get_num_threads())


@functools.lru_cache(maxsize=None)
def _measured(where: str, dtype: torch.dtype, threads: int) -> Machine:
    device = torch.device(where)
    on_gpu = device.type == "cuda"
    side, length = (8192, 2**28) if on_gpu else (1024, 2**25)
    a = torch.ones(side, side, dtype=dtype, device=device)
    result = torch.empty_like(a)
    wait = waiter([a])
    product = _best(lambda: torch.mm(a, a, out=result), wait)
    source = torch.ones(length, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), wait)
    return Machine(
        _name(device, dtype, threads), 2 * side**3 / product, 2 * source.nbytes / copy
    )


def _best(action: Callable[[], object], wait: Callable[[], None]) -> float:
    """Return the seconds of the fastest of several runs, after one that warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _name(device: torch.device, dtype: torch.dtype, threads: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {kind}"
    return f"{processor()}, {threads} thread{'s' if threads != 1 else ''}, {kind}"


def processor() -> str:
    """Return the processor's name as the system gives it."""
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
