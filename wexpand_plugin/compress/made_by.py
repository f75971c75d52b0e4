"""What config.json records of a run: enough to repeat it."""

import zlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from llmcompressor.modifiers import Modifier

from .. import __version__
from ..format.model_dir import checksum

__all__ = ["crc_of_weights", "made_by"]

LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "scikit-learn")


def made_by(
    modifier: Modifier, model: Any, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every key of `modifier`, the versions at work, the model and what is known of the data.

    :param data: as of `CalibrationBatches.about`
    """
    found = {
        "modifier": type(modifier).__name__,
        **modifier.model_dump(mode="json", exclude=set(Modifier.model_fields)),
        "model": str(getattr(model, "name_or_path", "")),
    }
    if data and data["batches"]:
        found["data"] = dict(data)
    libraries = {name: version(name) for name in LIBRARIES}
    return found | {"versions": {"wexpand": __version__} | libraries}


def crc_of_weights(model: Any) -> str:
    """What tells a model's weights from others, in the dtypes that they are computed with."""
    found = 0
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            about = f"{name} {weight.dtype} {list(weight.shape)} {checksum(weight)}"
            found = zlib.crc32(about.encode(), found)
    return f"{found:08x}"
