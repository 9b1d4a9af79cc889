"""CoLM in `transformers.Trainer`: every optimizer step fetches r examples and trains on the b that represent them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from colm_ds.batching.gather import gather_large_batch
from colm_ds.batching.loader import left_out
from colm_ds.batching.packing import Packing
from colm_ds.batching.sources import looks_at_sources, small_source_ids
from colm_ds.checkpoints.tensors_only import load_tensors
from colm_ds.config.colm import CoLMSection
from colm_ds.distributed.exchange import make_exchange
from colm_ds.engine.accumulation import loss_scale
from colm_ds.engine.coreset_selector import CoresetSelector, Selection
from colm_ds.errors import CheckpointError, CoLMError, ConfigError, DataError, Problems, SelectionError
from colm_ds.integrations.arguments import (
    CoLMArguments,
    CoLMConfig,
    Given,
    is_auto,
    pop_log,
    read_section,
    resolve_section,
)
from colm_ds.integrations.dataset_sources import by_source
from colm_ds.integrations.large_batches import (
    CollatedExamples,
    ExampleCollator,
    NumberedDataset,
    ShareSampler,
    WithoutSource,
    dataset_sources,
    find_row_facts,
    has_label,
    number_sources,
    sources_if_any,
)
from colm_ds.integrations.micro_batches import KEY, Weighted, coreset_micro_batches
from colm_ds.integrations.statistics import SelectionStatistics
from colm_ds.integrations.trainer_checks import (
    check_arguments,
    check_heldout,
    check_optimization,
    check_sizes,
    is_trl,
    take_over,
)
from colm_ds.memory.meter import Meter
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.model_fit import ModelLimits, check_causal
from colm_ds.models.packing import check_packing
from colm_ds.types import Coreset, Example

__all__ = ["CoLMArguments", "CoLMConfig", "CoLMMixin", "CoLMTrainer", "by_source"]

STATE_FILE = "colm_state.pt"
"""File beside the Trainer's own in a checkpoint."""

_CHANGED = (
    "a micro-batch of a coreset arrived in compute_loss with other input_ids or labels than it was chosen with, whose "
    "loss was trained. Change them in the dataset or in data_collator."
)

logger = logging.getLogger(__name__)

# The mixin's calls of super() go to a Trainer; only a type checker needs this base.
_Base = Trainer if TYPE_CHECKING else object


