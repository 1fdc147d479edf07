"""A group of hosts on one machine: members of etcd, koids, faults, a checker.

Each member and each koid has a network namespace of its own, joined by a
bridge in another one. Time is SPEED times as fast for koid as it is for etcd,
so a minute takes seconds: `FAST` shortens what the claims' process waits for
accordingly. The job of each start appends to one log, which is the truth;
`check` compares it with the histories of the hosts.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import support

koitab = support.load("koitab")

SPEED = 10          # seconds of koid's clocks in a second
MINUTE = 60
REJOIN = 20         # seconds of koid's clocks: two seconds for etcd
# The claims' process waits in real time, for etcd.
FAST = {"ETCD_PATIENCE": 0.8, "RETRY_PAUSE": 0.1, "PROBE_PAUSE": 3.0,
        "STARTS_AT_ONCE": 4,
        # All agents on this machine have one uid, and so one limit.
        "AGENT_TASKS": 1024}
CLOCK = """
import os, random, signal, time
k.Clock.now = lambda self: {now} + (time.monotonic() - {zero}) * {speed}
k.Clock.ticks = lambda self: time.monotonic() * {speed}
timeout = k.Daemon.poll_timeout
k.Daemon.poll_timeout = lambda self: timeout(self) / {speed} \\
    if timeout(self) > 0 else timeout(self)
k.Machine.host = lambda self: {host!r}
"""
# koid ends or freezes itself when it gives its orders, so before the record in
# etcd; soon after that, so before or after it; or when it hears that it won.
FAULTS = """
import random, threading
chance, chosen = random.Random({seed}), {chosen!r}
def fail(point, pause=0):
    number = chance.choice(chosen) if chance.random() < {rate} else 0
    if number and point in {points!r}:
        threading.Timer(pause, os.kill, (os.getpid(), number)).start() \\
            if pause else os.kill(os.getpid(), number)
work, take = k.ClaimBroker.work, k.ClaimBroker.take
def work_or_fail(self, now):
    found = work(self, now)
    if any("value" in order for order in found):
        fail("ordered")
        fail("between", chance.uniform(0.001, 0.05))
    return found
def take_or_fail(self, claim, last):
    if last.get("word") == claim.word:
        fail("won")
    return take(self, claim, last)
k.ClaimBroker.work, k.ClaimBroker.take = work_or_fail, take_or_fail
"""
# What the design forbids: then a start can be forgotten, and made again.
LEASE_ON_LAST = """
program, before = k.agent_program, '"value": base64_text(order["value"])'
assert before in program(k.CLAIM_SECTIONS)
k.agent_program = lambda *names: program(*names).replace(
    before, before + ', "lease": order["lease"]').replace(
    "results = member.decide(", '''for order in work:
                    order["lease"] = member.post(
                        "/v3/lease/grant", {"TTL": 2})["ID"]
                results = member.decide(''')
