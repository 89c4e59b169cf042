"""tools/bench_smoke.py judges the same each time, and finds what makes fxopt slower."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.backends.eager import program as eager_program
from fxopt.backends.eager.onednn import library
from fxopt.contract import PassResult
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.signature import Signature
from tests.models import Residual

pytest.importorskip("onnx_ir", reason="needs the extra 'onnx'")

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bench_smoke
from bench_smoke import Verdict, judge, judge_stage, main, network_counts, overhead


def small() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Residual().eval(), torch.randn(1, 3, 16, 16)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return network_counts(*small())


def test_counts_are_the_same_each_time(known: dict[str, Any]) -> None:
    verdict = judge("small", known, network_counts(*small()))
    assert verdict == Verdict()


def test_counts_say_what_is_in_a_network(known: dict[str, Any]) -> None:
    assert known["optimized nodes"]["conv2d"] == 2
    assert "batch_norm" in known["captured nodes"]
    assert "batch_norm" not in known["optimized nodes"]
    assert known["onnx nodes"]["Conv"] == 2
    assert sum(known["eager operators"].values()) == known["eager program"]["calls"]
    assert known["eager program"]["into new memory"] < known["eager program"]["calls"]
    assert known["calls to optimize"]["passes/fuse_conv_bn.py"] > 0
    assert 0 < sum(known["calls around the program"].values()) < 100


def test_a_wasteful_pass_is_found(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FuseConvBn.run

    def wasteful(self: FuseConvBn, graph: fxopt.GraphModule) -> PassResult:
        for _ in range(5):
            graph.copy()
        return run(self, graph)

    monkeypatch.setattr(FuseConvBn, "run", wasteful)
    (line,) = judge("small", known, network_counts(*small())).worse
    assert line.startswith("small: calls to optimize: ") and "(most: others +" in line


def test_a_pass_left_out_is_found(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FuseConvBn, "run", lambda self, graph: PassResult())
    worse = "\n".join(judge("small", known, network_counts(*small())).worse)
    assert "small: optimized nodes: " in worse and "batch_norm 0 → " in worse
    assert "small: eager program: " in worse


def test_memory_that_is_not_used_again_is_found(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager_program, "overwrites", lambda memory, calls, outputs: {})
    worse = judge("small", known, network_counts(*small())).worse
    assert any("into new memory" in line for line in worse)


def test_work_around_each_call_is_found(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Signature.check

    def twice(self: Signature, flat: Any) -> None:
        check(self, flat)
        check(self, flat)

    monkeypatch.setattr(Signature, "check", twice)
    worse = judge("small", known, network_counts(*small())).worse
    assert len(worse) == 1 and "calls around the program" in worse[0]
    assert "signature.py" in worse[0]


def test_less_is_better_and_another_operator_is_not(known: dict[str, Any]) -> None:
    more = json.loads(json.dumps(known))
    more["onnx nodes"]["Cast"] = 3
    more["calls to optimize"]["rules.py"] = 10**6
    verdict = judge("small", more, known)
    assert not verdict.worse and len(verdict.better) == 2
    other = json.loads(json.dumps(known))
    other["onnx nodes"]["Winograd"] = other["onnx nodes"].pop("Conv")
    (line,) = judge("small", other, known).worse
    assert "Conv 0 → 2, Winograd 2 → 0" in line


def test_one_file_may_not_hide_among_others() -> None:
    before = {"calls to optimize": {"a.py": 9000, "b.py": 1000}}
    after = {"calls to optimize": {"a.py": 8800, "b.py": 1400}}
    (line,) = judge("small", before, after).worse
    assert line == "small: calls to optimize, in b.py: 1,000 → 1,400"
    tolerated = {"calls to optimize": {"a.py": 9200, "b.py": 1050}}
    assert judge("small", before, tolerated) == Verdict()


# -- ratios ----------------------------------------------------------------------------------------


def test_calls_that_grow_with_the_square_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_smoke, "SIZES", (10, 80))

    def linear(nodes: int) -> Callable[[], Any]:
        return lambda: [fxopt.text.target_text(torch.add) for _ in range(100 * nodes)]

    def square(nodes: int) -> Callable[[], Any]:
        return lambda: [fxopt.text.target_text(torch.add) for _ in range(nodes**2)]

    assert judge_stage("linear", linear) == Verdict()
    worse = judge_stage("square", square).worse
    assert worse[0].startswith("square: calls per node grow 8.00×") and "text.py" in worse[0]


def test_time_that_grows_with_the_square_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_smoke, "SIZES", (200, 1600))

    def work(nodes: int) -> Callable[[], Any]:
        values = list(range(nodes))

        def run() -> None:
            fxopt.text.target_text(torch.add)
            for value in values:
                values.index(value)  # one call, as many comparisons as there are nodes

        return run

    monkeypatch.setattr(bench_smoke, "GROWTH", 1.0)
    (line,) = judge_stage("index", work).worse
    assert line.startswith("index: time per node grows ")


def test_a_slow_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Signature.check

    def slow(self: Signature, flat: Any) -> None:
        for _ in range(300):
            check(self, flat)

    assert bench_smoke.judge_overhead() == Verdict()
    monkeypatch.setattr(Signature, "check", slow)
    (line,) = bench_smoke.judge_overhead().worse
    assert line.startswith("a call of a model takes ")


def test_overhead_is_that_of_the_call() -> None:
    x = torch.randn(4)
    compiled = fxopt.compile(torch.nn.Tanh(), x, measure=False)
    assert overhead(compiled, x) > 1


# -- the command line and the file -----------------------------------------------------------------


def test_what_is_written_is_judged_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_smoke, "network", lambda name: small())
    file = tmp_path / "counts.json"
    arguments = ["resnet18", "--counts", str(file)]
    assert main(arguments) == 2
    assert "write them with --write" in capsys.readouterr().out and not file.exists()
    assert main([*arguments, "--write"]) == 0
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("no worse than committed\n")
    held = json.loads(file.read_text())
    held["networks"]["resnet18"]["onnx nodes"]["Conv"] -= 1
    file.write_text(json.dumps(held))
    assert main(arguments) == 1
    assert "WORSE: resnet18: onnx nodes: 3 → 4 (Conv 1 → 2)" in capsys.readouterr().out
    assert main(["bert", "--counts", str(file), "--write"]) == 0
    assert list(bench_smoke.read_counts(file)) == ["resnet18", "bert"]


def test_an_unknown_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["resnet19"])
    assert "'resnet19' is none of resnet18, " in capsys.readouterr().err


def test_the_committed_file_has_all_counts(known: dict[str, Any]) -> None:
    committed = bench_smoke.read_counts(bench_smoke.COUNTS)
    assert list(committed) == list(bench_smoke.NETWORKS)
    for counts in committed.values():
        assert counts.keys() == known.keys()
        assert all(table and all(type(n) is int for n in table.values())
                   for table in counts.values())  # fmt: skip


def test_the_library_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXOPT_ONEDNN", raising=False)
    before = library()
    with pytest.raises(KeyError), bench_smoke.without_onednn():
        assert library() is None
        raise KeyError
    assert "FXOPT_ONEDNN" not in os.environ
    assert (library() is None) == (before is None)


def test_calls_of_others_are_counted_in_one_place() -> None:
    result, calls = bench_smoke.counted(lambda: fxopt.text.target_text(torch.ops.aten.add.Tensor))
    assert result == "add.Tensor"
    assert ("text.py", "target_text") in calls
    assert {file for file, _ in calls} == {"text.py", "others"}
