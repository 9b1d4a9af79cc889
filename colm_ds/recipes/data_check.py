"""Check what a recipe names as data, and the hub, before torch and the model are loaded; no tokenizer is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.config.colm import HELD_OUT
from colm_ds.data.choices import read_questions
from colm_ds.data.entries import DataEntry, as_entries
from colm_ds.data.formats import HUB, find_places
from colm_ds.data.hub import why_not_there
from colm_ds.data.parts import check_entries
from colm_ds.data.pretraining.token_store import TokenStore
from colm_ds.data.sets import DataPlaces, find_set
from colm_ds.errors import Attempts, CoLMError, ConfigError, Problems
from colm_ds.recipes.packages import WHAT_TO_WRITE, is_hub_name
from colm_ds.recipes.recipe import BaseRecipe, ChoiceRecipe, PretrainingRecipe, Recipe, load_recipe

ROWS_LOOKED_AT = 20_000
"""Rows that are checked: about half a second; what is wrong further on is said when they are read."""


def load_checked_recipe(path: str | Path, overrides: Sequence[str] = (), *, loads_model: bool = True) -> BaseRecipe:
    """Read and check a recipe, then its data, and whether the hub can be reached for what it names there.

    Args:
        path: the recipe.
        overrides: `key=value` changes.
        loads_model: whether the model is to be loaded, or the tokenizer only.

    Raises:
        ConfigError, DataError: as `load_recipe`, `check_data` and `check_hub`.
    """
    recipe = load_recipe(path, overrides)
    check_data(recipe)
    check_hub(recipe, loads_model=loads_model)
    return recipe


def check_data(recipe: BaseRecipe) -> None:
    """Check what a recipe names as data: that it is there, is of a schema, has good rows, and enough of them.

    Data of the hub is left for later, when it is loaded.

    Raises:
        ConfigError, DataError: naming key, or file and line; several problems in one message.
    """
    attempts = Attempts(f"the data of {recipe.where}")
    if isinstance(recipe, PretrainingRecipe):
        attempts.of(lambda: TokenStore(recipe.data.store))
    elif isinstance(recipe, ChoiceRecipe):
        _check_choices(recipe, attempts)
    elif isinstance(recipe, Recipe):
        _check_rows(recipe, attempts)
    try:
        attempts.raise_if_any()
    except CoLMError as error:
        made_by = f"\n  The files of this recipe are made by: {recipe.made_by}" if recipe.made_by else ""
        raise type(error)(f"{error}{made_by}") from None


def check_hub(recipe: BaseRecipe, *, loads_model: bool = True) -> None:
    """Raise a ConfigError for models, tokenizers and data sets of a hub that cannot be reached, or has none such."""
    problems = Problems(recipe.where)
    models = {"model.name_or_path": recipe.model.name_or_path, "tokenizer": recipe.tokenizer}
    if recipe.tokenizer is not None and not loads_model:
        del models["model.name_or_path"]
    for key, place in models.items():
        if place is not None and is_hub_name(place) and (why := why_not_there(place)):
            problems.add(key, place, f"no folder here, {why}", WHAT_TO_WRITE)
    data = getattr(recipe, "data", None)
    for key in ("train", "heldout"):
        for place in _places(getattr(data, key, None)):
            if place.startswith(HUB) and (why := why_not_there(place.removeprefix(HUB).split(":")[0], "dataset")):
                problems.add(f"data.{key}", place, why, "Name a file or folder.")
    problems.raise_if_any()


def _places(data: Any) -> list[str]:
    """Return the places of `data.train` or `data.heldout`, whatever their form."""
    given = data if isinstance(data, list) else [] if data is None else [data]
    return [str(getattr(one, "path", one)) for one in given]


def _check_rows(recipe: Recipe, attempts: Attempts) -> None:
    data, target = recipe.data, recipe.colm.target.data
    most = max(ROWS_LOOKED_AT, recipe.colm.large_batch_size)
    num_rows = attempts.of(lambda: check_entries(entries_of(recipe, data.train), most))
    if num_rows is not None:
        rows = min(num_rows, data.limit or num_rows)
        attempts.of(lambda: check_large_batch(recipe, rows))
    attempts.of(lambda: chat_template_of(recipe))
    if data.heldout is not None:
        heldout = entries_of(recipe, data.heldout)
        if attempts.of(lambda: check_entries(heldout, most)) is not None:
            attempts.of(lambda: check_apart(entries_of(recipe, data.train), heldout))
    if recipe.colm.needs_target and target not in (None, HELD_OUT):
        attempts.of(lambda: check_entries(entries_of(recipe, target), most))


def _check_choices(recipe: ChoiceRecipe, attempts: Attempts) -> None:
    data = recipe.data

    def count(split: str, given: Any) -> int | None:
        """Return the number of questions, None if it is not known yet."""
        place = place_of_split(data.folder, data.task, split) if data.folder is not None else given
        if place is None:
            return None
        places = find_places(place)
        numbers = [len(read_questions(data.task, one, split)) for one in places if not str(one).startswith(HUB)]
        return sum(numbers) if len(numbers) == len(places) else None

    num_rows = attempts.of(lambda: count("train", data.train))
    if num_rows is not None:
        rows = min(num_rows, data.limit or num_rows)
        attempts.of(lambda: check_large_batch(recipe, rows))
    attempts.of(lambda: count("validation", data.heldout))


def entries_of(recipe: Recipe, data: Any) -> list[DataEntry]:
    """Return an entry for each place of `data.train`, `data.heldout` or `colm.target.data`."""
    return as_entries(data, recipe.data.schema, recipe.data.prompt, recipe.data.source_key)


def place_of_split(folder: str, task: str, split: str) -> str:
    """Return the file of a classification task's split in the folder of all tasks.

    Raises:
        ConfigError: if there is none.
    """
    subpaths = tuple(f"{above}{task}/{split}" for above in ("superglue/", ""))
    place = find_set(task, subpaths, DataPlaces(folder))
    if place is None:
        raise ConfigError(
            f"data.folder = {folder}: holds none of {', '.join(subpaths)} (.jsonl, .jsonl.gz, ...). "
            "Name the folder that holds the tasks' folders, or files with data.train and data.heldout."
        )
    return place


def chat_template_of(recipe: Recipe) -> str | None:
    """Return the text of the recipe's chat template, None if it names no file.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = recipe.data.chat_template
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template = {path!r}: cannot be read: {error}. Name a text file in UTF-8."
        ) from None


