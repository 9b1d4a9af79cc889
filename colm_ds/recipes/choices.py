"""Sections of recipes for classification tasks and for sources by clustering."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from colm_ds.config.colm import CoLMSection
from colm_ds.config.section import Section
from colm_ds.errors import Problems


class ChoiceDataConfig(Section):
    """Classification task to train on, and the place of its examples."""

    task: Literal["sst2", "cb", "multirc", "wic", "copa", "rte", "boolq"] = Field(
        description="sst2, cb, multirc, wic, copa, rte, boolq: says how a record becomes a question with candidates"
    )
    folder: str | None = Field(None, description="holds TASK/train.jsonl and TASK/validation.jsonl (.json, .gz, .zst)")
    train: str | list[str] | None = Field(None, description="instead: file, folder or hub:NAME:CONFIG:SPLIT, or a list")
    heldout: str | list[str] | None = Field(None, description="instead: what loss and accuracy are measured on")
    max_length: int = Field(512, ge=2, description="maximum tokens of an example; longer prompts are cut on the left")
    limit: int | None = Field(3000, ge=1, description="use at most this many examples, drawn at random (the paper's)")
    heldout_limit: int | None = Field(None, ge=1, description="measure on at most this many, drawn at random")
    cache_dir: str | None = Field("~/.cache/colm_ds/tokens", description="where tokens are kept; null: nowhere")

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        if (self.folder is None) == (self.train is None):
            problems.add("data.folder", self.folder, "give either data.folder or data.train", "Exactly one is needed.")
        if self.folder is not None and self.heldout is not None:
            problems.add("data.heldout", self.heldout, "data.folder holds the validation set", "Name data.train too.")


class ClusterConfig(Section):
    """Sources by clustering the model's hidden states, for data that has none."""

    num: int | tuple[int, int] = Field(5, description="clusters, or [least, most]: the number with the best silhouette")
    warmup_steps: int = Field(20, ge=0, description="plain steps on b examples before the first clustering")
    refreshes: int = Field(4, ge=0, description="how often the clusters are recomputed, evenly over the other steps")
    refresh_steps: list[int] | None = Field(None, description="instead: the steps after which they are recomputed")
    features_from: str = Field(
        "model",
        description="model: the one in training; or the folder of a run, adapter or model: a proxy fine-tuned before, "
        "whose clusters are made once, before the first step",
    )
    max_tokens: int | Literal["auto"] = Field(
        "auto", description="maximum padded tokens of a batch of the pass for features; auto: 16384, on a CPU 2048"
    )

    @property
    def uses_proxy(self) -> bool:
        """Return whether a model other than the one in training gives the features."""
        return self.features_from != "model"

    def steps(self, steps: int) -> list[int]:
        """Return after how many steps of a run of `steps` the clusters are made, ascending."""
        if self.uses_proxy:
            return [0]
        rest = steps - self.warmup_steps
        evenly = [self.warmup_steps + (number + 1) * rest // (self.refreshes + 1) for number in range(self.refreshes)]
        later = evenly if self.refresh_steps is None else self.refresh_steps
        return sorted({self.warmup_steps, *later})

    def check(self, steps: int, colm: CoLMSection, problems: Problems) -> None:
        """Add what does not fit together."""
        least = self.num if isinstance(self.num, int) else self.num[0]
        if least < 2 or (not isinstance(self.num, int) and self.num[1] < self.num[0]):
            problems.add(
                "clusters.num", self.num, "not at least 2, or two ascending numbers", "For example 5 or [2, 10]."
            )
        if isinstance(colm.small_sources, list):
            problems.add("colm.small_sources", colm.small_sources, "clusters have no names yet", "Write auto or none.")
        given = self.model_fields_set & {"refreshes", "refresh_steps", "warmup_steps"}
        if self.uses_proxy:
            for key in sorted(given):
                if getattr(self, key) not in (0, None, []):
                    problems.add(
                        f"clusters.{key}", getattr(self, key), "a proxy's clusters do not change", "Remove it."
                    )
            return
        if self.warmup_steps >= steps:
            problems.add("clusters.warmup_steps", self.warmup_steps, f"not fewer than steps = {steps}", "Choose fewer.")
        outside = [step for step in self.refresh_steps or [] if not self.warmup_steps < step < steps]
        if outside:
            why = f"{outside} are not between the warm-up and the last step"
            problems.add("clusters.refresh_steps", self.refresh_steps, why, "Leave these out.")

    def first_selection(self) -> int:
        """Return plain steps before the first selection."""
        return 0 if self.uses_proxy else self.warmup_steps
