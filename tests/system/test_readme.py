"""The README is true: its commands are typed, its blocks are read by the
programs, and every name in it exists.

The console blocks are typed in one shell, by an ordinary user who may use
sudo, on a machine that systemd boots (see test_koid_booted.py). It has the
programs' directory and nothing of koi or mission. GOLDEN=accept writes the
outputs into the README instead of comparing them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import support
from readme import BLOCKS, README, TEXT
from servers import certificate
from test_koid_booted import ENTER, Computer

ACCEPT = os.environ.get("GOLDEN") == "accept"
USER, UID, HOME = "alice", 1000, "/home/alice"
MARK = "\x01"

# A program that sudo's callers cannot change, with a set-uid interpreter: the
# kernel uses the mode of the file that the first line of a script names.
SUDO = f"""#!{{interpreter}} -IS
import os, sys
os.setgroups([]); os.setresgid(0, 0, 0); os.setresuid(0, 0, 0)
os.environ.update(SUDO_USER="{USER}", SUDO_UID="{UID}", USER="root",
                  LOGNAME="root", HOME="/root")
os.execvp(sys.argv[1], sys.argv[1:])
"""


# --- The machine -----------------------------------------------------------


class Newcomer:
    """An ordinary user in the shell of a fresh machine."""

    def __init__(self, folder, name: str, network: Newcomer | None = None):
        folder.mkdir()
        self.name, self.shell = name, None
        self.computer = Computer(folder, network and network.computer)
        root = self.computer.root
        self.add_user(root)
        (root / "etc/hostname").write_text(f"{name}\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost koi.example.com "
                                        f"{name}\n")
        for path in ("var/lib/koi", "var/lib/koi-dashboard",
                     "var/lib/mission", "root/koitab.py", "root/mission.py",
                     "home", "srv"):
            subprocess.run(["rm", "-rf", str(root / path)], check=True)
        (root / "srv").mkdir()
        self.copy_checkout(root / HOME[1:] / "koi")
        self.install_sudo(root)

    def add_user(self, root) -> None:
        """Make this the only ordinary user."""
        for name, fields in (("passwd", f"{UID}::{HOME}:/bin/bash"),
                             ("group", "")):
            path = root / "etc" / name
            lines = [line for line in path.read_text().splitlines()
                     if not UID <= int(line.split(":")[2]) < 60_000]
            path.write_text("\n".join(
                [*lines, f"{USER}:x:{UID}:{fields}", ""]))

    def copy_checkout(self, folder) -> None:
        """What an administrator has downloaded."""
        folder.mkdir(parents=True)
        for name in ("koitab.py", "mission.py", "Makefile"):
            (folder / name).write_bytes((support.ROOT / name).read_bytes())
            (folder / name).chmod(0o755)
        (folder.parent / ".profile").write_text("umask 022\n")
        for path in (folder.parent, *folder.parent.rglob("*")):
            os.chown(path, UID, UID)

    def install_sudo(self, root) -> None:
        interpreter = root / "usr/local/lib/sudo-python"
        interpreter.write_bytes(
            Path("/usr/bin/python3").resolve().read_bytes())
        interpreter.chmod(0o4755)
        script = root / "usr/bin/sudo"
        script.unlink(missing_ok=True)
        script.write_text(SUDO.format(
            interpreter="/usr/local/lib/sudo-python"))
        script.chmod(0o755)

    def log_in(self) -> None:
        self.computer.boot()
        # As on a disk: an overlay's files are not on the file system of
        # their directories.
        self.computer.do("mount -t tmpfs tmpfs /srv")
        self.computer.do("chgrp crontab /var/spool/cron/crontabs && "
                         "chmod 1730 /var/spool/cron/crontabs")
        self.shell = subprocess.Popen(
            ["nsenter", "-t", str(self.computer.init), *ENTER,
             "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
              "env", "-i", f"HOME={HOME}",
             f"USER={USER}", f"LOGNAME={USER}", "LANG=C.UTF-8", "bash",
             "--noprofile", "--norc"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.type("export PATH=/usr/local/bin:/usr/bin:/bin:/sbin; cd")

    def type(self, command: str) -> tuple[str, int]:
        """Type a command; its output and its status."""
        self.shell.stdin.write(
            f"{{ {command}\n}} </dev/null\nprintf '{MARK}%d\\n' $?\n")
        self.shell.stdin.flush()
        output = ""
        while True:
            line = self.shell.stdout.readline()
            assert line, f"the shell ended in: {command}\n{output}"
            text, mark, code = line.partition(MARK)
            output += text
            if mark:
                return output, int(code)

    def close(self) -> None:
        if self.shell:
            self.shell.stdin.close()
            self.shell.stdout.close()
            self.shell.kill()
            self.shell.wait()
        self.computer.remove()


# What differs each time. The first that fits a place counts.
VARYING = [
    (r"\b[0-9a-z]{4}(-[0-9a-z]{4}){4}\b", "PASSPHRASE"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\+00:00)?", "TIME"),
    (r"\[[0-9.hms]+ *\]", "[ELAPSED]"),
    (r"\bin \d+ (s|min|h|days?)\b", "in SOON"),
    (r"\b\d+(\.\d+)?(ms|s)\b", "DURATION"),
    (r"\bpid \d+", "pid PID"),
    (r"\b[0-9a-f]{64}\b", "TOKEN"),
    (r"\b([0-9a-f]{32}|[0-9a-f]{16}|[0-9a-f]{8})\b", "ID"),
    ("[▁-█]+", "BARS"),
    (" +", " "),
]


def constant(lines: list[str]) -> list[str]:
    """Lines of an output without what differs each time."""
    found = []
    for line in lines:
        for pattern, word in VARYING:
            line = re.sub(pattern, word, line.rstrip())
        found.append(line)
    return found


# --- The story -------------------------------------------------------------

# Blocks that are not typed: why, or what reads them instead.
READ = {
    "Who watches the watcher 1": "tab",
    "A form for a coworker 1": "tab",
    "One job on several hosts 2": "tab",
    "Mail 1": "configuration",
    "In a container 1": "the base image needs a registry; test_koid_process "
                        "starts koid --container",
    "Development 1": "this is it",
}


# The example of the original's manual.
ORIGINAL_TAB = """\
[Bots]
"Crawler" */5 * * * * /usr/local/bin/crawl
"Script" @hourly python script.py
[Admin]
"Say Hi" @manual ~/tweet.sh {{To Handle}} {{Delay, int, 0}} {{Emoji 😃, bool}}
"""


class Story:
    """What a newcomer types on web1 and on koi.example.com, in this order."""

    def __init__(self, folder):
        self.folder = folder
        self.results: dict[str, list] = {}      # name of a block -> outputs
        self.messages: dict[str, str] = {}      # heading -> output
        self.pings: dict[str, tuple[str, int]] = {}     # job -> output, status
        self.original_tab = ("", 0)             # what koitab prints of it
        self.web1 = self.koi = None

    def close(self) -> None:
        for machine in (self.koi, self.web1):
            if machine:
                machine.close()

    def type(self, *names: str, machine: Newcomer | None = None) -> str:
        """Type blocks; return what the last command printed."""
        output = ""
        for name in names:
            self.results[name] = []
            for command, _expected in BLOCKS[name].commands():
                output, code = (machine or self.web1).type(command)
                self.results[name].append((command, output, code))
        return output

    def provoke(self, heading: str, *commands: str) -> None:
        """Run into a message of Troubleshooting with the first command; the
        others leave web1 as it was."""
        self.messages[heading] = self.web1.type(commands[0])[0]
        for command in commands[1:]:
            self.web1.type(command)

    def tell(self) -> None:
        self.web1 = Newcomer(self.folder / "web1", "web1")
        self.web1.log_in()
        self.type("Install 1", "Install 2", "Without internet 1",
                  *(f"Quick start: mission {row}" for row in range(1, 6)))
        self.meet_messages_of_mission()
        self.type(*(f"Quick start: koi {row}" for row in range(1, 5)),
                  "mission and koi 1")
        self.meet_messages_of_koi()
        self.type("Quick start: the dashboard 1",
                  "Quick start: the dashboard 2")
        self.use_two_machines()
        self.web1.type("echo '15 4 * * * true' | sudo crontab -u alice -")
        self.type("Moving from cron 1", "Moving from cron 2")
        self.provoke("cron is running (pid 98) and would start the same "
                     "jobs", "sudo koid --system")
        for command, _ in BLOCKS["Quick start: koi 1"].commands():
            self.web1.type(command)
        self.web1.type("koitab -r")
        self.type("Moving from cron 3", "Uninstall 1", "Uninstall 2")

    def use_two_machines(self) -> None:
        """Move web1 from its dashboard to that of koi.example.com."""
        self.koi = Newcomer(self.folder / "koi", "koi", self.web1)
        made = certificate(self.folder, "DNS:koi.example.com")
        target = self.koi.computer.root / "etc/koi"
        target.mkdir()
        for name, path in (("cert.pem", made.cert), ("key.pem", made.key)):
            (target / name).write_bytes(Path(path).read_bytes())
            (target / name).chmod(0o600)
        # `unit` looks whether certificate and key fit.
        shutil.copytree(target, target.with_name("koi-etcd"))
        target = target.with_name("koi-etcd")
        (target / "password").write_text("open sesame\n")
        (target / "password").chmod(0o600)
        shutil.copy(target / "cert.pem", target / "ca.pem")
        for name in ("cert.pem", "key.pem"):
            (target / name).rename(target / name.replace("cert.", "koi.")
                                   .replace("key.pem", "koi.key"))
        trust(self.koi, made.cert)
        self.koi.log_in()
        for name in ("Install 1", "Quick start: koi 1"):
            for command, _ in BLOCKS[name].commands():
                self.koi.type(command)
        self.use_tab_of_the_original_koi()
        printed = self.type("Quick start: the dashboard 3", machine=self.koi)
        (self.web1.computer.root / HOME[1:] / "passphrase").write_text(
            re.search(VARYING[0][0], printed)[0])
        self.web1.type("sudo koitab -d leave")
        self.meet_messages_of_dashboards()
        trust(self.web1, made.cert)
        self.type("Quick start: the dashboard 4", "Prometheus 1")
        self.provoke("wrong passphrase for https://koi.example.com:8077",
                     "echo 8888-8888-8888-8888-8888 | "
                     "sudo koitab -d token list")
        self.watch_the_watcher()
        self.type("Upgrade 1", "One job on several hosts 1",
                  machine=self.koi)

    def use_tab_of_the_original_koi(self) -> None:
        path = self.koi.computer.root / "var/lib/koi/koitab"
        path.write_text(ORIGINAL_TAB)
        path.chmod(0o666)
        self.type("Moving from the original programs 1", machine=self.koi)
        self.original_tab = self.koi.type("koitab -l; koitab next -n 1")

    def watch_the_watcher(self) -> None:
        """Run the jobs that ping, with a page that exists for a monitor."""
        tab = "\n".join(BLOCKS["Who watches the watcher 1"].lines).replace(
            "https://hc-ping.com/PING_KEY",
            "https://koi.example.com:8077/healthz?")
        self.web1.type(f"cat <<'END' | sudo koitab -\n{tab}\nEND\n")
        for job in ("koid works", "dashboard works"):
            self.pings[job] = self.web1.type(f"sudo koitab run '{job}'")
        self.web1.type("sudo koitab -r")

    def meet_messages_of_mission(self) -> None:
        self.provoke("is writable by everyone (mode 0602)",
                     "sudo chmod o+w mission.config.json; sudo mission run",
                     "sudo chmod o-w mission.config.json")
        self.provoke("/srv/backup/local is not mounted",
                     "sudo sed -i 's/\"local\", /&\"mounted\": true, /' "
                     "mission.config.json; sudo mission run",
                     "sudo sed -i 's/\"mounted\": true, //' "
                     "mission.config.json")
        self.provoke("another run is active: pid 4711",
                     "sudo cp tasks/etc/run run.old; sudo mkfifo fifo; "
                     "echo 'read line < /srv/backup/fifo' | sudo tee -a "
                     "tasks/etc/run >/dev/null; sudo mission run >/dev/null & "
                     "until pgrep -f tasks/etc/run >/dev/null; do :; done; "
                     "sudo mission run",
                     "echo | sudo tee fifo; wait; sudo mv run.old "
                     "tasks/etc/run; sudo rm fifo")

    def meet_messages_of_koi(self) -> None:
        self.provoke("koid is not running",
                     "sudo systemctl stop koid; koitab run Settings",
                     "sudo systemctl start koid")
        self.provoke("/var/lib/koi is accessible to other users",
                     "sudo systemctl stop koid; sudo chmod 755 /var/lib/koi; "
                     "sudo koid", "sudo chmod 700 /var/lib/koi; "
                     "sudo systemctl start koid")
        self.provoke("errors in crontab file, can't install.",
                     "echo '*/5 * * * date' | koitab -")
        self.provoke('no job named "say hello"', "koitab run 'say hello'")
        self.provoke("/bin/sh: 1: restic-backup: not found",
                     "echo '\"B\" @manual restic-backup' | sudo koitab -; "
                     "sudo koitab run B", "sudo koitab -r")

    def meet_messages_of_dashboards(self) -> None:
        self.provoke("certificate not trusted: self-signed certificate",
                     "sudo koitab -d join https://koi.example.com:8077 "
                     "< passphrase")
        self.provoke("host name not allowed",
                     "curl -s http://koi.example.com:877/")
        self.provoke("without TLS, anyone on the network can read",
                     "sudo koitab -d new http://koi.example.com")
        self.provoke("cannot listen at 127.0.0.1:877: Address already in use",
                     "sudo koitab dashboard --listen 127.0.0.1:877")


def trust(machine: Newcomer, certificate: str) -> None:
    """Let a machine trust a certificate, as update-ca-certificates does."""
    name = subprocess.run(
        ["openssl", "x509", "-noout", "-hash", "-in", certificate],
        check=True, capture_output=True, text=True).stdout.strip()
    (machine.computer.root / "etc/ssl/certs" / f"{name}.0").write_bytes(
        Path(certificate).read_bytes())


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    story = Story(tmp_path_factory.mktemp("story"))
    try:
        story.tell()
        if ACCEPT:
            accept(story)
        yield story
    finally:
        story.close()


def accept(story: Story) -> None:
    """Write the outputs that the README has not into it."""
    lines = TEXT.split("\n")
    for name in sorted(story.results, key=lambda name: -BLOCKS[name].first):
        block, fresh = BLOCKS[name], []
        for (command, output, _code), (_, shown) in zip(
                story.results[name], block.commands()):
            printed = output.splitlines()
            fresh += [f"$ {command}", *(
                shown if constant(shown) == constant(printed) else printed)]
        lines[block.first:block.first + len(block.lines)] = [
            (block.indent + line).rstrip() for text in fresh
            for line in text.split("\n")]
    README.write_text("\n".join(lines), encoding="utf-8")


# These have status 1 after a job that failed.
REPORTING_FAILURE = {'koitab run "Second copy"', "koitab status",
                     "sudo koitab status"}
TYPED = [name for name, block in BLOCKS.items()
         if block.language == "console" and name not in READ]


@pytest.mark.root_only
@pytest.mark.parametrize("name", TYPED)
def test_block_prints_what_the_readme_shows(story, name):
    for (command, expected), (_, output, code) in zip(
            BLOCKS[name].commands(), story.results[name]):
        assert ACCEPT or constant(output.splitlines()) == constant(
            expected), command
        assert ": error: " not in output, command
        assert code == (command in REPORTING_FAILURE), (command, code)


@pytest.mark.root_only
def test_jobs_that_monitor_koid_and_the_dashboard_succeed(story):
    assert story.pings == {"koid works": ("OK", 0),
                           "dashboard works": ("OKOK", 0)}


@pytest.mark.root_only
def test_tab_of_the_original_koi_is_installed_unchanged(story):
    output, code = story.original_tab
    assert code == 0 and output.startswith(ORIGINAL_TAB)
    assert "Crawler: Every 5 minutes" in output and "Say Hi: By " in output


HEADINGS = re.findall(r"^### `(.+)`$", TEXT, re.M)


@pytest.mark.root_only
@pytest.mark.parametrize("heading", HEADINGS)
def test_programs_print_the_message_of_a_heading(story, heading):
    printed = constant(story.messages[heading].splitlines())
    assert constant([heading])[0] in "\n".join(printed)


def test_each_block_is_typed_or_has_a_reason_not_to_be():
    """That a block that is typed is also told is what the story's test
    shows: it looks for the name in the story's results."""
    names = {name for name, block in BLOCKS.items()
             if block.language != "console"}
    assert names <= set(READ) <= set(BLOCKS)
    for name in re.findall(r"test_\w+", " ".join(READ.values())):
        assert (support.ROOT / f"tests/system/{name}.py").exists()


