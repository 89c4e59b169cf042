"""What the page adds up: a parameter once, however many use it, and a body through its call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt.page import page_data, write_page
from tests.models import ConvBnRelu, SharedLayer
from tests.programs import needs_chromium


class Chosen(nn.Module):
    """A branch with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x.sin(), (x,))


@needs_chromium
def test_totals_are_those_of_the_profile(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    for number, (model, x) in enumerate(
        [(SharedLayer(), torch.randn(2, 4)), (Chosen(), torch.randn(2, 8))]
    ):
        graph = fxopt.capture(model.eval(), x)
        write_page(graph, tmp_path / f"{number}.html")
        page.goto((tmp_path / f"{number}.html").as_uri())
        page.wait_for_function("performance.getEntriesByName('fxopt-ready').length === 1")
        page.click("#tab-costs")
        total = page.locator(".costs-table tbody tr").first.inner_text().split()
        profile = fxopt.profile(graph, measure=False)
        assert str(profile.params) in total and str(profile.macs) in total, total
    page.close()


def test_milliseconds_are_of_the_graph_that_was_measured() -> None:
    graph = fxopt.optimize(ConvBnRelu(), torch.randn(1, 3, 8, 8))
    data = page_data(graph, profile=fxopt.profile(graph, rounds=2))
    measured = {i for i, record in enumerate(data["records"]) if record["ms"] is not None}
    final = next(s["records"] for s in reversed(data["steps"]) if s["records"] is not None)
    assert measured and measured <= set(final)
    assert not any(data["records"][i]["label"] == "batch_norm" for i in measured)
