#!/usr/bin/python3 -IS
"""mission: a task runner for the daily backup of a system and its clouds.

It loads tasks from a configuration, runs them in order from root's crontab
or by hand, gives what they stored to its owner and commits it, mails and
keeps the log, and pings a monitor only when everything succeeded.

What it promises:
- One failing task never stops the others, and never passes unnoticed: the
  exit status, a line on stderr, the mail and the missing ping all say so.
- Where a user can write, root works by descriptors or as that user. No
  symbolic link leads it out of a storage, no git hook runs as root.
- A run that was killed, or lost its machine, is reported by the next one.
- It hangs on no task, server, mailer or regular expression, and its memory
  stays small whatever a task prints.

It needs Python 3.9 or newer and nothing else. Read it from top to bottom:
values first, then decisions, then effects. A section uses only names from
above it. The table gives the lines of each, its question, what it touches and
who it runs as: C the caller (root from cron), U the user of the task, and
O the owner of the repository.

 248 Common    what do both programs need?              (files, clock)       C
 165 Jsonc     what does the configuration text say?    (nothing)            C
 700 Config    what does the configuration mean?        (nothing)            C
 660 Check     can this configuration run?              (nothing)            C
 166 Plan      what will this run do, in order?         (nothing)            C
 510 Report    what is reported of a run?               (nothing)            C
 671 Processes how is a program started and stopped?   (processes)          C U
 286 Files     who can change a file?                   (files)              C
 320 Host      what is true of this host?               (files)              C
 331 Chown     how does a tree get another owner?       (files)              C
 448 Git       how is a storage committed?             (files, processes)   C O
 215 Client    how is one HTTP request bounded?        (network)            C U
 265 Delivery  how do people hear of a run?             (network, processes) C
 331 Builtins  which tasks need no script?              (files, network)     U
 413 State     what is known of earlier runs?           (files, clock)       C
 236 RunLog    where do the lines of a run go?          (files, terminal)    C
 967 Run       how are the steps of a run carried out?  (machine)            C
 160 Sample    what does `init` write?                  (nothing)            C
 110 Manual    how is a topic printed?                (terminal, processes) C
 471 Help      what can I look up?                     (nothing)            C
1055 Command   what can I type?                         (terminal)           C

The options -I and -S in the first line keep the caller's PYTHON* variables,
the directory of the script and site-packages out of the imports: root runs
this file and the standard library, nothing else. Modules that cost
milliseconds (`re` and `json` among them) are imported where they are used.
"""

# Python 3.6 cannot read on from here, and its error shows this line.
from __future__ import annotations  # mission needs Python 3.9 or newer

import errno
import fcntl
import os
import posixpath
import pwd
import stat
import sys
import time

if sys.version_info < (3, 9):
    sys.exit("mission: error: mission needs Python 3.9 or newer")

PROG, VERSION = "mission", "1.0"

# Those of the standard library that a smaller Python may lack.
NEEDED_MODULES = ("_ssl", "_json", "http", "resource", "smtplib",
                  "unicodedata")

EXIT_OK = 0
EXIT_PROBLEMS = 1       # the run had errors or warnings
EXIT_USAGE = 2
EXIT_DELIVERY = 74      # sysexits(3) EX_IOERR: the tasks succeeded, but a
                        # mail, ping or log could not be delivered
EXIT_BUSY = 75          # EX_TEMPFAIL: another run holds the lock
EXIT_CONFIG = 78        # EX_CONFIG
EXIT_SIGNAL = 128       # plus the number of the signal, as shells report it


# ==========================================================================
# Common: what do both programs need?                      (files, clock; C)
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


def require_modules(names: tuple) -> None:
    """Check that this Python has some modules, of which Debian's
    python3-minimal lacks many. Raises Error."""
    from importlib.machinery import PathFinder
    for name in names:
        if name not in sys.builtin_module_names \
                and not PathFinder.find_spec(name):
            raise Error(f"{sys.executable} has no module {name.strip('_')}",
                        "apt-get install python3")


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
# Jsonc: what does the configuration text say?                  (nothing; C)
#
# JSON (RFC 8259) with // and /* */ comments and trailing commas. The module
# `json` does not give the position of a value, and every diagnostic needs
# one, so mission parses the text itself.
# ==========================================================================

DEEPEST = 50            # levels; a configuration has five, and 100,000 would
                        # exhaust the stack
# Regular expressions for what is between values, for a string, for another
# value, and for the number that such a value may be (RFC 8259).
BLANKS = r"(?s)(?:[ \t\r\n]|//[^\n]*|/\*.*?\*/)*"
STRING = r'(?s)"(?:[^"\\\n]|\\.)*"'
WORD = r'[^ \t\r\n,:\[\]{}"/]+'
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
CONSTANTS = {"true": True, "false": False, "null": None}


class JsoncError(Exception):
    """The text is not JSONC at the offset `at`: why, and how to fix it."""

    def __init__(self, at: int, why: str, hint: str):
        super().__init__(why)
        self.at, self.why, self.hint = at, why, hint


def quoted(text: str) -> str:
    """Return the text in double quotes, escaped, cut to 60 characters."""
    return '"' + escape_controls(text[:60]).replace('"', '\\"') + '"'


class JsoncReader:
    """Reads one text, by recursive descent.

    `places` and `keys` map the path of each value to the offset of the value
    and of its key; `duplicates` has (path, offset) of repeated keys.
    """

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.places: dict[tuple, int] = {}
        self.keys: dict[tuple, int] = {}
        self.duplicates: list[tuple[tuple, int]] = []

    def document(self):
        """Return the value of the text, as `json.loads` does. Raises
        JsoncError."""
        value = self.value((), 0)
        if self.peek():
            self.expect("the end of the file")
        return value

    def stop(self, why: str, hint: str = ""):
        """Raise JsoncError for the current position."""
        raise JsoncError(self.at, why, hint)

    def expect(self, what: str):
        """Raise JsoncError, because something else than `what` is next."""
        word = self.match(WORD) or self.text[self.at:self.at + 1]
        found = "a string" if word == '"' else quoted(word[:20])
        self.stop(f"expected {what}, found {found}" if word
                  else "unexpected end of file")

    def peek(self) -> str:
        """Skip white space and comments; return the next character, or ''
        at the end of the text."""
        self.at += len(self.match(BLANKS))
        if self.text.startswith("/*", self.at):
            self.stop("unterminated comment", "expected */")
        return self.text[self.at:self.at + 1]

    def match(self, expression: str) -> str:
        """Return the match of an expression at the current position, or ''.
        """
        import re
        found = re.compile(expression).match(self.text, self.at)
        return found.group() if found else ""

    def accept(self, mark: str) -> bool:
        """Skip the character `mark`; False if another one is next."""
        if self.peek() != mark:
            return False
        self.at += 1
        return True

    def value(self, path: tuple, depth: int):
        """Read the value at `path`, which is inside `depth` others."""
        mark = self.peek()
        self.places[path] = self.at
        if depth > DEEPEST:
            self.stop("nested too deeply",
                      f"expected at most {DEEPEST} levels")
        if mark == "{":
            return self.mapping(path, depth)
        if mark == "[":
            return self.sequence(path, depth)
        return self.string() if mark == '"' else self.bare_word()

    def mapping(self, path: tuple, depth: int) -> dict:
        """Read the object at `path`."""
        found = {}
        self.accept("{")
        while not self.accept("}"):
            if self.peek() != '"':
                self.expect("a key in double quotes")
            at, key = self.at, self.string()
            if key in found:
                self.duplicates.append((path + (key,), at))
            self.keys[path + (key,)] = at
            if not self.accept(":"):
                self.expect('":"')
            found[key] = self.value(path + (key,), depth + 1)
            if not self.accept(",") and self.peek() != "}":
                self.expect('"," or "}"')
        return found

    def sequence(self, path: tuple, depth: int) -> list:
        """Read the list at `path`."""
        found = []
        self.accept("[")
        while not self.accept("]"):
            found.append(self.value(path + (len(found),), depth + 1))
            if not self.accept(",") and self.peek() != "]":
                self.expect('"," or "]"')
        return found

    def string(self) -> str:
        """Read a string; `json` decodes it if it has escapes."""
        found = self.match(STRING)
        if not found:
            self.stop("unterminated string",
                      'expected a closing " on the same line')
        text = found[1:-1]
        if "\\" in text or not text.isprintable():
            import json     # knows the escapes, and what JSON forbids
            try:
                text = json.loads(found)
            except ValueError as error:
                self.at += getattr(error, "pos", 0)
                self.stop("invalid escape or control character",
                          r"expected escapes such as \n, \t, \\ or \u00e9")
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.stop("half of a surrogate pair",
                      r"expected both halves, as in \ud83d\ude00")
        self.at += len(found)
        return text

    def bare_word(self):
        """Read true, false, null or a number; no NaN and no infinity."""
        import re
        word = self.match(WORD) or self.text[self.at:self.at + 1]
        is_number = len(word) <= 30 and re.fullmatch(NUMBER, word) \
            and abs(float(word)) < 1e300
        if word in CONSTANTS:
            value = CONSTANTS[word]
        elif is_number:
            value = int(word) if word.removeprefix("-").isdigit() \
                else float(word)
        else:
            self.expect("a value")
        self.at += len(word)
        return value


# ==========================================================================
# Config: what does the configuration mean?                     (nothing; C)
#
# Text becomes values with positions, values become a Config with absolute
# paths. Each error is a Diagnostic: all of them are collected, never the
# first alone. One table of keys for each object of the configuration gives
# the type and the default of a key.
# ==========================================================================

DEFAULT_CONFIG = "mission.config.json"
LOWER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"

# Regular expressions. That of an address is stricter than RFC 5321, because
# the address becomes an argument of sendmail.
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
ADDRESS = (r"[A-Za-z0-9_][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,63}"
           r"@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?")
HOST_NAME = r"(?i)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.?)+"
SLUG_RULE = "expected letters a-z, digits, - and _, at most 64"
# Built-in tasks that are part of this file -> the storages they need.
CARRIED = {"spotify": ("sync", "sessions")}


def is_label(text: str, first: str) -> bool:
    """Whether the text is a slug or the name of a storage or group: at most
    64 of a-z, digits, - and _; the first one is in `first`."""
    import re
    return bool(re.fullmatch(f"[{first}][a-z0-9_-]{{0,63}}", text))


def shell_word(path: str) -> str:
    """Return a path for a command that a person pastes into a shell. Another
    user may have chosen its name."""
    import shlex
    return shlex.quote(path)


def with_config(hint: str, file: str) -> str:
    """Return a hint with `-c FILE` in its command, if that is one of mission
    and `file` is not the default."""
    import re
    if file == DEFAULT_CONFIG or "--help" in hint:
        return hint
    option = f"{PROG} -c {shell_word(file)} "
    return re.sub(rf"^{PROG} (?!-c )", lambda _: option, hint)


class ValueType(FrozenRecord):
    """The values that a key may have, and how they are read and written."""
    expected: str               # in a diagnostic, after "expected"
    json: tuple                 # their Python types in JSON
    read: object = None         # JSON value -> the program's value, or None
    write: object = None        # and back, for `dump`
    record: object = None       # class of the objects in the value, if any
    form: str = ""              # of objects: "one", "list" or "map"

    def value(self, found):
        """Return the program's value for a JSON value; None if it does not
        fit."""
        if type(found) not in self.json:
            return None
        return self.read(found) if self.read else found


def texts(found: list) -> tuple | None:
    """Return the items as a tuple; None if one of them is not a string."""
    return tuple(found) if all(isinstance(v, str) for v in found) else None


def number(low: int, high: int) -> ValueType:
    """Return the type of a key that takes a whole number."""
    return ValueType(f"a whole number from {low} to {high}", (int,),
                     lambda v: v if low <= v <= high else None)


def one_of(*words: str) -> ValueType:
    """Return the type of a key that takes one of some words."""
    return ValueType(" or ".join(f'"{word}"' for word in words), (str,),
                     lambda v: v if v in words else None)


SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int | None:
    """Return the bytes in "512", "100K", "5G" (powers of 1024); None if
    invalid."""
    import re
    found = re.fullmatch("([0-9]{1,15})([KMGT]?)B?", text)
    return int(found[1]) * SIZE_UNITS[found[2]] if found else None


def format_size(size: int) -> str:
    """Return the bytes in the largest unit that divides them: 5G, 1536M, 100.
    """
    for unit in "TGMK":
        if size and size % SIZE_UNITS[unit] == 0:
            return f"{size // SIZE_UNITS[unit]}{unit}"
    return str(size)


TEXT = ValueType("a string", (str,))
PATH = TEXT.replace(expected="a path")    # made absolute by `resolve_paths`
FLAG = ValueType("true or false", (bool,))
TEXTS = ValueType("a list of strings", (list,), texts)
DURATION = ValueType('a duration such as "90s", "10m" or "2h"', (str,),
                     parse_duration, format_duration)
LIMIT = DURATION.replace(expected=DURATION.expected + ", above zero",
                         read=lambda v: parse_duration(v) or None)
SIZE = ValueType('a size such as "500M" or "5G"', (str,), parse_size,
                 format_size)
VARIABLES = ValueType("an object of strings", (dict,), lambda v: v
                      if texts(v.values()) is not None else None)


def sizes(found: dict) -> dict | None:
    """Return the sizes in bytes; None if one of them is invalid."""
    read = {name: SIZE.value(size) for name, size in found.items()}
    return None if None in read.values() else read


SIZES = ValueType(
    'an object such as {"sync": "5G"}', (dict,), sizes,
    lambda v: {name: format_size(size) for name, size in v.items()})
ADDRESSES = ValueType(
    "an address or a list of addresses", (str, list),
    lambda v: texts(v if isinstance(v, list) else [v] if v else []),
    lambda v: list(v) if len(v) > 1 else "".join(v))
STATUSES = ValueType(
    "a list of exit statuses from 1 to 255", (list,), lambda v: tuple(v)
    if all(type(item) is int and 0 < item < 256 for item in v) else None)


def object_of(record: type, form: str = "one") -> ValueType:
    """Return the type of a key whose value is one object, or a map of objects.
    """
    return ValueType("an object", (dict,), record=record, form=form)


def list_of(record: type) -> ValueType:
    """Return the type of a key whose value is a list of objects."""
    return ValueType("a list of objects", (list,), record=record, form="list")


def each_object(form: str, value, function, where: tuple = ()):
    """Replace the objects in a value by function(object, path of keys)."""
    if form == "one":
        return function(value, where)
    if form == "list":
        return tuple(function(item, where + (index,))
                     for index, item in enumerate(value))
    return {name: function(value[name], where + (name,))
            for name in sorted(value)}


REQUIRED = object()     # in place of a default: the key must be there


class ConfigObject(FrozenRecord):
    """An object of the configuration; its keys are its fields.

    A row of `keys` gives the type of a key, its default and its meaning.
    None as a default is "not set"; `dump` leaves such a key out. The topic
    `config` has each key.
    """

    keys: dict = {}
    where: tuple = ()           # the path of keys that leads to the object

    def __init__(self, **fields):
        vars(self).update(fields)


class Task(ConfigObject):
    """A task of the configuration."""
    keys = {
        "slug": (TEXT, REQUIRED, "the name in commands, paths and reports: "
                 "letters a-z, digits, - and _, at most 64"),
        "name": (TEXT, "", "the name for people; by default the slug"),
        "type": (one_of("exec", "builtin"), REQUIRED,
                 "how it runs: exec is a program, builtin a Python function"),
        "scheduled": (FLAG, False, "run the task if there is no -t"),
        "post": (FLAG, False,
                 "run the task after all others, chown and commit"),
        "entrypoint": (PATH, "", "the program of an exec task; by default "
                       "TASKS_DIR/slug/run"),
        "timeout": (LIMIT, None, "the time limit of an attempt: then SIGTERM "
                    "to the process group of the task, SIGKILL 10 s later, "
                    "and the task has failed; by default no limit"),
        "retries": (number(0, 100), 0, "how many times to run the task again "
                    "after a failure"),
        "retryDelay": (DURATION, 0.0, "the pause before each retry"),
        "needs": (TEXTS, (), "slugs of tasks that run before, scheduled or "
                  "not. The task is skipped with a warning unless all of "
                  "them succeeded"),
        "parallel": (TEXT, "", "a group name: tasks of one group that follow "
                     "each other run side by side, and their lines in the "
                     "log begin with the slug"),
        "ping": (TEXT, "", "a URL to ping after a headless run of the task if "
                 "it succeeded, URL/fail if it did not, nothing if "
                 "skipStatuses skipped it. ping.enabled need not be set; "
                 "timeout, retries, proxy and caFile of ping apply"),
        "user": (TEXT, "", "the user to run as (uid, groups, HOME) when "
                 "mission runs as root. The user must be able to reach the "
                 "program. A storage with chown does not change the user's "
                 "files. By default the user that runs mission"),
        "env": (VARIABLES, {}, "more environment variables"),
        "nice": (number(0, 19), 0, "the niceness"),
        "minFree": (SIZES, {}, "the free space that each storage must have "
                    "when the task starts; else the task fails"),
        "storages": (TEXTS, None, "the storages that the task needs: it fails "
                     "if one is missing, does not answer, or is not mounted "
                     "(`mounted`). The task that mounts one has []. By "
                     "default all storages with `mounted`"),
        "okStatuses": (STATUSES, (), "more exit statuses that are a success, "
                       "such as 24 of rsync"),
        "warnStatuses": (STATUSES, (), "exit statuses that are a success with "
                         "a notice, such as 1 of borg or 3 of restic: the "
                         "subject of the mail has [WARNING], and `mission "
                         "status` returns 1"),
        "skipStatuses": (STATUSES, (), "exit statuses that are neither "
                         "success nor failure, such as 75: tasks that need "
                         "the task are skipped. A status may be in one of "
                         "the three lists only"),
    }


class Defaults(ConfigObject):
    """The values for every task that does not set its own."""
    keys = {key: (kind, None, meaning)
            for key, (kind, _, meaning) in Task.keys.items()
            if key in ("timeout", "retries", "retryDelay", "nice", "env")}


# What an exit status means -> the key with a list of those statuses.
STATUS_KEYS = {"okStatuses": "ok", "warnStatuses": "warn",
               "skipStatuses": "skip"}


class User(ConfigObject):
    """The unprivileged user whose backups these are."""
    keys = {
        "name": (TEXT, REQUIRED, "the login name"),
        "email": (ADDRESSES, (), "the addresses that mail goes to; needed "
                  "for mail"),
    }


class Storage(ConfigObject):
    """A directory that tasks write to, known by its key in `storage`."""
    keys = {
        "path": (PATH, REQUIRED, "the directory; tasks get it as NAME_DIR. "
                 "The storages `tasks` and `logs` are required"),
        "chown": (FLAG, False, "give all files to user.name after the tasks"),
        "commit": (FLAG, False, "commit all files with git after the tasks "
                   "and chown"),
        "mounted": (FLAG, False, "the directory must be a mount point when a "
                    "task that needs it starts, and before chown and commit"),
    }

    @property
    def name(self) -> str:
        """The key of this storage in `storage`."""
        return self.where[-1]

    @property
    def variable(self) -> str:
        """The environment variable in which tasks get the path."""
        return self.name.upper().replace("-", "_") + "_DIR"


class Ping(ConfigObject):
    """The monitor that is pinged when a run succeeded."""
    keys = {
        "enabled": (FLAG, False, "ping after a headless run that succeeded"),
        "endpoint": (TEXT, "", "the http or https URL. In every ping URL %s "
                     "becomes the host name, USER:PASSWORD@ logs in, and an "
                     "international host name is written in its xn-- form"),
        "start": (FLAG, False, "also ping endpoint/start when a run starts"),
        "fail": (FLAG, False, "also ping endpoint/fail when a run failed"),
        "startEndpoint": (TEXT, "", "the URL to ping when a run starts, used "
                          "as written; it turns that ping on"),
        "failEndpoint": (TEXT, "", "the URL to ping when a run failed, used "
                         "as written; it turns that ping on"),
        "log": (FLAG, False, "send the end of the filtered log with the "
                "ping, as the body of a POST"),
        "timeout": (DURATION, 10.0, "the time limit of one request, with "
                    "the look-up of the name"),
        "retries": (number(1, 20), 3, "the most requests for one ping. A "
                    "status 4xx except 408 and 429 is not repeated"),
        "proxy": (TEXT, "", "an HTTP proxy, http://USER:PASSWORD@HOST:PORT"),
        "caFile": (PATH, "", "certificates (PEM) to trust in place of the "
                   "system's"),
    }

    def wants(self, action: str) -> bool:
        """Whether "start" or "fail" is pinged."""
        return getattr(self, action) or bool(
            getattr(self, action + "_endpoint"))


class Notify(ConfigObject):
    """The notification on the user's desktop."""
    keys = {"enabled": (FLAG, False, "show a notification on the desktop of "
                        "user.name at start and end, with notify-send")}


class Smtp(ConfigObject):
    """The mail server, for mail.type "smtp"."""
    keys = {
        "host": (TEXT, "", "the name of the server; needed for type smtp"),
        "port": (number(1, 65535), None, "the port; by default 587 for "
                 "starttls, 465 for tls, 25 for none"),
        "security": (one_of("starttls", "tls", "none"), "starttls",
                     "how the connection is encrypted. mission never uses "
                     "less"),
        "user": (TEXT, "", "the name to log in with"),
        "passName": (TEXT, "", "the name of the password, for passBin"),
        "from": (TEXT, "", "the address of the sender; by default mail.from, "
                 "else mail.smtp.user if it is an address"),
        "caFile": (PATH, "", "certificates (PEM) to trust in place of the "
                   "system's"),
    }


class Mail(ConfigObject):
    """The mails at the start and the end of a run."""
    keys = {
        "enabled": (FLAG, False, "send mail when a headless run starts and "
                    "ends"),
        "type": (one_of("sendmail", "smtp"), "sendmail", "how mail is sent"),
        "on": (one_of("always", "failure", "never"), "always",
               "the results that are mailed. With failure there is no mail "
               "of the start"),
        "start": (FLAG, True, "also send a mail when a run starts"),
        "from": (TEXT, "", "the address of the sender; by default "
                 "mission <USER@HOST>"),
        "smtp": (object_of(Smtp), None, "the mail server"),
    }


class Logs(ConfigObject):
    """The run logs in storage.logs."""
    keys = {
        "keep": (number(1, 10**6), None, "how many run logs to keep, with "
                 "that of the current run; by default all"),
        "max": (SIZE, 2**30, "the most that is logged of the output of one "
                "task. Beyond it only head and tail are kept, and counted"),
    }


class Metrics(ConfigObject):
    """The metrics for Prometheus."""
    keys = {"textfile": (PATH, "", "a file for the textfile collector of "
                         "node_exporter, written after each headless run "
                         "without -t")}


class Config(ConfigObject):
    """A whole configuration. `path` is that of its file."""
    keys = {
        "tasks": (list_of(Task), REQUIRED, "what to run, in this order"),
        "defaults": (object_of(Defaults), {}, "values for all tasks"),
        "runTimeout": (LIMIT, None, "the time limit of a whole run: then the "
                       "running task is stopped, the rest is skipped, and "
                       "the run has failed; by default no limit"),
        "user": (object_of(User), REQUIRED, "whose backups these are"),
        "passBin": (PATH, "", "the program that prints the password whose "
                    "name is its argument, such as /usr/bin/pass"),
        "storage": (object_of(Storage, "map"), REQUIRED, "the directories"),
        "ping": (object_of(Ping), {}, "the monitor"),
        "notify": (object_of(Notify), {}, "the desktop notification"),
        "mail": (object_of(Mail), {}, "the mails"),
        "filters": (TEXTS, (), "regular expressions of lines that are left "
                    "out of mail and ping, but not of the log"),
        "redact": (TEXTS, (), "regular expressions of what becomes *** in "
                   "the log and everything made from it"),
        "logs": (object_of(Logs), {}, "the run logs"),
        "metrics": (object_of(Metrics), {}, "the metrics"),
        "trust": (one_of("user", "root"), "user",
                  "who may be able to write what root runs: user.name, or "
                  "root alone. See `mission help security`"),
    }

    path: str = ""
    real_path: str = ""         # the same without symbolic links

    def directory(self, name: str) -> str:
        """Return the directory of the storage `name`."""
        return self.storage[name].path


def key_paths(record: type, path: str = "") -> dict[str, tuple]:
    """Return each key of a configuration by its path: storage.NAME.chown."""
    found = {}
    for key, row in record.keys.items():
        mark = {"list": "[]", "map": ".NAME"}.get(row[0].form, "")
        found.update(key_paths(row[0].record, f"{path}{key}{mark}.")
                     if row[0].record else {path + key: row})
    return found


RENAMED = {"from": "sender"}    # `from` is a keyword of Python


def field_of(key: str) -> str:
    """retryDelay -> retry_delay: a key's field in its record."""
    return RENAMED.get(key) or "".join(
        "_" + c.lower() if c.isupper() else c for c in key)


def key_path(path: tuple) -> str:
    """("tasks", 0, "slug") -> tasks[0].slug"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}"
                   for part in path)
    return text.removeprefix(".")


KINDS = {dict: "an object", list: "a list", type(None): "null"}


def is_endpoint(url: str) -> bool:
    """Whether the URL is http or https and can be requested.

    The host name must be ASCII: an international one has several forms (IDNA
    2003 and 2008). A user's name cannot hold ":" (RFC 7617).
    """
    from urllib.parse import unquote, urlsplit
    try:
        parts = urlsplit(url.replace("%s", "host"))
        host = parts.hostname or ""
        return (parts.scheme in ("http", "https") and url.isprintable()
                and not set(url) & {" ", "\\"} and parts.port != 0
                and bool(host) and host.encode("idna").decode() == host
                and ":" not in unquote(parts.username or ""))
    except ValueError:          # of the port, brackets that do not match,
        return False            # or a part of the host name


def public_url(url: str) -> str:
    """Return the part of a URL that messages name; the rest may hold a secret.
    """
    from urllib.parse import urlsplit
    if not is_endpoint(url):
        return "an invalid URL"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"


def described(value) -> str:
    """Return an invalid value, short enough for a line. Of a URL only the
    server is shown, because the rest may be a secret."""
    if type(value) in KINDS:
        return KINDS[type(value)]
    if isinstance(value, str):
        return quoted(public_url(value) if "://" in value else value)
    return str(value).lower()


def suggestion(word: str, words) -> str:
    """Return a hint with the one of `words` that was meant, or with all of
    them."""
    meant = nearest(word, words)
    return f"did you mean {meant}?" if meant \
        else "expected one of " + ", ".join(words)


class DiagnosticList:
    """The diagnostics of one text, in the order in which they were found.

    `places` and `keys`: path of keys -> offset of that value, of that key.
    """

    def __init__(self, text: str):
        self.text, self.found = text, []
        self.places: dict[tuple, int] = {}
        self.keys: dict[tuple, int] = {}
        self.paths: set[tuple] = set()      # paths that have a diagnostic

    def add(self, path: tuple, why: str, hint: str,
            at: int | None = None, scope: str = "",
            fatal: bool = True) -> None:
        """Add an error of the value at `path`, or at the offset `at`; if not
        `fatal` a warning, which only `check` shows.

        Its place is that of the value, or of the nearest object around it.
        """
        self.paths.add(path)
        place = path
        while place and place not in self.places:
            place = place[:-1]
        at = self.places.get(place, 0) if at is None else at
        self.found.append(Diagnostic(
            self.text.count("\n", 0, at) + 1,
            at - self.text.rfind("\n", 0, at), key_path(path), why, hint,
            fatal=fatal, scope=scope))


class ConfigReader:
    """Turns text into a Config; errors are collected in `diagnostics`."""

    def __init__(self, text: str, path: str, real_path: str = ""):
        self.path, self.diagnostics = path, DiagnosticList(text)
        self.real_path = real_path or path
        self.values = self.parse(text)

    def parse(self, text: str):
        """Return the JSON value of the text; None if it is not JSONC."""
        add, reader = self.diagnostics.add, JsoncReader(text)
        if text.startswith("\ufeff"):
            return add((), "the file begins with a byte order mark",
                       "expected UTF-8 without one")
        try:
            values = reader.document()
        except JsoncError as error:
            return add((), error.why, error.hint, error.at)
        self.diagnostics.places = reader.places
        self.diagnostics.keys = reader.keys
        for path, at in reader.duplicates:
            add(path, "duplicate key", "remove one of them", at)
        return values

    def config(self) -> Config | None:
        """Return the configuration, with paths as written; None if the text is
        not an object."""
        if isinstance(self.values, dict):
            config = self.read_object(Config, self.values, ())
            return config.replace(
                path=self.path, real_path=self.real_path,
                tasks=tuple(self.with_defaults(task, config.defaults)
                            for task in config.tasks))
        if not self.diagnostics.found:
            self.diagnostics.add((), "expected an object, found "
                                 + described(self.values), "")
        return None

    def with_defaults(self, task: Task, defaults: Defaults) -> Task:
        """Return the task with the defaults of the keys that it does not set.
        """
        values = self.values["tasks"][task.where[-1]]
        if not isinstance(values, dict):
            return task
        return task.replace(**{
            field_of(key): getattr(defaults, field_of(key))
            for key in Defaults.keys if values.get(key) is None
            and getattr(defaults, field_of(key)) is not None})

    def read_object(self, record: type, values, where: tuple,
                    report: bool = True) -> ConfigObject:
        """Return one object. Defaults take the place of what is missing or
        wrong, so that the rest can still be checked. With `report` a required
        key that is missing is an error."""
        is_object = isinstance(values, (dict, type(None)))
        if not is_object:
            self.diagnostics.add(where, "expected an object, found "
                                 + described(values), "")
        values = values or {} if is_object else {}
        for key in values:
            if key not in record.keys:
                path = where + (key,)
                homes = [home for home in key_paths(Config)
                         if home.endswith("." + key)]
                self.diagnostics.add(path, "unknown key",
                                     f"expected in {' or '.join(homes)}"
                                     if homes else
                                     suggestion(key, record.keys),
                                     self.diagnostics.keys.get(path))
                self.diagnostics.paths.update(      # Go ignores case
                    where + (known,) for known in record.keys
                    if known.lower() == key.lower())
        fields = {field_of(key): self.read_value(
            values.get(key), where + (key,), kind, default,
            is_object and report)
            for key, (kind, default, _) in record.keys.items()}
        return record(where=where, **fields)

    def read_value(self, value, path: tuple, kind: ValueType, default,
                   report: bool):
        """Return the value of one key; null is "not set", as in the original.
        """
        read = kind.value(value)
        found = read
        if read is None:
            found = kind.json[0]() if default is REQUIRED else default
        if value is None:
            if default is REQUIRED and report \
                    and path not in self.diagnostics.paths:
                self.diagnostics.add(path, "missing key",
                                     f"expected {kind.expected}")
        elif read is None:
            what = "unknown type" if path[-1] == "type" else "invalid value"
            self.diagnostics.add(path, f"{what} {described(value)}",
                                 f"expected {kind.expected}")
        if not kind.record or found is None:
            return found
        # An object that is missing has one diagnostic, not one for each key.
        return each_object(kind.form, found, lambda values, where:
                           self.read_object(kind.record, values, where,
                                            read is not None), path)


NO_SUCH_USER = "expected the name of a user of this host"


class UnknownHome(ValueError):
    """`~` stands for the home of a user who does not exist."""


def absolute_path(path: str, base: str, user: str, home_of) -> str:
    """`path` without `~` and, if relative, relative to the directory `base`.

    `~` is the home of `user`, `~bob` that of bob. `home_of(name)` returns a
    home or None. Raises ValueError with what is wrong, UnknownHome with the
    name of the user.
    """
    if "\0" in path:
        raise ValueError("a path cannot contain NUL")
    if path.startswith("~"):
        name, _, rest = path[1:].partition("/")
        home = home_of(name or user)
        if home is None:
            raise UnknownHome(name or user)
        path = posixpath.join(home, rest)
    # normpath(3) keeps two leading slashes, which POSIX leaves open.
    return "/" + posixpath.normpath(posixpath.join(base, path)).lstrip("/")


def resolve_paths(record: ConfigObject, absolute) -> ConfigObject:
    """Return the record with absolute(path, path of keys) for each of its
    paths."""
    changes = {}
    for key, (kind, _, _) in record.keys.items():
        value = getattr(record, field_of(key))
        if kind is PATH and value:
            changes[field_of(key)] = absolute(value, record.where + (key,))
        elif kind.record and value is not None:
            changes[field_of(key)] = each_object(
                kind.form, value, lambda item, _: resolve_paths(
                    item, absolute))
    return record.replace(**changes)


def resolved(config: Config, home_of, diagnostics: DiagnosticList) -> Config:
    """Return the configuration with absolute paths, and a name and an
    entrypoint for each task. `home_of(name)` returns a home or None.

    A path that cannot be resolved becomes "". Relative paths start from the
    directory of the file itself, also if a symbolic link leads to it.
    """
    homeless: list[tuple] = []  # paths below ~ of user.name, if unknown

    def absolute(path: str, where: tuple) -> str:
        if path.startswith("~") and not config.user.name:
            return ""           # the missing name is reported
        hint = "expected an absolute path, or ~ of a user of this host"
        try:
            return absolute_path(path, posixpath.dirname(config.real_path),
                                 config.user.name, home_of)
        except UnknownHome as error:
            if str(error) == config.user.name:
                homeless.append(where)
            else:
                diagnostics.add(where, f"{described(path)}: cannot expand ~: "
                                f"user {quoted(str(error))} does not exist",
                                hint)
        except ValueError as error:
            diagnostics.add(where, str(error), hint)
        return ""

    found = resolve_paths(config, absolute)
    if homeless:
        diagnostics.add(
            ("user", "name"), f"user {described(config.user.name)} does not "
            f"exist, so ~ cannot be expanded in "
            f"{plural(len(homeless), 'path')}", NO_SUCH_USER)
    directory = found.directory("tasks") if "tasks" in found.storage else ""
    return found.replace(tasks=tuple(task.replace(
        name=task.name or task.slug,
        entrypoint=task.entrypoint or (
            posixpath.join(directory, task.slug, "run")
            if task.type == "exec" and directory else ""))
        for task in found.tasks))


def as_json(record: ConfigObject) -> dict:
    """Return what `dump` prints, which is a valid configuration."""
    found = {}
    for key, (kind, _, _) in record.keys.items():
        value = getattr(record, field_of(key))
        if value is None:
            continue
        if kind.record:
            value = each_object(kind.form, value,
                                lambda item, _: as_json(item))
        elif kind.write:
            value = kind.write(value)
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


# ==========================================================================
# Check: can this configuration run?                            (nothing; C)
#
# Everything that `check` reports about a configuration that can be read.
# Facts about the host (does a user, a file exist?) come in as HostFacts, so
# every decision here can be tested without a host.
# ==========================================================================

# Root, and what chown(2) takes for "leave it" (-1 in 16 and 32 bits).
NOT_A_USER = frozenset((0, -1, 2**16 - 1, 2**32 - 1))

# A chown of these by root would give the system to a user.
SYSTEM_DIRECTORIES = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib32 /lib64 /media /mnt /opt /proc "
    "/root /run /sbin /srv /sys /tmp /usr /usr/bin /usr/lib /usr/local "
    "/usr/local/bin /usr/sbin /usr/share /var /var/cache /var/lib /var/log "
    "/var/spool /var/tmp /Applications /Library /System /Users /Volumes "
    "/private /private/etc /private/var".split())
ONLY_BACKUPS = "expected a directory that contains only backups"
BASH_RULE = "set -euo pipefail"


def protection(writer: str) -> str:
    """Return the command against what `untrusted_writer` found, or ""."""
    path, verb, who = writer.rpartition(" is writable by ")
    for start, change in (("everyone", "o-w"), ("its group", "g-w")):
        if who.startswith(f"{start} (mode"):
            return f"chmod {change} {shell_word(path)}"
    return f"setfacl -b {shell_word(path)}" if verb else ""


class Script(FrozenRecord):
    """What the host says of a task's file."""
    path: str
    state: str = ""             # "" or what is wrong: "does not exist", ...
    head: str = ""              # its first bytes, one character each
    missing_interpreter: str = ""   # named in the #! line and not there
    writer: str = ""            # who else could change what root runs
    barred: tuple = ()          # (why, hint): its user cannot start it


class HostFacts(FrozenRecord):
    """What the host says of everything that a configuration names."""
    uids: dict                  # user name -> uid, or None
    storages: dict              # storage name -> result of storage_facts
    scripts: dict               # slug -> Script
    programs: dict              # program -> path, or None
    usable: dict                # path of passBin, CA file -> "" or a reason
    writer: str = ""            # who else could change the configuration


# What a run cannot use because of a diagnostic. Nothing at all: "" (the
# whole file) and "trust" (it is not even used to send an alert). Else the run
# is made without: "task SLUG", "storage NAME", "chown NAME", "filters",
# "mail", "address" (the others get the mail), "ping", "ping SLUG", "passBin",
# "caFile"; and with "delivery", which is reported by `check` only: the run
# itself finds out what could not be delivered.
SCOPES = ("", "trust")


