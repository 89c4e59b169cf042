"""What showing a model costs: pages in a real browser, and how many runs bisection needs.

    python tools/seeing.py page [MODEL …]     size, time to open, and frames while it is moved
    python tools/seeing.py bisect [SIZE …]    graphs judged until a planted wrong rewrite is found

Models are named as in torchvision.models; `bert` is one of 12 layers with random weights. The page
needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import fxopt
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.page import write_page
from fxopt.rewrite import Rewriter
from fxopt.vision import import_torchvision

aten = torch.ops.aten


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("page", "bisect"))
    parser.add_argument("subjects", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "page":
        pages(options.subjects or ["resnet50", "swin_t", "bert", "efficientnet_v2_l"])
    else:
        bisections([int(size) for size in options.subjects] or [100, 500, 2000])


# -- pages -----------------------------------------------------------------------------------------


def pages(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    print("model              nodes  steps     MB   opens ms   all laid out ms   frame ms, p95")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in names:
            path = Path(folder) / f"{name}.html"
            graph = optimized(name)
            write_page(graph, path)
            story = graph.story
            opens, layout, frames = measured(browser, path)
            print(
                f"{name:18} {story.captured.counts.nodes:5}  {len(story.steps):5}  "
                f"{path.stat().st_size / 1e6:5.2f}  {opens:9.0f}  {layout:16.0f}   "
                f"{frames[0]:8.1f} / {frames[1]:.1f}",
                flush=True,
            )
        browser.close()


def optimized(name: str) -> GraphModule:
    if name == "bert":
        import transformers

        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=12)).eval()
        return fxopt.optimize(model, torch.randint(0, 1000, (1, 128)), verify="off")
    model = import_torchvision().models.get_model(name, weights=None).eval()
    return fxopt.optimize(model, torch.randn(1, 3, 224, 224), verify="off")


def measured(browser: Any, path: Path) -> tuple[float, float, list[float]]:
    """Return milliseconds to open (median of 5), to lay everything out, and of frames after it."""
    opens = []
    for _ in range(5):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_function("performance.getEntriesByName('fxopt-ready').length === 1")
        opens.append(page.evaluate("performance.getEntriesByName('fxopt-ready')[0].startTime"))
        if len(opens) < 5:
            page.close()
    page.evaluate("fxoptPage.expandAll()")
    layout = page.evaluate("fxoptPage.state().layoutMilliseconds")
    page.evaluate(
        """() => {
            window.frames_ = [];
            let last = performance.now();
            const tick = (now) => {
                frames_.push(now - last);
                last = now;
                requestAnimationFrame(tick);
            };
            requestAnimationFrame(tick);
        }"""
    )
    page.mouse.move(720, 450)
    for turn in range(40):
        page.mouse.wheel(0, 120 if turn % 20 < 10 else -120)
    page.mouse.down()
    for turn in range(60):
        page.mouse.move(720 + 6 * turn, 450 + 4 * turn)
    page.mouse.up()
    frames = page.evaluate("frames_.slice(2)")
    page.close()
    cuts = statistics.quantiles(frames, n=20)
    return statistics.median(opens), layout, [statistics.median(frames), cuts[18]]


# -- bisection -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replant:
    """Replace each sine by another one; the one at `wrong` by a cosine."""

    wrong: int
    name: ClassVar[str] = "replant"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for number, node in enumerate(graph.find(aten.sin.default)):
            target = aten.cos.default if number == self.wrong else aten.sin.default
            new = rewriter.insert(target, node.args[0], before=node)
            if not rewriter.replace(node, new):
                break
        return rewriter.result()


def bisections(sizes: list[int]) -> None:
    print("nodes  rewrites  graphs judged  2 + log2(passes) + log2(rewrites)   seconds")
    for size in sizes:
        model, wrong = sum_of_sines(size // 3), size // 4
        passes = [*fxopt.default_passes(), Replant(wrong)]
        found = fxopt.bisect(model, torch.randn(4), passes=passes)
        assert found.guilty == passes[-1] and found.number == wrong + 1, found
        floor = 2 + math.ceil(math.log2(len(passes))) + math.ceil(math.log2(found.total))
        print(
            f"{size:5}  {found.total:8}  {found.runs:13}  {floor:33}   {found.seconds:7.1f}",
            flush=True,
        )


def sum_of_sines(length: int) -> nn.Module:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x
            for step in range(length):
                total = total + torch.sin(x + 0.01 * (step + 1))
            return total

    return Sum()


if __name__ == "__main__":
    main()
