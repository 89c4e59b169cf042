"""Residual blocks, y = x + f(x), found in a graph by who post-dominates whom.

A node's immediate post-dominator is the next node that every path from it to the graph's end goes
through. Those nodes form a tree, and what stands below r in it is what nobody but r needs. So
y = x + r is a residual block where only y uses r, and one of x's users stands below r: that part of
the tree is f. It may read other values, too: a mask, an encoder's states, rotary angles.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxopt.contract import Miss
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor, same_metadata, shape_of

aten = torch.ops.aten
_LOOK_BACK = 200  # nodes that are searched behind a sum for what made it no block


@dataclass(frozen=True)
class ResidualBlock:
    """One sum y = x + f(x): the nodes of y (`sum`), of x (`shortcut`) and of f(x) (`branch`).

    `place` is the position of x among the sum's arguments.
    `name` is the path of the module that adds, with #1, #2 … behind it where it adds several times.
    `parts` are its own modules that stand in f, but not in a block inside f; `outer` is the index
    of the innermost block around this one.
    """

    name: str
    path: str
    parts: tuple[str, ...]
    sum: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    place: int
    outer: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the block may be called by."""
        return tuple(dict.fromkeys((self.name, self.path, *self.parts)))


def residual_blocks(graph: GraphModule) -> tuple[tuple[ResidualBlock, ...], tuple[Miss, ...]]:
    """Return the blocks of a graph, outer before inner, else in its order, and sums that are none.

    Takes time linear in the size of the graph, up to a logarithm.
    """
    tree = _PostDominators(list(graph.graph.nodes))
    found: list[tuple[fx.Node, int]] = []
    misses: list[Miss] = []
    for node in graph.find(aten.add.Tensor):
        a, b = node.args[:2]
        if a is b or not (_is_computed(a) and _is_computed(b)):
            continue
        place = next((i for i in (0, 1) if _is_block(tree, node, i)), None)
        if place is None:
            reason = _why_not(tree, node)
        else:
            reason = _cannot_stand_for(node.args[place], node)
            if reason is None:
                found.append((node, place))
        if reason is not None:
            misses.append(Miss(node.name, reason))
    return tuple(_named(tree, found)), tuple(misses)


def _is_computed(argument: Any) -> bool:
    return is_tensor(argument) and argument.op != "get_attr"


def _is_block(tree: _PostDominators, node: fx.Node, place: int) -> bool:
    """Whether the other operand is a branch that starts at the operand at `place`."""
    x, branch = cast(fx.Node, node.args[place]), cast(fx.Node, node.args[1 - place])
    scaled = place == 1 and node.kwargs.get("alpha", 1) != 1
    return not scaled and len(branch.users) == 1 and tree.reads(branch, x)


def _cannot_stand_for(x: Any, node: fx.Node) -> str | None:
    if same_metadata(x, node):
        return None
    return f"its input is {_text(x)}, and its output {_text(node)}"


def _text(node: fx.Node) -> str:
    return f"{str(node.meta['val'].dtype).removeprefix('torch.')}{list(shape_of(node))}"


def _why_not(tree: _PostDominators, node: fx.Node) -> str | None:
    """Why a sum that looks like a residual block is none; None for any other sum."""
    a, b = (one for one in node.args[:2] if isinstance(one, fx.Node))
    if {a, b} <= set(tree.children(node)):
        for fork in tree.children(node):
            if fork not in (a, b) and len(fork.users) > 1 and _is_computed(fork):
                shorter = min((a, b), key=lambda one: tree.size(one))
                where = shorter.meta.get("path") or shorter.name
                shapes = f", from {_text(fork)} to {_text(node)}"
                return f"its shortcut computes something, too, in {where}{shapes}"
    if len(a.users) == 1 and tree.reads(a, b):
        return "its shortcut is scaled"
    for x, branch in ((a, b), (b, a)):
        other = _other_user(tree, x, branch)
        if other is not None:
            return f"its branch is used elsewhere, too: {other.name}"
    return None


def _other_user(tree: _PostDominators, x: fx.Node, branch: fx.Node) -> fx.Node | None:
    """Return what stands between x and its branch's end and is used elsewhere; None if no branch.

    Looks at so many nodes only.
    """
    came_from: dict[fx.Node, fx.Node | None] = {branch: None}
    pending = deque([branch])
    while pending and len(came_from) < _LOOK_BACK:
        node = pending.popleft()
        for used in node.all_input_nodes:
            if used is x:
                culprit = None
                step: fx.Node | None = node
                while step is not None:  # from x to the branch's end: the last one used elsewhere
                    inside = tree.is_below(branch, step) and step is not branch
                    culprit = culprit if inside or step is branch else step
                    step = came_from[step]
                return culprit or branch
            if used not in came_from and used.op == "call_function":
                came_from[used] = node
                pending.append(used)
    return None