def check_large_batch(recipe: BaseRecipe, num_examples: int, left_out: Mapping[str, int] | None = None) -> None:
    """Raise a ConfigError if there is less data than one large batch.

    Args:
        recipe: the recipe.
        num_examples: examples to train on.
        left_out: rows of the files that are not among them, by reason.
    """
    if recipe.colm.large_batch_size <= num_examples:
        return
    reasons = [f"{count:,} {reason}" for reason, count in (left_out or {}).items() if count]
    without = f", {', '.join(reasons)}" if reasons else ""
    raise ConfigError(
        f"colm.large_batch_size = {recipe.colm.large_batch_size}: more than the {num_examples} examples of "
        f"data.train{without}. Choose fewer, or add data{' or leave out less' if reasons else ''}."
    )


def check_apart(train: Iterable[DataEntry], heldout: Iterable[DataEntry]) -> None:
    """Raise a ConfigError if a file, or a split of a data set, is both trained on and held out."""

    def places(entries: Iterable[DataEntry]) -> dict[tuple[str, str], str]:
        named = {}
        for entry in entries:
            for place in find_places(entry.path):
                is_file = isinstance(place, Path) and not place.is_dir()
                key = str(place.resolve() if isinstance(place, Path) else place), "" if is_file else entry.split
                named[key] = str(place)
        return named

    trained = places(train)
    if both := [place for key, place in places(heldout).items() if key in trained]:
        raise ConfigError(
            f"data.heldout: {', '.join(both)} is trained on too. Name another file, or leave data.heldout out and set "
            "data.holdout_per_source."
        )
