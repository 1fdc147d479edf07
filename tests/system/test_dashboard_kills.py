"""kill -9 under load: of the dashboard, of koid, of the link between them.
What was acknowledged is there afterwards, and nothing is there twice.

`make test-all` kills more often; KILLS=200 as often as one likes.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time

import pytest

import lying_dashboard
import support
from dashboard_rig import DashboardProcess

koitab = support.load("koitab")

KILLS = int(os.environ.get("KILLS") or (60 if support.FULL else 6))
SEED = int(os.environ.get("SEED", "4711"))
PINGERS, MOST_PINGS = 3, 90     # of one check 100 pings are kept
TAB = """\
KOI_KEEP=100000
"Note" @manual echo {{{{Nonce}}}} >> {done} && sync {done}
"Out" @manual echo out {{{{N}}}}; echo err {{{{N}}}} >&2
"Long" @manual echo long; while :; do sleep 0.2; echo on; done
"""
GONE = (OSError, EOFError)      # of a dashboard that was killed in between
FINAL = ("accepted", "refused", "expired")


class Load:
    """Threads that ask for much, until they are told to stop; what each was
    told is kept. An unexpected fault of theirs is the test's."""

    def __init__(self, server: DashboardProcess, operator, koid):
        self.server, self.operator, self.koid = server, operator, koid
        self.host = operator.host(koid.name)
        self.spec = operator.specs(self.host)["Note"]
        self.round, self.over, self.faults = 0, threading.Event(), []
        self.pings: dict[str, bool] = {}        # body -> acknowledged?
        self.runs: dict[str, bool] = {}         # of koid's -> ended?
        self.requests: dict[str, bool] = {}     # nonce -> taken (202)?
        self.again = 0          # requests that were posted once more
        self.threads = []

    def start(self, *actions) -> "Load":
        self.threads = [threading.Thread(target=self.keep_on, args=action)
                        for action in actions]
        for thread in self.threads:
            thread.start()
        return self

    def keep_on(self, action, *values) -> None:
        try:
            while not self.over.is_set():
                action(*values)
        except BaseException as fault:
            self.faults.append(repr(fault))
            raise

    def more(self, counts: dict[str, bool], count: int) -> None:
        """Wait until `count` more of these were acknowledged."""
        count += sum(list(counts.values()))
        support.wait_until(
            lambda: self.faults or sum(list(counts.values())) >= count, 60,
            f"{count} acknowledged")

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
        assert self.faults == []

    def ping(self, worker: int) -> None:
        """Ping by one connection until it breaks."""
        key, number, last = self.key, 0, -1
        with contextlib.suppress(*GONE), self.server.client() as client:
            while not self.over.is_set():
                turn = self.round
                number = number + 1 if turn == last else 0
                last = turn
                if number >= MOST_PINGS:
                    self.over.wait(0.02)
                    continue
                body = f"{turn}-{worker}-{number}-{time.monotonic_ns()}"
                self.pings[body] = False
                reply = client.ask("POST", f"/ping/{key}/r{turn}-w{worker}"
                                   "?create=1", body.encode())
                assert reply.status in (200, 201), reply
                self.pings[body] = True
                self.over.wait(0.004)
        self.over.wait(0.03)

    def run(self) -> None:
        """A job of koid's, by itself."""
        number = str(time.monotonic_ns())
        self.koid.run("Out", N=number)
        self.runs[number] = True
        self.over.wait(0.05)

    def ask(self) -> None:
        """A signed request. Who was not answered asks once more."""
        nonce = os.urandom(16).hex()
        sealed = self.operator.sealed(self.host, self.operator.request(
            self.host, self.spec, {"Nonce": nonce}, nonce=nonce))
        self.requests[nonce] = False
        for _ in range(3):
            with contextlib.suppress(*GONE):
                reply = self.operator.reply("POST", "requests", sealed)
                if reply.status == 429:         # a hundred wait already
                    break
                assert reply.status == 202, reply
                self.requests[nonce] = True
                break
            self.again += 1
            self.over.wait(0.3)
        self.over.wait(0.04)

    @property
    def key(self) -> str:
        found, = self.server.rows("select ping_key from dashboard")[0]
        return found


@pytest.fixture
def server(tmp_path):
    with DashboardProcess(tmp_path) as server:
        yield server
        server.assert_no_bugs()


@pytest.fixture
def koid(server):
    koid = server.add_host("web1", TAB.format(done=server.folder / "done"))
    (server.folder / "done").touch()
    return koid


@pytest.fixture
def load(server, koid):
    load = Load(server, koid.create_dashboard(server), koid)
    yield load
    load.over.set()


