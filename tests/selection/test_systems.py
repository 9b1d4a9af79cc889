"""The other systems' rules against brute force, exact probabilities and plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.selection.alignment import balancing_rate, boltzmann_greedy, greedy_by_utility
from colm_ds.selection.by_loss import (
    band_probabilities,
    delta_probabilities,
    infobatch_draw,
    infobatch_quotas,
    rank_probabilities,
    window,
)
from colm_ds.selection.ccs import CCSOptions, CCSSelector, deal, strata_of, stratified_draw, without_hardest
from colm_ds.selection.draws import inclusion_probabilities, softmax_draw, uniform_draw, weighted_draw
from colm_ds.selection.goracs import cover, group_costs, refine, swap_scores
from colm_ds.selection.grab import balance_signs, balanced_half, herd
from colm_ds.selection.simcore import centroids_of, retrieve, rounds, unit_rows
from colm_ds.selection.transport import Transport
from colm_ds.selection.vector_sum import best_of, capped, caratheodory, fair_shares

RUNS = 1500


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def check_frequencies(counts: Tensor, wanted: list[float], runs: int) -> None:
    """Compare frequencies with probabilities, within three standard errors (and a half event)."""
    for count, probability in zip(counts.tolist(), wanted, strict=True):
        error = 3.0 * math.sqrt(max(runs * probability * (1.0 - probability), 0.0)) + 0.5
        assert abs(count - runs * probability) <= error, (counts.tolist(), wanted)


def successive(chances: list[float], count: int) -> list[float]:
    """Inclusion probabilities of drawing one after the other, by enumeration."""
    wanted = [0.0] * len(chances)
    for order in itertools.permutations(range(len(chances)), count):
        probability, left = 1.0, sum(chances)
        for place in order:
            probability *= chances[place] / left
            left -= chances[place]
        for place in order:
            wanted[place] += probability
    return wanted


@pytest.mark.parametrize("chances", [[1.0, 2.0, 3.0, 4.0], [0.01, 0.5, 0.5, 3.0, 1.0]])
def test_weighted_draw_has_the_law_of_successive_draws(chances: list[float]) -> None:
    stream, counts = generator(), torch.zeros(len(chances))
    for _ in range(RUNS):
        counts[weighted_draw(torch.tensor(chances), 2, stream)] += 1
    check_frequencies(counts, successive(chances, 2), RUNS)


def test_chances_of_zero_come_last_and_uniformly() -> None:
    stream, counts = generator(), torch.zeros(6)
    chances = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    for _ in range(2000):
        drawn = weighted_draw(chances, 3, stream)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        counts[drawn] += 1
    check_frequencies(counts, [0.25, 1.0, 0.25, 1.0, 0.25, 0.25], 2000)


def test_softmax_draw_is_a_weighted_draw() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.9])
    stream, counts = generator(1), torch.zeros(4)
    for _ in range(RUNS):
        counts[softmax_draw(scores, 2, 0.7, stream)] += 1
    check_frequencies(counts, successive((scores.double() / 0.7).exp().tolist(), 2), RUNS)


def test_inclusion_probabilities() -> None:
    chances = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5])
    found = inclusion_probabilities(chances, 3)
    assert float(found.sum()) == pytest.approx(3.0, abs=1e-9)
    time = -torch.log1p(-found) / chances
    assert float(time.max() - time.min()) < 1e-9
    assert float(inclusion_probabilities(torch.ones(8), 3).std()) < 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_deal_is_fair(seed: int) -> None:
    counts = torch.randint(0, 9, (12,), generator=generator(seed)).tolist()
    for total in (0, 1, sum(counts) // 2, sum(counts)):
        budgets = deal(counts, total)
        assert sum(budgets) == total
        uncapped = [b for b, c in zip(budgets, counts, strict=True) if b < c]
        assert all(0 <= b <= c for b, c in zip(budgets, counts, strict=True))
        assert not uncapped or max(budgets) <= min(uncapped) + 1


def test_strata_and_cutoff() -> None:
    scores = torch.tensor([-3.0, -1.0, -2.0, -1.0, -2.99])
    assert strata_of(scores, 4).tolist() == [0, 3, 2, 3, 0]  # the largest, negative, is in the last stratum
    for value in (2.0, 0.0, -2.0):
        places, inverse = stratified_draw(torch.full((6,), value), 3, 50, generator())
        assert len(places) == 3
        assert inverse.tolist() == [2.0] * 3


def test_the_hardest_are_dropped_and_never_too_many() -> None:
    hardness = torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0, 5.0])
    assert without_hardest(hardness, 0.0, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert without_hardest(hardness, 0.34, 2).tolist() == [0, 1, 2, 4]
    assert without_hardest(hardness, 0.9, 4).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(("score", "hardest"), [("loss", 5), ("el2n", 5), ("margin", 0)])
def test_the_hardest_have_the_highest_loss_or_the_smallest_margin(score: str, hardest: int) -> None:
    selector = CCSSelector.__new__(CCSSelector)
    selector.options = CCSOptions(score=score, beta=0.2)
    pool = SimpleNamespace(signals=torch.arange(6.0)[:, None])
    draws = [selector.pick(pool, 3, generator(seed)) for seed in range(40)]  # type: ignore[arg-type]
    picked = {int(place) for draw in draws for place in draw.rows}
    assert picked == set(range(6)) - {hardest}


def test_one_stratum_is_a_random_draw() -> None:
    scores = numbers(11)
    places, _ = stratified_draw(scores, 4, 1, generator(3))
    assert places.tolist() == uniform_draw(11, 4, generator(3)).tolist()


def test_inverse_weights_make_strata_unbiased() -> None:
    scores = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0])
    stream, sums = generator(), torch.zeros(5, dtype=torch.float64)
    for _ in range(RUNS):
        places, inverse = stratified_draw(scores, 3, 2, stream)
        sums[places] += inverse
    assert torch.allclose(sums / RUNS, torch.ones(5, dtype=torch.float64), atol=0.12)


@pytest.mark.parametrize("seed", range(4))
def test_rounds_are_those_of_a_plain_loop(seed: int) -> None:
    similarity = numbers(15, 4, seed=seed)
    taken: set[int] = set()
    values = []
    for one in rounds(similarity):
        free = [row for row in range(15) if row not in taken]
        best = [max(free, key=lambda row: (float(similarity[row, k]), -row)) for k in range(4)]
        assert one.rows.tolist() == list(dict.fromkeys(best))
        assert one.value == pytest.approx(np.mean([float(similarity[row, k]) for k, row in enumerate(best)]))
        taken |= set(best)
        values.append(one.value)
    assert len(taken) == 15
    assert values == sorted(values, reverse=True)


def test_retrieval() -> None:
    similarity = numbers(20, 3, seed=1)
    whole = retrieve(similarity, 12).tolist()
    ends = list(itertools.accumulate(len(one.rows) for one in rounds(similarity)))
    for count in ends[:3]:
        assert retrieve(similarity, count).tolist() == whole[:count]  # any beginning is a selection too
    one = numbers(20, 1, seed=2)
    assert retrieve(one, 6).tolist() == one[:, 0].argsort(descending=True)[:6].tolist()
    cut = {tuple(retrieve(similarity, ends[1] + 1, generator=generator(seed)).tolist()) for seed in range(12)}
    assert len(cut) > 1


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_retrieval_stops_before_the_first_poor_round(patience: int, seed: int) -> None:
    similarity = numbers(24, 3, seed=seed)
    every = list(rounds(similarity))
    poor = [place for place in range(patience, len(every)) if every[place].value < 0.6 * every[patience - 1].value]
    wanted = [row for one in every[: poor[0]] for row in one.rows.tolist()]
    assert retrieve(similarity, 24, stop=True, patience=patience, threshold=0.6).tolist() == wanted


def test_equal_similarities_go_to_the_lower_row() -> None:
    assert retrieve(torch.ones(6, 2), 3).tolist() == [0, 1, 2]


def test_clusters_of_the_target() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = torch.cat([centres[k] + 0.1 * numbers(7, 2, seed=k).float() for k in range(3)])
    found = centroids_of(rows, 3)
    means = torch.stack([rows[7 * k : 7 * k + 7].double().mean(dim=0) for k in range(3)])
    assert float(torch.cdist(found, means).min(dim=1).values.max()) < 1e-12
    assert centroids_of(rows, 21).tolist() == rows.double().tolist()
    assert len(centroids_of(torch.ones(5, 2), 3)) == 3
    assert float(unit_rows(torch.zeros(2, 3)).abs().max()) == 0.0


def linear_programme(costs: Tensor, rows: list[int]) -> float:
    """Optimal transport by a general solver."""
    from scipy.optimize import linprog

    k, m = len(rows), costs.shape[1]
    left, right = np.kron(np.eye(k), np.ones(m)), np.kron(np.ones(k), np.eye(m))
    masses = np.concatenate([np.full(k, 1 / k), np.full(m, 1 / m)])
    solved = linprog(costs[rows].numpy().ravel(), A_eq=np.concatenate([left, right]), b_eq=masses, method="highs")
    return float(solved.fun)


@pytest.mark.parametrize("seed", range(9))
def test_transport_is_optimal_through_swaps(seed: int) -> None:
    draw = np.random.default_rng(seed)
    m, k = int(draw.integers(1, 7)), int(draw.integers(1, 9))
    costs = torch.from_numpy(draw.random((12, m)))
    costs = (3 * costs).round() if seed % 3 == 0 else costs
    rows = draw.permutation(12)[:k].tolist()
    plan = Transport(costs, rows)
    assert plan.cost() == pytest.approx(linear_programme(costs, rows), abs=1e-9)
    for _ in range(4):
        gone, came = rows[int(draw.integers(k))], int(draw.choice([row for row in range(12) if row not in rows]))
        plan = plan.without(gone).with_row(came)
        rows[rows.index(gone)] = came
        assert plan.cost() == pytest.approx(linear_programme(costs, rows), abs=1e-9)
        # Every price is a lower bound that the row reaches where its mass flows: strong duality.
        prices = plan.prices(rows)
        columns = (costs[rows] - prices[:, None]).min(dim=0).values
        assert float(prices.mean() + columns.mean()) == pytest.approx(plan.cost(), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_swap_scores_are_the_formula(seed: int) -> None:
    costs = torch.from_numpy(np.random.default_rng(seed).random((7, 5)))
    members, prices = [4, 1, 6], torch.tensor([0.1, -0.05, 0.0], dtype=torch.float64)
    found = swap_scores(costs, members, prices)
    for row in range(7):
        offers = [[float(costs[m, j] - p) for m, p in zip(members, prices, strict=True) if m != row] for j in range(5)]
        gaps = [float(costs[row, j]) - min(offers[j]) for j in range(5)]
        own = sorted(gaps, reverse=True)[math.ceil(5 / 3) - 1]
        wanted = sum(min(gap - own, 0.0) for gap in gaps) / 5 + own / 3
        assert float(found[row]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_nearly_the_best(seed: int) -> None:
    costs = torch.from_numpy(np.random.default_rng(seed).random((9, 4)))
    greedy = cover(costs, 3)
    refined = refine(costs, greedy, 20, 9)
    before, after = (Transport(costs, rows.tolist()).cost() for rows in (greedy, refined))
    every = sorted(linear_programme(costs, list(rows)) for rows in itertools.combinations(range(9), 3))
    assert after <= before + 1e-12
    assert after <= every[4] + 1e-9  # of 84
    order = torch.randperm(4, generator=generator(seed))
    assert sorted(refine(costs[:, order], cover(costs[:, order], 3), 20, 9).tolist()) == sorted(refined.tolist())


def test_group_of_copies_costs_nothing() -> None:
    features = numbers(8, 3)
    costs = group_costs(features, features[[1, 4, 6]], torch.ones(8), 0.0)
    assert sorted(refine(costs, cover(costs, 3), 5, 3).tolist()) == [1, 4, 6]
    assert Transport(costs, [2]).cost() == pytest.approx(float(costs[2].mean()))
    flat = group_costs(torch.ones(4, 2), torch.ones(3, 2), torch.zeros(4), 0.5)
    assert cover(flat, 3).tolist() == [0, 1, 2]
    more = cover(torch.tensor([[0.0, 0.9], [0.9, 0.0], [0.1, 0.8], [0.8, 0.1], [1.0, 1.0]]), 4)
    assert more.tolist() == [0, 1, 2, 3]  # a second cover once the first is complete


@pytest.mark.parametrize("seed", range(6))
def test_utility_of_the_greedy_choice(seed: int) -> None:
    n, count = 7, 3
    vectors = 0.3 * numbers(n, 4, seed=seed)
    scores, products = numbers(n, seed=seed + 50), vectors @ vectors.T

    def utility(rows: tuple[int, ...], own: bool = False) -> float:
        pairs = sum(float(products[i, j]) for i, j in itertools.combinations(rows, 2))
        return float(scores[list(rows)].sum()) - pairs - own * sum(float(products[i, i]) for i in rows) / 2

    for own in (False, True):
        picks: list[int] = []
        for _ in range(count):
            free = [row for row in range(n) if row not in picks]
            picks.append(max(free, key=lambda row: (utility((*picks, row), own), -row)))
        found = greedy_by_utility(scores, products, count, self_term=own).tolist()
        assert found == picks
    stopped = greedy_by_utility(scores, products, n, stop=True).tolist()
    whole = greedy_by_utility(scores, products, n).tolist()
    assert stopped == whole[: len(stopped)]
    if len(stopped) < n:
        assert utility(tuple(whole[: len(stopped) + 1])) <= utility(tuple(stopped)) + 1e-12


def test_alignment_at_the_edges() -> None:
    scores, none = numbers(8), torch.zeros(8, 8, dtype=torch.float64)
    assert greedy_by_utility(scores, none, 3).tolist() == scores.argsort(descending=True)[:3].tolist()
    assert greedy_by_utility(torch.ones(5), torch.zeros(5, 5), 3).tolist() == [0, 1, 2]
    assert greedy_by_utility(torch.tensor([1.0, 1.0 + 1e-14]), torch.zeros(2, 2), 1).tolist() == [0]
    vectors = numbers(8, 3)
    cold = boltzmann_greedy(scores, vectors @ vectors.T, 4, 1e-9, generator())
    assert cold.tolist() == greedy_by_utility(scores, vectors @ vectors.T, 4).tolist()
    products = vectors @ vectors.T
    off = sum(abs(float(products[i, j])) for i in range(8) for j in range(8) if i != j) / 56
    rate = balancing_rate(scores, products, 4)
    assert rate * 4 * off == pytest.approx(float(scores.abs().mean()))


def boltzmann(scores: Tensor, products: Tensor, count: int, temperature: float) -> list[float]:
    """Inclusion probabilities by enumeration of all orders."""
    wanted = [0.0] * len(scores)
    for order in itertools.permutations(range(len(scores)), count):
        gains, probability, free = scores.double().clone(), 1.0, torch.ones(len(scores), dtype=torch.bool)
        for place in order:
            chances = torch.where(free, gains / temperature, -torch.inf).softmax(dim=0)
            probability *= float(chances[place])
            gains, free[place] = gains - products[place], False
        for place in order:
            wanted[place] += probability
    return wanted


def test_boltzmann_draws_have_their_distribution() -> None:
    vectors = numbers(5, 3, seed=2)
    scores, products = numbers(5, seed=3), vectors @ vectors.T
    stream, counts = generator(), torch.zeros(5)
    for _ in range(RUNS):
        counts[boltzmann_greedy(scores, products, 2, 0.8, stream)] += 1
    check_frequencies(counts, boltzmann(scores, products, 2, 0.8), RUNS)


@pytest.mark.parametrize("seed", range(4))
def test_signs_are_those_of_a_plain_loop(seed: int) -> None:
    vectors, total = numbers(9, 3, seed=seed), numbers(3, seed=seed + 20)
    signs, after = balance_signs(vectors, total)
    for sign, vector in zip(signs.tolist(), vectors, strict=True):
        assert sign == (1.0 if float((total + vector).norm()) <= float((total - vector).norm()) else -1.0)
        total = total + sign * vector
    assert torch.allclose(after, total, atol=1e-12)
    assert float(balance_signs(vectors)[0][0]) == 1.0  # of two equal lengths
    flipped, _ = balance_signs(-vectors)
    assert torch.equal(flipped, balance_signs(vectors)[0])
    line = (2 * torch.rand(50, 1, generator=generator(seed), dtype=torch.float64)) - 1
    assert float(balance_signs(line)[1].abs()) <= 1.0


def test_half_of_the_examples() -> None:
    vectors = numbers(16, 4)
    rows, stands_for, total = balanced_half(vectors, 8, generator())
    assert bool((stands_for == 1.0).all())
    assert torch.allclose(vectors[rows].mean(dim=0) - vectors.mean(dim=0), total / 16, atol=1e-12)
    balanced = np.mean([_error(vectors, balanced_half(vectors, 8, generator(s))[0]) for s in range(200)])
    random = np.mean([_error(vectors, uniform_draw(16, 8, generator(s))) for s in range(200)])
    assert balanced < 0.8 * random
    assert float(balanced_half(torch.ones(6, 2), 3, generator())[2].abs().max()) == 0.0


@pytest.mark.parametrize(("n", "count"), [(7, 5), (9, 8), (8, 4)])
def test_a_pick_stands_for_its_pair(n: int, count: int) -> None:
    """So the weighted sum differs from that of all by the running sum alone."""
    vectors = numbers(n, 4, seed=n)
    rows, stands_for, total = balanced_half(vectors, count, generator(1))
    weights = 2.0 * stands_for if n == 2 * count else stands_for
    assert float(weights.sum()) == n
    assert torch.allclose(weights @ vectors[rows] - vectors.sum(dim=0), total, atol=1e-12)


def _error(vectors: Tensor, rows: Tensor) -> float:
    return float((vectors[rows].mean(dim=0) - vectors.mean(dim=0)).square().sum())


@pytest.mark.parametrize(("n", "count"), [(8, 4), (9, 2), (7, 5), (5, 1)])
def test_every_example_is_as_likely(n: int, count: int) -> None:
    """Also weighted: what a pick stands for makes the weighted sum unbiased."""
    vectors = numbers(n, 3, seed=n)
    chosen, weight = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    for seed in range(RUNS):
        rows, stands_for, _ = balanced_half(vectors, count, generator(seed))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == count
        chosen[rows] += 1
        weight[rows] += stands_for / stands_for.sum()
    if n >= 2 * count:
        check_frequencies(chosen, [count / n] * n, RUNS)
    assert torch.allclose(weight / RUNS, torch.full((n,), 1 / n, dtype=torch.float64), atol=0.03)


def test_herding_is_a_plain_loop() -> None:
    vectors = numbers(10, 3, seed=4)
    mean, total, picks = vectors.mean(dim=0), torch.zeros(3, dtype=torch.float64), []
    for _ in range(5):
        free = [row for row in range(10) if row not in picks]
        picks.append(min(free, key=lambda row: (float((total + vectors[row] - mean).norm()), row)))
        total = total + vectors[picks[-1]] - mean
    assert herd(vectors, 5).tolist() == picks
    assert herd(torch.ones(5, 2), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("n", "q"), [(8, 2), (30, 5), (6, 5), (40, 0)])
def test_caratheodory(n: int, q: int) -> None:
    points = numbers(n, q, seed=q)
    for stream in (None, generator(1)):
        weights = caratheodory(points, stream)
        assert float(weights.min()) >= 0.0
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
        assert int((weights > 0).sum()) <= q + 1
        assert q == 0 or float((weights @ points - points.mean(dim=0)).abs().max()) < 1e-10
    assert int((caratheodory(torch.ones(7, 2)) > 0).sum()) <= 3


def test_cap() -> None:
    weights = torch.tensor([0.2, 0.3, 0.5, 3.0], dtype=torch.float64)
    found = capped(weights, 2.0)
    assert float(found.max()) == pytest.approx(2.0)
    assert float(found.mean()) == pytest.approx(1.0)
    assert torch.equal(capped(weights, 5.0), weights)


def test_best_of_is_the_best() -> None:
    vectors = numbers(12, 3)
    errors = [_error(vectors, best_of(vectors, 5, trials, generator())) for trials in (1, 4, 20, 100)]
    assert errors == sorted(errors, reverse=True)
    stream = generator()
    draws = [uniform_draw(12, 5, stream) for _ in range(20)]
    assert errors[2] == min(_error(vectors, draw) for draw in draws)


def test_fair_shares() -> None:
    for counts, total in (([1000, 100], 50), ([5000, 300, 20], 100), ([10, 10, 1], 15), ([7], 3)):
        shares = fair_shares(counts, total)
        assert sum(shares) == pytest.approx(1.0)
        assert all(total * share <= count * (1 + 1e-9) for share, count in zip(shares, counts, strict=True))
    assert fair_shares([1000, 100], 50)[1] > 100 / 1100


def test_rank_probabilities() -> None:
    losses = torch.tensor([3.0, 1.0, torch.inf, 1.0])
    ranks = [2, 1, 3, 0]  # of the equal ones the lower place has the larger rank
    assert rank_probabilities(losses, 2.0).tolist() == [pytest.approx(((k + 0.5) / 4) ** 2) for k in ranks]
    assert rank_probabilities(losses, 0.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_infobatch_sums_are_unbiased(count: int) -> None:
    losses = torch.tensor([0.5, 2.0, torch.nan, 0.1, 3.0, 0.7, 0.2, torch.nan])
    weight = torch.zeros(8, dtype=torch.float64)
    runs = 1500
    stream = generator(count)
    for _ in range(runs):
        places, weights = infobatch_draw(losses, count, stream)
        assert len(set(places.tolist())) == count
        weight[places] += weights * (8 / float(weights.sum()))
    spread = 3.5 * math.sqrt((8 / count) * 8 / runs)
    assert float((weight / runs - 1.0).abs().max()) < spread
    if count == 5:
        below = {0, 3, 5, 6}  # the mean of the known losses is 1.083
        kept = Counter(place in below for place in places.tolist())
        assert (kept[True], kept[False]) == (1, 4)
        assert sorted(set(weights.tolist())) == [1.0, 4.0]


def test_few_below_the_mean_leave_their_places_to_the_others() -> None:
    assert infobatch_quotas(1, 20, 15) == (14, 1)
    assert infobatch_quotas(9, 3, 10) == (3, 7)
    assert infobatch_quotas(0, 12, 5) == (5, 0)


def test_infobatch_without_losses_is_random() -> None:
    places, weights = infobatch_draw(torch.full((9,), torch.nan), 4, generator(2))
    assert places.tolist() == uniform_draw(9, 4, generator(2)).tolist()
    assert weights.tolist() == [1.0] * 4


def test_bands() -> None:
    losses = torch.tensor([9.0, 1.0, 5.0, 2.0, 8.0, torch.nan, 4.0])
    low, high = np.quantile([9, 1, 5, 2, 8, 4], [0.33, 0.66])
    for focus, inside in (
        ("low", lambda value: value <= low),
        ("medium", lambda value: low < value <= high),
        ("high", lambda value: value > high),
    ):
        wanted = [5.0 if math.isnan(value) or inside(value) else 1.0 for value in losses.tolist()]
        assert band_probabilities(losses, focus, 5.0, 1.0).tolist() == wanted
    assert float(band_probabilities(losses, "low", 4.0, 2.0)[1]) == pytest.approx(2.0)


def test_windows_move_and_stop_at_what_grew_worse() -> None:
    assert [window(update / 4, 100, 0.2)[0] for update in range(5)] == [0, 6, 40, 73, 79]
    differences = torch.tensor([0.1, 3.0, -1.0, 2.0, torch.nan, 1.0, -2.0, 0.0, 0.5, 0.2, -0.5])
    start = delta_probabilities(differences, 0.0, 0.2, 0.025)
    assert start.nonzero().numel() == 11
    assert (start == 1.0).nonzero().flatten().tolist() == [1, 3, 4]
    end = delta_probabilities(differences, 1.0, 0.2, 0.025)
    assert (end == 1.0).nonzero().flatten().tolist() == [0, 4, 7]  # the last two that did not grow
    assert (delta_probabilities(torch.full((4,), -1.0), 0.5, 0.5, 0.025) == 0.025).all()
