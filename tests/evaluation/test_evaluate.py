"""Whole evaluations: going on, ranks, what is refused, the tables, and the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data.formats import read_place
from colm_ds.data.sets import DataPlaces, find_set
from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.evaluate import TASK_NAMES, Options, evaluate, read_tasks, task_names
from colm_ds.evaluation.math_tasks import MathTask
from colm_ds.evaluation.question_files import parse_places, subset
from colm_ds.evaluation.question_log import EvaluationFolder, append
from colm_ds.evaluation.results import AVERAGES, averages, markdown, wilson_interval
from colm_ds.run_folder.lock import RunLock
from tests.evaluation.evaluations import TASKS, assert_same_answers, make_options, numbers, run_on_rank, write_data
from tests.evaluation.stubs import StubBackend, make_backend
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def alone(tokenizer: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Results and folder of an evaluation by one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    results = run_on_rank(tokenizer.name_or_path, str(data), str(folder))
    assert results is not None
    return results, folder


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo processes."""
    with Ranks(2) as ranks:
        yield ranks


def run(backend: Any, options: Options, folder: Path, **model: Any) -> dict[str, Any]:
    said: list[str] = []
    results = evaluate(
        backend, options, EvaluationFolder(folder), title="tiny", model={"base": "tiny", **model}, say=said.append
    )
    assert results is not None
    return {**results, "said": said}


