"""The three files of a report: what is in them, what must not be, and that nothing stops them."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from colm_ds.errors import DataError
from colm_ds.report import Comparison, Run, compare, format_table, load_run
from colm_ds.report.facts import Facts
from tests.report.run_folders import ARMS, write_run

SECTIONS = ["compared", "quality", "costs", "sources", "selected", "repeat"]
DATE = datetime(2025, 1, 2, 3, 4, tzinfo=timezone.utc)
NASTY = '<script>alert("1")</script> & $x_1$ | *b* `c` \x07 \u202e größe 数'


class PageReader(HTMLParser):
    """Collects attributes and checks that tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open_tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def check_page(page: str) -> PageReader:
    """What holds for every page: balanced, nothing fetched, valid pictures, ids that are there once."""
    reader = PageReader()
    reader.feed(page)
    assert reader.open_tags == []
    assert "script" not in reader.tags
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", page)
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {
        v[1:] for _, n, v in reader.attributes if n == "href" and v[0] == "#"
    }
    assert used <= set(ids)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    return reader


def files_of(found: Comparison) -> tuple[str, str, dict]:
    """Page, Markdown and JSON of a comparison."""
    page, markdown, numbers = (found.files[key].read_text(encoding="utf-8") for key in ("html", "markdown", "json"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return page, markdown, json.loads(numbers, parse_constant=refuse)


@pytest.fixture(scope="module")
def five_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("five")
    return [load_run(write_run(folder / name, name)) for name in ARMS]


@pytest.fixture(scope="module")
def five(five_runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(five_runs, tmp_path_factory.mktemp("report"), date=DATE)


def test_every_chapter_and_number_is_there(five: Comparison, five_runs: list[Run]) -> None:
    page, markdown, numbers = files_of(five)
    check_page(page)
    assert [section.key for section in five.sections] == SECTIONS
    for section in five.sections:
        assert section.tables
        assert f'id="{section.key}"' in page
        assert f"## {section.title}" in markdown
        for picture in section.pictures:
            assert picture.svg in page
    for run in five_runs:
        overall = run.summary["heldout"]["overall"]
        assert f"{overall:.4f}" in page
        assert f"{overall:.4f}" in markdown
        arm = next(arm for arm in numbers["arms"] if arm["name"] == run.name)
        assert arm["numbers"]["heldout.overall"]["mean"] == pytest.approx(overall, rel=1e-5)
        assert f">{run.summary['step_s']['median']:.2f}<" in page
        assert run.config["command"] in page
    for text in (page, markdown):
        for expected in ("dates (small)", "0123abc", "2.13.0", "Some CPU", "13,200", "2025-01-02 03:04 UTC"):
            assert expected in text, expected
    assert numbers["tables"]["arms"]["columns"][0] == "arm"
    assert numbers["date"] == "2025-01-02 03:04 UTC"


def test_every_table_is_the_same_in_all_files(five: Comparison) -> None:
    page, markdown, numbers = files_of(five)
    for section in five.sections:
        for table in section.tables:
            assert len(numbers["tables"][table.key]["rows"]) == len(table.rows)
            for row in table.text_rows():
                assert all(f">{escape(cell)}</" in page for cell in row)
                assert row[0] in markdown


def test_pictures_follow_the_page(five: Comparison) -> None:
    """Text and lines take their colours from the page, so that one picture serves light and dark."""
    pictures = [picture for section in five.sections for picture in section.pictures]
    assert len(pictures) >= 10
    for picture in pictures:
        assert "currentColor" in picture.svg
        assert "var(--c" in picture.svg
        assert not re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", picture.svg), picture.key
        assert "font-family: inherit" in picture.svg
        assert "DejaVu" not in picture.svg


def test_deterministic_but_for_the_date(five: Comparison, five_runs: list[Run], tmp_path: Path) -> None:
    again = compare(five_runs, tmp_path / "again", date=DATE)
    assert files_of(again) == files_of(five)
    later = compare(five_runs, tmp_path / "later", date=datetime(2026, 5, 6, 7, 8, tzinfo=timezone.utc))
    page = later.files["html"].read_text(encoding="utf-8")
    assert page.replace(later.date, five.date) == files_of(five)[0]


def test_no_folder_of_this_machine(five: Comparison, tmp_path_factory: pytest.TempPathFactory) -> None:
    for text in (path.read_text(encoding="utf-8") for path in five.files.values()):
        assert str(tmp_path_factory.getbasetemp()) not in text


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.9, 0.9, "agree well, .* in the last tenth of the steps .* agree well"),
        (0.9, 0.1, "agree well, .* in the last tenth of the steps .* close to unrelated"),
        (0.15, 0.15, "close to unrelated, .* in the last tenth of the steps .* close to unrelated"),
    ],
)
def test_coherence_is_put_into_words(tmp_path: Path, start: float, end: float, expected: str) -> None:
    folder = write_run(tmp_path / "run", "colm-sketch", num_steps=40, finished=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        value = start if line["step"] <= 36 else end
        line["coreset"]["coherence"] = dict.fromkeys(("sums", "sorting", "words"), value)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = compare([load_run(folder)], tmp_path / "report")
    (picture,) = [each for section in found.sections for each in section.pictures if each.key == "coherence-0"]
    assert re.search(expected, picture.caption)
    # 1/sqrt(n) of 55 examples of this source in every large batch.
    row = next(row for row in found.tables["coherence"].rows if row[1] == "sums")
    assert row[2].mean == pytest.approx(sum([start] * 36 + [end] * 4) / 40)
    assert row[3:] == [pytest.approx(end), pytest.approx(55**-0.5)]


@pytest.mark.usefixtures("without_drawing")
def test_memory_says_what_was_measured(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / device, "plain-64", num_steps=3, config={"machine": {"device": device}}))
        for device in ("cpu", "NVIDIA H200")
    ]
    for run, words in zip(runs, ("resident memory of one process", "memory allocated by PyTorch"), strict=True):
        page = files_of(compare([run], tmp_path / "report"))[0]
        assert words in page


