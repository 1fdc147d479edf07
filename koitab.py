#!/bin/sh
""":"
exec /usr/bin/python3 -IS -c '
import sys
from importlib.machinery import SourceFileLoader
del sys.argv[0]
sys.pycache_prefix = "/var/cache/koi"
code = SourceFileLoader("__main__", sys.argv[0]).get_code("__main__")
sys.pycache_prefix = None
exec(code, {"__name__": "__main__", "__file__": sys.argv[0]})' "$0" "$@"

koitab: cron, with names, sections and forms.

It reads all of crontab(5), starts what Debian's cron starts and when it
starts it, and adds to a line what cron lacks: a name, a section to stand in,
`@manual` for a job that runs when it is asked for, and `{{arguments}}` to be
filled in then.

What it promises:
- A start that Debian's cron makes is made, once: through both changes of
  daylight saving time, a clock that is set, and days that a zone skips.
- A tab is judged whole: every fault is told with line and column, and what
  is right but looks wrong is warned of.
- The value of an argument never becomes part of a command's text.

It needs Python 3.9 or newer and nothing else. Read it from top to bottom:
values first, then decisions, then deeds. Each section says what it touches.

    Kit       what do both programs need?            (files, clock)
    Time      what do DST and a jumping clock do to minutes? (nothing)
    Schedule  when does an entry run next?           (nothing)
    Tab       what does a koitab say?                (nothing)
    Keys      who may ask for a run?                 (nothing)
    Plan      given the time, what should start?     (nothing)
    Record    what do we remember about a run?       (nothing)
    Supervisor who stays with a job?                 (processes, files)
    Machine   what may koi do to this host?          (files, processes)
    Store     where are runs kept?                   (files)
    Control   how do users reach the daemon?         (network, files)
    Uplink    how do records reach the dashboard?    (network, processes)
    Daemon    who carries the plan out?              (machine)
    Hub       what does the dashboard know?          (files)
    Alerts    who is told, and how?                  (network, processes)
    Web       what does a browser or an agent get back? (network, files)
    Page      what does the browser run?             (nothing)
    Command   what can I type?                       (terminal)

Above this text stand some lines for sh, which is replaced by Python before
it reads on; for Python they are the beginning of this docstring. They load
this file through Python's own cache of compiled code, in /var/cache/koi,
where root alone can write; without it the file is compiled, and
`python3 -IS koitab.py` works as well. -I and -S keep the caller's PYTHON*
variables, the script's folder and site-packages out of the imports. Modules
that cost milliseconds (`re` and `json` among them) are imported where they
are used.
"""

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
EXIT_FAULTS = 1         # as crontab(1): whatever is wrong, it says 1
EXIT_USAGE = 2          # wrong usage of a command that crontab(1) lacks
EXIT_BUG = 70           # a fault of ours
EXIT_SIGNAL = 128       # plus the number of the signal, as shells report it

# ==========================================================================
# Kit: what do both programs need?                           (files, clock)
#
# This section is the same text in mission.py and koitab.py; a test compares
# them. So it knows neither backups nor schedules.
# ==========================================================================


class Error(Exception):
    """We cannot go on: what is wrong, what to do, and the exit status."""

    def __init__(self, message: str, hint: str = "", status: int = 1):
        super().__init__(message)
        self.message, self.hint, self.status = message, hint, status


class Record:
    """A value with named fields that does not change: `Point(1, y=2)`.

    What a frozen dataclass is, without importing `dataclasses`, which would
    double the start-up of a program that is compiled each time it runs.
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
        raise AttributeError(f"{type(self).__name__}.{name} is settled")

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None

    def __repr__(self):
        fields = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({fields})"

    def but(self, **changes):
        """The same value with some fields changed."""
        return type(self)(**{**vars(self), **changes})


class Clock:
    """The time of day, and a time that no one can set."""

    def now(self) -> float:
        """Seconds since 1970, as the wall clock has it."""
        return time.time()

    def ticks(self) -> float:
        """Seconds that only ever grow; for durations and time limits."""
        return time.monotonic()


def rfc3339(at: float) -> str:
    """Local time with its offset: 2026-03-29T03:00:00+02:00 (RFC 3339)."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at))
    return f"{text[:-2]}:{text[-2:]}"


def duration_text(seconds: float) -> str:
    """As Go writes a duration, cut to milliseconds: 12ms 1.5s 1h0m5.1s."""
    thousandths = int(max(seconds, 0) * 1000 + 1e-6)    # 1.001 is not 1
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
LONGEST_DURATION = 86400 * 366 * 100    # a century is no time limit


def seconds_of(text: str) -> float | None:
    """The seconds in "90s", "1h30m", "500ms"; None if it is no duration."""
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
    """1 error, 2 errors."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, words) -> str:
    """The known word that was probably meant, or ''."""
    import difflib
    known = {each.lower(): each for each in words}
    found = difflib.get_close_matches(word.lower(), known, 1, 0.5)
    return known[found[0]] if found else ""


# All that could steer a terminal, break a line or turn text around: C0 and
# C1 controls but the tab, line and paragraph separators, bidi overrides,
# the byte order mark, and halves of surrogate pairs. A regular expression.
UNSAFE = ("[\0-\x08\n-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e"
          "\u2066-\u2069\ufeff\ud800-\udfff]")


def escaped(match) -> str:
    """The escape for a match of UNSAFE."""
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def visible(text: str) -> str:
    """The text on one line, each unsafe character written as an escape."""
    if text.isprintable():
        return text
    import re
    return re.sub(UNSAFE, escaped, text)


def write_all(fd: int, data: bytes) -> None:
    """Write everything, or raise OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest):]


def write_atomically(path: str, data: bytes, mode: int = 0o600,
                     durable: bool = True, dir_fd: int | None = None) -> None:
    """Replace the file at `path` whole or not at all.

    With `durable` it is on the disk when we return: the file is synced
    before the rename and the folder after it, or a power cut could leave an
    empty file, or bring the old one back. Raises OSError.
    """
    fresh = path + ".new"
    try:
        os.unlink(fresh, dir_fd=dir_fd)     # of a writer that was killed
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
        sync_folder(posixpath.dirname(path) or ".", dir_fd)


def sync_folder(path: str, dir_fd: int | None = None) -> None:
    """Bring a folder's names to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC,
                 dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def only_one(path: str) -> int | None:
    """Lock the file at `path`: its descriptor, or None if another has it.

    An flock, not the file's existence: the kernel frees it when its holder
    ends, however it ends. The folder must be writable by us alone.
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
# Time: what do DST and a jumping clock do to minutes?            (nothing)
#
# Times here are whole seconds. An instant counts from 1970 in UTC. A wall
# second is what the clock on the wall shows: instant + the zone's offset.
# ==========================================================================
#
# A crontab names minutes of the wall, and the wall is unreliable. In spring
# it leaps from 01:59 to 03:00, so "30 2 * * *" has no minute to run in. In
# autumn it shows 02:30 twice. Somebody sets the clock; a laptop wakes after
# the weekend; Samoa crosses the date line and a whole Friday never comes.
#
# Debian's cron keeps a second, virtual clock, and so do we: one for each
# zone that a tab names, so that CRON_TZ loses no hour. The virtual minute is
# the last one whose jobs were started. Once a minute cron looks at the wall
# and asks how far it is ahead:
#
#     1 minute            nothing happened: run the jobs of this minute.
#     2 to 5              a hiccup: run the jobs of every minute between.
#     6 to 180            the wall leapt. A job at fixed times must not be
#                         lost, so the fixed jobs of every minute between are
#                         run now; a wildcard job ("*/10 * * * *") runs once,
#                         for it runs again soon.
#     0 to 179 behind     the wall was set back. Fixed jobs have run already,
#                         so they wait until the wall has caught up with the
#                         virtual clock; wildcard jobs follow the wall.
#     more, either way    the clock was wrong and now is right: start afresh
#                         from here. What lies between is lost.
#
# A job is a wildcard job when its minute or hour column begins with a star,
# to the letter: "*/5 2 * * *" is one, "0-59/5 2 * * *" is not.
#
# All of this is in `resume` below. A stretch of time in which the offset of
# the zone does not change is a run of minutes from `first` on; `resume` says
# with which minute of the wall a job goes on when a stretch begins. Minutes
# before `first` are started at once, all others when they come. The rest of
# this section is what a zone is.

MINUTE, HOUR, DAY = 60, 3600, 86400
LEAP, HICCUP = 180 * MINUTE, 5 * MINUTE
CYCLE = 146_097         # days in 400 years; a multiple of seven
FOREVER = float("inf")


def resume(virtual: int, first: int, wildcard: bool) -> int:
    """The minute with which a job goes on when the wall shows `first`."""
    ahead = first - virtual
    if ahead > LEAP or ahead <= -LEAP:
        return first
    if wildcard and not MINUTE < ahead <= HICCUP:
        return first
    return virtual + MINUTE


def played(virtual: int, first: int, last: int) -> int:
    """The virtual minute after a stretch from `first` to `last`."""
    set_afresh = resume(virtual, first, wildcard=False) == first
    return last if set_afresh else max(virtual, last)


def days_of(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01, in the Gregorian calendar."""
    year -= month <= 2
    since_march = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return (year * 365 + year // 4 - year // 100 + year // 400
            + since_march - 719_468)


def date_of(days: int) -> tuple[int, int, int]:
    """Year, month and day: the other way round."""
    cycle, day = divmod(days + 719_468, CYCLE)
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    day -= year * 365 + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    year += cycle * 400 + (month >= 10)
    return year, (month + 2) % 12 + 1, day + 1


def stamp(instant: int, offset: int) -> str:
    """2026-03-29T03:00:00+02:00 (RFC 3339)."""
    days, second = divmod(instant + offset, DAY)
    year, month, day = date_of(days)
    sign, minutes = "-" if offset < 0 else "+", abs(offset) // MINUTE
    return (f"{year:04}-{month:02}-{day:02}T{second // HOUR:02}:"
            f"{second // MINUTE % 60:02}:{second % 60:02}"
            f"{sign}{minutes // 60:02}:{minutes % 60:02}")


class Zone:
    """What the clocks on the wall show, and when they are set.

    Stretch i begins at the instant begins[i], ends where the next begins,
    and has offsets[i]. calm[i] is the wall second from which on a daemon
    that was there before runs fixed jobs again. A rule makes the years that
    the lists do not reach; it is read when the first of them is asked for.
    """

    def __init__(self, name: str, begins: list, offsets: list[int], rule=None):
        self.name, self.rule = name, rule
        self.begins, self.offsets, self.calm = [-FOREVER], offsets[:1], [
            -FOREVER]
        for begin, offset in zip(begins, offsets[1:]):
            self.put(begin, offset)
        self.year = max(date_of(begins[-1] // DAY)[0], 1900) if begins \
            else 1970
        if not rule:
            self.begins.append(FOREVER)
        self.reach = self.begins[-1]

    def put(self, begin: int, offset: int) -> None:
        """The clock is set to another offset, later than all before."""
        if begin == self.begins[-1]:        # "all year round", as rules say
            for past in (self.begins, self.offsets, self.calm):
                past.pop()
        before = self.offsets[-1]
        if offset == before or begin < self.begins[-1]:
            return
        virtual = (begin - 1 + before) // MINUTE * MINUTE
        first = -(-(begin + offset) // MINUTE) * MINUTE
        waits = resume(virtual, first, wildcard=False) > first
        self.begins.append(begin)
        self.offsets.append(offset)
        self.calm.append(virtual if waits else -FOREVER)

    def extend(self, instant: int) -> None:
        """Let the rule make years, until `reach` is later than `instant`."""
        if isinstance(self.rule, str):
            zone = zone_of_rule(self.rule)
            self.rule = zone and zone.rule
        if not self.rule:
            self.begins.append(FOREVER)
            self.reach = FOREVER
        while self.reach <= instant:
            for begin, offset in self.rule.changes(self.year):
                self.put(begin, offset)
            self.year += 1
            if self.year > date_of(instant // DAY)[0] + 3:
                self.begins.append(FOREVER)     # it is a rule for no change
            self.reach = self.begins[-1]

    def stretch(self, instant: int) -> int:
        """The number of the stretch that an instant lies in."""
        if instant >= self.reach:
            self.extend(instant)
        return bisect_right(self.begins, instant) - 1

    def offset(self, instant: int) -> int:
        return self.offsets[self.stretch(instant)]

    def stretches(self, after: int):
        """The stretches of minutes after that of `after`: the first minute
        of the wall, the wall second where it ends, and the offset."""
        number = self.stretch(after)
        offset = self.offsets[number]
        running = (after + offset) // MINUTE * MINUTE
        first = running + MINUTE
        while True:
            end = self.begins[number + 1] + offset
            if first < end:
                yield first, end, offset
                if end == FOREVER:
                    return
                running = (end - 1) // MINUTE * MINUTE
            number = self.stretch(end - offset)
            offset = self.offsets[number]
            first = -(-(self.begins[number] + offset) // MINUTE) * MINUTE
            first += MINUTE * (first == running)

    def instant(self, wall: int) -> int:
        """When the wall shows this: the first time if there are two, and
        the moment of the change if there is none."""
        latest = self.stretch(wall + DAY)
        for number in range(self.stretch(wall - DAY), latest + 1):
            instant = wall - self.offsets[number]
            if number == latest or instant < self.begins[number + 1]:
                return max(instant, self.begins[number])
        return wall


UTC = Zone("UTC", [], [0])


class Rule:
    """When the clocks change each year: a TZ of POSIX, as in
    CET-1CEST,M3.5.0,M10.5.0/3."""

    def __init__(self, standard: int, summer: int, begin, end):
        self.standard, self.summer = standard, summer
        self.begin, self.end = begin, end       # (kind, numbers, second)

    def changes(self, year: int) -> list[tuple[int, int]]:
        """The instants of a year at which an offset begins, in order."""
        begin, end = (day_of_rule(year, kind, numbers) * DAY + second
                      for kind, numbers, second in (self.begin, self.end))
        return sorted([(begin - self.standard, self.summer),
                       (end - self.summer, self.standard)])


def day_of_rule(year: int, kind: str, numbers: list[int]) -> int:
    """The day that M3.5.0 (last Sunday of March), J60 or 59 means."""
    if kind != "M":
        january = days_of(year, 1, 1)
        leaps = days_of(year, 3, 1) - january == 60
        return january + numbers[0] - (kind == "J") + (
            kind == "J" and leaps and numbers[0] >= 60)
    month, week, weekday = numbers
    first = days_of(year, month, 1)
    after = days_of(year + month // 12, month % 12 + 1, 1)
    day = first + (weekday - first - 4) % 7 + (week - 1) * 7
    return day if day < after else day - 7


RULE_NAME = r"([A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)"
RULE_TIME = r"([+-]?[0-9]{1,3}(?::[0-9]{1,2}){0,2})"
RULE_DAY = rf",(?:([J]?)([0-9]+)|(M)([0-9.]+))(?:/{RULE_TIME})?"
RULE_TEXT = rf"{RULE_NAME}{RULE_TIME}(?:{RULE_NAME}{RULE_TIME}?" \
    rf"(?:{RULE_DAY}{RULE_DAY})?)?"
USUAL_RULE = ",M3.2.0,M11.1.0"      # for EST5EDT alone, as the C library


def clock_seconds(text: str) -> int:
    """The seconds in -3, 5:30, +167:00:00."""
    parts = [int(part) for part in text.lstrip("+-").split(":")] + [0, 0]
    seconds = parts[0] * HOUR + parts[1] * MINUTE + parts[2]
    return -seconds if text[0] == "-" else seconds


def zone_of_rule(text: str, name: str = "") -> Zone | None:
    """The zone of a TZ of POSIX; None if the text is none."""
    import re
    found = re.fullmatch(RULE_TEXT, text)
    if not found:
        return None
    standard = -clock_seconds(found[2])
    if not found[3]:
        return Zone(name or text, [], [standard])
    if not found[7] and not found[8] and found[6] is None:
        return zone_of_rule(text + USUAL_RULE, name or text)
    summer = -clock_seconds(found[4]) if found[4] else standard + HOUR
    days = [day_rule(*found.group(*range(at, at + 5))) for at in (5, 10)]
    if None in days:
        return None
    return Zone(name or text, [], [standard],
                Rule(standard, summer, *days))


def day_rule(kind, number, month_kind, month_text, clock):
    """(kind, numbers, second) of a day in a rule, or None."""
    if month_kind:
        parts = month_text.split(".")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            return None
        numbers = [int(part) for part in parts]
        right = 1 <= numbers[0] <= 12 and 1 <= numbers[1] <= 5 \
            and numbers[2] <= 6
    else:
        numbers = [int(number)]
        right = (kind == "J") <= numbers[0] <= 365
    return (month_kind or kind, numbers,
            clock_seconds(clock or "2")) if right else None


def zone_of_data(name: str, data: bytes) -> Zone:
    """The zone of a TZif file (RFC 8536). Raises ValueError."""
    from struct import calcsize, error, unpack_from
    try:
        header = unpack_from(">4sc15x6l", data)
        at, width, clock = 44, 4, "l"
        if header[1] >= b"2":       # then a block with 64 bits comes too
            utc, std, leaps, times, types, letters = header[2:]
            at += times * 5 + types * 6 + letters + leaps * 8 + std + utc
            header = unpack_from(">4sc15x6l", data, at)
            at, width, clock = at + 44, 8, "q"
        utc, std, leaps, times, types, letters = header[2:]
        begins = unpack_from(f">{times}{clock}", data, at)
        at += times * width
        kinds = unpack_from(f">{times}B", data, at)
        at += times
        offsets = [unpack_from(">lBB", data, at + kind * calcsize(">lBB"))[0]
                   for kind in range(types)]
        at += types * 6 + letters + leaps * (width + 4) + std + utc
        if header[0] != b"TZif" or not types:
            raise ValueError(f"{name} is no file of a time zone")
        rule = data[at:].strip(b"\n").decode("ascii") if width == 8 else ""
        rule = rule if "," in rule else ""      # it has no summer time
        walls = [offsets[0]] + [offsets[kind] for kind in kinds]
    except (error, IndexError, UnicodeDecodeError) as broken:
        raise ValueError(f"{name} is broken: {broken}") from None
    return Zone(name, list(begins), walls, rule)


# ==========================================================================
# Schedule: when does an entry run next?                          (nothing)
#
# The first five columns of a crontab line, as sets of bits. The grammar is
# cronie's, which refuses what Debian's cron reads halfway ("5.5", "1-5-9");
# the day rule is that of both: with a star in front of either day column a
# day must satisfy both columns, without one either will do.
# ==========================================================================

MONTHS = {name: number for number, name in enumerate(
    "jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)}
WEEKDAYS = {name: number for number, name in enumerate(
    "sun mon tue wed thu fri sat".split())}
SPECIALS = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
            "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
            "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
            "@hourly": "0 * * * *"}
LONGEST_NUMBER = 9      # digits; cron's own 32 bits take 4294967301 for 5


class Misread(Exception):
    """A column cannot be read: which, where in it, why, and the mend."""

    def __init__(self, column: str, at: int, why: str, hint: str = ""):
        super().__init__(f"bad {column}: {why}")
        self.column, self.at, self.why, self.hint = column, at, why, hint


class Column:
    """One of the five: its name, its range, and words for its values."""

    def __init__(self, name: str, low: int, high: int, names: dict):
        self.name, self.low, self.high, self.names = name, low, high, names
        self.every = sum(1 << value for value in range(low, high + 1))
        self.known = {"*": self.every}      # what needs no reading
        for value in range(low, high + 1):
            self.known[str(value)] = self.known[f"{value:02}"] = 1 << value
        self.known.update((word, 1 << names[word]) for word in names)

    def bits(self, text: str, pick=None) -> int:
        """The values that a column's text means. Raises Misread."""
        known = self.known
        if text in known:
            return known[text]
        if "," not in text:
            return self.element(text, 0, pick)
        found = at = 0
        for part in text.split(","):
            found |= known[part] if part in known \
                else self.element(part, at, pick)
            at += len(part) + 1
        return found

    def element(self, text: str, at: int, pick) -> int:
        """What stands between two commas: 5, 1-5, 1-9/2, */2, 5~10."""
        if "~" in text:
            return 1 << self.random(text, at, pick)
        span, slash, every = text.partition("/")
        if span == "*":
            low, high = self.low, self.high
        else:
            first, dash, last = span.partition("-")
            low = self.number(first, at, text)
            if not dash:
                if slash:
                    self.stop(at, f"{short(text)} has a step but no range",
                              f"{first}-{self.high}/{every}")
                return 1 << low
            high = self.number(last, at + len(first) + 1, text)
            if high == 0 < low and self.high == 7:
                high = 7        # fri-sun: here Sunday ends the week
        step = self.step(every, at + len(span) + 1, text) if slash else 1
        if step == 1:
            return (2 << high) - (1 << low) if low <= high else 0
        found = 0
        for value in range(low, high + 1, step):
            found |= 1 << value
        return found

    def number(self, word: str, at: int, text: str) -> int:
        """A value of this column. Raises Misread."""
        if word.isdigit() and word.isascii():
            value = int(word) if len(word) <= LONGEST_NUMBER else FOREVER
        else:
            value = self.names.get(word.lower()) if word.isascii() else None
        if value is None:
            if not word:
                self.stop(at, "a number is missing" + (
                    f" in {short(text)}" if text else ""))
            hint = nearest(word.lower()[:3], self.names) if self.names else ""
            self.stop(at, f"{short(word)} is no {self.name}",
                      f"did you mean {hint}?" if hint else self.span())
        if not self.low <= value <= self.high:
            self.stop(at, f"{self.span()}, not {short(word)}", {
                "hour 24": "midnight is hour 0", "minute 60": "a full hour "
                "is minute 0"}.get(f"{self.name} {word}", ""))
        return value

    def step(self, word: str, at: int, text: str) -> int:
        if not (word.isdigit() and word.isascii()) or not word.strip("0"):
            self.stop(at, f"the step of {short(text)} is no number from 1 on")
        return int(word[-LONGEST_NUMBER:]) if len(word) <= 20 else 1000

    def random(self, text: str, at: int, pick) -> int:
        """The value that was picked for 5~10, as cronie has it."""
        first, _, last = text.partition("~")
        if not first and not last:
            self.stop(at, "~ stands alone", f"{self.low}~{self.high}")
        low = self.number(first, at, text) if first else self.low
        high = self.number(last, at + len(first) + 1, text) if last \
            else self.high
        if low > high:
            self.stop(at, f"{short(text)} runs backwards", f"{high}~{low}")
        return low + (pick or picked)(f"{self.name} {text}") % (
            high - low + 1)

    def span(self) -> str:
        return f"{self.name} is {self.low} to {self.high}"

    def stop(self, at: int, why: str, hint: str = ""):
        raise Misread(self.name, at, why, hint)


def short(text: str) -> str:
    """In quotes, and short enough for a message."""
    return f'"{visible(text[:40])}{"..." if len(text) > 40 else ""}"'


def picked(text: str) -> int:
    """A number that looks random and is the same for the same text."""
    from zlib import crc32
    return crc32(text.encode("utf-8", "surrogateescape"))


COLUMNS = (Column("minute", 0, 59, {}), Column("hour", 0, 23, {}),
           Column("day-of-month", 1, 31, {}), Column("month", 1, 12, MONTHS),
           Column("day-of-week", 0, 7, WEEKDAYS))

# The months of 400 years from 1970 on: the day each begins (and the end),
# the weekday of its first day, and a bit for each of its days. A day's bit
# in all masks below is its number less one.
MONTH_STARTS: list[int] = []
MONTH_WEEKDAYS: list[int] = []
MONTH_DAYS: list[int] = []
LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def fill_months() -> None:
    day = 0
    for year in range(1970, 2370):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        for month, days in enumerate(LONGEST_MONTH):
            days -= month == 1 and not leap
            MONTH_STARTS.append(day)
            MONTH_WEEKDAYS.append((day + 4) % 7)
            MONTH_DAYS.append((1 << days) - 1)
            day += days
    MONTH_STARTS.append(day)


SHARED: dict[tuple, tuple] = {}     # most tabs use few minutes and hours


def multiples(bits: int, unit: int) -> tuple[int, ...]:
    """The numbers of these bits, times a unit."""
    found = SHARED.get((bits, unit))
    if found is None:
        if len(SHARED) > 1000:
            SHARED.clear()
        found = SHARED[bits, unit] = tuple(
            unit * n for n in range(bits.bit_length()) if bits >> n & 1)
    return found


class Schedule:
    """When an entry runs: the first five columns of a crontab line."""

    __slots__ = ("text", "minutes", "hours", "days", "months", "weekdays",
                 "both", "wildcard", "minute_seconds", "hour_seconds",
                 "weeks", "never")

    def __init__(self, text: str, bits: list[int], stars: list[bool]):
        self.text = text
        minutes, hours, days, months, weekdays = bits
        if weekdays & 129:                  # 0 and 7 are Sunday
            weekdays |= 1
        self.minutes, self.hours, self.weekdays = minutes, hours, \
            weekdays & 127
        self.days, self.months = days >> 1, months >> 1
        self.wildcard = stars[0] or stars[1]
        self.both = stars[2] or stars[4]
        self.hour_seconds = None            # until `prepare`

    @classmethod
    def parse(cls, text: str, pick=None) -> Schedule:
        """Read five columns, or a word such as @daily. Raises Misread."""
        parts = SPECIALS.get(text, text).split()
        if len(parts) != 5:
            if text.startswith("@"):
                raise Misread("time specifier", 0, f"{short(text)} is none",
                              " ".join(SPECIALS))
            raise Misread(COLUMNS[min(len(parts), 4)].name, len(text),
                          f"five columns are needed, not {len(parts)}")
        return cls(text, [column.bits(part, pick) for column, part
                          in zip(COLUMNS, parts)],
                   [part[0] == "*" for part in parts])

    def prepare(self) -> None:
        """Make what `next` needs, when it is needed first."""
        if not MONTH_STARTS:
            fill_months()
        self.minute_seconds = multiples(self.minutes, MINUTE)
        # A month may begin on any weekday, so five weeks and a day of bits.
        self.weeks = sum(self.weekdays << week for week in range(0, 42, 7))
        dated = any(self.months >> month & 1 and self.days & (1 << days) - 1
                    for month, days in enumerate(LONGEST_MONTH))
        weekly = self.months and self.weekdays
        self.never = not (self.minutes and self.hours and (
            dated and weekly if self.both else dated or weekly))
        self.hour_seconds = multiples(self.hours, HOUR)

    def days_in(self, month: int) -> int:
        """A bit for each day that matches in a month of the 400 years."""
        if not self.months >> month % 12 & 1:
            return 0
        weeks = self.weeks >> MONTH_WEEKDAYS[month]
        days = self.days & weeks if self.both else self.days | weeks
        return days & MONTH_DAYS[month]

    def day_from(self, day: int) -> int:
        """The first matching day from this day on; there must be one."""
        cycle = day // CYCLE * CYCLE
        month = bisect_right(MONTH_STARTS, day - cycle) - 1
        ahead = day - cycle - MONTH_STARTS[month]
        days = self.days_in(month) >> ahead << ahead
        while not days:
            month += 1
            if month == len(MONTH_DAYS):
                month, cycle = 0, cycle + CYCLE
            days = self.days_in(month)
        return cycle + MONTH_STARTS[month] + (days & -days).bit_length() - 1

    def wall_after(self, wall: int) -> int:
        """The first minute that matches, later than this wall second."""
        today = wall // DAY
        second, day = wall - today * DAY, self.day_from(today)
        if day == today:
            hours, minutes = self.hour_seconds, self.minute_seconds
            past = bisect_right(hours, second)
            if past:
                hour = hours[past - 1]
                ahead = bisect_right(minutes, second - hour)
                if ahead < len(minutes):
                    return day * DAY + hour + minutes[ahead]
            if past < len(hours):
                return day * DAY + hours[past] + minutes[0]
            day = self.day_from(day + 1)
        return day * DAY + self.hour_seconds[0] + self.minute_seconds[0]

    def walls(self, low: int, end: float):
        """All minutes that match, from `low` on and before `end`."""
        if self.hour_seconds is None:
            self.prepare()
        if self.never:
            return
        if end - low == MINUTE and low % MINUTE == 0:   # as koid looks
            if self.wall_after(low - 1) == low:
                yield low
            return
        day, minutes = self.day_from(low // DAY), self.minute_seconds
        while day * DAY < end:
            for hour in self.hour_seconds:
                hour += day * DAY
                if hour + HOUR <= low:
                    continue
                for minute in minutes:
                    wall = hour + minute
                    if wall >= end:
                        return
                    if wall >= low:
                        yield wall
            day = self.day_from(day + 1)

    def matches(self, wall: int) -> bool:
        """Does a wall's minute satisfy all five columns?"""
        if self.hour_seconds is None:
            self.prepare()
        return not self.never and self.wall_after(wall - 1) == wall

    def next(self, after: int, zone: Zone = UTC) -> int | None:
        """The first start later than the minute of `after`, or None."""
        if self.hour_seconds is None:
            self.prepare()
        if self.never:
            return None
        if after >= zone.reach:
            zone.extend(after)
        number = bisect_right(zone.begins, after) - 1
        offset = zone.offsets[number]
        wall = after + offset
        if wall >= zone.calm[number]:
            start = self.wall_after(wall) - offset
            if start < zone.begins[number + 1]:
                return start
        return next(self.starts(after, zone), None)

    def starts(self, after: int, zone: Zone = UTC,
               virtual: int | None = None):
        """All starts later than the minute of `after`, as Debian's cron
        makes them. Without end, but for a schedule that never runs.

        Without `virtual`, the daemon was there before; with it, that is the
        last minute of the wall whose jobs were started.
        """
        if self.hour_seconds is None:
            self.prepare()
        if self.never:
            return
        latest = after
        if virtual is None:
            number = zone.stretch(after)
            wall = after + zone.offsets[number]
            virtual = max(wall // MINUTE * MINUTE, zone.calm[number])
        for first, end, offset in zone.stretches(after):
            low = resume(virtual, first, self.wildcard)
            for wall in self.walls(low, end):
                latest = (wall if wall > first else first) - offset
                yield latest
            # A wildcard job whose only day always lies in a gap.
            if end - offset - latest > CYCLE * DAY:
                return
            virtual = played(virtual, first, (end - 1) // MINUTE * MINUTE)

    def words(self) -> str:
        """As one would say it: At 02:30 on Mondays."""
        if self.hour_seconds is None:
            self.prepare()
        if self.never:
            return "Never"
        return clock_words(self) + date_words(self)


WEEKDAY_WORDS = ("Sunday Monday Tuesday Wednesday Thursday Friday "
                 "Saturday").split()
MONTH_WORDS = ("January February March April May June July August September "
               "October November December").split()


def values(bits: int) -> list[int]:
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


def joined(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else \
        f"{', '.join(words[:-1])} and {words[-1]}"


def listed(numbers: list[int], word=str) -> str:
    """1 to 5, 7 and 9."""
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
    return joined(found)


def evenly(numbers: list[int], unit: str, word=str) -> str:
    """every 7th minute from 0 to 56; "" if they are not evenly spaced."""
    steps = {b - a for a, b in zip(numbers, numbers[1:])}
    if len(numbers) < 4 or len(steps) > 1 or 1 in steps:
        return ""
    return (f"every {ordinal(*steps)} {unit} from {word(numbers[0])} to "
            f"{word(numbers[-1])}")


def counted(numbers: list[int], unit: str) -> str:
    """minute 5; hours 8 to 17; every 7th minute from 0 to 56."""
    many = "s" if len(numbers) > 1 else ""
    return evenly(numbers, unit) or f"{unit}{many} {listed(numbers)}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if 10 < number % 100 < 14 else {
        1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def the_day(number: int) -> str:
    return f"the {ordinal(number)}"


def even_step(numbers: list[int], whole: int) -> int:
    """The step if the numbers are all of 0, step, 2 * step ... < whole."""
    step = numbers[1] if len(numbers) > 1 else 0
    return step if step and whole % step == 0 and numbers == list(
        range(0, whole, step)) else 0


def clock_words(schedule: Schedule) -> str:
    """The minutes and hours: Every 5 minutes; At 02:30."""
    minutes, hours = values(schedule.minutes), values(schedule.hours)
    if len(minutes) * len(hours) <= 6:
        return "At " + joined([f"{hour:02}:{minute:02}" for hour in hours
                               for minute in minutes])
    step, every = even_step(minutes, 60), even_step(hours, 24)
    if every == 1 and minutes == [0]:
        return "Every hour"
    text = f"At {counted(minutes, 'minute')}" if not step else \
        f"Every {step} minutes" if step > 1 else "Every minute"
    if every == 1:
        return text if step else f"{text} of every hour"
    if every:
        return f"{text} of every {ordinal(every)} hour"
    return f"{text} of {counted(hours, 'hour')}"


def date_words(schedule: Schedule) -> str:
    """The days and months, with a blank in front: on Mondays; in May."""
    all_days, all_week = (1 << 31) - 1, 127
    days, week = schedule.days, schedule.weekdays
    months = "" if schedule.months == 4095 else listed(
        values(schedule.months), MONTH_WORDS.__getitem__)
    if not schedule.both and (days == all_days or week == all_week):
        days, week = all_days, all_week     # either will do, and one does
    numbers = [n + 1 for n in values(days)]
    on_days = " on " + (evenly(numbers, "day", the_day)
                        or f"the {listed(numbers, ordinal)}")
    on_week = " on " + listed(values((week | week << 7 & 128) & 254),
                              lambda n: WEEKDAY_WORDS[n % 7] + "s")
    in_months = f" in {months}" if months else ""
    if days == all_days:
        return in_months if week == all_week else on_week + in_months
    of_months = f" of {months or 'the month'}"
    if week == all_week:
        return on_days + of_months
    if schedule.both:
        return f"{on_week} that fall{on_days}{of_months}"
    return f"{on_days}{of_months} and{on_week}{in_months}"


# ==========================================================================
# Tab: what does a koitab say?                                    (nothing)
#
# All of crontab(5), and sections, names, @manual, {{arguments}} and KOI_
# settings. A bad line is a Problem beside all others and drops that line
# alone. An argument's value reaches the shell by the environment: what is
# put in its place is "${KOI_ARG_1}", so it may only stand where the shell
# reads a word. `Lexer` knows where that is.
# ==========================================================================

MOST_LINES = 10_000         # Debian's own limit
MOST_SETTINGS = 1_000       # cronie's: each costs a copy of those above it
LONGEST_COMMAND = 131_071   # bytes: the kernel's limit for one argument
LONGEST_NAME = 100
LONGEST_VALUE, LONGEST_TEXT = 4096, 65_536      # bytes of an argument
MOST_PARAMS = 64
DEEPEST_SHELL = 50
BLANKS = " \t"
SPACE = " \t\r\f\v"


class Problem(Record):
    """Something is wrong with a line, or looks as if it were."""
    line: int
    column: int
    what: str               # "bad minute", as crontab(1) says it
    why: str
    hint: str = ""
    fatal: bool = True      # else a warning: the line counts

    def text(self, file: str) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return visible(f"{file}:{self.line}:{self.column}: "
                       f"{'' if self.fatal else 'warning: '}{self.what}: "
                       f"{self.why}{hint}")


class Settings(Record):
    """What assignments of ours say about the jobs below them."""
    timeout: float = 0.0        # seconds; 0: none
    overlap: str = "allow"
    retry: int = 0
    catchup: str = "no"
    keep: int = 100
    start_within: float = 0.0
    confirm: str = "no"
    zone: str = ""              # CRON_TZ; "": the machine's
    random_delay: int = 0       # minutes


class Param(Record):
    """An argument of a job: {{name, type, default}}."""
    name: str
    type: str = "string"
    default: str | None = None
    choices: tuple = ()

    def refusal(self, value: str) -> str:
        """Why this is no value for it; "" if it is one."""
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
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return "it is not UTF-8"
        if has_control(value, "\n\t" if self.type == "text" else "\t"):
            return "it has a control character"
        most = LONGEST_TEXT if self.type == "text" else LONGEST_VALUE
        if len(value) * 4 > most and len(value.encode()) > most:
            return f"it is longer than {most:,} bytes"
        return ""


class Job(Record):
    """An entry of a tab that can run."""
    line: int
    section: str
    name: str               # "" if it has none
    when: str               # as written: "*/5 * * * *", "@manual"
    schedule: Schedule | None   # None: @manual or @reboot
    user: str               # of a system tab; else ""
    command: str            # as written, % and {{..}} and all
    script: str             # what the shell gets
    stdin: str
    params: tuple
    environment: dict
    settings: Settings
    unlogged: bool = False          # a line that begins with "-"
    mail_failures: bool = False     # a command that begins with "-n "

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name or self.command

    def identity(self) -> tuple:
        """What makes it this job, though its line may move."""
        if self.name:
            return ("name", self.section, self.name)
        return ("line", self.user, self.when, self.command)

    @property
    def tag(self) -> str:
        return tag_of("\0".join(self.identity()))

    def words(self) -> str:
        """When it runs, as one would say it."""
        if not self.schedule:
            return {"@manual": "When asked for",
                    "@reboot": "When the machine starts"}[self.when]
        text, settings = self.schedule.words(), self.settings
        if settings.zone:
            text += f" ({settings.zone})"
        if settings.random_delay:
            text += f", delayed by up to {settings.random_delay} minutes"
        return text


def tag_of(identity: str) -> str:
    """An identity in twelve letters, for programs."""
    try:
        from hashlib import sha256  # loads 3 MB: not until somebody asks
    except ImportError:
        return ""                   # Python was upgraded under koid
    return sha256(identity.encode("utf-8", "surrogateescape")
                  ).hexdigest()[:12]


class Tab(Record):
    """What a koitab says: its jobs, and what is wrong with it."""
    jobs: list
    problems: list
    zones: dict             # CRON_TZ -> (line, column) where it stands first

    def faults(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.fatal]


def is_date(text: str) -> bool:
    parts = text.split("-")
    if [len(part) for part in parts] != [4, 2, 2] or not text.isascii() \
            or not "".join(parts).isdigit():
        return False
    year, month, day = map(int, parts)
    return year > 0 and 1 <= month <= 12 and day > 0 and date_of(
        days_of(year, month, day)) == (year, month, day)


def has_control(text: str, allowed: str = "") -> bool:
    """Is there anything that a terminal would obey?"""
    if text.isprintable():
        return False
    import re
    return any(match not in allowed for match in re.findall(UNSAFE + "|\t",
                                                            text))


# --- the sh that we must know: where may a placeholder stand? -------------

QUOTES = "leave the quotes away: koi quotes the value"
ALONE = "let it stand alone, as a word of the command"
PLACES = {      # where a placeholder was found -> the mend
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
# Programs that read a value a second time, as code: no quoting of ours can
# help. "": always. Letters: with one of these options, as in sh -lc. A word:
# with this option, as in gdb -ex. ">": a value right after this option.
# "=": a value that is the whole word, where export V={{x}} would do no harm.
PARSERS = {
    "eval": "", "let": "", "trap": "", "[[": "", "declare": "", "typeset": "",
    "unset": "", "source": "", ".": "", "read": "", "mapfile": "",
    "readarray": "", "getopts": "", "compgen": "", "emulate": "",
    "integer": "", "export": "=", "readonly": "=", "local": "=",
    "exit": "=", "return": "=", "shift": "=", "ulimit": "=", "repeat": "=",
    "xargs": "", "parallel": "", "ssh": "", "autossh": "", "rsh": "",
    "pdsh": "", "watch": "", "hyperfine": "", "tmux": "", "expect": "c",
    "at": "", "batch": "", "crontab": "", "koitab": "", "make": "",
    "gmake": "", "m4": "", "dc": "", "ed": "", "gnuplot": "", "socat": "",
    "awk": "", "gawk": "", "mawk": "", "nawk": "", "sed": "", "gsed": "",
    "sg": "", "sqlite3": "", "mysql": "e", "mariadb": "e", "psql": "c",
    "sh": "c", "ash": "c", "bash": "c", "rbash": "c", "dash": "c",
    "ksh": "c", "mksh": "c", "zsh": "c", "yash": "c", "fish": "c",
    "csh": "c", "tcsh": "c", "busybox": "c", "su": "c", "runuser": "c",
    "script": "c", "flock": "c", "entr": "s", "env": "S",
    "python": "c", "pypy": "c", "ipython": "c", "perl": "eE", "ruby": "e",
    "node": "ep", "nodejs": "ep", "php": "rBRE", "lua": "e", "R": "e",
    "Rscript": "e", "julia": "eE", "guile": "c", "osascript": "e",
    "vi": "c", "vim": "c", "nvim": "c", "ex": "c", "emacs": "--eval",
    "gdb": "-ex", "octave": "--eval", "ncat": "c", "nc": "c",
    "git": ">-c", "rsync": ">-e", "test": "v", "[": "v", "printf": "v"}
SHELLS = {"sh", "ash", "bash", "rbash", "dash", "ksh", "mksh", "zsh", "yash",
          "fish", "csh", "tcsh"}
# Those that run the file that they are told first, or what follows -c or -e
# in the same word.
READERS = SHELLS | {"python", "pypy", "perl", "ruby", "node", "nodejs",
                    "php", "lua", "Rscript", "julia"}
BUILTINS = {"eval", "let", "trap", "[[", "declare", "typeset", "unset",
            "source", ".", "read", "mapfile", "readarray", "getopts",
            "compgen", "emulate", "integer", "export", "readonly", "local",
            "exit", "return", "shift", "ulimit", "repeat"}
# What runs another program, with what stands before its name.
WRAPPERS = {"sudo", "doas", "env", "nohup", "nice", "ionice", "timeout",
            "exec", "command", "time", "find", "setsid", "flock", "chroot",
            "busybox", "stdbuf", "runuser", "systemd-run", "unshare",
            "nsenter", "setpriv", "prlimit", "taskset", "chrt", "strace",
            "docker", "podman", "kubectl", "machinectl", "ip", "entr",
            "fakeroot", "xvfb-run", "chronic", "sshpass", "screen"}
LEADERS = {"sudo", "doas", "env", "nohup", "nice", "ionice", "timeout",
           "setsid", "stdbuf", "systemd-run", "unshare", "setpriv",
           "chronic", "strace", "fakeroot", "xvfb-run", "entr"}
# Variables that a shell or a program obeys.
OBEYED = {"PS4", "PATH", "ENV", "BASH_ENV", "LD_PRELOAD", "LD_LIBRARY_PATH",
          "RANDOM", "SECONDS", "OPTIND", "HISTCMD", "COLUMNS", "LINES",
          "PERL5OPT", "PERL5LIB", "PYTHONPATH", "RUBYOPT", "RUBYLIB",
          "NODE_OPTIONS", "JAVA_TOOL_OPTIONS", "MAKEFLAGS", "EDITOR",
          "VISUAL", "PAGER", "LESSOPEN", "GIT_SSH", "GIT_SSH_COMMAND",
          "GIT_EDITOR", "GIT_PAGER", "RSYNC_RSH"}
POSITIONAL = {f"${digit}" for digit in "123456789"}
COMPARE = {"-eq", "-ne", "-lt", "-le", "-gt", "-ge", "-t"}
ENDS_WORD = " \t\n;&|()<>"
NO_QUOTES = str.maketrans("", "", "'\"\\")
PLAIN = ("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
         "_-.,!^*?@+")          # in an index or a glob: [0-9]
# Shells whose words are not those of sh: our lexer does not know them.
OTHERS = {"fish", "csh", "tcsh", "nu", "elvish", "xonsh", "pwsh", "rc", "es",
          "python", "python3", "perl"}
FREE = {"string", "text", "secret"}     # what can hold code
# What other programs write in double braces: {{.Names}}, {{end}}.
FOREIGN = {"end", "else"}


def is_foreign(inner: str) -> bool:
    """Do these braces belong to another program: {{.Names}}, {{end}}?"""
    words = inner.replace("(", " ").replace("|", " ").split()
    return inner.strip() in FOREIGN or any(
        word[0] in ".$" for word in words) or inner[:1] in ("-", "/", "#")


def in_index(before: str) -> bool:
    """Does a word that begins like this go on in brackets? bash reckons
    with what stands there, and a[$(id)] would be run."""
    name, bracket, rest = before.partition("[")
    if not bracket or name and not name.isidentifier():
        return False
    index, _, after = rest.partition("]")
    return not (index.isalnum() and after.startswith(("=", "+=")))


class Found(Record):
    """{{...}} in a command: from `start` to `end`, and where it stands."""
    start: int
    end: int
    place: str              # "": where the shell reads a word
    first: bool = False     # it begins the first word of a command


class Lexer:
    """Walks along a command as sh does, and finds each {{...}} in it."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        self.found: list[Found] = []
        self.odd: list[tuple[int, str]] = []    # {{ that are no placeholder
        self.words: list[tuple[str, bool]] = []     # word, begins a command
        self.beyond = ""        # a place that holds up to the end
        self.open = True        # there may be a }} ahead
        self.cases = False      # was there a `case`?
        self.array = False      # inside V=(..)
        self.named: set[str] = set()    # variables that get a value
        self.sums: list[str] = []       # what a shell reckons with
        self.walk("", "")

    def placeholder(self, place: str, first: bool = False) -> bool:
        """Take the {{...}} that stands here, if there is one."""
        text, at = self.text, self.at
        if not text.startswith("{{", at):
            return False
        end = text.find("}}", at + 2) if self.open else -1
        inner = text[at + 2:end]
        if end < 0 or is_foreign(inner) or "{" in inner or "}" in inner:
            self.odd.append((at, "open" if end < 0 else "foreign"
                             if is_foreign(inner) else "braces"))
            self.open = end >= 0
            return False
        self.found.append(Found(at, end + 2, place or self.beyond, first))
        self.at = end + 2
        return True

    def walk(self, place: str, stop: str) -> None:
        """Commands, up to the character `stop` or the end."""
        text, word, first = self.text, -1, not self.array
        self.depth += 1
        if self.depth > DEEPEST_SHELL:
            self.rest("nested too deep")
        while self.at < len(text):
            letter = text[self.at]
            if letter in ENDS_WORD:
                if word >= 0 and not (letter in "<>"
                                      and text[word:self.at].isdigit()):
                    first = self.put_word(word, first)
                word = -1
                if letter == stop:
                    # A pattern of `case` closes what nobody opened, so
                    # from there on we do not know: it stays inside.
                    if not (place and self.cases):
                        self.at += 1
                        break
                    self.beyond = place
                self.operator(letter, place or self.pattern(letter, first))
                first = letter in ";&|)" or first and letter in " \t(<>" \
                    or text.endswith("()", 0, self.at)
            elif letter == "#" and word < 0:
                self.rest("in a comment")
            else:
                if word < 0:
                    word = self.at
                self.in_word(letter, place, word, first)
        if word >= 0 and self.at >= len(text):
            self.put_word(word, first)
        self.depth -= 1

    def put_word(self, start: int, first: bool) -> bool:
        """A word has ended. Is the next one the first of its command?"""
        word = self.text[start:self.at].translate(NO_QUOTES)
        self.words.append((word, first))
        self.cases = self.cases or word == "case"
        if self.words[-2:-1] in ([("for", True)], [("select", True)]):
            self.named.add(word)
        name = word.split("=")[0]
        return first and (name != word and name.isidentifier() or word in (
            "if", "then", "else", "elif", "do", "while", "until", "!", "{",
            "time", "exec", "command", "nohup", "setsid", "sudo", "doas",
            "builtin", "coproc", "noglob", "nocorrect"))

    def operator(self, letter: str, place: str) -> None:
        """Take what separates words."""
        text, at = self.text, self.at
        if text.startswith("((", at):
            self.at += 1
            self.walk(place or "in arithmetic", ")")
            self.sums.append(text[at:self.at])
        elif letter == "(":
            outer, self.array = self.array, text[at - 1:at] == "="
            self.at += 1
            self.walk(place, ")")
            self.array = outer
        elif letter in "<>" and text.startswith("(", at + 1):
            self.at += 2
            self.walk("in <(..) or >(..)", ")")
        elif text.startswith("<<<", at):
            self.at += 3
            self.target(place)
        elif text.startswith("<<", at):
            self.at += 2
            self.beyond = self.beyond or "in a here-document"
        elif text.startswith((">&", "<&"), at):
            self.at += 2
            self.target(place or "after >& or <&")
        elif letter in "<>":
            self.at += 1 + text.startswith((">", "|"), at + 1)
            self.target(place)
        else:
            self.at += 1

    def pattern(self, letter: str, first: bool) -> str:
        """In zsh *(..), and (..) among a command's words, are patterns, and
        what is in those can be run."""
        text, at = self.text, self.at
        if letter != "(" or first or text[at - 1:at] == "=" \
                or text.startswith("()", at) \
                or self.words[-1:] == [("in", False)]:
            return ""
        return "in a pattern"

    def target(self, place: str) -> None:
        """The word after a redirection: it is none of the command's. After
        >& bash expands what a value says once more."""
        text = self.text
        while text[self.at:self.at + 1] in (" ", "\t"):
            self.at += 1
        word = self.at
        while self.at < len(text) and text[self.at] not in ENDS_WORD:
            self.in_word(text[self.at], place, word, False)

    def in_word(self, letter: str, place: str, word: int, first: bool):
        """Take one thing that a word is made of."""
        text = self.text
        if letter == "\\":
            self.at += 1
            self.placeholder("after a backslash") or self.skip()
        elif letter == "'":
            self.single("in single quotes")
        elif letter == '"':
            self.double()
        elif letter == "`":
            self.backquotes()
        elif letter == "$":
            self.dollar(quoted=False)
        elif letter == "[" and self.opens_index(word):
            self.beyond = self.beyond or "in an array's index"
            self.at += 1
        elif letter == "{" and text.startswith("{{", self.at):
            before = text[word:self.at]
            if in_index(before):
                place = place or "in an array's index"
            if self.placeholder(place, first and "=" not in before):
                self.named.add(before.partition("=")[0].rstrip("+"))
            else:
                self.skip()
        else:
            self.at += 1

    def reckoned(self, inner: str) -> None:
        """${!V}, ${x[V]} and ${x:V}: what V says is read as a name, or as a
        number."""
        name, colon, rest = inner.partition(":")
        if inner[1:2] == "!" or "[" in name or colon \
                and rest[:1] not in tuple("-=?+"):
            self.sums.append(inner)

    def obeyed(self) -> str:
        """The variable that gets a value and is read as code, or ''."""
        told = sorted(self.named & OBEYED)
        if told:
            return told[0]
        for text in self.sums:
            names = set("".join(letter if letter.isalnum() or letter in "_$"
                                else " " for letter in text).replace(
                                    "$", " $").split())
            told = sorted(names & (self.named | POSITIONAL)
                          | {f"${name}" for name in self.named} & names)
            if told:
                return f"arithmetic with {told[0]}"
        return ""

    def opens_index(self, word: int) -> bool:
        """V[.. and ([..]=.. go on up to a ], over blanks too."""
        text, at = self.text, self.at
        if self.beyond or not (self.array if word == at
                               else text[word:at].isidentifier()):
            return False
        end = text.find("]", at)
        return end < 0 or text[at + 1:end].strip(PLAIN) != ""

    def skip(self) -> None:
        self.at += 1

    def rest(self, place: str) -> None:
        """All up to the end of the line stands in this place."""
        while True:
            at = self.text.find("{{", self.at)
            if at < 0:
                break
            self.at = at
            self.placeholder(place) or self.skip()
        self.at = len(self.text)

    def single(self, place: str) -> None:
        """'...', where nothing is special."""
        end = self.text.find("'", self.at + 1)
        end = len(self.text) if end < 0 else end
        self.at += 1
        while True:
            at = self.text.find("{{", self.at, end)
            if at < 0:
                break
            self.at = at
            self.placeholder(place) or self.skip()
            if self.at > end:       # {{a' b}}: the quote was in the braces
                end = self.text.find("'", self.at)
                end = len(self.text) if end < 0 else end
        self.at = end + 1

    def double(self, inner: bool = False) -> None:
        """"...", where $ and ` and \\ are special."""
        self.at += 1
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == '"':
                self.at += 1
                return
            if letter == "\\":
                self.at += 1
                self.placeholder("in double quotes") or self.skip()
            elif letter == "`":
                self.backquotes()
            elif letter == "$":
                self.dollar(quoted=True)
            elif not self.placeholder("in double quotes"):
                if inner and letter in "'}":
                    self.two_ways()
                self.at += 1

    def two_ways(self) -> None:
        self.beyond = self.beyond or "after a ' in \"${..}\""

    def backquotes(self) -> None:
        """`...`: up to the next one without a backslash."""
        self.at += 1
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == "`":
                self.at += 1
                return
            self.at += letter == "\\"
            if not self.placeholder("in backquotes"):
                self.at += 1

    def dollar(self, quoted: bool) -> None:
        """$(..), $((..)), ${..}, $'..', $name."""
        text, self.at = self.text, self.at + 1
        place = "in double quotes" if quoted else "after a $"
        if text.startswith("((", self.at):
            at, self.at = self.at, self.at + 1
            self.walk("in arithmetic", ")")
            self.sums.append(text[at:self.at])
        elif text.startswith("(", self.at):
            self.at += 1
            self.walk("in $(..)", ")")
        elif text.startswith("{", self.at):
            at = self.at
            self.placeholder(place) or self.braces(quoted)
            self.reckoned(text[at:self.at])
        elif text.startswith("[", self.at):     # $[1+2], old and still there
            self.beyond = self.beyond or "in arithmetic"
        elif text.startswith("'", self.at) and not quoted:
            self.ansi_quotes()
        elif text[self.at:self.at + 1] not in ("", '"', "'", "\\", "`", " ",
                                               "\t", ";", ")", "&", "|"):
            self.at += 1        # $$ and $# among others

    def braces(self, quoted: bool) -> None:
        """${..}, which may hold all of the others. In double quotes not all
        shells agree what a ' in it means."""
        self.at += 1
        self.depth += 1
        if self.depth > DEEPEST_SHELL:
            self.rest("nested too deep")
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == "}":
                self.at += 1
                break
            if letter == "\\":
                self.at += 1
                self.placeholder("in ${..}") or self.skip()
            elif letter == "'" and quoted:
                self.two_ways()
                self.at += 1
            elif letter == "'":
                self.single("in ${..}")
            elif letter == '"':
                self.double(inner=quoted)
            elif letter == "`":
                self.backquotes()
            elif letter == "$":
                self.dollar(quoted)
            elif not self.placeholder("in ${..}"):
                self.at += 1
        self.depth -= 1

    def ansi_quotes(self) -> None:
        r"""$'..' of bash, where \' does not end it; in dash it does."""
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != "'":
            if self.text[self.at] == "\\":
                if self.text.startswith("'", self.at + 1):
                    self.beyond = self.beyond or r"after $'..\'..'"
                self.at += 1
            if not self.placeholder("in $'..'"):
                self.at += 1
        self.at += 1


def second_parser(words: list[tuple[str, bool]]) -> str:
    """The program on this line that would read a value as code, or ''."""
    wrapped = False
    for number, (word, first) in enumerate(words):
        name = word.rpartition("/")[2] or word
        wrapped = name in WRAPPERS or wrapped and not first
        told = first or wrapped and name not in BUILTINS
        kind = name if name in PARSERS else name.rstrip("0123456789.")
        if kind not in PARSERS or not (told or kind in SHELLS):
            continue                        # python3.11 is a python
        after = []
        for later, begins in words[number + 1:number + 100]:
            if begins:
                break
            after.append(later)
        how = parsed_by(kind, after)
        if how is not None and (told or how == " -c"):
            return name + how
    return ""


def parsed_by(name: str, after: list[str]) -> str | None:
    """Does this program with these words read one of them as code? By which
    option, or "" if by none; None: it does not."""
    option = PARSERS[name]
    if not option:
        return ""
    if option == "=":
        return "" if any(word[:2] == "{{" for word in after) else None
    if option[0] == ">":
        told = any(one == option[1:] and two[:2] == "{{"
                   for one, two in zip(after, after[1:]))
        return f" {option[1:]}" if told else None
    if option[0] == "-":
        return f" {option}" if option in after else None
    if any(word[:1] == "-" and word[:2] != "--" and any(
            letter in word for letter in option) for word in after):
        return f" -{option[0]}"
    if name in ("test", "[") and not COMPARE.isdisjoint(after):
        return " of ksh"                    # where -eq takes a sum
    operands = [word for word in after if word[:1] != "-" or word == "-s"]
    if name in SHELLS and (not operands or operands[0] == "-s"):
        return ""                           # echo {{x}} | sh
    read = name in READERS and operands[:1] and operands[0][:2] == "{{"
    return "" if read else None


def led(words: list[tuple[str, bool]]) -> str:
    """The value that is the program of another: sudo {{x}}; or ''."""
    leader = ""
    for word, first in words:
        if word[:2] == "{{" and leader:
            return leader
        name = word.rpartition("/")[2]
        if name in LEADERS and (first or leader):
            leader = name
        elif first or not (word[:1] in "-0123456789" or "=" in word):
            leader = ""
    return ""


def split_percent(text: str) -> tuple[str, str, int]:
    r"""The command and its input, as cron parts them at the first bare %;
    and how many characters of `text` are the command. \% is a percent."""
    if "%" not in text:
        return text, "", len(text)
    command, at = [], 0
    while at < len(text) and text[at] != "%":
        pair = text[at:at + 2]
        if pair[0] == "\\":
            command.append("%" if pair == "\\%" else pair)
            at += 2
        else:
            command.append(pair[0])
            at += 1
    return "".join(command), input_text(text[at + 1:]), at


def input_text(text: str) -> str:
    """What stands after %: each further % begins a line."""
    if not text:
        return ""
    lines, at = [], 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1:at + 2] == "%":
            at += 1
            lines.append("%")
        else:
            lines.append("\n" if text[at] == "%" else text[at])
        at += 1
    joined_text = "".join(lines)
    return joined_text if joined_text.endswith("\n") else joined_text + "\n"


# --- line by line ---------------------------------------------------------


def one_of(*words: str):
    return lambda text: text if text in words else None


def count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() \
        and len(text) < 7 else None


def delay(text: str) -> int | None:
    number = count(text)
    return number if number is not None and number <= 1440 else None


def some_count(text: str) -> int | None:
    return count(text) or None


SETTINGS = {    # variable -> field of Settings, its reader, what is right
    "KOI_TIMEOUT": ("timeout", seconds_of, "a duration such as 90s or 1h30m"),
    "KOI_OVERLAP": ("overlap", one_of("allow", "skip", "queue", "replace"),
                    "allow, skip, queue or replace"),
    "KOI_RETRY": ("retry", count, "how many times, 0 or more"),
    "KOI_CATCHUP": ("catchup", one_of("yes", "no"), "yes or no"),
    "KOI_KEEP": ("keep", some_count, "how many runs, 1 or more"),
    "KOI_START_WITHIN": ("start_within", seconds_of,
                         "a duration such as 10m"),
    "KOI_CONFIRM": ("confirm", one_of("yes", "no", "cli"), "yes, no or cli"),
    "CRON_TZ": ("zone", str, "a name such as Europe/Berlin"),
    "RANDOM_DELAY": ("random_delay", delay, "minutes, 0 to 1440"),
}
EXPANDED = {"MAILTO", "MAILFROM"}


def assignment_of(line: str) -> tuple[str, str, int] | None:
    """Name, value and where the value begins, if the line is NAME=value.

    As cron's own reader: quotes around the name or the value, blanks around
    the =, and no name is too strange.
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


class Refused(Exception):
    """This line is no good: the Problem. Drops the line."""

    def __init__(self, *problems: Problem):
        super().__init__(problems)
        self.problems = problems


class TabReader:
    """Reads one tab. `system`: it has a column with users, as /etc/crontab;
    `salt` decides what ~ picks."""

    def __init__(self, text: str, system: bool, root: bool, salt: str):
        self.text, self.system, self.root = text, system, root or system
        self.salt, self.row, self.raw, self.base = salt, 0, "", 0
        self.section, self.settings = "", Settings()
        self.environment: dict[str, str] = {}
        self.set = 0                    # how many assignments there were
        self.known: dict[tuple, int] = {}
        self.tab = Tab([], [], {})

    def read(self) -> Tab:
        lines = self.text.split("\n")
        last = lines.pop()
        for self.row, self.raw in enumerate(lines, start=1):
            if self.row > MOST_LINES:
                self.note(0, "bad tab", f"more than {MOST_LINES:,} lines", "",
                          True)
                return self.tab
            self.read_line()
        if last.strip(BLANKS) and not last.lstrip(BLANKS).startswith("#"):
            self.row, self.base = len(lines) + 1, 0
            self.note(len(last), "premature EOF", "the last line does not end",
                      "press Enter at its end", True)
        return self.tab

    def note(self, at: int, what: str, why: str, hint: str = "",
             fatal: bool = False) -> None:
        self.tab.problems.append(
            Problem(self.row, self.base + at + 1, what, why, hint, fatal))

    def refuse(self, at: int, what: str, why: str, hint: str = ""):
        raise Refused(Problem(self.row, self.base + at + 1, what, why, hint))

    def read_line(self) -> None:
        line = self.raw.lstrip(BLANKS)
        self.base = len(self.raw) - len(line)
        if not line or line[0] == "#":
            return
        try:
            if "\0" in line:
                self.refuse(line.index("\0"), "bad line",
                            "there is a NUL in it")
            if line[0] == "[" and line.rstrip(SPACE)[-1] == "]":
                self.read_section(line.rstrip(SPACE)[1:-1])
                return
            found = assignment_of(line)
            if found:
                self.assign(*found)
            else:
                self.tab.jobs.append(self.entry(line))
        except Refused as refused:
            self.tab.problems.extend(refused.problems)

    def read_section(self, text: str) -> None:
        self.section = self.good_name(text.strip(BLANKS), 1, "bad section",
                                      "[Backups]")

    def good_name(self, name: str, at: int, what: str, hint: str) -> str:
        if not name:
            self.refuse(at, what, "the name is empty", hint)
        if len(name) > LONGEST_NAME:
            self.refuse(at, what, f"a name has at most {LONGEST_NAME} "
                        "characters", hint)
        if has_control(name):
            self.refuse(at, what, "the name has a control character", hint)
        return name

    def assign(self, name: str, value: str, at: int) -> None:
        self.set += 1
        if self.set > MOST_SETTINGS:
            self.refuse(0, "bad variable", f"more than {MOST_SETTINGS:,} "
                        "assignments")
        if name in SETTINGS:
            self.put_setting(name, value, at)
        elif name.startswith("KOI_"):
            meant = nearest(name[:30], SETTINGS)
            self.note(0, "unknown setting", f"koi has no {visible(name)}",
                      f"did you mean {meant}?" if meant else "")
        elif not name.isidentifier() or not name.isascii():
            self.note(0, "odd variable", f"{short(name)} is no name that a "
                      "shell can read")
        elif "\t" not in value and len(value.split()) >= 6 and all(
                part[0] in "*0123456789" for part in value.split()[1:6]):
            self.note(0, "odd variable", f"this sets {name}, and is no job",
                      "a job has its columns first")
        elif "$" in value and name not in EXPANDED:
            self.note(at + self.raw[self.base + at:].index("$"),
                      "odd variable", "cron expands no $ in a value")
        elif " #" in value and value[0] != "#":
            self.note(at + self.raw[self.base + at:].index(" #") + 1,
                      "odd variable", "this # begins no comment: all of the "
                      "line is the value")
        self.environment = {**self.environment, name: value}

    def put_setting(self, name: str, value: str, at: int) -> None:
        field, reader, right = SETTINGS[name]
        setting = reader(value)
        if setting is None:
            if name == "RANDOM_DELAY":      # cronie logs it and goes on
                self.note(at, "bad setting", f"{name} is {right}; ignored")
                return
            self.refuse(at, "bad setting", f"{name} is not {short(value)}",
                        right)
        if name == "CRON_TZ" and value:
            self.tab.zones.setdefault(value, (self.row, self.base + at + 1))
        self.settings = self.settings.but(**{field: setting})

    # --- an entry: [-]["Name"] columns [user] [-n] command

    def entry(self, line: str) -> Job:
        """The job of a line. Raises Refused."""
        at, unlogged, name = 0, False, ""
        if line[0] == "-" and self.root:
            at, unlogged = 1, True
        if line.startswith('"', at):
            name, at = self.read_name(line, at)
        when, schedule, at = self.read_when(line, at)
        user = ""
        if self.system:
            user, at = self.word(line, at)
            if not user or user[0] == "*":
                self.refuse(at, "bad username", "a system tab names the user "
                            "before the command")
        mail_failures = line.startswith(("-n ", "-n\t"), at)
        if mail_failures:
            at = self.skip(line, at + 2)
        command = line[at:]
        self.check_command(command, at)
        script, stdin, params = self.arguments(command, at, when)
        job = Job(self.row, self.section, name, when, schedule, user, command,
                  script, stdin, params, self.environment, self.settings,
                  unlogged, mail_failures)
        self.check_twice(job)
        self.warn(job, at)
        return job

    def skip(self, line: str, at: int) -> int:
        while line[at:at + 1] in (" ", "\t"):
            at += 1
        return at

    def word(self, line: str, at: int) -> tuple[str, int]:
        """The word at `at`, and where the next one begins."""
        end = at
        while end < len(line) and line[end] not in BLANKS:
            end += 1
        return line[at:end], self.skip(line, end)

    def read_name(self, line: str, at: int) -> tuple[str, int]:
        end = line.find('"', at + 1)
        if end < 0 or line[end + 1:end + 2] not in (" ", "\t"):
            self.refuse(at, "bad name", "a name ends with a quote and a blank",
                        '"Say Hi" @manual ~/tweet.sh')
        name = self.good_name(line[at + 1:end], at + 1, "bad name",
                              '"Say Hi" @manual ~/tweet.sh')
        return name, self.skip(line, end + 1)

    def read_when(self, line: str, at: int):
        """As written, the Schedule or None, and where the rest begins."""
        if line.startswith("@", at):
            word, end = self.word(line, at)
            if word in ("@manual", "@reboot"):
                return word, None, end
            if word not in SPECIALS:
                known = ["@manual", "@reboot", *SPECIALS]
                self.refuse(at, "bad time specifier",
                            f"{short(word)} is none",
                            nearest(word[:20].lower(), known)
                            or " ".join(known))
            return word, Schedule.parse(word), end
        return self.read_columns(line, at)

    def read_columns(self, line: str, at: int):
        def pick(text: str) -> int:
            return picked(f"{self.salt}\0{line}\0{text}")

        words, bits, problems = [], [], []
        for column in COLUMNS:
            if at >= len(line):
                problems = problems or [Problem(
                    self.row, self.base + at + 1, f"bad {column.name}",
                    "the line ends too early", "five columns, then the "
                    "command")]
                break
            begin, (word, at) = at, self.word(line, at)
            words.append(word)
            try:
                bits.append(column.bits(word, pick))
            except Misread as bad:
                problems.append(Problem(
                    self.row, self.base + begin + bad.at + 1,
                    f"bad {bad.column}", bad.why, bad.hint))
        if len(problems) in (len(words), 3, 4):
            problems = problems[:1]     # this was not meant to be an entry
        if problems:
            raise Refused(*problems)
        text = " ".join(words)
        return text, Schedule(text, bits, [w[0] == "*" for w in words]), at

    def check_command(self, command: str, at: int) -> None:
        if not command.strip(SPACE):
            self.refuse(at, "bad command", "there is none")
        if command[0] == "*":
            self.refuse(at, "bad command", "it begins with a star",
                        "five columns, not six")
        if len(command) * 4 > LONGEST_COMMAND and len(command.encode(
                "utf-8", "surrogateescape")) > LONGEST_COMMAND:
            self.refuse(at, "bad command", "it is too long: the kernel takes "
                        f"{LONGEST_COMMAND:,} bytes", "put it into a script")

    def check_twice(self, job: Job) -> None:
        before = self.known.setdefault(job.identity(), job.line)
        if before != job.line:
            self.refuse(0, "bad job", f"line {before} is the same job, and "
                        "runs would be mixed up",
                        'a "Name" of its own in front')

    # --- {{arguments}}

    def arguments(self, command: str, at: int, when: str):
        """The script, the input and the parameters of a command."""
        script, stdin, end = split_percent(command)
        if "{{" not in command:
            return script, stdin, ()
        lexer = Lexer(command[:end])
        after = command.find("{{", end)
        while after >= 0 and "}}" in command[after:]:
            close = command.index("}}", after)
            if not is_foreign(command[after + 2:close]):
                lexer.found.append(Found(after, after + 2, "after %"))
                break
            after = command.find("{{", close)
        problems = [Problem(
            self.row, self.base + at + found.start + 1, "bad argument",
            f"it stands {found.place}", PLACES[found.place])
            for found in lexer.found if found.place]
        self.look_at_odd(lexer, at, when)
        if problems:
            raise Refused(*problems)
        params, pieces, done = {}, [], 0
        for found in lexer.found:
            param = self.param(command[found.start + 2:found.end - 2],
                               at + found.start, when, params)
            params.setdefault(param.name, param)
            number = list(params).index(param.name) + 1
            pieces += [split_percent(command[done:found.start])[0],
                       f'"${{KOI_ARG_{number}}}"']
            done = found.end
        shell = self.environment.get("SHELL", "").rpartition("/")[2]
        if params and shell in OTHERS:
            self.refuse(lexer.found[0].start + at, "bad argument",
                        f"{shell} reads a command in its own way",
                        "SHELL=/bin/sh above this line")
        if any(param.type in FREE for param in params.values()):
            self.warn_of_parsers(lexer, at)
        pieces.append(split_percent(command[done:end])[0])
        return "".join(pieces), stdin, tuple(params.values())

    def look_at_odd(self, lexer: Lexer, at: int, when: str) -> None:
        """Braces that make no argument: another program's, or a slip."""
        for where, kind in lexer.odd[:MOST_PARAMS]:
            if kind == "foreign":
                self.note(at + where, "odd argument", "these braces stay as "
                          "they are: no argument is named like that")
            elif when == "@manual":
                self.refuse(at + where, "bad argument",
                            "this {{ has no }}" if kind == "open" else
                            "there are braces in braces",
                            "{{name, type, default}}")
            elif kind == "braces":
                self.note(at + where, "odd argument", "these braces stay as "
                          "they are: there are braces in them")

    def param(self, inner: str, at: int, when: str, known: dict) -> Param:
        """{{name, type, default}}. Raises Refused."""
        def stop(why: str, hint: str = "{{name, type, default}}"):
            self.refuse(at, "bad argument", why, hint)

        parts = [part.strip(BLANKS) for part in inner.replace(
            "\\%", "%").split(",", 2)]
        name, kind = parts[0], parts[1] if len(parts) > 1 else ""
        default = parts[2] if len(parts) > 2 else None
        if not name or len(name) > LONGEST_NAME or has_control(name):
            stop("a name has 1 to 100 characters that can be printed")
        if name in known and len(parts) == 1:
            return known[name]          # once more the same
        choices: tuple = ()
        if kind.startswith("choice(") and kind.endswith(")"):
            choices = tuple(word.strip() for word in kind[7:-1].split("|"))
            if not all(choices) or len(set(choices)) < len(choices):
                stop("each choice is a word of its own", "choice(a|b|c)")
            kind = "choice"
        elif kind not in ("", "string", "int", "bool", "text", "date",
                          "secret"):
            stop(f"{short(kind)} is no type", "string, int, bool, text, date,"
                 " secret or choice(a|b|c)")
        param = Param(name, kind or "string", default, choices)
        if default is not None:
            reason = param.refusal(default)
            if reason:
                stop(f"{short(default)} is no default: {reason}", "")
        elif when != "@manual":
            stop("nobody is asked when the job is due, so it needs a default",
                 f"{{{{{visible(name)}, {kind or 'string'}, default}}}}")
        if name in known and known[name] != param:
            stop(f"there are two arguments {short(name)}",
                 f"{{{{{visible(name)}}}}} stands for the same again")
        if len(known) >= MOST_PARAMS:
            stop(f"there are more than {MOST_PARAMS}", "")
        if kind == "secret" and default:
            self.note(at, "odd argument", "a default that stands here is no "
                      "secret")
        return param

    # --- what is right and looks wrong

    def warn(self, job: Job, at: int) -> None:
        if job.schedule and not job.when.startswith("@"):
            self.warn_of_schedule(job.schedule, self.raw[self.base:])
        if job.command.endswith("\r"):
            self.note(at + len(job.command) - 1, "odd command", "the line "
                      "ends in CR LF, and the shell gets the CR", "dos2unix")
        if not self.system and job.command.split(None, 1)[:1] == ["root"]:
            self.note(at, "odd command", "the command is `root`",
                      "only /etc/crontab and cron.d have a column for users")
        percent = split_percent(job.command)[2]
        if percent < len(job.command) and job.command[
                percent + 1:percent + 2].isalpha() and "date" in job.command:
            self.note(at + percent, "odd command", "the command ends here, "
                      "and the rest is its input", r"write \%")

    def warn_of_parsers(self, lexer: Lexer, at: int) -> None:
        where = at + lexer.found[0].start
        parser = second_parser(lexer.words) or lexer.obeyed()
        if parser:
            self.note(where, "unsafe argument", f"{visible(parser)} reads the "
                      "value again, as code: whoever fills it in can run "
                      "anything")
        leader = led(lexer.words)
        if leader:
            self.note(where, "unsafe argument", f"{leader} runs the value: "
                      "the value is the program, and can be any")
        for found in lexer.found:
            if found.first:
                self.note(at + found.start, "unsafe argument", "the value is "
                          "the program: whoever fills it in can run anything")

    def warn_of_schedule(self, schedule: Schedule, line: str) -> None:
        at = 0
        if line.startswith("-") and self.root:
            at = 1
        if line.startswith('"', at):
            at = self.skip(line, line.index('"', at + 1) + 1)
        first, words = at, schedule.text.split(" ")
        for column, word in zip(COLUMNS, words):
            for why, hint in odd_parts(column, word):
                self.note(at, f"odd {column.name}", why, hint)
            at = self.word(line, at)[1]
        if schedule.words() == "Never":
            self.note(first, "odd schedule", "it never runs")
        elif not schedule.both and "*" not in (words[2], words[4]):
            self.note(first, "odd schedule", "a day needs to satisfy only "
                      f"one of two columns: {schedule.words()}")
        elif words[0] == "*" and schedule.hours.bit_length() > 0 \
                and schedule.hours & (schedule.hours - 1) == 0:
            self.note(first, "odd schedule", "in that hour it runs every "
                      "minute", f"0 {' '.join(words[1:])}")


def odd_parts(column: Column, word: str):
    """What is strange in a column: a range that runs backwards, a step that
    is too long. With the hint."""
    for part in word.split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        low, high = column.low, column.high
        if dash:
            low, high = (column.number(end, 0, part) for end in (first, last))
            if high == 0 < low and column.high == 7:
                high = 7
        if low > high:
            yield f"{short(part)} runs backwards and never comes", \
                f"{first}-{column.high},{column.low}-{last}"
        elif step and int(step[-LONGEST_NUMBER:]) > high - low:
            yield f"{short(part)} is only {low}: the step is longer than " \
                "the range", str(low)


def parse_tab(text: str, system: bool = False, root: bool = False,
              salt: str = "") -> Tab:
    """All jobs of a tab, and all that is wrong with it. Never raises."""
    tab = TabReader(text, system, root, salt).read()
    tab.problems.sort(key=lambda problem: (problem.line, problem.column))
    return tab


# ==========================================================================
# Keys: who may ask for a run?                                     (nothing)
#
# A password becomes three keys, and each goes to whom it is for: one lets a
# browser read and ask, one lets it only read, and the run key never leaves
# the browser or the terminal in which the password was typed. A host holds a
# key of its own, made of the run key and its id. A request is a text and its
# MAC; the MAC is over the text's exact bytes and is judged before they are
# read. The page does the same in JavaScript, and a test compares them.
# ==========================================================================

ROUNDS, MOST_ROUNDS = 600_000, 10_000_000   # OWASP's floor; our own patience
SALT_BYTES = 16
MOST_AHEAD = 60_000         # ms by which a caller's clock may be fast
LONGEST_LIFE = 600_000      # ms that a request may be good for
LONGEST_BODY = 2**19        # bytes of a request: 256 KiB, each letter escaped
DEEPEST_BODY = 4
KEY_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"    # Crockford's: no i l o u
VIEW_PREFIX = "view-"
HEX = frozenset("0123456789abcdef")
RUN_FIELDS = {"v", "do", "key", "dash", "host", "user", "tag", "job", "args",
              "secrets", "nonce", "iat", "exp"}
KILL_FIELDS = {"v", "do", "key", "dash", "host", "user", "run", "epoch",
               "nonce", "iat", "exp"}
KINDS_OF_FIELD = {"v": int, "iat": int, "exp": int, "run": int, "epoch": int,
                  "args": dict, "secrets": dict}    # all others are texts


class Forged(Exception):
    """A request that is not believed, or not carried out: why."""


def is_hex(text, length: int) -> bool:
    return isinstance(text, str) and len(text) == length \
        and HEX.issuperset(text)


def hmac_of(key: bytes, text: bytes) -> bytes:
    import hmac
    return hmac.digest(key, text, "sha256")


def digest_of(text: str | bytes) -> str:
    """SHA-256, in hex."""
    from hashlib import sha256
    return sha256(text.encode("utf-8", "surrogateescape") if isinstance(
        text, str) else text).hexdigest()


class Keys(Record):
    """What a password is worth: 32 bytes each."""
    api: bytes              # reads, and asks for runs
    view: bytes             # reads
    run: bytes              # signs; never leaves the machine it was typed on


def derive(password: str, salt: bytes, rounds: int = ROUNDS) -> Keys:
    """The keys of a password. Raises Error for a salt or a number of rounds
    that would make it easy to guess: who names them is not to be trusted."""
    if len(salt) != SALT_BYTES or not ROUNDS <= rounds <= MOST_ROUNDS:
        raise Error("the dashboard asks for keys that would be weak",
                    "it is not one of ours, or somebody changed it")
    from hashlib import pbkdf2_hmac
    from unicodedata import normalize
    try:
        secret = normalize("NFC", password).encode()
    except UnicodeEncodeError:
        raise Error("the password is not UTF-8") from None
    root = pbkdf2_hmac("sha256", secret, salt, rounds)
    return Keys(*(hmac_of(root, f"koi-{name}-v1".encode())
                  for name in ("api", "view", "run")))


def host_key(run_key: bytes, host: str) -> bytes:
    """What one host holds: with it nothing can be signed for another."""
    return hmac_of(run_key, f"koi-host-v1\n{host}".encode())


def key_id(key: bytes) -> str:
    """By which both sides see that they hold the same host key."""
    return digest_of(b"koi-key-v1\n" + key)[:16]


def weakness(password: str) -> str:
    """Why a password is too easy to guess; "" if it is not. Who has the
    dashboard's database can try some ten thousand a second."""
    if len(password) < 14:
        return "it has fewer than 14 characters"
    if len(set(password.lower())) < 8:
        return "it has fewer than 8 different characters"
    steps = [ord(b) - ord(a) for a, b in zip(password, password[1:])]
    if sum(step in (-1, 0, 1) for step in steps) > len(steps) // 2:
        return "it is a row of neighbours"
    plain = password.lower()
    if any(word in plain for word in ("password", "passwort", "qwerty",
                                      "letmein", "12345")):
        return "it is among the first that are tried"
    return ""


def passphrase_of(numbers: bytes) -> str:
    """A passphrase of 100 bits from 20 random bytes: k7qm-x2dp-..."""
    letters = [KEY_LETTERS[number % 32] for number in numbers[:20]]
    return "-".join("".join(letters[at:at + 4]) for at in range(0, 20, 4))


def run_mac(key: bytes, body: str) -> str:
    return hmac_of(key, b"koi-run-v1\n" + body.encode()).hex()


def list_mac(key: bytes, body: str) -> str:
    """Of the list of jobs that a host shows: so nobody can put the name of
    one job on another."""
    return hmac_of(hmac_of(key, b"koi-list-v1"), body.encode()).hex()


def veiled(key: bytes, nonce: str, name: str, value: bytes) -> bytes:
    """A secret argument, for the host's eyes alone; and the other way
    round. XOR with a stream that no other request has."""
    secret, stream = hmac_of(key, b"koi-secret-v1"), b""
    while len(stream) < len(value):
        stream += hmac_of(secret, f"{nonce}\n{name}\n{len(stream) // 32}"
                          .encode())
    return bytes(a ^ b for a, b in zip(value, stream))


def same_mac(mac: str, wanted: str) -> bool:
    import hmac
    return is_hex(mac, 64) and hmac.compare_digest(mac, wanted)


def opened(key: bytes, body, mac) -> dict:
    """What a signed request says. Raises Forged."""
    if not isinstance(body, str) or not isinstance(mac, str):
        raise Forged("it is no signed request")
    if len(body) > LONGEST_BODY:
        raise Forged(f"it is longer than {LONGEST_BODY:,} bytes")
    try:
        body.encode()
    except UnicodeEncodeError:
        raise Forged("it is not UTF-8") from None
    if not same_mac(mac, run_mac(key, body)):
        raise Forged("its signature is wrong: it was forged or altered, or "
                     "the host has other keys")
    request = strictly_parsed(body)
    kind = request.get("do")
    fields = {"run": RUN_FIELDS, "kill": KILL_FIELDS}.get(
        kind if isinstance(kind, str) else "")
    if request.get("v") != 1 or not fields:
        raise Forged("it is of another version: reload the page, or bring "
                     "koi up to date here")
    if set(request) != fields or any(
            type(request[name]) is not KINDS_OF_FIELD.get(name, str)
            for name in fields) or not is_hex(request["nonce"], 32):
        raise Forged("it has not the fields of a request")
    for values in (request.get("args", {}), request.get("secrets", {})):
        if any(type(value) is not str for value in values.values()):
            raise Forged("an argument is no text")
    return request


def strictly_parsed(body: str) -> dict:
    """JSON in which nothing can be read in two ways. Raises Forged."""
    import json

    def pairs(found: list) -> dict:
        if len(dict(found)) != len(found):
            raise ValueError
        return dict(found)

    def whole(text: str) -> int:
        if len(text) > 18 or text == "-0":
            raise ValueError
        return int(text)

    def refuse(_text: str):
        raise ValueError

    try:
        request = json.loads(body, object_pairs_hook=pairs, parse_int=whole,
                             parse_float=refuse, parse_constant=refuse)
        json.dumps(request, ensure_ascii=False).encode()    # no surrogates
        if not isinstance(request, dict) or depth_of(request) > DEEPEST_BODY:
            raise ValueError
    except (ValueError, RecursionError):
        raise Forged("it is not the JSON of a request") from None
    return request


def depth_of(value) -> int:
    inner = value.values() if isinstance(value, dict) else value \
        if isinstance(value, list) else ()
    return 1 + max(map(depth_of, inner), default=0) if isinstance(
        value, (dict, list)) else 0


def unfit(request: dict, ours: dict, now: float, since: float) -> str:
    """Why a request that is genuine is not for us, or not for now; "" if it
    is. `ours`: key, dash and host; `now` and `since` (when our state began;
    what was used before that, nobody knows) in seconds."""
    for name, what in (("key", "other keys"), ("dash", "another dashboard"),
                       ("host", "another host")):
        if request[name] != ours[name]:
            return f"it is for {what}"
    ms = int(now * 1000)
    if request["iat"] > ms + MOST_AHEAD:
        return f"it comes from the future: the clock of who asks is " \
            f"{(request['iat'] - ms) // 1000} s ahead of the host's"
    if not 0 < request["exp"] - request["iat"] <= LONGEST_LIFE:
        return "it would be good for too long"
    if request["exp"] <= ms:
        return f"it has expired, {(ms - request['exp']) // 1000} s ago by " \
            "the host's clock"
    if request["iat"] < int(since * 1000):
        return "it is older than what this host remembers"
    return ""


def spec_of(job: Job, user: str) -> str:
    """A job as people see it who are to run it. A request carries its
    SHA-256, so it runs what was seen or nothing."""
    import json
    return json.dumps({
        "user": user, "tag": job.tag, "section": job.section,
        "name": job.name, "label": job.label, "when": job.when,
        "words": job.words(), "command": job.command,
        "params": [{"name": param.name, "type": param.type,
                    "default": param.default, "choices": list(param.choices)}
                   for param in job.params],
        "confirm": job.settings.confirm}, ensure_ascii=False).encode(
            "utf-8", "backslashreplace").decode()


# ==========================================================================
# Plan: given the time, what should start?                        (nothing)
#
# The daemon sleeps until something is due and cron looks at the wall each
# minute; both must come to the same. So the minutes of a sleep are played
# as cron would have played them, by a clock that nobody can set, and then
# one look at the wall is judged by the rule of the section Time.
# ==========================================================================


MOST_COUNTED = 10_000   # missed starts of one job that are counted


class Reading(Record):
    """One look at both clocks."""
    wall: float             # seconds since 1970, as the machine has it
    ticks: float            # seconds that only ever grow


class Dial(Record):
    """Where the day of one zone stands, in minutes of its wall."""
    zone: Zone
    virtual: int            # the last minute whose jobs were started
    running: int            # the last minute that was looked at


class Watch(Record):
    """How far the plan was carried out: the last look, and each dial."""
    seen: Reading
    dials: dict             # CRON_TZ -> Dial; "" is the machine's zone
    skipped: list = []      # (job, how many, the first) that a jump cost


class Launch(Record):
    """A job that should start: the minute of the wall that it is for, and
    the instant at which it fell due."""
    job: Job
    wall: int
    due: int


def wall_minute(zone: Zone, instant: float) -> int:
    instant = int(instant // 1)
    return (instant + zone.offset(instant)) // MINUTE * MINUTE


def watching(now: Reading, zones: dict, before: Watch | None = None) -> Watch:
    """The watch over these zones. What was watched before goes on; a zone
    that is new begins with the minute after this one, as cron does."""
    dials = before.dials if before else {}
    minutes = {name: wall_minute(zone, now.wall)
               for name, zone in zones.items()}
    return Watch(before.seen if before else now, {
        name: dials[name] if name in dials else Dial(
            zone, minutes[name], minutes[name])
        for name, zone in zones.items()})


def due_next(job: Job, since: Watch) -> int | None:
    """When a job falls due first after the last look, if nobody sets the
    clock."""
    if not job.schedule:
        return None
    dial, wall = since.dials[job.settings.zone], int(since.seen.wall // 1)
    zone = dial.zone
    if dial.virtual == dial.running >= zone.calm[zone.stretch(wall)]:
        return job.schedule.next(wall, zone)
    return next(job.schedule.starts(wall, zone, dial.virtual), None)


def first_due(jobs: list[Job], since: Watch) -> int | None:
    """When the daemon has to look again, for a start."""
    return min((due for due in (due_next(job, since) for job in jobs)
                if due is not None), default=None)


def passed(dial: Dial, after: int, until: int) -> Dial:
    """The dial after the minutes up to `until`, in which nothing was due."""
    virtual, running = dial.virtual, dial.running
    for first, end, offset in dial.zone.stretches(after):
        last = min(end - 1, until + offset) // MINUTE * MINUTE
        if last >= first:
            virtual, running = played(virtual, first, last), last
        if end > until + offset:
            return dial.but(virtual=virtual, running=running)
    return dial


def plan(jobs: list[Job], since: Watch, now: Reading,
         due: int | None = 0) -> tuple[Watch, list[Launch]]:
    """What fell due after the last look and up to `now`, in order, and the
    watch to go on with. Each start is given once, whenever we look.

    Up to the first start the time passed as it should: the daemon slept.
    From there to now something kept it, and cron would have been kept too.
    `due` is what `first_due` says, if it is known already.
    """
    after = int(since.seen.wall // 1)
    even = since.seen.wall + now.ticks - since.seen.ticks
    if abs(now.wall - even) > 1 and even % MINUTE >= 1:
        # Somebody has just set the clock. Cron sleeps on until the minute
        # ends that it began, and looks at the wall then.
        now = Reading(even, now.ticks)
    unset = int(even // 1)
    if unset // MINUTE == after // MINUTE:
        # Cron would still be asleep. What was skipped has been told.
        return since.but(skipped=[]) if since.skipped else since, []
    due = first_due(jobs, since) if due == 0 else due
    until = unset if due is None else min(unset, due - 1)
    if now.wall // MINUTE != unset // MINUTE:       # somebody set the clock
        until = min(until, unset // MINUTE * MINUTE - 1)
    dials, launches, skipped = {}, [], []
    for name, dial in since.dials.items():
        dial = passed(dial, after, until)
        first = wall_minute(dial.zone, now.wall)
        if first != dial.running:
            mine = [job for job in jobs if job.schedule
                    and job.settings.zone == name]
            launches += look(mine, dial, first, first - dial.zone.offset(
                int(now.wall // 1)))
            skipped += leapt_over(mine, dial, first)
            dial = dial.but(running=first,
                            virtual=played(dial.virtual, first, first))
        dials[name] = dial
    # Of jobs that are due in one minute, cron starts the last line first.
    launches.sort(key=lambda launch: (launch.due, launch.wall,
                                      -launch.job.line))
    return Watch(now, dials, skipped), launches


def leapt_over(jobs: list[Job], dial: Dial, first: int) -> list[tuple]:
    """What nobody will start, as the clock was set by hours: (job, how many
    starts, the instant of the first)."""
    found = []
    for job in jobs if first - dial.virtual > LEAP else ():
        count, wall = 0, 0
        for at in job.schedule.walls(dial.virtual + MINUTE, first):
            count, wall = count + 1, wall or at
            if count == MOST_COUNTED:
                break
        if count:
            found.append((job, count, dial.zone.instant(wall)))
    return found


def look(jobs: list[Job], dial: Dial, first: int, due: int) -> list[Launch]:
    """What to start when the wall shows `first`."""
    launches = []
    for job in jobs:
        low = resume(dial.virtual, first, job.schedule.wildcard)
        if low <= first:
            launches += [Launch(job, wall, due) for wall
                         in job.schedule.walls(low, first + MINUTE)]
    return launches


# ==========================================================================
# Record: what do we remember about a run?                        (nothing)
#
# A run's supervisor writes one file: a header of fixed size, then frames of
# output. The first half of what is kept never changes; of the rest the last
# part stays, in two segments that are overwritten in turn, so that 1 GB of
# output costs 1 MiB. koid moves it into the history and removes the file.
# The header begins with a version, for a supervisor outlives an upgrade.
# ==========================================================================

FRAME = Struct("<BII")      # stream, milliseconds since the start, length
NOTE, STDOUT, STDERR, END = range(4)
MAGIC = b"KOI1"
HEADER = Struct("<4sBBHIIQQddiQQIIIB")
HEADER_ROOM = 256
KEPT_HEAD = 512 * 1024
KEPT_SEGMENT = 256 * 1024
SEGMENTS = (HEADER_ROOM, HEADER_ROOM + KEPT_HEAD,
            HEADER_ROOM + KEPT_HEAD + KEPT_SEGMENT)     # where each begins
CLAIMED, GOING, ENDED, UNSTARTABLE = range(4)           # phases
REASONS = ("", "timeout")
NO_STATUS, NO_FILE = -1, -2     # instead of a wait status
NO_FILE_REASON = "its output cannot be kept"
MASK = b"******"


class Header:
    """The beginning of a run's file, as the supervisor keeps it current."""

    FIELDS = ("phase", "reason", "errno", "supervisor", "job", "born",
              "supervisor_born", "started", "ended", "status", "total",
              "lost", "head", "first", "second", "turn")

    def __init__(self, *values):
        for name, value in zip(self.FIELDS, values or (0,) * 16):
            setattr(self, name, value)

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, *(getattr(self, name)
                                    for name in self.FIELDS))

    def lengths(self) -> tuple[int, int, int]:
        return self.head, self.first, self.second


def header_of(data: bytes) -> Header | None:
    """The header of a run's file; None if it has none, or another's."""
    if len(data) < HEADER.size or data[:4] != MAGIC:
        return None
    return Header(*HEADER.unpack_from(data)[1:])


def frame(stream: int, milliseconds: int, data: bytes) -> bytes:
    return FRAME.pack(stream, min(milliseconds, 2**32 - 1), len(data)) + data


def read_frames(data: bytes) -> list[tuple[int, int, bytes]]:
    """(stream, milliseconds since the start, bytes) of each frame."""
    found, at = [], 0
    while at + FRAME.size <= len(data):
        stream, milliseconds, length = FRAME.unpack_from(data, at)
        at += FRAME.size
        found.append((stream, milliseconds, data[at:at + length]))
        at += length
    return found


def kept_output(data: bytes, header: Header) -> bytes:
    """The frames in a run's file, in order, with a note where some were
    left out."""
    head, older, newer = (data[begin:begin + length] for begin, length
                          in zip(SEGMENTS, header.lengths()))
    if header.turn == 1:        # the first segment is being overwritten
        older, newer = newer, older
    if header.lost:
        head += frame(NOTE, 0, f"{plural(header.lost, 'byte')} left out here"
                      .encode())
    return head + older + newer


def output_text(frames: bytes) -> bytes:
    """What a job wrote, both streams, as cron would mail it."""
    return b"".join(data if stream != NOTE else b"[koi: " + data + b"]\n"
                    for stream, _, data in read_frames(frames)
                    if stream != END)


class Mask:
    """Puts ****** in the place of secrets, though they come in pieces."""

    def __init__(self, hidden: list[bytes]):
        import re
        self.hidden = sorted(set(hidden) - {b""}, key=len, reverse=True)
        self.pattern = b"|".join(map(re.escape, self.hidden))
        self.held = {STDOUT: b"", STDERR: b""}

    def feed(self, stream: int, data: bytes, last: bool = False) -> bytes:
        """What may be shown now; the rest is held back for the next call,
        as it may be the beginning of a secret."""
        data = self.held[stream] + data
        cut = len(data) if last else self.settled(data)
        self.held[stream], data = data[cut:], data[:cut]
        import re
        return re.sub(self.pattern, MASK, data) if self.pattern else data

    def settled(self, data: bytes) -> int:
        """Up to where no secret can begin that ends in what comes next."""
        cut = len(data) - max((size for secret in self.hidden
                               for size in range(1, len(secret))
                               if data.endswith(secret[:size])), default=0)
        before = -1
        while cut != before:        # nor may a whole one be cut through
            before = cut
            for secret in self.hidden:
                at = data.find(secret, max(0, cut - len(secret) + 1))
                if 0 <= at < cut < at + len(secret):
                    cut = at
        return cut


def exit_and_signal(status: int) -> tuple[int | None, int | None]:
    """The exit status or the signal of a wait status."""
    if status < 0:
        return None, None
    number = status & 0x7F
    return (None, number) if number else (status >> 8 & 0xFF, None)


def failed(run: dict) -> bool:
    """Did a run end badly?"""
    return run["state"] in ("interrupted", "unstartable", "missed") or (
        run["state"] == "done" and run["exit"] != 0)


# ==========================================================================
# Supervisor: who stays with a job?                     (processes, files)
#
# koid may be killed, upgraded or restarted at any time, and its jobs do not
# notice: each has a supervisor that owns its pipes, keeps its output and its
# end in a file, and needs koid for nothing. That file is made with O_EXCL
# before the job is started, so no run is ever started twice. A supervisor
# is a fork of koid, without exec, as another Python would cost far more; in
# a minute with very many jobs, up to 16 of one user share one.
# ==========================================================================

MOST_IN_ONE = 16
LINGER = 1.0            # seconds for output that comes after a job's end
KILL_AFTER = 10.0       # seconds from TERM to KILL
TRY_FOR = 60.0          # seconds in which a full process table may empty
CHUNK = 65_536
NO_HOME = "/nonexistent"    # what Debian gives users who shall have none
PIPE_ROOM = 4096        # bytes that fit into a pipe of the smallest kind
FAR_BEHIND = 2**18      # bytes a terminal may lag before its job must wait
LONGEST_SLEEP = 86_400.0    # seconds: poll() takes 24 days at most
REPORT = Struct("<Qi")  # run, wait status: what koid is told, in one write
PASSED_ON = (1, 2, 3, 9, 15)    # signals that `koitab run` may send
RESET = [number for number in range(1, signal.NSIG) if number not in (
    signal.SIGKILL, signal.SIGSTOP) and not 32 <= number <= 33]


class Account(Record):
    """Whom a job runs as: what the user database says."""
    name: str
    uid: int
    gid: int
    home: str
    groups: list


class Order(Record):
    """All that a supervisor needs to know about one run."""
    run: int
    script: str
    stdin: bytes
    environment: dict
    timeout: float = 0.0
    secrets: list = []
    connection: object = None   # a socket: `koitab run` listens there


def become(account: Account) -> None:
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


class Watched:
    """One run, while its supervisor stays with it."""

    def __init__(self, order: Order, file: int | None):
        self.order, self.file = order, file
        self.header = Header()
        self.payload = [0, 0, 0]    # bytes of output in each segment
        self.mask = Mask(order.secrets) if order.secrets else None
        self.pid, self.handle = 0, -1       # handle: a pidfd
        self.streams: dict[int, int] = {}   # descriptor -> stream
        self.connection = order.connection
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

    def hear(self, stream: int, data: bytes) -> None:
        """The job wrote something; b"" is its end."""
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
            used = header.lengths()[header.turn]
            room = (KEPT_SEGMENT if header.turn else KEPT_HEAD) \
                - used - FRAME.size
            if room <= 0:
                self.turn_over()
                continue
            part, data = data[:room], data[room:]
            try:
                os.pwrite(self.file, frame(stream, since, part),
                          SEGMENTS[header.turn] + used)
            except OSError:
                header.lost += len(part)    # no space: the end still counts
                continue
            self.payload[header.turn] += len(part)
            self.set_length(used + FRAME.size + len(part))
        self.save()

    def set_length(self, length: int) -> None:
        setattr(self.header, ("head", "first", "second")[self.header.turn],
                length)

    def turn_over(self) -> None:
        """Go on in the other segment; what was in it is lost."""
        header = self.header
        header.turn = 2 if header.turn == 1 else 1
        header.lost += self.payload[header.turn]
        self.payload[header.turn] = 0
        self.set_length(0)
        self.save()             # before what it describes is overwritten

    # --- its process

    def begin(self, nothing: int) -> None:
        """Start the job. Raises OSError."""
        order = self.order
        home = order.environment["HOME"]
        try:
            os.chdir(home)
        except OSError as error:
            os.chdir("/")
            if home != NO_HOME:
                self.put(NOTE, visible(f"{home}: {error.strerror}; it runs "
                                       "in /").encode())
        shell = order.environment["SHELL"]
        given = input_file(order.stdin) if order.stdin else nothing
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        try:
            self.pid = os.posix_spawn(
                octets(shell), [octets(shell), b"-c", octets(order.script)],
                {octets(name): octets(value) for name, value
                 in order.environment.items()},
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
        header = self.header
        self.began, header.started = time.monotonic(), time.time()
        self.deadline = self.began + self.order.timeout \
            if self.order.timeout else FOREVER
        header.phase, header.job = GOING, self.pid
        header.born = born(self.pid)
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

    def press(self, now: float) -> None:
        """End a job whose time is up: TERM, and KILL ten seconds later."""
        if now >= self.kill_at:
            self.kill_at = FOREVER
            self.signal(signal.SIGKILL)
        elif now >= self.deadline:
            self.header.reason = REASONS.index("timeout")
            self.deadline, self.kill_at = FOREVER, now + KILL_AFTER
            self.signal(signal.SIGTERM)


def octets(text: str) -> bytes:
    """A tab's text as its bytes, whatever locale koid was started in."""
    return text.encode("utf-8", "surrogateescape")


AGAIN = (errno.EAGAIN, errno.ENOMEM)


def end_group(pid: int, number: int) -> None:
    """Signal what is left of a job's group whose leader has ended. While it
    has a member no other process gets the leader's number."""
    if not born(pid):
        try:
            os.killpg(pid, number)
        except OSError:
            pass


def remove(path: str, dir_fd: int | None = None) -> None:
    """Remove a file, if it is there and can be."""
    try:
        os.unlink(path, dir_fd=dir_fd)
    except OSError:
        pass


def born(pid: int) -> int:
    """When a process started, in ticks since the boot, from /proc; with the
    pid that names it for good. 0 if there is no such process."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, 4096)
        finally:
            os.close(fd)
        return int(data.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def input_file(data: bytes) -> int:
    """A descriptor from which a job reads this."""
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
    """Stays with a few jobs of one user until all of them have ended."""

    def __init__(self, daemon: int, account: Account, orders: list[Order],
                 runs: int, report: int, nothing: int):
        self.account, self.orders = account, orders
        self.runs, self.report, self.nothing = runs, report, nothing
        self.poll = select.poll()
        self.heard: dict[int, tuple] = {}   # descriptor -> Watched, function
        self.untold: list[bytes] = []       # what koid does not know yet
        self.daemon = daemon                # koid's pid
        self.watched: list[Watched] = []

    def live(self) -> None:
        """From the fork to the end."""
        self.be_alone()
        me = os.getpid()
        mine = born(me)
        for order in self.orders:
            run = Watched(order, self.claim(order.run))
            if self.unclaimable:
                self.untold.append(REPORT.pack(order.run, NO_FILE))
                self.tell()
            if run.file is not None or self.unclaimable:
                run.header.supervisor, run.header.supervisor_born = me, mine
                run.save()
                self.watched.append(run)
                self.connect(run)
        self.drop()
        for run in self.watched:
            self.begin(run)
        os.chdir("/")
        self.forget_finished()      # some could not be started
        while self.heard or self.watched or self.untold:
            self.turn()

    def be_alone(self) -> None:
        """Leave koid's session, signals and descriptors behind."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                       signal.SIGQUIT, signal.SIGPIPE, signal.SIGIO,
                       signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)   # it ends with its jobs
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        os.chdir("/")
        keep = {0, 1, 2, self.runs, self.report, self.nothing}
        keep |= {order.connection.fileno() for order in self.orders
                 if order.connection}
        close_all_but(keep)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def claim(self, run: int) -> int | None:
        """Make the run's file; None if it is taken, or cannot be made."""
        self.unclaimable = False
        try:
            file = os.open(str(run), os.O_RDWR | os.O_CREAT | os.O_EXCL
                           | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                           dir_fd=self.runs)
        except FileExistsError:
            return None
        except OSError:             # a full disk: it runs all the same
            self.unclaimable = os.getppid() == self.daemon
            return None
        if os.getppid() == self.daemon:
            return file
        # koid was killed before we came to this. The next one may have
        # started the run, and taken it in, and removed its file.
        remove(str(run), self.runs)
        os.close(file)
        return None

    def drop(self) -> None:
        """Become the user; if that fails, none of the jobs is run."""
        os.close(self.runs)
        try:
            become(self.account)
        except (OSError, ValueError) as error:
            for run in self.watched:
                self.refuse(run, error)
            self.watched = []

    def begin(self, run: Watched) -> None:
        try:
            run.begin(self.nothing)
        except (OSError, ValueError) as error:
            now = time.monotonic()
            if getattr(error, "errno", 0) in AGAIN and now < run.give_up:
                run.again = now + 1
            else:
                self.refuse(run, error)
            return
        run.note_start()
        for fd in run.streams:
            os.set_blocking(fd, False)
            self.hear(fd, run, self.read)
        try:
            run.handle = os.pidfd_open(run.pid)
            self.hear(run.handle, run, self.reap)
        except (AttributeError, OSError):
            run.handle = -1         # macOS, or an old kernel: we look

    def refuse(self, run: Watched, error: Exception) -> None:
        """It could not be started."""
        run.header.phase = UNSTARTABLE
        run.header.errno = getattr(error, "errno", None) or errno.EPERM
        run.put(NOTE, visible(f"could not start: {error.strerror or error}"
                              if isinstance(error, OSError) else
                              f"could not start: {error}").encode())
        run.header.ended = time.time()
        self.finish(run)

    # --- what is heard

    def connect(self, run: Watched) -> None:
        if run.connection:
            run.connection.setblocking(False)
            self.hear(run.connection.fileno(), run, self.converse)

    def hear(self, fd: int, run: Watched, function) -> None:
        self.heard[fd] = (run, function)
        self.poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        del self.heard[fd]
        self.poll.unregister(fd)
        os.close(fd)

    def turn(self) -> None:
        for fd, events in self.poll.poll(self.patience()):
            if fd in self.heard:
                run, function = self.heard[fd]
                function(run, fd, events)
        now = time.monotonic()
        for run in self.watched:
            if run.handle < 0 < run.pid and run.status is None:
                self.reap(run)
            if now >= run.again:
                run.again = FOREVER
                self.begin(run)
            run.press(now)
            if run.status is not None and not run.finished and (
                    not run.streams or now >= run.linger):
                self.finish(run)
        self.forget_finished()

    def forget_finished(self) -> None:
        self.watched = [run for run in self.watched if not run.finished
                        or run.backlog or run.kill_at != FOREVER]
        self.tell()

    def patience(self) -> float | None:
        """Milliseconds until something is to be done without being heard."""
        now = time.monotonic()
        soon = min((run.kill_at if run.finished else min(
            run.deadline, run.kill_at, run.linger, run.again)
            for run in self.watched), default=FOREVER)
        if self.untold:
            soon = min(soon, now + 1)
        if any(run.handle < 0 < run.pid and run.status is None
               for run in self.watched):
            soon = min(soon, now + 0.2)
        return None if soon == FOREVER else \
            min(max(soon - now, 0), LONGEST_SLEEP) * 1000 + 1

    def read(self, run: Watched, fd: int, _events: int) -> None:
        """Some output, or the end of it."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not run.finished:
            run.hear(run.streams[fd], data)
            self.serve(run)
        if not data:
            del run.streams[fd]
            self.forget(fd)

    def reap(self, run: Watched, fd: int = -1, _events: int = 0) -> None:
        """The job has ended: how?"""
        try:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = run.pid, 0xFF00
        if pid:
            run.status, run.header.ended = status, time.time()
            run.linger = time.monotonic() + LINGER
            run.deadline = FOREVER      # a KILL that is due stays due
            if fd >= 0:
                self.forget(fd)

    def finish(self, run: Watched) -> None:
        """Write down how it ended, and tell koid. What a process that it
        left behind still writes is read and dropped, so that it lives."""
        for stream in run.streams.values():
            run.hear(stream, b"")
        if run.streams:
            run.put(NOTE, b"a process that it left behind keeps its output "
                          b"open; what that writes from here on is not kept")
        run.finished = True
        if run.header.phase == GOING:
            run.header.phase, run.header.status = ENDED, run.status
        run.save()
        if run.file is not None and os.getppid() != self.daemon:
            try:
                os.fsync(run.file)  # koid, when it is there, does so itself
            except OSError:
                pass
        status = run.status if run.status is not None else NO_STATUS
        self.untold.append(REPORT.pack(run.order.run, status))
        if run.connection:
            import json
            exit_status, number = exit_and_signal(status)
            run.backlog += frame(END, 0, json.dumps({
                "exit": exit_status, "signal": number,
                "reason": REASONS[run.header.reason]}).encode())
            self.serve(run)

    def tell(self) -> None:
        """Report to koid, if it still is the one that we know."""
        while self.untold:
            try:
                os.write(self.report, self.untold[0])
            except BlockingIOError:
                return          # it is busy: again in a second
            except OSError:
                pass            # it is gone; the next one reads the file
            del self.untold[0]

    # --- `koitab run`, which waits for the output

    def converse(self, run: Watched, fd: int, events: int) -> None:
        """A signal for the job came in, or there is room to go on."""
        if events & select.POLLIN:
            try:
                data = run.connection.recv(64)
            except BlockingIOError:
                data = b"\0"
            except OSError:
                data = b""
            if not data:
                return self.hang_up(run)
            for number in data:
                if number in PASSED_ON:
                    run.signal(number)
        elif events & ~select.POLLOUT:
            return self.hang_up(run)
        self.serve(run)

    def serve(self, run: Watched) -> None:
        """Send what fits; a job whose reader lags far behind has to wait,
        as it would at a terminal."""
        if not run.connection:
            return
        try:
            while run.backlog:
                sent = run.connection.send(run.backlog[:CHUNK])
                del run.backlog[:sent]
        except BlockingIOError:
            pass
        except OSError:
            return self.hang_up(run)
        if run.finished and not run.backlog:
            return self.hang_up(run)
        self.poll.modify(run.connection.fileno(), select.POLLIN
                         | (select.POLLOUT if run.backlog else 0))
        for fd in run.streams:
            self.poll.modify(fd, 0 if len(run.backlog) > FAR_BEHIND
                             and not run.finished else select.POLLIN)

    def hang_up(self, run: Watched) -> None:
        connection, run.connection = run.connection, None
        run.backlog.clear()
        if connection.fileno() in self.heard:
            fd = connection.detach()
            self.forget(fd)
        else:
            connection.close()
        for fd in run.streams:
            self.poll.modify(fd, select.POLLIN)


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
            pass            # that was the folder itself


def supervise(*arguments) -> int:
    """Fork a supervisor; its pid. Raises OSError."""
    daemon = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        Supervisor(daemon, *arguments).live()
        os._exit(0)
    except BaseException as bug:
        import syslog
        syslog.syslog(syslog.LOG_CRON | syslog.LOG_ERR,
                      f"koid: a supervisor failed: {bug!r}")
    finally:
        os._exit(EXIT_BUG)      # it may never return into koid's code


# ==========================================================================
# Machine: what may koi do to this host?                 (files, processes)
#
# One short method for each thing. Nothing here decides: what a text or a
# zone file means is above, what to do about it below.
# ==========================================================================

LONGEST_TAB = 2**20
LONGEST_ZONE_FILE = 2**16
ZONE_FOLDERS = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo",
                "/usr/share/lib/zoneinfo", "/etc/zoneinfo")
LOCAL_ZONE = "/etc/localtime"
ROOT_HOME, ROOT_SOCKET = "/var/lib/koi", "/run/koi/koid.sock"
SYSTEM_TAB, SYSTEM_FOLDER = "/etc/crontab", "/etc/cron.d"
SPOOLS = ("/var/spool/cron/crontabs", "/var/spool/cron")
CRON_PID = "/run/crond.pid"
REBOOT_MARKS = ("/run/crond.reboot", "/run/cron.reboot")
ALLOW, DENY = "/etc/koi.allow", "/etc/koi.deny"
SENDMAILS = ("/usr/sbin/sendmail", "/usr/lib/sendmail")
USUAL_PATH = "/usr/bin:/bin"    # Debian's; cronie adds the sbin folders
USUAL_SHELL = "/bin/sh"
HOST_SETTINGS = ("/etc/environment", "/etc/default/locale")
NAME_OF_PACKAGE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrst"
                            "uvwxyz0123456789_-")


class TabFile(Record):
    """A crontab on this host, and what stands in it."""
    path: str
    user: str               # "": each line names its user
    stamp: tuple            # changes when the file does
    text: str | None        # None: it may not be used
    trouble: str = ""       # why

    @property
    def system(self) -> bool:
        return not self.user


EXACTLY_0600 = 0o177    # a mask that means more: as Debian's cron has it


def file_fault(status, owners: tuple, mask: int, links: bool) -> str:
    """Why root should not believe a file; "" if it may."""
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


def unusable_text(text: str) -> str:
    """Why this cannot be a crontab at all; "" if it can."""
    try:
        size = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if size > LONGEST_TAB:
        return f"it is larger than {LONGEST_TAB:,} bytes"
    return "there is a NUL in it" if "\0" in text else ""


class Machine:
    """Everything koi does to this host."""

    def __init__(self, clock: Clock | None = None):
        self.clock = clock or Clock()

    # --- texts and zones

    def tab_text(self, path: str) -> str:
        """A tab's text; "-" is standard input. Bytes that are not UTF-8
        come as halves of surrogate pairs. Raises Error."""
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
        """The zone of a name from the tab, or of a rule as in
        CET-1CEST,M3.5.0,M10.5.0/3. Raises Error."""
        parts = name.split("/")
        if name and not {"", ".", ".."}.intersection(parts) \
                and "\0" not in name:
            for folder in ZONE_FOLDERS:
                zone = self.zone_file(posixpath.join(folder, name), name)
                if zone:
                    return zone
        zone = zone_of_rule(name) if name.isascii() else None
        if not zone:
            raise Error(f"there is no time zone {short(name)}",
                        "Europe/Berlin; ls /usr/share/zoneinfo"
                        if os.path.isdir(ZONE_FOLDERS[0])
                        else "apt-get install tzdata")
        return zone

    def zone_file(self, path: str, name: str) -> Zone | None:
        """The zone in a file, or None if there is none."""
        try:
            with open(path, "rb") as file:
                return zone_of_data(name, file.read(LONGEST_ZONE_FILE))
        except (OSError, ValueError):
            return None

    def local_zone(self) -> Zone:
        """The caller's zone: TZ as the C library takes it, else the
        machine's. Raises Error."""
        name = os.environ.get("TZ")
        if name is None:
            return self.zone_file(LOCAL_ZONE, "local time") or UTC
        name = name.removeprefix(":")
        if name.startswith("/"):
            return self.zone_file(name, name) or self.zone("")
        return self.zone(name) if name else UTC

    def host(self) -> str:
        """The name of this machine, without its domain."""
        return os.uname().nodename.partition(".")[0]

    def salt(self, user: str = "") -> str:
        """What ~ in a user's tab is picked by: always the same here, and
        another elsewhere."""
        return f"{self.host()}:{user or self.name_of(os.geteuid())}"

    def open_files(self) -> int:
        """How many files we may have open."""
        import resource
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def stamp_of(self, path: str) -> tuple:
        """Another value when the file at a path has changed."""
        try:
            status = os.stat(path)
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size

    # --- people

    def user(self) -> str:
        """The login name of the caller. Raises Error."""
        uid = os.getuid()
        name = self.name_of(uid)
        if not name:
            raise Error(f"uid {uid} has no name on this host")
        return name

    def name_of(self, uid: int) -> str:
        import pwd
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return ""

    def account(self, name: str) -> Account | None:
        """Whom a job runs as. None: there is no such user. A uid of -1
        would mean "no change" to the kernel."""
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

    def refusal(self, user: str) -> str:
        """Why koi.allow or koi.deny shut this user out; "" if they do not.
        A file that cannot be read lets nobody in."""
        if user == "root":
            return ""
        for path, wanted in ((ALLOW, True), (DENY, False)):
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
        """What logins get from the host, as cron's PAM module reads it."""
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
        return found

    # --- koi's own folder

    def home_of_state(self) -> str:
        """Where the caller's koi keeps its state."""
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
        if home == ROOT_HOME:
            return ROOT_SOCKET
        return posixpath.join(home, "koid.sock")

    def make_home(self, home: str) -> None:
        """Make the folder, or see that it is ours alone. Raises Error."""
        try:
            os.makedirs(posixpath.dirname(home), 0o755, exist_ok=True)
            for folder in (home, f"{home}/tabs", f"{home}/runs"):
                try:
                    os.mkdir(folder, 0o700)
                except FileExistsError:
                    pass
                status = os.lstat(folder)
                if not stat.S_ISDIR(status.st_mode):
                    raise Error(f"{folder} is no folder")
                if status.st_uid != os.geteuid():
                    raise Error(f"{folder} belongs to another user")
                if status.st_mode & 0o077:
                    raise Error(f"{folder} is open to others",
                                f"chmod 700 {folder}")
        except OSError as error:
            raise Error(f"{error.filename or home}: {error.strerror}"
                        ) from None

    def write_tab(self, home: str, user: str, text: str) -> None:
        """Install a tab, whole or not at all. Raises Error."""
        self.make_home(home)
        try:
            write_atomically(f"{home}/tabs/{user}",
                             text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise Error(f"the tab of {user} cannot be written: "
                        f"{error.strerror}") from None

    def remove_tab(self, home: str, user: str) -> bool:
        """Remove a tab; False if there is none. Raises Error."""
        try:
            os.unlink(f"{home}/tabs/{user}")
            sync_folder(f"{home}/tabs")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Error(f"the tab of {user} cannot be removed: "
                        f"{error.strerror}") from None
        return True

    def own_tab(self, home: str, user: str) -> TabFile | None:
        """A user's koitab, if there is one."""
        path = f"{home}/tabs/{user}"
        return self.tab_file(path, user, (os.geteuid(),), 0o022, None)

    def tab_files(self, home: str, system: bool, known: dict) -> list:
        """Every tab that koid serves. What has not changed since it was
        read (`known`: path -> TabFile) is not read again."""
        found = []

        def take(path: str, user: str, owners: tuple, mask: int, **how):
            file = self.tab_file(path, user, owners, mask,
                                 known.get(path), **how)
            if file:
                found.append(file)

        for name in names_in(f"{home}/tabs"):
            take(f"{home}/tabs/{name}", name, (os.geteuid(),), 0o022)
        if system:
            take(SYSTEM_TAB, "", (0,), 0o022, links=False, follow=True)
            for name in names_in(SYSTEM_FOLDER):
                if NAME_OF_PACKAGE.issuperset(name):
                    take(f"{SYSTEM_FOLDER}/{name}", "", (0,), 0o022,
                         links=False, follow=True)
            spool = self.spool()
            for name in names_in(spool):
                account = self.account(name)
                take(f"{spool}/{name}", name,
                     (0, account.uid) if account else (0,), EXACTLY_0600)
        return found

    def spool(self) -> str:
        """Where the users' crontabs of the host's cron lie."""
        return next((spool for spool in SPOOLS if os.path.isdir(spool)),
                    SPOOLS[0])

    def tab_file(self, path: str, user: str, owners: tuple, mask: int,
                 known: TabFile | None, links: bool = True,
                 follow: bool = False) -> TabFile | None:
        """Read one tab, if it may be believed. None: there is none."""
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
            stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size,
                     status.st_ino, status.st_dev, owners)
            if known and known.stamp == stamp and not known.trouble:
                return known
            fault = file_fault(status, owners, mask, links)
            if fault:
                return TabFile(path, user, stamp, None, fault)
            with open(fd, "rb", closefd=False) as file:
                data = file.read(LONGEST_TAB + 1)
        except OSError as error:
            return TabFile(path, user, (), None, error.strerror)
        finally:
            os.close(fd)
        text = data.decode("utf-8", "surrogateescape")
        why = unusable_text(text)
        return TabFile(path, user, stamp, None if why else text, why)

    # --- the boot

    def boot_id(self) -> str:
        """Another text after each boot; "" if the system has none."""
        try:
            with open("/proc/sys/kernel/random/boot_id",
                      encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            return ""

    def mark_reboot(self) -> bool:
        """Did cron, or we, run the @reboot jobs since the boot? Then leave
        cron's mark, so that neither runs them again."""
        if any(os.path.lexists(mark) for mark in REBOOT_MARKS):
            return True
        try:
            os.close(os.open(REBOOT_MARKS[0], os.O_CREAT | os.O_CLOEXEC, 0))
        except OSError:
            pass
        return False

    def hold_cron_pid(self) -> int:
        """Lock cron's pid file, as cron does: the descriptor, to be kept.
        Raises Error if cron runs."""
        fd = only_one(CRON_PID)
        if fd is None:
            with open(CRON_PID, encoding="ascii", errors="replace") as file:
                pid = file.read(20).strip()
            raise Error(f"cron runs (pid {pid}), and would start its jobs "
                        "beside koid", "systemctl disable --now cron")
        os.fchmod(fd, 0o644)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        return fd

    # --- to be woken

    def notice(self, folder: str) -> int | None:
        """Be sent SIGIO when something changes in a folder (dnotify). The
        descriptor to keep; None if the system cannot."""
        if not hasattr(fcntl, "F_NOTIFY"):
            return None
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        """A descriptor that becomes readable when somebody sets the clock,
        or the machine wakes; None if the system has no such thing."""
        if sys.platform != "linux" or sys.maxsize < 2**32:
            return None
        try:
            import ctypes
            libc = ctypes.CDLL(None)
            fd = libc.timerfd_create(0, os.O_CLOEXEC | os.O_NONBLOCK)
            if fd < 0:
                return None
            return fd if self.wind(fd) else None
        except (ImportError, OSError, AttributeError):
            return None

    def wind(self, fd: int) -> bool:
        """Set the alarm: TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, to an
        hour that never comes."""
        import ctypes
        spec = (ctypes.c_longlong * 4)(0, 0, 2**40, 0)
        return ctypes.CDLL(None).timerfd_settime(fd, 3, spec, None) == 0

    def signal_job(self, header: Header, number: int) -> bool:
        """Signal a job's group, if it still is the process it was."""
        if header.phase != GOING or not header.job \
                or born(header.job) != header.born:
            return False
        try:
            os.killpg(header.job, number)
        except OSError:
            return False
        return True

    def log(self, text: str, name: str = "koid", bad: bool = False) -> None:
        """A line for the system's log, as cron writes them."""
        import syslog
        syslog.openlog(name, syslog.LOG_PID, syslog.LOG_CRON)
        syslog.syslog(syslog.LOG_ERR if bad else syslog.LOG_INFO,
                      visible(text))


def names_in(folder: str) -> list[str]:
    """The names of tabs in a folder, without leftovers of editors."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name[0] not in ".#"
                  and not name.startswith("tmp.") and name[-1] != "~"
                  and not name.endswith(".new"))


# ==========================================================================
# Store: where are runs kept?                                       (files)
#
# One SQLite database, written by koid alone. What was acknowledged is on the
# disk (WAL and synchronous=FULL: a power cut takes nothing back). When it
# cannot be written the jobs go on: what was to be written waits in memory.
# ==========================================================================

SCHEMA = 1
APPLICATION = 0x6B6F6931        # "koi1", so that no other file passes
MOST_WAITING = 50_000           # statements that wait for a full disk
TABLES = """
create table meta (name text primary key, value text not null) without rowid;
create table jobs (
    id integer primary key, user text not null, identity text not null,
    section text not null, name text not null, label text not null,
    unique (user, identity));
create table runs (
    id integer primary key, job integer not null references jobs,
    trigger text not null, state text not null, due real, asked real,
    started real, ended real, exit integer, signal integer,
    reason text not null default '', args text not null default '{}',
    attempt integer not null default 1, count integer not null default 1,
    bytes integer not null default 0, cut integer not null default 0,
    mail text not null default '');
create index runs_of_job on runs (job, id);
create index runs_unfinished on runs (state)
    where state in ('queued', 'running');
create table output (run integer primary key, frames blob not null);
"""
COLUMNS_OF_RUN = ("id", "job", "trigger", "state", "due", "asked", "started",
                  "ended", "exit", "signal", "reason", "args", "attempt",
                  "count", "bytes", "cut", "mail")
SHOWN_COLUMNS = ", ".join(f"r.{name}" for name in COLUMNS_OF_RUN) \
    + ", j.user, j.identity, j.section, j.name, j.label"


class Store:
    """The history of runs."""

    def __init__(self, path: str, writing: bool = True):
        self.path, self.writing = path, writing
        self.trouble = ""               # why nothing can be written
        self.broken = False             # the disk failed: start anew
        self.waiting: list[tuple] = []  # (statement, values) not written yet
        self.keys: dict[tuple, int] = {}    # (user, identity) -> id in jobs
        self.last = self.last_job = 0
        self.db = None

    def open(self) -> str:
        """Open it or make it. What is damaged is moved aside, and the
        answer says so. Raises Error."""
        import sqlite3
        moved = ""
        if not self.writing and not os.path.exists(self.path):
            self.db = sqlite3.connect(":memory:", isolation_level=None)
            self.db.executescript(TABLES)
            return ""
        try:
            self.connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and not any(
                    word in str(error) for word in ("malformed", "no such")
                    ) or not self.writing:
                raise Error(f"{self.path}: {error}") from None
            moved = self.move_aside(str(error))
            self.connect()
        self.last = self.one("select max(id) from runs") or 0
        self.last_job = self.one("select max(id) from jobs") or 0
        self.keys = {(user, identity): key for key, user, identity in
                     self.db.execute("select id, user, identity from jobs")}
        return moved

    def connect(self) -> None:
        import sqlite3
        empty = not os.path.exists(self.path)
        if empty:
            self.make()
        self.db = db = sqlite3.connect(self.path, isolation_level=None,
                                       timeout=5)
        version = self.one("pragma user_version")
        if self.one("pragma application_id") != APPLICATION:
            # A file of length 0 passes every check of SQLite's.
            raise sqlite3.DatabaseError("it is no history of koi's")
        if version > SCHEMA:
            raise Error(f"{self.path} was written by a newer koi (schema "
                        f"{version})", "install that version again")
        for line in ("journal_mode=wal", "synchronous=full",
                     "cache_size=-256", "wal_autocheckpoint=256"):
            db.execute(f"pragma {line}").fetchall()
        for table in ("meta", "jobs", "runs") if self.writing else ():
            sound = self.one(f"pragma quick_check('{table}')")
            if sound != "ok":   # all output would take minutes to read
                raise sqlite3.DatabaseError(sound)

    def make(self) -> None:
        """A new history, whole or not at all: a file of length 0 would pass
        for a damaged one."""
        import sqlite3
        fresh = self.path + ".new"
        for ending in ("", "-journal"):
            remove(fresh + ending)
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                         | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(fresh, isolation_level=None)
        db.executescript(f"pragma synchronous=full; begin; {TABLES} pragma "
                         f"application_id={APPLICATION}; pragma "
                         f"user_version={SCHEMA}; commit")
        db.close()
        os.rename(fresh, self.path)
        sync_folder(posixpath.dirname(self.path))

    def move_aside(self, why: str) -> str:
        """Begin a new history; the damaged one is kept."""
        if self.db:
            self.db.close()
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        while os.path.exists(aside):
            aside += "x"
        for ending in ("", "-wal", "-shm"):
            try:
                os.rename(self.path + ending, aside + ending)
            except FileNotFoundError:
                pass
        return f"the history was damaged ({why}) and is now {aside}; a new " \
            "one was begun"

    def one(self, statement: str, *values):
        row = self.db.execute(statement, values).fetchone()
        return row and row[0]

    # --- writing

    def write(self, deeds: list[tuple]) -> bool:
        """Carry out statements in one transaction, after those that wait.
        False: they wait too, for the disk is full or cannot be written.
        Raises Error when the disk fails: what it says is true no more."""
        import sqlite3
        self.waiting += deeds
        if self.broken:
            return False        # what it would say could be a lie
        if not self.waiting:
            return True
        try:
            self.db.execute("begin immediate")
            for statement, values in self.waiting:
                self.db.execute(statement, values)
            self.db.execute("commit")
        except sqlite3.OperationalError as error:
            self.roll_back()
            self.trouble = f"{self.path}: {error}"
            if "no such" in str(error):
                self.give_up(error)
            if "disk I/O error" in str(error) and not self.only_full():
                self.broken = True      # a commit might lie from now on
                raise Error(self.trouble) from None
            if len(self.waiting) > MOST_WAITING:
                self.waiting = [deed for deed in self.waiting
                                if deed[0].startswith("insert into jobs")
                                ] + self.waiting[-MOST_WAITING:]
            return False
        except sqlite3.DatabaseError as error:
            self.roll_back()
            self.give_up(error)
        except Exception:       # a value that SQLite cannot take: ours
            self.roll_back()
            del self.waiting[len(self.waiting) - len(deeds):]
            raise
        self.waiting.clear()
        self.trouble = ""
        return True

    def give_up(self, error) -> None:
        """Writing has failed for good. A damaged history is moved aside, or
        the next koid would come no further. Raises Error."""
        import sqlite3
        self.broken, text = True, f"{self.path}: {error}"
        if not isinstance(error, sqlite3.IntegrityError):
            text = self.move_aside(str(error))
        raise Error(text) from None

    def only_full(self) -> bool:
        """Is it a quota, or did the disk become read-only? SQLite takes
        both for a disk that fails."""
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

    def roll_back(self) -> None:
        try:
            if self.db.in_transaction:
                self.db.execute("rollback")
        except Exception:       # the transaction is gone in any case
            pass

    def job_key(self, whose: tuple, job: Job, deeds: list) -> int:
        """The number in the database of a job of (user, identity)."""
        key = self.keys.get(whose)
        if key is None:
            self.last_job += 1
            key = self.keys[whose] = self.last_job
            deeds.append(("insert into jobs values (?, ?, ?, ?, ?, ?)", (
                key, *map(storable, (*whose, job.section, job.name,
                                     job.label)))))
        return key

    def insert(self, run: dict) -> tuple:
        """The statement that adds a run."""
        names = [name for name in COLUMNS_OF_RUN if name in run]
        return (f"insert into runs ({', '.join(names)}) values "
                f"({', '.join('?' * len(names))})",
                tuple(run[name] for name in names))

    def update(self, run: int, **changes) -> tuple:
        return (f"update runs set {', '.join(f'{n} = ?' for n in changes)} "
                "where id = ?", (*changes.values(), run))

    def forget(self, key: int, keep: int) -> list[tuple]:
        """The statements that leave a job its newest runs only."""
        old = self.one("select id from runs where job = ? order by id desc "
                       "limit 1 offset ?", key, keep)
        if old is None:
            return []
        old_runs = "(select id from runs where job = ? and id <= ? and " \
            "state not in ('queued', 'running'))"
        return [(f"delete from output where run in {old_runs}", (key, old)),
                (f"delete from runs where id in {old_runs}", (key, old))]

    def note(self, name: str, value: str) -> tuple:
        return ("insert or replace into meta values (?, ?)", (name, value))

    # --- reading

    def noted_time(self, name: str) -> float:
        try:
            return float(self.noted(name) or 0)
        except ValueError:
            return 0.0

    def noted(self, name: str) -> str:
        return self.one("select value from meta where name = ?", name) or ""

    def each_run(self, where: str, *values):
        """Runs with the names of their jobs, one by one."""
        return map(shown, self.db.execute(
            f"select {SHOWN_COLUMNS} from runs r join jobs j on j.id = r.job "
            f"where {where}", values))

    def runs(self, where: str, *values) -> list[dict]:
        return list(self.each_run(where, *values))

    def output(self, run: int) -> bytes:
        return self.one("select frames from output where run = ?", run) or b""


def storable(text: str) -> str:
    """Text that SQLite takes: bytes that are no UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(row: tuple) -> dict:
    """A run as others see it."""
    import json
    run = dict(zip((*COLUMNS_OF_RUN, "user", "identity", "section", "name",
                    "label"), row))
    try:
        run["args"] = dict(json.loads(run["args"]))
    except (ValueError, TypeError):     # damaged: the arguments of no job
        run["args"] = {"": ""}
    for name in ("due", "asked", "started", "ended"):
        if not isinstance(run[name], (float, int)):
            run[name] = None
    run["run"] = run.pop("id")
    run["tag"] = tag_of(run["identity"])
    run["cut"] = bool(run["cut"])
    return run


# ==========================================================================
# Control: how do users reach the daemon?                 (network, files)
#
# By a Unix socket, which tells who calls (SO_PEERCRED): not what a variable
# says counts, but the uid that the kernel knows. One request a connection:
# a line of JSON, answered by a line of JSON. A user may do all with his own
# tab, jobs and runs; root may with anyone's.
# ==========================================================================

LONGEST_REQUEST = 8 * 2**20     # a tab of 1 MiB, each letter escaped
REQUEST_TIME = 10.0             # seconds to send one
MOST_VISITORS, MOST_OF_ONE, MOST_AT_ONCE = 256, 64, 16
MOST_BYTES_OF_ONE = 2 * LONGEST_REQUEST     # of requests that come in
LONGEST_ARGS = 262_144          # bytes of all arguments of a run together
MOST_ROWS = 1_000
READ_AGAIN = 20                 # times, while a run writes very fast
LONGEST_VALUES = 2**20          # characters of arguments in one answer
LARGEST = 2**62                 # what SQLite can count


class Duty:
    """A job that koid has to see to, and for whom."""

    __slots__ = ("job", "user", "file", "identity", "schedule", "settings",
                 "line", "due", "delay")

    def __init__(self, job: Job, file: TabFile, delay: int):
        self.job, self.file = job, file.path
        self.user = storable(job.user or file.user)
        self.identity = storable("\0".join(job.identity()))
        self.line = job.line
        self.schedule, self.settings = job.schedule, job.settings
        self.due: float | None = 0.0    # 0: to be asked for; None: never
        self.delay = delay              # minutes

    @property
    def key(self) -> tuple[str, str]:
        return self.user, self.identity


class Book:
    """What all tabs on this host say together."""

    def __init__(self, machine: Machine, home: str, system: bool):
        self.machine, self.home, self.system = machine, home, system
        self.files: dict[str, TabFile] = {}
        self.tabs: dict[str, Tab] = {}
        self.zones: dict[str, Zone] = {"": UTC}
        self.duties: list[Duty] = []
        self.troubles: list[str] = []
        self.stamp: tuple = ()
        self.links = False      # a tab of the system is a symbolic link

    def load(self) -> bool:
        """Read what has changed; False if nothing has. A tab that cannot be
        read any more goes on as it was."""
        try:
            files = {file.path: file for file in self.machine.tab_files(
                self.home, self.system, self.files)}
        except OSError as error:
            self.stamp = ()
            self.troubles = [f"{error.filename}: {error.strerror}; the tabs "
                             "go on as they were"]
            return True
        stamp = (sorted((path, file.stamp) for path, file in files.items()),
                 self.machine.stamp_of(LOCAL_ZONE))
        if stamp == self.stamp:
            return False
        tabs, self.troubles = {}, []
        for path, file in files.items():
            before = self.tabs.get(path)
            if before and file is self.files.get(path):
                tabs[path] = before
                continue
            try:
                if file.text is None:
                    raise ValueError(file.trouble)
                user = file.user or "root"
                tabs[path] = parse_tab(file.text, file.system, user == "root",
                                       self.machine.salt(user))
            except Exception as why:    # the other tabs go on
                self.troubles.append(f"{path}: not used: {why}")
                if before and not file.trouble.startswith(UNBELIEVED):
                    tabs[path] = before
        self.files = {path: file.but(text=file.text and "")
                      for path, file in files.items()}
        self.tabs = tabs
        self.gather()
        self.links = any(file.system and os.path.islink(path)
                         for path, file in files.items())
        self.stamp = stamp
        return True

    def forget(self) -> None:
        """Read all of them anew next time."""
        self.files, self.stamp = {}, ()

    def gather(self) -> None:
        """The duties, zones and troubles of all tabs."""
        try:
            zones = {"": self.machine.local_zone()}
        except Error as error:
            zones = {"": UTC}
            self.troubles.append(f"TZ: {error.message}; UTC is used")
        duties: list[Duty] = []
        for path, tab in self.tabs.items():
            self.troubles += [problem.text(path) for problem in tab.faults()]
            for name, (line, column) in tab.zones.items():
                try:
                    zones[name] = zones.get(name) or self.machine.zone(name)
                except Error as error:
                    self.troubles.append(f"{path}:{line}:{column}: "
                                         f"{error.message}")
            duties += [Duty(job, self.files[path],
                            random_delay(job, self.machine.host()))
                       for job in tab.jobs if job.settings.zone in zones]
        self.zones, self.duties = zones, only_first(duties, self.troubles)

    def find(self, user: str, name: str) -> Duty:
        """The job that a user means. Raises Error."""
        mine = [duty for duty in self.duties if not user or duty.user == user]
        jobs = {id(duty.job): duty for duty in mine}
        found = chosen([duty.job for duty in mine], name)
        if not found:
            raise Error(f"there is no job {short(name)}")
        users = sorted({jobs[id(job)].user for job in found})
        if len(users) > 1:
            raise Error(f"{short(name)} is a job of {', '.join(users)}",
                        f"koitab -u {users[0]} ...")
        if len(found) > 1 and len({job.tag for job in found}) > 1:
            raise Error(f"{short(name)} is the name of {len(found)} jobs",
                        "use the tag: " + " ".join(job.tag for job in found))
        return jobs[id(found[0])]


UNBELIEVED = ("its ", "others may", "it has another", "it is no ",
              "it is a link")


def only_first(duties: list[Duty], troubles: list[str]) -> list[Duty]:
    """Without jobs of one user that stand in two files: a run must belong
    to one of them."""
    seen: dict[tuple, Duty] = {}
    for duty in duties:
        first = seen.setdefault(duty.key, duty)
        if first is not duty:
            troubles.append(f"{duty.file}:{duty.line}: not used: the same "
                            f"job stands in {first.file}:{first.line}")
    return list(seen.values())


def random_delay(job: Job, host: str) -> int:
    """Minutes by which RANDOM_DELAY puts a job off on this machine. As in
    cronie, one factor for all jobs; here a restart does not change it."""
    return job.settings.random_delay * (picked(f"{host}\0delay") % 1000) \
        // 1000


def chosen(jobs: list[Job], name: str) -> list[Job]:
    """The jobs that a name means. Raises Error."""
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


class Caller(Record):
    """Who asks: the uid that the kernel vouches for."""
    uid: int
    name: str

    @property
    def master(self) -> bool:
        """May he act for others? Root may; and whoever runs koid owns it."""
        return self.uid in (0, os.geteuid())


class Desk:
    """Answers requests: for koid, and for koitab where no koid runs."""

    def __init__(self, machine: Machine, home: str, book: Book, store: Store,
                 daemon=None):
        self.machine, self.home, self.book = machine, home, book
        self.store, self.daemon = store, daemon

    def answer(self, caller: Caller, request: dict) -> tuple[dict, bytes]:
        """The reply, and what comes after it. Raises Error."""
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
        """The user whose tab it is about. Raises Error."""
        user = request.get("user") or caller.name
        if user != caller.name and not caller.master:
            raise Error("must be privileged to use -u")
        if os.geteuid() and user != self.machine.name_of(os.geteuid()):
            raise Error("this koid belongs to an ordinary user, and runs "
                        "jobs for no other")
        if not user or "/" in user or not self.machine.account(user):
            raise Error(f"user `{user}' unknown")
        why = self.machine.refusal(user)
        if why:
            raise Error(f"You ({user}) are not allowed to use this program "
                        f"({PROG})" if user == caller.name else
                        f"The user {user} cannot use this program ({PROG})",
                        f"see {why}")
        return user

    def mine(self, caller: Caller, request: dict) -> str:
        """The user whose jobs are meant; "" for all."""
        if caller.master and not request.get("user"):
            return ""
        user = request.get("user") or caller.name
        if user != caller.name and not caller.master:
            raise Error("must be privileged to use -u")
        if not user:
            raise Error(f"uid {caller.uid} has no name on this host")
        return user

    # --- tabs

    def listing(self, caller: Caller, request: dict) -> dict:
        user = self.whose(caller, request)
        file = self.machine.own_tab(self.home, user)
        if file and file.text is None:
            raise Error(f"{file.path}: {file.trouble}")
        return {"text": file and file.text}

    def install(self, caller: Caller, request: dict) -> dict:
        user, text = self.whose(caller, request), request.get("text", "")
        why = unusable_text(text)
        if why:
            raise Error(f"this is no crontab: {why}")
        tab = parse_tab(text, root=user == "root",
                        salt=self.machine.salt(user))
        check_zones(tab, self.machine)
        installed = not tab.faults()
        if installed:
            self.machine.write_tab(self.home, user, text)
            self.reload()
        return {"installed": installed, "problems": [
            vars(problem) for problem in tab.problems]}

    def remove(self, caller: Caller, request: dict) -> dict:
        user = self.whose(caller, request)
        removed = self.machine.remove_tab(self.home, user)
        self.reload()
        return {"removed": removed}

    def reload(self) -> None:
        if self.daemon:
            self.daemon.reload()
        else:
            self.book.load()

    # --- jobs and runs

    def jobs(self, caller: Caller, request: dict) -> dict:
        user = self.mine(caller, request)
        now, counts = int(self.machine.clock.now()), self.going()
        return {"jobs": [
            {"tag": duty.job.tag, "section": duty.job.section,
             "user": duty.user, "name": duty.job.name, "label": duty.job.label,
             "when": duty.job.when, "words": duty.job.words(),
             "line": duty.line, "file": duty.file,
             "command": duty.job.command, "confirm": duty.settings.confirm,
             "params": [vars(param) for param in duty.job.params],
             "next": self.next_start(duty, now), "last": self.last_run(duty),
             "running": counts.get(duty.key, 0)}
            for duty in self.book.duties if not user or duty.user == user]}

    def next_start(self, duty: Duty, now: int) -> float | None:
        if not duty.schedule:
            return None
        due = duty.schedule.next(now, self.book.zones[duty.settings.zone])
        return due and due + duty.delay * MINUTE

    def last_run(self, duty: Duty) -> dict | None:
        runs = self.store.runs("r.job = ? order by r.id desc limit 1",
                               self.store.keys.get(duty.key, 0))
        return runs[0] if runs else None

    def going(self) -> dict[tuple, int]:
        """How many runs of each job are going on."""
        counts: dict[tuple, int] = {}
        for active in self.daemon.active.values() if self.daemon else ():
            counts[active.key] = counts.get(active.key, 0) + 1
        return counts

    def history(self, caller: Caller, request: dict) -> dict:
        user, where, values = self.mine(caller, request), ["1"], []
        if user:
            where.append("j.user = ?")
            values.append(user)
        if request.get("job"):
            keys = self.keys_of(user, request["job"])
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
            if size > LONGEST_VALUES:       # who wants more asks `before`
                break
        return {"runs": runs, "more": size > LONGEST_VALUES}

    def keys_of(self, user: str, name: str) -> list[int]:
        """The jobs in the history that a name means; a job that stands in
        no tab any more is still there. Raises Error."""
        rows = self.store.db.execute(
            "select id, identity, name, section || '/' || name, label from "
            "jobs where user = ?1 or ?1 = ''", (user,)).fetchall()
        found = [key for key, identity, *names in rows
                 if storable(name) in names or name == tag_of(identity)]
        if found:
            return found
        duty = self.book.find(user, name)
        return [self.store.keys.get(duty.key, 0)]

    def run_of(self, caller: Caller, request: dict) -> dict:
        """The run that a request is about. Raises Error."""
        user = self.mine(caller, request)
        if request.get("run"):
            runs = self.store.runs("r.id = ?", request["run"])
            if not runs or user and runs[0]["user"] != user:
                raise Error(f"there is no run {request['run']}",
                            "koitab history")
        else:
            name = request.get("job", "")
            keys = ", ".join(map(str, self.keys_of(user, name)))
            runs = self.store.runs(f"r.job in ({keys}) and r.started is not "
                                   "null order by r.id desc limit 1")
            if not runs:
                raise Error(f"{short(name)} has not run yet")
        return runs[0]

    def log(self, caller: Caller, request: dict) -> tuple[dict, bytes]:
        run = self.run_of(caller, request)
        frames = self.store.output(run["run"])
        if not frames:              # it is going on, or not yet taken in
            try:
                frames = output_so_far(self.home, run["run"])
            except OSError as error:
                raise Error(f"run {run['run']}: {error.strerror}") from None
        return {"run": run, "size": len(frames)}, frames

    def kill(self, caller: Caller, request: dict) -> dict:
        run = self.run_of(caller, request)
        if not self.daemon.kill(run["run"], f"killed by {caller.name}"):
            raise Error(f"run {run['run']} is not going on",
                        f"koitab history {run['tag']}")
        return {"run": run}

    def status(self, caller: Caller, request: dict) -> dict:
        user = self.mine(caller, request)
        tab = self.book.tabs.get(f"{self.home}/tabs/{user or caller.name}"
                                 ) or Tab([], [], {})
        mine = [duty for duty in self.book.duties
                if not user or duty.user == user]
        starts = [start for start in (
            self.next_start(duty, int(self.machine.clock.now()))
            for duty in mine) if start]
        running = self.store.runs("r.state = 'running' and (j.user = ?1 or "
                                  "?1 = '') order by r.id limit 1000", user)
        return {
            "version": VERSION, "pid": os.getpid(), "home": self.home,
            "started": self.daemon.started, "system": self.book.system,
            "jobs": len(mine), "running": running,
            "next": min(starts, default=None), "late": [
                label for key, label in self.daemon.late()
                if not user or key[0] == user],
            "tab": {"user": user or caller.name, "jobs": len(tab.jobs),
                    "problems": [problem.text("tab")
                                 for problem in tab.faults()]},
            "troubles": self.daemon.troubles_of(user)}


OPERATIONS = {
    "list": Desk.listing, "install": Desk.install, "remove": Desk.remove,
    "jobs": Desk.jobs, "history": Desk.history, "log": Desk.log,
    "kill": Desk.kill, "status": Desk.status}
KINDS = {"op": str, "user": str, "text": str, "job": str, "run": int,
         "limit": int, "before": int, "args": dict}


def check_zones(tab: Tab, machine: Machine) -> dict[str, Zone]:
    """The zones that a tab names; those that there are not become faults
    of the tab."""
    zones = {}
    for name, (line, column) in tab.zones.items():
        try:
            zones[name] = machine.zone(name)
        except Error as error:
            tab.problems.append(Problem(line, column, "bad setting",
                                        error.message, error.hint))
    tab.problems.sort(key=lambda problem: (problem.line, problem.column))
    return zones


def run_file(home: str, run: int, most: int = -1) -> bytes:
    """What a supervisor has written about a run so far, or its beginning;
    b"" if nothing. Raises OSError."""
    try:
        with open(f"{home}/runs/{run}", "rb") as file:
            return file.read(most)
    except FileNotFoundError:
        return b""


def output_so_far(home: str, run: int) -> bytes:
    """The frames of a run that goes on. Its supervisor overwrites the older
    of two segments, so we read again if it has turned to the other one
    meanwhile. Raises OSError."""
    for _ in range(READ_AGAIN):
        before = header_of(run_file(home, run, HEADER_ROOM))
        data = run_file(home, run)
        after = header_of(run_file(home, run, HEADER_ROOM))
        if not before or not after:
            return b""
        if (before.turn, before.lost) == (after.turn, after.lost):
            return kept_output(data, before)
    before.first = before.second = 0    # it writes too fast: the head alone
    return kept_output(data, before)


def checked_values(job: Job, given: dict) -> dict[str, str]:
    """The values for a job's arguments. Raises Error."""
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
        reason = param.refusal(value) if isinstance(value, str) else \
            "it is no text"
        if reason:
            raise Error(f"the argument {short(name)}: {reason}")
        values[name] = value
    if sum(len(value.encode()) for value in values.values()) > LONGEST_ARGS:
        raise Error("the arguments are longer together than "
                    f"{LONGEST_ARGS:,} bytes")
    return values


def parsed_request(line: bytes) -> dict:
    """A request, or Error."""
    import json
    try:
        request = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise Error("this is no request") from None
    if not isinstance(request, dict):
        raise Error("this is no request")
    return request


def reply_line(reply: dict) -> bytes:
    import json
    return json.dumps(reply).encode() + b"\n"


def error_reply(error: Error) -> dict:
    return {"error": error.message, "hint": error.hint,
            "status": error.status}


def caller_of(connection, machine: Machine) -> Caller:
    """Who is at the other end."""
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = Struct("3i").unpack(connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    else:       # macOS: LOCAL_PEERCRED gives a struct xucred
        uid = Struct("2I").unpack_from(connection.getsockopt(0, 1, 76))[1]
    return Caller(uid % 2**32, machine.name_of(uid))


def near_path(path: str) -> tuple[str, int]:
    """A name for a socket's path that is short enough for the kernel, and
    a descriptor to close after its use."""
    if len(os.fsencode(path)) < 100:
        return path, -1
    folder, _, name = path.rpartition("/")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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


class Link:
    """The way from koitab to koid; or to the files, where no koid runs and
    they are the caller's own."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.home = machine.home_of_state()
        self.path = machine.socket_path(self.home)
        self.output = b""
        if os.geteuid() and "KOI_HOME" not in os.environ \
                and os.path.exists(ROOT_SOCKET):
            self.home, self.path = ROOT_HOME, ROOT_SOCKET

    def connect(self):
        """A connection to koid, or None if none answers."""
        connection = socket.socket(socket.AF_UNIX)
        near, fd = self.path, -1
        try:
            near, fd = near_path(self.path)
            connect_patiently(connection, near)
            connection.settimeout(30)
            return connection
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
        """The reply to a request; what comes after it is in `output`.
        Raises Error."""
        connection = self.connect()
        if not connection:
            return self.without_daemon({"op": op, **fields})
        with connection:
            reply, rest = exchange_lines(connection, {"op": op, **fields})
            chunks = [rest]
            while op == "log" and chunks[-1]:
                chunks.append(connection.recv(CHUNK))
            self.output = b"".join(chunks)
        return {**reply, "daemon": True}

    def follow(self, job: str, args: dict, user: str = "") -> tuple:
        """Start a run: its number, its connection, the first bytes of its
        frames. Raises Error."""
        connection = self.connect()
        if not connection:
            raise self.no_daemon()
        reply, rest = exchange_lines(connection, {
            "op": "run", "job": job, "args": args, "user": user})
        connection.settimeout(None)
        return reply["run"], connection, rest

    def no_daemon(self) -> Error:
        return Error("koid is not running", "systemctl start koid"
                     if self.home == ROOT_HOME else "koid &")

    def without_daemon(self, request: dict) -> dict:
        if request["op"] in ("run", "kill", "status"):
            raise self.no_daemon()
        if self.home == ROOT_HOME and os.geteuid():
            raise self.no_daemon()
        if os.path.exists(self.home):
            self.machine.make_home(self.home)
        book = Book(self.machine, self.home, False)
        book.load()
        store = Store(f"{self.home}/history.db", writing=False)
        store.open()
        desk = Desk(self.machine, self.home, book, store)
        uid = os.geteuid()
        reply, self.output = desk.answer(
            Caller(uid, self.machine.name_of(uid)), request)
        return {**reply, "daemon": False}


def exchange_lines(connection, request: dict) -> tuple[dict, bytes]:
    """Send a request: the reply, and what came after it. Raises Error."""
    data = b""
    try:
        try:
            connection.sendall(reply_line(request))
        except (BrokenPipeError, ConnectionResetError):
            pass            # it may have said why before it hung up
        connection.settimeout(None)
        while b"\n" not in data:
            chunk = connection.recv(CHUNK)
            if not chunk:
                raise Error("koid hung up", "its log says why")
            data += chunk
    except OSError as error:
        raise Error(f"koid does not answer: {error.strerror or error}"
                    ) from None
    line, _, rest = data.partition(b"\n")
    reply = parsed_request(line)
    if "error" in reply:
        raise Error(reply["error"], reply.get("hint", ""),
                    reply.get("status", 1))
    return reply, rest


# ==========================================================================
# Uplink: how do records reach the dashboard?           (network, processes)
#
# A child of koid's that knows the dashboard and nothing of the host: as root's
# it becomes `nobody`. It asks koid for what is to be sent, and hands it what
# came back. It may hang, be lied to and die; koid and its jobs do not notice.
# ==========================================================================


# ==========================================================================
# Daemon: who carries the plan out?                               (machine)
#
# One process that sleeps. It wakes when something is due, a supervisor
# reports, somebody calls, a tab changes or the clock is set; then it looks
# at the clock first and at all else after. What it is about to start is on
# the disk before it is started.
# ==========================================================================

EARLIEST = 1_000_000_000    # a clock before 2001 was never set
WAIT_FOR_CLOCK = 300.0      # seconds that a machine may take to set it
SETTLE = 0.3                # seconds until a tab that was edited is read
RETRY_FIRST, RETRY_LONGEST = 10.0, 600.0    # seconds between attempts
TRY_AGAIN = 1.0             # seconds until a full process table is tried
LONG_ENOUGH = 600.0         # seconds after which nobody waits for a run
MOST_QUEUED = 100           # runs of one job that may wait
SPARE_FILES = 40            # for all but visitors
WRITE_AGAIN = 5.0           # seconds until a full disk is tried again
FIRST_LOOK = 2.0            # seconds between looks at adopted runs
MOST_MAILERS = 2
MAIL_TIME = 60              # seconds for a sendmail
TRY_LATER = 75              # its status for that; the next koid does


class Pending:
    """A run that is to be started, now or later."""

    __slots__ = ("run", "duty", "trigger", "due", "asked", "attempt",
                 "values", "at", "connection", "known", "behind", "greeted",
                 "full_since")

    def __init__(self, duty: Duty, trigger: str, due: float, now: float):
        self.run, self.duty, self.trigger = 0, duty, trigger
        self.due, self.asked, self.attempt = due, now, 1
        self.values: dict[str, str] = {
            param.name: param.default or "" for param in duty.job.params}
        self.at = 0.0           # ticks before which it does not start
        self.connection = None
        self.known = False      # it has a row in the history
        self.behind = False     # it waits for the run before it
        self.greeted = False    # who waits for it knows its number
        self.full_since = 0.0   # ticks: no process could be started

    def greet(self) -> None:
        """Tell who waits which run it is."""
        self.greeted = True
        try:
            self.connection.send(reply_line({"run": self.run}))
        except OSError:
            pass                # gone; the run is recorded all the same

    def hang_up(self, why: str) -> None:
        """Tell who waits that nothing comes any more."""
        if self.connection:
            send_last(self.connection, frame(NOTE, 0, why.encode()) + frame(
                END, 0, reply_line({"exit": None, "signal": None,
                                    "reason": why})) if self.greeted else
                      reply_line(error_reply(Error(why))))
            self.connection = None

    def shown_values(self) -> str:
        """The arguments as JSON, without secrets."""
        if not self.values:
            return "{}"
        import json
        return json.dumps({param.name: "******" if param.type == "secret"
                           else self.values[param.name]
                           for param in self.duty.job.params})


class Active:
    """A run that goes on, as far as koid knows. `supervisor` is the pid of
    a child of ours, or 0: the koid before us started it."""

    def __init__(self, run: int, key: tuple, pending: Pending | None,
                 supervisor: int = 0):
        self.run, self.key, self.pending = run, key, pending
        self.supervisor = supervisor
        self.trigger = pending.trigger if pending else "schedule"
        self.reason = ""            # why we ended it
        self.kill, self.kill_at = 0, FOREVER    # a signal to be sent, when


class Visitor:
    """Somebody who calls, until he is answered."""

    def __init__(self, connection, caller: Caller, deadline: float):
        self.connection, self.caller = connection, caller
        self.deadline = deadline
        self.request, self.reply = bytearray(), bytearray()


def send_last(connection, reply: bytes) -> None:
    """Say a last short thing, if the other side still listens."""
    try:
        connection.setblocking(False)
        connection.send(reply)
    except OSError:
        pass
    connection.close()


def safe_address(text: str) -> bool:
    """As cron: letters and a few signs, and nothing that an option or a
    shell could be made of."""
    return text.isascii() and text[:1].isalnum() and all(
        letter.isalnum() or letter in "@!:%-.,_+=/" for letter in text)


def job_environment(duty: Duty, account: Account, host: dict,
                    **more: str) -> dict[str, str]:
    """The environment of a job: cron's, and ours."""
    return {**host, "SHELL": USUAL_SHELL, "PATH": USUAL_PATH,
            "HOME": account.home, **{
                name: value for name, value in duty.job.environment.items()
                if name and "=" not in name},
            "LOGNAME": account.name, "USER": account.name, **more}


def batches(orders: list[tuple]) -> list[list[tuple]]:
    """Which runs share a supervisor: none, unless very many start at once.
    Each of `orders` begins with its account."""
    size = max(1, min(MOST_IN_ONE, len(orders) // 16))
    found: list[list[tuple]] = []
    open_ones: dict[str, list] = {}
    for order in orders:
        batch = open_ones.get(order[0].name)
        if batch is None or len(batch) >= size:
            batch = open_ones[order[0].name] = []
            found.append(batch)
        batch.append(order)
    return found


LOST = Job(0, "", "(record lost)", "@manual", None, "", "", "", "", (), {},
           Settings())


class Daemon:
    """koid."""

    def __init__(self, machine: Machine, home: str, system: bool = False):
        self.machine, self.home, self.clock = machine, home, machine.clock
        self.book = Book(machine, home, system)
        self.store = Store(f"{home}/history.db")
        self.desk = Desk(machine, home, self.book, self.store, self)
        self.poll = select.poll()
        self.heard: dict[int, tuple] = {}   # descriptor -> function, argument
        self.active: dict[int, Active] = {}
        self.supervisors: dict[int, set] = {}   # pid -> runs that go on
        self.ended: dict[int, int] = {}     # run -> wait status, or NO_STATUS
        self.waiting: list[Pending] = []
        self.letters: list[tuple] = []
        self.mailers: dict[int, int] = {}   # pid -> run
        self.leftover: list[int] = []       # files to remove when written
        self.unsaved: list[tuple] = []      # (Active, wait status)
        self.write_at = 0.0                 # ticks, after a full disk
        self.doomed: list[tuple] = []       # (ticks, pid of a group's leader)
        self.also: list[tuple] = []         # to be written with what is next
        self.troubles: dict[str, str] = {}
        self.watch: Watch | None = None     # None: the clock is not set
        self.clock_by = 0.0                 # ticks, until it must be set
        self.door_opens = FOREVER           # ticks, after too many visitors
        self.stopping = False
        self.reload_at = self.look_at = FOREVER
        self.folders: dict[str, int] = {}
        self.visitors: dict[int, Visitor] = {}

    # --- from the start to the end

    def live(self) -> None:
        """Serve until a signal says stop. Raises Error."""
        import sqlite3
        try:
            self.open()
        except sqlite3.DatabaseError as error:
            self.store.give_up(error)
        self.say(f"koid {VERSION}: {plural(len(self.book.duties), 'job')}")
        try:
            while not self.stopping:
                try:
                    self.turn()
                    if self.store.broken:
                        raise Error(self.store.trouble or "the history "
                                    "cannot be written", "koid ends, and "
                                    "judges it when it is started again")
                except Error:
                    raise
                except Exception as bug:    # ours; the other jobs go on
                    self.survive(bug)
        finally:
            self.close()

    def open(self) -> None:
        self.machine.make_home(self.home)
        self.lock = only_one(f"{self.home}/lock")
        if self.lock is None:
            raise Error(f"koid already runs ({self.home})",
                        "koitab status tells its pid")
        self.cron_pid = self.machine.hold_cron_pid() if self.book.system \
            else -1
        self.started = self.clock.now()
        self.trouble("history", self.store.open())
        self.runs = os.open(f"{self.home}/runs", os.O_RDONLY
                            | os.O_DIRECTORY | os.O_CLOEXEC)
        self.open_pipes()
        self.host = self.machine.host_environment()
        self.room = self.machine.open_files() - SPARE_FILES
        self.book.load()
        self.tell_of_tabs()
        self.adopt()
        self.listen()
        for user in {duty.user for duty in self.book.duties}:
            self.machine.account(user)  # loads what the first start needs
        self.begin_to_watch()
        # What a turn may need is loaded now: Python may be upgraded under
        # us. (What sends mail is not: it would take half as much again.)
        import ctypes, json, pwd, resource, syslog  # noqa: E401, F401
        import gc
        gc.collect()
        gc.freeze()         # supervisors share what is there by now

    def open_pipes(self) -> None:
        self.nothing, end = os.pipe()       # what a job without input reads
        os.close(end)
        self.reports, self.report = os.pipe()
        woken, self.wake = os.pipe()
        for fd in (self.reports, self.report, woken, self.wake):
            os.set_blocking(fd, False)
        self.hear(self.reports, self.read_reports)
        self.hear(woken, self.drain)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                       signal.SIGCHLD, signal.SIGIO, signal.SIGALRM):
            signal.signal(number, self.note_signal)
        self.alarm = self.machine.clock_alarm()
        if self.alarm is not None:
            self.hear(self.alarm, self.clock_was_set)
        self.notice_folders()

    def survive(self, bug: Exception) -> None:
        """Something surprised us. A job that cannot be planned is left out,
        so that one surprise does not become a thousand."""
        import sqlite3
        if type(bug) is sqlite3.DatabaseError:
            self.store.give_up(bug)
        where = bug.__traceback__
        while where.tb_next:
            where = where.tb_next
        self.trouble("bug", f"koid has a fault, at its line "
                     f"{where.tb_lineno}: {bug!r}")
        for duty in list(self.book.duties):
            try:
                if self.watch:
                    due_next(duty, self.watch)
            except Exception as fault:
                self.book.duties.remove(duty)
                self.book.troubles.append(f"{duty.file}:{duty.line}: not "
                                          f"used: koid fails on it: {fault}")
        time.sleep(TRY_AGAIN)

    def close(self) -> None:
        """Leave; the jobs and their supervisors stay."""
        signal.signal(signal.SIGIO, signal.SIG_IGN)     # Python would die
        try:
            self.take_in()
            if self.watch:
                self.write([self.seen_note()])
        except Error as error:
            self.say(error.message, bad=True)
        remove(self.machine.socket_path(self.home))
        if self.cron_pid >= 0:
            remove(CRON_PID)
        self.say("stopped; jobs that run go on")

    def note_signal(self, number: int, _frame) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stopping = True
        elif number == signal.SIGHUP:
            self.book.forget()
            self.reload_at = 0.0
        elif number == signal.SIGIO:
            self.reload_at = min(self.reload_at, self.clock.ticks() + SETTLE)

    # --- one turn

    def hear(self, fd: int, function, argument=None,
             events: int = select.POLLIN) -> None:
        self.heard[fd] = (function, argument)
        self.poll.register(fd, events)

    def deaf(self, fd: int) -> None:
        """Hear nothing more from a descriptor, and close it."""
        del self.heard[fd]
        self.poll.unregister(fd)
        os.close(fd)

    def turn(self) -> None:
        """Sleep until something happens; then do what is due first."""
        patience = self.patience()
        if patience > 0:    # poll alone may be late by a thousandth
            signal.setitimer(signal.ITIMER_REAL, patience / 1000)
        heard = self.poll.poll(patience)
        now = self.clock.ticks()
        if now >= self.reload_at or self.folders_unwatched():
            self.reload()
        self.look()
        self.start_waiting()
        for fd, events in heard:
            if fd in self.heard:
                function, argument = self.heard[fd]
                function(argument, fd, events)
        self.reap()
        self.look_after(now)
        self.take_in()
        self.post()

    def patience(self) -> float:
        """Milliseconds until something is due; -1 for ever."""
        now = self.clock.ticks()
        soon = min(self.reload_at, self.look_at, self.next_wake(),
                   self.door_opens)
        for pending in self.waiting:
            if not pending.behind:
                soon = min(soon, pending.at)
        for visitor in self.visitors.values():
            soon = min(soon, visitor.deadline)
        for active in self.active.values():
            soon = min(soon, active.kill_at)
        if self.store.waiting:
            soon = min(soon, self.write_at)
        for at, _ in self.doomed:
            soon = min(soon, at)
        return -1 if soon == FOREVER else \
            min(max(soon - now, 0), LONGEST_SLEEP) * 1000

    def next_wake(self) -> float:
        """The ticks at which the next job is due. Without an alarm for a
        clock that is set, or for tabs that change, also each minute."""
        if not self.watch:
            return self.clock.ticks() + 5
        seen, due = self.watch.seen, self.next_due()
        if abs(self.clock.now() - seen.wall
               - self.clock.ticks() + seen.ticks) > 1:
            return seen.ticks + MINUTE - seen.wall % MINUTE
        if self.alarm is None or self.folders_unwatched():
            edge = (self.clock.now() // MINUTE + 1) * MINUTE
            return self.clock.ticks() + min(
                edge - self.clock.now(),
                FOREVER if due is None else max(0, seen.ticks + due
                                                - seen.wall
                                                - self.clock.ticks()))
        return FOREVER if due is None else seen.ticks + due - seen.wall

    def next_due(self) -> int | None:
        """When the first job falls due. What was computed before holds
        until then, unless the clock is set."""
        now = self.watch.seen.wall
        soonest = None
        for duty in self.book.duties:
            if duty.due is not None:
                if duty.due <= now:
                    duty.due = due_next(duty, self.watch)
                    if duty.due is None:
                        continue
                if soonest is None or duty.due < soonest:
                    soonest = duty.due
        return soonest

    # --- what is due

    def reading(self) -> Reading:
        return Reading(self.clock.now(), self.clock.ticks())

    def look(self) -> None:
        """Start what fell due."""
        if not self.watch:
            self.begin_to_watch()
            return
        before, now = self.watch, self.reading()
        strayed = now.wall - before.seen.wall - now.ticks + before.seen.ticks
        self.watch, launches = plan(self.book.duties, before, now,
                                    self.next_due())
        if abs(strayed) > 1:
            self.trouble("clock", "")
            for duty in self.book.duties:
                duty.due = 0.0
        pendings = []
        for launch in launches:
            pending = Pending(launch.job, "schedule", launch.due, now.wall)
            if launch.job.delay:
                pending.at = now.ticks + launch.job.delay * MINUTE
            pendings.append(pending)
        skipped = [self.missed(duty, count, due, "the clock was set")
                   for duty, count, due in self.watch.skipped]
        if pendings or skipped:
            self.launch(pendings, skipped)

    def missed(self, duty: Duty, count: int, due: float, why: str) -> tuple:
        """A row for starts that were not made."""
        return (duty, {"trigger": "schedule", "state": "missed", "due": due,
                       "reason": why, "count": count})

    def launch(self, pendings: list[Pending], rows: list = ()) -> None:
        """Write down what is to be started, then start it."""
        ready, deeds = [], [self.seen_note()] if self.watch else []
        deeds, self.also = deeds + self.also, []
        for duty, row in rows:
            deeds.append(self.new_run(duty, row, deeds))
            if row["state"] == "missed" and duty.settings.catchup == "yes":
                pendings.append(Pending(duty, "catch-up", row["due"],
                                        self.clock.now()))
        counts = self.desk.going()
        for pending in pendings:
            state, reason = self.admit(pending, counts)
            if state == "running":
                ready.append(pending)
                counts[pending.duty.key] = counts.get(pending.duty.key, 0) + 1
            deeds.append(self.row_of(pending, state, reason, deeds))
        if not self.write(deeds):
            refused = [pending for pending in pendings
                       if self.refuse(pending)]
            ready = [pending for pending in ready if pending not in refused]
        for pending in pendings:
            if pending.connection and not pending.greeted:
                pending.greet()
        self.begin(ready)

    def admit(self, pending: Pending, counts: dict) -> tuple[str, str]:
        """The state in which a run begins, and why it is not `running`."""
        duty, now = pending.duty, self.clock.ticks()
        if pending.at > now:
            self.waiting.append(pending)
            return "queued", ""
        policy = duty.settings.overlap
        if policy == "allow" or not counts.get(duty.key):
            return "running", self.late_reason(pending)
        queued = sum(other.duty.key == duty.key for other in self.waiting)
        if policy == "skip" or queued >= MOST_QUEUED:
            pending.hang_up("the last run is still going")
            return "skipped", "the last run was still going" if \
                policy == "skip" else f"{queued} runs were waiting"
        if policy == "replace":
            for other in [each for each in self.waiting if each.duty.key
                          == duty.key and each.behind]:
                self.kill(other.run, "replaced by the next run")
            for active in list(self.active.values()):
                if active.key == duty.key:
                    self.kill(active.run, "replaced by the next run")
        pending.behind = True
        self.waiting.append(pending)
        return "queued", "waits for the last run"

    def late_reason(self, pending: Pending) -> str:
        """What KOI_START_WITHIN has to say."""
        within = pending.duty.settings.start_within
        behind = self.clock.now() - pending.due \
            - pending.duty.delay * MINUTE * (pending.trigger == "schedule")
        return f"late by {duration_text(int(behind))}" \
            if within and behind > within else ""

    def late(self) -> list[tuple]:
        """The jobs that should have started by now, and wait."""
        return [(pending.duty.key, pending.duty.job.label)
                for pending in self.waiting if self.late_reason(pending)]

    def row_of(self, pending: Pending, state: str, reason: str,
               deeds: list) -> tuple:
        """The statement that says in which state a run is."""
        started = self.clock.now() if state == "running" else None
        if pending.known:
            return self.store.update(pending.run, state=state, reason=reason,
                                     started=started)
        pending.known = True
        deed = self.new_run(pending.duty, {
            "trigger": pending.trigger, "state": state, "due": pending.due,
            "asked": pending.asked, "started": started, "reason": reason,
            "args": pending.shown_values(), "attempt": pending.attempt},
            deeds)
        pending.run = self.store.last
        return deed

    def new_run(self, duty: Duty, row: dict, deeds: list) -> tuple:
        self.store.last += 1
        key = self.store.job_key(duty.key, duty.job, deeds)
        if row["state"] in ("missed", "skipped"):
            deeds += self.store.forget(key, duty.settings.keep - 1)
        return self.store.insert({"id": self.store.last, "job": key, **row})

    def refuse(self, pending: Pending) -> bool:
        """A run that somebody asked for, and that cannot be recorded, does
        not start; one that is due does."""
        if pending.trigger != "manual":
            return False
        self.store.waiting.append(self.store.update(
            pending.run, state="unstartable", started=None,
            ended=self.clock.now(), reason="it could not be recorded"))
        if pending in self.waiting:
            self.waiting.remove(pending)
        pending.hang_up(f"the run cannot be recorded: "
                     f"{self.store.trouble}")
        return True

    # --- starting

    def begin(self, pendings: list[Pending]) -> None:
        """Give each run to a supervisor."""
        orders, gone, accounts = [], [], {}
        for pending in pendings:
            user = pending.duty.user
            try:
                if user not in accounts:
                    accounts[user] = self.machine.account(user)
                account = accounts[user]
                if not account:
                    raise ValueError(f"there is no user {user}")
                orders.append((account, self.order(pending, account),
                               pending))
            except Exception as error:      # one job's; the others start
                gone.append(self.unstartable(pending, str(error)))
        if gone:
            self.write(gone)
        for batch in batches(orders):
            self.fork(batch[0][0], [order for _, order, _ in batch],
                      [pending for _, _, pending in batch])
        self.log_starts(pendings)

    def fork(self, account: Account, orders: list[Order],
             pendings: list[Pending]) -> None:
        try:
            pid = supervise(account, orders, self.runs, self.report,
                            self.nothing)
        except OSError as error:
            self.put_off(pendings, error)
            return
        self.trouble("fork", "")
        self.supervisors[pid] = {pending.run for pending in pendings}
        for pending in pendings:
            self.active[pending.run] = Active(pending.run, pending.duty.key,
                                              pending, pid)
            if pending.connection:
                pending.connection.close()
                pending.connection = None

    def log_starts(self, pendings: list[Pending]) -> None:
        """As cron does, in root's log."""
        for pending in pendings if os.geteuid() == 0 else ():
            if pending.run in self.active and not pending.duty.job.unlogged:
                self.machine.log(f"({pending.duty.user}) CMD "
                                 f"({pending.duty.job.command})", "CRON")

    def order(self, pending: Pending, account: Account) -> Order:
        job, values = pending.duty.job, pending.values
        more = {f"KOI_ARG_{number}": values[param.name] for number, param
                in enumerate(job.params, start=1)}
        return Order(
            pending.run, job.script,
            job.stdin.encode("utf-8", "surrogateescape"),
            job_environment(pending.duty, account, self.host,
                            KOI_RUN=str(pending.run), **more),
            job.settings.timeout,
            [values[param.name].encode() for param in job.params
             if param.type == "secret" and values[param.name]],
            pending.connection)

    def put_off(self, pendings: list[Pending], error: OSError) -> None:
        """The process table is full: try again, for a minute."""
        now, deeds = self.clock.ticks(), []
        for pending in pendings:
            pending.full_since = pending.full_since or now
            if now - pending.full_since > TRY_FOR:
                deeds.append(self.unstartable(
                    pending, f"could not start: {error.strerror}"))
            else:
                pending.at = now + TRY_AGAIN
                self.waiting.append(pending)
        self.trouble("fork", f"no process could be started: "
                     f"{error.strerror}")
        self.write(deeds)

    def unstartable(self, pending: Pending, why: str) -> tuple:
        why = storable(why)
        pending.hang_up(why)
        self.say(f"({pending.duty.user}) ERROR ({why})", bad=True)
        self.also += self.store.forget(self.store.keys[pending.duty.key],
                                       pending.duty.settings.keep)
        return self.store.update(
            pending.run, state="unstartable", reason=why, started=None,
            ended=self.clock.now())

    def start_waiting(self) -> None:
        """Start what has waited long enough, or whose turn has come."""
        if not self.waiting:
            return
        now, counts = self.clock.ticks(), self.desk.going()
        ready = []
        for pending in self.waiting:
            key = pending.duty.key
            if pending.behind and counts.get(key) or pending.at > now:
                continue
            if pending.behind:
                counts[key] = counts.get(key, 0) + 1
            ready.append(pending)
        if ready:
            self.waiting = [pending for pending in self.waiting
                            if pending not in ready]
            for pending in ready:
                pending.behind, pending.at = False, 0.0
            self.launch(ready)

    # --- ends

    def read_reports(self, _argument, fd: int, _events: int) -> None:
        """Supervisors tell how runs ended."""
        try:
            data = os.read(fd, CHUNK // REPORT.size * REPORT.size)
        except BlockingIOError:
            return
        for run, status in REPORT.iter_unpack(data):
            if status == NO_FILE:   # so that nobody takes it for not begun
                self.write([self.store.update(run, reason=NO_FILE_REASON)])
            else:
                self.ended[run] = status

    def reap(self) -> None:
        """Supervisors, and senders of mail, that have gone."""
        self.read_reports(None, self.reports, 0)
        while self.supervisors or self.mailers:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for run in self.supervisors.pop(pid, ()):
                active = self.active.get(run)
                if active and run not in self.ended:
                    if self.has_ended(active):
                        self.ended[run] = NO_STATUS
                    else:       # another has it, of the koid before us
                        active.supervisor, self.look_at = 0, 0.0
            if pid in self.mailers:
                self.mailed(self.mailers.pop(pid), status)

    def look_after(self, now: float) -> None:
        """Adopted runs, signals that are due, visitors who are slow."""
        if now >= self.look_at:
            self.look_at = FOREVER
            for active in self.active.values():
                if not active.supervisor:
                    self.look_at = now + FIRST_LOOK
                    if self.has_ended(active):
                        self.ended.setdefault(active.run, NO_STATUS)
        for active in list(self.active.values()):
            if now >= active.kill_at:
                self.press(active, now)
        for at, pid in [each for each in self.doomed if now >= each[0]]:
            self.doomed.remove((at, pid))
            end_group(pid, signal.SIGKILL)
        for visitor in list(self.visitors.values()):
            if now >= visitor.deadline:
                self.dismiss(visitor)
        if now >= self.door_opens:
            self.door_opens = FOREVER
            self.poll.modify(self.door.fileno(), select.POLLIN)

    def has_ended(self, active: Active) -> bool:
        """Of a run whose supervisor is not our child."""
        try:
            header = header_of(run_file(self.home, active.run, HEADER_ROOM))
        except OSError:
            return False        # too many files are open; later
        return not header or header.phase in (ENDED, UNSTARTABLE) \
            or born(header.supervisor) != header.supervisor_born

    def take_in(self) -> None:
        """Move runs that have ended into the history. When it cannot be
        written, they stay in their files, and we try again."""
        now = self.clock.ticks()
        for run, status in self.ended.items():
            active = self.active.pop(run, None)
            if active:
                self.supervisors.get(active.supervisor, set()).discard(run)
                self.unsaved.append((active, status))
        if self.ended:
            self.start_waiting()
        self.ended.clear()
        if self.store.waiting and now >= self.write_at:
            self.write_at = now + WRITE_AGAIN
            self.write([])
        if self.unsaved and not self.store.waiting:
            self.save_ends()

    def save_ends(self) -> None:
        deeds, again, letters = [], [], []
        unsaved, self.unsaved = self.unsaved, []
        for active, status in unsaved:
            mine: list[tuple] = []
            try:
                outcome, frames = self.outcome(active, status)
                mine += self.ending(active, outcome, frames)
                if not self.retry(active, outcome, again, mine):
                    self.address(active, outcome, letters, mine)
            except OSError as error:    # too many files are open
                self.trouble("ends", f"a run's end cannot be read: {error}")
                self.unsaved.append((active, status))
                self.look_at = min(self.look_at, self.clock.ticks() + 1)
            except Exception as bug:    # of ours, with this run alone
                self.trouble("bug", f"run {active.run}: {bug!r}")
                mine = [self.store.update(
                    active.run, state="interrupted",
                    reason="koid failed on its end")]
            else:
                self.leftover.append(active.run)
            deeds += mine
        if self.write(deeds):
            self.letters += letters
        self.waiting += again

    def write(self, deeds: list[tuple]) -> bool:
        """Write to the history; files of runs that are in it can go."""
        written = self.store.write(deeds)
        self.trouble("disk", self.store.trouble)
        if written:
            for run in self.leftover:
                remove(str(run), self.runs)
            self.leftover.clear()
        return written

    def outcome(self, active: Active, status: int) -> tuple[dict, bytes]:
        """How a run ended, as columns of its row; and its output."""
        data = run_file(self.home, active.run)
        header = header_of(data)
        if not header:      # the disk was full, or it never began
            exit_status, number = exit_and_signal(status)
            known = exit_status is not None or number is not None
            return {"state": "done" if known else "interrupted",
                    "exit": exit_status, "signal": number,
                    "ended": self.clock.now(), "reason": active.reason or (
                        "its output could not be kept" if known else
                        "its supervisor was killed")}, b""
        if active.kill == signal.SIGKILL and active.kill_at != FOREVER:
            self.doomed.append((active.kill_at, header.job))
        frames = kept_output(data, header)
        exit_status, number = exit_and_signal(header.status) \
            if header.phase == ENDED else (None, None)
        state = {ENDED: "done", UNSTARTABLE: "unstartable"}.get(
            header.phase, "interrupted")
        if header.phase == GOING and status != NO_STATUS:
            state = "done"      # a full disk: the end was only reported
            exit_status, number = exit_and_signal(status)
        reason = active.reason or REASONS[header.reason]
        if reason == "timeout" and active.pending:
            limit = active.pending.duty.settings.timeout
            reason = f"timeout after {duration_text(limit)}"
        elif state == "interrupted":
            reason = reason or "its supervisor was killed"
        elif state == "unstartable":
            reason = output_text(frames).decode("utf-8", "replace").strip()
        return {"state": state, "exit": exit_status, "signal": number,
                "started": header.started or None,
                "ended": header.ended or self.clock.now(),
                "reason": reason, "bytes": header.total,
                "cut": int(header.lost > 0)}, frames

    def ending(self, active: Active, outcome: dict, frames: bytes) -> list:
        """The statements that keep a run's end, and forget old ones."""
        columns = {name: value for name, value in outcome.items()
                   if name != "reason" or value}
        deeds = [self.store.update(active.run, **columns)]
        if frames:
            deeds.append(("insert or replace into output values (?, ?)",
                          (active.run, frames)))
        if active.pending:
            keep = active.pending.duty.settings.keep
            deeds += self.store.forget(self.store.keys[active.key], keep)
        if outcome["state"] != "done" and os.geteuid() == 0:
            self.say(f"({active.key[0]}) ERROR (run {active.run}: "
                     f"{outcome['reason']})", bad=True)
        return deeds

    def retry(self, active: Active, outcome: dict, again: list,
              deeds: list) -> bool:
        """KOI_RETRY: after a failure, again and again a little later."""
        last = active.pending
        if not last or outcome["state"] != "done" or outcome["exit"] == 0 \
                or active.reason or last.attempt > last.duty.settings.retry:
            return False
        if not active.supervisor and any(
                param.type == "secret" for param in last.duty.job.params):
            return False        # it was given to the koid before us
        wait = min(RETRY_FIRST * 2 ** min(last.attempt - 1, 10),
                   RETRY_LONGEST)
        pending = Pending(last.duty, "retry", self.clock.now() + wait,
                          self.clock.now())
        pending.at = self.clock.ticks() + wait
        pending.attempt, pending.values = last.attempt + 1, last.values
        deeds.append(self.row_of(pending, "queued", "", deeds))
        again.append(pending)
        return True

    # --- killing

    def kill(self, run: int, reason: str) -> bool:
        """End a run: TERM, and KILL ten seconds later. False: it is over."""
        waiting = [pending for pending in self.waiting if pending.run == run]
        if waiting:
            self.waiting.remove(waiting[0])
            waiting[0].hang_up(reason)
            return self.write([self.store.update(
                run, state="skipped", reason=reason)])
        active = self.active.get(run)
        if not active:
            return False
        active.reason = active.reason or reason
        active.kill = active.kill or signal.SIGTERM
        self.press(active, self.clock.ticks())
        return True

    def press(self, active: Active, now: float) -> None:
        """Send the signal that is due."""
        try:
            header = header_of(run_file(self.home, active.run, HEADER_ROOM))
        except OSError:
            header = None
        if not header or header.phase == CLAIMED:
            active.kill_at = now + 0.05     # it has not begun yet
            return
        self.machine.signal_job(header, active.kill)
        active.kill_at = now + KILL_AFTER if active.kill == signal.SIGTERM \
            else FOREVER
        active.kill = signal.SIGKILL

    # --- mail

    def address(self, active: Active, outcome: dict, letters: list,
                deeds: list) -> None:
        """Does cron send mail about this run? Who asked for one by hand has
        seen what it wrote."""
        pending, user = active.pending, active.key[0]
        job = pending.duty.job if pending else None
        environment = job.environment if job else {}
        to = environment.get("MAILTO", user)
        good = outcome["state"] == "done" and outcome["exit"] == 0
        wrote = outcome.get("bytes") or outcome["state"] == "unstartable"
        if not wrote or not to or active.trigger == "manual" \
                or job and job.mail_failures and good:
            return              # a note of ours alone is no reason for mail
        if not any(os.access(path, os.X_OK) for path in SENDMAILS):
            if os.geteuid() == 0:
                self.machine.log("(CRON) info (No MTA installed, discarding "
                                 "output)")
            return
        if not safe_address(to):
            self.say(f"({user}) UNSAFE MAIL ({to})", bad=True)
            deeds.append(self.store.update(active.run, mail="unsafe address"))
            return
        letters.append((active.run, user, to, job.command if job else "",
                        environment))
        deeds.append(self.store.update(active.run, mail="due"))

    def post(self) -> None:
        """Send what is to be sent, two at a time."""
        while self.letters and len(self.mailers) < MOST_MAILERS:
            run, *letter = self.letters[0]
            text = output_text(self.store.output(run))
            try:
                pid = os.fork()
            except OSError:
                return
            if not pid:
                send_letter(self.machine, self.host, *letter, text)
            del self.letters[0]
            self.mailers[pid] = run

    def mailed(self, run: int, status: int) -> None:
        result = "sent" if status == 0 else "due" if status == (
            TRY_LATER << 8) else f"failed (status {status:#06x})"
        if status:
            self.say(f"(CRON) MAIL (run {run}: got status {status:#06x})",
                     bad=True)
        self.write([self.store.update(run, mail=result)])

    # --- after a restart

    def adopt(self) -> None:
        """Take over what the koid before us left: runs that go on, runs
        that ended meanwhile, runs that it had no time to begin."""
        files = {int(name) for name in os.listdir(self.runs)
                 if name.isascii() and name.isdigit()}
        self.store.last = max(files | {self.store.last})
        rows = {row["run"]: row for row in self.store.runs(
            "r.state in ('queued', 'running')")}
        duties = {duty.key: duty for duty in self.book.duties}
        known = {row[0] for row in self.store.db.execute(
            "select id from runs")} if files else set()
        self.leftover = [run for run in files if run in known
                         and run not in rows]
        self.adopt_strangers(sorted(files - known))
        lost: list[tuple] = []
        for run, row in rows.items():
            key = (row["user"], row["identity"])
            pending = self.pending_of(row, duties.get(key))
            if run in files:
                self.active[run] = active = Active(run, key, pending)
                active.trigger = row["trigger"]
                if self.rebooted():
                    active.reason = "the machine went down"
                    self.ended[run] = NO_STATUS
            elif pending and self.may_still_start(row, pending):
                self.waiting.append(pending)
            else:
                missed = row["trigger"] == "schedule" \
                    and row["state"] == "running"
                lost.append(self.store.update(
                    run, state="missed" if missed else "interrupted",
                    started=None, reason="koid was stopped before it began"))
        self.write(lost)
        self.look_at = 0.0 if self.active else FOREVER
        self.mail_of_before(duties)

    def adopt_strangers(self, runs: list[int]) -> None:
        """Runs that have a file and no record: the disk was full, or the
        history was lost. They are shown as runs of a job of no tab."""
        key = self.machine.name_of(os.geteuid()), "lost"
        for run in runs:
            header = header_of(run_file(self.home, run, HEADER_ROOM)
                               ) or Header()
            deeds: list[tuple] = []
            job = self.store.job_key(key, LOST, deeds)
            self.write([*deeds, self.store.insert({
                "id": run, "job": job, "trigger": "manual",
                "state": "running", "started": header.started or None,
                "reason": "its record was lost", "args": "{}"})])
            self.active[run] = active = Active(run, key, None)
            active.trigger = "manual"
            if self.rebooted():
                self.ended[run] = NO_STATUS

    def rebooted(self) -> bool:
        """Was the koid before us there before this boot?"""
        boot = self.machine.boot_id()
        return not boot or boot != self.store.noted("boot")

    def pending_of(self, row: dict, duty: Duty | None) -> Pending | None:
        """The run of a row, if its job is still there and its arguments are
        known."""
        if not duty or set(row["args"]) != {param.name for param
                                            in duty.job.params}:
            return None
        pending = Pending(duty, row["trigger"], row["due"] or 0.0,
                          row["asked"] or 0.0)
        pending.run, pending.known = row["run"], True
        pending.values, pending.attempt = row["args"], row["attempt"]
        pending.behind = row["reason"] == "waits for the last run"
        start = pending.due + (duty.delay * MINUTE if row["trigger"]
                               == "schedule" else 0)
        pending.at = self.clock.ticks() + max(0.0, start - self.clock.now())
        return pending

    def may_still_start(self, row: dict, pending: Pending) -> bool:
        """Is it soon enough to begin a run that had no time to?"""
        if any(param.type == "secret" for param in pending.duty.job.params):
            return False        # its secrets were kept nowhere
        if row["state"] == "queued" and row["trigger"] != "manual":
            return True
        if row["state"] == "queued":
            return self.clock.now() - pending.asked < LONG_ENOUGH
        if self.rebooted() or row["reason"] == NO_FILE_REASON:
            return False        # its file did perhaps not reach the disk
        waited = self.clock.now() - (row["started"] or 0.0)
        return waited < (TRY_FOR if row["trigger"] == "schedule"
                         else LONG_ENOUGH)

    def mail_of_before(self, duties: dict) -> None:
        """Mail that was due when the koid before us stopped."""
        for row in self.store.runs("r.mail = 'due'"):
            duty = duties.get((row["user"], row["identity"]))
            environment = duty.job.environment if duty else {}
            to = environment.get("MAILTO", row["user"])
            if to and safe_address(to):
                self.letters.append((
                    row["run"], row["user"], to, duty.job.command if duty
                    else row["label"], environment))

    def begin_to_watch(self) -> None:
        """Find out what was missed, and wait for what comes; a clock that
        cannot be right is given some time first."""
        now = self.reading()
        seen = self.store.noted_time("seen")
        unset = now.wall < max(EARLIEST, seen - MINUTE)
        self.clock_by = self.clock_by or now.ticks + WAIT_FOR_CLOCK
        if unset and now.ticks < self.clock_by:
            self.trouble("clock", "the clock is not set: it shows "
                         f"{rfc3339(now.wall)}; jobs wait for it, for "
                         f"{duration_text(WAIT_FOR_CLOCK)} at most")
            return
        self.trouble("clock", "" if not unset else "the clock was not set; "
                     "jobs run by what it shows")
        self.watch = watching(now, self.book.zones)
        rows, launches = [], []
        if seen and not unset:
            self.watch = self.watch.but(dials=self.dials_of_before(seen))
            rows, launches = self.missed_since(seen, now.wall)
        self.launch(launches + self.reboot_jobs(now.wall), rows)
        self.know_jobs()

    def know_jobs(self) -> None:
        """Note which jobs there are: what a koid after us was not there for
        is missed only by a job that we have seen."""
        deeds = [self.seen_note()] if self.watch else []
        for duty in self.book.duties:
            self.store.job_key(duty.key, duty.job, deeds)
        self.write(deeds)

    def dials_of_before(self, seen: float) -> dict[str, Dial]:
        """The virtual clocks, where the koid before us left them and what
        time has passed since."""
        noted = dict(part.rpartition("=")[::2] for part
                     in self.store.noted("dials").split("\n") if part)
        now, dials = int(self.clock.now()), {}
        for name, dial in self.watch.dials.items():
            virtual, comma, running = noted.get(name, "").partition(",")
            if comma and (virtual + running).replace("-", "").isdigit():
                before = Dial(dial.zone, int(virtual), int(running))
                dial = passed(before, int(seen), now)
            dials[name] = dial
        return dials

    def missed_since(self, seen: float, now: float):
        """Rows for the starts that no koid was there for; those of this very
        minute are made."""
        rows, launches, minute = [], [], now // MINUTE * MINUTE
        for duty in self.book.duties:
            if not duty.schedule or duty.key not in self.store.keys:
                continue        # it is new: nobody waited for it
            first, count, dial = 0, 0, self.watch.dials[
                duty.settings.zone]
            for start in duty.schedule.starts(int(seen), dial.zone):
                if start > now or count >= MOST_COUNTED:
                    break
                if start >= minute:
                    launches.append(Pending(duty, "schedule", start, now))
                else:
                    first, count = first or start, count + 1
            if count:
                rows.append(self.missed(duty, count, first,
                                        "koid was not running"))
        return rows, launches

    def reboot_jobs(self, now: float) -> list[Pending]:
        """@reboot: once after each boot."""
        rebooted = self.rebooted()
        self.also.append(self.store.note("boot", self.machine.boot_id()))
        marked = self.book.system and self.machine.mark_reboot()
        if not rebooted or marked or "history" in self.troubles:
            return []           # without a history nobody knows
        return [Pending(duty, "reboot", now, now) for duty
                in self.book.duties if duty.job.when == "@reboot"]

    def seen_note(self) -> tuple:
        dials = "\n".join(f"{name}={dial.virtual},{dial.running}"
                          for name, dial in self.watch.dials.items())
        return ("insert or replace into meta values ('seen', ?), "
                "('dials', ?)", (repr(self.watch.seen.wall), dials))

    # --- tabs

    def folders_unwatched(self) -> bool:
        """Must we look at the tabs ourselves, each minute?"""
        return self.book.links or not self.folders \
            or None in self.folders.values()

    def notice_folders(self) -> None:
        """Ask to be told when a tab changes."""
        wanted = [f"{self.home}/tabs"]
        if self.book.system:
            wanted += [SYSTEM_FOLDER, posixpath.dirname(SYSTEM_TAB),
                       self.machine.spool()]
        elif os.geteuid() == 0:
            wanted.append(posixpath.dirname(LOCAL_ZONE))
        for folder in wanted:
            fd = self.folders.get(folder)
            if fd is not None and not os.fstat(fd).st_nlink:
                os.close(fd)            # it was removed, and perhaps remade
                fd = None
            self.folders[folder] = self.machine.notice(folder) \
                if fd is None else fd

    def reload(self) -> None:
        """Take up tabs that changed, from the next minute on."""
        self.reload_at = FOREVER
        self.notice_folders()
        if self.watch and not self.folders_unwatched():
            self.look()         # the minutes up to now are the old tabs'
        if not self.book.load():
            return
        if self.watch:
            self.watch = self.rewound(watching(
                self.watch.seen, self.book.zones, self.watch))
            self.know_jobs()
        duties = {duty.key: duty for duty in self.book.duties} \
            if self.waiting else {}
        for pending in self.waiting:
            duty = duties.get(pending.duty.key)
            if duty and duty.job.params == pending.duty.job.params:
                pending.duty = duty
        self.tell_of_tabs()

    def rewound(self, watch: Watch) -> Watch:
        """The watch, with zones as their files now have them."""
        return watch.but(dials={
            name: dial.but(zone=self.book.zones[name])
            for name, dial in watch.dials.items()})

    def tell_of_tabs(self) -> None:
        for trouble in self.book.troubles:
            self.say(trouble, bad=True)

    # --- visitors

    def listen(self) -> None:
        path = self.machine.socket_path(self.home)
        folder = posixpath.dirname(path)
        everyone = path == ROOT_SOCKET
        try:
            os.makedirs(folder, 0o755, exist_ok=True)
            if everyone:
                os.chmod(folder, 0o755)     # whatever the umask was
            near, fd = near_path(path)
            try:
                os.unlink(path)     # we hold the lock: nobody listens there
            except FileNotFoundError:
                pass
            self.door = socket.socket(socket.AF_UNIX)
            mask = os.umask(0o111 if everyone else 0o177)
            try:
                self.door.bind(near)
            finally:
                os.umask(mask)
                if fd >= 0:
                    os.close(fd)
            self.door.listen(1024)
            self.door.setblocking(False)
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        self.hear(self.door.fileno(), self.welcome)

    def welcome(self, _argument, _fd: int, _events: int) -> None:
        """Somebody calls."""
        for _ in range(MOST_AT_ONCE):   # then the clock comes first again
            try:
                connection, _ = self.door.accept()
            except BlockingIOError:
                return
            except OSError as error:    # too many files are open
                self.trouble("visitors", f"nobody can call: {error.strerror}")
                self.poll.modify(self.door.fileno(), 0)
                self.door_opens = self.clock.ticks() + TRY_AGAIN
                return
            self.trouble("visitors", "")
            visitor = Visitor(connection, caller_of(connection, self.machine),
                              self.clock.ticks() + REQUEST_TIME)
            same = sum(other.caller.uid == visitor.caller.uid
                       for other in self.visitors.values())
            if len(self.visitors) >= self.room or not visitor.caller.master \
                    and (same >= MOST_OF_ONE
                    or len(self.visitors) >= MOST_VISITORS):
                send_last(connection, reply_line(error_reply(
                    Error("koid is busy"))))
                continue
            connection.setblocking(False)
            self.visitors[connection.fileno()] = visitor
            self.hear(connection.fileno(), self.serve, visitor)

    def serve(self, visitor: Visitor, fd: int, events: int) -> None:
        """Read a request, or write what is left of a reply."""
        try:
            if visitor.reply:
                del visitor.reply[:visitor.connection.send(visitor.reply)]
                if not visitor.reply:
                    self.dismiss(visitor)
                return
            data = visitor.connection.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        visitor.request += data
        size = sum(len(other.request) for other in self.visitors.values()
                   if other.caller.uid == visitor.caller.uid)
        if not data or len(visitor.request) > LONGEST_REQUEST \
                or size > MOST_BYTES_OF_ONE:
            self.dismiss(visitor)
        elif b"\n" in data:
            self.respond(visitor)

    def respond(self, visitor: Visitor) -> None:
        rest = b""
        try:
            self.be_fair(visitor)
            request = parsed_request(bytes(visitor.request.partition(
                b"\n")[0]))
            if request.get("op") == "run":
                self.run_now(visitor, request)
                return
            reply, rest = self.desk.answer(visitor.caller, request)
        except Error as error:
            reply = error_reply(error)
        except Exception as bug:    # of ours; the jobs must not suffer
            self.say(f"a request failed: {bug!r}", bad=True)
            reply = error_reply(Error("koid failed on this request: "
                                      f"{type(bug).__name__}"))
        if visitor.connection.fileno() not in self.visitors:
            return              # it was given away already
        visitor.reply = bytearray(reply_line(reply) + rest)
        visitor.deadline = self.clock.ticks() + LONG_ENOUGH
        self.poll.modify(visitor.connection.fileno(), select.POLLOUT)

    def be_fair(self, visitor: Visitor) -> None:
        """Raises Error while a user does not read what he was told."""
        unread = sum(len(other.reply) for other in self.visitors.values()
                     if other.caller.uid == visitor.caller.uid)
        if unread > MOST_BYTES_OF_ONE:
            raise Error("koid is busy", "it waits for you to read")

    def run_now(self, visitor: Visitor, request: dict) -> None:
        """Start a job for somebody who waits for its output. Raises
        Error."""
        if not self.watch:
            raise Error("the clock is not set", "date")
        user = self.desk.mine(visitor.caller, request)
        given = request.get("args") or {}
        if not isinstance(request.get("job"), str) \
                or not isinstance(given, dict):
            raise Error("a request to run names a job and its arguments")
        duty = self.book.find(user, request["job"])
        now = self.clock.now()
        pending = Pending(duty, "manual", now, now)
        pending.values = checked_values(duty.job, given)
        pending.connection = self.part_with(visitor)
        self.launch([pending])

    def part_with(self, visitor: Visitor):
        """The visitor's connection, which is ours to watch no longer."""
        fd = visitor.connection.fileno()
        del self.visitors[fd], self.heard[fd]
        self.poll.unregister(fd)
        return visitor.connection

    def dismiss(self, visitor: Visitor) -> None:
        self.part_with(visitor).close()

    # --- the rest

    def drain(self, _argument, fd: int, _events: int) -> None:
        """Signals came in; their handlers have noted them."""
        try:
            os.read(fd, CHUNK)
        except BlockingIOError:
            pass

    def clock_was_set(self, _argument, fd: int, _events: int) -> None:
        try:
            os.read(fd, 8)
        except OSError:
            pass                # ECANCELED: that is the news
        self.machine.wind(fd)

    def say(self, text: str, bad: bool = False) -> None:
        """A line on stderr, and in the system's log if we are root's."""
        try:
            print(visible(f"{rfc3339(self.clock.now())} koid: {text}"),
                  file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass                # nobody reads it; the jobs go on
        if os.geteuid() == 0:
            self.machine.log(text, bad=bad)

    def trouble(self, about: str, text: str) -> None:
        """Something is wrong with us, or not any more."""
        if text and self.troubles.get(about) != text:
            self.say(text, bad=True)
        if text:
            self.troubles[about] = text
        else:
            self.troubles.pop(about, None)

    def troubles_of(self, user: str) -> list[str]:
        """What is wrong, as far as it is this user's business."""
        return [*self.troubles.values(), *(
            text for text in self.book.troubles if not user
            or text.startswith(f"{self.home}/tabs/{user}:"))]


def send_letter(machine: Machine, host: dict, user: str, to: str,
                command: str, environment: dict, text: bytes) -> None:
    """In a child of ours: hand a mail to sendmail, as the user whose job it
    was, and exit with its status."""
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                       signal.SIGCHLD, signal.SIGIO, signal.SIGPIPE,
                       signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        close_all_but({0, 1, 2})
        os.setsid()
        account = machine.account(user)
        become(account)
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
            input=message, env={**host, "PATH": USUAL_PATH,
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
    """The mail about a run, with cron's headers; without X-Cron-Env, which
    would send around what a tab keeps secret."""
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
    content = text.decode("utf-8", "replace")
    long = max(map(len, text.split(b"\n")), default=0) > 900
    message.set_content(content, cte="quoted-printable" if long
                        or b"\r" in text or b"\0" in text else "8bit")
    for header, name in (("Content-Type", "CONTENT_TYPE"),
                         ("Content-Transfer-Encoding",
                          "CONTENT_TRANSFER_ENCODING")):
        if environment.get(name):
            del message[header]
            message[header] = one_line(environment[name])
    return message.as_bytes()


def one_line(text: str) -> str:
    """For a header: what would break or steer it becomes a blank."""
    return "".join(letter if letter.isprintable() else " "
                   for letter in text)[:900]


def run_daemon(machine: Machine, system: bool) -> int:
    """Be koid, until a signal says stop. Raises Error."""
    if system and os.geteuid():
        raise Error("only root can serve the tabs of the system", "sudo koid "
                    "--system")
    Daemon(machine, machine.home_of_state(), system).live()
    return EXIT_OK


# ==========================================================================
# Hub: what does the dashboard know?                                 (files)
#
# One SQLite database, written by one thread: what waits is written together,
# and acknowledged when it is on the disk (WAL and synchronous=FULL).
# ==========================================================================

HUB_SCHEMA = 1
HUB_APPLICATION = 0x6B6F6932    # "koi2": a history is no dashboard
MOST_IN_GROUP = 256             # deeds that are written together
MOST_DEEDS_WAITING = 20_000     # then the next are turned away
WAL_PAGES = 256                 # 1 MiB of log, then it goes into the database
BALLAST = 2**21                 # twice the log: given up when the disk is full
FREE_PAGES = 2_000              # that the database may keep for later
READ_TIME = 1.0                 # seconds that one search may take

SILENT_AFTER = 90.0             # seconds without a sync: three long polls
LATE_AFTER = 90.0               # seconds: a minute's grace, and the way here
SETTLED_AFTER = 30.0            # a host that is back may have much to tell
HAND_OUT_AGAIN = 30.0           # seconds without a verdict
TWIN_SHOWN = 600.0
WATCHED_FOR = 15.0              # seconds after the last look at a run
STRIP = 90                      # runs in a job's strip
ENOUGH_RUNS, USUAL_RUNS = 20, 30    # to say what is usual; of so many
SEEN_NOTED = 60.0               # seconds between notes that a host was there

DAY_SECONDS = 86_400.0
KEEP_RUNS = 10_000              # of one job
KEEP_RUN_DAYS, KEEP_AUDIT_DAYS, KEEP_EVENT_DAYS = 400, 400, 93
KEEP_OUTPUT_DAYS = 90           # twice as long when the run failed
KEEP_PINGS = 100                # of one check
AT_ONCE = 1_000                 # rows that are removed in one step

MOST_RECORDS, MOST_OUTPUTS, MOST_LIST = 1_000, 200, 8 * 2**20
MOST_OUTPUT = 4 * 2**20         # bytes of one run; koid keeps 1 MiB
MOST_JOBS, MOST_HOSTS, MOST_CHECKS = 10_000, 5_000, 1_000
MOST_OWED = 50
MOST_REQUESTS_WAITING = 100     # for one host
MOST_CHANNELS = 20
MOST_LIVE, LIVE_ROOM = 32, 2**21    # runs that are watched; bytes of each
MOST_BARS = 12_000              # in one answer about a day
MOST_TOUCHED = 2_000            # changes; more and the page reads all anew
PING_BODY_LIMIT = 10_000
LONGEST_MEASURED = 72 * 3600    # a start and an end that belong together
LARGEST_TIME = 2**40            # the year 36812
LARGEST_WHOLE = 2**53 - 1       # what JavaScript can count

HUB_TABLES = """
create table meta (name text primary key, value text not null) without rowid;
create table dashboards (
    id integer primary key, dash text not null unique, salt text not null,
    rounds integer not null, api text not null unique,
    view text not null unique, ping_key text not null unique,
    badge_key text not null unique, made real not null);
create table hosts (
    id integer primary key autoincrement, dash integer not null,
    host text not null unique, name text not null, token text,
    made real not null, seen real, silent integer not null default 0,
    gone integer not null default 0, epoch integer,
    instance text not null default '', "offset" real not null default 0,
    zone text not null default '', skew real not null default 0,
    version text not null default '', boot text not null default '',
    key text not null default '', list text, mac text, list_sha text,
    troubles text not null default '[]');
create unique index hosts_by_token on hosts (token) where token is not null;
create table epochs (host integer not null, epoch integer not null,
    acked integer not null, primary key (host, epoch)) without rowid;
create table jobs (
    id integer primary key autoincrement, dash integer not null,
    host integer not null, user text not null, tag text not null,
    section text not null, name text not null, label text not null,
    timing text not null default '', words text not null default '',
    command text not null default '', confirm text not null default 'no',
    spec text not null default '', next real, gone integer not null default 0,
    failing_since real, failures integer not null default 0, last_ok real,
    last_failed integer, unique (host, user, tag));
create index jobs_of_dash on jobs (dash);
create index jobs_forgotten on jobs (gone) where gone = 2;
create table runs (
    id integer primary key autoincrement, dash integer not null,
    job integer not null, host integer not null, epoch integer not null,
    n integer not null, change integer not null, trigger text not null,
    state text not null, at real not null, due real, asked real,
    started real, ended real, exit integer, signal integer,
    reason text not null, args text not null, attempt integer not null,
    count integer not null, bytes integer not null, cut integer not null,
    size integer not null, have integer not null default 0,
    line text not null default '', nonce text not null default '',
    until real not null default 0, pieces integer not null default 0);
create unique index runs_of_host on runs (host, epoch, n);
create index runs_of_job on runs (job, id);
create index runs_good on runs (job, id) where state = 'done' and exit = 0;
create index runs_by_time on runs (dash, at);
create index runs_long on runs (dash, at) where ended - started > 3600;
create index runs_going on runs (dash, host)
    where state in ('queued', 'running');
create index runs_owed on runs (host, epoch, n)
    where have < size and state not in ('queued', 'running');
create index runs_stale on runs (until) where have > 0;
create table outputs (
    id integer primary key, run integer not null, at integer not null,
    lines integer not null, data blob not null);
create unique index outputs_of_run on outputs (run, at);
create table unread (run integer primary key);
create table requests (
    id integer primary key autoincrement, dash integer not null,
    host integer not null, nonce text not null unique, body text not null,
    mac text not null, asked real not null, exp real not null,
    state text not null default 'waiting', reason text not null default '',
    epoch integer, n integer);
create index requests_waiting on requests (host) where state = 'waiting';
create index requests_by_time on requests (asked);
create table audit (
    id integer primary key, dash integer not null, at real not null,
    what text not null, host text not null default '',
    job integer, label text not null default '',
    args text not null default '{}', state text not null default '',
    reason text not null default '', nonce text not null default '');
create unique index audit_by_time on audit (dash, at);
create index audit_by_nonce on audit (nonce) where nonce <> '';
create table checks (
    id integer primary key autoincrement, dash integer not null,
    uuid text not null unique, name text not null, slug text not null,
    tags text not null, "desc" text not null, kind text not null,
    period real not null, grace real not null, schedule text not null,
    tz text not null, start_within real not null, run_limit real not null,
    manual_resume integer not null, methods text not null,
    status text not null default 'new', last_ping real, last_start real,
    last_rid text, last_duration real, alert_after real,
    n integer not null default 0, made real not null);
create index checks_by_slug on checks (dash, slug);
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
create table alerts (
    id integer primary key autoincrement, dash integer not null,
    subject text not null, kind text not null, since real not null,
    text text not null, told integer not null default 0,
    unique (dash, subject, kind));
create table snoozes (dash integer not null, subject text not null,
    until real not null, primary key (dash, subject)) without rowid;
create table channels (
    id integer primary key autoincrement, dash integer not null,
    kind text not null, target text not null, last real,
    error text not null default '', made real not null);
create table letters (
    id integer primary key autoincrement, dash integer not null,
    channel integer not null, key text not null unique, at real not null,
    due real not null, tries integer not null default 0,
    title text not null, text text not null, subject text not null,
    kind text not null, over integer not null, run integer);
create index letters_due on letters (due);
create index letters_of_run on letters (run) where run is not null;
"""
SMALL_TABLES = ("meta", "dashboards", "hosts", "epochs", "jobs", "requests",
                "checks", "alerts", "snoozes", "channels", "letters")


class Full(Error):
    """The disk is full: nothing can be kept now."""

    def __init__(self):
        super().__init__("the dashboard's disk is full, and nothing was kept",
                         "make room there; it goes on by itself", 507)


class Access(Record):
    """What a token is good for."""
    role: str               # "operator", "viewer" or "host"
    dash: str
    host: str = ""


class Vault:
    """The dashboard's database, and the one thread that writes it.

    A deed is a function that gets the database and writes. What waits is
    written in one transaction, each deed in a savepoint of its own, so that
    one fsync serves all and a deed that fails takes none with it. What a
    deed has to change in memory it leaves in `after`: it is done when the
    transaction is on the disk.
    """

    def __init__(self, path: str, clock: Clock | None = None):
        import threading
        from collections import deque
        self.path, self.clock = path, clock or Clock()
        self.db = self.lock = self.thread = None
        self.queue = deque()            # (deed, values, then)
        self.wakes = threading.Condition()
        self.mine = threading.local()   # each thread's own reader
        self.stopping, self.full = False, False
        self.broken = ""                # why nothing can be believed any more
        self.faults: dict[str, str] = {}
        self.after: list = []
        self.chores: list[list] = []    # [when, rest, deed]
        self.chore(1.0, self.make_room)

    @property
    def troubles(self) -> list[str]:
        """What people should know about the dashboard itself."""
        return [*self.faults.values(), *([self.broken] if self.broken
                                         else [])]

    # --- the file

    def open(self) -> None:
        """Open the database, or make it where none ever was. Raises
        Error: what is damaged is never passed over for a fresh one."""
        import sqlite3
        try:
            self.lock = only_one(self.path + ".lock")
            if self.lock is None:
                raise Error(f"another dashboard has {self.path} open")
            if not os.path.exists(self.path):
                self.make()
            self.connect()
            self.load()
            self.make_ballast()
        except OSError as error:
            self.close()
            raise Error(f"{error.filename or self.path}: {error.strerror}",
                        ) from None
        except sqlite3.Error as error:
            self.close()
            raise self.damaged(error) from None
        except Error:
            self.close()
            raise

    def load(self) -> None:
        """Bring to memory what is kept there; for those who build on it."""

    def damaged(self, error) -> Error:
        return Error(f"{self.path} cannot be used: {error}",
                     "if it is damaged, put the last backup in its place and "
                     "remove its -wal and -shm; hosts send again what the "
                     "backup lacks, as far as they remember it", 500)

    def make(self) -> None:
        """A new database, whole or not at all."""
        import sqlite3
        for ending in (".ballast", "-wal"):
            if os.path.exists(self.path + ending):
                raise Error(
                    f"{self.path} is gone, but {self.path}{ending} is there",
                    "put a backup in its place; to begin anew, remove "
                    f"{self.path}{ending} too")
        fresh = self.path + ".new"
        for ending in ("", "-journal"):
            remove(fresh + ending)
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                         | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(fresh, isolation_level=None)
        try:
            db.executescript(
                "pragma auto_vacuum=incremental; pragma synchronous=full; "
                f"begin; {HUB_TABLES} pragma application_id="
                f"{HUB_APPLICATION}; pragma user_version={HUB_SCHEMA}; "
                "commit")
            db.execute("insert into meta values ('secret', ?)",
                       (os.urandom(32).hex(),))
        finally:
            db.close()
        os.rename(fresh, self.path)
        sync_folder(posixpath.dirname(self.path) or ".")

    def connect(self) -> None:
        import sqlite3
        if os.stat(self.path).st_mode & 0o077:
            os.chmod(self.path, 0o600)
        self.db = db = sqlite3.connect(
            self.path, isolation_level=None, timeout=15,
            check_same_thread=False, cached_statements=256)
        if self.one("pragma application_id") != HUB_APPLICATION:
            # A file of length 0 passes every check of SQLite's.
            raise sqlite3.DatabaseError("it is no dashboard of koi's")
        version = self.one("pragma user_version")
        if version > HUB_SCHEMA:
            raise Error(f"{self.path} was written by a newer koi (schema "
                        f"{version})", "install that version again")
        for line in ("journal_mode=wal", "synchronous=full",
                     "foreign_keys=off", f"wal_autocheckpoint={WAL_PAGES}",
                     f"journal_size_limit={WAL_PAGES * 4096}",
                     "secure_delete=fast", "cache_size=-16384"):
            db.execute(f"pragma {line}").fetchall()
        for table in SMALL_TABLES:      # runs and outputs would take minutes
            sound = self.one(f"pragma quick_check('{table}')")
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
        self.one("select max(id) from runs")
        self.one("select max(id) from outputs")
        self.prove()

    def prove(self) -> None:
        """Write something, or fail now and not at the first deed."""
        import sqlite3
        try:
            self.db.execute("insert or replace into meta values ('opened', ?)",
                            (str(self.clock.now()),))
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            self.fill_up()

    def close(self) -> None:
        if self.db:
            self.db.close()
        if self.lock is not None:
            os.close(self.lock)
        self.db = self.lock = None

    def one(self, statement: str, *values):
        """The first column of the first row, or None."""
        row = self.db.execute(statement, values).fetchone()
        return row and row[0]

    def backup(self, path: str) -> None:
        """Copy the database as it is now to a file; writing goes on.
        Raises Error."""
        import sqlite3
        fresh = path + ".new"
        try:
            remove(fresh)
            os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                             | os.O_CLOEXEC, 0o600))
            target = sqlite3.connect(fresh)
            try:
                self.reader().backup(target)
            finally:
                target.close()
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            os.rename(fresh, path)
            sync_folder(posixpath.dirname(path) or ".")
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        except sqlite3.Error as error:
            raise Error(f"{path}: {error}") from None

    # --- reading

    def reader(self):
        """This thread's own connection, which cannot write."""
        import sqlite3
        db = getattr(self.mine, "db", None)
        if not db:
            db = self.mine.db = sqlite3.connect(
                self.path, isolation_level=None, timeout=15)
            for line in ("query_only=1", "cache_size=-2048"):
                db.execute(f"pragma {line}")
        return db

    def read(self, question, *values):
        """Ask the database, in the calling thread. Raises Error."""
        import sqlite3
        try:
            return question(self.reader(), *values)
        except sqlite3.DatabaseError as error:
            if "interrupted" in str(error):
                raise Error("that takes too long to find", "", 503) from None
            self.faults["reading"] = f"{self.path}: {error}"
            raise self.damaged(error) from None

    def health(self, db) -> str:
        db.execute("select value from meta where name = 'opened'").fetchone()
        if self.broken:
            raise Error(self.broken, "", 503)
        return "OK"

    # --- writing

    def write(self, deed, *values, then=None) -> None:
        """Have a deed done; `then(result, error)` is called in the writer's
        thread when it is on the disk, or is not."""
        with self.wakes:
            refused = self.broken or self.stopping or len(
                self.queue) >= MOST_DEEDS_WAITING
            if not refused:
                self.queue.append((deed, values, then))
                self.wakes.notify()
        if refused and then:
            then(None, Error(self.broken or "the dashboard has too much to "
                             "write", "try again later", 503))

    def do(self, deed, *values):
        """Have a deed done and wait for it: its result, or what it
        raised. Not for the writer's own thread."""
        import threading
        done, found = threading.Event(), []

        def then(result, error):
            found.extend((result, error))
            done.set()

        self.write(deed, *values, then=then)
        done.wait()
        if found[1]:
            raise found[1]
        return found[0]

    def start(self) -> None:
        import threading
        self.thread = threading.Thread(target=self.live, name="hub")
        self.thread.daemon = True
        self.thread.start()

    def stop(self) -> None:
        """Carry out what waits, and close."""
        with self.wakes:
            self.stopping = True
            self.wakes.notify()
        if self.thread:
            self.thread.join()
        self.close()

    def live(self) -> None:
        """Write what is to be written, until we are to stop."""
        while not self.broken:
            try:
                busy = self.turn()
            except Exception as bug:    # better to begin anew than to hang
                self.broken = f"a fault of koi's own: {bug!r}"
                break
            with self.wakes:
                if not self.queue and self.stopping:
                    return
                if not self.queue and not busy:
                    self.wakes.wait(min(max(self.pause(), 0.01), 1.0))
        with self.wakes:        # from now on `write` says no by itself
            rest, self.queue = list(self.queue), type(self.queue)()
        self.tell(rest, [(None, Error(self.broken, "", 503))] * len(rest))

    def pause(self) -> float:
        """Seconds until something is due without a deed."""
        return min(when for when, _, _ in self.chores) - self.clock.ticks()

    def turn(self) -> bool:
        """One round: the deeds that wait, those that are due, and a chore.
        False if there was nothing to do."""
        with self.wakes:
            batch = [self.queue.popleft() for _ in range(
                min(len(self.queue), MOST_IN_GROUP))]
        if batch:
            self.group(batch)
        due = [] if self.broken or self.full else self.due()
        if due:
            self.group(due)
        return bool(self.tend() or batch or due)

    def due(self) -> list:
        """Deeds that nobody asked for; for those who build on this."""
        return []

    def chore(self, rest: float, deed) -> None:
        """Something to be done in small steps: again at once as long as it
        says True, and else after a rest."""
        self.chores.append([0.0, rest, deed])

    def tend(self) -> bool:
        """One step of one chore that is due. After each the deeds that
        wait come first, so that a chore never holds them up for long."""
        ticks = self.clock.ticks()
        due = min(self.chores, key=lambda each: each[0])
        if self.broken or due[0] > ticks:
            return False
        result = []
        self.group([(due[2], (), lambda *found: result.extend(found))],
                   chore=True)
        rest = min(due[1], 2.0) if self.full else due[1]
        due[0] = ticks if result[0] else ticks + rest
        name = f"chore {due[2].__name__}"
        self.faults.pop(name, None)
        if result[1] and not isinstance(result[1], Full):
            self.faults[name] = f"tidying up fails: {result[1]}"
        return bool(result[0])

    def group(self, batch: list, chore: bool = False) -> None:
        """Carry out deeds in one transaction, and tell how each went."""
        import sqlite3
        if self.full and not chore or self.broken:
            error = Full() if not self.broken else Error(self.broken, "", 503)
            return self.tell(batch, [(None, error)] * len(batch))
        try:
            self.db.execute("begin immediate")
            results = [self.carry_out(deed, values)
                       for deed, values, _ in batch]
            self.db.execute("commit")
        except sqlite3.Error as error:
            self.undo("rollback")
            self.after.clear()
            fault = self.fault_of(error)
            results = [(None, fault)] * len(batch)
        after, self.after = self.after, []
        for deed in after:
            deed()
        self.settled()          # so that who is told sees it, too
        self.tell(batch, results)
        self.announce()

    def tell(self, batch: list, results: list) -> None:
        for (_, _, then), (result, error) in zip(batch, results):
            try:
                if then:
                    then(result, error)
            except Exception as bug:    # the others are told all the same
                self.faults["bug"] = f"a fault of koi's own: {bug!r}"

    def settled(self) -> None:
        """The transaction is on the disk; for those who build on this."""

    def announce(self) -> None:
        """Who waits for it knows; now the others are told."""

    def carry_out(self, deed, values: tuple) -> tuple:
        """(result, error) of one deed, which leaves nothing if it fails."""
        import sqlite3
        mark = len(self.after)
        self.db.execute("savepoint deed")
        try:
            result = deed(self.db, *values)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and (
                    not self.db.in_transaction or self.is_fatal(error)):
                raise
            self.db.execute("rollback to deed")
            self.db.execute("release deed")
            del self.after[mark:]
            return None, error
        self.db.execute("release deed")
        return result, None

    def is_fatal(self, error) -> bool:
        return any(word in str(error) for word in (
            "full", "I/O", "malformed", "readonly", "not a database",
            "locked", "unable to open"))

    def undo(self, statement: str) -> None:
        try:
            if self.db.in_transaction:
                self.db.execute(statement)
        except Exception:       # the transaction is gone in any case
            pass

    def fault_of(self, error) -> Error:
        """What an error of SQLite's means for those who wait. After a disk
        that failed nothing is acknowledged: a commit might lie."""
        text = str(error)
        if "full" in text or any(word in text for word in (
                "I/O", "readonly", "unable to open")) and self.only_full():
            self.fill_up()
            return Full()
        if "locked" in text:
            return Error("the database is in use", "try again later", 503)
        self.broken = f"{self.path}: {error}"
        return Error(self.broken, "the dashboard ends, and looks at its "
                     "database when it starts", 503)

    only_full = Store.only_full     # it asks for nothing but our `path`

    # --- a full disk

    def fill_up(self) -> None:
        """The disk is full. The ballast makes room to delete in: SQLite
        needs some of it even for that."""
        if self.full:           # and even a chore needed more than there is
            return
        self.full = True
        self.faults["full"] = "the dashboard's disk is full: nothing new is " \
            "kept, and old things are removed where that is allowed"
        remove(self.path + ".ballast")
        for each in self.chores:
            each[0] = 0.0

    def make_ballast(self) -> bool:
        """Fill the file that is given up when the disk is full; False if
        there is no room for it, and as much again."""
        path, fresh = self.path + ".ballast", self.path + ".ballast.new"
        try:
            if os.path.exists(path) and os.stat(path).st_size == BALLAST:
                return True
            remove(fresh)
            fd = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                         | os.O_CLOEXEC, 0o600)
            try:
                for _ in range(2 * BALLAST // 65_536):
                    write_all(fd, bytes(65_536))
                os.fsync(fd)
                os.ftruncate(fd, BALLAST)
            finally:
                os.close(fd)
            os.rename(fresh, path)
        except OSError:
            try:
                remove(fresh)
            except OSError:
                pass
            return False
        return True

    @property
    def at_once(self) -> int:
        """Rows to remove in one step: few when there is hardly any room."""
        return AT_ONCE if not self.full else 20

    def make_room(self, db) -> bool:
        """The chore that ends a full disk: when there is room for the
        ballast again, there is for all else."""
        if self.full:
            self.after.append(self.shrink)
        return False

    def shrink(self) -> None:
        """The disk is full: give it pages that nobody needs, and the log.
        Not inside a transaction, for then the log could not be emptied."""
        import sqlite3
        try:
            self.vacuum(100)
            self.db.execute("pragma wal_checkpoint(truncate)").fetchall()
        except sqlite3.Error:
            pass                # no room even for that; we try again
        if self.make_ballast():
            self.full = False
            self.faults.pop("full", None)

    def vacuum(self, pages: int) -> None:
        """Give some free pages back. A transaction of its own, by a script:
        `execute` would stop after the first page, which counts as a row."""
        self.db.executescript(f"pragma incremental_vacuum({pages})")


# --- what callers say, judged at the door

MISSING = object()


class Asked:
    """The fields of a request, each asked for with its kind and limits.

    Who sends it is known, and may be broken or hostile all the same: what
    SQLite or a browser could not take ends here. Raises Error (400)."""

    def __init__(self, fields, what: str = "the request"):
        self.fields, self.what = fields, what
        if not isinstance(fields, dict):
            raise Error(f"{what} is no JSON object", "", 400)

    def wrong(self, name: str, why: str) -> Error:
        return Error(f"{self.what}: {name} {why}", "", 400)

    def get(self, name: str, kinds, default):
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
        value = self.get(name, str, default)
        if value is default:
            return value
        if len(value) > most:
            raise Error(f"{self.what}: {name} is longer than {most:,}", "",
                        413)
        if "\0" in value or not is_text(value):
            raise self.wrong(name, "is no text")
        return value

    def hex(self, name: str, length: int) -> str:
        value = self.get(name, str, MISSING)
        if not is_hex(value, length):
            raise self.wrong(name, f"is not {length} hex digits")
        return value

    def whole(self, name: str, default=MISSING, low: int = 0,
              high: int = LARGEST_WHOLE):
        value = self.get(name, int, default)
        if value is not default and not low <= value <= high:
            raise self.wrong(name, f"is not from {low} to {high}")
        return value

    def number(self, name: str, default=MISSING, low: float = 0,
               high: float = LARGEST_TIME):
        value = self.get(name, (int, float), default)
        if value is not default and not low <= value <= high:
            raise self.wrong(name, f"is not from {low} to {high}")
        return value

    def flag(self, name: str, default=MISSING) -> bool:
        return self.get(name, bool, default)

    def choice(self, name: str, words, default=MISSING) -> str:
        value = self.get(name, str, default)
        if value not in words:
            raise self.wrong(name, f"is none of {', '.join(words)}")
        return value

    def each(self, name: str, most: int) -> list:
        """The requests in a list."""
        found = self.get(name, list, ())
        if len(found) > most:
            raise Error(f"{self.what}: more than {most:,} {name}",
                        "send them in several requests", 413)
        return [Asked(fields, name) for fields in found]

    def texts(self, name: str, most: int) -> dict:
        """An object whose values are texts, together not too long."""
        found = self.get(name, dict, {})
        if any(not isinstance(value, str) or not is_text(value)
               or not is_text(key) for key, value in found.items()):
            raise self.wrong(name, "holds what is no text")
        if sum(len(key) + len(value) for key, value in found.items()) > most:
            raise Error(f"{self.what}: {name} is too long", "", 413)
        return found

    def data(self, name: str, most: int) -> bytes:
        """Bytes that come as base64."""
        from base64 import b64decode
        from binascii import Error as Unreadable
        text = self.get(name, str, "")
        if len(text) > most * 4 // 3 + 4:
            raise Error(f"{self.what}: {name} is too long", "", 413)
        try:
            return b64decode(text, validate=True)
        except (Unreadable, ValueError):
            raise self.wrong(name, "is no base64") from None


def is_text(text: str) -> bool:
    """Can it be UTF-8? Halves of surrogate pairs can not."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff"
                                     for letter in text)


def missing_thing(what: str) -> Error:
    return Error(f"there is no such {what}", "", 404)


# --- decisions: a run's letter, a job's state, what is usual

GOING_ON = ("queued", "running")
RUN_STATES = (*GOING_ON, "done", "interrupted", "missed", "skipped",
              "unstartable")
LETTERS = {"queued": "q", "running": "r", "missed": "m", "skipped": "s",
           "interrupted": "i", "unstartable": "u"}
BAD_LETTERS = frozenset("fkiu")


def letter_of(state: str, status: int | None, number: int | None,
              reason: str) -> str:
    """How a run went, in one letter."""
    if state != "done":
        return LETTERS.get(state, "i")
    if status == 0:
        return "o"
    return "k" if number or reason.startswith("timeout") else "f"


def quantile(ordered: list, part: float) -> float:
    """The value that this part of all is not above."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def usual_of(strip) -> list | None:
    """[p10, p90] of the last good runs' seconds; None for too few."""
    times = good_seconds(strip)
    return [quantile(times, 0.1), quantile(times, 0.9)] if times else None


def good_seconds(strip) -> list:
    """The last good runs' seconds, in order of length; [] for too few."""
    times = [each[2] for each in strip if each[3] == "o"
             and each[2] is not None]
    return sorted(times[-USUAL_RUNS:]) if len(times) >= ENOUGH_RUNS else []


def longest_usual(strip) -> float | None:
    """Seconds after which a run is slower than it ever should be."""
    times = good_seconds(strip)
    return max(3 * quantile(times, 0.95), 1.0) if times else None


def shortest_usual(strip) -> float | None:
    """Seconds below which a run is suspiciously fast. What takes less
    than a second is too short to say."""
    times = good_seconds(strip)
    return quantile(times, 0.05) / 5 if times and quantile(
        times, 0.05) >= 1 else None


def plain_line(text: str) -> str:
    """A line as a terminal would leave it, without colours."""
    import re
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b"
                  r"\\)?|[@-Z\\-_])", "", text)
    return visible(text.rstrip("\r").rpartition("\r")[2]).strip()


def last_line(frames: bytes, bad: bool) -> str:
    """The last line a run wrote; of its errors, if it went badly and wrote
    some."""
    kept = read_frames(frames)
    for streams in ((STDERR,), (STDOUT, STDERR), (NOTE,)):
        if streams == (STDERR,) and not bad:
            continue
        text = b"".join(data for stream, _, data in kept
                        if stream in streams)[-8192:]
        for line in reversed(text.decode("utf-8", "replace").split("\n")):
            line = plain_line(line)
            if line:
                return line[:300]
    return ""


def whole_frames(data: bytes) -> tuple[int, int]:
    """(bytes, lines) of the whole frames at the beginning. Raises
    ValueError if these are no frames."""
    at = lines = 0
    while at + FRAME.size <= len(data):
        stream, _, length = FRAME.unpack_from(data, at)
        end = at + FRAME.size + length
        if stream > END or length > MOST_OUTPUT:
            raise ValueError
        if end > len(data):
            break
        lines += data.count(b"\n", at + FRAME.size, end)
        at = end
    return at, lines


def cut_to_frames(data: bytes, most: int) -> bytes:
    """At most so many bytes: whole frames, or a part of the first."""
    at = 0
    while at + FRAME.size <= len(data):
        end = at + FRAME.size + FRAME.unpack_from(data, at)[2]
        if end > min(most, len(data)):
            break
        at = end
    return data[:at or most]


# --- decisions: a check's state, as Healthchecks has it

CHECK_FIELDS = ("id", "dash", "uuid", "name", "slug", "tags", "desc", "kind",
                "period", "grace", "schedule", "tz", "start_within",
                "run_limit", "manual_resume", "methods", "status",
                "last_ping", "last_start", "last_rid", "last_duration",
                "alert_after", "n", "made")
CHECK_COLUMNS = ", ".join(f'"{name}"' for name in CHECK_FIELDS)


def down_at(check: dict, expected: float | None) -> float | None:
    """When a check goes down if nothing comes; None for never.

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
    """The state that is shown: new, up, grace, down or paused."""
    start, status = check["last_start"], check["status"]
    if start is not None and now >= start + (
            check["run_limit"] or check["grace"]):
        return "down"
    if status != "up" or expected is None:
        return status
    own = check["start_within"] or check["run_limit"]
    if own and start is not None:
        return "up"
    if now >= expected + (check["start_within"] or check["grace"]):
        return "down"
    return "grace" if now >= expected else "up"


def after_ping(check: dict, kind: str, rid: str | None, now: float) -> dict:
    """The fields that a ping changes, by the rules of Healthchecks."""
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


def is_uuid(text: str) -> bool:
    """In its canonical form, in letters of any case."""
    return len(text) == 36 and text.isascii() and [
        len(part) for part in text.split("-")] == [8, 4, 4, 4, 12] \
        and HEX.issuperset(text.lower().replace("-", ""))


SLUG_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def every_words(period: float) -> str:
    """every 5 minutes, every day."""
    for name, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if period % size == 0:
            count = int(period // size)
            return f"every {name}" if count == 1 else \
                f"every {plural(count, name)}"
    return f"every {period:g} seconds"


# --- the output of runs that go on


class Live:
    """What runs that are watched have written so far: in memory only, for
    it comes again, whole, when they have ended."""

    def __init__(self):
        import threading
        self.lock = threading.Lock()
        self.buffers: dict[int, list] = {}      # run -> [begin, bytes]
        self.looks: dict[int, tuple] = {}       # run -> (host, n, until)

    def look(self, run: int, host: str, n: int, now: float) -> bool:
        """Somebody looks at a run; True if nobody did until now."""
        with self.lock:
            before = self.looks.get(run)
            self.looks[run] = host, n, now + WATCHED_FOR
            return not before or before[2] < now

    def watched(self, host: str, now: float) -> dict[int, int]:
        """A host's runs that are looked at -> bytes that we have."""
        with self.lock:
            for run in [run for run, look in self.looks.items()
                        if look[2] < now - WATCHED_FOR]:
                del self.looks[run]
                self.buffers.pop(run, None)
            return {n: sum(map(len_or_begin, self.buffers.get(run, ())))
                    for run, (whose, n, until) in self.looks.items()
                    if whose == host and until >= now}

    def run_of(self, host: str, n: int) -> int | None:
        with self.lock:
            return next((run for run, look in self.looks.items()
                         if look[:2] == (host, n)), None)

    def put(self, run: int, at: int, data: bytes, reset: bool) -> bool:
        """Add what came; False if it does not fit to what we have."""
        with self.lock:
            if run not in self.looks:
                return False
            buffer = self.buffers.get(run)
            if reset or buffer is None:
                while len(self.buffers) >= MOST_LIVE:
                    del self.buffers[next(iter(self.buffers))]
                buffer = self.buffers[run] = [at, b""]
            if at != buffer[0] + len(buffer[1]):
                return False
            whole = buffer[1] + data
            cut = 0
            while len(whole) - cut > LIVE_ROOM:
                cut += FRAME.size + FRAME.unpack_from(whole, cut)[2]
            self.buffers[run] = [buffer[0] + cut, whole[cut:]]
            return True

    def end(self, run: int) -> None:
        with self.lock:
            self.buffers.pop(run, None)
            self.looks.pop(run, None)

    def get(self, run: int) -> tuple[int, bytes] | None:
        """(offset of the first byte, bytes)."""
        with self.lock:
            buffer = self.buffers.get(run)
            return buffer and (buffer[0], buffer[1])


def len_or_begin(part) -> int:
    """Of a buffer [begin, bytes]: their sum is where it ends."""
    return part if isinstance(part, int) else len(part)


class Pulse:
    """What is known of a host from moment to moment."""

    def __init__(self, row: dict, now: float):
        self.number, self.host = row["id"], row["host"]
        self.dash = row["dash"]             # a number
        self.seen = row["seen"]
        self.noted = row["seen"] or 0.0     # what the database says
        self.silent = bool(row["silent"])
        self.since, self.back = now, now    # so long we would have noticed
        self.twin = 0.0                     # when the other was turned away
        self.tag = None                     # of the list


class Doors(Vault):
    """Dashboards and their keys, hosts, channels, and who did what."""

    def __init__(self, path: str, clock: Clock | None = None):
        import threading
        super().__init__(path, clock)
        self.tokens: dict[str, Access] = {}
        self.numbers: dict[str, int] = {}       # dash -> number
        self.names: dict[int, str] = {}
        self.pulses: dict[str, Pulse] = {}      # host -> Pulse
        self.hosts: dict[int, str] = {}         # number -> host
        self.touched: dict[str, dict] = {}      # dash -> what -> ids
        self.seqs: dict[str, int] = {}
        self.first_seq = 0
        self.heard = None
        self.followed = lambda dash: True
        self.letters = threading.Event()

    def load(self) -> None:
        self.first_seq = int(self.clock.now() * 1000)
        self.load_doors()

    def load_doors(self) -> None:
        """Take dashboards, hosts and tokens anew from the database; who
        reads them meanwhile sees the old or the new."""
        tokens, numbers, pulses = {}, {}, {}
        for number, dash, api, view in self.db.execute(
                "select id, dash, api, view from dashboards"):
            numbers[dash] = number
            tokens[view] = Access("viewer", dash)
            tokens[api] = Access("operator", dash)
        self.names = {number: dash for dash, number in numbers.items()}
        for row in rows_of(self.db, "select id, host, dash, seen, silent, "
                           "token from hosts where gone < 2"):
            pulses[row["host"]] = self.pulses.get(row["host"]) or Pulse(
                row, self.clock.now())
            if row["token"]:
                tokens[row["token"]] = Access(
                    "host", self.names[row["dash"]], row["host"])
        self.hosts = {pulse.number: host for host, pulse in pulses.items()}
        self.tokens, self.numbers, self.pulses = tokens, numbers, pulses

    def key_of(self, token: str) -> Access | None:
        """What a token is good for. It is looked for by its hash, so the
        time that takes says nothing about the tokens there are."""
        token = token[len(VIEW_PREFIX):] if token.startswith(VIEW_PREFIX) \
            else token
        return self.tokens.get(digest_of(token)) if is_hex(token, 64) \
            else None

    def number_of(self, dash: str) -> int:
        number = self.numbers.get(dash)
        if number is None:
            raise missing_thing("dashboard")
        return number

    def pulse_of(self, dash: str, host: str) -> Pulse:
        pulse = self.pulses.get(host)
        if not pulse or pulse.dash != self.number_of(dash):
            raise missing_thing("host")
        return pulse

    # --- what changed, for those who follow

    def touch(self, dash: str, what: str, *ids) -> None:
        """Note that something changed; it is told after the commit."""
        self.touched.setdefault(dash, {}).setdefault(what, {}).update(
            dict.fromkeys(ids))

    def seq(self, dash: str) -> int:
        return self.seqs.get(dash, self.first_seq)

    def announce(self) -> None:
        """Tell what changed, and number it."""
        touched, self.touched = self.touched, {}
        for dash, changed in touched.items():
            lines = {name: list(changed.pop(name)) for name in (
                "wake", "live") if name in changed}
            if "letters" in changed:
                del changed["letters"]
                self.letters.set()
            if changed and dash in self.numbers:
                self.seqs[dash] = self.seq(dash) + 1
                lines["seq"] = self.seqs[dash]
                if "reset" in changed or sum(map(
                        len, changed.values())) > MOST_TOUCHED:
                    lines["reset"] = True
                elif self.heard and self.followed(dash):
                    lines.update(self.described(dash, changed))
            if self.heard and lines:
                try:
                    self.heard(dash, lines)
                except Exception as bug:
                    self.faults["bug"] = f"a fault of koi's own: {bug!r}"

    def described(self, dash: str, changed: dict) -> dict:
        """The new state of what changed; for those who build on this."""
        return {}

    # --- dashboards

    def keys_asked(self, fields) -> tuple:
        asked = Asked(fields)
        return (asked.hex("salt", 2 * SALT_BYTES), asked.whole(
            "rounds", low=ROUNDS, high=MOST_ROUNDS),
            asked.hex("api_sha256", 64), asked.hex("view_sha256", 64))

    def create_dashboard(self, db, fields, now: float) -> dict:
        keys = self.keys_asked(fields)
        self.fresh_tokens(db, keys[2:], 0)
        dash = os.urandom(8).hex()
        from secrets import token_urlsafe
        db.execute("insert into dashboards (dash, salt, rounds, api, view, "
                   "ping_key, badge_key, made) values (?,?,?,?,?,?,?,?)",
                   (dash, *keys, token_urlsafe(16), os.urandom(16).hex(),
                    now))
        self.after.append(self.load_doors)
        return {"dash": dash}

    def rotate(self, db, dash: str, fields, now: float) -> dict:
        keys, number = self.keys_asked(fields), self.number_of(dash)
        self.fresh_tokens(db, keys[2:], number)
        db.execute("update dashboards set salt = ?, rounds = ?, api = ?, "
                   "view = ? where id = ?", (*keys, number))
        self.record(db, number, now, "rotate")
        self.after.append(self.load_doors)
        return {"dash": dash}

    def fresh_tokens(self, db, tokens: tuple, number: int) -> None:
        """One token must not open two doors."""
        if len(set(tokens)) < len(tokens) or db.execute(
                "select 1 from dashboards where id <> ?3 and (api in (?1, ?2)"
                " or view in (?1, ?2)) union all select 1 from hosts where "
                "token in (?1, ?2)", (*tokens, number)).fetchone():
            raise Error("these keys are in use already", "", 409)

    def count_dashboards(self, _db) -> int:
        return len(self.numbers)

    def salt(self, db, dash: str = "") -> dict:
        """What the keys are made with; of a dashboard that is unknown
        something that looks alike, and is the same each time."""
        if not dash:
            if len(self.numbers) != 1:
                raise Error("which dashboard?", "add ?dash=ID", 400) \
                    if self.numbers else missing_thing("dashboard")
            dash = next(iter(self.numbers))
        if not is_hex(dash, 16):
            raise Error("a dashboard's id has 16 hex digits", "", 400)
        found = db.execute("select salt, rounds from dashboards where dash "
                           "= ?", (dash,)).fetchone()
        if not found:
            secret, = db.execute("select value from meta where name = "
                                 "'secret'").fetchone()
            found = hmac_of(bytes.fromhex(secret), b"salt\n" + dash.encode()
                            )[:SALT_BYTES].hex(), ROUNDS
        return {"dash": dash, "salt": found[0], "rounds": found[1]}

    # --- hosts

    def add_host(self, db, dash: str, fields, now: float) -> dict:
        asked, number = Asked(fields), self.number_of(dash)
        host, token = asked.hex("host", 32), asked.hex("token_sha256", 64)
        name = asked.text("name", 255) or host[:8]
        there = db.execute("select id, dash, token from hosts where host = ?",
                           (host,)).fetchone()
        if there and there[1] != number:
            raise Error("this host belongs to another dashboard", "koitab -d "
                        "off there, and join again", 409)
        if not there or there[2] != token:
            self.fresh_tokens(db, (token, ""), 0)
        if there:
            db.execute("update hosts set name = ?, token = ?, gone = 0 where "
                       "id = ?", (name, token, there[0]))
        elif db.execute("select count(*) from hosts where dash = ?", (number,)
                        ).fetchone()[0] >= MOST_HOSTS:
            raise Error(f"there are {MOST_HOSTS:,} hosts already", "", 403)
        else:
            db.execute("insert into hosts (dash, host, name, token, made) "
                       "values (?, ?, ?, ?, ?)", (number, host, name, token,
                                                  now))
        self.record(db, number, now, "join", host, label=name)
        self.after.append(self.load_doors)
        self.touch(dash, "hosts", host)
        return {"dash": dash}

    def remove_host(self, db, dash: str, host: str, now: float) -> dict:
        """It may sync no more; what it told stays."""
        pulse = self.pulse_of(dash, host)
        db.execute("update hosts set token = null, silent = 0 where id = ?",
                   (pulse.number,))
        db.execute("update jobs set gone = 1, next = null where host = ? "
                   "and gone = 0", (pulse.number,))
        db.execute("delete from alerts where dash = ? and (subject = ? or "
                   "subject in (select 'job:' || id from jobs where host = "
                   "?))", (pulse.dash, f"host:{host}", pulse.number))
        self.record(db, pulse.dash, now, "forget", host)
        self.after.append(self.load_doors)
        self.touch(dash, "hosts", host)
        self.touch(dash, "reset", host)
        return {}

    def host_list(self, db, dash: str, host: str) -> dict:
        found = db.execute("select list, mac from hosts where id = ?", (
            self.pulse_of(dash, host).number,)).fetchone()
        if not found or found[0] is None:
            raise missing_thing("list")
        return {"body": found[0], "mac": found[1]}

    # --- who did what

    def record(self, db, number: int, now: float, what: str, host: str = "",
               **named) -> None:
        """Keep who asked for what. No two rows have the same time, for the
        page asks for what was before a time."""
        last = db.execute("select max(at) from audit where dash = ?",
                          (number,)).fetchone()[0] or 0.0
        if last < now + DAY_SECONDS:        # else a clock was wrong
            now = max(now, last + 0.001)
        row = {"dash": number, "at": now, "what": what, "host": host, **named}
        db.execute(f"insert into audit ({', '.join(row)}) values "
                   f"({', '.join('?' * len(row))})", tuple(row.values()))

    def audit(self, db, dash: str, before: float | None = None) -> dict:
        import json
        number, most = self.number_of(dash), 100
        rows = rows_of(db, (
            "select a.at, 'operator' who, a.what, a.host, a.job, a.label, "
            "a.args, coalesce(r.state, a.state) state, coalesce(r.reason, "
            "a.reason) reason, (select id from runs where host = r.host and "
            "epoch = r.epoch and n = r.n) run from audit a left join requests"
            " r on a.nonce <> '' and r.nonce = a.nonce where a.dash = ? and "
            "a.at < ? order by a.at desc limit ?"),
            number, LARGEST_TIME if before is None else before, most + 1)
        for row in rows:
            row["args"] = json.loads(row["args"])
        return {"rows": rows[:most], "more": len(rows) > most}

    # --- alerts: what is wrong now, and whom that is told

    def raise_alert(self, db, number: int, subject: str, kind: str,
                    since: float, title: str, text: str, due: float = 0.0,
                    run: int | None = None) -> None:
        """Something is wrong. It is told when it begins, and again when it
        is over: what is decided here is kept in the same transaction as its
        cause, and sent from there (class Herald)."""
        text = text[:2000]
        new = db.execute(
            "insert or ignore into alerts (dash, subject, kind, since, text) "
            "values (?, ?, ?, ?, ?)", (number, subject, kind, since, text))
        self.touch(self.names[number], "alerts", (subject, kind))
        if not new.rowcount:
            db.execute("update alerts set text = ? where dash = ? and "
                       "subject = ? and kind = ?", (text, number, subject,
                                                    kind))
        elif not self.is_snoozed(db, number, subject):
            self.spread(db, number, new.lastrowid, title, text, subject, kind,
                        False, due, run)

    def spread(self, db, number: int, alert: int, title: str, text: str,
               subject: str, kind: str, over: bool, due: float = 0.0,
               run: int | None = None) -> None:
        """A letter to each channel."""
        db.execute("update alerts set told = 1 where id = ?", (alert,))
        for channel, in db.execute("select id from channels where dash = ?",
                                   (number,)).fetchall():
            self.letter(db, number, channel, f"{alert}-{kind}-"
                        f"{'over' if over else 'on'}-{channel}", due, title,
                        text, subject, kind, over, run)

    def clear_alert(self, db, number: int, subject: str, kind: str,
                    title: str) -> None:
        """It is right again; that is told to who was told that it is not."""
        found = db.execute("select id, told from alerts where dash = ? and "
                           "subject = ? and kind = ?",
                           (number, subject, kind)).fetchone()
        if not found:
            return
        if found[1]:
            self.spread(db, number, found[0], title, "", subject, kind, True)
        db.execute("delete from alerts where id = ?", (found[0],))
        self.touch(self.names[number], "alerts", (subject, kind))

    def is_snoozed(self, db, number: int, subject: str) -> bool:
        return bool(db.execute(
            "select 1 from snoozes where dash = ? and subject = ? and until "
            "> ?", (number, subject, self.clock.now())).fetchone())

    # --- channels

    def change_channel(self, db, dash: str, fields, now: float) -> dict:
        asked, number = Asked(fields), self.number_of(dash)
        do = asked.choice("do", ("add", "delete", "test"), "add")
        if do == "add":
            channel = self.add_channel(db, number, asked, now)
        else:
            channel = asked.whole("id")
            if not db.execute("select 1 from channels where id = ? and dash "
                              "= ?", (channel, number)).fetchone():
                raise missing_thing("channel")
        if do == "delete":
            db.execute("delete from channels where id = ?", (channel,))
            db.execute("delete from letters where channel = ?", (channel,))
        if do == "test":
            self.letter(db, number, channel, f"test-{now}-{channel}", now,
                        "koi: a test", "If you can read this, koi can tell "
                        "you what happens.", "", "test", False)
        else:
            self.record(db, number, now, "channel", state=do)
        return {"id": channel}

    def add_channel(self, db, number: int, asked: Asked, now: float) -> int:
        kind = asked.choice("kind", ("mail", "webhook", "ntfy"))
        target = asked.text("target", 1000).strip()
        if kind == "mail" and not (safe_address(target) and "@" in target
                                   and "," not in target):
            raise Error("this is no mail address that sendmail would get",
                        "name@example.org", 400)
        if kind != "mail" and not is_web_address(target):
            raise Error("this is no address of the web",
                        "https://example.org/path", 400)
        if db.execute("select count(*) from channels where dash = ?",
                      (number,)).fetchone()[0] >= MOST_CHANNELS:
            raise Error(f"there are {MOST_CHANNELS} channels already", "",
                        403)
        return db.execute(
            "insert into channels (dash, kind, target, made) values "
            "(?, ?, ?, ?)", (number, kind, target, now)).lastrowid

    def channels(self, db, dash: str) -> dict:
        rows = rows_of(db, "select id, kind, target, last, error from "
                       "channels where dash = ? order by id",
                       self.number_of(dash))
        for row in rows:
            row["target"] = without_password(row["target"])
        return {"channels": rows}

    def letter(self, db, number: int, channel: int, key: str, due: float,
               title: str, text: str, subject: str, kind: str, over: bool,
               run: int | None = None) -> None:
        """Something to tell; its key makes sure that it is there once."""
        db.execute("insert or ignore into letters (dash, channel, key, at, "
                   "due, title, text, subject, kind, over, run) values "
                   "(?,?,?,?,?,?,?,?,?,?,?)",
                   (number, channel, key, self.clock.now(), due, title, text,
                    subject, kind, over, run))
        self.touch(self.names[number], "letters", key)


def rows_of(db, statement: str, *values) -> list[dict]:
    """Rows as dicts."""
    found = db.execute(statement, values)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row)) for row in found]


def status_in(action: str) -> int | None:
    """The exit status that an address ends with."""
    return int(action[:9]) if action.isascii() and action.isdigit() else None


def is_web_address(text: str) -> bool:
    """http or https, a host, and nothing that could break a request."""
    from urllib.parse import urlsplit
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) \
            and text.isascii() and text.isprintable() and " " not in text \
            and parts.port != 0
    except ValueError:
        return False


def without_password(target: str) -> str:
    """An address as it may be shown."""
    scheme, found, rest = target.partition("://")
    place, slash, path = rest.partition("/")
    if not found or "@" not in place:
        return target
    return f"{scheme}://***@{place.rpartition('@')[2]}{slash}{path}"


class Checks(Doors):
    """Pings: jobs that koid does not start, and that tell how they went.

    The addresses, answers and states are those of Healthchecks, so that
    whatever pings that can ping this.
    """

    def __init__(self, path: str, clock: Clock | None = None, zone=None):
        import threading
        super().__init__(path, clock)
        self.zone = zone or Machine().zone
        self.schedules: dict[tuple, tuple] = {}
        self.alarms: list[tuple] = []           # (at, kind, key), a heap
        self.armed: dict[tuple, float] = {}     # (kind, key) -> at
        self.faces_lock = threading.RLock()
        self.check_strips: dict = {}            # check -> its strip

    # --- what is due at some time

    def arm(self, kind: str, key, at: float | None) -> None:
        """Look at something at a time, or before it. Whoever looks judges
        by what is in the database then; so a look too many does no harm."""
        import heapq
        if at is None or at >= self.armed.get((kind, key), FOREVER):
            return
        self.armed[kind, key] = at
        heapq.heappush(self.alarms, (at, kind, key))

    def due(self) -> list:
        import heapq
        now, found = self.clock.now(), []
        while self.alarms and self.alarms[0][0] <= now \
                and len(found) < MOST_IN_GROUP:
            at, kind, key = heapq.heappop(self.alarms)
            if self.armed.get((kind, key)) == at:
                del self.armed[kind, key]
                found.append((self.look_at, (kind, key, now),
                              self.looker(kind, key, now)))
        return found

    def looker(self, kind: str, key, now: float):
        """If a look fails it is repeated, and not at once."""
        def then(_result, error):
            if error:
                self.arm(kind, key, now + (5.0 if isinstance(error, Error)
                                           else 3600.0))
                if not isinstance(error, Error):
                    self.faults[kind] = f"a fault of koi's own: {error!r}"
        return then

    def pause(self) -> float:
        head = self.alarms[0][0] - self.clock.now() if self.alarms else 60.0
        return min(head, super().pause())

    def look_at(self, db, kind: str, key, now: float) -> None:
        getattr(self, f"look_at_{kind}")(db, key, now)

    # --- when a ping is expected

    def expected(self, check: dict) -> float | None:
        """When the next ping should come; None if none is expected."""
        if check["status"] != "up" or check["last_ping"] is None:
            return None
        if check["kind"] == "simple":
            return check["last_ping"] + check["period"]
        schedule, zone = self.schedule_of(check["schedule"], check["tz"])
        return schedule.next(int(check["last_ping"]), zone)

    def schedule_of(self, text: str, tz: str) -> tuple:
        """A schedule and a zone that were read. Raises Error."""
        found = self.schedules.get((text, tz))
        if not found:
            try:
                schedule = Schedule.parse(text)
            except Misread as misread:
                raise Error(f"the schedule: {misread}", "five columns, as in "
                            "a crontab: */5 * * * *", 400) from None
            try:
                zone = UTC if tz in ("", "UTC") else self.zone(tz)
            except Error as error:
                raise Error(error.message, error.hint, 400) from None
            if len(self.schedules) > 5_000:
                self.schedules = {}
            found = self.schedules[text, tz] = schedule, zone
        return found

    # --- a ping

    def ping(self, db, key: str, slug: str | None, action: str, call: dict,
             now: float) -> tuple[int, str]:
        """Take a ping; (status, text) as Healthchecks answers."""
        created, rid, status = False, call.get("rid"), status_in(action)
        if slug is None:
            if status is not None and status > 255:
                return 400, "invalid url format"
            check = self.check_by(db, "uuid = ?", key.lower()) if is_uuid(
                key) else None
            if not check:
                return 404, "not found"
        else:
            if not SLUG_LETTERS.issuperset(slug) or not slug:
                return 400, "invalid url format"
            number, found = self.by_slug(db, key, slug)
            if len(found) > 1:
                return 409, "ambiguous slug"
            check = found[0] if found else None
            if not check and (number is None or not call.get("create")
                              or self.is_crowded(db, number, 2)):
                return 404, "not found"
        if status is not None and status > 255:
            return 400, "invalid url format"
        if rid is not None and not is_uuid(rid):
            return 400, "invalid uuid format"
        if not check:
            check, created = self.new_check(db, number, slug, now), True
        self.take_ping(db, check, action, rid and rid.lower(), call, now)
        return (201, "Created") if created else (200, "OK")

    def check_by(self, db, where: str, *values) -> dict | None:
        row = db.execute(f"select {CHECK_COLUMNS} from checks where {where}",
                         values).fetchone()
        return row and dict(zip(CHECK_FIELDS, row))

    def by_slug(self, db, key: str, slug: str) -> tuple:
        """(number of the dashboard or None, the checks of that name)."""
        number = db.execute("select id from dashboards where ping_key = ?",
                            (key,)).fetchone()
        if not number:
            return None, []
        return number[0], [dict(zip(CHECK_FIELDS, row)) for row in db.execute(
            f"select {CHECK_COLUMNS} from checks where dash = ? and slug = ? "
            "limit 2", (number[0], slug))]

    def is_crowded(self, db, number: int, times: int) -> bool:
        return db.execute("select count(*) from checks where dash = ?", (
            number,)).fetchone()[0] >= MOST_CHECKS * times

    def new_check(self, db, number: int, slug: str, now: float) -> dict:
        """A check that was made by its first ping."""
        from uuid import uuid4
        return self.insert_check(db, {
            "dash": number, "uuid": str(uuid4()), "name": slug, "slug": slug,
            "tags": "", "desc": "", "kind": "simple", "period": 86_400.0,
            "grace": 3600.0, "schedule": "* * * * *", "tz": "UTC",
            "start_within": 0.0, "run_limit": 0.0, "manual_resume": 0,
            "methods": "", "made": now})

    def insert_check(self, db, fields: dict) -> dict:
        names = ", ".join(f'"{name}"' for name in fields)
        check = db.execute(
            f"insert into checks ({names}) values "
            f"({', '.join('?' * len(fields))})",
            tuple(fields.values())).lastrowid
        return self.check_by(db, "id = ?", check)

    def take_ping(self, db, check: dict, action: str, rid: str | None,
                  call: dict, now: float) -> None:
        status = status_in(action)
        kind = action if status is None else "fail" if status else "success"
        if check["methods"] and call["method"] not in check["methods"].split():
            kind = "ign"
        if check["status"] == "paused" and check["manual_resume"]:
            kind = "ign"
        changed = after_ping(check, kind, rid, now)
        old, check = check["status"], {**check, **changed}
        check["n"] += 1
        changed["n"] = check["n"]
        if kind != "log" and kind != "ign":
            changed["alert_after"] = self.when_down(check)
            self.arm("check", check["id"], self.next_look(check, now))
        duration = changed.get("last_duration")
        if duration is not None and duration > LONGEST_MEASURED:
            duration = None
        self.keep_ping(db, check, kind, status, rid, call, duration, now)
        self.update_check(db, check["id"], changed)
        if check["status"] != old:
            self.flip(db, check, old, now, "fail" if kind == "fail" else "")

    def update_check(self, db, check: int, changed: dict) -> None:
        db.execute("update checks set " + ", ".join(
            f'"{name}" = ?' for name in changed) + " where id = ?",
            (*changed.values(), check))

    def keep_ping(self, db, check: dict, kind: str, status: int | None,
                  rid: str | None, call: dict, duration: float | None,
                  now: float) -> None:
        body = bytes(call.get("body") or b"")[:PING_BODY_LIMIT]
        line = plain_line(body[-1000:].decode("utf-8", "replace").strip()
                          .rpartition("\n")[2])[:200] if body else ""
        db.execute('insert into pings ("check", n, at, kind, exit, rid, '
                   "scheme, method, ua, ip, duration, size, line, body) "
                   "values (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                   (check["id"], check["n"], now, kind, status, rid,
                    *(self.header_text(call.get(name), most) for name, most
                      in (("scheme", 10), ("method", 10), ("ua", 200),
                          ("ip", 50))), duration, len(body), line, body))
        if check["n"] % KEEP_PINGS == 0:
            db.execute('delete from pings where "check" = ? and n <= ?',
                       (check["id"], check["n"] - KEEP_PINGS))
        dash = self.names[check["dash"]]
        self.touch(dash, "checks", check["uuid"])
        if kind in ("success", "fail"):
            self.after.append(lambda: self.extend_strip(check["id"], (
                check["n"], now, duration, "o" if kind == "success"
                else "f")))

    def header_text(self, text, most: int) -> str:
        return str(text or "")[:most].replace("\0", "").encode(
            "utf-8", "replace").decode()

    def when_down(self, check: dict) -> float | None:
        """When to look at a check; a fault in that must not stop pings."""
        try:
            return down_at(check, self.expected(check))
        except Exception:
            return self.clock.now() + 3600

    def next_look(self, check: dict, now: float) -> float | None:
        """When a check's state may change by itself: grace, or down."""
        try:
            expected = self.expected(check)
        except Exception:
            return now + 3600
        times = [at for at in (expected, down_at(check, expected))
                 if at is not None and at > now]
        return min(times, default=down_at(check, expected))

    def flip(self, db, check: dict, old: str, at: float, reason: str) -> None:
        """A check has changed its state: kept, and told."""
        db.execute('insert into flips ("check", at, old, new, reason) values '
                   "(?, ?, ?, ?, ?)", (check["id"], at, old, check["status"],
                                       reason))
        subject, name = f"check:{check['uuid']}", check["name"] or \
            check["slug"] or check["uuid"]
        if check["status"] == "down":
            failed = reason == "fail"
            self.raise_alert(
                db, check["dash"], subject, "failed" if failed else "overdue",
                at, f"{name} {'failed' if failed else 'is overdue'}",
                f"{name} {'has told a failure' if failed else reason}")
        else:
            for kind in ("failed", "overdue"):
                self.clear_alert(db, check["dash"], subject, kind,
                                 f"{name} is {check['status']}")

    def look_at_check(self, db, key: int, now: float) -> None:
        """Is a check overdue? It goes down at the time when it should have
        been seen, however late we look."""
        check = self.check_by(db, "id = ?", key)
        if not check or check["status"] == "down":
            return
        when = down_at(check, self.expected(check))
        if when is None or when > now:
            self.arm("check", key, self.next_look(check, now))
            if check["alert_after"] != when:
                self.update_check(db, key, {"alert_after": when})
            self.touch(self.names[check["dash"]], "checks", check["uuid"])
            return
        old, check["status"] = check["status"], "down"
        self.update_check(db, key, {"status": "down", "alert_after": None})
        self.flip(db, check, old, when, "has started, and did not end in time"
                  if check["last_start"] is not None else "has sent no ping")
        self.touch(self.names[check["dash"]], "checks", check["uuid"])

    # --- checks, as people change them

    def make_check(self, db, dash: str, fields, now: float) -> dict:
        from uuid import uuid4
        number = self.number_of(dash)
        if self.is_crowded(db, number, 1):
            raise Error(f"there are {MOST_CHECKS:,} checks already", "", 403)
        check = self.insert_check(db, {
            "dash": number, "uuid": str(uuid4()), "made": now,
            **self.check_asked(Asked(fields, "the check"), {})})
        self.record(db, number, now, "check", label=check["name"],
                    state="made")
        self.touch(dash, "checks", check["uuid"])
        return {"id": check["uuid"]}

    def check_asked(self, asked: Asked, old: dict) -> dict:
        """What a person says of a check; what is not said stays."""
        def minutes(name: str, default: float, low: float) -> float:
            value = asked.number(name, old.get(name, default),
                                 high=86_400 * 365)
            if value and value < 60 or value < low:
                raise asked.wrong(name, "is less than a minute")
            return float(value)

        slug = asked.text("slug", 100, old.get("slug", ""))
        if not SLUG_LETTERS.issuperset(slug):
            raise asked.wrong("slug", "may have a to z, 0 to 9, - and _")
        texts = {name: asked.text(name, most, old.get(name, default))
                 for name, most, default in (
                     ("name", 100, ""), ("tags", 500, ""), ("desc", 2000, ""),
                     ("schedule", 200, "* * * * *"), ("tz", 60, "UTC"))}
        found = {
            **texts, "slug": slug, "kind": asked.choice(
                "kind", ("simple", "cron"), old.get("kind", "simple")),
            "period": minutes("period", 86_400, 60),
            "grace": minutes("grace", 3600, 60),
            "start_within": minutes("start_within", 0, 0),
            "run_limit": minutes("run_limit", 0, 0),
            "manual_resume": int(asked.flag("manual_resume", bool(
                old.get("manual_resume", False)))),
            "methods": asked.choice("methods", ("", "POST"),
                                    old.get("methods", ""))}
        if found["kind"] == "cron":
            self.schedule_of(found["schedule"], found["tz"])
        return found

    def change_check(self, db, dash: str, uuid: str, fields,
                     now: float) -> dict:
        asked, check = Asked(fields, "the check"), self.whole_check(
            db, dash, uuid)
        do = asked.choice("do", ("edit", "pause", "resume", "delete"), "edit")
        if do == "resume" and check["status"] != "paused":
            raise Error("the check is not paused", "", 409)
        self.record(db, check["dash"], now, "check", label=check["name"],
                    state=do)
        self.touch(dash, "checks", uuid)
        if do == "delete":
            return self.delete_check(db, check)
        old = check["status"]
        changed = self.check_asked(asked, check) if do == "edit" else {
            "status": "paused", "last_start": None} if do == "pause" else {
            "status": "new", "last_start": None, "last_ping": None}
        check = {**check, **changed}
        changed["alert_after"] = self.when_down(check)
        self.update_check(db, check["id"], changed)
        self.arm("check", check["id"], self.next_look(check, now))
        if check["status"] != old:
            self.flip(db, check, old, now, "")
        return {}

    def whole_check(self, db, dash: str, uuid: str) -> dict:
        check = self.check_by(db, "uuid = ?", uuid) if is_uuid(uuid) else None
        if not check or check["dash"] != self.number_of(dash):
            raise missing_thing("check")
        return check

    def delete_check(self, db, check: dict) -> dict:
        db.execute("delete from checks where id = ?", (check["id"],))
        db.execute('delete from pings where "check" = ?', (check["id"],))
        db.execute('delete from flips where "check" = ?', (check["id"],))
        subject = f"check:{check['uuid']}"
        for kind, in db.execute("select kind from alerts where subject = ? "
                                "and dash = ?", (subject, check["dash"])
                                ).fetchall():
            self.touch(self.names[check["dash"]], "alerts", (subject, kind))
        db.execute("delete from alerts where dash = ? and subject = ?",
                   (check["dash"], subject))
        return {}

    # --- checks, as people see them

    def check_strip(self, db, check: int):
        """The last pings of a check that said how it went."""
        from collections import deque
        with self.faces_lock:
            strip = self.check_strips.get(check)
            if strip is None:
                rows = db.execute(
                    "select n, at, duration, case kind when 'fail' then 'f' "
                    'else \'o\' end from pings where "check" = ? and kind in '
                    "('success', 'fail') order by n desc limit ?",
                    (check, STRIP)).fetchall()
                strip = self.check_strips[check] = deque(
                    reversed(rows), STRIP)
            return list(strip)

    def extend_strip(self, check: int, entry: tuple) -> None:
        with self.faces_lock:
            strip = self.check_strips.get(check)
            if strip is not None and (not strip or strip[-1][0] < entry[0]):
                strip.append(entry)

    def check_shape(self, db, check: dict, snoozed: dict, now: float) -> dict:
        try:
            expected = self.expected(check)
            words = Schedule.parse(check["schedule"]).words() \
                if check["kind"] == "cron" else every_words(check["period"])
        except (Error, Misread) as error:
            expected, words = None, str(error)
        shape = {name: check[name] for name in (
            "name", "slug", "tags", "desc", "kind", "period", "grace",
            "schedule", "tz", "start_within", "run_limit", "methods",
            "last_ping", "last_start", "n")}
        duration = check["last_duration"]
        return {
            **shape, "id": check["uuid"], "words": words,
            "manual_resume": bool(check["manual_resume"]),
            "state": check_state(check, expected, now),
            "started": check["last_start"] is not None,
            "last_duration": duration if duration is None
            or duration <= LONGEST_MEASURED else None, "next": expected,
            "strip": self.check_strip(db, check["id"]),
            "snoozed": snoozed.get(f"check:{check['uuid']}", 0)}

    def pings(self, db, dash: str, uuid: str,
              before: int | None = None) -> dict:
        rows = rows_of(db, "select n, at, kind, exit, rid, method, ua, ip, "
                       "size, duration, line from pings where "
                       '"check" = ? and n < ? order by n desc limit 101',
                       self.whole_check(db, dash, uuid)["id"],
                       LARGEST_WHOLE if before is None else before)
        return {"pings": rows[:100], "more": len(rows) > 100}

    def ping_body(self, db, dash: str, uuid: str, n: int) -> bytes:
        found = db.execute('select body from pings where "check" = ? and n = '
                           "?", (self.whole_check(db, dash, uuid)["id"], n)
                           ).fetchone()
        if not found:
            raise missing_thing("ping")
        return found[0]


RUN_FIELDS_KEPT = ("id", "job", "host", "n", "epoch", "trigger", "state",
                   "due", "asked", "started", "ended", "exit", "signal",
                   "reason", "args", "attempt", "count", "bytes", "cut",
                   "size", "have", "line")
RUN_COLUMNS = ", ".join(RUN_FIELDS_KEPT)
RECORD_FIELDS = ("change", "trigger", "state", "due", "asked", "started",
                 "ended", "exit", "signal", "reason", "args", "attempt",
                 "count", "bytes", "cut", "size", "nonce")
INSERT_RUN = (f"insert into runs (dash, job, host, epoch, n, at, until, "
              f"{', '.join(RECORD_FIELDS)}) values "
              f"({', '.join('?' * (7 + len(RECORD_FIELDS)))})")
UPDATE_RUN = ("update runs set job = ?, at = ?, until = ?, " + ", ".join(
    f"{name} = ?" for name in RECORD_FIELDS) + " where id = ?")
JOB_FIELDS = ("id", "dash", "host", "user", "tag", "section", "name", "label",
              "timing", "words", "command", "confirm", "spec", "next", "gone",
              "failing_since", "failures", "last_ok", "last_failed")
JOB_COLUMNS = ", ".join(JOB_FIELDS)


class Face:
    """What is shown of a job's runs: kept in memory, so that a list of many
    jobs needs no look at their runs."""

    def __init__(self, runs: list[dict]):
        from collections import deque
        self.strip = deque(maxlen=STRIP)
        self.going: list[int] = []
        self.last = None
        for run in runs:
            self.put(run)

    def put(self, run: dict) -> None:
        """Take a run as it is now. Twice does no harm."""
        number, going = run["id"], run["state"] in GOING_ON
        took = None if run["ended"] is None or run["started"] is None \
            else max(run["ended"] - run["started"], 0.0)
        at = next((run[name] for name in ("started", "due", "asked", "ended")
                   if run[name] is not None), None)
        entry = number, at, took, letter_of(
            run["state"], run["exit"], run["signal"], run["reason"])
        for place in range(len(self.strip) - 1, -1, -1):
            if self.strip[place][0] == number:
                self.strip[place] = entry
                break
            if self.strip[place][0] < number:
                if place == len(self.strip) - 1:
                    self.strip.append(entry)
                break
        else:
            if not self.strip:
                self.strip.append(entry)
        if going and number not in self.going:
            self.going.append(number)
        if not going:
            if number in self.going:
                self.going.remove(number)
            if not self.last or number >= self.last["id"]:
                self.last = run


class Fleet(Checks):
    """Hosts, their jobs and runs: what koid tells, and what it is told."""

    def __init__(self, path: str, clock: Clock | None = None, zone=None):
        super().__init__(path, clock, zone)
        self.output_of_runs = Live()
        self.faces: dict[int, Face] = {}        # job -> Face
        self.handed: dict[str, float] = {}      # nonce -> when

    # --- a sync

    def sync(self, db, access: Access, request, now: float) -> dict:
        """Take what a host tells, and say what it is to do. Nothing that
        comes twice is kept twice; what comes late changes nothing back."""
        asked = Asked(request)
        pulse = self.pulses.get(access.host)
        if not pulse or asked.hex("host", 32) != access.host:
            raise Error("this is the token of another host", "", 403)
        if asked.whole("v") != 1:
            raise Error("the host speaks another version", "bring koi up to "
                        "date there or here", 400)
        epoch = asked.whole("epoch")
        host = rows_of(db, "select * from hosts where id = ?",
                       pulse.number)[0]
        self.note_host(db, pulse, host, asked, now)
        fields = asked.get("list", dict, None)
        if fields is not None:
            host["list_sha"] = self.take_list(db, pulse, Asked(
                fields, "the list"))
        self.take_next(db, pulse, asked.get("next", dict, {}), now)
        acked = self.take_records(db, pulse, epoch, asked.each(
            "records", MOST_RECORDS), now)
        for output in asked.each("outputs", MOST_OUTPUTS):
            self.take_output(db, pulse, epoch, output, now)
        for output in asked.each("live", MOST_OUTPUTS):
            self.take_live(pulse, output)
        for verdict in asked.each("verdicts", MOST_RECORDS):
            self.take_verdict(db, pulse, epoch, verdict)
        sha = asked.text("list_sha", 64, "")
        return {"v": 1, "acked": acked, "twin": False,
                "want_list": not host["list_sha"] or (
                    fields is None and sha != host["list_sha"]),
                "owed": self.owed(db, pulse, epoch),
                **self.hand_out(db, access, now)}

    def owed(self, db, pulse: Pulse, epoch: int) -> list:
        """Runs that have ended and whose output is not whole here."""
        return [list(row) for row in db.execute(
            "select n, have from runs where host = ? and epoch = ? and "
            "have < size and state not in ('queued', 'running') "
            "order by n desc limit ?", (pulse.number, epoch, MOST_OWED))]

    def note_host(self, db, pulse: Pulse, host: dict, asked: Asked,
                  now: float) -> None:
        """The host is there; and what it says of itself."""
        import json
        instance = asked.text("instance", 100)
        self.only_instance(pulse, host, instance, now)
        skew = now - asked.number("now", now)
        if abs(skew - host["skew"]) < 1:
            skew = host["skew"]         # the way here takes its time too
        troubles = [str(each)[:500] for each in asked.get(
            "troubles", list, [])[:20] if is_text(str(each))]
        said = {"instance": instance, "skew": skew,
                "epoch": asked.whole("epoch"),
                "offset": asked.number("offset", 0, -86_400, 86_400),
                "zone": asked.text("zone", 200, ""),
                "version": asked.text("version", 50, ""),
                "boot": asked.text("boot", 100, ""),
                "troubles": json.dumps(troubles)}
        changed = {name: value for name, value in said.items()
                   if host[name] != value}
        if pulse.seen is None or changed:
            self.touch(self.names[pulse.dash], "hosts", pulse.host)
        if host["silent"]:
            self.welcome_back(db, pulse, host, now)
            changed["silent"] = 0
        pulse.seen = now
        if changed or now - pulse.noted > SEEN_NOTED:
            changed["seen"] = now
            db.execute("update hosts set " + ", ".join(
                f'"{name}" = ?' for name in changed) + " where id = ?",
                (*changed.values(), pulse.number))
            self.after.append(lambda: setattr(pulse, "noted", now))
        self.arm("host", pulse.host, now + SILENT_AFTER)

    def only_instance(self, pulse: Pulse, host: dict, instance: str,
                      now: float) -> None:
        """Of two koids that pass for one host the one that began later is
        believed, unless it is no more. Raises Error."""
        def began(text: str) -> tuple:
            start, _, name = text.partition("-")
            if not start.isascii() or not start.isdigit() \
                    or len(start) > 15 or not is_hex(name, 8):
                raise Error("the request: instance is none", "", 400)
            return int(start), name

        if began(instance) >= (began(host["instance"]) if host["instance"]
                               else (0, "")):
            return
        if pulse.seen is not None and now - pulse.seen < SILENT_AFTER:
            pulse.twin = now
            self.touch(self.names[pulse.dash], "hosts", pulse.host)
            raise Error("another koid uses this host's identity",
                        "if this machine is a copy of another: koitab -d "
                        "off, and join again", 409)

    def welcome_back(self, db, pulse: Pulse, host: dict, now: float) -> None:
        """A host was silent and is there again."""
        self.clear_alert(db, pulse.dash, f"host:{pulse.host}", "silent",
                         f"{host['name']} is back")
        self.after.append(lambda: vars(pulse).update(silent=False, back=now))
        dash = self.names[pulse.dash]
        for job, due in db.execute("select id, next from jobs where host = ?",
                                   (pulse.number,)).fetchall():
            self.touch(dash, "jobs", job)
            if due is not None:
                self.arm("late", job, max(due + LATE_AFTER,
                                          now + SETTLED_AFTER))
        for run, in db.execute(
                "select id from runs where dash = ? and host = ? and state "
                "in ('queued', 'running')", (pulse.dash, pulse.number)):
            self.arm("slow", run, now + SETTLED_AFTER)

    # --- its jobs

    def take_list(self, db, pulse: Pulse, asked: Asked) -> str:
        """Keep a list as it came, with its MAC, for those who hold the key;
        and take the jobs from it. The SHA-256 of the list."""
        import json
        body, mac = asked.text("body", MOST_LIST), asked.hex("mac", 64)
        try:
            inner = Asked(json.loads(body), "the list")
            specs = inner.get("jobs", list, MISSING)
            jobs = [self.job_asked(text) for text in specs]
        except (ValueError, RecursionError):
            raise Error("the list is no JSON", "", 400) from None
        if inner.text("host") != pulse.host:
            raise Error("this is the list of another host", "", 400)
        if len(jobs) > MOST_JOBS:
            raise Error(f"more than {MOST_JOBS:,} jobs", "", 413)
        known = {(user, tag): (job, spec, gone) for job, user, tag, spec, gone
                 in db.execute("select id, user, tag, spec, gone from jobs "
                               "where host = ? and gone < 2",
                               (pulse.number,))}
        for job in jobs:
            self.keep_job(db, pulse, job, known.pop(
                (job["user"], job["tag"]), None))
        for job, _, gone in known.values():
            if not gone:
                self.drop_job(db, pulse, job)
        sha = digest_of(body)
        db.execute("update hosts set list = ?, mac = ?, list_sha = ?, key = "
                   "?, name = ? where id = ?",
                   (body, mac, sha, inner.text("key", 16, ""), inner.text(
                       "name", 255, pulse.host[:8]), pulse.number))
        self.touch(self.names[pulse.dash], "hosts", pulse.host)
        return sha

    def job_asked(self, text) -> dict:
        """A job as its host shows it."""
        import json
        if not isinstance(text, str) or not is_text(text):
            raise ValueError
        asked = Asked(json.loads(text), "a job")
        job = {name: asked.text(name, most, "") for name, most in (
            ("section", 1000), ("name", 1000), ("label", 200_000),
            ("words", 5000), ("command", 200_000), ("confirm", 10))}
        return {"user": asked.text("user", 256), "tag": asked.text("tag", 100),
                "timing": asked.text("when", 1000), "spec": text, **job}

    def keep_job(self, db, pulse: Pulse, job: dict, known) -> None:
        if known and known[1] == job["spec"] and not known[2]:
            return
        if known:
            number = known[0]
            db.execute("update jobs set gone = 0, " + ", ".join(
                f"{name} = ?" for name in job) + " where id = ?",
                (*job.values(), number))
        else:
            number = self.insert_job(db, pulse, job)
        self.touch(self.names[pulse.dash], "jobs", number)

    def insert_job(self, db, pulse: Pulse, job: dict) -> int:
        job = {"dash": pulse.dash, "host": pulse.number, **job}
        return db.execute(
            f"insert into jobs ({', '.join(job)}) values "
            f"({', '.join('?' * len(job))})", tuple(job.values())).lastrowid

    def drop_job(self, db, pulse: Pulse, job: int) -> None:
        """A job is in no tab any more; its runs stay."""
        db.execute("update jobs set gone = 1, next = null where id = ?",
                   (job,))
        dash, subject = self.names[pulse.dash], f"job:{job}"
        for kind, in db.execute("select kind from alerts where dash = ? and "
                                "subject = ?", (pulse.dash, subject)
                                ).fetchall():
            self.touch(dash, "alerts", (subject, kind))
        db.execute("delete from alerts where dash = ? and subject = ?",
                   (pulse.dash, subject))
        self.touch(dash, "jobs", job)

    def take_next(self, db, pulse: Pulse, given: dict, now: float) -> None:
        """When jobs start next: USER, newline, TAG -> time."""
        if len(given) > MOST_JOBS:
            raise Error(f"more than {MOST_JOBS:,} starts", "", 413)
        for whose in given:
            user, _, tag = whose.partition("\n")
            if not is_text(whose) or "\0" in whose:
                raise Error("the request: next names no job", "", 400)
            found = db.execute("select id, next, gone from jobs where host = "
                               "? and user = ? and tag = ?",
                               (pulse.number, user, tag)).fetchone()
            if found and not found[2]:
                self.set_next(db, pulse, found[0], found[1], Asked(
                    given, "next").number(whose, None), now)

    def set_next(self, db, pulse: Pulse, job: int, before: float | None,
                 due: float | None, now: float) -> None:
        if due == before:
            return
        db.execute("update jobs set next = ? where id = ?", (due, job))
        self.touch(self.names[pulse.dash], "jobs", job)
        if due is not None:
            self.arm("late", job, due + LATE_AFTER)
        if due is None or due > now:
            self.clear_alert(db, pulse.dash, f"job:{job}", "late",
                             self.name_of_job(db, job) + " is not late")

    def name_of_job(self, db, job: int) -> str:
        section, name, label, host = db.execute(
            "select j.section, j.name, j.label, h.name from jobs j join "
            "hosts h on h.id = j.host where j.id = ?", (job,)).fetchone()
        name = visible(name or label)[:100]
        return f"{visible(section)[:50]}/{name} on {host}" if section \
            else f"{name} on {host}"

    # --- its runs

    def record_asked(self, asked: Asked) -> dict:
        """A record of a run, as columns."""
        import json
        record = {name: asked.whole(name, default) for name, default in (
            ("change", MISSING), ("attempt", 1), ("count", 1), ("bytes", 0),
            ("size", 0))}
        record["size"] = min(record["size"], MOST_OUTPUT)
        for name in ("due", "asked", "started", "ended", "next"):
            record[name] = asked.number(name, None)
        for name in ("exit", "signal"):
            record[name] = asked.whole(name, None, -2**31, 2**32)
        for name, most in (("user", 256), ("tag", 100)):
            record[name] = asked.text(name, most)
        for name, most in (("section", 1000), ("name", 1000),
                           ("label", 200_000), ("trigger", 50)):
            record[name] = asked.text(name, most, "")
        record["reason"] = asked.text("reason", 200_000, "")[:2000]
        record["state"] = asked.choice("state", RUN_STATES)
        record["args"] = json.dumps(asked.texts("args", 2 * LONGEST_ARGS),
                                    ensure_ascii=False)
        record["cut"] = int(bool(asked.fields.get("cut")))
        nonce = asked.text("nonce", 32, "")
        record["nonce"] = nonce if is_hex(nonce, 32) else ""
        record["n"] = asked.whole("run", low=1)
        return record

    def take_records(self, db, pulse: Pulse, epoch: int, records: list,
                     now: float) -> int:
        """Keep records; the highest change of this epoch that is kept.

        Ids are given by the order of the host's numbers, which is that of
        the starts; what runs do to their jobs, in the order of changes."""
        found = db.execute("select acked from epochs where host = ? and "
                           "epoch = ?", (pulse.number, epoch)).fetchone()
        acked = found[0] if found else 0
        if not records:
            return acked
        kept = []
        for record in sorted(map(self.record_asked, records),
                             key=lambda each: (each["n"], each["change"])):
            if self.keep_record(db, pulse, epoch, record, now):
                kept.append(record)
        for record in sorted(kept, key=lambda each: each["change"]):
            self.run_changed(db, pulse, epoch, record, now)
        highest = max(acked, *(each.fields["change"] for each in records))
        if highest > acked:
            db.execute("insert or replace into epochs values (?, ?, ?)",
                       (pulse.number, epoch, highest))
        return highest

    def keep_record(self, db, pulse: Pulse, epoch: int, record: dict,
                    now: float) -> bool:
        """Keep a record, if it is newer than what is known of its run."""
        found = db.execute(
            "select id, change, state from runs where host = ? and epoch = ? "
            "and n = ?", (pulse.number, epoch, record["n"])).fetchone()
        going = record["state"] in GOING_ON
        if found and (record["change"] <= found[1] or (
                going and found[2] not in GOING_ON)):
            return False
        job = record["job"] = self.job_of(db, pulse, record)
        at = next((record[name] for name in ("started", "due", "asked",
                                             "ended")
                   if record[name] is not None), now)
        letter = letter_of(record["state"], record["exit"], record["signal"],
                           record["reason"])
        days = KEEP_OUTPUT_DAYS * (2 if letter in BAD_LETTERS else 1)
        until = min(record["ended"] or at, now) + days * DAY_SECONDS
        values = [record[name] for name in RECORD_FIELDS]
        record.update(at=at, letter=letter, going=going,
                      fresh=not found or found[2] in GOING_ON)
        if found:
            record["id"] = found[0]
            db.execute(UPDATE_RUN, (job, at, until, *values, found[0]))
        else:
            record["id"] = db.execute(INSERT_RUN, (
                pulse.dash, job, pulse.number, epoch, record["n"], at, until,
                *values)).lastrowid
        dash = self.names[pulse.dash]
        self.touch(dash, "runs", record["id"])
        self.touch(dash, "jobs", job)
        self.touch(dash, "live", record["id"])
        return True

    def job_of(self, db, pulse: Pulse, record: dict) -> int:
        """The job of a record; one that is unknown is made, for its tab may
        have changed before we saw the list."""
        found = db.execute("select id from jobs where host = ? and user = ? "
                           "and tag = ?", (pulse.number, record["user"],
                                           record["tag"])).fetchone()
        if found:
            return found[0]
        if db.execute("select count(*) from jobs where host = ?",
                      (pulse.number,)).fetchone()[0] >= 2 * MOST_JOBS:
            raise Error(f"the host has more than {2 * MOST_JOBS:,} jobs",
                        "forget some that are gone", 413)
        return self.insert_job(db, pulse, {"gone": 1, **{
            name: record[name] for name in ("user", "tag", "section", "name",
                                            "label")}})

    def run_changed(self, db, pulse: Pulse, epoch: int, record: dict,
                    now: float) -> None:
        """What a run does to its job: its next start, failures, alerts."""
        job = dict(zip(JOB_FIELDS, db.execute(
            f"select {JOB_COLUMNS} from jobs where id = ?",
            (record["job"],)).fetchone()))
        if record["nonce"]:
            self.settle_request(db, pulse, record["nonce"], "accepted", "",
                                epoch, record["n"])
        if not job["gone"] and "next" in record:
            self.set_next(db, pulse, job["id"], job["next"], record["next"],
                          now)
        kinds = {kind for kind, in db.execute(
            "select kind from alerts where dash = ? and subject = ?",
            (pulse.dash, f"job:{job['id']}"))}
        if record["state"] == "running":
            self.over(db, pulse, job, kinds & {"late"})
            self.arm("slow", record["id"], self.slow_at(pulse, job["id"],
                                                        record["started"]))
        elif record["fresh"] and not record["going"]:
            self.run_ended(db, pulse, job, record, kinds, now)

    def over(self, db, pulse: Pulse, job: dict, kinds) -> None:
        """Alerts that are true no more."""
        words = {"failed": "works again", "late": "has started",
                 "missed": "runs again", "slow": "has ended",
                 "fast": "takes its usual time again"}
        for kind in sorted(kinds):
            self.clear_alert(
                db, pulse.dash, f"job:{job['id']}", kind,
                f"{self.name_of_job(db, job['id'])} {words[kind]}")

    def run_ended(self, db, pulse: Pulse, job: dict, record: dict,
                  kinds: set, now: float) -> None:
        letter, end = record["letter"], record["ended"] or record["at"]
        if letter == "o":
            db.execute("update jobs set failures = 0, failing_since = null, "
                       "last_ok = ? where id = ?", (end, job["id"]))
            self.over(db, pulse, job, kinds & {"failed", "missed", "late",
                                               "slow"})
            self.judge_speed(db, pulse, job, record, kinds, now)
        elif letter in BAD_LETTERS:
            job["failures"] += 1
            db.execute("update jobs set failures = ?, failing_since = "
                       "coalesce(failing_since, ?), last_failed = ? where id "
                       "= ?", (job["failures"], end, record["id"], job["id"]))
            self.over(db, pulse, job, kinds & {"late", "slow"})
            if end > now - DAY_SECONDS:
                self.tell_failure(db, pulse, job, record, now)
        elif letter == "m" and record["at"] > now - DAY_SECONDS:
            self.over(db, pulse, job, kinds & {"late"})
            name = self.name_of_job(db, job["id"])
            self.raise_alert(db, pulse.dash, f"job:{job['id']}", "missed",
                             record["at"], f"{name} was missed",
                             f"{plural(record['count'], 'start')} missed: "
                             f"{record['reason'] or 'koid was not there'}")

    def tell_failure(self, db, pulse: Pulse, job: dict, record: dict,
                     now: float) -> None:
        """Once, with the number of failures since. If its output is still
        to come, it is told with that, or a little later without."""
        name = self.name_of_job(db, job["id"])
        how = record["reason"] or (
            f"signal {record['signal']}" if record["signal"] else
            f"exit status {record['exit']}" if record["state"] == "done"
            else record["state"])
        times = "" if job["failures"] == 1 else \
            f", {job['failures']} times in a row"
        self.raise_alert(
            db, pulse.dash, f"job:{job['id']}", "failed",
            record["ended"] or record["at"], f"{name} failed",
            f"{name}: {visible(how)[:500]}{times}",
            now + 15 if record["size"] else now, record["id"])

    def judge_speed(self, db, pulse: Pulse, job: dict, record: dict,
                    kinds: set, now: float) -> None:
        """Was a good run faster than it ever was? Then it did nothing."""
        limit = shortest_usual(self.face(job["id"]).strip)
        if record["started"] is None or record["ended"] is None:
            return
        took = record["ended"] - record["started"]
        if limit is None or took >= limit:
            self.over(db, pulse, job, kinds & {"fast"})
        elif record["at"] > now - DAY_SECONDS:
            name = self.name_of_job(db, job["id"])
            self.raise_alert(
                db, pulse.dash, f"job:{job['id']}", "fast", record["at"],
                f"{name} was suspiciously fast", f"{name} ended well after "
                f"{duration_text(took)}; it never took less than "
                f"{duration_text(limit * 5)} of late")

    def slow_at(self, pulse: Pulse, job: int,
                started: float | None) -> float | None:
        """When a run is slower than its job ever was; in our time."""
        limit = longest_usual(self.face(job).strip)
        return None if limit is None or started is None else \
            started + limit + self.skew_of(pulse)

    def skew_of(self, pulse: Pulse) -> float:
        """Our clock minus the host's, where that matters."""
        found = self.db.execute("select skew from hosts where id = ?",
                                (pulse.number,)).fetchone()
        return found[0] if found and abs(found[0]) > 5 else 0.0

    # --- what runs have written

    def take_output(self, db, pulse: Pulse, epoch: int, asked: Asked,
                    now: float) -> None:
        """Keep a piece of output, if it follows what is there."""
        found = db.execute(
            "select id, state, size, have from runs where host = ? and epoch "
            "= ? and n = ?", (pulse.number, epoch, asked.whole("run"))
            ).fetchone()
        data, at = asked.data("data", MOST_OUTPUT), asked.whole("at", 0)
        if not found or found[1] in GOING_ON:
            return
        run, _, size, have = found
        if asked.flag("gone", False):
            db.execute("update runs set size = have where id = ?", (run,))
            return self.output_ended(db, pulse, run, now)
        if at != have or have >= size:
            return
        data = data[:size - have]
        try:
            length, lines = whole_frames(data)
        except ValueError:
            length = -1
        if length < 0 or length < len(data) == size - have:
            db.execute("update runs set size = have where id = ?", (run,))
            return self.output_ended(db, pulse, run, now)
        if length:
            db.execute("insert into outputs (run, at, lines, data) values "
                       "(?, ?, ?, ?)", (run, have, lines, data[:length]))
            db.execute("update runs set have = ? where id = ?",
                       (have + length, run))
            self.touch(self.names[pulse.dash], "live", run)
            if have + length == size:
                self.output_ended(db, pulse, run, now)

    def output_ended(self, db, pulse: Pulse, run: int, now: float) -> None:
        """The output of a run is whole: its last line, and who waits."""
        row = dict(zip(RUN_FIELDS_KEPT, db.execute(
            f"select {RUN_COLUMNS} from runs where id = ?", (run,)
            ).fetchone()))
        tail = [data for data, in db.execute(
            "select data from outputs where run = ? order by at desc limit 3",
            (run,))]
        bad = letter_of(row["state"], row["exit"], row["signal"],
                        row["reason"]) in BAD_LETTERS
        line = last_line(b"".join(reversed(tail)), bad)
        db.execute("update runs set line = ? where id = ?", (line, run))
        if tail:
            db.execute("insert or ignore into unread values (?)", (run,))
        db.execute("update letters set due = ?, text = text || ? where run = "
                   "? and tries = 0 and due > ?",
                   (now, f"\n\n{line}" if line else "", run, now))
        dash = self.names[pulse.dash]
        for what, key in (("runs", run), ("jobs", row["job"]), ("live", run),
                          ("letters", run)):
            self.touch(dash, what, key)
        self.after.append(lambda: self.output_of_runs.end(run))

    def take_live(self, pulse: Pulse, asked: Asked) -> None:
        """Output of a run that goes on, for those who look at it."""
        data, at = asked.data("data", LIVE_ROOM), asked.whole("at", 0)
        run = self.output_of_runs.run_of(pulse.host, asked.whole("run"))
        if run is None:
            return
        try:
            length, _ = whole_frames(data)
        except ValueError:
            return
        if self.output_of_runs.put(run, at, data[:length],
                                   asked.flag("reset", False)):
            self.touch(self.names[pulse.dash], "live", run)

    def look(self, dash: str, run: int) -> None:
        """Somebody looks at what a run writes; its host is told when that
        is new. Raises Error if there is no such run."""
        found = self.read(self.going_run, dash, run)
        if found and self.output_of_runs.look(run, *found, self.clock.now()):
            self.write(self.wake, dash, found[0])

    def going_run(self, db, dash: str, run: int) -> tuple | None:
        """(host, its number for the run), while the run goes on."""
        row = self.row_of_run(db, dash, run)
        return (self.hosts.get(row["host"], ""), row["n"]) \
            if row["state"] in GOING_ON else None

    def wake(self, _db, dash: str, host: str) -> None:
        """Let a host's long poll look again."""
        self.touch(dash, "wake", host)

    def watched(self, host: str) -> dict[int, int]:
        """The runs of a host that are looked at -> bytes we have."""
        return self.output_of_runs.watched(host, self.clock.now())

    # --- requests: what people ask of hosts

    def request(self, db, dash: str, fields, now: float) -> dict:
        """Take a signed request for a host. We cannot judge its signature,
        and need not: the host does."""
        asked, number = Asked(fields), self.number_of(dash)
        pulse = self.pulse_of(dash, asked.hex("host", 32))
        body, mac = asked.text("body", LONGEST_BODY), asked.hex("mac", 64)
        try:
            said = Asked(strictly_parsed(body), "the signed request")
        except Forged as forged:
            raise Error(f"the signed request: {forged}", "", 400) from None
        nonce, exp = said.hex("nonce", 32), said.whole("exp") / 1000
        do = said.choice("do", ("run", "kill"))
        if said.text("host") != pulse.host or said.text("dash") != dash:
            raise Error("the request is signed for another host", "", 400)
        if not now < exp < now + LONGEST_LIFE / 1000 + 60:
            raise Error("the request has expired, or would live too long",
                        "is the clock of this machine right?", 400)
        before = db.execute("select body, mac, dash from requests where nonce"
                            " = ?", (nonce,)).fetchone()
        if before and before != (body, mac, number):
            raise Error("there was another request of this nonce", "", 409)
        if not before:
            if db.execute("select count(*) from requests where host = ? and "
                          "state = 'waiting'", (pulse.number,)).fetchone(
                          )[0] >= MOST_REQUESTS_WAITING:
                raise Error("too many requests wait for this host", "", 429)
            db.execute("insert into requests (dash, host, nonce, body, mac, "
                       "asked, exp) values (?, ?, ?, ?, ?, ?, ?)", (
                           number, pulse.number, nonce, body, mac, now, exp))
            self.audit_request(db, pulse, do, said, nonce, now)
            self.arm("request", nonce, exp + 5)
            self.touch(dash, "requests", nonce)
            self.touch(dash, "wake", pulse.host)
        return self.request_state(db, dash, nonce)

    def audit_request(self, db, pulse: Pulse, do: str, said: Asked,
                      nonce: str, now: float) -> None:
        import json
        if do == "run":
            row = db.execute(
                "select id, label from jobs where host = ? and user = ? and "
                "tag = ?", (pulse.number, said.text("user", 256),
                            said.text("tag", 100))).fetchone()
        else:
            row = db.execute(
                "select j.id, j.label from runs r join jobs j on j.id = r.job"
                " where r.host = ? and r.epoch = ? and r.n = ?", (
                    pulse.number, said.whole("epoch"), said.whole("run"))
                ).fetchone()
        args = {**said.texts("args", 2 * LONGEST_ARGS), **dict.fromkeys(
            said.texts("secrets", LONGEST_BODY), MASK.decode())}
        job, label = row or (None, "")
        self.record(db, pulse.dash, now, do, pulse.host, job=job, nonce=nonce,
                    label=label[:1000], args=json.dumps(args))

    def request_state(self, db, dash: str, nonce: str) -> dict:
        found = db.execute(
            "select state, reason, (select id from runs r where r.host = "
            "q.host and r.epoch = q.epoch and r.n = q.n) from requests q "
            "where nonce = ? and dash = ?", (nonce, self.number_of(dash))
            ).fetchone() if is_hex(nonce, 32) else None
        if not found:
            raise missing_thing("request")
        return dict(zip(("nonce", "state", "reason", "run"), (nonce, *found)))

    def hand_out(self, db, access: Access, now: float) -> dict:
        """What waits for a host. What was handed out and not answered is
        handed out again: the answer may have got lost, or the host."""
        pulse, requests = self.pulse_of(access.dash, access.host), []
        for nonce, body, mac in db.execute(
                "select nonce, body, mac from requests where host = ? and "
                "state = 'waiting' and exp > ? order by id",
                (pulse.number, now)):
            if self.handed.get(nonce, 0.0) <= now - HAND_OUT_AGAIN:
                self.handed[nonce] = now
                requests.append({"body": body, "mac": mac})
        return {"requests": requests, "live": {
            str(n): have for n, have in self.watched(access.host).items()}}

    def take_verdict(self, db, pulse: Pulse, epoch: int,
                     asked: Asked) -> None:
        self.settle_request(
            db, pulse, asked.hex("nonce", 32),
            asked.choice("verdict", ("accepted", "refused")),
            asked.text("reason", 2000, ""), epoch, asked.whole("run", None))

    def settle_request(self, db, pulse: Pulse, nonce: str, state: str,
                       reason: str, epoch: int, n: int | None) -> None:
        """What became of a request. A run that came of it is the last word;
        "expired" is only what we suppose."""
        done = db.execute(
            "update requests set state = ?1, reason = ?2, epoch = ?3, n = "
            "coalesce(?4, n) where host = ?5 and nonce = ?6 and (state in "
            "('waiting', 'expired') or (?1 = 'accepted' and (state <> ?1 or "
            "n is null and ?4 is not null)))",
            (state, reason, epoch, n, pulse.number, nonce)).rowcount
        self.handed.pop(nonce, None)
        if done:
            self.touch(self.names[pulse.dash], "requests", nonce)

    def look_at_request(self, db, nonce: str, now: float) -> None:
        """Has a request expired without an answer?"""
        found = db.execute("select dash, exp from requests where nonce = ? "
                           "and state = 'waiting'", (nonce,)).fetchone()
        if found and found[1] + 5 > now:
            self.arm("request", nonce, found[1] + 5)
        elif found:
            db.execute("update requests set state = 'expired', reason = "
                       "'the host did not answer' where nonce = ?", (nonce,))
            self.handed.pop(nonce, None)
            self.touch(self.names[found[0]], "requests", nonce)

    # --- watches

    def look_at_host(self, db, host: str, now: float) -> None:
        """Is a host silent? That is one alert; those of its jobs would say
        the same again."""
        pulse = self.pulses.get(host)
        if not pulse or pulse.silent or pulse.seen is None:
            return
        at = max(pulse.seen, pulse.since) + SILENT_AFTER
        row = db.execute("select name, token from hosts where id = ?",
                         (pulse.number,)).fetchone()
        if at > now:
            self.arm("host", host, at)
        elif row and row[1]:
            db.execute("update hosts set silent = 1, seen = ? where id = ?",
                       (pulse.seen, pulse.number))
            self.raise_alert(db, pulse.dash, f"host:{host}", "silent",
                             pulse.seen, f"{row[0]} is silent",
                             f"{row[0]} was last heard of at "
                             f"{rfc3339(pulse.seen)}; what its jobs do is "
                             "unknown until it is back")
            self.after.append(lambda: setattr(pulse, "silent", True))
            dash = self.names[pulse.dash]
            self.touch(dash, "hosts", host)
            self.touch(dash, "jobs", *(job for job, in db.execute(
                "select id from jobs where host = ?", (pulse.number,))))

    def look_at_late(self, db, job: int, now: float) -> None:
        """Should a job have started by now, and its host, which is there,
        says nothing of it?"""
        row = db.execute("select host, next from jobs where id = ? and gone "
                         "= 0", (job,)).fetchone()
        pulse = row and self.pulses.get(self.hosts.get(row[0], ""))
        if not pulse or row[1] is None or pulse.silent or pulse.seen is None:
            return
        at = max(row[1] + self.skew_of(pulse) + LATE_AFTER,
                 pulse.back + SETTLED_AFTER)
        if at > now:
            return self.arm("late", job, at)
        if now - pulse.seen > SILENT_AFTER / 2:     # is it the host perhaps?
            return self.arm("late", job, now + SILENT_AFTER / 6)
        newest = db.execute("select max(due) from (select due from runs where "
                            "job = ? order by id desc limit 5)", (job,)
                            ).fetchone()[0]
        if newest is None or newest < row[1]:
            name = self.name_of_job(db, job)
            self.raise_alert(db, pulse.dash, f"job:{job}", "late", row[1],
                             f"{name} is late", f"{name} should have started "
                             f"at {rfc3339(row[1])}")
            self.touch(self.names[pulse.dash], "jobs", job)

    def look_at_slow(self, db, run: int, now: float) -> None:
        """Does a run take longer than its job ever took?"""
        row = db.execute("select job, host, state, started from runs where id "
                         "= ?", (run,)).fetchone()
        pulse = row and self.pulses.get(self.hosts.get(row[1], ""))
        if not pulse or row[2] != "running" or pulse.silent:
            return
        at = self.slow_at(pulse, row[0], row[3])
        if at is None or at > now:
            return self.arm("slow", run, at)
        name = self.name_of_job(db, row[0])
        self.raise_alert(
            db, pulse.dash, f"job:{row[0]}", "slow", row[3],
            f"{name} takes long", f"{name} has been running for "
            f"{duration_text(int(now - row[3]))}, three times as long as "
            "it ever did of late")
        self.touch(self.names[pulse.dash], "jobs", row[0])

    def snooze(self, db, dash: str, fields, now: float) -> dict:
        """Tell nothing of a subject until a time; it is shown as before."""
        asked, number = Asked(fields), self.number_of(dash)
        subject, until = asked.text("subject", 100), asked.number("until")
        kind, _, key = subject.partition(":")
        if kind == "host":
            self.pulse_of(dash, key)
        elif kind == "check":
            self.whole_check(db, dash, key)
        elif kind != "job" or not (key.isascii() and key.isdigit()):
            raise missing_thing("subject")
        else:
            self.row_of_job(db, dash, int(key[:18]))
        db.execute("delete from snoozes where dash = ? and subject = ?",
                   (number, subject))
        if until > now:
            db.execute("insert into snoozes values (?, ?, ?)",
                       (number, subject, until))
            self.arm("snooze", (number, subject), until)
        else:
            self.tell_untold(db, number, subject)
        self.record(db, number, now, "snooze", key if kind == "host" else "",
                    job=int(key) if kind == "job" else None, label=subject,
                    state="on" if until > now else "off")
        self.touch(dash, {"job": "jobs", "check": "checks", "host": "hosts"}
                   [kind], int(key) if kind == "job" else key)
        return {}

    def look_at_snooze(self, db, key: tuple, now: float) -> None:
        """A snooze that is over: what stands still is told now."""
        found = db.execute("select until from snoozes where dash = ? and "
                           "subject = ?", key).fetchone()
        if found and found[0] > now:
            self.arm("snooze", key, found[0])
        elif found:
            db.execute("delete from snoozes where dash = ? and subject = ?",
                       key)
            self.tell_untold(db, *key)

    def tell_untold(self, db, number: int, subject: str) -> None:
        for alert, kind, text in db.execute(
                "select id, kind, text from alerts where dash = ? and "
                "subject = ? and not told", (number, subject)).fetchall():
            self.spread(db, number, alert, text.partition("\n")[0][:200],
                        text, subject, kind, False)

    # --- what is shown

    def load(self) -> None:
        """Besides, all that may be due at some time."""
        super().load()
        now = self.clock.now()
        for host, pulse in self.pulses.items():
            if pulse.seen is not None:
                self.arm("host", host, now + SILENT_AFTER)
        for kind, statement in (
                ("late", "select id, next from jobs where next is not null "
                         "and gone = 0"),
                ("slow", "select id, 0 from runs where state = 'running' and "
                         "dash in (select id from dashboards)"),
                ("check", "select id, 0 from checks where status <> 'down'"),
                ("request", "select nonce, exp + 5 from requests where state "
                            "= 'waiting'")):
            for key, at in self.db.execute(statement):
                self.arm(kind, key, max(at, now + (
                    SETTLED_AFTER if kind in ("late", "slow") else 0)))
        for number, subject, until in self.db.execute(
                "select dash, subject, until from snoozes"):
            self.arm("snooze", (number, subject), until)

    def face(self, job: int) -> Face:
        """A job's face; made by the first who looks. Each statement of a
        reader sees what was committed before it, and what is committed
        after is put into the faces under this lock: so none goes stale."""
        with self.faces_lock:
            face = self.faces.get(job)
            if face is None:
                rows = self.reader().execute(
                    f"select {RUN_COLUMNS} from runs where job = ? order by "
                    "id desc limit ?", (job, STRIP)).fetchall()
                face = self.faces[job] = Face([
                    dict(zip(RUN_FIELDS_KEPT, row)) for row in rows[::-1]])
            return face

    def settled(self) -> None:
        """Put what was committed into the faces."""
        for changed in self.touched.values():
            for run in changed.get("runs", ()):
                row = self.db.execute(f"select {RUN_COLUMNS} from runs where "
                                      "id = ?", (run,)).fetchone()
                with self.faces_lock:   # even to see whether there is one
                    face = row and self.faces.get(row[1])
                    if face:
                        face.put(dict(zip(RUN_FIELDS_KEPT, row)))

    def described(self, dash: str, changed: dict) -> dict:
        """A line of the stream."""
        db, now, number = self.db, self.clock.now(), self.numbers[dash]
        lines, snoozed = {"gone": {}}, self.snoozed(db, number)
        makers = {
            "runs": lambda run: self.run_shape(self.row_of_run(
                db, dash, run)),
            "jobs": lambda job: self.job_shape(db, self.row_of_job(
                db, dash, job), snoozed),
            "hosts": lambda host: self.host_shape(rows_of(
                db, "select * from hosts where id = ?", self.pulse_of(
                    dash, host).number)[0], now),
            "checks": lambda uuid: self.check_shape(db, self.whole_check(
                db, dash, uuid), snoozed, now),
            "requests": lambda nonce: self.request_state(db, dash, nonce),
            "alerts": lambda key: rows_of(
                db, "select subject, kind, since, text from alerts where "
                "dash = ? and subject = ? and kind = ?", number, *key)[0]}
        for what, make in makers.items():
            for key in changed.get(what, ()):
                try:
                    lines.setdefault(what, []).append(make(key))
                except (Error, IndexError):
                    lines["gone"].setdefault(what, []).append(
                        "\n".join(key) if what == "alerts" else key)
        if not lines["gone"]:
            del lines["gone"]
        return {what: found for what, found in lines.items() if found}

    def snoozed(self, db, number: int) -> dict[str, float]:
        now = self.clock.now()
        return {subject: until for subject, until in db.execute(
            "select subject, until from snoozes where dash = ?", (number,))
            if until > now}

    def row_of_job(self, db, dash: str, job: int) -> dict:
        row = db.execute(f"select {JOB_COLUMNS} from jobs where id = ? and "
                         "dash = ? and gone < 2", (job, self.number_of(dash))
                         ).fetchone() if 0 <= job <= LARGEST_WHOLE else None
        if not row:
            raise missing_thing("job")
        return dict(zip(JOB_FIELDS, row))

    def row_of_run(self, db, dash: str, run: int) -> dict:
        row = db.execute(
            f"select {RUN_COLUMNS} from runs where id = ? and dash = ? and "
            "(select gone from jobs where id = job) < 2",
            (run, self.number_of(dash))
            ).fetchone() if 0 <= run <= LARGEST_WHOLE else None
        if not row:
            raise missing_thing("run")
        return dict(zip(RUN_FIELDS_KEPT, row))

    def run_shape(self, row: dict) -> dict:
        import json
        return {**row, "host": self.hosts.get(row["host"], ""),
                "cut": bool(row["cut"]), "args": json.loads(row["args"])}

    def host_shape(self, row: dict, now: float) -> dict:
        import json
        pulse = self.pulses.get(row["host"]) or Pulse(row, now)
        state = "left" if not row["token"] else "new" if pulse.seen is None \
            else "silent" if pulse.silent else "twin" if pulse.twin and \
            pulse.twin > now - TWIN_SHOWN else "up"
        return {"id": row["host"], "name": row["name"], "seen": pulse.seen,
                "state": state, "since": row["made"], **{
                    name: row[name] for name in ("offset", "zone", "skew",
                                                 "version", "key")},
                "troubles": json.loads(row["troubles"])}

    def job_shape(self, db, job: dict, snoozed: dict) -> dict:
        host = self.hosts.get(job["host"], "")
        with self.faces_lock:
            face = self.face(job["id"])
            strip, going, last = list(face.strip), face.going[:], face.last
        kinds = self.kinds_of_alerts(db, job)
        failing = None
        if job["failures"]:
            line = db.execute("select line from runs where id = ?",
                              (job["last_failed"],)).fetchone()
            failing = {"since": job["failing_since"],
                       "count": job["failures"], "last_ok": job["last_ok"],
                       "line": line[0] if line else ""}
        return {
            **{name: job[name] for name in ("id", "user", "tag", "section",
                                            "name", "label", "words",
                                            "command", "next", "confirm")},
            "host": host, "when": job["timing"], "gone": bool(job["gone"]),
            "manual": job["timing"] == "@manual", "running": going,
            "state": self.state_of_job(host, kinds, going, last),
            "last": last and self.run_shape(last), "strip": strip,
            "failing": failing, "usual": usual_of(strip),
            "snoozed": snoozed.get(f"job:{job['id']}", 0)}

    def kinds_of_alerts(self, db, job: dict) -> set:
        return {kind for kind, in db.execute(
            "select kind from alerts where dash = ? and subject = ?",
            (job["dash"], f"job:{job['id']}"))}

    def state_of_job(self, host: str, kinds: set, going: list,
                     last: dict | None) -> str:
        pulse = self.pulses.get(host)
        if pulse and pulse.silent:
            return "unknown"
        if going:
            return "running"
        if "late" in kinds:
            return "late"
        if not last:
            return "new"
        letter = letter_of(last["state"], last["exit"], last["signal"],
                           last["reason"])
        return {"o": "ok", "m": "missed", "s": "skipped"}.get(letter,
                                                              "failed")

    def state(self, db, access: Access, now: float) -> dict:
        """All that the overview shows. The number of the newest change is
        read first: what happens meanwhile is told once more."""
        dash, number = access.dash, self.number_of(access.dash)
        seq, operator = self.seq(dash), access.role == "operator"
        about = rows_of(db, "select dash id, salt, rounds, ping_key, "
                        "badge_key from dashboards where id = ?", number)[0]
        snoozed = self.snoozed(db, number)
        return {
            "seq": seq, "now": now, "version": VERSION, "role": access.role,
            "dash": about if operator else {**about, "ping_key": ""},
            "hosts": [self.host_shape(row, now) for row in rows_of(
                db, "select * from hosts where dash = ? and gone < 2 order "
                "by name, id", number)],
            "jobs": [self.job_shape(db, dict(zip(JOB_FIELDS, row)), snoozed)
                     for row in db.execute(
                         f"select {JOB_COLUMNS} from jobs where dash = ? and "
                         "gone < 2 order by id", (number,)).fetchall()],
            "checks": [self.check_shape(db, dict(zip(CHECK_FIELDS, row)),
                                        snoozed, now)
                       for row in db.execute(
                           f"select {CHECK_COLUMNS} from checks where dash = "
                           "? order by id", (number,)).fetchall()],
            "alerts": rows_of(db, "select subject, kind, since, text from "
                              "alerts where dash = ? order by since desc",
                              number),
            "troubles": self.troubles}

    def runs(self, db, dash: str, job: int, before: int | None = None,
             limit: int = 100) -> dict:
        self.row_of_job(db, dash, job)
        limit = min(max(limit, 1), 1000)
        rows = db.execute(
            f"select {RUN_COLUMNS} from runs where job = ? and id < ? order "
            "by id desc limit ?", (job, LARGEST_WHOLE if before is None
                                   else before, limit + 1)).fetchall()
        return {"runs": [self.run_shape(dict(zip(RUN_FIELDS_KEPT, row)))
                         for row in rows[:limit]], "more": len(rows) > limit}

    def run(self, db, dash: str, run: int) -> dict:
        row = self.row_of_run(db, dash, run)
        job = self.row_of_job(db, dash, row["job"])

        def near(where: str) -> int | None:
            found = db.execute(f"select id from runs where job = ? and "
                               f"{where} limit 1", (job["id"], run)
                               ).fetchone()
            return found and found[0]

        return {"run": self.run_shape(row), "job": self.job_shape(
            db, job, self.snoozed(db, job["dash"])),
            "good": near("state = 'done' and exit = 0 and id < ? order by id "
                         "desc"),
            "older": near("id < ? order by id desc"),
            "newer": near("id > ? order by id")}

    def chunks(self, db, dash: str, run: int) -> dict:
        row, live = self.row_of_run(db, dash, run), \
            self.output_of_runs.get(run)
        found = [list(chunk) for chunk in db.execute(
            "select at, length(data), lines from outputs where run = ? order "
            "by at", (run,))]
        if live and not found:
            at, data = live
            found = [[at, len(data), whole_frames(data)[1]]] if data else []
        return {"size": sum(found[-1][:2]) if found else 0,
                "live": self.goes_on(row), "chunks": found}

    def goes_on(self, row: dict) -> bool:
        """Will there be more of a run's output?"""
        return row["state"] in GOING_ON or row["have"] < row["size"]

    def output(self, db, dash: str, run: int, at: int, most: int) -> tuple:
        """(frames, size, whether there will be more, where they begin)."""
        row, live = self.row_of_run(db, dash, run), \
            self.output_of_runs.get(run)
        most, at = min(max(most, 1), 2**20), max(at, 0)
        if live and not row["have"]:
            begin, data = live
            at = max(at, begin)
            return (cut_to_frames(data[at - begin:], most),
                    begin + len(data), self.goes_on(row), at)
        found, size = b"", 0
        for begin, data in db.execute(
                "select at, data from outputs where run = ?1 and at >= "
                "coalesce((select max(at) from outputs where run = ?1 and at "
                "<= ?2), 0) order by at", (run, min(at, LARGEST_WHOLE))):
            found += data[max(at - begin, 0):]
            if len(found) > most:
                break
        return (cut_to_frames(found, most), row["have"], self.goes_on(row),
                at)

    def raw(self, db, dash: str, run: int) -> bytes:
        """What a job wrote, both streams, as cron would mail it."""
        self.row_of_run(db, dash, run)
        found = b"".join(data for data, in db.execute(
            "select data from outputs where run = ? order by at", (run,)))
        live = self.output_of_runs.get(run)
        return output_text(found or (live[1] if live else b""))

    def day(self, db, dash: str, begin: float, end: float) -> dict:
        """The runs of a time as bars, for all jobs at once. What began
        before is there too, if it reached into it. When there is too much,
        `to` says how far the answer goes."""
        number, rows = self.number_of(dash), {}
        count = reached = 0
        for run, job, at, ended, due, letter in self.bars(
                db, number, begin, end):
            count, reached = count + 1, at
            if count > MOST_BARS:
                end = reached
                break
            row = rows.setdefault(job, {"job": job, "bars": [],
                                        "missing": []})
            if letter == "m":
                row["missing"].append([at if due is None else due, run])
            elif letter != "q":
                row["bars"].append([at, ended, letter, run])
        return {"rows": list(rows.values()), "from": begin, "to": end}

    def bars(self, db, number: int, begin: float, end: float):
        """Runs in order of time: first those that began before it and
        reach into it; each kind has an index of its own."""
        columns = "select id, job, at, ended, due, state, exit, signal, " \
            "reason from runs "
        for statement, values in (
                (columns + "indexed by runs_going where dash = ? and state "
                 "in ('queued', 'running') and at < ? order by at",
                 (number, begin)),
                (columns + "where dash = ? and at >= ? and at < ? and ended "
                 "- started > 3600 and ended > ? order by at",
                 (number, begin - LONGEST_BAR, begin, begin)),
                (columns + "where dash = ? and at >= ? and at < ? and ended "
                 "> ? and ended - started <= 3600 order by at",
                 (number, begin - 3600, begin, begin)),
                (columns + "where dash = ? and at >= ? and at < ? order by "
                 "at", (number, begin, end))):
            for run, job, at, ended, due, *how in db.execute(statement,
                                                             values):
                yield run, job, at, ended, due, letter_of(*how)


ALERT_STATES = ("failed", "late", "missed", "unknown")
BADGES = {"ok": "#2a8a3e", "up": "#2a8a3e", "running": "#2a8a3e",
          "new": "#77777a", "paused": "#77777a", "skipped": "#77777a",
          "unknown": "#77777a", "late": "#b87800", "grace": "#b87800",
          "missed": "#b87800", "failed": "#c32b2b", "down": "#c32b2b"}
STRIPPED = r"\x1b\[[0-?]*[ -/]*[@-~]"
LONGEST_BAR = 30 * DAY_SECONDS
PIECE, MOST_READ = 8_192, 2**18     # letters of a step, and of a run
MOST_PIECES = 64                # of a run: each is half full at least


class Hub(Fleet):
    """The dashboard. What it forgets, and how things are found in it."""

    def __init__(self, path: str, clock: Clock | None = None, zone=None):
        super().__init__(path, clock, zone)
        self.index = ""         # how texts are found: trigram, words, or ""
        self.round = 0          # the job that is tidied up next
        self.chore(600.0, self.warm_up)
        self.chore(5.0, self.read_output)
        self.chore(60.0, self.forget_old)
        self.chore(300.0, self.give_back)

    def load(self) -> None:
        """Besides, the index of the outputs, if SQLite can keep one."""
        import sqlite3
        for name, how in (("trigram", "trigram"), ("words", "unicode61")):
            found = self.one("select sql from sqlite_master where name = "
                             "'found'")
            try:
                if not found:
                    self.db.execute("create virtual table found using fts5("
                                    f"text, content='', tokenize='{how}')")
                if not found or how in found:
                    self.one("select rowid from found limit 1")
                    self.index = name
                    break
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise
        super().load()

    def warm_up(self, db) -> bool:
        """Make the faces of some jobs, before anybody asks for them."""
        cold = [job for job, in db.execute("select id from jobs where gone = "
                                           "0 limit 2000")
                if job not in self.faces][:20]
        for job in cold:
            self.face(job)
        return bool(cold)

    # --- finding

    def read_output(self, db) -> bool:
        """Take a piece of one output into the index: small steps, as pings
        wait behind each."""
        found = db.execute("select u.run, r.pieces, r.have from unread u left "
                           "join runs r on r.id = u.run limit 1").fetchone()
        if not found or not self.index or self.full:
            return False        # what little room there is, is to forget
        run, pieces, have = found
        parts = text_pieces(self.frames_of(db, run)) if have else []
        if pieces is not None and pieces < len(parts):
            self.change_index(db, "insert into found (rowid, text) values "
                              "(?, ?)", run * MOST_PIECES + pieces,
                              parts[pieces])
            db.execute("update runs set pieces = pieces + 1 where id = ?",
                       (run,))
        if pieces is None or pieces + 1 >= len(parts):
            db.execute("delete from unread where run = ?", (run,))
        return True

    def change_index(self, db, statement: str, *values) -> None:
        """An index that is damaged is no reason to end: without it things
        are found all the same, only later."""
        import sqlite3
        try:
            if self.index:
                db.execute(statement, values)
        except sqlite3.DatabaseError as error:
            if not db.in_transaction or "malformed" not in str(error):
                raise
            self.index = ""
            self.faults["index"] = "the index of outputs is damaged: search " \
                "goes on without it, and is slow"

    def frames_of(self, db, run: int) -> bytes:
        return b"".join(data for data, in db.execute(
            "select data from outputs where run = ? order by at", (run,)))

    def search(self, db, dash: str, text: str, job: int | None = None,
               before: int | None = None) -> dict:
        """Runs whose output holds a text, the newest first: each with the
        first line that does. For a limited time; then `more` says so."""
        import sqlite3
        number, text = self.number_of(dash), text.strip()[:200]
        if len(text) < 2 or not is_text(text) or "\0" in text:
            raise Error("two letters at least are needed", "", 400)
        if job is not None:
            self.row_of_job(db, dash, job)
        hits, until = [], time.monotonic() + READ_TIME
        more, seen = False, None
        db.set_progress_handler(
            lambda: int(time.monotonic() > until), 10_000)
        try:
            for run in self.candidates(db, number, text, job, before):
                if len(hits) == 20 or time.monotonic() > until:
                    more = True
                    break
                hit = run != seen and self.line_with(db, run, text)
                seen = run
                if hit:
                    hits.append({"run": self.run_shape(self.row_of_run(
                        db, dash, run)), "line": hit[0], "at": hit[1]})
        except sqlite3.DatabaseError as error:
            if "interrupted" not in str(error):
                self.index = self.index if "malformed" not in str(error) \
                    else ""
                raise
            more = True
        finally:
            db.set_progress_handler(None, 0)
        return {"hits": hits, "more": more}

    def candidates(self, db, number: int, text: str, job: int | None,
                   before: int | None):
        """Runs that may hold a text, the newest first; by the index if it
        can tell, and else all that have output."""
        last = LARGEST_WHOLE // MOST_PIECES if before is None else before
        if self.index and (len(text) > 2 or self.index == "words"):
            quoted = '"' + text.replace('"', '""') + '"'
            if self.index == "words":
                quoted += "*"
            pending = [run for run, in db.execute(
                "select u.run from unread u cross join runs r where r.id = "
                "u.run and u.run < ?1 and r.dash = ?2 and (?3 is null or job "
                "= ?3) order by u.run desc limit 100", (last, number, job))]
            rows = db.execute(
                "select r.id from found f cross join runs r where r.id = "
                "f.rowid / ?1 and found match ?2 and f.rowid < ?3 and r.dash "
                "= ?4 and (?5 is null or job = ?5) order by f.rowid desc",
                (MOST_PIECES, quoted, last * MOST_PIECES, number, job))
            import heapq
            return heapq.merge(pending, (run for run, in rows), reverse=True)
        return (run for run, in db.execute(
            "select distinct o.run from outputs o cross join runs r where "
            "o.run < ?1 and r.id = o.run and r.dash = ?2 and (?3 is null or "
            "r.job = ?3) order by o.run desc", (last, number, job)))

    def line_with(self, db, run: int, text: str) -> tuple | None:
        """(the first line with a text, where its chunk begins)."""
        import re
        wanted = re.compile(re.escape(text), re.I)
        for at, data in db.execute("select at, data from outputs where run = "
                                   "? order by at", (run,)):
            found = re.sub(STRIPPED, "", output_text(data).decode(
                "utf-8", "replace"))
            match = wanted.search(found)
            if match:
                begin = found.rfind("\n", 0, match.start()) + 1
                begin = max(begin, match.start() - 150)
                end = found.find("\n", match.end())
                end = len(found) if end < 0 else end
                return visible(found[begin:min(end, begin + 400)]), at
        return None

    # --- forgetting, in small steps

    def forget(self, db, dash: str, fields, now: float) -> dict:
        """Remove a job that is in no tab, or a host, with all its runs:
        they are hidden at once, and removed step by step."""
        asked, number = Asked(fields), self.number_of(dash)
        if "host" in asked.fields:
            host = asked.hex("host", 32)
            self.remove_host(db, dash, host, now)
            key = self.pulse_of(dash, host).number
            db.execute("update hosts set gone = 2, host = host || '-' || id "
                       "where id = ?", (key,))
            jobs = [job for job, in db.execute(
                "select id from jobs where host = ?", (key,))]
            self.touch(dash, "hosts", host)
        else:
            job = self.row_of_job(db, dash, asked.whole("job"))
            if not job["gone"]:
                raise Error("the job is in a tab, and would come back",
                            "take it out of its tab first", 409)
            jobs = [job["id"]]
            self.record(db, number, now, "forget", self.hosts.get(
                job["host"], ""), job=job["id"], label=job["label"][:1000])
        for key in jobs:
            self.drop_job(db, self.pulse_of(dash, asked.fields["host"])
                          if "host" in asked.fields else
                          self.pulses[self.hosts[job["host"]]], key)
            db.execute("update jobs set gone = 2, tag = tag || '-' || id "
                       "where id = ?", (key,))
        return {}

    def forget_old(self, db) -> bool:
        """One step: what is too old or too much. True if there may be
        more."""
        now = self.clock.now()
        removed = 0
        for step in (self.forget_jobs, self.forget_runs, self.forget_outputs,
                     self.forget_rows):
            removed += step(db, now)
            if removed >= self.at_once // 2:
                return True
        return removed > 0 or self.thin_out(db)

    def forget_jobs(self, db, _now: float) -> int:
        """The runs of jobs that people have had removed."""
        found = db.execute("select id from jobs where gone = 2 limit 1"
                           ).fetchone()
        if not found:
            for host, in db.execute("select id from hosts where gone = 2"
                                    ).fetchall():
                for statement in ("delete from epochs where host = ?",
                                  "delete from requests where host = ?",
                                  "delete from hosts where id = ?"):
                    db.execute(statement, (host,))
                return 1
            return 0
        runs = [run for run, in db.execute(
            "select id from runs where job = ? limit ?",
            (found[0], self.at_once))]
        self.remove_runs(db, runs)
        if len(runs) < self.at_once:
            db.execute("delete from jobs where id = ?", found)
            self.after.append(lambda: self.faces.pop(found[0], None))
        return len(runs) + 1

    def forget_runs(self, db, now: float) -> int:
        """Runs that are too old."""
        runs = []
        for number in self.names:
            runs += db.execute(
                "select id, job from runs where dash = ? and at < ? and state"
                " not in ('queued', 'running') limit ?",
                (number, now - KEEP_RUN_DAYS * DAY_SECONDS,
                 self.at_once)).fetchall()
        self.remove_runs(db, [run for run, _ in runs])
        for job in {job for _, job in runs}:
            self.after.append(lambda job=job: self.faces.pop(job, None))
        return len(runs)

    def thin_out(self, db) -> bool:
        """Jobs with too many runs; one job a step, in turn."""
        found = db.execute("select id from jobs where id > ? order by id "
                           "limit 1", (self.round,)).fetchone()
        if not found:
            self.round = 0
            return False
        old = db.execute("select id from runs where job = ? order by id desc "
                         "limit 1 offset ?", (found[0], KEEP_RUNS)).fetchone()
        runs = [] if not old else [run for run, in db.execute(
            "select id from runs where job = ? and id <= ? and state not in "
            "('queued', 'running') order by id limit ?",
            (found[0], old[0], self.at_once))]
        self.remove_runs(db, runs)
        if len(runs) < self.at_once:
            self.after.append(lambda: setattr(self, "round", found[0]))
        return True

    def remove_runs(self, db, runs: list[int]) -> None:
        for run in runs:
            self.remove_output(db, run)
            db.execute("delete from runs where id = ?", (run,))

    def remove_output(self, db, run: int) -> int:
        """The output of a run, and its pieces in the index, which must be
        named to be removed. The bytes removed."""
        frames = self.frames_of(db, run)
        found = db.execute("select pieces from runs where id = ?", (run,)
                           ).fetchone()
        if found and found[0] and self.index:
            for number, text in enumerate(text_pieces(frames)[:found[0]]):
                self.change_index(
                    db, "insert into found (found, rowid, text) values "
                    "('delete', ?, ?)", run * MOST_PIECES + number, text)
        if frames:
            db.execute("delete from outputs where run = ?", (run,))
            db.execute("delete from unread where run = ?", (run,))
        return len(frames)

    def forget_outputs(self, db, now: float) -> int:
        """Outputs that are too old; few at a time, for they are large."""
        size = count = 0
        for run, in db.execute("select id from runs where have > 0 and until "
                               "< ? order by until limit 200", (now,)
                               ).fetchall():
            size, count = size + self.remove_output(db, run), count + 1
            db.execute("update runs set have = 0, size = 0, pieces = 0 where "
                       "id = ?", (run,))
            if size > (2**20 if not self.full else 2**17):
                break
        return count

    def forget_rows(self, db, now: float) -> int:
        """Rows of the smaller tables."""
        removed = 0
        for table, column, days, more in (
                ("audit", "at", KEEP_AUDIT_DAYS, "dash in (select id from "
                                                 "dashboards) and "),
                ("flips", "at", KEEP_EVENT_DAYS, ""),
                ("requests", "asked", KEEP_EVENT_DAYS, ""),
                ("letters", "at", KEEP_EVENT_DAYS, "")):
            removed += db.execute(
                f"delete from {table} where id in (select id from {table} "
                f"where {more}{column} < ? limit ?)",
                (now - days * DAY_SECONDS, self.at_once)).rowcount
        return removed

    def give_back(self, db) -> bool:
        """Pages that nobody needs; a few at a time."""
        free = db.execute("pragma freelist_count").fetchone()[0]
        more = free > FREE_PAGES and not self.full
        if more:
            self.after.append(lambda: self.vacuum(200))
        return more

    # --- for other programs

    def metrics(self, db, dash: str, now: float) -> str:
        """The state in Prometheus' text format."""
        state = self.state(db, Access("viewer", dash), now)
        names = {host["id"]: host["name"] for host in state["hosts"]}
        rows: dict[str, list] = {name: [] for name in METRICS}

        def add(name: str, value, /, **labels) -> None:
            if value is not None:
                text = ",".join(f'{key}="{label_text(label)}"'
                                for key, label in labels.items())
                rows[name].append(f"{name}{{{text}}} {value:.15g}")

        for host in state["hosts"]:
            add("koi_host_up", host["state"] in ("up", "twin"),
                host=host["name"])
            add("koi_host_seen_timestamp_seconds", host["seen"],
                host=host["name"])
        for job in state["jobs"]:
            labels = {"host": names.get(job["host"], ""), "user": job["user"],
                      "section": job["section"], "tag": job["tag"],
                      "job": job["name"] or job["label"]}
            self.measure_job(job, add, labels)
        for check in state["checks"]:
            labels = {"name": check["name"], "slug": check["slug"]}
            add("koi_check_up", check["state"] in ("up", "grace", "new"),
                **labels)
            add("koi_check_last_ping_timestamp_seconds", check["last_ping"],
                **labels)
        for alert in state["alerts"]:
            add("koi_alert", 1, subject=alert["subject"], kind=alert["kind"])
        return "".join(
            f"# HELP {name} {text}\n# TYPE {name} gauge\n"
            + "".join(f"{row}\n" for row in rows[name])
            for name, text in METRICS.items() if rows[name])

    def measure_job(self, job: dict, add, labels: dict) -> None:
        last, took = job["last"], None
        if last and last["ended"] is not None and last["started"] is not None:
            took = last["ended"] - last["started"]
        add("koi_job_ok", job["state"] not in ALERT_STATES, **labels)
        add("koi_job_running", len(job["running"]), **labels)
        add("koi_job_failures", job["failing"]["count"] if job["failing"]
            else 0, **labels)
        add("koi_job_last_end_timestamp_seconds", last and last["ended"],
            **labels)
        add("koi_job_last_duration_seconds", took, **labels)
        add("koi_job_last_exit_status", last and last["exit"], **labels)
        add("koi_job_next_start_timestamp_seconds", job["next"], **labels)

    def badge(self, db, key: str, name: str, now: float) -> dict:
        """A word and a colour, for who has the key: it opens no more."""
        found = db.execute("select id, dash from dashboards where badge_key "
                           "= ?", (key,)).fetchone()
        if not found:
            raise missing_thing("badge")
        number, dash = found
        if name == "all":
            count = db.execute("select count(*) from alerts where dash = ?",
                               (number,)).fetchone()[0]
            return {"label": "koi", "message": plural(count, "alert")
                    if count else "ok", "color": BADGES["failed" if count
                                                        else "ok"]}
        row = db.execute(f"select {CHECK_COLUMNS} from checks where dash = ? "
                         "and slug = ?", (number, name)).fetchone()
        if row:
            check = self.check_shape(db, dict(zip(CHECK_FIELDS, row)), {},
                                     now)
            return {"label": check["name"] or name, "message": check["state"],
                    "color": BADGES[check["state"]]}
        row = db.execute(f"select {JOB_COLUMNS} from jobs where dash = ? and "
                         "tag = ? and gone < 2", (number, name)).fetchone()
        if not row:
            raise missing_thing("badge")
        job = self.job_shape(db, dict(zip(JOB_FIELDS, row)), {})
        return {"label": job["name"] or job["label"],
                "message": job["state"], "color": BADGES[job["state"]]}

    # --- letters: what is to be told (class Herald does)

    def letters_due(self, db, now: float) -> list[dict]:
        """What is to be told now, with the channel it goes to."""
        return rows_of(
            db, "select l.id, l.key, l.at, l.tries, l.title, l.text, "
            "l.subject, l.kind, l.over, l.channel, c.kind way, c.target, "
            "d.dash from letters l join channels c on c.id = l.channel join "
            "dashboards d on d.id = l.dash where l.due <= ? order by l.id "
            "limit 100", now)

    def letter_told(self, db, letter: int, error: str, now: float) -> None:
        """One was told, or it was tried: then it is tried again, ever more
        seldom, for a day."""
        found = db.execute("select channel, at, tries from letters where id = "
                           "?", (letter,)).fetchone()
        if not found:
            return
        channel, at, tries = found
        if error and now - at < DAY_SECONDS:
            db.execute("update letters set tries = tries + 1, due = ? where "
                       "id = ?", (now + min(15 * 2**min(tries, 10), 3600),
                                  letter))
        else:
            db.execute("delete from letters where id = ?", (letter,))
        db.execute("update channels set error = ?1, last = case ?1 when '' "
                   "then ?2 else last end where id = ?3",
                   (error[:500], now, channel))


METRICS = {
    "koi_host_up": "1 while the host is heard of.",
    "koi_host_seen_timestamp_seconds": "When it was last heard of.",
    "koi_job_ok": "0 when the job failed, is late, missed or unknown.",
    "koi_job_running": "Runs that go on.",
    "koi_job_failures": "Failures in a row.",
    "koi_job_last_end_timestamp_seconds": "When its last run ended.",
    "koi_job_last_duration_seconds": "How long that took.",
    "koi_job_last_exit_status": "How that ended.",
    "koi_job_next_start_timestamp_seconds": "When it starts next.",
    "koi_check_up": "0 when the check is down or paused.",
    "koi_check_last_ping_timestamp_seconds": "When it was last pinged.",
    "koi_alert": "1 for each alert that stands."}


def label_text(text: str) -> str:
    """A label's value for Prometheus."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace(
        '"', '\\"')


def text_pieces(frames: bytes) -> list[str]:
    """The text of an output as it is taken into the index: head and tail of
    what is long, in pieces that end at the end of a line if they can. The
    same frames must always give the same pieces: by them they are removed.
    """
    import re
    text = b"".join(data for stream, _, data in read_frames(frames)
                    if stream in (STDOUT, STDERR)).decode("utf-8", "replace")
    text = re.sub(STRIPPED, "", text).replace("\0", " ")
    if len(text) > MOST_READ:
        half = MOST_READ // 2
        text = text[:half] + "\n" + text[-half + 1:]
    pieces = []
    while text and len(pieces) < MOST_PIECES:
        end = text.rfind("\n", PIECE // 2, PIECE) + 1
        if len(text) <= PIECE or not end:
            end = PIECE
        pieces.append(text[:end])
        text = text[end:]
    return pieces


# ==========================================================================
# Alerts: who is told, and how?                         (network, processes)
#
# A change of state is told once: by mail, webhook or ntfy. What cannot be
# told is tried again, and shown on the page.
# ==========================================================================

TELL_TIME = 15.0        # seconds for one letter, all in all
MOST_ANSWER = 1024      # bytes of an answer that are read
LOOK_AGAIN = 5.0        # seconds between looks at what is to be told


class Herald:
    """Tells what the hub has decided to tell, and says how that went.

    What is to be told stands in the database until it was told. If we are
    killed in between it is told again: at least once, then, and each time
    under the same key (Message-ID, Idempotency-Key, `key`), by which who
    gets it can see that. Each channel has a thread of its own while there
    is something for it, so one that hangs holds up no other.
    """

    def __init__(self, hub: Hub, machine: Machine | None = None):
        self.hub, self.machine = hub, machine or Machine()
        self.stopping, self.thread = False, None
        self.busy: set[int] = set()     # channels

    def start(self) -> None:
        import threading
        self.thread = threading.Thread(target=self.live, name="herald",
                                       daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stopping = True
        self.hub.letters.set()
        if self.thread:
            self.thread.join()

    def live(self) -> None:
        while not self.stopping and not self.hub.broken:
            self.hub.letters.clear()
            try:
                self.round()
            except Error as error:
                self.hub.faults["alerts"] = f"alerts: {error.message}"
            except RuntimeError:        # no thread can be started now
                self.busy.clear()
            self.hub.letters.wait(LOOK_AGAIN)

    def round(self) -> list:
        """Begin to tell what is due; the threads that do."""
        import threading
        letters: dict[int, list] = {}
        for letter in self.hub.read(self.hub.letters_due,
                                    self.hub.clock.now()):
            letters.setdefault(letter["channel"], []).append(letter)
        threads = []
        for channel, mine in letters.items():
            if channel not in self.busy and not self.hub.full:
                self.busy.add(channel)
                threads.append(threading.Thread(
                    target=self.tell_all, args=(channel, mine), daemon=True))
                threads[-1].start()
        return threads

    def tell_all(self, channel: int, letters: list[dict]) -> None:
        """Tell a channel's letters, in order; until one fails, for the
        others would fail as it did."""
        try:
            for letter in letters:
                error = self.tell(letter)
                self.hub.do(self.hub.letter_told, letter["id"], error,
                            self.hub.clock.now())
                if error or self.stopping:
                    break
        except Error:           # the disk is full, or we are to end
            pass
        finally:
            self.busy.discard(channel)

    def tell(self, letter: dict) -> str:
        """Tell one; "" if that went well, else why not."""
        try:
            return {"mail": self.mail, "webhook": self.post,
                    "ntfy": self.notify}[letter["way"]](letter)
        except Exception as error:      # whatever it is, it is tried again
            return without_secrets(f"{type(error).__name__}: {error}",
                                   letter["target"])

    def mail(self, letter: dict) -> str:
        import subprocess
        program = next((path for path in SENDMAILS
                        if os.access(path, os.X_OK)), None)
        if not program:
            return "there is no sendmail here"
        if not safe_address(letter["target"]):
            return "this is no address"
        done = subprocess.run(
            [program, "-i", "--", letter["target"]],
            input=letter_mail(letter, self.machine.host()),
            env={"PATH": USUAL_PATH, "HOME": os.environ.get("HOME", "/")},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=TELL_TIME)
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        return "" if done.returncode == 0 else \
            f"sendmail says {visible(said) or done.returncode}"

    def post(self, letter: dict) -> str:
        import json
        body = {name: letter[name] for name in (
            "key", "at", "title", "text", "subject", "kind", "dash")}
        return web_post(letter["target"], json.dumps(
            {**body, "state": "over" if letter["over"] else "on"}).encode(), {
                "Content-Type": "application/json",
                "Idempotency-Key": letter["key"]})

    def notify(self, letter: dict) -> str:
        """To a topic of ntfy: its headers are ASCII, or RFC 2047."""
        from email.header import Header as Encoded
        title = one_line(letter["title"])[:200]
        if not title.isascii():
            title = Encoded(title, "utf-8", maxlinelen=10_000).encode()
        over = bool(letter["over"])
        return web_post(letter["target"], (letter["text"] or letter["title"]
                                           ).encode()[:4000], {
            "Title": title, "Content-Type": "text/plain; charset=utf-8",
            "Priority": "default" if over or letter["kind"] == "test"
            else "high", "Tags": "white_check_mark" if over else
            "bell" if letter["kind"] == "test" else "warning"})


def without_secrets(text: str, target: str) -> str:
    """A fault in words, without the address: it may hold a key."""
    from urllib.parse import urlsplit
    for part in (target, *map(str, urlsplit(target)[1:4])):
        if len(part) > 3:
            text = text.replace(part, "...")
    return visible(text)[:300]


def letter_mail(letter: dict, host: str) -> bytes:
    """A letter as a mail. Foreign text is in it, so what could break a
    header becomes a blank."""
    from email import policy
    from email.message import EmailMessage
    from email.utils import formatdate
    message = EmailMessage(policy=policy.SMTP.clone(linesep="\n"))
    message["From"] = f"koi <koi@{one_line(host)}>"
    message["To"] = letter["target"]
    message["Subject"] = one_line("koi: " + letter["title"])[:200]
    message["Date"] = formatdate(letter["at"])
    message["Message-ID"] = f"<{letter['key']}.{letter['dash']}@koi>"
    message["Auto-Submitted"] = "auto-generated"
    text = (letter["text"] or letter["title"]) + "\n"
    message.set_content("".join(
        each if each.isprintable() or each == "\n" else " "
        for each in text), cte="quoted-printable")
    return message.as_bytes()


def web_post(target: str, body: bytes, headers: dict) -> str:
    """POST to an address; "" for a 2xx. No redirect is followed, no proxy
    asked, and after TELL_TIME the connection is cut, whatever it does."""
    import base64
    import http.client
    import ssl
    import threading
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(target)
    options = {"timeout": TELL_TIME}
    kind = http.client.HTTPConnection
    if parts.scheme == "https":
        kind = http.client.HTTPSConnection
        options["context"] = ssl.create_default_context()
    connection = kind(parts.hostname, parts.port, **options)
    watchdog = threading.Timer(TELL_TIME, cut_off, [connection])
    watchdog.daemon = True
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(
            pair.encode()).decode()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    watchdog.start()
    try:
        connection.request("POST", path, body, {
            **headers, "User-Agent": f"koi/{VERSION}", "Connection": "close"})
        answer = connection.getresponse()
        answer.read(MOST_ANSWER)
    finally:
        watchdog.cancel()
        connection.close()
    if 300 <= answer.status < 400:
        return f"it answered {answer.status}: redirects are not followed"
    return "" if 200 <= answer.status < 300 else \
        f"it answered {answer.status}"


def cut_off(connection) -> None:
    """End what a connection waits for, from another thread."""
    try:
        connection.sock.shutdown(socket.SHUT_RDWR)
    except (OSError, AttributeError):   # it is not open, or not any more
        pass


# ==========================================================================
# Web: what does a browser or an agent get back?            (network, files)
#
# Bytes become a Request, and a Response becomes bytes. Whoever calls may be
# hostile, so all of it has limits: bytes, seconds, connections an address.
# ==========================================================================


# ==========================================================================
# Page: what does the browser run?                                 (nothing)
#
# One page, as plain text: nothing is filled in, nothing comes from elsewhere.
# What jobs and hosts say goes in as text, never as markup.
# ==========================================================================


# ==========================================================================
# Command: what can I type?                                      (terminal)
#
# What crontab(1) knows works here as it does there: its options, messages
# and exit status. Beside it stands one function for each command of ours.
# All of it asks koid, by Link, and does nothing to jobs itself. `main` is
# the only way out: it turns an Error into one line and an exit status.
# ==========================================================================

USAGE = """\
koitab: cron, with names, sections and forms.

As crontab(1):
  koitab FILE | -      install a tab (./run for a file named like a command)
  koitab -e | -l       edit it; list it
  koitab -r [-i]       remove it; -i asks before
  koitab -T FILE       test a tab: every fault, and what looks wrong

Jobs:
  koitab run NAME [ARG=VALUE]...   run a job now: its output and its status
  koitab next [NAME] [-n N] [--from TIME] [--tab FILE] [--utc] [--json]
                                   the next starts, of all jobs or of one
  koitab history [NAME] [-n N] [--json]   past runs
  koitab log RUN|NAME [--json]     the output of a run
  koitab kill RUN                  end a run
  koitab status [--json]           is all well? status 1 when it is not

Setting up:
  koitab import                    cron's tabs as a koitab, printed
  koitab daemon [--system]         koid, in the foreground
  koitab unit daemon [--system]    a unit for systemd, a plist for launchd
  koitab completion bash|zsh|fish  completion for a shell

Options:
  -u USER              the tab and the jobs of another user (root)
  -n, --number N       how many starts of each job (5); how many runs (20)
      --tab FILE       a tab that is not installed; - is standard input
      --from TIME      starts later than this: 2026-03-29T01:30, with an
                       offset or Z, or the wall's time (default: now)
      --utc            show times in UTC
      --json           for programs
      --system         serve /etc/crontab, /etc/cron.d and cron's tabs too
  -h, --help           this text
  -V, --version        the version

NAME is a job's name, its tag, its line, or section/name. ARG=- reads the
value from standard input. TZ sets the time zone of `next --tab`, CRON_TZ in
a tab that of the lines below it. Called crontab it says crontab; called
koid it is the daemon.

Exit status: 0 all well; 1 the tab has faults, or something is not there;
2 wrong usage of a command that crontab lacks; of `run`, the job's own,
128+N if signal N ended it.
"""

SHORT = "u:elriT:n:hV"
LONG = ["number=", "tab=", "from=", "utc", "json", "system", "help",
        "version"]
FIELDS = {"-u": "user", "-e": "edit", "-l": "list", "-r": "remove",
          "-i": "ask", "-T": "test", "--from": "start"}
SAME = {"--number": "-n"}
LATER = ("dashboard", "page")       # commands of a version to come
SYSTEM_TABS = ("/etc/crontab", "/etc/cron.d/")
LONGEST_LIST = 100_000
PAGE_OF_RUNS = 500      # a reply holds so many

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

UNIT = """\
# {where}
[Unit]
Description=koid, which starts the jobs of koitab
After=remote-fs.target nss-user-lookup.target time-set.target
{conflicts}StartLimitIntervalSec=0

[Service]
ExecStart={command}
{environment}Restart=always
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

COMPLETIONS = {
    "bash": r'''# koitab completion bash > /etc/bash_completion.d/koitab
_koitab() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    local name
    COMPREPLY=()
    case $before in
        run|log|history|next)
            while read -r name; do
                name=$(printf %q "$name")
                [[ $name == "$word"* ]] && COMPREPLY+=("$name")
            done < <(koitab completion names 2>/dev/null)
            return ;;
        -T|--tab) COMPREPLY=($(compgen -f -- "$word")); return ;;
        -u) COMPREPLY=($(compgen -u -- "$word")); return ;;
        unit) COMPREPLY=($(compgen -W "daemon" -- "$word")); return ;;
        completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$word"))
            return ;;
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
        run|log|history|next)
            compadd -- ${(f)"$(koitab completion names 2>/dev/null)"}
            return ;;
        -T|--tab) _files; return ;;
        -u) _users; return ;;
        unit) compadd daemon; return ;;
        completion) compadd bash zsh fish; return ;;
    esac
    compadd -- COMMANDS OPTIONS
    (( CURRENT == 2 )) && _files
}
_koitab "$@"
''',
    "fish": r'''# koitab completion fish > /etc/fish/completions/koitab.fish
set -l named run log history next
complete -c koitab -f -n "__fish_seen_subcommand_from $named" \
    -a "(koitab completion names 2>/dev/null)"
complete -c koitab -n "__fish_use_subcommand" -a "COMMANDS"
complete -c koitab -f -n "__fish_seen_subcommand_from unit" -a "daemon"
complete -c koitab -f -n "__fish_seen_subcommand_from completion" \
    -a "bash zsh fish"
complete -c koitab -s T -r -F
complete -c koitab -l tab -r -F
complete -c koitab -s u -x -a "(__fish_complete_users)"
complete -c koitab -a "OPTIONS"
''',
}


class Shown(Exception):
    """There is nothing to do but to show a text."""


class Said(Error):
    """What crontab(1) says, in its own words."""


class Options:
    """What was typed, and by which name we were called."""

    def __init__(self, called: str = PROG):
        self.called, self.given = called, []
        self.status = EXIT_USAGE    # of a slip
        self.user = self.test = self.tab = self.start = ""
        self.number = 0
        self.edit = self.list = self.remove = self.ask = False
        self.utc = self.json = self.system = False

    def read(self, argv: list[str]) -> list[str]:
        """Take the options from both sides of the command; the rest of the
        words. Raises Error."""
        # getopt would load gettext, and with it `re`, to translate two
        # messages; without it, it says them in English.
        sys.modules.setdefault("gettext", None)
        import getopt
        if sys.modules["gettext"] is None:
            del sys.modules["gettext"]
        if not any(word in COMMANDS for word in argv):
            self.status = EXIT_FAULTS
        try:
            found, words = getopt.gnu_getopt(argv, SHORT, LONG)
        except getopt.GetoptError as error:
            if error.opt == "d":
                raise no_dashboard() from None
            raise Error(str(error), "koitab --help", self.status) from None
        for name, value in found:
            self.put(name, value)
        return words

    def put(self, name: str, value: str) -> None:
        if name in ("-h", "--help"):
            raise Shown(USAGE)
        if name in ("-V", "--version"):
            raise Shown(f"{PROG} {VERSION}\n")
        name = SAME.get(name, name)
        self.given.append(name)
        if name == "-n":
            self.number = count(value) or 0
            if not 0 < self.number <= LONGEST_LIST:
                raise Error(f"-n {value}: not a number", "-n 5; -T FILE "
                            "tests a tab", self.status)
        elif name in ("-u", "-T", "--tab", "--from"):
            setattr(self, FIELDS.get(name, name.strip("-")), value)
        else:
            setattr(self, FIELDS.get(name, name.strip("-")), True)

    def allow(self, allowed: str, command: str, status: int) -> None:
        """Refuse what does not go with this command. Raises Error."""
        for name in self.given:
            if name not in allowed.split():
                raise Error(f"{name} does not go with {command}",
                            "koitab --help", status)

    def judge_user(self, machine: Machine) -> None:
        """-u is for root, and for one's own name. The real uid counts, not
        what the environment says. Raises Error."""
        if "-u" not in self.given:
            return
        if os.getuid() and self.user != machine.user():
            raise Said("must be privileged to use -u")
        import pwd
        try:
            pwd.getpwnam(self.user)
        except (KeyError, ValueError):
            raise Said(f"{self.called}:  user `{self.user}' unknown"
                       ) from None

    def whose(self) -> dict:
        """The field of a request that names another user."""
        return {"user": self.user} if self.user else {}

    def owner(self, machine: Machine) -> str:
        return self.user or machine.user()

    def warn(self, text: str) -> None:
        """A line for people, beside the output."""
        sys.stdout.flush()
        print(visible(f"{self.called}: {text}"), file=sys.stderr, flush=True)


def no_dashboard() -> Error:
    return Error("this version has no dashboard yet", "koitab history, "
                 "koitab log and koitab status tell of runs", EXIT_USAGE)


def no_tab(options: Options, machine: Machine) -> Error:
    return Said(f"no crontab for {options.owner(machine)}")


def answer_to(question: str) -> str | None:
    """Ask at the terminal; a line, or None at the end of the input."""
    sys.stdout.flush()
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        print(file=sys.stderr)
    return line.rstrip("\r\n") if line else None


def agreed(question: str) -> bool:
    """Ask until the answer is yes or no. The end of the input is a no:
    cron's own loop has no end there."""
    while True:
        answer = answer_to(question)
        if answer is None or answer[:1] in ("n", "N"):
            return False
        if answer[:1] in ("y", "Y"):
            return True
        print("Enter Y or N", file=sys.stderr)


# --- as crontab(1) --------------------------------------------------------

EDITORS = ("sensible-editor", "vi", "nano")
NEWLINE = "premature EOF"


def odd_addresses(text: str) -> list[Problem]:
    """Warnings of addresses that cron would not hand to a mailer."""
    found = []
    for row, raw in enumerate(text.split("\n"), start=1):
        line = raw.lstrip(BLANKS)
        name, value, at = assignment_of(line) or ("", "", 0)
        if name in EXPANDED and value and "$" not in value \
                and not safe_address(value):
            found.append(Problem(
                row, len(raw) - len(line) + at + 1, "unsafe mail",
                f"nothing is mailed: {name} is not {short(value)}",
                "me@example.com,root; no blanks", False))
    return found


def tell(problems: list[Problem], path: str) -> None:
    """Print all that is wrong, in the order of the lines."""
    for problem in sorted(problems, key=lambda p: (p.line, p.column)):
        print(problem.text(path), file=sys.stderr)


def install(options: Options, link: Link, text: str, path: str) -> bool:
    """Have a tab installed, and tell all that is wrong with it."""
    reply = link.ask("install", text=text, **options.whose())
    problems = [Problem(**row) for row in reply["problems"]]
    tell(problems + odd_addresses(text), path)
    if reply["installed"]:
        if not reply["daemon"]:
            options.warn("warning: koid is not running, so no job starts "
                         "(koitab daemon; koitab unit daemon)")
        return True
    faults = {problem.what for problem in problems if problem.fatal}
    if faults != {NEWLINE}:
        print("errors in crontab file, can't install.", file=sys.stderr)
    if NEWLINE in faults:
        print("new crontab file is missing newline before EOF, can't "
              "install.", file=sys.stderr)
    return False


def command_replace(options: Options, machine: Machine, path: str) -> int:
    try:
        text = machine.tab_text(path)
    except Error as error:
        meant = nearest(path, COMMANDS) if path.isalpha() \
            and not os.path.lexists(path) else ""
        raise Said(error.message, f"did you mean {PROG} {meant}?" if meant
                   else "") from None
    done = install(options, Link(machine), text, path)
    return EXIT_OK if done else EXIT_FAULTS


def command_list(options: Options, machine: Machine) -> int:
    text = Link(machine).ask("list", **options.whose())["text"]
    if text is None:
        raise no_tab(options, machine)
    if sys.stdout.isatty():     # a CR could hide what a line does
        lines = text.removesuffix("\n").split("\n") if text else []
        text = "".join(f"{visible(line)}\n" for line in lines)
    put_out(sys.stdout, text.encode("utf-8", "surrogateescape"))
    return EXIT_OK


def put_out(stream, data: bytes) -> None:
    """Write bytes as they are."""
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


def command_remove(options: Options, machine: Machine) -> int:
    owner = options.owner(machine)
    if options.ask and not agreed(f"{options.called}: really delete {owner}'s"
                                  " crontab? (y/n) "):
        return EXIT_OK
    if not Link(machine).ask("remove", **options.whose())["removed"]:
        raise no_tab(options, machine)
    return EXIT_OK


class Draft:
    """The file that an editor gets, in a folder where nobody but the caller
    can put another one in its place."""

    def __init__(self, text: str):
        import tempfile
        self.first = text
        try:
            self.folder = tempfile.mkdtemp(prefix="crontab.")
            self.path = posixpath.join(self.folder, "crontab")
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                         | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise Error(f"no place for a draft: {error.strerror}",
                        "TMPDIR=/var/tmp") from None

    def text(self) -> str:
        """What the editor left. The path may name something else by now,
        so what was opened is judged. Raises Error."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW
                         | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fault = file_fault(os.fstat(fd), (os.geteuid(),), 0, False)
                if fault:
                    raise Error(f"{self.path}: {fault}")
                with open(fd, "rb", closefd=False) as file:
                    data = file.read(LONGEST_TAB + 1)
            finally:
                os.close(fd)
        except OSError as error:
            raise Error(f"{self.path}: {error.strerror}") from None
        return data.decode("utf-8", "surrogateescape")

    def remove(self) -> None:
        import shutil
        shutil.rmtree(self.folder, ignore_errors=True)

    def leave(self, options: Options) -> None:
        """Nothing was installed: whoever has typed something keeps it."""
        try:
            changed = self.text() != self.first
        except Error:
            changed = True
        if changed:
            options.warn(f"edits left in {self.path}")
        else:
            self.remove()


def editor() -> list[str]:
    """The caller's editor and its options. No shell reads them. Raises
    Error."""
    import shlex
    import shutil
    for name in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(name, ""))
        except ValueError as error:
            raise Error(f"{name} cannot be read: {error}", f"{name}=vi"
                        ) from None
        if words:
            return words
    for program in EDITORS:
        if shutil.which(program):
            return [program]
    raise Error("there is no editor", "EDITOR=PROGRAM koitab -e")


def run_editor(path: str) -> None:
    """Let the caller edit a file. Raises Error.

    What the keyboard sends is for the editor, and must not end us: so we
    ignore it meanwhile, and the editor begins with what is usual.
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
            else f"killed; signal {-status}"), "nothing was installed")


def command_edit(options: Options, machine: Machine) -> int:
    link = Link(machine)
    before = link.ask("list", **options.whose())["text"]
    if before is None:
        print(f"{no_tab(options, machine)} - using an empty one",
              file=sys.stderr)
    draft = Draft(TEMPLATE if before is None else before)
    try:
        done = edited(options, link, draft, before)
    except BaseException:
        draft.leave(options)
        raise
    if done:
        draft.remove()
        return EXIT_OK
    draft.leave(options)
    return EXIT_FAULTS


def edited(options: Options, link: Link, draft: Draft,
           before: str | None) -> bool:
    """Edit until the tab is installed or left as it was; False if the
    caller gives up. Raises Error."""
    while True:
        run_editor(draft.path)
        text = draft.text()
        if text == draft.first:
            options.warn("no changes made to crontab")
            return True
        if link.ask("list", **options.whose())["text"] != before:
            raise Error("the crontab was changed by somebody else meanwhile",
                        "look at both, then install yours by its path")
        options.warn("installing new crontab")
        if install(options, link, text, draft.path):
            return True
        if not agreed("Do you want to retry the same edit? (Y/N) "):
            return False


def command_test(options: Options, machine: Machine) -> int:
    """As `crontab -T` of cronie, which stops at the first fault."""
    text = machine.tab_text(options.test)
    tab, _ = judged(machine, text, options.test.startswith(SYSTEM_TABS))
    tell(tab.problems + odd_addresses(text), options.test)
    if tab.faults():
        print("Invalid crontab file. Syntax issues were found.",
              file=sys.stderr)
        return EXIT_FAULTS
    print("No syntax issues were found in the crontab file.",
          file=sys.stderr)
    return EXIT_OK


# --- next -----------------------------------------------------------------


def instant_of(text: str, zone: Zone, now: float) -> int:
    """The instant that --from means. Raises Error."""
    def refuse():
        raise Error(f"--from {text}: not a time", "2026-03-29T01:30, "
                    "2026-03-29T01:30:00+01:00 or 2026-03-29", EXIT_USAGE)

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
    wall = days_of(year, month, day) * DAY + hour * HOUR \
        + minute * MINUTE + second
    if found[7]:
        return wall
    if found[8]:
        ahead = int(found[9]) * HOUR + int(found[10]) * MINUTE
        return wall + ahead if found[8] == "-" else wall - ahead
    return zone.instant(wall)


def judged(machine: Machine, text: str, system: bool = False,
           user: str = "") -> tuple[Tab, dict[str, Zone]]:
    """Judge a tab, its time zones too. Raises Error."""
    tab = parse_tab(text, system, root=os.geteuid() == 0,
                    salt=machine.salt(user))
    return tab, {**check_zones(tab, machine), "": machine.local_zone()}


def tabs_of(options: Options, machine: Machine):
    """The path, the tab and the zones of each tab that is meant. Raises
    Error."""
    if options.tab:
        return [(options.tab, *judged(
            machine, machine.tab_text(options.tab),
            options.tab.startswith(SYSTEM_TABS)))]
    link, found = Link(machine), []
    reply = link.ask("list", **options.whose())
    if reply["text"] is not None:
        found.append((f"crontab of {options.owner(machine)}", *judged(
            machine, reply["text"], user=options.owner(machine))))
    if os.geteuid() == 0 and not options.user:
        jobs = link.ask("jobs")["jobs"]
        found += [(path, *judged(machine, machine.tab_text(path), True))
                  for path in dict.fromkeys(job["file"] for job in jobs)
                  if path.startswith(SYSTEM_TABS)]
    if not found:
        raise no_tab(options, machine)
    return found


def starts_of(job: Job, zones: dict, after: int, many: int,
              delay: int) -> list[int]:
    """The next starts of a job, put off by so many minutes."""
    from itertools import islice
    if not job.schedule:
        return []
    delay *= MINUTE
    return [start + delay for start in islice(job.schedule.starts(
        after - delay, zones[job.settings.zone]), many)]


def command_next(options: Options, machine: Machine, name: str = "") -> int:
    tabs, rows, faults = tabs_of(options, machine), [], []
    jobs = chosen([job for _, tab, zones in tabs for job in tab.jobs
                   if job.settings.zone in zones], name)
    for path, tab, zones in tabs:
        tell(tab.problems, path)
        faults += tab.faults()
        after = instant_of(options.start, zones[""], machine.clock.now())
        for job in tab.jobs:
            if any(job is each for each in jobs):
                zone = UTC if options.utc else zones[job.settings.zone]
                starts = starts_of(job, zones, after, options.number or 5,
                                   random_delay(job, machine.host()))
                rows.append((path, job, [
                    utc_stamp(at) if options.utc else
                    stamp(at, zone.offset(at)) for at in starts]))
    if options.json:
        print_json([{
            "name": job.name or None, "tag": job.tag, "line": job.line,
            "schedule": job.when, "words": job.words(), "next": starts,
            **({} if options.tab else {"file": path})}
            for path, job, starts in rows])
    else:
        show(rows)
    return EXIT_FAULTS if faults else EXIT_OK


def print_json(value) -> None:
    import json
    print(json.dumps(value, indent=4, ensure_ascii=False))


def utc_stamp(instant: int) -> str:
    return stamp(instant, 0).replace("+00:00", "Z")


def show(rows: list) -> None:
    """The next starts, for people."""
    section, file = "", rows[0][0] if rows else ""
    for path, job, starts in rows:
        if path != file:
            section, file = "", path
            print(f"# {visible(path)}")
        if job.section != section:
            section = job.section
            print(f"[{visible(section)}]")
        print(f"{visible(job.label)}: {visible(job.words())}")
        for start in starts:
            print(f"    {start}")


# --- run ------------------------------------------------------------------

PRESSES = 2             # so often a signal is passed on; then we go
MOST_INPUT = 2**20      # what ARG=- reads; koid takes less


def named(jobs: list[dict], name: str) -> dict:
    """The one job that a name means. Raises Error."""
    found = [job for job in jobs if name == job["tag"]] or [
        job for job in jobs if name in (
            job["name"], str(job["line"]), f"{job['section']}/{job['name']}")]
    if not found:
        meant = nearest(name, [job["name"] for job in jobs if job["name"]])
        raise Error(f"there is no job {short(name)}",
                    f"did you mean {short(meant)}?" if meant else
                    "koitab next tells of all")
    if len(found) > 1:
        raise Error(f"{len(found)} jobs are called {short(name)}",
                    ", ".join(f"{job['section']}/{job['name']}"
                              if job["section"] and job["name"]
                              else job["tag"] for job in found))
    return found[0]


def params_of(job: dict) -> list[Param]:
    return [Param(row["name"], row["type"], row["default"],
                  tuple(row["choices"])) for row in job["params"]]


def arguments(job: dict, words: list[str]) -> dict[str, str]:
    """A value for each argument: as typed, as asked for, or the default.
    koid judges them again. Raises Error."""
    params, given = params_of(job), {}
    for word in words:
        param = meant_param(params, word)
        if param.name in given:
            raise Error(f"{short(param.name)} is given twice", "",
                        EXIT_USAGE)
        value = word[len(param.name) + 1:]
        given[param.name] = value = input_value() if value == "-" else value
        reason = param.refusal(value)
        if reason:
            raise Error(f"{short(param.name)}: {reason}", "", EXIT_USAGE)
    missing = [param for param in params
               if param.default is None and param.name not in given]
    if missing and not os.isatty(0):
        raise Error("no value for " + joined([
            short(param.name) for param in missing]), " ".join([
                "koitab run NAME", *(f'"{visible(param.name)}=..."'
                                     for param in missing)]), EXIT_USAGE)
    given.update((param.name, asked(param)) for param in missing)
    return {param.name: given.get(param.name, param.default)
            for param in params}


def meant_param(params: list[Param], word: str) -> Param:
    """The argument of ARG=VALUE; its name may hold a =. Raises Error."""
    found = [param for param in params if word.startswith(f"{param.name}=")]
    if found:
        return max(found, key=lambda param: len(param.name))
    name = word.partition("=")[0]
    meant = nearest(name, [param.name for param in params])
    if "=" not in word:
        raise Error(f"what is {short(word)}?", "ARG=VALUE", EXIT_USAGE)
    raise Error(f"the job has no argument {short(name)}",
                f"did you mean {short(meant)}?" if meant else
                ", ".join(visible(param.name) for param in params),
                EXIT_USAGE)


def input_value() -> str:
    """What standard input holds, without its last newline: so a secret is
    in no list of processes. Raises Error."""
    data = sys.stdin.buffer.read(MOST_INPUT + 1)
    if len(data) > MOST_INPUT:
        raise Error("standard input is too long for a value", "", EXIT_USAGE)
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def asked(param: Param) -> str:
    """Ask for a value until it is one. Raises Error."""
    kind = {"bool": "true|false", "choice": "|".join(param.choices),
            "string": "", "text": "one line"}.get(param.type, param.type)
    question = visible(param.name) + (f" ({visible(kind)})" if kind else "")
    while True:
        if param.type == "secret":
            value = asked_secret(f"{question}: ")
        else:
            value = answer_to(f"{question}: ")
        if value is None:
            raise Error(f"no value for {short(param.name)}, so nothing ran")
        reason = param.refusal(value)
        if not reason:
            return value
        print(f"  {reason}", file=sys.stderr)


def asked_secret(question: str) -> str | None:
    import getpass
    try:
        return getpass.getpass(question)
    except EOFError:
        return None


def command_run(options: Options, machine: Machine, name: str,
                *words: str) -> int:
    link = Link(machine)
    reply = link.ask("jobs", **options.whose())
    job = named(reply["jobs"], name)
    if not reply["daemon"]:
        raise Error("koid is not running", "koitab daemon")
    args = arguments(job, list(words))
    if job["confirm"] == "yes" and os.isatty(0) and not agreed(
            f"Run {visible(job['label'])}? (y/n) "):
        return EXIT_FAULTS
    return Follower(options, *link.follow(job["tag"], args, job["user"])
                    ).watch()


class Left(Exception):
    """The caller does not wait any longer; the job runs on."""


class Follower:
    """Shows what a run writes as it comes, and passes signals on to it."""

    def __init__(self, options: Options, run: int, connection, first: bytes):
        self.options, self.run, self.connection = options, run, connection
        self.data = bytearray(first)    # what is no whole frame yet
        self.heard: list[int] = []      # signals that came for us

    def watch(self) -> int:
        """Stay until the run ends; its exit status. Raises Error."""
        sys.stdout.flush()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # A signal that comes just before `select` would be forgotten in it;
        # the byte that is written for each one wakes it up.
        woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self.hear) for number in (
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN}     # nohup
        try:
            return self.listen(reader)
        except Left:
            self.say_goodbye()
            return EXIT_SIGNAL + self.heard[-1]
        except OSError:         # nobody reads, or the disk is full
            self.say_goodbye()
            raise
        finally:
            for number, action in before.items():
                signal.signal(number, action or signal.SIG_DFL)
            signal.set_wakeup_fd(woken)
            os.close(reader)
            os.close(writer)
            self.connection.close()

    def hear(self, number: int, _frame) -> None:
        """The first signal goes to the job as it is, the second as TERM;
        the third one is for us."""
        self.heard.append(number)
        if len(self.heard) > PRESSES:
            raise Left
        if len(self.heard) == PRESSES:
            number = signal.SIGTERM
            self.options.warn("once more leaves the job running")
        try:
            self.connection.send(bytes([number]))
        except OSError:
            pass                # it has ended, as we shall read at once

    def say_goodbye(self) -> None:
        self.options.warn(f"run {self.run} goes on (koitab log {self.run}; "
                          f"koitab kill {self.run})")

    def listen(self, wakeups: int) -> int:
        """Read frames until the one that says how it ended."""
        while True:
            for stream, body in self.frames():
                if stream == END:
                    return self.end(body)
                self.put(stream, body)
            ready = select.select([self.connection, wakeups], [], [])[0]
            if wakeups in ready:
                os.read(wakeups, 64)
            if self.connection in ready:
                self.receive()

    def receive(self) -> None:
        try:
            piece = self.connection.recv(CHUNK)
        except ConnectionError:
            piece = b""
        if not piece:
            self.say_goodbye()
            raise Error("koid has hung up", "koitab status")
        self.data += piece

    def frames(self):
        """The whole frames that have come: stream and bytes."""
        while len(self.data) >= FRAME.size:
            stream, _, length = FRAME.unpack_from(self.data)
            end = FRAME.size + length
            if len(self.data) < end:
                return
            body = bytes(self.data[FRAME.size:end])
            del self.data[:end]
            yield stream, body

    def put(self, stream: int, body: bytes) -> None:
        """Output as the job wrote it: it is the caller's own."""
        if stream == NOTE:
            self.options.warn(body.decode("utf-8", "replace"))
        else:
            write_all(1 if stream == STDOUT else 2, body)

    def end(self, body: bytes) -> int:
        """The exit status that the run's end means for us."""
        import json
        end = json.loads(body)
        words = end["reason"] or (end["signal"] and signal_words(
            end["signal"]))
        if words:
            self.options.warn(words)
        if end["signal"]:
            return EXIT_SIGNAL + end["signal"]
        return EXIT_FAULTS if end["exit"] is None else end["exit"]


# --- history, log, status, kill -------------------------------------------

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 40             # durations in one line
COLOURED = r"(\x1b\[[0-9;:]*m)|"    # SGR: it cannot do harm


def spark(durations: list[float]) -> str:
    """A line of bars, the longest duration the highest."""
    top = max(durations, default=0) or 1
    return "".join(BARS[min(int(duration / top * 8), 7)]
                   for duration in durations)


def signal_words(number: int) -> str:
    try:
        name = f" ({signal.Signals(number).name})"
    except ValueError:
        name = ""
    return f"killed by signal {number}{name}"


def result_words(run: dict) -> str:
    """How a run went: ok; exit 3; missed x12; skipped: why."""
    state, reason = run["state"], run["reason"]
    if state == "missed":
        words = f"missed x{run['count']}" if run["count"] > 1 else "missed"
    elif state == "unstartable":
        words = "not started"
    elif state != "done":
        words = state
    elif run["signal"]:
        words = signal_words(run["signal"])
    else:
        words = f"exit {run['exit']}" if run["exit"] else "ok"
    if reason.startswith("timeout"):
        words = reason
    elif reason:
        words += f": {reason}"
    return words + (f", attempt {run['attempt']}" if run["attempt"] > 1
                    else "")


def took(run: dict) -> float | None:
    """The seconds from start to end, if both are known."""
    if run["started"] is None or run["ended"] is None:
        return None
    return max(run["ended"] - run["started"], 0.0)


def took_words(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return duration_text(round(seconds) if seconds >= 10 else
                         round(seconds, 1) if seconds >= 1 else seconds)


def began(run: dict) -> str:
    """When it started, or should have."""
    at = next((run[key] for key in ("started", "due", "asked")
               if run[key] is not None), None)
    return "-" if at is None else rfc3339(at)


def label_of(run: dict, owner: str) -> str:
    """What a run or job is called, with its user if that is another one."""
    label = visible(run["label"])
    return f"{run['user']}: {label}" if run["user"] not in ("", owner) \
        else label


def runs_of(options: Options, link: Link, name: str) -> list[dict]:
    """The last runs, the newest at the end."""
    wanted, found = options.number or 20, []
    fields = {**options.whose(), **({"job": name} if name else {})}
    while len(found) < wanted:
        more = {"before": found[-1]["run"]} if found else {}
        runs = link.ask("history", limit=min(wanted - len(found),
                                             PAGE_OF_RUNS),
                        **fields, **more)["runs"]
        if not runs:
            break
        found += runs
    return found[::-1]


def command_history(options: Options, machine: Machine, name: str = ""
                    ) -> int:
    runs = runs_of(options, Link(machine), name)
    if options.json:
        print_json(runs)
        return EXIT_OK
    owner, durations = options.owner(machine), {}
    labels = [label_of(run, owner)[:24] for run in runs]
    width = max(map(len, labels), default=0)
    if not runs:
        options.warn("no run is remembered")
        return EXIT_OK
    print(f"{'RUN':>5}  {'STARTED':25}  {'JOB':{width}}  {'BY':8}  "
          f"{'TOOK':>6}  RESULT")
    for run, label in zip(runs, labels):
        seconds = took(run)
        print(f"{run['run']:>5}  {began(run):25}  {label:{width}}  "
              f"{run['trigger']:8}  {took_words(seconds):>6}  "
              f"{visible(result_words(run))}")
        if seconds is not None:
            durations.setdefault((run["user"], run["tag"], label), []
                                 ).append(seconds)
    if durations:
        print("\nHow long the jobs took, the newest on the right:")
    for (_, _, label), seconds in durations.items():
        print(f"{label:{width}}  {spark(seconds[-SPARKS:])}  "
              f"{took_words(seconds[-1])}")
    return EXIT_OK


def command_log(options: Options, machine: Machine, which: str) -> int:
    link = Link(machine)
    wanted = {"run": int(which)} if count(which) else {"job": which}
    run = link.ask("log", **wanted, **options.whose())["run"]
    frames = read_frames(link.output)
    if options.json:
        names = {STDOUT: "stdout", STDERR: "stderr", NOTE: "note"}
        print_json({**run, "frames": [
            {"stream": names[stream], "ms": ms,
             "text": data.decode("utf-8", "backslashreplace")}
            for stream, ms, data in frames if stream in names]})
        return EXIT_OK
    print_frames(options, frames)
    if run["state"] != "done":
        options.warn(f"run {run['run']}: {result_words(run)}")
    return EXIT_OK


def print_frames(options: Options, frames: list) -> None:
    """Output as it was written; on a terminal without what would obey."""
    targets = {STDOUT: sys.stdout, STDERR: sys.stderr}
    held = dict.fromkeys(targets, b"")      # lines that have not ended yet
    for stream, _, data in frames:
        if stream == NOTE:
            options.warn(data.decode("utf-8", "replace"))
        elif stream in targets and not targets[stream].isatty():
            put_out(targets[stream], data)
        elif stream in targets:
            lines, newline, held[stream] = (held[stream] + data).rpartition(
                b"\n")
            put_out(targets[stream], safe(lines + newline))
    for stream, rest in held.items():
        if rest:
            put_out(targets[stream], safe(rest + b"\n"))


def safe(data: bytes) -> bytes:
    """Lines that a terminal may get: colours, and escapes for the rest."""
    import re
    lines = [re.sub(COLOURED + UNSAFE, lambda found: found[1] or escaped(
        found), line.removesuffix("\r")) for line in data.decode(
            "utf-8", "backslashreplace").split("\n")]
    text = "\n".join(lines)
    reset = "\x1b[0m" if "\x1b" in text else ""
    return (text + reset).encode("utf-8", "backslashreplace")


def command_kill(options: Options, machine: Machine, which: str) -> int:
    if not count(which):
        raise Error(f"{short(which)} is no run", "koitab status shows those "
                    "that go on, with their numbers", EXIT_USAGE)
    run = Link(machine).ask("kill", run=int(which), **options.whose())["run"]
    print(f"run {run['run']} ({visible(run['label'])}) is told to end")
    return EXIT_OK


def command_status(options: Options, machine: Machine) -> int:
    link = Link(machine)
    try:
        state = link.ask("status", **options.whose())
    except Error as error:
        if options.json:
            raise
        print(f"koid      {visible(error.message)}"
              + (f" ({visible(error.hint)})" if error.hint else ""))
        state = None
    jobs = link.ask("jobs", **options.whose())["jobs"]
    bad = [job for job in jobs if job["last"] and failed(job["last"])]
    if options.json:
        print_json({**state, "failed": bad})
    else:
        owner = options.owner(machine)
        for word, lines in (state_lines(state, owner) if state else {
                "tab": [plural(len(jobs), "job")]}).items():
            print_field(word, lines)
        print_field("failed", [
            f"{label_of(job, owner)}: {result_words(job['last'])} at "
            f"{began(job['last'])} (koitab log {job['last']['run']})"
            for job in bad])
    well = state and not (bad or state["troubles"] or state["late"]
                          or state["tab"]["problems"])
    return EXIT_OK if well else EXIT_FAULTS


def state_lines(state: dict, owner: str) -> dict[str, list[str]]:
    """What there is to say of a daemon, by the word in front of it."""
    tab = state["tab"]
    return {
        "koid": [f"{state['version']}, pid {state['pid']}, since "
                 f"{rfc3339(state['started'])}, {state['home']}"
                 + (", with cron's tabs" if state["system"] else "")],
        "tab": [f"{tab['user']}: {plural(tab['jobs'], 'job')}",
                *tab["problems"]],
        "running": [f"{run['run']} {label_of(run, owner)}, since "
                    f"{began(run)} ({run['trigger']})"
                    for run in state["running"]],
        "late": state["late"],
        "trouble": [text for text in state["troubles"] if not any(
            text.endswith(known.removeprefix("tab"))
            for known in tab["problems"])],     # they were told already
        "next": [rfc3339(state["next"])] if state["next"] else []}


def print_field(word: str, lines: list[str]) -> None:
    for line in lines:
        print(f"{word:8}  {visible(line)}")
        word = ""


# --- import ---------------------------------------------------------------

MARK = "# koitab import: "      # stands before a line that needs a look
EMPTY = '""'
CRON_HEADER = ("# DO NOT EDIT THIS FILE", "# (")
CRON_PIDS = (CRON_PID, "/var/run/crond.pid", "/var/run/cron.pid")
OURS = b"/var/cache/koi"        # stands in the first lines of this program


class Source(Record):
    """A crontab of cron's."""
    path: str
    section: str
    text: str
    system: bool


def cron_program() -> str:
    """The crontab program that is not this one, or ""."""
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


def cron_tab(options: Options, machine: Machine) -> str:
    """The caller's crontab, from cron; "" if there is none. Raises
    Error."""
    import subprocess
    owner, program = options.owner(machine), cron_program()
    if program:
        whose = ["-u", owner] if os.getuid() == 0 else []
        done = subprocess.run(
            [program, *whose, "-l"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode == 0:
            return done.stdout.decode("utf-8", "surrogateescape")
        said = done.stderr.decode("utf-8", "replace").strip()
        if os.geteuid() and "no crontab" not in said:
            raise Error(f"{program} -l: {said}")
    elif os.geteuid():
        raise Error("there is no crontab program that could be asked",
                    f"as root: koitab -u {owner} import")
    for spool in SPOOLS if os.geteuid() == 0 else ():
        path = posixpath.join(spool, owner)
        if os.path.isfile(path):
            lines = machine.tab_text(path).split("\n")
            while lines[0].startswith(CRON_HEADER):
                del lines[0]
            return "\n".join(lines)
    return ""


def sources(options: Options, machine: Machine) -> list[Source]:
    """Every crontab that the caller may see, and koid should take over."""
    owner = options.owner(machine)
    text = cron_tab(options, machine)
    found = [Source(f"crontab of {owner}", owner, text, False)] if text \
        else []
    if os.geteuid():
        return found
    paths = [SYSTEM_TAB] if os.path.isfile(SYSTEM_TAB) else []
    for name in sorted(os.listdir(SYSTEM_FOLDER)
                       if os.path.isdir(SYSTEM_FOLDER) else ()):
        path = posixpath.join(SYSTEM_FOLDER, name)
        if NAME_OF_PACKAGE.issuperset(name):
            paths.append(path)
        elif name[0] != ".":
            options.warn(f"{path} is left out: Debian's cron reads no file "
                         "with such a name")
    for path in paths:
        try:
            found.append(Source(path, posixpath.basename(path),
                                machine.tab_text(path), True))
        except Error as error:
            options.warn(f"{error.message}; it is left out")
    return found


class CronReader(TabReader):
    """Reads a tab in which one job may stand twice, as it may in cron's."""

    def check_twice(self, job: Job) -> None:
        pass


class Importer:
    """Makes one koitab of many crontabs."""

    def __init__(self, owner: str, home: str, others: bool):
        self.owner, self.others = owner, others
        self.lines: list[str] = []
        self.jobs: list[tuple[int, str, Job]] = []  # place, section, job
        self.set: dict[str, None] = {}      # variables of files before
        self.lost: list[str] = []           # what cannot be set back
        self.usual = {
            "SHELL": USUAL_SHELL, "PATH": USUAL_PATH, "HOME": home,
            "MAILTO": owner, "MAILFROM": owner, "CRON_TZ": "",
            "RANDOM_DELAY": "0", "TZ": ":/etc/localtime"}

    def add(self, source: Source) -> None:
        tab = CronReader(source.text, source.system, True, "").read()
        jobs = {job.line: job for job in tab.jobs}
        ours = [job for job in tab.jobs if job.user in ("", self.owner)]
        if not ours and not self.others:
            return
        reasons = {problem.line: f"{problem.what}: {problem.why}"
                   for problem in tab.problems if problem.fatal}
        self.lines += ["", f"[{source.section}]", f"# {visible(source.path)}"]
        self.set_back()
        user = self.owner
        for row, raw in enumerate(source.text.split("\n"), start=1):
            line, job = raw.lstrip(BLANKS), jobs.get(row)
            if job:
                user = self.job(source, raw, job, user)
            elif not line or line[0] == "#":
                self.lines.append(raw)
            elif assignment_of(line) and row not in reasons:
                self.set[assignment_of(line)[0]] = None
                self.lines.append(raw)
            else:
                self.lines += [MARK + reasons.get(row, "no line of cron's"),
                               f"# {raw}"]
        while not self.lines[-1]:
            del self.lines[-1]

    def set_back(self) -> None:
        """What an earlier file set must not hold for this one."""
        for name in self.set:
            if name not in self.usual and name not in self.lost:
                self.lost.append(name)
            quoted = name if name.isidentifier() else f'"{name}"'
            self.lines.append(f"{quoted}={self.usual.get(name) or EMPTY}")
        self.set.clear()

    def job(self, source: Source, raw: str, job: Job, user: str) -> str:
        """An entry, without the column for users. The user of the last
        entry that was printed."""
        line = raw
        if source.system:
            flag = "-n " if job.mail_failures else ""
            head = raw[:len(raw) - len(job.command)].rstrip(BLANKS)
            if flag:
                head = head[:-2].rstrip(BLANKS)
            line = head.removesuffix(job.user) + flag + job.command
        if job.user in ("", self.owner):
            if job.unlogged and self.owner != "root":
                line = line.replace("-", "", 1)     # root alone may say it
            self.jobs.append((len(self.lines), source.section, job))
            self.lines.append(line)
            return self.owner
        if self.others:
            if job.user != user:
                self.lines.append(
                    f"{MARK}this is for {visible(job.user)}: koitab -u "
                    f"{visible(job.user)} import | koitab -u "
                    f"{visible(job.user)} -")
            self.lines.append(f"# {line}")
            return job.user
        return user

    def name_twins(self) -> None:
        """Jobs without a name that are the same need one each, or their
        runs would be mixed up."""
        seen: dict[tuple, list] = {}
        for place, section, job in self.jobs:
            if not job.name:
                seen.setdefault((job.when, job.command), []).append(
                    (place, section, job))
        taken = {job.name for _, _, job in self.jobs}
        for twins in seen.values():
            for place, section, job in twins if len(twins) > 1 else ():
                name = self.free_name(f"{section}: {job.command}", taken)
                line = self.lines[place].lstrip(BLANKS)
                dash = "-" if line[0] == "-" else ""
                self.lines[place] = f'{dash}"{name}" {line[len(dash):]}'

    def free_name(self, text: str, taken: set) -> str:
        """A name that no other job has, made from a text."""
        text = "".join(letter for letter in text if letter != '"'
                       and letter.isprintable())[:50].strip()
        number = 1
        while f"{text} ({number})" in taken:
            number += 1
        taken.add(f"{text} ({number})")
        return f"{text} ({number})"

    def comment_out(self, machine: Machine) -> int:
        """Make comments of the lines that koi refuses, with the reason; how
        many lines need a look."""
        for _ in range(3):      # what one line sets, another may need
            tab, _ = judged(machine, self.text())
            bad = {problem.line: f"{problem.what}: {problem.why}"
                   for problem in reversed(tab.problems) if problem.fatal
                   and problem.line <= len(self.lines)}
            for row in sorted(bad, reverse=True):
                line = self.lines[row - 1]
                self.lines[row - 1:row] = [MARK + visible(bad[row]),
                                           f"# {line}"]
        return sum(line.startswith(MARK) for line in self.lines)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def command_import(options: Options, machine: Machine) -> int:
    import pwd
    owner = options.owner(machine)
    found = sources(options, machine)
    if not found:
        raise no_tab(options, machine)
    importer = Importer(owner, pwd.getpwnam(owner).pw_dir,
                        others=not options.user)
    importer.lines.append("# What cron runs, as a koitab: koitab import")
    for source in found:
        importer.add(source)
    importer.name_twins()
    marked = importer.comment_out(machine)
    put_out(sys.stdout, importer.text().encode("utf-8", "surrogateescape"))
    tell_next(options, importer, marked)
    return EXIT_OK


def tell_next(options: Options, importer: Importer, marked: int) -> None:
    """What to do with an imported tab."""
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
    if any(source_line.startswith("# /etc/") for source_line
           in importer.lines):
        options.warn("koitab daemon --system reads /etc/crontab and "
                     "/etc/cron.d itself: then leave their jobs out")
    pid = running_cron()
    if pid:
        options.warn(f"warning: cron is running (pid {pid}): jobs would run "
                     "twice; once they are installed: systemctl disable "
                     "--now cron")


def running_cron() -> int:
    """The process id of the cron that runs here, or 0."""
    for path in CRON_PIDS:
        try:
            with open(path, encoding="ascii") as file:
                pid = count(file.read(20).strip()) or 0
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


# --- unit, completion, daemon ---------------------------------------------


def command_unit(options: Options, machine: Machine, what: str) -> int:
    if what == "dashboard":
        raise no_dashboard()
    if what != "daemon":
        raise Error(f"there is no unit {short(what)}", "koitab unit daemon",
                    EXIT_USAGE)
    path = os.path.abspath(__file__)
    command = [path] if os.access(path, os.X_OK) else [
        sys.executable, "-IS", path]
    command += ["daemon"] + ["--system"] * options.system
    kept = {name: os.environ[name] for name in ("KOI_HOME", "XDG_STATE_HOME")
            if os.environ.get(name)}
    if sys.platform == "darwin":
        print(plist(command, kept), end="")
        return EXIT_OK
    root = os.geteuid() == 0
    print(UNIT.format(
        where="koitab unit daemon > /etc/systemd/system/koid.service; "
        "systemctl enable --now koid" if root else
        "koitab unit daemon > ~/.config/systemd/user/koid.service; "
        "systemctl\n# --user enable --now koid; loginctl enable-linger",
        conflicts="Conflicts=cron.service crond.service cronie.service\n"
        if options.system else "",
        command=" ".join(map(unit_word, command)).replace("$", "$$"),
        environment="".join(f"Environment={unit_word(f'{n}={value}')}\n"
                            for n, value in kept.items()),
        target="multi-user.target" if root else "default.target"), end="")
    return EXIT_OK


def unit_word(word: str) -> str:
    """A word as systemd reads it, which expands %."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{word}"' if " " in word or '"' in word else word


def plist(command: list[str], environment: dict) -> str:
    """The same for launchd."""
    import plistlib
    return plistlib.dumps({
        "Label": "koid", "ProgramArguments": command,
        "EnvironmentVariables": environment, "RunAtLoad": True,
        "KeepAlive": True,
        "AbandonProcessGroup": True,    # jobs outlive koid
    }, sort_keys=False).decode()


def command_completion(options: Options, machine: Machine, shell: str) -> int:
    if shell == "names":        # what the scripts below ask for
        for job in Link(machine).ask("jobs", **options.whose())["jobs"]:
            if job["name"]:
                print(job["name"])
        return EXIT_OK
    if shell not in COMPLETIONS:
        raise Error(f"no completion for {short(shell)}", "bash, zsh or fish",
                    EXIT_USAGE)
    names = [f"--{name.rstrip('=')}" for name in LONG] + [
        f"-{letter}" for letter in SHORT.replace(":", "")]
    print(COMPLETIONS[shell].replace("COMMANDS", " ".join(COMMANDS)).replace(
        "OPTIONS", " ".join(names)), end="")
    return EXIT_OK


def command_daemon(options: Options, machine: Machine) -> int:
    return run_daemon(machine, options.system)


AS_CRONTAB = {"-e": command_edit, "-l": command_list, "-r": command_remove,
              "-T": command_test}
COMMANDS = {    # name -> function, fewest and most words after it, options
    "run": (command_run, 1, 1 + MOST_PARAMS, "-u"),
    "next": (command_next, 0, 1, "-u -n --from --tab --utc --json"),
    "history": (command_history, 0, 1, "-u -n --json"),
    "log": (command_log, 1, 1, "-u --json"),
    "kill": (command_kill, 1, 1, "-u"),
    "status": (command_status, 0, 0, "-u --json"),
    "import": (command_import, 0, 0, "-u"),
    "daemon": (command_daemon, 0, 0, "--system"),
    "unit": (command_unit, 1, 1, "--system"),
    "completion": (command_completion, 1, 1, "-u"),
}


def as_crontab(options: Options, machine: Machine, words: list[str]) -> int:
    """The part that crontab(1) has, too. Raises Error."""
    def refuse(why: str):
        raise Error(f"usage error: {why}", "koitab --help", EXIT_FAULTS)

    wanted = [name for name in AS_CRONTAB if name in options.given]
    if len(wanted) > 1:
        refuse("only one operation permitted")
    options.allow({"-r": "-r -i -u", "-T": "-T"}.get(
        "".join(wanted), " ".join(["-u", *wanted])),
        "".join(wanted) or "FILE", EXIT_FAULTS)
    if wanted and words:
        refuse("no arguments permitted after this option")
    if wanted:
        return AS_CRONTAB[wanted[0]](options, machine)
    if len(words) > 1:
        refuse(f"what is {short(words[1])}?")
    if not words and options.user:
        refuse("file name must be specified for replace")
    if not words and os.isatty(0):
        refuse("file name or - (for stdin) must be specified")
    return command_replace(options, machine, *words or ["-"])


def obey(argv: list[str], machine: Machine, called: str = PROG) -> int:
    """Do what was typed; the exit status. Raises Error."""
    options = Options(called)
    words = options.read(argv)
    options.judge_user(machine)
    if called == "koid" and words[:1] != ["daemon"]:
        words.insert(0, "daemon")
    name = words[0] if words else ""
    if name in LATER:
        raise no_dashboard()
    if name not in COMMANDS or any(each in AS_CRONTAB
                                   for each in options.given):
        return as_crontab(options, machine, words)
    if called == "crontab" and os.path.lexists(name):
        raise Error(f"{name} is a file and a command",
                    f"crontab ./{name}, or {PROG} {name}")
    function, fewest, most, allowed = COMMANDS[name]
    options.allow(allowed, name, EXIT_USAGE)
    if not fewest <= len(words) - 1 <= most:
        raise Error(f"what is {short(words[most + 1])}?"
                    if len(words) - 1 > most else f"{name} needs a word more",
                    "koitab --help", EXIT_USAGE)
    return function(options, machine, *words[1:])


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
            status = obey(argv, machine or Machine(), called)
        except Shown as text:
            print(text, end="")
            status = EXIT_OK
        sys.stdout.flush()
        return status
    except Error as error:
        hint = f" ({error.hint})" if error.hint else ""
        before = "" if isinstance(error, Said) else f"{called}: error: "
        sys.stdout.flush()
        print(visible(f"{before}{error.message}{hint}"), file=sys.stderr)
        return error.status
    except BrokenPipeError:             # koitab next | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13         # as a program that SIGPIPE ended
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
    except OSError as error:            # a full disk, no descriptor left
        print(visible(f"{called}: error: {error.strerror or error}"),
              file=sys.stderr)
        return EXIT_FAULTS


if __name__ == "__main__":
    sys.exit(main())
