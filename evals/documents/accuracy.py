"""What compression costs in loss: tables of docs/accuracy.md and README."""

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from evals.real_model import TOKENS

from .results import paragraph, percent, results, spread, table

__all__ = ["HOW", "TABLES", "Point", "real_model_points"]

HOW = ("", " tuned", " tuned as a whole")
"""how names of rows of evals.real_model end: one-shot, by blocks, and then through the model"""
FEWER = " tuned in "
"""... and of those that had fewer epochs, of more text"""

Point = tuple[float, float]
"""bits per weight, loss added"""


def _bits(name: str, row: dict[str, Any]) -> float:
    """Bits per weight; of GPTQModifier's rows computed: 16 bits of scale for 64 values."""
    if "bits_stored" in row:
        return row["bits_stored"]
    return int(name.split()[1]) + 16 / 64


def _label(name: str) -> str:
    """A row of evals.real_model, in words."""
    kind, *rest = name.split()
    if kind == "GPTQ":
        return f"llm-compressor's GPTQModifier, {rest[0]} bits"
    if kind.startswith("int"):
        return f"`values: {' '.join([f'{kind}`', *rest])}"
    zeros = f"{kind} zeros" if kind.endswith("%") else kind
    if rest[1:] == ["by", "linear"]:
        return f"{zeros} on average, {rest[0]} values"
    return f"{zeros}, {' '.join(rest)} values" if rest else zeros


def _how(name: str) -> tuple[str, int]:
    """Name of a row without how it was tuned, and its place in `HOW`."""
    place = max(place for place, how in enumerate(HOW) if name.endswith(how))
    return name.removesuffix(HOW[place]), place


def real_model_points() -> dict[str, list[Point | None]]:
    """Row -> the point of each of `HOW`, where it was run; most bits first."""
    rows = results("real_model")["rows"]
    found: dict[str, list[Point | None]] = {}
    for name, row in rows.items():
        if name == "dense" or FEWER in name or name.endswith(" tokens"):
            continue
        plain, place = _how(name)
        points = found.setdefault(plain, [None] * len(HOW))
        points[place] = (_bits(name, row), row["loss"] - rows["dense"]["loss"])
    return dict(
        sorted(found.items(), key=lambda item: (-max(p[0] for p in item[1] if p), item[0]))
    )


def _nats(point: Point | None) -> str:
    return "" if point is None else f"{point[1]:.3f}".replace("-0.000", "0.000")


def real_model() -> str:
    """Loss against bits on SmolLM2."""
    lines = []
    for name, points in real_model_points().items():
        bits = next(p[0] for p in points if p)
        lines.append([_label(name), f"{bits:.2f}", *map(_nats, points)])
    head = ["", "bits per weight", "loss added", "tuned by blocks", "and as a whole"]
    return table(head, lines)


def real_model_setting() -> str:
    """What was run, and the dense loss."""
    found = results("real_model")
    return paragraph(
        f"{found['model']}, MLP linears, calibrated on WikiText-2's validation text and measured "
        f"on its test text. Loss added to the dense model's {found['rows']['dense']['loss']:.3f} "
        "nats per token; bits per weight of those linears, scales and masks included; one run "
        f"each (`{found['command']}`, evals/results/real_model.json; bits of GPTQModifier's rows "
        "are computed)."
    )


def real_model_short() -> str:
    """The comparisons that decide what to take, one-shot, and what tuning gains."""
    points = real_model_points()

    def said(name: str) -> str:
        bits, added = next(point for point in points[name] if point)
        return f"{added:.3f} at {bits:.2f} bits"

    tuned = [point for point in points["int3"][1:] if point]
    least = min((point[1] for point in tuned), default=None)
    after = "" if least is None else f" Tuned as in recipe `int3`, `values: int3` adds {least:.3f}."
    return paragraph(
        "What SmolLM2-135M loses where its MLP linears alone are compressed, in nats per token "
        f"more than the dense model: `values: int4` {said('int4')} per weight (llm-compressor's "
        f"GPTQModifier {said('GPTQ 4 bits')}); half zeros with 4-bit values "
        f"{said('50% int4')}; `values: int3` {said('int3')} (GPTQModifier {said('GPTQ 3 bits')}). "
        f"Nothing is tuned there.{after}"
    )


