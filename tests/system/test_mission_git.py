"""git in a directory whose user can write all that git reads and runs.

Each planted program writes the user ID that it runs with to a file. That may
be the ID of alice, who could run the program anyway; it is never root's.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

import servers
import support
from support import (count_commits, git, is_alive, is_committed,
                     make_repository, must_git)

ALICE, MALLORY = support.ALICE_UID, support.MALLORY_UID


def trusting(folder: Path) -> dict[str, str]:
    """The environment of a git that trusts every directory. It reads a file:
    git before 2.35.3 takes safe.directory from no option."""
    folder.mkdir()
    (folder / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    return {"HOME": str(folder)}


class Spy:
    """Programs to plant, and what they record of themselves."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o1777)
        self.canary = folder / "canary"
        self.canary.touch()
        self.canary.chmod(0o666)
        # One passes on what it reads, as a filter must; the other ends.
        self.filter = self.program("filter", "exec cat")
        self.hook = self.program("hook", "exit 0")
        # Speaks gitprotocol-long-running-process, and can do nothing.
        self.process = self.program(
            "process", r"printf '0016git-filter-server\n000eversion=2\n'"
            "\nprintf 00000000\nexec cat > /dev/null")

    def program(self, name: str, rest: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\nid -u >> '{self.canary}'\n{rest}\n")
        path.chmod(0o755)
        return path

    def seen(self) -> set[str]:
        """The user ids that ran a planted program."""
        return set(self.canary.read_text().split())


@pytest.fixture
def spy(tmp_path, host):
    return Spy(tmp_path / "spy")


@pytest.fixture
def repo(alice, host):
    """alice's repository, which root's run gives to her and commits."""
    folder = make_repository(host.home["alice"] / "repo", ALICE)
    alice.config["storage"]["sync"] = {
        "path": str(folder), "chown": True, "commit": True}
    alice.task("one", 'date +%s.%N > "$SYNC_DIR/file"; umask 77\n'
               'date +%s.%N > "$SYNC_DIR/secret"')
    return folder


@pytest.fixture
def own(scratch):
    """A repository of the user that runs the test, and a run of that user."""
    folder = make_repository(scratch.folder / "repo")
    scratch.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    scratch.task("one", 'date +%s.%N > "$SYNC_DIR/file"')
    return folder


# What everyone gets ----------------------------------------------------------


@pytest.mark.parametrize("args, word", [
    (("run", "--headless"), "auto"), (("run",), "manual")])
def test_a_run_commits_everything_and_says_which_run_it_was(scratch, own,
                                                            args, word):
    (own / "new").mkdir()
    (own / "new" / "file").write_text("x")
    result = scratch.mission(*args)
    assert (result.code, result.err) == (0, ""), result
    assert count_commits(own) == 2 and is_committed(own)
    assert re.fullmatch(rf"{word} run complete on \d{{4}}-\d\d-\d\d "
                        r"\d\d:\d\d:\d\d", must_git(own, "log", "-1",
                                                    "--format=%B"))
    text = scratch.log() if word == "auto" else result.out
    marks = [re.split(r"\s+", line.split("] ", 1)[-1])[0]
             for line in text.splitlines() if line.startswith("[")]
    kept = [m for m in marks if m in ("RepoDir", "Status", "Add", "Commit")]
    assert kept == ["RepoDir", "Status", "Add", "Commit"]


def test_run_without_changes_makes_no_commit(scratch, own):
    scratch.task("none", ":")
    before = must_git(own, "rev-parse", "HEAD")
    result = scratch.mission("run", "-t", "none")
    assert result.code == 0 and "NoChanges" in result.out, result
    assert must_git(own, "rev-parse", "HEAD") == before


def test_a_deleted_file_is_committed_and_an_ignored_one_is_not(scratch, own):
    (own / ".gitignore").write_text("*.tmp\n")
    (own / "x.tmp").touch()
    scratch.task("away", 'rm "$SYNC_DIR/file"')
    assert scratch.mission("run", "-t", "away").code == 0
    assert must_git(own, "ls-files") == ".gitignore"


@support.root_only
def test_commit_without_a_git_identity_is_made_by_mission(alice, repo):
    result = alice.headless()
    assert result.code == 0, (result, alice.log())
    said = must_git(repo, "log", "-1", "--format=%an, %ae, %cn", uid=ALICE)
    assert re.fullmatch("mission, alice@.+, mission", said)


def test_commit_uses_the_git_identity_of_the_owner(scratch, own):
    must_git(own, "config", "user.name", "Someone Own")
    must_git(own, "config", "user.email", "own@example.com")
    assert scratch.mission("run").code == 0
    assert must_git(own, "log", "-1", "--format=%an <%ae>, %cn") \
        == "Someone Own <own@example.com>, Someone Own"


NAMES = [b"-rf", b":(exclude)*", b":!x", b"--pathspec-from-file=x", b"-", b"*",
         b" ", b"a\nb", b"\xff\xfe", b"caf\xe9", b"\x1b[2J", b'"', b"\\"]


def test_files_of_any_name_are_committed(scratch, own):
    for name in NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(own), name))).write_text("x")
    result = scratch.mission("run")
    assert result.code == 0, result
    listed = git(own, "ls-files", "-z").out.split("\0")
    assert set(map(os.fsdecode, NAMES)) < set(listed)
    assert is_committed(own)
    assert "\x1b" not in result.out


