"""The interactive page in a real browser: what it shows, and what clicks and keys do to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.page import page_data
from fxopt.page.write import _assemble
from fxopt.story import Snapshot
from tests.programs import needs_chromium

pytestmark = needs_chromium
SIGNS = (("removed", "−"), ("added", "+"), ("changed", "~"))
READY = "performance.getEntriesByName('fxopt-ready').length === 1"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


@pytest.fixture(scope="module")
def graph() -> fxopt.GraphModule:
    torch.manual_seed(0)
    return fxopt.optimize(
        Small().eval(), torch.randn(1, 3, 8, 8),
        passes=["remove-dead-nodes", "remove-no-ops", "fuse-conv-bn"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(graph: fxopt.GraphModule) -> dict[str, Any]:
    return page_data(graph)


class View:
    """A page in the browser, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._complain)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _complain(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def open(self, path: Path, hash: str = "") -> View:
        self.page.goto(path.as_uri() + hash)
        self.page.wait_for_function(READY, timeout=20_000)
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of window.fxoptPage, and wait for what it starts."""
        return self.page.evaluate("([m, a]) => fxoptPage[m](...a)", [method, list(arguments)])

    def check(self) -> None:
        """Nothing was complained about, and nothing was asked of a network."""
        assert not self.problems, self.problems
        outside = [u for u in self.requests if not u.startswith(("file:", "blob:", "data:"))]
        assert not outside, outside

    @property
    def state(self) -> dict[str, Any]:
        return self.call("state")

    def boxes(self) -> dict[str, dict[str, Any]]:
        return {box["name"]: box for box in self.call("boxes")}

    def statuses(self) -> dict[str, set[str]]:
        """The names of all nodes that are visible, by status."""
        found: dict[str, set[str]] = {"removed": set(), "added": set(), "changed": set()}
        for box in self.call("boxes"):
            if box["kind"] == "node" and box["status"] != "same":
                found[box["status"]].add(box["name"])
        return found

    def settle(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=5_000)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def click_toggle(self, name: str) -> None:
        """Press the plus or the minus of a group with the mouse."""
        box, scale = self.boxes()[name], self.state["scale"]
        x = box["x"] + (16 * scale if box["expanded"] else box["width"] - 20 * scale)
        self.page.mouse.click(x, box["y"] + (15 if box["expanded"] else 17) * scale)

    def click_box(self, name: str) -> None:
        box = self.boxes()[name]
        self.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("pages")

    def write(data: dict[str, Any]) -> Path:
        path = folder / f"page{len(list(folder.iterdir()))}.html"
        path.write_text(_assemble(data), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def small(data: dict[str, Any], file: Callable[[dict[str, Any]], Path]) -> Path:
    return file(data)


def opened(browser: Any) -> View:
    return View(browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light"))


@pytest.fixture
def fresh(browser: Any) -> Iterator[View]:
    """A browser tab of its own, for a test that opens another page."""
    view = opened(browser)
    yield view
    view.page.close()
    view.check()


@pytest.fixture(scope="module")
def shared(browser: Any, small: Path) -> Iterator[View]:
    view = opened(browser).open(small)
    yield view
    view.page.close()


@pytest.fixture
def view(shared: View) -> Iterator[View]:
    """The page of the small model, all groups closed, at the view of all passes."""
    shared.call("step", -1, "changes")
    shared.call("collapseAll")
    shared.call("fit")
    shared.page.evaluate("select(null); showTab('graph')")
    shared.page.mouse.move(5, 5)
    yield shared
    shared.check()


def names(snapshot: Snapshot) -> dict[str, str]:
    """The nodes that the page draws, with the text of each."""
    return {r.name: r.text for r in snapshot.records if r.op != "get_attr"}


def expected(before: Snapshot, after: Snapshot) -> dict[str, set[str]]:
    old, new = names(before), names(after)
    return {
        "removed": set(old) - set(new),
        "added": set(new) - set(old),
        "changed": {name for name in set(old) & set(new) if old[name] != new[name]},
    }


# -- opening ---------------------------------------------------------------------------------------


def test_it_opens_offline_and_draws(fresh: View, small: Path) -> None:
    fresh.page.context.set_offline(True)
    fresh.open(small)
    assert fresh.text("#model") == "Small"
    assert "18 → 13 nodes" in fresh.text("#summary")
    assert fresh.state["boxes"] > 5
    colours = fresh.page.evaluate(
        "new Set(new Uint32Array(canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    )
    assert colours > 20, "the canvas is not blank"


def test_without_workers_it_lays_out_by_itself(fresh: View, small: Path) -> None:
    fresh.page.add_init_script("delete window.Worker")
    fresh.open(small)
    assert fresh.state["boxes"] > 5


def test_a_graph_without_a_story_has_one_view(
    fresh: View, file: Callable[[dict[str, Any]], Path]
) -> None:
    graph = fxopt.capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    fresh.open(file(page_data(graph)))
    assert fresh.state["step"] == 0 and fresh.state["view"] == "after"
    assert fresh.page.locator("#views button:disabled").count() == 2
    fresh.page.keyboard.press("ArrowUp")
    assert fresh.state["step"] == 0


def test_odd_names_are_text_and_nothing_else(
    fresh: View, data: dict[str, Any], file: Callable[[dict[str, Any]], Path]
) -> None:
    odd = "</script><script>hacked = 1</script><img src=x onerror=hacked=1> \"'&amp; <!--DATA-->"
    changed = copy.deepcopy(data)
    changed["model"] = odd
    changed["facts"] = [[odd, odd]]
    changed["steps"][1]["misses"] = [{"node": "conv2d", "reason": odd}]
    for record in changed["records"]:
        record["label"] = record["module"] = record["source"] = odd
        record["arguments"] = [[odd, odd]]
    fresh.open(file(changed))
    fresh.call("step", 1)
    fresh.call("select", "conv2d")
    fresh.page.keyboard.press("/")
    fresh.page.keyboard.type("script")
    assert fresh.text("#model") == odd
    assert odd in fresh.text("#details")
    assert fresh.page.evaluate("window.hacked") is None


# -- expanding -------------------------------------------------------------------------------------


def test_a_click_on_plus_opens_a_group_and_one_on_minus_closes_it(view: View) -> None:
    view.call("step", 0)
    view.call("collapseAll")
    assert {"x", "blocks", "linear"} <= set(view.boxes())
    before = view.boxes()["blocks"]
    view.click_toggle("blocks")
    view.settle("fxoptPage.boxes().some(b => b.name === 'blocks.1')")
    after = view.boxes()["blocks"]
    assert after["expanded"]
    assert (round(after["x"]), round(after["y"])) == (round(before["x"]), round(before["y"]))
    view.click_toggle("blocks.0")
    view.settle("fxoptPage.boxes().some(b => b.name === 'batch_norm')")
    view.click_toggle("blocks")
    view.settle("!fxoptPage.boxes().some(b => b.name === 'blocks.1')")
    assert "batch_norm" not in view.boxes()


def test_a_double_click_opens_a_group_too(view: View) -> None:
    view.call("collapseAll")
    box = view.boxes()["blocks"]
    view.page.mouse.dblclick(box["x"] + 20, box["y"] + box["height"] / 2)
    view.settle("fxoptPage.boxes().some(b => b.name === 'blocks.1')")
    assert view.state["selection"] == {"kind": "group", "path": "blocks"}


def are_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(
        first[start] + first[size] <= second[start]
        for start, size in (("x", "width"), ("y", "height"))
        for first, second in ((one, other), (other, one))
    )


def test_boxes_nest_and_do_not_overlap(view: View) -> None:
    view.call("step", 0)
    view.call("expandAll")
    boxes = view.call("boxes")
    frame = view.boxes()["blocks.0"]
    inside = [box for box in boxes if box["name"] in ("conv2d_1", "batch_norm", "relu", "add")]
    assert len(inside) == 4
    for box in inside:
        assert frame["x"] < box["x"] and box["x"] + box["width"] < frame["x"] + frame["width"]
        assert frame["y"] < box["y"] and box["y"] + box["height"] < frame["y"] + frame["height"]
    leaves = [box for box in boxes if not box["expanded"]]
    for one in leaves:
        for other in leaves:
            if one is not other:
                assert are_apart(one, other), (one["name"], other["name"])


class Rectified(nn.Module):
    """One ReLU, called three times with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(self.relu(x) - 1) * 2) + 3