def real_model_more_text() -> str:
    """More text for fewer epochs of tuning."""
    rows = results("real_model")["rows"]
    dense, lines = rows["dense"]["loss"], []
    for name, row in rows.items():
        kind, _, tokens = name.partition(", ")
        plain, found, how = kind.partition(FEWER)
        if found or tokens:
            epochs, _, rate = (how or "0").partition(" epochs")
            by_blocks, _, whole = epochs.partition(" and ")
            by_blocks += rate.replace("at", "at a rate of")
            tokens = tokens.removesuffix(" tokens") or str(TOKENS)
            lines.append((plain, int(tokens), by_blocks, whole or "0", row["loss"] - dense))
    for plain in {line[0] for line in lines}:
        if (row := rows.get(plain + HOW[2])) is not None:
            lines.append((plain, TOKENS, "8", "2", row["loss"] - dense))
    if not lines:
        return "More text for fewer epochs of tuning has not been measured yet."
    head = ["", "calibration tokens", "epochs by blocks", "through the model", "loss added"]
    return table(head, [
        [_label(plain), f"{tokens:,}", by_blocks, whole, f"{loss:.3f}"]
        for plain, tokens, by_blocks, whole, loss in sorted(lines)
    ])  # fmt: skip


def real_model_others() -> str:
    """The same models on text of other kinds, where that was measured."""
    rows = results("real_model")["rows"]
    dense = rows["dense"].get("others", {})
    lines = [
        [
            _label(plain) + "," * (plain != kind) + kind.removeprefix(plain),
            *(f"{row['others'][t] - dense[t]:.3f}" for t in dense),
        ]
        for name, row in rows.items()
        if (kind := name.partition(", ")[0]) != "dense"
        and (plain := _how(kind.partition(FEWER)[0])[0])
        and row.get("others", {}).keys() >= dense.keys()
    ]
    if not dense or not lines:
        return "On text of other kinds nothing has been measured yet (`--other FILE`)."
    named = [{"pocket": "Python's library"}.get(text, text.capitalize()) for text in dense]
    texts = ", ".join(f"{loss:.3f} on {n}" for n, loss in zip(named, dense.values(), strict=True))
    return f"{paragraph(f'Loss added on text of other kinds, to the dense {texts}:')}\n\n" + table(
        ["", *named], lines
    )


Cells = list[dict[str, Any]]


def _cells(**wanted: Any) -> Cells:
    """Cells of evals.allocation with these settings and no others, by seed."""
    found = [
        cell
        for cell in results("allocate_by")["cells"]
        if {k: v for k, v in cell["cell"].items() if k != "seed"} == wanted
    ]
    return sorted(found, key=lambda cell: cell["cell"]["seed"])


def _budget(sparsity: float, by: str = "gain", size: float = 1.0) -> Cells:
    return _cells(sparsity=sparsity, num_experts=16, size_budget=size, allocate_by=by, path="full")


def _recovered(one: Cells, full: Cells, budget: Cells) -> list[float]:
    """Of what full experts gain over one mask, the share that a budget keeps, by seed."""
    return [
        (a["loss"] - c["loss"]) / (a["loss"] - b["loss"])
        for a, b, c in zip(one, full, budget, strict=True)
    ]


def experts() -> str:
    """Experts on the pocket model at 80 and 90%."""
    columns = (0.8, 0.9)
    one = {s: _cells(sparsity=s, num_experts=1) for s in columns}
    full = {s: _cells(sparsity=s, num_experts=16) for s in columns}
    budget = {s: _budget(s) for s in columns}
    equal = {s: _cells(sparsity=t, num_experts=1) for s, t in ((0.8, 0.7664), (0.9, 0.8649))}

    def row(label: str, value: Callable[[float], str]) -> list[str]:
        return [label, *(value(s) for s in columns)]

    def loss(cells: dict[float, Cells]) -> Callable[[float], str]:
        return lambda s: spread([cell["loss"] for cell in cells[s]])

    stored = " and ".join(f"{full[s][0]['stored']:.2f}" for s in columns)
    denser = " and ".join(percent(equal[s][0]["cell"]["sparsity"]) for s in columns)
    return table(
        ["", *(percent(s) for s in columns)],
        [
            row("SparseGPT, one mask", loss(one)),
            row(f"16 full experts: {stored} times the dense bytes", loss(full)),
            row("16 experts, `size_budget: 1.0`", loss(budget)),
            row(
                "... of the full experts' gain",
                lambda s: percent(mean(_recovered(one[s], full[s], budget[s]))),
            ),
            row(
                "... bytes read per token, of dense",
                lambda s: f"{mean(cell['read'] for cell in budget[s]):.2f}",
            ),
            row(f"one mask that reads as much ({denser} sparse)", loss(equal)),
        ],
    )


