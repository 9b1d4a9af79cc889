"""Programs that do what a model's program must not. `@WORD@` stands for something outside that the tests provide.

The import list is no wall: each program takes the modules it wants from `sys.modules`, as an attacker would, so that
what stops it is the kernel. Programs end by themselves or run into a limit; none starts more than 100 processes even
where nothing holds it back.
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import sys
os, ctypes, signal, time = (sys.modules[name] for name in ("os", "ctypes", "signal", "time"))
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        result = action()
    except BaseException as problem:
        print("no:", type(problem).__name__)
    else:
        print("YES" if result not in (-1, None) else "no: -1", repr(result)[:60])
"""

STOPPED = {"error", "timeout", "memory", "output", "killed"}


@dataclass(frozen=True)
class Hostile:
    """A program and how it may end; whatever it prints, "YES" says that something succeeded that must not."""

    name: str
    source: str
    statuses: frozenset[str] = frozenset({"ok"})


def stopped(name: str, source: str, *statuses: str) -> Hostile:
    return Hostile(name, PRELUDE + source, frozenset(statuses or STOPPED))


def refused(name: str, *actions: str) -> Hostile:
    """A program whose every action must fail, while the program itself goes on to its end."""
    return Hostile(name, PRELUDE + "\n".join(f"attempt(lambda: {action})" for action in actions))


