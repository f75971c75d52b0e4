"""One mask and a low-rank correction, tuned together: a control for experts at equal bytes.

W is replaced by M + U V: M is SparseGPT's, U V of rank r the best correction of W - M for the
calibration inputs, (W - M - U V) H^(1/2) being least. Both are tuned block by block, by the
method's own pieces as in `evals.tuning`; `evals.low_rank` compares without tuning. U and V end as
float16, M as bfloat16. No checkpoint holds such a linear, so the model is measured as it is in
memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evals.grounds import Ground
from evals.tuning import GROUPS, Blocks
from wexpand_plugin.method.inputs import record_inputs
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.method.tunable import TunableLinear
from wexpand_plugin.method.versions import SolvedRows

__all__ = ["Corrected", "factors", "measure"]


def factors(error: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [out, rank] and V [rank, in], float64, with U V nearest to `error` [out, in] for inputs
    with this second moment [in, in]: least mean ||(error - U V) x||^2; by an SVD of error H^(1/2).
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    values = values.clamp(min=float(values[-1]) * 1e-9)
    root, inverse = vectors * values.sqrt(), (vectors / values.sqrt()).t()
    u, s, v = torch.linalg.svd(error.double() @ root, full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, half.unsqueeze(1) * v[:rank] @ inverse


class Corrected(nn.Module):
    """y = (M + U V) x, all of it trainable.

    :param linear: M
    :param error: W - M [out, in]
    :param hessian: second moment of the inputs [in, in]
    """

    def __init__(self, linear: TunableLinear, error: Tensor, hessian: Tensor, rank: int):
        super().__init__()
        self.linear, self.pace = linear, linear.pace
        left, right = factors(error, hessian, rank)
        # relative to their size, as the values of a TunableLinear
        self.sizes = [float(part.square().mean().sqrt()) if rank else 1.0 for part in (left, right)]
        self.left = nn.Parameter((left / self.sizes[0]).float())
        self.right = nn.Parameter((right / self.sizes[1]).float())

    def parts(self) -> tuple[Tensor, Tensor]:
        """U [out, rank] and V [rank, in]"""
        return self.left * self.sizes[0], self.right * self.sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        left, right = self.parts()
        return self.linear(x) + x @ right.t() @ left.t()

    @torch.no_grad()
    def solved(self) -> SolvedRows:
        """M + U V in float32, of parts as they would be stored."""
        left, right = (part.half().float() for part in self.parts())
        return SolvedRows(self.linear.solved().weights.bfloat16().float() + left @ right)


class CorrectedBlocks(Blocks):
    """Blocks whose linears have a correction of `rank`."""

    rank = 0

    def _solved(self, block: Any, inputs: list[Tensor], settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = dict(super()._solved(block, inputs, settings))
        for names in GROUPS:
            first = getattr(block.mlp, names[0])
            hessian = torch.zeros(first.in_features, first.in_features, dtype=torch.float64)
            forwards = (lambda hidden=hidden: self.run(block, hidden) for hidden in inputs)
            with torch.no_grad():
                for seen in record_inputs([first], forwards):
                    rows = seen[first].flatten(0, -2).double()
                    hessian += rows.t() @ rows
            for name in names:
                error = getattr(block.mlp, name).weight - found[name].weight()
                found[name] = Corrected(found[name], error.detach(), hessian, self.rank)
        return found


def measure(
    ground: Ground, chosen: Sequence[int], sparsity: float, seed: int, epochs: int, rank: int
) -> float:
    """Held-out loss of a model with the MLP linears of the `chosen` blocks replaced."""
    model = ground.dense()
    model.requires_grad_(False)
    blocks = CorrectedBlocks(model, ground.windows(seed), ground.batch)
    blocks.rank = rank
    settings = Settings(sparsity=sparsity, num_experts=1, tune_epochs=epochs, seed=seed)
    blocks.tuned(settings, chosen)
    return ground.loss(model)
