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
from vllm.model_executor.layers.quantization import base_config

from wexpand_plugin.format.model_dir import INDEX, ModelDir
from wexpand_plugin.hf.saving import wrap_save_pretrained

pytestmark = pytest.mark.slow
# before 0.32, without these options
OLD = not hasattr(base_config, "resolve_quant_method")
SCRIPT = Path(__file__).with_name("engine.py")
SIZES = dict(hidden_size=128, intermediate_size=172)  # heads of 32, which vLLM's CPU attention has


def save(path: Path, kind: str, match: str | None = "", **settings) -> torch.nn.Module:
    """A tiny model at `path`, in several files, the linears of its blocks whose names contain
    `match` expanded with the `settings` of `tiny.expand`; returned in float32.
    """
    model = tiny.dense(kind, **SIZES)
    if match is not None:
        model = tiny.expand(model, match=match, **settings)
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
    for name, kind, match, settings in (
        ("llama", "llama", "", {}), ("qwen2", "qwen2", "", {}), ("plain", "llama", None, {}),
        ("gpt_neox", "gpt_neox", "", {}), ("partly", "llama", "layers.0.mlp", {}),
        ("40 clusters", "llama", "",
         dict(experts=1, clusters=40, parents=7, sparsity=0.0, values="int3")),
        ("8 clusters", "qwen2", "", dict(experts=2, clusters=8, values="int2")),
    ):  # fmt: skip
        path = tmp_path_factory.mktemp(name)
        made[name] = (path, by_transformers(save(path, kind, match, **settings)))
    return made


def flip_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).view(-1)[5] ^= 1
    return tensor


def change_tensor(path: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    file = ModelDir(path).headers[name].file
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


Q, MASK = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight_mask"
NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
# name -> (how a copy of the model "partly" is damaged, what the error says). Only layer 0's MLP is
# expanded: all but the first are found with WEXPAND_VERIFY=1
DAMAGES = {
    "expanded": (
        lambda path: change_tensor(path, MASK, torch.zeros_like),
        f".safetensors: {MASK}: rows keep 0 weights",
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
    "cut file": (cut_file, "not a complete safetensors file"),
    "more layers": (
        lambda path: change_json(
            path / "config.json",
            lambda v: v.update(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ),
        "config.json: was changed after it was written",
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
        {"name": "40 clusters", "model": str(models["40 clusters"][0])},
        {"name": "8 clusters", "model": str(models["8 clusters"][0]), "enforce_eager": False},
        {"name": "gpt_neox", "model": str(models["gpt_neox"][0])},
        {"name": "lora", "model": llama, "enable_lora": True},
        {"name": "dummy", "model": llama, "load_format": "dummy"},
        {"name": "fp8", "model": llama, "quantization": "fp8"},
        {"name": "partly", "model": str(models["partly"][0])},
        {"name": "edited on purpose", "model": str(edited)},
        {"name": "expanded", "model": str(damaged["expanded"])},
        {"name": "ipc_cache", "model": llama, "load_format": "ipc_cache"},
        {"name": "down_proj in fp8", "model": llama, "dtype": "bfloat16",
         "quantization_config": {"targets": {"re:.*down_proj": "fp8_per_tensor"}}},
        {"name": "o_proj in fp8", "model": str(models["partly"][0]), "dtype": "bfloat16",
         "quantization_config": {"targets": {"re:.*o_proj": "fp8_per_channel"}}},
    ]  # fmt: skip
    return run_engines(tmp_path_factory.mktemp("served"), jobs)


@pytest.fixture(scope="module")
def verified(models, damaged, tmp_path_factory) -> dict:
    """With WEXPAND_VERIFY=1."""
    sound = {"partly": models["partly"][0]}
    jobs = [{"name": name, "model": str(path)} for name, path in (damaged | sound).items()]
    return run_engines(tmp_path_factory.mktemp("verified"), jobs, WEXPAND_VERIFY="1")


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
        ("40 clusters", "40 clusters"),
        ("8 clusters", "8 clusters"),
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
        assert "rearranges the rows" in found.get("error", "")
    else:
        assert_same(found, models["gpt_neox"][1], 1e-3)


def test_bfloat16(served, models):
    """Greedy text may differ where two tokens are close; the prompt's log-probabilities may not."""
    found, truth = served["llama bfloat16"], models["llama"][1]
    assert "error" not in found, found["error"]
    for prompt, ours, theirs in zip(PROMPTS, found["logprobs"], truth["logprobs"], strict=True):
        known = len(prompt) - 1
        assert ours[:known] == pytest.approx(theirs[:known], abs=0.05)


@pytest.mark.skipif(OLD, reason="before vLLM 0.32 this option is not for our checkpoints")
def test_dense_linears_quantized_beside_ours(served, models):
    found, truth = served["o_proj in fp8"], models["partly"][1]
    assert "error" not in found, found["error"]
    for prompt, ours, theirs in zip(PROMPTS, found["logprobs"], truth["logprobs"], strict=True):
        known = len(prompt) - 1
        assert ours[:known] == pytest.approx(theirs[:known], abs=0.2)


def test_the_log_says_once_which_kernel(served):
    lines = [line for line in served["output"].splitlines() if "wexpand: " in line]
    assert sum("kernel on cpu, torch.float32" in line for line in lines) == 1


@pytest.mark.parametrize(
    "job, sentence",
    [
        ("lora", "LoRA adapters cannot be served on expanded linears"),
        ("dummy", "--load-format dummy cannot stand in for them"),
        ("fp8", "wexpand"),
        ("expanded", DAMAGES["expanded"][1]),
        ("ipc_cache", "ipc_cache" if OLD else "CUDA IPC"),
        ("down_proj in fp8", "quantization" if OLD else "down_proj: expanded weights cannot be"),
    ],
)
def test_refused_with_a_sentence(served, job, sentence):
    assert sentence in served[job].get("error", "")


@pytest.mark.parametrize("job", [job for job in DAMAGES if job != "expanded"])
def test_damage_is_refused_by_name(verified, job):
    assert DAMAGES[job][1] in verified[job].get("error", "")


def test_what_is_sound_is_served_after_it_was_verified(verified, models):
    assert_same(verified["partly"], models["partly"][1], 1e-3)
    assert verified["output"].count(" is sound") == 1


def test_two_workers_generate_the_text_of_one(models, damaged, tmp_path):
    """And one of them refuses a damaged tensor for both."""
    path, truth = models["qwen2"]
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = [
        {"name": "two", "model": str(path), **two},
        {"name": "damaged", "model": str(damaged["norm"]), **two},
        {"name": "clusters", "model": str(models["8 clusters"][0]), **two},
    ]
    results = run_engines(
        tmp_path, jobs, WEXPAND_VERIFY="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )  # fmt: skip
    assert_same(results["two"], truth, 1e-3)
    assert_same(results["clusters"], models["8 clusters"][1], 1e-3)
    assert "error" in results["damaged"]
    refusals = results["output"].count(f"WexpandError: {damaged['norm']}")
    assert refusals == 1 and DAMAGES["norm"][1] in results["output"]
