"""Moves this process, and so whatever it starts, into a network namespace that holds nothing but a loopback.

Ray's ports listen on every interface of the machine. In a namespace of their own nobody else can reach them, and no
port can be taken already.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def unshare(flags: int) -> None:
    """The system call: os.unshare comes with Python 3.12 only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def unshare_user(uid: int, gid: int) -> None:
    """Enter a user namespace in which this process has these ids; outside it keeps its own."""
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {outer_uid} 1"), ("gid_map", f"{gid} {outer_gid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def raise_loopback() -> None:
    """Bring the interface lo up: a new namespace has it down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = b"lo".ljust(16, b"\0")
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, name + bytes(24))
        flags = struct.unpack_from("h", answer, 16)[0]
        fcntl.ioctl(sock, SIOCSIFFLAGS, name + struct.pack("h", flags | IFF_UP) + bytes(22))


def as_superuser() -> None:
    """A network namespace alone, which takes the right to administer the machine."""
    unshare(CLONE_NEWNET)
    raise_loopback()


def as_user() -> None:
    """A network namespace inside a user namespace, which many machines allow everyone."""
    unshare_user(os.geteuid(), os.getegid())
    as_superuser()


def works(attempt: Callable[[], None]) -> bool:
    """Try something in a child process, since a half-done change of namespace cannot be taken back."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def enter() -> bool:
    """Move into a namespace if the machine allows it; say whether it did. Call it before any thread is started."""
    for attempt in (as_superuser, as_user):
        if works(attempt):
            attempt()
            return True
    return False
