"""A check's kappa is that of plain autograd in float64; random weights and tokens that say nothing do not pay."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from colm_ds.batching.loader import LargeBatchLoader, RecordDataset
from colm_ds.check.errors_of_coresets import LargeBatches
from colm_ds.check.measure import CheckResult, check_model
from colm_ds.check.other_selectors import other_ways, score_sample
from colm_ds.check.report_of_check import as_json, as_svg, format_check
from colm_ds.check.sample import measure_sample
from colm_ds.check.signals_of_sample import SampleFacts
from colm_ds.check.ways_to_choose import WayToChoose, resets
from colm_ds.cli import main
from colm_ds.config.colm import CoLMSection
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.probe.tokens import counted_tokens, example_features, vectors_of_model
from colm_ds.randomness import private_generator
from colm_ds.recipes.recipe import load_recipe
from colm_ds.selection import SINGLE_PROCESS, DenseGradients, SelectionSettings, Signals, select_coreset
from colm_ds.types import Coreset, Example
from tests.choices import random_choices
from tests.engine.training import records
from tests.probe.test_gradient_sketch import plain_rows
from tests.tiny_models import VOCABULARY_SIZE, add_lora, tiny_model
from tests.training.test_bad_input import recipe_of

SIZES = {"large_batch_size": 16, "coreset_size": 8}
SOURCES = {"a": 50, "b": 30, "c": 16}
WIDER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
"""Beyond a sketch's side."""


def free(way: Any) -> float:
    """Price of a way to choose where none costs anything."""
    return 1.0


def check(model: nn.Module, data: Any, **colm: Any) -> CheckResult:
    """Eight batches of sixty-four examples, free of charge."""
    config = CoLMSection(**{**SIZES, **colm})
    return check_model(model, config, data, price=free, steps=10, num_examples=64, num_batches=8)


def kappa(result: CheckResult, name: str) -> float:
    return next(way.error.kappa for way in result.ways if way.way.name == name)


