"""Held-out loss of a causal language model, dense or compressed by this project.

    python -m evals.perplexity MODEL [--dataset pocket] [--tokens 65536] [--context 256]

The text is one stream of tokens, cut into windows of `context` that do not overlap; each window
predicts all its tokens but the first from those before them in the window. The loss is the mean
over the predicted tokens in nats, the perplexity its exponential. Bits per byte divide by the
bytes that a token of this text stands for, and so compare models with different tokenizers.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from tqdm import tqdm

from evals.pocket import corpus

__all__ = ["HeldOutLoss", "held_out_loss", "load_model", "read_texts"]

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HeldOutLoss:
    """What `held_out_loss` measured."""

    loss: float
    """Mean over the predicted tokens, in nats."""
    perplexity: float
    """exp(loss), per token."""
    bits_per_byte: float
    """Loss in bits, divided by the bytes per token of the whole text."""
    tokens: int
    """How many tokens were predicted."""
    context: int
    """Length of a window in tokens."""


def read_texts(dataset: str, split: str = "validation") -> list[str]:
    """The texts of `dataset`: "pocket", a .txt or .jsonl file, or a hub id, or ID:CONFIG.

    A .txt file is one text; of the others the column "text" is read, and of a hub id its `split`.
    """
    if dataset == "pocket":
        return corpus.dataset(split)["text"][:]
    path = Path(dataset)
    if path.suffix == ".txt" and path.is_file():
        return [path.read_text(encoding="utf8")]
    if path.suffix in (".jsonl", ".json") and path.is_file():
        with path.open(encoding="utf8") as lines:
            return [json.loads(line)["text"] for line in lines if line.strip()]
    if path.suffix in (".txt", ".jsonl", ".json"):
        raise FileNotFoundError(f"dataset: there is no file {dataset}")
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    return load_dataset(name, config or None, split=split)["text"][:]


def load_model(model: str | Path, dtype: Dtype = "float32", device: str | None = None) -> Any:
    """The model of a directory or hub id, ready to be measured; ours load like any other."""
    from transformers import AutoModelForCausalLM

    import_module("wexpand_plugin")  # registers our checkpoint format with transformers
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.to(device).eval()


@torch.no_grad()
def held_out_loss(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str] = "pocket",
    *,
    tokens: int | None = 65536,
    context: int = 256,
    batch_size: int = 8,
    spread: bool = True,
    progress: bool = True,
) -> HeldOutLoss:
    """Loss of `model` on held-out text.

    `tokenizer` is a tokenizer or where to load one from; `texts` a name for `read_texts` or the
    texts themselves. Of all windows, as many as hold `tokens` are taken (None: all), at even
    distances, or without `spread` the first ones. Raises ValueError if the text does not fill one.
    """
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    texts = read_texts(texts) if isinstance(texts, str) else list(texts)
    rows = corpus.token_rows(texts, tokenizer, context)
    if len(rows) == 0:
        raise ValueError(f"the text is shorter than one window of {context} tokens")
    bytes_per_token = sum(len(text.encode()) for text in texts) / rows.numel()
    if tokens is not None and tokens < rows.numel():
        wanted = max(1, tokens // context)
        places = torch.linspace(0, len(rows) - 1, wanted).round().long()
        rows = rows[places] if spread else rows[:wanted]

    total = 0.0
    for batch in tqdm(rows.split(batch_size), desc="held-out loss", disable=not progress):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total += losses.item()
    predicted = len(rows) * (context - 1)
    loss = total / predicted
    return HeldOutLoss(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=predicted,
        context=context,
    )


def main(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    dataset: Annotated[
        str, typer.Option(help="pocket, FILE.txt, FILE.jsonl, or a hub id (ID or ID:CONFIG).")
    ] = "pocket",
    split: Annotated[str, typer.Option(help="Split of pocket or of a hub id.")] = "validation",
    tokens: Annotated[int, typer.Option(help="About how many tokens; 0 is all.", min=0)] = 65536,
    context: Annotated[int, typer.Option(help="Window length in tokens.", min=2)] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = "float32",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, too.")
    ] = None,
) -> None:
    """Held-out loss in nats per token, perplexity, and bits per byte."""
    try:
        texts = read_texts(dataset, split)
        result = held_out_loss(
            load_model(model, dtype),
            model,
            texts,
            tokens=tokens or None,
            context=context,
            batch_size=batch_size,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"evals.perplexity: {error}") from error
    print(
        f"{model} on {dataset}, {result.tokens} tokens, context {result.context}, {dtype}:\n"
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.3f}, "
        f"{result.bits_per_byte:.4f} bits per byte"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": model, "dataset": dataset, "dtype": dtype, **asdict(result)}
        json_file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
