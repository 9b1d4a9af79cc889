"""Scan all documents for parts, sources, bad lines, and a sample for the tokenizer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from colm_ds.data.pretraining.part_pool import map_parts
from colm_ds.data.pretraining.pile import BadLine, Part, documents, read_parts
from colm_ds.errors import DataError

NUM_SHOWN = 10
"""Bad lines that are listed one by one."""

_SAMPLE_CHARACTERS = 100_000
"""Maximum characters of one document in the sample."""

Sampled = tuple[float, str, int]


class Sample:
    """The documents with the lowest places, up to a number of bytes: independent of their order."""

    def __init__(self, num_bytes: float) -> None:
        self._wanted = num_bytes
        self._bytes = 0
        self._heap: list[tuple[float, str, int]] = []
        self._places: set[float] = set()

    @property
    def limit(self) -> float:
        """Place from which on documents are no longer sampled."""
        return -self._heap[0][0] if self._bytes >= self._wanted and self._heap else 1.0

    def offer(self, place: float, text: str, num_bytes: int) -> None:
        """Add a document unless it is beyond the limit or already in the sample."""
        if place > self.limit or place in self._places:
            return
        heapq.heappush(self._heap, (-place, text, num_bytes))
        self._places.add(place)
        self._bytes += num_bytes
        while self._heap and self._bytes - self._heap[0][2] >= self._wanted:
            removed = heapq.heappop(self._heap)
            self._bytes -= removed[2]
            self._places.remove(-removed[0])

    def texts(self) -> list[str]:
        """Return the texts in order of place."""
        return [text for _, text, _ in sorted(self._heap, key=lambda item: -item[0])]


@dataclass
class Scan:
    """Contents of the files.

    Attributes:
        parts: file, number, digest and decompressed bytes of every part, in order.
        sources: documents, held-out documents and text bytes by source.
        num_lines: lines that are not blank.
        num_bad: those without a valid document.
        bad: messages of the first bad lines.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    num_lines: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ScanSettings:
    """Settings of a scan.

    Attributes:
        seed: seed of the documents' places.
        holdout: places below it are held out.
        keys: sample of each source; None samples all sources together; empty takes no sample.
    """

    seed: int
    holdout: float
    keys: Mapping[str, str] | None


def scan_part(settings: ScanSettings, item: tuple[Part, Mapping[str, float]]) -> dict[str, Any]:
    """Scan one part.

    Args:
        settings: settings of the scan.
        item: the part, and the limits of the samples so far; documents beyond are not returned.
    """
    part, limits = item
    sources: dict[str, dict[str, int]] = {}
    sampled: list[tuple[str, float, str, int]] = []
    bad: list[str] = []
    num_lines = 0
    for document in documents(part, settings.seed):
        num_lines += 1
        if isinstance(document, BadLine):
            bad.append(document.message)
            continue
        counts = sources.setdefault(document.source, {"documents": 0, "heldout_documents": 0, "text_bytes": 0})
        counts["documents"] += 1
        counts["text_bytes"] += document.num_bytes
        if document.place < settings.holdout:
            counts["heldout_documents"] += 1
            continue
        key = "" if settings.keys is None else settings.keys.get(document.source)
        if key is not None and document.place <= limits[key]:
            text = document.text[:_SAMPLE_CHARACTERS]
            sampled.append((key, document.place, text, len(text.encode())))
    facts = {"file": part.file, "number": part.number, "digest": part.digest()}
    return {
        "part": {**facts, "bytes": sum(map(len, part.lines)) + len(part.lines)},
        "sources": sources,
        "num_lines": num_lines,
        "num_bad": len(bad),
        "bad": bad[:NUM_SHOWN],
        "sampled": sampled,
    }


