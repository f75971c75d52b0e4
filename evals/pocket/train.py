"""Train the pocket model from nothing: python -m evals.pocket.train --minutes 80 --out DIR

The learning rate follows a cosine over wall-clock time, so training ends when told, on any machine.
"""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evals.perplexity import held_out_loss, load_model
from evals.pocket import corpus

__all__ = ["make_model", "make_tokenizer", "train"]

END = "<|endoftext|>"
PEAK_RATE = 2e-3
WARM_UP_STEPS = 150


def make_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`; its one special token begins and ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A random Llama with heads of 64, two query heads per key head, and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, seconds: float, batch: int, context: int
) -> int:
    """Train `model` on random windows of the stream `tokens` for `seconds`; returns the steps."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / seconds) < 1:
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * cosine
        offsets = torch.randint(0, len(tokens) - context, (batch,)).tolist()
        ids = torch.stack([tokens[at : at + context] for at in offsets]).to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            passed = time.monotonic() - start
            print(f"{passed:6.0f} s  step {step}  loss {loss.item():.3f}", flush=True)
    return step


def main(
    out: Annotated[Path, typer.Option(help="Where to save model and tokenizer.")],
    minutes: Annotated[float, typer.Option(help="How long to train.", min=0.01)] = 80,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 128.", min=128)] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[int, typer.Option(help="Window length in tokens.", min=2)] = 256,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 16,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train tokenizer and model on the standard library and save them in bfloat16."""
    torch.manual_seed(seed)
    texts = corpus.dataset("train")["text"][:]
    tokenizer = make_tokenizer(texts)
    tokens = corpus.token_rows(texts, tokenizer, context).flatten()
    print(f"{len(texts)} files, {len(tokens)} tokens")
    model = make_model(len(tokenizer), hidden, layers).to(device)
    steps = train(model, tokens, 60 * minutes, batch, context)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = held_out_loss(load_model(out), out, context=context)
    print(f"{steps} steps; held-out loss {result.loss:.4f} nats per token")


if __name__ == "__main__":
    typer.run(main)
