"""A reader of checkpoints, written from docs/checkpoint-format.md alone; shares no code with us."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def read(directory: Path) -> dict[str, dict]:
    """Linear -> its dense experts [experts, out, in] float64, its router and its bias."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "wexpand" and config["format_version"] == 1
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for group in config["groups"]:
        for name, entry in group["linears"].items():
            parts = {
                key.removeprefix(f"{name}."): value
                for key, value in tensors.items()
                if key.rpartition(".")[0] == name
            }
            versions = rows(parts, group["in_features"], entry)
            if group.get("experts", 1) == 1:
                experts = versions[None]
            else:
                row_map = parts["row_map"].numpy().astype(int)
                first = np.concatenate([[0], np.cumsum(row_map.max(axis=0) + 1)])[:-1]
                experts = versions[first + row_map]
            router = parts.get("router_weight"), parts.get("router_bias")
            found[name] = {"experts": experts, "router": router, "bias": parts.get("bias")}
    return found


def rows(parts: dict[str, torch.Tensor], width: int, entry: dict) -> np.ndarray:
    """Dense row versions [versions, in] float64."""
    count, codec = entry["versions"], entry["values"]
    keep = np.ones((count, width), dtype=bool)
    if "weight_mask" in parts:
        bits = np.unpackbits(parts["weight_mask"].numpy(), axis=1, bitorder="little")
        keep = bits[:, :width].astype(bool)
    dense, start = np.zeros((count, width)), 0
    stored = parts["weight"]
    flat = stored.numpy() if codec == "int4" else stored.double().numpy()
    for version in range(count):
        kept = int(keep[version].sum())
        if codec == "int4":
            data = flat[start : start + (kept + 1) // 2]
            start += len(data)
            halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)[:kept].astype(int)
            values = np.where(halves > 7, halves - 16, halves)
        else:
            values = flat[start : start + kept]
            start += kept
        dense[version, keep[version]] = values
    if "weight_scale" in parts:
        scale = parts["weight_scale"].double().numpy()
        dense *= np.repeat(scale, entry["value_group"], axis=1)[:, :width]
    return dense
