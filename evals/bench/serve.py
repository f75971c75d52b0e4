"""Serving as a whole: ours beside dense vLLM and beside what one would take instead.

    python -m evals.bench.serve [--json FILE] [--llama PYTHON] [--dtype float32]
        [--contender "80% bfloat16"] [--hidden 2048 --ffn 5632 --layers 4]
        [--model DIR --expanded DIR ...]

Without models it makes synthetic ones of the given shape: random weights and masks; what is
measured does not depend on their values. `contenders` says which there are; `--contender`, once or
more, picks among them or adds any of ours, the dense model is always there. `--llama` is a Python
with llama-cpp-python (`llama` says how to get one); without it llama.cpp's rows are left out.

One engine per model is started, all stay up, and they are asked in turn, so that a slow minute of
the machine hits each of them; each may use every core that this process may. Prefill is the time
of a prompt with one token generated; decode is what each further token takes. Prompts are random
tokens, and every sequence of a batch is another, so that a batch meets many experts. Memory is that
of the whole process: vLLM's has Python, torch and a cache of up to 1 GiB in it, so it takes about
2 GB for each of vLLM's models beside its weights.

What bounds it: decoding one token reads every weight once, so its floor is bytes per token over the
memory's bandwidth; both are printed where our own tools know them. Prefill is bound by arithmetic.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.bench.engines import Engine, EngineError

__all__ = ["measure", "read_bytes"]

PROMPT = 32


def read_bytes(path: Path, like: Path | None) -> float | None:
    """Bytes of the linears of the blocks that a token reads; None for formats that are not ours.

    :param like: a model of ours, which says which linears of a dense model to count
    """
    from wexpand_plugin.tools.inspect import inspect

    if path.is_file():
        return None
    found = json.loads((path / "config.json").read_text()).get("quantization_config")
    if found and found["quant_method"] == "wexpand":
        return inspect(path).bytes_per_token
    if found or like is None:
        return None
    return inspect(path, [linear.name for linear in inspect(like).linears]).bytes_per_token


def measure(
    engines: dict[str, Engine], prefill: int, batches: list[int], tokens: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Contender -> "prefill", "decode 1", ... -> seconds of each round; a first one warms up.

    An engine that ends instead of answering is dropped, with its log printed.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for turn in range(rounds + 1):
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
        for name in list(seconds):
            engine = engines[name]
            try:
                found = {"prefill": engine.seconds(1, prefill, 1, turn)}
                for batch in batches:
                    first = engine.seconds(batch, PROMPT, 1, turn)
                    whole = engine.seconds(batch, PROMPT, 1 + tokens, turn)
                    found[f"decode {batch}"] = (whole - first) / tokens
            except EngineError as error:
                print(f"{name} is left out, its engine ended:\n{error}")
                del seconds[name]
                continue
            for key, value in found.items():
                if turn:
                    seconds[name].setdefault(key, []).append(value)
    return seconds


def summary(values: list[float], dense: list[float], count: int) -> dict[str, float]:
    """Median and quartiles of the seconds, speed, and dense time over this one's, by rounds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    ratios = [a / b for a, b in zip(dense, values, strict=True)]
    worse, ratio, better = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median_s": median, "low_s": low, "high_s": high, "tokens_per_s": count / median,
        "ratio": ratio, "ratio_low": worse, "ratio_high": better,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], models: dict[str, dict[str, Any]]) -> str:
    """Markdown: a model a line, tokens per second and the ratio to dense with its quartiles."""
    keys = list(dict.fromkeys(row["what"] for row in rows))
    lines = [["", "disk MB", "memory MB", *keys], ["---"] * (3 + len(keys))]
    for name, model in models.items():
        cells = [name, f"{model['disk'] / 1e6:.0f}", f"{model['resident'] / 1e6:.0f}"]
        for row in rows:
            if row["model"] == name:
                spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
                cells.append(f"{row['tokens_per_s']:.1f}, {row['ratio']:.2f}x ({spread})")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    llama: Annotated[
        str | None, typer.Option(help="Python with llama-cpp-python and gguf, for Q4_0 and Q8_0.")
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--contender", help="Instead of the usual ones.")
    ] = None,
    hidden: Annotated[int, typer.Option()] = 2048,
    ffn: Annotated[int, typer.Option()] = 5632,
    layers: Annotated[int, typer.Option()] = 4,
    heads: Annotated[int, typer.Option()] = 32,
    kv_heads: Annotated[int, typer.Option()] = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    model: Annotated[Path | None, typer.Option(help="A dense model instead.")] = None,
    expanded: Annotated[
        list[Path] | None, typer.Option(help="... and versions of it; once or more.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option(help="1 4 16")] = None,
    prefill: Annotated[int, typer.Option(help="Prompt tokens of the prefill test.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens decoded per sequence.")] = 24,
    rounds: Annotated[int, typer.Option(min=2)] = 5,
) -> None:
    """Decode and prefill speed, size and memory of models in several formats."""
    from evals.bench.contenders import DEFAULT, contender, vllm_contender
    from evals.bench.timing import read_bandwidth, write_json
    from wexpand_plugin.tools.synth import Shape

    batches = batches or [1, 4, 16]
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is not None:
            given = {"dense": model} | {path.name: path for path in expanded or ()}
            made = [vllm_contender(name, path, dtype) for name, path in given.items()]
            about: dict[str, Any] = {"model": model.name}
            title = model.name
        else:
            about = {"layers": layers, "hidden": hidden, "ffn": ffn}
            title = f"{layers} blocks of {hidden} x {ffn}"
            shape = Shape(hidden, ffn, layers, heads, kv_heads, 1024, 2048)
            wanted = dict.fromkeys(["dense", *(names or DEFAULT)])
            asked = [contender(name, folder, shape, dtype, llama) for name in wanted]
            made = [one for one in asked if one is not None]
            if len(made) < len(asked):
                print("llama.cpp's rows are left out: --llama PYTHON was not given")
        bandwidth = read_bandwidth()
        engines: dict[str, Engine] = {}
        for number, one in enumerate(made):
            print(f"starting {one.name}", file=sys.stderr, flush=True)
            try:
                engines[one.name] = one.start(prefill + tokens + 8, folder / f"{number}.log")
            except EngineError as error:
                print(f"{one.name} is left out, its engine does not start:\n{error}")
        seconds = measure(engines, prefill, batches, tokens, rounds)
        made = [one for one in made if one.name in seconds]
        ours = [one.path for one in made if read_bytes(one.path, None)]
        models = {
            one.name: {
                "engine": engines[one.name].name,
                "disk": one.disk_bytes,
                "resident": engines[one.name].resident,
                "read_per_token": read_bytes(one.path, ours[0] if ours else None),
            }
            for one in made
        }
        for engine in engines.values():
            engine.close()

    rows = []
    for name, times in seconds.items():
        for key, values in times.items():
            count = prefill if key == "prefill" else int(key.split()[1])
            found = summary(values, seconds["dense"][key], count)
            rows.append({"model": name, "what": key} | found)
    print(
        f"{dtype}, {title}, {cores} cores, read bandwidth "
        f"{bandwidth / 1e9:.1f} GB/s; tokens per second by the median of {rounds} rounds; dense "
        f"time over this one's, median and quartiles of the rounds; prefill of {prefill} tokens\n"
    )
    print(table(rows, models))
    for name, found_model in models.items():
        if read := found_model["read_per_token"]:
            print(
                f"{name}: linears read {read / 1e6:.1f} MB per token, "
                f"floor {1e3 * read / bandwidth:.2f} ms"
            )
    write_json(None if json_file is None else str(json_file), {
        "command": "python -m evals.bench.serve", "dtype": dtype, **about, "cores": cores,
        "bandwidth": bandwidth, "models": models, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
