"""The wheel carries what the commands need: it runs where the repository is not seen."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, which is built from a copy of the package alone."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("colm_ds", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "out").glob("colm_ds-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def call(unpacked: Path, cwd: Path, *words: str) -> str:
    """Run `colm-ds` from the wheel; nothing of the repository is on the path."""
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]; sys.path.insert(0, sys.argv[2]); "
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
        "import colm_ds, colm_ds.cli as cli; assert colm_ds.__file__.startswith(sys.argv[2]), colm_ds.__file__; "
        "sys.exit(cli.main(sys.argv[3:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(unpacked), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(unpacked), *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_wheel_knows_its_files(unpacked: Path, tmp_path: Path) -> None:
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    wanted = {"sweep/demo.yaml", "report/template.html", "planner/known_models.json", "py.typed"}
    assert {f"colm_ds/{name}" for name in wanted} <= files
    assert not any(name.startswith(("tests/", "finetune/", "benchmarks/")) for name in files)
    assert "colm-ds demo" in call(unpacked, tmp_path, "demo", "--help")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_runs_from_a_wheel(unpacked: Path, tmp_path: Path) -> None:
    shown = call(unpacked, tmp_path, "demo", "steps=2", "evaluation.every=0", "--num-gpus", "1")
    assert "all its steps, s" in shown
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
