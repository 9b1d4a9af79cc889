"""The sandbox's fork server: runs alone in an isolated interpreter, each program in its own fork.

`sandbox.py` starts this file without site-packages and with an empty environment; nothing imports it. Frames on
stdin and stdout are four bytes of length and a JSON text. The modules that a program may import are loaded before
access to the file system is closed, so that a program needs no file at all.

Three processes stay or come and go. The keeper is the one that was started: it removes the programs' folder at the end.
Its child, the server, never reads a frame: it waits until there is something to read, and forks. The monitor that it
forks reads one program, runs it in a fork of itself, writes the answer and ends, so that no program is forked from a
process that held the source or the output of an earlier one.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib.util
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

MODULES = (
    "math", "cmath", "numpy", "hashlib", "fractions", "itertools", "functools", "collections", "decimal", "statistics",
    "random", "string", "re", "datetime", "calendar", "time", "operator", "bisect", "heapq", "json", "copy", "typing",
    "dataclasses", "enum", "numbers", "textwrap", "array", "sys", "warnings", "__future__", "builtins", "abc",
)  # fmt: skip
# Loaded too, since the modules above and the interpreter import them later.
LATER = (
    "numpy.linalg", "numpy.fft", "numpy.polynomial", "numpy.random", "numpy.ma", "numpy.lib.stride_tricks",
    "collections.abc", "_strptime", "traceback", "encodings.latin_1", "encodings.ascii", "encodings.idna",
    "encodings.utf_16", "unicodedata", "stringprep", "locale", "difflib", "ast", "tokenize", "linecache", "_pylong",
)  # fmt: skip
OUT_OF_MEMORY = 97  # exit status of a program that ended with MemoryError
ISOLATED = b"\x06"  # what a child writes to stderr first, as soon as it is isolated and before it runs anything
READ, BEGUN, DONE = b"r", b"b", b"d"  # what a monitor says of its question and its answer
SET_UP_S = 15.0  # maximum time for that on a busy machine; the program's own time starts afterwards


def read_frame(descriptor: int) -> Any:
    """Read the next frame's content and not a byte more; None at the end of the stream."""
    head = read_bytes(descriptor, 4)
    if len(head) < 4:
        return None
    return json.loads(read_bytes(descriptor, struct.unpack(">I", head)[0]))


def read_bytes(descriptor: int, size: int) -> bytes:
    """Read so many bytes, fewer only at the end of the stream."""
    content = bytearray()
    while len(content) < size and (part := os.read(descriptor, min(1 << 20, size - len(content)))):
        content += part
    return bytes(content)


def write_frame(stream: BinaryIO, content: Any) -> None:
    """Write and flush one frame."""
    body = json.dumps(content).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def load_modules(numpy_parent: str) -> None:
    """Import what programs may use. numpy's folder is on the path only meanwhile, to hide its other content."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    sys.path.append(numpy_parent)
    for name in (*MODULES, *LATER):
        try:
            __import__(name)
        except ImportError:
            if name in MODULES:
                raise
    os.environ.clear()
    sys.path.clear()
    sys.argv[:] = [""]


def limited_import(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `__import__` for the preloaded modules only: a convenience, as the kernel is what isolates."""
    known = {name.partition(".")[0] for name in (*MODULES, *LATER)}

    def import_module(
        name: str, variables: Mapping[str, object] | None = None, *rest: Any, **options: Any
    ) -> types.ModuleType:
        by_program = variables is None or variables.get("__name__") == "__main__"
        if by_program and name.partition(".")[0] not in known:
            raise ModuleNotFoundError(f"No module named {name!r} in the sandbox", name=name)
        return original(name, variables, *rest, **options)

    return import_module


def text_writer(descriptor: int) -> io.TextIOWrapper:
    """Return a text stream that can print any string, also half a surrogate pair."""
    raw = io.BufferedWriter(io.FileIO(descriptor, "w"))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=descriptor == 2)


