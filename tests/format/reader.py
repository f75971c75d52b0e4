"""A reader of checkpoints, written from docs/checkpoint-format.md alone; shares no code with us."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def read(directory: Path) -> dict[str, dict]:
    """Linear -> its dense experts [experts, out, in] float64, router, biases, ..."""
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
            found[name] |= clusters_of(parts, group)
    return found


def clusters_of(parts: dict[str, torch.Tensor], group: dict) -> dict:
    """Parents, the expert of each cluster, and the bias of each [clusters, out] float64."""
    experts = group.get("experts", 1)
    clusters = group.get("clusters", experts)
    cluster_expert = np.arange(clusters) if experts == clusters else np.zeros(clusters, int)
    if "cluster_expert" in parts:
        cluster_expert = parts["cluster_expert"].numpy()
    biases = np.zeros((clusters, 1))
    if "cluster_bias" in parts:
        biases = parts["cluster_bias"].double() * parts["cluster_bias_scale"].double()
    return {
        "parents": group.get("parents", 0),
        "cluster_expert": cluster_expert,
        "cluster_bias": np.asarray(biases),
    }


def output(linear: dict, x: np.ndarray) -> tuple[np.ndarray, int]:
    """Output [out] of a token [in], both float64, and the cluster that it was sent to."""
    clusters, parents, c = len(linear["cluster_expert"]), linear["parents"], 0
    if clusters > 1:
        weight, bias = (part.double().numpy() for part in linear["router"])
        logits = weight @ x + bias
        first, end = 0, clusters
        if parents:
            p = int(logits[:parents].argmax())
            first, end = p * clusters // parents, (p + 1) * clusters // parents
        c = first + int(logits[parents + first : parents + end].argmax())
    y = linear["experts"][linear["cluster_expert"][c]] @ x + linear["cluster_bias"][c]
    return (y if linear["bias"] is None else y + linear["bias"].double().numpy()), c


def rows(parts: dict[str, torch.Tensor], width: int, entry: dict) -> np.ndarray:
    """Dense row versions [versions, in] float64."""
    count, codec = entry["versions"], entry["values"]
    keep = np.ones((count, width), dtype=bool)
    if "weight_mask" in parts:
        bits = np.unpackbits(parts["weight_mask"].numpy(), axis=1, bitorder="little")
        keep = bits[:, :width].astype(bool)
    dense, start = np.zeros((count, width)), 0
    stored = parts["weight"]
    bits = {"int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}.get(codec)
    flat = stored.numpy() if bits else stored.double().numpy()
    for version in range(count):
        kept = int(keep[version].sum())
        if bits:
            data = flat[start : start + (kept * bits + 7) // 8]
            start += len(data)
            stream = np.unpackbits(data, bitorder="little")[: kept * bits].reshape(kept, bits)
            values = stream.astype(int) @ [2**b if b < bits - 1 else -(2**b) for b in range(bits)]
            if bits < 4:
                values = 2 * values + 1
        else:
            values = flat[start : start + kept]
            start += kept
        dense[version, keep[version]] = values
    if "weight_scale" in parts:
        scale = parts["weight_scale"].double().numpy()
        dense *= np.repeat(scale, entry["value_group"], axis=1)[:, :width]
    return dense
