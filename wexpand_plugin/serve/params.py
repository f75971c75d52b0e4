"""The tensors of one layer, from their arrival in any order until they are checked.

vLLM hands the tensors of a fused layer over one by one as they stand in the files, each with a
shard id: "q", "k", "v", an index, several indices, or None where the file holds the fused tensor. A
dense weight goes straight to its place in the layer's parameter. Ours have no place before all are
there, as where a row begins depends on the rows before it: a `RowPoolParameter` keeps what arrives,
and `loaded_linears` puts it together.

That is also why the parameter brings its own `weight_loader`. vLLM's `weight_loader_v2`, which
calls the `load_..._weight` methods of a `BasevLLMParameter`, cuts a tensor that is fused on disk
along its rows before it asks, and `ReplicatedLinear` has none.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from ..errors import WexpandError
from ..format.checks import check_linear
from ..format.config import CheckpointConfig, LinearEntry
from ..format.linear import StoredLinear
from ..format.rowpool import RowPool
from ..format.values import FLOATS

__all__ = ["LoadedLinear", "RowPoolParameter", "loaded_linears"]


class RowPoolParameter(BasevLLMParameter):
    """A layer's tensors of one kind ("weight", "weight_mask", ...), by shard id, as they arrive.

    Its own data is empty: it is the name that vLLM's loader looks for.

    :param label: vLLM's name of the layer and the kind
    """

    def __init__(self, data: Tensor, label: str):
        super().__init__(data=data, weight_loader=self.load)
        self.label = label
        self.loaded: dict[Any, Tensor] = {}
        self.taken = False

    def load(self, param: Tensor, loaded_weight: Tensor, shard_id: Hashable = None) -> None:
        """The `weight_loader`: keep `loaded_weight`, which is this parameter's or `param`'s."""
        if self.taken:
            raise WexpandError(
                f"{self.label}: a running engine cannot load expanded weights again; start a new "
                "one"
            )
        self.loaded[shard_id] = loaded_weight

    def take(self) -> dict[Any, Tensor]:
        """Shard id -> tensor, once."""
        loaded = dict(self.loaded)
        # emptied, as vLLM keeps copies of its parameters' attributes
        self.loaded.clear()
        self.taken = True
        return loaded

    @property
    def output_dim(self) -> int:
        """None: what asks for it wants to cut or to rearrange the rows of a dense matrix."""
        raise WexpandError(
            f"{self.label}: this vLLM rearranges the rows of it while it loads the model, which "
            "packed rows do not survive; compress the model with it under `ignore`"
        )

    def position(self, shard_id: Any) -> int:
        """Where the tensor of a shard id begins in the layer, counted in shards."""
        if shard_id is None:
            return 0
        return self._shard_id_as_int(shard_id[0] if isinstance(shard_id, tuple) else shard_id)


class LoadedLinear(NamedTuple):
    """One linear of a (fused) layer, checked."""

    name: str
    """in the checkpoint"""
    shard_id: Any
    """what vLLM calls it within the layer"""
    stored: StoredLinear


def loaded_linears(
    prefix: str,
    names: Sequence[str],
    shards: int,
    parameters: Mapping[str, RowPoolParameter],
    config: CheckpointConfig,
) -> list[LoadedLinear]:
    """A layer's linears in the order of its rows; the parameters let go of their tensors.

    :param prefix: vLLM's name of the layer
    :param names: of its linears in the checkpoint
    :param shards: how many matrices vLLM fuses into it
    :param parameters: kind -> parameter
    :raises WexpandError: naming the tensor that is missing, damaged or inconsistent
    """
    position = parameters["weight"].position
    arrived: dict[Any, dict[str, Tensor]] = {}
    for kind, parameter in parameters.items():
        for shard_id, tensor in parameter.take().items():
            arrived.setdefault(shard_id, {})[kind] = tensor
    if not arrived:
        raise WexpandError(
            f"{prefix}: no tensor of it was loaded; an expanded model needs its checkpoint's "
            "tensors (--load-format dummy cannot stand in for them)"
        )
    shard_ids = sorted(arrived, key=position)
    if len(names) == shards:
        # the linear none of whose tensors arrived keeps its place, and is named below
        by_position = {position(shard_id): shard_id for shard_id in shard_ids}
        shard_ids = [by_position.get(number, number) for number in range(shards)]
    if len(names) != len(shard_ids) or not set(arrived) <= set(shard_ids):
        raise WexpandError(
            f"{prefix}: vLLM loaded parts {list(arrived)} of it, which do not match its linears "
            f"{', '.join(names)}"
        )
    return [
        _checked(name, shard_id, arrived.get(shard_id, {}), config)
        for name, shard_id in zip(names, shard_ids, strict=True)
    ]


def _checked(
    name: str, shard_id: Any, tensors: dict[str, Tensor], config: CheckpointConfig
) -> LoadedLinear:
    bias = tensors.get("bias")
    entry = config.linears.get(name)
    if entry is None:
        tensors, entry = _packed(name, tensors)
    elif bias is not None and not entry.bias and not bias.any():
        del tensors["bias"]  # some models let vLLM add a bias of zeros
    return LoadedLinear(name, shard_id, check_linear(name, entry, tensors))


def _packed(name: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], LinearEntry]:
    """A linear that was not expanded, next to one that was, as one of ours: full rows."""
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2 or weight.dtype not in FLOATS.values():
        found = "missing" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise WexpandError(
            f"{name}.weight: {found}; config.json does not list it as expanded, so it should be "
            "[out, in] and float32, bfloat16 or float16",
            f"{name}.weight",
        )
    pool = RowPool.pack(weight, keep=torch.ones_like(weight, dtype=torch.bool))
    entry = StoredLinear(pool, bias=tensors.get("bias")).entry(weight.dtype)
    return tensors | {"weight": pool.values}, entry
