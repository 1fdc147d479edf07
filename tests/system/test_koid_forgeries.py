"""Requests to run a job that nobody made: mutated, replayed, or signed with
the right key for another host, user, job, time or nonce. None is executed.

2,000 of them, and 100,000 in the long form; the seed is printed. Others come
from TESTS_FORGERIES and TESTS_SEED in the environment.
"""

from __future__ import annotations

import collections
import json
import os
import random
import time

import lying_dashboard
import support
from lying_dashboard import HOST, KEY, RUN_KEY, request_for, text_of

koitab = support.load("koitab")

COUNT = int(os.environ.get("TESTS_FORGERIES",
                           100_000 if support.FULL else 2_000))
BATCH = 99              # of the 100 that an agent takes from one answer
OTHER_HOST = "b2" * 16
MINUTE = 60_000         # ms


class Forger:
    """Makes requests from the genuine ones, by a seed."""

    def __init__(self, specs: dict[str, str], genuine: list[dict],
                 random_: random.Random):
        self.specs, self.genuine, self.random = specs, genuine, random_
        self.kinds = collections.Counter()

    def make(self, number: int) -> dict:
        """Every second one has a MAC that is right for its body."""
        ways = (self.signed_ways if number % 2 else self.forged_ways)()
        kind = self.random.choice(sorted(ways))
        self.kinds[kind] += 1
        return ways[kind]()

    def fields(self, **changes) -> dict:
        return {**request_for(self.specs["Write"], {"Word": "forged"}),
                **changes}

    def signed(self, **changes) -> dict:
        return self.sign(text_of(self.fields(**changes)))

    def sign(self, body: str) -> dict:
        return {"body": body, "mac": koitab.run_mac(KEY, body)}

    def hexadecimal(self, digits: int) -> str:
        return f"{self.random.getrandbits(4 * digits):0{digits}x}"

    def period(self, begin: int, life: int) -> dict:
        """A request from `begin` ms after now on."""
        now = int(time.time() * 1000) + begin
        return self.signed(iat=now, exp=now + life)

    def signed_ways(self) -> dict:
        """What the right key signs, and what is not to be run here now."""
        pick, digits = self.random.choice, self.hexadecimal
        used = pick(self.genuine)

        def other_job() -> dict:
            spec = self.specs[pick(["Scheduled", "Terminal"])]
            return self.sign(text_of(request_for(spec)))

        def exact_text() -> dict:
            text = text_of(self.fields())
            at = text.index('"nonce"')
            return self.sign(pick([
                text[:at] + f'"nonce": "{digits(32)}", ' + text[at:],
                text.replace('"v": 1', '"v": 1.0'), "\ufeff" + text,
                text + "{}", text[:-1], f"[{text}]",
                text.replace('"v": 1', '"v": 1, "V": 1')]))

        return {
            "host": lambda: self.signed(host=pick([OTHER_HOST, digits(32)])),
            "dashboard": lambda: self.signed(dash=digits(16)),
            "key": lambda: self.signed(key=digits(16)),
            "user": lambda: self.signed(user=pick(
                ["", "bin", "root\0", "daemon", digits(8)])),
            "tag": lambda: self.signed(tag=pick(
                ["", digits(8), json.loads(self.specs["Other"])["tag"]])),
            "job": lambda: self.signed(job=pick(
                ["", digits(64), koitab.sha256_hex(self.specs["Other"])])),
            "expired": lambda: self.period(
                -self.random.randrange(6, 10**6) * MINUTE, 5 * MINUTE),
            "future": lambda: self.period(
                self.random.randrange(6, 10**6) * MINUTE, 5 * MINUTE),
            "too long": lambda: self.period(
                0, self.random.randrange(11, 10**6) * MINUTE),
            "before it began": lambda: self.period(0, -MINUTE),
            "nonce used": lambda: self.signed(
                nonce=json.loads(used["body"])["nonce"]),
            "nonce malformed": lambda: self.signed(nonce=pick(
                ["", digits(31), digits(33), digits(31) + "A", "g" * 32])),
            "replay": lambda: dict(used),
            "not remote": other_job,
            "text": exact_text,
            "arguments": lambda: self.signed(args=pick(
                [{}, {"Word": "a", "More": "b"}, {"word": "a"}, {"Word": 1},
                 {"Word": ["a"]}, {"Word": "a\0b"}, {"Word": "a" * 10**6}])),
            "secrets": lambda: self.signed(secrets=pick(
                [{"Word": digits(8)}, {"More": ""}, []])),
            "version": lambda: self.signed(v=pick([0, 2, "1", True, None])),
            "deed": lambda: self.signed(do=pick(["", "Run", "kill", "exec"])),
            "one more field": lambda: self.signed(more=1),
        }

    def forged_ways(self) -> dict:
        """What only somebody without the key of this host can make."""
        pick, digits = self.random.choice, self.hexadecimal
        used = pick(self.genuine)
        fresh = self.signed()

        def with_mac(mac) -> dict:
            return {"body": fresh["body"], "mac": mac}

        def other_byte() -> dict:
            body = pick([fresh, used])["body"]
            at = self.random.randrange(len(body))
            letter = chr(self.random.randrange(32, 127))
            if body[at] == letter:
                letter = "\n"
            return {"body": body[:at] + letter + body[at + 1:],
                    "mac": pick([fresh, used])["mac"]}

        def other_bit() -> dict:
            at = self.random.randrange(64)
            digit = f"{int(fresh['mac'][at], 16) ^ 1 << pick(range(4)):x}"
            return with_mac(fresh["mac"][:at] + digit + fresh["mac"][at + 1:])

        def other_key() -> dict:
            return with_mac(koitab.run_mac(pick([
                koitab.host_key(RUN_KEY, OTHER_HOST), RUN_KEY, b"",
                bytes.fromhex(lying_dashboard.TOKEN),
                os.urandom(32)]), fresh["body"]))

        return {
            "a byte": other_byte, "a bit of the MAC": other_bit,
            "another key": other_key,
            "MAC of a list": lambda: with_mac(
                koitab.list_mac(KEY, fresh["body"])),
            "no MAC": lambda: with_mac(pick([None, "", "0" * 64, 0, []])),
            "part of the MAC": lambda: with_mac(
                fresh["mac"][:self.random.randrange(64)]),
            "MAC in capitals": lambda: with_mac(fresh["mac"].upper() + "A"),
            "MAC of another": lambda: with_mac(used["mac"]),
            "random": lambda: {"body": digits(64), "mac": digits(64)},
            "no body": lambda: {"body": None, "mac": used["mac"]},
        }