def scan(
    files: Sequence[Path],
    settings: ScanSettings,
    budgets: Mapping[str, float],
    num_processes: int,
    part_bytes: int,
    on_read: Callable[[int, int], object],
) -> tuple[Scan, list[str]]:
    """Scan all files.

    Args:
        files: files to read.
        settings: settings of the scan.
        budgets: bytes to sample by key.
        num_processes: number of processes.
        part_bytes: see `read_parts`.
        on_read: called with a file's index and the bytes of it read so far.

    Returns:
        The contents, and the sampled texts.
    """
    samples = {key: Sample(budget) for key, budget in budgets.items()}
    results = []
    items = (
        (part, {key: sample.limit for key, sample in samples.items()}) for part in all_parts(files, part_bytes, on_read)
    )
    for result in map_parts(partial(scan_part, settings), items, num_processes):
        for key, place, text, num_bytes in result.pop("sampled"):
            samples[key].offer(place, text, num_bytes)
        results.append(result)
    results.sort(key=lambda result: (result["part"]["file"], result["part"]["number"]))
    contents = Scan()
    for result in results:
        contents.parts.append(result["part"])
        contents.num_lines += result["num_lines"]
        contents.num_bad += result["num_bad"]
        contents.bad = (contents.bad + result["bad"])[:NUM_SHOWN]
        for source, counts in result["sources"].items():
            total = contents.sources.setdefault(source, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                total[name] += count
    contents.sources = dict(sorted(contents.sources.items()))
    return contents, [text for key in sorted(samples) for text in samples[key].texts()]


def all_parts(
    files: Sequence[Path], part_bytes: int, on_read: Callable[[int, int], object], only: frozenset[int] | None = None
) -> Iterator[Part]:
    """Yield the parts of files one after another; `only` names the files to read."""
    for number, path in enumerate(files):
        if only is None or number in only:
            yield from read_parts(number, path, part_bytes, partial(on_read, number))


def check_sources(contents: Scan, wanted: Sequence[str] | None, skip_others: bool) -> None:
    """Compare the sources of a mixture with those in the files.

    Raises:
        DataError: listing the sources in the files.
    """
    listed = "\n  ".join(
        f"{name}: {counts['documents']:,} documents, {counts['text_bytes'] / 1e6:,.1f} MB"
        for name, counts in contents.sources.items()
    )
    if not contents.sources:
        raise DataError("the files hold no documents.")
    if wanted is None:
        return
    missing = [name for name in wanted if name not in contents.sources]
    unknown = [name for name in contents.sources if name not in wanted]
    if missing:
        raise DataError(f"sources of data.weights that are not in the files: {missing}. Found:\n  {listed}")
    if unknown and not skip_others:
        raise DataError(
            f"sources that data.weights does not name: {unknown}. Found:\n  {listed}\n"
            "Give each a weight, or set prepare.skip_other_sources=true to leave their documents out."
        )


def check_bad_lines(contents: Scan, most: float) -> None:
    """Raise a DataError if more than a share of the lines is bad."""
    if contents.num_bad > most * contents.num_lines:
        share = f"{contents.num_bad / contents.num_lines:.3%}, prepare.max_bad_fraction = {most}"
        shown = "\n  ".join(contents.bad)
        raise DataError(
            f"{contents.num_bad:,} of {contents.num_lines:,} lines are bad ({share}).\n  {shown}\n"
            "Repair them, or allow more."
        )


def check_heldout(contents: Scan, sources: Sequence[str], holdout: float) -> None:
    """Raise a DataError for sources of which nothing, or everything, is held out."""
    for name in sources:
        counts = contents.sources[name]
        if counts["heldout_documents"] == counts["documents"]:
            raise DataError(f"{name}: all of its {counts['documents']} documents are held out. Lower prepare.holdout.")
        if holdout > 0 and not counts["heldout_documents"]:
            raise DataError(
                f"{name}: none of its {counts['documents']} documents is held out with prepare.holdout = {holdout}. "
                f"Choose more, for example {min(0.5, max(2 * holdout, 3 / counts['documents'])):.2g}."
            )