class ConfigValidator:
    """Validates one configuration by the facts; adds to `diagnostics`.

    A value that has a diagnostic already gets no second one. The scope of
    a diagnostic says what a run cannot use, see SCOPES.
    """

    def __init__(self, config: Config, facts: HostFacts,
                 diagnostics: DiagnosticList):
        self.config, self.facts = config, facts
        self.diagnostics, self.known = diagnostics, set(diagnostics.paths)

    def add(self, path: tuple, why: str, hint: str, scope: str = "") -> None:
        """Add an error of the value at `path`, unless it has one already."""
        if not self.is_known(path):
            self.diagnostics.add(path, why, hint, scope=scope)

    def is_known(self, path: tuple) -> bool:
        """Whether the value, or an object around it, has a diagnostic."""
        return any(path[:end] in self.known
                   for end in range(1, len(path) + 1))

    def validate(self) -> None:
        """Check everything; the order of the checks does not matter."""
        self.check_user()
        self.check_storages()
        slugs = [task.slug for task in self.config.tasks]
        for index, task in enumerate(self.config.tasks):
            self.check_task(task, task.slug in slugs[:index])
        self.check_order()
        self.check_delivery()
        self.check_patterns()
        if self.facts.writer:
            trusted = "root" if self.config.trust == "root" \
                else f"root and {self.config.user.name}"
            self.add((), self.facts.writer, protection(self.facts.writer)
                     or f"expected that only {trusted} can write the file "
                     "and its directories", "trust")

    def check_user(self) -> None:
        """Check user.name; root is allowed, with a note."""
        path = ("user", "name")
        if self.facts.uids.get(self.config.user.name) != 0:
            self.check_account(self.config.user.name, path)
        elif not self.is_known(path):
            self.diagnostics.add(path, "root will own all backups",
                                 "expected an ordinary user, if there is one",
                                 fatal=False)

    def check_account(self, name: str, path: tuple, scope: str = "") -> None:
        """Check a user that tasks run as, or that gets the files."""
        uid = self.facts.uids.get(name)
        if uid is None:
            self.add(path, f"user {described(name)} does not exist",
                     NO_SUCH_USER, scope)
        elif uid in NOT_A_USER:
            self.add(path, f"{name} has the user ID {uid}",
                     "expected an unprivileged user", scope)

    # --- storages ---------------------------------------------------------

    def check_storages(self) -> None:
        """Check the names of the storages, then each storage."""
        variables = {}
        for name in ("tasks", "logs"):
            if name not in self.config.storage:
                self.add(("storage",), f'missing storage "{name}"',
                         f'"{name}": {{"path": "..."}}')
        for name, storage in self.config.storage.items():
            if not is_label(name, LOWER):
                self.add(storage.where,
                         f"invalid storage name {described(name)}",
                         "expected letters a-z, digits, - and _, and a "
                         "letter first")
            other = variables.setdefault(storage.variable, name)
            if other != name:
                self.add(storage.where, "same variable "
                         f"{storage.variable} as storage.{other}",
                         "rename one of the storages")
            if storage.path:    # else it could not be resolved
                self.check_storage(storage)
                if storage.chown:
                    self.check_chown(storage)
                    self.check_users_of_tasks(storage)

    def check_storage(self, storage: Storage) -> None:
        """Check that the directory is usable, and a repository if it is to
        be committed."""
        path, commit = storage.path, storage.where + ("commit",)
        scope = f"storage {storage.name}"
        facts = self.facts.storages[storage.name]
        error = facts["error"]
        if error:
            self.add(storage.where + ("path",), f"{path} {error}",
                     f"mkdir -p {shell_word(path)}" if "exist" in error
                     else "expected a directory that mission can use", scope)
        elif storage.commit and not facts["repository"]:
            self.add(commit, f"{path} is not a git repository",
                     f"as its owner: git init {shell_word(path)}", scope)
        if storage.commit and not self.facts.programs.get("git"):
            self.add(commit, "git is not installed", "install git", scope)

    def check_chown(self, storage: Storage) -> None:
        """Giving away the wrong directory as root cannot be undone."""
        where, scope = storage.where + ("chown",), f"chown {storage.name}"
        inside = [self.config.directory("tasks")] \
            if "tasks" in self.config.storage else []
        for path in inside + [self.config.path]:
            if path.startswith(storage.path.rstrip("/") + "/"):
                self.add(where, f"{storage.path} contains {path}",
                         ONLY_BACKUPS, scope)
        facts = self.facts.storages[storage.name]
        if facts["of_system"]:
            self.add(where, f"{storage.path} is a system directory",
                     ONLY_BACKUPS, scope)
        elif facts["foreign"]:
            self.add(where, f"{storage.path} contains {facts['foreign']}",
                     f"expected only files of root and "
                     f"{self.config.user.name}", scope)

    def check_users_of_tasks(self, storage: Storage) -> None:
        """Note that chown leaves the files of tasks[].user alone, where git
        would have to read them."""
        names = sorted({task.user for task in self.config.tasks}
                       - {"", self.config.user.name})
        if storage.commit and names:
            self.diagnostics.add(
                storage.where + ("commit",), "chown skips the files of "
                + ", ".join(map(escape_controls, names)) + ", and git reads "
                f"them as {self.config.user.name}",
                "use another storage for tasks with `user`", fatal=False)

    # --- tasks ------------------------------------------------------------

    def check_task(self, task: Task, is_duplicate: bool) -> None:
        """Check one task; with a wrong slug nothing else can be checked."""
        where = task.where
        if not is_label(task.slug, LOWER + DIGITS):
            self.add(where + ("slug",), f"invalid slug {described(task.slug)}",
                     SLUG_RULE)
            return
        if is_duplicate:
            self.add(where + ("slug",), f'duplicate slug "{task.slug}"',
                     "rename one of the tasks")
        if escape_controls(task.name) != task.name or len(task.name) > 200:
            self.add(where + ("name",), "invalid name",
                     "expected at most 200 printable characters")
        if task.user:
            self.check_account(task.user, where + ("user",),
                               f"task {task.slug}")
        if task.parallel and not is_label(task.parallel, LOWER + DIGITS):
            self.add(where + ("parallel",),
                     f"invalid group name {described(task.parallel)}",
                     SLUG_RULE)
        if task.ping:
            self.check_endpoint(where + ("ping",), task.ping,
                                f"ping {task.slug}")
        self.check_objects_of_task(task)
        for why, hint in script_errors(task, self.config, self.facts):
            self.add(where + ("slug",), why, hint, f"task {task.slug}")

    def check_objects_of_task(self, task: Task) -> None:
        """Check the keys of `env` and `minFree`, which are free text, and
        that no exit status is in two lists."""
        import re
        seen: set[int] = set()
        for key in STATUS_KEYS:
            statuses = set(getattr(task, field_of(key)))
            for status in sorted(seen & statuses):
                self.add(task.where + (key,), f"status {status} is in two "
                         "lists", "remove it from one of "
                         + ", ".join(STATUS_KEYS))
            seen |= statuses
        for name, value in task.env.items():
            if not re.fullmatch(VARIABLE, name) or "\0" in value:
                self.add(task.where + ("env", name), "invalid variable",
                         "expected a name of letters, digits and _, and a "
                         "value without NUL")
        for key, names in (("storages", task.storages or ()),
                           ("minFree", task.min_free)):
            for name in names:
                if name in self.config.storage:
                    continue
                self.add(task.where + (key, name), "unknown storage",
                         suggestion(name, self.config.storage))

    def check_order(self) -> None:
        """Whether each needed task exists and can run before."""
        tasks = {task.slug: task for task in self.config.tasks}
        for task in self.config.tasks:
            path = task.where + ("needs",)
            for slug in task.needs:
                if slug not in tasks:
                    self.add(path, f"unknown task {described(slug)}",
                             suggestion(slug, tasks))
                elif tasks[slug].post and not task.post:
                    self.add(path, f"{slug} is a post task, which runs later",
                             'expected a task without "post"')
            if task.slug in reachable(task, tasks):
                self.add(path, f"{task.slug} needs itself, directly or "
                         "through other tasks", "remove one of the needs")
        if not tasks:
            self.add(("tasks",), "no tasks", "expected at least one")

    # --- delivery ---------------------------------------------------------

    def check_delivery(self) -> None:
        """Check ping, notify, mail and the files that they need."""
        config, smtp = self.config, self.config.mail.smtp
        self.check_pings(config.ping)
        if config.notify.enabled \
                and not self.facts.programs.get("notify-send"):
            self.add(("notify", "enabled"), "notify-send is not installed",
                     'install libnotify-bin, or set "enabled": false',
                     "delivery")
        for address in config.user.email:
            self.check_address(("user", "email"), address, "address")
        self.check_address(("mail", "from"), config.mail.sender)
        if config.mail.enabled:
            self.check_mail()
            if smtp and config.mail.type == "smtp":
                self.check_smtp(smtp)
        pem = "expected a file with the CA's certificate in PEM"
        self.check_file(("ping", "caFile"), config.ping.ca_file, pem,
                        "caFile" if config.ping.enabled else "delivery")
        self.check_file(("mail", "smtp", "caFile"),
                        smtp.ca_file if smtp else "", pem)
        self.check_file(("passBin",), config.pass_bin,
                        "expected a program such as /usr/bin/pass", "passBin")
        self.check_file(("metrics", "textfile"), config.metrics.textfile,
                        "expected a file in a directory that mission can "
                        "write")

    def check_pings(self, ping: Ping) -> None:
        """Check the URLs of `ping`."""
        for key in ("endpoint", "startEndpoint", "failEndpoint", "proxy"):
            url = getattr(ping, field_of(key))
            if ping.enabled and key == "endpoint" or url and (
                    ping.enabled or key == "proxy"):
                self.check_endpoint(("ping", key), url, "ping")

    def check_endpoint(self, path: tuple, url: str, scope: str) -> None:
        """Check a URL. It is not quoted, because it may hold a secret."""
        is_proxy = path[-1] == "proxy"
        is_http = url.lower().startswith("http:")
        if not is_endpoint(url) or is_proxy and not is_http:
            self.add(path, "invalid URL" if url else "missing URL",
                     "expected http://HOST:PORT" if is_proxy else
                     "expected http:// or https://" + (
                         "" if url.isascii() else
                         ", the host name in its xn-- form"), scope)

    def check_address(self, path: tuple, address: str,
                      scope: str = "mail") -> None:
        """Check a mail address, unless it is ""."""
        if address and not address_of(address):
            self.add(path, f"invalid email address {described(address)}",
                     "expected name@example.com", scope)

    def check_file(self, where: tuple, path: str, hint: str,
                   scope: str = "delivery") -> None:
        """Check a file that the configuration names, unless it is ""."""
        if path and self.facts.usable.get(path):
            self.add(where, f"{path} {self.facts.usable[path]}", hint, scope)

    def check_mail(self) -> None:
        """Check that an enabled mail has an address and a way out."""
        import re
        mail = self.config.mail
        if not self.config.user.email:
            self.add(("user", "email"), "missing key, because mail is "
                     "enabled", "expected name@example.com", "mail")
        if mail.type == "sendmail" \
                and not self.facts.programs.get("sendmail"):
            self.add(("mail", "type"),
                     "sendmail is not in PATH, /usr/sbin or /usr/lib",
                     "install a mail transport such as msmtp-mta, or "
                     '"type": "smtp"', "delivery")
        if mail.type == "smtp" and not (mail.smtp and re.fullmatch(
                r"[A-Za-z0-9.:_-]+", mail.smtp.host)):
            self.add(("mail", "smtp", "host"), "missing or invalid host",
                     'expected "smtp": {"host": "mail.example.com"}', "mail")

    def check_smtp(self, smtp: Smtp) -> None:
        """Check the mail server's section."""
        path = ("mail", "smtp")
        if smtp.pass_name and not (self.config.pass_bin and smtp.user):
            self.add(path + ("passName",),
                     "passName needs passBin and mail.smtp.user",
                     "set all three, or none", "mail")
        if smtp.user and smtp.security == "none" and smtp.host not in (
                "127.0.0.1", "::1", "localhost"):
            self.add(path + ("security",),
                     "the password would be sent unencrypted",
                     'expected "starttls" or "tls"', "mail")
        self.check_address(path + ("from",), smtp.sender)

    def check_patterns(self) -> None:
        """Check that each regular expression compiles without a warning."""
        import re
        for key in ("filters", "redact"):
            for index, text in enumerate(getattr(self.config, key)):
                try:
                    pattern(text)
                except (re.error, Warning, OverflowError,
                        RecursionError) as error:
                    self.add((key, index), "invalid regular expression "
                             f"{described(text)}: {error}", "",
                             "filters" if key == "filters" else "")


def reachable(task: Task, tasks: dict) -> set:
    """Return the slugs that must run before `task`, directly or through
    others."""
    found, ahead = set(), list(task.needs)
    while ahead:
        slug = ahead.pop()
        if slug not in found and slug in tasks:
            found.add(slug)
            ahead += tasks[slug].needs
    return found


def mail_domain(host: str) -> str:
    """Return the host's name as the domain of addresses and message IDs.

    A host name may be any bytes (sethostname(2)); an unusable one becomes
    "localhost"."""
    import re
    return host if re.fullmatch(HOST_NAME, host) and len(host) < 254 \
        else "localhost"


def address_of(email: str) -> str:
    """Return the bare address of "Name <a@b>" or "a@b"; '' if it is invalid.
    """
    import re
    match = re.fullmatch(r"[^<>\r\n\0]*<([^<>\s]+)>|(\S+)", email)
    address = (match[1] or match[2]) if match else ""
    return address if re.fullmatch(ADDRESS, address) else ""


# The regular expressions of the original are Go's (RE2). What Python spells
# in another way is a token here: \Q..\E, \x{263a}, \pL, \p{^Lu}, \z, a class,
# flags that hold to the end of their group, and a group with a name.
RE2_ESCAPE = r"\\x\{[0-9A-Fa-f]{1,6}\}|\\[pP](?:\{\^?\w+\}|\w)|\\."
RE2_CLASS = r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]"
RE2_TOKEN = (r"(?s)\\Q.*?(?:\\E|$)|" + RE2_ESCAPE + "|" + RE2_CLASS
             + r"|\(\?[imsU-]+\)|\(\?<(?=[A-Za-z_])|.")
RE2_CLASSES = {"alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9",
               "upper": "A-Z", "lower": "a-z", "space": r"\t-\r ",
               "word": "a-zA-Z0-9_", "blank": r" \t", "xdigit": "0-9A-Fa-f",
               "punct": r"!-/:-@\[-`{-~", "ascii": r"\0-\x7f",
               "cntrl": r"\0-\x1f\x7f", "graph": "!-~", "print": " -~"}


def ranges(holds, end: int) -> str:
    """Return the inside of a class with the characters below the code `end`
    for which holds(character) is true."""
    from itertools import groupby
    runs = [list(codes) for is_inside, codes in groupby(
        range(end), lambda code: holds(chr(code))) if is_inside]
    return "".join(f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs)


CATEGORIES: dict[str, str] = {}     # what `category` returned before


def category(token: str) -> str:
    r"""Return the inside of a class for \pL or \P{Lu}: a general category of
    Unicode. Raises re.error for anything else, as a script."""
    import re
    import unicodedata
    if token not in CATEGORIES:
        name = token[2:].strip("{}")
        wanted, is_other = name.lstrip("^"), (token[1] == "P") ^ (
            name[0] == "^")
        known = re.fullmatch("L[ulmto]?|M[nce]?|N[dlo]?|P[cdseifo]?|"
                             "S[mcko]?|Z[slp]?|C[cfso]?", wanted)
        if not known:
            raise re.error(f"{token} is not supported, only the general "
                           r"categories of Unicode are, such as \p{Lu}")
        CATEGORIES[token] = ranges(lambda character: is_other != (
            unicodedata.category(character).startswith(wanted)
            and unicodedata.category(character) != "Cn"), 0x110000)
    return CATEGORIES[token]


def translated_escape(token: str, in_class: bool) -> str:
    """Return an escape of RE2 for Python. Raises re.error."""
    if token[:2] in (r"\p", r"\P"):
        inside = category(token)
        return inside if in_class else f"[{inside}]"
    if token.startswith(r"\x{"):
        return f"\\U{int(token[3:-1], 16):08x}"
    return r"\Z" if token == r"\z" else token


def translated_class(token: str) -> str:
    """Return a class of RE2, such as [a[:^space:]], for Python. Raises
    re.error."""
    import re

    def part(match) -> str:
        found = match[0]
        if found.startswith("\\"):
            return translated_escape(found, True)
        name = found[2:-2].lstrip("^")
        if len(found) == 1:     # Python warns of a set operation to come
            return "\\" + found
        if name not in RE2_CLASSES:
            raise re.error(f"unknown class {found}")
        inside = RE2_CLASSES[name]
        return inside if found[2] != "^" else ranges(
            lambda character: not re.match(f"[{inside}]", character),
            128) + r"\x80-\U0010ffff"

    start = re.match(r"\[\^?", token)[0]
    return start + re.sub(rf"(?s)^\]|{RE2_ESCAPE}|\[:\^?\w+:\]|[\[&~|]", part,
                          token[len(start):-1]) + "]"


def translated(text: str) -> str:
    """Return a regular expression of Go in Python's spelling. Raises re.error.

    A flag such as (?i) holds to the end of its group and in all of its
    alternatives, so a(?i)b|c becomes a(?i:b)|(?i:c).
    """
    import re
    found, flags = [], [""]     # flags: those of each group around
    for token in re.findall(RE2_TOKEN, text):
        closing = ")" * flags[-1].count("(")
        if token.startswith(r"\Q"):
            token = re.escape(re.sub(r"\\E$", "", token[2:]))
        elif token.startswith("\\"):
            token = translated_escape(token, False)
        elif token.startswith("[") and token != "[":
            token = translated_class(token)
        elif token.startswith("(?") and token.endswith(")"):
            if "U" in token:
                raise re.error("(?U) is not supported: write *? for *, and "
                               "* for *?")
            token = token[:-1] + ":"
            flags[-1] += token
        elif token.startswith("("):
            token = token.replace("<", "P<")
            flags.append("")
        elif token == ")" and len(flags) > 1:
            token += closing
            flags.pop()
        elif token == "|":
            token = closing + token + flags[-1]
        found.append(token)
    return "".join(found) + ")" * flags[-1].count("(")


def pattern(text: str, flags: int = 0):
    """Compile a regular expression of the configuration.

    Raises re.error, and Warning for a pattern that Python will change the
    meaning of.
    """
    import re
    import warnings
    text = translated(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return re.compile(text, flags)


def interpreter_words(head: str) -> list[str]:
    """Return the words of the #! line: ["/usr/bin/env", "bash"]; [] if none.
    """
    first = head.split("\n", 1)[0]
    return first[2:].split() if first.startswith("#!") else []


def interpreter_name(head: str) -> str:
    """Return the interpreter of a script: that of `env -S bash -eu` is bash.
    """
    words = interpreter_words(head)
    if words and posixpath.basename(words[0]) == "env":
        words = [word for word in words[1:]
                 if not word.startswith("-") and "=" not in word]
    return words[0] if words else ""


NOEXEC = "is on a file system mounted noexec"
PROGRAM_MAGIC = ("\x7fELF", "\xcf\xfa\xed\xfe", "\xca\xfe\xba\xbe")


def carried_errors(task: Task, config: Config):
    """Yield (why, hint) for each thing that a task of CARRIED lacks."""
    for name in CARRIED[task.slug]:
        if name not in config.storage:
            yield (f"the built-in {task.slug} needs storage.{name}",
                   f'"{name}": {{"path": "..."}}')
    if not config.pass_bin:
        yield (f"the built-in {task.slug} needs passBin",
               '"passBin": "/usr/bin/pass"')


def script_errors(task: Task, config: Config, facts: HostFacts):
    """Yield (why, hint) for each error of a task's file."""
    if task.type == "builtin" and task.slug in CARRIED:
        yield from carried_errors(task, config)
        return
    script = facts.scripts.get(task.slug)
    if not script:
        return
    path, head = script.path, script.head
    if script.state:
        yield f"{path} {script.state}", {
            "does not exist": f"{PROG} new {task.slug}",
            "is not executable": f"chmod +x {shell_word(path)}",
            NOEXEC: "mount -o remount,exec, or another directory",
        }.get(script.state, "expected a script that can be read and run")
        return
    if script.writer:
        yield script.writer, protection(script.writer) or (
            "only root and user.name may be able to write what root runs, "
            "and the directories above it")
    if script.barred:
        yield tuple(script.barred)
    if script.writer or task.type == "builtin":
        return
    if head.startswith("#!") and not interpreter_name(head):
        yield f"{path}:1: no interpreter in the #! line", "#!/bin/sh"
    elif head.split("\n", 1)[0].endswith("\r"):
        yield (f"{path}:1: the #! line ends in CR (a Windows line end)",
               f"sed -i 's/\\r$//' {shell_word(path)}")
    elif script.missing_interpreter:
        yield (f"{path}:1: the interpreter {script.missing_interpreter} does "
               "not exist", "expected an interpreter of this host")
    elif not head.startswith("#!"):
        if not head.startswith(PROGRAM_MAGIC):
            yield (f"{path}:1: neither a program nor a script with a #! line",
                   "begin it with #!/bin/sh, or another interpreter")
    elif posixpath.basename(interpreter_name(head)) == "bash":
        row, options = bash_options(head)
        if STRICT_OPTIONS - options:
            yield (f"{path}:{row}: a bash task must begin with "
                   f"'{BASH_RULE}'", f"make '{BASH_RULE}' its first command")


STRICT_OPTIONS = {"errexit", "nounset", "pipefail"}
# Options of bash(1) that make a script no looser, and their letters.
BASH_LETTERS = {"e": "errexit", "u": "nounset", "E": "errtrace",
                "T": "functrace", "x": "xtrace", "v": "verbose",
                "f": "noglob", "C": "noclobber"}
BASH_NAMES = {*STRICT_OPTIONS, *BASH_LETTERS.values()}


def switched_on(words: list[str]) -> set[str]:
    """Return the options that arguments of `set` or bash switch on.

    It is empty if there is an argument of another kind: it could switch
    options off, or be the start of another command.
    """
    found, rest = set(), list(words)
    while rest:
        word = rest.pop(0)
        if len(word) < 2 or word[0] != "-":
            return set()
        for letter in word[1:]:
            name = BASH_LETTERS.get(letter, "")
            if letter == "o":
                name = rest.pop(0) if rest else ""
            if name not in BASH_NAMES:
                return set()
            found.add(name)
    return found


def bash_options(head: str) -> tuple[int, set[str]]:
    """Return the options that are on when a bash script begins, and the
    number of the line with its first other command.

    They come from the #! line, where the kernel passes on one argument (all
    of them with `env -S`), and from `set` and `shopt -s` before all else.
    """
    lines, words = head.split("\n"), interpreter_words(head)
    given = words[words.index(interpreter_name(head)) + 1:]
    is_split = any(word.startswith("-S") for word in words)
    on = switched_on(given) if len(given) < 2 or is_split else set()
    last = min(len(lines), 2)
    for row, line in enumerate(lines[1:], start=2):
        text = line.strip(" \t")
        if text.startswith("#"):
            continue
        for command in text.split(" #")[0].split(";"):
            name, *rest = [word for word in command.replace(
                "\t", " ").split(" ") if word] or [""]
            found = switched_on(rest) if name == "set" else set()
            if name and not found and [name, *rest[:1]] != ["shopt", "-s"]:
                return row, on
            on, last = on | found, row if name else last
    return last, on


# ==========================================================================
# Plan: what will this run do, in order?                        (nothing; C)
#
# A run is a list of steps. It is complete before the first step is carried
# out, so `--dry-run` prints what `run` does. The order is the original's,
# except that chown comes before commit: git runs as the owner and must be
# able to read the files.
# ==========================================================================


class Step(FrozenRecord):
    """One step of a run; `kind` is the method of Runner that performs it."""
    kind: str
    tasks: tuple = ()           # more than one run side by side
    storage: Storage | None = None


STOPPED_BY_SIGNAL = ("tasks", "chown", "commit")    # skipped after SIGTERM


def select_tasks(config: Config, slugs: list[str]) -> list[Task]:
    """Return the tasks of a run in their order.

    They are the tasks of `slugs`, else the scheduled ones, and all that
    these need, scheduled or not (as `Requires=` of systemd and `make` do).
    Raises Error (wrong usage) for an unknown slug.
    """
    tasks = {task.slug: task for task in config.tasks}
    for slug in slugs:
        if slug not in tasks:
            meant = nearest(slug, tasks)
            raise Error(f"unknown task {quoted(slug)}",
                        f"mission run -t {meant}" if meant
                        else "mission list", EXIT_USAGE)
    found = [tasks[slug] for slug in dict.fromkeys(slugs)] or [
        task for task in config.tasks if task.scheduled]
    if not found:
        raise Error('no task has "scheduled": true',
                    "mission run -t SLUG", EXIT_USAGE)
    return with_needed(found, tasks)


def with_needed(tasks: list[Task], by_slug: dict[str, Task]) -> list[Task]:
    """Return `tasks` in their order, each after all that it needs."""
    found: dict[str, Task] = {}
    for task in tasks:
        path = [task.slug]      # a need, and what needs it, down to the task
        while path:
            needs = [slug for slug in by_slug[path[-1]].needs if
                     slug in by_slug and slug not in found
                     and slug not in path]
            if needs:
                path.append(needs[0])
            else:
                found.setdefault(path[-1], by_slug[path.pop()])
    return list(found.values())


def parallel_groups(tasks: list[Task]) -> list[tuple]:
    """Return the tasks in groups that run side by side: neighbours with the
    same `parallel`, unless one needs another."""
    found: list[list[Task]] = []
    for task in tasks:
        last = found[-1] if found else []
        together = last and task.parallel and last[-1].parallel \
            == task.parallel and not {t.slug for t in last} & set(task.needs)
        if together:
            last.append(task)
        else:
            found.append([task])
    return [tuple(batch) for batch in found]


def plan(config: Config, slugs: list[str], headless: bool,
         quiet: bool = False) -> list[Step]:
    """Return the steps of a run, in order."""
    tasks = [task if headless else task.replace(ping="")
             for task in select_tasks(config, slugs)]
    first = [task for task in tasks if not task.post]
    last = [task for task in tasks if task.post]
    notify = config.notify.enabled and not quiet
    ping = headless and config.ping.enabled
    mail = headless and config.mail.enabled and config.mail.on != "never"
    before = {
        "start": True, "outbox": mail,
        "mail_start": mail and config.mail.start
        and config.mail.on == "always",
        "ping_start": ping and config.ping.wants("start"),
        "notify_start": notify}
    after = {
        "finish": True, "notify_finish": notify, "summary": True,
        "keep_records": True, "mail_finish": mail, "ping_finish": ping}
    chown, commit, pack = (
        [Step(kind, storage=storage) for storage in config.storage.values()
         if first and getattr(storage, key)]
        for kind, key in (("chown", "chown"), ("commit", "commit"),
                          ("pack", "commit")))
    return [*(Step(kind) for kind, wanted in before.items() if wanted),
            *(Step("tasks", group) for group in parallel_groups(first)),
            *chown, *commit,
            *(Step("tasks", group) for group in parallel_groups(last)),
            *(Step(kind) for kind, wanted in after.items() if wanted), *pack]


def step_text(step: Step, config: Config) -> str:
    """Return a step in words, for `--dry-run`."""
    storage, ping = step.storage, config.ping
    to = ", ".join(config.user.email)
    if step.kind == "tasks":
        names = ", ".join(f"{task.slug} ({task.entrypoint or 'built in'})" + (
            f" and ping {public_url(task.ping)} (fail, if it does not succeed)"
            if task.ping else "") for task in step.tasks)
        return ("run side by side: " if len(step.tasks) > 1
                else "run the post task " if step.tasks[0].post
                else "run the task ") + names
    return {
        "start": "write the header and StartTime",
        "outbox": "send queued mails of earlier runs",
        "mail_start": f"mail {to}: run started",
        "ping_start": "ping {} (start)".format(
            public_url(ping.start_endpoint or ping.endpoint)),
        "notify_start": f"notify {config.user.name}: run started",
        "chown": storage and f"chown {storage.path} to {config.user.name}",
        "commit": storage and f"commit {storage.path}",
        "pack": storage and f"pack {storage.path}, if it has grown",
        "finish": "write FinishTime",
        "notify_finish": f"notify {config.user.name}: run finished",
        "summary": "list the warnings and errors",
        "keep_records": "write metrics and history, remove old logs",
        "mail_finish": f"mail {to}: run finished, with the log"
        + ("" if config.mail.on == "always" else
           ", if there are errors or warnings"),
        "ping_finish": f"ping {public_url(ping.endpoint)} if everything "
        "succeeded, mails included" + (
            f"; ping {public_url(ping.fail_endpoint or ping.endpoint)} (fail)"
            " if a task, chown or commit failed" if ping.wants("fail")
            else ""),
    }[step.kind]


def needed_storages(task: Task, config: Config) -> list[Storage]:
    """Return the storages that must be there when the task starts."""
    if task.storages is None:
        return [s for s in config.storage.values() if s.mounted]
    return [config.storage[name] for name in task.storages]


def status_meaning(task: Task, code: int) -> str:
    """Return "ok", "warn" or "skip" for an exit status that is not a failure
    of this task, "" for others."""
    if code == 0:
        return "ok"
    return next((meaning for key, meaning in STATUS_KEYS.items()
                 if code in getattr(task, field_of(key))), "")


def blocked_by(task: Task, outcomes: dict) -> str:
    """Return the first needed task that did not succeed in this run, or "".

    `outcomes` maps the slugs of the tasks that have ended to "ok", "failed"
    or "skipped". A task without an outcome did not succeed.
    """
    return next((slug for slug in task.needs if outcomes.get(slug) != "ok"),
                "")


# ==========================================================================
# Report: what is reported of a run?                            (nothing; C)
#
# The output of a task is untrusted: it may be endless, binary, one line of
# 100 MB, or imitate mission's lines. It arrives in chunks of bytes and
# becomes text that is safe for a terminal, redacted in the log and filtered
# in the mail. Each step works on many lines at a time, because a task can
# print a million lines per second.
# ==========================================================================

RULE = "# " + "\u2014" * 47
MASK = "***"
LONGEST_LINE = 2**18    # bytes; no pattern is applied to a longer line,
                        # because it would be copied in memory several times
LINE_SECONDS = 1.0      # the longest a pattern may take for a line ...
ALL_SECONDS = 10.0      # ... and for all lines that it was too slow for
SCREEN_SECONDS = 0.1    # the longest for a block; then only single lines
SLOW = "<<line withheld: {} took too long to match>>"
TOO_LONG = "<<line of {} bytes withheld: too long to match>>"
MAIL_LIMIT = 200_000    # characters of the log in a mail
PING_LIMIT = 10_000     # what Healthchecks keeps of a ping's body
PLAIN = bytes(range(0x20, 0x7F)) + b"\t\n"

# UNSAFE as a table for str.translate; whole lines keep their newlines.
ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
           for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C,
                        0x200E, 0x200F, *range(0x2028, 0x202F),
                        *range(0x2066, 0x2070), 0xFEFF)}


class TooSlow(Exception):
    """A function was stopped at its limit of time."""


class RunProblem(FrozenRecord):
    """An error or a warning of a run, and which of its results it spoils."""
    result: str         # "tasks", "housekeeping" or "delivery"
    level: str          # "error" or "warning"
    source: str         # a slug or a step: mail, sendMail, chown ...
    text: str


class TaskResult(FrozenRecord):
    """How one task of a run ended."""
    slug: str
    outcome: str        # "ok", "failed" or "skipped"
    seconds: float = 0.0        # of all attempts
    attempts: int = 0
    notice: str = ""            # why a success is not quite one


def header(title: str) -> str:
    """Return the three lines that begin a part of the log, as in the original.
    """
    return f"{RULE}\n# {escape_controls(title)}\n{RULE}\n\n"


def elapsed_column(elapsed: float) -> str:
    """Return the first column of a line of the log: the time since the start.
    """
    return "[%-10s] " % format_duration(elapsed)


def status_text(code: int) -> str:
    """Return how a process ended, in the original's words."""
    if code >= 0:
        return f"exit status {code}"
    import signal
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return f"killed by signal {-code}{name}"


# The original applied filters to lines with the elapsed column, so they may
# begin with the space after it, as those of its sample do.
LEADING_SPACE = "(?:^| )"


def as_bare_line(text: str) -> str:
    """Return a filter of the original, for a line without the elapsed column.
    """
    return LEADING_SPACE + text[1:] if text.startswith(" ") else text


def screen_of(text: str):
    """Compile a pattern for blocks of lines, each after a newline: it has a
    match where the pattern `text` matches one of the lines. None for a
    pattern of a kind that could behave otherwise in a block."""
    import re
    if re.search(r"\(\?|\||\\[AZzB]|[*+?}]\+", text):
        return None
    # `re` finds a newline ten times as fast as the beginning of a line.
    return pattern("\n" + text[1:] if text.startswith("^") else text, re.M)


class LogFilter:
    """Redacts and filters whole lines.

    `limit(seconds, function, *arguments)` calls the function and raises
    TooSlow after `seconds`. A line that a pattern was too slow for is
    withheld: it may hold a secret.
    """

    def __init__(self, redact, filters, limit):
        self.redactions = [pattern(text) for text in redact]
        self.filters = [pattern(as_bare_line(text)) for text in filters]
        texts = [*redact, *map(as_bare_line, filters)]
        self.screens = dict(zip(self.redactions + self.filters,
                                map(screen_of, texts)))
        self.values: list[str] = []     # secrets, redacted by value
        # A pattern that was too slow -> the seconds that it has used since.
        self.slow: dict[object, float] = {}
        self.limit = limit

    @property
    def redacts(self) -> bool:
        """Whether anything is redacted, so that lines must be complete."""
        return bool(self.redactions or self.values)

    def redacted(self, text: str) -> str:
        """Return the lines of `text` with *** in place of each match."""
        from functools import partial
        for value in self.values:
            text = text.replace(value, MASK)
        for rule in self.redactions:
            if self.may_match(rule, text):
                text = "\n".join(self.apply(
                    rule, text.split("\n"), partial(rule.sub, MASK),
                    SLOW.format("redact")))
        return text

    def keep_lines(self, text: str) -> list:
        """For each line True (keep), False (filtered) or None (withheld); []
        if all lines are kept."""
        lines = text.split("\n")
        found = [self.apply(rule, lines, rule.search, MASK)
                 for rule in self.filters if self.may_match(rule, text)]
        if not any(map(any, found)):
            return []
        return [None if set(filter(None, results)) == {MASK}
                else not any(results) for results in zip(*found)]

    def may_match(self, rule, text: str) -> bool:
        """Whether a line of `text` may match, found quickly for all lines
        together; most blocks have no match."""
        try:
            return not self.screens[rule] or bool(self.limit(
                SCREEN_SECONDS, self.screens[rule].search, "\n" + text))
        except TooSlow:
            self.screens[rule] = None
            return True

    def apply(self, rule, lines: list, function, withheld: str) -> list:
        """function(line) for each line; `withheld` where it took too long.

        A pattern that was too slow is applied to each line alone from then
        on, and to none once it has used ALL_SECONDS.
        """
        if rule not in self.slow:
            try:
                return self.limit(LINE_SECONDS,
                                  lambda: list(map(function, lines)))
            except TooSlow:
                self.slow[rule] = 0.0
        return [self.apply_to_line(rule, line, function, withheld)
                for line in lines]

    def apply_to_line(self, rule, line: str, function, withheld: str):
        """function(line); `withheld` if the pattern has used up its time."""
        if self.slow[rule] < ALL_SECONDS:
            try:
                return self.limit(LINE_SECONDS, function, line)
            except TooSlow:
                self.slow[rule] += LINE_SECONDS
        return withheld


