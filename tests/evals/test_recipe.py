"""What evals.recipe runs is the recommended recipe and its two bounds, and is accepted as such."""

import yaml

from evals.recipe import RECIPE, variants
from wexpand_plugin.compress.recipes import check_recipe

MODIFIER = ("expansion_stage", "expansion_modifiers", "SparseExpansionModifier")


def arguments(recipe):
    for key in MODIFIER:
        recipe = recipe[key]
    return recipe


def test_variants_differ_from_the_recipe_in_what_they_should(tmp_path):
    shipped = arguments(yaml.safe_load(RECIPE.read_text()))
    changed = {
        "one expert": {"num_experts": 1, "size_budget": None},
        "full": {"size_budget": None},
        "budget": {},
    }
    for name, recipe in variants(0.9, 2).items():
        assert arguments(recipe) == shipped | {"sparsity": 0.9, "seed": 2} | changed.pop(name)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        check_recipe(tmp_path / "recipe.yaml")
    assert not changed
