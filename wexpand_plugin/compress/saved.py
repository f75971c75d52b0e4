"""Whether a saved model computes what the one in memory does.

Checksums say that a file holds what was written. That what was written is the model (the right
tensors under the right names, in dtypes that hold them) is seen by loading and running it.
"""

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor

from ..errors import WexpandError
from .calibration import run

__all__ = ["TOKENS", "check_saved"]

TOKENS = 64
"""that are compared"""
ROUNDING = 8
"""how far outputs may be off, relative, in steps of the model's dtype; a device rounds its own way,
and a token beside the border of two clusters may change sides"""


@torch.no_grad()
def check_saved(model: Any, directory: Path, ids: list[int]) -> None:
    """Compare the logits of `model` with those of what is saved in `directory`.

    :param ids: calibration tokens; the first `TOKENS` of them are run
    :raises WexpandError: they differ beyond rounding, or are not finite
    """
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([ids[:TOKENS]])
    expected = _logits(model, tokens)
    if not bool(expected.isfinite().all()):
        raise WexpandError(
            f"model: compressed, its outputs for calibration tokens are NaN or infinite in "
            f"{model.dtype}, so it is not saved; prune less, or leave out linears with ignore"
        )
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
    error = float((_logits(saved, tokens) - expected).norm() / expected.norm().clamp(min=1e-12))
    limit = max(1e-3, ROUNDING * torch.finfo(model.dtype).eps)
    if not error <= limit:
        raise WexpandError(
            f"model: read back, its outputs for calibration tokens differ by {error:.3g} of their "
            f"size from those in memory, and rounding explains {limit:.3g}, so it is not saved"
        )


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits, float32 in main memory; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        device = get_execution_device(model.get_input_embeddings())
        return run(model, {"input_ids": tokens.to(device)}).float().cpu()
    finally:
        model.train(training)
