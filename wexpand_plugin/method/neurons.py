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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError

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
# Pairs of tokens closer than this share of the farthest pair are one token up to rounding (the
# first token of every row, for example): they would divide by zero, or by noise.
_SAME_TOKEN = 1e-6
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


class _Pairs(NamedTuple):
    """Disjoint pairs: `first`, `second` int64 [pairs]; `closeness` = N_x / ||dx|| float64."""

    first: Tensor
    second: Tensor
    closeness: Tensor


class _Part(NamedTuple):
    """Tokens that form one distribution: all of them (`tokens` None), or those of a cluster.

    `quantiles` float64 has one Gaussian quantile for each of its tokens.
    """

    tokens: Tensor | None
    quantiles: Tensor
    pairs: _Pairs


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
    whole = _part(x, None, pairs, generator, max_bytes)
    clusters = []
    for label in labels.unique() if labels is not None else ():
        tokens = (labels == label).nonzero().squeeze(1).to(x.device)
        if tokens.numel() >= MIN_TOKENS:
            clusters.append(_part(x, tokens, pairs, generator, max_bytes))

    scores = torch.empty(10, weight.shape[0], dtype=torch.float64, device=x.device)
    for rows in _chunks(weight.shape[0], x.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        y = _outputs(x, weight[rows], None if bias is None else bias[rows], max_bytes)
        if labels is not None:
            scores[7:, rows] = _weighted(y, clusters, _precision(x))
        scores[:7, rows] = _score(y, whole, _precision(x))
    return NeuronScores(*scores.unbind() if labels is not None else scores[:7].unbind())


@torch.no_grad()
def wasserstein_distance(y: Tensor, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """WD of each column of outputs `y` [tokens, neurons]: float64 [neurons]; 0 for a constant one.

    Equal to `scipy.stats.wasserstein_distance` of the standardised column and N(0, 1) quantiles.
    For outputs that exist already, an expert's or a quantized layer's; `neuron_scores` makes them.
    """
    _check_sample(y, max_bytes, name="y")
    quantiles = _normal_quantiles(y.shape[0], y.device)
    wd = torch.empty(y.shape[1], dtype=torch.float64, device=y.device)
    for rows in _chunks(y.shape[1], y.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        outputs = wd.new_empty(rows.stop - rows.start, y.shape[0]).copy_(y[:, rows].T)
        *_, z = _standardise(outputs, _precision(y))
        wd[rows] = _distance(z, quantiles)
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
    drawn = _draw_pairs(x, None, pairs, torch.Generator().manual_seed(seed), max_bytes)
    scores = torch.empty(2, y.shape[1], dtype=torch.float64, device=x.device)
    for rows in _chunks(y.shape[1], y.shape[0] * _BYTES_PER_OUTPUT, max_bytes):
        outputs = y[:, rows].T.to(x.device, torch.float64)
        scores[:, rows] = torch.stack(
            _difficulty(outputs, drawn, _constant(outputs, _precision(y)))
        )
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


def _part(
    x: Tensor, tokens: Tensor | None, pairs: int, generator: torch.Generator, max_bytes: int
) -> _Part:
    count = x.shape[0] if tokens is None else tokens.numel()
    return _Part(
        tokens,
        _normal_quantiles(count, x.device),
        _draw_pairs(x, tokens, pairs, generator, max_bytes),
    )


def _normal_quantiles(tokens: int, device: torch.device) -> Tensor:
    """ppf((i + .5) / tokens) of N(0, 1): float64 [tokens]."""
    steps = torch.arange(tokens, dtype=torch.float64, device=device)
    return torch.special.ndtri((steps + 0.5) / tokens)


def _draw_pairs(
    x: Tensor, tokens: Tensor | None, pairs: int, generator: torch.Generator, max_bytes: int
) -> _Pairs:
    """Disjoint random pairs of the given tokens (positions among them), identical ones dropped."""
    count = x.shape[0] if tokens is None else tokens.numel()
    pairs = min(pairs, count // 2)
    order = torch.randperm(count, generator=generator)[: 2 * pairs].to(x.device)
    first, second = order[:pairs], order[pairs:]
    distance = torch.empty(pairs, dtype=torch.float64, device=x.device)
    for some in _chunks(pairs, x.shape[1] * 32, max_bytes):
        one, other = first[some], second[some]
        if tokens is not None:
            one, other = tokens[one], tokens[other]
        distance[some] = torch.linalg.vector_norm(x[one].double() - x[other].double(), dim=1)
    farthest = distance.max()
    kept = distance > _SAME_TOKEN * farthest
    return _Pairs(first[kept], second[kept], farthest / distance[kept])


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, max_bytes: int) -> Tensor:
    """Outputs float64 [neurons, tokens], by blocks of tokens: no float32 copy of all of `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = weight.to(x.device, dtype)
    y = torch.empty(weight.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for tokens in _chunks(x.shape[0], x.shape[1] * 8, max_bytes // 4):
        y[:, tokens] = (weight @ x[tokens].to(dtype).T).double()
    if bias is not None:
        y += bias.to(x.device, torch.float64).unsqueeze(1)
    return y


def _constant(y: Tensor, precision: float) -> Tensor:
    """Which neurons of `y` [neurons, tokens] vary by no more than rounding: booleans [neurons]."""
    low, high = y.aminmax(dim=1)
    return high - low <= 16 * precision * torch.maximum(low.abs(), high.abs())


def _standardise(y: Tensor, precision: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, std, constant (each [neurons]), z [neurons, tokens], 0 if constant; overwrites `y`."""
    constant = _constant(y, precision)
    mean = y.mean(dim=1)
    z = y.sub_(mean.unsqueeze(1))
    std = torch.linalg.vector_norm(z, dim=1) / z.shape[1] ** 0.5
    std = std.masked_fill(constant, 0)
    z.div_(std.masked_fill(constant, 1).unsqueeze(1)).masked_fill_(constant.unsqueeze(1), 0)
    return mean, std, constant, z


def _distance(z: Tensor, quantiles: Tensor) -> Tensor:
    """WD of standardised outputs [neurons, tokens]; 0 where they are all 0 (constant neurons)."""
    varies = z.any(dim=1)
    return z.sort(dim=1).values.sub_(quantiles).abs_().mean(dim=1) * varies


def _difficulty(y: Tensor, pairs: _Pairs, constant: Tensor) -> tuple[Tensor, Tensor]:
    """MD and MD_null of outputs `y` [neurons, tokens]: [neurons], NaN where median |dy| is 0."""
    undefined = torch.full_like(y[:, 0], torch.nan)
    if not pairs.first.numel():
        return undefined, undefined.clone()
    dy = (y[:, pairs.first] - y[:, pairs.second]).abs_()
    # torch's median is the lower of two middle values; the definition means their mean
    middle = (dy.median(dim=1).values - dy.neg().median(dim=1).values) / 2
    defined = (middle > 0) & ~constant
    md = (dy @ pairs.closeness) / dy.shape[1] / middle
    md_null = dy.mean(dim=1) * pairs.closeness.mean() / middle
    return torch.where(defined, md, undefined), torch.where(defined, md_null, undefined)


def _score(y: Tensor, part: _Part, precision: float) -> Tensor:
    """wd, mean, std, skew, kurtosis, md, md_null [7, neurons]; overwrites `y` [neurons, tokens]."""
    md, md_null = _difficulty(y, part.pairs, _constant(y, precision))
    mean, std, constant, z = _standardise(y, precision)
    skew = z.pow(3).mean(dim=1)
    kurtosis = (z.pow(4).mean(dim=1) - 3).masked_fill(constant, 0)
    return torch.stack((_distance(z, part.quantiles), mean, std, skew, kurtosis, md, md_null))


def _weighted(y: Tensor, clusters: list[_Part], precision: float) -> Tensor:
    """wd, md, md_null [3, neurons]: the clusters' own, by tokens; undefined ones do not count."""
    total, weights = y.new_zeros(3, y.shape[0]), y.new_zeros(3, y.shape[0])
    for part in clusters:
        own = _score(y[:, part.tokens], part, precision)[[0, 5, 6]]
        defined = ~own.isnan()
        total += torch.where(defined, own, 0) * part.quantiles.numel()
        weights += defined * part.quantiles.numel()
    return total / weights


def _chunks(count: int, bytes_each: int, max_bytes: int) -> Iterator[slice]:
    """Slices of range(count) that need about `max_bytes` each, at least one item."""
    size = max(1, max_bytes // max(1, bytes_each))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _precision(y: Tensor) -> float:
    """Relative rounding error of outputs: they are computed in float64 or in float32."""
    return torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps


def _finite(values: Tensor) -> bool:
    # NaN and infinity survive min and max, which need no copy of the values
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def _check_sample(x: Tensor, max_bytes: int, pairs: int = 1, name: str = "x") -> None:
    if x.dim() != 2 or not x.is_floating_point() or not x.shape[1]:
        raise WexpandError(
            f"{name}: shape {list(x.shape)}, {x.dtype} should be [tokens, features] of floats"
        )
    if x.shape[0] < MIN_TOKENS:
        raise WexpandError(
            f"{name}: {x.shape[0]} tokens are too few for a distribution; {MIN_TOKENS} is the least"
        )
    if not _finite(x):
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
        if values is not None and not _finite(values):
            raise WexpandError(f"{name}: holds NaN or infinite values; all should be finite")
    if labels is not None and (
        labels.shape != x.shape[:1] or labels.is_floating_point() or labels.is_complex()
    ):
        raise WexpandError(
            f"labels: shape {list(labels.shape)}, {labels.dtype} should be integers [{x.shape[0]}]"
        )
