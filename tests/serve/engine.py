"""Starts vLLM's engine, for the tests that need a real one: `python engine.py JOBS RESULTS`.

JOBS is a JSON list of {"name", "model", ...LLM arguments}; one engine after another runs in this
process, which saves importing vLLM for each. RESULTS maps a name to the generated token ids,
the log-probability of each token of prompt and text, or to the error that stopped the engine.
"""

import json
import os
import sys
import traceback
from pathlib import Path

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [50, 6, 70], [3]]
LENGTH = 8
COMMON = dict(
    skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64,
    disable_log_stats=True, dtype="float32", enforce_eager=True,
)  # fmt: skip


def generate(model: str, **settings) -> dict:
    """Greedy continuations of PROMPTS by a fresh engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **COMMON | settings)
    sampling = SamplingParams(
        temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False, logprobs=0,
        prompt_logprobs=0,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found: dict[str, list] = {"tokens": [], "logprobs": []}
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        completion = output.outputs[0]
        ids = list(output.prompt_token_ids) + list(completion.token_ids)
        steps = output.prompt_logprobs[1:] + completion.logprobs
        found["tokens"].append(list(completion.token_ids))
        found["logprobs"].append(
            [step[token].logprob for step, token in zip(steps, ids[1:], strict=True)]
        )
    return found


def main(jobs: Path, results: Path) -> None:
    done = {}
    for job in json.loads(jobs.read_text()):
        name = job.pop("name")
        try:
            done[name] = generate(**job)
        except Exception:
            done[name] = {"error": traceback.format_exc()}
        results.write_text(json.dumps(done))
        if "tensor_parallel_size" not in job:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
