"""vLLM's own engine on tiny checkpoints: the same text and log-probabilities as transformers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from engine import LENGTH, PROMPTS

from wexpand_plugin.format import checkpoint
from wexpand_plugin.hf.saving import wrap_save_pretrained

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("engine.py")
SIZES = dict(hidden_size=128, intermediate_size=172)  # heads of 32, which vLLM's CPU attention has


def save(path: Path, kind: str, match: str | None = "") -> torch.nn.Module:
    """A tiny model at `path`, in several files, the linears of its blocks whose names contain
    `match` expanded; returned in float32.
    """
    model = tiny.dense(kind, **SIZES)
    if match is not None:
        model = tiny.expand(model, match=match)
        wrap_save_pretrained(model, {"test": kind})
    model.save_pretrained(path, max_shard_size="300kB")
    return model


def by_transformers(model: torch.nn.Module) -> dict:
    """Greedy continuations of PROMPTS and the log-probability of every token but the first."""
    found: dict[str, list] = {"tokens": [], "logprobs": []}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(LENGTH):
            with torch.no_grad():
                logits = model(ids).logits
            ids = torch.cat([ids, logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
        logprobs = logits.double().log_softmax(dim=-1)[0]
        found["tokens"].append(ids[0, len(prompt) :].tolist())
        found["logprobs"].append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1).tolist())
    return found


def run_engines(directory: Path, jobs: list[dict], **environment) -> dict:
    """The results of `engine.py`, by job; whatever it started is gone afterwards."""
    wanted, results = directory / "jobs.json", directory / "results.json"
    wanted.write_text(json.dumps(jobs))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(wanted), str(results)],
        env=os.environ | {"VLLM_CACHE_ROOT": str(directory / "cache")} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert results.exists(), output[-4000:]
    return json.loads(results.read_text()) | {"output": output}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Name -> (directory, what transformers computes)."""
    made = {}
    for name, kind, match in (
        ("llama", "llama", ""), ("qwen2", "qwen2", ""), ("plain", "llama", None),
        ("gpt_neox", "gpt_neox", ""), ("partly", "llama", "layers.0.mlp"),
    ):  # fmt: skip
        path = tmp_path_factory.mktemp(name)
        made[name] = (path, by_transformers(save(path, kind, match)))
    return made


def flip_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).view(-1)[5] ^= 1
    return tensor


