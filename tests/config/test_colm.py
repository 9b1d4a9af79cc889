"""Configurations: what is filled in, and what every mistake says. One error lists all mistakes."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colm_ds.config.colm import CoLMSection, ScheduleConfig
from colm_ds.config.resolve import ResolvedConfig, resolve_config, selection_config
from colm_ds.engine.coreset_selector import small_source_ids
from colm_ds.errors import CoLMError, ConfigError
from tests.engine.training import Case, start, step
from tests.ranks import Ranks

STAGES = (0, 1, 2, 3)


def config(deepspeed: dict[str, Any] | None = None, **colm: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with r = 128 and b = 64 and the given keys over it."""
    return {"colm": {"large_batch_size": 128, "coreset_size": 64, **colm}, **(deepspeed or {})}


def problems(given: Any, world_size: int = 2) -> list[str]:
    """Lines of the error that a configuration raises."""
    with pytest.raises(ConfigError) as raised:
        resolve_config(given, world_size)
    return [line.strip() for line in str(raised.value).split("\n")]


# --- what is filled in ---


def test_batch_arithmetic_is_resolved() -> None:
    resolved = resolve_config(config({"train_micro_batch_size_per_gpu": 4}), 2)
    assert (resolved.coreset_size, resolved.micro_batch_size) == (64, 4)
    assert resolved.deepspeed == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
        "managed_gradient_accumulation": False,
    }


@pytest.mark.parametrize(
    ("deepspeed", "colm", "micro", "size"),
    [
        ({}, {}, 8, 64),
        ({"train_batch_size": 64}, {"coreset_size": None}, 8, 64),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 6}, {"coreset_size": None}, 4, 48),
        ({"gradient_accumulation_steps": 8}, {}, 4, 64),
        ({"gradient_accumulation_steps": 3}, {}, 11, 64),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, {}, 8, 64),
        ({}, {"coreset_size": 5}, 3, 5),
        ({}, {"coreset_size": None, "selector": "full"}, 8, 128),
        ({"train_micro_batch_size_per_gpu": 100}, {"coreset_size": 13}, 100, 13),
    ],
)
def test_sizes(deepspeed: dict[str, Any], colm: dict[str, Any], micro: int, size: int) -> None:
    resolved = resolve_config(config(deepspeed, **colm), 2)
    assert (resolved.micro_batch_size, resolved.coreset_size, resolved.colm.coreset_size) == (micro, size, size)


def test_dictionary_is_not_changed_and_file_is_the_same(tmp_path: Path) -> None:
    given = config({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}})
    before = copy.deepcopy(given)
    resolved = resolve_config(given, 2)
    resolved.deepspeed["zero_optimization"]["stage"] = 3
    assert given == before
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    for name in (path, str(path)):
        assert resolve_config(name, 2).colm == resolved.colm


def test_section_object_gives_what_its_keys_give(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"coreset_size": None, "large_batch_size": 128, "preset": "paper", "probe": {"epsilon": 0.01}}
    deepspeed = {"train_batch_size": 64, "zero_optimization": {"stage": 2}}
    wanted = resolve_config({**deepspeed, "colm": values}, 2)
    section = CoLMSection.model_validate(values)
    monkeypatch.setattr("colm_ds.config.colm.with_preset", lambda values: pytest.fail("validated again"))
    assert resolve_config({**deepspeed, "colm": section}, 2) == wanted
    assert section.coreset_size is None


def test_section_object_is_checked_too() -> None:
    given = config({"train_batch_size": 32}, selector="nonsense", coreset_size=100_000)
    section = CoLMSection.model_validate(given["colm"])
    assert problems({**given, "colm": section}) == problems(given)


@pytest.mark.parametrize(
    "values",
    [
        *({}, {"replay": "on"}, {"variance_every": 2}, {"packing": 64}, {"selector": "full"}),
        *({"coreset_size": 8}, {"coreset_size": 8, "replay": "on"}, {"coreset_size": 8, "variance_every": 2}),
        *({"coreset_size": 32}, {"coreset_size": 8, "selector": "nonsense"}),
        {"coreset_size": 8, "replay": "on", "probe": {"estimator": "tokens"}},
    ],
)
def test_section_object_outside_deepspeed(values: dict[str, Any]) -> None:
    """Is treated as its keys and values are."""

    def outcome(given: Any) -> Any:
        try:
            return selection_config(given, 2)
        except ConfigError as error:
            return str(error)

    values = {"large_batch_size": 16, **values}
    assert outcome(CoLMSection.model_validate(values)) == outcome(values)


