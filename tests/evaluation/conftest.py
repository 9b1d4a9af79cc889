"""What the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.evaluations import write_data
from tests.evaluation.stubs import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE tokenizer of 512 tokens, without bos."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with five small sets."""
    return write_data(tmp_path_factory.mktemp("data"))
