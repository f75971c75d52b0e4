"""One linear at a time: dense as a device runs it best against packed, side by side.

    python -m evals.bench.kernel [--quick] [--kernel cpu|triton|reference] [--device cpu|cuda]
        [--dtype bfloat16] [--values int4] [--sparsity 0.5] [--experts 1] [--clusters 256]
        [--tokens 1] [--layer down] [--json FILE]

Options of a cell may be repeated: `--tokens 1 --tokens 512`. On a CPU run it in the serve
environment: the dense side is then the very function that vLLM's CPU worker calls (its choice is
printed), otherwise, and on a GPU, torch's linear. Times are medians; on a GPU those between two
CUDA events. Weights and masks are random; with several experts each token draws its expert at
random, and only the weight memory differs between experts. With clusters the packed time includes
their router, of two levels, and a bias for each; at the end of the line is that time over that of
the same cell without clusters, measured in turn with it. `floor` is the time that reading a call's
weight bytes takes at the memory bandwidth measured first. Copies of the weights take turns, so they
come from memory and not from cache, as in a model. `values` says how kept weights are stored: in
the dtype of the inputs ("float") or as integers; sparsity 0 is full rows. `ratio` is dense time
over packed time, by medians and by the fastest repetitions (`best`); on a machine with other work a
spread far above 100% says that the medians measure the other work.
"""

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from itertools import product
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from evals.bench.timing import alternate, copies_beyond_cache, machine, read_bandwidth, write_json
from wexpand_plugin import kernels
from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import StoredRouter, rows_read
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import GROUP, ValueCodec, codec
from wexpand_plugin.kernels import cpu

