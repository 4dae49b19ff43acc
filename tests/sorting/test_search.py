"""EvoPress and what it starts from, against brute force."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting import widths
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.fitness import KLFitness
from sortserve.sorting.search import Genome, Settings, Space, evolve, mutate
from sortserve.sorting.texts import Domain, mixed_batches

SHAPE = ModelShape(6, 48, 64, 6, 2, 8, 101)
DROPS = Space((0, 64), 6, drop_attention=True)


def drops(num_attention: int, num_ffn: int) -> list[SubModel]:
    """Every way to drop so many of each."""
    pairs = itertools.product(
        itertools.combinations(range(6), num_attention), itertools.combinations(range(6), num_ffn)
    )
    return [SubModel.make(6, 64, attention, ffn) for attention, ffn in pairs]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_is_found(seed: int) -> None:
    """225 sub-models whose losses do not add up: pairs of dropped neighbours cost extra, some pairs help."""
    rng = random.Random(seed)
    single = [rng.random() for _ in range(12)]
    double = {pair: rng.uniform(-1, 1) for pair in itertools.combinations(range(12), 2)}

    def fitness(submodel: SubModel, round_number: int) -> float:
        dropped = [*submodel.skip_attention, *(6 + layer for layer, width in enumerate(submodel.widths) if width == 0)]
        return sum(single[gene] for gene in dropped) + sum(double[pair] for pair in itertools.combinations(dropped, 2))

    every = drops(2, 2)
    best = min(every, key=lambda submodel: fitness(submodel, 0))
    found = evolve(DROPS, every[:1], fitness, Settings(generations=60, offspring=12, survivors=(4,), seed=seed))
    assert found.submodel == best
    assert found.fitness == pytest.approx(fitness(best, 1))
    assert found.evaluations < 60 * 16


def test_the_best_of_all_is_found_on_a_model(toy: Decoder, toy_domains: list[Domain]) -> None:
    """Which two FFNs of a real forward pass are best dropped: 15 ways, KL to the full model."""
    fitness = KLFitness(toy, mixed_batches(toy_domains, 30, 2))
    every = drops(0, 2)
    values = {submodel: fitness(submodel) for submodel in every}
    worst = max(every, key=values.__getitem__)
    found = evolve(Space((0, 64), 6), [worst], lambda s, _: fitness(s), Settings(12, 6, (3,)), adopted=fitness.rebase)
    assert found.submodel == min(every, key=values.__getitem__)
    assert found.fitness == pytest.approx(min(values.values()), rel=1e-3)
    assert list(found.start_fitness) == pytest.approx([values[worst]], rel=1e-3)


def test_no_worse_than_any_start_even_without_a_generation_that_helps() -> None:
    starts = drops(1, 1)[:5]
    values = {start: float(place) for place, start in zip((3, 1, 4, 2, 5), starts, strict=True)}
    found = evolve(DROPS, starts, lambda submodel, _: values.get(submodel, 9.0), Settings(3, 4, (2,)))
    assert (found.submodel, found.fitness) == (starts[1], 1.0)
    assert found.start_fitness == (3.0, 1.0, 4.0, 2.0, 5.0)


def test_a_lucky_child_of_the_small_round_does_not_replace_the_parent() -> None:
    """The first round looks at little text; only the last one decides."""
    start = drops(1, 1)[0]

    def fitness(submodel: SubModel, round_number: int) -> float:
        return 0.0 if submodel == start or round_number == 0 else 1.0

    assert evolve(DROPS, [start], fitness, Settings(4, 6, (2,))).submodel == start


def test_the_time_ends_a_search() -> None:
    start = drops(1, 1)[0]
    found = evolve(DROPS, [start], lambda s, r: random.random(), Settings(10**6, 4, (2,), seconds=0.0))
    assert found.generations == 0


@given(
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_mutations_keep_the_budget(levels: list[int], attend: list[bool], switches: int, seed: int) -> None:
    space = Space((0, 24, 40, 64), 6, drop_attention=True)  # unequal steps
    genome = Genome(tuple(levels), tuple(attend))
    budget = space.neurons(genome)
    child = mutate(space, genome, switches, budget, random.Random(seed))
    assert space.neurons(child) <= budget
    assert sum(child.attend) == sum(attend)
    assert space.genome(space.submodel(child)) == child
    changed = sum(a != b for a, b in zip(child.levels + child.attend, genome.levels + genome.attend, strict=True))
    assert changed <= 2 * switches


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 2**32))
def test_with_two_levels_the_kinds_keep_their_counts(kept: list[bool], seed: int) -> None:
    genome = Genome(tuple(int(on) for on in kept), (True, False) * 3)
    child = mutate(DROPS, genome, 3, DROPS.neurons(genome), random.Random(seed))
    assert (sum(child.levels), sum(child.attend)) == (sum(kept), 3)


def test_what_a_search_refuses() -> None:
    with pytest.raises(SortingError, match="start"):
        evolve(DROPS, [], lambda s, r: 0.0, Settings())
    with pytest.raises(SortingError, match="widths"):
        DROPS.genome(SubModel.make(6, 32))
    with pytest.raises(SortingError, match=r"\(2, 4\)"):
        Settings(offspring=2, survivors=(4,))


# ---- widths


@given(st.integers(0, 2**32), st.integers(6 * 16, 6 * 64))
def test_allocation_against_brute_force(seed: int, budget: int) -> None:
    """Losses convex in the width, in equal steps: there the greedy answer is the best one."""
    rng = random.Random(seed)
    levels = (16, 32, 48, 64)
    losses = [list(itertools.accumulate(sorted(rng.random() for _ in range(3)), initial=0.0))[::-1] for _ in range(4)]
    budget = budget * 4 // 6
    found = widths.allocate(losses, levels, budget)
    every = [choice for choice in itertools.product(range(4), repeat=4) if sum(levels[c] for c in choice) <= budget]

    def lost(choice: tuple[int, ...]) -> float:
        return sum(losses[layer][level] for layer, level in enumerate(choice))

    assert sum(found.widths) <= budget
    assert lost(tuple(levels.index(width) for width in found.widths)) == pytest.approx(min(map(lost, every)))


def test_what_a_big_step_saved_too_much_is_spent() -> None:
    """Half width is above the hull, so the step goes past it; the budget has room for it all the same."""
    assert widths.allocate([[0.5, 0.45, 0.0]], (16, 32, 64), 40).widths == (32,)


def test_allocation_refuses_what_cannot_be() -> None:
    with pytest.raises(SortingError, match=r"budget of 50 .* 64"):
        widths.allocate([[1.0, 0.0]] * 4, (16, 64), 50)


def test_levels_are_multiples_of_128_where_that_is_fine_enough() -> None:
    wide = ModelShape(24, 896, 4864, 14, 2, 64, 1000)
    assert widths.levels(wide, (0.25, 0.5, 0.75)) == (1280, 2432, 3584, 4864)
    assert widths.levels(SHAPE, (0.0, 0.25)) == (0, 16, 64)
    with pytest.raises(SortingError, match="1 to 4"):
        widths.levels(wide, (0.2, 0.4, 0.6, 0.8))
    assert widths.fine_levels(wide, 0.8) == (*range(3840, 4864, 128), 4864)
    assert widths.fine_levels(SHAPE, 0.8) == (52, 56, 60, 64)
    assert widths.fine_levels(SHAPE, 0.01)[0] == 4
    assert widths.uniform(wide, 24 * 2500).widths == (2432,) * 24
    assert widths.uniform(SHAPE, 6 * 33 + 5).widths == (33,) * 6


# ---- fitness


def test_fitness_is_the_divergence_from_the_full_model(toy: Decoder, toy_domains: list[Domain]) -> None:
    """Against all logits at once, in the same rounds; the reference kept in bfloat16 costs a few in a thousand."""
    texts = mixed_batches(toy_domains, 30, 2)
    fitness = KLFitness(toy, texts, (1, 2), stride=2)
    narrow = SubModel.make(6, [64, 20, 64, 32, 64, 64], skip_attention=[2])
    with torch.inference_mode():
        for round_number, count in ((0, 1), (1, 2)):
            total, rows = 0.0, 0
            for batch in texts[:count]:
                full, own = (
                    toy.logits(toy.run(batch.tokens, s).view(-1, 48))
                    .double()
                    .log_softmax(-1)
                    .view(*batch.tokens.shape, -1)
                    for s in (SubModel.full(toy.config.shape), narrow)
                )
                places = [(i, t) for i, t in (batch.scored.nonzero() - torch.tensor([0, 1])).tolist()][::2]
                total += sum(float((full[i, t].exp() * (full[i, t] - own[i, t])).sum()) for i, t in places)
                rows += len(places)
            assert fitness(narrow, round_number) == pytest.approx(total / rows, rel=0.02)
    assert fitness.num_rows == rows
    fitness.rebase(narrow)
    assert fitness(narrow) == pytest.approx(total / rows, rel=0.02)
    assert fitness(SubModel.full(toy.config.shape)) < 1e-3