"""


# What a process in the member's namespace executes.
ASK = """
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/v3/kv/range", b'{"key": "Zm9v"}', 2)
"""


class Namespace:
    """A network namespace, which lives as long as its process."""

    def __init__(self, number: int, hub: "Namespace | None" = None):
        self.address = f"10.77.0.{number}"
        self.holder = subprocess.Popen(["unshare", "-n", "cat"],
                                       stdin=subprocess.PIPE)
        mine = Path("/proc/self/ns/net").stat().st_ino
        support.wait_until(lambda: Path(
            f"/proc/{self.holder.pid}/ns/net").stat().st_ino != mine, 20)
        self.ip("link", "set", "lo", "up")
        if not hub:
            self.ip("link", "add", "br0", "type", "bridge")
            self.ip("link", "set", "br0", "up")
            return
        hub.ip("link", "add", f"p{number}", "type", "veth", "peer", "name",
               "eth0", "netns", str(self.holder.pid))
        hub.ip("link", "set", f"p{number}", "master", "br0", "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")

    @property
    def enter(self) -> tuple:
        return ("nsenter", "-t", str(self.holder.pid), "-n")

    def ip(self, *words: str) -> None:
        subprocess.run([*self.enter, support.find("ip"), *words], check=True,
                       timeout=60)

    def close(self) -> None:
        self.holder.stdin.close()
        self.holder.wait(30)


class Member:
    """A member of etcd, over plain http unless `options` say otherwise."""

    def __init__(self, folder: Path, name: str, space: Namespace | None,
                 client: str, peer: str, cluster: str = "", options=()):
        self.folder, self.space, self.url = folder / name, space, client
        self.command = [
            "etcd", "--name", name, "--data-dir", str(self.folder),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", cluster or f"{name}={peer}",
            "--heartbeat-interval", "50", "--election-timeout", "500",
            "--log-level", "error", *options]
        self.process = None

    def start(self) -> "Member":
        command = [*(self.space.enter if self.space else ()), *self.command]
        with open(f"{self.folder}.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL)
        return self

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(30)

    def answers(self) -> bool:
        """Does it answer a request that needs a quorum?"""
        return subprocess.run(
            [*(self.space.enter if self.space else ()), support.PYTHON, "-IS",
             "-c", ASK, self.url], stderr=subprocess.DEVNULL, timeout=60
            ).returncode == 0


class GroupHost:
    """A host of the group: its koid, and how it fails."""

    def __init__(self, folder: Path, group: "Group", name: str, shown: str,
                 space: Namespace | None):
        folder.mkdir()
        self.koi = support.Koi(folder)
        self.group, self.name, self.shown = group, name, shown
        self.space = space
        self.starts, self.rate = 0, 0.0
        self.points = "ordered", "between", "won"
        self.chosen = 9, 19
        self.patch = ""

    def start(self, skew: float = 0.0) -> "GroupHost":
        self.starts += 1
        koi, group = self.koi, self.group
        koi.patch = CLOCK.format(now=group.base + skew, zero=group.zero,
                                 speed=SPEED, host=self.shown)
        koi.set_constants(**FAST)
        if self.rate:
            koi.patch += FAULTS.format(
                seed=repr(f"{group.seed} {self.name} {self.starts}"),
                rate=self.rate, points=self.points, chosen=self.chosen)
        koi.patch += self.patch
        urls = [word for url in group.urls for word in ("--etcd", url)]
        koi.spawn(*urls, "--etcd-insecure",
                  wrap=self.space.enter if self.space else ())
        return self

    def claims_process(self) -> list[int]:
        return [pid for pid in support.children_of(self.koi.daemon.pid)
                if "koi-claims" in Path(f"/proc/{pid}/comm").read_text()]

    def signal(self, number: int) -> None:
        """Signal koid and its claims' process, not its jobs."""
        with contextlib.suppress(OSError):
            for pid in [*self.claims_process(), self.koi.daemon.pid]:
                support.kill(pid, number)

    def rows(self) -> list[dict]:
        """The host's own history."""
        with contextlib.closing(sqlite3.connect(
                self.koi.home / "history.db")) as db:
            found = db.execute(
                "select r.id, j.name, r.due, r.state, r.reason, r.count, "
                "r.trigger from runs r join jobs j on j.id = r.job "
                "order by r.id")
            names = ("run", "job", "due", "state", "reason", "count",
                     "trigger")
            return [dict(zip(names, row)) for row in found]

    def unsettled(self) -> int:
        """How many starts wait, or may still be found to have run."""
        with contextlib.closing(sqlite3.connect(
                self.koi.home / "history.db")) as db:
            return db.execute(
                "select (select count(*) from runs where state in ('queued', "
                "'running')) + (select count(*) from meta where name like "
                "'claim %')").fetchone()[0]


