"""Errors of colm_ds. Each says where the problem is, what is wrong and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from colm_ds.untrusted.printable import visible

Result = TypeVar("Result")


class CoLMError(Exception):
    """Base class: an error whose message is meant for the user, shown without a traceback.

    Names and values from files are in the message as they are; as text, it has nothing that a terminal would obey.
    """

    def __str__(self) -> str:
        """Return the message, safe to show."""
        return visible(super().__str__())


ColmError = CoLMError
"""The name of version 0.1.0."""


class ConfigError(CoLMError):
    """Configuration (recipe, DeepSpeed JSON or `"colm"` section) that cannot work."""


class DataError(CoLMError):
    """Input data that is missing, broken or empty; the message names file and line."""


class ProbeError(CoLMError):
    """A model in which the probe cannot find or handle what it reads."""


class SelectionError(CoLMError):
    """Sizes or arguments with which no coreset can be selected."""


class LoopError(CoLMError):
    """A training loop that does not do with the engine's micro-batches what a step needs."""


class DivergenceError(CoLMError):
    """Training that cannot continue: the gradient is not finite step after step."""


class DeviceMemoryError(CoLMError):
    """A step for which a device has not enough memory; the message says where, and what would help.

    Attributes:
        phase: of the step, such as "probe" or "backward".
        micro_batch: its size in words, or None.
        step: 1-based step.
        rank: where it happened.
        reason: PyTorch's own message.
        snapshot: file of the allocator's snapshot, or None.
        large_batch: the step's large batch as that rank saw it, or None.
    """

    def __init__(
        self,
        phase: str,
        micro_batch: str | None,
        *,
        step: int,
        rank: int,
        reason: str,
        advice: Sequence[str],
        snapshot: str | None = None,
        large_batch: object = None,
    ) -> None:
        """Compose the message from the attributes and `advice`, lines that say what would help."""
        of = "" if micro_batch is None else f", micro-batch of {micro_batch}"
        lines = [f"rank {rank}: out of memory in phase {phase!r} of step {step}{of}.", *advice, f"PyTorch: {reason}"]
        if snapshot is not None:
            lines.append(f"Allocator snapshot: {snapshot}, for https://pytorch.org/memory_viz")
        super().__init__("\n  ".join(lines))
        self.phase, self.micro_batch = phase, micro_batch
        self.step, self.rank, self.reason = step, rank, reason
        self.snapshot, self.large_batch = snapshot, large_batch

    def with_advice(self, advice: Sequence[str]) -> DeviceMemoryError:
        """Return the same error with other lines of advice."""
        return DeviceMemoryError(
            self.phase,
            self.micro_batch,
            step=self.step,
            rank=self.rank,
            reason=self.reason,
            advice=advice,
            snapshot=self.snapshot,
            large_batch=self.large_batch,
        )


class CheckpointError(CoLMError):
    """A checkpoint that cannot be saved or loaded."""


class PartFailedError(CoLMError):
    """A program of several ended with an exit code other than 0, after its own message.

    Attributes:
        code: the exit code.
    """

    def __init__(self, part: str, code: int) -> None:
        """Name the part and its exit code."""
        cure = "Once the cause is gone, the same command resumes from what is done."
        super().__init__(f"{part} ended with exit code {code}. {cure}")
        self.code = code


@dataclass
class Problems:
    """Collects problems so that the user sees all of them at once.

    Example:
        >>> problems = Problems("zero2.json")
        >>> problems.add("colm.coreset_size", 200, "more than large_batch_size = 128", "Choose at most 128.")
        >>> problems.raise_if_any()  # ConfigError listing every problem, and then what was noted in `notes`
    """

    where: str
    messages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, value: object, why: str, fix: str = "") -> None:
        """Record one problem: the key, its value, why it is wrong and what to write instead."""
        shown = f"{key} = {_short(value)}"
        self.messages.append(f"{shown}: {why}" + (f". {fix}" if fix else ""))

    def add_unknown(self, key: str, known: Iterable[str]) -> None:
        """Record an unknown key together with the nearest known one."""
        self.messages.append(f"{key}: unknown key. {nearest_key(key, known)}")

    def raise_if_any(self, error: type[CoLMError] = ConfigError) -> None:
        """Raise `error` with all messages; do nothing if there are none."""
        if not self.messages:
            return
        count = len(self.messages)
        head = f"{count} problem{'s' if count > 1 else ''} in {self.where}"
        raise error("\n  ".join([head, *self.messages, *self.notes]))


class Attempts:
    """Run checks one after another and raise what all of them found together.

    Example:
        >>> attempts = Attempts("the arguments")
        >>> config = attempts.of(lambda: resolve_config(given, 1))  # None if it raised a CoLMError
        >>> attempts.raise_if_any()  # what was raised, or one ConfigError with the messages of all
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._errors: list[CoLMError] = []

    def of(self, work: Callable[[], Result]) -> Result | None:
        """Return what the check returns, None if it raised a `CoLMError`."""
        try:
            return work()
        except CoLMError as error:
            self._errors.append(error)
            return None

    def raise_if_any(self) -> None:
        """Raise the only error as it is, or one `ConfigError` with the messages of several."""
        if len(self._errors) == 1:
            raise self._errors[0]
        problems = Problems(self._where)
        for error in self._errors:
            problems.messages.append("\n  ".join(str(error).split("\n")))
        problems.raise_if_any()


_MOST_SHOWN = 300
"""Characters of a value in a message."""


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, (int, float)) else _number(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


def _number(value: float) -> str:
    try:
        return str(value)
    except ValueError:  # an integer of more digits than Python writes
        return hex(int(value))


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Advise on a misspelled key: name the nearest known one, or all of them."""
    names = sorted(known)
    last = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(last, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(names)}."
