"""Plan: what will this run do, in order?"""

from __future__ import annotations

import pytest

import support

mission = support.load("mission")


def config(*tasks: dict, storage=(), **sections):
    """A configuration of these tasks, as a run would have it."""
    import json
    folders = {"tasks": {"path": "/t"}, "logs": {"path": "/l"},
               **{name: {"path": f"/{name}", "chown": True, "commit": True}
                  for name in storage}}
    text = json.dumps({
        "tasks": [{"type": "exec", "scheduled": True, **task}
                  for task in tasks],
        "user": {"name": "anon", "email": "anon@example.com"},
        "storage": folders, **sections})
    reader = mission.ConfigReader(text, "/etc/mission/m.json")
    found = mission.resolved(reader.config(), {"anon": "/home/anon"}.get,
                             reader.diagnostics)
    assert reader.diagnostics.found == []
    return found


def task(slug: str, **options) -> dict:
    return {"slug": slug, **options}


def words(steps) -> list[str]:
    """chown:sync, task:a+b, finish ..."""
    return [f"{step.kind}:{step.storage.name}" if step.storage else
            f"task:{'+'.join(one.slug for one in step.tasks)}"
            if step.tasks else step.kind for step in steps]


ALL = {"ping": {"enabled": True, "endpoint": "https://x", "start": True},
       "notify": {"enabled": True}, "mail": {"enabled": True}}


def test_headless_run_has_every_step_in_the_documented_order():
    plan = mission.plan(config(task("a"), task("z", post=True), task("b"),
                               storage=["sync"], **ALL), [], True)
    assert words(plan) == [
        "start", "outbox", "mail_start", "ping_start", "notify_start",
        "task:a", "task:b", "chown:sync", "commit:sync", "task:z", "finish",
        "notify_finish", "summary", "keep_records",
        "mail_finish", "ping_finish", "pack:sync"]


def test_a_run_by_hand_neither_mails_nor_pings():
    plan = mission.plan(config(task("a"), **ALL), [], False)
    assert words(plan) == ["start", "notify_start", "task:a", "finish",
                           "notify_finish", "summary", "keep_records"]


def test_option_quiet_removes_only_the_notifications():
    plan = words(mission.plan(config(task("a"), **ALL), [], True, True))
    loud = words(mission.plan(config(task("a"), **ALL), [], True))
    assert plan == [word for word in loud if not word.startswith("notify")]


@pytest.mark.parametrize("mail, there, gone", [
    ({}, {"outbox", "mail_start", "mail_finish"}, set()),
    ({"start": False}, {"outbox", "mail_finish"}, {"mail_start"}),
    ({"on": "failure"}, {"outbox", "mail_finish"}, {"mail_start"}),
    ({"on": "never"}, set(), {"mail_start", "mail_finish"}),
    ({"enabled": False}, set(), {"outbox", "mail_start", "mail_finish"}),
])
def test_mail_is_planned_according_to_mail_on(mail, there, gone):
    plan = words(mission.plan(config(
        task("a"), mail={"enabled": True, **mail}), [], True))
    assert there <= set(plan) and not gone & set(plan)


def test_all_chowns_come_before_all_commits():
    plan = words(mission.plan(config(task("a"), storage=["x", "b"]), [],
                              False))
    assert plan[2:6] == ["chown:b", "chown:x", "commit:b", "commit:x"]


def test_run_of_only_post_tasks_neither_chowns_nor_commits():
    both = config(task("a"), task("z", post=True), storage=["sync"])
    assert words(mission.plan(both, ["z"], False)) == [
        "start", "task:z", "finish", "summary", "keep_records"]
    assert "commit:sync" in words(mission.plan(both, ["a"], False))


# --- which tasks ----------------------------------------------------------


def slugs(found) -> list[str]:
    return [one.slug for one in found]


TASKS = config(task("a"), task("b", scheduled=False), task("c"))


@pytest.mark.parametrize("asked, found", [
    ([], ["a", "c"]), (["b"], ["b"]), (["c", "a"], ["c", "a"]),
    (["a", "b", "a"], ["a", "b"]),
])
def test_scheduled_tasks_or_those_of_option_t_run_in_order(asked, found):
    assert slugs(mission.select_tasks(TASKS, asked)) == found


@pytest.mark.parametrize("asked, hint", [
    (["phots"], "photos"), (["photos", "nothing-like-it"], "mission list"),
    ([""], "mission list"), (["Photos"], "photos"), (["\x1b[2J"], ""),
])
def test_an_unknown_slug_is_wrong_usage_and_names_the_nearest(asked, hint):
    with pytest.raises(mission.Error) as caught:
        mission.select_tasks(config(task("photos"), task("mail")), asked)
    assert caught.value.status == mission.EXIT_USAGE
    assert hint in caught.value.hint
    assert mission.escape_controls(caught.value.message) \
        == caught.value.message