def test_a_layer_called_in_several_places_is_no_group(
    fresh: View, file: Callable[[dict[str, Any]], Path]
) -> None:
    fresh.open(file(page_data(fxopt.capture(Rectified(), torch.randn(2, 3)))))
    assert {box["kind"] for box in fresh.call("boxes")} == {"node"}
    assert {"relu", "relu_1", "relu_2"} <= set(fresh.boxes())


# -- steps and views -------------------------------------------------------------------------------


def test_the_keyboard_steps_through_all_passes(
    view: View, graph: fxopt.GraphModule
) -> None:
    story = graph.info.story
    assert story is not None
    view.call("expandAll")
    assert view.state["step"] == -1
    assert view.statuses() == expected(story.captured, story.final)
    view.page.keyboard.press("j")
    assert view.state["step"] == 0
    for number, step in enumerate(story.steps, start=1):
        view.page.keyboard.press("ArrowDown")
        view.settle(f"fxoptPage.state().step === {number}")
        view.call("expandAll")
        change = expected(step.before, step.after)
        assert view.statuses() == change, step.name
        counts = "".join(f"{sign}{len(change[kind])}" for kind, sign in SIGNS if change[kind])
        card = view.page.locator("#steps [aria-selected=true] b").all_inner_texts()
        assert "".join(card) == counts
        assert step.name in view.text("#steps [aria-selected=true]")
        assert step.name in view.text("#details")
    view.page.keyboard.press("ArrowDown")
    view.page.keyboard.press("k")
    view.settle(f"fxoptPage.state().step === {len(story.steps) - 1}")


