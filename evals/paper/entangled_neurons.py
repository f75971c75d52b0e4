"""Claim (a), the paper's Fig. 3: Wasserstein neurons suffer most from sparsity.

    python -m evals.paper.entangled_neurons [--seeds 3] [--json FILE] [--plot FILE]

In every MLP linear the top 3% of the neurons by one criterion are pruned by SparseGPT, row by row;
all other neurons stay exactly dense (given the Hessian, rows do not see each other). The loss
against the sparsity of those neurons says how much the criterion's neurons matter. Criteria:
Wasserstein distance, excess kurtosis, mean (absolute) and variance of the output, weight norm,
error of the neuron pruned to 95%, and a random choice. Calibration inputs are those of
the dense model. A seed draws the calibration text and the random neurons.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from evals.allocation import held_out_texts, training_texts
from evals.paper.inputs import label, mlp_linears, record, write_plot
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.neurons import neuron_scores
from wexpand_plugin.method.solvers.sparsegpt import solve

__all__ = ["criteria", "prune_rows"]

ROW = MaskStructure.parse("row")


def prune_rows(weight: Tensor, hessian: Tensor, rows: Tensor, sparsity: float) -> Tensor:
    """`weight` [out, in] with the neurons `rows` at `sparsity`, the others untouched."""
    pruned = weight.clone()
    pruned[rows] = solve(weight[rows], hessian[None], sparsity, ROW).weights[0]
    return pruned


def criteria(x: Tensor, weight: Tensor, hessian: Tensor, seed: int) -> dict[str, Tensor]:
    """Each criterion's value for each neuron [out]; more is more important."""
    scores = neuron_scores(x, weight, pairs=1000, seed=seed)
    change = solve(weight, hessian[None], 0.95, ROW).weights[0] - weight
    error = ((change @ hessian) * change).sum(dim=1)
    return {
        "wasserstein": scores.wd,
        "kurtosis": scores.kurtosis,
        "mean": scores.mean.abs(),
        "variance": scores.std.square(),
        "weight norm": weight.norm(dim=1),
        "error": error,
        "random": torch.rand(len(weight), generator=torch.Generator().manual_seed(seed)),
    }


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path(
        "evals/results/entangled_neurons.json"
    ),
    plot: Annotated[Path, typer.Option()] = Path("evals/results/entangled_neurons.png"),
    model: Annotated[str, typer.Option()] = str(MODEL),
    dataset: Annotated[str, typer.Option()] = "pocket",
    percent: Annotated[float, typer.Option()] = 3.0,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Loss against the sparsity of the chosen neurons."""
    from transformers import AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), load_model(model)
    linears = mlp_linears(network)
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    levels = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]

    def loss() -> float:
        return held_out_loss(
            network, tokenizer, held_out_texts(dataset), tokens=16384, progress=False
        ).loss

    def set_weights(choose: Callable[[str], Tensor]) -> None:
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(choose(name))

    found: dict[str, list[list[float]]] = {}
    baseline = loss()
    for seed in range(seeds):
        set_weights(dense.__getitem__)
        inputs = record(network, tokenizer, training_texts(dataset, seed), tokens)
        hessians = {name: x.t() @ x / len(x) for name, x in inputs.items()}
        values = {n: criteria(inputs[n], dense[n], hessians[n], seed) for n in linears}
        for criterion in next(iter(values.values())):
            losses = []
            for level in levels:
                chosen = {
                    n: v[criterion].topk(max(1, round(len(dense[n]) * percent / 100))).indices
                    for n, v in values.items()
                }
                set_weights(
                    lambda n, c=chosen, s=level, h=hessians: prune_rows(dense[n], h[n], c[n], s)
                )
                losses.append(loss())
            found.setdefault(criterion, []).append(losses)
            print(f"seed {seed}  {criterion:12}", "  ".join(f"{v:.4f}" for v in losses), flush=True)
    print(f"dense loss {baseline:.4f}; sparsity of the {percent}% of neurons: {levels}")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m evals.paper.entangled_neurons", "model": label(model),
        "dataset": Path(dataset).name, "percent": percent, "sparsity": levels,
        "dense_loss": baseline, "loss": found,
    }  # fmt: skip
    json_file.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, plot)


def draw(content: dict, path: Path) -> None:
    """Loss increase against sparsity, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4))
    for criterion, runs in content["loss"].items():
        losses = torch.tensor(runs) - content["dense_loss"]
        style = dict(linewidth=3) if criterion == "wasserstein" else {}
        (line,) = axes.plot(content["sparsity"], losses.mean(dim=0), label=criterion, **style)
        axes.fill_between(
            content["sparsity"], losses.min(dim=0).values, losses.max(dim=0).values,
            color=line.get_color(), alpha=0.15, linewidth=0,
        )  # fmt: skip
    axes.set_xlabel(f"sparsity of the chosen {content['percent']:g}% of each MLP linear's neurons")
    axes.set_ylabel("increase of held-out loss (nats per token)")
    axes.set_title(f"{content['model']}: which neurons can bear sparsity?")
    axes.legend(frameon=False)
    write_plot(figure, path)


if __name__ == "__main__":
    typer.run(main)
