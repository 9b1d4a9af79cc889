"""The tokenizer that the tests of evaluation share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.stubs import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE tokenizer of 512 tokens, without bos."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