def test_one_by_one_equals_batched(
    alone: tuple[dict[str, Any], Path], tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    results = run_on_rank(tokenizer.name_or_path, str(data), str(tmp_path), 1)
    assert results is not None
    assert numbers(results) == numbers(alone[0])
    for name in TASKS:
        assert_same_answers(tmp_path, alone[1], name)


@pytest.mark.distributed
def test_two_ranks_equal_one(
    alone: tuple[dict[str, Any], Path], two_ranks: Ranks, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    first, second = two_ranks.run(run_on_rank, tokenizer.name_or_path, str(data), str(tmp_path))
    assert second is None
    assert numbers(first) == numbers(alone[0])
    for name in TASKS:
        assert_same_answers(tmp_path, alone[1], name)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in alone[1].iterdir())


class Killed(BaseException):
    """Stands for a signal."""


class KilledBackend:
    """Passes on what a backend answers until it has given some batches."""

    def __init__(self, backend: Any, num_batches: int) -> None:
        self.name, self.tokenizer = backend.name, backend.tokenizer
        self._backend, self._left = backend, num_batches

    def _until_killed(self, batches: Any) -> Any:
        for batch in batches:
            if self._left == 0:
                raise Killed
            self._left -= 1
            yield batch

    def generate(self, *arguments: Any, **named: Any) -> Any:
        return self._until_killed(self._backend.generate(*arguments, **named))

    def score(self, questions: Any) -> Any:
        return self._until_killed(self._backend.score(questions))

    def text_losses(self, texts: Any) -> Any:
        return self._until_killed(self._backend.text_losses(texts))


def test_killed_again_and_again_equals_undisturbed(
    alone: tuple[dict[str, Any], Path], tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    backend = make_backend(tokenizer, max_examples=3)
    kills, said = 0, []
    while True:
        try:
            results = run(KilledBackend(backend, 7), make_options(data), tmp_path)
            break
        except Killed:
            kills += 1
            parts = list(tmp_path.glob("*.part-0.jsonl"))
            if kills % 2 and parts:  # the last line was cut off
                with parts[0].open("a", encoding="utf-8") as part:
                    part.write('{"index": 3, "corr')
    assert kills >= 3
    said += results["said"]
    assert any("resuming after" in message for message in said)
    assert numbers(results) == numbers(alone[0])
    for name in TASKS:
        assert_same_answers(tmp_path, alone[1], name)
    again = run(KilledBackend(backend, 0), make_options(data), tmp_path)  # nothing is asked any more
    assert again["tasks"] == results["tasks"]


def test_two_ranks_go_on_from_one(
    alone: tuple[dict[str, Any], Path], two_ranks: Ranks, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(KilledBackend(make_backend(tokenizer, max_examples=2), 3), make_options(data), tmp_path)
    results = two_ranks.run(run_on_rank, tokenizer.name_or_path, str(data), str(tmp_path))[0]
    assert numbers(results) == numbers(alone[0])


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"limit": 3}, {}, r"copa.limit: None there, 3 here"),
        ({"max_new_tokens": 9}, {}, r"gsm8k.max_new_tokens: 12 there, 9 here"),
        ({"chunk_tokens": 9}, {}, r"perplexity.chunk_tokens: 16 there, 9 here"),
        ({}, {"dtype": "bfloat16"}, r"model.dtype: None there, 'bfloat16' here"),
        ({}, {"base": "other"}, r"model.base: 'tiny' there, 'other' here"),
    ],
)
def test_answers_to_something_else_are_refused(
    changes: dict[str, Any], model: dict[str, Any], message: str, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run(StubBackend(lambda prompt: "7", tokenizer=tokenizer), make_options(data), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = StubBackend(lambda prompt: "8", tokenizer=tokenizer)
    folder = EvaluationFolder(tmp_path)
    identity = {"base": "tiny", **model}
    with pytest.raises(SystemExit):  # one message on every rank
        evaluate(other, make_options(data, **changes), folder, title="tiny", model=identity)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    asked, _ = read_tasks(make_options(data, **changes), other)
    settings = {each.task.name: each.settings for each in asked}
    with pytest.raises(ConfigError, match=message):
        folder.start({**identity, "backend": "stub"}, settings, overwrite=False)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    again = run(other, make_options(data, overwrite=True, **changes), tmp_path, **model)
    assert again["said"] == []
    assert (tmp_path / "notes.txt").exists()


def test_changed_questions_are_refused(data: Path, tmp_path: Path) -> None:
    mine = write_data(tmp_path / "data")
    options = make_options(mine, ("copa",))
    run(StubBackend(), options, tmp_path / "out")
    file = mine / "superglue" / "copa" / "validation.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("cups", "hats"), encoding="utf-8")
    with pytest.raises(SystemExit):
        run(StubBackend(), options, tmp_path / "out")


def test_a_folder_is_one_processs_at_a_time(data: Path, tmp_path: Path) -> None:
    """Another's answers would be merged while it writes them."""
    held = RunLock(tmp_path / "out")
    with pytest.raises(SystemExit):
        run(StubBackend(), make_options(data, ("copa",)), tmp_path / "out")
    held.release()
    run(StubBackend(), make_options(data, ("copa",)), tmp_path / "out")
    RunLock(tmp_path / "out").release()  # let go of at the end


def test_a_call_without_an_answer_binds_nothing(data: Path, tmp_path: Path) -> None:
    """It was refused before its first answer, and its message names another value to ask with."""
    folder = EvaluationFolder(tmp_path)
    folder.write_json("settings.json", {"model": {}, "tasks": {"/x": {}, "../x": {}}})  # of others
    folder.start({"base": "tiny"}, {"copa": {"limit": 5}}, overwrite=False)
    folder.open_part("copa", 0).close()
    folder.start({"base": "other"}, {"copa": {"limit": 6}}, overwrite=False)
    with folder.open_part("copa", 0) as part:
        append(part, [{"index": 0}])
    with pytest.raises(ConfigError, match=r"copa.limit: 6 there, 7 here"):
        folder.start({"base": "other"}, {"copa": {"limit": 7}}, overwrite=False)


def test_what_earlier_calls_told_stays(data: Path, tmp_path: Path) -> None:
    options = {name: make_options(data, (name,)) for name in ("copa", "wic")}
    for name, facts in (("copa", {"isolation": "strong", "world_size": 4}), ("wic", {"world_size": 1})):
        results = evaluate(
            StubBackend(), options[name], EvaluationFolder(tmp_path), title="", model={"base": "tiny"}, facts=facts
        )
    assert results is not None
    assert (results["isolation"], results["world_size"], sorted(results["tasks"])) == ("strong", 1, ["copa", "wic"])


def test_the_test_split_comes_before_the_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    place = find_set("gsm8k", MathTask("gsm8k").subpaths, DataPlaces(str(tmp_path)))
    assert place is not None
    assert Path(place).stem == "test"


def test_further_sets_join_the_folder(data: Path, tmp_path: Path) -> None:
    run(StubBackend(), make_options(data, ("copa",)), tmp_path)
    results = run(StubBackend(), make_options(data, ("wic",)), tmp_path)
    assert list(results["tasks"]) == ["wic", "copa"]


def test_limit_is_a_fixed_part_of_each_group() -> None:
    groups = ["a"] * 50 + ["b"] * 3
    small, large = subset(groups, 5, 0), subset(groups, 20, 0)
    assert small == subset(groups, 5, 0) == sorted(set(small))
    assert set(small) <= set(large)
    assert len(small) == 8
    assert len(large) == 23
    assert subset(groups, 5, 1) != small
    assert subset(groups, None, 0) == list(range(53))


def test_names_of_sets_and_groups() -> None:
    assert task_names(["math"])[0] == ["gsm8k", "math", "numglue", "svamp", "mathematics", "simuleq"]
    assert task_names(["MATH", "cb"]) == (["math", "cb"], {"math", "cb"})
    assert set(task_names(["all", "perplexity"])[0]) == set(TASK_NAMES)
    with pytest.raises(ConfigError, match=r"--tasks gsm8: no such evaluation set. Did you mean 'gsm8k'"):
        task_names(["gsm8"])


def test_sets_without_data(data: Path) -> None:
    asked, left_out = read_tasks(make_options(data, ("superglue",)), StubBackend())
    assert [each.task.name for each in asked] == ["wic", "copa"]
    assert left_out == ["sst2", "cb", "multirc", "rte", "boolq"]
    with pytest.raises(ConfigError, match=r"cb: no data: in .* none of superglue/cb/validation"):
        read_tasks(make_options(data, ("cb",)), StubBackend())
    with pytest.raises(ConfigError, match="no data for sst2"):
        read_tasks(Options(("superglue",), DataPlaces()), StubBackend())
    with pytest.raises(ConfigError, match="--limit 0"):
        read_tasks(make_options(data, limit=0), StubBackend())


def test_places_of_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = parse_places([str(data), "cb=hub:super_glue:cb"], TASK_NAMES)
    assert find_set("cb", ("cb",), places) == "hub:super_glue:cb"
    assert find_set("copa", ("superglue/copa/validation",), places) == f"{data}/superglue/copa/validation.jsonl"
    assert find_set("perplexity", ("pile5",), places) == f"{data}/pile5"
    for words, message in (
        ([str(data), str(tmp_path)], "a second folder"),
        (["nowhere"], "no such folder"),
        (["copaa=x"], "Did you mean 'copa'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_places(words, TASK_NAMES)
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        if name == "missing":
            raise FileNotFoundError("Couldn't find it")
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_place("hub:a/b")) == [("hub:a/b[item 1]", {"a": 1})]
    assert list(read_place("hub:a/b:main:test")) == [("hub:a/b:main:test[item 1]", {"a": 1})]
    assert calls == [("a/b", None, "validation"), ("a/b", "main", "test")]
    with pytest.raises(DataError, match="hub:missing: cannot be loaded: Couldn't find it"):
        list(read_place("hub:missing"))


@pytest.mark.parametrize("num_asked", [1, 7, 50, 1319])
def test_wilson_interval_solves_its_equation(num_asked: int) -> None:
    for num_correct in {0, 1, num_asked // 2, num_asked}:
        low, high = wilson_interval(num_correct, num_asked)
        share = num_correct / num_asked
        assert 0 <= low <= share <= high <= 1
        for bound in (low, high):  # |share - p| = z * sqrt(p (1 - p) / n)
            distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / num_asked)
            assert abs(share - bound) == pytest.approx(distance, abs=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_averages_and_tables() -> None:
    tasks: dict[str, dict[str, Any]] = {
        name: {"n": 10, "accuracy": place / 10, "interval": [0.0, 1.0], "f1": None}
        for place, name in enumerate(("gsm8k", "math", "numglue", "svamp", "mathematics", "simuleq", "wic", "copa"))
    }
    found = averages(tasks)
    assert list(found) == list(AVERAGES)[:3]
    assert found["math, in-domain"] == pytest.approx(0.1)
    assert found["math, out-of-domain"] == pytest.approx(0.4)
    assert found["math, all six (Table 1)"] == pytest.approx(0.25)
    tasks["squad"] = {"n": 3, "accuracy": 0.0, "interval": [0.0, 0.5], "f1": 0.5}
    assert averages(tasks)["SQuAD F1, WiC, COPA (Table 9)"] == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    text = markdown({"title": "T", "tasks": tasks, "averages": averages(tasks), "left_out": ["rte"]})
    assert "| svamp | 10 | 30.0 | 0.0 to 100.0 |" in text
    assert "| math, in-domain | 10.0 |" in text
    assert "No data for rte: left out." in text
