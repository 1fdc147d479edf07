"""koid next to Debian's cron: the same lines, the same clock, the same starts.

Both daemons run in the test's own namespace, under one clock that
stands still until the test sets it to another minute (clockwork.py). So each
start belongs to one minute, and nothing needs to be tolerated.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

import clockwork
import support

koitab = support.load("koitab")
pytestmark = support.root_only

MINUTE = 60
KOID = support.ROOT / "koitab.py"
BERLIN, LORD_HOWE = "Europe/Berlin", "Australia/Lord_Howe"

# With the first, no minute passes without a start. Some are for midnight,
# when we set the clock; some for the hours in which summer time comes.
MANY = """
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

# With these koid sleeps over many minutes, while cron looks at each.
FEW = """
11 * * * *
31 * * * *
7 */2 * * *
*/30 2 * * *
*/20 1-3 * * *
*/29 */2 * * 0
40,45 */3 * * *
58 */2,3 * * *
21 1-23/2 * * sat,sun
52 0-23/2 * * *
17 3 * * *
30 2 * * *
0 3 * * *
59 1 * * *
2 2 * * 7
10 2 29 3 *
50 2 * oct *
25 22,23,0-3 * * *
4-6 0,4,8 * * *
33,34 5-20/3 * * *
9 3 */2 * sun
48 6 1-31/2 * mon
0 9 * * *
0 0 * * *
1 0 14 * 2
30 6,23 * * *
@hourly
@daily
@midnight
@weekly
""".strip().splitlines()


def clock(begin: str, minutes: int, steps: dict | None = None) -> list[int]:
    """Return the minutes that a clock shows, which is set at some of them.

    steps: after so many minutes -> by so many minutes."""
    at, walls = int(datetime.fromisoformat(begin).timestamp()), []
    for minute in range(minutes):
        at += (steps or {}).get(minute, 0) * MINUTE
        walls.append(at + minute * MINUTE)
    return walls


def unsteady(minutes: int, most: int) -> dict[int, int]:
    """A clock that is set again and again, around each limit of the rule."""
    dice, minute, steps = random.Random(3), 4, {}
    while minute < minutes:
        steps[minute] = dice.choice([
            -240, -181, -180, -179, -60, -21, -11, -5, -2, -1,
            1, 2, 3, 4, 5, 6, 10, 21, 60, 178, 179, 180, 240])
        minute += dice.randint(3, most)
    return steps


SPRING, AUTUMN = "2026-03-29T01:40+01:00", "2026-10-25T01:50+02:00"
SATURDAY = "2026-06-13"
SCENES = {
    "Berlin in spring": (BERLIN, clock(SPRING, 50), MANY),
    "Berlin in autumn": (BERLIN, clock(AUTUMN, 140), MANY),
    "Lord Howe in spring": (
        LORD_HOWE, clock("2026-10-04T01:40+10:30", 40), MANY),
    "Lord Howe in autumn": (
        LORD_HOWE, clock("2026-04-05T01:20+11:00", 75), MANY),
    "Berlin in spring, few jobs": (BERLIN, clock(SPRING, 480), FEW),
    "Berlin in autumn, few jobs": (
        BERLIN, clock(AUTUMN, 480 if support.FULL else 240), FEW),
    "set forward by 3 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:45+02:00", 40, {14: 3}), MANY),
    "set forward by 10 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:40+02:00", 40, {14: 10}), MANY),
    "set back by 11 minutes": (
        BERLIN, clock(f"{SATURDAY}T23:52+02:00", 40, {14: -11}), MANY),
    "set forward by 4 hours": (
        BERLIN, clock(f"{SATURDAY}T23:40+02:00", 40, {14: 240}), MANY),
    "set back by 4 hours": (
        BERLIN, clock(f"{SATURDAY}T23:52+02:00", 40, {14: -240}), MANY),
    "set every few minutes": (
        BERLIN, clock(f"{SATURDAY}T23:30+02:00", 50, unsteady(50, 5)), MANY),
    "set now and then, few jobs": (
        BERLIN, clock(f"{SATURDAY}T23:30+02:00",
                      600 if support.FULL else 240, unsteady(600, 30)), FEW),
}
if not support.FULL:    # each rule and each kind of scene once
    SCENES = {name: SCENES[name] for name in (
        "Berlin in spring", "Lord Howe in autumn",
        "Berlin in autumn, few jobs", "set forward by 10 minutes",
        "set back by 11 minutes", "set every few minutes",
        "set now and then, few jobs")}


def play(folder: Path, name: str, program: Path = KOID) -> dict:
    """Where time just passes and each minute has its jobs, koid runs as it
    is; elsewhere also its sleep is part of the scene."""
    zone, walls, lines = SCENES[name]
    sleeper = lines is FEW or name.startswith("set ")
    patch = clockwork.STILL.format(clock=f"{folder}/koid.clock")
    command = [*support.program("koitab", "/usr/bin/python3", patch)[:-1],
               str(program)]
    return clockwork.run(folder, zone, lines, walls, command, sleeper)


