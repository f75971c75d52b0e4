"""`SparseExpansionModifier`: the recipe entry that expands linears into sparse experts."""

import time
from dataclasses import fields

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import nn
from tqdm import tqdm

from ..errors import WexpandError
from ..hf.linear import RoutedLinear
from ..hf.saving import wrap_save_pretrained
from ..method.candidates import (
    SCORES,
    Candidates,
    Settings,
    allocate_model,
    dense_bytes,
    fixed_bytes,
)
from ..method.solvers.sparsegpt import MaskStructure
from ..method.statistics import GroupStatistics
from .estimate import working_bytes
from .group import expand_group, replace_linear, sum_hessians
from .replay import BlockReplay
from .targets import target_linears

__all__ = ["SparseExpansionModifier"]

TOKENS_PER_EXPERT = 64


class SparseExpansionModifier(Modifier):
    """
    Gives each targeted linear several sparse versions of its weights, one per cluster of its
    inputs, from "Wasserstein Distances, Neuronal Entanglement, and Sparsity"
    (https://arxiv.org/abs/2405.15756). Saved models are served by vLLM with this plugin installed.

    Sample yaml:

    ```yaml
    expansion_stage:
      expansion_modifiers:
        SparseExpansionModifier:
          sparsity: 0.8
          num_experts: 16
          size_budget: 1.0
          targets: ['re:.*mlp.*']
    ```

    Lifecycle:

    - on_initialize
        - check every value against the model
    - on_calibration_start
        - record the arguments of each block that holds targets
    - on_sequential_epoch_end
        - find input groups; per group: route, sum Hessians, solve, allocate, replace the linears
    - on_calibration_end
        - with `budget_scope: model`, allocate over all linears
    - on_finalize
        - make `save_pretrained` write the packed checkpoint

    :param sparsity: fraction of weights pruned in each expert, 0 < sparsity < 1
    :param mask_structure: "row" (every neuron keeps the same number of weights per column block),
        "unstructured" (one threshold per column block, as SparseGPTModifier's "0:0"), or "N:M"
    :param num_experts: experts per input group; 1 is plain sparse, without a router
    :param size_budget: bytes stored for the targeted linears over their dense bytes; null stores
        every expert in full (the paper's method)
    :param budget_scope: "layer" meets the budget in each linear, "model" over all of them, with
        more for early blocks, whose errors reach further, and calibrates on full expansions until
        then (better; keeps twice the budget in memory until the end)
    :param score: what the budget is spent on; "gain" (error removed per byte) or one of
        "wasserstein", "gain_wasserstein", "kurtosis", "gain_kurtosis", "random"
    :param share_versions: let similar experts share a version (on), or give an expert its own
        version or the base version only (off)
    :param targets: class names or "re:" patterns of linears, or of modules that contain them
    :param ignore: the same, to leave out
    :param block_size: columns per mask decision of the solver
    :param dampening_frac: damping of the Hessian, as a fraction of its mean diagonal
    :param shrinkage: weight of all tokens' Hessian in each expert's, in multiples of in_features
        tokens
    :param router_dims: PCA dimensions for clustering; in_features / 32, at least 8, if null
    :param router_samples: rows of an input group that are clustered
    :param router_restarts: k-means starts
    :param seed: of sampling and clustering
    :param max_bytes: bytes of working memory of the solver beside Hessians and results
    """

    requires_calibration_data: bool = True

    # modifier arguments
    sparsity: float
    mask_structure: str = "row"
    num_experts: int = 16
    size_budget: float | None = None
    budget_scope: str = "model"
    score: str = "gain"
    share_versions: bool = True
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=list)
    block_size: int = 128
    dampening_frac: float = 0.01
    shrinkage: float = 0.03

    # router arguments
    router_dims: int | None = None
    router_samples: int = 8192
    router_restarts: int = 3
    seed: int = 0

    max_bytes: int = 512 << 20

    # private variables
    _structure: MaskStructure = PrivateAttr()
    _linears: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)
    _replays: dict[str, BlockReplay] = PrivateAttr(default_factory=dict)
    _blocks: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _candidates: dict[str, Candidates] = PrivateAttr(default_factory=dict)
    _expanded: dict[str, RoutedLinear] = PrivateAttr(default_factory=dict)
    # the share of the model's blocks that an error of the linear reaches: its own and later ones
    _reach: dict[str, float] = PrivateAttr(default_factory=dict)

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _parse_structure(cls, value: str | int) -> str:
        return str(MaskStructure.parse(value))

    @model_validator(mode="after")
    def _check_values(self) -> "SparseExpansionModifier":
        def refuse(key: str, right: str) -> None:
            raise ValueError(f"{key}: {getattr(self, key)!r} should be {right}")

        self._structure = structure = MaskStructure.parse(self.mask_structure)
        if not 0 < self.sparsity < 1:
            refuse("sparsity", "between 0 and 1, both excluded")
        if structure.m:
            if abs(self.sparsity - structure.n / structure.m) > 1e-6:
                refuse("sparsity", f"{structure.n / structure.m} for mask_structure {structure}")
            if self.block_size % structure.m:
                refuse("block_size", f"a multiple of {structure.m} for mask_structure {structure}")
        for key in ("num_experts", "block_size", "router_samples", "router_restarts", "max_bytes"):
            if getattr(self, key) < 1:
                refuse(key, "at least 1")
        if self.router_dims is not None and self.router_dims < 1:
            refuse("router_dims", "at least 1, or null")
        if self.budget_scope not in ("layer", "model"):
            refuse("budget_scope", '"layer" or "model"')
        if self.score not in SCORES:
            refuse("score", f"one of {', '.join(SCORES)}")
        if self.dampening_frac <= 0:
            refuse("dampening_frac", "above 0")
        if self.shrinkage < 0:
            refuse("shrinkage", "0 or above")
        if self.size_budget is not None:
            if self.num_experts == 1:
                refuse("size_budget", "null: with num_experts 1 there is nothing to allocate")
            if self.size_budget <= 0:
                refuse("size_budget", "above 0, or null for full expansion")
        return self

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Find the targeted linears and refuse what cannot work, before any calibration."""
        model = state.model
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise WexpandError("model: already expanded; compress the dense model instead")
        linears = target_linears(model, self.targets, self.ignore)
        patterns = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        blocks = dict(match_named_modules(model, patterns))
        for name in list(linears):
            owner = next((b for b in blocks if name == b or name.startswith(f"{b}.")), None)
            if owner is None:
                logger.warning(f"{name} is in none of the blocks {patterns}: it stays dense")
                del linears[name]
            else:
                self._blocks[owner] = blocks[owner]
                self._reach[name] = 1 - list(blocks).index(owner) / len(blocks)
        if not linears:
            raise WexpandError(f"targets: {self.targets} match linears outside the blocks only")
        self._linears = linears
        for name, linear in linears.items():
            self._check_linear(name, linear)
        self._check_tokens(state)
        return True

    def _check_linear(self, name: str, linear: nn.Linear) -> None:
        structure, (out, width) = self._structure, linear.weight.shape
        if structure.m and width % structure.m:
            raise WexpandError(
                f"mask_structure: {structure} needs in_features that {structure.m} divides; "
                f"{name} has {width}"
            )
        if self.size_budget is None:
            return
        # row versions of a neuron are alike in size, so the base versions' size is known beforehand
        item = linear.weight.element_size()
        base = out * (round(width * (1 - self.sparsity)) * item + (width + 7) // 8)
        least = (base + fixed_bytes(out, width, self.num_experts)) / dense_bytes(linear.weight)
        if self.size_budget < least:
            raise WexpandError(
                f"size_budget: {self.size_budget} is below {least:.3f}, the size of the base "
                f"versions, row map and router of {name} alone (sparsity {self.sparsity}, "
                f"{self.num_experts} experts, {linear.weight.dtype}); raise the budget or the "
                "sparsity, or use fewer experts"
            )

    def _check_tokens(self, state: State) -> None:
        need = self.num_experts * TOKENS_PER_EXPERT if self.num_experts > 1 else 1
        found = 0
        for batch in state.data.calib or ():
            found += batch["input_ids"].numel()
            if found >= need:
                break
        else:
            raise WexpandError(
                f"calibration: {found} tokens are too few for num_experts {self.num_experts}, "
                f"which needs at least {need} ({TOKENS_PER_EXPERT} per expert, better thousands)"
            )
        dense = sum(dense_bytes(linear.weight) for linear in self._linears.values())
        size = "in full" if self.size_budget is None else f"in {self.size_budget} x their size"
        memory = working_bytes(self._linears, self._settings()) / 2**30
        logger.info(
            f"Expanding {len(self._linears)} linears ({dense / 2**20:.1f} MiB dense) of "
            f"{len(self._blocks)} blocks into {self.num_experts} experts at sparsity "
            f"{self.sparsity} ({self.mask_structure}), stored {size}; "
            f"about {memory:.1f} GiB beside the model"
        )

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """Record each block's arguments from now on."""
        for name, block in self._blocks.items():
            self._replays[name] = BlockReplay(block, self)

    def on_sequential_epoch_end(self, state: State, event: Event, modules=None, **kwargs):
        """Expand the linears of the blocks that have just been calibrated."""
        for module in self._expanded.values():
            module.dematerialise()  # its block has been propagated
        ready = [n for n, replay in self._replays.items() if len(replay)]
        if modules is not None:
            ready = [n for n in ready if any(m is self._blocks[n] for m in modules)]
        for name in ready:
            replay = self._replays.pop(name)
            with torch.no_grad(), calibration_forward_context(state.model):
                self._expand_block(state.model, name, replay)

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """Drop hooks; settle what the whole model competes for."""
        self.remove_hooks()
        for module in self._expanded.values():
            module.dematerialise()
        if self._candidates:
            self._allocate_model(state.model)
        stored = sum(module.stored_bytes() for module in self._expanded.values())
        dense = sum(module.dense_bytes() for module in self._expanded.values())
        if dense:
            logger.info(
                f"Expanded {len(self._expanded)} linears: {stored / 2**20:.1f} MiB, "
                f"{stored / dense:.3f} of dense"
            )

    def on_finalize(self, state: State, **kwargs) -> bool:
        """From now on saving the model writes the packed checkpoint."""
        if left := [n for n in self._linears if n not in self._expanded]:
            logger.warning(f"no calibration token reached {', '.join(left)}: they stay dense")
        if not self._expanded:
            raise WexpandError("calibration reached none of the targeted linears")
        recipe = self.model_dump(
            include={
                "sparsity", "mask_structure", "num_experts", "size_budget", "budget_scope",
                "score", "share_versions", "seed",
            }
        )  # fmt: skip
        wrap_save_pretrained(state.model, {"modifier": type(self).__name__, **recipe})
        self._linears, self._blocks, self._candidates, self._expanded = {}, {}, {}, {}
        return True

    def _expand_block(self, model: nn.Module, name: str, replay: BlockReplay) -> None:
        linears = {n: m for n, m in self._linears.items() if n == name or n.startswith(f"{name}.")}
        groups = replay.groups(linears)
        ready: list[GroupStatistics | None] = [None] * len(groups)
        if self.num_experts == 1:
            # plain SparseGPT, as llm-compressor does it: the whole block on its dense inputs
            ready = [*sum_hessians(groups, [None] * len(groups), replay, self._settings())]
        for group, found in zip(tqdm(groups, f"Expanding {name}", leave=False), ready, strict=True):
            start = time.perf_counter()
            try:
                done = expand_group(model, group, replay, self._settings(), found)
            except WexpandError as error:
                raise WexpandError(f"{group.label}: {error}") from None
            for place, (linear, module) in enumerate(zip(group.names, done.modules, strict=True)):
                self._expanded[linear] = module
                if done.candidates:
                    self._candidates[linear] = done.candidates[place]
            logger.info(
                f"{group.label}: {self.num_experts} experts, tokens per expert "
                f"{int(done.tokens.min())}/{int(done.tokens.median())}/{int(done.tokens.max())} "
                f"(min/median/max), relative error {', '.join(f'{e:.3f}' for e in done.errors)}, "
                f"{time.perf_counter() - start:.1f} s"
            )

    def _settings(self) -> Settings:
        shared = {field.name for field in fields(Settings)} - {"structure"}
        return Settings(structure=self._structure, **{key: getattr(self, key) for key in shared})

    def _allocate_model(self, model: nn.Module) -> None:
        """Allocate once more, over all linears at once."""
        assert self.size_budget is not None
        budget = 0.0
        for name in self._candidates:
            old = self._expanded[name]
            fixed = fixed_bytes(old.out_features, old.in_features, self.num_experts)
            budget += self.size_budget * old.dense_bytes() - fixed
        reach = [self._reach[name] for name in self._candidates]
        choices = allocate_model(list(self._candidates.values()), reach, budget)
        for (name, candidates), choice in zip(self._candidates.items(), choices, strict=True):
            old = self._expanded[name]
            router = old.router
            bias = None if old.bias is None else old.bias.data
            pool = candidates.select(choice).to(old.weight.device)
            module = replace_linear(model, name, old, pool, router, bias, old.group)
            module.tokens = old.tokens
            self._expanded[name] = module