@pytest.mark.parametrize("name", ["-rf", "a b", ":(exclude)x", "$(id)", "ü"])
def test_a_storage_of_any_name_is_committed(scratch, name):
    folder = make_repository(scratch.folder / name)
    scratch.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    scratch.task("one", 'echo x > "$SYNC_DIR/new"')
    result = scratch.mission("run")
    assert result.code == 0, result
    assert count_commits(folder) == 2 and is_committed(folder)


@pytest.mark.parametrize("nested", ["with a commit", "empty"])
def test_nested_repository_gets_a_warning_that_names_it(scratch, own, nested):
    inner = own / "clone"
    if nested == "empty":
        inner.mkdir()
        must_git(inner, "init", "-q")
        (inner / "file").touch()
    else:
        make_repository(inner)
    result = scratch.mission("run")
    assert result.code == 1 and "clone" in result.out, result
    assert "# Warnings" in result.out or "# Errors" in result.out


def test_a_declared_submodule_is_not_a_warning(scratch, own):
    origin = make_repository(scratch.folder / "origin")
    must_git(own, "-c", "protocol.file.allow=always", "submodule", "--quiet",
             "add", str(origin), "sub")
    result = scratch.mission("run")
    assert result.code == 0, result


def test_a_worktree_whose_git_is_a_file_is_committed(scratch):
    main = make_repository(scratch.folder / "main")
    tree = scratch.folder / "tree"
    must_git(main, "worktree", "add", "-q", "-b", "side", str(tree))
    assert (tree / ".git").is_file()
    scratch.config["storage"]["sync"] = {"path": str(tree), "commit": True}
    scratch.task("one", 'echo x > "$SYNC_DIR/new"')
    result = scratch.mission("run")
    assert result.code == 0, result
    assert must_git(main, "rev-list", "--count", "side") == "2"
    assert is_committed(tree)


def test_missing_repository_is_an_error_and_is_not_created(scratch):
    folder = scratch.storage("sync", commit=True)
    scratch.task("one", ":")
    result = scratch.mission("run")
    assert result.code == 1 and "git init" in result.out, result
    assert "storage.sync.commit" in result.out
    assert list(folder.iterdir()) == []


# Programs that a repository can start ----------------------------------------


def set_config(*pairs: str, file: str = ".git/config"):
    """Plant values; a value that names a spy's program becomes its path."""
    def plant(folder: Path, spy: Spy) -> None:
        for key, value in zip(pairs[::2], pairs[1::2]):
            value = {"FILTER": str(spy.filter), "HOOK": str(spy.hook),
                     "PROCESS": str(spy.process),
                     "HOOKS": str(spy.folder / "hooks")}.get(value, value)
            must_git(folder, "config", "-f", str(folder / file), key, value,
                     uid=support.owner(folder))
    return plant


def hook(name: str):
    def plant(folder: Path, spy: Spy) -> None:
        path = folder / ".git" / "hooks" / name
        path.write_bytes(spy.hook.read_bytes())
        path.chmod(0o755)
    return plant


def hooks_path(folder: Path, spy: Spy) -> None:
    (spy.folder / "hooks").mkdir()
    path = spy.folder / "hooks" / "pre-commit"
    path.write_bytes(spy.hook.read_bytes())
    path.chmod(0o755)
    set_config("core.hooksPath", "HOOKS")(folder, spy)


def by_attributes(*pairs: str, file: str = ".gitattributes"):
    def plant(folder: Path, spy: Spy) -> None:
        set_config(*pairs)(folder, spy)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("* filter=x\n")
    return plant


def included(folder: Path, spy: Spy) -> None:
    set_config("core.fsmonitor", "HOOK", file=".git/more")(folder, spy)
    set_config("include.path", "more")(folder, spy)


def submodule(folder: Path, spy: Spy) -> None:
    origin = make_repository(folder.parent / "origin", ALICE)
    must_git(folder, "-c", "protocol.file.allow=always", "submodule",
             "--quiet", "add", str(origin), "sub", uid=ALICE)
    must_git(folder, "commit", "-q", "-m", "sub", uid=ALICE)
    set_config("core.fsmonitor", "HOOK",
               file=".git/modules/sub/config")(folder, spy)


def gc(folder: Path, spy: Spy) -> None:
    for text in ("a", "b"):
        (folder / "file").write_text(text)
        must_git(folder, "commit", "-q", "-a", "-m", text, uid=ALICE)
        must_git(folder, "repack", "-q", "-d", uid=ALICE)
    set_config("gc.autoPackLimit", "1", "gc.autoDetach", "false",
               "maintenance.strategy", "gc")(folder, spy)    # git 2.5x
    hook("pre-auto-gc")(folder, spy)


VECTORS = {
    **{f"hook {name}": hook(name) for name in (
        "pre-commit", "prepare-commit-msg", "commit-msg", "post-commit",
        "post-index-change", "reference-transaction")},
    "core.hooksPath": hooks_path,
    "core.fsmonitor": set_config("core.fsmonitor", "HOOK"),
    "fsmonitor by include.path": included,
    "fsmonitor of a submodule": submodule,
    "filter clean": by_attributes("filter.x.clean", "FILTER"),
    "filter process": by_attributes(
        "filter.x.process", "PROCESS"),
    "filter by info/attributes": by_attributes(
        "filter.x.clean", "FILTER", file=".git/info/attributes"),
    "gpg.program": set_config("commit.gpgSign", "true", "gpg.program",
                                 "HOOK"),
    "gc and pre-auto-gc": gc,
}


