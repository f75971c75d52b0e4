"""One compression of a random Llama, in a process of its own: time and memory.

    python -m evals.bench.compress_run '{"hidden": 512, ..., "modifier": {"num_experts": 4}}'

prints a line that begins with RESULT, for `evals.bench.compress`.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["Run", "measure"]

TARGETS = ["re:.*layers.*_proj$"]
VOCAB = 1024


@dataclass(frozen=True)
class Run:
    """What is compressed, and how."""

    hidden: int = 512
    ffn: int = 1376
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    samples: int = 64
    length: int = 256
    sparsity: float = 0.8
    modifier: dict[str, Any] | None = field(default_factory=dict)
    """keys of SparseExpansionModifier; None: llm-compressor's SparseGPTModifier"""

    def of(self, modifier: dict[str, Any] | None) -> "Run":
        """The same with another modifier."""
        return replace(self, modifier=modifier)

    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def measure(run: Run) -> dict[str, float]:
    """Compress, here and now: seconds, of the wall and of the CPU, in `oneshot` and in the hook
    that expands blocks, and the peak memory of the process in MiB."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    if run.modifier is None:
        modifier: Any = SparseGPTModifier(sparsity=run.sparsity, targets=TARGETS)
    else:
        modifier = SparseExpansionModifier(
            **{"sparsity": run.sparsity, "mask_structure": "unstructured", "targets": TARGETS}
            | run.modifier
        )
    blocks, own = [0.0], type(modifier).on_sequential_epoch_end

    def timed(*args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        own(*args, **kwargs)
        blocks[0] += time.process_time() - start

    type(modifier).on_sequential_epoch_end = timed
    torch.manual_seed(0)
    rows = torch.randint(1, VOCAB, (run.samples, run.length)).tolist()
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * run.length] * run.samples}
    )
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=run.hidden, intermediate_size=run.ffn,
            num_hidden_layers=run.layers, num_attention_heads=run.heads,
            num_key_value_heads=run.kv_heads, max_position_embeddings=2 * run.length,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        before = _peak()
        wall, cpu = time.perf_counter(), time.process_time()
        oneshot(
            model=folder, dataset=data, recipe=[modifier], max_seq_length=run.length,
            num_calibration_samples=run.samples,
            processor=PreTrainedTokenizerFast(tokenizer_object=words),
        )  # fmt: skip
        return {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "blocks_cpu_s": blocks[0],
            "before_mib": before,
            "peak_mib": _peak(),
        }


def _peak() -> float:
    """The most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print("RESULT " + json.dumps(measure(Run(**json.loads(sys.argv[1])))))
