"""Every check that any reader of a checkpoint makes, all at once: `wexpand verify`.

Readers stop at the first problem; this lists them all. The checks themselves are those of
`checkpoint` and `hf`, so what verifies, loads.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from . import checkpoint
from .checkpoint import WexpandConfig
from .errors import WexpandError

__all__ = ["verify"]


def verify(directory: str | Path, *, quiet: bool = True) -> list[str]:
    """Every problem of a checkpoint, one sentence each; empty for a sound one.

    Config and its digest, index, every tensor's presence, shape, dtype, checksum and content, and
    (with transformers installed) the fit with the model class that config.json names.
    """
    return [str(problem) for problem in _problems(Path(directory), quiet)]


def _problems(directory: Path, quiet: bool) -> Iterator[WexpandError]:
    try:
        config = checkpoint.read_config(directory)
        files = checkpoint.tensor_files(directory)
    except WexpandError as error:
        yield error
        return
    values = checkpoint.read_json(directory / "config.json")
    if config.model_digest != (found := checkpoint.model_digest(values)):
        yield WexpandError(
            f"{directory / 'config.json'}: was changed after it was written, outside "
            f"quantization_config (its digest was {config.model_digest[:12]}..., now it is "
            f"{found[:12]}...)"
        )
    yield from _index_problems(directory, files)
    yield from _header_problems(files)
    ours = sum(len(checkpoint.tensor_names(n, entry)) for n, entry in config.linears.items())
    count = len(config.linears) + max(len(files) - ours, 0)
    with tqdm(total=count, unit="", disable=quiet, desc="verify") as bar:
        yield from checkpoint.problems(files, config, lambda name: bar.update())
    if find_spec("transformers"):
        try:
            _check_fit(directory, files, config)
        except WexpandError as error:
            yield error


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


def _check_fit(directory: Path, files: dict[str, Path], config: WexpandConfig) -> None:
    from .hf import check_tensors, install_linears, skeleton

    model = skeleton(directory)
    install_linears(model, config.linears)
    check_tensors(model, files)