@support.root_only
@pytest.mark.parametrize("vector", VECTORS)
def test_no_planted_program_runs_as_root(alice, repo, spy, vector):
    VECTORS[vector](repo, spy)
    support.own(repo, ALICE)
    before = count_commits(repo, uid=ALICE)
    alice.env["SUDO_UID"] = alice.env["SUDO_GID"] = str(ALICE)
    result = alice.headless()
    assert spy.seen() <= {str(ALICE)}
    assert result.code == 0, (result, alice.log())
    assert count_commits(repo, uid=ALICE) == before + 1
    assert is_committed(repo, uid=ALICE)
    assert {support.owner(path) for path in repo.rglob("*")} == {ALICE}
    assert spy.seen() <= {str(ALICE)}


@support.root_only
@pytest.mark.parametrize("vector", VECTORS)
def test_naive_git_runs_the_planted_program_as_root(
        repo, spy, vector, tmp_path):
    careless = trusting(tmp_path / "trusting")
    VECTORS[vector](repo, spy)
    support.own(repo, ALICE)
    (repo / "file").write_text("changed")
    if (repo / "sub").exists():
        (repo / "sub" / "file").write_text("changed")
    for args in (("add", "-A"), ("commit", "-m", "x")):
        git(repo, *args, **careless)
    if "0" not in spy.seen():
        support.absent(f"{git(repo, 'version').out.strip()} does not run "
                       f"{vector}")


@support.root_only
def test_git_without_a_clean_environment_trusts_sudo_uid(repo, spy):
    hook("pre-commit")(repo, spy)
    (repo / "file").write_text("changed")
    git(repo, "commit", "-a", "-m", "x")
    assert spy.seen() == set()
    git(repo, "commit", "-a", "-m", "x", SUDO_UID=str(ALICE))
    if spy.seen() != {"0"}:
        support.absent("this git does not heed SUDO_UID")


@support.root_only
def test_git_variables_of_the_caller_do_not_reach_git(
        alice, repo, spy, tmp_path):
    elsewhere = make_repository(tmp_path / "elsewhere")
    trace = tmp_path / "trace"
    (spy.folder / "git-add").write_bytes(spy.hook.read_bytes())
    alice.env.update(
        GIT_DIR=str(elsewhere / ".git"), GIT_WORK_TREE=str(elsewhere),
        GIT_INDEX_FILE=str(tmp_path / "index"), GIT_CONFIG_COUNT="2",
        GIT_CONFIG_KEY_0="filter.x.clean", GIT_CONFIG_VALUE_0=str(spy.filter),
        GIT_CONFIG_KEY_1="core.fsmonitor", GIT_CONFIG_VALUE_1=str(spy.hook),
        GIT_CONFIG_PARAMETERS=f"'core.fsmonitor'='{spy.hook}'",
        GIT_SSH_COMMAND=str(spy.hook), GIT_EDITOR=str(spy.hook),
        GIT_EXTERNAL_DIFF=str(spy.hook), GIT_TRACE=str(trace),
        GIT_AUTHOR_NAME="Caller", GIT_COMMITTER_NAME="Caller",
        GIT_OBJECT_DIRECTORY=str(tmp_path), GIT_NAMESPACE="x",
        XDG_CONFIG_HOME=str(tmp_path), SUDO_UID=str(ALICE))
    (repo / ".gitattributes").write_text("* filter=x\n")
    result = alice.headless()
    assert result.code == 0, (result, alice.log())
    assert spy.seen() == set() and not trace.exists()
    assert count_commits(repo, uid=ALICE) == 2
    assert count_commits(elsewhere) == 1
    assert "Caller" not in must_git(repo, "log", "-1", "--format=%an %cn",
                                    uid=ALICE)


@support.root_only
def test_git_in_a_directory_that_others_can_write_is_skipped(
        alice, repo, spy, host):
    for folder, uid in (spy.folder, MALLORY), (host.home["mallory"], 0):
        fake = folder / "git"
        fake.write_bytes(spy.hook.read_bytes())
        fake.chmod(0o755)
        os.chown(fake, uid, uid)
    alice.env["PATH"] = f"{spy.folder}:{host.home['mallory']}:." \
        f":{alice.env['PATH']}"
    result = alice.headless()
    assert result.code == 0 and spy.seen() == set(), result
    assert count_commits(repo, uid=ALICE) == 2


@support.root_only
def test_git_uses_the_home_of_the_owner_and_nothing_of_root(
        alice, repo, spy, host):
    told = spy.folder / "told"
    spy.program("filter", f"env > '{told}'; id -G >> '{told}'; exec cat")
    by_attributes("filter.x.clean", "FILTER")(repo, spy)
    must_git(repo, "config", "-f", str(host.home["alice"] / ".gitconfig"),
             "user.name", "Alice of the Home", uid=ALICE)
    alice.env.update(SECRET_TOKEN="hush", HOME="/root")
    result = alice.headless()
    assert result.code == 0, (result, alice.log())
    lines = told.read_text().splitlines()
    assert f"HOME={host.home['alice']}" in lines
    assert lines[-1] == str(ALICE), "no group of root's"
    assert not [line for line in lines if "hush" in line or "SUDO" in line]
    assert "Alice of the Home" in must_git(repo, "log", "-1", "--format=%an",
                                           uid=ALICE)


# Where a repository can lead -------------------------------------------------


@pytest.fixture
def victims(tmp_path, host):
    """A directory of root's with a secret in it."""
    folder = tmp_path / "victims"
    folder.mkdir()
    (folder / "secret").write_text("hush hush")
    (folder / "secret").chmod(0o600)
    (folder / "open").write_text("hush hush")
    return folder