def test_a_run_without_a_scheduled_task_is_wrong_usage():
    with pytest.raises(mission.Error) as caught:
        mission.select_tasks(config(task("a", scheduled=False)), [])
    assert caught.value.status == mission.EXIT_USAGE


# --- needs and parallel ---------------------------------------------------


@pytest.mark.parametrize("needs, found", [
    ({}, "abcd"), ({"a": "d"}, "dabc"), ({"a": "c", "c": "b"}, "bcad"),
    ({"b": "ac", "a": "d"}, "dacb"),
])
def test_needed_tasks_come_before_the_task(needs, found):
    tasks = config(*(task(slug, needs=[*needs.get(slug, "")])
                     for slug in "abcd"))
    assert "".join(slugs(mission.select_tasks(tasks, []))) == found


@pytest.mark.parametrize("asked, found", [
    ([], "nmb"), (["b"], "nmb"), (["a"], "a"), (["a", "b"], "anmb"),
    (["b", "n"], "nmb")])
def test_needed_task_is_run_even_if_it_is_not_scheduled(asked, found):
    tasks = config(
        task("n", scheduled=False), task("m", scheduled=False, needs=["n"]),
        task("a", scheduled=False), task("b", needs=["m"]))
    assert "".join(slugs(mission.select_tasks(tasks, asked))) == found


def test_a_long_chain_of_needs_is_planned():
    chain = [task(f"t{number}", needs=[f"t{number + 1}"])
             for number in range(1200)] + [task("t1200")]
    try:
        found = slugs(mission.select_tasks(config(*chain), []))
    except RecursionError:
        found = "a traceback of a thousand lines"
    assert found == [f"t{number}" for number in range(1200, -1, -1)]


@pytest.mark.parametrize("groups, needs, found", [
    (["", "", ""], {}, ["a", "b", "c"]),
    (["g", "g", "g"], {}, ["a+b+c"]), (["g", "g", ""], {}, ["a+b", "c"]),
    (["g", "", "g"], {}, ["a", "b", "c"]),
    (["g", "h", "h"], {}, ["a", "b+c"]),
    (["g", "g", "g"], {"b": "a"}, ["a", "b+c"]),
    (["g", "g", "g"], {"c": "a"}, ["a+b", "c"]),
])
def test_adjacent_tasks_of_a_group_run_in_parallel(groups, needs, found):
    plan = mission.plan(config(*(
        task(slug, parallel=group, needs=[*needs.get(slug, "")])
        for slug, group in zip("abc", groups))), [], False)
    assert [word.removeprefix("task:") for word in words(plan)
            if word.startswith("task:")] == found


def test_a_post_task_of_a_group_does_not_join_the_others():
    plan = words(mission.plan(config(
        task("a", parallel="g"), task("z", parallel="g", post=True),
        task("b", parallel="g")), [], False))
    assert plan[1:3] == ["task:a+b", "task:z"]


@pytest.mark.parametrize("outcomes, blocker", [
    ({}, "a"), ({"a": "ok", "b": "ok"}, ""), ({"a": "failed"}, "a"),
    ({"a": "ok", "b": "skipped"}, "b"), ({"a": "ok"}, "b"),
    ({"a": "ok", "b": "ok", "c": "failed"}, ""),
])
def test_task_is_blocked_by_a_needed_task_that_did_not_succeed(outcomes,
                                                                blocker):
    one = config(task("a"), task("b"), task("x", needs=["a", "b"])).tasks[2]
    assert mission.blocked_by(one, outcomes) == blocker


# --- --dry-run ------------------------------------------------------------


def test_every_step_has_a_description_and_a_method():
    found = config(task("a", parallel="g"), task("b", parallel="g"),
                   {"slug": "c", "type": "builtin"}, task("z", post=True),
                   storage=["sync"], **ALL)
    plan = mission.plan(found, [], True)
    for step in plan:
        assert mission.step_text(step, found)
        assert callable(getattr(mission.Runner, step.kind))
    texts = [mission.step_text(step, found) for step in plan]
    assert "run side by side: a (/t/a/run), b (/t/b/run)" in texts
    assert "run the task c (built in)" in texts
    assert "run the post task z (/t/z/run)" in texts
    assert "chown /sync to anon" in texts and "commit /sync" in texts
    assert "mail anon@example.com: run started" in texts


def test_steps_skipped_after_a_signal_exist():
    found = config(task("a"), storage=["sync"], **ALL)
    kinds = {step.kind for step in mission.plan(found, [], True)}
    assert set(mission.STOPPED_BY_SIGNAL) <= kinds
    assert not {"mail_finish", "ping_finish", "finish"} \
        & set(mission.STOPPED_BY_SIGNAL)