def sampled(data: Any, count: int) -> list[Example]:
    """The examples of the first large batches."""
    loader = LargeBatchLoader(data, SIZES["large_batch_size"], seed=0, rank=0, world_size=1)
    batches = [loader.batch(step) for step in range(1, 1 + count // SIZES["large_batch_size"])]
    return [batch.examples[position] for batch in batches for position in range(batch.size)]


def plain_kappa(rows: Tensor, parts: Tensor | None, batches: LargeBatches, coresets: Sequence[Coreset]) -> float:
    """One loop over the batches, with the gradients themselves."""
    counted = torch.ones(len(rows), dtype=torch.float64) if parts is None else parts.double()
    own = expected = 0.0
    for batch, coreset in zip(batches.examples, coresets, strict=True):
        mean = counted[batch] @ rows[batch] / counted[batch].sum()
        chosen = batch[coreset.positions]
        factors = counted[chosen] * coreset.weights.double()
        divisor = len(chosen) if parts is None else factors.sum()
        own += float((factors @ rows[chosen] / divisor - mean).square().sum())
        residuals = counted[batch][:, None] * (rows[batch] - mean) / counted[batch].mean()
        r = len(batch)
        expected += (1 / len(chosen) - 1 / r) * float(residuals.square().sum()) / (r - 1)
    return own / expected


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_kappa_is_that_of_autograd(normalization: str) -> None:
    data, model = RecordDataset(records(SOURCES)), tiny_model("llama", **WIDER)
    result = check(model, data, loss_normalization=normalization, quotas="independent")
    examples = sampled(data, 64)
    assert result.num_examples == 64
    assert result.num_batches == 8
    counts = torch.tensor([float((example.labels[1:] != -100).sum()) for example in examples])
    parts = counts if normalization == "token" else None
    occurs = torch.zeros(VOCABULARY_SIZE, dtype=torch.bool)
    for place in range(len(data)):
        occurs[counted_tokens(data[place])] = True
    features = example_features(examples, vectors_of_model(model, 0, SINGLE_PROCESS, occurs), 1 / 3)
    double = tiny_model("llama", **WIDER).double()
    names = [name for name, module in double.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    assert {"lm_head", "model.embed_tokens"} < set(names)
    rows = plain_rows(double, examples, names)
    last = plain_rows(double, examples, ["model.layers.1.self_attn.v_proj"]).float()
    batches = LargeBatches.draw(64, 16, 8, seed=0)
    sources = torch.tensor([example.source for example in examples])

    def chosen(matrix: Tensor, dense: bool, per_source: bool, metric: str) -> list[Coreset]:
        found = []
        for step, batch in enumerate(batches.examples, start=1):
            signal = matrix[batch] if parts is None else matrix[batch] * parts[batch][:, None]
            signals = Signals(
                torch.arange(16),
                torch.ones(16, dtype=torch.bool),
                gradients=DenseGradients(signal) if dense else None,
                vectors=None if dense else signal,
                parts=None if parts is None else parts[batch],
            )
            settings = SelectionSettings(
                geometry="plain",
                metric=metric,
                weights="matched",
                per_source=per_source,
                mask_size=64 if dense else None,
            )
            found.append(select_coreset(sources[batch], signals, 8, settings=settings, step=step))
        return found

    ends = {"input embeddings": ["model.embed_tokens"], "head": ["lm_head"]}
    ends["layers"] = [name for name in names if name not in ("lm_head", "model.embed_tokens")]
    for name, coresets in (
        ("tokens, one pool, matched", chosen(features, False, False, "euclidean")),
        ("tokens, per source, matched", chosen(features, False, True, "euclidean")),
        ("exact, one pool, matched", chosen(last, True, False, "l1")),
    ):
        assert kappa(result, name) == pytest.approx(plain_kappa(rows, parts, batches, coresets), abs=0.02), name
        (error,) = [way.error for way in result.ways if way.way.name == name]
        assert set(error.kappa_by_part) == set(ends)
        for part, of_part in ends.items():
            plain = plain_kappa(plain_rows(double, examples, of_part), parts, batches, coresets)
            assert error.kappa_by_part[part] == pytest.approx(plain, abs=0.06), (name, part)  # one matrix of 48 x 48
    assert any(note.startswith("kappa of ") and "head" in note for note in result.notes)


def test_quotas_carry_over_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not within a round, whose errors have to be independent for the bias; in the long run shares are exact."""
    given: list[tuple[int, dict[int, float], Coreset]] = []
    choose = WayToChoose.choose

    def spied(way: WayToChoose, *args: Any) -> Coreset:
        coreset = choose(way, *args)
        if way.name == "random by quotas":
            given.append((args[2], dict(args[5]), coreset))
        return coreset

    monkeypatch.setattr(WayToChoose, "choose", spied)
    check(tiny_model("llama", **WIDER), RecordDataset(records(SOURCES)))
    assert [number for number, _, _ in given] == list(range(8))
    first = [carry for _, carry, _ in given[:4]]
    assert len({tuple(carry.values()) for carry in first}) == 4
    assert all(sum(carry.values()) == pytest.approx(0.0) for carry in first)
    assert [carry for _, carry, _ in given[4:]] == [coreset.carry for _, _, coreset in given[:4]]


@pytest.mark.parametrize("name", ["cpu_lora", "phi2_math", "phi2_math_tokens"])
def test_recommended_keys_fit_recipes(name: str, repo_root: Path) -> None:
    """Also those that write keys of another estimator."""
    result = check(tiny_model("llama", **WIDER), RecordDataset(records(SOURCES)))
    for way in (each.way for each in result.ways if each.way.keys != ("as it is",)):
        recipe = load_recipe(repo_root / "finetune" / "recipes" / f"{name}.yaml", way.keys, needs_files=False)
        colm = recipe.resolve_section()
        assert (colm.selector, colm.per_source) == (way.selector, way.settings.per_source)
        if way.needs_signal:
            assert (colm.weights, colm.metric) == (way.settings.weights, way.settings.metric)


BY_TARGETS = ("simcore", "goracs", "greats", "opus")

BY_TARGET = ["colm.small_share=0.5", "colm.outer_rules=off", "colm.replay=on", "colm.target.data=TARGET"]

WRITTEN = {
    "greats": ["colm.selector=greats", "colm.options.eta=auto", *BY_TARGET],
    "opus": ["colm.selector=opus", *BY_TARGET],
    "a target kept": [*BY_TARGET, "colm.selector=greats", "colm.target.refresh=4", "colm.probe.refresh=run"],
    "stored": ["colm.probe.source=store"],
    "matched": ["colm.weights=matched", "colm.geometry=adam"],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_recommended_keys_take_back_what_a_recipe_writes(name: str, tmp_path: Path, repo_root: Path) -> None:
    target = tmp_path / "target.jsonl"
    target.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    written = [key.replace("TARGET", str(target)) for key in WRITTEN[name]]
    examples = RecordDataset(records({"a": 20, "c": 20}, seed=7))
    path = repo_root / "finetune" / "recipes" / "phi2_math.yaml"
    written = ["colm.mask={}", "colm.probe={}", *written]
    config = load_recipe(path, written, needs_files=False).resolve_section()
    data, model = RecordDataset(records(SOURCES)), tiny_model("llama", **WIDER)
    own = config.model_copy(update=SIZES)
    settings = {"price": free, "steps": 10, "num_examples": 64, "num_batches": 8, "all_selectors": True}
    result = check_model(model, own, data, target=examples, learning_rate=1e-3, **settings)
    recommended = [way.way.keys for way in result.ways if way.way.keys != ("as it is",)]
    plain = ("colm.selector=random", *resets(own, "random", None))
    assert len(recommended) > 30
    for keys in (*recommended, plain):
        with_target = [f"colm.target.data={target}"] if "colm.target={}" not in keys else []
        named = with_target if keys[0] in {f"colm.selector={each}" for each in BY_TARGETS} else []
        load_recipe(path, [*written, *named, *keys], needs_files=False).resolve_section()


def test_other_selectors_choose_by_plain_losses_and_gradients() -> None:
    """`big_loss`, in float64 by autograd; the others are there."""
    data, model = RecordDataset(records(SOURCES)), tiny_model("llama", **WIDER)
    target = RecordDataset(records({"a": 20, "c": 20}, seed=7))
    config = CoLMSection(**SIZES, target={"size": 12, "batch": 4})
    settings = {"price": free, "steps": 10, "num_examples": 64, "num_batches": 8, "all_selectors": True}
    result = check_model(model, config, data, target=target, learning_rate=0.0, **settings)
    names = {way.way.name for way in result.ways}
    assert {"ccs, one pool", "simcore, per source", "goracs, one pool", "opus, per source"} <= names
    assert {
        "vector_sum best_of by tokens, one pool",
        "grab, one pool",
        "hidden_medoids, one pool",
        "loss_band, per source",
    } <= names
    (note,) = [note for note in result.notes if "infobatch" in note]
    assert "delta_loss" in note
    assert "losses of earlier steps" in note
    examples = sampled(data, 64)
    double = tiny_model("llama", **WIDER).double()
    modules = [name for name, module in double.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    rows = plain_rows(double, examples, modules)
    with torch.no_grad():
        losses = torch.stack(
            [double(input_ids=each.input_ids[None], labels=each.labels[None]).loss for each in examples]
        )
    batches = LargeBatches.draw(64, 16, 8, seed=0)
    largest = [
        Coreset(batch_losses.sort(descending=True, stable=True).indices[:8].sort().values, torch.ones(8), 0)
        for batch_losses in (losses[batch] for batch in batches.examples)
    ]
    assert kappa(result, "big_loss, one pool") == pytest.approx(plain_kappa(rows, None, batches, largest), rel=0.02)


def test_parts_weigh_the_batch_and_not_the_target() -> None:
    """In a mean over tokens a step adds up its own gradients times their tokens; targets are each one's mean loss."""
    data, target = RecordDataset(records(SOURCES)), RecordDataset(records({"a": 12, "c": 12}, seed=7))
    model, config = tiny_model("llama"), CoLMSection(**SIZES, target={"size": 12, "batch": 4})
    measured = measure_sample(model, config, data, 32)
    sample, parts = measured.sample, measured.sample.num_label_tokens.float()
    facts = SampleFacts(
        sample.sources, sample.lengths, sample.num_label_tokens, sample.indices, None, None, measured.exact
    )
    ways = other_ways(config, facts, 3, has_target=True).ways
    plain, by_token = (score_sample(model, config, sample, ways, each, target) for each in (None, parts))
    examples = torch.arange(16)
    for key in {way.signal_key for way in ways if way.selector in ("simcore", "goracs", "greats")} - {None}:
        ours, weighted = plain[key].of(examples, 1), by_token[key].of(examples, 1)
        assert len(ours.target) == 4
        assert torch.equal(ours.target, weighted.target)
        factor = parts[examples, None] if "gradient" in key else 1.0
        torch.testing.assert_close(weighted.vectors, ours.vectors * factor)


def test_selectors_with_a_target_need_one() -> None:
    result = check(tiny_model("llama"), RecordDataset(records(SOURCES)), small_sources="auto")
    assert not any("greats" in note for note in result.notes)
    settings = {"price": free, "steps": 10, "num_examples": 64, "num_batches": 2, "all_selectors": True}
    result = check_model(tiny_model("llama"), CoLMSection(**SIZES), RecordDataset(records(SOURCES)), **settings)
    assert "simcore, goracs, greats, opus: not measured for want of a target (--target)." in result.notes


def test_every_way_is_there_and_the_table_is_sorted() -> None:
    result = check(tiny_model("llama"), RecordDataset(records(SOURCES)), small_sources="auto")
    names = [way.way.name for way in result.ways]
    wanted = {
        f"{signal}, {scope}, {weights}"
        for signal in ("tokens", "exact", "sketch", "spsa")
        for scope in ("one pool", "per source")
        for weights in ("uniform", "cluster", "matched")
    }
    wanted |= {
        f"{draw} by tokens, {scope}" for draw in ("balanced", "importance") for scope in ("one pool", "per source")
    }
    assert set(names) == wanted | {"random by quotas", "this recipe"}
    kappas = [way.error.kappa for way in result.ways]
    assert kappas == sorted(kappas)
    assert any("geometry: plain" in note for note in result.notes)
    lines = format_check(result).splitlines()
    assert [line.split("  ")[0] for line in lines[4 : 4 + len(names) + 1] if not line.startswith("random (")] == names
    assert json.loads(json.dumps(as_json(result)))["ways"][0]["name"] == names[0]
    svg = as_svg(result)
    assert all(name in svg for name in names)
    same = check(tiny_model("llama"), RecordDataset(records(SOURCES)), probe={"estimator": "tokens"})
    assert "this recipe" not in [way.way.name for way in same.ways]  # it is one of the others


def test_nothing_pays_on_random_weights() -> None:
    """Tokens that say nothing of each other, and weights that know nothing of them."""
    generator = private_generator(0, "noise")
    tokens = torch.randint(3, VOCABULARY_SIZE, (96, 14), generator=generator).tolist()
    data = RecordDataset([{"input_ids": row[: 5 + n % 9], "source": "ab"[n % 2]} for n, row in enumerate(tokens)])
    config = CoLMSection(**SIZES)
    result = check_model(tiny_model("llama"), config, data, price=free, steps=100, num_examples=96, num_batches=12)
    assert result.recommendation.startswith("Nothing pays: train plainly on 8 (colm.selector=random)")
    assert not any(way.pays for way in result.ways)


def test_lora_fresh_and_trained() -> None:
    data = RecordDataset(records(SOURCES))
    fresh = check(add_lora(tiny_model("llama"), "llama"), data)
    trained = check(tiny_model("llama", lora=True), data)
    assert trained.num_modules == 2 * fresh.num_modules
    assert any("lora_A has no gradient yet" in note for note in fresh.notes)
    assert not any("lora_A" in note for note in trained.notes)


def test_classification() -> None:
    result = check(tiny_model("llama"), random_choices(64))
    assert {way.way.name.split(",")[0] for way in result.ways} >= {"tokens", "exact", "sketch", "spsa"}
    assert not any("per source" in way.way.name for way in result.ways)  # there is one


def test_a_family_that_the_probe_does_not_know() -> None:
    result = check(tiny_model("mamba", attn_implementation="eager"), RecordDataset(records(SOURCES)), selector="random")
    assert any(note.startswith("exact, sketch and spsa are left out: model of type 'mamba'") for note in result.notes)
    names = {way.way.name.split(",")[0] for way in result.ways}
    assert names == {"tokens", "balanced by tokens", "importance by tokens", "random by quotas"}


def test_examples_that_are_not_finite_are_left_out() -> None:
    data, model = RecordDataset(records(SOURCES)), tiny_model("llama")
    counts = torch.bincount(torch.cat([counted_tokens(example) for example in sampled(data, 64)]))
    rare = int(torch.where(counts > 0, counts, len(data)).argmin())
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = torch.nan
    result = check(model, data, selector="random")
    assert result.num_examples < 64
    assert any("are left out, as their gradients are not finite" in note for note in result.notes)
    assert any(note.startswith("tokens is left out: the input embeddings") for note in result.notes)
    assert all(0.0 < way.error.kappa < 100.0 for way in result.ways)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with LoRA and its data."""
    folder = tmp_path_factory.mktemp("check")
    write_mixture(folder / "data", seed=1, scale=0.05)
    recipe = recipe_of(folder) | {"lora": {"rank": 4, "alpha": 8}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", str(folder / "recipe.yaml"), "--examples", "40", "--batches", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads((folder / "run_check" / "check.json").read_text())
    assert (found["size"], found["large"], found["num_examples"], found["num_batches"]) == (8, 16, 40, 4)
    assert found["recommendation"] in shown
    assert "Note: The weights are random" in shown
    assert re.search(r"^random \(plain training\) +1 +8 +0 +1\.00", shown, flags=re.MULTILINE)
    assert [way["name"] for way in found["ways"] if way["is_recipe"]] == ["this recipe"]
    prices = {way["name"]: way["price"] for way in found["ways"]}
    assert prices["tokens, one pool, matched"] == prices["random by quotas"] == 1.0
    assert prices["exact, one pool, matched"] == prices["spsa, per source, uniform"] > 1.5  # LoRA, no checkpointing
    assert (folder / "run_check" / "check.svg").read_text().startswith("<?xml")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        (["colm.probe.estimator=tokens"], "importance by tokens, one pool"),
        (["colm.probe.estimator=tokens", "colm.selector=colm"], "tokens, one pool, matched"),
        (["colm.selector=random"], "random (plain training)"),
    ],
)
def test_the_row_of_the_recipe_is_marked(
    keys: list[str], row: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(folder / "marked")
    assert main(["check", str(folder / "recipe.yaml"), "--examples", "40", "--batches", "4", "--out", out, *keys]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if " <- this recipe " in line]
    assert [line.startswith(f"{row} <- this recipe ") for line in marked] == [True]


def test_at_the_end_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B of the adapter is not zero there, so A has gradients too."""
    from colm_ds.recipes.model import load_model, load_tokenizer
    from colm_ds.recipes.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    model: Any = load_model(recipe.model, recipe.lora, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    run = folder / "finished"
    model.save_pretrained(run / "adapter")
    (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    words = ["check", str(folder / "recipe.yaml"), "--examples", "32", "--batches", "2"]
    assert main([*words, "--at", str(run), "--out", str(folder / "later")]) == 0
    assert f"weights from {run / 'adapter'}, after step 3" in capsys.readouterr().out
    later = json.loads((folder / "later" / "check.json").read_text())
    assert later["notes"] == [note for note in later["notes"] if "lora_A" not in note]
    assert main([*words, "--at", str(run / "checkpoints" / "step_7")]) != 0
    assert "no such folder" in capsys.readouterr().err


def test_later_tokens_keep_the_embeddings_of_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does, also where embeddings are trained."""
    from colm_ds.check import measure
    from colm_ds.recipes.model import load_tokenizer
    from colm_ds.recipes.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml", ["lora=null"])
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    model: Any = measure.load_at_start(recipe, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[::2] += 1.0
    run = folder / "trained"
    model.save_pretrained(run / "model")
    (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    used: list[Tensor] = []

    def spied(examples: Any, vectors: Tensor, length_power: float) -> Tensor:
        used.append(vectors)
        return example_features(examples, vectors, length_power)

    monkeypatch.setattr(measure, "example_features", spied)
    words = ["check", str(folder / "recipe.yaml"), "--examples", "32", "--batches", "2", "lora=null"]
    assert main([*words, "--out", str(folder / "at_start")]) == 0
    assert main([*words, "--at", str(run), "--out", str(folder / "at_end")]) == 0
    assert f"weights from {run / 'model'}, after step 3" in capsys.readouterr().out
    assert torch.equal(*used)
    moved = vectors_of_model(model, recipe.seed, SINGLE_PROCESS)
    assert not torch.allclose(moved, used[0], atol=0.05)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["colm.coreset_size=16"], r"colm\.coreset_size = 16: all of the large batch"),
        (["--examples", "20"], "20 examples: fewer than two large batches"),
        (["--batches", "1"], "--batches 1: less than 2"),
        (["--at", "nowhere"], "nowhere: no such folder"),
        (["--target", "some.jsonl"], "--target is for the selectors of --all-selectors"),
        (["colm.coreset_size=17"], r"more than colm\.large_batch_size = 16"),
    ],
)
def test_mistakes_are_named(folder: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder / "recipe.yaml"), *words]) != 0
    assert re.search(why, capsys.readouterr().err)
