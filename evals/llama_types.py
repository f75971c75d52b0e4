"""llama.cpp's quantised types of a model: what they weigh, and what they lose.

    python -m evals.llama_types write MODEL_DIR FILE
    python -m evals.llama_types measure FILE TYPE PART TOKENS.npy IMATRIX.npz QUANTISED_FILE

runs in an environment of llama.cpp's, see `evals.bench.llama`, and imports neither torch nor
transformers. `write` makes a GGUF file of a Llama's safetensors, everything in float32. `measure`
has llama.cpp quantise the linears of the blocks (PART `all`) or of their MLPs alone (`mlp`), runs
the file with llama.cpp's own kernels and prints JSON: the loss in nats per token over windows of
tokens [windows, length], each window on its own, its first token not predicted; the bits per weight
of what was quantised, counted from the file's tensors; and their types. TYPE is one of llama.cpp's
file types, as Q4_K_M, or F32: nothing is quantised. The importance matrix, one array of mean
squared inputs [in] for each tensor, is used by all types that use any.

llama.cpp's K- and IQ-types have groups of 256 columns. Rows of which 256 is no divisor get another
type from it: IQ4_NL (4.5 bits) in place of IQ types and of Q2_K and Q3_K, Q5_0 in place of Q4_K,
Q5_1 in place of Q5_K, Q8_0 in place of Q6_K. Both sides of a product are quantised: inputs are
rounded to 8 bits, too.
"""

import ctypes
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from evals.bench.llama import start_backends

__all__ = ["GGUF_NAMES", "PARTS"]

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""name in a block of a Llama -> in a GGUF file"""
PARTS = {"all": tuple(GGUF_NAMES.values()), "mlp": ("ffn_gate", "ffn_up", "ffn_down")}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
F32 = 0  # of ggml_type and of llama_ftype alike


def write(folder: str, file: str) -> None:
    """The Llama of a directory as a GGUF file, without its tokenizer."""
    from gguf import GGUFWriter

    config = json.loads((Path(folder) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(Path(folder) / "model.safetensors"):
        if name.endswith("q_proj.weight"):
            tensor = _interleaved(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = _interleaved(tensor, kv_heads)
        writer.add_tensor(_gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(file: Path) -> Any:
    """(name, float32 array) of a safetensors file in bfloat16 or float32."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    header_end = 8 + int(data[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(data[8:header_end])).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            raw = np.array(data[header_end + first : header_end + last])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                raw = (raw.view("<u2").astype("<u4") << 16).view(np.uint8)
            elif entry["dtype"] != "F32":
                raise SystemExit(f"{file}: {name} is {entry['dtype']}, not BF16 or F32")
            yield name, raw.view("<f4").reshape(entry["shape"])


def _gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "layers":
        inner = ".".join(parts[2:])
        return f"blk.{parts[1]}.{(GGUF_NAMES | NORMS)[inner]}.weight"
    outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    return f"{outer[parts[0]]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head [2, n] as pairs [n, 2], which llama.cpp rotates."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def quantise(source: str, kind: str, part: str, imatrix: str, target: str) -> None:
    """llama.cpp's own quantisation of `part`; embeddings and the rest stay float32."""
    import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.output_tensor_type = params.token_embedding_type = F32
    with np.load(imatrix) as stored:
        means = {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
    data = (llama.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, mean) in zip(data, means.items(), strict=False):
        entry.name, entry.size = name.encode(), mean.size
        entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = data
    others = set(PARTS["all"]) - set(PARTS[part])
    kept = (llama.llama_model_tensor_override * (len(others) + 1))()
    for entry, name in zip(kept, sorted(others), strict=False):
        entry.pattern, entry.type = rf"blk\.\d+\.{name}\.weight".encode(), F32
    params.tt_overrides = kept
    if status := llama.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"{kind}: llama_model_quantize gave {status}")


def weights_of(file: str, part: str) -> tuple[float, dict[str, int]]:
    """Bits per weight of the linears of `part`, and how many have which type."""
    from gguf import GGUFReader

    names = PARTS[part]
    found = [t for t in GGUFReader(file).tensors if t.name.split(".")[-2] in names]
    types = Counter(tensor.tensor_type.name for tensor in found)
    weights = sum(int(tensor.n_elements) for tensor in found)
    return 8 * sum(int(tensor.n_bytes) for tensor in found) / weights, dict(types)


def loss(file: str, rows: np.ndarray) -> float:
    """Nats per predicted token of `rows` [windows, length]."""
    import llama_cpp as llama

    length = rows.shape[1]
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = F32
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"{file}: llama.cpp made no context")
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    total = 0.0
    for row in rows:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for i, token in enumerate(row.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := llama.llama_decode(context, batch):
            raise SystemExit(f"llama_decode: {status}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (length, vocab))[:-1]
        top = logits.max(axis=1)
        sums = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
        total += float((top + np.log(sums) - logits[np.arange(length - 1), row[1:]]).sum())
    return total / (len(rows) * (length - 1))


def measure(source: str, kind: str, part: str, tokens: str, imatrix: str, target: str) -> None:
    """Prints what the module says of one type."""
    start_backends()
    file = source
    if kind != "F32":
        quantise(source, kind, part, imatrix, target)
        file = target
    bits, types = weights_of(file, part)
    found = {"loss": loss(file, np.load(tokens)), "bits_stored": bits, "bits_read": bits}
    print(json.dumps(found | {"types": types}))


if __name__ == "__main__":
    {"write": write, "measure": measure}[sys.argv[1]](*sys.argv[2:])