# --- Blocks that programs read ---------------------------------------------

koitab, mission = support.load("koitab"), support.load("mission")


@pytest.mark.parametrize("name", [
    name for name, block in BLOCKS.items() if block.language == "crontab"])
def test_tab_of_the_readme_has_no_error_and_no_warning(name):
    text = "\n".join([*BLOCKS[name].lines, ""])
    tab = koitab.parse_tab(text)
    assert tab.jobs and tab.diagnostics == []


def test_settings_of_mail_and_ping_are_valid(scratch):
    sample = (support.ROOT / "mission.sample.json").read_text()
    for key in ("user", "mail", "ping"):
        sample = re.sub(rf'^    "{key}": .*\n', "", sample, flags=re.M)
    text = "\n".join(BLOCKS["Mail 1"].lines).replace(
        "alice", support.some_user())
    path = scratch.folder / "mission.config.json"
    path.write_text(sample.replace('    "filters"', text + '    "filters"'))
    done = scratch.mission("-c", str(path), "dump", write=False)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["mail"]["smtp"]["passName"] == "smtp"
    assert found["ping"]["fail"] and found["user"]["email"]


# --- What the README says --------------------------------------------------


PARTY = re.compile(r"^    (\S.*)\n" + "".join(
    rf" {{8}}{word} +((?:.|\n)+?)\n" for word in (
        "read", "change", "delay", "silence")) + " {8}tests$", re.M)


