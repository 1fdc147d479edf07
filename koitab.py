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

    Kit       what do both programs need?                (files, clock)
    Time      what do DST and a jumping clock do to minutes?  (nothing)
    Schedule  when does an entry run next?               (nothing)
    Tab       what does a koitab say?                    (nothing)
    Plan      given the time, what should start?         (nothing)
    Machine   what may koi do to this host?              (files)
    Command   what can I type?                           (terminal)

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

import fcntl
import os
import posixpath
import sys
import time
from bisect import bisect_right

PROG, VERSION = "koitab", "1.0"

EXIT_OK = 0
EXIT_FAULTS = 1         # as crontab(1): whatever is wrong, it says 1
EXIT_USAGE = 2          # wrong usage of a command that crontab(1) lacks
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
        self.minute_seconds = tuple(
            MINUTE * n for n in range(60) if self.minutes >> n & 1)
        # A month may begin on any weekday, so five weeks and a day of bits.
        self.weeks = sum(self.weekdays << week for week in range(0, 42, 7))
        dated = any(self.months >> month & 1 and self.days & (1 << days) - 1
                    for month, days in enumerate(LONGEST_MONTH))
        weekly = self.months and self.weekdays
        self.never = not (self.minutes and self.hours and (
            dated and weekly if self.both else dated or weekly))
        self.hour_seconds = tuple(
            HOUR * n for n in range(24) if self.hours >> n & 1)

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
LONGEST_DEFAULT = 4096
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
        """The identity in twelve letters, for programs."""
        from hashlib import sha256
        text = "\0".join(self.identity())
        return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]

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
    "after %": "what follows % is the job's input; write \\% for a percent",
    r"after $'..\'..'": "shells read that in two ways; use other quotes",
    "nested too deep": ALONE,
}
# Programs that read a value a second time, as code: no quoting of ours can
# help. A letter: only with this option ("-c"); "": always.
PARSERS = {
    "eval": "", "let": "", "trap": "", "xargs": "", "parallel": "",
    "ssh": "", "watch": "", "awk": "", "gawk": "", "mawk": "", "sed": "",
    "[[": "", "declare": "", "typeset": "", "unset": "", "source": "",
    ".": "", "sh": "c", "bash": "c", "dash": "c", "ksh": "c", "zsh": "c",
    "su": "c", "busybox": "c", "fish": "c", "python": "c", "python3": "c",
    "perl": "eE", "ruby": "e", "node": "e", "php": "r", "lua": "e",
    "read": "", "mapfile": "", "readarray": "", "getopts": "",
    "env": "S", "mysql": "e", "mariadb": "e", "psql": "c", "sqlite3": "",
    "test": "v", "[": "v", "printf": "v", "at": "", "batch": ""}
SHELLS = {"sh", "bash", "dash", "ksh", "zsh", "fish"}
BUILTINS = {"eval", "let", "trap", "[[", "declare", "typeset", "unset",
            "source", ".", "read", "mapfile", "readarray", "getopts"}
