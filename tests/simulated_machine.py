"""Start a program as on macOS or FreeBSD, as far as Python shows them.

    python3 -IS simulated_machine.py PLATFORM BOOT CACHE PATCH FILE [ARG]...

PLATFORM is darwin or freebsd14, BOOT a file with the ID of the boot, or ""
for a system that has none; the rest is for tests/cached.py. What these
systems lack is deleted from the modules, what they do otherwise is done so.
A test starts this with `Machine.command`, which also hides /proc and /run.

This is no such machine: its kernel, its C library and its users are Linux's.
"""

import ctypes
import fcntl
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import types

GROUPS, MOST_GROUPS = 18, 16        # of an ordinary administrator of macOS
PEER_CREDENTIALS = socket.SO_PEERCRED

# Names that the modules do not have there; the last letters of some are *.
MISSING = {
    os: "pipe2 O_PATH waitid P_* WEXITED WNOWAIT WSTOPPED posix_fadvise "
        "posix_fallocate fdatasync setresuid setresgid getresuid getresgid "
        "memfd_create pidfd_open eventfd* splice copy_file_range getrandom "
        "O_DIRECT O_TMPFILE O_NOATIME O_RSYNC O_LARGEFILE getxattr setxattr "
        "listxattr removexattr setns unshare sched_*",
    signal: "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGSTKFLT SIGCLD "
            "SIGPOLL SIGPWR",
    select: "EPOLL* epoll POLLRDHUP",
    socket: "SO_PEERCRED SO_PASSCRED SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK "
            "AF_PACKET AF_VSOCK MSG_CMSG_CLOEXEC MSG_NOSIGNAL MSG_MORE "
            "SO_BINDTODEVICE SO_MARK SO_DOMAIN SO_PROTOCOL SO_PRIORITY "
            "TCP_CORK TCP_DEFER_ACCEPT TCP_INFO TCP_LINGER2 TCP_QUICKACK "
            "TCP_SYNCNT TCP_USER_TIMEOUT TCP_WINDOW_CLAMP",
    fcntl: "DN_* F_NOTIFY F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS F_GET_SEALS",
    time: "CLOCK_BOOTTIME CLOCK_TAI",
}


def delete_missing() -> None:
    for module, names in MISSING.items():
        for name in names.split():
            for each in [each for each in dir(module) if each == name
                         or name[-1] == "*" and each.startswith(name[:-1])]:
                delattr(module, each)


def limit_groups() -> None:
    """An administrator has more groups than setgroups(2) takes."""
    lookup, configuration = os.getgrouplist, os.sysconf
    setgroups, init = os.setgroups, subprocess.Popen.__init__
    more = [9000 + number for number in range(GROUPS)]

    def refuse(groups) -> None:
        if groups is not None and len(groups) > MOST_GROUPS:
            raise ValueError("too many groups")

    def limited_setgroups(groups) -> None:
        refuse(groups)
        setgroups(groups)

    def limited_popen(self, *args, extra_groups=None, **options) -> None:
        refuse(extra_groups)
        init(self, *args, extra_groups=extra_groups, **options)

    os.getgrouplist = lambda name, gid: [*more, *lookup(name, gid)]
    os.setgroups = limited_setgroups
    os.sysconf = lambda name: MOST_GROUPS if name == "SC_NGROUPS_MAX" \
        else configuration(name)
    if sys.platform == "darwin":    # it answers from its directory
        os.getgroups = lambda: more
    subprocess.Popen.__init__ = limited_popen


def getsockopt(self, level: int, option: int, size: int = 0):
    """LOCAL_PEERCRED of a Unix socket gives a struct xucred."""
    if (self.family, level, option) == (socket.AF_UNIX, 0, 1):
        _, uid, _ = struct.unpack("3i", real_getsockopt(
            self, socket.SOL_SOCKET, PEER_CREDENTIALS, 12))
        return struct.pack("2I68x", 0, uid)
    return real_getsockopt(self, level, option, size)


real_getsockopt = socket.socket.getsockopt


class Library:
    """The C library, without the functions of Linux."""

    def __init__(self, _name=None, **_options):
        pass


class LibraryWithBoot(Library):
    boot = ""               # the path of a file

    def sysctlbyname(self, name: bytes, value, size, _new, _length) -> int:
        if name != NAMES_OF_BOOT[sys.platform]:
            return -1
        with open(self.boot, "rb") as file:
            value.value = file.read().strip()
        size._obj.value = len(value.value) + 1
        return 0


NAMES_OF_BOOT = {"darwin": b"kern.bootsessionuuid",
                 "freebsd14": b"kern.boottime"}


def refuse_sessions() -> None:
    """FreeBSD has no POSIX_SPAWN_SETSID."""
    spawn = os.posix_spawn

    def posix_spawn(*args, setsid=False, **options):
        if setsid:
            raise NotImplementedError("setsid unavailable on this platform")
        return spawn(*args, **options)
    os.posix_spawn = posix_spawn


def main(platform: str, boot: str) -> None:
    del sys.argv[:3]
    assert platform in NAMES_OF_BOOT
    sys.platform, signal.NSIG = platform, 32
    delete_missing()
    limit_groups()
    if platform != "darwin":
        refuse_sessions()
    selectors.DefaultSelector = selectors.PollSelector
    socket.socket.getsockopt = getsockopt
    sys.modules["_scproxy"] = types.ModuleType("_scproxy")
    ctypes.CDLL = LibraryWithBoot if boot else Library
    LibraryWithBoot.boot = boot
    cached = __file__.replace("simulated_machine", "cached")
    sys.argv.insert(0, cached)
    with open(cached, encoding="utf-8") as file:
        exec(compile(file.read(), cached, "exec"), {"__name__": "cached"})


if __name__ == "__main__":
    main(*sys.argv[1:3])