@pytest.mark.usefixtures("without_drawing")
def test_one_run(five_runs: list[Run], tmp_path: Path) -> None:
    found = compare(five_runs[3:4], tmp_path)
    page, _, numbers = files_of(found)
    check_page(page)
    assert found.title == "Report of colm-spsa"
    assert len(numbers["arms"]) == 1


@pytest.mark.slow
def test_ten_runs(tmp_path: Path) -> None:
    runs = []
    for place in range(10):
        arm = list(ARMS)[place % len(ARMS)]
        folder = write_run(tmp_path / str(place), f"arm {place}", arm=arm, num_steps=800, every=80, finished=place != 7)
        runs.append(load_run(folder))
    found = compare(runs, tmp_path / "report")
    page, markdown, numbers = files_of(found)
    check_page(page)
    assert len(numbers["arms"]) == 10
    assert found.title == "Comparison of arm 0, arm 1, arm 2, arm 3, arm 4, arm 5, arm 6, arm 7, arm 8 and arm 9"
    assert "arm 7 (unfinished)" in markdown
    assert len(page) < 2_000_000


@pytest.mark.usefixtures("without_drawing")
def test_five_arms_in_a_picture_unless_more_are_asked_for(tmp_path: Path) -> None:
    """Among them CoLM, drawn thick, and whom it is held against."""
    names = ("plain-64", "plain-128", "keep-random", "a", "b", "c", "colm-spsa")
    arms = [name if name in ARMS else "plain-64" for name in names]
    runs = [
        load_run(write_run(tmp_path / name, name, arm=arm, num_steps=20)) for name, arm in zip(names, arms, strict=True)
    ]
    for most in (None, 9):
        found = compare(runs, tmp_path / "out", **({} if most is None else {"max_arms": most}))
        (picture,) = [p for section in found.sections for p in section.pictures if p.key == "loss-overall-steps"]
        labels = {item.label: item.style for item in picture.legend}
        assert len(labels) == (5 if most is None else 7)
        assert {"colm-spsa", "plain-64", "plain-128", "keep-random"} <= set(labels)
        assert [name for name, style in labels.items() if style.is_thick] == ["colm-spsa"]
        assert len(found.tables["quality"].rows) == 7
        assert any("Pictures show 5 of 7 arms" in caveat for caveat in found.caveats) == (most is None)


def test_captions_say_what_to_see(five: Comparison) -> None:
    for section in five.sections:
        for picture in section.pictures:
            assert picture.caption, picture.key
    captions = {picture.key: picture.caption for section in five.sections for picture in section.pictures}
    losses = {arm.name: arm.curves(Facts.heldout)["overall"].values[-1] for arm in five.arms}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    said = f"lowest {low}, {losses[low]:.4f}; highest {high}, {losses[high]:.4f}."
    assert said in captions["loss-overall-steps"]


def test_tables_are_accessible_and_beside_pictures(five: Comparison) -> None:
    page = five.files["html"].read_text(encoding="utf-8")
    assert page.count("<th ") == page.count('<th scope="col"') + page.count('<th scope="row"')
    for item in (item for section in five.sections for item in section.items):
        for table in item.tables:
            if table is not None:
                assert f'aria-label="{escape(table.title)}"' in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.usefixtures("without_drawing")
def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    sources = {NASTY + " source": 100, "plain": 900}
    runs = [
        load_run(
            write_run(tmp_path / str(place), NASTY + str(place), arm=arm, sources=sources, small=[NASTY + " source"])
        )
        for place, arm in enumerate(("plain-64", "colm-spsa"))
    ]
    page, markdown, _ = files_of(compare(runs, tmp_path / "report"))
    check_page(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x07" not in page
    assert not re.search(r"(?<!\\)<script", re.sub(r"```json.*?```", "", markdown, flags=re.DOTALL))
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert all(not re.search(r"(?<!\\)\*b", row) for row in rows)


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "summary.json"])
def test_missing_files(tmp_path: Path, missing: str) -> None:
    for name in ("plain-64", "colm-spsa"):
        write_run(tmp_path / name, name, num_steps=12)
    (tmp_path / "colm-spsa" / missing).unlink()
    runs = [load_run(tmp_path / name) for name in ("plain-64", "colm-spsa")]
    page, _, _ = files_of(compare(runs, tmp_path / "report"))
    check_page(page)
    assert "colm-spsa" in format_table(runs)


