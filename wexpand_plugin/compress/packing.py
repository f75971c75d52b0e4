"""`PackModifier`: put last in a recipe, it saves what was pruned as packed rows, ready to serve."""

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field
from tqdm import tqdm

from ..errors import WexpandError
from ..format.rowpool import RowPool
from ..hf.saving import wrap_save_pretrained
from .checks import refuse_distributed, refuse_mixed, refuse_nonfinite, refuse_unrolled
from .made_by import after_others, made_by
from .precision import stored_dtype
from .rows import replace_linear
from .targets import HEADS, target_linears

__all__ = ["PackModifier"]


class PackModifier(Modifier):
    """
    Packs the linears that earlier modifiers of the recipe pruned (SparseGPT, Wanda, magnitude,
    2:4), so that the saved model is small and vLLM serves it sparse. Changes no weight.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        WandaPruningModifier:
          sparsity: 0.5
          targets: ['re:.*layers.*_proj$']
        PackModifier:
          targets: ['Linear']
          ignore: ['re:.*lm_head']
    ```

    Lifecycle:

    - on_initialize
        - check that the targets match linears
    - on_finalize
        - replace each linear that is smaller packed; make `save_pretrained` write the checkpoint

    :param targets: class names or "re:" patterns of linears, or of modules that contain them
    :param ignore: the same, to leave out
    """

    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=lambda: list(HEADS))

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Refuse targets that match nothing, before any work."""
        refuse_distributed(type(self).__name__)
        refuse_mixed(state.model)
        linears = target_linears(state.model, self.targets, self.ignore)
        refuse_unrolled(state.model, linears)
        refuse_nonfinite(linears)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """Now that all modifiers have begun, refuse what a checkpoint could not hold."""
        refuse_mixed(state.model)

    @torch.no_grad()
    def on_finalize(self, state: State, **kwargs) -> bool:
        """Pack what is smaller packed."""
        if not self.ended_:  # the session is reset after a run that failed
            return True
        packed = dense = count = 0
        linears = target_linears(state.model, self.targets, self.ignore)
        for name, linear in tqdm(linears.items(), "Packing", leave=False):
            weight = linear.weight.detach().to(stored_dtype(state.model, linear.weight))
            # a pruned weight may be -0.0: multiplication by a mask leaves the sign
            pool = RowPool.pack(weight, keep=weight != 0)
            stored = sum(pool.stored_bytes().values())
            if stored >= weight.nbytes:
                continue
            replace_linear(state.model, name, linear, pool)
            packed, dense, count = packed + stored, dense + weight.nbytes, count + 1
        if not count:
            raise WexpandError(
                f"targets: none of {len(linears)} linears is sparse enough to be smaller packed; "
                "put PackModifier after a modifier that prunes"
            )
        logger.info(
            f"Packed {count} of {len(linears)} linears: {packed / 2**20:.1f} MiB, "
            f"{packed / dense:.3f} of dense"
        )
        wrap_save_pretrained(state.model, after_others(state.model, made_by(self, state.model)))
        return True
