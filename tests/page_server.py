#!/usr/bin/env python3
"""A stand-in for the dashboard, for tests and for the eye: koitab's page with
its real policy, over made-up hosts, jobs and runs that stay as they are.

    tests/page_server.py [--port 8078] [--empty] [--many] [--hostile] [--plain]

The passphrase is that of tests/cases/keys.json. Signed requests are checked by
section Keys, as koid does it.
"""

from __future__ import annotations

import argparse
import http.server
import json
import random
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

import support  # noqa: E402

koitab = support.load("koitab")
VECTOR = json.loads((support.ROOT / "tests/cases/keys.json").read_text())
PASSWORD, SALT = VECTOR["password"], VECTOR["salt"]
DASH = "d0" * 8
HOSTS = [("web1", "Europe/Berlin", 3600), ("db1", "Europe/Berlin", 3600),
         ("mail", "UTC", 0), ("build", "America/New_York", -18000)]
FAULTS = ["error: /var/log/mail.log: read-only file system",
          "rsync error: some files vanished before they could be sent",
          "nginx: [emerg] cannot load certificate: no such file",
          "Fatal: unable to open repository: no route to host",
          "ENOSPC: no space left on device, write 'dist/index.html'"]
JOBS = """\
Backup|Database dump|15 2 * * *|At 02:15|pg_dump -Fc shop > /backup/shop.dump
Backup|Files|30 2 * * *|At 02:30|restic backup /srv --exclude-caches
Backup|Check restore|0 5 * * 0|At 05:00 on Sundays|restic check --read-data
Backup|Copy off site|0 4 * * *|At 04:00|rclone sync /backup remote:koi
Shop|Send invoices|*/15 * * * *|Every 15 minutes|/opt/shop/bin/invoices
Shop|Import orders|*/5 * * * *|Every 5 minutes|/opt/shop/bin/import --all
Shop|Price feed|10 * * * *|At minute 10|curl -fsS https://feed/x | prices -
Shop|Clean carts|40 3 * * *|At 03:40|psql -c "delete from carts where old"
System|Rotate logs|25 6 * * *|At 06:25|logrotate /etc/logrotate.conf
System|Renew certificates|17 4,16 * * *|At 04:17 and 16:17|certbot renew -q
System|Security updates|0 6 * * *|At 06:00|apt-get -q update
|Say Hi|@manual|By hand|~/tweet.sh {{To Handle}} {{Delay, int, 0}}\
 {{Emoji, bool}}
|Restart web|@manual|By hand|systemctl restart {{Unit,\
 choice(nginx|php-fpm|redis), nginx}}
|Warm cache|@reboot|When the machine starts|/opt/shop/bin/warm
""".splitlines()
ALL_TYPES = [
    {"name": "To Handle", "type": "string", "default": None, "choices": []},
    {"name": "Message", "type": "text", "default": "Hello,\nhow are you?",
     "choices": []},
    {"name": "Delay", "type": "int", "default": "0", "choices": []},
    {"name": "Emoji \U0001f603", "type": "bool", "default": "true",
     "choices": []},
    {"name": "Tone", "type": "choice", "default": "warm",
     "choices": ["warm", "cool", "o'brien's"]},
    {"name": "Not before", "type": "date", "default": None, "choices": []},
    {"name": "Token", "type": "secret", "default": None, "choices": []}]
HOSTILE = ["<img src=x onerror=alert(1)>",
           "</script><script>alert(2)</script>",
           "javascript:alert(3)", '"><svg onload=alert(4)>', "\u202egnp.exe",
           "\x1b[31mred\x1b[0m", "{{constructor}}", "__proto__"]


def frame(stream: int, ms: int, text: str | bytes) -> bytes:
    return koitab.frame(stream, ms, text.encode() if isinstance(text, str)
                        else text)


def params_of(command: str) -> list[dict]:
    import re
    found = []
    for inner in re.findall(r"\{\{(.*?)\}\}", command):
        name, kind, usual = ([part.strip() for part in inner.split(",", 2)]
                             + [None, None])[:3]
        choices = kind[7:-1].split("|") if kind and "(" in kind else []
        found.append({"name": name, "default": usual, "choices": choices,
                      "type": "choice" if choices else kind or "string"})
    return found


