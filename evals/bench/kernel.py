"""One linear at a time: dense as vLLM runs it on a CPU against packed, side by side.

    python -m evals.bench.kernel [--quick] [--json FILE] [--dtype ...] [--tokens ...]

Run it in the serve environment: the dense side is then the very function vLLM's CPU worker calls
(its choice is printed), otherwise torch's linear. Weights and masks are random; with several
experts each token draws its expert at random, and only the weight memory differs between experts.
`floor` is the time that reading a call's weight bytes takes at the memory bandwidth measured first.
Copies of the weights take turns, so they come from memory and not from cache, as in a model.
`ratio` is dense time over packed time, by medians and by the fastest repetitions (`best`);
on a machine with other work a spread far above 100% says that the medians measure the other work.
"""

import argparse
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from wexpand_plugin.format.rowpool import RowPool, pack_rows
from wexpand_plugin.kernels import cpu

from .timing import alternate, copies_beyond_cache, machine, read_bandwidth, write_json

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPARSITIES = ("0.5", "0.7", "0.8", "0.9", "2:4")


def vllm_linear(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The dense linear that vLLM's CPU path runs for `weight` [out, in], and its name."""
    if importlib.util.find_spec("vllm") is None:
        return lambda x: torch.nn.functional.linear(x, weight), "torch linear (no vLLM here)"
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


def random_pool(out: int, width: int, sparsity: str, experts: int, dtype: torch.dtype) -> RowPool:
    """`experts` full experts, each in memory of its own; their masks are equal copies."""
    keep = random_mask(out, width, sparsity)
    one = pack_rows(torch.randn(out, width).to(dtype) * keep, torch.arange(out).unsqueeze(0), keep)
    row_map = torch.arange(experts * out, dtype=torch.int32).view(experts, out)
    return RowPool(one.values.repeat(experts), one.mask.repeat(experts, 1), row_map, width)


def measure(
    model: str, layer: str, dtype_name: str, args: argparse.Namespace, bandwidth: float
) -> list[dict]:
    """All sparsities, expert counts and token counts of one layer and dtype."""
    dtype, (out, width) = DTYPES[dtype_name], SHAPES[model][layer]
    dense_bytes = out * width * dtype.itemsize
    weight = torch.randn(out, width).to(dtype)
    copies = range(copies_beyond_cache(dense_bytes))
    dense, used = zip(*(vllm_linear(weight.clone()) for _ in copies), strict=True)
    results = []
    for sparsity, experts in product(args.sparsity, args.experts):
        pool = random_pool(out, width, sparsity, experts, dtype)
        copies = range(copies_beyond_cache(sum(pool.stored_bytes().values())))
        layouts = [cpu.prepare(pool) for _ in copies]
        per_expert = pool.bytes_per_token()
        del pool
        for tokens in args.tokens:
            x = torch.randn(tokens, width).to(dtype)
            routes = [torch.randint(experts, (tokens,)) if experts > 1 else None for _ in range(16)]
            distinct = sum(1 if r is None else len(r.unique()) for r in routes) / len(routes)

            def run_dense(i: int, x=x) -> None:
                dense[i % len(dense)](x)

            def run_packed(i: int, x=x, routes=routes, layouts=layouts) -> None:
                cpu.run(x, routes[i % len(routes)], layouts[i % len(layouts)], out)

            times = alternate({"dense": run_dense, "packed": run_packed}, args.seconds, (7, 1000))
            read = per_expert * distinct
            results.append(
                {
                    "model": model,
                    "layer": layer,
                    "dtype": dtype_name,
                    "dense_path": used[0],
                    "sparsity": sparsity,
                    "experts": experts,
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
    f"{'':42}|{'dense':>9}{'':30}|{'packed':>9}{'':30}| dense/packed\n"
    f"{'dtype':9} {'layer':8}{'experts':>8}{'sparsity':>9}{'tokens':>7}|{SIDE}|{SIDE}|"
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
        f"{r['dtype']:9} {r['layer']:8}{r['experts']:8}{r['sparsity']:>9}{r['tokens']:7}|"
        f"{side('dense')}|{side('packed')}|"
        f"{r['ratio']:6.2f}{r['best_ratio']:6.2f}{bytes_ratio:6.2f}"
    )


def summary(results: list[dict]) -> None:
    """Per model: the linears of a block together, dense time over packed time, median and best."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for r in results:
        groups[r["model"], r["dtype"], r["experts"], r["sparsity"]].append(r)
    print("\nAll measured linears of a block together: dense time / packed time, median (best)")
    for (model, dtype, experts, sparsity), rows in groups.items():
        cells = []
        for tokens in sorted({r["tokens"] for r in rows}):
            cell = [r for r in rows if r["tokens"] == tokens]
            median, best = (
                sum(r["dense_s"][key] for r in cell) / sum(r["packed_s"][key] for r in cell)
                for key in ("median", "fastest")
            )
            cells.append(f"T={tokens} {median:.2f}x ({best:.2f}x)")
        label = f"{model} {dtype} {experts} experts, sparsity {sparsity}"
        print(f"{label:52}", "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="TinyLlama shapes only")
    parser.add_argument("--json", metavar="FILE", help="write every number here")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--sparsity", nargs="+", choices=SPARSITIES, default=list(SPARSITIES))
    parser.add_argument(
        "--layer",
        nargs="+",
        choices=["qkv", "o", "gate_up", "down"],
        default=["qkv", "o", "gate_up", "down"],
    )
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--seconds", type=float, default=0.4, help="time per cell of the table")
    args = parser.parse_args()

    if reason := cpu.unavailable(torch.device("cpu"), torch.float32):
        parser.exit(1, f"the CPU kernel is not available: {reason}\n")
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    instructions = cpu.load().wexpand_instructions().decode()
    print(f"kernel: {instructions}; memory read {bandwidth / 1e9:.1f} GB/s")
    results = []
    for model in list(SHAPES)[: 1 if args.quick else None]:
        print(f"\n{model}\n{HEAD}")
        for dtype in args.dtype:
            for layer in args.layer:
                results += measure(model, layer, dtype, args, bandwidth)
    paths = sorted({f"{r['dtype']}: {r['dense_path']}" for r in results})
    print("\ndense path:", ", ".join(paths))
    summary(results)
    write_json(args.json, {"memory_read_bytes_per_s": bandwidth, "results": results})


if __name__ == "__main__":
    main()