def test_before_and_after_show_one_graph_each(
    view: View, graph: fxopt.GraphModule
) -> None:
    story = graph.info.story
    assert story is not None
    step = story.steps[2]
    change = expected(step.before, step.after)
    assert change["removed"] and change["added"] and change["changed"]
    for shown, snapshot, absent in (("1", step.before, "added"), ("3", step.after, "removed")):
        view.call("step", 3)
        view.page.keyboard.press(shown)
        view.call("expandAll")
        nodes = {box["name"] for box in view.call("boxes") if box["kind"] == "node"}
        assert nodes == set(names(snapshot))
        assert view.statuses() == {**change, absent: set()}


def test_a_group_says_what_it_hides_and_show_changes_opens_it(view: View) -> None:
    view.call("step", 3)
    view.call("collapseAll")
    assert view.boxes()["blocks"]["status"] == "changed-inside"
    view.page.click("#show-changes")
    view.settle("fxoptPage.boxes().some(b => b.status === 'added')")
    assert view.page.locator("#show-changes").is_disabled()


def test_a_step_keeps_the_expansion_and_the_place(view: View) -> None:
    view.call("step", 0)
    view.call("expandAll")
    view.call("select", "relu")
    view.page.wait_for_timeout(350)
    before = view.boxes()["relu"]
    view.call("step", 3)
    after = view.boxes()["relu"]
    assert after["status"] == "changed"
    assert view.state["selection"] == {"kind": "node", "name": "relu"}
    assert abs(after["x"] - before["x"]) < 2 and abs(after["y"] - before["y"]) < 2


def test_a_step_that_was_rolled_back_says_why(
    fresh: View, data: dict[str, Any], file: Callable[[dict[str, Any]], Path]
) -> None:
    changed = copy.deepcopy(data)
    changed["steps"][1]["skipped"] = "the result differs by 0.3"
    fresh.open(file(changed))
    assert "rolled back: the result differs by 0.3" in fresh.text("#step-1")


def test_misses_lead_to_their_nodes(
    fresh: View, data: dict[str, Any], file: Callable[[dict[str, Any]], Path]
) -> None:
    changed = copy.deepcopy(data)
    changed["steps"][3]["misses"] = [{"node": "batch_norm", "reason": "it is used twice"}]
    changed["steps"][3]["rules"] = [{"name": "fold", "tried": 4, "matched": 2, "rewritten": 1}]
    fresh.open(file(changed))
    fresh.call("step", 3)
    assert "it is used twice" in fresh.text("#details")
    assert fresh.text("#details tbody tr").split() == ["fold", "4", "2", "1"]
    fresh.page.click(".miss .link")
    fresh.settle("fxoptPage.state().selection?.name === 'batch_norm'")


# -- finding and reading ---------------------------------------------------------------------------


