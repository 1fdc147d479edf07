"""Kill koid and its supervisors at every one of their system calls.

    python3 tests/bench/koid_sweep.py [--most N] [--folder DIR] [--only WHAT]

Three sweeps (see tests/koid_kills.py for what has to hold after each blow):

koid         killed at each call of a life with a minute and @reboot due at
             its start, a run by hand, their ends and a stop
supervisor   killed at each of its calls; koid with it, at every second one
stall        a supervisor stopped at each of its calls, koid killed, a fresh
             koid started, the supervisor let continue

Prints the counts, and each place that failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import koid_kills  # noqa: E402

SWEEPS = {"koid": koid_kills.kill_koid,
          "supervisor": koid_kills.kill_supervisor,
          "stall": koid_kills.stall_supervisor}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=int,
                        help="strike at so many calls only, spread evenly")
    parser.add_argument("--folder", help="where to work (default: a new one)")
    parser.add_argument("--only", choices=SWEEPS, help="one of the sweeps")
    args = parser.parse_args()
    wrong = 0
    for name in [args.only] if args.only else SWEEPS:
        wrong += sweep(name, args.most, args.folder)
    return 1 if wrong else 0


def sweep(name: str, most: int | None, where: str | None) -> int:
    """Do one of them, and say what came of it; how much was wrong."""
    found: list[str] = []

    def report(text: str) -> None:
        found.append(text)
        print(text.partition("\n")[0], flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seen, hits = SWEEPS[name](koid_kills.Rig(Path(folder)), most, report)
    print(f"{name}: {hits} blows in {time.monotonic() - began:.0f} s, "
          f"{len(found)} wrong; {koid_kills.counts(seen)}", flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
