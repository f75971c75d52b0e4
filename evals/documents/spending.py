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
    """What experts and cluster biases add, and one mask of as many bytes, all tuned alike."""
    found = results("experts")
    dense = results("low_rank")["dense_loss"]
    losses: dict[str, list[float]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for row in found["rows"]:
        losses.setdefault(row["name"], []).append(row["loss"] - dense)
        sizes.setdefault(row["name"], (row["stored"], row["read"]))

    def said(name: str) -> str:
        own = losses.get(name, [])
        return spread(own) if len(own) > 1 else "".join(f"{loss:.3f}" for loss in own)

    lines = []
    for name in losses:
        if name.startswith("one mask, ") or name.endswith(", random"):
            continue
        stored, read = sizes[name]
        lines.append([
            name, f"{stored:.2f}", f"{read:.2f}", said(name), said(f"{name}, random"),
            said(f"one mask, stored as {name}"), said(f"one mask, read as {name}"),
        ])  # fmt: skip
    head = ["", "stored, of dense", "read", "loss added", "random centres",
            "mask of the bytes stored", "mask of the bytes read"]  # fmt: skip
    return table(head, lines)


def scores() -> str:
    """lm-eval's accuracies."""
    found = results("lm_tasks")
    lines = []
    for name, row in found["rows"].items():
        every = [row[task]["acc"] for task in TASKS]
        cells = [f"{row[t]['acc']:.3f} +- {row[t]['acc_stderr']:.3f}" for t in TASKS]
        lines.append([name, *cells, f"{mean(every):.3f}"])
    return table(["", *TASKS.values(), "mean"], lines)


TABLES = (low_rank,)
