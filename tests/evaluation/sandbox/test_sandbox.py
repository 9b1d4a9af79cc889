"""The sandbox runs ordinary programs, survives hostile ones, and nothing outside changes."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colm_ds.errors import ConfigError
from colm_ds.evaluation.sandbox import sandbox
from colm_ds.evaluation.sandbox.sandbox import Isolation, Limits, ProgramResult, run_isolated, run_programs
from tests.evaluation.sandbox.hostile_programs import HOSTILE, SLOW, Hostile

SECRET = "s3cr3t-of-the-parent"
SMALL = Limits(wall_s=2.0, cpu_s=1, memory_mib=256, files_mib=4, output_kib=16, open_files=16)
GOOD = "print(6 * 7)"


def isolation_at(level: str) -> Isolation:
    """This machine's isolation, taken down to a level; skips the test where the machine has less."""
    try:
        found = sandbox.require_isolation(level)
    except ConfigError as problem:
        pytest.skip(str(problem))
    return found if level == "namespaces" else dataclasses.replace(found, namespaces="not wanted")


def descendants() -> set[int]:
    """Numbers of this process's living children and theirs, from /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":  # ended, and only not asked for by whoever adopted it
            parents[int(folder.name)] = int(parent)
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


class Outside:
    """What hostile programs might reach, and a picture of it to compare: files, processes, descriptors, settings."""

    def __init__(self, repo_root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="canary_", dir="/tmp"))
        secret = self.folder / "secret.txt"
        secret.write_text(SECRET)
        self.folder.chmod(0o777)
        secret.chmod(0o666)  # the file's own rights stop nobody
        self.descriptor = os.open(secret, os.O_RDONLY)
        os.set_inheritable(self.descriptor, True)
        # The same user as the programs, where these change it, so that rights between users stop nobody either.
        user = {"user": 65534} if os.geteuid() == 0 else {}
        self.other = subprocess.Popen(["sleep", "300"], **user)  # type: ignore[call-overload]
        self.repo_root = repo_root

    def fill_in(self, source: str) -> str:
        """`source` with the places and processes out here in the place of `@WORD@`."""
        words = {"CANARY": self.folder, "PID": os.getpid(), "OTHER": self.other.pid, "REPO": self.repo_root}
        for word, value in words.items():
            source = source.replace(f"@{word}@", str(value))
        return source

    def picture(self) -> dict[str, Any]:
        """All that may not change, by name."""
        places = ["/", "/tmp", "/dev/shm", "/var/tmp", os.getcwd(), str(Path.home()), str(self.repo_root)]
        names = [os.path.join(place, name) for place in places if os.path.isdir(place) for name in os.listdir(place)]
        files = [self.folder, *sorted(self.folder.rglob("*"))]
        return {
            "files": [(str(path), path.stat().st_mode, path.stat().st_uid, path.stat().st_mtime_ns) for path in files],
            "content": (self.folder / "secret.txt").read_text(),
            "left behind": [name for name in names if "colm_hostile" in name],
            "processes": descendants(),
            "other lives": self.other.poll() is None,
            "descriptors": sorted(os.listdir("/proc/self/fd")),
            "environment": dict(os.environ),
            "limits": [resource.getrlimit(kind) for kind in range(15)],
            "limits of the other": Path(f"/proc/{self.other.pid}/limits").read_text(),
            "priority": (os.nice(0), os.sched_getaffinity(0), os.sched_getaffinity(self.other.pid)),
            "place": (os.getcwd(), socket.gethostname()),
            "threads": threading.active_count(),
        }

    def close(self) -> None:
        os.close(self.descriptor)
        self.other.kill()
        self.other.wait()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def outside(repo_root: Path) -> Iterator[Outside]:
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # orphans become children of this process, so that none is overlooked
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLM_SECRET", SECRET)
        out_here = Outside(repo_root)
        yield out_here
        out_here.close()
    libc.prctl(36, 0, 0, 0, 0)


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def hostile_run(request: pytest.FixtureRequest, outside: Outside) -> dict[str, Any]:
    """Every hostile program followed by an ordinary one, at one level; and pictures of the outside around it."""
    return run_all(HOSTILE, request.param, outside)


def run_all(hostile: list[Hostile], level: str, outside: Outside) -> dict[str, Any]:
    isolation = isolation_at(level)
    programs = [text for program in hostile for text in (outside.fill_in(program.source), GOOD)]
    before = outside.picture()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        patch.setattr(tempfile, "tempdir", folder)
        results = run_isolated(programs, SMALL, 2, isolation)
        folders = os.listdir(folder)
    return {"results": results, "before": before, "after": outside.picture(), "folders": folders}


@pytest.mark.parametrize("program", HOSTILE, ids=lambda program: program.name.replace(" ", "_"))
def test_hostile_program_is_held(program: Hostile, hostile_run: dict[str, Any]) -> None:
    index = 2 * HOSTILE.index(program)
    is_held(program, *hostile_run["results"][index : index + 2])


def is_held(program: Hostile, result: ProgramResult, following: ProgramResult) -> None:
    """Assert that a program ended as it may, and that the ordinary one after it was not disturbed."""
    assert result.status in program.statuses, result
    assert "YES" not in result.printed, result.printed
    assert SECRET not in result.printed + result.message
    assert len(result.printed.encode()) <= 3 * SMALL.output_kib << 10
    assert result.seconds < SMALL.wall_s + 5.0
    assert (following.status, following.printed) == ("ok", "42\n"), f"the evaluation did not go on: {following}"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_slow_hostile_programs_are_held(level: str, outside: Outside) -> None:
    ran = run_all(SLOW, level, outside)
    for index, program in enumerate(SLOW):
        is_held(program, *ran["results"][2 * index : 2 * index + 2])
    test_nothing_outside_changes(ran)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_all_of_this_as_an_ordinary_user(repo_root: Path) -> None:
    """All tests of this folder once more, as nobody; skips where nobody cannot run Python or read what it imports."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chmod(home, 0o777)
        packages = Path(pytest.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{repo_root}:{packages}", "HOME": home, "TMPDIR": home}

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
            return subprocess.run(as_nobody, cwd=repo_root, env=environment, capture_output=True, text=True)

        ready = "import subprocess, sys, torch, tests.conftest; subprocess.run([sys.executable, '-c', ''], check=True)"
        usable = [each for each in (sys.executable, "/usr/bin/python3") if run(each, "-c", ready).returncode == 0]
        if not usable:
            pytest.skip("nobody cannot run this Python, or read the repository")
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={home}/base", "-m", "slow or not slow"]
        done = run(usable[0], "-B", "-m", "pytest", *options, "tests/evaluation/sandbox")
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed, 1 skipped" in done.stdout, done.stdout[-500:]  # this one alone


def test_nothing_outside_changes(hostile_run: dict[str, Any]) -> None:
    assert hostile_run["after"] == hostile_run["before"]
    assert hostile_run["folders"] == []


ENDED = """
import dataclasses, glob, os, signal, sys, tempfile, threading, time
from colm_ds.evaluation.sandbox import sandbox
tempfile.tempdir = sys.argv[1]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
means = dataclasses.replace(sandbox.detect(), namespaces="not wanted")
program = '''
import sys, time
os = sys.modules["os"]
os.mkdir("big", 0o300)
open("big/f", "w").close()
time.sleep(50)
'''
def end():
    while not glob.glob(sys.argv[1] + "/*/program*/big/f"):
        time.sleep(0.05)
    os.kill(os.getpid(), int(sys.argv[2]))
threading.Thread(target=end, daemon=True).start()
sandbox.run_isolated([program], sandbox.Limits(wall_s=60.0, cpu_s=60), 1, means)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_stays_when_the_evaluation_is_ended(number: signal.Signals, tmp_path: Path, repo_root: Path) -> None:
    """No folder and no process, while a program was running."""
    isolation_at("landlock")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        command = [sys.executable, "-c", ENDED, folder, str(int(number))]
        environment = {**os.environ, "PYTHONPATH": ":".join([str(repo_root), *filter(None, sys.path)])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == -number, done.stderr
        deadline = time.monotonic() + 10
        while os.listdir(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert os.listdir(folder) == []


def test_no_connection_reaches_a_listener() -> None:
    """A server on the loopback and one with an abstract Unix name, out here; programs try both."""
    source = """
import sys
ctypes = sys.modules["ctypes"]
libc = ctypes.CDLL(None)
for family, address in ((2, @TCP@), (1, @UNIX@)):
    print(libc.connect(libc.socket(family, 1, 0), address, len(address)))
"""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(f"\0colm_canary_{os.getpid()}")
        inet = (2).to_bytes(2, "little") + tcp.getsockname()[1].to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        local = (1).to_bytes(2, "little") + unix.getsockname()
        program = source.replace("@TCP@", repr(inet)).replace("@UNIX@", repr(local))
        for server in (tcp, unix):
            server.listen()
            server.setblocking(False)
        for level in ("namespaces", "landlock"):
            (result,) = run_isolated([program], SMALL, 1, isolation_at(level))
            assert result.printed == "-1\n-1\n", result
        for server in (tcp, unix):
            with pytest.raises(BlockingIOError):
                server.accept()


def test_hostile_programs_would_succeed_without_the_filter() -> None:
    """The programs do ask for what must be refused: in an empty network namespace alone, they get their sockets."""
    unfiltered = dataclasses.replace(isolation_at("namespaces"), seccomp="not wanted", landlock="not wanted")
    sockets = next(program for program in HOSTILE if program.name == "sockets")
    (result,) = run_isolated([sockets.source], SMALL, 1, unfiltered)
    assert result.printed.count("YES") >= 3, result


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_ordinary_programs(level: str) -> None:
    cases = {
        "import math\nprint(math.sqrt(16))": "4.0\n",
        "import numpy as np\nprint(np.linalg.solve([[2., 0.], [0., 4.]], [2., 8.]))": "[1. 2.]\n",
        "from fractions import Fraction\nfrom itertools import combinations\nprint(Fraction(3, 6))": "1/2\n",
        "import hashlib\nprint(hashlib.sha256(b'a').hexdigest()[:8])": "ca978112\n",
        "import datetime\nprint(datetime.datetime.strptime('2024-02-29', '%Y-%m-%d').strftime('%A'))": "Thursday\n",
        "def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nprint(f(20))": "2432902008176640000\n",
        "with open('notes', 'w') as file:\n    file.write('7')\nprint(open('notes').read())": "7\n",
        "if __name__ == '__main__':\n    print('main')": "main\n",
        "print('π ≈', 3.14)": "π ≈ 3.14\n",
        "pass": "",
        "import sys\nprint(1)\nsys.stdout = sys.stderr = None": "1\n",
        "import sys\nprint(1)\nsys.exit(0)": "1\n",
    }
    results = run_isolated(list(cases), Limits(), 2, isolation_at(level))
    assert [result.message for result in results if result.status != "ok"] == []
    assert [result.printed for result in results] == list(cases.values())


def test_programs_leave_nothing_to_the_next_one() -> None:
    """Neither files nor a changed interpreter; and random numbers start the same each time."""
    spoil = "import builtins, math, random\nopen('f', 'w').write('x')\nmath.pi = 3\nrandom.seed(5)\nbuiltins.len = None"
    look = "import math, random\nprint(round(math.pi, 4), len('ab'), random.random())\nopen('f')"
    for level in ("namespaces", "landlock"):
        results = run_isolated([look, spoil, look], SMALL, 1, isolation_at(level))
        assert [result.status for result in results] == ["error", "ok", "error"]
        assert results[0].printed == results[2].printed
        assert results[0].printed.startswith("3.1416 2 ")
        assert results[2].message.startswith("FileNotFoundError")


LOOKS_AROUND = """
import sys, re
os, ctypes = sys.modules["os"], sys.modules["ctypes"]
libc = ctypes.CDLL(None)
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]
end, here = libc.sbrk(0), id([]) & -4096
read, write = os.pipe()
seen, pages = set(), 0
for low, high in ((end - (64 << 20), end), (here - (64 << 20), here + (64 << 20))):
    for page in range(low & -4096, high, 4096):
        if libc.write(write, page, 4096) == 4096:  # the kernel says which pages there are
            pages += 1
            seen |= set(re.findall(rb"LE[A]K_[a-z]{6}", os.read(read, 4096)))
