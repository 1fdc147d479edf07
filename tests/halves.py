"""make test: the tests in two halves that run side by side, for most of
their time is waiting; then those that need the machine to themselves; and
one line that adds all up.

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
ALONE = {"test_koid_faults.py"}     # a daemon by a clock that the test moves
SECONDS = {     # on a machine with two cores, both busy
    "test_mission_faults.py": 165,
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


def counted(text: str) -> dict[str, int]:
    """What pytest's last line says."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    last = (text.strip().splitlines() or [""])[-1]
    for number, what in COUNTED.findall(last):
        what = "failed" if what.startswith("error") else what
        counts[what] += int(number)
    return counts


def start(python: str, options: list[str], files: list[Path],
          **how) -> subprocess.Popen:
    return subprocess.Popen(
        [python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c",
         str(TESTS / "pytest.ini"), *options, *map(str, files)],
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", **how)


def shown(process: subprocess.Popen) -> str:
    """What it says, passed on line by line."""
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    process.wait()
    return "".join(lines)


def run(python: str, options: list[str]) -> int:
    """All tests, seen as they go; the worst status."""
    files = sorted(TESTS.glob("test_*.py")) + sorted(
        TESTS.glob("system/test_*.py"))
    alone = [file for file in files if file.name in ALONE]
    first, second = halves([file for file in files if file not in alone])
    with tempfile.TemporaryFile("w+", errors="replace") as also:
        other = start(python, options, second, stdout=also)
        processes = [start(python, options, first, stdout=subprocess.PIPE)]
        texts = [shown(processes[0])]
        other.wait()
        also.seek(0)
        texts.append(also.read())
        print(texts[1], end="", flush=True)
    processes += [other, start(python, options, alone,
                               stdout=subprocess.PIPE)]
    texts.append(shown(processes[-1]))
    counts = [counted(text) for text in texts]
    print(", ".join(f"{sum(each[what] for each in counts)} {what}"
                    for what in ("passed", "failed", "skipped")))
    # 5 says that no test was collected: in no part is that well.
    return max((process.returncode for process in processes), key=abs)


if __name__ == "__main__":
    os.chdir(TESTS.parent)
    sys.exit(run(sys.argv[1], sys.argv[2:]))
