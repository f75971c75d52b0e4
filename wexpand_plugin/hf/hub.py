"""Model directories by the name that users give: a path, or an id on the Hugging Face hub."""

from pathlib import Path

from ..errors import WexpandError, reason
from ..format.model_dir import CONFIG

__all__ = ["resolve"]

# safetensors is the only format of weights that is read
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"]


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """A local model directory: `model` itself, or the download of this id from the hub.

    :param weights: whether the download needs the model's weights
    :raises WexpandError: neither a model directory nor the id of a model that the hub gives
    """
    path = Path(model)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise WexpandError(f"{model}: holds no {CONFIG}, so it is not a model directory")
        return path
    if path.exists():
        raise WexpandError(f"{model}: is a file; a model is a directory or an id on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    unwanted = _OTHER_WEIGHTS if weights else ["*.safetensors", *_OTHER_WEIGHTS]
    try:
        return Path(snapshot_download(str(model), ignore_patterns=unwanted))
    except HFValidationError:
        raise WexpandError(f"{model}: is neither a directory nor the id of a model") from None
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise WexpandError(
            f"{model}: no such directory, and not found on the hub: {reason(error)}"
        ) from None
