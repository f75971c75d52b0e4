"""What an error in the outputs of a linear costs the model, in nats per token.

With g the gradient of the loss with respect to the outputs y of a linear, a small error dy adds
(g . dy)^2 / 2 to the loss on average: to second order by the Fisher information, which is the
expected g g^T when labels are drawn from the model's own predictions (the expected g is 0 then).
With errors of different tokens taken as independent, and of different neurons too, that is

    sum_r E[g_r^2] E[dy_r^2] / 2,    E[dy_r^2] = dw_r H dw_r^T, H = E[x x^T]

for a linear whose weight changed by dW. For rounding errors that is enough. Where most weights are
pruned it is not: errors of different neurons then go together, and are large where gradients are,
and the loss is two to four times that sum (evals/LOG.md). So a sample of tokens, whose g and x are
kept, says by what factor the mean of (g . dW x)^2 differs from the sum over neurons.

One backward pass over a few tokens gives all of it, for all linears; their losses are in one unit,
and add up. Losses of a few tenths of a nat and more are no longer small errors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sensitivity", "added_loss", "output_errors", "sampled_loss"]


@dataclass(frozen=True)
class Sensitivity:
    """What is known of the loss's gradients with respect to a linear's outputs."""

    squares: Tensor
    """E[g_r^2] of each neuron, float32 [out]: of the loss summed over tokens, a mean over tokens"""
    gradients: Tensor
    """g of some tokens [n, out]"""
    inputs: Tensor
    """x of the same tokens [n, in]"""


def output_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared change of each neuron's output, E[dy_r^2], float32 [out].

    :param change: of the weight [out, in]
    :param hessian: mean of x x^T over the inputs [in, in]
    """
    change = change.to(hessian)
    return ((change @ hessian) * change).sum(dim=1).clamp_(min=0)


def added_loss(change: Tensor, hessian: Tensor, sensitivity: Sensitivity) -> float:
    """The loss that a change of a linear's weight adds, in nats per token.

    :param change: of the weight [out, in]
    :param hessian: mean of x x^T over the inputs [in, in]
    """
    errors = output_errors(change, hessian)
    apart = float((errors * sensitivity.squares.to(errors)).sum(dtype=torch.float64)) / 2
    if not sensitivity.inputs.numel():  # no token of the sample reached the linear
        return apart
    g, x = sensitivity.gradients.to(errors), sensitivity.inputs.to(errors)
    together = float(((x @ change.to(errors).t()) * g).sum(dim=1).square().sum(dtype=torch.float64))
    alone = float((g.square() @ errors).sum(dtype=torch.float64))
    return apart * together / alone if alone > 0 else apart


def sampled_loss(logits: Tensor, counts: Tensor | None, generator: torch.Generator) -> Tensor:
    """Loss on labels that are drawn from the model's own predictions, summed over the tokens.

    :param logits: [..., vocabulary]
    :param counts: booleans [...], which tokens count; None: all
    """
    log_p = logits.float().log_softmax(dim=-1).flatten(0, -2)
    if counts is not None:
        log_p = log_p[counts.flatten().to(log_p.device)]
    # drawn on the CPU, so that a seed means the same on any device
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return -log_p.gather(1, labels.to(log_p.device)).sum()
