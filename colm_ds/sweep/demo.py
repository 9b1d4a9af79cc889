"""`colm-ds demo`: six arms on a generated mixture, a report, and in plain words what was won at which price."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import Attempts, ConfigError, PartFailedError
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import accelerator_environment, add_num_gpus, ranks_command
from colm_ds.recipes.recipe import BaseRecipe, change_of, expanded, load_recipe
from colm_ds.report import compare, load_run
from colm_ds.report.arms import Arm, make_arms
from colm_ds.report.facts import LOSS, Curve
from colm_ds.report.summary import uneven_times
from colm_ds.report.tables import Column, Table, compact, format_terminal
from colm_ds.run_folder.contents import CONFIG
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.read import is_finished
from colm_ds.sweep.jobs import call_and_wait, default_ranks, stopping_runs
from colm_ds.training.start_or_resume import check_finished

RECIPE = Path(str(files("colm_ds.sweep") / "demo.yaml"))

PLAIN, TOKENS, HALF, CONTROL, PAPER, LARGE = (
    "plain 32",
    "tokens 32 of 128",
    "plain 64, half the steps",
    "keep small + random",
    "CoLM 32 of 64",
    "plain 64",
)


@dataclass(frozen=True)
class DemoArm:
    """One run: its folder, its name and its changes to the recipe."""

    folder: str
    name: str
    changes: tuple[str, ...]
    part_of_steps: int = 1


ARMS = (
    DemoArm("plain_b", PLAIN, ("colm.selector=full", "colm.large_batch_size=32", "colm.coreset_size=32")),
    DemoArm("tokens", TOKENS, ("colm={large_batch_size: 128, coreset_size: 32, probe: {estimator: tokens}}",)),
    DemoArm("plain_half", HALF, ("colm.selector=full", "colm.large_batch_size=64", "colm.coreset_size=64"), 2),
    DemoArm("keep", CONTROL, ("colm.selector=keep_random",)),
    DemoArm("colm", PAPER, ()),
    DemoArm("plain_r", LARGE, ("colm.selector=full", "colm.large_batch_size=64", "colm.coreset_size=64")),
)
"""The arms; the first gives the price that the others are compared with."""

_SAME_PRICE = 0.05  # steps whose times are this near to each other cost the same, as far as one run can tell


def run_demo(out: Path, changes: Sequence[str], num_ranks: int, port: int) -> str:
    """Write the mixture, train the arms that are not finished, write the report; return the table and the answer.

    Args:
        out: folder of data, runs and report.
        changes: `key=value` changes to the recipe, for all arms.
        num_ranks: ranks of a run.
        port: port of the launcher.

    Raises:
        ConfigError: if a change is wrong, before anything is written, or a finished run has other settings.
        PartFailedError: if a run fails.
    """
    if own := [change for change in changes if change.startswith(("name=", "output_dir="))]:
        raise ConfigError(f"{own[0]}: the demo names its runs itself. Leave it out; --out names the folder of all.")
    data = out / "data"
    places = {"tokenizer": "tokenizer", "data.train": "train.jsonl", "data.heldout": "heldout.jsonl"}
    places["data.cache_dir"] = "tokens"  # the arms train on the same
    paths = [change_of(key, data / name) for key, name in places.items()]
    steps = load_recipe(RECIPE, [*paths, *changes], needs_files=False).steps
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps = {steps!r}: the demo counts steps, and not epochs. Write steps=N, a whole number.")
    words, finished, attempts = {}, set(), Attempts(str(out))
    for arm in ARMS:
        own = [f"name={json.dumps(arm.name)}", change_of("output_dir", out / arm.folder), *paths]
        own += [*arm.changes, *changes]
        words[arm] = [*own, f"steps={-(-steps // arm.part_of_steps)}"]
        recipe = load_recipe(RECIPE, words[arm], needs_files=False)
        if not recipe.overwrite and is_finished(recipe.output_dir):
            finished.add(arm)
            attempts.of(partial(_check_finished, recipe, num_ranks))
    attempts.raise_if_any()
    _say(f"writing the mixture to {data}")
    write_mixture(data)
    environment = os.environ | accelerator_environment()
    environment.setdefault("OMP_NUM_THREADS", "1")
    for arm in ARMS:
        if arm in finished:
            _say(f"{arm.name}: finished already")
            continue
        _say(f"{arm.name}, {num_ranks} rank{'s' * (num_ranks > 1)}")
        command = ranks_command(["train", str(RECIPE), *words[arm]], num_ranks, port=port)
        with stopping_runs():
            code = call_and_wait(command, environment)
        if code:
            raise PartFailedError(arm.name, code)
    runs = {arm.name: [load_run(out / arm.folder)] for arm in ARMS}
    arms = {arm.name: arm for arm in make_arms(runs)}
    shown, verdict, short = evidence(arms), answer(arms), too_short(steps)
    compare(runs, out, summary=" ".join([*verdict, *short, *shown]))  # which has the other caveats in its list
    sentences = [*shown, *verdict, *short, *caveats(list(arms.values()))]
    return "\n".join([format_terminal(budget_table(arms)), "", *sentences])


_MAY_DIFFER = (
    *("name", "made_by", "output_dir", "overwrite", "save_every", "keep_last", "resume", "monitor", "verbose"),
    *("tokenizer", "data.train", "data.heldout", "data.cache_dir", "data.num_processes"),
)
"""Keys without a say in what the demo reports of a run, its seconds and its memory included."""

_CURE = "give another --out, or overwrite=true to train all arms again."


def _check_finished(recipe: BaseRecipe, num_ranks: int) -> None:
    """Raise unless a finished run is what would be trained now, on as many ranks and measured as often."""
    check_finished(recipe, only=_MAY_DIFFER, cure=_CURE)
    ranks = read_object(Path(recipe.output_dir) / CONFIG).get("world_size")
    if ranks != num_ranks:
        where = f"{recipe.output_dir}: was trained on {ranks} ranks, not {num_ranks}"
        raise ConfigError(f"{where}. Add --num-gpus {ranks}, {_CURE}")


def budget_table(arms: dict[str, Arm]) -> Table:
    """Make the table of arms at the same steps and at the same seconds: those that the first arm takes."""
    seconds = _seconds(arms[PLAIN])
    columns = [
        Column("arm"),
        Column("s a step", compact),
        Column("all its steps, s", compact),
        Column("held-out loss", LOSS),
        Column("small sources", LOSS),
        Column(f"loss after {seconds:.0f} s", LOSS),
    ]
    rows = []
    for arm in arms.values():
        small = arm.mean("heldout.small")
        rows.append([arm.name, arm.mean("step_s.median"), _seconds(arm), _end(arm), small, _at(arm, seconds)])
    note = "Seconds of training alone, evaluation not counted. A dash: that arm had already ended, or not yet begun."
    return Table("demo", "Equal steps, and equal seconds", columns, rows, note)


def evidence(arms: dict[str, Arm]) -> list[str]:
    """Say in sentences what each way to train ended with, and in what time."""
    plain, tokens, paper, large, control, half = (arms[name] for name in (PLAIN, TOKENS, PAPER, LARGE, CONTROL, HALF))
    won, all_of_it = _end(plain) - _end(tokens), _end(plain) - _end(large)
    return [
        f"Choosing 32 of 128 by token embeddings takes {_ratio(tokens, plain)} of the time of {PLAIN} and ends "
        f"{_lower(won)}: {_end(tokens):.3f} against {_end(plain):.3f}.",
        f"{LARGE} takes {_ratio(large, plain)} of the time and ends {_lower(all_of_it)}; with the seconds of {PLAIN} "
        f"(half its steps) it ends at {_end(half):.3f}.",
        f"{PAPER}, which passes the model over all 64, takes {_ratio(paper, plain)} of the time and ends at "
        f"{_end(paper):.3f}; the same shares of the sources chosen at random ({CONTROL}) end at {_end(control):.3f}.",
    ]


def answer(arms: dict[str, Arm]) -> list[str]:
    """Say what was won and at what price."""
    plain, tokens, paper, large, control = (arms[name] for name in (PLAIN, TOKENS, PAPER, LARGE, CONTROL))
    all_of_it = _end(plain) - _end(large)
    best = min((plain, tokens, paper, control), key=_end)
    if best is plain:
        return ["No choice of 32 was better here than any 32: train plainly."]
    gained = _end(plain) - _end(best)
    share = f", {gained / all_of_it:.0%} of what doubling the batch gains" if 0 < gained <= all_of_it else ""
    lines = [
        f"Of those that train on 32 examples a step {best.name} did best: {_lower(gained)} than {PLAIN}{share}, "
        f"{_price(best, plain)}."
    ]
    if best is control:
        lines.append("It looks at no gradient and no token: which examples of a source were taken did not matter here.")
    return lines


def too_short(steps: int) -> list[str]:
    """Say so if there were too few steps for an answer."""
    enough = load_recipe(RECIPE, needs_files=False).steps
    few = isinstance(enough, int) and 2 * steps < enough
    short = f"{steps} steps are too few for an answer: losses still fall fast. The demo's own are {enough}."
    return [short] if few else []


def caveats(arms: Sequence[Arm]) -> list[str]:
    """Say what the demo cannot know."""
    uneven = "Times of steps varied more than twofold within a run: something else used the machine, ratios say little."
    return [
        *([uneven] if uneven_times(arms) else []),
        "One seed, a small model from random weights, a mixture made here: `colm-ds check RECIPE` measures your own.",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add folder, changes and ranks."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes, for example steps=60")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything (default: runs/demo)")
    add_num_gpus(parser, "one per GPU, two without any")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its table and its answer; return the exit code: 3 if it was stopped, else 0."""
    started, out = time.monotonic(), Path(expanded(options.out))
    try:
        print(run_demo(out, options.overrides, options.num_gpus or default_ranks(), options.port))
    except KeyboardInterrupt:
        print("demo: stopped; the same command resumes", file=sys.stderr)
        return ExitCode.STOPPED
    _say(f"done in {time.monotonic() - started:.0f} s; open {out}/report.html")
    return ExitCode.DONE


