"""Build the command that runs a `colm-ds` subcommand on several ranks of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from colm_ds.errors import ConfigError

DEFAULT_PORT = 29617

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

_ACCELERATOR_PLUGINS = ("torch_npu", "torch_sdaa", "habana_frameworks", "torch_mlu", "torch_supa", "torch_xmlir")
"""Packages by which DeepSpeed knows accelerators that torch itself does not."""


def accelerator_environment() -> dict[str, str]:
    """Return what tells DeepSpeed to use the CPU where there is nothing else, so that no process warns of it."""
    if "DS_ACCELERATOR" in os.environ or any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS):
        return {}
    import torch

    return {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}


def ranks_command(
    arguments: Sequence[str],
    num_ranks: int = 1,
    *,
    port: int = DEFAULT_PORT,
    devices: str | None = None,
    script: str | None = None,
) -> list[str]:
    """Return the command line that runs a program on some ranks of this machine.

    Args:
        arguments: words after the program: with `colm-ds` its subcommand and that one's arguments.
        num_ranks: ranks; a single one needs no launcher, whose start takes seconds, unless `devices` are named.
        port: port of DeepSpeed's launcher.
        devices: GPUs to use, such as "0,1", one rank on each; None: the first `num_ranks`, of those that
            CUDA_VISIBLE_DEVICES names where it is set.
        script: a script to run; None: `colm-ds`.

    Raises:
        ConfigError: if CUDA_VISIBLE_DEVICES names fewer GPUs, or not by their numbers.
    """
    if num_ranks == 1 and devices is None:
        return [sys.executable, *([script] if script else ["-m", "colm_ds.cli"]), *arguments]
    devices = devices or _visible_devices(num_ranks)
    where = ["--num_gpus", str(num_ranks)] if devices is None else ["--include", f"localhost:{devices}"]
    program = [script] if script else ["--module", "colm_ds.cli"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", *where, "--master_port", str(port)]
    return [*launcher, *program, *arguments]


def _visible_devices(num_ranks: int) -> str | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, which DeepSpeed's launcher ignores beside `--num_gpus`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not visible or (os.environ | accelerator_environment()).get("DS_ACCELERATOR") == "cpu":
        return None
    names = [name.strip() for name in visible.split(",")]
    head = f"CUDA_VISIBLE_DEVICES = {visible}: "
    if not all(name.isdigit() for name in names):
        if len(names) == _num_gpus_of_machine():
            return None  # all that there are, as in a container
        raise ConfigError(f"{head}DeepSpeed's launcher takes GPUs by their numbers only. Write 0,1 or the like.")
    if len(names) < num_ranks:
        raise ConfigError(f"{head}{len(names)} GPUs for {num_ranks} ranks. Name more, or ask for fewer ranks.")
    return ",".join(names[:num_ranks])


def _num_gpus_of_machine() -> int | None:
    """Return the number of GPUs, hidden ones included; None if torch cannot tell."""
    import torch

    count = getattr(torch.cuda, "_raw_device_count_nvml", None)
    return None if count is None else int(count())


def add_num_gpus(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--num-gpus` and `--port` to a parser.

    Args:
        parser: parser of a subcommand.
        default: words that say what happens without `--num-gpus`.
    """
    parser.add_argument(
        "--num-gpus", type=_positive, metavar="N", help=f"ranks, each on a GPU if there are any (default: {default})"
    )
    parser.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, help=f"port of the launcher of several ranks ({DEFAULT_PORT})"
    )


def relaunch(subcommand: str, words: Sequence[str], options: argparse.Namespace) -> None:
    """Replace this process by DeepSpeed's launcher if `--num-gpus` asks for several ranks.

    Args:
        subcommand: its name.
        words: its arguments, as they were given.
        options: the same, parsed, with `num_gpus` and `port`; what `check` raises of them is said here, once.

    Raises:
        ConfigError: if this process was started as a rank already.
    """
    if options.num_gpus is None:
        return
    started = [name for name in _RANK_VARIABLES if name in os.environ]
    if started:
        raise ConfigError(
            f"--num-gpus {options.num_gpus}: this process is a rank already ({', '.join(started)} in the environment). "
            "Leave --num-gpus out under a launcher."
        )
    if options.num_gpus == 1:
        return
    if check := getattr(options, "check", None):
        check(options)
    os.environ.update(accelerator_environment())
    kept = _without(words, ("--num-gpus", "--port"))
    command = ranks_command([subcommand, *kept], options.num_gpus, port=options.port)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # signals reach the launcher, and its exit code is ours


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the words without some options and their values."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in names:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65000:  # runs at the same time take the next ones
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to 65000")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
