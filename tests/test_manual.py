"""koitab help and koitab man: each topic is there, whole and printable."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import support
from scratch import make_scratch_directory

mission, koitab = support.load("mission"), support.load("koitab")
SOURCE = (support.ROOT / "koitab.py").read_text(encoding="utf-8")
TEXTS = {"": koitab.manual_text(),
         **{topic: koitab.topic_text(topic) for topic in koitab.TOPICS}}
PROGRAMS = {"mission": mission, "koitab": koitab}
each_program = pytest.mark.parametrize("program", PROGRAMS)


def run(program: str, *words: str) -> subprocess.CompletedProcess:
    """Run a program, into a pipe."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = PROGRAMS[program].main(list(words))
    return subprocess.CompletedProcess(words, status, out.getvalue(),
                                       err.getvalue())


def on_terminal(program: str, *words: str, **environment: str) -> str:
    """Return what a program writes to a terminal."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-IS", str(support.ROOT / f"{program}.py"), *words],
        stdin=terminal, stdout=terminal, stderr=terminal,
        env={"PATH": os.defpath, "TERM": "dumb", **environment})
    os.close(terminal)
    data = b""
    while True:
        try:
            data += os.read(master, 65536)
        except OSError:         # EIO: nobody has the terminal open any more
            break
        if not data:
            break
    process.wait(60)
    os.close(master)
    return data.decode().replace("\r\n", "\n")


# --- the commands ----------------------------------------------------------


@each_program
def test_help_lists_every_topic(program):
    done = run(program, "help")
    assert (done.returncode, done.stderr) == (0, "")
    for topic, (title, _) in PROGRAMS[program].TOPICS.items():
        assert re.search(rf"^{program} help {topic} +{re.escape(title)}$",
                         done.stdout, re.M)


@each_program
def test_help_prints_a_topic_into_a_pipe(program):
    for topic in PROGRAMS[program].TOPICS:
        done = run(program, "help", topic)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == PROGRAMS[program].topic_text(topic)


def test_help_command_prints_the_same_as_the_help_option():
    for name in set(koitab.command_words()) - set(koitab.TOPICS):
        assert run("koitab", "help", name).stdout == run(
            "koitab", name, "--help").stdout != ""


@pytest.mark.parametrize("words, message", [
    (["help", "setings"], 'unknown topic "setings"\n'
     "koitab: hint: koitab help settings\n"),
    (["help", "xyzzy"], 'unknown topic "xyzzy"\n'
     "koitab: hint: koitab help\n"),
    (["man", "xyzzy"], 'unknown topic "xyzzy"\nkoitab: hint: koitab man\n')])
def test_unknown_topic_is_wrong_usage(words, message):
    done = run("koitab", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"koitab: error: {message}"


@each_program
def test_topic_on_a_terminal_goes_through_the_pager(program):
    shown = on_terminal(program, "help", "status", PAGER="sed s/^/|/")
    assert shown == "".join(f"|{line}\n" for line in PROGRAMS[
        program].topic_text("status").splitlines())


@each_program
@pytest.mark.parametrize("pager, fault", [
    ("/nothing/here", "No such file or directory"),
    ("'less", "No closing quotation")])
def test_topic_is_printed_without_a_pager_that_cannot_start(program, pager,
                                                            fault):
    text = PROGRAMS[program].topic_text("status")
    assert on_terminal(program, "help", "status", PAGER=pager) == (
        f"{text}{program}: error: cannot start $PAGER ({pager}): {fault}\n"
        f"{program}: hint: export PAGER=cat\n")


@each_program
def test_interrupt_in_the_pager_does_not_end_the_program(program, tmp_path):
    """Ctrl-C reaches both, and less stays: it ends a search there."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-IS", str(support.ROOT / f"{program}.py"), "help",
         "status"], stdin=terminal, stdout=terminal, stderr=terminal,
        env={"PATH": os.defpath,
             "PAGER": f"sh -c 'cat; echo ready; read line <{pipe}'"})
    os.close(terminal)
    shown = b""
    while not shown.endswith(b"ready\r\n"):
        shown += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    pipe.write_text("end\n")
    assert process.wait(60) == 0
    os.close(master)


