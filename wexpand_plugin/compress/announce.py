"""What a run says before it works, and what it says and records of what came out."""

from collections.abc import Iterable, Mapping
from typing import Any

from compressed_tensors.offload import disable_onloading
from loguru import logger
from torch import nn

from ..hf.names import unserved
from ..method import ranks
from ..method.prospects import Dial
from ..method.settings import Settings
from .choosing import Choice
from .estimate import expected
from .expansion import Block, Target, parts
from .precision import stored_dtype

__all__ = ["findings", "say_beginning", "say_end", "warn_unserved"]


def say_beginning(
    model: nn.Module,
    blocks: Mapping[str, Block],
    targets: Mapping[str, Target],
    settings: Settings,
    dial: Dial | None,
    tokens: int,
    batches: int,
    on_disk: bool,
) -> None:
    """Which linears become what, and what that is expected to take.

    :param dial: that chooses settings, if one does
    :param tokens, batches: of calibration
    :param on_disk: see `estimate.working_bytes`
    """
    linears = {name: t.linear for name, t in targets.items() if t.linear is not None}
    warn_unserved(model, linears)
    widest, each = max(li.in_features for li in linears.values()), tokens * ranks.count()
    if settings.num_experts > 1 and (each := each // settings.num_experts) < widest:
        logger.warning(
            f"about {each} tokens for each of {settings.num_experts} experts, fewer than the "
            f"{widest} inputs of a linear: calibrate on more text (samples, max_seq_length), or "
            "use fewer experts"
        )
    with disable_onloading():  # sizes alone; on a GPU every weight would be copied there
        dense, whole = (
            sum(weight.numel() * stored_dtype(model, weight).itemsize for weight in weights)
            for weights in ((li.weight for li in linears.values()), model.parameters())
        )
    held = {
        block.module: {n: li for n, li in linears.items() if targets[n].block == name}
        for name, block in blocks.items()
    }
    tried = 0 if dial is None else sum(len(sparsities) for sparsities in dial.grid().values())
    size = settings.size_budget if dial is None else dial.size_budget
    known = expected(model, held, tokens, batches, settings, size, tried, on_disk)
    logger.info(
        f"Compressing {len(linears)} linears ({dense / 2**20:.1f} MiB dense, {dense / whole:.0%} "
        f"of the model) of {len(blocks)} blocks: {_how(settings, dial)}; {known}"
    )


def _how(settings: Settings, dial: Dial | None) -> str:
    """What is asked for."""
    if dial is not None:
        names = {"size_budget": "stored", "read_budget": "read by a token"}
        bounds = (f"{bound} of their bytes {names[key]}" for key, bound in dial.budgets.items())
        return f"zeros and bits chosen for {' and '.join(bounds)}, {parts(settings)}"
    zeros = f"{settings.sparsity:.0%} zeros ({settings.structure})" if settings.sparsity else ""
    values = "" if settings.grid is None else f"values in {settings.values}"
    size = ""
    if settings.num_experts > 1:
        budget = settings.size_budget
        size = "every expert in full" if budget is None else f"in {budget} of their bytes"
    return ", ".join(filter(None, (parts(settings), zeros, values, size)))


def warn_unserved(model: nn.Module, linears: Iterable[str]) -> None:
    """Linears that can be compressed and reloaded, and that vLLM will refuse to load."""
    if refused := unserved(model, linears):
        logger.warning(
            f"{refused[0]}: vLLM does not load a {type(model).__name__} whose fused qkv is "
            "compressed; to serve it, use a recipe with ignore: ['re:.*query_key_value']"
        )


def say_end(targets: Mapping[str, Target], choice: Choice | None) -> None:
    """What is stored; of linears that a dial left dense, too, since its budgets count them."""
    done = [target.routed for target in targets.values() if target.routed is not None]
    if not done:
        return
    stored, dense = sum(m.stored_bytes() for m in done), sum(m.dense_bytes() for m in done)
    said = f"Compressed {len(done)} linears to {stored / 2**20:.1f} MiB, {stored / dense:.3f} of"
    said += " their dense size"
    left = [] if choice is None else [b for name, b in choice.dense.items() if name not in targets]
    if left:
        share = (stored + sum(left)) / (dense + sum(left))
        said += f"; {share:.3f} together with {len(left)} that stay dense"
    logger.info(said)


def findings(
    targets: Mapping[str, Target], tuned: Mapping[str, list[float]] | None, choice: Choice | None
) -> dict[str, Any]:
    """What config.json records of what came out, beside `made_by`.

    :param tuned: of each block the errors before and after tuning, None without tuning
    """
    found: dict[str, Any] = {}
    predicted = {name: t.loss for name, t in targets.items() if t.loss is not None}
    if predicted:
        found["predicted_loss"] = {name: float(f"{v:.3g}") for name, v in predicted.items()}
    if tuned is not None:
        found["tuned"] = {n: [float(f"{e:.3g}") for e in errors] for n, errors in tuned.items()}
    if choice is not None:
        found["dial"] = choice.about()
    return found
