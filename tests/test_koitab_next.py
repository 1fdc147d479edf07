"""Command: koitab next, koitab -T, and wrong usage."""

from __future__ import annotations

import datetime
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import support

koitab = support.load("koitab")
CASES = Path(__file__).parent / "cases"


class Still:
    """A stopped clock."""

    def __init__(self, text: str):
        self.at = datetime.datetime.fromisoformat(text).timestamp()

    def now(self) -> float:
        return self.at

    def ticks(self) -> float:
        return 0.0


@pytest.fixture
def type_in(capsys, monkeypatch, tmp_path):
    """Type a command; its status, output and errors. `tab` is a file."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    monkeypatch.chdir(tmp_path)

    def typed(*argv: str, tab: str | None = None,
              now: str = "2026-03-28T12:00:30+01:00"):
        if tab is not None:
            Path("tab").write_text(tab, encoding="utf-8",
                                   errors="surrogateescape")
        status = koitab.main(list(argv), koitab.Machine(Still(now)))
        out, err = capsys.readouterr()
        return support.Result(status, out, err)
    return typed


TAB = '''MAILTO=root
[Bots]
"Crawler" */5 * * * * /usr/local/bin/crawl
@hourly python script.py
[Admin]
"Say Hi" @manual ~/tweet.sh {{To Handle}} {{Delay, int, 0}} {{Emoji, bool}}
"Night" 30 2 * * * backup
"Start" @reboot echo up
'''


def test_next_prints_the_schedule_in_words_and_the_next_starts(type_in):
    done = type_in("next", "--tab", "tab", "-n", "2", tab=TAB)
    assert (done.code, done.err) == (0, "")
    assert done.out == '''\
[Bots]
Crawler: Every 5 minutes
    2026-03-28T12:05:00+01:00 (in 4 min)
    2026-03-28T12:10:00+01:00 (in 9 min)
python script.py: Every hour
    2026-03-28T13:00:00+01:00 (in 59 min)
    2026-03-28T14:00:00+01:00 (in 1 h)
[Admin]
Say Hi: By hand
Night: At 02:30
    2026-03-29T03:00:00+02:00 (in 13 h)
    2026-03-30T02:30:00+02:00 (in 37 h)
Start: When the machine starts
'''


@pytest.mark.parametrize("seconds, words", [
    (0, "in 0 s"), (59.9, "in 59 s"), (60, "in 1 min"), (3599, "in 59 min"),
    (3600, "in 1 h"), (172_799, "in 47 h"), (172_800, "in 2 days"),
    (-1, "1 s ago"), (-7200, "2 h ago"), (-999_999, "11 days ago")])
def test_relative_time_is_cut_off_to_one_unit(seconds, words):
    assert koitab.relative_words(seconds) == words


def test_next_as_json_has_the_fields_of_each_job(type_in):
    done = type_in("next", "--tab", "tab", "--json", "-n1", tab=TAB)
    found = json.loads(done.out)
    assert [list(row) for row in found] == [
        ["name", "tag", "line", "schedule", "words", "next"]] * 5
    assert found[0] == {
        "name": "Crawler", "tag": found[0]["tag"], "line": 3,
        "schedule": "*/5 * * * *", "words": "Every 5 minutes",
        "next": ["2026-03-28T12:05:00+01:00"]}
    assert (found[1]["name"], found[1]["schedule"]) == (None, "@hourly")
    assert found[2]["schedule"] == "@manual"
    assert found[2]["next"] == found[4]["next"] == []
    assert len({row["tag"] for row in found}) == 5


@pytest.mark.parametrize("name, lines", [
    ("Crawler", [3]), ("Admin/Night", [7]), ("4", [4]), ("Say Hi", [6])])
def test_next_can_be_limited_to_one_job(type_in, name, lines):
    done = type_in("next", name, "--json", "--tab=tab", tab=TAB)
    assert [row["line"] for row in json.loads(done.out)] == lines
    tag = json.loads(done.out)[0]["tag"]
    again = type_in("next", tag, "--json", "--tab=tab", tab=TAB)
    assert again.out == done.out


def test_next_of_an_unknown_job_is_an_error(type_in):
    done = type_in("next", "Crawlr", "--tab", "tab", tab=TAB)
    assert (done.code, done.out) == (1, "")
    assert 'did you mean "Crawler"?' in done.err


@pytest.mark.parametrize("start, first", [
    ("2026-03-29T01:30", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29 01:30", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29T01:30:00+01:00", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29T00:30:00Z", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29T00:30:00.5Z", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29T02:59:59+02:00", "2026-03-29T03:00:00+02:00"),
    ("2026-03-29T03:00", "2026-03-30T02:30:00+02:00"),
    ("2026-10-25", "2026-10-25T02:30:00+02:00"),
    ("2026-10-25T02:30", "2026-10-26T02:30:00+01:00"),
    ("now", "2026-03-29T03:00:00+02:00"),
    ("", "2026-03-29T03:00:00+02:00"),
])
def test_option_from_sets_the_reference_time(type_in, start, first):
    done = type_in("next", "Night", "--json", "--tab", "tab", "--from", start,
                   tab=TAB)
    assert json.loads(done.out)[0]["next"][0] == first


@pytest.mark.parametrize("start", [
    "yesterday", "2026", "2026-02-30", "2026-13-01", "2026-01-01T24:00",
    "2026-01-01T12:60", "1", "\uff12026-01-01", "2026-01-01T12:00+1"])
def test_option_from_with_an_invalid_time_is_an_error(type_in, start):
    done = type_in("next", "--tab", "tab", "--from", start, tab=TAB)
    assert (done.code, done.out) == (2, "")
    assert "not a time" in done.err


@pytest.mark.parametrize("place, first", [
    ("UTC", "2026-03-29T02:30:00+00:00"), ("", "2026-03-29T02:30:00+00:00"),
    ("America/New_York", "2026-03-29T02:30:00-04:00"),
    (":Asia/Kathmandu", "2026-03-29T02:30:00+05:45"),
    (str(support.ZONES / "Europe/Berlin"), "2026-03-29T03:00:00+02:00"),
    ("CET-1CEST,M3.5.0,M10.5.0/3", "2026-03-29T03:00:00+02:00"),
])
def test_tz_sets_the_zone(type_in, monkeypatch, place, first):
    monkeypatch.setenv("TZ", place)
    done = type_in("next", "Night", "--json", "--tab", "tab", "--from",
                   "2026-03-29", tab=TAB)
    assert json.loads(done.out)[0]["next"][0] == first


def test_zone_of_the_machine_applies_without_tz(type_in, monkeypatch):
    monkeypatch.delenv("TZ")
    monkeypatch.setattr(koitab, "LOCAL_ZONE",
                        str(support.ZONES / "Asia/Kathmandu"))
    done = type_in("next", "Night", "--json", "--tab", "tab", "-n1", tab=TAB)
    assert json.loads(done.out)[0]["next"] == ["2026-03-29T02:30:00+05:45"]
    monkeypatch.setattr(koitab, "LOCAL_ZONE", "/nowhere")
    done = type_in("next", "Night", "--json", "--tab", "tab", "-n1", tab=TAB)
    assert json.loads(done.out)[0]["next"] == ["2026-03-29T02:30:00+00:00"]


def test_unknown_zone_is_an_error(type_in, monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Nowhere")
    done = type_in("next", "--tab", "tab", tab=TAB)
    assert (done.code, done.out) == (1, "")
    assert "unknown time zone" in done.err


@pytest.mark.parametrize("name", ["Europe/Nowhere", "../../../etc/passwd",
                                  "/etc/localtime", "", "zone.tab", "a\0b",
                                  "Europe"])
def test_cron_tz_cannot_name_a_file_outside_the_zone_directory(name):
    with pytest.raises(koitab.Error):
        koitab.Machine().zone(name)


def test_cron_tz_applies_to_the_lines_below_it(type_in):
    text = ("0 12 * * * a\nCRON_TZ=America/New_York\n0 12 * * * b\n"
            "CRON_TZ=Europe/Nowhere\n0 12 * * * c\nCRON_TZ=\n0 12 * * * d\n")
    done = type_in("next", "--tab", "tab", "--json", "-n1", tab=text)
    assert [(row["line"], row["next"]) for row in json.loads(done.out)] == [
        (1, ["2026-03-29T12:00:00+02:00"]), (3, ["2026-03-28T12:00:00-04:00"]),
        (7, ["2026-03-29T12:00:00+02:00"])]
    assert json.loads(done.out)[1]["words"] == "At 12:00 (America/New_York)"
    assert done.code == 1
    assert done.err.startswith("tab:4:9: bad setting: unknown time zone")


def test_dates_that_are_skipped_have_no_starts(type_in):
    text = ("KOI_SKIP=2026-03-29..2026-03-30,2026-04-01\n"
            "CRON_TZ=Pacific/Kiritimati\n30 2 * * * a\n"
            "KOI_SKIP=2026-01-01..9999-12-31\n* * * * * b\n")
    done = type_in("next", "--tab", "tab", "--json", "-n3", tab=text)
    first, second = json.loads(done.out)
    assert first["next"] == [f"2026-{day}T02:30:00+14:00"
                             for day in ("03-31", "04-02", "04-03")]
    assert first["words"] == ("At 02:30 (Pacific/Kiritimati), not on "
                              "2026-03-29..2026-03-30,2026-04-01")
    assert second["next"][0] == "10000-01-01T00:00:00+14:00"


@pytest.mark.parametrize("place", ["America/Sao_Paulo", "America/Havana",
                                   "Asia/Beirut", "Pacific/Apia"])
def test_skipped_dates_are_those_of_the_zone_in_all_its_changes(place):
    """Zones that change their clocks at midnight, and one that left out a
    day."""
    support.need_zone(place)
    zone = koitab.Machine().zone(place)
    begin = int(datetime.datetime(2011, 1, 1).timestamp())
    end = begin + 400 * koitab.DAY
    text = "KOI_SKIP=2011-02-19..2011-02-20,2011-10-15,2011-11-13," \
        "2011-12-29..2011-12-30,2011-03-26\n17 */3 * * * a\n"
    job = koitab.parse_tab(text).jobs[0]
    wanted = []
    for start in job.schedule.iter_starts(begin, zone):
        if start > end:
            break
        day = koitab.local_day(zone, start)
        if not any(first <= day <= last for first, last in job.settings.skip):
            wanted.append(start)
    found = koitab.unskipped_starts(job, zone, begin)
    assert [next(found) for _ in wanted] == wanted


def test_option_utc_prints_times_in_utc(type_in):
    done = type_in("next", "Night", "--utc", "--json", "--tab=tab", "-n1",
                   tab=TAB)
    assert json.loads(done.out)[0]["next"] == ["2026-03-29T01:00:00Z"]


def test_start_that_cron_makes_twice_is_listed_twice(type_in):
    done = type_in("next", "--json", "--tab=tab", "-n3",
                   tab="0-59/30 2 * * * x\n")
    assert json.loads(done.out)[0]["next"] == [
        "2026-03-29T03:00:00+02:00", "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:00:00+02:00"]


def test_invalid_line_is_reported_and_the_other_jobs_are_shown(type_in):
    done = type_in("next", "--json", "--tab=tab", "-n1",
                   tab="61 * * * * a\n@daily b\n")
    assert [row["line"] for row in json.loads(done.out)] == [2]
    assert done.err.startswith("tab:1:1: bad minute: ")
    assert done.code == 1


def test_tab_is_read_from_standard_input(type_in, monkeypatch):
    read, write = os.pipe()
    os.write(write, TAB.encode())
    os.close(write)
    saved = os.dup(0)
    os.dup2(read, 0)
    try:
        done = type_in("next", "Night", "--tab", "-", "-n1")
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(read)
    assert "2026-03-29T03:00:00+02:00" in done.out


def test_bytes_that_are_not_utf_8_are_preserved(type_in):
    done = type_in("next", "--json", "--tab", "tab", "-n1",
                   tab='"\u00e9\U0001f600" @daily x\n@hourly \udcff\udcfe\n')
    assert json.loads(done.out)[0]["name"] == "\u00e9\U0001f600"
    done = type_in("next", "--tab", "tab", "-n1",
                   tab="@hourly \udcff \x1b[2J\u202e\n")
    assert "\x1b" not in done.out
    assert "\u202e" not in done.out
    assert "\\udcff" in done.out


def vectors() -> list[list[str]]:
    lines = (CASES / "fires.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return random.Random(1).sample(rows, 40)


@pytest.mark.parametrize("spec, place, reference, starts", vectors())
def test_next_equals_the_vectors_of_the_case_files(
        type_in, monkeypatch, spec, place, reference, starts):
    monkeypatch.setenv("TZ", place)
    done = type_in("next", "--json", "--utc", "--tab=tab", "--from", reference,
                   tab=f"{spec} true\n")
    found = json.loads(done.out)[0]["next"]
    assert [start.replace(":00Z", "Z") for start in found] == (
        [] if starts == "never" else starts.split(","))


# --- koitab -T ------------------------------------------------------------


def test_check_of_a_valid_tab_succeeds(type_in):
    done = type_in("-T", "tab", tab=TAB)
    assert (done.code, done.out) == (0, "")
    assert done.err == "No syntax issues were found in the crontab file.\n"


def test_check_of_an_invalid_tab_fails_and_reports_every_error(type_in):
    done = type_in("-T", "tab", tab="61 * * * * a\n* 24 * * * b\n"
                   "5-1 * * * * c\n@daily d")
    assert (done.code, done.out) == (1, "")
    lines = done.err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "tab:1:1", "tab:2:3", "tab:3:1", "tab:3:1", "tab:4:9",
        "Invalid crontab file. Syntax issues were found."]
    assert "tab:2:3: bad hour: expected 0 to 23, found \"24\" (midnight is " \
        "hour 0)" in lines
    assert ": warning: " in lines[2]


def test_check_of_a_tab_with_warnings_succeeds(type_in):
    done = type_in("-T", "tab", tab="5-1 * * * * c\n")
    assert done.code == 0
    assert "warning: odd minute" in done.err


@pytest.mark.parametrize("make, message", [
    (lambda: None, "nothing: No such file or directory"),
    (lambda: os.mkdir("nothing"), "nothing: Is a directory"),
    (lambda: Path("nothing").write_bytes(b"#" * (2**20 + 1)),
     "nothing: larger than 1,048,576 bytes"),
])
def test_check_of_an_unreadable_file_is_an_error(type_in, make, message):
    make()
    done = type_in("-T", "nothing")
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert "Traceback" not in done.err


# --- what else can be typed -----------------------------------------------


@pytest.mark.parametrize("argv, status, said", [
    (["next", "a", "b"], 2, 'unexpected argument "b"'),
    (["next", "--nope"], 2, "--nope"), (["next", "--tab"], 2, "--tab"),
    (["-T"], 1, "-T"), (["-T", "a", "b"], 1, "no arguments permitted"),
    (["next", "--tab", "tab", "-n", "0"], 2, "not a number"),
    (["next", "--tab", "tab", "-n", "x"], 2, "not a number"),
    (["next", "--tab", "tab", "-n", "\u0663"], 2, "not a number"),
    (["next", "--tab", "tab", "-n", "9999999"], 2, "not a number"),
    (["next", "--\x1b[2J"], 2, "unknown option"),
])
def test_wrong_usage_is_an_error_without_output(type_in, argv, status, said):
    done = type_in(*argv, tab=TAB)
    assert (done.code, done.out) == (status, "")
    assert said in done.err
    assert done.err.startswith("koitab: error: ")
    assert all(line.startswith(("koitab: error: ", "koitab: hint: "))
               for line in done.err.splitlines())
    assert "\x1b" not in done.err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["-h", "tab"]])
def test_help_is_printed_to_stdout_with_status_0(type_in, argv):
    done = type_in(*argv)
    assert (done.code, done.out, done.err) == (0, koitab.overview(), "")


@pytest.mark.parametrize("argv", [["--version"], ["-V"]])
def test_version_is_printed_as_one_line(type_in, argv):
    assert type_in(*argv).out == f"koitab {koitab.VERSION}\n"


# --- the real program -----------------------------------------------------


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ.get("PATH", os.defpath),
           "TZ": str(support.ZONES / "UTC")}
    return subprocess.run(list(argv), env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, **options)


def test_program_runs_as_an_executable_and_by_python(tmp_path):
    path = tmp_path / "tab"
    path.write_text(TAB)
    program = str(support.ROOT / "koitab.py")
    rest = ["next", "Night", "--tab", str(path), "--from", "2026-01-01"]
    by_python = run(sys.executable, "-B", "-I", "-S", program, *rest)
    assert by_python.stderr == b""
    assert by_python.stdout.startswith(
        b"[Admin]\nNight: At 02:30\n    2026-01-01T02:30:00+00:00\n")
    if os.path.exists(support.SHARED_PYTHON):
        assert run(program, *rest).stdout == by_python.stdout


def test_closed_pipe_causes_no_traceback(tmp_path):
    path = tmp_path / "tab"
    path.write_text("* * * * * x\n")
    process = subprocess.Popen(
        [sys.executable, "-B", "-I", "-S", str(support.ROOT / "koitab.py"),
         "next", "--tab", str(path), "-n", "50000"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 128 + 13


def test_slow_modules_are_imported_only_when_used(tmp_path):
    path = tmp_path / "tab"
    path.write_text(TAB)
    done = run(sys.executable, "-B", "-I", "-S", "-X", "importtime",
               str(support.ROOT / "koitab.py"), "next", "--tab", str(path))
    loaded = {line.rsplit("|", 1)[1].strip() for line in
              done.stderr.decode().splitlines() if "|" in line}
    assert "bisect" in loaded
    # argparse costs 20 ms, `re` included, and reads every command line.
    assert not loaded & {"json", "zoneinfo", "datetime", "dataclasses", "ssl",
                         "hashlib", "difflib", "subprocess", "asyncio"}


def test_standard_output_without_reconfigure_is_accepted():
    stream = io.StringIO()          # has no reconfigure
    saved, sys.stdout = sys.stdout, stream
    try:
        assert koitab.main(["--version"]) == 0
    finally:
        sys.stdout = saved
    assert stream.getvalue() == f"koitab {koitab.VERSION}\n"
