"""fxopt.compare on small models: who takes part, what is measured, what stays as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends import available
from fxopt.comparison import memory as measuring
from fxopt.comparison import probe
from fxopt.comparison.candidate import MOST_COMPILATIONS
from fxopt.registry import classes
from fxopt.testing import noisy
from tests.models import Branches, ConvBnRelu, Counter, Residual, SharedLayer, Tokens

IMAGE = torch.ones(1, 3, 8, 8)
compare = partial(fxopt.compare, rounds=1, memory=False)


class Scores(nn.Module):
    """Class scores: the inputs themselves, moved by a shift."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([shift, 0.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def installed() -> list[str]:
    return sorted(
        name for name, cls in classes("backends").items()
        if available()[name] is None and not getattr(cls, "on_request", False)
    )  # fmt: skip


# -- rows ------------------------------------------------------------------------------------------


def test_a_model_beside_every_backend_and_precision() -> None:
    model = noisy(ConvBnRelu()).eval()
    found = compare(model, IMAGE, precision=[None, "bf16"])
    assert [row.name for row in found.rows] == [
        "model", *(f"{name}{how}" for name in installed() for how in ("", " bf16")),
    ]  # fmt: skip
    assert {"eager", "onnx", "torchscript"} <= set(installed())
    assert not [row.failure for row in found.rows if row.failure]
    assert all(row.latency is not None and row.file_bytes for row in found.rows)
    assert found["model"].nodes == 3 and found["eager"].nodes == 2
    assert found["onnx"].macs == 8 * 8 * 8 * 27 and found["onnx"].compile_seconds
    assert 0 < (found["onnx"].relative_error or 1) < 1e-5
    assert 1e-4 < (found["onnx bf16"].relative_error or 1) < 1e-1
    assert found["onnx bf16"].precision == "bf16" and found["onnx bf16"].backend == "onnx"
    assert found["model"].compile_seconds is None and found.baseline.relative_error == 0
    assert found.inputs == "f32[1,3,8,8]" and found.model_name == "ConvBnRelu"


def test_errors_are_those_of_the_outputs() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0]])
    found = compare({"a": Scores(), "b": Scores(0.5)}, x)
    assert found["b"].max_error == 0.5 and found["b"].relative_error == 0.125
    assert found["a"].max_error == 0


def test_variants_in_every_form_and_on_a_backend(tmp_path: Path) -> None:
    model = noisy(ConvBnRelu()).eval()
    compiled = fxopt.compile(model, IMAGE, backend="onnx")
    compiled.save(tmp_path / "a.onnx")
    found = compare(
        {
            "module": model,
            "graph": fxopt.optimize(model, IMAGE),
            "program": torch.export.export(model, (IMAGE,)),
            "deferred": fxopt.compile(ConvBnRelu()),
            "loaded": fxopt.load(tmp_path / "a.onnx"),
        },
        IMAGE,
        backends=["onnx(optimization='basic')"],
    )
    onnx = "onnx(optimization='basic')"
    assert [row.name for row in found.rows] == [
        "module", f"module {onnx}", "graph", f"graph {onnx}", "program", f"program {onnx}",
        "deferred", "loaded",
    ]  # fmt: skip
    failed = {row.name: row.failure for row in found.rows if row.failure}
    assert list(failed) == ["deferred"] and "dimension 2 is 8" in str(failed["deferred"])
    assert (found["loaded"].relative_error or 1) < 1e-5 and found["loaded"].macs is None
    assert any("loaded uses a number of threads of its own" in note for note in found.notes)
    assert [row.name for row in compare([model, model], IMAGE).rows] == [
        "ConvBnRelu", "ConvBnRelu 2",
    ]  # fmt: skip


def test_graphs_and_compiled_models_bring_their_examples() -> None:
    compiled = fxopt.compile(Tokens(), {"ids": torch.ones(2, 5, dtype=torch.int64)})
    found = compare(compiled)
    assert found.inputs == "i64[2,5]" and len(found.rows) == 1
    found = compare(compiled.graph, backends=["onnx"])
    assert [row.name for row in found.rows] == ["model", "onnx"] and not found["onnx"].failure


def test_a_variant_in_another_dtype_gets_its_inputs_in_that() -> None:
    model = noisy(ConvBnRelu()).eval()
    found = compare({"float": model, "half": copy.deepcopy(model).bfloat16()}, IMAGE)
    assert found["half"].failure is None and found["half"].macs == found["float"].macs
    assert 0 < (found["half"].relative_error or 0) < 0.1


