"""The recipes: compositions that were measured, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A composition that was measured, with the settings of its best run.

    Attributes:
        settings: the keyword arguments of `SelectiveUpdate.for_model`.
        says: what the measurement showed, in a line.
        evidence: the files of the runs in the repository, as patterns.
    """

    settings: Mapping[str, Any]
    says: str
    evidence: tuple[str, ...]


OPTIMIZERS = ("base", "matrices", "rest")  # arguments of `for_model`
_OF_ADAMW = {"base": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.1}
_IN_SOAP = {"base": "adamw", "preconditioner": "soap", "betas": (0.95, 0.95), "weight_decay": 0.1, "lr": 6e-3}


def _recipe(says: str, *evidence: str, **settings: Any) -> Recipe:
    return Recipe(MappingProxyType(settings), says, tuple(f"docs/measurements/{files}" for files in evidence))


# The recipes by name, for `SelectiveUpdate.for_model(model, recipe="soap-cautious")`. All were measured with 34M
# parameters on Python source, in 600 steps of 65,536 tokens. Their rates are the best of that sweep: sweep around them
# for a model of another size.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "soap-cautious-norm-control": _recipe(
            "ended lowest of the recipes: 1.39 times fewer steps and 1.17 times less time than AdamW with two rates",
            "evidence/python-34m/Cautious-on-AdamW-in-Soap--norm-controlled-lr0.036-rest0.006-seed*.json",
            **_IN_SOAP | {"lr": {"matrices": 0.036, "rest": 6e-3}},
            policy="cautious",
            norm="normcontrol",
        ),
        "soap-cautious": _recipe(
            "a mask in a rotation, one rate for all: 1.54 times fewer steps and 1.32 times less time than AdamW",
            "evidence/python-34m/Cautious-on-AdamW-in-Soap-lr0.006-seed*.json",
            **_IN_SOAP,
            policy="cautious",
        ),
        "soap": _recipe(
            "the rotation alone, which has most of that gain",
            "evidence/python-34m/AdamW-in-Soap-lr0.006-seed*.json",
            **_IN_SOAP,
        ),
        "adamw-two-rates": _recipe(
            "no mask and no rotation: 1.31 times fewer steps and 1.36 times less time than AdamW with one rate",
            "evidence/python-34m/AdamW-lr0.0015-rest0.012-seed*.json",
            **_OF_ADAMW,
            policy="dense",
            lr={"matrices": 1.5e-3, "rest": 0.012},
        ),
        "adamw-norm-control": _recipe(
            "no rotation, and nothing is kept: 1.07 times fewer steps than AdamW with two rates",
            "evidence/python-34m/AdamW--norm-controlled-lr0.018-rest0.012-seed*.json",
            **_OF_ADAMW,
            norm="normcontrol",
            lr={"matrices": 0.018, "rest": 0.012},
        ),
        "adamw-alpha-consistency": _recipe(
            "a mask alone, which keeps no state: 1.22 times fewer steps than AdamW; not shown to beat a random mask",
            "evidence/python-34m/AlphaConsistency-on-AdamW-lr0.003-seed*.json",
            **_OF_ADAMW,
            policy="alphaconsistency",
            lr=3e-3,
        ),
        "adamw-cautious": _recipe(
            "gained in the demo, and nothing over a tuned AdamW with 34M parameters",
            "evidence/python-34m/Cautious-on-AdamW-lr0.0015-seed*.json",
            **_OF_ADAMW,
            policy="cautious",
            lr=1.5e-3,
        ),
        "muon": _recipe(
            "no rotation: 1.30 times fewer steps and 1.24 times less time than AdamW with two rates",
            "evidence/python-34m/Muon--by-our-kernels-lr0.04-rest0.048-seed*.json",
            matrices="muon",
            rest="adamw",
            betas=(0.9, 0.95),
            weight_decay=0.1,
            lr={"matrices": 0.04, "rest": 0.048},
            capture="fused",  # our kernels' step, in a tenth of torch's time; sharded matrices are left to torch
        ),
    }
)


def recipe_named(name: Any) -> Recipe:
    """The recipe with this name, in any case. Raises ValueError, which lists the names, if there is none."""
    plain = name.strip().lower().replace("_", "-") if isinstance(name, str) else ""
    if plain in RECIPES:
        return RECIPES[plain]
    near = [known for known in RECIPES if plain and known.startswith(plain)] or get_close_matches(plain, RECIPES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"for_model: there is no recipe {name!r}{hint}; the recipes are {', '.join(RECIPES)}")


def with_recipe(name: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `for_model` that a recipe makes.

    Args:
        name: of the recipe.
        given: the named arguments. One that is None was left out.
        options: the further ones, for the wrapper and the bases.

    Raises:
        ValueError: there is no such recipe, or the caller names an optimizer, which the recipe does.
    """
    settings = recipe_named(name).settings
    for key in OPTIMIZERS:
        if given.get(key) not in (None, "adamw", settings.get(key)):  # "adamw" is what `base` is if it is left out
            raise ValueError(
                f"for_model: {key} is {given[key]!r}, and the recipe {name!r} names its optimizers; leave one out"
            )
    said = {key: value for key, value in {**given, **options}.items() if value is not None and key not in OPTIMIZERS}
    return {**options, **settings, **said}
