"""Page: what the browser runs. As a text here; in a browser with its parts."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from hashlib import sha256

import pytest

import page_server
import support

koitab = support.load("koitab")
PARTS = {name: getattr(koitab, name)
         for name in ("PAGE_HTML", "PAGE_CSS", "PAGE_JS")}
VECTOR = page_server.VECTOR


# --- as a text


@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_ascii_of_79_columns_without_trailing_blanks(name):
    lines = PARTS[name].split("\n")
    assert PARTS[name].isascii()
    assert [line for line in lines if len(line) > 79
            or line != line.rstrip() or "\t" in line] == []


@pytest.mark.parametrize("word", [
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
    "eval(", "new Function", "DOMParser", "createContextualFragment",
    "srcdoc", "setTimeout(\"", "import(", "importScripts", "cookie",
    "sessionStorage", "indexedDB", "XMLHttpRequest", "WebSocket",
    "EventSource", "window.open", "postMessage(*"])
def test_script_never_makes_markup_or_code_of_text_nor_stores_a_key(word):
    assert word not in koitab.PAGE_JS


def test_local_storage_holds_only_preferences():
    used = re.findall(r"localStorage\.\w+\([^)]*\)", koitab.PAGE_JS)
    assert used == ['localStorage.getItem("koi." + name)',
                    'localStorage.setItem("koi." + name, value)']
    assert set(re.findall(r'preferences\.set\("(\w+)"', koitab.PAGE_JS)) == {
        "zone", "theme", "times", "wrap", "command", "viewer"}


def test_page_loads_nothing_from_elsewhere():
    known = {"http://www.w3.org/2000/svg",      # a name, never fetched
             "https://koi.example.org", "https://chat.example.org/hook",
             "https://ntfy.sh/my-topic"}        # examples in fields
    for text in PARTS.values():
        assert set(re.findall(r"https?://[\w./-]+", text)) <= known
        assert not re.search(r"url\(|@import|@font-face| src=|<base", text)


def test_no_attribute_holds_a_style_or_a_script():
    assert not re.search(r"<[^>]+\s(style|on\w+)=", koitab.PAGE_HTML)
    assert not re.search(r'[{,]\s*style:|setAttribute\("(style|on)',
                         koitab.PAGE_JS)


def test_policy_has_the_hashes_of_style_and_script():
    text, policy = koitab.page_text(), koitab.page_policy()
    for tag, part in (("style", koitab.PAGE_CSS), ("script",
                                                   koitab.PAGE_JS)):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found == [part]
        digest = base64.b64encode(sha256(part.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "*" not in policy


def test_page_for_a_file_contains_its_policy_and_its_server():
    text = koitab.page_text('https://koi.test/"><b>')
    assert 'content="https://koi.test/&quot;&gt;&lt;b&gt;"' in text
    assert "Content-Security-Policy" in text
    assert "frame-ancestors" not in text        # works in a header alone
    # A source whose path has no slash at its end allows this path alone.
    assert "connect-src https://koi.test/koi/;" in koitab.page_text(
        "https://koi.test/koi")
    assert "connect-src &#x27;none&#x27;" in koitab.page_text(
        "https://koi.test; script-src *")
    assert 'name="koi-server" content=""' in koitab.page_text("")


def test_functions_have_at_most_45_lines():
    """Classes are measured by their methods."""
    lines, begun, long = koitab.PAGE_JS.split("\n"), None, []
    for number, line in enumerate(lines, start=1):
        if re.match(r"(async )?function\*? \w+\(|  (async )?\w+\(.*\) \{$",
                    line):
            begun = (number, line)
        if begun and line == re.match(r" *", begun[1]).group() + "}":
            if number - begun[0] >= 45:
                long.append((begun[1], number - begun[0]))
            begun = None
    # A worker gets hashing() as one text, so it contains its functions.
    assert [line for line, _ in long if "function hashing()" not in line
            ] == []


def test_functions_of_more_than_10_lines_have_a_comment():
    """It says above the function what it returns or does."""
    lines, bare = koitab.PAGE_JS.split("\n"), []
    for number, line in enumerate(lines):
        found = re.match(r"( *)(async )?(function\*? |class )?\w+"
                         r"(\([^;]*\)| extends \w+|) \{$", line)
        if not found or line.split()[0] in (
                "if", "for", "while", "switch", "try", "return") \
                or "constructor" in line:
            continue
        end = next(at for at in range(number, len(lines)) if re.match(
            found[1] + r"\}[,;]?$", lines[at]))
        if end - number > 10 and "//" not in lines[number - 1]:
            bare.append(line.strip())
    assert bare == []


# --- in a browser: the same values as section Keys and section Tab


@pytest.fixture(scope="module")
def login_page(browser):
    """The page before the login, for its functions."""
    with page_server.Server(empty=True) as stand_in:
        browser.go(stand_in.url)
        browser.find("#secret")
        yield browser


def test_keys_of_a_passphrase_equal_those_of_section_keys(login_page):
    keys = login_page.js("""
        const [password, salt] = arguments;
        return derive(password, salt, 600000).then((keys) => ({
            api: hex(keys.api), run: hex(keys.run)}));
        """, VECTOR["password"], VECTOR["salt"])
    assert keys == {name: VECTOR[name] for name in ("api", "run")}


def test_passphrase_is_normalized_before_keys_are_derived(login_page):
    assert unicodedata.normalize("NFC", VECTOR["password_apart"]) \
        != VECTOR["password_apart"]
    assert login_page.js("return derive(arguments[0], arguments[1], 600000)"
                         ".then((keys) => hex(keys.api))",
                         VECTOR["password_apart"], VECTOR["salt"]) == \
        VECTOR["api_apart"]


def test_worker_without_crypto_subtle_derives_the_same_keys(login_page):
    """In the worker that a page without a secure context uses."""
    root = login_page.js("return rootByWorker(utf8(arguments[0]), "
                         "unhex(arguments[1]), 600000, (part) => { "
                         "window.part = part; }).then((root) => hex(hmac("
                         "root, utf8('koi-api-v1'))))", VECTOR["password"],
                         VECTOR["salt"])
    assert root == VECTOR["api"]
    assert 0.9 < login_page.js("return window.part") < 1      # it told how far
    assert login_page.faults() == []


@pytest.mark.parametrize("salt, rounds", [
    ("00" * 16, 599_999), ("00" * 16, 10_000_001), ("00" * 8, 600_000),
    ("", 600_000), ("zz" * 16, 600_000), ("00" * 16, 600_000.5)])
def test_unsafe_salt_or_rounds_derive_no_keys(login_page, salt, rounds):
    assert login_page.js(
        "return derive('a password', ...arguments).then(() => 'derived', "
        "(error) => error.message)", salt, rounds) == (
            "This dashboard requested weak keys.")


def test_signatures_equal_those_of_section_keys(login_page):
    found = login_page.js("""
        const key = hostKey(unhex(arguments[0].run), arguments[0].host);
        return {host_key: hex(key), key_id: keyId(key),
            run_mac: runMac(key, arguments[0].body),
            list_mac: listMac(key, arguments[0].body),
            veiled: hex(encryptSecret(key, arguments[0].nonce,
                arguments[0].name, utf8(arguments[0].secret)))};""", VECTOR)
    assert found == {name: VECTOR[name] for name in found}


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000])
def test_sha256_is_right_at_each_block_boundary(login_page, size):
    text = "a" * size
    assert login_page.js("return digest(arguments[0])", text) == \
        sha256(text.encode()).hexdigest()


VALUES = ["", "a", "-", "-5", "5", "+5", "1" * 18, "1" * 19, "\u0665", "1.5",
          " 5", "true", "false", "True", "yes", "warm", "cool", "2026-03-29",
          "2026-02-29", "2024-02-29", "0000-01-01", "0001-01-01",
          "9999-12-31", "2026-3-29", "2026-13-01", "a\tb", "a\nb", "a\rb",
          "\x1b[31m", "\x7f", "\x85", "\xa0", "\u200e", "\u200b", "\u202e",
          "\u2028", "\u2066", "\ufeff", "\U0001f603", "o'brien", "\u00e9",
          "x" * 4096, "x" * 4097, "\u00e9" * 2048, "\u00e9" * 2049,
          "x" * 65537, "<b>", "__proto__"]
TYPES = [("string", ()), ("text", ()), ("int", ()), ("bool", ()),
         ("date", ()), ("secret", ()), ("choice", ("warm", "a|b", "<b>"))]


@pytest.mark.parametrize("kind, choices", TYPES)
def test_invalid_value_has_the_message_of_section_tab(login_page, kind,
                                                      choices):
    param = koitab.Parameter("x", kind, None, choices)
    expected = [param.value_error(value) for value in VALUES]
    assert login_page.js("return arguments[1].map((value) => valueError("
                         "arguments[0], value))", {"type": kind, "choices":
                                                   list(choices)}, VALUES
                         ) == expected


def test_lone_surrogate_is_refused(login_page):
    assert login_page.js(
        r"return ['\ud800', 'a\udc00', '\udc00\ud800'].map((value) => "
        "valueError({type: 'string'}, value))") == ["not valid UTF-8"] * 3


def test_koid_accepts_a_request_and_decrypts_its_secret(login_page):
    """From the page's signature to koid's judgement, byte by byte."""
    spec = {"user": "ann", "tag": "0a" * 6, "params": [
        {"name": "__proto__", "type": "string"},
        {"name": "Emoji \U0001f603", "type": "bool"},
        {"name": "Token", "type": "secret"}]}
    text = json.dumps(spec, ensure_ascii=False)
    sent = login_page.js("""
        const [spec, text, vector] = arguments;
        session.keys = {run: unhex(vector.run)};
        session.dash = "d0".repeat(8);
        const values = new Map([["__proto__", "o'brien \u00e9"],
            ["Emoji \U0001f603", "true"], ["Token", "hunter2 \U0001f603"]]);
        return runRequest({host: vector.host}, {...spec, text}, values);
        """.replace("\U0001f603", "\\u{1f603}"), spec, text, VECTOR)
    key = bytes.fromhex(VECTOR["host_key"])
    asked = koitab.verify_request(key, sent["body"], sent["mac"])
    assert asked["args"] == {"__proto__": "o'brien \u00e9",
                             "Emoji \U0001f603": "true"}
    assert asked["job"] == koitab.sha256_hex(text)
    assert koitab.encrypt_secret(key, asked["nonce"], "Token", bytes.fromhex(
        asked["secrets"]["Token"])).decode() == "hunter2 \U0001f603"
    assert koitab.request_mismatch(asked, {"key": koitab.key_id(key),
                                           "dash": "d0" * 8,
                                           "host": VECTOR["host"]},
                                   asked["iat"] / 1000 + 1, 0) == ""


# --- in a browser: words


@pytest.mark.parametrize("seconds, words", [
    (0.04, "0.0 s"), (0.2, "0.2 s"), (9.96, "10 s"), (59, "59 s"),
    (60, "1 min"), (61, "1 min 1 s"), (3500, "58 min"), (3599, "1 h"),
    (3600, "1 h"),
    (5400, "1 h 30 min"), (86400, "1 d"), (90000, "1 d 1 h")])
def test_duration_is_formatted_in_at_most_two_units(login_page, seconds,
                                                    words):
    assert login_page.js("return formatDuration(arguments[0])",
                         seconds) == words


@pytest.mark.parametrize("old, new, expected", [
    ("abc", "abc", " a b c"), ("", "a", "+a"), ("a", "", "-a"),
    ("abcd", "abxd", " a b-c+x d"), ("abc", "xabcy", "+x a b c+y"),
    ("aaa", "aa", None), ("abcabba", "cbabac", None)])
def test_difference_turns_the_old_lines_into_the_new(login_page, old, new,
                                                     expected):
    found = login_page.js(
        "return difference([...arguments[0]], [...arguments[1]],"
                          " (a, b) => a === b)", old, new)
    assert "".join(x for sign, x in found if sign != "+") == old
    assert "".join(x for sign, x in found if sign != "-") == new
    if expected is not None:
        got = "".join(sign + x for sign, x in found)
        assert sorted(got) == sorted(expected)


def test_difference_of_long_outputs_is_quick_or_omitted(login_page):
    before = login_page.cpu_seconds()
    same, far = login_page.js("""
        const a = Array.from({length: 4000}, (_, i) => "line " + i);
        const b = a.map((line, i) => i % 40 ? line : "new " + i);
        const equal = (x, y) => x === y;
        const found = difference(a, b, equal);
        const far = difference(a, a.map((line) => "x" + line), equal);
        return [found.length, far];""")
    assert same == 4000 + 100 and far is None
    assert login_page.cpu_seconds() - before < 4