@each_program
def test_empty_pager_variable_selects_less(program, tmp_path):
    less = tmp_path / "less"
    less.write_text("#!/bin/sh\nexec sed 's/^/less: /'\n")
    less.chmod(0o755)
    shown = on_terminal(program, "help", "status", PAGER="",
                        PATH=f"{tmp_path}:{os.defpath}")
    assert shown.startswith("less: EXIT STATUS\n")


@each_program
def test_ordinary_user_reads_the_manual_without_any_other_file(program):
    own = Path(shutil.copy(support.ROOT / f"{program}.py",
                           make_scratch_directory()))
    own.chmod(0o644)
    user = {"user": 65534, "group": 65534, "extra_groups": []} \
        if os.geteuid() == 0 else {}
    for words in (["help", "status"], ["man"], ["man", "status"]):
        done = subprocess.run(
            ["/usr/bin/python3", "-IS", str(own), *words], env={}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", **user)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) > 20
    shutil.rmtree(own.parent)


def make(target: str, folder: Path) -> None:
    """Run a target of the Makefile, with a umask that lets nobody read."""
    subprocess.run(
        ["sh", "-c", 'umask 077; exec make -s "$@"', "sh", target,
         f"PYTHON={sys.executable}", f"DESTDIR={folder}"], cwd=support.ROOT,
        check=True, timeout=100, env={"PATH": os.defpath})


def test_make_installs_every_page_readable_for_all_and_removes_it(tmp_path):
    support.need("make")
    names = [(1, "mission"), (1, "koitab"), (8, "koid")] + [
        (7, f"{name}-{topic}") for name, program in PROGRAMS.items()
        for topic in program.TOPICS]
    manuals = tmp_path / "usr/local/share/man"
    (manuals / "man1").mkdir(parents=True)
    (manuals / "man1/koitab.1").touch(0o600)    # of an earlier installation
    make("install", tmp_path)
    pages = {path.relative_to(manuals): path.read_text()
             for path in manuals.rglob("*.*")}
    assert set(pages) == {Path(f"man{section}/{name}.{section}")
                          for section, name in names}
    assert all(text.startswith(".TH ") for text in pages.values())
    for path in tmp_path.rglob("*"):
        wanted = 0o755 if path.is_dir() or "bin" in path.parts else 0o644
        assert path.stat().st_mode & 0o777 == wanted \
            or path == manuals or path in manuals.parents \
            or path.name == "man1", path
    make("uninstall", tmp_path)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


# --- the text --------------------------------------------------------------


@pytest.mark.parametrize("topic", TEXTS)
def test_topic_fits_80_columns_and_has_only_known_blocks(topic):
    text = TEXTS[topic]
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert max(map(len, text.splitlines())) <= 79
    assert not re.search(r"(?<!\{)\{[A-Z]+\}", text)
    for block in text.strip("\n").split("\n\n"):
        indents = {len(line) - len(line.lstrip())
                   for line in block.splitlines()}
        assert block.count("`") % 2 == 0, block
        assert indents <= {0} or indents == {2, 6} or min(indents) >= 4, block


@pytest.mark.parametrize("topic", TEXTS)
def test_manual_page_has_no_warnings_and_all_words_of_its_topic(
        topic, tmp_path):
    """groff and mandoc find nothing wrong with the roff, and hyphenate
    nothing."""
    page, shown = tmp_path / "page.roff", ""
    page.write_text(run("koitab", "man", *filter(None, [topic])).stdout)
    support.need("mandoc", "groff")
    for command in ("mandoc -T lint", "groff -ww -man -Tascii -P-cbou"):
        done = subprocess.run(
            [*command.split(), str(page)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert (done.stdout if "lint" in command else "", done.stderr,
                done.returncode) == ("", "", 0)
        shown = done.stdout
    missing = set(TEXTS[topic].replace("`", "").split()) - set(shown.split())
    assert sorted(missing) == []


# --- the topics say all of it ----------------------------------------------


def missing(words, text: str) -> list[str]:
    """Return those of `words` that are not words of the text."""
    return sorted(word for word in words if not re.search(
        rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))


def test_koitab_1_has_every_command_option_and_exit_status():
    options = {name for option in koitab.OPTIONS.values()
               for name in option.names}
    assert missing({f"koitab {name}" for name in koitab.COMMANDS} | options,
                   TEXTS[""]) == []
    statuses = {str(value) for name, value in vars(koitab).items()
                if name.startswith("EXIT_")} - {"128"}
    for text in (TEXTS[""], TEXTS["status"]):
        assert statuses | {"128+N"} == set(
            re.findall(r"^  (\d+(?:\+N)?)$", text, re.M))


def test_dashboard_has_the_options_actions_and_roles_of_a_dashboard():
    options = {koitab.OPTIONS[key].names[-1]
               for key in koitab.COMMANDS["dashboard"].options
               + koitab.COMMANDS["-d"].options} - {"-d"}
    actions = {f"-d {word}" for word in koitab.COMMANDS["-d"].choices()}
    assert missing(options | actions | set(koitab.ACCESS_ROLES),
                   TEXTS["dashboard"]) == []


def test_status_has_every_state_and_trigger():
    triggers = re.search(r"^const TRIGGERS = \{(.+?)\};", koitab.page_text(
        ), re.M | re.S)[1]
    words = set(re.findall(r'([\w-]+)"?: "', triggers))
    assert len(words) == 6
    page = set(koitab.BADGES) | set(koitab.RUN_STATES) | words
    assert missing(page, TEXTS["status"]) == []


def test_alerts_has_every_kind_and_option_and_placeholder():
    kinds = {call.args[1].value for call in ast.walk(ast.parse(SOURCE))
             if isinstance(call, ast.Call) and len(call.args) > 2
             and getattr(call.func, "id", "") == "Alert"
             and isinstance(call.args[1], ast.Constant)}
    assert len(kinds) == 8
    options = {name for names in koitab.CHANNEL_OPTIONS.values()
               for name in names} | set(koitab.CHANNEL_OPTIONS)
    words = {*kinds, *options, *koitab.NOTIFICATION_FIELDS,
             *koitab.ALERT_FIELDS, *koitab.SMTP_PORTS}
    assert missing(words, TEXTS["alerts"]) == []


def test_api_has_every_route_and_its_query_and_the_metrics():
    text = " ".join(TEXTS["api"].split())
    routes = {route.path.replace("ACTION", "pause")
              for route in koitab.ROUTES}
    assert len(routes) > 30
    assert [path for path in sorted(routes) if not re.search(
        rf"(?<!\S){re.escape(path)}/?(?![\w/])", text)] == []
    queries = {f"{name}=" for route in koitab.ROUTES for name in route.query}
    assert [name for name in sorted(queries) if name not in text] == []
    assert missing(koitab.METRICS, text) == []


def test_ping_has_every_field_of_its_query_and_every_state():
    text = TEXTS["ping"]
    assert [name for name in koitab.PING_QUERY if f"?{name}=" not in text
            ] == []
    assert missing(["start", "fail", "log", "new", "up", "down", "paused"],
                   text) == []


def test_settings_has_every_setting_with_its_default_and_choices():
    rows = dict(re.findall(r"^  ([A-Z_]+)\n((?:      .+\n)+)",
                           TEXTS["settings"], re.M))
    assert missing(koitab.SETTINGS, TEXTS["settings"]) == []
    for name, (field, _, expected) in koitab.SETTINGS.items():
        value = getattr(koitab.Settings, field)
        default = re.search(r"Default: (\S+?)\.", " ".join(
            rows[name].split()))
        if name != "CRON_TZ":
            assert default[1] == (str(value) if value not in (0.0, (), "")
                                  or name in ("KOI_RETRY", "KOI_NICE",
                                              "RANDOM_DELAY") else "none")
        if " or " in expected and not expected.startswith(("a ", "how ")):
            assert missing(re.findall(r"\w+", expected.replace(" or ", " ")),
                           rows[name]) == []


def test_arguments_has_every_type():
    text = TEXTS["arguments"]
    types = {"string", "text", "int", "bool", "date", "secret"}
    found = re.findall(r"^  (?:\{\{Name\}\}, )?\{\{Name, (\w+)", text, re.M)
    assert set(found) == types | {"choice"}
    tab = "".join(f'"{n}" @manual x {{{{Name, {type}}}}}\n' for n, type
                  in enumerate([*types, "choice(a|b)"]))
    assert koitab.parse_tab(tab).errors() == []
    assert koitab.parse_tab("@manual x {{Name, float}}\n").errors()


def test_tab_has_every_special_time():
    assert missing({*koitab.SPECIALS, "@manual", "@after", "@reboot"},
                   TEXTS["tab"]) == []


@pytest.mark.parametrize("topic", ["tab", "settings", "arguments"])
def test_example_tabs_of_the_topics_are_valid(topic):
    examples = [block for block in TEXTS[topic].split("\n\n")
                if re.match(r'    (?:\[|"|KOI_|\d)', block)]
    assert examples
    for block in examples:
        tab = koitab.parse_tab(textwrap.dedent(block) + "\n")
        assert tab.diagnostics == [] and tab.jobs, block


def test_files_has_every_variable_process_and_file():
    text = TEXTS["files"]
    variables = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', SOURCE)
                    ) | {"VISUAL", "EDITOR"}
    assert missing(variables - {"HOME"}, text) == []
    names = set(re.findall(r'"(koi-[a-z]+)"', SOURCE)) & {
        "koi-run", "koi-agent", "koi-claims", "koi-dashboard"}
    assert len(names) > 2 and missing(names, text) == []
    paths = set(re.findall(r'"(/(?:etc|var/lib|run)/[a-z./-]*koi[a-z./-]*)"',
                           SOURCE))
    assert len(paths) > 3
    assert [path for path in sorted(paths) if path not in text] == []


def test_behaviour_has_every_option_of_koid():
    options = {koitab.OPTIONS[key].names[-1]
               for key in koitab.COMMANDS["daemon"].options}
    assert missing(options | {"TERM", "INT", "HUP"}, TEXTS["behaviour"]) == []


def test_there_is_a_topic_for_each_part_of_the_manual():
    assert " ".join(koitab.TOPICS) == (
        "tab arguments settings dashboard alerts ping api files behaviour "
        "security status")


# --- what is typed ---------------------------------------------------------


def typed_commands(text: str, names: str = "koitab|koid"
                   ) -> list[list[str]]:
    """Return the words of each command of these programs in the examples of
    a text and in its `backticks`."""
    blocks = "\n".join(block for block in text.split("\n\n")
                       if block.startswith("    "))
    lines = re.findall(r"^    (\S.*)$", blocks.replace("\\\n", " "), re.M)
    lines += re.findall("`([^`]+)`", " ".join(text.split()))
    found = []
    for line in lines:
        for part in re.split(r"&&|[|;<>](?![|\w-]*[\]=])|&$", line):
            words = shlex.split(part, comments=True) if re.match(
                rf" *(sudo )?({names}) ", part + " ") else []
            if words:
                found.append(words[words[0] == "sudo":])
    return found


@pytest.mark.parametrize("topic", TEXTS)
def test_every_command_in_a_topic_is_one_that_the_program_accepts(topic):
    refused = []
    for program, *words in typed_commands(TEXTS[topic]):
        if re.fullmatch(r"-d [\w|]+|\[FILE\|-\]", " ".join(words)):
            continue        # a usage line of koitab(1)
        try:
            options, rest = koitab.parse_arguments(
                words, koitab.Machine(), program)
            name, arguments = koitab.select_command(options, rest)
            options.reject_others(koitab.COMMANDS[name].options, name)
            koitab.check_arguments(name, arguments)
        except koitab.Error as error:
            if "missing argument" not in error.message:     # a mention
                refused.append((program, *words, error.message))
    assert refused == []


def test_every_command_in_the_examples_of_the_help_is_accepted():
    text = "\n".join(f"  {line}" for command in koitab.COMMANDS.values()
                     for line in command.example_lines)
    commands = typed_commands(text)
    assert len(commands) > 40
    for program, *words in commands:
        options, rest = koitab.parse_arguments(words, koitab.Machine(),
                                               program)
        name, arguments = koitab.select_command(options, rest)
        options.reject_others(koitab.COMMANDS[name].options, name)
        koitab.check_arguments(name, arguments)


def test_every_command_in_the_topics_and_examples_of_mission_is_accepted():
    text = "\n\n".join(map(mission.topic_text, mission.TOPICS)) \
        + "\n\n" + "\n\n".join(f"    {line}" for command in
                                mission.COMMANDS.values()
                                for line in command.examples)
    commands = typed_commands(text, "mission")
    assert len(commands) > 25
    for _, *words in commands:
        mission.parse_arguments(words)
