"""KOI_ONE_OF under faults: three members of etcd, three hosts, a checker."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import support
from koi_group import Faults, Group, check, keep, record, settled

koitab = support.load("koitab")
pytestmark = support.root_only

# When Europe/Berlin's time changes, in seconds since 1970.
CHANGE_TO_SUMMER, CHANGE_TO_WINTER = 1_774_746_000, 1_792_890_000


def one_group(folder, base: float, minutes: int, jobs: list, seed: int):
    """Return what was recorded of a cluster with faults, and the result."""
    group = Group(folder, base, seed)
    print(f"seed {seed}")
    try:
        group.cluster().wait_for_members()
        group.move_to(base)
        chance = random.Random(seed)
        group.with_tab([*jobs, "30 2 * * *", "*/5 2 * * *", "0~4,5~9 * * * *",
                   "0~4,5~9 0,1,3 * * *"])
        for host in group.hosts:
            host.rate = 0.01 if support.FULL else 0.025
            host.start(skew=chance.uniform(-4, 4))
        support.wait_until(lambda: all(
            host.koi.answers() for host in group.hosts), 60, "the koids")
        begin = (group.now() + 90) // 60 * 60
        end = begin + minutes * 60
        # Each start of the long form has one minute, not five.
        Faults(group, (20, 90) if support.FULL else (10, 60)).run(end)
        for host in group.hosts:        # koids that do not fail
            host.rate = 0.0
            host.signal(9)
            host.koi.daemon.wait(30)
            host.start()
        settled(*group.hosts)
        found = record(group, begin, end - 0.5)
        return found, check(found)
    finally:
        group.close()


def judge(folder, base: float, minutes: int, jobs: list[str]) -> dict:
    """Fail if a cluster with faults breaks a promise; return the counts. The
    inputs of the checker are kept below `folder`, or in TESTS_KEEP."""
    seed = random.SystemRandom().randrange(10**9)
    found, verdict = one_group(folder, base, minutes, jobs, seed)
    kept = Path(os.environ.get("TESTS_KEEP", folder))
    path = keep(found, kept / f"group-{seed}.json")
    print(path, verdict.counts)
    assert verdict.wrong == [], f"{path}: seed {seed}: {verdict.counts}"
    assert verdict.counts["executed"] > verdict.counts["starts"] / 4
    # In the short form each start may have been near a fault.
    assert verdict.counts["fair"] or not support.FULL
    return verdict.counts


# Half of the entries are at fixed times, but not in the hour of the gap: there
# an entry for each minute would start 60 times at once.
WORLDS = [pytest.param(CHANGE_TO_SUMMER - 240, 20 if support.FULL else 4, [
    "* * * * *", "0-59 0,1,3-23 * * *"] * 13, id="gap")] + [
    pytest.param(CHANGE_TO_WINTER - 360, 22, ["* * * * *"] * 24, id="fold")
    ] * support.FULL


@pytest.mark.parametrize("base, minutes, jobs", WORLDS)
def test_group_makes_no_start_twice_under_random_faults(
        tmp_path, base, minutes, jobs):
    """100 starts through the gap; in the long form 500, and 500 through the
    fold, each of which has 60 seconds."""
    support.need("etcd", "ip", "unshare", "nsenter")
    judge(tmp_path, base, minutes, jobs)
