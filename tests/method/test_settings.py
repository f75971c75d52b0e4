"""Settings: impossible values are refused by the recipe key's name."""

import math
import re

import pytest

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.settings import Settings


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(sparsity=1.5), "sparsity: 1.5 should be above 0 (0 with integer values) and"),
        (dict(sparsity=0.0), "sparsity: 0.0 should be above 0"),
        (dict(values="int7"), "values: 'int7' should be auto, float or one of int8, int6, int5"),
        (dict(values="int4", value_group=48), "value_group: 48 should be a multiple of 8 that"),
        (dict(values="int4", value_group=256), "value_group: 256 should be"),
        (dict(sparsity=0.6, mask_structure="2:4"), "sparsity: 0.6 should be 0.5"),
        (dict(mask_structure="2:4", block_size=30), "block_size: 30 should be a multiple of 4"),
        (dict(mask_structure="4:2"), "mask_structure"),
        (dict(num_experts=0), "num_experts: 0 should be at least 1"),
        (dict(num_experts=257), "num_experts: 257 should be at most 256"),
        (dict(num_clusters=5000), "num_clusters: 5000 should be 0, or 16 (num_experts) to 4096"),
        (dict(num_clusters=15), "num_clusters: 15 should be 0, or 16 (num_experts) to 4096"),
        (dict(num_clusters=-1, num_experts=1), "num_clusters: -1 should be 0, or 1 (num_exp"),
        (dict(router_dims=0), "router_dims: 0 should be at least 1, or null"),
        (dict(allocate_by="luck"), "allocate_by: 'luck' should be one of gain, wasserstein"),
        (dict(budget_scope="planet"), 'budget_scope: \'planet\' should be "layer" or "model"'),
        (dict(num_experts=1, size_budget=1.0), "size_budget: 1.0 should be null"),
        (dict(size_budget=0.0), "size_budget: 0.0 should be above 0"),
        (dict(size_budget=math.nan), "size_budget: nan should be above 0"),
        (dict(size_budget=math.inf), "size_budget: inf should be above 0 and finite"),
        (dict(read_budget=math.inf), "read_budget: inf should be above 0 and finite"),
        (dict(seed=-1), "seed: -1 should be 0 or above, and below 4294967296"),
        (dict(seed=2**32), "seed: 4294967296 should be"),
        (dict(tune_lr=math.nan), "tune_lr: nan should be above 0 and finite, or null"),
        (dict(tune_model_lr=math.inf), "tune_model_lr: inf should be above 0 and finite"),
        (dict(dampening_frac=0.0), "dampening_frac"),
        (dict(shrinkage=-1.0), "shrinkage"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(WexpandError, match=re.escape(message)):
        Settings(**({"sparsity": 0.5} | values))


def test_what_can_be():
    assert Settings(0.5).clusters == 16 and not Settings(0.5).biased
    many = Settings(0.5, num_experts=2, num_clusters=4096)
    assert (many.clusters, many.samples, many.biased) == (4096, 65536, True)
    assert Settings(0.5, num_experts=1, num_clusters=1).samples == 8192
    assert str(Settings(0.5, mask_structure="0:0", num_experts=256).structure) == "unstructured"
    with pytest.raises(WexpandError, match="stored_bytes"):
        Settings(0.5, size_budget=1.0).version_bytes(8, 8)
