"""The collector, started with what the chart's StatefulSet says, on files laid out as the kubelet does."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import yaml

from tests import certificates
from tests.cli.command import environment, gradwatch, until
from tests.helm.rendering import render, the
from tests.ranks import REPOSITORY

POLICY = (REPOSITORY / "examples" / "policy.yaml").read_text()


def mounted(folder, content):
    """A Secret or ConfigMap as a volume: links to a folder that is exchanged as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"..{len(list(folder.iterdir()))}"
    version.mkdir()
    for name, text in content.items():
        (version / name).write_text(text)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(version.name)
    (folder / "..new").rename(folder / "..data")


class Collector:
    """The container, with its paths below a folder and its ports free ones."""

    def __init__(self, folder):
        self.files = files = certificates.make(folder)
        self.root = folder / "root"
        values = yaml.safe_dump({"policy": {"text": POLICY}, "tls": {"existingSecret": "tls"}})
        manifests = render(values)
        (self.container,) = the(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
        self.tls = ssl.create_default_context(cafile=files.ca)
        mounted(
            self.root / "etc/gradwatch/tls",
            {
                "tls.crt": files.cert.read_text(),
                "tls.key": files.key.read_text(),
                "ca.crt": files.ca.read_text(),
            },
        )
        mounted(self.root / "etc/gradwatch/token", {"token": certificates.TOKEN})
        self.set_policy(the(manifests, "ConfigMap", "gw-gradwatch-policy")["data"])
        self.log = folder / "log"

    def set_policy(self, data):
        mounted(self.root / "etc/gradwatch/policy", data)

    @contextmanager
    def running(self):
        command, *words = self.container["command"] + self.container["args"]
        assert command == "gradwatch"
        words = [word.replace("=/", f"={self.root}/") for word in words]
        words = [word.replace(":7700", ":0").replace(":7701", ":0") for word in words]
        self.state = self.root / "var/lib/gradwatch"
        self.state.mkdir(parents=True)
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gradwatch.cli", *words], stderr=log, env=environment(), cwd="/"
            )
        try:
            until(lambda: (self.state / "collector.json").exists() or process.poll() is not None)
            assert process.poll() is None, self.log.read_text()
            yield self
        finally:
            process.terminate()
            process.wait(60)
        assert process.returncode == 0

    def get(self, path, **headers):
        """Ask as Prometheus does, by the certificate's name; (status, text)."""
        address = json.loads((self.state / "collector.json").read_text())["http"]
        url = f"https://localhost:{address.rpartition(':')[2]}{path}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), context=self.tls, timeout=30
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    with Collector(tmp_path_factory.mktemp("collector")).running() as collector:
        yield collector


def test_the_probes_are_answered_without_a_token(collector):
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = collector.container[probe]["httpGet"]
        assert asked["scheme"] == "HTTPS"
        status, _ = until(lambda path=asked["path"]: (found := collector.get(path))[0] == 200 and found)
        assert status == 200


def test_metrics_want_the_token(collector):
    assert collector.get("/metrics")[0] == 401
    status, text = collector.get("/metrics", Authorization=f"Bearer {certificates.TOKEN}")
    assert status == 200
    assert "gradwatch_" in text


def test_a_changed_policy_arrives_without_a_restart(collector):
    """The ConfigMap's folder is exchanged under the collector, to one that does not load and back."""

    def loaded():
        _, text = collector.get("/metrics", Authorization=f"Bearer {certificates.TOKEN}")
        return "gradwatch_policy_last_reload_successful 1.0" in text

    grpc = json.loads((collector.state / "collector.json").read_text())["grpc"]
    address = f"localhost:{grpc.rpartition(':')[2]}"
    access = ["--tls-ca", collector.files.ca, "--token-file", collector.files.token]
    state = collector.root.parent / "job"
    # Policies are those of jobs: it has one now.
    job = gradwatch("run", "--state-dir", state, "--collector", address, *access, "--job", "j", "--", "true")
    assert job.returncode == 0
    until(loaded)
    collector.set_policy({"policy.yaml": POLICY.replace("mode: dry_run", "mode: enforced")})
    until(lambda: not loaded())
    collector.set_policy({"policy.yaml": POLICY.replace("mode: dry_run", "mode: enforce")})
    until(loaded)
    assert collector.log.read_text().count("is in force") >= 2


def test_what_it_writes_it_writes_below_its_volume(collector):
    assert (collector.state / "collector.json").exists()
    assert {path.name for path in collector.root.iterdir()} == {"etc", "var"}
