"""Greedy texts and log-probabilities of models by vLLM: python -m evals.vllm_logprobs JOBS RESULTS

Run it in the serve environment. JOBS is JSON: {"models": {name: directory}, "prompts": [text, ...],
"length": new tokens, "settings": {...LLM arguments}}. The models run one after another in this
process, each with an engine of its own. RESULTS maps a name to one entry per prompt: the greedy
text, its token ids, and the log-probability of every token of prompt and text but the first.
"""

import gc
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["logprobs"]


def logprobs(
    model: str, prompts: list[str], length: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """What a fresh engine makes of `prompts`, one entry each (see the module)."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, disable_log_stats=True, **settings)
    sampling = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    found = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        completion = output.outputs[0]
        ids = [*output.prompt_token_ids, *completion.token_ids]
        steps = [*output.prompt_logprobs[1:], *completion.logprobs]
        found.append({
            "text": completion.text,
            "tokens": list(completion.token_ids),
            "logprobs": [step[i].logprob for step, i in zip(steps, ids[1:], strict=True)],
        })  # fmt: skip
    return found


def main(
    jobs: Annotated[Path, typer.Argument(help="JSON: models, prompts, length, settings.")],
    results: Annotated[Path, typer.Argument(help="JSON file to write.")],
) -> None:
    """Greedy texts and log-probabilities of models by vLLM."""
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    job = json.loads(jobs.read_text(encoding="utf8"))
    done: dict[str, Any] = {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}}
    for name, model in job["models"].items():
        done[name] = logprobs(model, job["prompts"], job["length"], job["settings"])
        gc.collect()
        cleanup_dist_env_and_memory()
    results.write_text(json.dumps(done), encoding="utf8")


if __name__ == "__main__":
    # one process, which can hold one engine after another
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    typer.run(main)
