"""Time and memory of allocation: one 11008 x 4096 linear, 4 to 32 experts, three size budgets.

    python -m evals.bench.allocation [--json FILE] [--rows 11008] [--width 4096]

The errors are synthetic, with the spread that real ones have: neurons differ by orders of magnitude
(log-normal), experts by their tokens, and a tree node's version is the worse for an expert the more
experts it serves. Costs are those of rows at the given sparsity, unstructured, in bfloat16. Timed
is what follows solving: the merge tree and `allocate`, which bisects the price, one dynamic program
over the tree per step. Memory is the peak of this process above what the problem itself occupies
(Linux with glibc: freed memory is given back and the kernel's counter reset before each run).
"""

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from evals.bench.timing import write_json
from wexpand_plugin.method.allocation import AllocationProblem, allocate
from wexpand_plugin.method.merge_tree import MergeTree, merge_tree

__all__ = ["Statistics", "problem", "statistics"]

MIB = 2**20


@dataclass(frozen=True)
class Statistics:
    """What the tree is made from."""

    means: torch.Tensor
    """[experts, in]"""
    tokens: torch.Tensor
    """[experts]"""


def statistics(experts: int, width: int) -> Statistics:
    """Clusters of unequal size around a few common directions."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(experts, 4, generator=generator)
    means = mix @ torch.randn(4, width, generator=generator)
    means += torch.randn(experts, width, generator=generator) / 2
    share = torch.randn(experts, generator=generator).exp()
    return Statistics(means, (share / share.sum() * 131072).round())


def problem(
    tree: MergeTree, tokens: torch.Tensor, rows: int, width: int, sparsity: float
) -> AllocationProblem:
    """Errors, allowed versions and bytes, drawn at random (see the module)."""
    generator = torch.Generator().manual_seed(1)
    nodes, experts = tree.nodes, tree.experts
    neuron = (1.5 * torch.randn(rows, generator=generator)).exp()
    pair = (0.7 * torch.randn(experts, rows, generator=generator)).exp()
    serves = tree.members.sum(dim=1).float()
    worse = 0.4 + 0.6 * (serves - 1) / max(experts - 1, 1)
    noise = (0.2 * torch.randn(nodes, experts, rows, generator=generator)).exp()
    errors = noise * worse.view(-1, 1, 1) * (tokens.unsqueeze(1) * pair * neuron)
    allowed = torch.rand(nodes, rows, generator=generator) < 0.9
    allowed[-1] = True
    spread = (width * sparsity * (1 - sparsity)) ** 0.5
    kept = (1 - sparsity) * width + spread * torch.randn(nodes, rows, generator=generator)
    cost = 2 * kept.round().long().clamp(0, width) + width // 8
    return AllocationProblem(tree, errors, allowed, cost)


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(experts: int, budget: float, rows: int, width: int, sparsity: float) -> dict[str, Any]:
    """One tree and one allocation."""
    inputs = statistics(experts, width)
    start = time.perf_counter()
    tree = merge_tree(inputs.means, inputs.tokens)
    tree_s = time.perf_counter() - start
    given = problem(tree, inputs.tokens, rows, width, sparsity)
    limit = budget * 2 * rows * width
    ctypes.CDLL(None).malloc_trim(0)  # else `allocate` would fill what making the problem has freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    before, start = memory("VmRSS"), time.perf_counter()
    choice = allocate([given], limit)[0]
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    spent = int(given.cost[choice.granted].sum())
    return {
        "experts": experts,
        "budget": budget,
        "tree_s": tree_s,
        "allocate_s": seconds,
        "problem_mib": sum(tensor.nbytes for tensor in given[1:]) / MIB,
        "extra_peak_mib": peak - before,
        "versions": int(choice.granted.sum()),
        "spent_of_budget": spent / limit,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    rows: Annotated[int, typer.Option(help="Neurons of the linear.", min=1)] = 11008,
    width: Annotated[int, typer.Option(help="Its input columns.", min=8)] = 4096,
    sparsity: Annotated[float, typer.Option(help="Of every version.")] = 0.8,
) -> None:
    """A table over experts and budgets."""
    measure(4, 1.0, 64, 64, sparsity)  # what is slow only once
    print(f"{rows} x {width}, sparsity {sparsity}; budget x the dense bytes")
    print(
        f"{'experts':>7}{'budget':>8}{'tree s':>9}{'allocate s':>12}{'problem MiB':>13}"
        f"{'extra peak MiB':>16}{'versions':>10}{'spent':>9}"
    )
    results = []
    for experts in (4, 16, 32):
        for budget in (0.5, 1.0, 2.0):
            row = measure(experts, budget, rows, width, sparsity)
            results.append(row)
            print(
                f"{experts:7}{budget:8.1f}{row['tree_s']:9.3f}{row['allocate_s']:12.2f}"
                f"{row['problem_mib']:13.1f}{row['extra_peak_mib']:16.1f}{row['versions']:10}"
                f"{row['spent_of_budget']:9.2%}",
                flush=True,
            )
    write_json(
        None if json_file is None else str(json_file),
        {
            "command": "python -m evals.bench.allocation",
            "rows": rows, "width": width, "sparsity": sparsity, "results": results,
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
