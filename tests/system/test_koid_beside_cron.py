"""koid beside Debian's cron: the same lines, the same clock, the same starts.

Both daemons run in a namespace of the test's own, under one clock that
stands still until the test sets it to another minute (clockwork.py). So each
start belongs to one minute, and nothing needs to be tolerated.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

import clockwork
import support

koitab = support.load("koitab")
pytestmark = support.root_only

MINUTE = 60
BERLIN, LORD_HOWE = "Europe/Berlin", "Australia/Lord_Howe"

# The first keeps any minute from passing without a start. Those at midnight
# are for the steps, the hours from 1 to 3 for the changes of summer time.
LINES = """
* * * * *
*/2 * * * *
*/5 * * * *
*/7 1-6 * * *
3-59/4 * * * *
*/10 2 * * *
*/15 */2 * * *
*/100 * * * *
0-59/3 2 * * *
0-59/7 0-6,20-23 * * *
0-59/5 3 * 3,4,10 0-7
2,5,11,17,23,41,47,53 0-6,20,22-23 * * *
5-10,50-55/2,58-59 23,0,1,2,3 * * *
0,30 2,3 * * *
30 2 * * *
0 2 * * *
0 3 * * *
59 1 * * *
15,45 1-5 * * SUN,sat
@hourly
@daily
@weekly
0 0 1,14 6 *
10-50/20 * * * sun
*/4 * * * fri,6-7
1-59/6 * 14,25,29 * 1
*/6 * */2 * 0
0-58/2 0,2,3 * mar-jun,Oct sun
20-40,57 0-3,20,23 1-7,13-29/1 * *
50-59/3 */3,23 * * 6
""".strip().splitlines()


def clock(begin: str, minutes: int, steps: dict | None = None) -> list[int]:
    """The minutes that a clock shows which is set at some of them.

    steps: after so many minutes -> by so many minutes."""
    at, walls = int(datetime.fromisoformat(begin).timestamp()), []
    for minute in range(minutes):
        at += (steps or {}).get(minute, 0) * MINUTE
        walls.append(at + minute * MINUTE)
    return walls


def unsteady(minutes: int) -> dict[int, int]:
    """A clock that is set again and again, around each limit of the rule."""
    dice = random.Random(3)
    steps = [-240, -181, -180, -179, -60, -11, -5, -1, 1, 3, 4, 5, 6, 10, 60,
             178, 179, 180, 240]
    return {minute: dice.choice(steps) for minute in range(4, minutes, 4)}


SATURDAY, SUNDAY = "2026-06-13", "2026-06-14"
SCENES = {
    "Berlin in spring": (BERLIN, clock("2026-03-29T01:40+01:00", 50)),
    "Berlin in autumn": (BERLIN, clock("2026-10-25T01:50+02:00", 140)),
    "Lord Howe in spring": (
        LORD_HOWE, clock("2026-10-04T01:40+10:30", 40)),
    "Lord Howe in autumn": (
        LORD_HOWE, clock("2026-04-05T01:20+11:00", 80)),
    "set forward by 3 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:45+02:00", 35, {14: 3})),
    "set forward by 10 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:40+02:00", 35, {14: 10})),
    "set back by 11 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:52+02:00", 40, {14: -11})),
    "set forward by 4 hours": (
        BERLIN, clock(f"{SATURDAY}T23:40+02:00", 35, {14: 240})),
    "set back by 4 hours": (
        BERLIN, clock(f"{SATURDAY}T23:52+02:00", 35, {14: -240})),
    "set every four minutes": (
        BERLIN, clock(f"{SATURDAY}T23:30+02:00", 80, unsteady(80))),
}


def planned(zone: str, walls: list[int]) -> list[list[int]]:
    """What koitab's plan makes of the same looks at the clock; unlike under
    faketime, time itself passes evenly while the clock is set."""
    tab = koitab.parse_tab("".join(f"{line} true\n" for line in LINES))
    assert not tab.faults(), tab.faults()
    starts, watch = [], None
    for turn, wall in enumerate(walls):
        now = koitab.Reading(wall + 1.0, 1.0 + turn * MINUTE)
        if turn == 0:
            watch = koitab.watching(now, {"": koitab.Machine().zone(zone)})
        watch, launches = koitab.plan(tab.jobs, watch, now)
        starts += [[launch.job.line, wall] for launch in launches]
    return starts


class Comparison:
    """Starts of two daemons, as pairs of line and instant."""

    def __init__(self, cron: list, koid: list, zone: str):
        self.cron, self.koid = (Counter(map(tuple, starts))
                                for starts in (cron, koid))
        self.zone = koitab.Machine().zone(zone)
        self.count = sum((self.cron | self.koid).values())
        self.differing = sorted(
            ((self.cron - self.koid) + (self.koid - self.cron)).elements(),
            key=lambda start: start[::-1])

    def __str__(self) -> str:
        return (f"compared {self.count} starts, "
                f"{len(self.differing)} differ")

    def details(self) -> str:
        return "\n".join([str(self)] + [
            f"{koitab.stamp(wall, self.zone.offset(wall))} line {line} "
            f"({LINES[line - 1]}): cron {self.cron[line, wall]}, "
            f"koid {self.koid[line, wall]}"
            for line, wall in sorted(set(self.differing),
                                     key=lambda start: start[::-1])])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """All scenes, played as the machine has processors."""
    support.need("cron", "faketime", "unshare")
    folder = tmp_path_factory.mktemp("scenes")
    with ThreadPoolExecutor(os.cpu_count()) as stages:
        yield {name: stages.submit(
            clockwork.run, folder / str(number), zone, LINES, walls, KOID)
            for number, (name, (zone, walls)) in enumerate(SCENES.items())}


KOID = None


def test_there_are_thirty_lines_and_each_of_them_starts(scenes):
    started = {line for scene in scenes.values()
               for line, _ in scene.result()["cron"]}
    assert (len(LINES), started) == (30, set(range(1, 31)))


@pytest.mark.parametrize("name", SCENES)
def test_the_plan_is_what_debians_cron_starts(scenes, name):
    zone, walls = SCENES[name]
    compared = Comparison(scenes[name].result()["cron"],
                          planned(zone, walls), zone)
    print(f"\n{name}: plan: {compared}", end=" ")
    assert compared.count > 150
    assert not compared.differing, compared.details()
