"""Examples of ranks become one large batch; what cannot be read is said on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from colm_ds.batching.gather import read_examples
from colm_ds.errors import DataError


def record(**changes: Any) -> dict[str, Any]:
    return {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], **changes}


def test_an_index_may_be_missing() -> None:
    examples = read_examples([record(), record(index=None), record(index=7)], ["all"], None)
    assert [example.index for example in examples] == [-1, -1, 7]


@pytest.mark.parametrize("changes", [{"index": "q17"}, {"input_ids": "text"}, {"attention_mask": [1]}, {"labels": [1]}])
def test_what_cannot_be_read_is_an_error_of_the_data(changes: dict[str, Any]) -> None:
    """Other errors would leave the other ranks waiting."""
    with pytest.raises(DataError, match="example 1: "):
        read_examples([record(), record(**changes)], ["all"], None)