def all_intact(folder: Path, files=("secret", "open")) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(files) \
        and all(path.read_text() == "hush hush" and support.owner(path) == 0
                for path in folder.iterdir())


@support.root_only
def test_a_worktree_elsewhere_is_not_read(alice, repo, victims):
    victims.chmod(0o700)
    must_git(repo, "config", "core.worktree", str(victims), uid=ALICE)
    result = alice.headless()
    must_git(repo, "config", "--unset", "core.worktree", uid=ALICE)
    assert result.code == 1 and all_intact(victims), result
    assert "commitRepositories" in alice.log()
    everything = must_git(repo, "log", "--all", "-p", uid=ALICE)
    assert "hush" not in everything and "secret" not in everything


@support.root_only
@pytest.mark.parametrize("name", [
    "logs/HEAD", "COMMIT_EDITMSG", "index", "index.lock", "HEAD",
    "refs/heads/main", "objects", "hooks"])
def test_symbolic_link_inside_dot_git_changes_no_file_of_root(
        alice, repo, victims, name):
    path = repo / ".git" / name
    if path.is_dir():
        path.rename(path.with_name("away"))
    elif path.exists():
        path.unlink()
    path.symlink_to(victims if name in ("objects", "hooks")
                    else victims / "open")
    os.utime(path, (0, 0), follow_symlinks=False)
    support.own(repo, ALICE)
    result = alice.headless()
    assert all_intact(victims)
    assert support.owner(victims) == 0
    assert result.code in (0, 1) and "Traceback" not in result.err, result


@support.root_only
@pytest.mark.parametrize("target", ["an empty folder", "a repository"])
def test_dot_git_that_leads_to_a_directory_of_root_is_refused(
        alice, repo, victims, tmp_path, target):
    if target == "a repository":
        theirs = make_repository(tmp_path / "theirs")
        where = theirs / ".git"
    else:
        where = victims
    (repo / ".git").rename(repo.parent / "away")
    (repo / ".git").symlink_to(where)
    os.chown(repo / ".git", ALICE, ALICE, follow_symlinks=False)
    result = alice.headless()
    assert result.code in (1, 78) and len(result.err) > 10, result
    assert all_intact(victims)
    if target == "a repository":
        assert count_commits(theirs) == 1 and is_committed(theirs)


MIXED = {
    # Where the repository is, and who owns or may write what in it.
    "top root's, .git alice's": ("alice", {".": 0}),
    "top alice's, config root's": ("alice", {".git/config": 0}),
    "top alice's, config mallory's": ("alice", {".git/config": MALLORY}),
    "top alice's, an object root's": ("alice", {".git/objects/OBJECT": 0}),
    "top alice's, hooks mallory's": ("alice", {".git/hooks": MALLORY}),
    "root's, config alice's": ("root", {".git/config": ALICE}),
    "root's, .git alice's": ("root", {".git": ALICE}),
    "root's, attributes alice's": ("root", {".git/info": ALICE}),
    "root's, config for a group": ("root", {".git/config": 0o664}),
    "root's, .git for a group": ("root", {".git": 0o775}),
    "root's, hooks for a group": ("root", {".git/hooks": 0o775}),
    "root's, config for everyone": ("root", {".git/config": 0o666}),
    "root's, .git for everyone": ("root", {".git": 0o777}),
    "root's, info sticky": ("root", {".git/info": 0o1777}),
    "root's, top for a group": ("root", {".": 0o775}),
    "root's, a folder of alice's": ("root", {"sub": ALICE}),
    "root's, below alice's home": ("home", {}),
}


@support.root_only
@pytest.mark.parametrize("case", MIXED)
def test_repository_with_mixed_owners_is_refused_and_named(
        alice, host, spy, case):
    """Modes are those of files of root's with alice's group."""
    place, changes = MIXED[case]
    uid = ALICE if place == "alice" else None
    folder = make_repository((alice.folder if place == "root"
                           else host.home["alice"]) / "repo", uid)
    if "sub" in changes:
        make_repository(folder / "sub")
    by_attributes("filter.x.clean", "FILTER")(folder, spy)
    support.own(folder, uid or 0)
    for name, change in changes.items():
        obj = must_git(folder, "rev-parse", "HEAD", uid=uid)
        path = folder / name.replace("OBJECT", f"{obj[:2]}/{obj[2:]}")
        if change in (0, ALICE, MALLORY):
            os.chown(path, change, change)
        else:
            os.chown(path, 0, ALICE)
            path.chmod(change)
    alice.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert "0" not in spy.seen()
    assert result.code == 1, (result, alice.log())
    named = [folder / name for name in changes] or [host.home["alice"]]
    assert "OBJECT" in str(named) or str(named[0]) in alice.log()


@support.root_only
def test_repository_of_root_is_committed_as_root(alice):
    folder = make_repository(alice.folder / "repo")
    alice.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert (result.code, result.err) == (0, ""), (result, alice.log())
    assert count_commits(folder) == 2 and is_committed(folder)


@support.root_only
def test_chown_gives_files_of_root_in_a_repository_to_the_user(
        alice, repo, tmp_path):
    """As after a `sudo git commit`, or a run without chown."""
    must_git(repo, "commit", "-q", "--allow-empty", "-m", "by root",
             **trusting(tmp_path / "trusting"))
    assert 0 in {support.owner(path) for path in repo.rglob("*")}
    result = alice.headless()
    assert result.code == 0, (result, alice.log())
    assert count_commits(repo, uid=ALICE) == 3
    assert is_committed(repo, uid=ALICE)


