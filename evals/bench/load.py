"""How long a checkpoint takes to load in vLLM and transformers, for versions of this project.

    python -m evals.bench.load --tree before=PATH --tree after=PATH [--gigabytes 1] [--json FILE]

PATH is a checkout. Each makes a synthetic checkpoint of its own format with its own `wexpand synth`
(a Llama of TinyLlama's width, as many blocks as the size needs, 16 experts, 80% sparse) and loads
it in processes of its own: one with transformers' `from_pretrained`, one with what a vLLM worker
does to load a model (its loader, without the engine around it). All stay up and load in turn, once
with the files in the page cache and once without. To be run where vLLM is installed.

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


def loader(host: str, model: str) -> Callable[[], Callable[[], Any]]:
    """A function that prepares a load and returns the load itself, of which only that is timed."""
    import torch

    if host == "transformers":
        import transformers

        import_module("wexpand_plugin")
        return lambda: (
            lambda: transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        )
    from vllm import distributed
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from wexpand_plugin.serve import register

    register()
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as a worker on CPUs has it
    args = EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=64, dtype="bfloat16")
    with set_current_vllm_config(args.create_engine_config()):
        address = f"file://{tempfile.mkdtemp()}/store"
        distributed.init_distributed_environment(1, 0, address, 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)

    def prepare() -> Callable[[], Any]:
        config = args.create_engine_config()

        def load() -> Any:
            with set_current_vllm_config(config):
                return get_model_loader(config.load_config).load_model(
                    vllm_config=config, model_config=config.model_config
                )

        return load

    return prepare


def child(host: str, model: str) -> None:
    """Load for each line of stdin; the seconds go to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the hosts print goes to the log
    prepare = loader(host, model)
    for _ in sys.stdin:
        load = prepare()
        start = time.perf_counter()
        loaded = load()
        seconds = time.perf_counter() - start
        del load, loaded
        answers.write(f"{seconds}\n")


class Loader:
    """A process that loads one checkpoint with one host, in the code of one tree."""

    def __init__(self, tree: Path, host: str, model: Path, log: Path):
        self.log, self.model = log, model
        settings = {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", host, "--model", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | settings,
        )

    def seconds(self, cold: bool) -> float:
        """Wall time of one load, with the files out of the page cache or in it."""
        if cold:
            for file in self.model.glob("*.safetensors"):
                with file.open("rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("load\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a loader ended early:\n{self.log.read_text()[-3000:]}")
        return float(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


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
    rounds: Annotated[int, typer.Option(min=2)] = 7,
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
    with tempfile.TemporaryDirectory() as folder:
        loaders: dict[tuple[str, str], Loader] = {}
        sizes = {}
        for name, path in trees.items():
            directory = Path(folder) / name
            synth(path, directory, layers)
            sizes[name] = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
            for host in HOSTS:
                log = Path(folder) / f"{name}-{host}.log"
                loaders[name, host] = Loader(path, host, directory, log)
        seconds: dict[tuple[str, str, str], list[float]] = {}
        for turn in range(rounds + 1):
            for (name, host), process in loaders.items():
                for state in ("warm", "cold"):
                    found = process.seconds(cold=state == "cold")
                    if turn:  # the first turn warms up
                        seconds.setdefault((host, state, name), []).append(found)
        for process in loaders.values():
            process.close()
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
