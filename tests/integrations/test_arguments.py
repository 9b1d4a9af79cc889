"""The keys of CoLM: as a dataclass, on a command line, in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from colm_ds.config.colm import CoLMSection
from colm_ds.errors import Problems
from colm_ds.integrations.arguments import (
    OWN_TO_THE_ENGINE,
    CoLMArguments,
    CoLMConfig,
    read_section,
    resolve_section,
    with_normalization,
)


def test_the_dataclass_has_the_keys_and_defaults_of_the_section() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(CoLMConfig)}
    theirs = {name: field.default for name, field in CoLMSection.model_fields.items()}
    # Without: what is the engine's, what TrainingArguments have, and what only colm_ds.initialize can do.
    assert ours.keys() - {"source_column", "log"} == theirs.keys() - OWN_TO_THE_ENGINE.keys() - {"seed", "replay"}
    fitting = {"small_sources", "small_share", "per_source", "geometry", "metric", "weights", "selector"}
    assert all(ours[name] == "auto" for name in fitting)
    own = {"source_column", "log", "large_batch_size", "mask", "probe", "schedule", "options", "loss_normalization"}
    for name in ours.keys() - own - fitting:
        assert ours[name] == theirs[name], name


def test_none_is_the_default() -> None:
    assert "small_sources" not in CoLMConfig(small_sources=None).section()  # type: ignore[arg-type]


def test_auto_is_what_fits_the_estimator() -> None:
    for estimator, wanted in (("tokens", ("importance", False, "none")), ("spsa", ("colm", True, "auto"))):
        section = with_normalization(read_section(CoLMConfig(large_batch_size=32, probe={"estimator": estimator})))
        resolved = CoLMSection.model_validate(
            {key: value for key, value in section.items() if key not in ("source_column", "log")}
        )
        assert (resolved.selector, resolved.per_source, resolved.small_sources) == wanted


def test_command_line_beside_training_arguments() -> None:
    line = "--output_dir=out --large_batch_size=32 --weights=matched --small_sources=a,b --per_source=false --use_cpu"
    probe = ["--probe", '{"estimator": "exact"}']
    _, colm = HfArgumentParser((TrainingArguments, CoLMConfig)).parse_args_into_dataclasses([*line.split(), *probe])
    section = read_section(colm)
    assert section["large_batch_size"] == 32
    assert section["small_sources"] == ["a", "b"]
    assert section["probe"] == {"estimator": "exact"}
    assert section["weights"] == "matched"
    values = {k: v for k, v in with_normalization(section).items() if k not in ("source_column", "log")}
    assert CoLMSection.model_validate(values).per_source is False


def test_preset_fills_in_what_is_left_at_its_default() -> None:
    section = read_section(CoLMConfig(large_batch_size=32, preset="paper", metric="cosine"))
    assert section["metric"] == "cosine"
    assert not {"weights", "geometry", "per_source"} & section.keys()
    resolved = CoLMSection.model_validate(
        {key: value for key, value in section.items() if key not in ("source_column", "log")}
    )
    assert (resolved.metric, resolved.weights, resolved.probe.num_probes) == ("cosine", "uniform", 1)


def test_a_preset_is_whole_for_a_trainer() -> None:
    """Keys of the engine that it pins to their defaults are none that were written."""
    problems = Problems("colm")
    section = read_section(CoLMConfig(large_batch_size=32, preset="paper"))
    keys = {key: value for key, value in section.items() if key not in ("source_column", "log")}
    found = resolve_section(keys, coreset_size=8, seed=0, num_processes=1, problems=problems)
    assert problems.messages == []
    assert found is not None
    assert (found.selector, found.per_source, found.small_sources) == ("colm", True, "auto")
    resolve_section({**keys, "target": {"size": 4}}, coreset_size=8, seed=0, num_processes=1, problems=problems)
    assert "target" in problems.messages[0]


def test_what_only_the_engine_provides_is_known_before_training() -> None:
    for section, what in (
        ({"selector": "infobatch"}, "the losses of earlier steps"),
        ({"selector": "greats"}, "target examples"),
        ({"selector": "colm", "probe": {"estimator": "sketch", "source": "store"}}, "training's own passes"),
    ):
        problems = Problems("colm")
        keys = with_normalization({"large_batch_size": 32, **section})
        assert resolve_section(keys, coreset_size=8, seed=0, num_processes=1, problems=problems) is None
        assert len(problems.messages) == 1
        assert f"needs {what}" in problems.messages[0].replace("the gradients of ", "")


def test_block_of_an_arguments_file(tmp_path: Path) -> None:
    path = tmp_path / "arguments.yaml"
    path.write_text(
        "output_dir: out\nuse_cpu: true\ncolm:\n  large_batch_size: 32\n  mask: {size: 8}\n", encoding="utf-8"
    )
    _, colm = HfArgumentParser((TrainingArguments, CoLMArguments)).parse_yaml_file(str(path))
    wanted = {"large_batch_size": 32, "mask": {"size": 8}}
    assert read_section(colm) == wanted
    assert read_section(path) == wanted
    assert read_section('{"large_batch_size": 32, "mask": {"size": 8}}') == wanted


def test_what_the_loss_is_a_mean_over() -> None:
    def found(**keys: Any) -> str:
        return str(with_normalization({"large_batch_size": 32, **keys}).get("loss_normalization"))

    assert [found(selector=name) for name in ("random", "full", "keep_random", "colm")] == ["token"] * 2 + [
        "example"
    ] * 2
    assert found() == "example"
    assert found(selector="random", loss_normalization="example") == "example"
    assert found(selector="random", preset="paper") == "None"  # the preset pins it
    assert found(loss_normalization="token") == "token"