@support.root_only
def test_owners_are_checked_during_the_walk_of_chown(alice, repo):
    """git's directory is walked once more only for what chown left."""
    walked = alice.folder / "walked"
    alice.patch(f"""
        look_up = k.Repository.look_up
        def count(self, function, *arguments):
            if function is k.untrusted_entry:
                open({str(walked)!r}, "w").close()
            return look_up(self, function, *arguments)
        k.Repository.look_up = count
        """)
    result = alice.headless()
    assert result.code == 0 and not walked.exists(), (result, alice.log())
    other = repo / ".git" / "objects" / "hard"
    other.touch()
    os.chown(other, MALLORY, MALLORY)
    os.link(other, repo.parent / "hard")
    again = alice.headless()
    assert again.code == 1 and walked.exists(), again
    assert f"{other} belongs to" in alice.log()


@support.root_only
def test_dot_git_that_becomes_a_fifo_does_not_block_the_run(alice, repo):
    alice.task("away", 'mv "$SYNC_DIR/.git" "$SYNC_DIR/../away"\n'
               'mkfifo "$SYNC_DIR/.git"')
    result = alice.headless(timeout=60)
    assert result.code == 1 and "Traceback" not in alice.log(), result


# Where a repository of another user leads root -------------------------------


@pytest.fixture
def secret(victims):
    """A file of root's in the form of a .git file, and what is in it."""
    words = ("root:SECRET:1", "gitdir: /root/SECRET")
    for number, text in enumerate(words):
        (victims / f"secret{number}").write_text(text + "\n")
        (victims / f"secret{number}").chmod(0o600)
    (victims / "tree").mkdir()
    (victims / "tree" / "SECRET.lock").touch()
    victims.chmod(0o711)
    (victims / "tree").chmod(0o700)
    return victims


LEADS = {
    # what `.git`, or a file in it, becomes; SECRETS is the directory of root's
    "a link to a file": (".git", "link", "SECRETS/secret0"),
    "a link to a git file": (".git", "link", "SECRETS/secret1"),
    "a link to a directory": (".git", "link", "SECRETS/tree"),
    "a link to /root": (".git", "link", "/root"),
    "a hard link": (".git", "hard", "SECRETS/secret1"),
    "a file to a directory": (".git", "text", "gitdir: SECRETS/tree"),
    "a file to /root": (".git", "text", "gitdir: /root"),
    "a file that is none": (".git", "text", "root:SECRET:1"),
    "commondir is a link": (".git/commondir", "link", "SECRETS/secret0"),
    "commondir to a directory": (".git/commondir", "text", "SECRETS/tree"),
    "refs is a link": (".git/refs", "link", "SECRETS/tree"),
    "HEAD is a link": (".git/HEAD", "link", "SECRETS/secret0"),
    "config is a link": (".git/config", "link", "SECRETS/secret0"),
    "config includes": (".git/config", "text",
                        "[include]\n\tpath = SECRETS/secret0\n"),
    "alternates": (".git/objects/info/alternates", "text", "SECRETS/tree"),
    "alternates is a link": (".git/objects/info/alternates", "link",
                             "SECRETS/secret0"),
    "index is a link": (".git/index", "link", "SECRETS/secret0"),
    "attributes is a link": (".git/info/attributes", "link",
                             "SECRETS/secret0"),
    "objects is a link": (".git/objects", "link", "SECRETS/tree"),
}


def lead(repo: Path, secret: Path, kind: str, name: str, target: str) -> None:
    path, target = repo / name, target.replace("SECRETS", str(secret))
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        path.rename(repo.parent / "away")
    if kind == "link":
        path.symlink_to(target)
    elif kind == "hard":
        os.link(target, path)
    else:
        path.write_text(target + "\n")
    if kind != "hard":
        os.chown(path, ALICE, ALICE, follow_symlinks=False)


@support.root_only
@pytest.mark.parametrize("case", LEADS)
@pytest.mark.parametrize("chown", [False, True], ids=["commit", "chown"])
def test_repository_reveals_no_content_of_root(
        alice, repo, secret, case, chown):
    name, kind, target = LEADS[case]
    support.own(repo, ALICE)
    lead(repo, secret, kind, name, target)
    alice.config["trust"] = "root"
    alice.config["storage"]["sync"]["chown"] = chown
    mails = alice.keep_mail(start=False)
    alice.config["tasks"] = []
    alice.task("one", ":")
    check = alice.mission("check")
    run = alice.headless(timeout=90)
    assert "Traceback" not in alice.log(), alice.log()
    (mail,) = mails.iterdir()
    hidden = os.path.expanduser("~root/.")
    for text in (check.err, run.err, run.out, alice.log(), mail.read_text()):
        assert "SECRET" not in text and hidden not in text, text
    assert sorted(path.name for path in (secret / "tree").iterdir()) \
        == ["SECRET.lock"]
    assert {support.owner(path) for path in secret.rglob("*")} == {0}


CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(.*)")
OPENS_DIRECTORY = re.compile(r"O_DIRECTORY|O_PATH")


def calls_of_root(trace: str) -> list[str]:
    """The lines of `strace -f` of processes that are root's at the time."""
    calls = [found.groups() for found in map(CALL.match, trace.splitlines())
             if found]
    parents = {rest.rpartition("= ")[2].split("<")[0]: pid
               for pid, name, rest in calls
               if "fork" in name or "clone" in name}
    became_alice = {pid for pid, name, rest in calls if name.startswith("set")
                    and rest.startswith(f"({ALICE}")}
    lines, alices = [], set()
    for pid, name, rest in calls:
        if name.startswith("set") and rest.startswith(f"({ALICE}"):
            alices.add(pid)
        parent = parents.get(pid)
        while parent and parent not in became_alice:
            parent = parents.get(parent)
        if pid not in alices and not parent:
            lines.append(f"{pid} {name}{rest}")
    return lines


