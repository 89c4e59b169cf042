"""What a user names as `module:name` or `path.py:name`: only what is named is imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fxopt.errors import FxoptError, OptionError
from fxopt.provenance import user_frame
from fxopt.vision import import_torchvision, lacks_operators

T = TypeVar("T")


@dataclass(frozen=True)
class _Loaded:
    """A file that was run as a module, and what it looked like then."""

    module: ModuleType
    changed: int  # when, in nanoseconds
    size: int


_loaded: dict[Path, _Loaded] = {}


def load_object(spec: str) -> Any:
    """Return what `module:name` or `path.py:name` names.

    Raises OptionError where there is none, and FxoptError with the user's line for whatever the
    module raises. A file is run once, as long as it does not change.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise OptionError(f"'{spec}' names nothing. Write module:name or path.py:name.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{place} has no '{part}'.{_near(part, dir(found))}")
        found = getattr(found, part)
    return found


def place_of(named: Any) -> str | None:
    """Return the `module:name` or `path.py:name` of a class or function, for another process.

    None for one that no other process can reach: in a notebook, in a script, in a function.
    """
    name = getattr(named, "__qualname__", "<unnamed>")
    module = sys.modules.get(named.__module__)
    return None if "<" in name or module is None else _place_in(module, name)


def place_of_variable(value: Any, near: Iterable[str]) -> str | None:
    """Return the place of a variable of a module that holds this very object.

    It is looked for in the modules that are named, in files that were loaded, and in the packages
    of those modules. None where no other process can reach any.
    """
    names = list(dict.fromkeys(filter(None, near)))
    packages = {name.split(".")[0] for name in names}
    names += [name for name in list(sys.modules) if name.split(".")[0] in packages]
    modules = [sys.modules.get(name) for name in names] + [one.module for one in _loaded.values()]
    for module in filter(None, modules):
        for name, held in list(vars(module).items()):
            place = _place_in(module, name) if held is value else None
            if place is not None:
                return place
    return None


def _place_in(module: ModuleType, name: str) -> str | None:
    """Return the place of a name in a module; None for one that has no file, or is a script."""
    if module.__name__ == "__main__" or getattr(module, "__file__", None) is None:
        return None
    for path, loaded in _loaded.items():
        if loaded.module is module:
            return f"{path}:{name}"
    return f"{module.__name__}:{name}"


def guarded(what: str, action: Callable[[], T], through: type[Exception] = FxoptError) -> T:
    """Run the user's code; raise FxoptError with the user's line for whatever it raises."""
    try:
        try:
            return action()
        except Exception as error:
            if not lacks_operators(error):
                raise
            import_torchvision()
            return action()
    except Exception as error:
        if isinstance(error, (FxoptError, through)):
            raise
        where = user_frame(error.__traceback__)
        at = f"\n  at {where}" if where else ""
        raise FxoptError(f"{what} failed with {type(error).__name__}: {error}{at}") from error


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # like `python -m`
    if name.split(".")[0] == "torchvision" and importlib.util.find_spec("torchvision"):
        import_torchvision()
    try:
        return guarded(name, lambda: importlib.import_module(name), ModuleNotFoundError)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (name == missing or name.startswith(f"{missing}.")):
            raise FxoptError(f"'{name}' cannot be imported: {error}.") from error
        parent, _, last = missing.rpartition(".")
        folders = sys.modules[parent].__path__ if parent in sys.modules else None
        found = pkgutil.iter_modules(folders)
        prefix = f"{parent}." if parent else ""
        near = _near(last, (module.name for module in found), prefix)
        raise OptionError(f"There is no module '{missing}'.{near}") from None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"There is no file '{path}'.")
    place, state = path.resolve(), path.stat()
    known = _loaded.get(place)
    if known is not None and (known.changed, known.size) == (state.st_mtime_ns, state.st_size):
        return known.module
    if str(place.parent) not in sys.path:
        sys.path.insert(0, str(place.parent))  # like `python path.py`
    module = guarded(str(path), lambda: _execute(place))
    _loaded[place] = _Loaded(module, state.st_mtime_ns, state.st_size)
    return module


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        if known is not None:
            sys.modules[path.stem] = known
        raise
    return module


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, [one for one in known if one[0] != "_"], n=1)
    return f" Did you mean '{prefix}{near[0]}'?" if near else ""
