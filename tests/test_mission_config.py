"""Config and Check: can this configuration run?

The host is a fake that answers what the tests say; `check` is the real one,
so each mistake is seen as people see it: FILE:LINE:COL: path: what (right).
"""

from __future__ import annotations

import inspect
import json
import re
import random

import pytest

import support

mission = support.load("mission")

HOMES = {"anon": "/home/anon", "bob": "/srv/bob", "root": "/root"}

BASE = """{
    "tasks": [
        {"slug": "mail", "type": "exec", "name": "Mail"},
        {"slug": "photos", "type": "exec"}
    ],
    "user": {"name": "anon", "email": "anon@example.com"},
    "passBin": "/usr/bin/pass",
    "storage": {
        "tasks": {"path": "/b/tasks"},
        "logs": {"path": "/b/logs"},
        "sync": {"path": "/b/sync", "commit": true}
    },
    "mail": {"enabled": false}
}
"""


class FakeHost:
    """A HostInspector that finds what a test wants."""

    def __init__(self, **says):
        self.says = says

    def home_of(self, name: str) -> str | None:
        return HOMES.get(name)

    def facts(self, config):
        scripts = {task.slug: mission.Script(
            path=task.entrypoint, **{"head": "#!/bin/sh\n",
                                     **self.says.get(task.slug, {})})
            for task in config.tasks if task.entrypoint}
        says = {"storage_errors": {}, "foreign_files": {},
                "repositories": config.storage,
                "of_system": [name for name, storage in config.storage.items()
                              if storage.path in mission.SYSTEM_DIRECTORIES],
                **self.says}
        found = {
            "uids": {"anon": 1000, "bob": 1001, "root": 0, "toor": 0,
                     "odd": 65535, "none": 2**32 - 1},
            "storages": {name: {
                "error": says["storage_errors"].get(name, ""),
                "foreign": says["foreign_files"].get(name, ""),
                "of_system": name in says["of_system"],
                "repository": name in says["repositories"]}
                for name in config.storage},
            "scripts": scripts, "usable": {},
            "programs": {name: f"/usr/bin/{name}" for name in
                         ("git", "sendmail", "notify-send")}}
        return mission.HostFacts(**{**found, **{
            key: value for key, value in self.says.items() if key in (
                *found, "writer")}})


@pytest.mark.parametrize("name", ["home_of", "facts"])
def test_fake_host_has_the_signatures_of_the_real_one(name):
    fake, real = (inspect.signature(getattr(kind, name))
                  for kind in (FakeHost, mission.HostInspector))
    assert list(fake.parameters) == list(real.parameters)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(text, **facts) -> the lines on stderr but for the last."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, **says) -> list[str]:
        monkeypatch.setattr(mission, "HostInspector", lambda: FakeHost(**says))
        (tmp_path / "m.json").write_text(text, encoding="utf-8")
        status = mission.main(["-c", "m.json", "check"])
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert printed.out == ""
        assert status == (mission.EXIT_CONFIG if lines else mission.EXIT_OK)
        if lines:
            noun = "error" if len(lines) == 2 else "errors"
            assert lines[-1] == (f"mission: error: {len(lines) - 1} {noun} "
                                 "in m.json")
        return lines[:-1]

    return run


@pytest.fixture
def read(tmp_path, monkeypatch, check):
    """read(text) -> the Config of a text that has no mistake."""
    def config(text: str, **says):
        assert check(text, **says) == []
        return mission.loaded("m.json").config

    return config


def changed(old: str, new: str) -> tuple[str, list[str]]:
    """BASE with `old` replaced; each @ marks a LINE:COL and is taken out."""
    assert BASE.count(old) == 1, old
    text, marks = BASE.replace(old, new), []
    while "\x01" in text:
        before = text[:text.index("\x01")]
        marks.append(f"{before.count(chr(10)) + 1}:"
                     f"{len(before) - before.rfind(chr(10))}")
        text = text.replace("\x01", "", 1)
    return text, marks


AT = "\x01"     # where the mistake is; not @, which is in mail addresses
TASK = '{"slug": "mail", "type": "exec", "name": "Mail"}'
PHOTOS = '{"slug": "photos", "type": "exec"}'
USER = '{"name": "anon", "email": "anon@example.com"}'
MAIL = '{"enabled": false}'
SYNC = '{"path": "/b/sync", "commit": true}'


def task(more: str) -> str:
    return TASK[:-1] + f", {more}}}"


