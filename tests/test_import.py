"""Importing the package is light, and a library that we cannot work with stays usable."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_nothing_heavy_is_imported():
    found = python(
        "import wexpand_plugin, wexpand_plugin.serve, sys; "
        "print(sorted({'torch', 'transformers', 'llmcompressor', 'vllm', 'sklearn', 'matplotlib'}"
        " & set(sys.modules)))"
    )
    assert found.strip() == "[]"


@pytest.mark.slow
def test_a_failing_half_is_reported_and_harmless():
    found = python(
        "import wexpand_plugin, sys; sys.modules['wexpand_plugin.hf'] = None; "
        "import transformers.quantizers.auto; print('alive')"
    )
    assert "alive" in found and "cannot be used with this transformers" in found


@pytest.mark.slow
def test_modifiers_are_known_after_importing_llmcompressor_in_either_order():
    for order in ("wexpand_plugin, llmcompressor", "llmcompressor, wexpand_plugin"):
        found = python(
            f"import {order}; from llmcompressor.modifiers.factory import ModifierFactory as F; "
            "print(sorted(F._registered_registry))"
        )
        assert "['NeuronScoringModifier', 'PackModifier', 'SparseExpansionModifier']" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from wexpand_plugin import NeuronScoringModifier, PackModifier, SparseExpansionModifier",
        "from wexpand_plugin.compress.modifier import SparseExpansionModifier",
        "from wexpand_plugin.compress.targets import target_linears",
    ],
)
def test_python_recipes_import_modifiers_from_the_package(first):
    """Before llm-compressor too, which registers our half as soon as the modifier imports it."""
    found = python(
        f"{first}; import wexpand_plugin; from llmcompressor.modifiers.factory import "
        "ModifierFactory as F; print(sorted(F._registered_registry)); "
        "assert F._registered_registry['PackModifier'] is wexpand_plugin.PackModifier"
    )
    assert "['NeuronScoringModifier', 'PackModifier', 'SparseExpansionModifier']" in found
    assert "cannot be used" not in found


@pytest.mark.slow  # imports everything, in a process of its own
def test_what_the_package_names_is_there():
    found = python(
        "import wexpand_plugin, sys; print(wexpand_plugin.__all__, hasattr(wexpand_plugin, 'x'), "
        "'llmcompressor' in sys.modules, wexpand_plugin.recipe('sparsegpt'))"
    )
    assert "'PackModifier'" in found and "] False False" in found and "sparsegpt.yaml" in found
