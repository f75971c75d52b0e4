"""`wexpand plan`: what sizes of a model are predicted to cost, before any work."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WexpandError
from .data import padded
from .loading import DTYPES, load_dense, load_inputs
from .recipes import recipe, refuse_sizes

if TYPE_CHECKING:
    from .planning import Plan

__all__ = ["Curve", "Point", "Share", "curve"]

BITS = (8.25, 6, 5, 4.5, 4.25, 4, 3.5, 3.25, 3, 2.75, 2.5, 2.25, 2, 1.75, 1.5)
"""per weight, of the sizes that are looked at if none are asked for"""
EPOCHS = 8
"""of the recipe "dial" if nothing else is said"""
PASSES_PER_EPOCH = 4


@dataclass(frozen=True)
class Share:
    """What one linear gets."""

    values: str
    """int8, int6, int5, int4, int3, int2, or auto: as they are"""
    sparsity: float
    """fraction pruned; 0 with values auto: dense"""
    added_loss: float
    """predicted, nats per token"""


@dataclass(frozen=True)
class Point:
    """One size."""

    size: float
    """bytes stored over dense bytes, at most"""
    stored: float
    """what is chosen, of dense bytes"""
    bits: float
    """stored, per weight"""
    bits_read: float
    """that a token reads, per weight"""
    added_loss: float
    """predicted, nats per token, before tuning"""
    linears: dict[str, Share]
    """by name"""


@dataclass(frozen=True)
class Curve:
    """The sizes of a model."""

    model: str
    tokens: int
    """that the plan was made from"""
    dense_bits: float
    """per weight"""
    share: float
    """of the model's parameters that are weights of these linears"""
    least: float
    """the smallest size that can be reached"""
    seconds: float
    """that the plan took"""
    seconds_to_compress: float
    """what `wexpand compress --size` is expected to take on this machine, at any size, with the
    same calibration text"""
    memory: int
    """bytes beside the model that it is expected to take, at most"""
    points: list[Point]
    """largest size first"""


def curve(
    model: str,
    dataset: str,
    *,
    sizes: Sequence[float] = (),
    samples: int = 128,
    max_seq_length: int = 512,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    dtype: str = "auto",
    seed: int = 0,
) -> Curve:
    """Plan all linears of the blocks, as recipe "dial" has them, and look at several sizes.

    Parameters as of `oneshot.compress`, which makes the same plan: of the samples both draw as many
    as the widest linear needs.

    :param sizes: bytes over dense bytes, each above 0 and below 1; by default BITS
    :raises WexpandError: what `compress` refuses, or a size that cannot be reached
    """
    import torch
    import yaml
    from compressed_tensors.utils import match_named_modules
    from llmcompressor.utils.pytorch.module import infer_sequential_targets

    from ..method.prospects import Dial
    from .checks import refuse_nonfinite, refuse_unrolled
    from .choosing import refuse_unreachable
    from .estimate import expected
    from .plan_batches import plan_batches, plan_tokens
    from .planning import plan_linears
    from .targets import find_targets

    begin = time.monotonic()
    if dtype not in DTYPES:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    for size in sizes:
        refuse_sizes(size=size)
    text = Path(recipe("dial")).read_text(encoding="utf8")
    ((_, modifiers),) = yaml.safe_load(text)["dial_stage"].items()
    keys = modifiers["SparseExpansionModifier"]
    targets, ignore = keys.pop("targets"), keys.pop("ignore")
    inputs = load_inputs(
        model, dataset, samples=samples, max_seq_length=max_seq_length,
        dataset_config=dataset_config, split=split, text_column=text_column, seed=seed,
    )  # fmt: skip
    dense, _ = load_dense(model, dtype)
    with suppress(ImportError):  # llm-compressor 0.13
        from llmcompressor.modeling.moe.linearize import linearize_moe

        linearize_moe(dense)  # as oneshot does, so that what it refuses is refused here
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    dense.to(device)
    blocks = dict(match_named_modules(dense, infer_sequential_targets(dense, None)))
    held, found = find_targets(dense, blocks, targets, ignore)
    linears = {name: t.linear for name, t in found.items() if t.linear is not None}
    refuse_unrolled(dense, linears)
    refuse_nonfinite(linears)
    batches = [padded([row]) for row in inputs.rows]
    dial = Dial.of(keys)
    for size in sizes:
        refuse_unreachable(dense, linears, replace(dial, size_budget=size))
    drawn = plan_batches(batches, device, plan_tokens(linears.values()), dial.base.seed)
    plan = plan_linears(dense, linears, drawn, dial)
    dense_bits = 8 * plan.dense_bytes / plan.weights
    wanted = sorted(sizes or (bits / dense_bits for bits in BITS), reverse=True)
    if not sizes:
        wanted = [size for size in wanted if plan.least <= size < 1]
    share = plan.weights / sum(parameter.numel() for parameter in dense.parameters())
    tokens = sum(len(row["input_ids"]) for row in inputs.rows)
    of_blocks = {
        block.module: {n: linears[n] for n, t in found.items() if t.block == name}
        for name, block in held.items()
    }
    memory = expected(dense, of_blocks, tokens, len(batches), dial.base, 0.5).memory
    return Curve(
        model, plan.tokens, dense_bits, share, plan.least, time.monotonic() - begin,
        _seconds(plan, tokens), memory, [_point(plan, size, dense_bits) for size in wanted],
    )  # fmt: skip


def _point(plan: "Plan", size: float, dense_bits: float) -> Point:
    choice = plan.choose(size)
    stored, reading = (
        sum(getattr(c, field) for c in choice.values()) / plan.dense_bytes
        for field in ("stored", "read")
    )
    loss = sum(candidate.loss for candidate in choice.values())
    linears = {name: Share(*found.setting, found.loss) for name, found in choice.items()}
    return Point(size, stored, stored * dense_bits, reading * dense_bits, loss, linears)


def _seconds(plan: "Plan", tokens: int) -> float:
    """Of compressing: the plan again, and so many forwards of all calibration `tokens`.

    Blocks run once to calibrate, once to propagate and once on the dense path; an epoch of tuning
    takes about PASSES_PER_EPOCH forwards, backward included.
    """
    forwards = 3 + PASSES_PER_EPOCH * EPOCHS
    return plan.seconds + tokens * forwards * plan.seconds_per_token