class OutputDecoder:
    """Turns the raw output of one process into lines.

    `emit(text, whole)` is called with lines that are safe to print, without
    the last newline. `whole` is the text for the filters: None if it is the
    same, "" if there is none, because the line is not complete yet.
    """

    def __init__(self, log_filter: LogFilter, emit):
        import re
        self.log_filter, self.emit = log_filter, emit
        self.unsafe = re.compile(UNSAFE.replace("\n", "\x0b"))
        self.pending = b""      # the end of the output, without a newline
        self.size = 0           # bytes of its line that were taken before
        self.begun = b""        # the first of them

    def take(self, chunk: bytes) -> None:
        """Emit the lines that end in this chunk of output."""
        data = self.pending + chunk
        if b"\r" in data:       # progress bars: each state is a line
            last = b"\r" if data.endswith(b"\r") else b""
            data = data[:len(data) - len(last)].replace(
                b"\r\n", b"\n").replace(b"\r", b"\n") + last
        end = data.rfind(b"\n") + 1
        lines, self.pending = data[:end], data[end:]
        if lines and self.size:
            line, _, lines = lines.partition(b"\n")
            self.rest_of_line(line)
        if lines:
            self.emit(self.text(lines[:-1]), None)
        while len(self.pending) > LONGEST_LINE:     # too long for patterns
            self.begin(self.pending[:LONGEST_LINE], " <<line continues>>")

    def text(self, data: bytes) -> str:
        """Return bytes as safe text, with escapes for controls and invalid
        UTF-8."""
        if not data.translate(None, PLAIN):
            return data.decode("ascii")
        text = data.decode("utf-8", "backslashreplace")
        # A table, not sub(): a megabyte of NULs would be a million matches.
        return text.translate(ESCAPES) if self.unsafe.search(text) else text

    def begin(self, data: bytes, mark: str = "") -> None:
        """Emit the beginning of `pending`, a part of a line that has not
        ended. Redactions need the complete line, so it waits for them."""
        self.pending = self.pending[len(data):]
        self.size += len(data)
        self.begun = (self.begun + data)[:LONGEST_LINE]
        if not self.log_filter.redacts:
            self.emit(self.text(data) + mark, "")

    def rest_of_line(self, line: bytes) -> None:
        """Emit the end of a line that has begun."""
        size, begun = self.size + len(line), self.begun
        self.size, self.begun = 0, b""
        note = TOO_LONG.format(f"{size:,}")
        if size <= LONGEST_LINE:
            self.emit(self.text(line), self.text(begun + line))
        elif self.log_filter.redacts:
            self.emit(note, None)
        else:
            self.emit(self.text(line), note)

    @property
    def waiting(self) -> bool:
        """Whether there is an incomplete line to show."""
        return bool(self.pending.rstrip(b"\r")) \
            and not self.log_filter.redacts

    def silence(self) -> None:
        """Show an incomplete line, such as a prompt, after a silence."""
        if self.waiting:
            self.begin(self.pending.rstrip(b"\r"))

    def end(self) -> None:
        """Emit what is left: the last line may have no newline."""
        line, self.pending = self.pending.rstrip(b"\r"), b""
        if line or self.size:
            self.rest_of_line(line)


class Excerpt:
    """The head and the tail of a long text; the middle is only counted.

    Sizes are in characters. Head and tail together have `limit` at most.
    """

    def __init__(self, limit: int):
        self.limit, self.head = limit, ""
        self.tail: list[str] = []   # before the first cut the whole text
        self.tail_size = self.lost_lines = self.lost_size = 0

    def add(self, text: str) -> None:
        """Append text that ends in a newline."""
        self.tail.append(text)
        self.tail_size += len(text)
        if len(self.head) + self.tail_size > self.limit:
            self.cut()

    def cut(self) -> None:
        """Keep two fifths of the limit as head and as tail, in whole lines
        where they are not longer. The last fifth is room for more texts."""
        text, size = "".join(self.tail), self.limit * 2 // 5
        if not self.head:
            end = text.rfind("\n", 0, size) + 1 or size
            self.head, text = text[:end], text[end:]
        start = text.find("\n", len(text) - size - 1) + 1
        if not 0 < start < len(text):
            start = len(text) - size
        self.lost_lines += text.count("\n", 0, start)
        self.lost_size += start
        self.tail, self.tail_size = [text[start:]], len(text) - start

    def text(self) -> str:
        """Return the head, a line with the size of the gap, and the tail."""
        gap = f"\n<<{plural(self.lost_lines, 'line')} left out here: " \
            f"{self.lost_size:,} characters>>\n\n" if self.lost_size else ""
        return self.head + gap + "".join(self.tail)

    def end(self, limit: int) -> str:
        """Return the last lines, `limit` characters at most."""
        text = (self.head + "".join(self.tail))[-limit - 1:]
        return text if len(text) <= limit else text[text.find("\n") + 1:]


class MailLog:
    """The log for the mail: filtered, and cut to MAIL_LIMIT."""

    def __init__(self, log_filter: LogFilter):
        self.log_filter, self.excerpt = log_filter, Excerpt(MAIL_LIMIT)
        self.filtered = 0

    def own(self, text: str) -> None:
        """Add a line of mission itself, which no filter removes."""
        self.close()
        self.excerpt.add(text)

    def output(self, text: str, prefix: str) -> None:
        """Add lines of a task, given without the last newline."""
        results = self.log_filter.keep_lines(text)
        if all(results):
            return self.own(prefixed(text, prefix))
        for line, result in zip(text.split("\n"), results):
            if result is False:
                self.filtered += 1
            else:
                self.own(prefix + (SLOW.format("a filter")
                                   if result is None else line) + "\n")
        return None

    def close(self) -> None:
        """Put a count in the place of the lines that were filtered."""
        if self.filtered:
            count, self.filtered = self.filtered, 0
            self.excerpt.add(f"\n<<{plural(count, 'line')} filtered>>\n\n")


def prefixed(text: str, prefix: str) -> str:
    """Return the lines with the prefix before each, and a newline at the end.
    """
    return prefix + text.replace("\n", "\n" + prefix) + "\n"


def counted(problems: list[RunProblem]) -> str:
    """Return the numbers of problems in words: 2 errors and 1 warning."""
    levels = [problem.level for problem in problems]
    parts = [plural(levels.count(level), level)
             for level in ("error", "warning") if level in levels]
    return " and ".join(parts)


def backup_problems(problems: list[RunProblem]) -> list[RunProblem]:
    """Return the problems of tasks and housekeeping, which make a run fail."""
    return [p for p in problems if p.result != "delivery"]


def result_of(problems: list[RunProblem], stopped: int) -> str:
    """Return the result of a run that has ended, see RESULT_MEANINGS.
    `stopped` is the number of a signal, or 0."""
    if stopped:
        return "stopped"
    if backup_problems(problems):
        return "failed"
    return "undelivered" if problems else "ok"


def exit_status(problems: list[RunProblem], stopped: int) -> int:
    """Return the exit status of a run; 0 if and only if nothing went wrong."""
    return EXIT_SIGNAL + stopped if stopped else {
        "failed": EXIT_PROBLEMS, "undelivered": EXIT_DELIVERY,
        "ok": EXIT_OK}[result_of(problems, 0)]


def closing_words(problems: list[RunProblem], stopped: int) -> str:
    """Return the message about a run on stderr; '' if nothing went wrong."""
    if stopped:
        import signal
        return f"the run was stopped by {signal.Signals(stopped).name}"
    backup = backup_problems(problems)
    if backup:
        verb = "was" if len(backup) == 1 else "were"
        return f"{counted(backup)} {verb} emitted during the run"
    if problems:
        return "all tasks succeeded, but " + "; ".join(
            f"{problem.source}: {problem.text}" for problem in problems)
    return ""


def subject(host: str, text: str, mark: str) -> str:
    """Return the subject of a mail; `mark` is FAILURE, WARNING or "". No value
    can add a second header.

    Python before 3.13 turns a newline in an encoded word into a header, so
    `=?` is broken up as well.
    """
    line = f"{host}: {f'[{mark}] ' if mark else ''}{text}"
    return " ".join(escape_controls(line).replace("=?", "= ?").split())[:200]


# Exit statuses of `mission status`: the convention of monitoring plugins.
HEALTH_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
HEALTHY, DOUBTFUL, CRITICAL, UNKNOWN = range(4)


def health(slugs: list[str], runs: list[dict], max_age: float | None,
           now: float) -> tuple[int, list[str]]:
    """Return whether the last complete run is good and recent, as an index
    of HEALTH_WORDS, and the reasons if it is not.

    `slugs` are the scheduled tasks. The last success of each counts, also in
    a partial run; `max_age` is in seconds. `runs` are records of the history,
    oldest first; `now` is in seconds since 1970.
    """
    ended = [run for run in runs if run["result"] != "running"]
    complete = [run for run in ended if not run["partial"]]
    if not complete:
        return UNKNOWN, ["no complete run recorded"]
    found = [task_health(slug, ended, max_age, now) for slug in slugs]
    found.append(run_health(complete[-1]))
    return (max(status for status, _ in found),
            [reason for _, reason in found if reason])


def run_health(run: dict) -> tuple[int, str]:
    """Return the health of a run without that of its tasks, and why."""
    about = f"the run of {run['start']}"
    failed = [task for task in run["tasks"] if task["outcome"] == "failed"]
    if run["result"] == "undelivered":
        return DOUBTFUL, f"{about} could not deliver its mail, ping or log"
    if run["result"] == "failed" and not failed:
        return CRITICAL, f"{about} had errors or warnings"
    if run["result"] in ("lost", "stopped"):
        return CRITICAL, f"{about} was {run['result']}"
    return HEALTHY, ""


def task_health(slug: str, runs: list[dict], max_age: float | None,
                now: float) -> tuple[int, str]:
    """Return the health of one scheduled task, and why it is not good."""
    past = [(run, task) for run in runs for task in run["tasks"]
            if task["slug"] == slug and task["outcome"] != "skipped"]
    if not past:
        return DOUBTFUL, f"{slug} has not run yet"
    run, task = past[-1]
    if task["outcome"] == "failed":
        return CRITICAL, f"{slug} failed in the run of {run['start']}"
    if max_age is not None and run["started"] + (
            run["seconds"] or 0) < now - max_age:
        return CRITICAL, (f"the last success of {slug} is too old: "
                          f"{run['start']}")
    if max_age is not None and run["started"] > now:
        return DOUBTFUL, (f"the last success of {slug} is in the future, so "
                          f"the clock was set back: {run['start']}")
    if task.get("notice"):
        return DOUBTFUL, f"{slug}: {task['notice']}"
    return HEALTHY, ""


def run_took(seconds: float) -> str:
    """Return a duration for people, without fractions of a second if possible.
    """
    return format_duration(round(seconds) if seconds >= 1 else seconds)


GOOD_RESULTS = ("ok", "undelivered")    # the backup is complete
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """Return a line of bars; the greatest value has the highest bar."""
    top = max(values, default=0) or 1
    return "".join(BARS[min(int(value / top * 8), 7)] for value in values)


def metrics_text(record: dict, last_success: float, config: str) -> str:
    """Return the metrics of a run in Prometheus' text format, for
    node_exporter's textfile collector.

    `last_success` is the start of the last good run (seconds since 1970).
    The label `config` (a path) keeps the series of two configurations on one
    host apart: node_exporter refuses files with equal series.
    """
    lines = []
    path = config.replace("\\", r"\\").replace('"', r'\"').replace(
        "\n", r"\n")
    whole = f'{{config="{path}"}}'

    def metric(name: str, help_text: str, *rows) -> None:
        lines.append(f"# HELP mission_{name} {help_text}")
        lines.append(f"# TYPE mission_{name} gauge")
        lines.extend(f"mission_{name}{label} {value}" for label, value in rows)

    tasks = [(f'{{config="{path}",task="{task["slug"]}"}}', task)
             for task in record["tasks"]]
    metric("run_success", "1 if the last run had no errors or warnings.",
           (whole, int(record["result"] in GOOD_RESULTS)))
    metric("run_start_seconds", "When the last run started.",
           (whole, int(record["started"])))
    metric("run_duration_seconds", "How long it took.",
           (whole, round(record["seconds"], 3)))
    metric("run_errors", "Its errors.", (whole, record["errors"]))
    metric("run_warnings", "Its warnings.", (whole, record["warnings"]))
    metric("last_success_seconds", "When the last good run started.",
           (whole, int(last_success)))
    metric("task_success", "1 if the task ended well in the last run.",
           *((label, int(task["outcome"] == "ok")) for label, task in tasks))
    metric("task_duration_seconds", "How long the task took.",
           *((label, round(task["seconds"], 3)) for label, task in tasks))
    return "\n".join(lines) + "\n"


# ==========================================================================
# Processes: how is a program started and stopped?          (processes; C U)
#
# Each program gets a new session, a built environment and a time limit. When
# mission is stopped by a signal, or a limit has passed, the group of the
# program gets SIGTERM, and SIGKILL 10 seconds later.
# ==========================================================================

HOST = os.uname().nodename
CHUNK = 65536
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM_TO_KILL = 10.0     # seconds from SIGTERM to SIGKILL
KILL_TO_GONE = 10.0     # seconds after SIGKILL; then the process is left alone
STOPPED_SECONDS = 10    # the limit of each delivery after a signal to stop
KILLED_SECONDS = 2.0    # the same for a child that runs a function
ANSWER_SECONDS = 20.0   # for one question to a file system
GRACE = 2.0             # seconds for children that outlive their task
SILENCE = 1.0           # seconds until an incomplete line is shown
PASS_SECONDS = 60       # for the password store; gpg may ask an agent
OUTPUT_KEPT = 65536     # characters of a helper program's output
NO_LIMIT = float("inf")
TICK = 0.1              # seconds between two looks at limits of time


class Account(FrozenRecord):
    """A user of this host, as in passwd(5)."""
    name: str
    uid: int
    gid: int
    home: str

    @property
    def groups(self) -> list[int]:
        """The user's own group, and as many others as setgroups(2) takes:
        macOS takes 16, and gives many users more."""
        groups = os.getgrouplist(self.name, self.gid)
        groups.sort(key=lambda gid: gid != self.gid)
        return groups[:os.sysconf("SC_NGROUPS_MAX")]

    @property
    def popen(self) -> dict:
        """Arguments of Popen. Without `extra_groups` the child would keep
        root's groups (setgroups(2))."""
        return {"user": self.uid, "group": self.gid,
                "extra_groups": self.groups}


def account_of(user: str | int) -> Account | None:
    """Return the account with a name or a user id; None if there is none."""
    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) \
            else pwd.getpwnam(user)
    except (KeyError, ValueError, OverflowError):
        return None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def myself() -> Account:
    """Return the account that mission runs as. HOME counts for others than
    root, because sudo may keep the caller's HOME."""
    uid = os.geteuid()
    account = account_of(uid) or Account(str(uid), uid, os.getegid(), "/")
    if uid == 0:
        return account
    return account.replace(home=os.environ.get("HOME") or account.home)


def environment(account: Account, **more: str) -> dict:
    """Return the environment of a child: of the caller's only the time zone.
    """
    found = {"PATH": SAFE_PATH, "HOME": account.home, "USER": account.name,
             "LOGNAME": account.name, "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
    if os.environ.get("TZ"):
        found["TZ"] = os.environ["TZ"]
    return {**found, **more}


class Child:
    """A program that was started in a new session.

    `fd` is the pipe of its output, -1 once that is closed. Times are ticks
    of the clock; None or 0 before they are known.
    """

    def __init__(self, popen, fd: int, limit: float, now: float):
        self.popen, self.fd, self.pid = popen, fd, popen.pid
        self.started = self.last_output = now
        self.limit, self.code = limit, None     # code: once it is reaped
        self.why = ""               # why mission ended it
        self.term_at = self.kill_at = self.ended_at = None
        self.leftovers: list[str] = []
        self.survives_stop = False  # only a second signal ends it
        # For a task: its record, the decoder of its output, the pipe of its
        # secrets, the excerpt of output beyond logs.max, the bytes written.
        self.task = self.decoder = self.secrets = self.over = None
        self.written = 0
        self.output_error = ""      # why some of its output is not in the log

    @property
    def open(self) -> bool:
        """Whether the pipe of its output is open."""
        return self.fd >= 0

    @property
    def done(self) -> bool:
        """Whether it has ended and its status is known."""
        return self.code is not None

    def seconds(self) -> float:
        """Return how long it ran."""
        return (self.ended_at or self.started) - self.started

    def signal(self, number: int) -> None:
        """Send a signal to its process group, unless sudo or the like has
        made it another user's."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def has_exited(self) -> bool:
        """Whether it has ended. It is not reaped yet, so no other process can
        get its pid and a signal that is meant for it."""
        if not hasattr(os, "waitid"):       # macOS
            return self.popen.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG
                         | os.WNOWAIT) is not None

    def close(self) -> None:
        """Close the pipe of its output."""
        if self.open:
            os.close(self.fd)
            self.fd = -1


class Unanswered(Error):
    """A function in a child process did not answer within its limit."""


class ProcessResult(FrozenRecord):
    """How a program that mission uses, such as git, ended."""
    code: int           # as in Popen: negative for a signal
    output: str
    late: bool = False  # it was stopped for taking too long
    unread: int = 0     # bytes of its standard input that it left

    @property
    def reason(self) -> str:
        """Why it failed, on one line: its status and its last line."""
        lines = [line for line in self.output.split("\n") if line.strip()]
        said = f": {escape_controls(lines[-1].strip())[:300]}" if lines else ""
        return ("took too long" if self.late
                else status_text(self.code)) + said


def reason_of(error: BaseException) -> str:
    """Return an exception on one line, for a message."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename \
            else error.strerror
    return escape_controls(" ".join(text.split()))[:300]


def list_processes():
    """Yield (pid, name) of every process; nothing without /proc."""
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm", encoding="utf-8",
                          errors="replace") as file:
                    yield int(entry), escape_controls(file.read().strip())
            except OSError:
                continue


def open_links(pid: int) -> list[str]:
    """Return the files that a process has open, and its working directory."""
    found = []
    try:
        found.append(os.readlink(f"/proc/{pid}/cwd"))
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        pass
    return found


def real_user(pid: int) -> int:
    """Return the user id of who started a process (Linux). Raises OSError.

    Not the owner of /proc/PID: that is root for any process that cannot be
    traced (proc(5)).
    """
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(int(line.split()[1]) for line in file
                    if line.startswith(b"Uid:"))


def processes_of_run(run_id: str, users: dict[str, int]) -> dict[str, str]:
    """slug -> "pid name" of the processes of a run that still exist.

    They are found by MISSION_RUN_ID in their environment, so only on Linux.
    `users`: slug -> the user id that the task runs as. Others do not count,
    because any user can set these variables.
    """
    found = {}
    for pid, name in list_processes():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = dict(word.partition(b"=")[::2]
                                 for word in file.read().split(b"\0"))
            user = real_user(pid)
        except (OSError, StopIteration):
            continue
        slug = variables.get(b"MISSION_TASK", b"").decode("utf-8", "replace")
        if variables.get(b"MISSION_RUN_ID") == run_id.encode() \
                and users.get(slug) == user:
            found[slug] = f"{pid} {name}"
    return found


def boot_time() -> float:
    """When the host was booted, in seconds since 1970; 0 if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return next(float(line.split()[1]) for line in file
                        if line.startswith("btime "))
    except (OSError, StopIteration):
        return 0.0


def boot_id() -> str:
    """Return a text that is another one after each boot (random(4))."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f.read().strip()
    except OSError:
        return str(boot_time())


def input_file(data: bytes):
    """Return an open file from which a program can read `data`.

    A pipe would hang mission if a program stops reading early. The file is
    in memory, because the disk may be full. Raises OSError.
    """
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create(PROG), "w+b", buffering=0)
    else:                               # macOS
        import tempfile
        file = tempfile.TemporaryFile(buffering=0)
    write_all(file.fileno(), data)
    file.seek(0)
    return file


class Processes:
    """The programs that mission starts, and the signals that stop them."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.stopped = 0            # the first signal that asked to stop
        self.signals = 0            # the number of such signals
        self.armed = False          # a function is being timed
        self.wake = self.waker = -1
        self.on_tick = None         # called at least every TICK while waiting

    # --- signals ------------------------------------------------------------

    def listen(self) -> None:
        """Store SIGTERM, SIGINT and SIGHUP in `stopped` from now on.

        Each signal also writes a byte to the pipe `wake`, which ends poll().
        """
        import signal
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # tasks inherit it
        self.wake, self.waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self.waker, False)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        for wanted in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(wanted) != signal.SIG_IGN:      # nohup
                signal.signal(wanted, self.on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake us
        signal.signal(signal.SIGALRM, self.time_is_up)

    def on_signal(self, signum: int, _frame) -> None:
        """The handler of the signals that ask to stop."""
        self.stopped = self.stopped or signum
        self.signals += 1

    def time_is_up(self, _number, _frame) -> None:
        """The handler of SIGALRM; see `limit`."""
        if self.armed:
            raise TooSlow

    def limit(self, seconds: float, function, *arguments):
        """Return function(*arguments). Raises TooSlow after `seconds`.

        A signal is the only way to stop a regular expression: `re` checks
        for signals while it matches. Main thread only.
        """
        import signal
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result = function(*arguments)
            self.armed = False
            return result
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    # --- programs -----------------------------------------------------------

    def start(self, argv: list[str], env: dict, cwd: str = "/",
              account: Account | None = None, limit: float = NO_LIMIT,
              stdin=None, pass_fds=(), nice: int = 0) -> Child:
        """Start a program in a new session, as `account` if mission runs as
        root. `limit`: its longest time in seconds. Raises OSError."""
        import subprocess
        # preexec_fn makes Popen slow, so it is used only where needed. There
        # are no threads, with which it could deadlock.
        before = (lambda: os.nice(nice)) if nice else None
        become = account.popen if account and os.geteuid() == 0 else {}
        fd, end = os.pipe()
        try:
            popen = subprocess.Popen(
                argv, env=env, cwd=cwd, stdout=end, stderr=end,
                stdin=stdin or subprocess.DEVNULL,
                start_new_session=True, pass_fds=pass_fds,
                preexec_fn=before, **become)
        except BaseException:
            os.close(fd)
            raise
        finally:
            os.close(end)
        os.set_blocking(fd, False)
        return Child(popen, fd, limit, self.clock.ticks())

    def attend(self, children: list[Child], on_output) -> None:
        """Wait until the children have ended.

        on_output(child, bytes) is called with what they print, and with b""
        when a child has printed nothing for a second after a part of a line.
        """
        while not all(child.done for child in children):
            by_fd = {child.fd: child for child in children if child.open}
            for fd in self.ready(*by_fd):
                self.read(by_fd[fd], on_output)
            for child in children:
                if not child.done:
                    self.enforce_limits(child, on_output)

    def pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until a signal asks to stop."""
        deadline = self.clock.ticks() + seconds
        while not self.stopped and self.clock.ticks() < deadline:
            self.ready()

    def ready(self, *fds: int) -> list[int]:
        """Return those of the descriptors that can be read. Wait until there
        is one, but not longer than TICK, or until a signal."""
        import select
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        if self.wake >= 0:
            poll.register(self.wake, select.POLLIN)
        found = [fd for fd, _ in poll.poll(TICK * 1000)]
        if self.wake in found:
            found.remove(self.wake)
            os.read(self.wake, 512)
        if self.on_tick:
            self.on_tick()
        return found

    def read(self, child: Child, on_output) -> None:
        """Pass on one chunk of output, or close the pipe at its end."""
        chunk = os.read(child.fd, CHUNK)
        if chunk:
            child.last_output = self.clock.ticks()
            on_output(child, chunk)
        else:
            child.close()

    def enforce_limits(self, child: Child, on_output) -> None:
        """See whether the child has ended, and end it at its limit."""
        now = self.clock.ticks()
        if child.decoder and child.decoder.waiting \
                and now - child.last_output >= SILENCE:
            on_output(child, b"")
        if child.ended_at is None and child.has_exited():
            child.ended_at = now
        if child.ended_at is None:
            self.escalate_kill(child, now)
        elif child.open and now - child.ended_at >= GRACE:
            self.end_leftovers(child, on_output)
        elif not child.open:
            child.code = child.popen.wait()

    def escalate_kill(self, child: Child, now: float) -> None:
        """End a child after its limit or a signal: SIGTERM, then SIGKILL.

        A process in an uninterruptible call may survive even that; it is
        left alone after KILL_TO_GONE, so that mission does not hang.
        """
        import signal
        if not child.why:
            if self.stopped and (not child.survives_stop or self.signals > 1):
                child.why = "stopped by " + signal.Signals(self.stopped).name
            elif now - child.started >= child.limit:
                child.why = f"timed out after {format_duration(child.limit)}"
            else:
                return
            child.term_at = now
            child.signal(signal.SIGTERM)
        hurry = self.signals > 1 and not child.survives_stop
        if not child.kill_at and (
                hurry or now - child.term_at >= TERM_TO_KILL):
            child.kill_at = now
            child.signal(signal.SIGKILL)
        elif child.kill_at and now - child.kill_at >= KILL_TO_GONE:
            child.why = f"cannot be killed (process {child.pid})"
            child.ended_at, child.code = now, -9
            child.close()

    def end_leftovers(self, child: Child, on_output) -> None:
        """End the child's own children that still hold its output.

        All of them are named in `leftovers`; only those of its process group
        get a signal. What they printed until now is read.
        """
        import signal
        pipe = f"pipe:[{os.fstat(child.fd).st_ino}]"
        child.leftovers = [
            f"{pid} {name}" for pid, name in list_processes()
            if pid != os.getpid() and pipe in open_links(pid)] or ["unknown"]
        child.signal(signal.SIGTERM)
        deadline = self.clock.ticks() + 0.5
        while child.open and self.clock.ticks() < deadline:
            if self.ready(child.fd):
                self.read(child, on_output)
        child.signal(signal.SIGKILL)
        child.close()

    def run(self, argv: list[str], limit: float, data: bytes = b"",
            env: dict | None = None, account: Account | None = None,
            cwd: str = "/", on_chunk=None, whole: bool = False,
            survives_stop: bool = True) -> ProcessResult:
        """Run a program to its end, `data` being its standard input.

        Its output is passed to on_chunk(bytes) and kept in the result: the
        first 64 KiB of it, or all with `whole`. `limit` is in seconds. With
        `survives_stop` only the second signal to stop ends it.
        """
        kept = bytearray()

        def on_output(_child, chunk: bytes) -> None:
            if on_chunk:
                on_chunk(chunk)
            if whole or len(kept) < OUTPUT_KEPT:
                kept.extend(chunk)

        env = env or environment(account or myself())
        try:
            with input_file(data) as stdin:
                child = self.start(argv, env, cwd, account, limit, stdin)
                child.survives_stop = survives_stop
                self.attend([child], on_output)
                unread = len(data) - stdin.tell()
        except OSError as error:
            return ProcessResult(127, f"{argv[0]}: {error.strerror}")
        return ProcessResult(child.code, kept.decode("utf-8", "replace"),
                             bool(child.why), unread)

    # --- functions in a child -----------------------------------------------

    def supervise(self, limit: float, function, *arguments, on_message=None,
                  is_patient: bool = False, signals: int = 0):
        """Return function(send, *arguments), called in a child process.

        The function may call send(value), a JSON value, for `on_message`.
        Signals that ask to stop are passed on to the child, all but the
        first `signals` that the caller knows of, and shorten the limit: the
        first one, or with `is_patient` the second. Raises Error
        for an exception in it, and Unanswered if it sends nothing for
        `limit` seconds. Then the child is killed, or left alone if it hangs
        in a call of the kernel: it has no open file of mission, so it does
        not hold the lock.
        """
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            self.run_supervised(writing, function, arguments)
        os.close(writing)
        try:
            for kind, value in self.messages(pid, reading, limit,
                                             1 + is_patient, signals):
                if kind == "result":
                    return value
                if kind == "error":
                    raise Error(*value)
                if on_message:
                    on_message(value)
            raise Error("the child process ended without a reply")
        finally:
            os.close(reading)
            end_process(pid)

    def messages(self, pid: int, reading: int, limit: float, hurry: int,
                 signals: int):
        """Yield (kind, value) of what the child `pid` sends, and pass on to
        it each signal after the first `signals`. Raises Unanswered, see
        `supervise`; `hurry` signals shorten the limit."""
        import json
        rest, is_end = b"", False
        deadline = self.clock.ticks() + limit
        while not is_end:
            ready = self.ready(reading)
            if self.signals > signals:
                signals = self.signals
                os.kill(pid, self.stopped)
                if signals >= hurry:
                    limit = min(limit, TERM_TO_KILL)
                    deadline = min(deadline, self.clock.ticks() + limit)
            if ready:
                chunk = os.read(reading, CHUNK)
                *lines, rest = (rest + chunk).split(b"\n")
                yield from map(json.loads, lines)
                is_end = not chunk
                deadline = self.clock.ticks() + limit
            elif self.clock.ticks() >= deadline:
                raise Unanswered(f"no answer within {format_duration(limit)}")

    def run_supervised(self, writing: int, function, arguments) -> None:
        """What the child of `supervise` does; does not return."""
        import json

        def send(value, kind: str = "message") -> None:
            write_all(3, json.dumps([kind, value]).encode() + b"\n")

        try:
            leave_parent(writing)
            try:
                send(function(send, *arguments), "result")
            except Error as error:
                send([error.message, error.hint, error.status], "error")
            except Exception as error:
                send([reason_of(error)], "error")
        finally:
            os._exit(0)

    def run_in_child(self, seconds: float, function,
                     *arguments) -> tuple[bool, object]:
        """Return (True, result) of function(*arguments), run in a child
        process; (False, reason) if it raised an exception or took too long, or
        when a signal asked to stop.

        A name lookup has no limit of time, and smtplib limits each read and
        not the whole; a process can be killed. It is forked, because its
        modules are loaded then: an upgrade of Python cannot break it.
        """
        import signal
        known = self.signals

        def call(_send):
            signal.alarm(int(seconds) + 1)      # should the parent be killed
            for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENSSL_CONF"):
                os.environ.pop(name, None)
            return function(*arguments)

        try:
            return True, self.supervise(self.shortened(seconds), call,
                                        signals=known)
        except Error as error:
            return False, "interrupted" if self.signals > known \
                else error.message

    def shortened(self, seconds: float) -> float:
        """Return the limit of a delivery: short once a signal asked to stop,
        because the one who sent the signal waits."""
        return min(seconds, STOPPED_SECONDS) if self.stopped else seconds


def leave_parent(writing: int) -> None:
    """Make a forked child independent of mission: a session and signals of
    its own, and only the pipe `writing` open, as descriptor 3.

    The lock of the run is free only when all copies of it are closed, and
    cron waits until the standard streams are.
    """
    import signal
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                   signal.SIGALRM, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    os.setsid()
    os.dup2(writing, 3)
    os.closerange(4, 4096)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def end_process(pid: int) -> None:
    """Kill a child and reap it. A process that hangs in a call of the kernel
    does not end; it is left alone after KILLED_SECONDS."""
    import signal
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    deadline = time.monotonic() + KILLED_SECONDS
    while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
        time.sleep(0.005)


def examine(questions: dict) -> dict:
    """Return key -> function(*arguments) for key -> (function, *arguments).

    The functions are called in a child process and return JSON values. A
    function that does not answer within ANSWER_SECONDS, as on a file system
    that hangs, has no key in the result. Raises Error for an exception.
    """
    answers, keys = {}, list(questions)

    def answer(send, rest: list) -> None:
        for key in rest:
            function, *arguments = questions[key]
            send(function(*arguments))

    while keys:
        found: list = []
        try:
            Processes(Clock()).supervise(ANSWER_SECONDS, answer, keys,
                                         on_message=found.append)
        except Unanswered:
            pass
        answers.update(zip(keys, found))
        keys = keys[len(found) + 1:]
    return answers


def ask(function, *arguments):
    """Return function(*arguments), which is not None, as `examine` does; None
    without an answer."""
    return examine({"": (function, *arguments)}).get("")


def read_password(processes: Processes, pass_bin: str, user: str,
                  name: str) -> str:
    """Return the password `name`: the first line that passBin prints.

    passBin runs as `user`, because a password store has its own configuration
    and hooks. Raises Error.
    """
    account = account_of(user) if os.geteuid() == 0 else myself()
    done = processes.run([pass_bin, name], PASS_SECONDS, account=account,
                         cwd=account.home if ask(os.path.isdir, account.home)
                         else "/")
    line = done.output.split("\n", 1)[0].rstrip("\r")
    if done.code or not line or len(line) > 4096:
        raise Error(f"{pass_bin} {escape_controls(name)}: " + (
            done.reason if done.code else "empty first line"
            if not line else "first line longer than 4 KiB"))
    return line


# ==========================================================================
# Files: who can change a file?                                   (files; C)
#
# Where root works in a directory that a user can write, it walks by
# descriptors and follows no link, or works as that user. Only trusted users
# may be able to change what root runs: the file and each directory above it.
# ==========================================================================


def open_directory(path: str) -> int:
    """Return a descriptor of the directory at `path`. Raises OSError.

    As root it is opened name by name. A symbolic link is followed only
    where nobody but root could have made it: another user could make it
    lead to /etc, at any time.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY
    if os.geteuid() != 0:
        return os.open(path, flags)
    names, links = path.strip("/").split("/"), 0
    fd = os.open("/", flags)
    while names:
        name = names.pop(0)
        if not name:
            continue
        try:
            below = os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as error:
            target, links = root_link(fd, name, error), links + 1
            if target is None or links > 40:
                os.close(fd)
                raise
            names = target.strip("/").split("/") + names
            if not target.startswith("/"):
                continue
            below = os.open("/", flags)
        os.close(fd)
        fd = below
    return fd


def open_regular(path: str, flags: int = 0):
    """Open a regular file to read bytes. A FIFO is refused, not waited for.
    Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(fd, "rb")


def root_link(fd: int, name: str, error: OSError) -> str | None:
    """Return the target of a symbolic link that only root could have made;
    None for anything else. `error`: why the name could not be opened."""
    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
        return None
    directory = os.fstat(fd)
    link = os.lstat(name, dir_fd=fd)
    sticky = directory.st_mode & stat.S_ISVTX
    if not stat.S_ISLNK(link.st_mode) or link.st_uid != 0 \
            or directory.st_uid != 0 \
            or (directory.st_mode & 0o022 and not sticky):
        return None
    return os.readlink(name, dir_fd=fd)


# Extended attributes that can give the right to write: acl(5), nfs4_acl(5).
POSIX_ACL, POSIX_DEFAULT_ACL = ("system.posix_acl_access",
                                "system.posix_acl_default")
NFS4_ACL = "system.nfs4_acl"
ACL_USER, ACL_OWNING_GROUP, ACL_GROUP, ACL_MASK = 0x02, 0x04, 0x08, 0x10
ACL_WRITE = 2
# Any of these lets a user change the file, the directory or its list.
NFS4_WRITE = 0x2 | 0x4 | 0x40 | 0x40000 | 0x80000
NFS4_ALLOW, NFS4_GROUP = 0, 0x40        # the type of an entry; a flag of one
NSSWITCH = "/etc/nsswitch.conf"
# Sources of users that list all of them; SSSD and LDAP need not.
LISTED_SOURCES = frozenset(
    ("files", "compat", "db", "systemd", "altfiles", "extrausers"))


def writer_of(path: str, trusted: set[int], sticky: bool = True) -> str:
    """Return who but `trusted` owns or can write the file at `path`, or "".

    Considers the mode, the group and access control lists. The answer
    completes a sentence that begins with the path. A symbolic link is not
    followed: it has an owner only. `sticky`: a directory as /tmp, where
    others can add files and not replace ours, is accepted. Raises OSError.
    """
    status = os.lstat(path)
    if status.st_uid not in trusted:
        return f"belongs to {user_name(status.st_uid)}"
    if stat.S_ISLNK(status.st_mode):
        return ""           # the mode of its directory decides
    mode = status.st_mode
    words = f"(mode {mode & 0o7777:04o})"
    if sticky and stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return ""
    if mode & 0o002:
        return f"is writable by everyone {words}"
    access = attribute(path, POSIX_ACL) if mode & 0o020 else b""
    if mode & 0o020 and not access and not is_trusted_group(
            status.st_gid, trusted):
        return f"is writable by its group {words}"
    found = acl_writer(access, status.st_gid, trusted) \
        or nfs4_writer(attribute(path, NFS4_ACL), trusted)
    if not found and stat.S_ISDIR(mode):
        found = acl_writer(attribute(path, POSIX_DEFAULT_ACL),
                           status.st_gid, trusted)
    return f"is writable by {found} (access control list)" if found else ""


def user_name(uid: int) -> str:
    """Return the name of a user, or words with the number."""
    account = account_of(uid)
    return account.name if account else f"user ID {uid}"