def test_resolved_configuration_passes_through() -> None:
    resolved = resolve_config(config({"train_micro_batch_size_per_gpu": 3}), 2)
    assert resolve_config(resolved, 2) is resolved


def changed_batch(resolved: ResolvedConfig) -> ResolvedConfig:
    """Resolved numbers of which DeepSpeed's were edited afterwards."""
    return replace(resolved, deepspeed={**resolved.deepspeed, "train_batch_size": 64})


def changed_coreset(resolved: ResolvedConfig) -> ResolvedConfig:
    """Resolved numbers of which the section's were edited afterwards."""
    return replace(resolved, colm=resolved.colm.model_copy(update={"coreset_size": 32}))


@pytest.mark.parametrize(
    ("change", "world_size", "said"),
    [
        (lambda resolved: resolved, 4, "world_size = 2: there are 4 ranks. Resolve the configuration for 4."),
        (changed_batch, 2, "train_batch_size = 64: was resolved as 16. Change the configuration and resolve it again."),
        (changed_coreset, 2, "colm.coreset_size = 32: was resolved as 64. Change the configuration and resolve it "),
    ],
)
def test_resolved_configuration_that_no_longer_fits(change: Any, world_size: int, said: str) -> None:
    head, line = problems(change(resolve_config(config(), 2)), world_size)
    assert head == "1 problem in the resolved configuration"
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("listed", "sources", "ids"),
    [
        ("auto", ("web", "code", "math"), [1, 2]),
        ("none", ("web", "code", "math"), []),
        (["math", "web", "math"], ("web", "code", "math"), [0, 2]),
        ([2, "web"], ("web", "code", "math"), [0, 2]),
        ([20, "30"], ("10", "20", "30"), [1, 2]),  # numbers of the data, not ids
        ([1], ("1", "2", "3"), [0]),
    ],
)
def test_small_sources(listed: Any, sources: tuple[str, ...], ids: list[int]) -> None:
    colm = resolve_config(config(small_sources=listed), 1).colm
    assert small_source_ids(colm, dict(zip(sources, (90, 5, 5), strict=True))) == ids


TOKENS = {"probe": {"estimator": "tokens"}}
EVERY_PROBE = {"epsilon": 1e-3, "length_power": 0.3333}


@pytest.mark.parametrize(
    "values",
    [
        *({"selector": name, **TOKENS} for name in ("random", "keep_random", "balanced", "importance")),
        *({"selector": name, "metric": "auto", **TOKENS, "preset": "paper"} for name in ("colm", "balanced")),
        *({"probe": {"estimator": name, **EVERY_PROBE}} for name in ("spsa", "exact", "sketch", "tokens")),
        {"small_share": 0.5, "small_sources": ["web"], **TOKENS},
        {"small_share": 0.5, "selector": "keep_random", "weights": "uniform"},
    ],
)
def test_values_of_auto_and_defaults_are_accepted_where_they_have_no_effect(values: dict[str, Any]) -> None:
    """As presets and recipes write them, of which an arm may change the estimator."""
    colm = resolve_config(config(**values), 2).colm
    assert resolve_config({"colm": colm}, 2).colm == resolve_config({"colm": colm.model_dump()}, 2).colm == colm


