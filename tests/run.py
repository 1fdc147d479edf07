"""make test: run the test files side by side, the longest first.

    run.py [--full] [--every-python] [FILE]... [-- OPTION...]

Most tests wait for processes, so there are more workers than cores. Each
worker is a pytest with one file. It writes each test's result to a report
file as it happens (tests/conftest.py), so that the progress and the sum at
the end rest on counts and not on pytest's text.

--full          also the long form of sweeps and matrices (make test-all)
--every-python  with each Python from 3.9 to 3.14 that is found
FILE            only these test files
OPTION          for pytest
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from scratch import clean_environment, make_scratch_directory, \
    shared_temporary_directory

TESTS = Path(__file__).resolve().parent
CHECKOUT = TESTS.parent
ENVIRONMENTS = CHECKOUT / ".test-env"       # git ignores it
WORKERS = max(4, (os.cpu_count() or 1) + 3)
PYTHONS = [f"3.{minor}" for minor in range(9, 15)]
ENDS_WITHIN = 30.0      # seconds for a worker to clean up after Ctrl-C
EXIT_INTERRUPTED = 130
EXIT_NO_PYTEST = 69     # sysexits(3), EX_UNAVAILABLE

# Seconds a file takes alone, measured once: the longest starts first. The
# order of the other files does not matter.
SECONDS = {
    "test_mission_faults.py": 60, "test_mission_delivery.py": 50,
    "test_koid_groups.py": 110, "test_koid_cluster.py": 60,
    "test_koid_recipe.py": 60, "test_readme.py": 60,
    "test_koid_faults.py": 50, "test_mission_nights.py": 45,
    "test_koid_users.py": 40,
    "test_mission_builtins.py": 30, "test_dashboard_page.py": 26,
    "test_mission_git.py": 25, "test_mission_chown.py": 24,
    "test_dashboard_proxies.py": 22,
    "test_koid_runs.py": 23, "test_dashboard_whole.py": 22,
    "test_koid_beside_cron.py": 21, "test_koitab_arguments.py": 20,
    "test_koid_link.py": 19, "test_dashboard_http.py": 18,
    "test_mission_run.py": 17, "test_golden.py": 14,
    "test_koitab_link.py": 14, "test_mission_processes.py": 13,
    "test_mission_files.py": 13, "test_koid_dashboard.py": 13,
    "test_dashboard_kills.py": 12, "test_dashboard_engines.py": 20,
    "test_koitab_dashboard.py": 10, "test_koitab_crontab.py": 10,
    "test_typical_mistakes.py": 20,
}


# ==========================================================================
# pytest: from where can this Python import it?
# ==========================================================================


class Unavailable(Exception):
    """pytest is missing, and there is no way to install it."""


def find_pytest(python: str) -> tuple[str, dict[str, str]]:
    """The interpreter that runs the tests, and its additional environment.

    An installed pytest is used as it is. Else the first of these that works
    provides it: Debian's package (as root), a virtual environment, a target
    directory of pip. Raises Unavailable.
    """
    if imports_pytest(python):
        return python, {}
    folder = ENVIRONMENTS / version_of(python)
    in_environment = str(folder / "venv/bin/python3")
    target = {"PYTHONPATH": str(folder / "lib")}
    for install, found in (
            (lambda: True, (in_environment, {})),
            (lambda: True, (python, target)),
            (lambda: install_package(python), (python, {})),
            (lambda: install_in_environment(python, folder / "venv"),
             (in_environment, {})),
            (lambda: install_in_target(python, folder / "lib"),
             (python, target))):
        if install() and imports_pytest(*found):
            return found
    raise Unavailable("pytest is missing and could not be installed")


def imports_pytest(python: str, env: dict[str, str] | None = None) -> bool:
    return attempt([python, "-c", "import pytest"], env, quiet=True)


def version_of(python: str) -> str:
    return subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def attempt(command: list[str], env: dict[str, str] | None = None,
            quiet: bool = False) -> bool:
    """Run a command; was it there, and did it succeed?"""
    if not quiet:
        print("make test:", " ".join(command), flush=True)
    done = None
    try:
        done = subprocess.run(
            command, env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    except OSError as error:
        said = str(error)
    else:
        said = done.stdout
    worked = done is not None and done.returncode == 0
    if not worked and not quiet:
        print("\n".join(said.strip().splitlines()[-3:]), flush=True)
    return worked


def install_package(python: str) -> bool:
    """Debian's package, which only Debian's own Python finds."""
    if os.geteuid() or not os.path.realpath(python).startswith("/usr/bin/") \
            or not shutil.which("apt-get"):
        return False
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends",
               "python3-pytest"]
    return attempt(install, quiet) or (
        attempt(["apt-get", "update", "-q"]) and attempt(install, quiet))


def install_in_environment(python: str, folder: Path) -> bool:
    made = attempt([python, "-m", "venv", str(folder)]) and attempt(
        [str(folder / "bin/python3"), "-m", "pip", "install", "-q",
         "pytest"])
    if not made:        # Debian's Python makes half of one without ensurepip
        shutil.rmtree(folder, ignore_errors=True)
    return made


def install_in_target(python: str, folder: Path) -> bool:
    return attempt([python, "-m", "pip", "install", "-q", "--target",
                    str(folder), "pytest"])


# ==========================================================================
# Workers: one pytest for each test file
# ==========================================================================


class Worker:
    """A pytest that runs one file; its output and its report are files, for
    a pipe would stay open in whatever a test leaves running."""

    def __init__(self, command: list[str], file: Path, scratch: Path,
                 env: dict[str, str]):
        self.file, self.began = file, time.monotonic()
        self.output = scratch / f"{file.stem}.output"
        report = scratch / f"{file.stem}.report"
        report.touch()
        self.report, self.unread = open(report, encoding="utf-8"), ""
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [*command, str(file)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=CHECKOUT,
                env={**env, "TESTS_SCRATCH": str(scratch),
                     "TESTS_REPORT": str(report)}, start_new_session=True)
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.skips: list[str] = []

    def read_report(self) -> int:
        """Count the results that are new; how many those are. The last line
        may be half of one, which its test is writing."""
        *lines, self.unread = (self.unread + self.report.read()).split("\n")
        for line in lines:
            result = json.loads(line)
            self.counts[result["outcome"]] += 1
            if result["outcome"] == "skipped":
                self.skips.append(result["reason"])
        return len(lines)

    def finish(self) -> None:
        """Take in the end. A pytest that ended badly without a failed test
        has failed as a whole: it could not import the file, say."""
        self.seconds = time.monotonic() - self.began
        self.read_report()
        self.report.close()
        # 5: no test was collected, as where all of a file need root.
        if self.process.returncode not in (0, 5) and not self.counts["failed"]:
            self.counts["failed"] = 1

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")


class Queue:
    """The test files of one interpreter: those that wait, run, have ended."""

    def __init__(self, files: list[Path], command: list[str], scratch: Path,
                 env: dict[str, str], screen: Screen):
        self.waiting, self.command = files, command
        self.scratch, self.env, self.screen = scratch, env, screen
        self.running: list[Worker] = []
        self.ended: list[Worker] = []

    def run(self) -> None:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < WORKERS:
                self.running.append(Worker(self.command, self.waiting.pop(0),
                                           self.scratch, self.env))
            for worker in self.running[:]:
                worker.read_report()
                if worker.process.poll() is not None:
                    self.take_in(worker)
            self.screen.progress(self)
            time.sleep(0.1)

    def take_in(self, worker: Worker) -> None:
        worker.finish()
        self.running.remove(worker)
        self.ended.append(worker)
        self.screen.ended(worker)

    def interrupt(self) -> None:
        """Let the workers clean up, then end what does not."""
        for worker in self.running:
            worker.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + ENDS_WITHIN
        for worker in self.running[:]:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.read_report()
            self.running.remove(worker)
            self.ended.append(worker)

    def count(self, outcome: str) -> int:
        return sum(worker.counts[outcome]
                   for worker in self.ended + self.running)


class Screen:
    """Standard output: a line for each file that has ended, and between them
    how far it is, which a terminal shows in place."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.began = self.last = time.monotonic()
        self.status = ""

    def line(self, text: str = "") -> None:
        if self.status:
            print("\r\033[K", end="")
            self.status = ""
        print(text, flush=True)

    def progress(self, queue: Queue) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if self.terminal else 10.0):
            return
        self.last = now
        clock = time.strftime("%M:%S", time.gmtime(now - self.began))
        names = ", ".join(each.file.stem[5:] for each in queue.running)
        text = f"{clock}  {queue.count('passed'):,} passed, " \
            f"{queue.count('failed')} failed; running: {names}"
        if not self.terminal:
            print(text, flush=True)
            return
        self.status = text[:shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{self.status}", end="", flush=True)

    def ended(self, worker: Worker) -> None:
        counts = ", ".join(f"{number} {what}" for what, number
                           in worker.counts.items() if number)
        self.line(f"{worker.seconds:6.1f} s  {worker.file.name:34} "
                  f"{counts or 'nothing to run here'}")
        if worker.counts["failed"]:
            self.line(worker.text())

    def summary(self, queues: list[Queue]) -> None:
        """Why tests were skipped, and one line that adds all up."""
        reasons: dict[str, int] = {}
        for queue in queues:
            for worker in queue.ended:
                for reason in worker.skips:
                    reasons[reason] = reasons.get(reason, 0) + 1
        for reason, number in sorted(reasons.items()):
            self.line(f"skipped {number}: {reason}")
        self.line(", ".join(
            f"{sum(queue.count(what) for queue in queues)} {what}"
            for what in ("passed", "failed", "skipped")))


# ==========================================================================
# Command
# ==========================================================================


def test_files(chosen: list[Path]) -> list[Path]:
    """The files to run, the longest first."""
    files = [path.resolve() for path in chosen] or [
        *TESTS.glob("test_*.py"), *TESTS.glob("system/test_*.py")]
    return sorted(files, key=lambda file: (-SECONDS.get(file.name, 0),
                                           file.name))


def pythons() -> list[str]:
    """Each Python from 3.9 to 3.14 that is found in PATH or by pyenv."""
    found = []
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}"), *sorted(map(str, Path(
            "~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python3")
        ))]
        for python in filter(None, candidates):
            if attempt([python, "-c", ""], quiet=True):     # a shim may not
                found.append(python)
                break
    return found


