"""What earlier tools left in the config.json of a dense model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WexpandError
from ..format.config import QUANT_METHOD

__all__ = ["TRANSFORMED", "drop_leftovers", "transforms_inputs"]

TRANSFORMED = "its transform_config transforms inputs while serving, which would be lost"


def drop_leftovers(values: dict[str, Any], source: Path) -> list[str]:
    """Remove what earlier tools left in config.json; refuse if it says how to read the weights."""
    notes = []
    nested = values.get("text_config")
    for where in (values, *([nested] if isinstance(nested, dict) else [])):
        for key in ("quantization_config", "compression_config", "sparsity_config"):
            if key not in where:
                continue
            found = where.pop(key)
            reason = _needed(found, key) if isinstance(found, Mapping) else None
            if reason:
                raise WexpandError(f"{source}: config.json: {key}: {reason}")
            notes.append(f"dropped {key} from config.json: {json.dumps(found)[:120]}")
    return notes


def transforms_inputs(found: Mapping[str, Any]) -> bool:
    """Whether a config of compressed-tensors says that inputs are transformed, too (rotations of
    SpinQuant and QuIP, say): its weights alone are another model. Those that weights have taken up
    need nothing."""
    nested = found.get("quantization_config")
    if isinstance(nested, Mapping) and transforms_inputs(nested):
        return True
    config = found.get("transform_config")
    groups = config.get("config_groups", config) if isinstance(config, Mapping) else config
    try:
        places = [place["location"] for one in (groups or {}).values() for place in one["apply"]]
    except (AttributeError, KeyError, TypeError):
        return True  # who knows
    return bool({*places} - {"weight_input", "weight_output"})


def _needed(found: Mapping[str, Any], key: str) -> str | None:
    """Why a config left by another tool cannot be dropped, or None if the weights are plain."""
    method = found.get("quant_method")
    if method == QUANT_METHOD:
        return "this model is packed or expanded already"
    if method not in (None, "compressed-tensors", "sparseml"):
        return f"the model is quantised ({method}); only float weights can be packed"
    for part in ("config_groups", "kv_cache_scheme"):
        if found.get(part):
            return f"the model is quantised ({method or 'compressed-tensors'}, {part} is not empty)"
    if transforms_inputs(found):
        return TRANSFORMED
    sparsity = found if key == "sparsity_config" else found.get("sparsity_config")
    stored = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if stored not in (None, "dense"):
        return (
            f"its weights are stored in the sparse format {stored!r}; save the model dense (with "
            "the compressed-tensors release that wrote it) and pack that"
        )
    return None