@pytest.mark.usefixtures("without_drawing")
def test_nothing_but_a_name_is_all_dashes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "bare", "colm": {}}')
    run = load_run(tmp_path)
    found = compare([run, run], tmp_path / "report")
    page, markdown, _ = files_of(found)
    check_page(page)
    assert "| bare (unfinished) | – | – | – | 1 | – | – |" in markdown
    assert "–" in format_table([run])


VARIANCES = ("coreset", "random", "× random", "worth")
WRONG = [None, 3, "text", [], {}, [1], {"a": None}, {"overall": "x", "per_source": 3}, float("nan"), True, 10**400]


def write_spoilt_run(folder: Path, spoilt: dict[str, dict[str, object]]) -> Run:
    """A run in which some entries of its files (by file name) are replaced."""
    write_run(folder, "colm-spsa", num_steps=4, every=2)
    for name in ("config.json", "summary.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | spoilt.get(name, {})))
    if "metrics.jsonl" in spoilt:
        lines = (folder / "metrics.jsonl").read_text().split("\n")
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(json.loads(lines[3]) | spoilt["metrics.jsonl"] | {"step": 5}) + "\n")
    return load_run(folder)


def keys_of_a_run(folder: Path) -> dict[str, list[str]]:
    """Keys of each file of a run."""
    write_run(folder, "colm-spsa", num_steps=4, every=2)
    texts = {name: (folder / name).read_text() for name in ("config.json", "summary.json", "metrics.jsonl")}
    return {name: list(json.loads(text.split("\n")[2] if name[0] == "m" else text)) for name, text in texts.items()}


@pytest.mark.parametrize(
    "place", [0, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in range(len(WRONG)) if n not in (0, 5))]
)
def test_every_value_of_a_file_is_of_the_wrong_kind(tmp_path: Path, place: int) -> None:
    """Whatever stands in the place of numbers, lists and objects, the report is written."""
    keys = keys_of_a_run(tmp_path / "keys")
    runs = [write_spoilt_run(tmp_path / name, {name: dict.fromkeys(keys[name], WRONG[place])}) for name in keys]
    check_page(files_of(compare(runs, tmp_path / "report"))[0])
    format_table(runs)


@pytest.mark.slow
def test_one_value_of_the_wrong_kind(tmp_path: Path) -> None:
    keys = [(name, key) for name, found in keys_of_a_run(tmp_path / "keys").items() for key in found]
    runs = [
        write_spoilt_run(tmp_path / f"{place}", {name: {key: WRONG[place % len(WRONG)]}})
        for place, (name, key) in enumerate(keys)
    ]
    for start in range(0, len(runs), 30):
        check_page(files_of(compare(runs[start : start + 30], tmp_path / "report", max_arms=30))[0])


def test_no_runs_and_no_place_to_write(five_runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no runs"):
        compare([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the report"):
        compare(five_runs[:1], tmp_path / "file")


def test_terminal_table(five_runs: list[Run]) -> None:
    head, rule, *rows = format_table(five_runs).split("\n")
    assert head.split("  ")[0] == "arm"
    assert len(rule) == len(head)
    assert len(rows) == 5
    assert all(len(row) <= 130 for row in (head, *rows))
    assert f"{five_runs[0].summary['heldout']['overall']:.4f}" in rows[0]


@pytest.mark.usefixtures("without_drawing")
def test_signals_of_the_selection(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name)) for name in ("plain-64", "colm-spsa")]
    compare(runs, tmp_path / "out", date=DATE)
    tables = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]
    plain, colm = tables["signals"]["rows"]
    assert plain[1:] == [32.0, 1.0, None, None, None, None]
    places = [tables["signals"]["columns"].index(f"gradient variance, {name}") for name in VARIANCES]
    assert colm[1:3] == [40.0, 1.25]
    assert [colm[place] for place in places] == pytest.approx([0.02, 0.04, 0.5, 85.3])
    assert len(tables["source_losses"]["rows"]) == 6
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert "Variance of the coreset" in page
    assert "Kappa: the coreset" in page
    assert "Completion length of the selected" in page


@pytest.mark.usefixtures("without_drawing")
def test_variances_of_version_0_1_0(tmp_path: Path) -> None:
    """They have no kappa and no worth: neither a column nor a picture is made of nothing."""
    folder = write_run(tmp_path / "colm-spsa", "colm-spsa")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(', "kappa": 0.5, "worth": 85.3', ""))
    compare([load_run(folder)], tmp_path / "out", date=DATE)
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]["signals"]["rows"]
    assert row[1:] == pytest.approx([40.0, 1.25, 0.02, 0.04, 0.5])
    summary = json.loads((folder / "summary.json").read_text())
    assert "gradient_variance" not in summary  # it is from the steps
    assert "Kappa: the coreset" not in (tmp_path / "out" / "report.html").read_text()
