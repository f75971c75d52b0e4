"""What the same bytes do when they are spent otherwise: experts, cluster biases, low rank, fewer
zeros; and what models of a size score on common tasks."""

from statistics import mean

from .results import paragraph, results, spread, table

__all__ = ["TABLES"]

TASKS = {
    "arc_easy": "ARC-easy", "piqa": "PIQA", "boolq": "BoolQ", "openbook_qa": "OpenBookQA",
    "winogrande": "WinoGrande", "blimp": "BLiMP",
}  # fmt: skip


def low_rank() -> str:
    """A low-rank correction against fewer zeros."""
    found = results("low_rank")
    rows = found["rows"]
    head = ["bytes added, of dense", "low-rank correction", "fewer zeros"]
    kinds = [name.removeprefix("low rank ") for name in rows[0] if name.startswith("low rank ")]
    lines = [
        [share, spread([row[f"low rank {share}"] for row in rows]),
         spread([row[f"fewer zeros {share}"] for row in rows])]
        for share in kinds
    ]  # fmt: skip
    setting = (
        f"Loss added by one mask with {found['sparsity']:.0%} zeros, "
        f"{spread([row['one mask'] for row in rows])} at {found['stored']:.2f} of the dense bytes, "
        "once these are added to it; mean and deviation of seeds, not tuned "
        f"(`{found['command']}`, evals/results/low_rank.json):"
    )
    return f"{paragraph(setting)}\n\n{table(head, lines)}"


def spending() -> str:
    """Experts, cluster biases, low rank and fewer zeros, all tuned alike, by bytes stored."""
    return _spending("experts", results("clusters")["dense"], "Pocket model, MLP linears")


def spending_real() -> str:
    """The same on a real model."""
    dense, *_ = results("experts_smollm2")["rows"]
    what = f"{dense['model']}, MLP linears of six of its blocks, one seed"
    return _spending("experts_smollm2", dense["loss"], what)


def _spending(name: str, dense: float, what: str) -> str:
    found = results(name)
    rows: dict[str, list[dict[str, float]]] = {}
    for row in found["rows"]:
        label = row["name"].replace(", random", ", centres at random")
        if label == "one mask":
            label = f"**one mask, {row['sparsity']:.1%} zeros**"
        elif label != "dense":
            label += f", {row['sparsity']:.0%} zeros"
        if label != "dense":
            rows.setdefault(label, []).append(row)
    lines = []
    for label, own in sorted(rows.items(), key=lambda item: (item[1][0]["stored"], item[0])):
        losses = [row["loss"] - dense for row in own]
        said = spread(losses) if len(own) > 1 else f"{losses[0]:.3f}"
        lines.append([label, f"{own[0]['stored']:.2f}", f"{own[0]['read']:.3f}", said])
    setting = (
        f"{what}, {found['rows'][0]['epochs']} epochs of tuning each, over the dense loss of "
        f"{dense:.3f}; mean and deviation of seeds where there are several (`{found['command']}`, "
        f"evals/results/{name}.json):"
    )
    head = ["", "stored, of dense", "read", "loss added"]
    return f"{paragraph(setting)}\n\n{table(head, lines)}"


def scores() -> str:
    """lm-eval's accuracies."""
    found = results("lm_tasks")
    items = found["rows"]["dense"]["piqa"]["items"]
    error = max(row[task]["acc_stderr"] for row in found["rows"].values() for task in TASKS)
    setting = (
        f"Accuracy, with standard errors up to {error:.3f}, on {items} items of each task, "
        f"{TASKS['blimp']} on {found['rows']['dense']['blimp']['items']}, without examples, by "
        f"lm-eval through vLLM (`{found['command']}`, evals/results/lm_tasks.json). "
        "SmolLM2-135M-Instruct, all linears of the blocks; ours are of before columns with large "
        "inputs came first:"
    )
    guess, dense = found["guess"], found["rows"]["dense"]
    tell = [t for t in TASKS if dense[t]["acc"] > guess[t] + 2 * dense[t]["acc_stderr"]]
    own = {name: {task: row[task]["acc"] for task in TASKS} for name, row in found["rows"].items()}
    lines = [
        [name, *(f"{row[task]:.3f}" for task in TASKS), f"{mean(row[task] for task in tell):.3f}"]
        for name, row in ({"always the same answer": guess} | own).items()
    ]
    note = (
        "The mean is of the tasks that can tell models apart, those on which the dense model is "
        "better than one answer for all by two standard errors: "
        f"{', '.join(TASKS[task] for task in tell)}."
    )
    head = ["", *TASKS.values(), "mean"]
    return f"{paragraph(setting)}\n\n{table(head, lines)}\n\n{paragraph(note)}"


TABLES = (low_rank, spending, spending_real, scores)
