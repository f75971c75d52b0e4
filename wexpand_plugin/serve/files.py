"""The checkpoint's files, checked once before vLLM loads them.

The layers of `linear.py` check the tensors of expanded linears as they arrive. All other tensors
(embeddings, norms, the output head, dense linears) vLLM loads without us, and it would serve
them damaged. So when the first layer of a model asks for its method, before any weight is loaded,
the directory that vLLM is about to read is checked here as `wexpand verify` does: index, headers,
and checksum and content of these other tensors. That way each of them is read twice, the second
time from the page cache; no tensor of an expanded linear is read here.

Of several workers only the first of each engine and of each machine reads. Settings in config.json
that were changed after it was written are logged, and refused only where the tensors do not fit
them: to change some is no damage.
"""

import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import WexpandConfig
from ..tools import verify as verification
from . import logger

__all__ = ["check_directory", "check_engine", "file_of", "local_directory"]

# vLLM's load formats that read *.safetensors of the model's directory, as they are
_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
_checked: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def check_engine(config: WexpandConfig) -> None:
    """Check the files of the model with this config that the current engine loads, once.

    Does nothing outside of an engine. Where the files cannot be known, that is logged and the
    engine goes on.

    :raises WexpandError: the first problem, naming its tensor and file
    """
    from vllm.config import get_current_vllm_config_or_none

    engine = get_current_vllm_config_or_none()
    if engine is None or engine.model_config is None:
        return
    ours = [pair for pair in _models(engine) if _is_of(pair[0], config)]
    new = [
        (model, load)
        for model, load in ours or [(engine.model_config, None)]
        if _checked.get(id(model)) is not model
    ]
    if new and _reads():
        # a draft that is part of the model's own checkpoint has its directory
        for directory in {found for pair in new if (found := _directory_or_warning(*pair))}:
            # not on the device that vLLM makes its layers on, at this moment the default
            with torch.device("cpu"):
                check_directory(directory, config)
    _checked.update({id(model): model for model, _ in new})


def file_of(tensor: str, config: WexpandConfig) -> Path | None:
    """Where the current engine reads a tensor from: for the errors of its loading.

    The directory for a tensor that is in no file; None where the files are not known.
    """
    from vllm.config import get_current_vllm_config_or_none

    try:
        engine: Any = get_current_vllm_config_or_none()
        pair = next(pair for pair in _models(engine) if _is_of(pair[0], config))
        directory = local_directory(*pair)
        return checkpoint.tensor_files(directory).get(tensor, directory)
    except Exception:  # there is an error to report already, with or without its file
        return None


def _directory_or_warning(model: Any, load: Any) -> Path | None:
    try:
        return local_directory(model, load)
    except Exception as error:  # of the hub, the network, or a vLLM with another interface
        logger.warning(
            "wexpand: %s: only the tensors of expanded linears are checked, not all others: %s",
            model.model,
            " ".join(str(error).split())[:300] or type(error).__name__,
        )
        return None


def _models(engine: Any) -> Iterator[tuple[Any, Any]]:
    """(model config, load config) of each model that an engine may run."""
    yield engine.model_config, engine.load_config
    speculative = getattr(engine, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None:
        yield draft, getattr(speculative, "draft_load_config", None) or engine.load_config


def _is_of(model: Any, config: WexpandConfig) -> bool:
    """Whether vLLM's `model` is the one that `config` describes."""
    hf_config = getattr(model, "hf_config", None)
    for part in (hf_config, getattr(hf_config, "text_config", None)):
        values = getattr(part, "quantization_config", None)
        if isinstance(values, dict) and values.get("digest") == config.digest:
            return True
    return False


def _reads() -> bool:
    """Whether this worker is the one that reads: the engine's or the machine's first."""
    from vllm.distributed import parallel_state

    return parallel_state.get_world_group().local_rank == 0 or (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pp_group().rank_in_group == 0
    )


def local_directory(model: Any, load: Any) -> Path:
    """Where the files are that vLLM will load; a model of the hub is downloaded, as vLLM would.

    :param model: vLLM's ModelConfig
    :param load: vLLM's LoadConfig, or None if the model's quantization config came from elsewhere
    :raises Exception: of any kind, for a model that is not loaded from local files
    """
    if load is None:
        raise WexpandError("its config.json does not have the quantization_config that is used")
    if load.load_format not in _FORMATS:
        raise WexpandError(f"load format {load.load_format} reads other files than the model's")
    source = getattr(model, "model_weights", None) or model.model
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from vllm.model_executor.model_loader import get_model_loader

    get_model_loader(load).download_model(model)
    return Path(
        snapshot_download(
            source, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
        )
    )


def check_directory(directory: Path, config: WexpandConfig) -> None:
    """Raise the first problem that is not the expanded linears' own.

    :param config: as vLLM has it, from the config.json of `directory`
    """
    began = time.monotonic()
    files = checkpoint.tensor_files(directory)
    for problem in verification.file_problems(directory, files):
        raise problem
    for problem in checkpoint.other_problems(files, config):
        raise problem
    _check_edited(directory, files, config)
    seconds = time.monotonic() - began
    if seconds > 1:
        others = checkpoint.other_tensors(files, config)
        logger.info(
            "wexpand: checked the %d tensors outside of expanded linears in %.1f s",
            len(others), seconds,
        )  # fmt: skip


def _check_edited(directory: Path, files: dict[str, Path], config: WexpandConfig) -> None:
    """Log that config.json was changed; raise if the tensors do not fit it any more.

    vLLM would leave the parameters of a layer that is only in config.json as they are: random.
    """
    if not (directory / "config.json").is_file():
        return  # vLLM was told to read another one
    edited = verification.edited(directory, config)
    if edited is None:
        return
    logger.warning("wexpand: %s", edited)
    from ..hf.names import skeleton

    try:
        model = skeleton(directory)
    except WexpandError as error:
        logger.warning("wexpand: whether its tensors fit was not checked: %s", error)
        return
    verification.check_fit(model, files, config)
