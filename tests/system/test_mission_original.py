"""A configuration as the original's users have it, from root's crontab."""

from __future__ import annotations

import os
import subprocess

import pytest
import servers
import support

pytestmark = support.root_only

# The original's keys alone, in its layout: root runs, alice owns.
CONFIG = """\
{
    "tasks": [
        { "slug": "mail",     "name": "Mail",     "type": "exec", "scheduled": true },
        { "slug": "contacts", "name": "Contacts", "type": "exec", "scheduled": true },
        { "slug": "photos",   "name": "Photos",   "type": "exec", "scheduled": false },
        { "slug": "spotify",  "name": "Spotify",  "type": "builtin" },
        // Runs when the others are done.
        { "slug": "disk", "name": "Disk", "type": "exec", "scheduled": true, "post": true }
    ],
    "user": { "name": "alice", "email": "alice@example.com" },
    "passBin": "~/bin/pass",
    "storage": {
        "tasks":    { "path": "~/backup/tasks",   "chown": false, "commit": false },
        "logs":     { "path": "~/backup/logs",    "chown": true,  "commit": false },
        "sync":     { "path": "~/sync/backup",    "chown": true,  "commit": true },
        "local":    { "path": "~/backup/files",   "chown": true,  "commit": true },
        "helpers":  { "path": "~/backup/helpers" },
        "sessions": { "path": "~/.cache/sessions" }
    },
    "ping": { "enabled": true, "endpoint": "ENDPOINT/%s" },
    "notify": { "enabled": true },
    "mail": { "enabled": false, "type": "sendmail" },
    "filters": [ " Copying .+", " Reading .+" ]
}
"""

TASK = """\
#!/bin/bash
set -euo pipefail
. "$HELPERS_DIR/words"
echo "Copying for $TARGET_USER with $PASS_BIN"
date +%s.%N > "$SYNC_DIR/$word"; date +%s.%N > "$LOCAL_DIR/$word"
"""


@pytest.fixture
def home(host):
    """alice's home, laid out as the original's sample has it."""
    support.need("git", "notify-send")
    home = host.home[support.ALICE]
    for name in ("bin", "backup/logs", "backup/files", "backup/helpers",
                 "sync/backup", ".cache/sessions"):
        (home / name).mkdir(parents=True)
    for slug in ("mail", "contacts", "photos", "disk"):
        run = home / "backup/tasks" / slug / "run"
        run.parent.mkdir(parents=True)
        run.write_text(TASK.replace("$word", slug))
        run.chmod(0o755)
    (home / "backup/helpers/words").write_text("set -f\n")
    (home / "bin/pass").write_text("#!/bin/sh\necho secret\n")
    (home / "bin/pass").chmod(0o755)
    for repository in ("sync/backup", "backup/files"):
        subprocess.run(["git", "init", "-q", str(home / repository)],
                       check=True)
    support.own(home, support.ALICE_UID)
    # State of the test's own.
    host.setup.append("mount -t tmpfs -o mode=755 tmpfs /var/lib")
    return home


def from_crontab(host, command: str) -> support.Result:
    """As cron starts a line: sh, /root, and hardly any environment."""
    return host.run([
        "env", "-i", "HOME=/root", "LOGNAME=root", "SHELL=/bin/sh",
        "PATH=/usr/bin:/bin", "sh", "-c", f"cd /; {command}"])


def test_configuration_of_the_original_passes_check_and_runs_repeatedly(
        host, home):
    """The second night is where the original fails: git as root finds the
    ownership of alice's repository dubious."""
    with servers.Web(200) as web:
        config = home / "mission.config.json"
        config.write_text(CONFIG.replace("ENDPOINT", web.url))
        os.chown(config, support.ALICE_UID, support.ALICE_UID)
        mission = f"{support.ROOT}/mission.py -c {config}"
        nights = " && ".join([f"{mission} run --headless"] * 2)
        result = from_crontab(host, f"{mission} check && {nights}")
        assert (result.code, result.out, result.err) == (0, "", "")
        host_name = os.uname().nodename
        assert [asked.rsplit("/", 1)[1] for asked in web.asked()] == [
            host_name] * 2
    logs = sorted((home / "backup/logs").iterdir())
    assert len(logs) == 2
    text = logs[0].read_text()
    assert "Copying for alice with " + str(home / "bin/pass") in text
    order = [text.index(f"# {title}\n") for title in (
        "Start", "Task: Mail", "Task: Contacts", "Chown", "Commit",
        "Task: Disk", "Finish", "Ping")]
    assert order == sorted(order) and "Photos" not in text
    assert "NotifyFailure alice has no desktop session" in text
    for repository in ("sync/backup", "backup/files"):
        commits = host.run(["git", "-C", str(home / repository), "log",
                            "--format=%an %s"], user=support.ALICE)
        assert commits.out.count("auto run complete on") == 2, commits
        assert {support.owner(path) for path in
                (home / repository).rglob("*") if path.name != "disk"} == {
            support.ALICE_UID}


def test_bash_task_without_errexit_nounset_and_pipefail_is_named(host, home):
    run = home / "backup/tasks/mail/run"
    run.write_text("#!/bin/bash\necho hello\n")
    config = home / "mission.config.json"
    config.write_text(CONFIG.replace("ENDPOINT", "http://127.0.0.1:9"))
    os.chown(config, support.ALICE_UID, support.ALICE_UID)
    result = from_crontab(host, f"{support.ROOT}/mission.py -c {config} check")
    assert result.code == 78
    assert f"{run}:2:" in result.err and "set -euo pipefail" in result.err
