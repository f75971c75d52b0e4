"""How long a checkpoint takes to load in vLLM and transformers, for versions of this project.

    python -m evals.bench.load --tree before=PATH --tree after=PATH [--gigabytes 1] [--json FILE]

PATH is a checkout. Each makes a synthetic checkpoint of its own format with its own `wexpand synth`
(a Llama of TinyLlama's width, as many blocks as the size needs, 16 experts, 80% sparse) and loads
it, each time in a new process: with transformers' `from_pretrained`, and with what a vLLM worker
does to load a model (its loader, without the engine around it). Importing the hosts does not count.
They take turns, with the files in the page cache and without. To be run where vLLM is installed.

What bounds it: warm, the memory's bandwidth and the checks; cold, the disk. A version that reads
the model twice pays for it where it is cold, one that computes checksums where it is warm.
"""

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

HOSTS = ("vllm", "transformers")
# 80% sparse, 16 experts at the dense size: bytes of the linears of one block, about
BLOCK_BYTES = 88e6
SYNTH = (
    "--hidden 2048 --ffn 5632 --heads 32 --kv-heads 4 --vocab 1024 --experts 16 --sparsity 0.8 "
    "--budget 1.0 --targets all --quiet"
).split()


def prepared(host: str, model: str) -> Callable[[], Any]:
    """The load alone: everything is imported and configured."""
    import torch

    if host == "transformers":
        import_module("wexpand_plugin")  # for what it registers
        model_class = import_module("transformers").LlamaForCausalLM
        return lambda: model_class.from_pretrained(model, dtype=torch.bfloat16)
    from vllm import distributed
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from wexpand_plugin.serve import register

    register()
    import_module("vllm.model_executor.models.llama")
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as a worker on CPUs has it
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, max_model_len=64, dtype="bfloat16"
    ).create_engine_config()
    with set_current_vllm_config(config):
        address = f"file://{tempfile.mkdtemp()}/store"
        distributed.init_distributed_environment(1, 0, address, 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)

    def load() -> Any:
        with set_current_vllm_config(config):
            loader = get_model_loader(config.load_config)
            return loader.load_model(vllm_config=config, model_config=config.model_config)

    return load


def child(host: str, model: str) -> None:
    """Load once; the seconds go to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the hosts print goes to the log
    load = prepared(host, model)
    start = time.perf_counter()
    loaded = load()
    answers.write(f"{time.perf_counter() - start}\n")
    answers.close()
    del loaded


def load_seconds(tree: Path, host: str, model: Path, *, cold: bool) -> float:
    """Wall time of a load in the code of `tree`, with the files out of the page cache or in it."""
    settings = {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for file in model.glob("*.safetensors"):
        if cold:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            file.read_bytes()
    found = subprocess.run(
        [sys.executable, __file__, "--child", host, "--model", str(model)],
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    if found.returncode:
        raise SystemExit(f"{host} in {tree} ended with {found.returncode}:\n{found.stderr[-3000:]}")
    return float(found.stdout)


def synth(tree: Path, model: Path, layers: int) -> None:
    """Make a checkpoint with the command line of `tree`."""
    module, name = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"][
        "wexpand"
    ].split(":")
    subprocess.run(
        [sys.executable, "-c", f"from {module} import {name}; {name}()", "synth", str(model),
         "--layers", str(layers), *SYNTH],
        check=True,
        env=os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    os.sync()  # pages that are not written yet cannot leave the cache


def main(
    tree: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a checkout.")] = None,
    gigabytes: Annotated[float, typer.Option(help="Size of each checkpoint, about.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    child_host: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
    model: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Load time in vLLM and transformers, of several versions in turn."""
    if child_host is not None:
        child(child_host, model)
        return
    from evals.bench.timing import summary, write_json

    trees = {name: Path(path).resolve() for name, _, path in (t.partition("=") for t in tree or [])}
    if not trees or not all((path / "pyproject.toml").is_file() for path in trees.values()):
        raise SystemExit(f"--tree {tree}: should be NAME=PATH of a checkout, once or more")
    layers = max(1, round(gigabytes * 1e9 / BLOCK_BYTES))
    sizes: dict[str, int] = {}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in trees.items():
            synth(path, Path(folder) / name, layers)
            files = (Path(folder) / name).glob("*.safetensors")
            sizes[name] = sum(file.stat().st_size for file in files)
        for turn in range(rounds + 1):
            for host in HOSTS:
                for state in ("warm", "cold"):
                    for name, path in trees.items():
                        model_path = Path(folder) / name
                        found = load_seconds(path, host, model_path, cold=state == "cold")
                        if turn:  # the first turn compiles kernels
                            seconds.setdefault((host, state, name), []).append(found)
    print(f"{layers} blocks, " + ", ".join(f"{n}: {s / 1e9:.2f} GB" for n, s in sizes.items()))
    print(f"seconds to load: median of {rounds} turns (quartiles)")
    results = []
    for (host, state, name), values in seconds.items():
        timing = summary(values)
        row = {"host": host, "page_cache": state, "tree": name, **vars(timing)}
        results.append(row)
        spread = f"({timing.low:.2f} to {timing.high:.2f})"
        print(f"{host:13} {state:5} {name:12} {timing.median:7.2f} {spread}")
    content = {"bytes": sizes, "blocks": layers, "rounds": rounds, "seconds": results}
    write_json(str(json_file) if json_file else None, content)


if __name__ == "__main__":
    typer.run(main)