def attribute(path: str | int, name: str) -> bytes:
    """Return an extended attribute of a path or descriptor, or b"". A
    symbolic link is not followed. Raises OSError."""
    if not hasattr(os, "getxattr"):     # macOS: its lists are not read
        return b""
    try:
        return os.getxattr(path, name,
                           follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return b""
        raise


def acl_writer(data: bytes, owning_group: int, trusted: set[int]) -> str:
    """Return whom but `trusted` a POSIX list lets write, in words, or "".

    `data` is the extended attribute: a version, then (tag, permissions, id)
    for each entry. What the mask excludes has no effect. Raises OSError for
    a list that cannot be read.
    """
    import struct
    if len(data) % 8 != 4 and data:
        raise OSError(errno.EINVAL, "unknown form of access control list")
    entries = list(struct.iter_unpack("<HHI", data[4:]))
    mask = min([bits for tag, bits, _ in entries if tag == ACL_MASK] or [7])
    for tag, bits, number in entries:
        if not bits & mask & ACL_WRITE:
            continue
        if tag == ACL_USER and number not in trusted:
            return user_name(number)
        if tag == ACL_OWNING_GROUP and not is_trusted_group(owning_group,
                                                            trusted):
            return "its group"
        if tag == ACL_GROUP and not is_trusted_group(number, trusted):
            return f"the group with ID {number}"
    return ""


def nfs4_writer(data: bytes, trusted: set[int]) -> str:
    """Return whom but `trusted` an NFSv4 list lets write, in words, or "".

    `data` is the extended attribute: the number of entries, then type,
    flags, mask and name for each (RFC 7530, 6.2.1, in XDR). OWNER@ and
    GROUP@ are in the mode. Raises OSError for a list that cannot be read.
    """
    import struct
    at = 4
    try:
        for _ in range(struct.unpack_from(">I", data)[0] if data else 0):
            kind, flags, mask, size = struct.unpack_from(">IIII", data, at)
            who = data[at + 16:at + 16 + size].decode("utf-8", "replace")
            at += 16 + size + -size % 4
            if at > len(data):
                raise struct.error
            if kind != NFS4_ALLOW or not mask & NFS4_WRITE \
                    or who in ("OWNER@", "GROUP@"):
                continue
            if who == "EVERYONE@":
                return "everyone"
            account = account_of(who.split("@")[0])
            if flags & NFS4_GROUP or not account \
                    or account.uid not in trusted:
                return escape_controls(who)
    except struct.error:
        raise OSError(errno.EINVAL,
                      "unknown form of access control list") from None
    return ""


def is_trusted_group(gid: int, trusted: set[int]) -> bool:
    """Whether all members of a group are known, and are `trusted`.

    Known are those of a group that the host lists, whose names are users,
    on a host that lists all its users: a user who is in no list could have
    this group as the first one.
    """
    import grp
    if not lists_all_users():
        return False
    try:
        members = [account_of(name) for name in grp.getgrgid(gid).gr_mem]
    except KeyError:
        return False
    first = {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid}
    return first <= trusted and all(
        account and account.uid in trusted for account in members)


def lists_all_users() -> bool:
    """Whether getpwent(3) shows every user: nsswitch.conf(5) names the
    sources. Without that file there is /etc/passwd alone."""
    try:
        with open(NSSWITCH, encoding="utf-8", errors="replace") as file:
            lines = [line.split("#")[0].partition(":") for line in file]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    sources = [word for name, _, rest in lines if name.strip() == "passwd"
               for word in rest.split() if not word.startswith("[")]
    return LISTED_SOURCES.issuperset(sources)


def path_components(path: str) -> list[str]:
    """Return every path on the way to the file at `path`, symbolic links
    included: a user who can change one of them can put another file in its
    place. Raises OSError for more than 40 links, as the kernel does."""
    names, at, found, links = path.split("/"), "/", ["/"], 0
    while names:
        name = names.pop(0)
        if name in ("", ".", ".."):
            at = os.path.dirname(at) if name == ".." else at
            continue
        place = os.path.join(at, name)
        found.append(place)
        if os.path.islink(place):
            links += 1
            if links > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(place)
            names = target.split("/") + names
            at = "/" if target.startswith("/") else at
        else:
            at = place
    return found


def untrusted_writer(path: str, trusted: set[int]) -> str:
    """Return which component of `path` others than `trusted` can change, and
    why; '' if none. It is the rule of StrictModes in sshd_config(5)."""
    try:
        for place in path_components(path):
            found = writer_of(place, trusted)
            if found:
                return f"{place} {found}"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    return ""


SILENT: set[str] = set()    # directories of PATH that did not answer


def find_program(name: str) -> str | None:
    """Return the path of a program, in PATH or the usual directories; or None.

    cron's PATH lacks the sbin directories. A directory that does not answer
    is skipped, and not asked again.
    """
    directories = os.environ.get("PATH", "").split(":")
    directories += SAFE_PATH.split(":") + ["/usr/lib"]
    questions = {directory: (is_program, os.path.join(directory, name))
                 for directory in directories
                 if directory.startswith("/") and directory not in SILENT}
    found = examine(questions)
    SILENT.update(questions.keys() - found.keys())
    return next((os.path.join(directory, name) for directory in questions
                 if found.get(directory)), None)


def is_program(path: str) -> bool:
    """Whether `path` can be executed. For root a program that others can
    change does not count."""
    return os.path.isfile(path) and os.access(path, os.X_OK) and not (
        os.geteuid() == 0 and untrusted_writer(path, {0}))


# ==========================================================================
# Host: what is true of this host?                                (files; C)
#
# Collects the facts that Check compares a configuration with. Nothing here
# changes the host or decides what is an error.
# ==========================================================================


def directory_error(path: str, strict: bool) -> str:
    """Return what is wrong with the directory of a storage; '' if nothing.

    `strict`: root must be able to open it without following a link that
    another user made.
    """
    if not os.path.isdir(path):
        return "is not a directory" if os.path.exists(path) \
            else "does not exist"
    if strict:
        try:
            os.close(open_directory(path))
        except OSError as error:
            return f"cannot be opened safely ({error.strerror})"
    return ""


def python_error(source: bytes, path: str) -> str:
    """Return what is wrong with the task.py of a built-in task; '' if nothing.
    """
    import ast
    if b"\0" in source:
        return "is not valid Python: it contains null bytes"
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as error:
        # The message of Python can quote the file.
        return f"is not valid Python at line {getattr(error, 'lineno', 1)}"
    bound = {getattr(node, name, None) for node in ast.walk(tree)
             for name in ("name", "asname", "id")}
    return "" if bound & {"run", "*"} else "has no `def run(args, log)`"


def foreign_file(directory: str, known: set[int]) -> str:
    """Return a file in the directory whose owner is not in `known`; or ''.

    No link of another user leads to a directory whose names are shown.
    """
    try:
        fd = open_directory(directory)
    except OSError:
        return ""           # directory_error says so
    try:
        uid = os.fstat(fd).st_uid
        if uid not in known:
            return f"files of user ID {uid}"
        with os.scandir(fd) as entries:
            for entry in entries:
                uid = entry.stat(follow_symlinks=False).st_uid
                if uid not in known:
                    return (f"{escape_controls(entry.name)}, which belongs "
                            f"to user ID {uid}")
    except OSError:
        pass
    finally:
        os.close(fd)
    return ""


def find_missing_interpreter(head: str) -> str:
    """Return the interpreter of a script that this host does not have; or ''.
    """
    words = interpreter_words(head)
    if words and not os.access(words[0], os.X_OK):
        return words[0]
    name = interpreter_name(head)
    if name and "/" not in name and not any(
            os.access(os.path.join(directory, name), os.X_OK)
            for directory in SAFE_PATH.split(":")):
        return name
    return ""


NO_ANSWER = "does not answer"
PROGRAMS = ("git", "sendmail", "notify-send")


def is_below(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or below it, by their texts."""
    return (path + "/").startswith(directory.rstrip("/") + "/")


def named_files(config: Config) -> dict[str, int]:
    """Return the files that the configuration names -> how mission uses them:
    os.R_OK to read, os.X_OK to execute, os.W_OK to replace."""
    files = {config.ping.ca_file: os.R_OK, config.pass_bin: os.X_OK,
             config.metrics.textfile: os.W_OK}
    if config.mail.smtp:
        files[config.mail.smtp.ca_file] = os.R_OK
    return {path: mode for path, mode in files.items() if path}


def unusable(path: str, mode: int) -> str:
    """Return why a file of `named_files` cannot be used, or ''."""
    if mode == os.R_OK:
        return "" if os.access(path, os.R_OK) else "cannot be read"
    if mode == os.W_OK:
        return "" if os.access(os.path.dirname(path), os.W_OK | os.X_OK) \
            else "cannot be written"
    return "" if os.path.isfile(path) and os.access(path, os.X_OK) \
        else "is not executable"


def is_noexec(path: str) -> bool:
    """Whether only the mount keeps a file from being executed. Raises
    OSError."""
    return bool(os.stat(path).st_mode & 0o111
                and os.statvfs(path).f_flag & os.ST_NOEXEC)


# What a user must be able to do with the program of a task, by its type.
MODES = {"exec": os.X_OK, "builtin": os.R_OK}


def program_of(task: Task, config: Config) -> str:
    """Return the file that a task runs; "" if it is a part of mission."""
    if task.type == "exec":
        return task.entrypoint
    if task.slug in CARRIED or "tasks" not in config.storage:
        return ""
    return os.path.join(config.directory("tasks"), task.slug, "task.py")


def access_error(path: str, user: str, mode: int) -> tuple:
    """Return why `user` cannot use a task's program, and a hint; or ().

    `mode` is os.X_OK or os.R_OK. Nothing is asked without `user`, or if
    mission does not run as root. It is for a child process: the answer is
    the kernel's, which knows access control lists, to that user.
    """
    account = account_of(user) if user and os.geteuid() == 0 else None
    if not account:
        os.path.exists(path)    # it only has to answer
        return ()
    groups, gid = os.getgroups(), os.getegid()
    try:
        os.setgroups(account.groups)
        os.setegid(account.gid)
        os.seteuid(account.uid)
        return barrier(path, account.name, mode)
    except OSError as error:
        return f"cannot become {user}: {error.strerror}", "run it as root"
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups[:os.sysconf("SC_NGROUPS_MAX")])


def barrier(path: str, user: str, mode: int) -> tuple:
    """Return the first directory on the way to `path` that this process may
    not search, or the file that it may not use, and a hint; or ()."""
    for place in path_components(path):
        try:
            os.lstat(place)
        except PermissionError:
            directory = os.path.dirname(place)
            return (f"{directory} cannot be searched by {user}",
                    f"chmod o+x {shell_word(directory)}")
        except OSError:         # it is reported as missing
            return ()
    letter = "x" if mode == os.X_OK else "r"
    return () if os.access(path, mode, effective_ids=True) else (
        f"{path} cannot be used by {user}",
        f"chmod o+{letter} {shell_word(path)}")


def storage_facts(path: str, strict: bool, known: set[int] | None) -> dict:
    """Return the facts about the directory of a storage.

    `strict`: as in directory_error. `known`: the user ids whose files may be
    in a directory that root gives to a user; None: not checked.
    """
    return {
        "error": directory_error(path, strict),
        "of_system": os.path.realpath(path) in SYSTEM_DIRECTORIES,
        "mounted": os.path.ismount(path),
        "repository": os.path.lexists(os.path.join(path, ".git")),
        "foreign": foreign_file(path, known) if known and strict else ""}


# The facts about a storage that does not answer.
SILENT_STORAGE = {"error": NO_ANSWER, "of_system": False, "mounted": False,
                  "repository": False, "foreign": ""}


def trusted_users(config: Config) -> set[int]:
    """Return the user ids that may change what root runs; see the key `trust`.
    """
    account = account_of(config.user.name)
    return {0, account.uid} if account and config.trust == "user" else {0}


ORDINARY_USERS = range(1000, 60000)     # UID_MIN and UID_MAX of login.defs(5)
NO_LOGIN = frozenset(("nologin", "false", "sync"))


def sample_user() -> Account | None:
    """Return the user whose backups a new configuration is for.

    Root's is the user that called sudo, else the only ordinary account with
    a login shell; None if there is not exactly one. For others it is their
    own account.
    """
    if os.geteuid():
        return myself()
    caller = account_of(os.environ.get("SUDO_USER", ""))
    if caller and caller.uid:
        return caller
    names = {entry.pw_name for entry in pwd.getpwall()
             if entry.pw_uid in ORDINARY_USERS
             and os.path.basename(entry.pw_shell) not in NO_LOGIN}
    return account_of(names.pop()) if len(names) == 1 else None


class HostInspector:
    """Finds on this host what a configuration is validated against."""

    def home_of(self, name: str) -> str | None:
        """Return the home directory of a user; None if there is no such user.
        """
        account = account_of(name)
        me = myself()
        if account and account.uid == me.uid:
            return me.home
        return account.home if account else None

    def facts(self, config: Config) -> HostFacts:
        """Return the facts about everything that the configuration names.

        Who else can change a file is found out for root only: what others
        run can harm only themselves.
        """
        names = {config.user.name, *(task.user for task in config.tasks)}
        uids = {name: getattr(account_of(name), "uid", None)
                for name in names if name}
        is_root = os.geteuid() == 0
        trusted = trusted_users(config) if is_root else None
        known = {0, *uids.values()} - {None} if is_root else None
        storages = examine({
            s.name: (storage_facts, s.path, s.chown or s.commit, known)
            for s in config.storage.values() if s.path})
        silent = [s.path for s in config.storage.values()
                  if s.path and s.name not in storages]
        tasks = {task.slug: (program_of(task, config), task)
                 for task in config.tasks if program_of(task, config)}
        files = named_files(config)
        answers = examine({
            **{path: (unusable, path, mode) for path, mode in files.items()},
            **{("task", slug): (self.script_fields, path, task, trusted)
               for slug, (path, task) in tasks.items()
               if not any(is_below(path, below) for below in silent)}})
        return HostFacts(
            uids=uids,
            programs={name: find_program(name) for name in PROGRAMS},
            usable={path: answers.get(path, NO_ANSWER) for path in files},
            storages={name: storages.get(name, SILENT_STORAGE)
                      for name in config.storage},
            scripts={slug: Script(**answers.get(
                ("task", slug), {"path": path, "state": NO_ANSWER}))
                for slug, (path, _) in tasks.items()},
            writer=self.config_writer(config))

    def config_writer(self, config: Config) -> str:
        """Return who else could change the configuration; always '' unless
        root runs mission."""
        if os.geteuid() != 0:
            return ""
        found = ask(untrusted_writer, config.path, trusted_users(config))
        return f"{config.path} {NO_ANSWER}" if found is None else found

    def script_fields(self, path: str, task: Task, trusted) -> dict:
        """Return the fields of the Script of a task's program."""
        found = self.script(path, task, trusted)
        if not found.state and not found.writer:
            found = found.replace(barred=access_error(
                path, task.user, MODES[task.type]))
        return vars(found)

    def script(self, path: str, task: Task, trusted) -> Script:
        """Return the facts about the file of a task.

        `trusted`: the user ids that may change it, or None for no check.
        """
        script = Script(path)
        writer = untrusted_writer(path, trusted) \
            if trusted and os.path.exists(path) else ""
        if writer:      # it is not opened: it could lead anywhere
            return script.replace(writer=writer)
        try:
            with open_regular(path) as file:
                head = file.read(2**20 if task.type == "builtin" else 8192)
        except FileNotFoundError:
            return script.replace(state="does not exist")
        except ValueError:          # a NUL; the slug has an error already
            return script.replace(state="is not a valid path")
        except PermissionError:
            # A program may be executable and not readable.
            if os.access(path, os.X_OK) and task.type == "exec":
                return script.replace(head=PROGRAM_MAGIC[0])
            return script.replace(state="cannot be read")
        except OSError as error:
            return script.replace(state=f"cannot be opened ({error.strerror})")
        script = script.replace(head=head.decode("latin-1"))
        if task.type == "builtin":
            return script.replace(state=python_error(head, path))
        if not os.access(path, os.X_OK):
            return script.replace(state=NOEXEC if is_noexec(path)
                                  else "is not executable")
        return script.replace(
            missing_interpreter=find_missing_interpreter(script.head))


# ==========================================================================
# Chown: how does a tree get another owner?                       (files; C)
#
# The tree may be changed by its user while root walks it. So each entry that
# needs another owner is opened first, and everything that is checked or
# changed afterwards goes through that descriptor.
# ==========================================================================

DEEPEST_TREE = 512      # levels; each keeps a directory open
FRESH = 0.05            # seconds; a second change within them may leave the
                        # same ctime, whose clock ticks every 1 to 10 ms


ELSEWHERE = "another file system"
KEPT = "belongs to the user of a task"
CHANGED = "changed while walking"


class ChownReport(FrozenRecord):
    """What a chown of a tree did."""
    changed: int                # entries that got the new owner
    left: list                  # (path, reason) of what was left alone


# Without /proc or O_PATH (macOS) entries are changed by name in an open
# directory, never following a link, and files with more links not at all.
PATH_ONLY = getattr(os, "O_PATH", 0) if os.path.isdir("/proc/self/fd") else 0


class ChownWalk:
    """Gives a tree to a user, even while another user changes the tree.

    An entry with the wrong owner is opened with O_PATH and O_NOFOLLOW,
    checked with fstat on that descriptor and changed through it, so no other
    file can take its place in between; where nobody but root can change the
    directory, it is changed by its name. An entry that is right is only
    looked at. A regular file with more hard links is changed only if all of
    them are in this tree: a user can link to a file of another user. Its
    ctime, which each link and rename sets, must not change while the links
    are counted.
    """

    def __init__(self, uid: int, gid: int, is_stopped=lambda: False,
                 kept=frozenset()):
        """`kept`: the user ids whose files and directories stay theirs."""
        self.uid, self.gid, self.is_stopped = uid, gid, is_stopped
        self.kept = kept
        self.changed = 0
        self.waited = False
        self.left: list[tuple[str, str]] = []
        self.linked: dict[int, dict] = {}   # inode -> what was seen of it
        self.device = 0
        self.descriptors = -1       # /proc/self/fd
        self.is_mounted_below = False

    def walk(self, path: str) -> ChownReport:
        """Change the whole tree, the directory at `path` included. Raises
        OSError if that cannot be opened."""
        top = open_directory(path)
        try:
            self.device = os.fstat(top).st_dev
            self.mount = mount_of(top)
            if PATH_ONLY:       # else nothing to change through
                self.descriptors = os.open("/proc/self/fd", PATH_ONLY)
                real = os.readlink(f"/proc/self/fd/{top}").rstrip("/") + "/"
                self.is_mounted_below = any(point.startswith(real)
                                            for point in mount_points())
            self.walk_directory(top, path, 0)
            for seen in self.linked.values():
                self.hard_linked(top, path, seen)
        finally:
            os.close(top)
            if self.descriptors >= 0:
                os.close(self.descriptors)
        return ChownReport(self.changed, self.left)

    def leave(self, why: str, *path: str) -> None:
        """Report an entry that keeps its owner, or its special bits."""
        self.left.append((escape_controls(os.path.join(*path)), why))

    def refusal(self, status) -> str:
        """Return why an entry keeps its owner, or ""."""
        if status.st_dev != self.device:
            return ELSEWHERE
        if stat.S_IFMT(status.st_mode) in (stat.S_IFBLK, stat.S_IFCHR):
            return "a device"
        return KEPT if status.st_uid in self.kept else ""

    def is_right(self, status) -> bool:
        """Whether an entry has the wanted owner."""
        return (status.st_uid, status.st_gid) == (self.uid, self.gid)

    def walk_directory(self, fd: int, path: str, depth: int) -> None:
        """Change everything in a directory, then the directory itself: as
        long as root owns it, nobody can replace what was checked."""
        below: list[tuple] = []
        is_steady = not self.is_mounted_below and is_roots_alone(fd)
        with os.scandir(fd) as entries:
            for entry in entries:
                if self.is_stopped():
                    return
                try:
                    self.entry(fd, entry, path, is_steady, below)
                except OSError as error:
                    self.leave(error.strerror, path, entry.name)
        for name, identity in below:
            inner = os.path.join(path, name)
            if depth + 1 >= DEEPEST_TREE:
                self.leave(f"deeper than {DEEPEST_TREE} directories", inner)
                continue
            try:
                self.enter(fd, name, identity, inner, depth)
            except OSError as error:
                self.leave(CHANGED if error.errno in (
                    errno.ELOOP, errno.ENOTDIR, errno.ENOENT)
                    else error.strerror, inner)
        self.give_directory(fd, path)

    def enter(self, fd, name, identity, path, depth) -> None:
        """Walk the directory `name` in `fd`, if it is still the one with
        `identity`: (device, inode)."""
        # O_NONBLOCK: a FIFO may be in the directory's place by now.
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
                        | os.O_NOFOLLOW, dir_fd=fd)
        try:
            status = os.fstat(inner)
            if (status.st_dev, status.st_ino) != identity:
                self.leave(CHANGED, path)
            elif mount_of(inner) != self.mount:
                self.leave(ELSEWHERE, path)
            else:
                self.walk_directory(inner, path, depth + 1)
        finally:
            os.close(inner)

    def entry(self, fd: int, entry, directory: str, is_steady: bool,
              below: list) -> None:
        """Change one entry of the directory `fd`, unless it is right.

        A directory is added to `below` and walked later. `is_steady`: nobody
        else can replace the entry, so it can be changed by its name.
        """
        status = entry.stat(follow_symlinks=False)
        why = self.refusal(status)
        if stat.S_ISDIR(status.st_mode) and why != ELSEWHERE:
            below.append((entry.name, (status.st_dev, status.st_ino)))
        elif why:
            self.leave(why, directory, entry.name)
        elif self.is_right(status):
            pass
        elif PATH_ONLY and not (is_steady and is_plain(status)) \
                or status.st_nlink == 1 and not is_plain(status):
            self.open_entry(fd, entry.name, directory)
        else:
            self.change(fd, entry.name, directory, status)

    def open_entry(self, fd: int, name: str, directory: str) -> None:
        """Change an entry that is not a directory through a descriptor.

        What was found when its directory was read may be another file now.
        """
        held = os.open(name, (PATH_ONLY or os.O_NONBLOCK) | os.O_NOFOLLOW,
                       dir_fd=fd)
        try:
            status = os.fstat(held)
            why = self.refusal(status)
            if stat.S_ISDIR(status.st_mode):
                why = CHANGED
            elif self.is_mounted_below and mount_of(held) != self.mount:
                why = ELSEWHERE
            if why:
                self.leave(why, directory, name)
            else:
                self.change(fd, name, directory, status, held)
        finally:
            os.close(held)

    def change(self, fd: int, name: str, directory: str, status,
               held: int = -1) -> None:
        """Change the entry `name` of the directory `fd`: through `held`, if
        it is open, or by its name. One of several hard links must wait."""
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            self.count_link(fd, name, os.path.join(directory, name), status)
        elif held >= 0 and not stat.S_ISLNK(status.st_mode):
            self.give(held, status, directory, name)
        else:
            os.chown(name, self.uid, self.gid, dir_fd=fd,
                     follow_symlinks=False)
            self.changed += 1

    def give(self, held: int, status, *path: str) -> None:
        """Change a file through a descriptor, without its setuid and setgid
        bits: they would give the rights of the new owner away."""
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o6000:
            os.chmod(f"/proc/self/fd/{held}" if PATH_ONLY else held,
                     status.st_mode & 0o1777)
            self.leave("changed without its setuid and setgid bits", *path)
        if PATH_ONLY:
            os.chown(str(held), self.uid, self.gid, dir_fd=self.descriptors)
        else:
            os.fchown(held, self.uid, self.gid)
        self.changed += 1

    def give_directory(self, fd: int, path: str) -> None:
        """Change the owner of an open directory, unless it is right."""
        status = os.fstat(fd)
        if self.is_right(status):
            return
        if status.st_uid in self.kept:
            self.leave(KEPT, path)
            return
        if status.st_mode & 0o6000:
            os.fchmod(fd, status.st_mode & 0o1777)
        os.fchown(fd, self.uid, self.gid)
        self.changed += 1

    def count_link(self, fd, name, path, status) -> None:
        """Remember one of the hard links of a file for `hard_linked`."""
        if not self.waited and -FRESH < time.time() - status.st_ctime < FRESH:
            # Made a moment ago, by a task that ended just now.
            self.waited = True
            time.sleep(2 * FRESH)
        seen = self.linked.setdefault(status.st_ino, {
            "status": status, "path": path, "names": set(), "still": True})
        # By directory and name: a directory that is moved during the walk
        # shows the same link again.
        seen["names"].add((os.fstat(fd).st_ino, name))
        seen["still"] = seen["still"] and status.st_ctime_ns == \
            seen["status"].st_ctime_ns and time.time() - status.st_ctime > \
            FRESH

    def hard_linked(self, top: int, root: str, seen: dict) -> None:
        """Change a file if all of its hard links are in the tree."""
        path, status = seen["path"], seen["status"]
        if len(seen["names"]) != status.st_nlink:
            return self.leave(f"{status.st_nlink} hard links, "
                              f"{len(seen['names'])} of them here", path)
        if not PATH_ONLY:
            return self.leave("hard links (this system has no O_PATH)", path)
        if not seen["still"]:
            return self.leave("hard links that just changed", path)
        names = os.path.relpath(path, root).split("/")
        fd = os.dup(top)
        try:
            for depth, name in enumerate(names, start=1):
                flags = PATH_ONLY if depth == len(names) \
                    else PATH_ONLY | os.O_DIRECTORY
                inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
            now = os.fstat(fd)
            if (now.st_ino, now.st_dev, now.st_nlink, now.st_ctime_ns) != (
                    status.st_ino, status.st_dev, status.st_nlink,
                    status.st_ctime_ns):
                return self.leave(CHANGED, path)
            self.give(fd, now, path)
        except OSError as error:
            self.leave(error.strerror, path)
        finally:
            os.close(fd)
        return None


def is_roots_alone(fd: int) -> bool:
    """Whether nobody but root can rename or replace anything in an open
    directory. Raises OSError."""
    status = os.fstat(fd)
    return status.st_uid == 0 and not status.st_mode & 0o022 \
        and not attribute(fd, NFS4_ACL)


def is_plain(status) -> bool:
    """Whether a file has one name and no setuid or setgid bit."""
    return not stat.S_ISREG(status.st_mode) or (
        status.st_nlink == 1 and not status.st_mode & 0o6000)


def mount_of(fd: int) -> str:
    """Return the ID of the mount that a descriptor is in (Linux; else '').

    A bind mount of the same file system has the same st_dev.
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            return next((line for line in file
                         if line.startswith(b"mnt_id:")), b"").decode()
    except OSError:
        return ""


def mount_points() -> list[str]:
    """Return the paths where something is mounted (Linux)."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8",
                  errors="surrogateescape") as file:
            return [line.split()[4].replace(r"\040", " ") for line in file]
    except OSError:
        return []


def raise_open_files() -> None:
    """Raise the soft limit of open files: the walk keeps a directory open
    for each level, and the usual limit is 1,024."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if 0 <= soft < wanted:      # RLIM_INFINITY is -1
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def chown_tree(path: str, uid: int, gid: int, is_stopped=lambda: False,
               kept=frozenset()) -> ChownReport:
    """Give a tree to a user, but for what the user ids in `kept` own.

    The walk ends early when `is_stopped()` becomes true. Raises OSError if
    the tree cannot be opened.
    """
    raise_open_files()
    # Two calls for each directory of depth, and those that led to here.
    sys.setrecursionlimit(max(sys.getrecursionlimit(),
                              2 * DEEPEST_TREE + 1000))
    return ChownWalk(uid, gid, is_stopped, kept).walk(path)


def free_bytes(path: str) -> int:
    """Return the bytes that users other than root may still write at `path`.
    """
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


# ==========================================================================
# Git: how is a storage committed?                   (files, processes; C O)
#
# git runs as the owner of the repository, never as root in another user's:
# the repository's configuration and filters can run programs. What mission
# itself wants to know of a repository it looks up in a child that has become
# the owner: links there can lead anywhere.
# ==========================================================================

GIT_SECONDS = 600       # for one command of git
PACK_SECONDS = 3600     # for `git gc`, which nothing waits for
LOCK_AGE = 15 * 60      # seconds; an older git lock is stale
# The configuration of git(1) that no repository and no user can change.
GIT_OPTIONS = (
    # "batch" waits for the disk once for all objects, not for each. sync()
    # does the rest.
    "core.fsync=all", "core.fsyncMethod=batch", "core.fsmonitor=false",
    "core.hooksPath=/dev/null", "commit.gpgSign=false",
    "status.submoduleSummary=false", "color.ui=false")
CHANGES_NAMED = 1000    # files of one commit are named, then counted
UNREADABLE_HINT = '"chown": true for this storage'
# Packing is a separate step after the mail, with its own limit.
NO_PACKING = ("gc.auto=0", "maintenance.auto=false")
STAY_ATTACHED = ("gc.autoDetach=false", "maintenance.autoDetach=false")
# Where git looks for configuration besides the repository (git-config(1),
# gitattributes(5)); "~" is root's home.
ROOTS_GIT_FILES = (
    "/etc/gitconfig", "/etc/gitattributes", "~/.gitconfig",
    "~/.config/git/config", "~/.config/git/attributes",
    "~/.config/git/ignore")
UNFINISHED = {"rebase-merge": "rebase", "rebase-apply": "rebase",
              "MERGE_HEAD": "merge", "CHERRY_PICK_HEAD": "cherry-pick"}


def as_user(account: Account, function, *arguments) -> str:
    """Become a user for good, and return function(*arguments). Only for
    run_in_child. Raises OSError."""
    if os.geteuid() != account.uid:
        os.setgroups(account.groups)
        os.setgid(account.gid)
        os.setuid(account.uid)
    return function(*arguments)


def untrusted_entry(tops: list[str], uid: int, strict: bool) -> str:
    """Return the first entry below the directories `tops` that does not
    belong to `uid`, as the beginning of a sentence, or "".

    With `strict` no other user may be able to write it either. Runs as the
    owner of the repository. Raises Error if a directory cannot be read.
    """
    ahead = list(tops)
    while ahead:
        place = ahead.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    owner = entry.stat(follow_symlinks=False).st_uid
                    if owner != uid:
                        return f"{entry.path} belongs to {user_name(owner)}"
                    found = writer_of(entry.path, {uid}, sticky=False) \
                        if strict else ""
                    if found:
                        return f"{entry.path} {found}"
                    if entry.is_dir(follow_symlinks=False):
                        ahead.append(entry.path)
        except OSError as error:
            raise Error(f"{place}: {error.strerror}") from None
    return ""


def git_state(directory: str) -> str:
    """Return "rebase", "merge" or "cherry-pick" while one is in progress in
    a git directory, or "". Runs as the owner of the repository."""
    return next((state for name, state in UNFINISHED.items() if
                 os.path.lexists(os.path.join(directory, name))), "")


def find_locks(directories: list[str]) -> dict[str, float]:
    """Return git's lock files: path -> seconds since 1970 when it was made.
    Runs as the owner of the repository."""
    found = {}
    for directory in directories:
        refs = os.walk(os.path.join(directory, "refs"))
        for place in [directory, *(place for place, _, _ in refs)]:
            try:
                for entry in os.scandir(place):
                    if entry.name.endswith(".lock"):
                        found[entry.path] = entry.stat(
                            follow_symlinks=False).st_mtime
            except OSError:         # removed since then, or unreadable
                continue
    return found


def remove_files(paths: list[str]) -> str:
    """Remove files that may be gone. Runs as the owner of the repository.
    Raises OSError."""
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
    return ""


class Repository:
    """Commits one directory with git, as its owner.

    Never as root in the repository of another user: its configuration, hooks
    and filters run programs, and no set of options disables all of them. As
    the owner these programs can do only what the owner could do anyway.
    """

    def __init__(self, processes: Processes, path: str, report,
                 since: float):
        """report(kind, text) gets a line for the log ("Status" ...), or with
        the kind "" raw bytes of git's output. `since`: when mission's git
        may have begun to work there, in seconds since 1970. Raises Error if
        the owner of the directory has no account, or is another user."""
        self.processes, self.path, self.report = processes, path, report
        self.git, self.since = find_program("git") or "git", since
        self.directories: list[str] = []    # that git writes to
        self.changes = 0
        fd = open_directory(path)
        try:
            uid = os.fstat(fd).st_uid
        finally:
            os.close(fd)
        me = myself()
        self.owner = me if uid == me.uid else account_of(uid)
        if self.owner is None:
            raise Error(f"{path} belongs to user ID {uid}, which has no "
                        "account", f"chown -hR USER {shell_word(path)}")
        if self.owner.uid != me.uid and me.uid != 0:
            raise Error(f"{path} belongs to {self.owner.name}",
                        f"run mission as {self.owner.name} or as root")
        self.env = environment(
            self.owner, GIT_TERMINAL_PROMPT="0", GIT_PAGER="cat",
            GIT_EDITOR="true", GIT_OPTIONAL_LOCKS="0", LC_ALL="C.UTF-8")

    def call(self, *arguments: str, options=NO_PACKING,
             limit: float = GIT_SECONDS, report=None,
             **more) -> ProcessResult:
        """Run git to its end, as the owner. The arguments by name are those
        of Processes.run; `report` gets the output piece by piece."""
        argv = [self.git, "-C", self.path, "--no-pager"]
        for option in GIT_OPTIONS + options:
            argv += ["-c", option]
        return self.processes.run(argv + list(arguments), limit, env=self.env,
                                  account=self.owner, on_chunk=report, **more)

    def must(self, *arguments: str, **options) -> ProcessResult:
        """Run git, again if it failed because of stale locks, which are
        removed. Raises Error if it fails."""
        done = self.call(*arguments, **options)
        if done.code and self.clear_locks():
            done = self.call(*arguments, **options)
        if done.code:
            if done.code < 0 or done.late:
                self.clear_locks()
            raise Error(f"git {arguments[0]}: {done.reason}")
        return done

    def look_up(self, function, *arguments) -> str:
        """Return function(*arguments), called in a child as the owner.
        Raises Error."""
        done, text = self.processes.run_in_child(
            GIT_SECONDS, as_user, self.owner, function, *arguments)
        if not done:
            raise Error(escape_controls(text))
        return text

    def raw(self, data: bytes) -> None:
        """Report output of git as it is."""
        self.report("", data)

    def commit(self, message: str, is_checked: bool = False) -> list[str]:
        """Add and commit everything; return warnings. Raises Error and
        OSError.

        `is_checked`: everything in .git was found to be the owner's.
        """
        self.locate()
        inside = os.path.join(os.path.realpath(self.path), ".git")
        if not is_checked or self.directories != [inside]:
            self.refuse_mixed_owners()
        self.wait_for_locks()
        state = self.look_up(git_state, self.directories[0])
        if state:
            return [f"{self.path} was not committed, because a {state} is in "
                    "progress"]
        warnings = self.add() + self.nested()
        if not self.changes:
            self.report("NoChanges", "")
            return warnings
        # The objects are on the disk before a branch names them.
        self.sync()
        self.report("Commit", message)
        self.identify()
        self.must("commit", "--quiet", "--no-verify", "--no-gpg-sign",
                  "-F", "-", data=message.encode() + b"\n", report=self.raw)
        self.call("show", "--oneline", "--shortstat", "--no-ext-diff",
                  "--no-textconv", "HEAD", report=self.raw)
        self.sync()
        return warnings

    # --- what git and mission rely on -------------------------------------

    def locate(self) -> None:
        """Ask git for the directories that it writes to: that of .git, and
        in a worktree the common one (gitrepository-layout(5)).

        Raises Error if the directory is not the top of a repository. The
        output of git is not repeated: it could quote any file.
        """
        if self.owner.uid == 0:
            self.refuse_untrusted([self.path])
        done = self.call("rev-parse", "--is-inside-work-tree", "--show-cdup",
                         "--absolute-git-dir", "--git-common-dir")
        if done.late:
            raise Error(f"{self.path}: git {done.reason}")
        lines = done.output.split("\n")
        if done.code or len(lines) != 5 or lines[:2] != ["true", ""]:
            raise Error(f"{self.path}/.git does not lead to a repository of "
                        f"{self.owner.name}", f"as {self.owner.name}: git -C "
                        f"{shell_word(self.path)} status")
        found = [os.path.normpath(os.path.join(self.path, line))
                 for line in lines[2:4]]
        self.directories = list(dict.fromkeys(found))

    def refuse_mixed_owners(self) -> None:
        """Raise Error if git's directories are not the owner's alone.

        A file of another user would make git fail half-way, or let that user
        run programs as the owner. For root it must be impossible to write
        any file that git reads.
        """
        found = self.look_up(untrusted_entry, self.directories,
                             self.owner.uid, False)
        if found:
            raise Error(f"{escape_controls(found)}, and git runs as "
                        f"{self.owner.name}, who owns {self.path}",
                        f"{UNREADABLE_HINT}, or: chown -hR "
                        f"{self.owner.name}: {shell_word(self.path)}")
        if self.owner.uid == 0:
            self.refuse_untrusted(self.directories)
            self.refuse_untrusted_files()

    def refuse_untrusted(self, directories: list[str]) -> None:
        """Raise Error if anyone but root can write one of the `directories`,
        anything in them or any directory above them."""
        found = next(filter(None, (untrusted_writer(directory, {0})
                                   for directory in directories)), "") \
            or self.look_up(untrusted_entry, directories, 0, True)
        if found:
            raise Error("git would run as root, and "
                        + escape_controls(found), protection(found)
                        or f"chown -hR USER {shell_word(self.path)}")

    def refuse_untrusted_files(self) -> None:
        """Raise Error if anyone but root can write a file outside the
        repository that git reads: configuration and what it includes, lists
        of attributes, and directories of objects that it borrows."""
        listing = self.must("config", "--list", "--show-origin", "-z",
                            whole=True).output.split("\0")
        files = [self.expand(file) for file in ROOTS_GIT_FILES]
        for origin, setting in zip(listing[::2], listing[1::2]):
            file = os.path.join(self.path, origin.partition(":")[2])
            if origin.startswith("file:"):
                files.append(file)
            key, _, value = setting.partition("\n")
            if key.startswith("include") and key.endswith(".path"):
                files.append(os.path.join(os.path.dirname(file),
                                          self.expand(value)))
            elif key in ("core.attributesfile", "core.excludesfile"):
                files.append(os.path.join(self.path, self.expand(value)))
        for file in dict.fromkeys(files):
            place = file
            while not os.path.lexists(place):   # who could make it?
                place = os.path.dirname(place)
            found = untrusted_writer(place, {0})
            if found:
                raise Error("git would run as root and read "
                            f"{escape_controls(file)}, and "
                            + escape_controls(found), protection(found))
        borrowed = [line[11:] for line in self.must(
            "count-objects", "-v").output.split("\n")
            if line.startswith("alternate: ")]
        self.refuse_untrusted(borrowed)

    def expand(self, path: str) -> str:
        """Return the path with the home directory for a ~ at its front, as
        git does it."""
        return self.owner.home + path[1:] if path.startswith("~/") \
            else os.path.expanduser(path)

    # --- the steps of a commit --------------------------------------------

    def add(self) -> list[str]:
        """Add everything, and report what has changed since the last commit;
        return warnings. Raises Error.

        The list comes from the index: `git status` would read the whole tree
        once more. `self.changes` becomes the number of changed files.
        """
        self.report("Status", "")
        output = bytearray()

        def keep(data: bytes) -> None:
            output.extend(data[:OUTPUT_KEPT - len(output)])

        try:
            self.must("add", "-A", report=keep)
            text = self.must(
                "diff", "--cached", "--name-status", "-z", "--no-renames",
                "--no-ext-diff", "--no-textconv", "--ignore-submodules=none",
                whole=True).output
            self.changes = text.count("\0") // 2   # status, name
            fields = text.split("\0", 2 * CHANGES_NAMED)
            names = [f"{letter}  {escape_controls(name)}\n" for letter, name
                     in zip(fields[::2], fields[1::2])]
            if self.changes > len(names):
                names.append(f"and {self.changes - len(names):,} more\n")
            self.raw("".join(names).encode())
        except Error as error:
            for denied in self.unreadable(output):
                raise Error(f"{error.message}: {denied}",
                            UNREADABLE_HINT) from None
            raise
        finally:
            self.report("Add", "")
            self.raw(bytes(output))
        return [f"{name}: not committed ({UNREADABLE_HINT})"
                for name in self.unreadable(output)]

    def unreadable(self, output: bytes) -> list[str]:
        """Return what `git add` could not open, for a person."""
        import re
        text = output.decode("utf-8", "replace")
        names = re.findall(r"""^(?:error|warning): .*?["'](.+?)/?["')]+: """
                           "Permission denied$", text, re.M)
        return [f"{self.owner.name} cannot read " + escape_controls(
            os.path.join(self.path, name)) for name in dict.fromkeys(names)]

    def identify(self) -> None:
        """Set a name for the commit, if the owner has none in git's
        configuration."""
        email = f"{self.owner.name}@{HOST}"
        for key, value in (("name", PROG), ("email", email)):
            if not self.call("config", f"user.{key}").output.strip():
                for role in ("AUTHOR", "COMMITTER"):
                    self.env[f"GIT_{role}_{key.upper()}"] = value

    def nested(self) -> list[str]:
        """Return warnings about repositories in the directory: git commits the
        hash of their HEAD, but none of their files. Submodules are intended.
        """
        listing = self.must("ls-files", "-s", "-z", whole=True).output
        names = {entry.partition("\t")[2] for entry in listing.split("\0")
                 if entry.startswith("160000 ")}
        if not names:
            return []
        modules = self.call("config", "-z", "-f", ".gitmodules",
                            "--get-regexp", r"submodule\..*\.path").output
        declared = {entry.partition("\n")[2]
                    for entry in modules.split("\0")}
        return [escape_controls(os.path.join(self.path, name))
                + " is a nested repository, so its files are not committed"
                for name in sorted(names - declared)]

    def sync(self) -> None:
        """Bring the file systems of the repository to the disk, as the
        owner. Raises Error.

        git syncs its files and not their directories: only this makes a
        commit survive a power cut. sync(2) would wait for every disk.
        """
        done = self.processes.run(
            ["sync", "-f", self.path, *self.directories], GIT_SECONDS,
            account=self.owner)
        if done.code:
            raise Error(f"sync -f {self.path}: {done.reason}")

    def pack(self) -> str:
        """Let git pack loose objects and packs, if there are too many by its
        rule (gc.auto in git-gc(1)); return its output, "" if it did nothing.
        Raises Error."""
        done = self.call("gc", "--auto", options=STAY_ATTACHED,
                         limit=PACK_SECONDS, survives_stop=False)
        if done.code:
            raise Error(f"git gc: {done.reason}")
        return done.output

    # --- locks that a killed git left -------------------------------------

    def locks(self) -> dict[str, float]:
        """Return the lock files of git that exist now, and when each was
        made, in seconds since 1970. Raises Error."""
        return self.look_up(find_locks, self.directories)

    def users(self) -> list[str]:
        """Return "pid (name)" of each git that has the repository open."""
        places = [self.path] + self.directories
        return [f"{pid} ({name})" for pid, name in list_processes()
                if pid != os.getpid() and any(
                    link == place or link.startswith(place + "/")
                    for link in open_links(pid) for place in places)
                and "git" in name]

    def wait_for_locks(self) -> None:
        """Wait up to 30 s for another git. Raises Error if a lock stays."""
        deadline = self.processes.clock.ticks() + 30
        while self.locks() and not self.clear_locks():
            users = self.users()
            if users and not self.processes.stopped \
                    and self.processes.clock.ticks() <= deadline:
                time.sleep(0.1)
                continue
            locks = self.locks()
            if locks:       # else its git has ended since we looked
                lock = escape_controls(min(locks))
                raise Error(f"{lock} is held by {users[0]}" if users else
                            f"{lock} is less than 15 minutes old",
                            "once no git is running there: rm "
                            + shell_word(lock))

    def clear_locks(self) -> bool:
        """Remove the locks of a git that was killed, as the owner; whether
        there were any. While a git has the repository open, none is stale.
        Raises Error."""
        now = self.processes.clock.now()
        stale = [lock for lock, made in self.locks().items()
                 if self.is_stale(made, now)]
        if not stale or self.users():
            return False
        self.look_up(remove_files, stale)
        for lock in stale:
            self.report("StaleLock", escape_controls(lock))
        return True

    def is_stale(self, made: float, now: float) -> bool:
        """Whether a lock of this time is older than 15 minutes or the last
        boot, or was made since mission's git began to work there."""
        return made < now - LOCK_AGE or made >= self.since - 1 \
            or made < boot_time()


