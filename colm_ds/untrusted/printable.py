"""Make text that others wrote safe to show: nothing in it moves the cursor, hides or turns what is beside it."""

from __future__ import annotations

import json
import re
from typing import Any

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters of both sets, but tab and line end
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff"  # invisible, turning round
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"  # annotations, no characters, half a pair
    "\U000e0000-\U000e0fff"  # tags
    "]"
)
"""Characters that a terminal, a browser or an editor obeys instead of showing them."""


def visible(text: Any) -> str:
    """Return text in which each unsafe character is replaced by U+FFFD; tabs and line ends stay."""
    return _UNSAFE.sub("\ufffd", str(text))


def escaped(text: str) -> str:
    """Return JSON text in which each unsafe character is written as its `\\u` escape: the same value, safe to show."""
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)
