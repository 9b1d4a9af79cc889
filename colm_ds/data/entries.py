"""Entries of a recipe's data: where rows are, and how they are read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from colm_ds.config.section import Section
from colm_ds.data.formats import HUB, PathLike

with warnings.catch_warnings():
    # pydantic warns of every field that has the name of one of its own, long deprecated methods
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class RowReading(Section):
        """Keys that say how rows are read."""

        schema: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = Field(  # type: ignore[assignment]
            "auto", description="keys of the rows; auto: recognised from them"
        )
        prompt: str = Field(
            "auto",
            description="alpaca, chat (by the chat template), plain, or a template with the rows' keys in braces; "
            "auto: by the schema",
        )


class DataEntry(RowReading):
    """One file, folder or hub name of a recipe, and how its rows are read; what is left out is as in `data`."""

    path: str = Field(description="file, folder or hub:NAME:CONFIG:SPLIT")
    name: str | None = Field(None, min_length=1, description="source of rows without one; default: the file's name")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of large batches on average, relative to the other entries'; all or none have one",
    )
    split: str = Field("train", description="split of a saved data set or hub name that says none")
    source_key: str | None = Field("source", description="key that names a row's source; null: the entry's name")


def _form(value: Any) -> str:
    """Return the tag of the form that a place is written in; brackets keep it out of messages."""
    if isinstance(value, (dict, DataEntry)):
        return "entry[]"
    return "list[]" if isinstance(value, list) else "str"


_Path = Annotated[str, Tag("str")]
_Entry = Annotated[DataEntry, Tag("entry[]")]
_List = Annotated[list[Annotated[_Path | _Entry, Discriminator(_form)]], Tag("list[]")]

Places = Annotated[_Path | _Entry | _List, Discriminator(_form)]
"""A key of a recipe that names data: a place, an entry, or a list of these."""

Data = PathLike | DataEntry | Sequence[PathLike | DataEntry]


def as_entries(
    data: Data, schema: str = "auto", prompt: str = "auto", source_key: str | None = "source"
) -> list[DataEntry]:
    """Return data as entries; a place that is only named is read as the other arguments say."""
    given: Sequence[PathLike | DataEntry] = [data] if isinstance(data, (str, Path, DataEntry)) else list(data)
    keys: dict[str, Any] = {"schema": schema, "prompt": prompt, "source_key": source_key}
    return [one if isinstance(one, DataEntry) else DataEntry(path=str(one), **keys) for one in given]


def stem(place: PathLike) -> str:
    """Return the name of a file without its suffixes, or of a data set on the hub without its owner."""
    if str(place).startswith(HUB):
        return str(place).removeprefix(HUB).split(":")[0].rsplit("/", 1)[-1]
    return Path(place).name.split(".")[0] or Path(place).name
