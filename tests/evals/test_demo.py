"""The parts of the demo that need neither environment but this one; `make demo` runs the whole."""

import json

import pytest

from evals.demo import Demo, table
from evals.processes import StepFailed


@pytest.fixture
def serve_env(tmp_path):
    folder = tmp_path / "serve" / "bin"
    folder.mkdir(parents=True)
    for name in ("vllm", "lm_eval"):
        (folder / name).touch()
    return folder.parent


def test_a_missing_environment_is_named(tmp_path):
    with pytest.raises(StepFailed, match="nowhere/bin/vllm does not exist; run 'make env-serve'"):
        Demo(tmp_path / "nowhere", tmp_path / "out")


def test_it_replaces_its_own_results_only(tmp_path, serve_env):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StepFailed, match="holds something else"):
        Demo(serve_env, out).run()
    assert (out / "thesis.tex").exists()


def test_the_table_has_a_line_per_model():
    sizes = {"linear_bytes": 2_000_000, "bytes_per_token": 1_500_000.0, "disk_bytes": 3_000_000}
    choice = {"acc": 0.5, "acc_norm": 0.6}
    scores = {"stdlib_choice": choice, "stdlib_perplexity": {"bits_per_byte": 1.25}}
    pruned = {"loss": 2.34567} | sizes
    scored = pruned | {"lm_eval": scores}
    results = {"dense": scored, "sparsegpt": pruned, "expanded": scored}
    lines = table(json.loads(json.dumps(results))).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["dense", "sparsegpt", "expanded"]
    assert lines[1].split()[1:] == ["2.3457", "2.00", "1.50", "3.00", "0.500", "1.250"]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert len({len(line) for line in lines}) == 1
