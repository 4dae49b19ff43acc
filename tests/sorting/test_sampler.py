"""Draws are a function of seed and update, weigh so that their mean is the mean over the grid, and stay in the grid."""

from collections import Counter

import pytest

from sortserve.engine.errors import SortingError
from sortserve.sorting.recipe import Grid, Method
from sortserve.sorting.sampler import Sampler

GRID = Grid(exits=[2, 4, 6], widths=[16, 32])  # and the full model's: 8 layers, 64 neurons


def sampler(method: Method, seed: int = 0, alone: bool = False, max_rank: int = 0) -> Sampler:
    return Sampler.make(GRID, method, 8, 64, seed, alone, max_rank)


def test_draws_depend_on_seed_and_update_only() -> None:
    method = Method(passes=3, exits_per_pass=2, layer_dropout=0.3)
    one, again, other = sampler(method), sampler(method), sampler(method, seed=1)
    forward = [one.passes_of(update) for update in range(50)]
    assert forward[::-1] == [again.passes_of(update) for update in reversed(range(50))]
    assert forward != [other.passes_of(update) for update in range(50)]


def test_soft_runs_all_exits_and_half_of_the_passes_at_full_width() -> None:
    drawn = [one for update in range(1000) for one in sampler(Method()).passes_of(update)]
    assert {one.chosen.exits for one in drawn} == {(2, 4, 6, 8)}
    assert {one.scale for one in drawn} == {(0.25,) * 4}
    widths = Counter(one.chosen.width for one in drawn)
    assert widths.keys() == {16, 32, 64}
    assert 420 < widths[64] < 580  # 5 standard deviations
    assert 170 < widths[16] < 330


def test_drawn_exits_weigh_like_all_of_them() -> None:
    drawn = [one for u in range(3000) for one in sampler(Method(exits_per_pass=2, full_weight=0.4)).passes_of(u)]
    assert {len(one.chosen.exits) for one in drawn} == {2}
    weight: Counter[int] = Counter()
    for one in drawn:
        assert sum(one.scale) == pytest.approx(1.0)
        for depth, scale in zip(one.chosen.exits, one.scale, strict=True):
            weight[depth] += scale / len(drawn)  # type: ignore[assignment]
    assert weight[8] == pytest.approx(0.4)
    assert all(weight[depth] == pytest.approx(0.2, abs=0.03) for depth in (2, 4, 6))  # 6 standard deviations


def test_sorted_covers_the_grid_evenly() -> None:
    made = sampler(Method(kind="sorted", passes=12))
    drawn = Counter((one.chosen.exits[0], one.chosen.width) for u in range(1000) for one in made.passes_of(u))
    assert drawn.keys() == set(made.grid)
    assert len(made.grid) == 12
    assert all(840 < count < 1160 for count in drawn.values())  # 5 standard deviations


def test_layers_are_dropped_more_often_above() -> None:
    made = sampler(Method(layer_dropout=0.4))
    dropped = Counter(layer for u in range(2000) for one in made.passes_of(u) for layer in one.chosen.skipped)
    assert 0 not in dropped
    assert 700 < dropped[7] < 900
    assert dropped[2] < dropped[5] < dropped[7]


def test_ranks_of_a_sorted_adapter() -> None:
    assert {one.rank for u in range(200) for one in sampler(Method(), max_rank=4).passes_of(u)} == {1, 2, 3, 4}
    assert {one.rank for u in range(20) for one in sampler(Method()).passes_of(u)} == {0}


@pytest.mark.parametrize("kind", ["soft", "sorted"])
def test_alone_is_the_full_model_only(kind: str) -> None:
    made = sampler(Method(kind=kind, exits_per_pass=3, full_weight=0.3), alone=True)  # type: ignore[arg-type]
    drawn = [one for update in range(20) for one in made.passes_of(update)]
    assert {(one.chosen.exits, one.chosen.width, one.scale) for one in drawn} == {((8,), 64, (1.0,))}


def test_a_grid_beyond_the_model_is_refused() -> None:
    with pytest.raises(SortingError, match=r"depth 9.* 8 layers of 64"):
        Sampler.make(Grid(exits=[9]), Method(), 8, 64, 0)
    with pytest.raises(SortingError, match="width 65"):
        Sampler.make(Grid(widths=[65]), Method(), 8, 64, 0)
    with pytest.raises(SortingError, match=r"5.*4 exits"):
        Sampler.make(GRID, Method(exits_per_pass=5), 8, 64, 0)