def test_what_cannot_be_built_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(Counter(), torch.zeros(2))
    assert "the model changes 'calls'" in str(found["onnx"].failure)
    assert found["onnx"].latency is None and found["eager"].latency is not None
    monkeypatch.setattr(classes("backends")["onnx"], "missing", lambda self: "pip install it")
    names = [row.name for row in compare(SharedLayer(), torch.ones(1, 4)).rows]
    assert names == ["model", *installed()] and "onnx" not in names
    found = compare(SharedLayer(), torch.ones(1, 4), backends=["onnx"])
    assert "pip install it" in str(found["onnx"].failure)


def test_a_wrong_pass_is_found_by_verification() -> None:
    class Negate(fxopt.passes.RemoveDeadNodes):
        name = "negate"

        def run(self, graph: Any) -> Any:
            graph.output_node.args = ((graph.placeholders[0],),)
            graph.recompile()
            return super().run(graph)

    found = compare(Scores(1.0), torch.zeros(1, 3), backends=["eager"], passes=[Negate()])
    assert "changed what the model computes" in str(found["eager"].failure)
    found = compare(
        Scores(1.0), torch.zeros(1, 3), backends=["eager"], passes=[Negate()], tolerance=9.0
    )
    assert found["eager"].max_error == 1.0


def test_a_model_that_cannot_be_captured() -> None:
    with pytest.raises(fxopt.CaptureError, match="Branches cannot be captured"):
        compare(Branches(), torch.ones(1, 4))
    found = compare({"a": Branches(), "b": SharedLayer()}, torch.ones(1, 4), backends=["eager"])
    assert found["a"].latency is not None and found["a"].macs is None
    assert "not captured" in found["a"].notes[0] and "Branches" in str(found["a eager"].failure)
    assert found["b eager"].latency is not None


def test_every_candidate_uses_torchs_number_of_threads() -> None:
    built = []

    def judge(compiled: Any) -> bool:
        built.append(getattr(getattr(compiled, "backend", None), "threads", None))
        return True

    compare(SharedLayer(), torch.ones(1, 4), backends=["onnx"], verify=judge)
    compare(SharedLayer(), torch.ones(1, 4), backends=["onnx(threads=3)"], verify=judge)
    assert set(built) == {None, torch.get_num_threads(), 3}


def test_a_sweep_over_threads_reaches_compiled_models_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, used = classes("backends")["onnx"], []
    compiled = fxopt.compile(SharedLayer(), torch.ones(1, 4), backend="onnx")
    compiled.save(tmp_path / "a.onnx")
    variants = {"compiled": compiled, "loaded": fxopt.load(tmp_path / "a.onnx")}
    for name in ("lower", "load"):
        plain = getattr(onnx, name)

        def watched(self: Any, what: Any, name: str = name, plain: Any = plain) -> Any:
            used.append((name, self.threads))
            return plain(self, what)

        monkeypatch.setattr(onnx, name, watched)
    compare(variants, torch.ones(1, 4), threads=[1, 3])
    assert used == [("load", None), ("lower", 1), ("load", 1), ("lower", 3), ("load", 3)]


def test_outputs_that_are_all_zero_prove_nothing() -> None:
    found = compare({"a": Scores(), "b": Scores()}, torch.zeros(1, 3))
    assert any("outputs of the baseline are zero" in note for note in found.notes)


def test_integer_outputs_are_no_error_but_a_note() -> None:
    class Largest(Scores):
        def forward(self, x: torch.Tensor) -> Any:
            scores = super().forward(x)
            return scores, scores.argmax(-1)

    x = torch.tensor([[1.0, 1.2, 0.0]])
    found = compare({"a": Largest(), "b": Largest(0.5)}, x)
    assert found["b"].max_error == 0.5 and found["b"].notes == ["integer outputs differ"]


# -- data ------------------------------------------------------------------------------------------


def one_hot(*classes: int) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_agreement_and_accuracy() -> None:
    """A shift of 2 makes every input class 0."""
    data = [(one_hot(0, 1), torch.tensor([0, 1])), (one_hot(2), [0]), (one_hot(1), [-100])]
    found = compare({"a": Scores(), "b": Scores(2.0)}, one_hot(0), data=data)
    assert found["a"].agreement == 1 and found["b"].agreement == 0.25
    assert found["a"].accuracy == 2 / 3 and found["b"].accuracy == 2 / 3
    assert (found.decisions, found.labels) == (4, 3)
    found = compare({"a": Scores(), "b": Scores(2.0)}, one_hot(0), data=[one_hot(0), one_hot(1)])
    assert found["b"].agreement == 0.5 and found["b"].accuracy is None and found.labels == 0


def test_errors_are_the_worst_of_all_data() -> None:
    class Squared(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x * x if float(self.shift[0]) else 0 * x)

    data = [one_hot(1), 3 * one_hot(1)]
    found = compare({"a": Squared(), "b": Squared(1.0)}, one_hot(0), data=data)
    assert found["b"].max_error == 9 and found["b"].relative_error == 3


