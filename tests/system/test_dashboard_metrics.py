"""The dashboard's metrics, as Prometheus and its promtool read them."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request

import pytest

import servers
import support
from dashboard_rig import HOST, VIEWER_TOKEN, spec, sync_payload, token_of

OTHER = "d4" * 16       # a cloned image: another host with the same name
TOPIC = support.load("koitab").topic_text("api")


def promtool(*arguments: str, text: str = "") -> str:
    """Run promtool; return what it prints. It must find nothing wrong."""
    support.need("promtool")
    done = subprocess.run(["promtool", *arguments], input=text, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def yaml_of(key: str) -> str:
    """The block of the topic that begins with this key, without indent."""
    block = re.search(rf"^    {key}:\n(?:    .*\n|\n(?=    ))+", TOPIC, re.M)
    return re.sub("^    ", "", block[0], flags=re.M)


def list_of(host: str) -> dict:
    """A host's list of its one job."""
    return {"mac": "e" * 64, "body": json.dumps({
        "v": 1, "dash": "", "host": host, "key": "0" * 16, "name": "web1",
        "at": 1, "jobs": [spec()]})}


@pytest.fixture(scope="module")
def scraped(server):
    """The dashboard with two hosts of one name: the same job went well on
    one of them, and was killed on the other."""
    server.set_up()
    server.register_host(OTHER, token_of(OTHER))
    for host, end in ((HOST, {"exit": 0}),
                      (OTHER, {"exit": None, "signal": 9})):
        record = {
            "run": 1, "change": 1, "user": "root", "tag": "backup",
            "section": "Night", "name": "Backup", "label": "Backup",
            "trigger": "schedule", "state": "done", "due": 1e9,
            "requested_at": None, "started": 1e9, "ended": 1e9 + 5,
            "signal": None, "reason": "", "args": {}, "attempt": 1,
            "count": 1, "bytes": 0, "cut": False, "size": 0, "next": None,
            "nonce": "", **end}
        reply = server.ask("POST", "/api/v1/sync", sync_payload(
            host, records=[record], list=list_of(host)), token_of(host))
        assert reply.status == 200, reply
    server.uuid = server.add_check()
    return server


def metrics_of(server) -> str:
    return server.ask("GET", "/metrics", token=VIEWER_TOKEN).body.decode()


def test_promtool_reports_no_problem(scraped):
    assert promtool("check", "metrics", text=metrics_of(scraped)) == ""


def test_no_two_samples_have_the_same_labels(scraped):
    series = [line.rpartition(" ")[0]
              for line in metrics_of(scraped).splitlines()
              if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_no_label_contains_a_ping_url(scraped):
    text = metrics_of(scraped)
    assert scraped.uuid not in text and "koi_check_up{" in text


@pytest.fixture(scope="module")
def prometheus(scraped, tmp_path_factory):
    """A real Prometheus that scrapes the dashboard by the topic's
    configuration, at another address and more often. Returns a function that
    asks it for samples: labels and value."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml_of("scrape_configs").replace("https", "http").replace(
        "koi.example.com:8077", f"127.0.0.1:{scraped.port}").replace(
        "/etc/prometheus/koi-token", str(folder / "token"))
    (folder / "token").write_text(VIEWER_TOKEN)
    (folder / "rules.yml").write_text(yaml_of("groups"))
    (folder / "p.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s, "
        "evaluation_interval: 1s}\nrule_files: [rules.yml]\n" + config)
    port = servers.free_port()
    support.need("prometheus")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/p.yml",
             f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=log,
            stderr=log)

    def query(expression: str) -> list[tuple[dict, float]]:
        url = f"http://127.0.0.1:{port}/api/v1/query?" \
            + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError:
            return []
        return [(each["metric"], float(each["value"][1])) for each in found]

    try:
        support.wait_until(lambda: query("koi_build_info"), 60)
        yield query
    finally:
        process.terminate()
        process.wait(30)


def test_prometheus_keeps_both_hosts_of_one_name(prometheus):
    found = prometheus("koi_job_ok")
    assert {labels["host_id"]: value for labels, value in found} == {
        HOST: 1, OTHER: 0}
    assert not any("exported_job" in labels for labels, _ in found)
    assert [value for _, value in prometheus(
        "koi_job_last_exit_status != 0")] == [137]


def test_documented_alert_rules_are_valid_and_fire(prometheus, tmp_path):
    (tmp_path / "rules.yml").write_text(yaml_of("groups"))
    assert "SUCCESS" in promtool("check", "rules",
                                 str(tmp_path / "rules.yml"))
    support.wait_until(lambda: "KoiJobNotWell" in {
        labels["alertname"] for labels, _ in prometheus("ALERTS")}, 60)
