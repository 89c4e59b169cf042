"""What a kernel called by address must survive: odd tensors, odd numbers, other thread counts.

Calls that could end the process run in a process of their own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import fxopt
from tests.backends.eager.lowered import LIBRARY

pytestmark = pytest.mark.skipif(not LIBRARY, reason="oneDNN's own library is not installed")
_BEGIN = """
import os, threading, time
import torch, fxopt
model, x = torch.nn.Linear(64, 32).eval(), torch.randn(16, 64)
compiled = fxopt.compile(model, x, measure=False)
"""


def run(code: str) -> None:
    """Run code behind `_BEGIN` in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + code], capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize(
    "code",
    [
        "y = torch._neg_view(x)\nassert torch.allclose(compiled(y), model(y), atol=1e-5)",
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    y = compiled(torch._neg_view(x))\n"
        "assert y.dtype is torch.float32",
        "y = torch._efficientzerotensor(16, 64)\n"
        "assert torch.allclose(compiled(y), model(y), atol=1e-5)",
        "y = torch.func.functionalize(compiled)(x)\nassert torch.allclose(y, model(x), atol=1e-5)",
        "y = torch.func.vmap(compiled)(x[None])[0]\nassert torch.allclose(y, model(x), atol=1e-5)",
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode(allow_non_fake_inputs=True) as mode:\n"
        "    assert compiled(mode.from_tensor(x)).shape == (16, 32)",
        "from torch.fx.experimental.proxy_tensor import make_fx\n"
        "y = make_fx(lambda value: compiled(value))(x)(x * 2)\n"
        "assert torch.allclose(y, model(x * 2), atol=1e-5)",
    ],
    ids=[
        "negative view", "autocast", "zero tensor", "functionalize", "vmap", "fake tensor",
        "make_fx",
    ],
)
def test_inputs_that_are_no_plain_memory(code: str) -> None:
    run(code)


def test_the_number_of_threads_is_that_of_the_call() -> None:
    """A kernel that was made for four threads must not start three where one is allowed."""
    run(
        """
tasks = lambda: len(os.listdir("/proc/self/task"))
convolution = torch.nn.Conv2d(16, 64, 3, padding=1).eval()
image = torch.randn(4, 16, 56, 56)
torch.set_num_threads(4)
compiled = fxopt.compile(convolution, image, measure=False)
compiled(image)
started = []
def work():
    torch.set_num_threads(1)
    before = tasks()
    compiled(image)
    started.append(tasks() - before)
thread = threading.Thread(target=work)
thread.start(); thread.join()
assert started == [0], started
"""
    )


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_with_one_thread_goes_on() -> None:
    """As a DataLoader's worker does; GNU OpenMP's own threads do not survive a fork."""
    run(
        """
convolution = torch.nn.Conv2d(16, 64, 3, padding=1).eval()
image = torch.randn(4, 16, 56, 56)
torch.set_num_threads(2)
compiled = fxopt.compile(convolution, image, measure=False)
compiled(image)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    compiled(image)
    os._exit(0)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
raise SystemExit(status)
"""
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_constants_that_are_not_finite(
    value: float, kind: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bias of minus infinity, which masks a class: the timing must not refuse every way."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    model: nn.Module = nn.Linear(64, 64) if kind == "linear" else nn.Conv2d(8, 8, 3)
    x = torch.randn(64, 64) if kind == "linear" else torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        model.get_parameter("bias")[0] = value
        compiled = fxopt.compile(model.eval(), x, verify="off")
        assert torch.allclose(compiled(x), model(x), atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("measure", [True, False])
def test_nothing_in_nothing_out_through_compile(
    measure: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    for model, sizes in ((nn.Linear(8, 5), (0, 8)), (nn.Linear(0, 5), (3, 0))):
        x = torch.randn(sizes)
        with torch.no_grad():
            compiled = fxopt.compile(model.eval(), x, measure=measure)
            assert torch.equal(compiled(x), model(x))
