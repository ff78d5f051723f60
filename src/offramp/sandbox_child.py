"""A process that locks itself up and runs Python in there: `python -I sandbox_child.py ROLE ...`. `sandbox` starts two.

The role "program" runs an answer's code, and the role "judge" the tests. They share nothing but two pipes: the judge calls
the program's functions, and gets plain data back, so it alone decides whether the tests pass. A program cannot reach it.

Each process sees only the folders of Python and of the system's libraries, read-only, and an empty `/tmp` in memory. It has
no devices, no `/proc`, no network, no other processes and no rights. It makes only the system calls of `CALLS` (seccomp),
within limits of time, memory, threads and open files. Where the system does not allow all of that, it exits with the status
REFUSED and a reason on stderr.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import struct
import symtable
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

OPEN_FILES, FILE_BYTES, FOLDER_BYTES, FOLDER_FILES, THREADS = 64, 1 << 24, 1 << 26, 1024, 32
LIBRARIES = ("/usr", "/lib", "/lib64", "/nix/store")  # where Linux keeps them
NOBODY = 65534

# From Linux' headers.
NEW_MOUNTS, NEW_GROUPS, NEW_NAMES, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 0x20, 0x1000
MS_REC, MS_PRIVATE, MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 0x4000, 0x40000, 2, -100, 0x8000
MOUNT_ATTR = 1 | 2 | 4  # read-only, no set-user-id, no devices
PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38
SIGKILL, SECCOMP_MODE_FILTER, CAPABILITY_VERSION, EPERM, ENOTTY, ENOSYS = 9, 2, 0x20080522, 1, 25, 38
RLIMIT_MSGQUEUE = 12

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column of CALLS, and seccomp's name
# The system calls that a program may make, by their numbers on x86-64 and aarch64. None leads out of the process or to
# memory that no limit counts. glibc and Python need no others.
# fmt: off
CALLS: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "open": (2, None), "openat": (257, 56), "close": (3, 57), "lseek": (8, 62), "fcntl": (72, 25), "flock": (73, 32),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "umask": (95, 166), "utimensat": (280, 88),
    "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "rt_sigtimedwait": (128, 137), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pause": (34, None),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165), "getrlimit": (97, 163), "prlimit64": (302, 261),
    "getrandom": (318, 278),
}
# fmt: on
CLONE, CLONE3, IOCTL, PRCTL = (56, 220), (435, 435), (16, 29), (157, 167)
CAPSET, MOUNT_SETATTR, PIVOT_ROOT = (126, 91), (442, 442), (155, 41)
A_THREAD = (0x3D0F00, 0x7D0F00)  # the flags of clone with which glibc and musl start a thread

libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    """Raise `OSError` if a call failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


# The lock-up ---------------------------------------------------------------------------------------


def lock_up(seconds: int, size: int) -> None:
    """Go where nothing is but Python, for `seconds` of the processor's time, with `size` bytes of memory."""
    column, machine = MACHINES[os.uname().machine]
    user, group = os.getuid(), os.getgid()
    must(libc.unshare(NEW_MOUNTS | (NEW_USERS if user else 0)), "no mounts of its own")
    if user:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    leave_the_files(column)
    if not user:  # root's threads have no limit, and root reads everybody's files
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    new = NEW_USERS | NEW_GROUPS | NEW_NAMES | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
    must(libc.unshare(new), "no namespaces")
    must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "it would outlive its caller")
    child = os.fork()  # only a new process is alone among the processes that it sees
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 1)
    must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "it would outlive its caller")
    set_limits(seconds, size)
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "privileges can be gained")
    must(libc.syscall(CAPSET[column], struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)), "rights stay")
    allow_only_calls(column, machine)


def leave_the_files(column: int) -> None:
    """Make a root folder of Python's own folders, read-only, with an empty /tmp, and leave all other files."""
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "no mounts of its own")
    files = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=".encode()
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    paths = sorted({*LIBRARIES, sys.base_prefix, sys.prefix} - {"/"}, key=len)
    opened = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in paths if os.path.isdir(path)}
    links = {path: os.readlink(path) for path in LIBRARIES if os.path.islink(path)}
    must(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, files + b"755"), "no folder in memory")
    only_read = struct.pack("4Q", MOUNT_ATTR, 0, 0, 0)
    for path, place in opened.items():
        new = f"/tmp{path}".encode()
        if path in links:
            os.symlink(links[path], new)
        elif not os.path.isdir(new):  # it may lie in another one
            os.makedirs(new)
            must(libc.mount(f"/proc/self/fd/{place}".encode(), new, None, MS_BIND | MS_REC, None), "no files")
            result = libc.syscall(MOUNT_SETATTR[column], AT_FDCWD, new, AT_RECURSIVE, only_read, len(only_read))
            must(result, "files stay writable")
        os.close(place)
    for name in ("proc", "dev", "tmp"):
        os.makedirs(f"/tmp/{name}", exist_ok=True)
    must(libc.mount(b"tmpfs", b"/tmp/tmp", b"tmpfs", flags, files + b"1777"), "no folder in memory")
    must(libc.mount(None, b"/tmp", None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, None), "files stay writable")
    os.chdir("/tmp")
    must(libc.syscall(PIVOT_ROOT[column], b".", b"."), "no root folder of its own")
    must(libc.umount2(b".", MNT_DETACH), "the old files stay")
    os.chdir("/tmp")


