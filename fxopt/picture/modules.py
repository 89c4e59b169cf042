"""Which modules of a graph a picture opens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from fxopt.errors import OptionError
from fxopt.picture.collapse import Network, enclosing
from fxopt.picture.parts import parts_by_path

READABLE = 60  # how many boxes one page shows legibly
FEW = 4  # a page a quarter full may be filled twice, rather than say next to nothing


@dataclass
class Module:
    """One module of the tree that the nodes' paths span."""

    path: str
    children: dict[str, Module] = field(default_factory=dict)  # by path
    nodes: set[str] = field(default_factory=set)  # traced in this very module
    parts: int = 1  # how many boxes it is when it is closed

    @property
    def content(self) -> int:
        """How many boxes it shows when it is open and its children are not."""
        return len(self.nodes) + sum(child.parts for child in self.children.values())

    def holds(self, names: Set[str]) -> bool:
        """Whether one of these nodes was traced in it, or inside of it."""
        return any(not names.isdisjoint(module.nodes) for module in self.below())

    def below(self) -> Iterator[Module]:
        """Yield this module and all modules inside of it."""
        yield self
        for child in self.children.values():
            yield from child.below()


def module_tree(*networks: Network) -> Module:
    """Return the tree of the modules that nodes of these graphs were traced in."""
    root = Module("")
    known = {"": root}
    for network in networks:
        around = {name: enclosing(path) for name, path in network.nodes(data="path")}
        for name, paths in around.items():
            module = root
            for path in paths:
                module = module.children.setdefault(path, Module(path))
                known[path] = module
            module.nodes.add(name)
        for path, parts in parts_by_path(network, around).items():
            known[path].parts = max(known[path].parts, *parts.values())
    return root


def opened(
    tree: Module,
    depth: int | str | None,
    classes: Mapping[str, str],
    *,
    limit: int = READABLE,
    interesting: Set[str] | None = None,
) -> set[str]:
    """Return the paths of the modules to open.

    `depth` is None for all, a number of levels, or "auto": level by level, small ones first, all
    modules of one class together, as long as about `limit` boxes show. Where only some nodes are
    `interesting`, "auto" opens the modules that hold them, as many as fit, and no others.
    Raises OptionError for another depth.
    """
    if depth is None:
        return {module.path for module in tree.below()}
    if depth == "auto":
        return _readable(tree, classes, limit, interesting)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise OptionError(
            f"depth must be 'auto', None or a number of module levels from 1 on, not {depth!r}."
        )
    return {m.path for m in tree.below() if not m.path or m.path.count(".") + 1 < depth}


def _readable(
    tree: Module, classes: Mapping[str, str], limit: int, interesting: Set[str] | None
) -> set[str]:
    open_paths, shown = {""}, tree.content
    level = list(tree.children.values())
    while level:
        if interesting is not None:
            level = [module for module in level if module.holds(interesting)]
        alike: dict[str, list[Module]] = {}
        for module in level:
            one = classes.get(module.path, "") if interesting is None else module.path
            alike.setdefault(one, []).append(module)
        level = []
        for modules in sorted(alike.values(), key=_growth):
            more = _growth(modules)
            few = interesting is None and shown <= limit // FEW
            if shown + more <= (2 * limit if few else limit):
                shown += more
                open_paths |= {module.path for module in modules}
                level += [child for module in modules for child in module.children.values()]
    for module in reversed(list(tree.below())):
        only = list(module.children.values()) if not module.nodes else []
        if module.path and len(only) == 1 and only[0].path not in open_paths:
            open_paths.discard(module.path)  # it would show but one closed module, and says more
    return open_paths


def _growth(modules: Iterable[Module]) -> int:
    """Return how many more boxes show when these modules are open."""
    return sum(module.content - module.parts for module in modules)
