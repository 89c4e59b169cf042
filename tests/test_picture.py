"""Pictures: what is in them, how modules collapse, and what happens where Graphviz is missing."""

from __future__ import annotations

import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from torch import nn

import fxopt
from fxopt.families import FAMILIES
from fxopt.picture import CHANGE_COLOURS, FAMILY_COLOURS, dot, render, svg, write
from fxopt.picture.collapse import contract
from fxopt.picture.columns import divide
from fxopt.picture.frames import frame_tree, mark_frames
from fxopt.picture.modules import READABLE, module_tree, opened
from fxopt.picture.palette import CLUSTERS, GROUP, QUIET_TEXT, TEXT
from fxopt.picture.side import Side
from fxopt.story import Recorder
from tests.models import ConvBnRelu, Residual, SharedLayer, Tokens
from tests.programs import needs_dot

IMAGE = torch.zeros(2, 3, 8, 8)


class SharedActivation(nn.Module):
    """One activation module that is called between all others."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.act(block(x))
        return x


class Chain(nn.Sequential):
    """Many small blocks, one after the other."""

    def __init__(self, blocks: int) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(blocks)))


@pytest.fixture(scope="module")
def optimized() -> fxopt.GraphModule:
    passes = ["fold-constants", "remove-no-ops", "fuse-conv-bn"]
    return fxopt.optimize(Residual(), IMAGE, passes=passes)


def picture_of(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> str:
    return dot(fxopt.capture(model, inputs), **options)


def box(source: str, name: str) -> str:
    """Return the statement of one box, its label without markup."""
    line = next(line for line in source.splitlines() if re.match(rf'\s*"?{name}"? \[', line))
    return re.sub(r"<[^<>]*>", " ", line)


# -- what is in it ---------------------------------------------------------------------------------


def test_a_call_says_its_operator_place_constants_and_arguments() -> None:
    source = picture_of(ConvBnRelu(), IMAGE)
    assert source.startswith("digraph ConvBnRelu") and "constant" not in source
    conv, norm = box(source, "conv2d"), box(source, "batch_norm")
    assert re.search(r"conv2d\s+0\s+weight 8×3×3×3\s+padding 1\b", conv)
    assert "stride" not in conv and "bias" not in conv, "defaults are left out"
    assert FAMILY_COLOURS["convolution"] in conv and "%conv2d: f32[2,8,8,8] = conv2d(" in conv
    assert re.search(r"weight, bias, running_mean,\s+running_var 8\s+eps 1e-05", norm)
    assert "cudnn" not in norm and "training" not in norm and "momentum" not in norm
    title = re.sub("<.*?>", " ", source)
    assert re.search(r"ConvBnRelu\s+3 nodes · 232 params · 27.6k MACs", title)


def test_arrows_say_what_they_carry() -> None:
    source = picture_of(Tokens(), torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5))
    assert 'ids -> embedding [label=" i64 1×5 "' in source
    assert 'mask -> unsqueeze [label=" 1×5 "' in source, "f32 goes without saying"
    assert box(source, "ids").count("i64 1×5") == 1


def test_a_symbolic_size_stays_a_name() -> None:
    graph = fxopt.capture(nn.Linear(4, 2), torch.zeros(3, 4), dynamic_shapes={0: "batch"})
    assert re.search(r'label=" (batch|s\d+)×4 "', dot(graph))


def test_a_value_with_many_users_is_named_once() -> None:
    class Fan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.exp(), x.sin(), x.cos(), x.tanh(), x.abs()])

    arrows = [line for line in picture_of(Fan(), torch.zeros(3)).splitlines() if "\tx -> " in line]
    assert len(arrows) == 5 and sum('" 3 "' in line for line in arrows) == 1


def test_a_constant_that_is_returned_as_it_is_has_a_box() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, self.weight

    source = picture_of(Returned(), torch.zeros(1))
    assert "weight" in box(source, "weight") and "weight -> output" in source


def test_bodies_of_control_flow_are_drawn() -> None:
    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    graph = fxopt.capture(Choice(), torch.zeros(3))
    network = fxopt.to_networkx(graph)
    assert {"true_graph_0/sin", "false_graph_0/cos"} <= set(network)
    source = dot(graph)
    assert '"true_graph_0/sin"' in source and "cluster 0 true_graph_0" in source
    assert "true_graph" in box(source, "cond"), "as constants of the call"


def test_whatever_a_module_is_called_the_picture_is_well_formed() -> None:
    odd = nn.Sequential()
    for name in ('a<b>&"c"', "back\\slash\\N", "co:lon", "co_lon", "{x|y}", "<FONT>", "a\\"):
        odd.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    graph = fxopt.capture(odd, torch.zeros(1, 2))
    names = {'a<b>&"c"', "back\\slash\\N", "co:lon", "{x|y}", "a\\"}
    for depth in (1, None):
        drawn = contract(fxopt.to_networkx(graph), {"", *names} if depth is None else {""})
        assert len(set(drawn)) == len(drawn)
        if shutil.which("dot"):
            words = " ".join(ElementTree.fromstring(svg(graph, depth=depth)).itertext())
            assert names <= set(words.split()), words


# -- collapsing ------------------------------------------------------------------------------------


def test_a_picture_of_a_whole_network_is_readable() -> None:
    models = pytest.importorskip("torchvision").models
    graph = fxopt.capture(models.resnet18(), torch.zeros(1, 3, 64, 64))
    source = dot(graph)
    boxes = [line for line in source.splitlines() if "fillcolor" in line and "tooltip" in line]
    assert 15 < len(boxes) <= READABLE
    block = next(line for line in source.splitlines() if '"module layer2.0"' in line)
    assert "BasicBlock" in block and "9 nodes · 230k params · 14.7M MACs" in block
    assert "2 conv2d" not in block and "3 conv2d" in block, "the tooltip counts its operators"
    assert 'subgraph "cluster 0 layer1 1"' in source


def test_modules_of_one_class_are_open_or_closed_together() -> None:
    graph = fxopt.capture(Chain(READABLE // 2 + 5), torch.zeros(1, 4))
    closed = dot(graph)
    assert "Linear" not in closed and closed.count("2 nodes") == READABLE // 2 + 5
    assert "fillcolor" in box(dot(graph, depth=None), "linear")


def test_depth_is_a_number_of_module_levels() -> None:
    graph = fxopt.capture(Residual(), IMAGE)
    assert "module stem" in dot(graph, depth=1) and "module stem" not in dot(graph, depth=2)
    assert "conv2d [" in dot(graph, depth=2)
    assert dot(graph, depth=2) == dot(graph, depth=None) == dot(graph, depth="auto")


@pytest.mark.parametrize("depth", [0, -1, "all", 1.5, True])
def test_another_depth_is_refused(depth: Any) -> None:
    with pytest.raises(fxopt.OptionError, match="number of module levels"):
        picture_of(ConvBnRelu(), IMAGE, depth=depth)


def test_a_module_with_one_closed_module_inside_shows_itself() -> None:
    model = nn.Sequential(nn.Sequential(Chain(3 * READABLE)), nn.ReLU())
    source = picture_of(model, torch.zeros(1, 4))
    assert '"module 0"' in source and '"module 0.0"' not in source


def test_a_module_that_is_called_between_others_is_drawn_in_parts() -> None:
    graph = fxopt.capture(SharedActivation(), torch.zeros(1, 4))
    network = fxopt.to_networkx(graph)
    drawn = contract(network, {"", "blocks"})
    assert networkx.is_directed_acyclic_graph(drawn)
    parts = [box for _, box in drawn.nodes(data="box") if box.path == "act"]
    assert [(part.part, part.parts) for part in parts] == [(n, 4) for n in (1, 2, 3, 4)]
    assert "part 2 of 4" in dot(graph, depth=1)
    shared = fxopt.capture(SharedLayer(), torch.zeros(1, 4))
    assert "part" not in dot(shared, depth=1), "parts of a single node say nothing"


def test_an_open_module_that_is_called_twice_has_a_frame_per_call() -> None:
    source = picture_of(SharedActivation(3), torch.zeros(1, 4), depth=None)
    for number in (1, 2, 3):
        frame = source.split(f'subgraph "cluster 0 act {number}" {{')[1].split("}")[0]
        assert [len(re.findall(rf"{op}\w* \[", frame)) for op in ("relu", "dropout")] == [1, 1]


@pytest.mark.parametrize("seed", range(25))
def test_contracting_never_makes_a_cycle_and_loses_nothing(seed: int) -> None:
    draw = random.Random(seed)
    network = networkx.MultiDiGraph()
    for index in range(60):
        path = ".".join(draw.choice("abc") for _ in range(draw.randint(0, 3)))
        network.add_node(f"n{index}", path=path)
        for _ in range(draw.randint(0, 3) if index else 0):
            network.add_edge(f"n{draw.randint(max(0, index - 12), index - 1)}", f"n{index}")
    tree = module_tree(network)
    assert tree.parts == 1
    every = {module.path for module in tree.below()}
    open_paths = {path for path in every if path.count(".") < draw.randint(0, 3)} | {""}
    drawn = contract(network, {p for p in open_paths if p.rpartition(".")[0] in open_paths})
    members = [name for _, box in drawn.nodes(data="box") for name in box.members]
    assert sorted(members) == sorted(network)
    order = {name: index for index, name in enumerate(drawn)}
    assert all(order[source] < order[target] for source, target in drawn.edges())
    place = {name: at for at, box in drawn.nodes(data="box") for name in box.members}
    wanted = {(place[a], place[b], a) for a, b in network.edges() if place[a] != place[b]}
    assert set(drawn.edges(keys=True)) == wanted
    mark_frames(drawn)
    for path in every:
        _check_frames_hold_together(drawn, path)
    divided = divide(drawn, draw.randint(1, 4))
    assert _joined(divided) == {(a, b, value) for a, b, value in wanted}
    assert all(divided.nodes[a]["column"] == divided.nodes[b]["column"] for a, b in divided.edges())


def _check_frames_hold_together(drawn: networkx.MultiDiGraph, path: str) -> None:
    frames: dict[Any, list[str]] = {}
    for name, keys in drawn.nodes(data="frames"):
        for key in keys:
            if key[0] == path:
                frames.setdefault(key, []).append(name)
    for names in frames.values():
        below = set.union(*(networkx.descendants(drawn, name) for name in names)) - set(names)
        above = set.union(*(networkx.ancestors(drawn, name) for name in names))
        assert not below & above, "a path leaves the frame and comes back"


def _joined(divided: networkx.MultiDiGraph) -> set[tuple[str, str, str]]:
    """Return the edges, with those through connectors as they were."""
    enters = {node: letter for node, letter in divided.nodes(data="letter") if letter is not None}
    plain = {e for e in divided.edges(keys=True) if not {e[0], e[1]} & set(enters)}
    leaving = {(enters[t], v): s for s, t, v in divided.edges(keys=True) if t in enters}
    arriving = {(enters[s], v, t) for s, t, v in divided.edges(keys=True) if s in enters}
    return plain | {(leaving[letter, v], t, v) for letter, v, t in arriving}


def test_a_long_chain_is_set_in_columns() -> None:
    source = picture_of(Chain(40), torch.zeros(1, 4))
    box_of_module = re.compile(r'^\t\t"module (\d+)" \[', re.MULTILINE)
    columns = [box_of_module.findall(part) for part in source.split("cluster ")[1:]]
    assert len(columns) >= 3 and all(8 < len(column) < 20 for column in columns)
    assert [int(name) for column in columns for name in column] == list(range(40))
    assert '"to A"' in source and re.search(r'"from A 1" -> "module \d+"', source)
    assert "to A" not in picture_of(Chain(3), torch.zeros(1, 4))


def test_auto_opens_no_more_than_the_limit() -> None:
    network = folded(SharedActivation(20))
    tree = module_tree(network)
    for limit in (1, 30, 50, 100):
        open_paths = opened(tree, "auto", {}, limit=limit)
        assert len(contract(network, open_paths)) <= max(limit, tree.content)


def test_a_picture_that_would_say_next_to_nothing_may_be_larger() -> None:
    class Nested(nn.Sequential):
        def __init__(self, blocks: int) -> None:
            super().__init__(Chain(blocks))

    assert "0" in opened(module_tree(folded(Nested(READABLE + 20))), "auto", {})
    assert opened(module_tree(folded(Nested(3 * READABLE))), "auto", {}) == {""}


def folded(model: nn.Module) -> networkx.MultiDiGraph:
    """Return the graph of a model on four features, without its constants."""
    return Side.of(fxopt.to_networkx(fxopt.capture(model, torch.zeros(1, 4)))).network


def test_trivial_frames_are_left_out(optimized: fxopt.GraphModule) -> None:
    drawn = contract(fxopt.to_networkx(fxopt.capture(ConvBnRelu(), IMAGE)), {"", "0", "1", "2"})
    mark_frames(drawn)
    assert frame_tree(drawn, drawn).inside == {}


# -- before and after ------------------------------------------------------------------------------


def test_a_step_shows_both_graphs_with_what_differs(optimized: fxopt.GraphModule) -> None:
    source = dot(optimized, step="fuse-conv-bn")
    assert "fuse-conv-bn: 2 rewrites" in source
    assert CHANGE_COLOURS["removed"] in box(source, "before conv2d")
    assert CHANGE_COLOURS["removed"] in box(source, "before batch_norm_1")
    assert CHANGE_COLOURS["added"] in box(source, "after conv2d_2")
    for side in ("before", "after"):
        assert CHANGE_COLOURS["unchanged"] in box(source, f"{side} relu"), "it only follows"
    for word in CHANGE_COLOURS:
        assert f">{word}</FONT></TD>" in source, "a legend"
    assert "before batch_norm_1" in source and "after batch_norm_1" not in source
    assert re.search(r"before\W.*7 nodes", source) and re.search(r"after\W.*5 nodes", source)


def test_all_steps_are_the_captured_and_the_final_graph() -> None:
    graph = fxopt.optimize(
        nn.Sequential(ConvBnRelu(), nn.Dropout()).eval(), IMAGE,
        passes=["fuse-conv-bn", "remove-no-ops"],
    )  # fmt: skip
    source = dot(graph, step="all")
    for gone in ("conv2d", "batch_norm", "dropout"):
        assert CHANGE_COLOURS["removed"] in box(source, f"before {gone}")
    assert dot(graph, step=1) == dot(graph, step="remove-no-ops") == dot(graph, step=-1)


def test_a_step_opens_the_modules_in_which_something_differs() -> None:
    model = nn.Sequential(Chain(5), ConvBnRelu(), Chain(5)).eval()
    model[0] = model[2] = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    graph = fxopt.optimize(model, IMAGE, passes=["fuse-conv-bn"])
    source = dot(graph, step="fuse-conv-bn")
    assert CHANGE_COLOURS["unchanged"] in box(source, "after module 0")
    assert "before conv2d" in source
    closed = dot(graph, step="fuse-conv-bn", depth=1)
    for side, words in (("before", "2 removed"), ("after", "1 added")):
        one = box(closed, f"{side} module 1")
        assert CHANGE_COLOURS["changed"] in one and words in one


def test_what_differs_in_a_body_of_control_flow_is_in_colour() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.sin(), training=False)

    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, branch, lambda x: x.cos(), (x,))

    graph = fxopt.optimize(Choice(), torch.zeros(3), passes=["remove-no-ops"])
    source = dot(graph, step="all")
    assert CHANGE_COLOURS["removed"] in box(source, "before true_graph_0/dropout")
    assert CHANGE_COLOURS["unchanged"] in box(source, "after true_graph_0/sin")


def test_of_steps_with_one_name_it_is_the_first_that_changed_something() -> None:
    graph = fxopt.optimize(
        ConvBnRelu(), IMAGE, passes=["remove-dead-nodes", "fuse-conv-bn", "fuse-conv-bn"]
    )
    assert "fuse-conv-bn: 1 rewrite<" in dot(graph, step="fuse-conv-bn")
    assert "remove-dead-nodes: no rewrites" in dot(graph, step="remove-dead-nodes")


def test_another_step_is_refused(optimized: fxopt.GraphModule) -> None:
    with pytest.raises(fxopt.OptionError, match="Did you mean 'fuse-conv-bn'"):
        dot(optimized, step="fuse-conv-bm")
    with pytest.raises(fxopt.OptionError, match="no step 99"):
        dot(optimized, step=99)
    with pytest.raises(fxopt.FxoptError, match="no story yet"):
        picture_of(ConvBnRelu(), IMAGE, step="fuse-conv-bn")


# -- files -----------------------------------------------------------------------------------------


@needs_dot
def test_every_format(optimized: fxopt.GraphModule, tmp_path: Path) -> None:
    for name, begins in (
        ("a.dot", b"digraph"), ("a.gv", b"digraph"), ("a.svg", b"<?xml"), ("a.png", b"\x89PNG"),
        ("a.PDF", b"%PDF"),
    ):  # fmt: skip
        fxopt.visualize(optimized, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)


@needs_dot
def test_a_large_network_fits_a_page(tmp_path: Path) -> None:
    graph = fxopt.capture(Chain(40), torch.zeros(1, 4))
    fxopt.visualize(graph, tmp_path / "chain.pdf")
    content = (tmp_path / "chain.pdf").read_bytes()
    box_of_page = re.search(rb"/MediaBox \[ ?([\d. ]+) ?\]", content)
    assert box_of_page is not None
    _, _, width, height = map(float, box_of_page[1].split())
    assert width <= 595 and height <= 842, "A4 in points"


def test_without_graphviz_the_error_says_what_to_do(
    optimized: fxopt.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(fxopt.FxoptError, match=r"apt-get install graphviz.*\.html page needs"):
        fxopt.visualize(optimized, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
    fxopt.visualize(optimized, tmp_path / "a.dot")
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    assert optimized._repr_svg_() is None, "a notebook shows the text"


def test_another_suffix_is_refused(optimized: fxopt.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(fxopt.OptionError, match=r"ends in \.dot, .*\.svg.*\.html"):
        fxopt.visualize(optimized, tmp_path / "a.gif")


def test_a_picture_that_would_take_minutes_is_refused(
    optimized: fxopt.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "LARGEST", 3)
    with pytest.raises(fxopt.FxoptError, match=r"has 7 boxes.*--depth.*\.html"):
        fxopt.visualize(optimized, tmp_path / "a.svg")
    fxopt.visualize(optimized, tmp_path / "a.dot")


@needs_dot
def test_a_picture_that_does_take_minutes_is_stopped(
    optimized: fxopt.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "SECONDS", 1e-6)
    with pytest.raises(fxopt.FxoptError, match="was not done"):
        fxopt.visualize(optimized, tmp_path / "a.svg")


@needs_dot
def test_an_error_of_graphviz_is_handed_on() -> None:
    with pytest.raises(fxopt.FxoptError, match="syntax error"):
        render.render("digraph {", "svg", 1)


def test_a_graph_of_thousands_of_nodes_is_drawn_collapsed_in_little_time() -> None:
    network = networkx.MultiDiGraph()
    for index in range(6000):
        network.add_node(f"n{index}", path=f"blocks.{index // 60}.{index % 6}")
        if index:
            network.add_edge(f"n{index - 1}", f"n{index}")
    drawn = contract(network, {""})
    assert len(drawn) == 1


def test_a_large_picture_is_laid_out_in_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.picture import draw

    graph = fxopt.capture(ConvBnRelu(), IMAGE)
    assert "nslimit" not in dot(graph)
    monkeypatch.setattr(draw, "LARGE", 2)
    source = dot(graph)
    assert "nslimit=1" in source and "nslimit1" not in source, "nslimit1 crashes dot now and then"


def test_a_page_is_written_by_the_page(
    optimized: fxopt.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr("fxopt.page.write_page", lambda what, path: written.append((what, path)))
    fxopt.visualize(optimized, tmp_path / "a.html")
    assert written == [(optimized, tmp_path / "a.html")]
    with pytest.raises(fxopt.OptionError, match="needs a graph or a compiled model, not a Story"):
        fxopt.visualize(optimized.story, tmp_path / "a.html")


# -- what can be drawn -----------------------------------------------------------------------------


def test_a_story_a_snapshot_and_a_compiled_model_are_drawn(tmp_path: Path) -> None:
    compiled = fxopt.compile(Residual(), IMAGE)
    assert compiled.graph is not None and compiled.story is not None
    assert box(dot(compiled.story), "conv2d_2") == box(dot(compiled.graph), "conv2d_2")
    assert "fuse-conv-bn" in dot(compiled.story, step="fuse-conv-bn")
    assert box(dot(Recorder().snapshot(compiled.graph)), "conv2d_2")
    compiled.visualize(tmp_path / "a.dot", step="fuse-conv-bn", depth=1)
    assert "before" in (tmp_path / "a.dot").read_text()
    with pytest.raises(fxopt.OptionError, match="A Linear cannot be drawn"):
        dot(nn.Linear(1, 1))  # type: ignore[arg-type]
    compiled.graph = None
    with pytest.raises(fxopt.FxoptError, match="without a graph"):
        compiled.visualize(tmp_path / "a.dot")


class Words(HTMLParser):
    """Collects the text of a page, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "br":
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@needs_dot
def test_a_notebook_shows_graphs_and_compiled_models() -> None:
    compiled = fxopt.compile(Residual(), IMAGE)
    assert compiled.graph is not None
    picture = ElementTree.fromstring(compiled.graph._repr_svg_() or "")
    assert picture.tag.endswith("svg") and "Residual" in "".join(picture.itertext())
    page = Words()
    page.feed(compiled._repr_html_())
    assert not page.stack
    assert {"fuse-conv-bn", "rewrites", "graph", "weight 8×8×3×3"} <= set(page.words)
    assert any("verified: eager backend" in word for word in page.words)