def wait_for_all_runs(server: DashboardProcess, koid) -> list[dict]:
    """Until the dashboard has every run of koid's with its output; they."""
    def whole():
        runs = koid.history(limit=500)
        while runs and len(runs) % 500 == 0:
            more = koid.history(limit=500, before=runs[-1]["run"])
            runs += more
            if not more:
                break
        if any(run["state"] in ("queued", "running") for run in runs):
            return None
        there = server.rows("select count(*) from runs where state not in "
                            "('queued', 'running') and have = size")[0][0]
        return runs if there >= len(runs) else None
    return support.wait_until(whole, 90, f"all runs\n{koid.log()[-2000:]}")


def judge_runs(server: DashboardProcess, koid) -> int:
    """Check that each run of koid is there once, with the same output."""
    runs = wait_for_all_runs(server, koid)
    there = server.rows("select n, id, state, exit, signal from runs")
    assert sorted(row[0] for row in there) == sorted(
        run["run"] for run in runs), "a run is lost or doubled"
    history = sqlite3.connect(f"file:{koid.home}/history.db?mode=ro",
                              uri=True)
    ours = dict(history.execute("select run, frames from output"))
    history.close()
    by_number = {run["run"]: run for run in runs}
    for n, ident, state, status, number in there:
        run = by_number[n]
        assert (state, status, number) == (
            run["state"], run["exit"], run["signal"]), run
        kept = b"".join(data for data, in server.rows(
            "select data from outputs where run = ? order by at", ident))
        assert kept == ours.get(n, b""), (n, kept, ours.get(n))
    return len(runs)


def judge_requests(server: DashboardProcess, load: Load) -> dict[str, int]:
    """Each that was taken has come to one end, which is the truth."""
    def settled():
        states = dict(server.rows("select nonce, state from requests"))
        return states if all(state in FINAL for state in states.values()) \
            else None
    states = support.wait_until(settled, 90, "all requests to be settled")
    wait_for_all_runs(server, load.koid)
    taken = {nonce for nonce, was in load.requests.items() if was}
    assert taken <= set(states), "one that was taken is lost"
    assert set(states) <= set(load.requests)
    of_runs = server.rows(
        "select r.id from requests q join runs r on r.host = q.host and "
        "r.epoch = q.epoch and r.n = q.n where q.state = 'accepted'")
    assert len(of_runs) == len(set(of_runs)) == list(states.values()).count(
        "accepted"), "two have one run, or one has none"
    support.wait_until(lambda: not [
        run for run in load.koid.history(limit=500)
        if run["state"] in ("queued", "running")], 30, "the last to end")
    ran = (server.folder / "done").read_text().split()
    assert len(ran) == len(set(ran)), "one was executed twice"
    for nonce in load.requests:
        if states.get(nonce) != "accepted":
            assert nonce not in ran, (nonce, states.get(nonce))
    counts = {state: list(states.values()).count(state) for state in FINAL}
    return {**counts, "taken": len(taken), "executed": len(ran)}


def judge_pings(server: DashboardProcess, load: Load) -> tuple[int, int]:
    """Those acknowledged are there, and none is there twice."""
    there = [body.decode() for body, in server.rows("select body from pings")]
    lost = [body for body, was in load.pings.items()
            if was and body not in set(there)]
    assert lost == [], f"{len(lost)} lost, such as {lost[:3]}"
    assert len(there) == len(set(there)), "one is doubled"
    return sum(load.pings.values()), len(load.pings)


def test_acknowledged_writes_survive_any_kill_without_duplicates(
        server, koid, load):
    dice, pid = random.Random(SEED), koid.daemon.pid
    load.start(*[(load.ping, worker) for worker in range(PINGERS)],
               (load.run,), (load.ask,))
    begun = time.monotonic()
    for load.round in range(KILLS):
        load.more(load.pings, dice.randrange(1, 60))
        load.more(dice.choice([load.pings, load.runs, load.requests]), 1)
        server.kill()
        server.start()
    load.more(load.pings, 1 + max(0, 10 * KILLS - sum(load.pings.values())))
    load.more(load.runs, 1 + max(0, KILLS - len(load.runs)))
    load.more(load.requests, 1 + max(0, KILLS - len(load.requests)))
    load.stop()
    assert koid.daemon.poll() is None and koid.daemon.pid == pid
    lasted = time.monotonic() - begun
    runs = judge_runs(server, koid)
    requests = judge_requests(server, load)
    assert requests["accepted"] == requests["executed"], requests
    acked, sent = judge_pings(server, load)
    assert server.rows("pragma integrity_check") == [("ok",)]
    assert acked > 10 * KILLS and runs > KILLS and requests["taken"] > KILLS
    print(f"{KILLS} kills in {lasted:.0f} s: {acked} of {sent} pings "
          f"acknowledged, {runs} runs reported, requests {requests} "
          f"({load.again} asked again); lost 0, doubled 0")