def test_data_is_streamed_and_may_have_other_shapes() -> None:
    taken: list[int] = []

    def data() -> Any:
        for size in (4, 4, 3):
            taken.append(size)
            yield torch.randn(size, 3, 8, 8)

    found = compare(noisy(ConvBnRelu()).eval(), IMAGE, backends=["onnx"], data=data(),
                    logits=lambda y: y.mean((2, 3)))  # fmt: skip
    assert found.decisions == 11 and taken == [4, 4, 3]
    assert found["onnx"].agreement == 1 and (found["onnx"].relative_error or 1) < 1e-5


def test_what_cannot_take_the_data_has_no_agreement_but_a_latency() -> None:
    fixed = fxopt.compile(Scores(), one_hot(0))
    found = compare({"a": Scores(), "b": fixed}, one_hot(0), data=[one_hot(1), one_hot(1, 2)])
    assert found["b"].agreement is None and found["b"].latency is not None
    assert "no agreement: Argument 'x': dimension 0 is 2" in found["b"].notes[0]
    sizes = range(2, MOST_COMPILATIONS + 3)
    found = compare(Scores(), one_hot(0), backends=["eager"],
                    data=[torch.zeros(size, 3) for size in sizes])  # fmt: skip
    assert "dynamic_shapes=" in found["eager"].notes[0]
    found = compare(Scores(), one_hot(0), backends=["eager"], dynamic_shapes={0: "batch"},
                    data=[torch.zeros(size, 3) for size in sizes])  # fmt: skip
    assert found["eager"].agreement == 1 and "sizes that vary" in found.notes[0]


def test_items_of_models_with_several_arguments() -> None:
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5)
    run = partial(compare, Tokens(), {"ids": ids, "mask": mask}, backends=["eager"])
    labels = torch.zeros(2, 5, dtype=torch.int64)
    for item in ((ids, mask), {"ids": ids, "mask": mask}, {"mask": mask, "ids": ids}):
        assert run(data=[item]).decisions == 10
        assert run(data=[(item, labels)]).labels == 10
    with pytest.raises(fxopt.OptionError, match="called with ids, mask"):
        run(data=[ids])


# -- throughput ------------------------------------------------------------------------------------


