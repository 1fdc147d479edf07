#!/usr/bin/env python3
"""How koi's Schedule compares with libraries that do the same.

    python3 tests/bench/koi_next.py [--pairs N] [--python PATH]

It makes a venv with cronsim, croniter and croniter-rs (by pip, in a scratch
folder) and runs itself there. The machine is noisy, so a figure is a pair of
deeds that run in turn, A B A B ..., and what counts is the median of the
ratios pair by pair. Each row says what is wanted and what was measured;
nothing here fails.

    parse     200 expressions, read once each; no memory of the time before
    next      100 starts of each, each asked for with the one before
    stream    100 starts of each, from one iterator
    first     read an expression and ask for its first start
    zone      as next, in Europe/Berlin, which has summer time
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ["cronsim", "croniter", "croniter-rs"]
STARTS, BEGIN = 100, 1735689600     # 2025-01-01 00:00 UTC


def koitab():
    spec = importlib.util.spec_from_file_location("koitab",
                                                  ROOT / "koitab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expressions() -> list[str]:
    """200 of the vectors that all peers can read and that do run."""
    import croniter_rs
    lines = (ROOT / "tests/cases/fires.tsv").read_text().splitlines()
    specs = dict.fromkeys(line.split("\t")[0] for line in lines
                          if line[0] not in "#@" and "never" not in line)
    good = []
    for spec in specs:
        try:
            found = croniter_rs.croniter(spec, float(BEGIN), float)
            for _ in range(STARTS):
                found.get_next()
        except Exception:       # it has errors of its own for each reason
            continue
        good.append(spec)
    return good[:200]


def rated(pairs: int, count: int, ours, theirs) -> tuple[float, str]:
    """The median ratio of the pairs, and both as so many a second."""
    ratios, mine, others = [], [], []
    ours(), theirs()
    for _ in range(pairs):
        times = []
        for deed in (ours, theirs):
            began = time.perf_counter()
            deed()
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0])
        mine.append(count / times[0])
        others.append(count / times[1])
    return statistics.median(ratios), (
        f"ours {statistics.median(mine):,.0f}/s, "
        f"theirs {statistics.median(others):,.0f}/s")


def row(name: str, wanted: str, ratio: float, note: str) -> None:
    print(f"{name:<28} {wanted:<14} {ratio:<10.2f} {note}", flush=True)


def drain(iterators) -> None:
    for iterator in iterators:
        for _ in itertools.islice(iterator, STARTS):
            pass


def compare(pairs: int) -> None:
    import croniter
    import croniter_rs
    import cronsim
    koi, specs = koitab(), expressions()
    schedules = [koi.Schedule.parse(spec) for spec in specs]
    utc = datetime.datetime.fromtimestamp(BEGIN, datetime.timezone.utc)
    many = len(specs) * STARTS

    def asked(zone=koi.UTC):
        for schedule in schedules:
            after = BEGIN
            for _ in range(STARTS):
                after = schedule.next(after, zone)

    def asked_of(make):
        def deed():
            for spec in specs:
                follow = make(spec)
                for _ in range(STARTS):
                    follow()
        return deed

    def of_cronsim(when):
        return asked_of(lambda spec: cronsim.CronSim(spec, when).__next__)

    print(f"{len(specs)} expressions, Python {sys.version.split()[0]}, "
          f"load {os.getloadavg()[0]:.1f}")
    row("parse / cronsim", "at least 1", *rated(
        pairs, len(specs), lambda: [koi.Schedule.parse(s) for s in specs],
        lambda: [cronsim.CronSim(s, utc) for s in specs]))
    row("parse / croniter-rs", "", *rated(
        pairs, len(specs), lambda: [koi.Schedule.parse(s) for s in specs],
        lambda: [croniter_rs.croniter(s, float(BEGIN), float)
                 for s in specs]))
    row("next / cronsim", "at least 5", *rated(
        pairs, many, asked, of_cronsim(utc)))
    row("next / croniter", "", *rated(max(pairs // 3, 1), many, asked,
                                      asked_of(
        lambda s: croniter.croniter(s, float(BEGIN), float).get_next)))
    row("next / croniter-rs", "", *rated(pairs, many, asked, asked_of(
        lambda s: croniter_rs.croniter(s, float(BEGIN), float).get_next)))

    def stream():
        drain(schedule.starts(BEGIN) for schedule in schedules)

    row("stream / croniter-rs", "more than 1", *rated(
        pairs, many, stream,
        lambda: drain(croniter_rs.croniter(s, float(BEGIN), float)
                      for s in specs)))
    row("stream / cronsim", "", *rated(
        pairs, many, stream,
        lambda: drain(cronsim.CronSim(s, utc) for s in specs)))
    row("first / cronsim", "", *rated(
        pairs, len(specs),
        lambda: [koi.Schedule.parse(s).next(BEGIN) for s in specs],
        lambda: [next(cronsim.CronSim(s, utc)) for s in specs]))
    in_zone(pairs, many, koi, asked, of_cronsim)


def in_zone(pairs: int, many: int, koi, asked, of_cronsim) -> None:
    import zoneinfo
    name = "Europe/Berlin"
    zone = koi.Machine().zone(name)
    when = datetime.datetime.fromtimestamp(BEGIN, zoneinfo.ZoneInfo(name))
    row("zone: next / cronsim", "at least 5", *rated(
        pairs, many, lambda: asked(zone), of_cronsim(when)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11, metavar="N")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peers", help="the python of a venv that has them")
    parser.add_argument("--inside", action="store_true",
                        help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        compare(args.pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        python = args.peers
        if not python:
            venv.main([folder]) if args.python == sys.executable else \
                subprocess.run([args.python, "-m", "venv", folder], check=True)
            python = str(Path(folder) / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "-q", *PEERS],
                           check=True, stderr=subprocess.DEVNULL)
        print(f"{'figure':<28} {'wanted':<14} {'measured':<10}")
        subprocess.run([python, str(Path(__file__).resolve()), "--inside",
                        "--pairs", str(args.pairs)], check=True)


if __name__ == "__main__":
    main()
