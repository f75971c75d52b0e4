"""The command line: what it prints, its exit codes, and that errors are one sentence."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
from commands import run, sentence
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from wexpand_plugin import __version__
from wexpand_plugin.compress.recipes import recipe_names
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.tools.cli import app
from wexpand_plugin.tools.cli_errors import sentence as sentence_of
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.synth import Shape, synth
from wexpand_plugin.tools.verify import verify

RECIPE = (
    "a_stage:\n  b_modifiers:\n    SparseExpansionModifier:\n"
    "      sparsity: 0.5\n      num_experts: 2\n      targets: ['re:.*mlp.*']\n"
)
COMMANDS = (
    "compress", "plan", "pack", "unpack", "inspect", "verify", "report", "synth", "lm-eval",
)  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "pruned"
    tiny.prune(tiny.dense(dtype=torch.bfloat16)).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_help_teaches():
    text = run("--help").output
    assert all(re.search(rf"^  {name}  +\w", text, re.MULTILINE) for name in COMMANDS)
    assert "--install-completion" in text and "Exit codes" in text
    for name in COMMANDS:
        text = run(name, "--help").output
        assert text.count("\n") > 8 and "options:" in text.lower()


def test_version():
    assert run("--version").output == f"wexpand {__version__}\n"


def test_wrong_use_is_2():
    for arguments in (["pack"], ["nonsense"], ["pack", "a", "b", "--nonsense"], ["synth"]):
        run(*arguments, code=2)
    run("compress", "a", "-r", "b", "-d", "c", "-o", "d", "--samples", "0", code=2)
    run("unpack", "a", "b", "--expert", "-1", code=2)


def test_pack_verify_inspect_unpack(pruned, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    text = run("pack", pruned, out).stdout
    assert "packed 14 linears" in text and re.search(r"0\.\d\d x", text)
    assert "no problem found" in run("verify", out).stdout
    assert run("verify", out, "--quiet").output == ""
    text = run("inspect", out).stdout
    assert text.count("RoutedLinear") == 0 and text.count(".mlp.up_proj") == 2
    assert "one token reads" in text and "on disk" in text
    found = json.loads(run("inspect", out, "--json").stdout)
    assert found["ours"] and len(found["linears"]) == 14
    assert found["linear_bytes"] == inspect(out).linear_bytes < found["dense_bytes"]
    run("unpack", out, back)
    before, after = (load_file(path / "model.safetensors") for path in (pruned, back))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "not a model that wexpand wrote" in run("inspect", back).stdout


def test_pack_json_and_notes(tmp_path):
    model = tiny.multiply_by_masks(tiny.dense(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "dense")
    small = json.loads(run("pack", tmp_path / "dense", tmp_path / "a", "--json").stdout)
    assert small["negative_zeros"] > 0 and "-0.0" in small["notes"][0]
    options = ("--keep-negative-zeros", "--json")
    done = json.loads(run("pack", tmp_path / "dense", tmp_path / "b", *options).stdout)
    assert small["bytes_after"] < done["bytes_after"]
    assert run("pack", tmp_path / "dense", tmp_path / "c", "-q").output == ""
    assert "-0.0" in run("pack", tmp_path / "dense", tmp_path / "d").stdout


def test_problems_are_1(pruned, tmp_path):
    run("pack", pruned, tmp_path / "a", "-q")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    result = run("verify", tmp_path / "a", "-q", code=1)
    assert "damaged" in result.stdout and len(result.stdout.splitlines()) == 1
    found = json.loads(run("verify", tmp_path / "a", "--json", code=1).stdout)
    assert len(found["problems"]) == 1 and found["directory"] == str(tmp_path / "a")


def test_errors_are_one_sentence(pruned, tmp_path):
    missing = tmp_path / "missing"
    assert "there is no such file" in sentence(run("inspect", missing, code=1))
    assert "there is no such file" in sentence(run("unpack", missing, tmp_path / "a", code=1))
    assert "is not empty" in sentence(run("pack", pruned, pruned, code=1))
    tiny.dense().save_pretrained(tmp_path / "dense")
    assert "no linear has more than" in sentence(
        run("pack", tmp_path / "dense", tmp_path / "a", "-q", code=1)
    )
    assert "sparsity: 1.5" in sentence(run("synth", tmp_path / "a", "--sparsity", 1.5, code=1))
    assert not (tmp_path / "a").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "inspect", str(tmp_path)])
    assert isinstance(result.exception, WexpandError) and result.exit_code == 1


def test_defects_keep_their_traceback(tmp_path, monkeypatch):
    def broken(directory):
        raise RuntimeError("a defect")

    monkeypatch.setattr("wexpand_plugin.tools.inspect.inspect", broken)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError("no"), r"out of memory \(.*no\); lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory .*; lower --batch-size"),
        (torch.AcceleratorError("unspecified launch failure", 719), "the device failed .*launch"),
    ],
)
def test_what_the_machine_could_not_do_is_said(error, problem):
    assert re.match(problem, sentence_of(error))


def test_memory_that_the_system_does_not_give():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert sentence_of(error.value).startswith("out of memory (")


def test_recipe_values_are_named():
    """pydantic's errors, as those of recipes, become one sentence with the key and the value."""
    from wexpand_plugin.format.config import LinearEntry

    with pytest.raises(ValueError) as error:
        LinearEntry(in_features=0, out_features=1, experts=1, versions=1, nnz=1)
    text = sentence_of(error.value)
    assert text.startswith("LinearEntry.in_features: 0: ") and "\n" not in text


