"""What calibration needs of an input group: a sample of rows, one Hessian per expert, and the mean
input of each cluster.

Inputs arrive batch by batch and are never all stored. Rows are buffered until there are enough of
them for efficient products, sorted by expert, and added to that expert's sum of x x^T; with cluster
biases, which make up for the mean of each cluster (`biases`), to its sum of what lies within its
clusters.

x x^T is symmetric: of each sum only the blocks on and above the diagonal are added to, and the rest
is mirrored when a sum is read.

Where row versions will be granted by gain, a sixteenth of each batch is held out from the
experts' Hessians, and a sample of it kept: a version is granted only if it also helps on rows it
was not solved for. Base versions see all rows. With cluster biases, held-out rows only decide how
far these are shrunk.

Each of several ranks (`ranks`) sees its own batches; at the end all that they know is added up.
"""

import torch
from torch import Tensor

from ..errors import WexpandError
from . import ranks
from .biases import ClusterMeans
from .clusters import Router
from .row_sample import RowSample, mixed

__all__ = ["GroupStatistics", "quadratic"]

BUFFER_ROWS = 4096
BUFFER_ROWS_PER_CLUSTER = 8
HELD_OUT = 16
HELD_OUT_ROWS_PER_EXPERT = 256
SAMPLE_ROWS = 512
FEW = 4
"""columns for each row of an expert, at least, where its rows are kept beside its sum: products
with them are smaller than with the sum"""


