"""What people do with the page takes them no more clicks than it should."""

from __future__ import annotations

import pytest

import page_tasks


@pytest.fixture(scope="module")
def scene(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    browser.size(1280, 900)
    with page_tasks.Scene(folder, browser) as scene:
        yield scene
        scene.dashboard.assert_no_bugs()


@pytest.mark.parametrize("task, clicks", [
    pytest.param(task, clicks, id=task.__name__)
    for task, _, _, clicks in page_tasks.TASKS])
def test_task_takes_this_many_clicks(scene, task, clicks):
    if task is not page_tasks.see_the_first_job and not hasattr(
            scene, "operator"):     # this task was chosen alone
        page_tasks.see_the_first_job(scene)
    scene.begin()
    task(scene)
    assert scene.clicks == clicks
    assert scene.browser.faults() == []
