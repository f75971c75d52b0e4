"""Writing checkpoints, in bounded memory, into a directory that is not yet theirs (`directories`).

`atomic` writes one file whole or not at all. `TensorWriter` turns a stream of
tensors into the safetensors files of one model, and `seal` makes a directory that holds a model's
tensors and config.json a checkpoint of ours.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .checks import check_linear
from .config import CheckpointConfig, GroupEntry, digest_of
from .linear import StoredLinear
from .model_dir import CHECKSUMS, CONFIG, INDEX, ModelDir, checksum

__all__ = [
    "SHARD_BYTES",
    "TensorWriter",
    "atomic",
    "copy_others",
    "seal",
    "write_json",
]

SHARD_BYTES = 1 << 29
"""default size of one file; larger tensors have a file of their own"""

_WEIGHTS = tuple(
    ".safetensors .index.json .bin .pt .pth .ckpt .npz .gguf .h5 .msgpack .onnx .onnx_data".split()
)
# what runs when it is loaded: our own output holds none, whatever the source is
_CODE = (".py", ".pkl", ".pickle")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends without an error.

    Readers see the old file or the whole new one; on an error nothing is left.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")


class TensorWriter:
    """Writes tensors to model.safetensors, or to several files and their index.

    A file is written when the next tensor would make it larger than `limit` bytes.
    """

    def __init__(self, directory: Path, limit: int = SHARD_BYTES):
        self.directory, self.limit = directory, limit
        self.checksums: dict[str, str] = {}
        """of every tensor that was added"""
        self._pending: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._bytes = 0
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` into the current file, or write that and begin the next."""
        if self._pending and self._bytes + tensor.nbytes > self.limit:
            self._flush()
        self._pending[name] = tensor = tensor.contiguous()
        self.checksums[name] = checksum(tensor)
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def add_linear(self, name: str, linear: StoredLinear) -> None:
        """Add the tensors of a linear of ours, under the names that a checkpoint gives them."""
        for kind, tensor in linear.tensors().items():
            self.add(f"{name}.{kind}", tensor)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        file = self.directory / f"shard-{len(self._written)}.safetensors"
        save_file(self._pending, file, metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and give the files their names."""
        if self._pending:
            self._flush()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = "model.safetensors"
            if count > 1:
                file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"shard-{number}.safetensors").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.directory / INDEX, index)


def seal(
    directory: str | Path,
    groups: Sequence[GroupEntry],
    made_by: Mapping[str, Any],
    *,
    checksums: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> CheckpointConfig:
    """Make a directory that holds a model's tensors and its config.json a checkpoint of ours.

    :param checksums: of all tensors, from the `TensorWriter` that wrote and thereby knows them; if
        none are given every tensor is read once, and those of our linears are checked
    :param quiet: no progress bar
    """
    directory = Path(directory)
    config = CheckpointConfig(groups=list(groups), made_by=dict(made_by)).seal()
    model = ModelDir(directory, directory.glob("*.safetensors"), config)
    values = {k: v for k, v in model.config_json.items() if k != "sparsity_config"}
    if checksums is None:
        checksums = _read_all(model, quiet)
    values["quantization_config"] = config.model_dump(mode="json")
    sums = {
        "digest": config.digest,
        "model_digest": digest_of(values, "quantization_config"),
        "tensors": dict(sorted(checksums.items())),
    }
    write_json(directory / CHECKSUMS, sums)
    write_json(directory / CONFIG, values)
    return config


def _read_all(model: ModelDir, quiet: bool) -> dict[str, str]:
    found, others, linears = {}, model.others(), model.config.linears
    with tqdm(total=len(linears) + len(others), unit="", disable=quiet, desc="checksums") as bar:
        for tensor, value in model.tensors(others):
            found[tensor] = checksum(value)
            bar.update()
        for name, entry in linears.items():
            tensors = model.kinds(name)
            with model.locating_errors():
                check_linear(name, entry, tensors)
            found |= {f"{name}.{kind}": checksum(value) for kind, value in tensors.items()}
            bar.update()
    return found


def copy_others(source: Path, target: Path, *, but: Collection[str] = ()) -> list[str]:
    """Copy tokenizer and all other files but weights, code and what a writer of ours makes itself.

    Files that `target` has already stay as they are.

    :param but: further files to leave, by their paths inside `source`

    :return: the files of code, pickles among them, that were left out
    """
    left_out = []
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not file.is_file() or file.name.endswith(_WEIGHTS):
            continue
        if file.name.endswith(_CODE):
            left_out.append(str(inside))
            continue
        if str(inside) in (CONFIG, CHECKSUMS, *but) or (target / inside).exists():
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)
    return left_out