def test_search_opens_what_hides_a_hit_and_brings_it_to_the_middle(view: View) -> None:
    view.call("collapseAll")
    view.page.keyboard.press("/")
    view.page.keyboard.type("blocks.1 add")
    assert view.page.locator("#hits [role=option]").count() == 1
    view.page.keyboard.press("Enter")
    view.settle("fxoptPage.state().selection?.name === 'add_1'")
    view.page.wait_for_timeout(350)
    box = view.boxes()["add_1"]
    assert 300 < box["x"] < 950 and 100 < box["y"] < 700
    assert not view.page.locator("#hits").is_visible()


def test_search_finds_operators_paths_and_classes(view: View) -> None:
    for text, first in (("relu_1", "relu_1"), ("batchnorm", "batch_norm"), ("blocks.0", "Block")):
        view.page.fill("#query", text)
        assert view.page.locator("#hits .name").first.inner_text() == first
    view.page.fill("#query", "block")
    view.page.press("#query", "ArrowDown")
    assert view.page.locator("#hits [aria-selected=true]").get_attribute("id") == "hit-1"
    view.page.fill("#query", "no such thing")
    assert "Nothing" in view.text("#hits")
    view.page.press("#query", "Escape")
    assert not view.page.locator("#hits").is_visible()


def test_details_say_everything_about_a_node(
    view: View, data: dict[str, Any], graph: fxopt.GraphModule
) -> None:
    view.call("step", 3)
    record = next(r for r in data["records"] if r["pass"] == "fuse-conv-bn" and r["replaces"])
    view.call("select", record["name"])
    text = view.text("#details")
    for part in (
        "conv2d", record["type"], "fuse-conv-bn", record["module"], "Conv2d", "test_view.py",
        "[1, 1]", f"%{record['inputs'][0]}", *(f"%{name}" for name in record["replaces"]),
        "584", "20.7 k",
    ):  # fmt: skip
        assert part in text.replace("\u202f", " "), part
    for quantity in ("params", "macs", "flops"):
        assert record[quantity] > 0
    for caption in ("parameters", "MACs", "FLOPs", "read", "written", "Users"):
        assert caption.lower() in text.lower()


def test_what_a_node_replaced_is_found_in_the_graph_before(
    view: View, data: dict[str, Any]
) -> None:
    view.call("step", 3, "after")
    record = next(r for r in data["records"] if r["pass"] == "fuse-conv-bn" and r["replaces"])
    old = record["replaces"][-1]
    view.call("select", record["name"])
    view.page.click(f"#details .pairs .link:text-is('%{old}')")
    view.settle(f"fxoptPage.state().selection?.name === '{old}'")
    assert (view.state["step"], view.state["view"]) == (3, "before")
    assert view.boxes()[old]["status"] == "removed"


def test_a_changed_node_shows_its_arguments_before_and_after(view: View) -> None:
    view.call("step", 3)
    view.call("select", "relu")
    assert view.page.locator("#details .pairs del").first.inner_text() == "%batch_norm"
    assert view.page.locator("#details .pairs ins").first.inner_text().startswith("%conv2d")


def test_a_click_selects_and_one_beside_deselects(view: View) -> None:
    view.call("collapseAll")
    view.click_box("linear")
    assert view.state["selection"] == {"kind": "node", "name": "linear"}
    view.click_box("blocks")
    assert view.state["selection"] == {"kind": "group", "path": "blocks"}
    assert "10 nodes" in view.text("#details")
    view.page.mouse.click(300, 400)
    assert view.state["selection"] is None


def test_hovering_shows_what_is_under_the_mouse(view: View) -> None:
    view.call("collapseAll")
    box = view.boxes()["linear"]
    view.page.mouse.move(box["x"] + 30, box["y"] + 10)
    view.page.wait_for_selector("#tooltip", state="visible")
    assert "%linear" in view.text("#tooltip") and "f32[1,5]" in view.text("#tooltip")
    view.page.mouse.move(300, 400)
    view.page.wait_for_selector("#tooltip", state="hidden")


# -- the rest of the page --------------------------------------------------------------------------


