"""Processes that run the integrations' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    """Pools of one and of two ranks; their processes start when they are first needed."""
    with Ranks(1) as one, Ranks(2) as two:
        yield {1: one, 2: two}