def test_throughput_by_batch_and_threads_restores_the_threads() -> None:
    before = torch.get_num_threads()
    seen = set()

    class Watch(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((len(x), torch.get_num_threads()))
            return super().forward(x)

    found = compare({"a": Watch(), "b": fxopt.compile(Scores(), one_hot(0))}, one_hot(0),
                    batches=[1, 4], threads=[1, 2])  # fmt: skip
    assert torch.get_num_threads() == before
    assert {(1, 1), (1, 2), (4, 1), (4, 2)} <= seen
    cells = {(one.name, one.batch, one.threads): one for one in found.throughput}
    assert len(cells) == 8 and (cells["a", 4, 2].per_second or 0) > 0
    assert cells["b", 4, 1].per_second is None
    assert "dimension 0 is 4" in str(cells["b", 4, 1].failure)
    assert [one.threads for one in compare(Scores(), one_hot(0), batches=[2]).throughput] == [
        before
    ] * (1 + len(installed()))


def test_threads_are_restored_when_something_fails() -> None:
    class Tired(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 2:
                raise KeyboardInterrupt
            return super().forward(x)

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        compare({"a": Tired()}, one_hot(0), batches=[2], threads=[before + 1])
    assert torch.get_num_threads() == before


# -- memory ----------------------------------------------------------------------------------------


def test_peak_memory_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of weights, and a class in a file that only sys.path leads to."""
    (tmp_path / "layers_of_mine.py").write_text(
        "import torch\nclass Mine(torch.nn.Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import layers_of_mine  # type: ignore[import-not-found]

    model = layers_of_mine.Mine(2048, 2048, bias=False)
    found = fxopt.compare(model, torch.ones(1, 2048), backends=["eager"], rounds=1)
    assert [row.notes for row in found.rows] == [[], []]
    for row in found.rows:
        assert 16e6 < (row.peak_bytes or 0) < 80e6
        assert row.file_bytes == pytest.approx(16.8e6, rel=0.01)


def test_memory_that_cannot_be_measured_has_a_note() -> None:
    class Local(SharedLayer):
        pass

    found = fxopt.compare({"a": Local()}, torch.ones(1, 4), backends=[], rounds=1)
    assert found["a"].peak_bytes is None and found["a"].file_bytes
    assert "no memory: The model cannot be pickled" in found["a"].notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be forgotten")
def test_a_peak_before_the_measurement_does_not_count() -> None:
    before, _ = probe.resident()
    large = bytearray(300_000_000)
    _, peak = probe.resident()
    del large
    assert peak - before > 250e6
    probe.forget_peak()
    assert probe.resident()[1] - before < 250e6


def test_a_class_in_the_script_is_named() -> None:
    local = type("Mine", (nn.Linear,), {"__module__": "__main__"})(2, 2)
    with pytest.raises(fxopt.FxoptError, match="class Mine is defined in the script itself"):
        measuring._check_importable(nn.Sequential(local))


# -- the user's model ------------------------------------------------------------------------------


def test_the_model_its_state_and_random_numbers_stay_as_they_are() -> None:
    class Remembers(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen: dict[str, Any] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            self.seen["last"] = x
            return super().forward(x) + self.calls

    model, other = noisy(Remembers()).train(), Residual()
    model.stem.eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    given, random = IMAGE.clone(), torch.get_rng_state()
    data = (torch.randn(1, 3, 8, 8) for _ in range(2))
    found = compare({"a": model, "b": other}, given, data=data, batches=[2],
                    logits=lambda y: y.mean((2, 3)))  # fmt: skip
    assert found["a"].latency is not None
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == tensors
    assert model.seen == {} and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(given, IMAGE)


def test_outputs_come_from_the_state_that_each_starts_with() -> None:
    """Calls of the race advance a counter, and outputs must not show it."""
    model = Counter()
    compiled = fxopt.compile(model, torch.zeros(2))
    compiled(torch.zeros(2))
    found = compare({"a": model, "b": compiled}, torch.zeros(2), data=[torch.zeros(2)] * 2,
                    logits=lambda y: y[None])  # fmt: skip
    assert found["b"].max_error == 0 and found["b"].failure is None
    assert model.calls.item() == 0 and compiled(torch.zeros(2))[0].item() == 2


# -- wrong arguments -------------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backends": ["onxx"]}, "Did you mean 'onnx'"),
    "a backend alone": ({"backends": "onnx"}, r"write backends=\['onnx'\]"),
    "a backend twice": ({"backends": ["onnx", "onnx"]}, "Two candidates are called 'onnx'"),
    "precision": ({"precision": ["fp8"]}, "precision must be one of"),
    "no precision": ({"precision": []}, r"\[None\] is the model's own"),
    "pass": ({"passes": ["fuse-bn"]}, "Did you mean 'fuse-conv-bn'"),
    "batches": ({"batches": [0]}, "batches must be positive integers"),
    "threads": ({"threads": 2}, r"write threads=\[2\]"),
    "rounds": ({"rounds": 0}, "rounds must be positive"),
    "no data": ({"data": []}, "yields nothing"),
    "not data": ({"data": 3}, "must be something to iterate over"),
    "items": ({"data": [(1, 2, 3)]}, "called with x"),
    "labels": ({"data": [(torch.ones(2, 3), torch.ones(2))]}, "one class index for each"),
    "logits": ({"data": [torch.ones(1, 3)], "logits": lambda y: y.scores}, "no attribute 'scores"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    options, words = WRONG[case]
    error = fxopt.FxoptError if case == "logits" else fxopt.OptionError
    with pytest.raises(error, match=words):
        compare(Scores(), torch.ones(1, 3), **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compare(Scores, torch.ones(1, 3)), "Give an instance"),
        (lambda: compare({}), "nothing to compare"),
        (lambda: compare({"a": Scores(), "a eager": Scores()}, torch.ones(1, 3),
                         backends=["eager"]), "called 'a eager'"),
        (lambda: compare(fxopt.compile(Scores(), torch.ones(1, 3)), backends=["onnx"]),
         "compiled already"),
        (lambda: compare(fxopt.capture(Scores(), torch.ones(1, 3)), dynamic_shapes={0: "n"}),
         "when you capture"),
        (lambda: compare(nn.ReLU(), torch.tensor(1.0), batches=[2]), "no batch to vary"),
        (lambda: compare(nn.ReLU(), torch.ones(3), data=[torch.ones(3)]), "logits="),
    ],
)  # fmt: skip
def test_wrong_models(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(fxopt.OptionError, match=words):
        call()


def test_a_baseline_that_fails_is_an_error() -> None:
    class Fails(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 4:
                raise ValueError("too large")
            return x

    with pytest.raises(fxopt.FxoptError, match="The baseline 'a' does not run.*f32\\[1,5\\]"):
        compare({"a": Fails(), "b": Scores()}, torch.ones(1, 5))
    with pytest.raises(fxopt.ShapeError, match="dimension 1 is 5"):
        compare({"a": fxopt.capture(Scores(), torch.ones(1, 3)), "b": Scores()}, torch.ones(1, 5))
    with pytest.raises(fxopt.FxoptError, match="data= failed with KeyError.*\n.*raise KeyError"):
        compare(Scores(), torch.ones(1, 3), data=_fails())


def _fails() -> Any:
    yield torch.ones(1, 3)
    raise KeyError("gone")
