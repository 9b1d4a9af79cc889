"""`colm-ds preview`: the numbers are the data's, and the coreset shown is the one that training takes first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from colm_ds.cli import main
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.training.preview import one_of_each
from tests.training.test_bad_input import recipe_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its data."""
    folder = tmp_path_factory.mktemp("preview")
    write_mixture(folder / "data", seed=1, scale=0.05)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(folder)))
    return folder


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert main(["preview", str(folder / "recipe.yaml"), *arguments]) == 0
    return capsys.readouterr().out


def test_sources_and_lengths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(folder, capsys, "--no-coreset")
    records = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    counts: dict[str, int] = {}
    for record in records:
        counts[record["source"]] = counts.get(record["source"], 0) + 1
    for name, count in counts.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert int(line.split()[1].replace(",", "")) == count
        assert line.endswith("yes") == (count < len(records) / len(counts))
    bars = re.findall(r"^ +\d+ - \d+ +([\d,]+)", text, flags=re.MULTILINE)
    assert sum(int(bar.replace(",", "")) for bar in bars) == len(records)
    assert "step 1" not in text


def test_held_out_rows_that_are_trained_on_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (folder / "data" / "train.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(rows[0]) | {"instruction": "Say no.", "output": "No."})
    (folder / "heldout.jsonl").write_text("\n".join([rows[0], other, rows[5]]))
    given = f"data.heldout={folder / 'heldout.jsonl'}"
    assert "\nWARNING: 2 of 3 held-out examples are trained on too.\n" in shown(folder, capsys, given, "--no-coreset")
    (folder / "heldout.jsonl").write_text(other)
    assert "WARNING" not in shown(folder, capsys, given, "--no-coreset")


def test_trained_tokens_are_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(folder, capsys, "--no-coreset", "--examples", "2")
    answers = {json.loads(line)["output"] for line in (folder / "data" / "train.jsonl").read_text().splitlines()}
    marked = re.findall(r"### Response:>>>(.*?)</s><<<", text, flags=re.DOTALL)
    assert len(marked) == 2
    assert {answer.strip() for answer in marked} <= {answer.strip() for answer in answers}


def test_examples_take_turns_over_sources() -> None:
    sources = np.array([2, 0, 0, 2, 1, 0])
    assert one_of_each(sources, 5) == [1, 4, 0, 2, 3]
    assert one_of_each(sources, 99) == [1, 4, 0, 2, 3, 5]
    assert one_of_each(sources, 0) == []


def test_picks_are_counted_in_their_pool(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(folder, capsys, "--examples", "0")
    picked: dict[str, list[int]] = {}
    for source, number in re.findall(r"^ +\d+ (\S+) +\d+  pick (\d+)", text, flags=re.MULTILINE):
        picked.setdefault(source, []).append(int(number))
    assert picked
    assert all(sorted(numbers) == list(range(1, len(numbers) + 1)) for numbers in picked.values())


@pytest.mark.parametrize("selector", ["colm", "keep_random", "big_loss"])
def test_coreset(
    selector: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = shown(folder, capsys, f"colm.selector={selector}", "--examples", "0")
    assert "forward replay" not in caplog.text  # which is training's
    assert "step 1: 8 of 16 examples" in text
    rows = text.split("in the coreset")[1].splitlines()[1:]
    assert len(rows) == 16
    assert sum("  -  " not in row for row in rows) == 8
    per_source = re.findall(r"^generated/\w+ +(\d+) +(\d+)  ", text.split("step 1:")[1], flags=re.MULTILINE)
    assert sum(int(kept) for _, kept in per_source) == 8
    assert sum(int(seen) for seen, _ in per_source) == 16


def test_bad_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(folder / "recipe.yaml"), "colm.corset_size=4"]) == 2
    assert "Did you mean 'coreset_size'?" in capsys.readouterr().err


def test_classification(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The right candidate is marked, and the clusters that are to come are named."""
    rows = [
        {
            "premise": f"Box {n} is red.",
            "hypothesis": "it is",
            "label": ("entailment", "contradiction", "neutral")[n % 3],
        }
        for n in range(40)
    ]
    (folder / "cb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(folder)
    recipe |= {"task": "choices", "data": {"task": "cb", "train": str(folder / "cb.jsonl"), "cache_dir": None}}
    recipe |= {"clusters": {"num": 2, "warmup_steps": 1, "refreshes": 0}}
    (folder / "choices.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["preview", str(folder / "choices.yaml"), "--examples", "1"]) == 0
    text = capsys.readouterr().out
    assert "Yes, No, or Maybe?\n>>>Yes<<< and not No or Maybe" in text
    assert "clusters take the place of these sources after 1 steps" in text
    assert re.search(r"^all +40 ", text, flags=re.MULTILINE)
    assert len(re.findall(r"^ +\d+ all .* (Yes|No|Maybe)$", text, flags=re.MULTILINE)) > 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["colm.probe.estimator=tokens"], "from one pool of all sources"),
        (["colm.probe.estimator=tokens", "colm.selector=colm"], "from one pool of all sources"),
        (["colm.probe.estimator=tokens", "colm.per_source=true"], "by its quota"),
        (["colm.selector=random"], "chosen among all, whatever their source"),
        (["colm={selector: full, large_batch_size: 16, coreset_size: 16}"], "all are trained on"),
    ],
)
def test_it_says_how_sources_came_into_the_coreset(
    changes: list[str], why: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(folder, capsys, *changes)
    _, table = re.split(r"^source +seen +kept +why$", text, flags=re.MULTILINE)
    whys = {line.split(maxsplit=3)[3] for line in table.split("\n\n")[0].strip().splitlines()}
    assert {each.split(";")[0] for each in whys} == {why}
    assert "small: fewer than" not in text
    assert " yes\n" not in text
    assert ("  drawn" in text) == ("tokens" in changes[0] and "colm.selector=colm" not in changes)
