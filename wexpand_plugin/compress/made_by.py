"""What config.json records of a run: enough to repeat it."""

from importlib.metadata import version
from typing import Any

from llmcompressor.modifiers import Modifier

from .. import __version__
from .calibration import CalibrationBatches

__all__ = ["made_by"]


def made_by(
    modifier: Modifier, model: Any, batches: CalibrationBatches | None = None
) -> dict[str, Any]:
    """Every key of `modifier`, the versions at work, the model and what is known of the data."""
    found = {
        "modifier": type(modifier).__name__,
        **modifier.model_dump(mode="json", exclude=set(Modifier.model_fields)),
        "model": str(getattr(model, "name_or_path", "")),
    }
    if batches is not None and batches.counts:
        found["data"] = batches.about()
    libraries = {name: version(name) for name in ("llmcompressor", "transformers", "torch")}
    return found | {"versions": {"wexpand": __version__} | libraries}
