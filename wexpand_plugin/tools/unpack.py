"""A checkpoint of ours as a dense model again, zeros included."""

import shutil
from pathlib import Path

import torch

from ..errors import WexpandError
from ..format.directories import partial_directory, require_empty
from ..format.model_dir import ModelDir
from ..format.problems import problems
from ..format.writer import (
    SHARD_BYTES,
    TensorWriter,
    copy_others,
    write_json,
)
from ..hf.card import BASE_CARD, CARD, is_card
from .pack import progress_bar

__all__ = ["unpack"]


def unpack(
    directory: str | Path,
    output: str | Path,
    *,
    expert: int | None = None,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of ours as a dense model with zeros.

    :param output: a directory that does not exist, or is empty
    :param expert: which expert's weights to write where there are several; then the output is not
        the same model any more, as every token would use this expert
    :raises WexpandError: a damaged checkpoint; several experts and no `expert`; biases of clusters
    """
    require_empty(output)
    model = ModelDir(directory)
    linears = model.config.linears
    for name, entry in linears.items():
        if entry.cluster_bias and entry.clusters > 1:
            raise WexpandError(
                f"{directory}: {name} adds a bias of its own for each of {entry.clusters} clusters "
                "of tokens, which no dense model can hold"
            )
        if entry.cluster_bias and not entry.bias:
            raise WexpandError(
                f"{directory}: {name} adds a bias to all tokens, which the dense model's has no "
                "tensor for"
            )
        if entry.experts > 1 and expert is None:
            raise WexpandError(
                f"{directory}: {name} has {entry.experts} experts, a dense model holds one: choose "
                f"it with --expert, 0 to {entry.experts - 1}"
            )
        if expert is not None and entry.experts > 1 and not 0 <= expert < entry.experts:
            raise WexpandError(
                f"expert: {expert} is outside 0 to {entry.experts - 1}, the experts of {name}"
            )
    for problem in problems(model):
        raise problem
    ours = {
        tensor
        for name in linears
        for tensor in model.config.tensors_of(name)
        if not tensor.endswith((".weight", ".bias"))
    }
    with partial_directory(output) as partial:
        writer = TensorWriter(partial, max_shard_bytes)
        with progress_bar(model, quiet) as bar:
            for name, tensor in model.tensors():
                bar.update(tensor.nbytes)
                linear, _, kind = name.rpartition(".")
                if linear in linears and kind == "weight":
                    pool = model.linear(linear).pool
                    chosen = (expert or 0) if pool.experts > 1 else 0
                    tensor = pool.expert(chosen).to(getattr(torch, linears[linear].dtype))
                elif linear in linears and kind == "bias" and linears[linear].cluster_bias:
                    biases = model.linear(linear).cluster_bias
                    assert biases is not None
                    tensor = (tensor + biases.decoded()[0]).to(tensor.dtype)
                if name not in ours:
                    writer.add(name, tensor)
        writer.close()
        _copy_others(model.path, partial)
        values = {k: v for k, v in model.config_json.items() if k != "quantization_config"}
        write_json(partial / "config.json", values)


def _copy_others(source: Path, target: Path) -> None:
    """All other files; the base model's card takes the place of ours, if ours was not changed."""
    card, base = source / CARD, source / BASE_CARD
    if not card.exists() or not is_card(card):
        copy_others(source, target)
        return
    if base.exists():
        shutil.copyfile(base, target / CARD)
    copy_others(source, target, but=(CARD, BASE_CARD))