def test_security_has_the_words_of_the_topic_for_each_party():
    topic = koitab.topic_text("security").partition("PARTIES\n")[2]
    parties = [[" ".join(cell.split()) for cell in found.groups()]
               for found in PARTY.finditer(topic)]
    assert len(parties) == topic.count("        tests\n") >= 10
    section = TEXT.partition("\n## Security\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()
            if line.startswith("| ")]
    assert rows[2:] == parties
    words = " ".join(section.split())
    for begin in ("What each party", "One exception"):
        part = begin + topic.partition(begin)[2].partition("\n\n")[0]
        assert " ".join(part.split()) in words


def anchors() -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", TEXT, re.M)}


def test_every_link_leads_to_a_heading_or_a_file():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert "#security" in links
    assert [link for link in links if not link.startswith("https://")
            and not (link[1:] in anchors() if link[0] == "#"
                     else (support.ROOT / link).is_file())] == []


def test_readme_has_at_most_4000_words():
    assert len(re.findall(r"\S*\w\S*", TEXT)) <= 4000


OUTPUTS = {line.strip() for block in BLOCKS.values()
           if block.language == "console"
           for _, lines in block.commands() for line in lines}


def test_lines_fit_79_columns_but_tables_addresses_and_outputs():
    assert [line for line in TEXT.splitlines() if len(line) > 79
            and not line.startswith("|") and line.strip() not in OUTPUTS
            and not re.search(r"\S*://\S{40,}", line)] == []


