"""The checkpoint: a Hugging Face model directory whose expanded linears are row pools.

Per expanded linear NAME the safetensors files hold, instead of a dense NAME.weight [out, in],

    NAME.weight         model dtype [nnz]               kept values, row version after row version
    NAME.weight_mask    uint8 [versions, ceil(in/8)]    which columns each row version keeps
    NAME.row_map        int32 [experts, out]            the row version of each (expert, neuron)
    NAME.router_weight  float16 [experts, in]           only with more than one expert; equal for
    NAME.router_bias    float32 [experts]               all linears of an input group; a map that
                                                        float16 cannot hold exactly is float32
    NAME.bias           as it was

and config.json holds a `quantization_config` (`WexpandConfig`) that gives every size before a
tensor is read, a checksum (crc32) of every tensor of the model, and a digest of itself. Nothing in
it names code. `check_linear` is the one check that every reader makes: transformers, vLLM, and
`wexpand verify`.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import WexpandError
from .config import (
    FORMAT_VERSION,
    QUANT_METHOD,
    LinearEntry,
    WexpandConfig,
    model_digest,
    parse_config,
    read_config,
    read_json,
    write_json,
)
from .router import Router
from .rowpool import RowPool, finite

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "QUANT_METHOD",
    "LinearEntry",
    "WexpandConfig",
    "check_linear",
    "checksum",
    "finalize",
    "model_digest",
    "other_problems",
    "other_tensors",
    "parse_config",
    "problems",
    "read_config",
    "read_json",
    "read_linear",
    "tensor_files",
    "tensor_names",
    "tensors_of",
    "weight_files",
    "write_json",
]

T = TypeVar("T")
INDEX = "model.safetensors.index.json"


def tensor_names(name: str, entry: LinearEntry) -> list[str]:
    """The checkpoint's tensors of linear `name`."""
    return [f"{name}.{kind}" for kind in entry.shapes()]


def tensor_files(source: str | Path | Iterable[str | Path]) -> dict[str, Path]:
    """Tensor -> safetensors file, from the files' headers.

    :param source: a model directory, all of whose safetensors files count, or the files themselves
    """
    from safetensors import SafetensorError, safe_open

    if isinstance(source, str | Path):
        files = sorted(Path(source).glob("*.safetensors"))
        if not files:
            raise WexpandError(f"{source}: holds no .safetensors file")
    else:
        files = sorted(Path(file) for file in source)
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise WexpandError(f"{file}: not a complete safetensors file ({error})") from None
        for name in names:
            if name in found:
                raise WexpandError(f"{file}: holds {name}, which {found[name].name} holds too")
            found[name] = file
    return found


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that transformers would read from any model directory.

    They are not always all: some models on the hub carry a second copy in another layout.
    """
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / INDEX
    if single.exists():
        return [single]
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in names.values()
        ):
            raise WexpandError(f"{index}: weight_map should give each tensor the name of its file")
        return sorted({directory / name for name in names.values()})
    return sorted(directory.glob("*.safetensors"))


def tensors_of(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each entry of `tensor_files`, one tensor in memory at a time."""
    from safetensors import safe_open

    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, f in files.items() if f == file):
                yield name, tensors.get_tensor(name)


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, as 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}"


def check_linear(
    name: str,
    entry: LinearEntry,
    tensors: Mapping[str, Tensor],
    checksums: Mapping[str, str] | None = None,
    where: Callable[[str], str] = lambda tensor: tensor,
) -> tuple[RowPool, Router | None]:
    """Check every tensor of linear `name` and return its pool and router.

    :param entry: the sizes that config.json promises
    :param tensors: kind -> tensor ("weight", "weight_mask", ...), as read, before any cast
    :param checksums: `WexpandConfig.checksums`; None skips them (tensors that never were on disk)
    :param where: full tensor name -> how an error names it, usually with its file
    :raises WexpandError: naming the tensor, what was found and what would be right
    """
    for kind, (shape, dtypes) in entry.shapes().items():
        label = where(f"{name}.{kind}")
        tensor = tensors.get(kind)
        if tensor is None:
            raise WexpandError(f"{label}: missing; config.json promises {list(shape)}")
        if tuple(tensor.shape) != shape:
            raise WexpandError(
                f"{label}: shape {list(tensor.shape)} should be {list(shape)} by config.json"
            )
        if tensor.dtype not in dtypes:
            right = " or ".join(str(dtype) for dtype in dtypes)
            raise WexpandError(f"{label}: dtype {tensor.dtype} should be {right}")
        if checksums is not None and checksums.get(f"{name}.{kind}") != (found := checksum(tensor)):
            raise WexpandError(
                f"{label}: damaged: its checksum is {found}, config.json has "
                f"{checksums.get(f'{name}.{kind}')}"
            )
    pool = RowPool(tensors["weight"], tensors["weight_mask"], tensors["row_map"], entry.in_features)
    pool.validate(where(name))
    for kind in ("router_weight", "router_bias", "bias"):
        if kind in entry.shapes() and not finite(tensors[kind]):
            raise WexpandError(f"{where(f'{name}.{kind}')}: holds NaN or infinite values")
    router = None
    if entry.experts > 1:
        router = Router(tensors["router_weight"], tensors["router_bias"])
    return pool, router


