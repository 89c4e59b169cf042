"""New weights through old passes: the constants of an optimized graph, computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule, Recipe


def replay(graph: GraphModule, state_dict: Mapping[str, torch.Tensor]) -> GraphModule:
    """Return a copy of an optimized graph with the constants that follow from `state_dict`.

    `state_dict` is that of the model that was captured. Constants that it does not name, and that
    do not follow from it, stay. Raises OptionError where a weight that is needed is missing, or has
    another shape or dtype.
    """
    info = graph.info
    given = _given(graph, state_dict)
    updated = graph.copy()
    current = updated.constants()
    made = {recipe.name: recipe for recipe in info.recipes}
    dirty = set(given)
    for recipe in info.recipes:
        is_calibrated = not recipe.sources and recipe.name in info.fitted
        if is_calibrated or dirty.intersection(recipe.sources):
            dirty.add(recipe.name)
    known: dict[str, torch.Tensor] = {**given}

    def value(name: str) -> torch.Tensor:
        if name not in known:
            if name not in dirty and name in current:
                known[name] = current[name].detach()
            elif name in info.held:
                known[name] = info.held[name].detach()
            elif name in made:
                known[name] = _computed(
                    made[name], [value(source) for source in made[name].sources]
                )
            else:
                raise OptionError(
                    f"The state_dict has no '{name}', which the optimized weights were computed "
                    "from. Pass the whole state_dict() of the original model."
                )
        return known[name]

    for name in sorted(dirty & info.fitted):
        raise OptionError(
            f"'{name}' was fit to data, when channels were pruned (reconstruct=) or activations "
            "calibrated, so that it does not follow from the model's weights alone. Do that again, "
            "with the new weights."
        )
    for name, (rule, digest) in info.looked_at.items():
        if name in dirty and _digest(value(name)) != digest:
            raise OptionError(
                f"The rule {rule} has looked at the numbers of '{name}', which are others now, so "
                "the graph it made is wrong for them. Compile the model again."
            )
    with torch.no_grad():
        for recipe in info.recipes:  # in order, so that no recursion is deep
            if recipe.name in dirty:
                value(recipe.name)
        for name in sorted(dirty.intersection(current)):
            _assign(name, current[name], value(name))
    updated.info.shares_storage = False
    updated.recompile()
    return updated


def remember_reads(
    graph: GraphModule, rule: str, names: Mapping[str, tuple[torch.Tensor, int]]
) -> None:
    """Note that a rewrite of a rule is right for these constants only as they are now."""
    for name, (tensor, _) in names.items():
        if name not in graph.info.looked_at and graph.fixed_tensor(name) is None:
            graph.info.looked_at[name] = (rule, _digest(tensor))


def _digest(tensor: torch.Tensor) -> str:
    """Return a short text that other numbers do not have."""
    plain = tensor.detach().cpu().clone().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).hexdigest()


def _given(graph: GraphModule, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the new values of the captured state, by the names that the graph knows."""
    if not isinstance(state_dict, Mapping):
        raise OptionError(
            f"update() takes a state_dict, not a {type(state_dict).__name__}. Pass "
            "model.state_dict()."
        )
    given = {}
    for name in sorted(graph.info.state - graph.info.mutated):
        found = [n for n in graph.info.ties.get(name, (name,)) if n in state_dict]
        if not found:
            raise OptionError(
                f"The state_dict has no '{name}'. Pass the whole state_dict() of the original "
                "model."
            )
        given[name] = state_dict[found[0]].detach()
    return given


def _computed(recipe: Recipe, sources: list[torch.Tensor]) -> torch.Tensor:
    try:
        return recipe.compute(*sources)
    except RuntimeError as error:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in zip(recipe.sources, sources, strict=True)
        )
        raise OptionError(
            f"'{recipe.name}' cannot be computed from {shapes}: {error}. The state_dict must be of "
            "the same architecture and dtype."
        ) from None


def _assign(name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        raise OptionError(
            f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, the new one is {value.dtype} "
            f"{tuple(value.shape)}. The state_dict must be of the same architecture and dtype."
        )
    tensor.data = value.detach().clone()
