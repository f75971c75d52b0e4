"""Qwen3 on chats, to a quarter of the bytes of its linears: zeros and bits are chosen, then tuned.

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

NUM_CALIBRATION_SAMPLES = 256
MAX_SEQUENCE_LENGTH = 2048

SAVE_DIR = MODEL_ID.rstrip("/").split("/")[-1] + "-Quarter"

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
    size_budget=0.25,  # bytes stored over dense bytes: 4 bits per weight
    sparsity="auto",  # chosen for each linear, with the bits of its values
    num_experts=1,
    tune_epochs=8,  # most of the time it takes; 0 for a quick trial
    targets=["Linear"],
    ignore=["lm_head"],
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
