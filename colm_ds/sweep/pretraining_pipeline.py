"""`colm-ds pretrain`: prepare, train, evaluate and report in one command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from colm_ds.errors import ConfigError, PartFailedError
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import accelerator_environment, add_num_gpus, ranks_command
from colm_ds.recipes.recipe import PretrainingRecipe, load_recipe
from colm_ds.run_folder.read import is_finished, load_run
from colm_ds.training.prepare_command import places_and_changes
from colm_ds.untrusted.printable import visible


def run_all(
    recipe_path: str,
    overrides: Sequence[str],
    *,
    data: Sequence[str],
    megabytes: float,
    questions: str | None,
    num_ranks: int | None,
    port: int,
) -> Path:
    """Run the unfinished parts of a run; return the page of its report.

    Args:
        recipe_path: the YAML file.
        overrides: `key=value` changes to it.
        data: files in the Pile's format; none: text is generated if the recipe's sources are generated ones, else
            the store must exist.
        megabytes: megabytes of generated text.
        questions: folder with WiC, COPA and SQuAD; None: perplexity only.
        num_ranks: ranks that train and evaluate; None: one per GPU, two without any.
        port: port of the launcher.

    Raises:
        ConfigError: if recipe, data and existing files contradict each other.
        PartFailedError: if a program fails.
    """
    recipe = load_recipe(recipe_path, overrides)
    if not isinstance(recipe, PretrainingRecipe):
        raise ConfigError(f"{recipe_path}: not a recipe for pretraining (task: pretraining).")
    if questions is not None and not Path(questions).is_dir():
        raise ConfigError(f"QUESTIONS = {questions}: no such folder.")
    arguments = [recipe_path, *overrides]
    from colm_ds.report import compare
    from colm_ds.report.tables import format_terminal
    from colm_ds.sweep.jobs import default_ranks
    from colm_ds.training.start_or_resume import check_finished

    num_ranks = num_ranks or default_ranks()
    training = ranks_command(["train", *arguments], num_ranks, port=port)
    _prepare(recipe, arguments, data, megabytes)
    out = Path(recipe.output_dir)
    if is_finished(out) and not recipe.overwrite:
        check_finished(recipe)
        _check_store(recipe, out)
        _say(f"{out}: already trained")
    else:
        _say(f"training, {num_ranks} rank{'s' * (num_ranks > 1)}")
        _call("training", training)
    _say("evaluating")
    places = [*([questions] if questions else []), f"perplexity={recipe.data.store}"]
    overwriting = ["--overwrite"] if recipe.overwrite else []
    tasks = ["--tasks", "pretrain" if questions else "perplexity"]
    words = ["evaluate", str(out), *tasks, "--data", *places, *overwriting]
    _call("evaluation", ranks_command(words, num_ranks, port=port))
    report = compare([load_run(out)], out)
    if "perplexity" in report.tables:
        print(format_terminal(report.tables["perplexity"]))
    return report.files["html"]


def _prepare(recipe: PretrainingRecipe, arguments: Sequence[str], data: Sequence[str], megabytes: float) -> None:
    from colm_ds.data.generated.text import SHARES, write_text
    from colm_ds.data.pretraining.token_store import MANIFEST

    store = Path(recipe.data.store)
    places = list(data)
    if not places and recipe.data.weights and set(recipe.data.weights) <= set(SHARES):
        text = store.with_name("text")
        _say(f"writing {megabytes:g} MB of generated text to {text}")
        write_text(text, megabytes)
        places = [str(text)]
    if places:
        _say(f"preparing {store}")
        _call("preparation", ranks_command(["prepare", *arguments, "--data", *places]))
    elif (store / MANIFEST).exists():
        _say(f"{store}: already prepared")
    else:
        raise ConfigError(
            f"data.store = {store}: not prepared, and no data was named. Name files in the Pile's format: "
            "--data FILE_OR_FOLDER ..., or with launch/pretrain.sh in the variable DATA."
        )


def _check_store(recipe: PretrainingRecipe, out: Path) -> None:
    """Raise unless the finished run was trained on the store that it is measured on."""
    from colm_ds.data.pretraining.token_store import TokenStore
    from colm_ds.training.start_or_resume import check_same_data

    digest = load_run(out).config.get("store_digest")
    if digest is not None:
        now = {"place": recipe.data.store, "digest": TokenStore(recipe.data.store).digest}
        before = {"place": "the store of the run", "digest": str(digest)}
        check_same_data(f"{out}/config.json", {"data.store": before}, {"data.store": now})


def _call(what: str, command: Sequence[str]) -> None:
    from colm_ds.sweep.jobs import call_and_wait, stopping_runs

    with stopping_runs():
        code = call_and_wait(command, os.environ | accelerator_environment())
    if code:
        raise PartFailedError(what, code)


def _say(message: str) -> None:
    print(visible(f"pretrain: {message}"), file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes, data and ranks."""
    parser.add_argument("recipe", help="YAML file, for example pretrain/recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--data", nargs="+", default=[], metavar="PLACE", help=".jsonl, .jsonl.gz, .jsonl.zst, folders")
    parser.add_argument("--megabytes", type=float, default=4.0, help="megabytes of generated text (default: 4)")
    parser.add_argument("--questions", metavar="FOLDER", help="with WiC, COPA and SQuAD (default: perplexity only)")
    add_num_gpus(parser, "one per GPU, two without any")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run what is left of a pretraining run; return the exit code of the part that failed, or 0.

    Raises:
        ConfigError: see `run_all`.
    """
    places, changes = places_and_changes(options.data)
    try:
        page = run_all(
            options.recipe,
            [*options.overrides, *changes],
            data=places,
            megabytes=options.megabytes,
            questions=options.questions,
            num_ranks=options.num_gpus,
            port=options.port,
        )
    except KeyboardInterrupt:
        print("pretrain: stopped; the same command resumes", file=sys.stderr)
        return ExitCode.STOPPED
    _say(f"done; open {page}")
    return ExitCode.DONE
