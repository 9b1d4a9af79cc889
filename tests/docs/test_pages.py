"""The documentation: pages written from the code are current, and every relative link of the README leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from colm_ds.config.colm import CoLMSection
from tests.docs import configuration

ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_page_is_what_the_code_says() -> None:
    written = configuration.PAGE.read_text(encoding="utf-8")
    assert written == configuration.page(), "write it anew: python -m tests.docs.configuration"
    for key in ("large_batch_size", "probe.estimator", "optimizer.lr", "lora.rank", "data.store", "launch.parallel"):
        assert f"| `{key}` |" in written, key


def test_the_configuration_page_has_the_defaults_of_tokens() -> None:
    written = configuration.PAGE.read_text(encoding="utf-8")
    for estimator in ("tokens", "spsa"):
        given = {"large_batch_size": 2, "coreset_size": 1, "probe": {"estimator": estimator}}
        section = CoLMSection.model_validate(given).model_dump()
        for key in ("selector", "geometry", "metric", "weights", "per_source", "small_sources"):
            (row,) = re.findall(rf"^\| `{key}` \|.*", written, re.MULTILINE)
            by_default, _, with_tokens = row.split(" | ")[2].partition("; with `probe.estimator: tokens` ")
            said = with_tokens if estimator == "tokens" and with_tokens else by_default
            assert said == f"`{str(section[key]).lower()}`", row


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "pretrain/README.md"])
def test_links_outside_the_site_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links or page == "CHANGELOG.md"
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_pages_named_in_code_and_recipes_exist() -> None:
    missing = []
    for room in ("colm_ds", "finetune", "pretrain", "launch", "benchmarks", "tests", "docs", "README.md", "mkdocs.yml"):
        paths = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".sh", ".yaml", ".md")]
        for path in paths if (ROOT / room).is_dir() else [ROOT / room]:
            named = re.findall(r"\bdocs/[\w/]+\.md\b|\bDESIGN\b", path.read_text(encoding="utf-8"))
            missing += [f"{path}: {page}" for page in named if not (ROOT / page).exists()]
    assert not missing, "\n".join(missing)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for folder in (docs, docs / "selectors") for path in folder.glob("*.md")}
    assert pages == set(re.findall(r"[\w/]+\.md", navigation))


def test_the_readme_is_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
