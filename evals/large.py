"""How a model of 70B parameters would be compressed and served: computed, nothing is run.

    python -m evals.large [--json FILE]

Work and bytes follow from the shapes of Llama-3-70B by the formulas of the estimate that `wexpand
compress` prints before it begins (`compress.duration`, `compress.estimate`), recipe by recipe. What
a machine does in a second is assumed, not measured. So hours tell an afternoon from a week.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
import yaml
from torch import nn

from evals.processes import ROOT

__all__ = ["ASSUMED", "RANKS", "RECIPES", "Plan", "compressing", "serving"]

HIDDEN, FFN, LAYERS, KEYS, VOCABULARY = 8192, 28672, 80, 1024, 128256
GROUPS = {
    "self_attn: q + k + v": [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN)],
    "self_attn: o": [(HIDDEN, HIDDEN)],
    "mlp: gate + up": [(FFN, HIDDEN), (FFN, HIDDEN)],
    "mlp: down": [(HIDDEN, FFN)],
}
"""input group of a block -> [out, in] of its linears"""
RECIPES = {
    "int4": (128, {}),
    "sparse_int4": (128, {}),
    "dial": (128, {"values": "int3", "sparsity": 0.0}),
    "sparse_expansion_budget": (1024, {}),
}
"""recipe of the package -> rows of 512 tokens, and keys instead of what a plan would choose"""
LENGTH, RANKS = 512, (1, 8)
SEQUENCE = 8192
"""tokens of a sequence that is served"""

ASSUMED = {
    "bfloat16": ("operations per second, bfloat16 products", 400e12),
    "float32": ("operations per second, float32 products", 40e12),
    "memory": ("bytes per second from the GPU's memory", 3.35e12),
    "link": ("bytes per second from main memory to a GPU", 25e9),
    "disk": ("bytes per second from and to the disk", 2e9),
    "weight": ("bytes that the solver moves for a weight", 1000),
    "column": ("seconds that the solver takes for a column (30 kernels)", 3e-4),
    "experts": ("time of a block with experts, which get few tokens each, over dense", 2),
    "tuned": ("times that a weight is moved, in float32, for each row that it is tuned on", 20),
    "server": ("bytes per second from the memory of a CPU server", 460e9),
}
"""of an H100, products at about 40% and 60% of their peak, and of what is around it"""
_OF = {key: value for key, (_, value) in ASSUMED.items()}


class Plan(NamedTuple):
    """A recipe, applied to a block."""

    settings: Any
    linears: dict[str, nn.Linear]
    """the targeted ones"""
    groups: list[tuple[int, int]]
    """outputs and inputs of their input groups"""
    others: list[tuple[int, int]]
    """and of the rest"""
    rows: int
    size: float | None
    tried: int
    """settings of each linear that are tried before, with `sparsity: auto`"""


def _block() -> Iterator[tuple[str, str, nn.Linear]]:
    for group, shapes in GROUPS.items():
        for place, (rows, width) in enumerate(shapes):
            linear = nn.Linear(width, rows, bias=False, device="meta", dtype=torch.bfloat16)
            yield group, f"{group.partition(':')[0]}.{group}{place}", linear


def plan(name: str) -> Plan:
    """What a recipe of the package does to a block."""
    from wexpand_plugin.method.prospects import Dial
    from wexpand_plugin.method.settings import Settings

    rows, chosen = RECIPES[name]
    (stage,) = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()).values()
    (modifiers,) = stage.values()
    (keys,) = modifiers.values()
    targets, size = keys.pop("targets"), keys.get("size_budget")
    keys.pop("ignore")
    tried = 0
    if keys["sparsity"] == "auto":
        tried = sum(len(shares) for shares in Dial.of(keys).grid().values())
        keys["size_budget"] = None
    taken = "mlp" if "mlp" in str(targets) else ""
    linears = {name: linear for group, name, linear in _block() if group.startswith(taken)}
    stacked = {g: (sum(rows for rows, _ in shapes), shapes[0][1]) for g, shapes in GROUPS.items()}
    groups = [shape for group, shape in stacked.items() if group.startswith(taken)]
    others = [shape for group, shape in stacked.items() if not group.startswith(taken)]
    return Plan(Settings(**keys | chosen), linears, groups, others, rows, size, tried)


def _bytes(linears: dict[str, nn.Linear]) -> int:
    return sum(linear.weight.nbytes for linear in linears.values())


def _whole() -> tuple[int, int, int]:
    """Bytes of a block, of an embedding or head, and of the model."""
    block, end = sum(linear.weight.nbytes for *_, linear in _block()), 2 * VOCABULARY * HIDDEN
    return block, end, LAYERS * block + 2 * end


def compressing(name: str, ranks: int) -> dict[str, float]:
    """Hours and bytes of compressing by a recipe on so many GPUs of one machine."""
    from wexpand_plugin.compress.duration import EPOCH, OTHERS, Speed, seconds
    from wexpand_plugin.compress.estimate import TRAINED, kept_bytes, working_bytes
    from wexpand_plugin.compress.plan_batches import PLAN_TOKENS_PER_COLUMN
    from wexpand_plugin.compress.planning import HESSIAN_BYTES
    from wexpand_plugin.compress.sensitivity import SAMPLE_TOKENS

    settings, linears, groups, others, rows, _, tried = plan(name)
    block, _, whole = _whole()
    token = OTHERS * block / _OF["bfloat16"]  # two operations for a weight of two bytes
    routed = token * (_OF["experts"] if settings.num_experts > 1 else 1)
    speed = Speed(
        token, routed, 2 / _OF["float32"], _OF["weight"] / _OF["memory"], _OF["column"]
    )
    tokens = rows * LENGTH // ranks
    taken = seconds(groups, tokens, settings, speed, others, ranks)
    weights = sum(linear.weight.numel() for linear in linears.values())
    taken += settings.tune_epochs * rows // ranks * _OF["tuned"] * 4 * weights / _OF["memory"]
    moved = whole / _OF["link"]
    planned = 0.0
    if tried:
        seen = min(rows * LENGTH, PLAN_TOKENS_PER_COLUMN * FFN) // ranks
        # groups whose Hessians do not fit together each take a pass of the whole model
        passes = 1 + EPOCH + LAYERS * sum(8 * width**2 for _, width in groups) / HESSIAN_BYTES
        planned = passes * max(moved, seen * token * LAYERS)
        # one after another: few Hessians are in memory together
        planned += LAYERS * tried * sum(speed.solved(*shape) for shape in groups)
    kept = 0.0
    if settings.size_budget is not None:
        kept = max(settings.shortlist) * settings.size_budget * LAYERS * _bytes(linears)
    kept += kept_bytes(linears, settings, tokens) * ranks
    gpu = block + working_bytes(linears, replace(settings, budget_scope="layer"), tokens)
    if settings.tune_epochs:
        gpu = max(gpu, 2 * block + TRAINED * weights)
    # hidden states before, after and beside a block, and what is kept of it
    beside = kept + 3 * 2 * rows * LENGTH * HIDDEN
    if tried:  # a backward pass keeps the weights that it went through
        gpu = max(gpu, whole)
        # and rows of every linear's inputs and gradients, up to twice those that it samples
        sampled = sum(sum(linear.weight.shape) for linear in linears.values())
        beside = max(beside, LAYERS * sampled * 2 * SAMPLE_TOKENS * 2)
    return {
        "tokens": rows * LENGTH,
        "plan_hours": planned / 3600,
        "hours": (planned + LAYERS * taken + moved + 2 * whole / _OF["disk"]) / 3600,
        "gpu_bytes": gpu,
        "main_bytes": whole + beside,
    }


def serving(name: str) -> dict[str, float]:
    """Bytes of the model that a recipe gives, and of those that a token reads."""
    from wexpand_plugin.compress.rows import settings_for

    settings, linears, _, _, _, size, _ = plan(name)
    own, read = settings_for(torch.bfloat16, settings), 0.0
    for linear in linears.values():
        rows, width = linear.weight.shape
        kept = torch.tensor([width - round(width * settings.sparsity)])
        read += rows * int(own.weighs.row(kept, width)) + own.fixed_read(rows, width, True)
    stored = read if size is None else size * _bytes(linears)
    read = stored if settings.num_experts == 1 else read
    block, end, _ = _whole()
    left = block - _bytes(linears)
    return {
        "stored_bytes": LAYERS * (stored + left) + 2 * end,
        "read_bytes": LAYERS * (read + left) + end,
        "sequence_bytes": 2 * 2 * LAYERS * KEYS * SEQUENCE,
    }


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/large.json"),
) -> None:
    """Compute and write all of it."""
    rows = {
        name: {"compress": {n: compressing(name, n) for n in RANKS}, "serve": serving(name)}
        for name in RECIPES
    }
    content = {
        "command": "python -m evals.large", "computed": True, "dense_bytes": _whole()[2],
        "assumed": list(ASSUMED.values()), "bytes_per_s": [_OF["memory"], _OF["server"]],
        "sequence": SEQUENCE, "rows": rows,
    }  # fmt: skip
    json_file.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    typer.run(main)