class Group:
    """Hosts that share jobs. `base` is the time at which it begins."""

    def __init__(self, folder: Path, base: float, seed: int):
        self.folder, self.base, self.seed = folder, base, seed
        self.zero = time.monotonic()
        self.log = folder / "truth"
        self.log.touch()
        self.log.chmod(0o666)
        self.members: list[Member] = []
        self.hosts: list[GroupHost] = []
        self.spaces: list[Namespace] = []
        self.events: list[tuple] = []   # (begin, end, what, which)
        self.urls: list[str] = []

    def now(self) -> float:
        """The time that a koid without skew has."""
        return self.base + (time.monotonic() - self.zero) * SPEED

    def move_to(self, now: float) -> None:
        """Let it be `now` for the koids that start from here on."""
        self.base, self.zero = now, time.monotonic()

    def single(self, hosts: int) -> "Group":
        """One member and some hosts, in this namespace."""
        client, peer = free_urls()
        self.members = [Member(self.folder, "m1", None, client, peer).start()]
        self.urls = [client]
        self.hosts = [GroupHost(self.folder / name, self, name, name, None)
                      for name in "abc"[:hosts]]
        self.wait_for_members()
        return self

    def cluster(self) -> "Group":
        """Three members and three hosts, each in its own namespace. Two hosts
        have one name, as a cloned machine has."""
        hub = Namespace(100)
        spaces = [Namespace(number, hub) for number in range(1, 7)]
        self.spaces = [*spaces, hub]
        peers = [f"http://{space.address}:2380" for space in spaces[:3]]
        self.urls = [f"http://{space.address}:2379" for space in spaces[:3]]
        cluster = ",".join(f"m{n}={peer}" for n, peer in enumerate(peers))
        self.members = [
            Member(self.folder, f"m{n}", spaces[n], self.urls[n], peers[n],
                   cluster).start() for n in range(3)]
        self.hosts = [GroupHost(self.folder / name, self, name, shown, space)
                      for name, shown, space in zip(
                          "abc", ("web1", "web2", "web2"), spaces[3:])]
        return self

    def wait_for_members(self) -> None:
        support.wait_until(lambda: all(
            member.answers() for member in self.members), 60, "etcd")

    def with_tab(self, entries: list[str], settings: str = "") -> "Group":
        """Give each host the same jobs; their log says where they ran."""
        for host in self.hosts:
            lines = ["MAILTO=\"\"", "KOI_ONE_OF=web", "KOI_KEEP=2000",
                     "CRON_TZ=Europe/Berlin", *settings.split(),
                     f"WHERE={host.name}"]
            for number, schedule in enumerate(entries):
                lines.append(
                    f'"job{number}" {schedule} read up rest < /proc/uptime; '
                    f'echo "$WHERE $KOI_RUN $up" >> {self.log}')
            host.koi.tab("\n".join(lines) + "\n")
        return self

    def executed(self) -> list[tuple]:
        """(host, run, time) of each job that was run."""
        return [(words[0], int(words[1]), self.base + (
            float(words[2]) - self.zero) * SPEED)
            for words in map(str.split, self.log.read_text().splitlines())]

    def close(self) -> None:
        for host in self.hosts:
            if host.koi.daemon:
                host.signal(signal.SIGCONT)
                host.koi.stop(signal.SIGKILL)
                host.koi.end_jobs()
        for member in self.members:
            member.kill()
        for space in self.spaces:
            space.close()


def settled(*hosts: GroupHost) -> None:
    """Wait until the hosts know of each start what became of it."""
    support.wait_until(lambda: not any(
        host.unsettled() for host in hosts), 60, "each start to be settled")


def free_urls() -> tuple[str, str]:
    """Two URLs with ports that were free just now. A port that another test
    takes meanwhile makes etcd end, and its log says so."""
    import socket
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(2):
            end = stack.enter_context(socket.socket())
            end.bind(("127.0.0.1", 0))
            ports.append(end.getsockname()[1])
    return tuple(f"http://127.0.0.1:{port}" for port in ports)


# --- faults ----------------------------------------------------------------


