"""What an error in the outputs of a linear costs the model, in nats per token.

With g the gradient of the loss with respect to the outputs y of a linear, a small error dy adds
(g . dy)^2 / 2 to the loss on average: to second order by the Fisher information, which is the
expected g g^T when labels are drawn from the model's own predictions (the expected g is 0 then).
With the errors of different neurons, and of different tokens, taken as independent that is

    1/2 sum_r E[g_r^2] E[dy_r^2],    and E[dy_r^2] = (w_r - w'_r) H (w_r - w'_r)^T

for a linear whose weight W became W', H the mean of x x^T over its inputs. So one backward pass
over a few tokens gives a weight G_r = E[g_r^2] for every neuron, and with it errors of all linears
of a model are in one unit, and add up. It is a prediction for small errors: where much is lost, a
model loses more or less than the sum.
"""

import torch
from torch import Tensor

__all__ = ["added_loss", "output_errors", "sampled_loss"]


def output_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared change of each neuron's output, E[dy_r^2], float32 [out].

    :param change: of the weight [out, in]
    :param hessian: mean of x x^T over the inputs [in, in]
    """
    change = change.to(hessian)
    return ((change @ hessian) * change).sum(dim=1).clamp_(min=0)


def added_loss(errors: Tensor, sensitivity: Tensor) -> float:
    """The loss that errors of a linear's outputs add, in nats per token.

    :param errors: E[dy_r^2] of each neuron [out], see `output_errors`
    :param sensitivity: G of each neuron [out]: squared gradients of the summed loss with respect to
        the outputs, summed over the tokens and divided by their number
    """
    return float((errors.double() * sensitivity.to(errors.device).double()).sum()) / 2


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