def recipe_recovers() -> str:
    """The recipe itself, run end to end."""
    rows = results("recipe")["rows"]
    said = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        variants = [
            sorted(
                (r for r in rows if r["variant"] == v and r["sparsity"] == sparsity),
                key=lambda r: r["seed"],
            )
            for v in ("one expert", "full", "budget")
        ]
        shares = [100 * share for share in _recovered(*variants)]
        said.append(f"{mean(shares):.1f} +- {stdev(shares):.1f}% at {sparsity:.0%}")
    return paragraph(
        f"The recipe itself, run end to end and read back by transformers "
        f"(`{results('recipe')['command']}`), recovers {' and '.join(said)} of that gain."
    )


def allocate_by() -> str:
    """What the budget is spent on."""
    columns = (0.7, 0.8, 0.9)
    names = {c["cell"]["allocate_by"] for c in results("allocate_by")["cells"]
             if "allocate_by" in c["cell"]}  # fmt: skip
    shares = {}
    for name in names:
        shares[name] = [
            _recovered(
                _cells(sparsity=s, num_experts=1), _cells(sparsity=s, num_experts=16),
                _budget(s, name),
            )
            for s in columns
        ]  # fmt: skip
    order = sorted(names, key=lambda name: -sum(mean(cell) for cell in shares[name]))
    return table(
        ["`allocate_by`", *(percent(s) for s in columns)],
        [
            [f"`{n}`", *(f"{100 * mean(c):.0f} +- {100 * stdev(c):.0f}%" for c in shares[n])]
            for n in order
        ],
    )


def clusters() -> str:
    """Cluster biases on the pocket model."""
    rows = results("clusters")["rows"]
    lines = [
        [str(r["clusters"] or "none"), f"{r['tokens']}", f"{r['added']:.3f}",
         f"{r['stored']:.2f}", f"{r['read']:.2f}"]
        for r in sorted(rows, key=lambda r: (r["tokens"], r["clusters"]))
    ]  # fmt: skip
    head = ["clusters", "calibration tokens", "loss added", "bytes stored, of dense", "read"]
    return table(head, lines)


def dial() -> str:
    """What a plan predicts, and what came out."""
    found = results("dial")
    lines = []
    for row in sorted(found["rows"], key=lambda row: -row["stored"]):
        if "sensitivity" in row:  # by an earlier way of predicting
            continue
        name = row["run"] + (f", tuned ({row['epochs']} epochs)" if row["epochs"] else "")
        predicted = f"{row['predicted']:.3f}" if "predicted" in row else ""
        lines.append([name, f"{row['stored']:.3f}", f"{row['added']:.3f}", predicted])
    return table(["", "size, of dense", "loss added", "predicted"], lines)


def paper() -> str:
    """The paper's claims, in two sentences."""
    neurons = results("evidence/pocket/entangled_neurons")["seeds"].values()
    gains = results("evidence/pocket/improvement")["seeds"].values()

    def last(name: str) -> float:
        return mean(seed["added"]["0.95"][name] for seed in neurons)

    r2 = mean(row["R2"]["WD"] for seed in gains for row in seed["rows"])
    return paragraph(
        "That the 3% of neurons with the highest Wasserstein distance bear sparsity worst holds on "
        "the pocket model: at 95% sparsity of these neurons alone the loss rises by "
        f"{last('WD'):.2f}, with random neurons instead by {last('random'):.2f} (`python -m "
        "evals.paper.entangled_neurons`). That they gain most from experts does not hold: the "
        f"distance explains a share of {r2:.3f} of the variance of the gain (`python -m "
        "evals.paper.improvement`). All hypotheses with their verdicts, on a real model too: "
        "[evidence.md](evidence.md)."
    )


def demo() -> str:
    """What `make demo` prints at its end."""
    from evals.demo import table as text

    return f"```text\n{text(results('demo'))}\n```"


TABLES = (
    real_model, real_model_more_text, real_model_others, real_model_setting, real_model_short,
    experts, recipe_recovers, allocate_by, clusters, dial, paper, demo,
)  # fmt: skip