def make_queue(python: str, options: argparse.Namespace, scratch: Path,
               screen: Screen) -> Queue:
    """The queue of one interpreter, with what its workers share."""
    python, more = find_pytest(python)
    # The tests need no plugin of the machine's pytest.
    env = {**clean_environment(), **more,
           "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
           "TMPDIR": shared_temporary_directory()}
    scratch.mkdir(mode=0o755)
    command = [python, "-X", f"pycache_prefix={scratch / 'compiled'}", "-m",
               "pytest", "-q", "-p", "no:cacheprovider", "-c",
               str(TESTS / "pytest.ini"), *options.pytest]
    if options.full:
        env["TESTS_FULL"] = "1"
    files = test_files(options.files)
    screen.line(f"{len(files)} test files, {WORKERS} at a time, "
                f"Python {version_of(python)}")
    # Compile the programs once, and not in each of the first workers.
    subprocess.run(
        [python, "-c", "import support, subprocess\nfor name in ('mission', "
         "'koitab'): subprocess.run([*support.program(name), '--version'])"],
        cwd=TESTS, stdout=subprocess.DEVNULL,
        env={**env, "TESTS_SCRATCH": str(scratch),
             "PYTHONDONTWRITEBYTECODE": "1"})
    return Queue(files, command, scratch, env, screen)


