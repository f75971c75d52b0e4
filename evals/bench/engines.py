"""Inference engines in processes of their own, which answer how long a batch takes.

An engine reads jobs as JSON lines from stdin and answers each on stdout: the seconds that it took
to continue `batch` prompts of `prompt` random tokens each by `tokens` tokens, greedily, and its
memory after that. Engines that wait take no time from the one that works, so many can be up and be
asked in turn. Each gets all cores that this process may run on.

This module runs in llama.cpp's environment too and imports neither torch nor vLLM at once.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Engine", "EngineError", "Generate", "answer_jobs", "llama_engine", "vllm_engine"]

SEQUENCES = 16
"""most of a batch"""

Generate = Callable[[list[list[int]], int], object]
"""Continues prompts (token ids) by so many tokens each."""


class EngineError(Exception):
    """An engine ended; the message is the end of its log."""


class Engine:
    """A started engine; `command` runs a program that calls `answer_jobs`."""

    def __init__(self, command: list[str], log: Path, settings: dict[str, str] | None = None):
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
            text=True, env=os.environ | (settings or {}),
        )  # fmt: skip
        self.resident = 0
        """bytes of memory after the last job, of the whole process"""
        self.name: str = self._answer()["engine"]
        """package and version"""

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise EngineError(self.log.read_text(errors="replace")[-3000:])
        return json.loads(line)

    def seconds(self, batch: int, prompt: int, tokens: int, seed: int) -> float:
        """Wall time of continuing `batch` random prompts of `prompt` tokens by `tokens` each.

        :raises EngineError: it ended instead
        """
        job = {"batch": batch, "prompt": prompt, "tokens": tokens, "seed": seed}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        self.resident = found["resident"]
        return found["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def vllm_engine(model: Path, dtype: str, longest: int, log: Path) -> Engine:
    """vLLM on a model directory, for sequences of at most `longest` tokens."""
    cores = sorted(os.sched_getaffinity(0))
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        # all cores for the model: nothing else of this benchmark runs meanwhile
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }  # fmt: skip
    command = [sys.executable, "-m", "evals.bench.engines", str(model), dtype, str(longest)]
    return Engine(command, log, settings)


def llama_engine(python: str, file: Path, longest: int, log: Path) -> Engine:
    """llama.cpp on a GGUF file; `python` has llama-cpp-python."""
    threads = len(os.sched_getaffinity(0))
    command = [python, "-m", "evals.bench.llama", "run", str(file), str(longest), str(threads)]
    return Engine(command, log)


def resident_bytes() -> int:
    """Memory of this process [bytes]."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def answer_jobs(package: str, start: Callable[[], Generate]) -> None:
    """Be an engine of this package: `start` it, then answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine itself prints goes to the log
    generate = start()
    engine = f"{package} {sys.modules[package].__version__}"
    answers.write(json.dumps({"engine": engine}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        draw = random.Random(job["seed"])
        prompts = [
            [draw.randrange(3, 250) for _ in range(job["prompt"])] for _ in range(job["batch"])
        ]
        begin = time.perf_counter()
        generate(prompts, job["tokens"])
        seconds = time.perf_counter() - begin
        answers.write(json.dumps({"seconds": seconds, "resident": resident_bytes()}) + "\n")


def start_vllm(model: str, dtype: str, longest: int) -> Generate:
    """vLLM in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True,
        max_num_seqs=SEQUENCES, max_num_batched_tokens=max(512, longest),
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(inputs, sampling, use_tqdm=False)

    return generate


if __name__ == "__main__":
    model, dtype, longest = sys.argv[1:]
    answer_jobs("vllm", lambda: start_vllm(model, dtype, int(longest)))
