"""Built-in tasks: Python that runs in a child, and the one we carry."""

from __future__ import annotations

import email
import email.policy
import json
import os
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
import support
from spotify_server import (CLIENT, Spotify, cut, edit, half, held, revoked,
                            status, text)

LONG_AGO, FAR_AWAY = "2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z"


# ==========================================================================
# What the tests need: a pass that notes what it is asked, a sendmail that
# keeps the mail, and a search for secrets in all that a run leaves behind.
# ==========================================================================

class Pass:
    """A passBin: one argument is a name, the value goes to stdout."""

    def __init__(self, scratch: support.Scratch):
        self.folder = scratch.make("pass")
        self.asked_file = self.folder / "asked"
        self.asked_file.write_text("")
        # mission may well run it as user.name instead of root.
        self.asked_file.chmod(0o666)
        scratch.open_to_others()
        scratch.config["passBin"] = str(scratch.stand_in(
            "pass-of-the-test", f'echo "$# $1" >> {self.asked_file}\n'
            f'exec cat "{self.folder}/$1.value"'))

    def put(self, name: str, value: str) -> None:
        path = self.folder / f"{name}.value"
        path.write_text(value + "\n")
        path.chmod(0o644)

    def asked(self) -> list[str]:
        return self.asked_file.read_text().splitlines()


def readable(path: Path) -> str:
    """A file as its reader sees it: a mail is decoded."""
    if path.suffix != ".eml":
        return path.read_bytes().decode("utf-8", "replace")
    message = email.message_from_bytes(path.read_bytes(),
                                       policy=email.policy.default)
    return message["Subject"] + "\n" + message.get_content()


def left_behind(scratch: support.Scratch) -> dict[str, str]:
    """Logs, mails, history, outbox: what a run wrote, by path."""
    folders = (scratch.logs, scratch.folder / "mails", scratch.state)
    return {str(path): readable(path) for folder in folders
            for path in folder.rglob("*") if path.is_file()}


def leaks(scratch: support.Scratch, result, *secrets: str) -> list[str]:
    found = {**left_behind(scratch), "out": result.out, "err": result.err}
    return [f"{where}: {secret}" for where, what in found.items()
            for secret in secrets if secret in what]


@pytest.fixture
def secrets(scratch):
    return Pass(scratch)


# ==========================================================================
# Spotify: the files
# ==========================================================================

# The pauses between two requests last a hundredth.
SHORT_SLEEPS = """
sleep = k.time.sleep
k.time.sleep = lambda seconds: sleep(seconds / 100)
"""


class Account:
    """A Spotify account, and the configuration that backs it up."""

    def __init__(self, scratch, spotify: Spotify, secrets: Pass):
        self.scratch, self.spotify, self.secrets = scratch, spotify, secrets
        self.folder = scratch.storage("sync") / "spotify"
        self.folder.mkdir()
        self.token_file = scratch.storage("sessions") / "spotify"
        secrets.put("spotify_api_client_id", CLIENT[0])
        secrets.put("spotify_api_client_secret", CLIENT[1])
        scratch.builtin("spotify", env=spotify.env())
        scratch.patch(SHORT_SLEEPS)
        self.task = scratch.config["tasks"][0]
        self.log_in(spotify.token(), FAR_AWAY)

    def log_in(self, access: str, expiry) -> None:
        """The token file as an earlier run, or the original, left it."""
        self.token_file.write_text(json.dumps({
            "access_token": access, "token_type": "Bearer",
            "refresh_token": "refresh-0", "expiry": expiry}, indent=4))
        self.token_file.chmod(0o600)

    def log_in_long_ago(self) -> None:
        self.spotify.tokens.clear()
        self.log_in("access-of-old", LONG_AGO)

    def back_up(self, *args: str, well: bool = True):
        result = self.scratch.mission("run", *args)
        assert (result.code == 0) == well, result
        return result

    def token(self) -> dict:
        return json.loads(self.token_file.read_text())

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text()
                for path in self.folder.iterdir() if path.is_file()}


@pytest.fixture
def spotify():
    with Spotify() as server:
        yield server


@pytest.fixture
def account(scratch, spotify, secrets):
    return Account(scratch, spotify, secrets)


def test_each_playlist_becomes_a_file_with_all_its_tracks(account, spotify):
    playlist = spotify.add("4uLU6h", "Road trip", tracks=3)
    account.back_up()
    path = account.folder / "4uLU6h_Roadtrip.json"
    assert json.loads(path.read_text()) == {
        "playlist": playlist, "tracks": spotify.tracks["4uLU6h"]}
    assert path.read_text().startswith('{\n    "playlist": {\n        "')
    assert support.mode(path) == 0o600


FILE_NAMES = {      # a playlist's name -> its file's name, as the original's
    "Road trip":    "{}_Roadtrip.json",
    "a-b_c 9":      "{}_a-b_c9.json",
    "Été 2024!":    "{}_t2024.json",
    "日本の歌":      "{}_.json",
    "../../etc/x":  "{}_etcx.json",
    "a\n\0\x1b[m.": "{}_am.json",
    "١":            "{}_.json",         # a digit, and not one of 0-9
    "":             "{}_unknown-playlist-name.json",
    None:           "{}_unknown-playlist-name.json",
}


