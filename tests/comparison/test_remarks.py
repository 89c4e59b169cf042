"""What numbers mean, on numbers made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import fxopt
from fxopt.comparison import Comparison, Latency, Row, Throughput
from fxopt.comparison.table import main_cells, throughput_cells


def latency(milliseconds: float, jitter: float = 0.01, rounds: int = 12) -> Latency:
    """Rounds of three calls each, alternately a little above and below."""
    signs = [1 if turn % 2 else -1 for turn in range(rounds)]
    return Latency(tuple((milliseconds * (1 + sign * jitter),) * 3 for sign in signs))


def row(name: str, milliseconds: float | None = None, **values: Any) -> Row:
    variant = values.pop("variant", "model")
    measured = latency(milliseconds) if milliseconds is not None else None
    return Row(name, variant, latency=values.pop("latency", measured), **values)


def comparison(*rows: Row, **values: Any) -> Comparison:
    return Comparison("Net", "f32[1,3]", 1, rows, **values)


def said(*rows: Row, **values: Any) -> str:
    return "\n".join(comparison(*rows, **values).remarks)


# -- fewer MACs ------------------------------------------------------------------------------------


def test_fewer_macs_that_gained_nothing_are_called_out() -> None:
    text = said(row("float", 10, macs=1000, variant="float"),
                row("pruned", 10, macs=580, variant="pruned"))  # fmt: skip
    assert "pruned has 42% fewer MACs than float, but is not faster for certain: 1.00 times" in text
    text = said(row("float", 10, macs=1000, variant="float"),
                row("pruned", 12, macs=580, variant="pruned"))  # fmt: skip
    assert "pruned has 42% fewer MACs than float, but is slower: it takes 1.20 times" in text


def test_passes_that_saved_macs_are_judged_beside_the_model_itself() -> None:
    text = said(row("model", 10, macs=1000), row("onnx", 20, macs=500, backend="onnx"))
    assert "onnx has 50% fewer MACs than the model itself, but is slower" in text


def test_fewer_macs_that_made_it_faster_are_not() -> None:
    assert "MACs" not in said(row("model", 10, macs=1000), row("onnx", 5, macs=500))
    assert "MACs" not in said(row("model", 10, macs=1000), row("onnx", 10, macs=995))
    assert "MACs" not in said(row("model", 10, macs=1000), row("onnx", 10))
    assert "MACs" not in said(row("model", 10, macs=1000), row("onnx", failure="no", macs=1))


def test_variants_are_judged_on_the_same_backend() -> None:
    """Pruned on ONNX is faster than the float model in PyTorch, but not than that on ONNX."""
    text = said(
        row("float", 20, macs=1000, variant="float"),
        row("float onnx", 5, macs=1000, variant="float", backend="onnx"),
        row("pruned", 10, macs=500, variant="pruned"),
        row("pruned onnx", 5, macs=500, variant="pruned", backend="onnx"),
    )
    assert "pruned onnx has 50% fewer MACs than float onnx, but is not faster" in text
    assert "pruned has" not in text


# -- speed -----------------------------------------------------------------------------------------


def test_the_fastest_and_the_fastest_that_is_exact() -> None:
    text = said(row("model", 10), row("onnx", 5, relative_error=1e-6),
                row("onnx bf16", 2, relative_error=0.02))  # fmt: skip
    assert text.startswith("onnx bf16 is the fastest: 5.00 times as fast (5.00 to 5.00) as the")
    assert "within a relative error of 0.001, onnx is: 2.00 times as fast" in text
    assert "Nothing is faster than the model itself for certain." in said(
        row("model", 10), row("onnx", 10)
    )


def test_a_precision_slower_than_the_models_own() -> None:
    rows = (row("model", 20), row("onnx", 10, backend="onnx"),
            row("onnx bf16", 15, backend="onnx", precision="bf16"))  # fmt: skip
    assert "onnx bf16 is slower than onnx: it takes 1.50 times as long" in said(*rows)
    rows[1].precision = "fp32"
    assert "onnx bf16 is slower than onnx: it takes 1.50 times as long" in said(*rows)
    assert "onnx is slower than the model itself: it takes 1.25" in said(
        row("model", 8), row("onnx", 10)
    )


def test_what_cannot_be_told() -> None:
    few = comparison(row("model", latency=latency(10, rounds=3)),
                     row("onnx", latency=latency(1, rounds=3)))  # fmt: skip
    assert few.remarks == ["In so few rounds no difference can be told from chance: six are the "
                           "least."]  # fmt: skip
    assert [cells[3] for cells in main_cells(few).rows] == ["1×", "≈10.00×"]
    shaky = said(row("model", 10), row("onnx", latency=latency(10, jitter=0.4)))
    assert "The latency of onnx varied by more than 30%" in shaky
    rate = Throughput("model", 8, 2, latency(10, jitter=0.5))
    assert "1 of 1 throughputs varied" in said(row("model", 10), throughput=[rate])


# -- outputs ---------------------------------------------------------------------------------------


def test_lost_agreement_and_accuracy() -> None:
    text = said(row("model", 10, agreement=1.0, accuracy=0.8),
                row("onnx bf16", 5, agreement=0.985, accuracy=0.79), decisions=200)  # fmt: skip
    assert "names another class than the model itself in 3 of 200 decisions, and loses 1.00" in text
    text = said(row("model", 10, agreement=1.0), row("onnx", 5, agreement=0.5), decisions=8)
    assert "in 4 of 8 decisions." in text and "comes from 8 decisions only: each is 12.5%" in text
    assert "another class" not in said(row("model", 1), row("onnx", 1, agreement=1.0), decisions=9)


def test_large_and_infinite_errors() -> None:
    text = said(row("model", 10), row("a", 10, relative_error=0.2),
                row("b", 10, relative_error=math.inf),
                row("c", 10, relative_error=0.01))  # fmt: skip
    assert "off by up to 20% of the largest value: a." in text
    assert "b gives outputs of other shapes than the model itself, or infinities or NaN" in text


# -- showing it ------------------------------------------------------------------------------------


def full() -> Comparison:
    return comparison(
        row("model", 31.25, macs=1_820_000_000, parameters=11_700_000, nodes=69, file_bytes=46_800,
            peak_bytes=73_800_000, agreement=1.0, accuracy=0.75, max_error=0.0, relative_error=0.0),
        row("onnx", 4.0, macs=512, parameters=11_000, nodes=1049, compile_seconds=0.5,
            backend="onnx", file_bytes=255_000_000, peak_bytes=1_250_000_000, agreement=0.9999,
            accuracy=0.75, max_error=1e-6, relative_error=math.inf, notes=["other integers"]),
        row("onnx <b>fp16</b>", failure="no kernel", backend="onnx", precision="fp16"),
        throughput=[
            Throughput("model", 1, 1, latency(10)), Throughput("onnx", 1, 1, latency(2)),
            Throughput("model", 8, 1, latency(40)), Throughput("onnx", 8, 1, failure="too big"),
            Throughput("model", 1, 2, latency(8)), Throughput("model", 8, 2, latency(20)),
        ],
        decisions=30_000, labels=20_000, notes=["A note."], machine={"cores": 2},
    )  # fmt: skip


def test_the_table_fits_and_says_everything() -> None:
    text = str(full())
    assert all(len(line) <= 110 for line in text.splitlines())
    for part in (
        "31.2", "7.81×", "1.82G", "11.7M", "0.047", "255", "1,250", "1.0e-06", "∞", "99.9%",
        "75.0%", "batch 8", "onnx <b>fp16</b>: not measured: no kernel",
        "onnx: other integers", "onnx: batch 8: too big", "A note.",
        "30,000 decisions, 20,000 of them", "• onnx is",
    ):  # fmt: skip
        assert part in text, part


def test_columns_without_values_are_left_out() -> None:
    assert main_cells(comparison(row("model", 1), row("onnx", 1))).headings == (
        "", "ms", "spread", "speed",
    )  # fmt: skip
    single = comparison(row("model", 1), throughput=[Throughput("model", 4, 2, latency(1))])
    cells = throughput_cells(single)
    assert cells is not None and cells.headings == ("", "batch 4")
    assert cells.title == "inputs per second, 2 threads" and cells.rows == (("model", "4,000"),)


def test_json_round_trip() -> None:
    document = full().to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["rows"][1]["relative_error"] is None
    assert document["rows"][1]["latency_ms"]["median"] == pytest.approx(4.0, rel=0.02)
    assert document["rows"][1]["speedup"]["median"] == pytest.approx(7.8125)
    assert document["rows"][0]["speedup"] is None and document["rows"][2]["latency_ms"] is None
    assert document["throughput"][0]["per_second"] == pytest.approx(100, rel=0.02)


def test_rows_by_name() -> None:
    assert full()["onnx"].nodes == 1049
    with pytest.raises(KeyError, match="there are model, onnx"):
        full()["onx"]


def test_html_is_escaped() -> None:
    page = full()._repr_html_()
    ElementTree.fromstring(f"<html>{page.replace('<br>', '<br/>')}</html>")
    assert "onnx &lt;b&gt;fp16&lt;/b&gt;" in page


@pytest.mark.parametrize("case", ["full", "plain", "equal", "far apart", "agreement"])
def test_plots_are_whole_files(case: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = {
        "full": full(),
        "plain": comparison(row("model", 10), row("onnx", 5, relative_error=1e-6)),
        "equal": comparison(row("model", 10), row("onnx", 5, relative_error=0.0)),
        "far apart": comparison(row("model", 1), row("onnx", 500, relative_error=math.inf)),
        "agreement": comparison(row("model", 1, agreement=1.0), row("onnx", 5, agreement=0.2),
                                decisions=5),
    }[case]  # fmt: skip
    made.plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert "latency in ms" in text and ">onnx<" in text
    made.plot(tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == text, "the same comparison gives the same file"


def test_plots_as_pixels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison(row("model", 10), row("onnx", 5)).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plots_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fxopt.OptionError, match=r"\.svg, \.png, \.pdf"):
        full().plot(tmp_path / "a.jpeg")
    with pytest.raises(fxopt.ArtefactError, match="Cannot write"):
        full().plot(tmp_path / "nowhere" / "a.svg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fxopt.FxoptError, match=r"pip install 'fxopt\[plot\]'"):
        full().plot(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