def results(server: DashboardProcess) -> int:
    return server.rows("select count(*) from requests where state <> "
                       "'waiting'")[0][0]


def test_requests_end_exactly_once_when_koid_and_agent_are_killed(
        server, koid, load):
    dice, kills = random.Random(SEED), {"koid": 0, "link": 0}
    load.start((load.ask,))
    for _ in range(max(6, KILLS * 2 // 3)):
        load.more(load.requests, dice.randrange(1, 10))
        # Of each two kills one comes when there is a new result.
        if dice.random() < 0.5:
            before = results(server)
            support.wait_until(lambda seen=before: results(server) > seen, 60)
        # Each of the two is killed twice at least.
        child = support.wait_until(koid.agent, 30) \
            if kills["link"] < 2 <= kills["koid"] else koid.agent()
        if child and (kills["koid"] >= 2 > kills["link"]
                      or dice.random() < 0.6):
            os.kill(child, 9)
            kills["link"] += 1
            support.wait_until(lambda gone=child:
                               not koitab.process_start_time(gone))
        else:
            koid.stop(9)
            koid.start()
            kills["koid"] += 1
    load.stop()
    requests = judge_requests(server, load)
    runs = judge_runs(server, koid)
    # A koid that dies between its note and the start of the job leaves a
    # run that was interrupted, and is not repeated.
    assert requests["executed"] <= requests["accepted"] <= runs
    assert min(kills.values()) > 0
    print(f"killed {kills}: requests {requests}, {runs} runs; none twice")


def test_jobs_run_while_the_dashboard_is_down_and_are_shown_afterwards(
        server, koid, load):
    koid.run("Out", N="before")
    with koid.link() as link:
        long, connection, _ = link.attach("Long", {})
        connection.close()
    support.wait_until(lambda: server.rows("select 1 from runs where state = "
                                           "'running'"))
    server.kill()
    for number in range(20):
        koid.run("Out", N=str(number))
    support.wait_until(lambda: koid.ask("status")["dashboard"]["problems"])
    before, begun = koid.cpu_seconds(), time.monotonic()
    time.sleep(1)
    used = (koid.cpu_seconds() - before) / (time.monotonic() - begun)
    unsent = koid.ask("status")["dashboard"]["unsent"]
    assert unsent >= 20
    server.start()
    support.wait_until(lambda: len(server.rows("select 1 from runs")) == 22,
                       30)
    koid.ask("kill", run=long)
    assert judge_runs(server, koid) == 22
    assert load.operator.text(load.operator.runs("Long")[0]["id"]
                              ).startswith("long\non\non\n")
    texts = [load.operator.text(run["id"])
             for run in load.operator.runs("Out")]
    assert sorted(texts) == sorted(
        f"out {n}\nerr {n}\n" for n in ["before", *range(20)])
    assert used < 0.1, f"{used:.0%} of a core"
    print(f"away: 20 runs, {unsent} changes kept, koid used {used:.1%} of a "
          "core; each shown once")


def test_undelivered_results_are_sent_later_once_each(koi):
    """A dashboard that hands the same requests out, again and again, while
    it takes nothing: what waits is no longer than there are requests."""
    koi.tab('"Plain" @manual echo plain\n')
    with lying_dashboard.Dashboard() as dashboard:
        lying_dashboard.join_dashboard(koi, dashboard.url)
        koi.start()
        spec, turned_away = dashboard.specs()["Plain"], []

        def twist(payload, _handler):
            if payload.get("results"):
                turned_away.append(len(payload["results"]))
                return 503, {}, b"{}"

        dashboard.twist = twist
        bodies = [lying_dashboard.request_for(spec) for _ in range(30)]
        for _ in range(12):     # a hundred at a time, as a dashboard may
            with dashboard.turn:
                dashboard.requests = [
                    {"body": text, "mac": koitab.run_mac(
                        lying_dashboard.KEY, text)} for text in map(
                            lying_dashboard.text_of, bodies)] * 3
                dashboard.turn.notify_all()
            dashboard.wait_for(lambda: not dashboard.requests)
        koi.ended(count=30)
        support.wait_until(lambda: turned_away)
        dashboard.twist = None
        dashboard.wait_for(lambda: {body["nonce"] for body in bodies} == {
            result["nonce"] for result in dashboard.results}, 30)
        told = [result["state"] for result in dashboard.results]
        assert set(told) == {"accepted"} and len(told) <= 60
        assert max(turned_away) <= 30
        dashboard.wait_for(lambda: len(dashboard.outputs) == 30)
