"""make demo: mission on real input, in a scratch folder, without root.

A tree of files, a SQLite database and a git repository are backed up by a
run as cron would start it and by a run by hand; one task fails on purpose.
Then the history, the log and the mail are shown. Nothing outside the
scratch folder is touched.
"""

from __future__ import annotations

import email
import email.policy
import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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

SENDMAIL = """\
#!/bin/sh
# What mission would hand to the host's sendmail is kept here.
cat > "{folder}/mail/$(ls "{folder}/mail" | wc -l).eml"
"""


def backed_up_user() -> str:
    """Whose backups these are: the caller's, or for root somebody's."""
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


class Demo:
    """The scratch folder, and what is typed in it."""

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


def explain(text: str) -> None:
    print(f"\n--- {text}", flush=True)


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
    explain("Five tasks, in the order they run. One will fail on purpose.")
    demo.type("list", "--verbose")
    explain("Is the configuration right? Silence means yes.")
    checked = demo.type("check")
    explain("A run as cron starts it: the log goes to a file and a mail; "
            "only the\n    failure is said aloud, and no ping is sent.")
    first = demo.type("run", "--headless")
    explain("The log of that run. The failing task stopped no other, and "
            "the password\n    it printed is not in there.")
    demo.type("log")
    explain("The mail that was handed to sendmail:")
    demo.show_mail()
    explain("One task by hand, its output on this terminal:")
    second = demo.type("run", "-t", "database")
    explain("Everything that ran:")
    demo.type("history")
    print("""
That was mission. Next:
    sudo make install           copies mission.py to /usr/local/bin/mission
    mission init                writes a configuration to begin with
    mission check               tells what is not right yet, line by line
    mission run                 runs it by hand; --headless from crontab
README.md has the rest; nothing of this demo is left behind.""")
    return 0 if (checked, first, second) == (0, 1, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