# --- Names -----------------------------------------------------------------

COMMANDS = [command for block in BLOCKS.values()
            if block.language == "console" for command, _ in block.commands()]
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
WORDS = [part.strip() for text in [*COMMANDS, *SPANS]
         for part in re.split(r"[|;&]+|\bsudo\b", text.replace(
             "\\\n", " ").replace("-u alice", "-u"))]
# Options of other programs: openssl, docker, ssh, systemctl ...
OF_OTHERS = {"install", "ln", "make", "systemctl", "ssh", "docker", "curl",
             "apt-get", "rm", "mkdir", "crontab", "cat", "tee", "chmod"}


def words_of(program: str) -> list[list[str]]:
    """The words of each command of this program in the README."""
    return [part.split()[1:] for part in WORDS
            if part.split()[:1] == [program]]


def option_names(program) -> set[str]:
    return {name for option in program.OPTIONS.values()
            for name in option.names}


def test_every_command_exists():
    for program in (koitab, mission):
        name = program.__name__
        options = option_names(program)
        first = {next((word for word in words if word not in options), "")
                 for words in words_of(name)}
        commands = {word for word in first if re.fullmatch("[a-z]+", word)}
        assert len(commands) > 5
        assert commands - {"tab"} <= {*program.COMMANDS, "new", "join", "show",
                                      "rotate", "token", "leave"}


