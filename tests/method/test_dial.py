"""Settings for a budget, against all choices there are."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.dial import (
    Candidate,
    Setting,
    allocate_settings,
    least_read,
    margins,
    smallest,
)


@st.composite
def problems(draw):
    """Up to 3 groups of up to 2 linears, with 1 to 3 candidates of each of 1 or 2 kinds, of which
    tokens read some of the bytes."""
    groups, number = [], 0
    for _ in range(draw(st.integers(1, 3))):
        kinds = draw(st.sampled_from([["int4"], ["auto"], ["int4", "int8"]]))
        group = {}
        for _ in range(draw(st.integers(1, 2))):
            number += 1
            group[f"l{number}"] = [
                Candidate(
                    Setting(kind, place / 8),
                    draw(st.integers(0, 50)) / 100,
                    (size := draw(st.integers(1, 40))),
                    draw(st.integers(0, size)),
                )
                for kind in kinds
                for place in range(draw(st.integers(1, 3)))
            ]
        groups.append(group)
    return groups


def all_choices(groups):
    ways = []
    for group in groups:
        picks = product(*group.values())
        ways.append([p for p in picks if len({c.setting.kind for c in p}) == 1])
    for parts in product(*ways):
        yield totals([c for part in parts for c in part])


def totals(chosen):
    """Bytes stored, loss, bytes read."""
    return tuple(sum(getattr(c, field) for c in chosen) for field in ("stored", "loss", "read"))


@settings(max_examples=50, deadline=None)
@given(problems())
def test_against_every_choice(groups):
    known = sorted((stored, loss) for stored, loss, _ in all_choices(groups))
    least, most = known[0][0], known[-1][0]
    assert smallest(groups) == least
    with pytest.raises(WexpandError, match=f"below {least}, the least"):
        allocate_settings(groups, least - 1)
    before = float("inf")
    for budget in range(least, most + 2, 2):
        found = allocate_settings(groups, budget)
        assert set(found) == {name for group in groups for name in group}
        for group in groups:
            assert len({found[name].setting.kind for name in group}) == 1
            assert all(found[name] in own for name, own in group.items())
        stored = sum(c.stored for c in found.values())
        loss = sum(c.loss for c in found.values())
        assert stored <= budget
        assert loss <= before + 1e-9
        before = loss
        best = min(cost for bytes_, cost in known if bytes_ <= budget)
        assert loss >= best - 1e-9
        # where the best line bends the choice is the best there is
        if on_hull(known, stored, best) and stored == budget:
            assert loss == pytest.approx(best)
    final = allocate_settings(groups, most)
    assert totals(final.values())[1] == pytest.approx(min(cost for _, cost in known))


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_two_budgets_against_every_choice(groups, a, b):
    known = list(all_choices(groups))
    least, most = (f(stored for stored, _, _ in known) for f in (min, max))
    stored = least + a * (most - least)
    reads = [read for bytes_, _, read in known if bytes_ <= stored]
    read = min(reads) + b * (max(reads) - min(reads))
    best = min(loss for s, loss, r in known if s <= stored and r <= read)
    try:
        found = allocate_settings(groups, stored, read)
    except WexpandError as error:
        # of sums of two kinds of bytes prices find the corners alone
        reachable = least_read(groups, stored)
        assert f"read_budget: {read:.0f} bytes are below {reachable}, the least" in str(error)
        assert read < reachable and reachable in reads
        return
    for group in groups:
        assert len({found[name].setting.kind for name in group}) == 1
    sizes = totals(found.values())
    assert sizes[0] <= stored and sizes[2] <= read
    assert sizes[1] >= best - 1e-9
    # no more is lost than where both budgets are smaller by the largest step there is
    step = max(c.stored for group in groups for own in group.values() for c in own)
    step *= 2 * len(groups)
    tighter = [loss for s, loss, r in known if s <= stored - step and r <= read - step]
    assert not tighter or sizes[1] <= min(tighter) + 1e-9


@settings(max_examples=20, deadline=None)
@given(problems())
def test_a_budget_of_bytes_read_alone(groups):
    """Where all bytes are read it is the same as one of bytes stored."""
    same = [
        {name: [Candidate(c.setting, c.loss, c.stored, c.stored) for c in own]
         for name, own in group.items()}
        for group in groups
    ]  # fmt: skip
    least = smallest(same)
    assert least_read(same) == least
    with pytest.raises(WexpandError, match=f"read_budget: .* below {least}, the least that a tok"):
        allocate_settings(same, read=least - 1)
    for budget in (least, least + 3, least + 20):
        by_read = allocate_settings(same, read=budget)
        assert by_read == allocate_settings(same, budget)
        assert by_read == allocate_settings(same, budget + 5, budget)


def on_hull(known, stored, loss) -> bool:
    """Whether no line between two other choices passes below this one, or through it."""
    others = [(b, c) for b, c in known if b != stored]
    if any(b <= stored and c <= loss + 1e-9 for b, c in others):
        return False
    for (b1, c1), (b2, c2) in product(others, others):
        if b1 < stored < b2 and c1 + (c2 - c1) * (stored - b1) / (b2 - b1) <= loss + 1e-9:
            return False
    return True


def test_what_is_left_buys_a_smaller_step():
    def linear(*points):
        return [Candidate(Setting("int4", n / 9), *point, 0) for n, point in enumerate(points)]

    groups = [{"a": linear((1.0, 10), (0.0, 110))}, {"b": linear((1.0, 10), (0.9, 40))}]
    found = allocate_settings(groups, 60)
    assert [c.stored for c in found.values()] == [10, 40]
    assert [c.stored for c in allocate_settings(groups, 120).values()] == [110, 10]
    assert [c.stored for c in allocate_settings(groups, 150).values()] == [110, 40]


def test_a_group_has_one_kind_of_values():
    whole = Candidate(Setting("int8", 0), 0.0, 80, 80)
    fine, coarse = ([whole, Candidate(Setting("int4", 0), x, 40, 40)] for x in (0.5, 0.1))
    apart = allocate_settings([{"a": fine}, {"b": coarse}], 120)
    assert [c.setting.kind for c in apart.values()] == ["int8", "int4"]
    together = allocate_settings([{"a": fine, "b": coarse}], 120)
    assert [c.setting.kind for c in together.values()] == ["int4", "int4"]


def test_two_prices_choose_what_neither_alone_does():
    """Zeros are cheap to read and dear to store here, and bits the other way round."""

    def linear(one, other):
        return [
            Candidate(Setting("int4", 0.0), 0.0, 100, 100),
            Candidate(Setting("int4", 0.3), one, 90, 40),
            Candidate(Setting("int4", 0.5), other, 40, 90),
            Candidate(Setting("int4", 0.8), 1.0, 30, 30),
        ]

    groups = [{"a": linear(0.20, 0.21)}, {"b": linear(0.21, 0.20)}]

    def chosen(*budgets):
        return sorted(c.setting.sparsity for c in allocate_settings(groups, *budgets).values())

    assert chosen(200, 200) == [0.0, 0.0]
    assert chosen(80) == [0.5, 0.5]
    assert chosen(float("inf"), 80) == [0.3, 0.3]
    assert chosen(130, 130) == [0.3, 0.5]
    assert chosen(200, 140) == [0.0, 0.3]
    assert chosen(60, 60) == [0.8, 0.8]
    with pytest.raises(WexpandError, match="read_budget: 59 bytes are below 60"):
        allocate_settings(groups, 200, 59)


def test_margins_are_the_steps_beside_the_choice():
    own = [
        Candidate(Setting("int4", share), loss, size, size)
        for share, loss, size in ((0.0, 0.0, 50), (0.3, 0.1, 30), (0.5, 0.5, 20))
    ]
    found = margins([{"a": own}], {"a": own[1]})["a"]
    assert found.next == pytest.approx(0.1 / 20) and found.last == pytest.approx(0.4 / 10)
    assert margins([{"a": own}], {"a": own[0]})["a"].next == 0
    assert margins([{"a": own}], {"a": own[2]})["a"].last == float("inf")
