"""Kit: what do both programs need?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import support

mission = support.load("mission")


# --- durations ------------------------------------------------------------


@pytest.mark.parametrize("seconds, text", [
    # Go's own examples (time.Duration.String), cut to milliseconds.
    (0, "0s"), (0.0001, "0s"), (0.001, "1ms"), (0.0011, "1ms"),
    (0.012, "12ms"), (0.5, "500ms"), (0.9999, "999ms"),
    (1, "1s"), (1.1, "1.1s"), (1.234, "1.234s"), (2.2, "2.2s"),
    (3.3, "3.3s"), (59.999, "59.999s"), (60, "1m0s"), (62.003, "1m2.003s"),
    (185.003, "3m5.003s"), (245, "4m5s"), (245.001, "4m5.001s"),
    (306.007001, "5m6.007s"), (3600, "1h0m0s"), (3605.1, "1h0m5.1s"),
    (90061.5, "25h1m1.5s"), (-3, "0s"),
    (1.001, "1.001s"), (62.026, "1m2.026s"), (0.57, "570ms"),
    (4.35, "4.35s"),        # floats that lie a hair below what they say
])
def test_duration_is_formatted_as_go_formats_it(seconds, text):
    assert mission.format_duration(seconds) == text


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400),
    ("500ms", 0.5), ("1.5h", 5400), ("2d", 172800), ("1h0m5.1s", 3605.1),
    ("0s", 0), (".5s", 0.5), ("1m1m", 120),
    ("", None), ("5", None), ("s", None), ("-1s", None), ("+1s", None),
    ("1 m", None), (" 1m", None), ("1m ", None), ("1..5s", None),
    (".s", None), ("1e3s", None), ("1S", None), ("1w", None), ("1mm", None),
    ("\u0663s", None), ("\uff11s", None), ("1s\n", None), ("inf s", None),
    ("nans", None), ("9" * 400 + "s", None),
], ids=lambda value: repr(value)[:24])
def test_valid_duration_is_parsed_and_an_invalid_one_gives_none(text, seconds):
    found = mission.parse_duration(text)
    assert found == pytest.approx(seconds) if seconds is not None \
        else found is None


def test_formatted_duration_is_parsed_to_the_same_value():
    for thousandths in [*range(0, 130_000, 7), 3_599_999, 86_400_001]:
        text = mission.format_duration(thousandths / 1000)
        assert round(mission.parse_duration(text) * 1000) == thousandths
        assert mission.format_duration(mission.parse_duration(text)) == text


# --- words ----------------------------------------------------------------


@pytest.mark.parametrize("count, text", [
    (0, "0 errors"), (1, "1 error"), (2, "2 errors"), (1234, "1,234 errors"),
])
def test_plural_adds_an_s_except_for_one(count, text):
    assert mission.plural(count, "error") == text


@pytest.mark.parametrize("typed, meant", [
    ("enabledd", "enabled"), ("notfy", "notify"), ("taks", "tasks"),
    ("Notify", "notify"), ("xyz", ""), ("", ""),
])
def test_nearest_returns_the_most_similar_word(typed, meant):
    words = ["tasks", "notify", "enabled", "storage"]
    assert mission.nearest(typed, words) == meant


@pytest.mark.parametrize("text, seen", [
    ("plain", "plain"), ("caf\u00e9 \u4e2d\u6587 \U0001f600",) * 2,
    ("tab\tstays", "tab\tstays"),
    ("a\nFinishTime 00:00 ok", r"a\x0aFinishTime 00:00 ok"),
    ("\x1b[31mred", r"\x1b[31mred"), ("\x9b31m", r"\x9b31m"),
    ("nul\0", r"nul\x00"), ("del\x7f", r"del\x7f"), ("a\rb", r"a\x0db"),
    ("\u202egnp.exe", r"\u202egnp.exe"), ("\u2066x\u2069", r"\u2066x\u2069"),
    ("\u200f", r"\u200f"), ("\ufeff", r"\ufeff"),
    ("\u2028line", r"\u2028line"), ("\udcff", r"\udcff"), ("\x85", r"\x85"),
])
def test_control_characters_are_escaped(text, seen):
    assert mission.escape_controls(text) == seen
    assert mission.escape_controls(seen) == seen


# --- values ---------------------------------------------------------------


class Point(mission.FrozenRecord):
    x: int
    y: int = 0


def test_record_has_its_fields_and_their_defaults():
    assert (Point(1).x, Point(1).y, Point(1, y=2).y) == (1, 0, 2)
    assert Point(1, 2) == Point(x=1, y=2) != Point(1, 3)
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"


def test_record_is_read_only_and_replace_returns_a_copy():
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 5
    assert (point.replace(x=5), point) == (Point(5), Point(1))


@pytest.mark.parametrize("values, named", [
    ((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}),
])
def test_record_refuses_unknown_and_missing_fields(values, named):
    with pytest.raises((TypeError, AttributeError)):
        Point(*values, **named)


def test_ticks_do_not_follow_the_system_time(monkeypatch):
    clock = mission.Clock()
    monkeypatch.setattr(mission.time, "time", lambda: 0.0)
    first = clock.ticks()
    assert clock.now() == 0.0
    assert clock.ticks() >= first > 0.0


@pytest.mark.parametrize("zone, text", [
    ("UTC", "2026-03-29T01:30:00+00:00"),
    ("CET-1CEST,M3.5.0,M10.5.0/3", "2026-03-29T03:30:00+02:00"),
    ("NST3:30", "2026-03-28T22:00:00-03:30"),
])
def test_time_is_formatted_with_its_utc_offset(zone, text, monkeypatch):
    import time
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert mission.format_rfc3339(1774747800) == text
    finally:
        monkeypatch.undo()
        time.tzset()


# --- files ----------------------------------------------------------------


def test_file_is_replaced_completely_with_mode_0600(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    mission.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert support.mode(path) == 0o600
    assert os.listdir(tmp_path) == ["state.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    path.write_text("old")

    def full(_fd, _data):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(mission, "write_all", full)
    with pytest.raises(OSError):
        mission.write_atomically(str(path), b"new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    mission.write_atomically(str(path), b"newer")   # and its rest is no bar
    assert path.read_text() == "newer"


def test_symbolic_link_at_the_new_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("state", "state.new"):
        (tmp_path / name).symlink_to(victim)
    mission.write_atomically(str(tmp_path / "state"), b"new")
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "state").is_symlink()


def test_file_is_synced_before_the_rename_and_directory_after(
        tmp_path, monkeypatch):
    deeds = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _r=real, **k: (
            deeds.append(_n), _r(*a, **k))[1])
    mission.write_atomically(str(tmp_path / "x"), b"x")
    assert deeds == ["fsync", "rename", "fsync"]


def test_short_write_is_continued(monkeypatch):
    written = []
    monkeypatch.setattr(os, "write", lambda _fd, data: (
        written.append(bytes(data[:3])), len(data[:3]))[1])
    mission.write_all(-1, b"abcdefgh")
    monkeypatch.undo()
    assert written == [b"abc", b"def", b"gh"]


# --- the lock -------------------------------------------------------------


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_process_holds_the_lock_and_its_death_releases_it(tmp_path):
    path = str(tmp_path / "lock")
    with support.stopping(holder(path)) as process:
        assert mission.try_lock(path) is None
        process.kill()
        process.wait()
        held = mission.try_lock(path)
        assert held is not None
        assert not os.get_inheritable(held)
        assert mission.try_lock(path) is None
        os.close(held)


def test_lock_file_left_by_a_crash_does_not_lock(tmp_path):
    path = tmp_path / "lock"
    path.write_text("")
    os.close(mission.try_lock(str(path)))


def test_lock_file_that_is_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        mission.try_lock(str(tmp_path / "lock"))
    assert not (tmp_path / "elsewhere").exists()