# ==========================================================================
# Client: how is one HTTP request bounded?                    (network; C U)
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
    """Return the answer to one request to `url`, on a new connection.

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
# Delivery: how do people hear of a run?             (network, processes; C)
#
# Mail, ping, desktop notification and metrics. Each has a limit of time, and
# a failure is reported without turning a good backup into a failed one.
# ==========================================================================

MAIL_SECONDS, DESKTOP_SECONDS = 60, 5
WAITS_FOR = "X-Waits-For: "
MAIL_PAUSES = (30.0, 90.0)      # seconds until a mail server is asked again


def sender_of(mail: Mail) -> str:
    """Return the sender of mails, or ''. It is mail.from; with a mail server
    mail.smtp.from, mail.from or the user that logs in, whom most demand."""
    found = [mail.sender] if mail.type == "sendmail" else [
        mail.smtp.sender, mail.sender, mail.smtp.user]
    return next(filter(None, map(address_of, found)), "")


def deliver_by_smtp(smtp: Smtp, sender: str, password: str,
                    addresses: list[str], message: bytes) -> dict:
    """Send one message; return address -> why it was refused."""
    import smtplib
    try:
        refused = smtp_session(smtp, sender, password, addresses, message)
    except smtplib.SMTPRecipientsRefused as error:
        # It lacks those that were not tried after a reply 421.
        refused = {**dict.fromkeys(addresses, (421, b"connection closed")),
                   **error.recipients}
    except smtplib.SMTPResponseException as error:
        refused = dict.fromkeys(addresses, (error.smtp_code,
                                            error.smtp_error))
    except Exception as error:
        return dict.fromkeys(addresses, failure_words(error))
    return {address: f"{code} {text.decode('utf-8', 'replace')}"
            for address, (code, text) in refused.items()}


def smtp_session(smtp: Smtp, sender: str, password: str, addresses: list[str],
                 message: bytes) -> dict:
    """Send one message; return the refused addresses and the replies.

    Raises OSError or smtplib.SMTPException if the server refuses anything
    else, STARTTLS included: there is no silent fallback to an unencrypted
    connection.
    """
    import smtplib
    options = {"host": smtp.host, "port": smtp.port, "timeout": MAIL_SECONDS,
               "local_hostname": mail_domain(HOST)}
    server = smtplib.SMTP_SSL(context=tls_context(smtp.ca_file), **options) \
        if smtp.security == "tls" else smtplib.SMTP(**options)
    with server:
        if smtp.security == "starttls":
            server.starttls(context=tls_context(smtp.ca_file))
        if smtp.user and (smtp.user + password).isascii():
            server.login(smtp.user, password)
        elif smtp.user:         # smtplib is ASCII only; RFC 4616 is UTF-8
            import base64
            words = f"\0{smtp.user}\0{password}".encode()
            code, text = server.docmd("AUTH", "PLAIN " + base64.b64encode(
                words).decode())
            if code != 235:
                raise smtplib.SMTPAuthenticationError(code, text)
        return server.sendmail(sender or addresses[0], addresses,
                               message.replace(b"\n", b"\r\n"))


def fetch(ping: Ping, url: str, body: bytes | None) -> str:
    """GET, or POST of a body; the status and the first line of the answer.

    At most 3 redirects are followed. Raises ConnectionFailed, also for any
    status but 2xx.
    """
    response = send_request(
        "GET" if body is None else "POST", url, body,
        {"Content-Type": "text/plain; charset=utf-8"}, ping.timeout, 1024,
        redirects=3, ca_file=ping.ca_file, proxy=with_host(ping.proxy))
    if not 200 <= response.status < 300:
        raise ConnectionFailed(f"HTTP {response.status} {response.reason}")
    first = response.body.decode("utf-8", "replace").strip().split("\n")[0]
    return f"{response.status} {escape_controls(first.strip())[:200]}"


def with_host(url: str) -> str:
    """Return the URL with the host name in place of each `%s`."""
    from urllib.parse import quote
    return url.replace("%s", quote(os.fsencode(HOST), safe=""))


def request_url(endpoint: str, action: str = "", run_id: str = "") -> str:
    """Return the URL to ping for an action: "start", "fail", or "" for
    success.

    It has `action` as the last part of its path, and `run_id` as `rid`, by
    which Healthchecks pairs the pings of one run.
    """
    from urllib.parse import quote, urlsplit, urlunsplit
    from string import punctuation
    parts = urlsplit(quote(with_host(endpoint), safe=punctuation))
    path, query = parts.path, parts.query
    if action:
        path = path.rstrip("/") + "/" + action
    if run_id:
        query += ("&" if query else "") + "rid=" + run_id
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))


def hide_url(text: str, url: str) -> str:
    """Return a server's text with *** for each part of the path and query of
    `url`, which may be secret: a server can repeat its request."""
    import re
    from urllib.parse import unquote
    words = re.split("[/?&=]", request_target(url))
    for word in sorted({*words, *map(unquote, words)}, key=len, reverse=True):
        if len(word) > 5:       # a short word, such as "start", is public
            text = text.replace(word, MASK)
    return text


def worth_another(answer: str) -> bool:
    """Whether another try may help after "SERVER: WHAT": not after a status
    4xx of HTTP, except 408 (timeout) and 429 (too many requests), or a reply
    5yz of a mail server (RFC 5321, 4.2.1)."""
    import re
    return bool(answer) and not re.match(
        r"\S+( through \S+)?: (HTTP 4(?!08|29)|5\d\d )", answer)


def rfc5322(sender: str, to: list[str], subject_line: str, body: str,
            message_id: str, now: float) -> bytes:
    """Return the bytes of a mail (RFC 5322), with the body as
    quoted-printable, so that no line of a task is a command to a mail server.

    `sender` may be ''; `to` are bare addresses; `now` is in seconds since
    1970.
    """
    domain = mail_domain(HOST)
    from email.message import EmailMessage
    from email.policy import default
    from email.utils import formatdate
    message = EmailMessage(policy=default)
    message["From"] = sender or f"{PROG} <{myself().name}@{domain}>"
    message["To"] = ", ".join(to)
    message["Subject"] = subject_line
    message["Date"] = formatdate(now, localtime=True)
    message["Message-ID"] = f"<{message_id}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(body, charset="utf-8", cte="quoted-printable")
    return message.as_bytes()


def recipients(message: bytes, addresses: list[str]) -> list[str]:
    """Return the addresses that a mail of the outbox still has to reach: those
    of its header WAITS_FOR, or all."""
    first = message.split(b"\n", 1)[0].decode("ascii", "replace")
    left = first.removeprefix(WAITS_FOR).split(", ")
    return [each for each in addresses if each in left] or addresses


class Delivery:
    """Sends mail, pings, desktop notifications and metrics of a run."""

    def __init__(self, config: Config, processes: Processes):
        self.config, self.processes = config, processes

    def load_modules(self) -> None:
        """Import what the end of a long run needs: an upgrade of Python
        during the run could remove it."""
        import email.message        # noqa: F401
        import email.policy         # noqa: F401
        import email.utils          # noqa: F401
        import encodings.idna       # noqa: F401
        import http.client          # noqa: F401
        import smtplib              # noqa: F401
        import ssl                  # noqa: F401
        import threading            # noqa: F401

    def notify(self, text: str, failed: bool) -> str:
        """Show a message on the user's desktop; '' or why that failed."""
        root, user = os.geteuid() == 0, self.config.user.name
        account = account_of(user) if root else myself()
        given = {} if root else os.environ
        bus = given.get("DBUS_SESSION_BUS_ADDRESS",
                        f"unix:path=/run/user/{account.uid}/bus")
        socket = bus.partition("path=")[2].split(",")[0]
        if socket and not os.path.exists(socket):
            return f"{user} has no desktop session"
        env = environment(account, DBUS_SESSION_BUS_ADDRESS=bus,
                          DISPLAY=given.get("DISPLAY", ":0"))
        done = self.processes.run(
            [find_program("notify-send") or "notify-send", "--app-name",
             PROG, "--icon", "dialog-error" if failed
             else "dialog-information", "--urgency", "critical", "--",
             text], DESKTOP_SECONDS, env=env, account=account)
        return done.reason if done.code else ""

    def send_mail(self, message: bytes, addresses: list[str]) -> dict:
        """Send a message; return address -> "" or why it was refused."""
        if self.config.mail.type == "smtp":
            return self.send_by_smtp(message, addresses)
        # One call for each: some programs, such as msmtp, give up all if the
        # server refuses one.
        return {each: self.send_by_sendmail(message, each)
                for each in addresses}

    def send_by_sendmail(self, message: bytes, address: str) -> str:
        """Send a message with sendmail; '' or why it was not accepted."""
        program = find_program("sendmail")
        if not program:
            return "sendmail is not installed"
        sender = sender_of(self.config.mail)
        done = self.processes.run(
            [program, "-i", *(["-f", sender] if sender else []), "--",
             address], self.processes.shortened(MAIL_SECONDS), message)
        if not done.code and done.unread:
            return "sendmail: ended before it had read the whole mail"
        return f"sendmail: {done.reason}" if done.code else ""

    def send_by_smtp(self, message: bytes, addresses: list[str]) -> dict:
        """Send a message to the mail server, see `send_mail`."""
        config, password, smtp = self.config, "", self.config.mail.smtp
        port = smtp.port or {"tls": 465, "starttls": 587, "none": 25}[
            smtp.security]
        if smtp.pass_name:
            try:
                password = read_password(self.processes, config.pass_bin,
                                         config.user.name, smtp.pass_name)
            except Error as error:
                return dict.fromkeys(addresses, error.message)
        sent, answer = self.processes.run_in_child(
            MAIL_SECONDS, deliver_by_smtp, smtp.replace(port=port),
            sender_of(config.mail), password, addresses, message)
        refused = answer if sent else dict.fromkeys(addresses, answer)
        accepted = dict.fromkeys(addresses, "")
        return {**accepted, **{
            address: f"{smtp.host}:{port}: {' '.join(reason.split())[:300]}"
            for address, reason in refused.items()}}

    def ping(self, url: str, body: bytes | None) -> tuple[bool, str]:
        """Send one request: (True, answer of the server) or (False, why)."""
        ping = self.config.ping
        accepted, answer = self.processes.run_in_child(
            ping.timeout, fetch, ping, url, body)
        proxy = f" through {public_url(ping.proxy)}" if ping.proxy else ""
        answer = hide_url(answer, url)
        return accepted, answer if accepted \
            else f"{public_url(url)}{proxy}: {answer}"

    def write_metrics(self, record: dict, last_success: float) -> None:
        """Write the file of node_exporter's textfile collector. Raises Error.
        """
        path = self.config.metrics.textfile
        data = metrics_text(record, last_success, self.config.path).encode()

        def write() -> None:
            directory = open_directory(os.path.dirname(path))
            write_atomically(os.path.basename(path), data, 0o644,
                             dir_fd=directory)

        written, why = self.processes.run_in_child(ANSWER_SECONDS, write)
        if not written:
            raise Error(f"{path}: {why}")


# ==========================================================================
# Builtins: which tasks need no script?                  (files, network; U)
#
# A built-in task is Python: TASKS_DIR/slug/task.py with `run(args, log)`,
# or one of this section. It runs in a separate process, so that it can be
# timed out, become another user, and crash without harm.
# ==========================================================================

SPOTIFY_API = "https://api.spotify.com/v1"
SPOTIFY_ACCOUNTS = "https://accounts.spotify.com"
HTTP_SECONDS, HTTP_TRIES, LONGEST_WAIT = 30, 6, 600


class TaskArguments:
    """The first argument of a built-in task's `run`: args.storage,
    args.target_user, args.pass_value(name)."""

    def __init__(self, given: dict, secrets_fd: int):
        self.storage: dict[str, str] = given["storage"]
        self.target_user: str = given["target_user"]
        self._pass_bin, self._secrets_fd = given["pass_bin"], secrets_fd

    def pass_value(self, name: str) -> str:
        """Return a value of the password store. mission gets it first, and
        redacts it in the log. Raises Error."""
        if not self._pass_bin:
            raise Error("passBin is not set", '"passBin": "/usr/bin/pass"')
        value = read_password(Processes(Clock()), self._pass_bin,
                              self.target_user, name)
        self.hide(value)
        return value

    def hide(self, value: str) -> None:
        """Redact a secret that does not come from the password store."""
        write_all(self._secrets_fd, value.encode() + b"\n")


def run_builtin(slug: str, arguments: str, secrets_fd: int) -> int:
    """Run a built-in task in this process; return the exit status.
    `arguments`: those of TaskArguments, as JSON."""
    import json
    import traceback
    given = json.loads(arguments)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")

    def log(text="") -> None:
        print(text, flush=True)

    try:
        function = BUILTINS.get(slug) or load_task(given["path"])
        function(TaskArguments(given, secrets_fd), log)
    except Error as error:
        log(f"{error.message}{f' ({error.hint})' if error.hint else ''}")
        return 1
    except SystemExit as error:
        if isinstance(error.code, str):
            log(error.code)
            return 1
        return error.code or 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def load_task(path: str):
    """Return the function `run` of the task.py at `path`. Raises any
    exception of that file."""
    import importlib.util
    sys.path.insert(0, os.path.dirname(path))   # for modules in its directory
    spec = importlib.util.spec_from_file_location("task", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


class Spotify:
    """Stores each playlist of an account, with all its tracks, as JSON."""

    def __init__(self, args: TaskArguments, log):
        self.args, self.log = args, log
        for name in CARRIED["spotify"]:
            if name not in args.storage:
                raise Error(f"spotify needs storage.{name}")
        self.path = os.path.join(args.storage["sync"], "spotify")
        self.token_path = os.path.join(args.storage["sessions"], "spotify")
        self.sessions = open_directory(args.storage["sessions"])
        self.api = os.environ.get("SPOTIFY_API_URL", SPOTIFY_API)
        self.accounts = os.environ.get("SPOTIFY_ACCOUNTS_URL",
                                       SPOTIFY_ACCOUNTS)
        self.client = None      # (id, secret), fetched when needed
        self.token = self.stored_token()

    def stored_token(self) -> dict:
        """Return the OAuth token in SESSIONS_DIR/spotify. Raises Error."""
        hint = ('a JSON object with "refresh_token", from an OAuth login of '
                "your Spotify app with the scope playlist-read-private")
        try:
            token = load_json("spotify", self.sessions)
        except OSError as error:
            raise Error(f"{self.token_path}: {error.strerror}", hint) from None
        except ValueError as error:
            raise Error(f"{self.token_path}: {error}", hint) from None
        if not isinstance(token, dict) or not isinstance(
                token.get("refresh_token"), str):
            raise Error(f"{self.token_path} has no refresh token", hint)
        self.hide(token)
        return token

    def hide(self, token: dict) -> None:
        """Redact the tokens in the log."""
        for key in ("access_token", "refresh_token"):
            if isinstance(token.get(key), str) and token[key]:
                self.args.hide(token[key])

    def refresh(self) -> None:
        """A new access token; kept on disk before it is used, because the
        server may have replaced the refresh token with it."""
        import base64
        import json
        from urllib.parse import urlencode
        if not self.client:
            secret = self.args.pass_value("spotify_api_client_secret")
            self.client = self.args.pass_value(
                "spotify_api_client_id"), secret
        basic = base64.b64encode(":".join(self.client).encode()).decode()
        answer = self.request(
            self.accounts + "/api/token", f"Basic {basic}", urlencode({
                "grant_type": "refresh_token",
                "refresh_token": self.token["refresh_token"]}).encode())
        self.token = {**self.token, "token_type": "Bearer", **{
            key: answer[key] for key in ("access_token", "refresh_token",
                                         "token_type") if answer.get(key)}}
        self.hide(self.token)
        if not isinstance(answer.get("access_token"), str):
            raise Error("Spotify sent no access token")
        lives = answer.get("expires_in")
        self.token["expiry"] = time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + (
                lives if isinstance(lives, int) else 3600)))
        write_atomically("spotify", json.dumps(
            self.token, indent=4).encode() + b"\n", dir_fd=self.sessions)

    def request(self, url: str, authorization: str,
                data: bytes | None = None) -> dict:
        """Return one answer as JSON; waits and tries again on 429 and 5xx, and
        when the connection fails. Raises Error, and Unauthorized on 401.

        No redirect is followed: the authorization would go along.
        """
        method, headers = "GET", {"Authorization": authorization,
                                  "Accept": "application/json"}
        if data is not None:
            method = "POST"
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        retry_after = reason = ""
        for tried in range(HTTP_TRIES):
            if tried:
                self.wait(retry_after, tried, reason)
            try:
                response = send_request(method, url, data, headers,
                                        HTTP_SECONDS)
            except (ConnectionFailed, ValueError) as error:
                retry_after, reason = "", str(error)
                continue
            status = response.status
            if status == 401 and data is None:
                raise Unauthorized
            found = json_object(response)
            if found is not None:
                return found
            retry_after = str(response.headers.get("Retry-After", ""))
            reason = "the answer is not a JSON object" if status == 200 \
                else f"HTTP {status} " + escape_controls(
                    response.body.decode("utf-8", "replace").strip()[:200])
            if status not in (200, 429) and status < 500:
                break
        raise Error(f"{url.split('?')[0]}: {reason}")

    def wait(self, retry_after: str, tried: int, reason: str) -> None:
        """Wait as long as the server asks for, else 0.5 s, 1 s, 2 s ..."""
        seconds = float(retry_after) if retry_after.isdecimal() \
            else 0.5 * 2 ** (tried - 1)
        if seconds > LONGEST_WAIT:
            raise Error(f"Spotify allows no request for {retry_after} s",
                        "mission run -t spotify")
        self.log(f"Waiting {format_duration(seconds)}: {reason}")
        time.sleep(seconds)

    def get(self, url: str) -> dict:
        """Return one object of the API, with a new token if the old one
        expired."""
        if not str(url).startswith(self.api.rstrip("/") + "/"):
            raise Error("Spotify named another server, which does not get "
                        f"the token: {escape_controls(str(url))}")
        for _ in range(2):
            if not self.token.get("access_token"):
                self.refresh()
            try:
                return self.request(url,
                                    f"Bearer {self.token['access_token']}")
            except Unauthorized:
                self.token["access_token"] = ""
        raise Error("Spotify refused a new access token")

    def pages(self, path: str) -> list:
        """Return the items of all pages of a listing. Raises Error if any is
        missing: an incomplete listing would remove files."""
        found, url, seen = [], self.api.rstrip("/") + path, set()
        while url:
            page, seen = self.get(url), seen | {url}
            if not isinstance(page.get("items"), list):
                raise Error(f"{path}: a page without items")
            found += page["items"]
            url = page.get("next")
            if url in seen:
                raise Error(f"{path}: a page leads back to an earlier one")
        total = page.get("total", len(found))
        if isinstance(total, int) and len(found) < total:
            raise Error(f"{path}: received {len(found)} of {total} items")
        return found

    def download(self) -> None:
        """Store all playlists, then remove the files of deleted ones."""
        import json
        from urllib.parse import quote
        self.directory = self.open_playlists()
        self.log("Fetching playlists")
        items = self.pages("/me/playlists?limit=50")
        playlists = [item for item in items if isinstance(item, dict)
                     and isinstance(item.get("id"), str)]
        self.log(f"Found {plural(len(playlists), 'playlist')}")
        wanted = set()
        for playlist in playlists:
            name = playlist_file(playlist)
            identity = quote(playlist["id"], safe="")
            tracks = self.pages(f"/playlists/{identity}/tracks?limit=100")
            data = json.dumps({"playlist": playlist, "tracks": tracks},
                              indent=4, ensure_ascii=False).encode(
                                  "utf-8", "backslashreplace") + b"\n"
            write_atomically(name, data, dir_fd=self.directory)
            self.log(f"Downloading {name}... {len(data) // 1000}K")
            wanted.add(name)
        if len(playlists) < len(items):
            self.log(f"{len(items) - len(playlists)} of the playlists cannot "
                     "be read: nothing is removed")
        else:
            self.remove_all_but(wanted)

    def open_playlists(self) -> int:
        """Return a descriptor of SYNC_DIR/spotify, which is made if it is
        missing. A user may own the storage, so root makes it by the
        storage's descriptor. Raises Error."""
        try:
            sync = open_directory(self.args.storage["sync"])
            try:
                os.mkdir("spotify", 0o700, dir_fd=sync)
            except FileExistsError:
                pass
            finally:
                os.close(sync)
            return open_directory(self.path)
        except OSError as error:
            raise Error(f"{self.path}: {error.strerror}") from None

    def remove_all_but(self, wanted: set) -> None:
        """Remove the files of deleted playlists, and no others. Raises Error
        if no playlist is left: that is more likely an error of Spotify."""
        deleted = [name for name in sorted(os.listdir(self.directory))
                   if name not in wanted and self.is_ours(name)]
        if deleted and not wanted:
            raise Error("Spotify lists no playlist, but "
                        f"{len(deleted)} are on the disk: nothing was removed",
                        f"empty {self.path}, if the account has none")
        for name in deleted:
            os.unlink(name, dir_fd=self.directory)
            self.log(f"Removed {name}")

    def is_ours(self, name: str) -> bool:
        """Whether a file was written by this task, by name and content."""
        if not name.endswith((".json", ".json.new")):
            return False
        try:
            identity = load_json(name, self.directory)["playlist"]["id"]
            return name.startswith(playlist_file({"id": identity}, "")[:-5])
        except (OSError, ValueError, KeyError, TypeError):
            return False


class Unauthorized(Exception):
    """The access token has expired."""


def load_json(name: str, directory: int):
    """Return the value in a JSON file of an open directory; no link is
    followed. Raises OSError and ValueError."""
    import json
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW,
                 dir_fd=directory)
    with os.fdopen(fd, "rb") as file:
        return json.load(file)


def json_object(response: HttpResponse) -> dict | None:
    """Return the JSON object in a response of status 200; None without one."""
    import json
    try:
        found = json.loads(response.body) if response.status == 200 else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else None


def playlist_file(playlist: dict, missing="unknown-playlist-name") -> str:
    """Return ID_NAME.json, the name reduced to letters, digits, - and _."""
    import re
    name = playlist.get("name") or missing
    safe = re.sub(r"[^A-Za-z0-9_-]", "", str(name))[:100]
    identity = re.sub(r"[^A-Za-z0-9]", "", str(playlist["id"]))[:64]
    return f"{identity}_{safe}.json"


def spotify(args: TaskArguments, log) -> None:
    """Needs storage.sync and storage.sessions, and the client id and secret
    in the password store."""
    Spotify(args, log).download()


BUILTINS = {"spotify": spotify}


# ==========================================================================
# State: what is known of earlier runs?                    (files, clock; C)
#
# Each configuration has a directory that only its user can write: the run in
# progress, the history (a JSON object per line) and mails that could not be
# sent; and another one for its lock. A step is written down before it begins,
# so that the next run can report where a killed run was.
# ==========================================================================

HISTORY_LIMIT = 8 * 2**20       # bytes; then the older half is removed
OUTBOX_LIMIT = 50               # mails


def state_home() -> str:
    """Return the directory with the state of all configurations."""
    given = os.environ.get("MISSION_STATE")
    if given:
        return os.path.abspath(given)
    if os.geteuid() == 0:
        return "/var/lib/mission"
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(
        myself().home, ".local", "state")
    return os.path.join(base, "mission")


def lock_home() -> str:
    """Return the directory with the locks of all configurations.

    No variable moves it: cron and a shell must find the same lock. It is
    empty after a boot, or in the home directory of passwd(5). An account
    whose home directory is missing (nobody's, a container's) has its locks
    with its state.
    """
    if os.geteuid() == 0:
        return "/run/mission"
    account = account_of(os.geteuid())
    if not account or not os.path.isdir(account.home):
        return state_home()
    return os.path.join(account.home, ".local", "state", "mission")


def state_name(config_path: str) -> str:
    """Return the name of a configuration's state directory: the name of its
    file and a hash of its real path."""
    import hashlib
    path = os.path.realpath(config_path)
    stem = "".join(c for c in os.path.basename(path).split(".json")[0]
                   if c.isalnum() or c in "._-")
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


RUN_IN_PROGRESS = {
    "id": "", "pid": 0, "started": 0.0, "boot": "", "headless": False,
    "partial": False, "phase": "", "task": "", "log": "", "lost": [],
    "result": "", "seconds": None}
UNKNOWN_ID = "unknown"          # of a run whose file is incomplete
FINISHED = "finished"           # the phase of a run that has ended
ROOM_FOR_RUN = 1024             # bytes of the file of the run in progress
PAST_RUN = {
    "id": "", "start": "", "started": 0.0, "headless": False,
    "partial": False, "seconds": None, "result": "", "log": "",
    "errors": 0, "warnings": 0, "last": "", "tasks": []}
TASK_OF_PAST_RUN = {"slug": "", "outcome": "", "seconds": 0.0, "attempts": 0,
                    "notice": ""}


def coerce_record(found: object, blank: dict) -> dict:
    """Return the object `found` with all keys of `blank` and no others; a
    value of another type is replaced by that of `blank`, because a crash may
    have damaged the file. {} if `found` is not such an object."""
    name = next(iter(blank))
    if not isinstance(found, dict) or not isinstance(found.get(name), str):
        return {}
    if "verdict" in found:      # the names in files of earlier versions
        result = found["verdict"]
        found["result"] = "undelivered" if result == "trouble" else result
    kinds = {float: (int, float), type(None): (int, float, type(None))}
    whole = {}
    for key, example in blank.items():
        value, kind = found.get(key), type(example)
        whole[key] = value if isinstance(value, kinds.get(kind, kind)) \
            else example
    for key, inner in (("tasks", TASK_OF_PAST_RUN), ("lost", RUN_IN_PROGRESS)):
        if key in whole:
            found = [coerce_record(value, inner) for value in whole[key]]
            whole[key] = list(filter(None, found))
    return whole


def make_private_directory(directory: str) -> None:
    """Make a directory that only its user can write. Raises Error if others
    can change it."""
    try:
        os.makedirs(os.path.dirname(directory), 0o711, exist_ok=True)
        os.makedirs(directory, 0o700, exist_ok=True)
        status = os.lstat(directory)
    except OSError as error:
        raise Error("cannot make the directory of the lock and the history: "
                    f"{error.filename}: {error.strerror}") from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 \
            or not stat.S_ISDIR(status.st_mode):
        raise Error(f"{directory} is writable by other users",
                    f"chown {myself().name} {shell_word(directory)}; "
                    f"chmod 700 {shell_word(directory)}")
    above = os.path.realpath(os.path.dirname(directory))
    found = writer_of(above, {0, os.geteuid()})
    if found:
        raise Error(f"{above} {found}, so others could replace the lock",
                    protection(f"{above} {found}"))


