"""The command `colm-ds`: everything that is done with recipes and runs, also by the scripts of finetune/ and pretrain/.

What a command needs is imported when it is chosen, so that `colm-ds --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from colm_ds.errors import CoLMError, ConfigError, PartFailedError
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import relaunch
from colm_ds.untrusted.printable import visible


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: its line in `colm-ds --help`.
        description: what its own help begins with.
        set_up: adds its arguments to a parser, and as default `run` the function that takes them; that one returns an
            exit code, or None for 0.
        example: words after its name, shown in its help.
    """

    summary: str
    description: str
    set_up: Callable[[argparse.ArgumentParser], None]
    example: str


_BROKEN_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended
_NOT_OURS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of disks and rights, which one line explains: what happened and to which file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; a `CoLMError` is shown as one message.

    Args:
        arguments: the command line; None: this process's. DeepSpeed's launcher puts `--local_rank=N` first.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run_command(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails as well
        return _BROKEN_PIPE


def _run_command(words: list[str]) -> int:
    name = next((word for word in words if not word.startswith("-")), "")
    if words and words[0].partition("=")[0] == "--print-completion":
        return _print_completion([*words[0].split("=")[1:], *words[1:]])
    if name not in COMMANDS:
        _show_commands(words)
    words.remove(name)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice at import about kernels that a CPU may use
    parser = _parser_of(name)
    options = parser.parse_intermixed_args(words)
    try:
        if name in ON_RANKS:
            relaunch(name, words, options)
        code: int | None = options.run(options)
    except PartFailedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.code
    except CoLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return code or ExitCode.DONE


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option for one that it does not know."""

    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        unknown = re.findall(r"--[\w.-]+", message) if "unrecognized" in message else []
        changes = [action for action in self._actions if action.metavar == "key=value"]
        if changes and (keys := [key for word in unknown for key in _keys_meant(word)]):
            value = re.search(rf"{re.escape(unknown[0])}(?:=|\s+)([^-\s]\S*)", message)
            written = " or ".join(f"{key}={value[1] if value else 'VALUE'}" for key in keys)
            super().error(f"{message}. Keys of a recipe are written without dashes: {written}")
        nearest = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        super().error(f"{message}. Did you mean {', '.join(nearest)}?" if nearest else message)


def _keys_meant(option: str) -> list[str]:
    """Return the keys of a recipe that an unknown option such as `--steps` or `--lr` may mean."""
    from colm_ds.recipes.recipe import Recipe, key_names

    name = option.removeprefix("--").replace("-", "_")
    names = key_names(Recipe)
    return [key for key in names if key == name] or [key for key in names if key.rsplit(".", 1)[-1] == name]


def _parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand."""
    command = COMMANDS[name]
    parser = _Parser(prog=f"colm-ds {name}", description=command.description, allow_abbrev=False)  # relaunch cuts words
    _set_up(parser, name)
    return parser


def _set_up(parser: argparse.ArgumentParser, name: str) -> None:
    """Add a subcommand's arguments and its example to a parser."""
    command = COMMANDS[name]
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the environment has it as LOCAL_RANK
    command.set_up(parser)
    example = f"Example: colm-ds {name} {command.example}".rstrip()
    parser.epilog = f"{example}\n\n{parser.epilog}" if parser.epilog else example
    if parser.formatter_class is argparse.HelpFormatter:
        parser.formatter_class = _ExampleAsItIs


class _ExampleAsItIs(argparse.HelpFormatter):
    """Fill paragraphs, but leave an example, which may be copied, in one line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example: ") else super()._fill_text(text, width, indent)


def _all_commands() -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of `colm-ds` itself, and its choice of subcommands."""
    parser = argparse.ArgumentParser(
        prog="colm-ds",
        description="Train on mini-batch coresets, and what goes with it.",
        epilog="colm-ds COMMAND --help explains a command, with an example.\n"
        'Completion in this shell: eval "$(colm-ds --print-completion bash)"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = sys.modules["colm_ds"].__version__  # which is loaded, and above this module
    parser.add_argument("--version", action="version", version=f"colm_ds {version}")
    parser.add_argument("--print-completion", metavar="SHELL", help="print a script for bash, zsh or another shell")
    return parser, parser.add_subparsers(required=True, metavar="COMMAND")


def _show_commands(words: Sequence[str]) -> NoReturn:
    """Show the help that was asked for, or say which word is no command and which is nearest; and exit."""
    parser, choices = _all_commands()
    for name, command in COMMANDS.items():
        choices.add_parser(name, help=command.summary, add_help=False)
    given = next((word for word in words if not word.startswith("-")), "")
    if given:
        nearest = difflib.get_close_matches(given, COMMANDS, n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Choose from {', '.join(COMMANDS)}."
        parser.error(f"COMMAND {given!r} is unknown. {hint}")
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(ExitCode.BAD_INPUT, "\ncolm-ds: give a COMMAND\n")
    parser.parse_args(words)
    parser.error("give a COMMAND")


def _print_completion(words: Sequence[str]) -> int:
    """Print the completion script of a shell; return the exit code."""
    try:
        import shtab
    except ImportError:
        print("colm-ds --print-completion needs shtab: pip install shtab", file=sys.stderr)
        return ExitCode.BAD_INPUT
    parser, choices = _all_commands()
    for name, command in COMMANDS.items():
        _set_up(choices.add_parser(name, help=command.summary), name)
    shell = words[0] if words else ""
    if shell not in shtab.SUPPORTED_SHELLS:
        print(f"--print-completion {shell!r}: choose from {', '.join(shtab.SUPPORTED_SHELLS)}.", file=sys.stderr)
        return ExitCode.BAD_INPUT
    print(shtab.complete(parser, shell))
    return ExitCode.DONE


def _set_up_train(parser: argparse.ArgumentParser) -> None:
    from colm_ds.training.train_command import add_arguments

    add_arguments(parser)


def _set_up_pretrain(parser: argparse.ArgumentParser) -> None:
    from colm_ds.sweep.pretraining_pipeline import add_arguments

    add_arguments(parser)


def _set_up_demo(parser: argparse.ArgumentParser) -> None:
    from colm_ds.sweep.demo import add_arguments

    add_arguments(parser)


def _set_up_prepare(parser: argparse.ArgumentParser) -> None:
    from colm_ds.training.prepare_command import add_arguments

    add_arguments(parser)


def _set_up_evaluate(parser: argparse.ArgumentParser) -> None:
    from colm_ds.evaluation.command_line import add_arguments

    add_arguments(parser)


def _set_up_sweep(parser: argparse.ArgumentParser) -> None:
    from colm_ds.sweep.sweep_command import add_arguments

    add_arguments(parser)


def _set_up_memory_report(parser: argparse.ArgumentParser) -> None:
    from colm_ds.sweep.memory_comparison import add_arguments

    add_arguments(parser)


def _set_up_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, in the order to show")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder for report.html, report.md and report.json (default: that of the run; of several runs: here)",
    )
    parser.add_argument("--max-arms", type=int, default=5, metavar="N", help="arms in a picture at most (default: 5)")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from colm_ds.report import compare, format_table, load_run

    runs = [load_run(folder) for folder in options.runs]
    out = options.out or (options.runs[0] if len(runs) == 1 else ".")
    comparison = compare(runs, out, max_arms=options.max_arms)
    print(format_table(runs))
    print(f"Pictures and details: {comparison.files['html']}")


def _set_up_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="show it as it is now and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> None:
    from colm_ds.report.watch import watch

    try:
        watch(options.run_folder, once=options.once, every_s=max(0.1, options.every))
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say, not even when closing


def _set_up_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="such as step_200 (default: what training wrote at its end, else the newest checkpoint that is whole)",
    )
    parser.add_argument("--merge", action="store_true", help="after LoRA: the whole model with the adapter added")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write, new or empty (default: in RUN/export)")
    parser.add_argument("--model", metavar="PATH", help="base model (default: where the run's recipe says)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer (default: the run's)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written (default: the recipe's)"
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # weights are read and written there, on any machine
    from colm_ds.export.run import export_run
    from colm_ds.recipes.model import quiet_libraries

    quiet_libraries()
    done = export_run(
        options.run_folder,
        tag=options.checkpoint,
        merge=options.merge,
        out=options.out,
        model=options.model,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
    )
    for reason in done.passed_over:
        print(visible(f"passed over {reason}"), file=sys.stderr)
    step = "" if done.step is None else f" after step {done.step}"
    print(f"{done.num_tensors} trained tensors{step}, from {done.source}")
    print(f"{done.folder}: {done.kind} in {done.dtype}")


def _set_up_preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--examples", type=int, default=3, help="examples to show (default: 3)")
    parser.add_argument("--no-coreset", action="store_true", help="do not load the model and select")
    parser.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is trained here
    from colm_ds.recipes.data_check import load_checked_recipe

    recipe = load_checked_recipe(  # first: a typo is said before torch is imported
        options.recipe, options.overrides, loads_model=not options.no_coreset
    )
    from colm_ds.recipes.model import quiet_libraries
    from colm_ds.training.preview import preview

    quiet_libraries()
    print(visible(preview(recipe, num_examples=options.examples, with_coreset=not options.no_coreset)))


def _set_up_check(parser: argparse.ArgumentParser) -> None:
    from colm_ds.check.check_command import add_arguments

    add_arguments(parser)


def _set_up_select(parser: argparse.ArgumentParser) -> None:
    from colm_ds.choose.select_command import add_arguments

    add_arguments(parser)


def _set_up_score(parser: argparse.ArgumentParser) -> None:
    from colm_ds.choose.score_command import add_arguments

    add_arguments(parser)


_ASSUMED_GPUS, _ASSUMED_GIB = 4, 48.0
"""GPUs that a plan is made for unless they are named."""


def _set_up_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--num-gpus", type=int, help=f"ranks (default: {_ASSUMED_GPUS}, whatever this machine has)")
    parser.add_argument("--gpu-memory-gib", type=float, help=f"memory of one GPU (default: {_ASSUMED_GIB:g})")
    parser.add_argument(
        "--reserve-gib", type=float, default=2.0, help="of it for context, communication, fragmentation (default: 2)"
    )
    parser.add_argument("--tflops", type=float, help="what a GPU achieves, in 1e12 operations a second: gives seconds")
    parser.add_argument(
        "--mean-length", type=float, help="mean tokens of an example: for time and replay (default: the longest)"
    )
    parser.add_argument("--label-share", type=float, default=1.0, help="share of tokens with labels (default: 1)")
    parser.add_argument(
        "--candidate-tokens", type=int, help="classification: tokens of a candidate (default: 1, of copa 16)"
    )
    parser.add_argument("--compare", action="store_true", help="peaks over a range of batch sizes (Fig. 2c)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here
    from colm_ds.recipes.recipe import load_recipe

    for name in ("num_gpus", "gpu_memory_gib", "label_share", "tflops", "mean_length"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: not a number of more than 0. Write one.")
    # before torch is imported, and for GPUs, whatever this machine computes in
    recipe = load_recipe(options.recipe, options.overrides, needs_files=False, auto_dtype="bfloat16")
    num_gpus, gpu_memory_gib = options.num_gpus or _ASSUMED_GPUS, options.gpu_memory_gib or _ASSUMED_GIB
    notes = []
    if options.num_gpus is None:
        notes.append(f"Assumed: {num_gpus} GPUs, whatever this machine has; --num-gpus N says how many will train.")
    if options.gpu_memory_gib is None:
        notes.append(f"Assumed: {gpu_memory_gib:g} GiB of memory each; --gpu-memory-gib G says how much.")
    from colm_ds.planner.job import job_of_recipe
    from colm_ds.planner.plan_report import comparison, format_comparison, format_plan, plan_report
    from colm_ds.recipes.model import quiet_libraries

    quiet_libraries()
    try:
        job = job_of_recipe(
            recipe,
            num_gpus,
            mean_length=options.mean_length,
            label_share=min(1.0, options.label_share),
            candidate_tokens=options.candidate_tokens,
        )
    except ConfigError as error:
        made_by = f"\n  The files of this recipe are made by: {recipe.made_by}" if recipe.made_by else ""
        raise ConfigError(f"{error}{made_by}") from None
    limits = {"gpu_memory_gib": gpu_memory_gib, "reserve_gib": options.reserve_gib}
    if job.micro_batch < recipe.micro_batch_size:
        notes.append(
            f"Micro-batches of {job.micro_batch}, not {recipe.micro_batch_size} as in the recipe: with {num_gpus} GPUs "
            f"a rank trains on no more than {job.micro_batch} of a step's {job.size}."
        )
    if options.compare:
        compared = comparison(job, **limits)
        text = "\n".join([*notes, "", format_comparison(compared)] if notes else [format_comparison(compared)])
        print(json.dumps({**compared, "notes": notes}, indent=2) if options.json else text)
    else:
        report = {"name": recipe.name, **plan_report(job, **limits, tflops=options.tflops), "notes": notes}
        text = "\n".join([recipe.name, *notes, format_plan(report)])
        print(json.dumps(report, indent=2) if options.json else visible(text))


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train as a recipe says, under a launcher or alone",
        "Train a language model on coresets of its batches, as a recipe says: fine-tuning, or pretraining on the store "
        "of colm-ds prepare.",
        _set_up_train,
        "finetune/recipes/smollm2_math_tokens.yaml data.train=MathInstruct.json --num-gpus 4",
    ),
    "pretrain": Command(
        "pretrain in one go: prepare the store, train, evaluate, report",
        "Prepare the token store, train, evaluate perplexity by source and write a report, on generated text if the "
        "recipe's sources are generated ones. The same command skips what is finished and resumes what is not.",
        _set_up_pretrain,
        "pretrain/recipes/cpu_pile5.yaml --data pile/ --num-gpus 4",
    ),
    "prepare": Command(
        "make the token store of a pretraining recipe",
        "Tokenise files in the Pile's format (.jsonl, .jsonl.gz, .jsonl.zst) into the store of a recipe (data.store), "
        "with a held-out part and, unless one is named, a tokenizer of its own. A run that was stopped resumes with "
        "the same command; the store does not depend on the number of processes.",
        _set_up_prepare,
        "pretrain/recipes/cpu_pile5.yaml --data pile/",
    ),
    "evaluate": Command(
        "score a run, adapter or model: math, SuperGLUE, SQuAD, perplexity",
        "Score a run, an adapter or a model: math by programs and words, SuperGLUE, SQuAD, perplexity per source.",
        _set_up_evaluate,
        "runs/smollm2_math --data math_eval/ --num-gpus 2",
    ),
    "sweep": Command(
        "run arms times seeds as a grid says, ending in a table",
        "Run every arm of a grid with every seed, one after another, several at a time or on given device groups. What "
        "is finished is skipped, a run that was stopped resumes, and one that fails does not stop the others. Writes "
        "results.md, results.json and the report (report.html, report.md, report.json) into the grid's folder.",
        _set_up_sweep,
        "finetune/grids/table1_cpu.yaml",
    ),
    "plan": Command(
        "what a recipe will need: memory of every phase, what fits, what to switch on, time",
        "Plan a run without a GPU, weights, data or network: peak memory per GPU by phase and part, the "
        "largest micro-batch that fits, what every switch saves, and the time of a step by the cost model.",
        _set_up_plan,
        "finetune/recipes/phi2_math.yaml --num-gpus 4 --gpu-memory-gib 48",
    ),
    "select": Command(
        "choose once from a recipe's data: CCS, SimCore, GORACS or vector sums, written as an index file",
        "Pass all training examples through the model once, choose some of them, and write an index file that recipes "
        "take as data.subset, with counts by source. Signals are kept in data.cache_dir. docs/selectors has a page for "
        "each method.",
        _set_up_select,
        "finetune/recipes/smollm2_math_tokens.yaml --method ccs --size 0.3 --out ccs.json data.train=MathInstruct.json",
    ),
    "score": Command(
        "losses of a recipe's data under a reference model, for the selector rho_loss",
        "Pass all training examples through a reference model once and write its losses as a table, which recipes take "
        "as colm.options.table with colm.selector=rho_loss.",
        _set_up_score,
        "finetune/recipes/smollm2_math_tokens.yaml --at runs/heldout --out il.pt data.train=MathInstruct.json",
    ),
    "check": Command(
        "what selection is worth on a recipe's model and data, measured before training: which way, or none",
        "Measure per-example gradients of all trained matrices on a few hundred examples, and how near to a large "
        "batch's gradient the coresets of every signal, scope and weights come, against as many random examples. Ends "
        "with one recommendation, also where nothing pays. Takes a forward and backward pass of every example, on one "
        "process. docs/WHEN.md says how to read the table.",
        _set_up_check,
        "finetune/recipes/smollm2_math_tokens.yaml data.train=MathInstruct.json",
    ),
    "preview": Command(
        "what a recipe would train on: sources, lengths, examples, one selected coreset",
        "Show without training: sources with counts and which are small, lengths, examples with the "
        "trained tokens between >>> and <<<, and what is kept of the first large batch, from which source and why.",
        _set_up_preview,
        "finetune/recipes/smollm2_math.yaml data.train=MathInstruct.json",
    ),
    "report": Command(
        "compare runs: a table here, report.html, report.md and report.json in a folder",
        "Compare finished or running runs: quality, time and memory side by side.",
        _set_up_report,
        "runs/plain runs/colm --out runs/compared",
    ),
    "watch": Command(
        "a run in the terminal while it trains: loss, rate, memory, coreset by source, time left",
        "Show a run from its metrics.jsonl, live until it ends, or a finished one. Needs the files only: "
        "the folder may be mounted from elsewhere. Without a terminal it prints a line of what is new every 30 s.",
        _set_up_watch,
        "runs/smollm2_math",
    ),
    "export": Command(
        "write a run's weights as a PEFT adapter or a Hugging Face model",
        "Write a run's weights for use without colm_ds: a PEFT adapter after LoRA, else a whole model. "
        "Needs the run's folder and the base model; no GPU and no launcher.",
        _set_up_export,
        "runs/smollm2_math --merge",
    ),
    "demo": Command(
        "train six arms on a small mixture made here: a table, a report, an answer; minutes on two cores",
        "Train a small Llama on a mixture that this command writes itself, plainly and on chosen coresets, at equal "
        "steps and at equal seconds, and say what was won at which price. Needs no data, no weights and no network. "
        "The same command skips what is finished and resumes what is not.",
        _set_up_demo,
        "--out runs/demo",
    ),
    "memory-report": Command(
        "compare plain and coreset training of a recipe for memory, time and quality",
        "Run plain b, CoLM b of r, tokens b of 4b and plain r with equal accumulation steps and with an equal "
        "micro-batch, then a few steps of further batch sizes, and compare them on one page. Runs that are finished "
        "are skipped.",
        _set_up_memory_report,
        "finetune/recipes/smollm2_math.yaml data.train=MathInstruct.json",
    ),
}

ON_RANKS = ("train", "evaluate")
"""Subcommands that run on every rank: with `--num-gpus` the command starts them by DeepSpeed's launcher."""


if __name__ == "__main__":
    sys.exit(main())