WRAPPERS = {"sudo", "doas", "env", "nohup", "nice", "ionice", "timeout",
            "exec", "command", "time", "find", "setsid", "flock", "chroot",
            "busybox", "stdbuf", "runuser", "systemd-run"}
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
        text, word, first = self.text, -1, True
        self.depth += 1
        if self.depth > DEEPEST_SHELL:
            self.rest("nested too deep")
        while self.at < len(text):
            letter = text[self.at]
            if letter in " \t\r\n;&|()<>" or letter == stop:
                if word >= 0:
                    first = self.put_word(word, first)
                    word = -1
                if letter == stop:
                    # A pattern of `case` closes what nobody opened, so
                    # from there on we do not know: it stays inside.
                    if not (place and self.cases):
                        self.at += 1
                        break
                    self.beyond = place
                self.operator(letter, place)
                first = letter in ";&|(" or first and letter in BLANKS
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
        word = self.text[start:self.at].strip("'\"")
        self.words.append((word, first))
        self.cases = self.cases or word == "case"
        name = word.split("=")[0]
        return first and (name != word and name.isidentifier() or word in (
            "if", "then", "else", "elif", "do", "while", "until", "!", "{",
            "time", "exec", "command", "nohup", "setsid", "sudo", "doas"))

    def operator(self, letter: str, place: str) -> None:
        """Take what separates words."""
        text, at = self.text, self.at
        if text.startswith("((", at):
            self.at += 1
            self.walk(place or "in arithmetic", ")")
        elif letter == "(":
            self.at += 1
            self.walk(place, ")")
        elif letter in "<>" and text.startswith("(", at + 1):
            self.at += 2
            self.walk("in <(..) or >(..)", ")")
        elif text.startswith("<<<", at):
            self.at += 3
        elif text.startswith("<<", at):
            self.at += 2
            self.beyond = self.beyond or "in a here-document"
        else:
            self.at += 1

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
        elif letter == "{" and text.startswith("{{", self.at):
            if in_index(text[word:self.at]):
                place = place or "in an array's index"
            self.placeholder(place, first and word == self.at) or self.skip()
        else:
            self.at += 1

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

    def double(self) -> None:
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
                self.at += 1

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
            self.at += 1
            self.walk("in arithmetic", ")")
        elif text.startswith("(", self.at):
            self.at += 1
            self.walk("in $(..)", ")")
        elif text.startswith("{", self.at):
            self.placeholder(place) or self.braces()
        elif text.startswith("[", self.at):     # $[1+2], old and still there
            self.beyond = self.beyond or "in arithmetic"
        elif text.startswith("'", self.at) and not quoted:
            self.ansi_quotes()
        elif text[self.at:self.at + 1] not in ("", '"', "'", "\\", "`", " ",
                                               "\t", ";", ")", "&", "|"):
            self.at += 1        # $$ and $# among others

    def braces(self) -> None:
        """${..}, which may hold all of the others."""
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
            elif letter == "'":
                self.single("in ${..}")
            elif letter == '"':
                self.double()
            elif letter == "`":
                self.backquotes()
            elif letter == "$":
                self.dollar(quoted=False)
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
        if name not in PARSERS or not (first or wrapped
                                       and name not in BUILTINS):
            continue
        after = []
        for later, begins in words[number + 1:]:
            if begins:
                break
            after.append(later)
        option = PARSERS[name]
        if not option:
            return name
        if any(later[:1] == "-" and later[:2] != "--"
               and any(letter in later for letter in option)
               for later in after):
            return f"{name} -{option[0]}"
        if name in SHELLS and number and not after:
            return name                     # echo {{x}} | sh
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
        if after >= 0 and "}}" in command[after:] and not is_foreign(
                command[after + 2:command.index("}}", after)]):
            lexer.found.append(Found(after, after + 2, "after %"))
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
        if params:
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

        parts = [part.strip(BLANKS) for part in inner.split(",", 2)]
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
            if len(default) > LONGEST_DEFAULT:
                reason = f"at most {LONGEST_DEFAULT:,} characters"
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
        if not self.system and job.command.split(None, 1)[0] == "root":
            self.note(at, "odd command", "the command is `root`",
                      "only /etc/crontab and cron.d have a column for users")
        percent = split_percent(job.command)[2]
        if percent < len(job.command) and job.command[
                percent + 1:percent + 2].isalpha() and "date" in job.command:
            self.note(at + percent, "odd command", "the command ends here, "
                      "and the rest is its input", r"write \%")

    def warn_of_parsers(self, lexer: Lexer, at: int) -> None:
        where = at + lexer.found[0].start
        parser = second_parser(lexer.words)
        if parser:
            self.note(where, "unsafe argument", f"{visible(parser)} reads the "
                      "value again, as code: whoever fills it in can run "
                      "anything")
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
# Plan: given the time, what should start?                        (nothing)
#
# The daemon sleeps until something is due and cron looks at the wall each
# minute; both must come to the same. So the minutes of a sleep are played
# as cron would have played them, by a clock that nobody can set, and then
# one look at the wall is judged by the rule of the section Time.
# ==========================================================================


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