MISTAKES = [    # the text, what replaces it, the message
    # --- the shape: unknown, twice, wrong type, missing
    (TASK, task(f'{AT}"timout": "5m"'),
     "tasks[0].timout: unknown key (did you mean timeout?)"),
    (TASK, task(f'{AT}"xyz": 1'),
     "tasks[0].xyz: unknown key (expected one of slug"),
    ('"mail":', f'{AT}"notfy": {{}}, "mail":',
     "notfy: unknown key (did you mean notify?)"),
    ('"mail":', f'{AT}"Notify": {{}}, "mail":',
     "unknown key (did you mean notify?)"),
    ('"passBin":', f'{AT}"passbin":',
     "passbin: unknown key (did you mean passBin?)"),
    (MAIL, f'{{{AT}"ENABLED": true}}',
     "mail.ENABLED: unknown key (did you mean enabled?)"),
    (SYNC, f'{SYNC[:-1]}, {AT}"own": 1}}', "storage.sync.own: unknown key"),
    (MAIL, f'{{{AT}"enable": false}}',
     "mail.enable: unknown key (did you mean enabled?)"),
    (MAIL, f'{{"smtp": {{{AT}"hots": ""}}}}', "mail.smtp.hots: unknown key"),
    (TASK, task(f'{AT}"name": "Again"'),
     "tasks[0].name: duplicate key"),
    ('"mail":', f'{AT}"user": {USER}, "mail":', "user: duplicate key"),
    (TASK, task(f'"scheduled": {AT}"yes"'),
     'tasks[0].scheduled: invalid value "yes" (expected true or false)'),
    (TASK, task(f'"scheduled": {AT}1'), "1 (expected true or false)"),
    (TASK, task(f'"timeout": {AT}90'), "90 (expected a duration such as"),
    (TASK, task(f'"timeout": {AT}"90"'), "(expected a duration such as"),
    (TASK, task(f'"timeout": {AT}"{"9" * 400}s"'),
     "(expected a duration such as"),
    (TASK, task(f'"retries": {AT}-1'),
     "(expected a whole number from 0 to 100)"),
    (TASK, task(f'"retries": {AT}1.5'),
     "(expected a whole number from 0 to 100)"),
    (TASK, task(f'"retries": {AT}true'), "true (expected a whole number"),
    (TASK, task(f'"retries": {AT}"2"'),
     "(expected a whole number from 0 to 100)"),
    (TASK, task(f'"retryDelay": {AT}"soon"'), "tasks[0].retryDelay"),
    (TASK, task(f'"nice": {AT}20'), "(expected a whole number from 0 to 19)"),
    (TASK, task(f'"needs": {AT}"photos"'), "(expected a list of strings)"),
    (TASK, task(f'"needs": {AT}[1]'), "a list (expected a list of str"),
    (TASK, task(f'"env": {AT}{{"A": 1}}'), "(expected an object of strings)"),
    (TASK, task(f'"minFree": {AT}"5G"'),
     '(expected an object such as {"sync": "5G"})'),
    (TASK, task(f'"minFree": {AT}{{"sync": "lots"}}'), "tasks[0].minFree"),
    (TASK, f"{AT}5", "tasks[0]: expected an object, found 5"),
    ('"tasks": [', f'"tasks": {AT}{{}}, "redact": [',
     "tasks: invalid value an object (expected a list of objects)"),
    (USER, f"{AT}[]", "user: invalid value a list (expected an object)"),
    (SYNC, f'{AT}"/b/sync"',
     'storage.sync: expected an object, found "/b/sync"'),
    ('"/b/sync"', f"{AT}7",
     "storage.sync.path: invalid value 7 (expected a path)"),
    ('"/usr/bin/pass"', f'{AT}["pass"]', "passBin: invalid value a list"),
    ('"mail":', f'"filters": {AT}"x", "mail":', 'filters: invalid value "x"'),
    ('"mail":', f'"redact": {AT}[null], "mail":',
     "(expected a list of strings)"),
    ('"mail":', f'"ping": {{"retries": {AT}0}}, "mail":', "from 1 to 20)"),
    ('"mail":', f'"ping": {{"timeout": {AT}10}}, "mail":', "ping.timeout"),
    ('"mail":', f'"logs": {{"keep": {AT}0}}, "mail":',
     "logs.keep: invalid value 0"),
    ('"mail":', f'"logs": {{"max": {AT}"1X"}}, "mail":',
     "(expected a size such as"),
    ('"mail":', f'"metrics": {AT}"m", "mail":', 'metrics: invalid value "m"'),
    ('"mail":', f'"trust": {AT}"all", "mail":', 'trust: invalid value "all"'),
    ('"mail":', f'"notify": {AT}true, "mail":', "notify: invalid value true"),
    (MAIL, f'{{"on": {AT}"error"}}',
     '(expected "always" or "failure" or "never")'),
    (MAIL, f'{{"type": {AT}"pigeon"}}', '(expected "sendmail" or "smtp")'),
    (MAIL, f'{{"smtp": {{"port": {AT}0}}}}', "from 1 to 65535)"),
    (MAIL, f'{{"smtp": {{"security": {AT}"ssl"}}}}', "mail.smtp.security"),
    (TASK, f'{AT}{{"type": "exec"}}', "tasks[0].slug: missing key"),
    (TASK, f'{AT}{{"slug": "mail"}}', "tasks[0].type: missing key"),
    (TASK, f'{{"slug": {AT}null, "type": "exec"}}', "tasks[0].slug"),
    (USER, f'{AT}{{"email": "a@b.c"}}', "user.name: missing key"),
    (SYNC, f"{AT}{{}}", "storage.sync.path: missing key (expected a path)"),
    # --- tasks
    (PHOTOS, f'{{"slug": {AT}"mail", "type": "exec"}}',
     'tasks[1].slug: duplicate slug "mail"'),
    *((TASK, f'{{"slug": {AT}{json.dumps(slug)}, "type": "exec"}}',
       "tasks[0].slug: ") for slug in (
        "Mail", "a b", "../x", "a/b", "-x", "_x", "", "a\n", "a.b", "x" * 65,
        "caf\u00e9", "\uff21", "\u0661", "a\0", "--help")),
    (TASK, TASK.replace('"Mail"', f'{AT}"a\\nERROR: x"'),
     "tasks[0].name: invalid name"),
    (TASK, TASK.replace('"Mail"', f'{AT}"\\u001b[2J"'),
     "at most 200 printable characters"),
    (TASK, TASK.replace('"Mail"', f'{AT}"\\u202egnp"'),
     "at most 200 printable characters"),
    (TASK, TASK.replace('"Mail"', f'{AT}"{"x" * 201}"'), "at most 200"),
    (TASK, TASK.replace('"exec"', f'{AT}"shell"'),
     'tasks[0].type: unknown type "shell" (expected "exec" or "builtin")'),
    (TASK, task(f'"user": {AT}"ghost"'), 'user "ghost" does not exist'),
    (TASK, task(f'"user": {AT}"root"'), "root has the user ID 0"),
    (TASK, task(f'"parallel": {AT}"a b"'), 'invalid group name "a b"'),
    (TASK, task(f'"env": {{"A=B": {AT}"x"}}'), "tasks[0].env.A=B: invalid"),
    (TASK, task(f'"env": {{"": {AT}"x"}}'), "invalid variable"),
    (TASK, task(f'"env": {{"A": {AT}"\\u0000"}}'), "tasks[0].env.A: inv"),
    (TASK, task(f'"minFree": {{"snyc": {AT}"5G"}}'), "unknown storage"),
    (TASK, task(f'"needs": {AT}["photo"]'),
     'tasks[0].needs: unknown task "photo" (did you mean photos?)'),
    (TASK, task(f'"needs": {AT}["mail"]'),
     "mail needs itself, directly or through"),
    (PHOTOS, '{"slug": "photos", "type": "exec", "post": true}, {"slug": '
     f'"x", "type": "exec", "needs": {AT}["photos"]}}',
     "tasks[2].needs: photos is a post task, which runs later"),
    # --- user, passBin
    ('"name": "anon"', f'"name": {AT}"ghost"',
     'user.name: user "ghost" does not exist'),
    ('"name": "anon"', f'"name": {AT}""', 'user.name: user "" does not exist'),
    ('"name": "anon"', f'"name": {AT}"1000"', 'user "1000" does not exist'),
    ('"name": "anon"', f'"name": {AT}"odd"', "odd has the user ID 65535"),
    ('"name": "anon"', f'"name": {AT}"none"', "has the user ID 4294967295"),
    *((USER, f'{{"name": "anon", "email": {AT}{json.dumps(email)}}}',
       "user.email: ") for email in (
        "anon", "@example.com", "a@", "a b@example.com", "-oQ/tmp@x", "-f@x",
        "a@b\nBcc: c@d", "a@b\r\n.", "a@b, c@d", "<a@b", "Name <a@b> x",
        "Name <-oX@b>", "a@b@c", "a@\u00e9.com", "a@-b", "a@b-", "\0@b")),
    # --- storage
    ('"/b/tasks"}', '"/b/tasks"}, "a-b": {"path": "/x"}, "a_b": '
     f'{AT}{{"path": "/y"}}', "same variable A_B_DIR as storage.a-b"),
    *((SYNC, f'{SYNC}, {json.dumps(name)}: {AT}{{"path": "/x"}}',
       "invalid storage name") for name in (
        "Sync", "1st", "a b", "", "a.b", "-a", "_a", "caf\u00e9", "a\n")),
    ('"tasks": {"path": "/b/tasks"},', "", 'storage: missing storage "tasks"'),
    ('"logs": {"path": "/b/logs"},', "", 'storage: missing storage "logs"'),
    *((SYNC, f'{{"path": "{path}", "chown": {AT}true}}',
       "is a system directory")
      for path in ("/", "/etc", "/usr/", "/home/../etc", "//etc/.", "/root")),
    (SYNC, f'{{"path": "/b", "chown": {AT}true}}',
     "storage.sync.chown: /b contains /b/tasks"),
    # --- delivery
    *(('"mail":', f'"ping": {{"enabled": true, "endpoint": {AT}'
       f'{json.dumps(url)}}}, "mail":',
       "invalid URL (expected http:// or https")
      for url in ("ftp://x/y", "file:///etc/passwd", "example.com/ping",
                  "https://", "http:///x", "https://x/a b", "https://x/\n",
                  "javascript:alert(1)", "https:\\\\x",
                  "http://a..b/",
                  "http://a%3Ab:secret@x/")),
    *(('"mail":', f'"ping": {{"enabled": true, "endpoint": "http://x", '
       f'"{key}": {AT}"{url}"}}, "mail":',
       f"ping.{key}: invalid URL (expected http")
      for key, url in (("startEndpoint", "x"), ("failEndpoint", "ftp://x"),
                       ("proxy", "https://x:1"), ("proxy", "HTTPS://x:1"),
                       ("proxy", "socks://x"))),
    ('"mail":', f'"ping": {{"proxy": {AT}"x"}}, "mail":', "ping.proxy: inv"),
    *(('"mail":', f'"ping": {{"enabled": true, "endpoint": {AT}'
       f'"http://{host}/"}}, "mail":', "the host name in its xn-- form)")
      for host in ("b\u00fccher.example", "fa\u00df.example")),
    ('"slug": "mail",', f'"slug": "mail", "ping": {AT}"ftp://x",',
     "tasks[0].ping: invalid URL"),
    ('"mail":', f'"ping": {{"enabled": true, "endpoint": {AT}""}}, "mail":',
     "missing URL (expected http:// or https"),
    ('"mail":', f'"ping": {AT}{{"enabled": true}}, "mail":', "ping.endpoint"),
    (MAIL, f'{{"enabled": true, "type": {AT}"smtp"}}', "mail.smtp.host: mis"),
    (MAIL, '{"enabled": true, "type": "smtp", "smtp": {"host": '
     f'{AT}"a b"}}}}', "mail.smtp.host: missing or invalid host"),
    (MAIL, '{"enabled": true, "type": "smtp", "smtp": {"host": "h", '
     f'"passName": {AT}"p"}}}}', "passName needs passBin and mail.smtp.user"),
    (MAIL, '{"enabled": true, "type": "smtp", "smtp": {"host": "h", '
     f'"security": {AT}"none", "user": "u"}}}}', "sent unencrypted"),
    (MAIL, '{"enabled": true, "type": "smtp", "smtp": {"host": "h", '
     f'"from": {AT}"nobody"}}}}', 'invalid email address "nobody"'),
    (MAIL, f'{{"from": {AT}"a@b\\nBcc: c@d"}}', "invalid email address"),
    (USER, f'{{"name": "anon", "email": {AT}["a@b.c", "nobody"]}}',
     'user.email: invalid email address "nobody"'),
    (USER, f'{{"name": "anon", "email": {AT}[1]}}',
     "user.email: invalid value a list (expected an address or a list of "),
    # --- patterns
    *(('"mail":', f'"filters": ["^x$", {AT}{json.dumps(text)}], "mail":',
       "filters[1]: ") for text in (
        "(", "[", "*", "a**", "(?P<", "\\", "a{2,1}", "(?z)", "(?<n",
        "(" * 200,
        # Go's, and refused rather than read as something else
        "\\p{Greek}", "(?U)a", "(?U:a)", "\\C", "[[:letter:]]", "a)(?i)b|c",
        "\\pX", "[\\p{Greek}]")),
    ('"mail":', f'"redact": [{AT}"("], "mail":',
     'redact[0]: invalid regular expression "("'),
]
# The position of these is the object around, or the key.
AROUND = {"mail.smtp.host: mis": '"mail"',
          **{f'storage: missing storage "{name}"': "storage"
                                              for name in ("tasks", "logs")}}