class Comparison:
    """What cron started in a scene next to what somebody else started, each
    as pairs of line and instant."""

    def __init__(self, name: str, cron: list, koid: list):
        self.zone, _, self.lines = SCENES[name]
        self.cron, self.koid = (Counter(map(tuple, starts))
                                for starts in (cron, koid))
        self.count = sum((self.cron | self.koid).values())
        self.differ = self.count - sum((self.cron & self.koid).values())

    def __str__(self) -> str:
        return f"compared {self.count} starts, {self.differ} differ"

    def details(self) -> str:
        zone = koitab.Machine().zone(self.zone)
        return "\n".join([str(self)] + [
            f"{koitab.format_rfc3339(wall, zone.offset(wall))} line {line} "
            f"({self.lines[line - 1]}): cron {self.cron[line, wall]}, "
            f"koid {self.koid[line, wall]}"
            for line, wall in sorted(self.cron | self.koid,
                                     key=lambda start: start[::-1])
            if self.cron[line, wall] != self.koid[line, wall]])


def planned(name: str) -> list[list[int]]:
    """What koitab's plan makes of the same minutes."""
    zone, walls, lines = SCENES[name]
    tab = koitab.parse_tab("".join(f"{line} true\n" for line in lines))
    assert not tab.errors(), tab.errors()
    starts, watch = [], None
    for turn, wall in enumerate(walls):
        now = koitab.ClockSample(float(wall), float(turn * MINUTE))
        if turn == 0:
            watch = koitab.state_for_zones(
                now, {"": koitab.Machine().zone(zone)})
        due = min(filter(None, (koitab.next_due(job, watch)
                                for job in tab.jobs)), default=None)
        watch, launches, _ = koitab.plan(tab.jobs, watch, now, due)
        starts += [[launch.job.line, wall] for launch in launches]
    return starts


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """All scenes, as many at a time as the machine has processors."""
    support.need("cron", "faketime", "unshare")
    support.need_zone(BERLIN)
    support.need_zone(LORD_HOWE)
    folder = tmp_path_factory.mktemp("scenes")
    with ThreadPoolExecutor(os.cpu_count()) as stages:
        yield {name: stages.submit(play, folder / str(number), name)
               for number, name in enumerate(SCENES)}


@pytest.mark.parametrize("name", SCENES)
def test_koid_makes_exactly_the_starts_of_debians_cron(scenes, name):
    played = scenes[name].result()
    compared = Comparison(name, played["cron"], played["koid"])
    print(f"\n{name}: {compared}", end=" ")
    assert compared.count > (50 if SCENES[name][2] is FEW else 100)
    assert not compared.differ, compared.details()


@pytest.mark.parametrize("name", SCENES)
def test_plan_has_exactly_the_starts_of_debians_cron(scenes, name):
    compared = Comparison(name, scenes[name].result()["cron"], planned(name))
    assert not compared.differ, compared.details()


def test_every_line_starts_in_some_scenario(scenes):
    for lines in (MANY, FEW) if support.FULL else (MANY,):
        started = {line for name, scene in scenes.items()
                   if SCENES[name][2] is lines
                   for line, _ in scene.result()["cron"]}
        assert (len(lines), started) == (30, set(range(1, 31)))


def test_scenarios_have_more_than_a_thousand_equal_starts_together(scenes):
    both = [scene.result() for scene in scenes.values()]
    compared = [Comparison(name, starts["cron"], starts["koid"])
                for name, starts in zip(SCENES, both)]
    count, differ = (sum(getattr(one, what) for one in compared)
                     for what in ("count", "differ"))
    print(f"\nall scenes: compared {count} starts, {differ} differ", end=" ")
    assert count > (2000 if support.FULL else 1200) and not differ


@pytest.mark.parametrize("name, rule, changed", [
    ("set forward by 10 minutes", "LONGEST_DELAY = 5 * MINUTE",
     "LONGEST_DELAY = 15 * MINUTE"),
    ("set back by 11 minutes", "if wildcard and not MINUTE",
     "if not MINUTE"),
])
def test_comparison_with_cron_detects_a_changed_rule(
        tmp_path, name, rule, changed):
    support.need("cron", "faketime", "unshare")
    support.need_zone(BERLIN)
    support.need_zone(LORD_HOWE)
    text = KOID.read_text()
    assert rule in text
    (tmp_path / "koitab.py").write_text(text.replace(rule, changed))
    played = play(tmp_path / "scene", name, tmp_path / "koitab.py")
    assert Comparison(name, played["cron"], played["koid"]).differ > 10
