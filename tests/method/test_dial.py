"""Settings for a budget, against all choices there are."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.dial import Candidate, Setting, allocate_settings, smallest


@st.composite
def problems(draw):
    """Up to 3 groups of up to 2 linears, with 1 to 3 candidates of each of 1 or 2 kinds."""
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
                    draw(st.integers(1, 40)),
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
        ways.append([p for p in picks if len({c.setting.values for c in p}) == 1])
    for parts in product(*ways):
        chosen = [c for part in parts for c in part]
        yield sum(c.stored for c in chosen), sum(c.loss for c in chosen)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_against_every_choice(groups):
    known = sorted(all_choices(groups))
    least, most = known[0][0], known[-1][0]
    assert smallest(groups) == least
    with pytest.raises(WexpandError, match=f"below {least}, the least"):
        allocate_settings(groups, least - 1)
    before = float("inf")
    for budget in range(least, most + 2):
        found = allocate_settings(groups, budget)
        assert set(found) == {name for group in groups for name in group}
        for group in groups:
            assert len({found[name].setting.values for name in group}) == 1
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
    assert before == pytest.approx(min(cost for _, cost in known))


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
        return [Candidate(Setting("int4", n / 9), *point) for n, point in enumerate(points)]

    groups = [{"a": linear((1.0, 10), (0.0, 110))}, {"b": linear((1.0, 10), (0.9, 40))}]
    found = allocate_settings(groups, 60)
    assert [c.stored for c in found.values()] == [10, 40]
    assert [c.stored for c in allocate_settings(groups, 120).values()] == [110, 10]
    assert [c.stored for c in allocate_settings(groups, 150).values()] == [110, 40]


def test_a_group_has_one_kind_of_values():
    fine = [Candidate(Setting("int8", 0), 0.0, 80), Candidate(Setting("int4", 0), 0.5, 40)]
    coarse = [Candidate(Setting("int8", 0), 0.0, 80), Candidate(Setting("int4", 0), 0.1, 40)]
    apart = allocate_settings([{"a": fine}, {"b": coarse}], 120)
    assert [c.setting.values for c in apart.values()] == ["int8", "int4"]
    together = allocate_settings([{"a": fine, "b": coarse}], 120)
    assert [c.setting.values for c in together.values()] == ["int4", "int4"]
