"""Arguments, with real shells: a value never runs, and it arrives whole.

A job's {{name, type, default}} is filled in by somebody else than who wrote
the tab. Here are the templates that koitab takes and those that it refuses,
hostile values, and the shells that run jobs. A value that is run makes a
file, the canary. The default run has one in eight of each matrix.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import support

koitab = support.load("koitab")
ONE_IN = 1 if support.FULL else 8
MUST = ["dash", "bash", "busybox"]
SHELLS = MUST + [shell for shell in ("zsh", "mksh", "ksh93")
                 if support.find(shell)]
RICH = {"bash", "zsh", "mksh", "ksh93"}     # with <<< and arrays
SHOW = "#!/bin/sh\nprintf '%s\\0' \"$@\" >> \"${0%/*}/../seen\"\n"


def job_of(command: str):
    """The job of this command. Its line must be without an error."""
    found = koitab.parse_tab(f"@manual {command}\n", root=True)
    assert [problem.text("tab") for problem in found.errors()] == []
    return found.jobs[0]


def is_warned_of(command: str) -> bool:
    found = koitab.parse_tab(f"@manual {command}\n", root=True)
    assert found.jobs, (command, found.errors())
    return any(p.what == "unsafe argument" for p in found.diagnostics)


class Room:
    """A directory where jobs run. The program `show` notes its arguments, and
    `showv` the variable V."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder / "here", folder / "seen"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.folder.mkdir()
        for name, text in (("show", SHOW),
                           ("showv", SHOW.replace("$@", "$V"))):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        for tool in ("cat", "env", "true", "sed", "xargs"):
            (self.bin / tool).symlink_to(support.find(tool))

    def run(self, shell: str, script: str, values: list,
            path: str = "") -> list[bytes]:
        """Run a job's script as koid does; the arguments that `show` got."""
        self.seen.write_bytes(b"")
        env = {"PATH": path or str(self.bin), "HOME": str(self.folder)}
        env.update((f"KOI_ARG_{number}", value)
                   for number, value in enumerate(values, start=1))
        subprocess.run(
            [support.find(shell)] + ["sh"] * (shell == "busybox")
            + ["-c", script], cwd=self.folder, env=env, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        return self.seen.read_bytes().split(b"\0")[:-1]

    def canary(self) -> bool:
        return (self.folder / "CANARY").exists()

    def tidy(self) -> None:
        """Away with what the last job has left."""
        for entry in os.scandir(self.folder):
            os.unlink(entry.path)


@pytest.fixture
def room(tmp_path):
    support.need(*MUST)
    return Room(tmp_path / "room")


def with_shells(cases: list):
    """Each case with each shell, or with one of them, by turns."""
    return itertools.product(cases, SHELLS) if support.FULL else zip(
        cases, itertools.cycle(SHELLS))


def in_parts(work, cases: list, folder: Path) -> int:
    """Have all cases done, by as many workers as there are processors, each
    in its own room; the sum of what `work` returns."""
    many = os.cpu_count() or 1
    rooms = [Room(folder / str(number)) for number in range(many)]
    with ThreadPoolExecutor(many) as pool:
        return sum(pool.map(work, rooms, (cases[number::many]
                                          for number in range(many))))


# --- what arrives ---------------------------------------------------------

RUN = ":>CANARY"        # what hostile values try to have run
PAYLOADS = [
    f"$({RUN})", f"`{RUN}`", f"'; {RUN}; '", f'"; {RUN}; "', f"x\n{RUN}\n",
    f"a[$({RUN})]", f"a[$({RUN})]=1", f"; {RUN};", f"| {RUN}", f"&& {RUN}",
    f"\\$({RUN})", f"'$({RUN})'", f'"$({RUN})"', f"}}$({RUN})",
    f")$({RUN})", f"]$({RUN})", f"))$({RUN})", f"${{V:=$({RUN})}}",
    f"$[a[$({RUN})]]", f"$((a[$({RUN})]))", f"<({RUN})", "> CANARY",
    f"\nEOF\n{RUN}\n", f"() {{ :; }}; {RUN}", f"{{{{$({RUN})}}}}",
    "", " ", "\\", "\\" * 7, "'", '"', "''", '""', "'\\''", "o'brien", "!!",
    "*", "?", "[a-z]*", "~", "~root", "-rf", "--", "-n", "-e", "{{x}}",
    "{a,b}", "${KOI_ARG_1}", "$KOI_ARG_2", "$HOME", "$$", "$@", "%", "\\%",
    "%s%n", "=", "=x", "#", "# x", "!", "!x", "a  b\tc", "\t", " lead",
    "trail ", "two\nlines", "\n", "\n\n", "end\n", "\r", "a\r\nb", "\x1b[2J",
    "\x01\x7f", "\u00e9\U0001f600\u202e", "e\u0301", b"\xff\xfe\x80",
    "x" * 60_000, "'" * 4096, "(", ")", ";", "&", "|", "<", ">", "^", "1;2",
]

# The template, and what `show` gets: {} stands for the value. "": only no
# canary, for what `show` gets depends on the value. (So it does after a tilde
# in zsh and ksh93, for which ~"" is a directory.)
TAKEN = {
    "a word": ("show {{v, text, }}", ["{}"]),
    "part of a word": ("show --to={{v, text, }}.x", ["--to={}.x"]),
    "twice": ("show {{v, text, }} {{v}}", ["{}", "{}"]),
    "twice in a word": ("show {{v, text, }}{{v}}", ["{}{}"]),
    "beside quotes": ("show 'q'{{v, text, }}\"r\"", ["q{}r"]),
    "after a tilde": ("show ~{{v, text, }}", ["~{}"]),
    "after a hash": ("show a#{{v, text, }}", ["a#{}"]),
    "after two backslashes": (r"show \\{{v, text, }}", [r"\{}"]),
    "after a percent": (r"show \%{{v, text, }}", ["%{}"]),
    "before the input": ("show {{v, text, }}%input%", ["{}"]),
    "after --": ("show -- {{v, text, }}", ["--", "{}"]),
    "an assignment": ('V={{v, text, }}; show "$V"', ["{}"]),
    "part of an assignment": ('V=a{{v, text, }}b; show "$V"', ["a{}b"]),
    "a command's variable": ("V={{v, text, }} showv", ["{}"]),
    "env": ("env V={{v, text, }} showv", ["{}"]),
    "export": ("export V; V={{v, text, }}; showv", ["{}"]),
    "case": ("case {{v, text, }} in no) ;; *) show {{v}};; esac", ["{}"]),
    "a pattern of case": (
        "case no in {{v, text, }}) ;; *) show {{v}};; esac", ["{}"]),
    "a test": ("[ {{v, text, }} = {{v}} ] && show {{v}}", ["{}"]),
    "a subshell": ("(show {{v, text, }}; true)", ["{}"]),
    "a group": ("{ show {{v, text, }}; }", ["{}"]),
    "if": ("if show {{v, text, }}; then show {{v}}; fi", ["{}", "{}"]),
    "for": ('for x in {{v, text, }} k; do show "$x"; done', ["{}", "k"]),
    "while": ("while show {{v, text, }}; do break; done", ["{}"]),
    "a function": ('f() { show "$1"; }; f {{v, text, }}', ["{}"]),
    "set": ('set -- {{v, text, }}; show "$@"', ["{}"]),
    "a pipe": ("true | show {{v, text, }} | cat", ["{}"]),
    "a list": ("false || true && show {{v, text, }}; true", ["{}"]),
    "the background": ("show {{v, text, }} & wait", ["{}"]),
    "not": ("! show {{v, text, }}", ["{}"]),
    "after $(..)": ("show $(true) {{v, text, }}", ["{}"]),
    "after backquotes": ("show `true` {{v, text, }}", ["{}"]),
    "after ${..}": ("show ${NO:-$(true)} {{v, text, }}", ["{}"]),
    "after a sum": ("show $((1+(2))) {{v, text, }}", ["3", "{}"]),
    "after quotes": ("show 'a\"b' \"c'd\" {{v, text, }}",
                     ['a"b', "c'd", "{}"]),
    "exec": ("exec show {{v, text, }}", ["{}"]),
    "beside a redirection": ("show {{v, text, }} > out 2>&1 < /dev/null",
                             ["{}"]),
    "a redirection": ("show k > {{v, text, }}", ""),
    "the input's name": ("show k < {{v, text, }}", ""),
    "the program": ("{{v, text, }} k", ""),
}
RICHER = {
    "a here-string": ("show {{v, text, }} <<< {{v}}", ["{}"]),
    "an array": ('x=(a {{v, text, }}); show "${x[@]}"', ["a", "{}"]),
    "an array's entry": ('x[1]={{v, text, }}; show "${x[1]}"', ["{}"]),
}


def as_bytes(value) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def expected(pattern: list, value) -> list[bytes]:
    return [piece.encode().replace(b"{}", as_bytes(value))
            for piece in pattern]


def hostile(dice: random.Random) -> str:
    """A value of up to 40 pieces that shells know."""
    parts = [*"'\"\\`$(){}[]<>|&;*?~#!=%^ \t\n", "$(", "${", "$((", "))",
             RUN, "a[", "EOF", "\n", "$'", "<<", "é", "-", "{{", "}}"]
    return "".join(dice.choices(parts, k=dice.randrange(40)))


def matrix(shell: str, dice: random.Random) -> list[tuple]:
    """Each template with each payload, then with others by chance. Of these
    a sample, other pairs for each shell: all templates, all payloads."""
    contexts = {**TAKEN, **(RICHER if shell in RICH else {})}
    first = SHELLS.index(shell)
    cases = [(name, value) for row, name in enumerate(contexts, start=first)
             for column, value in enumerate(PAYLOADS)
             if (row + column) % ONE_IN == 0]
    return cases + [(dice.choice(list(contexts)), hostile(dice))
                    for _ in range(3_500 // ONE_IN)]


def arrive(shell: str, room: Room, cases: list[tuple]) -> int:
    for name, value in cases:
        command, pattern = {**TAKEN, **RICHER}[name]
        seen = room.run(shell, job_of(command).script, [value])
        assert not room.canary(), (shell, command, value)
        if pattern and not (shell in ("zsh", "ksh93") and "~" in command):
            assert seen == expected(pattern, value), (shell, command, value)
        room.tidy()
    return len(cases)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_value_arrives_unchanged_and_none_is_executed(shell, tmp_path):
    support.need(shell)
    cases = matrix(shell, random.Random(91))
    done = in_parts(lambda room, part: arrive(shell, room, part), cases,
                    tmp_path)
    print(f"\n{shell}: {len({value for _, value in cases}):,} values in "
          f"{len({name for name, _ in cases})} templates: {done:,} runs, "
          "0 canaries", end=" ")
    assert {name for name, _ in cases} >= set(TAKEN)
    assert {value for _, value in cases} >= set(PAYLOADS)


def test_value_in_a_redirection_names_the_file_exactly(room):
    job = job_of("echo k > {{v, text, }}")
    for value, shell in with_shells(PAYLOADS):
        name = os.fsdecode(as_bytes(value))
        if not value or "/" in name or len(os.fsencode(name)) > 255:
            continue
        room.run(shell, job.script, [value])
        assert os.listdir(room.folder) == [name]
        room.tidy()


def any_value(dice: random.Random) -> bytes:
    """Up to 120 bytes of anything but NUL; half of them what shells know."""
    if dice.random() < 0.5:
        return hostile(dice).encode()
    return bytes(dice.choices(range(1, 256), k=dice.randrange(120)))


@pytest.mark.parametrize("shell", SHELLS)
def test_random_arguments_arrive_byte_for_byte(shell, room):
    """All 64 arguments that a job may have, time and again."""
    dice, sent = random.Random(SHELLS.index(shell)), 0
    job = job_of("show " + " ".join(f"{{{{p{n}, text}}}}" for n in range(64)))
    while sent < 20_000 // ONE_IN:
        values = [any_value(dice) for _ in range(64)]
        assert room.run(shell, job.script, values) == values
        sent += len(values)
    assert not room.canary()
    print(f"\n{shell}: {sent:,} random arguments, 0 altered", end=" ")


# --- the 27 contexts of a value that is put into the text -------------------

QUOTES = "remove the quotes: koi quotes the value itself"
ALONE = "make it a separate word of the command"
REFUSED = [     # the command, where the placeholder stands, the fix
    ('show "Hi {{v}}"', "in double quotes", QUOTES),
    ("show 'Hi {{v}}'", "in single quotes", QUOTES),
    ("show $'Hi {{v}}'", "in $'..'", QUOTES),
    ("show `show {{v}}`", "in backquotes", ALONE),
    ("show $(show {{v}})", "in $(..)", ALONE),
    ('show "$(show {{v}})"', "in $(..)", ALONE),
    ("show ${V:-{{v}}}", "in ${..}", ALONE),
    ('show "${V:-{{v}}}"', "in ${..}", ALONE),
    ("show $(({{v}}))", "in arithmetic", ALONE),
    ("cat <<EOF; {{v}}", "in a here-document",
     "pass it to a command as a word"),
    ("cat <<'EOF'; {{v}}", "in a here-document",
     "pass it to a command as a word"),
    ("show # {{v}}", "in a comment",
     "a # begins a comment; put the argument before it"),
    (r"show \{{v}}", "after a backslash", "remove the backslash"),
    ("sh -c 'show {{v}}'", "in single quotes", QUOTES),
    ('sh -c "show {{v}}"', "in double quotes", QUOTES),
    ('eval "show {{v}}"', "in double quotes", QUOTES),
    ("echo k | xargs sh -c 'show {{v}}'", "in single quotes", QUOTES),
    ("python3 -c 'print(\"{{v}}\")'", "in single quotes", QUOTES),
    ("awk 'BEGIN {print \"{{v}}\"}'", "in single quotes", QUOTES),
    # Beyond the known ones: what else a shell reads twice.
    ("show ${{v}}", "after a $", "remove the $"),
    ("show $[{{v}}]", "in arithmetic", ALONE),
    ("(( {{v}} ))", "in arithmetic", ALONE),
    ("show <(show {{v}})", "in <(..) or >(..)", ALONE),
    ("a[{{v}}]=1", "in an array's index", ALONE),
    ("a[ {{v}} ]=1", "in an array's index", ALONE),
    ("a[1 + {{v}}]=1", "in an array's index", ALONE),
    ("a[`true` {{v}}]=1", "in an array's index", ALONE),
    ("a=([ {{v}} ]=1)", "in an array's index", ALONE),
    ("a=(x [ {{v}} ]+=1)", "in an array's index", ALONE),
    ("a[\r{{v}}]=1", "in an array's index", ALONE),
    ("show >& {{v}}", "after >& or <&", "bash would read it twice; write "
     ">{{..}} 2>&1"),
    ("show >&x{{v}}", "after >& or <&", "bash would read it twice; write "
     ">{{..}} 2>&1"),
    ("show 1>&\r{{v}}", "after >& or <&", "bash would read it twice; write "
     ">{{..}} 2>&1"),
    ("show \"${V:-'}\"; (( ${W:+\"'}\"} {{v}} ))", "in arithmetic", ALONE),
    ("show \"${V:-'}\"; eval ${W:+\"'}\"} {{v}}", "after a ' in \"${..}\"",
     "shells disagree about this; use other quotes"),
    ("show *([ {{v}} ])", "in a pattern", ALONE),
    ("show ([ {{v}} ])", "in a pattern", ALONE),
    ("show%{{v}}", "after %", "the text after % is the job's input; write \\% "
     "for a percent sign"),
    ("show%{{.Name}} {{v}}", "after %", "the text after % is the job's "
     r"input; write \% for a percent sign"),
]
KNOWN = 19      # contexts in which a quoted word can still be evaluated
SAFE_IF_QUOTED = [      # where quote-and-substitute would do, and we do too
    "show {{v}}", "V={{v}}", "case {{v}} in x) ;; esac", "show > {{v}}",
    "{{v}}", "show ~{{v}}"]
REREAD = ["eval {{v}}", "echo k | xargs -I% sh -c {{v}}"]


def test_every_shell_context_is_classified():
    for command in SAFE_IF_QUOTED:
        assert job_of(command)
    for command in REREAD:
        assert is_warned_of(command.replace("-I%", "-I@"))
    assert KNOWN + len(SAFE_IF_QUOTED) + len(REREAD) == 27


def test_koitab_names_the_place_of_a_refused_placeholder_and_the_fix(tmp_path):
    """All at once, in one tab; and koid runs none of them."""
    file = tmp_path / "tab"
    tab = "".join(f"@manual {command}\n" for command, _, _ in REFUSED)
    file.write_bytes(tab.encode())
    done = subprocess.run(
        [*support.program("koitab"), "-T", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"HOME": str(tmp_path)}, timeout=60)
    said = done.stdout.decode()
    assert done.returncode == 1
    for line, (command, place, fix) in enumerate(REFUSED, start=1):
        column = len("@manual ") + command.index("{{v}}") + 1
        assert f"{file}:{line}:{column}: bad argument: the argument is " \
            f"{place} ({fix})\n" in said, command
    assert koitab.parse_tab(tab).jobs == []
    print(f"\n{len(REFUSED)} contexts refused, {KNOWN} of them known",
          end=" ")


@pytest.mark.parametrize("command", [line[0] for line in REFUSED])
def test_unsafe_context_is_refused_in_every_compound_command(command):
    for before, after in (("", ""), ("true; ", ""), ("(", ")"),
                          ("if true; then ", "; fi"), ("f() { ", "; }"),
                          ("case x in x) ", ";; esac"), ("V=1 ", " | cat"),
                          (">f ", ""), ("{{v}} ", "")):
        found = koitab.parse_tab(f"@manual {before}{command}{after}\n")
        assert found.jobs == [], before
        assert koitab.parse_tab(f"@daily {before}{command}{after}\n".replace(
            "{{v}}", "{{v, string, x}}")).jobs == []


def seed_method(command: str, value: str) -> str:
    """What the original does: quote the value and put it into the text."""
    quoted = "'" + value.replace("'", "'\\''") + "'"
    return command.replace("{{v}}", quoted)


BREAKERS = [f"$({RUN})", f"`{RUN}`", f"';{RUN};'", f"x\n{RUN}\n",
            f"\nEOF\n{RUN}\n", f"a[$({RUN})]", f"x;{RUN};",
            f'"+__import__("os").system("{RUN}")+"',
            f'",system("{RUN}"),"', f"'; {RUN}; '", f"$({RUN})x"]


def test_values_pasted_into_the_command_text_are_executed(room):
    """The proof that a canary would be seen: the original's method."""
    for tool in ("python3", "awk", "sh"):
        (room.bin / tool).symlink_to(support.find(tool))
    ran = set()
    for command, value in itertools.product(
            [line[0] for line in REFUSED[:KNOWN]], BREAKERS):
        if command in ran:
            continue
        script = seed_method(command, value)
        if command.startswith("cat <<"):
            script = script.replace("; ", "\n")
        for shell in ("dash", "bash"):
            room.run(shell, script, [])
            ran |= {command} if room.canary() else set()
            room.tidy()
    print(f"\nput into the text, a value runs in {len(ran)} of {KNOWN} "
          "contexts that are refused", end=" ")
    assert len(ran) >= 12


# --- what the lexer takes, by chance ----------------------------------------

HOLES = ["{{p, text}}", "{{q, text}}"]
WHOLE = f"BEGIN  $({RUN})\t*?'\"\\`{RUN}`END"


class Grammar:
    """Command lines that shells understand, or nearly. The dice are its
    only input."""

    def __init__(self, dice: random.Random):
        self.dice = dice

    def one(self, *choices):
        return self.dice.choice(choices)

    def some(self, make, most: int) -> list:
        return [make() for _ in range(self.dice.randrange(1, most + 1))]

    def hole(self) -> str:
        return self.dice.choice(HOLES)

    def plain(self) -> str:
        return self.one(*"*?~[]{}!=^:,+-.", "a", "b1", "-x", "--to=", "a#",
                        "[0-9]", "{a,b}", "a[", "\r", "é", "x/y")

    def single(self) -> str:
        return "'" + self.one("", "b c", '"', "$(", "`", "}", ")", "#", "\\",
                              "]", "((", "${", "true;") + "'"

    def double(self, deep: int) -> str:
        return '"' + "".join(self.some(lambda: self.one(
            "", "b c", "'", '\\"', "\\$", "}", ")", "#", "((", "]",
            self.dollar(deep)), 3)) + '"'

    def dollar(self, deep: int) -> str:
        if deep <= 0:
            return "$U"
        return self.one(self.substitution, self.expansion, self.expansion,
                        lambda deep: f"$(({self.sum(deep)}))",
                        lambda deep: f"$[{self.sum(deep)}]",
                        lambda deep: self.one(
                            "$", "$U", "$#", "$$", "$?", '$"f"', "$'f'",
                            "$'\\n'", "$'\\\\'", "$'\"'", "$'}'"))(deep - 1)

    def substitution(self, deep: int) -> str:
        inner = self.command(deep)
        return f"$({inner})" if self.dice.random() < 0.5 else \
            "`" + inner.replace("`", "") + "`"

    def expansion(self, deep: int) -> str:
        return "${" + self.one("U", "Z", "#U", "a[0]", "a[@]") + self.one(
            "", ":-", "-", ":+", "#", "##", "/", ":") + self.one(
            "", self.word(deep), self.single(), "'", '"', "\\}",
            "\\'") + "}"

    def sum(self, deep: int) -> str:
        return "".join(self.some(lambda: self.one(
            "1", "+", "U", " ", "(1)", "2*", "a[1]", "'", '"1"', "#",
            self.hole(), self.dollar(deep)), 3))

    def word(self, deep: int) -> str:
        return "".join(self.some(lambda: self.one(
            self.plain, self.single, lambda: self.double(deep),
            lambda: self.dollar(deep), self.hole, self.hole,
            lambda: "\\" + self.one(*" '\"$`\\#a)"))(), 3))

    def redirection(self) -> str:
        return self.one(">", ">>", "<", ">|", "<>", "2>", "&>", "<<<", ">&",
                        "<&", "2>&1 ") + self.one("", " ") + self.word(0)

    def simple(self, deep: int) -> str:
        words = [self.one("true", "show", "show", ":")] + self.some(
            lambda: self.word(deep), 3)
        if self.dice.random() < 0.2:
            words.insert(0, self.assignment(deep))
        if self.dice.random() < 0.25:
            words.insert(self.dice.randrange(len(words) + 1),
                         self.redirection())
        return self.one(" ", " ", "\t", "  ").join(words)

    def assignment(self, deep: int) -> str:
        index = self.one("", "", "[0]", f"[{self.sum(deep)}]",
                         f"[ {self.word(0)} ]")
        return f"V{index}" + self.one("=", "+=") + self.word(deep)

    def array(self, deep: int) -> str:
        return "x=(" + " ".join(self.some(lambda: self.one(
            self.word(deep), f"[{self.word(0)}]=1",
            f"[ {self.word(0)} ]=1"), 3)) + ")"

    def compound(self, deep: int) -> str:
        first, then = self.command(deep), self.command(deep)
        word = self.word(deep)
        return self.one(
            f"if {first}; then {then}; fi", f"({first})", f"( {first}; )",
            f"for y in {word}; do {then}; done", f"{{ {first}; }}",
            f"case {word} in {self.word(0)}) {then};; *) {first};; esac",
            f"f() {{ {first}; }}; f", f"function f {{ {first}; }}; f",
            f"(({self.sum(deep)}))", f"[ {word} = {self.word(0)} ]")

    def command(self, deep: int) -> str:
        if deep <= 0:
            return f"{self.one('true', 'show')} {self.word(0)}"
        make = self.one(self.simple, self.simple, self.assignment,
                        self.array, self.compound)
        return make(deep - 1)

    def slip(self, line: str) -> str:
        """Insert or remove a character, or swap two parts."""
        at, to = sorted(self.dice.choices(range(len(line)), k=2))
        return self.one(line[:at] + line[at + 1:], line[:at] + self.one(
            *"'\"`$(){}[]\\ #;&|<>") + line[at:], line[:at] + line[to:]
            + line[at:to])

    def line(self) -> str:
        line = self.one("; ", ";", " | ", " && ", " || ").join(self.some(
            lambda: self.command(self.dice.randrange(1, 4)), 3))
        while line and self.dice.random() < 0.3:
            line = self.slip(line)
        at = self.dice.randrange(len(line) + 1)
        return line[:at] + self.hole() + line[at:]


def taken_by_chance(many: int, seed: int) -> tuple[list, int]:
    """So many lines that koitab takes without a warning, and how many it
    was shown."""
    grammar, lines, tried = Grammar(random.Random(seed)), [], 0
    while len(lines) < many:
        line, tried = grammar.line(), tried + 1
        found = koitab.parse_tab(f"@manual {line}\n", root=True)
        if found.jobs and not any(problem.what == "unsafe argument"
                                  for problem in found.diagnostics):
            lines.append(found.jobs[0])
    return lines, tried


def stay_values(room: Room, jobs: list) -> int:
    """Run jobs with hostile values, by each shell or by one of them. How
    many values arrived, whole."""
    arrived, dice = 0, random.Random(7)
    for job, shell in with_shells(jobs):
        values = [WHOLE, dice.choice([f"a[$({RUN})]", f"$({RUN})",
                                      f"a[$({RUN})]=1", f";{RUN};"])]
        if dice.random() < 0.5:
            values.reverse()
        for word in room.run(shell, job.script, values):
            if b"BEGIN" in word or b"END" in word:
                arrived += 1
                assert WHOLE.encode() in word, (shell, job.command)
        assert not room.canary(), (shell, job.command, values)
        shutil.rmtree(room.folder)
        room.folder.mkdir()
    return arrived


def test_accepted_random_line_executes_no_value(tmp_path):
    support.need(*MUST)
    jobs, tried = taken_by_chance(8_000 // ONE_IN, seed=93)
    arrived = in_parts(stay_values, jobs, tmp_path)
    print(f"\n{tried:,} lines by chance, {len(jobs):,} taken: 0 canaries, "
          f"{arrived:,} values arrived, all of them whole", end=" ")
    assert arrived > len(list(with_shells(jobs))) / 12


# --- programs that read a value as code -------------------------------------

WARNED = [
    "eval {{v}}", r"\eval {{v}}", "e'v'al {{v}}", "builtin eval {{v}}",
    "command eval {{v}}", "case x in x) eval {{v}};; esac", "trap {{v}} 0",
    "f() { eval {{v}}; }; f", "let {{v}}", "[[ {{v}} -eq 1 ]]",
    "declare {{v}}", "unset {{v}}", "read {{v}}", ". {{v}}", "source {{v}}",
    "compgen -W {{v}}", "printf -v {{v}} x", "test -v {{v}}", "export {{v}}",
    "sh -c {{v}}", "bash -lc {{v}}", "su -c {{v}} root", "ksh93 -c {{v}}",
    "fish -c {{v}}", "echo {{v}} | sh", "echo {{v}} | bash -s",
    "echo {{v}} | bash -e", "bash <<< {{v}}", "sh {{v}}", "python3 {{v}}",
    "ssh host {{v}}", "xargs -n1 {{v}}", "find . -exec sh -c {{v}} ;",
    "env -S {{v}}", "env {{v}}", "watch {{v}}", "python3 -c {{v}}",
    "python3.11 -c {{v}}", "perl -e {{v}}", "perl5.36 -ne {{v}}",
    "awk {{v}}", "sed {{v}}", "ruby -e {{v}}", "node -e {{v}}",
    "php8.2 -r {{v}}", "lua5.4 -e {{v}}", "sudo sh -c {{v}}",
    "doas sh -c {{v}}", "runuser -c {{v}}", "script -c {{v}} f",
    "flock f -c {{v}}", "sg group {{v}}", "tmux new -d {{v}}",
    "screen -dm sh -c {{v}}", "docker exec c sh -c {{v}}",
    "podman run --rm i bash -lc {{v}}", "kubectl exec p -- sh -c {{v}}",
    "chroot d sh -c {{v}}", "unshare -n sh -c {{v}}",
    "nsenter -t 1 sh -c {{v}}", "ip netns exec n sh -c {{v}}",
    "systemd-run sh -c {{v}}", "machinectl shell h /bin/sh -c {{v}}",
    "expect -c {{v}}", "make V={{v}}", "m4 -DX={{v}}", "dc -e {{v}}",
    "ed f <<< {{v}}", "vim -c {{v}}", "emacs --batch --eval {{v}}",
    "gdb -batch -ex {{v}}", "sqlite3 db {{v}}", "mysql -e {{v}}",
    "psql -c {{v}}", "git -c {{v}} x", "rsync -e {{v}} d h:",
    "echo {{v}} | at now", "echo {{v}} | crontab -",
    "socat - {{v}}", "parallel {{v}}", "hyperfine {{v}}", "entr -s {{v}}",
    "{{v}}", "V=1 {{v}}", "sudo {{v}}", "timeout 5 {{v}}", "nice {{v}}",
    "> f {{v}}", "bin/{{v}}.sh", "coproc {{v}}", "case x in x) {{v}};; esac",
    "PS4={{v}}; set -x; true", "PATH={{v}} x", "BASH_ENV={{v}} x",
    "LD_PRELOAD={{v}} x", "GIT_SSH_COMMAND={{v}} git fetch",
    "RANDOM={{v}}", "OPTIND={{v}}", "V={{v}}; echo $((V+1))",
    "V={{v}}; echo ${!V}", "V={{v}}; echo ${x:V}", "V={{v}}; echo ${x[V]}",
    "for i in {{v}}; do echo $((i)); done", "set -- {{v}}; echo $(($1))",
]
NOT_WARNED = [
    "show {{v}}", "sh job.sh {{v}}", "python3 job.py {{v}}", "V={{v}} show",
    "test {{v}} = b", "[ -n {{v}} ]", "timeout 5 show {{v}}",
    "sudo -n backup {{v}}", "env A=b show {{v}}", "find {{v}} -name x",
    "export V={{v}}", "git log --grep={{v}}", "curl -d {{v}} http://x",
    "tar cf {{v}} d", "git -c user.name={{v}} x", "rsync -e ssh {{v}} h:",
    "rsync -a {{v}} h:", "show $((1+2)) {{v}}",
    "sleep $((RANDOM / 1000)); show {{v}}", "grep python -c {{v}}",
    "show {{v}} > sh.log", "flock f show {{v}}", "docker exec c show {{v}}",
    "case {{v}} in a) show;; esac", "V={{v}}; echo ${V:-x} $((1+1))",
    "for i in {{v}}; do show $i; done", "a=({{v}})", "mail -s {{v}} root",
    "eval {{n, int}}", "ssh host reboot {{n, int}}", "[ {{n, int}} -eq 1 ]",
    "make {{target, choice(all|clean)}}", "awk {{flag, bool}}",
    "awk {{day, date}}",
]


@pytest.mark.parametrize("command", WARNED)
def test_program_that_evaluates_a_value_gets_a_warning(command):
    assert is_warned_of(command)


@pytest.mark.parametrize("command", NOT_WARNED)
def test_program_that_does_not_evaluate_a_value_gets_no_warning(command):
    assert not is_warned_of(command)


REALLY = [      # with a value that has them run something
    ("eval {{v}}", RUN), ("sh -c {{v}}", RUN), ("bash {{v}} {{w}}", "-c"),
    ("echo {{v}} | sh", RUN), ("echo {{v}} | bash -s", RUN), ("trap {{v}} 0",
                                                             RUN),
    ("echo k | xargs sh -c {{v}}", RUN), ("env -S {{v}}", f"sh -c '{RUN}'"),
    ("find . -prune -exec sh -c {{v}} \\;", RUN), ("nice sh -c {{v}}", RUN),
    ("busybox sh -c {{v}}", RUN), ("setpriv sh -c {{v}}", RUN),
    ("script -qc {{v}} /dev/null", RUN), ("flock f -c {{v}}", RUN),
    ("zsh -c {{v}}", RUN), ("fish -c {{v}}", "true > CANARY"),
    ("awk {{v}}", f'BEGIN {{system("{RUN}")}}'), ("echo k | sed {{v}}",
                                                  f"1e {RUN}"),
    ("python3 -c {{v}}", f"import os; os.system('{RUN}')"),
    ("python3 {{v}}", f"-cimport os; os.system('{RUN}')"),
    ("perl -e {{v}}", f"system q({RUN})"), ("perl {{v}}",
                                            f"-esystem q({RUN})"),
    ("node -e {{v}}", f"require('child_process').execSync('{RUN}')"),
    ("echo 'x:;$(V)' > Makefile; make V={{v}}", RUN),
    ("echo {{v}} | ed -s", f"!{RUN}"), ("sqlite3 db {{v}}", f".shell {RUN}"),
    ("vim -es -c {{v}} -c q", f"!{RUN}"), ("gdb -batch -ex {{v}}",
                                           f"shell {RUN}"),
    ("git -c {{v}} x", f"alias.x=!{RUN}"), ("PS4={{v}}; set -x; true",
                                            f"$({RUN})"),
]


def test_programs_with_a_warning_do_execute_the_value(room):
    """Of the programs that are here, those ran the value."""
    ran = []
    for command, value in REALLY:
        assert is_warned_of(command)
        for shell in ("dash", "bash"):
            room.run(shell, job_of(command).script, [value, RUN],
                     os.environ.get("PATH", os.defpath))
            ran += [command] if room.canary() else []
            shutil.rmtree(room.folder)
            room.folder.mkdir()
    ran = sorted(set(ran))
    print(f"\n{len(WARNED)} lines warned of; in {len(ran)} of "
          f"{len(REALLY)} tried here the value did run", end=" ")
    assert len(ran) > 10


# --- types and limits -------------------------------------------------------

INTS = {"0": 1, "-0": 1, "-5": 1, "007": 1, "9" * 18: 1, "-" + "9" * 18: 1,
        "": 0, "-": 0, "--1": 0, "+5": 0, " 5": 0, "5 ": 0, "5\n": 0,
        "1_000": 0, "0x10": 0, "1e3": 0, "1.0": 0, "9" * 19: 0,
        "9" * 5000: 0, "\uff11\uff12": 0, "\u0663": 0, "\u00b2": 0,
        "NaN": 0, "1\0": 0, "a[$(id)]": 0}
BOOLS = {"true": 1, "false": 1, "": 0, "True": 0, "TRUE": 0, "1": 0, "0": 0,
         "yes": 0, "null": 0, "true\n": 0, " true": 0, "true\0": 0}
DATES = {"2026-03-29": 1, "2024-02-29": 1, "2023-02-29": 0, "2026-13-01": 0,
         "0000-01-01": 0, "26-3-29": 0, "2026-3-29": 0, "2026-03-29\n": 0,
         "2026/03/29": 0, "\uff12026-01-01": 0, "$(id)-01-01": 0, "": 0}
CHOICES = {"a": 1, "b c": 1, "": 0, "A": 0, "a|b c": 0, "a\n": 0, "a ": 0,
           "$(id)": 0}
STRINGS = {"": 0, "$(id)": 1, "-rf": 1, "a\tb": 1, "\U0001f600": 1,
           "x" * 4096: 1, "a\nb": 0, "\r": 0, "\0": 0, "\udcff": 0,
           "a\ud83d\ude00": 0, "\x1b[2J": 0, "\x07": 0, "\x7f": 0, "\x85": 0,
           "\u202e": 0, "\u2028": 0}
TEXTS = {**{value: good for value, good in STRINGS.items() if value
            != "a\nb"}, "a\nb": 1, "\n": 1, "a\r\nb": 0}


@pytest.mark.parametrize("kind, values", [
    ("int", INTS), ("bool", BOOLS), ("date", DATES),
    ("choice(a|b c)", CHOICES), ("string", STRINGS), ("secret", STRINGS),
    ("text", TEXTS)])
def test_type_accepts_valid_and_refuses_invalid_values(kind, values):
    job = job_of(f"show {{{{v, {kind}}}}}")
    for value, good in values.items():
        assert (job.params[0].value_error(value) == "") == bool(good), value
        if good:
            assert koitab.validate_arguments(job, {"v": value}) == {"v": value}
        else:
            with pytest.raises(koitab.Error):
                koitab.validate_arguments(job, {"v": value})


@pytest.mark.parametrize("given", [
    {}, {"a": "1"}, {"a": "1", "b": "2", "c": "3"}, {"A": "1", "b": "2"},
    {"a": 1, "b": "2"}, {"a": None, "b": "2"}, {"a": ["1"], "b": "2"},
    {"a": True, "b": "2"}, {"a ": "1", "b": "2"}, {"": "1", "b": "2"}])
def test_unknown_name_or_wrong_type_of_a_value_is_refused(given):
    with pytest.raises(koitab.Error):
        koitab.validate_arguments(job_of("show {{a}} {{b}}"), given)


@pytest.mark.parametrize("kind, most", [
    ("string", 4096), ("secret", 4096), ("text", 65_536)])
def test_length_of_a_value_is_limited_in_bytes(kind, most):
    """The kernel takes 131,072 bytes for a variable."""
    job = job_of(f"show {{{{v, {kind}}}}}")
    for letter in ("x", "\u00e9", "\U0001f600"):
        value = letter * (most // len(letter.encode()))
        assert koitab.validate_arguments(job, {"v": value})
        with pytest.raises(koitab.Error):
            koitab.validate_arguments(job, {"v": value + "x"})
    with pytest.raises(koitab.Error):
        koitab.validate_arguments(job, {"v": "x" * 1_000_000})


def test_length_of_a_default_is_limited_like_a_value():
    for letter in ("x", "\u00e9", "\U0001f600"):
        value = letter * (4096 // len(letter.encode()))
        job = job_of(f"show {{{{v, string, {value}}}}}")
        assert koitab.validate_arguments(job, {}) == {"v": value}
        assert koitab.parse_tab(
            f"@daily show {{{{v, string, {value}x}}}}\n").jobs == []


def eight(value: str) -> dict:
    return {f"p{n}": value for n in range(8)}


def test_total_length_of_all_values_is_limited_in_bytes():
    job = job_of("show " + " ".join(f"{{{{p{n}, text}}}}" for n in range(8)))
    for letter in ("x", "\u00e9", "\U0001f600"):
        value = letter * (262_144 // 8 // len(letter.encode()))
        assert koitab.validate_arguments(job, eight(value))
        with pytest.raises(koitab.Error):
            koitab.validate_arguments(job, eight(value + "x"))


@pytest.mark.parametrize("shell", SHELLS)
def test_job_with_the_longest_values_starts(shell, room):
    """As many and as long as may be: no E2BIG."""
    job = job_of("show " + " ".join(f"{{{{p{n}, text}}}}" for n in range(4)))
    values = koitab.validate_arguments(job, {
        "p0": "'" * 65_536, "p1": "\U0001f600" * 16_384,
        "p2": "\n" * 65_536, "p3": "x" * 65_536})
    seen = room.run(shell, job.script, list(values.values()))
    assert seen == [value.encode() for value in values.values()]


def test_escaped_percent_in_a_default_is_a_percent():
    job = job_of(r"show {{a, string, 50\%}} \%")
    assert (job.params[0].default, job.script) == (
        "50%", 'show "${KOI_ARG_1}" %')


@pytest.fixture
def koid(tmp_path):
    """Runs koid in its own home; the command `koitab` for it."""
    home = tmp_path / "koi"
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8",
           "HOME": str(tmp_path), "KOI_HOME": str(home)}
    program = support.program("koitab")

    def command(*words, **options):
        return subprocess.run(
            [*program, *words], env=env, cwd=tmp_path, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    daemon = subprocess.Popen([*program, "daemon"], env=env, cwd=tmp_path,
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        support.wait_until((home / "koid.sock").exists, what="koid")
        yield command
    finally:
        daemon.terminate()
        daemon.wait(30)


def test_koid_passes_values_unchanged_to_the_job(koid, room):
    """From the command line to the job, by way of the daemon. A variable of
    the tab does not fill in an argument."""
    tab = "KOI_ARG_1=wrong\n" + "".join(
        f"SHELL={support.find(shell)}\n\"{shell}\" @manual "
        f"{room.bin}/show {{{{v, text, }}}}\n" for shell in ("dash", "bash"))
    assert koid("-", input=tab.encode()).returncode == 0
    text = job_of("show {{v, text, }}").params[0]
    given = [value for value in PAYLOADS[::ONE_IN]
             if isinstance(value, str) and not text.value_error(value)]
    for value in given:
        room.seen.write_bytes(b"")
        for shell in ("dash", "bash"):
            done = koid("run", shell, f"v={value}")
            assert (done.returncode, done.stderr) == (0, b"")
        assert room.seen.read_bytes().split(b"\0") == [
            value.encode(), value.encode(), b""]
    print(f"\n{len(given)} values by koid and two shells", end=" ")


@pytest.mark.parametrize("words", [
    [], ["v="], ["v=a\rb"], ["v=\x1b"], ["v=" + "x" * 65_537], ["w=1"],
    ["v=1", "w=2"], [b"v=\xff"]])
def test_koid_starts_no_job_with_invalid_values(koid, room, words):
    tab = f'"A" @manual {room.bin}/show {{{{v, text}}}}\n'
    assert koid("-", input=tab.encode()).returncode == 0
    done = koid("run", "A", *words)
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert not room.seen.exists()


@pytest.mark.parametrize("shell", ["fish", "csh", "python3"])
def test_arguments_are_refused_for_an_unsupported_shell(shell):
    found = koitab.parse_tab(f"SHELL=/usr/bin/{shell}\n@manual show {{{{v}}}}"
                             "\n")
    assert found.jobs == []
    assert found.errors()[0].what == "bad argument"
    assert koitab.parse_tab(f"SHELL=/usr/bin/{shell}\n@manual show\n").jobs