def name_of(value) -> str:
    return repr(value).replace("\\x01", "")[:60]


@pytest.mark.parametrize("old, new, message", MISTAKES, ids=name_of)
def test_each_error_is_reported_with_its_place_and_its_fix(
        old, new, message, check):
    text, marks = changed(old, new)
    lines = [line for line in check(text) if message in line]
    assert len(lines) == 1
    place, _, rest = lines[0].partition(": ")
    assert re.search(r"\)$|expected|regular expression", rest)
    if marks and message not in AROUND:
        assert place == f"m.json:{marks[0]}"


HOST_MISTAKES = [     # what the host says, where, the message
    ({"mail": {"state": "does not exist"}}, '"mail"',
     "tasks[0].slug: /b/tasks/mail/run does not exist (mission -c m.json new "
     "mail)"),
    ({"mail": {"state": "is not executable"}}, '"mail"',
     "is not executable (chmod +x /b/tasks/mail/run)"),
    ({"mail": {"state": "not a regular file"}}, '"mail"',
     "not a regular file"),
    ({"mail": {"missing_interpreter": "/usr/bin/perl6"}}, '"mail"',
     "run:1: the interpreter /usr/bin/perl6 does not exist"),
    ({"mail": {"head": "#!/bin/sh\r\n"}}, '"mail"',
     "run:1: the #! line ends in CR (a Windows line end) (sed -i"),
    ({"mail": {"head": "#!/bin/bash\necho\n"}}, '"mail"',
     "run:2: a bash task must begin with 'set -euo pipefail' (make"),
    ({"mail": {"writer": "/b/tasks belongs to bob"}}, '"mail"',
     "tasks[0].slug: /b/tasks belongs to bob (only root"),
    ({"storage_errors": {"sync": "does not exist"}}, '"/b/sync"',
     "storage.sync.path: /b/sync does not exist (mkdir -p /b/sync)"),
    ({"storage_errors": {"sync": "is not a directory"}}, '"/b/sync"',
     "/b/sync is not a dir"),
    ({"repositories": set()}, "true",
     "storage.sync.commit: /b/sync is not a git repository (as its owner: git "
     "init /b/sync"),
    ({"programs": {"sendmail": "x"}}, "true",
     "storage.sync.commit: git is not installed (install git)"),
    ({"usable": {"/usr/bin/pass": "is not executable"}}, '"/usr/bin/pass"',
     "passBin: /usr/bin/pass is not executable"),
    ({"writer": "/etc/m.json belongs to bob"}, "{",
     "/etc/m.json belongs to bob (expected that only root and anon can"),
]


