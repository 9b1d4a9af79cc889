"""What tests of the report share."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pictures' figures without drawing them, for tests of words and numbers: twenty a report, 0.1 s each."""

    def empty(figure: Figure, key: str, description: str) -> str:
        return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{key}" viewBox="0 0 1 1"></svg>'

    monkeypatch.setattr("colm_ds.report.charts.to_svg", empty)
