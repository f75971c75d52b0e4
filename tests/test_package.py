"""What a build brings: sdist, wheel, and the wheel installed in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*command, **settings) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments) -> list[str]:
    return [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]


@pytest.fixture(scope="module")
def sdist(root, tmp_path_factory) -> Path:
    """Built from a copy, as building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("wexpand_plugin", "recipes"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    build = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, copy / "dist", cwd=copy)
    (found,) = (copy / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, so that what that lacks is missing here too."""
    out = tmp_path_factory.mktemp("wheel")
    run(*pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, sdist))
    (found,) = out.glob("*.whl")
    return found


def test_both_hold_every_file_of_the_package(root, recipes, sdist, wheel):
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
    with tarfile.open(sdist) as opened:
        source = {name.partition("/")[2] for name in opened.getnames()}
    for file in recipes.glob("*.yaml"):
        assert f"wexpand_plugin/recipes/{file.name}" in packed
        assert f"recipes/{file.name}" in source
    for file in (root / "wexpand_plugin").rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            assert {str(file.relative_to(root))} <= packed & source
    assert {"LICENSE", "README.md", "pyproject.toml"} <= source


def test_the_wheel_works_in_an_environment_of_its_own(recipes, wheel, tmp_path):
    """Its dependencies are this environment's, found by a path; its own files are the wheel's."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(*pip("--python", python, "install", "--no-deps", "--no-index", wheel))
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # a plain path: the .pth files there, an editable install among them, are not read
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    settings = {"cwd": tmp_path, "env": env}
    wexpand = tmp_path / "env" / "bin" / "wexpand"

    assert "weights in few bits, sparse, or both" in run(wexpand, "--help", **settings)
    ask = (
        "import importlib.metadata as m, wexpand_plugin as w\n"
        "print(w.__file__, w.recipe('int4'), *m.entry_points(group='vllm.general_plugins'))"
    )
    package, recipe, *hooks = run(python, "-c", ask, **settings).splitlines()[-1].split(" ", 2)
    assert Path(package).is_relative_to(site) and Path(recipe).is_relative_to(site)
    assert Path(recipe).read_bytes() == (recipes / "int4.yaml").read_bytes()
    assert "wexpand_plugin.serve:register" in hooks[0]
    sizes = ["--hidden", 64, "--ffn", 128, "--heads", 4, "--layers", 1]
    run(wexpand, "synth", "model", *sizes, **settings)
    assert "no problem found" in run(wexpand, "verify", "model", **settings)