@pytest.mark.parametrize("says, where, message", HOST_MISTAKES, ids=name_of)
def test_missing_part_of_the_host_is_reported_at_its_place_in_the_file(
        says, where, message, check):
    before = BASE[:BASE.index(where)]
    place = (f"m.json:{before.count(chr(10)) + 1}:"
             f"{len(before) - before.rfind(chr(10))}: ")
    lines = check(BASE, **says)
    assert len(lines) == 1
    assert lines[0].startswith(place) and message in lines[0]


@pytest.mark.parametrize("old, new, says, message", [
    (MAIL, '{"enabled": true}', {"programs": {"git": "x"}},
     "mail.type: sendmail is not in PATH, /usr/sbin or /usr/lib"),
    (USER, '{"name": "anon"}', {}, "user.email: missing key, because mail"),
    ('"mail":', '"notify": {"enabled": true}, "mail":',
     {"programs": {"git": "x"}},
     "notify.enabled: notify-send is not installed"),
    (SYNC, '{"path": "/b/sync", "chown": true}',
     {"foreign_files": {"sync": "x of user ID 7"}},
     "storage.sync.chown: /b/sync contains x of user ID 7"),
    ('"mail":', '"ping": {"caFile": "ca.pem"}, "mail":', {}, ""),
])
def test_programs_of_enabled_features_must_exist(
        old, new, says, message, check):
    text = BASE.replace(old, new)
    if "user.email" in message:
        text = text.replace(MAIL, '{"enabled": true}')
    lines = check(text, **says)
    assert [message in line for line in lines] == [True] * bool(message)


def test_programs_of_disabled_features_may_be_missing(check):
    assert check(BASE.replace(', "commit": true', "").replace(
        '"mail":', '"ping": {"endpoint": "nonsense"}, "notify": '
        '{"enabled": false}, "mail":'), programs={}) == []


def test_writable_configuration_is_refused_with_trust_root(check):
    text = BASE.replace('"mail":', '"trust": "root", "mail":')
    assert check(text, writer="m.json belongs to anon") == [
        "m.json:1:1: m.json belongs to anon (expected that only root can "
        "write the file and its directories)"]


def test_invalid_script_of_a_builtin_is_an_error(check):
    text = BASE.replace('"photos", "type": "exec"',
                        '"photos", "type": "builtin"')
    assert check(text) == []
    spotify = BASE.replace('"photos", "type": "exec"',
                           '"spotify", "type": "builtin"')
    assert [line.split(": ", 1)[1] for line in check(spotify)] == [
        'tasks[1].slug: the built-in spotify needs storage.sessions '
        '("sessions": {"path": "..."})']


# --- all at once ----------------------------------------------------------


def test_all_errors_are_reported_at_once_in_the_order_of_the_file(check):
    text = """{
  "tasks": [{"slug": "A", "type": "exec", "colour": 1},
            {"slug": "b", "type": "exec", "timeout": 5, "needs": ["c"]}],
  "user": {"name": "ghost", "email": "x"},
  "storage": {"tasks": {"path": "/t"}, "logs": {"path": "/l", "chwon": 1}},
  "filters": ["("], "notify": {"enabled": "on"}, "redact": [")"]
}"""
    rows = text.split("\n")
    assert [line.split(": ")[:2] for line in check(text)] == [
        [f"m.json:{row}:{rows[row - 1].index(value) + 1}", path]
        for row, value, path in (
            (2, '"A"', "tasks[0].slug"), (2, '"colour"', "tasks[0].colour"),
            (3, "5", "tasks[1].timeout"), (3, '["c"]', "tasks[1].needs"),
            (4, '"ghost"', "user.name"), (4, '"x"', "user.email"),
            (5, '"chwon"', "storage.logs.chwon"), (6, '"("', "filters[0]"),
            (6, '"on"', "notify.enabled"), (6, '")"', "redact[0]"))]


