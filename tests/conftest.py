"""Paths and settings that every test may use. Set before anything imports torch or a hub client."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import wexpand_plugin

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(wexpand_plugin.__file__).resolve().parents[1]

# what tests import at their top: where it is missing, they are not looked at
NEEDS = {
    "compress": "llmcompressor",
    "evals/test_reallocation.py": "llmcompressor",
    "evals/test_recipe.py": "llmcompressor",
    "hf": "transformers",
    "method/test_group.py": "sklearn",
    "serve": "vllm",
    "test_examples.py": "llmcompressor",
    "tools": "transformers",
}
collect_ignore = [path for path, library in NEEDS.items() if find_spec(library) is None]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def pocket() -> Path:
    """The embedded model's directory."""
    return ROOT / "evals" / "pocket" / "model"


@pytest.fixture(scope="session")
def recipes() -> Path:
    return ROOT / "recipes"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A trained Llama whose feed-forward width, 172, does not divide by 8; skips where absent.

    Looked for in $WEXPAND_TEST_MODELS, and in shared/models in or beside the repository.
    """
    folders = [ROOT / "shared" / "models", ROOT.parent / "shared" / "models"]
    if given := os.environ.get("WEXPAND_TEST_MODELS"):
        folders.insert(0, Path(given))
    for folder in folders:
        if (folder / "stories260K" / "config.json").is_file():
            return folder / "stories260K"
    pytest.skip("no stories260K: set WEXPAND_TEST_MODELS to the folder that holds it")


@pytest.fixture
def short_texts() -> list[str]:
    """A few lines of code, enough for a handful of calibration tokens."""
    return [f"def function_{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(64)]


@pytest.fixture
def said():
    """What is logged, a line each."""
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    yield lines
    logger.remove(sink)