print(pages > 1000, sorted(seen))
"""


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_no_program_can_read_the_one_before(level: str) -> None:
    """Neither its source nor what it printed is in the memory that the next one was forked from."""
    says = "text = 'LEAK_source'\nprint('LEAK_' + 'tnirp'[::-1] + 'x')\n" + "#" * 70000
    limits = Limits(wall_s=20.0, cpu_s=20)
    own = LOOKS_AROUND.replace("import sys", "mine = 'LEAK_myself'\nimport sys", 1)
    *_, blind, sighted = run_isolated([says, says, says, LOOKS_AROUND, own], limits, 1, isolation_at(level))
    assert (blind.status, blind.printed) == ("ok", "True []\n"), blind
    assert sighted.printed == "True [b'LEAK_myself']\n", "the search itself must work"


@pytest.mark.parametrize("module", ["os", "socket", "subprocess", "torch", "sympy", "ctypes", "numpy.distutils_x"])
def test_other_modules_are_not_importable(module: str) -> None:
    (result,) = run_programs([f"import {module}"], workers=1)
    assert result.status == "error"
    assert result.message.startswith("ModuleNotFoundError")


def test_results_come_in_order_and_several_at_a_time() -> None:
    start = time.monotonic()
    results = run_programs(
        [f"import time\ntime.sleep({0.5 if n < 4 else 0})\nprint({n})" for n in range(12)], workers=4
    )
    assert [result.printed for result in results] == [f"{n}\n" for n in range(12)]
    assert time.monotonic() - start < sum(result.seconds for result in results) + 2.0
    assert [result.message for result in results] == [""] * 12
    assert run_programs([]) == []


def test_time_limits_of_both_kinds() -> None:
    limits = Limits(wall_s=0.5, cpu_s=10), Limits(wall_s=20.0, cpu_s=1)
    for limit, message in zip(limits, ("wall time used up", "CPU time used up"), strict=True):
        (result,) = run_programs(["while True: pass"], limits=limit)
        assert (result.status, result.message) == ("timeout", message)


def test_a_lost_server_costs_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    original = sandbox._Server.run

    def run(self: sandbox._Server, source: str) -> ProgramResult:
        if source == "lost":
            self.process.kill()
            self.process.wait()
        return original(self, source)

    monkeypatch.setattr(sandbox._Server, "run", run)
    before = descendants()
    results = run_programs([GOOD, "lost", GOOD, GOOD], workers=1)
    assert [result.status for result in results] == ["ok", "killed", "ok", "ok"]
    assert descendants() == before


def test_a_program_that_was_not_run_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = sandbox._Server.run, []

    def run(self: sandbox._Server, source: str) -> ProgramResult:
        asked.append(source)
        if source == "never" or asked.count(source) == 1:
            return ProgramResult("refused", "", 0.0, "not run: no reason")
        return original(self, source)

    monkeypatch.setattr(sandbox._Server, "run", run)
    results = run_programs([GOOD, "never"], workers=1)
    assert [result.status for result in results] == ["ok", "refused"]
    assert asked == [GOOD, GOOD, "never", "never"]


def test_a_server_that_does_not_start_again_costs_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program was not run, and where a new server is made memory has run out."""
    original, started = sandbox._Server.__init__, []
    isolation = sandbox.detect()

    def start(self: sandbox._Server, *given: Any) -> None:
        started.append(given)
        if len(started) == 2:
            raise sandbox.SandboxError("cannot allocate memory")
        original(self, *given)

    monkeypatch.setattr(sandbox._Server, "__init__", start)
    monkeypatch.setattr(
        sandbox._Server, "run", lambda self, source: ProgramResult("refused" if source == "a" else "ok", "", 0.0, "")
    )
    results = sandbox.run_isolated(["a", "b"], sandbox.Limits(), 1, isolation)
    assert [result.status for result in results] == ["killed", "ok"]
    assert "cannot allocate memory" in results[0].message


