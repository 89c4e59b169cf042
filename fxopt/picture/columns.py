"""A long chain as columns side by side, the way text is set, so that it fits a page legibly."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from fxopt.picture.collapse import Network

PAGE_WIDTH, PAGE_HEIGHT = 7.5, 10.9  # what A4 holds inside of its margins, in inches
BOX = (2.0, 0.8)  # a box with the arrow below it, roughly
WORTH = 1.2  # columns are read less easily than a chain: they must make it this much larger
MOST = 6  # fewer columns than this
CROSSING = 3  # how many values may go on in the next column


def columns_for(drawn: Network, page_width: float = PAGE_WIDTH) -> int:
    """Return the number of columns that shows a graph largest on a page of this width."""
    scales = {count: _scale(drawn, _starts(drawn, count), page_width) for count in range(1, MOST)}
    best = max(scales, key=lambda count: (scales[count], -count))
    return best if scales[best] >= WORTH * scales[1] else 1


def _scale(drawn: Network, starts: Sequence[int], page_width: float) -> float:
    """Return by how much a page shrinks columns, roughly; 1 where they fit as they are."""
    names = list(drawn)
    columns = [names[start:end] for start, end in pairwise([*starts, len(names)])]
    sizes = [_extent(_ranks(drawn, column)) for column in columns]
    width = BOX[0] * sum(across for _, across in sizes)
    height = BOX[1] * max(down for down, _ in sizes)
    return min(1.0, page_width / width, PAGE_HEIGHT / height)


def divide(drawn: Network, count: int) -> Network:
    """Return the graph with the attribute `column` on every node, from 0 to at most `count` - 1.

    A value that goes on in another column leads to a connector there and leaves from one here: a
    node with a `letter` in the place of a `box`. A column ends where few values cross, and rather
    between open modules than inside of one.
    """
    import networkx

    starts = _starts(drawn, count)
    columns = {name: bisect(starts, index) - 1 for index, name in enumerate(drawn)}
    result = networkx.MultiDiGraph()
    for name, data in drawn.nodes(data=True):
        result.add_node(name, **data, column=columns[name])
    letters: dict[str, str] = {}
    for source, target, value, data in drawn.edges(keys=True, data=True):
        start, end = columns[source], columns[target]
        if start == end:
            result.add_edge(source, target, key=value, **data)
            continue
        letter = letters.setdefault(value, _letter(len(letters)))
        leave, enter = f"to {letter}", f"from {letter} {end}"
        result.add_node(leave, letter=letter, frames=(), column=start)
        result.add_node(enter, letter=letter, frames=(), column=end)
        result.add_edge(source, leave, key=value, **data)
        result.add_edge(enter, target, key=value, **data)
    return result


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number)


def _starts(drawn: Network, count: int) -> list[int]:
    """Return the index of the first box of each of `count` columns; [0] where it cannot be cut."""
    names = list(drawn)
    ranks, crossing = _ranks(drawn, names), _crossing(drawn)
    height, _ = _extent(ranks)
    starts = [0]

    def badness(index: int, target: float) -> float:
        frames = _frames_cut(drawn, names[index - 1], names[index])
        return abs(ranks[names[index]] - target) + 2 * crossing[index] + 1.5 * frames

    for number in range(1, count):
        target = height * number / count
        possible = [i for i in range(starts[-1] + 1, len(names)) if crossing[i] <= CROSSING]
        if not possible:
            return [0]
        starts.append(min(possible, key=lambda index: badness(index, target)))
    return starts


def _ranks(drawn: Network, names: Iterable[str]) -> dict[str, int]:
    """Return the length of the longest path to each of these boxes among them."""
    ranks: dict[str, int] = {}
    for name in names:
        sources = drawn.predecessors(name)
        ranks[name] = max((ranks[source] + 1 for source in sources if source in ranks), default=0)
    return ranks


def _extent(ranks: Mapping[str, int]) -> tuple[int, int]:
    """Return how many boxes stand above each other, and at most side by side."""
    return max(ranks.values()) + 1, max(Counter(ranks.values()).values())


def _crossing(drawn: Network) -> list[int]:
    """Return, for each position, how many values go from the boxes before it to the others."""
    position = {name: index for index, name in enumerate(drawn)}
    last: dict[str, tuple[int, int]] = {}
    for source, target, value in drawn.edges(keys=True):
        start, end = last.get(value, (position[source], 0))
        last[value] = start, max(end, position[target])
    steps = [0] * (len(position) + 1)
    for start, end in last.values():
        steps[start + 1] += 1
        steps[end + 1] -= 1
    return list(accumulate(steps))[:-1]


def _frames_cut(drawn: Network, before: str, after: str) -> int:
    """Return how many open modules hold both of two boxes."""
    return len(set(drawn.nodes[before]["frames"]) & set(drawn.nodes[after]["frames"]))
