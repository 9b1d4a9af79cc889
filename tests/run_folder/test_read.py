"""Reading what a run left, whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colm_ds.errors import DataError
from colm_ds.report import compare, load_run
from colm_ds.report.facts import group, run_facts, small_sources
from colm_ds.run_folder.follow import MetricsTail
from tests.report.run_folders import SMALL, write_run


def test_whole_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", "plain-64", num_steps=30, every=10))
    assert (run.name, run.seed, run.is_finished, run.problems) == ("plain-64", 0, True, [])
    assert [step["step"] for step in run.steps] == list(range(1, 31))
    assert list(run.heldout) == [0, 10, 20, 30]


def test_last_object_of_a_step_counts(tmp_path: Path) -> None:
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    run = load_run(tmp_path)
    assert [(step["step"], step["loss"]) for step in run.steps] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert run.name == tmp_path.name
    assert not run.is_finished


@pytest.mark.parametrize(
    ("text", "losses", "num_problems"),
    [
        ('{"step": 1, "loss": 3.0}\n{"step": 2, "lo', [3.0], 1),
        ('{"step": 1, "lo{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}', [2.5, 2.0], 0),
        ('{"step": 1, "loss": 3.0}\n[1]\n"x"\n{"loss": 1}\n{"step": "2"}\n\n', [3.0], 1),
        ("", [], 0),
    ],
    ids=["half line at the end", "resumed after half a line", "not objects of a step", "empty"],
)
def test_half_and_strange_lines(tmp_path: Path, text: str, losses: list[float], num_problems: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    run = load_run(tmp_path)
    assert [step["loss"] for step in run.steps] == losses
    assert len(run.problems) == num_problems


def test_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    run = load_run(tmp_path)
    assert run.problems == ["The training loss was not finite in 1 step."]
    assert run_facts(run, []).curves("loss")[""].values == [2.0]


def test_broken_json_files_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "plain-64", num_steps=5)
    (tmp_path / "config.json").write_text('{"name": "x"')
    (tmp_path / "summary.json").write_text("[]")
    run = load_run(tmp_path)
    assert run.problems == ["config.json cannot be read as JSON.", "summary.json is not one JSON object."]
    assert not run.is_finished


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl and no config\.json"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"a config\.json that is not a run's"):
        load_run(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        load_run(tmp_path / "config.json")
    with pytest.raises(DataError, match="does not exist"):
        load_run(tmp_path / "nothing")


def test_folder_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / name, "plain-64", num_steps=2)
    with pytest.raises(DataError, match=r"These folders in it are runs: a, b\."):
        load_run(tmp_path)


def test_numbers_without_summary_come_from_the_steps(tmp_path: Path) -> None:
    whole = run_facts(load_run(write_run(tmp_path / "a", "colm-spsa", num_steps=40)), SMALL)
    cut = run_facts(load_run(write_run(tmp_path / "b", "colm-spsa", num_steps=40, finished=False)), SMALL)
    for key in (
        "heldout.overall",
        "heldout.small",
        "peak_memory_gib.peak",
        "examples_trained",
        "examples_probed",
        "tokens_trained",
    ):
        assert cut.values[key] == pytest.approx(whole.values[key]), key
    assert cut.values["step_s.median"] == pytest.approx(whole.values["step_s.median"], rel=0.02)
    assert group(cut.values, "phase_s").keys() == group(whole.values, "phase_s").keys()
    assert "exact_match.overall" not in cut.values


def test_seconds_add_up_and_small_mean(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "plain-64", num_steps=20, every=5))
    facts = run_facts(run, SMALL)
    curve = facts.heldout()["overall"]
    assert curve.steps == [0, 5, 10, 15, 20]
    total = sum(step["time_s"]["total"] for step in run.steps)
    assert curve.seconds[0] == 0
    assert curve.seconds[-1] == pytest.approx(total)
    per_source = run.heldout[20]["per_source"]
    assert facts.values["heldout.small"] == pytest.approx(sum(per_source[name] for name in SMALL) / len(SMALL))


def test_data_loading_share(tmp_path: Path) -> None:
    path = write_run(tmp_path, "plain-64", num_steps=20)
    assert "data_loading_share" not in run_facts(load_run(path), SMALL).values  # an older run
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["time_s"] |= {"data": 0.1, "total": 0.4}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = run_facts(load_run(path), SMALL)
    assert facts.values["data_loading_share"] == pytest.approx(0.25)
    time = compare([load_run(path)], tmp_path / "report").as_dict()["tables"]["costs"]
    assert time["columns"][-1] == "waiting for data"
    assert time["rows"][0][-1] == pytest.approx(0.25)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"data_loading_share": 0.2}))
    assert run_facts(load_run(path), SMALL).values["data_loading_share"] == 0.2


def test_small_sources_listed_or_by_the_rule(tmp_path: Path) -> None:
    listed = load_run(write_run(tmp_path / "a", "plain-64", num_steps=2))
    assert small_sources([listed]) == list(SMALL)
    config = {key: value for key, value in listed.config.items() if key != "small_sources"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert small_sources([load_run(tmp_path / "a")]) == list(SMALL)


def test_lines_and_files_that_are_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without end, deep nesting and thousands of beginnings are broken lines, and cost no time."""
    monkeypatch.setattr("colm_ds.untrusted.lines.bounded_lines.__defaults__", (1000,))
    lines = [
        b'{"step": 1, "loss": 3.0}',
        b"0" * 100_000,
        b'{"step": 2, "loss": 2.5}',
        b'{"step": 3, "loss": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"step"' * 140,
        b'{"step": 4, "loss": 2.0}',
        b"0" * 5000,
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "config.json").write_text('{"colm": ' * 5000 + "1" + "}" * 5000)
    run = load_run(tmp_path)
    assert [step["loss"] for step in run.steps] == [3.0, 2.5, 2.0]
    assert run.problems == ["config.json cannot be read as JSON.", "4 lines of metrics.jsonl could not be read."]
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert [entry["loss"] for entry in tail.read()[0]] == [3.0, 2.5, 2.0]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\n{"step": 5, "loss": 1.0}\n')
    assert [entry["loss"] for entry in tail.read()[0]] == [1.0]