def set_limits(seconds: int, size: int) -> None:
    """Limit time, memory, files and threads."""
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CORE, 0),
        (RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def allow_only_calls(column: int, machine: int) -> None:
    """Let the system refuse all calls but those of `CALLS`, and clone but for threads."""

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    load, equal, from_, answer, allow, kill = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x80000000

    def refuse(error: int) -> bytes:
        return step(answer, 0x50000 | error)

    # Calls of another machine, or of x86-64's other kind (x32), have other numbers: they end the program.
    steps = [step(load, 4), step(equal, machine, 1), step(answer, kill), step(load, 0), step(from_, 1 << 30, 0, 1)]
    steps.append(step(answer, kill))
    for numbers in CALLS.values():
        if (call := numbers[column]) is not None:
            steps += [step(equal, call, 0, 1), step(answer, allow)]
    # glibc then asks clone instead, whose flags can be seen here; and files are no terminals.
    steps += [step(equal, CLONE3[column], 0, 1), refuse(ENOSYS), step(equal, IOCTL[column], 0, 1), refuse(ENOTTY)]
    for call, arguments in ((CLONE[column], A_THREAD), (PRCTL[column], (PR_SET_NAME, PR_GET_NAME))):
        steps += [step(equal, call, 0, 6), step(load, 16)]  # the low half of its first argument
        for value in arguments:
            steps += [step(equal, value, 0, 1), step(answer, allow)]
        steps.append(refuse(EPERM))
    steps.append(refuse(EPERM))
    rules = ctypes.create_string_buffer(b"".join(steps))
    filter_ = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(rules))
    must(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0), "any system call can be made")


# Program and judge ---------------------------------------------------------------------------------


class Wire:
    """Two pipes between judge and program: JSON, one message a line."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = os.fdopen(reads, "r"), os.fdopen(writes, "w")

    def send(self, message: Any) -> None:
        self._writes.write(json.dumps(message) + "\n")
        self._writes.flush()

    def messages(self) -> Iterator[Any]:
        return map(json.loads, self._reads)


def plain(value: Any) -> Any:
    """Data as JSON: [kind, content]. Raises `TypeError` for what is no plain data."""
    if value is None or isinstance(value, bool):
        return ["is", value]
    if isinstance(value, int):
        return ["int", hex(value)]
    scalars: dict[type, Callable[[Any], Any]] = {float: float, str: str, complex: repr, bytes: list}
    for scalar, written in scalars.items():
        if isinstance(value, scalar):
            return [scalar.__name__, written(value)]
    for several in (list, tuple, set, frozenset):
        if isinstance(value, several):
            return [several.__name__, [plain(each) for each in value]]
    if isinstance(value, dict):
        return ["dict", [[plain(key), plain(each)] for key, each in value.items()]]
    if isinstance(value, Iterator):
        return ["iter", [plain(each) for each in value]]
    if isinstance(value, type) and value in vars(builtins).values():
        return ["type", value.__name__]
    raise TypeError(f"{type(value).__name__} is no plain data")


def from_plain(data: Any) -> Any:
    """What `plain` was made of."""
    kind, content = data
    if kind == "int":
        return int(content, 16)
    if kind == "dict":
        return {from_plain(key): from_plain(each) for key, each in content}
    if kind in ("list", "tuple", "set", "frozenset", "iter"):
        return getattr(builtins, kind)([from_plain(each) for each in content])
    if kind == "type" and isinstance(found := getattr(builtins, content), type):
        return found
    return content if kind in ("is", "float", "str") else {"complex": complex, "bytes": bytes}[kind](content)


def run_program(program: str, wire: Wire) -> None:
    """Run an answer's code. Then tell the judge which of its names there are, and make its calls."""
    messages = wire.messages()
    wanted = next(messages)
    own: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "program", "exec"), own)
    wire.send({name: None if callable(own[name]) else plain(own[name]) for name in wanted if name in own})
    for name, arguments, named in messages:
        try:
            answer = [None, plain(own[name](*from_plain(arguments), **from_plain(named)))]
        except Exception as error:
            answer = [type(error).__name__, None]
        wire.send(answer)


def judge(before: str, tests: str, wire: Wire) -> None:
    """Run the tests; they call the program by `wire`. Raises if one fails, or if the program is gone."""
    own: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(before, "program", "exec"), own)
    wanted = sorted(names_for_the_program(tests) - own.keys())
    wire.send(wanted)
    messages = wire.messages()
    found = next(messages)
    for name in found.keys() & wanted:
        own[name] = caller(name, wire, messages) if found[name] is None else from_plain(found[name])
    exec(compile(tests, "tests", "exec"), own)


def names_for_the_program(tests: str) -> set[str]:
    """The names that tests use and do not define. Python's own are among them only if there is no other."""

    def globals_in(table: symtable.SymbolTable) -> Iterable[str]:
        yield from (symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced())
        for inner in table.get_children():
            yield from globals_in(inner)

    whole = symtable.symtable(tests, "tests", "exec")
    defined = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    names = set(globals_in(whole)) - defined
    return names - vars(builtins).keys() or names


def caller(name: str, wire: Wire, messages: Iterator[Any]) -> Callable[..., Any]:
    """A function that calls the program's function of this name."""

    def call(*arguments: Any, **named: Any) -> Any:
        wire.send([name, plain(arguments), plain(named)])
        raised, value = next(messages)
        if raised is None:
            return from_plain(value)
        kind = getattr(builtins, str(raised), RuntimeError)
        raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError()

    return call


def main() -> None:
    role, *numbers = sys.argv[1:]
    seconds, size, reads, writes, refused = map(int, numbers)
    before, program, tests = json.load(sys.stdin)
    try:
        must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "it would outlive its caller")
        nothing = os.open(os.devnull, os.O_RDWR)
        lock_up(seconds, size)
    except (OSError, KeyError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(refused)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    wire = Wire(reads, writes)
    if role == "program":
        run_program(before + program, wire)
        return
    try:
        judge(before, tests, wire)
    except BaseException:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
