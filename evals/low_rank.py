"""The same bytes for a low-rank correction: does it do more than a denser mask?

    python -m evals.low_rank [--sparsity 0.8] [--seeds 3] [--json evals/results/low_rank.json]

What experts store beside one mask could be spent otherwise. Here each MLP linear of the pocket
model is pruned by SparseGPT and gets, for the same bytes, either fewer zeros, or W' + B A with A
[rank, in] and B [out, rank] in 16 bits: the product that leaves the least squared error of the
outputs over the calibration inputs, given W'. All inputs are those of the dense model, nothing is
tuned, so that the two differ in one thing; what experts and cluster biases do for their bytes,
tuned and end to end, `evals.experts` measures against a denser mask, too.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from evals.allocation import training_texts
from evals.corrected import factors
from evals.experts import MASK_BITS, VALUE_BITS, sparsity_of
from evals.paper.inputs import input_groups, record
from evals.paper.pruning import ROW, hessian
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL, corpus
from wexpand_plugin.method.solvers.sparsegpt import solve

__all__ = ["correction", "rank_of"]

ADDED = (0.05, 0.1, 0.25, 0.5)
"""bytes beside those of the mask, of the dense weight's"""
TOKENS, CONTEXT = 16384, 256


def rank_of(share: float, shape: torch.Size) -> int:
    """The rank whose factors take this share of the dense bytes of a weight [out, in]."""
    rows, columns = shape
    return round(share * rows * columns / (rows + columns))


def correction(error: Tensor, second_moment: Tensor, rank: int) -> Tensor:
    """The matrix of this rank that is nearest to `error` [out, in] for inputs with this second
    moment [in, in], see `factors`."""
    left, right = factors(error, second_moment, rank)
    return (left @ right).to(error.dtype)


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/low_rank.json"),
    sparsity: Annotated[float, typer.Option()] = 0.8,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Loss of each way to spend the bytes, over dense, for each seed."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(MODEL), AutoTokenizer.from_pretrained(MODEL)
    plain = 1 - sparsity + MASK_BITS / VALUE_BITS

    def loss() -> float:
        return held_out_loss(
            model, tokenizer, "pocket", tokens=TOKENS, context=CONTEXT, progress=False
        ).loss

    dense, rows = loss(), []
    for seed in range(seeds):
        texts = training_texts("pocket", seed)
        ids = corpus.token_rows(texts, tokenizer, CONTEXT)[: TOKENS // CONTEXT]
        groups = record(model, input_groups(model, 1, ids[:1]), ids)
        linears = [(linear, hessian(x)) for group, x in groups for linear in group.linears]
        weights = [linear.weight.detach().clone() for linear, _ in linears]

        def put(made: list[Tensor], linears=linears) -> float:
            with torch.no_grad():
                for (linear, _), weight in zip(linears, made, strict=True):
                    linear.weight.copy_(weight)
            return loss()

        def masks(share: float, linears=linears, weights=weights) -> list[Tensor]:
            return [solve(w, h[None], share, ROW).weights[0]
                    for w, (_, h) in zip(weights, linears, strict=True)]  # fmt: skip

        base = masks(sparsity)
        row = {"seed": seed, "one mask": put(base) - dense}
        for added in ADDED:
            low = [
                m + correction(w - m, h, rank_of(added, w.shape))
                for m, w, (_, h) in zip(base, weights, linears, strict=True)
            ]
            row[f"low rank {added:g}"] = put(low) - dense
            row[f"fewer zeros {added:g}"] = put(masks(sparsity_of(plain + added))) - dense
        put(weights)
        rows.append(row)
        print(json.dumps(row), flush=True)
        content = {"command": f"python -m evals.low_rank --seeds {seeds}", "sparsity": sparsity,
                   "stored": plain, "dense_loss": dense, "rows": rows}  # fmt: skip
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    for name in list(rows[0])[1:]:
        own = [row[name] for row in rows]
        deviation = f" +- {statistics.stdev(own):.3f}" if len(own) > 1 else ""
        print(f"{name:18} {statistics.mean(own):.3f}{deviation}")


if __name__ == "__main__":
    typer.run(main)
