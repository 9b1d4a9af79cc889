"""Run programs that a model wrote, isolated from the machine; see docs/SANDBOX.md for what each level stops."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import queue
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colm_ds.errors import CoLMError, ConfigError
from colm_ds.evaluation.sandbox.folders import remove_folder

LEVELS = ("landlock", "namespaces")
"""Levels of isolation, the weaker first; a machine that offers neither runs no program."""

_REMOVED_LEVEL = "rlimits"
_SERVER = Path(__file__).with_name("server.py")
_START = "import sys, runpy; del sys.path[0]; runpy.run_path(sys.argv[1], run_name='__main__')"
_START_S = 120.0  # a cold numpy on a busy machine
_END_S = 2.0
_GRACE_S = 40.0  # beyond a program's wall time, before its server is given up


class SandboxError(CoLMError):
    """The isolated interpreter does not start or is lost."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program, which may never start a process or a thread.

    Attributes:
        wall_s: seconds of wall time.
        cpu_s: whole seconds of CPU time.
        memory_mib: address space beyond the interpreter's own.
        files_mib: size of a file; with namespaces also of all files of its folder together.
        output_kib: output on each of stdout and stderr.
        open_files: open descriptors.
    """

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_mib: int = 1024
    files_mib: int = 16
    output_kib: int = 64
    open_files: int = 32

    def __post_init__(self) -> None:
        wrong = [name for name, value in asdict(self).items() if not value > 0]
        if wrong:
            raise ConfigError(f"Limits of the sandbox: {', '.join(wrong)} must be more than 0")


@dataclass(frozen=True)
class ProgramResult:
    """Result of one program.

    Attributes:
        status: "ok"; "error" (an exception or an exit status), "timeout", "memory" (MemoryError), "output" (printed too
            much), "killed" (by a signal, such as a crash), "refused" (could not be isolated, so it was not run).
        printed: its stdout, up to the limit, whatever the status.
        seconds: seconds of wall time.
        message: reason in one line; empty for "ok".
    """

    status: str
    printed: str
    seconds: float
    message: str


@dataclass(frozen=True)
class Isolation:
    """Means of isolating programs from this machine; each is "" if it works, else the reason why it does not.

    Attributes:
        namespaces: own user, mount, process, network, IPC and UTS namespaces with an empty root folder.
        seccomp: filter of system calls.
        landlock: denial of files outside the temporary folder.
        landlock_abi: version of Landlock, 0 for none.
        changes_user: whether programs run as nobody, since the evaluation runs as root.
    """

    namespaces: str
    seccomp: str
    landlock: str
    landlock_abi: int
    changes_user: bool

    @property
    def level(self) -> str | None:
        """Level of `LEVELS` that these means reach, None for neither; both need the filter of system calls."""
        if self.seccomp or (self.namespaces and self.landlock):
            return None
        return "landlock" if self.namespaces else "namespaces"

    def describe(self) -> dict[str, Any]:
        """Return the entries for result files: level, means in use, why others are not, kernel and Python."""
        means = {"namespaces": self.namespaces, "seccomp": self.seccomp, "landlock": self.landlock}
        return {
            "level": self.level,
            "used": [*(name for name, why_not in means.items() if not why_not), "resource limits"],
            "not_used": {name: why_not for name, why_not in means.items() if why_not},
            "landlock_abi": self.landlock_abi,
            "runs_as_nobody": self.changes_user,
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
        }


class _Server:
    """One fork server and its connection; used by one thread, which also starts it."""

    def __init__(self, limits: Limits, isolation: Isolation | None) -> None:
        """Start the server; without `isolation` it reports what the machine offers and exits."""
        self.wall_s = limits.wall_s
        means = (
            {} if isolation is None else {n: not getattr(isolation, n) for n in ("namespaces", "seccomp", "landlock")}
        )
        # Inside its namespaces a program gets a folder in memory; else it needs one here.
        self.base = None if means.get("namespaces") else os.path.realpath(tempfile.mkdtemp(prefix="colm_sandbox_"))
        numpy = importlib.util.find_spec("numpy")
        assert numpy is not None
        assert numpy.origin is not None
        settings = {
            **asdict(limits),
            **means,
            "base": self.base,
            "probe": isolation is None,
            "numpy_parent": str(Path(numpy.origin).parent.parent),
        }
        command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _START, str(_SERVER), json.dumps(settings)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},  # gives sets the same order in every run; cleared before any program
            start_new_session=True,
            bufsize=0,
        )
        try:
            self.hello = self._read(time.monotonic() + _START_S)
        except SandboxError as problem:
            said = self._stop().decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxError(f"the sandbox's server does not start: {said or problem}") from problem

    def _read(self, deadline: float) -> dict[str, Any]:
        """Return the next frame; raise `SandboxError` if none arrives."""
        size, content, head = 4, b"", True
        assert self.process.stdout is not None
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select_one(self.process.stdout.fileno(), left):
                raise SandboxError("no answer in time")
            part = os.read(self.process.stdout.fileno(), size - len(content))
            if not part:
                raise SandboxError("ended")
            content += part
            if len(content) == size and not head:
                return json.loads(content)
            if len(content) == size:
                (size,), content, head = struct.unpack(">I", content), b"", False

    def run(self, source: str) -> ProgramResult:
        """Return one program's result; raise `SandboxError` if the server is lost."""
        assert self.process.stdin is not None
        body = json.dumps({"source": source}).encode()
        frame = memoryview(struct.pack(">I", len(body)) + body)
        try:
            while frame:
                frame = frame[self.process.stdin.write(frame) :]
        except OSError as problem:
            raise SandboxError(f"the sandbox's server is gone: {problem}") from problem
        return ProgramResult(**self._read(time.monotonic() + self.wall_s + _GRACE_S))

    def _stop(self) -> bytes:
        """End the server with all its children and remove its folder; return its stderr."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # a server that waits for a program ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.stdin = None
        said = self.process.communicate()[1]
        deadline = time.monotonic() + _END_S
        while self.base is not None and not remove_folder(self.base) and time.monotonic() < deadline:
            time.sleep(0.02)  # a program that is being killed may still write
        return said

    def close(self) -> None:
        """End the server with all its children and remove its folder."""
        self._stop()


def select_one(descriptor: int, seconds: float) -> bool:
    """Return whether a descriptor becomes readable within `seconds`."""
    poller = select.poll()  # select() would fail for a descriptor above 1,023
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


@functools.cache
def detect() -> Isolation:
    """Try which means of isolation work on this machine, each in its own process; takes about half a second, once.

    Raises:
        SandboxError: if the isolated interpreter does not start at all.
    """
    server = _Server(Limits(), None)
    server.close()
    report = server.hello["report"]
    return Isolation(**report, landlock_abi=server.hello["landlock_abi"], changes_user=os.geteuid() == 0)


def check_level(minimum: str | None) -> str:
    """Return the weakest level to accept, one of `LEVELS`; None asks for "landlock".

    Raises:
        ConfigError: for a word that is not a level, or the removed level.
    """
    if minimum == _REMOVED_LEVEL:
        raise ConfigError(
            f"isolation {minimum!r}: this level was removed, since native code passes resource limits by. Leave it out "
            f"or write {LEVELS[0]!r}: programs then run behind Landlock and a filter of system calls, or not at all."
        )
    if minimum is not None and minimum not in LEVELS:
        raise ConfigError(f"isolation {minimum!r}: not a level of the sandbox. Known: {', '.join(LEVELS)}.")
    return minimum or LEVELS[0]


def require_isolation(minimum: str | None = None) -> Isolation:
    """Return this machine's isolation if it is at least as strong as required.

    Args:
        minimum: see `check_level`.

    Raises:
        ConfigError: if it is weaker, or `minimum` is not a level.
        SandboxError: if the isolated interpreter does not start.
    """
    needed, isolation = check_level(minimum), detect()
    if isolation.level is not None and LEVELS.index(isolation.level) >= LEVELS.index(needed):
        return isolation
    lacks = "; ".join(f"{name}: {why}" for name, why in isolation.describe()["not_used"].items())
    offers = "cannot isolate programs that a model wrote" if isolation.level is None else f"offers {isolation.level!r}"
    instead = "run on a Linux kernel with seccomp and Landlock" if isolation.level is None else f"ask for {LEVELS[0]!r}"
    raise ConfigError(
        f"isolation {needed!r} is needed, and this machine {offers} ({lacks}). Allow this user or container user "
        f"namespaces and seccomp filters, or {instead}."
    )


def run_programs(
    programs: Sequence[str], *, limits: Limits = Limits(), workers: int = 2, minimum: str | None = None
) -> list[ProgramResult]:
    """Run unreviewed programs, each in a fresh process and folder, with the strongest isolation available.

    Starting the workers takes a fraction of a second: give many programs at a time. Results do not depend on `workers`
    unless a program comes close to its time limits.

    Args:
        programs: Python sources.
        limits: limits of each program.
        workers: programs that run at the same time.
        minimum: weakest level of `LEVELS` to run with; None for "landlock".

    Returns:
        A result for each program, in order; a program cannot make this function raise.

    Raises:
        ConfigError: if the machine does not offer `minimum`, or an argument is wrong.
        SandboxError: if the isolated interpreter does not start.
    """
    check_level(minimum)
    if workers < 1:
        raise ConfigError(f"workers = {workers}: must be at least 1.")
    if not programs:
        return []
    return run_isolated(programs, limits, workers, require_isolation(minimum))


def run_isolated(programs: Sequence[str], limits: Limits, workers: int, isolation: Isolation) -> list[ProgramResult]:
    """Run programs at a given isolation, which may be less than the machine offers; see `run_programs`."""
    results: list[ProgramResult | None] = [None] * len(programs)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(programs)):
        waiting.put(index)

    def work() -> None:
        server: _Server | None = None
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                server = server or _Server(limits, isolation)
                try:
                    result = server.run(programs[index])
                    if result.status == "refused":  # not caused by the program: try once more with a new server
                        server.close()
                        server = None
                        server = _Server(limits, isolation)
                        result = server.run(programs[index])
                    results[index] = result
                except SandboxError as problem:
                    results[index] = ProgramResult("killed", "", limits.wall_s, f"with its server: {problem}")
                    if server is not None:
                        server.close()
                        server = None
        finally:
            if server is not None:
                server.close()

    with ThreadPoolExecutor(min(workers, len(programs)), thread_name_prefix="sandbox") as pool:
        try:
            for done in [pool.submit(work) for _ in range(min(workers, len(programs)))]:
                done.result()
        except BaseException:  # Ctrl-C, or a server that does not start: the others may stop
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            raise
    return [result for result in results if result is not None]