class CoLMMixin(_Base):  # type: ignore[misc, valid-type]
    """Mixin to put in front of `Trainer` or a subclass: `class MyTrainer(CoLMMixin, Seq...Trainer)`.

    `per_device_train_batch_size` and `gradient_accumulation_steps` describe the coreset, which is, as usual, what
    an optimizer step trains on; r is in `colm`. The gradient is the one of `colm_ds.initialize`.

    Attributes:
        loss_is_scaled_for_ga: tells the Trainer that the loss is already a part of the whole step's.
        colm_config: the checked `"colm"` section.
        coreset_selector: from the first step of a `train` on.
        last_selection: selection of the last step, its large batch without examples.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        colm: Given | None = None,
        sources: Sequence[Any] | None = None,
        colm_allow_overrides: bool = False,
        **kwargs: Any,
    ) -> None:
        """Initialize the Trainer, and check its arguments for selection.

        Args:
            args: the Trainer's.
            colm: a `CoLMConfig`, a `CoLMArguments`, keys and values, or a file with a `colm` block; default:
                `args.colm`, or the `"colm"` section of the DeepSpeed configuration.
            sources: source of every example of `train_dataset`, if it has no such column (clusters, for example).
            colm_allow_overrides: train without the losses and loaders of a Trainer's subclass that selection replaces;
                a line says which.
            kwargs: the Trainer's.

        Raises:
            ConfigError: listing everything that cannot work.
        """
        super().__init__(*args, **kwargs)
        self.data_collator: Any
        self.coreset_selector: CoresetSelector | None = None
        self.last_selection: Selection | None = None
        self._colm_saved: dict[str, Any] | None = None
        self._packing: Packing | None = None
        self._differing: list[torch.Tensor] = []
        self._num_without_label = 0
        section = read_section(self._find_section(colm))
        self.data_collator = WithoutSource(self.data_collator, section.pop("source_column", "source"))
        self._logs_all = pop_log(section) == "all"
        self._notes: list[str] = []
        self._leaves_normalization_open = is_auto(section)
        self._asked = (section, sources, colm_allow_overrides)
        self.colm_config = self._check(*self._asked)
        self._checked_for = self._facts()
        self._say_what_differs()

    def _find_section(self, given: Given | None) -> Given:
        deepspeed = getattr(getattr(self.args, "hf_deepspeed_config", None), "config", {})
        section = given if given is not None else getattr(self.args, "colm", None) or deepspeed.get("colm")
        if section is None:
            raise ConfigError(f"{type(self).__name__}: no colm. Give colm=CoLMConfig(large_batch_size=...).")
        return section

    def _facts(self) -> tuple[Any, ...]:
        """Return what the check depends on and a search of hyperparameters, or an assignment, may change."""
        args = self.args
        sizes = (self._train_batch_size, args.gradient_accumulation_steps, args.world_size, args.seed, args.data_seed)
        return (*sizes, id(self.train_dataset))

    def _check(self, section: dict[str, Any], sources: Sequence[Any] | None, allows_overrides: bool) -> CoLMSection:
        """Check everything that training will need, and report all problems together."""
        args = self.args
        problems = Problems(f"the arguments of {type(self).__name__}")
        after = type(self).__mro__[type(self).__mro__.index(CoLMMixin) + 1 :]
        self._loss_owner = next(kind for kind in after if "compute_loss" in vars(kind))
        self._notes += take_over(self, CoLMMixin, allows_overrides, problems)
        check_arguments(self, self._loss_owner, allows_overrides, problems)
        config = resolve_section(
            section,
            coreset_size=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_processes=args.world_size,
            problems=problems,
        )
        if config is not None and config.packing != "off" and is_trl(self._loss_owner):
            why = "TRL computes its metrics from unpacked rows"
            problems.add("packing", config.packing, why, 'Write "off", or use CoLMTrainer.')
        dataset = self.train_dataset
        # A packed dataset has no sources and other sizes, and packing is already reported.
        packed = getattr(args, "packing", False) or getattr(args, "padding_free", False)
        if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            problems.add(
                "train_dataset", type(dataset).__name__, "its examples are not numbered", "Give a map-style dataset."
            )
        elif dataset is not None and config is not None and not packed:
            self._read_sources(config, sources, problems)
            self._read_rows(problems)
            check_sizes(self, config, len(self._rows), problems)
            check_heldout(self, self._limits, problems, self._notes)
        check_optimization(self, problems)
        if dataset is not None and not problems.messages and not self.is_deepspeed_enabled:
            check_causal(self.model, "the model")  # under DeepSpeed when it is on its device
        problems.raise_if_any()
        assert config is not None
        return config

    def _read_sources(self, config: CoLMSection, sources: Sequence[Any] | None, problems: Problems) -> None:
        """Find the source of every row."""
        dataset = self.train_dataset
        column = self.data_collator.source_column
        self._source_names, self._source_ids = ["all"], np.zeros(len(dataset), dtype=np.int64)
        given = sources is not None
        try:
            is_needed = given or looks_at_sources(config)
            values = dataset_sources(dataset, column, sources) if is_needed else sources_if_any(dataset, column)
            if values is None:
                return
            counts, self._source_ids = number_sources(values)
            self._source_names = list(counts)
            small_source_ids(config, counts)
        except CoLMError as error:
            problems.messages.append(str(error))
        if given and getattr(self.args, "shuffle_dataset", False):
            problems.add("shuffle_dataset", True, "sources=[...] would meet other examples", "Use a column.")

    def _read_rows(self, problems: Problems) -> None:
        """Find the rows with a label to train on, and what the model cannot be given."""
        dataset = self.train_dataset
        self._rows = np.arange(len(dataset))
        self._limits = ModelLimits.of(self.model)
        try:
            collator = self._get_collator_with_removed_columns(self.data_collator, description="training")
            self._examples_of = ExampleCollator(collator, self._source_ids)
            self._examples_of.check(0, dataset[0])
            facts = find_row_facts(dataset, self._examples_of)
        except CoLMError as error:
            problems.messages.append(str(error))
            return
        self._limits.add_problems(facts, problems, " of train_dataset")
        dropped = facts.without_label
        self._rows = np.setdiff1d(self._rows, dropped, assume_unique=True)
        if len(self._rows) == 0:
            problems.messages.append(f"train_dataset: none of {len(dataset)} rows has a label to train on.")
        elif len(dropped):
            self._notes.append(left_out(dropped.tolist(), facts.num_read))
        left = np.bincount(self._source_ids[self._rows], minlength=len(self._source_names)).tolist()
        self._source_counts = dict(zip(self._source_names, left, strict=True))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load this rank's share of each large batch, in as many parts as an optimizer step has micro-batches."""
        if self._facts() != self._checked_for:
            self.colm_config = self._check(*self._asked)
            self._checked_for = self._facts()
        args, config, dataset = self.args, self.colm_config, self.train_dataset
        if dataset is None:
            return super().get_train_dataloader()  # which raises
        sampler = ShareSampler(
            len(self._rows),
            config.large_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            seed=config.seed,
            global_step=lambda: self.state.global_step,
            shuffle=not isinstance(self._get_train_sampler(dataset), SequentialSampler),
            rows=self._rows,
        )
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        workers = args.dataloader_num_workers
        loader = DataLoader(
            NumberedDataset(dataset, len(sampler) * sampler.batch_size),
            batch_sampler=sampler,
            collate_fn=self._examples_of.arrays,
            num_workers=workers,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        )
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch r examples, select b, and return the micro-batches of one optimizer step."""
        selector = self.coreset_selector = self.coreset_selector or self._make_selector()
        rank, exchange = self.args.process_index, self._exchange

        step, num_read = self.state.global_step + 1, 0

        def read() -> list[Example]:
            nonlocal num_read
            examples = [one.example() for part in islice(epoch_iterator, num_batches) for one in part]
            num_read = len(examples)
            if self._arrived_changed():
                raise DataError(f"step {step - 1}: {_CHANGED}")
            self._limits.check(examples)
            return self._with_labels(examples, step)

        batch = gather_large_batch(read, step, rank, exchange)
        if batch.size == 0:
            if num_read:
                raise DataError(f"step {step}: none of the examples read has a label to train on.")
            return [], None
        if callable(to_training := getattr(self.optimizer, "train", None)):
            to_training()  # evaluation left the mean weights of a schedule-free optimizer in the model
        packing = self._find_packing(int(batch.lengths.max()))
        meter = Meter(self.args.device, peaks=False)
        selection = selector(batch, meter)
        self.last_selection = replace(selection, batch=replace(batch, examples={}))
        coreset = selection.coreset
        if coreset.size == 0:
            raise SelectionError(
                f"step {batch.step}: none of the {batch.size} examples has a finite signal. "
                "The model has diverged: resume from an earlier checkpoint with a lower learning rate."
            )
        self._statistics.note(selection, meter)
        micro_batches = coreset_micro_batches(
            batch,
            coreset.positions.tolist(),
            loss_scale(batch, coreset, self.colm_config.loss_normalization),
            exchange,
            rank,
            num_batches=num_batches,
            max_examples=self._train_batch_size,
            pad_token_id=self._pad_token_id(),
            packing=packing,
        )
        return micro_batches, self._get_num_items_in_batch(micro_batches, device)

    def _with_labels(self, examples: list[Example], step: int) -> list[Example]:
        """Leave out rows without a label among those that were not looked at before training."""
        kept = [example for example in examples if has_label(example)]
        if len(kept) < len(examples):
            self._num_without_label += len(examples) - len(kept)
            logger.warning(
                "step %d: %d rows of this rank's have no label to train on and are left out (%d so far)",
                *(step, len(examples) - len(kept), self._num_without_label),
            )
        return kept

    def _say_what_differs(self) -> None:
        """Write a line, once, for everything that is not as in the Trainer alone."""
        args, notes = self.args, self._notes
        if self.colm_config.loss_normalization == "token":
            notes.insert(0, f"loss: the mean over tokens, as the Trainer's (selector {self.colm_config.selector}).")
        else:
            notes.insert(
                0,
                "loss: the mean over examples, each the mean over its tokens; the Trainer's is the mean over tokens "
                "(colm.loss_normalization token).",
            )
        if str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "group_by_length":
            notes.append("group_by_length: changes nothing, as the micro-batches of a coreset are sorted by length.")
        if args.label_smoothing_factor:
            notes.append("label_smoothing_factor: of the loss that is trained; examples are chosen by the plain one.")
        if args.torch_compile:
            notes.append("torch_compile: logits are computed at all positions, not only at those with a label.")
        if args.process_index == 0:
            for note in notes:
                logger.warning(note)

    @property
    def last_coreset(self) -> Coreset | None:
        """The coreset of the last step."""
        return None if self.last_selection is None else self.last_selection.coreset

    def _make_selector(self) -> CoresetSelector:
        """Make the selector of a `train`, restored if that resumes from a checkpoint."""
        args = self.args
        self._exchange = make_exchange(args.device)
        if self.is_deepspeed_enabled:
            check_causal(self.model, "the model")
        dataset = self.train_dataset
        selector = CoresetSelector(
            self.model,
            self.colm_config,
            self._source_counts,
            device=args.device,
            exchange=self._exchange,
            optimizer=self.optimizer,
            rank=args.process_index,
            dataset=None if dataset is None else CollatedExamples(dataset, self._examples_of, self._rows),
            is_checked=True,
        )
        if self._colm_saved is not None:
            selector.load_state_dict(self._colm_saved)
        self._statistics = SelectionStatistics(selector.source_names, brief=not self._logs_all)
        # A head that is replaced in every micro-batch would be compiled in every micro-batch.
        self._loss_head = None if args.torch_compile else find_loss_head(self.model)
        return selector

    def _find_packing(self, longest: int) -> Packing | None:
        """Return how examples are packed: into rows as long as the large batch's longest, or as configured."""
        packing = self.colm_config.packing
        if packing == "off":
            return None
        row_tokens = longest if packing == "on" else packing
        if self._packing is None:
            self._packing = check_packing(self.model, packing, row_tokens, self._train_batch_size)
        return replace(self._packing, row_tokens=row_tokens)

    def _pad_token_id(self) -> int:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        for holder in (tokenizer, getattr(self.model, "config", None)):
            token_id = getattr(holder, "pad_token_id", None)
            if isinstance(token_id, int):
                return token_id
        return 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute a micro-batch's part of the step's loss, times W as gradients are averaged over ranks.

        Outside training on a coreset (in evaluation, for example) it is the Trainer's own.
        """
        weighted: Weighted | None = inputs.pop(KEY, None)
        if weighted is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        outputs: Any = None
        if is_trl(self._loss_owner):
            seen: list[Any] = []

            def watched(**values: Any) -> Any:
                seen.append(model(**values))
                return seen[-1]

            # TRL's loss is unused, but not its metrics: entropy, accuracy and tokens of the coreset.
            super().compute_loss(watched, inputs, num_items_in_batch=num_items_in_batch)
            outputs = seen[0]
            sums = -outputs.log_probs.sum(dim=1)  # 0 without a label
        else:
            self._compare(inputs, weighted)
            batch = weighted.batch.to(self.args.device)
            sums = example_loss_sums(model, self._loss_head, batch, self.args.label_smoothing_factor)
        scales = weighted.scales.to(sums.device, non_blocking=True)
        loss = (sums * scales).sum() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _compare(self, inputs: Mapping[str, Any], weighted: Weighted) -> None:
        """Note on the device whether a micro-batch arrives with other tokens or labels than it was made with."""
        for key, ours in weighted.text.items():
            given = inputs.get(key)
            if not isinstance(given, torch.Tensor) or given.shape != ours.shape:
                self._differing.append(torch.ones((), dtype=torch.bool, device=self.args.device))
            else:
                self._differing.append((given != ours.to(given.device, non_blocking=True)).any())

    def _arrived_changed(self) -> bool:
        """Return whether micro-batches of the last step arrived changed; what was noted is read once a step."""
        changed = bool(self._differing) and bool(torch.stack(self._differing).any())
        self._differing.clear()
        return changed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; the history of the selection starts empty or from the checkpoint.

        Raises:
            DataError: on every rank, if a subclass changes the tokens or labels of micro-batches on their way.
        """
        self.coreset_selector, self._colm_saved, self._packing = None, None, None
        self._differing.clear()
        trained = super().train(*args, **kwargs)
        if self.coreset_selector is not None:
            changed = torch.tensor([float(self._arrived_changed())], device=self.args.device)
            if float(self._exchange.sum(changed)) > 0:
                raise DataError(f"step {self.state.global_step}: {_CHANGED}")
        return trained

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the means of the selection's statistics since the last training entry."""
        if "loss" in logs and self.coreset_selector is not None:
            logs.update(self._statistics.take())
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.coreset_selector is not None and self.args.process_index == 0:
            state = {
                "sizes": self._sizes(),
                "loss_normalization": self.colm_config.loss_normalization,
                "selector": self.coreset_selector.state_dict(),
            }
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            logger.warning("%s: no %s, so the history of the selection starts empty.", checkpoint, STATE_FILE)
            return
        try:
            saved = load_tensors(path)
            saved["sizes"], saved["selector"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not readable ({type(error).__name__}: {error}). Resume from another checkpoint, or remove "
                "the file: the history of the selection then starts empty."
            ) from None
        if saved["sizes"] != self._sizes():
            raise CheckpointError(
                f"{path}: saved with {saved['sizes']}, this run has {self._sizes()}. Resume with the former."
            )
        before = saved.get("loss_normalization", "example")  # which it always was, if it was left open
        if self._leaves_normalization_open and before != self.colm_config.loss_normalization:
            logger.warning("%s: its loss was the mean over %ss, and stays it.", path, before)
            self.colm_config = self.colm_config.model_copy(update={"loss_normalization": before})
        self._colm_saved = saved["selector"]

    def _sizes(self) -> dict[str, Any]:
        config = self.colm_config
        return {
            "large_batch_size": config.large_batch_size,
            "coreset_size": config.coreset_size,
            "seed": config.seed,
            "selector": config.selector,
            "estimator": config.probe.estimator,
        }


class CoLMTrainer(CoLMMixin, Trainer):
    """`transformers.Trainer` on coresets: `CoLMTrainer(model, args, ..., colm=CoLMConfig(large_batch_size=128))`."""
