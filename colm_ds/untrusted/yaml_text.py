"""Parse YAML that others wrote; whatever is wrong with it is a `ValueError`, and a small text stays a small value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from colm_ds.untrusted.json_text import MAX_DEPTH

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 100_000
"""Values, keys included, with every alias counted as all that it stands for."""


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, which may have aliases but not run code.

    Raises:
        ValueError: if it is not YAML, nested more than `MAX_DEPTH` levels deep, or stands for more than `MAX_NODES`
            values; in one line, with the line's number where it is known.
    """
    try:
        return yaml.load(text, _BoundedLoader)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # PyYAML's own reading of dates, numbers and tags: month 13, an integer of 5,000 digits, `!!int ""`
        raise ValueError(f"a value that cannot be read ({type(error).__name__}: {error})") from None


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `parse_yaml`, or if the file has more than `MAX_FILE_BYTES`.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES >> 20} MiB")
    return parse_yaml(content.decode("utf-8"))


class _BoundedLoader(yaml.SafeLoader):
    """Safe loader that counts."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_nodes = 0
        self._sizes: dict[str, int] = {}  # by anchor: the nodes that an alias of it stands for

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            first: dict[Any, int] = {}
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in first:
                    problem = f"the key {key.value!r} is there twice, first in line {first[key.value]}"
                    raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
                first[key.value] = line
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark, anchor = event.start_mark, event.anchor
        if self.check_event(yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise yaml.MarkedYAMLError(None, None, f"{anchor!r} is inside itself", mark)
            self._count(self._sizes.get(anchor, 0), mark)
            return super().compose_node(parent, index)
        before = self._num_nodes
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._sizes[anchor] = self._num_nodes - before
        return node

    def _count(self, nodes: int, mark: Any) -> None:
        self._num_nodes += nodes
        if self._num_nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(None, None, f"stands for more than {MAX_NODES:,} values", mark)


def _one_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
