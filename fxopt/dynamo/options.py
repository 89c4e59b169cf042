"""What the `options` of torch.compile say, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.compile import Settings
from fxopt.errors import OptionError, check_choice
from fxopt.registry import check_available, resolve_backend

_COMPILE = ("backend", "passes", "verify", "tolerance", "on_error")
_REFUSED = {
    "precision": "Use the pass: passes=['default', LowerPrecision('bf16')], or torch.autocast.",
    "dynamic_shapes": "torch.compile has an argument of its own, dynamic=, and mark_dynamic.",
    "calibration": "Use fxopt.compile for it.",
    "submodules": "torch.compile cuts the model by itself.",
    "verify_inputs": "torch.compile hands over the inputs of the first call.",
}


@dataclass(frozen=True)
class Options:
    """What torch.compile's `options` say, checked."""

    training: str
    fallback: bool
    variants: int
    compile: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Raise OptionError for a name or value that is not possible."""
        if mode not in (None, "default"):
            raise OptionError(
                f"mode={mode!r} belongs to Inductor; fxopt takes options={{…}}: "
                "{'backend': 'inductor', 'max_autotune': True} for instance."
            )
        given = dict(options or {})
        for name, reason in _REFUSED.items():
            if name in given:
                raise OptionError(f"options={{'{name}': …}} is not possible here. {reason}")
        training = given.pop("training", "run")
        check_choice("training", training, ("run", "refuse"))
        fallback = given.pop("fallback", False)
        if not isinstance(fallback, bool):
            raise OptionError(f"fallback must be True or False, not {fallback!r}.")
        variants = given.pop("variants", 8)
        if type(variants) is not int or variants < 1:
            raise OptionError(f"variants must be a positive integer, not {variants!r}.")
        backend = resolve_backend(given.get("backend", "eager"), _of_backend(given))
        check_available(backend)
        settings = {name: given[name] for name in _COMPILE if name in given}
        Settings.of(**{name: value for name, value in settings.items() if name != "backend"})
        return cls(training, fallback, variants, {**settings, "backend": backend})


def _of_backend(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _COMPILE}