def _strips(width: int) -> list[slice]:
    """The columns of a symmetric matrix in a few runs. What lies in a run and above its end, for
    all of them, is little more than half of the matrix, in products that are still large."""
    step = max(128, -(-width // 8))
    return [slice(first, min(first + step, width)) for first in range(0, width, step)]


def quadratic(rows: Tensor, symmetric: Tensor) -> Tensor:
    """r^T S r for every row: [rows, in], [in, in] -> [rows]. What lies above the strips' own blocks
    of S counts twice, for what lies below them, which is not read."""
    total = rows.new_zeros(len(rows))
    for part in _strips(rows.shape[1]):
        product = rows[:, part] @ symmetric[part, part]
        product.addmm_(rows[:, : part.start], symmetric[: part.start, part], alpha=2)
        total += torch.linalg.vecdot(product, rows[:, part])
    return total.clamp_(min=0)


class GroupStatistics:
    """Sums over the calibration inputs of one input group.

    :param in_features: width of the inputs
    :param router: None for one cluster
    :param cluster_expert: expert of each cluster [clusters]; None: each cluster is an expert
    :param within: sum what lies within clusters, (x - mu_c) (x - mu_c)^T instead of x x^T, as there
        will be cluster biases
    :param hold_out: keep a sixteenth of the rows for `held_out`
    :param seed: of what is held out, and of samples
    :param dtype: of all sums
    """

    def __init__(
        self,
        in_features: int,
        router: Router | None,
        *,
        cluster_expert: Tensor | None = None,
        within: bool = False,
        hold_out: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.clusters = 1 if router is None else router.clusters
        self.cluster_expert = torch.arange(self.clusters)
        """expert of each cluster, int64 [clusters]"""
        if cluster_expert is not None:
            self.cluster_expert = cluster_expert.long().cpu()
        self.experts = int(self.cluster_expert.max()) + 1
        self.router, self.within, self.hold_out, self.seed = router, within, hold_out, seed
        self._sums = torch.zeros(self.experts, in_features, in_features, device=device, dtype=dtype)
        self._mirrored = True
        few = hold_out and self.experts > 1
        self._few: list[list[Tensor] | None] = [[] if few else None for _ in range(self.experts)]
        self._joined = False
        self.held_out_sum: Tensor | None = None
        """sum of x x^T over all held-out rows [in, in], where not only biases need them"""
        if hold_out and not within:
            self.held_out_sum = self._sums.new_zeros(in_features, in_features)
        self._means = self._sums.new_zeros(self.clusters, in_features)
        self._held_out_sums = torch.zeros_like(self._means)
        self.tokens = torch.zeros(self.clusters, dtype=torch.int64)
        """rows per cluster, held-out ones included"""
        self.solved_tokens = torch.zeros(self.clusters, dtype=torch.int64)
        """rows per cluster in `sums`"""
        self.held_out = RowSample(HELD_OUT_ROWS_PER_EXPERT * self.experts, seed)
        self.sample = RowSample(SAMPLE_ROWS, seed)
        """a few rows of all tokens, to report errors on"""
        self._buffer: list[Tensor] = []
        self._buffered = 0
        self._batches = 0

    @property
    def sums(self) -> Tensor:
        """Sum of x x^T per expert [experts, in, in], or of what lies within its clusters."""
        if not self._mirrored:
            for part in _strips(self._sums.shape[1]):
                above = self._sums[:, : part.start, part]
                self._sums[:, part, : part.start] = above.transpose(1, 2)
            self._mirrored = True
        return self._sums

    def add(self, rows: Tensor, batch: int | None = None) -> None:
        """Take in one batch of inputs [tokens, in].

        :param batch: what it is known by (`row_sample`); None: its number among those added
        """
        if not len(rows):
            return
        if batch is None:
            batch = self._batches
        self._batches += 1
        rows = rows.detach().to(self._sums)
        self.sample.add(rows, batch)
        if self.hold_out:
            rows = self._split(rows, batch)
        self._buffer.append(rows)
        self._buffered += len(rows)
        # rows are gathered so that each expert gets enough of them for an efficient product
        enough = max(BUFFER_ROWS, BUFFER_ROWS_PER_CLUSTER * self.clusters)
        if self._buffered >= enough or (self.experts == 1 and not self.within):
            self.flush()

    def _split(self, rows: Tensor, batch: int) -> Tensor:
        """Hold out a run of rows that starts at another place in each batch."""
        size = len(rows) // HELD_OUT
        # steps of the golden ratio spread the starts evenly, as batches are numbered
        start = int((mixed(self.seed, batch) * 0.6180339887) % 1 * (len(rows) - size))
        held = rows[start : start + size]
        if size:
            self.held_out.add(held, batch)
            if self.held_out_sum is not None:
                self.held_out_sum.addmm_(held.t(), held)
            clusters = self.route(held)
            self._held_out_sums.index_add_(0, clusters, held)
            self.tokens += self._count(clusters)
        return torch.cat([rows[:start], rows[start + size :]])

    def route(self, rows: Tensor) -> Tensor:
        """Cluster of each of `rows` [n, in]: int64 [n]."""
        if self.router is None:
            return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        return self.router.route(rows)

    def _count(self, clusters: Tensor) -> Tensor:
        return torch.bincount(clusters, minlength=self.clusters).cpu()

    def flush(self) -> None:
        """Add the buffered rows to the sums; call once more at the end."""
        if not self._buffer:
            return
        rows = self._buffer[0] if len(self._buffer) == 1 else torch.cat(self._buffer)
        self._buffer, self._buffered = [], 0
        clusters = self.route(rows)
        counts = self._count(clusters)
        if self.within:
            rows, clusters = self._centred(rows, clusters, counts)
        experts = self.cluster_expert.to(rows.device)[clusters]
        sizes = torch.bincount(experts, minlength=self.experts).tolist()
        if self.experts > 1:
            rows = rows[experts.argsort(stable=True)]
        for expert, part in enumerate(rows.split(sizes)):
            if len(part):
                self._add_products(expert, part)
                if not self.within:  # an expert for each cluster, and sums until they are asked for
                    self._means[expert] += part.sum(dim=0)
        self.tokens += counts
        self.solved_tokens += counts
        # a sum of rows is finite only if all of them are
        if not bool(torch.isfinite(self._means).all() & self._held_out_sums.isfinite().all()):
            raise WexpandError("the calibration inputs hold NaN or infinite values")

    def join(self) -> None:
        """Add up what all ranks have seen, after the last `flush`; nothing if that is done."""
        if ranks.count() == 1 or self._joined:
            return
        self._joined = True
        self._few = [None] * self.experts
        own = self.solved_tokens.clone()
        ranks.total(self.tokens, self.solved_tokens)
        if self.within:
            # as in `_centred`: of each cluster, what lies between the ranks' means
            share = (own / self.solved_tokens.clamp(min=1)).to(self._means).unsqueeze(1)
            apart, self._means = self._means, self._means * share
            ranks.total(self._means)
            apart = (apart - self._means) * own.to(self._means).sqrt().unsqueeze(1)
            for expert in range(self.experts):
                self._add_products(expert, apart[self.cluster_expert.to(apart.device) == expert])
        else:
            ranks.total(self._means)
        ranks.total(self.sums, self._held_out_sums)
        if self.held_out_sum is not None:
            ranks.total(self.held_out_sum)
        self.held_out.join()
        self.sample.join()

    def _add_products(self, expert: int, rows: Tensor) -> None:
        for part in _strips(rows.shape[1]):
            above = self._sums[expert, : part.stop, part]
            above.addmm_(rows[:, : part.stop].t(), rows[:, part])
        self._mirrored = False
        if (few := self._few[expert]) is not None:
            few.append(rows.clone())  # not a part of all rows that are buffered
            if FEW * sum(map(len, few)) > rows.shape[1]:
                self._few[expert] = None

    def squares(self, weight: Tensor, expert: int) -> Tensor:
        """Sums of the squared outputs of `weight` [rows, in] over what is summed for an expert
        [rows]."""
        if (few := self._few[expert]) is None:
            return quadratic(weight, self.sums[expert])
        rows = torch.cat(few) if few else weight[:0]
        return (rows @ weight.t()).square_().sum(dim=0)

    def _centred(self, rows: Tensor, clusters: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows whose x x^T are what `rows` add to the sums within clusters, and their clusters.

        Sums within clusters grow by those of the new rows around the new rows' mean, and by
        n m / (n + m) d d^T for the distance d of the means of the n rows so far and the m new ones
        (Chan, Golub and LeVeque 1979). All is counted from the mean so far, so that no large
        numbers are summed and subtracted again.
        """
        new, old = (n.to(rows).unsqueeze(1) for n in (counts, self.solved_tokens))
        self._means = torch.where(old > 0, self._means, rows.mean(dim=0))
        rows = rows - self._means[clusters]
        apart = torch.zeros_like(self._means).index_add_(0, clusters, rows) / new.clamp(min=1)
        share = new / (old + new).clamp(min=1)
        self._means += share * apart
        seen = (counts > 0).nonzero().squeeze(1).to(rows.device)
        between = ((old * share).sqrt() * apart)[seen]
        return torch.cat([rows - apart[clusters], between]), torch.cat([clusters, seen])

    def release(self) -> None:
        """Let go of the sums, which take most of the memory."""
        self._sums = self._sums[:0].clone()
        self._few = [None] * self.experts

    def of_experts(self, tokens: Tensor) -> Tensor:
        """Counts [clusters] summed over each expert's clusters [experts]."""
        return tokens.new_zeros(self.experts).index_add_(0, self.cluster_expert, tokens)

    def total(self) -> Tensor:
        """Mean of x x^T, or of what lies within clusters, over all rows summed [in, in]."""
        total, tokens = self.sums.sum(dim=0), self.solved_tokens
        if self.held_out_sum is not None:
            total += self.held_out_sum
            tokens = self.tokens
        return total / max(1, int(tokens.sum()))

    def mean_inputs(self) -> Tensor:
        """Mean input of each cluster [clusters, in]."""
        if self.within:
            return self._means
        return self._means / self.solved_tokens.clamp(min=1).unsqueeze(1).to(self._means)

    def expert_means(self) -> Tensor:
        """Mean input of each expert [experts, in]."""
        if self.experts == self.clusters:
            return self.mean_inputs()
        sums = self.mean_inputs() * self.solved_tokens.to(self._means).unsqueeze(1)
        experts = self.cluster_expert.to(sums.device)
        sums = sums.new_zeros(self.experts, sums.shape[1]).index_add_(0, experts, sums)
        tokens = self.of_experts(self.solved_tokens).clamp(min=1)
        return sums / tokens.to(sums).unsqueeze(1)

    def cluster_means(self) -> ClusterMeans:
        """What cluster biases follow from.

        :raises WexpandError: nothing has been held out
        """
        held_out = self.tokens - self.solved_tokens
        if not held_out.any():
            raise WexpandError(
                "num_clusters: no calibration rows could be held out; use sequences of 16 or more "
                "tokens"
            )
        return ClusterMeans(
            self.mean_inputs(), self.solved_tokens, self._held_out_sums, held_out,
            self.cluster_expert,
        )  # fmt: skip
