"""make demo: mission and koi on real input, in a scratch directory.

A tree of files, a SQLite database and a git repository are backed up by a
run as cron would start it and by a run by hand; one task fails on purpose.
The log, the mail and the history follow. Then a second koid gets a tab, and
jobs with arguments run. Finally a dashboard shows all of it. At a terminal the
dashboard runs until Ctrl-C.
Nothing outside the scratch directory is touched.
"""

from __future__ import annotations

import email
import email.policy
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL_PORT = 8077

TASKS = {
    "files": """\
        #!/bin/sh
        # A tree of files, as one archive.
        tar -czf "$ARCHIVE_DIR/documents.tar.gz" -C ../../documents .
        tar -tzf "$ARCHIVE_DIR/documents.tar.gz" | wc -l | sed 's/$/ entries/'
        """,
    "settings": """\
        #!/bin/sh
        # Text that changes a little each day: mission commits it with git.
        cp ../../documents/*.conf "$SETTINGS_DIR/"
        ls -l "$SETTINGS_DIR"
        """,
    "cloud": """\
        #!/bin/sh
        # Fails on purpose: the other backups must not suffer.
        echo "connecting to the cloud with password=hunter2"
        echo "the cloud does not answer" >&2
        exit 3
        """,
    "offsite": """\
        #!/bin/sh
        # A post task: runs when all is stored, given over and committed.
        find "$ARCHIVE_DIR" "$SETTINGS_DIR" -type f -not -path '*/.git/*' |
            sort | xargs cksum
        """,
}

BUILTIN = '''\
"""A consistent copy of a SQLite database, even while it is written to."""
import os
import sqlite3


def run(args, log):
    source = sqlite3.connect("../../shop.sqlite")
    target = sqlite3.connect(os.path.join(args.storage["archive"],
                                          "shop.sqlite"))
    with target:
        source.backup(target)
    rows = target.execute("select count(*) from orders").fetchone()[0]
    log(f"{rows:,} orders are in the copy")
'''

TAB = """\
# All of crontab(5), and sections, names, settings and arguments.
[Backups]
"Nightly backup"   30 2 * * mon-fri   {mission} -c night.json run --headless
KOI_TIMEOUT=10m
"Quick check"      */15 * * * *       {mission} check && echo all is well

[For the office]
"Say hello"        @manual            echo Hello, {{{{To whom}}}}; \
sleep {{{{Seconds, int, 1}}}}; echo Bye
"Invoice"          @manual            {folder}/bin/invoice {{{{Customer}}}} \
{{{{Format, choice(pdf|txt), txt}}}}
"""

INVOICE = """\
#!/bin/sh
echo "an invoice for <$1>, as $2"
[ "$1" != nobody ] || { echo "no such customer, no invoice" >&2; exit 3; }
"""

SENDMAIL = """\
#!/bin/sh
# What mission would hand to the host's sendmail is kept here.
cat > "{folder}/mail/$(ls "{folder}/mail" | wc -l).eml"
"""


def backed_up_user() -> str:
    """Return the user whose backups these are: the caller, or one for root."""
    if os.geteuid():
        return pwd.getpwuid(os.geteuid()).pw_name
    people = [entry.pw_name for entry in pwd.getpwall()
              if 1000 <= entry.pw_uid < 60000]
    return (people or ["daemon"])[0]


def make_files(folder: Path) -> None:
    """The real input: documents, a database, the tasks."""
    for name in ("documents/letters", "tasks", "logs", "archive", "settings",
                 "mail", "bin", "state"):
        (folder / name).mkdir(parents=True)
    for number in range(1, 41):
        letter = folder / f"documents/letters/{number:02}.txt"
        letter.write_text(f"Letter number {number}.\n" * 200)
    (folder / "documents/web.conf").write_text("listen = 80\n")
    (folder / "documents/mail.conf").write_text("relay = none\n")
    shop = sqlite3.connect(folder / "shop.sqlite")
    with shop:
        shop.execute("create table orders (id integer primary key, item)")
        shop.executemany("insert into orders (item) values (?)",
                         [("teapot",)] * 12345)
    shop.close()
    for slug, script in TASKS.items():
        task = folder / "tasks" / slug
        task.mkdir()
        (task / "run").write_text("".join(
            line[8:] + "\n" for line in script.splitlines()))
        (task / "run").chmod(0o755)
    (folder / "tasks/database").mkdir()
    (folder / "tasks/database/task.py").write_text(BUILTIN)
    sendmail = folder / "bin/sendmail"
    sendmail.write_text(SENDMAIL.format(folder=folder))
    sendmail.chmod(0o755)


