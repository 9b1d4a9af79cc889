"""Inputs and outputs of the systems' own code, where their folder lies beside the repository."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_ds.config.colm import ScheduleConfig
from colm_ds.probe.directions import sign_vectors
from colm_ds.probe.sketch import sketch_vectors
from colm_ds.selection.alignment import adam_factor, boltzmann_greedy, greedy_by_utility
from colm_ds.selection.balanced import balanced_draw
from colm_ds.selection.baselines import largest
from colm_ds.selection.by_loss import infobatch_quotas, rank_probabilities, split_by_mean, window
from colm_ds.selection.ccs import deal, strata_of, stratified_draw, without_hardest
from colm_ds.selection.draws import weighted_draw
from colm_ds.selection.goracs import cover, refine, scaled_costs
from colm_ds.selection.grab import balance_signs, herd
from colm_ds.selection.simcore import retrieve, rounds
from colm_ds.selection.transport import Transport
from colm_ds.selection.vector_sum import caratheodory, fair_shares, sizes_as_chances
from tests.selection.test_systems import check_frequencies, generator

CPU = torch.device("cpu")
RUNS = 1500
Read = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def read(repo_root: Path) -> Read:
    folder = repo_root.parent / "shared" / "systems_vectors"
    if not folder.is_dir():
        pytest.skip("no shared/systems_vectors folder beside the repository")
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ccs(read: Read) -> None:
    vectors = read("ccs")
    for case in vectors["cases"]:
        strata = strata_of(tensor(case["scores"]), 50)
        counts = torch.bincount(strata, minlength=50).tolist()
        budgets = deal(counts, case["num"])
        assert strata.tolist() == case["strata_of_example"]
        assert counts == case["strata_counts"]
        # Strata of one size are in no order there.
        assert sorted(zip(counts, budgets, strict=True)) == sorted(zip(counts, case["budget_per_stratum"], strict=True))
    cut = vectors["hard_cutoff"]
    kept = without_hardest(-tensor(cut["accumulated_margin"]), cut["mis_num"] / 6, 1)
    assert kept.tolist() == sorted(cut["kept_in_order_of_margin"])
    count = vectors["equal_scores"]["positive"]
    for value in (1.0, 0.0, -2.0):  # the original returns 3, 0 and 0
        assert len(stratified_draw(torch.full((6,), value), 3, 50, generator())[0]) == count


def test_simcore(read: Read) -> None:
    for case in read("simcore")["cases"]:
        similarity = tensor(case["similarity"])
        for one, wanted in zip(rounds(similarity), case["trace"], strict=False):
            assert one.rows.tolist() == list(dict.fromkeys(wanted["picks_by_centroid"]))
            assert one.value == pytest.approx(wanted["value"], abs=1e-8)
        stops = {key: case[key] for key in ("stop", "patience")} | {"threshold": case["threshold_factor"]}
        picks = retrieve(similarity, case["budget"], **stops).tolist()
        if not case["last_round_random"]:
            assert sorted(picks) == case["selected_sorted"]
            continue
        first = len(set(case["trace"][0]["picks_by_centroid"]))
        assert set(picks[:first]) <= set(case["selected_sorted"])
        seeds = range(40)
        drawn = [sorted(retrieve(similarity, case["budget"], **stops, generator=generator(s)).tolist()) for s in seeds]
        assert case["selected_sorted"] in drawn


def test_goracs(read: Read) -> None:
    for case in read("goracs")["cases"]:
        costs = tensor(case["cost"])
        made = scaled_costs(tensor(case["distances_over_max"]), tensor(case["gradients_over_max"]), case["lam"])
        assert torch.allclose(made, costs, atol=5e-8)
        greedy = cover(costs, case["n"]).tolist()
        wanted = case["greedy_facility_location"]
        nearest = costs[wanted[:1]].amin(dim=0)
        for place, row in enumerate(wanted):
            if place and float((nearest - torch.minimum(nearest, costs[row])).sum()) == 0.0:
                break  # nothing is gained any more: a second cover begins here, and lower rows there
            assert greedy[place] == row
            nearest = torch.minimum(nearest, costs[row])
        assert Transport(costs, case["greedy_original"]).cost() == pytest.approx(case["poo_greedy"], abs=1e-9)
        refined = refine(costs, torch.tensor(wanted), 100, 30)
        assert sorted(refined.tolist()) == sorted(case["refined_original_sorted"])
        assert Transport(costs, refined.tolist()).cost() == pytest.approx(case["poo_refined"], abs=1e-9)
        assert sorted(refine(costs, torch.tensor(greedy), 100, 30).tolist()) == sorted(case["best_subset"])


def test_autocoreset(read: Read) -> None:
    vectors = read("autocoreset")
    for case in vectors["caratheodory"]:
        points = tensor(case["points"])
        weights = caratheodory(points)
        assert int((weights > 0).sum()) <= points.shape[1] + 1 == len(case["support"])
        assert torch.allclose(weights @ points, tensor(case["mean_after"]), atol=1e-6)
        assert float(weights.sum()) == pytest.approx(case["sum_w"], abs=1e-12)
    for case in vectors["fair_shares"]:
        assert fair_shares(case["class_sizes"], case["sample_size"]) == pytest.approx(case["ratios"], abs=1e-8)
    importance = vectors["importance"]
    chances = sizes_as_chances(tensor(importance["points"]))
    assert torch.allclose(chances, tensor(importance["probability"]), atol=1e-9)
    assert torch.allclose(1.0 / chances, tensor(importance["weight_per_draw_times_m"]), atol=1e-8)


def test_greats(read: Read) -> None:
    vectors = read("greats")
    for case in vectors["cases"]:
        gradients, eta, count = tensor(case["gradients"]), case["eta"], case["k"]
        first = eta * gradients @ tensor(case["validation_gradients"]).mean(dim=0)
        products = eta**2 * gradients @ gradients.T
        assert torch.allclose(first, tensor(case["first_order"]), atol=1e-8)
        assert torch.allclose(products, tensor(case["interaction"]), atol=1e-8)
        assert greedy_by_utility(first, products, count).tolist() == case["greedy_order"]
        # The selector divides both terms by the rate, which changes nothing.
        assert greedy_by_utility(first / eta, products / eta, count).tolist() == case["greedy_order"]
        own = greedy_by_utility(first, products, count, self_term=True).tolist()
        assert own == case["greedy_with_self_term"]
    count = vectors["equal_scores"]["k"]
    assert greedy_by_utility(torch.ones(6), torch.zeros(6, 6), count).tolist() == vectors["equal_scores"]["order"]


def test_opus(read: Read) -> None:
    vectors = read("opus")
    for case in vectors["boltzmann"]:
        scores, products = tensor(case["scores"]), tensor(case["interaction"])
        stream, counts = generator(7), torch.zeros(len(scores))
        for _ in range(RUNS):
            counts[boltzmann_greedy(scores, products, case["k"], case["temperature"], stream)] += 1
        check_frequencies(counts, case["inclusion_probability"], RUNS)
    check_sketches(vectors["countsketch"])
    scale = vectors["adamw_scale"]
    factor = adam_factor(scale["lr"], scale["beta1"], scale["t"])
    assert factor * math.sqrt(1.0 - scale["beta2"] ** scale["t"]) == pytest.approx(scale["value"], rel=1e-5)


def check_sketches(vectors: dict[str, Any]) -> None:
    """Sign sketches in place of their hashes: the same gradients, and the same products in the mean over draws."""
    delta, inputs = tensor(vectors["delta"]).float(), tensor(vectors["inputs"]).float()
    out, width = delta.shape[2], inputs.shape[2]
    rows = torch.eye(out).repeat_interleave(width, dim=0)
    entries = sketch_vectors(delta, inputs, rows, torch.eye(width).repeat(out, 1)) * (out * width) ** 0.5
    assert torch.allclose(entries.double(), tensor(vectors["full_gradient"]), atol=1e-5)
    wanted, draws, num_probes = tensor(vectors["exact_products"]), 4000, len(vectors["sketch"][0])
    found = torch.zeros(draws, *wanted.shape, dtype=torch.float64)
    for draw in range(draws):
        signs = [sign_vectors(draw, name, 0, num_probes, size, CPU) for name, size in (("a", out), ("b", width))]
        sketches = sketch_vectors(delta, inputs, *signs).double()
        found[draw] = sketches @ sketches.T
    error = found.std(dim=0) / draws**0.5
    assert bool(((found.mean(dim=0) - wanted).abs() < 3 * error).all())
    theirs = tensor(vectors["mean_products_over_4000_hashes"])
    assert bool(((found.mean(dim=0) - theirs).abs() < 3 * 2**0.5 * error).all())


def test_selective_backprop(read: Read) -> None:
    vectors = read("selective_backprop")
    for case in vectors["cases"]:
        chances = rank_probabilities(torch.arange(case["N"]), 1 / case["keep"] - 1)
        wanted = tensor(case["probability_by_loss_rank_ascending"])
        assert torch.allclose(chances / chances.sum(), wanted, atol=1e-9)
        stream, counts = generator(3), torch.zeros(case["N"])
        for _ in range(RUNS):
            counts[weighted_draw(chances, case["k"], stream)] += 1
        check_frequencies(counts, case["inclusion_probability"], RUNS)
    losses, count = tensor(vectors["losses"]), vectors["k"]
    stream, counts = generator(4), torch.zeros(len(losses))
    for _ in range(RUNS):
        counts[weighted_draw(rank_probabilities(losses, len(losses) / count - 1), count, stream)] += 1
    check_frequencies(counts, vectors["inclusion_exact"], RUNS)


def test_schedule_of_selective_backprop(read: Read) -> None:
    wanted = read("selective_backprop")["schedule"]
    total = 10000
    schedule = ScheduleConfig(
        start_step=int(wanted["start"] * total), end_step=int(wanted["end"] * total), plain_every=wanted["interrupt"]
    )
    for elapsed, row in zip(wanted["durations"], wanted["runs"], strict=True):
        for batch, runs in zip(wanted["batches"], row, strict=True):
            step = round(elapsed * total) + 1  # elapsed is what lies behind the step
            step += (batch + 1 - step) % wanted["interrupt"]  # the step of that parity
            assert schedule.selects(step) == runs, (elapsed, batch)


def test_grab(read: Read) -> None:
    vectors = read("grab_herding")
    for case in vectors["cases"]:
        rows = tensor(case["vectors"])
        signs, total = balance_signs(rows[::2] - rows[1::2])
        assert signs.tolist() == case["pair_signs"]
        assert torch.allclose(total, tensor(case["pair_aggregator"]), atol=1e-8)
        chosen = [2 * place + (sign < 0) for place, sign in enumerate(signs.tolist())]
        assert chosen == case["pair_chosen"]
        left = rows[chosen].mean(dim=0) - rows.mean(dim=0)
        assert torch.allclose(left, tensor(case["identity_left"]), atol=1e-9)
        assert torch.allclose(left, total / len(rows), atol=1e-12)
        signs, total = balance_signs(rows - rows.mean(dim=0))
        assert signs.tolist() == case["mean_balance_signs"]
        assert torch.allclose(total, tensor(case["mean_balance_aggregator"]), atol=1e-8)
        assert herd(rows, len(rows) // 2).tolist() == case["herding_half"]
    carry = vectors["carry"]
    total = torch.zeros(len(carry["step1"][0]), dtype=torch.float64)
    for number in ("1", "2"):
        rows = tensor(carry[f"step{number}"])
        signs, total = balance_signs(rows[::2] - rows[1::2], total)
        assert signs.tolist() == carry[f"signs{number}"]
        assert torch.allclose(total, tensor(carry[f"aggregator{number}"]), atol=1e-8)


def test_infobatch(read: Read) -> None:
    for case in read("infobatch")["cases"]:
        below, others = split_by_mean(tensor(case["scores"]))
        assert below.tolist() == case["below"]
        assert others.tolist() == case["always_kept"]
        # With as many picks as the original keeps, as many of each part; the weight there is 1 / keep, rounded down.
        kept_below = case["kept_count"] - len(others)
        assert infobatch_quotas(len(below), len(others), case["kept_count"]) == (len(others), kept_below)
        assert len(below) / kept_below >= case["weight_of_kept_below"]


def test_scores(read: Read) -> None:
    vectors = read("scores_and_weights")
    rho = vectors["rho_loss"]
    reducible = tensor(rho["loss"]) - tensor(rho["irreducible"])
    assert torch.allclose(reducible, tensor(rho["reducible"]), atol=1e-12)
    assert sorted(rho["chosen"]) == largest(reducible, rho["k"]).tolist()
    moved = vectors["delta_loss_window"]
    for update, ((wanted,),) in enumerate(zip(moved["start_end"], strict=True)):
        assert list(window(update / moved["updates"], moved["n"], moved["window"])) == wanted


def test_cube(read: Read) -> None:
    for case in read("cube")["cases"]:
        features = tensor(case["features"])
        runs, counts, imbalance = 250, torch.zeros(len(features)), 0.0
        for seed in range(runs):
            rows = balanced_draw(features, case["b"], generator(seed))
            assert len(rows) == case["b"]
            counts[rows] += 1
            imbalance += float((features[rows].mean(dim=0) - features.mean(dim=0)).square().sum()) / runs
        check_frequencies(counts, [case["target"]] * len(features), runs)
        assert imbalance < 1.4 * case["mean_squared_imbalance"] < 0.5 * case["same_of_simple_random"]
