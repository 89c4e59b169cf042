"""Recipes: a TOML file with the settings of one command; flags win over it."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import click

LISTS = ("input", "dynamic", "option")  # settings that may be repeated


def read_recipe(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take a recipe's settings as the defaults of the command; raise UsageError for a bad one."""
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"Cannot read the recipe '{path}': {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"The recipe '{path}' is not TOML: {error}.") from None
    known = [str(p.name) for p in context.command.params if p.name not in (None, "recipe")]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(
                f"The recipe '{path}' has an unknown setting '{key}'.{hint} "
                f"Known: {', '.join(known)}."
            )
    defaults = dict(map(_as_default, settings.items()))
    context.default_map = {**(context.default_map or {}), **defaults}


def _as_default(setting: tuple[str, Any]) -> tuple[str, Any]:
    """Write one value of any setting that may be repeated as a list of one."""
    key, value = setting
    if key == "option" and isinstance(value, dict):
        return key, list(value.items())
    if key in LISTS and not isinstance(value, list):
        return key, [value]
    return key, value


recipe_option = click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=read_recipe,
    is_eager=True,
    expose_value=False,
    help="Take settings from this TOML file: the long options, with _ for -. Flags win over it.",
)
