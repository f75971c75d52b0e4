"""A model that is pruned already, packed and run by vLLM: same weights, fewer bytes.

Runs where `wexpand-plugin[serve]` is installed. Any causal language model will do whose linears
hold zeros, saved dense: from SparseGPT, Wanda, magnitude or 2:4 pruning, here or on the hub.
"""

from vllm import LLM, SamplingParams

from wexpand_plugin.tools.pack import pack

MODEL_ID = "RedHatAI/Sparse-Llama-3.1-8B-2of4"
SAVE_DIR = MODEL_ID.rstrip("/").split("/")[-1] + "-Packed"
PROMPTS = ["The capital of France is", "A sparse matrix is"]
MAX_MODEL_LEN = 2048
MAX_TOKENS = 32

if __name__ == "__main__":  # vLLM's engine process imports this file
    done = pack(MODEL_ID, SAVE_DIR)
    print(f"{done.bytes_before / 1e9:.2f} GB -> {done.bytes_after / 1e9:.2f} GB")

    llm = LLM(SAVE_DIR, max_model_len=MAX_MODEL_LEN)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for output in llm.generate(PROMPTS, sampling):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))