def _curve(arm: Arm) -> Curve:
    return arm.curves(lambda facts: facts.heldout()).get("overall", Curve())


def _seconds(arm: Arm) -> float:
    curve = _curve(arm)
    return curve.seconds[-1] if curve.seconds else 0.0


def _at(arm: Arm, seconds: float) -> float | None:
    return _curve(arm).at("seconds", seconds)


def _end(arm: Arm) -> float:
    loss = arm.mean("heldout.overall")
    return float("nan") if loss is None else loss


def _ratio(arm: Arm, other: Arm) -> str:
    one, two = arm.mean("step_s.median"), other.mean("step_s.median")
    return f"{one / two:.0%}" if one and two else "an unknown part"


def _price(arm: Arm, other: Arm) -> str:
    """Say what a step costs more or less than another's, as measured."""
    one, two = arm.mean("step_s.median"), other.mean("step_s.median")
    if not one or not two:
        return "at an unknown price"
    if abs(one / two - 1) <= _SAME_PRICE:
        return "at the same price"
    return f"and its step took {abs(one / two - 1):.0%} {'more' if one > two else 'less'} time"


def _lower(difference: float) -> str:
    return f"{abs(difference):.3f} nats per token {'lower' if difference >= 0 else 'higher'}"


def _say(message: str) -> None:
    print(f"demo: {message}", flush=True)
