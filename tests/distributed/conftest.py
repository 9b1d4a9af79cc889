"""Three ranks for the tests of the exchange: an odd number, so that nothing comes out even by chance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    """A pool of three ranks."""
    with Ranks(3) as ranks:
        yield ranks