def test_file_name_has_the_id_and_the_ascii_letters_of_the_name(
        account, spotify):
    for number, name in enumerate(FILE_NAMES):
        spotify.add(f"id{number}", name)
    account.back_up()
    assert sorted(account.files()) == sorted(
        pattern.format(f"id{number}")
        for number, pattern in enumerate(FILE_NAMES.values()))


def test_log_lists_each_playlist_with_its_size(account, spotify):
    spotify.add("small", "One", tracks=1)
    spotify.add("large", "Many", tracks=120)
    out = account.back_up().out
    size = (account.folder / "large_Many.json").stat().st_size
    assert size > 10_000
    for line in ("Fetching playlists", "Found 2 playlists",
                 "Downloading small_One.json... 0K",
                 f"Downloading large_Many.json... {size // 1000}K"):
        assert f"] {line}\n" in out


@pytest.mark.parametrize("largest", [None, 1, 2])
def test_pages_are_followed_to_the_end(account, spotify, largest):
    spotify.largest = largest
    lists, tracks = (51, 101) if largest is None else (5, 5)
    for number in range(lists):
        spotify.add(f"id{number}", "x", tracks=tracks if number == 3 else 0)
    account.back_up()
    assert len(account.files()) == lists
    saved = json.loads(account.files()["id3_x.json"])
    assert saved["tracks"] == spotify.tracks["id3"]


def test_largest_pages_are_requested(account, spotify):
    spotify.add("one", "One")
    account.back_up()
    assert [(asked.path, asked.query["limit"])
            for asked in spotify.asked("/v1")] == [
        ("/v1/me/playlists", "50"), ("/v1/playlists/one/tracks", "100")]


def test_a_playlist_without_tracks_has_an_empty_list(account, spotify):
    spotify.add("none", "None", tracks=0)
    account.back_up()
    assert json.loads(account.files()["none_None.json"])["tracks"] == []


def test_deleted_track_is_kept_in_the_list_as_null(account, spotify):
    spotify.add("one", "One", tracks=2)
    spotify.tracks["one"][0]["track"] = None
    account.back_up()
    saved = json.loads(account.files()["one_One.json"])
    assert saved["tracks"] == spotify.tracks["one"]


@support.root_only
def test_no_directory_is_created_behind_a_symbolic_link_of_the_user(
        account, spotify, scratch):
    spotify.add("one", "One")
    victim, sync = scratch.make("victim"), scratch.folder / "sync"
    sync.rename(scratch.folder / "before")
    sync.symlink_to(victim)
    os.chown(sync, support.ALICE_UID, support.ALICE_UID,
             follow_symlinks=False)
    result = scratch.mission("run")
    assert list(victim.iterdir()) == []
    assert result.code == 1 and f"{sync}/spotify: " in result.out


def test_dry_run_sends_no_request_and_fetches_no_password(account, spotify):
    spotify.add("one", "One")
    account.back_up("--dry-run")
    assert (spotify.requests, account.files()) == ([], {})
    assert account.secrets.asked() == []


@pytest.mark.parametrize("from_task", [True, False], ids=["task", "mission"])
def test_the_servers_can_be_set_for_the_task_or_for_mission(
        account, spotify, from_task):
    spotify.add("one", "One")
    if not from_task:
        account.scratch.env.update(account.task.pop("env"))
    account.back_up()
    assert list(account.files()) == ["one_One.json"]


# ==========================================================================
# Spotify: files are replaced whole, and only our own are removed
# ==========================================================================

def test_file_is_replaced_by_rename_and_never_overwritten(account, spotify):
    spotify.add("one", "One", tracks=1)
    account.back_up()
    path = account.folder / "one_One.json"
    with open(path) as reader:
        before = path.read_text()
        spotify.tracks["one"].append({"track": {"name": "a new one"}})
        account.back_up()
        assert reader.read() == before
    assert len(json.loads(path.read_text())["tracks"]) == 2
    assert os.listdir(account.folder) == ["one_One.json"]


def test_planted_symbolic_link_is_replaced_and_its_target_unchanged(
        account, spotify):
    spotify.add("one", "One")
    victim = account.scratch.folder / "victim"
    victim.write_text("mine")
    (account.folder / "one_One.json").symlink_to(victim)
    account.back_up()
    assert victim.read_text() == "mine"
    assert not (account.folder / "one_One.json").is_symlink()


@pytest.mark.parametrize("ident", [
    "../../evil", "{0}/evil", "..", "a\nb/c?d#e", "é" * 200])
def test_playlist_id_never_leads_out_of_the_directory(account, spotify, ident):
    spotify.add(ident.format(account.scratch.folder), "Evil")
    before = tree(account.scratch.folder, account.folder)
    result = account.scratch.mission("run")
    new = tree(account.scratch.folder, account.folder) - before
    assert {path for path in new if "vil" in path} == set()
    assert all("/" not in name and "\n" not in name
               for name in account.files())
    assert "Traceback" not in result.out


def tree(folder: Path, without: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")
            if without not in (path, *path.parents)}


