"""One model as the experiments see it: its texts, recorded inputs, clusters and scores.

What one seed needs is made once and kept until another seed asks, so that experiments of one
process share it. The seed draws the calibration text, the clusters and whatever is random.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from evals.pocket import MODEL
from wexpand_plugin.method.clusters import Router, fit_router
from wexpand_plugin.method.inputs import InputGroup
from wexpand_plugin.method.neurons import NeuronScores, neuron_scores

from .inputs import Recorded, input_groups, label, record
from .texts import KINDS, Split, read, rows

__all__ = ["CLUSTERS", "CONTEXT", "Study", "cluster"]

CONTEXT = 256
CLUSTERS = 16
"""as many as the paper has"""
LARGE = 12
"""with more blocks than this, every third stands for all"""

T = TypeVar("T")


@dataclass
class Study:
    """A model, and how much of it and of text to look at."""

    model: str = str(MODEL)
    data: Path | None = None
    tokens: int = 16384
    """to calibrate on"""
    quick: bool = False
    """everything smaller, to see that it runs; the numbers are no evidence"""
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _rows: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def network(self) -> Any:
        """The dense model in float32."""
        from evals.perplexity import load_model

        return load_model(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def groups(self) -> list[InputGroup]:
        """The input groups looked at: MLP linears of all blocks, or of every third."""
        return input_groups(self.network, self.every, torch.tensor([[0, 1]]))

    @property
    def every(self) -> int:
        """Every so many-th block is looked at."""
        return 1 if self.network.config.num_hidden_layers <= LARGE else 3

    @property
    def held_out_tokens(self) -> int:
        """For a loss or for errors of layers."""
        return self.tokens // 4

    @property
    def home(self) -> str:
        """The kind of text that the model is calibrated on, unless an experiment is about that."""
        return "library" if label(self.model) == "pocket" else "wikitext2"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of text; in a quick run those that need no download."""
        return ("library", "manual") if self.quick else KINDS

    @property
    def setting(self) -> dict[str, Any]:
        """What results depend on besides the seed."""
        return {
            "model": label(self.model), "tokens": self.tokens, "text": self.home,
            "held_out_tokens": self.held_out_tokens, "context": CONTEXT, "clusters": CLUSTERS,
            "every_block": self.every, "quick": self.quick,
        }  # fmt: skip

    def keep(self, seed: int, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, made once as long as nobody asks for another seed."""
        if self._kept.get("seed") != seed:
            self._kept = {"seed": seed}
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def rows(self, kind: str, split: Split, tokens: int, seed: int) -> Tensor:
        """Token ids of a text: int64 [rows, context]."""
        key = kind, split, tokens, seed
        if key not in self._rows:
            texts = read(kind, split, self.data)
            self._rows[key] = rows(texts, self.tokenizer, tokens, CONTEXT, seed)
        return self._rows[key]

    def inputs(self, seed: int) -> list[Recorded]:
        """What each group reads in the calibration text."""

        def make() -> list[Recorded]:
            ids = self.rows(self.home, "train", self.tokens, seed)
            return record(self.network, self.groups, ids)

        return self.keep(seed, "inputs", make)

    def held_out(self, seed: int) -> list[Recorded]:
        """What each group reads in held-out text, the same for all seeds."""

        def make() -> list[Recorded]:
            ids = self.rows(self.home, "held out", self.held_out_tokens, 0)
            return record(self.network, self.groups, ids)

        return self.keep(seed, "held out", make)

    def router(self, seed: int, recorded: Recorded) -> Router:
        """The clusters of a group's calibration inputs."""
        return self.keep(
            seed, ("router", recorded.group.names), lambda: cluster(recorded.x, seed)
        )

    def scores(self, seed: int, recorded: Recorded, linear: int) -> NeuronScores:
        """Scores of the neurons of a group's linear, whole and within clusters."""

        def make() -> NeuronScores:
            weight = recorded.group.linears[linear].weight.detach()
            labels = self.router(seed, recorded).route(recorded.x)
            return neuron_scores(recorded.x, weight, labels=labels, seed=seed)

        return self.keep(seed, ("scores", recorded.group.names[linear]), make)

    @torch.no_grad()
    def loss(self, kind: str | None = None) -> float:
        """Held-out loss of the network as it is, nats per token, of `kind` (or home) text."""
        ids = self.rows(kind or self.home, "held out", self.held_out_tokens, 0)
        total = 0.0
        for batch in ids.split(8):
            logits = self.network(input_ids=batch, use_cache=False).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            ).item()
        return total / (ids.numel() - len(ids))


def cluster(x: Tensor, seed: int) -> Router:
    """`CLUSTERS` clusters of inputs [tokens, in], from a part of them."""
    return fit_router(x[:8192], CLUSTERS, restarts=2, seed=seed)
