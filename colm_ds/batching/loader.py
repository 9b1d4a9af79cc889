"""Large batches of one rank, from a dataset that knows its sources and lengths."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from colm_ds.batching.assign import home_ranks
from colm_ds.batching.gather import NUM_SHOWN
from colm_ds.batching.mixture import MixtureSampler, Sampler
from colm_ds.batching.resourced import WithSources
from colm_ds.batching.row_facts import Labels, facts_of_columns, facts_of_rows, has_arrow_columns, values_of_column
from colm_ds.errors import DataError
from colm_ds.types import Candidates, CandidateTable, Example, LargeBatch, SourcedDataset

logger = logging.getLogger(__name__)

_Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, int, Candidates | None]


class LargeBatchLoader:
    """Endless large batches; the content of a step depends on (seed, step) alone.

    Attributes:
        dataset: the examples.
        next_step: 1-based step of the next large batch; set it to continue elsewhere.
        num_workers: as given.
    """

    def __init__(
        self,
        dataset: SourcedDataset,
        large_batch_size: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        kept_sources: Collection[int] = (),
    ) -> None:
        """Load for one rank.

        Args:
            dataset: the examples.
            large_batch_size: r.
            seed: seed of the run.
            rank: this rank.
            world_size: W.
            kept_sources: ids of sources that are kept without a probe; the others' examples are balanced over ranks.
            num_workers: processes that read the next large batches ahead; 0 reads when a batch is asked for.

        Raises:
            SelectionError: if the dataset has fewer than r examples.
        """
        self.dataset = dataset
        self.next_step = 1
        self._sampler = make_sampler(dataset, large_batch_size, seed)
        self._rank = rank
        self._world_size = world_size
        self.num_workers = num_workers
        self._kept_sources = sorted(kept_sources)
        self._candidates: CandidateTable | None = getattr(dataset, "candidates", None)

    def __iter__(self) -> Iterator[LargeBatch]:
        for batch in self._ahead() if self.num_workers else map(self.batch, itertools.count(self.next_step)):
            self.next_step = batch.step + 1
            yield batch

    def _ahead(self) -> Iterator[LargeBatch]:
        """Yield batches of worker processes, two each in advance; arrays, as tensors need a file handle each."""
        loader: DataLoader[Any] = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=itertools.count(self.next_step),
            num_workers=self.num_workers,
            prefetch_factor=2,
            collate_fn=_same,
            generator=torch.Generator(),  # otherwise the workers' seed is drawn from the global state
        )
        for packed in loader:
            yield packed.unpack(self._candidates)

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, and the sources given to `set_sources`, if any."""
        sources = None
        if isinstance(self.dataset, WithSources):
            ids = torch.from_numpy(self.dataset.source_ids.copy())
            sources = {"names": list(self.dataset.source_names), "ids": ids}
        return {"next_step": self.next_step, "sources": sources, "kept_sources": list(self._kept_sources)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; iterate again after it."""
        self.next_step = state["next_step"]
        if state["sources"]:
            self.set_sources(state["sources"]["names"], state["sources"]["ids"].numpy(), state["kept_sources"])
        else:
            self._kept_sources = sorted(state["kept_sources"])

    def restore_sources(self) -> bool:
        """Return to the dataset's own sources; return whether there were others."""
        if not isinstance(self.dataset, WithSources):
            return False
        self.dataset = self.dataset.dataset
        return True

    def set_sources(self, names: Sequence[str], ids: npt.NDArray[Any], kept_sources: Collection[int]) -> None:
        """Divide the examples into other sources; iterate again after it.

        Args:
            names: of the sources.
            ids: source id of every example, `[n]`.
            kept_sources: as before, of the new ones.
        """
        self.dataset, self._kept_sources = WithSources(self.dataset, names, ids), sorted(kept_sources)

    @property
    def steps_per_epoch(self) -> int:
        """Number of large batches in one pass over the dataset."""
        return self._sampler.steps_per_epoch

    def epoch(self, step: int) -> int:
        """Return the 0-based epoch of a 1-based step."""
        return self._sampler.epoch(step)

    def facts(self, step: int) -> LargeBatch:
        """Return the large batch of a 1-based step without any of its examples."""
        indices = self._sampler.indices(step)
        lengths = torch.from_numpy(self.dataset.lengths[indices].astype(np.int64))
        sources = self.dataset.source_ids[indices]
        return LargeBatch(
            step=step,
            indices=torch.from_numpy(indices),
            sources=torch.from_numpy(sources.astype(np.int64)),
            lengths=lengths,
            num_label_tokens=torch.from_numpy(self.dataset.num_label_tokens[indices].astype(np.int64)),
            home=home_ranks(lengths, self._world_size, torch.from_numpy(~np.isin(sources, self._kept_sources))),
            examples={},
            candidates=None if self._candidates is None else self._candidates.take(torch.from_numpy(indices)),
        )

    def batch(self, step: int) -> LargeBatch:
        """Return the large batch of a 1-based step: facts of all examples, tokens of this rank's."""
        facts = self.facts(step)
        mine = (facts.home == self._rank).nonzero().flatten().tolist()
        return replace(facts, examples={position: self.dataset[int(facts.indices[position])] for position in mine})


def make_sampler(dataset: SourcedDataset, large_batch_size: int, seed: int) -> Sampler:
    """Return the sampler of a dataset's large batches: its own, or the natural mixture.

    Raises:
        SelectionError: if the dataset has fewer than r examples.
    """
    own = getattr(dataset, "sampler", None)
    return own(large_batch_size, seed) if own else MixtureSampler(len(dataset), large_batch_size, seed)


_FACTS = ("indices", "sources", "lengths", "num_label_tokens", "home")


@dataclass(frozen=True)
class _Packed:
    """A large batch as arrays, as it leaves a worker process.

    Attributes:
        step: 1-based step.
        facts: `_FACTS` by name.
        examples: by position; candidates are looked up in the table again, which every process has.
    """

    step: int
    facts: dict[str, npt.NDArray[np.int64]]
    examples: dict[int, _Arrays]

    @classmethod
    def pack(cls, batch: LargeBatch) -> _Packed:
        """Take a batch apart."""
        examples = {
            position: (one.input_ids.numpy(), one.labels.numpy(), one.source, one.index, one.candidates)
            for position, one in batch.examples.items()
        }
        return cls(batch.step, {name: getattr(batch, name).numpy() for name in _FACTS}, examples)

    def unpack(self, candidates: CandidateTable | None) -> LargeBatch:
        """Put it together again."""
        indices, sources, lengths, num_label_tokens, home = (torch.from_numpy(self.facts[name]) for name in _FACTS)
        taken = None if candidates is None else candidates.take(indices)
        examples = {position: _to_example(values) for position, values in self.examples.items()}
        return LargeBatch(self.step, indices, sources, lengths, num_label_tokens, home, examples, taken)


class _Steps(Dataset[_Packed]):
    """Steps as the items of a map-style dataset, for worker processes."""

    def __init__(self, loader: LargeBatchLoader) -> None:
        self._loader = loader

    def __getitem__(self, step: int) -> _Packed:
        return _Packed.pack(self._loader.batch(step))


def _to_example(values: _Arrays) -> Example:
    ids, labels, source, index, candidates = values
    return Example(torch.from_numpy(ids), torch.from_numpy(labels), source, index, candidates)


def _same(item: Any) -> Any:
    return item


class RecordDataset:
    """A `SourcedDataset` over any map-style dataset of records with `input_ids`, `labels` and `source`.

    Lengths and sources are read once from every record, of a Hugging Face dataset by its columns. `labels` default to
    `input_ids` (a prediction at every token). Records without a label to train on are left out, with one line that
    counts them.

    Attributes:
        num_dropped: how many were left out.
        row_facts: what is known of all records, those left out included.
    """

    def __init__(
        self,
        records: Any,
        source_key: str = "source",
        *,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        needs_sources: bool = True,
        says_what: bool = True,
    ) -> None:
        """Read lengths and sources.

        Args:
            records: has `len` and integer indexing; items are mappings, for example a Hugging Face dataset.
            source_key: key of the source's name or number.
            collate_fn: makes a batch with `input_ids` and `labels` of records, here of one at a time.
            needs_sources: False: records without a source are all of one, `all`; and so are all records if one's
                source is neither a name nor a whole number.
            says_what: write the line about records that are left out.

        Raises:
            DataError: if a record lacks a key, or none has a labelled token.
        """
        self._records = records
        self._source_key = source_key
        self._collate = collate_fn
        if collate_fn is None and has_arrow_columns(records):
            given = self._column_of_sources(needs_sources)
            facts = facts_of_columns(records, Labels("labels" if "labels" in records.column_names else None))
        else:
            given = []
            facts = facts_of_rows(lambda row: self._read(row, needs_sources, given), len(records))
        self.row_facts = facts
        dropped = facts.without_label
        self.num_dropped = len(dropped)
        self._kept = kept = np.flatnonzero(facts.num_label_tokens)
        if not len(kept):
            raise DataError(
                f"none of {len(records)} examples has a label that is not -100 after the first token, so there is "
                "nothing to train on. Give labels."
            )
        if len(dropped) and says_what:
            logger.warning(left_out(dropped.tolist(), len(records)))
        if needs_sources or all(_is_source(given[row]) for row in kept.tolist()):
            names = [_source_name(given[row], row) for row in kept.tolist()]
        else:
            names = ["all"] * len(kept)
        by_name = {str(name): name for name in names}  # 2 and "2" are one source
        self.source_names: Sequence[str] = sorted(
            by_name, key=lambda name: (isinstance(by_name[name], str), by_name[name])
        )
        number = {name: source for source, name in enumerate(self.source_names)}
        self.source_ids = np.array([number[str(name)] for name in names], dtype=np.int32)
        self.lengths = facts.lengths[kept]
        self.num_label_tokens = facts.num_label_tokens[kept]

    def _column_of_sources(self, needs_sources: bool) -> list[Any]:
        """Return the source of every row of an Arrow dataset."""
        records, key = self._records, self._source_key
        if key in records.column_names:
            return values_of_column(records, key)
        if needs_sources:
            raise DataError(f"example 0: no {key!r}. Its keys: {', '.join(records.column_names)}.")
        return ["all"] * len(records)

    def _read(self, row: int, needs_sources: bool, given: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and labels of a row, and put its source behind those `given`."""
        record, key = self._records[row], self._source_key
        if not isinstance(record, Mapping):
            wanted = "what collate_fn reads" if self._collate else "input_ids and labels"
            wanted += f" and {key}" if needs_sources else ""
            raise DataError(f"example {row}: a {type(record).__name__}. Give mappings with {wanted}.")
        needed = [key] if needs_sources else []
        needed += [] if self._collate else ["input_ids"]
        missing = [name for name in needed if name not in record]
        if missing:
            raise DataError(f"example {row}: no {missing[0]!r}. Its keys: {', '.join(map(str, record))}.")
        try:
            ids, labels = self._tokens_of(record)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise DataError(
                f"example {row}: {reason}. Give input_ids, labels and attention_mask as lists of equal length."
            ) from None
        if len(ids) != len(labels):
            raise DataError(f"example {row}: {len(ids)} tokens, {len(labels)} labels. Give one label per token.")
        given.append(record.get(key, "all"))
        return ids, labels

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        ids, labels = self._tokens_of(self._records[int(self._kept[index])])
        return Example(ids, labels, int(self.source_ids[index]), index)

    def record(self, index: int) -> Any:
        """Return the record of an example, without its source."""
        return self._without_source(self._records[int(self._kept[index])])

    def _tokens_of(self, record: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._collate is None:
            return _tokens(record)
        batch = self._collate([self._without_source(record)])
        return _tokens({key: batch[key][0] for key in ("input_ids", "labels", "attention_mask") if key in batch})

    def _without_source(self, record: Any) -> Any:
        return {key: value for key, value in record.items() if key != self._source_key}


def left_out(dropped: Sequence[int], total: int) -> str:
    """Return a line about examples without a label, by their indices."""
    first = ", ".join(map(str, dropped[:NUM_SHOWN])) + (", ..." if len(dropped) > NUM_SHOWN else "")
    return (
        f"{len(dropped)} of {total} examples have no label that is not -100 after the first token, so nothing to train "
        f"on, and are left out: {first}"
    )


def source_counts(dataset: SourcedDataset) -> dict[str, int]:
    """Return examples by source name, in the order of the source ids; by drawn shares where a dataset has its own."""
    if (mixture := getattr(dataset, "mixture_counts", None)) is not None:
        return dict(mixture)
    counts = np.bincount(dataset.source_ids, minlength=len(dataset.source_names))
    return dict(zip(dataset.source_names, counts.tolist(), strict=True))


def _is_source(value: Any) -> bool:
    """Return whether a value is a source's name or number."""
    try:
        _source_name(value, 0)
    except (DataError, RuntimeError, ValueError):  # the latter of a tensor of several numbers
        return False
    return True


def _source_name(value: Any, index: int) -> str | int:
    """Return a source's name or number, which may be a tensor."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (str, int)):
        raise DataError(f"example {index}: source {value!r}. Give a name or a whole number.")
    return value


def _tokens(record: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = _one_row(record, "input_ids", torch.int64)
    labels = record.get("labels") if hasattr(record, "get") else record["labels"]
    labels = ids if labels is None else _one_row(record, "labels", torch.int64)
    mask = record.get("attention_mask") if hasattr(record, "get") else None
    if mask is not None:  # remove padding that a tokenizer added
        keep = _one_row(record, "attention_mask", torch.bool)
        ids, labels = ids[keep], labels[keep]
    return ids, labels


def _one_row(record: Mapping[str, Any], key: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a row's numbers, `[tokens]`."""
    values = torch.as_tensor(record[key], dtype=dtype)
    if values.dim() != 1:
        raise ValueError(f"{key} has shape {list(values.shape)}, not [tokens]")
    return values