# --- mistakes ---

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, 'colm = None: missing. Add "colm": {"large_batch_size": ..., "coreset_size": ...}.'),
    ({"colm": [128, 64]}, 'colm = [128, 64]: not a section of keys and values. Add "colm": {'),
    ({"colm": {"coreset_size": 4}}, "colm.large_batch_size: missing. It is: r: examples inspected in every step."),
    (config(corset_size=3), "colm.corset_size: unknown key. Did you mean 'coreset_size'?"),
    (config(zebra=3), "colm.zebra: unknown key. Known keys: coreset_size, geometry, large_batch_size, "),
    (config(mask={"sise": 3}), "colm.mask.sise: unknown key. Did you mean 'size'?"),
    (config(probe={"estimater": "spsa"}), "colm.probe.estimater: unknown key. Did you mean 'estimator'?"),
    (
        config(probe={"estimator": "exact", "direction_rank": 4}),
        "colm.probe.direction_rank = 4: exact takes no random step. Remove it.",
    ),
    (
        config(probe={"estimator": "projection"}, mask={"size": 4}),
        "colm.mask = {'size': 4, 'criterion': 'grad'}: a projection is compared whole, without a mask",
    ),
    *(
        (
            config(probe={"estimator": estimator, "epsilon": 0.01}),
            f"colm.probe.epsilon = 0.01: {estimator} takes no random step. Remove it.",
        )
        for estimator in ("exact", "sketch", "projection", "tokens")
    ),
    (
        config(probe={"length_power": 0.5}),
        "colm.probe.length_power = 0.5: only the features of the estimator 'tokens' are divided by a power of the ",
    ),
    (
        config(small_share=0.5, probe={"estimator": "tokens"}),
        "colm.small_share = 0.5: no small sources are kept (colm.small_sources = 'none'). Remove it, or write small_so",
    ),
    (config(small_share=0.5, small_sources="none"), "colm.small_share = 0.5: no small sources are kept"),
    *(
        (
            config(selector=name, weights=weights, coreset_size=None if name == "full" else 64),
            f"colm.weights = '{weights}': '{name}' has no medoids to weigh.",
        )
        for name, weights in (("random", "matched"), ("keep_random", "cluster"), ("full", "matched"))
    ),
    *(
        (config(selector=name, **more), f"colm.metric = 'cosine': '{name}' draws at random and compares no distances.")
        for name, more in (
            ("balanced", {"metric": "cosine", "probe": {"estimator": "tokens"}}),
            ("importance", {"metric": "cosine", "probe": {"estimator": "sketch"}}),
        )
    ),
    *(
        (config(schedule=schedule), f"colm.schedule = {schedule}: in no step of it the selector runs. Write selector: ")
        for schedule in (
            {"plain_every": 1},
            {"start_step": 100, "end_step": 50},
            {"every": 2, "plain_every": 1},
            {"start_step": 1, "every": 2, "plain_every": 2},
        )
    ),
    (
        config(selector="balanced", weights="uniform", mask={"size": 7}),
        "colm.mask = {'size': 7, 'criterion': 'grad'}: 'balanced' goes by the slopes of spsa, and not by coordinates",
    ),
    (
        config({"zero_optimization": {"stage": "1", "overlap_comm": "true"}}),
        "zero_optimization.overlap_comm = True: works with accumulation by colm_ds at stages 2 and 3 only",
    ),
    (config({"zero_optimization": {"stage": "3"}}, variance_every=5), "colm.variance_every = 5"),
    (config({"zero_optimization": {None: 1}}), "zero_optimization.None"),
    (config({"wandb": "yes"}), "wandb = 'yes': not a section of keys and values. Write {"),
    (config(geometry="flat"), "colm.geometry = 'flat': must be 'adam' or 'plain'"),
    (config(probe={"layer": "head"}), "colm.probe.layer = 'head': must be 'v_proj', 'qkv' or 'fc'"),
    (config(schedule={"evry": 2}), "colm.schedule.evry: unknown key. Did you mean 'every'?"),
    (config(large_batch_size="many"), "colm.large_batch_size = 'many': must be a whole number"),
    (config(coreset_size=2.5), "colm.coreset_size = 2.5: must be a whole number"),
    (config(coreset_size=0), "colm.coreset_size = 0: must be at least 1"),
    (config(per_source="perhaps"), "colm.per_source = 'perhaps': must be true or false"),
    (config(metric="l2"), "colm.metric = 'l2': must be 'l1', 'euclidean' or 'cosine'. It is: distance"),
    (config(small_sources="all"), "colm.small_sources = 'all': must be 'auto', 'below_mean' or 'none'"),
    (config(mask={"size": "big"}), "colm.mask.size = 'big': must be 'auto' or a whole number"),
    (config(mask={"size": 0}), 'colm.mask.size = 0: less than 1. Write at least 1, or "auto".'),
    (config(mask=7), "colm.mask = 7: must be a section of keys and values"),
    (config(probe={"epsilon": 0}), "colm.probe.epsilon = 0: must be more than 0"),
    (config(probe={"num_probes": 0}), "colm.probe.num_probes = 0: less than 1"),
    (config(probe={"layer": "q_proj"}), "colm.probe.layer = 'q_proj': must be 'v_proj'"),
    (
        config(selector="colmm"),
        "colm.selector = 'colmm': unknown. Did you mean 'colm'? Choose one of colm, random",
    ),
    (
        config(selector="token"),
        "colm.selector = 'token': unknown. A signal is chosen by another key: write probe: {estim",
    ),
    (
        config(selector="spsa"),
        "colm.selector = 'spsa': unknown. A signal is chosen by another key: write probe: {estimat",
    ),
    (config(selector="random_"), "colm.selector = 'random_': unknown. Did you mean 'random'? Choose one of"),
    (
        config(coreset_size=200),
        "colm.coreset_size = 200: more than colm.large_batch_size = 128. Choose at most 128 (the paper uses half).",
    ),
    (config(coreset_size=None), "colm.coreset_size = None: missing. Write b here or as train_batch_size."),
    (config(coreset_size=1), "colm.coreset_size = 1: fewer than the 2 ranks. Choose at least 2."),
    (
        config({"train_batch_size": 32}),
        "train_batch_size = 32: must equal colm.coreset_size = 64 (DeepSpeed counts the examples trained on). "
        "Remove it or write 64.",
    ),
    (config({"train_batch_size": -1}), "train_batch_size = -1: not a positive whole number. Write one, or remove it."),
    (config({"train_batch_size": True}), "train_batch_size = True: not a positive whole number."),
    (
        config({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}),
        "gradient_accumulation_steps = 4: 4 per micro-batch x 4 steps x 2 ranks is not the coreset of 64. Remove it:",
    ),
    (config(selector="full"), "colm.coreset_size = 64: the selector 'full' trains on all 128 of the large batch."),
    (
        config(probe={"estimator": "sketch"}, mask={"size": 100}),
        "colm.mask = {'size': 100, 'criterion': 'grad'}: a sketch is compared whole, without a mask. Remove it.",
    ),
    (
        config(probe={"estimator": "exact", "num_probes": 4}),
        "colm.probe.num_probes = 4: the exact gradient has no probes. Remove it.",
    ),
    (config({"amp": {"enabled": True}}), "amp: removed from DeepSpeed (0.19.8 refuses it). Use bf16 or fp16."),
    (config({"bf16": True}), "bf16 = True: not a section of keys and values. Write an object: {...}."),
    (config({"zero_optimization": 2}), "zero_optimization = 2: not a section of keys and values."),
    *(
        (
            config({key: {"enabled": True, "check_grad_overflow": value}}),
            f"{key}.check_grad_overflow = {value!r}: gradients that are not finite would be applied, and every weight "
            "be NaN. Remove it: such steps are then skipped.",
        )
        for key, value in (("bf16", False), ("bfloat16", "off"))
    ),
    (
        config({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}),
        "zero_optimization.compute_grad_norm = False: in float32 it is by the norm that gradients that are not finite",
    ),
    (
        config({"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}),
        "checkpoint.writer.decoupled: not with coresets: checkpoints are read back and renamed once they are written.",
    ),
    (config({"datastates_ckpt": {"host_cache_size": 1}}), "datastates_ckpt: not with coresets: checkpoints are read"),
    (config({"torch_autocast": {"enabled": True}}), "torch_autocast.enabled = True: the probe does not run under"),
    (
        config({"managed_gradient_accumulation": True}),
        "managed_gradient_accumulation = True: colm_ds accumulates gradients itself. Remove it.",
    ),
    (
        config({"zero_optimization": {"stage": 1, "overlap_comm": True}}),
        "zero_optimization.overlap_comm = True: works with accumulation by colm_ds at stages 2 and 3 only.",
    ),
    (config({"gradient_cliping": 0.5}), "gradient_cliping: unknown key. Did you mean 'gradient_clipping'?"),
    (
        config({"steps_per_print": "auto"}),
        "steps_per_print = 'auto': cannot be resolved. Write the value, or remove the key for DeepSpeed's default.",
    ),
]


@pytest.mark.parametrize(("given", "says"), MISTAKES, ids=[says.split(":")[0][:40] for _, says in MISTAKES])
def test_mistake(given: dict[str, Any], says: str) -> None:
    head, *lines = problems(given)
    assert head == "1 problem in the DeepSpeed configuration"
    assert len(lines) == 1
    assert lines[0].startswith(says)


def test_all_mistakes_at_once() -> None:
    given = {
        "colm": {
            "large_batch_size": 10,
            "coreset_size": 20,
            "mask": {"size": 0},
            "probe": {"estimator": "exact", "num_probes": 3},
        },
        "train_batch_size": 7,
        "train_micro_batch_size_per_gpu": "x",
        "steps_per_print": "auto",
        "torch_autocast": {"enabled": True},
    }
    head, *lines = problems(given)
    assert head == "7 problems in the DeepSpeed configuration"
    assert [line.split(" = ")[0] for line in lines] == [
        "train_micro_batch_size_per_gpu",
        "colm.coreset_size",
        "train_batch_size",
        "colm.mask.size",
        "colm.probe.num_probes",
        "steps_per_print",
        "torch_autocast.enabled",
    ]
    head, *lines = problems(config(corset_size=1, metric="l2", probe={"epsilon": -1, "seed": 0}))
    assert head == "4 problems in the DeepSpeed configuration"
    assert len(lines) == 4


def test_fewer_examples_than_ranks() -> None:
    lines = problems({"colm": {"large_batch_size": 3, "coreset_size": 2}}, world_size=4)
    assert lines[1:] == [
        "colm.coreset_size = 2: fewer than the 4 ranks. Choose at least 4.",
        "colm.large_batch_size = 3: fewer than the 4 ranks. Choose at least 4.",
    ]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text(json.dumps(config(coreset_size=200)), encoding="utf-8")
    (tmp_path / "zero3.json").write_text("{,}", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    assert problems(tmp_path / "zero2.json")[0] == f"1 problem in {tmp_path / 'zero2.json'}"
    missing = tmp_path / "zero22.json"
    assert problems(str(missing)) == [f"{missing}: no such file. In that folder: list.json, zero2.json, zero3.json."]
    assert problems(tmp_path / "no" / "zero2.json") == [f"{tmp_path / 'no' / 'zero2.json'}: no such file."]
    assert problems(tmp_path / "zero3.json")[0].startswith(f"{tmp_path / 'zero3.json'}: not readable as JSON: ")
    assert problems(tmp_path / "list.json") == [f"{tmp_path / 'list.json'}: a list. Write one JSON object."]
    assert problems(tmp_path)[0].startswith(f"{tmp_path}: not readable as JSON: ")


# --- mistakes that only `initialize` can see ---


def messages(cases: list[Case], arguments: list[dict[str, Any]]) -> list[str]:
    """In a rank: the error of starting each case, or an empty string."""
    found = []
    for case, given in zip(cases, arguments, strict=True):
        try:
            start(case, **given).destroy()
            found.append("")
        except CoLMError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.distributed
def test_mistakes_found_with_model_and_data(pools: dict[int, Ranks]) -> None:
    given = "ConfigError: 1 problem in the arguments of colm_ds.initialize\n"
    mamba = Case("mamba", family="mamba", model={"attn_implementation": "eager"})
    with_data = Case("x", colm={"large_batch_size": 124})
    expected: list[tuple[Case, dict[str, Any], str]] = [
        (
            Case("x", colm={"small_sources": ["drama", "poems", 9]}),
            {},
            "ConfigError: colm.small_sources: ['poems', 9] not in the dataset. "
            "Its sources: 'algebra', 'biology', 'code', 'drama', 'essays'.",
        ),
        (with_data, {}, "SelectionError: large_batch_size = 124: more than the 123 examples of the dataset."),
        (mamba, {}, "ProbeError: model of type 'mamba': its last layer, MambaBlock, has no attention"),
        (Case("x"), {"training_data": None}, f"{given}  training_data: missing: coresets are chosen"),
        (Case("x"), {"config": None}, f"{given}  config: missing. Give a path or a dict"),
        (Case("x", deepspeed={"optimizer": {}}), {}, 'ConfigError: optimizer: none. Add "optimizer": {'),
        (Case("x"), {"training_data": [{"input_ids": [1, 2]}]}, "DataError: example 0: no 'source'."),
        (Case("x"), {}, ""),
    ]
    cases, arguments, wanted = zip(*expected, strict=True)
    for seen in pools[2].run(messages, list(cases), list(arguments)):
        for message, start_of_message in zip(seen, wanted, strict=True):
            assert message.startswith(start_of_message)
            assert bool(message) == bool(start_of_message)


# --- the JSON files that recipes use ---

FILES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def test_files_are_those_tested(repo_root: Path) -> None:
    assert {path.stem for path in (repo_root / "ds_configs").glob("*.json")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_file_is_explicit(name: str, repo_root: Path) -> None:
    given = json.loads((repo_root / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    zero = given["zero_optimization"]
    assert zero["stage"] == int(name[4])
    on_cpu = {part for part in ("offload_optimizer", "offload_param") if part in zero and zero[part]["device"] == "cpu"}
    wanted = {"zero2_offload": {"offload_optimizer"}, "zero3_offload": {"offload_optimizer", "offload_param"}}
    assert on_cpu == wanted.get(name, set())
    assert given["gradient_clipping"] == 1.0  # DeepSpeed's default since 0.19.3, none before
    assert given["bf16"] == given["fp16"] == {"enabled": False}
    accumulation = None if name == "zero0" else "fp32"  # DeepSpeed refuses fp32 at stage 0 in bf16
    assert given["data_types"] == {"grad_accum_dtype": accumulation}
    assert "auto" not in json.dumps(given)
    assert not {"colm", "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu"} & set(given)
    resolved = resolve_config(config(given, coreset_size=64), 2).deepspeed
    assert given.items() <= resolved.items()


def settings_in_use(case: Case) -> dict[str, Any]:
    """In a rank: what a case's engine trains with."""
    engine = start(case)
    lr = step(engine).stats["lr"]
    inner = engine.deepspeed_engine
    found = {"lr": lr, "clipping": inner.gradient_clipping(), "bucket": inner.zero_reduce_bucket_size()}
    engine.destroy()
    return {**found, "bf16": inner.bfloat16_enabled(), "optimizer": type(inner.basic_optimizer).__name__}


@pytest.mark.distributed
def test_configuration_for_hugging_face_trains(pools: dict[int, Ranks]) -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    }
    case = Case("auto", deepspeed=given, stage=2, dtype="bfloat16")
    width = case.build_model().config.hidden_size
    wanted = {"lr": 2e-5, "clipping": 1.0, "bucket": width**2, "bf16": True, "optimizer": "AdamW"}
    assert pools[2].run(settings_in_use, case) == [wanted, wanted]


@pytest.mark.parametrize(("written", "read"), [(True, "on"), (False, "off"), ("on", "on"), (256, 256), ("256", 256)])
def test_packing_as_written(written: Any, read: Any) -> None:
    assert CoLMSection.model_validate({"large_batch_size": 16, "packing": written}).packing == read


def test_packing_and_replay() -> None:
    for replay in ("on", "offload"):
        message = "".join(problems(config({"train_batch_size": 64}, packing=256, replay=replay)))
        assert f"colm.replay = '{replay}': examples packed into rows (colm.packing = 256) are not where" in message
    assert resolve_config(config({"train_batch_size": 64}, packing=256, replay="auto"), 2).colm.replay == "auto"
    assert "colm.packing" in "".join(problems(config({"train_batch_size": 64}, packing=0)))


def test_schedules_that_select() -> None:
    for schedule in ({}, {"plain_every": 2}, {"every": 3, "plain_every": 2}, {"start_step": 9, "end_step": 10}):
        assert resolve_config(config(schedule=schedule), 2).colm.schedule.ever_selects
    for every, plain_every, first in itertools.product(range(1, 5), range(5), range(4)):
        made = ScheduleConfig(every=every, plain_every=plain_every, start_step=first)
        assert made.ever_selects == (made.share(2000) > 0)


def test_keys_of_the_engine_in_a_loop_of_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"colm\.num_workers = 3: is for the step of colm_ds\.initialize\. Remove it"):
        selection_config({"large_batch_size": 16, "coreset_size": 8, "num_workers": 3})


def test_packing_in_a_loop_of_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"colm\.packing = 64: packs the micro-batches of colm_ds\.initialize"):
        selection_config({"large_batch_size": 16, "coreset_size": 8, "packing": 64})
