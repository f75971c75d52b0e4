"""Recipes: those that come with the package, and what is wrong with one before work starts."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WexpandError, reason

__all__ = ["check_recipe", "recipe", "recipe_names", "refuse_sizes", "with_budgets"]


def recipe_names() -> list[str]:
    """The recipes that come with the package, by the names that `recipe` knows."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def recipe(name: str | Path) -> str:
    """The path of the recipe file `name`: a file, or a recipe of the package by its bare name.

    llm-compressor takes it as it is: `oneshot(recipe=recipe("sparse_expansion_budget"), ...)`.

    :raises WexpandError: there is neither; the message lists the names
    """
    found = Path(name)
    if not found.is_file() and str(name) in recipe_names():
        found = _folder() / f"{name}.yaml"
    if not found.is_file():
        raise WexpandError(
            f"recipe: {str(name)!r} is neither a file nor one of {', '.join(recipe_names())}"
        )
    return str(found)


def refuse_sizes(**sizes: float | None) -> None:
    """Refuse what is no size.

    :param sizes: bytes over dense bytes, by the name of the option; None: not given
    :raises WexpandError: one that is not above 0 and below 1
    """
    for key, value in sizes.items():
        if value is not None and not 0 < value < 1:
            raise WexpandError(
                f"{key}: {value} should be above 0 and below 1, bytes over dense bytes"
            )


def with_budgets(path: str | Path, budgets: Mapping[str, float | None]) -> str:
    """The text of a recipe with these values of size_budget and read_budget.

    :raises WexpandError: a recipe without SparseExpansionModifier
    """
    import yaml

    path = Path(path)
    stages = yaml.safe_load(path.read_text(encoding="utf8"))
    found = [keys for name, keys in _modifiers(path, stages) if name == "SparseExpansionModifier"]
    if not found:
        raise WexpandError(
            f"{path}: has no SparseExpansionModifier, whose budgets size and read set"
        )
    for keys in found:
        if keys.get("num_experts") == 1 and keys.get("sparsity") != "auto":
            raise WexpandError(
                f"{path}: has a size of its own, as one expert and a sparsity that is given leave "
                "nothing to choose; leave out size and read, or the recipe: dial, which they mean "
                "alone, chooses zeros and bits"
            )
        keys |= budgets
    return yaml.safe_dump(stages, sort_keys=False)


def _folder() -> Path:
    """In a wheel recipes lie in the package, in a source tree at the top."""
    package = Path(__file__).parents[1]
    return next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())


def check_recipe(path: str | Path, text: str | None = None) -> None:
    """Refuse a recipe that cannot be read, holds no modifier, or holds a wrong value.

    :param text: what is checked in place of the file's
    :raises WexpandError: with the file, the key, its value and what would be right
    """
    import yaml
    from llmcompressor.modifiers.factory import ModifierFactory
    from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf8") if text is None else text
        stages = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise WexpandError(f"{path}: not text in UTF-8 ({reason(error)})") from None
    except yaml.YAMLError as error:
        raise WexpandError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    for name, arguments in _modifiers(path, stages):
        if not isinstance(arguments, dict) or not arguments:
            raise WexpandError(f"{path}: {name} has no values; give at least one key, indented")
    try:
        found = Recipe.create_instance(text)
    except ValidationError as error:
        # a misspelt key is also a missing one; the misspelling is the mistake
        problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        first = problems[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = _unknown(str(first["loc"][-1]), error.title)
        elif first["type"] == "missing":
            message = "is missing; the recipe should give it a value"
        elif key:
            message = f"{first['input']!r}: {message}"
        raise WexpandError(f"{path}: {error.title}{key and f'.{key}'}: {message}") from None
    except (ValueError, TypeError, KeyError) as error:
        close = [
            c
            for name, _ in _modifiers(path, stages)
            for c in difflib.get_close_matches(name, ModifierFactory._registered_registry, 1)
            if c != name
        ]
        hint = f" Did you mean {close[0]}?" if close else ""
        raise WexpandError(f"{path}: {error}{hint}") from None
    if not found.modifiers:
        raise WexpandError(f"{path}: holds no modifier")


def _modifiers(path: Path, stages: Any) -> list[tuple[str, Any]]:
    """(name, arguments) of every modifier, by the names that llm-compressor looks for."""
    if not isinstance(stages, dict) or not stages:
        problem = f"holds a {type(stages).__name__}" if stages else "is empty"
        raise WexpandError(f"{path}: {problem}; a recipe maps NAME_stage to NAME_modifiers")
    found = []
    for stage, groups in stages.items():
        if not str(stage).endswith("_stage"):
            raise WexpandError(
                f"{path}: top-level key {stage!r} should end in _stage, or llm-compressor skips it"
            )
        for group, modifiers in _keys_below(path, str(stage), groups):
            if not str(group).endswith("_modifiers"):
                raise WexpandError(f"{path}: {stage}.{group} should end in _modifiers")
            found += _keys_below(path, f"{stage}.{group}", modifiers)
    if not found:
        raise WexpandError(f"{path}: holds no modifier")
    return found


def _keys_below(path: Path, key: str, values: Any) -> list[tuple[Any, Any]]:
    if not isinstance(values, dict | None):
        raise WexpandError(
            f"{path}: {key} holds a {type(values).__name__}; it should hold names, each with a "
            "colon and without a dash before it"
        )
    return list((values or {}).items())


def _unknown(key: str, modifier: str) -> str:
    """What to say of a key that the modifier does not have."""
    from llmcompressor.modifiers import Modifier
    from llmcompressor.modifiers.factory import ModifierFactory

    known = ModifierFactory._registered_registry.get(modifier)
    keys = [k for k in getattr(known, "model_fields", {}) if k not in Modifier.model_fields]
    if close := difflib.get_close_matches(key, keys, 1):
        return f"unknown key; did you mean {close[0]}?"
    return f"unknown key; {modifier} has {', '.join(keys) or 'other keys'}"