def test_the_mouse_pans_and_zooms(view: View) -> None:
    view.call("collapseAll")
    before = view.boxes()["linear"]
    view.page.mouse.move(300, 400)
    view.page.mouse.down()
    view.page.mouse.move(380, 430, steps=4)
    view.page.mouse.up()
    after = view.boxes()["linear"]
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (80, 30)
    scale = view.state["scale"]
    view.page.mouse.wheel(0, -200)
    view.settle(f"fxoptPage.state().scale > {scale}")
    assert view.state["selection"] is None, "a drag is no click"
    box = view.boxes()["linear"]
    view.page.mouse.move(box["x"] + 20, box["y"] + 10)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + 22, box["y"] + 11)
    view.page.mouse.up()
    assert view.state["selection"] is not None, "a click with an unsteady hand is one"


def test_the_theme_follows_the_system_and_the_button(fresh: View, small: Path) -> None:
    fresh.page.emulate_media(color_scheme="dark")
    fresh.open(small)
    assert fresh.page.evaluate("d3.lab(colours.canvas).l") < 20
    fresh.page.click("#theme")
    fresh.page.wait_for_timeout(60)
    corner = "[...canvas.getContext('2d').getImageData(3, canvas.height / 2, 1, 1).data]"
    assert min(fresh.page.evaluate(corner)[:3]) > 200


def test_costs_fold_sort_and_lead_to_the_graph(view: View) -> None:
    view.page.click("#tab-costs")
    rows = view.page.locator(".costs-table tbody tr")
    folded = rows.count()
    view.page.click(".fold")
    assert rows.count() == folded + 2
    view.page.click("th:has-text('MACs') button")
    assert "blocks" in rows.nth(1).inner_text()
    view.page.click("th:has-text('MACs') button")
    assert "blocks" not in rows.nth(1).inner_text()
    view.page.click("button:text-is('Captured')")
    assert "18" in rows.nth(0).inner_text().split()
    view.page.click(".costs-table .link:text-is('Block') >> nth=0")
    view.settle("fxoptPage.state().tab === 'graph' && fxoptPage.state().selection !== null")
    assert view.state["selection"]["path"].startswith("blocks.")


def test_memory_over_time_says_the_node_and_selects_it(
    view: View, data: dict[str, Any]
) -> None:
    view.call("tab", "costs")
    view.page.locator(".chart svg").first.hover()
    reading = view.text(".reading >> nth=0")
    assert "captured %" in reading and "B" in reading
    view.page.locator(".chart svg").first.click()
    view.settle("fxoptPage.state().tab === 'graph'")
    assert f"%{view.state['selection']['name']}" in reading


def test_the_roofline_stands_where_times_were_measured(
    fresh: View, data: dict[str, Any], file: Callable[[dict[str, Any]], Path]
) -> None:
    measured = copy.deepcopy(data)
    points = [
        {"name": "linear", "flops": 80, "bytes": 400, "ms": 0.1},
        {"name": "dropout", "flops": 0, "bytes": 40, "ms": 0.1},
    ]
    measured["roofline"] = {
        "machine": "a machine", "flops_per_second": 1e9, "bytes_per_second": 1e9, "points": points,
    }  # fmt: skip
    for record in measured["records"]:
        record["ms"] = 0.1 if record["name"] == "linear" else None
    fresh.open(file(measured))
    fresh.call("tab", "costs")
    assert fresh.page.locator(".mark").count() == 1
    assert "1 node without arithmetic" in fresh.text("#costs")
    assert fresh.page.locator(".costs-table th:has-text('ms')").count() == 1
    fresh.page.locator(".mark").hover()
    assert "%linear" in fresh.text(".chart:has(.mark) .reading")
    fresh.page.locator(".mark").click()
    fresh.settle("fxoptPage.state().selection?.name === 'linear'")


def test_the_address_opens_the_same_place(fresh: View, small: Path) -> None:
    fresh.open(small, "#step=3&view=before&node=batch_norm_1")
    state = fresh.state
    assert (state["step"], state["view"]) == (3, "before")
    assert state["selection"] == {"kind": "node", "name": "batch_norm_1"}
    fresh.call("step", 2)
    assert "step=2" in fresh.page.evaluate("location.hash")
    fresh.page.evaluate("location.hash = '#step=99&view=nonsense&node=nobody'")
    fresh.settle("fxoptPage.state().step === -1 && fxoptPage.state().selection === null")
    assert fresh.state["view"] == "changes"
    fresh.call("select", "linear")
    fresh.page.evaluate("location.hash = '#step=1&view=after'")
    fresh.settle("fxoptPage.state().step === 1 && fxoptPage.state().selection === null")