def _named(
    tree: _PostDominators, found: Sequence[tuple[fx.Node, int]]
) -> Iterator[ResidualBlock]:
    """Yield the blocks, outer before inner, with their names, parts and nesting."""
    branches = [cast(fx.Node, node.args[1 - place]) for node, place in found]
    owners = _owners(tree, branches)
    paths = [str(node.meta.get("path") or "") for node, _ in found]
    parts: list[set[str]] = [set() for _ in found]
    for node, owner in owners.items():
        part = _part_of(paths[owner], str(node.meta.get("path") or ""))
        if part and node.op == "call_function":
            parts[owner].add(part)
    for (node, _), path in zip(found, paths, strict=True):
        around = owners.get(node)
        if around is not None:  # the part with an inner block in it is that block's name
            parts[around].discard(_part_of(paths[around], path) or "")
    # Sums stand in the graph's order, so an outer one behind those inside it.
    order = list(range(len(found)))[::-1]
    new_index = {old: new for new, old in enumerate(order)}
    totals, seen = Counter(paths), Counter[str]()
    names = []
    for path in paths:
        seen[path] += 1
        names.append(path if path and totals[path] == 1 else f"{path}#{seen[path]}")
    for index in order:
        node, place = found[index]
        outer = owners.get(node)
        yield ResidualBlock(
            name=names[index], path=paths[index], parts=tuple(sorted(parts[index])), sum=node,
            shortcut=cast(fx.Node, node.args[place]), branch=branches[index], place=place,
            outer=None if outer is None else new_index[outer],
        )  # fmt: skip


def _part_of(path: str, inner: str) -> str | None:
    """Return the module right below `path` that `inner` stands in."""
    prefix = f"{path}." if path else ""
    if not inner.startswith(prefix) or inner == path:
        return None
    return prefix + inner[len(prefix) :].partition(".")[0]


def _owners(tree: _PostDominators, branches: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return for each node in a branch the index of the innermost branch it stands in."""
    starts = {tree.start(branch): index for index, branch in enumerate(branches)}
    found: dict[fx.Node, int] = {}
    around: list[tuple[int, int]] = []  # the branches around this node: their ends, their indices
    for position, node in enumerate(tree.preorder):
        while around and around[-1][0] <= position:
            around.pop()
        if position in starts:
            branch = branches[starts[position]]
            around.append((position + tree.size(branch), starts[position]))
        if around and node is not None:
            found[node] = around[-1][1]
    return found


class _PostDominators:
    """The tree of immediate post-dominators, whose root is the end of the graph.

    What has an effect, and what nobody uses, hangs from the root. A node's common ancestor with
    another is found in logarithmic time: each node knows its parent, and one farther ancestor (the
    skew-binary jump pointers of Myers, "An applicative random-access stack", 1983).
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._nodes = nodes
        self._index = {node: index for index, node in enumerate(nodes)}
        root = len(nodes)
        self._parent, self._jump = [root] * (root + 1), [root] * (root + 1)
        self._depth = [0] * (root + 1)
        for index in range(root - 1, -1, -1):
            self._attach(index, self._post_dominator(nodes[index], root))
        self._number(root)
        self._starts_of_users: dict[fx.Node, list[int]] = {}

    def start(self, node: fx.Node) -> int:
        """The position of a node in preorder; what stands below it follows."""
        return self._start[self._index[node]]

    def size(self, node: fx.Node) -> int:
        """The number of nodes below a node, itself among them."""
        return self._size[self._index[node]]

    def is_below(self, node: fx.Node, lower: fx.Node) -> bool:
        """Whether every path from `lower` to the end goes through `node`."""
        return 0 <= self.start(lower) - self.start(node) < self.size(node)

    def children(self, node: fx.Node) -> list[fx.Node]:
        """The nodes right below a node."""
        return [self._nodes[index] for index in self._children.get(self._index[node], ())]

    def reads(self, branch: fx.Node, x: fx.Node) -> bool:
        """Whether something that only `branch` needs, or `branch` itself, reads x."""
        if x not in self._starts_of_users:
            self._starts_of_users[x] = sorted(map(self.start, x.users))
        starts = self._starts_of_users[x]
        place = bisect_left(starts, self.start(branch))
        return place < len(starts) and starts[place] < self.start(branch) + self.size(branch)

    def _post_dominator(self, node: fx.Node, root: int) -> int:
        effect = node.op == "call_function" and not is_pure(node)
        found: int | None = root if effect or not node.users else None
        for user in node.users:
            index = self._index[user]
            found = index if found is None else self._common(found, index)
        assert found is not None
        return found

    def _attach(self, index: int, parent: int) -> None:
        far = self._jump[parent]
        farther = self._jump[far]
        depth = self._depth
        even = depth[parent] - depth[far] == depth[far] - depth[farther]
        self._parent[index], self._jump[index] = parent, farther if even else parent
        depth[index] = depth[parent] + 1

    def _common(self, a: int, b: int) -> int:
        depth, parent, jump = self._depth, self._parent, self._jump
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def _number(self, root: int) -> None:
        """Give each node its place in preorder; a parent has a larger index than its children."""
        self._size = [1] * (root + 1)
        self._children: dict[int, list[int]] = {}
        for index in range(root):
            self._size[self._parent[index]] += self._size[index]
            self._children.setdefault(self._parent[index], []).append(index)
        self._start, following = [0] * (root + 1), [1] * (root + 1)
        self.preorder: list[fx.Node | None] = [None] * (root + 1)
        for index in range(root - 1, -1, -1):
            parent = self._parent[index]
            self._start[index] = following[parent]
            following[parent] += self._size[index]
            following[index] = self._start[index] + 1
            self.preorder[self._start[index]] = self._nodes[index]
