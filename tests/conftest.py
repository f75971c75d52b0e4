"""Paths and settings that every test may use. Set before anything imports torch or a hub client."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


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
