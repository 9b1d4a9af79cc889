"""Shell scripts in launch/: they parse, say what they do, and the set-up works, is quick and fails clearly."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))

# Stands for python3 in the set-up tests: records how it is called; `-m venv` puts a copy of it into the environment.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    --version) echo "Python $FAKE_VERSION" ;;
    *version_info\\ *) [[ "$FAKE_VERSION" != 3.8* ]] ;;
    *version_info*) echo 3.11 ;;
    *"import ensurepip"*) [[ -z "${FAKE_NO_ENSUREPIP-}" ]] ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && echo "$*" >> "$FAKE_LOG" ;;
    "-m pip --version") ;;
    *) echo "$*" >> "$FAKE_LOG"; [[ -z "${FAKE_FAILS_AT-}" || "$*" != *"$FAKE_FAILS_AT"* ]] ;;
esac
"""


def script_id(path: Path) -> str:
    """Test name of a script."""
    return str(path.relative_to(LAUNCH))


def test_there_are_scripts() -> None:
    assert {"setup.sh", "test.sh"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=script_id)
def test_script_parses(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=script_id)
def test_script_starts_with_bash_and_says_what_it_does(script: Path) -> None:
    first, second = script.read_text(encoding="utf-8").splitlines()[:2]
    assert first in {"#!/usr/bin/env bash", "#!/bin/bash"}
    assert second.startswith("# "), "the second line is a comment that says what the script does"
    assert len(second.split()) >= 5, "the comment is a sentence"


class FakeRepository:
    """A copy of the set-up script in a folder of its own, with a fake python3."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "calls.log"
        (root / "launch").mkdir(parents=True)
        (root / "interpreters").mkdir()
        shutil.copy(LAUNCH / "setup.sh", root / "launch")
        (root / "pyproject.toml").write_text("[project]\n")
        self.python = root / "interpreters" / "python3"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def set_up(self, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the set-up and return what it gave."""
        settings = {"FAKE_VERSION": "3.11.7", "FAKE_LOG": str(self.log), "PYTHON": str(self.python), **environment}
        command = ["bash", str(self.root / "launch" / "setup.sh")]
        return subprocess.run(command, cwd=cwd, env=os.environ | settings, capture_output=True, text=True)

    def calls(self) -> list[str]:
        """Calls of the interpreters since the last question."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def fake_repository(tmp_path: Path) -> FakeRepository:
    return FakeRepository(tmp_path / "a repository")


def test_set_up_installs_torch_first_and_keeps_its_pin(fake_repository: FakeRepository, tmp_path: Path) -> None:
    result = fake_repository.set_up(cwd=tmp_path)  # not the repository's folder
    assert result.returncode == 0, result.stderr
    venv, torch, package, imports, of_deepspeed = fake_repository.calls()
    assert venv.startswith("-m venv")
    assert torch.endswith("torch==2.13.0")
    assert "--constraint" in package
    assert package.endswith("--editable .[test]")
    assert "logging.disable(logging.WARNING); import torch" in imports
    assert "muon_optimizer" in of_deepspeed


def test_second_set_up_does_nothing(fake_repository: FakeRepository) -> None:
    fake_repository.set_up()
    fake_repository.calls()
    result = fake_repository.set_up()
    assert result.stdout == "setup: .venv is up to date\n"
    assert fake_repository.calls() == []


def test_changed_pyproject_installs_again_in_the_same_environment(fake_repository: FakeRepository) -> None:
    fake_repository.set_up()
    fake_repository.calls()
    (fake_repository.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert fake_repository.set_up().returncode == 0
    calls = fake_repository.calls()
    assert any("--editable" in call for call in calls)
    assert not any("venv" in call.split()[:2] for call in calls)


@pytest.mark.parametrize("at", ["torch==2.13.0", "--editable", "import torch"])
def test_interrupted_set_up_goes_on_the_next_time(fake_repository: FakeRepository, at: str) -> None:
    result = fake_repository.set_up(FAKE_FAILS_AT=at)
    assert result.returncode != 0
    assert "setup: " in result.stderr
    fake_repository.calls()
    assert fake_repository.set_up().returncode == 0
    assert any("--editable" in call for call in fake_repository.calls())


def test_moved_repository_gets_a_new_environment(fake_repository: FakeRepository, tmp_path: Path) -> None:
    fake_repository.set_up()
    fake_repository.calls()
    shutil.copytree(fake_repository.root / ".venv", tmp_path / "copy")
    moved = FakeRepository(tmp_path / "moved")
    shutil.move(tmp_path / "copy", moved.root / ".venv")
    assert moved.set_up().returncode == 0
    assert moved.calls()[0].startswith("-m venv --clear")


def test_another_clones_environment_behind_a_link_stays(fake_repository: FakeRepository, tmp_path: Path) -> None:
    fake_repository.set_up()
    other = FakeRepository(tmp_path / "other")
    (other.root / ".venv").symlink_to(fake_repository.root / ".venv")
    before = sorted(path.name for path in (fake_repository.root / ".venv").rglob("*"))
    fake_repository.calls()
    result = other.set_up()
    assert result.returncode == 1
    assert f".venv is a link to {fake_repository.root / '.venv'}" in result.stderr
    assert not any("--clear" in call or "--editable" in call for call in other.calls())
    assert sorted(path.name for path in (fake_repository.root / ".venv").rglob("*")) == before


def test_old_python_is_refused(fake_repository: FakeRepository) -> None:
    result = fake_repository.set_up(FAKE_VERSION="3.8.10")
    assert result.returncode == 1
    assert "Python 3.8.10, but colm_ds needs 3.11 or newer" in result.stderr
    assert not (fake_repository.root / ".venv").exists()


def test_missing_ensurepip_names_the_debian_package(fake_repository: FakeRepository) -> None:
    result = fake_repository.set_up(FAKE_NO_ENSUREPIP="1")
    assert result.returncode == 1
    assert "apt-get install python3.11-venv" in result.stderr


def test_missing_python_is_named(fake_repository: FakeRepository) -> None:
    result = fake_repository.set_up(PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no-such-python is not installed" in result.stderr


@pytest.mark.skipif(not importlib.metadata.entry_points(name="colm-ds"), reason="not installed")
def test_a_script_beside_a_clone_imports_the_package(tmp_path: Path) -> None:
    """Without an `__init__.py`, a clone named colm_ds is a namespace package for what lies beside it."""
    (tmp_path / "colm_ds").mkdir()
    script = tmp_path / "mine.py"
    script.write_text("import colm_ds\nprint(colm_ds.__all__)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CoresetSelector" in done.stdout