def write_config(folder: Path, git: bool) -> None:
    def task(slug: str, name: str, **more) -> dict:
        return {"slug": slug, "name": name, "type": "exec",
                "scheduled": True, **more}

    config = {
        "tasks": [
            task("files", "Documents"),
            task("database", "Shop database", type="builtin", timeout="1m"),
            task("settings", "Settings"),
            task("cloud", "Cloud (fails on purpose)", retries=1),
            task("offsite", "Off-site copy", post=True, needs=["files"]),
        ],
        "user": {"name": backed_up_user(), "email": "you@example.com"},
        "storage": {
            "tasks": {"path": "tasks"}, "logs": {"path": "logs"},
            "archive": {"path": "archive", "chown": True},
            "settings": {"path": "settings", "chown": True, "commit": git},
        },
        "mail": {"enabled": True, "type": "sendmail", "start": False},
        "redact": ["password=[^ ]+"],
    }
    text = "// Written by make demo.\n" + json.dumps(config, indent=4) + "\n"
    (folder / "mission.config.json").write_text(text)
    # What koi runs at night: without the task that fails, and with a ping.
    config["tasks"] = [each for each in config["tasks"]
                       if each["slug"] != "cloud"]
    (folder / "night.json").write_text(json.dumps(config, indent=4) + "\n")


# Started by root, a dashboard becomes another user; the demo's files are its.
STAY_ROOT = ["-u", "root"] if os.geteuid() == 0 else []


