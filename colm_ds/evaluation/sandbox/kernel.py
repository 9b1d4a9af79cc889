"""The kernel's means of isolation through ctypes: namespaces, seccomp, Landlock, capabilities.

The sandbox's server loads this file by its path into an interpreter without site-packages, so it needs only
the standard library. Every function acts on the calling process and raises `OSError` if the kernel refuses.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

NOBODY = 65534
WORK = "/work"  # the only folder that a program can write to, seen from inside the namespaces

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# Numbers on x86_64 and aarch64 (None: does not exist) of the calls that a program may make. Others fail with EPERM: no
# process or thread can be started, no other program executed, no socket opened, no other process signalled, traced,
# limited or renamed, and no owner, mode or time of a file changed.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "unlink": (87, None), "readlink": (89, None),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "mkdirat": (258, 34),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "dup3": (292, 24), "pipe2": (293, 59), "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283),
    "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
# Calls whose first argument names a process: allowed for the caller itself only.
_CALLS_ON_SELF = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
_PRLIMIT, _IOCTL, _FCNTL = (302, 261), (16, 29), (72, 25)
# Duplicate, and get and set flags. Others would send signals to any process of the same user (F_SETOWN).
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH
_PIVOT_ROOT = (155, 41)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def _prctl(what: str, option: int, *arguments: object) -> None:
    wide = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    wide += [ctypes.c_ulong(0)] * (4 - len(wide))
    _check(_libc.prctl(option, *wide), what)


def _column() -> int:
    machine = platform.machine()
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    return _MACHINES[machine][0]


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends."""
    _prctl("prctl(PDEATHSIG)", _PR_SET_PDEATHSIG, 9)


def drop_root() -> None:
    """Become the user nobody permanently if the caller is root; do nothing for other users."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for fresh ones."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(result, f"mount {target}")


def enter_namespaces() -> None:
    """Move into fresh user, mount, network, IPC and UTS namespaces whose root folder holds only `WORK`.

    Neither the machine's files nor its network can be reached from there. The new user has no rights outside.
    """
    user, group = os.geteuid(), os.getegid()
    # After a change of user the process's own files in /proc belong to root; being dumpable returns them.
    _prctl("prctl(DUMPABLE)", _PR_SET_DUMPABLE, 1)
    unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    safe = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("root", "/tmp", "tmpfs", safe, "size=64k,nr_inodes=8,mode=0755")
    os.chdir("/tmp")
    os.mkdir("work", 0o700)
    _syscall("pivot_root", _PIVOT_ROOT[_column()], b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | safe)
    _prctl("prctl(DUMPABLE)", _PR_SET_DUMPABLE, 0)


def enter_program_namespaces(files_mib: int) -> None:
    """Enter fresh mount and process namespaces for one program, with an empty `WORK` of `files_mib` MiB.

    The process forked next is process 1 of its namespace: when it ends, the kernel kills all that it started.
    """
    unshare(CLONE_NEWNS | CLONE_NEWPID)
    _mount("work", WORK, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, f"size={files_mib}m,nr_inodes=1024,mode=0700")


def drop_capabilities() -> None:
    """Drop every capability, and with no_new_privs the possibility to gain any."""
    _prctl("prctl(NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)
    _check(_libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")


def landlock_abi() -> int:
    """Return the version of Landlock that the kernel offers; 0 for none."""
    return max(0, _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_long(0), ctypes.c_long(1)))


def restrict_files(folder: str) -> None:
    """Deny with Landlock every use of files outside `folder`, TCP, and signals to processes outside (as the ABI has).

    Raises:
        OSError: if the kernel has no Landlock.
    """
    abi = landlock_abi()
    if not abi:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    all_rights = (1 << (13 if abi == 1 else 14 if abi == 2 else 15 if abi <= 4 else 16)) - 1
    rules = struct.pack("QQQ", all_rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall("landlock_create_ruleset", _LANDLOCK_CREATE, rules, size, 0)
    # Write and read files, list, remove folders and files, make folders and plain files, truncate.
    inside = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 14)) & all_rights
    beneath = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _syscall("landlock_add_rule", _LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", inside, beneath), 0)
        _prctl("prctl(NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)
        _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT, ruleset, 0)
    finally:
        os.close(beneath)
        os.close(ruleset)


def filter_calls() -> None:
    """Allow only the system calls of a single-threaded calculation (seccomp); others fail with EPERM.

    Raises:
        OSError: if the machine is neither x86_64 nor aarch64, or the kernel has no seccomp filters.
    """
    code = _filter_program(_column(), os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _prctl("prctl(NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)
    _prctl("prctl(SECCOMP)", _PR_SET_SECCOMP, 2, program)


def _filter_program(column: int, pid: int) -> bytes:
    """Return the classic BPF program: load the machine and the call's number, and compare it with the allowed ones."""
    load, equal, ret = 0x20, 0x15, 0x06  # LD|W|ABS, JMP|JEQ|K, RET|K
    allow, refuse, not_a_terminal = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOTTY
    arch = next(arch for index, arch in _MACHINES.values() if index == column)
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, arch),
        (ret, 0, 0, refuse),
        (load, 0, 0, 0),
    ]

    def on_argument(index: int, number: int, values: Sequence[int]) -> None:
        checks = [line for value in values for line in ((equal, 0, 1, value), (ret, 0, 0, allow))]
        body = [(load, 0, 0, 16 + 8 * index), *checks, (ret, 0, 0, refuse)]
        lines.extend([(equal, 0, len(body), number), *body])

    for numbers in _CALLS.values():
        number = numbers[column]
        if number is not None:
            lines.extend([(equal, 0, 1, number), (ret, 0, 0, allow)])
    for numbers in _CALLS_ON_SELF.values():
        on_argument(0, numbers[column], [pid])
    on_argument(0, _PRLIMIT[column], [0, pid])
    on_argument(1, _FCNTL[column], _FCNTL_COMMANDS)
    lines.extend([(equal, 0, 1, _IOCTL[column]), (ret, 0, 0, not_a_terminal), (ret, 0, 0, refuse)])
    return b"".join(struct.pack("HBBI", *line) for line in lines)
