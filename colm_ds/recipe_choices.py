"""Sections of recipes for classification tasks and for sources by clustering."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from colm_ds.config import Section
from colm_ds.errors import Problems


class ChoiceDataConfig(Section):
    """Which classification task is trained, and where its examples are."""

    task: Literal["sst2", "cb", "multirc", "wic", "copa", "rte", "boolq"] = Field(
        description="sst2, cb, multirc, wic, copa, rte, boolq: says how a record becomes a question with candidates"
    )
    folder: str | None = Field(None, description="holds TASK/train.jsonl and TASK/validation.jsonl (.json, .gz, .zst)")
    train: str | list[str] | None = Field(None, description="instead: file, folder or hub:NAME:CONFIG:SPLIT, or a list")
    heldout: str | list[str] | None = Field(None, description="instead: what loss and accuracy are measured on")
    max_length: int = Field(512, ge=2, description="tokens of an example at most; longer prompts are cut on the left")
    limit: int | None = Field(3000, ge=1, description="use at most this many examples, drawn at random (the paper's)")
    heldout_limit: int | None = Field(None, ge=1, description="measure on at most this many, drawn at random")
    cache_dir: str | None = Field("~/.cache/colm_ds/tokens", description="where tokens are kept; null: nowhere")

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        if (self.folder is None) == (self.train is None):
            problems.add("data.folder", self.folder, "give either data.folder or data.train", "One says where data is.")
        if self.folder is not None and self.heldout is not None:
            problems.add("data.heldout", self.heldout, "data.folder holds the validation set", "Name data.train too.")