class Faults:
    """Injects faults at random times, and ends each of them. `pauses` are
    the least and the most seconds between two of them."""

    def __init__(self, group: Group, pauses: tuple = (5, 40)):
        self.pauses = pauses
        self.group, self.random = group, random.Random(group.seed)
        self.ends: list[tuple] = []     # (time, function), by group.now()
        self.down: set = set()          # members
        self.ill: dict = {}             # host -> since when

    def run(self, until: float) -> None:
        """Inject faults until that time, then heal all."""
        group, choose = self.group, self.random
        next_at = group.now() + 20
        while group.now() < until:
            if group.now() >= next_at:
                next_at = group.now() + choose.uniform(*self.pauses)
                choose.choice((self.stop_member, self.cut_member,
                               self.cut_host, self.freeze_host,
                               self.kill_and_freeze))()
            self.look()
            time.sleep(0.02)            # the clock of the faults
        while self.ends or self.ill:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        """End what is due, and revive koids that failed by themselves."""
        now = self.group.now()
        for each in [each for each in self.ends if each[0] <= now]:
            self.ends.remove(each)
            each[1]()
        for host in self.group.hosts:
            if host in self.ill:
                continue
            dead = host.koi.daemon.poll() is not None
            if dead:
                self.for_a_while(host, "killed", 5, 60, self.restart)
            elif support.process_state(host.koi.daemon.pid) == "T":
                if self.random.random() < 0.5:
                    host.signal(signal.SIGSTOP)
                self.for_a_while(host, "frozen", 25, 50, self.resume)

    def for_a_while(self, host: GroupHost, what: str, least: float,
                    most: float, end) -> None:
        self.ill[host] = self.group.now() - 5
        self.ends.append((
            self.group.now() + self.random.uniform(least, most),
            lambda: (end(host), self.note(self.ill.pop(host), what, host))))

    def note(self, begin: float, what: str, which) -> None:
        name = which.name if isinstance(which, GroupHost) else which.url
        self.group.events.append((begin, self.group.now(), what, name))

    def restart(self, host: GroupHost) -> None:
        host.start(skew=self.random.uniform(-4, 4))

    def resume(self, host: GroupHost) -> None:
        host.signal(signal.SIGCONT)

    def healthy(self) -> list[GroupHost]:
        return [host for host in self.group.hosts if host not in self.ill]

    def freeze_host(self) -> None:
        for host in self.healthy()[:1]:
            host.signal(signal.SIGSTOP)

    def kill_and_freeze(self) -> None:
        """A frozen host continues after the lease of the other has expired."""
        for host, number in zip(self.healthy(), (9, 19)):
            host.signal(number)

    def cut_host(self) -> None:
        for host in self.healthy()[-1:]:
            host.space.ip("link", "set", "eth0", "down")
            self.for_a_while(host, "cut off", 10, 40, lambda host:
                             host.space.ip("link", "set", "eth0", "up"))

    def one_member(self) -> Member | None:
        """A member that is up: mostly such that a quorum is left."""
        if len(self.down) > (self.random.random() < 0.2):
            return None
        return self.random.choice([member for member in self.group.members
                                   if member not in self.down])

    def stop_member(self) -> None:
        member = self.one_member()
        if member:
            member.kill()
            self.member_back(member, "killed", member.start)

    def cut_member(self) -> None:
        member = self.one_member()
        if member:
            member.space.ip("link", "set", "eth0", "down")
            self.member_back(member, "cut off", lambda: member.space.ip(
                "link", "set", "eth0", "up"))

    def member_back(self, member: Member, what: str, end) -> None:
        self.down.add(member)
        begin = self.group.now()
        self.ends.append((begin + self.random.uniform(10, 60), lambda: (
            end(), self.down.discard(member),
            self.note(begin, what, member))))


# --- the checker -----------------------------------------------------------


def expected_starts(group: Group, begin: float, end: float) -> list[tuple]:
    """(job, due) of the starts of an undisturbed host from `begin` on and
    before `end`."""
    machine = koitab.Machine()
    koi = group.hosts[0].koi
    tab = koitab.parse_tab((koi.home / "tabs" / koi.user).read_text())
    found = []
    for job in tab.jobs:
        zone = machine.zone(job.settings.zone)
        for due in job.schedule.iter_starts(int(begin) - 1, zone):
            if due >= end:
                break
            found.append((job.name, due))
    return found


class Verdict:
    """What `check` found: sentences about what must not be, and counts."""

    def __init__(self, wrong: list[str], counts: dict):
        self.wrong, self.counts = wrong, counts


def record(group: Group, begin: float, end: float) -> dict:
    """All that the checker reads, as JSON can keep it."""
    return {"seed": group.seed,
            "expected": expected_starts(group, begin, end),
            "hosts": {host.name: host.rows() for host in group.hosts},
            "executed": group.executed(), "events": group.events,
            "members": [member.url for member in group.members]}


