"""Everything that can be wrong with a checkpoint of ours, listed: what `wexpand verify` finds.

A loader checks what it loads and raises the first problem. This reads every tensor of the model,
ours or not, compares it with its checksum, and goes on after a problem. Whether the tensors fit the
model class that config.json names is asked elsewhere (`hf.names.check_fit`).
"""

from collections.abc import Callable, Iterator

from safetensors import safe_open
from torch import Tensor

from ..errors import WexpandError
from .checks import check_linear
from .config import GroupEntry, digest_of
from .model_dir import CHECKSUMS, CONFIG, INDEX, ModelDir, checksum, read_json
from .rowpool import finite

__all__ = ["problems"]

# what says which expert a token gets, equal in all linears of an input group
ROUTER = ("router_weight", "router_bias", "cluster_expert")


def problems(
    model: ModelDir, progress: Callable[[str], None] = lambda tensor: None
) -> Iterator[WexpandError]:
    """Every problem of `model`, checksums included; one linear is in memory at a time.

    :param progress: called with each linear's or tensor's name before it is read
    """
    try:
        config, headers = model.config, model.headers
    except WexpandError as error:
        yield error
        return
    yield from _file_problems(model)
    sums: dict[str, str] = {}
    try:
        sums = _checksums(model)
    except WexpandError as error:
        yield error
    else:
        yield from _edited(model)
        for tensor in sorted(sums.keys() - headers.keys()):
            yield WexpandError(f"{tensor}: missing; {CHECKSUMS} has its checksum", tensor)
        for tensor in sorted(headers.keys() - sums.keys()):
            where = f"{headers[tensor].file}: {tensor}"
            yield WexpandError(f"{where}: unknown; {CHECKSUMS} has no checksum of it", tensor)
    for tensor, value in model.tensors(model.others()):
        progress(tensor)
        yield from _sum_problems(model, tensor, value, sums)
        yield from _tensor_problems(model, tensor, value)
    for group in config.groups:
        yield from _group_problems(model, group, sums, progress)


def _group_problems(
    model: ModelDir, group: GroupEntry, sums: dict[str, str], progress: Callable[[str], None]
) -> Iterator[WexpandError]:
    routers = set()
    for name, entry in group.linears.items():
        progress(name)
        tensors = model.kinds(name)
        for kind, value in tensors.items():
            yield from _sum_problems(model, f"{name}.{kind}", value, sums)
        try:
            with model.locating_errors():
                check_linear(name, entry, tensors)
        except WexpandError as error:
            yield error
        routers.add(tuple(checksum(tensors[kind]) for kind in ROUTER if kind in tensors))
    if len(routers) > 1:
        yield WexpandError(f"{', '.join(group.linears)}: one input group, but unequal routers")


def _tensor_problems(model: ModelDir, tensor: str, value: Tensor) -> Iterator[WexpandError]:
    """Problems of the content of a tensor that belongs to no linear of ours."""
    where = f"{model.headers[tensor].file}: {tensor}"
    if value.is_floating_point():
        if not finite(value):
            yield WexpandError(f"{where}: holds NaN or infinite values", tensor)
    elif tensor.endswith((".weight", ".bias")):
        # bytes have no type: of a damaged header their checksum knows nothing
        right = "float32, bfloat16 or float16"
        yield WexpandError(f"{where}: dtype {value.dtype} should be {right}", tensor)


def _sum_problems(
    model: ModelDir, tensor: str, value: Tensor, sums: dict[str, str]
) -> Iterator[WexpandError]:
    if tensor in sums and sums[tensor] != (found := checksum(value)):
        yield WexpandError(
            f"{model.headers[tensor].file}: {tensor}: damaged: its checksum is {found}, "
            f"{CHECKSUMS} has {sums[tensor]}",
            tensor,
        )


def _checksums(model: ModelDir) -> dict[str, str]:
    """Tensor -> checksum, from the file of them. WexpandError if it is not this model's."""
    path = model.path / CHECKSUMS
    values = read_json(path)
    if values.get("digest") != model.config.digest:
        raise WexpandError(f"{path}: belongs to another {CONFIG}: its digest is another one")
    tensors = values.get("tensors")
    if not isinstance(tensors, dict):
        raise WexpandError(f"{path}: tensors should be an object of checksums")
    return tensors


def _edited(model: ModelDir) -> Iterator[WexpandError]:
    """That config.json has other model settings than when it was written.

    Not refused by those who serve it: a context length may be edited on purpose.
    """
    written = read_json(model.path / CHECKSUMS).get("model_digest")
    if written != digest_of(model.config_json, "quantization_config"):
        yield WexpandError(
            f"{model.path / CONFIG}: was changed after it was written, outside quantization_config"
        )


def _file_problems(model: ModelDir) -> Iterator[WexpandError]:
    """Files that readers would miss, or not understand."""
    files = sorted({header.file for header in model.headers.values()})
    if (model.path / INDEX).exists():
        yield from _index_problems(model)
    else:
        for file in files:
            if file.name != "model.safetensors":
                yield WexpandError(f"{file}: is in no {INDEX}, so no reader finds it")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        if (metadata or {}).get("format") != "pt":
            yield WexpandError(f"{file}: its header says {metadata}, should say format: pt")


def _index_problems(model: ModelDir) -> Iterator[WexpandError]:
    """Readers find the files by the index: it has to be right."""
    index = model.path / INDEX
    try:
        values = read_json(index)
    except WexpandError as error:
        yield error
        return
    listed = values.get("weight_map")
    # transformers asks for both
    for key in ("weight_map", "metadata"):
        if not isinstance(values.get(key), dict):
            yield WexpandError(f"{index}: has no {key}")
    if not isinstance(listed, dict):
        return
    for tensor in sorted(listed.keys() | model.headers.keys()):
        right = model.headers[tensor].file.name if tensor in model.headers else None
        if listed.get(tensor) != right:
            yield WexpandError(
                f"{index}: {tensor}: listed in {listed.get(tensor)}, found in {right}", tensor
            )