@support.root_only
@pytest.mark.parametrize("chown", [False, True], ids=["commit", "chown"])
def test_root_opens_no_file_in_a_repository_of_alice(
        alice, repo, chown, tmp_path):
    """chown opens directories, and descriptors that cannot read; commit
    opens the storage alone, to see whose it is."""
    support.need("strace")
    tree = repo.parent / "tree"
    must_git(repo, "worktree", "add", "-q", "-b", "side", str(tree),
             uid=ALICE)
    (repo / ".git" / "index.lock").touch()
    os.utime(repo / ".git" / "index.lock", (0, 0))
    for place in (repo, tree):
        (place / "new").write_text("x")
        support.own(place, ALICE)
    alice.config["storage"]["sync"]["chown"] = chown
    alice.config["storage"]["side"] = {"path": str(tree), "chown": chown,
                                       "commit": True}
    alice.config["tasks"] = []
    alice.task("one", ":")
    alice.write()
    command, trace = alice.command("run", "--headless"), tmp_path / "trace"
    at = command.index(support.PYTHON)
    done = subprocess.run(
        [*command[:at], "strace", "-f", "-y", "-o", str(trace), "-e",
         "trace=open,openat,execve,readlink,readlinkat,unlink,unlinkat,"
         "rename,setuid,setresuid,setreuid,fork,vfork,clone,clone3",
         *command[at:]], env=alice.env, cwd=str(alice.folder), timeout=120,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    assert done.returncode == 0, (done, alice.log())
    assert count_commits(repo, uid=ALICE) == 2, alice.log()
    tops = tuple(f"<{place}>" for place in (repo, tree))
    found = [line for line in calls_of_root(trace.read_text())
             if str(repo) in line or str(tree) in line]
    assert [line for line in found if not (
        OPENS_DIRECTORY.search(line)
        and (chown or line.endswith(tops)))] == []
    assert len(found) > 1       # the storages themselves


READS = {
    # what root's own repository reads from a directory of alice's, as
    # (place, text); HERS is a file in that directory
    "an included file": (".git/config", "[include]\n\tpath = HERS\n"),
    "a file included on a condition": (
        ".git/config", '[includeIf "gitdir:/"]\n\tpath = HERS\n'),
    "an included file that is missing": (
        ".git/config", "[include]\n\tpath = HERS.none\n"),
    "attributes": (".git/config", "[core]\n\tattributesFile = HERS\n"),
    "a list to ignore": (".git/config", "[core]\n\texcludesFile = HERS\n"),
    "objects": (".git/objects/info/alternates", "HERS/.git/objects\n"),
    "root's own configuration": ("ROOT/.gitconfig", None),
    "root's own attributes": ("ROOT/.config/git/attributes", None),
    "root's configuration includes": (
        "ROOT/.gitconfig", "[include]\n\tpath = HERS\n"),
}


@support.root_only
@pytest.mark.parametrize("case", READS)
@pytest.mark.parametrize("owner", [ALICE, 0], ids=["alice's", "root's"])
def test_root_commits_only_if_git_reads_only_files_of_root(
        alice, host, case, owner):
    place, text = READS[case]
    root = alice.make("roothome")
    passwd = host.folder / "passwd"
    passwd.write_text(re.sub(r"^(root:.*?):[^:]*:([^:]*)$", rf"\1:{root}:\2",
                             passwd.read_text(), flags=re.M))
    folder = make_repository(alice.folder / "repo")
    hers = (host.home["alice"] if owner else alice.folder) / "hers"
    if "HERS/" in (text or ""):
        make_repository(hers, owner)
    else:
        hers.touch()
        os.chown(hers, owner, owner)
    path = Path(place.replace("ROOT", str(root))) if "ROOT" in place \
        else folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.symlink_to(hers)
    else:
        with open(path, "a") as file:
            file.write(text.replace("HERS", str(hers)))
    alice.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert (result.code == 0) == (owner == 0), (result, alice.log())
    assert count_commits(folder) == (1 if owner else 2), alice.log()
    assert not owner or str(host.home["alice"]) in alice.log()


@support.root_only
@pytest.mark.parametrize("name", [".git/config", ".git/info", "sub", "."])
@pytest.mark.parametrize("kind", ["access", "default"])
def test_root_commits_nothing_that_an_access_list_lets_alice_write(
        alice, name, kind):
    folder = make_repository(alice.folder / "repo")
    (folder / "sub").mkdir()
    (folder / ".git/info").mkdir(exist_ok=True)
    if kind == "default" and not (folder / name).is_dir():
        name = ".git"
    support.set_acl(folder / name, (support.ACL_USER, 7, ALICE), kind=kind)
    alice.config["storage"]["sync"] = {"path": str(folder), "commit": True}
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert result.code == 1 and "alice" in alice.log(), (result, alice.log())
    assert str((folder / name).resolve()) in alice.log()
    assert count_commits(folder) == 1


def test_repository_above_the_storage_is_not_committed(scratch):
    outer = make_repository(scratch.folder / "outer")
    inner = outer / "inner"
    (inner / ".git").mkdir(parents=True)
    scratch.config["storage"]["sync"] = {"path": str(inner), "commit": True}
    scratch.task("one", 'echo x > "$SYNC_DIR/new"')
    result = scratch.mission("run")
    assert result.code == 1 and f"{inner}/.git" in result.out, result
    assert count_commits(outer) == 1


@support.root_only
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_files_the_owner_cannot_read_are_named_with_the_fix(alice, repo,
                                                             kind):
    """As root stores it without chown. git passes over such a directory."""
    alice.config["storage"]["sync"]["chown"] = False
    alice.config["tasks"] = []
    alice.task("one", 'umask 77; cd "$SYNC_DIR"; '
               + ("echo x > dump.sql" if kind == "file" else
                  "mkdir dump.sql; echo x > dump.sql/x"))
    result = alice.headless()
    assert result.code == 1, result
    (problem,) = [line for line in alice.log().splitlines()
                  if "ERROR: " in line or "WARN: " in line]
    assert f"{repo}/dump.sql" in problem and '"chown": true' in problem


# The log's list of changes ---------------------------------------------------


def test_log_lists_each_changed_file_once(scratch, own):
    (own / "gone").write_text("x")
    must_git(own, "add", "-A")
    must_git(own, "commit", "-q", "-m", "second")
    scratch.task("all", 'cd "$SYNC_DIR"; rm gone; mkdir "sub"; echo 1 > file\n'
                 "echo x > 'sub/a new\nfile'")
    result = scratch.mission("run", "-t", "all")
    assert result.code == 0, result
    lines = support.log_texts(support.log_section(result.out, "Commit"))
    at = lines.index("Status")
    assert lines[at + 1:at + 5] == [
        "M  file", "D  gone", r"A  sub/a new\x0afile", "Add"]


def test_a_long_list_of_changes_is_cut_and_counted(scratch, own):
    scratch.task("many", 'cd "$SYNC_DIR"; touch $(seq 1500)')
    result = scratch.mission("run", "-t", "many")
    assert result.code == 0, result
    texts = support.log_texts(result.out)
    assert len([text for text in texts if text.startswith("A  ")]) == 1000
    assert "and 500 more" in texts


# Packing ---------------------------------------------------------------------


def fill(scratch, folder: Path, **config: str) -> None:
    """A task whose files make `git gc --auto` pack, by its estimate from the
    directory objects/17; and git's configuration."""
    contents = (f"{number}\n".encode() for number in range(100_000))
    chosen = [data for data in contents if hashlib.sha1(
        b"blob %d\0" % len(data) + data).hexdigest().startswith("17")][:3]
    lines = [f"printf '{data.decode().strip()}\\n' > \"$SYNC_DIR/{number}\""
             for number, data in enumerate(chosen)]
    scratch.config["tasks"] = []
    scratch.task("fill", "\n".join(lines))
    for key, value in {"auto": "1", **config}.items():
        must_git(folder, "config", f"gc.{key}", value,
                 uid=support.owner(folder) if support.AS_ROOT else None)


def loose_objects(folder: Path) -> int:
    return sum(len(list(place.iterdir())) for place in
               (folder / ".git/objects").glob("??"))


@support.root_only
def test_large_repository_is_packed_by_its_owner_after_the_mail(alice, repo):
    alice.keep_mail(start=False)
    fill(alice, repo)
    with servers.Web() as web:
        alice.config["ping"] = {"enabled": True, "endpoint": web.url}
        result = alice.headless()
    assert (result.code, result.err) == (0, ""), alice.log()
    assert loose_objects(repo) == 0, alice.log()
    assert {support.owner(path) for path in repo.rglob("*")} == {ALICE}
    titles = support.log_titles(alice.log())
    assert titles[-3:] == ["Mail", "Ping", "Pack"]
    assert f"Packed {repo} in " in alice.log()
    assert is_committed(repo, uid=ALICE)


def test_small_repository_is_not_packed(scratch, own):
    result = scratch.mission("run")
    assert result.code == 0 and "Pack" not in result.out, result
    assert loose_objects(own) > 0


def test_failed_packing_is_only_a_line_in_the_log(scratch, own):
    fill(scratch, own, pruneExpire="nonsense")
    result = scratch.headless()
    assert (result.code, result.err) == (0, ""), result
    assert f"PackFailure {own}: git gc: exit" in scratch.log()
    assert scratch.history()[-1]["result"] == "ok"
    assert count_commits(own) == 2


def test_signal_ends_the_packing_and_the_run_stays_successful(scratch, own):
    """A run that is killed while it packs has finished its work."""
    fill(scratch, own)
    pid, git = scratch.folder / "pid", support.find("git")
    os.mkfifo(scratch.folder / "gate")
    stand_in = scratch.stand_in("git", f"""
        case "$*" in *" gc "*) ;; *) exec {git} "$@" ;; esac
        echo $$ > '{pid}.new'; mv '{pid}.new' '{pid}'
        read x < '{scratch.folder}/gate'""")
    run = scratch.start("run", "--headless")
    support.wait_until(pid.exists, 30, "git gc")
    assert scratch.history()[-1]["result"] == "ok"
    run.terminate()
    result = support.ended(run)
    assert result.code == 0, result
    assert not is_alive(int(pid.read_text()))
    stand_in.unlink()
    assert scratch.mission("run").code == 0


# Locks that were left --------------------------------------------------------


@support.root_only
@pytest.mark.parametrize("name", [
    "index.lock", "HEAD.lock", "refs/heads/main.lock", "config.lock",
    "packed-refs.lock"])
def test_old_git_lock_is_removed_and_all_files_are_committed(
        alice, repo, name):
    lock = repo / ".git" / name
    lock.touch()
    os.chown(lock, ALICE, ALICE)
    os.utime(lock, (0, 0))
    result = alice.headless()
    assert result.code == 0, (result, alice.log())
    assert not lock.exists() and str(lock) in alice.log()
    assert count_commits(repo, uid=ALICE) == 2
    assert is_committed(repo, uid=ALICE)


@support.root_only
@pytest.mark.parametrize("name", ["index.lock", "$(touch ran).lock"])
def test_recent_git_lock_of_an_unknown_process_is_kept_and_named(
        alice, repo, name):
    lock = repo / ".git" / name
    lock.touch()
    os.chown(lock, ALICE, ALICE)
    minute_ago = time.time() - 60
    os.utime(lock, (minute_ago, minute_ago))
    result = alice.headless(timeout=120)
    assert result.code == 1 and lock.exists(), result
    assert (f"(once no git is running there: rm {shlex.quote(str(lock))})"
            in alice.log())
    assert count_commits(repo, uid=ALICE) == 1


@support.root_only
def test_commit_waits_for_a_running_git(alice, repo, tmp_path):
    """alice's own commit holds index.lock while her editor is open."""
    ready, gate = repo.parent / "ready", repo.parent / "gate"
    os.mkfifo(gate)
    os.chown(gate, ALICE, ALICE)
    editor = repo.parent / "editor"
    editor.write_text(f"#!/bin/sh\ntouch '{ready}'\nread x < '{gate}'\n"
                      'echo by hand > "$1"\n')
    editor.chmod(0o755)
    (repo / "file").write_text("mine")
    support.own(repo, ALICE)
    by_hand = subprocess.Popen(
        ["git", "-C", str(repo), "commit", "-q", "-a"], user=ALICE,
        group=ALICE, extra_groups=[], stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": "/",
             "GIT_EDITOR": str(editor), **support.GIT_IDENTITY})
    with support.stopping(by_hand):
        support.wait_until(ready.exists, 30, "the editor")
        assert (repo / ".git" / "index.lock").exists()
        run = alice.start("run", "--headless")
        support.wait_until(lambda: alice.log_files()
                           and "RepoDir" in alice.log(), 30, "the commit")
        gate.write_text("\n")
        result = support.ended(run)
        assert by_hand.wait(timeout=30) == 0
    assert result.code == 0, (result, alice.log())
    assert count_commits(repo, uid=ALICE) == 3
    assert is_committed(repo, uid=ALICE)


