"""Section Keys: keys of a password, signed requests, secrets."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest

import support

koitab = support.load("koitab")

SALT = bytes(range(16))
HOST, DASH = "a1" * 16, "d0" * 8
KEY = koitab.host_key(bytes(32), HOST)
NOW = 1_800_000_000.0
OURS = {"key": koitab.key_id(KEY), "dash": DASH, "host": HOST}


def request(**changes) -> dict:
    body = {"v": 1, "do": "run", **OURS, "user": "ann", "tag": "0a" * 6,
            "job": "5f" * 32, "args": {"To": "o'brien"}, "secrets": {},
            "nonce": "ab" * 16, "iat": int(NOW * 1000),
            "exp": int(NOW * 1000) + 300_000}
    return {**body, **changes}


def text_of(body) -> str:
    return json.dumps(body, ensure_ascii=False)


def signed(body: str, key: bytes = KEY) -> tuple[str, str]:
    return body, koitab.run_mac(key, body)


# --- passwords


def test_keys_of_a_password_equal_the_vectors():
    """The page's JavaScript derives the same: test_dashboard_browser.py."""
    keys = koitab.derive_keys("correct horse battery staple", SALT)
    host = koitab.host_key(keys.run, HOST)
    assert (keys.api.hex(), keys.run.hex()) == (VECTOR["api"],
                                                VECTOR["run"])
    assert (host.hex(), koitab.key_id(host)) == (
        VECTOR["host_key"], VECTOR["key_id"])


VECTOR = json.loads((support.ROOT / "tests/cases/keys.json").read_text())


def test_both_keys_of_a_password_differ():
    keys = koitab.derive_keys("correct horse battery staple", SALT)
    assert keys.api != keys.run


def test_composed_and_decomposed_passwords_give_the_same_keys():
    composed, apart = "\u00e9t\u00e9 \u00e0 la plage",  \
        "e\u0301te\u0301 a\u0300 la plage"
    assert composed != apart
    assert unicodedata.normalize("NFC", apart) == composed
    assert koitab.derive_keys(composed, SALT) \
        == koitab.derive_keys(apart, SALT)


@pytest.mark.parametrize("salt, rounds", [
    (SALT, 599_999), (SALT, 1), (SALT, 10**9), (SALT[:8], 600_000),
    (b"", 600_000)])
def test_weak_key_parameters_are_refused(salt, rounds):
    with pytest.raises(koitab.Error):
        koitab.derive_keys("correct horse battery staple", salt, rounds)


def test_passphrase_has_100_bits():
    """It has 20 characters out of 32, each equally likely."""
    seen = {koitab.format_passphrase(bytes([n]) * 20)[0] for n in range(256)}
    assert len(seen) == 32
    phrase = koitab.format_passphrase(random.Random(1).randbytes(20))
    assert len(phrase.replace("-", "")) == 20 and len(phrase) == 24


# --- signed requests


def test_signed_request_is_verified():
    body = request(args={"To": "o'brien $(id) \U0001f603 \\ \" \n"})
    assert koitab.verify_request(KEY, *signed(text_of(body))) == body


def test_request_may_contain_brackets_and_the_longest_values():
    body = request(args={"To": "[" * 5000 + "\"" * 100_000})
    assert koitab.verify_request(KEY, *signed(text_of(body))) == body


@pytest.mark.parametrize("mac", [
    "", None, 7, [], "00" * 32, "0" * 63, "g" * 64, "\u00e9" * 64])
def test_malformed_mac_is_rejected(mac):
    with pytest.raises(koitab.RequestRejected):
        koitab.verify_request(KEY, text_of(request()), mac)


def test_mac_in_capitals_is_rejected():
    body, mac = signed(text_of(request()))
    for odd in (mac.upper(), f" {mac}", f"{mac}\n", mac[:32] + " " + mac[32:]):
        with pytest.raises(koitab.RequestRejected):
            koitab.verify_request(KEY, body, odd)


def test_altered_request_is_rejected():
    """Each bit of the body and the MAC is changed, then random parts."""
    tried, rng = 0, random.Random(5)
    body, mac = signed(text_of(request()))
    raw = body.encode()
    changed = [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1:]
               for at in range(len(raw)) for bit in range(8)]
    for _ in range(100_000):
        at = rng.randrange(len(raw))
        changed.append(raw[:at] + rng.randbytes(rng.randrange(1, 9))
                       + raw[at + rng.randrange(9):])
    for data in changed:
        if data == raw:
            continue
        with pytest.raises(koitab.RequestRejected):
            koitab.verify_request(KEY, data.decode("utf-8", "surrogateescape"),
                                  mac)
        tried += 1
    for at in range(64):
        for letter in "0123456789abcdef":
            if letter != mac[at]:
                with pytest.raises(koitab.RequestRejected):
                    koitab.verify_request(KEY, body,
                                          mac[:at] + letter + mac[at + 1:])
                tried += 1
    assert tried > 100_000


