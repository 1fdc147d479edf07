"""make test: the tests in two halves that run side by side, for most of
their time is waiting; and one line that adds both up.

    halves.py PYTHON [OPTION]...    what follows goes to pytest

Which file goes where is decided by its weight: seconds that were measured
once, in this table, or its length. A file is never parted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SECONDS = {     # on a machine with two cores, both busy
    "test_koid_faults.py": 274, "test_mission_faults.py": 165,
    "test_koid_users.py": 150, "test_koitab_arguments.py": 116,
    "test_dashboard_whole.py": 100, "test_mission_delivery.py": 89,
    "test_koitab_link.py": 60,
    "test_mission_builtins.py": 72, "test_koid_link.py": 66,
    "test_dashboard_page.py": 62, "test_koid_runs.py": 57,
    "test_dashboard_kills.py": 52, "test_dashboard_http.py": 40,
    "test_koid_beside_cron.py": 38, "test_mission_run.py": 33,
    "test_mission_processes.py": 32, "test_mission_chown.py": 29,
    "test_mission_git.py": 25, "test_mission_files.py": 19,
    "test_koitab_schedule.py": 14, "test_koitab_crontab.py": 11}
LINES_A_SECOND = 150    # of a file that is not in the table
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def weight(file: Path) -> float:
    return SECONDS.get(file.name) or len(
        file.read_text().splitlines()) / LINES_A_SECOND


def halves(files: list[Path]) -> list[list[Path]]:
    """The heaviest first, each to the half that has less so far."""
    found, loads = [[], []], [0.0, 0.0]
    for file in sorted(files, key=weight, reverse=True):
        less = loads.index(min(loads))
        found[less].append(file)
        loads[less] += weight(file)
    return found


def run(python: str, options: list[str]) -> int:
    """Both halves, the first one seen as it goes; the worse status."""
    files = sorted(TESTS.glob("test_*.py")) + sorted(
        TESTS.glob("system/test_*.py"))
    command = [python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "-c", str(TESTS / "pytest.ini"), *options]
    first, second = halves(files)
    with tempfile.TemporaryFile("w+") as said, \
            tempfile.TemporaryFile("w+") as also:
        other = subprocess.Popen([*command, *map(str, second)], stdout=also,
                                 stderr=subprocess.STDOUT)
        this = subprocess.Popen([*command, *map(str, first)],
                                stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, encoding="utf-8",
                                errors="replace")
        for line in this.stdout:
            print(line, end="", flush=True)
            said.write(line)
        statuses = [this.wait(), other.wait()]
        texts = []
        for file in (said, also):
            file.seek(0)
            texts.append(file.read())
        print(texts[1], end="", flush=True)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for text in texts:
        last = (text.strip().splitlines() or [""])[-1]
        for number, what in COUNTED.findall(last):
            what = "failed" if what.startswith("error") else what
            counts[what] += int(number)
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    # 5 says that no test was collected: in neither half is that well.
    return max(statuses, key=abs)


if __name__ == "__main__":
    os.chdir(TESTS.parent)
    sys.exit(run(sys.argv[1], sys.argv[2:]))