def test_one_mistake_is_reported_once(check):
    """A value that does not fit brings no second mistake with it."""
    for old, new in (
            ('"name": "anon"', '"name": 5'), ('"/b/sync"', "5"),
            ('"slug": "photos"', '"slug": 5'), (SYNC, "5"),
            ('"anon@example.com"', "5"), (MAIL, "[]"),
            # Go takes a key in any case; the key that is meant is not
            # missing as well.
            ('"slug": "photos"', '"Slug": "photos"'),
            ('"user": {', '"User": {'), ('"storage": {', '"STORAGE": {')):
        assert len(check(BASE.replace(old, new))) == 1, (old, new)


@pytest.mark.parametrize("key", ["ping", "notify", "metrics"])
def test_url_in_the_place_of_an_object_is_named_without_its_path(key, check):
    text = "\n".join(check(
        f'{{"{key}": "https://hc.example/5f1c-secret?k=secret"}}'))
    assert 'value "https://hc.example/"' in text and "secret" not in text


@pytest.mark.parametrize("text", [
    "", "[]", "null", '"x"', "5", "{}", '{"tasks": [], "user": {}, '
    '"storage": {}}', '{"tasks": null, "user": null, "storage": null}',
])
def test_errors_of_an_almost_empty_configuration_name_what_is_missing(text,
                                                                      check):
    assert check(text)


def test_byte_order_mark_is_reported(check):
    assert check("\ufeff" + BASE) == [
        "m.json:1:1: the file begins with a byte order mark "
        "(expected UTF-8 without one)"]


def test_message_is_one_line_for_any_quoted_text(check):
    text = BASE.replace('"slug": "photos"', r'"slug": "a\nm.json:1:1: \u001b['
                        r'2J \u202e"').replace('"/b/sync"', r'"/b/\nx"')
    lines = check(text, storage_errors={"sync": "does not exist"})
    assert all(line.startswith("m.json:") and line.isprintable()
               for line in lines)
    assert len(lines) >= 2


@pytest.mark.parametrize("data, words", [
    (b'{"a": "\xff"}', "m.json:1:8: not UTF-8"),
    (b"\n\xfe\xff", "m.json:2:1: not UTF-8"),
    ("{}".encode("utf-16"), "m.json:1:1: not UTF-8"),
    (b" " * (2**20 + 1), "larger than 1 MiB"), (None, "no such file"),
    ("folder", "not a regular file"), ("fifo", "not a regular file"),
], ids=name_of)
def test_a_file_that_is_not_utf8_is_an_error(data, words, tmp_path, capsys,
                                           monkeypatch):
    import os
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.json"
    if data == "folder":
        path.mkdir()
    elif data == "fifo":
        os.mkfifo(path)
    elif data is not None:
        path.write_bytes(data)
    for command in ("check", "dump", "list", "run"):
        assert mission.main(["-c", "m.json", command]) == mission.EXIT_CONFIG
        assert words in capsys.readouterr().err


# --- the real host is asked -----------------------------------------------


@pytest.mark.parametrize("change", [
    lambda config: config["tasks"].append(
        {"slug": "x", "type": "exec", "entrypoint": "/bin/\0sh"}),
    lambda config: config["storage"].update(sync={"path": "/tmp/\0"}),
    lambda config: config["storage"].update(
        sync={"path": "/tmp/\0", "chown": True, "commit": True}),
    lambda config: config.update(passBin="/bin/\0"),
    lambda config: config.update(ping={"caFile": "/\0"}),
    lambda config: config["user"].update(name="a\0b"),
    lambda config: config.update(metrics={"textfile": "/tmp/\0.prom"}),
], ids=["entrypoint", "storage", "chown", "passBin", "caFile", "user",
        "textfile"])
def test_nul_in_a_path_is_an_error(change, scratch, capsys):
    change(scratch.config)
    scratch.write()
    assert mission.main(["-c", str(scratch.path), "check"]) == \
        mission.EXIT_CONFIG
    assert "mission: error: " in capsys.readouterr().err


def test_the_scratch_configuration_is_valid(scratch, capsys):
    scratch.task("mail", "echo hello")
    scratch.write()
    assert mission.main(["-c", str(scratch.path), "check"]) == 0, \
        capsys.readouterr().err


# --- what it reads --------------------------------------------------------


ORIGINAL = r"""// The original's own keys, as its sample has them.
{
    "tasks": [
        { "slug": "mail", "name": "Mail", "type": "exec", "scheduled": true },
        { "slug": "own", "name": "Own", "type": "exec", /* in between */
          "entrypoint": "~/bin/own" }, // trailing comma below
        { "slug": "last", "name": "", "type": "exec", "post": true, },
    ],
    "user": { "name": "anon", "email": "Anon Y <anon@example.com>" },
    "passBin": "",
    "storage": {
        "tasks": { "path": "~/tasks" }, "logs": { "path": "logs" },
        "my-dir": { "path": "~bob/../x/./y/" },
        "sync": { "path": "/b//sync", "chown": true, "commit": true }, },
    "ping": { "enabled": true, "endpoint": "https://hc-ping.com/%s/a%20b" },
    "notify": { "enabled": false },
    "mail": { "enabled": true, "type": "sendmail" },
    "filters": null
}
// the end"""


def test_a_configuration_of_the_original_is_read(read, tmp_path):
    config = read(ORIGINAL)
    assert [task.slug for task in config.tasks] == ["mail", "own", "last"]
    assert [task.scheduled for task in config.tasks] == [True, False, False]
    assert config.tasks[2].post and not config.tasks[0].post
    assert config.filters == ()
    assert config.ping.endpoint == "https://hc-ping.com/%s/a%20b"
    assert config.mail.enabled and config.mail.on == "always"
    assert mission.address_of(config.user.email[0]) == "anon@example.com"


