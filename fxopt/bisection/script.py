"""The text of a reproduction script: a model, what is done to it, and a check."""

from __future__ import annotations

import math
import sys
import sysconfig
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import fx
from torch._ops import OpOverload

from fxopt.artefact import write_artefact
from fxopt.bisection.attempt import count_text
from fxopt.bisection.module_code import ModuleCode
from fxopt.errors import FxoptError
from fxopt.files import write_atomic
from fxopt.graph_module import GraphModule
from fxopt.imports import place_of
from fxopt.manifest import write_manifest
from fxopt.registry import resolve_backend, resolve_pass, spec_of
from fxopt.rules import Rule, RuleSet

if TYPE_CHECKING:
    from fxopt.bisection import Bisection

STORED, GRAPH = ".safetensors", ".fxopt"  # the suffixes of the files beside a script
MOST_LINES = 12  # of a diff in a script's docstring


@dataclass(frozen=True)
class Setting:
    """What a script does with a model, and which calls of which graph are in question."""

    graph: GraphModule
    whole: GraphModule  # the graph that `graph` is, or is a sub-graph of
    calls: tuple[fx.Node, ...]
    with_pass: bool
    with_backend: bool


@dataclass(frozen=True)
class Name:
    """A pass, a backend or a function that a script gets from elsewhere."""

    word: str
    value: Any
    spec: str | None  # None where no other process can reach it
    folder: str = ""  # that its module is imported from
    is_loaded: bool = False  # the script needs the object itself, not its spec

    def lines(self) -> list[str]:
        """Return the lines that define it."""
        if self.spec is None:
            is_rule = isinstance(self.value, (Rule, RuleSet))
            known = self.value.name if is_rule else getattr(self.value, "__name__", None)
            what = known or type(self.value).__name__
            made = what if is_rule or self.is_loaded else f"{what}(…)"
            return [
                f"# {what} is defined where no other process can import it: in a script, a",
                f"# notebook or a function. Paste or import it here: {self.word} = {made}.",
                f"{self.word} = None",
                f"if {self.word} is None:",
                f'    print("Define {self.word} first; see the comment in this file.")',
                "    sys.exit(2)",
            ]
        path = [f"sys.path.insert(0, {_quoted(self.folder)})"] if self.folder else []
        value = f"load_object({_quoted(self.spec)})" if self.is_loaded else _quoted(self.spec)
        return [*path, f"{self.word} = {value}"]


@dataclass
class Script:
    """A script: what it gets from elsewhere, a model, and the function that measures its error."""

    title: str
    names: list[Name]
    imports: list[str]
    model: str
    measure: str
    holds: str
    calls: int
    main: str = ""
    is_random: bool = False
    bound: float | None = 1e-5
    threshold: float | None = None
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    graph: GraphModule | None = None

    @property
    def is_reachable(self) -> bool:
        """Whether another process can import the pass and the backend."""
        return all(name.spec is not None for name in self.names)

    @property
    def body(self) -> str:
        """What runs in this process, too: the imports, the model and `measure`."""
        imports = ["import copy", "", "import torch", "", "import fxopt", *self.imports]
        return "\n\n\n".join(["\n".join(imports), self.model, f"{self.measure}\n"])

    def namespace(self) -> dict[str, Any]:
        """Return what `body` needs."""
        here: dict[str, Any] = {name.word: name.value for name in self.names}
        return {**here, "__name__": "fxopt_reproduction", "stored": self.stored}

    @property
    def text(self) -> str:
        """The whole script."""
        standard = [*(["copy"] if "copy." in self.measure else []), "sys"]
        standard += ["pathlib"] if self.stored or self.graph else []
        ours = [*self.imports, *(["from fxopt.imports import load_object"] if self._loads else [])]
        lines = [
            _docstring(self.title), "",
            *(_IMPORTS[name] for name in standard), "",
            "import torch", *([_IMPORTS["safetensors"]] if self.stored else []), "",
            "import fxopt", *sorted(ours), "",
            *(line for name in self.names for line in name.lines()),
        ]  # fmt: skip
        if self.threshold is not None:
            lines.append(f"THRESHOLD = {self.threshold!r}")
        if self.bound is not None:
            lines.append(f"BOUND = {self.bound:.3g}  # on max |Δ| / max |reference|")
        if self.stored:
            lines.append(f'stored = load_file(Path(__file__).with_suffix("{STORED}"))')
        parts = ["\n".join(lines), self.model, self.measure, self.main or _MAIN]
        return "\n\n\n".join(filter(None, parts))

    @property
    def _loads(self) -> bool:
        return any(name.is_loaded and name.spec for name in self.names)

    def write_files(self, path: Path) -> tuple[Path, ...]:
        """Write what the script reads, beside `path`; return the paths."""
        written = []
        if self.stored:
            written.append(path.with_suffix(STORED))
            write_atomic(written[-1], save(self.stored))
        if self.graph is not None:
            written.append(path.with_suffix(GRAPH))
            signature = self.graph.info.signature
            assert signature is not None
            manifest = write_manifest(signature, resolve_backend("eager"), None)
            write_artefact(written[-1], self.graph, manifest)
        return tuple(written)