def test_file_of_a_deleted_playlist_is_removed(account, spotify):
    spotify.add("stays", "Stays")
    spotify.add("gone", "Gone")
    account.back_up()
    assert "gone_Gone.json" in account.files()
    spotify.remove("gone")
    account.back_up()
    assert list(account.files()) == ["stays_Stays.json"]


def test_renamed_playlist_leaves_no_file_with_its_old_name(account, spotify):
    playlist = spotify.add("one", "Before")
    account.back_up()
    playlist["name"] = "After"
    account.back_up()
    assert list(account.files()) == ["one_After.json"]


STRANGERS = {       # files that the task did not write; some look so
    "notes.txt": "do not lose me",
    "holiday_photos.json": '{"mine": true}',
    "gone_Other.json": "[]",
    "2024_list.json": '{"playlist": "best of", "tracks": []}',
    "README": "",
    ".hidden_x.json": "{}",
}


def test_file_of_another_program_is_never_removed(account, spotify):
    spotify.add("stays", "Stays")
    spotify.add("gone", "Gone")
    account.back_up()
    for name, what in STRANGERS.items():
        (account.folder / name).write_text(what)
    (account.folder / "folder_x.json").mkdir()
    (account.folder / "link_x.json").symlink_to("notes.txt")
    spotify.remove("gone")
    account.back_up()
    assert set(os.listdir(account.folder)) == {
        "stays_Stays.json", "folder_x.json", "link_x.json", *STRANGERS}


def elsewhere(server, right):
    """A next page on a host that is not Spotify's."""
    return edit(next=f"{server.stranger.url}/v1/me/playlists?offset=2")(
        server, right)


def redirect(server, right):
    return status(302, location=f"{server.stranger.url}/v1/me/playlists")(
        server, right)


def itself(server, right):
    """A next page that is this page, again and again."""
    return edit(next=f"{server.url}/v1/me/playlists?offset=2&limit=2",
                total=10**6)(server, right)


LISTING, TRACKS = "/v1/me/playlists", "/v1/playlists/"
BAD_DAYS = {        # what goes wrong in the second run: path, first, then
    "the listing fails": (LISTING, [], status(500)),
    "its second page fails": (LISTING, [None], status(503)),
    "its second page is refused": (LISTING, [None], status(403)),
    "its second page is half": (LISTING, [None], half),
    "its second page is cut": (LISTING, [None, cut], status(403)),
    "its second page is HTML": (LISTING, [None], text("<h1>Sorry</h1>")),
    "its second page is a list": (LISTING, [None], text("[]")),
    "its second page has no items": (LISTING, [None], text("{}")),
    "its items are null": (LISTING, [None], edit(items=None)),
    "it ends before its total": (LISTING, [edit(next=None, total=4)], None),
    "it goes on elsewhere": (LISTING, [elsewhere], None),
    "it is redirected": (LISTING, [redirect], redirect),
    "it goes round in circles": (LISTING, [None], itself),
    "the tracks fail": (TRACKS, [], status(500)),
    "the tracks are not found": (TRACKS, [], status(404)),
    "the tracks are half": (TRACKS, [], half),
    "the second tracks are cut": (TRACKS, [None, cut], status(403)),
    "every token is refused": (LISTING, [], status(401)),
}


@pytest.mark.parametrize("day", BAD_DAYS)
def test_no_file_is_removed_after_an_incomplete_listing(day, account, spotify):
    path, first, then = BAD_DAYS[day]
    account.task["timeout"] = "15s"
    spotify.largest = 2
    for ident in ("one", "two", "three", "four", "gone"):
        spotify.add(ident, "x", tracks=1)
    account.back_up()
    before = account.files()
    spotify.remove("gone")
    spotify.script(path, *first, then=then)
    with Spotify() as spotify.stranger:
        spotify.stranger.tokens = spotify.tokens
        result = account.back_up(well=False)
    assert account.files() == before
    assert "Traceback" not in result.out and "timed out" not in result.out
    assert len(spotify.requests) < 60
    assert not any("authorization" in asked.headers
                   for asked in spotify.stranger.requests)


def test_nothing_is_removed_when_the_listing_is_suddenly_empty(
        account, spotify):
    spotify.add("one", "One")
    account.back_up()
    spotify.playlists = []
    account.scratch.mission("run")
    assert list(account.files()) == ["one_One.json"]


def test_a_total_that_is_too_small_does_not_end_the_listing(account, spotify):
    spotify.largest = 2
    for number in range(5):
        spotify.add(f"id{number}", "x")
    spotify.script(LISTING, then=edit(total=1))
    account.scratch.mission("run")
    assert len(account.files()) == 5


def test_a_null_among_the_playlists_costs_none_of_the_others(
        account, spotify):
    spotify.add("one", "One")
    playlist = spotify.add("two", "Two")
    account.back_up()
    spotify.script(LISTING, then=edit(items=[None, playlist], total=2))
    result = account.scratch.mission("run")
    assert sorted(account.files()) == ["one_One.json", "two_Two.json"]
    assert "Traceback" not in result.out


# ==========================================================================
# Spotify: a busy or broken server
# ==========================================================================

