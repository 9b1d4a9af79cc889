"""`colm-ds evaluate`: run an evaluation from the command line, on every rank of a launcher or alone."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colm_ds.data.sets import find_set
from colm_ds.distributed.agreement import meet, single_process_environment, together, wait_for_ranks
from colm_ds.distributed.exchange import make_exchange
from colm_ds.errors import CoLMError, ConfigError
from colm_ds.evaluation.backend import Backend, TransformersBackend
from colm_ds.evaluation.evaluate import (
    GROUPS,
    TASK_NAMES,
    Options,
    evaluate,
    find_sets,
    print_results,
    read_tasks,
    task_names,
)
from colm_ds.evaluation.model_source import LoadedTokenizer, ModelSource, describe, find_model, load, read_recipe
from colm_ds.evaluation.perplexity import PerplexityTask, is_store
from colm_ds.evaluation.question_files import parse_places
from colm_ds.evaluation.question_log import EvaluationFolder
from colm_ds.evaluation.question_prompt import AUTO, QuestionPrompt, prompt_of_run, read_prompt
from colm_ds.evaluation.sandbox import sandbox
from colm_ds.process.cores import local_ranks, usable_cores
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import add_num_gpus
from colm_ds.recipes.model import DTYPES, quiet_libraries
from colm_ds.run_folder.environment import describe_environment
from colm_ds.untrusted.printable import visible

DEFAULT_CHUNK_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: what to score, on which questions, and how."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"sets: {', '.join(TASK_NAMES)}\n" + "\n".join(
        f"{group}: {', '.join(names)}" for group, names in GROUPS.items()
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_RUN", help="folder of a run, adapter or model; a hub name; or package:NAME")
    add(
        "--tasks",
        help="sets and groups, separated by commas (default: pretrain for a run of a pretraining recipe, else math; "
        "finetune/evaluate.py always math, pretrain/evaluate.py always pretrain)",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="a folder, and NAME=FILE or NAME=hub:NAME:CONFIG:SPLIT; perplexity=STORE: held-out chunks of a token "
        "store (default for a pretraining run: its own)",
    )
    add("--out", help="folder for answers and results (default: RUN/evaluation, or runs/evaluation/MODEL)")
    add(
        "--limit",
        type=int,
        help="maximum questions of each set, drawn with --seed; for perplexity chunks of a source",
    )
    add("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    add("--overwrite", action="store_true", help="discard existing answers instead of resuming from them")
    add(
        "--prompt",
        default=AUTO,
        help="how math questions are asked: alpaca, chat (the tokenizer's chat template), plain, or a template with "
        "{instruction}, in which \\n is a line break (default: as the run was trained, alpaca for other models)",
    )
    add("--dtype", choices=sorted(DTYPES), help="precision (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--gguf-file", help="GGUF file in the base model's folder")
    add("--base", help="base model of an adapter, if it is not where the adapter says")
    add("--tokenizer", help="tokenizer folder or hub name (default: the model's)")
    add("--max-new-tokens", type=int, default=512, help="maximum tokens of a math answer in each pass (default: 512)")
    add("--max-tokens", type=int, default=16384, help="maximum padded tokens of a batch: the lever on memory")
    add("--max-examples", type=int, default=64, help="maximum sequences of a batch (default: 64)")
    add("--chunk-tokens", type=int, help="tokens of a chunk for perplexity (default: the run's, else 1024)")
    add("--workers", type=int, default=2, help="programs that run at the same time on each rank (default: 2)")
    add(
        "--isolation",
        metavar="LEVEL",
        help="weakest isolation of model-written programs to accept: landlock (default) or namespaces",
    )
    add_num_gpus(parser, "the ranks of the launcher that started this, else one")
    add("--backend", help=argparse.SUPPRESS)  # removed; `_options` raises
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Evaluate as the command line says, under a launcher or alone.

    Exit codes: 0 done; 2 bad input (one message); 3 stopped; 1 anything else.
    """
    quiet_libraries()
    device = _join_ranks()
    try:
        _evaluate(options, device)
    except CoLMError as error:  # on this rank alone: the launcher ends the others
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the answers so far", file=sys.stderr, flush=True)
        sys.exit(ExitCode.STOPPED)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _join_ranks() -> torch.device:
    """Join the process group, if a launcher started several ranks; return this rank's device."""
    single_process_environment()
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // local_ranks()))
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        meet(lambda: dist.init_process_group(backend))
        wait_for_ranks()
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _evaluate(parsed: argparse.Namespace, device: torch.device) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    exchange = make_exchange(device)
    source = together(lambda: _source(parsed, device), device)
    options = together(lambda: _options(parsed, source), device)
    options = together(lambda: _with_its_store(options, source, parsed.chunk_tokens is None), device)
    together(lambda: find_sets(options), device)  # whatever is wrong is said before a model is loaded
    asks_math = bool(set(task_names(options.tasks)[0]) & set(GROUPS["math"]))
    if asks_math:
        options = together(lambda: replace(options, prompt=_prompt(parsed.prompt, source)), device)
        together(lambda: _try_sandbox(options.minimum), device)  # now, not in an hour
    words = LoadedTokenizer(source)
    sets = together(lambda: read_tasks(options, words, progress=rank == 0), device)
    if asks_math:
        together(lambda: options.prompt.turn_end(words.tokenizer), device)  # a chat template that cannot be used
    backend, model = together(lambda: _backend(parsed, source, words.tokenizer, device), device)
    folder = EvaluationFolder(parsed.out or _default_folder(parsed.model, source))
    facts = {"environment": describe_environment(), "world_size": exchange.num_processes}
    if asks_math:
        facts["prompt"] = options.prompt.style
        facts["isolation"] = sandbox.detect().describe()
    results = evaluate(
        backend,
        options,
        folder,
        title=f"Evaluation of {parsed.model}",
        model=describe(source, model),
        sets=sets,
        facts=facts,
        exchange=exchange,
        rank=rank,
        device=device,
        say=lambda message: print(visible(message), file=sys.stderr, flush=True),
        progress=True,
    )
    print_results(results, folder)


