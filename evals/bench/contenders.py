"""Models of one shape in the formats that somebody may choose between, with random weights.

    dense                             vLLM, in the dtype that is computed in
    50% int4, 80% bfloat16, int4      ours with one expert; without a sparsity rows are full
    50% int4, 16 experts, size 0.5    ours, stored in half the dense bytes
    W8A8                              vLLM's own: int8 weights by row, int8 inputs by token
    W4A16                             vLLM's own: int4 weights in groups of 128
    Q4_0, Q8_0                        llama.cpp: 4 or 8 bits in groups of 32

All linears of the blocks are in the format, embeddings and head are dense in all of them. W8A8 and
W4A16 are compressed-tensors checkpoints, rounded from the dense model. llama.cpp and vLLM's W8A8
round inputs to 8 bits as well, and so does vLLM's W4A16 on a CPU unless VLLM_CPU_INT4_W4A8=0 is
set; ours multiply inputs as they are.
"""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evals.bench.engines import Engine, llama_engine, vllm_engine
from wexpand_plugin.tools.synth import Shape, synth

__all__ = ["DEFAULT", "Contender", "contender"]

DEFAULT = (
    "dense", "50% int4", "int4", "50% bfloat16", "50% int4, 16 experts, size 0.5", "W8A8",
    "W4A16", "Q4_0", "Q8_0",
)  # fmt: skip
GROUP = 128
OURS = re.compile(
    r"(?:(?P<percent>\d+)% )?(?P<values>int8|int4|bfloat16|float16|float32)"
    r"(?:, (?P<experts>\d+) experts, size (?P<size>[\d.]+))?"
)


@dataclass(frozen=True)
class Contender:
    """A model on disk and the engine for it."""

    name: str
    path: Path
    start: Callable[[int, Path], Engine]
    """starts the engine, given the longest sequence [tokens] and the file for its log"""

    @property
    def disk_bytes(self) -> int:
        """Of the weights' files."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


def vllm_contender(name: str, path: Path, dtype: str) -> Contender:
    """A model directory for vLLM."""
    return Contender(name, path, lambda longest, log: vllm_engine(path, dtype, longest, log))


def contender(
    name: str, folder: Path, shape: Shape, dtype: str, llama: str | None
) -> Contender | None:
    """Make the model called `name`, see the module, as a new entry of `folder`.

    :param folder: holds the model `dense` already, but for "dense" itself
    :param llama: a Python with llama-cpp-python and gguf; without it llama.cpp's are None
    :raises ValueError: there is no such contender
    """
    path, dense = folder / re.sub(r"\W+", "_", name), folder / "dense"
    if name in ("Q4_0", "Q8_0"):
        if llama is None:
            return None
        python, file = llama, path.with_suffix(".gguf")
        command = [python, "-m", "evals.bench.llama", "write", str(file), name]
        subprocess.run([*command, str(dense / "config.json")], check=True)
        return Contender(name, file, lambda longest, log: llama_engine(python, file, longest, log))
    options: dict[str, Any] = dict(dtype=dtype, quiet=True, targets="all", seed=0)
    if name == "dense":
        synth(path, shape, experts=1, dense=True, **options)
    elif name in SCHEMES:
        write_compressed_tensors(dense, path, name)
    elif found := OURS.fullmatch(name):
        synth(
            path, shape, values=found["values"], sparsity=int(found["percent"] or 0) / 100,
            experts=int(found["experts"] or 1), **options,
            budget=float(found["size"]) if found["size"] else None,
        )  # fmt: skip
    else:
        raise ValueError(f"contender: {name!r} is not like one of {', '.join(DEFAULT)}")
    return vllm_contender(name, path, dtype)


def int8_rows(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' "int-quantized": a scale for each row."""
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / 127).to(weight.dtype)
    q = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": q, "weight_scale": scale}


def int4_groups(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' "pack-quantized": eight to an int32, a scale for each group."""
    out, width = weight.shape
    groups = weight.float().view(out, -1, GROUP)
    scale = (groups.abs().amax(dim=2) / 7).to(weight.dtype)
    q = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7).to(torch.int32) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (q.view(out, width // 8, 8) << shifts).sum(dim=2).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor([out, width]),
    }


SCHEMES: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]], dict, dict | None]] = {
    # format, how a linear is stored, the scheme's weights and its input activations
    "W8A8": (
        "int-quantized",
        int8_rows,
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "W4A16": (
        "pack-quantized",
        int4_groups,
        {"num_bits": 4, "strategy": "group", "group_size": GROUP},
        None,
    ),
}


def write_compressed_tensors(dense: Path, path: Path, name: str) -> None:
    """The dense model with its linears rounded to nearest in one of compressed-tensors' schemes."""
    kind, store, weights, inputs = SCHEMES[name]
    common = {"type": "int", "symmetric": True}
    tensors: dict[str, Tensor] = {}
    for file in dense.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if key.endswith("_proj.weight"):
                linear = key.removesuffix(".weight")
                tensors |= {f"{linear}.{part}": t for part, t in store(tensor).items()}
            else:
                tensors[key] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | common,
                "input_activations": inputs and inputs | common,
                "output_activations": None,
            }
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
