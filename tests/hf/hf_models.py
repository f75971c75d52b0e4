"""What the tests of transformers' side share."""

import json
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM

from wexpand_plugin.format.config import CheckpointConfig
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.hf.linear import RoutedLinear

__all__ = ["edit", "load", "logits", "quantise", "same_tensors"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def same_tensors(a, b) -> bool:
    def state(model):
        # a router is made in float16 and loaded in float32
        state = model.state_dict().items()
        return {n: t.float() if n.endswith("router_weight") else t for n, t in state}

    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def edit(path: Path, change) -> None:
    """Change the quantization_config with `change(dict)` and seal it again."""
    values = json.loads((path / "config.json").read_text())
    change(values["quantization_config"])
    config = CheckpointConfig.model_validate(values["quantization_config"]).seal()
    values["quantization_config"] = config.model_dump(mode="json")
    (path / "config.json").write_text(json.dumps(values))


def quantise(model, how) -> None:
    """Store the kept weights of the routed linears as integers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedLinear):
            old = module.pool
            keep = old.decoded(torch.float32).rows() != 0
            pool = RowPool.pack(old.rows().float(), old.row_map, keep=keep, codec=how)
            model.set_submodule(
                name,
                RoutedLinear.from_pool(
                    pool, module.router, module.bias, group=module.group, tokens=module.tokens,
                    dtype=module.dtype,
                ),
            )  # fmt: skip