def read_linear(
    files: Mapping[str, Path], name: str, config: WexpandConfig
) -> tuple[RowPool, Router | None, Tensor | None]:
    """Read and check linear `name`: pool, router and bias (None where it has none)."""
    entry = config.linears[name]
    tensors = _linear_tensors(files, name, entry)
    pool, router = check_linear(name, entry, tensors, config.checksums, _where(files))
    return pool, router, tensors.get("bias")


def _linear_tensors(files: Mapping[str, Path], name: str, entry: LinearEntry) -> dict[str, Tensor]:
    """Kind -> tensor of linear `name`, those that there are."""
    found = {t: files[t] for t in tensor_names(name, entry) if t in files}
    return {tensor.removeprefix(f"{name}."): value for tensor, value in tensors_of(found)}


def _where(files: Mapping[str, Path]) -> Callable[[str], str]:
    return lambda tensor: f"{files[tensor]}: {tensor}" if tensor in files else tensor


def problems(
    files: Mapping[str, Path],
    config: WexpandConfig,
    progress: Callable[[str], None] = lambda tensor: None,
) -> Iterator[WexpandError]:
    """Every problem of a checkpoint's tensors, as the errors that a loader would raise.

    A loader raises the first and stops; `wexpand verify` lists them all. One linear or tensor is in
    memory at a time.

    :param files: `tensor_files` of the checkpoint
    :param progress: called with each linear's or tensor's name before it is read
    """
    yield from other_problems(files, config, progress)
    for name in config.linears:
        progress(name)
        try:
            read_linear(files, name, config)
        except WexpandError as error:
            yield error


def other_problems(
    files: Mapping[str, Path],
    config: WexpandConfig,
    progress: Callable[[str], None] = lambda tensor: None,
) -> Iterator[WexpandError]:
    """`problems` of the tensors that belong to no expanded linear: embeddings, norms, the output
    head, dense linears. Reads no other.
    """
    others = other_tensors(files, config)
    for tensor in sorted(other_tensors(config.checksums, config).keys() - files.keys()):
        yield WexpandError(f"{tensor}: missing; config.json has its checksum")
    for tensor in sorted(others.keys() - config.checksums.keys()):
        yield WexpandError(f"{files[tensor]}: {tensor}: unknown; config.json has no checksum of it")
    for tensor, value in tensors_of({t: f for t, f in others.items() if t in config.checksums}):
        progress(tensor)
        where = f"{files[tensor]}: {tensor}"
        if (found := checksum(value)) != config.checksums[tensor]:
            yield WexpandError(
                f"{where}: damaged: its checksum is {found}, config.json has "
                f"{config.checksums[tensor]}"
            )
        elif not value.is_floating_point():
            # bytes have no type: of a damaged header their checksum knows nothing
            if tensor.endswith((".weight", ".bias")):
                yield WexpandError(
                    f"{where}: dtype {value.dtype} should be float32, bfloat16 or float16"
                )
        elif not finite(value):
            yield WexpandError(f"{where}: holds NaN or infinite values")


def other_tensors(tensors: Mapping[str, T], config: WexpandConfig) -> dict[str, T]:
    """The entries of `tensors`, by name, that belong to no expanded linear."""
    ours = {t for name, entry in config.linears.items() for t in tensor_names(name, entry)}
    return {tensor: value for tensor, value in tensors.items() if tensor not in ours}


def finalize(
    directory: str | Path,
    linears: Mapping[str, LinearEntry],
    made_by: Mapping[str, Any],
    *,
    quiet: bool = True,
) -> WexpandConfig:
    """Turn a directory that `save_pretrained` has filled into a checkpoint of ours.

    Reads every tensor once, for its checksum and to check the linears, and puts the sealed config
    into config.json.

    :param quiet: no progress bar
    """
    directory = Path(directory)
    files = tensor_files(directory)
    config = WexpandConfig(linears=dict(linears), made_by=dict(made_by))
    others = other_tensors(files, config)
    checksums = {}
    with tqdm(total=len(linears) + len(others), unit="", disable=quiet, desc="checksums") as bar:
        for tensor, value in tensors_of(others):
            checksums[tensor] = checksum(value)
            bar.update()
        for name, entry in linears.items():
            tensors = _linear_tensors(files, name, entry)
            check_linear(name, entry, tensors, where=_where(files))
            checksums |= {f"{name}.{kind}": checksum(value) for kind, value in tensors.items()}
            bar.update()
    values = read_json(directory / "config.json")
    values.pop("sparsity_config", None)
    sums = dict(sorted(checksums.items()))
    config = config.model_copy(
        update={"checksums": sums, "model_digest": model_digest(values)}
    ).seal()
    values["quantization_config"] = config.model_dump(mode="json")
    write_json(directory / "config.json", values)
    return config
