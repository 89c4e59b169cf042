"""The backend that measures the others: the fastest whose results are right, remembered."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxopt
from fxopt.backends.auto import Auto
from fxopt.backends.eager import Eager, EagerExecutable
from fxopt.cli import main
from fxopt.contract import Pass
from fxopt.errors import ArtefactError, LoweringError, OptionError
from fxopt.graph_module import GraphModule
from tests.models import Counter

X = torch.randn(3, 4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "cache"))


class _Slowed(EagerExecutable):
    def __init__(self, graph: GraphModule, backend: Tortoise) -> None:
        super().__init__(graph)
        self.backend = backend

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        time.sleep(self.backend.delay)
        self.backend.calls.append(1)
        return tuple(out + self.backend.error for out in super().run(*flat))


@dataclass(frozen=True)
class Tortoise:
    """Right or wrong, slow or fast, able or not."""

    title: str
    delay: float = 0.0
    error: float = 0.0
    able: bool = True
    calls: list[int] = None  # type: ignore[assignment]

    name: ClassVar[str] = "tortoise"
    suffix: ClassVar[str] = ".tortoise"
    legalize: ClassVar[tuple[Pass, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", [])

    def __repr__(self) -> str:
        return self.title

    def __hash__(self) -> int:
        return hash(self.title)

    def missing(self) -> str | None:
        return None

    def lower(self, graph: GraphModule) -> EagerExecutable:
        if not self.able:
            raise LoweringError("there is no way to say 'linear'")
        return _Slowed(graph, self)


SLOW, FAST = Tortoise("slow", delay=0.004), Tortoise("fast")
WRONG, UNABLE = Tortoise("wrong", error=0.1), Tortoise("unable", able=False)


def auto(*backends: Any, **options: Any) -> Auto:
    return Auto(backends, seconds=0.2, **options)


def test_the_fastest_of_those_that_are_right() -> None:
    model = nn.Linear(4, 4)
    compiled = fxopt.compile(model, X, backend=auto(SLOW, WRONG, UNABLE, FAST))
    assert compiled.backend is FAST
    torch.testing.assert_close(compiled(X), model(X))
    text = " ".join(" ".join(compiled.executable.notes).split())
    assert "tortoise is the fastest: tortoise" in text and "is wrong by" in text
    assert "no way to say 'linear'" in text and text in " ".join(str(compiled.report).split())


def test_the_answer_is_remembered_for_the_graph_whatever_its_weights() -> None:
    chosen = auto(SLOW, FAST)
    fxopt.compile(nn.Linear(4, 4), X, backend=chosen)
    raced = len(SLOW.calls)
    again = fxopt.compile(nn.Linear(4, 4), X, backend=chosen)
    assert again.backend is FAST and len(SLOW.calls) == raced
    assert "was the fastest when this was last measured" in again.executable.notes[0]
    fxopt.compile(nn.Linear(4, 5), X, backend=chosen)  # another graph
    assert len(SLOW.calls) > raced
    raced = len(SLOW.calls)
    fxopt.compile(nn.Linear(4, 4), X[:2], backend=chosen)  # another shape
    assert len(SLOW.calls) > raced
    raced = len(SLOW.calls)
    fxopt.compile(nn.Linear(4, 4), X, backend=auto(SLOW, FAST, remember=False))
    assert len(SLOW.calls) > raced


def test_by_name_with_the_backends_that_are_installed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    compiled = fxopt.compile(model, X, backend="auto", backends=["onnx", "eager"], seconds=0.2)
    assert compiled.backend.name in ("onnx", "eager")
    path = tmp_path / f"model{compiled.backend.suffix}"
    compiled.save(path)
    torch.testing.assert_close(fxopt.load(path)(X), model(X))
    compiled.update(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).state_dict())
    assert compiled.backend.name in ("onnx", "eager")


def test_threads_are_given_to_all() -> None:
    compiled = fxopt.compile(nn.Linear(4, 4), X, backend=auto("eager", threads=2))
    assert compiled.backend == Eager(threads=2)


def test_the_race_leaves_state_alone() -> None:
    x = torch.zeros(2)
    compiled = fxopt.compile(Counter(), x, backend=auto("eager"))
    assert [compiled(x)[0].item() for _ in range(2)] == [1, 2]


def test_nobody_can() -> None:
    with pytest.raises(LoweringError, match="No backend can run this model.*\n.*'linear'"):
        fxopt.compile(nn.Linear(4, 4), X, backend=auto(UNABLE))
    with pytest.raises(LoweringError, match="is wrong by 0"):
        fxopt.compile(nn.Linear(4, 4), X, backend=auto(WRONG))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": "eager"}, "give a list of names"),
        ({"backends": []}, "give a list of names"),
        ({"threads": 0}, "threads=0 is not possible; give a whole number above 0"),
        ({"seconds": 0}, "seconds=0 is not possible; give a number above 0"),
        ({"seconds": "10"}, "give a number above 0"),
        ({"remember": "no"}, "give True or False"),
        ({"precisions": ["int3"]}, "give a list of some of 'bf16', 'fp16'"),
        ({"precisions": "bf16"}, "give a list of some of 'bf16', 'fp16'"),
        ({"max_error": -0.1}, "give a number above 0"),
    ],
)
def test_bad_options(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Auto(**options)


def test_bad_backends() -> None:
    with pytest.raises(OptionError, match="'auto' cannot be one of the backends"):
        fxopt.compile(nn.Linear(4, 4), X, backend=auto("auto"))
    with pytest.raises(OptionError, match="cannot be one of"):
        fxopt.compile(nn.Linear(4, 4), X, backend=auto("auto()"))
    with pytest.raises(OptionError, match="nobody"):
        fxopt.compile(nn.Linear(4, 4), X, backend=auto("nobody"))


def test_there_are_no_files_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.auto"
    file.write_bytes(b"?")
    with pytest.raises(ArtefactError):
        fxopt.load(file)


class Writes(nn.Module):
    """Writes to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


