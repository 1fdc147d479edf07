"""Attackers: small programs that the user of a directory runs against root.

Each is a loop in a process of alice that its test ends. The classes create
the files that an attack needs, and return afterwards what root gave away. A
test that uses one also shows that a naive walk loses the race.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import support

FILES = 20

# renameat2(2) with RENAME_EXCHANGE swaps two files in one step, so a walk
# finds the directory at one time and its replacement at the next.
HEAD = """\
import ctypes, os, signal, sys
signal.alarm(300)
libc = ctypes.CDLL(None, use_errno=True)
def swap(a, b):
    if libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2):
        raise OSError(ctypes.get_errno(), a)
def ready():
    os.write(1, b".")
"""
PROGRAMS = {
    # argv: two names that change places all the time.
    "swap": HEAD + """
a, b = sys.argv[1:]
swap(a, b)
ready()
while True:
    swap(a, b)
""",
    # argv: the names that one file gets in turn.
    "wander": HEAD + """
names = sys.argv[1:]
ready()
while True:
    for old, new in zip(names, names[1:] + names[:1]):
        os.rename(old, new)
""",
}


@contextlib.contextmanager
def attacking(program: str, *names, uid: int = support.ALICE_UID):
    """Run an attacker as a user; end it by its PID."""
    command = [support.SHARED_PYTHON, "-I", "-S", "-c", PROGRAMS[program],
               *map(str, names)]
    if support.AS_ROOT:
        command = as_user(command, uid)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE)
    with support.stopping(process):
        assert process.stdout.read(1) == b".", "the attacker did not start"
        yield process
        assert process.poll() is None, "the attacker gave up"
    process.stdout.close()


def as_user(command: list[str], uid: int = support.ALICE_UID) -> list[str]:
    return ["setpriv", "--reuid", str(uid), "--regid", str(uid),
            "--clear-groups", *command]


class Race:
    """A tree of alice, and files of root next to it.

    `tree/d/e` contains files of alice. Next to it is a link to root's
    directory (`links`) or a FIFO (`fifo`), and the attacker swaps the two.
    """

    # kind -> the two names that are swapped
    KINDS = {"links": ("d", "l"), "inner": ("d/e", "d/l"),
             "files": ("d/e/f0", "d/e/l"), "fifo": ("d", "p")}

    def __init__(self, folder: Path, kind: str):
        self.kind, self.tree = kind, folder / "tree"
        self.victims = folder / "victims"
        inside = self.tree / "d" / "e"
        for place in (inside, self.victims / "e"):
            place.mkdir(parents=True)
            for number in range(FILES):
                (place / f"f{number}").write_text("x")
        (self.tree / "l").symlink_to(self.victims)
        (self.tree / "d" / "l").symlink_to(self.victims / "e")
        (inside / "l").symlink_to(self.victims / "e" / "f0")
        os.mkfifo(self.tree / "p")
        support.own(self.tree, support.ALICE_UID)

    def attacker(self):
        return attacking("swap", *(
            self.tree / name for name in self.KINDS[self.kind]))

    def stolen(self) -> int:
        """Return how many files of root have another owner now."""
        return stolen_below(self.victims)

    def restore(self) -> None:
        for path in [self.victims, *self.victims.rglob("*")]:
            os.chown(path, 0, 0)


class Names:
    """A directory in a tree, root's but open to alice in one way, and in it a
    file of root's that she swaps with a hard link to one outside."""

    KINDS = {"mode": 0o777, "group": 0o775, "hers": 0o755, "list": 0o755}

    def __init__(self, folder: Path, kind: str):
        self.kind, self.tree = kind, folder / "tree"
        self.victims, self.place = folder / "victims", folder / "tree" / "d"
        self.victims.mkdir(parents=True)
        self.place.mkdir(parents=True)
        (self.victims / "shadow").write_text("secret")
        (self.place / "plain").write_text("x")
        os.link(self.victims / "shadow", self.place / "hard")
        self.place.chmod(self.KINDS[kind])
        if kind == "list":
            support.set_acl(self.place,
                            (support.ACL_USER, 7, support.ALICE_UID))
        self.reset()

    def reset(self) -> None:
        """As root's task leaves it: the walk has given it to alice."""
        hers = support.ALICE_UID
        os.chown(self.place, hers if self.kind == "hers" else 0,
                 hers if self.kind == "group" else 0)

    def attacker(self):
        return attacking("swap", self.place / "plain", self.place / "hard")

    def stolen(self) -> int:
        return stolen_below(self.victims)


class Links:
    """A file of root's with a name outside and one inside the tree, where
    alice moves it about (`link`), or the folder it is in (`folder`), so that
    a walk which counts names counts it twice."""

    def __init__(self, folder: Path, kind: str):
        self.kind, self.tree = kind, folder / "tree"
        self.victims = folder / "victims"
        self.victims.mkdir(parents=True)
        for place in ("a", "b", "m/d", "n"):
            (self.tree / place).mkdir(parents=True)
        victim = self.victims / "shadow"
        victim.write_text("secret")
        name = {"link": "a/x", "folder": "m/d/x"}[kind]
        os.link(victim, self.tree / name)
        for path in [self.tree, *self.tree.rglob("*")]:
            if path.is_dir():
                os.chown(path, support.ALICE_UID, support.ALICE_UID)

    def attacker(self):
        names = {"link": ("a/x", "b/x"), "folder": ("m/d", "n/d")}[self.kind]
        return attacking("wander", *(self.tree / name for name in names))

    def stolen(self) -> int:
        return stolen_below(self.victims)

    def restore(self) -> None:
        os.chown(self.victims / "shadow", 0, 0)


def stolen_below(folder: Path) -> int:
    found = 0
    for path in [folder, *folder.rglob("*")]:
        status = os.lstat(path)
        found += (status.st_uid, status.st_gid) != (0, 0)
    return found


# What not to do --------------------------------------------------------------


def naive_walk(tree, uid: int, gid: int) -> None:
    """The walk that one writes first: by paths, past links."""
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                if not os.path.islink(path):
                    os.chown(path, uid, gid)


def walk_by_paths(tree, uid: int, gid: int) -> None:
    """The same with lchown(2), which guards the last name of a path alone."""
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            with contextlib.suppress(OSError):
                os.chown(os.path.join(folder, name), uid, gid,
                         follow_symlinks=False)


def walk_of_the_library(tree, uid: int, gid: int) -> None:
    """os.fwalk follows no link, but opens what replaced a directory."""
    for _, folders, files, fd in os.fwalk(tree):
        for name in folders + files:
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)


def counting_walk(tree, uid: int, gid: int) -> None:
    """By descriptors, and a file of several names is given away when as
    many names were seen: what `wander` is made for."""
    seen: dict[tuple, int] = {}
    for _, _, files, fd in os.fwalk(tree):
        for name in files:
            with contextlib.suppress(OSError):
                status = os.lstat(name, dir_fd=fd)
                if not stat.S_ISREG(status.st_mode):
                    continue
                key = status.st_dev, status.st_ino
                seen[key] = seen.get(key, 0) + 1
                if seen[key] >= status.st_nlink:
                    os.chown(name, uid, gid, dir_fd=fd,
                             follow_symlinks=False)


def coreutils(tree, uid: int, gid: int) -> None:
    """chown(1), which is known to be safe against the swap."""
    subprocess.run([shutil.which("chown") or "chown", "-hR", f"{uid}:{gid}",
                    str(tree)], stdin=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
