"""Time and bytes: tables of docs/performance.md and README."""

from collections.abc import Iterable
from typing import Any

from .results import machine, paragraph, percent, results, table

__all__ = ["TABLES", "block_ratio"]

STEPS = ("prefill", "decode 1", "decode 4", "decode 16")


def serve() -> str:
    """Whole models, ours beside what one would take instead."""
    found = results("serve_contenders")

    def label(name: str) -> str:
        model = found["models"][name]
        llama = model["engine"].startswith("llama")
        if not llama and model["read_per_token"] is not None and name != "dense":
            return f"**{_ours(name)}**"
        return f"{'llama.cpp' if llama else 'vLLM'}, {_theirs(name)}"

    return _served(found, {name: [label(name)] for name in found["models"]}, [""])


def serve_sizes() -> str:
    """The dial's models of a real model."""
    found = results("serve_sizes")
    first = {
        name: [name, f"{model['resident'] / 1e6:.0f}"] for name, model in found["models"].items()
    }
    return _served(found, first, ["", "memory MB"])


def _served(found: dict[str, Any], first: dict[str, list[str]], head: list[str]) -> str:
    """Size and speed of whole models, after their `first` cells."""
    rows = {(row["model"], row["what"]): row for row in found["rows"]}
    steps = list(dict.fromkeys(row["what"] for row in found["rows"]))
    lines = []
    for name, model in found["models"].items():
        cells = []
        for step in steps:
            row = rows[name, step]
            ratio = "" if name == "dense" else f", {row['ratio']:.2f}x"
            cells.append(f"{row['tokens_per_s']:.0f}{ratio}")
        lines.append([*first[name], f"{model['disk'] / 1e6:.0f}", *cells])
    return table([*head, "disk MB", *(_step(step) for step in steps)], lines)


def _ours(name: str) -> str:
    first, _, rest = name.partition(" ")
    return f"{first} zeros, {rest}" if first.endswith("%") and "," not in rest else name


def _theirs(name: str) -> str:
    return "dense bfloat16" if name == "dense" else name


def _step(step: str) -> str:
    what, _, count = step.partition(" ")
    return f"decode of {count}" if count else "prefill of 512"


def serve_setting() -> str:
    """What the table above was measured on."""
    found = results("serve_contenders")
    return paragraph(
        f"vLLM as a whole on {machine(found['machine'])}: {found['layers']} blocks of TinyLlama's "
        f"shape (width {found['hidden']}) in {found['dtype']}, random weights. Tokens per second, "
        "and how many times as fast as dense: medians of rounds, of speeds and of ratios "
        f"(`{found['command']} --llama PYTHON`, evals/results/serve_contenders.json)."
    )


def serve_sizes_setting() -> str:
    """What the table of sizes was measured on."""
    found = results("serve_sizes")
    again = "The rows from the second dense one on are of another run. " * (
        "dense, again" in found["models"]
    )
    return paragraph(
        f"{found['model']} in vLLM, dense and at sizes of the dial, on {machine(found['machine'])}:"
        f" tokens per second, and how many times the dense model's that is. {again}"
        f"(`{found['command']} --model DIR --expanded DIR ...`, evals/results/serve_sizes.json)"
    )


def serve_short() -> str:
    """Where it is faster, where not."""
    found = results("serve_contenders")
    ratio = {(row["model"], row["what"]): row["ratio"] for row in found["rows"]}
    half, experts = "50% int4", "50% int4, 16 experts, size 0.5"
    return paragraph(
        f"Half zeros in int4 decode one sequence {ratio[half, 'decode 1']:.2f} times as fast as "
        f"dense bfloat16, sixteen sequences {ratio[half, 'decode 16']:.2f} times, and prefill "
        f"{ratio[half, 'prefill']:.2f} times. llama.cpp's Q4_0 is faster for one sequence "
        f"({ratio['Q4_0', 'decode 1']:.2f} times dense), vLLM's W8A8 for prefill and for sixteen. "
        f"Experts slow batches: {ratio[experts, 'decode 16']:.2f} times dense at sixteen sequences."
    )


