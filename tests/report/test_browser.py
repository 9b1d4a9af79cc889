"""The page in a real browser: nothing wider than the window, no complaints on the console."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from colm_ds.report import compare, load_run
from tests.report.run_folders import ARMS, PROTOCOL_ARMS, SIZED_ARMS, measured_runs, write_run

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
)
WIDTHS = (1280, 800, 390)

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium")

# A page that shows the report in frames of several widths and writes down what it measures in them.
OUTER = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>
addEventListener("load", () => {{
  document.body.dataset.measured = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, root = page.documentElement;
    const wide = (svg) => svg.getBoundingClientRect().width > 100;
    const pictures = [...page.querySelectorAll("figure > svg")].filter(wide);
    return [root.clientWidth, root.scrollWidth, pictures.length].join(" ");
  }}).join(";");
}});
</script>"""


def browse(folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the browser once on a page, with a profile of its own."""
    profile = folder / "profile"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )
    shutil.rmtree(profile, ignore_errors=True)
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    runs = [load_run(write_run(folder / name, name)) for name in ARMS]
    runs += [load_run(path) for path in measured_runs(folder / "protocols", PROTOCOL_ARMS)]
    sized = [load_run(path) for path in measured_runs(folder / "sized", SIZED_ARMS)]
    return compare(runs, folder / "report", sized=sized).files["html"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_desktop_and_phone(page: Path, tmp_path: Path, scheme: str) -> None:
    source = escape(page.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{source}"></iframe>' for width in WIDTHS
    )
    outer = tmp_path / "outer.html"
    outer.write_text(OUTER.format(frames=frames), encoding="utf-8")
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = browse(tmp_path, outer, setting, "--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000")
    assert "CONSOLE" not in done.stderr
    measured = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert measured is not None, done.stderr[-2000:]
    for width, found in zip(WIDTHS, measured[1].split(";"), strict=True):
        client, scroll, pictures = (int(value) for value in found.split())
        assert client <= width
        assert scroll <= client, f"{scroll} px of content at {width} px"
        assert pictures >= 16


def test_opens_from_disk_without_complaints(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    done = browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1280,2000")
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 20_000
