"""Synthetic checkpoints: a Llama of any shape with random weights, masks and routers.

For measuring speed and memory at sizes that nobody has compressed yet, and for trying the serving
half without a model at hand. Rows are written straight as row pools, file by file, so memory stays
small however large the model is. The text such a model writes is noise.

Under a budget, which (neuron, expert) pairs have rows of their own is random, spread evenly over
neurons and experts, and all others share the neuron's base row. A compressed model spends the same
bytes where they help, so how rows are shared, and what its caches make of that, may differ.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import LinearEntry
from ..format.router import Router, rounded, router_bytes
from ..format.rowpool import RowPool, pack_bits
from ..format.writer import SHARD_BYTES, Shards
from ..hf.saving import partial_directory
from .sources import require_empty

__all__ = ["Shape", "synth"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TARGETS = {"mlp": ("mlp.",), "all": ("mlp.", "self_attn.")}
# linears that read the same tensor share a router
GROUPS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
BYTES, SPECIAL = 256, ("<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """The model: names as on the command line, defaults are a model of a few million weights."""

    hidden: int = 512
    ffn: int = 1376
    layers: int = 4
    heads: int = 8
    kv_heads: int | None = None
    """by default as many as `heads`"""
    vocab: int = 1024
    context: int = 4096

    def config(self, dtype: str):
        """The LlamaConfig. Raises WexpandError naming the size that cannot be."""
        from transformers import LlamaConfig

        kv_heads = self.kv_heads or self.heads
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise WexpandError(f"{name}: {value} should be at least 1")
        if self.hidden % (2 * self.heads):
            raise WexpandError(
                f"hidden: {self.hidden} should be a multiple of 2 * heads = {2 * self.heads}"
            )
        if self.heads % kv_heads:
            raise WexpandError(f"kv_heads: {kv_heads} should divide heads = {self.heads}")
        if self.vocab < BYTES + len(SPECIAL):
            raise WexpandError(
                f"vocab: {self.vocab} should be at least {BYTES + len(SPECIAL)}, the tokenizer's"
            )
        return LlamaConfig(
            architectures=["LlamaForCausalLM"], hidden_size=self.hidden, dtype=dtype,
            intermediate_size=self.ffn, num_hidden_layers=self.layers, vocab_size=self.vocab,
            num_attention_heads=self.heads, num_key_value_heads=kv_heads,
            max_position_embeddings=self.context, tie_word_embeddings=False,
            bos_token_id=BYTES, eos_token_id=BYTES + 1,
        )  # fmt: skip


def synth(
    output: str | Path,
    shape: Shape | None = None,
    *,
    experts: int = 16,
    sparsity: float = 0.8,
    budget: float | None = None,
    targets: str = "mlp",
    dtype: str = "bfloat16",
    dense: bool = False,
    seed: int = 0,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a synthetic checkpoint, with a byte-level tokenizer.

    :param output: a directory that does not exist, or is empty
    :param experts: per expanded linear; 1 is plain sparse
    :param sparsity: share of zeros in each row version; every row keeps equally many weights
    :param budget: stored bytes of the expanded linears, x their dense bytes; None stores every
        (expert, neuron) pair's own row
    :param targets: "mlp", or "all" linears of the blocks
    :param dense: write the model of the same shape without any zeros, for comparison
    :raises WexpandError: a value that cannot be, or `output` is not empty
    """
    from ..hf.names import linear_tensors, skeleton

    require_empty(output)
    if dtype not in DTYPES:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if targets not in TARGETS:
        raise WexpandError(f"targets: {targets!r} is not one of {', '.join(TARGETS)}")
    if experts < 1:
        raise WexpandError(f"experts: {experts} should be at least 1")
    if not 0 <= sparsity < 1:
        raise WexpandError(f"sparsity: {sparsity} should be at least 0 and below 1")
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, LinearEntry] = {}
    routers: dict[str, Router] = {}
    with partial_directory(output) as partial:
        shape.config(dtype).save_pretrained(partial)
        _tokenizer().save_pretrained(partial)
        model = skeleton(partial)
        state = model.state_dict()
        linears = {
            tensor: name
            for tensor, name in linear_tensors(model, state).items()
            if not dense and any(part in name for part in TARGETS[targets])
        }
        shards = Shards(partial, max_shard_bytes)
        for name, like in tqdm(state.items(), disable=quiet, desc="tensors", unit=""):
            linear = linears.get(name)
            if linear is None:
                shards.add(name, _dense(like, DTYPES[dtype], generator))
                continue
            rows, columns = like.shape
            kept = max(1, round((1 - sparsity) * columns))
            row_map = _row_map(rows, columns, experts, kept, budget, DTYPES[dtype], generator)
            pool = _pool(row_map, columns, kept, DTYPES[dtype], generator)
            entries[linear] = LinearEntry.of(pool, bias=False)
            shards.add(name, pool.values)
            shards.add(f"{linear}.weight_mask", pool.mask)
            shards.add(f"{linear}.row_map", pool.row_map)
            if experts > 1:
                block, _, kind = linear.rpartition(".")
                group = f"{block}.{GROUPS.get(kind, kind)}"
                if group not in routers:
                    routers = {group: _router(experts, columns, generator)}
                shards.add(f"{linear}.router_weight", routers[group].weight.clone())
                shards.add(f"{linear}.router_bias", routers[group].bias.clone())
        shards.close()
        if not dense:
            made_by = {"wexpand": __version__, "command": "synth", "seed": seed}
            checkpoint.finalize(partial, entries, made_by, quiet=quiet)