class StateDirectory:
    """The state directory of one configuration.

    `error` is why it could not be read or written, or ''. That does not stop
    a backup; it is reported at the end.
    """

    def __init__(self, directory: str, clock: Clock, locks: str = ""):
        """`locks`: the directory of the lock, by default this one."""
        self.directory, self.clock, self.held = directory, clock, None
        self.lock = os.path.join(locks or directory, "lock")
        self.current: dict = {}
        self.last_recorded: dict = {}
        self.current_fd, self.current_size = -1, ROOM_FOR_RUN
        self.error = ""

    def path(self, *names: str) -> str:
        """Return a path below this directory."""
        return os.path.join(self.directory, *names)

    def broken(self, error: OSError) -> None:
        """Keep why the directory could not be read or written."""
        self.error = f"{self.directory}: {error.strerror}"

    # --- the lock ---------------------------------------------------------

    def acquire(self, wait: float) -> None:
        """Lock out other runs. Raises Error if one is still running after
        `wait` seconds."""
        self.make_directory()
        deadline = self.clock.ticks() + wait
        while True:
            try:
                self.held = try_lock(self.lock)
            except OSError as error:
                raise Error(f"cannot take the lock: {self.lock}: "
                            f"{error.strerror}") from None
            if self.held is not None:
                self.name_holder()
                return
            if self.clock.ticks() >= deadline:
                raise Error(f"another run is active: {self.busy()}",
                            "mission run --wait 30m", EXIT_BUSY)
            time.sleep(0.1)

    def make_directory(self) -> None:
        """Make the directory, and that of the lock. Raises Error if others
        can change them: they could replace the lock."""
        for directory in {self.directory, os.path.dirname(self.lock)}:
            make_private_directory(directory)

    def name_holder(self) -> None:
        """Write the process that holds the lock into it. On a full disk other
        runs cannot name this process."""
        try:
            os.ftruncate(self.held, 0)
            os.pwrite(self.held, f"{os.getpid()} {self.clock.now()}\n"
                      .encode(), 0)
        except OSError:
            pass

    def holder(self) -> tuple[int, float]:
        """Return the process that holds the lock and when it began, in seconds
        since 1970; (0, 0.0) if that is not known."""
        try:
            with open(self.lock, "rb") as file:
                pid, since = file.read(100).split()
            return int(pid), float(since)
        except (OSError, ValueError):
            return 0, 0.0

    def is_locked(self) -> bool:
        """Whether a run holds the lock."""
        try:
            held = try_lock(self.lock)
        except FileNotFoundError:       # it has no directory yet
            return False
        if held is not None:
            os.close(held)
        return held is None

    def busy(self) -> str:
        """Return which process holds the lock, since when, in which task."""
        run, (pid, since) = self.read_current(), self.holder()
        where = ""
        if run.get("phase") != FINISHED and run.get("pid") \
                and pid in (0, run["pid"]):
            pid, since = run["pid"], run["started"]
            where = ", in " + place_of(run)
        if not pid:
            return "started just now"
        took = format_duration(round(self.clock.now() - since))
        return f"pid {pid}, since {format_rfc3339(since)} ({took}){where}"

    def is_first_alert(self) -> bool:
        """Whether no alert was sent yet about this holder of the lock; the
        next call returns False. Raises OSError."""
        holder = "{} {}".format(*self.holder()).encode()
        try:
            with open(self.path("alerted"), "rb") as file:
                if file.read(100) == holder:
                    return False
        except FileNotFoundError:
            pass
        write_atomically(self.path("alerted"), holder, durable=False)
        return True

    # --- the run in progress ----------------------------------------------

    def read_current(self) -> dict:
        """Return the run that is in progress, or was when it was killed; else
        {}."""
        import json
        try:
            with open(self.path("current.json"), "rb") as file:
                status, data = os.fstat(file.fileno()), file.read()
        except OSError:
            return {}
        try:
            found = coerce_record(json.loads(data), RUN_IN_PROGRESS)
        except (ValueError, RecursionError):
            found = {}
        # A file that a power cut damaged is a lost run, too.
        return found or {**RUN_IN_PROGRESS, "id": UNKNOWN_ID,
                         "started": status.st_mtime}

    def lost(self) -> list[dict]:
        """Return the runs that did not end and are not reported yet."""
        run = self.read_current()
        if not run or run["phase"] == FINISHED:
            return []
        return run["lost"] + [
            {key: value for key, value in run.items() if key != "lost"}]

    def write_current(self, run: dict) -> None:
        """Write down the run that begins now; see `update`. Where a full disk
        has no room for a new file, that of the last run is changed."""
        self.current, path = run, self.path("current.json")
        try:
            write_atomically(path, self.current_bytes())
        except OSError as error:
            self.broken(error)
        try:
            self.current_fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
            self.current_size = os.fstat(self.current_fd).st_size
        except OSError:
            return
        if self.error:
            self.update()

    def current_bytes(self) -> bytes:
        """Return the run in progress as JSON, not shorter than it was before:
        an older text must not show behind it."""
        import json
        data = json.dumps(self.current).encode().ljust(self.current_size - 1)
        self.current_size = len(data) + 1
        return data + b"\n"

    def update(self, **changes) -> None:
        """Write down where the run is now. It takes one small write in place
        and one sync, because this is done before every task."""
        self.current.update(changes)
        if self.current_fd < 0:
            return
        try:
            os.pwrite(self.current_fd, self.current_bytes(), 0)
            getattr(os, "fdatasync", os.fsync)(self.current_fd)
        except OSError as error:
            self.broken(error)

    # --- the past ---------------------------------------------------------

    def history(self) -> list[dict]:
        """Return all recorded runs, oldest first.

        Of two records of one run the later counts. A line that a crash left
        incomplete is skipped.
        """
        import json
        try:
            with open(self.path("history.jsonl"), "rb") as file:
                lines = file.read().split(b"\n")
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.broken(error)
            return []
        found = {}
        for place, line in enumerate(lines):
            try:
                record = coerce_record(json.loads(line), PAST_RUN)
            except (ValueError, RecursionError):
                continue
            if record:
                torn = record["id"] == UNKNOWN_ID
                found[place if torn else record["id"]] = record
        return list(found.values())

    def add_to_history(self, record: dict) -> None:
        """Append a run to the history, and sync it. Raises OSError."""
        import json
        fd = os.open(self.path("history.jsonl"), os.O_RDWR | os.O_CREAT
                     | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(fd).st_size
            torn = size and os.pread(fd, 1, size - 1) != b"\n"
            write_all(fd, b"\n" * bool(torn)
                      + json.dumps(record).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        self.last_recorded = record
        if size > HISTORY_LIMIT:
            records = self.history()
            write_atomically(self.path("history.jsonl"), b"".join(
                json.dumps(old).encode() + b"\n"
                for old in records[len(records) // 2:]))

    def finish(self, record: dict) -> None:
        """End the run in progress, and add `record` to the history, if it is
        not its last entry.

        On a full disk the history cannot grow. But the file of the run is
        changed in place, so the next run sees that this one has ended, and
        records it. Raises OSError.
        """
        self.update(phase=FINISHED, result=record["result"],
                    seconds=record.get("seconds"))
        if record != self.last_recorded:
            self.add_to_history(record)
        if self.current_fd >= 0:        # the file stays: see write_current
            os.close(self.current_fd)

    def expected(self) -> dict[str, float]:
        """slug -> the median of its last ten good durations, in seconds."""
        from statistics import median_high
        return {slug: median_high(found[-10:]) for slug, found
                in good_durations(self.history()).items()}

    # --- mails that wait --------------------------------------------------

    def queue_mail(self, name: str, message: bytes) -> None:
        """Keep a mail for the next run; the oldest go beyond OUTBOX_LIMIT.
        Raises OSError."""
        os.makedirs(self.path("outbox"), 0o700, exist_ok=True)
        write_atomically(self.path("outbox", name + ".eml"), message)
        for old in self.queued_mails()[:-OUTBOX_LIMIT]:
            os.unlink(old)

    def queued_mails(self) -> list[str]:
        """Return the paths of the mails that wait, the oldest first."""
        try:
            names = os.listdir(self.path("outbox"))
        except FileNotFoundError:
            return []
        paths = [self.path("outbox", name) for name in names
                 if name.endswith(".eml")]
        return sorted(paths, key=lambda path: (os.stat(path).st_mtime, path))


def place_of(run: dict) -> str:
    """Return where a run is, or was when it was killed, in words."""
    return f'task "{run["task"]}"' if run["task"] \
        else run["phase"] or "its beginning"


def good_durations(records: list[dict]) -> dict[str, list]:
    """slug -> how long its successful runs took, in seconds, oldest first."""
    found: dict[str, list] = {}
    for record in records:
        for task in record["tasks"]:
            if task["outcome"] == "ok":
                found.setdefault(task["slug"], []).append(task["seconds"])
    return found


def past_run(run: dict, result: str, **more) -> dict:
    """Return the record of a run for the history; of its values only those of
    `more` are known if it did not end."""
    same = {key: run[key] for key in PAST_RUN.keys() & run.keys()}
    return {**PAST_RUN, **same, "start": format_rfc3339(run["started"]),
            "seconds": None, "result": result,
            "last": run["task"] or run["phase"], **more}


def unrecorded_end(run: dict, known: dict[str, dict]) -> list[dict]:
    """Return the record of a run in its file, if it has ended and the history
    does not have that: it could not grow, perhaps only after an earlier
    record of the run. `known`: run id -> the record in the history."""
    if run.get("phase") != FINISHED:
        return []
    before = known.get(run["id"]) or past_run(run, "")
    ended = {**before, "result": run["result"], "seconds": run["seconds"]}
    return [] if ended == before else [ended]


def state_of(config_path: str, clock: Clock) -> StateDirectory:
    """Return the state directory of the configuration at `config_path`."""
    name = state_name(config_path)
    return StateDirectory(os.path.join(state_home(), name), clock,
                          os.path.join(lock_home(), name))


# ==========================================================================
# RunLog: where do the lines of a run go?               (files, terminal; C)
#
# With --headless to a file of its own in the storage `logs`, else to the
# terminal. A log that cannot be written does not end the run.
# ==========================================================================

LOG_SECONDS = 20.0              # for one write to the log
RETRY_LOG = 5.0                 # seconds between tries on a full disk
SPILL_LIMIT = 2**20             # of a lost log that goes to stderr
LOG_NAME = "%Y-%m-%d-%H-%M-%S"


# The name of a run log: 2026-03-29-02-00-00.txt, or with -2 to -999 before
# .txt for a second one of that time.
LOG_FILE = r"(?a)\d{4}(-\d\d){5}(-\d{1,3})?\.txt"


def paint(choice, code: str, text: str) -> str:
    """Return the text in a colour (a code of ECMA-48 SGR), if `choice.colour`.
    """
    return f"\x1b[{code}m{text}\x1b[0m" if choice.colour else text


class LogWriter:
    """Writes the file of a run log in a child process: mission must not hang
    when the file system does.

    Each method waits for the answer of the child. It raises OSError: that of
    the child's call, or ETIMEDOUT after LOG_SECONDS; from then on each call
    fails at once. The child ends when mission does.
    """

    def __init__(self):
        import socket
        self.socket, other = socket.socketpair()
        self.failure: OSError | None = None
        pid = os.fork()
        if not pid:
            self.serve(other.fileno())
        other.close()
        self.socket.settimeout(LOG_SECONDS)
        self.answers = self.socket.makefile("rb")

    def ask(self, *request, data: bytes = b""):
        """Call a method in the child: its name and its arguments, which are
        JSON values; return its result. `data` is for `write`."""
        import json
        if self.failure:
            raise self.failure
        try:
            self.socket.sendall(json.dumps(request).encode() + b"\n" + data)
            answer = self.answers.readline()
            if not answer:
                raise OSError(errno.EPIPE, "the process that writes it ended")
        except OSError as error:
            self.failure = OSError(error.errno or errno.ETIMEDOUT,
                                   error.strerror or NO_ANSWER)
            raise self.failure from None
        failure, result = json.loads(answer)
        if failure:
            raise OSError(failure, result)
        return result

    def serve(self, fd: int) -> None:
        """What the child does; does not return."""
        import json
        try:
            leave_parent(fd)
            with os.fdopen(3, "rb") as self.requests:
                for line in self.requests:
                    name, *arguments = json.loads(line)
                    try:
                        answer = [0, getattr(self, name)(*arguments)]
                    except OSError as error:
                        answer = [error.errno, error.strerror]
                    write_all(3, json.dumps(answer).encode() + b"\n")
        finally:
            os._exit(0)

    # --- in the child -----------------------------------------------------

    def create(self, directory: str, name: str) -> str:
        """Make a new file, `name` or with a number before .txt; return its
        name. It is made by descriptor, and no link is followed."""
        self.directory = open_directory(directory)
        for copy in range(1, 1000):
            found = f"{name}{f'-{copy}' if copy > 1 else ''}.txt"
            try:
                self.fd = os.open(found, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                                  | os.O_NOFOLLOW | os.O_APPEND, 0o600,
                                  dir_fd=self.directory)
                return found
            except FileExistsError:
                continue
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

    def write(self, size: int) -> None:
        """Write the next `size` bytes after the request to the file."""
        write_all(self.fd, self.requests.read(size))

    def sync(self) -> None:
        """Sync the file. Raises OSError."""
        os.fsync(self.fd)

    def prune(self, current: str, keep: int) -> None:
        """Remove all run logs but `current` and the newest `keep` - 1.

        The time of the last change counts: the names have the time of a
        clock that may have been wrong.
        """
        import re
        ages = {}
        for name in os.listdir(self.directory):
            if re.fullmatch(LOG_FILE, name) and name != current:
                status = os.stat(name, dir_fd=self.directory,
                                 follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    ages[name] = (status.st_mtime, name)
        others = sorted(ages, key=ages.get)
        for name in others[:max(len(others) - keep + 1, 0)]:
            os.unlink(name, dir_fd=self.directory)


class RunLog:
    """The log of one run: a file, or standard output.

    If it cannot be written (a full disk, a closed pipe), the lines go to
    stderr, up to a limit, and the run continues. `error` is why, or ''.
    """

    def __init__(self, clock: Clock, colour: bool):
        self.clock, self.colour = clock, colour
        self.started = clock.ticks()
        self.path, self.fd = "", 1      # standard output, until `open`
        self.file: LogWriter | None = None
        self.error, self.retry_at = "", 0.0
        self.lost = self.spilled = 0
        self.synced = 0.0
        self.shows_status = False
        self.is_closed = False          # the pipe or terminal was closed
        self.terminal = os.isatty(1)

    def open(self, directory: str, started: float) -> None:
        """Log to a new file in `directory`, named by the time `started`."""
        self.terminal, name = False, time.strftime(
            LOG_NAME, time.localtime(started))
        self.fd = -1
        try:
            self.file = LogWriter()
            self.path = os.path.join(directory, self.file.ask(
                "create", directory, name))
        except OSError as error:
            self.file = None
            self.break_down(f"{directory}: {error.strerror}")

    def elapsed(self) -> float:
        """Seconds since the log was begun."""
        return self.clock.ticks() - self.started

    def break_down(self, reason: str) -> None:
        """Use stderr from now on; the log is tried again after RETRY_LOG."""
        if not self.error:
            sys.stderr.write(f"{PROG}: warning: cannot write the log, so it "
                             f"continues here: {reason}\n")
        self.error = reason
        self.retry_at = self.clock.ticks() + RETRY_LOG

    def write(self, text: str) -> None:
        """Write text to the log, or to stderr while it cannot be written."""
        if self.is_closed:
            return None
        data = text.encode("utf-8", "backslashreplace")
        if self.shows_status:
            self.status("")
        if self.error and (not self.file
                           or self.clock.ticks() < self.retry_at):
            return self.spill(data)
        if self.lost:
            data = (f"\n<<{self.lost:,} bytes of the log could not be "
                    f"written: {self.error}>>\n\n").encode() + data
        try:
            if self.file:
                self.file.ask("write", len(data), data=data)
            else:
                write_all(self.fd, data)
            self.lost = 0
        except OSError as error:
            if self.fd == 1 and error.errno in (errno.EPIPE, errno.EIO):
                self.is_closed = True
                return None
            self.break_down(error.strerror)
            self.spill(data)
        return None

    def spill(self, data: bytes) -> None:
        """Write data to stderr, up to SPILL_LIMIT bytes in all."""
        self.lost += len(data)
        room = SPILL_LIMIT - self.spilled
        self.spilled += len(data)
        if 0 < room < len(data):
            data = data[:room] + b"\n<<the rest of the log is lost>>\n"
        try:
            if room > 0:
                write_all(2, data)
        except OSError:
            pass            # no place is left for a message

    def status(self, text: str) -> None:
        """Show a status line on a terminal; "" removes it."""
        if not self.terminal:
            return
        try:
            width = os.get_terminal_size(1).columns - 1
            write_all(1, b"\r\x1b[K" + text[:width].encode())
        except OSError:
            pass
        self.shows_status = bool(text)

    def sync(self, soon: bool = False) -> None:
        """Sync the log to disk; with `soon` at most once a second."""
        now = self.clock.ticks()
        if self.path and not self.error and not (
                soon and now - self.synced < 1.0):
            self.synced = now
            try:
                self.file.ask("sync")
            except OSError as error:
                self.break_down(error.strerror)

    def prune(self, keep: int) -> None:
        """Remove all run logs but the newest `keep` and this one. Raises
        OSError."""
        self.file.ask("prune", os.path.basename(self.path), keep)


# ==========================================================================
# Run: how are the steps of a run carried out?                  (machine; C)
#
# Runner has a method for each kind of step. No step stops the next one: what
# goes wrong becomes a RunProblem, even a bug of mission, so that the summary
# and the mail still go out.
# ==========================================================================

LEFT_NAMED = 20         # entries without a chown that the log names
SILENT_SECONDS = 120.0  # without a sign of life a chown or commit is given up


def local_time(at: float) -> str:
    """Local time as the original writes it: 2026-03-29 03:00:00."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def chown_storage(send, path: str, uid: int, gid: int, kept: set) -> list:
    """Chown a tree in a child of `supervise`, see `chown_tree`.

    Return whether everything in .git has that owner now, lines for the log,
    and a warning or "". A signal ends the walk after the entry that it is at.
    Raises OSError.
    """
    import signal
    signals, sent = [], [time.monotonic()]
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, _frame: signals.append(number))

    def is_stopped() -> bool:
        now = time.monotonic()
        if now - sent[0] >= 1.0:
            sent[0] = now
            send(None)              # a sign of life
        return bool(signals)

    done = chown_tree(path, uid, gid, is_stopped, kept)
    theirs = [name for name, why in done.left if why == KEPT]
    left = [entry for entry in done.left if entry[1] != KEPT]
    serious = [name for name, why in left if why != ELSEWHERE]
    inside = escape_controls(os.path.join(path, ".git")) + "/"
    lines = [f"{path}: {plural(done.changed, 'file')}"]
    if theirs:
        lines.append(f"left to the users of tasks: {len(theirs):,}, the "
                     f"first of them {theirs[0]}")
    lines += [f"left alone: {name}: {why}" for name, why in left[:LEFT_NAMED]]
    return [not any((name + "/").startswith(inside) for name, _ in done.left),
            lines, f"{path}: left alone: {len(serious):,}, the first of them "
            f"{serious[0]}" if serious else ""]


def repository_of(send, path: str, since: float) -> Repository:
    """Return the repository at `path`, for a child of `supervise`. What git
    and mission report there is sent as [kind, text]. Raises Error."""
    processes = Processes(Clock())
    processes.listen()

    def report(kind: str, text) -> None:
        send([kind, text if kind else text.decode("latin-1")])

    return Repository(processes, path, report, since)


def commit_storage(send, path: str, since: float, message: str,
                   is_checked: bool) -> list[str]:
    """Commit a directory in a child of `supervise`; return the warnings.
    Raises Error and OSError."""
    return repository_of(send, path, since).commit(message, is_checked)


def pack_storage(send, path: str, since: float) -> bool:
    """Pack a repository in a child of `supervise`; whether it had grown.
    Raises Error and OSError."""
    repository = repository_of(send, path, since)
    repository.locate()
    return bool(repository.pack())


def storage_error(storage: Storage, commit: bool = False) -> str:
    """Return why the directory of a storage cannot be used now; or ''. With
    `commit` it must be a repository."""
    found = ask(storage_facts, storage.path, storage.chown, None) \
        or SILENT_STORAGE
    error = found["error"]
    if not error and storage.mounted and not found["mounted"]:
        error = "is not mounted"
    if not error and commit and not found["repository"]:
        error = (f"is not a git repository, which storage.{storage.name}."
                 "commit needs (as its owner: git init "
                 f"{shell_word(storage.path)})")
    return f"{storage.path} {error}" if error else ""


def condition_errors(task: Task, config: Config):
    """Yield why a task cannot start now: a storage that it needs cannot be
    used, or has too little space."""
    names = [storage.name for storage in needed_storages(task, config)]
    for name in dict.fromkeys([*names, *task.min_free]):
        error = storage_error(config.storage[name])
        wanted = task.min_free.get(name, 0)
        free = ask(free_bytes, config.directory(name)) \
            if wanted and not error else wanted
        if error:
            yield f"storage {name}: {error}"
        elif free is None:
            yield f"storage {name} {NO_ANSWER}"
        elif free < wanted:
            yield (f"storage {name} has only {format_size(free >> 20 << 20)} "
                   f"free, less than minFree ({format_size(wanted)})")


def account_for(task: Task) -> Account | None:
    """Return the account that a task runs as; None if there is no such user.
    """
    return account_of(task.user) if task.user else myself()


class Runner:
    """Carries out the steps of one run."""

    def __init__(self, config: Config, processes: Processes,
                 delivery: Delivery, state: StateDirectory,
                 log: RunLog, headless: bool, errors: dict,
                 partial: bool = False):
        """`errors`: scope -> what is wrong, see LoadedConfig. `partial`: the
        tasks were named with -t."""
        import uuid
        self.partial = partial
        self.config, self.state, self.delivery = config, state, delivery
        self.processes = processes
        self.log, self.headless, self.errors = log, headless, errors
        filters = () if "filters" in errors else config.filters
        self.log_filter = LogFilter(config.redact, filters, processes.limit)
        self.mail_log = MailLog(self.log_filter)
        self.problems: list[RunProblem] = []
        self.results: dict[str, TaskResult] = {}
        self.run_id = str(uuid.uuid4())
        self.started = processes.clock.now()
        self.took = 0.0
        self.lost: list[dict] = []
        self.alive: dict[str, str] = {}     # slug -> process of a lost run
        self.skipped: set[str] = set()      # by skipStatuses: no warning
        self.owned: set[str] = set()    # storages whose .git chown has seen,
                                        # and found or made the user's
        self.committed: dict[str, float] = {}       # storage -> since when
        self.titles: set[str] = set()       # headers that were logged
        self.side_by_side: set[str] = set()     # tasks that run together
        self.expected: dict[str, float] = {}
        self.now_running, self.total, self.shown_at = "", 0, 0.0

    # --- the log ----------------------------------------------------------

    def log_own(self, text: str, colour: str = "") -> None:
        """Log a text of mission itself, which may have several lines."""
        text = self.log_filter.redacted(text)
        self.log.write(paint(self.log, colour, text) if colour else text)
        self.mail_log.own(text)

    def log_line(self, text: str, colour: str = "") -> None:
        """Log a line of mission itself, with the time since the start."""
        self.log_own(elapsed_column(self.log.elapsed()) + escape_controls(text)
                     + "\n",
                     colour)

    def log_header(self, text: str) -> None:
        """Log the header of a part, after an empty line."""
        before = "\n" if self.mail_log.excerpt.tail else ""
        self.log_own(before + header(text), "1")

    def output(self, text: str, whole: str | None, mark: str = "",
               child: Child | None = None) -> None:
        """Log lines of a task or of git; see OutputDecoder for `whole`.

        `mark` is the slug if tasks run side by side. Of a task's output
        beyond logs.max only head and tail are kept.
        """
        prefix = elapsed_column(self.log.elapsed()) + mark
        text = self.log_filter.redacted(text)
        lines = prefixed(text, prefix)
        if child and child.written > self.config.logs.max:
            child.over = child.over or Excerpt(2 * CHUNK)
            child.over.add(lines)
        else:
            self.log.write(lines)
        if whole is None:
            self.mail_log.output(text, prefix)
        elif whole:
            self.mail_log.output(self.log_filter.redacted(whole), prefix)

    def problem(self, result: str, level: str, source: str,
                text: str) -> None:
        """Record and log an error or a warning; see RunProblem."""
        text = self.log_filter.redacted(escape_controls(text))
        self.problems.append(RunProblem(result, level, source, text))
        word, colour = ("ERROR", "31") if level == "error" else ("WARN", "33")
        self.log_line(f"{word}: {self.mark_of(source)}{text}", colour)

    def mark_of(self, slug: str) -> str:
        """Return what a line about a task begins with, if tasks run side by
        side."""
        return f"{slug}: " if slug in self.side_by_side else ""

    # --- the run ----------------------------------------------------------

    def carry_out(self, steps: list[Step]) -> int:
        """Carry out all steps; return the exit status."""
        self.begin(steps)
        for step in [step for step in steps if step.kind != "pack"]:
            try:
                if step.kind in STOPPED_BY_SIGNAL and (
                        self.processes.stopped or self.is_late()):
                    self.skip(step)
                else:
                    self.state.update(phase=step.kind, task=", ".join(
                        task.slug for task in step.tasks))
                    method = getattr(self, step.kind)
                    method(step) if step.tasks or step.storage else method()
            except Exception as error:      # a bug of mission
                import traceback
                for line in traceback.format_exc().splitlines():
                    self.log_line(line)
                self.problem("tasks", "error", step.kind,
                             "internal error (please report): "
                             f"{type(error).__name__}: {reason_of(error)}")
        status = self.end()
        # This can take long, and no result depends on it.
        for step in steps:
            if step.kind == "pack" and not self.processes.stopped:
                self.pack(step)
        return status

    def begin(self, steps: list[Step]) -> None:
        """Record this run, and the runs that were lost before it."""
        if self.headless:
            self.delivery.load_modules()
        self.lost = self.state.lost()
        users = {task.slug: getattr(account_for(task), "uid", -1)
                 for task in self.config.tasks}
        for run in self.lost:
            self.alive.update(processes_of_run(run["id"], users))
        self.record_earlier_runs()
        self.state.write_current({
            "id": self.run_id, "pid": os.getpid(), "started": self.started,
            "boot": boot_id(), "headless": self.headless,
            "partial": self.partial, "log": self.log.path,
            "phase": "start", "task": "", "lost": self.lost})
        self.total = sum(len(step.tasks) for step in steps)
        if self.log.terminal:
            self.expected = self.state.expected()
            self.processes.on_tick = self.show_status

    def record_earlier_runs(self) -> None:
        """Record lost runs, and one that ended when the disk was full."""
        known = {record["id"]: record for record in self.state.history()}
        records = [past_run(run, "lost") for run in self.lost
                   if known.get(run["id"], {}).get("result") != "lost"]
        records += unrecorded_end(self.state.read_current(), known)
        try:
            for record in records:
                self.state.add_to_history(record)
        except OSError as error:
            self.state.error = reason_of(error)

    def record(self) -> dict:
        """Return the record of this run for the history."""
        levels = [problem.level for problem in self.problems]
        return past_run(
            self.state.current,
            result_of(self.problems, self.processes.stopped),
            seconds=round(self.took, 3),
            errors=levels.count("error"), warnings=levels.count("warning"),
            tasks=[{**vars(task), "seconds": round(task.seconds, 3)}
                   for task in self.results.values()])

    def keep_records(self) -> None:
        """Write metrics and history and remove old logs.

        Mail and ping come after it, so that they report what fails here.
        """
        self.note_broken_files()
        for source, action in (("metrics", self.write_metrics),
                               ("logs", self.prune_logs),
                               ("history", self.state.add_to_history)):
            try:
                action(self.record())
            except (Error, OSError) as error:
                self.problem("delivery", "error", source, reason_of(error))

    def note_broken_files(self) -> None:
        """Count a log or a state directory that cannot be written."""
        self.log.sync()
        known = {problem.source for problem in self.problems}
        for source, text in (
                ("log", self.log.error and f"{self.log.lost:,} bytes could "
                 f"not be written: {self.log.error}"),
                ("history", self.state.error)):
            if text and source not in known:
                self.problems.append(RunProblem("delivery", "error", source,
                                                text))

    def end(self) -> int:
        """Close the records of the run; return its exit status."""
        self.log.status("")
        self.note_broken_files()
        try:
            self.state.finish(self.record())
        except OSError as error:
            self.state.broken(error)
            self.note_broken_files()
        return exit_status(self.problems, self.processes.stopped)

    def write_metrics(self, record: dict) -> None:
        """Write the metrics of a scheduled run; a partial run or one by hand
        does not touch them. Raises Error."""
        def is_scheduled(run: dict) -> bool:
            return bool(run["headless"] and not run["partial"])

        if self.config.metrics.textfile and is_scheduled(record):
            good = [run["started"] for run in self.state.history() + [record]
                    if is_scheduled(run) and run["result"] in GOOD_RESULTS]
            tasks = [task for task in record["tasks"]
                     if task["slug"] not in self.skipped]
            self.delivery.write_metrics({**record, "tasks": tasks},
                                        good[-1] if good else 0)

    def prune_logs(self, _record: dict) -> None:
        """Remove old run logs, if logs.keep is set. Raises OSError."""
        if self.config.logs.keep and self.log.path:
            self.log.prune(self.config.logs.keep)

    def start(self) -> None:
        """Log the start, and warn about runs that did not finish."""
        self.log_header("Start")
        self.log_line("StartTime " + local_time(self.started))
        for scope in ("filters", "passBin") + ("caFile",) * self.headless:
            self.undelivered(scope, self.errors.get(scope))
        for run in self.lost:
            why = "the host was restarted" if run["boot"] != boot_id() \
                else "mission was killed"
            self.problem("tasks", "warning", "previousRun", f"run "
                         f"{run['id'][:8]} of "
                         f"{format_rfc3339(run['started'])} did "
                         f"not finish: {why} in {place_of(run)}")
            if self.headless and self.config.ping.enabled \
                    and self.config.ping.wants("fail"):
                self.ping("fail", run["id"])

    def time_left(self) -> float:
        """Return the seconds until runTimeout; NO_LIMIT without one."""
        return max((self.config.run_timeout or NO_LIMIT)
                   - self.log.elapsed(), 0.0)

    def is_late(self) -> bool:
        """Whether runTimeout has passed; the first time it is an error."""
        if self.time_left() != 0:
            return False
        if "runTimeout" not in {each.source for each in self.problems}:
            limit = format_duration(self.config.run_timeout)
            self.problem("tasks", "error", "runTimeout",
                         f"time limit of {limit} for the run reached")
        return True

    def skip(self, step: Step) -> None:
        """Log the tasks of a step that is skipped after a signal, or after
        runTimeout."""
        for task in step.tasks:
            self.results[task.slug] = TaskResult(task.slug, "skipped")
            self.log_line(f"SKIPPED {task.slug} (the run was stopped)")
        self.ping_tasks(step)

    # --- tasks ------------------------------------------------------------

    def tasks(self, step: Step) -> None:
        """Run the tasks of a step side by side, with their retries."""
        names = ", ".join(task.name for task in step.tasks)
        self.log_header(("Task: " if len(step.tasks) == 1 else "Tasks: ")
                        + names)
        self.side_by_side = {task.slug for task in step.tasks} \
            if len(step.tasks) > 1 else set()
        ready = [task for task in step.tasks if self.may_start(task)]
        attempt = 1
        while ready:
            failed = self.attempt(ready, attempt)
            ready = [task for task in failed
                     if self.may_retry(task, attempt)]
            if ready:
                self.processes.pause(min(
                    max(task.retry_delay for task in ready),
                    self.time_left()))
            if self.processes.stopped or self.is_late():
                break
            attempt += 1
        self.ping_tasks(step)
        self.log.sync(soon=True)

    def may_retry(self, task: Task, attempt: int) -> bool:
        """Whether a task is run again after a failed attempt."""
        return attempt <= task.retries and not self.processes.stopped \
            and self.time_left() != 0

    def attempt(self, tasks: list[Task], count: int) -> list:
        """Run tasks side by side, for the `count`-th time; return those that
        failed."""
        children, failed = [], []
        for task in tasks:
            try:
                child = self.launch(task, self.mark_of(task.slug))
            except Exception as error:      # the other tasks must run
                self.close_attempt(
                    task, f"cannot start: {reason_of(error)}", 0.0, count)
                failed.append(task)
            else:
                child.task = task
                children.append(child)
        self.now_running = ", ".join(task.slug for task in tasks)
        self.processes.attend(children, self.on_output)
        for child in children:
            if not self.ended(child, count):
                failed.append(child.task)
        return failed

    def show_status(self) -> None:
        """Show the running task on the terminal, five times a second."""
        now = self.processes.clock.ticks()
        if now - self.shown_at < 0.2 and self.log.shows_status:
            return
        slug, self.shown_at = self.now_running, now
        usual = self.expected.get(slug)
        self.log.status(
            f"task {min(len(self.results) + 1, self.total)} of {self.total}: "
            f"{slug}, {format_duration(int(self.log.elapsed()))}"
            + (f", usually {run_took(usual)}" if usual else ""))

    def may_start(self, task: Task) -> bool:
        """Whether a task can start; if not, record its result and why."""
        needed = blocked_by(task, {slug: result.outcome for slug, result
                                   in self.results.items()})
        if needed:
            before = self.results.get(needed)
            word = "has no result" if before is None else \
                "failed" if before.outcome == "failed" else "was skipped"
            self.results[task.slug] = TaskResult(task.slug, "skipped")
            text = f"skipped, because {needed} {word}"
            if needed in self.skipped:
                self.skipped.add(task.slug)
                self.log_line(self.mark_of(task.slug) + text)
            else:
                self.problem("tasks", "warning", task.slug, text)
            return False
        try:
            errors = self.start_errors(task)
        except Exception as error:      # the other tasks must run
            errors = [reason_of(error)]
        for error in errors:
            self.problem("tasks", "error", task.slug, error)
        if errors:
            self.results[task.slug] = TaskResult(task.slug, "failed")
        return not errors

    def start_errors(self, task: Task) -> list[str]:
        """Return the reasons why a task cannot start. Raises OSError."""
        errors = list(self.errors.get(f"task {task.slug}", ()))
        if task.slug in self.alive:
            errors.append("still running from a run that was lost: process "
                          + self.alive[task.slug])
        if task.user and os.geteuid() and task.user != myself().name:
            errors.append(f"cannot run as {task.user}, because mission does "
                          "not run as root")
        program = program_of(task, self.config)
        place = program or self.config.directory("tasks")
        answer = ask(access_error, place, program and task.user,
                     MODES[task.type])
        if answer is None:
            errors = [f"{place} {NO_ANSWER}"]
        elif answer and not errors:
            errors = ["{} ({})".format(*answer)]
        return errors + list(condition_errors(task, self.config))

    def launch(self, task: Task, mark: str) -> Child:
        """Start a task. Raises OSError, and Error for an unknown user."""
        account = account_for(task)
        if account is None:
            raise Error(f"user {quoted(task.user)} does not exist")
        env = environment(
            account, TARGET_USER=self.config.user.name,
            PASS_BIN=self.config.pass_bin, MISSION_RUN_ID=self.run_id,
            MISSION_TASK=task.slug,
            **{s.variable: s.path for s in self.config.storage.values()})
        env.update(task.env)
        become = account if task.user else None
        if task.type == "builtin":
            child = self.launch_builtin(task, env, become)
        else:
            child = self.processes.start(
                [task.entrypoint], env, os.path.dirname(task.entrypoint),
                become, self.limit_of(task), nice=task.nice)
        child.decoder = OutputDecoder(self.log_filter, lambda text,
                                     whole: self.output(
            text, whole, mark, child))
        return child

    def limit_of(self, task: Task) -> float:
        """Return the seconds that the task may take now."""
        return min(task.timeout or NO_LIMIT, self.time_left())

    def launch_builtin(self, task: Task, env: dict, become) -> Child:
        """Start mission again, as the process of a built-in task.

        It sends the secrets that it fetches through a pipe. Raises OSError.
        """
        import json
        directory = os.path.join(self.config.directory("tasks"), task.slug)
        for name in ("SPOTIFY_API_URL", "SPOTIFY_ACCOUNTS_URL"):
            if name in os.environ:
                env.setdefault(name, os.environ[name])
        given = json.dumps({
            "path": os.path.join(directory, "task.py"),
            "pass_bin": self.config.pass_bin,
            "target_user": self.config.user.name,
            "storage": {s.name: s.path for s in
                        self.config.storage.values()}})
        secrets, secrets_end = os.pipe()
        try:
            child = self.processes.start(
                [sys.executable, "-Iu", os.path.abspath(__file__), "_builtin",
                 task.slug, given, str(secrets_end)], env,
                directory if os.path.isdir(directory) else "/", become,
                self.limit_of(task), pass_fds=(secrets_end,), nice=task.nice)
        finally:
            os.close(secrets_end)
        os.set_blocking(secrets, False)
        child.secrets = secrets
        return child

    def on_output(self, child: Child, chunk: bytes | None) -> None:
        """Take output of a task, b"" after a second of silence, None at the
        end.

        An exception here is noted: the tasks must not be left alone.
        """
        try:
            if child.secrets is not None:
                self.learn_secrets(child.secrets)
            if chunk:
                child.written += len(chunk)
                child.decoder.take(chunk)
            elif chunk is None:
                child.decoder.end()
            else:
                child.decoder.silence()
        except Exception as error:
            child.output_error = child.output_error or reason_of(error)

    def learn_secrets(self, fd: int) -> None:
        """Redact the secrets that a built-in task fetched. It sends each
        before it can print it, so it is here before the output."""
        import json
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        for line in data.decode("utf-8", "replace").split("\n"):
            # As it is, and as tracebacks and JSON would show it.
            for value in (line, escape_controls(line), repr(line)[1:-1],
                          json.dumps(line)[1:-1]):
                if value and value not in self.log_filter.values:
                    self.log_filter.values.append(value)
        self.log_filter.values.sort(key=len, reverse=True)

    def ended(self, child: Child, attempt: int) -> bool:
        """Record the end of one attempt; whether it succeeded."""
        self.on_output(child, None)
        if child.over:
            self.log.write(child.over.text())
            self.log_line(
                f"<<output beyond {format_size(self.config.logs.max)} "
                "(logs.max): only its head and tail are above>>")
        if child.secrets is not None:
            os.close(child.secrets)
        if child.leftovers:
            self.problem("tasks", "warning", child.task.slug,
                         "processes left behind held the output open: "
                         + ", ".join(child.leftovers))
        meaning = "" if child.why else status_meaning(child.task, child.code)
        error = child.why or ("" if meaning else status_text(child.code))
        if child.output_error and not error:
            error = f"some output was lost: {child.output_error}"
        return self.close_attempt(child.task, error, child.seconds(), attempt,
                                  child.code, meaning)

    def close_attempt(self, task: Task, error: str, seconds: float,
                      attempt: int, code: int | None = None,
                      meaning: str = "") -> bool:
        """Log the end of an attempt and store its result; whether it did not
        fail. `code` is None if the task could not be started, `meaning` is
        that of status_meaning."""
        words = "not started" if code is None else (
            f"exit {code}" if code >= 0 else status_text(code))
        before = self.results.get(task.slug)
        total = seconds + (before.seconds if before else 0)
        outcome = "failed" if error else \
            "skipped" if meaning == "skip" else "ok"
        self.results[task.slug] = TaskResult(
            task.slug, outcome, total, attempt, status_text(code)
            if meaning == "warn" and not error else "")
        if outcome == "skipped":
            self.skipped.add(task.slug)
        self.log_line(f"TaskFinish {task.slug}: {words} in "
                      f"{format_duration(seconds)}")
        if error and self.may_retry(task, attempt):
            self.log_line(f"{self.mark_of(task.slug)}attempt {attempt} of "
                          f"{task.retries + 1} failed: {error}; next attempt "
                          f"in {format_duration(task.retry_delay)}")
        elif error:
            self.problem("tasks", "error", task.slug, error)
        return not error

    # --- housekeeping -----------------------------------------------------

    def chown(self, step: Step) -> None:
        """Give the files of a storage to user.name."""
        self.once_title("Chown")
        if self.refuse_storage(step.storage, "chownFiles"):
            return
        account = account_of(self.config.user.name)
        path = step.storage.path
        try:
            owns_git, lines, warning = self.processes.supervise(
                SILENT_SECONDS, chown_storage, path, account.uid, account.gid,
                self.uids_of_tasks() - {0, account.uid})
        except Error as error:
            owns_git, lines, warning = False, [], f"{path}: {error}"
        if owns_git:
            self.owned.add(step.storage.name)
        for line in lines:
            self.log_line(line)
        if warning:
            self.problem("housekeeping", "warning", "chownFiles", warning)

    def uids_of_tasks(self) -> set[int]:
        """Return the user ids that tasks run as by their key `user`."""
        accounts = [account_of(task.user) for task in self.config.tasks
                    if task.user]
        return {account.uid for account in accounts if account}

    def refuse_storage(self, storage: Storage, source: str) -> bool:
        """Whether the housekeeping of a storage is an error, which is
        recorded: the storage is missing, or root must not work there."""
        error = storage_error(storage, source == "commitRepositories")
        errors = [error] if error else \
            self.errors.get(f"chown {storage.name}", []) \
            if source == "chownFiles" else []
        for error in errors:
            self.problem("housekeeping", "error", source, error)
        return bool(errors)

    def once_title(self, text: str) -> None:
        """Log the header of a part that several steps share, once."""
        if text not in self.titles:
            self.titles.add(text)
            self.log_header(text)

    def commit(self, step: Step) -> None:
        """Commit a storage with git."""
        self.once_title("Commit")
        if self.refuse_storage(step.storage, "commitRepositories"):
            return
        path = step.storage.path
        self.log_line(f"RepoDir {path}")
        decoder = OutputDecoder(self.log_filter, self.output)

        def on_message(message: list) -> None:
            kind, text = message
            if kind:
                decoder.end()
                self.log_line(f"{kind} {text}".rstrip())
            else:
                decoder.take(text.encode("latin-1"))

        now = self.processes.clock.now()
        since = min([now, *(run["started"] for run in self.lost)])
        message = (f"{'auto' if self.headless else 'manual'} run complete "
                   f"on {local_time(now)}")
        try:
            warnings = self.processes.supervise(
                GIT_SECONDS + SILENT_SECONDS, commit_storage, path, since,
                message, step.storage.name in self.owned,
                on_message=on_message, is_patient=True)
            found = [("warning", warning) for warning in warnings]
            self.committed[step.storage.name] = since
        except Error as error:
            hint = error.hint and f" ({error.hint})"
            found = [("error", f"{path}: {error.message}{hint}")]
        decoder.end()
        for level, text in found:
            self.problem("housekeeping", level, "commitRepositories", text)

    def pack(self, step: Step) -> None:
        """Let git pack a repository that was committed, if it has grown. A
        failure is a line in the log: the backup is complete."""
        since = self.committed.get(step.storage.name)
        if since is None:
            return
        began, path = self.processes.clock.ticks(), step.storage.path
        try:
            has_grown = self.processes.supervise(
                PACK_SECONDS + SILENT_SECONDS, pack_storage, path, since,
                is_patient=True)
            took = self.processes.clock.ticks() - began
            line = f"Packed {path} in {format_duration(took)}"
        except Error as error:
            has_grown, line = True, f"PackFailure {path}: {error.message}"
        if has_grown:
            self.once_title("Pack")
            self.log_line(line)
        self.log.sync()

    # --- the end, and delivery --------------------------------------------

    def finish(self) -> None:
        """Log the end; the steps after it report the run."""
        self.took = self.log.elapsed()
        self.log_header("Finish")
        self.log_line("FinishTime " + local_time(self.processes.clock.now()))

    def failed(self) -> bool:
        """Whether the run failed so far; a failed delivery does not count."""
        return bool(self.processes.stopped or backup_problems(self.problems))

    def notices(self) -> dict[str, str]:
        """slug -> the notice of each task that has one."""
        return {slug: result.notice for slug, result in self.results.items()
                if result.notice}

    def mark(self) -> str:
        """Return the word in the subject of the mail: FAILURE, WARNING or "".
        """
        return "FAILURE" if self.failed() else \
            "WARNING" if self.notices() or self.problems else ""

    def notify_start(self) -> None:
        """Notify the user of the start."""
        self.notify("NotifyStart", "run started", False)

    def notify_finish(self) -> None:
        """Notify the user of the end and the result."""
        how = " with errors or warnings" if self.failed() else ""
        self.notify("NotifyFinish", f"run finished{how} in "
                    + run_took(self.took), self.failed())

    def notify(self, word: str, text: str, failed: bool) -> None:
        """Notify the user; a failure is only logged, as nobody may be logged
        in."""
        reason = self.delivery.notify(text, failed)
        self.log_line(f"NotifyFailure {reason}" if reason else word)

    def summary(self) -> None:
        """Log the notices, warnings and errors again, together."""
        if self.notices():
            self.log_header("Notices")
            for slug, notice in self.notices().items():
                self.log_own(f"- {slug}: {notice}\n")
        for title, level in (("Warnings", "warning"), ("Errors", "error")):
            found = [p for p in self.problems if p.level == level]
            if found:
                self.log_header(title)
                for problem in found:
                    self.log_own(f"- {problem.source}: {problem.text}\n")

    def mail_start(self) -> None:
        """Mail that the run has started."""
        self.mail("MailStart", "run started", "start",
                  "The run has started.\n")

    def mail_finish(self) -> None:
        """Mail the result and the filtered log."""
        if self.config.mail.on == "failure" and not self.problems \
                and not self.processes.stopped:
            return
        self.mail_log.close()
        found = closing_words(self.problems, self.processes.stopped)
        notices = "".join(f"{slug} ended with a notice: {notice}.\n"
                          for slug, notice in self.notices().items())
        body = (f"{found or 'All tasks succeeded'}.\n" + notices
                + (f"Full log: {escape_controls(HOST)}:{self.log.path}\n"
                   if self.log.path else "")
                + (f"The log could not be written ({self.log.error}).\n"
                   if self.log.error else "")
                + "\n" + self.mailed_log())
        self.log_header("Mail")
        self.mail("MailFinish", f"run finished in {run_took(self.took)}",
                  "finish", body)

    def mailed_log(self) -> str:
        """Return the log as mails and pings may contain it: filtered, or left
        out if a filter is invalid, because it could keep a secret from them.
        """
        return "The log is left out, because a filter is invalid.\n" \
            if "filters" in self.errors else self.mail_log.excerpt.text()

    def mail(self, word: str, text: str, kind: str, body: str) -> None:
        """Send a mail, or keep it for the next run. `word` is logged if it
        was accepted, `kind` ("start", "finish") is part of its ID."""
        source, addresses = f"mail{kind.capitalize()}", self.addresses()
        self.undelivered(source, self.errors.get("address"))
        if self.undelivered(source, self.errors.get("mail")) or not addresses:
            return
        message = rfc5322(
            sender_of(self.config.mail), addresses, subject(
                HOST, text, self.mark() if kind == "finish" else ""), body,
            f"{self.run_id}.{kind}", self.processes.clock.now())
        # The tasks do not wait until a server takes the mail of the start.
        reason, left = self.deliver(
            message, addresses, MAIL_PAUSES
            if kind == "finish" and self.config.mail.type == "smtp" else ())
        if left:
            reason += self.queue_mail(f"{self.run_id}.{kind}", message,
                                      addresses, left)
        if not self.undelivered(source, reason and [reason]):
            self.log_line(word)

    def undelivered(self, source: str, errors) -> bool:
        """Whether there are errors of a delivery, which are recorded."""
        for error in errors or ():
            self.problem("delivery", "error", source, error)
        return bool(errors)

    def addresses(self) -> list[str]:
        """Return the valid addresses of user.email, each once."""
        found = map(address_of, self.config.user.email)
        return list(dict.fromkeys(filter(None, found)))

    def deliver(self, message: bytes, addresses: list[str],
                pauses: tuple = ()) -> tuple[str, list[str]]:
        """Send a mail, again after each of `pauses` while the mail server
        refuses it for now. Return '' or why it was refused, and the addresses
        that it waits for: none that refuse it for good if others took it.
        """
        results: dict[str, str] = {}
        late = addresses

        def attempt() -> tuple[bool, str]:
            nonlocal late
            results.update(self.delivery.send_mail(message, late))
            late = [each for each in late if worth_another(results[each])]
            return not late, results[late[0]] if late else ""

        self.insist(attempt, pauses)
        refused = {each: reason for each, reason in results.items() if reason}
        if len(refused) == len(addresses):
            return "; ".join(dict.fromkeys(refused.values())), addresses
        return "; ".join(map(": ".join, refused.items())), late

    def insist(self, attempt, pauses) -> tuple[bool, str]:
        """Return attempt(): whether it succeeded, and an answer. It is called
        again after each of `pauses` (seconds), while another try may help
        and no signal came."""
        for pause in pauses:
            done, answer = attempt()
            if done or self.processes.stopped or not worth_another(answer):
                return done, answer
            self.log_line(f"{answer}; next attempt in "
                          + format_duration(pause))
            self.processes.pause(pause)
        return attempt()

    def queue_mail(self, name: str, message: bytes, addresses: list[str],
                   left: list[str]) -> str:
        """Keep a mail for those of its addresses that are left; return how
        that went, for a message."""
        if left != addresses:
            message = f"{WAITS_FOR}{', '.join(left)}\n".encode() + message
        try:
            self.state.queue_mail(name, message)
        except OSError as error:
            return f"; not queued either: {error.strerror}"
        return "; queued, the next run sends it again"

    def outbox(self) -> None:
        """Send the mails that earlier runs could not send."""
        addresses = [] if "mail" in self.errors else self.addresses()
        for path in self.state.queued_mails() if addresses else ():
            name = os.path.basename(path)
            try:
                with open(path, "rb") as file:
                    message = file.read()
                wanted = recipients(message, addresses)
                reason, left = self.deliver(message, wanted)
                if not left:
                    os.unlink(path)
                elif left != wanted:
                    self.queue_mail(name[:-4], message, wanted, left)
            except OSError as error:
                reason = error.strerror
            self.log_line(f"MailWaits {name}: {reason}" if reason
                          else f"MailSent {name}")
            if "took too long" in reason or "no answer" in reason:
                break           # one such wait a run is enough

    def ping_start(self) -> None:
        """Ping the start to the monitor."""
        self.ping("start", self.run_id)

    def ping_finish(self) -> None:
        """Ping success exactly when the exit status will be 0."""
        self.log_header("Ping")
        others = [p for p in self.problems if p.source != "pingStart"]
        if not exit_status(others, self.processes.stopped) \
                and not self.log.error:
            self.ping("", self.run_id)
        elif self.config.ping.wants("fail") and self.failed():
            self.ping("fail", self.run_id)
        else:
            self.log_line("success ping not sent: the run had problems")

    def ping_tasks(self, step: Step) -> None:
        """Ping the results of tasks, but of none that skipStatuses skipped."""
        for task in step.tasks:
            result = self.results.get(task.slug)
            is_good = result and result.outcome == "ok"
            if task.ping and task.slug not in self.skipped:
                self.request_ping(f"ping {task.slug}", task.ping,
                                  "" if is_good else "fail")

    def ping(self, action: str, run_id: str) -> None:
        """Ping the monitor of the run. An endpoint for the action alone is
        used as it is written."""
        ping, body = self.config.ping, None
        if ping.log and action != "start" and "filters" not in self.errors:
            self.mail_log.close()
            body = self.mail_log.excerpt.end(PING_LIMIT).encode()[-PING_LIMIT:]
        own = getattr(ping, action + "_endpoint", "")
        is_paired = ping.start or ping.fail or ping.log
        self.request_ping(
            "ping" + action.capitalize(), own or ping.endpoint,
            "" if own else action, "" if own or not is_paired else run_id,
            body)

    def request_ping(self, source: str, endpoint: str, action: str = "",
                     run_id: str = "", body: bytes | None = None) -> None:
        """Request a URL, see `request_url`; several times, if another try may
        help. `source` is that of a problem."""
        if self.undelivered(source, self.errors.get("ping")
                            or self.errors.get(source)):
            return
        ping, url = self.config.ping, request_url(endpoint, action, run_id)
        accepted, answer = self.insist(
            lambda: self.delivery.ping(url, body), [
                min(2 ** tried, 30) for tried in range(ping.retries - 1)
                if source != "pingStart"])
        if accepted:
            self.log_line(f"PingResponse {answer}")
        if not accepted or answer.startswith("200 OK ("):
            self.undelivered(source, [answer])

    def report_no_start(self, text: str, details: str) -> None:
        """Mail and ping that this run cannot begin, if the configuration
        says so. Nothing else of the run is carried out."""
        config = self.config
        self.problems.append(RunProblem("tasks", "error", PROG, text))
        if config.mail.enabled and config.mail.on != "never":
            self.mail("MailFinish", "run could not start", "finish",
                      f"{text}\n\n{details}")
        if config.ping.enabled and config.ping.wants("fail"):
            self.ping("fail", self.run_id)


# ==========================================================================
# Sample: what does `init` write?                               (nothing; C)
#
# The same text as mission.sample.json; a test compares them, and another
# checks it on a host that has what it names.
# ==========================================================================

SAMPLE = r'''// mission's configuration: JSON with comments and trailing commas.
// `mission check` reports every error; `mission dump` shows all keys.
// A relative path is relative to this file.
{
    // The tasks, in the order in which they run. A task is the program
    // TASKS_DIR/slug/run; `mission new SLUG` makes one.
    "tasks": [
        {
            "slug": "etc",
            "name": "Settings",
            "type": "exec",
            "scheduled": true,      // runs without -t
            "timeout": "1h",        // then SIGTERM, then SIGKILL
        },
        // {
        //     "slug": "offsite",
        //     "type": "exec",
        //     "scheduled": true,
        //     "post": true,        // runs after all others and after commit
        //     "needs": ["etc"],    // skipped if etc failed
        //     "retries": 2,
        //     "retryDelay": "30s",
        // },
    ],

    // The user whose backups these are, and where mail goes.
    "user": { "name": "root", "email": "root@example.com" },

    // The program that prints the password named by its argument.
    // "passBin": "/usr/bin/pass",

    // The directories. A task finds them in LOCAL_DIR, LOGS_DIR, ...
    // "chown": give all files to user.name.
    // "commit": commit all files with git (after `git init`).
    "storage": {
        "tasks": { "path": "tasks" },
        "logs": { "path": "logs" },
        "local": { "path": "local", "chown": true },
    },

    // The URL to request after a run without problems; %s is the host name.
    "ping": { "enabled": false, "endpoint": "https://hc-ping.com/UUID" },

    "notify": { "enabled": false },

    "mail": { "enabled": false, "type": "sendmail" },

    // Lines that match are left out of the mail, but not of the log.
    "filters": ["^sending incremental file list$"],

    // What matches becomes *** in the log, the mail and the ping.
    "redact": ["(?i)(password|token)=[^ ]+"],

    "logs": { "keep": 90 },
}
'''
TASK_SCRIPT = """#!/bin/sh
set -eu

# The task {slug}. It runs in this directory, with a variable for each storage
# (LOCAL_DIR, ...), PASS_BIN and TARGET_USER. Everything that it prints is
# logged. An exit status other than 0 is a failure.

echo "nothing is backed up yet: edit $PWD/run"
exit 1
"""
# Units of systemd. A task may need anything: to mount, to become another
# user, to copy setuid files, to send mail through a setgid program. So a unit
# locks up nothing that a backup could need, and that of a user nothing at
# all: there it would imply NoNewPrivileges=.
UNITS = {
    "service": """\
{header}[Unit]
Description=Backups of mission
{after}
[Service]
Type=oneshot
ExecStart={command}
{environment}# SIGTERM goes to mission alone, which stops its tasks and mails.
KillMode=mixed
# If one task runs out of memory, the others still run.
OOMPolicy=continue
{closed}""",
    "timer": """\
{header}[Unit]
Description=Nightly backups of mission

[Timer]
OnCalendar=*-*-* 02:30:00
# So that many hosts do not start at the same second.
RandomizedDelaySec=10min
# Start at boot if the host was off at that time.
Persistent=true

[Install]
WantedBy=timers.target
"""}
UNIT_AFTER = """\
Wants=network-online.target
After=network-online.target remote-fs.target
"""
UNIT_CLOSED = """\
LockPersonality=yes
RestrictRealtime=yes
"""
UNIT_HEADER = """\
# {program} unit service > {directory}/{name}.service
# {program} unit timer > {directory}/{name}.timer
# {systemctl} daemon-reload
# {systemctl} enable --now {name}.timer
"""
UNIT_LINGER = """\
# loginctl enable-linger     (to run while you are not logged in)
"""
COMPLETIONS = {
    "bash": r'''# mission completion bash > /etc/bash_completion.d/mission
_mission() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    case $before in
        -c|--config) COMPREPLY=($(compgen -f -- "$word")); return ;;
        -t|--task) COMPREPLY=($(compgen -W "$(mission list 2>/dev/null)" \
            -- "$word")); return ;;
        completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$word"))
            return ;;
        unit) COMPREPLY=($(compgen -W "service timer" -- "$word")); return ;;
    esac
    COMPREPLY=($(compgen -W "COMMANDS OPTIONS" -- "$word"))
}
complete -F _mission mission
''',
    "zsh": r'''#compdef mission
# mission completion zsh > /usr/local/share/zsh/site-functions/_mission
_mission() {
    case $words[CURRENT-1] in
        -c|--config) _files; return ;;
        -t|--task) compadd -- ${(f)"$(mission list 2>/dev/null)"}; return ;;
        completion) compadd bash zsh fish; return ;;
        unit) compadd service timer; return ;;
    esac
    compadd -- COMMANDS OPTIONS
}
_mission "$@"
''',
    "fish": r'''# mission completion fish > /etc/fish/completions/mission.fish
complete -c mission -f -a "COMMANDS"
complete -c mission -s c -l config -r -F
complete -c mission -s t -l task -r -f -a "(mission list 2>/dev/null)"
complete -c mission -n "__fish_seen_subcommand_from unit" -a "service timer"
complete -c mission -f -a "OPTIONS"
''',
}


# ==========================================================================
# Manual: how is a topic printed?                   (terminal, processes; C)
#
# The text of this section is the same in mission.py and koitab.py. A topic
# is printed as it is, or in roff as a manual page.
#
# A topic has blocks between empty lines: a HEADING, a paragraph, an example
# (indented by four), or terms (by two) with their meanings (by six).
# ==========================================================================

RELEASED = "2026-11-29"         # the date of the manual pages
ROFF_ESCAPES = {ord(character): escape for character, escape in (
    ("\\", r"\e"), ("-", r"\-"), ("'", r"\(aq"), ("^", r"\(ha"),
    ("~", r"\(ti"))}


def term_row(term: str, meaning: str) -> str:
    """Return a term and its meaning, as a topic has them."""
    import textwrap
    return f"  {term}\n" + textwrap.fill(
        meaning[0].upper() + meaning[1:], 79, break_on_hyphens=False,
        initial_indent=" " * 6, subsequent_indent=" " * 6)


def roff_words(text: str) -> str:
    """Return text for roff: characters that it would replace are escaped,
    `words in backticks` are bold, and no word begins with a dot."""
    import re
    bold = re.sub("`([^`]+)`", r"\\fB\1\\fR", text.translate(ROFF_ESCAPES))
    return re.sub(r"(?<!\S)\.", r"\\&.", bold)


def roff_block(block: str, is_first: bool) -> str:
    """Return a block of a topic in roff, see man(7). `is_first`: it is the
    first below a heading."""
    import textwrap
    if block.isupper() and block[0] != " ":
        return f".SH {roff_words(block)}"
    if block.startswith("    "):
        return (".nf\n" if is_first else ".PP\n.nf\n") + roff_words(
            textwrap.dedent(block)) + "\n.fi"
    if not block.startswith("  "):
        return ".PP\n" * (not is_first) + textwrap.fill(
            roff_words(block), 79, break_on_hyphens=False)
    return "\n".join(
        roff_words(row.strip()) if row.startswith(" " * 6)
        else f".TP\n\\fB{roff_words(row.strip())}\\fR"
        for row in block.split("\n"))


def manual_page(name: str, section: int, title: str, text: str) -> str:
    """Return a manual page in roff, made from the text of a topic. No word
    is hyphenated (.nh): an option could not be copied."""
    blocks = ["NAME", f"{name} - {title}", *text.strip("\n").split("\n\n")]
    before = ["", *blocks]
    return (f'.TH {name.upper()} {section} {RELEASED} "{PROG} {VERSION}"\n'
            ".nh\n" + "\n".join(roff_block(block, earlier.isupper()) for
                                block, earlier in zip(blocks, before)) + "\n")


def start_pager():
    """Start the caller's pager, $PAGER or less, or cat where that is missing;
    return its Popen. Raises Error."""
    import shlex
    import shutil
    import subprocess
    pager = os.environ.get("PAGER", "").strip() or shutil.which("less") \
        or "cat"
    try:
        return subprocess.Popen(shlex.split(pager), stdin=subprocess.PIPE,
                                encoding="utf-8")
    except (OSError, ValueError) as error:      # ValueError: an open quote
        raise Error(f"cannot start $PAGER ({escape_controls(pager)}): "
                    f"{getattr(error, 'strerror', error)}",
                    "export PAGER=cat") from None


def write_paged(produce) -> int:
    """Call produce(write), where write(text) prints on a terminal through
    the pager; return the exit status. Raises Error, after the text was
    printed without a pager. Ctrl-C is the pager's: it ends a search there.
    """
    import signal
    pager = failure = None
    before = signal.getsignal(signal.SIGINT)
    if sys.stdout.isatty():
        try:
            pager = start_pager()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except Error as error:
            failure = error
    try:
        produce((pager.stdin if pager else sys.stdout).write)
    except BrokenPipeError:
        if not pager:       # else the reader has seen enough
            raise
    finally:
        if pager:
            pager.communicate()
            signal.signal(signal.SIGINT, before)
    if failure:
        raise failure
    return 0


def print_paged(text: str) -> int:
    """Print a text, see `write_paged`."""
    return write_paged(lambda write: write(text))


# ==========================================================================
# Help: what can I look up?                                     (nothing; C)
#
# The topics of `mission help`. Every key of the configuration has a row in
# the topic "config", which comes from the tables that the reader uses.
# ==========================================================================

STATUS_MEANINGS = """\
  0
      Everything succeeded. Nothing is written to stderr.
  1
      The run had errors or warnings.
  2
      Wrong usage; nothing ran.
  74
      The tasks succeeded, but mail, ping, log or metrics could not be
      delivered.
  75
      Another run holds the lock.
  78
      The configuration is invalid; nothing ran.
  128+N
      Stopped by signal N.
"""
RESULT_MEANINGS = """\
  ok
      Everything succeeded.
  failed
      Errors or warnings in tasks, commit or chown (status 1).
  undelivered
      The tasks succeeded, but a mail, ping, log or metrics file was not
      delivered (status 74).
  stopped
      A signal stopped the run.
  lost
      The run was killed, or the host went down.
  running
      The run has not ended yet.
"""
CONFIG_TOPIC = """\
FORMAT

The configuration is JSON (RFC 8259) with // and /* */ comments and trailing
commas. The option -c FILE names the file; the default is mission.config.json
in the working directory. `mission check` reports every error in one pass, with
its line and column. `mission dump` prints all keys, with paths resolved and
defaults filled in.

A path that begins with ~ is below the home directory of user.name, ~bob below
that of bob. A relative path is relative to the directory of the configuration.

A duration is a number with a unit: 500ms, 90s, 10m, 1h30m, 2d. A size is a
number with K, M, G or T, which are powers of 1024: 500M, 5G.

KEYS

{KEYS}

PATTERNS

The patterns of filters and redact are regular expressions of Go, as in
the original program, or of Python. Three things of Go cannot be used:
scripts (such as \\p{Greek}), (?U) and \\C. `mission check` names the
pattern. \\w, \\d and \\s match letters, digits and spaces of all scripts.

EXAMPLES

A few lines for frequent cases:

    "timeout": "2h", "retries": 2, "retryDelay": "1m"     a slow cloud
    "needs": ["mount"]                     only if that task succeeded
    "parallel": "clouds"                   on tasks that follow each other
    "minFree": {"local": "20G"}            before a large dump
    "ping": "https://hc-ping.com/UUID"     in a task: for it alone
    "filters": ["^sending incremental file list$"]        a shorter mail
    "logs": {"keep": 90}                   three months

A whole configuration:

    {
        "tasks": [
            {"slug": "mount", "type": "exec", "scheduled": true,
             "storages": []},
            {"slug": "home", "type": "exec", "scheduled": true,
             "needs": ["mount"], "timeout": "2h", "retries": 2,
             "retryDelay": "1m", "minFree": {"disk": "20G"}},
        ],
        "user": {"name": "alice", "email": "alice@example.com"},
        "storage": {
            "tasks": {"path": "tasks"},
            "logs": {"path": "logs"},
            "disk": {"path": "/mnt/disk", "mounted": true},
            "sync": {"path": "sync", "chown": true, "commit": true},
        },
        "ping": {"enabled": true, "start": true, "fail": true, "log": true,
                 "endpoint": "https://hc-ping.com/UUID"},
        "mail": {"enabled": true, "type": "sendmail", "on": "failure"},
    }
"""
TASKS_TOPIC = """\
PROGRAMS

A task is an executable TASKS_DIR/SLUG/run, or the program of its key
entrypoint. Everything that it prints is logged, stdout and stderr in order.
Exit status 0 is a success, and any other a failure, except for those of
okStatuses, warnStatuses and skipStatuses.

The working directory is that of the program, stdin is /dev/null, the umask is
022, and the task has its own session.

A bash script must begin with `set -euo pipefail`, or a spelling that is at
least as strict, such as `#!/bin/bash -eu` followed by `set -o pipefail`.
Otherwise a command that fails in the middle of the script goes unnoticed.

ENVIRONMENT

A task gets these variables and nothing from the caller, so a run by hand and
one from cron are the same.

  PATH
      /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  HOME, USER, LOGNAME
      From the account that the task runs as.
  SHELL, LANG
      /bin/sh and C.UTF-8.
  TZ
      As mission has it, if it is set.
  TASKS_DIR, LOGS_DIR, NAME_DIR
      The path of each storage; my-disk becomes MY_DISK_DIR.
  TARGET_USER, PASS_BIN
      The keys user.name and passBin.
  MISSION_RUN_ID, MISSION_TASK
      The UUID of the run and the slug of the task.

The key env of a task adds variables or replaces these.

BUILT-IN TASKS

A task of type builtin is a Python function in TASKS_DIR/SLUG/task.py. It runs
in a separate process; an exception is a failure.

    def run(args, log):
        log("copying to " + args.storage["sync"])
        token = args.pass_value("cloud/token")

args.pass_value(NAME) returns a password from passBin, which then never appears
in the log. args.target_user is user.name.

The slug spotify is a built-in task that is part of mission. It stores every
playlist of an account with all its tracks, one JSON file each, in
SYNC_DIR/spotify. It needs storage.sync; storage.sessions with a file spotify
that contains {"refresh_token": "..."}; and spotify_api_client_id and
spotify_api_client_secret in the password store.

EXAMPLES

A dump of PostgreSQL, in a task that root runs:

    runuser -u postgres -- pg_dumpall > "$LOCAL_DIR/all.sql"

A copy with rsync, whose status 24 (files vanished) is a success:

    {"slug": "home", "type": "exec", "okStatuses": [24]}
"""
BEHAVIOUR_TOPIC = """\
SCHEDULING

In root's crontab:

    30 2 * * * /usr/local/bin/mission -c /srv/b/mission.json run --headless

Or with systemd, which also makes up for a run that was missed while the host
was off:

    mission -c FILE unit service > /etc/systemd/system/mission.service
    mission -c FILE unit timer > /etc/systemd/system/mission.timer
    systemctl daemon-reload && systemctl enable --now mission.timer

For an ordinary user the units are those of `systemctl --user`; `loginctl
enable-linger` lets them run while the user is not logged in. Two runs never
overlap: a second one ends with status 75, or waits with `--wait 30m`.

ORDER

A run takes the lock, mails and pings the start, and runs the tasks in order.
Then it gives the files of storages with chown to user.name, commits storages
with commit, and runs the post tasks. At the end it sends the desktop
notification, lists warnings and errors, writes history and metrics, removes
old logs, mails, pings, and packs the repositories that have grown. Chown and
commit happen if at least one task without "post" was to run.

RESULTS

Tasks and housekeeping (chown, commit) decide whether a run failed: status 1,
[FAILURE] in the subject of the mail, no success ping. Delivery (mail, ping,
log, metrics) does not: status 74 and [WARNING]. A desktop that cannot be
notified is only a line in the log. The success ping is sent exactly when the
status is 0, except that a failed start ping does not prevent it.

CHECK AND RUN

`mission check` reports every error. A run does what it can. An invalid program
or an unknown user of a task fails this task alone. A storage that is missing,
is not a repository, or does not answer within 20 seconds is an error of its
chown and commit. A mail, ping, passBin, CA file or filter that cannot work is
status 74; with an invalid filter the mail is sent without the log.

Any other error prevents the run (78). With --headless the fail ping and the
mail are sent if their own sections are valid and need no password from
passBin; while another run holds the lock (75), once for each holder. A
configuration that other users can write is used for nothing: mission writes
one line to stderr and one to syslog.

INTERRUPTED RUNS

A run that was killed or lost its host is a warning of the next run, with its
ID and its last task, and `lost` in the history. A task that still runs from
then is not started again.

SIGTERM, SIGINT and SIGHUP stop the running task: SIGTERM to its process group,
SIGKILL after 10 seconds or at the second signal. The other tasks, chown and
commit are skipped. The mail and the fail ping are sent.

When a task ends and processes that it started hold its output open, mission
reads for 2 more seconds, ends those of its process group, and names them in a
warning. It names a process that made its own session and does not stop it.

THE LOG

Control characters and characters that reorder text are written as \\x1b or
\\u202e, invalid UTF-8 as \\xff, so the log is safe for a terminal. A
carriage return ends a line, so each state of a progress bar is a line.

Patterns of filters and redact are applied to a line without the elapsed time.
A filter that begins with a space also matches the beginning of a line.
Filtered lines are counted where they were. A line that takes longer than a
second to match, or is longer than 256 KiB, is withheld from the mail; with
redact from the log as well.

If the disk is full, the lines of the log go to stderr.

MAIL

A mail contains at most 200,000 characters of the log: its head and its tail.
If the mail server refuses a mail for now (4xx) or does not answer, mission
tries again after 30 and after 90 seconds; after a 5xx it does not, and the
mail of the start is tried once, because the tasks wait for it. A mail that no
server accepted is queued (50 at most), and the next run sends it again, also
after a 5xx. If some of several recipients are refused, the others get the
mail; it is sent again to those that were refused for now, and the others are
reported.

COMMITS

git adds and commits everything as the owner of the directory, without hooks,
prompts, pager or signature, and at most 10 minutes a command. Then the file
systems of the repository are synced. The log names up to 1,000 changed files.
A file or directory that the owner cannot read is an error or a warning that
names it. Locks of git are removed if they are older than 15 minutes or the
last boot, or if a git that mission killed left them, and no process has the
repository open.

After mail and ping, `git gc --auto` packs repositories that have grown, for at
most an hour, as their owner. gc.auto of the repository decides when; 0 means
never. A failure is a line PackFailure in the log, and a signal ends the
packing.

FILES

  /var/lib/mission, ~/.local/state/mission
      History, queued mails and the run in progress, of root and of others.
      XDG_STATE_HOME and MISSION_STATE move them. `make uninstall` leaves them.
  /run/mission, ~/.local/state/mission
      The lock. No variable moves it. The lock of an account without a home
      directory is with its state.

INSTALLING

    install -m 0755 mission.py /usr/local/bin/mission

Python 3.9 or newer with its whole standard library is all that mission needs.
The first line of the file starts /usr/bin/python3 -IS. Change the path if
Python is elsewhere, and keep -IS: it keeps the caller's PYTHON* variables, the
directory of the script and site-packages out of the imports.

DIFFERENCES FROM THE ORIGINAL

mission replaces the program of the same name in Go. A configuration and its
tasks run unchanged, except for these points:

Chown comes before commit, so that git can read as the owner what root stored.

Tasks get a built environment, not the caller's: use the key env of a task.

Relative paths are relative to the configuration, not to the working directory.

Unknown keys, duplicate slugs and invalid names are errors, and so is an
unknown slug after -t. The same slug twice after -t runs once.

Run logs have mode 0600 (they had 0644). Escape sequences in output are made
visible.

Go's regular expressions are translated (`mission help config`).

Mail is sent only if mail.enabled is true. A refused mail or ping shows in the
exit status.
"""
SECURITY_TOPIC = """\
TRUST

As root, mission refuses a configuration or a task that anyone but root and
user.name can write, in the file itself or a directory above it: by its mode, a
group, or an access control list (POSIX or NFSv4). A group is trusted if the
host lists it and all its members are trusted; no group is if nsswitch.conf(5)
takes users from SSSD or LDAP, which need not list all members: then use chmod
g-w. With "trust": "root" only root is trusted. Use that if user.name must not
be able to become root, because root runs what is in the tasks directory.

STORAGES

In a directory that a user can write, root follows no symbolic link, enters no
other file system, and changes no device and no file that has a hard link
elsewhere. setuid and setgid bits are dropped. Files of a task's user
(tasks[].user) stay theirs, and the log counts them; `mission check` warns if
that storage has commit, because git reads the files as the owner of the
repository. Without O_PATH, as on macOS, a file with several links is not
changed.

In the repository of another user root opens no file and runs nothing: git runs
as the owner. That includes what mission looks up there, wherever .git,
commondir, refs, alternates or the configuration lead. Root's own repository is
committed only if root alone can write all that git reads: the repository and
the directories above it, its configuration and root's, the files that these
include, lists of attributes, and borrowed objects. Error messages quote no
file of a repository.

SECRETS

passBin runs as user.name. A password is never an argument, and never in a log,
a mail or a commit. A password that a built-in task has fetched is replaced by
*** wherever it occurs. What matches a pattern of redact becomes *** in the log
and everything made from it. `mission dump` prints the configuration with all
its URLs.

Mail and ping verify certificates. No proxy of the environment is used, and no
redirect leads from https to http. Messages name only scheme, host and port of
a ping URL, because the rest may be a secret.

LIMITS

Root can do anything, and so can a task that root runs. Patterns match lines: a
secret that a program splits over two lines is not found. A task that makes its
own session outlives its timeout. A hard link that is made and removed within
one tick of the file system's clock cannot be seen.
"""
STATUS_TOPIC = """\
EXIT STATUS

{STATUSES}

Every status except 0 comes with one line on stderr, so cron mails it.

RESULTS

`mission history` shows one word for each run:

{RESULTS}

MONITORING

`mission status` prints one line to stdout and uses the statuses of monitoring
plugins. It judges each scheduled task by its own last success.

  0
      OK.
  1
      Warning: a task ended with a notice or has not run yet, something was not
      delivered, or the last success is in the future.
  2
      Critical: a task failed, its last success is older than --max-age, the
      run had errors or warnings (of chown or commit, for example), or it was
      lost or stopped.
  3
      Unknown: no complete run, wrong usage, or an invalid configuration.

METRICS

With metrics.textfile each scheduled run (--headless, without -t) writes these
series, all with the label config:

  mission_run_success
      1 if the tasks, chown and commit had no errors or warnings, else 0.
  mission_run_errors, mission_run_warnings
      Their number.
  mission_run_start_seconds, mission_run_duration_seconds
      When the last run started (seconds since 1970), and how long it took.
  mission_last_success_seconds
      When the last successful run started.
  mission_task_success, mission_task_duration_seconds
      For each task, with the label task: 1 or 0, and how long it took.
"""
TITLE = "run backup tasks in order and report every failure"
MANUAL = """\
SYNOPSIS

`mission` [-c FILE] COMMAND [OPTION]... [ARGUMENT]

DESCRIPTION

mission runs the tasks of a configuration in their order, from cron, a systemd
timer or by hand. It gives what they stored to its owner, commits it with git,
mails and keeps the log, and pings a monitor only if everything succeeded. One
failing task does not stop the others.

COMMANDS

{commands}

OPTIONS

Options may be given before or after the command. Without colour: NO_COLOR.

{options}

EXIT STATUS

{statuses}

EXAMPLES

{examples}

SEE ALSO

{pages}
"""
TOPICS = {      # name: (title, text)
    "config": ("the configuration file", CONFIG_TOPIC),
    "tasks": ("what a task is and what it gets", TASKS_TOPIC),
    "behaviour": ("what a run does, in detail", BEHAVIOUR_TOPIC),
    "security": ("what mission trusts and protects", SECURITY_TOPIC),
    "status": ("exit statuses, results and monitoring", STATUS_TOPIC),
}


def default_text(kind: ValueType, default) -> str:
    """Return the default of a key in words."""
    import json
    if default is REQUIRED:
        return " Required."
    if default in (None, "", (), {}):
        return ""
    value = kind.write(default) if kind.write else default
    return f" Default: {json.dumps(value)}."


def key_row(path: str, kind: ValueType, default, meaning: str) -> str:
    """Return the row of a key in the topic "config"."""
    return term_row(path, f"{meaning}. Value: {kind.expected}."
                    + default_text(kind, default))


def topic_text(name: str) -> str:
    """Return the text of a topic, with the tables that belong in it."""
    keys = "\n".join(key_row(path, *row)
                     for path, row in key_paths(Config).items())
    return TOPICS[name][1].replace("{KEYS}\n", keys + "\n").replace(
        "{STATUSES}\n", STATUS_MEANINGS).replace(
        "{RESULTS}\n", RESULT_MEANINGS)


# ==========================================================================
# Command: what can I type?                                    (terminal; C)
#
# Each command has a function, and a row in COMMANDS. `main` is the only way
# out: it turns an Error into lines on stderr and an exit status.
# ==========================================================================

LONGEST_CONFIG = 2**20
SYSLOG_SECONDS = 5.0


class ExitWithText(Exception):
    """Print a text and exit with status 0; `main` catches it."""


def number_of_runs(text: str) -> int:
    """Return the number of -n. Raises Error."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise Error(f"-n {text}: not a number of runs",
                    "mission history -n 20", EXIT_USAGE)
    return int(text)


def duration_of(option: str, least: float):
    """Return a function that reads a duration of `least` seconds or more,
    and raises Error for anything else."""
    def read(text: str) -> float:
        seconds = parse_duration(text)
        if seconds is None or seconds < least:
            raise Error(f"{option} {text}: not a duration such as 90s, 30m "
                        "or 26h", "", EXIT_USAGE)
        return seconds
    return read


class Option(FrozenRecord):
    """An option, for argparse, the help and the completion."""
    spelling: str               # "-t, --task SLUG"
    help: str
    default: object = False
    action: str = "store_true"  # of argparse
    read: object = str          # text -> value; raises Error

    @property
    def names(self) -> list[str]:
        """Its spellings without the value: -t, --task."""
        return [word for word in self.spelling.replace(",", "").split()
                if word.startswith("-")]

    @property
    def synopsis(self) -> str:
        """Its part of a usage line: [-t SLUG]..."""
        value = self.spelling.partition(self.names[-1])[2]
        return f"[{self.names[0]}{value}]" + "..." * (self.action == "append")


OPTIONS = {     # by the name of the value
    "config": Option("-c, --config FILE",
                     f"the configuration (default: {DEFAULT_CONFIG})",
                     DEFAULT_CONFIG, "store"),
    "tasks": Option("-t, --task SLUG",
                    "run this task, scheduled or not; repeatable", [],
                    "append"),
    "headless": Option("--headless",
                       "log to a file, send mail and ping (for cron)"),
    "dry_run": Option("--dry-run",
                      "print the steps of the run and do nothing"),
    "wait": Option("--wait TIME",
                   "wait so long for another run to end (30m)", 0.0, "store",
                   duration_of("--wait", 0)),
    "max_age": Option("--max-age TIME",
                      "a last success older than this is critical (26h)",
                      None, "store", duration_of("--max-age", 0.001)),
    "number": Option("-n, --number N", "how many past runs (default: 20)",
                     20, "store", number_of_runs),
    "json": Option("--json", "print JSON"),
    "quiet": Option("-q, --quiet", "show no desktop notification"),
    "verbose": Option("-v, --verbose", "print more detail"),
    "no_color": Option("-C, --no-color", "print without colour"),
    "help": Option("-h, --help", "print help about the command",
                   action="help"),
    "version": Option("--version", "print the version", action="version"),
}
# Every command takes these; quiet and verbose as well, because scripts for
# the original give them anywhere.
COMMON_OPTIONS = ("config", "quiet", "verbose", "no_color", "help", "version")


def option_rows(keys) -> str:
    """Return the options of a help text, a line each."""
    return "".join(
        f"  {'' if ',' in OPTIONS[key].spelling else '    '}"
        f"{OPTIONS[key].spelling}".ljust(23) + OPTIONS[key].help + "\n"
        for key in keys)


def option_parser(text: str, hint: str):
    """Return a parser of all options that raises Error or ExitWithText where
    argparse would print and exit. `text` is for --help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Error(message.removeprefix("argument ").replace(
                "unrecognized arguments:", "unknown option"), hint, EXIT_USAGE)

        def print_help(self, file=None):
            raise ExitWithText(text)

        def exit(self, status=0, message=None):     # --version has printed
            raise ExitWithText("")

    parser = Parser(PROG, add_help=False)
    for key, option in OPTIONS.items():
        more = {"dest": key, "default": argparse.SUPPRESS}
        if option.action == "version":
            more = {"version": f"{PROG} {VERSION}"}
        elif option.action in ("store", "append"):
            more["type"] = option.read
        parser.add_argument(*option.names, action=option.action, **more)
    parser.add_argument("words", nargs="*")
    return parser


def command_word(argv: list[str]) -> str:
    """Return the command of a command line, which may be invalid, or ""."""
    with_value = {name for option in OPTIONS.values() for name in option.names
                  if option.action in ("store", "append")}
    before = ""
    for word in argv:
        if not word.startswith("-") and before not in with_value:
            return word
        before = word
    return ""


def named_config(argv: list[str]) -> str:
    """Return the FILE of -c in a command line, which may be invalid."""
    names, found = OPTIONS["config"].names, DEFAULT_CONFIG
    for word, after in zip(argv, [*argv[1:], ""]):
        if word in names:
            found = after or found
        elif word.startswith(f"{names[1]}="):
            found = word.partition("=")[2]
        elif word.startswith(names[0]):
            found = word[2:]
    return found


def parse_arguments(argv: list[str]):
    """Return (command, options, arguments) of a command line. Raises Error.

    Options are accepted before and after the command, as in the original.
    """
    import argparse
    name = command_word(argv)
    text, hint = (command_help_text(name), f"{PROG} {name} --help") \
        if name in COMMANDS else (usage(), f"{PROG} --help")
    given = vars(option_parser(text, hint).parse_intermixed_args(argv))
    name, *words = given.pop("words") or [""]
    if name not in COMMANDS:
        raise unknown_word("command", name, COMMANDS, PROG)
    command = COMMANDS[name]
    for key in given:
        if key not in command.options:
            raise Error(f"{OPTIONS[key].names[-1]} is not an option of "
                        f"{PROG} {name}", hint, EXIT_USAGE)
    options = argparse.Namespace(**{
        **{key: OPTIONS[key].default for key in command.options}, **given})
    options.colour = sys.stdout.isatty() and not (
        options.no_color or os.environ.get("NO_COLOR"))
    check_arguments(name, command, words)
    return command, options, words


def unknown_word(kind: str, word: str, known, before: str) -> Error:
    """Return the error for a word that is not one of `known`. `before`: what
    is typed before it."""
    meant = nearest(word, known)
    what = f"unknown {kind} {quoted(word)}" if word else f"no {kind} given"
    return Error(what if meant else f"{what} (expected {', '.join(known)})",
                 f"{before} {meant}" if meant else "", EXIT_USAGE)


def check_arguments(name: str, command: Command, words: list[str]) -> None:
    """Raise Error for a missing, surplus or unknown argument."""
    hint, wanted = usage_line(name), command.arguments.split()
    if len(words) > len(wanted):
        word = words[len(wanted)]
        if os.path.isfile(word):
            hint = f"{PROG} -c {shell_word(word)} {name}"
        raise Error(f"unexpected argument {quoted(word)}", hint, EXIT_USAGE)
    for argument in wanted[len(words):]:
        if not argument.startswith("["):
            raise Error(f"missing argument {argument}", hint, EXIT_USAGE)
    choices = command.arguments.split("|")
    if len(choices) > 1 and words[0] not in choices:
        raise Error(f"unexpected argument {quoted(words[0])} (expected "
                    f"{', '.join(choices)})", "", EXIT_USAGE)


def print_json(value) -> int:
    """Print a value as indented JSON; the exit status."""
    import json
    print(json.dumps(value, indent=4, ensure_ascii=False))
    return EXIT_OK


def read_text(path: str) -> str:
    """Return the text of a configuration file. Raises Error."""
    place = hint = ""
    try:
        with open_regular(path) as file:
            data = file.read(LONGEST_CONFIG + 1)
        if len(data) <= LONGEST_CONFIG:
            return data.decode("utf-8")
        reason = "larger than 1 MiB"
    except FileNotFoundError:
        reason = "no such file"
        hint = f"{PROG} -c {shell_word(path)} init"
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        place = f":{row}:{column}"
        reason = "not UTF-8"
        hint = f"iconv -f latin1 -t utf-8 {shell_word(path)}"
    raise Error(f"{path}{place}: {reason}", hint, EXIT_CONFIG)


def answer_about(path: str, function, status: int = EXIT_PROBLEMS,
                 on_message=None):
    """Return function(send), called in a child process, as the file system
    may not answer; see `supervise`. Raises Error that names `path`."""
    try:
        return Processes(Clock()).supervise(ANSWER_SECONDS, function,
                                            on_message=on_message)
    except Unanswered:
        raise Error(f"{path}: {NO_ANSWER}", "", status) from None


class ConfigSource(FrozenRecord):
    """The text of a configuration file, and where it was found."""
    file: str                   # as it was given
    path: str                   # absolute
    real_path: str              # without symbolic links
    text: str


def read_source(file: str) -> ConfigSource:
    """Read a configuration file. Raises Error."""
    path = os.path.abspath(file)
    return ConfigSource(file, path, *answer_about(path, lambda _send: [
        os.path.realpath(path), read_text(path)], EXIT_CONFIG))


class LoadedConfig(FrozenRecord):
    """A configuration file, read and validated."""
    config: Config | None
    diagnostics: list           # in the order of the text
    notes: list                 # warnings, which only `check` shows

    def errors(self) -> dict[str, list[str]]:
        """scope -> the texts of its diagnostics, without their lines; those
        of a task also without the key, because the task is named there."""
        found: dict[str, list[str]] = {}
        for each in self.diagnostics:
            what = "" if each.scope.startswith("task ") else f"{each.what}: "
            hint = each.hint and f" ({each.hint})"
            found.setdefault(each.scope, []).append(f"{what}{each.why}{hint}")
        return found


def validated(source: ConfigSource, with_facts: bool = True) -> LoadedConfig:
    """Return the configuration of a text. Without `with_facts` only the text
    is validated, not what it names."""
    reader = ConfigReader(source.text, source.path, source.real_path)
    config, diagnostics = reader.config(), reader.diagnostics
    if config and with_facts:
        host = HostInspector()
        config = resolved(config, host.home_of, diagnostics)
        ConfigValidator(config, host.facts(config), diagnostics).validate()
    found = sorted((each.replace(hint=with_config(each.hint, source.file))
                    for each in diagnostics.found),
                   key=lambda each: (each.line, each.column))
    return LoadedConfig(config, [each for each in found if each.fatal],
                        [each for each in found if not each.fatal])


def loaded(file: str, with_facts: bool = True) -> LoadedConfig:
    """Read and validate the configuration. Raises Error if it is unreadable.
    """
    return validated(read_source(file), with_facts)


def require_valid(found: LoadedConfig, options, strict: bool = False) -> None:
    """Print the errors and raise Error if the configuration cannot be used;
    with `strict` if anything in it, or a task's program, has an error."""
    if not strict and not any(diagnostic.scope in SCOPES
                              for diagnostic in found.diagnostics):
        return
    lines = dict.fromkeys(
        diagnostic.text(options.config) for diagnostic in found.diagnostics
        if strict or not diagnostic.scope.startswith("task "))
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        raise Error(f"{plural(len(lines), 'error')} in {options.config}", "",
                    EXIT_CONFIG)


def valid_config(options, with_facts: bool = True) -> Config:
    """Return the configuration that was named. Raises Error if it cannot be
    used."""
    found = loaded(options.config, with_facts)
    require_valid(found, options)
    return found.config


def command_init(options) -> int:
    """Write the sample configuration to a new file, for the user of
    `sample_user`, and make its directories. Raises Error and OSError."""
    import json
    try:
        fd = os.open(options.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                     | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise Error(f"{options.config} already exists",
                    f"{PROG} -c PATH init") from None
    user = sample_user()
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(SAMPLE.replace('"root"', json.dumps(
            user.name if user else "root", ensure_ascii=False)))
    if os.geteuid() == 0 and not user:
        print(f"user.name in {options.config} is root, because this host "
              "does not have exactly one ordinary user")
    directory = os.path.dirname(os.path.abspath(options.config))
    for name, given_to in (("tasks", None), ("logs", None), ("local", user)):
        make_directory(os.path.join(directory, name), given_to)
    print(paint(options, "32", f"Created {options.config}") + ", tasks, logs "
          "and local; next: " + with_config("mission new etc",
                                            options.config))
    return EXIT_OK


def make_directory(path: str, owner: Account | None) -> None:
    """Make a directory that `init` names, unless there is one; root gives a
    new one to `owner`. Raises OSError."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        owner = None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if owner and os.geteuid() == 0:
        os.fchown(fd, owner.uid, owner.gid)
    os.close(fd)


def command_check(options) -> int:
    """Report every error of the configuration and of the tasks' scripts; and
    notes on stdout, if there is no error."""
    found = loaded(options.config)
    require_valid(found, options, strict=True)
    for note in found.notes:
        print(note.text(options.config))
    return EXIT_OK


def command_dump(options) -> int:
    """Print the configuration as JSON, all paths and defaults included."""
    return print_json(as_json(valid_config(options)))


def command_list(options) -> int:
    """Print the slugs of the tasks, or more with -v and --json."""
    tasks = valid_config(options, with_facts=False).tasks
    if options.json:
        return print_json([{
            "slug": task.slug, "name": task.name or task.slug,
            "type": task.type, "scheduled": task.scheduled,
            "post": task.post} for task in tasks])
    for task in tasks:
        if options.verbose:
            when = paint(options, "32", "scheduled") if task.scheduled \
                else paint(options, "31", "manual")
            name = paint(options, "1", escape_controls(task.name or task.slug))
            print(f"{escape_controls(task.slug)} [{name}, {when}"
                  f"{', post' if task.post else ''}]")
        else:
            print(escape_controls(task.slug))
    return EXIT_OK


def command_run(options) -> int:
    """Run tasks, or print the plan with --dry-run. Raises Error.

    The lock comes first: everything after it may take long.
    """
    os.umask(0o022)             # the same by hand as from cron
    source = read_source(options.config)
    refuse_hopeless(source, options)
    if options.dry_run:
        return print_plan(validated(source), options)
    refuse_run_of_root(source.real_path, options.config)
    state = state_of(source.real_path, Clock())
    try:
        state.acquire(options.wait)
        found = validated(source)
        require_valid(found, options)
    except Error as error:
        if options.headless and error.status in (EXIT_BUSY, EXIT_CONFIG):
            report_no_start(validated(source), state, error, options)
        raise
    steps = plan(found.config, options.tasks, options.headless, options.quiet)
    return perform(found, steps, state, options)


def refuse_hopeless(source: ConfigSource, options) -> None:
    """Raise Error for an unknown slug, or if others can change what root
    would use here."""
    found = validated(source, with_facts=False)
    refuse_untrusted(found, options)
    if options.tasks and found.config and not found.diagnostics:
        select_tasks(found.config, options.tasks)


def refuse_untrusted(found: LoadedConfig, options) -> None:
    """Raise Error if others can change the configuration. It is reported to
    stderr and syslog only: the addresses in the file are not trusted."""
    writer = HostInspector().config_writer(found.config) if found.config \
        else ""
    if writer:
        text = f"{options.config} is not trusted: {writer}"
        Processes(Clock()).run_in_child(SYSLOG_SECONDS, log_to_syslog, text)
        raise Error(text, protection(writer), EXIT_CONFIG)


def log_to_syslog(text: str) -> str:
    """Send an error to syslog. It blocks while syslogd takes nothing."""
    import syslog
    syslog.openlog(PROG, syslog.LOG_PID, syslog.LOG_CRON)
    syslog.syslog(syslog.LOG_ERR, escape_controls(text))
    return ""


def report_no_start(found: LoadedConfig, state: StateDirectory,
                    error: Error, options) -> None:
    """Mail and ping that a run cannot begin, with the sections that are
    valid; about a lock that is held, once for each holder."""
    if not found.config:
        return
    is_busy = error.status == EXIT_BUSY
    try:
        if is_busy and not state.is_first_alert():
            return
    except OSError:
        pass                    # a full disk: rather twice than never
    clock = Clock()
    processes, log = Processes(clock), RunLog(clock, False)
    log.fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    config = config_for_alert(found, is_busy)
    runner = Runner(config, processes, Delivery(config, processes), state,
                    log, True, {})
    runner.report_no_start(error.message, "".join(
        each.text(options.config) + "\n" for each in found.diagnostics))


def config_for_alert(found: LoadedConfig, is_busy: bool) -> Config:
    """Return the configuration with mail and ping off where they are invalid
    or, unless only the lock is the reason, need passBin."""
    config, wrong = found.config, {
        each.what.partition(".")[0] for each in found.diagnostics
        if each.what.startswith(("mail", "ping", "user.email"))
        and each.scope != "address"}
    mail, smtp = config.mail, config.mail.smtp
    needs_password = bool(smtp and smtp.pass_name and mail.type == "smtp")
    if wrong & {"mail", "user"} or needs_password and not is_busy:
        mail = mail.replace(enabled=False)
    ping = config.ping.replace(enabled=False) if "ping" in wrong \
        else config.ping
    return config.replace(mail=mail, ping=ping, filters=(), redact=())


def print_plan(found: LoadedConfig, options) -> int:
    """Print what a run would do. Raises Error if it could not begin."""
    require_valid(found, options)
    steps = plan(found.config, options.tasks, options.headless, options.quiet)
    for place, step in enumerate(steps, start=1):
        print(f"{place:3}. {step_text(step, found.config)}")
        for line in obstacles(step, found):
            print(f"     {escape_controls(line)}")
    marked = {f"{word} {step.storage.name}" for step in steps if step.storage
              for word in ("storage", "chown")}
    for scope, errors in found.errors().items():
        for why in () if scope.startswith("task ") or scope in marked \
                else errors:
            print(f"     problem: {escape_controls(why)}")
    return EXIT_OK


def obstacles(step: Step, found: LoadedConfig):
    """Yield why a step would fail now. An earlier step may change that: it
    may mount a storage."""
    errors, storage = found.errors(), step.storage
    for task in step.tasks:
        for why in errors.get(f"task {task.slug}", ()):
            yield f"{task.slug} cannot start: {why}"
        for why in condition_errors(task, found.config):
            yield f"{task.slug} cannot start now: {why}"
    if step.kind in ("chown", "commit"):
        why = storage_error(storage, step.kind == "commit")
        yield from [why] if why else errors.get(
            f"{step.kind} {storage.name}", ())


def perform(found: LoadedConfig, steps: list[Step], state: StateDirectory,
            options) -> int:
    """Carry out the steps of a run; its exit status. Raises Error.

    Here, and only here, the parts of a run are put together.
    """
    clock, config = state.clock, found.config
    processes = Processes(clock)
    processes.listen()
    log = RunLog(clock, options.colour and not options.headless)
    runner = Runner(config, processes, Delivery(config, processes), state,
                    log, options.headless, found.errors(),
                    bool(options.tasks))
    if options.headless:
        log.open(config.directory("logs"), runner.started)
    status = runner.carry_out(steps)
    if status:
        raise Error(closing_words(runner.problems, processes.stopped), "",
                    status)
    return status


def refuse_run_of_root(real_path: str, config: str) -> None:
    """Raise Error if root runs the configuration `config`: others cannot see
    root's lock, so two runs could meet."""
    if os.geteuid() and os.path.isdir(os.path.join(
            "/var/lib/mission", state_name(real_path))) \
            and not os.environ.get("MISSION_STATE"):
        raise Error("permission denied: root runs this configuration, and "
                    "root's lock is not visible to other users",
                    "sudo " + with_config("mission run", config),
                    EXIT_BUSY)


def recorded_runs(options) -> list[dict]:
    """Return the runs of the configuration, see `runs_of`. Raises Error."""
    path = os.path.abspath(options.config)
    state = state_of(answer_about(
        path, lambda _send: os.path.realpath(path), EXIT_CONFIG), Clock())
    runs = answer_about(state.directory, lambda _send: runs_of(state)
                        if os.access(state.directory, os.R_OK) else None)
    if runs is None:
        raise Error(f"no runs recorded for {options.config}"
                    + (" by this user" if os.geteuid() else ""),
                    f"{PROG} -c FILE history")
    return runs


def runs_of(state: StateDirectory) -> list[dict]:
    """Return the runs of the history, and the one that is running or was lost.
    """
    runs, current = state.history(), state.read_current()
    known = {run["id"]: run for run in runs}
    ended = unrecorded_end(current, known)
    if current and not ended and current["id"] not in known:
        runs.append(past_run(
            current, "running" if state.is_locked() else "lost"))
    return [run for run in runs
            if run["id"] not in {end["id"] for end in ended}] + ended


COLOURS = {"ok": "32", "running": "36", "undelivered": "33"}


def public_record(run: dict) -> dict:
    """Return the record of a run as --json prints it: with one time, which
    is RFC 3339."""
    return {key: value for key, value in run.items() if key != "started"}


def command_history(options) -> int:
    """Print the last runs, and how long each task took in them."""
    runs = recorded_runs(options)
    shown = runs[-options.number:]
    if options.json:
        return print_json([public_record(run) for run in shown])
    print(f"{'RUN':8}  {'STARTED':25}  {'TOOK':>12}  RESULT")
    for run in shown:
        took = "-" if run["seconds"] is None else format_duration(
            run["seconds"])
        failed = [task["slug"] for task in run["tasks"]
                  if task["outcome"] == "failed"]
        detail = ", ".join(failed) if failed else (
            f"in {run['last']}" if run["result"] in ("lost", "running")
            else "")
        result = paint(options, COLOURS.get(run["result"], "31"),
                       run["result"])
        print(f"{run['id'][:8]:8}  {run['start']:25}  {took:>12}  {result}"
              + f": {escape_controls(detail)}" * bool(detail))
    durations = good_durations(runs)
    if durations:
        print("\nHow long the tasks took, the newest on the right:")
    width = max(map(len, durations), default=0)
    for slug, seconds in durations.items():
        print(f"{slug:{width}}  {sparkline(seconds[-40:])}  "
              f"{format_duration(seconds[-1])}")
    return EXIT_OK


def command_status(options) -> int:
    """Print whether the last complete run is good and recent; return the
    exit status of a monitoring plugin, see HEALTH_WORDS. Raises Error."""
    found = loaded(options.config, with_facts=False)
    for error in found.diagnostics:
        raise Error(error.text(options.config), "", EXIT_CONFIG)
    config = found.config
    runs = recorded_runs(options)
    slugs = [task.slug for task in config.tasks if task.scheduled]
    status, reasons = health(slugs, runs, options.max_age, Clock().now())
    last = next((run for run in reversed(runs) if not run["partial"]
                 and run["result"] != "running"), None)
    if options.json:
        print_json({"status": status, "word": HEALTH_WORDS[status],
                    "reasons": reasons,
                    "lastRun": last and public_record(last)})
    else:
        text = "; ".join(reasons) or f"last run: {last['start']}"
        print(escape_controls(f"{HEALTH_WORDS[status]}: {text}"))
    return status


def command_log(options, run: str = "") -> int:
    """Print or page the saved log of a run, by default of the newest one.

    `run` is the beginning of its ID or of the file's name. Raises Error.
    """
    runs = [r for r in recorded_runs(options)
            if r.get("log") and (not run or r["id"].startswith(run)
                                 or os.path.basename(r["log"]).startswith(
                                     run))]
    if not runs:
        raise Error(f"no saved log of run {quoted(run)}" if run else
                    "no saved logs: only a run with --headless saves its log",
                    "mission history" if run else "")
    path = runs[-1]["log"]
    return write_paged(lambda write: answer_about(
        path, lambda send: send_log(send, path), on_message=write))


def send_log(send, path: str) -> None:
    """Send the lines of a saved log in pieces, safe for a terminal. Raises
    Error."""
    try:
        with open_regular(path, os.O_NOFOLLOW) as file:
            lines = file.readlines(CHUNK)
            while lines:
                text = b"".join(lines).decode("utf-8", "backslashreplace")
                send("".join(escape_controls(line) + "\n" for line
                             in text.removesuffix("\n").split("\n")))
                lines = file.readlines(CHUNK)
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None


def command_help(_options, topic: str = "") -> int:
    """Print a topic or the help of a command. Raises Error."""
    if topic in TOPICS:
        return print_paged(topic_text(topic))
    if topic in COMMANDS:
        return print_paged(command_help_text(topic))
    if topic:
        raise unknown_word("topic", topic, [*TOPICS, *COMMANDS],
                           f"{PROG} help")
    for name, (title, _) in TOPICS.items():
        print(f"{PROG} help {name:12} {title}")
    print(f"{PROG} help COMMAND      its options and examples")
    return EXIT_OK


def command_man(_options, topic: str = "") -> int:
    """Print a manual page: mission(1), or that of a topic. Raises Error."""
    if topic and topic not in TOPICS:
        raise unknown_word("topic", topic, TOPICS, f"{PROG} man")
    print(manual_page(f"{PROG}-{topic}", 7, TOPICS[topic][0],
                      topic_text(topic)) if topic else
          manual_page(PROG, 1, TITLE, manual_text()), end="")
    return EXIT_OK


def command_version(_options) -> int:
    """Print the version."""
    print(f"{PROG} {VERSION}")
    return EXIT_OK


def readable_config(options) -> Config:
    """Return the configuration, which may have errors in its values, but not
    in that of storage.tasks. Raises Error; also if it is not to be trusted."""
    source = read_source(options.config)
    found = validated(source, with_facts=False)
    refuse_untrusted(found, options)
    config = found.config
    if config:
        config = resolved(config, HostInspector().home_of,
                          DiagnosticList(""))
    if not config or "tasks" not in config.storage \
            or not config.directory("tasks"):
        for error in found.diagnostics:
            print(error.text(options.config), file=sys.stderr)
        raise Error(f"{options.config}: storage.tasks has no valid path",
                    "mission check", EXIT_CONFIG)
    return config


def command_new(options, slug: str) -> int:
    """Make TASKS_DIR/slug/run and print the line for the configuration.

    Both get the owner of the tasks' directory. Raises Error.
    """
    if not is_label(slug, LOWER + DIGITS):
        raise Error(f"invalid slug {quoted(slug)} ({SLUG_RULE})", "",
                    EXIT_USAGE)
    config = readable_config(options)
    directory = config.directory("tasks")
    path = os.path.join(directory, slug, "run")
    try:
        tasks = open_directory(directory)
        owner = os.fstat(tasks)
        os.mkdir(slug, 0o755, dir_fd=tasks)
        below = os.open(slug, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                       , dir_fd=tasks)
        fd = os.open("run", os.O_WRONLY | os.O_CREAT | os.O_EXCL
                     | os.O_NOFOLLOW, 0o755, dir_fd=below)
        write_all(fd, TASK_SCRIPT.replace("{slug}", slug).encode())
        for made in (fd, below):
            if os.geteuid() == 0:   # the owner of the directory edits it
                os.fchown(made, owner.st_uid, owner.st_gid)
            os.close(made)
    except FileExistsError:
        raise Error(f"{os.path.dirname(path)} already exists",
                    f"edit {shell_word(path)}") from None
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None
    print(f"Created {path}")
    if any(task.slug == slug for task in config.tasks):
        print(f'"{slug}" is already listed in {options.config}')
    else:
        print(f"Add this line to the tasks of {options.config}:\n"
              f'{{ "slug": "{slug}", "name": "{slug.capitalize()}", "type": '
              '"exec", "scheduled": true },')
    return EXIT_OK


def command_completion(_options, shell: str) -> int:
    """Print the completion for a shell."""
    names = " ".join(option.names[-1] for option in OPTIONS.values())
    print(COMPLETIONS[shell].replace("COMMANDS", " ".join(COMMANDS)).replace(
        "OPTIONS", names), end="")
    return EXIT_OK


def unit_word(word: str) -> str:
    """Return a word that systemd reads as `word`: in quotes, with its
    escapes, and with nothing that it expands (systemd.syntax(7))."""
    import re
    text = "".join(
        chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"
        for byte in os.fsencode(re.sub(r'([\\"])', r"\\\1", word)))
    text = text.replace("%", "%%")
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else f'"{text}"'


def unit_command(words: list[str]) -> str:
    """Return a command for ExecStart=, which expands $ after its first word
    (systemd.service(5))."""
    program, *arguments = map(unit_word, words)
    return " ".join([program] + [word.replace("$", "$$")
                                 for word in arguments])


def unit_header(path: str) -> str:
    """Return the comment that says where to put the units of the configuration
    at `path`, and how to enable them."""
    import re
    import shlex
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", os.path.basename(path).split(".")[0])
    root = os.geteuid() == 0
    return UNIT_HEADER.format(
        program=escape_controls(f"{PROG} -c {shlex.quote(path)}"),
        name=PROG if stem in (PROG, "") else f"{PROG}-{stem}",
        directory="/etc/systemd/system" if root else "~/.config/systemd/user",
        systemctl="systemctl" if root else "systemctl --user") \
        + ("" if root else UNIT_LINGER)


def command_unit(options, kind: str) -> int:
    """Print a unit of systemd that runs this configuration. Raises Error.

    The configuration may be invalid still: a run reports that.
    """
    path, program = read_source(options.config).path, os.path.abspath(__file__)
    words = [program] if os.access(program, os.X_OK) else [
        sys.executable, "-IS", program]
    kept = {name: os.environ[name] for name in ("MISSION_STATE",
                                                "XDG_STATE_HOME")
            if os.environ.get(name)}
    root = os.geteuid() == 0
    print(UNITS[kind].format(
        header=unit_header(path), after=UNIT_AFTER if root else "",
        closed=UNIT_CLOSED if root else "",
        command=unit_command([*words, "-c", path, "run", "--headless"]),
        environment="".join(f"Environment={unit_word(f'{n}={value}')}\n"
                            for n, value in kept.items())), end="")
    return EXIT_OK


class Command(FrozenRecord):
    """A command, for the parser, the help and the completion scripts."""
    handler: object             # function(options, *arguments) -> exit status
    group: str                  # its place in `mission --help`
    help: str                   # a verb phrase
    own_options: tuple = ()     # names of OPTIONS, besides COMMON_OPTIONS
    arguments: str = ""         # "SLUG"; "[RUN]" may be left out
    text: str = ""              # a paragraph for its help
    examples: tuple = ()        # command lines for its help
    topic: str = "behaviour"    # where to read more

    @property
    def options(self) -> tuple:
        """The names of all its options."""
        return self.own_options + COMMON_OPTIONS


COMMANDS = {
    "init": Command(
        command_init, "set up", "write a sample configuration",
        text="Writes mission.config.json, or the file of -c, and makes the "
        "directories that it names. user.name becomes the user that called "
        "sudo, else the caller. For root it is the only ordinary account, or "
        "root.",
        examples=("mission init", "mission -c /etc/mission.json init"),
        topic="config"),
    "new": Command(
        command_new, "set up", "create a task", arguments="SLUG",
        text="Writes TASKS_DIR/SLUG/run, an executable script, and prints the "
        "line for the configuration if it is missing there.",
        examples=("mission new etc",), topic="tasks"),
    "check": Command(
        command_check, "set up", "validate the configuration",
        text="Prints every error with its line and column to stderr, and "
        "notes to stdout. It checks what the configuration names as well: "
        "programs, users, directories, repositories.",
        examples=("mission check", "mission -c /etc/mission.json check"),
        topic="config"),
    "dump": Command(
        command_dump, "set up", "print the configuration as JSON",
        text="Prints every key, with paths resolved and defaults filled in. "
        "The output is a valid configuration.",
        examples=("mission dump",), topic="config"),
    "list": Command(
        command_list, "set up", "list the tasks", ("json",),
        text="Prints the slugs; with -v the names as well, and which tasks "
        "are scheduled or post tasks.",
        examples=("mission list -v", "mission list --json"), topic="tasks"),
    "unit": Command(
        command_unit, "set up", "print a systemd unit for nightly runs",
        arguments="service|timer",
        text="The comment at the top of the unit says where to put the unit "
        "and how to enable it.",
        examples=("mission unit service > /etc/systemd/system/mission.service",
                  "mission unit timer > /etc/systemd/system/mission.timer")),
    "run": Command(
        command_run, "runs", "run the scheduled tasks, or those of -t",
        ("tasks", "headless", "dry_run", "wait"),
        text="By hand the log goes to the terminal. With --headless it goes "
        "to a file in storage.logs, and mail and ping are sent.",
        examples=("mission run --dry-run", "mission run -t etc -t home",
                  "mission -c /etc/mission.json run --headless --wait 30m")),
    "history": Command(
        command_history, "runs", "list past runs", ("number", "json"),
        text="When each run started, how long it took and how it ended; the "
        "newest is the last. Below it are the durations of each task.",
        examples=("mission history -n 5", "mission history --json"),
        topic="status"),
    "log": Command(
        command_log, "runs", "print a saved run log (default: the newest)",
        arguments="[RUN]",
        text="RUN is the beginning of the run's ID, as `mission history` "
        "prints it, or of the name of the log file. On a terminal the log "
        "goes through $PAGER.",
        examples=("mission log", "mission log 2026-03-29"), topic="status"),
    "status": Command(
        command_status, "runs", "report success or failure to a monitor",
        ("max_age", "json"),
        text="Prints one line to stdout. The exit status is 0 (ok), 1 "
        "(warning), 2 (critical) or 3 (unknown), as monitoring plugins have "
        "it.",
        examples=("mission status --max-age 26h",), topic="status"),
    "completion": Command(
        command_completion, "more", "print completion for a shell",
        arguments="bash|zsh|fish",
        text="Prints a script for the shell. Its first line says where to "
        "put it.",
        examples=("mission completion bash > "
                  "/etc/bash_completion.d/mission",)),
    "help": Command(
        command_help, "more", "print help about a topic or a command",
        arguments="[TOPIC]",
        text="Without TOPIC it lists the topics. On a terminal the text goes "
        "through $PAGER.",
        examples=("mission help config", "mission help run")),
    "man": Command(
        command_man, "more", "print a manual page in roff",
        arguments="[TOPIC]",
        text="Without TOPIC it is the page mission(1).",
        examples=("mission man > /usr/local/share/man/man1/mission.1",
                  "mission man config | man -l -")),
    "version": Command(
        command_version, "more", "print the version",
        text="Prints the name and the version, as --version does.",
        examples=("mission version",)),
}


def usage() -> str:
    """Return the text of `mission --help`."""
    rows, before = "", ""
    for name, command in COMMANDS.items():
        group = "" if command.group == before else command.group
        before = command.group
        rows += f"{group:8}{f'{name} {command.arguments}':28}{command.help}\n"
    return (f"{PROG}: {TITLE}.\n"
            f"Usage: {PROG} [-c FILE] COMMAND [OPTION]... [ARGUMENT]\n\n"
            f"{rows}\n{PROG} help COMMAND shows options and examples. "
            f"{PROG} help TOPIC explains:\n{', '.join(TOPICS)}.\n")


def usage_line(name: str) -> str:
    """Return the usage of a command with its own options."""
    command = COMMANDS[name]
    return " ".join(filter(None, [
        PROG, name, *(OPTIONS[key].synopsis for key in command.own_options),
        command.arguments]))


def command_help_text(name: str) -> str:
    """Return the text of `mission COMMAND --help`."""
    import textwrap
    command = COMMANDS[name]
    usage_text = textwrap.fill(f"{usage_line(name)} [OPTION]...", 72,
                               break_on_hyphens=False,
                               subsequent_indent=" " * 9)
    return (f"{PROG} {name}: {command.help}\n\nUsage: {usage_text}\n\n"
            f"{textwrap.fill(command.text, 79)}\n\nOptions:\n"
            f"{option_rows(command.options)}\nExamples:\n"
            + "".join(f"  {line}\n" for line in command.examples)
            + f"\nSee also: {PROG} help {command.topic}\n")


def manual_text() -> str:
    """Return the text of mission(1), in the form of a topic."""
    def rows(terms: dict) -> str:
        return "\n".join(map(term_row, terms, terms.values()))

    commands = {usage_line(name): command.text
                for name, command in COMMANDS.items()}
    options = {option.spelling: option.help + "."
               for option in OPTIONS.values()}
    lines = dict.fromkeys(line for command in COMMANDS.values()
                          for line in command.examples)
    return MANUAL.format(
        commands=rows(commands), options=rows(options),
        statuses=STATUS_MEANINGS.rstrip("\n"),
        examples="\n".join(f"    {line}" for line in lines),
        pages=", ".join(f"`{PROG}-{name}`(7)" for name in TOPICS))


def open_standard_streams() -> None:
    """Open the standard streams that the caller closed: else the next file
    that is opened would become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r",
                                    closefd=False))


def report_error(error: Error, config: str) -> None:
    """Print an error and its hint to stderr, unless that is a closed pipe.
    The command of the hint gets the configuration `config`."""
    lines = [f"{PROG}: error: {error.message}"]
    if error.hint:
        lines.append(f"{PROG}: hint: {with_config(error.hint, config)}")
    try:
        sys.stdout.flush()
        sys.stderr.write("".join(escape_controls(line) + "\n"
                                 for line in lines))
        sys.stderr.flush()
    except BrokenPipeError:
        for fd in (1, 2):       # or Python reports it again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def exit_status_of(error: Error, argv: list[str]) -> int:
    """Report an error as the command does; return the exit status."""
    if command_word(argv) == "status":  # a plugin writes to stdout
        print(f"{HEALTH_WORDS[UNKNOWN]}: {escape_controls(error.message)}")
        return UNKNOWN
    report_error(error, named_config(argv))
    return error.status


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. The only way out."""
    argv = sys.argv[1:] if argv is None else argv
    open_standard_streams()
    if argv[:1] == ["_builtin"]:        # the process of a built-in task
        # Not sys.exit, which waits for all threads of the task.
        os._exit(run_builtin(argv[1], argv[2], int(argv[3])))
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):      # cron has no locale
                stream.reconfigure(encoding="utf-8",
                                   errors="backslashreplace")
        try:
            require_modules(NEEDED_MODULES)
            command, options, arguments = parse_arguments(argv)
            status = command.handler(options, *arguments)
        except ExitWithText as text:
            print(text, end="")
            status = EXIT_OK
        sys.stdout.flush()
        return status
    except Error as error:
        return exit_status_of(error, argv)
    except BrokenPipeError:             # mission list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13         # as a program that SIGPIPE ended
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
    except OSError as error:            # a full disk, no descriptor left
        return exit_status_of(Error(reason_of(error)), argv)


if __name__ == "__main__":
    sys.exit(main())
