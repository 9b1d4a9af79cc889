"""What PyTorch's allocator held at its peak, by the lines that allocated it, read from a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colm_ds.memory.meter import GIB

_FRAMES = 3
_LINES = 30
_LIBRARY = "site-packages/torch/"


@dataclass(frozen=True)
class LiveBlocks:
    """Blocks that one line allocated.

    Attributes:
        size: bytes of all of them.
        count: number of blocks.
        where: the line, and what called it: `file:line function`, innermost first.
    """

    size: int
    count: int
    where: tuple[str, ...]


def blocks_at_peak(snapshot: Mapping[str, Any], device: int = 0) -> tuple[int, list[LiveBlocks]]:
    """Return the most bytes that were allocated while the history was recorded, and the blocks of that moment.

    Args:
        snapshot: of `torch.cuda.memory._snapshot`.
        device: index of the GPU.

    Returns:
        Bytes, and blocks by falling size. What was allocated before the history begins is one entry without a line.
    """
    history = snapshot["device_traces"][device]
    net = peak = 0
    at = -1  # the last event before the peak is over
    for place, event in enumerate(history):
        net += _change(event)
        if net > peak:
            peak, at = net, place
    live: dict[int, Mapping[str, Any]] = {}
    freed = 0  # of blocks from before
    for event in history[: at + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed" and live.pop(event["addr"], None) is None:
            freed += event["size"]
    before = _allocated_at_end(snapshot, device) - net
    sizes: Counter[tuple[str, ...]] = Counter()
    counts: Counter[tuple[str, ...]] = Counter()
    for event in live.values():
        where = _where(event.get("frames", ()))
        sizes[where] += event["size"]
        counts[where] += 1
    blocks = [LiveBlocks(size, counts[where], where) for where, size in sizes.most_common()]
    if before - freed > 0:
        blocks.append(LiveBlocks(before - freed, 0, ()))
    return before + peak, sorted(blocks, key=lambda each: -each.size)


def describe(peak: int, blocks: Sequence[LiveBlocks], most: int = _LINES) -> str:
    """Return a text of the largest blocks at the peak.

    Args:
        peak: bytes allocated at that moment.
        blocks: what `blocks_at_peak` returns.
        most: lines that are shown.
    """
    lines = [f"{peak / GIB:.3f} GiB allocated at the peak. In MiB, with the lines that allocated it, innermost first:"]
    for each in blocks[:most]:
        where = "\n          ".join(each.where) or "allocated before the history began"
        number = f"{each.count} blocks: " if each.count > 1 else ""
        lines.append(f"{each.size / 2**20:9.1f} {number}{where}")
    if rest := sum(each.size for each in blocks[most:]):
        lines.append(f"{rest / 2**20:9.1f} elsewhere")
    return "\n".join(lines) + "\n"


def _change(event: Mapping[str, Any]) -> int:
    """Return by how many bytes an event changes what is allocated."""
    return {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)


def _allocated_at_end(snapshot: Mapping[str, Any], device: int) -> int:
    """Return the bytes that a device's blocks hold when the snapshot is taken."""
    own = [segment for segment in snapshot["segments"] if segment.get("device", device) == device]
    return sum(segment["active_size"] for segment in own)


def _where(frames: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the innermost frames of Python outside of torch; torch's own if there are no others."""
    known = [frame for frame in frames if frame["filename"].endswith(".py")]
    outside = [frame for frame in known if _LIBRARY not in frame["filename"]]
    shown = (outside or known)[:_FRAMES]
    return tuple(f"{'/'.join(frame['filename'].split('/')[-3:])}:{frame['line']} {frame['name']}" for frame in shown)