def _dense(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if like.dim() == 1:  # a norm
        return torch.ones(like.shape, dtype=dtype)
    return torch.randn(like.shape, dtype=dtype, generator=generator) * like.shape[1] ** -0.5


def _router(experts: int, columns: int, generator: torch.Generator) -> Router:
    """Random directions of equal weight send random inputs to all experts about equally."""
    weight = torch.randn(experts, columns, generator=generator)
    return rounded(Router(weight, torch.zeros(experts)), torch.zeros(columns))


def _row_map(
    rows: int,
    columns: int,
    experts: int,
    kept: int,
    budget: float | None,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """[experts, rows]: a base version per row, and own versions for random pairs in the budget."""
    every = torch.arange(experts * rows, dtype=torch.int32).view(experts, rows)
    if budget is None:
        return every
    row_bytes = kept * dtype.itemsize + (columns + 7) // 8
    fixed = experts * rows * 4 + router_bytes(experts, columns)
    dense = rows * columns * dtype.itemsize
    own = int((budget * dense - fixed) // row_bytes) - rows
    if own < 0:
        raise WexpandError(
            f"budget: {budget} is below {(fixed + rows * row_bytes) / dense:.2f}, the size of the "
            f"base versions alone for a {columns} x {rows} linear; raise the budget or the sparsity"
        )
    if own >= (experts - 1) * rows:
        return every
    row_map = every[:1].repeat(experts, 1)
    pairs = torch.randperm(experts * rows, generator=generator)[:own]
    row_map.view(-1)[pairs.sort().values] = torch.arange(rows, rows + own, dtype=torch.int32)
    return row_map


def _pool(
    row_map: Tensor, columns: int, kept: int, dtype: torch.dtype, generator: torch.Generator
) -> RowPool:
    """Random rows that keep `kept` of `columns` weights each.

    Masks are a bank of random ones, each turned by a random number of bytes where rows are whole
    bytes: drawing every row afresh would take hours at the sizes this is for.
    """
    versions, width = int(row_map.max()) + 1, (columns + 7) // 8
    scores = torch.rand(256, columns, generator=generator)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    keep.scatter_(1, scores.topk(kept, dim=1).indices, True)
    bank = pack_bits(keep)
    which = torch.randint(len(bank), (versions,), generator=generator)
    mask = bank[which]
    if columns % 8 == 0:
        turn = torch.randint(width, (versions, 1), generator=generator)
        mask = mask.gather(1, (torch.arange(width) + turn) % width)
    values = torch.randn(versions * kept, dtype=dtype, generator=generator) * kept**-0.5
    return RowPool(values, mask, row_map, columns)


def _tokenizer():
    """One token per byte: any text, any language, no file to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
