"""What Helm does only with a cluster: the notes, and a token that is kept."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from scripts.chart_tools import helm
from tests.helm.rendering import CHART, MAJORS, NAMESPACE, parse, the

KEPT = base64.b64encode(b"a-token-of-an-earlier-installation").decode()
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/gw-gradwatch-token"


def answers(*, installed):
    """The part of a Kubernetes API that `lookup` asks: there is no cluster to ask."""
    kinds = [
        ("v1", "Secret", "secrets"),
        ("v1", "Service", "services"),
        ("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
        ("apps/v1", "StatefulSet", "statefulsets"),
        ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
        ("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
        ("cert-manager.io/v1", "Certificate", "certificates"),
        ("cert-manager.io/v1", "Issuer", "issuers"),
    ]
    found: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    }
    for version, kind, name in kinds:
        group = version.rpartition("/")[0]
        path = f"/apis/{version}" if group else f"/api/{version}"
        if group and path not in found:
            this = {"groupVersion": version, "version": "v1"}
            found["/apis"]["groups"].append({"name": group, "versions": [this], "preferredVersion": this})
        listed = found.setdefault(path, {"kind": "APIResourceList", "groupVersion": version, "resources": []})
        listed["resources"].append({"name": name, "namespaced": True, "kind": kind, "verbs": ["get"]})
    if installed:
        found[SECRET] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": "gw-gradwatch-token",
                "namespace": NAMESPACE,
                "labels": {"app.kubernetes.io/managed-by": "Helm"},
                "annotations": {
                    "meta.helm.sh/release-name": "gw",
                    "meta.helm.sh/release-namespace": NAMESPACE,
                },
            },
            "data": {"token": KEPT},
        }
    return found


@contextmanager
def api(folder, *, installed):
    """Serve it; gives the kubeconfig that leads there."""
    known = answers(installed=installed)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = known.get(self.path.partition("?")[0])
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": "NotFound",
                "code": 404,
            }
            data = json.dumps(body or status).encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        try:
            yield path
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("installed", [True, False])
def test_an_upgrade_keeps_the_token(tmp_path, major, installed):
    with api(tmp_path, installed=installed) as kubeconfig:
        command = [helm(major), "template", "gw", CHART, "--namespace", NAMESPACE, "--dry-run=server"]
        command += ["--disable-openapi-validation"]
        done = subprocess.run(
            [*command, "--kubeconfig", kubeconfig], capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 0, done.stderr
    token = the(parse(done.stdout), "Secret", "gw-gradwatch-token")["data"]["token"]
    assert (token == KEPT) is installed


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{}", ["get secret gw-gradwatch-token", "statefulset/gw-gradwatch", "There is no policy"]),
        ("persistence: {enabled: false}", ["WARNING: persistence is off"]),
        ("auth: {token: {generate: false}, identities: {existingSecret: i}}", ["of the role agent"]),
        ("collector: {enabled: false}", ["named templates alone"]),
    ],
)
def test_the_notes_say_what_to_do_next(tmp_path, major, values, says):
    with api(tmp_path, installed=False) as kubeconfig:
        command = [helm(major), "install", "gw", CHART, "--namespace", NAMESPACE, "--dry-run=client"]
        command += ["--disable-openapi-validation", "--kubeconfig", kubeconfig, "--values", "-"]
        done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert [words for words in says if words not in notes] == []