def arguments(argv: list[str]) -> argparse.Namespace:
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="run.py", description="Run the tests side by side.",
        epilog="What follows -- goes to pytest.")
    parser.add_argument("--full", action="store_true",
                        help="also the long form of sweeps and matrices")
    parser.add_argument("--every-python", action="store_true",
                        help="with each Python from 3.9 to 3.14")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args(argv[:end])
    options.pytest = argv[end + 1:]
    return options


def run(options: argparse.Namespace) -> int:
    screen, queues, status = Screen(), [], 0
    scratch = make_scratch_directory()
    used = pythons() if options.every_python else []
    try:
        for python in used or [sys.executable]:
            queues.append(make_queue(
                python, options, scratch / str(len(queues)), screen))
            queues[-1].run()
    except Unavailable as problem:
        screen.line(f"make test: error: {problem}")
        screen.line("make test: hint: as root: apt-get install python3-pytest")
        status = EXIT_NO_PYTEST
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        screen.line("interrupted; the tests that run clean up")
        queues[-1].interrupt() if queues else None
        status = EXIT_INTERRUPTED
    if queues:
        screen.summary(queues)
    if not status and any(queue.count("failed") for queue in queues):
        screen.line(f"the files of failed tests are in {scratch}")
        return 1
    shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    os.umask(0o022)
    sys.stdout.reconfigure(errors="backslashreplace")   # LANG of any kind
    sys.exit(run(arguments(sys.argv[1:])))