def test_defaults_keep_the_behaviour_of_the_original(read):
    config = read(ORIGINAL.replace('"mail": {', '"logs": {}, "mail": {'))
    task, ping, mail = config.tasks[0], config.ping, config.mail
    assert (task.retry_delay, config.notify.enabled, mail.enabled) == (
        0, False, True)
    assert (task.timeout, task.retries, task.needs, task.parallel, task.user,
            task.env, task.nice, task.min_free) == (
                None, 0, (), "", "", {}, 0, {})
    assert (ping.start, ping.fail, ping.log, ping.timeout, ping.retries) == (
        False, False, False, 10.0, 3)
    assert (mail.on, mail.start, mail.smtp) == ("always", True, None)
    assert (config.redact, config.logs.keep, config.metrics.textfile,
            config.trust) == ((), None, "", "user")
    assert config.logs.max == 2**30


def test_paths_are_made_absolute(read, tmp_path):
    config = read(ORIGINAL)
    assert {name: storage.path for name, storage in config.storage.items()} \
        == {"tasks": "/home/anon/tasks", "logs": str(tmp_path / "logs"),
            "my-dir": "/srv/x/y", "sync": "/b/sync"}
    assert [task.entrypoint for task in config.tasks] == [
        "/home/anon/tasks/mail/run", "/home/anon/bin/own",
        "/home/anon/tasks/last/run"]
    assert config.storage["my-dir"].variable == "MY_DIR_DIR"
    assert [task.name for task in config.tasks] == ["Mail", "Own", "last"]


@pytest.mark.parametrize("written, path", [
    ("~", "/home/anon"), ("~/", "/home/anon"), ("~/a", "/home/anon/a"),
    ("~bob", "/srv/bob"), ("~bob/a/../b", "/srv/bob/b"),
    ("a", "/etc/mission/a"), ("./a", "/etc/mission/a"),
    ("../a", "/etc/a"), ("/a/~/b", "/a/~/b"), ("a/~", "/etc/mission/a/~"),
    ("/", "/"), ("/a/", "/a"), ("/../a", "/a"),
    ("$HOME", "/etc/mission/$HOME"), ("//etc/.", "/etc"),
])
def test_path_is_resolved_against_home_and_configuration(written, path):
    text = BASE.replace('"/b/sync"', json.dumps(written))
    reader = mission.ConfigReader(text, "/etc/mission/m.json")
    config = mission.resolved(reader.config(), HOMES.get, reader.diagnostics)
    assert (config.storage["sync"].path, reader.diagnostics.found) == (
        path, [])


def test_the_home_of_an_unknown_user_is_an_error(check):
    lines = check(BASE.replace('"/b/sync"', '"~ghost/x"'))
    assert len(lines) == 1
    assert ('storage.sync.path: "~ghost/x": cannot expand ~: user '
            '"ghost" does not exist') in lines[0]


def test_unknown_user_is_one_error_for_all_paths_below_its_home(check):
    base = BASE.replace('"/b/sync"', '"~/sync"').replace(
        '"commit": true', '"chown": true, "commit": true').replace(
        '"/b/logs"', '"~/logs"')
    lines = check(base.replace('"name": "anon"', '"name": "nouser"'))
    assert len(lines) == 1, lines
    assert "user.name" in lines[0] and "expanded in 2 paths" in lines[0]


# --- dump -----------------------------------------------------------------


FULL = r"""{
    "tasks": [
        {"slug": "a", "name": "A \"q\" \u00e9", "type": "exec",
         "scheduled": true, "post": false, "entrypoint": "bin/a",
         "timeout": "1h30m", "retries": 3, "retryDelay": "1m2.026s",
         "needs": ["b"], "parallel": "g", "user": "bob",
         "env": {"A": "1 // x", "B": ""}, "nice": 5,
         "minFree": {"sync": "1536M", "logs": "100"},
         "ping": "https://h/a"},
        {"slug": "b", "type": "builtin", "timeout": "1001ms"}],
    "user": {"name": "anon", "email": ["anon@example.com", "b@c.d"]},
    "passBin": "~/bin/pass",
    "storage": {"tasks": {"path": "tasks"}, "logs": {"path": "/l"},
                "sync": {"path": "~bob/s", "chown": true, "commit": true}},
    "ping": {"enabled": true, "endpoint": "http://h/%s", "start": true,
             "fail": true, "log": true, "timeout": "2.5s", "retries": 1,
             "startEndpoint": "http://h/s", "failEndpoint": "http://h/f",
             "proxy": "http://p:3128",
             "caFile": "ca.pem"},
    "notify": {"enabled": true},
    "mail": {"enabled": true, "type": "smtp", "on": "failure",
             "from": "x@y.z", "start": false, "smtp": {
                "host": "h", "port": 2525, "security": "tls", "user": "u",
                "passName": "p", "from": "a@b.c", "caFile": "~/ca.pem"}},
    "filters": ["^a\\z", "<&>"], "redact": ["x=\\S+"],
    "logs": {"keep": 7, "max": "3G"},
    "metrics": {"textfile": "~/m.prom"}, "trust": "root"
}"""


def dumped(text: str, path: str) -> dict:
    reader = mission.ConfigReader(text, path)
    return mission.as_json(mission.resolved(
        reader.config(), HOMES.get, reader.diagnostics))


@pytest.mark.parametrize("text", [BASE, FULL, ORIGINAL, mission.SAMPLE],
                         ids=["base", "full", "original", "sample"])
def test_dump_of_a_parsed_dump_is_the_same(text):
    first = dumped(text, "/etc/mission/m.json")
    again = dumped(json.dumps(first), "/elsewhere/n.json")
    assert again == first