def _options(parsed: argparse.Namespace, source: ModelSource) -> Options:
    if parsed.backend is not None:
        raise ConfigError(
            f"--backend {parsed.backend}: this option was removed, transformers answers every question. Leave it out. "
            "For speed write the model with colm-ds export RUN --merge and give its folder to vLLM, or to lm-eval's "
            "model vllm."
        )
    words = _default_tasks(source) if parsed.tasks is None else parsed.tasks
    tasks = tuple(word.strip() for word in words.split(",") if word.strip())
    task_names(tasks)  # raise before a model is loaded
    return Options(
        tasks=tasks,
        places=parse_places(parsed.data, TASK_NAMES),
        limit=parsed.limit,
        seed=parsed.seed,
        max_new_tokens=parsed.max_new_tokens,
        chunk_tokens=DEFAULT_CHUNK_TOKENS if parsed.chunk_tokens is None else parsed.chunk_tokens,
        workers=parsed.workers,
        minimum=None if parsed.isolation is None else sandbox.check_level(parsed.isolation),
        overwrite=parsed.overwrite,
    )


def _default_tasks(source: ModelSource) -> str:
    """Return the default of `--tasks`, as described in its help."""
    recipe = {} if source.run is None else read_recipe(source.run)
    return "pretrain" if recipe.get("task") == "pretraining" else "math"


def _prompt(asked: str, source: ModelSource) -> QuestionPrompt:
    """Return how math questions are asked, as described in the help of `--prompt`."""
    trained = None
    if asked in (AUTO, "chat") and source.run is not None:
        try:
            trained = prompt_of_run(source.run)
        except ConfigError:
            if asked == AUTO:
                raise
    if asked == AUTO:
        return trained or QuestionPrompt()
    if asked == "chat" and trained is not None and trained.style == "chat":
        return trained  # with the variables of its template
    return QuestionPrompt(read_prompt(asked))


def _try_sandbox(minimum: str | None) -> None:
    """Run a one-line program as the answers to math questions will be run.

    Raises:
        ConfigError: if this machine cannot isolate programs.
    """
    try:
        (result,) = sandbox.run_programs(["print(1)"], minimum=minimum)
        problem = result.message if result.status == "refused" else ""
    except ConfigError as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"--tasks: math sets run programs that the model writes: {problem} Or leave the math sets out, as in "
            "--tasks superglue,squad."
        )


def _with_its_store(options: Options, source: ModelSource, may_choose_length: bool) -> Options:
    """Set perplexity for a pretraining run: chunks of its length, and its own store unless a place is given."""
    data = None if source.run is None else read_recipe(source.run).get("data")
    if not isinstance(data, dict) or not isinstance(store := data.get("store"), str):
        return options
    if may_choose_length:
        options = replace(options, chunk_tokens=int(data.get("chunk_tokens", options.chunk_tokens)))
    if is_store(store) and find_set("perplexity", PerplexityTask().subpaths, options.places) is None:
        named = {**options.places.named, "perplexity": store}
        options = replace(options, places=replace(options.places, named=named))
    return options


def _source(parsed: argparse.Namespace, device: torch.device) -> ModelSource:
    dtype = parsed.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return find_model(
        parsed.model, gguf_file=parsed.gguf_file, base=parsed.base, tokenizer=parsed.tokenizer, dtype=dtype
    )


def _backend(
    parsed: argparse.Namespace, source: ModelSource, tokenizer: Any, device: torch.device
) -> tuple[Backend, Any]:
    """Load the model; return the backend around it, and the model itself."""
    model, _ = load(source, tokenizer)
    model = model.to(device)
    return TransformersBackend(
        model, tokenizer, device, max_tokens=parsed.max_tokens, max_examples=parsed.max_examples
    ), model


def _default_folder(name: str, source: ModelSource) -> Path:
    if source.run is not None:
        return source.run / "evaluation"
    return Path("runs") / "evaluation" / name.strip("/").replace(":", "_").replace("/", "_")
