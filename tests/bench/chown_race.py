#!/usr/bin/env python3
"""How three walks fare against a user who swaps names while they walk.

    sudo tests/bench/chown_race.py [SECONDS]        (60 for each by default)

For each attack and each walk: the passes made, and how many of root's files
outside the tree ended up with another owner. A careless walk must lose, or
the attack was none; mission's must not, and then the exit status is 0.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attack  # noqa: E402
import support  # noqa: E402

ALICE = support.ALICE_UID


def mission(tree, uid: int, gid: int) -> None:
    support.load("mission").chown_tree(str(tree), uid, gid)


# attack -> its rig, and the careless walk that it beats
ATTACKS = {
    "links": (attack.Race, attack.walk_by_paths),
    "inner": (attack.Race, attack.walk_by_paths),
    "files": (attack.Race, attack.naive_walk),
    "link": (attack.Links, attack.counting_walk),
    "folder": (attack.Links, attack.counting_walk),
}


def duel(rig, walk, seconds: float) -> tuple[int, int, int]:
    """(passes, passes that lost a file, files lost). What was stolen is
    taken back at once, so that each pass counts."""
    passes = lost = files = 0
    deadline = time.monotonic() + seconds
    with rig.attacker():
        while time.monotonic() < deadline:
            walk(rig.tree, ALICE, ALICE + passes % 2)
            passes += 1
            stolen = rig.stolen()
            if stolen:
                lost, files = lost + 1, files + stolen
                rig.restore()
    return passes, lost, files


def main(argv: list[str]) -> int:
    if not support.AS_ROOT:
        sys.exit("only root can give files away: run it as root")
    seconds = float(argv[0]) if argv else 60.0
    safe = True
    print(f"{'attack':8} {'walk':14} {'passes':>8} {'lost':>8} {'files':>8}")
    for name, (kind, careless) in ATTACKS.items():
        walks = [careless, mission]
        if kind is attack.Race:     # chown(1) follows any hard link
            walks.insert(1, attack.coreutils)
        for walk in walks:
            folder = Path(tempfile.mkdtemp(prefix="chown-race-"))
            folder.chmod(0o755)
            try:
                passes, lost, files = duel(kind(folder, name), walk, seconds)
            finally:
                shutil.rmtree(folder)
            print(f"{name:8} {walk.__name__:14} {passes:8,} {lost:8,} "
                  f"{files:8,}", flush=True)
            if walk in (mission, careless):
                safe = safe and bool(files) == (walk is careless)
    return 0 if safe else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
