"""What config.json records of a run: enough to repeat it."""

import zlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from compressed_tensors.offload import disable_onloading
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

from .. import __version__
from ..format.model_dir import checksum

__all__ = ["after_others", "crc_of_weights", "made_by", "whole_recipe"]

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


def after_others(model: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """`about`, and what modifiers of ours that came before in the recipe recorded of `model`: under
    "before", but for what is said linear by linear and block by block, which is joined."""
    before = getattr(model, "_wexpand_made_by", None)
    if before is None:
        return dict(about)
    own = {key: value for key, value in before.items() if key != "before"}
    found = dict(about) | {"before": [*before.get("before", []), own]}
    for key in ("predicted_loss", "tuned"):
        if joined := before.get(key, {}) | found.get(key, {}):
            found[key] = joined
    return found


def whole_recipe() -> list[dict[str, Any]]:
    """All modifiers of the recipe that runs, with their keys, in words where JSON has none."""
    return [
        {
            type(modifier).__name__: modifier.model_dump(
                mode="json", fallback=str,
                exclude={name for name in type(modifier).model_fields if name.endswith("_")},
            )  # fmt: skip
        }
        for modifier in active_session().lifecycle.recipe.modifiers
    ]


def crc_of_weights(model: Any) -> str:
    """What tells a model's weights from others, in the dtypes that they are computed with."""
    found = 0
    with disable_onloading():  # on a GPU every weight would be copied there
        for name, weight in model.named_parameters():
            if not weight.is_meta:
                about = f"{name} {weight.dtype} {list(weight.shape)} {checksum(weight)}"
                found = zlib.crc32(about.encode(), found)
    return f"{found:08x}"
