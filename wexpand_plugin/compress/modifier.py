"""`SparseExpansionModifier`: the recipe entry that expands linears into sparse experts."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from ..errors import WexpandError
from ..hf.linear import RoutedLinear
from ..hf.saving import wrap_save_pretrained
from ..method import ranks
from ..method.masks import MaskStructure
from ..method.prospects import Dial
from ..method.settings import Settings
from .announce import findings, say_beginning, say_end
from .attention import FusedAttention
from .bypass import Bypass
from .calibration import CalibrationBatches, about_rows
from .checks import (
    count_tokens,
    refuse_misfit,
    refuse_mixed,
    refuse_nonfinite,
    refuse_same_rows,
    refuse_shared,
    refuse_small,
    refuse_unrolled,
)
from .choosing import Choice, choose_settings, refuse_unreachable, use_settings
from .estimate import refuse_unreadable
from .expansion import Block, Target, allocate_targets, expand_block
from .finished import finished_linears, restore_linears, wait_in
from .made_by import after_others, crc_of_weights, made_by, whole_recipe
from .passing import PassingStatistics
from .precision import stored_dtype
from .progress import Part
from .replay import BlockReplay
from .targets import find_targets
from .tuning import DensePath
from .whole import refuse_gaps, tune_whole

__all__ = ["SparseExpansionModifier"]


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

    :param sparsity: fraction of weights pruned in each expert, below 1; N/M with a mask of N:M, and
        0 with integers only; or "auto": chosen, with `values`, for the least loss in `size_budget`
        and `read_budget` (without `num_clusters`; with several experts it takes a `read_budget`)
    :param mask_structure: "row" (every neuron keeps the same number of weights),
        "unstructured" (one threshold per column block, as SparseGPTModifier's "0:0"), or "N:M"
    :param values: how kept weights are stored: "float" or "auto" (in the model's dtype), "int8",
        "int6", "int5", "int4", "int3" or "int2", rounded together with pruning. With
        `sparsity: auto`, "auto" is any of them for each input group; others leave only zeros to
        choose
    :param value_group: columns of a row that share a scale, with integers; a multiple of 8 that
        divides `block_size`
    :param num_experts: experts per input group, at most 256; 1 is plain pruning or quantisation
    :param num_clusters: clusters with a bias each, which makes up for what a cluster's mean input
        loses; num_experts to 4096, and each expert is a set of them; 0 for no biases, and a cluster
        for each expert. A token reads one bias, and of a router with more than 32 clusters about
        2 sqrt(num_clusters) rows
    :param size_budget: bytes stored for the targeted linears over their dense bytes; null stores
        every expert in full (the paper's method). One expert may have it, and `read_budget`, with
        `sparsity: auto` only, as nothing else is left to choose
    :param read_budget: bytes that a token reads of the targeted linears over their dense bytes, or
        null. With one expert all that is stored is read. With several and `sparsity: auto`, zeros
        and bits are chosen by it, and experts have the rest of `size_budget` (null: full expansion)
    :param budget_scope: "layer" meets the budgets in each linear, "model" over all of them, with
        more for early blocks, whose errors reach further, and calibrates on full expansions until
        then (better; keeps up to twice the budget until the end, on disk if the run can be resumed
        and else in memory)
    :param allocate_by: what the budget is spent on; "gain" (error removed per byte) or one of
        "wasserstein", "gain_wasserstein", "kurtosis", "gain_kurtosis", "random"
    :param share_versions: let similar experts share a version (on), or give an expert its own
        version or the base version only (off)
    :param targets: class names or "re:" patterns of linears, or of modules that contain them
    :param ignore: the same, to leave out
    :param block_size: columns per mask decision of the solver
    :param dampening_frac: damping of the Hessian, as a fraction of its mean diagonal
    :param shrinkage: weight of all tokens' Hessian in each expert's, in multiples of in_features
        tokens
    :param tune_epochs: passes of block tuning: after a block has been solved, its kept values,
        scales and biases are trained to give the dense model's hidden states; 0 for none. With a
        `size_budget` for experts, `budget_scope` has to be "layer"
    :param tune_lr: its learning rate (Adam, falling linearly), relative to the size of a linear's
        weights (their root mean square); null: 0.06, for integers 0.01. Linears in int3 and int2
        take 2 and 4 times what is said
    :param tune_model_epochs: passes of tuning through the whole model, after its last block: the
        same is trained to give the dense model's predictions; 0 for none. Takes a model that fits
        on its device, and about four times a pass of it for each epoch; and blocks that follow
        each other, all with targets
    :param tune_model_lr: its learning rate, as `tune_lr`
    :param router_dims: PCA dimensions for clustering; in_features / 32, at least 8 (64 with
        num_clusters), if null
    :param router_samples: rows of an input group that are clustered; with many num_clusters up to
        65536, 32 for each, if there are so many
    :param router_restarts: k-means starts
    :param seed: of sampling and clustering
    :param max_bytes: bytes of working memory of the solver beside Hessians and results
    """

    requires_calibration_data: bool = True

    # modifier arguments
    sparsity: float | Literal["auto"]
    mask_structure: str = Settings.mask_structure
    values: str = Settings.values
    value_group: int = Settings.value_group
    num_experts: int = Settings.num_experts
    num_clusters: int = Settings.num_clusters
    size_budget: float | None = Settings.size_budget
    read_budget: float | None = Settings.read_budget
    budget_scope: str = Settings.budget_scope
    allocate_by: str = Settings.allocate_by
    share_versions: bool = Settings.share_versions
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=list)
    block_size: int = Settings.block_size
    dampening_frac: float = Settings.dampening_frac
    shrinkage: float = Settings.shrinkage
    tune_epochs: int = Settings.tune_epochs
    tune_lr: float | None = Settings.tune_lr
    tune_model_epochs: int = Settings.tune_model_epochs
    tune_model_lr: float = Settings.tune_model_lr

    # router arguments
    router_dims: int | None = Settings.router_dims
    router_samples: int = Settings.router_samples
    router_restarts: int = Settings.router_restarts
    seed: int = Settings.seed

    max_bytes: int = Settings.max_bytes

    # private variables
    _settings: Settings = PrivateAttr()
    _dial: Dial | None = PrivateAttr(default=None)
    _choice: Choice | None = PrivateAttr(default=None)
    _targets: dict[str, Target] = PrivateAttr(default_factory=dict)
    _blocks: dict[str, Block] = PrivateAttr(default_factory=dict)
    _replays: dict[str, BlockReplay] = PrivateAttr(default_factory=dict)
    _passing: dict[str, PassingStatistics] = PrivateAttr(default_factory=dict)
    _batches: CalibrationBatches = PrivateAttr(default_factory=CalibrationBatches)
    _ran: list[Mapping[str, Any]] = PrivateAttr(default_factory=list)
    _data: dict[str, Any] = PrivateAttr(default_factory=dict)
    _path: DensePath = PrivateAttr(default_factory=DensePath)
    _attention: FusedAttention = PrivateAttr(default_factory=FusedAttention)
    _bypass: Bypass = PrivateAttr(default_factory=Bypass)
    _running: list[BlockReplay] = PrivateAttr(default_factory=list)
    _part: Part = PrivateAttr(default_factory=Part)
    _tuned: dict[str, list[float]] = PrivateAttr(default_factory=dict)
    _alone: bool = PrivateAttr(default=True)

    @field_validator("sparsity", mode="before")
    @classmethod
    def _parse_sparsity(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, int | float):
            raise ValueError("should be a number, or auto")
        return value

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _parse_structure(cls, value: str | int) -> str:
        return str(MaskStructure.parse(value))

    @model_validator(mode="after")
    def _check_values(self) -> "SparseExpansionModifier":
        keys = {field.name for field in fields(Settings)} & set(type(self).model_fields)
        values = {key: getattr(self, key) for key in keys}
        if self.sparsity == "auto":
            self._dial = Dial.of(values)
            self._settings = self._dial.base
        else:
            self._settings = Settings(**values)
        return self

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Find the targeted linears and refuse what cannot work, before any calibration."""
        model = state.model
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise WexpandError("model: already expanded; compress the dense model instead")
        patterns = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        blocks = dict(match_named_modules(model, patterns))
        self._blocks, self._targets = find_targets(model, blocks, self.targets, self.ignore)
        refuse_mixed(model)
        refuse_shared(self, self._targets)
        for name, target in self._targets.items():
            assert target.linear is not None
            refuse_misfit(name, target.linear.weight.shape[1], self._settings)
        linears = {n: t.linear for n, t in self._targets.items() if t.linear is not None}
        refuse_unrolled(model, linears)
        refuse_nonfinite(linears)
        if self._dial is not None:
            refuse_unreachable(model, linears, self._dial)
        else:
            with disable_onloading():  # shapes alone; on a GPU each weight would be copied there
                shapes = {
                    name: (linear.weight.shape, stored_dtype(model, linear.weight))
                    for name, linear in linears.items()
                }
            refuse_small(shapes, self._settings)
            refuse_unreadable(model, linears, self._settings)
        refuse_same_rows(kwargs.get("calib_data"))
        tokens, batches = count_tokens(state.data.calib or (), self._settings)
        self._part = Part.begin()
        if self._part.kept:
            data = {"data": about_rows(kwargs.get("calib_data"))}
            crc = {"weights": crc_of_weights(model)}
            others = {"recipe": whole_recipe()}
            self._part.same_run(made_by(self, model) | data | crc | others)
        self._batches = CalibrationBatches.watch(kwargs.get("calib_data"))
        if self._settings.tune_model_epochs:
            refuse_gaps(model, [block.place for block in self._blocks.values()])
            self._batches.keep = True
        self._attention = FusedAttention(block.module for block in self._blocks.values())
        say_beginning(
            model, self._blocks, self._targets, self._settings, self._dial, tokens, batches,
            self._part.kept,
        )  # fmt: skip
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """Choose settings where the recipe leaves them open; from now on record each block's
        arguments."""
        refuse_mixed(state.model)  # now that all modifiers have begun
        refuse_shared(self, self._targets)
        self._attention.hook()
        if self._dial is not None:
            choice = self._part.read("plan")
            if choice is None:
                linears = {n: t.linear for n, t in self._targets.items() if t.linear is not None}
                loader = state.data.calib or ()
                with ranks.together():
                    choice = choose_settings(state.model, linears, loader, self._dial)
                self._part.write("plan", choice)
            self._choice = choice
            use_settings(self._targets, choice, self._dial)
        self._alone = len(active_session().lifecycle.recipe.modifiers) == 1
        passing = self._one_pass()
        for name, block in self._blocks.items():
            current = self._batches.current
            self._replays[name] = BlockReplay(
                block.module, self.register_hook, current, None if passing else self._bypass,
                keep=not passing or self._tunes(),
            )  # fmt: skip
            if passing and not self._part.has(_record(block)):
                linears = {
                    n: t.linear
                    for n, t in self._targets.items()
                    if t.block == name and t.linear is not None
                }
                self._passing[name] = PassingStatistics(
                    block.module, linears, self.register_hook, current, self.seed
                )

    def on_sequential_epoch_end(self, state: State, event: Event, modules=None, **kwargs):
        """Expand the linears of the blocks that have just been calibrated."""
        self._bypass.end()
        self._end_propagation()
        self._settle()
        ready = [n for n, replay in self._replays.items() if len(replay)]
        if modules is not None:
            ready = [n for n in ready if any(m is self._blocks[n].module for m in modules)]
        for name in ready:
            with ranks.together(), torch.no_grad(), calibration_forward_context(state.model):
                replay, passing = self._replays.pop(name), self._one_pass()
                replay.recorded()
                self._running.append(replay)
                if not passing:
                    replay.run_together(self.seed)
                self._finish(state.model, self._blocks[name], replay)
                if self._tunes():
                    self._path.leave(replay)
            # another modifier may be about to run the block on the same inputs
            if len(ready) == 1 and not passing and self._alone:
                replay.propagate()
            else:
                replay.forget()
            self._bypass.expanded(self._blocks[name].module, len(ready))

    def _finish(self, model: nn.Module, block: Block, replay: BlockReplay) -> None:
        """Expand the linears of a block, or put back what an earlier run made of them."""
        targets = {n: t for n, t in self._targets.items() if t.block == block.name}
        outputs: list[Tensor] = []
        if self._tunes():
            whole = self._settings.tune_model_epochs > 0
            outputs = self._path.targets(replay, block.place, unbroken=whole)
        passing, data = self._passing.pop(block.name, None), self._batches.about()
        if passing is not None:
            passing.recorded()
        known = self._part.read(_record(block))
        if known is not None:
            if known["data"] != data:
                raise WexpandError(
                    "resume: the calibration batches come in another order; call "
                    "torch.manual_seed with the same seed before oneshot"
                )
            restore_linears(model, targets, known["linears"], self._part.file(_record(block)))
            self._tuned[block.name] = known["tuned"]
            logger.info(f"{block.name}: as it was found before")
            return
        gained = expand_block(model, block, targets, replay, passing, outputs, self._settings)
        self._tuned[block.name] = [] if gained is None else [gained.before, gained.after]
        if self._part.kept:
            finished = {"linears": finished_linears(targets), "tuned": self._tuned[block.name]}
            self._part.write(_record(block), finished | {"data": data})
            wait_in(self._part.file(_record(block)), targets)

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """Drop hooks; settle what the whole model competes for."""
        self.remove_hooks()
        self._attention.remove()
        self._end_propagation()
        self._settle()
        # a modifier after this one may run the data again, in another order
        self._ran, self._data = self._batches.batches, self._batches.about()
        if any(target.candidates for target in self._targets.values()):
            allocate_targets(state.model, self._targets, self._settings)
        say_end(self._targets, self._choice)

    def on_finalize(self, state: State, **kwargs) -> bool:
        """From now on saving the model writes the packed checkpoint."""
        # the session is reset after a run that failed
        if not all(modifier.ended_ for modifier in active_session().lifecycle.recipe.modifiers):
            return self._forget()
        dense = [name for name, target in self._targets.items() if target.routed is None]
        if len(dense) == len(self._targets):
            raise WexpandError("calibration reached none of the targeted linears")
        if dense:
            logger.warning(f"no calibration token reached {', '.join(dense)}: they stay dense")
        about = made_by(self, state.model, self._data)
        about |= findings(
            self._targets, self._tuned if self._settings.tune_epochs else None, self._choice
        )
        if self._settings.tune_model_epochs:
            with ranks.together():
                about["tuned_model"] = self._tune_whole(state.model)
        about = after_others(state.model, about)
        wrap_save_pretrained(state.model, about, writes=ranks.rank() == 0)
        return self._forget()

    def _tune_whole(self, model: nn.Module) -> list[float]:
        """Train all that is kept; the divergence before and after."""
        routed = {n: t.routed for n, t in self._targets.items() if t.routed is not None}
        blocks = [block.module for block in self._blocks.values()]
        found, gained = tune_whole(
            model, blocks, routed, self._ran, self._path.states, self._settings
        )
        for name, linear in found.items():
            self._targets[name].routed = linear
        return [float(f"{error:.3g}") for error in (gained.before, gained.after)]

    def _forget(self) -> bool:
        self.remove_hooks()
        self._bypass.end()
        self._end_propagation()
        self._attention.remove()
        self._batches.release()
        self._targets, self._blocks, self._replays, self._passing = {}, {}, {}, {}
        self._path, self._ran = DensePath(), []
        return True

    def _one_pass(self) -> bool:
        """Whether the pipeline's own run of a block is enough, without replays: others that are
        calibrated in the same run may change the block at its end, before it is expanded."""
        return self._settings.clusters == 1 and not self._settings.biased and self._alone

    def _tunes(self) -> bool:
        return bool(self._settings.tune_epochs or self._settings.tune_model_epochs)

    def _end_propagation(self) -> None:
        while self._running:
            self._running.pop().forget()

    def _settle(self) -> None:
        """Blocks that have been propagated compute with what they store."""
        for target in self._targets.values():
            if target.routed is not None:
                target.routed.dematerialise()


def _record(block: Block) -> str:
    """The name of what is kept of a block."""
    return f"block-{block.place:05d}"