def test_every_option_exists():
    for part in WORDS:
        words = part.split()
        if not words or words[0] in OF_OTHERS:
            continue
        known = {"koitab": option_names(koitab), "koid": option_names(koitab),
                 "mission": option_names(mission)}.get(
            words[0], option_names(koitab) | option_names(mission))
        assert {word for word in words if re.fullmatch(
            r"--?[a-zA-Z][a-z-]*", word)} <= known, part


def test_every_setting_and_topic_exists():
    assert set(re.findall(r"\bKOI_[A-Z_]+", TEXT)) <= {
        *koitab.SETTINGS, "KOI_HOME"}
    for program in (koitab, mission):
        topics = re.findall(rf"\b{program.__name__} help ([a-z]+)", TEXT)
        row = re.search(rf"^\| `{program.__name__} help TOPIC`.*\| (.+) \|$",
                        TEXT, re.M)
        listed = set(row[1].split(", "))
        assert topics and set(topics) | set(program.TOPICS) <= listed


@pytest.mark.parametrize("topic, words", [
    ("dashboard", "proxy_pass ProxyPass reverse_proxy --behind-proxy"),
    ("alerts", "certificate down late"), ("api", "scrape_configs: alert:"),
    ("behaviour", "etcdctl ETCD_CLIENT_CERT_AUTH /koi/v1/"),
    ("files", "/var/lib/koi/history.db macOS")])
