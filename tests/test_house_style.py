"""The house style, as far as a program can see it. Each rule's reason stands in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxopt.registry import classes

ROOT = Path(__file__).parent.parent
PASSES = [path for path in sorted((ROOT / "passes").glob("*.py")) if path.stem != "__init__"]
SOURCES = [
    path
    for folder in ("fxopt", "passes", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not {"fxopt/passes", "fxopt/backends"} & {str(p) for p in path.relative_to(ROOT).parents}
]
EVERYTHING = sorted({*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")})

each_pass = pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")
            for alias in node.names:
                yield node, "." * node.level + f"{node.module or ''}.{alias.name}"


# -- passes ----------------------------------------------------------------------------------------


@each_pass
def test_a_pass_has_a_test_of_the_same_stem(path: Path) -> None:
    assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").is_file()


@each_pass
def test_a_pass_opens_with_before_after_and_left_alone(path: Path) -> None:
    doc = ast.get_docstring(tree(path)) or ""
    assert doc.split("\n\n")[0].rstrip().endswith("."), "its docstring opens with a sentence"
    for word in ("Before", "After", "Left alone"):
        assert word in doc, f"its docstring has no '{word}'"


@each_pass
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    for node, name in imported(path):
        assert not name.startswith(("fxopt.passes", "passes", ".")), where(path, node)


@each_pass
def test_a_pass_bears_one_name_in_three_spellings(path: Path) -> None:
    name = path.stem.replace("_", "-")
    known = classes("passes")
    assert name in known, f"no pass in the file is called '{name}'"
    camel = "".join(word.capitalize() for word in path.stem.split("_"))
    assert known[name].__name__ == camel
    assert known[name].__module__ == f"fxopt.passes.{path.stem}"
    others = [n for n, cls in known.items() if cls.__module__ == f"fxopt.passes.{path.stem}"]
    assert others == [name], "one file, one pass"


def test_passes_and_backends_are_reached_through_their_links() -> None:
    for name in ("passes", "backends"):
        link = ROOT / "fxopt" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


# -- everywhere ------------------------------------------------------------------------------------


def test_nobody_imports_a_top_level_passes_or_backends() -> None:
    found = [
        where(path, node)
        for path in EVERYTHING
        for node, name in imported(path)
        if name.split(".")[0] in ("passes", "backends")
    ]
    assert not found, found


def test_files_are_named_by_their_subject() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert not [str(p.relative_to(ROOT)) for p in EVERYTHING if p.stem in vague]


def test_no_exception_is_swallowed() -> None:
    found = []
    for path in EVERYTHING:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(part, ast.Pass) for part in node.body)
                if node.type is None or silent:
                    found.append(where(path, node))
    assert not found, found


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in EVERYTHING
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marker.search(line)
    ]
    assert not found, found


def test_everything_public_has_a_docstring() -> None:
    found = [
        f"{where(path, node)} {name}"
        for path in SOURCES
        for node, name in _public(tree(path), path)
        if not ast.get_docstring(node)
    ]
    assert not found, found


def _public(parent: ast.AST, path: Path) -> Iterator[tuple[ast.Module, str]]:
    """Yield the file, and its public functions, classes and methods; nothing inside functions."""
    if isinstance(parent, ast.Module):
        yield parent, path.name
    for node in getattr(parent, "body", []):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_") or _overrides(node):
            continue
        yield node, node.name  # type: ignore[misc]
        if isinstance(node, ast.ClassDef):
            yield from _public(node, path)


def _overrides(node: ast.AST) -> bool:
    """Whether a decorator says that the docstring stands elsewhere."""
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in getattr(node, "decorator_list", [])}
    return bool(names & {"override", "overload"})
