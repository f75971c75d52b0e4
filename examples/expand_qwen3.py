"""Qwen3 into sparse experts, on chats: the MLP linears 80% sparse, stored in their dense size.

Runs where `wexpand-plugin[compress]` is installed. The result is served by `vllm serve SAVE_DIR`
where `wexpand-plugin[serve]` is.
"""

from datasets import load_dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from wexpand_plugin import SparseExpansionModifier

MODEL_ID = "Qwen/Qwen3-0.6B"
DATASET_ID = "HuggingFaceH4/ultrachat_200k"
DATASET_SPLIT = "train_sft"

# each of the experts wants some thousands of tokens
NUM_CALIBRATION_SAMPLES = 256
MAX_SEQUENCE_LENGTH = 2048

SAVE_DIR = MODEL_ID.rstrip("/").split("/")[-1] + "-Expanded"

model = AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)


def preprocess(example):
    text = tokenizer.apply_chat_template(example["messages"], tokenize=False)
    return tokenizer(
        text, max_length=MAX_SEQUENCE_LENGTH, truncation=True, add_special_tokens=False
    )


dataset = load_dataset(DATASET_ID, split=f"{DATASET_SPLIT}[:{NUM_CALIBRATION_SAMPLES}]")
dataset = dataset.shuffle(seed=42).map(preprocess, remove_columns=dataset.column_names)

recipe = SparseExpansionModifier(
    sparsity=0.8,
    num_experts=16,
    size_budget=1.0,  # bytes stored over dense bytes
    targets=["re:.*mlp.*_proj$"],
)

oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=dataset,
    recipe=recipe,
    max_seq_length=MAX_SEQUENCE_LENGTH,
    num_calibration_samples=NUM_CALIBRATION_SAMPLES,
)

model.save_pretrained(SAVE_DIR)
tokenizer.save_pretrained(SAVE_DIR)
print(f"wrote {SAVE_DIR}; sizes: wexpand inspect {SAVE_DIR}")
