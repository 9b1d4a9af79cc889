"""Evaluate: share the questions among ranks, ask, count, write the tables. `colm-ds evaluate` calls it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from colm_ds.batching.assign import home_ranks
from colm_ds.data.choices import WRITERS
from colm_ds.data.formats import Records, find_places, read_place
from colm_ds.data.sets import DataPlaces, find_set
from colm_ds.distributed.agreement import together
from colm_ds.errors import ConfigError, DataError, nearest_key
from colm_ds.evaluation.backend import Backend
from colm_ds.evaluation.choices import CandidateTask
from colm_ds.evaluation.math_tasks import MathTask
from colm_ds.evaluation.perplexity import PerplexityTask, is_store
from colm_ds.evaluation.question_files import fingerprint, subset
from colm_ds.evaluation.question_log import EvaluationFolder, append
from colm_ds.evaluation.question_prompt import QuestionPrompt
from colm_ds.evaluation.results import IN_DOMAIN, OUT_OF_DOMAIN, averages, markdown
from colm_ds.evaluation.squad import SquadTask
from colm_ds.evaluation.task import EvaluationTask, Row, WithTokenizer
from colm_ds.process.progress import Progress
from colm_ds.run_folder.lock import RunLock
from colm_ds.selection import SINGLE_PROCESS, Exchange
from colm_ds.untrusted.printable import visible

SCORING_VERSION = 1
"""Version; raise it whenever the same model and questions would give different answers or scores."""

GROUPS: dict[str, tuple[str, ...]] = {
    "math": IN_DOMAIN + OUT_OF_DOMAIN,
    "superglue": tuple(WRITERS),
    "pretrain": ("wic", "copa", "squad", "perplexity"),
    "all": (*IN_DOMAIN, *OUT_OF_DOMAIN, *WRITERS, "squad"),
}
"""Groups of sets for `--tasks`; sets of a group without data are left out."""

MATH_SET = "MATH"
"""The word after `--tasks` for the set `math` alone; "math" is all six."""

TASK_NAMES = (*GROUPS["all"], "perplexity")


@dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        tasks: names of sets and groups.
        places: places of the sets' data.
        limit: maximum questions of each set (chunks of each source for perplexity), drawn by `seed`.
        seed: seed of that draw.
        max_new_tokens: maximum tokens of a math answer, in each pass.
        chunk_tokens: tokens of a chunk of text for perplexity.
        workers: programs that run at the same time on each rank.
        minimum: the weakest isolation of programs to accept; None: the sandbox's default.
        overwrite: discard existing answers.
        prompt: how math questions are asked.
    """

    tasks: tuple[str, ...]
    places: DataPlaces
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = 512
    chunk_tokens: int = 1024
    workers: int = 2
    minimum: str | None = None
    overwrite: bool = False
    prompt: QuestionPrompt = field(default_factory=QuestionPrompt)


@dataclass(frozen=True)
class Asked:
    """A set with its questions.

    Attributes:
        task: the set.
        questions: questions to ask, `[n]`.
        indices: their indices in the whole set, `[n]`.
        settings: settings that identify questions and answers.
    """

    task: EvaluationTask
    questions: list[Any]
    indices: list[int]
    settings: dict[str, Any] = field(default_factory=dict)