@pytest.fixture
def slow(repo, spy):
    """A filter that waits while its gate exists, and the user that runs it."""
    gate, pids = spy.folder / "gate", spy.folder / "pids"
    spy.program("filter", f"if [ -e '{gate}' ]; then\n"
                f"  echo $PPID $$ > '{pids}.new'; mv '{pids}.new' '{pids}'\n"
                "  exec sleep 100\nfi\nexec cat")
    by_attributes("filter.x.clean", "FILTER")(repo, spy)
    gate.touch()
    return gate, pids


def in_filter(pids: Path) -> tuple[int, int]:
    """Wait for the filter; the pids of git and of the filter."""
    support.wait_until(pids.exists, 30, "the filter")
    parent, filter_ = map(int, pids.read_text().split())
    assert Path(f"/proc/{parent}/comm").read_text().strip() == "git"
    pids.unlink()
    return parent, filter_


@support.root_only
def test_locks_of_a_killed_git_do_not_stop_the_next_run(alice, repo, slow):
    """Whether this run tries once more or not: git is killed each time."""
    gate, pids = slow
    run = alice.start("run", "--headless")
    while run.poll() is None:
        git_pid, filter_pid = in_filter(pids)
        assert (repo / ".git" / "index.lock").exists()
        os.kill(git_pid, signal.SIGKILL)
        support.wait_until(lambda: pids.exists() or run.poll() is not None,
                           30, "the end of the run")
        assert not is_alive(filter_pid)
    result = support.ended(run)
    assert result.code == 1 and "commitRepositories" in alice.log(), result
    gate.unlink()
    again = alice.headless()
    assert again.code == 0, (again, alice.log())
    assert count_commits(repo, uid=ALICE) == 2
    assert is_committed(repo, uid=ALICE)