@pytest.mark.parametrize("path", [LISTING, TRACKS, "/api/token"])
def test_next_request_waits_for_retry_after(account, spotify, path):
    spotify.add("one", "One")
    if path == "/api/token":
        account.log_in_long_ago()
    spotify.script(path, status(429, retry_after=7),
                   status(429, retry_after=7))
    # Each pause is noted: how long it is to be, and when it begins by the
    # clock that the requests have, too.
    pauses = account.scratch.folder / "pauses"
    account.scratch.patch(f"""
        def note(seconds, sleep=k.time.sleep):
            if seconds < 1:         # mission waits for its children
                return sleep(seconds)
            with open({str(pauses)!r}, "a") as file:
                print(seconds, k.time.monotonic(), file=file)
        k.time.sleep = note
        """)
    account.back_up()
    first, second, third = [asked.at for asked in spotify.asked(path)]
    (one, sooner), (other, later) = [
        map(float, line.split()) for line in pauses.read_text().splitlines()]
    assert one == other == 7
    assert first < sooner < second < later < third


@pytest.mark.parametrize("after", ["", "soon", "1e9999", "in one second"])
def test_unusual_retry_after_is_accepted(account, spotify, after):
    spotify.add("one", "One")
    if after == "in one second":
        after = format_datetime(datetime.now(timezone.utc)
                                + timedelta(seconds=1), usegmt=True)
    spotify.script(LISTING, status(429, retry_after=after))
    account.back_up()
    assert list(account.files()) == ["one_One.json"]


def test_no_request_is_sent_before_a_long_retry_after(account, spotify):
    spotify.add("one", "One")
    account.task["timeout"] = "3s"
    spotify.script(LISTING, then=status(429, retry_after=86400))
    began = time.monotonic()
    account.back_up(well=False)
    assert time.monotonic() - began < 30
    assert len(spotify.asked(LISTING)) == 1


@pytest.mark.parametrize("hiccup", [status(500), status(503), half, cut],
                         ids=["500", "503", "half", "cut"])
def test_temporary_server_error_does_not_fail_the_backup(
        account, spotify, hiccup):
    spotify.add("one", "One")
    spotify.script(LISTING, hiccup)
    spotify.script(TRACKS, hiccup)
    account.back_up()
    assert list(account.files()) == ["one_One.json"]


def test_server_that_never_answers_ends_with_the_timeout(account, spotify):
    spotify.add("one", "One")
    account.task["timeout"] = "1s"
    spotify.script(LISTING, then=held)
    began = time.monotonic()
    assert "timed out" in account.back_up(well=False).out
    assert time.monotonic() - began < 30


def test_an_unreachable_server_is_reported_without_error_numbers(
        account, spotify):
    account.task["timeout"] = "2s"
    account.task["env"]["SPOTIFY_API_URL"] = "http://127.0.0.1:1/v1"
    out = account.back_up(well=False).out
    assert "connection refused" in out and "Traceback" not in out


# ==========================================================================
# Spotify: tokens and credentials
# ==========================================================================

def test_valid_token_is_used(account, spotify):
    spotify.add("one", "One")
    account.back_up()
    assert spotify.asked("/api/token") == account.secrets.asked() == []
    assert list(account.files()) == ["one_One.json"]


EXPIRIES = {        # as Go writes them, and as people spoil them
    "to the nanosecond": "2026-01-01T00:00:00.123456789Z",
    "in the future, it says": FAR_AWAY,
    "nonsense": "tomorrow",
    "null": None,
}


@pytest.mark.parametrize("expiry", EXPIRIES.values(), ids=EXPIRIES.keys())
def test_expired_token_is_refreshed(account, spotify, expiry):
    spotify.add("one", "One")
    account.log_in("access-of-old", expiry)
    account.back_up()
    assert len(spotify.asked("/api/token")) == 1
    assert list(account.files()) == ["one_One.json"]


def test_new_token_is_stored_in_the_format_of_the_original(account, spotify):
    spotify.add("one", "One")
    account.log_in_long_ago()
    account.token_file.chmod(0o644)
    inode = account.token_file.stat().st_ino
    account.back_up()
    token = account.token()
    assert set(token) >= {"access_token", "token_type", "refresh_token",
                          "expiry"}
    assert (token["access_token"], token["token_type"],
            token["refresh_token"]) == ("access-2", "Bearer", "refresh-0")
    expiry = datetime.fromisoformat(token["expiry"].replace("Z", "+00:00"))
    left = expiry - datetime.now(timezone.utc)
    assert timedelta(minutes=50) < left < timedelta(minutes=61)
    assert support.mode(account.token_file) == 0o600
    assert account.token_file.stat().st_ino != inode
    assert os.listdir(account.token_file.parent) == ["spotify"]


def test_a_new_refresh_token_is_stored_before_anything_else(account, spotify):
    spotify.add("one", "One")
    spotify.rotate = True
    account.log_in_long_ago()
    seen = []
    spotify.on_request = lambda asked: seen.append(
        (asked.path, account.token()["refresh_token"]))
    account.back_up()
    refreshed = seen.index(("/api/token", "refresh-0"))
    assert seen[refreshed + 1] == (LISTING, "refresh-2")


