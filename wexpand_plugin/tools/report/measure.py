"""What the neurons of each linear do on some text: dense, with one sparse version, expanded.

Every linear is measured alone, on what it reads in the dense model. Errors are those of its outputs
before any activation function, so they do not add up over layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...format.clusters import expert_of
from ...format.linear import StoredLinear
from ...format.model_dir import ModelDir
from ...kernels.reference import multiply
from ...method.neurons import wasserstein_distance, wasserstein_neurons
from .baseline import Baseline, shared_base
from .data import ReportData
from .inputs import DenseModel, dataset_rows

__all__ = ["Distribution", "Measured", "Measurement", "measure", "r_squared"]

MAX_BYTES = 256 << 20


class Distribution(NamedTuple):
    """Outputs of one neuron, each [tokens], in units of the dense ones: mean 0, std 1."""

    linear: str
    neuron: int
    wd: float
    dense: Tensor
    expanded: Tensor
    base: Tensor | None


@dataclass(frozen=True)
class Measured:
    """The neurons of one linear, each [out] in float64."""

    wd: Tensor
    """Wasserstein distance of the dense outputs to a Gaussian"""
    std: Tensor
    """of the dense outputs"""
    expanded: Tensor
    """RMSE of the expanded outputs"""
    base: Tensor | None
    """RMSE of the base version's outputs; NaN for neurons without one"""
    entangled: Distribution
    median: Distribution

    @property
    def improvement(self) -> Tensor | None:
        """RMSE of the base version over that of the experts; NaN where undefined."""
        if self.base is None:
            return None
        ratio = self.base / self.expanded
        return torch.where(ratio.isfinite(), ratio, torch.nan)

    def relative_error(self, which: str) -> float:
        """Root of the summed squared error over the summed variance, of "expanded" or "base"."""
        error = getattr(self, which)
        known = error.isfinite()
        return float((error[known].square().sum() / self.std[known].square().sum()).sqrt())


@dataclass(frozen=True)
class Measurement:
    """All linears, by name, and what they were measured on."""

    linears: dict[str, Measured]
    tokens: int
    dataset: str
    base: str | None
    """what the base versions are, for a caption; None: there are none"""

    @property
    def distributions(self) -> Iterator[tuple[Distribution, Distribution]]:
        """(most entangled, median) neuron of each linear, by falling WD of the first."""
        order = sorted(self.linears.values(), key=lambda m: -m.entangled.wd)
        return ((measured.entangled, measured.median) for measured in order)


@torch.no_grad()
def measure(
    data: ReportData,
    dense: str | Path,
    dataset: str,
    *,
    baseline: str | Path | None = None,
    tokens: int = 8192,
    context: int = 256,
    progress: bool = True,
) -> Measurement:
    """Run the dense model over `tokens` tokens of `dataset` and measure every expanded linear.

    :raises WexpandError: a model, baseline or data set that does not fit
    """
    from tqdm import tqdm

    given = None if baseline is None else Baseline(baseline)
    model = DenseModel(dense, data)
    rows = dataset_rows(dataset, model, tokens, context)
    ours = ModelDir(data.directory)
    found: dict[str, Measured] = {}
    total = model.passes(data.groups, sum(len(row) for row in rows)) * len(rows)
    with tqdm(total=total + len(data.linears), desc="measuring", disable=not progress) as bar:
        for group, x in model.inputs(data.groups, rows, bar):
            for name in group.linears:
                linear, module = ours.linear(name), model.modules[name]
                pool = linear.pool
                base: tuple[Tensor, Tensor] | None
                if given is not None:
                    weight = given.weight(name, (pool.out_features, pool.in_features))
                    base = weight, torch.ones(pool.out_features, dtype=torch.bool)
                else:
                    base = shared_base(pool, group.of_experts)
                found[name] = _measure(name, x, module.weight, linear, base)
                bar.update()
    any_base = any(m.base is not None for m in found.values())
    label = None
    if given is not None:
        label = given.directory.name
    elif any_base:
        label = "most used version"
    return Measurement(
        {linear.name: found[linear.name] for linear in data.linears},
        sum(len(row) for row in rows),
        str(dataset),
        label,
    )


def _measure(
    name: str,
    x: Tensor,
    weight: Tensor,
    linear: StoredLinear,
    base: tuple[Tensor, Tensor] | None,
) -> Measured:
    """Chunks over neurons; the dense bias is the same in all versions and moves nothing, so it is
    left out.

    :param x: inputs [tokens, in] on the CPU
    :param weight: dense [out, in]; its device is where the work is done
    :param base: (weight [out, in], which neurons count [out])
    """
    device, out = weight.device, linear.pool.out_features
    clusters = None if linear.router is None else linear.router.route(x.float()).to(device)
    x, pool = x.to(device, torch.float32), linear.pool.to(device)
    version_map = pool.version_map()
    experts = None
    if clusters is not None:
        named = linear.cluster_expert
        experts = expert_of(clusters, None if named is None else named.to(device), pool.experts)
    wd, std, expanded = (torch.empty(out, dtype=torch.float64) for _ in range(3))
    rmse = None if base is None else torch.full((out,), torch.nan, dtype=torch.float64)

    def outputs(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        def rows(expert: int) -> Tensor:
            return pool.rows(version_map[expert, part])

        width = part.stop - part.start
        versions = multiply(x, experts, rows, pool.experts, width)
        if linear.cluster_bias is not None:
            neurons = torch.arange(part.start, part.stop)
            versions += linear.cluster_bias.take(neurons).to(device).of(clusters)
        single = None if base is None else x @ base[0][part].to(device, torch.float32).T
        return x @ weight[part].float().T, versions, single

    step = max(1, MAX_BYTES // (x.shape[0] * 32))
    for start in range(0, out, step):
        part = slice(start, min(start + step, out))
        y, versions, single = outputs(part)
        wd[part] = wasserstein_distance(y, max_bytes=MAX_BYTES).cpu()
        std[part] = y.double().std(dim=0, correction=0).cpu()
        expanded[part] = _rmse(versions, y)
        if rmse is not None and single is not None and base is not None:
            rmse[part] = torch.where(base[1][part].cpu(), _rmse(single, y), torch.nan)

    def pick(neuron: int) -> Distribution:
        y, versions, single = outputs(slice(neuron, neuron + 1))
        mean, scale = y.double().mean(), y.double().std(correction=0).clamp(min=1e-30)
        shown = (
            None if values is None else ((values.double() - mean) / scale)[:, 0].float().cpu()
            for values in (y, versions, single)
        )
        dense, by_experts, by_base = shown
        assert dense is not None and by_experts is not None
        if base is not None and not base[1][neuron]:
            by_base = None
        return Distribution(name, neuron, float(wd[neuron]), dense, by_experts, by_base)

    entangled = int(wasserstein_neurons(wd, 100)[0])
    middle = int(wd.argsort()[wd.numel() // 2])
    return Measured(wd, std, expanded, rmse, pick(entangled), pick(middle))


def r_squared(x: Tensor, y: Tensor) -> float:
    """Share of y's variance that a straight line in x explains; NaN where either is constant."""
    if x.numel() < 3 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(torch.corrcoef(torch.stack((x.double(), y.double())))[0, 1] ** 2)


def _rmse(y: Tensor, truth: Tensor) -> Tensor:
    """[tokens, neurons] twice -> float64 [neurons] on the CPU"""
    return (y - truth).double().square().mean(dim=0).sqrt().cpu()
