"""What evals.clusters runs is accepted as a recipe."""

import yaml

from evals.clusters import variant
from wexpand_plugin.compress.recipes import check_recipe


def test_variants_are_recipes(tmp_path):
    for clusters in (0, 256):
        recipe = variant(clusters, sparsity=0.7, tune_epochs=2)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        check_recipe(tmp_path / "recipe.yaml")
        (stage,) = recipe.values()
        keys = stage["expansion_modifiers"]["SparseExpansionModifier"]
        assert (keys["num_clusters"], keys["num_experts"], keys["sparsity"]) == (clusters, 1, 0.7)