@support.root_only
def test_locks_of_a_killed_runner_and_git_do_not_stop_the_next_run(
        alice, repo, slow):
    gate, pids = slow
    run = alice.start("run", "--headless")
    git_pid, filter_pid = in_filter(pids)
    run.kill()
    os.kill(git_pid, signal.SIGKILL)
    os.kill(filter_pid, signal.SIGKILL)
    support.ended(run)
    gate.unlink()
    assert (repo / ".git" / "index.lock").exists()
    again = alice.headless()
    last = alice.history()[-1]
    assert (last["errors"], last["warnings"]) == (0, 1), alice.log()
    assert again.code == 1, "the lost run is a warning"
    assert count_commits(repo, uid=ALICE) == 2
    assert is_committed(repo, uid=ALICE)


@support.root_only
def test_lock_that_is_a_symbolic_link_removes_no_file_of_root(
        alice, repo, victims):
    lock = repo / ".git" / "refs" / "heads" / "main.lock"
    lock.symlink_to(victims / "open")
    os.utime(lock, (0, 0), follow_symlinks=False)
    (repo / ".git" / "refs" / "tags" / "deep").symlink_to(victims)
    support.own(repo, ALICE)
    alice.headless()
    assert all_intact(victims)
    assert stat.S_ISDIR(os.lstat(victims).st_mode)