HOSTILE = [
    # Time
    stopped("endless loop", "while True: pass", "timeout"),
    stopped("sleep", "time.sleep(1000)", "timeout"),
    stopped("swallows every exception", "while True:\n  try:\n    while True: pass\n"
            "  except BaseException: pass", "timeout"),
    stopped("huge integers", "print(len(str(7 ** (10 ** 8))))", "timeout", "error", "memory"),
    stopped("regular expression", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    stopped("ignores signals", "for n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
            "  except (OSError, ValueError): pass\nwhile True: pass", "timeout"),
    stopped("stops itself", "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)", "timeout"),
    stopped("closes its descriptors", "os.closerange(0, 100)\nwhile True: pass", "timeout"),
    stopped("many timers", "signal.signal(signal.SIGALRM, lambda *a: None)\n"
            "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\nwhile True: pass", "timeout"),
    # Memory and output
    stopped("memory hog", "x = []\nwhile True: x.append(bytearray(1 << 24))", "memory", "timeout"),
    stopped("one huge block", "import numpy as np\nx = np.ones(1 << 33)", "memory"),
    stopped("huge output", "while True: print('x' * 100000)", "output", "error"),
    stopped("huge output past the buffers", "while True: os.write(1, b'x' * 100000)", "output"),
    stopped("huge errors", "while True: os.write(2, b'x' * 100000)", "output"),
    stopped("deep recursion", "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)"),
    stopped("recursion in C", "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"),
    stopped("huge file", "with open('f', 'wb') as f:\n  for _ in range(1000): f.write(b'x' * 10**6)", "error"),
    stopped("many descriptors", "files = [open('f', 'w') for _ in range(10**5)]", "error"),
    refused("memory outside its address space", "libc.memfd_create(b'x', 0)", "libc.shmget(1, 1 << 30, 0o1666)"),
    # Files
    refused("reads the machine's files", "open('/etc/passwd').read()", "open('/etc/hostname').read()",
            "os.listdir('/etc')", "os.listdir('/home')", "open('/dev/mem', 'rb')", "open('/dev/sda', 'rb')",
            "open('@CANARY@/secret.txt').read()", "open('../../../../../../@CANARY@/secret.txt').read()"),
    refused("reads the parent", "open('/proc/@PID@/environ').read()", "os.listdir('/proc/@PID@/fd')",
            "open('/proc/@PID@/mem', 'rb')", "os.listdir('/proc')", "open('/proc/self/environ').read()"),
    refused("reads its environment", "dict(os.environ) or None", "os.environ['COLM_SECRET']",
            "ctypes.c_char_p.in_dll(libc, 'environ').value or None"),
    refused("writes outside", "open('@CANARY@/colm_hostile', 'w')", "open('@CANARY@/secret.txt', 'a')",
            "open('/tmp/colm_hostile', 'w')", "open('/dev/shm/colm_hostile', 'w')", "open('/colm_hostile', 'w')",
            "os.mkdir('/var/tmp/colm_hostile')", "open('@REPO@/colm_hostile', 'w')"),
    refused("deletes and renames outside", "os.remove('@CANARY@/secret.txt')", "os.rmdir('@CANARY@')",
            "os.rename('@CANARY@/secret.txt', '@CANARY@/colm_hostile')", "os.truncate('@CANARY@/secret.txt', 0)"),
    refused("changes what it cannot read", "os.chmod('@CANARY@/secret.txt', 0) or 1", "os.utime('@CANARY@') or 1",
            "os.chown('@CANARY@/secret.txt', 0, 0) or 1"),
    refused("links to the outside", "os.symlink('@CANARY@/secret.txt', 'link')", "open('link').read()",
            "os.link('@CANARY@/secret.txt', 'hard')", "os.mkfifo('pipe') or 1", "os.mknod('node') or 1"),
    Hostile("descriptors of others",
        PRELUDE + "found = []\nfor n in range(3, 4000):\n  try: found.append((n, os.read(n, 100)))\n"
        "  except OSError: pass\nprint('YES' if found else 'no', found)"),
    Hostile("deletes the temporary folder", PRELUDE + "here = os.getcwd()\nopen('f', 'w').close()\nos.remove('f')\n"
            "os.chdir('/')\nos.rmdir(here)\nprint('gone')", frozenset({"ok", "error"})),
    Hostile("many small files", PRELUDE + "for n in range(10**5): open(f'f{n}', 'w').close()",
            frozenset({"ok", "error", "timeout"})),
    # Processes
    Hostile("fork bomb", PRELUDE + "for _ in range(100):\n  def child():\n    if os.fork() == 0:\n"
            "      time.sleep(20)\n      os._exit(0)\n    return True\n  attempt(child)"),
    refused("forks by other names", "libc.fork()", "libc.vfork()", "libc.syscall(56, 17, 0, 0, 0, 0)",
            "libc.syscall(435, bytes(88), 88)", "os.forkpty()"),
    refused("subprocesses", "-1 if os.system('true') else 1", "-1 if libc.system(b'true') else 1",
            "os.popen('id').read() or None", "os.execv('/bin/sh', ['sh'])", "os.posix_spawn('/bin/sh', ['sh'], {})",
            "libc.execve(b'/bin/sh', None, None)"),
    refused("threads", "[sys.modules['_thread'].start_new_thread(time.sleep, (9,)) for _ in range(100)]"),
    refused("kills others", "os.kill(@PID@, 9) or 1", "os.kill(@OTHER@, 9) or 1", "os.kill(-1, 9) or 1",
            "os.kill(0, 9) or 1", "os.kill(os.getppid(), 9) or 1", "libc.syscall(424, os.getppid(), 9, None, 0)",
            "libc.tgkill(@OTHER@, @OTHER@, 9)", "libc.fcntl(1, 8, @OTHER@)", "libc.fcntl(1, 10, 9)"),
    refused("traces and limits others", "libc.ptrace(16, @OTHER@, None, None)", "libc.setpriority(0, @OTHER@, 19)",
            "libc.prlimit(@OTHER@, 0, (ctypes.c_ulong * 2)(0, 0), None)",
            "libc.process_vm_readv(@OTHER@, bytes(16), 1, bytes(16), 1, 0)", "os.sched_setaffinity(@OTHER@, {0}) or 1"),
    # Network
    refused("sockets", "libc.socket(2, 1, 0)", "libc.socket(1, 1, 0)", "libc.socket(40, 1, 0)", "libc.socket(16, 3, 0)",
            "libc.socketpair(1, 1, 0, (ctypes.c_int * 2)())", "__import__('socket')", "__import__('urllib.request')"),
    # The kernel
    refused("undoes its isolation", "libc.unshare(0x10000000)", "libc.setns(0, 0)",
            "libc.mount(b'x', b'/', b'tmpfs', 0, 0)",
            "libc.chroot(b'.')", "libc.umount2(b'/', 2)", "os.setuid(0) or 1", "libc.syscall(321, 0, bytes(128), 128)",
            "libc.syscall(425, 8, bytes(120))", "libc.sethostname(b'colm_hostile', 12)", "libc.prctl(38, 0, 0, 0, 0)",
            "[setattr(sys, 'x', sys.modules['resource'].setrlimit(7, (10**6, 10**6)))]"),
    # Ends and tricks
    Hostile("ends without cleaning up", "import sys\nprint('lost')\nsys.modules['os']._exit(0)"),
    stopped("ends with a status", "os._exit(3)", "error"),
    stopped("pretends to have been refused", "os.write(2, b'not run')\nos._exit(98)", "error"),
    stopped("crashes", "ctypes.string_at(8)", "killed"),
    stopped("aborts", "os.abort()", "killed"),
    stopped("kills itself", "os.kill(os.getpid(), 9)\nwhile True: pass", "killed", "timeout"),
    stopped("forges a result", r"os.write(1, b'\x00\x00\x00\x10{\"status\": \"ok\"}')" + "\n1 / 0", "error"),
    stopped("exits", "sys.exit('bye')", "error"),
    stopped("waits for input", "input()", "error"),
    stopped("replaces the built-ins", "import builtins\nfor n in list(vars(builtins)):\n"
            "  setattr(builtins, n, None)\nprint(1)"),
    stopped("breaks stdout", "sys.stdout = None\nsys.stderr = 3\nraise KeyboardInterrupt", "error"),
    stopped("source with a null character", "\0print(1)", "error"),
    Hostile("source with a lone surrogate", "print('\ud800')", frozenset({"error"})),
    Hostile("prints what is no text", PRELUDE + "print('\\ud800\\x00\\x1b[2J')\nos.write(1, bytes(range(128, 256)))"),
    Hostile("declares another encoding", "# -*- coding: utf-7 -*-\nprint(+AGE-)", frozenset({"error"})),
    Hostile("deeply nested source", "(" * 50000 + ")" * 50000, frozenset({"error", "memory", "killed"})),
    Hostile("long sum in the source", "x = " + "+".join("1" for _ in range(100000)),
            frozenset({"ok", "error", "memory", "killed"})),
]  # fmt: skip