def sentinel() -> dict:
    """A request without a MAC; its result says that those before it were
    judged."""
    return {"body": json.dumps({"nonce": os.urandom(16).hex()}), "mac": ""}


def hand_out(dashboard, batch: list[dict]) -> None:
    """Hand requests to the host, and wait until all were judged."""
    last = sentinel()
    with dashboard.turn:
        dashboard.results.clear()
        dashboard.requests += [*batch, last]
        dashboard.turn.notify_all()
    dashboard.result(json.loads(last["body"])["nonce"])


def test_no_mutated_or_replayed_request_is_executed(koi):
    seed = int(os.environ.get("TESTS_SEED", time.time_ns()))
    print(f"TESTS_SEED={seed} TESTS_FORGERIES={COUNT}")
    written = koi.folder / "written"
    koi.tab(f'"Write" @manual echo {{{{Word}}}} >> {written}\n'
            f'"Other" @manual echo other >> {written}\n'
            f'"Scheduled" 0 0 29 2 * echo scheduled >> {written}\n'
            f'KOI_CONFIRM=cli\n"Terminal" @manual echo cli >> {written}\n')
    with lying_dashboard.Dashboard() as dashboard:
        lying_dashboard.join_dashboard(koi, dashboard.url)
        koi.start()
        genuine = []
        for word in ("one", "two", "three"):
            body = text_of(request_for(
                dashboard.specs()["Write"], {"Word": word}))
            genuine.append({"body": body, "mac": koitab.run_mac(KEY, body)})
            dashboard.ask(body)
            dashboard.result(json.loads(body)["nonce"])
        forger = Forger(dashboard.specs(), genuine, random.Random(seed))
        for first in range(0, COUNT, BATCH):
            batch = [forger.make(number) for number in
                     range(first, min(first + BATCH, COUNT))]
            hand_out(dashboard, batch)
            accepted = [result for result in dashboard.results
                        if result["state"] == "accepted"
                        and result["run"] not in (1, 2, 3)]
            assert accepted == [], (seed, [
                request for request in batch for result in accepted
                if result["nonce"] in str(request["body"])])
        # What the forgeries were made from would have been executed.
        body = text_of(forger.fields(args={"Word": "last"}))
        dashboard.ask(body)
        assert dashboard.result(json.loads(body)["nonce"])["run"] == 4, seed
        support.wait_until(lambda: written.read_text().endswith("last\n"), 30)
        assert sorted(written.read_text().split()) == [
            "last", "one", "three", "two"], seed
        print(sum(forger.kinds.values()), "requests:", dict(forger.kinds))
    assert len(forger.kinds) == 30 and HOST != OTHER_HOST
