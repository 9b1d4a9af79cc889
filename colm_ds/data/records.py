"""Take texts and labels out of records; errors name the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colm_ds.data.schemas import HALF_PAIR, is_unicode
from colm_ds.errors import DataError


def text_of(where: str, record: Mapping[str, Any], *keys: str) -> str:
    """Return the text under the first of some keys that a record has.

    Raises:
        DataError: if it has none of them, or the value is neither Unicode text nor a number.
    """
    for key in keys:
        if record.get(key) is not None:
            value = record[key]
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                if not is_unicode(str(value)):
                    raise DataError(f"{where}: {key!r} {HALF_PAIR}")
                return str(value)
            raise DataError(f"{where}: {key!r} is of type {type(value).__name__}, not text. Write a string.")
    wanted = " or ".join(map(repr, keys))
    raise DataError(f"{where}: no key {wanted}. Add it; the record has {', '.join(map(repr, record)) or 'no keys'}.")


def label_of(where: str, record: Mapping[str, Any], labels: Mapping[Any, int], key: str = "label") -> int:
    """Return the index of the gold candidate, from a label that may be a number, true or false, or a word.

    As in CSV, where everything is text, numbers may be written as text, and so may true and false.

    Raises:
        DataError: if it is missing or unknown.
    """
    value = record.get(key)
    if isinstance(value, str) and value not in labels:
        as_text = {str(label).lower(): label for label in labels if isinstance(label, int)}
        as_text |= {str(int(label)): label for label in labels if isinstance(label, bool)}
        value = as_text.get(value.strip().lower(), value)
    if not isinstance(value, (str, int)) or value not in labels:
        known = ", ".join(sorted({repr(label) for label in labels}))
        raise DataError(f"{where}: {key!r} is {value!r}. Write one of {known}.")
    return labels[value]
