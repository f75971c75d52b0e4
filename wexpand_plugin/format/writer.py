"""Writing many tensors as the safetensors files of one model, in bounded memory."""

from pathlib import Path

from torch import Tensor

from . import checkpoint

__all__ = ["SHARD_BYTES", "Shards"]

SHARD_BYTES = 1 << 29
"""default size of one file; larger tensors have a file of their own"""


class Shards:
    """Writes tensors to model.safetensors, or to several files and their index.

    A file is written when the next tensor would make it larger than `limit` bytes.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit
        self._pending: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._bytes = 0
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` into the current file, or write that and begin the next."""
        if self._pending and self._bytes + tensor.nbytes > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes

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
            file = (
                f"model-{number + 1:05d}-of-{count:05d}.safetensors"
                if count > 1
                else "model.safetensors"
            )
            (self.directory / f"shard-{number}.safetensors").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            checkpoint.write_json(self.directory / checkpoint.INDEX, index)