def plan(jobs: list[Job], since: Watch, now: Reading
         ) -> tuple[Watch, list[Launch]]:
    """What fell due after the last look and up to `now`, in order, and the
    watch to go on with. Each start is given once, whenever we look.

    Up to the first start the time passed as it should: the daemon slept.
    From there to now something kept it, and cron would have been kept too.
    """
    after = int(since.seen.wall // 1)
    unset = int((since.seen.wall + now.ticks - since.seen.ticks) // 1)
    if unset // MINUTE == after // MINUTE:
        return since, []            # cron would still be asleep
    due = first_due(jobs, since)
    until = unset if due is None else min(unset, due - 1)
    if now.wall // MINUTE != unset // MINUTE:       # somebody set the clock
        until = min(until, unset // MINUTE * MINUTE - 1)
    dials, launches = {}, []
    for name, dial in since.dials.items():
        dial = passed(dial, after, until)
        first = wall_minute(dial.zone, now.wall)
        if first != dial.running:
            launches += look([job for job in jobs if job.schedule
                              and job.settings.zone == name], dial, first,
                             first - dial.zone.offset(int(now.wall // 1)))
            dial = dial.but(running=first,
                            virtual=played(dial.virtual, first, first))
        dials[name] = dial
    # Of jobs that are due in one minute, cron starts the last line first.
    launches.sort(key=lambda launch: (launch.due, launch.wall,
                                      -launch.job.line))
    return Watch(now, dials), launches


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
# Machine: what may koi do to this host?                            (files)
#
# One short method for each thing. Nothing here decides: what a text or a
# zone file means is above, what to do about it below.
# ==========================================================================

LONGEST_TAB = 2**20
LONGEST_ZONE_FILE = 2**16
ZONE_FOLDERS = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo",
                "/usr/share/lib/zoneinfo", "/etc/zoneinfo")
LOCAL_ZONE = "/etc/localtime"


class Machine:
    """Everything koi does to this host."""

    def __init__(self, clock: Clock | None = None):
        self.clock = clock or Clock()

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

    def salt(self) -> str:
        """What ~ in a tab is picked by: the same here, another elsewhere."""
        return f"{os.uname().nodename}:{os.geteuid()}"


# ==========================================================================
# Command: what can I type?                                      (terminal)
#
# One function for each command. `main` is the only way out: it turns an
# Error into one line on stderr and an exit status.
# ==========================================================================

USAGE = """\
koitab: cron, with names, sections and forms.

Usage:
  koitab next [NAME] --tab FILE [-n N] [--from TIME] [--utc] [--json]
                       the next starts of a tab, or of one of its jobs
  koitab -T FILE       test a tab: every fault, and what looks wrong

Options:
      --tab FILE       the tab; - is standard input
  -n, --number N       how many starts of each job (default: 5)
      --from TIME      starts later than this: 2026-03-29T01:30, with an
                       offset or Z, or the wall's time (default: now)
      --utc            show times in UTC
      --json           for programs
  -T FILE              test this file
  -h, --help           this text
  -V, --version        the version

TZ sets the time zone, CRON_TZ in a tab that of the lines below it. NAME is
a job's name, its tag, or its line.

Exit status: 0 all well; 1 the tab has faults, or something is not there;
2 wrong usage.
"""

SHORT = "T:n:hV"
LONG = ["tab=", "number=", "from=", "utc", "json", "help", "version"]
SYSTEM_TABS = ("/etc/crontab", "/etc/cron.d/")
LONGEST_LIST = 100_000


class Shown(Exception):
    """There is nothing to do but to show a text."""


class Options:
    """What was typed."""

    def __init__(self):
        self.tab, self.start, self.test, self.number = "", "", "", 5
        self.utc = self.json = False

    def read(self, argv: list[str]) -> list[str]:
        """Take the options from both sides of the command; the rest of the
        words. Raises Error."""
        # getopt would load gettext, and with it `re`, to translate two
        # messages; without it, it says them in English.
        sys.modules.setdefault("gettext", None)
        import getopt
        if sys.modules["gettext"] is None:
            del sys.modules["gettext"]
        try:
            found, words = getopt.gnu_getopt(argv, SHORT, LONG)
        except getopt.GetoptError as error:
            raise Error(str(error), "koitab --help", EXIT_FAULTS
                        if "-T" in argv else EXIT_USAGE) from None
        for name, value in found:
            self.put(name, value)
        return words

    def put(self, name: str, value: str) -> None:
        if name in ("-h", "--help"):
            raise Shown(USAGE)
        if name in ("-V", "--version"):
            raise Shown(f"{PROG} {VERSION}\n")
        if name == "-T":
            self.test = value
        elif name == "--tab":
            self.tab = value
        elif name == "--from":
            self.start = value
        elif name in ("-n", "--number"):
            self.number = count(value) or 0
            if not 0 < self.number <= LONGEST_LIST:
                raise Error(f"-n {value}: not a number of starts", "-n 5",
                            EXIT_USAGE)
        else:
            setattr(self, name.strip("-"), True)


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


def loaded(machine: Machine, path: str) -> tuple[Tab, dict[str, Zone]]:
    """Read and judge a tab, its time zones too. Raises Error."""
    tab = parse_tab(machine.tab_text(path),
                    system=path.startswith(SYSTEM_TABS),
                    root=os.geteuid() == 0, salt=machine.salt())
    zones = {}
    for name, (line, column) in tab.zones.items():
        try:
            zones[name] = machine.zone(name)
        except Error as error:
            tab.problems.append(Problem(line, column, "bad setting",
                                        error.message, error.hint))
    zones[""] = machine.local_zone()
    tab.problems.sort(key=lambda problem: (problem.line, problem.column))
    return tab, zones


def tell(tab: Tab, path: str) -> None:
    """Print all that is wrong."""
    for problem in tab.problems:
        print(problem.text(path), file=sys.stderr)


def command_test(options: Options, machine: Machine) -> int:
    """As `crontab -T` of cronie, which stops at the first fault."""
    tab, _ = loaded(machine, options.test)
    tell(tab, options.test)
    if tab.faults():
        print("Invalid crontab file. Syntax issues were found.",
              file=sys.stderr)
        return EXIT_FAULTS
    print("No syntax issues were found in the crontab file.",
          file=sys.stderr)
    return EXIT_OK


def chosen(jobs: list[Job], name: str) -> list[Job]:
    """The jobs that a name means. Raises Error."""
    found = [job for job in jobs if not name or name in (
        job.name, job.tag, str(job.line), f"{job.section}/{job.name}")]
    if name and not found:
        meant = nearest(name, [job.name for job in jobs if job.name])
        raise Error(f"there is no job {short(name)}",
                    f"did you mean {short(meant)}?" if meant else
                    "a job's name, its tag, or its line")
    return found


def starts_of(job: Job, zones: dict, after: int, many: int) -> list[int]:
    """The next starts of a job."""
    from itertools import islice
    if not job.schedule:
        return []
    return list(islice(job.schedule.starts(after, zones[job.settings.zone]),
                       many))


def command_next(options: Options, machine: Machine, name: str = "") -> int:
    if not options.tab:
        raise Error("which tab?", "koitab next --tab FILE", EXIT_USAGE)
    tab, zones = loaded(machine, options.tab)
    tell(tab, options.tab)
    after = instant_of(options.start, zones[""], machine.clock.now())
    rows = []
    for job in chosen([job for job in tab.jobs
                       if job.settings.zone in zones], name):
        zone = UTC if options.utc else zones[job.settings.zone]
        rows.append((job, [
            utc_stamp(at) if options.utc else stamp(at, zone.offset(at))
            for at in starts_of(job, zones, after, options.number)]))
    if options.json:
        import json
        print(json.dumps([{
            "name": job.name or None, "tag": job.tag, "line": job.line,
            "schedule": job.when, "words": job.words(), "next": starts}
            for job, starts in rows], indent=4, ensure_ascii=False))
    else:
        show(rows)
    return EXIT_FAULTS if tab.faults() else EXIT_OK


def utc_stamp(instant: int) -> str:
    return stamp(instant, 0).replace("+00:00", "Z")


def show(rows: list) -> None:
    """The next starts, for people."""
    section = ""
    for job, starts in rows:
        if job.section != section:
            section = job.section
            print(f"[{visible(section)}]")
        print(f"{visible(job.label)}: {visible(job.words())}")
        for start in starts:
            print(f"    {start}")


COMMANDS = {    # name -> function, most words after it
    "next": (command_next, 1),
}


def obey(argv: list[str], machine: Machine) -> int:
    """Run one command; its exit status. Raises Error."""
    options = Options()
    words = options.read(argv)
    if options.test:
        if words:
            raise Error(f"what is {short(words[0])}?", "koitab -T FILE")
        return command_test(options, machine)
    if not words:
        raise Error("which command?", "koitab --help", EXIT_USAGE)
    name, *rest = words
    if name not in COMMANDS:
        meant = nearest(name, COMMANDS) or "next"
        raise Error(f"there is no command {short(name)}", f"did you mean "
                    f"{meant}? koitab --help", EXIT_USAGE)
    function, most = COMMANDS[name]
    if len(rest) > most:
        raise Error(f"what is {short(rest[most])}?", "koitab --help",
                    EXIT_USAGE)
    return function(options, machine, *rest)


def main(argv: list[str] | None = None,
         machine: Machine | None = None) -> int:
    """Run one command and return its exit status. The only way out."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):      # cron has no locale
                stream.reconfigure(encoding="utf-8",
                                   errors="backslashreplace")
        status = obey(argv, machine or Machine())
        sys.stdout.flush()
        return status
    except Shown as text:
        print(text, end="")
        return EXIT_OK
    except Error as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stdout.flush()
        print(visible(f"{PROG}: error: {error.message}{hint}"),
              file=sys.stderr)
        return error.status
    except BrokenPipeError:             # koitab next | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13         # as a program that SIGPIPE ended
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2


if __name__ == "__main__":
    sys.exit(main())