_IMPORTS = {
    "copy": "import copy",
    "sys": "import sys",
    "pathlib": "from pathlib import Path",
    "safetensors": "from safetensors.torch import load_file",
}
_MAIN = '''if __name__ == "__main__":
    error = measure()
    print(f"max |Δ| / max |reference| is {error:.3g}, and the bound is {BOUND:.3g}.")
    sys.exit(error > BOUND)
'''
_ASK = '''if __name__ == "__main__":
    answer = measure()
    print(f"The oracle says {answer}.")
'''
_BOOL = "    sys.exit(not answer)\n"
_METRIC = "    sys.exit(not answer >= THRESHOLD)\n"


# -- the two kinds of scripts ----------------------------------------------------------------------


def module_script(found: Bisection, setting: Setting, code: ModuleCode) -> Script:
    """Return the script that holds a fragment as the code of a module."""
    calls = code.fragment.calls
    paths = {str(node.meta.get("path") or "") for node in calls}
    of = f" of {min(paths)}" if len(paths) == 1 and "" not in paths else ""
    return Script(
        title=_title(found, "the model below"),
        names=_names(found, setting),
        imports=["from fxopt.difference import relative_error", *_needed(calls)],
        model=f"{code.module()}\n\n\n{code.inputs()}",
        measure=_measure(setting, "Fragment().eval()", flat=False),
        holds=f"{count_text(len(calls), 'call')}{of}, with "
        + ("random values" if code.random else "the true values"),
        calls=len(calls),
        is_random=code.random,
        stored=code.stored,
    )


def graph_script(
    found: Bisection, setting: Setting, flat: tuple[Any, ...], *, ask: bool = False
) -> Script:
    """Return the script that reads the whole graph, and the true inputs, from files beside it.

    With `ask`, the user's own function judges it again.
    """
    graph, fuel = setting.whole, None
    if setting.with_pass:
        assert found.finding.stage is not None
        graph, fuel = found.finding.stage.before, found.number
    stored, given = {}, []
    for index, value in enumerate(() if ask else flat):
        if isinstance(value, torch.Tensor):
            stored[f"input.{index}"] = value.detach().contiguous()
        given.append(f'stored["input.{index}"]' if isinstance(value, torch.Tensor) else repr(value))
    needed = ["from fxopt.rewrite import fuel"] if fuel else []
    needed += [] if ask else ["from fxopt.difference import relative_error"]
    load = f'fxopt.load(Path(__file__).with_suffix("{GRAPH}")).graph'
    judge = found.finding.judge
    names = _names(found, setting)
    if ask:
        names.append(_function("ORACLE", judge.function))
    return Script(
        title=_title(found, f"the graph of {found.model_name}"),
        names=names,
        imports=[*needed, *_needed(graph.graph.nodes)],
        model="" if ask else f"def inputs():\n    return ({', '.join(given)},)",
        measure=_measure(setting, load, flat=True, fuel=fuel, ask=ask),
        holds=f"the whole graph before '{found.guilty.name}'" if setting.with_pass and found.guilty
        else "the whole graph",
        calls=sum(node.op == "call_function" for node in graph.graph.nodes),
        main=_ASK + (_BOOL if judge.threshold is None else _METRIC) if ask else "",
        bound=None if ask else _whole_bound(found),
        threshold=judge.threshold if ask else None,
        stored=stored,
        graph=graph,
    )


def _whole_bound(found: Bisection) -> float:
    """Return the bound that was exceeded; one between right and wrong, where a function judged."""
    finding, tolerance = found.finding, found.finding.judge.oracle.tolerance
    if finding.judge.function is not None and finding.right is not None and finding.wrong:
        right = finding.judge.compare(finding.right).error or 0.0
        wrong = finding.judge.compare(finding.wrong).error or 0.0
        return (right + wrong) / 2 if right < wrong < math.inf else right
    return tolerance if tolerance is not None else found.bound or 1e-5


