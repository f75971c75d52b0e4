"""Every check that any reader of a checkpoint makes, all at once: `wexpand verify`.

Readers stop at the first problem; this lists them all. The checks themselves are those of
`checkpoint` and `hf`, so what verifies, loads. vLLM's half takes its checks of whole directories
from here (`serve/files.py`).
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import WexpandConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_fit", "edited", "file_problems", "verify"]


def verify(directory: str | Path, *, quiet: bool = True) -> list[str]:
    """Every problem of a checkpoint, one sentence each; empty for a sound one.

    Config and its digest, index, every tensor's presence, shape, dtype, checksum and content, and
    the fit with the model class that config.json names. Where transformers is not installed, that
    last check is skipped, and a warning is logged.
    """
    return [str(problem) for problem in _problems(Path(directory), quiet)]


def _problems(directory: Path, quiet: bool) -> Iterator[WexpandError]:
    try:
        config = checkpoint.read_config(directory)
        files = checkpoint.tensor_files(directory)
    except WexpandError as error:
        yield error
        return
    if problem := edited(directory, config):
        yield problem
    yield from file_problems(directory, files)
    count = len(config.linears) + len(checkpoint.other_tensors(files, config))
    with tqdm(total=count, unit="", disable=quiet, desc="verify") as bar:
        yield from checkpoint.problems(files, config, lambda name: bar.update())
    if not find_spec("transformers"):
        logging.getLogger(__name__).warning(
            "%s: not checked: whether it fits its model class, as transformers is not installed",
            directory,
        )
        return
    from ..hf.names import skeleton

    try:
        check_fit(skeleton(directory), files, config)
    except WexpandError as error:
        yield error


def edited(directory: Path, config: WexpandConfig) -> WexpandError | None:
    """The problem that config.json has other model settings than when it was written, if so.

    Not an error for those who serve it: a context length may be edited on purpose.
    """
    found = checkpoint.model_digest(checkpoint.read_json(directory / "config.json"))
    if config.model_digest == found:
        return None
    return WexpandError(
        f"{directory / 'config.json'}: was changed after it was written, outside "
        f"quantization_config (its digest was {config.model_digest[:12]}..., now it is "
        f"{found[:12]}...)"
    )


def file_problems(directory: Path, files: dict[str, Path]) -> Iterator[WexpandError]:
    """Problems of index and headers: files that readers would miss, or not understand.

    :param files: `checkpoint.tensor_files` of `directory`
    """
    yield from _index_problems(directory, files)
    yield from _header_problems(files)


def _index_problems(directory: Path, files: dict[str, Path]) -> Iterator[WexpandError]:
    """Readers find the files by model.safetensors, or by the index: it has to be right."""
    index = directory / checkpoint.INDEX
    if not index.exists():
        for file in sorted({f.name for f in files.values()} - {"model.safetensors"}):
            yield WexpandError(f"{directory / file}: is in no {index.name}, so no reader finds it")
        return
    try:
        listed = checkpoint.read_json(index).get("weight_map")
    except WexpandError as error:
        yield error
        return
    if not isinstance(listed, dict):
        yield WexpandError(f"{index}: has no weight_map")
        return
    for tensor in sorted(listed.keys() | files.keys()):
        right = files[tensor].name if tensor in files else None
        if listed.get(tensor) != right:
            yield WexpandError(
                f"{index}: {tensor}: listed in {listed.get(tensor)}, found in {right}"
            )


def _header_problems(files: dict[str, Path]) -> Iterator[WexpandError]:
    """transformers reads files that say they hold PyTorch's tensors."""
    from safetensors import safe_open

    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
        if (metadata or {}).get("format") != "pt":
            yield WexpandError(f"{file}: its header says {metadata}, should say format: pt")


def check_fit(model: "PreTrainedModel", files: dict[str, Path], config: WexpandConfig) -> None:
    """Raise WexpandError unless `model`, a `hf.skeleton`, has exactly the checkpoint's tensors."""
    from ..hf.names import check_tensors, install_linears

    install_linears(model, config.linears)
    check_tensors(model, files)
