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
    # What is left for those who clean up
    stopped("nested folders", "for _ in range(1500):\n  os.mkdir('d')\n  os.chdir('d')\nprint('deep')", "ok", "error"),
    Hostile("folders that cannot be listed", PRELUDE + "os.umask(0)\nfor mode in (0o300, 0o100, 0):\n"
            "  os.mkdir(f'm{mode}')\n  open(f'm{mode}/f', 'w').close()\n  os.mkdir(f'm{mode}/inner', 0)\n"
            "  os.rename(f'm{mode}', f'x{mode}')\nos.mkdir('big', 0o300)\nopen('big/f', 'w').close()\n"
            "os.mkdir('shut', 0)", frozenset({"ok", "error"})),
    Hostile("names that are no text", PRELUDE + "for n in range(1, 256):\n  if n not in (46, 47):\n"
            "    os.mkdir(bytes([n]) * 255)\n    open(bytes([n]) * 255 + b'/' + bytes([n]), 'w').close()"),
    Hostile("wide and deep folders", PRELUDE + "for a in range(8):\n  for b in range(8):\n    for c in range(8):\n"
            "      try: os.makedirs(f'{a}/{b}/{c}')\n      except OSError: pass"),
    # Reading and writing by other calls
    refused("opens by other calls", "libc.syscall(437, -100, b'/etc/passwd', bytes(24), 24)",
            "libc.syscall(303, -100, b'/', bytes(128), bytes(8), 0)", "libc.syscall(304, -100, bytes(128), 0)",
            "os.listxattr('/') or None", "os.statvfs('/')", "libc.open(b'/proc/self/mem', 2)", "libc.acct(b'x')",
            "os.open('..', os.O_TMPFILE | os.O_RDWR)", "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)"),
    refused("copies between descriptors", "os.sendfile(1, 0, 0, 1)", "os.splice(0, 1, 1)",
            "os.copy_file_range(0, 1, 1)", "libc.syscall(278, 1, bytes(16), 1, 0)", "libc.tee(0, 1, 1, 0)"),
    refused("queues and shared segments", "libc.msgget(1, 0o1666)", "libc.semget(1, 1, 0o1666)",
            "libc.shmat(0, None, 0)", "libc.syscall(240, b'q', 0o102, 0o666, None)", "os.eventfd(0)",
            "libc.syscall(447, 0)", "libc.signalfd(-1, bytes(8), 0)", "libc.timerfd_create(0, 0)",
            "libc.epoll_create(1)", "libc.inotify_init()"),
    refused("keys and counters of the kernel", "libc.syscall(248, b'user', b'k', b'v', 1, -3)",
            "libc.syscall(250, 0, -3, 1)", "libc.syscall(298, bytes(128), 0, -1, -1, 0)", "libc.syscall(323, 0)",
            "libc.syscall(300, 0, 0)", "libc.syscall(103, 3, None, 0)", "libc.personality(0xffffffff)",
            "libc.syscall(312, os.getpid(), @OTHER@, 0, 0, 0)", "libc.syscall(438, 0, 0, 0)",
            "libc.syscall(434, @OTHER@, 0)", "libc.ptrace(0, 0, None, None)", "libc.iopl(3)",
            "libc.syscall(444, None, 0, 1)", "libc.syscall(317, 1, 0, bytes(16))", "libc.mlockall(1)"),
    refused("calls of the x32 numbers",
            *(f"libc.syscall({0x40000000 + n}, 0, 0, 0)" for n in (39, 41, 56, 57, 59, 62))),
    Hostile("calls of 32 bits", PRELUDE + """
mmap = libc.mmap
mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
def call(number):  # mov eax, number; int 0x80; ret
    code = bytes([0xB8, number, 0, 0, 0, 0xCD, 0x80, 0xC3])
    at = mmap(None, 4096, 7, 0x22, -1, 0)
    ctypes.memmove(at, code, len(code))
    return max(-1, ctypes.CFUNCTYPE(ctypes.c_int)(at)())
for number in (2, 20, 190):  # fork, getpid, vfork
    attempt(lambda: call(number))
""", frozenset({"ok", "killed", "error"})),
    # Tricks with the interpreter around it
    Hostile("replaces the end of the process", PRELUDE + "os._exit = sys.exit = lambda *a: None\nprint('still here')",
            frozenset({"ok", "error", "killed", "timeout"})),
    stopped("an error that cannot be told", "class Odd(Exception):\n  def __str__(self): raise Odd()\nraise Odd()",
            "error"),
    stopped("changes the frames that called it", "frame = sys._getframe()\nwhile frame:\n"
            "  for name in list(frame.f_globals): frame.f_globals[name] = None\n  frame = frame.f_back\n1 / 0",
            "error", "ok"),
    stopped("formats without end", "print('%*d' % (1 << 40, 1))", "memory", "error"),
    stopped("reports itself isolated and floods stderr", "while True: os.write(2, b'\\x06' * 4096)", "output"),
]  # fmt: skip

SLOW = [
    Hostile("works when all is done", PRELUDE + "sys.modules['builtins'].exit = None\nclass Late:\n"
            "  def __del__(self):\n    while True: pass\nlate = Late()\nprint('done')"),
    stopped("output that never flushes", "class Out:\n  def write(self, text): pass\n  def flush(self):\n"
            "    while True: pass\nsys.stdout = Out()", "timeout"),
    stopped("an error that takes for ever to tell", "class Slow(Exception):\n  def __str__(self):\n"
            "    while True: pass\nraise Slow()", "timeout"),
    stopped("goes on after its CPU time", "signal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass",
            "timeout"),
    stopped("traces everything", "def slow(*a):\n  time.sleep(0.01)\n  return slow\nsys.settrace(slow)\n"
            "def f(n): return n and f(n - 1)\nwhile True: f(50)", "timeout"),
    stopped("one number of a million digits", "sys.set_int_max_str_digits(0)\nx = 7 ** 3000000\nprint(len(str(x)))",
            "ok", "timeout", "memory", "output"),
]  # fmt: skip
"""Further ones, each of which takes all the time that it is given."""
