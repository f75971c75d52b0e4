"""What a neuron's outputs look like, and how hard its job is.

A neuron is one output channel of a linear layer: row r of `weight` [out, in], with the output
y_r = w_r.x + b_r before any activation function. Two numbers describe it (Sparse Expansion,
arXiv 2405.15756):

WD   Wasserstein distance: the outputs over many tokens, standardised to mean 0 and std 1, against
     N(0, 1). Both are one-dimensional, so W1 is the mean distance between the sorted outputs and
     the Gaussian quantiles ppf((i + .5) / tokens). A neuron that adds up many unrelated features
     looks Gaussian (WD near 0). Skew, heavy tails and several modes all raise WD: uniform 0.15,
     Laplace 0.145, exponential 0.31. So read it next to skew and kurtosis.
MD   mapping difficulty (paper, Eq. 2): over random pairs of tokens, the mean of
     (|dy| / N_y) / (||dx|| / N_x), with N_x the largest ||dx|| and N_y the median |dy|. Large:
     similar inputs must be mapped to dissimilar outputs.

Two cautions. WD has a noise floor, about 0.8 / sqrt(tokens) for a truly Gaussian neuron. And MD
says something about the shape of |dy| alone, because it divides by a median: MD_null is the same
formula with the ||dx|| permuted over the pairs, and only MD / MD_null speaks of the inputs. Over
all permutations the mean of products is the product of means, so MD_null is exact and needs no
random numbers. Both share N_x, one number per layer: compare neurons of one layer by them, never
of two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError
from .distributions import (
    chunks,
    difficulty,
    draw_pairs,
    gaussian_distance,
    is_constant,
    normal_quantiles,
    part_of,
    rounding,
    score,
    standardise,
    weighted,
)
from .finite import is_finite

__all__ = [
    "MIN_TOKENS",
    "NeuronScores",
    "mapping_difficulty",
    "neuron_scores",
    "wasserstein_distance",
    "wasserstein_neurons",
]

MIN_TOKENS = 32
"""Fewer outputs say nothing about a distribution: the noise floor of WD is 0.14 at 32 tokens."""

MAX_BYTES = 256 << 20
# Live bytes for one output of one token: the output in float64, a cluster's copy of it, sorted
# values and indices, and differences over pairs.
_BYTES_PER_OUTPUT = 56


class NeuronScores(NamedTuple):
    """Scores of every neuron of a linear, each [out]; float64 as computed, float32 from a file.

    A constant neuron (it varies by rounding only) has nothing to disentangle: std, WD, skew and
    kurtosis are 0. MD and MD_null are NaN where the median |dy| is 0 (constant neurons, and those
    with equal outputs on most pairs), since Eq. 2 divides by it.
    """

    wd: Tensor
    """W1 of the standardised outputs to N(0, 1)."""
    mean: Tensor
    """Mean output, bias included."""
    std: Tensor
    """Standard deviation of the outputs (of the population)."""
    skew: Tensor
    """Third standardised moment, 0 for a Gaussian."""
    kurtosis: Tensor
    """Fourth standardised moment minus 3 (excess), 0 for a Gaussian."""
    md: Tensor
    """Mapping difficulty, paper Eq. 2."""
    md_null: Tensor
    """Mapping difficulty with ||dx|| permuted over the pairs, mean over all permutations."""
    cluster_wd: Tensor | None = None
    """With labels: sum over clusters of (tokens of the cluster / tokens) x its own WD."""
    cluster_md: Tensor | None = None
    """With labels: the same weighting of MD inside each cluster, N_x and N_y its own."""
    cluster_md_null: Tensor | None = None
    """With labels: the same weighting of MD_null."""

    @property
    def md_ratio(self) -> Tensor:
        """MD / MD_null: 1 for outputs unrelated to input distances, less if near stays near."""
        return self.md / self.md_null


@torch.no_grad()
def neuron_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    pairs: int = 50_000,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> NeuronScores:
    """Score every neuron of the linear `weight` [out, in], `bias` [out] on inputs `x` [tokens, in].

    `labels` [tokens] (any integers) puts tokens into clusters and adds the `cluster_*` scores.
    Clusters of fewer than MIN_TOKENS tokens are left out and the weights renormalised (NaN if none
    is left). Small clusters have a higher noise floor: compare with a random permutation of the
    same labels before believing a difference.

    `pairs` disjoint pairs of tokens (at most tokens / 2) are drawn without replacement; equal
    `seed`s give equal scores. Working memory beside the arguments stays near `max_bytes`, however
    many neurons there are (one neuron at a time needs 56 bytes per token), and chunks change
    scores by rounding only. Outputs are computed in float32 (float64 for float64 inputs),
    statistics in float64.

    Raises WexpandError for shapes that do not fit, fewer than MIN_TOKENS tokens, and values that
    are NaN or infinite.
    """
    _check_sample(x, max_bytes, pairs)
    _check_linear(x, weight, bias, labels)
    generator = torch.Generator().manual_seed(seed)
    whole = part_of(x, None, pairs, generator, max_bytes)
    clusters = []
    for label in labels.unique() if labels is not None else ():
        tokens = (labels == label).nonzero().squeeze(1).to(x.device)
        if tokens.numel() >= MIN_TOKENS:
            clusters.append(part_of(x, tokens, pairs, generator, max_bytes))

    scores = torch.empty(10, weight.shape[0], dtype=torch.float64, device=x.device)
    for rows in chunks(weight.shape[0], x.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        y = _outputs(x, weight[rows], None if bias is None else bias[rows], max_bytes)
        if labels is not None:
            scores[7:, rows] = weighted(y, clusters, rounding(x))
        scores[:7, rows] = score(y, whole, rounding(x))
    return NeuronScores(*scores.unbind() if labels is not None else scores[:7].unbind())


@torch.no_grad()
def wasserstein_distance(y: Tensor, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """WD of each column of outputs `y` [tokens, neurons]: float64 [neurons]; 0 for a constant one.

    Equal to `scipy.stats.wasserstein_distance` of the standardised column and N(0, 1) quantiles.
    For outputs that exist already, an expert's or a quantized layer's; `neuron_scores` makes them.
    """
    _check_sample(y, max_bytes, name="y")
    quantiles = normal_quantiles(y.shape[0], y.device)
    wd = torch.empty(y.shape[1], dtype=torch.float64, device=y.device)
    for rows in chunks(y.shape[1], y.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        outputs = wd.new_empty(rows.stop - rows.start, y.shape[0]).copy_(y[:, rows].T)
        *_, z = standardise(outputs, rounding(y))
        wd[rows] = gaussian_distance(z, quantiles)
    return wd


@torch.no_grad()
def mapping_difficulty(
    x: Tensor, y: Tensor, *, pairs: int = 50_000, seed: int = 0, max_bytes: int = MAX_BYTES
) -> tuple[Tensor, Tensor]:
    """MD and MD_null of outputs `y` [tokens, neurons] on inputs `x` [tokens, in]: [neurons] each.

    For outputs that exist already, or are not one linear map of `x` (a routed linear's).
    """
    _check_sample(x, max_bytes, pairs)
    _check_sample(y, max_bytes, name="y")
    if x.shape[0] != y.shape[0]:
        raise WexpandError(f"y: {y.shape[0]} tokens do not fit x with {x.shape[0]}")
    drawn = draw_pairs(x, None, pairs, torch.Generator().manual_seed(seed), max_bytes)
    scores = torch.empty(2, y.shape[1], dtype=torch.float64, device=x.device)
    for rows in chunks(y.shape[1], y.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        outputs = y[:, rows].T.to(x.device, torch.float64)
        scores[:, rows] = torch.stack(difficulty(outputs, drawn, is_constant(outputs, rounding(y))))
    return scores[0], scores[1]


def wasserstein_neurons(wd: Tensor, percent: float = 3.0) -> Tensor:
    """The top `percent` of a layer's neurons by WD [neurons]: int64 indices, largest first.

    At least one neuron; ties go to the lower index. Works for any other score as well.
    """
    if not 0 < percent <= 100:
        raise WexpandError(f"percent: {percent} should be above 0 and at most 100")
    if wd.dim() != 1 or not wd.numel() or bool(wd.isnan().any()):
        raise WexpandError(f"wd: shape {list(wd.shape)} should be [neurons], without NaN")
    count = max(1, round(wd.numel() * percent / 100))
    return torch.sort(wd, descending=True, stable=True).indices[:count]


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, max_bytes: int) -> Tensor:
    """Outputs float64 [neurons, tokens], by blocks of tokens: no float32 copy of all of `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = weight.to(x.device, dtype)
    y = torch.empty(weight.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for tokens in chunks(x.shape[0], x.shape[1] * 8, max_bytes // 4):
        y[:, tokens] = (weight @ x[tokens].to(dtype).T).double()
    if bias is not None:
        y += bias.to(x.device, torch.float64).unsqueeze(1)
    return y


def _check_sample(x: Tensor, max_bytes: int, pairs: int = 1, name: str = "x") -> None:
    if x.dim() != 2 or not x.is_floating_point() or not x.shape[1]:
        raise WexpandError(
            f"{name}: shape {list(x.shape)}, {x.dtype} should be [tokens, features] of floats"
        )
    if x.shape[0] < MIN_TOKENS:
        raise WexpandError(
            f"{name}: {x.shape[0]} tokens are too few for a distribution; {MIN_TOKENS} is the least"
        )
    if not is_finite(x):
        raise WexpandError(f"{name}: holds NaN or infinite values; all should be finite")
    if pairs < 1:
        raise WexpandError(f"pairs: {pairs} should be at least 1")
    if max_bytes < 1:
        raise WexpandError(f"max_bytes: {max_bytes} should be at least 1")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.shape[0]:
        raise WexpandError(
            f"weight: shape {list(weight.shape)} should be [out, {x.shape[1]}] for {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise WexpandError(f"bias: shape {list(bias.shape)} should be [{weight.shape[0]}]")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and not is_finite(values):
            raise WexpandError(f"{name}: holds NaN or infinite values; all should be finite")
    if labels is not None and (
        labels.shape != x.shape[:1] or labels.is_floating_point() or labels.is_complex()
    ):
        raise WexpandError(
            f"labels: shape {list(labels.shape)}, {labels.dtype} should be integers [{x.shape[0]}]"
        )
