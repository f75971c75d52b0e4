"""Recipes: found by name, and refused with the key, its value and what would be right."""

import tomllib

import pytest

from wexpand_plugin import recipe
from wexpand_plugin.compress.recipes import check_recipe, recipe_names
from wexpand_plugin.errors import WexpandError

HEAD = "a_stage:\n  b_modifiers:\n    SparseExpansionModifier:\n"
GOOD = HEAD + "      sparsity: 0.6\n      num_experts: 2\n      targets: ['re:.*mlp.*']\n"


@pytest.mark.parametrize(
    "text,message",
    [
        (
            HEAD + "      sparsty: 0.5\n",
            r"SparseExpansionModifier\.sparsty: unknown key; did you mean sparsity\?",
        ),
        (HEAD + "      zzz: 1\n", r"\.zzz: unknown key; SparseExpansionModifier has sparsity, "),
        (HEAD + "      sparsity: half\n", r"\.sparsity: 'half': should be a number, or auto"),
        (HEAD + "      sparsity: 2\n", "sparsity: 2.0 should be above 0"),
        (HEAD + "      num_experts: 4\n", r"\.sparsity: is missing; the recipe should"),
        (HEAD, "has no values; give at least one key"),
        ("", "is empty"),
        ("a_stage:\n  b_modifiers: {}\n", "holds no modifier"),
        ("SparseExpansionModifier:\n  sparsity: 0.5\n", "should end in _stage"),
        ("a_stage:\n  mods:\n    X: {a: 1}\n", "should end in _modifiers"),
        (GOOD.replace("ExpansionMod", "ExpansoinMod"), "Did you mean SparseExpansionModifier"),
        ("- SparseExpansionModifier\n", "holds a list; a recipe maps NAME_stage to"),
        ("a_stage: [\n", "not YAML"),
        ("a_stage:\n  - b_modifiers: {}\n", "a_stage holds a list; it should hold names"),
        ("a_stage:\n  b_modifiers:\n    - X\n", r"a_stage\.b_modifiers holds a list"),
        ("a_stage: 5\n", "a_stage holds a int"),
    ],
)
def test_recipes_that_cannot_work(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(WexpandError, match=message) as refused:
        check_recipe(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_every_recipe_of_the_repository_is_accepted(recipes):
    for path in sorted(recipes.glob("*.yaml")):
        check_recipe(path)


def test_a_recipe_is_a_file_or_a_bare_name(recipes, tmp_path, monkeypatch):
    assert recipe_names() == sorted(file.stem for file in recipes.glob("*.yaml"))
    assert recipe("sparsegpt") == str(recipes / "sparsegpt.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sparsegpt").write_text(GOOD)
    assert recipe("sparsegpt") == "sparsegpt", "a file wins"
    with pytest.raises(WexpandError, match="'unknown' is neither a file nor one of .*, sparsegpt,"):
        recipe("unknown")


def test_every_folder_is_packaged(root):
    """pyproject.toml lists the packages, as one of them lies elsewhere."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in (root / "wexpand_plugin").rglob("*.py")}
    packages = {".".join(folder.relative_to(root).parts) for folder in folders}
    assert set(setuptools["packages"]) == packages | {"wexpand_plugin.recipes"}
