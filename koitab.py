#!/usr/bin/python3 -IS
"""koitab: a drop-in replacement for cron, with a dashboard.

`koitab` edits a table of jobs, `koid` runs them: it reads all of crontab(5)
and starts what Debian's cron starts, when Debian's cron starts it. To a line
it adds what cron lacks: a name, a section, `@manual` for a job that only
people start, and `{{arguments}}` that a form asks for. `koitab dashboard`
shows the jobs of many hosts and sends requests to them, which it can neither
sign nor change.

What it promises:
- A start that Debian's cron makes is made, once: through both changes of
  daylight saving time, a clock that is set, and days that a zone skips.
- A tab is read to its end: every error is reported with line and column, and
  a line that is valid but suspicious gets a warning.
- The value of an argument never becomes part of a command's text.

It needs Python 3.9 or newer and nothing else. Read it from top to bottom:
values first, then decisions, then effects. A section uses only names from
above it. The table gives the lines of each, its question, what it touches and
who it runs as: R the user of koid (root), J the user of a job, U a user
without rights, C the caller.

 1 values
 237 Common        what do both programs need?             (files, clock) R U C
 317 Time          what do DST and clock jumps do to minutes?   (nothing) R U C
 452 Schedule      when does an entry run next?                 (nothing) R U C
1433 Tab           what does a koitab say?                      (nothing) R U C
 290 Keys          who may ask for a run?                       (nothing) R U C
 185 RunFile       what does the file of a run hold?            (nothing) R U C
 183 Plan          what is due now?                             (nothing) R
 2 koid
 702 Machine       what may koi do to this computer?   (files, processes) R U C
 314 Database      how is an SQLite file made, checked, written?  (files) R U C
 407 RunStore      where are the runs of this host kept?          (files) R C
 651 Supervisor    who stays with a job?               (processes, files) R J
 301 Jobs          which jobs exist, and whose are they?          (files) R C
 107 LineProtocol  how do other processes talk to koid?         (network) R U C
1297 Scheduler     which run waits, starts, has ended?          (machine) R
 672 ControlSocket how do users reach koid?              (network, files) R C
 700 Broker        what may a dashboard ask of koid? (network, processes) R
 335 Daemon        what wakes koid?                             (machine) R
 3 network
 218 Client        how is one HTTP request bounded?             (network) U C
 497 Agent         what does the dashboard lack?                (network) U C
 139 Fields        what may a request contain?                  (nothing) U
 144 Outcome       how did a run go, and was that usual?        (nothing) U
 210 Credentials   who may do what, and who did it?               (files) U
 282 Alerts        what is wrong now, and who is notified?        (files) U
 469 PingChecks    is a job that koid does not run still alive?   (files) U
 316 Hosts         which hosts and which jobs are there?          (files) U
 363 Runs          which runs were there, with which output?      (files) U
 266 AlertRules    when does a host or a job raise an alert?      (files) U
 165 Requests      what do people ask of hosts?                   (files) U
 194 HostSync      what does a host send, and get back?           (files) U
 174 Search        which outputs contain a text?                  (files) U
 142 Retention     what is removed, and when?                     (files) U
 301 Overview      what do the page and other programs see?       (files) U
 521 Dashboard     who writes, in which order?                    (files) U
 195 Notifier      how does an alert go out?         (network, processes) U
 975 HttpServer    is this a valid request, in time?     (network, files) U
1074 Api           who may call what?                           (network) U
4696 Page          what does the browser run?                   (nothing) U C
 4 commands
 222 Terminal      how does koitab speak with its caller?      (terminal) C
 417 TabCommands   what can be done to a tab?           (files, terminal) C
 570 RunCommands   how is a job run, and its past shown?       (terminal) C
 521 Remote        what can a host ask of a dashboard? (network, terminal) C
 305 Import        which crontabs does cron have here? (files, processes) C
 319 Services      how are koid and the dashboard started?      (machine) C
  91 Source        which code runs as whom?             (files, terminal) C
 517 Command       what can I type?                            (terminal) C

The options -I and -S in the first line keep the caller's PYTHON* variables,
the directory of the script and site-packages out of the imports. Modules that
cost milliseconds (`ssl` and `json` among them) are imported where they are
used.
"""

# HOW IT WORKS
#
# From the tab to the page
#
#  1. `parse_tab` reads a tab: jobs, and a Diagnostic for each bad line.
#  2. `TabRegistry` merges all tabs into ScheduledJobs.
#  3. `plan` compares the clock with the SchedulerState: what is due becomes
#     a Launch.
#  4. `Scheduler` makes of it a QueuedRun, which waits or is admitted.
#  5. `RunStore` commits the row before anything is started.
#  6. `fork_supervisor`: a process claims the run's file with O_EXCL, becomes
#     the job's user and starts the shell. koid has a RunningRun.
#  7. The supervisor appends output to the file as frames, then the end, and
#     writes one report to koid's pipe.
#  8. `Scheduler` moves end and output into the history in one transaction,
#     then removes the file.
#  9. `AgentBroker` passes what is new to the agent's process.
# 10. `SyncAgent` sends what the dashboard lacks: POST /api/v1/sync.
# 11. `HostSync` stores it in one transaction; `AlertRules` decide; after the
#     commit the answer goes out, and the change into the ChangeStream.
# 12. The page's script applies the change and draws its list anew.
#
# The life of a run
#
#     schedule, by hand, after, catch-up, retry, reboot
#       |-- overlap, queue full, paused, KOI_SKIP -----> skipped (reason)
#       |-- start not made: koid down, clock set ------> missed
#       |-- delay, retry, previous run active --> queued
#       |                            |-- kill, replace -> skipped
#       |                            |-- job changed ---> skipped
#       |                            |-- too late ------> interrupted
#       |                            | start_queued
#       +---------------------------> running
#              restart, never begun -|-- by schedule ---> missed
#                                    |-- else ----------> interrupted
#              no user, shell, fork -|------------------> unstartable
#              supervisor killed,    |
#              machine rebooted -----|------------------> interrupted
#              supervisor reports ---+------------------> done (exit, signal)
#
# `Scheduler` moves every arrow; after a restart `adopt_runs` does. The file of
# a run goes from CLAIMED to RUNNING to ENDED or UNSTARTABLE, moved by the
# supervisor alone: koid may be killed, restarted or upgraded at any time, and
# its jobs do not notice.
#
# Sync
#
# A run is known by host, *epoch* (a random number of history.db) and number.
# Each write of a run takes the next *change*. The agent sends records with a
# change above *acked*, in order; what an answer acknowledges is committed, so
# a lost answer costs a repetition and never a record. Output follows in
# pieces, where the dashboard lacks them. Of two agents with one host ID the
# later start wins; the earlier gets 409 and shows as a duplicate. A request
# to run a job is {body, mac}: the agent carries it, koid checks the MAC, then
# host, job, expiry and nonce, records the nonce, starts the run, and returns
# a result. Neither dashboard nor agent holds the key that signs it.
#
# Threads and processes
#
# koid is one thread with one poll loop. Each job has a supervisor: a fork of
# koid that owns its pipes and becomes its user. The agent is a fresh process
# that is executed without privileges and never held the host key. In a
# dashboard the event loop owns connections, a writer thread the one writing
# connection, an executor the reading ones, a notifier thread the deliveries;
# they hand over values that do not change.

from __future__ import annotations

import errno
import fcntl
import os
import posixpath
import select
import signal
import socket
import stat
import sys
import time
from bisect import bisect_right
from struct import Struct

PROG, VERSION = "koitab", "1.0"

EXIT_OK = 0
EXIT_ERROR = 1          # what crontab(1) exits with, whatever is wrong
EXIT_USAGE = 2          # wrong usage of a command that crontab(1) lacks
EXIT_BUG = 70           # an internal error; EX_SOFTWARE of sysexits.h
EXIT_SIGNAL = 128       # plus the signal's number, as shells report it

# ==========================================================================
# Common: what do both programs need?                  (files, clock; R U C)
#
# The text of this section is the same in mission.py and koitab.py; a test
# compares them. So it contains nothing about backups or schedules.
# ==========================================================================


class Error(Exception):
    """The program cannot continue: what is wrong, and how to fix it.

    Only `main` catches it: it prints `message` and `hint` and exits with
    `status`.
    """

    def __init__(self, message: str, hint: str = "", status: int = 1):
        super().__init__(message)
        self.message, self.hint, self.status = message, hint, status


class FrozenRecord:
    """A value with named fields that cannot be changed: `Point(1, y=2)`.

    The annotations of a subclass are its fields, their values the defaults.
    It does what a frozen dataclass does. Importing `dataclasses` would double
    the start-up time of a program that is compiled each time it runs.
    """

    def __init__(self, *values, **named):
        fields = tuple(type(self).__annotations__)
        given = dict(zip(fields, values), **named)
        for name in fields:
            value = given.pop(name) if name in given else getattr(self, name)
            object.__setattr__(self, name, value)
        if given or len(values) > len(fields):
            raise TypeError(f"{type(self).__name__} has no {list(given)}")

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__}.{name} is read-only")

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None

    def __repr__(self):
        fields = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({fields})"

    def replace(self, **changes):
        """Return a copy in which the fields in `changes` differ."""
        return type(self)(**{**vars(self), **changes})


class Clock:
    """The clocks of this machine. A test passes its own instead."""

    def now(self) -> float:
        """Return the seconds since 1970 in UTC; they jump when the clock is
        set."""
        return time.time()

    def ticks(self) -> float:
        """Return seconds of a clock that nobody can set, for durations and
        time limits."""
        return time.monotonic()


def format_rfc3339(at: float, offset: int | None = None) -> str:
    """Return a time with its UTC offset: 2026-03-29T03:00:00+02:00.

    `at` is in seconds since 1970, `offset` in seconds east of Greenwich.
    None means the offset of the local time zone (RFC 3339).
    """
    if offset is None:
        offset = time.localtime(at).tm_gmtoff
    sign, minutes = "-" if offset < 0 else "+", abs(offset) // 60
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at + offset))
    return f"{text}{sign}{minutes // 60:02}:{minutes % 60:02}"


def format_duration(seconds: float) -> str:
    """Return `seconds` as Go prints a duration: 12ms, 1.5s, 1h0m5.1s.

    What is less than a millisecond is cut off.
    """
    thousandths = int(max(seconds, 0) * 1000 + 1e-6)    # 1.001 * 1000 < 1001
    if thousandths < 1000:
        return f"{thousandths}ms" if thousandths else "0s"
    minutes, thousandths = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{thousandths / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


DURATION_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
DIGITS_AND_POINT = frozenset("0123456789.")
LONGEST_DURATION = 86400 * 366 * 100    # seconds; longer is a typing error


def parse_duration(text: str) -> float | None:
    """Return the seconds in "90s", "1h30m" or "500ms"; None if `text` is not
    a duration, or is a century or more."""
    total, at = 0.0, 0
    while at < len(text):
        end = at
        while text[end:end + 1] in DIGITS_AND_POINT:
            end += 1
        unit = "ms" if text.startswith("ms", end) else text[end:end + 1]
        if unit not in DURATION_UNITS or not text[at:end].strip(".") \
                or text.count(".", at, end) > 1:
            return None
        total += float(text[at:end]) * DURATION_UNITS[unit]
        at = end + len(unit)
    return total if text and total < LONGEST_DURATION else None


def plural(count: int, noun: str) -> str:
    """Return "1 error", "2 errors", "1,000 errors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, words) -> str:
    """Return the one of `words` that is most like `word`, or ""."""
    import difflib
    known = {each.lower(): each for each in words}
    found = difflib.get_close_matches(word.lower(), known, 1, 0.5)
    return known[found[0]] if found else ""


# A regular expression for characters that could control a terminal, break a
# line or reorder text: C0 and C1 controls except the tab, line and paragraph
# separators, bidi controls, the byte order mark, and lone surrogates.
UNSAFE = ("[\0-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e"
          "\u2066-\u206f\ufeff\ud800-\udfff]")


def escaped(match) -> str:
    """Return the escape sequence for a match of UNSAFE."""
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def escape_controls(text: str) -> str:
    """Return `text` on one line, with each UNSAFE character escaped."""
    if text.isprintable():
        return text
    import re
    return re.sub(UNSAFE, escaped, text)


class Diagnostic(FrozenRecord):
    """An error or a warning about a file that people write.

    `line` and `column` count from 1.
    """

    line: int
    column: int
    what: str               # "bad minute" as in crontab(1), or a key path
    why: str
    hint: str = ""
    fatal: bool = True      # False: a warning, and the value is used
    scope: str = ""         # what cannot be used; "": the whole file

    def text(self, file: str) -> str:
        """Return FILE:LINE:COLUMN: [warning: ][WHAT: ]WHY[ (HINT)]."""
        return escape_controls(
            f"{file}:{self.line}:{self.column}: "
            f"{'' if self.fatal else 'warning: '}"
            f"{self.what}{': ' if self.what else ''}{self.why}"
            + (f" ({self.hint})" if self.hint else ""))


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest):]


def write_atomically(path: str, data: bytes, mode: int = 0o600,
                     durable: bool = True, dir_fd: int | None = None) -> None:
    """Replace the file at `path` completely or not at all.

    If `durable`, the new file is on the disk on return. The file is synced
    before the rename and the directory after it, as otherwise a power failure
    could leave an empty file, or the old one. `path` is relative to `dir_fd`.
    Raises OSError.
    """
    fresh = path + ".new"
    try:
        os.unlink(fresh, dir_fd=dir_fd)     # a killed writer left it
    except FileNotFoundError:
        pass
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                 | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    try:
        write_all(fd, data)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(fresh, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    if durable:
        sync_directory(posixpath.dirname(path) or ".", dir_fd)


def sync_directory(path: str, dir_fd: int | None = None) -> None:
    """Write the entries of a directory to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC,
                 dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(path: str) -> int | None:
    """Lock the file at `path`, and create it if it is missing.

    Return the descriptor that holds the lock; None if another process holds
    it. It is an flock, which the kernel releases however its holder ends.
    Only this user may be able to write to the directory. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


# ==========================================================================
# Time: what do DST and clock jumps do to minutes?          (nothing; R U C)
#
# An instant is a number of seconds since 1970 in UTC. A local second is what
# a clock in a zone shows, counted from 1970 too: instant + UTC offset. A
# local minute is the local second at which it begins.
# ==========================================================================

# A crontab names minutes of local time, and local time is not continuous.
# In spring the clock jumps from 01:59 to 03:00 (the gap), so "30 2 * * *"
# has no minute to run in. In autumn it shows 02:30 twice (the fold). An
# administrator sets the clock. A laptop wakes up after the weekend. In 2011
# Samoa crossed the date line and skipped a whole Friday.
#
# Debian's cron (3.0pl1) therefore keeps a virtual clock, and so does koi: one
# for each zone that a tab names, so that a job with CRON_TZ loses no hour.
# The virtual minute is the last one whose jobs were started. Once a minute,
# cron compares local time with it:
#
#     1 minute ahead      The usual case: run the jobs of this minute.
#     2 to 5              A short delay: run the jobs of each minute between.
#     6 to 180            The clock jumped. A job at a fixed time must not be
#                         lost, so the fixed jobs of each minute between run
#                         now. A wildcard job ("*/10 * * * *") runs once, as
#                         its next start is near.
#     0 to 179 behind     The clock was set back. Fixed jobs have run already:
#                         they wait until local time has caught up with the
#                         virtual clock. Wildcard jobs follow local time.
#     more, either way    The clock was wrong before. Start again from here;
#                         the starts between are lost.
#
# A job is a wildcard job if its minute or hour field begins with a star:
# "*/5 2 * * *" is one, "0-59/5 2 * * *" is not.
#
# `first_minute_after_jump` holds these rules. A period is a stretch of time
# in which a zone has one UTC offset, so a period is a run of consecutive
# local minutes. At the beginning of each, `first_minute_after_jump` returns
# the local minute with which a job continues; minutes before the period's
# first one start at once, the others when they come.

MINUTE, HOUR, DAY = 60, 3600, 86400     # seconds
LONGEST_JUMP = 180 * MINUTE     # more is a correction of the clock
LONGEST_DELAY = 5 * MINUTE      # up to here each minute is made up for
DAYS_IN_400_YEARS = 146_097     # the Gregorian calendar repeats itself
FOREVER = float("inf")


def first_minute_after_jump(virtual: int, first: int, wildcard: bool) -> int:
    """Return the local minute with which a job continues.

    `virtual` is the last local minute whose jobs were started, `first` the
    one that the clock shows now. The rules are those of Debian cron 3.0pl1.
    """
    ahead = first - virtual
    if ahead > LONGEST_JUMP or ahead <= -LONGEST_JUMP:
        return first
    if wildcard and not MINUTE < ahead <= LONGEST_DELAY:
        return first
    return virtual + MINUTE


def advance_virtual_minute(virtual: int, first: int, last: int) -> int:
    """Return the virtual minute after the local minutes `first` to `last`."""
    starts_again = first_minute_after_jump(virtual, first,
                                           wildcard=False) == first
    return last if starts_again else max(virtual, last)


def days_since_epoch(year: int, month: int, day: int) -> int:
    """Return the days from 1970-01-01 to a date of the Gregorian calendar.

    A year is counted from March on, so that the leap day is its last day;
    719,468 days lie between 0000-03-01 and 1970-01-01.
    """
    year -= month <= 2
    since_march = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return (year * 365 + year // 4 - year // 100 + year // 400
            + since_march - 719_468)


def calendar_date(days: int) -> tuple[int, int, int]:
    """Return (year, month, day) of the date `days` after 1970-01-01."""
    cycle, day = divmod(days + 719_468, DAYS_IN_400_YEARS)
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    day -= year * 365 + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    year += cycle * 400 + (month >= 10)
    return year, (month + 2) % 12 + 1, day + 1


class Zone:
    """A time zone: its UTC offsets and the instants at which they change.

    Period i begins at the instant begins[i], ends where the next one begins
    and has the UTC offset offsets[i], in seconds. In period i a daemon that
    ran through the change before it starts fixed jobs again after the local
    second caught_up_from[i]. `rule` (a DstRule, or its text until the first
    use) gives the periods from the instant `known_until` on.
    """

    def __init__(self, name: str, begins: list, offsets: list[int], rule=None):
        self.name, self.rule = name, rule
        self.begins, self.offsets = [-FOREVER], offsets[:1]
        self.caught_up_from = [-FOREVER]
        for begin, offset in zip(begins, offsets[1:]):
            self.add_transition(begin, offset)
        self.rule_year = max(calendar_date(begins[-1] // DAY)[0], 1900) \
            if begins else 1970
        if not rule:
            self.begins.append(FOREVER)
        self.known_until = self.begins[-1]

    def add_transition(self, begin: int, offset: int) -> None:
        """Let the offset change at the instant `begin`, after all others."""
        if begin == self.begins[-1]:    # a rule with DST all year round
            for periods in (self.begins, self.offsets, self.caught_up_from):
                periods.pop()
        before = self.offsets[-1]
        if offset == before or begin < self.begins[-1]:
            return
        virtual = (begin - 1 + before) // MINUTE * MINUTE
        first = round_up_to_minute(begin + offset)
        waits = first_minute_after_jump(virtual, first, wildcard=False) > first
        self.begins.append(begin)
        self.offsets.append(offset)
        self.caught_up_from.append(virtual if waits else -FOREVER)

    def extend(self, instant: int) -> None:
        """Add the rule's transitions until `known_until` > `instant`."""
        if isinstance(self.rule, str):
            zone = parse_posix_tz(self.rule)
            self.rule = zone and zone.rule
        if not self.rule:
            self.begins.append(FOREVER)
            self.known_until = FOREVER
        while self.known_until <= instant:
            for begin, offset in self.rule.transitions(self.rule_year):
                self.add_transition(begin, offset)
            self.rule_year += 1
            if self.rule_year > calendar_date(instant // DAY)[0] + 3:
                self.begins.append(FOREVER)     # both offsets are the same
            self.known_until = self.begins[-1]

    def period_at(self, instant: int) -> int:
        """Return the number of the period that contains `instant`."""
        if instant >= self.known_until:
            self.extend(instant)
        return bisect_right(self.begins, instant) - 1

    def offset(self, instant: int) -> int:
        """Return the UTC offset at `instant`, in seconds."""
        return self.offsets[self.period_at(instant)]

    def periods_after(self, after: int):
        """Yield (first, end, offset) of each period after the local minute
        of the instant `after`: its first local minute, the local second at
        which it ends, and its UTC offset."""
        number = self.period_at(after)
        offset = self.offsets[number]
        previous = (after + offset) // MINUTE * MINUTE
        first = previous + MINUTE
        while True:
            end = self.begins[number + 1] + offset
            if first < end:
                yield first, end, offset
                if end == FOREVER:
                    return
                previous = (end - 1) // MINUTE * MINUTE
            number = self.period_at(end - offset)
            offset = self.offsets[number]
            first = round_up_to_minute(self.begins[number] + offset)
            if first == previous:   # a change by seconds repeats no minute
                first += MINUTE

    def instant(self, local: int) -> int:
        """Return the instant at which the zone's clock shows `local`.

        In a fold it is the first of two, in a gap the instant of the change.
        """
        latest = self.period_at(local + DAY)
        for number in range(self.period_at(local - DAY), latest + 1):
            instant = local - self.offsets[number]
            if number == latest or instant < self.begins[number + 1]:
                return max(instant, self.begins[number])
        return local


def round_up_to_minute(second: int) -> int:
    """Return `second`, or the beginning of the next minute after it."""
    return -(-second // MINUTE) * MINUTE


UTC = Zone("UTC", [], [0])


class DstRule:
    """When DST begins and ends each year: a TZ value of POSIX such as
    CET-1CEST,M3.5.0,M10.5.0/3.

    `standard` and `summer` are UTC offsets. `begin` and `end` are what
    `parse_rule_day` returns.
    """

    def __init__(self, standard: int, summer: int, begin, end):
        self.standard, self.summer = standard, summer
        self.begin, self.end = begin, end

    def transitions(self, year: int) -> list[tuple[int, int]]:
        """Return the year's (instant, new UTC offset), in order of time."""
        begin, end = (rule_day(year, kind, numbers) * DAY + second
                      for kind, numbers, second in (self.begin, self.end))
        return sorted([(begin - self.standard, self.summer),
                       (end - self.summer, self.standard)])


def rule_day(year: int, kind: str, numbers: list[int]) -> int:
    """Return the day since 1970 that a rule names in `year`.

    M3.5.0 is the last Sunday of March, J60 always the 1st of March, 59 the
    60th day of the year.
    """
    if kind != "M":
        january = days_since_epoch(year, 1, 1)
        is_leap_year = days_since_epoch(year, 3, 1) - january == 60
        return january + numbers[0] - (kind == "J") + (
            kind == "J" and is_leap_year and numbers[0] >= 60)
    month, week, weekday = numbers
    first = days_since_epoch(year, month, 1)
    next_month = days_since_epoch(year + month // 12, month % 12 + 1, 1)
    day = first + (weekday - first - 4) % 7 + (week - 1) * 7
    return day if day < next_month else day - 7


TZ_NAME = r"([A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)"
TZ_TIME = r"([+-]?[0-9]{1,3}(?::[0-9]{1,2}){0,2})"
TZ_DAY = rf",(?:([J]?)([0-9]+)|(M)([0-9.]+))(?:/{TZ_TIME})?"
POSIX_TZ = rf"{TZ_NAME}{TZ_TIME}(?:{TZ_NAME}{TZ_TIME}?(?:{TZ_DAY}{TZ_DAY})?)?"
DEFAULT_DST_RULE = ",M3.2.0,M11.1.0"    # glibc's, for a TZ such as EST5EDT


def parse_rule_time(text: str) -> int:
    """Return the seconds of a time in a rule: -3, 5:30, +167:00:00."""
    parts = [int(part) for part in text.lstrip("+-").split(":")] + [0, 0]
    seconds = parts[0] * HOUR + parts[1] * MINUTE + parts[2]
    return -seconds if text[0] == "-" else seconds


def parse_posix_tz(text: str, name: str = "") -> Zone | None:
    """Return the zone of a POSIX TZ value; None if `text` is not one."""
    import re
    found = re.fullmatch(POSIX_TZ, text)
    if not found:
        return None
    standard = -parse_rule_time(found[2])   # POSIX counts west of Greenwich
    if not found[3]:
        return Zone(name or text, [], [standard])
    if not found[7] and not found[8] and found[6] is None:
        return parse_posix_tz(text + DEFAULT_DST_RULE, name or text)
    summer = -parse_rule_time(found[4]) if found[4] else standard + HOUR
    days = [parse_rule_day(*found.group(*range(at, at + 5))) for at in (5, 10)]
    if None in days:
        return None
    return Zone(name or text, [], [standard],
                DstRule(standard, summer, *days))


def parse_rule_day(kind, number, month_kind, month_text, time_text):
    """Return (kind, numbers, local second of the day) of one day of a rule,
    from the groups of TZ_DAY; None if a number is out of range."""
    if month_kind:
        parts = month_text.split(".")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            return None
        numbers = [int(part) for part in parts]
        is_valid = 1 <= numbers[0] <= 12 and 1 <= numbers[1] <= 5 \
            and numbers[2] <= 6
    else:
        numbers = [int(number)]
        is_valid = (kind == "J") <= numbers[0] <= 365
    return (month_kind or kind, numbers,
            parse_rule_time(time_text or "2")) if is_valid else None


def parse_tzif(name: str, data: bytes) -> Zone:
    """Return the zone in `data`, a TZif file (RFC 8536). Raises ValueError.

    A header counts what its block contains. A file of version 2 repeats the
    block with 64-bit times, and a POSIX TZ value for later years follows.
    """
    from struct import error, unpack_from
    try:
        header = unpack_from(">4sc15x6l", data)
        at, width, time_format = 44, 4, "l"
        if header[1] >= b"2":
            utc, std, leaps, times, types, characters = header[2:]
            at += times * 5 + types * 6 + characters + leaps * 8 + std + utc
            header = unpack_from(">4sc15x6l", data, at)
            at, width, time_format = at + 44, 8, "q"
        utc, std, leaps, times, types, characters = header[2:]
        begins = unpack_from(f">{times}{time_format}", data, at)
        at += times * width
        type_numbers = unpack_from(f">{times}B", data, at)
        at += times
        offsets = [unpack_from(">l", data, at + 6 * number)[0]
                   for number in range(types)]
        at += types * 6 + characters + leaps * (width + 4) + std + utc
        if header[0] != b"TZif" or not types:
            raise ValueError(f"{name} is no file of a time zone")
        rule = data[at:].strip(b"\n").decode("ascii") if width == 8 else ""
        rule = rule if "," in rule else ""      # without one there is no DST
        in_order = [offsets[0]] + [offsets[each] for each in type_numbers]
    except (error, IndexError, UnicodeDecodeError) as broken:
        raise ValueError(f"{name} is broken: {broken}") from None
    return Zone(name, list(begins), in_order, rule)


# ==========================================================================
# Schedule: when does an entry run next?                    (nothing; R U C)
#
# The first five fields of a crontab entry, each as a set of bits: bit n is
# set if the field contains n. The grammar is that of cronie 1.7, which
# rejects what Debian's cron reads only in part ("5.5", "1-5-9"). Both have
# the same rule for days: if one of the two day fields begins with a star, a
# day must satisfy both fields; if not, one of them is enough.
# ==========================================================================

MONTHS = {name: number for number, name in enumerate(
    "jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)}
WEEKDAYS = {name: number for number, name in enumerate(
    "sun mon tue wed thu fri sat".split())}
SPECIALS = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
            "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
            "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
            "@hourly": "0 * * * *"}
LONGEST_NUMBER = 9      # digits; in 32 bits, cron reads 4294967301 as 5
LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# The bits of a week times this are six weeks in a row, enough for a month
# that begins on any weekday.
SIX_WEEKS = sum(1 << day for day in range(0, 42, 7))


class ScheduleError(Exception):
    """A field is invalid: `field` is its name, `at` the offset of the error
    in its text. `hint` may be empty."""

    def __init__(self, field: str, at: int, why: str, hint: str = ""):
        super().__init__(f"bad {field}: {why}")
        self.field, self.at, self.why, self.hint = field, at, why, hint


QUARTZ_HINTS = {
    "L": 'the last day of a month: days 28-31 and '
         '[ "$(date -d tomorrow +\\%d)" = 01 ] && COMMAND',
    "W": "a weekday: 1-5 in the last column",
    "#": 'the second Friday: days 8-14 and '
         '[ "$(date +\\%u)" = 5 ] && COMMAND',
}


class ScheduleField:
    """One of the five fields: the range of its values, and their names.

    Its methods raise ScheduleError.
    """

    def __init__(self, name: str, low: int, high: int, names: dict):
        self.name, self.low, self.high, self.names = name, low, high, names

    def parse(self, text: str, pick=None) -> int:
        """Return the values that `text` means, as bits.

        `pick(text)` returns a number from which ~ chooses its value.
        """
        found = at = 0
        for element in text.split(","):
            found |= self.parse_element(element, at, pick)
            at += len(element) + 1
        return found

    def parse_element(self, text: str, at: int, pick) -> int:
        """Return the bits of one element: 5, 1-5, 1-9/2, */2 or 5~10.

        `at` is the offset of the element in the field.
        """
        if "~" in text:
            return 1 << self.choose_value(text, at, pick)
        value_range, slash, step_text = text.partition("/")
        if value_range == "*":
            low, high = self.low, self.high
        else:
            first, dash, last = value_range.partition("-")
            low = self.parse_value(first, at, text)
            if not dash:
                if slash:
                    self.reject(at, f"{short(text)} has a step but no range",
                                f"{first}-{self.high}/{step_text}")
                return 1 << low
            high = self.parse_value(last, at + len(first) + 1, text)
            if high == 0 < low and self.high == 7:
                high = 7        # in fri-sun, Sunday ends the week
        step = self.parse_step(step_text, at + len(value_range) + 1, text) \
            if slash else 1
        return sum(1 << value for value in range(low, high + 1, step))

    def parse_value(self, word: str, at: int, text: str) -> int:
        """Return the value of a number or a name in the element `text`."""
        if word.isdigit() and word.isascii():
            value = int(word) if len(word) <= LONGEST_NUMBER else FOREVER
        else:
            value = self.names.get(word.lower()) if word.isascii() else None
        if value is None:
            if not word:
                self.reject(at, "a number is missing" + (
                    f" in {short(text)}" if text else ""))
            hint = nearest(word.lower()[:3], self.names) if self.names else ""
            self.reject(at, f"{short(word)} is not a {self.name}",
                        self.quartz_hint(word)
                        or (f"did you mean {hint}?" if hint
                            else self.describe_range()))
        if not self.low <= value <= self.high:
            self.reject(at, f"{self.describe_range()}, not {short(word)}", {
                "hour 24": "midnight is hour 0", "minute 60": "a full hour "
                "is minute 0"}.get(f"{self.name} {word}", ""))
        return value

    def parse_step(self, word: str, at: int, text: str) -> int:
        """Return the number after the / of the element `text`."""
        if not (word.isdigit() and word.isascii()) or not word.strip("0"):
            self.reject(at,
                        f"the step of {short(text)} is no number from 1 on")
        return int(word.lstrip("0")[:LONGEST_NUMBER])

    def choose_value(self, text: str, at: int, pick) -> int:
        """Return the value that `pick` chooses for 5~10 (cronie 1.7); the
        limits of the field stand in for those that are omitted."""
        first, _, last = text.partition("~")
        low = self.parse_value(first, at, text) if first else self.low
        high = self.parse_value(last, at + len(first) + 1, text) if last \
            else self.high
        if low > high:
            self.reject(at, f"{short(text)} runs backwards", f"{high}~{low}")
        return low + (pick or stable_random)(f"{self.name} {text}") % (
            high - low + 1)

    def quartz_hint(self, word: str) -> str:
        """Return how crontab(5) says what L, W and # mean in Quartz."""
        import re
        match = re.fullmatch(r"\d*([LW#])\d*", word)
        return QUARTZ_HINTS[match[1]] if match and self.high in (7, 31) else ""

    def describe_range(self) -> str:
        """Return the range of the values: minute is 0 to 59."""
        return f"{self.name} is {self.low} to {self.high}"

    def reject(self, at: int, why: str, hint: str = ""):
        """Raise ScheduleError for the text at the offset `at`."""
        raise ScheduleError(self.name, at, why, hint)


def short(text: str) -> str:
    """Return `text` in quotes, escaped, and cut after 40 characters."""
    return f'"{escape_controls(text[:40])}{"..." if len(text) > 40 else ""}"'


def stable_random(text: str) -> int:
    """Return a number that looks random but depends on `text` alone."""
    from zlib import crc32
    return crc32(text.encode("utf-8", "surrogateescape"))


SCHEDULE_FIELDS = (ScheduleField("minute", 0, 59, {}),
                   ScheduleField("hour", 0, 23, {}),
                   ScheduleField("day-of-month", 1, 31, {}),
                   ScheduleField("month", 1, 12, MONTHS),
                   ScheduleField("day-of-week", 0, 7, WEEKDAYS))


def lowest_bit(bits: int) -> int:
    """Return the number of the lowest bit that is set; there must be one."""
    return (bits & -bits).bit_length() - 1


def set_bits(bits: int) -> list[int]:
    """Return the numbers of all bits that are set, in order."""
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


class Schedule:
    """When an entry runs: its first five fields.

    `minutes`, `hours` and `weekdays` (bit 0 is Sunday) have the bit n for the
    value n, `days` and `months` the bit n - 1. `both`: a day must satisfy
    both day fields. `wildcard` is explained in the section Time. `never`: no
    date satisfies the fields.
    """

    def __init__(self, text: str, bits: list[int], stars: list[bool]):
        """`bits` are the values of the five fields; `stars` says which of
        them begin with a star."""
        self.text = text
        self.minutes, self.hours, days, months, weekdays = bits
        self.days, self.months = days >> 1, months >> 1
        self.weekdays = (weekdays | weekdays >> 7) & 127    # 7 is Sunday too
        self.wildcard = stars[0] or stars[1]
        self.both = stars[2] or stars[4]
        is_dated = any(self.months >> month & 1
                       and self.days & (1 << length) - 1
                       for month, length in enumerate(LONGEST_MONTH))
        is_weekly = self.months and self.weekdays
        self.never = not (self.minutes and self.hours and (
            is_dated and is_weekly if self.both else is_dated or is_weekly))

    @classmethod
    def parse(cls, text: str, pick=None) -> Schedule:
        """Return the schedule of five fields, or of a word such as @daily.

        `pick` is that of ScheduleField.parse. Raises ScheduleError.
        """
        parts = SPECIALS.get(text, text).split()
        if len(parts) != 5:
            if text.startswith("@"):
                raise ScheduleError("time specifier", 0,
                                    f"{short(text)} is none",
                                    " ".join(SPECIALS))
            raise ScheduleError(SCHEDULE_FIELDS[min(len(parts), 4)].name,
                                len(text),
                                f"five columns are needed, not {len(parts)}")
        return cls(text, [field.parse(part, pick) for field, part
                          in zip(SCHEDULE_FIELDS, parts)],
                   [part[0] == "*" for part in parts])

    def has_day(self, day: int) -> bool:
        """Does the day `day` (since 1970) match?"""
        _, month, day_of_month = calendar_date(day)
        is_dated = self.days >> day_of_month - 1 & 1
        is_weekly = self.weekdays >> (day + 4) % 7 & 1  # day 0: a Thursday
        return bool(self.months >> month - 1 & 1 and (
            is_dated and is_weekly if self.both else is_dated or is_weekly))

    def days_in(self, year: int, month: int) -> int:
        """Return the matching days of a month: bit 0 is the 1st."""
        if not self.months >> month - 1 & 1:
            return 0
        first = days_since_epoch(year, month, 1)
        end = days_since_epoch(year + month // 12, month % 12 + 1, 1)
        week_days = self.weekdays * SIX_WEEKS >> (first + 4) % 7
        days = self.days & week_days if self.both else self.days | week_days
        return days & (1 << end - first) - 1

    def day_from(self, day: int) -> int:
        """Return the first matching day, from `day` (since 1970) on.

        The schedule must not be `never`: leap days may take years to come,
        but within 400 years each date has been on each possible weekday.
        """
        year, month, first = calendar_date(day)
        days = self.days_in(year, month) >> first - 1 << first - 1
        while not days:
            year, month = (year, month + 1) if month < 12 else (year + 1, 1)
            days = self.days_in(year, month)
        return days_since_epoch(year, month, lowest_bit(days) + 1)

    def minute_after(self, local: int) -> int:
        """Return the first matching local minute after the local second
        `local`. The schedule must not be `never`."""
        day = local // DAY
        if self.has_day(day):
            hour, minute = divmod(local % DAY // MINUTE, 60)
            minutes = self.minutes >> minute + 1
            if self.hours >> hour & 1 and minutes:
                return day * DAY + hour * HOUR + (
                    minute + 1 + lowest_bit(minutes)) * MINUTE
            hours = self.hours >> hour + 1
            if hours:
                return day * DAY + (hour + 1 + lowest_bit(hours)) * HOUR \
                    + lowest_bit(self.minutes) * MINUTE
        day = self.day_from(day + 1)
        return day * DAY + lowest_bit(self.hours) * HOUR \
            + lowest_bit(self.minutes) * MINUTE

    def minutes_between(self, low: int, end: float):
        """Yield all matching local minutes from `low` on and before `end`."""
        minute = end if self.never else self.minute_after(low - 1)
        if minute >= end:       # as for most jobs that koid asks for a minute
            return
        day, minutes = minute // DAY, set_bits(self.minutes)
        while day * DAY < end:
            for hour in set_bits(self.hours):
                begin = day * DAY + hour * HOUR
                if begin + HOUR <= low:
                    continue
                for minute in minutes:
                    local = begin + minute * MINUTE
                    if local >= end:
                        return
                    if local >= low:
                        yield local
            day = self.day_from(day + 1)

    def matches(self, minute: int) -> bool:
        """Does a local minute satisfy all five fields?"""
        return not self.never and self.minute_after(minute - 1) == minute

    def next(self, after: int, zone: Zone = UTC) -> int | None:
        """Return the first start after the minute of the instant `after`, of
        a daemon that ran through all changes of `zone`; None if there is
        none."""
        if self.never:
            return None
        period = zone.period_at(after)
        offset = zone.offsets[period]
        local = after + offset
        if local >= zone.caught_up_from[period]:
            start = self.minute_after(local) - offset
            if start < zone.begins[period + 1]:
                return start
        return next(self.iter_starts(after, zone), None)

    def iter_starts(self, after: int, zone: Zone = UTC,
                    virtual: int | None = None):
        """Yield the instants of all starts after the minute of `after`, as
        Debian's cron makes them, without end.

        `virtual` is the last local minute whose jobs were started; None if
        the daemon ran through all changes of `zone` before `after`.
        """
        if self.never:
            return
        latest = after
        if virtual is None:
            period = zone.period_at(after)
            local = after + zone.offsets[period]
            virtual = max(local // MINUTE * MINUTE,
                          zone.caught_up_from[period])
        for first, end, offset in zone.periods_after(after):
            low = first_minute_after_jump(virtual, first, self.wildcard)
            for minute in self.minutes_between(low, end):
                latest = max(minute, first) - offset
                yield latest
            # The only date of a wildcard job may always be in a gap.
            if end - offset - latest > DAYS_IN_400_YEARS * DAY:
                return
            virtual = advance_virtual_minute(virtual, first,
                                             (end - 1) // MINUTE * MINUTE)

    def describe(self) -> str:
        """Return the schedule in English: At 02:30 on Mondays."""
        if self.never:
            return "Never"
        return describe_times(self) + describe_dates(self)


WEEKDAY_WORDS = ("Sunday Monday Tuesday Wednesday Thursday Friday "
                 "Saturday").split()
MONTH_WORDS = ("January February March April May June July August September "
               "October November December").split()


def join_words(words: list[str]) -> str:
    """Return "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def describe_numbers(numbers: list[int], word=str) -> str:
    """Return "1 to 5, 7 and 9": three or more in a row are a range.

    `word(number)` returns the text of one number.
    """
    found, at = [], 0
    while at < len(numbers):
        end = at
        while end + 1 < len(numbers) and numbers[end + 1] == numbers[end] + 1:
            end += 1
        if end - at >= 2:
            found.append(f"{word(numbers[at])} to {word(numbers[end])}")
            at = end + 1
        else:
            found.append(word(numbers[at]))
            at += 1
    return join_words(found)


def describe_spacing(numbers: list[int], unit: str, word=str) -> str:
    """Return "every 7th minute from 0 to 56"; "" if `numbers` are fewer than
    four, consecutive or not evenly spaced."""
    steps = {b - a for a, b in zip(numbers, numbers[1:])}
    if len(numbers) < 4 or len(steps) > 1 or 1 in steps:
        return ""
    return (f"every {ordinal(*steps)} {unit} from {word(numbers[0])} to "
            f"{word(numbers[-1])}")


def describe_values(numbers: list[int], unit: str) -> str:
    """Return "minute 5", "hours 8 to 17" or what `describe_spacing` does."""
    ending = "s" if len(numbers) > 1 else ""
    return describe_spacing(numbers, unit) \
        or f"{unit}{ending} {describe_numbers(numbers)}"


def ordinal(number: int) -> str:
    """Return "1st", "2nd", "3rd", "4th"."""
    ending = "th" if 10 < number % 100 < 14 else {
        1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def full_step(numbers: list[int], count: int) -> int:
    """Return the step if `numbers` are 0, step, 2 * step ... up to `count`,
    which the step divides; otherwise 0."""
    step = numbers[1] if len(numbers) > 1 else 0
    return step if step and count % step == 0 and numbers == list(
        range(0, count, step)) else 0


def describe_times(schedule: Schedule) -> str:
    """Return the minutes and hours: "Every 5 minutes", "At 02:30"."""
    minutes, hours = set_bits(schedule.minutes), set_bits(schedule.hours)
    if len(minutes) * len(hours) <= 6:
        return "At " + join_words([f"{hour:02}:{minute:02}" for hour in hours
                                   for minute in minutes])
    minute_step, hour_step = full_step(minutes, 60), full_step(hours, 24)
    if hour_step == 1 and minutes == [0]:
        return "Every hour"
    if minute_step == 1:
        text = "Every minute"
    elif minute_step:
        text = f"Every {minute_step} minutes"
    else:
        text = f"At {describe_values(minutes, 'minute')}"
    if hour_step == 1:
        return text if minute_step else f"{text} of every hour"
    if hour_step:
        return f"{text} of every {ordinal(hour_step)} hour"
    return f"{text} of {describe_values(hours, 'hour')}"


def describe_dates(schedule: Schedule) -> str:
    """Return the days and months after a blank: " on Mondays in May"; "" if
    the schedule has all days."""
    all_days, all_week = (1 << 31) - 1, 127
    days, week = schedule.days, schedule.weekdays
    months = "" if schedule.months == 4095 else describe_numbers(
        set_bits(schedule.months), MONTH_WORDS.__getitem__)
    if not schedule.both and (days == all_days or week == all_week):
        days, week = all_days, all_week     # one field is enough, and has all
    numbers = [n + 1 for n in set_bits(days)]
    on_days = " on " + (
        describe_spacing(numbers, "day", lambda n: f"the {ordinal(n)}")
        or f"the {describe_numbers(numbers, ordinal)}")
    # As 7, Sunday comes after Saturday: Fridays to Sundays.
    on_week = " on " + describe_numbers(
        set_bits((week | week << 7 & 128) & 254),
        lambda n: WEEKDAY_WORDS[n % 7] + "s")
    in_months = f" in {months}" if months else ""
    if days == all_days:
        return in_months if week == all_week else on_week + in_months
    of_months = f" of {months or 'the month'}"
    if week == all_week:
        return on_days + of_months
    if schedule.both:
        return f"{on_week} that fall{on_days}{of_months}"
    if not days or not week:            # such as 5-1, a range of no values
        return on_days + of_months if days else on_week + in_months
    return f"{on_days}{of_months} and{on_week}{in_months}"


# ==========================================================================
# Tab: what does a koitab say?                              (nothing; R U C)
#
# A tab is a crontab in koi's format: all of crontab(5), and sections, names,
# @manual, {{arguments}} and KOI_ settings. An invalid line becomes a
# Diagnostic and is dropped; all others are used. `Lexer` knows enough of sh
# to say where in a command an argument may be.
# ==========================================================================

# How an argument reaches the shell. Text that koi quoted and inserted into a
# command could still be read as code, since quoting differs between shells
# and contexts. So the value never becomes part of the command: koid puts it
# into the environment, as KOI_ARG_1, and {{To}} in the script becomes
# "${KOI_ARG_1}". A shell expands this to exactly one word, whatever the value
# contains, but only where it expects a word. In single quotes the job would
# get the text ${KOI_ARG_1} itself; in double quotes the inner quotes would
# end the outer ones, so the value would be split and expanded; in arithmetic,
# an array's index or a pattern, the shell evaluates the value once more.
#
# `Lexer` therefore follows a command as sh, bash and zsh do, and names the
# place of each placeholder. It must know quotes, escapes, comments,
# expansions, command substitutions, redirections, here-documents, arithmetic,
# arrays and `case`; it must not know the grammar of commands. Where shells
# disagree, or where it cannot know what follows, it rejects the placeholder:
# a mistake may cost a valid command, but never allows an unsafe one. A
# program that evaluates its arguments itself (eval, ssh, awk) is out of the
# lexer's reach. `find_evaluator` knows many of them and warns.

MOST_LINES = 10_000         # Debian's own limit
MOST_SETTINGS = 1_000       # cronie's; each costs a copy of those above it
LONGEST_COMMAND = 131_071   # bytes; Linux's limit for one argument
LONGEST_NAME = 100
LONGEST_VALUE, LONGEST_TEXT = 4096, 65_536      # bytes of an argument
MOST_PARAMS = 64
MOST_COMPARED = 10_000      # names, to find those that are alike
MOST_DATES = 100            # in KOI_SKIP; they are shown in each description
DEEPEST_SHELL = 50          # levels; Python's own stack has about 1,000
BLANKS = " \t"
SPACE = " \t\r\f\v"
LONGEST_LABEL = 1000        # characters of a job's label


class Settings(FrozenRecord):
    """The settings that the assignments of a tab make for the jobs below
    them: those of koi, CRON_TZ and RANDOM_DELAY."""
    timeout: float = 0.0        # seconds; 0: none
    overlap: str = "allow"
    retry: int = 0
    catchup: str = "no"
    keep: int = 100             # runs
    start_within: float = 0.0   # seconds; 0: no limit
    confirm: str = "no"
    nice: int = 0
    skip: tuple = ()            # (first, last) days since 1970, each
    zone: str = ""              # CRON_TZ; "": the machine's
    random_delay: int = 0       # minutes


class Parameter(FrozenRecord):
    """An argument that a job expects: {{name, type, default}}."""
    name: str
    type: str = "string"
    default: str | None = None
    choices: tuple = ()

    def value_error(self, value: str) -> str:
        """Return why `value` is not valid for this; "" if it is."""
        if self.type == "int":
            digits = value.removeprefix("-")
            return "" if digits.isascii() and digits.isdigit() \
                and len(digits) <= 18 else "an int is 1 to 18 digits"
        if self.type == "bool":
            return "" if value in ("true", "false") else \
                "a bool is true or false"
        if self.type == "choice":
            return "" if value in self.choices else \
                f"choose one of {'|'.join(self.choices)}"
        if self.type == "date":
            return "" if is_date(value) else "a date is written 2026-03-29"
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            return "it is not UTF-8"
        if has_control(value, "\n\t" if self.type == "text" else "\t"):
            return "it has a control character"
        most = LONGEST_TEXT if self.type == "text" else LONGEST_VALUE
        return f"it is longer than {most:,} bytes" if size > most else ""


class Job(FrozenRecord):
    """An entry of a tab that can run."""
    line: int
    section: str
    name: str               # "" if it has none
    when: str               # as written: "*/5 * * * *", "@manual"
    schedule: Schedule | None   # None: @manual, @reboot or @after
    user: str               # of a system tab; else ""
    command: str            # as written, with % and {{..}}
    script: str             # what the shell gets
    stdin: str
    params: tuple
    environment: dict
    settings: Settings
    unlogged: bool = False          # a line that begins with "-"
    mail_failures: bool = False     # a command that begins with "-n "
    apart: tuple = ()       # tells it from an equal one: see told_apart
    after: tuple = ()       # the identity of the job that @after names
    assignments: str = ""   # a checksum of `environment`

    @property
    def label(self) -> str:
        """The name, or the command of a job without one."""
        return (self.name or self.command)[:LONGEST_LABEL]

    @property
    def leader(self) -> str:
        """The name in @after "NAME", as written; "" for any other job."""
        return self.when[8:-1] if self.when.startswith("@after") else ""

    def identity(self) -> tuple:
        """Return what makes it the same job after its line has moved."""
        if self.name:
            return ("name", self.section, self.name, *self.apart)
        return ("line", self.user, self.when, self.command, *self.apart)

    @property
    def tag(self) -> str:
        """The identity as 12 hexadecimal digits, for programs."""
        return short_hash("\0".join(self.identity()))

    def describe(self) -> str:
        """Return in English when it runs."""
        if self.when == "@manual":
            return "When asked for"
        settings = self.settings
        if self.schedule:
            text = self.schedule.describe()
            if settings.zone:
                text += f" ({settings.zone})"
            if settings.random_delay:
                text += f", delayed by up to {settings.random_delay} minutes"
        else:
            text = f"After {self.leader}" if self.leader \
                else "When the machine starts"
        if settings.skip:
            text += f", not on {date_words(settings.skip)}"
        return text


def short_hash(identity: str) -> str:
    """Return the first 12 hexadecimal digits of a text's SHA-256; "" if
    Python was upgraded under a running koid."""
    try:
        from hashlib import sha256  # costs 3 MB, which an idle koid saves
    except ImportError:
        return ""
    return sha256(identity.encode("utf-8", "surrogateescape")
                  ).hexdigest()[:12]


class Tab(FrozenRecord):
    """The content of one tab: its jobs and diagnostics."""
    jobs: list
    diagnostics: list
    zones: dict             # CRON_TZ -> (line, column) of its first use

    def errors(self) -> list[Diagnostic]:
        """Return the diagnostics without the warnings."""
        return [each for each in self.diagnostics if each.fatal]


def is_date(text: str) -> bool:
    """Is `text` a date of the calendar, such as 2026-03-29?"""
    import re
    found = re.fullmatch("([0-9]{4})-([0-9]{2})-([0-9]{2})", text)
    if not found:
        return False
    year, month, day = map(int, found.groups())
    return year > 0 and 1 <= month <= 12 and day > 0 and calendar_date(
        days_since_epoch(year, month, day)) == (year, month, day)


def parse_dates(text: str) -> tuple:
    """Return (first, last) in days since 1970 for each part of a text such
    as 2026-12-24..2027-01-01,2027-05-01.

    Raises ValueError with the reason, and the offset of the wrong part.
    """
    ranges, at = [], 0
    for part in text.split(",") if text else ():
        dates = [each.strip(BLANKS) for each in part.split("..", 1)]
        for date in dates:
            if not is_date(date):
                raise ValueError(f"{short(date)} is not a date", at)
        first, last = (days_since_epoch(*map(int, date.split("-")))
                       for date in (dates[0], dates[-1]))
        if last < first:
            raise ValueError(f"{short(part.strip(BLANKS))} ends before it "
                             "begins", at)
        ranges.append((first, last))
        at += len(part) + 1
    if len(ranges) > MOST_DATES:
        raise ValueError(f"more than {MOST_DATES} dates and ranges", 0)
    return tuple(ranges)


def date_words(ranges: tuple) -> str:
    """Return what `parse_dates` has read, as text."""
    return ", ".join("..".join("{:04}-{:02}-{:02}".format(*calendar_date(day))
                               for day in dict.fromkeys(each))
                     for each in ranges)


def has_control(text: str, allowed: str = "") -> bool:
    """Does `text` have a tab or an UNSAFE character that is not `allowed`?"""
    if text.isprintable():
        return False
    import re
    return any(match not in allowed for match in re.findall(UNSAFE + "|\t",
                                                            text))


# --- sh: where may a placeholder be? --------------------------------------

QUOTES = "leave the quotes away: koi quotes the value"
ALONE = "let it stand alone, as a word of the command"
PLACEMENT_HINTS = {     # place of a placeholder -> hint
    "in single quotes": QUOTES, "in double quotes": QUOTES,
    "in $'..'": QUOTES, "in backquotes": ALONE, "in $(..)": ALONE,
    "in ${..}": ALONE, "in arithmetic": ALONE, "in <(..) or >(..)": ALONE,
    "in a here-document": "hand it to a command as a word",
    "in a comment": "a # begins a comment; put the argument before it",
    "after a backslash": "leave the backslash away",
    "after a $": "leave the $ away", "in an array's index": ALONE,
    "in a pattern": ALONE,
    "after >& or <&": "bash would read it twice; write >{{..}} 2>&1",
    "after a ' in \"${..}\"": "shells read that in two ways; use other quotes",
    "after %": "what follows % is the job's input; write \\% for a percent",
    r"after $'..\'..'": "shells read that in two ways; use other quotes",
    "nested too deep": ALONE,
}
# Programs that read an argument a second time, as code, so that no quoting
# helps. "": always. Letters: with one of these options, as in sh -lc. A word:
# with this option, as in gdb -ex. ">": only the word after this option. "=":
# only a value that is a whole word, as export V={{x}} is safe.
EVALUATORS = {name: option for option, names in {
    "":
        "eval let trap [[ declare typeset unset source . read mapfile "
        "readarray getopts compgen emulate integer xargs parallel ssh autossh "
        "rsh pdsh watch hyperfine tmux at batch crontab koitab make gmake m4 "
        "dc ed gnuplot socat awk gawk mawk nawk sed gsed sg sqlite3",
    "c":
        "expect psql sh ash bash rbash dash ksh mksh zsh yash fish csh tcsh "
        "busybox su runuser script flock python pypy ipython guile vi vim "
        "nvim ex ncat nc",
    "=": "export readonly local exit return shift ulimit repeat",
    "e": "mysql mariadb ruby lua R Rscript osascript",
    "v": "test [ printf",
    "eE": "perl julia",
    "ep": "node nodejs",
    "--eval": "emacs octave",
    "s": "entr",
    "S": "env",
    "rBRE": "php",
    "-ex": "gdb",
    ">-c": "git",
    ">-e": "rsync",
}.items() for name in names.split()}
SHELLS = set("sh ash bash rbash dash ksh mksh zsh yash fish csh tcsh".split())
# Programs that run the file that is their first operand.
INTERPRETERS = SHELLS.union(
    "python pypy perl ruby node nodejs php lua Rscript julia".split())
SHELL_BUILTINS = set((
    "eval let trap [[ declare typeset unset source . read mapfile readarray "
    "getopts compgen emulate integer export readonly local exit return shift "
    "ulimit repeat"
    ).split())
# Programs that run another program, whose name may follow options.
WRAPPERS = set((
    "sudo doas env nohup nice ionice timeout exec command time find setsid "
    "flock chroot busybox stdbuf runuser systemd-run unshare nsenter setpriv "
    "prlimit taskset chrt strace docker podman kubectl machinectl ip entr "
    "fakeroot xvfb-run chronic sshpass screen"
    ).split())
# Of these, the ones of which an operand is the program itself.
PREFIX_COMMANDS = set((
    "sudo doas env nohup nice ionice timeout setsid stdbuf systemd-run "
    "unshare setpriv chronic strace fakeroot xvfb-run entr"
    ).split())
# Variables whose value a shell or a program evaluates or runs.
EVALUATED_VARIABLES = set((
    "PS4 PATH ENV BASH_ENV LD_PRELOAD LD_LIBRARY_PATH RANDOM SECONDS OPTIND "
    "HISTCMD COLUMNS LINES PERL5OPT PERL5LIB PYTHONPATH RUBYOPT RUBYLIB "
    "NODE_OPTIONS JAVA_TOOL_OPTIONS MAKEFLAGS EDITOR VISUAL PAGER LESSOPEN "
    "GIT_SSH GIT_SSH_COMMAND GIT_EDITOR GIT_PAGER RSYNC_RSH"
    ).split())
POSITIONAL = {f"${digit}" for digit in "123456789"}
ARITHMETIC_TESTS = {"-eq", "-ne", "-lt", "-le", "-gt", "-ge", "-t"}
ENDS_WORD = " \t\n;&|()<>"
WITHOUT_QUOTES = str.maketrans("", "", "'\"\\")
LITERAL_CHARACTERS = (      # in an index or a glob such as [0-9]
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "_-.,!^*?@+")
# Shells and interpreters whose words are not those of sh.
FOREIGN_SHELLS = set(
    "fish csh tcsh nu elvish xonsh pwsh rc es python python3 perl".split())
FREE_TYPES = {"string", "text", "secret"}   # types that can contain code
# Words that other programs put in double braces, as Go templates do.
FOREIGN_WORDS = {"end", "else"}


def is_foreign(inner: str) -> bool:
    """Do braces with this text belong to another program, such as {{.Names}}
    or {{end}} of a Go template?"""
    words = inner.replace("(", " ").replace("|", " ").split()
    return inner.strip() in FOREIGN_WORDS or any(
        word[0] in ".$" for word in words) or inner[:1] in ("-", "/", "#")


def declared_names(command: str) -> set[str]:
    """Return the name of each {{name, type}} in a command."""
    inner = [part.partition("}}") for part in command.split("{{")[1:]]
    return {text.partition(",")[0].strip(BLANKS)
            for text, close, _ in inner if close and "," in text}


def in_index(before: str) -> bool:
    """Does a word that begins with `before` continue in an array's index?

    bash evaluates an index as arithmetic, so a[$(id)] would run `id`.
    """
    name, bracket, rest = before.partition("[")
    if not bracket or name and not name.isidentifier():
        return False
    index, _, after = rest.partition("]")
    return not (index.isalnum() and after.startswith(("=", "+=")))


class Placeholder(FrozenRecord):
    """{{...}} in a command, from the offset `start` to `end`."""
    start: int
    end: int
    place: str              # a key of PLACEMENT_HINTS; "": it is allowed
    first: bool = False     # it begins the first word of a command


class Lexer:
    """Reads a command as sh does, and finds each placeholder in it.

    `at` is the offset in `text` of the next character. A `place` is a key of
    PLACEMENT_HINTS, or "" where a placeholder is allowed. Each method reads
    one construct and leaves `at` after it. `names`: which {{name}} without a
    type are placeholders; None: all are.
    """

    def __init__(self, text: str, names: set[str] | None = None):
        self.text, self.at, self.depth = text, 0, 0
        self.names = names
        self.found: list[Placeholder] = []
        self.ignored: list[tuple[int, str]] = []    # where, and why
        self.words: list[tuple[str, bool]] = []     # word, begins a command
        self.place_to_end = ""      # a place that lasts to the end
        self.may_close = True       # there may be a }} ahead
        self.has_case = False       # there was a `case`
        self.in_array = False       # inside V=(..)
        self.assigned: set[str] = set()     # variables that get a value
        self.arithmetic: list[str] = []     # texts that a shell evaluates
        self.read_commands("", "")

    def placeholder(self, place: str, first: bool = False) -> bool:
        """Read a placeholder if there is one here, and record its place."""
        text, at = self.text, self.at
        if not text.startswith("{{", at):
            return False
        end = text.find("}}", at + 2) if self.may_close else -1
        inner = text[at + 2:end]
        self.may_close = end >= 0
        ignored = "open" if end < 0 else self.text_kind(inner)
        if ignored:
            self.ignored.append((at, ignored))
            return False
        self.found.append(Placeholder(at, end + 2, place or self.place_to_end,
                                      first))
        self.at = end + 2
        return True

    def text_kind(self, inner: str) -> str:
        """Return why {{inner}} is text: it is "foreign", has "braces", or is
        "plain"; "" if it is a placeholder."""
        if is_foreign(inner):
            return "foreign"
        if "{" in inner or "}" in inner:
            return "braces"
        return "" if self.names is None or "," in inner \
            or inner.strip(BLANKS) in self.names else "plain"

    def read_commands(self, place: str, stop: str) -> None:
        """Read commands up to the character `stop`, or to the end."""
        text, word, first = self.text, -1, not self.in_array
        self.depth += 1
        if self.depth > DEEPEST_SHELL:
            self.read_rest("nested too deep")
        while self.at < len(text):
            character = text[self.at]
            if character in ENDS_WORD:
                if word >= 0 and not (character in "<>"
                                      and text[word:self.at].isdigit()):
                    first = self.end_word(word, first)
                word = -1
                if character == stop:
                    # The ) after a pattern of `case` closes nothing. So
                    # after a `case` the place lasts to the end.
                    if not (place and self.has_case):
                        self.at += 1
                        break
                    self.place_to_end = place
                self.operator(character,
                              place or self.pattern_place(character, first))
                first = character in ";&|)" or first and character in \
                    " \t(<>" or text.endswith("()", 0, self.at)
            elif character == "#" and word < 0:
                self.read_rest("in a comment")
            else:
                if word < 0:
                    word = self.at
                self.in_word(character, place, word, first)
        if word >= 0 and self.at >= len(text):
            self.end_word(word, first)
        self.depth -= 1

    def end_word(self, start: int, first: bool) -> bool:
        """Record the word from `start` to here. Return whether the next one
        is the first of its command: after V=x, `if`, `sudo` and the like."""
        word = self.text[start:self.at].translate(WITHOUT_QUOTES)
        self.words.append((word, first))
        self.has_case = self.has_case or word == "case"
        if self.words[-2:-1] in ([("for", True)], [("select", True)]):
            self.assigned.add(word)
        name = word.split("=")[0]
        return first and (name != word and name.isidentifier() or word in (
            "if", "then", "else", "elif", "do", "while", "until", "!", "{",
            "time", "exec", "command", "nohup", "setsid", "sudo", "doas",
            "builtin", "coproc", "noglob", "nocorrect"))

    def operator(self, character: str, place: str) -> None:
        """Read what separates words."""
        text, at = self.text, self.at
        if text.startswith("((", at):
            self.at += 1
            self.read_commands(place or "in arithmetic", ")")
            self.arithmetic.append(text[at:self.at])
        elif character == "(":
            outer, self.in_array = self.in_array, text[at - 1:at] == "="
            self.at += 1
            self.read_commands(place, ")")
            self.in_array = outer
        elif character in "<>" and text.startswith("(", at + 1):
            self.at += 2
            self.read_commands("in <(..) or >(..)", ")")
        elif text.startswith("<<<", at):
            self.at += 3
            self.target(place)
        elif text.startswith("<<", at):
            self.at += 2
            self.place_to_end = self.place_to_end or "in a here-document"
        elif text.startswith((">&", "<&"), at):
            self.at += 2
            self.target(place or "after >& or <&")
        elif character in "<>":
            self.at += 1 + text.startswith((">", "|"), at + 1)
            self.target(place)
        else:
            self.at += 1

    def pattern_place(self, character: str, first: bool) -> str:
        """Return "in a pattern" if a ( here begins one, as among the words of
        a command in zsh, which can run what a pattern contains."""
        text, at = self.text, self.at
        if character != "(" or first or text[at - 1:at] == "=" \
                or text.startswith("()", at) \
                or self.words[-1:] == [("in", False)]:
            return ""
        return "in a pattern"

    def target(self, place: str) -> None:
        """Read the word after a redirection, which is not a word of the
        command. After >&, bash expands a value a second time."""
        text = self.text
        while text[self.at:self.at + 1] in (" ", "\t"):
            self.at += 1
        word = self.at
        while self.at < len(text) and text[self.at] not in ENDS_WORD:
            self.in_word(text[self.at], place, word, False)

    def in_word(self, character: str, place: str, word: int, first: bool):
        """Read one part of the word that begins at `word`."""
        text = self.text
        if character == "\\":
            self.at += 1
            self.placeholder("after a backslash") or self.skip()
        elif character == "'":
            self.single_quotes("in single quotes")
        elif character == '"':
            self.double_quotes()
        elif character == "`":
            self.backquotes()
        elif character == "$":
            self.dollar(quoted=False)
        elif character == "[" and self.opens_index(word):
            self.place_to_end = self.place_to_end or "in an array's index"
            self.at += 1
        elif character == "{" and text.startswith("{{", self.at):
            before = text[word:self.at]
            if in_index(before):
                place = place or "in an array's index"
            if self.placeholder(place, first and "=" not in before):
                self.assigned.add(before.partition("=")[0].rstrip("+"))
            else:
                self.skip()
        else:
            self.at += 1

    def note_evaluation(self, inner: str) -> None:
        """Record ${!V}, ${x[V]} and ${x:V}: the shell reads the value of V as
        a name or as arithmetic."""
        name, colon, rest = inner.partition(":")
        if inner[1:2] == "!" or "[" in name or colon \
                and rest[:1] not in tuple("-=?+"):
            self.arithmetic.append(inner)

    def evaluated_variable(self) -> str:
        """Return a variable that gets a value and is evaluated, or ""."""
        evaluated = sorted(self.assigned & EVALUATED_VARIABLES)
        if evaluated:
            return evaluated[0]
        dollar_names = {f"${name}" for name in self.assigned}
        for text in self.arithmetic:
            names = set("".join(
                character if character.isalnum() or character in "_$" else " "
                for character in text).replace("$", " $").split())
            evaluated = sorted(names & (self.assigned | POSITIONAL
                                        | dollar_names))
            if evaluated:
                return f"arithmetic with {evaluated[0]}"
        return ""

    def opens_index(self, word: int) -> bool:
        """Does a [ here open an index that may contain a placeholder?

        V[.. and, in an array, [..]=.. last up to the ], even over blanks.
        """
        text, at = self.text, self.at
        if self.place_to_end or not (self.in_array if word == at
                                     else text[word:at].isidentifier()):
            return False
        end = text.find("]", at)
        return end < 0 or text[at + 1:end].strip(LITERAL_CHARACTERS) != ""

    def skip(self) -> None:
        """Read one character, whatever it is."""
        self.at += 1

    def read_rest(self, place: str) -> None:
        """Read all up to the end, which is in `place`."""
        self.read_literal(place, len(self.text))
        self.at = len(self.text)

    def read_literal(self, place: str, end: int) -> None:
        """Read the placeholders before the offset `end`, where nothing else
        has a meaning. The last one may extend beyond `end`."""
        while True:
            at = self.text.find("{{", self.at, end)
            if at < 0:
                break
            self.at = at
            self.placeholder(place) or self.skip()

    def single_quotes(self, place: str) -> None:
        """Read '...', where no character is special."""
        self.at += 1
        while True:
            end = self.text.find("'", self.at)
            end = len(self.text) if end < 0 else end
            self.read_literal(place, end)
            if self.at <= end:      # else the quote was in {{a' b}}
                break
        self.at = end + 1

    def double_quotes(self, inner: bool = False) -> None:
        """Read "...", where $, ` and \\ are special. `inner`: it is within
        "${..}"."""
        self.at += 1
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == '"':
                self.at += 1
                return
            if character == "\\":
                self.at += 1
                self.placeholder("in double quotes") or self.skip()
            elif character == "`":
                self.backquotes()
            elif character == "$":
                self.dollar(quoted=True)
            elif not self.placeholder("in double quotes"):
                if inner and character in "'}":
                    self.reject_ambiguous_quote()
                self.at += 1

    def reject_ambiguous_quote(self) -> None:
        """Reject placeholders from here on: shells disagree about a quote."""
        self.place_to_end = self.place_to_end or "after a ' in \"${..}\""

    def backquotes(self) -> None:
        """Read `...`, up to the next backquote without a backslash."""
        self.at += 1
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "`":
                self.at += 1
                return
            self.at += character == "\\"
            if not self.placeholder("in backquotes"):
                self.at += 1

    def dollar(self, quoted: bool) -> None:
        """Read $(..), $((..)), ${..}, $'..' or $name. `quoted`: it is in
        double quotes."""
        text, self.at = self.text, self.at + 1
        place = "in double quotes" if quoted else "after a $"
        if text.startswith("((", self.at):
            at, self.at = self.at, self.at + 1
            self.read_commands("in arithmetic", ")")
            self.arithmetic.append(text[at:self.at])
        elif text.startswith("(", self.at):
            self.at += 1
            self.read_commands("in $(..)", ")")
        elif text.startswith("{", self.at):
            at = self.at
            self.placeholder(place) or self.parameter_expansion(quoted)
            self.note_evaluation(text[at:self.at])
        elif text.startswith("[", self.at):     # $[1+2], which bash still has
            self.place_to_end = self.place_to_end or "in arithmetic"
        elif text.startswith("'", self.at) and not quoted:
            self.ansi_quotes()
        elif text[self.at:self.at + 1] not in ("", '"', "'", "\\", "`", " ",
                                               "\t", ";", ")", "&", "|"):
            self.at += 1        # $$ and $# among others

    def parameter_expansion(self, quoted: bool) -> None:
        """Read ${..}, which may contain all other constructs. `quoted`: it is
        in double quotes, where shells disagree about the meaning of a '."""
        self.at += 1
        self.depth += 1
        if self.depth > DEEPEST_SHELL:
            self.read_rest("nested too deep")
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "}":
                self.at += 1
                break
            if character == "\\":
                self.at += 1
                self.placeholder("in ${..}") or self.skip()
            elif character == "'" and quoted:
                self.reject_ambiguous_quote()
                self.at += 1
            elif character == "'":
                self.single_quotes("in ${..}")
            elif character == '"':
                self.double_quotes(inner=quoted)
            elif character == "`":
                self.backquotes()
            elif character == "$":
                self.dollar(quoted)
            elif not self.placeholder("in ${..}"):
                self.at += 1
        self.depth -= 1

    def ansi_quotes(self) -> None:
        r"""Read $'..': in bash, \' does not end it; in dash it does."""
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != "'":
            if self.text[self.at] == "\\":
                if self.text.startswith("'", self.at + 1):
                    self.place_to_end = self.place_to_end \
                        or r"after $'..\'..'"
                self.at += 1
            if not self.placeholder("in $'..'"):
                self.at += 1
        self.at += 1


def find_evaluator(words: list[tuple[str, bool]]) -> str:
    """Return the program among `words` that would read a value as code, with
    its option, as in "sh -c"; "" if none is known. `words` are the lexer's.
    """
    wrapped = False
    for number, (word, first) in enumerate(words):
        name = word.rpartition("/")[2] or word
        wrapped = name in WRAPPERS or wrapped and not first
        is_program = first or wrapped and name not in SHELL_BUILTINS
        # python3.11 counts as python.
        kind = name if name in EVALUATORS else name.rstrip("0123456789.")
        if kind not in EVALUATORS or not (is_program or kind in SHELLS):
            continue
        after = []
        for later, begins in words[number + 1:number + 100]:
            if begins:
                break
            after.append(later)
        option = evaluator_of(kind, after)
        if option is not None and (is_program or option == " -c"):
            return name + option
    return ""


def evaluator_of(name: str, after: list[str]) -> str | None:
    """Return the option by which the program `name` reads a value in `after`,
    its words, as code: " -c"; "" if by none; None if it does not."""
    option = EVALUATORS[name]
    if not option:
        return ""
    if option == "=":
        return "" if any(word[:2] == "{{" for word in after) else None
    if option[0] == ">":
        has_option = any(one == option[1:] and two[:2] == "{{"
                         for one, two in zip(after, after[1:]))
        return f" {option[1:]}" if has_option else None
    if option[0] == "-":
        return f" {option}" if option in after else None
    if any(word[:1] == "-" and word[:2] != "--" and any(
            character in word for character in option) for word in after):
        return f" -{option[0]}"
    if name in ("test", "[") and not ARITHMETIC_TESTS.isdisjoint(after):
        return " of ksh"                    # it evaluates the words of -eq
    operands = [word for word in after if word[:1] != "-" or word == "-s"]
    if name in SHELLS and (not operands or operands[0] == "-s"):
        return ""                           # echo {{x}} | sh
    runs_file = name in INTERPRETERS and operands[:1] \
        and operands[0][:2] == "{{"
    return "" if runs_file else None


def wrapped_program(words: list[tuple[str, bool]]) -> str:
    """Return the program that runs a value as a program, as `sudo {{x}}`
    does, or ""."""
    runner = ""
    for word, first in words:
        if word[:2] == "{{" and runner:
            return runner
        name = word.rpartition("/")[2]
        if name in PREFIX_COMMANDS and (first or runner):
            runner = name
        elif first or not (word[:1] in "-0123456789" or "=" in word):
            runner = ""
    return ""


def split_percent(text: str) -> tuple[str, str, int]:
    r"""Split a command at the first % without a backslash, as crontab(5)
    says. Return the command, its standard input, and the offset of the %.

    In the command, \% becomes a percent sign.
    """
    if "%" not in text:
        return text, "", len(text)
    import re
    end = re.match(r"(\\.|[^%])*", text, re.DOTALL).end()
    command = re.sub(r"\\.", lambda match: "%" if match[0] == "\\%"
                     else match[0], text[:end], flags=re.DOTALL)
    return command, input_text(text[end + 1:]), end


def input_text(text: str) -> str:
    """Return the standard input in `text`, what follows the first %: each
    further % is a newline, and it ends with one."""
    import re
    found = re.sub(r"\\?%", lambda match: "\n" if match[0] == "%" else "%",
                   text)
    return found if not found or found.endswith("\n") else found + "\n"


# --- line by line ---------------------------------------------------------


def one_of(*words: str):
    """Return a function that returns its text if it is one of `words`, and
    None otherwise."""
    return lambda text: text if text in words else None


def parse_count(text: str) -> int | None:
    """Return a number of up to six digits; None if `text` is not one."""
    return int(text) if text.isascii() and text.isdigit() \
        and len(text) < 7 else None


def parse_positive(text: str) -> int | None:
    """Return a count of at least 1; None if `text` is not one."""
    return parse_count(text) or None


def parse_delay(text: str) -> int | None:
    """Return minutes, at most a day; None if `text` is not that."""
    minutes = parse_count(text)
    return minutes if minutes is not None and minutes <= 1440 else None


def parse_nice(text: str) -> int | None:
    """Return a niceness from 0 to 19; None if `text` is not one."""
    nice = parse_count(text)
    return nice if nice is not None and nice < 20 else None


SETTINGS = {    # variable -> field of Settings, parser, what it expects
    "KOI_TIMEOUT": ("timeout", parse_duration,
                    "a duration such as 90s or 1h30m"),
    "KOI_OVERLAP": ("overlap", one_of("allow", "skip", "queue", "replace"),
                    "allow, skip, queue or replace"),
    "KOI_RETRY": ("retry", parse_count, "how many times, 0 or more"),
    "KOI_CATCHUP": ("catchup", one_of("yes", "no"), "yes or no"),
    "KOI_KEEP": ("keep", parse_positive, "how many runs, 1 or more"),
    "KOI_START_WITHIN": ("start_within", parse_duration,
                         "a duration such as 10m"),
    "KOI_CONFIRM": ("confirm", one_of("yes", "no", "cli"), "yes, no or cli"),
    "KOI_NICE": ("nice", parse_nice, "a niceness, 0 to 19"),
    "KOI_SKIP": ("skip", parse_dates, "2026-12-24..2027-01-01,2027-05-01"),
    "CRON_TZ": ("zone", str, "a name such as Europe/Berlin"),
    "RANDOM_DELAY": ("random_delay", parse_delay, "minutes, 0 to 1440"),
}


def parse_assignment(line: str) -> tuple[str, str, int] | None:
    """Return the name, the value and the offset of the value of NAME=value;
    None if `line` is not an assignment.

    As in cron 3.0pl1, quotes may surround the name or the value, blanks the
    =, and a name may have any characters.
    """
    at = 0
    if line[:1] in ("'", '"'):
        end = line.find(line[0], 1)
        if end < 0 or "=" in line[1:end]:
            return None
        name, at = line[1:end], end + 1
    else:
        while at < len(line) and line[at] != "=" and line[at] not in SPACE:
            at += 1
        name = line[:at]
    rest = line[at:].lstrip(SPACE)
    if not rest.startswith("="):
        return None
    value = rest[1:].strip(SPACE)
    at = len(line) - len(rest[1:].lstrip(SPACE))
    if value[:1] in ("'", '"'):
        end = value.find(value[0], 1)
        if end != len(value) - 1 or end < 1:
            return None
        value = value[1:end]
    return name, value, at


def is_command_word(word: str, field: ScheduleField) -> bool:
    """Does `word` look like a command that begins where a column is
    missing? Not in the first column, nor like a name of a month or day."""
    return field.name != "minute" and (
        word[0] in "/~.$[('\"" or len(word) > 1 and word[0].isalpha()
        and word[:3].lower() not in field.names)


def is_odd_percent(command: str, at: int) -> bool:
    """Does the % at the offset `at` probably belong to the command?

    That is where nothing follows, or hex digits (as in a URL: %2F), in a
    command of date(1), and where quotes or brackets are open before it.
    """
    import re
    before, after = command[:at], command[at + 1:]
    open_parts = re.sub(r"\\.|'[^']*'|\"(?:\\.|[^\"\\])*\"", "", before)
    return at < len(command) and bool(
        not after or re.match(r"\d[0-9A-Fa-f]|[A-Fa-f]\d", after)
        or after[0].isalpha() and "date" in command
        or re.search("['\"]", open_parts)
        or open_parts.count("(") > open_parts.count(")")
        or open_parts.count("`") % 2)


def safe_address(text: str) -> bool:
    """Does the text have no sign that an option or a shell would obey? The
    signs are those of Debian's cron."""
    return text.isascii() and text[:1].isalnum() and all(
        each.isalnum() or each in "@!:%-.,_+=/" for each in text)


class LineRejected(Exception):
    """A line is invalid and is dropped: the diagnostics say why."""

    def __init__(self, *diagnostics: Diagnostic):
        super().__init__(diagnostics)
        self.diagnostics = diagnostics


class TabReader:
    """Reads one tab, line by line, into `tab`.

    `system`: an entry names its user, as in /etc/crontab. `root`: a line may
    begin with "-". `literal`: braces are plain text. `salt` decides what ~
    chooses. `row` and `raw` are the present line, `base` is the offset of its
    first character that is not blank; an `at` in the methods is an offset
    from there. `settings` and
    `environment` are what the lines above assigned. `lines_of` has the line
    of the identity of each job that must have one of its own.
    """

    def __init__(self, text: str, system: bool, root: bool, salt: str,
                 literal: bool = False):
        self.text, self.system, self.root = text, system, root or system
        self.literal = literal or system
        self.salt, self.row, self.raw, self.base = salt, 0, "", 0
        self.section, self.settings = "", Settings()
        self.environment: dict[str, str] = {}
        self.assignments = 0
        self.lines_of: dict[tuple, int] = {}
        self.columns: dict[int, int] = {}   # of the name after @after, by row
        self.tab = Tab([], [], {})

    def read(self) -> Tab:
        """Read all lines. As in cron, the last one needs a newline."""
        lines = self.text.split("\n")
        last = lines.pop()
        for self.row, self.raw in enumerate(lines, start=1):
            if self.row > MOST_LINES:
                self.add_diagnostic(0, "bad tab",
                                    f"more than {MOST_LINES:,} lines", "",
                                    True)
                return self.tab
            self.read_line()
        if last.strip(BLANKS) and not last.lstrip(BLANKS).startswith("#"):
            self.row, self.base = len(lines) + 1, 0
            self.add_diagnostic(len(last), "premature EOF",
                                "the last line does not end",
                                "press Enter at its end", True)
        return self.tab

    def resolve_followers(self) -> None:
        """Find the job that each @after names, and drop the lines for which
        there is not exactly one that can start."""
        named: dict[str, list] = {}
        for job in self.tab.jobs if self.columns else ():
            if job.name:
                for name in (job.name, f"{job.section}/{job.name}"):
                    named.setdefault(name, []).append(job)
        followers: dict[tuple, list] = {}
        valid = []
        for job in self.tab.jobs:
            found = named.get(job.leader, ())
            if not job.leader:
                valid.append(job)
            elif len(found) == 1:
                followers.setdefault(found[0].identity(), []).append(job)
        for job in valid:       # it grows; a cycle is never reached
            valid += [each.replace(after=job.identity())
                      for each in followers.get(job.identity(), ())]
        jobs = {job.line: job for job in valid}
        for job in self.tab.jobs:
            if job.line not in jobs:
                self.tab.diagnostics.append(self.follower_error(
                    job, named.get(job.leader, ()), named))
        self.tab.jobs[:] = sorted(valid, key=lambda job: job.line)

    def follower_error(self, job: Job, found: list,
                       named: dict) -> Diagnostic:
        """Return why a job with @after is dropped; `found` are the jobs that
        it may mean, `named` all by their names."""
        why, hint = f"{short(job.leader)} never starts by itself: the jobs " \
            "before it are invalid or form a cycle", ""
        if len(found) > 1:
            why = f"{short(job.leader)} is the name of {len(found)} jobs"
            hint = f'@after "{found[0].section}/{found[0].name}"'
        elif not found:
            why = f"there is no job {short(job.leader)} in this tab"
            meant = nearest(job.leader, named) if len(named) * len(
                self.columns) < MOST_COMPARED else ""
            hint = f"did you mean {short(meant)}?" if meant else ""
        return Diagnostic(job.line, self.columns[job.line], "bad job", why,
                          escape_controls(hint))

    def diagnostic(self, at: int, what: str, why: str, hint: str = "",
                   fatal: bool = True) -> Diagnostic:
        """Return a diagnostic of the present line."""
        return Diagnostic(self.row, self.base + at + 1, what, why, hint,
                          fatal)

    def add_diagnostic(self, at: int, what: str, why: str, hint: str = "",
                       fatal: bool = False) -> None:
        """Record a warning, or with `fatal` an error."""
        self.tab.diagnostics.append(
            self.diagnostic(at, what, why, hint, fatal))

    def reject(self, at: int, what: str, why: str, hint: str = ""):
        """Raise LineRejected."""
        raise LineRejected(self.diagnostic(at, what, why, hint))

    def read_line(self) -> None:
        """Read the present line: a comment, section, assignment or entry."""
        line = self.raw.lstrip(BLANKS)
        self.base = len(self.raw) - len(line)
        if not line or line[0] == "#":
            return
        try:
            if "\0" in line:
                self.reject(line.index("\0"), "bad line",
                            "there is a NUL in it")
            if line[0] == "\ufeff":
                self.reject(0, "bad minute", "the line begins with a byte "
                            "order mark (BOM)",
                            "save the file as UTF-8 without a BOM")
            if line[0] == "[" and line.rstrip(SPACE)[-1] == "]":
                self.section = self.valid_name(
                    line.rstrip(SPACE)[1:-1].strip(BLANKS), 1, "bad section",
                    "[Backups]")
                return
            assignment = parse_assignment(line)
            if assignment:
                self.assign(*assignment)
            elif line[0] == "[":
                self.reject(len(line.rstrip(SPACE)), "bad section",
                            "missing ]", "[Backups]")
            else:
                self.tab.jobs.append(self.entry(line))
        except LineRejected as rejected:
            self.tab.diagnostics.extend(rejected.diagnostics)

    def valid_name(self, name: str, at: int, what: str, hint: str) -> str:
        """Return `name` if a job or section may have it. Raises
        LineRejected."""
        if not name:
            self.reject(at, what, "the name is empty", hint)
        if len(name) > LONGEST_NAME:
            self.reject(at, what, f"a name has at most {LONGEST_NAME} "
                        "characters", hint)
        if has_control(name):
            self.reject(at, what, "the name has a control character", hint)
        return name

    def assign(self, name: str, value: str, at: int) -> None:
        """Carry out an assignment. Raises LineRejected."""
        self.assignments += 1
        if self.assignments > MOST_SETTINGS:
            self.reject(0, "bad variable", f"more than {MOST_SETTINGS:,} "
                        "assignments")
        if name in SETTINGS:
            self.set_setting(name, value, at)
        else:
            self.lint_assignment(name, value, at)
        self.environment = {**self.environment, name: value}

    def lint_assignment(self, name: str, value: str, at: int) -> None:
        """Warn about an assignment that probably is a mistake."""
        words, rest = value.split(), self.raw[self.base + at:]
        if name.startswith("KOI_"):
            meant = nearest(name[:30], SETTINGS)
            self.add_diagnostic(0, "unknown setting",
                                f"koi has no {escape_controls(name)}",
                                f"did you mean {meant}?" if meant else "")
        elif not name.isidentifier() or not name.isascii():
            self.add_diagnostic(0, "odd variable",
                                f"{short(name)} is no name that a "
                                "shell can read")
        elif "\t" not in value and len(words) >= 6 and all(
                word[0] in "*0123456789" for word in words[1:6]):
            self.add_diagnostic(0, "odd variable",
                                f"this sets {name}, and is no job",
                                "a job has its columns first")
        elif "$" in value:
            self.add_diagnostic(at + rest.index("$"), "odd variable",
                                "cron does not expand $ in a value")
        elif name == "TZ":
            self.add_diagnostic(0, "odd variable", "TZ is for the command, "
                                "and does not change when jobs start",
                                "CRON_TZ")
        elif " #" in value and value[0] != "#":
            self.add_diagnostic(at + rest.index(" #") + 1, "odd variable",
                                "this # begins no comment: all of the "
                                "line is the value")

    def set_setting(self, name: str, value: str, at: int) -> None:
        """Set a field of `settings`. Raises LineRejected."""
        field, parse, expected = SETTINGS[name]
        try:
            setting = parse(value)
        except ValueError as error:
            why, offset = error.args
            self.reject(at + offset, "bad setting", f"{name}: {why}", expected)
        if setting is None:
            if name == "RANDOM_DELAY":      # cronie ignores it, too
                self.add_diagnostic(at, "bad setting",
                                    f"{name} is {expected}; ignored")
                return
            self.reject(at, "bad setting", f"{name} is not {short(value)}",
                        expected)
        if name == "CRON_TZ" and value:
            self.tab.zones.setdefault(value, (self.row, self.base + at + 1))
        self.settings = self.settings.replace(**{field: setting})

    # --- an entry: [-]["Name"] schedule [user] [-n] command

    def entry(self, line: str) -> Job:
        """Return the job of an entry. Raises LineRejected."""
        at, unlogged, name = 0, False, ""
        if line[0] == "-" and self.root:
            at, unlogged = 1, True
        if line.startswith('"', at):
            name, at = self.read_name(line, at)
        when, schedule, at = self.read_when(line, at)
        user = ""
        if self.system:
            user, at = self.read_word(line, at)
            if not user or user[0] == "*":
                self.reject(at, "bad username", "a system tab names the user "
                            "before the command")
        mail_failures = line.startswith(("-n ", "-n\t"), at)
        if mail_failures:
            at = self.skip_blanks(line, at + 2)
        command = line[at:]
        self.check_command(command, at)
        script, stdin, params = self.read_arguments(command, at, when)
        job = Job(self.row, self.section, name, when, schedule, user, command,
                  script, stdin, params, self.environment, self.settings,
                  unlogged, mail_failures)
        self.check_unique(job)
        self.lint_job(job, at)
        return job

    def skip_blanks(self, line: str, at: int) -> int:
        """Return the offset of the first character from `at` on that is not
        blank."""
        return len(line) - len(line[at:].lstrip(BLANKS))

    def read_word(self, line: str, at: int) -> tuple[str, int]:
        """Return the word at `at`, and where the next one begins."""
        end = at
        while end < len(line) and line[end] not in BLANKS:
            end += 1
        return line[at:end], self.skip_blanks(line, end)

    def read_name(self, line: str, at: int) -> tuple[str, int]:
        """Return the name in quotes at `at`, and where the rest begins.
        Raises LineRejected."""
        end = line.find('"', at + 1)
        if end < 0 or line[end + 1:end + 2] not in (" ", "\t"):
            self.reject(at, "bad name", "a name ends with a quote and a blank",
                        '"Say Hi" @manual ~/tweet.sh')
        name = self.valid_name(line[at + 1:end], at + 1, "bad name",
                               '"Say Hi" @manual ~/tweet.sh')
        return name, self.skip_blanks(line, end + 1)

    def read_when(self, line: str, at: int):
        """Return the schedule as written, the Schedule or None, and where the
        rest begins. Raises LineRejected."""
        if not line.startswith("@", at):
            return self.read_fields(line, at)
        word, end = self.read_word(line, at)
        if word in ("@manual", "@reboot"):
            return word, None, end
        if word == "@after" and not self.literal:
            if not line.startswith('"', end):
                self.reject(end, "bad name", "@after is followed by the name "
                            "of a job, in quotes",
                            '"Report" @after "Nightly" ~/report.sh')
            self.columns[self.row] = self.base + end + 1
            name, end = self.read_name(line, end)
            return f'@after "{name}"', None, end
        if word not in SPECIALS:
            known = ["@manual", "@reboot", *SPECIALS]
            self.reject(at, "bad time specifier", f"unknown {short(word)}",
                        "every 5 minutes: */5 * * * *" if word == "@every"
                        else nearest(word[:20].lower(), known)
                        or " ".join(known))
        return word, Schedule.parse(word), end

    def read_fields(self, line: str, at: int):
        """Do what `read_when` does, for an entry with five fields."""
        def pick(text: str) -> int:
            return stable_random(f"{self.salt}\0{line}\0{text}")

        words, bits, errors = [], [], []
        for field in SCHEDULE_FIELDS:
            if at >= len(line):
                errors = errors or [self.diagnostic(
                    at, f"bad {field.name}", "the line ends too early",
                    "five columns, then the command")]
                break
            begin, (word, at) = at, self.read_word(line, at)
            words.append(word)
            try:
                bits.append(field.parse(word, pick))
            except ScheduleError as error:
                if not errors and is_command_word(word, field):
                    self.reject(begin, f"bad {field.name}", "a schedule has "
                                f"5 columns, {len(bits)} found", "five "
                                "columns, then the command")
                errors.append(self.diagnostic(
                    begin + error.at, f"bad {error.field}", error.why,
                    error.hint))
        if len(errors) in (len(words), 3, 4):
            errors = errors[:1]     # the line was not meant to be an entry
        if errors:
            raise LineRejected(*errors)
        text = " ".join(words)
        return text, Schedule(text, bits, [w[0] == "*" for w in words]), at

    def check_command(self, command: str, at: int) -> None:
        """Raises LineRejected for a command that no shell can run."""
        if not command.strip(SPACE):
            self.reject(at, "bad command", "there is none")
        if command[0] == "*":
            self.reject(at, "bad command", "it begins with a star",
                        "five columns, not six")
        if len(command.encode("utf-8", "surrogateescape")) > LONGEST_COMMAND:
            self.reject(at, "bad command", "it is too long: the kernel takes "
                        f"{LONGEST_COMMAND:,} bytes", "put it into a script")

    def check_unique(self, job: Job) -> None:
        """Raises LineRejected if a line above is the same job, where people
        start it and could not say which one they mean."""
        if not job.name and job.when != "@manual":
            return
        before = self.lines_of.setdefault(job.identity(), job.line)
        if before != job.line:
            self.reject(0, "bad job", f"line {before} is the same job, and "
                        "runs would be mixed up",
                        'a "Name" of its own in front')

    # --- {{arguments}}

    def read_arguments(self, command: str, at: int, when: str):
        """Return the script, the standard input and the parameters of a
        command. Raises LineRejected."""
        script, stdin, end = split_percent(command)
        if "{{" not in command or self.literal:
            return script, stdin, ()
        # A line that starts by itself must run as in cron, so only what can
        # be nothing else than a declaration is an argument there.
        lexer = Lexer(command[:end], None if when == "@manual"
                      else declared_names(command))
        self.find_in_input(lexer, command, end)
        misplaced = [self.diagnostic(
            at + each.start, "bad argument", f"it stands {each.place}",
            PLACEMENT_HINTS[each.place])
            for each in lexer.found if each.place]
        self.check_ignored_braces(lexer, command, at, when)
        if misplaced:
            raise LineRejected(*misplaced)
        params, pieces, done = {}, [], 0
        for each in lexer.found:
            param = self.parse_parameter(command[each.start + 2:each.end - 2],
                                         at + each.start, when, params)
            params.setdefault(param.name, param)
            number = list(params).index(param.name) + 1
            pieces += [split_percent(command[done:each.start])[0],
                       f'"${{KOI_ARG_{number}}}"']
            done = each.end
        pieces.append(split_percent(command[done:end])[0])
        if params:
            self.check_shell(lexer.found[0].start + at)
        if any(param.type in FREE_TYPES for param in params.values()):
            self.lint_arguments(lexer, at)
        return "".join(pieces), stdin, tuple(params.values())

    def find_in_input(self, lexer: Lexer, command: str, at: int) -> None:
        """Add the placeholders from `at` on, where the standard input begins,
        to those that the lexer found."""
        at = command.find("{{", at)
        while at >= 0:
            end = command.find("}}", at)
            if end < 0:
                break
            kind = lexer.text_kind(command[at + 2:end])
            if kind == "plain":
                lexer.ignored.append((at, kind))
            elif kind != "foreign":
                lexer.found.append(Placeholder(at, end + 2, "after %"))
                break           # one diagnostic is enough
            at = command.find("{{", end)

    def check_shell(self, at: int) -> None:
        """Raises LineRejected if SHELL is one that the lexer does not
        know."""
        shell = self.environment.get("SHELL", "").rpartition("/")[2]
        if shell in FOREIGN_SHELLS:
            self.reject(at, "bad argument",
                        f"{shell} reads a command in its own way",
                        "SHELL=/bin/sh above this line")

    def check_ignored_braces(self, lexer: Lexer, command: str, at: int,
                             when: str) -> None:
        """Warn about the first braces that look like an argument. In a
        @manual job a mistyped one raises LineRejected."""
        for where, kind in lexer.ignored:
            if when == "@manual" and kind in ("open", "braces"):
                self.reject(at + where, "bad argument",
                            "this {{ has no }}" if kind == "open" else
                            "there are braces in braces",
                            "{{name, type, default}}")
            if kind in ("plain", "braces"):
                end = command.index("}}", where)
                name = escape_controls(command[where + 2:end][:LONGEST_NAME])
                self.add_diagnostic(
                    at + where, "odd argument",
                    f"{{{{{name}}}}} is plain text, as in cron",
                    "" if kind == "braces" else f"{{{{{name.strip(BLANKS)}, "
                    "string, default}} is an argument")
                break

    def parse_parameter(self, inner: str, at: int, when: str,
                        known: dict) -> Parameter:
        """Return the parameter of {{name, type, default}}.

        `known` has those before it by name; a second one may omit all but the
        name. Raises LineRejected.
        """
        def reject(why: str, hint: str = "{{name, type, default}}"):
            self.reject(at, "bad argument", why, hint)

        parts = [part.strip(BLANKS) for part in inner.replace(
            "\\%", "%").split(",", 2)]
        name, kind = parts[0], parts[1] if len(parts) > 1 else ""
        default = parts[2] if len(parts) > 2 else None
        if not name or len(name) > LONGEST_NAME or has_control(name):
            reject("a name has 1 to 100 characters that can be printed")
        if name in known and len(parts) == 1:
            return known[name]
        kind, choices = self.parse_type(kind, at)
        param = Parameter(name, kind or "string", default, choices)
        if default is not None:
            reason = param.value_error(default)
            if reason:
                reject(f"{short(default)} is no default: {reason}", "")
        elif when != "@manual":
            reject("nobody is asked when the job is due, so it needs a "
                   "default", f"{{{{{escape_controls(name)}, "
                   f"{kind or 'string'}, default}}}}")
        if name in known and known[name] != param:
            reject(f"there are two arguments {short(name)}",
                   f"{{{{{escape_controls(name)}}}}} stands for the same "
                   "again")
        if len(known) >= MOST_PARAMS:
            reject(f"there are more than {MOST_PARAMS}", "")
        if kind == "secret" and default:
            self.add_diagnostic(at, "odd argument",
                                "a default that stands here is no secret")
        return param

    def parse_type(self, kind: str, at: int) -> tuple[str, tuple]:
        """Return the name of a parameter's type, and its choices. Raises
        LineRejected."""
        if kind.startswith("choice(") and kind.endswith(")"):
            choices = tuple(word.strip() for word in kind[7:-1].split("|"))
            if not all(choices) or len(set(choices)) < len(choices):
                self.reject(at, "bad argument",
                            "each choice is a word of its own",
                            "choice(a|b|c)")
            return "choice", choices
        if kind not in ("", "string", "int", "bool", "text", "date",
                        "secret"):
            self.reject(at, "bad argument", f"{short(kind)} is no type",
                        "string, int, bool, text, date,"
                        " secret or choice(a|b|c)")
        return kind, ()

    # --- what is valid and probably a mistake

    def lint_job(self, job: Job, at: int) -> None:
        """Warn about a job whose command is at the offset `at`."""
        if job.schedule and not job.when.startswith("@"):
            self.lint_schedule(job.schedule, self.raw[self.base:])
        if job.command.endswith("\r"):
            self.add_diagnostic(at + len(job.command) - 1, "odd command",
                                "the line ends in CR LF, and the shell gets "
                                "the CR", "dos2unix")
        if not self.system and job.command.split(None, 1)[:1] == ["root"]:
            self.add_diagnostic(at, "odd command", "the command is `root`",
                                "only /etc/crontab and cron.d have a column "
                                "for users")
        percent = split_percent(job.command)[2]
        if is_odd_percent(job.command, percent):
            self.add_diagnostic(at + percent, "odd command",
                                "the command ends here, and the rest is its "
                                "input", r"write \%")

    def lint_arguments(self, lexer: Lexer, at: int) -> None:
        """Warn if a program of the command evaluates a value."""
        where = at + lexer.found[0].start
        evaluator = find_evaluator(lexer.words) or lexer.evaluated_variable()
        if evaluator:
            self.add_diagnostic(where, "unsafe argument",
                                f"{escape_controls(evaluator)} reads the "
                                "value again, as code: whoever fills it in "
                                "can run anything")
        runner = wrapped_program(lexer.words)
        if runner:
            self.add_diagnostic(where, "unsafe argument",
                                f"{runner} runs the value: "
                                "the value is the program, and can be any")
        for each in lexer.found:
            if each.first:
                self.add_diagnostic(at + each.start, "unsafe argument",
                                    "the value is the program: whoever fills "
                                    "it in can run anything")

    def lint_schedule(self, schedule: Schedule, line: str) -> None:
        """Warn about the five fields of an entry."""
        at = 0
        if line.startswith("-") and self.root:
            at = 1
        if line.startswith('"', at):
            at = self.skip_blanks(line, line.index('"', at + 1) + 1)
        first, words = at, schedule.text.split(" ")
        for field, word in zip(SCHEDULE_FIELDS, words):
            for why, hint in suspicious_parts(field, word):
                self.add_diagnostic(at, f"odd {field.name}", why, hint)
            at = self.read_word(line, at)[1]
        hours = set_bits(schedule.hours)
        if schedule.never:
            self.add_diagnostic(first, "odd schedule", "it never runs")
        elif not schedule.both and "*" not in (words[2], words[4]):
            self.add_diagnostic(first, "odd schedule",
                                "a day needs to satisfy only one of two "
                                f"columns: {schedule.describe()}")
        elif words[0] == "*" and len(hours) == 1:
            self.add_diagnostic(first, "odd schedule",
                                "in that hour it runs every minute",
                                f"0 {' '.join(words[1:])}")


def suspicious_parts(field: ScheduleField, word: str):
    """Yield (why, hint) for each range of a field that is empty, and for
    each step that is longer than its range."""
    for element in word.split(","):
        value_range, _, step = element.partition("/")
        first, dash, last = value_range.partition("-")
        low, high = field.low, field.high
        if dash:
            low = field.parse_value(first, 0, element)
            high = field.parse_value(last, 0, element)
            if high == 0 < low and field.high == 7:
                high = 7
        if low > high:
            yield f"{short(element)} runs backwards and never comes", \
                f"{first}-{field.high},{field.low}-{last}"
        elif step and field.parse_step(step, 0, element) > high - low:
            yield f"{short(element)} is only {low}: the step is longer than " \
                "the range", str(low)


def told_apart(jobs: list[Job], place: tuple) -> list[Job]:
    """Return the jobs of a tab with different identities, and `assignments`.

    Equal lines that have no name differ by the assignments in force, and
    else by their order. `place` is the same for all of the tab.
    """
    digests: dict[int, str] = {}        # id of an environment -> digest
    variants: dict[tuple, dict] = {}    # identity -> digest -> jobs so far
    for job in jobs:
        digests[id(job.environment)] = digests.get(id(job.environment)) or \
            str(stable_random(repr(sorted(job.environment.items()))))
        variants.setdefault(job.identity(), {})[
            digests[id(job.environment)]] = 0
    found = []
    for job in jobs:
        equal, digest = variants[job.identity()], digests[id(job.environment)]
        equal[digest] += 1
        number = equal[digest]
        apart = place + ((digest,) if len(equal) > 1 else ()) + (
            (f"#{number}",) if number > 1 else ())
        found.append(job.replace(apart=apart, assignments=digest))
    return found


def parse_tab(text: str, system: bool = False, root: bool = False,
              salt: str = "", literal: bool = False, file: str = "") -> Tab:
    """Return the jobs of a tab, and its diagnostics in order of place.

    `system`: each entry names its user, and `file` is the path: system tabs
    are many, and may have equal lines. `root`: the tab is root's. `salt`
    decides what ~ chooses. `literal`: it is a crontab of cron's, in which
    braces are plain text, as in each system tab. An invalid line raises
    nothing.
    """
    reader = TabReader(text, system, root, salt, literal)
    tab = reader.read()
    reader.resolve_followers()
    tab = tab.replace(jobs=told_apart(tab.jobs, (file,) if system else ()))
    tab.diagnostics.sort(key=lambda each: (each.line, each.column))
    return tab


# ==========================================================================
# Keys: who may ask for a run?                              (nothing; R U C)
#
# A password gives three keys: `api` lets a browser read and send requests,
# `view` lets it only read, and `run` never leaves the browser or terminal in
# which the password was typed. Each host holds a host key, made from the run
# key and its host ID. A request is a text and its MAC over the exact bytes;
# the MAC is checked before the text is parsed. The page does the same in
# JavaScript, and a test compares the two.
# ==========================================================================

ROUNDS = 600_000            # of PBKDF2-HMAC-SHA256: OWASP's minimum
MOST_ROUNDS = 10_000_000    # more would keep a terminal busy for too long
SALT_BYTES = 16
MOST_AHEAD = 60_000         # ms by which the sender's clock may be fast
LONGEST_LIFE = 600_000      # ms for which a request may be valid
LONGEST_BODY = 2**19        # bytes of a request: 256 KiB, all escaped
DEEPEST_BODY = 4            # dicts and lists in one another
PASSPHRASE_CHARACTERS = "0123456789abcdefghjkmnpqrstvwxyz"  # no i, l, o, u
VIEW_PREFIX = "view-"
HEX = frozenset("0123456789abcdef")
RUN_FIELDS = {"v", "do", "key", "dash", "host", "user", "tag", "job", "args",
              "secrets", "nonce", "iat", "exp"}
KILL_FIELDS = {"v", "do", "key", "dash", "host", "user", "run", "epoch",
               "nonce", "iat", "exp"}
FIELD_TYPES = {"v": int, "iat": int, "exp": int, "run": int, "epoch": int,
               "args": dict, "secrets": dict}       # all others are str


class RequestRejected(Exception):
    """A request is not genuine, or is not carried out: why."""


def is_hex(text, length: int) -> bool:
    """Is `text` a string of `length` lower-case hexadecimal digits?"""
    return isinstance(text, str) and len(text) == length \
        and HEX.issuperset(text)


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    """Return the HMAC-SHA256 of `text`, 32 bytes (RFC 2104)."""
    import hmac
    return hmac.digest(key, text, "sha256")


def sha256_hex(text: str | bytes) -> str:
    """Return the SHA-256 of `text` in hexadecimal."""
    from hashlib import sha256
    return sha256(text.encode("utf-8", "surrogateescape") if isinstance(
        text, str) else text).hexdigest()


class Keys(FrozenRecord):
    """The keys of one password, 32 bytes each."""
    api: bytes              # reads, and sends requests
    view: bytes             # reads
    run: bytes              # signs; never leaves the machine it is made on


def derive_keys(password: str, salt: bytes, rounds: int = ROUNDS) -> Keys:
    """Return the keys of `password`, by PBKDF2 (RFC 8018).

    `salt` and `rounds` come from the dashboard. A hostile one could choose
    them so that the password is easy to guess, so those raise Error.
    """
    if len(salt) != SALT_BYTES or not ROUNDS <= rounds <= MOST_ROUNDS:
        raise Error("the dashboard asks for keys that would be weak",
                    "it is not one of ours, or somebody changed it")
    from hashlib import pbkdf2_hmac
    from unicodedata import normalize
    try:
        # Keyboards differ in how they compose an accented character.
        secret = normalize("NFC", password).encode()
    except UnicodeEncodeError:
        raise Error("the password is not UTF-8") from None
    root = pbkdf2_hmac("sha256", secret, salt, rounds)
    return Keys(*(hmac_sha256(root, f"koi-{name}-v1".encode())
                  for name in ("api", "view", "run")))


def host_key(run_key: bytes, host: str) -> bytes:
    """Return the key of the host with the ID `host`. It verifies and signs
    requests for this host alone."""
    return hmac_sha256(run_key, f"koi-host-v1\n{host}".encode())


def key_id(key: bytes) -> str:
    """Return the ID by which both sides see that they hold one host key."""
    return sha256_hex(b"koi-key-v1\n" + key)[:16]


def format_passphrase(numbers: bytes) -> str:
    """Return a passphrase of 100 bits, such as k7qm-x2dp-..., from 20 random
    bytes. Its characters are Crockford's base 32, which omits look-alikes."""
    characters = [PASSPHRASE_CHARACTERS[number % 32]
                  for number in numbers[:20]]
    return "-".join("".join(characters[at:at + 4]) for at in range(0, 20, 4))


def run_mac(key: bytes, body: str) -> str:
    """Return the MAC of a request, in hexadecimal."""
    return hmac_sha256(key, b"koi-run-v1\n" + body.encode()).hex()


def list_mac(key: bytes, body: str) -> str:
    """Return the MAC of the list of jobs that a host shows, so that no
    dashboard can show the name of one job for another."""
    return hmac_sha256(hmac_sha256(key, b"koi-list-v1"), body.encode()).hex()


def encrypt_secret(key: bytes, nonce: str, name: str, value: bytes) -> bytes:
    """Return a secret argument encrypted for its host, or decrypted.

    It is XORed with a key stream that depends on the request's `nonce` and on
    the argument's `name`, so no stream is used twice.
    """
    secret, stream = hmac_sha256(key, b"koi-secret-v1"), b""
    while len(stream) < len(value):
        stream += hmac_sha256(
            secret, f"{nonce}\n{name}\n{len(stream) // 32}".encode())
    return bytes(a ^ b for a, b in zip(value, stream))


def is_valid_mac(mac: str, expected: str) -> bool:
    """Are two MACs equal? The time that this takes does not say how equal."""
    import hmac
    return is_hex(mac, 64) and hmac.compare_digest(mac, expected)


def verify_request(key: bytes, body, mac) -> dict:
    """Return the fields of a request signed with `key`, a host key.

    Raises RequestRejected.
    """
    if not isinstance(body, str) or not isinstance(mac, str):
        raise RequestRejected("it is no signed request")
    if len(body) > LONGEST_BODY:
        raise RequestRejected(f"it is longer than {LONGEST_BODY:,} bytes")
    try:
        body.encode()
    except UnicodeEncodeError:
        raise RequestRejected("it is not UTF-8") from None
    if not is_valid_mac(mac, run_mac(key, body)):
        raise RequestRejected("its signature is wrong: it was forged or "
                              "altered, or the host has other keys")
    request = parse_strict_json(body)
    kind = request.get("do")
    fields = {"run": RUN_FIELDS, "kill": KILL_FIELDS}.get(
        kind if isinstance(kind, str) else "")
    if request.get("v") != 1 or not fields:
        raise RequestRejected("it is of another version: reload the page, or "
                              "bring koi up to date here")
    if set(request) != fields or any(
            type(request[name]) is not FIELD_TYPES.get(name, str)
            for name in fields) or not is_hex(request["nonce"], 32):
        raise RequestRejected("it has not the fields of a request")
    for values in (request.get("args", {}), request.get("secrets", {})):
        if any(type(value) is not str for value in values.values()):
            raise RequestRejected("an argument is no text")
    return request


def parse_strict_json(body: str) -> dict:
    """Return a JSON object of which all parsers have one reading: no key
    twice, no fractions, no number over 18 digits. Raises RequestRejected."""
    import json

    def unique_keys(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    def short_integer(text: str) -> int:
        if len(text) > 18 or text == "-0":
            raise ValueError
        return int(text)

    def reject(_text: str):
        raise ValueError

    try:
        request = json.loads(body, object_pairs_hook=unique_keys,
                             parse_int=short_integer, parse_float=reject,
                             parse_constant=reject)
        json.dumps(request, ensure_ascii=False).encode()    # no surrogates
        if not isinstance(request, dict) \
                or json_depth(request) > DEEPEST_BODY:
            raise ValueError
    except (ValueError, RecursionError):
        raise RequestRejected("it is not the JSON of a request") from None
    return request


def json_depth(value) -> int:
    """Return how many dicts and lists contain one another; 0 for a text."""
    if not isinstance(value, (dict, list)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(json_depth, inner), default=0)


def request_mismatch(request: dict, ours: dict, now: float,
                     since: float) -> str:
    """Return why a genuine request is not for this host or not valid now; ""
    if it is.

    `ours` has the host's key, dash and host. `now` and `since` are seconds
    since 1970; nonces used before `since` are not known any more.
    """
    for name, what in (("key", "other keys"), ("dash", "another dashboard"),
                       ("host", "another host")):
        if request[name] != ours[name]:
            return f"it is for {what}"
    now_ms = int(now * 1000)
    if request["iat"] > now_ms + MOST_AHEAD:
        return f"it comes from the future: the clock of who asks is " \
            f"{(request['iat'] - now_ms) // 1000} s ahead of the host's"
    if not 0 < request["exp"] - request["iat"] <= LONGEST_LIFE:
        return "it would be good for too long"
    if request["exp"] <= now_ms:
        return f"it has expired, {(now_ms - request['exp']) // 1000} s ago " \
            "by the host's clock"
    if request["iat"] < int(since * 1000):
        return "it is older than what this host remembers"
    return ""


class Enrollment(FrozenRecord):
    """How this host is enrolled at its dashboard: the file `keys`."""
    url: str
    dash: str               # ID of the dashboard
    host: str               # ID of this host there
    token: str              # by which the dashboard recognizes the host
    key: str                # the host key, in hexadecimal
    name: str               # of the host, as the dashboard shows it
    ca: str = ""            # certificates to trust instead of the system's
    since: float = 0.0      # seconds since 1970

    @property
    def secret(self) -> bytes:
        """The bytes of the host key."""
        return bytes.fromhex(self.key)

    def to_json(self) -> str:
        """Return the text of the file `keys`."""
        import json
        return json.dumps({"v": 1, **vars(self)}, indent=1) + "\n"


def parse_enrollment(text: str) -> Enrollment:
    """Return the enrollment in the text of a file `keys`. Raises
    ValueError."""
    import json
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is damaged") from None
    if not isinstance(found, dict) or found.pop("v", 0) != 1:
        raise ValueError("it is of another version")
    try:
        enrollment = Enrollment(**found)
    except (TypeError, AttributeError):
        raise ValueError("something is missing in it") from None
    texts = (enrollment.url, enrollment.name, enrollment.ca)
    if not (is_hex(enrollment.dash, 16) and is_hex(enrollment.host, 32)
            and is_hex(enrollment.token, 64) and is_hex(enrollment.key, 64)
            and isinstance(enrollment.since, (int, float))
            and all(isinstance(each, str) for each in texts)):
        raise ValueError("something is missing in it")
    return enrollment


def job_manifest(job: Job, user: str, file: str, key: bytes) -> str:
    """Return a job as JSON, as the people see it who may run it.

    A request carries the SHA-256 of this text, so koid runs the job that
    people saw, or nothing. The assignments in force may be secret: they
    have a MAC by `key`, the host key, which the dashboard does not have.
    """
    import json
    assignments = json.dumps(sorted(job.environment.items())).encode()
    return json.dumps({
        "user": user, "file": file, "tag": job.tag, "section": job.section,
        "name": job.name, "label": job.label, "when": job.when,
        "words": job.describe(), "command": job.command, "input": job.stdin,
        "assignments": hmac_sha256(hmac_sha256(
            key, b"koi-assignments-v1"), assignments).hex(),
        "params": [{"name": param.name, "type": param.type,
                    "default": param.default, "choices": list(param.choices)}
                   for param in job.params],
        "confirm": job.settings.confirm}, ensure_ascii=False).encode(
            "utf-8", "backslashreplace").decode()


# ==========================================================================
# RunFile: what does the file of a run hold?                (nothing; R U C)
#
# The supervisor of a run writes one file: a header of fixed size, then the
# output as frames. The first 512 KiB are kept for good. Of what follows, the
# last 256 to 512 KiB are kept in two segments that are overwritten in turn,
# so 1 GB of output takes 1 MiB. koid moves them into history.db and removes
# the file. A supervisor may be older than koid: MAGIC names the version.
# ==========================================================================

FRAME = Struct("<BII")      # stream, milliseconds since the start, length
NOTE, STDOUT, STDERR, END = range(4)                    # streams
MAGIC = b"KOI1"
HEADER = Struct("<4sBBHIIQQddiQQIIIB")
HEADER_BYTES = 256          # more than HEADER.size, for later versions
KEPT_HEAD = 512 * 1024
KEPT_SEGMENT = 256 * 1024
SEGMENTS = (HEADER_BYTES, HEADER_BYTES + KEPT_HEAD,
            HEADER_BYTES + KEPT_HEAD + KEPT_SEGMENT)    # where each begins
CLAIMED, RUNNING, ENDED, UNSTARTABLE = range(4)         # phases
REASONS = ("", "timeout")
NO_STATUS, NO_FILE = -1, -2     # instead of a wait status
NO_FILE_REASON = "its output cannot be kept"
MASK = b"******"


class RunFileHeader:
    """The header of a run's file. The supervisor that owns it changes it.

    `job` and `supervisor` are process IDs; `job_start` and `supervisor_start`
    are what `process_start_time` returns. `started` and `ended` are seconds
    since 1970, `status` is a wait status, `total` counts the bytes of output
    and `lost` those that were overwritten. `head`, `first` and `second` are
    the lengths of the three parts, `segment` (0, 1 or 2) is the part that is
    being written.
    """

    FIELDS = ("phase", "reason", "errno", "supervisor", "job", "job_start",
              "supervisor_start", "started", "ended", "status", "total",
              "lost", "head", "first", "second", "segment")

    def __init__(self, *values):
        for name, value in zip(self.FIELDS, values or (0,) * 16):
            setattr(self, name, value)

    def pack(self) -> bytes:
        """Return the header's bytes, HEADER.size of them."""
        return HEADER.pack(MAGIC, *(getattr(self, name)
                                    for name in self.FIELDS))

    def lengths(self) -> tuple[int, int, int]:
        """Return the bytes used of each part in SEGMENTS."""
        return self.head, self.first, self.second

    def split(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Return the kept head, the older and the newer segment of `data`,
        a run's file."""
        head, first, second = (
            data[begin:begin + length] for begin, length
            in zip(SEGMENTS, self.lengths()))
        if self.segment == 1:   # it is overwritten, so the second is older
            return head, second, first
        return head, first, second


def parse_header(data: bytes) -> RunFileHeader | None:
    """Return the header of a run's file; None if it is not one, or one of
    another version."""
    if len(data) < HEADER.size or data[:4] != MAGIC:
        return None
    return RunFileHeader(*HEADER.unpack_from(data)[1:])


def frame(stream: int, milliseconds: int, data: bytes) -> bytes:
    """Return a frame with `data`, written `milliseconds` after the start."""
    return FRAME.pack(stream, min(milliseconds, 2**32 - 1), len(data)) + data


def lost_note(count: int) -> bytes:
    """Return the frame that stands for `count` bytes of lost output."""
    return frame(NOTE, 0, f"{plural(count, 'byte')} left out here".encode())


def read_frames(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return (stream, milliseconds since the start, data) of each frame."""
    found, at = [], 0
    while at + FRAME.size <= len(data):
        stream, milliseconds, length = FRAME.unpack_from(data, at)
        at += FRAME.size
        found.append((stream, milliseconds, data[at:at + length]))
        at += length
    return found


def stored_frames(data: bytes, header: RunFileHeader) -> bytes:
    """Return the frames in `data`, a run's file, in order of time, with a
    note where output was lost."""
    head, older, newer = header.split(data)
    return head + (lost_note(header.lost) if header.lost else b"") \
        + older + newer


def frames_since(data: bytes, header: RunFileHeader, position: int
                 ) -> tuple[bytes, int]:
    """Return the frames that a run wrote after its first `position` bytes of
    output, and the position after them.

    A note stands for what was overwritten before it could be read.
    """
    head, older, newer = header.split(data)
    found, at = bytearray(), 0
    for part, lost in ((head, 0), (older + newer, header.lost)):
        at += lost
        if lost and position < at:
            found += lost_note(at - position)
        for stream, milliseconds, body in read_frames(part):
            if at + len(body) > position:
                found += frame(stream, milliseconds,
                               body[max(position - at, 0):])
            at += len(body)
        position = max(position, at)
    return bytes(found), position


def output_text(frames: bytes) -> bytes:
    """Return the output of a job, both streams, as cron would mail it."""
    return b"".join(data if stream != NOTE else b"[koi: " + data + b"]\n"
                    for stream, _, data in read_frames(frames)
                    if stream != END)


class SecretMasker:
    """Replaces secrets in output by ******, even if a secret is split over
    several reads.

    `held` keeps the end of each stream that may be the beginning of a secret.
    """

    def __init__(self, hidden: list[bytes]):
        import re
        self.hidden = sorted(set(hidden) - {b""}, key=len, reverse=True)
        self.pattern = b"|".join(map(re.escape, self.hidden))
        self.held = {STDOUT: b"", STDERR: b""}

    def feed(self, stream: int, data: bytes, last: bool = False) -> bytes:
        """Return what may be shown after `data` was read from `stream`.

        With `last`, nothing is held back for the next call.
        """
        data = self.held[stream] + data
        cut = len(data) if last else self.safe_length(data)
        self.held[stream], data = data[cut:], data[:cut]
        import re
        return re.sub(self.pattern, MASK, data) if self.pattern else data

    def safe_length(self, data: bytes) -> int:
        """Return the length up to which no secret in `data` is incomplete."""
        cut = len(data) - max((size for secret in self.hidden
                               for size in range(1, len(secret))
                               if data.endswith(secret[:size])), default=0)
        before = -1
        while cut != before:        # the cut may be within another secret
            before = cut
            for secret in self.hidden:
                at = data.find(secret, max(0, cut - len(secret) + 1))
                if 0 <= at < cut < at + len(secret):
                    cut = at
        return cut


def exit_and_signal(status: int) -> tuple[int | None, int | None]:
    """Return the exit status and the signal of a wait status; one of them is
    None, or both if there is no status."""
    if status < 0:
        return None, None
    number = status & 0x7F
    return (None, number) if number else (status >> 8 & 0xFF, None)


def is_failure(run: dict) -> bool:
    """Did a run of the history fail?"""
    return run["state"] in ("interrupted", "unstartable", "missed") or (
        run["state"] == "done" and run["exit"] != 0)


# ==========================================================================
# Plan: what is due now?                                        (nothing; R)
#
# cron looks at the clock each minute; koid sleeps until a start is due. Both
# must make the same starts. So `plan` first replays the minutes of koid's
# sleep as cron would have seen them, by the ticks of a clock that nobody can
# set, and then applies the rules of the section Time to the local time now.
# ==========================================================================

MOST_COUNTED = 10_000   # missed starts of one job that are counted


class ClockSample(FrozenRecord):
    """Both clocks, read at the same time."""
    instant: float          # seconds since 1970, as the machine has it
    ticks: float            # seconds of a clock that nobody can set


class ZoneClock(FrozenRecord):
    """The virtual clock of one zone (see the section Time)."""
    zone: Zone
    virtual: int            # the last local minute whose jobs were started
    checked: int            # the last local minute that was compared with it


class SchedulerState(FrozenRecord):
    """How far the plan has been carried out, for all zones."""
    sample: ClockSample     # of the last call of `plan`
    zone_clocks: dict       # CRON_TZ -> ZoneClock; "" is the machine's zone
    skipped: list = []      # what `skipped_starts` returned in that call


class Launch(FrozenRecord):
    """A start of a job that is due."""
    job: Job
    minute: int             # the local minute that the start is for
    due: int                # the instant at which it became due


def local_minute(zone: Zone, instant: float) -> int:
    """Return the local minute of `zone` at `instant`."""
    instant = int(instant // 1)
    return (instant + zone.offset(instant)) // MINUTE * MINUTE


def state_for_zones(now: ClockSample, zones: dict,
                    before: SchedulerState | None = None) -> SchedulerState:
    """Return the state for `zones`, a dict from CRON_TZ to Zone.

    Zones that are in `before` keep their clocks. The jobs of a new zone start
    from the next minute on, as those of cron do after its start.
    """
    zone_clocks = {}
    for name, zone in zones.items():
        if before and name in before.zone_clocks:
            zone_clocks[name] = before.zone_clocks[name]
        else:
            minute = local_minute(zone, now.instant)
            zone_clocks[name] = ZoneClock(zone, minute, minute)
    return SchedulerState(before.sample if before else now, zone_clocks)


def next_due(job: Job, state: SchedulerState) -> int | None:
    """Return the instant of the job's first start after the last sample, if
    nobody sets the clock; None if it has none."""
    if not job.schedule:
        return None
    zone_clock = state.zone_clocks[job.settings.zone]
    zone, instant = zone_clock.zone, int(state.sample.instant // 1)
    is_caught_up = zone_clock.virtual == zone_clock.checked \
        >= zone.caught_up_from[zone.period_at(instant)]
    if is_caught_up:
        return job.schedule.next(instant, zone)
    return next(job.schedule.iter_starts(instant, zone, zone_clock.virtual),
                None)


def first_due(jobs: list[Job], state: SchedulerState) -> int | None:
    """Return the instant of the first start of all jobs, or None."""
    return min((due for due in (next_due(job, state) for job in jobs)
                if due is not None), default=None)


def advance(zone_clock: ZoneClock, after: int, until: int) -> ZoneClock:
    """Return the clock after the minutes between two instants, in which no
    start was due."""
    virtual, checked = zone_clock.virtual, zone_clock.checked
    for first, end, offset in zone_clock.zone.periods_after(after):
        last = min(end - 1, until + offset) // MINUTE * MINUTE
        if last >= first:
            virtual = advance_virtual_minute(virtual, first, last)
            checked = last
        if end > until + offset:
            return zone_clock.replace(virtual=virtual, checked=checked)
    return zone_clock


def plan(jobs: list[Job], state: SchedulerState, now: ClockSample,
         due: int | None = 0) -> tuple[SchedulerState, list[Launch]]:
    """Return the new state, and the launches that became due since the last
    sample, in order. Each start is returned once, whenever this is called.

    Up to the first start, time passed as expected: koid slept. From there to
    `now` something delayed koid, and would have delayed cron as well. `due`
    is the result of `first_due` if the caller knows it, otherwise 0.
    """
    after = int(state.sample.instant // 1)
    expected = state.sample.instant + now.ticks - state.sample.ticks
    if abs(now.instant - expected) > 1 and expected % MINUTE >= 1:
        # The clock was set during a minute. cron sleeps until that minute
        # would have ended, and only then reads the clock.
        now = ClockSample(expected, now.ticks)
    unset = int(expected // 1)      # the instant, had nobody set the clock
    if unset // MINUTE == after // MINUTE:
        # cron would still sleep. `skipped` was reported by the last call.
        return state.replace(skipped=[]) if state.skipped else state, []
    due = first_due(jobs, state) if due == 0 else due
    until = unset if due is None else min(unset, due - 1)
    if now.instant // MINUTE != unset // MINUTE:
        until = min(until, unset // MINUTE * MINUTE - 1)
    zone_clocks, launches, skipped = {}, [], []
    for name, zone_clock in state.zone_clocks.items():
        in_zone = [job for job in jobs
                   if job.schedule and job.settings.zone == name]
        zone_clock = advance(zone_clock, after, until)
        zone_clocks[name], due_now, lost = check_zone(in_zone, zone_clock,
                                                      now.instant)
        launches += due_now
        skipped += lost
    # Of the jobs that are due in one minute, cron starts the last line first.
    launches.sort(key=lambda launch: (launch.due, launch.minute,
                                      -launch.job.line))
    return SchedulerState(now, zone_clocks, skipped), launches


def check_zone(jobs: list[Job], zone_clock: ZoneClock, instant: float
               ) -> tuple[ZoneClock, list[Launch], list[tuple]]:
    """Compare one zone's local time at `instant` with its virtual clock.

    Return the new clock, the launches, and the skipped starts.
    """
    minute = local_minute(zone_clock.zone, instant)
    if minute == zone_clock.checked:
        return zone_clock, [], []
    due = minute - zone_clock.zone.offset(int(instant // 1))
    virtual = advance_virtual_minute(zone_clock.virtual, minute, minute)
    return (zone_clock.replace(virtual=virtual, checked=minute),
            due_at_minute(jobs, zone_clock, minute, due),
            skipped_starts(jobs, zone_clock, minute))


def skipped_starts(jobs: list[Job], zone_clock: ZoneClock,
                   minute: int) -> list[tuple]:
    """Return what nobody will start because the clock jumped by hours to the
    local minute `minute`: (job, number of starts, instant of the first)."""
    if minute - zone_clock.virtual <= LONGEST_JUMP:
        return []
    found = []
    for job in jobs:
        count, first = 0, 0
        for start in job.schedule.minutes_between(
                zone_clock.virtual + MINUTE, minute):
            count, first = count + 1, first or start
            if count == MOST_COUNTED:
                break
        if count:
            found.append((job, count, zone_clock.zone.instant(first)))
    return found


def due_at_minute(jobs: list[Job], zone_clock: ZoneClock, minute: int,
                  due: int) -> list[Launch]:
    """Return the launches at the local minute `minute`, which begins at the
    instant `due`."""
    launches = []
    for job in jobs:
        first = first_minute_after_jump(zone_clock.virtual, minute,
                                        job.schedule.wildcard)
        launches += [Launch(job, start, due) for start
                     in job.schedule.minutes_between(first, minute + MINUTE)]
    return launches


# ==========================================================================
# Machine: what may koi do to this computer?       (files, processes; R U C)
#
# One short method for each access to the computer: files, accounts, the time
# zone, signals and timers. Nothing is decided here. What a text means is in
# the sections above, what to do about it in those below.
# ==========================================================================

CHUNK = 65_536              # bytes to read or send at once
LONGEST_TAB = 2**20         # bytes
LONGEST_ZONE_FILE = 2**16   # bytes
ZONE_DIRECTORIES = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo",
                    "/usr/share/lib/zoneinfo", "/etc/zoneinfo")
LOCAL_ZONE = "/etc/localtime"
ROOT_HOME, ROOT_SOCKET = "/var/lib/koi", "/run/koi/koid.sock"
UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/local/lib/systemd/system",
                    "/lib/systemd/system")
SYSTEM_TAB, SYSTEM_TAB_DIRECTORY = "/etc/crontab", "/etc/cron.d"
SPOOLS = ("/var/spool/cron/crontabs", "/var/spool/cron")   # Debian, cronie
CRON_PID = "/run/crond.pid"     # of Debian's cron and of cronie
REBOOT_MARKERS = ("/run/crond.reboot", "/run/cron.reboot")
# Who may have a tab: the first of these files that is there decides.
ACCESS_FILES = (("/etc/koi.allow", True), ("/etc/koi.deny", False),
                ("/etc/cron.allow", True), ("/etc/cron.deny", False))
SENDMAILS = ("/usr/sbin/sendmail", "/usr/lib/sendmail")
DEFAULT_PATH = "/usr/bin:/bin"  # Debian's; cronie adds the sbin directories
DEFAULT_SHELL = "/bin/sh"
CRON_ENVIRONMENT = {"SHELL": DEFAULT_SHELL, "PATH": DEFAULT_PATH}
SHADOW = "/etc/shadow"
HOST_SETTINGS = ("/etc/environment", "/etc/default/locale")
PACKAGE_NAME_CHARACTERS = frozenset(    # cron reads no others in cron.d
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


class Account(FrozenRecord):
    """The user that a job runs as, from the system's user database."""
    name: str
    uid: int
    gid: int
    home: str
    groups: list


class TabFile(FrozenRecord):
    """A crontab file of this host, and its content."""
    path: str
    user: str               # "": each entry names its user
    version: tuple          # differs after the file has changed
    text: str | None        # None: it is not used
    problem: str = ""       # why

    @property
    def system(self) -> bool:
        """Does each entry name its user?"""
        return not self.user


EXACTLY_0600 = 0o177    # not only a mask: as in Debian's cron, no other mode


def file_error(status, owners: tuple, mask: int, links: bool) -> str:
    """Return why root must not use a file; "" if it may.

    `status` is of os.fstat, `owners` are the allowed uids, `mask` has the
    forbidden bits of the mode. If `links`, a second hard link is forbidden:
    a user could have made it, to a file of another user.
    """
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if status.st_uid not in owners:
        return f"its owner is uid {status.st_uid}"
    exact = mask == EXACTLY_0600
    if status.st_mode & mask or exact and stat.S_IMODE(
            status.st_mode) != 0o600:
        what = "its mode is not 0600: chmod 600" if exact \
            else "others may change it: chmod go-w"
        return f"{what} (mode {stat.S_IMODE(status.st_mode):04o})"
    if links and status.st_nlink != 1:
        return "it has another name (a hard link)"
    return "" if status.st_size <= LONGEST_TAB else \
        f"it is larger than {LONGEST_TAB:,} bytes"


def tab_text_error(text: str) -> str:
    """Return why `text` cannot be a crontab; "" if it can."""
    try:
        size = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if size > LONGEST_TAB:
        return f"it is larger than {LONGEST_TAB:,} bytes"
    return "there is a NUL in it" if "\0" in text else ""


class Machine:
    """The computer that koi runs on. A test passes another `clock`."""

    def __init__(self, clock: Clock | None = None):
        self.clock = clock or Clock()

    # --- texts and zones

    def tab_text(self, path: str) -> str:
        """Return the text of the file at `path`; "-" is standard input.

        Bytes that are not UTF-8 become lone surrogates. Raises Error.
        """
        try:
            with open(0 if path == "-" else path, "rb",
                      closefd=path != "-") as file:
                data = file.read(LONGEST_TAB + 1)
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        if len(data) > LONGEST_TAB:
            raise Error(f"{path}: larger than {LONGEST_TAB:,} bytes, and no "
                        "crontab")
        return data.decode("utf-8", "surrogateescape")

    def zone(self, name: str) -> Zone:
        """Return the zone of a name such as Europe/Berlin, or of a POSIX TZ
        value such as CET-1CEST,M3.5.0,M10.5.0/3. Raises Error."""
        parts = name.split("/")
        if name and not {"", ".", ".."}.intersection(parts) \
                and "\0" not in name:
            for directory in ZONE_DIRECTORIES:
                zone = self.zone_file(posixpath.join(directory, name), name)
                if zone:
                    return zone
        zone = parse_posix_tz(name) if name.isascii() else None
        if not zone:
            raise Error(f"there is no time zone {short(name)}",
                        "Europe/Berlin; ls /usr/share/zoneinfo"
                        if os.path.isdir(ZONE_DIRECTORIES[0])
                        else "apt-get install tzdata")
        return zone

    def zone_file(self, path: str, name: str) -> Zone | None:
        """Return the zone in a TZif file; None if it cannot be read."""
        try:
            with open(path, "rb") as file:
                return parse_tzif(name, file.read(LONGEST_ZONE_FILE))
        except (OSError, ValueError):
            return None

    def local_zone(self) -> Zone:
        """Return the caller's zone: TZ as the C library reads it, or the
        machine's. Raises Error."""
        name = os.environ.get("TZ")
        if name is None:
            return self.zone_file(LOCAL_ZONE, "local time") or UTC
        name = name.removeprefix(":")
        if name.startswith("/"):
            return self.zone_file(name, name) or self.zone("")
        return self.zone(name) if name else UTC

    def host(self) -> str:
        """Return the name of this machine, without its domain."""
        return os.uname().nodename.partition(".")[0]

    def salt(self, user: str = "") -> str:
        """Return the text that decides what ~ chooses in a user's tab: the
        same on each call, but another on each host."""
        return f"{self.host()}:{user or self.user_name(os.geteuid())}"

    def open_files(self) -> int:
        """Return how many files this process may have open."""
        import resource
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def file_version(self, path: str) -> tuple:
        """Return a value that differs after the file at `path` has changed;
        () if there is none."""
        try:
            status = os.stat(path)
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size

    # --- users

    def login_name(self) -> str:
        """Return the login name of the caller. Raises Error."""
        uid = os.getuid()
        name = self.user_name(uid)
        if not name:
            raise Error(f"uid {uid} has no name on this host")
        return name

    def user_name(self, uid: int) -> str:
        """Return the login name of `uid`; "" if it has none."""
        import pwd
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return ""

    def account(self, name: str) -> Account | None:
        """Return the account that jobs of user `name` run as; None if there
        is no such user.

        A uid of -1, in 16 or 32 bits, is refused: setresuid(2) would change
        nothing. Without root, a job gets the group of this process.
        """
        import pwd
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            return None
        if not 0 <= entry.pw_uid < 2**32 - 1 or entry.pw_uid == 65535:
            return None
        if os.geteuid():
            return Account(name, entry.pw_uid, os.getegid(), entry.pw_dir, [])
        return Account(name, entry.pw_uid, entry.pw_gid, entry.pw_dir,
                       os.getgrouplist(name, entry.pw_gid))

    def is_expired(self, user: str) -> bool:
        """Has the account of a user expired, by field 8 of shadow(5)? As in
        pam_unix, on that day already. Only root can know."""
        try:
            with open(SHADOW, encoding="utf-8", errors="replace") as file:
                for line in file:
                    fields = line.split(":")
                    if fields[0] == user and len(fields) > 7:
                        return fields[7].isdecimal() and (
                            self.clock.now() // DAY >= int(fields[7]))
        except OSError:
            pass
        return False

    def access_error(self, user: str) -> str:
        """Return the path of the access file that excludes `user`, or an
        error; "" if the user may have a tab, as in crontab(1).

        If the file cannot be read, nobody but root may.
        """
        if user == "root":
            return ""
        for path, wanted in ACCESS_FILES:
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    names = file.read().splitlines()
            except FileNotFoundError:
                continue
            except OSError as error:
                return f"{path}: {error.strerror}"
            return "" if (user in names) == wanted else path
        return ""

    def host_environment(self) -> dict:
        """Return the variables of all jobs: cron's, and for root those that
        the host sets for logins. Debian's cron gets them from pam_env.
        """
        found = {}
        for path in HOST_SETTINGS if os.geteuid() == 0 else ():
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    lines = file.read(CHUNK).splitlines()
            except OSError:
                continue
            for line in lines:
                name, equals, value = line.strip().removeprefix(
                    "export ").partition("=")
                if equals and name.isidentifier() and "\0" not in value:
                    found[name] = value.strip("\"'")
        return {**found, **CRON_ENVIRONMENT}

    # --- the state directory of koi: the parameter `home` below

    def state_directory(self) -> str:
        """Return the directory in which the caller's koid keeps its state:
        KOI_HOME, root's, or one by the XDG Base Directory Specification."""
        home = os.environ.get("KOI_HOME")
        if home:
            return os.path.abspath(home)
        if os.geteuid() == 0:
            return ROOT_HOME
        state = os.environ.get("XDG_STATE_HOME", "")
        if not state.startswith("/"):
            state = os.path.expanduser("~/.local/state")
        return posixpath.join(state, "koi")

    def socket_path(self, home: str) -> str:
        """Return the path of the socket on which koid listens."""
        if home == ROOT_HOME:
            return ROOT_SOCKET
        return posixpath.join(home, "koid.sock")

    def make_home(self, home: str) -> None:
        """Create the state directory, or check that no other user can access
        it. Raises Error."""
        try:
            os.makedirs(posixpath.dirname(home), 0o755, exist_ok=True)
            for directory in (home, f"{home}/tabs", f"{home}/runs"):
                try:
                    os.mkdir(directory, 0o700)
                except FileExistsError:
                    pass
                status = os.lstat(directory)
                if not stat.S_ISDIR(status.st_mode):
                    raise Error(f"{directory} is no folder")
                if status.st_uid != os.geteuid():
                    raise Error(f"{directory} belongs to another user")
                if status.st_mode & 0o077:
                    raise Error(f"{directory} is open to others",
                                f"chmod 700 {directory}")
        except OSError as error:
            raise Error(f"{error.filename or home}: {error.strerror}",
                        "KOI_HOME=DIRECTORY is another place for koi's files"
                        ) from None

    def write_tab(self, home: str, user: str, text: str) -> None:
        """Install the tab of `user` completely or not at all. Raises
        Error."""
        self.make_home(home)
        try:
            write_atomically(f"{home}/tabs/{user}",
                             text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise Error(f"the tab of {user} cannot be written: "
                        f"{error.strerror}") from None

    def remove_tab(self, home: str, user: str) -> bool:
        """Remove the tab of `user`. Return False if there is none. Raises
        Error."""
        try:
            os.unlink(f"{home}/tabs/{user}")
            sync_directory(f"{home}/tabs")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Error(f"the tab of {user} cannot be removed: "
                        f"{error.strerror}") from None
        return True

    def user_tab(self, home: str, user: str) -> TabFile | None:
        """Return the tab of `user` in koi's format; None if there is none."""
        path = f"{home}/tabs/{user}"
        return self.tab_file(path, user, (os.geteuid(),), 0o022, None)

    def tab_files(self, home: str, system: bool, known: dict) -> list:
        """Return the TabFile of each tab that koid serves; if `system`, also
        of the crontabs of the host's cron.

        Files that have not changed since they were read (`known`: path ->
        TabFile) are not read again.
        """
        found = []

        def add(path: str, user: str, owners: tuple, mask: int, **how):
            file = self.tab_file(path, user, owners, mask,
                                 known.get(path), **how)
            if file:
                found.append(file)

        for name in tab_names(f"{home}/tabs"):
            add(f"{home}/tabs/{name}", name, (os.geteuid(),), 0o022)
        if system:
            add(SYSTEM_TAB, "", (0,), 0o022, links=False, follow=True)
            for name in tab_names(SYSTEM_TAB_DIRECTORY):
                if PACKAGE_NAME_CHARACTERS.issuperset(name):
                    add(f"{SYSTEM_TAB_DIRECTORY}/{name}", "", (0,), 0o022,
                         links=False, follow=True)
            spool = self.spool()
            for name in tab_names(spool):
                account = self.account(name)
                add(f"{spool}/{name}", name,
                     (0, account.uid) if account else (0,), EXACTLY_0600)
        return found

    def read_enrollment(self, home: str) -> Enrollment | None:
        """Return the enrollment of this host; None if it is not a member of
        a dashboard. Raises Error."""
        path = f"{home}/keys"
        file = self.tab_file(path, "", (os.geteuid(),), EXACTLY_0600, None)
        if not file:
            return None
        if file.text is None:
            raise Error(f"{path}: not used: {file.problem}", f"chmod 600 "
                        f"{path}" if "mode" in file.problem else
                        "koitab -d join")
        try:
            return parse_enrollment(file.text)
        except ValueError as error:
            raise Error(f"{path}: not used: {error}",
                        "koitab -d off; koitab -d join") from None

    def write_enrollment(self, home: str, enrollment: Enrollment) -> None:
        """Write the file `keys`. Raises Error."""
        self.make_home(home)
        try:
            write_atomically(f"{home}/keys", enrollment.to_json().encode())
        except OSError as error:
            raise Error(f"{home}/keys: {error.strerror}") from None

    def remove_enrollment(self, home: str) -> None:
        """Remove the file `keys`, if there is one. Raises Error."""
        try:
            os.unlink(f"{home}/keys")
            sync_directory(home)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Error(f"{home}/keys: {error.strerror}") from None

    def zone_name(self) -> str:
        """Return the name of the machine's zone, such as Europe/Berlin; "" if
        /etc/localtime is not a link that shows it."""
        name = os.environ.get("TZ")
        if name is None:
            try:
                name = os.readlink(LOCAL_ZONE)
            except OSError:
                return ""
        return name.removeprefix(":").partition("zoneinfo/")[2] or (
            name.removeprefix(":"))

    def spool(self) -> str:
        """Return the directory of the users' crontabs of the host's cron."""
        return next((spool for spool in SPOOLS if os.path.isdir(spool)),
                    SPOOLS[0])

    def tab_file(self, path: str, user: str, owners: tuple, mask: int,
                 known: TabFile | None, links: bool = True,
                 follow: bool = False) -> TabFile | None:
        """Return the tab at `path`, with its text if `file_error` permits.

        None means that there is no such file. `known` is returned if the
        file has not changed since. `follow`: the path may be a symbolic
        link.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                         | (0 if follow else os.O_NOFOLLOW))
        except FileNotFoundError:
            return None
        except OSError as error:
            return TabFile(path, user, (error.errno,), None, "it is a link"
                           if error.errno == errno.ELOOP else error.strerror)
        try:
            status = os.fstat(fd)
            version = (status.st_mtime_ns, status.st_ctime_ns, status.st_size,
                       status.st_ino, status.st_dev, owners)
            if known and known.version == version and not known.problem:
                return known
            why = file_error(status, owners, mask, links)
            if why:
                return TabFile(path, user, version, None, why)
            with open(fd, "rb", closefd=False) as file:
                data = file.read(LONGEST_TAB + 1)
        except OSError as error:
            return TabFile(path, user, (), None, error.strerror)
        finally:
            os.close(fd)
        text = data.decode("utf-8", "surrogateescape")
        why = tab_text_error(text)
        return TabFile(path, user, version, None if why else text, why)

    # --- the boot

    def boot_id(self) -> str:
        """Return a text that differs after each boot; "" if the system has
        none."""
        try:
            with open("/proc/sys/kernel/random/boot_id",
                      encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            return ""

    def kept_boot(self, home: str) -> str:
        """Return the `boot_id` that `keep_boot` wrote, or ""."""
        try:
            with open(f"{home}/lock", encoding="ascii") as file:
                return file.read(CHUNK)
        except (OSError, ValueError):
            return ""

    def keep_boot(self, home: str) -> None:
        """Write the `boot_id` into koid's lock file, which outlives a history
        that somebody removes."""
        try:
            with open(f"{home}/lock", "w", encoding="ascii") as file:
                file.write(self.boot_id())
        except OSError:
            pass                # a full disk: the history has it as well

    def mark_reboot(self) -> bool:
        """Has cron or koid run the @reboot jobs since the boot?

        If not, leave cron's marker file, so that neither runs them again.
        """
        if any(os.path.lexists(mark) for mark in REBOOT_MARKERS):
            return True
        try:
            os.close(os.open(REBOOT_MARKERS[0], os.O_CREAT | os.O_CLOEXEC, 0))
        except OSError:
            pass
        return False

    def hold_cron_pid(self) -> int:
        """Lock cron's PID file, so that cron and koid never run at the same
        time. Return the descriptor, which holds the lock. Raises Error if
        cron is running."""
        fd = try_lock(CRON_PID)
        if fd is None:
            with open(CRON_PID, encoding="ascii", errors="replace") as file:
                pid = file.read(20).strip()
            raise Error(f"cron runs (pid {pid}), and would start its jobs "
                        "beside koid", "systemctl disable --now cron")
        os.fchmod(fd, 0o644)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        return fd

    # --- events that wake koid

    def watch_directory(self, path: str) -> int | None:
        """Let the kernel send SIGIO when a directory changes (F_NOTIFY in
        fcntl(2)). Return the descriptor, which must stay open; None if the
        system cannot."""
        if not hasattr(fcntl, "F_NOTIFY"):
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_MODIFY | fcntl.DN_CREATE
                        | fcntl.DN_DELETE | fcntl.DN_RENAME | fcntl.DN_ATTRIB
                        | fcntl.DN_MULTISHOT)
        except OSError:
            os.close(fd)
            return None
        return fd

    def clock_alarm(self) -> int | None:
        """Return a descriptor that becomes readable when the clock is set or
        the machine resumes (timerfd_create(2)); None if the system cannot.
        """
        if sys.platform != "linux" or sys.maxsize < 2**32:
            return None
        try:
            import ctypes
            libc = ctypes.CDLL(None)
            fd = libc.timerfd_create(0, os.O_CLOEXEC | os.O_NONBLOCK)
            if fd < 0:
                return None
            return fd if self.rearm_timer(fd) else None
        except (ImportError, OSError, AttributeError):
            return None

    def rearm_timer(self, fd: int) -> bool:
        """Arm the timer `fd` for a time that never comes, with the flags
        TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET. Return whether it
        worked."""
        import ctypes
        spec = (ctypes.c_longlong * 4)(0, 0, 2**40, 0)
        return ctypes.CDLL(None).timerfd_settime(fd, 3, spec, None) == 0

    def signal_job(self, header: RunFileHeader, number: int) -> bool:
        """Send the signal `number` to a job's process group. Return False if
        the job is not running: its PID may be another process now."""
        if header.phase != RUNNING or not header.job \
                or process_start_time(header.job) != header.job_start:
            return False
        try:
            os.killpg(header.job, number)
        except OSError:
            return False
        return True

    def has_one_log(self) -> bool:
        """Does the log have what is written to stderr, too? The journal does:
        systemd.exec(5), JOURNAL_STREAM."""
        status = os.fstat(2)
        return os.geteuid() == 0 and os.environ.get("JOURNAL_STREAM") \
            == f"{status.st_dev}:{status.st_ino}"

    def log(self, text: str, name: str = "koid", bad: bool = False) -> None:
        """Write a line to syslog, with the facility of cron. `bad`: it is an
        error."""
        import syslog
        syslog.openlog(name, syslog.LOG_PID, syslog.LOG_CRON)
        syslog.syslog(syslog.LOG_ERR if bad else syslog.LOG_INFO,
                      escape_controls(text))


class Container(Machine):
    """The machine in a container, which ends with koid: each start is a
    boot, jobs have the environment of the container, the log is stdout."""

    def __init__(self, clock: Clock | None = None):
        super().__init__(clock)
        self.boot = os.urandom(16).hex()

    def boot_id(self) -> str:
        return self.boot

    def mark_reboot(self) -> bool:
        return False

    def host_environment(self) -> dict:
        """Return the environment of the container. koid alone notifies a
        manager of services."""
        return {**CRON_ENVIRONMENT, **{
            name: value for name, value in os.environ.items()
            if name != "NOTIFY_SOCKET"}}

    def has_one_log(self) -> bool:
        return True

    def log(self, text: str, name: str = "koid", bad: bool = False) -> None:
        """Write a line to stdout."""
        print_log_line(self.clock, f"{name}: {text}", sys.stdout)


def print_log_line(clock: Clock, text: str, file) -> None:
    """Print a line with its time; nothing if nobody can read it."""
    try:
        print(escape_controls(f"{format_rfc3339(clock.now())} {text}"),
              file=file, flush=True)
    except (OSError, ValueError):
        pass


def notify_manager(state: str) -> None:
    """Report a state to systemd or another manager of services, if one asks
    for it: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            # A name that begins with "@" is an abstract one: unix(7).
            connection.sendto(state.encode(), "\0" + path[1:]
                              if path[:1] == "@" else path)
    except OSError:
        pass


def tab_names(directory: str) -> list[str]:
    """Return the names of the tabs in a directory, in order, without the
    temporary files of editors and of `write_atomically`."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name[0] not in ".#"
                  and not name.startswith("tmp.") and name[-1] != "~"
                  and not name.endswith(".new"))


def encode_os(text: str) -> bytes:
    """Return the bytes of a tab's text. os.fsencode would depend on the
    locale in which koid was started."""
    return text.encode("utf-8", "surrogateescape")


def remove(path: str, dir_fd: int | None = None) -> None:
    """Remove the file at `path`, if it exists and this user may."""
    try:
        os.unlink(path, dir_fd=dir_fd)
    except OSError:
        pass


def process_start_time(pid: int) -> int:
    """Return when the process `pid` started, in clock ticks since the boot
    (proc(5)); 0 if there is none.

    PIDs are used again. The PID and this time together name one process.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, 4096)
        finally:
            os.close(fd)
        return int(data.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def set_process_name(name: str, *arguments: str) -> None:
    """Let ps, pgrep and pidof show this process as `name` with `arguments`,
    where proc(5) allows it.

    A program that Python runs is called python3. Its arguments are memory of
    the process between two addresses, which do not change.
    """
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(name)
        with open("/proc/self/stat", "rb") as file:
            start, end = map(int, file.read().rpartition(b")")[2].split()[
                45:47])         # arg_start, arg_end
        text = b"\0".join(map(encode_os, (name, *arguments)))
        with open("/proc/self/mem", "r+b", buffering=0) as file:
            file.seek(start)
            file.write(text[:end - start - 1].ljust(end - start, b"\0"))
    except (OSError, ValueError):
        pass


# ==========================================================================
# Database: how is an SQLite file made, checked, written?     (files; R U C)
#
# The one class under both databases: the history of a host, written by koid,
# and the dashboard's. What was committed is on the disk (WAL and
# synchronous=FULL), so a power cut takes nothing back. A file of another
# form is refused and left as it is.
# ==========================================================================

WAL_PAGES = 256                 # 1 MiB of log, then it goes into the database


class DatabaseDamaged(Error):
    """The file is not a sound database. The text is SQLite's."""


class DatabaseForm(FrozenRecord):
    """What a file must be to be opened.

    `application` and `schema` are numbers in its first page; `tables` is the
    SQL that makes a new one; `checked` are the tables that each start reads
    through; `pragmas` are settings besides those that every file has;
    `companion` ends the name of a file that must not outlive it.
    """
    name: str
    application: int
    schema: int
    tables: str
    checked: tuple
    pragmas: tuple = ()
    companion: str = ""


def failure_of(error: Exception) -> str:
    """Return what an error of SQLite means, by its text.

    "full": no room. "disk": it cannot be written now, be it a quota or a
    disk that fails. "busy": another process has it. "damaged": it is not the
    database that it was. "missing": a table or a column is. "statement":
    anything else, a bug of ours.
    """
    text = str(error)
    for kind, words in (
            ("full", ("full",)), ("busy", ("locked",)),
            ("disk", ("I/O", "readonly", "unable to open")),
            ("damaged", ("malformed", "not a database")),
            ("missing", ("no such",))):
        if any(word in text for word in words):
            return kind
    return "statement"


class Transaction:
    """`with db.transaction():` commits the block, or leaves nothing of it."""

    def __init__(self, db: Database):
        self.db = db

    def __enter__(self) -> Transaction:
        self.db.execute("begin immediate")
        return self

    def __exit__(self, kind, _error, _trace) -> None:
        try:
            if kind is None:
                self.db.execute("commit")
        finally:
            self.db.roll_back()     # nothing is open after a commit


class Database:
    """An open SQLite file. One thread uses it at a time.

    Methods let sqlite3.Error out; `failure_of` says what one means.
    """

    def __init__(self, path: str, form: DatabaseForm):
        self.path, self.form, self.connection = path, form, None

    # --- opening

    def open(self, **first) -> None:
        """Open the file; make it if it is missing, with `first` in its table
        `meta`. Raises Error, and DatabaseDamaged."""
        import sqlite3
        try:
            if not os.path.exists(self.path):
                self.make(first)
            elif os.stat(self.path).st_mode & 0o077:
                os.chmod(self.path, 0o600)
            self.connection = connect_sqlite(self.path)
            self.check_form()
            self.set_pragmas(
                "journal_mode=wal", "synchronous=full",
                f"wal_autocheckpoint={WAL_PAGES}", *self.form.pragmas)
            for table in self.form.checked:
                found = self.value(f"pragma quick_check('{table}')")
                if found != "ok":
                    raise DatabaseDamaged(f"{self.path}: {found}")
        except sqlite3.DatabaseError as error:
            self.close()
            raise self.named_error(error) from None
        except Error:
            self.close()
            raise

    def open_empty(self) -> None:
        """Open an empty database in memory instead of the file."""
        self.connection = connect_sqlite(":memory:")
        self.connection.executescript(self.form.tables)

    def open_reader(self) -> None:
        """Open the file for reading only; it was checked by who writes it."""
        self.connection = connect_sqlite(self.path)
        self.set_pragmas("query_only=1", "cache_size=-2048")

    def make(self, first: dict) -> None:
        """Make the file, whole or not at all: a file of length 0 would pass
        for a damaged one. Raises OSError and sqlite3.Error."""
        fresh = self.path + ".new"
        create_private(fresh)
        db = connect_sqlite(fresh)
        try:
            db.executescript(
                "pragma auto_vacuum=incremental; pragma synchronous=full; "
                f"begin; {self.form.tables} "
                f"pragma application_id={self.form.application}; "
                f"pragma user_version={self.form.schema}; commit")
            for name, value in first.items():
                db.execute("insert into meta values (?, ?)", (name, value))
        finally:
            db.close()
        os.rename(fresh, self.path)
        sync_directory(posixpath.dirname(self.path) or ".")

    def check_form(self) -> None:
        """Refuse a file that is not of this form. Raises Error, and
        DatabaseDamaged for one that names no program at all."""
        application = self.value("pragma application_id")
        if not application:     # a file of length 0 passes SQLite's checks
            raise DatabaseDamaged(f"{self.path}: not {self.form.name}")
        hint = f"move it away to begin anew: mv {self.path} {self.path}.old"
        if self.form.companion:
            hint += f"; rm -f {self.path}{self.form.companion}"
        if application != self.form.application:
            raise Error(f"{self.path} is not {self.form.name}", hint)
        schema = self.value("pragma user_version")
        if schema > self.form.schema:
            raise Error(f"{self.path} was written by a newer koi (schema "
                        f"{schema})", "install that version again")
        if schema < self.form.schema:
            raise Error(f"{self.path} was written by an older koi (schema "
                        f"{schema}, this one needs {self.form.schema})", hint)

    def named_error(self, error) -> Error:
        """Return `error` as an Error that names the file."""
        damaged = failure_of(error) in ("damaged", "missing") or type(
            error).__name__ == "DatabaseError"
        return (DatabaseDamaged if damaged else Error)(
            f"{self.path}: {error}")

    def set_pragmas(self, *lines: str) -> None:
        """Carry out pragmas such as "synchronous=full"."""
        for line in lines:
            self.execute(f"pragma {line}").fetchall()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.connection:
            self.connection.close()
        self.connection = None

    def move_aside(self) -> str:
        """Close the file and rename it, with its log; return the new name.
        Raises OSError."""
        self.close()
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        while os.path.exists(aside):
            aside += "x"
        for ending in ("", "-wal", "-shm"):
            try:
                os.rename(self.path + ending, aside + ending)
            except FileNotFoundError:
                pass
        return aside

    def copy_to(self, path: str) -> None:
        """Copy the database as it is now to a file; writing goes on.
        Raises Error."""
        import sqlite3
        fresh = path + ".new"
        try:
            create_private(fresh)
            target = connect_sqlite(fresh)
            try:
                self.connection.backup(target)
            finally:
                target.close()
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            os.rename(fresh, path)
            sync_directory(posixpath.dirname(path) or ".")
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        except sqlite3.Error as error:
            raise Error(f"{path}: {error}") from None

    # --- statements

    def execute(self, statement: str, *values):
        """Carry out a statement; return its cursor, which gives tuples."""
        return self.connection.execute(statement, values)

    def rows(self, statement: str, *values) -> list[dict]:
        """Return the rows that a statement finds, by column names."""
        found = self.execute(statement, *values)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row)) for row in found]

    def row(self, statement: str, *values) -> dict | None:
        """Return the first row that a statement finds, or None."""
        found = self.execute(statement, *values)
        row = found.fetchone()
        return row and dict(zip((column[0] for column in found.description),
                                row))

    def column(self, statement: str, *values) -> list:
        """Return the first column of all rows that a statement finds."""
        return [row[0] for row in self.execute(statement, *values)]

    def value(self, statement: str, *values):
        """Return the first column of the first row, or None."""
        row = self.execute(statement, *values).fetchone()
        return row and row[0]

    def insert(self, table: str, verb: str = "insert", **columns) -> int:
        """Add a row; return its number. `verb` may be "insert or replace" or
        "insert or ignore"."""
        names = ", ".join(f'"{name}"' for name in columns)
        marks = ", ".join("?" * len(columns))
        return self.execute(f"{verb} into {table} ({names}) values ({marks})",
                            *columns.values()).lastrowid

    def update(self, table: str, columns: dict, **where) -> int:
        """Change the rows in which all columns of `where` have these values;
        return their count."""
        sets = ", ".join(f'"{name}" = ?' for name in columns)
        tests = " and ".join(f'"{name}" = ?' for name in where)
        return self.execute(f"update {table} set {sets} where {tests}",
                            *columns.values(), *where.values()).rowcount

    def delete(self, table: str, **where) -> int:
        """Remove the rows in which all columns of `where` have these values;
        return their count."""
        tests = " and ".join(f'"{name}" = ?' for name in where)
        return self.execute(f"delete from {table} where {tests}",
                            *where.values()).rowcount

    # --- transactions

    @property
    def in_transaction(self) -> bool:
        """Is a transaction open?"""
        return self.connection.in_transaction

    def transaction(self) -> Transaction:
        """Return what `with` needs to commit a block, or to undo it."""
        return Transaction(self)

    def roll_back(self) -> None:
        """End the open transaction, if there is one; it leaves nothing."""
        try:
            if self.in_transaction:
                self.execute("rollback")
        except Exception:       # the transaction has ended in any case
            pass

    def is_disk_full(self) -> bool:
        """Does the file system have no room, or no right to write?

        SQLite reports both as it reports a disk that fails; so a page is
        written next to the database.
        """
        fresh = self.path + ".new"
        try:
            fd = os.open(fresh, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, bytes(4096), 0)
            finally:
                os.close(fd)
        except OSError as error:
            return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        finally:
            remove(fresh)
        return False


def connect_sqlite(path: str):
    """Connect to a file. No transaction begins by itself; another thread may
    take the connection over. Raises sqlite3.Error."""
    import sqlite3
    return sqlite3.connect(path, isolation_level=None, timeout=5,
                           check_same_thread=False)


def create_private(path: str) -> None:
    """Create an empty file for its owner alone, in the place of one that an
    earlier attempt left. Raises OSError."""
    for ending in ("", "-journal"):
        remove(path + ending)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                     | os.O_CLOEXEC, 0o600))


# ==========================================================================
# RunStore: where are the runs of this host kept?               (files; R C)
#
# One database, written by koid alone. When it cannot be written the jobs go
# on: the statements wait in memory.
# ==========================================================================

LARGEST = 2**62                 # what SQLite can count
MOST_WAITING = 50_000           # statements that wait for a full disk
MOST_UNSENT = 10_000            # runs that are kept for a dashboard
NONCES_KEPT, NONCES_FOR = 10_000, 8 * DAY   # the rest goes when it is older
HISTORY_FORM = DatabaseForm(
    "a history of koi's", 0x6B6F6931, 3, checked=("meta", "jobs", "runs"),
    pragmas=("cache_size=-256",), tables="""
create table meta (name text primary key, value text not null) without rowid;
create table jobs (
    id integer primary key, user text not null, identity text not null,
    section text not null, name text not null, label text not null,
    file text not null default '', text text not null default '',
    assignments text not null default '', removed real not null default 0,
    paused integer,
    unique (user, identity));
create table runs (
    id integer primary key, job integer not null references jobs,
    trigger text not null, state text not null, due real, requested_at real,
    started real, ended real, exit integer, signal integer,
    reason text not null default '', args text not null default '{}',
    attempt integer not null default 1, count integer not null default 1,
    bytes integer not null default 0, cut integer not null default 0,
    mail text not null default '', change integer not null default 0);
create index runs_of_job on runs (job, id);
create index runs_changed on runs (change);
create index runs_unfinished on runs (state)
    where state in ('queued', 'running');
create table output (run integer primary key, frames blob not null);
create table nonces (
    number integer primary key, nonce text not null unique, at real not null,
    run integer not null default 0);
create table refusals (
    reason text primary key, count integer not null, at real not null
    ) without rowid;
""")
COLUMNS_OF_RUN = ("id", "job", "trigger", "state", "due", "requested_at",
                  "started", "ended", "exit", "signal", "reason", "args",
                  "attempt", "count", "bytes", "cut", "mail", "change")
SHOWN_COLUMNS = ", ".join(f"r.{name}" for name in COLUMNS_OF_RUN) \
    + ", j.user, j.identity, j.section, j.name, j.label"


def creation_time(path: str) -> int:
    """Return when a file was made, in nanoseconds since 1970; 0 if the
    system does not know. Raises OSError."""
    status = os.stat(path)
    if hasattr(status, "st_birthtime"):
        return int(status.st_birthtime * 1e9)
    import ctypes
    found = ctypes.create_string_buffer(256)    # struct statx, statx(2)
    try:
        if ctypes.CDLL(None).statx(-100, os.fsencode(path), 0, 0x800, found):
            return 0
    except AttributeError:      # an old libc
        return 0
    seconds, rest = Struct("=qI").unpack_from(found, 80)
    return seconds * 10**9 + rest


def new_epoch() -> int:
    """Return a random number by which a dashboard distinguishes two histories
    of one host."""
    return int.from_bytes(os.urandom(6), "big")


class RunStore:
    """The history of the runs of this host. Only koid's loop writes it.

    `last` and `last_job` are the highest numbers given, `change` the highest
    change: each row of a run gets the next one when it is written. `sent` is
    the change up to which a dashboard has all rows; None without one.
    `pauses` has the end of each paused job's pause, seconds since 1970, by
    (user, identity); 0: none.
    """

    def __init__(self, path: str, writing: bool = True):
        self.path, self.writing = path, writing
        self.problem = ""               # why nothing can be written
        self.broken = False             # the disk failed: start anew
        self.waiting: list[tuple] = []  # (statement, values) not written yet
        self.keys: dict[tuple, int] = {}    # (user, identity) -> id in jobs
        self.pauses: dict[tuple, int] = {}
        self.last = self.last_job = 0
        self.change = 0
        self.sent: int | None = None
        self.db = Database(path, HISTORY_FORM if writing else
                           HISTORY_FORM.replace(checked=()))

    def open(self) -> str:
        """Open it or make it. A damaged file is moved aside; return a
        sentence about that, else "". Raises Error."""
        if not self.writing and not os.path.exists(self.path):
            self.db.open_empty()
            return ""
        moved, epoch = "", str(new_epoch())
        try:
            self.db.open(epoch=epoch)
        except DatabaseDamaged as error:
            if not self.writing:
                raise
            moved = self.move_aside(error.message)
            self.db.open(epoch=epoch)
        self.last = self.db.value("select max(id) from runs") or 0
        self.last_job = self.db.value("select max(id) from jobs") or 0
        self.keys = {(user, identity): key for key, user, identity in
                     self.db.execute("select id, user, identity from jobs")}
        self.pauses.update({
            (user, identity): until for user, identity, until in
            self.db.execute("select user, identity, paused from jobs where "
                            "paused is not null")})
        sent = self.get_meta("sent")
        self.sent = int(sent) if sent.isdigit() else None
        self.change = max(self.db.value("select max(change) from runs") or 0,
                          self.sent or 0)
        return moved

    def move_aside(self, why: str) -> str:
        """Put a damaged history out of the way; return a sentence about it.
        Raises OSError."""
        return f"the history was damaged ({why}) and is now " \
            f"{self.db.move_aside()}; a new one was begun"

    # --- writing

    def write(self, statements: list[tuple]) -> bool:
        """Carry out statements in one transaction, after those that wait.

        Return False if they wait too, because the disk is full or cannot be
        written. Raises Error when the disk fails: from then on a commit
        could be lost.
        """
        import sqlite3
        self.waiting += statements
        if self.broken:
            return False
        if not self.waiting:
            return True
        try:
            with self.db.transaction():
                for statement, values in self.waiting:
                    self.db.execute(statement, *values)
        except sqlite3.DatabaseError as error:
            return self.on_write_error(error)
        except Exception:       # a value that SQLite cannot take: ours
            del self.waiting[len(self.waiting) - len(statements):]
            raise
        self.waiting.clear()
        self.problem = ""
        return True

    def on_write_error(self, error: Exception) -> bool:
        """Decide what an error in writing means: False, the statements wait.
        Raises Error if there is no sense in waiting."""
        self.problem = f"{self.path}: {error}"
        kind = failure_of(error)
        if kind in ("damaged", "missing", "statement"):
            self.give_up(error)
        if "I/O" in str(error) and not self.db.is_disk_full():
            self.broken = True
            raise Error(self.problem) from None
        if len(self.waiting) > MOST_WAITING:
            jobs = [each for each in self.waiting
                    if each[0].startswith("insert into jobs")]
            self.waiting = jobs + self.waiting[-MOST_WAITING:]
        return False

    def give_up(self, error: Exception) -> None:
        """Writing has failed for good. A damaged history is moved aside, or
        the next koid would come no further. Raises Error."""
        import sqlite3
        self.broken, text = True, f"{self.path}: {error}"
        if not isinstance(error, sqlite3.IntegrityError):
            text = self.move_aside(str(error))
        raise Error(text) from None

    def job_key(self, whose: tuple, job: Job, statements: list) -> int:
        """Return the number of the job of `whose` = (user, identity); the
        statement that adds a new one is appended to `statements`."""
        key = self.keys.get(whose)
        if key is None:
            self.last_job += 1
            key = self.keys[whose] = self.last_job
            statements.append((
                "insert into jobs (id, user, identity, section, name, label) "
                "values (?, ?, ?, ?, ?, ?)", (
                    key, *map(storable, (*whose, job.section, job.name,
                                         job.label)))))
        return key

    def known_jobs(self) -> dict[tuple, dict]:
        """Return what is kept of each job, by (user, identity). `removed` is
        when its tab lost it, in seconds since 1970; 0: its tab has it."""
        return {(row["user"], row["identity"]): row for row in self.db.rows(
            "select id, user, identity, file, text, assignments, removed "
            "from jobs")}

    def rename_job(self, row: dict, whose: tuple, job: Job) -> list[tuple]:
        """Return the statements that give the job of a row of `known_jobs`
        the identity `whose`. Its runs get new changes, all different, so
        that a dashboard gets them again under the new name."""
        del self.keys[row["user"], row["identity"]]
        self.keys[whose] = row["id"]
        until = self.pauses.pop((row["user"], row["identity"]), None)
        if until is not None:
            self.pauses[whose] = until
        before, self.change = self.change, self.change + self.last
        return [("update jobs set identity = ?, section = ?, name = ?, "
                 "label = ? where id = ?", (
                     *map(storable, (whose[1], job.section, job.name,
                                     job.label)), row["id"])),
                ("update runs set change = ? + id where job = ?",
                 (before, row["id"]))]

    def note_jobs(self, present: dict[int, tuple], now: float) -> list[tuple]:
        """Return the statements that keep file, text and assignments of the
        jobs that tabs have, by their numbers, and `now` for those that no
        tab has any more."""
        known = {row["id"]: (row["file"], row["text"], row["assignments"],
                             row["removed"])
                 for row in self.known_jobs().values()}
        return [("update jobs set file = ?, text = ?, assignments = ?, "
                 "removed = 0 where id = ?", (*content, key))
                for key, content in present.items()
                if known.get(key) != (*content, 0)] + [
            ("update jobs set removed = ? where id = ?", (now, key))
            for key, (*_, removed) in known.items()
            if key not in present and not removed]

    def forget_removed(self, before: float, most: int) -> list[tuple]:
        """Return the statements that remove `most` runs of jobs that no tab
        has had since the time `before`, and such jobs without runs."""
        runs = self.db.column(
            "select r.id from jobs j join runs r on r.job = j.id where "
            "j.removed > 0 and j.removed < ? and r.state not in ('queued', "
            "'running') limit ?", before, most)
        jobs = self.db.execute(
            "select id, user, identity from jobs where removed > 0 and "
            "removed < ? and id not in (select job from runs)", before)
        statements = [(f"delete from {table} = ?", (run,)) for run in runs
                      for table in ("output where run", "runs where id")]
        for key, *whose in jobs:
            del self.keys[tuple(whose)]
            self.pauses.pop(tuple(whose), None)
            statements.append(("delete from jobs where id = ?", (key,)))
        return statements

    def next_change(self) -> int:
        """Return the number of the next change of any run."""
        self.change += 1
        return self.change

    def insert(self, run: dict) -> tuple:
        """Return the statement that adds a run of these columns."""
        run = {**run, "change": self.next_change()}
        names = [name for name in COLUMNS_OF_RUN if name in run]
        return (f"insert into runs ({', '.join(names)}) values "
                f"({', '.join('?' * len(names))})",
                tuple(run[name] for name in names))

    def update(self, run: int, **columns) -> tuple:
        """Return the statement that changes these columns of a run."""
        columns["change"] = self.next_change()
        return (f"update runs set {', '.join(f'{n} = ?' for n in columns)} "
                "where id = ?", (*columns.values(), run))

    def prune(self, key: int, keep: int) -> list[tuple]:
        """Return the statements that leave a job its newest `keep` runs, and
        those that a dashboard lacks, if they are not too many."""
        old = self.db.value("select id from runs where job = ? order by id "
                            "desc limit 1 offset ?", key, keep)
        if old is None:
            return []
        old_runs = "(select id from runs where job = ? and id <= ? and " \
            "state not in ('queued', 'running') and (change <= ? or id <= ?))"
        values = (key, old, LARGEST if self.sent is None else self.sent,
                  self.last - MOST_UNSENT)
        return [(f"delete from output where run in {old_runs}", values),
                (f"delete from runs where id in {old_runs}", values)]

    def set_meta(self, name: str, value: str) -> tuple:
        """Return the statement that keeps a value by its name."""
        return ("insert or replace into meta values (?, ?)", (name, value))

    def pause(self, key: tuple, until: int | None) -> tuple:
        """Pause a job that is recorded until a time, 0: without end; None
        ends its pause. Return the statement that keeps it."""
        self.pauses.pop(key, None)
        if until is not None:
            self.pauses[key] = until
        return ("update jobs set paused = ? where id = ?",
                (until, self.keys[key]))

    # --- reading

    def noted_time(self, name: str) -> float:
        """Return a time from the table `meta`; 0 if there is none."""
        try:
            return float(self.get_meta(name) or 0)
        except ValueError:
            return 0.0

    def get_meta(self, name: str) -> str:
        """Return a value by its name; "" if there is none."""
        return self.db.value("select value from meta where name = ?",
                             name) or ""

    def each_run(self, where: str, *values):
        """Yield the runs that an SQL condition finds, with the names of
        their jobs. `r` is the table of runs, `j` that of jobs."""
        return map(shown, self.db.execute(
            f"select {SHOWN_COLUMNS} from runs r join jobs j on j.id = r.job "
            f"where {where}", *values))

    def runs(self, where: str, *values) -> list[dict]:
        """Return the runs that an SQL condition finds, as `each_run`."""
        return list(self.each_run(where, *values))

    def output(self, run: int) -> bytes:
        """Return the frames that are kept of a run; b"" if none are."""
        return self.db.value("select frames from output where run = ?",
                             run) or b""

    # --- for a dashboard

    def changed_since(self, after: int, most: int) -> list[dict]:
        """Return at most `most` runs that changed after a change, in that
        order, each with the `size` of its output in bytes."""
        runs = self.runs("r.change > ? order by r.change limit ?", after, most)
        for run in runs:
            run["size"] = self.db.value("select length(frames) from output "
                                        "where run = ?", run["run"]) or 0
        return runs

    def began(self, now: float) -> float:
        """Return since when it is known which requests were used.

        That is when this file was made, or put here from a backup, which
        shows in its inode and its creation time (an inode is soon given to
        another file). To be called at each start, before the first `write`:
        the statements that keep it are added to `waiting`.
        """
        place = f"{os.stat(self.path).st_ino}:{creation_time(self.path)}"
        if self.get_meta("place") != place:
            # The numbers of the next runs may have been used before, too.
            self.waiting += [self.set_meta("place", place),
                             self.set_meta("began", repr(now)),
                             self.set_meta("epoch", str(new_epoch())),
                             self.set_meta("sent before", str(self.sent or 0))]
            return now
        return self.noted_time("began")

    def record_nonce(self, nonce: str, now: float, run: int) -> list[tuple]:
        """Return the statements that make a request used, for good."""
        return [("insert into nonces (nonce, at, run) values (?, ?, ?)",
                 (nonce, now, run)),
                ("delete from nonces where at < ? and number < (select "
                 "max(number) from nonces) - ?",
                 (now - NONCES_FOR, NONCES_KEPT))]

    def nonce_run(self, nonce: str) -> int | None:
        """Return the run that a request was used for, 0 if it started none;
        None for a request that was not used yet."""
        return self.db.value("select run from nonces where nonce = ?", nonce)

    def refusal(self, reason: str, count: int, now: float) -> tuple:
        """Return the statement that counts refused requests."""
        return ("insert into refusals values (?1, ?2, ?3) on conflict "
                "(reason) do update set count = count + ?2, at = ?3",
                (reason, count, now))

    def refusals(self) -> list[dict]:
        """Return why requests were refused, how often, and when last."""
        return self.db.rows("select reason, count, at from refusals order by "
                            "at desc limit 100")


def storable(text: str) -> str:
    """Return text that SQLite takes: bytes that are not UTF-8 become
    escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(row: tuple) -> dict:
    """Return a run as others see it, of the columns SHOWN_COLUMNS."""
    import json
    run = dict(zip((*COLUMNS_OF_RUN, "user", "identity", "section", "name",
                    "label"), row))
    try:
        run["args"] = dict(json.loads(run["args"]))
    except (ValueError, TypeError):     # damaged: the arguments of no job
        run["args"] = {"": ""}
    for name in ("due", "requested_at", "started", "ended"):
        if not isinstance(run[name], (float, int)):
            run[name] = None
    run["run"] = run.pop("id")
    run["tag"] = short_hash(run["identity"])
    run["cut"] = bool(run["cut"])
    return run


# ==========================================================================
# Supervisor: who stays with a job?                  (processes, files; R J)
#
# koid may be killed, upgraded or restarted at any time, and its jobs do not
# notice: each has a supervisor that owns its pipes, keeps its output and its
# end in a file, and needs koid for nothing. That file is made with O_EXCL
# before the job is started, so no run is ever started twice. A supervisor
# is a fork of koid, without exec, as another Python would cost far more.
# ==========================================================================

LINGER = 1.0            # seconds for output that comes after a job's end
KILL_AFTER = 10.0       # seconds from TERM to KILL
TRY_FOR = 60.0          # seconds in which a full process table may empty
NO_HOME = "/nonexistent"    # what Debian gives users who shall have none
PIPE_ROOM = 4096        # bytes that fit into a pipe of the smallest kind
READ_AGAIN = 20         # times, while a run writes very fast
FAR_BEHIND = 2**18      # bytes a terminal may lag before its job must wait
LONGEST_SLEEP = 86_400.0    # seconds: poll() takes 24 days at most
REPORT = Struct("<Qi")  # run, wait status: one write to koid's pipe
PASSED_ON = (1, 2, 3, 9, 15)    # signals that `koitab run` may send
RESET = [number for number in range(1, signal.NSIG) if number not in (
    signal.SIGKILL, signal.SIGSTOP) and not 32 <= number <= 33]


class LaunchSpec(FrozenRecord):
    """All that a supervisor needs to know about one run."""
    run: int
    script: str
    stdin: bytes
    environment: dict
    timeout: float = 0.0
    nice: int = 0
    secrets: list = []
    connection: object = None   # a socket: `koitab run` listens there


def drop_privileges(account: Account) -> None:
    """Give up root for good. Raises OSError if any of it fails: a job that
    keeps a right of root's must not run (CVE-2006-2607)."""
    if os.geteuid() == 0:
        os.setgroups(account.groups)
        if hasattr(os, "setresuid"):
            os.setresgid(account.gid, account.gid, account.gid)
            os.setresuid(account.uid, account.uid, account.uid)
        else:
            os.setgid(account.gid)
            os.setuid(account.uid)
        if sorted(set(os.getgroups())) != sorted(set(account.groups)):
            raise PermissionError("the groups are not the user's")
    ids = {os.getuid(), os.geteuid(), *os.getresuid()} \
        if hasattr(os, "getresuid") else {os.getuid(), os.geteuid()}
    if ids != {account.uid} or os.getegid() != account.gid:
        raise PermissionError("the user did not change")
    if account.uid:
        try:
            os.setuid(0)
        except OSError:
            return
        raise PermissionError("root could be had back")


class Poller:
    """select.poll() with a handler, called as handler(fd, events), for each
    descriptor."""

    def __init__(self):
        self.poll = select.poll()
        self.handlers: dict[int, object] = {}

    def register(self, fd: int, handler, events: int = select.POLLIN) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events of a descriptor; 0: for its end alone."""
        self.poll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Do not wait for a descriptor any more; it stays open."""
        del self.handlers[fd]
        self.poll.unregister(fd)

    def close(self, fd: int) -> None:
        self.unregister(fd)
        os.close(fd)

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """Return the descriptors that are ready, after `timeout` ms at
        most."""
        return self.poll.poll(timeout)

    def dispatch(self, ready: list[tuple[int, int]]) -> None:
        """Call the handlers of what is ready and still registered."""
        for fd, events in ready:
            if fd in self.handlers:
                self.handlers[fd](fd, events)


class SupervisedRun:
    """One run, while its supervisor stays with it."""

    def __init__(self, spec: LaunchSpec, file: int | None):
        self.spec, self.file = spec, file
        self.header = RunFileHeader()
        self.payload = [0, 0, 0]    # bytes of output in each segment
        self.mask = SecretMasker(spec.secrets) if spec.secrets else None
        self.pid, self.handle = 0, -1       # handle: a pidfd
        self.streams: dict[int, int] = {}   # descriptor -> stream
        self.connection = spec.connection
        self.began = time.monotonic()       # by the clock that no one sets
        self.give_up = self.began + TRY_FOR
        self.again = self.deadline = self.kill_at = FOREVER
        self.status: int | None = None      # None: it is running
        self.linger = FOREVER
        self.finished = False
        self.backlog = bytearray()          # for the connection

    # --- its file

    def save(self) -> None:
        """Write the header. A full disk must not hurt the job."""
        if self.file is not None:
            try:
                os.pwrite(self.file, self.header.pack(), 0)
            except OSError:
                pass            # the next one may be written again

    def on_output(self, stream: int, data: bytes) -> None:
        """Keep some output of the job; b"" is the end of a stream."""
        if self.mask:
            data = self.mask.feed(stream, data, last=not data)
        if data:
            self.put(stream, data)

    def put(self, stream: int, data: bytes) -> None:
        """Keep some output, and show it to who waits for it."""
        since = int((time.monotonic() - self.began) * 1000)
        if self.connection:
            self.backlog += frame(stream, since, data)
        self.header.total += len(data) * (stream != NOTE)
        self.keep(stream, since, data)

    def keep(self, stream: int, since: int, data: bytes) -> None:
        """Write a frame where there is room, and the header after it."""
        header = self.header
        while data and self.file is not None:
            used = header.lengths()[header.segment]
            room = (KEPT_SEGMENT if header.segment else KEPT_HEAD) \
                - used - FRAME.size
            if room <= 0:
                self.switch_segment()
                continue
            part, data = data[:room], data[room:]
            try:
                os.pwrite(self.file, frame(stream, since, part),
                          SEGMENTS[header.segment] + used)
            except OSError:
                header.lost += len(part)    # no space: the end still counts
                continue
            self.payload[header.segment] += len(part)
            self.set_length(used + FRAME.size + len(part))
        self.save()

    def set_length(self, length: int) -> None:
        """Note how many bytes are in the segment that is written."""
        setattr(self.header, ("head", "first", "second")[self.header.segment],
                length)

    def switch_segment(self) -> None:
        """Go on in the other segment; what was in it is lost."""
        header = self.header
        header.segment = 2 if header.segment == 1 else 1
        header.lost += self.payload[header.segment]
        self.payload[header.segment] = 0
        self.set_length(0)
        self.save()             # before what it describes is overwritten

    # --- its process

    def start(self, nothing: int) -> None:
        """Start the job; `nothing` is an input at its end. Raises OSError,
        ValueError."""
        spec = self.spec
        home = spec.environment["HOME"]
        try:
            os.chdir(home)
        except OSError as error:
            os.chdir("/")
            if home != NO_HOME:
                self.put(NOTE,
                         escape_controls(f"{home}: {error.strerror}; it runs "
                                               "in /").encode())
        shell = spec.environment["SHELL"]
        given = input_file(spec.stdin) if spec.stdin else nothing
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        # The supervisor becomes as nice as its job: posix_spawn has no means.
        os.nice(max(spec.nice - os.nice(0), 0))
        try:
            self.pid = os.posix_spawn(
                encode_os(shell),
                [encode_os(shell), b"-c", encode_os(spec.script)],
                {encode_os(name): encode_os(value) for name, value
                 in spec.environment.items()},
                file_actions=[(os.POSIX_SPAWN_DUP2, given, 0),
                              (os.POSIX_SPAWN_DUP2, out_end, 1),
                              (os.POSIX_SPAWN_DUP2, err_end, 2)],
                setsid=True, setsigmask=[], setsigdef=RESET)
        except OSError as error:
            os.close(out)
            os.close(err)
            if error.errno not in AGAIN:
                error = OSError(error.errno, f"{shell}: {error.strerror}")
            raise error from None
        finally:
            for fd in (out_end, err_end, *[given][:given != nothing]):
                os.close(fd)
        self.streams = {out: STDOUT, err: STDERR}

    def note_start(self) -> None:
        """Note in the run's file that the job was started just now."""
        header = self.header
        self.began, header.started = time.monotonic(), time.time()
        self.deadline = self.began + self.spec.timeout \
            if self.spec.timeout else FOREVER
        header.phase, header.job = RUNNING, self.pid
        header.job_start = process_start_time(self.pid)
        self.save()

    def signal(self, number: int) -> None:
        """Signal all processes of the job that kept its group."""
        if self.pid and self.status is None:
            try:
                os.killpg(self.pid, number)
            except OSError:
                pass            # it has just ended, or became another user
        elif self.pid:
            end_group(self.pid, number)
        else:
            self.give_up = 0.0  # it could not be started yet, and will not

    def escalate_kill(self, now: float) -> None:
        """End a job whose time is up: TERM, and KILL ten seconds later."""
        if now >= self.kill_at:
            self.kill_at = FOREVER
            self.signal(signal.SIGKILL)
        elif now >= self.deadline:
            self.header.reason = REASONS.index("timeout")
            self.deadline, self.kill_at = FOREVER, now + KILL_AFTER
            self.signal(signal.SIGTERM)


AGAIN = (errno.EAGAIN, errno.ENOMEM)


def end_group(pid: int, number: int) -> None:
    """Signal what is left of a job's group whose leader has ended. While it
    has a member no other process gets the leader's number."""
    if not process_start_time(pid):
        try:
            os.killpg(pid, number)
        except OSError:
            pass


def input_file(data: bytes) -> int:
    """Return a descriptor from which a process reads `data`."""
    if len(data) <= PIPE_ROOM:      # else the write could wait for ever
        given, end = os.pipe()
        os.write(end, data)
        os.close(end)
        return given
    if hasattr(os, "memfd_create"):
        given = os.memfd_create("input")
    else:
        import tempfile
        given, path = tempfile.mkstemp()
        os.unlink(path)
    write_all(given, data)
    os.lseek(given, 0, os.SEEK_SET)
    return given


class Supervisor:
    """Stays with one run of one user until the job has ended.

    A fork of koid's that soon becomes the job's user. It needs koid for
    nothing: what it has to say is in the run's file, and a report on the
    pipe `report` only saves koid from looking there.
    """

    def __init__(self, daemon: int, account: Account, spec: LaunchSpec,
                 runs: int, report: int, nothing: int):
        self.account, self.spec = account, spec
        self.runs, self.report, self.nothing = runs, report, nothing
        self.poller = Poller()
        self.reports: list[bytes] = []          # not yet on koid's pipe
        self.daemon = daemon                    # koid's pid
        self.run: SupervisedRun | None = None   # None: there is no more to do

    def serve(self) -> None:
        """Claim the run, become the user, start the job, wait for its end.
        Raises OSError, MemoryError."""
        self.detach()
        file, claimed = self.claim(self.spec.run)
        if file is None and claimed:
            self.reports.append(REPORT.pack(self.spec.run, NO_FILE))
            self.send_reports()
        if claimed:
            self.open_run(file)
        self.drop_privileges()
        if self.run and not self.run.finished:
            self.start()
        os.chdir("/")
        self.close_run()        # perhaps it could not be started
        while self.poller.handlers or self.run or self.reports:
            self.run_once()

    def open_run(self, file: int | None) -> None:
        """Note in the run's file who supervises it."""
        self.run = SupervisedRun(self.spec, file)
        header = self.run.header
        header.supervisor = os.getpid()
        header.supervisor_start = process_start_time(header.supervisor)
        self.run.save()
        if self.run.connection:
            self.run.connection.setblocking(False)
            self.poller.register(self.run.connection.fileno(), self.converse)

    def detach(self) -> None:
        """Leave koid's session, signals and descriptors behind."""
        set_process_name("koi-run", str(self.spec.run))
        reset_signals(signal.SIG_IGN)       # it ends when its job ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        os.chdir("/")
        keep = {0, 1, 2, self.runs, self.report, self.nothing}
        if self.spec.connection:
            keep.add(self.spec.connection.fileno())
        close_all_but(keep)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def claim(self, run: int) -> tuple[int | None, bool]:
        """Make the file of `run`: its descriptor, and whether the run is
        ours. On a full disk it is ours without a file."""
        try:
            file = os.open(str(run), os.O_RDWR | os.O_CREAT | os.O_EXCL
                           | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                           dir_fd=self.runs)
        except FileExistsError:
            return None, False
        except OSError:
            return None, os.getppid() == self.daemon
        if os.getppid() == self.daemon:
            return file, True
        # koid was killed before we came to this. The next one may have
        # started the run, recorded its end, and removed its file.
        remove(str(run), self.runs)
        os.close(file)
        return None, False

    def drop_privileges(self) -> None:
        """Become the user; if that fails, the job is not started."""
        os.close(self.runs)
        try:
            drop_privileges(self.account)
        except (OSError, ValueError) as error:
            if self.run:
                self.refuse(error)

    def start(self) -> None:
        """Start the job, now or when the process table has room."""
        run = self.run
        try:
            run.start(self.nothing)
        except (OSError, ValueError) as error:
            now = time.monotonic()
            if getattr(error, "errno", 0) in AGAIN and now < run.give_up:
                run.again = now + 1
            else:
                self.refuse(error)
            return
        run.note_start()
        for fd in run.streams:
            os.set_blocking(fd, False)
            self.poller.register(fd, self.read_output)
        try:
            run.handle = os.pidfd_open(run.pid)
            self.poller.register(run.handle, self.reap)
        except (AttributeError, OSError):
            run.handle = -1     # macOS, or before Linux 5.3: waitpid() polls

    def refuse(self, error: Exception) -> None:
        """Record that the job could not be started."""
        why = error.strerror if isinstance(error, OSError) else ""
        header = self.run.header
        header.phase = UNSTARTABLE
        header.errno = getattr(error, "errno", None) or errno.EPERM
        self.run.put(NOTE, escape_controls(
            f"could not start: {why or error}").encode())
        header.ended = time.time()
        self.finish()

    # --- the poll loop

    def run_once(self) -> None:
        """Wait for an event, and handle it and what is due."""
        self.poller.dispatch(self.poller.wait(self.poll_timeout()))
        run, now = self.run, time.monotonic()
        if run:
            if self.must_poll_child():
                self.reap()
            if now >= run.again:
                run.again = FOREVER
                self.start()
            run.escalate_kill(now)
            if run.status is not None and not run.finished and (
                    not run.streams or now >= run.linger):
                self.finish()
        self.close_run()

    def must_poll_child(self) -> bool:
        """Is the job running without a pidfd that reports its end?"""
        run = self.run
        return bool(run) and run.handle < 0 < run.pid and run.status is None

    def close_run(self) -> None:
        """Give the run up when its reader has all, and no KILL is due."""
        run = self.run
        if run and run.finished and not run.backlog \
                and run.kill_at == FOREVER:
            self.run = None
        self.send_reports()

    def poll_timeout(self) -> float | None:
        """Return the milliseconds until something is due; None: never."""
        now, run, soon = time.monotonic(), self.run, FOREVER
        if run:
            soon = run.kill_at if run.finished else min(
                run.deadline, run.kill_at, run.linger, run.again)
        if self.reports:
            soon = min(soon, now + 1)
        if self.must_poll_child():
            soon = min(soon, now + 0.2)
        return None if soon == FOREVER else \
            min(max(soon - now, 0), LONGEST_SLEEP) * 1000 + 1

    def read_output(self, fd: int, _events: int) -> None:
        """Keep some output of the job; close the stream at its end. After
        the run's end output is dropped, so that its writer can go on."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.run and not self.run.finished:
            self.run.on_output(self.run.streams[fd], data)
            self.send_backlog()
        if not data:
            if self.run:
                del self.run.streams[fd]
            self.poller.close(fd)

    def reap(self, fd: int = -1, _events: int = 0) -> None:
        """Take the job's wait status, if it has ended."""
        run = self.run
        try:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = run.pid, 0xFF00
        if pid:
            run.status, run.header.ended = status, time.time()
            run.linger = time.monotonic() + LINGER
            run.deadline = FOREVER      # a KILL that is due stays due
            if fd >= 0:
                self.poller.close(fd)

    def finish(self) -> None:
        """Write the run's end to its file, and report it to koid."""
        run = self.run
        for stream in run.streams.values():
            run.on_output(stream, b"")
        if run.streams:
            run.put(NOTE, b"a process that it left behind keeps its output "
                          b"open; what that writes from here on is not kept")
        run.finished = True
        if run.header.phase == RUNNING:
            run.header.phase, run.header.status = ENDED, run.status
        run.save()
        if run.file is not None and os.getppid() != self.daemon:
            try:
                os.fsync(run.file)  # koid, when it is there, does so itself
            except OSError:
                pass
        status = run.status if run.status is not None else NO_STATUS
        self.reports.append(REPORT.pack(run.spec.run, status))
        if run.connection:
            import json
            exit_status, number = exit_and_signal(status)
            run.backlog += frame(END, 0, json.dumps({
                "exit": exit_status, "signal": number,
                "reason": REASONS[run.header.reason]}).encode())
            self.send_backlog()

    def send_reports(self) -> None:
        """Write the reports to koid's pipe, if koid still reads it."""
        while self.reports:
            try:
                os.write(self.report, self.reports[0])
            except BlockingIOError:
                return          # the pipe is full: again in a second
            except OSError:
                pass            # koid has ended; the next reads the file
            del self.reports[0]

    # --- `koitab run`, which waits for the output

    def converse(self, _fd: int, events: int) -> None:
        """Pass on a signal that `koitab run` sent; send what it can take."""
        run = self.run
        if events & select.POLLIN:
            try:
                data = run.connection.recv(64)
            except BlockingIOError:
                data = b"\0"
            except OSError:
                data = b""
            if not data:
                return self.disconnect()
            for number in data:
                if number in PASSED_ON:
                    run.signal(number)
        elif events & ~select.POLLOUT:
            return self.disconnect()
        self.send_backlog()

    def send_backlog(self) -> None:
        """Send what fits; a job whose reader is far behind has to wait, as
        it would at a terminal."""
        run = self.run
        if not run.connection:
            return
        try:
            while run.backlog:
                sent = run.connection.send(run.backlog[:CHUNK])
                del run.backlog[:sent]
        except BlockingIOError:
            pass
        except OSError:
            return self.disconnect()
        if run.finished and not run.backlog:
            return self.disconnect()
        self.poller.modify(run.connection.fileno(), select.POLLIN
                         | (select.POLLOUT if run.backlog else 0))
        for fd in run.streams:
            self.poller.modify(fd, 0 if len(run.backlog) > FAR_BEHIND
                             and not run.finished else select.POLLIN)

    def disconnect(self) -> None:
        """Close the connection to `koitab run`; the job goes on."""
        run = self.run
        connection, run.connection = run.connection, None
        run.backlog.clear()
        if connection.fileno() in self.poller.handlers:
            self.poller.close(connection.detach())
        else:
            connection.close()
        for fd in run.streams:
            self.poller.modify(fd, select.POLLIN)


def reset_signals(action) -> None:
    """In a child of koid's: give koid's signals this `action`."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                   signal.SIGQUIT, signal.SIGPIPE, signal.SIGIO,
                   signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, action)


def close_all_but(keep: set[int]) -> None:
    """Close all descriptors but these. (Python 3.9 has no quick way to
    close a range of them.)"""
    try:
        fds = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        fds = list(range(1024))
    for fd in set(fds) - keep:
        try:
            os.close(fd)
        except OSError:
            pass            # that was the directory itself


def fork_supervisor(*arguments) -> int:
    """Fork a supervisor; its pid. Raises OSError."""
    daemon = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        Supervisor(daemon, *arguments).serve()
        os._exit(0)
    except BaseException as bug:
        import syslog
        syslog.syslog(syslog.LOG_CRON | syslog.LOG_ERR,
                      f"koid: a supervisor failed: {bug!r}")
    finally:
        os._exit(EXIT_BUG)      # it may never return into koid's code


def run_file(home: str, run: int, most: int = -1) -> bytes:
    """Return what a supervisor has written about a run, `most` bytes of it
    if that is not negative; b"" without a file. Raises OSError."""
    try:
        with open(f"{home}/runs/{run}", "rb") as file:
            return file.read(most)
    except FileNotFoundError:
        return b""


def read_stable_file(home: str, run: int) -> tuple[bytes,
                                                   RunFileHeader | None]:
    """Return the file of a running run, and its header or None.

    The supervisor overwrites the older of two segments, so this reads again
    if it has turned to the other one since then. Raises OSError.
    """
    for _ in range(READ_AGAIN):
        before = parse_header(run_file(home, run, HEADER_BYTES))
        data = run_file(home, run)
        after = parse_header(run_file(home, run, HEADER_BYTES))
        if not before or not after:
            return b"", None
        if (before.segment, before.lost) == (after.segment, after.lost):
            return data, before
    before.first = before.second = 0    # it writes too fast: the head alone
    return data, before


def output_so_far(home: str, run: int) -> bytes:
    """Return the frames that a running run has written. Raises OSError."""
    data, header = read_stable_file(home, run)
    return stored_frames(data, header) if header else b""


# ==========================================================================
# Jobs: which jobs exist, and whose are they?                   (files; R C)
#
# Every tab of this host is read here, and read again when it has changed. The
# jobs of all of them form the tab registry; a name leads to a job through
# `match_jobs`, and the arguments of a run are checked by the job's parameters.
# ==========================================================================

LONGEST_ARGS = 262_144          # bytes of all arguments of a run together


class ScheduledJob:
    """A job of a tab as koid runs it: for which user, and when next.

    `key` names it in the history. `delay` are the minutes of RANDOM_DELAY,
    `text` is a checksum of schedule and command.
    """

    def __init__(self, job: Job, file: TabFile, delay: int):
        self.job, self.file = job, file.path
        self.user = storable(job.user or file.user)
        self.identity = storable("\0".join(job.identity()))
        self.line = job.line
        self.schedule, self.settings = job.schedule, job.settings
        self.due: float | None = 0.0    # 0: not computed; None: never
        self.delay = delay
        self.key = self.user, self.identity
        self.text = str(stable_random(f"{job.when}\0{job.command}"))
        self.after = self.user, storable("\0".join(job.after))

    @property
    def content(self) -> tuple[str, str, str]:
        """Its file, text and assignments, as the history keeps them."""
        return storable(self.file), self.text, self.job.assignments


class TabRegistry:
    """The jobs, time zones and problems of all tabs on this host.

    `files` and `tabs` go by path; a file of cron's has its text, too. A tab
    whose file has the same version is not read again; `version` is that of
    all files together.
    """

    def __init__(self, machine: Machine, home: str, system: bool):
        self.machine, self.home, self.system = machine, home, system
        self.files: dict[str, TabFile] = {}
        self.tabs: dict[str, Tab] = {}
        self.zones: dict[str, Zone] = {"": UTC}
        self.scheduled_jobs: list[ScheduledJob] = []
        self.problems: list[str] = []
        self.pauses: dict[tuple, int] = {}      # those of the RunStore
        self.version: tuple = ()
        self.links = False      # a tab of the system is a symbolic link

    def load(self) -> bool:
        """Read what has changed; return False if nothing has. A tab that
        cannot be read any more goes on as it was."""
        try:
            files = {file.path: file for file in self.machine.tab_files(
                self.home, self.system, self.files)}
        except OSError as error:
            self.version = ()
            self.problems = [f"{error.filename}: {error.strerror}; the tabs "
                             "go on as they were"]
            return True
        version = (
            sorted((path, file.version) for path, file in files.items()),
            self.machine.file_version(LOCAL_ZONE))
        if version == self.version:
            return False
        self.problems = []
        tabs = {path: self.read_tab(file) for path, file in files.items()}
        self.tabs = {path: tab for path, tab in tabs.items() if tab}
        self.files = {path: file.replace(text=file.text and "")
                      if path.startswith(f"{self.home}/tabs/") else file
                      for path, file in files.items()}
        self.rebuild()
        self.links = any(file.system and os.path.islink(path)
                         for path, file in files.items())
        self.version = version
        return True

    def read_tab(self, file: TabFile) -> Tab | None:
        """Return the tab in a file, or the last one if it cannot be read
        now; None if it must not be used."""
        before = self.tabs.get(file.path)
        if before and file is self.files.get(file.path):
            return before
        try:
            if file.text is None:
                raise ValueError(file.problem)
            user = file.user or "root"
            return parse_tab(file.text, file.system, user == "root",
                             self.machine.salt(user),
                             not file.path.startswith(f"{self.home}/tabs/"),
                             file.path)
        except Exception as why:        # the other tabs go on
            self.problems.append(f"{file.path}: not used: {why}")
            return None if file.problem.startswith(UNBELIEVED) else before

    def invalidate(self) -> None:
        """Let the next `load` read all tabs again."""
        self.files, self.version = {}, ()

    def rebuild(self) -> None:
        """Collect the jobs, zones and problems of all tabs."""
        try:
            zones = {"": self.machine.local_zone()}
        except Error as error:
            zones = {"": UTC}
            self.problems.append(f"TZ: {error.message}; UTC is used")
        scheduled_jobs: list[ScheduledJob] = []
        for path, tab in self.tabs.items():
            self.problems += [problem.text(path) for problem in tab.errors()]
            for name, (line, column) in tab.zones.items():
                try:
                    zones[name] = zones.get(name) or self.machine.zone(name)
                except Error as error:
                    self.problems.append(f"{path}:{line}:{column}: "
                                         f"{error.message}")
            for to in {job.environment.get("MAILTO") for job in tab.jobs}:
                if to and not safe_address(to):
                    self.problems.append(
                        f"{path}: output is not mailed: MAILTO is not "
                        f"{short(to)} (an address, without $ or blanks)")
            scheduled_jobs += [
                ScheduledJob(job, self.files[path],
                             random_delay(job, self.machine.host()))
                for job in tab.jobs if job.settings.zone in zones]
        self.zones = zones
        self.scheduled_jobs = only_first(scheduled_jobs, self.problems)

    def next_start(self, scheduled: ScheduledJob, now: int) -> float | None:
        """Return when a job starts next after `now`, seconds since 1970."""
        if not scheduled.schedule:
            return None
        zone = self.zones[scheduled.settings.zone]
        until = self.paused_until(scheduled, now)
        if until is not None:
            if not until:
                return None
            now = until - 1
        due = next(unskipped_starts(scheduled.job, zone, now), None) \
            if scheduled.settings.skip else scheduled.schedule.next(now, zone)
        return due and due + scheduled.delay * MINUTE

    def paused_until(self, scheduled: ScheduledJob, now: float) -> int | None:
        """Return the end of the job's pause, 0 for one without end; None if
        the job is not paused at `now`."""
        until = self.pauses.get(scheduled.key)
        return until if until == 0 or until and now < until else None

    def find_job(self, user: str, name: str) -> ScheduledJob:
        """Return the one job of a user, "" for all users, that `name` means.
        Raises Error."""
        jobs = {id(scheduled.job): scheduled for scheduled
                in self.scheduled_jobs if user in ("", scheduled.user)}
        found = match_jobs([each.job for each in jobs.values()], name)
        if not found:
            raise Error(f"there is no job {short(name)}")
        users = sorted({jobs[id(job)].user for job in found})
        if len(users) > 1:
            raise Error(f"{short(name)} is a job of {', '.join(users)}",
                        f"koitab -u {users[0]} ...")
        if len({job.tag for job in found}) > 1:
            raise Error(f"{short(name)} is the name of {len(found)} jobs",
                        "use the tag: " + " ".join(job.tag for job in found))
        return jobs[id(found[0])]


# How the problem of a file begins that must not be used: others could have
# written it. After any other problem its last tab goes on.
UNBELIEVED = ("its ", "others may", "it has another", "it is no ",
              "it is a link")


def only_first(scheduled_jobs: list[ScheduledJob],
               problems: list[str]) -> list[ScheduledJob]:
    """Return the jobs without those of one user that are in an earlier file
    as well: the koitab and cron's spool may both have what was moved. The
    others are added to `problems`."""
    seen: dict[tuple, ScheduledJob] = {}
    for scheduled in scheduled_jobs:
        first = seen.setdefault(scheduled.key, scheduled)
        if first is not scheduled:
            problems.append(
                f"{scheduled.file}:{scheduled.line}: not used: the same "
                f"job stands in {first.file}:{first.line}")
    return list(seen.values())


def last_skipped_day(job: Job, zone: Zone, instant: float) -> int | None:
    """Return the last day of the dates in KOI_SKIP that `instant` is in, in
    days since 1970; None if it is in none of them."""
    day = local_day(zone, instant)
    return max((last for first, last in job.settings.skip
                if first <= day <= last), default=None)


def local_day(zone: Zone, instant: float) -> int:
    """Return the local date of an instant in days since 1970."""
    return local_minute(zone, instant) // DAY


def unskipped_starts(job: Job, zone: Zone, after: int):
    """Yield the starts of a scheduled job after an instant, without those on
    a date in KOI_SKIP."""
    is_skipped = True
    while is_skipped:
        is_skipped = False
        for start in job.schedule.iter_starts(after, zone):
            last = last_skipped_day(job, zone, start)
            if last is not None:
                # To the last minute of that day, or years would be searched.
                after = max(start, zone.instant((last + 1) * DAY) - 1)
                is_skipped = True
                break
            yield start


def find_renamed(vanished: list[dict], new: list[ScheduledJob]
                 ) -> list[tuple[dict, ScheduledJob]]:
    """Return which new job is which vanished one, a row of `known_jobs`:
    both have the same user and content, and no other one has."""
    equal: dict[tuple, tuple[list, list]] = {}
    for row in vanished:
        equal.setdefault((row["user"], row["file"], row["text"],
                          row["assignments"]), ([], []))[0].append(row)
    for scheduled in new:
        equal.setdefault((scheduled.user, *scheduled.content), ([], [])
                         )[1].append(scheduled)
    return [(rows[0], jobs[0]) for rows, jobs in equal.values()
            if len(rows) == len(jobs) == 1]


def random_delay(job: Job, host: str) -> int:
    """Return by how many minutes RANDOM_DELAY delays a job on this host. As
    in cronie, one factor for all jobs; here a restart does not change it."""
    factor = stable_random(f"{host}\0delay") % 1000
    return job.settings.random_delay * factor // 1000


def match_jobs(jobs: list, name: str) -> list:
    """Return the jobs that `name` means; all if it is "". Raises Error.

    A job's name counts first, then its line, SECTION/NAME or command, at
    last its tag. `jobs` are Jobs, or have the same attributes: this is how
    koid, koitab and the history find a job.
    """
    found = [job for job in jobs if not name or name == job.name] or [
        job for job in jobs if name in (
            str(job.line), f"{job.section}/{job.name}", job.command)] or [
        job for job in jobs if job.tag == name]
    if name and not found:
        meant = nearest(name, [job.name for job in jobs if job.name])
        raise Error(f"there is no job {short(name)}",
                    f"did you mean {short(meant)}?" if meant else
                    "a job's name, its tag, or its line")
    return found


def check_zones(tab: Tab, machine: Machine) -> dict[str, Zone]:
    """Return the time zones that a tab names, by their names. For each one
    that is missing the tab gets a diagnostic."""
    zones = {}
    for name, (line, column) in tab.zones.items():
        try:
            zones[name] = machine.zone(name)
        except Error as error:
            tab.diagnostics.append(Diagnostic(line, column, "bad setting",
                                           error.message, error.hint))
    tab.diagnostics.sort(key=lambda problem: (problem.line, problem.column))
    return zones


def validate_arguments(job: Job, given: dict) -> dict[str, str]:
    """Return the value of each argument of a job, as given or its default.
    Raises Error for one that is missing, unknown or invalid."""
    params = {param.name: param for param in job.params}
    unknown = [name for name in given if name not in params]
    if unknown:
        raise Error(f"there is no argument {short(str(unknown[0]))}",
                    "it has " + ", ".join(params) if params else
                    "this job has none")
    values = {}
    for name, param in params.items():
        value = given.get(name, param.default)
        if value is None:
            raise Error(f"the argument {short(name)} is missing",
                        f"{name}=VALUE")
        reason = param.value_error(value) if isinstance(value, str) else \
            "it is no text"
        if reason:
            raise Error(f"the argument {short(name)}: {reason}")
        values[name] = value
    if sum(len(value.encode()) for value in values.values()) > LONGEST_ARGS:
        raise Error("the arguments are longer together than "
                    f"{LONGEST_ARGS:,} bytes")
    return values


# ==========================================================================
# LineProtocol: how do other processes talk to koid?        (network; R U C)
#
# koitab and the agent talk to koid over Unix sockets, in JSON objects of one
# line each. Each end bounds the length of a line, and koid never waits for
# the other end: it reads and writes what the socket has and takes.
# ==========================================================================

MOST_RECORDS = 200          # runs in one batch for the dashboard
MOST_FOLLOWED = 100         # runs whose output a dashboard follows
LONGEST_MESSAGE = 2**23     # bytes of a line from the agent
LONGEST_REPLY = 2**28       # bytes of a line from koid
AGENT_SOCKET = 3            # the descriptor of the agent's socket to koid


class LineConnection:
    """One end of a stream socket that carries JSON objects, one in a line.

    Lines of more than `longest` bytes are not read to their end. koid's ends
    do not block; koitab and the agent wait in `read`.
    """

    def __init__(self, sock, longest: int):
        self.sock, self.longest = sock, longest
        self.received, self.unsent = bytearray(), bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> bool:
        """Read what has arrived; False after the last line that may come:
        at the end of the stream, or in a line that is too long. Raises
        OSError."""
        try:
            data = self.sock.recv(65_536)
        except BlockingIOError:
            return True
        self.received += data
        return bool(data) and len(self.received) <= self.longest

    def take_line(self) -> bytes | None:
        """Return the oldest line that was received; None if there is none."""
        end = self.received.find(b"\n")
        if end < 0:
            return None
        line = bytes(self.received[:end])
        del self.received[:end + 1]
        return line

    def read(self) -> dict:
        """Wait for the next line, and return its object. Raises OSError, and
        Error if it is not an object."""
        while True:
            line = self.take_line()
            if line is not None:
                return parse_line(line)
            if not self.receive():
                raise ConnectionAbortedError(
                    errno.ECONNABORTED, "lost the connection")

    def send(self, message: dict, rest: bytes = b"") -> None:
        """Send an object, and the bytes `rest` after its line. What the
        socket does not take now waits for `flush`. Raises OSError."""
        self.unsent += format_line(message) + rest
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes of what waits. Raises OSError."""
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent)
            except BlockingIOError:
                return
            del self.unsent[:sent]

    def close(self) -> None:
        self.sock.close()


def parse_line(line: bytes) -> dict:
    """Return the JSON object in a line. Raises Error.

    Bytes that are not UTF-8 become halves of surrogate pairs, as in the text
    of a tab.
    """
    import json
    try:
        message = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise Error("this is no request") from None
    if not isinstance(message, dict):
        raise Error("this is no request")
    return message


def format_line(message: dict) -> bytes:
    """Return an object as a line of JSON."""
    import json
    return json.dumps(message).encode() + b"\n"


def error_reply(error: Error) -> dict:
    """Return the reply that says why a request was not carried out."""
    return {"error": error.message, "hint": error.hint,
            "status": error.status}


# ==========================================================================
# Scheduler: which run waits, starts, has ended?                (machine; R)
#
# Planner decides which starts are due; Scheduler moves each run from state
# to state: see its docstring. What is about to start is on the disk before
# it starts, so that a koid that is killed here starts nothing twice.
# ==========================================================================

EARLIEST = 1_000_000_000    # a clock before 2001 was never set
WAIT_FOR_CLOCK = 300.0      # seconds that a machine may take to set it
RETRY_FIRST, RETRY_LONGEST = 10.0, 600.0    # seconds between attempts
TRY_AGAIN = 1.0             # seconds until a full process table is tried
KEEP_REMOVED = 30 * DAY     # seconds that the runs of a removed job are kept
FORGET_AT_ONCE, FORGET_PAUSE = 20, 0.1      # runs; seconds until the next
LONG_ENOUGH = 600.0         # seconds after which nobody waits for a run
MOST_QUEUED = 100           # runs of one job that may wait
WRITE_AGAIN = 5.0           # seconds until a full disk is tried again
CHECK_AGAIN = 2.0           # seconds between checks of adopted runs
MOST_MAILERS = 2
MAIL_TIME = 60              # seconds for a sendmail
LONGEST_MAIL_LINE = 900     # bytes of a line in a mail that is not encoded
NOT_MAILED = "by hand"      # the state of the mail of such a run
TRY_LATER = 75              # its status for that; the next koid does
WAITS_FOR_PREVIOUS = "waits for the last run"   # the reason of such a run
LOST = Job(0, "", "(record lost)", "@manual", None, "", "", "", "", (), {},
           Settings())


class DaemonLog:
    """What koid writes to its log, and what is wrong with it now.

    `problems` maps what a problem is about to its text; `koitab status` and
    the dashboard show it until `set_problem` takes it back. "list alice" is
    the business of alice and root alone.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.problems: dict[str, str] = {}

    def log(self, text: str, bad: bool = False) -> None:
        """Write a line to stderr, and to the system's log if root runs
        koid: to one of them if both are the same."""
        if self.machine.has_one_log():
            self.machine.log(text, bad=bad)
            return
        print_log_line(self.machine.clock, f"koid: {text}", sys.stderr)
        if os.geteuid() == 0:
            self.machine.log(text, bad=bad)

    def set_problem(self, about: str, text: str) -> None:
        """Note that something is wrong, and log it if it is news; "" if it
        is not wrong any more."""
        if text and self.problems.get(about) != text:
            self.log(text, bad=True)
        if text:
            self.problems[about] = text
        else:
            self.problems.pop(about, None)


class QueuedRun:
    """A run that is to be started, now or later."""

    def __init__(self, scheduled: ScheduledJob, trigger: str, due: float,
                 requested: float):
        self.run, self.scheduled, self.trigger = 0, scheduled, trigger
        self.text = scheduled.text      # when it was asked for
        self.due, self.requested, self.attempt = due, requested, 1
        self.values: dict[str, str] = {
            param.name: param.default or "" for param in scheduled.job.params}
        self.by_hand = trigger == "manual"  # it, or what it is a retry of
        self.at = 0.0           # ticks before which it does not start
        self.connection = None  # a socket: `koitab run` waits there
        self.known = False      # it has a row in the history
        self.waits_for_previous = False
        self.announced = False  # `koitab run` has its number
        self.full_since = 0.0   # ticks: no process could be started
        self.nonce = ""         # of the request that asks for it

    def announce(self) -> None:
        """Send `koitab run` the number of its run."""
        self.announced = True
        try:
            self.connection.send(format_line({"run": self.run}))
        except OSError:
            pass                # it has ended; the run is recorded anyway

    def obsolete(self, scheduled: ScheduledJob | None) -> str:
        """Return why it must not start; "" if it may. `scheduled` is its job
        as the tabs have it now, None if they have it no more."""
        if not scheduled:
            return "the job was removed"
        return "" if scheduled.text == self.text else "the job was changed"

    def reject(self, why: str) -> None:
        """Notify `koitab run`, if it waits, that the run does not start."""
        if not self.connection:
            return
        end = {"exit": None, "signal": None, "reason": why}
        send_last(self.connection, frame(NOTE, 0, why.encode()) + frame(
            END, 0, format_line(end)) if self.announced
            else format_line(error_reply(Error(why))))
        self.connection = None

    def shown_values(self) -> str:
        """Return the arguments as JSON, without secrets."""
        import json
        return json.dumps({param.name: "******" if param.type == "secret"
                           else self.values[param.name]
                           for param in self.scheduled.job.params})


class RunningRun:
    """A run whose end is not recorded yet. `supervisor` is the pid of koid's
    child, or 0: the koid before this one started it."""

    def __init__(self, run: int, key: tuple, queued: QueuedRun | None,
                 supervisor: int = 0):
        self.run, self.key, self.queued = run, key, queued
        self.supervisor = supervisor
        self.by_hand = bool(queued and queued.by_hand)
        self.reason = ""            # why koid ended it
        self.kill, self.kill_at = 0, FOREVER    # a signal; ticks


def send_last(connection, data: bytes) -> None:
    """Send something short if the other end still listens, and close."""
    try:
        connection.setblocking(False)
        connection.send(data)
    except OSError:
        pass
    connection.close()


def job_environment(scheduled: ScheduledJob, account: Account, host: dict,
                    **more: str) -> dict[str, str]:
    """Return the environment of a job: cron's, and `more`."""
    return {**host, "HOME": account.home, **{
                name: value for name,
                value in scheduled.job.environment.items()
                if name and "=" not in name},
            "LOGNAME": account.name, "USER": account.name, **more}


def launch_spec(queued: QueuedRun, account: Account, host: dict
                ) -> LaunchSpec:
    """Return all that the supervisor of a run needs; `host` is the
    environment that jobs have on this machine."""
    job, values = queued.scheduled.job, queued.values
    more = {f"KOI_ARG_{number}": values[param.name] for number, param
            in enumerate(job.params, start=1)}
    return LaunchSpec(
        queued.run, job.script,
        job.stdin.encode("utf-8", "surrogateescape"),
        job_environment(queued.scheduled, account, host,
                        KOI_RUN=str(queued.run), **more),
        job.settings.timeout, job.settings.nice,
        [values[param.name].encode() for param in job.params
         if param.type == "secret" and values[param.name]],
        queued.connection)


def missed_row(scheduled: ScheduledJob, count: int, due: float,
               why: str) -> tuple:
    """Return the job and the row of `count` starts that were not made."""
    return scheduled, {"trigger": "schedule", "state": "missed", "due": due,
                       "reason": why, "count": count}


def was_rebooted(machine: Machine, store: RunStore) -> bool:
    """Has the machine been booted since a koid last ran? Yes if it cannot
    be known."""
    boot = machine.boot_id()
    return not boot or boot != (store.get_meta("boot") or machine.kept_boot(
        posixpath.dirname(store.path)))


SKIPPED_DATE, PAUSED = "date in KOI_SKIP", "paused"
HELD = (SKIPPED_DATE, PAUSED)   # reasons of starts that are not made


def has_secret(job: Job) -> bool:
    """Is an argument a secret, which is kept nowhere?"""
    return any(param.type == "secret" for param in job.params)


# --- which starts are due? ------------------------------------------------


class Planner:
    """Decides which starts are due. It starts nothing, and writes nothing.

    `state` holds the virtual clocks; None while the machine's clock is not
    set. Starts come as QueuedRuns, those not made as (job, row).
    """

    def __init__(self, machine: Machine, registry: TabRegistry,
                 store: RunStore, log: DaemonLog):
        self.machine, self.clock = machine, machine.clock
        self.registry, self.store, self.log = registry, store, log
        self.state: SchedulerState | None = None
        self.clock_by = 0.0     # ticks until which the clock must be set

    def sample(self) -> ClockSample:
        """Return both clocks as they are now."""
        return ClockSample(self.clock.now(), self.clock.ticks())

    def due(self) -> tuple[list[QueuedRun], list[tuple]]:
        """Return the starts that fell due since the last call, and those
        that a change of the clock skipped."""
        before, now = self.state, self.sample()
        strayed = now.instant - before.sample.instant \
            - now.ticks + before.sample.ticks
        first, jobs = self.next_due(), self.registry.scheduled_jobs
        if abs(strayed) <= 1:
            # Nobody set the clock, so what `next_due` computed holds. `plan`
            # need not look at thousands of jobs of which one is due.
            jobs = [job for job in jobs
                    if job.due is not None and job.due <= now.instant]
        self.state, launches = plan(jobs, before, now, first)
        if abs(strayed) > 1:
            self.log.set_problem("clock", "")
            for scheduled in self.registry.scheduled_jobs:
                scheduled.due = 0.0
        starts = []
        for launch in launches:
            queued = QueuedRun(launch.job, "schedule", launch.due, now.instant)
            if launch.job.delay:
                queued.at = now.ticks + launch.job.delay * MINUTE
            starts.append(queued)
        return starts, [
            missed_row(scheduled, count, due, "the clock was set")
            for scheduled, count, due in self.state.skipped]

    def next_due(self) -> int | None:
        """Return when the first job falls due. What was computed before
        holds until then, unless the clock is set."""
        now = self.state.sample.instant
        soonest = None
        for scheduled in self.registry.scheduled_jobs:
            if scheduled.due is not None:
                if scheduled.due <= now:
                    scheduled.due = next_due(scheduled, self.state)
                    if scheduled.due is None:
                        continue
                if soonest is None or scheduled.due < soonest:
                    soonest = scheduled.due
        return soonest

    def wake_at(self, each_minute: bool) -> float:
        """Return the ticks at which the next job is due; with `each_minute`
        not later than the next minute, because nothing else reports that
        the clock was set or a tab changed."""
        if not self.state:
            return self.clock.ticks() + 5
        seen, due = self.state.sample, self.next_due()
        now, ticks = self.clock.now(), self.clock.ticks()
        if abs(now - seen.instant - ticks + seen.ticks) > 1:
            return seen.ticks + MINUTE - seen.instant % MINUTE
        at = FOREVER if due is None else seen.ticks + due - seen.instant
        if not each_minute:
            return at
        return min(ticks + (now // MINUTE + 1) * MINUTE - now,
                   max(ticks, at))

    # --- at the start

    def begin(self) -> tuple[list[QueuedRun], list[tuple]] | None:
        """Return the starts of this minute, of @reboot and those missed
        while no koid ran; None while the clock cannot be right."""
        now, seen = self.sample(), self.store.noted_time("seen")
        unset = now.instant < max(EARLIEST, seen - MINUTE)
        self.clock_by = self.clock_by or now.ticks + WAIT_FOR_CLOCK
        if unset and now.ticks < self.clock_by:
            self.log.set_problem(
                "clock", "the clock is not set: it shows "
                f"{format_rfc3339(now.instant)}; jobs wait for it, for "
                f"{format_duration(WAIT_FOR_CLOCK)} at most")
            return None
        self.log.set_problem("clock", "" if not unset else
                             "the clock was not set; jobs run by what it "
                             "shows")
        self.state = state_for_zones(now, self.registry.zones)
        starts, rows = [], []
        if seen and not unset:
            self.state = self.state.replace(
                zone_clocks=self.zone_clocks_since(seen))
            starts, rows = self.missed_since(seen, now.instant)
        return starts + self.reboot_starts(now.instant), rows

    def zone_clocks_since(self, seen: float) -> dict[str, ZoneClock]:
        """Return the virtual clocks as the koid before us left them at the
        time `seen`, advanced to now."""
        noted = dict(part.rpartition("=")[::2] for part
                     in self.store.get_meta("dials").split("\n") if part)
        now, zone_clocks = int(self.clock.now()), {}
        for name, zone_clock in self.state.zone_clocks.items():
            virtual, comma, running = noted.get(name, "").partition(",")
            if comma and (virtual + running).replace("-", "").isdigit():
                before = ZoneClock(zone_clock.zone, int(virtual), int(running))
                zone_clock = advance(before, int(seen), now)
            zone_clocks[name] = zone_clock
        return zone_clocks

    def missed_since(self, seen: float, now: float
                     ) -> tuple[list[QueuedRun], list[tuple]]:
        """Return the starts of this very minute, and rows for those before
        it since the time `seen`."""
        starts, rows, minute = [], [], now // MINUTE * MINUTE
        for scheduled in self.registry.scheduled_jobs:
            if not scheduled.schedule or scheduled.key not in self.store.keys:
                continue        # a new job has missed nothing
            zone = self.state.zone_clocks[scheduled.settings.zone].zone
            groups: dict[tuple, tuple] = {}     # -> first start, count
            for number, start in enumerate(
                    scheduled.schedule.iter_starts(int(seen), zone)):
                if start > now or number >= MOST_COUNTED:
                    break
                if start >= minute:
                    starts.append(QueuedRun(scheduled, "schedule", start,
                                            now))
                    continue
                reason = self.held_reason(scheduled, start, start)
                group = reason, local_day(zone, start) if reason else 0
                first, count = groups.get(group, (start, 0))
                groups[group] = first, count + 1
            rows += [missed_row(scheduled, count, first,
                                "koid was not running")
                     for first, count in groups.values()]
        return starts, rows

    def held_reason(self, scheduled: ScheduledJob, now: float,
                    due: float) -> str:
        """Return why a job that is due starts by hand alone; "" if it starts
        by itself."""
        if self.registry.paused_until(scheduled, now) is not None:
            return PAUSED
        zone = self.registry.zones.get(scheduled.settings.zone, UTC)
        return "" if last_skipped_day(scheduled.job, zone, due) is None \
            else SKIPPED_DATE

    def reboot_starts(self, now: float) -> list[QueuedRun]:
        """Return the @reboot starts: one for each boot."""
        marked = self.registry.system and self.machine.mark_reboot()
        if not was_rebooted(self.machine, self.store) or marked \
                or "history" in self.log.problems:
            return []           # without a history it cannot be known
        return [QueuedRun(scheduled, "reboot", now, now) for scheduled
                in self.registry.scheduled_jobs if scheduled.job.when
                == "@reboot"]

    # --- what stays

    def seen_statement(self) -> tuple:
        """Return the statement that keeps up to when all starts were made."""
        zone_clocks = "\n".join(
            f"{name}={zone_clock.virtual},{zone_clock.checked}"
            for name, zone_clock in self.state.zone_clocks.items())
        return ("insert or replace into meta values ('seen', ?), "
                "('dials', ?)", (repr(self.state.sample.instant), zone_clocks))

    def take_zones(self) -> None:
        """Go on with the time zones that the tabs now name, by the files of
        zones as they now are."""
        state = state_for_zones(self.state.sample, self.registry.zones,
                                self.state)
        self.state = state.replace(zone_clocks={
            name: zone_clock.replace(zone=self.registry.zones[name])
            for name, zone_clock in state.zone_clocks.items()})


# --- cron's mail ----------------------------------------------------------


class CronMail:
    """Mails about runs, as cron sends them: two sendmails at a time."""

    def __init__(self, machine: Machine, store: RunStore, log: DaemonLog):
        self.machine, self.store, self.log = machine, store, log
        self.queue: list[tuple] = []    # run, user, to, command, environment
        self.mailers: dict[int, int] = {}   # pid -> run

    def mail_for(self, running: RunningRun, outcome: dict
                 ) -> tuple[tuple | None, str]:
        """Return the mail about a run that has ended, if cron would send
        one, and the state of the run's mail, if it has one."""
        queued, user = running.queued, running.key[0]
        job = queued.scheduled.job if queued else None
        environment = job.environment if job else {}
        to = environment.get("MAILTO", user)
        good = outcome["state"] == "done" and outcome["exit"] == 0
        wrote = outcome.get("bytes") or outcome["state"] == "unstartable"
        # `koitab run` has shown what the run wrote, and its caller asks for
        # the retries. A note of koid's alone is no reason for mail.
        if not wrote or not to or running.by_hand \
                or job and job.mail_failures and good:
            return None, ""
        if not any(os.access(path, os.X_OK) for path in SENDMAILS):
            if os.geteuid() == 0:
                self.machine.log("(CRON) info (No MTA installed, discarding "
                                 "output)")
            return None, ""
        if not safe_address(to):
            self.log.log(f"({user}) UNSAFE MAIL ({to})", bad=True)
            return None, "unsafe address"
        return (running.run, user, to, job.command if job else "",
                environment), "due"

    def adopt(self, scheduled_jobs: dict) -> None:
        """Queue the mail that was due when the koid before us stopped."""
        for row in self.store.runs("r.mail = 'due'"):
            scheduled = scheduled_jobs.get((row["user"], row["identity"]))
            environment = scheduled.job.environment if scheduled else {}
            to = environment.get("MAILTO", row["user"])
            if to and safe_address(to):
                self.queue.append((
                    row["run"], row["user"], to, scheduled.job.command
                    if scheduled else row["label"], environment))

    def send_queued(self, host: dict) -> None:
        """Start sendmails, with the environment `host`."""
        while self.queue and len(self.mailers) < MOST_MAILERS:
            run, *mail = self.queue[0]
            text = output_text(self.store.output(run))
            try:
                pid = os.fork()
            except OSError:
                return
            if not pid:
                send_cron_mail(self.machine, host, *mail, text)
            del self.queue[0]
            self.mailers[pid] = run

    def take_status(self, pid: int, status: int) -> tuple:
        """Return the statement that keeps how a sendmail ended."""
        run = self.mailers.pop(pid)
        code = os.waitstatus_to_exitcode(status)    # negative: a signal
        result = "sent" if code == 0 else "due" if code == TRY_LATER \
            else f"failed (status {code})"
        if code:
            self.log.log(f"(CRON) MAIL (run {run}: got status {code})",
                         bad=True)
        return self.store.update(run, mail=result)


def send_cron_mail(machine: Machine, host: dict, user: str, to: str,
                   command: str, environment: dict, text: bytes) -> None:
    """In a child of koid's: hand a mail to sendmail, as the user whose job it
    was, and exit with its status."""
    status = 1
    try:
        reset_signals(signal.SIG_DFL)
        close_all_but({0, 1, 2})
        os.setsid()
        account = machine.account(user)
        drop_privileges(account)
        message = mail_about(user, machine.host(), to, command, environment,
                             text)
        try:
            os.chdir(account.home)
        except OSError:
            os.chdir("/")
        program = next(path for path in SENDMAILS if os.access(path, os.X_OK))
        import subprocess
        status = subprocess.run(
            [program, "-FCronDaemon", "-i", "-B8BITMIME", "-oem", to],
            input=message, env={**host, "PATH": DEFAULT_PATH,
                                "HOME": account.home, "LOGNAME": user,
                                "USER": user},
            timeout=MAIL_TIME, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL).returncode % 256
    except BaseException as error:
        status = TRY_LATER if isinstance(error, ImportError) else 1
        machine.log(f"({user}) MAIL (not sent: {error})", bad=True)
    finally:
        os._exit(status)


def mail_about(user: str, host: str, to: str, command: str,
               environment: dict, text: bytes) -> bytes:
    """Return the mail about a run, with cron's headers, but not X-Cron-Env:
    that would send what a tab keeps secret."""
    from email import policy
    from email.message import EmailMessage
    sender = environment.get("MAILFROM", "")
    message = EmailMessage(policy=policy.SMTP.clone(linesep="\n"))
    message["From"] = sender if sender and safe_address(sender) \
        else f"{user} (Cron Daemon)"
    message["To"] = to
    message["Subject"] = one_line(f"Cron <{user}@{host}> "
                                  f"{split_percent(command)[0]}")
    message["Auto-Submitted"] = "auto-generated"
    message["Content-Type"] = one_line(environment.get("CONTENT_TYPE", "")) \
        or 'text/plain; charset="utf-8"'
    encoding = one_line(environment.get("CONTENT_TRANSFER_ENCODING", ""))
    # The body is the output as it is, as in cron: the tab says what it means.
    # RFC 5321 has no longer lines, and mailers change CR and NUL.
    if not encoding and (b"\r" in text or b"\0" in text
                         or max(map(len, text.split(b"\n")))
                         > LONGEST_MAIL_LINE):
        from base64 import encodebytes
        encoding, text = "base64", encodebytes(text)
    message["Content-Transfer-Encoding"] = encoding or "8bit"
    message["MIME-Version"] = "1.0"
    return message.as_bytes() + text


def one_line(text: str) -> str:
    """For a header: what would break or steer it becomes a blank."""
    return "".join(each if each.isprintable() else " "
                   for each in text)[:900]


# --- the states of runs ---------------------------------------------------


class Scheduler:
    """Moves each run from state to state, in the history and in memory.

        schedule, by hand, after, catch-up, retry, reboot
          |-- overlap, queue full, paused, KOI_SKIP> skipped (reason)
          |-- not made: no koid, clock set --------> missed
          |-- delay, retry, previous run active ---> queued
          |                 |-- kill, job changed -> skipped
          |                              |-- restart, too late: interrupted
          |                              | start_queued
          +-----------------------------------> running
             restart, never begun:  by schedule  -> missed
                                    else         -> interrupted
             no user, shell or process           -> unstartable
             supervisor killed, machine rebooted -> interrupted
             supervisor reports the end          -> done

    A run is in `waiting` while it is queued, in `running` until its end is
    reported, and in `unrecorded_ends` until that is in the history. Its
    file is then removed. `adopt_runs` does the same after a restart.
    """

    def __init__(self, machine: Machine, home: str, registry: TabRegistry,
                 store: RunStore, log: DaemonLog):
        self.machine, self.home, self.clock = machine, home, machine.clock
        self.registry, self.store, self.log = registry, store, log
        self.planner = Planner(machine, registry, store, log)
        self.mail = CronMail(machine, store, log)
        self.waiting: list[QueuedRun] = []
        self.running: dict[int, RunningRun] = {}
        self.supervisors: dict[int, int] = {}   # pid -> run
        self.ended: dict[int, int] = {}     # run -> wait status, or NO_STATUS
        self.unrecorded_ends: list[tuple] = []      # (RunningRun, status)
        self.files_to_remove: list[int] = []    # of runs, once written
        self.deferred_statements: list[tuple] = []  # written with the next
        self.pending_kills: list[tuple] = []    # (ticks, a group's leader)
        self.held: dict[tuple, tuple] = {}  # job, reason -> day, run, count
        self.write_at = 0.0                 # ticks, after a full disk
        self.check_at = FOREVER             # ticks: adopted runs
        self.forget_at = FOREVER            # ticks: runs of removed jobs

    def open(self) -> None:
        """Open what supervisors inherit. Raises OSError."""
        self.runs = os.open(f"{self.home}/runs", os.O_RDONLY
                            | os.O_DIRECTORY | os.O_CLOEXEC)
        self.nothing, end = os.pipe()       # what a job without input reads
        os.close(end)
        self.reports, self.report = os.pipe()
        for fd in (self.reports, self.report):
            os.set_blocking(fd, False)
        self.host = self.machine.host_environment()

    def write(self, statements: list[tuple]) -> bool:
        """Write to the history, and remove files that it makes needless;
        False while the disk is full. Raises Error if the disk fails."""
        written = self.store.write(statements)
        self.log.set_problem("disk", self.store.problem)
        if written:
            for run in self.files_to_remove:
                remove(str(run), self.runs)
            self.files_to_remove.clear()
        return written

    def wake_at(self) -> float:
        """Return the ticks at which a run waits for something."""
        times = [self.check_at, self.forget_at]
        times += [queued.at for queued in self.waiting
                  if not queued.waits_for_previous]
        times += [running.kill_at for running in self.running.values()]
        times += [at for at, _ in self.pending_kills]
        if self.store.waiting:
            times.append(self.write_at)
        return min(times)

    def running_counts(self) -> dict[tuple, int]:
        """Return how many runs of each job are running."""
        counts: dict[tuple, int] = {}
        for running in self.running.values():
            counts[running.key] = counts.get(running.key, 0) + 1
        return counts

    def user_of(self, run: int) -> str | None:
        """Return whose run is queued or running; None if it is neither."""
        if run in self.running:
            return self.running[run].key[0]
        return next((queued.scheduled.user for queued in self.waiting
                     if queued.run == run), None)

    def problems_of(self, user: str) -> list[str]:
        """Return what is wrong, as far as it is this user's business; "":
        everything."""
        return [*(text for about, text in self.log.problems.items()
                  if not user or about.partition(" ")[2] in ("", user)), *(
            text for text in self.registry.problems if not user
            or text.startswith(tuple(f"{directory}/{user}:" for directory in (
                f"{self.home}/tabs", *SPOOLS))))]

    def late(self) -> list[tuple]:
        """Return key and label of the jobs that should have started by now,
        and wait."""
        return [(queued.scheduled.key, queued.scheduled.job.label)
                for queued in self.waiting if self.late_reason(queued)]

    # --- due: a row, then a process

    def start_due(self) -> None:
        """Start what fell due; what was missed, once the clock is set."""
        if self.planner.state:
            starts, rows = self.planner.due()
            if starts or rows:
                self.record_and_start(starts, rows)
            return
        begun = self.planner.begin()
        if begun:
            self.deferred_statements.append(
                self.store.set_meta("boot", self.machine.boot_id()))
            self.machine.keep_boot(self.home)
            self.record_and_start(*begun)
            self.record_jobs()

    def rename_jobs(self) -> None:
        """Let jobs that were renamed keep their runs and their history.
        While the disk is full they begin anew."""
        if self.store.waiting:
            return
        known, statements = self.store.known_jobs(), []
        present = {scheduled.key for scheduled
                   in self.registry.scheduled_jobs}
        for row, scheduled in find_renamed(
                [row for key, row in known.items()
                 if key not in present and not row["removed"]],
                [scheduled for scheduled in self.registry.scheduled_jobs
                 if scheduled.key not in known]):
            statements += self.store.rename_job(row, scheduled.key,
                                                scheduled.job)
            self.rename_runs((row["user"], row["identity"]), scheduled)
        self.write(statements)

    def rename_runs(self, before: tuple, scheduled: ScheduledJob) -> None:
        """Give the runs of the job with the key `before` to another one."""
        runs = [*self.running.values(), *(
            running for running, _ in self.unrecorded_ends)]
        for running in runs:
            if running.key == before:
                running.key = scheduled.key
        for queued in [*self.waiting, *(running.queued for running in runs
                                        if running.queued)]:
            if queued.scheduled.key == before:
                queued.scheduled = scheduled

    def record_jobs(self) -> None:
        """Keep which jobs there are: only those can have missed a start when
        the next koid comes. Runs of others are removed in the end."""
        statements, present = self.seen_statements(), {}
        for scheduled in self.registry.scheduled_jobs:
            present[self.store.job_key(scheduled.key, scheduled.job,
                                       statements)] = scheduled.content
        now = self.clock.now()
        statements += self.store.note_jobs(present,
                                           now if now > EARLIEST else 0.0)
        self.write(statements)
        self.forget_at = 0.0

    def forget_removed(self, now: float) -> None:
        """Remove some runs of jobs that were removed long ago; the next step
        is soon, or tomorrow if there is nothing more."""
        statements = [] if self.store.waiting else self.store.forget_removed(
            self.clock.now() - KEEP_REMOVED, FORGET_AT_ONCE)
        self.forget_at = now + (FORGET_PAUSE if statements else DAY)
        self.write(statements)

    def seen_statements(self) -> list[tuple]:
        """Return what each transaction writes about the starts made."""
        return [self.planner.seen_statement()] if self.planner.state else []

    def record_and_start(self, starts: list[QueuedRun],
                         rows: list = ()) -> None:
        """Write down what is to be started and what was not, then start."""
        statements = self.seen_statements() + self.deferred_statements
        self.deferred_statements = []
        for scheduled, row in rows:
            reason = self.planner.held_reason(scheduled, row["due"],
                                              row["due"])
            if reason:
                statements.append(self.held_statement(
                    scheduled, {**row, "state": "skipped", "reason": reason},
                    statements))
                continue
            statements.append(self.new_run(scheduled, row, statements))
            if row["state"] == "missed" \
                    and scheduled.settings.catchup == "yes":
                starts.append(QueuedRun(scheduled, "catch-up", row["due"],
                                        self.clock.now()))
        ready = self.admit_all(starts, statements)
        if not self.write(statements):
            refused = [queued for queued in starts if self.refuse(queued)]
            ready = [queued for queued in ready if queued not in refused]
        for queued in starts:
            if queued.connection and not queued.announced:
                queued.announce()
        self.start_runs(ready)

    def admit_all(self, starts: list[QueuedRun],
                  statements: list) -> list[QueuedRun]:
        """Return the runs that begin now. The statements that keep the state
        of each of `starts` are added to `statements`."""
        ready, counts = [], self.running_counts()
        for queued in starts:
            state, reason = self.admit(queued, counts)
            if state == "running":
                ready.append(queued)
                counts[queued.scheduled.key] = counts.get(
                    queued.scheduled.key, 0) + 1
            statements.append(self.state_statement(queued, state, reason,
                                                   statements))
        return ready

    def admit(self, queued: QueuedRun, counts: dict) -> tuple[str, str]:
        """Return the state in which a run begins, and why if it is not
        "running". `counts` are the active runs of each job."""
        scheduled, now = queued.scheduled, self.clock.now()
        held = not queued.by_hand and self.planner.held_reason(
            scheduled, now, queued.due if queued.trigger == "schedule"
            else now)
        if held:
            return "skipped", held
        if queued.at > self.clock.ticks():
            self.waiting.append(queued)
            return "queued", ""
        policy = scheduled.settings.overlap
        if policy == "allow" or not counts.get(scheduled.key):
            return "running", self.late_reason(queued)
        waiting = sum(other.scheduled.key == scheduled.key
                      for other in self.waiting)
        if policy == "skip" or waiting >= MOST_QUEUED:
            queued.reject("the last run is still going")
            return "skipped", "the last run was still going" if \
                policy == "skip" else f"{waiting} runs were waiting"
        if policy == "replace":
            self.kill_others(scheduled.key)
        queued.waits_for_previous = True
        self.waiting.append(queued)
        return "queued", WAITS_FOR_PREVIOUS

    def held_statement(self, scheduled: ScheduledJob, row: dict,
                       statements: list) -> tuple:
        """Return the statement that counts starts that are held in the row
        of the job's day, or adds that row."""
        key, count = (*scheduled.key, row["reason"]), row["count"]
        zone = self.registry.zones.get(scheduled.settings.zone, UTC)
        if key not in self.held:        # the koid before us may have a row
            for run in self.store.runs(
                    "r.job = ? and r.state = 'skipped' and r.reason = ? "
                    "order by r.id desc limit 1",
                    self.store.keys.get(scheduled.key, 0), row["reason"]):
                self.held[key] = (local_day(zone, run["due"] or 0.0),
                                  run["run"], run["count"])
        day, run, before = self.held.get(key, (None, 0, 0))
        if day == local_day(zone, row["due"]):
            count += before
            statement = self.store.update(run, count=count)
        else:
            statement = self.new_run(scheduled, row, statements)
            run = self.store.last
        self.held[key] = local_day(zone, row["due"]), run, count
        return statement

    def kill_others(self, key: tuple) -> None:
        """KOI_OVERLAP=replace: end all runs of a job."""
        runs = [queued.run for queued in self.waiting
                if queued.scheduled.key == key and queued.waits_for_previous]
        runs += [running.run for running in self.running.values()
                 if running.key == key]
        for run in runs:
            self.kill(run, "replaced by the next run")

    def late_reason(self, queued: QueuedRun) -> str:
        """Return by how much a run is later than KOI_START_WITHIN allows;
        "" if it is not."""
        within = queued.scheduled.settings.start_within
        delay = queued.scheduled.delay * MINUTE \
            if queued.trigger == "schedule" else 0
        behind = self.clock.now() - queued.due - delay
        return f"late by {format_duration(int(behind))}" \
            if within and behind > within else ""

    def state_statement(self, queued: QueuedRun, state: str, reason: str,
                        statements: list) -> tuple:
        """Return the statement that keeps the state of a run, which gets its
        number here; what must precede it is added to `statements`."""
        started = self.clock.now() if state == "running" else None
        if queued.known:
            return self.store.update(queued.run, state=state, reason=reason,
                                     started=started)
        if state == "skipped" and reason in HELD:
            return self.held_statement(queued.scheduled, {
                "trigger": queued.trigger, "state": state, "reason": reason,
                "due": queued.due, "count": 1}, statements)
        queued.known = True
        statement = self.new_run(queued.scheduled, {
            "trigger": queued.trigger, "state": state, "due": queued.due,
            "requested_at": queued.requested, "started": started,
            "reason": reason, "args": queued.shown_values(),
            "attempt": queued.attempt,
            "mail": NOT_MAILED if queued.by_hand
            and queued.trigger == "retry" else ""}, statements)
        queued.run = self.store.last
        if queued.nonce:
            statements += self.store.record_nonce(
                queued.nonce, queued.requested, queued.run)
        return statement

    def new_run(self, scheduled: ScheduledJob, row: dict,
                statements: list) -> tuple:
        """Return the statement that adds a run, with the next number."""
        self.store.last += 1
        key = self.store.job_key(scheduled.key, scheduled.job, statements)
        if row["state"] in ("missed", "skipped"):
            statements += self.store.prune(key, scheduled.settings.keep - 1)
        return self.store.insert({"id": self.store.last, "job": key, **row})

    def refuse(self, queued: QueuedRun) -> bool:
        """On a full disk: a run by hand does not start, one that is due does.
        Return whether it was refused."""
        if queued.trigger != "manual":
            return False
        self.store.waiting.append(self.store.update(
            queued.run, state="unstartable", started=None,
            ended=self.clock.now(), reason="it could not be recorded"))
        if queued in self.waiting:
            self.waiting.remove(queued)
        queued.reject(f"the run cannot be recorded: {self.store.problem}")
        return True

    def start_queued(self) -> None:
        """Start what has waited long enough, or whose turn has come."""
        if not self.waiting:
            return
        now, counts = self.clock.ticks(), self.running_counts()
        ready = []
        for queued in self.waiting:
            key = queued.scheduled.key
            # A follower starts when its row is on the disk: the end that
            # starts it would be found once more.
            if queued.waits_for_previous and (
                    counts.get(key) or queued.trigger == "after"
                    and self.store.waiting) or queued.at > now:
                continue
            if queued.waits_for_previous:
                counts[key] = counts.get(key, 0) + 1
            ready.append(queued)
        if ready:
            self.waiting = [queued for queued in self.waiting
                            if queued not in ready]
            for queued in ready:
                queued.waits_for_previous, queued.at = False, 0.0
            self.record_and_start(ready)

    def update_waiting(self) -> None:
        """Tabs have changed: what waits gets the settings that its job has
        now, or is dropped if the job was removed or changed."""
        if not self.waiting:
            return
        jobs = {scheduled.key: scheduled
                for scheduled in self.registry.scheduled_jobs}
        statements = []
        for queued in list(self.waiting):
            scheduled = jobs.get(queued.scheduled.key)
            reason = queued.obsolete(scheduled)
            if reason:
                statements.append(self.drop(queued, reason))
            else:
                queued.scheduled = scheduled
        self.write(statements)

    def drop(self, queued: QueuedRun, reason: str) -> tuple:
        """Let a run that waits not start; return the statement for that."""
        self.waiting.remove(queued)
        queued.reject(reason)
        return self.store.update(queued.run, state="skipped", reason=reason)

    # --- processes

    def start_runs(self, starts: list[QueuedRun]) -> None:
        """Give each run a supervisor, or record why it cannot start."""
        accounts: dict[str, Account | None] = {}
        unstartable = []
        for queued in starts:
            user = queued.scheduled.user
            try:
                if user not in accounts:
                    accounts[user] = self.machine.account(user)
                if not accounts[user]:
                    raise ValueError(f"there is no user {user}")
                if self.machine.is_expired(user):
                    raise ValueError(f"the account of {user} has expired")
                spec = launch_spec(queued, accounts[user], self.host)
            except Exception as error:      # one job's; the others start
                unstartable.append(self.unstartable(queued, str(error)))
                continue
            self.start_supervisor(accounts[user], spec, queued)
        if unstartable:
            self.write(unstartable)
        self.log_starts(starts)

    def start_supervisor(self, account: Account, spec: LaunchSpec,
                         queued: QueuedRun) -> None:
        """Fork the supervisor of one run."""
        try:
            pid = fork_supervisor(account, spec, self.runs, self.report,
                                  self.nothing)
        except OSError as error:
            self.delay_start(queued, error)
            return
        self.log.set_problem("fork", "")
        self.supervisors[pid] = queued.run
        self.running[queued.run] = RunningRun(
            queued.run, queued.scheduled.key, queued, pid)
        if queued.connection:
            queued.connection.close()
            queued.connection = None

    def log_starts(self, starts: list[QueuedRun]) -> None:
        """Log the starts as cron does, if root runs koid."""
        for queued in starts if os.geteuid() == 0 else ():
            if queued.run in self.running \
                    and not queued.scheduled.job.unlogged:
                self.machine.log(f"({queued.scheduled.user}) CMD "
                                 f"({queued.scheduled.job.command})", "CRON")

    def delay_start(self, queued: QueuedRun, error: OSError) -> None:
        """Try again in a second while the process table is full, for
        TRY_FOR seconds."""
        now = self.clock.ticks()
        self.log.set_problem("fork", "no process could be started: "
                             f"{error.strerror}")
        queued.full_since = queued.full_since or now
        if now - queued.full_since > TRY_FOR:
            self.write([self.unstartable(
                queued, f"could not start: {error.strerror}")])
        else:
            queued.at = now + TRY_AGAIN
            self.waiting.append(queued)

    def unstartable(self, queued: QueuedRun, why: str) -> tuple:
        """Return the statement that records why a run could not start."""
        why = storable(why)
        queued.reject(why)
        self.log.log(f"({queued.scheduled.user}) ERROR ({why})", bad=True)
        self.deferred_statements += self.store.prune(
            self.store.keys[queued.scheduled.key],
            queued.scheduled.settings.keep)
        return self.store.update(
            queued.run, state="unstartable", reason=why, started=None,
            ended=self.clock.now())

    # --- ends

    def read_reports(self) -> None:
        """Take from the pipe how runs ended, as their supervisors say."""
        try:
            data = os.read(self.reports, CHUNK // REPORT.size * REPORT.size)
        except BlockingIOError:
            return
        for run, status in REPORT.iter_unpack(data):
            if status == NO_FILE:   # or it would pass for one not begun
                self.write([self.store.update(run, reason=NO_FILE_REASON)])
            else:
                self.ended[run] = status

    def supervisor_ended(self, pid: int) -> None:
        """Handle the end of a child that may have been a supervisor."""
        running = self.running.get(self.supervisors.pop(pid, 0))
        if running and running.run not in self.ended:
            if self.has_ended(running):
                self.ended[running.run] = NO_STATUS
            else:       # the koid before us had started it already
                running.supervisor, self.check_at = 0, 0.0

    def check(self, now: float) -> None:
        """Check adopted runs, and send the signals that are due."""
        if now >= self.check_at:
            self.check_at = FOREVER
            for running in self.running.values():
                if not running.supervisor:
                    self.check_at = now + CHECK_AGAIN
                    if self.has_ended(running):
                        self.ended.setdefault(running.run, NO_STATUS)
        if now >= self.forget_at:
            self.forget_removed(now)
        for running in list(self.running.values()):
            if now >= running.kill_at:
                self.escalate_kill(running, now)
        for at, pid in [each for each in self.pending_kills if now >= each[0]]:
            self.pending_kills.remove((at, pid))
            end_group(pid, signal.SIGKILL)

    def has_ended(self, running: RunningRun) -> bool:
        """Has a run ended whose supervisor is not our child?"""
        try:
            header = parse_header(run_file(self.home, running.run,
                                           HEADER_BYTES))
        except OSError:
            return False        # too many files are open; later
        return not header or header.phase in (ENDED, UNSTARTABLE) \
            or process_start_time(header.supervisor) != header.supervisor_start

    def collect_finished(self) -> None:
        """Move runs that have ended into the history. While it cannot be
        written they stay in their files."""
        now = self.clock.ticks()
        for run, status in self.ended.items():
            running = self.running.pop(run, None)
            if running:
                self.unrecorded_ends.append((running, status))
        if self.ended:
            self.start_queued()
        self.ended.clear()
        if self.store.waiting and now >= self.write_at:
            self.write_at = now + WRITE_AGAIN
            self.write([])
        if self.unrecorded_ends and not self.store.waiting:
            self.record_ends()

    def record_ends(self) -> None:
        """Write the ends of runs, their output, retries and mails."""
        statements, retries, mails, starts = [], [], [], []
        ends, self.unrecorded_ends = self.unrecorded_ends, []
        for running, status in ends:
            of_run: list[tuple] = []
            try:
                starts += self.record_end(running, status, of_run, retries,
                                          mails)
            except OSError as error:    # too many files are open
                self.log.set_problem(
                    "ends", f"a run's end cannot be read: {error}")
                self.unrecorded_ends.append((running, status))
                self.check_at = min(self.check_at, self.clock.ticks() + 1)
            except Exception as bug:    # of ours, with this run alone
                self.log.set_problem("bug", f"run {running.run}: {bug!r}")
                of_run = [self.store.update(
                    running.run, state="interrupted",
                    reason="koid failed on its end")]
            else:
                self.files_to_remove.append(running.run)
            statements += of_run
        ready = self.admit_all(starts, statements)
        self.waiting += retries
        if self.write(statements):
            self.mail.queue += mails
            self.start_runs(ready)
            return
        for queued in ready:
            queued.waits_for_previous = True
        self.waiting += ready

    def record_end(self, running: RunningRun, status: int, statements: list,
                   retries: list, mails: list) -> list[QueuedRun]:
        """Add the statements, the retry and the mail of one run's end to the
        lists; return the runs of jobs that follow. Raises OSError."""
        outcome, frames = self.outcome(running, status)
        statements += self.end_statements(running, outcome, frames)
        retry = self.retry_of(running, outcome)
        if retry:
            statements.append(self.state_statement(retry, "queued", "",
                                                   statements))
            retries.append(retry)
            return []
        mail, state = self.mail.mail_for(running, outcome)
        if mail:
            mails.append(mail)
        if state:
            statements.append(self.store.update(running.run, mail=state))
        if running.by_hand or outcome["state"] != "done" \
                or outcome["exit"] != 0:
            return []
        now = self.clock.now()
        return [QueuedRun(scheduled, "after", min(outcome["ended"], now), now)
                for scheduled in self.registry.scheduled_jobs
                if scheduled.after == running.key]

    def outcome(self, running: RunningRun, status: int) -> tuple[dict, bytes]:
        """Return how a run ended, as columns of its row, and its output.
        Raises OSError."""
        data = run_file(self.home, running.run)
        header = parse_header(data)
        if not header:
            return self.outcome_without_file(running, status), b""
        if running.kill == signal.SIGKILL and running.kill_at != FOREVER:
            self.pending_kills.append((running.kill_at, header.job))
        frames = stored_frames(data, header)
        exit_status, number = exit_and_signal(header.status) \
            if header.phase == ENDED else (None, None)
        state = {ENDED: "done", UNSTARTABLE: "unstartable"}.get(
            header.phase, "interrupted")
        if header.phase == RUNNING and status != NO_STATUS:
            state = "done"      # a full disk: the end was only reported
            exit_status, number = exit_and_signal(status)
        reason = running.reason or REASONS[header.reason]
        if reason == "timeout" and running.queued:
            limit = running.queued.scheduled.settings.timeout
            reason = f"timeout after {format_duration(limit)}"
        elif state == "interrupted":
            reason = reason or "its supervisor was killed"
        elif state == "unstartable":
            reason = output_text(frames).decode("utf-8", "replace").strip()
        return {"state": state, "exit": exit_status, "signal": number,
                "started": header.started or None,
                "ended": header.ended or self.clock.now(),
                "reason": reason, "bytes": header.total,
                "cut": int(header.lost > 0)}, frames

    def outcome_without_file(self, running: RunningRun, status: int) -> dict:
        """Return the outcome of a run that never began, or that a full disk
        left without a file."""
        exit_status, number = exit_and_signal(status)
        known = exit_status is not None or number is not None
        return {"state": "done" if known else "interrupted",
                "exit": exit_status, "signal": number,
                "ended": self.clock.now(), "reason": running.reason or (
                    "its output could not be kept" if known else
                    "its supervisor was killed")}

    def end_statements(self, running: RunningRun, outcome: dict,
                       frames: bytes) -> list[tuple]:
        """Return the statements that keep a run's end, and prune old runs."""
        columns = {name: value for name, value in outcome.items()
                   if name != "reason" or value}
        statements = [self.store.update(running.run, **columns)]
        if frames:
            statements.append(("insert or replace into output values (?, ?)",
                               (running.run, frames)))
        if running.queued:
            keep = running.queued.scheduled.settings.keep
            statements += self.store.prune(self.store.keys[running.key], keep)
        if outcome["state"] != "done" and os.geteuid() == 0:
            self.log.log(f"({running.key[0]}) ERROR (run {running.run}: "
                         f"{outcome['reason']})", bad=True)
        return statements

    def retry_of(self, running: RunningRun, outcome: dict
                 ) -> QueuedRun | None:
        """Return the next attempt at a run that failed, if KOI_RETRY has one
        left. The pause doubles with each."""
        last = running.queued
        if not last or outcome["state"] != "done" or outcome["exit"] == 0 \
                or running.reason:
            return None
        scheduled = next((each for each in self.registry.scheduled_jobs
                          if each.key == running.key), None)
        if last.obsolete(scheduled) \
                or last.attempt > scheduled.settings.retry:
            return None
        if not running.supervisor and has_secret(scheduled.job):
            return None         # only the koid before us had it
        wait = min(RETRY_FIRST * 2 ** min(last.attempt - 1, 10),
                   RETRY_LONGEST)
        queued = QueuedRun(scheduled, "retry", self.clock.now() + wait,
                           self.clock.now())
        queued.at = self.clock.ticks() + wait
        queued.attempt, queued.values = last.attempt + 1, last.values
        queued.by_hand = last.by_hand
        return queued

    # --- killing

    def kill(self, run: int, reason: str) -> bool:
        """End a run: SIGTERM, and SIGKILL KILL_AFTER seconds later. False if
        it has ended."""
        queued = next((queued for queued in self.waiting
                       if queued.run == run), None)
        if queued:
            return self.write([self.drop(queued, reason)])
        running = self.running.get(run)
        if not running:
            return False
        running.reason = running.reason or reason
        running.kill = running.kill or signal.SIGTERM
        self.escalate_kill(running, self.clock.ticks())
        return True

    def escalate_kill(self, running: RunningRun, now: float) -> None:
        """Send the signal that is due."""
        try:
            header = parse_header(run_file(self.home, running.run,
                                           HEADER_BYTES))
        except OSError:
            header = None
        if not header or header.phase == CLAIMED:
            running.kill_at = now + 0.05     # it has not begun yet
            return
        self.machine.signal_job(header, running.kill)
        running.kill_at = now + KILL_AFTER if running.kill == signal.SIGTERM \
            else FOREVER
        running.kill = signal.SIGKILL

    # --- after a restart

    def adopt_runs(self) -> None:
        """Take over what the koid before us left: runs that are running,
        that ended since then, and that it had no time to begin."""
        files = {int(name) for name in os.listdir(self.runs)
                 if name.isascii() and name.isdigit()}
        self.store.last = max(files | {self.store.last})
        rows = {row["run"]: row for row in self.store.runs(
            "r.state in ('queued', 'running')")}
        jobs = {scheduled.key: scheduled
                for scheduled in self.registry.scheduled_jobs}
        known = {run for run, in self.store.db.execute(
            "select id from runs")} if files else set()
        self.files_to_remove = [run for run in files if run in known
                                and run not in rows]
        self.adopt_orphans(sorted(files - known))
        lost, before = [], self.store.known_jobs()
        for run, row in rows.items():
            key = row["user"], row["identity"]
            queued = self.queued_of(row, jobs.get(key))
            if queued:
                queued.text = before[key]["text"] or queued.text
            if run in files:
                self.adopt_run(row, queued)
            elif queued and self.may_still_start(row, queued):
                self.waiting.append(queued)
            else:
                lost.append(self.not_begun(row, key in jobs, queued))
        self.write(lost)
        self.update_waiting()
        self.check_at = 0.0 if self.running else FOREVER
        self.mail.adopt(jobs)

    def not_begun(self, row: dict, has_job: bool,
                  queued: QueuedRun | None) -> tuple:
        """Return the statement for a run that will never begin."""
        state, reason = "interrupted", "koid was stopped before it began"
        if row["state"] == "queued" and not queued:
            state, reason = "skipped", "the job was changed" if has_job \
                else "the job was removed"
        elif row["state"] == "running" and row["trigger"] == "schedule":
            state = "missed"
        return self.store.update(row["run"], state=state, started=None,
                                 reason=reason)

    def adopt_run(self, row: dict, queued: QueuedRun | None) -> None:
        """Take over a run that has a file."""
        running = RunningRun(row["run"], (row["user"], row["identity"]),
                             queued)
        running.by_hand = row["trigger"] == "manual" \
            or row["mail"] == NOT_MAILED
        self.running[row["run"]] = running
        if was_rebooted(self.machine, self.store):
            running.reason = "the machine went down"
            self.ended[row["run"]] = NO_STATUS

    def adopt_orphans(self, runs: list[int]) -> None:
        """Take over runs that have a file and no record: the disk was full,
        or the history was lost. They are shown as runs of a removed job."""
        key = self.machine.user_name(os.geteuid()), "lost"
        for run in runs:
            header = parse_header(run_file(self.home, run, HEADER_BYTES)
                                  ) or RunFileHeader()
            statements: list[tuple] = []
            job = self.store.job_key(key, LOST, statements)
            self.write([*statements, self.store.insert({
                "id": run, "job": job, "trigger": "manual",
                "state": "running", "started": header.started or None,
                "reason": "its record was lost", "args": "{}"})])
            self.running[run] = running = RunningRun(run, key, None)
            running.by_hand = True
            if was_rebooted(self.machine, self.store):
                self.ended[run] = NO_STATUS

    def queued_of(self, row: dict,
                  scheduled: ScheduledJob | None) -> QueuedRun | None:
        """Return the run of a row, if its job is still in a tab and has the
        same arguments."""
        if not scheduled or set(row["args"]) != {
                param.name for param in scheduled.job.params}:
            return None
        queued = QueuedRun(scheduled, row["trigger"], row["due"] or 0.0,
                           row["requested_at"] or 0.0)
        queued.run, queued.known = row["run"], True
        queued.values, queued.attempt = row["args"], row["attempt"]
        queued.by_hand = queued.by_hand or row["mail"] == NOT_MAILED
        queued.waits_for_previous = row["reason"] == WAITS_FOR_PREVIOUS
        start = queued.due + (scheduled.delay * MINUTE if row["trigger"]
                              == "schedule" else 0)
        queued.at = self.clock.ticks() + max(0.0, start - self.clock.now())
        return queued

    def may_still_start(self, row: dict, queued: QueuedRun) -> bool:
        """Is it soon enough to begin a run that koid had no time to begin?"""
        if has_secret(queued.scheduled.job):
            return False        # its secrets were kept nowhere
        if row["state"] == "queued":
            return row["trigger"] != "manual" \
                or self.clock.now() - queued.requested < LONG_ENOUGH
        if was_rebooted(self.machine, self.store) \
                or row["reason"] == NO_FILE_REASON:
            return False        # its file did perhaps not reach the disk
        waited = self.clock.now() - (row["started"] or 0.0)
        return waited < (TRY_FOR if row["trigger"] == "schedule"
                         else LONG_ENOUGH)


# ==========================================================================
# ControlSocket: how do users reach koid?              (network, files; R C)
#
# By a Unix socket: the kernel says which uid is at its other end
# (SO_PEERCRED). Users may do all with their own tab, jobs and runs; root and
# the user that runs koid may with anyone's. Where no koid runs, koitab
# answers the same requests from the caller's own files.
# ==========================================================================

LONGEST_REQUEST = 8 * 2**20     # a tab of 1 MiB, each character escaped
REQUEST_TIME = 10.0             # seconds to send one
MOST_CONTROL_CONNECTIONS, MOST_OF_ONE, MOST_AT_ONCE = 256, 64, 16
SPARE_FILES = 40                # descriptors for all but connections
MOST_BYTES_OF_ONE = 2 * LONGEST_REQUEST     # of requests that come in
MOST_ROWS = 1_000
LONGEST_VALUES = 2**20          # characters of arguments in one answer


class Caller(FrozenRecord):
    """The user at the other end, by the uid that the kernel reports."""
    uid: int
    name: str

    @property
    def is_admin(self) -> bool:
        """May the caller act for others, as root and koid's user may?"""
        return self.uid in (0, os.geteuid())


class ControlService:
    """Answers requests: for koid, and for koitab where no koid runs.

    A request is an object with "op", and "user" if another one's tab or jobs
    are meant. A reply is an object; {"error", "hint", "status"} refuses.

        list                  {text, served}: the user's tab, null without
                              one; path -> text of cron's tabs with jobs of
                              the user that koid serves
        install text          {installed, problems}
        remove                {removed}
        jobs                  {jobs}: with the next start and the last run
        history [job limit before]    {runs, more}: the newest first
        log run|job           {run, size}, and the output as frames
        kill run|job          {run}
        pause job [until]     {label}: it starts by hand alone
        resume job            {label}
        status                {version, pid, jobs, running, tab, ...}
        relink                {linked}: the file `keys` was changed
        run job args          {run}, and the output as frames; koid alone

    `daemon` is koid's Daemon, or None.
    """

    def __init__(self, machine: Machine, home: str, registry: TabRegistry,
                 store: RunStore, daemon=None):
        self.machine, self.home, self.registry = machine, home, registry
        self.store, self.daemon = store, daemon
        registry.pauses = store.pauses

    def answer(self, caller: Caller, request: dict) -> tuple[dict, bytes]:
        """Return the reply to a request, and the bytes after it. Raises
        Error."""
        op = request.get("op")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise Error(f"koid knows no request {short(str(op))}",
                        "is it older than koitab? restart it")
        wrong = [name for name, kind in KINDS.items() if name in request
                 and (type(request[name]) is not kind or kind is int
                      and not -LARGEST < request[name] < LARGEST)]
        if wrong:
            raise Error(f"a request's {wrong[0]} has the wrong type")
        reply = OPERATIONS[op](self, caller, request)
        return reply if isinstance(reply, tuple) else (reply, b"")

    def whose(self, caller: Caller, request: dict) -> str:
        """Return the user whose tab is meant. Raises Error if the caller may
        not have it, or that user no tab."""
        user = request.get("user") or caller.name
        if user != caller.name and not caller.is_admin:
            raise Error("must be privileged to use -u")
        if os.geteuid() and user != self.machine.user_name(os.geteuid()):
            raise Error("this koid belongs to an ordinary user, and runs "
                        "jobs for no other")
        if not user or "/" in user or not self.machine.account(user):
            raise Error(f"user `{user}' unknown")
        why = self.machine.access_error(user)
        if why:
            raise Error(f"You ({user}) are not allowed to use this program "
                        f"({PROG})" if user == caller.name else
                        f"The user {user} cannot use this program ({PROG})",
                        f"see {why}")
        return user

    def allowed_user(self, caller: Caller, request: dict) -> str:
        """Return the user whose jobs are meant; "" for all. Raises Error if
        the caller may not see them."""
        if caller.is_admin and not request.get("user"):
            return ""
        user = request.get("user") or caller.name
        if user != caller.name and not caller.is_admin:
            raise Error("must be privileged to use -u")
        if not user:
            raise Error(f"uid {caller.uid} has no name on this host")
        return user

    def job_owner(self, caller: Caller, request: dict) -> str:
        """Return the user whose job a name means: for root, root, unless
        another one is named. Raises Error."""
        return self.allowed_user(caller, request) \
            or self.machine.user_name(os.geteuid())

    # --- tabs

    def listing(self, caller: Caller, request: dict) -> dict:
        """Answer "list". Raises Error."""
        user = self.whose(caller, request)
        file = self.machine.user_tab(self.home, user)
        if file and file.text is None:
            raise Error(f"{file.path}: {file.problem}")
        return {"text": file and file.text, "served": self.served(
            user, caller.is_admin and not request.get("user"))}

    def served(self, user: str, everyone: bool) -> dict[str, str]:
        """Return the text by path of each crontab of cron's that koid serves
        for a user. Of /etc/crontab and /etc/cron.d it has the lines of
        others only if `everyone`."""
        wanted = {scheduled.file for scheduled in self.registry.scheduled_jobs
                  if scheduled.user == user}
        return {path: only_lines_of(user, file.text) if file.system
                and not everyone else file.text
                for path, file in self.registry.files.items() if file.text
                and (path in wanted or everyone and file.system)}

    def install(self, caller: Caller, request: dict) -> dict:
        """Answer "install": write a tab without errors, and take it up.
        Raises Error."""
        user, text = self.whose(caller, request), request.get("text", "")
        why = tab_text_error(text)
        if why:
            raise Error(f"this is no crontab: {why}")
        tab = parse_tab(text, root=user == "root",
                        salt=self.machine.salt(user))
        check_zones(tab, self.machine)
        installed = not tab.errors()
        if installed:
            self.machine.write_tab(self.home, user, text)
            self.reload()
        return {"installed": installed, "problems": [
            vars(problem) for problem in tab.diagnostics]}

    def remove(self, caller: Caller, request: dict) -> dict:
        """Answer "remove". Raises Error."""
        user = self.whose(caller, request)
        removed = self.machine.remove_tab(self.home, user)
        self.reload()
        return {"removed": removed}

    def reload(self) -> None:
        """Take up a tab that has just been written or removed."""
        if self.daemon:
            self.daemon.reload()
        else:
            self.registry.load()

    # --- jobs and runs

    def jobs(self, caller: Caller, request: dict) -> dict:
        """Answer "jobs". Raises Error."""
        user = self.allowed_user(caller, request)
        now = int(self.machine.clock.now())
        counts = self.daemon.scheduler.running_counts() if self.daemon else {}
        return {"jobs": [
            {"tag": scheduled.job.tag, "section": scheduled.job.section,
             "user": scheduled.user, "name": scheduled.job.name,
             "label": scheduled.job.label,
             "when": scheduled.job.when, "words": scheduled.job.describe(),
             "line": scheduled.line, "file": scheduled.file,
             "command": scheduled.job.command,
             "confirm": scheduled.settings.confirm,
             "params": [vars(param) for param in scheduled.job.params],
             "next": self.registry.next_start(scheduled, now),
             "last": self.last_run(scheduled),
             "paused": self.registry.paused_until(scheduled, now),
             "running": counts.get(scheduled.key, 0)}
            for scheduled in self.registry.scheduled_jobs if not user
            or scheduled.user == user]}

    def last_run(self, scheduled: ScheduledJob) -> dict | None:
        """Return the newest run of a job."""
        runs = self.store.runs("r.job = ? order by r.id desc limit 1",
                               self.store.keys.get(scheduled.key, 0))
        return runs[0] if runs else None

    def history(self, caller: Caller, request: dict) -> dict:
        """Answer "history": up to `limit` runs before the run `before`, but
        LONGEST_VALUES characters of arguments at most. Raises Error."""
        user, where, values = self.allowed_user(caller, request), ["1"], []
        if user:
            where.append("j.user = ?")
            values.append(user)
        if request.get("job"):
            keys = self.keys_of(self.job_owner(caller, request),
                                request["job"])
            where.append(f"r.job in ({', '.join(map(str, keys))})")
        if request.get("before"):
            where.append("r.id < ?")
            values.append(request["before"])
        limit = max(1, min(request.get("limit") or 100, MOST_ROWS))
        text = f"{' and '.join(where)} order by r.id desc limit ?"
        runs, size = [], 0
        for run in self.store.each_run(text, *values, limit):
            runs.append(run)
            size += sum(map(len, run["args"].values()))
            if size > LONGEST_VALUES:
                break
        return {"runs": runs, "more": size > LONGEST_VALUES}

    def keys_of(self, user: str, name: str) -> list[int]:
        """Return the numbers in the history of the jobs that a name means,
        removed ones too. Raises Error."""
        from types import SimpleNamespace
        rows = self.store.db.rows(
            "select id, identity, name, section, label as command, '' as line"
            " from jobs where user = ?1 or ?1 = ''", user)
        try:
            return [job.id for job in match_jobs([
                SimpleNamespace(**row, tag=short_hash(row["identity"]))
                for row in rows], storable(name))]
        except Error:           # it has no run yet
            scheduled = self.registry.find_job(user, name)
            return [self.store.keys.get(scheduled.key, 0)]

    def run_of(self, caller: Caller, request: dict, where: str,
               missing: str) -> dict:
        """Return the run that a request names, or the last one of the job
        that it names for which `where` holds. Raises Error, with `missing`
        if there is none."""
        user = self.allowed_user(caller, request)
        if request.get("run"):
            runs = self.store.runs("r.id = ?", request["run"])
            if not runs or user and runs[0]["user"] != user:
                raise Error(f"there is no run {request['run']}",
                            "koitab history")
        else:
            name = request.get("job", "")
            keys = ", ".join(map(str, self.keys_of(
                self.job_owner(caller, request), name)))
            runs = self.store.runs(f"r.job in ({keys}) and {where} order by "
                                   "r.id desc limit 1")
            if not runs:
                raise Error(f"{short(name)} {missing}")
        return runs[0]

    def log(self, caller: Caller, request: dict) -> tuple[dict, bytes]:
        """Answer "log". Raises Error."""
        run = self.run_of(caller, request, "r.started is not null",
                          "has not run yet")
        frames = self.store.output(run["run"])
        if not frames:              # running, or not in the history yet
            try:
                frames = output_so_far(self.home, run["run"])
            except OSError as error:
                raise Error(f"run {run['run']}: {error.strerror}") from None
        return {"run": run, "size": len(frames)}, frames

    def kill(self, caller: Caller, request: dict) -> dict:
        """Answer "kill". Raises Error."""
        run = self.run_of(caller, request, "r.state in ('queued', 'running')",
                          "is not running")
        if not self.daemon.scheduler.kill(run["run"],
                                          f"killed by {caller.name}"):
            raise Error(f"run {run['run']} has ended",
                        f"koitab history {run['tag']}")
        return {"run": run}

    def pause(self, caller: Caller, request: dict) -> dict:
        """Answer "pause" and "resume". Raises Error."""
        scheduled = self.registry.find_job(
            self.job_owner(caller, request), request.get("job", ""))
        until, now = request.get("until", 0), self.machine.clock.now()
        label = scheduled.job.label
        if request["op"] == "resume":
            if self.registry.paused_until(scheduled, now) is None:
                raise Error(f"{short(label)} is not paused")
            until = None
        elif until and until <= now:
            raise Error(f"{format_rfc3339(until)} is in the past")
        statements: list[tuple] = []
        self.store.job_key(scheduled.key, scheduled.job, statements)
        statements.append(self.store.pause(scheduled.key, until))
        written = self.daemon.scheduler.write(statements)
        self.daemon.broker.forget_list()
        if not written:
            raise Error(f"not recorded yet: {self.store.problem}")
        return {"label": label}

    def status(self, caller: Caller, request: dict) -> dict:
        """Answer "status". Raises Error."""
        user, now = self.allowed_user(caller, request), int(
            self.machine.clock.now())
        tab = self.registry.tabs.get(f"{self.home}/tabs/{user or caller.name}"
                                     ) or Tab([], [], {})
        jobs = [scheduled for scheduled in self.registry.scheduled_jobs
                if not user or scheduled.user == user]
        starts = [start for start in (
            self.registry.next_start(scheduled, now)
            for scheduled in jobs) if start]
        running = self.store.runs("r.state = 'running' and (j.user = ?1 or "
                                  "?1 = '') order by r.id limit 1000", user)
        return {
            "version": VERSION, "pid": os.getpid(), "home": self.home,
            "started": self.daemon.started, "system": self.registry.system,
            "jobs": len(jobs), "running": running,
            "next": min(starts, default=None), "late": [
                label for key, label in self.daemon.scheduler.late()
                if not user or key[0] == user],
            "tab": {"user": user or caller.name, "jobs": len(tab.jobs),
                    "problems": [problem.text("tab")
                                 for problem in tab.errors()]},
            "problems": self.daemon.scheduler.problems_of(user),
            "dashboard": self.daemon.broker.shown()
            if caller.is_admin else None}

    def relink(self, caller: Caller, _request: dict) -> dict:
        """Answer "relink". Raises Error."""
        if not caller.is_admin:
            raise Error("only who runs koid can do this")
        self.daemon.broker.load()
        return {"linked": self.daemon.broker.enrollment is not None}


OPERATIONS = {
    "list": ControlService.listing, "install": ControlService.install,
    "remove": ControlService.remove,
    "jobs": ControlService.jobs, "history": ControlService.history,
    "log": ControlService.log,
    "kill": ControlService.kill, "status": ControlService.status,
    "pause": ControlService.pause, "resume": ControlService.pause,
    "relink": ControlService.relink}
KINDS = {"op": str, "user": str, "text": str, "job": str, "run": int,
         "limit": int, "before": int, "until": int, "args": dict}


def only_lines_of(user: str, text: str) -> str:
    """Return the text of a system tab in which only assignments and the
    entries of one user are left; the others are empty lines."""
    lines = {job.line for job in TabReader(text, True, True, "").read().jobs
             if job.user == user}
    return "".join((line if row in lines or parse_assignment(
        line.lstrip(BLANKS)) else "") + "\n" for row, line in enumerate(
            text.split("\n")[:max(lines, default=0)], start=1))


def caller_of(connection, machine: Machine) -> Caller:
    """Return the user at the other end of a Unix socket."""
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = Struct("3i").unpack(connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    else:       # macOS: LOCAL_PEERCRED gives a struct xucred
        uid = Struct("2I").unpack_from(connection.getsockopt(0, 1, 76))[1]
    return Caller(uid % 2**32, machine.user_name(uid))


def near_path(path: str) -> tuple[str, int]:
    """Return a name for a socket's path that is short enough for the kernel
    (108 bytes, unix(7)), and a descriptor to close after its use, or -1."""
    if len(os.fsencode(path)) < 100:
        return path, -1
    directory, _, name = path.rpartition("/")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}", fd


def connect_patiently(connection, path: str) -> None:
    """Connect, though many others do at this moment. Raises OSError."""
    connection.setblocking(False)
    for patience in range(200, -1, -1):
        try:
            return connection.connect(path)
        except BlockingIOError:         # its queue is full
            if not patience:
                raise
            time.sleep(0.05)


class ControlConnection:
    """A connection of a user's to koid, until it is answered.

    `deadline`: the ticks at which koid closes it, whatever it is at.
    """

    def __init__(self, sock, caller: Caller, deadline: float):
        self.lines = LineConnection(sock, LONGEST_REQUEST)
        self.caller, self.deadline = caller, deadline


class ControlServer:
    """koid's end of the control socket.

    A connection carries one request and its reply. `koitab run` keeps its
    connection: the run's number is the reply, and the run's supervisor sends
    the output over it, as frames. Each user may hold MOST_OF_ONE connections
    and MOST_BYTES_OF_ONE bytes of requests and replies; who runs koid, more.
    In a turn of the loop each user has one request carried out.
    """

    def __init__(self, control: ControlService, scheduler: Scheduler,
                 poller: Poller):
        self.control, self.scheduler, self.poller = control, scheduler, poller
        self.machine, self.log = control.machine, scheduler.log
        self.clock = control.machine.clock
        self.connections: dict[int, ControlConnection] = {}
        self.accept_at = FOREVER    # ticks: too many files were open
        self.served: set[int] = set()   # uids, in this turn of the loop
        self.room = MOST_CONTROL_CONNECTIONS

    def listen(self, path: str) -> None:
        """Make the socket. Raises Error."""
        directory, everyone = posixpath.dirname(path), path == ROOT_SOCKET
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
            if everyone:
                os.chmod(directory, 0o755)  # whatever the umask was
            near, fd = near_path(path)
            try:
                os.unlink(path)     # koid has the lock: nobody listens there
            except FileNotFoundError:
                pass
            self.listener = socket.socket(socket.AF_UNIX)
            mask = os.umask(0o111 if everyone else 0o177)
            try:
                self.listener.bind(near)
            finally:
                os.umask(mask)
                if fd >= 0:
                    os.close(fd)
            self.listener.listen(1024)
            self.listener.setblocking(False)
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        self.room = self.machine.open_files() - SPARE_FILES
        self.poller.register(self.listener.fileno(), self.accept)

    def accept(self, _fd: int, _events: int) -> None:
        """Take some new connections. koid must soon see its clock again."""
        for _ in range(MOST_AT_ONCE):
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:    # too many files are open
                self.log.set_problem("visitors",
                                     f"nobody can call: {error.strerror}")
                self.poller.modify(self.listener.fileno(), 0)
                self.accept_at = self.clock.ticks() + TRY_AGAIN
                return
            self.log.set_problem("visitors", "")
            self.add_connection(sock, caller_of(sock, self.machine))

    def add_connection(self, sock, caller: Caller) -> None:
        """Wait for the request of a caller, if there is room for one."""
        same = sum(other.caller.uid == caller.uid
                   for other in self.connections.values())
        if len(self.connections) >= self.room or not caller.is_admin \
                and (same >= MOST_OF_ONE
                     or len(self.connections) >= MOST_CONTROL_CONNECTIONS):
            send_last(sock, format_line(error_reply(Error("koid is busy"))))
            return
        sock.setblocking(False)
        connection = ControlConnection(
            sock, caller, self.clock.ticks() + REQUEST_TIME)
        self.connections[sock.fileno()] = connection
        self.poller.register(sock.fileno(), self.on_ready)

    def on_ready(self, fd: int, _events: int) -> None:
        """Read some of a request, or send some of a reply."""
        connection = self.connections[fd]
        lines = connection.lines
        try:
            if lines.unsent:
                lines.flush()
                if not lines.unsent:
                    self.close_connection(connection)
                return
            if connection.caller.uid in self.served:
                return          # poll() reports the request again at once
            alive = lines.receive()
        except OSError:
            alive = False
        if not alive or self.bytes_of(connection.caller, "received") \
                > MOST_BYTES_OF_ONE:
            self.close_connection(connection)
            return
        line = lines.take_line()
        if line is not None:
            self.served.add(connection.caller.uid)
            self.respond(connection, line)

    def bytes_of(self, caller: Caller, buffer: str) -> int:
        """Return how many bytes wait in the buffers of one user."""
        return sum(len(getattr(other.lines, buffer))
                   for other in self.connections.values()
                   if other.caller.uid == caller.uid)

    def respond(self, connection: ControlConnection, line: bytes) -> None:
        """Carry out a request and begin to send its reply."""
        rest = b""
        try:
            if self.bytes_of(connection.caller, "unsent") > MOST_BYTES_OF_ONE:
                raise Error("koid is busy", "it waits for you to read")
            request = parse_line(line)
            if request.get("op") == "run":
                self.start_manual(connection, request)
                return
            reply, rest = self.control.answer(connection.caller, request)
        except Error as error:
            reply = error_reply(error)
        except Exception as bug:    # of ours; the jobs must not suffer
            self.log.log(f"a request failed: {bug!r}", bad=True)
            reply = error_reply(Error("koid failed on this request: "
                                      f"{type(bug).__name__}"))
        if connection.lines.fileno() not in self.connections:
            return              # a run has it already
        connection.deadline = self.clock.ticks() + LONG_ENOUGH
        self.poller.modify(connection.lines.fileno(), select.POLLOUT)
        connection.lines.unsent += format_line(reply) + rest

    def start_manual(self, connection: ControlConnection,
                     request: dict) -> None:
        """Start a job for a user who waits for its output. Raises Error."""
        if not self.scheduler.planner.state:
            raise Error("the clock is not set", "date")
        user = self.control.job_owner(connection.caller, request)
        given = request.get("args") or {}
        if not isinstance(request.get("job"), str) \
                or not isinstance(given, dict):
            raise Error("a request to run names a job and its arguments")
        scheduled = self.control.registry.find_job(user, request["job"])
        now = self.clock.now()
        queued = QueuedRun(scheduled, "manual", now, now)
        queued.values = validate_arguments(scheduled.job, given)
        queued.connection = self.release(connection)
        self.scheduler.record_and_start([queued])

    def release(self, connection: ControlConnection):
        """Return the socket of a connection, and do not wait for it any
        more."""
        fd = connection.lines.fileno()
        del self.connections[fd]
        self.poller.unregister(fd)
        return connection.lines.sock

    def close_connection(self, connection: ControlConnection) -> None:
        self.release(connection).close()

    def check(self, now: float) -> None:
        """Close what took too long; accept again after a pause. Once in each
        turn of the loop."""
        self.served.clear()
        for connection in list(self.connections.values()):
            if now >= connection.deadline:
                self.close_connection(connection)
        if now >= self.accept_at:
            self.accept_at = FOREVER
            self.poller.modify(self.listener.fileno(), select.POLLIN)

    def wake_at(self) -> float:
        """Return the ticks at which `check` has something to do."""
        return min([self.accept_at, *(
            connection.deadline for connection in self.connections.values())])


class DaemonClient:
    """koitab's way to koid; or to the files, where no koid runs and they are
    the caller's own."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.home = machine.state_directory()
        self.path = machine.socket_path(self.home)
        self.output = b""       # the bytes after the last reply
        if os.geteuid() and "KOI_HOME" not in os.environ \
                and os.path.exists(ROOT_SOCKET):
            self.home, self.path = ROOT_HOME, ROOT_SOCKET

    def connect(self) -> LineConnection | None:
        """Return a connection to koid; None if none answers. Raises
        Error."""
        connection = socket.socket(socket.AF_UNIX)
        near, fd = self.path, -1
        try:
            near, fd = near_path(self.path)
            connect_patiently(connection, near)
            connection.settimeout(30)
            return LineConnection(connection, LONGEST_REPLY)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise Error(f"{self.path}: {error.strerror or error}") from None
        finally:
            if fd >= 0:
                os.close(fd)

    def ask(self, op: str, **fields) -> dict:
        """Return the reply to a request; what comes after it is in `output`.
        Raises Error."""
        lines = self.connect()
        if not lines:
            return self.without_daemon({"op": op, **fields})
        with lines.sock:
            reply = ask_daemon(lines, {"op": op, **fields})
            while op == "log" and lines.receive():
                pass
            self.output = bytes(lines.received)
        return {**reply, "daemon": True}

    def attach(self, job: str, args: dict, user: str = "") -> tuple:
        """Start a run: return its number, its connection, and the first
        bytes of its frames. Raises Error."""
        lines = self.connect()
        if not lines:
            raise self.no_daemon()
        reply = ask_daemon(lines, {
            "op": "run", "job": job, "args": args, "user": user})
        lines.sock.settimeout(None)
        return reply["run"], lines.sock, bytes(lines.received)

    def no_daemon(self) -> Error:
        """Return the error that says how to start koid."""
        has_unit = self.home == ROOT_HOME and any(
            os.path.exists(f"{directory}/koid.service")
            for directory in UNIT_DIRECTORIES)
        return Error("koid is not running", "systemctl start koid"
                     if has_unit else "koid &")

    def without_daemon(self, request: dict) -> dict:
        """Carry out a request on the caller's own files. Raises Error if
        koid alone can."""
        if request["op"] in ("run", "kill", "pause", "resume", "status",
                             "relink"):
            raise self.no_daemon()
        if self.home == ROOT_HOME and os.geteuid():
            raise self.no_daemon()
        if os.path.exists(self.home):
            self.machine.make_home(self.home)
        registry = TabRegistry(self.machine, self.home, False)
        registry.load()
        store = RunStore(f"{self.home}/history.db", writing=False)
        store.open()
        control = ControlService(self.machine, self.home, registry, store)
        uid = os.geteuid()
        reply, self.output = control.answer(
            Caller(uid, self.machine.user_name(uid)), request)
        return {**reply, "daemon": False}


def ask_daemon(lines: LineConnection, request: dict) -> dict:
    """Return koid's reply to a request. Raises Error, also for a reply that
    is one."""
    try:
        try:
            lines.sock.sendall(format_line(request))
        except (BrokenPipeError, ConnectionResetError):
            pass            # it may have sent a reason before it closed
        lines.sock.settimeout(None)     # a run may be recorded late
        reply = lines.read()
    except ConnectionAbortedError:
        raise Error("koid hung up", "its log says why") from None
    except OSError as error:
        raise Error(f"koid does not answer: {error.strerror or error}"
                    ) from None
    if "error" in reply:
        raise Error(reply["error"], reply.get("hint", ""),
                    reply.get("status", 1))
    return reply


# ==========================================================================
# Broker: what may a dashboard ask of koid?          (network, processes; R)
#
# The agent talks to the dashboard; it is a process of its own that runs as
# another user and has neither the host key nor a file of koid's. It may be
# anybody's by now. So koid checks what the agent says as closely as what a
# user says, and verifies each request to run a job by the host key.
# ==========================================================================

AGENT_SECTIONS = ("Common", "LineProtocol", "Client", "Agent")
AGENT_ACCOUNT, AGENT_UID = "koi-agent", 61171   # the uid if it has no account
AGENT_FILES, AGENT_MEMORY = 16, 2**30   # open files; bytes of address space
AGENT_TASKS = 64            # threads of its uid: of all agents on this machine
AGENT_SILENCE = 70.0        # seconds: HOLD, PATIENCE, and 30 more
AGENT_ENVIRONMENT = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8"}
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
PR_CAPBSET_DROP, MOST_CAPABILITIES = 24, 64
RESTART_FIRST, RESTART_LONGEST = 1.0, 60.0  # seconds until it is started again
LOG_AGAIN = 10.0            # seconds between lines about the same thing
MOST_PROBLEMS = 20          # that a dashboard gets
MOST_RECORD_BYTES = 2**20   # of the runs in one batch
LONGEST_PIECE = 2**18       # bytes of output in one reply
LIVE_BYTES = 2**20          # of live output in one reply; and one run's more
BYTES_OF_LIST = 2**22       # of the list of jobs
BYTES_OF_JOB = 1024         # in it, if it has less: 500 jobs are 500 KiB
BYTES_OF_USER = 500 * BYTES_OF_JOB      # in it; who runs koid may use all
RECORD_FIELDS = ("run", "change", "user", "tag", "section", "name", "label",
                 "trigger", "state", "due", "requested_at", "started", "ended",
                 "exit", "signal", "reason", "args", "attempt", "count",
                 "bytes", "cut", "size")


def agent_program() -> str:
    """Return the text of the agent's program: the head of this file and the
    sections AGENT_SECTIONS. Raises OSError."""
    with open(__file__, encoding="utf-8") as file:
        head, *rest = file.read().split("# " + "=" * 74 + "\n")
    sections = {intro[2:].partition(":")[0]: body
                for intro, body in zip(rest[::2], rest[1::2])}
    return head + "".join(sections[name] for name in AGENT_SECTIONS)


def agent_account(machine: Machine) -> Account:
    """Return the user that the agent of root's koid runs as. Raises OSError
    if another account has its uid."""
    account = machine.account(AGENT_ACCOUNT)
    if account and account.uid:
        return account.replace(groups=[account.gid])
    other = machine.user_name(AGENT_UID)
    if other:
        raise OSError(errno.EPERM, f"uid {AGENT_UID} belongs to {other}: "
                      f"make an account {AGENT_ACCOUNT}")
    return Account(AGENT_ACCOUNT, AGENT_UID, AGENT_UID, "/", [AGENT_UID])


def forbid_new_privileges() -> None:
    """Let no program that this process executes gain rights: root's process
    before it becomes another user. Linux alone has these calls. Raises
    OSError."""
    if sys.platform != "linux":
        return
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, value: int) -> int:
        return libc.prctl(option, *(
            ctypes.c_ulong(number) for number in (value, 0, 0, 0)))

    if prctl(PR_SET_NO_NEW_PRIVS, 1):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)     # from Linux 4.3 on
    for capability in range(MOST_CAPABILITIES):     # EPERM unless root
        prctl(PR_CAPBSET_DROP, capability)


def execute_agent(program: str, connection: int,
                  account: Account | None) -> None:
    """In a child of koid's: become the agent, or exit.

    `program` is the text on its standard input, and the socket `connection`
    its only other descriptor that leads anywhere.
    """
    import resource
    try:
        reset_signals(signal.SIG_DFL)
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        text, connection = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (
            input_file(program.encode()), connection))
        null = os.open(os.devnull, os.O_WRONLY)
        for fd, number in ((text, 0), (null, 1), (null, 2),
                           (connection, AGENT_SOCKET)):
            os.dup2(fd, number)
        close_all_but({0, 1, 2, AGENT_SOCKET})
        for limit, most in ((resource.RLIMIT_NOFILE, AGENT_FILES),
                            (resource.RLIMIT_AS, AGENT_MEMORY),
                            (resource.RLIMIT_FSIZE, 0),
                            (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (most, most))
        forbid_new_privileges()
        if account:         # a uid that has no other processes
            resource.setrlimit(resource.RLIMIT_NPROC,
                               (AGENT_TASKS, AGENT_TASKS))
            drop_privileges(account)
        os.execve(sys.executable, [sys.executable, "-IS", "-", "koi-agent"],
                  AGENT_ENVIRONMENT)
    except BaseException as error:
        os.write(AGENT_SOCKET, format_line({
            "op": "state", "about": "agent",
            "problem": f"the agent cannot be started: {error}"}))
    finally:
        os._exit(EXIT_BUG)


class AgentProcess:
    """The agent's process: started, restarted after growing pauses, stopped.

    `answer` maps a request of the agent's to its reply. What an exception
    of `answer` says about the agent: it is killed, and started again.
    """

    def __init__(self, machine: Machine, log: DaemonLog, poller: Poller,
                 answer):
        self.machine, self.clock = machine, machine.clock
        self.log, self.poller, self.answer = log, poller, answer
        self.pid, self.lines = 0, None      # a LineConnection
        self.start_at, self.pause = FOREVER, RESTART_FIRST  # ticks; seconds
        self.started = self.heard = 0.0     # ticks; of its last request
        self.problem = ""                   # why there is none
        self.kill_reason = ""               # why koid killed it

    def load_program(self) -> None:
        """Read the agent's text: a later koitab.py may be another one."""
        self.program = agent_program()

    def start(self) -> None:
        """Start the agent, or try again after a pause."""
        pair = ()
        try:
            account = agent_account(self.machine) \
                if os.geteuid() == 0 else None
            ours, theirs = pair = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            self.problem = f"no agent: {error.strerror}"
            self.delay_start()
            for end in pair:
                end.close()
            return
        if not pid:
            execute_agent(self.program + "\nrun_agent()\n", theirs.fileno(),
                          account)
        theirs.close()
        ours.setblocking(False)
        self.pid, self.lines = pid, LineConnection(ours, LONGEST_MESSAGE)
        self.start_at = FOREVER
        self.started = self.heard = self.clock.ticks()
        self.kill_reason = ""
        self.poller.register(ours.fileno(), self.on_ready)

    def delay_start(self) -> None:
        """Start the agent again after a pause, which doubles each time."""
        self.start_at = self.clock.ticks() + self.pause
        self.pause = min(self.pause * 2, RESTART_LONGEST)

    def stop(self) -> None:
        """Kill the agent and close its socket: it has nothing to save."""
        if self.lines:
            fd, self.lines = self.lines.sock.detach(), None
            self.poller.close(fd)
        self.kill("stopped")

    def kill(self, reason: str) -> None:
        """Kill the agent; `reason` ends a sentence about it."""
        if self.pid:            # 0 would mean koid's whole group
            self.kill_reason = self.kill_reason or reason
            os.kill(self.pid, signal.SIGKILL)   # a child until it is reaped

    def check(self, now: float) -> None:
        """Start the agent if that is due; kill one that is frozen."""
        if now >= self.wake_at():
            if self.pid:
                self.heard = now
                self.kill(f"silent for {AGENT_SILENCE:g}s")
            else:
                self.start()

    def wake_at(self) -> float:
        """Return the ticks at which `check` has something to do."""
        return self.heard + AGENT_SILENCE if self.pid else self.start_at

    def ended(self, status: int, wanted: bool) -> None:
        """The process has ended, with this wait status; start it again if it
        is `wanted`."""
        lost, self.pid = self.lines is not None, 0
        self.stop()
        if self.clock.ticks() - self.started > RESTART_LONGEST:
            self.pause = RESTART_FIRST
        if wanted and lost:
            exit_status, number = exit_and_signal(status)
            how = self.kill_reason or (
                f"killed by {signal.Signals(number).name}" if number
                else f"ended with status {exit_status}")
            self.problem = f"agent {how}; restarting in {self.pause:g}s"
            self.log.log(f"dashboard: {self.problem}", bad=True)
            self.delay_start()
        elif wanted:
            self.start_at = 0.0

    def on_ready(self, fd: int, _events: int) -> None:
        """The agent asks, or there is room for the rest of a reply."""
        lines, self.heard = self.lines, self.clock.ticks()
        try:
            if lines.unsent:
                lines.flush()
                if not lines.unsent:
                    self.poller.modify(fd, select.POLLIN)
                return
            alive = lines.receive()
        except OSError:
            alive = False
        line = lines.take_line()
        if not alive or line is not None and lines.received:
            # It has ended (see `ended`), or somebody took it over: the agent
            # waits for a reply before it asks again.
            self.poller.modify(fd, 0)
            self.kill("sent an invalid line" if alive
                      else "closed its connection")
        elif line is not None:
            self.reply(line)

    def reply(self, line: bytes) -> None:
        """Answer one request of the agent's."""
        try:
            self.send(self.answer(parse_line(line)))
        except Exception as bug:        # the jobs must not suffer
            self.log.log("dashboard: invalid request of the agent: "
                         f"{bug!r}", bad=True)
            self.kill("sent an invalid request")

    def send(self, message: dict) -> None:
        """Send the agent a message; the rest of a long one goes later."""
        if not self.lines:
            return
        try:
            self.lines.send(message)
        except OSError:
            pass                # it has ended, as `ended` will report
        if self.lines.unsent:
            self.poller.modify(self.lines.fileno(), select.POLLOUT)


class OutputCursor:
    """How far the output of a run that is followed was sent."""

    def __init__(self) -> None:
        self.position = self.sent = 0


class AgentBroker:
    """What koid gives the agent, and takes from it.

    The agent sends one request at a time, and koid sends one reply to each:

        {"op": "hello"}                 URL, token, host, CA and facts
        {"op": "batch", "after": CHANGE, "most": N, "list_sha": SHA}
                                        runs that changed after CHANGE, and
                                        the signed list of jobs if it is new
        {"op": "output", "run": RUN, "at": BYTE}    a piece of a run's output
        {"op": "live", "runs": {RUN: BYTE}}         new output of active runs
        {"op": "request", "body": TEXT, "mac": HEX} the result of a request
        {"op": "state", "about": STEP, "problem": TEXT, "sent": CHANGE}
                                        {}; koid keeps both

    Between replies koid sends {"news": 1} when a run has changed.
    """

    def __init__(self, scheduler: Scheduler, poller: Poller):
        self.scheduler, self.machine = scheduler, scheduler.machine
        self.registry, self.store = scheduler.registry, scheduler.store
        self.clock, self.log = scheduler.clock, scheduler.log
        self.enrollment: Enrollment | None = None
        self.process = AgentProcess(scheduler.machine, scheduler.log, poller,
                                    self.answer)
        self.verifier: RequestVerifier | None = None
        self.last_change_sent = -1
        self.problems: dict[str, str] = {}  # step of the agent -> text
        self.cursors: dict[int, OutputCursor] = {}
        self.listed: tuple | None = None        # body, MAC, SHA-256
        self.cut_users: set[str] = set()    # of whose jobs it lacks some
        self.scheduled_jobs: dict[tuple, ScheduledJob] = {}
        self.logged: dict[str, float] = {}      # about what -> ticks

    def load(self) -> None:
        """Take the dashboard that the file `keys` names, or none."""
        before = self.enrollment
        try:
            self.enrollment = self.machine.read_enrollment(self.scheduler.home)
            self.log.set_problem("keys", "")
        except Error as error:
            self.enrollment = None
            self.log.set_problem("keys", f"no dashboard: {error}")
        if self.enrollment == before and self.process.pid:
            return
        self.process.stop()
        self.problems.clear()
        self.process.problem = ""
        self.listed, self.process.start_at = None, FOREVER
        if self.enrollment:
            self.begin()
        elif "keys" not in self.log.problems:
            self.store.sent = None      # nothing is kept for a dashboard

    def begin(self) -> None:
        """Start the agent of a dashboard whose keys were just read."""
        began = self.store.began(self.clock.now())
        # No request was signed with these keys before they were made.
        self.verifier = RequestVerifier(
            self.scheduler, self.enrollment,
            began if began >= self.enrollment.since else 0.0)
        first, self.store.sent = self.store.sent is None, self.store.sent or 0
        self.scheduler.write(
            [self.store.set_meta("sent", "0")] if first else [])
        self.process.start_at = 0.0

    def run_once(self, now: float) -> None:
        """Once in each turn of koid's loop: start the agent if it is due,
        and report news to it."""
        process = self.process
        if not process.pid:
            self.last_change_sent = -1
            self.cursors.clear()
        process.check(now)
        if process.lines and not process.lines.unsent \
                and self.store.change != self.last_change_sent:
            self.last_change_sent = self.store.change
            process.send({"news": 1})
        if self.verifier:
            self.verifier.log_refusals(now)

    def agent_ended(self, status: int) -> None:
        """The agent's process has ended, with this wait status."""
        self.process.ended(status, wanted=self.enrollment is not None)

    def forget_list(self) -> None:
        """A tab has changed: the agent gets a new list of jobs."""
        self.listed, self.last_change_sent = None, -1

    def wake_at(self) -> float:
        """Return the ticks at which there is something to do."""
        return min(self.process.wake_at(),
                   self.verifier.wake_at() if self.verifier else FOREVER)

    def shown(self) -> dict | None:
        """Return the connection's state for `koitab status`."""
        problems = dict.fromkeys(
            [self.process.problem, *self.problems.values()])
        return self.enrollment and {
            "url": self.enrollment.url, "name": self.enrollment.name,
            "problems": [text for text in problems if text],
            "unsent": max(0, self.store.change - (self.store.sent or 0)),
            "refused": self.store.refusals()}

    # --- the agent's requests

    def answer(self, request: dict) -> dict:
        """Return the reply to a request of the agent's. Raises an exception
        of any kind if it is invalid."""
        handler = {"hello": self.hello, "batch": self.batch,
                   "output": self.output, "live": self.live,
                   "request": self.request, "state": self.state}[
                       request.get("op")]
        return handler(request)

    def hello(self, _request: dict) -> dict:
        """Return what the agent needs: never the host key."""
        return {"url": self.enrollment.url, "token": self.enrollment.token,
                "ca": self.enrollment.ca, "host": self.enrollment.host,
                "instance": f"{int(self.clock.now() * 1000)}-"
                            f"{os.urandom(4).hex()}",
                "facts": self.facts()}

    def facts(self) -> dict:
        """Return what a dashboard shows about this host."""
        zone, now = self.scheduler.registry.zones[""], self.clock.now()
        return {"epoch": int(self.store.get_meta("epoch") or 0),
                "offset": zone.offset(int(now)), "version": VERSION,
                "zone": self.machine.zone_name(),
                "boot": self.machine.boot_id(),
                "problems": [escape_controls(text)[:300] for text in
                             self.scheduler.problems_of("")[:MOST_PROBLEMS]]}

    def request(self, request: dict) -> dict:
        """Verify a request that a dashboard handed out, and carry it out."""
        return self.verifier.verify_and_run(request)

    def state(self, request: dict) -> dict:
        """Take how the agent is doing, and what the dashboard has."""
        about = request.get("about")
        if about in ("agent", "poll", "send", "skipped"):
            text = escape_controls(str(request.get("problem", ""))[:500])
            # The agent's two connections mostly fail for one reason.
            if text not in self.problems.values():
                self.log_once(about, text)
            self.process.problem = ""
            self.problems.pop(about, None)
            if text:
                self.problems[about] = text
        sent = request.get("sent")
        if type(sent) is int and 0 <= sent <= self.store.change \
                and sent != self.store.sent:
            self.store.sent = sent
            deferred = self.scheduler.deferred_statements
            deferred[:] = [each for each in deferred
                           if each[1][:1] != ("sent",)]
            deferred.append(self.store.set_meta("sent", str(sent)))
        return {}

    def log_once(self, about: str, text: str) -> None:
        """Log a line, but not more often than somebody may read it."""
        now = self.clock.ticks()
        if text and now - self.logged.get(about, -LOG_AGAIN) >= LOG_AGAIN:
            self.logged[about] = now
            self.log.log(f"dashboard: {text}", bad=True)

    def batch(self, request: dict) -> dict:
        """Return runs that changed, and the list of jobs if it is new."""
        sent = self.store.get_meta("sent before")   # under another epoch
        most = max(1, min(int(request["most"]), MOST_RECORDS))
        rows = self.store.changed_since(
            max(int(request["after"]), int(sent or 0)), most)
        body, mac, sha = self.list_of_jobs()
        now, size, records = int(self.clock.now()), 0, []
        for row in rows:
            scheduled = self.scheduled_jobs.get((row["user"], row["identity"]))
            record = {name: row[name] for name in RECORD_FIELDS}
            records.append({**record, "nonce": "", "next": scheduled
                            and self.scheduler.registry.next_start(
                                scheduled, now)})
            size += sum(map(len, row["args"].values())) + 1000
            if size > MOST_RECORD_BYTES:
                break
        reply = {"facts": self.facts(), "records": records, "list_sha": sha,
                 "more": len(records) < len(rows) or len(rows) == most}
        if request["list_sha"] != sha:
            reply["list"] = {"body": body, "mac": mac}
            reply["next"] = {
                f"{scheduled.user}\n{scheduled.job.tag}":
                self.scheduler.registry.next_start(scheduled, now)
                for scheduled in self.scheduled_jobs.values()}
        return reply

    def list_of_jobs(self) -> tuple[str, str, str]:
        """Return the list that people see who are to run something, its MAC
        and its SHA-256. It is made anew when a tab has changed."""
        if self.listed is None:
            import json
            master = self.machine.user_name(os.geteuid())
            manifests, cut = self.share_list(master)
            for user in self.cut_users | cut:
                self.log.set_problem(
                    f"list {user}", "" if user not in cut else "the dashboard "
                    f"gets only the first jobs of {user}: there are too many")
            self.cut_users = cut
            body = json.dumps({
                "v": 1, "dash": self.enrollment.dash,
                "host": self.enrollment.host,
                "key": key_id(self.enrollment.secret),
                "name": self.enrollment.name,
                "user": master, "at": int(self.clock.now() * 1000),
                "partial": sorted(cut), "jobs": manifests,
                "paused": {
                    f"{scheduled.user}\n{scheduled.job.tag}":
                    self.store.pauses[scheduled.key]
                    for scheduled in self.scheduled_jobs.values()
                    if scheduled.key in self.store.pauses}})
            self.listed = (body, list_mac(self.enrollment.secret, body),
                           sha256_hex(body))
        return self.listed

    def share_list(self, master: str) -> tuple[list[str], set[str]]:
        """Return the manifests of the jobs that the list has room for, and
        the users some of whose jobs it has not.

        The jobs of `master`, who runs koid, come first. Each other user has
        an equal share, so that nobody displaces the jobs of others.
        """
        import json
        jobs: dict[str, list] = {master: []}
        for scheduled in self.registry.scheduled_jobs:
            jobs.setdefault(scheduled.user, []).append(scheduled)
        manifests, cut, room = [], set(), BYTES_OF_LIST
        self.scheduled_jobs = {}
        for place, user in enumerate(jobs):
            share = room if user == master else min(
                BYTES_OF_USER, room // (len(jobs) - place))
            for scheduled in jobs[user]:
                text = job_manifest(scheduled.job, user, scheduled.file,
                                    self.enrollment.secret)
                size = max(len(json.dumps(json.dumps(text))), BYTES_OF_JOB)
                if size > share:
                    cut.add(user)
                    break
                share, room = share - size, room - size
                manifests.append(text)
                self.scheduled_jobs[scheduled.key] = scheduled
        return manifests, cut

    def output(self, request: dict) -> dict:
        """Return a piece of what a run wrote."""
        from base64 import b64encode
        run, at = int(request["run"]), int(request["at"])
        frames = self.store.output(run) if 0 < run < LARGEST else b""
        if at >= len(frames) or at < 0:
            return {"run": run, "at": max(at, 0), "data": "", "deleted": True}
        return {"run": run, "at": at, "data": b64encode(
            frames[at:at + LONGEST_PIECE]).decode()}

    def live(self, request: dict) -> dict:
        """Return what runs that are followed have written since the last
        time. The run that was sent the least comes first."""
        wanted = {int(run): size for run, size
                  in list(request["runs"].items())[:MOST_FOLLOWED]}
        self.cursors = {run: cursor for run, cursor in self.cursors.items()
                        if run in wanted}
        found, room = [], LIVE_BYTES
        for run in sorted(wanted, key=lambda run: getattr(
                self.cursors.get(run), "sent", 0)):
            if room <= 0:
                break
            piece, size = self.live_piece(run, wanted[run])
            if piece:
                found.append(piece)
                room -= size
        return {"live": found}

    def live_piece(self, run: int, size: int) -> tuple[dict | None, int]:
        """Return the new output of a run of which the dashboard has `size`
        bytes, and how many bytes it is."""
        from base64 import b64encode
        cursor = self.cursors.get(run)
        fresh = cursor is None or cursor.sent != size
        if fresh:
            cursor = self.cursors[run] = OutputCursor()
        data, header = read_stable_file(self.scheduler.home, run) \
            if run in self.scheduler.running else (b"", None)
        if not header:
            return None, 0
        frames, cursor.position = frames_since(data, header, cursor.position)
        if not frames:
            return None, 0
        piece = {"run": run, "at": cursor.sent,
                 "data": b64encode(frames).decode()}
        if fresh:
            piece["reset"] = True
        cursor.sent += len(frames)
        return piece, len(frames)


class RequestVerifier:
    """Verifies requests that come from a dashboard, and carries them out.

    A request counts once, for good: its nonce is on the disk before its run
    starts. `since`: from when on the history knows which nonces were used.
    """

    def __init__(self, scheduler: Scheduler, enrollment: Enrollment,
                 since: float):
        # The first use of keys: what verifies is loaded now, as Python may
        # be upgraded under koid.
        import hashlib, hmac    # noqa: E401, F401
        self.scheduler, self.enrollment = scheduler, enrollment
        self.since = since
        self.store, self.clock = scheduler.store, scheduler.clock
        self.log = scheduler.log
        self.refused: dict[str, list] = {}      # reason -> [count, ticks]

    def verify_and_run(self, request: dict) -> dict:
        """Return the result of a request: accepted, with the number of its
        run, or refused, with the reason."""
        try:
            fields = verify_request(self.enrollment.secret,
                                    request.get("body"), request.get("mac"))
        except RequestRejected as why:
            return self.refuse("", str(why))
        nonce = fields["nonce"]
        if not self.scheduler.write([]):   # the nonces on the disk are not all
            return self.refuse(nonce, "it cannot be recorded: the host's "
                               "disk is full or fails")
        used = self.store.nonce_run(nonce)
        if used:        # the result was lost on its way, or this is a replay
            return {"nonce": nonce, "state": "accepted", "run": used,
                    "reason": "it was used before, and ran once"}
        try:
            run = self.carry_out(fields, used)
        except (RequestRejected, Error) as why:
            if used is None and not self.store.problem \
                    and fields["exp"] > self.clock.now() * 1000:
                # For good: or it would run when the reason has passed.
                self.scheduler.write(self.store.record_nonce(
                    nonce, self.clock.now(), 0))
            return self.refuse(nonce, str(why))
        return {"nonce": nonce, "state": "accepted", "run": run,
                "reason": ""}

    def carry_out(self, fields: dict, used: int | None) -> int:
        """Do what a request says whose MAC is right; return the number of
        the run. Raises RequestRejected, Error."""
        if used == 0:
            raise RequestRejected("it was refused before")
        why = request_mismatch(fields, {"key": key_id(self.enrollment.secret),
                                        "dash": self.enrollment.dash,
                                        "host": self.enrollment.host},
                               self.clock.now(), self.since)
        if why:
            raise RequestRejected(why)
        return self.begin_run(fields) if fields["do"] == "run" \
            else self.kill_run(fields)

    def find_job(self, fields: dict) -> ScheduledJob:
        """Return the job that a request names. Raises RequestRejected."""
        scheduled = next((
            each for each in self.scheduler.registry.scheduled_jobs
            if each.user == fields["user"] and each.job.tag == fields["tag"]),
            None)
        if not scheduled:
            raise RequestRejected("there is no such job any more")
        if scheduled.job.when != "@manual":
            raise RequestRejected(
                "only jobs that are @manual can be run from a dashboard")
        if scheduled.settings.confirm == "cli":
            raise RequestRejected("this job is to be run from a terminal only")
        if sha256_hex(job_manifest(
                scheduled.job, scheduled.user, scheduled.file,
                self.enrollment.secret)) != fields["job"]:
            raise RequestRejected(
                "the job was changed since it was shown: reload it")
        return scheduled

    def values_of(self, scheduled: ScheduledJob, fields: dict
                  ) -> dict[str, str]:
        """Return the arguments, secrets decrypted. Raises RequestRejected,
        Error."""
        args, secrets = fields["args"], fields["secrets"]
        secret = {param.name for param in scheduled.job.params
                  if param.type == "secret"}
        if set(secrets) != secret or set(args) & secret or set(args) | \
                secret != {param.name for param in scheduled.job.params}:
            raise RequestRejected("its arguments are not those of the job")
        values = dict(args)
        for name, text in secrets.items():
            if len(text) % 2 or not HEX.issuperset(text):
                raise RequestRejected("a secret in it cannot be read")
            try:
                values[name] = encrypt_secret(
                    self.enrollment.secret, fields["nonce"], name,
                    bytes.fromhex(text)).decode()
            except UnicodeDecodeError:
                raise RequestRejected(
                    "a secret in it cannot be read") from None
        return validate_arguments(scheduled.job, values)

    def begin_run(self, fields: dict) -> int:
        """Start a run, and return its number. Raises RequestRejected,
        Error."""
        if not self.scheduler.planner.state:
            raise RequestRejected("the host's clock is not set")
        scheduled = self.find_job(fields)
        now = self.clock.now()
        queued = QueuedRun(scheduled, "manual", now, now)
        queued.values = self.values_of(scheduled, fields)
        queued.nonce = fields["nonce"]
        self.scheduler.record_and_start([queued])
        if self.store.problem:
            raise RequestRejected("the run cannot be recorded: the host's "
                                  "disk is full or fails")
        return queued.run

    def kill_run(self, fields: dict) -> int:
        """End a run, and return its number. Raises RequestRejected."""
        run = fields["run"]
        epoch = int(self.store.get_meta("epoch") or 0)
        user = self.scheduler.user_of(run)
        if epoch != fields["epoch"] or user is None:
            raise RequestRejected(f"run {run} is not going on")
        if user != fields["user"]:
            raise RequestRejected("it is for another user")
        if not self.scheduler.write(self.store.record_nonce(
                fields["nonce"], self.clock.now(), run)):
            raise RequestRejected("it cannot be recorded")
        self.scheduler.kill(run, "killed from the dashboard")
        return run

    # --- refusals

    def refuse(self, nonce: str, reason: str) -> dict:
        """Return the result of a refused request, and count its reason: a
        flood of forged requests must not fill the log."""
        kind = "".join("N" if character.isdigit() else character
                       for character in reason)
        counted = self.refused.setdefault(
            kind, [0, self.clock.ticks() - LOG_AGAIN])
        counted[0] += 1
        if len(self.refused) > 100:
            self.refused = {kind: counted}
        return {"nonce": nonce, "state": "refused", "run": None,
                "reason": reason}

    def log_refusals(self, now: float) -> None:
        """Log and record how many were refused, each reason at most every
        LOG_AGAIN seconds."""
        for reason, (count, at) in list(self.refused.items()):
            if count and now - at >= LOG_AGAIN:
                self.refused[reason] = [0, now]
                self.log.log(f"dashboard: {plural(count, 'request')} "
                                f"refused: {reason}", bad=True)
                self.scheduler.write([self.store.refusal(
                    reason, count, self.clock.now())])

    def wake_at(self) -> float:
        """Return the ticks at which refusals are to be logged."""
        return min((at + LOG_AGAIN for count, at in self.refused.values()
                    if count), default=FOREVER)


# ==========================================================================
# Daemon: what wakes koid?                                      (machine; R)
#
# One process and one thread, which sleeps in poll() until a start is due, a
# supervisor reports, a user or the agent asks, a tab changes or the clock is
# set. In each turn it looks at the clock first, and at all else after.
# ==========================================================================

SETTLE = 0.3                # seconds until a tab that was edited is read


def release_memory() -> None:
    """Give the memory that compiling this file and reading the tabs took back
    to the system.

    malloc_trim(3) exists in glibc; without it the memory is only reused.
    """
    import ctypes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Daemon:
    """koid's loop: what it holds together, and what wakes it."""

    def __init__(self, machine: Machine, home: str, system: bool = False):
        self.machine, self.home, self.clock = machine, home, machine.clock
        self.poller, self.log = Poller(), DaemonLog(machine)
        self.registry = TabRegistry(machine, home, system)
        self.store = RunStore(f"{home}/history.db")
        self.scheduler = Scheduler(machine, home, self.registry, self.store,
                                   self.log)
        self.control = ControlService(machine, home, self.registry,
                                      self.store, self)
        self.server = ControlServer(self.control, self.scheduler, self.poller)
        self.broker = AgentBroker(self.scheduler, self.poller)
        self.tab_directories: dict[str, int | None] = {}    # -> descriptor
        self.reload_at = FOREVER            # ticks
        self.stopping = False
        self.signals = dict.fromkeys((
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD,
            signal.SIGIO, signal.SIGALRM), False)   # which ones came

    # --- from the start to the end

    def serve(self) -> None:
        """Serve until a signal says stop. Raises Error."""
        import sqlite3
        try:
            self.open()
        except sqlite3.DatabaseError as error:
            self.store.give_up(error)
        self.log.log(f"koid {VERSION}: "
                     f"{plural(len(self.registry.scheduled_jobs), 'job')}")
        notify_manager("READY=1")
        release_memory()
        try:
            while not self.stopping:
                try:
                    self.run_once()
                    if self.store.broken:
                        raise Error(self.store.problem or "the history "
                                    "cannot be written", "koid ends, and "
                                    "judges it when it is started again")
                except Error:
                    raise
                except Exception as bug:    # ours; the other jobs go on
                    self.survive(bug)
        finally:
            self.close()

    def open(self) -> None:
        """Open the state, adopt runs, make this turn's starts. Raises Error,
        OSError, sqlite3.DatabaseError."""
        self.machine.make_home(self.home)
        self.lock = try_lock(f"{self.home}/lock")
        if self.lock is None:
            raise Error(f"koid already runs ({self.home})",
                        "koitab status tells its pid")
        self.cron_pid = self.machine.hold_cron_pid() if self.registry.system \
            else -1
        self.started = self.clock.now()
        self.log.set_problem("history", self.store.open())
        self.scheduler.open()
        self.listen_to_events()
        self.registry.load()
        self.log_tab_problems()
        self.scheduler.rename_jobs()
        self.scheduler.adopt_runs()
        self.server.listen(self.machine.socket_path(self.home))
        self.preload()
        self.scheduler.start_due()
        self.store.began(self.clock.now())
        self.broker.load()
        import gc
        gc.collect()
        gc.freeze()         # supervisors share what is there by now

    def preload(self) -> None:
        """Load what a turn may need: Python may be upgraded under koid.
        (What sends mail is not loaded: it would take half as much again.)"""
        import ctypes, json, pwd, resource, syslog  # noqa: E401, F401
        for user in {scheduled.user
                     for scheduled in self.registry.scheduled_jobs}:
            self.machine.account(user)      # the C library's modules, too
        self.broker.process.load_program()

    def listen_to_events(self) -> None:
        """Let signals, reports, the clock and changes of tabs wake koid."""
        woken, self.wake = os.pipe()
        for fd in (woken, self.wake):
            os.set_blocking(fd, False)
        self.poller.register(woken, self.drain)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        for number in self.signals:
            signal.signal(number, self.note_signal)
        self.poller.register(self.scheduler.reports, self.on_reports)
        self.alarm = self.machine.clock_alarm()
        if self.alarm is not None:
            self.poller.register(self.alarm, self.clock_was_set)
        self.watch_tab_directories()

    def survive(self, bug: Exception) -> None:
        """Go on after a bug. A job that cannot be planned is left out, so
        that one bug does not become a thousand."""
        import sqlite3
        if type(bug) is sqlite3.DatabaseError:
            self.store.give_up(bug)
        where = bug.__traceback__
        while where.tb_next:
            where = where.tb_next
        self.log.set_problem("bug", f"koid has a fault, at its line "
                             f"{where.tb_lineno}: {bug!r}")
        for scheduled in list(self.registry.scheduled_jobs):
            try:
                if self.scheduler.planner.state:
                    next_due(scheduled, self.scheduler.planner.state)
            except Exception as error:
                self.registry.scheduled_jobs.remove(scheduled)
                self.registry.problems.append(
                    f"{scheduled.file}:{scheduled.line}: not "
                    f"used: koid fails on it: {error}")
        # A reload that failed is made up for.
        self.reload_at = min(self.reload_at, self.clock.ticks() + MINUTE)
        time.sleep(TRY_AGAIN)

    def close(self) -> None:
        """Leave; the jobs and their supervisors stay."""
        notify_manager("STOPPING=1")
        signal.signal(signal.SIGIO, signal.SIG_IGN)     # Python would die
        signal.setitimer(signal.ITIMER_REAL, 0)         # and by SIGALRM
        self.broker.process.stop()
        try:
            self.scheduler.collect_finished()
            self.scheduler.write(self.scheduler.seen_statements())
        except Error as error:
            self.log.log(error.message, bad=True)
        remove(self.machine.socket_path(self.home))
        if self.cron_pid >= 0:
            remove(CRON_PID)
        self.log.log("stopped; jobs that run go on")

    # --- one turn

    def run_once(self) -> None:
        """Sleep until something happens; then do what is due first."""
        timeout = self.poll_timeout()
        if timeout > 0:     # poll alone may be late by a thousandth
            signal.setitimer(signal.ITIMER_REAL, timeout / 1000)
        ready = self.poller.wait(timeout)
        self.take_signals()
        now = self.clock.ticks()
        if now >= self.reload_at or self.must_poll_tabs():
            self.reload()
        self.scheduler.start_due()
        self.scheduler.start_queued()
        self.poller.dispatch(ready)
        self.reap()
        self.scheduler.check(now)
        self.server.check(now)
        self.scheduler.collect_finished()
        self.scheduler.mail.send_queued(self.scheduler.host)
        self.broker.run_once(now)

    def poll_timeout(self) -> float:
        """Return the milliseconds until something is due; -1: never."""
        each_minute = self.alarm is None or self.must_poll_tabs()
        soon = min(self.reload_at, self.scheduler.planner.wake_at(each_minute),
                   self.scheduler.wake_at(), self.server.wake_at(),
                   self.broker.wake_at())
        return -1 if soon == FOREVER else min(
            max(soon - self.clock.ticks(), 0), LONGEST_SLEEP) * 1000

    def note_signal(self, number: int, _frame) -> None:
        """Note that a signal came; `take_signals` handles it. One handler
        may interrupt another, or a method that it would call: so each does
        nothing but one assignment that no other one depends on."""
        self.signals[number] = True

    def take_signals(self) -> None:
        """Handle the signals that came since the last turn."""
        came = [number for number in self.signals if self.signals[number]]
        for number in came:
            self.signals[number] = False    # the next one counts anew
        if signal.SIGTERM in came or signal.SIGINT in came:
            self.stopping = True
        if signal.SIGHUP in came:
            self.registry.invalidate()
            self.reload_at = 0.0
        elif signal.SIGIO in came:
            self.reload_at = min(self.reload_at, self.clock.ticks() + SETTLE)

    def reap(self) -> None:
        """Take the wait status of each child that has ended."""
        self.scheduler.read_reports()
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.scheduler.mail.mailers:
                self.scheduler.write([
                    self.scheduler.mail.take_status(pid, status)])
            elif pid == self.broker.process.pid:
                self.broker.agent_ended(status)
            else:
                self.scheduler.supervisor_ended(pid)

    def on_reports(self, _fd: int, _events: int) -> None:
        self.scheduler.read_reports()

    def drain(self, fd: int, _events: int) -> None:
        """Empty the pipe of the signals, which are noted already."""
        try:
            os.read(fd, CHUNK)
        except BlockingIOError:
            pass

    def clock_was_set(self, fd: int, _events: int) -> None:
        """The clock was set, or the machine slept: the turn reads it."""
        try:
            os.read(fd, 8)
        except OSError:
            pass                # ECANCELED: that is the news
        self.machine.rearm_timer(fd)

    # --- tabs

    def must_poll_tabs(self) -> bool:
        """Must koid look for changed tabs each minute, because nothing
        reports all of them?"""
        return self.registry.links or not self.tab_directories \
            or None in self.tab_directories.values()

    def watch_tab_directories(self) -> None:
        """Let changes in the directories of tabs wake koid."""
        wanted = [f"{self.home}/tabs"]
        if self.registry.system:
            wanted += [SYSTEM_TAB_DIRECTORY, posixpath.dirname(SYSTEM_TAB),
                       self.machine.spool()]
        elif os.geteuid() == 0:
            wanted.append(posixpath.dirname(LOCAL_ZONE))
        for directory in wanted:
            fd = self.tab_directories.get(directory)
            if fd is not None and not is_open_on(fd, directory):
                os.close(fd)            # removed, and perhaps made again
                fd = None
            if fd is None:
                fd = self.machine.watch_directory(directory)
            self.tab_directories[directory] = fd

    def reload(self) -> None:
        """Take up tabs that changed, from the next minute on."""
        self.reload_at = FOREVER
        self.watch_tab_directories()
        planner = self.scheduler.planner
        if planner.state and not self.must_poll_tabs():
            self.scheduler.start_due()  # the minutes up to now: the old tabs'
        if not self.registry.load():
            return
        self.broker.forget_list()
        self.scheduler.rename_jobs()
        if planner.state:
            planner.take_zones()
            self.scheduler.record_jobs()
        self.scheduler.update_waiting()
        self.log_tab_problems()

    def log_tab_problems(self) -> None:
        """Log what is wrong with the tabs."""
        for problem in self.registry.problems:
            self.log.log(problem, bad=True)


def is_open_on(fd: int, path: str) -> bool:
    """Is this descriptor that of the directory that now has this path?"""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


# Compiles the program named by the first argument and calls its `main`.
LOADER = ("import sys; del sys.argv[0]; "
          "koid = {'__name__': 'koid', '__file__': sys.argv[0]}; "
          "exec(compile(open(sys.argv[0], encoding='utf-8').read(), "
          "sys.argv[0], 'exec'), koid); sys.exit(koid['main']())")


def load_again() -> None:
    """Replace this process by one that does not keep its syntax tree.

    Python holds the syntax tree of a script (35 MB) until the script ends,
    but frees that of compile(). Only a program started as a script comes
    here; the new process is not one. It reads LOADER from its standard input,
    so that its arguments are short.
    """
    os.dup2(input_file(LOADER.encode()), 0)
    os.execv(sys.executable, [sys.executable, "-IS", "-", *sys.argv])


def run_daemon(machine: Machine, system: bool) -> int:
    """Be koid, until a signal says stop. Raises Error."""
    if system and os.geteuid():
        raise Error("only root can serve the tabs of the system", "sudo koid "
                    "--system")
    set_process_name("koid", *(word for word in sys.argv[1:]
                               if word.startswith("--")))
    Daemon(machine, machine.state_directory(), system).serve()
    return EXIT_OK


# ==========================================================================
# Client: how is one HTTP request bounded?                    (network; U C)
#
# This section is the same text in mission.py and koitab.py; a test compares
# them. Each request has one deadline and a limit on its answer. No proxy of
# the environment is used and no redirect is followed unless the caller says
# so: a secret goes to the server that was named, or nowhere.
# ==========================================================================


class ConnectionFailed(Exception):
    """There was no answer, or none that is HTTP. The text says why."""


class HttpResponse(FrozenRecord):
    """The answer to a request; `headers` is an email.message.Message."""
    status: int
    reason: str
    headers: object
    body: bytes


def tls_context(ca_file: str = "", ca_text: str = ""):
    """Return an ssl.SSLContext that verifies certificate and host name.

    `ca_file` (a path) and `ca_text` (PEM) replace the system's certificate
    authorities. Raises OSError or ValueError for unusable ones.
    """
    import ssl
    return ssl.create_default_context(cafile=ca_file or None,
                                      cadata=ca_text or None)


class HttpClient:
    """One server, and the connection to it, which is kept between requests.

    `url` names scheme, host and port; `proxy` is the URL of an HTTP proxy.
    Raises OSError or ValueError for unusable certificates, and ValueError
    for any scheme but http and https.
    """

    def __init__(self, url: str, ca_file: str = "", ca_text: str = "",
                 proxy: str = ""):
        from urllib.parse import urlsplit
        self.server = urlsplit(url)
        self.proxy = urlsplit(proxy) if proxy else None
        self.proxy_headers = authorization(
            proxy, "Proxy-Authorization") if proxy else {}
        if self.server.scheme not in ("http", "https") \
                or not self.server.hostname:
            raise ValueError("invalid URL: expected http:// or https://")
        self.context = tls_context(ca_file, ca_text) \
            if self.server.scheme == "https" else None
        self.connection = None

    def request(self, method: str, target: str, body: bytes | None = None,
                headers: dict | None = None, seconds: float = 15.0,
                limit: int = 2**24) -> HttpResponse:
        """Return the answer; of its body `limit` bytes at most are read.

        `seconds` limits the whole exchange; only the lookup of a host name
        has the limits of the system. A request is sent again if a connection
        that was kept turns out to be closed. Raises ConnectionFailed.
        """
        reused = self.connection is not None
        arguments = (method, target, body, headers or {}, seconds, limit)
        try:
            try:
                return self.exchange(*arguments)
            except ConnectionError:
                if not reused:
                    raise
                return self.exchange(*arguments)
        except Exception as error:      # http.client raises many kinds
            raise ConnectionFailed(failure_words(error)) from None

    def exchange(self, method: str, target: str, body: bytes | None,
                 headers: dict, seconds: float, limit: int) -> HttpResponse:
        """Send one request and read its answer. Raises as http.client."""
        from threading import Timer
        self.connection = self.connection or self.new_connection(seconds)
        if self.connection.sock:
            self.connection.sock.settimeout(seconds)
        if self.proxy and not self.context:
            target = f"http://{without_user(self.server)}{target}"
            headers = {**headers, **self.proxy_headers}
        timer = Timer(seconds, self.abort)
        timer.daemon = True
        timer.start()
        kept = False
        try:
            self.connection.request(method, target, body, headers)
            response = self.connection.getresponse()
            data = response.read(limit)
            kept = response.isclosed() and not response.will_close
            return HttpResponse(response.status, response.reason,
                                response.headers, data)
        finally:
            timer.cancel()
            if not kept:
                self.close()

    def new_connection(self, seconds: float):
        """Return an http.client connection that is not open yet."""
        from http.client import HTTPConnection, HTTPSConnection
        place = self.proxy or self.server
        if not self.context:
            return HTTPConnection(place.hostname, place.port or 80,
                                  timeout=seconds)
        port = place.port or (80 if self.proxy else 443)
        connection = HTTPSConnection(place.hostname, port, timeout=seconds,
                                     context=self.context)
        if self.proxy:
            connection.set_tunnel(self.server.hostname,
                                  self.server.port or 443,
                                  self.proxy_headers)
        return connection

    def abort(self) -> None:
        """End what the connection waits for; from any thread."""
        import socket
        try:
            # The method of SSLSocket would drop its TLS state under a read.
            socket.socket.shutdown(self.connection.sock, socket.SHUT_RDWR)
        except (AttributeError, TypeError, OSError):
            pass            # the connection is closed, or not open yet

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self.connection:
            self.connection.close()
        self.connection = None


def send_request(method: str, url: str, body: bytes | None = None,
                 headers: dict | None = None, seconds: float = 15.0,
                 limit: int = 2**24, redirects: int = 0, ca_file: str = "",
                 proxy: str = "") -> HttpResponse:
    """Return the answer to one request to `url`, on a connection of its own.

    User and password in `url` become an Authorization header. Up to
    `redirects` redirects are followed, never from https to http; 307 and 308
    repeat the request, others become GET (RFC 9110, 15.4). Each request has
    `seconds`. Raises ConnectionFailed, and ValueError for an invalid URL.
    """
    from urllib.parse import urljoin, urlsplit
    headers = {"User-Agent": f"{PROG}/{VERSION}", "Connection": "close",
               **authorization(url), **(headers or {})}
    while True:
        try:
            client = HttpClient(url, ca_file, proxy=proxy)
        except OSError as error:        # unusable certificates
            raise ConnectionFailed(failure_words(error)) from None
        response = client.request(method, request_target(url), body, headers,
                                  seconds, limit)
        client.close()
        place = response.headers.get("Location")
        if not redirects or not place \
                or response.status not in (301, 302, 303, 307, 308):
            return response
        redirects -= 1
        before, url = urlsplit(url), urljoin(url, place)
        after = urlsplit(url)
        if after.scheme not in ("https", before.scheme):
            raise ConnectionFailed(f"redirected from {before.scheme} to "
                                   f"{after.scheme}, which is refused")
        if without_user(after) != without_user(before):
            headers.pop("Authorization", None)
        if response.status not in (307, 308):
            method, body = "GET", None


def request_target(url: str) -> str:
    """Return the path and the query of `url`, as a request line has them."""
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def without_user(parts) -> str:
    """Return host and port of a URL, the result of urlsplit()."""
    return parts.netloc.rpartition("@")[2]


def authorization(url: str, name: str = "Authorization") -> dict[str, str]:
    """Return the header that user and password of `url` ask for (RFC 7617)."""
    import base64
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {name: "Basic " + base64.b64encode(pair.encode()).decode()}


def failure_words(error: Exception) -> str:
    """Return why a server cannot be reached, in words and without [Errno]."""
    import socket
    import ssl
    from http.client import HTTPException
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return f"unknown host name: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, HTTPException):
        return "no complete HTTP response"
    return str(error) or "the connection failed"


# ==========================================================================
# Agent: what does the dashboard lack?                           (network; U C)
#
# A process of its own that knows the dashboard and nothing else of this host:
# not the host key, and no file. It is a fresh Python that executes this
# section, LineProtocol, Client and Common (see agent_program). It asks koid
# for what is to be sent, and hands it what came back. It may hang, be lied to
# and die; koid and its jobs do not notice.
# ==========================================================================

PATIENCE = 15.0             # seconds for an answer of the dashboard
LONGEST_ANSWER = 2**24      # bytes
HOLD = 25                   # seconds that a dashboard may hold a poll
PAUSE_FIRST, PAUSE_LONGEST = 1.0, 60.0  # seconds between tries
PAUSE_REFUSED = 300.0       # after a dashboard does not know this host
FOLLOW_PAUSE = 0.4          # seconds between pieces of output followed live
SYNC_PAUSE = 0.05           # seconds between polls, whatever the answers
MOST_MISSING = 8            # runs of whose output one payload has a piece
MOST_REQUESTS = 100         # in one answer
MOST_RESULTS = 5_000        # of requests, that wait to be sent
RESULTS_AT_ONCE = 200       # in one payload; a dashboard takes 1,000
TRIES_OF_ONE = 3            # for a record that the dashboard does not take
LARGEST_CHANGE = 2**62      # what SQLite can count
SYNC_PATH = "/api/v1/sync"
SYNC_VERSION = 3


class HttpRefused(Exception):
    """The dashboard refuses a request: the HTTP status and its reason."""

    def __init__(self, status: int, text: str, hint: str = ""):
        super().__init__(text)
        self.status, self.text, self.hint = status, text, hint


def check_dashboard_url(url: str) -> str:
    """Return the host name in the URL of a dashboard. Raises Error."""
    from urllib.parse import urlsplit
    try:
        parts = urlsplit(url)
        valid = parts.port != 0
    except ValueError:
        parts, valid = urlsplit(""), False
    if not valid or parts.scheme not in ("http", "https") \
            or not parts.hostname or "@" in parts.netloc \
            or parts.path.strip("/") or parts.query or parts.fragment \
            or not url.isascii() or not url.isprintable() or " " in url:
        raise Error(f'"{escape_controls(url[:80])}" is no URL of a dashboard',
                    "https://koi.example.com or http://127.0.0.1:8077")
    return parts.hostname


def is_local(host: str) -> bool:
    """Does what goes there stay on this machine?"""
    return host in ("localhost", "::1") or host.endswith(".localhost") \
        or host.startswith("127.") and host.replace(".", "").isdigit()


class DashboardClient:
    """A connection to a dashboard's API: JSON in both directions.

    `token` authenticates each request; `ca` is the text of the certificate
    authorities to trust instead of the system's. Raises Error for an
    invalid URL or unusable certificates.
    """

    def __init__(self, url: str, token: str = "", ca: str = ""):
        self.host = check_dashboard_url(url)
        self.scheme, self.token = url.partition(":")[0], token
        try:
            self.client = HttpClient(url, ca_text=ca)
        except (OSError, ValueError) as error:
            raise Error(f"the certificates to trust: {error}",
                        "a file of PEM certificates") from None
        self.port = self.client.server.port or (
            443 if self.scheme == "https" else 80)

    def is_connected(self) -> bool:
        """Is there a connection that an earlier request has used?"""
        return self.client.connection is not None

    def close(self) -> None:
        self.client.close()

    def request(self, method: str, path: str, body: dict | None = None,
                seconds: float = PATIENCE) -> dict:
        """Return the answer's JSON object.

        Raises ConnectionFailed, and HttpRefused for a status of 300 or more.
        """
        import json
        response = self.fetch(method, path, body, seconds)
        try:
            answer = json.loads(response.body)
            if not isinstance(answer, dict):
                raise ValueError
        except (ValueError, RecursionError):
            answer = None
        if response.status >= 300:
            fields = answer or {}
            message = fields.get("error") or \
                f"it answers with status {response.status}"
            raise HttpRefused(response.status, str(message)[:300],
                              str(fields.get("hint") or "")[:300])
        if answer is None:
            raise ConnectionFailed("its answer is not that of a dashboard")
        return answer

    def fetch(self, method: str, path: str, body: dict | None = None,
              seconds: float = PATIENCE) -> HttpResponse:
        """Return the answer as it is. Raises ConnectionFailed."""
        import json
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        response = self.client.request(method, path, data, headers, seconds,
                                       LONGEST_ANSWER + 1)
        if len(response.body) > LONGEST_ANSWER:
            raise ConnectionFailed("its answer is too long")
        return response


class KoidConnection:
    """The agent's end of the socket to koid. Any thread may ask."""

    def __init__(self, sock):
        from queue import SimpleQueue
        from threading import Lock
        self.lines = LineConnection(sock, LONGEST_REPLY)
        self.replies, self.asking = SimpleQueue(), Lock()

    def read_settings(self) -> dict:
        """Return what koid gives its agent at the start. No thread asks or
        listens yet. Raises OSError, Error."""
        self.lines.send({"op": "hello"})
        while True:
            message = self.lines.read()
            if "news" not in message:
                return message

    def ask(self, **request) -> dict:
        """Return koid's reply. Raises OSError."""
        with self.asking:
            self.lines.send(request)
            return self.replies.get()

    def listen(self, on_news) -> None:
        """Hand out what koid sends, until koid closes the socket. Raises
        OSError, Error."""
        while True:
            message = self.lines.read()
            if "news" in message:
                on_news()
            else:
                self.replies.put(message)


class SyncAgent:
    """Exchanges records and requests between koid and one dashboard.

    Three threads: the first hears koid, `poll` holds a question to the
    dashboard until there is a request for this host, `send` sends what is
    new. `state` is their lock and guards all fields below it.
    """

    def __init__(self, koid, settings: dict):
        from threading import Condition
        self.koid, self.settings = koid, settings
        self.facts = settings["facts"]      # about the host, as koid has them
        self.state = Condition()
        self.news = True                    # koid has something new
        self.acked: int | None = None       # last change that the dashboard
        # has; None: it must be asked
        self.missing_output: list[list[int]] = []   # (run, bytes it has)
        self.followed: dict[int, int] = {}  # run -> bytes that it has
        self.results: dict[str, dict] = {}  # by nonce: not sent yet
        self.successes = 0                  # of both threads
        self.list_sha = ""                  # SHA-256 of the list it has
        self.certificate: float | None = None   # when it expires
        self.most = MOST_RECORDS
        self.tries, self.skipped = 0, 0     # of a record it does not take
        self.records_only = False           # leave out all that can wait

    def start(self) -> None:
        """Start the threads that talk to the dashboard."""
        from threading import Thread
        for step in (self.poll, self.send):
            Thread(target=self.retry_forever, args=(step,),
                   daemon=True).start()

    def on_news(self) -> None:
        """koid has something new."""
        with self.state:
            self.news = True
            self.state.notify_all()

    # --- both threads

    def retry_forever(self, step) -> None:
        """Call `step` again and again; after a failure, wait 1 to 60 s."""
        import random
        client, pause = None, PAUSE_FIRST
        while True:
            early = False
            try:
                client = client or DashboardClient(
                    self.settings["url"], self.settings["token"],
                    self.settings["ca"])
                step(client)
                pause, problem = PAUSE_FIRST, ""
            except (ConnectionFailed, Error) as error:
                problem = str(error)
                early = bool(client) and not client.is_connected()
            except HttpRefused as refused:
                problem = self.refusal_words(refused)
                if refused.status in (401, 403, 409):
                    pause = PAUSE_REFUSED
            except Exception as bug:        # a bug, or an unforeseen answer
                problem = f"its answer makes no sense: {bug!r}"
            self.koid.ask(op="state", about=step.__name__,
                          problem=problem[:500])
            with self.state:
                if problem:
                    self.acked = None       # ask again what it has
                else:
                    self.successes += 1
                self.state.notify_all()
            if problem:
                self.wait_to_retry(pause * random.uniform(0.7, 1.3), early)
                pause = min(pause * 2, PAUSE_LONGEST)

    def wait_to_retry(self, seconds: float, early: bool) -> None:
        """Wait after a failure; if `early`, only until the other thread has
        an answer, because then the dashboard is back."""
        before = self.successes
        time.sleep(min(seconds, PAUSE_FIRST))
        seconds -= PAUSE_FIRST
        while seconds > 0:
            with self.state:
                if self.state.wait_for(
                        lambda: early and self.successes != before,
                        min(seconds, HOLD)):
                    return
            self.koid.ask(op="state")   # koid replaces a silent agent
            seconds -= HOLD

    def refusal_words(self, refused: HttpRefused) -> str:
        """Return why the dashboard refuses, for `koitab status`."""
        words = {401: "it does not know this host", 403: "it refuses this "
                 "host", 404: "it is no dashboard of koi's", 409:
                 "another koid uses this host's identity (was the machine "
                 "cloned? koitab -d off; koitab -d join)"
                 }.get(refused.status, "")
        return f"{words}: {refused.text}" if words else refused.text

    def sync_header(self, wait: int) -> dict:
        """Return what each payload begins with. `wait`: for how many seconds
        the dashboard may hold the answer."""
        header = {"v": SYNC_VERSION, "host": self.settings["host"],
                  "instance": self.settings["instance"], "wait": wait,
                  "now": time.time(), "list_sha": self.list_sha, **self.facts}
        if self.certificate is not None:
            header["certificate_expires"] = self.certificate
        return header

    def sync(self, client: DashboardClient, wait: int = 0,
             payload: dict | None = None) -> dict:
        """Send a payload, and return the answer. Raises ConnectionFailed,
        HttpRefused."""
        answer = client.request("POST", SYNC_PATH, {
            **self.sync_header(wait), **(payload or {})}, wait + PATIENCE)
        self.certificate = certificate_expiry(client) or self.certificate
        return answer

    def apply_answer(self, answer: dict, polled: bool = False) -> None:
        """Take what the dashboard answers. It may lie, so each value is
        checked. Of two answers that cross on their way, that of the poll
        says which runs are followed, and the other one how much the
        dashboard has of their output. Raises ConnectionFailed."""
        acked, missing, followed, requests = (answer.get(name) for name in (
            "acked", "missing_output", "live", "requests"))
        if type(acked) is not int or not 0 <= acked < LARGEST_CHANGE \
                or not isinstance(missing, list) \
                or not isinstance(requests, list) \
                or not isinstance(followed, dict) \
                or len(requests) > MOST_REQUESTS:
            raise ConnectionFailed("its answer is not that of a dashboard")
        with self.state:
            if polled and self.acked is not None:
                if acked < self.acked:
                    self.acked = None   # a backup was restored: ask again
            else:
                self.news = self.news or self.acked is None \
                    or acked < self.acked
                self.acked = acked
            self.missing_output = [
                pair for pair in missing if isinstance(pair, list)
                and [type(each) for each in pair] == [int, int]][:1000]
            self.follow(followed, polled)
            if answer.get("want_list") is True:
                self.list_sha, self.news = "", True
            self.state.notify_all()
        for request in requests:
            self.forward_request(request)

    def follow(self, wanted: dict, polled: bool) -> None:
        """Update which runs are followed, and how much the dashboard has."""
        has = {int(run): size for run, size
               in list(wanted.items())[:MOST_FOLLOWED]
               if run.isdecimal() and len(run) < 19 and type(size) is int}
        if polled:
            self.followed = {run: self.followed.get(run, size)
                             for run, size in has.items()}
        else:
            self.followed = {run: has.get(run, size)
                             for run, size in self.followed.items()}

    def forward_request(self, request) -> None:
        """Hand a request to koid, which verifies it, and keep the result."""
        if not isinstance(request, dict):
            return
        body, mac = (text if isinstance(text, str)
                     and len(text) <= LONGEST_MESSAGE // 16 else None
                     for text in (request.get("body"), request.get("mac")))
        result = self.koid.ask(op="request", body=body, mac=mac)
        result["nonce"] = result.get("nonce") or nonce_in(body)
        if not result["nonce"]:
            return
        with self.state:
            # The last result counts if a request was handed out again.
            self.results.pop(result["nonce"], None)
            self.results[result["nonce"]] = result
            if len(self.results) > MOST_RESULTS:
                del self.results[next(iter(self.results))]
            self.state.notify_all()

    # --- the thread that polls

    def poll(self, client: DashboardClient) -> None:
        """Ask until the dashboard has something for this host. The first
        poll is answered at once, so that `status` soon knows the outcome.
        Raises ConnectionFailed, HttpRefused."""
        hold = HOLD if client.is_connected() else 0
        self.apply_answer(self.sync(client, hold), polled=True)
        time.sleep(SYNC_PAUSE)  # a dashboard that lies must not keep us busy

    # --- the thread that sends

    def send(self, client: DashboardClient) -> None:
        """Wait until there is something to send, and send it. Raises
        ConnectionFailed, HttpRefused."""
        with self.state:
            following = bool(self.followed)
            self.state.wait_for(
                lambda: self.news or self.results or self.missing_output
                or self.acked is None or bool(self.followed) != following,
                FOLLOW_PAUSE if following else None)
            first, self.news = self.acked is None, False
        if first:
            self.apply_answer(self.sync(client))
            return
        payload, batch = self.sync_payload()
        if not payload:
            return
        try:
            answer = self.sync(client, 0, payload)
        except HttpRefused as refused:
            if refused.status in (400, 413, 422) and payload.get("records"):
                self.split_batch(payload)
                return
            raise
        except ConnectionFailed:
            self.on_news()
            raise
        self.note_sent(payload, batch, answer)

    def sync_payload(self) -> tuple[dict, dict]:
        """Return all that is to be sent now, and koid's batch in it."""
        batch = self.koid.ask(op="batch", most=self.most,
                              after=max(self.acked or 0, self.skipped),
                              list_sha=self.list_sha)
        self.facts = batch["facts"]
        with self.state:
            missing = self.missing_output[:MOST_MISSING]
            followed = dict(self.followed)
            results = list(self.results.values())[:RESULTS_AT_ONCE]
        payload = {
            "records": batch["records"], "list": batch.get("list"),
            "next": batch.get("next"), "results": results,
            "outputs": [self.koid.ask(op="output", run=run, at=size)
                        for run, size in missing],
            "live": self.koid.ask(op="live", runs=followed)["live"]
            if followed else []}
        return {name: part for name, part in payload.items() if part and (
            not self.records_only or name in ("records", "results"))}, batch

    def note_sent(self, payload: dict, batch: dict, answer: dict) -> None:
        """Take the answer to a payload: what it acknowledges need not be
        sent again. Raises ConnectionFailed."""
        with self.state:
            for result in payload.get("results", ()):
                if self.results.get(result["nonce"]) is result:
                    del self.results[result["nonce"]]
            if "list" in payload:
                self.list_sha = batch["list_sha"]
            self.tries, self.most = 0, min(self.most * 2, MOST_RECORDS)
            self.records_only = False
        sent_output = [[piece["run"], piece["at"]]
                       for piece in payload.get("outputs", ())]
        self.apply_answer(answer)
        records = payload.get("records")
        if records and answer["acked"] < records[-1]["change"]:
            raise ConnectionFailed("it does not keep what it is sent")
        with self.state:
            self.news = self.news or batch["more"]
            again = bool(sent_output) and answer["missing_output"][
                :len(sent_output)] == sent_output
            complete = self.acked if not self.missing_output else None
        if again:
            raise ConnectionFailed("it asks for output that it was sent")
        if complete is not None:
            self.koid.ask(op="state", sent=complete)

    def split_batch(self, payload: dict) -> None:
        """The dashboard does not take these records: send them alone, then
        fewer at a time, and at last skip the one that it never takes, so
        that the others arrive."""
        records = payload["records"]
        with self.state:
            self.news = True
            if not self.records_only and set(payload) != {"records"}:
                self.records_only = True
                return
            if len(records) > 1:
                self.most = max(1, len(records) // 2)
                return
            self.tries += 1
            if self.tries < TRIES_OF_ONE:
                return
            self.tries, self.skipped = 0, records[0]["change"]
        self.koid.ask(op="state", about="skipped", problem="it does not take "
                      f"run {records[0]['run']}, which is left out")


def nonce_in(body: str | None) -> str:
    """Return the nonce of a request that koid did not believe; "" if it has
    none. Only the dashboard, which sent it, learns the result."""
    import json
    import re
    try:
        nonce = json.loads(body)["nonce"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return nonce if isinstance(nonce, str) and re.fullmatch(
        "[0-9a-f]{32}", nonce) else ""


def certificate_expiry(client: DashboardClient) -> float | None:
    """Return when the dashboard's certificate expires, in seconds since
    1970; None without TLS, or without a connection."""
    connection = client.client.connection
    if not client.client.context or not connection or not connection.sock:
        return None
    import ssl
    return ssl.cert_time_to_seconds(connection.sock.getpeercert()[
        "notAfter"])


def run_agent() -> None:
    """The whole program of the agent's process; descriptor 3 is its socket
    to koid. It ends when koid closes that."""
    # What it may need is loaded now: Python may be upgraded under it.
    import encodings.idna, http.client, json, queue, random  # noqa: E401, F401
    import re, ssl, threading, urllib.parse     # noqa: E401, F401
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("koi-agent")     # for ps; Linux alone has this
    except OSError:
        pass
    koid, status = KoidConnection(socket.socket(fileno=AGENT_SOCKET)), EXIT_BUG
    try:
        agent = SyncAgent(koid, koid.read_settings())
        agent.start()
        koid.listen(agent.on_news)
    except OSError:
        status = EXIT_OK    # koid has ended
    except Exception as bug:
        koid.lines.send({"op": "state", "about": "agent",
                         "problem": f"the agent failed: {bug!r}"})
    finally:
        os._exit(status)


# ==========================================================================
# Fields: what may a request contain?                           (nothing; U)
#
# Whoever sends a request to the dashboard is known, and may be broken or
# hostile anyway. What SQLite or a browser could not take is refused here.
# ==========================================================================

LARGEST_TIME = 2**40            # seconds since 1970: the year 36812
LARGEST_WHOLE = 2**53 - 1       # what JavaScript can count
MISSING = object()


class RequestFields:
    """The fields of a request, each read with its type and limits.

    `what` names the request in errors. A field that is missing or null has
    the default; without one it is required. Every method raises Error, with
    the status 400, or 413 for what is too large.
    """

    def __init__(self, fields, what: str = "the request"):
        self.fields, self.what = fields, what
        if not isinstance(fields, dict):
            raise Error(f"{what} is no JSON object", "", 400)

    def wrong(self, name: str, why: str) -> Error:
        """Return the Error for a field."""
        return Error(f"{self.what}: {name} {why}", "", 400)

    def too_long(self, text: str) -> Error:
        """Return the Error for a field that is too large."""
        return Error(f"{self.what}: {text}", "", 413)

    def get(self, name: str, kinds, default):
        """Return a value of one of the classes `kinds`."""
        value = self.fields.get(name)
        if value is None:
            if default is MISSING:
                raise self.wrong(name, "is missing")
            return default
        if not isinstance(value, kinds) or (
                isinstance(value, bool) and kinds is not bool):
            raise self.wrong(name, "is of the wrong kind")
        return value

    def text(self, name: str, most: int = 1000, default=MISSING):
        """Return a text of at most `most` characters."""
        value = self.get(name, str, default)
        if value is default:
            return value
        if len(value) > most:
            raise self.too_long(f"{name} is longer than {most:,}")
        if "\0" in value or not is_text(value):
            raise self.wrong(name, "is no text")
        return value

    def hex(self, name: str, length: int) -> str:
        """Return `length` lower-case hex digits."""
        value = self.get(name, str, MISSING)
        if not is_hex(value, length):
            raise self.wrong(name, f"is not {length} hex digits")
        return value

    def whole(self, name: str, default=MISSING, low: int = 0,
              high: int = LARGEST_WHOLE):
        """Return a whole number from `low` to `high`."""
        return self.within(name, int, default, low, high)

    def number(self, name: str, default=MISSING, low: float = 0,
               high: float = LARGEST_TIME):
        """Return a number from `low` to `high`; NaN is outside."""
        return self.within(name, (int, float), default, low, high)

    def within(self, name: str, kinds, default, low: float, high: float):
        """Return a number of a kind, from `low` to `high`."""
        value = self.get(name, kinds, default)
        if value is not default and not low <= value <= high:
            raise self.wrong(name, f"is not from {low} to {high}")
        return value

    def flag(self, name: str, default=MISSING) -> bool:
        """Return true or false."""
        return self.get(name, bool, default)

    def choice(self, name: str, words, default=MISSING) -> str:
        """Return one of `words`."""
        value = self.get(name, str, default)
        if value not in words:
            raise self.wrong(name, f"is none of {', '.join(words)}")
        return value

    def each(self, name: str, most: int) -> list:
        """Return the objects of a list, as RequestFields."""
        found = self.get(name, list, ())
        if len(found) > most:
            raise Error(f"{self.what}: more than {most:,} {name}",
                        "send them in several requests", 413)
        return [RequestFields(fields, name) for fields in found]

    def texts(self, name: str, most: int) -> dict:
        """Return an object whose values are texts, with at most `most`
        characters in all."""
        found = self.get(name, dict, {})
        if any(not isinstance(value, str) or not is_text(value)
               or not is_text(key) for key, value in found.items()):
            raise self.wrong(name, "holds what is no text")
        if sum(len(key) + len(value) for key, value in found.items()) > most:
            raise self.too_long(f"{name} is too long")
        return found

    def data(self, name: str, most: int) -> bytes:
        """Return the bytes of a text in base64."""
        from base64 import b64decode
        text = self.get(name, str, "")
        if len(text) > most * 4 // 3 + 4:
            raise self.too_long(f"{name} is too long")
        try:
            return b64decode(text, validate=True)
        except ValueError:
            raise self.wrong(name, "is no base64") from None


def is_text(text: str) -> bool:
    """Can `text` be UTF-8? Halves of surrogate pairs cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff"
                                     for character in text)


def not_found(what: str) -> Error:
    """Return the Error for a thing that is not there."""
    return Error(f"there is no such {what}", "", 404)


def compact_json(value) -> str:
    """Return `value` as JSON without blanks."""
    import json
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ==========================================================================
# Outcome: how did a run go, and was that usual?                (nothing; U)
#
# Decisions on runs as the dashboard has them. An entry of the run history
# bar is (id, time, seconds, outcome code).
# ==========================================================================

ACTIVE_STATES = ("queued", "running")
RUN_STATES = (*ACTIVE_STATES, "done", "interrupted", "missed", "skipped",
              "unstartable")
OUTCOME_CODES = {"queued": "q", "running": "r", "missed": "m",
                 "skipped": "s", "interrupted": "i", "unstartable": "u"}
BAD_CODES = frozenset("fkiu")
ENOUGH_RUNS, USUAL_RUNS = 20, 30    # to say what is usual; of so many
LONGEST_OUTPUT = 4 * 2**20      # bytes of one run; koid keeps 1 MiB
STRIPPED = r"\x1b\[[0-?]*[ -/]*[@-~]"   # colours and the like, as in ECMA-48


def outcome_code(state: str, status: int | None, number: int | None,
                 reason: str) -> str:
    """Return how a run went, as a code of one character.

    o: ended well, f: failed, k: killed by a signal or a time limit; the
    others are in OUTCOME_CODES. `status` is the exit status, `number` the
    signal.
    """
    if state != "done":
        return OUTCOME_CODES.get(state, "i")
    if status == 0:
        return "o"
    return "k" if number or reason.startswith("timeout") else "f"


def code_of(run: dict) -> str:
    """Return the outcome code of a run."""
    return outcome_code(run["state"], run["exit"], run["signal"],
                        run["reason"])


def time_of(run: dict) -> float | None:
    """Return the time by which a run is sorted: its start, or the nearest
    that is known."""
    return next((run[name] for name in ("started", "due", "requested_at",
                                        "ended")
                 if run[name] is not None), None)


def seconds_of(run: dict) -> float | None:
    """Return how long a run took, in seconds; None if that is unknown."""
    if run["started"] is None or run["ended"] is None:
        return None
    return max(run["ended"] - run["started"], 0.0)


def rounded(seconds: float | None) -> float | None:
    """Return seconds to the millisecond: that is half the text in JSON."""
    return seconds and round(seconds, 3)


def quantile(ordered: list, part: float) -> float:
    """Return the value that this part of all is not above."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def good_seconds(entries: list) -> list:
    """Return the seconds of the last good runs, in order of length; [] if
    there are too few to say what is usual."""
    times = [took for _, _, took, code in entries
             if code == "o" and took is not None][-USUAL_RUNS:]
    return sorted(times) if len(times) >= ENOUGH_RUNS else []


def usual_seconds(entries: list) -> list | None:
    """Return [p10, p90] of the last good runs' seconds; None for too few."""
    times = good_seconds(entries)
    return [quantile(times, 0.1), quantile(times, 0.9)] if times else None


def longest_usual(entries: list) -> float | None:
    """Return the seconds after which a run counts as slow; None if its job
    ran too seldom to say."""
    times = good_seconds(entries)
    return max(3 * quantile(times, 0.95), 1.0) if times else None


def shortest_usual(entries: list) -> float | None:
    """Return the seconds below which a run is suspiciously fast; None if
    its job ran too seldom, or takes less than a second."""
    times = good_seconds(entries)
    return quantile(times, 0.05) / 5 if times and quantile(
        times, 0.05) >= 1 else None


def stripped_line(text: str) -> str:
    """Return a line as a terminal would leave it, without escapes."""
    import re
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b"
                  r"\\)?|[@-Z\\-_])", "", text)
    return escape_controls(text.rstrip("\r").rpartition("\r")[2]).strip()


def last_line(frames: bytes, bad: bool) -> str:
    """Return the last line of an output, at most 300 characters; of its
    errors, if the run went badly and wrote some."""
    kept = read_frames(frames)
    for streams in ((STDERR,), (STDOUT, STDERR), (NOTE,)):
        if streams == (STDERR,) and not bad:
            continue
        text = b"".join(data for stream, _, data in kept
                        if stream in streams)[-8192:]
        for line in reversed(text.decode("utf-8", "replace").split("\n")):
            line = stripped_line(line)
            if line:
                return line[:300]
    return ""


def whole_frames(data: bytes) -> int:
    """Return how many bytes at the beginning of `data` are whole frames.
    Raises ValueError if these are not frames."""
    at = 0
    while at + FRAME.size <= len(data):
        stream, _, length = FRAME.unpack_from(data, at)
        end = at + FRAME.size + length
        if stream > END or length > LONGEST_OUTPUT:
            raise ValueError
        if end > len(data):
            break
        at = end
    return at


def cut_to_frames(data: bytes, most: int) -> bytes:
    """Return at most `most` bytes of `data`: whole frames, or a part of the
    first."""
    at = 0
    while at + FRAME.size <= len(data):
        end = at + FRAME.size + FRAME.unpack_from(data, at)[2]
        if end > min(most, len(data)):
            break
        at = end
    return data[:at or most]


# ==========================================================================
# Credentials: who may do what, and who did it?                   (files; U)
#
# Of keys and tokens only SHA-256 hashes are kept. A repository, here and in
# the sections below, is called on the writer's thread with the open
# transaction `db`, or on any thread with a connection that only reads.
# ==========================================================================

DAY_SECONDS = 86_400.0


class Changes:
    """What the open transaction changes outside the database.

    `marked` is kind -> ids of what is published after the commit, `later`
    what is done then. Only the writer's thread uses it.
    """

    def __init__(self):
        self.marked: dict[str, dict] = {}
        self.later: list = []

    def mark_changed(self, kind: str, *ids) -> None:
        """Have the new state of these published."""
        self.marked.setdefault(kind, {}).update(dict.fromkeys(ids))

    def after_commit(self, function) -> None:
        """Have `function()` called when the transaction is on the disk."""
        self.later.append(function)

    def take_marked(self) -> dict[str, list]:
        """Return what was marked; then nothing is."""
        marked, self.marked = self.marked, {}
        return {kind: list(ids) for kind, ids in marked.items()}


class Timers:
    """What must be checked, and when. Only the writer's thread uses it.

    They are in memory only, and set anew at each start. A check decides by
    the database, so a timer that is too early does no harm.
    """

    def __init__(self):
        self.heap: list[tuple] = []         # (at, kind, key)
        self.times: dict[tuple, float] = {}     # (kind, key) -> at

    def schedule(self, kind: str, key, at: float | None) -> None:
        """Have (kind, key) checked by the time `at`, or earlier."""
        from heapq import heappush
        if at is None or at >= self.times.get((kind, key), FOREVER):
            return
        self.times[kind, key] = at
        heappush(self.heap, (at, kind, key))

    def take_due(self, now: float, most: int) -> list[tuple]:
        """Return at most `most` (kind, key) that are due, and forget them."""
        from heapq import heappop
        found = []
        while self.heap and self.heap[0][0] <= now and len(found) < most:
            at, kind, key = heappop(self.heap)
            if self.times.get((kind, key)) == at:
                del self.times[kind, key]
                found.append((kind, key))
        return found

    def next_time(self) -> float:
        """Return when the next one is due."""
        return self.heap[0][0] if self.heap else FOREVER


class Principal(FrozenRecord):
    """Who a token stands for: an operator, a viewer, or a host."""
    role: str
    host: str = ""


class AuditLog:
    """Who requested what: the table `audit`."""

    TABLES = """
create table audit (
    id integer primary key, at real not null unique, what text not null,
    host text not null default '', job integer,
    label text not null default '', args text not null default '{}',
    state text not null default '', reason text not null default '',
    nonce text not null default '');
create index audit_by_nonce on audit (nonce) where nonce <> '';
"""

    def record(self, db: Database, now: float, what: str, **columns) -> None:
        """Record who requested what. No two rows have the same time, because
        a page of them begins after a time."""
        last = db.value("select max(at) from audit") or 0.0
        if last < now + DAY_SECONDS:        # else a clock was wrong
            now = max(now, last + 0.001)
        db.insert("audit", at=now, what=what, **columns)

    def page(self, db: Database, before: float | None = None) -> dict:
        """Return the 100 newest rows before a time, the newest first."""
        import json
        rows = db.rows(
            "select a.at, 'operator' who, a.what, a.host, a.job, a.label, "
            "a.args, coalesce(q.state, a.state) state, coalesce(q.reason, "
            "a.reason) reason, (select id from runs where host = q.host and "
            "epoch = q.epoch and n = q.n) run from audit a left join requests"
            " q on a.nonce <> '' and q.nonce = a.nonce where a.at < ? order "
            "by a.at desc limit 101", LARGEST_TIME if before is None
            else before)
        for row in rows:
            row["args"] = json.loads(row["args"])
        return {"rows": rows[:100], "more": len(rows) > 100}


class Credentials:
    """The dashboard's keys, and the tokens of its hosts.

    `dash` is the dashboard's id, "" before it was created. The tokens are in
    memory as well: each HTTP request is judged by them, on any thread.
    """

    TABLES = """
create table dashboard (
    id integer primary key check (id = 1), dash text not null,
    salt text not null, rounds integer not null, api_sha256 text not null,
    view_sha256 text not null, ping_key text not null,
    badge_key text not null, created real not null);
"""

    def __init__(self, changes: Changes, audit: AuditLog):
        self.changes, self.audit = changes, audit
        self.dash = ""
        self.tokens: dict[str, Principal] = {}      # SHA-256 -> who

    def load(self, db: Database) -> None:
        """Read the keys and tokens again; other threads see the old or the
        new ones."""
        tokens = {token: Principal("host", host) for token, host in db.execute(
            "select token, host from hosts where token is not null")}
        found = db.row("select * from dashboard")
        if found:
            tokens[found["view_sha256"]] = Principal("viewer")
            tokens[found["api_sha256"]] = Principal("operator")
            self.dash = found["dash"]
        self.tokens = tokens

    def principal_of(self, token: str) -> Principal | None:
        """Return who a token stands for. It is looked up by its hash, so the
        time that takes says nothing about the tokens there are."""
        token = token[len(VIEW_PREFIX):] if token.startswith(VIEW_PREFIX) \
            else token
        return self.tokens.get(sha256_hex(token)) if is_hex(token, 64) \
            else None

    def read_keys(self, fields) -> dict:
        """Return the keys in a request as columns. Raises Error."""
        request = RequestFields(fields)
        return {"salt": request.hex("salt", 2 * SALT_BYTES),
                "rounds": request.whole("rounds", low=ROUNDS,
                                        high=MOST_ROUNDS),
                "api_sha256": request.hex("api_sha256", 64),
                "view_sha256": request.hex("view_sha256", 64)}

    def create(self, db: Database, fields, now: float) -> dict:
        """Create the dashboard; return its id. Raises Error (403) if this
        server has one."""
        from secrets import token_urlsafe
        if db.value("select 1 from dashboard"):
            raise Error("this server already has a dashboard",
                        "koitab -d join URL", 403)
        keys = self.read_keys(fields)
        self.refuse_used(db, keys["api_sha256"], keys["view_sha256"])
        dash = os.urandom(8).hex()
        db.insert("dashboard", id=1, dash=dash, **keys,
                  ping_key=token_urlsafe(16), badge_key=os.urandom(16).hex(),
                  created=now)
        self.changes.after_commit(lambda: self.load(db))
        return {"dash": dash}

    def rotate(self, db: Database, fields, now: float) -> dict:
        """Replace the dashboard's keys; the old ones open nothing any more.
        Raises Error."""
        keys = self.read_keys(fields)
        self.refuse_used(db, keys["api_sha256"], keys["view_sha256"])
        db.update("dashboard", keys, id=1)
        self.audit.record(db, now, "rotate")
        self.changes.after_commit(lambda: self.load(db))
        return {"dash": self.dash}

    def refuse_used(self, db: Database, *tokens: str) -> None:
        """Raise Error (409) if one of these would stand for two principals."""
        for token in tokens:
            if tokens.count(token) > 1 or db.value(
                    "select 1 from hosts where token = ?", token):
                raise Error("these keys are in use already", "", 409)

    def refuse_own(self, db: Database, token: str) -> None:
        """Raise Error (409) if a host's token is one of the dashboard's."""
        if db.value("select 1 from dashboard where ? in (api_sha256, "
                    "view_sha256)", token):
            raise Error("these keys are in use already", "", 409)

    def salt(self, db: Database) -> dict:
        """Return what the keys are derived with. Raises Error (404)."""
        found = db.row("select dash, salt, rounds from dashboard")
        if not found:
            raise not_found("dashboard")
        return found


# ==========================================================================
# Alerts: what is wrong now, and who is notified?                 (files; U)
#
# A change of state is notified once, when it begins and when it is over.
# That is decided in the transaction of its cause, so neither can be lost
# without the other. A subject is "job:ID", "host:ID" or "check:UUID".
# ==========================================================================

MOST_CHANNELS = 20


class Alert(FrozenRecord):
    """What is wrong with a subject, since when (seconds since 1970)."""
    subject: str
    kind: str
    since: float
    title: str
    text: str


class Alerts:
    """The tables of active alerts, snoozes, channels and notifications.

    `wake` is set when there are notifications to deliver.
    """

    TABLES = """
create table alerts (
    id integer primary key autoincrement, subject text not null,
    kind text not null, since real not null, text text not null,
    notified integer not null default 0, unique (subject, kind));
create table snoozes (subject text primary key, until real not null)
    without rowid;
create table channels (
    id integer primary key autoincrement, kind text not null,
    target text not null, last real, error text not null default '',
    created real not null);
create table notifications (
    id integer primary key autoincrement, channel integer not null,
    key text not null unique, at real not null, due real not null,
    tries integer not null default 0, title text not null,
    text text not null, subject text not null, kind text not null,
    resolved integer not null, run integer);
create index notifications_due on notifications (due);
create index notifications_of_run on notifications (run)
    where run is not null;
"""

    def __init__(self, changes: Changes, timers: Timers, audit: AuditLog,
                 clock: Clock):
        self.changes, self.timers = changes, timers
        self.audit, self.clock = audit, clock

    def load(self, db: Database) -> None:
        """Set the timers of the snoozes."""
        for subject, until in db.execute("select subject, until from "
                                         "snoozes"):
            self.timers.schedule("snooze", subject, until)

    # --- alerts

    def raise_alert(self, db: Database, alert: Alert, due: float = 0.0,
                    run: int | None = None) -> None:
        """Keep that something is wrong; notify if that is new.

        The notifications go out at `due`, or when the output of `run` has
        come. An alert that is active gets the new text.
        """
        text = alert.text[:2000]
        self.changes.mark_changed("alerts", (alert.subject, alert.kind))
        if db.update("alerts", {"text": text}, subject=alert.subject,
                     kind=alert.kind):
            return
        number = db.insert("alerts", subject=alert.subject, kind=alert.kind,
                           since=alert.since, text=text)
        if not self.snoozed_until(db, alert.subject):
            self.notify(db, number, alert.replace(text=text), due=due, run=run)

    def notify(self, db: Database, number: int, alert: Alert,
               resolved: bool = False, due: float = 0.0,
               run: int | None = None) -> None:
        """Add a notification about the alert `number` for each channel."""
        db.update("alerts", {"notified": 1}, id=number)
        event = "over" if resolved else "on"
        for channel in db.column("select id from channels"):
            self.add_notification(
                db, channel, f"{number}-{alert.kind}-{event}-{channel}",
                alert, resolved, due, run)

    def add_notification(self, db: Database, channel: int, key: str,
                         alert: Alert, resolved: bool = False,
                         due: float = 0.0, run: int | None = None) -> None:
        """Add a notification; because of its key it is there once only."""
        db.insert("notifications", "insert or ignore", channel=channel,
                  key=key, at=self.clock.now(), due=due, title=alert.title,
                  text=alert.text, subject=alert.subject, kind=alert.kind,
                  resolved=resolved, run=run)
        self.changes.mark_changed("notifications", key)

    def clear_alert(self, db: Database, subject: str, kind: str,
                    title: str) -> None:
        """End an alert; those who were notified of it get `title`."""
        found = db.row("select id, notified from alerts where subject = ? and "
                       "kind = ?", subject, kind)
        if not found:
            return
        if found["notified"]:
            self.notify(db, found["id"], Alert(subject, kind, 0.0, title, ""),
                        resolved=True)
        db.delete("alerts", id=found["id"])
        self.changes.mark_changed("alerts", (subject, kind))

    def kinds_of(self, db: Database, subject: str) -> set:
        """Return the kinds of a subject's active alerts."""
        return set(db.column("select kind from alerts where subject = ?",
                             subject))

    def drop(self, db: Database, subject: str) -> None:
        """Remove the alerts of a deleted subject; nobody is notified."""
        for kind in self.kinds_of(db, subject):
            self.changes.mark_changed("alerts", (subject, kind))
        db.delete("alerts", subject=subject)

    def find(self, db: Database, key: tuple) -> dict | None:
        """Return the alert of (subject, kind) as it is shown, or None."""
        return db.row("select subject, kind, since, text from alerts where "
                      "subject = ? and kind = ?", *key)

    def list_all(self, db: Database) -> list[dict]:
        """Return the active alerts as they are shown, the newest first."""
        return db.rows("select subject, kind, since, text from alerts order "
                       "by since desc")

    # --- snoozes

    def snoozed_until(self, db: Database, subject: str) -> float:
        """Return until when nobody is notified about a subject; 0 if it is
        not snoozed."""
        until = db.value("select until from snoozes where subject = ?",
                         subject) or 0
        return until if until > self.clock.now() else 0

    def snooze(self, db: Database, subject: str, until: float,
               now: float) -> None:
        """Notify nobody about a subject until a time; one in the past ends
        the snooze."""
        db.delete("snoozes", subject=subject)
        if until > now:
            db.insert("snoozes", subject=subject, until=until)
            self.timers.schedule("snooze", subject, until)
        else:
            self.notify_missed(db, subject)

    def check_snooze(self, db: Database, subject: str, now: float) -> None:
        """If a snooze is over, notify of the alerts that are still active."""
        until = db.value("select until from snoozes where subject = ?",
                         subject)
        if until is not None and until > now:
            self.timers.schedule("snooze", subject, until)
        elif until is not None:
            db.delete("snoozes", subject=subject)
            self.notify_missed(db, subject)

    def notify_missed(self, db: Database, subject: str) -> None:
        """Notify of the alerts of a subject that nobody knows of."""
        for row in db.rows("select id, kind, since, text from alerts where "
                           "subject = ? and not notified", subject):
            title = row["text"].partition("\n")[0][:200]
            self.notify(db, row["id"], Alert(subject, row["kind"],
                                             row["since"], title,
                                             row["text"]))

    # --- channels

    def change_channel(self, db: Database, fields, now: float) -> dict:
        """Add, delete or test a channel; return its id. Raises Error."""
        request = RequestFields(fields)
        action = request.choice("do", ("add", "delete", "test"), "add")
        if action == "add":
            channel = self.add_channel(db, request, now)
        else:
            channel = request.whole("id")
            if not db.value("select 1 from channels where id = ?", channel):
                raise not_found("channel")
        if action == "delete":
            db.delete("channels", id=channel)
            db.delete("notifications", channel=channel)
        if action == "test":
            self.add_notification(
                db, channel, f"test-{now}-{channel}",
                Alert("", "test", now, "koi: a test", "If you can read this, "
                      "koi can tell you what happens."), due=now)
        else:
            self.audit.record(db, now, "channel", state=action)
        return {"id": channel}

    def add_channel(self, db: Database, request: RequestFields,
                    now: float) -> int:
        """Add the channel that a request describes; return its id. Raises
        Error."""
        kind = request.choice("kind", ("mail", "webhook", "ntfy"))
        target = request.text("target", 1000).strip()
        if kind == "mail" and not (safe_address(target) and "@" in target
                                   and "," not in target):
            raise Error("this is no mail address that sendmail would get",
                        "name@example.org", 400)
        if kind != "mail" and not is_web_address(target):
            raise Error("this is no address of the web",
                        "https://example.org/path", 400)
        if db.value("select count(*) from channels") >= MOST_CHANNELS:
            raise Error(f"there are {MOST_CHANNELS} channels already", "",
                        403)
        return db.insert("channels", kind=kind, target=target, created=now)

    def list_channels(self, db: Database) -> dict:
        """Return the channels as they are shown, without passwords."""
        rows = db.rows("select id, kind, target, last, error from channels "
                       "order by id")
        for row in rows:
            row["target"] = without_password(row["target"])
        return {"channels": rows}

    # --- delivery

    def due_notifications(self, db: Database, now: float) -> list[dict]:
        """Return at most 100 notifications to deliver now, each with its
        channel."""
        return db.rows(
            "select m.*, c.kind way, c.target, d.dash from notifications m "
            "join channels c on c.id = m.channel cross join dashboard d "
            "where m.due <= ? order by m.id limit 100", now)

    def mark_delivered(self, db: Database, notification: int, error: str,
                       now: float) -> None:
        """Record an attempt to deliver; `error` is "" if it went well. Else
        it is repeated for a day, after 15 s to 1 h."""
        found = db.row("select channel, at, tries from notifications where "
                       "id = ?", notification)
        if not found:
            return
        if error and now - found["at"] < DAY_SECONDS:
            pause = min(15 * 2**min(found["tries"], 10), 3600)
            db.update("notifications", {"tries": found["tries"] + 1,
                                        "due": now + pause}, id=notification)
        else:
            db.delete("notifications", id=notification)
        db.update("channels", {"error": error[:500]}, id=found["channel"])
        if not error:
            db.update("channels", {"last": now}, id=found["channel"])

    def add_last_line(self, db: Database, run: int, line: str,
                      now: float) -> None:
        """Let notifications go that wait for a run's output, with its last
        line."""
        db.execute("update notifications set due = ?, text = text || ? where "
                   "run = ? and tries = 0 and due > ?",
                   now, f"\n\n{line}" if line else "", run, now)
        self.changes.mark_changed("notifications", run)


def is_web_address(text: str) -> bool:
    """Is `text` an http or https URL with a host, without anything that
    could break a request?"""
    from urllib.parse import urlsplit
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) \
            and text.isascii() and text.isprintable() and " " not in text \
            and parts.port != 0
    except ValueError:
        return False


def without_password(target: str) -> str:
    """Return a URL with its user and password hidden."""
    scheme, found, rest = target.partition("://")
    place, slash, path = rest.partition("/")
    if not found or "@" not in place:
        return target
    return f"{scheme}://***@{place.rpartition('@')[2]}{slash}{path}"


# ==========================================================================
# PingChecks: is a job that koid does not run still alive?        (files; U)
#
# A check expects pings by a period or a schedule. Without one it becomes
# late, and down after a grace time. Addresses, answers and states are those
# of Healthchecks, so whatever pings that can ping this.
# ==========================================================================

MOST_CHECKS = 1_000
KEEP_PINGS = 100                # of one check
PING_BODY_LIMIT = 10_000
LONGEST_MEASURED = 72 * 3600    # a start and an end that belong together
HISTORY_BAR = 90                # entries of a run history bar
SLUG_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
NEW_CHECK = {"tags": "", "desc": "", "kind": "simple", "period": 86_400.0,
             "grace": 3600.0, "schedule": "* * * * *", "tz": "UTC",
             "start_within": 0.0, "run_limit": 0.0, "manual_resume": 0,
             "methods": ""}


def down_at(check: dict, expected: float | None) -> float | None:
    """Return when a check goes down if no ping comes; None for never.

    As Healthchecks: a start that is open longer than the grace time, or
    nothing until the grace time after the expected ping. With a limit of
    its own for the start or the run, an open start has fulfilled what was
    expected, and only the limit of the run counts.
    """
    start, status, grace = check["last_start"], check["status"], \
        check["grace"]
    if check["start_within"] or check["run_limit"]:
        if start is not None and status != "down":
            return start + (check["run_limit"] or grace)
        return None if expected is None else expected + (
            check["start_within"] or grace)
    if start is not None and status != "down":
        expected = start if expected is None else min(expected, start)
    return None if expected is None else expected + grace


def check_state(check: dict, expected: float | None, now: float) -> str:
    """Return the state that is shown: new, up, grace, down or paused."""
    start, status = check["last_start"], check["status"]
    if start is not None and now >= start + (
            check["run_limit"] or check["grace"]):
        return "down"
    if status != "up" or expected is None:
        return status
    if (check["start_within"] or check["run_limit"]) and start is not None:
        return "up"
    if now >= expected + (check["start_within"] or check["grace"]):
        return "down"
    return "grace" if now >= expected else "up"


def after_ping(check: dict, kind: str, rid: str | None, now: float) -> dict:
    """Return the columns that a ping changes, by the rules of
    Healthchecks."""
    if kind == "start":
        return {"last_start": now, "last_rid": rid}
    if kind not in ("success", "fail"):
        return {}
    changed = {"last_ping": now, "last_duration": None,
               "status": "down" if kind == "fail" else "up"}
    if check["last_start"] is not None:
        if check["last_rid"] == rid:
            changed["last_duration"] = max(now - check["last_start"], 0.0)
            changed["last_start"] = None
        elif kind == "fail" or rid is None:
            changed["last_start"] = None
    return changed


def ping_kind(check: dict, action: str, method: str) -> str:
    """Return what a ping means for a check: success, fail, start, log, or
    ign for one that is ignored. `action` may be an exit status."""
    if check["methods"] and method not in check["methods"].split() \
            or check["status"] == "paused" and check["manual_resume"]:
        return "ign"
    status = status_in(action)
    return action if status is None else "fail" if status else "success"


def status_in(action: str) -> int | None:
    """Return the exit status that a ping's address ends with, or None."""
    return int(action[:9]) if action.isascii() and action.isdigit() else None


def is_uuid(text: str) -> bool:
    """Is it a UUID in its canonical form, in letters of any case?"""
    return len(text) == 36 and text[8:24:5] == "----" and text.isascii() \
        and text.count("-") == 4 and HEX.issuperset(
            text.replace("-", "").lower())


def describe_period(period: float) -> str:
    """Return a period of seconds in words: every 5 minutes, every day."""
    for name, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if period % size == 0:
            count = int(period // size)
            return f"every {name}" if count == 1 else \
                f"every {plural(count, name)}"
    return f"every {period:g} seconds"


def header_text(text, most: int) -> str:
    """Return what a header says as text that SQLite takes."""
    return str(text or "")[:most].replace("\0", "").encode(
        "utf-8", "replace").decode()


class PingChecks:
    """The tables of checks, their pings and changes of state ("flips").

    `zone_of` finds a time zone by its name.
    """

    TABLES = """
create table checks (
    id integer primary key autoincrement, uuid text not null unique,
    name text not null, slug text not null, tags text not null,
    "desc" text not null, kind text not null, period real not null,
    grace real not null, schedule text not null, tz text not null,
    start_within real not null, run_limit real not null,
    manual_resume integer not null, methods text not null,
    status text not null default 'new', last_ping real, last_start real,
    last_rid text, last_duration real, alert_after real,
    n integer not null default 0, created real not null);
create index checks_by_slug on checks (slug);
create table pings (
    id integer primary key, "check" integer not null, n integer not null,
    at real not null, kind text not null, exit integer, rid text,
    scheme text not null, method text not null, ua text not null,
    ip text not null, duration real, size integer not null,
    line text not null, body blob not null);
create unique index pings_of_check on pings ("check", n);
create table flips (
    id integer primary key, "check" integer not null, at real not null,
    old text not null, new text not null, reason text not null);
create index flips_by_time on flips (at);
create index flips_of_check on flips ("check", at);
"""

    def __init__(self, changes: Changes, timers: Timers, audit: AuditLog,
                 alerts: Alerts, zone_of):
        self.changes, self.timers, self.audit = changes, timers, audit
        self.alerts, self.zone_of = alerts, zone_of
        self.zones: dict[str, Zone] = {}    # each is read from a file once

    def load(self, db: Database, now: float) -> None:
        """Set the timers of the checks that may go down."""
        for key in db.column("select id from checks where status <> 'down'"):
            self.timers.schedule("check", key, now)

    # --- when a ping is expected

    def expected(self, check: dict) -> float | None:
        """Return when the next ping should come; None if none is expected.
        Raises Error for a zone that does not exist any more."""
        if check["status"] != "up" or check["last_ping"] is None:
            return None
        if check["kind"] == "simple":
            return check["last_ping"] + check["period"]
        schedule, zone = self.schedule_of(check["schedule"], check["tz"])
        return schedule.next(int(check["last_ping"]), zone)

    def schedule_of(self, text: str, tz: str) -> tuple[Schedule, Zone]:
        """Return the schedule and the zone that a check names. Raises
        Error."""
        try:
            schedule = Schedule.parse(text)
        except ScheduleError as error:
            raise Error(f"the schedule: {error}", "five columns, as in a "
                        "crontab: */5 * * * *", 400) from None
        if tz in ("", "UTC"):
            return schedule, UTC
        if tz not in self.zones:
            try:
                self.zones[tz] = self.zone_of(tz)
            except Error as error:
                raise Error(error.message, error.hint, 400) from None
        return schedule, self.zones[tz]

    def set_timer(self, check: dict, now: float) -> float | None:
        """Set the timer to when a check's state may change by itself: to
        late, or to down. Return when it goes down, or None.

        An error must not stop pings: then the timer is set to an hour.
        """
        try:
            expected = self.expected(check)
            down = down_at(check, expected)
        except Exception:
            self.timers.schedule("check", check["id"], now + 3600)
            return now + 3600
        later = [at for at in (expected, down) if at is not None and at > now]
        self.timers.schedule("check", check["id"], min(later, default=down))
        return down

    # --- pings

    def ping(self, db: Database, key: str, slug: str | None, action: str,
             call: dict, now: float) -> tuple[int, str]:
        """Take a ping to a check by its UUID, or by the ping key and a slug;
        return (status, text) as Healthchecks answers.

        `call` has scheme, method, ua, ip, rid, create and body.
        """
        rid, status, created = call.get("rid"), status_in(action), False
        if slug is None:
            if status is not None and status > 255:
                return 400, "invalid url format"
            check = self.by_uuid(db, key.lower())
            if not check:
                return 404, "not found"
        else:
            if not SLUG_CHARACTERS.issuperset(slug) or not slug:
                return 400, "invalid url format"
            known = db.value("select 1 from dashboard where ping_key = ?", key)
            found = db.rows("select * from checks where slug = ? limit 2",
                            slug) if known else []
            if len(found) > 1:
                return 409, "ambiguous slug"
            check = found[0] if found else None
            if not check and (not known or not call.get("create")
                              or self.count(db) >= 2 * MOST_CHECKS):
                return 404, "not found"
        if status is not None and status > 255:
            return 400, "invalid url format"
        if rid is not None and not is_uuid(rid):
            return 400, "invalid uuid format"
        if not check:
            check, created = self.insert(db, now, {
                **NEW_CHECK, "name": slug, "slug": slug}), True
        self.record_ping(db, check, action, rid and rid.lower(), call, now)
        return (201, "Created") if created else (200, "OK")

    def record_ping(self, db: Database, check: dict, action: str,
                    rid: str | None, call: dict, now: float) -> None:
        """Keep a ping, and change the check as it says."""
        kind = ping_kind(check, action, call["method"])
        changed = after_ping(check, kind, rid, now)
        changed["n"] = check["n"] + 1
        old, check = check["status"], {**check, **changed}
        if kind not in ("log", "ign"):
            changed["alert_after"] = self.set_timer(check, now)
        duration = changed.get("last_duration")
        if duration is not None and duration > LONGEST_MEASURED:
            duration = None
        self.insert_ping(db, check, now, call, kind=kind, rid=rid,
                         exit=status_in(action), duration=duration)
        db.update("checks", changed, id=check["id"])
        self.changes.mark_changed("checks", check["uuid"])
        if check["status"] != old:
            self.record_flip(db, check, old, now,
                             "fail" if kind == "fail" else "")

    def insert_ping(self, db: Database, check: dict, now: float, call: dict,
                    **columns) -> None:
        """Add a ping; of its check only the last KEEP_PINGS stay."""
        body = bytes(call.get("body") or b"")[:PING_BODY_LIMIT]
        line = body[-1000:].decode("utf-8", "replace").strip()
        headers = {name: header_text(call.get(name), most) for name, most in (
            ("scheme", 10), ("method", 10), ("ua", 200), ("ip", 50))}
        db.insert("pings", check=check["id"], n=check["n"], at=now,
                  **columns, **headers, size=len(body), body=body,
                  line=stripped_line(line.rpartition("\n")[2])[:200])
        if check["n"] % KEEP_PINGS == 0:
            db.execute('delete from pings where "check" = ? and n <= ?',
                       check["id"], check["n"] - KEEP_PINGS)

    def record_flip(self, db: Database, check: dict, old: str, at: float,
                    reason: str) -> None:
        """Keep that a check has changed its state, and alert."""
        db.insert("flips", check=check["id"], at=at, old=old,
                  new=check["status"], reason=reason)
        subject = f"check:{check['uuid']}"
        name = check["name"] or check["slug"] or check["uuid"]
        if check["status"] != "down":
            for kind in ("failed", "overdue"):
                self.alerts.clear_alert(db, subject, kind,
                                        f"{name} is {check['status']}")
        elif reason == "fail":
            self.alerts.raise_alert(db, Alert(
                subject, "failed", at, f"{name} failed",
                f"{name} has told a failure"))
        else:
            self.alerts.raise_alert(db, Alert(
                subject, "overdue", at, f"{name} is overdue",
                f"{name} {reason}"))

    def check_deadline(self, db: Database, key: int, now: float) -> None:
        """Let a check go down if its ping is overdue: at the time when it
        should have been noticed, however late that is."""
        check = db.row("select * from checks where id = ?", key)
        if not check or check["status"] == "down":
            return
        self.changes.mark_changed("checks", check["uuid"])
        when = down_at(check, self.expected(check))
        if when is None or when > now:
            self.set_timer(check, now)
            db.update("checks", {"alert_after": when}, id=key)
            return
        old, check["status"] = check["status"], "down"
        db.update("checks", {"status": "down", "alert_after": None}, id=key)
        self.record_flip(db, check, old, when,
                         "has started, and did not end in time"
                         if check["last_start"] is not None
                         else "has sent no ping")

    # --- checks, as people change them

    def create(self, db: Database, fields, now: float) -> dict:
        """Add a check; return its id. Raises Error."""
        if self.count(db) >= MOST_CHECKS:
            raise Error(f"there are {MOST_CHECKS:,} checks already", "", 403)
        check = self.insert(db, now, self.read_check(
            RequestFields(fields, "the check"), {}))
        self.audit.record(db, now, "check", label=check["name"], state="made")
        self.changes.mark_changed("checks", check["uuid"])
        return {"id": check["uuid"]}

    def read_check(self, request: RequestFields, old: dict) -> dict:
        """Return the columns that a request gives a check; what it does not
        name stays as in `old`. Raises Error."""
        def seconds(name: str, default: float, low: float) -> float:
            value = request.number(name, old.get(name, default),
                                   high=86_400 * 365)
            if value and value < 60 or value < low:
                raise request.wrong(name, "is less than a minute")
            return float(value)

        slug = request.text("slug", 100, old.get("slug", ""))
        if not SLUG_CHARACTERS.issuperset(slug):
            raise request.wrong("slug", "may have a to z, 0 to 9, - and _")
        texts = {name: request.text(name, most, old.get(name, default))
                 for name, most, default in (
                     ("name", 100, ""), ("tags", 500, ""), ("desc", 2000, ""),
                     ("schedule", 200, "* * * * *"), ("tz", 60, "UTC"))}
        found = {
            **texts, "slug": slug, "kind": request.choice(
                "kind", ("simple", "cron"), old.get("kind", "simple")),
            "period": seconds("period", 86_400, 60),
            "grace": seconds("grace", 3600, 60),
            "start_within": seconds("start_within", 0, 0),
            "run_limit": seconds("run_limit", 0, 0),
            "manual_resume": int(request.flag("manual_resume", bool(
                old.get("manual_resume", False)))),
            "methods": request.choice("methods", ("", "POST"),
                                      old.get("methods", ""))}
        if found["kind"] == "cron":
            self.schedule_of(found["schedule"], found["tz"])
        return found

    def change(self, db: Database, uuid: str, fields, now: float) -> dict:
        """Edit, pause, resume or delete a check. Raises Error."""
        request = RequestFields(fields, "the check")
        check = self.find(db, uuid)
        action = request.choice("do", ("edit", "pause", "resume", "delete"),
                                "edit")
        if action == "resume" and check["status"] != "paused":
            raise Error("the check is not paused", "", 409)
        self.audit.record(db, now, "check", label=check["name"], state=action)
        self.changes.mark_changed("checks", uuid)
        if action == "delete":
            self.delete(db, check)
            return {}
        if action == "edit":
            changed = self.read_check(request, check)
        elif action == "pause":
            changed = {"status": "paused", "last_start": None}
        else:
            changed = {"status": "new", "last_start": None, "last_ping": None}
        old, check = check["status"], {**check, **changed}
        changed["alert_after"] = self.set_timer(check, now)
        db.update("checks", changed, id=check["id"])
        if check["status"] != old:
            self.record_flip(db, check, old, now, "")
        return {}

    def delete(self, db: Database, check: dict) -> None:
        """Remove a check with its pings, flips and alerts."""
        db.delete("checks", id=check["id"])
        db.delete("pings", check=check["id"])
        db.delete("flips", check=check["id"])
        self.alerts.drop(db, f"check:{check['uuid']}")

    # --- the tables

    def count(self, db: Database) -> int:
        """Return how many checks there are."""
        return db.value("select count(*) from checks")

    def insert(self, db: Database, now: float, columns: dict) -> dict:
        """Add a check of these columns; return its row."""
        from uuid import uuid4
        key = db.insert("checks", uuid=str(uuid4()), created=now, **columns)
        return db.row("select * from checks where id = ?", key)

    def by_uuid(self, db: Database, uuid: str) -> dict | None:
        """Return the row of a check, or None."""
        return db.row("select * from checks where uuid = ?", uuid) \
            if is_uuid(uuid) else None

    def find(self, db: Database, uuid: str) -> dict:
        """Return the row of a check. Raises Error (404)."""
        check = self.by_uuid(db, uuid)
        if not check:
            raise not_found("check")
        return check

    # --- checks, as they are shown

    def list_all(self, db: Database, now: float) -> list[dict]:
        """Return all checks as they are shown, in the order of creation."""
        return [self.shape(db, check, now) for check in db.rows(
            "select * from checks order by id")]

    def shape(self, db: Database, check: dict, now: float) -> dict:
        """Return the row of a check as it is shown, with its last pings."""
        try:
            expected = self.expected(check)
            words = Schedule.parse(check["schedule"]).describe() \
                if check["kind"] == "cron" \
                else describe_period(check["period"])
        except (Error, ScheduleError) as error:
            expected, words = None, str(error)
        entries = [
            (n, rounded(at), rounded(took), "f" if kind == "fail" else "o")
            for n, at, took, kind in db.execute(
                'select n, at, duration, kind from pings where "check" = ? '
                "and kind in ('success', 'fail') order by n desc limit ?",
                check["id"], HISTORY_BAR)]
        duration = check["last_duration"]
        return {
            **{name: check[name] for name in (
                "name", "slug", "tags", "desc", "kind", "period", "grace",
                "schedule", "tz", "start_within", "run_limit", "methods",
                "last_ping", "last_start", "n")},
            "id": check["uuid"], "words": words,
            "manual_resume": bool(check["manual_resume"]),
            "state": check_state(check, expected, now),
            "started": check["last_start"] is not None,
            "last_duration": duration if duration is None
            or duration <= LONGEST_MEASURED else None, "next": expected,
            "recent_runs": entries[::-1],
            "snoozed": self.alerts.snoozed_until(db,
                                                 f"check:{check['uuid']}")}

    def list_pings(self, db: Database, uuid: str,
                   before: int | None = None) -> dict:
        """Return the 100 newest pings of a check before a number. Raises
        Error."""
        rows = db.rows("select n, at, kind, exit, rid, method, ua, ip, "
                       'size, duration, line from pings where "check" = ? '
                       "and n < ? order by n desc limit 101",
                       self.find(db, uuid)["id"],
                       LARGEST_WHOLE if before is None else before)
        return {"pings": rows[:100], "more": len(rows) > 100}

    def ping_body(self, db: Database, uuid: str, n: int) -> bytes:
        """Return the body of a ping. Raises Error."""
        body = db.value('select body from pings where "check" = ? and n = ?',
                        self.find(db, uuid)["id"], n)
        if body is None:
            raise not_found("ping")
        return body


# ==========================================================================
# Hosts: which hosts and which jobs are there?                    (files; U)
#
# A host sends the list of its jobs with a MAC, and it is kept as it came for
# those who hold the key. A job that leaves its tab is marked `removed`; its
# runs stay. What people remove is `deleted`: hidden at once, and its rows
# are removed in small steps (Retention).
# ==========================================================================

MOST_JOBS, MOST_HOSTS, LONGEST_HOST_LIST = 10_000, 5_000, 8 * 2**20
DUPLICATE_SHOWN = 600.0         # seconds after its last refused sync


class HostStatus:
    """What changes about a host with each sync; in memory, because a commit
    for each would be too many. Only the writer's thread changes it.

    `up_since` is since when a missing sync would have been noticed.
    """

    def __init__(self, row: dict, now: float):
        self.number, self.host = row["id"], row["host"]
        self.seen = row["seen"]             # the last sync; None: none yet
        self.stored_seen = row["seen"] or 0.0   # what the database has
        self.is_down = bool(row["down"])
        self.loaded = self.up_since = now
        self.duplicate_at = 0.0             # when another one was refused


class Hosts:
    """The tables of hosts and of their jobs."""

    TABLES = """
create table hosts (
    id integer primary key autoincrement, host text not null unique,
    name text not null, token text, joined real not null, seen real,
    down integer not null default 0, deleted integer not null default 0,
    epoch integer, instance text not null default '',
    "offset" real not null default 0, zone text not null default '',
    skew real not null default 0, version text not null default '',
    boot text not null default '', key text not null default '',
    list text, mac text, list_sha text,
    problems text not null default '[]');
create unique index hosts_by_token on hosts (token) where token is not null;
create table jobs (
    id integer primary key autoincrement, host integer not null,
    user text not null, tag text not null, section text not null,
    name text not null, label text not null,
    timing text not null default '', words text not null default '',
    command text not null default '', confirm text not null default 'no',
    spec text not null default '', next real, paused real,
    removed integer not null default 0, deleted integer not null default 0,
    failing_since real, failures integer not null default 0, last_ok real,
    last_failed integer, unique (host, user, tag));
create index jobs_deleted on jobs (deleted) where deleted;
"""

    def __init__(self, changes: Changes, audit: AuditLog, alerts: Alerts,
                 credentials: Credentials, clock: Clock):
        self.changes, self.audit, self.alerts = changes, audit, alerts
        self.credentials, self.clock = credentials, clock
        self.statuses: dict[str, HostStatus] = {}       # host -> its status
        self.ids: dict[int, str] = {}       # number in the database -> host

    def load(self, db: Database) -> None:
        """Read which hosts there are; those that were known keep their
        status. Other threads see the old or the new hosts."""
        now = self.clock.now()
        statuses = {row["host"]: self.statuses.get(row["host"])
                    or HostStatus(row, now) for row in db.rows(
                        "select id, host, seen, down from hosts where not "
                        "deleted")}
        self.ids = {status.number: host for host, status in statuses.items()}
        self.statuses = statuses

    def status_of(self, host: str) -> HostStatus:
        """Return the status of a host by its id. Raises Error (404)."""
        status = self.statuses.get(host)
        if not status:
            raise not_found("host")
        return status

    def by_number(self, number: int) -> HostStatus | None:
        """Return the status of a host by its number, or None."""
        return self.statuses.get(self.ids.get(number, ""))

    # --- joining and leaving

    def join(self, db: Database, fields, now: float) -> dict:
        """Add a host, or let one join again; return the dashboard's id.
        Raises Error."""
        request = RequestFields(fields)
        host, token = request.hex("host", 32), request.hex("token_sha256", 64)
        name = request.text("name", 255) or host[:8]
        known = db.row("select id, token from hosts where host = ?", host)
        if not known or known["token"] != token:
            self.credentials.refuse_own(db, token)
            self.credentials.refuse_used(db, token)
        if known:
            db.update("hosts", {"name": name, "token": token},
                      id=known["id"])
        elif db.value("select count(*) from hosts") >= MOST_HOSTS:
            raise Error(f"there are {MOST_HOSTS:,} hosts already", "", 403)
        else:
            db.insert("hosts", host=host, name=name, token=token, joined=now)
        self.audit.record(db, now, "join", host=host, label=name)
        self.reload(db, host)
        return {"dash": self.credentials.dash}

    def leave(self, db: Database, host: str, now: float) -> dict:
        """Refuse a host's syncs from now on; its runs stay. Raises Error."""
        number = self.status_of(host).number
        db.update("hosts", {"token": None, "down": 0}, id=number)
        for job in db.column("select id from jobs where host = ?", number):
            self.remove_job(db, job)
        self.alerts.drop(db, f"host:{host}")
        self.audit.record(db, now, "forget", host=host)
        self.reload(db, host)
        self.changes.mark_changed("reset", host)
        return {}

    def delete(self, db: Database, host: str) -> list[int]:
        """Hide a host that has left; return its jobs. The id can join again,
        as another host."""
        number = self.status_of(host).number
        db.update("hosts", {"deleted": 1, "host": f"{host}-{number}"},
                  id=number)
        self.reload(db, host)
        return db.column("select id from jobs where host = ?", number)

    def reload(self, db: Database, host: str) -> None:
        """Read hosts and tokens again after the commit."""
        self.changes.after_commit(lambda: self.load(db))
        self.changes.after_commit(lambda: self.credentials.load(db))
        self.changes.mark_changed("hosts", host)

    # --- hosts

    def row(self, db: Database, status: HostStatus) -> dict:
        """Return the row of a host, without its list of jobs."""
        found = db.row("select * from hosts where id = ?", status.number)
        del found["list"], found["mac"]
        return found

    def name_of(self, db: Database, status: HostStatus) -> str:
        """Return the name of a host."""
        return db.value("select name from hosts where id = ?", status.number)

    def skew_of(self, db: Database, status: HostStatus) -> float:
        """Return our clock minus the host's in seconds; 0 below 5."""
        skew = db.value("select skew from hosts where id = ?",
                        status.number) or 0.0
        return skew if abs(skew) > 5 else 0.0

    def store_seen(self, db: Database) -> bool:
        """Write when the hosts were seen, for all at once."""
        for status in self.statuses.values():
            if (status.seen or 0) > status.stored_seen:
                db.update("hosts", {"seen": status.seen}, id=status.number)
            status.stored_seen = status.seen or 0.0
        return False

    def list_all(self, db: Database, now: float) -> list[dict]:
        """Return all hosts as they are shown, by name."""
        return [self.shape(row, now) for row in db.rows(
            "select * from hosts where not deleted order by name, id")]

    def shape(self, row: dict, now: float) -> dict:
        """Return the row of a host as it is shown."""
        import json
        status = self.statuses.get(row["host"]) or HostStatus(row, now)
        return {"id": row["host"], "name": row["name"], "seen": status.seen,
                "state": host_state(row["token"], status, now),
                "since": row["joined"], **{name: row[name] for name in (
                    "offset", "zone", "skew", "version", "key")},
                "problems": json.loads(row["problems"])}

    def signed_list(self, db: Database, host: str) -> dict:
        """Return a host's list of jobs as it came, and its MAC. Raises
        Error."""
        found = db.row("select list body, mac from hosts where id = ?",
                       self.status_of(host).number)
        if not found or found["body"] is None:
            raise not_found("list")
        return found

    # --- jobs

    def store_list(self, db: Database, status: HostStatus,
                   request: RequestFields) -> str:
        """Keep a list of jobs as it came, and take the jobs from it; return
        the SHA-256 of the list. Raises Error."""
        import json
        body = request.text("body", LONGEST_HOST_LIST)
        mac = request.hex("mac", 64)
        try:
            inner = RequestFields(json.loads(body), "the list")
            jobs = [read_job(text) for text in inner.get("jobs", list,
                                                         MISSING)]
            paused = RequestFields(inner.get("paused", dict, {}), "paused")
        except (ValueError, RecursionError):
            raise Error("the list is no JSON", "", 400) from None
        if inner.text("host") != status.host:
            raise Error("this is the list of another host", "", 400)
        if len(jobs) > MOST_JOBS:
            raise Error(f"more than {MOST_JOBS:,} jobs", "", 413)
        known = {(row["user"], row["tag"]): row for row in db.rows(
            "select id, user, tag, spec, paused, removed from jobs where host "
            "= ? and not deleted", status.number)}
        for job in jobs:
            job["paused"] = paused.number(f"{job['user']}\n{job['tag']}",
                                          None)
            self.store_job(db, status, job,
                           known.pop((job["user"], job["tag"]), None))
        partial = inner.get("partial", list, [])    # users with more jobs
        for row in known.values():
            if not row["removed"] and row["user"] not in partial:
                self.remove_job(db, row["id"])
        sha = sha256_hex(body)
        db.update("hosts", {
            "list": body, "mac": mac, "list_sha": sha,
            "key": inner.text("key", 16, ""),
            "name": inner.text("name", 255, status.host[:8])},
            id=status.number)
        self.changes.mark_changed("hosts", status.host)
        return sha

    def store_job(self, db: Database, status: HostStatus, job: dict,
                  known: dict | None) -> None:
        """Keep a job of a list; `known` is its row, if there is one."""
        if not known:
            self.insert_job(db, status, job)
        elif known["removed"] or any(known[name] != job[name]
                                     for name in ("spec", "paused")):
            db.update("jobs", {**job, "removed": 0}, id=known["id"])
            self.changes.mark_changed("jobs", known["id"])

    def insert_job(self, db: Database, status: HostStatus, job: dict) -> int:
        """Add a job of these columns; return its id."""
        number = db.insert("jobs", host=status.number, **job)
        self.changes.mark_changed("jobs", number)
        return number

    def job_of_record(self, db: Database, status: HostStatus,
                      record: dict) -> int:
        """Return the job of a run's record. An unknown one is added, because
        its tab may have changed before the list came. Raises Error."""
        found = db.value("select id from jobs where host = ? and user = ? "
                         "and tag = ?", status.number, record["user"],
                         record["tag"])
        if found:
            return found
        if db.value("select count(*) from jobs where host = ?",
                    status.number) >= 2 * MOST_JOBS:
            raise Error(f"the host has more than {2 * MOST_JOBS:,} jobs",
                        "forget some that are gone", 413)
        return self.insert_job(db, status, {"removed": 1, **{
            name: record[name] for name in ("user", "tag", "section", "name",
                                            "label")}})

    def remove_job(self, db: Database, job: int) -> None:
        """Mark a job that is in no tab any more; its runs stay."""
        db.update("jobs", {"removed": 1, "next": None}, id=job)
        self.alerts.drop(db, f"job:{job}")
        self.changes.mark_changed("jobs", job)

    def delete_job(self, db: Database, job: int) -> None:
        """Hide a job; one of the same user and tag will be another one."""
        self.remove_job(db, job)
        db.execute("update jobs set deleted = 1, tag = tag || '-' || id where "
                   "id = ?", job)

    def job(self, db: Database, job: int) -> dict:
        """Return the row of a job. Raises Error (404)."""
        row = db.row("select * from jobs where id = ? and not deleted",
                     job) if 0 <= job <= LARGEST_WHOLE else None
        if not row:
            raise not_found("job")
        return row

    def job_name(self, db: Database, job: int) -> str:
        """Return a job's name for people: Section/Name on HOST."""
        row = db.row("select j.section, j.name, j.label, h.name host from "
                     "jobs j join hosts h on h.id = j.host where j.id = ?",
                     job)
        name = escape_controls(row["name"] or row["label"])[:100]
        if row["section"]:
            name = f"{escape_controls(row['section'])[:50]}/{name}"
        return f"{name} on {row['host']}"


def host_state(token: str | None, status: HostStatus, now: float) -> str:
    """Return the state of a host that is shown: left, new, down,
    duplicate (another koid with its id was refused), or up."""
    if not token:
        return "left"
    if status.seen is None:
        return "new"
    if status.is_down:
        return "down"
    return "duplicate" if status.duplicate_at > now - DUPLICATE_SHOWN else "up"


def read_job(text) -> dict:
    """Return a job of a host's list as columns; `text` is its JSON. Raises
    ValueError and Error."""
    import json
    if not isinstance(text, str) or not is_text(text):
        raise ValueError
    request = RequestFields(json.loads(text), "a job")
    job = {name: request.text(name, most, "") for name, most in (
        ("section", 1000), ("name", 1000), ("label", 200_000),
        ("words", 5000), ("command", 200_000), ("confirm", 10))}
    return {"user": request.text("user", 256), "tag": request.text("tag", 100),
            "timing": request.text("when", 1000), "spec": text, **job}


# ==========================================================================
# Runs: which runs were there, with which output?                 (files; U)
#
# A run is known by (host, epoch, n). Its output comes in pieces after its
# end, and is kept in the order in which it came; LiveOutput has that of
# runs that are followed, in memory only.
# ==========================================================================

OUTPUT_PART = 2**20             # bytes of an output in one answer
MOST_LIVE, LIVE_ROOM = 32, 2**21    # runs that are followed; bytes of each
FOLLOWED_FOR = 15.0             # seconds after the last request for it
KEEP_OUTPUT_DAYS = 90           # twice as long when the run failed
SENT_COLUMNS = ("change", "trigger", "state", "due", "requested_at", "started",
                "ended", "exit", "signal", "reason", "args", "attempt",
                "count", "bytes", "cut", "size", "nonce")
SHOWN_OF_RUN = ("id, job, host, n, epoch, trigger, state, due, requested_at, "
                "started, ended, exit, signal, reason, args, attempt, count, "
                "bytes, cut, size, have, line")


class LiveOutput:
    """What runs that are followed have written so far.

    In memory only: it comes again, whole, when they have ended. Any thread
    may use it.
    """

    def __init__(self):
        import threading
        self.lock = threading.Lock()
        self.buffers: dict[int, tuple] = {}     # run -> (begin, bytes)
        self.followed: dict[int, tuple] = {}    # run -> (host, n, until)

    def follow(self, run: int, host: str, n: int, now: float) -> bool:
        """Note that somebody follows a run; return whether that is new."""
        with self.lock:
            before = self.followed.get(run)
            self.followed[run] = host, n, now + FOLLOWED_FOR
            return not before or before[2] < now

    def demanded(self, host: str, now: float) -> dict[int, int]:
        """Return the runs of a host that are followed: n -> the offset up to
        which we have their output."""
        with self.lock:
            for run in [run for run, (_, _, until) in self.followed.items()
                        if until < now - FOLLOWED_FOR]:
                del self.followed[run]
                self.buffers.pop(run, None)
            found = {}
            for run, (whose, n, until) in self.followed.items():
                if whose == host and until >= now:
                    begin, data = self.buffers.get(run, (0, b""))
                    found[n] = begin + len(data)
            return found

    def run_of(self, host: str, n: int) -> int | None:
        """Return the run of this number of a host, if it is followed."""
        with self.lock:
            return next((run for run, (whose, number, _) in
                         self.followed.items() if (whose, number)
                         == (host, n)), None)

    def append(self, run: int, at: int, data: bytes, reset: bool) -> bool:
        """Add whole frames that begin at the offset `at`; return False if
        they do not follow what is here. With `reset` they begin anew."""
        with self.lock:
            if run not in self.followed:
                return False
            if reset or run not in self.buffers:
                while len(self.buffers) >= MOST_LIVE:
                    del self.buffers[next(iter(self.buffers))]
                self.buffers[run] = at, b""
            begin, before = self.buffers[run]
            if at != begin + len(before):
                return False
            whole, cut = before + data, 0
            while len(whole) - cut > LIVE_ROOM:
                cut += FRAME.size + FRAME.unpack_from(whole, cut)[2]
            self.buffers[run] = begin + cut, whole[cut:]
            return True

    def end(self, run: int) -> None:
        """Forget a run: its output is in the database."""
        with self.lock:
            self.buffers.pop(run, None)
            self.followed.pop(run, None)

    def get(self, run: int) -> tuple[int, bytes] | None:
        """Return (offset of the first byte, bytes), or None."""
        with self.lock:
            return self.buffers.get(run)


class Runs:
    """The tables of runs and their outputs."""

    TABLES = """
create table runs (
    id integer primary key autoincrement, job integer not null,
    host integer not null, epoch integer not null, n integer not null,
    change integer not null, trigger text not null, state text not null,
    at real not null, due real, requested_at real, started real, ended real,
    exit integer, signal integer, reason text not null, args text not null,
    attempt integer not null, count integer not null,
    bytes integer not null, cut integer not null, size integer not null,
    have integer not null default 0, line text not null default '',
    nonce text not null default '', keep_until real not null default 0,
    indexed integer not null default 0);
create unique index runs_of_host on runs (host, epoch, n);
create index runs_of_job on runs (job, id);
create index runs_good on runs (job, id) where state = 'done' and exit = 0;
create index runs_by_time on runs (at);
create index runs_long on runs (at) where ended - started > 3600;
create index runs_active on runs (host)
    where state in ('queued', 'running');
create index runs_active_of_job on runs (job)
    where state in ('queued', 'running');
create index runs_missing_output on runs (host, epoch, n)
    where have < size and state not in ('queued', 'running');
create index runs_expiring on runs (keep_until) where have > 0;
create table outputs (
    id integer primary key, run integer not null, at integer not null,
    data blob not null);
create unique index outputs_of_run on outputs (run, at);
create table unindexed (run integer primary key);
"""

    def __init__(self, changes: Changes, alerts: Alerts, hosts: Hosts):
        self.changes, self.alerts, self.hosts = changes, alerts, hosts
        self.live = LiveOutput()

    # --- finding and showing

    def find(self, db: Database, run: int) -> dict:
        """Return the row of a run. Raises Error (404)."""
        row = db.row(f"select {SHOWN_OF_RUN} from runs where id = ? and not "
                     "(select deleted from jobs where id = job)",
                     run) if 0 <= run <= LARGEST_WHOLE else None
        if not row:
            raise not_found("run")
        return row

    def shape(self, row: dict) -> dict:
        """Return the row of a run as it is shown."""
        import json
        return {**row, "host": self.hosts.ids.get(row["host"], ""),
                "cut": bool(row["cut"]), "args": json.loads(row["args"])}

    def history(self, db: Database, job: int) -> list[tuple]:
        """Return the entries of a job's run history bar, the oldest
        first."""
        rows = db.execute(
            "select id, coalesce(started, due, requested_at, ended), "
            "max(ended - started, 0.0), state, exit, signal, reason from runs "
            "where job = ? order by id desc limit ?", job,
            HISTORY_BAR).fetchall()
        return [(run, rounded(at), rounded(took), outcome_code(*how))
                for run, at, took, *how in reversed(rows)]

    def active(self, db: Database, job: int) -> list[int]:
        """Return the runs of a job that are queued or running."""
        return db.column("select id from runs where job = ? and state in "
                         "('queued', 'running') order by id", job)

    def last_ended(self, db: Database, job: int) -> dict | None:
        """Return the newest run of a job that is over, or None."""
        return db.row(f"select {SHOWN_OF_RUN} from runs where job = ? and "
                      "state not in ('queued', 'running') order by id desc "
                      "limit 1", job)

    def page(self, db: Database, job: int, before: int | None = None,
             limit: int = 100) -> dict:
        """Return at most `limit` runs of a job before a run, the newest
        first. Raises Error."""
        self.hosts.job(db, job)
        limit = min(max(limit, 1), 1000)
        rows = db.rows(
            f"select {SHOWN_OF_RUN} from runs where job = ? and id < ? order "
            "by id desc limit ?", job, LARGEST_WHOLE if before is None
            else before, limit + 1)
        return {"runs": [self.shape(row) for row in rows[:limit]],
                "more": len(rows) > limit}

    def neighbours(self, db: Database, run: int, job: int) -> dict:
        """Return the runs of a job before and after a run, and the last good
        one before; None where there is none."""
        return {name: db.value(f"select id from runs where job = ? and "
                               f"{where} limit 1", job, run)
                for name, where in (
                    ("good", "state = 'done' and exit = 0 and id < ? order "
                             "by id desc"),
                    ("older", "id < ? order by id desc"),
                    ("newer", "id > ? order by id"))}

    # --- records

    def store(self, db: Database, status: HostStatus, epoch: int,
              record: dict, now: float) -> bool:
        """Keep a record of a run, and return True, if it is newer than what
        is known of the run. Its fields `id`, `job`, `at`, `code` and
        `is_end` are set. Raises Error."""
        known = db.row("select id, change, state from runs where host = ? and "
                       "epoch = ? and n = ?", status.number, epoch,
                       record["n"])
        is_active = record["state"] in ACTIVE_STATES
        was_active = not known or known["state"] in ACTIVE_STATES
        if known and (record["change"] <= known["change"]
                      or is_active and not was_active):
            return False
        at = time_of(record)
        at = now if at is None else at
        code = code_of(record)
        days = KEEP_OUTPUT_DAYS * (2 if code in BAD_CODES else 1)
        job = self.hosts.job_of_record(db, status, record)
        columns = {name: record[name] for name in SENT_COLUMNS}
        columns.update(job=job, at=at, keep_until=min(
            record["ended"] or at, now) + days * DAY_SECONDS)
        if known:
            db.update("runs", columns, id=known["id"])
            run = known["id"]
        else:
            run = db.insert("runs", host=status.number, epoch=epoch,
                            n=record["n"], **columns)
        record.update(id=run, job=job, at=at, code=code,
                      is_end=was_active and not is_active)
        self.mark_changed(run, job)
        return True

    def mark_changed(self, run: int, job: int) -> None:
        """Have the new state of a run and its job published."""
        for kind, key in (("runs", run), ("jobs", job), ("live", run)):
            self.changes.mark_changed(kind, key)

    def end_epoch(self, db: Database, status: HostStatus, epoch: int) -> None:
        """Close what is open in the earlier histories of a host: nothing
        more will come of them. The history was damaged, or restored."""
        for run in db.rows("select id, job from runs where host = ? and state "
                           "in ('queued', 'running') and epoch <> ?",
                           status.number, epoch):
            db.update("runs", {"state": "interrupted", "reason":
                               "the host lost its history"}, id=run["id"])
            self.mark_changed(run["id"], run["job"])
        db.execute("update runs set size = have where host = ? and epoch <> "
                   "? and have < size and state not in ('queued', 'running')",
                   status.number, epoch)

    # --- output

    def missing_output(self, db: Database, status: HostStatus,
                       epoch: int) -> list:
        """Return at most 50 runs that have ended and whose output is not
        whole here, as [n, bytes held]."""
        return [list(row) for row in db.execute(
            "select n, have from runs where host = ? and epoch = ? and "
            "have < size and state not in ('queued', 'running') "
            "order by n desc limit 50", status.number, epoch)]

    def store_output(self, db: Database, status: HostStatus, epoch: int,
                     request: RequestFields, now: float) -> None:
        """Keep a piece of output up to its last whole frame, if it follows
        what is here. Raises Error."""
        run = db.row("select id, state, size, have from runs where host = ? "
                     "and epoch = ? and n = ?", status.number, epoch,
                     request.whole("run"))
        data, at = request.data("data", LONGEST_OUTPUT), request.whole("at", 0)
        if not run or run["state"] in ACTIVE_STATES:
            return
        missing = run["size"] - run["have"]
        if request.flag("deleted", False):
            return self.end_output(db, run["id"], now)
        if at != run["have"] or missing <= 0:
            return
        data = data[:missing]
        try:
            length = whole_frames(data)
        except ValueError:
            return self.end_output(db, run["id"], now)
        if length < len(data) == missing:       # the last frame is cut
            return self.end_output(db, run["id"], now)
        if length:
            db.insert("outputs", run=run["id"], at=at, data=data[:length])
            db.update("runs", {"have": at + length}, id=run["id"])
            self.changes.mark_changed("live", run["id"])
            if length == missing:
                self.end_output(db, run["id"], now)

    def end_output(self, db: Database, run: int, now: float) -> None:
        """Record that nothing more comes of a run's output: its last line
        goes to those who wait for it."""
        row = db.row(f"select {SHOWN_OF_RUN} from runs where id = ?", run)
        frames = self.frames(db, run)
        line = last_line(frames, code_of(row) in BAD_CODES)
        db.update("runs", {"line": line, "size": row["have"]}, id=run)
        if frames:
            db.insert("unindexed", "insert or ignore", run=run)
        self.alerts.add_last_line(db, run, line, now)
        self.mark_changed(run, row["job"])
        self.changes.after_commit(lambda: self.live.end(run))

    def frames(self, db: Database, run: int) -> bytes:
        """Return the output of a run that is in the database."""
        return b"".join(db.column("select data from outputs where run = ? "
                                  "order by at", run))

    def remove_output(self, db: Database, run: int) -> None:
        """Remove the output of a run; the run stays."""
        db.delete("outputs", run=run)
        db.delete("unindexed", run=run)
        db.update("runs", {"have": 0, "size": 0, "indexed": 0}, id=run)

    def is_growing(self, row: dict) -> bool:
        """Will there be more of a run's output?"""
        return row["state"] in ACTIVE_STATES or row["have"] < row["size"]

    def output(self, db: Database, run: int, at: int, most: int) -> tuple:
        """Return a part of a run's output from the offset `at`: (frames,
        size of all, whether there will be more, where the part begins).
        Raises Error."""
        row, live = self.find(db, run), self.live.get(run)
        most, at = min(max(most, 1), OUTPUT_PART), max(at, 0)
        begin, data = live if live and not row["have"] else (
            0, self.frames(db, run))
        at = max(at, begin)
        return (cut_to_frames(data[at - begin:], most), begin + len(data),
                self.is_growing(row), at)

    def text(self, db: Database, run: int) -> bytes:
        """Return what a job wrote, both streams, as cron would mail it.
        Raises Error."""
        self.find(db, run)
        live = self.live.get(run)
        return output_text(self.frames(db, run) or (live[1] if live
                                                    else b""))

    # --- live output

    def active_run(self, db: Database, run: int) -> tuple | None:
        """Return (host, n) of a run while it is active, else None. Raises
        Error (404)."""
        row = self.find(db, run)
        return (self.hosts.ids.get(row["host"], ""), row["n"]) \
            if row["state"] in ACTIVE_STATES else None

    def wake_host(self, _db: Database, host: str) -> None:
        """Let a host's long poll answer."""
        self.changes.mark_changed("wake", host)

    def store_live(self, status: HostStatus, request: RequestFields) -> None:
        """Keep output of a run that is active, for those who follow it.
        Raises Error."""
        data, at = request.data("data", LIVE_ROOM), request.whole("at", 0)
        run = self.live.run_of(status.host, request.whole("run"))
        if run is None:
            return
        try:
            length = whole_frames(data)
        except ValueError:
            return
        if self.live.append(run, at, data[:length],
                            request.flag("reset", False)):
            self.changes.mark_changed("live", run)


# ==========================================================================
# AlertRules: when does a host or a job raise an alert?           (files; U)
#
# A job is late, slow, suspiciously fast, missed or failed, a host is down.
# Nothing is raised for what happened while nobody could have noticed, and of
# a host that is down its jobs raise nothing: what they do is unknown.
# ==========================================================================

HOST_DOWN_AFTER = 90.0          # seconds without a sync: three long polls
LATE_AFTER = 90.0               # seconds: a minute's grace, and the way here
SETTLED_AFTER = 30.0            # a host that is back may have much to send
OUTPUT_WAIT = 15.0              # seconds that a notification waits for output
END_WORDS = {"failed": "works again", "late": "has started",
             "missed": "runs again", "slow": "has ended",
             "fast": "takes its usual time again"}


def describe_failure(record: dict) -> str:
    """Return in words how a run failed."""
    if record["reason"]:
        return escape_controls(record["reason"])[:500]
    if record["signal"]:
        return f"signal {record['signal']}"
    if record["state"] == "done":
        return f"exit status {record['exit']}"
    return record["state"]


class AlertRules:
    """The rules by which hosts and jobs raise alerts."""

    def __init__(self, changes: Changes, timers: Timers, audit: AuditLog,
                 alerts: Alerts, checks: PingChecks, hosts: Hosts,
                 runs: Runs):
        self.changes, self.timers, self.audit = changes, timers, audit
        self.alerts, self.checks = alerts, checks
        self.hosts, self.runs = hosts, runs

    def load(self, db: Database, now: float) -> None:
        """Set the timers of hosts, jobs and runs. Hosts get some time to
        send what happened before this start."""
        for host, status in self.hosts.statuses.items():
            if status.seen is not None:
                self.timers.schedule("host", host, now + HOST_DOWN_AFTER)
        for job, due in db.execute("select id, next from jobs where next is "
                                   "not null and not removed"):
            self.timers.schedule("late", job, max(due, now + SETTLED_AFTER))
        for run in db.column("select id from runs where state = 'running'"):
            self.timers.schedule("slow", run, now + SETTLED_AFTER)

    def snooze(self, db: Database, fields, now: float) -> dict:
        """Notify nobody about a subject until a time; it is shown as before.
        Raises Error."""
        request = RequestFields(fields)
        subject, until = request.text("subject", 100), request.number("until")
        kind, _, key = subject.partition(":")
        job, host = None, ""
        if kind == "host":
            self.hosts.status_of(key)
            host = key
        elif kind == "check":
            self.checks.find(db, key)
        elif kind == "job" and key.isascii() and key.isdigit():
            key = job = self.hosts.job(db, int(key[:18]))["id"]
        else:
            raise not_found("subject")
        self.alerts.snooze(db, subject, until, now)
        self.audit.record(db, now, "snooze", host=host, job=job,
                          label=subject, state="on" if until > now else "off")
        self.changes.mark_changed(f"{kind}s", key)
        return {}

    # --- a host

    def check_host(self, db: Database, host: str, now: float) -> None:
        """Raise an alert if a host has not synced in time."""
        status = self.hosts.statuses.get(host)
        if not status or status.is_down or status.seen is None:
            return
        at = max(status.seen, status.loaded) + HOST_DOWN_AFTER
        if at > now:
            return self.timers.schedule("host", host, at)
        row = self.hosts.row(db, status)
        if not row["token"]:
            return
        db.update("hosts", {"down": 1, "seen": status.seen},
                  id=status.number)
        self.alerts.raise_alert(db, Alert(
            f"host:{host}", "silent", status.seen, f"{row['name']} is silent",
            f"{row['name']} was last heard of at "
            f"{format_rfc3339(status.seen)}; what its jobs do is unknown "
            "until it is back"))
        self.changes.after_commit(lambda: setattr(status, "is_down", True))
        self.changes.mark_changed("hosts", host)
        self.changes.mark_changed("jobs", *db.column(
            "select id from jobs where host = ?", status.number))

    def on_host_up(self, db: Database, status: HostStatus, name: str,
                   now: float) -> None:
        """End the alert of a host that syncs again, and check its jobs
        when it had time to send what happened."""
        self.alerts.clear_alert(db, f"host:{status.host}", "silent",
                                f"{name} is back")
        self.changes.after_commit(lambda: vars(status).update(
            is_down=False, up_since=now))
        for job, due in db.execute("select id, next from jobs where host = ?",
                                   status.number).fetchall():
            self.changes.mark_changed("jobs", job)
            if due is not None:
                self.timers.schedule("late", job, max(due + LATE_AFTER,
                                                      now + SETTLED_AFTER))
        for run in db.column("select id from runs where host = ? and state "
                             "in ('queued', 'running')", status.number):
            self.timers.schedule("slow", run, now + SETTLED_AFTER)

    # --- a job that should start

    def set_next(self, db: Database, job: int, before: float | None,
                 due: float | None, now: float) -> None:
        """Keep when a job starts next; `before` is what was kept."""
        if due == before:
            return
        db.update("jobs", {"next": due}, id=job)
        self.changes.mark_changed("jobs", job)
        if due is not None:
            self.timers.schedule("late", job, due + LATE_AFTER)
        if due is None or due > now:
            self.alerts.clear_alert(
                db, f"job:{job}", "late",
                self.hosts.job_name(db, job) + " is not late")

    def check_late(self, db: Database, job: int, now: float) -> None:
        """Raise an alert if a job should have started, and its host, which
        syncs, says nothing of it."""
        row = db.row("select host, next from jobs where id = ? and not "
                     "removed", job)
        status = row and self.hosts.by_number(row["host"])
        if not status or row["next"] is None or status.is_down \
                or status.seen is None:
            return
        at = max(row["next"] + self.hosts.skew_of(db, status) + LATE_AFTER,
                 status.up_since + SETTLED_AFTER)
        if at > now:
            return self.timers.schedule("late", job, at)
        if now - status.seen > HOST_DOWN_AFTER / 2:    # the host may be down
            return self.timers.schedule("late", job, now + HOST_DOWN_AFTER / 6)
        newest = db.value("select max(due) from (select due from runs where "
                          "job = ? order by id desc limit 5)", job)
        if newest is None or newest < row["next"]:
            name = self.hosts.job_name(db, job)
            self.alerts.raise_alert(db, Alert(
                f"job:{job}", "late", row["next"], f"{name} is late",
                f"{name} should have started at "
                f"{format_rfc3339(row['next'])}"))
            self.changes.mark_changed("jobs", job)

    # --- a run

    def apply_record(self, db: Database, status: HostStatus, record: dict,
                     now: float) -> None:
        """Do what a run's record means for its job: the next start, the
        count of failures, alerts."""
        job = db.row("select * from jobs where id = ?", record["job"])
        if not job["removed"]:
            self.set_next(db, job["id"], job["next"], record["next"], now)
        if record["state"] == "running":
            self.end_alerts(db, job["id"], "late")
            self.timers.schedule("slow", record["id"], self.slow_at(
                db, status, job["id"], record["started"]))
        elif record["is_end"]:
            self.apply_end(db, job, record, now)

    def apply_end(self, db: Database, job: dict, record: dict,
                  now: float) -> None:
        """Do what the end of a run means for its job."""
        end = record["ended"] or record["at"]
        if record["code"] == "o":
            db.update("jobs", {"failures": 0, "failing_since": None,
                               "last_ok": end}, id=job["id"])
            self.end_alerts(db, job["id"], "failed", "late", "missed", "slow")
            self.check_fast(db, job["id"], record, now)
        elif record["code"] in BAD_CODES:
            since = job["failing_since"]
            job["failures"] += 1
            db.update("jobs", {
                "failures": job["failures"], "last_failed": record["id"],
                "failing_since": end if since is None else since},
                id=job["id"])
            self.end_alerts(db, job["id"], "late", "slow")
            if end > now - DAY_SECONDS:
                self.raise_failed(db, job, record, now)
        elif record["code"] == "m" and record["at"] > now - DAY_SECONDS:
            self.end_alerts(db, job["id"], "late")
            name = self.hosts.job_name(db, job["id"])
            self.alerts.raise_alert(db, Alert(
                f"job:{job['id']}", "missed", record["at"],
                f"{name} was missed",
                f"{plural(record['count'], 'start')} missed: "
                f"{record['reason'] or 'koid was not there'}"))

    def end_alerts(self, db: Database, job: int, *kinds: str) -> None:
        """End the alerts of these kinds of a job."""
        for kind in sorted(self.alerts.kinds_of(db, f"job:{job}")
                           & set(kinds)):
            name = self.hosts.job_name(db, job)
            self.alerts.clear_alert(db, f"job:{job}", kind,
                                    f"{name} {END_WORDS[kind]}")

    def raise_failed(self, db: Database, job: dict, record: dict,
                     now: float) -> None:
        """Raise an alert for a failed run, with the number of failures in a
        row. It waits for the output, but not for long."""
        name = self.hosts.job_name(db, job["id"])
        times = "" if job["failures"] == 1 else \
            f", {job['failures']} times in a row"
        self.alerts.raise_alert(
            db, Alert(f"job:{job['id']}", "failed",
                      record["ended"] or record["at"], f"{name} failed",
                      f"{name}: {describe_failure(record)}{times}"),
            now + OUTPUT_WAIT if record["size"] else now, record["id"])

    def check_fast(self, db: Database, job: int, record: dict,
                   now: float) -> None:
        """Raise an alert if a good run was faster than its job ever was:
        then it probably did nothing."""
        limit = shortest_usual(self.runs.history(db, job))
        took = seconds_of(record)
        if took is None:
            return
        if limit is None or took >= limit:
            self.end_alerts(db, job, "fast")
        elif record["at"] > now - DAY_SECONDS:
            name = self.hosts.job_name(db, job)
            self.alerts.raise_alert(db, Alert(
                f"job:{job}", "fast", record["at"],
                f"{name} was suspiciously fast", f"{name} finished in "
                f"{format_duration(took)}; it usually takes at least "
                f"{format_duration(limit * 5)}"))

    def slow_at(self, db: Database, status: HostStatus, job: int,
                started: float | None) -> float | None:
        """Return when a run counts as slow, by our clock; None for never."""
        limit = longest_usual(self.runs.history(db, job))
        return None if limit is None or started is None else \
            started + limit + self.hosts.skew_of(db, status)

    def check_slow(self, db: Database, run: int, now: float) -> None:
        """Raise an alert if a run takes much longer than usual."""
        row = db.row("select job, host, state, started from runs where id = ?",
                     run)
        status = row and self.hosts.by_number(row["host"])
        if not status or row["state"] != "running" or status.is_down:
            return
        job = row["job"]
        at = self.slow_at(db, status, job, row["started"])
        if at is None or at > now:
            return self.timers.schedule("slow", run, at)
        name = self.hosts.job_name(db, job)
        self.alerts.raise_alert(db, Alert(
            f"job:{job}", "slow", row["started"], f"{name} takes long",
            f"{name} has been running for "
            f"{format_duration(int(now - row['started']))}, more than three "
            "times as long as usual"))
        self.changes.mark_changed("jobs", job)


# ==========================================================================
# Requests: what do people ask of hosts?                          (files; U)
#
# A request is signed for one host. The dashboard cannot sign or change one,
# and need not judge the signature: koid does. A request waits here until its
# host fetches it, answers it, or it expires.
# ==========================================================================

MOST_REQUESTS_WAITING = 100     # for one host
HAND_OUT_AGAIN = 30.0           # seconds without a result


class Requests:
    """The table of signed requests to hosts."""

    TABLES = """
create table requests (
    id integer primary key autoincrement, host integer not null,
    nonce text not null unique, body text not null, mac text not null,
    at real not null, expires real not null,
    state text not null default 'waiting', reason text not null default '',
    epoch integer, n integer);
create index requests_waiting on requests (host) where state = 'waiting';
create index requests_by_time on requests (at);
"""

    def __init__(self, changes: Changes, timers: Timers, audit: AuditLog,
                 hosts: Hosts, credentials: Credentials, live: LiveOutput):
        self.changes, self.timers, self.audit = changes, timers, audit
        self.hosts, self.credentials, self.live = hosts, credentials, live
        self.handed_out: dict[str, float] = {}      # nonce -> when

    def load(self, db: Database, now: float) -> None:
        """Set the timers of the requests that wait."""
        for nonce, expires in db.execute("select nonce, expires from requests "
                                         "where state = 'waiting'"):
            self.timers.schedule("request", nonce, max(expires + 5, now))

    def create(self, db: Database, fields, now: float) -> dict:
        """Take a signed request; return its state. The same one twice is
        one. Raises Error."""
        request = RequestFields(fields)
        status = self.hosts.status_of(request.hex("host", 32))
        body, mac = request.text("body", LONGEST_BODY), request.hex("mac", 64)
        signed = self.read_signed(body, status, now)
        nonce = signed.hex("nonce", 32)
        known = db.row("select body, mac from requests where nonce = ?",
                       nonce)
        if known and known != {"body": body, "mac": mac}:
            raise Error("there was another request of this nonce", "", 409)
        if not known:
            if db.value("select count(*) from requests where host = ? and "
                        "state = 'waiting'", status.number
                        ) >= MOST_REQUESTS_WAITING:
                raise Error("too many requests wait for this host", "", 429)
            expires = signed.whole("exp") / 1000
            db.insert("requests", host=status.number, nonce=nonce, body=body,
                      mac=mac, at=now, expires=expires)
            self.record_audit(db, status, signed, now)
            self.timers.schedule("request", nonce, expires + 5)
            self.changes.mark_changed("requests", nonce)
            self.changes.mark_changed("wake", status.host)
        return self.state(db, nonce)

    def read_signed(self, body: str, status: HostStatus,
                    now: float) -> RequestFields:
        """Return the fields of a signed request for a host. Raises Error."""
        try:
            signed = RequestFields(parse_strict_json(body),
                                   "the signed request")
        except RequestRejected as error:
            raise Error(f"the signed request: {error}", "", 400) from None
        signed.hex("nonce", 32)
        signed.choice("do", ("run", "kill"))
        if signed.text("host") != status.host \
                or signed.text("dash") != self.credentials.dash:
            raise Error("the request is signed for another host", "", 400)
        expires = signed.whole("exp") / 1000
        if not now < expires < now + LONGEST_LIFE / 1000 + 60:
            raise Error("the request has expired, or would live too long",
                        "is the clock of this machine right?", 400)
        return signed

    def record_audit(self, db: Database, status: HostStatus,
                     signed: RequestFields, now: float) -> None:
        """Record who requested what; secrets are masked. Raises Error."""
        import json
        action = signed.text("do")
        if action == "run":
            job = db.row("select id, label from jobs where host = ? and user "
                         "= ? and tag = ?", status.number,
                         signed.text("user", 256), signed.text("tag", 100))
        else:
            job = db.row("select j.id, j.label from runs r join jobs j on "
                         "j.id = r.job where r.host = ? and r.epoch = ? and "
                         "r.n = ?", status.number, signed.whole("epoch"),
                         signed.whole("run"))
        args = {**signed.texts("args", 2 * LONGEST_ARGS), **dict.fromkeys(
            signed.texts("secrets", LONGEST_BODY), MASK.decode())}
        self.audit.record(
            db, now, action, host=status.host, nonce=signed.text("nonce"),
            job=job["id"] if job else None, args=json.dumps(args),
            label=job["label"][:1000] if job else "")

    def state(self, db: Database, nonce: str) -> dict:
        """Return what became of a request. Raises Error (404)."""
        found = db.row(
            "select nonce, state, reason, (select id from runs r where r.host "
            "= q.host and r.epoch = q.epoch and r.n = q.n) run from requests "
            "q where nonce = ?", nonce) if is_hex(nonce, 32) else None
        if not found:
            raise not_found("request")
        return found

    def waiting(self, db: Database, host: str, now: float) -> dict:
        """Return what is demanded of a host: requests, and the runs that are
        followed. A request is handed out again if no result came, because
        the answer may have got lost. Raises Error (404)."""
        requests = []
        for row in db.rows("select nonce, body, mac from requests where host "
                           "= ? and state = 'waiting' and expires > ? order "
                           "by id", self.hosts.status_of(host).number, now):
            nonce = row.pop("nonce")
            if len(requests) < MOST_REQUESTS and self.handed_out.get(
                    nonce, 0.0) <= now - HAND_OUT_AGAIN:
                self.handed_out[nonce] = now
                requests.append(row)
        return {"requests": requests, "live": {
            str(n): have for n, have in self.live.demanded(host,
                                                           now).items()}}

    def hand_out_again(self, db: Database, status: HostStatus) -> None:
        """Hand out all that waits: what another koid got may be lost."""
        for nonce in db.column("select nonce from requests where host = ? and "
                               "state = 'waiting'", status.number):
            self.handed_out.pop(nonce, None)

    def settle(self, db: Database, status: HostStatus, nonce: str, state: str,
               reason: str, epoch: int, n: int | None) -> None:
        """Record the result of a request. A run that came of it is the last
        word; "expired" is only what we suppose."""
        done = db.execute(
            "update requests set state = ?1, reason = ?2, epoch = ?3, n = "
            "coalesce(?4, n) where host = ?5 and nonce = ?6 and (state in "
            "('waiting', 'expired') or (?1 = 'accepted' and (state <> ?1 or "
            "n is null and ?4 is not null)))",
            state, reason, epoch, n, status.number, nonce).rowcount
        self.handed_out.pop(nonce, None)
        if done:
            self.changes.mark_changed("requests", nonce)

    def check_expired(self, db: Database, nonce: str, now: float) -> None:
        """Let a request expire that its host has not answered."""
        expires = db.value("select expires from requests where nonce = ? and "
                           "state = 'waiting'", nonce)
        if expires is None:
            return
        if expires + 5 > now:
            return self.timers.schedule("request", nonce, expires + 5)
        db.update("requests", {"state": "expired", "reason":
                               "the host did not answer"}, nonce=nonce)
        self.handed_out.pop(nonce, None)
        self.changes.mark_changed("requests", nonce)


# ==========================================================================
# HostSync: what does a host send, and get back?                  (files; U)
#
# Nothing that comes twice is kept twice, and what comes late changes nothing
# back. `acked` in the answer is committed when the host reads it, so a lost
# answer costs a repeat, never a record.
# ==========================================================================

RECORDS_AT_ONCE, MOST_OUTPUTS = 1_000, 200


def read_record(request: RequestFields) -> dict:
    """Return the record of a run as columns. Raises Error."""
    import json
    record = {name: request.whole(name, default) for name, default in (
        ("change", MISSING), ("attempt", 1), ("count", 1), ("bytes", 0),
        ("size", 0))}
    record["size"] = min(record["size"], LONGEST_OUTPUT)
    for name in ("due", "requested_at", "started", "ended", "next"):
        record[name] = request.number(name, None)
    for name in ("exit", "signal"):
        record[name] = request.whole(name, None, -2**31, 2**32)
    for name, most in (("user", 256), ("tag", 100)):
        record[name] = request.text(name, most)
    for name, most in (("section", 1000), ("name", 1000),
                       ("label", 200_000), ("trigger", 50)):
        record[name] = request.text(name, most, "")
    record["reason"] = request.text("reason", 200_000, "")[:2000]
    record["state"] = request.choice("state", RUN_STATES)
    record["args"] = json.dumps(request.texts("args", 2 * LONGEST_ARGS),
                                ensure_ascii=False)
    record["cut"] = int(bool(request.fields.get("cut")))
    nonce = request.text("nonce", 32, "")
    record["nonce"] = nonce if is_hex(nonce, 32) else ""
    record["n"] = request.whole("run", low=1)
    return record


def parse_instance(text: str) -> tuple[int, str]:
    """Return (start in ms since 1970, random name) of a koid's instance.
    Raises Error."""
    start, _, name = text.partition("-")
    if not start.isascii() or not start.isdigit() or len(start) > 15 \
            or not is_hex(name, 8):
        raise Error("the request: instance is none", "", 400)
    return int(start), name


class HostSync:
    """Takes what hosts send: lists, records, output, results."""

    TABLES = """
create table epochs (host integer not null, epoch integer not null,
    acked integer not null, primary key (host, epoch)) without rowid;
"""

    def __init__(self, changes: Changes, timers: Timers, hosts: Hosts,
                 runs: Runs, rules: AlertRules, requests: Requests):
        self.changes, self.timers = changes, timers
        self.hosts, self.runs = hosts, runs
        self.rules, self.requests = rules, requests

    def sync(self, db: Database, host: str, payload, now: float) -> dict:
        """Take what the host with this id sends; return what is demanded of
        it. Raises Error."""
        request = RequestFields(payload)
        status = self.hosts.statuses.get(host)
        if not status or request.hex("host", 32) != host:
            raise Error("this is the token of another host", "", 403)
        if request.whole("v") != SYNC_VERSION:
            raise Error("the host speaks another version", "bring koi up to "
                        "date there or here", 400)
        epoch = request.whole("epoch")
        row = self.hosts.row(db, status)
        self.update_host(db, status, row, request, now)
        fields = request.get("list", dict, None)
        if fields is not None:
            row["list_sha"] = self.hosts.store_list(
                db, status, RequestFields(fields, "the list"))
        self.store_next(db, status, request.get("next", dict, {}), now)
        acked = self.store_records(db, status, epoch, request.each(
            "records", RECORDS_AT_ONCE), now)
        for output in request.each("outputs", MOST_OUTPUTS):
            self.runs.store_output(db, status, epoch, output, now)
        for output in request.each("live", MOST_OUTPUTS):
            self.runs.store_live(status, output)
        for result in request.each("results", RECORDS_AT_ONCE):
            self.requests.settle(
                db, status, result.hex("nonce", 32),
                result.choice("state", ("accepted", "refused")),
                result.text("reason", 2000, ""), epoch,
                result.whole("run", None))
        sha = request.text("list_sha", 64, "")
        return {"v": SYNC_VERSION, "acked": acked,
                "want_list": not row["list_sha"] or (
                    fields is None and sha != row["list_sha"]),
                "missing_output": self.runs.missing_output(db, status, epoch),
                **self.requests.waiting(db, host, now)}

    def update_host(self, db: Database, status: HostStatus, row: dict,
                    request: RequestFields, now: float) -> None:
        """Note that a host is up, and keep what it says of itself. Raises
        Error."""
        facts = self.read_facts(row, request, now)
        self.check_instance(status, row["instance"], facts["instance"], now)
        changed = {name: value for name, value in facts.items()
                   if row[name] != value}
        if status.seen is None or changed:
            self.changes.mark_changed("hosts", status.host)
        if "epoch" in changed and row["epoch"] is not None:
            self.runs.end_epoch(db, status, facts["epoch"])
        if "instance" in changed:
            self.requests.hand_out_again(db, status)
        if row["down"]:
            self.rules.on_host_up(db, status, row["name"], now)
            changed["down"] = 0
        status.seen = now
        if changed:
            db.update("hosts", {**changed, "seen": now}, id=status.number)
        self.timers.schedule("host", status.host, now + HOST_DOWN_AFTER)

    def read_facts(self, row: dict, request: RequestFields,
                   now: float) -> dict:
        """Return what a host says of itself as columns. Raises Error."""
        skew = now - request.number("now", now)
        if abs(skew - row["skew"]) < 1:
            skew = row["skew"]          # the way here takes its time too
        problems = [str(each)[:500] for each in request.get(
            "problems", list, [])[:20] if is_text(str(each))]
        return {"instance": request.text("instance", 100), "skew": skew,
                "epoch": request.whole("epoch"),
                "offset": request.number("offset", 0, -86_400, 86_400),
                "zone": request.text("zone", 200, ""),
                "version": request.text("version", 50, ""),
                "boot": request.text("boot", 100, ""),
                "problems": compact_json(problems)}

    def check_instance(self, status: HostStatus, known: str, instance: str,
                       now: float) -> None:
        """Of two koids with one host id, accept the one that started later;
        the other again when that one is down. Raises Error (409)."""
        if parse_instance(instance) >= (parse_instance(known) if known
                                        else (0, "")):
            return
        if status.seen is not None and now - status.seen < HOST_DOWN_AFTER:
            status.duplicate_at = now
            self.changes.mark_changed("hosts", status.host)
            raise Error("another koid uses this host's identity",
                        "if this machine is a copy of another: koitab -d "
                        "off, and join again", 409)

    def store_next(self, db: Database, status: HostStatus, given: dict,
                   now: float) -> None:
        """Keep when jobs start next: "USER\\nTAG" -> time. Raises Error."""
        if len(given) > MOST_JOBS:
            raise Error(f"more than {MOST_JOBS:,} starts", "", 413)
        for whose in given:
            user, _, tag = whose.partition("\n")
            if not is_text(whose) or "\0" in whose:
                raise Error("the request: next names no job", "", 400)
            job = db.row("select id, next from jobs where host = ? and user = "
                         "? and tag = ? and not removed", status.number, user,
                         tag)
            if job:
                self.rules.set_next(
                    db, job["id"], job["next"],
                    RequestFields(given, "next").number(whose, None), now)

    def store_records(self, db: Database, status: HostStatus, epoch: int,
                      records: list, now: float) -> int:
        """Keep records of runs; return the highest change of this epoch that
        is kept. Raises Error.

        Ids are given in the order of the host's numbers, which is that of
        the starts; jobs change in the order of the changes.
        """
        acked = db.value("select acked from epochs where host = ? and epoch = "
                         "?", status.number, epoch) or 0
        read = sorted(map(read_record, records),
                      key=lambda each: (each["n"], each["change"]))
        kept = [record for record in read if self.runs.store(
            db, status, epoch, record, now)]
        for record in sorted(kept, key=lambda each: each["change"]):
            if record["nonce"]:
                self.requests.settle(db, status, record["nonce"], "accepted",
                                     "", epoch, record["n"])
            self.rules.apply_record(db, status, record, now)
        highest = max([acked, *(record["change"] for record in read)])
        if highest > acked:
            db.insert("epochs", "insert or replace", host=status.number,
                      epoch=epoch, acked=highest)
        return highest


# ==========================================================================
# Search: which outputs contain a text?                           (files; U)
#
# An index of SQLite's (FTS5) finds the runs, if this SQLite has one; else
# all outputs are read. Which line it is, the outputs say in any case.
# ==========================================================================

SEARCH_TIME = 1.0               # seconds that one search may take
MOST_INDEXED = 2**18            # characters of a run: head and tail


def indexed_text(frames: bytes) -> str:
    """Return the text of an output that goes into the index: head and tail
    of what is long. The same frames must always give the same text, because
    an entry of the index is removed by it."""
    import re
    text = b"".join(data for stream, _, data in read_frames(frames)
                    if stream in (STDOUT, STDERR)).decode("utf-8", "replace")
    text = re.sub(STRIPPED, "", text).replace("\0", " ")
    if len(text) > MOST_INDEXED:
        half = MOST_INDEXED // 2
        text = text[:half] + "\n" + text[-half + 1:]
    return text


def line_with(text: str, match) -> str:
    """Return the line that a match is in, at most 400 characters."""
    begin = text.rfind("\n", 0, match.start()) + 1
    begin = max(begin, match.start() - 150)
    end = text.find("\n", match.end())
    end = len(text) if end < 0 else end
    return escape_controls(text[begin:min(end, begin + 400)])


class Search:
    """The index of the outputs, the table `found`.

    `index` is its kind: trigram, words, or "" without one. `problems` gets a
    sentence when it is damaged.
    """

    def __init__(self, runs: Runs, problems: dict):
        self.runs, self.problems = runs, problems
        self.index = ""

    def load(self, db: Database) -> None:
        """Make the index, or open it. Raises sqlite3.Error."""
        import sqlite3
        for name, how in (("trigram", "trigram"), ("words", "unicode61")):
            known = db.value("select sql from sqlite_master where name = "
                             "'found'")
            try:
                if not known:
                    db.execute("create virtual table found using fts5(text, "
                               f"content='', tokenize='{how}')")
                if not known or how in known:
                    db.value("select rowid from found limit 1")
                    self.index = name
                    break
            except sqlite3.OperationalError as error:
                if failure_of(error) == "full":
                    raise

    def index_next(self, db: Database) -> bool:
        """Put one output into the index; return whether there was one."""
        run = db.value("select run from unindexed limit 1")
        if run is None or not self.index:
            return False
        frames = self.runs.frames(db, run)
        if frames:
            self.change(db, "insert into found (rowid, text) values (?, ?)",
                        run, indexed_text(frames))
            db.update("runs", {"indexed": 1}, id=run)
        db.delete("unindexed", run=run)
        return True

    def remove(self, db: Database, run: int) -> int:
        """Remove the output of a run, and its entry of the index; return its
        size in bytes."""
        frames = self.runs.frames(db, run)
        if db.value("select indexed from runs where id = ?", run):
            self.change(db, "insert into found (found, rowid, text) values "
                        "('delete', ?, ?)", run, indexed_text(frames))
        self.runs.remove_output(db, run)
        return len(frames)

    def change(self, db: Database, statement: str, *values) -> None:
        """Change the index. A damaged one is no reason to end: without it
        texts are found as well, only more slowly."""
        import sqlite3
        try:
            if self.index:
                db.execute(statement, *values)
        except sqlite3.DatabaseError as error:
            if not db.in_transaction or failure_of(error) != "damaged":
                raise
            self.index = ""
            self.problems["index"] = "the index of outputs is damaged: " \
                "search goes on without it, and is slow"

    def find(self, db: Database, text: str, job: int | None = None,
             before: int | None = None) -> dict:
        """Return the newest runs before a run whose output contains a text,
        each with the first line that does. After SEARCH_TIME, or 20 of
        them, `more` is true. Raises Error."""
        import re
        import sqlite3
        text = text.strip()[:200]
        if len(text) < 2 or not is_text(text) or "\0" in text:
            raise Error("two letters at least are needed", "", 400)
        if job is not None:
            self.runs.hosts.job(db, job)
        wanted, matches = re.compile(re.escape(text), re.I), []
        until, more = time.monotonic() + SEARCH_TIME, False
        db.connection.set_progress_handler(
            lambda: int(time.monotonic() > until), 10_000)
        try:
            for run in self.candidates(db, text, job, before):
                if len(matches) == 20 or time.monotonic() > until:
                    more = True
                    break
                matches += self.match(db, run, wanted)
        except sqlite3.DatabaseError as error:
            if "interrupted" not in str(error):
                if failure_of(error) == "damaged":
                    self.index = ""
                raise
            more = True
        finally:
            db.connection.set_progress_handler(None, 0)
        return {"matches": matches, "more": more}

    def candidates(self, db: Database, text: str, job: int | None,
                   before: int | None):
        """Yield runs that may contain a text, the newest first: by the index
        if it can tell, else all that have output."""
        last = LARGEST_WHOLE if before is None else before
        of_job = "(?2 is null or (select job from runs where id = {0}) = ?2)"
        if not self.index or len(text) < 3 and self.index == "trigram":
            return (run for run, in db.execute(
                "select distinct run from outputs where run < ?1 and "
                f"{of_job.format('run')} order by run desc", last, job))
        from heapq import merge
        quoted = '"' + text.replace('"', '""') + '"'
        if self.index == "words":
            quoted += "*"
        waiting = db.column(
            "select run from unindexed where run < ?1 and "
            f"{of_job.format('run')} order by run desc limit 100", last, job)
        rows = db.execute(
            "select rowid from found where found match ?3 and rowid < ?1 and "
            f"{of_job.format('found.rowid')} order by rowid desc", last, job,
            quoted)
        return merge(waiting, (run for run, in rows), reverse=True)

    def match(self, db: Database, run: int, wanted) -> list[dict]:
        """Return [the first line of a run that a pattern finds, and where
        its chunk begins], or []."""
        import re
        for at, data in db.execute("select at, data from outputs where run = "
                                   "? order by at", run):
            text = re.sub(STRIPPED, "", output_text(data).decode(
                "utf-8", "replace"))
            match = wanted.search(text)
            if match:
                try:
                    shown = self.runs.shape(self.runs.find(db, run))
                except Error:       # its job was deleted
                    return []
                return [{"run": shown, "line": line_with(text, match),
                         "at": at}]
        return []


# ==========================================================================
# Retention: what is removed, and when?                           (files; U)
#
# By count and age, and what people have deleted. In small steps, so that
# what waits to be written never waits long.
# ==========================================================================

KEEP_RUNS = 10_000              # of one job
KEEP_RUN_DAYS, KEEP_AUDIT_DAYS, KEEP_EVENT_DAYS = 400, 400, 93
AT_ONCE = 1_000                 # rows that are removed in one step
FREE_PAGES = 2_000              # that the database may keep for later


class Retention:
    """Removes what is too old or too much, and what people have deleted.

    `is_full()` says whether the disk is full: then there is little room even
    for the log of a removal, so a step is small.
    """

    def __init__(self, changes: Changes, audit: AuditLog, hosts: Hosts,
                 search: Search, clock: Clock, is_full):
        self.changes, self.audit, self.hosts = changes, audit, hosts
        self.search, self.clock, self.is_full = search, clock, is_full
        self.last_job = 0       # whose runs were counted last

    @property
    def at_once(self) -> int:
        """Return how many rows are removed in one step."""
        return 20 if self.is_full() else AT_ONCE

    def delete(self, db: Database, fields, now: float) -> dict:
        """Delete a job that is in no tab, or a host, with all their runs:
        they are hidden at once, and removed step by step. Raises Error."""
        request = RequestFields(fields)
        if "host" in request.fields:
            host = request.hex("host", 32)
            self.hosts.leave(db, host, now)
            jobs = self.hosts.delete(db, host)
        else:
            job = self.hosts.job(db, request.whole("job"))
            if not job["removed"]:
                raise Error("the job is in a tab, and would come back",
                            "take it out of its tab first", 409)
            self.audit.record(db, now, "forget", job=job["id"],
                              host=self.hosts.ids.get(job["host"], ""),
                              label=job["label"][:1000])
            jobs = [job["id"]]
        for number in jobs:
            self.hosts.delete_job(db, number)
        return {}

    def expire_old(self, db: Database) -> bool:
        """Do one step; return whether there may be more to do."""
        now = self.clock.now()
        removed = 0
        for step in (self.expire_deleted, self.expire_runs,
                     self.expire_outputs, self.expire_rows):
            removed += step(db, now)
            if removed >= self.at_once // 2:
                return True
        return removed > 0 or self.prune_runs(db)

    def expire_deleted(self, db: Database, _now: float) -> int:
        """Remove runs of a deleted job, or a deleted host without jobs;
        return the number of rows."""
        job = db.value("select id from jobs where deleted limit 1")
        if job is None:
            host = db.value("select id from hosts where deleted limit 1")
            if host is None:
                return 0
            for table in ("epochs", "requests"):
                db.delete(table, host=host)
            return db.delete("hosts", id=host)
        runs = db.column("select id from runs where job = ? limit ?", job,
                         self.at_once)
        self.remove_runs(db, runs)
        if len(runs) < self.at_once:
            db.delete("jobs", id=job)
        return len(runs) + 1

    def expire_runs(self, db: Database, now: float) -> int:
        """Remove runs that are too old; return their number."""
        runs = db.column(
            "select id from runs where at < ? and state not in ('queued', "
            "'running') limit ?", now - KEEP_RUN_DAYS * DAY_SECONDS,
            self.at_once)
        self.remove_runs(db, runs)
        return len(runs)

    def expire_outputs(self, db: Database, now: float) -> int:
        """Remove outputs that are too old, few at a time because they are
        large; return their number."""
        size = count = 0
        for run in db.column("select id from runs where have > 0 and "
                             "keep_until < ? order by keep_until limit 200",
                             now):
            size += self.search.remove(db, run)
            count += 1
            if size > (2**17 if self.is_full() else 2**20):
                break
        return count

    def expire_rows(self, db: Database, now: float) -> int:
        """Remove rows of the smaller tables; return their number."""
        removed = 0
        for table, days in (("audit", KEEP_AUDIT_DAYS),
                            ("flips", KEEP_EVENT_DAYS),
                            ("requests", KEEP_EVENT_DAYS),
                            ("notifications", KEEP_EVENT_DAYS)):
            removed += db.execute(
                f"delete from {table} where id in (select id from {table} "
                "where at < ? limit ?)", now - days * DAY_SECONDS,
                self.at_once).rowcount
        return removed

    def prune_runs(self, db: Database) -> bool:
        """Remove the oldest runs of the next job, if it has too many; return
        False after the last job."""
        job = db.value("select id from jobs where id > ? order by id limit 1",
                       self.last_job)
        if job is None:
            self.last_job = 0
            return False
        newest = db.value("select id from runs where job = ? order by id desc "
                          "limit 1 offset ?", job, KEEP_RUNS) or 0
        runs = db.column(
            "select id from runs where job = ? and id <= ? and state not in "
            "('queued', 'running') order by id limit ?", job, newest,
            self.at_once)
        self.remove_runs(db, runs)
        if len(runs) < self.at_once:
            self.changes.after_commit(lambda: setattr(self, "last_job", job))
        return True

    def remove_runs(self, db: Database, runs: list[int]) -> None:
        """Remove runs with their outputs."""
        for run in runs:
            self.search.remove(db, run)
            db.delete("runs", id=run)


# ==========================================================================
# Overview: what do the page and other programs see?              (files; U)
#
# Read from the database each time; any thread may ask with a connection of
# its own. Nothing here writes.
# ==========================================================================

MOST_BARS = 6_000               # in one answer about a day
LONGEST_BAR = 30 * DAY_SECONDS
ALERT_STATES = ("failed", "late", "missed", "unknown")
BADGES = {"ok": "#2a8a3e", "up": "#2a8a3e", "running": "#2a8a3e",
          "new": "#77777a", "paused": "#77777a", "skipped": "#77777a",
          "unknown": "#77777a", "late": "#b87800", "grace": "#b87800",
          "missed": "#b87800", "failed": "#c32b2b", "down": "#c32b2b"}
METRICS = {     # name -> help
    "koi_build_info": "1; the label has the version of koi.",
    "koi_host_up": "1 if the host was heard of lately, else 0.",
    "koi_host_seen_timestamp_seconds": "When the host was last heard of.",
    "koi_job_ok": "0 if the job failed, is late or was missed, else 1.",
    "koi_job_running": "How many runs of the job are active.",
    "koi_job_failures": "How many runs of the job failed in a row.",
    "koi_job_last_end_timestamp_seconds": "When the job's last run ended.",
    "koi_job_last_success_timestamp_seconds":
        "When the job last ended with status 0.",
    "koi_job_last_duration_seconds": "How long the job's last run took.",
    "koi_job_last_exit_status":
        "Exit status of the job's last run; 128+N after signal N.",
    "koi_job_next_start_timestamp_seconds": "When the job starts next.",
    "koi_check_up": "0 if the check is down, else 1.",
    "koi_check_paused": "1 if the check is paused, else 0.",
    "koi_check_last_ping_timestamp_seconds": "When the check was pinged last.",
    "koi_alerts": "How many alerts of a kind are active.",
    "koi_http_connections": "Open connections to the dashboard.",
    "koi_http_long_polls": "Requests that wait for news.",
    "koi_certificate_expiry_timestamp_seconds":
        "When the dashboard's certificate expires."}
WORST_FIRST = ("down", "failed", "missed", "late", "grace", "unknown",
               "running", "ok", "up", "skipped", "paused", "new")


def job_state(host_is_down: bool, kinds: set, active: list,
              last: dict | None) -> str:
    """Return the state of a job that is shown. `kinds` are those of its
    active alerts, `active` its active runs, `last` the last that ended."""
    if host_is_down:
        return "unknown"
    if active:
        return "running"
    if "late" in kinds:
        return "late"
    if not last:
        return "new"
    return {"o": "ok", "m": "missed", "s": "skipped"}.get(code_of(last),
                                                          "failed")


def label_text(text: str) -> str:
    """Return the value of a label in Prometheus' text format."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace(
        '"', '\\"')


class Metrics:
    """The samples of one answer in Prometheus' text format. No two samples
    of a metric have the same labels: IDs tell equal names apart."""

    def __init__(self):
        self.samples: dict[str, list] = {name: [] for name in METRICS}

    def add(self, name: str, value, /, **labels) -> None:
        """Add a sample, unless its value is unknown."""
        if value is not None:
            text = ",".join(f'{key}="{label_text(label)}"'
                            for key, label in labels.items())
            self.samples[name].append(
                f"{name}{'{%s}' % text if text else ''} {value:.15g}\n")

    def add_job(self, job: dict, host: str, last_ok: float | None) -> None:
        """Add the samples of a job as it is shown. What is unknown while its
        host is down has none."""
        last, failing = job["last"], job["failing"]
        labels = {"host_id": job["host"], "host": host, "user": job["user"],
                  "section": job["section"], "tag": job["tag"],
                  "name": job["name"] or job["label"]}
        values = {
            "failures": failing["count"] if failing else 0,
            "last_end_timestamp_seconds": last and last["ended"],
            "last_success_timestamp_seconds": last_ok,
            "last_duration_seconds": last and seconds_of(last),
            "last_exit_status": last and (
                128 + last["signal"] if last["signal"] else last["exit"])}
        if job["state"] != "unknown":
            values.update(ok=job["state"] not in ALERT_STATES,
                          running=len(job["running"]),
                          next_start_timestamp_seconds=job["next"])
        for name, value in values.items():
            self.add(f"koi_job_{name}", value, **labels)

    def add_check(self, check: dict) -> None:
        """Add the samples of a check as it is shown. Its UUID, with which
        anybody could ping it, is not among the labels."""
        labels = {"check": hashed_uuid(check["id"]), "name": check["name"],
                  "slug": check["slug"]}
        if check["state"] != "paused":
            self.add("koi_check_up", check["state"] != "down", **labels)
        self.add("koi_check_paused", check["state"] == "paused", **labels)
        self.add("koi_check_last_ping_timestamp_seconds", check["last_ping"],
                 **labels)

    def text(self) -> str:
        """Return the answer."""
        return "".join(
            f"# HELP {name} {text}\n# TYPE {name} gauge\n"
            + "".join(self.samples[name])
            for name, text in METRICS.items() if self.samples[name])


def hashed_uuid(uuid: str) -> str:
    """Return what stands for a check's UUID where people read, as
    Healthchecks' unique_key: 40 hex digits that cannot ping."""
    import hashlib
    return hashlib.sha1(uuid.encode()).hexdigest()


class Overview:
    """What is shown of all hosts, jobs, checks and alerts."""

    def __init__(self, credentials: Credentials, alerts: Alerts,
                 checks: PingChecks, hosts: Hosts, runs: Runs,
                 requests: Requests):
        self.credentials, self.alerts, self.checks = credentials, alerts, \
            checks
        self.hosts, self.runs, self.requests = hosts, runs, requests

    def state(self, db: Database, role: str, now: float) -> dict:
        """Return all that the page's overview shows to a role."""
        about = db.row("select dash id, salt, rounds, ping_key, badge_key "
                       "from dashboard") or {}
        if role != "operator":
            about["ping_key"] = ""
        return {
            "now": now, "version": VERSION, "role": role, "dash": about,
            "hosts": self.hosts.list_all(db, now),
            "jobs": [self.job(db, row) for row in db.rows(
                "select * from jobs where not deleted order by id")],
            "checks": self.checks.list_all(db, now),
            "alerts": self.alerts.list_all(db)}

    def job(self, db: Database, row: dict) -> dict:
        """Return the row of a job as it is shown, with its last runs."""
        history = self.runs.history(db, row["id"])
        active = self.runs.active(db, row["id"])
        last = self.runs.last_ended(db, row["id"])
        status, subject = self.hosts.by_number(row["host"]), \
            f"job:{row['id']}"
        failing = None
        if row["failures"]:
            failing = {"since": row["failing_since"],
                       "count": row["failures"], "last_ok": row["last_ok"],
                       "line": db.value("select line from runs where id = ?",
                                        row["last_failed"]) or ""}
        return {
            **{name: row[name] for name in (
                "id", "user", "tag", "section", "name", "label", "words",
                "command", "next", "paused", "confirm")},
            "host": status.host if status else "", "when": row["timing"],
            "removed": bool(row["removed"]),
            "manual": row["timing"] == "@manual", "running": active,
            "state": job_state(bool(status) and status.is_down,
                               self.alerts.kinds_of(db, subject), active,
                               last),
            "last": last and self.runs.shape(last), "recent_runs": history,
            "failing": failing, "usual": usual_seconds(history),
            "snoozed": self.alerts.snoozed_until(db, subject)}

    def run(self, db: Database, run: int) -> dict:
        """Return a run as it is shown, its job, and the runs next to it.
        Raises Error."""
        row = self.runs.find(db, run)
        job = self.hosts.job(db, row["job"])
        return {"run": self.runs.shape(row), "job": self.job(db, job),
                **self.runs.neighbours(db, run, job["id"])}

    def describe_changes(self, db: Database, changed: dict,
                         now: float) -> dict:
        """Return the new state of what changed, by kind; `deleted` has the
        IDs of what was deleted."""
        makers = {
            "runs": lambda run: self.runs.shape(self.runs.find(db, run)),
            "jobs": lambda job: self.job(db, self.hosts.job(db, job)),
            "hosts": lambda host: self.hosts.shape(self.hosts.row(
                db, self.hosts.status_of(host)), now),
            "checks": lambda uuid: self.checks.shape(
                db, self.checks.find(db, uuid), now),
            "requests": lambda nonce: self.requests.state(db, nonce),
            "alerts": lambda key: self.alerts.find(db, key)}
        found, deleted = {}, {}
        for kind, make in makers.items():
            for key in changed.get(kind, ()):
                try:
                    shown = make(key)
                except Error:
                    shown = None
                if shown:
                    found.setdefault(kind, []).append(shown)
                else:
                    deleted.setdefault(kind, []).append(
                        "\n".join(key) if kind == "alerts" else key)
        return {**found, **({"deleted": deleted} if deleted else {})}

    # --- a day

    def day(self, db: Database, begin: float, end: float) -> dict:
        """Return the runs of a time as bars, for all jobs at once, with
        those that began before and reached into it. If there are too many,
        `to` says how far the answer goes."""
        rows: dict[int, dict] = {}
        for count, run in enumerate(self.bars(db, begin, end)):
            if count == MOST_BARS:
                end = run["at"]
                break
            row = rows.setdefault(run["job"], {
                "job": run["job"], "bars": [], "missing": []})
            code, at = code_of(run), run["at"]
            if code == "m":
                row["missing"].append([at if run["due"] is None
                                       else run["due"], run["id"]])
            elif code != "q":
                row["bars"].append([rounded(at), rounded(run["ended"]), code,
                                    run["id"]])
        return {"rows": list(rows.values()), "from": begin, "to": end}

    def bars(self, db: Database, begin: float, end: float):
        """Yield runs in the order of time: first those that began before
        `begin` and reach into it. Each kind has an index of its own."""
        columns = "select id, job, at, ended, due, state, exit, signal, " \
            "reason from runs "
        names = ("id", "job", "at", "ended", "due", "state", "exit", "signal",
                 "reason")
        for statement, values in (
                ("where state in ('queued', 'running') and at < ? order by "
                 "at", (begin,)),
                ("where at >= ? and at < ? and ended - started > 3600 and "
                 "ended > ? order by at", (begin - LONGEST_BAR, begin, begin)),
                ("where at >= ? and at < ? and ended > ? and ended - started "
                 "<= 3600 order by at", (begin - 3600, begin, begin)),
                ("where at >= ? and at < ? order by at", (begin, end))):
            for row in db.execute(columns + statement, *values):
                yield dict(zip(names, row))

    # --- for other programs

    def metrics(self, db: Database, now: float, server: dict) -> str:
        """Return the state in Prometheus' text format. `server` has the
        values of metrics without labels. What was removed has no samples."""
        state, found = self.state(db, "viewer", now), Metrics()
        names = {host["id"]: host["name"] for host in state["hosts"]}
        last_ok = dict(db.execute("select id, last_ok from jobs"))
        found.add("koi_build_info", 1, version=VERSION)
        for host in state["hosts"]:
            labels = {"host_id": host["id"], "host": host["name"]}
            found.add("koi_host_up", host["state"] in ("up", "duplicate"),
                      **labels)
            found.add("koi_host_seen_timestamp_seconds", host["seen"],
                      **labels)
        for job in state["jobs"]:
            if not job["removed"]:
                found.add_job(job, names.get(job["host"], ""),
                              last_ok[job["id"]])
        for check in state["checks"]:
            found.add_check(check)
        kinds = [alert["kind"] for alert in state["alerts"]]
        for kind in sorted(set(kinds)):
            found.add("koi_alerts", kinds.count(kind), kind=kind)
        for name, value in server.items():
            found.add(name, value)
        return found.text()

    def badge(self, db: Database, key: str, name: str, now: float) -> dict:
        """Return the word and the colour of a badge: of the checks with a
        slug, of a job on all hosts by its tag, or of "all". The worst of
        them is shown. Raises Error (404), also for a wrong key."""
        if not db.value("select 1 from dashboard where badge_key = ?", key):
            raise not_found("badge")
        if name == "all":
            count = db.value("select count(*) from alerts")
            return {"label": "koi", "message": plural(count, "alert")
                    if count else "ok",
                    "color": BADGES["failed" if count else "ok"]}
        found = [self.checks.shape(db, row, now) for row in db.rows(
            "select * from checks where slug = ?", name)]
        found = found or [self.job(db, row) for row in db.rows(
            "select * from jobs where tag = ? and not deleted and not removed",
            name)]
        if not found:
            raise not_found("badge")
        worst = min(found, key=lambda each: WORST_FIRST.index(each["state"]))
        return {"label": worst["name"] or worst.get("label") or name,
                "message": worst["state"], "color": BADGES[worst["state"]]}


# ==========================================================================
# Dashboard: who writes, in which order?                          (files; U)
#
# One thread writes the database. What waits is written in one transaction,
# each operation in a savepoint of its own: one fsync serves all, and an
# operation that fails takes none with it. It is acknowledged when it is on
# the disk; then what changed is published.
# ==========================================================================

MOST_IN_BATCH = 256             # operations that are written together
MOST_OPERATIONS = 20_000            # then the next are refused
BALLAST = 2**21                 # twice the log: given up when the disk is full
MOST_MARKED = 2_000             # changes; more and the page reads all anew
SEEN_STORED = 60.0              # seconds between notes of who was seen
# After these no other operation of the transaction can be trusted.
FATAL_FAILURES = ("full", "disk", "damaged", "busy")
REPOSITORIES = (AuditLog, Credentials, Alerts, PingChecks, Hosts, Runs,
                Requests, HostSync)
DASHBOARD_FORM = DatabaseForm(
    "a dashboard of koi's", 0x6B6F6932, 4,
    checked=("meta", "dashboard", "hosts", "epochs", "jobs", "requests",
             "checks", "alerts", "snoozes", "channels", "notifications"),
    pragmas=("foreign_keys=off", f"journal_size_limit={WAL_PAGES * 4096}",
             "secure_delete=fast", "cache_size=-16384"),
    companion=".ballast",
    tables="create table meta (name text primary key, value text not null) "
           "without rowid;" + "".join(each.TABLES for each in REPOSITORIES))


class DiskFull(Error):
    """The disk is full: nothing can be kept now."""

    def __init__(self):
        super().__init__("the dashboard's disk is full, and nothing was kept",
                         "make room there; it goes on by itself", 507)


class Chore:
    """Something that is done in small steps: `step(db)` is called again at
    once while it returns True, else after `rest` seconds."""

    def __init__(self, name: str, rest: float, step):
        self.name, self.rest, self.step, self.at = name, rest, step, 0.0


class Dashboard:
    """The dashboard: its database, who writes it, and the repositories.

    An operation is a function that gets the open transaction and writes; a
    question gets a connection that only reads. `on_changes(lines)` is called
    after each commit that changed something, on the writer's thread;
    `is_followed()` says whether anybody wants to know more than that.
    `broken` says why nothing can be believed any more.
    """

    def __init__(self, path: str, clock: Clock | None = None, zone_of=None):
        import threading
        from collections import deque
        self.path, self.clock = path, clock or Clock()
        self.db = Database(path, DASHBOARD_FORM)
        self.lock = self.thread = None
        self.queue = deque()            # (operation, values, then)
        self.wakes = threading.Condition()
        self.readers = threading.local()    # each thread's own connection
        self.stopping, self.full, self.broken = False, False, ""
        self.problems: dict[str, str] = {}
        self.seq = 0                    # the number of the newest change
        self.on_changes, self.is_followed = None, lambda: True
        self.notifications_due = threading.Event()
        self.compose(zone_of or Machine().zone)

    def compose(self, zone_of) -> None:
        """Make the repositories, each of those it needs."""
        changes = self.changes = Changes()
        timers = self.timers = Timers()
        audit = self.audit = AuditLog()
        self.credentials = Credentials(changes, audit)
        self.alerts = Alerts(changes, timers, audit, self.clock)
        self.checks = PingChecks(changes, timers, audit, self.alerts, zone_of)
        self.hosts = Hosts(changes, audit, self.alerts, self.credentials,
                           self.clock)
        self.runs = Runs(changes, self.alerts, self.hosts)
        self.rules = AlertRules(changes, timers, audit, self.alerts,
                                self.checks, self.hosts, self.runs)
        self.requests = Requests(changes, timers, audit, self.hosts,
                                 self.credentials, self.runs.live)
        self.host_sync = HostSync(changes, timers, self.hosts, self.runs,
                                  self.rules, self.requests)
        self.search = Search(self.runs, self.problems)
        self.retention = Retention(changes, audit, self.hosts, self.search,
                                   self.clock, lambda: self.full)
        self.overview = Overview(self.credentials, self.alerts, self.checks,
                                 self.hosts, self.runs, self.requests)
        self.timer_handlers = {
            "host": self.rules.check_host, "late": self.rules.check_late,
            "slow": self.rules.check_slow,
            "check": self.checks.check_deadline,
            "request": self.requests.check_expired,
            "snooze": self.alerts.check_snooze}
        self.chores = [
            Chore("make_room", 1.0, self.make_room),
            Chore("index_next", 5.0, self.index_next),
            Chore("expire_old", 60.0, self.retention.expire_old),
            Chore("give_back", 300.0, self.give_back),
            Chore("store_seen", SEEN_STORED, self.hosts.store_seen)]

    @property
    def problem_list(self) -> list[str]:
        """Return what people should know about the dashboard itself."""
        return [*self.problems.values(), *([self.broken] if self.broken
                                           else [])]

    # --- the file

    def open(self) -> None:
        """Open the database, or make it where none ever was. Raises Error:
        a damaged one is never passed over for a new one."""
        import sqlite3
        try:
            self.lock = try_lock(self.path + ".lock")
            if self.lock is None:
                raise Error(f"another dashboard has {self.path} open")
            self.refuse_remains()
            self.db.open()
            self.write_something()
            self.load()
            self.make_ballast()
        except OSError as error:
            self.close()
            raise Error(f"{error.filename or self.path}: {error.strerror}",
                        ) from None
        except (sqlite3.Error, DatabaseDamaged) as error:
            self.close()
            raise self.unusable(error) from None
        except Error:
            self.close()
            raise

    def refuse_remains(self) -> None:
        """Raise Error if only companions of a lost database are there."""
        for ending in (".ballast", "-wal"):
            if not os.path.exists(self.path) and os.path.exists(
                    self.path + ending):
                raise Error(
                    f"{self.path} is gone, but {self.path}{ending} is there",
                    "put a backup in its place; to begin anew, remove "
                    f"{self.path}{ending} too")

    def write_something(self) -> None:
        """Fail now and not at the first operation. Raises sqlite3.Error."""
        import sqlite3
        self.db.value("select max(id) from runs")
        self.db.value("select max(id) from outputs")
        try:
            self.db.insert("meta", "insert or replace", name="opened",
                           value=str(self.clock.now()))
        except sqlite3.OperationalError as error:
            if failure_of(error) != "full":
                raise
            self.on_disk_full()

    def load(self) -> None:
        """Read what is in memory as well, and set the timers. Changes are
        numbered from the time on, so numbers grow over restarts."""
        db, now = self.db, self.clock.now()
        self.seq = int(now * 1000)
        self.search.load(db)
        self.hosts.load(db)
        self.credentials.load(db)
        self.alerts.load(db)
        for each in (self.checks, self.rules, self.requests):
            each.load(db, now)

    def unusable(self, error) -> Error:
        """Return the Error for a database that cannot be used."""
        why = str(error).replace(f"{self.path}: ", "", 1)
        return Error(f"{self.path} cannot be used: {why}",
                     "if it is damaged, put the last backup in its place and "
                     "remove its -wal and -shm; hosts send again what the "
                     "backup lacks, as far as they remember it", 500)

    def close(self) -> None:
        """Close the database, and let another process open it."""
        self.db.close()
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def backup(self, path: str) -> None:
        """Copy the database as it is now to a file; writing goes on. Raises
        Error."""
        self.reader().copy_to(path)

    # --- reading

    def reader(self) -> Database:
        """Return this thread's own connection, which cannot write."""
        if not hasattr(self.readers, "db"):
            db = Database(self.path, DASHBOARD_FORM)
            db.open_reader()
            self.readers.db = db
        return self.readers.db

    def read(self, question, *values):
        """Return what `question(db, *values)` returns, in the calling
        thread. Raises Error."""
        import sqlite3
        try:
            return question(self.reader(), *values)
        except sqlite3.DatabaseError as error:
            if "interrupted" in str(error):
                raise Error("that takes too long to find", "", 503) from None
            self.problems["reading"] = f"{self.path}: {error}"
            raise self.unusable(error) from None

    def state(self, db: Database, role: str, now: float) -> dict:
        """Return all that the page's overview shows. The number of the
        newest change is read first: what happens meanwhile is published
        once more."""
        seq = self.seq
        return {"seq": seq, **self.overview.state(db, role, now),
                "problems": self.problem_list}

    def health(self, db: Database) -> str:
        """Return "OK". Raises Error (503)."""
        db.value("select value from meta where name = 'opened'")
        if self.broken:
            raise Error(self.broken, "", 503)
        return "OK"

    def follow(self, run: int) -> None:
        """Note that somebody follows the output of a run; its host is asked
        for it if that is new. Any thread may call it. Raises Error (404)."""
        found = self.read(self.runs.active_run, run)
        if found and self.runs.live.follow(run, *found, self.clock.now()):
            self.write(self.runs.wake_host, found[0])

    # --- operations

    def write(self, operation, *values, then=None) -> None:
        """Have `operation(db, *values)` carried out. `then(result, error)`
        is called on the writer's thread when it is on the disk, or is not.
        Any thread may call this."""
        with self.wakes:
            refused = self.broken or self.stopping or len(
                self.queue) >= MOST_OPERATIONS
            if not refused:
                self.queue.append((operation, values, then))
                self.wakes.notify()
        if refused and then:
            then(None, Error(self.broken or "the dashboard has too much to "
                             "write", "try again later", 503))

    def do(self, operation, *values):
        """Have an operation carried out, wait for it, and return its result.
        Raises what it raised. Not for the writer's own thread."""
        import threading
        done, found = threading.Event(), []

        def then(result, error):
            found.extend((result, error))
            done.set()

        self.write(operation, *values, then=then)
        done.wait()
        if found[1]:
            raise found[1]
        return found[0]

    # --- the writer's thread

    def start(self) -> None:
        """Start the writer's thread."""
        import threading
        self.thread = threading.Thread(target=self.serve, name="writer",
                                       daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Carry out what waits, end the thread, and close the database."""
        with self.wakes:
            self.stopping = True
            self.wakes.notify()
        if self.thread:
            self.thread.join()
        self.close()

    def serve(self) -> None:
        """Write what is to be written, until `stop`."""
        while not self.broken:
            try:
                busy = self.run_once()
            except Exception as bug:    # better to begin anew than to hang
                self.broken = f"a fault of koi's own: {bug!r}"
                break
            with self.wakes:
                if not self.queue and self.stopping:
                    return
                if not self.queue and not busy:
                    self.wakes.wait(min(max(self.pause(), 0.01), 1.0))
        with self.wakes:        # from now on `write` refuses by itself
            rest = list(self.queue)
            self.queue.clear()
        self.report(rest, [(None, Error(self.broken, "", 503))] * len(rest))

    def pause(self) -> float:
        """Return the seconds until something is due by itself."""
        return min(min(chore.at for chore in self.chores)
                   - self.clock.ticks(),
                   self.timers.next_time() - self.clock.now())

    def run_once(self) -> bool:
        """Carry out the operations that wait, those of due timers, and one
        step of a chore; return False if there was nothing to do."""
        with self.wakes:
            batch = [self.queue.popleft() for _ in range(
                min(len(self.queue), MOST_IN_BATCH))]
        if batch:
            self.commit_batch(batch)
        timers = [] if self.broken or self.full else self.due_timers()
        if timers:
            self.commit_batch(timers)
        return bool(self.run_chore() or batch or timers)

    def due_timers(self) -> list[tuple]:
        """Return the operations of the timers that are due. One that fails
        is repeated, but not at once."""
        def repeat(kind: str, key):
            def then(_result, error) -> None:
                if not error:
                    return
                is_bug = not isinstance(error, Error)
                self.timers.schedule(kind, key,
                                     now + (3600.0 if is_bug else 5.0))
                if is_bug:
                    self.problems[kind] = f"a fault of koi's own: {error!r}"
            return then

        now = self.clock.now()
        return [(self.timer_handlers[kind], (key, now), repeat(kind, key))
                for kind, key in self.timers.take_due(now, MOST_IN_BATCH)]

    def run_chore(self) -> bool:
        """Do one step of the chore that is due first; return whether it has
        more to do. After each step the operations that wait come first."""
        ticks = self.clock.ticks()
        chore = min(self.chores, key=lambda each: each.at)
        if self.broken or chore.at > ticks:
            return False
        found = []
        self.commit_batch([(chore.step, (), lambda *how: found.extend(how))],
                          even_if_full=True)
        more, error = found
        rest = min(chore.rest, 2.0) if self.full else chore.rest
        chore.at = ticks if more else ticks + rest
        self.problems.pop(f"chore {chore.name}", None)
        if error and not isinstance(error, DiskFull):
            self.problems[f"chore {chore.name}"] = f"tidying up fails: {error}"
        return bool(more)

    def commit_batch(self, batch: list, even_if_full: bool = False) -> None:
        """Carry out operations in one transaction, report how each went, and
        publish what changed."""
        import sqlite3
        error = Error(self.broken, "", 503) if self.broken else DiskFull() \
            if self.full and not even_if_full else None
        if error:
            return self.report(batch, [(None, error)] * len(batch))
        try:
            with self.db.transaction():
                results = [self.carry_out(operation, values)
                           for operation, values, _ in batch]
        except sqlite3.Error as failure:
            self.changes.later.clear()
            error = self.judge_failure(failure)
            results = [(None, error)] * len(batch)
        later, self.changes.later = self.changes.later, []
        for function in later:
            function()
        self.report(batch, results)
        self.publish()

    def carry_out(self, operation, values: tuple) -> tuple:
        """Return (result, error) of one operation, which leaves nothing if
        it fails. Raises sqlite3.Error if the whole transaction has."""
        import sqlite3
        mark = len(self.changes.later)
        self.db.execute("savepoint operation")
        try:
            result = operation(self.db, *values)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and (
                    not self.db.in_transaction
                    or failure_of(error) in FATAL_FAILURES):
                raise
            self.db.execute("rollback to operation")
            self.db.execute("release operation")
            del self.changes.later[mark:]
            return None, error
        self.db.execute("release operation")
        return result, None

    def judge_failure(self, error) -> Error:
        """Return what an error of SQLite means for those who wait. After a
        disk that failed nothing is acknowledged: a commit might lie."""
        kind = failure_of(error)
        if kind == "full" or kind == "disk" and self.db.is_disk_full():
            self.on_disk_full()
            return DiskFull()
        if kind == "busy":
            return Error("the database is in use", "try again later", 503)
        self.broken = f"{self.path}: {error}"
        return Error(self.broken, "the dashboard ends, and looks at its "
                     "database when it starts", 503)

    def report(self, batch: list, results: list) -> None:
        """Call `then` of each operation of a batch."""
        for (_, _, then), (result, error) in zip(batch, results):
            try:
                if then:
                    then(result, error)
            except Exception as bug:    # the others are called anyway
                self.problems["bug"] = f"a fault of koi's own: {bug!r}"

    def publish(self) -> None:
        """Number what changed, and pass it on."""
        marked = self.changes.take_marked()
        if marked.pop("notifications", None):
            self.notifications_due.set()
        lines = {kind: marked.pop(kind) for kind in ("wake", "live")
                 if kind in marked}
        if marked:
            self.seq += 1
            lines["seq"] = self.seq
            if "reset" in marked or sum(map(len,
                                            marked.values())) > MOST_MARKED:
                lines["reset"] = True
            elif self.on_changes and self.is_followed():
                lines.update(self.overview.describe_changes(
                    self.db, marked, self.clock.now()))
        if self.on_changes and lines:
            try:
                self.on_changes(lines)
            except Exception as bug:
                self.problems["bug"] = f"a fault of koi's own: {bug!r}"

    # --- chores, and a full disk

    def index_next(self, db: Database) -> bool:
        """Chore: put an output into the index. On a full disk what little
        room there is, is for removing."""
        return not self.full and self.search.index_next(db)

    def give_back(self, db: Database) -> bool:
        """Chore: give some pages that nobody needs to the file system."""
        more = db.value("pragma freelist_count") > FREE_PAGES and \
            not self.full
        if more:
            self.changes.after_commit(lambda: self.vacuum(200))
        return more

    def vacuum(self, pages: int) -> None:
        """Give free pages back. A transaction of its own, and a script:
        `execute` would stop after the first page, which counts as a row."""
        self.db.connection.executescript(
            f"pragma incremental_vacuum({pages})")

    def on_disk_full(self) -> None:
        """Give up the ballast: SQLite needs room even to remove things."""
        if self.full:           # and even a chore needed more than there is
            return
        self.full = True
        self.problems["full"] = "the dashboard's disk is full: nothing new " \
            "is kept, and old things are removed where that is allowed"
        remove(self.path + ".ballast")
        for chore in self.chores:
            chore.at = 0.0

    def make_room(self, _db: Database) -> bool:
        """Chore: end a full disk when there is room for the ballast again:
        then there is for all else."""
        if self.full:
            self.changes.after_commit(self.shrink)
        return False

    def shrink(self) -> None:
        """Give pages that nobody needs and the log to the full disk. Not in
        a transaction: then the log could not be emptied."""
        import sqlite3
        try:
            self.vacuum(100)
            self.db.set_pragmas("wal_checkpoint(truncate)")
        except sqlite3.Error:
            pass                # no room even for that; we try again
        if self.make_ballast():
            self.full = False
            self.problems.pop("full", None)

    def make_ballast(self) -> bool:
        """Fill the file that is given up when the disk is full; return False
        if there is no room for it, and as much again."""
        path, fresh = self.path + ".ballast", self.path + ".ballast.new"
        try:
            if os.path.exists(path) and os.stat(path).st_size == BALLAST:
                return True
            create_private(fresh)
            fd = os.open(fresh, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for _ in range(2 * BALLAST // 65_536):
                    write_all(fd, bytes(65_536))
                os.fsync(fd)
                os.ftruncate(fd, BALLAST)
            finally:
                os.close(fd)
            os.rename(fresh, path)
        except OSError:
            remove(fresh)
            return False
        return True


# ==========================================================================
# Notifier: how does an alert go out?                (network, processes; U)
#
# A change of state is reported once: by mail, webhook or ntfy. A delivery
# that fails is repeated for a day, and its error shown on the page.
# ==========================================================================

SEND_SECONDS = 15.0     # for one notification
MOST_ANSWER = 1024      # bytes of an answer that are read
DELIVERY_PAUSE = 5.0    # seconds between checks for due notifications


class Notifier:
    """Delivers the notifications that are in the database.

    A notification stays there until its receiver took it. A process that is
    killed in between repeats the delivery after its next start, so each one
    is delivered at least once. Each has a key (Message-ID, Idempotency-Key,
    `key`) by which the receiver recognizes a repeat. Each channel with due
    notifications has a thread, so a channel that hangs delays no other.
    """

    def __init__(self, dashboard: Dashboard, machine: Machine | None = None):
        self.dashboard, self.machine = dashboard, machine or Machine()
        self.stopping, self.thread = False, None
        self.busy: set[int] = set()     # channels that have a thread

    def start(self) -> None:
        """Start the thread that delivers until `stop`."""
        import threading
        self.thread = threading.Thread(target=self.serve, name="notifier",
                                       daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop after the check that is running, without waiting for the
        channels' threads. Any thread may call it."""
        self.stopping = True
        self.dashboard.notifications_due.set()
        if self.thread:
            self.thread.join()

    def serve(self) -> None:
        """Deliver what is due, whenever the dashboard reports something due
        and every DELIVERY_PAUSE seconds, until `stop`."""
        while not self.stopping and not self.dashboard.broken:
            self.dashboard.notifications_due.clear()
            try:
                self.deliver_due()
            except Error as error:
                self.dashboard.problems["alerts"] = \
                    f"alerts: {error.message}"
            except RuntimeError:        # no thread can be started now
                self.busy.clear()
            self.dashboard.notifications_due.wait(DELIVERY_PAUSE)

    def deliver_due(self) -> list:
        """Start a thread for each channel that has due notifications and no
        thread yet; return these threads. Raises Error if the database
        cannot be read, and RuntimeError if no thread can be started."""
        import threading
        by_channel: dict[int, list] = {}
        for notification in self.dashboard.read(
                self.dashboard.alerts.due_notifications,
                self.dashboard.clock.now()):
            by_channel.setdefault(notification["channel"],
                                  []).append(notification)
        threads = []
        for channel, notifications in by_channel.items():
            if channel not in self.busy and not self.dashboard.full:
                self.busy.add(channel)
                threads.append(threading.Thread(
                    target=self.deliver_all, args=(channel, notifications),
                    daemon=True))
                threads[-1].start()
        return threads

    def deliver_all(self, channel: int, notifications: list[dict]) -> None:
        """Deliver a channel's notifications in order, until one fails: the
        others would fail for the same reason."""
        try:
            for notification in notifications:
                error = self.deliver(notification)
                self.dashboard.do(self.dashboard.alerts.mark_delivered,
                                  notification["id"], error,
                                  self.dashboard.clock.now())
                if error or self.stopping:
                    break
        except Error:           # the disk is full, or the dashboard stops
            pass
        finally:
            self.busy.discard(channel)

    def deliver(self, notification: dict) -> str:
        """Deliver one notification; return "", or why that failed."""
        try:
            return {"mail": self.send_mail, "webhook": self.send_webhook,
                    "ntfy": self.send_ntfy}[notification["way"]](notification)
        except Exception as error:      # of any kind: it is repeated
            return without_secrets(f"{type(error).__name__}: {error}",
                                   notification["target"])

    def send_mail(self, notification: dict) -> str:
        """Give a mail to sendmail; return "", or why that failed. Raises
        OSError and SubprocessError."""
        import subprocess
        program = next((path for path in SENDMAILS
                        if os.access(path, os.X_OK)), None)
        if not program:
            return "there is no sendmail here"
        if not safe_address(notification["target"]):
            return "this is no address"
        done = subprocess.run(
            [program, "-i", "--", notification["target"]],
            input=alert_mail(notification, self.machine.host()),
            env={"PATH": DEFAULT_PATH, "HOME": os.environ.get("HOME", "/")},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=SEND_SECONDS)
        errors = done.stderr.decode("utf-8", "replace").strip()[-300:]
        return "" if done.returncode == 0 else \
            f"sendmail says {escape_controls(errors) or done.returncode}"

    def send_webhook(self, notification: dict) -> str:
        """POST a notification as JSON; return "", or why that failed.
        Raises ConnectionFailed and ValueError."""
        import json
        body = {name: notification[name] for name in (
            "key", "at", "title", "text", "subject", "kind", "dash")}
        body["state"] = "over" if notification["resolved"] else "on"
        return post(notification["target"], json.dumps(body).encode(), {
            "Content-Type": "application/json",
            "Idempotency-Key": notification["key"]})

    def send_ntfy(self, notification: dict) -> str:
        """POST a notification to a topic of ntfy; return "", or why that
        failed. Its headers are ASCII, or encoded as in RFC 2047. Raises
        ConnectionFailed and ValueError."""
        from email.header import Header as EncodedHeader
        title = one_line(notification["title"])[:200]
        if not title.isascii():
            title = EncodedHeader(title, "utf-8", maxlinelen=10_000).encode()
        if notification["resolved"]:
            priority, tag = "default", "white_check_mark"
        elif notification["kind"] == "test":
            priority, tag = "default", "bell"
        else:
            priority, tag = "high", "warning"
        text = notification["text"] or notification["title"]
        return post(notification["target"], text.encode()[:4000], {
            "Title": title, "Content-Type": "text/plain; charset=utf-8",
            "Priority": priority, "Tags": tag})


def without_secrets(text: str, target: str) -> str:
    """Return an error's text without the URL or address `target` and its
    parts, because they may hold a key."""
    from urllib.parse import urlsplit
    for part in (target, *map(str, urlsplit(target)[1:4])):
        if len(part) > 3:
            text = text.replace(part, "...")
    return escape_controls(text)[:300]


def alert_mail(notification: dict, host: str) -> bytes:
    """Return a notification as a mail from `host`. It contains foreign text,
    so a character that could break a header becomes a blank."""
    from email import policy
    from email.message import EmailMessage
    from email.utils import formatdate
    message = EmailMessage(policy=policy.SMTP.clone(linesep="\n"))
    message["From"] = f"koi <koi@{one_line(host)}>"
    message["To"] = notification["target"]
    message["Subject"] = one_line("koi: " + notification["title"])[:200]
    message["Date"] = formatdate(notification["at"])
    message["Message-ID"] = \
        f"<{notification['key']}.{notification['dash']}@koi>"
    message["Auto-Submitted"] = "auto-generated"
    text = (notification["text"] or notification["title"]) + "\n"
    message.set_content("".join(
        each if each.isprintable() or each == "\n" else " "
        for each in text), cte="quoted-printable")
    return message.as_bytes()


def post(target: str, body: bytes, headers: dict) -> str:
    """POST `body` to the URL `target`. Return "" for a status of 2xx, else
    the reason. Raises ConnectionFailed, and ValueError for an invalid URL."""
    status = send_request("POST", target, body, {
        "User-Agent": f"koi/{VERSION}", **headers}, SEND_SECONDS,
        MOST_ANSWER).status
    if 300 <= status < 400:
        return f"it answered {status}: redirects are not followed"
    return "" if 200 <= status < 300 else f"it answered {status}"


# ==========================================================================
# HttpServer: is this a valid request, in time?          (network, files; U)
#
# accept, count the connection, TLS handshake; then per request: head, checks
# of Api, body, handler, response; after the last one close. Each step has a
# limit below, in seconds or bytes. Over it the client gets a 4xx or 503 where
# it can still read one, and only that connection ends. One coroutine of the
# event loop serves one connection, so a slow client delays no other.
# ==========================================================================

LONGEST_LINE, LONGEST_HEAD, MOST_HEADERS = 8192, 16_384, 64
HEAD_TIME, BODY_TIME = 10.0, 30.0   # seconds: handshake and each head; a body
IDLE_TIME = 75.0        # seconds between two requests of a connection
WRITE_TIME = 30.0       # seconds in which a client takes WRITE_SIZE bytes
WRITE_SIZE, READ_SIZE = 2**16, 2**16
LINGER_TIME, LINGER_BYTES = 1.0, 2**20  # that we discard after a refusal
AHEAD = 2**16           # bytes of requests that wait for their turn
STOP_TIME = 1.5         # seconds for running requests when the server stops
ACCEPT_PAUSE = 0.1      # seconds without accepting: no descriptor was left
BACKLOG = 1024          # every host calls at the full minute
MOST_CONNECTIONS, MOST_OF_ADDRESS, MOST_UNPROVEN = 4096, 512, 64
# asyncio buffers 256 KiB per TLS connection from Python 3.11 on, half a
# gigabyte for 2,000 hosts. Two TLS records are enough.
TLS_BUFFER = 2**15
LINES_TIME, LINES_IN_TIME = 10.0, 20    # of the log, about refusals
CERTIFICATE_SOON = 14 * DAY             # seconds before it expires: warn
# Flags of OpenSSL (X509_VERIFY_PARAM_set_flags(3)) that `ssl` does not name,
# or only from 3.10 on.
PARTIAL_CHAIN, NO_CHECK_TIME = 0x80000, 0x200000

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrst"
                             "uvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
# These say where a request ends, whose it is, or what it is. A proxy and we
# could choose differently between two of one name.
SINGLE_HEADERS = frozenset(
    "host content-length content-type content-encoding origin authorization "
    "expect transfer-encoding if-none-match access-control-request-method"
    .split())
TEXT, JSON = "text/plain; charset=utf-8", "application/json"
# Sent with every response: a browser guesses no type, sends no referrer,
# shows no page of ours in a frame and shares no window with others.
SECURITY_HEADERS = (
    b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    b"X-Frame-Options: DENY\r\nCross-Origin-Opener-Policy: same-origin\r\n")


# --- a head, and what is wrong with it ------------------------------------


class Request:
    """A valid head and, once it was read, its body. RFC 9112."""

    def __init__(self, method: str, target: str, minor: int, headers: dict):
        self.method, self.minor, self.headers = method, minor, headers
        self.path, _, self.query = target.partition("?")
        self.length, self.body = body_length(method, headers), b""

    @property
    def keeps_alive(self) -> bool:
        """May another request follow on the connection? RFC 9112, 9.3"""
        return self.minor == 1 and "close" not in [
            word.strip(" \t").lower() for word in
            self.headers.get("connection", "").split(",")]

    @property
    def content_type(self) -> str:
        """The media type of the body, in lower case, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip(
            " \t").lower()


def partial_head_error(data: bytes) -> str:
    """Return why these bytes cannot begin a request, or "".

    It is asked before the head is complete: who speaks TLS to this port, or
    ends lines in another way than HTTP, gets an answer without a timeout.
    """
    if not 65 <= data[0] <= 90:     # a method begins with A to Z
        return "this port speaks plain http" if data[0] == 22 else \
            "this is no HTTP"
    ends = data.count(b"\r\n")
    if data.count(b"\n") != ends \
            or data.count(b"\r") - ends != data.endswith(b"\r"):
        return "a line ends with half of CR LF"
    return "there is a NUL in it" if b"\0" in data else ""


def check_head_size(data: bytes, end: int) -> None:
    """Check the size of a head that ends at `end`; -1: more has to come.
    Raises Error."""
    line = data.find(b"\r\n", 0, LONGEST_LINE + 2)
    if line < 0 and len(data) > LONGEST_LINE:
        raise Error(f"the first line is longer than {LONGEST_LINE:,} bytes",
                    "", 414)
    if (len(data) if end < 0 else end + 4) > LONGEST_HEAD:
        raise Error(f"the head is longer than {LONGEST_HEAD:,} bytes", "",
                    431)


def parse_head(head: bytes) -> Request:
    """Return the request with this head, whose empty line is cut off.

    It is stricter than RFC 9112: whatever a proxy in front of us could read
    in another way is refused. Raises Error with the status to answer.
    """
    lines = head.decode("latin-1").split("\r\n")
    if len(lines) - 1 > MOST_HEADERS:
        raise Error(f"there are more than {MOST_HEADERS} header lines", "",
                    431)
    words = lines[0].split(" ")
    if len(words) != 3:
        raise Error("the first line is not METHOD TARGET VERSION", "", 400)
    method, target, version = words
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise Error("this speaks HTTP/1.1", "", 400)
    if method not in METHODS:
        raise Error("there is no such method here", "", 501)
    why = target_error(target)
    if why:
        raise Error(why, "", 400)
    headers = parse_headers(lines[1:])
    if version == "HTTP/1.1" and "host" not in headers:
        raise Error("there is no Host", "", 400)
    return Request(method, target, int(version[-1]), headers)


def target_error(target: str) -> str:
    """Return why this is not a target of ours, or "". Our paths are plain,
    so what could be read in two ways is refused, not normalized."""
    path = target.partition("?")[0]
    if not path.startswith("/"):
        return "the target is no path"
    if not (target.isascii() and target.isprintable()) or " " in target:
        return "the target is not ASCII without blanks"
    if "//" in path or "/." in path or any(
            character in path for character in "%\\;") or "#" in target:
        return "the path is not plain"
    return ""


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Return the header values by lower-case name. Values of a repeated name
    are joined by commas. Raises Error."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or not TOKEN_CHARACTERS.issuperset(name):
            raise Error("a header is not NAME: VALUE", "", 400)
        name, value = name.lower(), value.strip(" \t")
        if not value.isprintable() and any(
                character < " " and character != "\t" or character == "\x7f"
                for character in value):
            raise Error("there is a control character in a header", "", 400)
        if name in headers:
            if name in SINGLE_HEADERS:
                raise Error(f"there are two {name} headers", "", 400)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def body_length(method: str, headers: dict) -> int:
    """Return the number of bytes after the head. Chunks are refused: two
    programs can disagree about where they end. Raises Error."""
    if "transfer-encoding" in headers:
        raise Error("a body has to come with its length",
                    "Content-Length, no Transfer-Encoding", 501)
    text = headers.get("content-length", "0")
    if not text.isascii() or not text.isdigit():
        raise Error("Content-Length is no number", "", 400)
    if len(text) > 15:
        raise Error("the body is too long", "", 413)
    if int(text) and method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        raise Error(f"{method} has no body", "", 400)
    return int(text)


def parse_query(query: str) -> dict[str, str]:
    """Return the fields of a query, each of them once. Raises Error."""
    from urllib.parse import parse_qsl
    try:
        fields = parse_qsl(query, keep_blank_values=True, errors="strict",
                           max_num_fields=16)
    except ValueError:
        raise Error("the query is not UTF-8, or has too many fields", "", 400
                    ) from None
    if len(dict(fields)) < len(fields):
        raise Error("the query has a field twice", "", 400)
    return dict(fields)


def parse_body(body: bytes) -> dict:
    """Return the JSON object of a body. Raises Error, also for what SQLite
    cannot hold: large numbers, NaN, halves of surrogate pairs."""
    import json

    def whole(text: str) -> int:
        if len(text) > 18:
            raise ValueError
        return int(text)

    def finite(text: str) -> float:
        number = float(text)
        if number - number:         # infinity
            raise ValueError
        return number

    def refuse(_text: str):
        raise ValueError

    try:
        found = json.loads(body.decode(), parse_int=whole, parse_float=finite,
                           parse_constant=refuse)
        if b"\\ud" in body or b"\\uD" in body:
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Error("the body is not the JSON of a request", "", 400
                    ) from None
    if not isinstance(found, dict):
        raise Error("the body is no JSON object", "", 400)
    return found


# --- names and addresses --------------------------------------------------


def split_authority(text: str) -> tuple[str, str]:
    """Return (name, port) of NAME:PORT, the name in lower case; [::1]:80
    keeps its brackets. ("", "") for anything else."""
    import re
    found = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
                         r"(?::([0-9]{1,5}))?", text)
    if not found or found[1].startswith("[") and not address_of(found[1]):
        return "", ""
    return found[1].lower(), found[2] or ""


def address_of(name: str):
    """Return the ipaddress object for an IP address, or None. An IPv4
    address in IPv6 (::ffff:127.0.0.1) is the IPv4 address."""
    from ipaddress import ip_address
    if name.startswith("["):
        name = name[1:-1]
    try:
        found = ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(address: str) -> bool:
    """Is this an address of this machine alone?"""
    found = address_of(address)
    return bool(found) and found.is_loopback


def is_allowed_host(host: str, names: frozenset, literals: bool) -> bool:
    """May a request name us so in its Host header?

    The page of an attacker whose name was made to point here (DNS rebinding)
    sends that name. With `literals` every IP address is allowed: an address
    cannot be made to point elsewhere.
    """
    name, port = split_authority(host)
    if name == "localhost" or name in names or f"{name}:{port}" in names:
        return bool(name)
    address = address_of(name) if name else None
    return bool(address) and (literals or address.is_loopback)


def network_of(address: str) -> str:
    """Return by what a client is counted: its IPv4 address or its /64."""
    found = address_of(address)
    if found is None:
        return "?"
    return str(found) if found.version == 4 else found.exploded[:19]


def forwarded_address(header: str) -> str:
    """Return the client in X-Forwarded-For, or "". The last address is the
    one our proxy saw; those before it are claims of the client."""
    last = header.rpartition(",")[2].strip(" \t")
    return str(address_of(last) or address_of(split_authority(last)[0]) or "")


class ConnectionLimits:
    """How many connections each network has, and how many of them have not
    shown a valid token yet."""

    def __init__(self):
        self.count, self.most = 0, MOST_CONNECTIONS
        self.networks: dict[str, list] = {}     # -> [all, unproven]

    @property
    def is_full(self) -> bool:
        """Is there no room left for any client?"""
        return self.count >= self.most

    def has_room_for(self, network: str | None) -> bool:
        """May this network have one more? None is not counted by network."""
        every, unproven = self.networks.get(network, (0, 0))
        return every < MOST_OF_ADDRESS and unproven < MOST_UNPROVEN

    def add(self, network: str | None) -> None:
        """Count a new connection, which is unproven."""
        self.count += 1
        if network is not None:
            row = self.networks.setdefault(network, [0, 0])
            row[0] += 1
            row[1] += 1

    def mark_proven(self, network: str | None) -> None:
        """One of the connections has shown a valid token."""
        if network is not None:
            self.networks[network][1] -= 1

    def remove(self, network: str | None, proven: bool) -> None:
        """A connection has ended."""
        self.count -= 1
        if network is not None:
            row = self.networks[network]
            row[0] -= 1
            row[1] -= not proven
            if not row[0]:
                del self.networks[network]


# --- responses ------------------------------------------------------------


class Response:
    """A response before it becomes bytes.

    `headers` are (name, value). `stream`, a coroutine function, sends a body
    of unknown length: it gets the function `send(bytes)`, also a coroutine,
    and the connection closes after it.
    """

    def __init__(self, status: int = 200, body: bytes = b"",
                 content_type: str = TEXT, headers: tuple = (), stream=None):
        self.status, self.body = status, body
        self.content_type, self.headers = content_type, headers
        self.stream = stream


def json_response(value, status: int = 200, headers: tuple = ()) -> Response:
    """Return a response with a value as JSON."""
    return Response(status, compact_json(value).encode(
        "utf-8", "backslashreplace"), JSON, headers)


def error_response(error: Error, headers: tuple = ()) -> Response:
    """Return an Error as a response. One without an HTTP status is a bug."""
    status = error.status if error.status >= 400 else 500
    if status in (429, 503, 507) and not headers:
        headers = (("Retry-After", str(getattr(error, "seconds", 5))),)
    return json_response({"error": error.message, "hint": error.hint},
                         status, headers)


def head_bytes(response: Response, last: bool) -> bytes:
    """Return the head of a response; `last` closes the connection after it.
    Foreign text cannot add a header: only printable ASCII passes."""
    from http import HTTPStatus
    lines = [f"HTTP/1.1 {response.status} "
             f"{HTTPStatus(response.status).phrase}",
             f"Content-Type: {response.content_type}"]
    names = set()
    for name, value in response.headers:
        assert value.isascii() and value.isprintable(), name
        names.add(name)
        lines.append(f"{name}: {value}")
    if "Cache-Control" not in names:
        lines.append("Cache-Control: no-store")
    if not response.stream and response.status not in (204, 304):
        lines.append(f"Content-Length: {len(response.body)}")
    if last:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("ascii") + b"\r\n" \
        + SECURITY_HEADERS + b"\r\n"


# --- one connection -------------------------------------------------------


class ConnectionClosed(Exception):
    """The client closed the connection, or is too slow to answer it."""


class HttpConnection:
    """One connection, from its handshake to its end: `run` serves it.

    `peer` is the address on the other side, `network` by what it is counted
    (None: not at all, for it is this machine or our proxy). The task of
    `run` is cancelled to end the connection at once.
    """

    def __init__(self, server: HttpServer, sock, peer: str,
                 network: str | None):
        self.server, self.sock = server, sock
        self.peer, self.network = peer, network
        self.reader = self.writer = self.task = None
        self.buffer = bytearray()   # received, and not parsed yet
        self.unread = 0             # bytes of the present body
        self.idle = True            # no request is being read or answered
        self.proven = False         # it has shown a valid token
        self.demanded = None        # Api: see sync

    async def run(self) -> None:
        """Serve requests in their order until one side ends it."""
        import asyncio
        wait = HEAD_TIME            # seconds for the first byte
        try:
            await self.open()
            while await self.serve_request(wait):
                wait = IDLE_TIME
        except (ConnectionClosed, OSError, asyncio.TimeoutError):
            pass
        except Exception as bug:
            self.server.refusals.report_bug(bug)
        finally:
            await self.close()

    async def open(self) -> None:
        """Shake hands, if it is TLS. Raises OSError, TimeoutError."""
        import asyncio
        loop, context = asyncio.get_running_loop(), self.server.tls_context
        options = {}
        if context:
            # A handshake costs 60 kB and a millisecond: not for the silent.
            await self.first_byte()
            options["ssl_handshake_timeout"] = HEAD_TIME
        reader = asyncio.StreamReader(limit=READ_SIZE, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, self.sock, ssl=context, **options)
        # drain() then waits until the kernel has all of it.
        transport.set_write_buffer_limits(high=0)
        self.reader = reader
        self.writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def first_byte(self) -> None:
        """Wait until something was sent. Raises TimeoutError."""
        import asyncio
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.sock, readable.set)
        try:
            await asyncio.wait_for(readable.wait(), HEAD_TIME)
        finally:
            loop.remove_reader(self.sock)

    async def close(self) -> None:
        """Close when the rest is written; a client that does not take it in
        WRITE_TIME seconds, or was ended by `abort`, loses it."""
        import asyncio
        if not self.writer:
            self.sock.close()
            return
        self.writer.close()
        try:
            await asyncio.wait_for(self.writer.wait_closed(), WRITE_TIME)
        except OSError:
            pass
        except asyncio.TimeoutError:
            self.discard_output()

    def discard_output(self) -> None:
        """Close without waiting until all is written."""
        try:
            self.writer.transport.abort()
        except AttributeError:      # Python 3.11: a closed TLS transport
            pass

    def abort(self) -> None:
        """End it now, whatever is being sent."""
        self.idle = False
        if self.writer:
            self.discard_output()
        self.task.cancel()

    def mark_proven(self) -> None:
        """The client has shown a valid token."""
        if not self.proven:
            self.proven = True
            self.server.limits.mark_proven(self.network)

    def client_address(self, request: Request) -> str:
        """Return who sent a request. Only our proxy is believed in that."""
        header = request.headers.get("x-forwarded-for", "")
        return self.network is None and forwarded_address(header) or self.peer

    # --- requests

    async def serve_request(self, wait: float) -> bool:
        """Answer the next request, which begins within `wait` seconds.

        Return whether another may follow. Raises ConnectionClosed, OSError,
        TimeoutError.
        """
        self.unread = 1             # a faulty head has no known end
        request = None
        try:
            if not self.buffer and not await self.receive(wait):
                return False
            request = await self.read_head()
            self.idle = False
        except Error as error:
            self.server.refusals.add(
                f"{self.peer} ?: {error.status} {error.message}")
            response = error_response(error)
        else:
            self.unread = request.length
            response = await self.server.api.respond(request, self)
        last = bool(self.unread or self.server.stopping or response.stream
                    or not request.keeps_alive)
        await self.send_response(response, last,
                                 request and request.method == "HEAD")
        if self.unread:
            await self.linger()
        self.idle = True
        return not last

    async def receive(self, seconds: float) -> bool:
        """Add to the buffer what comes. Return False if nothing comes in
        time, or ever. Raises ConnectionClosed."""
        import asyncio
        try:
            data = await asyncio.wait_for(self.reader.read(READ_SIZE),
                                          seconds)
        except asyncio.TimeoutError:
            return False
        except OSError as error:
            raise ConnectionClosed from error
        self.buffer += data
        return bool(data)

    async def read_until(self, is_complete, seconds: float) -> None:
        """Read until `is_complete` returns true. Raises ConnectionClosed,
        and Error: 408, or what `is_complete` raises."""
        import asyncio
        until = asyncio.get_running_loop().time() + seconds
        while not is_complete():
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or not await self.receive(left):
                if self.reader.at_eof():
                    raise ConnectionClosed
                raise Error("the request came too slowly", "", 408)

    async def read_head(self) -> Request:
        """Return the next request; its body is not read yet. Raises Error,
        ConnectionClosed."""
        end = -1

        def is_complete() -> bool:
            nonlocal end
            end = self.buffer.find(b"\r\n\r\n")
            head = bytes(self.buffer if end < 0 else self.buffer[:end + 2])
            why = partial_head_error(head)
            if why:
                raise Error(why, "", 400)
            check_head_size(head, end)
            return end >= 0

        await self.read_until(is_complete, HEAD_TIME)
        head = bytes(self.buffer[:end])
        del self.buffer[:end + 4]
        return parse_head(head)

    async def read_body(self, request: Request) -> None:
        """Read the body that belongs to a request. Raises Error,
        ConnectionClosed."""
        size = request.length
        if "expect" in request.headers and len(self.buffer) < size:
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await self.read_until(lambda: len(self.buffer) >= size, BODY_TIME)
        request.body = bytes(self.buffer[:size])
        del self.buffer[:size]
        self.unread = 0

    # --- responses

    async def send_response(self, response: Response, last: bool,
                            head_only: bool) -> None:
        """Write a response. Raises ConnectionClosed."""
        head = head_bytes(response, last)
        if head_only or response.status in (204, 304):
            await self.send(head)
        elif response.stream:
            await self.send(head)
            await self.run_until_closed(response.stream(self.send))
        else:
            await self.send(head + response.body)

    async def send(self, data: bytes) -> None:
        """Write `data` as fast as the client takes it. Raises
        ConnectionClosed, also for a client that takes too little."""
        import asyncio
        transport = self.writer.transport
        try:
            for at in range(0, len(data), WRITE_SIZE):
                self.writer.write(data[at:at + WRITE_SIZE])
                if transport.is_closing() or transport.get_write_buffer_size():
                    await asyncio.wait_for(self.writer.drain(), WRITE_TIME)
        except (OSError, asyncio.TimeoutError) as error:
            self.discard_output()
            raise ConnectionClosed from error

    async def linger(self) -> None:
        """Discard what is still on its way. A socket that is closed over
        unread bytes sends a reset, and our refusal would be lost. Raises
        OSError, TimeoutError."""
        import asyncio

        async def discard() -> None:
            left = LINGER_BYTES - len(self.buffer)
            while left > 0:
                data = await self.reader.read(READ_SIZE)
                left = left - len(data) if data else 0

        if self.writer.can_write_eof():
            self.writer.write_eof()
        await asyncio.wait_for(discard(), LINGER_TIME)

    async def run_until_closed(self, coroutine):
        """Return what a coroutine returns that waits for news. Raises
        ConnectionClosed when the client closes it first."""
        import asyncio
        tasks = [asyncio.ensure_future(each)
                 for each in (coroutine, self.until_closed())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ConnectionClosed
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            # Or asyncio complains that nobody has seen their exceptions.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until_closed(self) -> None:
        """Return when the client closes the connection. What it sends before
        is kept, up to AHEAD bytes: then its end cannot be seen any more."""
        import asyncio
        try:
            while len(self.buffer) <= AHEAD:
                data = await self.reader.read(READ_SIZE)
                if not data:
                    return
                self.buffer += data
        except OSError:
            return
        await asyncio.get_running_loop().create_future()


class RefusalLog:
    """The log's lines about refusals and bugs: LINES_IN_TIME of them in
    LINES_TIME seconds, so that a hostile client does not fill the disk."""

    def __init__(self, log):
        self.log = log                  # a function of a line
        self.count, self.until = 0, 0.0     # lines of the present period

    def add(self, text: str) -> None:
        """Log a line, or count it."""
        self.end_period()
        self.count += 1
        if self.count <= LINES_IN_TIME:
            self.log(text)

    def end_period(self) -> None:
        """When the period is over, log how many lines were left out."""
        now = time.monotonic()
        if now >= self.until:
            left_out, self.count = self.count - LINES_IN_TIME, 0
            self.until = now + LINES_TIME
            if left_out > 0:
                self.log(f"{plural(left_out, 'line')} more about refusals")

    def report_bug(self, error: BaseException) -> None:
        """Log an exception that nobody expected, in a line, with its place."""
        from traceback import extract_tb
        places = " ".join(f"{frame.name}:{frame.lineno}" for frame in
                          extract_tb(error.__traceback__)[-4:])
        self.add(f"internal error (please report): {type(error).__name__}: "
                 f"{error} ({places})")


# --- sockets --------------------------------------------------------------


def listen_address(text: str) -> tuple[str, int]:
    """Return address and port of 127.0.0.1:8077 or [::1]:8077. Raises
    Error."""
    name, port = split_authority(text)
    name = "127.0.0.1" if name == "localhost" else name
    address = address_of(name) if name and port else None
    if not address or int(port) > 65535:
        raise Error(f"{short(text)} is no ADDRESS:PORT",
                    "127.0.0.1:8077, 0.0.0.0:8077, [::1]:8077", EXIT_USAGE)
    return str(address), int(port)


def listener(address: str, port: int):
    """Return a listening socket. Raises Error."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.create_server((address, port), family=family,
                                    backlog=BACKLOG)
    except OSError as error:
        raise Error(f"cannot listen at {url_name(address)}:{port}: "
                    f"{os.strerror(error.errno)}", "--listen ADDRESS:PORT"
                    ) from None
    sock.setblocking(False)
    return sock


def url_name(address: str) -> str:
    """Return an address as URLs have it: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


class Certificate:
    """The certificate of this server and its key, from two PEM files."""

    def __init__(self, cert: str, key: str):
        self.cert, self.key = cert, key
        self.context = None             # an ssl.SSLContext
        self.expires = 0.0              # seconds since 1970
        self.fingerprint = ""           # SHA-256, as openssl prints it

    def load(self) -> None:
        """Read both files, at the start and on SIGHUP: later connections
        get the new ones. Raises Error, and keeps the old ones."""
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
            expires, der = shown_certificate(context, self.cert)
        except (OSError, ValueError) as error:      # SSLError is an OSError
            why = getattr(error, "strerror", None) or error
            raise Error(f"{self.cert} and {self.key} cannot be used: {why}",
                        "a certificate and its key, both PEM") from None
        digest = sha256_hex(der).upper()
        self.context, self.expires = context, expires
        self.fingerprint = ":".join(digest[at:at + 2]
                                    for at in range(0, 64, 2))

    def problem(self, now: float) -> str:
        """Return that it has expired, or expires soon; else ""."""
        if now > self.expires:
            return f"{self.cert} expired on {format_rfc3339(self.expires)}"
        return f"{self.cert} expires on {format_rfc3339(self.expires)}" \
            if now > self.expires - CERTIFICATE_SOON else ""


def shown_certificate(context, path: str) -> tuple[float, bytes]:
    """Return the expiry and the DER of the certificate that clients get.

    `ssl` only describes a certificate that a peer has shown and that was
    verified, so this shakes hands with itself, in memory. The client trusts
    the certificates in `path`, whatever their dates. Raises OSError.
    """
    import ssl
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.check_hostname = False
    trust.load_verify_locations(path)
    trust.verify_flags |= PARTIAL_CHAIN | NO_CHECK_TIME
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server) * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass                        # it is the other side's turn
    return (float(ssl.cert_time_to_seconds(client.getpeercert()["notAfter"])),
            client.getpeercert(binary_form=True))


# Imported at the start: an upgrade of Python may remove the files of the
# running version.
NEEDED = tuple(
    "base64 binascii calendar concurrent.futures.thread email.header "
    "email.message email.policy email.utils hashlib heapq hmac html "
    "http.client ipaddress json queue re secrets sqlite3 ssl struct "
    "subprocess threading traceback unicodedata urllib.parse uuid zlib"
    .split())


class HttpServer:
    """Accepts connections for an Api until a signal stops it.

    `log` is a function of a line. The connections of this machine and of
    `proxies` are not counted by their address.
    """

    def __init__(self, api, listeners: list, certificate=None, proxies=(),
                 log=lambda line: None):
        self.api, self.listeners, self.certificate = api, listeners, \
            certificate
        self.proxies, self.log = frozenset(proxies), log
        self.refusals = RefusalLog(log)
        self.limits = ConnectionLimits()
        self.connections: dict[HttpConnection, None] = {}   # oldest first
        self.stopping, self.stop_event = False, None

    @property
    def tls_context(self):
        """The present ssl.SSLContext, or None."""
        return self.certificate and self.certificate.context

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [sock.getsockname()[0] for sock in self.listeners]

    def run(self, ready=lambda: None) -> None:
        """Serve until a signal says stop, or Api cannot go on. `ready` is
        called when connections are accepted."""
        import asyncio
        from importlib import import_module
        for name in NEEDED:
            import_module(name)
        if self.certificate:
            from asyncio import sslproto
            sslproto.SSLProtocol.max_size = TLS_BUFFER
        self.limits.most = min(MOST_CONNECTIONS,
                               max(raise_file_limit() - 64, 16))
        asyncio.run(self.serve(ready))

    async def serve(self, ready) -> None:
        """Accept connections, stop gracefully."""
        import asyncio
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.on_exception)
        self.stop_event = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop_event.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.api.open(self)
        tasks = [loop.create_task(self.accept_from(sock))
                 for sock in self.listeners]
        tasks.append(loop.create_task(self.watch_health()))
        ready()
        await self.stop_event.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for sock in self.listeners:
            sock.close()
        await self.finish()

    async def finish(self) -> None:
        """Let running requests end, for STOP_TIME seconds."""
        import asyncio
        self.stopping = True
        self.api.stop()
        for connection in list(self.connections):
            if connection.idle:
                connection.task.cancel()
        if self.connections:
            await asyncio.wait([each.task for each in self.connections],
                               timeout=STOP_TIME)
        for connection in list(self.connections):
            connection.abort()
        self.api.close()

    # --- connections

    async def accept_from(self, listening) -> None:
        """Accept the connections of a listening socket."""
        import asyncio
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
                                   errno.ENOMEM):
                    self.refusals.add(f"cannot accept: {error.strerror}")
                    await asyncio.sleep(ACCEPT_PAUSE)
                continue        # else the client has closed it already
            self.admit(sock, address[0])
            await asyncio.sleep(0)      # others are served in between

    def admit(self, sock, peer: str) -> None:
        """Serve a connection if there is room; no byte was read yet."""
        import asyncio
        near = is_loopback(peer) or peer in self.proxies
        network = None if near else network_of(peer)
        if not self.limits.has_room_for(network) or (
                self.limits.is_full and not self.make_room()):
            self.refusals.add(f"{peer} ?: 503 too many connections")
            return self.turn_away(sock)
        connection = HttpConnection(self, sock, peer, network)
        self.limits.add(network)
        self.connections[connection] = None
        connection.task = asyncio.get_running_loop().create_task(
            connection.run())
        connection.task.add_done_callback(
            lambda _task: self.forget(connection))

    def forget(self, connection: HttpConnection) -> None:
        """A connection has ended."""
        del self.connections[connection]
        self.limits.remove(connection.network, connection.proven)

    def make_room(self) -> bool:
        """End the connection that has been silent for the longest time, so
        that silent clients keep nobody out. False if there is none."""
        for connection in self.connections:
            if connection.idle and not connection.proven:
                connection.abort()
                return True
        return False

    def turn_away(self, sock) -> None:
        """Answer 503, if that needs no handshake, and close."""
        response = error_response(
            Error("too many connections", "try again", 503))
        try:
            if not self.certificate:
                sock.send(head_bytes(response, True) + response.body)
        except OSError:
            pass
        sock.close()

    # --- health

    async def watch_health(self) -> None:
        """Stop when Api cannot continue; check the certificate each day."""
        import asyncio
        seconds = 0
        while not self.api.broken:
            if self.certificate and seconds % DAY == 0:
                self.api.report_certificate(self.certificate)
            self.refusals.end_period()
            await asyncio.sleep(1.0)
            seconds += 1
        self.stop_event.set()

    def reload(self) -> None:
        """Read a renewed certificate, on SIGHUP."""
        if not self.certificate:
            return
        try:
            self.certificate.load()
            self.log("the certificate was read again")
            self.api.report_certificate(self.certificate)
        except Error as error:
            self.log(f"the certificate stays as it was: {error.message}")

    def on_exception(self, _loop, context: dict) -> None:
        """asyncio reports an exception. A lost connection is no news."""
        error = context.get("exception")
        if error is not None and not isinstance(error, (OSError, EOFError)):
            self.refusals.report_bug(error)


def raise_file_limit() -> int:
    """Raise the limit of open files as far as we may. Return it."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
    return wanted


# ==========================================================================
# Api: who may call what?                                       (network; U)
#
# ROUTES has a row for everything that can be asked for: who may ask, which
# fields the query may have, how long the body may be, and the handler. The
# handler gets the request's context and returns a Response or raises Error.
# Readers are threads with a read-only connection each; everything that
# changes something goes to the dashboard's writer thread.
# ==========================================================================

PING_BODY, SMALL_BODY = 2**20, 2**16    # bytes
SYNC_BODY, REQUEST_BODY = 2**23, 2**20
INLINE_BODY = 2**15     # bytes; longer JSON is not parsed in the event loop
MOST_READS, MOST_READERS = 256, 4       # waiting questions; threads
MOST_CHANGES, MOST_CHANGE_BYTES = 1000, 2**22   # that a stream remembers
FEED_TIME = 60.0        # seconds in which a browser comes back to a stream
HEARTBEAT = 15.0        # seconds between two lines of a stream
LONGEST_POLL, LONGEST_FOLLOW = 25.0, 10.0   # seconds, of a host and a page
MOST_FRAMES, LONGEST_SEARCH = 2**20, 200    # bytes, characters
MISSES, MISSES_IN_ALL = 10, 300         # wrong keys: of a network, of all
BAN, LONGEST_BAN = 60.0, 3600.0         # seconds
MOST_NETWORKS = 10_000                  # that LoginThrottle remembers

HTML, BYTES = "text/html; charset=utf-8", "application/octet-stream"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
NDJSON = "application/x-ndjson; charset=utf-8"
START_OVER = b'{"reset":true}\n'             # read all anew
# What the page may do: run its own script, ask this server.
PAGE_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; "
    "connect-src 'self'; worker-src blob:; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for "
    "'script'; trusted-types koi")
# The role of a route -> the roles of the tokens that are good for it.
TOKEN_ROLES = {"host": ("host",), "viewer": ("viewer", "operator"),
               "operator": ("operator",),
               "host or operator": ("host", "operator")}
# A host that sends one of these wants to know at once that it arrived.
SENT = ("records", "outputs", "results", "list")


class TooManyRequests(Error):
    """The client has to wait `seconds` (429)."""

    def __init__(self, message: str, seconds: int):
        super().__init__(message, f"try again in {seconds} s", 429)
        self.seconds = seconds


# --- paths, queries -------------------------------------------------------


class Route(FrozenRecord):
    """A row of ROUTES: one method of one path."""
    method: str
    path: str               # a word in capitals: see PATH_FIELDS
    role: str               # anyone, or a key of TOKEN_ROLES
    handler: object         # async (api, context) -> Response
    query: dict = {}        # field -> parser (name, text) -> value
    body: int = SMALL_BODY  # bytes at most
    cors: bool = False      # pages of other origins may ask, too


def is_check(text: str) -> bool:
    """Is it a UUID in lower case, as Healthchecks' paths have them?"""
    return is_uuid(text) and text == text.lower()


def is_number(text: str) -> bool:
    """Is it a whole number that SQLite can hold?"""
    return text.isascii() and text.isdigit() and len(text) <= 18


def is_slug(text: str) -> bool:
    """Is it a name as the paths of pings have them?"""
    return 0 < len(text) <= 200 and SLUG_CHARACTERS.issuperset(text.lower())


def is_id(text: str) -> bool:
    """Is it the id of a host, or the nonce of a request?"""
    return is_hex(text, 32)


# A word of a route's path -> whether a text may be in its place.
PATH_FIELDS = {
    "HOST": is_id, "NONCE": is_id, "JOB": is_number, "RUN": is_number,
    "N": is_number, "CHECK": is_check, "KEY": is_slug,
    "NAME": lambda text: is_slug(text.rpartition(".")[0])}


def match_path(words: list[str], parts: list[str]) -> tuple | None:
    """Return the values in a path whose words may be PATH_FIELDS, numbers as
    such; None for another path."""
    if len(words) != len(parts) or not all(
            PATH_FIELDS[word](part) if word in PATH_FIELDS else word == part
            for word, part in zip(words, parts)):
        return None
    return tuple(int(part) if PATH_FIELDS[word] is is_number else part
                 for word, part in zip(words, parts) if word in PATH_FIELDS)


def match_ping(path: str) -> tuple:
    """Return (UUID or key, slug or None, action) of a ping's path, or ().

    The paths are Healthchecks': UUID[/ACTION] and KEY/SLUG[/ACTION], with
    and without /ping in front. UUID comes first: UUID/start has no slug.
    """
    import re
    uuid = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    slug, action = "[A-Za-z0-9_-]{1,200}", "start|fail|log|[0-9]{1,18}"
    found = re.fullmatch(
        rf"(?:/ping)?/({uuid})()(?:/({action}))?/?", path) or re.fullmatch(
        rf"(?:/ping)?/(?!ping/)({slug})/({slug})(?:/({action}))?", path)
    return (found[1], found[2] or None, found[3] or "success") \
        if found else ()


def text_field(_name: str, text: str) -> str:
    """Return the text of a query's field as it is."""
    return text


def number_field(name: str, text: str) -> int:
    """Return the number in a query's field. Raises Error."""
    if not is_number(text):
        raise Error(f"{name} is no number", "", 400)
    return int(text)


def time_field(name: str, text: str) -> float:
    """Return the seconds in a query's field. Raises Error."""
    import re
    if not re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", text):
        raise Error(f"{name} is no time", "", 400)
    return float(text)


# --- who may ask ----------------------------------------------------------


def remember(table: dict, network: str, value) -> None:
    """Put a value into a table as the newest. The oldest is forgotten when
    there are more than MOST_NETWORKS."""
    table.pop(network, None)
    table[network] = value
    if len(table) > MOST_NETWORKS:
        del table[next(iter(table))]


class LoginThrottle:
    """Wrong keys by network, and how long each network has to wait.

    Keys are made from passphrases, so they can be guessed. While a network
    waits, its valid keys are refused as well: it must not learn which is.
    """

    def __init__(self):
        self.misses: dict[str, tuple] = {}  # -> since, count, bans
        self.banned: dict[str, float] = {}  # -> until
        self.known: dict[str, float] = {}   # had a valid key -> when
        self.since, self.count = 0.0, 0     # wrong keys of all networks

    def wait(self, network: str, now: float) -> int:
        """Return the seconds until this network may try again."""
        until = self.banned.get(network, 0.0)
        if self.count >= MISSES_IN_ALL and network not in self.known:
            until = max(until, self.since + BAN)
        return int(until - now) + 1 if until > now else 0

    def add_miss(self, network: str, now: float) -> None:
        """Record a wrong key. The tenth in a minute bans the network, each
        time for twice as long; after an hour without, all is forgotten."""
        if now - self.since > BAN:
            self.since, self.count = now, 0
        self.count += 1
        since, count, bans = self.misses.get(network, (now, 0, 0))
        if now - since > BAN:
            bans = bans if now - since < LONGEST_BAN else 0
            since, count = now, 0
        count += 1
        if count >= MISSES:
            since, count = now + min(BAN * 2 ** bans, LONGEST_BAN), 0
            bans = min(bans + 1, 10)
            remember(self.banned, network, since)
        remember(self.misses, network, (since, count, bans))

    def add_success(self, network: str, now: float) -> None:
        """Record a valid key."""
        remember(self.known, network, now)


class RequestContext:
    """A request on its way through Api."""

    def __init__(self, request: Request, connection: HttpConnection):
        self.request, self.connection = request, connection
        self.address = connection.client_address(request)
        self.network = network_of(self.address)
        self.route, self.values = None, ()      # the values in its path
        self.query: dict = {}                   # by Route.query
        self.principal = None                   # whose token it shows
        self.cors: tuple = ()                   # headers of the response
        self.counted = False                    # see AccessRules.count

    @property
    def log_name(self) -> str:
        """What was asked for. A path may hold a key: of an unknown one only
        the first word is shown."""
        path = self.route.path if self.route else \
            "/" + self.request.path.split("/")[1][:12]
        return f"{self.address} {self.request.method} {path}"


class AccessRules:
    """Decides by the head of a request whether it may be made.

    `names` are the host names of this dashboard; `literals` allows all IP
    addresses as such. `principal_of` returns whose a token is, or None.
    """

    def __init__(self, names, principal_of):
        self.names, self.literals = frozenset(names), False
        self.principal_of = principal_of
        self.throttle, self.clients = LoginThrottle(), ConnectionLimits()

    def check_host(self, host: str) -> None:
        """Refuse a host name that is not ours. Raises Error."""
        if not is_allowed_host(host, self.names, self.literals):
            raise Error("this dashboard does not know itself by that name",
                        "koitab dashboard --name HOST", 421)

    def check_origin(self, context: RequestContext, route: Route) -> None:
        """Refuse the pages of others, except where the route allows them.

        A page that was opened from a file has the origin "null". It may ask
        where a token is needed: no browser sends one by itself. Raises Error.
        """
        headers = context.request.headers
        origin = headers.get("origin")
        if route.cors:
            context.cors = (("Access-Control-Allow-Origin", "*"),)
        elif origin == "null" and route.path.startswith("/api/") and (
                route.role != "anyone" or route.method == "GET"):
            context.cors = (("Access-Control-Allow-Origin", "null"),
                            ("Access-Control-Expose-Headers", "X-Koi-Size, "
                             "X-Koi-Live, X-Koi-From, Retry-After"),
                            ("Vary", "Origin"))
        elif origin is not None and origin.partition("://")[2].lower() \
                != headers.get("host", "").lower():
            raise Error("this comes from a page of somebody else", "a proxy "
                        "in front of the dashboard has to pass on the Host",
                        403)

    def check_body(self, request: Request, route: Route) -> None:
        """Refuse a body before it is read. Raises Error."""
        headers = request.headers
        if request.length > route.body:
            raise Error(f"the body is longer than {route.body:,} bytes", "",
                        413)
        if headers.get("content-encoding", "identity") != "identity":
            raise Error("the body has to come as it is",
                        "no Content-Encoding", 415)
        if headers.get("expect", "100-continue").lower() != "100-continue":
            raise Error("this expects too much", "", 417)
        if request.method == "POST" and route.path.startswith("/api/") \
                and request.content_type != JSON:
            raise Error("the body has to be JSON", f"Content-Type: {JSON}",
                        415)

    def count(self, context: RequestContext) -> None:
        """Count the requests of clients behind our proxy, who share its
        connections. Raises Error."""
        if context.address != context.connection.peer:
            if not self.clients.has_room_for(context.network):
                raise Error("too many requests at once", "try again", 503)
            self.clients.add(context.network)
            context.counted = True

    def uncount(self, context: RequestContext) -> None:
        """The request was answered."""
        if context.counted:
            self.clients.remove(context.network, bool(context.principal))

    def check_token(self, context: RequestContext, now: float) -> None:
        """Find out whose token it is and whether the route is for them; now
        is the event loop's time. Raises Error."""
        kind, _, token = context.request.headers.get(
            "authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise Error("this needs a key", "Authorization: Bearer KEY", 401)
        principal = self.principal_of(token.strip(" "))
        wait = self.throttle.wait(context.network, now)
        if wait and not (principal and principal.role == "host"):
            raise TooManyRequests("too many wrong keys", wait)
        if not principal:
            self.throttle.add_miss(context.network, now)
            raise Error("this key is not known here", "", 401)
        self.throttle.add_success(context.network, now)
        context.principal = principal
        if context.counted:
            self.clients.mark_proven(context.network)
        context.connection.mark_proven()
        if principal.role not in TOKEN_ROLES[context.route.role]:
            raise Error(f"this is not for a {principal.role}", "", 403)


# --- who waits for news ---------------------------------------------------


class LongPoll:
    """A request that waits for news about a topic: ("host", ID), ("run",
    NUMBER) or ("changes", DASHBOARD).

    `with` enters it in `polls` before the first question is asked, so that
    no news between a question and the wait for more is missed.
    """

    def __init__(self, polls: dict, topic: tuple):
        import asyncio
        self.polls, self.topic, self.event = polls, topic, asyncio.Event()
        self.ended, self.error = False, None

    def __enter__(self) -> LongPoll:
        self.polls.setdefault(self.topic, {})[self] = None
        return self

    def __exit__(self, *_error) -> None:
        del self.polls[self.topic][self]
        if not self.polls[self.topic]:
            del self.polls[self.topic]

    async def wait(self, seconds: float) -> bool:
        """Wait for news since the last call. Return False when the time is
        over or the poll was ended. Raises the Error it was ended with."""
        import asyncio
        try:
            await asyncio.wait_for(self.event.wait(), max(seconds, 0))
        except asyncio.TimeoutError:
            return False
        self.event.clear()
        if self.error:
            raise self.error
        return not self.ended

    def end(self, error: Error | None = None) -> None:
        """Let it be answered now: with an error, or with what there is."""
        self.ended, self.error = True, error
        self.event.set()


class ChangeStream:
    """The last changes of a dashboard, for the browsers that follow it.

    A change is a line of JSON with a number `seq`, which only grows. `until`
    is the time of the event loop to which changes are wanted although no
    browser follows.
    """

    def __init__(self):
        from collections import deque
        self.first = self.newest = 0        # all after `first` are here
        self.lines: deque = deque()         # (seq, line)
        self.bytes, self.until = 0, 0.0

    def add(self, seq: int, line: bytes) -> None:
        """Remember a change, and forget the oldest ones."""
        self.newest = seq
        self.lines.append((seq, line))
        self.bytes += len(line)
        while len(self.lines) > MOST_CHANGES \
                or self.bytes > MOST_CHANGE_BYTES:
            self.first, old = self.lines.popleft()
            self.bytes -= len(old)

    def clear(self, seq: int) -> None:
        """Forget all changes up to the number `seq`."""
        self.first = self.newest = seq
        self.lines.clear()
        self.bytes = 0

    def since(self, seq: int) -> bytes:
        """Return the lines after the number `seq`, or START_OVER if some of
        them are forgotten."""
        if seq < self.first:
            return START_OVER
        return b"".join(line for number, line in self.lines if number > seq)


class Api:
    """What the dashboard answers. HttpServer calls `respond`; everything
    here runs in the event loop, except what `in_reader` is given."""

    def __init__(self, dashboard: Dashboard, page: str, names=()):
        self.dashboard = dashboard
        self.page, self.page_policy = page.encode(), page_policy_of(page)
        self.page_tag = f'"{sha256_hex(self.page)[:32]}"'
        self.rules = AccessRules(names,
                                 dashboard.credentials.principal_of)
        self.clock, self.certificate_expires = Clock(), 0.0
        self.polls: dict[tuple, dict] = {}      # topic -> LongPolls
        self.followers: dict[tuple, dict] = {}  # the same, of streams
        self.changes = ChangeStream()
        self.reads = 0                          # waiting for a reader
        self.server = self.loop = self.readers = None

    def open(self, server: HttpServer) -> None:
        """Begin. Called in the event loop, before the first request."""
        import asyncio
        from concurrent.futures.thread import ThreadPoolExecutor
        self.server, self.loop = server, asyncio.get_running_loop()
        self.readers = ThreadPoolExecutor(MOST_READERS)
        self.rules.names |= set(map(url_name, server.addresses))
        self.rules.literals = not all(map(is_loopback, server.addresses))
        self.dashboard.is_followed = self.is_followed
        self.dashboard.on_changes = self.on_changes

    def stop(self) -> None:
        """Have all that wait answered, with what there is."""
        for topics in (self.polls, self.followers):
            for topic in list(topics):
                self.end_polls(topics, topic)

    def close(self) -> None:
        """End. Called in the event loop, after the last request."""
        self.dashboard.on_changes = None
        self.readers.shutdown(wait=False)

    @property
    def broken(self) -> str:
        """Why the dashboard cannot go on, or ""."""
        return self.dashboard.broken

    def report_certificate(self, certificate: Certificate) -> None:
        """Show a certificate's expiry: in the metrics and, when it is near,
        in the log and among the dashboard's problems."""
        self.certificate_expires = certificate.expires
        problem = certificate.problem(self.clock.now())
        self.dashboard.problems.pop("certificate", None)
        if problem:
            self.dashboard.problems["certificate"] = problem
            self.server.log(f"warning: {problem}")

    # --- a request

    async def respond(self, request: Request,
                      connection: HttpConnection) -> Response:
        """Return the response to a request whose body is not read yet.
        Raises ConnectionClosed."""
        context = RequestContext(request, connection)
        try:
            response = self.check(context)
            if not response:
                await connection.read_body(request)
                context.query = self.parse_query(context)
                response = await context.route.handler(self, context)
        except Error as error:
            self.server.refusals.add(
                f"{context.log_name}: {error.status} {error.message}")
            response = error_response(error, {
                401: (("WWW-Authenticate", "Bearer"),),
                405: (("Allow", error.hint),)}.get(error.status, ()))
        except ConnectionClosed:
            raise
        except Exception as bug:
            self.server.refusals.report_bug(bug)
            response = error_response(Error(
                "a fault of the dashboard's", "its log says more", 500))
        finally:
            self.rules.uncount(context)
        response.headers += context.cors
        return response

    def check(self, context: RequestContext) -> Response | None:
        """Find the route of a request and check its head. Return the answer
        to OPTIONS (CORS preflight), else None. Raises Error."""
        request = context.request
        self.rules.check_host(request.headers.get("host", ""))
        routes, context.values = find_routes(request.path)
        if not routes:
            raise Error("there is nothing here", "", 404)
        self.rules.check_origin(context, next(iter(routes.values())))
        if request.method == "OPTIONS":
            return Response(204, headers=(
                ("Access-Control-Allow-Methods", "GET, POST, DELETE"),
                ("Access-Control-Allow-Headers",
                 "Authorization, Content-Type"),
                ("Access-Control-Max-Age", "600")))
        context.route = routes.get(
            "GET" if request.method == "HEAD" else request.method)
        if not context.route:
            raise Error(f"this is not for {request.method}",
                        ", ".join(routes), 405)
        self.rules.check_body(request, context.route)
        self.rules.count(context)
        if context.route.role != "anyone":
            self.rules.check_token(context, self.loop.time())
        return None

    def parse_query(self, context: RequestContext) -> dict:
        """Return the values of the fields that the route has. Raises
        Error."""
        wanted = context.route.query
        fields = parse_query(context.request.query) if wanted else {}
        return {name: parse(name, fields[name])
                for name, parse in wanted.items() if name in fields}

    def uses_https(self, context: RequestContext) -> bool:
        """Did the client use https, to us or to our proxy?"""
        return self.server.certificate is not None or (
            context.connection.network is None and context.request.headers.get(
                "x-forwarded-proto") == "https")

    # --- the database

    async def in_reader(self, function, *values):
        """Return what a function returns in a reader's thread. Raises what
        it raises, and Error (503) if too many questions wait."""
        if self.reads >= MOST_READS:
            raise Error("too many questions at once", "try again", 503)
        self.reads += 1
        try:
            try:
                future = self.loop.run_in_executor(self.readers, function,
                                                   *values)
            except RuntimeError:
                raise Error("this host lets us start no thread", "", 503
                            ) from None
            return await future
        finally:
            self.reads -= 1

    async def answer(self, question, *values,
                     encode=json_response) -> Response:
        """Return the answer to a question, which `encode` makes a Response.
        Raises Error."""
        return await self.in_reader(
            lambda: encode(self.dashboard.read(question, *values)))

    async def body_of(self, context: RequestContext) -> dict:
        """Return the JSON object in the request's body. Raises Error."""
        body, context.request.body = context.request.body, b""
        if len(body) < INLINE_BODY:
            return parse_body(body)
        return await self.in_reader(parse_body, body)

    async def write(self, operation, *values):
        """Have the writer's thread carry out an operation. Return its result
        when that is on the disk. Raises Error."""
        future = self.loop.create_future()

        def settle(result, error) -> None:
            if future.done():           # the client closed the connection
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(result)

        def done(result, error) -> None:
            try:
                self.loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:        # the loop has ended
                pass

        self.dashboard.write(operation, *values, then=done)
        return await future

    async def store(self, context: RequestContext, operation,
                    *values) -> dict:
        """Have an operation carried out with what an operator has sent."""
        fields = await self.body_of(context)
        return await self.write(operation, *values, fields,
                                self.clock.now())

    # --- news

    def end_polls(self, polls: dict, topic: tuple,
                  error: Error | None = None) -> None:
        """End those that wait for news about a topic."""
        for poll in list(polls.get(topic, ())):
            poll.end(error)

    def change_stream(self) -> ChangeStream:
        """Return the changes, which are kept from now on."""
        was_followed = self.is_followed()
        # First this: the writer may publish a change right now.
        self.changes.until = self.loop.time() + FEED_TIME
        if not was_followed:
            self.changes.clear(self.dashboard.seq)
        return self.changes

    def is_followed(self) -> bool:
        """Are changes wanted? Called in the writer's thread, too."""
        return self.loop.time() < self.changes.until

    def on_changes(self, changes: dict) -> None:
        """Hand on what was committed. Called in the writer's thread."""
        changes = dict(changes)
        topics = [*(("host", host) for host in changes.pop("wake", ())),
                  *(("run", run) for run in changes.pop("live", ()))]
        seq, line = changes.get("seq"), b""
        if changes.get("reset"):
            line = START_OVER
        elif len(changes) > 1:      # more than the number
            line = compact_json(changes).encode(
                "utf-8", "backslashreplace") + b"\n"
        try:
            self.loop.call_soon_threadsafe(self.dispatch_changes, seq, line,
                                           topics)
        except RuntimeError:            # the loop has ended
            pass

    def dispatch_changes(self, seq: int | None, line: bytes,
                         topics: list) -> None:
        """Wake those whom a change concerns."""
        for topic in topics:
            for poll in self.polls.get(topic, ()):
                poll.event.set()
        if not line:
            return
        if line is START_OVER:
            self.changes.clear(seq or self.dashboard.seq)
        elif seq > self.changes.newest:
            self.changes.add(seq, line)
        for poll in self.followers.get(("changes",), ()):
            poll.event.set()


# --- handlers: for everyone -----------------------------------------------


async def show_page(api: Api, context: RequestContext) -> Response:
    """GET /: the page."""
    headers = (("ETag", api.page_tag),
               ("Content-Security-Policy", api.page_policy))
    if context.request.headers.get("if-none-match") == api.page_tag:
        return Response(304, b"", HTML, headers)
    return Response(200, api.page, HTML, headers)


async def show_health(api: Api, _context: RequestContext) -> Response:
    """GET /healthz: OK, or 503 and why the database cannot be read."""
    try:
        return await api.answer(api.dashboard.health,
                                encode=lambda text: Response(
                                    body=text.encode()))
    except Exception as error:
        return Response(503, escape_controls(str(error)).encode())


async def show_metrics(api: Api, context: RequestContext) -> Response:
    """GET /metrics: for Prometheus, in its text format."""
    server = {
        "koi_http_connections": len(api.server.connections),
        "koi_http_long_polls": len(api.polls),
        "koi_certificate_expiry_timestamp_seconds":
            api.certificate_expires or None}
    return await api.answer(
        api.dashboard.overview.metrics, api.clock.now(), server,
        encode=lambda text: Response(200, text.encode(), EXPOSITION))


async def show_badge(api: Api, context: RequestContext) -> Response:
    """GET /badge/KEY/NAME: NAME.svg, or NAME.json for shields.io."""
    key, name = context.values
    name, _, kind = name.rpartition(".")
    if kind not in ("svg", "json"):
        raise Error("there is nothing here", "NAME.svg, NAME.json", 404)

    def encode(badge: dict) -> Response:
        headers = (("Cache-Control", "no-cache"),
                   ("Content-Security-Policy", "default-src 'none'"))
        if kind == "json":
            return json_response({"schemaVersion": 1, **badge}, 200, headers)
        return Response(200, badge_svg(
            badge["label"], badge["message"], badge["color"]),
            "image/svg+xml", headers)

    return await api.answer(api.dashboard.overview.badge, key, name,
                            api.clock.now(), encode=encode)


async def show_salt(api: Api, _context: RequestContext) -> Response:
    """GET /api/v1/salt: what a passphrase becomes keys with."""
    return await api.answer(api.dashboard.credentials.salt)


async def create_dashboard(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/dashboards: the only one, from this machine."""
    throttle, now = api.rules.throttle, api.loop.time()
    wait = throttle.wait(context.network, now)
    if wait:
        raise TooManyRequests("too many at once", wait)
    throttle.add_miss(context.network, now)
    if not is_loopback(context.address):
        raise Error("a dashboard is created on its own machine",
                    "koitab -d new, in a shell there", 403)
    credentials = api.dashboard.credentials
    return json_response(await api.write(
        credentials.create, await api.body_of(context), api.clock.now()), 201)


async def receive_ping(api: Api, context: RequestContext) -> Response:
    """GET, POST /ping/...: Healthchecks' pinging API."""
    request = context.request
    call = {"scheme": "https" if api.uses_https(context) else "http",
            "method": request.method, "ip": context.address,
            "ua": request.headers.get("user-agent", "")[:200],
            "rid": context.query.get("rid"),
            "create": context.query.get("create") == "1",
            "body": request.body[:PING_BODY_LIMIT]}
    status, text = await api.write(api.dashboard.checks.ping, *context.values,
                                   call, api.clock.now())
    return Response(status, text.encode(), headers=(
        ("Ping-Body-Limit", str(PING_BODY_LIMIT)),))


# --- handlers: for viewers ------------------------------------------------


def state_response(state: dict) -> Response:
    """Return the overview as JSON.

    Jobs are encoded one by one. json holds the interpreter's lock for a
    whole call, 0.5 s for 3,000 jobs, and nobody would be served meanwhile.
    """
    rows = ",".join(map(compact_json, state.pop("jobs")))
    return Response(200, f'{compact_json(state)[:-1]},"jobs":[{rows}]}}'
                    .encode("utf-8", "backslashreplace"), JSON)


async def show_state(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/state: all that the overview shows."""
    api.change_stream()     # no change after it is missed
    return await api.answer(api.dashboard.state, context.principal.role,
                            api.clock.now(), encode=state_response)


async def follow_changes(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/stream?since=SEQ: changes as lines of JSON, without end.
    An empty line is a sign of life for proxies."""
    stream, since = api.change_stream(), context.query.get("since", -1)
    if since > max(stream.newest, api.dashboard.seq):
        since = -1                  # from a database that was restored

    async def send_changes(send) -> None:
        seq = since
        with LongPoll(api.followers, ("changes",)) as poll:
            while not poll.ended:
                lines = stream.since(seq)
                seq = stream.newest if lines is START_OVER else max(
                    seq, stream.newest)
                stream.until = api.loop.time() + FEED_TIME
                await send(lines or b"\n")
                await poll.wait(HEARTBEAT)

    return Response(200, b"", NDJSON, (("X-Accel-Buffering", "no"),),
                    send_changes)


async def show_host_list(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/hosts/HOST/list: the jobs of a host as it signed them."""
    return await api.answer(api.dashboard.hosts.signed_list,
                            *context.values)


async def list_runs(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/jobs/JOB/runs: a page of runs, newest first."""
    return await api.answer(
        api.dashboard.runs.page, context.values[0],
        context.query.get("before"),
        min(context.query.get("limit") or 100, MOST_ROWS))


async def show_run(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/runs/RUN: a run and its job."""
    return await api.answer(api.dashboard.overview.run, context.values[0])


async def read_output(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/runs/RUN/output: frames from a byte on. With ?wait, if
    there are none yet, when there are or the time is over."""
    dashboard = api.dashboard
    run, query = context.values[0], context.query
    start = query.get("from") or 0
    size = query.get("len") or MOST_FRAMES
    wait = min(query.get("wait") or 0.0, LONGEST_FOLLOW)
    until = api.loop.time() + wait

    def read_part() -> tuple:
        dashboard.follow(run)
        return dashboard.read(dashboard.runs.output, run, start, size)

    with LongPoll(api.polls, ("run", run)) as poll:
        while True:
            data, total, live, begin = (
                *await api.in_reader(read_part), start)[:4]
            if data or not live or not wait or poll.ended \
                    or not await context.connection.run_until_closed(
                        poll.wait(until - api.loop.time())):
                break
    return Response(200, data, BYTES, (
        ("X-Koi-Size", str(total)), ("X-Koi-Live", str(int(live))),
        ("X-Koi-From", str(max(begin, start)))))


async def show_raw_output(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/runs/RUN/raw: the output as a text file."""
    run = context.values[0]
    disposition = f'attachment; filename="run-{run}.txt"'
    return await api.answer(
        api.dashboard.runs.text, run,
        encode=lambda data: Response(200, data, TEXT, (
            ("Content-Disposition", disposition),)))


async def search_outputs(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/search?q=TEXT: runs whose output has the text."""
    query = context.query
    text = query.get("q", "")
    if not text or len(text) > LONGEST_SEARCH or "\0" in text:
        raise Error("there is nothing to search for", "?q=TEXT", 400)
    return await api.answer(api.dashboard.search.find, text,
                            query.get("job"), query.get("before"))


async def show_day(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/day?from=T&to=T: what ran when, on all hosts."""
    begin, end = context.query.get("from"), context.query.get("to")
    if begin is None or end is None or not begin < end:
        raise Error("which day?", "?from=T&to=T", 400)
    return await api.answer(api.dashboard.overview.day, begin, end)


async def list_audit(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/audit: who requested what, newest first."""
    return await api.answer(api.dashboard.audit.page,
                            context.query.get("before"))


async def show_request(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/requests/NONCE: what became of a request."""
    return await api.answer(api.dashboard.requests.state, *context.values)


async def list_pings(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/checks/CHECK/pings: newest first."""
    return await api.answer(api.dashboard.checks.list_pings,
                            *context.values, context.query.get("before"))


async def show_ping_body(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/checks/CHECK/pings/N/body: what a ping has sent."""
    return await api.answer(
        api.dashboard.checks.ping_body, *context.values,
        encode=lambda data: Response(200, data, TEXT))


async def list_channels(api: Api, context: RequestContext) -> Response:
    """GET /api/v1/channels: where alerts go."""
    return await api.answer(api.dashboard.alerts.list_channels)


# --- handlers: for operators ----------------------------------------------


async def rotate_keys(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/rotate: new keys; streams have to come with them."""
    result = await api.store(context, api.dashboard.credentials.rotate)
    api.end_polls(api.followers, ("changes",))
    return json_response(result)


async def add_host(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/hosts: a host joins."""
    return json_response(
        await api.store(context, api.dashboard.hosts.join), 201)


async def remove_host(api: Api, context: RequestContext) -> Response:
    """DELETE /api/v1/hosts/HOST: by an operator or the host itself."""
    principal, host = context.principal, context.values[0]
    if principal.role == "host" and principal.host != host:
        raise Error("this is another host", "", 403)
    result = await api.write(api.dashboard.hosts.leave, host,
                             api.clock.now())
    api.end_polls(api.polls, ("host", host),
                  Error("this host was removed", "", 401))
    return json_response(result)


async def create_request(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/requests: a signed request for a host."""
    result = await api.store(context, api.dashboard.requests.create)
    return json_response({"nonce": result["nonce"],
                          "state": result["state"]}, 202)


async def snooze_alert(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/snooze: no alert about a subject until a time."""
    return json_response(await api.store(context, api.dashboard.rules.snooze))


async def add_check(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/checks: a check that expects pings."""
    return json_response(
        await api.store(context, api.dashboard.checks.create), 201)


async def change_check(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/checks/CHECK: pause, resume, change or delete it."""
    return json_response(await api.store(
        context, api.dashboard.checks.change, *context.values))


async def change_channel(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/channels: add, test or delete one."""
    return json_response(
        await api.store(context, api.dashboard.alerts.change_channel))


async def forget_subject(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/forget: remove what is kept of a job or a host."""
    return json_response(
        await api.store(context, api.dashboard.retention.delete))


# --- handlers: for hosts --------------------------------------------------


async def sync(api: Api, context: RequestContext) -> Response:
    """POST /api/v1/sync: store what a host sends; answer what there is for
    it, at once or, with "wait": SECONDS, when there is something."""
    fields, principal = await api.body_of(context), context.principal
    wait = fields.get("wait")
    wait = min(wait, LONGEST_POLL) if isinstance(wait, (int, float)) else 0
    if any(fields.get(name) for name in SENT):
        wait = 0
    until, topic = api.loop.time() + wait, ("host", principal.host)
    api.end_polls(api.polls, topic)     # of a connection that broke
    with LongPoll(api.polls, topic) as poll:
        reply = await api.write(api.dashboard.host_sync.sync, principal.host,
                                fields, api.clock.now())
        while wait > 0 and not poll.ended and not has_news(
                reply, context.connection) and \
                await context.connection.run_until_closed(
                    poll.wait(until - api.loop.time())):
            reply.update(await api.write(api.dashboard.requests.waiting,
                                         principal.host, api.clock.now()))
    context.connection.demanded = demands_of(reply)
    return json_response(reply)


def demands_of(reply: dict) -> tuple:
    """Return what a sync answer demands of the host."""
    return (frozenset(reply.get("live", ())), reply.get("want_list", False),
            reply.get("missing_output", []))


def has_news(reply: dict, connection: HttpConnection) -> bool:
    """Must a sync be answered now? A demand that was sent before and was not
    met is no news: the host would ask again at once, forever."""
    return bool(reply.get("requests")) or demands_of(reply) != (
        connection.demanded or demands_of({}))


# --- all routes -----------------------------------------------------------

BEFORE = {"before": number_field}
OUTPUT_QUERY = {"from": number_field, "len": number_field, "wait": time_field}
PING_QUERY = {"rid": text_field, "create": text_field}

ROUTES = [Route(*row) for row in (
    ("GET", "/", "anyone", show_page),
    ("GET", "/healthz", "anyone", show_health, {}, SMALL_BODY, True),
    ("GET", "/metrics", "viewer", show_metrics),
    ("GET", "/badge/KEY/NAME", "anyone", show_badge, {}, SMALL_BODY, True),
    ("GET", "/api/v1/salt", "anyone", show_salt),
    ("POST", "/api/v1/dashboards", "anyone", create_dashboard),
    ("POST", "/api/v1/rotate", "operator", rotate_keys),
    ("POST", "/api/v1/hosts", "operator", add_host),
    ("DELETE", "/api/v1/hosts/HOST", "host or operator", remove_host),
    ("GET", "/api/v1/hosts/HOST/list", "viewer", show_host_list),
    ("POST", "/api/v1/sync", "host", sync, {}, SYNC_BODY),
    ("GET", "/api/v1/state", "viewer", show_state),
    ("GET", "/api/v1/stream", "viewer", follow_changes,
     {"since": number_field}),
    ("GET", "/api/v1/jobs/JOB/runs", "viewer", list_runs,
     {**BEFORE, "limit": number_field}),
    ("GET", "/api/v1/runs/RUN", "viewer", show_run),
    ("GET", "/api/v1/runs/RUN/output", "viewer", read_output,
     OUTPUT_QUERY),
    ("GET", "/api/v1/runs/RUN/raw", "viewer", show_raw_output),
    ("GET", "/api/v1/search", "viewer", search_outputs,
     {**BEFORE, "q": text_field, "job": number_field}),
    ("GET", "/api/v1/day", "viewer", show_day,
     {"from": time_field, "to": time_field}),
    ("GET", "/api/v1/audit", "viewer", list_audit,
     {"before": time_field}),
    ("POST", "/api/v1/requests", "operator", create_request, {},
     REQUEST_BODY),
    ("GET", "/api/v1/requests/NONCE", "viewer", show_request),
    ("POST", "/api/v1/snooze", "operator", snooze_alert),
    ("POST", "/api/v1/checks", "operator", add_check),
    ("POST", "/api/v1/checks/CHECK", "operator", change_check),
    ("GET", "/api/v1/checks/CHECK/pings", "viewer", list_pings, BEFORE),
    ("GET", "/api/v1/checks/CHECK/pings/N/body", "viewer", show_ping_body),
    ("GET", "/api/v1/channels", "viewer", list_channels),
    ("POST", "/api/v1/channels", "operator", change_channel),
    ("POST", "/api/v1/forget", "operator", forget_subject))]
# The paths of pings are not in the table: see match_ping.
PING_ROUTES = {method: Route(method, "PING", "anyone", receive_ping,
                             PING_QUERY, PING_BODY, True)
               for method in ("GET", "POST")}


def find_routes(path: str) -> tuple[dict, tuple]:
    """Return the routes of a path by method, and the values in the path;
    ({}, ()) if there are none."""
    parts, routes, values = path.split("/"), {}, ()
    for route in ROUTES:
        found = match_path(route.path.split("/"), parts)
        if found is not None:
            routes[route.method], values = route, found
    if routes:
        return routes, values
    ping = match_ping(path)
    return (PING_ROUTES, ping) if ping else ({}, ())


# --- the page's policy, badges --------------------------------------------


def page_policy_of(text: str) -> str:
    """Return the Content-Security-Policy under which a page runs nothing
    but the scripts and styles in its text."""
    import re
    from base64 import b64encode
    from hashlib import sha256

    def hashes(tag: str) -> str:
        digests = (sha256(inner.encode()).digest() for inner in re.findall(
            rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.S))
        return " ".join(f"'sha256-{b64encode(digest).decode()}'"
                        for digest in digests) or "'none'"

    return PAGE_POLICY.format(script=hashes("script"), style=hashes("style"))


# The names that shields.io has for colours.
COLOURS = {"brightgreen": "#2e7d32", "green": "#2e7d32", "red": "#c62828",
           "orange": "#b25000", "yellow": "#8a6d00", "blue": "#1565c0"}
CHARACTER_WIDTH = 6.6   # pixels, of Verdana at 11 px, on the average


def badge_svg(label: str, message: str, colour: str) -> bytes:
    """Return a badge as an SVG picture."""
    from html import escape
    label, message = label[:60], message[:60]
    left, right = (int(len(text) * CHARACTER_WIDTH) + 12
                   for text in (label, message))
    fill = COLOURS.get(colour, "#616161")
    text = "".join(
        f'<text x="{x}" y="14" textLength="{width - 12}">{escape(shown)}'
        "</text>" for x, width, shown in (
            (6, left, label), (left + 6, right, message)))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" '
            f'height="20" role="img" aria-label="{escape(label)}: '
            f'{escape(message)}"><rect width="{left}" height="20" fill="#444"'
            f'/><rect x="{left}" width="{right}" height="20" fill="{fill}"/>'
            '<g fill="#fff" font-family="Verdana,sans-serif" font-size="11">'
            f"{text}</g></svg>").encode("utf-8", "backslashreplace")


# ==========================================================================
# Page: what does the browser run?                            (nothing; U C)
#
# One constant page: the server puts nothing into it, and it loads nothing from
# elsewhere. How its script works is explained at the head of PAGE_JS.
# ==========================================================================

PAGE_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<meta name="koi-server" content="">
<title>koi</title>
<link rel="icon" href="data:,">
<style>/* PAGE_CSS */</style>
</head>
<body>
<noscript>This page needs JavaScript: it makes the keys, and signs, in the
browser. `koitab status`, `history` and `log` show the same in a
terminal.</noscript>
<div id="plain-http" role="note" hidden></div>
<div id="problems" role="status" hidden></div>
<header id="top"></header>
<main id="main" tabindex="-1"></main>
<div id="announcer" class="away" aria-live="polite"></div>
<div id="toast" role="status"></div>
<div id="tip" role="tooltip" hidden></div>
<dialog id="shortcuts" aria-label="Keys"></dialog>
<script>/* PAGE_JS */</script>
</body>
</html>
"""

PAGE_CSS = r"""
/* Colours: one ink, one line, one accent; state has the only others. */
:root {
  color-scheme: light;
  --paper: #f7f7f5; --card: #fff; --ink: #1d2126; --soft: #5a636e;
  --line: #e3e4e1; --hover: #f0f1ee; --press: #e6e8e4; --accent: #1f5fbf;
  --on-accent: #fff; --ok: #2a7f4c; --bad: #c4281f; --late: #9a5b00;
  --run: #1f6fd0; --quiet: #6b7480; --bad-bg: #fdf1f0; --bad-line: #f3cfcc;
  --mark: #ffe9a8; --here: #fff4d1; --b-ok: #7dbb94; --b-bad: #d5453c;
  --b-odd: #c98a1b; --b-skip: #bfc5ca; --b-run: #3b82db; --koi: #e4572e;
  --log: #fcfcfb; --log-ink: #24292f; --add: #e2f3e6; --del: #fbe6e4;
  --f0: #24292f; --f1: #c4281f; --f2: #1f7a3f; --f3: #8a5a00; --f4: #1f5fbf;
  --f5: #8e3aa8; --f6: #0b7285; --f7: #6b7480; --f8: #59636e; --f9: #d0342a;
  --f10: #2a7f4c; --f11: #9a5b00; --f12: #2f6fd6; --f13: #a347bd;
  --f14: #127a8d; --f15: #3b424a;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas,
    "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-theme="light"]) {
    color-scheme: dark;
    --paper: #131619; --card: #1a1e22; --ink: #e3e6e9; --soft: #9aa5b0;
    --line: #2a3036; --hover: #20252a; --press: #2a3037; --accent: #7fb0f5;
    --on-accent: #0e1420; --ok: #6cc48c; --bad: #ff8178; --late: #e7b057;
    --run: #7fb0f5; --quiet: #8f9aa5; --bad-bg: #261a1b; --bad-line: #4a2b2b;
    --mark: #5c4a12; --here: #33301f; --b-ok: #3f7d58; --b-bad: #e5645b;
    --b-odd: #d09a3e; --b-skip: #4a535c; --b-run: #5a9bf0; --koi: #f0704a;
    --log: #15181c; --log-ink: #d9dde1; --add: #17301f; --del: #3a1f20;
    --f0: #7d8791; --f1: #ff8178; --f2: #6cc48c; --f3: #e7b057;
    --f4: #7fb0f5; --f5: #d29bee; --f6: #63c7d8; --f7: #c6ccd2;
    --f8: #8f9aa5; --f9: #ff9c94; --f10: #8ad8a5; --f11: #f3c87c;
    --f12: #a4c8fa; --f13: #e2bbf5; --f14: #8fdbe7; --f15: #fff;
  }
}
/* The same again, for people who chose dark. */
:root[data-theme="dark"] {
  color-scheme: dark;
  --paper: #131619; --card: #1a1e22; --ink: #e3e6e9; --soft: #9aa5b0;
  --line: #2a3036; --hover: #20252a; --press: #2a3037; --accent: #7fb0f5;
  --on-accent: #0e1420; --ok: #6cc48c; --bad: #ff8178; --late: #e7b057;
  --run: #7fb0f5; --quiet: #8f9aa5; --bad-bg: #261a1b; --bad-line: #4a2b2b;
  --mark: #5c4a12; --here: #33301f; --b-ok: #3f7d58; --b-bad: #e5645b;
  --b-odd: #d09a3e; --b-skip: #4a535c; --b-run: #5a9bf0; --koi: #f0704a;
  --log: #15181c; --log-ink: #d9dde1; --add: #17301f; --del: #3a1f20;
  --f0: #7d8791; --f1: #ff8178; --f2: #6cc48c; --f3: #e7b057;
  --f4: #7fb0f5; --f5: #d29bee; --f6: #63c7d8; --f7: #c6ccd2;
  --f8: #8f9aa5; --f9: #ff9c94; --f10: #8ad8a5; --f11: #f3c87c;
  --f12: #a4c8fa; --f13: #e2bbf5; --f14: #8fdbe7; --f15: #fff;
}

/* The ground */
*, ::before, ::after { box-sizing: border-box; }
html { scrollbar-gutter: stable; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.45 var(--sans); -webkit-text-size-adjust: 100%;
}
[hidden] { display: none !important; }
h1, h2, h3, p, dl, dd, ol, ul, pre { margin: 0; }
ol, ul { padding: 0; list-style: none; }
h1 { font-size: 20px; line-height: 1.3; font-weight: 620; }
h2 { font-size: 14px; font-weight: 620; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre, kbd, .num { font-family: var(--mono); font-size: 12.5px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#main:focus { outline: none; }
.muted { color: var(--soft); font-weight: 400; }
.num { font-variant-numeric: tabular-nums; }
.late { color: var(--late); }
.error { color: var(--bad); display: block; }
.away {
  position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap;
}
.grow { flex: 1; }
.scroll { overflow-x: auto; }
#main { max-width: 1560px; margin: 0 auto; padding: 16px 20px 64px; }
.view > * + * { margin-top: 14px; }
.view > .away + * { margin-top: 0; }
.narrow { max-width: 720px; }

/* Buttons and fields */
.btn {
  display: inline-flex; align-items: center; gap: 6px; min-height: 28px;
  padding: 3px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--ink); font: inherit;
  font-size: 13px; line-height: 1.3; cursor: pointer; white-space: nowrap;
}
.btn:hover { background: var(--hover); text-decoration: none; }
.btn:active { background: var(--press); }
.btn:disabled { opacity: .6; cursor: default; }
.btn.primary {
  background: var(--accent); border-color: var(--accent);
  color: var(--on-accent); font-weight: 600;
}
.btn.primary:hover { filter: brightness(1.08); }
.btn > .roomy { margin-left: -2px; }
.btn.danger { color: var(--bad); }
.btn.quiet { border-color: transparent; background: none; }
.btn.quiet:hover { background: var(--hover); }
.btn.run { color: var(--accent); font-weight: 600; }
.toggle[aria-pressed="true"] {
  background: var(--press); border-color: var(--soft);
}
input:not([type=checkbox]), select, textarea {
  min-height: 32px; padding: 4px 9px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); color: var(--ink);
  font: inherit; max-width: 100%;
}
input::placeholder { color: var(--soft); opacity: 1; }
input[type=checkbox] {
  width: 16px; height: 16px; margin: 0; accent-color: var(--accent);
}
[aria-invalid="true"] { border-color: var(--bad) !important; }
progress { width: 100%; height: 6px; accent-color: var(--accent); }
.icon {
  width: 15px; height: 15px; flex: none; fill: none; stroke: currentColor;
  stroke-width: 1.7; stroke-linecap: round; stroke-linejoin: round;
}
.icon .solid { fill: currentColor; stroke: none; }
.icon .cut { stroke: var(--card); stroke-width: 1.8; }

/* States: a shape, a colour and a word */
.state { display: inline-flex; align-items: center; gap: 6px;
  white-space: nowrap; }
.s-ok .icon, .s-ok > .icon { color: var(--ok); }
.s-failed { color: var(--bad); font-weight: 600; }
.s-late, .s-missed { color: var(--late); font-weight: 600; }
.s-running { color: var(--run); }
.s-unknown, .s-skipped, .s-new, .s-paused { color: var(--soft); }
h1 .icon { width: 20px; height: 20px; }
h1.s-failed, h1.s-late, h1.s-missed, h1.s-running { font-weight: 620; }
@media (prefers-reduced-motion: no-preference) {
  .s-running .icon { animation: turn 1.6s linear infinite; }
}
@keyframes turn { to { transform: rotate(1turn); } }

/* The bar at the top */
#plain-http, #problems {
  padding: 8px 20px; background: var(--bad-bg); color: var(--bad);
  border-bottom: 1px solid var(--bad-line);
}
#top { display: none; }
.open #top {
  position: sticky; top: 0; z-index: 5; display: flex; gap: 4px 8px;
  align-items: center; padding: 7px 20px; background: var(--card);
  border-bottom: 1px solid var(--line);
}
.brand {
  display: inline-flex; align-items: center; gap: 5px; font-size: 17px;
  font-weight: 700; color: var(--ink); letter-spacing: -.01em;
}
.brand:hover { text-decoration: none; }
.fish { width: 22px; height: 22px; fill: var(--koi);
  transform: rotate(35deg); }
.fish .spot { fill: var(--card); opacity: .85; }
#top nav { display: flex; margin: 0 6px; gap: 2px; }
#top nav a { padding: 5px 9px; border-radius: 6px; color: var(--soft); }
#top nav a:hover { background: var(--hover); text-decoration: none; }
#top nav a[aria-current] { color: var(--ink); font-weight: 600; }
.count:not(:empty) {
  margin-left: 5px; padding: 0 6px; border-radius: 9px; font-size: 11.5px;
  background: var(--bad); color: var(--card); font-weight: 600;
}
#find { position: relative; flex: 0 1 260px; margin-left: auto; }
#find input { width: 100%; padding-left: 30px; background: var(--paper); }
#find .icon { position: absolute; left: 9px; top: 9px;
  color: var(--soft); }
#connection { display: inline-flex; gap: 6px; align-items: center;
  color: var(--soft); font-size: 12.5px; margin: 0 4px; }
#connection i { width: 8px; height: 8px; border-radius: 50%;
  background: var(--quiet); }
#connection[data-kind="live"] i { background: var(--ok); }
#connection[data-kind="away"] { color: var(--late); }
#connection[data-kind="away"] i { background: none;
  border: 2px solid var(--late); }
.zone { font-weight: 400; }
.zone select { border-color: transparent; background: none;
  color: var(--soft); font-size: 13px; }
.zone select:hover { background: var(--hover); }
.help span { font-weight: 600; min-width: 8px; }

/* Jobs */
.toolbar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.toolbar input { width: 220px; }
.chips { display: flex; gap: 4px; flex-wrap: wrap; }
.chip { border-radius: 15px; color: var(--soft); border-color: transparent;
  background: none; }
.chip b { font-weight: 600; font-variant-numeric: tabular-nums; }
.chip[aria-pressed="true"] { background: var(--press); color: var(--ink); }
.group + .group { margin-top: 14px; }
.group { content-visibility: auto; contain-intrinsic-size: auto 300px; }
.head > div { display: flex; align-items: baseline; gap: 10px;
  padding: 0 12px 5px; }
.head h2 { font-size: 15px; }
.head h2 .muted { font-size: 13px; margin-left: 8px; }
.head h3 { font-size: 13px; font-weight: 500; color: var(--soft); }
.head .btn { margin-left: auto; }
.hoststate { display: inline-flex; align-items: center; gap: 5px;
  margin-left: 10px; font-size: 13px; font-weight: 500;
  color: var(--late); }
.hoststate .icon { align-self: center; }
.hint { padding: 10px 12px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
.row {
  display: grid; column-gap: 14px; align-items: center; min-height: 38px;
  padding: 3px 12px; background: var(--card); border: 1px solid var(--line);
  border-top-width: 0;
  grid-template-columns: 90px minmax(130px, 1.3fr) minmax(110px, 1fr) 172px
    270px 60px 92px 68px;
}
.head + .row { border-top-width: 1px; border-radius: 8px 8px 0 0; }
.row:last-child { border-radius: 0 0 8px 8px; }
.head + .row:last-child { border-radius: 8px; }
.row:hover { background: var(--hover); }
.row:focus-within { box-shadow: inset 3px 0 0 var(--accent); }
.row > div { min-width: 0; }
.c-name { display: flex; gap: 8px; align-items: baseline; }
.c-name a { color: var(--ink); font-weight: 550; overflow: hidden;
  flex-shrink: 0; max-width: 100%;
  text-overflow: ellipsis; white-space: nowrap; }
.c-name .muted { font-size: 12.5px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; flex-shrink: 3; min-width: 0; }
.c-words { color: var(--soft); font-size: 13px; overflow: hidden;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  line-height: 1.25; }
.c-last { display: flex; gap: 8px; align-items: baseline;
  white-space: nowrap; font-size: 13px; }
.c-last a { color: var(--ink); }
.c-last .exit { color: var(--bad); font-weight: 600; }
.c-next { font-size: 13px; white-space: nowrap; }
.c-act { text-align: right; }
.c-act .btn { min-height: 26px; }
.c-history, .c-spark { line-height: 0; }
.attention .row { box-shadow: inset 3px 0 0 var(--b-bad); }
.attention .row:focus-within { box-shadow: inset 3px 0 0 var(--accent); }
.attention .row .state { font-weight: 600; }
.why {
  grid-column: 2 / -1; display: flex; flex-wrap: wrap; align-items: center;
  gap: 4px 12px; padding: 0 0 7px; font-size: 13px;
}
.why pre {
  flex: 1 1 240px; padding: 4px 8px; border-radius: 5px; overflow: hidden;
  background: var(--bad-bg); white-space: nowrap; text-overflow: ellipsis;
}
.row-actions { display: inline-flex; gap: 6px; flex-wrap: wrap; }
.why .row-actions { margin-left: auto; }
.why .btn { min-height: 26px; padding: 2px 9px; }

/* History bars, sparklines, days */
.bars { display: block; cursor: pointer; overflow: visible;
  border-radius: 2px; }
.b-ok { fill: var(--b-ok); } .b-bad { fill: var(--b-bad); }
.b-odd { fill: var(--b-odd); } .b-skip { fill: var(--b-skip); }
.b-run { fill: var(--b-run); }
.b-hollow { fill: none; stroke: var(--b-odd); stroke-width: 1.3; }
.b-wait { fill: none; stroke: var(--b-run); }
.spark rect { fill: var(--press); }
.spark path { fill: none; stroke: var(--soft); stroke-width: 1.2; }
.spark circle { fill: var(--ink); }
#tip {
  position: fixed; z-index: 9; transform: translateX(-50%);
  padding: 4px 9px; border-radius: 6px; background: var(--ink);
  color: var(--paper); font-size: 12.5px; pointer-events: none;
  white-space: nowrap;
}
.day { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 6px 0 10px; }
.day h2 { padding: 12px 12px 4px; }
.dayrow { display: grid; grid-template-columns: 200px 1fr;
  align-items: center; min-height: 26px; }
.dayrow > a { padding: 0 8px 0 12px; overflow: hidden; font-size: 13px;
  text-overflow: ellipsis; white-space: nowrap; color: var(--ink); }
.dayrow:hover { background: var(--hover); }
.axis { position: sticky; top: 47px; background: var(--card); z-index: 1; }
.axis:hover { background: var(--card); }
.axis text { fill: var(--soft); font-size: 11.5px; }
.hour { stroke: var(--line); fill: none; }
.now { stroke: var(--koi); stroke-width: 1.5; fill: none; }
.tick { fill: none; stroke: var(--soft); stroke-width: 1.3; }

/* One job, one run */
.crumbs { color: var(--soft); font-size: 13px; }
.title-row { display: flex; gap: 8px 16px; align-items: center;
  flex-wrap: wrap; justify-content: space-between;
  margin-top: 2px !important; }
.title-row h1 { display: flex; align-items: center; gap: 9px;
  overflow-wrap: anywhere; min-width: 0; }
.actions { display: flex; gap: 6px; flex-wrap: wrap; align-items: center; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 28px;
  margin-top: 12px; }
.facts dt { font-size: 12px; color: var(--soft); }
.facts dd { min-height: 21px; }
.args { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 10px; }
.args div { display: flex; gap: 8px; align-items: baseline;
  min-width: 0; }
.args dt { color: var(--soft); }
.args dd { overflow-wrap: anywhere; min-width: 0; }
.command { padding: 9px 12px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); margin-top: 10px;
  max-height: 260px; overflow: auto; }
.wide { margin-top: 14px; }
.view.run { display: grid; grid-template-columns: minmax(0, 1fr);
  gap: 0 24px; }
.view.run > * { margin: 0; }
.runmain { display: flex; flex-direction: column; gap: 12px; min-width: 0;
  min-height: max(560px, calc(100vh - 79px)); }
#main:has(> .view.run) { padding-bottom: 16px; }
aside.runs { display: none; }
@media (min-width: 1100px) {
  .view.run { grid-template-columns: 232px minmax(0, 1fr); }
  aside.runs:not(:empty) { display: flex; flex-direction: column;
    gap: 8px; position: sticky; top: 60px; align-self: start;
    max-height: calc(100vh - 76px); }
  .view.run:not(:has(aside.runs:not(:empty))) > .runmain {
    grid-column: 1 / -1; }
}
aside.runs .btn { justify-content: center; }
.runmain > div:empty { display: none; }
aside.runs ol { overflow-y: auto; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); }
aside.runs li + li { border-top: 1px solid var(--line); }
aside.runs a { display: flex; gap: 8px; padding: 5px 10px;
  align-items: center; font-size: 13px; color: var(--ink);
  white-space: nowrap; }
aside.runs a .muted { margin-left: auto; font-size: 12.5px; }
aside.runs a:hover { background: var(--hover); text-decoration: none; }
aside.runs a[aria-current] { background: var(--press); font-weight: 600; }

/* Output */
.output { position: relative; flex: 1; display: flex;
  flex-direction: column; border: 1px solid var(--line);
  border-radius: 8px; background: var(--log); overflow: hidden; }
.bar { display: flex; flex-wrap: wrap; gap: 6px; align-items: center;
  padding: 6px 8px; background: var(--card);
  border-bottom: 1px solid var(--line); }
.bar input[type=search] { min-height: 28px; width: 170px; }
.finding { display: inline-flex; align-items: center; gap: 4px; }
.finding .btn { padding: 3px 5px; }
.found { font-size: 12.5px; min-width: 0; }
.pane { flex: 1 1 320px; min-height: 0; overflow: auto;
  color: var(--log-ink); font: 12.5px/18px var(--mono); tab-size: 8;
  padding: 4px 0; overscroll-behavior: contain; }
.pane:focus-visible { outline-offset: -2px; }
.sheet { min-width: max-content; }
.wrap .sheet { min-width: 0; }
.block { contain: layout style; }
.line { display: flex; min-height: 18px; border-left: 3px solid
  transparent; }
.line.has-err { border-left-color: var(--b-bad); }
.only-err .line:not(.has-err):not(.koi-note) { display: none; }
.number { flex: none; width: calc(var(--digits) + 24px); text-align: right;
  padding-right: 14px;
  color: var(--quiet); user-select: none; }
.number::before { content: attr(data-n); }
.time { flex: none; padding-right: 14px; min-width: 84px; text-align: right;
  color: var(--quiet); user-select: none; }
.time::before { content: attr(data-since); }
[data-times="clock"] .time::before { content: attr(data-clock); }
[data-times="off"] .time { display: none; }
.text { white-space: pre; padding-right: 16px; unicode-bidi: isolate; }
.wrap .text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.line.koi-note { color: var(--soft); font-style: italic;
  padding-left: calc(var(--digits) + 24px); }
.line.koi-note .number { display: none; }
.line.match { background: var(--mark); }
.line.here { background: var(--here); box-shadow: inset 3px 0 0
  var(--accent); }
.line.match.here { background: var(--mark); }
.newer { position: absolute; bottom: 14px; left: 50%;
  transform: translateX(-50%); box-shadow: 0 2px 10px #0003; }
.output.bare { flex: none; }
.nothing { padding: 28px; color: var(--soft); text-align: center; }
.bold { font-weight: 700; } .dim { opacity: .75; }
.italic { font-style: italic; } .under { text-decoration: underline; }
.strike { text-decoration: line-through; }
.under.strike { text-decoration: underline line-through; }
.control { color: var(--late); }
.f0 { color: var(--f0); } .g0 { background: var(--f0); }
.f1 { color: var(--f1); } .g1 { background: var(--f1); }
.f2 { color: var(--f2); } .g2 { background: var(--f2); }
.f3 { color: var(--f3); } .g3 { background: var(--f3); }
.f4 { color: var(--f4); } .g4 { background: var(--f4); }
.f5 { color: var(--f5); } .g5 { background: var(--f5); }
.f6 { color: var(--f6); } .g6 { background: var(--f6); }
.f7 { color: var(--f7); } .g7 { background: var(--f7); }
.f8 { color: var(--f8); } .g8 { background: var(--f8); }
.f9 { color: var(--f9); } .g9 { background: var(--f9); }
.f10 { color: var(--f10); } .g10 { background: var(--f10); }
.f11 { color: var(--f11); } .g11 { background: var(--f11); }
.f12 { color: var(--f12); } .g12 { background: var(--f12); }
.f13 { color: var(--f13); } .g13 { background: var(--f13); }
.f14 { color: var(--f14); } .g14 { background: var(--f14); }
.f15 { color: var(--f15); } .g15 { background: var(--f15); }
.fpaper { color: var(--log); } .gtext { background: var(--log-ink); }
.ftext { color: var(--log-ink); } .gpaper { background: var(--log); }
:is(.g0, .g1, .g2, .g3, .g4, .g5, .g6, .g7, .g8, .g9, .g10, .g11, .g12,
  .g13, .g14, .g15):not([class*="f"]) { color: var(--log); }
.diff { border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; background: var(--card); }
.diff .bar { gap: 12px; padding: 6px 12px; }
.difflines { font: 12.5px/18px var(--mono); overflow: auto;
  max-height: 45vh; padding: 4px 0; }
.difflines > div { padding: 0 12px; white-space: pre; min-width:
  max-content; }
.difflines .new { background: var(--add); }
.difflines .removed { background: var(--del); }
.difflines .fold { color: var(--soft); font-family: var(--sans); }
.sign { display: inline-block; width: 18px; color: var(--soft); }
.check { display: inline-flex; gap: 7px; align-items: center; }

/* Cards, forms, lists */
.card, .empty { padding: 16px 18px; border: 1px solid var(--line);
  border-radius: 10px; background: var(--card); }
.empty { padding: 32px 20px; text-align: center; }
.empty > * + * { margin-top: 10px; }
.empty h2 { font-size: 16px; }
.empty .snippet { max-width: 560px; margin-left: auto; margin-right: auto;
  text-align: left; }
.login { width: 100%; max-width: 380px; margin: 11vh auto 0; display: flex;
  flex-direction: column; gap: 8px; padding: 26px; }
.login h1 { display: flex; align-items: center; gap: 7px; font-size: 24px;
  margin-bottom: 8px; }
.login .fish { width: 30px; height: 30px; }
.login .primary { margin-top: 6px; }
.login .btn { justify-content: center; min-height: 36px; }
.login input { min-height: 36px; }
.login .muted { font-size: 13px; margin-top: 6px; }
.login .error:empty { display: none; }
label, .label { font-weight: 600; font-size: 13px; }
.check label { font-weight: 500; font-size: 14px; }
.runform { display: flex; flex-direction: column; gap: 16px; }
.field { display: flex; flex-direction: column; gap: 4px; }
.field.check { flex-direction: row; }
.field > span { font-size: 13px; }
.field > span:empty { display: none; }
.field input:not([type=checkbox]), .field textarea { width: 100%; }
.field.is-int input, .field.is-date input { width: 220px; }
.field textarea { min-height: 92px; font-family: var(--mono);
  font-size: 13px; resize: vertical; }
.field select { align-self: flex-start; min-width: 220px; }
.pair { display: flex; gap: 6px; }
.pair input { width: 120px !important; }
.pair select { min-width: 0; }
.previewed .command { margin-top: 4px; }
.previewed mark { padding: 0 1px; }
.note { padding: 10px 13px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); }
.note.bad { border-color: var(--bad-line); background: var(--bad-bg); }
.note.bad, .note.bad b { color: var(--bad); }
.note.ok { color: var(--ok); }
.status:empty { display: none; }
.question { display: flex; gap: 8px 12px; flex-wrap: wrap;
  align-items: center; }
.runhead .question { margin-top: 12px; }
.snippet { display: flex; align-items: flex-start; gap: 4px;
  border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); padding: 4px 4px 4px 12px; margin-top: 8px; }
.snippet pre { flex: 1; padding: 4px 0; min-width: 0; }
details > summary { cursor: pointer; color: var(--soft); }
details.card { margin-top: 14px; padding: 10px 14px; }
details.card > * + * { margin-top: 12px; }
details h3 { font-size: 13px; font-weight: 600; }
.part { margin-top: 26px !important; }
.part > * + *, .channels > * + * { margin-top: 8px; }
.part h2 { font-size: 15px; }
table.list { width: 100%; border-collapse: separate; border-spacing: 0;
  background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font-size: 13.5px; }
.list th { text-align: left; font-size: 12px; font-weight: 500;
  color: var(--soft); padding: 7px 12px; }
.list td { padding: 6px 12px; border-top: 1px solid var(--line);
  vertical-align: top; }
.list td:not(.message, .wraps) { white-space: nowrap; }
.list td.wraps { min-width: 140px; overflow-wrap: anywhere; }
.list td.message { width: 45%; min-width: 220px; overflow-wrap: anywhere;
  font: 12.5px/1.5 var(--mono); }
.list + .btn { margin-top: 10px; }
.alerts { border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
.alerts li { display: flex; flex-wrap: wrap; gap: 4px 14px;
  padding: 9px 14px; align-items: baseline; }
.alerts li + li { border-top: 1px solid var(--line); }
.alerts .state { min-width: 90px; align-self: flex-start;
  margin-top: 3px; }
.alerts .what { flex: 1; min-width: 220px; overflow-wrap: anywhere; }
.oneline { display: flex; gap: 6px; flex-wrap: wrap; }
.oneline input { flex: 1; min-width: 180px; max-width: 420px; }
.searchform { display: flex; gap: 8px; }
.searchform input { flex: 1; max-width: 560px; }
.matches { border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); overflow: hidden; }
.matches li + li { border-top: 1px solid var(--line); }
.matches a { display: block; padding: 8px 14px; color: var(--ink); }
.matches a:hover { background: var(--hover); text-decoration: none; }
.matches .what { display: flex; gap: 10px; align-items: center;
  flex-wrap: wrap; }
.matches pre { margin-top: 3px; }
.matches + .btn { margin-top: 10px; }
.shortcuts > div { display: flex; align-items: baseline; gap: 12px;
  padding: 3px 0; }
.shortcuts dt { min-width: 76px; display: flex; gap: 4px; }
kbd { border: 1px solid var(--line); border-bottom-width: 2px;
  border-radius: 4px; padding: 0 6px; background: var(--paper); }
dialog { border: 1px solid var(--line); border-radius: 12px; padding: 22px;
  background: var(--card); color: var(--ink); min-width: 320px; }
dialog::backdrop { background: #0006; }
dialog > * + * { margin-top: 12px; }
#toast { position: fixed; z-index: 8; left: 50%; bottom: 22px;
  transform: translate(-50%, 20px); padding: 8px 16px; border-radius: 8px;
  background: var(--ink); color: var(--paper); opacity: 0;
  pointer-events: none; max-width: calc(100vw - 32px);
  transition: opacity .15s, transform .15s; }
#toast.shown { opacity: 1; transform: translate(-50%, 0); }
#toast.bad { background: var(--bad); color: var(--card); }
@media (prefers-reduced-motion: reduce) {
  #toast { transition: none; }
}

/* Narrower: columns go, the order stays */
@media (min-width: 1480px) {
  .row { grid-template-columns: 96px minmax(160px, 1.3fr)
    minmax(150px, 1fr) 190px 360px 60px 100px 72px; }
}
@media (max-width: 1180px) {
  .row { grid-template-columns: 90px minmax(130px, 1fr) 172px 270px
    92px 68px; }
  .c-words, .c-spark { display: none; }
  .lock span, #connection span { display: none; }
}
@media (max-width: 940px) {
  .row { grid-template-columns: 90px minmax(110px, 1fr) 172px 270px 68px; }
  .c-next { display: none; }
  #top { flex-wrap: wrap; }
  #top nav { order: 9; flex-basis: 100%; overflow-x: auto; margin: 0; }
}
@media (max-width: 859px) {
  body { font-size: 15px; }
  #main { padding: 12px 12px 64px; }
  .open #top { padding: 6px 12px 2px; }
  #top nav a { padding: 6px 5px; white-space: nowrap; font-size: 14px; }
  #top nav { justify-content: space-between; scrollbar-width: none; }
  #find { flex: 1 1 90px; }
  .help, .zone, .roomy { display: none; }
  .toolbar input { flex: 1 1 140px; width: auto; }
  .btn { min-height: 34px; }
  .row { grid-template-columns: minmax(0, 1fr) auto; gap: 3px 10px;
    padding: 9px 12px; grid-template-areas: "name act" "is next"
      "last history"; }
  .c-is { grid-area: is; } .c-name { grid-area: name; }
  .c-last { grid-area: last; overflow: hidden; }
  .c-history { grid-area: history; }
  .c-next { grid-area: next; display: block; text-align: right; }
  .c-act { grid-area: act; }
  .c-name { flex-wrap: wrap; gap: 0 8px; }
  .why { grid-column: 1 / -1; padding: 4px 0 2px; }
  .why .row-actions { margin-left: 0; }
  .head > div { padding-left: 4px; flex-wrap: wrap; }
  .dayrow { grid-template-columns: 96px 1fr; }
  .axis { position: static; }
  .number { width: calc(var(--digits) + 10px); padding-right: 8px; }
  .list td, .list th { padding: 7px 8px; }
  .facts { gap: 8px 20px; }
  .bar .btn { padding: 3px 8px; }
  .login { margin-top: 5vh; padding: 20px; }
}
@media (max-width: 640px) {
  .list, .list tbody { display: block; }
  .list thead { display: none; }
  .list tr { display: flex; flex-wrap: wrap; gap: 2px 14px;
    padding: 9px 12px; }
  .list tr + tr { border-top: 1px solid var(--line); }
  .list td, .list td.message, .list td.wraps { padding: 0; border: 0;
    min-width: 0; width: auto; }
  .list td:empty { display: none; }
  .list td:not(.message, .wraps) { white-space: normal; }
  .list td[data-th]::before { content: attr(data-th) " "; font-size: 12px;
    color: var(--soft); }
  .list td .btn.quiet { padding-left: 0; }
  .list td.wraps, .list td.message { flex-basis: 100%; }
}
@media (max-width: 379px) {
  .row { grid-template-areas: "name act" "is next" "last last"
    "history history"; }
}
@media (forced-colors: active) {
  .bars path, .spark path { forced-color-adjust: none; }
  .row:focus-within { outline: 2px solid Highlight; }
  #connection i { forced-color-adjust: none; }
}
"""

PAGE_JS = r""""use strict";
// koi's page: one file, nothing comes from elsewhere.
//
// How it works. After the login the whole state of the dashboard (hosts, jobs,
// checks, alerts) is fetched once into `state`; from then on the change
// stream keeps it current (applyChange). The address names a view (#/jobs,
// #/run/7; see VIEWS). A view is a function that puts elements into its root
// and returns {title, update, leave, moved, shortcuts}. After each change
// `app` calls the view's update(changes), which draws again what differs.
// Nothing else writes to the document.
//
// The passphrase never leaves this tab: three keys are derived from it (see
// "keys"). `api` is the token of every request; `view` is the token of
// viewers; `run` signs what a host is to do. The dashboard cannot sign, so a
// host believes the page and not the dashboard, and a form shows the job list
// that the host signed (see "signed requests").
//
// What jobs, hosts and people wrote goes in as text nodes, never as markup. A
// policy of the browser (CSP, Trusted Types) enforces that.

// --- words that are shown in more than one place ---------------------------

const STATES = {    // state -> the word, and a rank: the worst first
  failed: ["failed", 0], down: ["down", 0], missed: ["missed", 1],
  late: ["late", 2], grace: ["late", 2], unknown: ["unknown", 4],
  running: ["running", 3], started: ["running", 3], skipped: ["skipped", 5],
  new: ["new", 6], paused: ["paused", 6], ok: ["ok", 7], up: ["ok", 7],
};
const BAD = new Set(["failed", "down", "missed", "late", "grace"]);

const OUTCOMES = {  // outcome code of a run -> its word
  o: "ok", f: "failed", k: "killed", m: "missed", s: "skipped",
  i: "interrupted", u: "could not start", r: "running", q: "queued",
};

const TRIGGERS = {
  schedule: "its schedule", manual: "a person", "catch-up": "catching up",
  retry: "a retry", reboot: "the machine's start", after: "the job before it",
};

const WORDS = {
  viewer: "A viewer's key can read, and nothing else.",
  otherKeys: "This host has other keys: type koitab -d join there.",
  noList: "This host has not shown its signed list of jobs yet.",
  plainHttp: "This page came over plain http: anyone on the way can change " +
    "it and take the password. Use TLS, an ssh tunnel, or the page that " +
    "\u201ckoitab page\u201d writes to a file.",
};

// --- elements, made from text only -----------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const $ = (css, root = document) => root.querySelector(css);
const isThere = (value) => value !== null && value !== undefined
  && value !== false;

// Sets attributes, listeners (on...), text, value and checked of a node.
function setAttributes(node, facts) {
  for (const [key, value] of Object.entries(facts || {})) {
    if (!isThere(value)) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else if (key === "value" || key === "checked") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  return node;
}

function fill(node, facts, inside) {
  setAttributes(node, facts).append(...inside.flat(3).filter(isThere));
  return node;
}

const el = (name, facts, ...inside) =>
  fill(document.createElement(name), facts, inside);
const svg = (name, facts, ...inside) =>
  fill(document.createElementNS(SVG, name), facts, inside);

const link = (href, text, facts) => el("a", { href, ...facts }, text);
const linkButton = (href, text, facts) => link(href, text,
  { class: "btn", ...facts });
const button = (text, onclick, facts) => el("button", {
  type: "button", class: "btn", onclick, ...facts }, text);
const code = (text) => el("code", { text });
const muted = (...inside) => el("span", { class: "muted" }, ...inside);
const mutedLine = (...inside) => el("p", { class: "muted" }, ...inside);

const ICONS = {     // drawn on 16 x 16; each state has a shape of its own
  ok: ["M3.5 8.6l3 3 6-7"], new: ["M8 5.2a2.8 2.8 0 1 0 .01 0z"],
  failed: ["F", "M8 .8a7.2 7.2 0 1 0 .01 0z", "M5.5 5.5l5 5m0-5l-5 5"],
  late: ["F", "M8 1.2L15.4 14.6H.6z", "M8 6v4m0 2v.2"],
  missed: ["M8 2a6 6 0 1 0 .01 0z", "M3.9 12.1l8.2-8.2"],
  running: ["M8 2a6 6 0 1 1-5.2 3"], skipped: ["M4 4l4 4-4 4M9 4l4 4-4 4"],
  unknown: ["M6 6.1a2.1 2.1 0 1 1 3 1.9c-.7.4-1 .8-1 1.6M8 12v.2"],
  paused: ["M6 4v8M10 4v8"],
  bell: ["M4 11V7.5a4 4 0 0 1 8 0V11l1 1.5H3zM7 14.5h2"],
  copy: ["M6 6h7v7H6zM3 10V3h7"], sun: ["M8 5a3 3 0 1 0 .01 0z",
    "M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1",
    "M3 13l1-1M12 4l1-1"],
  lock: ["M4 7.5h8V14H4zM5.5 7V5a2.5 2.5 0 0 1 5 0v2"],
  run: ["M5 3.2v9.6L12.6 8z"], search: ["M7 2.5a4.5 4.5 0 1 0 .01 0z",
    "M10.4 10.4L14 14"], left: ["M10 3L5 8l5 5"], right: ["M6 3l5 5-5 5"],
};
const SHAPES = { down: "failed", grace: "late", started: "running",
  up: "ok" };

// Returns the icon of a state or a button.
function icon(name) {
  const [first, ...more] = ICONS[SHAPES[name] || name] || ICONS.unknown;
  const filled = first === "F";
  return svg("svg", { class: "icon", viewBox: "0 0 16 16",
    "aria-hidden": "true" }, (filled ? more : [first, ...more]).map((d, at) =>
    svg("path", { d, class: filled && !at ? "solid" : filled ? "cut" : "" })));
}

// Returns a state's icon and its word, or another word ("": none).
function stateMark(state, word = STATES[state]?.[0] ?? state) {
  return el("span", { class: `state s-${SHAPES[state] || state}` },
    icon(state), word && el("span", { class: "word", text: word }));
}

function copyButton(text, label = "Copy") {
  return button([icon("copy"), el("span", { text: label })],
    () => copyText(text), { class: "btn quiet" });
}

// Puts a text into the clipboard, and confirms it in a toast.
async function copyText(text) {
  const write = navigator.clipboard?.writeText(text).then(() => true);
  const done = await write?.catch(() => false) || copySelected(text);
  showToast(done ? "Copied" : "The browser let nothing be copied");
}

// Without TLS there is no navigator.clipboard: copy a selected field.
function copySelected(text) {
  const area = el("textarea", { class: "away", value: text });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

const snippet = (text) => el("div", { class: "snippet" },
  el("pre", {}, code(text)), copyButton(text));

const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });

function plural(count, one, many = one + "s") {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

// Returns a size with its unit: "1.5 MB".
function bytesWords(count) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  for (; count >= 1000 && unit < 3; unit += 1) count /= 1000;
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${
    units[unit]}`;
}

// Returns how often each outcome is among the codes: "3 ok, 1 failed".
function outcomeCounts(codes) {
  const counts = {};
  for (const one of codes) {
    const word = OUTCOMES[one] || one;
    counts[word] = (counts[word] || 0) + 1;
  }
  return Object.entries(counts).map(([word, n]) => `${n} ${word}`)
    .join(", ");
}

// Preferences alone outlive the tab: theme, zone, wrap. Never a key.
const preferences = {
  get(name, usual) {
    try { return localStorage.getItem("koi." + name) || usual; }
    catch { return usual; }
  },
  set(name, value) {
    try { localStorage.setItem("koi." + name, value); } catch { /* none */ }
  },
};

// --- parts of which the views are made -------------------------------------

// The path to a view, in links with slashes between.
const crumbs = (...parts) => el("p", { class: "crumbs" }, parts.filter(
  isThere).map((part, at) => [at > 0 && muted(" / "), part]));

const titleRow = (title, ...actions) => el("div", { class: "title-row" },
  title, el("div", { class: "actions" }, ...actions));

// Pairs of a name and what it is; pairs without a value are left out.
function factList(pairs, kind = "facts") {
  const items = pairs.filter(([, value]) => value).map(([name, value]) =>
    el("div", {}, el("dt", { text: name }), el("dd", {}, value)));
  return items.length ? el("dl", { class: kind }, items) : "";
}

const section = (title, ...inside) => el("section", { class: "part" },
  el("h2", { text: title }), ...inside);

// What is shown where a list is empty: what it is, and what to type.
const empty = (title, ...inside) => el("div", { class: "empty" },
  el("h2", { text: title }), ...inside);

// A row of a table; what is not a cell is put into one.
const tableRow = (...cells) => el("tr", {}, cells.map((cell) =>
  cell?.localName === "td" ? cell : el("td", {}, cell)));

function table(names, rows, kind = "") {
  return el("table", { class: `list ${kind}` }, el("thead", {}, el("tr", {},
    names.map((text) => el("th", { scope: "col", text })))),
  el("tbody", {}, rows));
}

// Appends a page of rows to `list`, and returns a button for the next page.
// `draw` makes a row's element; `next` is the path of the page after a row.
function pageButton(label, list, page, rows, draw, next) {
  const older = button(label, async () => {
    const answer = await withToast(() => get(next(page[rows].at(-1))));
    if (answer) show(answer);
  });
  function show(answer) {
    page = answer;
    list.append(...page[rows].map(draw));
    older.hidden = !page.more || !page[rows].length;
  }
  show(page);
  return older;
}

// The same for a table of all pages.
function pagedTable(label, names, page, rows, draw, next, kind) {
  const node = table(names, [], kind);
  return el("div", { class: "scroll" }, node,
    pageButton(label, $("tbody", node), page, rows, draw, next));
}

// A form: to submit it calls `action` and stays on the page.
const form = (facts, action, ...inside) => el("form", { ...facts,
  onsubmit: (event) => { event.preventDefault(); action(); } }, ...inside);

const submitButton = (text, facts) => el("button", { class: "btn primary",
  type: "submit", ...facts }, text);

const select = (facts, options, chosen) => el("select", facts, options.map(
  ([value, text = value]) => el("option", { value, text,
    selected: value === chosen })));

// A label, its input with what is next to it, and words of help.
function field(label, input, help = "", row = input) {
  if (help) input.setAttribute("aria-describedby", `${input.id}-help`);
  return el("div", { class: "field" }, el("label", { for: input.id,
    text: label }), row, help && el("span", { class: "muted",
    id: `${input.id}-help`, text: help }));
}

const checkbox = (input, text) => el("div", { class: "field check" }, input,
  el("label", { for: input.id, text }));

// A button that is replaced by one which says what it does, and does it.
function confirmButton(text, sure, action, facts) {
  return button(text, (event) => event.target.replaceWith(button(sure, action,
    { class: "btn danger" })), facts);
}

// Puts "Loading" into `root` until `load` has an answer, and then `show`s it,
// or the error.
async function showLoaded(root, load, show) {
  const wait = el("p", { class: "muted waits", text: "Loading\u2026" });
  root.append(wait);
  try {
    const answer = await load();
    wait.remove();
    if (root.isConnected) show(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    wait.replaceWith(el("div", { class: "note bad", role: "alert" },
      el("b", { text: error.message }), " ", error.hint));
  }
}

let toastTimer = 0;
// Shows a message at the bottom for some seconds; errors stay longer.
function showToast(text, kind = "") {
  const line = $("#toast");
  line.className = `shown ${kind}`;
  line.textContent = text;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { line.className = ""; },
    kind ? 9000 : 3500);
}

// Returns the result of `action`, or null after an error, which it shows at
// the bottom of the page.
async function withToast(action, done = "") {
  try {
    const result = await action();
    if (done) showToast(done);
    return result ?? true;
  } catch (error) {
    if (error.name === "AbortError") return null;
    if (!(error instanceof ApiError)) throw error;
    showToast(error.text(), "bad");
    return null;
  }
}

// --- time in words ---------------------------------------------------------

let clockOffset = 0;    // seconds by which the server's clock is before ours
const now = () => Date.now() / 1000 + clockOffset;
const twoDigits = (number) => String(number).padStart(2, "0");
const WEEKDAYS = "Sun Mon Tue Wed Thu Fri Sat".split(" ");
const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");

// Returns a duration of `s` seconds in at most two units: "1 h 30 min".
function formatDuration(s) {
  if (!isThere(s)) return "";
  if (s < 9.95) return `${Math.max(0, s).toFixed(1)} s`;
  if (s < 59.5) return `${Math.round(s)} s`;
  const m = Math.round(s / 60), h = Math.floor(m / 60);
  if (s < 600 && Math.floor(s % 60)) {
    return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  }
  if (m < 60) return `${m} min`;
  if (h < 24) return m % 60 ? `${h} h ${m % 60} min` : `${h} h`;
  return h % 24 ? `${Math.floor(h / 24)} d ${h % 24} h` : `${h / 24} d`;
}

// Returns a duration in one unit, for narrow columns: "1.5 h".
function shortDuration(s) {
  if (!isThere(s) || s < 59.5) return formatDuration(s);
  return s < 3570 ? `${Math.round(s / 60)} min` : s < 86400
    ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} d`;
}

// Returns about how long: one number is enough to see how old something is.
function roughDuration(s) {
  for (const [size, unit, next] of [[1, "s", 90], [60, "min", 90],
    [3600, "h", 36], [86400, "d", 1e9]]) {
    const count = Math.round(s / size);
    if (count < next) return `${Math.max(1, count)} ${unit}`;
  }
}

// Returns a time as seen from now: "in 5 min".
function relativeTime(at) {
  const s = at - now();
  if (Math.abs(s) < 1.5) return "now";
  return s > 0 ? `in ${roughDuration(s)}` : `${roughDuration(-s)} ago`;
}

// The zone that times are shown in: Mine, Host or UTC.
let zoneKind = preferences.get("zone", "mine");
const OUR_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;

// Returns the offset of a host's zone from UTC at a time, in seconds.
function hostShift(at, host) {
  try {
    const [, sign, hours, minutes] = new Intl.DateTimeFormat("en", {
      timeZone: host.zone, timeZoneName: "longOffset" }).format(at * 1000)
      .match(/GMT(?:([+-])(\d+):(\d+))?/);
    return (sign === "-" ? -60 : 60) * (60 * (hours || 0) + +(minutes || 0));
  } catch {     // the browser does not know a zone of that name
    return host.offset || 0;
  }
}

// Returns the offset from UTC of the zone that is shown, in seconds.
function shiftOf(at, host) {
  if (zoneKind === "utc") return 0;
  if (zoneKind === "host" && host) return hostShift(at, host);
  return -60 * new Date(at * 1000).getTimezoneOffset();
}

// Returns a Date whose UTC fields are the local time in the shown zone.
const shifted = (at, host) => new Date((at + shiftOf(at, host)) * 1000);
const clock = (d) => `${twoDigits(d.getUTCHours())}:${
  twoDigits(d.getUTCMinutes())}`;
const clockSeconds = (d) => `${clock(d)}:${twoDigits(d.getUTCSeconds())}`;
const isoDay = (d) => d.toISOString().slice(0, 10);
const dayMonth = (d) => `${d.getUTCDate()} ${MONTHS[d.getUTCMonth()]}`;

// Returns a time as short as its distance allows: "tomorrow 02:30".
function shortTime(at, host) {
  const d = shifted(at, host), today = shifted(now(), host);
  const days = Math.floor(d / 864e5) - Math.floor(today / 864e5);
  if (Math.abs(days) < 6) {
    const day = { 0: "", "-1": "yesterday ", 1: "tomorrow " }[days];
    return `${day ?? WEEKDAYS[d.getUTCDay()] + " "}${clock(d)}`;
  }
  return `${dayMonth(d)} ${d.getUTCFullYear() === today.getUTCFullYear()
    ? clock(d) : d.getUTCFullYear()}`;
}

// Returns a time with date, seconds and zone, for titles.
function exactTime(at, host) {
  const d = shifted(at, host), shift = shiftOf(at, host);
  const name = zoneKind === "utc" ? "" : zoneKind === "host" && host
    ? host.zone : OUR_ZONE;
  const sign = shift < 0 ? "\u2212" : "+", size = Math.abs(shift) / 60;
  const utc = shift ? `UTC${sign}${Math.floor(size / 60)}${
    size % 60 ? ":" + twoDigits(size % 60) : ""}` : "UTC";
  return `${WEEKDAYS[d.getUTCDay()]} ${isoDay(d)} ${clockSeconds(d)} (${
    name && name !== "UTC" ? name + ", " : ""}${utc})`;
}

// Returns an element with a time in words that one timer keeps current.
function timeNode(at, host, words = relativeTime) {
  return Object.assign(el("time", { class: "rel", text: words(at, host),
    datetime: new Date(at * 1000).toISOString(),
    title: exactTime(at, host) }), { at, words });
}

const dateNode = (at, host) => timeNode(at, host, () => shortTime(at, host));

let ticks = 0;
// Each second: near times; each half minute: all.
function updateTimes() {
  ticks += 1;
  for (const node of document.getElementsByClassName("rel")) {
    if (ticks % 30 && Math.abs(node.at - now()) > 90) continue;
    const text = node.words(node.at);
    if (node.textContent !== text) node.textContent = text;
  }
}

// --- keys: the same as in section Keys of koitab.py ------------------------

// Returns SHA-256, HMAC and PBKDF2. The text of this function also runs in a
// worker, where the browser offers no crypto.subtle (plain http).
function hashing() {
  const part = (x) => (x - Math.floor(x)) * 2 ** 32 | 0;
  const K = new Int32Array(64), START = new Int32Array(8);
  for (let n = 2, found = 0; found < 64; n += 1) {
    let prime = true;
    for (let d = 2; d * d <= n; d += 1) if (n % d === 0) prime = false;
    if (!prime) continue;
    if (found < 8) START[found] = part(Math.sqrt(n));
    K[found] = part(Math.cbrt(n));      // FIPS 180-4: roots of primes
    found += 1;
  }
  const w = new Int32Array(64);

  function compress(state, block) {     // block: 16 words
    for (let i = 0; i < 16; i += 1) w[i] = block[i];
    for (let i = 16; i < 64; i += 1) {
      const x = w[i - 15], y = w[i - 2];
      w[i] = w[i - 16] + w[i - 7]
        + ((x >>> 7 | x << 25) ^ (x >>> 18 | x << 14) ^ x >>> 3)
        + ((y >>> 17 | y << 15) ^ (y >>> 19 | y << 13) ^ y >>> 10) | 0;
    }
    let a = state[0], b = state[1], c = state[2], d = state[3];
    let e = state[4], f = state[5], g = state[6], h = state[7];
    for (let i = 0; i < 64; i += 1) {
      const one = h + ((e >>> 6 | e << 26) ^ (e >>> 11 | e << 21)
        ^ (e >>> 25 | e << 7)) + (e & f ^ ~e & g) + K[i] + w[i] | 0;
      const two = ((a >>> 2 | a << 30) ^ (a >>> 13 | a << 19)
        ^ (a >>> 22 | a << 10)) + (a & b ^ a & c ^ b & c) | 0;
      h = g; g = f; f = e; e = d + one | 0;
      d = c; c = b; b = a; a = one + two | 0;
    }
    state[0] += a; state[1] += b; state[2] += c; state[3] += d;
    state[4] += e; state[5] += f; state[6] += g; state[7] += h;
  }

  // Pads the bytes and compresses them block by block (FIPS 180-4).
  function sha256(bytes) {
    const size = (bytes.length + 72) & ~63, padded = new Uint8Array(size);
    padded.set(bytes);
    padded[bytes.length] = 0x80;
    const view = new DataView(padded.buffer), block = new Int32Array(16);
    view.setUint32(size - 8, Math.floor(bytes.length / 2 ** 29));
    view.setUint32(size - 4, bytes.length << 3);
    const state = START.slice();
    for (let at = 0; at < size; at += 64) {
      for (let i = 0; i < 16; i += 1) block[i] = view.getInt32(at + 4 * i);
      compress(state, block);
    }
    return bytesOf(state);
  }

  function bytesOf(words) {
    const view = new DataView(new ArrayBuffer(32));
    for (let i = 0; i < 8; i += 1) view.setInt32(4 * i, words[i]);
    return new Uint8Array(view.buffer);
  }

  function pads(key) {
    const short = key.length > 64 ? sha256(key) : key;
    const inner = new Uint8Array(64).fill(0x36);
    const outer = new Uint8Array(64).fill(0x5c);
    short.forEach((byte, i) => { inner[i] ^= byte; outer[i] ^= byte; });
    return [inner, outer];
  }

  function joined(a, b) {
    const both = new Uint8Array(a.length + b.length);
    both.set(a);
    both.set(b, a.length);
    return both;
  }

  function hmac(key, message) {
    const [inner, outer] = pads(key);
    return sha256(joined(outer, sha256(joined(inner, message))));
  }

  // Returns the first 32 bytes. Each round is two compressions, because the
  // states after the pads are computed once: half the time of two HMACs.
  function pbkdf2(password, salt, rounds, progress) {
    const [before, after] = pads(password).map((pad) => {
      const view = new DataView(pad.buffer), state = START.slice();
      compress(state, Int32Array.from({ length: 16 },
        (_, i) => view.getInt32(4 * i)));
      return state;
    });
    const first = new DataView(hmac(password,
      joined(salt, Uint8Array.of(0, 0, 0, 1))).buffer);
    const block = new Int32Array(16), sum = new Int32Array(8);
    for (let i = 0; i < 8; i += 1) sum[i] = block[i] = first.getInt32(4 * i);
    block[8] = 1 << 31;
    block[15] = 96 * 8;
    const state = new Int32Array(8);
    for (let round = 1; round < rounds; round += 1) {
      state.set(before);
      compress(state, block);
      block.set(state);
      state.set(after);
      compress(state, block);
      for (let i = 0; i < 8; i += 1) sum[i] ^= block[i] = state[i];
      if (progress && round % 20000 === 0) progress(round / rounds);
    }
    return bytesOf(sum);
  }
  return { sha256, hmac, pbkdf2 };
}

const { sha256, hmac } = hashing();
const utf8 = (text) => new TextEncoder().encode(text);
const hex = (bytes) => Array.from(bytes, (byte) =>
  byte.toString(16).padStart(2, "0")).join("");
const unhex = (text) => Uint8Array.from(text.match(/../g) || [],
  (pair) => parseInt(pair, 16));
const digest = (text) => hex(sha256(utf8(text)));
const isHex = (text, size) => typeof text === "string"
  && text.length === size && /^[0-9a-f]*$/.test(text);

const LEAST_ROUNDS = 600000, MOST_ROUNDS = 10000000;

// Returns the keys of a passphrase. The dashboard names salt and rounds, and
// is not trusted: few rounds would let it guess the passphrase.
async function derive(password, salt, rounds, progress) {
  if (!isHex(salt, 32) || !Number.isInteger(rounds)
      || rounds < LEAST_ROUNDS || rounds > MOST_ROUNDS) {
    throw new ApiError(0, "This dashboard asks for keys that would be weak.",
      "It is not one of ours, or somebody changed it.");
  }
  const secret = utf8(password.normalize("NFC"));
  const root = globalThis.crypto?.subtle
    ? await rootBySubtle(secret, unhex(salt), rounds)
    : await rootByWorker(secret, unhex(salt), rounds, progress);
  const key = (name) => hmac(root, utf8(`koi-${name}-v1`));
  return { api: key("api"), view: key("view"), run: key("run") };
}

async function rootBySubtle(secret, salt, iterations) {
  const key = await crypto.subtle.importKey("raw", secret, "PBKDF2", false,
    ["deriveBits"]);
  return new Uint8Array(await crypto.subtle.deriveBits({ name: "PBKDF2",
    hash: "SHA-256", salt, iterations }, key, 256));
}

// A browser with Trusted Types starts a worker only from a policy's URL;
// ours lets through what this page made itself.
const policy = globalThis.trustedTypes?.createPolicy("koi", {
  createScriptURL(url) {
    if (!url.startsWith("blob:")) throw new TypeError("no worker of ours");
    return url;
  },
});

// Derives the root in a worker, so that the page stays usable; calls
// progress(part) as it goes.
function rootByWorker(secret, salt, rounds, progress) {
  const work = `const { pbkdf2 } = (${hashing})();
    onmessage = ({ data: [secret, salt, rounds] }) => postMessage(
      pbkdf2(secret, salt, rounds, (part) => postMessage(part)));`;
  const url = URL.createObjectURL(new Blob([work]));
  return new Promise((done, failed) => {
    const worker = new Worker(policy ? policy.createScriptURL(url) : url);
    const end = (then, value) => {
      worker.terminate();
      URL.revokeObjectURL(url);
      then(value);
    };
    worker.onmessage = ({ data }) => typeof data === "number"
      ? progress && progress(data) : end(done, data);
    worker.onerror = () => end(failed, new ApiError(0,
      "The browser would not compute the keys."));
    worker.postMessage([secret, salt, rounds]);
  });
}

const hostKey = (run, host) => hmac(run, utf8(`koi-host-v1\n${host}`));
const keyId = (key) => hex(sha256(new Uint8Array(
  [...utf8("koi-key-v1\n"), ...key]))).slice(0, 16);
const runMac = (key, body) => hex(hmac(key, utf8("koi-run-v1\n" + body)));
const listMac = (key, body) => hex(hmac(hmac(key, utf8("koi-list-v1")),
  utf8(body)));

// Encrypts the bytes of a secret argument, so that only the host can read it:
// XOR with a stream of HMACs. To decrypt is the same.
function encryptSecret(key, nonce, name, value) {
  const secret = hmac(key, utf8("koi-secret-v1")), blocks = [];
  return value.map((byte, at) => {
    const block = at >> 5;
    blocks[block] ||= hmac(secret, utf8(`${nonce}\n${name}\n${block}`));
    return byte ^ blocks[block][at & 31];
  });
}

function randomHex(bytes) {
  return hex(crypto.getRandomValues(new Uint8Array(bytes)));
}

// --- session: who the user is, for the life of this tab --------------------

class ApiError extends Error {
  constructor(status, message, hint = "", wait = 0) {
    super(message);
    Object.assign(this, { status, hint, wait });
  }

  text() {
    return `${this.message} ${this.hint}`.trim();
  }
}

const session = { server: "", token: "", keys: null, role: "", dash: "",
  used: Date.now() };
const IDLE = 15 * 60 * 1000;
const isOperator = () => session.role === "operator";

// Returns the response to a request of the API. Throws ApiError.
async function fetched(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (session.token) headers.Authorization = `Bearer ${session.token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(`${session.server}/api/v1/${path}`, { method,
      headers, signal, body: body === undefined ? undefined
        : JSON.stringify(body), credentials: "omit", cache: "no-store",
      redirect: "error", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The dashboard does not answer.",
      "It is down, or the network between is.");
  }
  if (!reply.ok) throw await errorOf(reply);
  return reply;
}

// Returns the ApiError of a response that is not ok.
async function errorOf(reply) {
  let body = {};
  try { body = await reply.json(); } catch { /* a proxy's page, perhaps */ }
  return new ApiError(reply.status, body.error
    || `The dashboard says ${reply.status}.`, body.hint || "",
    +reply.headers.get("Retry-After") || 0);
}

const get = async (path, options) => (await fetched(path, options)).json();
const post = (path, body) => get(path, { method: "POST", body });

// Opens a session with a passphrase or a viewer's key. Throws ApiError.
async function logIn(secret, progress) {
  const viewer = secret.trim().toLowerCase().match(/^view-([0-9a-f]{64})$/);
  let keys = null;
  if (!viewer) {
    const { salt, rounds } = await get("salt");
    keys = await derive(secret, salt, rounds, progress);
  }
  session.token = viewer ? viewer[1] : hex(keys.api);
  try {
    replaceState(await get("state"));
  } catch (error) {
    session.token = "";
    throw error;
  }
  session.keys = isOperator() ? keys : null;
}

// Ends the session and forgets its keys; `why` is shown.
function lock(why = "") {
  if (!session.token) return;
  Object.assign(session, { token: "", keys: null, role: "" });
  stream.stop();
  forgetState();
  app.close(why);
}

// The keys are forgotten after 15 minutes without a touch. A viewer's key can
// do no harm, and its page may stay open on a wall.
function lockWhenIdle() {
  const mark = () => { session.used = Date.now(); };
  for (const kind of ["pointerdown", "pointermove", "keydown", "wheel",
    "touchstart"]) addEventListener(kind, mark, { passive: true });
  const check = () => {
    if (isOperator() && Date.now() - session.used > IDLE) {
      lock("Locked after 15 minutes without a touch.");
    }
  };
  setInterval(check, 5000);
  document.addEventListener("visibilitychange", check);
  // A page that the browser keeps for its Back button keeps no keys.
  addEventListener("pagehide", () => lock());
}

// --- state: what the dashboard knows, and the stream that keeps it current -

const state = { seq: 0, hosts: new Map(), jobs: new Map(),
  checks: new Map(), alerts: new Map(), dash: {}, version: "",
  problems: [] };
const KEY_OF = { hosts: (host) => host.id, jobs: (job) => job.id,
  checks: (check) => check.id,
  alerts: (alert) => `${alert.subject}\n${alert.kind}` };

// Texts that are shown in many places: their control characters are made
// visible once, here.
const NAMES = { jobs: ["label", "name", "section", "words", "user"],
  hosts: ["name"], checks: ["name", "tags", "words"], alerts: ["text"] };

// Puts new versions of things into the state.
function store(kind, items = []) {
  for (const item of items) {
    for (const name of NAMES[kind]) item[name] = visible(item[name] || "");
    state[kind].set(KEY_OF[kind](item), item);
  }
}

// Forgets all that the dashboard knows, at the lock.
function forgetState() {
  for (const kind of Object.keys(KEY_OF)) state[kind] = new Map();
  state.dash = {};
}

// Takes the whole state, as GET state has it.
function replaceState(answer) {
  forgetState();
  clockOffset = answer.now - Date.now() / 1000;
  Object.assign(state, { seq: answer.seq, dash: answer.dash,
    version: answer.version, problems: answer.problems || [] });
  session.role = answer.role;
  session.dash = answer.dash.id;
  for (const kind of Object.keys(KEY_OF)) store(kind, answer[kind]);
}

// Takes one line of the stream: new versions of things, and IDs of deleted.
function applyChange(change) {
  if (change.seq) state.seq = change.seq;
  const worse = (change.jobs || []).filter((job) => BAD.has(job.state)
    && state.jobs.get(job.id)?.state !== job.state);
  for (const kind of Object.keys(KEY_OF)) store(kind, change[kind]);
  for (const [kind, ids] of Object.entries(change.deleted || {})) {
    for (const id of ids) removeFrom(kind, id);
  }
  announce(worse);
}

// Forgets a deleted thing. Alerts are deleted by their subject.
function removeFrom(kind, id) {
  state[kind]?.delete(id);
  if (kind !== "alerts") return;
  for (const [key, alert] of state.alerts) {
    if (alert.subject === id) state.alerts.delete(key);
  }
}

// Announces to people who cannot see the page which jobs became worse.
function announce(jobs) {
  if (!jobs.length) return;
  $("#announcer").textContent = jobs.slice(0, 3).map((job) =>
    `${job.label} ${STATES[job.state][0]} on ${hostName(job.host)}`)
    .join("; ");
}

const hostOf = (thing) => thing && state.hosts.get(thing.host);
const hostName = (id) => state.hosts.get(id)?.name || "a forgotten host";
const isSnoozed = (one) => Boolean(one.snoozed) && one.snoozed > now();

// GET stream: one long response, a line of JSON for each change.
const stream = {
  abort: null, pause: 1, timer: 0, live: false, reader: null,

  start() {
    this.stop();
    this.pause = 1;
    this.follow();
  },

  stop() {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
  },

  // A browser has six connections to a server, for all tabs together. A tab
  // that nobody sees closes its own, and asks again each 20 s or so.
  closeWhenHidden(reader, abort, seconds) {
    setTimeout(() => {
      if (!document.hidden || abort !== this.abort) return;
      this.pause = 20;
      reader.cancel();
    }, seconds * 1000);
  },

  onVisibilityChange() {
    if (!session.token) return;
    if (document.hidden && this.reader) {
      this.closeWhenHidden(this.reader, this.abort, 60);
    } else if (!document.hidden && !this.live) this.start();
  },

  // Reads the stream until it breaks, and then connects again.
  async follow() {
    const abort = this.abort = new AbortController();
    try {
      const reply = await fetched(`stream?since=${state.seq}`,
        { signal: abort.signal });
      app.showConnection("live", "Live");
      this.live = true;
      const reader = this.reader = reply.body.getReader();
      if (document.hidden) this.closeWhenHidden(reader, abort, 3);
      await this.read(reader, abort);
      this.reconnect(abort, "The dashboard ended the stream.");
    } catch (error) {
      if (abort !== this.abort) return;
      if (error.status === 401) return lock("The password was changed.");
      this.reconnect(abort, error.message);
    }
  },

  // The server sends an empty line each 15 s; after 40 s without any, the
  // connection is dead, whatever the network says.
  async read(reader, abort) {
    const decoder = new TextDecoder();
    let text = "", watchdog = 0;
    try {
      for (;;) {
        clearTimeout(watchdog);
        watchdog = setTimeout(() => reader.cancel(), 40000);
        const { done, value } = await reader.read();
        if (done || abort !== this.abort) return;
        const lines = (text + decoder.decode(value, { stream: true }))
          .split("\n");
        text = lines.pop();
        for (const line of lines) if (line) await this.take(line);
        if (!document.hidden) this.pause = 1;
      }
    } finally {
      clearTimeout(watchdog);
    }
  },

  async take(line) {
    const change = JSON.parse(line);
    if (change.reset) replaceState(await get("state"));
    else applyChange(change);
    app.changed(change.reset ? { all: true } : change);
  },

  reconnect(abort, why) {
    if (abort !== this.abort) return;
    this.live = false;
    this.reader = null;
    const wait = this.pause * (0.8 + 0.4 * Math.random());
    this.pause = Math.min(this.pause * 2, 30);
    app.showConnection("away", `Not connected: next try in ${
      roughDuration(wait)}`, why);
    this.timer = setTimeout(() => this.follow(), wait * 1000);
  },
};

// --- app: the frame, and which view is shown in it -------------------------

const VIEWS = [    // path -> view, the first that fits
  [/^(?:jobs)?$/, (...all) => jobsView(...all)],
  [/^job\/(\d+)$/, (...all) => jobView(...all)],
  [/^job\/(\d+)\/run$/, (...all) => formView(...all)],
  [/^run\/(\d+)(?:\/L(\d+))?$/, (...all) => runView(...all)],
  [/^day(?:\/([\d-]{10}))?$/, (...all) => dayView(...all)],
  [/^search$/, (...all) => searchView(...all)],
  [/^audit$/, (...all) => auditView(...all)],
  [/^check\/(new|[0-9a-f-]{36})$/, (...all) => checkView(...all)],
  [/^check\/([0-9a-f-]{36})\/edit$/, (...all) => editCheckView(...all)],
  [/^alerts$/, (...all) => alertsView(...all)],
  [/^hosts$/, (...all) => hostsView(...all)],
  [/^settings$/, (...all) => settingsView(...all)],
];
const NAV = [["jobs", "Jobs"], ["day", "Day"], ["alerts", "Alerts"],
  ["audit", "Audit"], ["hosts", "Hosts"], ["settings", "Settings"]];

// Returns what the address requests. One that hosts join by ends in #ID, and
// shows the jobs.
function currentPlace() {
  const [path, query] = location.hash
    .replace(/^#\/?(?:[0-9a-f]{16}$)?/, "").split("?");
  const found = VIEWS.map(([pattern, view]) => [path.match(pattern), view])
    .find(([match]) => match);
  const [match, view] = found || [[], lostView];
  return { path, parts: match.slice(1), view,
    query: new URLSearchParams(query || "") };
}

function go(path) {
  location.hash = `#/${path}`;
}

// What is shown for an unknown address.
function lostView(place, root) {
  root.append(el("h1", { text: "There is nothing here" }),
    el("p", {}, link("#/jobs", "All jobs")));
  return { title: "nothing here" };
}

// What is around the views, and which of them is shown.
const app = {
  view: null, waiting: null, jobsScroll: 0, path: "",

  open() {
    document.body.classList.add("open");
    $("#top").replaceChildren(...this.bar());
    this.view = null;
    stream.start();
    this.route();
    this.showSummary();
  },

  close(why) {
    this.view?.leave?.();
    this.view = null;
    jobList = null;
    document.body.classList.remove("open");
    $("#problems").hidden = true;
    $("#top").replaceChildren();
    document.title = "koi";
    showFavicon("none");
    logInView(why);
  },

  // Returns the parts of the bar at the top.
  bar() {
    const nav = el("nav", { "aria-label": "Places" }, NAV.map(([path, word]) =>
      link(`#/${path}`, [word, path === "alerts"
        && el("span", { class: "count", id: "alerts" })],
      { "data-path": path })));
    const input = el("input", { name: "q", type: "search", placeholder:
      "Search all outputs", "aria-label": "Search all outputs",
    autocomplete: "off" });
    const find = form({ role: "search", id: "find" }, () =>
      go(`search?q=${encodeURIComponent(input.value)}`), icon("search"),
    input);
    return [link("#/jobs", [brand(), "koi"], { class: "brand" }), nav, find,
      el("span", { id: "connection", role: "status" }),
      el("label", { class: "zone" }, el("span", { class: "away",
        text: "Times in the zone of" }), zoneSelect()),
      button(icon("sun"), nextTheme, { class: "btn quiet theme",
        "aria-label": "Light or dark", title: "Light or dark" }),
      button(el("span", { text: "?" }), showShortcuts, {
        class: "btn quiet help", "aria-label": "Keys", title: "Keys (?)" }),
      button([icon("lock"), el("span", { text: "Lock" })],
        () => lock("Locked."), { class: "btn quiet lock",
          title: "Forget the keys and close" })];
  },

  // Shows the view of the address. A view may stay for a new address of its
  // own (moved), such as another line of the same run.
  route() {
    if (!session.token) return;
    const place = currentPlace();
    const base = (path) => path.split("/").slice(0, 2).join("/");
    if (this.view?.moved && base(place.path) === base(this.path)
        && this.view.moved(place)) return;
    if (this.path === "jobs") this.jobsScroll = scrollY;
    this.view?.leave?.();
    hideTip();
    const root = el("div", { class: "view" });
    $("#main").replaceChildren(root);
    this.path = place.path;
    this.view = place.view(place, root) || {};
    for (const a of document.querySelectorAll("nav [data-path]")) {
      const here = (place.path || "jobs").startsWith(a.dataset.path);
      if (here) a.setAttribute("aria-current", "page");
      else a.removeAttribute("aria-current");
    }
    this.showTitle();
    scrollTo(0, place.path === "jobs" ? this.jobsScroll : 0);
    if (document.activeElement === document.body
        || !document.activeElement) $("#main").focus({ preventScroll: true });
  },

  reload() {
    jobList = null;
    this.view?.leave?.();
    this.view = null;
    this.route();
  },

  // Many changes that come together are drawn once.
  changed(change) {
    const isFirst = !this.waiting;
    const all = this.waiting ||= {};
    for (const [kind, list] of Object.entries(change)) {
      all[kind] = Array.isArray(list) ? [...all[kind] || [], ...list] : list;
    }
    if (isFirst) setTimeout(() => this.update(), 30);
  },

  update() {
    const changes = this.waiting;
    this.waiting = null;
    if (!session.token) return;
    this.view?.update?.(changes);
    this.showSummary();
  },

  // Shows how many things are bad: in the title, the icon and the bar.
  showSummary() {
    $("#problems").hidden = !state.problems.length;
    $("#problems").textContent = state.problems.join(" ");
    const all = [...state.jobs.values(), ...state.checks.values()];
    this.bad = all.filter((one) => BAD.has(one.state)
      && !isSnoozed(one)).length;
    this.showTitle();
    showFavicon(this.bad ? "bad" : state.alerts.size ? "late"
      : all.length ? "ok" : "none");
    $("#alerts").textContent = state.alerts.size || "";
  },

  showTitle(title = this.view?.title) {
    if (this.view) this.view.title = title;
    document.title = `${this.bad ? `(${this.bad}) ` : ""}${
      title ? `${title} \u00b7 ` : ""}koi`;
  },

  showConnection(kind, words, title = words) {
    setAttributes($("#connection"), { title, "data-kind": kind })
      .replaceChildren(el("i"), el("span", { text: words }));
  },
};

function brand() {      // a koi from above, in two strokes
  return svg("svg", { class: "fish", viewBox: "0 0 24 24",
    "aria-hidden": "true" },
  svg("path", { d: "M12 1.5c4 3.2 4.600 8.500 1.600 13.500l3.400 6.500"
    + "c-2.500.1-4-.7-5-2.500-1 1.800-2.500 2.600-5 2.500l3.400-6.500"
    + "C7.400 10 8 4.700 12 1.500z" }),
  svg("path", { class: "spot", d: "M12 5c1.800 1.500 2 3.800.6 6-2-.6-2.800-3-"
    + ".6-6z" }));
}

const ICON_COLOURS = { bad: "d6342c", late: "c27a00", ok: "2f8f55",
  none: "8a929c" };

function showFavicon(kind) {
  const mark = kind === "bad" ? "M11 11l10 10m0-10l-10 10"
    : kind === "ok" ? "M9.500 16.500l4.500 4.500 8.500-10" : "M10 16h12";
  $("link[rel=icon]").href = "data:image/svg+xml," + encodeURIComponent(
    `<svg xmlns="${SVG}" viewBox="0 0 32 32"><rect width="32" height="32" ` +
    `rx="9" fill="#${ICON_COLOURS[kind]}"/><path d="${mark}" fill="none" ` +
    `stroke="#fff" stroke-width="3.500" stroke-linecap="round"/></svg>`);
}

const zoneSelect = () => select({ onchange: (event) => {
  zoneKind = event.target.value;
  preferences.set("zone", zoneKind);
  app.reload();
} }, [["mine", "My time"], ["host", "Host\u2019s time"], ["utc", "UTC"]],
zoneKind);

function showTheme() {
  document.documentElement.dataset.theme = preferences.get("theme", "auto");
}

// Goes from the system's theme to light, dark, and back.
function nextTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const themes = dark ? ["auto", "light", "dark"] : ["auto", "dark", "light"];
  const theme = themes[(themes.indexOf(preferences.get("theme", "auto")) + 1)
    % 3];
  preferences.set("theme", theme);
  showTheme();
  showToast({ auto: "Light or dark as the system", light: "Light",
    dark: "Dark" }[theme]);
}

// --- login -----------------------------------------------------------------

const isFile = () => location.protocol === "file:";

// Shows the login; `why` is what went wrong or why the page was locked.
function logInView(why = "") {
  const server = isFile() && !$("meta[name=koi-server]").content
    && el("input", { id: "server", type: "url", required: true,
      placeholder: "https://koi.example.org", value: session.server });
  const failed = el("p", { class: "error", role: "alert", id: "why",
    text: why });
  const user = el("input", { type: "text", autocomplete: "username",
    hidden: true, value: location.host });
  const secret = el("input", { type: "password", id: "secret",
    autocomplete: "current-password", required: true, spellcheck: "false",
    "aria-describedby": "why hint" });
  const open = submitButton("Open");
  const bar = el("progress", { max: 1, hidden: true,
    "aria-label": "Computing the keys" });
  $("#main").replaceChildren(form({ class: "card login" }, () =>
    tryLogIn({ server, secret, open, bar, failed }),
  el("h1", {}, brand(), "koi"), server && [el("label", { for: "server",
    text: "Dashboard\u2019s address" }), server],
  el("label", { for: "secret", text: "Passphrase" }), user, secret, failed,
  bar, open, el("p", { class: "muted", id: "hint", text: "It stays in this "
    + "tab: keys are made of it here, and are gone when the tab is closed. "
    + "A viewer\u2019s key (view-\u2026) opens this page for reading." })));
  secret.focus();
}

// Logs in and opens the app, or shows the error below the field.
async function tryLogIn({ server, secret, open, bar, failed }) {
  if (server) session.server = server.value.replace(/\/+$/, "");
  failed.textContent = "";
  open.disabled = true;
  open.textContent = "Opening\u2026";
  try {
    await logIn(secret.value, (part) => {
      bar.hidden = false;
      bar.value = part;
    });
    secret.value = "";
    app.open();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    failed.textContent = whyNot(error);
    secret.select();
  } finally {
    bar.hidden = true;
    open.disabled = false;
    open.textContent = "Open";
  }
}

// Returns why a login failed.
function whyNot(error) {
  if (error.status === 401) return "That is not the passphrase.";
  if (error.status === 404) {
    return "There is no dashboard here yet: type koitab -d new on a host.";
  }
  if (error.status === 429) {
    return `Too many tries. Try again in ${error.wait
      ? roughDuration(error.wait) : "a minute"}.`;
  }
  return error.text();
}

// --- pictures: many runs in one small drawing ------------------------------

// Outcomes differ in height and fill, not in colour alone.
const BAR_STYLES = { o: "ok", f: "bad", k: "bad", u: "bad", i: "odd",
  m: "hollow", s: "skip", r: "run", q: "wait" };
const BAR_HEIGHTS = { o: 0.62, s: 0.3, r: 0.62, q: 0.62 };

// Returns a picture of items {x, w, outcome}: one path for each style, however
// many items there are. tipOf(item) is shown at the pointer, hrefOf(item) is
// where a click leads.
function bars(items, height, facts, tipOf, hrefOf) {
  const paths = {};
  for (const { x, w, outcome } of items) {
    const style = BAR_STYLES[outcome] || "odd";
    const h = Math.round(height * (BAR_HEIGHTS[outcome] || 1));
    (paths[style] ||= []).push(style === "hollow" || style === "wait"
      ? outline(x, height - h, w, h) : `M${x} ${height - h}h${w}v${h}h${
        -w}z`);
  }
  const node = svg("svg", { class: "bars", role: "img", ...facts },
    Object.entries(paths).map(([style, d]) => svg("path", {
      class: `b-${style}`, d: d.join("") })));
  node.bars = { items, tipOf, hrefOf, at: items.length - 1 };
  return node;
}

// An outline; what is too narrow for one has its middle missing.
function outline(x, y, w, h) {
  if (w >= 4) return `M${x + 0.5} ${y + 0.5}h${w - 1}v${h - 1}h${1 - w}z`;
  const end = Math.max(2, Math.floor(h / 4)), middle = x + w / 2;
  return `M${middle} ${y}v${end}M${middle} ${y + h - end}v${end}`;
}

// Returns the index of the bar under the pointer or within 6 pixels, or -1.
function barAt(node, event) {
  const box = node.getBoundingClientRect();
  const x = (event.clientX - box.left) * node.viewBox.baseVal.width
    / box.width;
  let best = -1, distance = 6;
  node.bars.items.forEach((item, at) => {
    const far = x < item.x ? item.x - x : Math.max(0, x - item.x - item.w);
    if (far < distance) { best = at; distance = far; }
  });
  return best;
}

// Shows the tip of one bar above it, or below where there is no room.
function showTip(node, at) {
  const { items, tipOf } = node.bars, item = items[at];
  if (!item) return hideTip();
  node.bars.at = at;
  const tip = $("#tip"), box = node.getBoundingClientRect();
  tip.replaceChildren(...tipOf(item));
  tip.hidden = false;
  const x = box.left + (item.x + item.w / 2) * box.width
    / node.viewBox.baseVal.width;
  const half = tip.offsetWidth / 2, above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.min(Math.max(x, half + 8),
    innerWidth - half - 8)}px`;
  tip.style.top = `${above < 0 ? box.bottom + 6 : above}px`;
}

function hideTip() {
  $("#tip").hidden = true;
}

// Returns the text of a bar's tip: outcome, time and duration.
const tipWords = (outcome, at, host, seconds) => [
  el("b", { text: OUTCOMES[outcome] || outcome }), " ", shortTime(at, host),
  isThere(seconds) && outcome !== "m"
    ? ` \u00b7 ${formatDuration(seconds)}` : ""];

// One listener for all pictures: tips at the pointer, and clicks.
function listenToBars() {
  const barsOf = (event) => event.target.closest?.("svg.bars");
  document.addEventListener("mousemove", (event) => {
    const node = barsOf(event);
    if (node) showTip(node, barAt(node, event));
    else if (!document.activeElement?.bars) hideTip();
  });
  document.addEventListener("click", (event) => {
    const node = barsOf(event), item = node?.bars.items[barAt(node, event)];
    if (item) location.hash = node.bars.hrefOf(item);
  });
  document.addEventListener("focusin", (event) => {
    const node = barsOf(event);
    if (node?.matches(":focus-visible")) showTip(node, node.bars.at);
    else hideTip();
  });
}

// Arrow keys go along the bars that have the focus; Enter opens. Returns
// whether the key was one of them.
function barKey(event) {
  const { bars: shown } = event.target, step = { ArrowLeft: -1,
    ArrowRight: 1, Home: -1e6, End: 1e6 }[event.key];
  if (!shown) return false;
  if (step) {
    showTip(event.target, Math.min(Math.max(shown.at + step, 0),
      shown.items.length - 1));
    $("#announcer").textContent = $("#tip").textContent;
  } else if (event.key === "Enter" && shown.items[shown.at]) {
    location.hash = shown.hrefOf(shown.items[shown.at]);
  } else {
    return false;
  }
  event.preventDefault();
  return true;
}

const phone = matchMedia("(max-width: 859px)");
const wide = matchMedia("(min-width: 1480px)");

// Returns the run history bar: the last runs, as [id, at, seconds, outcome].
function historyBar(runs, host, hrefOf = ({ run }) => `#/run/${run[0]}`) {
  const most = phone.matches ? 30 : 90, pitch = phone.matches ? 5
    : wide.matches ? 4 : 3;
  const last = runs.slice(-most), skip = most - last.length;
  const items = last.map((run, at) => ({ x: (at + skip) * pitch,
    w: pitch - 1, outcome: run[3], run }));
  const width = most * pitch, counts = outcomeCounts(last.map((run) =>
    run[3]));
  return bars(items, 18, { viewBox: `0 0 ${width} 18`, width, height: 18,
    tabindex: -1, "aria-label": counts ? `last ${plural(last.length, "run")
    }: ${counts}` : "no runs yet" },
  ({ run: [, at, seconds, outcome] }) => tipWords(outcome, at, host, seconds),
  hrefOf);
}

// Returns how long the last 30 runs took, over the band of what is usual. The
// scale is logarithmic if one took ten times as long as most.
function sparkline(runs, usual) {
  const times = runs.slice(-30).filter(([, , seconds, outcome]) =>
    isThere(seconds) && !"msqr".includes(outcome)).map((run) => run[2]);
  if (times.length < 3) return null;
  const all = [...times, ...usual || []].map((s) => Math.max(s, 0.001));
  const middle = [...times].sort((a, b) => a - b)[times.length >> 1];
  const isLog = Math.max(...times) > 10 * Math.max(middle, 0.001);
  const scale = (s) => isLog ? Math.log(Math.max(s, 0.001)) : s;
  const low = isLog ? scale(Math.min(...all)) : 0;
  const high = Math.max(scale(Math.max(...all)), low + 1e-6);
  const y = (s) => 16 - 14 * (scale(s) - low) / (high - low);
  const last = times.length - 1, x = (at) => 1 + at * 56 / last;
  return svg("svg", { class: "spark", viewBox: "0 0 60 18", width: 60,
    height: 18, role: "img", "aria-label": `took ${formatDuration(times[last])
    } last${usual ? `, usually ${formatDuration(usual[0])} to ${
      formatDuration(usual[1])}` : ""}` },
  usual && svg("rect", { x: 0, width: 60, y: y(usual[1]),
    height: Math.max(1.5, y(usual[0]) - y(usual[1])) }),
  svg("path", { d: times.map((s, at) => `${at ? "L" : "M"}${
    x(at).toFixed(1)} ${y(s).toFixed(1)}`).join("") }),
  svg("circle", { cx: x(last), cy: y(times[last]), r: 1.8 }));
}

// --- jobs: the list that people see first ----------------------------------

let jobList = null;     // kept while other views are shown
const jobFilter = { text: "", host: "", state: "" };

// #/jobs, #/jobs?state=STATE
function jobsView(place, root) {
  jobFilter.state = place.query.get("state") || jobFilter.state;
  jobList ||= new JobList();
  root.replaceWith(jobList.root);
  jobList.update();
  return { title: "", update: (changes) => jobList.update(changes),
    shortcuts: { j: () => jobList.step(1), k: () => jobList.step(-1),
      r: () => jobList.runFocused(), "/": () => jobList.text.focus() } };
}

const isLive = (run) => run.state === "running" || run.state === "queued";

// Returns how a run ended: "exit 0", "signal 9", "timeout", or its state.
function endOfRun(run) {
  if (run.state === "unstartable") return "could not start";
  if (run.state !== "done") return run.state;
  if (run.reason === "timeout") return "timeout";
  return run.signal ? `signal ${run.signal}` : `exit ${run.exit}`;
}

const timeOfRun = (run) => run.started || run.due || run.requested_at;
const durationOf = (run) => run.started
  ? (run.ended || now()) - run.started : null;

// `paused` is the end of the pause; 0: it has none.
const isPaused = (job) => job.paused === 0 || job.paused > now();

// Returns why a job has no next start.
function nextWords(job) {
  if (job.removed) return "in no tab";
  if (isPaused(job)) return "paused";
  if (job.manual) return "when asked for";
  if (job.when.startsWith("@after")) return `after ${job.when.slice(8, -1)}`;
  return job.when === "@reboot" ? "on reboot" : "not scheduled";
}

const canRun = (job) => isOperator() && job.manual && !job.removed
  && job.confirm !== "cli";

const runLink = (job) => linkButton(`#/job/${job.id}/run`,
  [icon("run"), "Run"], { class: "btn run", "aria-label":
    `Run ${job.label}` });

// Returns the buttons that silence the alerts of a job or check.
function snoozeButtons(subject, one) {
  const until = (seconds, words) => button(words, () => withToast(() =>
    post("snooze", { subject, until: seconds ? Math.round(now() + seconds)
      : 0 }), seconds ? `Quiet for ${roughDuration(seconds)}`
    : "Alerts again"));
  return isSnoozed(one) ? until(0, "Wake up")
    : [until(3600, "Snooze 1 h"), until(86400, "1 d")];
}

const isCheck = (one) => "methods" in one;
const needsAttention = (one) => BAD.has(one.state) && !isSnoozed(one);
const checkState = (check) => check.started && check.state === "up"
  ? "running" : check.state;
const origin = () => session.server || location.origin;
const pingUrl = (check) => `${origin()}/ping/${check.id}`;

// Returns the cells of a job's row.
function jobCells(job, host, onTop) {
  const { last } = job, end = last && endOfRun(last);
  return { state: job.state, name: job.label, href: `#/job/${job.id}`,
    title: job.command, where: onTop
      ? `${hostName(job.host)}${job.section ? ` / ${job.section}` : ""}`
      : job.user !== "root" ? job.user : "",
    words: el("span", { text: job.words, title: job.when }),
    last: last ? [link(`#/run/${last.id}`, timeNode(last.ended
      || timeOfRun(last), host)), muted(last.started && end !== "running"
      ? shortDuration(durationOf(last)) : ""), end !== "running"
      && end !== "exit 0" && el("span", { class: "exit", text: end })]
      : muted("never ran"),
    history: job.recent_runs.length > 0 && historyBar(job.recent_runs, host),
    spark: sparkline(job.recent_runs, job.usual),
    next: job.next ? timeNode(job.next, host) : muted(nextWords(job)),
    act: canRun(job) && runLink(job),
    why: job.failing && failingLine(job, job.failing, host) };
}

// The line that explains a failing job, with what one would do next.
function failingLine(job, { since, count, last_ok: good, line }, host) {
  const { last } = job;
  return el("div", { class: "why", role: "cell" }, line && el("pre", {
    text: visible(line), title: "the last line of its output" }),
  muted("failing for ", timeNode(since, host, () => roughDuration(now()
    - since)), `, ${plural(count, "run")}; `, good ? ["last ok ",
    dateNode(good, host)] : "never ok in what is kept"),
  el("span", { class: "row-actions" },
    last && linkButton(`#/run/${last.id}`, "Output"),
    last && good && linkButton(`#/run/${last.id}?diff`,
      ["Diff", el("span", { class: "roomy", text: " with last good" })]),
    isOperator() && snoozeButtons(`job:${job.id}`, job)));
}

// Returns the cells of a check's row.
function checkCells(check) {
  return { state: checkState(check), name: check.name || check.slug,
    href: `#/check/${check.id}`, title: check.desc, where: check.tags || "",
    words: el("span", { text: check.words }),
    last: check.last_ping ? [timeNode(check.last_ping),
      muted(shortDuration(check.last_duration))] : muted("no ping yet"),
    history: check.recent_runs.length > 0 && historyBar(
      check.recent_runs, null, () => `#/check/${check.id}`),
    spark: sparkline(check.recent_runs, null),
    next: check.next ? timeNode(check.next) : muted({ paused: "paused",
      down: "overdue" }[check.state] || "waits for a ping"),
    act: copyButton(pingUrl(check), "URL") };
}

// One row of the list, of a job or a check.
class JobRow {
  constructor() {
    this.root = el("div", { class: "row", role: "row" });
    this.root.row = this;
    this.link = el("a");        // it stays, because it has the focus
  }

  // Draws the row again if its job, or how it is shown, has changed.
  update(job, onTop) {
    const host = hostOf(job), seen = [job, host?.name, host?.zone, onTop,
      isSnoozed(job), isPaused(job), phone.matches, wide.matches];
    if (this.seen && seen.every((one, at) => one === this.seen[at])) return;
    Object.assign(this, { job, seen });
    const focusable = () => [...this.root.querySelectorAll(
      "a, button, .bars")];
    const focused = focusable().indexOf(document.activeElement);
    this.draw(isCheck(job) ? checkCells(job) : jobCells(job, host, onTop));
    focusable()[focused]?.focus({ preventScroll: true });
    if (jobList?.focused === this.root) jobList.letTabReach(this.root, 0);
  }

  // Shows the cells that jobCells or checkCells returned.
  draw(cells) {
    const { state, name, href, title, where, why } = cells;
    const cell = (kind, ...inside) => el("div", { class: `c-${kind}`,
      role: "cell" }, ...inside);
    setAttributes(this.link, { text: name, href, title });
    this.root.replaceChildren(cell("is", stateMark(state),
      isSnoozed(this.job) && muted(" snoozed"),
      isPaused(this.job) && muted(" paused")),
    cell("name", this.link, muted(where)), ...["words", "last", "history",
      "spark", "next", "act"].map((kind) => cell(kind, cells[kind])),
    ...why ? [why] : []);
  }
}

const STATE_FILTERS = [     // what is counted, its word, whether one fits
  ["", "All", () => true],
  ["bad", "Needs attention", (one) => BAD.has(one.state)],
  ["running", "Running", (one) => one.running?.length || one.started],
  ["unknown", "Unknown", (one) => one.state === "unknown"],
];

// The list and its toolbar. It stays while other views are shown.
class JobList {
  constructor() {
    this.rows = new Map();
    this.groups = new Map();
    this.focused = null;
    this.body = el("div", { class: "jobs", role: "table",
      "aria-label": "Jobs", onfocusin: (event) => this.setFocused(
        event.target.closest(".row")) });
    this.none = el("div");
    this.bar = this.toolbar();
    this.root = el("div", { class: "view" }, el("h1", { class: "away",
      text: "Jobs" }), this.bar, this.body, this.none);
    for (const query of [phone, wide]) {
      query.addEventListener("change", () => this.root.isConnected
        && this.update());
    }
  }

  // Returns the filter's fields.
  toolbar() {
    const set = (name, value) => {
      jobFilter[name] = value;
      this.filter();
    };
    this.text = el("input", { type: "search", placeholder:
      "Filter jobs  ( / )", "aria-label": "Filter jobs",
    value: jobFilter.text, autocomplete: "off",
    oninput: () => set("text", this.text.value), onkeydown: (event) => {
      if (event.key === "Enter") this.step(1);
    } });
    this.host = el("select", { "aria-label": "Host",
      onchange: () => set("host", this.host.value) });
    this.chips = STATE_FILTERS.map(([state, word]) => button([word,
      el("b")], () => set("state", state), { class: "btn chip",
      "data-state": state }));
    return el("div", { class: "toolbar" }, this.text, this.host,
      el("div", { class: "chips", role: "group",
        "aria-label": "Filter by state" }, this.chips));
  }

  update(changes) {
    if (changes && !["all", "jobs", "hosts", "checks", "deleted"].some(
      (kind) => changes[kind])) return;
    const focus = document.activeElement;
    this.draw(groupedJobs());
    this.filter();
    if (focus !== document.activeElement && this.root.contains(focus)) {
      focus.focus({ preventScroll: true });
    }
  }

  // Draws the groups, and forgets rows and groups that have left.
  draw(groups) {
    const keys = new Set();
    arrange(this.body, groups.map((group) => {
      keys.add(group.key);
      const shown = this.group(group);
      arrange(shown.root, [shown.head, ...group.items.map((item) => {
        const key = isCheck(item) ? item.id : +item.id;
        if (!this.rows.has(key)) this.rows.set(key, new JobRow());
        keys.add(key);
        this.rows.get(key).update(item, group.key === "!");
        return this.rows.get(key).root;
      }), ...group.items.length ? [] : [shown.hint]]);
      return shown.root;
    }));
    for (const map of [this.rows, this.groups]) {
      for (const key of map.keys()) if (!keys.has(key)) map.delete(key);
    }
  }

  // Returns the elements of a group; its heading is drawn when it differs.
  group({ key, id, section: name, items }) {
    if (!this.groups.has(key)) {
      this.groups.set(key, { head: el("div", { class: "head", role: "row" }),
        root: el("section", { class: `group ${key === "!" ? "attention"
          : ""}`, role: "rowgroup" }) });
    }
    const group = this.groups.get(key), host = state.hosts.get(id);
    const seen = JSON.stringify([host?.state, host?.name, host?.seen > 0]);
    if (group.seen !== seen) {
      Object.assign(group, { id, seen, title: id && hostHeading(id),
        hint: el("p", { class: "hint muted" }, id ? ["No jobs yet. On ",
          hostName(id), " type ", code("koitab -e"), "."] : "None yet. A "
          + "check is a URL that a job elsewhere pings; it tells when the "
          + "ping stays away.") });
      group.head.replaceChildren(el("div", { role: "columnheader" },
        id ? [group.title, name && el("h3", { text: name })]
          : key === "!" ? el("h2", { text: "Needs attention" })
            : checksHeading()));
    }
    group.root.group = group;
    return group;
  }

  // Hides the rows that do not fit the filter, and counts them by state.
  filter() {
    const { host, state: wanted } = jobFilter;
    const text = jobFilter.text.toLowerCase(), counts = {};
    const fits = STATE_FILTERS.find(([state]) => state === wanted)?.[2]
      || ((job) => job.state === wanted);
    let shown = 0;
    for (const { job, root } of this.rows.values()) {
      const near = (!host || job.host === host)
        && (!text || searchable(job).includes(text));
      for (const [state, , is] of STATE_FILTERS) {
        counts[state] = (counts[state] || 0) + (near && is(job) ? 1 : 0);
      }
      root.hidden = !near || !fits(job);
      shown += root.hidden ? 0 : 1;
    }
    const isFiltered = Boolean(text || host || wanted);
    this.showGroups(isFiltered);
    this.showChips(counts);
    this.showHosts();
    this.showNone(isFiltered && !shown);
  }

  // A host's name is shown above the first of its groups that is shown.
  showGroups(isFiltered) {
    let lastHost = "";
    for (const root of this.body.children) {
      root.hidden = isFiltered && ![...root.children].some((one) => one.row
        && !one.hidden);
      const { id, title } = root.group;
      if (root.hidden || !id) continue;
      title.hidden = id === lastHost;
      lastHost = id;
    }
  }

  showChips(counts) {
    for (const chip of this.chips) {
      const { state } = chip.dataset, isChosen = state === jobFilter.state;
      chip.lastChild.textContent = counts[state] || 0;
      chip.setAttribute("aria-pressed", String(isChosen));
      chip.hidden = !counts[state] && state !== "" && !isChosen;
    }
  }

  showHosts() {
    const hosts = [...state.hosts.values()].sort(byName);
    const seen = hosts.map((host) => host.id + host.name).join();
    if (this.host.seen !== seen) {
      this.host.seen = seen;
      this.host.replaceChildren(...select({}, [["", "All hosts"],
        ...hosts.map((host) => [host.id, host.name])]).children);
    }
    this.host.value = jobFilter.host;
    this.host.hidden = hosts.length < 2;
  }

  showNone(isNoneFit) {
    const isEmpty = !state.jobs.size && !state.checks.size
      && !state.hosts.size;
    this.body.hidden = this.bar.hidden = isEmpty;
    const search = jobFilter.text && link(`#/search?q=${
      encodeURIComponent(jobFilter.text)}`, "Search all outputs for it");
    this.none.replaceChildren(isEmpty ? noHosts() : isNoneFit
      ? empty("No job fits the filter", el("p", {}, button("Clear filter",
        () => this.clear()), " ", search)) : "");
  }

  clear() {
    Object.assign(jobFilter, { text: "", host: "", state: "" });
    this.text.value = "";
    this.filter();
  }

  // Moves the focus from name to name, for j and k.
  step(by) {
    const rows = [...this.body.querySelectorAll(".row:not([hidden])")];
    const at = rows.indexOf(this.focused);
    const next = rows[Math.min(Math.max(at + by, 0), rows.length - 1)];
    next?.row.link.focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  // Only the history of the focused row is reached by Tab.
  setFocused(row) {
    if (row === this.focused || !row) return;
    this.letTabReach(this.focused || this.body, -1);
    this.focused = row;
    this.letTabReach(row, 0);
  }

  letTabReach(row, tabindex) {
    $(".bars", row)?.setAttribute("tabindex", tabindex);
  }

  runFocused() {
    const job = this.focused?.row.job;
    if (job && !isCheck(job) && canRun(job)) return go(`job/${job.id}/run`);
    showToast("This job runs by its schedule; r runs those that are "
      + "@manual.");
  }
}

// Returns groups {key, id, section, items} in the order of the list: what
// needs attention, the sections of each host, the checks.
function groupedJobs() {
  const jobs = [...state.jobs.values()], checks = [...state.checks.values()];
  const urgent = [...jobs, ...checks].filter(needsAttention).sort(worstFirst);
  const groups = urgent.length ? [{ key: "!", items: urgent }] : [];
  const ofHosts = new Map([...state.hosts.keys()].map((id) => [id, []]));
  for (const job of jobs) {
    if (!ofHosts.has(job.host)) ofHosts.set(job.host, []);
    ofHosts.get(job.host).push(job);
  }
  const ids = [...ofHosts.keys()].map((id) => ({ id, name: hostName(id) }))
    .sort(byName);
  for (const { id } of ids) {
    const own = ofHosts.get(id), sections = new Map(own.length ? []
      : [["", []]]);
    for (const job of own.filter((one) => !needsAttention(one))) {
      if (!sections.has(job.section)) sections.set(job.section, []);
      sections.get(job.section).push(job);
    }
    for (const [name, items] of [...sections].sort(([a], [b]) =>
      (a !== "") - (b !== ""))) {
      groups.push({ key: `${id}\n${name}`, id, section: name, items });
    }
  }
  if (jobs.length + checks.length) {
    groups.push({ key: "checks", items: checks.filter((one) =>
      !needsAttention(one)) });
  }
  return groups;
}

const byName = (a, b) => a.name < b.name ? -1 : a.name > b.name ? 1 : 0;
const searchable = (job) => [job.label, job.name, job.section, job.command,
  job.user, job.tags, job.slug, job.when, job.words, hostName(job.host)]
  .join(" ").toLowerCase();

// Orders by the rank of the state, then the latest first.
function worstFirst(a, b) {
  const since = (one) => one.failing?.since || one.last_ping || 0;
  return STATES[a.state][1] - STATES[b.state][1] || since(b) - since(a);
}

// Makes `nodes` the children of `parent`; a node moves only if it must.
function arrange(parent, nodes) {
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) {
      parent.insertBefore(node, parent.children[at]);
    }
  });
  while (parent.children.length > nodes.length) parent.lastChild.remove();
}

// Returns a host's name and, if it is not up, why.
function hostHeading(id) {
  const host = state.hosts.get(id);
  return el("h2", {}, hostName(id), host && host.state !== "up"
    && el("span", { class: "hoststate" }, icon("unknown"),
      hostStateWords(host)));
}

function hostStateWords(host) {
  if (host.state === "left") return "has left the dashboard";
  if (host.state === "duplicate") return "two daemons use this host\u2019s "
    + "identity";
  if (host.state === "new" || !host.seen) return "has not called yet";
  return [host.state === "down" ? "silent, last heard " : "heard ",
    timeNode(host.seen, host)];
}

const checksHeading = () => [el("h2", {}, "Checks",
  muted("what pings in from elsewhere")), isOperator()
  && linkButton("#/check/new", "New check")];

const noHosts = () => empty("No host has joined this dashboard yet",
  el("p", {}, "On a machine with koi, type:"), joinCommands(),
  mutedLine("Its jobs show here within a second."),
  isOperator() && el("p", {}, "Or let something that is not koi\u2019s "
    + "report by a URL: ", link("#/check/new", "New check")));

const joinCommands = () => [snippet(`koitab -d join ${origin()}/#${
  state.dash.id}`), snippet("koitab status")];

// --- output: from bytes to lines, as a terminal would show them ------------

const NOTE = 0, STDERR = 2, FRAMES_END = 3;     // streams of section RunFile

// Returns the whole frames at the start of `bytes`, each as [stream, ms since
// the start, data], and how many bytes they take.
function framesOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const frames = [];
  let at = 0;
  while (at + 9 <= bytes.length) {
    const size = view.getUint32(at + 5, true);
    if (at + 9 + size > bytes.length) break;    // the rest comes later
    frames.push([bytes[at], view.getUint32(at + 1, true),
      bytes.subarray(at + 9, at + 9 + size)]);
    at += 9 + size;
  }
  return { frames, used: at };
}

// Yields a run's output as pieces {frames, live}, from its first frame on.
// With `follow` it waits for more until the run has ended.
async function* outputOf(id, { signal, follow } = {}) {
  const note = (text) => [NOTE, 0, utf8(text)];
  let at = 0, live = false, more = true;
  while (more) {
    const path = `runs/${id}/output?from=${at}&len=${2 ** 20}`;
    try {
      const reply = await fetched(path + (live ? "&wait=10" : ""), { signal });
      const bytes = new Uint8Array(await reply.arrayBuffer());
      const { frames, used } = framesOf(bytes);
      const skipped = +reply.headers.get("X-Koi-From") - at;
      live = reply.headers.get("X-Koi-Live") === "1";
      if (skipped > 0) {
        at += skipped;
        frames.unshift(note(`${bytesWords(skipped)} are left out until the `
          + "run has ended"));
      }
      at += used;
      more = bytes.length ? live || at < +reply.headers.get("X-Koi-Size")
        : live && follow;
      if (bytes.length && !used) {
        frames.push(note("what is kept here cannot be read"));
        more = false;
      }
      yield { frames, live };
    } catch (error) {
      const final = error.name === "AbortError" || error.status > 0
        && error.status < 500;
      if (final || !live || !follow) throw error;
      await pause(2000);
    }
  }
}

const isBidi = (c) => c >= 0x202a && c <= 0x202e || c >= 0x2066
  && c <= 0x206f || c === 0x200e || c === 0x200f || c === 0x61c;
const isControl = (c) => c < 0x20 || c >= 0x7f && c < 0xa0 || isBidi(c)
  || c === 0x2028 || c === 0x2029 || c === 0xfeff;

// Returns a control character as visible text: ^G, <U+202E>.
function controlWord(c) {
  if (c < 0x20 || c === 0x7f) return `^${String.fromCharCode(c ^ 64)}`;
  if (c < 0xa0) return `<${c.toString(16)}>`;
  return `<U+${c.toString(16).toUpperCase().padStart(4, "0")}>`;
}

// Returns `text` with its control characters, except tabs, made visible.
function visible(text) {
  return Array.from({ length: text.length }, (_, at) => {
    const c = text.charCodeAt(at);
    return isControl(c) && c !== 9 ? controlWord(c) : text[at];
  }).join("");
}

const visibleLines = (text) => text.split("\n").map(visible).join("\n");

const NO_STYLE = { fg: null, bg: null, bold: false, dim: false, italic: false,
  under: false, inverse: false, strike: false, href: "", err: false,
  control: false };
const MOST_STYLES = 2000, LONGEST_ESCAPE = 4096, LONGEST_SGR = 256;
const LONGEST_LINE = 32768, LONGEST_LINK = 2048;
const SGR_CODES = { 1: { bold: true }, 2: { dim: true }, 3: { italic: true },
  4: { under: true }, 7: { inverse: true }, 9: { strike: true },
  22: { bold: false, dim: false }, 23: { italic: false },
  24: { under: false }, 27: { inverse: false }, 29: { strike: false },
  39: { fg: null }, 49: { bg: null } };

// Returns the colour of SGR numbers "5;n" or "2;r;g;b", or undefined.
function colourOf([kind, ...rest]) {
  const isByte = (n) => n >= 0 && n <= 255;
  if (kind === 5 && isByte(rest[0])) return rest[0];
  const rgb = rest.slice(0, 3);
  return kind === 2 && rgb.length === 3 && rgb.every(isByte)
    ? `rgb(${rgb.join()})` : undefined;
}

// Returns `style` changed by SGR numbers. "38:2::1:2:3" is "38;2;1;2;3" too.
function styledBy(style, text) {
  const after = { ...style }, codes = text.split(";");
  for (let i = 0; i < codes.length; i += 1) {
    const [n, ...sub] = codes[i].split(":").map(Number);
    if (n === 0) Object.assign(after, NO_STYLE, { href: style.href });
    else if (n === 38 || n === 48) {
      const list = sub.length ? sub[0] === 2 && sub.length > 4
        ? [2, ...sub.slice(2)] : sub : codes.slice(i + 1, i + 5).map(Number);
      const colour = colourOf(list);
      if (colour !== undefined) after[n === 38 ? "fg" : "bg"] = colour;
      if (!sub.length) i += list[0] === 5 ? 2 : list[0] === 2 ? 4 : 0;
    } else if (n === 4 && sub[0] === 0) after.under = false;
    else if (SGR_CODES[n]) Object.assign(after, SGR_CODES[n]);
    else if (n >= 30 && n <= 37) after.fg = n - 30;
    else if (n >= 40 && n <= 47) after.bg = n - 40;
    else if (n >= 90 && n <= 97) after.fg = n - 82;
    else if (n >= 100 && n <= 107) after.bg = n - 92;
  }
  return after;
}

const TEXT = 0, ESCAPE = 1, CSI = 2, STRING = 3, STRING_END = 4, CHARSET = 5;

// The lines of an output, both streams in one: \r goes back to the start of
// the line, \b one column, ESC[K clears, \n ends it. Its time is linear in the
// number of bytes, whatever they are.
class Terminal {
  constructor() {
    this.lines = [];        // the finished ones
    this.styles = new Map();
    this.style = NO_STYLE;
    this.streams = {};
    this.number = 1;
    this.begin(1);
  }

  // Begins a line; its number is 0 where it continues the line before.
  begin(number) {
    this.line = { cells: [], styles: [], at: null, err: false, note: false,
      number };
    this.column = 0;
  }

  // Returns the one object for a style, so that equal ones are identical.
  shared(style) {
    const key = JSON.stringify(style);
    if (!this.styles.has(key)) {
      if (this.styles.size >= MOST_STYLES) return NO_STYLE;
      this.styles.set(key, style);
    }
    return this.styles.get(key);
  }

  feed(stream, ms, bytes) {
    if (stream === NOTE) return this.note(ms, bytes);
    if (stream >= FRAMES_END) return;
    const reader = this.streams[stream] ||= { mode: TEXT, held: "", size: 0,
      decoder: new TextDecoder("utf-8", { ignoreBOM: true }) };
    this.write(reader, stream === STDERR, ms,
      reader.decoder.decode(bytes, { stream: true }));
  }

  // Writes decoded text; `reader` holds the state of its stream.
  write(reader, err, ms, text) {
    let base = this.style, style = this.shared({ ...base, err });
    for (let i = 0; i < text.length; i += 1) {
      const c = text.charCodeAt(i);
      if (reader.mode !== TEXT) {
        if (!this.escape(reader, text[i], c)) i -= 1;
      } else if (c >= 0x20 && c < 0x7f) {
        this.put(text[i], style, ms);
      } else if (c === 0x1b) {
        Object.assign(reader, { mode: ESCAPE, held: "", size: 0 });
      } else if (c === 10) this.end();
      else if (c === 13) this.column = 0;
      else if (c === 8) this.column = Math.max(0, this.column - 1);
      else if (isControl(c) && c !== 9) {
        this.put(controlWord(c), this.shared({ ...style, control: true }), ms);
      } else if (c >= 0xd800 && c < 0xdc00 && i + 1 < text.length) {
        this.put(text[i] + text[i += 1], style, ms);
      } else this.put(text[i], style, ms);
      if (this.style !== base) {
        base = this.style;
        style = this.shared({ ...base, err });
      }
    }
  }

  // Puts one character at the cursor.
  put(cell, style, ms) {
    const line = this.line;
    line.cells[this.column] = cell;
    line.styles[this.column] = style;
    this.column += 1;
    if (line.at === null) line.at = ms;
    if (style.err) line.err = true;
    if (this.column >= LONGEST_LINE) this.breakLine();
  }

  end() {
    this.lines.push(this.line);
    this.number += 1;
    this.begin(this.number);
  }

  // Ends the row shown, not the line: what follows has no number.
  breakLine() {
    if (!this.line.cells.length) return;
    this.lines.push(this.line);
    this.begin(0);
  }

  // Adds a note of koi's between the lines of the job.
  note(ms, bytes) {
    this.breakLine();
    this.lines.push({ cells: [`koi: ${visible(new TextDecoder().decode(
      bytes))}`], styles: [NO_STYLE], at: ms, err: false, note: true,
    number: 0 });
  }

  // Takes one character of an escape sequence; false if it is text instead.
  escape(reader, char, c) {
    reader.size += 1;
    if (c === 10 || reader.size > LONGEST_ESCAPE) {
      reader.mode = TEXT;
      return false;
    }
    if (c === 0x1b) {
      reader.mode = reader.mode === STRING ? STRING_END : ESCAPE;
    } else if (reader.mode === ESCAPE) {
      reader.held = char === "]" ? "]" : "";
      reader.mode = char === "[" ? CSI : "]PX^_".includes(char) ? STRING
        : "()*+-./#% ".includes(char) ? CHARSET : TEXT;
    } else if (reader.mode === CSI) this.control(reader, char, c);
    else if (reader.mode === STRING_END) {
      this.endString(reader);
      return char === "\\";
    } else if (reader.mode === STRING) {
      if (c === 7 || c === 0x9c) this.endString(reader);
      else reader.held += reader.held.length < LONGEST_LINK ? char : "";
    } else reader.mode = TEXT;      // the B of ESC ( B
    return true;
  }

  // Takes one character of ESC [: K erases, m sets the style.
  control(reader, char, c) {
    if (c < 0x40 || c > 0x7e) {
      if (reader.held.length < LONGEST_SGR) reader.held += char;
      return;
    }
    reader.mode = TEXT;
    if (char === "K") this.erase(reader.held);
    if (char === "m" && /^[\d;:]*$/.test(reader.held)
        && reader.held.length < LONGEST_SGR) {
      this.style = this.shared(styledBy(this.style, reader.held));
    }
  }

  // ESC [ K: erases to the end of the line (0), to its start (1), all (2).
  erase(how) {
    const { cells, styles } = this.line;
    if (["", "0", "2"].includes(how)) {
      cells.length = styles.length = Math.min(cells.length, this.column);
    }
    if (how === "1" || how === "2") {
      const end = Math.min(this.column, cells.length);
      cells.fill(" ", 0, end);
      styles.fill(NO_STYLE, 0, end);
    }
  }

  // OSC 8 begins a link, to the web or to nothing; other strings do nothing.
  endString(reader) {
    reader.mode = TEXT;
    const match = reader.held.match(/^\]8;[^;]*;(.*)$/s);
    if (match) {
      this.style = this.shared({ ...this.style, href: webAddress(match[1]) });
    }
  }
}

// Returns an http or https URL as the browser writes it, or "".
function webAddress(text) {
  if (!text || text.length >= LONGEST_LINK) return "";
  try {
    const url = new URL(text);
    return ["http:", "https:"].includes(url.protocol) ? url.href : "";
  } catch {
    return "";
  }
}

// Returns a line of output as it would be seen, without its colours.
function withoutEscapes(text) {
  const terminal = new Terminal();
  terminal.feed(1, 0, utf8(text));
  return [...terminal.lines, terminal.line].map(textOf).join(" ");
}

const textOf = (line) => Array.from(line.cells, (cell) => cell ?? " ")
  .join("");

// --- output: from lines to elements ----------------------------------------

const MOST_SPANS = 400;     // in one line; the rest of it is not coloured

// Appends the text of a line to `node`, a span for each stretch of one style.
function paint(node, { cells, styles }) {
  let from = 0, spans = 0;
  for (let at = 1; at <= cells.length; at += 1) {
    if (at < cells.length && (styles[at] === styles[from]
        || spans >= MOST_SPANS)) continue;
    node.append(spanOf(textOf({ cells: cells.slice(from, at) }),
      spans < MOST_SPANS && styles[from] || NO_STYLE));
    spans += 1;
    from = at;
  }
}

// Returns a text or, where it has a style, an element.
function spanOf(text, style) {
  if (style === NO_STYLE) return text;
  const names = ["bold", "dim", "italic", "under", "strike", "err",
    "control"].filter((name) => style[name]);
  let { fg, bg } = style;
  if (style.inverse) [fg, bg] = [bg ?? "paper", fg ?? "text"];
  const node = style.href ? el("a", { href: style.href, target: "_blank",
    rel: "noopener noreferrer" }) : el("span");
  setColour(node, names, "f", "color", fg);
  setColour(node, names, "g", "backgroundColor", bg);
  if (names.length) node.className = names.join(" ");
  else if (fg === null && bg === null && !style.href) return text;
  node.textContent = text;
  return node;
}

// The theme has classes for the first 16 colours; the others are exact.
function setColour(node, names, prefix, property, colour) {
  if (colour === null) return;
  if (colour < 16 || colour === "paper" || colour === "text") {
    names.push(prefix + colour);
  } else {
    node.style[property] = typeof colour === "number" ? cubeColour(colour)
      : colour;
  }
}

// Returns colour `n` of a terminal's 6 x 6 x 6 cube or grey scale.
function cubeColour(n) {
  if (n >= 232) return `rgb(${[0, 0, 0].fill(8 + (n - 232) * 10)})`;
  const level = (value) => value ? 55 + value * 40 : 0, at = n - 16;
  return `rgb(${[level(Math.floor(at / 36)), level(Math.floor(at / 6) % 6),
    level(at % 6)]})`;
}

// --- output: the viewer of one run -----------------------------------------

const LINE_HEIGHT = 18;     // pixels, as in the style sheet
const BLOCK_LINES = 500, MOST_LINES = 900000, MOST_MATCHES = 1000;
const TIME_COLUMNS = ["off", "since", "clock"];

// All lines are kept; elements are made for the blocks of lines that come
// near the screen, so that 4 MiB show at once.
class OutputViewer {
  constructor(run, host, place) {
    Object.assign(this, { run, host, place, terminal: new Terminal(),
      blocks: [], count: 0, live: false, following: false, unseen: 0,
      query: "", matches: [], match: -1, abort: new AbortController(),
      times: preferences.get("times", "off") });
    this.wrap = preferences.get("wrap", phone.matches ? "on" : "off") === "on";
    this.unfinished = el("div");
    this.sheet = el("div", { class: "sheet" }, this.unfinished);
    this.pane = el("div", { class: "pane", role: "log", "aria-live": "off",
      "aria-label": "Output", tabindex: 0, onscroll: () => this.scrolled() },
    this.sheet);
    this.newer = button("", () => this.setFollow(true),
      { class: "btn primary newer", hidden: true });
    this.root = el("section", { class: "output", "aria-label": "Output" },
      this.bar(), this.pane, this.newer);
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.drawBlock(target.block);
      }
    }, { root: this.pane, rootMargin: "900px 0px" });
    this.show();
  }

  // Returns the bar above the output.
  bar() {
    const toggle = (text, title, action) => button(text, action, { title,
      class: "btn toggle", "aria-pressed": "false" });
    this.finder = el("input", { type: "search", placeholder: "Find",
      "aria-label": "Find in this output", autocomplete: "off",
      oninput: () => {
        clearTimeout(this.findTimer);
        this.findTimer = setTimeout(() => this.find(), 350);
      }, onkeydown: (event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        if (this.finder.value.toLowerCase() !== this.query) this.find();
        else this.step(event.shiftKey ? -1 : 1);
      } });
    this.found = el("span", { class: "muted found", role: "status" });
    this.steps = [["left", -1, "Hit before"], ["right", 1, "Next hit"]].map(
      ([name, by, label]) => button(icon(name), () => this.step(by),
        { class: "btn quiet", "aria-label": label, hidden: true }));
    this.buttons = {
      err: toggle("stderr", "Only lines of stderr", () => this.onlyErr()),
      times: toggle("Times", "Times: off, since the start, by the clock",
        () => this.nextTimes()),
      wrap: toggle("Wrap", "Wrap long lines (w)", () => this.setWrap()),
      follow: toggle("Follow", "Follow the end (f)",
        () => this.setFollow(!this.following)),
    };
    return el("div", { class: "bar" }, el("span", { class: "finding" },
      this.finder, this.found, this.steps), el("span", { class: "grow" }),
    Object.values(this.buttons), button("Copy", () => this.copy()),
    button("Download", () => this.download()));
  }

  // Shows the state of the buttons and the columns.
  show() {
    const digits = String(this.terminal.number).length;
    this.pane.style.setProperty("--digits", `${Math.max(digits, 4)}ch`);
    const press = (name, is) => this.buttons[name].setAttribute(
      "aria-pressed", String(is));
    press("wrap", this.wrap);
    press("times", this.times !== "off");
    press("follow", this.following);
    this.buttons.follow.hidden = !this.live;
    this.pane.classList.toggle("wrap", this.wrap);
    this.pane.dataset.times = this.times;
  }

  // --- reading and drawing

  // Reads the output, to the run's end if it is running.
  async load() {
    let placed = false;
    try {
      for await (const { frames, live } of outputOf(this.run.id,
        { signal: this.abort.signal, follow: true })) {
        this.live = live;
        this.add(frames);
        if (live && !placed) this.goToPlace();
        placed ||= live;
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.add([[NOTE, 0, utf8(`${error.message} ${error.hint}`)]]);
    }
    this.live = this.following = false;
    this.newer.hidden = true;
    this.terminal.breakLine();
    this.addLines();
    if (!this.blocks.length) return this.showNothing();
    if (!placed) this.goToPlace();
  }

  // Shows why there is no output.
  showNothing() {
    this.root.classList.add("bare");
    this.root.replaceChildren(el("p", { class: "nothing",
      text: nothingWords(this.run) }));
  }

  // Feeds frames to the terminal, up to the most lines that are shown.
  add(frames) {
    const { terminal } = this;
    for (const frame of frames) {
      if (terminal.lines.length < MOST_LINES) terminal.feed(...frame);
      else if (!this.full) {
        this.full = true;
        terminal.note(0, utf8("there are more lines: download them"));
      }
    }
    this.addLines();
  }

  // Puts lines that the terminal has finished into blocks.
  addLines() {
    const { lines, line } = this.terminal;
    const fresh = lines.slice(this.count);
    this.count = lines.length;
    const numbered = fresh.filter(({ number }) => number).length;
    while (fresh.length) {
      let block = this.blocks[this.blocks.length - 1];
      if (!block || block.lines.length >= BLOCK_LINES) block = this.newBlock();
      const part = fresh.splice(0, BLOCK_LINES - block.lines.length);
      block.lines.push(...part);
      if (block.drawn) block.root.append(...part.map(this.lineNode, this));
      else block.root.style.height = `${block.lines.length * LINE_HEIGHT}px`;
    }
    this.unfinished.replaceChildren(...line.cells.length
      ? [this.lineNode(line)] : []);
    this.show();
    if (this.following) this.scrollToEnd();
    else if (this.live) this.countUnseen(numbered);
  }

  // Counts the new lines below the screen, for the button that goes there.
  countUnseen(added) {
    this.unseen += added;
    this.newer.hidden = !this.unseen;
    this.newer.textContent = `\u2193 ${plural(this.unseen, "new line")}`;
  }

  // Appends an empty block, to be drawn when it comes near the screen.
  newBlock() {
    const block = { root: el("div", { class: "block" }), lines: [],
      drawn: false };
    block.root.block = block;
    this.blocks.push(block);
    this.unfinished.before(block.root);
    this.observer.observe(block.root);
    return block;
  }

  // Makes the elements of a block's lines, once.
  drawBlock(block) {
    if (block.drawn) return;
    block.drawn = true;
    block.root.style.height = "";
    block.root.append(...block.lines.map(this.lineNode, this));
    this.observer.unobserve(block.root);
    if (this.following) this.scrollToEnd();
  }

  // Returns the element of a line: number, time, text.
  lineNode(line) {
    const { number, at } = line, text = el("span", { class: "text" });
    paint(text, line);
    const time = shifted((this.run.started || 0) + at / 1000, this.host);
    const kinds = ["line", line.err && "has-err", line.note && "koi-note",
      this.isMatch(line) && "match"];
    return el("div", { class: kinds.filter(Boolean).join(" ") }, el("a", {
      class: "number", tabindex: -1, "data-n": number || null,
      href: number ? `#/run/${this.run.id}/L${number}` : null }),
    el("span", { class: "time", ...at !== null && {
      "data-since": sinceStart(at), "data-clock": clockSeconds(time) } }),
    text);
  }

  // --- following the end

  scrollToEnd() {
    this.pane.scrollTop = this.pane.scrollHeight;
    this.top = this.pane.scrollTop;
  }

  // Scrolling up ends the following of a live output; to its end, begins it.
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.pane;
    const atEnd = scrollHeight - scrollTop - clientHeight < 24;
    if (this.following && !atEnd && scrollTop < this.top - 4) {
      this.setFollow(false);
    } else if (this.live && atEnd && !this.following
        && scrollTop > this.top) {
      this.setFollow(true);
    }
    this.top = scrollTop;
  }

  // Begins or ends to follow the output of a live run.
  setFollow(is) {
    this.following = is && this.live;
    if (is) {
      this.countUnseen(-this.unseen);
      this.scrollToEnd();
    }
    this.show();
  }

  // --- going to a line

  // Goes to the line in the address, or to the end of a failed or live run.
  goToPlace() {
    const [, line] = this.place.parts, text = this.place.query.get("q");
    if (line) return this.toLine(+line);
    if (text) {
      this.finder.value = text;
      return this.find();
    }
    if (this.live || failedRun(this.run)) {
      if (this.blocks.length) this.drawBlock(this.blocks.at(-1));
      this.scrollToEnd();
    }
    if (this.live) this.setFollow(true);
  }

  toLine(number) {
    this.showLine(this.terminal.lines.findIndex((line) =>
      line.number === number));
  }

  // Draws the line of an index, marks it, and scrolls to it.
  showLine(index) {
    const block = this.blocks[Math.floor(index / BLOCK_LINES)];
    if (!block) return;
    this.setFollow(false);
    this.drawBlock(block);
    const node = block.root.children[index % BLOCK_LINES];
    $(".here", this.sheet)?.classList.remove("here");
    node.classList.add("here");
    node.scrollIntoView({ block: "center" });
  }

  // --- finding

  isMatch(line) {
    return this.query !== ""
      && textOf(line).toLowerCase().includes(this.query);
  }

  // Finds the lines with the text of the field, and shows the first.
  find() {
    clearTimeout(this.findTimer);
    this.query = this.finder.value.toLowerCase();
    this.matches = [];
    this.match = -1;
    this.terminal.lines.forEach((line, index) => {
      if (this.matches.length < MOST_MATCHES && this.isMatch(line)) {
        this.matches.push(index);
      }
    });
    for (const { drawn, root, lines } of this.blocks) {
      if (drawn) lines.forEach((line, at) => root.children[at].classList
        .toggle("match", this.isMatch(line)));
    }
    if (!this.query) $(".here", this.sheet)?.classList.remove("here");
    for (const step of this.steps) step.hidden = !this.matches.length;
    this.found.textContent = this.query ? "no hit" : "";
    this.step(1);
  }

  step(by) {
    const count = this.matches.length;
    if (!count) return;
    this.match = (this.match + by + count) % count;
    this.found.textContent = `${this.match + 1} of ${count}${
      count >= MOST_MATCHES ? "+" : ""}`;
    this.showLine(this.matches[this.match]);
  }

  // --- buttons

  onlyErr() {
    const is = this.pane.classList.toggle("only-err");
    this.buttons.err.setAttribute("aria-pressed", String(is));
  }

  nextTimes() {
    this.times = TIME_COLUMNS[(TIME_COLUMNS.indexOf(this.times) + 1) % 3];
    preferences.set("times", this.times);
    this.show();
  }

  setWrap() {
    this.wrap = !this.wrap;
    preferences.set("wrap", this.wrap ? "on" : "off");
    this.show();
  }

  raw() {
    return fetched(`runs/${this.run.id}/raw`);
  }

  copy() {
    return withToast(async () => copyText(await (await this.raw()).text()));
  }

  download() {
    return withToast(async () => {
      const url = URL.createObjectURL(await (await this.raw()).blob());
      const a = el("a", { href: url, download: `run-${this.run.id}.txt` });
      document.body.append(a);
      a.click();
      a.remove();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
    });
  }

  leave() {
    this.abort.abort();
    this.observer.disconnect();
    clearTimeout(this.findTimer);
  }
}

// Returns a time since the run's start: +0.03, +1:02.5, +2:00:00.
function sinceStart(ms) {
  const s = ms / 1000, minutes = Math.floor(s / 60);
  const seconds = twoDigits(Math.floor(s % 60));
  return s < 60 ? `+${s.toFixed(2)}` : s < 3600
    ? `+${minutes}:${seconds}.${Math.floor(ms % 1000 / 100)}`
    : `+${Math.floor(s / 3600)}:${twoDigits(minutes % 60)}:${seconds}`;
}

// --- run: one run, in a sentence, facts and output -------------------------

const SIGNALS = { 1: "HUP", 2: "INT", 3: "QUIT", 6: "ABRT", 9: "KILL",
  11: "SEGV", 13: "PIPE", 14: "ALRM", 15: "TERM" };
const failedRun = (run) => ["interrupted", "unstartable", "missed"]
  .includes(run.state) || run.state === "done" && run.exit !== 0;

// Returns in words how a run ended, or where it is.
function sentence(run) {
  const time = formatDuration(durationOf(run));
  const why = run.reason ? `: ${run.reason}` : "";
  switch (run.state) {
    case "queued": return "Waits for its turn";
    case "running": return `Running for ${
      roughDuration(durationOf(run) || 0)}`;
    case "missed": return `Missed: it was due and did not start${why}`;
    case "skipped": return `Skipped${why}`;
    case "interrupted": return `Interrupted${why || ": nobody saw its end"}`;
    case "unstartable": return `Could not start${why}`;
  }
  if (run.reason === "timeout") return `Ended at its time limit of ${time}`;
  if (run.signal) {
    return `Killed by signal ${run.signal}${SIGNALS[run.signal]
      ? ` (${SIGNALS[run.signal]})` : ""} after ${time}`;
  }
  return run.exit === 0 ? `Finished in ${time}`
    : `Failed with exit ${run.exit} after ${time}`;
}

// Returns why a run has no output.
function nothingWords(run) {
  if (!run.started) return "It did not start, so there is no output.";
  if (run.have < run.size) return "Its output has not arrived here yet.";
  return run.state === "done" && run.exit === 0
    ? `Finished in ${formatDuration(durationOf(run))} and printed nothing.`
    : `${sentence(run)}, and printed nothing.`;
}

// Returns the state whose mark a run has.
function runState(run) {
  if (run.state === "queued") return "new";
  if (["running", "missed", "skipped"].includes(run.state)) return run.state;
  return failedRun(run) ? "failed" : "ok";
}

// Returns a value as the shell gets it: o'brien is shown as 'o'\''brien'.
const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
const DOTS = "\u2022\u2022\u2022\u2022\u2022\u2022";
const isMasked = (value) => value === "******";

// #/run/ID, #/run/ID/Lnn, #/run/ID?q=TEXT, #/run/ID?diff
function runView(place, root) {
  const id = +place.parts[0];
  let shown = null;
  showLoaded(root, () => get(`runs/${id}`), (answer) => {
    shown = new RunPage(answer, place, root);
    const job = answer.job || state.jobs.get(answer.run.job);
    if (job) app.showTitle(job.label);
  });
  return { title: `run ${id}`, update: (changes) => shown?.update(changes),
    leave: () => shown?.output.leave(), moved(next) {
      if (!shown || +next.parts[0] !== id) return false;
      shown.moved(next);
      return true;
    }, shortcuts: {
      f: () => shown?.output.setFollow(!shown.output.following),
      w: () => shown?.output.setWrap(), r: () => shown?.again(),
      "/": () => shown?.output.finder.focus(),
      j: () => shown?.older && go(`run/${shown.older}`),
      k: () => shown?.newer && go(`run/${shown.newer}`) } };
}

// One run: what happened, its output, and the other runs beside it.
class RunPage {
  constructor({ run, job, good, older, newer }, place, root) {
    Object.assign(this, { run, job, good, older, newer });
    this.host = state.hosts.get(run.host);
    this.output = new OutputViewer(run, this.host, place);
    this.head = el("div", { class: "runhead" });
    this.compared = el("div");
    this.list = el("aside", { class: "runs", "aria-label":
      "Runs of this job" });
    root.classList.add("run");
    root.append(this.list, el("div", { class: "runmain" }, this.head,
      this.compared, this.output.root));
    this.draw();
    this.output.load();
    if (place.query.has("diff")) this.compare();
    if (matchMedia("(min-width: 1100px)").matches) this.listRuns();
  }

  moved(place) {
    if (place.parts[1]) this.output.toLine(+place.parts[1]);
    if (place.query.has("diff")) this.compare();
  }

  update(changes) {
    const run = (changes.runs || []).find((one) => one.id === this.run.id);
    if (run || changes.all) {
      Object.assign(this.run, run);
      this.draw();
    }
    if (changes.jobs && this.list.firstChild
        && state.jobs.has(this.run.job)) this.listRuns();
  }

  // Draws what is above the output.
  draw() {
    const { run, job } = this, mark = runState(run);
    this.head.replaceChildren(el("p", { class: "crumbs" },
      link(`#/job/${run.job}`, job?.label || "a job"), muted(" on "),
      hostName(run.host)),
    titleRow(el("h1", { class: `s-${mark}` }, icon(mark), el("span", {},
      sentence(run), run.ended ? [", ", timeNode(run.ended, this.host)]
        : "")), ...this.actions()), this.facts(),
    factList(Object.entries(run.args).map(([name, value]) => [name,
      isMasked(value) ? el("span", { title: "a secret", text: DOTS })
        : code(visible(quoted(value)))]), "args"));
  }

  // Returns the buttons on the right of the sentence.
  actions() {
    const { run } = this, job = state.jobs.get(this.job?.id) || this.job;
    const other = (id, name, words) => id && linkButton(`#/run/${id}`,
      icon(name), { class: "btn quiet", "aria-label": words.slice(0, -4),
        title: words });
    return [other(this.older, "left", "Older run (j)"),
      other(this.newer, "right", "Newer run (k)"),
      this.good && failedRun(run) && button("Diff with last good",
        () => this.compare()),
      job && canRun(job) && linkButton(`#/job/${job.id}/run`, [icon("run"),
        isLive(run) ? "Run" : "Run again"]),
      run.state === "running" && isOperator() && this.killButton()];
  }

  again() {
    const job = state.jobs.get(this.run.job);
    if (job && canRun(job)) go(`job/${job.id}/run`);
  }

  // Returns the list of facts below the sentence.
  facts() {
    const { run, host } = this;
    const late = run.started && run.due ? run.started - run.due : 0;
    return factList([["Host", hostName(run.host)], ["User", this.job?.user],
      ["Started by", TRIGGERS[run.trigger] || run.trigger],
      ["Due", run.due && dateNode(run.due, host)],
      ["Start", run.started && [dateNode(run.started, host), late >= 60
        && el("span", { class: "late",
          text: ` ${roughDuration(late)} late` })]],
      ["Took", run.ended && formatDuration(durationOf(run))],
      ["Number", `#${run.n}`], ["Attempt", run.attempt > 1 && run.attempt],
      ["Counts for", run.count > 1 && plural(run.count, "start")],
      ["Output", run.bytes > 0 && bytesWords(run.bytes)
        + (run.cut ? ", cut" : "")]]);
  }

  // Lists the runs of the job beside this one.
  async listRuns() {
    const path = `jobs/${this.run.job}/runs?limit=50`;
    const answer = await withToast(() => get(path));
    if (!answer) return;
    const list = el("ol");
    const older = pageButton("Older", list, answer, "runs",
      (run) => this.listItem(run), ({ id }) => `${path}&before=${id}`);
    this.list.replaceChildren(el("h2", { text: "Runs" }), list, older);
  }

  listItem(run) {
    const end = endOfRun(run);
    return el("li", {}, link(`#/run/${run.id}`, [stateMark(runState(run), ""),
      el("span", {}, shortTime(timeOfRun(run), this.host)),
      muted(end === "exit 0" ? shortDuration(durationOf(run)) : end)],
    { "aria-current": run.id === this.run.id && "page" }));
  }

  // The button that asks first, and then kills the run.
  killButton() {
    const host = hostName(this.run.host);
    return button("Kill\u2026", () => {
      const question = el("div", { class: "note question", role: "alertdialog",
        "aria-label": "Kill it?" }, el("span", {}, `End this run of ${
        this.job?.label} on ${host}? It gets SIGTERM, and SIGKILL some `
        + "seconds later."), button(`Kill it on ${host}`, () => {
        question.remove();
        withToast(() => this.kill());
      }, { class: "btn danger" }), button("No", () => question.remove()));
      this.head.append(question);
      $("button", question).focus();
    }, { class: "btn danger" });
  }

  async kill() {
    const { run } = this;
    const sent = await post("requests", signedRequest(run.host, "kill",
      { user: this.job.user, run: run.n, epoch: run.epoch }));
    showToast("Asked the host to end it\u2026");
    const result = await resultOf(sent.nonce, undefined, false);
    if (result.state === "accepted") showToast("The host ends it");
    else showToast(resultWords(result), "bad");
  }

  // Shows or hides the difference from the last good run.
  async compare() {
    if (!this.good) return showToast("There is no good run to compare with.");
    if (this.compared.firstChild) return this.compared.replaceChildren();
    this.compared.replaceChildren(mutedLine("Comparing\u2026"));
    await withToast(async () => {
      const [old, young] = await Promise.all([this.good, this.run.id].map(
        linesToCompare));
      this.compared.replaceChildren(diffNode(old, young, this.good,
        () => this.compared.replaceChildren()));
    });
  }
}

// --- difference: lines that came and lines that went -----------------------

const MOST_COMPARED = 4000, MOST_DIFFERENCES = 1500;

// Returns the first lines of a run's output as texts.
async function linesToCompare(id) {
  const terminal = new Terminal();
  for await (const { frames } of outputOf(id)) {
    for (const frame of frames) terminal.feed(...frame);
    if (terminal.lines.length > MOST_COMPARED) break;
  }
  terminal.breakLine();
  return { lines: terminal.lines.slice(0, MOST_COMPARED).map(textOf),
    cut: terminal.lines.length > MOST_COMPARED };
}

// Returns [sign, line] for each line (" " in both, "-" in the old one, "+" in
// the new one), or null if too much differs. `same` tells whether two lines
// count as equal. The algorithm is Myers' O(ND).
function difference(a, b, same) {
  const trace = [];
  const most = Math.min(a.length + b.length, MOST_DIFFERENCES);
  const reach = new Int32Array(2 * most + 3);
  for (let d = 0; d <= most; d += 1) {
    trace.push(reach.slice());
    for (let k = -d; k <= d; k += 2) {
      const at = k + most + 1;
      let x = isInsertion(reach, k, d, at) ? reach[at + 1]
        : reach[at - 1] + 1;
      while (x < a.length && x - k < b.length && same(a[x], b[x - k])) {
        x += 1;
      }
      reach[at] = x;
      if (x >= a.length && x - k >= b.length) {
        return editSteps(a, b, trace, most);
      }
    }
  }
  return null;
}

const isInsertion = (reach, k, d, at) => k === -d
  || k !== d && reach[at - 1] < reach[at + 1];

// Walks back from the end of both through what each step had reached.
function editSteps(a, b, trace, most) {
  const found = [];
  let x = a.length, y = b.length;
  for (let d = trace.length - 1; d > 0; d -= 1) {
    const reach = trace[d], k = x - y, at = k + most + 1;
    const down = isInsertion(reach, k, d, at);
    const oldX = reach[down ? at + 1 : at - 1];
    const oldY = oldX - (down ? k + 1 : k - 1);
    for (; x > oldX && y > oldY; x -= 1, y -= 1) found.push([" ", b[y - 1]]);
    found.push(down ? ["+", b[oldY]] : ["-", a[oldX]]);
    x = oldX;
    y = oldY;
  }
  for (; x > 0; x -= 1) found.push([" ", b[x - 1]]);
  return found.reverse();
}

const withoutDigits = (line) => line.replace(/\d+/g, "0");

// Returns the difference between two outputs, as linesToCompare gives them.
function diffNode(old, young, good, close) {
  const list = el("div", { class: "difflines" });
  const ignore = el("input", { type: "checkbox", checked: true,
    onchange: () => show() });
  const counts = muted();
  function show() {
    const key = ignore.checked ? withoutDigits : (line) => line;
    const a = old.lines.map(key), b = young.lines.map(key);
    const found = difference(a.map((_, at) => at), b.map((_, at) => at),
      (x, y) => a[x] === b[y])?.map(([sign, at]) => [sign,
      (sign === "-" ? old : young).lines[at]]);
    const count = (sign) => found.filter(([one]) => one === sign).length;
    list.replaceChildren(...diffLines(found));
    counts.textContent = found ? `${count("+")} new, ${count("-")} gone`
      : "";
  }
  show();
  return el("section", { class: "diff", "aria-label": "Difference" },
    el("div", { class: "bar" }, el("h2", {}, "Difference from the last good ",
      link(`#/run/${good}`, "run")), counts, el("span", { class: "grow" }),
    el("label", { class: "check" }, ignore, "Ignore numbers"),
    button("Close", close)), (old.cut || young.cut) && el("p", {
      class: "note", text: `Only the first ${
        MOST_COMPARED.toLocaleString("en")} lines were compared.` }), list);
}

// Returns elements for what differs, with three lines around it; the lines
// between are folded.
function diffLines(found) {
  const note = (text) => [el("p", { class: "note", text })];
  if (!found) {
    return note("These outputs have too little in common to be compared.");
  }
  if (found.every(([sign]) => sign === " ")) {
    return note("Both printed the same.");
  }
  const near = new Set();
  found.forEach(([sign], at) => {
    for (let i = at - 3; sign !== " " && i <= at + 3; i += 1) near.add(i);
  });
  const nodes = [];
  let folded = 0;
  const fold = () => {
    if (folded) nodes.push(el("div", { class: "fold",
      text: plural(folded, "line") + " the same" }));
    folded = 0;
  };
  found.forEach(([sign, line], at) => {
    if (!near.has(at)) { folded += 1; return; }
    fold();
    nodes.push(el("div", { class: { "+": "new", "-": "removed", " ": "" }[sign]
    }, el("span", { class: "sign", text: sign }), line || " "));
  });
  fold();
  return nodes;
}

// --- job: all that is known about one --------------------------------------

// #/job/ID
function jobView(place, root) {
  const id = +place.parts[0], job = state.jobs.get(id);
  if (!job) return lostView(place, root);
  const head = el("div"), list = el("div");
  root.append(head, list);
  const draw = () => head.replaceChildren(...jobHead(state.jobs.get(id)
    || job));
  draw();
  showLoaded(list, () => get(`jobs/${id}/runs?limit=50`), (answer) =>
    list.append(runTable(answer, job)));
  return { title: job.label, shortcuts: { r: () => canRun(job)
    && go(`job/${id}/run`) }, update: (changes) => {
    if (changes.all || (changes.jobs || []).some((one) => one.id === id)) {
      draw();
    }
  } };
}

// Returns what is shown above the runs of a job.
function jobHead(job) {
  const host = hostOf(job), forget = async () => {
    await post("forget", { job: job.id });
    go("jobs");
  };
  return [crumbs(link("#/jobs", "Jobs"), hostName(job.host),
    job.section || null),
  titleRow(el("h1", {}, job.label), canRun(job) && runLink(job),
    linkButton(`#/search?job=${job.id}`, "Search its output"),
    isOperator() && BAD.has(job.state)
      && snoozeButtons(`job:${job.id}`, job),
    isOperator() && job.removed && button("Forget", () =>
      withToast(forget, "Forgotten"), { class: "btn danger" })),
  el("pre", { class: "command", title: "the command" },
    code(visible(job.command))),
  factList([["State", stateMark(job.state)],
    ["Runs", [job.words, " ", code(job.when)]], ["User", job.user],
    ["Next", job.next ? [timeNode(job.next, host), muted(" "), muted(dateNode(
      job.next, host))] : nextWords(job)],
    ["Paused until", isPaused(job) && (job.paused
      ? dateNode(job.paused, host) : code("koitab resume"))],
    ["Usually takes", job.usual && `${formatDuration(job.usual[0])} to ${
      formatDuration(job.usual[1])}`],
    ["Runs by", job.confirm === "cli"
      && "koitab run alone (KOI_CONFIRM=cli)"]]),
  el("div", { class: "wide" }, job.recent_runs.length > 0
    && setAttributes(historyBar(job.recent_runs, host), { tabindex: 0 }))];
}

// Returns the table of a job's runs.
function runTable(answer, job) {
  const host = hostOf(job);
  if (!answer.runs.length) {
    return empty("It has not run yet", el("p", {}, job.manual
      ? "It runs when somebody asks for it." : job.words));
  }
  return pagedTable("Older runs", ["State", "Start", "Took", "End", "By",
    "Last line"], answer, "runs", (run) => tableRow(stateMark(runState(run)),
    link(`#/run/${run.id}`, dateNode(timeOfRun(run), host)),
    el("td", { class: "num" }, run.started
      && formatDuration(durationOf(run))),
    isLive(run) ? "" : endOfRun(run),
    el("td", { class: "muted" }, TRIGGERS[run.trigger] || run.trigger),
    el("td", { class: "message" }, visible(run.line || ""),
      argsWords(run.args))),
  ({ id }) => `jobs/${job.id}/runs?limit=100&before=${id}`, "runs");
}

// Returns the arguments of a run as muted text.
function argsWords(args) {
  const list = Object.entries(args || {});
  return list.length ? muted(" ", list.map(([name, value]) =>
    `${name}=${isMasked(value) ? DOTS : visible(quoted(value))}`)
    .join(" ")) : null;
}

// --- signed requests: what a host believes ---------------------------------

// Returns the key that signs what this host is to do. Throws ApiError.
function keyFor(host) {
  if (!session.keys) throw new ApiError(0, WORDS.viewer);
  return hostKey(session.keys.run, host);
}

// Returns a request that a host carries out once, within five minutes. Its
// times are of this computer's clock: a dashboard that named them could ask
// for a request that is good next week.
function signedRequest(host, action, fields, nonce = randomHex(16)) {
  const key = keyFor(host), body = JSON.stringify({ v: 1, do: action,
    key: keyId(key), dash: session.dash, host, ...fields, nonce,
    iat: Date.now(), exp: Date.now() + 300000 });
  return { host, body, mac: runMac(key, body) };
}

// Returns the jobs that a host itself shows, each with the text it signed.
async function signedJobs(host) {
  const key = keyFor(host);
  let answer;
  try {
    answer = await get(`hosts/${host}/list`);
  } catch (error) {
    if (error.status !== 404) throw error;
    throw new ApiError(404, WORDS.noList);
  }
  if (typeof answer.body !== "string" || !sameText(listMac(key, answer.body),
    answer.mac)) throw new ApiError(0, WORDS.otherKeys);
  const list = JSON.parse(answer.body);
  if (list.v !== 1) {
    throw new ApiError(0,
      "This host speaks another version: reload the page.");
  }
  if (list.dash !== session.dash || list.host !== host
      || list.key !== keyId(key)) throw new ApiError(0, WORDS.otherKeys);
  return list.jobs.map((text) => ({ ...JSON.parse(text), text,
    on: visible(list.name) }));
}

// Compares in a time that does not depend on how far two texts are equal.
function sameText(a, b) {
  if (typeof b !== "string" || a.length !== b.length) return false;
  let different = 0;
  for (let i = 0; i < a.length; i += 1) {
    different |= a.charCodeAt(i) ^ b.charCodeAt(i);
  }
  return different === 0;
}

// Returns the request for a run of `job`, as `spec`, which its host signed,
// describes it. `values` is a Map of the arguments.
function runRequest(job, spec, values) {
  const nonce = randomHex(16), args = {}, secrets = {};
  for (const { name, type } of spec.params) {
    const isSecret = type === "secret", value = values.get(name);
    // An argument may be called __proto__, so it is not simply assigned.
    Object.defineProperty(isSecret ? secrets : args, name, {
      enumerable: true, value: isSecret ? hex(encryptSecret(keyFor(job.host),
        nonce, name, utf8(value))) : value });
  }
  return signedRequest(job.host, "run", { user: spec.user, tag: spec.tag,
    job: digest(spec.text), args, secrets }, nonce);
}

// Returns what the host answered to a request, as soon as it has. A run that
// was accepted gets its number some moments later (`isRun`: wait for it).
async function resultOf(nonce, onWait = () => {}, isRun = true) {
  const until = Date.now() + 310000;
  for (;;) {
    const result = await get(`requests/${nonce}`);
    const early = isRun && result.state === "accepted" && !result.run
      && Date.now() < until - 300000;
    if (result.state !== "waiting" && !early) return result;
    if (Date.now() > until) return { state: "expired" };
    onWait(result);
    await pause(500);
    if (!session.token) throw new DOMException("locked", "AbortError");
  }
}

function resultWords({ state: is, reason }) {
  return is === "refused" ? `The host refused: ${reason}` : is === "expired"
    ? "The host did not take it within 5 minutes; it is void now."
    : "The host accepted it.";
}

// --- form: made from the arguments that the job declares -------------------

const LONGEST_VALUE = 4096, LONGEST_TEXT = 65536;

// The same as Parameter.value_error in koitab.py: why a value is invalid, or
// "".
function valueError({ type, choices }, value) {
  if (type === "int") {
    return /^-?\d{1,18}$/.test(value) ? "" : "an int is 1 to 18 digits";
  }
  if (type === "bool") {
    return ["true", "false"].includes(value) ? "" : "a bool is true or false";
  }
  if (type === "choice") {
    return choices.includes(value) ? ""
      : `choose one of ${choices.join("|")}`;
  }
  if (type === "date") {
    return isDate(value) ? "" : "a date is written 2026-03-29";
  }
  if (/\p{Surrogate}/u.test(value)) return "it is not UTF-8";
  const allowed = type === "text" ? "\n\t" : "\t";
  if ([...value].some((char) => !allowed.includes(char)
      && isUnsafe(char.charCodeAt(0)))) {
    return "it has a control character";
  }
  const most = type === "text" ? LONGEST_TEXT : LONGEST_VALUE;
  return utf8(value).length > most
    ? `it is longer than ${most.toLocaleString("en")} bytes` : "";
}

// UNSAFE in koitab.py.
const isUnsafe = (c) => c < 0x20 || c >= 0x7f && c <= 0x9f || c === 0x61c
  || c === 0x200e || c === 0x200f || c >= 0x2028 && c <= 0x202e
  || c >= 0x2066 && c <= 0x206f || c === 0xfeff;

// Is it a date of the calendar, as 2026-03-29?
function isDate(text) {
  if (!/^\d{4}-\d{2}-\d{2}$/.test(text) || text < "0001") return false;
  const date = new Date(`${text}T00:00:00Z`);
  return !Number.isNaN(+date) && isoDay(date) === text;
}

// #/job/ID/run
function formView(place, root) {
  const id = +place.parts[0], job = state.jobs.get(id);
  if (!job) return lostView(place, root);
  root.classList.add("narrow");
  const title = el("h1", { text: "Run" });
  root.append(crumbs(link("#/jobs", "Jobs"), link(`#/job/${id}`, "the job")),
    title);
  showLoaded(root, () => formData(job), ({ spec, runs }) => {
    // What the host signed is shown, and not what the dashboard says of it.
    title.textContent = `Run ${visible(spec.label)}`;
    const runForm = new RunForm(job, spec, runs);
    root.append(runForm.root);
    (runForm.fields[0]?.input || runForm.send).focus();
  });
  return { title: `Run ${job.label}` };
}

// Returns the job as its host signed it, and its last runs. Throws ApiError
// where it cannot be run from here.
async function formData(job) {
  const [specs, { runs }] = await Promise.all([signedJobs(job.host),
    get(`jobs/${job.id}/runs?limit=20`)]);
  const spec = specs.find((one) => one.tag === job.tag
    && one.user === job.user);
  if (!spec) {
    throw new ApiError(0, "The host\u2019s own list has no such job.",
      "Its tab has changed: reload the page.");
  }
  if (spec.when !== "@manual" || spec.confirm === "cli") {
    throw new ApiError(0, "This job cannot be run from here.",
      spec.confirm === "cli" ? `On the host: koitab run "${spec.label}"`
        : "It runs by its schedule.");
  }
  return { spec, runs };
}

// The form of one job, from its fields to the request.
class RunForm {
  constructor(job, spec, runs) {
    Object.assign(this, { job, spec });
    this.fields = spec.params.map((param, at) => new ArgumentField(param, at,
      () => this.changed()));
    this.preview = el("code");
    this.status = el("div", { class: "status", role: "status" });
    this.send = submitButton([icon("run"), spec.confirm === "yes"
      ? "Run\u2026" : `Run on ${spec.on}`]);
    this.question = el("div", { class: "note question", hidden: true });
    this.root = form({ class: "runform", novalidate: true }, () =>
      this.submit(),
    mutedLine(`Runs on ${spec.on} as `, el("b", { text: spec.user }), "."),
    this.earlierValues(runs), this.fields.map((one) => one.root),
    el("div", { class: "previewed" }, el("h2", { class: "label",
      text: "What will run" }), el("pre", { class: "command" },
      this.preview)), el("div", { class: "actions" }, this.send,
      linkButton(`#/job/${job.id}`, "Cancel", { class: "btn quiet" })),
    this.question, this.status);
    this.changed();
  }

  // The choice of values of earlier runs: each set once, secrets left out.
  earlierValues(runs) {
    const sets = new Map(), names = this.spec.params.map((one) => one.name);
    for (const run of runs) {
      const values = names.filter((name) => Object.hasOwn(run.args, name)
        && !isMasked(run.args[name])).map((name) => [name, run.args[name]]);
      const key = JSON.stringify(values);
      if (values.length && !sets.has(key)) sets.set(key, run);
    }
    if (!sets.size) return null;
    const list = [...sets.values()];
    const input = select({ id: "used", onchange: () => {
      const args = input.value && list[+input.value].args;
      for (const one of this.fields) one.fill(args);
      this.changed();
    } }, [["", "the defaults"], ...list.slice(0, 10).map((run, at) => [
      String(at), `${shortTime(run.requested_at || run.started,
        hostOf(this.job))}: ${valuesWords(run.args)}`])]);
    return field("Fill in", input);
  }

  changed() {
    this.question.hidden = true;
    this.preview.replaceChildren(...commandParts(this.spec, this.fields));
  }

  submit() {
    const bad = this.fields.filter((one) => one.validate());
    if (bad.length) return bad[0].input.focus();
    if (this.spec.confirm === "yes" && this.question.hidden) {
      return this.askToConfirm();
    }
    this.question.hidden = true;
    withToast(() => this.run());
  }

  askToConfirm() {
    this.question.replaceChildren(el("span", { text: "This job asks to be "
      + "sure: it starts at once." }), submitButton(`Run ${
      visible(this.spec.label)} on ${this.spec.on}`), button("No", () => {
      this.question.hidden = true;
      this.send.focus();
    }));
    this.question.hidden = false;
    $("button", this.question).focus();
  }

  // Signs and sends the request, and goes to the run that it started.
  async run() {
    const values = new Map(this.fields.map((one) => [one.param.name,
      one.value()]));
    this.send.disabled = true;
    this.showStatus("wait", "Signed. Waiting for the host to take it\u2026");
    try {
      const sent = await post("requests", runRequest(this.job, this.spec,
        values));
      const result = await resultOf(sent.nonce, ({ state: is }) =>
        is === "accepted" && this.showStatus("wait", "Accepted\u2026"));
      const ok = result.state === "accepted";
      this.showStatus(ok ? "ok" : "bad", resultWords(result));
      if (ok && result.run && this.root.isConnected) go(`run/${result.run}`);
    } catch (error) {
      this.showStatus("bad", error.message);
      throw error;
    } finally {
      this.send.disabled = false;
    }
  }

  showStatus(kind, text) {
    this.status.className = `status note ${kind}`;
    this.status.textContent = text;
  }
}

const valuesWords = (args) => Object.entries(args).filter(([, value]) =>
  !isMasked(value)).map(([name, value]) => `${name} ${visible(value).slice(
  0, 40)}`).join(", ");

const TYPE_HELP = { int: "A whole number.", text: "May have several lines.",
  secret: "Goes to the host veiled: the dashboard does not learn it, and "
    + "nothing keeps it." };

// The field of one argument, by its type.
class ArgumentField {
  constructor(param, at, changed) {
    this.param = param;
    const { type, default: usual } = param, id = `arg${at}`;
    const hasDefault = isThere(usual) && usual !== ""
      && !["bool", "secret", "text"].includes(type);
    const help = [TYPE_HELP[type], hasDefault && `Default: ${visible(usual)}`]
      .filter(Boolean).join(" ");
    this.error = el("span", { class: "error", id: `${id}-error` });
    this.input = this.makeInput({ id, name: id, autocomplete: "off",
      "aria-describedby": `${id}-error ${id}-help`, oninput: () => {
        if (this.input.getAttribute("aria-invalid")) this.validate();
        changed();
      } });
    const label = el("label", { for: id, text: visible(param.name) });
    this.root = el("div", { class: `field is-${type}` },
      type === "bool" ? el("div", { class: "check" }, this.input, label)
        : [label, this.input],
      el("span", { class: "muted", id: `${id}-help`, text: help }),
      this.error);
    this.fill(null);
  }

  // Returns the input that fits the argument's type.
  makeInput(facts) {
    const { type, choices, default: usual } = this.param;
    if (type === "bool") return el("input", { ...facts, type: "checkbox" });
    if (type === "text") {
      return el("textarea", { ...facts, rows: 4, spellcheck: "false" });
    }
    if (type === "choice") {
      return select(facts, [...isThere(usual) ? [] : [["", "choose\u2026"]],
        ...choices.map((text) => [text])]);
    }
    const kind = { date: "date", secret: "password" }[type];
    return el("input", { ...facts, type: kind || "text",
      inputmode: type === "int" ? "numeric" : null, spellcheck: "false",
      autocomplete: type === "secret" ? "new-password" : "off" });
  }

  // Puts in the value of earlier arguments, or the default.
  fill(args) {
    const { name, type, default: usual } = this.param;
    const given = args && Object.hasOwn(args, name) && !isMasked(args[name])
      ? args[name] : usual ?? "";
    if (type === "bool") this.input.checked = given === "true";
    else this.input.value = given;
    this.showError("");
  }

  value() {
    if (this.param.type === "bool") return String(this.input.checked);
    return this.input.value;
  }

  // Shows beside the field what is wrong with its value, and returns it.
  validate() {
    const mayBeEmpty = ["string", "text", "secret"].includes(this.param.type);
    const why = !mayBeEmpty && !this.value() ? "a value is needed"
      : valueError(this.param, this.value());
    this.showError(why);
    return why;
  }

  showError(text) {
    this.error.textContent = text;
    if (text) this.input.setAttribute("aria-invalid", "true");
    else this.input.removeAttribute("aria-invalid");
  }
}

// Returns the command with the values in it, as the host will show it.
function commandParts(spec, fields) {
  const parts = [];
  let from = 0;
  for (const match of spec.command.matchAll(/\{\{(.*?)\}\}/g)) {
    const name = match[1].replaceAll("\\%", "%").split(",")[0].trim();
    const found = fields.find((one) => one.param.name === name);
    if (!found) continue;
    parts.push(visible(spec.command.slice(from, match.index)), el("mark", {
      text: found.param.type !== "secret" ? shownValue(found.value())
        : found.value() ? DOTS : "''" }));
    from = match.index + match[0].length;
  }
  return [...parts, visible(spec.command.slice(from))];
}

const shownValue = (value) => visibleLines(quoted(value));

// --- day: one day across hosts ---------------------------------------------

// #/day, #/day/2026-03-29, #/day/2026-03-29?h=6&at=12
function dayView(place, root) {
  const [date] = place.parts, hours = +(place.query.get("h") || 24);
  let from = dayStart(date || isoDay(shifted(now())));
  if (hours === 6) {
    from = date ? from + 3600 * +(place.query.get("at") || 0)
      : Math.floor(now() / 3600) * 3600 - 4 * 3600;
  }
  const day = new Day(from, from + hours * 3600, hours, root);
  return { title: "Day", leave: () => day.leave(), shortcuts: {
    j: () => day.move(1), k: () => day.move(-1) },
  update: (changes) => (changes.runs || changes.all) && day.reloadSoon() };
}

// Returns when a date begins in the shown zone; of today if it is no date.
function dayStart(date) {
  const noon = Date.parse(`${date}T12:00:00Z`) / 1000;
  if (Number.isNaN(noon)) return dayStart(isoDay(shifted(now())));
  const first = noon - 43200 - shiftOf(noon);
  return noon - 43200 - shiftOf(first);
}

// The bars of a day, or of 6 hours of it, one row per job.
class Day {
  constructor(from, to, hours, root) {
    Object.assign(this, { from, to, hours, root });
    this.grid = el("div", { class: "day" });
    this.table = el("details", { class: "astable" }, el("summary",
      { text: "The same as a table" }));
    root.append(this.bar(), this.grid, this.table);
    this.resized = () => this.grid.clientWidth !== this.width && this.draw();
    addEventListener("resize", this.resized);
    showLoaded(this.grid, () => this.load(), (rows) => this.show(rows));
    this.timer = setInterval(() => this.draw(), 60000);
  }

  // Returns the title and the buttons for other days.
  bar() {
    const d = shifted(this.from), isToday = isoDay(d)
      === isoDay(shifted(now()));
    const zoom = (hours) => link(this.path(this.from, hours), `${hours} h`,
      { class: "btn toggle", "aria-pressed": String(this.hours === hours) });
    return titleRow(el("h1", {}, isToday ? "Today, " : "", `${
      WEEKDAYS[d.getUTCDay()]} ${dayMonth(d)}`, this.hours === 6
      ? muted(` ${clock(d)} to ${clock(shifted(this.to))}`) : ""),
    button(icon("left"), () => this.move(-1),
      { "aria-label": "Earlier", title: "Earlier (k)" }),
    linkButton("#/day", "Today"),
    button(icon("right"), () => this.move(1), { "aria-label": "Later",
      title: "Later (j)" }), zoom(24), zoom(6));
  }

  path(from, hours) {
    const d = shifted(from + (hours === 24 ? 0 : 1));
    const hour = this.hours === 24
      ? Math.max(0, shifted(now()).getUTCHours() - 3) : d.getUTCHours();
    return `#/day/${isoDay(d)}${hours === 6 ? `?h=6&at=${hour}` : ""}`;
  }

  move(by) {
    const middle = this.from + by * this.hours * 3600
      + (this.hours === 24 ? 43200 : 0);
    location.hash = this.path(middle, this.hours);
  }

  // Returns the rows of all answers: where there is too much for one, `to`
  // reports its progress.
  async load() {
    const rows = new Map(), to = Math.ceil(this.to);
    let from = Math.floor(this.from);
    for (let pages = 0; from < to && pages < 20; pages += 1) {
      const answer = await get(`day?from=${from}&to=${to}`);
      for (const { job, bars: found, missing } of answer.rows) {
        if (!rows.has(job)) rows.set(job, { bars: [], missing: [] });
        // What began before this answer was in the one before; times come
        // rounded.
        rows.get(job).bars.push(...found.filter((bar) => !pages
          || bar[0] > from - 0.001));
        rows.get(job).missing.push(...missing);
      }
      from = answer.to > from ? answer.to : to;
    }
    return rows;
  }

  reloadSoon() {
    clearTimeout(this.reload);
    this.reload = setTimeout(async () => {
      const rows = await withToast(() => this.load());
      if (rows && this.root.isConnected) this.show(rows);
    }, 1500);
  }

  isNext(job) {
    return job.next >= this.from && job.next < this.to;
  }

  show(rows) {
    const order = (job) => ({ name: `${hostName(job.host)}\n${
      job.section}` });
    this.rows = [...state.jobs.values()].map((job) => ({ job,
      starts: startsOf(rows.get(job.id)) }))
      .filter(({ job, starts }) => starts.length || this.isNext(job))
      .sort((a, b) => byName(order(a.job), order(b.job)));
    this.draw();
    this.tabulate();
  }

  // Draws the rows in the width that there is.
  draw() {
    if (!this.rows || !this.grid.isConnected) return;
    if (!this.rows.length) {
      return this.grid.replaceChildren(empty("Nothing ran, and nothing was "
        + "due"));
    }
    this.width = this.grid.clientWidth;
    const width = Math.max(160, this.width - (phone.matches ? 96 : 200) - 8);
    let last = "";
    const nodes = [this.axis(width)];
    for (const { job, starts } of this.rows) {
      if (job.host !== last) {
        nodes.push(el("h2", { text: hostName(job.host) }));
      }
      last = job.host;
      nodes.push(el("div", { class: "dayrow" }, link(`#/job/${job.id}`,
        job.label, { title: job.label }), this.lane(job, starts, width)));
    }
    this.grid.replaceChildren(...nodes);
  }

  x(at, width) {
    return (Math.min(Math.max(at, this.from), this.to) - this.from)
      / (this.to - this.from) * width;
  }

  hoursShown(width) {
    const step = this.hours === 6 ? 1 : width < 500 ? 6 : 2;
    return Array.from({ length: this.hours / step + 1 }, (_, i) =>
      this.from + i * step * 3600);
  }

  axis(width) {
    return el("div", { class: "dayrow axis" }, el("span"), svg("svg", {
      width, height: 18, "aria-hidden": "true" },
    this.hoursShown(width).slice(0, -1).map((at) => svg("text", {
      x: this.x(at, width) + 3, y: 12, text: clock(shifted(at)) }))));
  }

  // The picture of one job's starts, with the hours, now, and what is next.
  lane(job, starts, width) {
    const host = hostOf(job), items = starts.map((start) => {
      const x = this.x(start.at, width);
      return start.outcome === "m" ? { ...start, x: x - 3, w: 7 } : { ...start,
        x, w: Math.max(3, this.x(start.end ?? now(), width) - x) };
    }).sort((a, b) => a.x - b.x);
    const node = bars(items, 16, { width, height: 26, tabindex: 0,
      viewBox: `0 -5 ${width} 26`, "aria-label": `${job.label}: ${
        outcomeCounts(items.map((item) => item.outcome))
        || "nothing yet"}` },
    ({ outcome, at, end }) => tipWords(outcome, at, host, end && end - at),
    ({ run }) => run ? `#/run/${run}` : location.hash);
    const line = (at, kind) => svg("path", { class: kind,
      d: `M${this.x(at, width)} -5v26` });
    node.prepend(...this.hoursShown(width).map((at) => line(at, "hour")));
    if (now() > this.from && now() < this.to) node.append(line(now(), "now"));
    if (this.isNext(job)) {
      node.append(svg("path", { class: "tick",
        d: `M${this.x(job.next, width)} 2l4 6-4 6-4-6z` }, svg("title",
        { text: `next ${shortTime(job.next, host)}` })));
    }
    return node;
  }

  tabulate() {
    const rows = this.rows.flatMap(({ job, starts }) => starts.map((start) =>
      ({ ...start, job }))).sort((a, b) => a.at - b.at).slice(0, 2000);
    this.table.replaceChildren(this.table.firstChild, table(["Start", "Job",
      "Host", "How", "Took"], rows.map(({ job, run, at, end, outcome }) => {
      const time = shortTime(at, hostOf(job));
      return tableRow(run ? link(`#/run/${run}`, time) : time, job.label,
        hostName(job.host), OUTCOMES[outcome] || outcome,
        el("td", { class: "num" }, end ? formatDuration(end - at) : ""));
    })));
  }

  leave() {
    removeEventListener("resize", this.resized);
    clearInterval(this.timer);
    clearTimeout(this.reload);
  }
}

// Returns the starts of a row of GET day, also those that were missed.
const startsOf = (row) => row ? [...row.bars.map(([at, end, outcome, run]) =>
  ({ at, end, outcome, run })), ...row.missing.map(([at, run]) =>
  ({ at, outcome: "m", run }))] : [];

// --- search: through all outputs -------------------------------------------

// #/search?q=TEXT, #/search?q=TEXT&job=ID
function searchView(place, root) {
  const text = place.query.get("q") || "", job = place.query.get("job");
  const input = el("input", { type: "search", value: text,
    "aria-label": "Search outputs", placeholder: "Text in any output",
    autocomplete: "off" });
  const only = job && state.jobs.get(+job);
  const path = (words) => `search?q=${encodeURIComponent(words)}${job
    ? `&job=${job}` : ""}`;
  root.append(el("h1", {}, only ? ["Search the output of ", link(
    `#/job/${job}`, only.label)] : "Search all outputs"),
  form({ class: "searchform", role: "search" }, () => go(path(input.value)),
    input, submitButton("Search")));
  if (text) {
    showLoaded(root, () => get(path(text)), (answer) => root.append(
      matchList(answer, text, path(text))));
  } else input.focus();
  return { title: text ? `${text} \u00b7 search` : "Search", shortcuts: {
    "/": () => input.select(), j: () => focusLink(root, 1),
    k: () => focusLink(root, -1) } };
}

// Moves the focus along the links of a list, for j and k.
function focusLink(root, by) {
  const links = [...root.querySelectorAll("li > a")];
  links[Math.max(0, links.indexOf(document.activeElement) + by)]?.focus();
}

// Returns the list of the runs that a search found.
function matchList(answer, text, path) {
  if (!answer.matches.length) {
    return empty("No output has it",
      mutedLine("Searched is what is kept of all runs."));
  }
  const list = el("ol", { class: "matches" });
  return el("div", {}, list, pageButton("Older hits", list, answer, "matches",
    (match) => matchItem(match, text), ({ run }) =>
      `${path}&before=${run.id}`));
}

function matchItem({ run, line }, text) {
  return el("li", {}, link(`#/run/${run.id}?q=${encodeURIComponent(text)}`,
    [el("span", { class: "what" }, stateMark(runState(run), ""),
      el("b", { text: state.jobs.get(run.job)?.label || "a job" }),
      muted(hostName(run.host)), muted(dateNode(
        run.started || run.requested_at, hostOf(run)))),
      el("pre", {}, marked(line, text))]));
}

// Returns a line with what was searched for marked; only a part of a long one.
function marked(raw, text) {
  const line = withoutEscapes(raw), wanted = text.toLowerCase();
  const low = line.toLowerCase(), parts = [];
  const first = Math.max(0, low.indexOf(wanted) - 80);
  let from = first;
  for (let at = low.indexOf(wanted, from); at >= 0 && at < first + 400;
    at = low.indexOf(wanted, from)) {
    parts.push(visible(line.slice(from, at)), el("mark",
      { text: visible(line.slice(at, at + wanted.length)) }));
    from = at + Math.max(1, wanted.length);
  }
  return [first ? "\u2026" : "", ...parts,
    visible(line.slice(from, Math.max(from, first + 400)))];
}

// --- audit: who requested what ---------------------------------------------

// #/audit
function auditView(place, root) {
  root.append(el("h1", { text: "Audit" }));
  showLoaded(root, () => get("audit"), (answer) => root.append(
    answer.rows.length ? pagedTable("Older", ["When", "Who", "What", "Where",
      "Verdict"], answer, "rows", auditRow, ({ at }) => `audit?before=${at}`)
      : empty("Nobody has asked for anything yet", mutedLine("Each run, "
        + "kill, snooze and change that is asked for here stands in this "
        + "list, with the host\u2019s verdict."))));
  return { title: "Audit" };
}

const RESULT_MARKS = { refused: "failed", expired: "missed", waiting: "new" };

// Returns a row of the audit.
function auditRow(row) {
  const host = state.hosts.get(row.host);
  return tableRow(dateNode(row.at, host), row.who,
    el("td", { class: "wraps" }, el("b", { text: row.what }), " ", row.job
      ? link(`#/job/${row.job}`, row.label || "a job")
      : visible(row.label || ""), argsWords(row.args)),
    row.host ? hostName(row.host) : "",
    el("td", {}, row.state && stateMark(RESULT_MARKS[row.state] || "ok",
      row.state), row.reason && muted(" ", row.reason),
    row.run && [" ", link(`#/run/${row.run}`, "output")]));
}

// --- checks: what pings in from elsewhere ----------------------------------

// #/check/ID, #/check/new
function checkView(place, root) {
  const [id] = place.parts;
  if (id === "new") return editCheckView({ parts: [""] }, root);
  if (!state.checks.has(id)) return lostView(place, root);
  const head = el("div"), list = el("div"), path = `checks/${id}/pings`;
  root.append(head, list);
  const draw = () => head.replaceChildren(...checkHead(state.checks.get(id),
    $("details", head)?.open));
  const load = () => showLoaded(list, () => get(path), (answer) =>
    list.replaceChildren(pingTable(path, answer)));
  draw();
  load();
  let { n } = state.checks.get(id);
  return { title: state.checks.get(id).name, update: () => {
    const check = state.checks.get(id);
    if (!check) return go("jobs");
    draw();
    if (check.n !== n) load();
    n = check.n;
  } };
}

const checkCrumbs = () => crumbs(link("#/jobs", "Jobs"), "Checks");

// Returns what is shown above the pings; isOpen: its examples are open.
function checkHead(check, isOpen) {
  const send = (body) => post(`checks/${check.id}`, body);
  const act = (words, body) => button(words, () => withToast(() =>
    send(body)));
  const remove = async () => {
    await send({ do: "delete" });
    go("jobs");
  };
  const name = check.name || check.slug;
  return [checkCrumbs(), titleRow(el("h1", { text: name }),
    isOperator() && [linkButton(`#/check/${check.id}/edit`, "Edit"),
      check.state === "paused" ? act("Resume", { do: "resume" })
        : act("Pause", { do: "pause" }),
      BAD.has(check.state) && snoozeButtons(`check:${check.id}`, check),
      confirmButton("Delete\u2026", `Delete ${name}`, () =>
        withToast(remove, "Deleted"), { class: "btn danger" })]),
  factList([["State", stateMark(checkState(check))],
    ["Expected", check.words], ["Grace", formatDuration(check.grace)],
    ["Last ping", check.last_ping ? timeNode(check.last_ping) : "none yet"],
    ["Next", check.next ? timeNode(check.next) : check.state === "paused"
      ? "paused" : check.last_ping ? "overdue" : "when it has pinged once"],
    ["Took", check.last_duration && formatDuration(check.last_duration)],
    ["Must start within", check.start_within > 0
      && formatDuration(check.start_within)],
    ["May run for", check.run_limit > 0 && formatDuration(check.run_limit)],
    ["Tags", check.tags]]),
  check.desc ? el("p", { text: check.desc }) : "", snippet(pingUrl(check)),
  pingExamples(pingUrl(check), isOpen || !check.n)];
}

// Returns examples of how to ping a URL.
function pingExamples(url, open) {
  const example = (title, text) => [el("h3", { text: title }), snippet(text)];
  return el("details", { class: "card", open },
    el("summary", { text: "How to ping it" }),
    example("In a crontab", `30 2 * * * backup.sh && curl -fsS -m 10 `
      + `--retry 5 -o /dev/null ${url}`),
    example("In a script, with its output and exit status", `curl -fsS -m 10 `
      + `${url}/start\nout=$(backup.sh 2>&1); status=$?\n`
      + `printf %s "$out" | curl -fsS -m 10 --data-binary @- `
      + `${url}/$status`),
    example("In mission\u2019s configuration", `"ping": {\n  `
      + `"enabled": true, "endpoint": "${url}",\n  `
      + `"start": true, "fail": true, "log": true\n}`));
}

function pingTable(path, answer) {
  return answer.pings.length ? pagedTable("Older", ["No", "When", "Kind",
    "Took", "From", "Body"], answer, "pings", (ping) => pingRow(path, ping),
  ({ n }) => `${path}?before=${n}`) : empty("No ping has come yet",
    mutedLine("Any GET, HEAD or POST to the URL above is one."));
}

const PING_KINDS = { "": ["ok", "ok"], success: ["ok", "ok"],
  start: ["running", "start"], fail: ["failed", "failed"],
  log: ["new", "log"], ign: ["skipped", "ignored"] };

// Returns a row of the table of pings, with a button for the body.
function pingRow(path, ping) {
  const [mark, word] = PING_KINDS[ping.kind] || ["new", ping.kind];
  const show = ping.size > 0 && button("Show", async (event) => {
    const text = await withToast(async () => (await fetched(
      `${path}/${ping.n}/body`)).text());
    if (text !== null) {
      event.target.replaceWith(el("pre", { class: "command",
        text: visibleLines(text) }));
    }
  }, { class: "btn quiet" });
  return tableRow(el("td", { class: "num" }, `#${ping.n}`),
    dateNode(ping.at), stateMark(mark, ping.exit ? `exit ${ping.exit}`
      : word), el("td", { class: "num" }, formatDuration(ping.duration)),
    el("td", { class: "muted" }, `${ping.method} ${ping.ip}`, " ",
      el("span", { text: ping.ua })), el("td", { class: "message" },
      visible(ping.line || ""), show && [" ", muted(bytesWords(ping.size)),
        show]));
}

const UNITS = [["minutes", 60], ["hours", 3600], ["days", 86400]];

// The fields below are {root, value()}. A number and its unit, in seconds:
function timeField(id, label, seconds, help, least = 60) {
  const [unit, size] = [...UNITS].reverse().find(([, one]) =>
    seconds && seconds % one === 0) || UNITS[0];
  const count = el("input", { id, type: "number", min: least ? 1 : 0,
    value: String(Math.round(seconds / size * 100) / 100), step: "any",
    required: true });
  const units = select({ "aria-label": `${label}: unit` },
    UNITS.map(([text]) => [text]), unit);
  return { value: () => Math.round(+count.value
    * UNITS[units.selectedIndex][1]), root: field(label, count, help,
    el("div", { class: "pair" }, count, units)) };
}

function textField(id, label, value, help, facts = {}) {
  const input = el(facts.rows ? "textarea" : "input", { id, value,
    autocomplete: "off", spellcheck: "false", ...facts });
  return { value: () => input.value.trim(), root: field(label, input, help) };
}

function checkField(id, label, checked) {
  const input = el("input", { id, type: "checkbox", checked });
  return { value: () => input.checked, root: checkbox(input, label) };
}

const NEW_CHECK = { name: "", slug: "", tags: "", desc: "", kind: "simple",
  period: 86400, grace: 3600, schedule: "30 2 * * *", tz: "UTC",
  start_within: 0, run_limit: 0, manual_resume: false, methods: "" };

// #/check/ID/edit, and a new check
function editCheckView(place, root) {
  const [id] = place.parts, old = id ? state.checks.get(id) : NEW_CHECK;
  if (!old) return lostView(place, root);
  const title = id ? `Edit ${old.name}` : "New check";
  root.classList.add("narrow");
  root.append(checkCrumbs(), el("h1", { text: title }));
  if (!isOperator()) {
    root.append(el("p", { class: "note", text: WORDS.viewer }));
    return { title: "Check" };
  }
  root.append(checkForm(id, old));
  $("#c-name").focus();
  return { title };
}

// Returns the fields of a check, by the names that the API has for them.
function checkFields(old) {
  return {
    name: textField("c-name", "Name", old.name, "", { required: true }),
    period: timeField("c-period", "Every", old.period || 86400,
      "How often it pings."),
    schedule: textField("c-cron", "Schedule", old.schedule
      || NEW_CHECK.schedule, "Five columns, as in crontab(5)."),
    tz: textField("c-tz", "Zone", old.tz || "UTC",
      "For example Europe/Berlin."),
    grace: timeField("c-grace", "Grace", old.grace,
      "How late it may be before it is down."),
    slug: textField("c-slug", "Slug", old.slug, "For URLs: small letters, "
      + "digits, - and _. Empty: made of the name.",
    { pattern: "[a-z0-9_-]*" }),
    tags: textField("c-tags", "Tags", old.tags,
      "Words with spaces between."),
    desc: textField("c-desc", "Note", old.desc, "What to do when it stays "
      + "away.", { rows: 2 }),
    start_within: timeField("c-within", "Must start within",
      old.start_within || 0, "After it is due; 0: no deadline of its own.",
      0),
    run_limit: timeField("c-limit", "May run for", old.run_limit || 0,
      "From its start ping; 0: as long as the grace.", 0),
    manual_resume: checkField("c-resume",
      "Stays paused until somebody resumes it", old.manual_resume),
    methods: checkField("c-post", "Only POST counts", old.methods === "POST"),
  };
}

// Returns the form of a check; without `id` it creates one.
function checkForm(id, old) {
  const fields = checkFields(old), root = (name) => fields[name].root;
  const kind = select({ id: "c-kind", onchange: () => showKind() },
    [["simple", "every so often"], ["cron",
      "by a schedule, as in crontab"]], old.kind);
  const failed = el("p", { class: "error", role: "alert" });
  function showKind() {
    const isCron = kind.value === "cron";
    root("period").hidden = $("input", root("period")).disabled = isCron;
    root("schedule").hidden = root("tz").hidden = !isCron;
  }
  showKind();
  return form({ class: "runform" }, () => saveCheck(id, kind.value, fields,
    failed), root("name"), field("It pings", kind), ...["period", "schedule",
    "tz", "grace"].map(root), el("details", { class: "card" },
    el("summary", { text: "More" }), ["slug", "tags", "desc", "start_within",
      "run_limit", "manual_resume", "methods"].map(root)), failed,
  el("div", { class: "actions" }, submitButton(id ? "Save" : "Create"),
    linkButton(id ? `#/check/${id}` : "#/jobs", "Cancel",
      { class: "btn quiet" })));
}

// Creates or changes the check and shows it, or the error in the form.
async function saveCheck(id, kind, fields, failed) {
  const body = Object.fromEntries(Object.entries(fields).map(([name, one]) =>
    [name, one.value()]));
  Object.assign(body, { kind, methods: body.methods ? "POST" : "" });
  failed.textContent = "";
  try {
    const saved = id || (await post("checks", body)).id;
    if (id) await post(`checks/${id}`, { do: "edit", ...body });
    // The stream brings it within a moment; wait for a second at most.
    for (let tries = 0; tries < 20 && !state.checks.has(saved); tries += 1) {
      await pause(50);
    }
    go(`check/${saved}`);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    failed.textContent = error.text();
  }
}

// --- alerts, and where they are sent ---------------------------------------

// #/alerts
function alertsView(place, root) {
  const list = el("div");
  const channels = el("div", { class: "channels" });
  root.append(el("h1", { text: "Alerts" }), list, section("Who is told",
    channels));
  const draw = () => list.replaceChildren(alertList());
  draw();
  showLoaded(channels, () => get("channels"), (answer) =>
    showChannels(channels, answer.channels));
  return { title: "Alerts", update: (changes) => {
    if (changes.alerts || changes.deleted || changes.all || changes.jobs) {
      draw();
    }
  } };
}

const ALERT_STATES = { failed: "failed", late: "late", missed: "missed",
  slow: "late", fast: "late", silent: "unknown", overdue: "failed" };

// Returns what an alert is about: {one, name, href, where, host}.
function subjectOf({ subject }) {
  const at = subject.indexOf(":");
  const kind = subject.slice(0, at), id = subject.slice(at + 1);
  if (kind === "job") {
    const job = state.jobs.get(+id);
    return { one: job, name: job?.label || "a job", href: `#/job/${id}`,
      where: job && hostName(job.host), host: hostOf(job) };
  }
  if (kind === "check") {
    const check = state.checks.get(id);
    return { one: check, name: check?.name || "a check",
      href: `#/check/${id}`, where: "check" };
  }
  const host = state.hosts.get(id);
  return { one: host, name: hostName(id), href: "#/hosts", where: "host",
    host };
}

// Returns the active alerts, the newest first.
function alertList() {
  const alerts = [...state.alerts.values()].sort((a, b) =>
    b.since - a.since);
  if (!alerts.length) {
    return empty("All is well", mutedLine("Here stands what failed, is late, "
      + "was missed, or took much longer than it ever did."));
  }
  return el("ul", { class: "alerts" }, alerts.map((alert) => {
    const { one, name, href, where, host } = subjectOf(alert);
    return el("li", {}, stateMark(ALERT_STATES[alert.kind] || "unknown",
      alert.kind), el("div", { class: "what" }, link(href, name), " ",
      muted(where), el("div", { text: visible(alert.text || "") })),
    muted("since ", dateNode(alert.since, host)), isOperator()
      && el("span", { class: "row-actions" },
        snoozeButtons(alert.subject, one || {})));
  }));
}

const CHANNEL_HELP = { mail: ["Address", "ann@example.org"], webhook: [
  "URL that gets a POST with JSON", "https://chat.example.org/hook"],
ntfy: ["Topic\u2019s URL", "https://ntfy.sh/my-topic"] };

// Shows the channels, and draws them again after each change.
function showChannels(root, channels) {
  const send = (body, done) => withToast(async () => {
    await post("channels", body);
    showToast(done);
    showChannels(root, (await get("channels")).channels);
  });
  const act = (words, action, id, done) => button(words, () =>
    send({ do: action, id }, done));
  const items = channels.map(({ id, kind, target, error, last }) => el("li",
    {}, el("b", { text: kind }), el("div", { class: "what" }, el("span",
      { text: target }), error && el("div", { class: "error",
      text: visible(error) })), muted(last ? ["told ", timeNode(last)]
      : "not used yet"), isOperator() && el("span", { class: "row-actions" },
      act("Test", "test", id, "Sent; look there"),
      act("Delete", "delete", id, "Deleted"))));
  root.replaceChildren(items.length ? el("ul", { class: "alerts" }, items)
    : mutedLine("Nobody yet: what goes wrong shows on this page alone."),
  isOperator() ? channelForm(send) : "");
}

// Returns the form that adds a channel.
function channelForm(send) {
  const kind = select({ "aria-label": "By", onchange: () => show() },
    Object.keys(CHANNEL_HELP).map((text) => [text]));
  const target = el("input", { required: true, autocomplete: "off",
    spellcheck: "false" });
  const show = () => {
    const [label, example] = CHANNEL_HELP[kind.value];
    setAttributes(target, { "aria-label": label, placeholder: example,
      type: kind.value === "mail" ? "email" : "url" });
  };
  show();
  return form({ class: "oneline" }, () => send({ kind: kind.value,
    target: target.value }, "Added"), kind, target,
  submitButton("Add", { class: "btn" }));
}

// --- hosts -----------------------------------------------------------------

// #/hosts
function hostsView(place, root) {
  const list = el("div");
  root.append(el("h1", { text: "Hosts" }), list, section("Add a host",
    el("p", {}, "On the machine, type this; it asks for the dashboard\u2019s "
    + "passphrase, which stays there:"), joinCommands()));
  const draw = () => list.replaceChildren(state.hosts.size ? hostTable()
    : mutedLine("None yet."));
  draw();
  return { title: "Hosts", update: (changes) => {
    if (changes.hosts || changes.deleted || changes.all) draw();
  } };
}

const hostTable = () => el("div", { class: "scroll" }, table(["Host",
  "State", "Jobs", "Heard", "Its clock", "koi", ""],
[...state.hosts.values()].sort(byName).map(hostRow)));

const HOST_STATES = { up: ["ok", "up"], down: ["unknown", "silent"],
  duplicate: ["late", "two with one identity"], new: ["new", "new"],
  left: ["paused", "left"] };

// Returns a row of the table of hosts.
function hostRow(host) {
  const jobs = [...state.jobs.values()].filter((job) =>
    job.host === host.id).length;
  const cell = (name, ...inside) => el("td", { "data-th": name }, inside);
  return tableRow(el("td", { class: "wraps" }, el("b", { text: host.name }),
    (host.problems || []).map((text) => el("div", { class: "error",
      text: visible(text) }))),
  stateMark(...HOST_STATES[host.state] || ["unknown", host.state]),
  cell("Jobs", String(jobs)),
  cell("Heard", host.seen ? timeNode(host.seen, host) : "never"),
  cell("Clock", skewWords(host.skew || 0), el("div", { class: "muted",
    text: host.zone })),
  cell("koi", host.version || "", hasOtherKeys(host) && el("div",
    { class: "error", text: WORDS.otherKeys })),
  isOperator() && confirmButton("Forget\u2026", `Forget ${host.name} and `
    + "its runs", () => withToast(() => post("forget", { host: host.id }),
    "Forgotten"), { class: "btn quiet" }));
}

const skewWords = (skew) => Math.abs(skew) < 2 ? "right" : el("span", {
  class: Math.abs(skew) >= 30 ? "late" : "",
  text: `${roughDuration(Math.abs(skew))} ${skew > 0 ? "fast" : "slow"}` });

const hasOtherKeys = (host) => session.keys && host.key
  && host.state !== "left" && host.key !== keyId(keyFor(host.id));

// --- settings --------------------------------------------------------------

// #/settings
function settingsView(place, root) {
  const { dash } = state;
  root.classList.add("narrow");
  root.append(el("h1", { text: "Settings" }), section("This dashboard",
    el("p", {}, "Its address, to bookmark or to pass on:"),
    snippet(`${origin()}/#${dash.id}`)), viewerSection(),
  dash.ping_key ? section("Ping key", el("p", {}, "With it a check is "
    + "pinged by its slug, and made by the first ping:"), snippet(`curl -fsS `
    + `-m 10 ${origin()}/ping/${dash.ping_key}/my-backup?create=1`)) : "",
  section("Badges", el("p", {}, "A small picture of a state, for a wiki or a "
    + "README. It tells a colour and nothing else:"),
  snippet(`${origin()}/badge/${dash.badge_key}/all.svg`), mutedLine(
    "In the place of ", code("all"), " may stand a check\u2019s slug or a "
    + "job\u2019s tag; ", code(".json"), " gives the same for programs.")),
  section("Prometheus", snippet(
    `curl -H "Authorization: Bearer $KEY" ${origin()}/metrics`),
  mutedLine("KEY is the viewer\u2019s key without its \u201cview-\u201d.")),
  section("Passphrase", el("p", {}, "To change it, type on a host:"),
    snippet("koitab -d rotate")),
  mutedLine(`koi ${state.version}. You are `, isOperator()
    ? "an operator: you may run what is @manual." : "a viewer."));
  return { title: "Settings" };
}

// Returns the part with the viewer's key, which operators see.
function viewerSection() {
  const key = session.keys && `view-${hex(session.keys.view)}`;
  return section("Viewers", el("p", { text: "Who has this key sees all jobs "
    + "and outputs, and can run nothing. It is typed in the place of the "
    + "passphrase." }), key ? button("Show the viewer\u2019s key", (event) =>
    event.target.replaceWith(snippet(key)))
    : mutedLine("Operators can see it."));
}

// --- shortcuts, and the start ----------------------------------------------

const SHORTCUTS = [["/", "search or filter"], ["j  k",
  "down, up; older, newer"], ["Enter", "open"],
["\u2190  \u2192", "walk along a strip"], ["r", "run the job"],
["f", "follow an output"], ["w", "wrap its lines"], ["g j", "jobs"],
["g t", "the day"], ["g s", "search"], ["g a", "alerts"], ["g h", "hosts"],
["?", "these keys"], ["Esc", "close, leave a field"]];
const AFTER_G = { j: "jobs", t: "day", s: "search", a: "alerts", h: "hosts",
  u: "audit" };

// Opens the dialog with the list of keys.
function showShortcuts() {
  const dialog = $("#shortcuts");
  dialog.replaceChildren(el("h2", { text: "Keys" }), el("dl",
    { class: "shortcuts" }, SHORTCUTS.map(([keys, words]) => el("div", {},
      el("dt", {}, keys.split(/ +/).map((one) => el("kbd", { text: one }))),
      el("dd", { text: words })))), button("Close", () => dialog.close(),
    { class: "btn primary" }));
  dialog.showModal();
}

let pressedG = 0;       // when, in ms

// Handles a key: a shortcut of the page or of the view.
function onKey(event) {
  if (!session.token || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const input = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape") {
    input?.blur();
    hideTip();
    return;
  }
  if (input || $("#shortcuts").open || barKey(event)) return;
  const { key } = event, shortcuts = app.view?.shortcuts || {};
  if (Date.now() - pressedG < 1500 && AFTER_G[key]) {
    pressedG = 0;
    go(AFTER_G[key]);
  } else if (key === "g") pressedG = Date.now();
  else if (key === "?") showShortcuts();
  else if (shortcuts[key]) shortcuts[key]();
  else if (key === "/") go("search");
  else return;
  event.preventDefault();
}

// Starts the page; what follows comes from events.
function start() {
  showTheme();
  session.server = $("meta[name=koi-server]").content.replace(/\/+$/, "");
  if (!isFile() && !globalThis.isSecureContext) {
    $("#plain-http").textContent = WORDS.plainHttp;
    $("#plain-http").hidden = false;
  }
  const showBug = (error) => error?.name !== "AbortError" && showToast(
    `A fault of this page: ${error?.message || error}`, "bad");
  addEventListener("error", (event) => showBug(event.error));
  addEventListener("unhandledrejection", (event) => showBug(event.reason));
  listenToBars();
  lockWhenIdle();
  setInterval(updateTimes, 1000);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => app.route());
  addEventListener("scroll", hideTip, { passive: true });
  document.addEventListener("visibilitychange", () =>
    stream.onVisibilityChange());
  logInView();
}

start();
"""


def page_policy(connect: str = "'self'") -> str:
    """Return the Content-Security-Policy of the page.

    It allows this script, this style, and requests to `connect` alone.
    """
    from base64 import b64encode
    from hashlib import sha256
    script, style = (b64encode(sha256(text.encode()).digest()).decode()
                     for text in (PAGE_JS, PAGE_CSS))
    return (f"default-src 'none'; script-src 'sha256-{script}'; "
            f"style-src 'sha256-{style}'; connect-src {connect}; "
            "img-src data:; worker-src blob:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types koi")


def page_text(server: str | None = None) -> str:
    """Return the page as one text.

    With a `server` it is for a file that is opened from disk, and contains
    its policy; with "" it asks for the server at the login.
    """
    from html import escape
    text = PAGE_HTML
    if server is not None:
        is_url = set(server).isdisjoint(" ;,'\"\n")
        policy = page_policy(
            "'none'" if not is_url else server or "http: https:").replace(
                "frame-ancestors 'none'; ", "")     # for headers alone
        text = text.replace(
            '<meta name="koi-server" content="">',
            '<meta http-equiv="Content-Security-Policy" content="'
            f'{escape(policy)}">\n'
            f'<meta name="koi-server" content="{escape(server)}">')
    return text.replace("/* PAGE_CSS */", PAGE_CSS).replace(
        "/* PAGE_JS */", PAGE_JS)


# ==========================================================================
# Terminal: how does koitab speak with its caller?             (terminal; C)
#
# gives   OPTIONS, Invocation, ExitWithText, CrontabError; prompts, output
# needs   Error, escape_controls, Machine (who the caller is)
#
# One table of options feeds argparse, the help texts and the completion
# scripts. What people read goes to stderr if it is not the output itself.
# ==========================================================================

MOST_LISTED = 100_000   # what -n may ask for


class ExitWithText(Exception):
    """Nothing is left to do but to print a text."""


class CrontabError(Error):
    """A message of crontab(1), in its words: printed without a prefix."""


def parse_number(text: str) -> int:
    """Return the value of -n. Raises Error."""
    number = parse_count(text) or 0
    if not 0 < number <= MOST_LISTED:
        raise Error(f"-n {text}: not a number from 1 to {MOST_LISTED:,}",
                    "-n 5; -T FILE tests a tab", EXIT_USAGE)
    return number


class Option(FrozenRecord):
    """An option, for argparse, the help and the completion scripts."""
    spelling: str               # "-n, --number N"
    help: str
    parse: object = str         # text -> value; raises Error
    is_list: bool = False       # it may be given several times

    @property
    def names(self) -> list[str]:
        """The ways to type it, the short one first."""
        return [word for word in self.spelling.replace(",", "").split()
                if word.startswith("-")]

    @property
    def value(self) -> str:
        """The name of its value: "FILE" or "USER", say; "" without one."""
        return self.spelling.partition(self.names[-1])[2].strip()

    @property
    def default(self):
        """The value of an option that is not given."""
        return [] if self.is_list else "" if self.value else False


OPTIONS = {     # by the attribute of Invocation that holds the value
    "edit": Option("-e", "edit the tab"),
    "list": Option("-l", "list the tab"),
    "remove": Option("-r", "remove the tab"),
    "ask": Option("-i", "ask before the tab is removed"),
    "test": Option("-T FILE", "test this tab"),
    "user": Option("-u USER", "the tab, jobs and runs of another user (root)"),
    "action": Option("-d ACTION", "what to do with a dashboard"),
    "number": Option("-n, --number N", "how many starts of each job (5), or "
                     "runs (20)", parse_number),
    "tab": Option("--tab FILE", "a tab that is not installed; - is standard "
                  "input"),
    "start": Option("--from TIME", "only starts after this (default: now)"),
    "until": Option("--until TIME", "end the pause then: 2026-03-29T01:30, or "
                    "after 12h or 3d (default: koitab resume)"),
    "utc": Option("--utc", "show times in UTC"),
    "json": Option("--json", "print JSON"),
    "system": Option("--system", "serve /etc/crontab, /etc/cron.d and cron's "
                     "tabs as well"),
    "container": Option("--container", "be process 1 of a container: log to "
                        "stdout, pass its environment to jobs, take each "
                        "start for a boot"),
    "on": Option("--on HOST", "run the job on this host"),
    "url": Option("--url URL", "the dashboard (default: the one of this "
                  "machine)"),
    "ca": Option("--ca FILE", "trust these certificates (PEM), not the "
                 "system's"),
    "plain_http": Option("--plain-http", "allow http beyond this machine, "
                         "where anybody on the way can read and change it"),
    "listen": Option("--listen ADDRESS:PORT", "listen here (127.0.0.1:8077); "
                     "repeatable", is_list=True),
    "db": Option("--db FILE", "its database (dashboard.db in the state "
                 "directory)"),
    "cert": Option("--cert FILE", "serve https with this certificate (PEM)"),
    "key": Option("--key FILE", "the key of the certificate (PEM)"),
    "names": Option("--name HOST", "a name that browsers and hosts use; "
                    "repeatable", is_list=True),
    "proxies": Option("--behind-proxy ADDRESS", "believe X-Forwarded-For of "
                      "this proxy; repeatable", is_list=True),
    "backup": Option("--backup FILE", "copy the database to FILE, and exit"),
    "help": Option("-h, --help", "print this help"),
    "version": Option("-V, --version", "the version"),
}


class Invocation:
    """What was typed: the options, and the name the program was called by;
    and the machine on which it was typed.

    argparse sets an attribute for each option that was given; any other
    option has the default of the table.
    """

    def __init__(self, machine: Machine, called: str = PROG):
        self.machine, self.called = machine, called

    def __getattr__(self, key: str):
        """Return the default of an option; only called for what is not
        set."""
        if key not in OPTIONS:
            raise AttributeError(key)
        return OPTIONS[key].default

    @property
    def given(self) -> list[str]:
        """The keys of the options that were typed, as OPTIONS has them."""
        return [key for key in OPTIONS if key in vars(self)]

    def reject_others(self, allowed, command: str,
                      status: int = EXIT_USAGE) -> None:
        """Raise Error if an option was given that is not in `allowed`: it
        would have no effect, and the caller expects one."""
        for key in self.given:
            if key not in allowed:
                raise Error(f"{OPTIONS[key].names[-1]} is not an option of "
                            f"{PROG} {command}", "", status)

    def check_user(self) -> None:
        """Raise CrontabError unless the caller may use this -u: root may,
        and everybody with their own name. The real uid counts, not what the
        environment says."""
        if "user" not in self.given:
            return
        if os.getuid() and self.user != self.machine.login_name():
            raise CrontabError("must be privileged to use -u")
        import pwd
        try:
            pwd.getpwnam(self.user)
        except (KeyError, ValueError):
            raise CrontabError(f"{self.called}:  user `{self.user}' unknown"
                               ) from None

    def ask_koid(self, operation: str, **fields) -> dict:
        """Return koid's reply, or what the files say if koid does not run;
        about the user of -u. "output" has what follows the reply, if there
        is any. Raises Error."""
        user = {"user": self.user} if self.user else {}
        client = DaemonClient(self.machine)
        reply = client.ask(operation, **fields, **user)
        return {**reply, "output": client.output} if client.output else reply

    @property
    def owner(self) -> str:
        """The name of the user whose tab and runs are meant."""
        return self.user or self.machine.login_name()

    def warn(self, text: str) -> None:
        """Print a line for people, next to the output."""
        sys.stdout.flush()
        print(escape_controls(f"{self.called}: {text}"), file=sys.stderr,
              flush=True)


def prompt(question: str) -> str | None:
    """Ask at the terminal; return a line, or None at the end of input."""
    sys.stdout.flush()
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        print(file=sys.stderr)
    return line.rstrip("\r\n") if line else None


def prompt_secret(question: str) -> str | None:
    """Ask without an echo; return a line, or None at the end of input."""
    import getpass
    try:
        return getpass.getpass(question)
    except EOFError:
        return None


def is_agreed(question: str) -> bool:
    """Ask until the answer is yes or no. The end of the input is a no:
    cron's own loop has no end there."""
    while True:
        answer = prompt(question)
        if answer is None or answer[:1] in ("n", "N"):
            return False
        if answer[:1] in ("y", "Y"):
            return True
        print("Enter Y or N", file=sys.stderr)


def put_out(stream, data: bytes) -> None:
    """Write bytes to a text stream as they are."""
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


def print_json(value) -> None:
    """Print a value for programs: the form that --json documents. It may
    go to a terminal, so UNSAFE characters become escapes of JSON."""
    import json
    import re
    print(re.sub(UNSAFE.replace("\n", "\x0b"),
                 lambda found: f"\\u{ord(found[0]):04x}",
                 json.dumps(value, indent=4, ensure_ascii=False)))


def print_field(word: str, lines: list[str]) -> None:
    """Print lines in a column; only the first has `word` before it."""
    for line in lines:
        print(f"{word:9} {escape_controls(line)}")
        word = ""


# ==========================================================================
# TabCommands: what can be done to a tab?               (files, terminal; C)
#
# gives   install, the commands -e, -l, -r, -T and next
# needs   DaemonClient, parse_tab, match_jobs, Invocation
#
# What crontab(1) knows works here as it does there: its messages and its
# exit status. koid installs the tab, and judges it again.
# ==========================================================================

EDITORS = ("sensible-editor", "vi", "nano")
NEWLINE = "premature EOF"
SYSTEM_TABS = ("/etc/crontab", "/etc/cron.d/")

TEMPLATE = """\
# This is a koitab. A line that begins with # is a comment.
#
# minute (0-59), hour (0-23), day of month (1-31), month (1-12),
# day of week (0-7; 0 and 7 are Sunday), then the command for /bin/sh:
#
# 30 2 * * * tar -czf "$HOME/backup.tgz" "$HOME/work"
#
# What a job prints is kept: koitab history, koitab log NAME. It is mailed,
# too, as cron does. Settings hold for the lines below them:
#
# MAILTO=root
# KOI_TIMEOUT=1h
#
# A section holds the jobs below it together, and a job may have a name:
#
# [Backups]
# "Work" 30 3 * * mon-fri tar -czf "$HOME/work.tgz" "$HOME/work"
#
# This one runs when it is asked for: koitab run "Say Hi" To=Ann
#
# "Say Hi" @manual echo Hello {{To}} {{Times, int, 1}}
"""


def no_tab(options: Invocation) -> Error:
    """Return crontab(1)'s error for a user without a tab."""
    return CrontabError(f"no crontab for {options.owner}")


def unsafe_addresses(text: str) -> list[Diagnostic]:
    """Return a warning for each address that cron would not give a mailer."""
    found = []
    for row, raw in enumerate(text.split("\n"), start=1):
        line = raw.lstrip(BLANKS)
        name, value, at = parse_assignment(line) or ("", "", 0)
        if name in ("MAILTO", "MAILFROM") and value and "$" not in value \
                and not safe_address(value):
            found.append(Diagnostic(
                row, len(raw) - len(line) + at + 1, "unsafe mail",
                f"nothing is mailed: {name} is not {short(value)}",
                "me@example.com,root; no blanks", False))
    return found


def print_diagnostics(problems: list[Diagnostic], path: str) -> None:
    """Print all diagnostics of a tab, in the order of its lines."""
    for problem in sorted(problems, key=lambda p: (p.line, p.column)):
        print(problem.text(path), file=sys.stderr)


def install(options: Invocation, text: str, path: str) -> bool:
    """Install a tab, print its diagnostics, and return if it is installed.
    The words are those of Debian's crontab. Raises Error."""
    reply = options.ask_koid("install", text=text)
    problems = [Diagnostic(**row) for row in reply["problems"]]
    print_diagnostics(problems + unsafe_addresses(text), path)
    if reply["installed"]:
        if not reply["daemon"]:
            error = DaemonClient(options.machine).no_daemon()
            options.warn(f"warning: {error.message}, so no job starts "
                         f"({error.hint})")
        return True
    errors = {problem.what for problem in problems if problem.fatal}
    if errors != {NEWLINE}:
        print("errors in crontab file, can't install.", file=sys.stderr)
    if NEWLINE in errors:
        print("new crontab file is missing newline before EOF, can't "
              "install.", file=sys.stderr)
    return False


def usage_error(why: str) -> Error:
    """Return the error for what crontab(1) calls a usage error."""
    return Error(f"usage error: {why}", f"{PROG} [-u USER] FILE", EXIT_ERROR)


def ask_for_tab(options: Invocation) -> str | None:
    """Return the installed tab, None without one, and warn if koid serves a
    crontab of cron's as well. Raises Error."""
    reply = options.ask_koid("list")
    for path in reply.get("served", ()):
        if path.startswith(SPOOLS):
            options.warn(f"warning: koid serves {path}, too")
    return reply["text"]


def command_list(options: Invocation) -> int:
    """koitab -l: print the tab as it is. Raises Error."""
    text = ask_for_tab(options)
    if text is None:
        raise no_tab(options)
    print_tab(text)
    return EXIT_OK


def print_tab(text: str) -> None:
    """Print a tab as it is; for a terminal, with its controls escaped: a CR
    could hide what a line does."""
    if sys.stdout.isatty():
        lines = text.removesuffix("\n").split("\n") if text else []
        text = "".join(f"{escape_controls(line)}\n" for line in lines)
    put_out(sys.stdout, text.encode("utf-8", "surrogateescape"))


def command_remove(options: Invocation) -> int:
    """koitab -r: remove the tab; with -i ask before. Raises Error."""
    owner = options.owner
    if options.ask and not is_agreed(f"{options.called}: really delete "
                                     f"{owner}'s crontab? (y/n) "):
        return EXIT_OK
    if not options.ask_koid("remove")["removed"]:
        raise no_tab(options)
    return EXIT_OK


class EditSession:
    """The file that an editor gets, in a directory where nobody but the
    caller can replace it."""

    def __init__(self, text: str):
        import tempfile
        self.first = text
        try:
            self.directory = tempfile.mkdtemp(prefix="crontab.")
            self.path = posixpath.join(self.directory, "crontab")
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                         | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise Error(f"no place for a draft: {error.strerror}",
                        "TMPDIR=/var/tmp koitab -e") from None

    def text(self) -> str:
        """Return what the editor left. The path may name another file by
        now, so the open file is judged. Raises Error."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW
                         | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                error = file_error(os.fstat(fd), (os.geteuid(),), 0, False)
                if error:
                    raise Error(f"{self.path}: {error}")
                with open(fd, "rb", closefd=False) as file:
                    data = file.read(LONGEST_TAB + 1)
            finally:
                os.close(fd)
        except OSError as error:
            raise Error(f"{self.path}: {error.strerror}") from None
        return data.decode("utf-8", "surrogateescape")

    def remove(self) -> None:
        """Delete the draft and its directory."""
        import shutil
        shutil.rmtree(self.directory, ignore_errors=True)

    def leave(self, options: Invocation) -> None:
        """Keep a changed draft, since nothing was installed."""
        try:
            changed = self.text() != self.first
        except Error:
            changed = True
        if changed:
            options.warn(f"edits left in {self.path}")
        else:
            self.remove()


def editor() -> list[str]:
    """Return the caller's editor and its options. No shell reads them.
    Raises Error."""
    import shlex
    import shutil
    for name in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(name, ""))
        except ValueError as error:
            raise Error(f"{name} cannot be read: {error}",
                        f"{name}=vi koitab -e") from None
        if words:
            return words
    for program in EDITORS:
        if shutil.which(program):
            return [program]
    raise Error("there is no editor", "EDITOR=PROGRAM koitab -e")


def run_editor(path: str) -> None:
    """Let the caller edit a file. Raises Error.

    What the keyboard sends is for the editor and must not end koitab. So
    koitab ignores it until the editor ends, and the editor starts with the
    default actions.
    """
    words = editor()
    keys = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    before = [signal.signal(number, signal.SIG_IGN) for number in keys]
    try:
        child = os.posix_spawnp(
            words[0], [*words, path], os.environ,
            setsigdef=(*keys, signal.SIGPIPE, signal.SIGXFSZ))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except OSError as error:
        raise Error(f"{words[0]}: {error.strerror}", "EDITOR=PROGRAM "
                    "koitab -e") from None
    finally:
        for number, action in zip(keys, before):
            signal.signal(number, action or signal.SIG_DFL)
    if status:
        raise Error(f"{short(words[0])} " + (
            f"exited with status {status}" if status > 0
            else f"killed; signal {-status}") + ": nothing was installed")


def command_edit(options: Invocation) -> int:
    """koitab -e: edit the tab and install it. Raises Error."""
    before = ask_for_tab(options)
    if before is None:
        print(f"{no_tab(options)} - using an empty one",
              file=sys.stderr)
    draft = EditSession(TEMPLATE if before is None else before)
    try:
        done = edit_until_installed(options, draft, before)
    except BaseException:
        draft.leave(options)
        raise
    if done:
        draft.remove()
        return EXIT_OK
    draft.leave(options)
    return EXIT_ERROR


def edit_until_installed(options: Invocation, draft: EditSession,
                         before: str | None) -> bool:
    """Edit until the tab is installed or left as it was; return False if
    the caller gives up. `before` is the installed tab. Raises Error."""
    while True:
        run_editor(draft.path)
        text = draft.text()
        if text == draft.first:
            options.warn("no changes made to crontab")
            return True
        if options.ask_koid("list")["text"] != before:
            raise Error("the crontab was changed by somebody else meanwhile",
                        f"{PROG} -l | diff - {draft.path}")
        options.warn("installing new crontab")
        if install(options, text, draft.path):
            return True
        if not is_agreed("Do you want to retry the same edit? (Y/N) "):
            return False


def command_test(options: Invocation, path: str) -> int:
    """koitab -T: print all diagnostics. cronie's -T stops at the first.
    Raises Error."""
    text = options.machine.tab_text(path)
    tab, _ = parse_with_zones(options, text, path)
    print_diagnostics(tab.diagnostics + unsafe_addresses(text), path)
    if tab.errors():
        print("Invalid crontab file. Syntax issues were found.",
              file=sys.stderr)
        return EXIT_ERROR
    print("No syntax issues were found in the crontab file.",
          file=sys.stderr)
    return EXIT_OK


# --- next -----------------------------------------------------------------


def pause_words(until: float) -> str:
    """Return "paused until TIME", as RFC 3339 writes it; 0: no end."""
    return f"paused until {format_rfc3339(until)}" if until else "paused"


def parse_instant(text: str, zone: Zone, now: float,
                  option: str = "--from") -> int:
    """Return the value of --from in seconds since 1970. Local time is that
    of `zone`; "" is `now`. Raises Error."""
    def refuse():
        raise Error(f"{option} {text}: not a time (expected 2026-03-29T01:30, "
                    "2026-03-29T01:30:00+01:00 or 2026-03-29)", "",
                    EXIT_USAGE)

    if not text or text == "now":
        return int(now // 1)
    import re
    found = re.fullmatch(
        r"([0-9]{4})-([0-9]{2})-([0-9]{2})(?:[T ]([0-9]{2}):([0-9]{2})"
        r"(?::([0-9]{2})(?:\.[0-9]+)?)?)? ?(?:(Z|z)|([+-])([0-9]{2}):?"
        r"([0-9]{2}))?", text.strip())
    if not found or not is_date("-".join(found.group(1, 2, 3))):
        refuse()
    year, month, day, hour, minute, second = (
        int(part or 0) for part in found.group(1, 2, 3, 4, 5, 6))
    if hour > 23 or minute > 59 or second > 60:
        refuse()
    wall = days_since_epoch(year, month, day) * DAY + hour * HOUR \
        + minute * MINUTE + second
    if found[7]:
        return wall
    if found[8]:
        ahead = int(found[9]) * HOUR + int(found[10]) * MINUTE
        return wall + ahead if found[8] == "-" else wall - ahead
    return zone.instant(wall)


def parse_with_zones(options: Invocation, text: str, path: str = "",
                     user: str = "") -> tuple[Tab, dict[str, Zone]]:
    """Return a tab, and the time zones that it names; "" is the local one.
    `path` shows whether it is one of cron's. Raises Error."""
    machine = options.machine
    tab = parse_tab(text, path.startswith(SYSTEM_TABS),
                    root=os.geteuid() == 0, salt=machine.salt(user),
                    literal=path.startswith(SPOOLS), file=path)
    return tab, {**check_zones(tab, machine), "": machine.local_zone()}


def select_tabs(options: Invocation):
    """Return the path, the tab and the zones of each tab that is meant.
    Raises Error."""
    if options.tab:
        text = options.machine.tab_text(options.tab)
        return [(options.tab, *parse_with_zones(options, text, options.tab))]
    reply, found = options.ask_koid("list"), []
    if reply["text"] is not None:
        found.append((f"crontab of {options.owner}", *parse_with_zones(
            options, reply["text"], user=options.owner)))
    for path, text in reply.get("served", {}).items():
        user = options.owner if path.startswith(SPOOLS) else "root"
        found.append((path, *parse_with_zones(options, text, path, user)))
    if not found:
        raise no_tab(options)
    return found


def next_starts(job: Job, zones: dict, after: int, many: int,
                delay: int) -> list[int]:
    """Return the next starts of a job in seconds since 1970, each put off
    by `delay` minutes."""
    from itertools import islice
    if not job.schedule:
        return []
    delay *= MINUTE
    return [start + delay for start in islice(unskipped_starts(
        job, zones[job.settings.zone], after - delay), many)]


def command_next(options: Invocation, name: str = ""
                 ) -> int:
    """koitab next: the status is 1 if a tab has errors. Raises Error."""
    tabs, rows, errors = select_tabs(options), [], []
    now = options.machine.clock.now()
    jobs = match_jobs([job for _, tab, zones in tabs for job in tab.jobs
                       if job.settings.zone in zones and (
                           not name or job.user in ("", options.owner))],
                      name)
    for path, tab, zones in tabs:
        print_diagnostics(tab.diagnostics, path)
        errors += tab.errors()
        after = parse_instant(options.start, zones[""], now)
        for job in tab.jobs:
            if any(job is each for each in jobs):
                zone = UTC if options.utc else zones[job.settings.zone]
                starts = next_starts(job, zones, after, options.number or 5,
                                     random_delay(job, options.machine.host()))
                rows.append((path, job, [
                    utc_stamp(at) if options.utc else
                    format_rfc3339(at, zone.offset(at)) for at in starts]))
    if options.json:
        print_json([{
            "name": job.name or None, "tag": job.tag, "line": job.line,
            "schedule": job.when, "words": job.describe(), "next": starts,
            **({} if options.tab else {"file": path})}
            for path, job, starts in rows])
    else:
        print_starts(rows)
    return EXIT_ERROR if errors else EXIT_OK


def utc_stamp(instant: int) -> str:
    """Return an instant as RFC 3339 writes it in UTC."""
    return format_rfc3339(instant, 0).replace("+00:00", "Z")


def print_starts(rows: list) -> None:
    """Print the next starts for people: (path, job, starts) in each row."""
    section, file = "", rows[0][0] if rows else ""
    for path, job, starts in rows:
        if path != file:
            section, file = "", path
            print(f"# {escape_controls(path)}")
        if job.section != section:
            section = job.section
            print(f"[{escape_controls(section)}]")
        print(f"{escape_controls(job.label)}: "
              f"{escape_controls(job.describe())}")
        for start in starts:
            print(f"    {start}")


# ==========================================================================
# RunCommands: how is a job run, and its past shown?           (terminal; C)
#
# gives   run_here, history, log, kill, status; find_job, read_arguments
# needs   DaemonClient, match_jobs, Parameter, Invocation
#
# koid starts the job and sends its output in frames; the signals that come
# here go to the job. All of it asks koid and does nothing to jobs itself.
# ==========================================================================

SIGNALS_PASSED_ON = 2   # the next one ends koitab, and the job continues
LONGEST_INPUT = 2**20   # bytes that ARG=- reads; koid takes less
PAGE_OF_RUNS = 500      # a reply of koid's has so many at most


def find_job(jobs: list[dict], name: str, owner: str = "") -> dict:
    """Return the one job, of those that koid or a dashboard lists, that a
    name means; of the user `owner`, if one is given. Raises Error."""
    from types import SimpleNamespace
    others = sorted({job["user"] for job in jobs if name == job["name"]})
    mine = [SimpleNamespace(**job) for job in jobs
            if owner in ("", job["user"])]
    if name and others and owner and owner not in others:
        raise Error(f"{owner} has no job {short(name)}",
                    f"{PROG} run -u {others[0]} ...")
    found = [vars(job) for job in match_jobs(mine, name)] if name else []
    if found and parse_count(name) is not None:
        raise Error(f"{name} is not the name of a job; the job on line "
                    f"{found[0]['line']} is {short(found[0]['label'])}",
                    f"{PROG} run {found[0]['tag']}")
    if len(found) == 1:
        return found[0]
    if not found:
        raise Error("no job has an empty name", f"{PROG} next")
    raise Error(f"{len(found)} jobs are called {short(name)}: " + ", ".join(
        f"{job['section']}/{job['name']}" if job["section"] and job["name"]
        else job["tag"] for job in found),
        f"{PROG} run SECTION/NAME; or the tag in place of the name")


def parameters_of(job: dict) -> list[Parameter]:
    """Return the parameters of a job that koid or a dashboard lists."""
    return [Parameter(row["name"], row["type"], row["default"],
                      tuple(row["choices"])) for row in job["params"]]


def read_arguments(job: dict, words: list[str]) -> dict[str, str]:
    """Return a value for each parameter: typed in `words` as ARG=VALUE,
    prompted, or the default. koid checks them again. Raises Error."""
    params, given = parameters_of(job), {}
    for word in words:
        param = match_parameter(params, word)
        if param.name in given:
            raise Error(f"{short(param.name)} is given twice", "",
                        EXIT_USAGE)
        value = word[len(param.name) + 1:]
        if param.type == "secret" and value != "-":
            raise Error(f"{short(param.name)} is secret, but every user can "
                        "read command lines", f"{escape_controls(param.name)}"
                        "=- for standard input, or none for a prompt",
                        EXIT_USAGE)
        given[param.name] = value = read_input() if value == "-" else value
        reason = param.value_error(value)
        if reason:
            raise Error(f"{short(param.name)}: {reason}", "", EXIT_USAGE)
    missing = [param for param in params
               if param.default is None and param.name not in given]
    if missing and not os.isatty(0):
        raise Error("no value for " + join_words([
            short(param.name) for param in missing]), " ".join([
                "koitab run NAME", *(f'"{escape_controls(param.name)}=..."'
                                     for param in missing)]), EXIT_USAGE)
    given.update((param.name, prompt_value(param)) for param in missing)
    return {param.name: given.get(param.name, param.default)
            for param in params}


def match_parameter(params: list[Parameter], word: str) -> Parameter:
    """Return the parameter of ARG=VALUE; its name may contain a =. Raises
    Error."""
    found = [param for param in params if word.startswith(f"{param.name}=")]
    if found:
        return max(found, key=lambda param: len(param.name))
    name = word.partition("=")[0]
    if "=" not in word:
        raise Error(f"unexpected argument {short(word)}",
                    f"{PROG} run NAME [ARG=VALUE]...", EXIT_USAGE)
    meant = nearest(name, [param.name for param in params])
    raise Error(f"the job has no argument {short(name)}",
                f"did you mean {short(meant)}?" if meant else
                ", ".join(escape_controls(param.name) for param in params),
                EXIT_USAGE)


def read_input() -> str:
    """Return standard input without its last newline. A secret that comes
    this way is in no list of processes. Raises Error."""
    data = sys.stdin.buffer.read(LONGEST_INPUT + 1)
    if len(data) > LONGEST_INPUT:
        raise Error("standard input is too long for a value", "", EXIT_USAGE)
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def prompt_value(param: Parameter) -> str:
    """Ask for a value until it is valid, and return it. Raises Error."""
    kind = {"bool": "true|false", "choice": "|".join(param.choices),
            "string": "", "text": "one line"}.get(param.type, param.type)
    question = escape_controls(param.name) + (
        f" ({escape_controls(kind)}): " if kind else ": ")
    while True:
        value = prompt_secret(question) if param.type == "secret" \
            else prompt(question)
        if value is None:
            raise Error(f"no value for {short(param.name)}, so nothing ran")
        reason = param.value_error(value)
        if not reason:
            return value
        print(f"  {reason}", file=sys.stderr)


def is_confirmed(job: dict, where: str = "") -> bool:
    """Does the caller agree to run this job? Only KOI_CONFIRM=yes makes
    koitab ask, and only at a terminal. Raises Error."""
    return job["confirm"] != "yes" or not os.isatty(0) or is_agreed(
        f"Run {escape_controls(job['label'])}{where}? (y/n) ")


def run_here(options: Invocation, name: str,
             *words: str) -> int:
    """Run a job of this machine; return its exit status. Raises Error."""
    options.reject_others(("user",), "run without --on")
    daemon, reply = DaemonClient(options.machine), options.ask_koid("jobs")
    job = find_job(reply["jobs"], name, options.owner)
    if not reply["daemon"]:
        raise daemon.no_daemon()
    arguments = read_arguments(job, list(words))
    if not is_confirmed(job):
        return EXIT_ERROR
    return RunAttachment(options, *daemon.attach(
        job["tag"], arguments, job["user"]), raw=job["user"]
        == options.machine.user_name(os.getuid())).follow()


# Colours (SGR) and ends of lines, which do no harm, or a character that may.
SAFE_OR_UNSAFE = r"(\x1b\[[0-9;:]*m|\n)|" + UNSAFE
INCOMPLETE = r"(\r|\x1b(\[[0-9;:]{0,60})?)\Z"      # it may go on as a safe one


class OutputPrinter:
    """Prints the output of a run, as it comes, to stdout and stderr.

    A terminal gets it with UNSAFE characters escaped, colours excepted,
    unless it is `raw`: of a job of the caller's.
    """

    def __init__(self, options: Invocation, raw: bool = False):
        import codecs
        sys.stdout.flush()
        self.options = options
        decoder = codecs.getincrementaldecoder("utf-8")
        self.decoders = {stream: decoder("backslashreplace") for stream in (
            STDOUT, STDERR) if not raw and os.isatty(stream)}
        self.held = dict.fromkeys(self.decoders, "")
        self.endings = dict(self.held)      # what `flush` adds to the output

    def write(self, stream: int, data: bytes) -> None:
        """Print a frame. STDOUT and STDERR are descriptors, too."""
        if stream == NOTE:
            self.flush()
            self.options.warn(data.decode("utf-8", "replace"))
        elif stream in self.decoders:
            self.print_escaped(stream, self.decoders[stream].decode(data))
        elif stream in (STDOUT, STDERR):
            write_all(stream, data)

    def print_escaped(self, stream: int, text: str) -> None:
        """Print text on a terminal, but for what is incomplete at its end.
        """
        import re
        text = self.held[stream] + text
        end = re.search(INCOMPLETE, text)
        text, self.held[stream] = (text[:end.start()], end[0]) if end \
            else (text, "")
        self.print_text(stream, text.replace("\r\n", "\n"))

    def print_text(self, stream: int, text: str) -> None:
        """Print text on a terminal, with UNSAFE characters escaped."""
        import re
        if not text:
            return
        text = re.sub(SAFE_OR_UNSAFE, lambda found: found[1] or escaped(
            found), text)
        write_all(stream, text.encode())
        coloured = "\x1b" in text + self.endings[stream]
        self.endings[stream] = "\x1b[0m" * coloured + "\n" * (
            not text.endswith("\n"))

    def flush(self) -> None:
        """Print what was incomplete, end colours and lines: what follows is
        not of the job."""
        for stream, decoder in self.decoders.items():
            self.print_text(stream, self.held[stream] + decoder.decode(
                b"", True))
            write_all(stream, self.endings[stream].encode())
            self.held[stream] = self.endings[stream] = ""
            decoder.reset()


class Detached(Exception):
    """The caller does not wait any longer; the job continues."""


class RunAttachment:
    """A connection to koid that carries the output of one run, and signals
    to its job."""

    def __init__(self, options: Invocation, run: int, connection,
                 first: bytes, raw: bool = True):
        self.options, self.run, self.connection = options, run, connection
        self.output = OutputPrinter(options, raw)
        self.data = bytearray(first)    # the start of an incomplete frame
        self.signals: list[int] = []    # received by this process

    def follow(self) -> int:
        """Print the output until the run ends; return its exit status.
        Raises Error, and OSError if the output cannot be written."""
        sys.stdout.flush()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # A signal that comes just before `select` would be forgotten in it;
        # the byte that is written for each one wakes it up.
        woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self.on_signal)
                  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                  if signal.getsignal(number) != signal.SIG_IGN}     # nohup
        try:
            return self.print_until_end(reader)
        except Detached:
            self.print_continues()
            return EXIT_SIGNAL + self.signals[-1]
        except OSError:         # nobody reads, or the disk is full
            self.print_continues()
            raise
        finally:
            for number, action in before.items():
                signal.signal(number, action or signal.SIG_DFL)
            signal.set_wakeup_fd(woken)
            os.close(reader)
            os.close(writer)
            self.connection.close()

    def on_signal(self, number: int, _frame) -> None:
        """Send the first signal to the job as it is, the second as SIGTERM.
        The third raises Detached."""
        self.signals.append(number)
        if len(self.signals) > SIGNALS_PASSED_ON:
            raise Detached
        if len(self.signals) == SIGNALS_PASSED_ON:
            number = signal.SIGTERM
            self.options.warn("once more leaves the job running")
        try:
            self.connection.send(bytes([number]))
        except OSError:
            pass                # the run has ended: the next read shows it

    def print_continues(self) -> None:
        self.output.flush()
        self.options.warn(f"run {self.run} continues (koitab log {self.run}; "
                          f"koitab kill {self.run})")

    def print_until_end(self, wakeups: int) -> int:
        """Print frames until the one with the end; return the run's exit
        status. `wakeups` is readable after a signal. Raises Error."""
        while True:
            size = whole_frames(self.data)
            for stream, _, body in read_frames(bytes(self.data[:size])):
                if stream == END:
                    self.output.flush()
                    return self.exit_status(body)
                self.output.write(stream, body)
            del self.data[:size]
            ready = select.select([self.connection, wakeups], [], [])[0]
            if wakeups in ready:
                os.read(wakeups, 64)
            if self.connection in ready:
                self.receive()

    def receive(self) -> None:
        """Read more of a frame. Raises Error if koid closed the
        connection."""
        try:
            piece = self.connection.recv(CHUNK)
        except ConnectionError:
            piece = b""
        if not piece:
            self.print_continues()
            raise Error("lost the connection to koid", "koitab status")
        self.data += piece

    def exit_status(self, body: bytes) -> int:
        """Print why the run ended, if it did not exit; return its status."""
        import json
        end = json.loads(body)
        if end["signal"] or end["reason"]:
            self.options.warn(self.recorded_result() or end["reason"]
                              or signal_words(end["signal"]))
        return status_of_run(end)

    def recorded_result(self) -> str:
        """Return what the history says of the run: its time limit, or who
        killed it; "" if koid does not say in time."""
        for _ in range(20):
            try:
                run = self.options.ask_koid("history", limit=1,
                                            before=self.run + 1)["runs"][0]
            except (Error, IndexError):
                break
            if run["run"] == self.run and run["state"] != "running":
                return result_words(run)
            time.sleep(0.1)     # it has not read the supervisor's report yet
        return ""


def status_of_run(run: dict) -> int:
    """Return the exit status that stands for a run's, as a shell has it."""
    if run["signal"]:
        return EXIT_SIGNAL + run["signal"]
    return EXIT_ERROR if run["exit"] is None else run["exit"]


# --- history, log, status, kill -------------------------------------------

BARS = "▁▂▃▄▅▆▇█"
LONGEST_SPARKLINE = 40  # durations


def sparkline(durations: list[float]) -> str:
    """Return a line of bars; the longest duration is the highest."""
    top = max(durations, default=0) or 1
    return "".join(BARS[min(int(duration / top * 8), 7)]
                   for duration in durations)


def signal_words(number: int) -> str:
    """Return "killed by signal 9 (SIGKILL)"."""
    try:
        name = f" ({signal.Signals(number).name})"
    except ValueError:
        name = ""
    return f"killed by signal {number}{name}"


def result_words(run: dict) -> str:
    """Return how a run went: ok; exit 3; missed x12; skipped: why."""
    state, reason = run["state"], run["reason"]
    if state == "unstartable":
        words = "not started"
    elif state != "done":
        words = f"{state} x{run['count']}" if run["count"] > 1 else state
    elif run["signal"]:
        words = signal_words(run["signal"])
    else:
        words = f"exit {run['exit']}" if run["exit"] else "ok"
    if reason.startswith("timeout after "):
        words = f"stopped after {reason[14:]} (KOI_TIMEOUT)"
    elif reason:
        words += f": {reason}"
    return words + (f", attempt {run['attempt']}" if run["attempt"] > 1
                    else "")


def duration_of(run: dict) -> float | None:
    """Return the seconds from start to end, None if one is unknown."""
    if run["started"] is None or run["ended"] is None:
        return None
    return max(run["ended"] - run["started"], 0.0)


def duration_words(seconds: float | None) -> str:
    """Return a duration with at most two significant parts, or "-"."""
    if seconds is None:
        return "-"
    return format_duration(round(seconds) if seconds >= 10 else
                           round(seconds, 1) if seconds >= 1 else seconds)


def start_words(run: dict) -> str:
    """Return when a run started, or should have, as RFC 3339 writes it."""
    at = next((run[key] for key in ("started", "due", "requested_at")
               if run[key] is not None), None)
    return "-" if at is None else format_rfc3339(at)


def label_for(run: dict, owner: str) -> str:
    """Return the label of a run or job, with its user if not `owner`."""
    label = escape_controls(run["label"])
    return f"{run['user']}: {label}" if run["user"] not in ("", owner) \
        else label


def last_runs(options: Invocation, name: str) -> list[dict]:
    """Return the last runs, the newest at the end. Raises Error."""
    wanted, found = options.number or 20, []
    fields = {"job": name} if name else {}
    while len(found) < wanted:
        more = {"before": found[-1]["run"]} if found else {}
        runs = options.ask_koid(
            "history", limit=min(wanted - len(found), PAGE_OF_RUNS),
            **fields, **more)["runs"]
        if not runs:
            break
        found += runs
    return found[::-1]


def command_history(options: Invocation, name: str = ""
                    ) -> int:
    """koitab history: a table, and a line of bars per job. Raises Error."""
    runs = last_runs(options, name)
    if options.json:
        print_json(runs)
        return EXIT_OK
    owner, durations = options.owner, {}
    labels = [label_for(run, owner)[:24] for run in runs]
    width = max(map(len, labels), default=0)
    if not runs:
        options.warn("no run is remembered")
        return EXIT_OK
    print(f"{'RUN':>5}  {'STARTED':25}  {'JOB':{width}}  {'BY':8}  "
          f"{'TOOK':>6}  RESULT")
    for run, label in zip(runs, labels):
        seconds = duration_of(run)
        print(f"{run['run']:>5}  {start_words(run):25}  {label:{width}}  "
              f"{run['trigger']:8}  {duration_words(seconds):>6}  "
              f"{escape_controls(result_words(run))}")
        if seconds is not None:
            durations.setdefault((run["user"], run["tag"], label), []
                                 ).append(seconds)
    if durations:
        print("\nHow long the jobs took, the newest on the right:")
    for (_, _, label), seconds in durations.items():
        print(f"{label:{width}}  {sparkline(seconds[-LONGEST_SPARKLINE:])}  "
              f"{duration_words(seconds[-1])}")
    return EXIT_OK


def run_or_job(which: str) -> dict:
    """Return the fields of a request that name a run, or a job's newest."""
    return {"run": int(which)} if parse_count(which) else {"job": which}


def command_log(options: Invocation, which: str) -> int:
    """koitab log: the output of a run, or of a job's newest. Raises
    Error."""
    reply = options.ask_koid("log", **run_or_job(which))
    run, frames = reply["run"], read_frames(reply.get("output", b""))
    if options.json:
        names = {STDOUT: "stdout", STDERR: "stderr", NOTE: "note"}
        print_json({**run, "frames": [
            {"stream": names[stream], "ms": ms,
             "text": data.decode("utf-8", "backslashreplace")}
            for stream, ms, data in frames if stream in names]})
        return EXIT_OK
    output = OutputPrinter(options)
    for stream, _, data in frames:
        output.write(stream, data)
    output.flush()
    if run["state"] != "done":
        options.warn(f"run {run['run']}: {result_words(run)}")
    return EXIT_OK


def command_kill(options: Invocation, which: str) -> int:
    """koitab kill: SIGTERM, later SIGKILL; or out of the queue. Raises
    Error."""
    run = options.ask_koid("kill", **run_or_job(which))["run"]
    print(f"run {run['run']} ({escape_controls(run['label'])}) was asked to "
          f"end (SIGTERM; SIGKILL {KILL_AFTER:g} s later)")
    return EXIT_OK


def command_pause(options: Invocation, name: str) -> int:
    """koitab pause: let a job start by hand alone. Raises Error."""
    now, machine = options.machine.clock.now(), options.machine
    seconds, until = parse_duration(options.until), 0
    if "until" in options.given:
        until = int(now + seconds) if seconds else parse_instant(
            options.until, machine.local_zone(), now, "--until")
    reply = options.ask_koid("pause", job=name, until=until)
    print(f"{escape_controls(reply['label'])}: {pause_words(until)}")
    return EXIT_OK


def command_resume(options: Invocation, name: str) -> int:
    """koitab resume: end a job's pause. Raises Error."""
    reply = options.ask_koid("resume", job=name)
    print(f"{escape_controls(reply['label'])}: resumed")
    return EXIT_OK


def command_status(options: Invocation) -> int:
    """koitab status: 0 if koid runs without problems and no job's last run
    failed, else 1. Raises Error."""
    try:
        state = options.ask_koid("status")
    except Error as error:
        if options.json:
            raise
        print(f"koid      {escape_controls(error.message)}"
              + (f" ({escape_controls(error.hint)})" if error.hint else ""))
        state = None
    jobs = options.ask_koid("jobs")["jobs"]
    bad = [job for job in jobs if job["last"] and is_failure(job["last"])]
    if options.json:
        print_json({**state, "failed": bad})
    else:
        owner = options.owner
        for word, lines in (status_fields(state, owner, jobs) if state else {
                "tab": [plural(len(jobs), "job")]}).items():
            print_field(word, lines)
        print_field("paused", [
            f"{label_for(job, owner)}: {pause_words(job['paused'])}"
            for job in jobs if job.get("paused") is not None])
        print_field("failed", [
            f"{label_for(job, owner)}: {result_words(job['last'])} at "
            f"{start_words(job['last'])} (koitab log {job['last']['run']})"
            for job in bad])
    well = state and not (bad or state["problems"] or state["late"]
                          or state["tab"]["problems"]
                          or (state.get("dashboard") or {}).get("problems"))
    return EXIT_OK if well else EXIT_ERROR


def status_fields(state: dict, owner: str, jobs: list[dict]
                  ) -> dict[str, list[str]]:
    """Return the lines that describe koid, by the word before them."""
    tab, files = state["tab"], [
        job["file"] for job in jobs
        if not job["file"].startswith(f"{state['home']}/tabs/")]
    return {
        "koid": [f"{state['version']}, pid {state['pid']}, since "
                 f"{format_rfc3339(state['started'])}, {state['home']}"
                 + (", with cron's tabs" if state["system"] else "")],
        "tab": [f"{tab['user']}: {plural(tab['jobs'], 'job')}", *(
            f"{path}: {plural(files.count(path), 'job')}"
            for path in dict.fromkeys(files)), *tab["problems"]],
        "running": [f"{run['run']} {label_for(run, owner)}, since "
                    f"{start_words(run)} ({run['trigger']})"
                    for run in state["running"]],
        "late": state["late"],
        "trouble": [text for text in state["problems"] if not any(
            text.endswith(known.removeprefix("tab"))
            for known in tab["problems"])],     # "tab" has them
        "next": [format_rfc3339(state["next"])] if state["next"] else [],
        "dashboard": agent_lines(state.get("dashboard"))}


def agent_lines(state: dict | None) -> list[str]:
    """Return the lines that describe koid's connection to its dashboard;
    only one if there is no problem."""
    if not state:
        return []
    found = [f"{state['url']}, as {state['name']}", *state["problems"]]
    if state["problems"] and state["unsent"]:
        found.append(f"{plural(state['unsent'], 'change')} not sent yet")
    return found + [f"refused {row['count']:,} x, last at "
                    f"{format_rfc3339(row['at'])}: {row['reason']}"
                    for row in state["refused"][:5]]


# ==========================================================================
# Remote: what can a host ask of a dashboard?         (network, terminal; C)
#
# gives   the commands -d and run --on; enrollment_directory
# needs   DashboardClient, Enrollment, derive_keys, find_job, read_arguments
#
# The passphrase is read here and never sent. From it come the key that
# proves who asks, and the key of a host that signs a request to run.
# ==========================================================================

LOCAL_DASHBOARD = "http://127.0.0.1:8077"
LONGEST_CA = 2**19      # bytes: it becomes a part of the file `keys`
POLL_PAUSE = 0.2        # seconds between two questions about a request
REQUEST_LIFE = 300_000  # ms that a request may wait for its host
FINAL_STATES = ("done", "interrupted", "missed", "skipped", "unstartable")
LEAVE_AND_JOIN = "on that host: koitab -d off; koitab -d join URL"


def ask_dashboard(client: DashboardClient, method: str, path: str,
                  body: dict | None = None) -> dict:
    """Return the dashboard's answer. Raises Error, which names the URL."""
    where = f"{client.scheme}://{client.host}:{client.port}"
    try:
        return client.request(method, path, body)
    except ConnectionFailed as error:
        raise Error(f"{where}: {error}", "koitab dashboard"
                    if is_local(client.host) else "") from None
    except HttpRefused as no:
        raise Error(f"{where}: {no.text}", no.hint) from None


def read_certificates(path: str) -> str:
    """Return the text of the file that --ca names. Raises Error."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(LONGEST_CA + 1)
    except OSError as error:
        raise Error(f"--ca {path}: {error.strerror}") from None
    except ValueError:
        text = ""
    if "-----BEGIN CERTIFICATE-----" not in text or len(text) > LONGEST_CA:
        raise Error(f"--ca {path}: not a file of certificates (expected PEM, "
                    f"at most {LONGEST_CA:,} bytes)")
    return text


def connect_dashboard(options: Invocation, url: str, ca: str = ""
            ) -> tuple[DashboardClient, str]:
    """Return a client for a dashboard, and the certificates that it trusts
    ("": the system's). Raises Error, also where the keys could be read on
    the way without --plain-http."""
    if "ca" in options.given:
        ca = read_certificates(options.ca)
    client = DashboardClient(url, ca=ca)
    if client.scheme == "http" and not is_local(client.host) \
            and not options.plain_http:
        raise Error(f"{url}: without TLS anybody on the way can read the "
                    "output and the keys of this dashboard", "https://, an "
                    "ssh tunnel to 127.0.0.1, or --plain-http if you trust "
                    "the network")
    return client, ca


def split_dashboard_url(text: str) -> tuple[str, str]:
    """Return URL and ID of a dashboard, as `-d new` printed them. The ID is
    "" if it is missing, or if a browser shows another part of the page
    there. Raises Error."""
    url, _, dash = text.partition("#")
    if dash.startswith("/"):
        dash = ""
    if dash and not is_hex(dash, 16):
        raise Error(f"#{short(dash)} is not a dashboard's ID (expected the "
                    "16 digits after the # of the URL that koitab -d new "
                    "printed)")
    return url, dash


def read_passphrase(question: str = "Passphrase: ") -> str:
    """Return a passphrase from the terminal, or a line of standard input;
    an option could be read by everybody. Raises Error."""
    # Not from sys.stdin itself: it would read ahead of what ARG=- is to have.
    text = prompt_secret(question) if os.isatty(0) else sys.stdin.buffer \
        .readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not text:
        raise Error("no passphrase was given", "type it, or write it to "
                    "standard input", EXIT_USAGE)
    return text


def enrollment_directory(options: Invocation) -> str:
    """Return the state directory of the koid that the caller may change.
    Raises Error."""
    if os.geteuid() and "KOI_HOME" not in os.environ \
            and os.path.exists(ROOT_SOCKET):
        raise Error("this machine's koid is root's", "sudo; or name the "
                    "dashboard: run --on HOST --url URL, page URL")
    return options.machine.state_directory()


def reload_enrollment(options: Invocation) -> bool:
    """Have koid read its keys; return False if none runs. Raises Error."""
    daemon = DaemonClient(options.machine)
    connection = daemon.connect()
    if not connection:
        return False
    connection.close()
    daemon.ask("relink")
    return True


def hashes_of(keys: Keys, salt: bytes) -> dict:
    """Return what a dashboard may know of keys, as its API takes it."""
    return {"salt": salt.hex(), "rounds": ROUNDS,
            "api_sha256": sha256_hex(keys.api.hex()),
            "view_sha256": sha256_hex(keys.view.hex())}


def log_in(client: DashboardClient, dash: str,
           passphrase: str) -> tuple[Keys, str]:
    """Return the keys of a passphrase and the dashboard's ID. The client's
    requests are the operator's from here on. Raises Error."""
    found = ask_dashboard(client, "GET", "/api/v1/salt" + (
        f"?dash={dash}" if dash else ""))
    try:
        salt, rounds = bytes.fromhex(found["salt"]), int(found["rounds"])
        dash = found["dash"]
        if not is_hex(dash, 16):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise Error("not a koi dashboard") from None
    keys = derive_keys(passphrase, salt, rounds)
    client.token = keys.api.hex()
    return keys, dash


def enroll(options: Invocation, client: DashboardClient,
           url: str, ca: str, keys: Keys, dash: str) -> None:
    """Make this host a member of a dashboard. Raises Error."""
    directory, host = enrollment_directory(options), os.urandom(16).hex()
    token, name = os.urandom(32).hex(), options.machine.host()
    client.token = keys.api.hex()
    ask_dashboard(client, "POST", "/api/v1/hosts", {
        "host": host, "name": name, "token_sha256": sha256_hex(token)})
    options.machine.write_enrollment(directory, Enrollment(
        url, dash, host, token, host_key(keys.run, host).hex(), name, ca,
        options.machine.clock.now()))
    if not reload_enrollment(options):
        error = DaemonClient(options.machine).no_daemon()
        options.warn(f"{error.message}; it connects when it is started "
                     f"({error.hint})")


def require_not_enrolled(options: Invocation) -> None:
    """Raise Error if this machine is a member of a dashboard already."""
    enrollment = options.machine.read_enrollment(enrollment_directory(options))
    if enrollment:
        raise Error(f"this machine belongs to {enrollment.url} already",
                    "koitab -d off")


def require_enrollment(options: Invocation) -> Enrollment:
    """Return the keys of this machine for its dashboard. Raises Error."""
    enrollment = options.machine.read_enrollment(enrollment_directory(options))
    if not enrollment:
        raise Error("this machine belongs to no dashboard", "koitab -d new; "
                    "or koitab -d join URL")
    return enrollment


def new_dashboard(options: Invocation,
                  url: str = LOCAL_DASHBOARD) -> int:
    """koitab -d new: make a dashboard and join it. Raises Error."""
    require_not_enrolled(options)
    client, ca = connect_dashboard(options, url)
    passphrase = format_passphrase(os.urandom(20))
    salt = os.urandom(SALT_BYTES)
    keys = derive_keys(passphrase, salt)
    dash = ask_dashboard(client, "POST", "/api/v1/dashboards",
                         hashes_of(keys, salt)).get("dash", "")
    if not is_hex(dash, 16):
        raise Error("not a koi dashboard")
    print_keys(url, dash, keys, passphrase)
    enroll(options, client, url, ca, keys, dash)
    return EXIT_OK


def print_keys(url: str, dash: str, keys: Keys, passphrase: str) -> None:
    """Print passphrase and viewer key, which are shown only this time."""
    print(f"dashboard   {url.rstrip('/')}/#{dash}")
    print(f"passphrase  {passphrase}")
    print("            Keep it: it is stored nowhere, and whoever has it"
          " can run your jobs.")
    print(f"viewer key  {VIEW_PREFIX}{keys.view.hex()}")
    print("            With this one sees everything and can start nothing.")
    sys.stdout.flush()


def join_dashboard(options: Invocation, url: str) -> int:
    """koitab -d join: become a member, by its passphrase. Raises Error."""
    require_not_enrolled(options)
    url, dash = split_dashboard_url(url)
    client, ca = connect_dashboard(options, url)
    keys, dash = log_in(client, dash, read_passphrase())
    enroll(options, client, url, ca, keys, dash)
    print(f"this machine is {options.machine.host()} on "
          f"{url.rstrip('/')}/#{dash}")
    return EXIT_OK


def show_enrollment(options: Invocation) -> int:
    """koitab -d show: 1 if koid is not connected. Raises Error."""
    enrollment = require_enrollment(options)
    print_field("dashboard", [f"{enrollment.url.rstrip('/')}/"
                              f"#{enrollment.dash}"])
    print_field("host", [f"{enrollment.name} ({enrollment.host})"])
    print_field("keys", [f"{key_id(enrollment.secret)}, since "
                         f"{format_rfc3339(enrollment.since)}"])
    try:
        state = options.ask_koid("status").get("dashboard")
    except Error as error:
        print_field("link", [error.message])
        return EXIT_ERROR
    print_field("link", agent_lines(state)[1:] or ["up"] if state else [
        "koid does not use these keys: see koitab status; or restart it"])
    return EXIT_ERROR if not state or state["problems"] else EXIT_OK


def rotate_passphrase(options: Invocation) -> int:
    """koitab -d rotate: new keys for all; the old ones end. Raises Error."""
    enrollment = require_enrollment(options)
    client, _ = connect_dashboard(options, enrollment.url, enrollment.ca)
    keys, _ = log_in(client, enrollment.dash,
                     read_passphrase("Passphrase of now: "))
    if host_key(keys.run, enrollment.host) != enrollment.secret:
        raise Error("this is not the passphrase of this dashboard")
    passphrase = format_passphrase(os.urandom(20))
    salt = os.urandom(SALT_BYTES)
    fresh = derive_keys(passphrase, salt)
    # First: keys that are valid and known to nobody would lock out everybody.
    print_keys(enrollment.url, enrollment.dash, fresh, passphrase)
    try:
        ask_dashboard(client, "POST", "/api/v1/rotate",
                      hashes_of(fresh, salt))
    except Error as error:
        raise Error(error.message, "the old passphrase is valid; or, if only "
                    "the answer was lost, the new one: then koitab -d off; "
                    "koitab -d join") from None
    options.machine.write_enrollment(
        enrollment_directory(options), enrollment.replace(
            key=host_key(fresh.run, enrollment.host).hex(),
            since=options.machine.clock.now()))
    reload_enrollment(options)
    options.warn("on each other host: koitab -d off; koitab -d join "
                 f"{enrollment.url} (until then nothing can be run there)")
    return EXIT_OK


def leave_dashboard(options: Invocation) -> int:
    """koitab -d off: remove this machine's keys, then notify the
    dashboard. Raises Error."""
    directory = enrollment_directory(options)
    try:
        enrollment = options.machine.read_enrollment(directory)
    except Error as error:      # unreadable: the dashboard is unknown
        options.machine.remove_enrollment(directory)
        reload_enrollment(options)
        options.warn(f"removed all the same: {error.message}")
        return EXIT_OK
    enrollment = enrollment or require_enrollment(options)
    options.machine.remove_enrollment(directory)
    reload_enrollment(options)
    try:
        client = DashboardClient(enrollment.url, enrollment.token,
                                 enrollment.ca)
        ask_dashboard(client, "DELETE", f"/api/v1/hosts/{enrollment.host}")
    except Error as error:
        options.warn(f"the dashboard was not told: {error.message}")
    print(f"this machine does not belong to {enrollment.url} any more")
    return EXIT_OK


DASHBOARD_ACTIONS = {
    "new": new_dashboard, "join": join_dashboard, "show": show_enrollment,
    "rotate": rotate_passphrase, "off": leave_dashboard}


def command_enrollment(options: Invocation, action: str,
                       *words: str) -> int:
    """koitab -d ACTION. Raises Error."""
    return DASHBOARD_ACTIONS[action](options, *words)


# --- run --on: signed here, carried by the dashboard


def choose_dashboard(options: Invocation) -> tuple[DashboardClient, str]:
    """Return a client and the ID ("": unknown) of the dashboard that --url
    names, or of this machine's. Raises Error."""
    if "url" in options.given:
        url, dash = split_dashboard_url(options.url)
        return connect_dashboard(options, url)[0], dash
    enrollment = require_enrollment(options)
    client, _ = connect_dashboard(options, enrollment.url, enrollment.ca)
    return client, enrollment.dash


def command_run(options: Invocation, name: str,
                *words: str) -> int:
    """koitab run: here, or on the host of --on. Raises Error."""
    run = run_on_host if "on" in options.given else run_here
    return run(options, name, *words)


def run_on_host(options: Invocation, name: str,
                *words: str) -> int:
    """Run a job of another host; return its exit status. Raises Error."""
    client, dash = choose_dashboard(options)
    keys, dash = log_in(client, dash, read_passphrase())
    host, listed = find_host(client, keys, dash, options.on)
    key, job = host_key(keys.run, host), match_manifest(options, listed, name)
    options.warn(f"{short(job['label'])} on {listed['name']} ({host}), as "
                 f"{job['user']}")
    arguments = read_arguments(job, list(words))
    if not is_confirmed(job, f" on {escape_controls(listed['name'])}"):
        return EXIT_ERROR
    nonce = os.urandom(16).hex()
    body = signed_run(key, dash, host, job, arguments, nonce,
                      int(options.machine.clock.now() * 1000))
    ask_dashboard(client, "POST", "/api/v1/requests", {
        "host": host, "body": body, "mac": run_mac(key, body)})
    return RemoteRun(options, client).follow(nonce)


def find_host(client: DashboardClient, keys: Keys, dash: str,
              name: str) -> tuple[str, dict]:
    """Return the ID and the signed list of the one member that a name or an
    ID means. Raises Error.

    The dashboard may lie about names and jobs; a host's signature cannot.
    """
    hosts = ask_dashboard(client, "GET", "/api/v1/state").get("hosts", [])
    members = [host for host in hosts if host["state"] != "left"]
    field = "id" if is_hex(name, 32) else "name"
    found = [host["id"] for host in members if host[field] == name]
    if not found:
        raise Error(f"there is no host {short(name)}", ", ".join(
            escape_controls(host["name"]) for host in members))
    if len(found) > 1:
        raise Error(f"{len(found)} hosts are called {short(name)}",
                    "use the ID: " + " ".join(found))
    listed = verify_job_list(ask_dashboard(
        client, "GET", f"/api/v1/hosts/{found[0]}/list"),
        host_key(keys.run, found[0]), dash, found[0])
    if name not in (found[0], listed["name"]):
        raise Error(f"the host that the dashboard calls {short(name)} is "
                    f"{short(listed['name'])} by its own signature",
                    f"its ID, if it is meant: --on {found[0]}")
    return found[0], listed


def verify_job_list(listed: dict, key: bytes, dash: str,
                    host: str) -> dict:
    """Return the list of jobs that a host signed with `key`. Raises
    Error."""
    body, mac = listed.get("body"), listed.get("mac")
    if not isinstance(body, str) \
            or not is_valid_mac(mac, list_mac(key, body)):
        raise Error("the list of this host's jobs is not signed with the "
                    "keys of this passphrase", LEAVE_AND_JOIN)
    import json
    listed = json.loads(body)
    if (listed["dash"], listed["host"]) != (dash, host):
        raise Error("the dashboard shows the list of another host")
    return listed


def match_manifest(options: Invocation, listed: dict, name: str) -> dict:
    """Return the fields of the job in a host's list that a name means;
    "manifest" is the text that its host signed. Raises Error."""
    import json
    jobs = [{**json.loads(text), "line": 0, "manifest": text}
            for text in listed["jobs"]]
    job = find_job(jobs, name, options.user or listed.get("user", ""))
    if job["when"] != "@manual" or job["confirm"] == "cli":
        raise Error(f"{short(job['label'])} is not to be run from elsewhere: "
                    "only @manual jobs are, without KOI_CONFIRM=cli")
    return job


def signed_run(key: bytes, dash: str, host: str, job: dict,
               arguments: dict[str, str], nonce: str, now: int) -> str:
    """Return the text of a request to run a job, which is signed next. `now`
    is in ms since 1970; secrets are encrypted with the host's `key`."""
    import json
    secret = [param.name for param in parameters_of(job)
              if param.type == "secret"]
    return json.dumps({
        "v": 1, "do": "run", "key": key_id(key), "dash": dash, "host": host,
        "user": job["user"], "tag": job["tag"],
        "job": sha256_hex(job["manifest"]),
        "args": {name: value for name, value in arguments.items()
                 if name not in secret},
        "secrets": {name: encrypt_secret(key, nonce, name,
                                         arguments[name].encode()).hex()
                    for name in secret},
        "nonce": nonce, "iat": now, "exp": now + REQUEST_LIFE})


class RemoteRun:
    """A run on another host, whose output the dashboard shows."""

    def __init__(self, options: Invocation, client: DashboardClient):
        self.options, self.client = options, client
        self.output = OutputPrinter(options)
        # Bytes of output: printed at all, and passed in this reading of it.
        self.printed = self.position = 0
        self.notes: set[bytes] = set()      # printed ones

    def follow(self, nonce: str) -> int:
        """Wait for the request, print the output, and return the run's exit
        status. Raises Error."""
        run = self.wait_for_run(nonce)
        self.options.warn(f"run {run} of the dashboard")
        while True:
            facts = ask_dashboard(self.client, "GET",
                                  f"/api/v1/runs/{run}")["run"]
            if facts["state"] in FINAL_STATES \
                    and facts["have"] >= facts["size"]:
                self.print_stored(run)
                self.output.flush()
                return self.exit_status(facts)
            if facts["state"] == "running":
                self.print_live(run)
            time.sleep(POLL_PAUSE)

    def wait_for_run(self, nonce: str) -> int:
        """Return the dashboard's number of the run that a request started.
        Raises Error."""
        while True:
            state = ask_dashboard(self.client, "GET",
                                  f"/api/v1/requests/{nonce}")
            if state["state"] in ("refused", "expired"):
                raise Error(f"{state['state']}: {state['reason']}")
            if state["state"] == "accepted" and state.get("run"):
                return state["run"]
            time.sleep(POLL_PAUSE)

    def print_live(self, run: int) -> None:
        """Print what comes while the run is running."""
        at = 0
        while True:
            headers, data = self.fetch(run, at, "&wait=10")
            if data is None or headers.get("X-Koi-Live") != "1" \
                    or headers.get("X-Koi-From", str(at)) != str(at):
                return              # it has ended, or this reader was too slow
            self.print_piece(at, data)
            at += len(data)

    def print_stored(self, run: int) -> None:
        """Print what is kept of an ended run, without what was printed."""
        at = 0
        while True:
            _, data = self.fetch(run, at)
            if not data:
                return
            self.print_piece(at, data)
            at += len(data)

    def fetch(self, run: int, at: int, wait: str = ""):
        """Return headers and frames of the output from byte `at` on; None
        for frames that are not whole. Raises Error."""
        try:
            response = self.client.fetch(
                "GET", f"/api/v1/runs/{run}/output?from={at}&len=1000000"
                f"{wait}", seconds=PATIENCE + 10)
        except ConnectionFailed as error:
            raise Error(str(error)) from None
        try:
            whole = response.status == 200 and whole_frames(
                response.body) == len(response.body)
        except ValueError:
            whole = False       # `at` is another place in what is kept
        return response.headers, response.body if whole else None

    def print_piece(self, at: int, data: bytes) -> None:
        """Print frames that begin at byte `at`; of what was printed already,
        only what comes after it."""
        self.position = self.position if at else 0
        for stream, _, body in read_frames(data):
            if stream == NOTE:
                self.print_note(body)
                continue
            self.output.write(
                stream, body[max(0, self.printed - self.position):])
            self.advance(len(body))

    def print_note(self, text: bytes) -> None:
        """Print a note of koid about the output, once. "N bytes left out
        here" counts as N bytes of output."""
        number, _, rest = text.partition(b" ")
        number = number.replace(b",", b"")
        lost = int(number) if rest.endswith(b"left out here") \
            and number.isdigit() and len(number) < 19 else 0
        if self.position + lost > self.printed if lost else \
                text not in self.notes:
            self.output.write(NOTE, text)
            self.notes.add(text)
        self.advance(lost)

    def advance(self, size: int) -> None:
        """Count `size` bytes of output as printed."""
        self.position += size
        self.printed = max(self.printed, self.position)

    def exit_status(self, facts: dict) -> int:
        """Print why the run ended, if it did not exit; return its status."""
        if facts["state"] != "done" or facts["signal"] or facts["reason"]:
            self.options.warn(result_words(facts))
        return status_of_run(facts)


# ==========================================================================
# Import: which crontabs does cron have here?          (files, processes; C)
#
# gives   the command import
# needs   TabReader, Machine, parse_with_zones, Invocation
#
# All crontabs that the caller may see become one koitab. A line that koi
# would refuse, or read in another way, becomes a comment with the reason.
# ==========================================================================

MARK = "# koitab import: "      # begins a line that a person must check
EMPTY = '""'
CRON_HEADER = ("# DO NOT EDIT THIS FILE", "# (")
CRON_PIDS = (CRON_PID, "/var/run/crond.pid", "/var/run/cron.pid")
OURS = b'"""koitab: '           # the second line of this program


class Crontab(FrozenRecord):
    """A crontab of cron, and the section of the koitab that it becomes."""
    path: str
    section: str
    text: str
    system: bool


def cron_program() -> str:
    """Return the path of cron's own crontab program, or ""."""
    import shutil
    for path in (shutil.which("crontab"), "/usr/bin/crontab"):
        if path and os.access(path, os.X_OK):
            try:
                with open(path, "rb") as file:
                    if OURS not in file.read(1024):
                        return path
            except PermissionError:     # it is set-id, and ours is not
                return path
            except OSError:
                continue
    return ""


def user_crontab(options: Invocation) -> str:
    """Return the user's crontab from cron; "" if there is none. Raises
    Error."""
    import subprocess
    owner, program = options.owner, cron_program()
    if program:
        whose = ["-u", owner] if os.getuid() == 0 else []
        done = subprocess.run(
            [program, *whose, "-l"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode == 0:
            return done.stdout.decode("utf-8", "surrogateescape")
        errors = done.stderr.decode("utf-8", "replace").strip()
        if os.geteuid() and "no crontab" not in errors:
            raise Error(f"{program} -l: {errors}")
    elif os.geteuid():
        raise Error("there is no crontab program that could be asked",
                    f"sudo koitab -u {owner} import")
    for spool in SPOOLS if os.geteuid() == 0 else ():
        path = posixpath.join(spool, owner)
        if os.path.isfile(path):
            lines = options.machine.tab_text(path).split("\n")
            while lines[0].startswith(CRON_HEADER):
                del lines[0]
            return "\n".join(lines)
    return ""


def find_crontabs(options: Invocation) -> list[Crontab]:
    """Return every crontab of cron's that the caller may see. Raises
    Error."""
    owner = options.owner
    text = user_crontab(options)
    found = [Crontab(f"crontab of {owner}", owner, text, False)] if text \
        else []
    if os.geteuid():
        return found
    paths = [SYSTEM_TAB] if os.path.isfile(SYSTEM_TAB) else []
    for name in sorted(os.listdir(SYSTEM_TAB_DIRECTORY)
                       if os.path.isdir(SYSTEM_TAB_DIRECTORY) else ()):
        path = posixpath.join(SYSTEM_TAB_DIRECTORY, name)
        if PACKAGE_NAME_CHARACTERS.issuperset(name):
            paths.append(path)
        elif name[0] != ".":
            options.warn(f"{path} is left out: Debian's cron reads no file "
                         "with such a name")
    for path in paths:
        try:
            found.append(Crontab(path, posixpath.basename(path),
                                 options.machine.tab_text(path), True))
        except Error as error:
            options.warn(f"{error.message}; it is left out")
    return found


def with_literal_braces(job: Job) -> str:
    """Return the command of a job of cron's as a koitab has it: where koi
    would find an argument, quotes keep the two braces apart. Those that it
    finds elsewhere stay, and the line is not valid."""
    command, pieces, done = job.command, [], 0
    end = split_percent(command)[2]
    names = None if job.when == "@manual" else declared_names(command)
    quotes = {"in double quotes": '""'}
    for each in Lexer(command[:end], names).found:
        if each.place in ("", "in single quotes", "in double quotes"):
            pieces += [command[done:each.start + 1],
                       quotes.get(each.place, "''")]
            done = each.start + 1
    return "".join(pieces) + command[done:]


class Importer:
    """Collects the lines of one koitab from many crontabs."""

    def __init__(self, owner: str, home: str, others: bool):
        self.owner, self.others = owner, others
        self.lines: list[str] = []
        self.jobs: list[tuple[int, str, Job]] = []  # place, section, job
        # Variables of earlier files, in order. In cron a file's settings
        # end with the file; in a koitab they hold for all lines below.
        self.set: dict[str, None] = {}
        self.lost: list[str] = []           # variables that cannot be unset
        self.usual = {
            "SHELL": DEFAULT_SHELL, "PATH": DEFAULT_PATH, "HOME": home,
            "MAILTO": owner, "MAILFROM": owner, "CRON_TZ": "",
            "RANDOM_DELAY": "0", "TZ": ":/etc/localtime"}

    def add(self, source: Crontab) -> None:
        """Append the section of one crontab, if it has jobs to import."""
        tab = TabReader(source.text, source.system, True, "", True).read()
        jobs = {job.line: job for job in tab.jobs}
        ours = [job for job in tab.jobs if job.user in ("", self.owner)]
        if not ours and not self.others:
            return
        reasons = {problem.line: f"{problem.what}: {problem.why}"
                   for problem in tab.diagnostics if problem.fatal}
        self.lines += ["", f"[{source.section}]",
                       f"# {escape_controls(source.path)}"]
        self.reset_variables()
        user = self.owner
        for row, raw in enumerate(source.text.split("\n"), start=1):
            line, job = raw.lstrip(BLANKS), jobs.get(row)
            if job:
                user = self.add_job(source, raw, job, user)
            elif not line or line[0] == "#":
                self.lines.append(raw)
            elif parse_assignment(line) and row not in reasons:
                self.set[parse_assignment(line)[0]] = None
                self.lines.append(raw)
            else:
                self.lines += [MARK + reasons.get(row, "no line of cron's"),
                               f"# {raw}"]
        while not self.lines[-1]:
            del self.lines[-1]

    def reset_variables(self) -> None:
        """Give the variables that an earlier file set their usual values."""
        for name in self.set:
            if name not in self.usual and name not in self.lost:
                self.lost.append(name)
            quoted = name if name.isidentifier() else f'"{name}"'
            self.lines.append(f"{quoted}={self.usual.get(name) or EMPTY}")
        self.set.clear()

    def add_job(self, source: Crontab, raw: str, job: Job, user: str) -> str:
        """Append an entry without the column for users. `user` is that of
        the last appended entry; return that of this one."""
        line = raw
        if source.system:
            flag = "-n " if job.mail_failures else ""
            head = raw[:len(raw) - len(job.command)].rstrip(BLANKS)
            if flag:
                head = head[:-2].rstrip(BLANKS)
            line = head.removesuffix(job.user) + flag + job.command
        command = with_literal_braces(job)
        line = line[:len(line) - len(job.command)] + command
        if job.user in ("", self.owner):
            if job.unlogged and self.owner != "root":
                line = line.replace("-", "", 1)     # root alone may say it
            self.jobs.append((len(self.lines), source.section, job))
            self.lines.append(line)
            return self.owner
        if self.others:
            if job.user != user:
                name = escape_controls(job.user)
                self.lines.append(
                    f"{MARK}this is for {name}: koitab -u {name} import | "
                    f"koitab -u {name} -")
            self.lines.append(f"# {line}")
            return job.user
        return user

    def name_duplicates(self) -> None:
        """Give a name to each unnamed job that another one equals, so that
        their runs can be told apart."""
        seen: dict[tuple, list] = {}
        for place, section, job in self.jobs:
            if not job.name:
                seen.setdefault((job.when, job.command), []).append(
                    (place, section, job))
        taken = {job.name for _, _, job in self.jobs}
        for same in seen.values():
            for place, section, job in same if len(same) > 1 else ():
                name = self.free_name(f"{section}: {job.command}", taken)
                line = self.lines[place].lstrip(BLANKS)
                dash = "-" if line[0] == "-" else ""
                self.lines[place] = f'{dash}"{name}" {line[len(dash):]}'

    def free_name(self, text: str, taken: set) -> str:
        """Return a name that no other job has, made from a text."""
        text = "".join(char for char in text if char != '"'
                       and char.isprintable())[:50].strip()
        number = 1
        while f"{text} ({number})" in taken:
            number += 1
        taken.add(f"{text} ({number})")
        return f"{text} ({number})"

    def comment_out(self, options: Invocation) -> int:
        """Make comments of the lines that koi refuses, with the reason;
        return how many lines a person must check. Raises
    Error."""
        for _ in range(3):      # what one line sets, another may need
            tab, _ = parse_with_zones(options, self.text())
            bad = {problem.line: f"{problem.what}: {problem.why}"
                   for problem in reversed(tab.diagnostics) if problem.fatal
                   and problem.line <= len(self.lines)}
            for row in sorted(bad, reverse=True):
                line = self.lines[row - 1]
                self.lines[row - 1:row] = [MARK + escape_controls(bad[row]),
                                           f"# {line}"]
        return sum(line.startswith(MARK) for line in self.lines)

    def text(self) -> str:
        """Return the koitab as it is now."""
        return "\n".join(self.lines) + "\n"


def command_import(options: Invocation) -> int:
    """koitab import: print cron's tabs as a koitab. Raises Error."""
    import pwd
    owner = options.owner
    found = find_crontabs(options)
    if not found:
        raise no_tab(options)
    importer = Importer(owner, pwd.getpwnam(owner).pw_dir,
                        others=not options.user)
    importer.lines.append("# What cron runs, as a koitab: koitab import")
    for source in found:
        importer.add(source)
    importer.name_duplicates()
    marked = importer.comment_out(options)
    print_tab(importer.text())
    print_next_steps(options, importer, marked)
    return EXIT_OK


def print_next_steps(options: Invocation, importer: Importer,
                     marked: int) -> None:
    """Print what to do with an imported tab, of which a person must check
    `marked` lines."""
    whose = f"-u {options.user} " if options.user else ""
    options.warn(f"{plural(len(importer.jobs), 'job')} of {importer.owner}; "
                 f"install them: koitab {whose}import > tab; "
                 f"koitab {whose}tab")
    if marked:
        options.warn(f"{plural(marked, 'note')} in it, which begin with "
                     f"{MARK.strip()!r}")
    for name in importer.lost:
        options.warn(f"{short(name)} cannot be unset in a tab; below the "
                     "file that sets it, it is empty")
    if any(line.startswith(("CRON_TZ", "RANDOM_DELAY"))
           for line in importer.lines):
        options.warn("CRON_TZ and RANDOM_DELAY count here; Debian's cron "
                     "ignores them")
    if any(line.startswith("# /etc/") for line in importer.lines):
        options.warn("koitab daemon --system reads /etc/crontab and "
                     "/etc/cron.d itself: then leave their jobs out")
    pid = running_cron()
    if pid:
        options.warn(f"warning: cron is running (pid {pid}): jobs would run "
                     "twice; once they are installed: systemctl disable "
                     "--now cron")


def running_cron() -> int:
    """Return the process ID of the cron that runs here, or 0."""
    for path in CRON_PIDS:
        try:
            with open(path, encoding="ascii") as file:
                pid = parse_count(file.read(20).strip()) or 0
            if not os.path.isdir("/proc/self"):
                os.kill(pid, 0)
                return pid
            with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
                if file.read().strip() in ("cron", "crond"):
                    return pid
        except PermissionError:
            return pid          # it is there, and root's
        except (OSError, ValueError):
            continue
    return 0


# ==========================================================================
# Services: how are koid and the dashboard started?             (machine; C)
#
# gives   the commands daemon, dashboard and unit
# needs   run_daemon, Dashboard, Notifier, Api, HttpServer, Invocation
#
# Both stay in the foreground; a unit for systemd or a plist for launchd
# starts them at boot, with the options that `koitab unit` was given.
# ==========================================================================

# Those that a unit passes on; --backup is for one call only.
DASHBOARD_OPTIONS = ("listen", "db", "cert", "key", "plain_http", "names",
                     "proxies")

UNIT = """\
# {where}
[Unit]
Description=koid, which starts the jobs of koitab
After=remote-fs.target nss-user-lookup.target time-set.target
{conflicts}StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command}
{environment}TimeoutStartSec=infinity
Restart=always
RestartSec=1
# Jobs outlive a restart, an upgrade and a crash of koid: it alone is ended,
# and a job that ate the memory is no reason to end the others.
KillMode=process
OOMPolicy=continue
TasksMax=infinity
# Nothing more is locked up here: what koid may not do, no job could.

[Install]
WantedBy={target}
"""

DASHBOARD_UNIT = """\
# {where}
[Unit]
Description=koi's dashboard
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command}
{lines}TimeoutStartSec=infinity
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=2
LimitNOFILE=65536
UMask=0077
# It needs its database and the network, and nothing else of this host.
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
{closed}
[Install]
WantedBy={target}
"""
# What only the system's manager can close.
CLOSED = """\
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
"""
# No account has to be made for it: systemd lends it one, and a directory.
LENT = """\
DynamicUser=yes
StateDirectory=koi-dashboard
StateDirectoryMode=0700
CapabilityBoundingSet={capabilities}
AmbientCapabilities={capabilities}
"""
LENT_DB = "/var/lib/koi-dashboard/dashboard.db"


def command_daemon(options: Invocation) -> int:
    """koitab daemon, koid: run until a signal stops it. Raises Error."""
    if __name__ == "__main__":
        load_again()
    return run_daemon(Container() if options.container else options.machine,
                      options.system)


def dashboard_db(options: Invocation) -> str:
    """Return the path of the dashboard's database."""
    return os.path.abspath(
        options.db or f"{options.machine.state_directory()}/dashboard.db")


def check_dashboard_options(options: Invocation) -> list[tuple[str, int]]:
    """Return the addresses and ports to listen at. Raises Error for options
    that are invalid, or would show the passphrase to the network."""
    addresses = [listen_address(text) for text in options.listen
                 or ["127.0.0.1:8077"]]
    if bool(options.cert) != bool(options.key):
        raise Error("--cert and --key go together", "--cert FILE --key FILE",
                    EXIT_USAGE)
    public = [url_name(address) for address, _ in addresses
              if not is_loopback(address)]
    if public and not options.cert and not options.plain_http:
        raise Error(
            f"at {public[0]} it would speak plain http: whoever is on the "
            "way could read and change all of it, and take over the page "
            "that asks for the password", "--cert FILE --key FILE; or a "
            "proxy with https in front of 127.0.0.1; or --plain-http",
            EXIT_USAGE)
    for text in options.names:
        if not split_authority(text)[0]:
            raise Error(f"{short(text)} is not a host name", "--name "
                        "koi.example", EXIT_USAGE)
    for text in options.proxies:
        if not address_of(text):
            raise Error(f"{short(text)} is not an address", "--behind-proxy "
                        "10.0.0.2", EXIT_USAGE)
    return addresses


def command_dashboard(options: Invocation) -> int:
    """koitab dashboard: serve until a signal stops it. Raises Error."""
    if options.backup:
        return back_up(options)
    addresses, certificate = check_dashboard_options(options), None
    if options.cert:
        certificate = Certificate(options.cert, options.key)
        certificate.load()
    listeners = [listener(*each) for each in addresses]
    if not options.db:
        options.machine.make_home(options.machine.state_directory())
    dashboard = Dashboard(dashboard_db(options), options.machine.clock)
    dashboard.open()
    dashboard.start()
    notifier = Notifier(dashboard, options.machine)
    notifier.start()
    api = Api(dashboard, page_text(),
              [text.lower() for text in options.names])
    server = HttpServer(api, listeners, certificate, options.proxies,
                        dashboard_log(options))
    set_process_name("koi-dashboard", *sys.argv[2:])
    try:
        server.run(lambda: log_addresses(options, server))
    finally:
        notify_manager("STOPPING=1")
        notifier.stop()
        dashboard.stop()
    if dashboard.broken:
        raise Error(f"the dashboard cannot go on: {dashboard.broken}")
    return EXIT_OK


def dashboard_log(options: Invocation):
    """Return the function that writes a line of the dashboard's log."""
    def log(text: str) -> None:
        print_log_line(options.machine.clock, f"dashboard: {text}",
                       sys.stderr)
    return log


def log_addresses(options: Invocation, server: HttpServer) -> None:
    """Log where the dashboard listens, and what to type next."""
    scheme = "https" if server.certificate else "http"
    urls = []
    for sock in server.listeners:
        address, port = sock.getsockname()[:2]
        urls.append(f"{scheme}://{url_name(address)}:{port}")
        server.log(f"koi {VERSION} listens at {urls[-1]}")
    if server.certificate:
        server.log("SHA-256 of the certificate: "
                   f"{server.certificate.fingerprint}")
    if options.plain_http and not server.certificate \
            and not all(map(is_loopback, server.addresses)):
        server.log("warning: this is plain http: whoever is on the way can "
                   "read and change all of it")
    notify_manager("READY=1")
    name = options.names[0] if options.names else ""
    if name and options.proxies:
        scheme = "https"                # the proxy's, and its port
    elif name and not split_authority(name)[1]:
        name += f":{server.listeners[0].getsockname()[1]}"
    where = f"{scheme}://{name}" if name else urls[0]
    server.log(f"next: koitab -d new {where}; then open {where}")


def back_up(options: Invocation) -> int:
    """koitab dashboard --backup: copy the database. Raises Error."""
    options.reject_others(("db", "backup"), "dashboard --backup")
    path = dashboard_db(options)
    if not os.path.exists(path) and path == f"{ROOT_HOME}/dashboard.db":
        path = LENT_DB          # root's unit has it there
    if not os.path.exists(path):
        raise Error(f"{path} is not there", "--db FILE")
    dashboard = Dashboard(path, options.machine.clock)
    dashboard.backup(os.path.abspath(options.backup))
    return EXIT_OK


# --- unit -----------------------------------------------------------------


def command_unit(options: Invocation, service: str) -> int:
    """koitab unit: print what systemd or launchd needs. Raises Error."""
    options.reject_others(
        ("system",) if service == "daemon" else DASHBOARD_OPTIONS,
        f"unit {service}")
    path = os.path.abspath(__file__)
    command = [path] if os.access(path, os.X_OK) else [
        sys.executable, "-IS", path]
    if service == "dashboard":
        print(dashboard_unit(options, [*command, service]), end="")
        return EXIT_OK
    command += ["daemon"] + ["--system"] * options.system
    kept = {name: os.environ[name] for name in ("KOI_HOME", "XDG_STATE_HOME")
            if os.environ.get(name)}
    print(plist(command, kept, "koid") if sys.platform == "darwin"
          else daemon_unit(options, command, kept), end="")
    return EXIT_OK


def daemon_unit(options: Invocation, command: list[str],
                environment: dict) -> str:
    """Return koid's unit for systemd, or for the systemd of a user."""
    root = os.geteuid() == 0
    return UNIT.format(
        where="koitab unit daemon > /etc/systemd/system/koid.service; "
        "systemctl enable --now koid" if root else
        "koitab unit daemon > ~/.config/systemd/user/koid.service;"
        "\n# systemctl --user enable --now koid; loginctl enable-linger",
        conflicts="Conflicts=cron.service crond.service cronie.service\n"
        if options.system else "",
        command=unit_command(command),
        environment="".join(f"Environment={unit_word(f'{n}={value}')}\n"
                            for n, value in environment.items()),
        target="multi-user.target" if root else "default.target")


def unit_word(word: str) -> str:
    """Return a word as systemd reads it, which expands %."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{word}"' if " " in word or '"' in word else word


def unit_command(words: list[str]) -> str:
    """Return a command as ExecStart= reads it, which expands $ as well."""
    return " ".join(map(unit_word, words)).replace("$", "$$")


def plist(command: list[str], environment: dict, label: str) -> str:
    """Return a property list for launchd."""
    import plistlib
    return plistlib.dumps({
        "Label": label, "ProgramArguments": command,
        "EnvironmentVariables": environment, "RunAtLoad": True,
        "KeepAlive": True,
        "AbandonProcessGroup": True,    # jobs outlive koid
    }, sort_keys=False).decode()


def dashboard_unit(options: Invocation, command: list[str]) -> str:
    """Return the dashboard's unit, with the options that it is to have.

    For root it has no account of its own: systemd lends it one, with a
    state directory, and hands it the certificate's key, which only root
    can read (systemd.exec(5), DynamicUser= and LoadCredential=). With --db
    the database may be anywhere, so then it runs as root, without most of
    root's rights. Raises Error.
    """
    low = any(0 < port < 1024 for _, port in check_dashboard_options(options))
    if options.cert:
        Certificate(options.cert, options.key).load()
    words, root = list(command), os.geteuid() == 0
    for key in ("listen", "names", "proxies"):
        for value in getattr(options, key):
            words += [*OPTIONS[key].names, value]
    words += ["--plain-http"] * options.plain_http
    db = dashboard_db(options)
    lent = root and not options.db and "KOI_HOME" not in os.environ \
        and sys.platform != "darwin"
    words += ["--db", LENT_DB if lent else db]
    files = [(name, os.path.abspath(getattr(options, name)))
             for name in ("cert", "key") if options.cert]
    if not lent:
        words += [word for name, path in files for word in (f"--{name}",
                                                            path)]
    if sys.platform == "darwin":
        return plist(words, {}, "koi-dashboard")
    line, lines = unit_command(words), ""
    if lent:        # the key may be root's alone: systemd hands it over
        lines = LENT.format(
            capabilities="CAP_NET_BIND_SERVICE" if low else "") + "".join(
                f"LoadCredential={name}:{path}\n" for name, path in files)
        line += "".join(f" --{name} ${{CREDENTIALS_DIRECTORY}}/{name}"
                        for name, _ in files)
    elif root:
        lines = f"ReadWritePaths={unit_word(posixpath.dirname(db))}\n"
    return DASHBOARD_UNIT.format(
        where="koitab unit dashboard > /etc/systemd/system/"
        "koi-dashboard.service;\n# systemctl enable --now koi-dashboard"
        if root else "koitab unit dashboard > ~/.config/systemd/user/"
        "koi-dashboard.service;\n# systemctl --user enable --now "
        "koi-dashboard; loginctl enable-linger", command=line, lines=lines,
        closed=CLOSED if root else "",
        target="multi-user.target" if root else "default.target")


# ==========================================================================
# Source: which code runs as whom?                      (files, terminal; C)
#
# gives   the command source
# needs   Invocation, short
#
# The docstring's table gives the part of each section, its marker the rest.
# So an administrator can read what the root daemon runs, and nothing else.
# ==========================================================================

PARTS_OF_DAEMON = ("1 values", "2 koid")
ONLY_IN_AGENT = ("Agent", "Claims")     # unprivileged, not in the dashboard
SECTION_MARKER = (r"^# ={74}\n# (\w+): (.+?) +\([a-z, ]+; ([A-Z ]+)\)\n#\n")


class Section(FrozenRecord):
    """A section of this file, with its marker."""
    name: str
    question: str
    runs_as: str                # letters, as the docstring explains them
    part: str                   # "2 koid"
    text: str


def read_sections() -> list[Section]:
    """Return the sections of this file in their order. Raises Error."""
    import re
    try:
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise Error(f"{__file__}: {error.strerror}") from None
    part, parts = "", {}
    for line in (__doc__ or "").splitlines():
        row = re.match(r" *\d+ (\w+) .*\?", line)
        if re.fullmatch(r" \d \w+", line):
            part = line.strip()
        elif part and row:
            parts[row[1]] = part
    found = list(re.finditer(SECTION_MARKER, text, re.M))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [Section(*match.groups(), parts[match[1]], text[match.start():end])
            for match, end in zip(found, ends)]


def is_in_program(section: Section, program: str) -> bool:
    """Does the daemon, or the dashboard, run this section after its
    start?"""
    if program == "daemon":
        return section.part in PARTS_OF_DAEMON
    return "U" in section.runs_as and section.name not in ONLY_IN_AGENT


def command_source(options: Invocation,
                   which: str = "") -> int:
    """koitab source: list the sections, or print the text of one, of the
    daemon or of the dashboard. Raises Error."""
    sections = read_sections()
    if not which:
        print_sections(sections)
        return EXIT_OK
    if which in ("daemon", "dashboard"):
        chosen = [section for section in sections
                  if is_in_program(section, which)]
    else:
        chosen = [section for section in sections
                  if section.name.lower() == which.lower()]
    if not chosen:
        meant = nearest(which, [section.name for section in sections])
        raise Error(f"unknown section {short(which)}",
                    f"{PROG} source {meant}".rstrip(), EXIT_USAGE)
    put_out(sys.stdout, "".join(section.text for section in chosen).encode())
    return EXIT_OK


def print_sections(sections: list[Section]) -> None:
    """Print a line per section, then the lines of daemon and dashboard."""
    part = ""
    for section in sections:
        if section.part != part:
            part = section.part
            print(part)
        print(f"  {section.name:14}{section.question:45}"
              f"{section.text.count(chr(10)):>5} lines  {section.runs_as}")
    for program in ("daemon", "dashboard"):
        lines = sum(section.text.count("\n") for section in sections
                    if is_in_program(section, program))
        print(f"{program} runs {lines:,} lines after its start: {PROG} "
              f"source {program}")


# ==========================================================================
# Command: what can I type?                                    (terminal; C)
#
# gives   COMMANDS, main
# needs   the commands of the sections above
#
# One table of commands feeds the parser, the help texts and the completion
# scripts. `main` is the only way out: it turns an Error into a message, a
# hint and an exit status. crontab(1) knows no status but 0 and 1.
# ==========================================================================

# The groups of `koitab --help`; wrong usage has status 1 in the first.
CRONTAB, JOBS = "crontab(1)", "jobs"
DASHBOARD, SETUP = "dashboard", "setup"

# In these scripts the words in capitals are replaced: NAMED are commands
# that take a job's name, FILES and USERS options with such a value, CHOICES
# a line for each word that only few words can follow. The names of jobs are
# asked for when Tab is pressed: a tab changes more often than a script.

COMPLETIONS = {
    "bash": r'''# koitab completion bash > /etc/bash_completion.d/koitab
_koitab() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    local name
    COMPREPLY=()
    case $before in
        NAMED)
            while read -r name; do
                name=$(printf %q "$name")
                [[ $name == "$word"* ]] && COMPREPLY+=("$name")
            done < <(koitab completion names 2>/dev/null)
            return ;;
        FILES) COMPREPLY=($(compgen -f -- "$word")); return ;;
        USERS) COMPREPLY=($(compgen -u -- "$word")); return ;;
CHOICES
    esac
    COMPREPLY=($(compgen -W "COMMANDS OPTIONS" -- "$word"))
    [[ $COMP_CWORD == 1 ]] && COMPREPLY+=($(compgen -f -- "$word"))
}
complete -F _koitab koitab
''',
    "zsh": r'''#compdef koitab
# koitab completion zsh > /usr/local/share/zsh/site-functions/_koitab
_koitab() {
    case $words[CURRENT-1] in
        NAMED)
            compadd -- ${(f)"$(koitab completion names 2>/dev/null)"}
            return ;;
        FILES) _files; return ;;
        USERS) _users; return ;;
CHOICES
    esac
    compadd -- COMMANDS OPTIONS
    (( CURRENT == 2 )) && _files
}
_koitab "$@"
''',
    "fish": r'''# koitab completion fish > /etc/fish/completions/koitab.fish
complete -c koitab -f -n "__fish_seen_subcommand_from NAMED" \
    -a "(koitab completion names 2>/dev/null)"
complete -c koitab -n "__fish_use_subcommand" -a "COMMANDS"
CHOICES
complete -c koitab -a "OPTIONS"
''',
}
# The line for a word and those that may follow it, in each script.
CHOICE_LINES = {
    "bash": '        {}) COMPREPLY=($(compgen -W "{}" -- "$word"))\n'
            "            return ;;",
    "zsh": "        {}) compadd -- {}; return ;;",
    "fish": 'complete -c koitab -f -n "__fish_seen_subcommand_from {}" '
            '-a "{}"'}


# What people type who know other programs -> how koitab says it.
OTHER_WORDS = {
    "list": "-l", "show": "-l", "edit": "-e", "rm": "-r", "remove": "-r",
    "delete": "-r", "logs": "log", "version": "-V", "start": "daemon",
    "test": "-T FILE", "install": "FILE", "jobs": "next", "join": "-d join"}


def command_replace(options: Invocation, path: str | None = None) -> int:
    """koitab FILE: install a tab. Without a FILE it comes from standard
    input, as Debian's crontab has it, but not from a terminal. Raises
    Error."""
    if path is None and options.user:
        raise usage_error("file name must be specified for replace")
    if path is None and os.isatty(0):
        raise usage_error("file name or - (for stdin) must be specified")
    path = "-" if path is None else path
    try:
        text = options.machine.tab_text(path)
    except Error as error:
        meant = OTHER_WORDS.get(path) or nearest(path, command_words()) \
            if path.isalpha() and not os.path.lexists(path) else ""
        raise CrontabError(error.message,
                           f"{PROG} {meant}" if meant else "") from None
    return EXIT_OK if install(options, text, path) else EXIT_ERROR


def command_completion(options: Invocation,
                       shell: str) -> int:
    """koitab completion: print a script for a shell; or the names of the
    jobs, for that script. Raises Error."""
    if shell == "names":
        for job in options.ask_koid("jobs")["jobs"]:
            if job["name"]:
                print(job["name"])
        return EXIT_OK
    join = " " if shell == "fish" else "|"
    lines = [CHOICE_LINES[shell].format(name, " ".join(command.choices()))
             for name, command in COMMANDS.items() if command.choices()]
    if shell == "fish":
        lines += [f"complete -c koitab {fish_option(option)}"
                  for option in OPTIONS.values()
                  if option.value in ("FILE", "USER")]
    text = COMPLETIONS[shell]
    for word, value in {
            "NAMED": join.join(name for name, command in COMMANDS.items()
                               if any("NAME" in line
                                      for line in command.usage)),
            "FILES": join.join(options_with("FILE")),
            "USERS": join.join(options_with("USER")),
            "CHOICES": "\n".join(lines),
            "COMMANDS": " ".join(command_words()),
            "OPTIONS": " ".join(name for option in OPTIONS.values()
                                for name in option.names)}.items():
        text = text.replace(word, value)
    print(text, end="")
    return EXIT_OK


def options_with(value: str) -> list[str]:
    """Return the names of the options whose value is a FILE, say."""
    return [name for option in OPTIONS.values() if option.value == value
            for name in option.names]


def fish_option(option: Option) -> str:
    """Return how fish completes the value of an option."""
    name = option.names[-1]
    how = "-r -F" if option.value == "FILE" else \
        '-x -a "(__fish_complete_users)"'
    return f"{'-l' if name[:2] == '--' else '-s'} {name.lstrip('-')} {how}"


def command_page(options: Invocation, url: str = "") -> int:
    """koitab page: the page as a file. Opened from disk, its code never
    comes from the server. Raises Error."""
    if not url:
        enrollment = options.machine.read_enrollment(
            enrollment_directory(options))
        url = enrollment.url if enrollment else ""
    if url:
        check_dashboard_url(url)
    put_out(sys.stdout, page_text(url.rstrip("/")).encode())
    return EXIT_OK


class Command(FrozenRecord):
    """A command, for the parser, the help and the completion scripts."""
    handler: object             # function(options, *arguments) -> status
    group: str                  # its place in `koitab --help`
    help: str                   # a verb phrase
    usage: tuple = ("",)        # "SLUG [RUN]"; lower case is typed as it is
    options: tuple = ()         # keys of OPTIONS
    text: str = ""              # a paragraph for `koitab COMMAND --help`

    @property
    def status(self) -> int:
        """The exit status of wrong usage."""
        return EXIT_ERROR if self.group == CRONTAB else EXIT_USAGE

    def choices(self) -> list[str]:
        """Return the words that may be typed as the first argument."""
        return [word for line in self.usage
                for word in line.partition(" ")[0].strip("[]").split("|")
                if word.islower()]

    def usage_of(self, words: list[str]) -> str:
        """Return the usage line for these arguments, all lines in one if
        the first argument is none of the choices."""
        if len(self.usage) == 1:
            return self.usage[0]
        return next((line for line in self.usage if line.split()[:1]
                     == words[:1]), "|".join(self.choices()))


COMMANDS = {    # by the first word, or by the option that stands for it
    "-": Command(
        command_replace, CRONTAB, "install a tab",
        ("[FILE|-]",), ("user",),
        "Without a FILE, or with -, the tab is read from standard input. "
        "Every error is printed with its line and column, and then nothing "
        "is installed. A file with the name of a command is ./run."),
    "-e": Command(
        command_edit, CRONTAB, "edit your tab", options=("edit", "user"),
        text="The editor is that of VISUAL or EDITOR. What it saves is "
        "installed; an edit that cannot be installed is kept in a file."),
    "-l": Command(command_list, CRONTAB, "list it",
                  options=("list", "user"),
                  text="The tab is printed byte for byte, but a terminal gets "
                  "no control characters."),
    "-r": Command(command_remove, CRONTAB, "remove it; -i asks before",
                  options=("remove", "ask", "user"),
                  text="Runs that are active continue."),
    "-T": Command(
        command_test, CRONTAB, "print the errors of a tab",
        ("FILE",), ("test",), "Nothing is installed. The exit status is 1 if "
        "the tab has errors; a warning alone leaves it 0."),
    "run": Command(
        command_run, JOBS, "run a job, wait for its end",
        ("NAME [ARG=VALUE]...",), ("user", "on", "url", "ca", "plain_http"),
        "NAME is a job's name, SECTION/NAME, its line or its tag. ARG=- reads "
        "the value from standard input; missing values are asked for at a "
        "terminal. Ctrl-C reaches the job, a third one leaves it running. "
        "With --on, the job runs on another host of the dashboard: the "
        "request is signed here, with the passphrase from the terminal or "
        "standard input."),
    "next": Command(
        command_next, JOBS, "print the next starts", ("[NAME]",),
        ("user", "number", "start", "tab", "utc", "json"),
        "Without NAME, the starts of all jobs. TIME is 2026-03-29T01:30, with "
        "an offset or Z, or else in local time. The variable TZ sets the time "
        "zone of --tab."),
    "history": Command(
        command_history, JOBS, "list past runs", ("[NAME]",),
        ("user", "number", "json"), "When each run started, by what, how long "
        "it took and how it ended; the newest is the last."),
    "log": Command(command_log, JOBS, "print the output of a run",
                   ("RUN|NAME",), ("user", "json"),
                   "NAME is a job's name; its newest run is meant. RUN is a "
                   "number that koitab history shows."),
    "kill": Command(command_kill, JOBS, "end a run", ("RUN|NAME",),
                    ("user",), "SIGTERM, and SIGKILL ten seconds later. A run "
                    "that is queued is skipped. RUN is a number that koitab "
                    "status shows; NAME is a job's name, its newest run that "
                    "has not ended is meant."),
    "pause": Command(
        command_pause, JOBS, "let a job start by hand alone", ("NAME",),
        ("user", "until"), "A paused job makes no start by schedule, @after, "
        "retry, catch-up or @reboot, but koitab run and the dashboard still start "
        "it. Its active runs continue."),
    "resume": Command(
        command_resume, JOBS, "end the pause of a job", ("NAME",), ("user",),
        "The next start that falls due is made. Starts of the time before are "
        "not made up for."),
    "status": Command(
        command_status, JOBS, "show koid, problems, active runs",
        options=("user", "json"), text="The exit status is 1 if koid does not "
        "run, a job's last run failed, or something else is wrong."),
    "dashboard": Command(
        command_dashboard, DASHBOARD, "serve the dashboard of all hosts",
        options=DASHBOARD_OPTIONS + ("backup",),
        text="It stays in the foreground; koitab unit dashboard starts it at "
        "boot. Beyond this machine it needs --cert and --key, a proxy with "
        "https, or --plain-http. SIGHUP reads the certificate again."),
    "-d": Command(
        command_enrollment, DASHBOARD, "join, show or leave a dashboard",
        ("new [URL]", "join URL", "show", "rotate", "off"),
        ("action", "ca", "plain_http"),
        "new makes a dashboard (default: http://127.0.0.1:8077) and prints "
        "its passphrase, once; join makes this machine a member of it, with "
        "the passphrase from the terminal or standard input; show prints how "
        "the connection is; rotate makes a new passphrase and new keys, and "
        "the old ones end at once; off leaves the dashboard."),
    "page": Command(
        command_page, DASHBOARD, "print the page, to open from disk",
        ("[URL]",), text="The code of a page that was opened from disk never "
        "comes from the server. URL is the dashboard's (default: the one of "
        "this machine)."),
    "import": Command(
        command_import, SETUP, "print cron's tabs as a koitab",
        options=("user",), text="The tabs of the user, and for root "
        "/etc/crontab and /etc/cron.d as well. Nothing is installed."),
    "daemon": Command(
        command_daemon, SETUP, "be koid, which starts jobs",
        options=("system", "container"), text="It stays in the foreground, "
        "and has the name koid, too. Jobs continue when it stops."),
    "unit": Command(
        command_unit, SETUP, "print a unit for systemd",
        ("daemon", "dashboard"), ("system",) + DASHBOARD_OPTIONS,
        "With these options the unit starts koid or the dashboard: --system "
        "is for daemon, the others are for dashboard. On macOS it is a "
        "property list for launchd."),
    "completion": Command(
        command_completion, SETUP, "print completion for a shell",
        ("bash|zsh|fish|names",), ("user",),
        "The first line of the script says where to put it. names prints the "
        "names of the jobs, one a line: the scripts complete with them."),
    "source": Command(
        command_source, SETUP, "print what this program runs",
        ("[SECTION|daemon|dashboard]",), text="Without an argument, the "
        "sections of this file: the question that each answers, its lines, "
        "and who it runs as (R the user of koid, J the user of a job, U a "
        "user without rights, C the caller). daemon is what koid runs after "
        "its start, dashboard what the dashboard runs."),
}
# Options that stand for a command. crontab(1) permits one of them at a time.
OPERATION_KEYS = ("edit", "list", "remove", "test", "action")


def command_words() -> list[str]:
    """Return the commands that are words, not options."""
    return [name for name in COMMANDS if name[0] != "-"]


def synopsis(name: str, usage: str) -> str:
    """Return what is typed for a command: "koitab run NAME". Nothing is
    typed for "-", which is a FILE."""
    return " ".join([PROG, *[name] * (name != "-"), *usage.split()])


def overview() -> str:
    """Return the text of `koitab --help`: at most 24 lines."""
    rows, group = [], ""
    for name, command in COMMANDS.items():
        usage = command.usage[0] if len(command.usage) == 1 \
            else "|".join(command.choices())
        typed = synopsis(name, usage).partition(" ")[2]
        heading = command.group if command.group != group else ""
        group = command.group
        rows.append(f"{heading:11}{typed:34}{command.help}\n")
    return (f"{PROG}: a drop-in replacement for cron, with a dashboard.\n"
            f"Usage: {PROG} COMMAND [OPTION]... [ARGUMENT]...   "
            f"({PROG} COMMAND --help)\n\n"
            f"{''.join(rows)}")


def command_help(name: str) -> str:
    """Return the text of `koitab COMMAND --help`: usage, a paragraph, its
    options."""
    import textwrap
    command, own = COMMANDS[name], synopsis(name, "")
    usage = "\n       ".join(f"{synopsis(name, line)} [OPTION]..."
                              for line in command.usage)
    options = "".join(option_help(OPTIONS[key])
                      for key in (*command.options, "help")
                      if OPTIONS[key].names[0] != name)
    return (f"{own}: {command.help}\n\nUsage: {usage}\n\n"
            f"{textwrap.fill(command.text, 79)}\n\nOptions:\n{options}")


def option_help(option: Option) -> str:
    """Return the lines of an option in a help text."""
    import textwrap
    indent = "  " if len(option.names[0]) == 2 else "      "
    return textwrap.fill(
        f"{indent + option.spelling:30}{option.help}", 79,
        subsequent_indent=" " * 30, break_on_hyphens=False) + "\n"


def parse_arguments(argv: list[str], machine: Machine,
                    called: str) -> tuple[Invocation, list[str]]:
    """Return the options and the other words of a command line, in which
    they may be mixed. No option can stand after "--". Raises Error.

    There is one parser for all commands, because crontab(1) has none and
    its options stand alone; whether an option goes with the command is
    checked when the command is known. argparse does not read the words: it
    would take "-5" for a number, and drop "--" in some versions.
    """
    import argparse
    end = argv.index("--") if "--" in argv else len(argv)
    name = next((word for word in argv if word in command_words()),
                "-d" if "-d" in argv else "")
    hint = synopsis(name or "-", "--help")
    status = COMMANDS[name or "-"].status

    class Parser(argparse.ArgumentParser):
        """Raises Error where argparse would print and exit."""

        def error(self, message):
            raise Error(message.removeprefix("argument "))

    parser = Parser(called, add_help=False, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for key, option in OPTIONS.items():
        how = {"action": "store_true"}
        if option.value:
            how = {"action": "append" if option.is_list else "store",
                   "type": option.parse}
        if key == "action":       # -d --help has no action
            how["nargs"] = "?"
        parser.add_argument(*option.names, dest=key, **how)
    options = Invocation(machine, called)
    try:
        rest = parser.parse_known_args(argv[:end], options)[1]
    except Error as error:      # of an option's value
        raise Error(error.message, error.hint or hint, status) from None
    for word in rest:
        if word[0:1] == "-" and word != "-":
            raise Error(f"unknown option {word.partition('=')[0]}", hint,
                        status)
    return options, rest + argv[end + 1:]


def select_command(options: Invocation,
                   words: list[str]) -> tuple[str, list[str]]:
    """Return the name in COMMANDS of what was typed, and its arguments.
    Raises Error."""
    operations = [key for key in OPERATION_KEYS if key in options.given]
    if len(operations) > 1:
        raise usage_error("only one operation permitted")
    if operations:
        name = OPTIONS[operations[0]].names[0]
        value = getattr(options, operations[0])
        return name, [value, *words] if isinstance(value, str) else words
    if options.called == "koid":
        return "daemon", words[words[:1] == ["daemon"]:]
    if not words or words[0] not in command_words():
        return "-", words
    if options.called == "crontab" and os.path.lexists(words[0]):
        raise Error(f"{words[0]} is a file and a command",
                    f"crontab ./{words[0]}; or {PROG} {words[0]}")
    return words[0], words[1:]


def check_arguments(name: str, words: list[str]) -> None:
    """Raise Error for a missing, unknown or surplus argument."""
    command = COMMANDS[name]
    usage = command.usage_of(words)
    wanted, hint = usage.split(), synopsis(name, usage)
    for place, argument in enumerate(wanted):
        if place == len(words):
            if argument[0] == "[":
                return
            raise Error(f"missing argument {argument}", hint, command.status)
        if argument.islower() and words[place] not in argument.split("|"):
            raise Error(f"unexpected argument {short(words[place])} (expected "
                        f"{argument.replace('|', ', ')})", "", command.status)
    if len(words) > len(wanted) and not usage.endswith("..."):
        if command.group == CRONTAB and name != "-":
            raise usage_error("no arguments permitted after this option")
        raise Error(f"unexpected argument {short(words[len(wanted)])}", hint,
                    command.status)


def dispatch(argv: list[str], machine: Machine, called: str = PROG) -> int:
    """Run one command; return its exit status. Raises Error, and
    ExitWithText."""
    options, words = parse_arguments(argv, machine, called)
    if options.version:
        raise ExitWithText(f"{PROG} {VERSION}\n")
    name, words = select_command(options, words)
    if options.help:
        raise ExitWithText(overview() if name == "-" else command_help(name))
    command = COMMANDS[name]
    options.reject_others(command.options, name if name != "-" else "FILE",
                         command.status)
    if "on" not in options.given:       # else it is a user of another host
        options.check_user()
    check_arguments(name, words)
    return command.handler(options, *words)


def open_standard_streams() -> None:
    """A caller may have closed 0, 1 or 2: what we open next must not become
    one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r",
                                    closefd=False))


def print_error(called: str, error: Error) -> None:
    """Print an error and its hint, a line each."""
    prefix = "" if isinstance(error, CrontabError) else f"{called}: error: "
    print(escape_controls(prefix + error.message), file=sys.stderr)
    if error.hint:
        print(escape_controls(f"{called}: hint: {error.hint}"),
              file=sys.stderr)


def main(argv: list[str] | None = None, machine: Machine | None = None,
         called: str = "") -> int:
    """Run one command and return its exit status. The only way out."""
    called = called or posixpath.basename(sys.argv[0])
    called = called if called in ("crontab", "koid") else PROG
    argv = sys.argv[1:] if argv is None else argv
    open_standard_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):      # cron has no locale
                stream.reconfigure(encoding="utf-8",
                                   errors="backslashreplace")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        try:
            status = dispatch(argv, machine or Machine(), called)
        except ExitWithText as text:
            print(text, end="")
            status = EXIT_OK
        sys.stdout.flush()
        return status
    except Error as error:
        sys.stdout.flush()
        print_error(called, error)
        return error.status
    except BrokenPipeError:             # koitab next | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13         # as a program that SIGPIPE ended
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
    except OSError as error:            # a full disk, no descriptor left
        where = f"{error.filename}: " if error.filename else ""
        print_error(called, Error(where + (error.strerror or str(error))))
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