@pytest.mark.parametrize("body", [
    "", "null", "[]", "7", '"run"', "{}", "{", "[" * 100_000, "nan",
    '{"v":1,"v":1}', "\ufeff{}", text_of(request())[:-1],
    text_of(request()) + " {}",
    text_of(request()).replace('"v": 1', '"v": 1.0'),
    text_of(request()).replace('"v": 1', '"v": 1e0'),
    text_of(request()).replace('"v": 1', '"v": -0'),
    text_of(request()).replace('"v": 1', '"v": NaN'),
    text_of(request()).replace('"v": 1', '"v": 9' + "9" * 30),
    text_of(request()).replace('"tag"', '"tag": "evil", "tag"'),
    text_of(request(v=2)), text_of(request(v=True)), text_of(request(do="x")),
    text_of(request(do=[])), text_of(request(more=1)),
    text_of({k: v for k, v in request().items() if k != "exp"}),
    text_of(request(args=[])), text_of(request(args={"To": 1})),
    text_of(request(args={"To": {"a": {"b": ["c"]}}})),
    text_of(request(secrets={"To": None})), text_of(request(iat="1")),
    text_of(request(nonce="AB" * 16)), text_of(request(nonce="ab")),
    text_of(request(nonce=7)), text_of(request(user=None)),
    json.dumps(request(args={"To": "\ud800"}))])
def test_signed_text_that_is_not_a_request_is_rejected(body):
    with pytest.raises(koitab.RequestRejected):
        koitab.verify_request(KEY, *signed(body))


def test_key_of_another_host_does_not_verify():
    other = koitab.host_key(bytes(32), "b2" * 16)
    with pytest.raises(koitab.RequestRejected):
        koitab.verify_request(other, *signed(text_of(request())))


@pytest.mark.parametrize("changes, word", [
    ({"key": "0" * 16}, "other keys"), ({"dash": "0" * 16}, "dashboard"),
    ({"host": "0" * 32}, "host"),
    ({"iat": int(NOW * 1000) + 61_000, "exp": int(NOW * 1000) + 90_000},
     "61 s ahead"),
    ({"exp": int(NOW * 1000) - 5000, "iat": int(NOW * 1000) - 9000},
     "expired 5 s ago"),
    ({"exp": int(NOW * 1000) + 600_001}, "too long"),
    ({"exp": int(NOW * 1000)}, "too long"),
    ({"iat": int(NOW * 1000) - 100_001, "exp": int(NOW * 1000) + 1},
     "too old"),
])
def test_mismatch_of_a_genuine_request_is_named(changes, word):
    why = koitab.request_mismatch(request(**changes), OURS, NOW, NOW - 100)
    assert word in why


def test_request_within_its_lifetime_has_no_mismatch():
    for seconds in (-59, 0, 299):
        assert koitab.request_mismatch(request(), OURS, NOW + seconds,
                                       NOW) == ""


def test_secret_is_decrypted_only_by_its_host():
    secret = "hunter2 \U0001f603".encode() * 40
    hidden = koitab.encrypt_secret(KEY, "ab" * 16, "Password", secret)
    assert hidden != secret and len(hidden) == len(secret)
    assert koitab.encrypt_secret(KEY, "ab" * 16, "Password", hidden) == secret
    for nonce, name in (("ac" * 16, "Password"), ("ab" * 16, "Other")):
        assert koitab.encrypt_secret(KEY, nonce, name, hidden) != secret
    assert koitab.encrypt_secret(koitab.host_key(bytes(32), DASH), "ab" * 16,
                                 "Password", hidden) != secret


def test_manifest_differs_whenever_the_job_does_something_else():
    def spec(line: str, before: str = "", user: str = "ann",
             file: str = "/tabs/ann", key: bytes = KEY) -> str:
        job = koitab.parse_tab(f"{before}\n{line}\n").jobs[0]
        return koitab.job_manifest(job, user, file, key)

    plain = '"Hi" @manual echo {{To}}'
    seen = {spec(plain), spec('"Hi" @manual echo {{To, text}}'),
            spec('"Hi" @manual echo {{To, string, you}}'),
            spec('"Hi" @manual printf {{To}}'),
            spec('"Hey" @manual echo {{To}}'),
            spec(plain, "[Office]"), spec(plain, "KOI_CONFIRM=yes"),
            spec('"Hi" 1 * * * * echo {{To, string, you}}'),
            spec(plain, user="bob"), spec(plain, file="/tabs/bob"),
            *(spec(plain, setting) for setting in (
                "PATH=/home/ann/bin", "PATH=/tmp", "SHELL=/bin/bash",
                "MAILTO=ann", "KOI_TIMEOUT=1m", "CRON_TZ=Asia/Tokyo",
                "A=b\nC=d", "A=d\nC=b")),
            spec('"Hi" @manual cat%in'), spec('"Hi" @manual cat%out')}
    assert len(seen) == 20
    assert spec(plain, "TOKEN=hunter2") != spec(plain, "TOKEN=hunter2",
                                                key=bytes(32))
    assert "hunter2" not in spec(plain, "TOKEN=hunter2")
    assert spec(plain, "A=b\nC=d") == spec(plain, "C=d\nA=b")
    assert json.loads(spec('"a" @manual echo \udcff'))["command"]