def test_what_a_notebook_shows_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    compiled = fxopt.compile(ConvBnRelu(), IMAGE)
    assert compiled.story is not None
    compiled.story.model_name = "<script>alert(1)</script>"
    text = compiled._repr_html_()
    assert "<script>" not in text and "&lt;script&gt;" in text and "<svg" not in text
    compiled.story = None
    assert "loaded model" in compiled._repr_html_()
    page = Words()
    page.feed(compiled._repr_html_())
    assert not page.stack


def test_a_graph_that_is_no_capture_still_shows_itself() -> None:
    plain = fxopt.GraphModule(nn.Module(), torch.fx.Graph())
    assert plain._repr_svg_() is None


# -- colours ---------------------------------------------------------------------------------------


def test_every_colour_lets_its_text_be_read() -> None:
    assert set(FAMILY_COLOURS) == set(FAMILIES)
    for fill in (*FAMILY_COLOURS.values(), *CHANGE_COLOURS.values(), GROUP, *CLUSTERS):
        assert _contrast(fill, TEXT) >= 7, fill
        assert _contrast(fill, QUIET_TEXT) >= 4.5, fill


def _contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours, as WCAG 2 defines it."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_write_names_every_kind_it_takes() -> None:
    assert set(write.SUFFIXES) == {"dot", "gv", "svg", "png", "pdf", "html"}
