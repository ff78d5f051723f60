"""A program, shut in: `python -I shut_in.py SECONDS BYTES REFUSED`, with the program on stdin. `sandbox` starts it.

On Linux a process may give itself less than its user has. This one can then reach no network, sees every file but can
write only into an empty folder of its own in memory, sees and starts no processes, and has limits on time, memory and open
files. Then it runs the program. The first line of stdin is a secret that is printed at the end: so a program that ends
early, by `exit()` or a crash, has not passed. Exits with the number REFUSED and a reason on stderr where the system
does not allow all that.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

OPEN_FILES, FILE_BYTES = 64, 1 << 24

# From Linux' headers.
NEW_MOUNTS, NEW_NAMES, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 0x4000, 0x40000, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SIGKILL, SECCOMP_MODE_FILTER = 1, 22, 38, 9, 2
CAPABILITY_VERSION, CLONE_THREAD, EPERM, ENOSYS = 0x20080522, 0x10000, 1, 38
# For each machine: what seccomp calls it; its calls capset, mount_setattr, clone, clone3 and prctl; and those that are
# refused: old ones such as fork, socket (a socket with a path leads out), shmget (memory that no limit counts), and
# io_uring_setup (which makes the others).
CALLS = {
    "x86_64": (0xC000003E, 126, 442, 56, 435, 157, (57, 58, 41, 29, 425)),
    "aarch64": (0xC00000B7, 91, 442, 220, 435, 167, (198, 194, 425)),
}

libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    """Raise `OSError` if a call failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def leave_the_system() -> None:
    """Go where there is no network, and where files can be read only; /tmp is empty there, and can be written."""
    user, group, calls = os.getuid(), os.getgid(), CALLS[os.uname().machine]
    must(libc.unshare(NEW_USERS | NEW_NETWORK | NEW_PROCESSES | NEW_MOUNTS | NEW_IPC | NEW_NAMES), "no namespaces")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "no mounts of its own")
    only_read = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    must(libc.syscall(calls[2], AT_FDCWD, b"/", AT_RECURSIVE, only_read, len(only_read)), "files stay writable")
    must(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b"size=64m"), "no folder in memory")
    os.chdir("/tmp")
    child = os.fork()  # only a new process is alone among the processes that it sees
    if child:
        os._exit(max(1, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "it would outlive its caller")


def give_up_rights(seconds: int, size: int) -> None:
    """Set limits, and give up the right to change them, to mount, and to start processes (threads are allowed)."""
    machine, capset, _, clone, clone3, prctl, refused = CALLS[os.uname().machine]
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "privileges can be gained")
    must(libc.syscall(capset, struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)), "rights stay")

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    load, equal, from_, any_bit, answer, kill, allow = 0x20, 0x15, 0x35, 0x45, 0x06, 0x80000000, 0x7FFF0000
    # Calls of another machine, or of x86-64's other kind (x32), have other numbers: they end the program.
    steps = [step(load, 4), step(equal, machine, 1), step(answer, kill), step(load, 0), step(from_, 1 << 30, 0, 1)]
    steps.append(step(answer, kill))
    for call, error in (*((call, EPERM) for call in refused), (clone3, ENOSYS)):
        steps += [step(equal, call, 0, 1), step(answer, 0x50000 | error)]
    # It cannot ask to outlive its caller.
    steps += [step(equal, prctl, 0, 4), step(load, 16), step(equal, PR_SET_PDEATHSIG, 0, 1), step(answer, 0x50000 | EPERM)]
    steps.append(step(load, 0))
    steps += [step(equal, clone, 0, 3), step(load, 16), step(any_bit, CLONE_THREAD, 1), step(answer, 0x50000 | EPERM)]
    steps.append(step(answer, allow))
    rules = ctypes.create_string_buffer(b"".join(steps))
    filter_ = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(rules))
    must(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0), "processes can be started")


def main() -> None:
    secret, _, program = sys.stdin.read().partition("\n")
    seconds, size, refused = map(int, sys.argv[1:])
    try:
        must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "it would outlive its caller")
        leave_the_system()
        give_up_rights(seconds, size)
    except (OSError, KeyError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(refused)
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(out, secret.encode())


if __name__ == "__main__":
    main()
