"""Two processes find together what one finds alone."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from two_ranks import together

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.sizes import StoredBytes
from wexpand_plugin.format.values import codec_of
from wexpand_plugin.method import ranks
from wexpand_plugin.method.clusters import Router
from wexpand_plugin.method.group import GroupResult, expand_group
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.method.statistics import GroupStatistics
from wexpand_plugin.method.training import train

WIDTH, ROWS = 48, 64


class Batches:
    """Rows around a few centres, of batches `first`, `first + step` and so on of 16."""

    def __init__(self, first: int = 0, step: int = 1):
        generator = torch.Generator().manual_seed(3)
        centres = torch.randn(4, WIDTH, generator=generator)
        every = []
        for _ in range(16):
            near = centres[torch.randint(4, (ROWS,), generator=generator)]
            every.append(near + 0.3 * torch.randn(ROWS, WIDTH, generator=generator))
        self.batches, self.first, self.step = every[first::step], first, step

    def __len__(self) -> int:
        return len(self.batches)

    def identity(self, number: int, /) -> int:
        return self.first + number * self.step

    def __call__(self, numbers=None) -> Iterator[Tensor]:
        for number in range(len(self)) if numbers is None else numbers:
            yield self.batches[number]


def expanded(batches: Batches, **keys) -> GroupResult:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(rows, WIDTH, generator=generator) for rows in (20, 7)]
    weighs = StoredBytes(codec_of(torch.float32), torch.float32)
    settings = Settings(sparsity=0.5, router_restarts=1, stored_bytes=weighs, **keys)
    return expand_group(weights, [None, None], batches, settings)


@pytest.mark.parametrize(
    "keys",
    [
        dict(num_experts=1),
        dict(num_experts=1, mask_structure="unstructured"),
        dict(num_experts=1, values="int4", value_group=16),
        dict(num_experts=4),
        dict(num_experts=4, size_budget=1.6, budget_scope="layer"),
        dict(num_experts=2, num_clusters=6),
        dict(num_experts=3, num_clusters=9, size_budget=2.0, budget_scope="layer"),
    ],
    ids=str,
)
def test_a_group_is_solved_as_by_one(keys):
    alone = expanded(Batches(), **keys)
    both = together(lambda rank: expanded(Batches(rank, 2), **keys))
    for found in both:
        if isinstance(found, Exception):
            raise found
        assert torch.equal(found.tokens, alone.tokens)
        for one, other, first in zip(alone.linears, found.linears, both[0].linears, strict=True):
            expected, weights = one.stored.dense(), other.stored.dense()
            assert torch.equal(weights, first.stored.dense())  # the same on both ranks
            assert other.stored.error == pytest.approx(one.stored.error, rel=1e-3)
            assert torch.equal(weights != 0, expected != 0)
            torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("within", [False, True])
def test_statistics_are_those_of_all_rows(within):
    centres = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(7))
    router = Router(centres, -centres.square().sum(dim=1) / 2)

    def seen(rank: int = 0, count: int = 1):
        found = GroupStatistics(
            WIDTH, router, cluster_expert=torch.tensor([0, 0, 1, 1, 2, 2]), within=within,
            dtype=torch.float64,
        )  # fmt: skip
        for rows in Batches(rank, count)():
            found.add(rows)
        found.flush()
        found.join()
        found.join()  # again, for more linears of a group: nothing is added twice
        return found.tokens, found.mean_inputs(), found.expert_means(), found.sums

    alone = seen()
    assert (alone[0] > 0).sum() > 2
    for found in together(lambda rank: seen(rank, 2)):
        for one, other in zip(alone, found, strict=True):
            torch.testing.assert_close(other, one)


def trained(rank: int = 0, count: int = 1) -> tuple[list[float], Tensor]:
    """A linear map that many batches say, learned from a share of them."""
    generator = torch.Generator().manual_seed(1)
    goal = torch.randn(8, 8, generator=generator)
    batches = torch.randn(64, 16, 8, generator=generator)[rank::count]
    weight = torch.zeros(8, 8, requires_grad=True)
    result = train(
        lambda number: (batches[number] @ (weight - goal)).square().sum(),
        [16] * len(batches), [weight], epochs=8, lr=0.2, quiet=True,
    )  # fmt: skip
    return [result.before, result.after], weight.detach()


def test_training_together_reaches_what_one_reaches():
    (before, after), weight = trained()
    both = together(lambda rank: trained(rank, 2))
    assert torch.equal(both[0][1], both[1][1]) and both[0][0] == both[1][0]
    assert both[0][0][0] == pytest.approx(before, rel=0.3)  # other batches are held out
    assert after < 1e-3 * before and both[0][0][1] < 1e-3 * before
    torch.testing.assert_close(both[0][1], weight, rtol=0, atol=0.1)


def test_an_error_on_one_rank_ends_all():
    def work(rank: int) -> None:
        batches = Batches(rank, 2)
        if rank == 1:
            batches.batches[2][3, 4] = float("nan")
        with ranks.together():
            expanded(batches, num_experts=1)

    one, other = together(work)
    assert isinstance(one, WexpandError) and isinstance(other, WexpandError)
    assert str(other) == "the calibration inputs hold NaN or infinite values"
    assert str(one) == f"rank 1: {other}"


def test_a_rank_that_is_killed_ends_all():
    def work(rank: int) -> None:
        ranks.gathered(rank)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.gathered(rank)

    one, other = together(work)
    assert other is None
    assert isinstance(one, WexpandError) and str(one) == "another rank has ended; it says why"


def test_what_ranks_hand_round():
    def work(rank: int):
        works = [lambda n=n: (torch.full((n,), n, dtype=torch.bfloat16), None) for n in range(5)]
        rows = torch.arange(3 * (rank + 1)).view(-1, 3)
        summed = torch.tensor([rank + 1.0])
        ranks.total(summed)
        return (
            ranks.spread(works, torch.device("cpu")), ranks.joined(rows), summed,
            ranks.interleaved(ranks.gathered(ranks.own(range(5)))), ranks.of_first(lambda: rank),
        )  # fmt: skip

    for found, rows, summed, items, first in together(work):
        assert [t.tolist() for t, _ in found] == [[n] * n for n in range(5)]
        assert all(t.dtype == torch.bfloat16 and none is None for t, none in found)
        assert rows.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
        assert summed.tolist() == [3.0] and items == [0, 1, 2, 3, 4] and first == 0