def test_topic_has_what_the_readme_promises_of_it(topic, words):
    assert f"`koitab help {topic}`" in TEXT
    text = koitab.topic_text(topic)
    assert [word for word in words.split() if word not in text] == []


SOURCES = "".join((support.ROOT / name).read_text(encoding="utf-8")
                  for name in ("koitab.py", "mission.py", "Makefile"))


def test_every_path_and_variable_is_in_the_programs():
    paths = set(re.findall(r"(?:/var/lib|/run|/usr/local|/etc|~)/[a-z.-]+"
                           r"(?:/[a-z.-]+)*", " ".join(SPANS)))
    assert "/var/lib/koi" in paths
    of_others = {"~/invoice", "/etc/environment", "/usr/local/share/man"}
    assert {path for path in paths - of_others if path.replace(
        "/usr/local", "$(PREFIX)").replace("~/", "") not in SOURCES
        and path not in SOURCES} == set()
    for name in ("LOCAL_DIR", "USER", "MAILTO", "CRON_TZ", "STRICT"):
        assert f"`{name}" in TEXT or f"${name}" in TEXT
        assert name.replace("LOCAL_", "") in SOURCES


@pytest.mark.parametrize("words, value", [
    ("http://127.0.0.1:877", koitab.ROOT_PORT == 877),
    ("0.0.0.0:8077", koitab.USER_PORT == 8077),
    ("90 days on the dashboard", koitab.KEEP_OUTPUT_DAYS == 90),
    ("status 74", mission.EXIT_DELIVERY == 74),
    ("status 75", mission.EXIT_BUSY == 75),
    ("each night at 02:30", "OnCalendar=*-*-* 02:30:00" in SOURCES),
    ("`PATH` is\n`/usr/bin:/bin`", '"/usr/bin:/bin"' in SOURCES),
    ("within 60 seconds", koitab.CLAIM_TIME == 60),
])
def test_value_in_the_readme_is_that_of_the_program(words, value):
    assert " ".join(words.split()) in " ".join(TEXT.split()) and value


# What the README must not contain: see the rules for texts.
PATTERNS = (r"\bis no\b|\bis none\b|\bwhoever\b|\bstands\b|\blies\b|"
            r"\bgoes on\b|\bhangs? up\b|\blet go\b|\bveil|\bvoid\b|"
            r"\bmeanwhile\b|\ball the same\b|\bso many\b|\bmend\b|"
            r"\bdeeds?\b|\btroubles?\b|\bfolders?\b|\bhis\b|"
            r"\btells?\b|\btold\b|\bof ours\b|\bbelongs? to\b")


def test_readme_has_no_word_that_says_less_than_another():
    text = " ".join(line for line in TEXT.splitlines()
                    if line.strip() not in OUTPUTS)
    assert [text[max(0, match.start() - 30):match.end() + 20]
            for match in re.finditer(PATTERNS, text, re.I)] == []
