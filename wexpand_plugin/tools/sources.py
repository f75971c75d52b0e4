"""A dense model as input: where it is, and what earlier tools left in its config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WexpandError
from ..format.config import QUANT_METHOD

__all__ = ["drop_leftovers", "resolve"]

def resolve(model: str | Path) -> Path:
    """A local model directory: `model` itself, or the download of this id from the hub."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise WexpandError(f"{model}: is a file; a model is a directory or an id on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                str(model), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.onnx*"]
            )
        )
    except HFValidationError:
        raise WexpandError(f"{model}: is neither a directory nor the id of a model") from None
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WexpandError(
            f"{model}: no such directory, and not found on the hub: {reason}"
        ) from None


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
    sparsity = found if key == "sparsity_config" else found.get("sparsity_config")
    stored = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if stored not in (None, "dense"):
        return (
            f"its weights are stored in the sparse format {stored!r}; save the model dense (with "
            "the compressed-tensors release that wrote it) and pack that"
        )
    return None
