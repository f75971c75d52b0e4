"""`wexpand plan`, and `wexpand compress` to a size."""

import json
import re
from pathlib import Path

import pytest
from commands import run, sentence

from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.synth import Shape, synth
from wexpand_plugin.tools.verify import verify


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    shape = Shape(hidden=64, ffn=128, layers=2, heads=4, vocab=300)
    synth(path / "dense", shape, dense=True, dtype="bfloat16", quiet=True)
    (path / "text.txt").write_text(Path(__file__).read_text() * 4)
    return path


@pytest.fixture(scope="module")
def text(dense) -> tuple:
    return "-d", dense / "text.txt", "--max-seq-length", 64, "--samples", 16


def test_a_dozen_sizes_as_a_table_json_and_a_picture(dense, text, tmp_path):
    picture = tmp_path / "new" / "curve.svg"
    result = run("plan", dense / "dense", *text, "--json", "--plot", picture)
    found = json.loads(result.stdout)
    points = found["points"]
    assert len(points) >= 10 and found["dense_bits"] == 16 and found["tokens"] == 1024
    losses = [point["added_loss"] for point in points]
    assert losses == sorted(losses) and losses[0] < losses[-1] / 100
    for point in points:
        assert point["stored"] <= point["size"]
        assert point["bits"] == point["bits_read"] == pytest.approx(16 * point["stored"])
        assert len(point["linears"]) == 14
        own = sum(share["added_loss"] for share in point["linears"].values())
        assert own == pytest.approx(point["added_loss"])
    assert found["least"] <= points[-1]["size"] and found["seconds_to_compress"] > found["seconds"]
    assert "bits per weight" in picture.read_text() and "$" not in picture.read_text()


def test_the_table_and_what_is_refused(dense, text, tmp_path):
    table = run("plan", dense / "dense", *text, "--size", 0.3, "--size", 0.1).stdout
    lines = [line for line in table.splitlines() if re.match(r" 0\.\d{4} ", line)]
    assert [float(line.split()[0]) for line in lines] == [0.3, 0.1]
    assert "2 with" in table and "before tuning" in table and "on this machine" in table
    no = run("plan", dense / "dense", *text, "--size", 0.01, code=1).stderr.splitlines()[-1]
    assert no.startswith("wexpand: size_budget: 0.01 is below 0.0")  # after progress bars
    assert "bits stored  bits read" in table
    assert "size: 2.0 should be" in sentence(run("plan", "none", *text, "--size", 2, code=1))
    both = ("-o", tmp_path / "out", "--read", 1.5, "--size", 0.2)
    no = run("compress", "none", *text, *both, code=1)
    assert "read: 1.5 should be above 0 and below 1" in sentence(no)
    bad = run("plan", dense / "dense", *text, "--plot", tmp_path / "curve.xyz", code=1)
    assert "plot: curve.xyz should end in" in sentence(bad)


@pytest.mark.slow
def test_a_plan_is_what_compress_goes_by(dense, tmp_path):
    """Of more rows than a plan needs both draw the same, so both predict the same."""
    rows = ("-d", dense / "text.txt", "--max-seq-length", 64, "--samples", 200)
    run("compress", dense / "dense", *rows, "-o", tmp_path / "out", "-r", "dial", "--size", 0.3)
    made_by = inspect(tmp_path / "out").made_by
    assert made_by["size_budget"] == 0.3 and made_by["read_budget"] is None
    found = json.loads(run("plan", dense / "dense", *rows, "--json", "--size", 0.3).stdout)
    assert found["tokens"] == 8192
    (point,) = found["points"]
    rounded = [float(f"{point[key]:.4g}") for key in ("stored", "added_loss")]
    assert rounded in made_by["dial"]["curve"]


@pytest.mark.slow
def test_compress_to_a_size(dense, text, tmp_path):
    run("compress", dense / "dense", *text, "-o", tmp_path / "out", "--size", 0.6, "--read", 0.4)
    assert verify(tmp_path / "out") == []
    found = inspect(tmp_path / "out")
    assert len(found.linears) == 14
    assert 0.35 < found.linear_bytes / found.dense_bytes <= 0.4
    assert found.made_by["size_budget"] == 0.6 and found.made_by["read_budget"] == 0.4
    assert found.made_by["tune_epochs"] == 8
    run("report", tmp_path / "out", "-o", tmp_path / "r.html", "--quiet")
    page = (tmp_path / "r.html").read_text()
    assert "What each linear got" in page and "what was chosen stands above" in page
    sizes = [size for size, _ in found.made_by["dial"]["curve"]]
    assert any(f"at {size:.3f} of the dense" in page for size in sizes if 0.35 < size <= 0.4)
    printed = run("inspect", tmp_path / "out").output
    assert re.search(r"predicted to add .* nats per token, .*; the most in model", printed)
    assert re.search(r"  values  zeros ", printed) and re.search(r"    int[48]   0.0%", printed)
