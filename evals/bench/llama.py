"""llama.cpp as a contender: GGUF files with random weights, and the engine that runs them.

    python -m evals.bench.llama write FILE TYPE CONFIG_JSON    a Llama of a config.json's shape
    python -m evals.bench.llama run FILE LONGEST THREADS       see `engines.answer_jobs`

runs in an environment with `gguf` and `llama-cpp-python`, which compiles llama.cpp for the machine
at hand when it is installed (minutes):

    python -m venv llama && llama/bin/pip install gguf llama-cpp-python

Libraries that are there already can be used instead of compiling. Their version must be the one
that the bindings were written for, since structures are passed by value:

    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" llama/bin/pip install gguf llama-cpp-python
    export LLAMA_CPP_LIB_PATH=FOLDER    # of libllama.so

TYPE is that of the linears of the blocks, Q4_0 or Q8_0; embeddings and head are F16, as the models
of the other contenders keep them in 16 bits.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np

from evals.bench.engines import SEQUENCES, Generate, answer_jobs

__all__ = ["start_backends", "start_llama", "write_gguf"]


def write_gguf(file: str, kind: str, config_json: str) -> None:
    """A Llama with random weights, of the shape that a Hugging Face config.json says."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = json.loads(Path(config_json).read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    kv = kv_heads * hidden // heads
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)

    def add(name: str, out: int, width: int, kind: str) -> None:
        weight = generator.standard_normal((out, width), dtype=np.float32) * width**-0.5
        how = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(weight, how), raw_dtype=how)

    add("token_embd.weight", vocab, hidden, "F16")
    add("output.weight", vocab, hidden, "F16")
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for layer in range(layers):
        for name, out, width in [
            ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn),
        ]:  # fmt: skip
            add(f"blk.{layer}.{name}.weight", out, width, kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_backends() -> None:
    """Everything in llama.cpp wants this first."""
    import llama_cpp as llama

    if folder := os.environ.get("LLAMA_CPP_LIB_PATH"):
        # builds for many CPUs keep each CPU's kernels in a library that has to be found first
        ggml = ctypes.CDLL(str(next(Path(folder).glob("libggml.*so*"))))
        ggml.ggml_backend_load_all_from_path(folder.encode())
    llama.llama_backend_init()


def start_llama(file: str, longest: int, threads: int) -> Generate:
    """llama.cpp in this process, with its own defaults but for sizes and threads."""
    import llama_cpp as llama

    start_backends()
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = SEQUENCES * longest
    settings.n_seq_max = SEQUENCES
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"{file}: llama.cpp made no context")
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)

    def step(tokens: list[list[int]], position: int) -> list[int]:
        """Adds so many tokens to every sequence; the likeliest next one of each."""
        last = []
        batch.n_tokens = 0
        for sequence, some in enumerate(tokens):
            for i, token in enumerate(some):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, position + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == len(some) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if status := llama.llama_decode(context, batch):
            raise SystemExit(f"llama_decode: {status}")
        rows = (llama.llama_get_logits_ith(context, at) for at in last)
        return [int(np.ctypeslib.as_array(row, (vocab,)).argmax()) for row in rows]

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        found = [step(prompts, 0)]
        for i in range(tokens - 1):
            found.append(step([[token] for token in found[-1]], len(prompts[0]) + i))
        return found

    return generate


if __name__ == "__main__":
    command, file, *rest = sys.argv[1:]
    if command == "write":
        write_gguf(file, *rest)
    else:
        answer_jobs("llama_cpp", lambda: start_llama(file, *map(int, rest)))