@pytest.mark.slow
def test_as_a_program(pruned, tmp_path):
    """The real thing, installed entry point or not: output, errors and codes of the process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def process(*arguments):
        command = [sys.executable, "-m", "wexpand_plugin.tools.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"wexpand {__version__}\n"), done.stderr
    done = process("pack", pruned, tmp_path / "out", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["packed"]) == 14
    done = process("verify", tmp_path / "nothing")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert process("verify").returncode == 2


def test_missing_libraries_are_asked_for_by_their_extra(root):
    """Each is in the extra that the sentence names, or comes with what is there."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    for library, extra in (("jinja2", "report"), ("datasets", "report"), ("lm_eval", "eval")):
        text = sentence_of(ModuleNotFoundError(name=library))
        assert text.startswith(f"{library} is not installed; ") and f"'.[{extra}]'" in text
        assert any(library.replace("_", "-") in needed for needed in extras[extra])


@pytest.mark.slow
def test_lm_eval_reads_our_models_through_transformers(root, tmp_path):
    """`lm_eval --model hf` alone does not know the quantization type."""
    shape = Shape(hidden=64, ffn=96, layers=1, heads=4, vocab=300)
    synth(tmp_path / "model", shape, experts=2, quiet=True)
    command = [
        sys.executable, "-m", "wexpand_plugin.tools.cli", "lm-eval", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks",
        "stdlib_choice", "--include_path", str(root / "evals" / "tasks"), "--limit", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "|stdlib_choice|" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "problem"),
    [("size=64k", "No space left on device"), ("ro", "Read-only file system")],
)
@pytest.mark.parametrize("command", ["pack", "compress"])
def test_a_disk_that_cannot_take_it(command, options, problem, pruned, tmp_path):
    """One sentence, nothing left on it but finished blocks. A file system of our own, as root may
    write anywhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "t5 t6 t7 " * 400}))
    arguments = {
        "pack": ["pack", pruned, disk / "out", "-q"],
        "compress": [
            "compress", pruned, "-r", tmp_path / "recipe.yaml", "-d", tmp_path / "text.jsonl",
            "-o", disk / "out", "--samples", "16", "--max-seq-length", "32", "-q",
        ],
    }[command]  # fmt: skip
    script = f"mount -t tmpfs -o {options} none {disk} || exit 77"
    script += f'; "$@"; echo "code $?"; ls -A {disk}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m",
         "wexpand_plugin.tools.cli", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"LLM_COMPRESSOR_LOG_DISABLED": "1"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    _, code, left = done.stdout.rpartition("code 1\n")
    assert code and set(left.split()) <= {".out.unfinished"}, (done.stdout, done.stderr)
    assert not left or command == "compress"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("wexpand: ") and problem in last and "Traceback" not in done.stderr


# --- compress, through llm-compressor


def test_compress_refuses_before_work(pruned, tmp_path):
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text("")
    text.write_text("some text")
    options = ("-r", recipe, "-d", text, "-o", tmp_path / "out")
    assert "recipe.yaml: is empty" in sentence(run("compress", pruned, *options, code=1))
    text = sentence(run("compress", pruned, "-r", "unknown", *options[2:], code=1))
    assert "'unknown' is neither a file nor one of " in text and "sparse_expansion_budget" in text
    no = run("compress", pruned, *options[2:], "--size", 1.5, code=1)
    assert "size: 1.5 should be" in sentence(no)
    no = run("compress", pruned, *options[2:], code=2)
    assert "Missing --size, --read or --recipe" in no.stderr
    recipe.write_text("a_stage:\n  b_modifiers:\n    PackModifier: {targets: Linear}\n")
    # the last line: llm-compressor says something of its own when it is imported
    no = run("compress", pruned, *options, "--size", 0.2, code=1).stderr.splitlines()[-1]
    assert "recipe.yaml: has no SparseExpansionModifier, whose budgets size and read set" in no
    no = run("compress", pruned, "-r", "int4", *options[2:], "--size", 0.2, code=1)
    no = no.stderr.splitlines()[-1]
    assert "int4.yaml: has a size of its own, as one expert" in no
    assert not (tmp_path / "out").exists()


def test_compress_then_verify(tmp_path):
    """From a dense model with its tokenizer to a checkpoint, in one command."""
    shape = Shape(hidden=64, ffn=96, layers=1, heads=4, vocab=300)
    synth(tmp_path / "dense", shape, dense=True, dtype="float32", quiet=True)
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run(
        "compress", tmp_path / "dense", "-r", tmp_path / "recipe.yaml", "-d",
        tmp_path / "text.txt", "-o", tmp_path / "out", "--samples", 16, "--max-seq-length", 64,
    )  # fmt: skip
    assert verify(tmp_path / "out") == []
    assert [linear.experts for linear in inspect(tmp_path / "out").linears] == [2, 2, 2]


def test_resume_takes_everything_from_the_run_that_ended(tmp_path, monkeypatch):
    from wexpand_plugin.compress import oneshot

    model = tiny.dense(dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "t5 t6 t7 t9 " * 400}))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    command = (
        "compress", tmp_path / "dense", "-r", tmp_path / "recipe.yaml", "-d",
        tmp_path / "text.jsonl", "-o", out, "--samples", 16, "--max-seq-length", 32,
    )  # fmt: skip
    copy_others = oneshot.copy_others

    def full(*args):
        raise OSError(28, "No space left on device", "out")

    def said(*arguments):
        """The last line: llm-compressor's log, made in another test, may complain before."""
        return run(*arguments, code=1).stderr.strip().splitlines()[-1]

    assert "out: there is no unfinished run" in said("compress", "--resume", out)
    monkeypatch.setattr(oneshot, "copy_others", full)
    assert said(*command) == "wexpand: out: No space left on device"
    assert "left 2 finished blocks" in said(*command)
    monkeypatch.setattr(oneshot, "copy_others", copy_others)
    assert "seed was 0 and is 3 now" in said("compress", "--resume", out, "--seed", 3)
    run("compress", "--resume", out, "-o", tmp_path / "other", code=2)
    assert "wrote" in run("compress", "--resume", out).output and verify(out) == []
    run("compress", "-d", tmp_path / "text.jsonl", "-o", out, code=2)


def test_help_names_the_recipes_there_are():
    text = " ".join(run("compress", "--help").stdout.split())
    named = text.partition("recipe of the package: ")[2].partition(". ")[0]
    found = {name.partition(" (")[0] for name in named.replace("--size and --read", "").split(", ")}
    assert found == set(recipe_names())