SHAPES = {  # out, in of the linears as vLLM fuses them
    "TinyLlama-1.1B": {
        "qkv": (2560, 2048),
        "o": (2048, 2048),
        "gate_up": (11264, 2048),
        "down": (2048, 5632),
    },
    "Llama-3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}


class Dtype(StrEnum):
    """Of inputs and dense weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPES = (Dtype.float32, Dtype.bfloat16)


class Clusters(NamedTuple):
    """The router of a layer with one expert, and biases, as they are served."""

    router: StoredRouter
    biases: ClusterBias

    @classmethod
    def random(cls, number: int, out: int, width: int, device: str) -> "Clusters":
        """Two levels, of about the square root of `number` rows each."""
        parents = math.ceil(number**0.5)
        weight = torch.randn(parents + number, width).half().to(device)
        router = StoredRouter(weight, torch.zeros(parents + number, device=device), parents)
        return cls(router, ClusterBias.pack(torch.randn(number, out)).to(device))

    @property
    def bytes_read(self) -> int:
        """By one token."""
        rows = rows_read(self.router.clusters, self.router.parents)
        return rows * (2 * self.router.weight.shape[1] + 4) + 3 * self.biases.out_features


class Linear(NamedTuple):
    """What stays the same while sparsities, experts and tokens change."""

    model: str
    layer: str
    dtype: torch.dtype
    device: str
    kernel: kernels.Kernel
    bandwidth: float
    """bytes per second"""
    seconds: float
    """to spend on a cell"""


def dense_linear(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The dense linear of `weight` [out, in], as vLLM runs it on a CPU, and its name."""
    if weight.device.type != "cpu" or importlib.util.find_spec("vllm") is None:
        return lambda x: torch.nn.functional.linear(x, weight), "torch linear"
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    code = getattr(layer.cpu_linear, "__code__", None)
    chosen = [n for n in (code.co_names if code else ()) if "mm" in n or "linear" in n]
    name = f"vLLM {' '.join(chosen) or 'torch linear'}"
    return lambda x: layer.cpu_linear(x, layer.weight, None), name


def random_mask(out: int, width: int, sparsity: str) -> Tensor:
    if sparsity == "2:4":
        pairs = torch.rand(out, width // 4, 4).argsort(dim=2)
        return (pairs < 2).flatten(1)
    return torch.rand(out, width) >= float(sparsity)


def random_pool(out: int, width: int, sparsity: str, experts: int, how: ValueCodec) -> RowPool:
    """`experts` full experts, each in memory of its own; their masks are equal copies."""
    keep = random_mask(out, width, sparsity)
    rows = torch.randn(out, width) * keep
    one = RowPool.pack(rows if how.scaled else rows.to(how.storage), keep=keep, codec=how)
    versions = torch.arange(out).repeat_interleave(experts)
    row_map = torch.arange(experts, dtype=torch.uint8).unsqueeze(1).repeat(1, out)
    return replace(one.take(versions), row_map=row_map if experts > 1 else None)


def measure(
    linear: Linear,
    codecs: list[ValueCodec],
    sparsities: list[str],
    all_experts: list[int],
    all_tokens: list[int],
    number: int = 0,
) -> list[dict]:
    """All codecs, sparsities, expert counts and token counts of one layer and dtype.

    :param number: of clusters, where there is one expert; 0: none
    """
    model, layer, dtype, device, kernel, bandwidth, seconds = linear
    out, width = SHAPES[model][layer]
    dense_bytes = out * width * dtype.itemsize
    weight = torch.randn(out, width).to(device, dtype)
    copies = range(copies_beyond_cache(dense_bytes))
    dense, used = zip(*(dense_linear(weight.clone()) for _ in copies), strict=True)
    results = []
    for how, sparsity, experts in product(codecs, sparsities, all_experts):
        pool = random_pool(out, width, sparsity, experts, how).to(device)
        shape = kernels.LayerShape.of(pool)
        if reason := kernel.unavailable(torch.device(device), dtype, shape):
            raise typer.BadParameter(f"{kernel.name}: {reason}", param_hint="--kernel")
        copies = range(copies_beyond_cache(sum(pool.stored_bytes().values())))
        layouts = [kernel.prepare(pool, dtype) for _ in copies]
        per_expert = pool.bytes_per_token()
        del pool
        clusters: list[Clusters] = []
        if number and experts == 1:
            clusters = [Clusters.random(number, out, width, device) for _ in layouts]
            per_expert += clusters[0].bytes_read
        for tokens in all_tokens:
            x = torch.randn(tokens, width).to(device, dtype)
            routes = [None] * 16
            if experts > 1:
                routes = [torch.randint(experts, (tokens,), device=device) for _ in routes]
            distinct = sum(1 if r is None else len(r.unique()) for r in routes) / len(routes)

            def run_dense(i: int, x=x) -> None:
                dense[i % len(dense)](x)

            def run_packed(i: int, x=x, routes=routes, layouts=layouts) -> None:
                kernel.run(x, routes[i % len(routes)], layouts[i % len(layouts)], out)

            def run_clusters(i: int, x=x, layouts=layouts, clusters=clusters) -> None:
                i = (i + len(layouts) // 2) % len(layouts)  # the last one's lies in the cache
                router, biases = clusters[i]
                kernel.run(x, None, layouts[i], out, None, kernel.route(x, *router), biases)

            contenders = {"dense": run_dense, "packed": run_packed}
            if clusters:
                contenders = {"dense": run_dense, "bare": run_packed, "packed": run_clusters}
            times = alternate(contenders, seconds, (7, 1000), device)
            read = per_expert * distinct
            results.append(
                {
                    "model": model,
                    "layer": layer,
                    "kernel": kernel.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "dense_path": used[0],
                    "values": how.name,
                    "value_group": how.group,
                    "sparsity": sparsity,
                    "experts": experts,
                    "clusters": number if clusters else 0,
                    "added": times["packed"].median / times["bare"].median if clusters else None,
                    "tokens": tokens,
                    "dense_bytes": dense_bytes,
                    "packed_bytes": read,
                    "dense_floor_s": dense_bytes / bandwidth,
                    "packed_floor_s": read / bandwidth,
                    "ratio": times["dense"].median / times["packed"].median,
                    "best_ratio": times["dense"].fastest / times["packed"].fastest,
                    **{f"{name}_s": vars(timing) for name, timing in times.items()},
                }
            )
            print(line(results[-1]), flush=True)
    return results


SIDE = f"{'us':>9}{'best':>8}{'spread':>7}{'floor':>7}{'MB read':>8}"
HEAD = (
    f"{'':52}|{'dense':>9}{'':30}|{'packed':>9}{'':30}| dense/packed\n"
    f"{'dtype':9} {'values':9} {'layer':8}{'experts':>8}{'sparsity':>9}{'tokens':>7}|{SIDE}|{SIDE}|"
    f"{'ratio':>6}{'best':>6}{'bytes':>6}"
)


def line(r: dict) -> str:
    """One measured cell as a row under HEAD; times in microseconds."""

    def side(name: str) -> str:
        t, floor, read = r[f"{name}_s"], r[f"{name}_floor_s"], r[f"{name}_bytes"]
        spread = (t["high"] - t["low"]) / t["median"]
        return (
            f"{t['median'] * 1e6:9.0f}{t['fastest'] * 1e6:8.0f}{spread:7.0%}"
            f"{floor * 1e6:7.0f}{read / 1e6:8.2f}"
        )

    bytes_ratio = r["dense_bytes"] / r["packed_bytes"]
    return (
        f"{r['dtype']:9} {r['values']:9} {r['layer']:8}"
        f"{r['experts']:8}{r['sparsity']:>9}{r['tokens']:7}|"
        f"{side('dense')}|{side('packed')}|"
        f"{r['ratio']:6.2f}{r['best_ratio']:6.2f}{bytes_ratio:6.2f}"
        + (f"  {r['clusters']} clusters: x {r['added']:.3f}" if r["added"] else "")
    )


def summary(results: list[dict]) -> None:
    """Per model: the linears of a block together, dense time over packed time, median and best."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for r in results:
        key = ("model", "dtype", "values", "experts", "clusters", "sparsity")
        groups[tuple(r[name] for name in key)].append(r)
    print("\nAll measured linears of a block together: dense time / packed time, median (best)")
    for (model, dtype, values, experts, clusters, sparsity), rows in groups.items():
        cells = []
        for tokens in sorted({r["tokens"] for r in rows}):
            cell = [r for r in rows if r["tokens"] == tokens]
            median, best = (
                sum(r["dense_s"][key] for r in cell) / sum(r["packed_s"][key] for r in cell)
                for key in ("median", "fastest")
            )
            cells.append(f"T={tokens} {median:.2f}x ({best:.2f}x)")
            if clusters:
                added, bare = (
                    sum(r[f"{side}_s"]["median"] for r in cell) for side in ("packed", "bare")
                )
                cells[-1] += f" {clusters} clusters x {added / bare:.3f}"
        label = f"{model} {dtype}, {values} values, {experts} experts, sparsity {sparsity}"
        print(f"{label:70}", "  ".join(cells))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="TinyLlama shapes only")] = False,
    kernel: Annotated[str, typer.Option(help="cpu, triton or reference")] = "cpu",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[list[Dtype] | None, typer.Option()] = None,
    values: Annotated[list[str] | None, typer.Option(help="float int8 int6 int5 int4 ...")] = None,
    group: Annotated[int, typer.Option(help="columns that share a scale")] = GROUP,
    sparsity: Annotated[list[str] | None, typer.Option(help="0 0.5 0.7 0.8 0.9 2:4")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="qkv o gate_up down")] = None,
    experts: Annotated[list[int] | None, typer.Option(help="1 16")] = None,
    clusters: Annotated[int, typer.Option(help="with a bias each, where experts are 1")] = 0,
    tokens: Annotated[list[int] | None, typer.Option(help="1 4 16 64 512")] = None,
    seconds: Annotated[float, typer.Option(help="time per cell of the table")] = 0.4,
    json: Annotated[str | None, typer.Option(help="write every number here")] = None,
) -> None:
    """One linear at a time: dense as a device runs it best against packed, side by side."""
    torch.manual_seed(0)
    module, bandwidth = kernels.get(kernel), read_bandwidth(device)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    how = f" ({cpu.instructions(torch.bfloat16)})" if module is cpu else ""
    print(f"{kernel} kernel{how} on {device}; memory read {bandwidth / 1e9:.1f} GB/s")
    results = []
    for model in list(SHAPES)[: 1 if quick else None]:
        print(f"\n{model}\n{HEAD}")
        for kind, name in product(dtype or DTYPES, layer or SHAPES[model]):
            numbers = getattr(torch, kind)
            linear = Linear(model, name, numbers, device, module, bandwidth, seconds)
            names = [kind if v == "float" else v for v in values or ["float"]]
            results += measure(
                linear,
                [codec(v, group) for v in names],
                sparsity or ["0.5", "0.7", "0.8", "0.9", "2:4"],
                experts or [1, 16],
                tokens or [1, 4, 16, 64, 512],
                clusters,
            )
    paths = sorted({f"{r['dtype']}: {r['dense_path']}" for r in results})
    print("\ndense path:", ", ".join(paths))
    summary(results)
    write_json(json, {"memory_read_bytes_per_s": bandwidth, "results": results})


if __name__ == "__main__":
    typer.run(main)
