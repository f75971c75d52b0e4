"""Claim (b), the paper's Fig. 7: what predicts a neuron's improvement under expansion?

    python -m evals.paper.improvement [--seeds 3] [--json FILE] [--plot FILE]

Every MLP linear of the dense model is pruned once by SparseGPT and once with 16 experts, at one
sparsity; a neuron's relative improvement is RMSE(SparseGPT) / RMSE(experts) on held-out tokens.
It is compared with the neuron's Wasserstein distance, excess kurtosis, base error and weight norm:
R2 of a straight line through each, per linear, averaged over linears. The control splits the same
tokens at random into clusters of the same sizes: whatever improves there is not due to the input.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from evals.allocation import held_out_texts, training_texts
from evals.paper.inputs import label, mlp_linears, record, write_plot
from evals.perplexity import load_model, read_texts
from evals.pocket import MODEL
from wexpand_plugin.method.clusters import fit_router
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.neurons import neuron_scores
from wexpand_plugin.method.solvers.sparsegpt import solve

__all__ = ["improvement"]

ROW = MaskStructure.parse("row")


def cluster_hessians(x: Tensor, labels: Tensor, experts: int, shrinkage: float = 0.03) -> Tensor:
    """Mean of x x^T per cluster, small ones mixed with the mean over all tokens."""
    total = x.t() @ x / len(x)
    found = []
    for expert in range(experts):
        part = x[labels == expert]
        share = shrinkage * x.shape[1] / (len(part) + shrinkage * x.shape[1])
        found.append((1 - share) * part.t() @ part / max(1, len(part)) + share * total)
    return torch.stack(found)


def improvement(
    weight: Tensor, x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, sparsity: float
) -> tuple[Tensor, Tensor]:
    """(relative improvement, RMSE of SparseGPT) of each neuron on `test` tokens."""
    experts = int(labels.max()) + 1
    base = solve(weight, (x.t() @ x / len(x))[None], sparsity, ROW).weights[0]
    own = solve(weight, cluster_hessians(x, labels, experts), sparsity, ROW).weights
    base_error = (test @ (base - weight).t()).square().sum(dim=0)
    own_error = torch.zeros_like(base_error)
    for expert in range(experts):
        own_error += (test[test_labels == expert] @ (own[expert] - weight).t()).square().sum(dim=0)
    return (base_error / own_error).sqrt(), (base_error / len(test)).sqrt()


def r_squared(a: Tensor, b: Tensor) -> float:
    """Of a straight line."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1] ** 2)


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/improvement.json"),
    plot: Annotated[Path, typer.Option()] = Path("evals/results/improvement.png"),
    model: Annotated[str, typer.Option()] = str(MODEL),
    dataset: Annotated[str, typer.Option()] = "pocket",
    sparsity: Annotated[float, typer.Option()] = 0.8,
    experts: Annotated[int, typer.Option()] = 16,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Relative improvement of neurons against what might predict it."""
    from transformers import AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), load_model(model)
    linears = mlp_linears(network)
    held_out = held_out_texts(dataset)
    texts = read_texts(held_out) if isinstance(held_out, str) else held_out
    tests = record(network, tokenizer, texts, tokens // 2)
    rows, points = [], {}
    for seed in range(seeds):
        inputs = record(network, tokenizer, training_texts(dataset, seed), tokens)
        for name, linear in linears.items():
            weight, x, test = linear.weight.detach(), inputs[name], tests[name]
            router = fit_router(x[:8192], experts, restarts=2, seed=seed)
            labels, test_labels = router.route(x), router.route(test)
            mix = torch.Generator().manual_seed(seed)
            chance = labels[torch.randperm(len(labels), generator=mix)]
            test_chance = test_labels[torch.randperm(len(test_labels), generator=mix)]
            gain, error = improvement(weight, x, labels, test, test_labels, sparsity)
            control, _ = improvement(weight, x, chance, test, test_chance, sparsity)
            scores = neuron_scores(x, weight, pairs=1000, seed=seed)
            predictors = {
                "wasserstein": scores.wd, "kurtosis": scores.kurtosis, "base error": error,
                "weight norm": weight.norm(dim=1),
            }  # fmt: skip
            row = {"seed": seed, "linear": name, "improvement": float(gain.median()),
                   "control": float(control.median())}  # fmt: skip
            row |= {f"R2 {k}": r_squared(v, gain) for k, v in predictors.items()}
            row |= {f"R2 control {k}": r_squared(v, control) for k, v in predictors.items()}
            rows.append(row)
            if seed == 0:
                points[name] = (scores.wd, gain, control)
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
    summary = {}
    for key in [k for k in rows[0] if k not in ("seed", "linear")]:
        per_seed = [statistics.mean(r[key] for r in rows if r["seed"] == s) for s in range(seeds)]
        deviation = statistics.stdev(per_seed) if seeds > 1 else 0.0
        summary[key] = {"mean": statistics.mean(per_seed), "stdev": deviation}
        print(f"{key:28} {summary[key]['mean']:.3f} +- {deviation:.3f}")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps({
        "command": "python -m evals.paper.improvement", "model": label(model),
        "dataset": Path(dataset).name, "sparsity": sparsity, "experts": experts,
        "summary": summary, "rows": rows,
    }, indent=1) + "\n")  # fmt: skip
    draw(points, summary, label(model), plot)


def draw(points: dict, summary: dict, model: str, path: Path) -> None:
    """Improvement against Wasserstein distance, clusters and control, all linears."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4))
    wd, gain, control = (torch.cat([p[i].float() for p in points.values()]) for i in range(3))
    axes.scatter(wd, control, s=3, alpha=0.4, color="#999999", label="random split of tokens")
    axes.scatter(wd, gain, s=3, alpha=0.4, color="#0072b2", label="clusters of inputs")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("Wasserstein distance of the neuron to N(0, 1)")
    axes.set_ylabel("RMSE of SparseGPT / RMSE of 16 experts")
    axes.set_title(f"{model}: R2 {summary['R2 wasserstein']['mean']:.2f} (mean over linears)")
    axes.legend(frameon=False, markerscale=4)
    write_plot(figure, path)


if __name__ == "__main__":
    typer.run(main)
