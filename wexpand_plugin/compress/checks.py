"""What a recipe cannot be applied to, found before any calibration."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from torch import nn
from torch.utils.data import DataLoader

from ..errors import WexpandError
from ..format.rowpool import finite
from ..hf.names import empty_model, missing_tensors, saved_names
from ..method import ranks
from ..method.settings import Settings
from .calibration import about_rows, counted_tokens
from .expansion import parts
from .rows import settings_for

__all__ = [
    "count_tokens",
    "refuse_distributed",
    "refuse_misfit",
    "refuse_mixed",
    "refuse_nonfinite",
    "refuse_shared",
    "refuse_same_rows",
    "refuse_small",
    "refuse_unrolled",
]

TOKENS_PER_EXPERT = 64


def refuse_distributed(modifier: str) -> None:
    """What is not added up over processes would differ from one to the next."""
    if (size := ranks.count()) > 1:
        raise WexpandError(
            f"{modifier}: {size} processes (torchrun) are not supported; run it in one"
        )


def refuse_same_rows(loader: DataLoader | None) -> None:
    """Ranks that calibrate on the same rows would take them for as many more.

    llm-compressor cuts one data set in shares by itself, but takes the first of them on each rank.
    """
    if ranks.count() > 1:
        found = ranks.gathered(about_rows(loader)["crc32"])
        if len(set(found)) < len(found):
            raise WexpandError(
                f"calibration: some of {len(found)} processes have the same rows; give each its "
                "own: dataset.shard(num_shards=world_size, index=rank)"
            )


def refuse_mixed(model: Any) -> None:
    """What a checkpoint of ours could not hold beside its own linears.

    :raises WexpandError: a module that another modifier quantises; a transform that is applied
        while the model runs
    """
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            raise WexpandError(
                f"{name}: another modifier of the recipe quantises it, and a checkpoint holds "
                "either its format or ours; keep one of them (values: int4 rounds to 4 bits)"
            )
    transforms = getattr(model, "transform_config", None)
    for scheme in transforms.config_groups.values() if transforms is not None else ():
        for place in scheme.apply:
            if place.is_online():
                raise WexpandError(
                    f"{type(model).__name__}: another modifier of the recipe transforms inputs or "
                    f"outputs while the model runs ({place.location} of {place.targets}), which a "
                    "checkpoint of ours does not hold; use transforms that weights take up, such "
                    "as SpinQuant's rotations R1 and R2"
                )


def refuse_shared(modifier: Modifier, targets: Mapping[str, Any]) -> None:
    """Linears that another modifier of ours in the recipe expands as well.

    :param targets: by name, each with its `linear`
    """
    name = type(modifier).__name__
    for other in active_session().lifecycle.recipe.modifiers:
        if other is not modifier and isinstance(other, type(modifier)):
            if both := [t for t in targets if t in getattr(other, "_targets", {})]:
                raise WexpandError(
                    f"{both[0]}: two {name}s of the recipe mean it; let one of them ignore it"
                )


def refuse_misfit(name: str, width: int, settings: Settings) -> None:
    """A linear of `width` inputs that the mask's structure does not divide."""
    structure = settings.structure
    if structure.m and width % structure.m:
        raise WexpandError(
            f"mask_structure: {structure} needs in_features that {structure.m} divides; "
            f"{name} has {width}"
        )


def refuse_small(
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]], settings: Settings
) -> None:
    """A `size_budget` that the base versions alone do not fit: of a linear if each has its own
    budget, else of all together.

    :param shapes: of each linear [out, in] of its weight, and the dtype it is stored in
    """
    if settings.size_budget is None:
        return
    sizes: dict[str, tuple[int, int]] = {}
    for name, ((out, width), dtype) in shapes.items():
        # row versions of a neuron are alike in size, so the base versions' size is known beforehand
        own = settings_for(dtype, settings)
        kept = torch.tensor([round(width * (1 - settings.sparsity))])
        base = out * int(own.weighs.row(kept, width)) + own.fixed_bytes(out, width)
        sizes[name] = base, own.weighs.dense(out, width)
    if settings.budget_scope == "layer":
        worst = max(sizes, key=lambda name: sizes[name][0] / sizes[name][1])
        base, dense, whose = *sizes[worst], f"of {worst} alone"
    else:
        base, dense = (sum(column) for column in zip(*sizes.values(), strict=True))
        whose = f"of the {len(sizes)} linears"
    biases, fewer = (" and biases", "clusters") if settings.biased else ("", "experts")
    if settings.size_budget < base / dense:
        raise WexpandError(
            f"size_budget: {settings.size_budget} is below {base / dense:.3f}, the size of the "
            f"base versions with row maps, routers{biases} {whose} (sparsity {settings.sparsity}, "
            f"{parts(settings)}); raise the budget or the sparsity, or use fewer {fewer}"
        )


def count_tokens(batches: Iterable[Any], settings: Settings) -> tuple[int, int]:
    """How many tokens of the calibration batches count, and how many batches there are: of this
    rank, where there are several.

    :raises WexpandError: those of all ranks are too few for the experts or clusters
    """
    experts, clusters = settings.num_experts, settings.num_clusters
    need = experts * TOKENS_PER_EXPERT if experts > 1 else 1
    why = f"num_experts {experts}", f"{TOKENS_PER_EXPERT} per expert"
    if clusters > need:
        need, why = clusters, (f"num_clusters {clusters}", "1 per cluster")
    found = number = 0
    for batch in batches:
        number += 1
        counts = counted_tokens(batch)
        found += 0 if counts is None else int(counts.sum())
    every = sum(ranks.gathered(found))
    if every < need:
        raise WexpandError(
            f"calibration: {every} tokens are too few for {why[0]}, which needs at least "
            f"{need} ({why[1]}, better {'hundreds' if clusters else 'thousands'})"
        )
    return found, number


def refuse_nonfinite(linears: Mapping[str, nn.Linear]) -> None:
    """A weight with a NaN or an infinite value is a damaged one."""
    for name, linear in linears.items():
        for kind, values in linear.named_parameters(recurse=False):
            if not finite(values.detach()):
                raise WexpandError(
                    f"{name}.{kind}: holds NaN or infinite values; repair the model, or leave the "
                    f"linear out with ignore: ['{name}']"
                )


def refuse_unrolled(model: Any, linears: Mapping[str, nn.Linear]) -> None:
    """Linears that the model's own class does not have could be saved, and not loaded again.

    llm-compressor unrolls the fused experts of a mixture into linears. Of some models it saves them
    under names that their class takes, of others not, whichever linears are meant.
    """
    kind = type(model).__name__
    try:
        own = empty_model(type(model), copy.deepcopy(model.config))
    except Exception:  # a class that cannot be built from its config cannot be compared with
        return
    known = {name: type(module) for name, module in own.named_modules()}
    for name in linears:
        if not issubclass(known.get(name, nn.Module), nn.Linear):
            parts = name.split(".")
            last = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in known)
            raise WexpandError(
                f"{name}: {kind} has no such linear but one module of all experts, so a model that "
                "stores it by itself could not be loaded again; leave the experts dense with "
                rf"ignore: ['re:.*\.{parts[last - 1]}\..*']"
            )
    unrolled = any(name not in known for name, _ in model.named_modules())
    if unrolled and (missing := missing_tensors(own, saved_names(model))):
        raise WexpandError(
            f"model: llm-compressor unrolls the experts of a {kind} and saves them under names "
            f"that {kind} does not load ({missing[0]} would be missing), so it cannot be compressed"
        )
