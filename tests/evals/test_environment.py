"""The pins: within the ranges that the package declares, and what is really installed here."""

import importlib.metadata
import tomllib

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def pins(root) -> dict[str, str]:
    lines = (root / ".ci" / "pins.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_are_within_the_declared_ranges(root, pins):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(line)
        if wanted.name in pins:
            assert wanted.specifier.contains(pins[wanted.name]), line


def test_this_environment_has_the_pinned_versions(pins):
    for name in ("torch", "llmcompressor", "lm-eval", "pydantic", "pytest", "scikit-learn"):
        assert importlib.metadata.version(name).partition("+")[0] == pins[name]