def test_a_dump_contains_every_value():
    found = dumped(FULL, "/etc/mission/m.json")
    given = mission.JsoncReader(FULL).document()

    def missing(given, found, path=""):
        for key in given:
            if key not in found:
                yield f"{path}{key}"
            elif isinstance(given[key], dict):
                yield from missing(given[key], found[key], f"{path}{key}.")
    assert list(missing(given, found)) == []
    assert list(missing(given["tasks"][0], found["tasks"][0])) == []
    assert found["tasks"][0]["timeout"] == "1h30m0s"
    assert found["tasks"][0]["retryDelay"] == "1m2.026s"
    assert found["tasks"][1]["timeout"] == "1.001s"
    assert found["tasks"][0]["minFree"] == {"sync": "1536M", "logs": "100"}
    assert found["mail"]["smtp"]["port"] == 2525
    assert found["logs"] == {"keep": 7, "max": "3G"}


def test_command_dump_prints_the_configuration(read, capsys, monkeypatch):
    monkeypatch.setattr(mission, "HostInspector", FakeHost)
    read(ORIGINAL)
    assert mission.main(["dump", "-c", "m.json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["user"]["name"] == "anon"
    assert list(printed["storage"]) == sorted(printed["storage"])


# --- durations and sizes --------------------------------------------------


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("512", 512), ("100K", 102400), ("5M", 5 * 2**20),
    ("5G", 5 * 2**30), ("5GB", 5 * 2**30), ("2T", 2 * 2**40), ("1B", 1),
    ("", None), ("G", None), ("B", None), ("-1", None), ("1.5G", None),
    ("5 G", None), ("5g", None), ("5GiB", None), ("5P", None),
    ("\u0665G", None), ("9" * 20, None), ("1e3", None), ("5G\n", None),
])
def test_size_is_parsed_or_refused(text, size):
    assert mission.parse_size(text) == size
    if size is not None:
        assert mission.parse_size(mission.format_size(size)) == size


# --- scripts --------------------------------------------------------------


RULE_LINE = "set -euo pipefail\n"


@pytest.mark.parametrize("head, mistake", [
    ("#!/bin/bash\n" + RULE_LINE, ""),
    ("#!/bin/bash\n\n# what it does\n  # more\n" + RULE_LINE, ""),
    ("#!/bin/bash\n   set -euo pipefail   \n", ""),
    ("#!/bin/bash\nset -euo pipefail # always\n", ""),
    ("#!/bin/bash\nset -euo pipefail;\n", ""),
    ("#! /bin/bash\n" + RULE_LINE, ""), ("#!/bin/bash\nset -euo pipefail", ""),
    ("#!/usr/bin/env bash\n" + RULE_LINE, ""),
    ("#!/usr/bin/env -S bash -x\n" + RULE_LINE, ""),
    ("#!/usr/bin/env -S A=b bash\n" + RULE_LINE, ""),
    *((head + "\necho\n", "") for head in (
        "#!/bin/bash\nset -Eeuo pipefail", "#!/bin/bash\nset -euxo pipefail",
        "#!/bin/bash\nset -eu -o pipefail",
        "#!/bin/bash\nset -o errexit -o nounset -o pipefail",
        "#!/bin/bash -eu\nset -o pipefail",
        "#!/usr/bin/env -S bash -euo pipefail",
        "#!/bin/bash\nset -euo pipefail; shopt -s inherit_errexit",
        "#!/bin/bash -e\n# x\nset -u\n\nset -o pipefail")),
    *((head + "\necho\n", ":") for head in (
        "#!/bin/bash\nset -euo pipefail +e", "#!/bin/bash -eu",
        "#!/bin/bash\nset -euo pipefail || true",
        "#!/bin/bash\nset -euno pipefail", "#!/bin/bash\nset -eo pipefail",
        "#!/bin/bash\nset -eu -- -o pipefail",
        "#!/bin/bash\necho; set -euo pipefail",
        "#!/bin/bash\nset -euo pipefail | cat", "#!/bin/bash\nset -euo")),
    ("#!/bin/bash\necho\n" + RULE_LINE, ":2: a bash task"),
    ("#!/bin/bash\n\n# x\nset -e\n", ":4: a bash task"),
    ("#!/bin/bash -euo pipefail\necho\n", ":2: a bash task"),
    ("#!/usr/local/bin/bash\necho\n", ":2: a bash task"),
    ("#!/usr/bin/env bash\necho\n", ":2: a bash task"),
    ("#!/usr/bin/env -S bash -eu\necho\n", ":2: a bash task"),
    ("#!/usr/bin/env -i A=b bash\necho\n", ":2: a bash task"),
    ("#!/bin/bash\n#set -euo pipefail\n", ":2: a bash task"),
    ("#!/bin/bash", ":1: a bash task"), ("#!/bin/bash\n", ":2: a bash task"),
    ("#!/bin/bash\nset -euo pipefail\r\n", ":2: "),
    ("#!/bin/bash\nset -euo pipefailure\n", ":2: a bash task"),
    ("#!/bin/bash\r\nset -euo pipefail\r\n", ":1: the #! line ends in CR"),
    ("#!/usr/bin/env bash\r\n", ":1: the #! line ends in CR"),
    ("#!/bin/sh\necho\n", ""), ("#!/bin/dash\n", ""),
    ("#!/usr/bin/python3\nimport os\n", ""), ("#!/usr/bin/rbash-x\n", ""),
    ("\x7fELF\x02\x01", ""), ("\xcf\xfa\xed\xfe", ""),
    ("echo hello\n", ":1: neither a program nor"), ("", ":1: neither"),
    ("\xef\xbb\xbf#!/bin/sh\n", ":1: neither"), (" #!/bin/sh\n", ":1: neith"),
    ("#!\necho\n", ":1: "), ("#!   \necho\n", ":1: "),
    ("#!/usr/bin/env\necho\n", ":1: "),
])
def test_bash_script_without_errexit_nounset_and_pipefail_is_refused(
        head, mistake, check):
    lines = check(BASE, mail={"head": head})
    assert len(lines) == bool(mistake)
    if mistake:
        assert f"tasks[0].slug: /b/tasks/mail/run{mistake}" in lines[0]


def test_check_notes_that_root_will_own_all_backups(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mission, "HostInspector", FakeHost)
    (tmp_path / "m.json").write_text(BASE.replace('"anon"', '"root"'))
    assert mission.main(["-c", "m.json", "check"]) == mission.EXIT_OK
    printed = capsys.readouterr()
    assert printed.out == (
        "m.json:6:22: warning: user.name: root will own all backups "
        "(expected an ordinary user, if there is one)\n")
    assert printed.err == ""