def _measure(
    setting: Setting, model: str, *, flat: bool, fuel: int | None = None, ask: bool = False
) -> str:
    """Return the function that runs the model before and after, and compares; or that asks."""
    run = ".run" if flat else ""
    given = "model" if flat else "model, inputs()"
    passes = "[PASS]" if setting.with_pass else "[]"
    optimize = f'optimized = fxopt.optimize({given}, passes={passes}, verify="off")'
    if fuel is None:
        optimized = [f"    {optimize}"]
    else:  # whatever the pass does later may hide the error
        optimized = [f"    with fuel({fuel}):  # rewrites, and no more", f"        {optimize}"]
    result = "optimized"
    if setting.with_backend:
        optimized.append("    lowered = fxopt.lower(optimized, backend=BACKEND)")
        result = "lowered"
    head = ["def measure():", f"    model = {model}"]
    if ask:
        return "\n".join([*head, *optimized, f"    return ORACLE({result})"])
    run_result = f"{result}{'.executable' if setting.with_backend and flat else ''}{run}"
    return "\n".join([
        *head,
        "    torch.manual_seed(0)",
        f"    expected = copy.deepcopy(model){run}(*inputs())",
        *optimized,
        "    torch.manual_seed(0)",
        f"    return relative_error({run_result}(*inputs()), expected)",
    ])  # fmt: skip


# -- what they need --------------------------------------------------------------------------------


def _names(found: Bisection, setting: Setting) -> list[Name]:
    names = []
    if setting.with_pass:
        names.append(_name("PASS", found.guilty, resolve_pass))
    if setting.with_backend:
        names.append(_name("BACKEND", found.finding.judge.backend, resolve_backend))
    return names


def _function(word: str, function: Any) -> Name:
    """Name a user's function by its place."""
    place = place_of(function)
    return Name(word, function, place, _folder_of(place), is_loaded=True)


def _name(word: str, one: Any, resolve: Any) -> Name:
    """Name a pass or backend by a spec that gives an equal one; without one, by nothing."""
    spec = spec_of(one)
    try:
        reachable = resolve(spec) == one
    except FxoptError:
        reachable = False
    return Name(word, one, spec, _folder_of(spec)) if reachable else Name(word, one, None)


def _folder_of(place: str | None) -> str:
    """Return the folder that `module:name` is imported from; empty where Python looks anyway."""
    name, colon, _ = (place or "").partition(":")
    file = getattr(sys.modules.get(name), "__file__", None)
    if not colon or file is None:
        return ""
    depth = name.count(".") + (Path(file).stem == "__init__")
    folder = str(Path(file).resolve().parents[depth])
    installed = {str(Path(one).resolve()) for one in sysconfig.get_paths().values()}
    return "" if name.split(".")[0] == "fxopt" or folder in installed else folder


def _needed(calls: Iterable[fx.Node]) -> list[str]:
    """Return the imports that some calls need."""
    targets = [node.target for node in calls if node.op == "call_function"]
    modules = {str(getattr(target, "__module__", "")) for target in targets}
    lines = [f"import {name.strip('_')}" for name in ("_operator", "math") if name in modules]
    spaces = {target.namespace for target in targets if isinstance(target, OpOverload)}
    if "torchvision" in spaces:
        lines.append("from fxopt.vision import import_torchvision; import_torchvision()")
    return lines


def _title(found: Bisection, model: str) -> str:
    """Return what the script's docstring says, in paragraphs."""
    backend = found.finding.judge.backend
    if found.backend_is_wrong and backend is not None:
        what = f"the backend '{backend.name}'"
    else:
        what = f"the pass '{found.guilty.name}'" if found.guilty is not None else "something"
    lines = [f"This fails as long as {what} makes a wrong result of {model}.", ""]
    origin = f"Found by fxopt.bisect in {found.model_name}. {found.summary}"
    lines += textwrap.wrap(origin, 96)
    if found.site is not None:
        for line in found.where.splitlines():
            lines += textwrap.wrap(line, 96, subsequent_indent="    ")
        diff = found.fragment.splitlines()
        lines += ["", *(f"    {line}" for line in diff[:MOST_LINES])]
        lines += ["    …"] if len(diff) > MOST_LINES else []
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return repr(text) if set(text) & set("'\"\\") else f'"{text}"'


def _docstring(text: str) -> str:
    safe = text.replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{safe}\n"""'