class World:
    """All that the made-up dashboard knows."""

    def __init__(self, empty=False, many=False, hostile=False, now=None,
                 recent_runs=90, well=False, founded=True):
        self.now = now or time.time()
        self.dice = random.Random(7)
        self.seq, self.changes = 1, []
        self.news = threading.Condition()
        self.keys = koitab.derive_keys(PASSWORD, bytes.fromhex(SALT))
        self.hosts, self.jobs, self.runs, self.checks = {}, {}, {}, {}
        self.alerts, self.audit, self.channels = {}, [], []
        self.requests, self.outputs, self.settings = {}, {}, {}
        self.may_deliver, self.delivery_error = threading.Event(), ""
        self.may_deliver.set()
        self.tries = 0
        self.is_founded = founded
        self.tokens = []
        self.hostile, self.recent_runs = hostile, recent_runs
        if not empty:
            self.make_hosts()
            self.make_jobs(many)
            self.make_special()
            self.make_checks()
            self.make_audit()
        if well:
            self.make_well()

    # --- what is made up

    def odd(self, text: str) -> str:
        """The text, after a hostile one if this world has them."""
        return self.dice.choice(HOSTILE) + text if self.hostile else text

    def make_hosts(self):
        for number, (name, zone, offset) in enumerate(HOSTS):
            ident = f"{number + 1:x}" * 32
            if name == "web1":
                ident = VECTOR["host"]
            down = name == "build"
            key = koitab.host_key(self.keys.run if name != "mail" else
                                  bytes(32), ident)
            self.hosts[ident] = {
                "id": ident, "name": self.odd(name), "zone": self.odd(zone)
                if self.hostile else zone, "offset": offset,
                "seen": self.now - (900 if down else 4),
                "state": "down" if down else "up",
                "skew": 43.0 if name == "mail" else 0.1, "version": "1.0",
                "key": koitab.key_id(key), "since": self.now - 9e6,
                "snoozed": 0, "bytes": 212_000_000 + number, "runs": 12_304,
                "problems": ["/etc/cron.d/old:3: expected 0 to 23, found '24'"]
                if name == "db1" else []}

    def make_jobs(self, many: bool):
        copies = 300 // (len(JOBS) * len(HOSTS)) + 1 if many else 1
        for copy in range(copies):
            for host in self.hosts:
                for line in JOBS:
                    self.add_job(host, line, copy)
        if many:
            for number, job in enumerate(list(self.jobs.values())):
                if number >= 300:
                    del self.jobs[job["id"]]

    def add_job(self, host: str, line: str, copy: int = 0, params=None,
                confirm: str = "no"):
        section, name, when, words, command = line.split("|", 4)
        if "choice(" in line:
            command = line.split("|", 4)[4]
        number = len(self.jobs) + 1
        name = self.odd(name + (f" {copy + 1}" if copy else ""))
        section = self.odd(section) if section else ""
        command = self.odd(command) if self.hostile else command
        job = {"id": number, "host": host, "user": "root" if section !=
               "Shop" else "shop", "tag": koitab.short_hash(f"{host}{number}"),
               "section": section, "name": name, "label": name,
               "when": when, "words": words, "command": command,
               "about": self.odd("Sends a greeting to somebody.")
               if "Say Hi" in name else "",
               "manual": when == "@manual", "confirm": "yes" if
               "Restart" in name else confirm, "removed": False,
               "next": self.now + self.dice.randint(20, 50_000)
               if when[0] != "@" else None, "state": "ok", "running": [],
               "usual": None, "snoozed": 0, "failing": None, "last": None,
               "recent_runs": []}
        self.jobs[number] = job
        job["params"] = params_of(command) if params is None else params
        self.make_runs(job)

    def make_runs(self, job: dict):
        every = {"*/5": 300, "*/15": 900, "10": 3600}.get(
            job["when"].split(" ")[0], 86400)
        count = 12 if job["manual"] else 4 if job["when"][0] == "@" \
            else self.recent_runs
        usual = min(self.dice.choice([0.2, 1.2, 14, 95, 1800]), every / 9)
        fails = self.dice.random() < 0.07
        for back in range(count, 0, -1):
            at = self.now - back * every + self.dice.random() * 2
            state, exit_status = "done", 0
            if fails and back <= 4 or self.dice.random() < 0.012:
                exit_status = self.dice.choice([1, 1, 2, 3, 127])
            elif self.dice.random() < 0.006:
                state = "missed"
            self.add_run(job, at, usual * self.dice.uniform(0.7, 1.5),
                         state, exit_status)
        self.settle(job)

    def add_run(self, job, at, took, state="done", exit_status=0, **more):
        number = len(self.runs) + 1
        started = at if state in ("done", "running") else None
        run = {"id": number, "job": job["id"], "host": job["host"],
               "n": number % 997, "epoch": 1, "trigger": "manual"
               if job["manual"] else "schedule", "state": state, "due": at
               if not job["manual"] else None, "requested_at": at,
               "started": started, "ended": at + took if state == "done"
               else None, "exit": exit_status if state == "done" else None,
               "signal": None, "reason": "", "args": self.args_of(job),
               "attempt": 1, "count": 1, "bytes": 900, "cut": False,
               "size": 1000, "have": 1000, "line": self.odd(
                   FAULTS[job["id"] % len(FAULTS)] if exit_status
                   else "done."), **more}
        self.runs[number] = run
        outcome = {"done": "f" if exit_status else "o", "missed": "m",
                  "running": "r", "elsewhere": "e"}.get(state, "i")
        job["recent_runs"] = [*job["recent_runs"], [
            number, at, took if state == "done" else None, outcome]][-90:]
        job["last"] = run
        return run

    def args_of(self, job) -> dict:
        made = {"int": "5", "bool": "true", "date": "2026-03-29",
                "secret": "******"}
        return {param["name"]: made.get(param["type"]) or (
            param["choices"] or ["o'brien"])[0] for param in job["params"]}

    def settle(self, job: dict):
        times = sorted(cell[2] for cell in job["recent_runs"] if cell[2])
        if len(times) > 9:
            job["usual"] = [times[len(times) // 10],
                            times[len(times) * 9 // 10]]
        bad = 0
        for cell in reversed(job["recent_runs"]):
            if cell[3] != "f":
                break
            bad += 1
        last = job["last"]
        job["state"] = "failed" if bad else "missed" \
            if last["state"] == "missed" else "ok"
        if bad:
            good = [cell for cell in job["recent_runs"] if cell[3] == "o"]
            job["failing"] = {
                "since": job["recent_runs"][-bad][1], "count": bad,
                "last_ok": good[-1][1] if good else None,
                "line": last["line"]}
            self.alert(f"job:{job['id']}", "failed",
                       job["recent_runs"][-bad][1],
                       f"exit {last['exit']}: {last['line']}")
        if self.hosts[job["host"]]["state"] == "down":
            job["state"], job["failing"] = "unknown", None
            self.alerts.pop(f"job:{job['id']}\nfailed", None)
            self.alert(f"host:{job['host']}", "down", self.now - 800,
                       "not heard for 13 min; its jobs may run, or not")

    def alert(self, subject, kind, since, text):
        self.alerts[f"{subject}\n{kind}"] = {
            "subject": subject, "kind": kind, "since": since, "text": text}

    def make_special(self):
        """Jobs for the harder pictures: 4 MiB, live, every type."""
        web1 = VECTOR["host"]
        self.add_job(web1, "Office|Write a message|@manual|By hand|~/tweet.sh "
                     "--to={{To Handle}} {{Message}} {{Delay}} {{Emoji "
                     "\U0001f603}} {{Tone}} {{Not before}} {{Token}}",
                     params=ALL_TYPES)
        self.every_type = max(self.jobs)
        self.add_job(web1, "Shop|Import catalogue|0 1 * * *|At 01:00|"
                     "make -C catalogue")
        job = self.jobs[max(self.jobs)]
        output = largest_output()
        self.big = self.add_run(job, self.now - 7200, 5400, exit_status=2,
                                bytes=len(output), size=len(output),
                                have=len(output))["id"]
        self.outputs[self.big] = output
        self.settle(job)
        self.add_job(web1, "Shop|Build the site|0 0 * * *|At 00:00|"
                     "npm run build")
        job = self.jobs[max(self.jobs)]
        self.colours = self.add_run(job, self.now - 240, 12,
                                    exit_status=3)["id"]
        self.outputs[self.colours] = colourful()
        self.settle(job)
        self.add_job(web1, "Backup|Rotate logs|0 0 * * *|At 00:00|true")
        self.quiet = job = self.jobs[max(self.jobs)]["last"]["id"]
        self.outputs[self.quiet] = b""
        self.runs[self.quiet]["bytes"] = 0
        self.add_job(web1, "Shop|Compile|0 0 * * *|At 00:00|make")
        self.add_job(web1, "Shop|Follow orders|0 0 * * *|At 00:00|tail -f")
        job = self.jobs[max(self.jobs)]
        self.live = self.add_run(job, self.now - 12, 0, "running")["id"]
        self.outputs[self.live] = b"".join(frame(
            1, 100 * i, f"line {i} of what goes on\n") for i in range(40))
        job["state"], job["running"] = "running", [self.live]

    def make_checks(self):
        for number, (name, state, words, kind) in enumerate((
                ("Laptop backup", "up", "Every day", "simple"),
                ("NAS scrub", "down", "Every 7 days", "simple"),
                ("Payroll export", "late", "At 06:00", "cron"),
                ("New thing", "new", "Every hour", "simple"),
                ("Old printer", "paused", "Every hour", "simple"))):
            ident = f"{number:08x}-0000-4000-8000-{number:012x}"
            last = None if state == "new" else self.now - 86400 * number - 99
            self.checks[ident] = {
                "id": ident, "name": self.odd(name), "slug":
                name.lower().replace(" ", "-"), "tags": "office",
                "desc": self.odd("Ask in the office."), "kind": kind,
                "period": 86400, "grace": 3600, "schedule": "0 6 * * *",
                "tz": "Europe/Berlin", "start_within": 0, "run_limit": 0,
                "manual_resume": False, "methods": "", "state": state,
                "started": number == 0, "last_ping": last,
                "last_start": last, "last_duration": 61.5 if last else None,
                "next": self.now + 3000 if state == "up" else None, "n":
                30 if last else 0, "words": words, "snoozed": 0,
                "recent_runs": [[n, self.now - 86400 * (30 - n), 60.0 + n % 7,
                           "f" if n == 11 else "o"] for n in range(30)]
                if last else []}
            if state == "down":
                self.alert(f"check:{ident}", "down", self.now - 7200,
                           "no ping for 8 days")

    def make_well(self):
        """Nothing is wrong, though something failed once."""
        self.alerts.clear()
        for host in self.hosts.values():
            host.update(state="up", seen=self.now)
        for job in self.jobs.values():
            good = [run for run in self.runs.values()
                    if run["job"] == job["id"] and run["exit"] == 0]
            job.update(failing=None, state="running" if job["running"]
                       else "ok" if good else "new", last=good[-1] if good
                       else None)
        for check in self.checks.values():
            check["state"] = {"down": "up", "late": "up"}.get(
                check["state"], check["state"])

    def make_audit(self):
        manual = [job for job in self.jobs.values() if job["manual"]]
        for number in range(25):
            job = manual[number % len(manual)]
            state = ("refused" if number == 3 else "expired"
                     if number == 9 else "accepted")
            self.audit.append({
                "at": self.now - 3000 * (number + 1), "who": "operator",
                "what": "run", "host": job["host"], "job": job["id"],
                "label": job["label"], "args": self.args_of(job),
                "state": state, "reason": "it has expired, 4 s ago by the "
                "host's clock" if number == 3 else "", "run":
                job["last"]["id"] if state == "accepted" else None})
        self.channels = [
            {"id": 1, "kind": "mail", "target": "ops@example.org", "last":
             self.now - 7200, "error": "", "options": {}},
            {"id": 2, "kind": "ntfy", "target": "https://ntfy.sh/koi",
             "options": {}, "last": None, "error": self.odd("it said 503")}]

    # --- requests

    def state(self, role: str) -> dict:
        return {"seq": self.seq, "now": time.time(), "version": "1.0",
                "role": role, "dash": {
                    "id": DASH, "salt": SALT, "rounds": 600_000,
                    "ping_key": "pk" * 11, "badge_key": "bk" * 11},
                "hosts": list(self.hosts.values()),
                "jobs": list(self.jobs.values()),
                "checks": list(self.checks.values()),
                "requests": [request for request in self.requests.values()
                             if request["state"] == "waiting"],
                "alerts": list(self.alerts.values())}

    def push(self, **change):
        with self.news:
            self.seq += 1
            self.changes.append({"seq": self.seq, **change})
            self.news.notify_all()

    def frames(self, run: int) -> bytes:
        if run not in self.outputs:
            self.outputs[run] = ordinary(self.runs[run], self.hostile)
        return self.outputs[run]

    def list_of(self, host: str) -> dict:
        name = self.hosts[host]["name"]
        key = koitab.host_key(bytes(32) if name == "mail" else self.keys.run,
                              host)
        body = json.dumps({
            "v": 1, "dash": DASH, "host": host, "key": koitab.key_id(key),
            "name": name, "at": int(self.now * 1000), "jobs": [
                self.spec(job) for job in self.jobs.values()
                if job["host"] == host]}, ensure_ascii=False)
        return {"body": body, "mac": koitab.list_mac(key, body)}

    @staticmethod
    def spec(job: dict) -> str:
        return json.dumps({name: job[name] for name in (
            "user", "tag", "section", "name", "label", "when", "words",
            "command", "params", "confirm", "about")}, ensure_ascii=False)

    def verify(self, sent: dict) -> dict:
        """What koid would say to a signed request."""
        host, now = sent["host"], time.time()
        key = koitab.host_key(self.keys.run, host)
        request = koitab.verify_request(key, sent["body"], sent["mac"])
        why = koitab.request_mismatch(request,
                                      {"key": koitab.key_id(key), "dash": DASH,
                                              "host": host}, now, 0)
        job = next((job for job in self.jobs.values() if job["host"] == host
                    and job["tag"] == request.get("tag")), None)
        if request["do"] == "run" and (not job or koitab.sha256_hex(
                self.spec(job)) != request["job"]):
            why = "its line in the tab has changed: reload the page"
        request["refused"] = why
        return request

    def carry_out(self, request: dict):
        nonce = request["nonce"]
        self.settle_request(request, nonce)
        self.push(requests=[self.requests[nonce]])

    def settle_request(self, request: dict, nonce: str):
        if request["refused"]:
            self.requests[nonce].update(state="refused",
                                        reason=request["refused"])
            return
        if request["do"] == "kill":
            self.requests[nonce]["state"] = "accepted"
            return
        job = next(job for job in self.jobs.values()
                   if job["tag"] == request["tag"])
        run = self.add_run(job, time.time(), 0, "running")
        run["args"] = {**request["args"], **dict.fromkeys(request["secrets"],
                                                        "******")}
        self.outputs[run["id"]] = frame(1, 5, "started\n")
        job["state"], job["running"] = "running", [run["id"]]
        self.requests[nonce].update(state="accepted", run=run["id"])
        self.push(jobs=[job], runs=[run])
        threading.Timer(1.5, self.finish, (job, run)).start()

    def finish(self, job: dict, run: dict):
        self.outputs[run["id"]] += frame(1, 1400, "tweeted \u2714\n")
        run.update(state="done", exit=0, ended=time.time())
        job["recent_runs"][-1][2:] = [1.5, "o"]
        job["state"], job["running"] = "ok", []
        self.push(jobs=[job], runs=[run])

    def search(self, text: str, only: int | None) -> list[dict]:
        hits = []
        for run in sorted(self.runs.values(), key=lambda run: -run["id"]):
            if only and run["job"] != only or run["id"] == self.big:
                continue
            lines = koitab.output_text(self.frames(run["id"])).decode(
                errors="replace").split("\n")
            found = [line for line in lines if text.lower() in line.lower()]
            if found:
                hits.append({"run": run, "line": found[0]})
        return hits[:30]

    def day(self, start: float, end: float) -> dict:
        rows = {}
        for run in self.runs.values():
            at = run["started"] or run["due"]
            if at and at < end and (run["ended"] or at) >= start \
                    and run["job"] in self.jobs:
                row = rows.setdefault(run["job"], {
                    "job": run["job"], "bars": [], "missing": []})
                if run["state"] == "missed":
                    row["missing"].append([at, run["id"]])
                else:
                    row["bars"].append([
                        at, run["ended"], "f" if run["exit"] else
                        "e" if run["state"] == "elsewhere" else
                        "r" if not run["ended"] else "o", run["id"]])
        return {"rows": list(rows.values()), "from": start, "to": end}


def ordinary(run: dict, hostile: bool) -> bytes:
    if run["state"] not in ("done", "running"):
        return b""
    dice = random.Random(run["id"])
    found, ms = [], 0
    for number in range(dice.randint(3, 60)):
        ms += dice.randint(1, 400)
        found.append(frame(1, ms, f"2026-03-01 02:15:{number % 60:02d} INFO "
                           f"step {number} took {dice.randint(1, 99)} ms, "
                           f"{dice.randint(1, 9999)} rows\n"))
    for text in HOSTILE if hostile else ():
        found.append(frame(2, ms, text + "\n"))
    if run["exit"]:
        found.append(frame(2, ms + 9, run["line"] + "\n"))
    else:
        found.append(frame(1, ms + 9, "done.\n"))
    return b"".join(found)


def largest_output() -> bytes:
    """The most that is kept of a run: 4 MiB, in lines of 100 bytes."""
    lines = [f"{f'line {n}: cc -O2 -c part_{n}.c':<99}\n"
             for n in range(1, 4 * 2**20 // 100 + 1)]
    return b"".join(frame(1 + (at // 640 % 9 == 8), at, "".join(
        lines[at:at + 640])) for at in range(0, len(lines), 640))


def colourful() -> bytes:
    lines = ["\x1b[1m> shop@2.4.0 build\x1b[0m", "> vite build", ""]
    found = [frame(1, 30, "\n".join(lines) + "\n")]
    for part in range(0, 101, 4):
        found.append(frame(1, 200 + part * 40, "\r\x1b[36mtransforming\x1b[0m"
                           f" {'#' * (part // 4)}{'.' * (25 - part // 4)} "
                           f"{part}%"))
    palette = "".join(f"\x1b[{n}m {n} \x1b[0m" for n in (
        *range(30, 38), *range(90, 98)))
    back = "".join(f"\x1b[{n}m {n} \x1b[0m" for n in (
        *range(40, 48), *range(100, 108)))
    cube = "".join(f"\x1b[38;5;{n}m\u2588\u2588" for n in range(16, 52))
    found.append(frame(1, 4300, f"\n{palette}\n{back}\n{cube}\x1b[0m\n"
                       "\x1b[38;2;255;120;0mtrue colour\x1b[0m \x1b[4munder"
                       "\x1b[0m \x1b[3mitalic\x1b[0m \x1b[9mstrike\x1b[0m "
                       "\x1b[7minverse\x1b[0m \x1b[2mdim\x1b[0m\n"
                       "see \x1b]8;;https://example.org/docs\x1b\\the "
                       "documentation\x1b]8;;\x1b\\ for more\n"
                       "a bell \a and a \u202ereversed name\n"))
    found.append(frame(2, 9000, "\x1b[33mwarning\x1b[0m: 3 chunks are larger "
                       "than 500 kB after minification\n"))
    found.append(frame(0, 9100, "2,048 bytes left out here"))
    for number in range(40):
        found.append(frame(1, 9200 + number * 50, f"dist/assets/page-"
                           f"{number:02d}.js   {number * 3.1:6.2f} kB \u2502 "
                           f"gzip: {number * 1.1:5.2f} kB\n"))
    found.append(frame(2, 11800, "\x1b[1;31merror\x1b[0m: ENOSPC: no space "
                       "left on device, write 'dist/index.html'\n"
                       "    at writeFile (node:fs:2317:11)\n"))
    return b"".join(found)


class Page(http.server.BaseHTTPRequestHandler):
    """The API of the dashboard, as far as the page asks for it."""
    protocol_version = "HTTP/1.1"
    wbufsize = 65536

    @property
    def world(self) -> World:
        return self.server.world

    def log_message(self, *_words):
        pass

    def send(self, status: int, body: bytes, kind="application/json", **more):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Expose-Headers",
                         "X-Koi-Size, X-Koi-Live, Retry-After")
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def answer(self, value, status: int = 200, **more):
        self.send(status, json.dumps(value).encode(), **more)

    def refuse(self, status: int, error: str, hint: str = "", **more):
        self.answer({"error": error, "hint": hint}, status, **more)

    def do_OPTIONS(self):
        self.send(204, b"", Access_Control_Allow_Headers="Authorization, "
                  "Content-Type", Access_Control_Allow_Methods="GET, POST, "
                  "DELETE")

    def do_GET(self):
        self.route("GET", None)

    def do_DELETE(self):
        self.route("DELETE", None)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        self.route("POST", json.loads(self.rfile.read(size)))

    def route(self, method: str, body):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values
                 in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        if url.path == "/":
            page = koitab.served_page()
            return self.send(
                200, koitab.gzip_parts([(page.encode(), 9)]),
                "text/html; charset=utf-8", Content_Encoding="gzip",
                Content_Security_Policy=koitab.page_policy_of(page))
        if parts[:2] != ["api", "v1"]:
            return self.refuse(404, "not found")
        if parts[2] == "salt":
            return self.salt()
        role = self.role()
        if not role:
            self.world.tries += 1
            if self.world.tries > 5:
                return self.refuse(429, "too many tries", Retry_After="40")
            return self.refuse(401, "that key is not known here")
        handler = getattr(self, f"{method.lower()}_{parts[2]}", None)
        try:
            if method == "POST" and role != "operator":
                return self.refuse(403, "a viewer can only read")
            if not handler:
                return self.refuse(404, "not found")
            return handler(parts[3:], query if body is None else body)
        except (KeyError, StopIteration):
            return self.refuse(404, "no such thing")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        return None

    def role(self) -> str:
        token = (self.headers.get("Authorization") or "")[7:]
        keys = self.world.keys
        return {keys.api.hex(): "operator", VECTOR["view"]: "viewer"}.get(
            token, "")

    def salt(self):
        if not self.world.is_founded:
            return self.refuse(404, "there is no such dashboard")
        return self.answer({"dash": DASH, "salt": SALT,
                     "rounds": self.server.rounds})

    def get_state(self, _rest, _query):
        self.send(200, koitab.gzip_parts(koitab.state_parts(
            self.world.state(self.role()))), "application/json",
            Content_Encoding="gzip")

    def get_stream(self, _rest, query):
        if self.server.deaf:
            return self.refuse(503, "not now")
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        self.wfile.flush()
        since, world = int(query["since"]), self.world
        while not self.server.closing:
            with world.news:
                fresh = [one for one in world.changes if one["seq"] > since]
                if not fresh:
                    world.news.wait(5)
            for one in fresh:
                self.wfile.write(json.dumps(one).encode() + b"\n")
                since = one["seq"]
            if not fresh:
                self.wfile.write(b"\n")
            self.wfile.flush()
        return None

    def get_hosts(self, rest, _query):
        self.answer(self.world.list_of(rest[0]))

    def get_jobs(self, rest, query):
        before = int(query.get("before") or 10**9)
        limit = int(query.get("limit") or 100)
        runs = [run for run in self.world.runs.values()
                if run["job"] == int(rest[0]) and run["id"] < before]
        runs = runs[::-1]
        self.answer({"runs": runs[:limit], "more": len(runs) > limit})

    def get_runs(self, rest, query):
        world, number = self.world, int(rest[0])
        run = world.runs[number]
        if len(rest) == 1:
            ids = [one["id"] for one in world.runs.values()
                   if one["job"] == run["job"]]
            good = [i for i in ids if i < number and world.runs[i]["exit"]
                    == 0]
            at = ids.index(number)
            return self.answer({
                "run": run, "job": world.jobs[run["job"]],
                "lines": koitab.last_lines(world.frames(number), True)
                if run["exit"] else [], "good": good[-1]
                if good else None, "older": ids[at - 1] if at else None,
                "newer": ids[at + 1] if at + 1 < len(ids) else None})
        if rest[1] == "raw":
            return self.send(200, koitab.output_text(world.frames(number)),
                             "text/plain; charset=utf-8")
        at, size = int(query["from"]), int(query["len"])
        end = time.monotonic() + float(query.get("wait") or 0)
        while run["state"] == "running" and len(world.frames(number)) <= at \
                and time.monotonic() < end:
            time.sleep(0.05)
        data = world.frames(number)
        return self.send(200, data[at:at + size], "application/octet-stream",
                         X_Koi_Size=str(len(data)),
                         X_Koi_Live=str(int(run["state"] == "running")))

    def get_search(self, _rest, query):
        self.answer({"matches": self.world.search(query["q"], int(
            query.get("job") or 0)), "more": False})

    def get_day(self, _rest, query):
        self.answer(self.world.day(float(query["from"]),
                                   float(query["to"])))

    def get_audit(self, _rest, _query):
        self.answer({"rows": self.world.audit, "more": False})

    def get_channels(self, _rest, _query):
        self.answer({"channels": self.world.channels})

    def get_settings(self, _rest, _query):
        self.answer({"failures": 1, "host_down": 90})

    def get_requests(self, rest, _query):
        self.answer(self.world.requests[rest[0]])

    def get_checks(self, rest, _query):
        check = self.world.checks[rest[0]]
        if len(rest) == 4:
            return self.send(200, b"what the job said\n<b>bold</b>\n",
                             "text/plain; charset=utf-8")
        kinds = ("success", "start", "success", "fail", "log")
        return self.answer({"more": False, "pings": [
            {"n": n, "at": self.world.now - 3600 * (check["n"] - n),
             "kind": kinds[n % 5], "exit": 3 if kinds[n % 5] == "fail"
             else None, "rid": None, "method": "POST", "ua":
             self.world.odd("curl/7.88.1"), "ip": "192.0.2.7", "size": 31 if
             n % 5 else 0, "duration": 61.0 if n % 5 == 2 else None,
             "line": self.world.odd("what the job said") if n % 5 else ""}
            for n in range(check["n"], 0, -1)]})

    def post_requests(self, _rest, body):
        world = self.world
        request = world.verify(body)
        job = next((job for job in world.jobs.values() if (
            job["host"], job["tag"]) == (request["host"], request.get("tag"))),
            {"id": None})
        world.requests[request["nonce"]] = {
            "nonce": request["nonce"], "state": "waiting", "reason": "",
            "run": None, "what": request["do"], "host": request["host"],
            "job": job["id"], "expires": request["exp"] / 1000}
        world.last_request = request
        if world.hosts[request["host"]]["state"] == "up":
            threading.Timer(0.3, world.carry_out, (request,)).start()
        world.push(requests=[world.requests[request["nonce"]]])
        self.answer({"nonce": request["nonce"], "state": "waiting"}, 202)

    def delete_requests(self, rest, _query):
        found = self.world.requests[rest[0]]
        found["state"] = "withdrawn"
        self.world.push(requests=[found])
        self.answer(found)

    def post_tokens(self, _rest, body):
        self.world.tokens.append(body)
        self.answer({})

    def post_snooze(self, _rest, body):
        kind, ident = body["subject"].split(":", 1)
        if body["until"] == "well":
            body["until"] = koitab.UNTIL_WELL
        world = self.world
        if kind == "job":
            world.jobs[int(ident)]["snoozed"] = body["until"]
            world.push(jobs=[world.jobs[int(ident)]])
        elif kind == "check":
            world.checks[ident]["snoozed"] = body["until"]
            world.push(checks=[world.checks[ident]])
        elif kind == "host":
            world.hosts[ident]["snoozed"] = body["until"]
            world.push(hosts=[world.hosts[ident]])
        self.answer({})

    def post_checks(self, rest, body):
        import uuid
        world = self.world
        if rest:
            check = world.checks[rest[0]]
            if body["do"] == "delete":
                del world.checks[rest[0]]
                world.push(gone={"checks": [rest[0]]})
                return self.answer({})
            if body["do"] == "edit":
                check.update({k: v for k, v in body.items() if k != "do"})
            else:
                check["state"] = {"pause": "paused", "resume": "new"}[
                    body["do"]]
            world.push(checks=[check])
            return self.answer({})
        if body["kind"] == "cron" and body["schedule"].count(" ") != 4:
            return self.refuse(400, "a schedule has five columns",
                               "30 2 * * *")
        ident = str(uuid.uuid4())
        world.checks[ident] = {
            **body, "id": ident, "state": "new", "started": False,
            "last_ping": None, "last_start": None, "last_duration": None,
            "next": None, "n": 0, "recent_runs": [], "snoozed": 0,
            "words": "Every day"}
        world.push(checks=[world.checks[ident]])
        return self.answer({"id": ident}, 201)

    def post_channels(self, _rest, body):
        channels, action = self.world.channels, body.get("do")
        found = next((one for one in channels if one["id"] == body.get("id")),
                     {"id": len(channels) + 7, "last": None, "error": ""})
        if action == "delete":
            channels.remove(found)
        elif action == "test":
            self.world.may_deliver.wait(30)
            found["error"] = self.world.delivery_error
            found["last"] = found["last"] if found["error"] else time.time()
            return self.answer({"id": found["id"], "error": found["error"],
                                "delivered": not found["error"]})
        else:
            if " " in body["options"].get("host", ""):
                return self.refuse(400, "options: host is not a host name")
            if body["target"].endswith(".invalid"):
                return self.refuse(400, "invalid email address",
                                   "name@example.org")
            found.update({k: v for k, v in body.items() if k != "do"})
            if not action:
                channels.append(found)
        return self.answer({"id": found["id"]})

    def post_settings(self, _rest, body):
        if body["host_down"] == 61:
            return self.refuse(400, "the request: host_down is not from 62 to "
                               "86400")
        self.world.settings = body
        return self.answer(body)

    def post_forget(self, _rest, body):
        world = self.world
        if "host" in body:
            jobs = [one for one, job in world.jobs.items()
                    if job["host"] == body["host"]]
            for one in jobs:
                del world.jobs[one]
            del world.hosts[body["host"]]
            world.push(gone={"hosts": [body["host"]], "jobs": jobs})
        self.answer({})


class Server(http.server.ThreadingHTTPServer):
    """Serves until it is closed; use it as a context in tests."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self, port: int = 0, address: str = "127.0.0.1", **options):
        super().__init__((address, port), Page)
        self.world = World(**options)
        self.rounds, self.closing, self.deaf = 600_000, False, False
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """Of a browser that went away nothing is said."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,),
                         daemon=True).start()
        return self

    def __exit__(self, *_why):
        self.closing = True
        self.shutdown()
        self.server_close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8078)
    for flag in ("empty", "many", "hostile"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    with Server(options.port, empty=options.empty, many=options.many,
                hostile=options.hostile) as server:
        print(f"{server.url}  passphrase: {PASSWORD}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