def test_a_machine_without_isolation_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Isolation("unshare: Operation not permitted", "no seccomp", "no Landlock", 0, False)
    without_filter = dataclasses.replace(weak, namespaces="", landlock="")
    only_filter = dataclasses.replace(weak, seccomp="")
    for isolation in (weak, without_filter, only_filter):
        assert isolation.level is None
        monkeypatch.setattr(sandbox, "detect", lambda isolation=isolation: isolation)
        for minimum in (None, "landlock", "namespaces"):
            with pytest.raises(ConfigError, match="cannot isolate") as refused:
                run_programs([GOOD], minimum=minimum)
            assert all(why in str(refused.value) for why in isolation.describe()["not_used"].values())
            assert "Allow this user or container user namespaces and seccomp filters" in str(refused.value)


def test_the_stronger_level_is_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    landlock = dataclasses.replace(
        sandbox.detect(), namespaces="unshare: Operation not permitted", seccomp="", landlock=""
    )
    monkeypatch.setattr(sandbox, "detect", lambda: landlock)
    assert sandbox.require_isolation() is landlock
    with pytest.raises(ConfigError, match=r"'namespaces' is needed.*offers 'landlock'.*or ask for 'landlock'"):
        run_programs([GOOD], minimum="namespaces")


def test_the_removed_level_names_its_replacement() -> None:
    with pytest.raises(ConfigError, match=r"'rlimits': this level was removed.*write 'landlock'"):
        run_programs([GOOD], minimum="rlimits")


@pytest.mark.parametrize("call", [{"minimum": "strong"}, {"workers": 0}])
def test_wrong_arguments(call: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_programs([GOOD], **call)
    with pytest.raises(ConfigError, match="memory_mib"):
        Limits(memory_mib=0)


def test_isolation_is_described_for_result_files() -> None:
    described = sandbox.detect().describe()
    assert described["level"] in sandbox.LEVELS
    assert "resource limits" in described["used"]
    means = {"namespaces", "seccomp", "landlock", "resource limits"}
    assert set(described["used"]) | set(described["not_used"]) == means