def check(found: dict) -> Verdict:
    """Check the truth and the histories of a group.

    A start must not be executed twice. One that was not executed is on the
    record of each host, and one of them says why. If a host and a quorum had
    no fault, it must have been executed within 60 s, unless a host that
    failed after its record in etcd says so, or began it later than that: it
    is not repeated.
    """
    wrong, executed = [], {}
    runs = {(host, row["run"]): row for host, rows in found["hosts"].items()
            for row in rows}
    for host, run, at in found["executed"]:
        row = runs.get((host, run))
        if row is None:
            wrong.append(f"{host} executed run {run} and has no record of it")
            continue
        executed.setdefault((row["job"], row["due"]), []).append((host, at))
    counts = {"starts": len(found["expected"]), "executed": 0,
              "not executed": 0, "executed twice": 0, "fair": 0,
              "fair, not executed": 0, "fair, latest": 0,
              "faults": len(found["events"])}
    for job, due in map(tuple, found["expected"]):
        where = executed.get((job, due), [])
        rows = {host: [row for row in host_rows if covers(row, job, due)]
                for host, host_rows in found["hosts"].items()}
        counts["executed" if where else "not executed"] += 1
        if len(where) > 1:
            counts["executed twice"] += 1
            wrong.append(f"{job} of {due} was executed by {where}")
        reasons = [row for each in rows.values() for row in each
                   if row["state"] in ("missed", "interrupted", "skipped")
                   and row["reason"]]
        for host, each in rows.items():
            if not each:
                wrong.append(f"{host} has no record of {job} of {due}")
        if not where and not reasons:
            wrong.append(f"nobody says why {job} of {due} was not executed")
        lost = is_lost(found, due, rows)
        fair = is_fair(found, due)
        counts["fair"] += fair
        if not where and not lost and fair:
            counts["fair, not executed"] += 1
            wrong.append(f"{job} of {due} was not executed, and nothing "
                         f"hindered it: {rows}")
        for host, at in where * fair:
            if has_fault(found, host, due, at):
                continue
            counts["fair, latest"] = max(counts["fair, latest"],
                                         round(at - due, 1))
            if at - due > MINUTE:
                wrong.append(f"{host} executed {job} of {due} {at - due:.1f} "
                             f"s late, and nothing hindered it: {rows}")
    counts["latest"] = round(max((at - due for (_, due), where in
                                  executed.items() for _, at in where),
                                 default=0), 1)
    counts["states"] = {}
    for row in runs.values():
        counts["states"][row["state"]] = counts["states"].get(
            row["state"], 0) + row["count"]
    return Verdict(wrong, counts)


def covers(row: dict, job: str, due: float) -> bool:
    """Is this the record of a start? One row may count several."""
    return row["job"] == job and (row["due"] == due or row["count"] > 1
                                  and row["due"] <= due)


def is_lost(found: dict, due: float, rows: dict[str, list]) -> bool:
    """Was a start recorded in etcd by a host that failed after that? Such a
    host says so. It cannot know it if another one has made a later start
    before it looks; but then the others say that it made this one."""
    reasons = {host: " ".join(row["reason"] for row in each
                              if row["state"] != "elsewhere")
               for host, each in rows.items()}
    states = [row["state"] for each in rows.values() for row in each]
    return any("stopped before" in reason or "claimed too late" in reason
               or "later start" in reason and states.count("elsewhere") == len(
                   rows) - 1 and has_fault(found, host, due, due + MINUTE)
               for host, reason in reasons.items())


def has_fault(found: dict, which: str, begin: float, end: float) -> bool:
    return which in [each for *_, each in faults_near(found, begin, end)]


def faults_near(found: dict, begin: float, end: float) -> list[tuple]:
    """(begin, end, which) of the faults in a time. After one a member takes a
    moment to be one again, above all if a leader must be elected."""
    lasting = [(first, last + REJOIN * (which in found["members"]), which)
               for first, last, _, which in found["events"]]
    return [each for each in lasting if each[0] < end and each[1] > begin]


def is_fair(found: dict, due: float) -> bool:
    """Whether a host had no fault around a start, and no two members had."""
    near = faults_near(found, due - 10, due + MINUTE)
    ill = {which for _, _, which in near}
    return any(host not in ill for host in found["hosts"]) and not any(
        len({which for begin, end, which in near if begin <= at < end
             and which in found["members"]}) > 1
        for at in [due - 10, *(begin for begin, _, _ in near)])


def keep(found: dict, path: Path) -> Path:
    path.write_text(json.dumps(found))
    return path