def change_tensor(path: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint.tensor_files(path)[name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def cut_file(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = checkpoint.INDEX
# name -> (how a copy of the model "partly" is damaged, what the error says); the file of all but
# the last four is sound. Only layer 0's MLP is expanded: the others are tensors that vLLM loads
# without us
DAMAGES = {
    # by the layer, while vLLM loads it
    "expanded": (
        lambda path: change_tensor(path, UP, flip_bit),
        f".safetensors: {UP}: damaged",
    ),
    "embedding": (
        lambda path: change_tensor(path, "model.embed_tokens.weight", flip_bit),
        "model.embed_tokens.weight: damaged",
    ),
    "norm": (lambda path: change_tensor(path, NORM, flip_bit), f"{NORM}: damaged"),
    "dense linear": (lambda path: change_tensor(path, Q, flip_bit), f"{Q}: damaged"),
    "untouched layer": (lambda path: change_tensor(path, DOWN, flip_bit), f"{DOWN}: damaged"),
    "shorter head": (
        lambda path: change_tensor(path, "lm_head.weight", lambda tensor: tensor[:-1]),
        "lm_head.weight: damaged",
    ),
    "lost from the index": (
        lambda path: change_json(path / INDEX, lambda v: v["weight_map"].pop(NORM)),
        f"{NORM}: listed in None",
    ),
    "elsewhere by the index": (
        lambda path: change_json(path / INDEX, lambda v: v["weight_map"].update({NORM: "a"})),
        f"{NORM}: listed in a, found in model-0",
    ),
    "cut file": (cut_file, "not a complete safetensors file"),
    "more layers": (
        lambda path: change_json(
            path / "config.json",
            lambda v: v.update(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ),
        "model.layers.2.",
    ),
}


@pytest.fixture(scope="module")
def damaged(models, tmp_path_factory) -> dict[str, Path]:
    """Copies of the model "partly", each damaged in one place."""
    found = {}
    for name, (damage, _) in DAMAGES.items():
        found[name] = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(models["partly"][0], found[name])
        damage(found[name])
    return found


@pytest.fixture(scope="module")
def edited(models, tmp_path_factory) -> Path:
    """The model "partly" with a setting changed on purpose."""
    path = tmp_path_factory.mktemp("edited") / "model"
    shutil.copytree(models["partly"][0], path)
    change_json(path / "config.json", lambda v: v.update(max_position_embeddings=128))
    return path


@pytest.fixture(scope="module")
def served(models, damaged, edited, tmp_path_factory) -> dict:
    llama, qwen2, plain = (str(models[name][0]) for name in ("llama", "qwen2", "plain"))
    jobs = [
        {"name": "llama eager", "model": llama},
        # after an eager engine: the compiled one then inherits in-place rotary layers
        {"name": "qwen2 compiled", "model": qwen2, "enforce_eager": False},
        {"name": "llama in parts", "model": llama, "max_num_batched_tokens": 4,
         "enable_prefix_caching": True},
        {"name": "llama bfloat16", "model": llama, "dtype": "bfloat16"},
        {"name": "plain", "model": plain},
        {"name": "gpt_neox", "model": str(models["gpt_neox"][0])},
        {"name": "lora", "model": llama, "enable_lora": True},
        {"name": "dummy", "model": llama, "load_format": "dummy"},
        {"name": "fp8", "model": llama, "quantization": "fp8"},
        {"name": "partly", "model": str(models["partly"][0])},
        {"name": "edited on purpose", "model": str(edited)},
        *({"name": name, "model": str(path)} for name, path in damaged.items()),
    ]  # fmt: skip
    return run_engines(tmp_path_factory.mktemp("served"), jobs)


def assert_same(found: dict, truth: dict, tolerance: float) -> None:
    assert "error" not in found, found["error"]
    assert found["tokens"] == truth["tokens"]
    for ours, theirs in zip(found["logprobs"], truth["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize(
    "job, model",
    [
        ("qwen2 compiled", "qwen2"),
        ("llama eager", "llama"),
        ("llama in parts", "llama"),
        ("plain", "plain"),
        ("partly", "partly"),
        ("edited on purpose", "partly"),
    ],
)
def test_same_text_and_logprobs_as_transformers(served, models, job, model):
    assert_same(served[job], models[model][1], 1e-3)


def test_gpt_neox(served, models):
    """One fused linear on disk, run by vLLM's transformers backend.

    vLLMs before 0.32 have a GPT-NeoX of their own, which reorders its rows, as those of a dense
    matrix, before we see them: that must stop the engine.
    """
    found = served["gpt_neox"]
    if find_spec("vllm.model_executor.models.gpt_neox"):
        assert "_repack_qkv" in found.get("error", "")
    else:
        assert_same(found, models["gpt_neox"][1], 1e-3)


def test_bfloat16(served, models):
    """Greedy text may differ where two tokens are close; the prompt's log-probabilities may not."""
    found, truth = served["llama bfloat16"], models["llama"][1]
    assert "error" not in found, found["error"]
    for prompt, ours, theirs in zip(PROMPTS, found["logprobs"], truth["logprobs"], strict=True):
        known = len(prompt) - 1
        assert ours[:known] == pytest.approx(theirs[:known], abs=0.05)


def test_the_log_says_once_which_kernel(served):
    lines = [line for line in served["output"].splitlines() if "wexpand: " in line]
    assert sum("kernel on cpu, torch.float32" in line for line in lines) == 1


@pytest.mark.parametrize(
    "job, sentence",
    [
        ("lora", "LoRA adapters cannot be served on expanded linears"),
        ("dummy", "--load-format dummy cannot stand in for them"),
        ("fp8", "wexpand"),
    ],
)
def test_refused_with_a_sentence(served, job, sentence):
    assert sentence in served[job].get("error", "")


@pytest.mark.parametrize("job", DAMAGES)
def test_damage_is_refused_by_name(served, job):
    assert DAMAGES[job][1] in served[job].get("error", "")


def test_changed_settings_are_logged(served):
    assert served["output"].count("config.json: was changed after it was written") == 2


def test_two_workers_generate_the_text_of_one(models, damaged, tmp_path):
    """And one of them refuses a damaged tensor for both."""
    path, truth = models["qwen2"]
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = [
        {"name": "two", "model": str(path), **two},
        {"name": "damaged", "model": str(damaged["norm"]), **two},
    ]
    results = run_engines(
        tmp_path, jobs, VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="1"
    )
    assert_same(results["two"], truth, 1e-3)
    assert "error" in results["damaged"]
    refusals = results["output"].count(f"WexpandError: {damaged['norm']}")
    assert refusals == 1 and DAMAGES["norm"][1] in results["output"]