class Demo:
    """The scratch directory, and the commands that run in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "MISSION_STATE": str(folder / "state"),
                    "PATH": f"{folder}/bin:{os.environ.get('PATH', '')}"}

    def type(self, *words: str, shown: bool = True) -> int:
        print(f"\n$ mission {' '.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-I", str(ROOT / "mission.py"), *words],
            cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
            stdout=None if shown else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if shown else None)
        if done.returncode:
            print(f"(exit status {done.returncode})", flush=True)
        return done.returncode

    def show_mail(self) -> None:
        newest = sorted(self.folder.glob("mail/*.eml"))[-1]
        message = email.message_from_bytes(newest.read_bytes(),
                                           policy=email.policy.default)
        for name in ("From", "To", "Subject"):
            print(f"    {name}: {message[name]}")
        lines = message.get_content().splitlines()
        for line in ["", *lines[:12], f"... {len(lines) - 12} more lines"]:
            print(f"    {line}")


class KoiDemo(Demo):
    """The same for koi, with a koid in the background."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.env["KOI_HOME"] = str(folder / "koi")
        self.koitab = [sys.executable, "-I", str(ROOT / "koitab.py")]

    def type(self, *words: str, shown: bool = True, text: str = "") -> int:
        typed = " ".join(shlex.quote(word) for word in words)
        print(f"\n$ koitab {typed}", flush=True)
        done = subprocess.run([*self.koitab, *words], cwd=self.folder,
                              env=self.env, input=text, encoding="utf-8")
        if done.returncode:
            print(f"(exit status {done.returncode})", flush=True)
        return done.returncode

    def __enter__(self) -> KoiDemo:
        with open(self.folder / "koid.log", "wb") as log:
            self.koid = subprocess.Popen(
                [*self.koitab, "daemon"], env=self.env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not (self.folder / "koi/koid.sock").exists():
            if self.koid.poll() is not None or time.monotonic() > deadline:
                sys.exit((self.folder / "koid.log").read_text())
            time.sleep(0.05)
        return self

    def __exit__(self, *_) -> None:
        self.koid.terminate()
        self.koid.wait()


class Dashboard:
    """A dashboard in the background, and what it shows."""

    def __init__(self, koi: KoiDemo):
        self.koi, self.port = koi, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.keys = None

    def __enter__(self) -> Dashboard:
        print(f"\n$ koitab dashboard --listen 127.0.0.1:{self.port} &")
        with open(self.koi.folder / "dashboard.log", "wb") as log:
            self.server = subprocess.Popen(
                [*self.koi.koitab, "dashboard", "--listen",
                 f"127.0.0.1:{self.port}", *STAY_ROOT], env=self.koi.env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_for(lambda: self.get("/healthz") == "OK", "the dashboard")
        return self

    def __exit__(self, *_) -> None:
        self.server.terminate()
        self.server.wait()

    def get(self, path: str) -> str:
        request = urllib.request.Request(self.url + path)
        if self.keys:
            request.add_header("Authorization", f"Bearer {self.keys}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode()

    def state(self) -> dict:
        return json.loads(self.get("/api/v1/state"))

    def wait_for(self, question, what: str):
        """The answer, as soon as it is true."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                answer = question()
            except OSError:
                answer = None
            if answer:
                return answer
            if self.server.poll() is not None:
                break
            time.sleep(0.05)
        sys.exit(f"no sign of {what}\n" + (
            self.koi.folder / "dashboard.log").read_text())

    def join(self) -> str:
        """Make a dashboard and join it; return the link and passphrase that
        koitab prints. Keep a viewer's token to read the dashboard with."""
        said = self.koitab("new", self.url)
        print(said, end="", flush=True)
        password = re.search(r"^passphrase +(\S+)$", said, re.M)[1]
        self.keys = self.koitab("token", "new", "demo", "--role", "viewer",
                                stdin=password + "\n").strip()
        return "".join(line + "\n" for line in said.splitlines()
                       if line.startswith(("dashboard", "passphrase")))

    def koitab(self, *words: str, stdin: str = "") -> str:
        """Run `koitab -d`; what it prints."""
        print(f"\n$ koitab -d {' '.join(words)}", flush=True)
        return subprocess.run(
            [*self.koi.koitab, "-d", *words], env=self.koi.env, input=stdin,
            stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def free_port() -> int:
    """The usual one, or another that is free."""
    for port in (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    sys.exit("no port is free")


def ping_key(dashboard: Dashboard) -> str:
    """Read from the database, because viewers cannot see it."""
    db = sqlite3.connect(dashboard.koi.folder / "koi/dashboard.db")
    try:
        return db.execute("select ping_key from dashboard").fetchone()[0]
    finally:
        db.close()


def show_dashboard(koi: KoiDemo) -> bool:
    """mission under koid, its ping and its output on the dashboard."""
    explain("The dashboard shows the jobs of all hosts in a browser.")
    with Dashboard(koi) as dashboard:
        link = dashboard.join()
        night = koi.folder / "night.json"
        config = json.loads(night.read_text())
        config["ping"] = {
            "enabled": True, "log": True, "endpoint": f"{dashboard.url}/ping/"
            f"{ping_key(dashboard)}/nightly-backup?create=1"}
        night.write_text(json.dumps(config, indent=4) + "\n")
        explain("koi runs mission: the dashboard has the run, and the ping "
                "with the log.")
        told = koi.type("run", "Nightly backup")
        state = dashboard.wait_for(lambda: arrived(dashboard.state()),
                                   "the backup and its ping")
        print()
        for job in state["jobs"]:
            last = job["last"] or {}
            print(f"    {job['state']:8} {job['name']:16} {job['words']:36} "
                  f"{last.get('line') or ''}"[:100])
        for check in state["checks"]:
            print(f"    {check['state']:8} {check['name']:16} "
                  f"pinged {check['n']} x")
        wait_at_terminal(link)
    return told == 0


def arrived(state: dict) -> dict | None:
    """The state, once the backup has been reported and has pinged."""
    good = [job for job in state["jobs"] if job["name"] == "Nightly backup"
            and job["state"] == "ok"]
    up = [check for check in state["checks"] if check["state"] == "up"]
    return state if good and up else None


def wait_at_terminal(link: str) -> None:
    """At a terminal, let the dashboard run until Ctrl-C."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return
    print(f"\nOpen this in a browser, and run \"Say hello\" there:\n\n{link}"
          "\nCtrl-C ends the demo.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()


def explain(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def show_koi(folder: Path) -> bool:
    """Show koitab and koid; return whether all commands ended as expected."""
    mission = folder / "bin/mission"
    mission.write_text(f'#!/bin/sh\nexport MISSION_STATE="{folder}/state" '
                       f'PATH="{folder}/bin:$PATH"\n'
                       f'cd "{folder}" && exec "{sys.executable}" -I '
                       f'"{ROOT / "mission.py"}" "$@"\n')
    invoice = folder / "bin/invoice"
    invoice.write_text(INVOICE)
    for program in (mission, invoice):
        program.chmod(0o755)
    tab = TAB.format(mission=mission, folder=folder)
    explain("koi is cron with names, sections, forms and a history. A tab:")
    print("".join(f"    {line}\n" for line in tab.splitlines()), end="")
    with KoiDemo(folder) as koi:
        explain("koitab checks each line, and installs it as crontab does.")
        told = [koi.type("-", text=tab)]
        explain("The next starts, also across daylight saving changes.")
        told.append(koi.type("next", "-n", "2"))
        explain("Run jobs by hand, with their output and exit status. An "
                "argument\n    is a value and never becomes code.")
        told += [koi.type("run", "Say hello", "To whom=O'Brien $(id)"),
                 koi.type("run", "Invoice", "Customer=nobody", "Format=pdf"),
                 koi.type("run", "Invoice", "Customer=Acme & Sons"),
                 koi.type("run", "Quick check")]
        explain("koi keeps every run with its output.")
        told += [koi.type("history"), koi.type("log", "Say hello"),
                 koi.type("status")]
        return told == [0, 0, 0, 3, 0, 0, 0, 0, 0] and show_dashboard(koi)


def main() -> int:
    scratch = Path(tempfile.mkdtemp(prefix="mission-demo-"))
    scratch.chmod(0o755)    # git runs as the owner of what it commits
    try:
        return show(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def show(folder: Path) -> int:
    make_files(folder)
    git = shutil.which("git") is not None
    if git:
        subprocess.run(["git", "init", "-q", str(folder / "settings")],
                       check=True)
    write_config(folder, git)
    demo = Demo(folder)
    explain("Five tasks, in the order they run. One fails on purpose.")
    demo.type("list", "--verbose")
    explain("Validate the configuration. No output means that it is valid.")
    checked = demo.type("check")
    explain("A run as cron starts it. The log goes to a file and into a "
            "mail, only\n    the failure is printed, and no ping is sent.")
    first = demo.type("run", "--headless")
    explain("The log of that run. The failed task did not stop the others, "
            "and the\n    log does not contain the password that it printed.")
    demo.type("log")
    explain("The mail that sendmail got:")
    demo.show_mail()
    explain("One task by hand, with its output on this terminal:")
    second = demo.type("run", "-t", "database")
    explain("All runs:")
    demo.type("history")
    fine = (checked, first, second) == (0, 1, 0) and show_koi(folder)
    print("""
That was mission and koi. Next:
    sudo make install           copy both to /usr/local/bin
    mission init                write a sample configuration
    mission check               report each error with its line
    mission run                 run the tasks; in crontab with --headless
    koid &                      start koi's daemon (see README for systemd)
    koitab -e                   edit your tab, as crontab -e does
    koitab -d new               create a dashboard, which koid runs
README.md explains the rest. The demo has removed its files.""")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