def set_limits(settings: Mapping[str, Any], base_bytes: int) -> None:
    """Set soft and hard limits of the calling process. No process or thread can be started (limit 0)."""
    cpu = settings["cpu_s"]
    values = {
        "CPU": (cpu, cpu),
        "AS": (base_bytes + (settings["memory_mib"] << 20),) * 2,
        "FSIZE": (settings["files_mib"] << 20,) * 2,
        "NOFILE": (settings["open_files"],) * 2,
        "NPROC": (0, 0),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
        "SIGPENDING": (64, 64),
    }
    for name, pair in values.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            top = pair[1] if hard == resource.RLIM_INFINITY else min(pair[1], hard)
            resource.setrlimit(kind, (min(pair[0], top), top))


def run_source(source: str) -> int:
    """Run a program as `__main__`; return its exit status, and write an error to stderr in one line."""
    message, status = "", 0
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__", "__builtins__": builtins})
    except SystemExit as stop:
        if stop.code is not None and stop.code != 0:
            message, status = f"SystemExit: {stop.code}", 1
    except MemoryError:
        message, status = "MemoryError", OUT_OF_MEMORY
    except BaseException as problem:
        message, status = f"{type(problem).__name__}: {problem}", 1
    for stream in (sys.stdout, sys.__stdout__):
        try:
            getattr(stream, "flush", int)()
        except BaseException as problem:
            message, status = message or f"{type(problem).__name__}: {problem}", status or 1
    if message:
        os.write(2, ("\n" + " ".join(message.split())[:500]).encode("utf-8", "backslashreplace"))
    return status


