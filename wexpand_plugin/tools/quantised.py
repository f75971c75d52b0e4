"""Reading W4A16 and W8A16 models of compressed-tensors, to pack them bit for bit.

llm-compressor's GPTQModifier, AWQModifier and QuantizationModifier save weights of 4 or 8 bits in
the format "pack-quantized": per linear

    NAME.weight_packed   int32 [out, ceil(in * bits / 32)]   q + 2^(bits-1), the first in low bits
    NAME.weight_scale    [out, groups] or [out, 1]           of a group of columns, or of the row
    NAME.weight_shape    [out, in]

which is our int4 or int8 with full rows: the same integers, the same scales. What ours cannot hold
exactly (zero points, columns in another order, activations of few bits, scales beyond float16) is
refused, with the reason.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.model_dir import ModelDir
from ..format.rowpool import RowPool
from ..format.values import codec
from .sources import TRANSFORMED, transforms_inputs

__all__ = ["is_quantised", "quantised_linears", "quantised_pool"]

_PARTS = ("weight_packed", "weight_scale", "weight_shape")


def is_quantised(model: ModelDir) -> bool:
    """Whether a model says that compressed-tensors quantised its linears."""
    found = model.config_json.get("quantization_config")
    return isinstance(found, dict) and bool(found.get("config_groups"))


def quantised_linears(model: ModelDir) -> dict[str, str]:
    """Tensor -> linear, for the three tensors of every linear that is stored in few bits.

    :raises WexpandError: the model is quantised in a way that cannot be packed exactly
    """
    found = model.config_json["quantization_config"]
    where = f"{model.path}: config.json: quantization_config"
    if found.get("quant_method") != "compressed-tensors":
        raise WexpandError(
            f"{where}: quant_method {found.get('quant_method')!r}; of quantised models only "
            "compressed-tensors' W4A16 and W8A16 can be packed"
        )
    if found.get("kv_cache_scheme"):
        raise WexpandError(f"{where}: has a kv_cache_scheme, which would be lost")
    if transforms_inputs(found):
        raise WexpandError(f"{where}: {TRANSFORMED}")
    if not isinstance(found["config_groups"], dict):
        raise WexpandError(f"{where}.config_groups: should be an object")
    for name, group in found["config_groups"].items():
        if reason := _unlike_ours(group if isinstance(group, dict) else {}, found):
            raise WexpandError(f"{where}.config_groups.{name}: {reason}; cannot be packed exactly")
    names = [n.removesuffix(".weight_packed") for n in model.headers if n.endswith("_packed")]
    if not names:
        raise WexpandError(f"{model.path}: holds no weight_packed, though config.json says so")
    for name in names:
        for part in _PARTS:
            if f"{name}.{part}" not in model.headers:
                raise WexpandError(f"{name}.{part}: missing", f"{name}.{part}")
        for part in ("weight_zero_point", "weight_g_idx"):
            if f"{name}.{part}" in model.headers:
                raise WexpandError(
                    f"{name}.{part}: zero points and reordered columns cannot be packed exactly",
                    f"{name}.{part}",
                )
    return {f"{name}.{part}": name for name in names for part in _PARTS}


def _unlike_ours(group: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Why linears of this scheme cannot be packed; None if they can."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return f"weights {weights!r} should be an object"
    stored = group.get("format") or found.get("format")
    if stored != "pack-quantized":
        return f"format {stored!r} is not 'pack-quantized'"
    if group.get("input_activations") or group.get("output_activations"):
        return "activations are quantised, too"
    bits, kind = weights.get("num_bits"), weights.get("type")
    if kind != "int" or bits not in (4, 8):
        return f"weights of {bits} bits of type {kind!r} are not int4 or int8"
    if not weights.get("symmetric"):
        return "weights are asymmetric (they have zero points)"
    if weights.get("strategy") not in ("group", "channel"):
        return f"strategy {weights.get('strategy')!r} is not 'group' or 'channel'"
    if weights.get("actorder") in ("group", True):
        return "columns are reordered (actorder group)"
    return None


def quantised_pool(
    model: ModelDir, name: str, size: tuple[int, int]
) -> tuple[RowPool, torch.dtype]:
    """The pool of a quantised linear, full rows, and the dtype of the weights it stands for.

    :param size: of the linear, (out, in)
    :raises WexpandError: tensors that contradict each other, or a scale that float16 cannot hold
    """
    packed, scale, shape = (model.read(f"{name}.{part}") for part in _PARTS)
    found = shape.tolist() if shape.shape == (2,) else None
    if found != list(size):
        raise WexpandError(
            f"{name}.weight_shape: {shape.tolist()} should be {list(size)}, as the model has it",
            f"{name}.weight_shape",
        )
    out_features, in_features = size
    if packed.dim() != 2:
        packed = packed.reshape(1, -1)  # of no linear: refused next
    bits = next((b for b in (4, 8) if packed.shape[1] == -(-in_features * b // 32)), None)
    if bits is None or packed.dtype != torch.int32 or len(packed) != out_features:
        raise WexpandError(
            f"{name}.weight_packed: {packed.dtype} {list(packed.shape)} holds no "
            f"{[out_features, in_features]} of 4 or 8 bits",
            f"{name}.weight_packed",
        )
    groups = scale.shape[1] if scale.dim() == 2 else scale.numel() // out_features
    # a last group that is not full is in no model of compressed-tensors
    if scale.numel() != out_features * groups or not groups or in_features % groups:
        raise WexpandError(
            f"{name}.weight_scale: {list(scale.shape)} are not so many scales for each of "
            f"{out_features} rows that groups of their {in_features} columns are equally wide",
            f"{name}.weight_scale",
        )
    scale, half = scale.view(out_features, groups), scale.view(out_features, groups).half()
    how = codec(f"int{bits}", in_features // groups if groups > 1 else -(-in_features // 8) * 8)
    if not torch.equal(half.to(scale.dtype), scale):
        raise WexpandError(
            f"{name}.weight_scale: holds values of {scale.dtype} that float16 does not",
            f"{name}.weight_scale",
        )
    q = _unpack(packed, bits)[:, :in_features]
    values = how.pack(q, torch.ones_like(q, dtype=torch.bool))
    return RowPool(how, in_features, values, None, None, half), scale.dtype


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [out, words] -> int8 [out, words * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (packed.unsqueeze(2) >> shifts) & (2**bits - 1)
    return (fields - 2 ** (bits - 1)).flatten(1).to(torch.int8)