def test_a_new_refresh_token_survives_a_run_that_fails(account, spotify):
    spotify.add("one", "One")
    spotify.rotate = True
    account.log_in_long_ago()
    spotify.script(TRACKS, status(403))
    account.back_up(well=False)
    assert account.token()["refresh_token"] == "refresh-2"
    account.back_up()
    assert list(account.files()) == ["one_One.json"]


def test_token_revoked_during_the_backup_is_refreshed_once(account, spotify):
    spotify.largest, spotify.rotate = 2, True
    for number in range(5):
        spotify.add(f"id{number}", "x", tracks=3)
    spotify.script(LISTING, None, revoked)
    spotify.script(TRACKS, None, None, revoked)
    account.back_up()
    assert len(account.files()) == 5
    assert len(spotify.asked("/api/token")) == 2
    assert account.token()["refresh_token"] == "refresh-3"


BAD_TOKENS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "not JSON": lambda path: path.write_text("{'access_token': 1}"),
    "a list": lambda path: path.write_text("[]"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "no refresh token": lambda path: path.write_text(
        '{"access_token": "x", "expiry": "2020-01-01T00:00:00Z"}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("mistake", BAD_TOKENS)
def test_error_of_an_invalid_token_file_names_the_file(
        mistake, account, spotify):
    account.task["timeout"] = "5s"
    BAD_TOKENS[mistake](account.token_file)
    out = account.back_up(well=False).out
    assert str(account.token_file) in out
    assert "Traceback" not in out and "timed out" not in out


def test_pass_returns_the_secret_first_and_then_the_id(account, spotify):
    spotify.add("one", "One")
    account.log_in_long_ago()
    account.back_up()
    assert account.secrets.asked() == ["1 spotify_api_client_secret",
                                       "1 spotify_api_client_id"]


def test_wrong_credentials_are_reported_once_and_not_retried(account, spotify):
    account.log_in_long_ago()
    account.secrets.put("spotify_api_client_secret", "of-yesterday")
    before = account.token()
    out = account.back_up(well=False).out
    assert "invalid_client" in out and "of-yesterday" not in out
    assert len(spotify.asked("/api/token")) == 1
    assert account.token() == before


@pytest.mark.parametrize("name", ["spotify_api_client_secret",
                                  "spotify_api_client_id"])
def test_missing_pass_entry_is_named(account, name):
    account.log_in_long_ago()
    (account.secrets.folder / f"{name}.value").unlink()
    out = account.back_up(well=False).out
    assert name in out and "Traceback" not in out


@pytest.mark.parametrize("missing", ["sync", "sessions", "passBin"])
def test_missing_setting_of_spotify_is_named(account, missing):
    config = account.scratch.config
    config.pop(missing, None)
    config["storage"].pop(missing, None)
    result = account.scratch.mission("check")
    assert result.code == 78
    assert missing in result.err and "spotify" in result.err


def test_tokens_and_credentials_are_not_in_log_mail_or_history(
        account, spotify):
    account.scratch.keep_mail()
    account.log_in_long_ago()
    spotify.rotate = True
    spotify.add("one", "One")
    told = f"access-2 {CLIENT[1]} refresh-2"    # an error page that echoes
    spotify.script(TRACKS, then=text(told, code=403))
    result = account.back_up("--headless", well=False)
    assert spotify.asked(TRACKS) and "403" in account.scratch.log()
    assert leaks(account.scratch, result, "access-2", "refresh-2",
                 "refresh-0", CLIENT[1]) == []


# ==========================================================================
# Built-in tasks of the user's own: what they get
# ==========================================================================

def test_a_builtin_task_gets_storage_user_and_passwords(scratch, secrets):
    sync = scratch.storage("sync")
    secrets.put("a-name", "a value, for all to see")
    scratch.builtin("mine", """
        def run(args, log):
            log("sync " + str(args.storage["sync"]))
            log("user " + args.target_user)
            log("long " + str(len(args.pass_value("a-name"))))
        """)
    result = scratch.mission("run")
    assert result.code == 0, result
    assert [line for line in support.log_texts(result.out)
            if line[:5] in ("sync ", "user ", "long ")] == [
        f"sync {sync}", f"user {scratch.config['user']['name']}", "long 23"]
    assert secrets.asked() == ["1 a-name"]


def test_builtin_task_runs_with_the_process_environment_of_a_script(scratch):
    """Its own directory, session and environment, and nothing on stdin."""
    scratch.storage("sync")
    scratch.builtin("mine", """
        import os, sys
        def run(args, log):
            log("cwd " + os.getcwd())
            log("leader %s" % (os.getsid(0) == os.getpid()))
            log("stdin %r" % sys.stdin.read())
            for name in ("TARGET_USER", "SYNC_DIR", "MISSION_TASK", "CAKE"):
                log(name + " " + os.environ[name])
            log("secret " + os.environ.get("SECRET", "none"))
        """, env={"CAKE": "lemon"})
    scratch.env["SECRET"] = "of the caller"
    result = scratch.mission("run")
    assert result.code == 0, result
    user = scratch.config["user"]["name"]
    for line in (f"cwd {scratch.tasks}/mine", "leader True", "stdin ''",
                 f"TARGET_USER {user}", f"SYNC_DIR {scratch.folder}/sync",
                 "MISSION_TASK mine", "CAKE lemon", "secret none"):
        assert line in support.log_texts(result.out)


def test_output_of_a_builtin_task_is_logged_in_order(scratch):
    scratch.builtin("mine", r"""
        import os, subprocess, sys
        def run(args, log):
            print("1 printed")
            log("2 logged")
            print("3 without an end", end="")
            print("", file=sys.stdout)
            sys.stderr.write("4 complained\n")
            os.write(1, b"5 written\n")
            subprocess.run(["echo", "6 echoed"])
            log("7 two\n8 lines")
            print("9 bye", end="")
        """)
    result = scratch.mission("run")
    assert result.code == 0, result
    assert [line for line in support.log_texts(result.out)
            if line[:1].isdigit() and line[1:2] == " "] == [
        "1 printed", "2 logged", "3 without an end", "4 complained",
        "5 written", "6 echoed", "7 two", "8 lines", "9 bye"]


ODD_TEXTS = [       # what run() says before it says that it is still here
    r'log("\udcff\ud800")', r'print("\udcff\ud800")', r'log("a\0b\x1b[31m")',
    'print("№ " * 40000)', 'log("")', "log(42)", 'log("x" * 3_000_000)',
    r'sys.stdout.buffer.write(b"\xff\x00\n"); sys.stdout.flush()',
    r'log("one\rtwo\r\nthree\x85four\u2028five\u202e")']


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory):
    """One run: each text is said by its own task."""
    scratch = support.Scratch(tmp_path_factory.mktemp("texts"))
    scratch.env["LC_ALL"] = "C"
    for number, odd in enumerate(ODD_TEXTS):
        scratch.builtin(f"text{number}", f"""
            import sys
            def run(args, log):
                {odd}
                log("still here after {number}")
            """)
    return scratch.mission("run")


@pytest.mark.parametrize("number", range(len(ODD_TEXTS)), ids=ODD_TEXTS)
def test_any_text_of_a_builtin_task_is_logged_safely(odd_texts, number):
    assert f"still here after {number}" in support.log_texts(odd_texts.out)
    assert odd_texts.code == 0
    assert not set("\x1b\0\r\x85\u2028\u202e") & set(odd_texts.out)


# ==========================================================================
# Built-in tasks of the user's own: how they fail, and that they harm nobody
# ==========================================================================

ENDS = {            # the body of run() -> what the log says about it
    "raise ValueError('no tape')": "ValueError: no tape",
    "raise SystemExit('enough')": "enough",
    "import sys; sys.exit(3)": "3",
    "import os; os._exit(7)": "7",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os; os.kill(os.getpid(), 11)": "SIGSEGV",
    "import os; os.kill(os.getpid(), 9)": "SIGKILL",
    "import os; os.kill(0, 15)": "SIGTERM",
    "import os; os.abort()": "SIGABRT",
    "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**28,) * 2);"
    " b'x' * 2**30": "MemoryError",
    "f = lambda: f(); f()": "RecursionError",
    "import sys; sys.stderr = sys.stdout = None; 1 / 0": "",
    "import os; os.closerange(0, 100); 1 / 0": "",
    "import ctypes; ctypes.string_at(0)": "SIGSEGV",
}


def task_section(log: str, slug: str) -> str:
    return support.log_section(log, f"Task: {slug.capitalize()}")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """One run: for each end a task that ends so, and one that is well."""
    scratch = support.Scratch(tmp_path_factory.mktemp("ends"))
    for number, body in enumerate(ENDS):
        scratch.builtin(f"end{number}", f"""
            def run(args, log):
                {body}
            """, timeout="20s")
    scratch.task("last", "echo the last one ran")
    return scratch, scratch.mission("run")


@pytest.mark.parametrize("body", ENDS)
def test_failed_builtin_task_does_not_fail_the_others(ends, body):
    scratch, result = ends
    slug = f"end{list(ENDS).index(body)}"
    assert ENDS[body] in task_section(result.out, slug)
    assert scratch.outcomes()[slug] == "failed"
    assert "the last one ran" in task_section(result.out, "last")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"{len(ENDS)} errors " in result.err


def test_exception_is_logged_with_its_file_and_line(scratch):
    scratch.builtin("mine", """
        def deep(n):
            return {}["no such key"]
        def run(args, log):
            log("before")
            deep(1)
        """)
    out = scratch.mission("run").out
    wanted = ["before", "Traceback (most recent call last):",
              "KeyError: 'no such key'"]
    assert [line for line in support.log_texts(out)
            if line in wanted] == wanted
    assert f'File "{scratch.tasks}/mine/task.py", line 3, in deep' in out
    assert 'return {}["no such key"]' in out


def test_endless_loop_ends_with_the_timeout(scratch):
    scratch.builtin("mine", """
        import signal
        def run(args, log):
            while True:
                pass
        """, timeout="1s")
    scratch.task("next", "echo the next one ran")
    began = time.monotonic()
    result = scratch.mission("run")
    assert result.code == 1 and time.monotonic() - began < 30
    assert "timed out" in result.out
    assert "the next one ran" in support.log_texts(result.out)


def test_thread_that_never_ends_does_not_delay_the_end_of_the_run(scratch):
    scratch.builtin("mine", """
        import threading
        def run(args, log):
            threading.Thread(target=threading.Event().wait).start()
            log("returns")
        """, timeout="10s")
    result = scratch.mission("run")
    assert result.code == 0, result
    assert "returns" in support.log_texts(result.out)


def test_a_builtin_task_cannot_change_the_runner(scratch):
    where = """
        echo "$LABEL: $(pwd -P) $(umask) ${MINE-unset} $(ulimit -n) $HOME"
        """
    scratch.task("before", where, env={"LABEL": "before"})
    scratch.builtin("mine", """
        import builtins, os, resource, signal, subprocess, sys
        def run(args, log):
            os.chdir("/"); os.umask(0)
            os.environ.clear(); os.environ["MINE"] = "set"
            resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))
            for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            subprocess.Popen = os.open = builtins.open = None
            sys.modules.clear()
            log("done")
        """)
    scratch.task("after", where, env={"LABEL": "after"})
    result = scratch.headless()
    assert result.code == 0, result
    said = dict(line.split(": ", 1)
                for line in support.log_texts(scratch.log())
                if line.startswith(("before: ", "after: ")))
    assert said["after"] == said["before"].replace("/before ", "/after ")
    assert support.mode(scratch.log_files()[-1]) == 0o600


def test_builtin_task_inherits_no_open_file_of_the_runner(scratch):
    scratch.builtin("mine", """
        import os
        def run(args, log):
            for fd in os.listdir("/proc/self/fd"):
                try:
                    log("open " + os.readlink("/proc/self/fd/" + fd))
                except OSError:
                    pass
        """)
    result = scratch.headless()
    assert result.code == 0, result
    files = [line for line in support.log_texts(scratch.log())
             if line.startswith("open ")]
    assert "open /dev/null" in files
    assert [line for line in files if str(scratch.state) in line
            or str(scratch.logs) in line] == []


def test_output_of_a_builtin_task_cannot_forge_the_runners_lines(scratch):
    scratch.builtin("mine", r"""
        def run(args, log):
            log("a\n# Errors\nERROR: forged\n[1s        ] WARN: forged")
            print("TaskFinish mine exit 3\n\n# Finish\n")
        """)
    result = scratch.mission("run")
    assert result.code == 0, result
    assert [line for line in result.out.splitlines()
            if "forged" in line and not line.startswith("[")] == []


@support.root_only
def test_a_builtin_task_runs_as_the_user_it_names(alice):
    alice.python = support.SHARED_PYTHON
    alice.builtin("mine", """
        import os
        def run(args, log):
            log("ids %s" % ((os.getuid(), os.getgid(), os.getgroups()),))
        """, user=support.ALICE)
    result = alice.mission("run")
    assert result.code == 0, result
    uid = support.ALICE_UID
    assert f"ids ({uid}, {uid}, [{uid}])" in support.log_texts(result.out)


# ==========================================================================
# Built-in tasks of the user's own: mistakes that check finds
# ==========================================================================

MISTAKES = {          # task.py, or None -> words of the complaint
    "missing": (None, "does not exist"),
    "no run function": (b"def walk(args, log): pass\n", "run"),
    "a syntax error": (b"def run(args, log):\n    return (\n", "2"),
    "a bad indent": (b"def run(args, log):\n  a = 1\n    b = 2\n", "3"),
    "not UTF-8": (b"a = '\xff'\ndef run(args, log): pass\n", "1"),
    "a NUL": (b"def run(args, log): pass\n\0", "null bytes"),
}


@pytest.fixture(scope="module")
def broken_builtins(tmp_path_factory):
    """A task for each mistake, as slug a, b, c ..., and one that is well."""
    scratch = support.Scratch(tmp_path_factory.mktemp("mistakes"))
    slugs = {mistake: f"mistake{n}" for n, mistake in enumerate(MISTAKES)}
    for mistake, slug in slugs.items():
        what, _ = MISTAKES[mistake]
        scratch.builtin(slug, "def run(args, log): pass")
        path = scratch.tasks / slug / "task.py"
        if what is None:
            path.unlink()
        else:
            path.write_bytes(what)
    scratch.task("last", "echo the last one ran")
    return slugs, scratch.mission("check"), scratch.mission("run")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_reports_an_error_in_a_builtin_task(broken_builtins, mistake):
    slugs, check, _ = broken_builtins
    line, = [line for line in check.err.splitlines()
             if f"/{slugs[mistake]}/task.py" in line]
    assert MISTAKES[mistake][1] in line.split("task.py", 1)[1]
    assert check.code == 78 and "Traceback" not in check.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_in_a_builtin_task_fails_only_this_task(
        broken_builtins, mistake):
    slugs, _, run = broken_builtins
    about = task_section(run.out, slugs[mistake])
    assert "ERROR: " in about and MISTAKES[mistake][1] in about
    assert "the last one ran" in support.log_texts(run.out)
    assert f"{len(MISTAKES)} errors " in run.err and run.code == 1


def test_check_accepts_every_way_to_define_run(scratch):
    for number, python in enumerate([
            "import os\nrun = os.getenv\n",
            "from os import getenv as run\n",
            "if True:\n    def run(args, log): pass\n",
            "class Run:\n    def __call__(self, args, log): pass\n"
            "run = Run()\n"]):
        scratch.builtin(f"way{number}", python)
    result = scratch.mission("check")
    assert (result.code, result.err) == (0, "")


def test_check_runs_nothing_of_a_builtin_task(scratch):
    scratch.builtin("mine", f"""
        open({str(scratch.folder / "ran")!r}, "w").close()
        def run(args, log): pass
        """)
    assert scratch.mission("check").code == 0
    assert scratch.mission("list").code == 0
    assert not (scratch.folder / "ran").exists()


def test_module_that_fails_to_load_fails_only_its_task(scratch):
    scratch.builtin("mine", """
        import no_such_module
        def run(args, log): pass
        """)
    scratch.task("next", "echo the next one ran")
    result = scratch.mission("run")
    assert result.code == 1
    assert "No module named 'no_such_module'" in result.out
    assert "the next one ran" in support.log_texts(result.out)


# ==========================================================================
# Built-in tasks of the user's own: a password is never seen
# ==========================================================================


SECRET = "s3cr3t+(.*)$ & \\ ' \" pä'ss"    # and its own number


SAID = {            # what run() does with the value at once
    "prints it": "print(secret)",
    "logs it": "log('the value is ' + secret + ' indeed')",
    "writes it past the buffers": "os.write(1, secret.encode() + b'\\n')",
    "writes it without an end": "os.write(2, secret.encode())",
    "writes it in two pieces":
        "os.write(1, secret[:9].encode()); time.sleep(0.3); "
        "os.write(1, secret[9:].encode() + b'\\n')",
    "lets a program print it": "subprocess.run(['echo', secret])",
    "raises it": "raise ValueError(secret)",
    "raises it as a key": "raise KeyError(secret)",
    "exits with it": "raise SystemExit(secret)",
    "puts it into a long line": "print('x' * 65530 + secret + 'y' * 70000)",
    "says it a thousand times": "print((secret + ' ') * 1000)",
    "hides it in control characters": "print('\\x1b[1m' + secret + '\\x1b[m')",
    "ends a line by CR": "print(secret + '\\rprogress', end='\\r\\n')",
    "prints it as it dies": "os.write(1, secret.encode()); os.abort()",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """One run: each way to say a secret in its own task."""
    scratch = support.Scratch(tmp_path_factory.mktemp("said"))
    secrets = Pass(scratch)
    scratch.keep_mail()
    for number, python in enumerate(SAID.values()):
        secrets.put(f"bank{number}", f"{SECRET} {number}!")
        scratch.builtin(f"said{number}", f"""
            import os, subprocess, sys, time
            def run(args, log):
                log("begins")
                secret = args.pass_value("bank{number}")
                {python}
            """)
    return scratch, secrets, scratch.headless()


@pytest.mark.parametrize("how", SAID)
def test_pass_value_is_redacted_in_log_mail_and_history(said, how):
    scratch, secrets, result = said
    number = list(SAID).index(how)
    secret = f"{SECRET} {number}!"
    assert f"1 bank{number}" in secrets.asked()
    assert len(list((scratch.folder / "mails").iterdir())) == 2
    about = task_section(scratch.log(), f"said{number}")
    assert "begins" in about and "***" in about
    assert leaks(scratch, result, secret, repr(secret)[1:-1]) == []


def test_many_pass_values_are_fetched_and_redacted(scratch, secrets):
    names = [f"name{n}" for n in range(12)]
    for name in names:
        secrets.put(name, f"the-value-of-{name}!")
    scratch.builtin("mine", f"""
        import os
        def run(args, log):
            for name in {names}:
                os.write(1, args.pass_value(name).encode() + b" for you\\n")
        """)
    result = scratch.mission("run")
    assert result.out.count("*** for you") == 12
    assert "the-value-of" not in result.out


def test_pass_value_is_redacted_in_the_output_of_later_tasks(scratch, secrets):
    secrets.put("bank", SECRET)
    scratch.builtin("mine", """
        def run(args, log):
            args.pass_value("bank")
        """)
    scratch.task("next", f"cat {secrets.folder}/bank.value; exit 3")
    result = scratch.headless()
    assert result.code == 1 and "***" in scratch.log()
    assert leaks(scratch, result, SECRET) == []


def test_pass_value_is_the_first_line_of_the_output(scratch, secrets):
    secrets.put("bank", "hunter2hunter2\nurl: https://bank.example")
    scratch.builtin("mine", """
        def run(args, log):
            log("length %d" % len(args.pass_value("bank")))
        """)
    assert "length 14" in support.log_texts(scratch.mission("run").out)


def test_an_empty_value_redacts_nothing_in_the_log(scratch, secrets):
    secrets.put("bank", "")
    scratch.builtin("mine", """
        def run(args, log):
            try:
                args.pass_value("bank")
            except Exception:
                pass
            log("a line that is not touched")
        """)
    assert "a line that is not touched" in support.log_texts(
        scratch.mission("run").out)


def test_failure_of_passbin_fails_the_task_and_is_named(scratch, secrets):
    scratch.builtin("mine", """
        def run(args, log):
            args.pass_value("no-such-name")
        """)
    result = scratch.mission("run")
    assert result.code == 1 and "no-such-name" in result.out