def compress_shapes() -> str:
    """Single blocks of real models' shapes."""
    lines = []
    for shape, found in results("compress")["shapes"].items():
        for name, row in found["median"].items():
            cpu = [f"{row['cpu_s']:.0f}", f"{row['cpu_ratio']:.1f}x"]
            peak = [f"{row['peak_mib'] / 1024:.1f}", f"{row['peak_ratio']:.1f}x"]
            lines.append([shape, name, *cpu, *peak])
    return table(["a block of", "", "CPU s", "", "peak GiB", ""], lines)


def compress_setting() -> str:
    """What the tables of compressing were measured with."""
    found = results("compress")
    growth = ", ".join(
        f"{name} {one['exponent']:.2f}" for name, one in found["exponents"].items()
    )
    return paragraph(
        f"`{found['command']} --rounds 1`, evals/results/compress.json; one core of "
        f"{machine(found['machine']).split(' of ', 1)[1]} beside other work. How the CPU time of "
        f"a block grows, as an exponent of the number of experts, tokens, and columns: {growth}."
    )


def compress_minutes() -> str:
    """How long it takes to compress a real model."""
    found = results("size_curve")
    rows = found["rows"]

    def minutes(name: str) -> str:
        return f"{rows[name]['seconds'] / 60:.0f}"

    one_shot, tuned = minutes("mlp: ours 4.25"), minutes("mlp: ours 4.25 tuned")
    return paragraph(
        f"How long {found['model']} takes, its MLP linears with 64k calibration tokens, on one "
        f"core of an AMD EPYC beside other work: the dial at 4.25 bits {one_shot} minutes, tuned "
        f"{tuned}; GPTQModifier with 4 bits {minutes('mlp: GPTQ 4')} "
        f"(`{found['command']}`, evals/results/size_curve.json)."
    )


Cells = list[dict[str, Any]]


def block_ratio(cells: Cells, **wanted: Any) -> float:
    """Dense time over packed time of all linears of a block, by medians."""
    found = [r for r in cells if all(r[key] == value for key, value in wanted.items())]
    if len(found) != 4:  # qkv, o, gate_up, down
        raise ValueError(f"{len(found)} linears with {wanted}, not the 4 of a block")
    return sum(r["dense_s"]["median"] for r in found) / sum(r["packed_s"]["median"] for r in found)


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def kernel_values() -> str:
    """One block's linears by values and zeros."""
    cells = results("kernel_cpu_values")["results"]
    sparsity = _in_order(r["sparsity"] for r in cells)
    lines = []
    for tokens in _in_order(r["tokens"] for r in cells):
        for values in _in_order(r["values"] for r in cells):
            keys = {"tokens": tokens, "values": values}
            ratios = [block_ratio(cells, sparsity=s, **keys) for s in sparsity]
            label = f"{tokens} token{'s' * (tokens > 1)}, {values}"
            lines.append([label, *(f"{ratio:.2f}x" for ratio in ratios)])
    return table(["", *(_zeros(s) for s in sparsity)], lines)


def _zeros(sparsity: str) -> str:
    return percent(float(sparsity)) if float(sparsity) else "no zeros"


def kernel_setting() -> str:
    """What the table of values was measured on."""
    found = results("kernel_cpu_values")
    return paragraph(
        "One linear at a time, all linears of a TinyLlama-1.1B block, one expert, on "
        f"{machine(found['machine'])} (memory is read at "
        f"{found['memory_read_bytes_per_s'] / 1e9:.0f} GB/s), against the bfloat16 linear that "
        "vLLM's own CPU path runs (oneDNN): dense time over packed time. `python -m "
        "evals.bench.kernel --quick --dtype bfloat16 --experts 1` with `--values` and `--sparsity` "
        "(evals/results/kernel_cpu_values.json)."
    )


def kernel_floats() -> str:
    """The kernel before int8 and int4."""
    cells = results("kernel_cpu")["results"]
    sparsity = _in_order(r["sparsity"] for r in cells)

    def line(dtype: str, tokens: int, experts: int) -> list[str]:
        keys = {"dtype": dtype, "tokens": tokens, "experts": experts}
        name = f"{dtype}, {tokens} token{'s' * (tokens > 1)}" + ", 16 experts" * (experts > 1)
        return [name, *(f"{block_ratio(cells, sparsity=s, **keys):.2f}x" for s in sparsity)]

    lines = [
        line(dtype, tokens, experts)
        for experts in _in_order(r["experts"] for r in cells)
        for dtype in ("float32", "bfloat16")
        for tokens in sorted({r["tokens"] for r in cells})
    ]
    return table(["", *(_zeros(s) for s in sparsity)], lines)