# --- patterns -------------------------------------------------------------


@pytest.mark.parametrize("text, matches, misses", [
    # What Go's RE2 has and Python spells in another way.
    ("^[[:space:]]+x", " \tx", "x"), ("[[:digit:]]{2}", "a42", "a4"),
    ("[^[:alnum:]_]", "a-b", "a_b"), ("[[:upper:][:digit:]]", "aB", "ab"),
    ("[[:punct:]]", "a]", "ab"), ("[[:punct:]]", "a^", "ab"),
    ("[[:blank:]]", "a\tb", "ab"), ("[[:xdigit:]]{4}", "BEEF", "BEEG"),
    ("[[:word:]]+-", "a_1-", "--"), ("[[:lower:]]", "Ab", "AB"),
    ("foo\\z", "a foo", "foo "), ("^$", "", "x"), ("\\\\z", "\\z", "foo"),
    ("\\\\\\z", "a\\", "\\z"), ("\\Afoo", "foo", " foo"),
    ("(?i)FOO", "a foo", "fo"), ("(?P<n>a)b", "ab", "a"),
    ("\\bfoo\\b", "a foo b", "afoo"), ("a{2,3}", "aa", "a"),
    (" (?i)password", "a PassWord", "password"),
    ("foo(?i)bar", "fooBAR", "Foobar"),
    ("\\pL+x", "\u00e9x", "1x"), ("\\Qa.b\\E", "a.b", "axb"),
    ("\\Qa|b", "a|b", "a"), ("\\x{263a}", "\u263a", "x"),
    ("[[:^space:]]x", "ax", " x"), ("(?<n>a)b", "ab", "b"),
    ("(?<=a)b", "ab", "b"), ("\\\\x{2}", "\\xx", "\\x"),
    # Flags hold to the end of their group, in all of its alternatives.
    ("a(?i)b|c", "C", "A"), ("x(a(?i)b|c)d", "xCd", "xCD"),
    ("(?i:a)b", "Ab", "AB"), ("(?i)a(?-i)b", "Ab", "AB"),
    ("a(?i)(b|c)|d", "aC", "AC"), ("a(?i)(b|c)|d", "D", "A"),
    ("a(?s).b", "a\nb", "ab"), ("\\[(?i)a", "[A", "A"), ("(?i)", "x", None),
    # Classes: of ASCII alone, and negated among others.
    ("[a[:^space:]]x", "ax", " x"), ("[^[:^digit:]]", "1", "a"),
    ("^[[:word:][:^ascii:]]$", "\u00e9", "-"), ("[[:word:]]", "a", "\u00e9"),
    ("[]a]", "]", "b"), ("[^]a]", "b", "]"), ("[[a]", "[", "b"),
    ("[&&|~]", "|", "b"), ("[\\]a]", "]", "b"), ("[:word:]", "w", "e"),
    # General categories of Unicode.
    ("\\p{Lu}", "\u00c9", "\u00e9"), ("\\PL", "1", "a"),
    ("\\p{^Lu}", "a", "A"), ("[\\p{Lu}\\d]", "9", "a"),
    ("[^\\p{L}]", "1", "\u03b1"), ("\\pN", "\u00b2", "a"),
    ("\\\\pL", "\\pL", "a"), ("\\p{Sc}\\d", "\u20ac5", "e5"),
    ("\\Qa.b\\E+", "a.bbb", "a.c"), ("\\Q(?i", "(?i", "i"),
    ("[\\x{263a}]", "\u263a", "x"), ("[\\pL]\\z", "a", "a1"),
    ("foo$", "foo", "foo "), ("^\\S+\\.go:\\d+", "x.go:12", "x.go:"),
])
def test_a_pattern_of_the_original_means_the_same(text, matches, misses):
    found = mission.pattern(text)
    assert found.search(matches)
    assert misses is None or not found.search(misses)


@pytest.mark.parametrize("text, reason", [
    ("\\p{Greek}", "only the general categories of Unicode are, such"),
    ("(?U)a*", "write *? for *, and * for *?"), ("\\C", "bad escape"),
    ("[[:letter:]]", "unknown class [:letter:]"),
])
def test_check_says_why_a_pattern_of_the_original_cannot_be_used(
        text, reason, check):
    line, = check(BASE.replace('"mail":', '"filters": ['
                               f'{json.dumps(text)}], "mail":'))
    assert f'filters[0]: invalid regular expression "{text}": ' in line
    assert reason in line


# --- any value in any place -----------------------------------------------


ODD = [None, True, 0, -1, 1.5, 10**17, "", "x", "~", "~x/y", "\0", "a\nb",
       "\u202e", "(", [], [[]], [None], ["x", 1], {}, {"x": {}}, {"": ""},
       "root", "/", "5G", "90s", {"path": "/"}, {"path": 1}, ["mail"]]


def places(value, path=()):
    yield path
    for key in (value if isinstance(value, dict) else range(len(value))
                if isinstance(value, list) else ()):
        yield from places(value[key], path + (key,))


def test_invalid_value_in_any_place_causes_no_exception():
    """Each place of a full configuration, each odd value: checked, printed
    and dumped without an exception."""
    dice = random.Random(7)
    full = mission.JsoncReader(FULL).document()
    spots = [path for path in places(full) if path]
    cases = [(path, odd) for path in spots for odd in ODD]
    for path, odd in dice.sample(cases, 1200):
        values = json.loads(json.dumps(full))
        around = values
        for key in path[:-1]:
            around = around[key]
        around[path[-1]] = odd
        text = json.dumps(values, indent=1)
        reader = mission.ConfigReader(text, "/etc/m.json")
        diagnostics = reader.diagnostics
        config = mission.resolved(reader.config(), HOMES.get, diagnostics)
        validator = mission.ConfigValidator(config, FakeHost().facts(config),
                                            diagnostics)
        validator.validate()
        for found in diagnostics.found:
            assert found.text("m.json").isprintable()
        json.dumps(mission.as_json(config))
