"""How outputs of neurons are distributed, and how hard their mappings are: the formulas.

Outputs are float64 [neurons, tokens], a row for each neuron. `neurons` says what the numbers mean,
makes the outputs, and bounds the memory. `precision` is the relative rounding error of the outputs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Pairs",
    "Part",
    "chunks",
    "difficulty",
    "draw_pairs",
    "gaussian_distance",
    "is_constant",
    "normal_quantiles",
    "part_of",
    "rounding",
    "score",
    "standardise",
    "weighted",
]

# Pairs of tokens closer than this share of the farthest pair are one token up to rounding (the
# first token of every row, for example): they would divide by zero, or by noise.
_SAME_TOKEN = 1e-6


class Pairs(NamedTuple):
    """Disjoint pairs: `first`, `second` int64 [pairs]; `closeness` = N_x / ||dx|| float64."""

    first: Tensor
    second: Tensor
    closeness: Tensor


class Part(NamedTuple):
    """Tokens that form one distribution: all of them (`tokens` None), or those of a cluster.

    `quantiles` float64 has one Gaussian quantile for each of its tokens.
    """

    tokens: Tensor | None
    quantiles: Tensor
    pairs: Pairs


def part_of(
    x: Tensor, tokens: Tensor | None, pairs: int, generator: torch.Generator, max_bytes: int
) -> Part:
    """Inputs `x` [all tokens, in] at `tokens` int64 (None: at all), with `pairs` random pairs."""
    count = x.shape[0] if tokens is None else tokens.numel()
    return Part(
        tokens,
        normal_quantiles(count, x.device),
        draw_pairs(x, tokens, pairs, generator, max_bytes),
    )


def normal_quantiles(tokens: int, device: torch.device) -> Tensor:
    """ppf((i + .5) / tokens) of N(0, 1): float64 [tokens]."""
    steps = torch.arange(tokens, dtype=torch.float64, device=device)
    return torch.special.ndtri((steps + 0.5) / tokens)


def draw_pairs(
    x: Tensor, tokens: Tensor | None, pairs: int, generator: torch.Generator, max_bytes: int
) -> Pairs:
    """Disjoint random pairs of the given tokens (positions among them), identical ones dropped."""
    count = x.shape[0] if tokens is None else tokens.numel()
    pairs = min(pairs, count // 2)
    order = torch.randperm(count, generator=generator)[: 2 * pairs].to(x.device)
    first, second = order[:pairs], order[pairs:]
    distance = torch.empty(pairs, dtype=torch.float64, device=x.device)
    for some in chunks(pairs, x.shape[1] * 32, max_bytes):
        one, other = first[some], second[some]
        if tokens is not None:
            one, other = tokens[one], tokens[other]
        distance[some] = torch.linalg.vector_norm(x[one].double() - x[other].double(), dim=1)
    farthest = distance.max()
    kept = distance > _SAME_TOKEN * farthest
    return Pairs(first[kept], second[kept], farthest / distance[kept])


def is_constant(y: Tensor, precision: float) -> Tensor:
    """Which neurons of `y` [neurons, tokens] vary by no more than rounding: booleans [neurons]."""
    low, high = y.aminmax(dim=1)
    return high - low <= 16 * precision * torch.maximum(low.abs(), high.abs())


def standardise(y: Tensor, precision: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, std, constant (each [neurons]), z [neurons, tokens], 0 if constant; overwrites `y`."""
    constant = is_constant(y, precision)
    mean = y.mean(dim=1)
    z = y.sub_(mean.unsqueeze(1))
    std = torch.linalg.vector_norm(z, dim=1) / z.shape[1] ** 0.5
    std = std.masked_fill(constant, 0)
    z.div_(std.masked_fill(constant, 1).unsqueeze(1)).masked_fill_(constant.unsqueeze(1), 0)
    return mean, std, constant, z


def gaussian_distance(z: Tensor, quantiles: Tensor) -> Tensor:
    """WD of standardised outputs [neurons, tokens]; 0 where they are all 0 (constant neurons)."""
    varies = z.any(dim=1)
    return z.sort(dim=1).values.sub_(quantiles).abs_().mean(dim=1) * varies


def difficulty(y: Tensor, pairs: Pairs, constant: Tensor) -> tuple[Tensor, Tensor]:
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


def score(y: Tensor, part: Part, precision: float) -> Tensor:
    """wd, mean, std, skew, kurtosis, md, md_null [7, neurons]; overwrites `y` [neurons, tokens]."""
    md, md_null = difficulty(y, part.pairs, is_constant(y, precision))
    mean, std, constant, z = standardise(y, precision)
    skew = z.pow(3).mean(dim=1)
    kurtosis = (z.pow(4).mean(dim=1) - 3).masked_fill(constant, 0)
    return torch.stack(
        (gaussian_distance(z, part.quantiles), mean, std, skew, kurtosis, md, md_null)
    )


def weighted(y: Tensor, clusters: list[Part], precision: float) -> Tensor:
    """wd, md, md_null [3, neurons]: the clusters' own, by tokens; undefined ones do not count."""
    total, weights = y.new_zeros(3, y.shape[0]), y.new_zeros(3, y.shape[0])
    for part in clusters:
        own = score(y[:, part.tokens], part, precision)[[0, 5, 6]]
        defined = ~own.isnan()
        total += torch.where(defined, own, 0) * part.quantiles.numel()
        weights += defined * part.quantiles.numel()
    return total / weights


def chunks(count: int, bytes_each: int, max_bytes: int) -> Iterator[slice]:
    """Slices of range(count) that need about `max_bytes` each, at least one item."""
    size = max(1, max_bytes // max(1, bytes_each))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def rounding(y: Tensor) -> float:
    """Relative rounding error of outputs: they are computed in float64 or in float32."""
    return torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
