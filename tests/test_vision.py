"""torchvision imports, with its compiled operators or without."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fxopt.errors import FxoptError
from fxopt.vision import _declare_operators, import_torchvision, lacks_operators

pytest.importorskip("torchvision")


def fresh(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_in_a_fresh_process_and_twice_is_once() -> None:
    code = (
        "from fxopt.vision import import_torchvision as load; a = load(); b = load();"
        "import torchvision.models as m; print(a is b, m.resnet18 is a.models.resnet18)"
    )
    assert fresh(code) == "True True"


def test_declares_nothing_where_the_compiled_operators_load() -> None:
    """A process whose torchvision operators exist: the import succeeds at once."""
    code = (
        "import torch; lib = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "for n in ('nms', 'qnms'):\n"
        "    lib.define(n + '(Tensor a, Tensor b, float c) -> Tensor')\n"
        "from fxopt import vision; vision.import_torchvision()\n"
        "print(vision._declare_operators.cache_info().currsize)"
    )
    assert fresh(code) == "0"


def test_a_declared_operator_refuses_to_run() -> None:
    if not _declare_operators.cache_info().currsize:
        pytest.skip("the compiled operators load here")
    with pytest.raises(NotImplementedError):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FxoptError, match=r"pip install 'fxopt\[vision\]'"):
        import_torchvision()


def test_other_failures_are_not_taken_for_this_one() -> None:
    assert lacks_operators(RuntimeError("operator torchvision::nms does not exist"))
    assert not lacks_operators(RuntimeError("operator mylib::nms does not exist"))