def test_example_inputs_that_the_model_writes_to_stay_as_they_are() -> None:
    x = torch.zeros(3)
    fxopt.compile(Writes(), x, backend=auto("eager"))
    assert torch.equal(x, torch.zeros(3))


@dataclass(frozen=True)
class Picky(Eager):
    """Refuses, or is wrong for, weights that it meets later; fails in ways of its own."""

    how: str = "refuses"

    def lower(self, graph: GraphModule) -> EagerExecutable:
        large = any(float(one.detach().abs().max()) > 100 for one in graph.constants().values())
        if large and self.how == "refuses":
            raise LoweringError("weights too large")
        if large and self.how == "breaks":
            raise NotImplementedError("no kernel")
        executable = super().lower(graph)
        if large and self.how == "is wrong":
            executable.program.names.clear()
            executable._function = lambda *flat: (torch.zeros(3, 4),)
        return executable


@pytest.mark.parametrize("how", ["refuses", "breaks", "is wrong"])
def test_a_winner_that_is_remembered_is_still_judged(how: str) -> None:
    model, chosen = nn.Linear(4, 4), auto(Picky(how=how), SLOW)
    assert fxopt.compile(model, X, backend=chosen).backend.name == "eager"
    with torch.no_grad():
        model.weight[0, 0] = 1000.0
    compiled = fxopt.compile(model, X, backend=chosen)
    assert compiled.backend is SLOW
    torch.testing.assert_close(compiled(X), model(X))


def test_options_and_threads_of_those_that_take_part() -> None:
    chosen = auto("eager(measure=False)", threads=2)
    assert fxopt.compile(nn.Linear(4, 4), X, backend=chosen).backend == Eager(2, False)
    chosen = auto(Eager(threads=1), threads=2)  # its own threads stay
    assert fxopt.compile(nn.Linear(4, 4), X, backend=chosen).backend == Eager(1)


def test_the_answer_is_not_kept_unless_wanted(tmp_path: Path) -> None:
    fxopt.compile(nn.Linear(4, 4), X, backend=auto(SLOW, FAST, remember=False))
    raced = len(SLOW.calls)
    fxopt.compile(nn.Linear(4, 4), X, backend=auto(SLOW, FAST))
    assert len(SLOW.calls) > raced


def test_from_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        common = ["torch.nn:ReLU", "--input", "2x3", "--backend", "auto", "--option", "seconds=0.2"]
        return CliRunner().invoke(main, ["compile", *common, *arguments])

    done = run("-o", str(tmp_path / "model"))
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("model.*")
    assert fxopt.load(file)(torch.ones(2, 3)).sum() == 6
    done = run("-o", str(tmp_path / "model.fxopt"))
    assert done.exit_code == 0 and fxopt.load(tmp_path / "model.fxopt").backend.name == "eager"
    done = run("-o", str(tmp_path / "model.ts"))
    assert done.exit_code != 0 and "writes '.ts' files" in done.output


def test_a_lower_precision_takes_part_where_the_user_allows_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(3, 64)
    slow = Tortoise("slow", delay=0.01)

    @dataclass(frozen=True)
    class OnlyLow(Tortoise):
        """Refuses float32, so that bfloat16 wins on every machine."""

        def lower(self, graph: GraphModule) -> EagerExecutable:
            if not any(t.dtype == torch.bfloat16 for t in graph.constants().values()):
                raise LoweringError("this is float32")
            return EagerExecutable(graph)

    for remembered in (False, True):
        compiled = fxopt.compile(
            model, x, backend="auto", backends=[slow, OnlyLow("low")], precisions=["bf16"],
            seconds=0.1,
        )  # fmt: skip
        assert isinstance(compiled.backend, OnlyLow)
        notes = " ".join(compiled.executable.notes)
        assert "auto: tortoise in bf16 " in notes
        assert ("when this was last measured" in notes) == remembered
    error = (compiled(x) - model(x)).abs().max() / model(x).abs().max()
    assert 0 < error < 0.02 and compiled(x).dtype == torch.float32
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    compiled.update(other.state_dict())  # its graph is the one in bfloat16
    assert 0 < (compiled(x) - other(x)).abs().max() < 0.05

    exact = fxopt.compile(
        model, x, backend="auto", backends=[slow, OnlyLow("low")], precisions=["bf16"],
        max_error=1e-6, seconds=0.1,
    )  # fmt: skip
    assert exact.backend == slow
    assert "max_error is 1e-06" in " ".join(exact.executable.notes)
    default = fxopt.compile(model, x, backend="auto", backends=["eager"], seconds=0.1)
    torch.testing.assert_close(default(x), model(x))