def test_every_key_in_the_list_does_something(view: View) -> None:
    view.page.keyboard.press("?")
    assert view.page.locator("#keys dt").count() > 15
    assert "elkjs" in view.text("#notice") and "d3" in view.text("#notice")
    view.page.keyboard.press("Escape")
    view.page.keyboard.press("c")
    view.settle("!fxoptPage.boxes().some(b => b.expanded)")
    view.page.keyboard.press("e")
    view.settle("fxoptPage.boxes().every(b => b.kind === 'node' || b.expanded)")
    view.page.keyboard.press("l")
    assert view.state["selection"] == {"kind": "node", "name": "x"}
    view.page.keyboard.press("Escape")
    assert view.state["selection"] is None
    view.page.keyboard.press("g")
    assert view.state["tab"] == "costs"


def test_controls_have_names(view: View) -> None:
    nameless = view.page.evaluate(
        "[...document.querySelectorAll('button, input, canvas, [role]')]"
        ".filter(e => !e.hidden && e.offsetParent && !(e.textContent.trim() ||"
        " e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')))"
        ".map(e => e.outerHTML.slice(0, 90))"
    )
    assert nameless == ["<output"] or not nameless, nameless


# -- large graphs ----------------------------------------------------------------------------------


def drawn(inputs: list[list[int]]) -> dict[str, Any]:
    """The data of a graph without modules, from the inputs of each node."""
    fixed = {
        "kind": "call", "label": "add", "family": "elementwise", "type": "f32[4]", "shape": "4",
        "dtype": "f32", "text": "", "arguments": [], "path": "", "module": "", "source": "",
        "rule": None, "replaces": [], "pass": None, "macs": 0, "flops": 4, "params": 0,
        "parameters": {},
        "read": 16, "written": 16, "ms": None,
    }  # fmt: skip
    records = [
        {**fixed, "name": f"n{i}", "inputs": [f"n{j}" for j in those]}
        for i, those in enumerate(inputs)
    ]
    step = {
        "name": "capture", "options": {}, "effect": "exact", "seconds": 0.1, "rewrites": 0,
        "skipped": None, "counts": {"nodes": len(inputs), "parameters": 0, "macs": 0},
        "records": list(range(len(inputs))), "origins": {}, "misses": [], "rules": [],
    }  # fmt: skip
    return {
        "version": 1, "model": "Drawn", "tool": "fxopt", "facts": [], "records": records,
        "modules": {}, "steps": [step], "memory": {"before": [], "after": []}, "roofline": None,
    }  # fmt: skip


def test_a_graph_without_modules_is_cut_into_stretches(
    fresh: View, file: Callable[[dict[str, Any]], Path]
) -> None:
    chain = [[], *([i] for i in range(499))]
    fresh.open(file(drawn(chain)))
    assert 10 <= fresh.state["boxes"] <= 60
    fresh.call("select", "n333")
    assert "n333" in fresh.boxes()
    fresh.call("expandAll")
    assert sum(box["kind"] == "node" for box in fresh.call("boxes")) == 500


def test_of_a_dense_block_the_long_wires_are_shown_for_the_selected_node(
    fresh: View, file: Callable[[dict[str, Any]], Path]
) -> None:
    dense = [list(range(i)) for i in range(40)]
    fresh.open(file(drawn(dense)))
    assert fresh.state["wires"] == 40 * 39 // 2
    assert "long wires" in fresh.text("#legend")
    traced = (
        "() => { const old = traceWire; let count = 0;"
        " traceWire = (...a) => { count++; old(...a); };"
        " fit(); paintNow(); traceWire = old; return count; }"
    )
    routed = fresh.page.evaluate(traced)
    assert 39 <= routed < 500
    fresh.call("select", "n39")
    assert fresh.page.evaluate(traced) > routed + 10


def test_only_what_is_in_view_is_drawn(fresh: View, file: Callable[[dict[str, Any]], Path]) -> None:
    fresh.open(file(drawn([[], *([i] for i in range(499))])))
    fresh.call("expandAll")
    fresh.call("select", "n250")
    fresh.page.wait_for_timeout(350)
    written = fresh.page.evaluate(
        "() => { const old = context.fillText; let count = 0;"
        " context.fillText = (...a) => { count++; return old.apply(context, a); };"
        " paintNow(); context.fillText = old; return count; }"
    )
    assert 5 < written < 200
