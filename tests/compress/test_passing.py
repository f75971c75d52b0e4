"""One expert of one cluster is calibrated by the pipeline's own pass over a block."""

import pytest
import torch
import transformers
from test_modifier import calibration, run, tiny
from torch import nn

from wexpand_plugin.compress.calibration import Known
from wexpand_plugin.compress.passing import PassingStatistics
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.statistics import GroupStatistics


class Block(nn.Module):
    """Two linears that read one tensor, and one that reads another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(x) + self.b(x))


def hook(module, function, kind):
    assert kind == "forward_pre"
    module.register_forward_pre_hook(function)


def test_groups_and_sums_are_those_of_the_inputs_that_count():
    torch.manual_seed(0)
    block, inputs = Block(), [torch.randn(2, 5, 4) for _ in range(3)]
    counts = [torch.rand(2, 5) < 0.5 for _ in inputs]
    now = iter(counts)
    linears = {"a": block.a, "b": block.b, "c": block.c}
    current: list[torch.Tensor] = []
    passing = PassingStatistics(block, linears, hook, lambda: Known(current[-1], 0), seed=0)
    rows: dict[str, list[torch.Tensor]] = {"a": [], "c": []}
    for x in inputs:
        current.append(next(now))
        with torch.no_grad():
            block(x)
            rows["a"].append(x[current[-1]])
            rows["c"].append((x @ (block.a.weight + block.b.weight).t())[current[-1]])
    groups = passing.groups()
    assert [group.names for group in groups] == [("a", "b"), ("c",)]
    for group in groups:
        found, expected = passing.take(group), GroupStatistics(4, None)
        seen = torch.cat(rows[group.names[0]])
        expected.add(seen)
        torch.testing.assert_close(found.total(), seen.t() @ seen / len(seen))
        assert torch.equal(found.tokens, expected.tokens)


def test_a_linear_that_is_called_twice_is_refused():
    class Twice(Block):
        def forward(self, x):
            return self.a(self.a(x))

    block = Twice()
    PassingStatistics(block, {"a": block.a}, hook, lambda: Known(None, 0), seed=0)
    with pytest.raises(WexpandError, match="a: called more than once"):
        block(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("keys", "passes"), [(dict(num_experts=1), 2), (dict(num_experts=2), None)], ids=str
)
def test_no_pass_is_added_for_one_expert(tmp_path, monkeypatch, keys, passes):
    """Calibration and propagation; a router needs the inputs of each group more often."""
    counted = []
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: counted.append(len(x)) or own(self, x))
    run(tiny("Llama", tmp_path / "dense"), targets=["re:.*mlp.*"], data=calibration(8), **keys)
    found = sum(counted) / (2 * 8)  # blocks, samples
    assert found == passes if passes else found > 3