def kernel_avx2() -> str:
    """The same on a CPU without AVX-512.

    Not with many tokens in bfloat16, whose dense product is slow there beyond comparison.
    """
    found = results("kernel_cpu_avx2")["results"]
    cells = [r for r in found if r["dtype"] == "float32" or r["tokens"] == 1]
    sparsity = _in_order(r["sparsity"] for r in cells)
    lines = [
        [f"{dtype}, {tokens} token{'s' * (tokens > 1)}",
         *(f"{block_ratio(cells, sparsity=s, dtype=dtype, tokens=tokens):.2f}x" for s in sparsity)]
        for dtype in ("float32", "bfloat16")
        for tokens in sorted({r["tokens"] for r in cells if r["dtype"] == dtype})
    ]  # fmt: skip
    return table(["", *(_zeros(s) for s in sparsity)], lines)


def serve_floats() -> str:
    """Whole models at 80% sparsity, 16- and 32-bit values."""
    both = [results("serve_cpu_float32"), results("serve_cpu_bfloat16")]
    models = ["sparse 80%", "expanded 80%, 16 experts, size 1.0"]

    def ratios(model: str, what: str) -> str:
        return " / ".join(
            f"{row['ratio']:.2f}x"
            for found in both
            for row in found["rows"]
            if row["model"] == model and row["what"] == what
        )

    def share(model: str, which: int) -> str:
        return " / ".join(
            f"{f['bytes'][model][which] / f['bytes']['dense'][which]:.2f}" for f in both
        )

    lines = [[_step(step), *(ratios(model, step) for model in models)] for step in STEPS]
    lines.append(["linears' bytes stored, of dense", *(share(model, 0) for model in models)])
    lines.append(["... read per token", *(share(model, 1) for model in models)])
    return table(["float32 / bfloat16", "one expert", "16 experts, dense size"], lines)


def compress_cost() -> str:
    """Time and memory of compressing."""
    found = results("compress")
    lines = [
        [name, f"{row['cpu_ratio']:.1f}x", f"{row['peak_ratio']:.1f}x"]
        for name, row in found["median"].items()
    ]
    return table(["", "CPU time", "peak memory"], lines)


def load() -> str:
    """Time to load."""
    found = results("load")
    hosts = _in_order(row["host"] for row in found["seconds"])
    now = {
        (row["host"], row["page_cache"]): row["median"]
        for row in found["seconds"]
        if row["tree"] == "after"
    }
    lines = [[host, *(f"{now[host, cache]:.1f} s" for cache in ("warm", "cold"))] for host in hosts]
    head = [f"{found['bytes']['after'] / 1e9:.2f} GB", "files in the page cache", "not"]
    return table(head, lines)


def packed_short() -> str:
    """What packing did to the model of `make demo`."""
    dense, small = (results("demo")[name] for name in ("dense", "sparsegpt"))
    return paragraph(
        "The pocket model of this repository, its MLP linears pruned to 80% by llm-compressor's "
        f"SparseGPT, in bfloat16 (`make demo`): {dense['disk_bytes'] / 1e6:.2f} MB become "
        f"{small['disk_bytes'] / 1e6:.2f} MB, and the pruned linears "
        f"{small['linear_bytes'] / dense['linear_bytes']:.2f} of their size."
    )


def packed() -> str:
    """Pruned models, packed: evals.pruned."""
    found = results("pruned")["results"]
    lines = [
        [name.replace(" 0.5", " 50%"), f"{row['bytes_per_weight']:.3f}", f"{row['formula']:.3f}",
         "yes" if row["unpack_equal"] else "no", "yes" if row["greedy_equal"] else "no",
         f"{row['max_logprob_difference']:.0e}"]
        for name, row in found.items()
    ]  # fmt: skip
    head = ["", "bytes per weight", "2(1-s) + 1/8", "same bits unpacked", "same text",
            "log-probabilities differ by"]  # fmt: skip
    return table(head, lines)


TABLES = (
    serve, serve_setting, serve_short, kernel_values, kernel_setting, kernel_floats, kernel_avx2,
    serve_floats, compress_cost, compress_setting, compress_shapes, compress_minutes,
    load, packed, packed_short,
    serve_sizes, serve_sizes_setting,
)  # fmt: skip
