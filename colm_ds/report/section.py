"""The parts that a report is made of, whatever it is written as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from colm_ds.report.charts import Picture
from colm_ds.report.tables import Table


@dataclass(frozen=True)
class Listing:
    """Preformatted text that is shown on request."""

    title: str
    text: str


@dataclass(frozen=True)
class ReportSection:
    """One chapter of a report.

    Attributes:
        key: its name in links and in `report.json`.
        title: heading.
        text: paragraphs.
        pictures: what is seen; the same numbers are in `tables`.
        tables: the numbers.
        listings: long texts, folded.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    listings: Sequence[Listing] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to show but its text."""
        return not (self.pictures or self.tables or self.listings)
