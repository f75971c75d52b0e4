"""vLLM's own engine on tiny checkpoints: the same text and log-probabilities as transformers."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from engine import LENGTH, PROMPTS

from wexpand_plugin.saving import wrap_save_pretrained

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("engine.py")
SIZES = dict(hidden_size=128, intermediate_size=172)  # heads of 32, which vLLM's CPU attention has


def save(path: Path, kind: str, expand: bool = True, **changes) -> torch.nn.Module:
    """A tiny model at `path`, every linear of its blocks expanded; returned in float32."""
    model = tiny.dense(kind, **SIZES | changes)
    if expand:
        model = tiny.expand(model, match="")
        wrap_save_pretrained(model, {"test": kind})
    model.save_pretrained(path)
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
    for name, kind, expand in (
        ("llama", "llama", True), ("qwen2", "qwen2", True), ("plain", "llama", False),
        ("gpt_neox", "gpt_neox", True),
    ):  # fmt: skip
        path = tmp_path_factory.mktemp(name)
        made[name] = (path, by_transformers(save(path, kind, expand)))
    return made


@pytest.fixture(scope="module")
def damaged(models, tmp_path_factory) -> Path:
    """The Llama with one bit of one value flipped, after it was saved."""
    from safetensors.torch import load_file, save_file

    source, path = models["llama"][0], tmp_path_factory.mktemp("damaged")
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[5] ^= 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def served(models, damaged, tmp_path_factory) -> dict:
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
        {"name": "damaged", "model": str(damaged)},
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
        ("damaged", "model.layers.1.mlp.up_proj.weight: damaged"),
    ],
)
def test_refused_with_a_sentence(served, job, sentence):
    assert sentence in served[job].get("error", "")


def test_two_workers_generate_the_text_of_one(models, tmp_path):
    path, truth = models["qwen2"]
    job = {"name": "two", "model": str(path), "tensor_parallel_size": 2,
           "distributed_executor_backend": "mp"}  # fmt: skip
    results = run_engines(
        tmp_path, [job], VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="1"
    )
    assert_same(results["two"], truth, 1e-3)
