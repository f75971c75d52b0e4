"""Tiny models with random weights, dense, pruned or expanded, for the tests of many modules."""

import torch
from torch import nn

from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.clusters import Router, rounded

__all__ = [
    "CLASSES",
    "block_linears",
    "dense",
    "expand",
    "expanded",
    "multiply_by_masks",
    "prune",
    "tokenizer",
    "tokens",
]

CLASSES = ("llama", "qwen2", "gpt_neox")
# widths that do not divide by 8, in the feed-forward (52) and elsewhere (40 does)
HIDDEN, FFN, VOCAB = 40, 52, 96


def dense(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A causal LM of transformers, 2 layers, with biases set to something where it has any."""
    import transformers

    sizes = dict(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCAB, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    if kind != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "gpt_neox": transformers.GPTNeoXConfig,
    }[kind]
    torch.manual_seed(seed)
    config = config_class(**sizes | changes)
    config.dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight.normal_(std=linear.in_features**-0.5)
            if linear.bias is not None:
                linear.bias.normal_()
    return model


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def prune(model: nn.Module, sparsity: float = 0.5, match: str = "", seed: int = 0) -> nn.Module:
    """Zero random weights of the linears whose name contains `match`; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, linear in block_linears(model).items():
            if match in name:
                gone = torch.rand(linear.weight.shape, generator=generator) < sparsity
                linear.weight[gone] = 0
    return model


def multiply_by_masks(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """Prune as `weight *= mask` does, which leaves -0.0 for negative weights; returns the model."""
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight *= torch.rand_like(linear.weight) > sparsity
    return model


def expand(
    model: nn.Module,
    experts: int = 3,
    sparsity: float = 0.5,
    match: str = "mlp",
    seed: int = 0,
    clusters: int = 0,
    parents: int = 0,
    values: str | None = None,
) -> nn.Module:
    """Replace linears whose name contains `match` by routed ones with random masks and routers.

    The first two experts share half of their rows, as after an allocation; linears of one parent
    with the same input width share a router. Returns the model.

    :param clusters: with a bias each, but in up_proj and k_proj; 0: the experts, without biases
    :param values: codec of the kept weights, in groups of 32; by default as they are
    """
    generator = torch.Generator().manual_seed(seed)
    biased, clusters = clusters > 0, clusters or experts
    named = torch.arange(clusters).remainder(experts) if 1 < experts < clusters else None
    routers: dict[tuple[str, int], StoredRouter] = {}
    for name, linear in block_linears(model).items():
        if match not in name:
            continue
        shape = (experts, *linear.weight.shape)
        gone = torch.rand(shape, generator=generator) < sparsity
        weight = torch.where(gone, 0.0, linear.weight.detach())
        if experts > 1:
            weight[1, ::2] = weight[0, ::2]
        key = (name.rpartition(".")[0], linear.in_features)
        if key not in routers:
            rows = parents + clusters
            router = torch.randn(rows, linear.in_features, generator=generator)
            bias = torch.randn(rows, generator=generator) / 4
            router, bias, *_ = rounded(Router(router, bias), torch.zeros(linear.in_features))
            routers[key] = StoredRouter(router, bias, parents)
        biases = None
        if biased and not name.endswith(("up_proj", "k_proj")):
            biases = ClusterBias.pack(
                torch.randn(clusters, linear.out_features, generator=generator) / 2
            )
        routed = RoutedLinear.from_pool(
            RowPool.pack_experts(weight, codec=codec(values, 32) if values else None),
            routers[key] if clusters > 1 else None,
            linear.bias,
            cluster_bias=biases,
            cluster_expert=named,
            group="/".join(map(str, key)),
            tokens=range(10, 10 + clusters),
        )
        model.set_submodule(name, routed)
    return model


def expanded(path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    """Save an expanded tiny model at `path` and return it."""
    from wexpand_plugin.hf.saving import wrap_save_pretrained

    model = expand(dense(kind, dtype), **settings)
    wrap_save_pretrained(model, {"test": kind})
    model.save_pretrained(path)
    return model


def tokens(batch: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer():
    """One token per word t0, t1, ... of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=AddedToken("t1", single_word=True)
    )