def task_names(words: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the sets that words name, in order and without repeats, and those named individually.

    Raises:
        ConfigError: for a word that is neither a set nor a group.
    """
    known = [*GROUPS, *TASK_NAMES, MATH_SET]
    for word in words:
        if word not in known:
            raise ConfigError(f"--tasks {word}: no such evaluation set. {nearest_key(word, known)}")
    meant = [(word,) if word not in (*GROUPS, MATH_SET) else GROUPS.get(word, ("math",)) for word in words]
    singly = {names[0] for word, names in zip(words, meant, strict=True) if word not in GROUPS}
    return list(dict.fromkeys(name for names in meant for name in names)), singly


def make_task(name: str, options: Options) -> EvaluationTask:
    """Make the set of a name."""
    if name in WRITERS:
        return CandidateTask(name, WRITERS[name])
    if name == "squad":
        return SquadTask()
    if name == "perplexity":
        return PerplexityTask(settings={"chunk_tokens": options.chunk_tokens})
    settings = {"max_new_tokens": options.max_new_tokens}
    return MathTask(name, workers=options.workers, minimum=options.minimum, prompt=options.prompt, settings=settings)


def find_sets(options: Options) -> tuple[list[tuple[EvaluationTask, str]], list[str]]:
    """Return the sets with their places, and the names of a group's sets without data; no model is needed.

    Raises:
        ConfigError: for an unknown set, a set that was named but has no data, or if no set has data.
        DataError: for a place that is not there.
    """
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit}: must be at least 1.")
    if options.chunk_tokens < 2:
        raise ConfigError(f"--chunk-tokens {options.chunk_tokens}: must be at least 2, as the first is not predicted.")
    names, singly = task_names(options.tasks)
    with_data, left_out = [], []
    for name in names:
        task = make_task(name, options)
        place = find_set(name, task.subpaths, options.places)
        if place is not None:
            if not is_store(place):
                find_places(place)
            with_data.append((task, place))
        elif name in singly:
            raise ConfigError(_no_data(name, task, options.places))
        else:
            left_out.append(name)
    if not with_data:
        raise ConfigError(f"no data for {', '.join(left_out)}. Give a folder with --data FOLDER, or NAME=PLACE.")
    return with_data, left_out


def read_tasks(options: Options, words: WithTokenizer, *, progress: bool = False) -> tuple[list[Asked], list[str]]:
    """Read the sets with their questions, and return the names of a group's sets without data.

    Args:
        options: options of the evaluation.
        words: holds the tokenizer that cuts texts into chunks, as every backend does.
        progress: show how many texts are tokenised, which are all of them, whatever the limit.

    Raises:
        ConfigError: as `find_sets`.
        DataError: for data that cannot be read.
    """
    with_data, left_out = find_sets(options)
    asked = []
    for task, place in with_data:
        if isinstance(task, PerplexityTask) and is_store(place):
            questions: list[Any] = task.read_store(place, words)
        else:
            texts = progress and isinstance(task, PerplexityTask)
            questions = task.read(_counted(read_place(place), texts), words)
        if not questions:
            raise DataError(
                f"{place}: no questions of {task.name} in it. Give another place with --data {task.name}=PLACE."
            )
        indices = subset([task.group(question) for question in questions], options.limit, options.seed)
        chosen = [questions[index] for index in indices]
        settings = {
            **task.settings,
            "limit": options.limit,
            "seed": options.seed if options.limit is not None else None,
            "questions": fingerprint(chosen),
            "scoring_version": SCORING_VERSION,
        }
        asked.append(Asked(task, chosen, indices, settings))
    return asked, left_out


def _counted(records: Records, shown: bool) -> Records:
    with Progress("tokenising texts", None, "rows", shown=shown) as bar:
        for record in records:
            yield record
            bar.advance()


def _no_data(name: str, task: EvaluationTask, places: DataPlaces) -> str:
    where = f"in {places.folder} none of {', '.join(task.subpaths)} exists" if places.folder else "no folder was given"
    return f"{name}: no data: {where}. Write --data {name}=FILE or --data {name}=hub:NAME:CONFIG:SPLIT."


def evaluate(
    backend: Backend,
    options: Options,
    folder: EvaluationFolder,
    *,
    title: str,
    model: Mapping[str, Any],
    sets: tuple[list[Asked], list[str]] | None = None,
    facts: Mapping[str, Any] | None = None,
    exchange: Exchange = SINGLE_PROCESS,
    rank: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Ask all sets, resuming from the answers in the folder; all ranks call it together.

    Args:
        backend: the model, complete on every rank.
        options: options of the evaluation.
        folder: folder for answers and results.
        title: title of the tables.
        model: facts that identify the model.
        sets: from `read_tasks`; None: they are read here.
        facts: further entries of `results.json`, such as the environment.
        exchange: the ranks.
        rank: this rank.
        device: where the process group's collectives expect their tensors.
        say: called with messages for the user, on rank 0.
        progress: show a progress bar, on rank 0.

    Returns:
        Content of `results.json` on rank 0; None on the others.

    Raises:
        ConfigError: if another process writes to the folder, or it holds answers of another evaluation.
    """
    asked, left_out = together(lambda: sets or read_tasks(options, backend), device)
    identity = {**model, "backend": backend.name}
    settings = {each.task.name: each.settings for each in asked}
    say = say if say is not None and rank == 0 else _nothing
    lock = together(lambda: RunLock(folder.path, "--out", "answers") if rank == 0 else None, device)
    try:
        together(lambda: folder.start(identity, settings, overwrite=options.overwrite) if rank == 0 else None, device)
        return _ask_all(
            asked,
            backend,
            folder,
            {"title": title, "model": identity, **(facts or {}), "left_out": left_out},
            exchange=exchange,
            rank=rank,
            device=device,
            say=say,
            progress=progress,
        )
    finally:
        if lock is not None:
            lock.release()


def _ask_all(
    asked: Sequence[Asked],
    backend: Backend,
    folder: EvaluationFolder,
    head: Mapping[str, Any],
    *,
    exchange: Exchange,
    rank: int,
    device: torch.device | None,
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any] | None:
    """Ask set by set; return the content of `results.json` on rank 0."""
    results: dict[str, Any] | None = None
    for each in asked:
        done = together(lambda name=each.task.name: folder.collect(name) if rank == 0 else {}, device)  # type: ignore[misc]
        started = time.perf_counter()
        num_before = _ask(each, done, backend, folder, exchange=exchange, rank=rank, say=say, progress=progress)
        exchange.sum(torch.zeros(1))  # every rank has written its part
        if rank == 0:
            rows = _all_rows(each, folder)
            timing = {"seconds": time.perf_counter() - started, "taken_over": num_before}
            results = _write_results(each, rows, timing, folder, head)
    return results


def _nothing(message: str) -> None:
    """Say nothing."""


def _ask(
    each: Asked,
    done: Mapping[int, Row],
    backend: Backend,
    folder: EvaluationFolder,
    *,
    exchange: Exchange,
    rank: int,
    say: Callable[[str], None],
    progress: bool,
) -> int:
    """Ask this rank's share of the unanswered questions; return how many had an answer already."""
    task = each.task
    known = torch.tensor([float(index in done) for index in each.indices])
    open_places = (exchange.broadcast(known) == 0).nonzero().flatten().tolist()
    num_before = len(each.indices) - len(open_places)
    if num_before:
        say(f"{task.name}: resuming after {num_before} of {len(each.indices)} questions")
    if not open_places:
        return num_before
    sizes = torch.tensor([task.size(each.questions[place]) for place in open_places])
    home = home_ranks(sizes, exchange.num_processes).tolist()
    mine = [place for place, owner in zip(open_places, home, strict=True) if owner == rank]
    label = task.name if exchange.num_processes == 1 else f"{task.name}, rank 0 of {exchange.num_processes}"
    bar = Progress(label, len(mine), "questions", shown=progress and rank == 0)
    num_right = 0
    with bar, folder.open_part(task.name, rank) as part:
        for batch in task.answer(backend, [each.questions[place] for place in mine]):
            append(part, [{"index": each.indices[mine[at]], **row} for at, row in batch])
            num_right += sum(bool(row.get("correct")) for _, row in batch)
            scored = any("correct" in row for _, row in batch)
            bar.advance(len(batch), f"accuracy {num_right / (bar.done + len(batch)):.1%}" if scored else "")
    return num_before


def _all_rows(each: Asked, folder: EvaluationFolder) -> list[Row]:
    """Return the rows of all questions of a set, in order."""
    rows = folder.collect(each.task.name)
    missing = [index for index in each.indices if index not in rows]
    if missing:
        raise DataError(
            f"{folder.path}: {len(missing)} answers of {each.task.name} are missing, the first to question "
            f"{missing[0]}. All ranks must see this folder: give a shared one with --out."
        )
    return [rows[index] for index in each.indices]


def _write_results(
    each: Asked, rows: Sequence[Row], timing: dict[str, Any], folder: EvaluationFolder, head: Mapping[str, Any]
) -> dict[str, Any]:
    """Add a set's numbers to those of the others, and write the tables."""
    earlier = folder.results()
    tasks: dict[str, Any] = dict(earlier.get("tasks", {}))
    before = tasks.get(each.task.name, {})
    if timing["taken_over"] == len(rows) and "seconds" in before:  # no question was asked
        timing = {key: before[key] for key in ("seconds", "taken_over") if key in before}
    tasks[each.task.name] = {**each.task.summarise(rows), **timing}
    ordered = {name: tasks[name] for name in TASK_NAMES if name in tasks}
    left_out = [name for name in head["left_out"] if name not in ordered]
    facts = {**earlier, **head}  # the isolation of programs, for example, is told by calls with such sets alone
    results = {**facts, "left_out": left_out, "tasks": ordered, "averages": averages(ordered)}
    folder.write_json("results.json", results)
    folder.write_text("results.md", markdown(results))
    return results


def print_results(results: Mapping[str, Any] | None, folder: EvaluationFolder) -> None:
    """Print the tables, and where they were written."""
    if results is not None:
        print(visible(markdown(results)))
        print(f"written to {folder.path / 'results.json'} and results.md")
