"""How to expand: the values of a recipe, each with its one default, and what makes them impossible.

`SparseExpansionModifier` explains the keys to users and takes its defaults from here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import WexpandError
from .allocation import ALLOCATE_BY
from .clusters import parents_of
from .grids import GRIDS, Grid
from .masks import MaskStructure
from .versions import Rows, SolvedRows, StoredBytes

__all__ = ["MAX_CLUSTERS", "MAX_EXPERTS", "SEEDS", "Settings", "refuse_seed"]

MAX_EXPERTS = 256
"""A row map has one byte for each expert and neuron."""
MAX_CLUSTERS = 4096
SEEDS = 2**32
"""how many there are: as many as numpy, and so scikit-learn, has"""


def refuse_seed(seed: int) -> None:
    """Raise WexpandError for a number that some library would not take as a seed."""
    if not 0 <= seed < SEEDS:
        raise WexpandError(f"seed: {seed} should be 0 or above, and below {SEEDS}")
SAMPLES_PER_CLUSTER = 32
"""rows of an input group that k-means sees for each cluster, if it has so many"""
MAX_SAMPLES = 65536
"""rows, at most, that are clustered because there are many clusters"""


def _as_it_is(rows: SolvedRows) -> Rows:
    return rows


@dataclass(frozen=True)
class Settings:
    """How to expand an input group.

    :raises WexpandError: a value that cannot be, by its key, with what would be right
    """

    sparsity: float
    mask_structure: str = "row"
    """see `MaskStructure.parse`"""
    values: str = "auto"
    """how kept weights are stored: one of GRIDS, or "auto", or "float", which becomes "auto": in
    the dtype of the dense weight"""
    value_group: int = 128
    """columns of a row that share a scale, with a grid"""
    num_experts: int = 16
    num_clusters: int = 0
    """clusters with a bias each; 0: no biases, and a cluster for each expert"""
    size_budget: float | None = None
    """bytes stored over dense bytes; None stores every expert in full"""
    read_budget: float | None = None
    """bytes that a token reads over dense bytes; None: as many as it takes"""
    budget_scope: str = "model"
    """"layer" or "model": whether each linear meets the budgets, or all of them together"""
    allocate_by: str = "gain"
    """one of ALLOCATE_BY"""
    share_versions: bool = True
    """whether similar experts may share a version, or have their own or the base version only"""
    block_size: int = 128
    dampening_frac: float = 0.01
    shrinkage: float = 0.03
    tune_epochs: int = 0
    """passes of block tuning over the calibration batches, at most; 0: none"""
    tune_lr: float | None = None
    """learning rate of block tuning, relative to the size of a linear's weights; None: see
    `learning_rate`"""
    tune_model_epochs: int = 0
    """passes of tuning through the whole model, once all blocks are there, at most; 0: none"""
    tune_model_lr: float = 0.005
    """its learning rate"""
    router_dims: int | None = None
    router_samples: int = 8192
    router_restarts: int = 3
    seed: int = 0
    max_bytes: int = 128 << 20
    """working memory of the solver beside Hessians and results"""

    # no recipe keys
    stored_bytes: StoredBytes | None = None
    """what things weigh; needed with a size_budget"""
    keep: Callable[[SolvedRows], Rows] = _as_it_is
    """packs the candidates that wait for a model-wide budget"""
    shortlist: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Times its share of a model-wide budget: a linear may choose again from what it would be
    granted at one of these; () is from everything. Bounds what is kept; more bytes grant other
    versions, not only further ones."""
    structure: MaskStructure = field(init=False)

    def __post_init__(self) -> None:
        structure = MaskStructure.parse(self.mask_structure)
        object.__setattr__(self, "structure", structure)
        if self.values == "float":
            object.__setattr__(self, "values", "auto")
        if self.values not in ("auto", *GRIDS):
            self._refuse("values", f"auto, float or one of {', '.join(GRIDS)}")
        if self.grid is not None and (
            self.value_group < 8 or self.value_group % 8 or self.block_size % self.value_group
        ):
            right = f"a multiple of 8 that divides block_size, {self.block_size}"
            self._refuse("value_group", right)
        if not 0 <= self.sparsity < 1 or (self.sparsity == 0 and self.grid is None):
            self._refuse("sparsity", "above 0 (0 with integer values) and below 1")
        if structure.m:
            if abs(self.sparsity - structure.n / structure.m) > 1e-6:
                right = f"{structure.n / structure.m} for mask_structure {structure}"
                self._refuse("sparsity", right)
            if self.block_size % structure.m:
                right = f"a multiple of {structure.m} for mask_structure {structure}"
                self._refuse("block_size", right)
        for key in ("num_experts", "block_size", "router_samples", "router_restarts", "max_bytes"):
            if getattr(self, key) < 1:
                self._refuse(key, "at least 1")
        refuse_seed(self.seed)
        if self.num_experts > MAX_EXPERTS:
            self._refuse("num_experts", f"at most {MAX_EXPERTS}")
        if self.num_clusters and not self.num_experts <= self.num_clusters <= MAX_CLUSTERS:
            right = f"0, or {self.num_experts} (num_experts) to {MAX_CLUSTERS}"
            self._refuse("num_clusters", right)
        if self.router_dims is not None and self.router_dims < 1:
            self._refuse("router_dims", "at least 1, or null")
        if self.budget_scope not in ("layer", "model"):
            self._refuse("budget_scope", '"layer" or "model"')
        if self.allocate_by not in ALLOCATE_BY:
            self._refuse("allocate_by", f"one of {', '.join(ALLOCATE_BY)}")
        if not 0 < self.dampening_frac < math.inf:
            self._refuse("dampening_frac", "above 0 and finite")
        if self.tune_epochs < 0:
            self._refuse("tune_epochs", "0 or above")
        if self.tune_lr is not None and not 0 < self.tune_lr < math.inf:
            self._refuse("tune_lr", "above 0 and finite, or null")
        if self.tune_model_epochs < 0:
            self._refuse("tune_model_epochs", "0 or above")
        if not 0 < self.tune_model_lr < math.inf:
            self._refuse("tune_model_lr", "above 0 and finite")
        if not 0 <= self.shrinkage < math.inf:
            self._refuse("shrinkage", "0 or above, and finite")
        if self.read_budget is not None:
            if self.num_experts == 1:
                right = "null: with one expert a token reads all there is, at any sparsity but auto"
                self._refuse("read_budget", right)
            if not 0 < self.read_budget < math.inf:
                self._refuse("read_budget", "above 0 and finite, or null for no bound")
        if self.size_budget is not None:
            if self.num_experts == 1:
                right = "null: one expert and this sparsity leave nothing to choose (auto does)"
                self._refuse("size_budget", right)
            if not 0 < self.size_budget < math.inf:
                self._refuse("size_budget", "above 0 and finite, or null for full expansion")
            if self.tune_epochs and self.budget_scope == "model":
                right = "layer with tune_epochs: a block is tuned before the model shares a budget"
                self._refuse("budget_scope", right)

    @property
    def grid(self) -> Grid | None:
        """The values that kept weights may have; None: all."""
        return None if self.values == "auto" else Grid(GRIDS[self.values], self.value_group)

    @property
    def learning_rate(self) -> float:
        """Of block tuning: `tune_lr`, by default what did best in evals.tuning. Values of a grid
        are less patient: at large steps they jump to and fro between neighbours."""
        if self.tune_lr is not None:
            return self.tune_lr
        return 0.06 if self.grid is None else 0.01

    @property
    def biased(self) -> bool:
        """Whether clusters have biases."""
        return self.num_clusters > 0

    @property
    def clusters(self) -> int:
        """Clusters of an input group; 1 needs no router."""
        return self.num_clusters or self.num_experts

    @property
    def samples(self) -> int:
        """Rows of an input group that are clustered, if it has so many."""
        wanted = min(SAMPLES_PER_CLUSTER * self.num_clusters, MAX_SAMPLES)
        return max(self.router_samples, wanted)

    def dims(self, in_features: int) -> int:
        """PCA dimensions that inputs of this width are clustered in; for the experts' Hessians a
        few do, clusters are there for their means, which lie in many."""
        return self.router_dims or max(64 if self.biased else 8, in_features // 32)

    def _refuse(self, key: str, right: str) -> None:
        raise WexpandError(f"{key}: {getattr(self, key)!r} should be {right}")

    @property
    def weighs(self) -> StoredBytes:
        """`stored_bytes`, which a budget cannot do without."""
        if self.stored_bytes is None:
            raise WexpandError("size_budget: settings say no stored_bytes to count by")
        return self.stored_bytes

    def version_bytes(self, out_features: int, in_features: int) -> float:
        """Bytes that `size_budget` leaves for the row versions of a linear."""
        assert self.size_budget is not None
        dense = self.weighs.dense(out_features, in_features)
        return self.size_budget * dense - self.fixed_bytes(out_features, in_features)

    def read_bytes(self, out_features: int, in_features: int, router: bool = True) -> float:
        """Bytes that `read_budget` leaves a token to read of the row versions of a linear.

        :param router: whether the router is read with this linear, the first of its input group
        """
        if self.read_budget is None:
            return float("inf")
        dense = self.weighs.dense(out_features, in_features)
        return self.read_budget * dense - self.fixed_read(out_features, in_features, router)

    def fixed_read(self, out_features: int, in_features: int, router: bool) -> int:
        """Bytes of a linear that a token reads beside its row versions."""
        clusters = self.clusters if router else 0
        return self.weighs.read(
            out_features, in_features, self.num_experts, clusters, parents_of(clusters),
            self.biased,
        )  # fmt: skip

    def fixed_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a linear that no row version adds to."""
        return self.weighs.fixed(
            out_features, in_features, self.num_experts, self.clusters, parents_of(self.clusters),
            self.biased,
        )  # fmt: skip