class Server:
    """State of the server: what the machine offers, and which part of it is used."""

    def __init__(self, settings: dict[str, Any], kernel: Any, folders: Any) -> None:
        self.settings = settings
        self.kernel = kernel
        self.folders = folders
        self.null = os.open(os.devnull, os.O_RDWR)
        with open("/proc/self/statm") as file:
            self.base_bytes = int(file.read().split()[0]) * resource.getpagesize()

    def prepare(self) -> None:
        """Set up once: drop root's rights and, if used, leave the machine's namespaces."""
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the kernel kills a program and not the evaluation
        if self.settings["base"] and os.geteuid() == 0:
            os.chown(self.settings["base"], self.kernel.NOBODY, self.kernel.NOBODY)
        self.kernel.drop_root()
        if self.settings["namespaces"]:
            self.kernel.enter_namespaces()

    def isolate(self, folder: str) -> None:
        """Isolate the program's own process, from the outermost wall to the innermost."""
        used = self.settings
        os.chdir(folder)
        self.kernel.drop_capabilities()
        set_limits(used, self.base_bytes)
        if used["landlock"]:
            self.kernel.restrict_files(folder)
        if used["seccomp"]:
            self.kernel.filter_calls()

    def child(self, source: str, folder: str, out: int, err: int) -> None:
        """Run in the program's process; does not return."""
        status = 1
        try:
            os.setsid()
            self.kernel.die_with_parent()
            for target, descriptor in enumerate((self.null, out, err)):
                os.dup2(descriptor, target)
            os.closerange(3, max(256, out, err, self.null) + 256)
            sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
            # The second names keep the streams open if a program replaces the first.
            sys.stdout = sys.__stdout__ = text_writer(1)  # type: ignore[misc]
            sys.stderr = sys.__stderr__ = text_writer(2)  # type: ignore[misc]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            self.isolate(folder)
            # The same program prints the same in every run. In its own interpreter the seed affects nothing else.
            sys.modules["random"].seed(0)
            sys.modules["numpy.random"].seed(0)
            builtins.__import__ = limited_import(builtins.__import__)
            sys.meta_path.clear()
            os.write(2, ISOLATED)
            status = run_source(source)
        except BaseException as problem:
            os.write(2, f"\n{type(problem).__name__}: {problem}".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)

    def monitor(self, source: str) -> dict[str, Any]:
        """Start one program, read its output within the limits, and kill it with all that it started."""
        used = self.settings
        if used["namespaces"]:
            self.kernel.enter_program_namespaces(used["files_mib"])
            folder = self.kernel.WORK
        else:
            folder = os.path.join(used["base"], f"program{os.getpid()}")
            os.mkdir(folder, 0o700)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.child(source, folder, out_write, err_write)
        os.close(out_write)
        os.close(err_write)
        texts = {out_read: bytearray(), err_read: bytearray()}
        reason, code, cpu_s, seconds = watch(pid, texts, err_read, used["wall_s"], used["output_kib"] << 10)
        if not used["namespaces"]:
            self.folders.remove_folder(folder)
        if not texts[err_read].startswith(ISOLATED):
            said = texts[err_read].decode("utf-8", "replace").strip()
            return refused(said or f"not isolated when its process ended ({describe_end(reason, code, False, '')[1]})")
        printed = bytes(texts[out_read][: used["output_kib"] << 10]).decode("utf-8", "replace")
        said = texts[err_read][1:].decode("utf-8", "replace").strip().rpartition("\n")[2]
        status, message = describe_end(reason, code, cpu_s >= used["cpu_s"] - 0.5, said)
        return {"status": status, "printed": printed, "seconds": round(seconds, 4), "message": message[:500]}

    def run(self, source: str) -> Any:
        """Run one program in its own monitor process, whose namespaces end with it; for `probe`."""
        return self.in_fork(lambda: self.monitor(source))

    def in_fork(self, work: Callable[[], Any]) -> Any:
        """Run `work` in a forked process and return its result through a pipe; a failure is a refused program."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                with os.fdopen(write, "wb") as stream:
                    try:
                        self.kernel.die_with_parent()
                        write_frame(stream, work())
                    except BaseException as problem:
                        write_frame(stream, refused(f"{type(problem).__name__}: {problem}"))
            finally:
                os._exit(0)
        os.close(write)
        result = read_frame(read)
        os.close(read)
        os.waitpid(pid, 0)
        return result or refused("its monitor ended without a result")

    def serve(self, requests: int, answers: int) -> None:
        """Fork a monitor for each program that waits to be read, until nobody asks any more."""
        waiting, asking = select.poll(), select.poll()
        waiting.register(requests, select.POLLIN)
        asking.register(requests, 0)  # says only that the other end was closed
        while any(events & select.POLLIN for _, events in waiting.poll()):
            said, say = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(said)
                    self.answer_one(requests, answers, say)
                finally:
                    os._exit(1)
            os.close(say)
            asking.register(said, select.POLLIN)
            words = b""
            while True:
                events = dict(asking.poll())
                if requests in events:
                    os.kill(pid, signal.SIGKILL)  # its program ends with it
                    os.waitpid(pid, 0)
                    return
                part = os.read(said, 16)
                if not part:
                    break
                words += part
            asking.unregister(said)
            os.close(said)
            os.waitpid(pid, 0)
            if words == READ:  # and ended without beginning its answer
                with os.fdopen(os.dup(answers), "wb") as stream:
                    write_frame(stream, refused("its monitor ended without a result"))
            elif words != READ + BEGUN + DONE:
                return  # nobody knows how much of the question or of the answer is in the pipes

    def answer_one(self, requests: int, answers: int, say: int) -> None:
        """Read one program, run it and write its result; in a process of its own, which it ends."""
        self.kernel.die_with_parent()
        request = read_frame(requests)
        if request is None:
            os._exit(0)
        os.write(say, READ)
        try:
            result = self.monitor(request["source"])
        except BaseException as problem:
            result = refused(f"{type(problem).__name__}: {problem}")
        os.write(say, BEGUN)
        with os.fdopen(answers, "wb", closefd=False) as stream:
            write_frame(stream, result)
        os.write(say, DONE)
        os._exit(0)


def refused(why: str) -> dict[str, Any]:
    """Return the result of a program that was not run."""
    return {"status": "refused", "printed": "", "seconds": 0.0, "message": f"not run: {why}"[:500]}


def watch(pid: int, texts: dict[int, bytearray], err: int, wall_s: float, limit: int) -> tuple[str, int, float, float]:
    """Collect a child's output until it ends, runs out of time or prints too much; then kill its group.

    Args:
        pid: the child, leader of its process group.
        texts: output by descriptor to read from; filled here.
        err: descriptor of its stderr, where it reports that it is isolated.
        wall_s: seconds from then until it is killed.
        limit: maximum bytes of one stream.

    Returns:
        Why it was killed ("timeout", "output" or "" if it ended by itself), its wait status, its seconds of CPU time
        and of wall time.
    """
    start, reason, ended, isolated = time.monotonic(), "", False, False
    deadline = start + SET_UP_S
    waiting = list(texts)
    while not reason:
        left = deadline - time.monotonic()
        # A child that ended may have left output in the pipe: stop when there is nothing to read.
        pause = 0.0 if ended else max(0.0, min(left, 0.02 if waiting else 0.001))
        ready = select.select(waiting, [], [], pause)[0]
        if ended and not ready:
            break
        for descriptor in ready:
            part = os.read(descriptor, 65536)
            texts[descriptor] += part
            if not part:
                waiting.remove(descriptor)
            elif len(texts[descriptor]) > limit:
                reason = "output"
        if not isolated and texts[err]:
            isolated, start = True, time.monotonic()
            deadline = start + wall_s
        if not ready or not waiting:
            # Not reaped yet, so that its id and its group's cannot be reused before the group is killed.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if time.monotonic() >= deadline and not ended and not reason:
            reason = "timeout"
    seconds = time.monotonic() - start
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return reason, status, usage.ru_utime + usage.ru_stime, seconds


def describe_end(reason: str, code: int, used_cpu: bool, said: str) -> tuple[str, str]:
    """Return status and message, from why a program was killed, its wait status, its CPU time and its last output."""
    if reason == "timeout":
        return "timeout", "wall time used up"
    if reason == "output":
        return "output", "printed more than allowed"
    if os.WIFSIGNALED(code):
        number = os.WTERMSIG(code)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and used_cpu):
            return "timeout", "CPU time used up"
        return "killed", f"ended by {signal.Signals(number).name}"
    status = os.WEXITSTATUS(code)
    if status == 0:
        return "ok", ""
    if status == OUT_OF_MEMORY:
        return "memory", said or "MemoryError"
    return "error", said or f"exit status {status}"


PROBES = {
    "namespaces": "assert os.getpid() == 1 and os.listdir('/') == ['work']\nprint(os.getuid())",
    "seccomp": "try:\n    os.fork()\nexcept PermissionError as problem:\n    print(problem.errno)",
    "landlock": "try:\n    os.listdir('/')\nexcept PermissionError as problem:\n    print(problem.errno)",
}


def probe(server: Server) -> dict[str, str]:
    """Return "" for each means of isolation that works here, else why not; each is tried in its own process."""
    report = {}
    for name, source in PROBES.items():

        def attempt(name: str = name, source: str = source) -> Any:
            server.settings.update({key: key == name for key in PROBES})
            server.prepare()
            return server.run(f"import sys\nos = sys.modules['os']\n{source}")

        result = server.in_fork(attempt)
        works = result["status"] == "ok" and result["printed"].strip()
        report[name] = "" if works else result["message"] or "had no effect"
    return report


def load_beside(name: str) -> Any:
    """Load a module beside this file, without the package around it."""
    location = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"sandbox_{name}", location)
    if spec is None or spec.loader is None:
        raise ImportError(location)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep(folders: Any, base: str) -> None:
    """Fork the server, in which this returns; wait for its end here, whatever it is, remove the folder, and end.

    The keeper stays the user who made the folder. It also outlives an evaluation that a signal ended: the server ends
    when nobody is left to ask it.
    """
    pid = os.fork()
    if pid == 0:
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(0, 256)
    os.waitpid(pid, 0)
    for _ in range(100):  # a program that is being killed may still write
        if folders.remove_folder(base):
            break
        time.sleep(0.05)
    os._exit(0)


def main(settings: dict[str, Any]) -> None:
    """Serve programs from stdin until it ends, or report what the machine offers."""
    kernel, folders = load_beside("kernel"), load_beside("folders")
    if settings["base"] and not settings["probe"]:
        keep(folders, settings["base"])
    requests, answers = os.dup(0), os.dup(1)
    load_modules(settings["numpy_parent"])
    server = Server(settings, kernel, folders)
    for target in (0, 1):
        os.dup2(server.null, target)
    with os.fdopen(os.dup(answers), "wb") as stream:
        if settings["probe"]:
            write_frame(stream, {"report": probe(server), "landlock_abi": kernel.landlock_abi()})
            return
        server.prepare()
        kernel.die_with_parent()  # after the change of user, which clears it
        gc.freeze()
        write_frame(stream, {"ready": True})
    server.serve(requests, answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
