"""The collector's chart: rendered by both versions of Helm over a matrix of values, or refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from scripts.chart_tools import command
from tests.helm.rendering import (
    CHART,
    MAJORS,
    SCHEMAS,
    RefusedError,
    has_schema,
    lint,
    parse,
    problems,
    render,
    the,
)
from tests.ranks import REPOSITORY

POLICY = (REPOSITORY / "examples" / "policy.yaml").read_text()

# What is installed, as the values that give it.
MATRIX = {
    "defaults": "{}",
    "everything": yaml.safe_dump(
        {
            "policy": {"text": POLICY},
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "runbookUrl": "https://runbooks.example/gradwatch"},
            "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Training"}},
            "commonLabels": {"team": "ml"},
            "podAnnotations": {"example.org/a": "b"},
            "podLabels": {"example.org/c": "d"},
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"key": "cpu-only", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "priorityClassName": "high",
            "imagePullSecrets": [{"name": "registry"}],
            "extraArgs": ["--version"],
            "extraEnv": [{"name": "TZ", "value": "UTC"}],
            "service": {"type": "LoadBalancer", "annotations": {"example.org/lb": "internal"}},
            "tls": {"extraDnsNames": ["gradwatch.example.org"]},
            "webhook": {"url": "https://hooks.example/gradwatch", "existingSecret": "my-webhook"},
            "networkPolicy": {"egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]},
        }
    ),
    "everything of yours": """
        fullnameOverride: watcher
        image: {repository: registry.example:5000/ml/gradwatch, digest: sha256:%s}
        tls: {existingSecret: my-tls, clientCA: {existingSecret: my-ca}}
        auth: {token: {existingSecret: my-token, key: t}, identities: {existingSecret: my-identities}}
        policy: {existingConfigMap: my-policy, key: p.yaml}
        persistence: {existingClaim: my-claim}
        serviceMonitor: {enabled: true}
        """
    % ("0" * 64),
    "identities alone": """
        auth: {token: {generate: false}, identities: {existingSecret: my-identities}}
        serviceMonitor: {enabled: true, tokenSecret: {name: viewer}}
        """,
    "an issuer of the cluster": "tls: {certManager: {issuerRef: {name: pki, kind: ClusterIssuer}}}",
    "as little as possible": """
        persistence: {enabled: false}
        networkPolicy: {enabled: false}
        podDisruptionBudget: {enabled: false}
        bindAddress: '[::]'
        """,
    "templates alone": "collector: {enabled: false}",
}

# Values, and words of what is said about them (by Helm 3 and by Helm 4).
REFUSED = {
    "no TLS": ("tls: {certManager: {enabled: false}}", "no TLS: .*Set tls.existingSecret"),
    "no token": ("auth: {token: {generate: false}}", "no token: .*auth.token.existingSecret"),
    "two policies": (
        "policy: {existingConfigMap: p, text: 'apiVersion: gradwatch/v1'}",
        "two policies: set policy.text or policy.existingConfigMap",
    ),
    "no policy at all": ("policy: {text: 'hello'}", "policy.text is not a policy file"),
    "a policy that is no YAML": ("policy: {text: '{'}", "policy.text is not a policy file"),
    "a webhook without a secret": ("webhook: {url: 'https://h'}", "set webhook.existingSecret"),
    "a webhook behind a wall": (
        "webhook: {url: 'https://h', existingSecret: s}",
        "webhook would never be told: set networkPolicy.egress",
    ),
    "nothing for Prometheus": (
        """
        auth: {token: {generate: false}, identities: {existingSecret: i}}
        serviceMonitor: {enabled: true}
        """,
        "set serviceMonitor.tokenSecret.name to a Secret with a viewer's token",
    ),
    "a misspelt value": (
        "image: {repo: x}",
        "(?s)image.*dditional propert(y|ies) '?repo'? (is )?not allowed",
    ),
    "a value of no block": ("replicas: 3", "(?s)dditional propert(y|ies) '?replicas'? (is )?not allowed"),
    "text for a switch": ("persistence: {enabled: 'yes'}", r"(?s)persistence.enabled.*boolean"),
    "root": ("runAsUser: 0", "(?s)runAsUser.*(greater than or equal to 1|want 1)"),
    "a digest that is none": ("image: {digest: latest}", "(?s)image.digest.*(pattern)"),
    "a tag in the repository": ("image: {repository: 'gradwatch:1'}", "(?s)image.repository.*pattern"),
    "runbooks nowhere": ("prometheusRule: {runbookUrl: runbooks}", "(?s)prometheusRule.runbookUrl.*pattern"),
    "an unknown service type": ("service: {type: Headless}", "(?s)service.type.*'?ClusterIP"),
    "a port that is none": ("service: {grpcPort: 77000}", "(?s)service.grpcPort.*(65535|65,535)"),
    "two collectors unavailable of one": (
        "podDisruptionBudget: {maxUnavailable: 2}",
        "(?s)podDisruptionBudget.maxUnavailable.*1",
    ),
    # An empty `from` would let everybody in.
    "nobody as peer": ("networkPolicy: {agents: []}", "(?s)networkPolicy.agents.*(at least 1|minItems)"),
}

# What checkov must have looked at and passed. Not in it: CKV_K8S_11, since a CPU limit would throttle the
# collector in a burst; CKV_K8S_15, since an image that is named by digest need not be pulled again.
CHECKS = {
    *(
        f"CKV_K8S_{number}"
        for number in (8, 9, 10, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 25, 26, 27, 28)
    ),
    *(f"CKV_K8S_{number}" for number in (29, 30, 31, 33, 34, 35, 37, 38, 39, 40, 43)),
    "CKV2_K8S_6",
}


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_it_lints(major, values):
    done = lint(major, CHART, values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_both_versions_of_helm_render_the_same(values):
    def without_token(major):
        return [
            one | {"data": None} if one["kind"] == "Secret" else one for one in render(values, major=major)
        ]

    def key(one):
        return one["kind"], one["metadata"]["name"]

    assert sorted(without_token(3), key=key) == sorted(without_token(4), key=key)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize(("values", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_values_are_refused_with_a_sentence(major, values, says):
    with pytest.raises(RefusedError) as caught:
        render(values, major=major)
    flat = str(caught.value).replace("/", ".").replace("\n", " ")
    assert re.search(says, flat), str(caught.value)


def test_the_manifests_are_valid_kubernetes(tmp_path):
    for name, values in MATRIX.items():
        path = tmp_path / f"{name.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump_all(render(values)))
    for path in (REPOSITORY / "examples" / "kubernetes").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    validate = [command("kubernetes-validate"), "--strict", "--no-warn"]
    files = sorted(tmp_path.glob("*.yaml"))
    done = subprocess.run([*validate, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    # It has looked at them, and would have said.
    assert "passed for resource statefulset" in done.stdout
    broken = (tmp_path / "defaults.yaml").read_text().replace("serviceName:", "serviceNam:")
    (tmp_path / "defaults.yaml").write_text(broken)
    done = subprocess.run(
        [*validate, tmp_path / "defaults.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no CRD schemas in {SCHEMAS}")
@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_custom_resources_have_no_unknown_field(values):
    manifests = render(values)
    assert [problem for one in manifests for problem in problems(one)] == []


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no CRD schemas in {SCHEMAS}")
def test_a_misspelt_field_of_a_custom_resource_would_be_seen():
    manifests = render(MATRIX["everything"])
    for kind, field in (
        ("ServiceMonitor", "endpoints"),
        ("PrometheusRule", "groups"),
        ("Certificate", "dnsNames"),
    ):
        one = the(manifests, kind)
        assert has_schema(one)
        one["spec"][f"{field}s"] = one["spec"][field]
        assert problems(one)


def test_checkov_finds_nothing(tmp_path):
    """One run over all of the matrix: about four seconds."""
    for name, values in MATRIX.items():
        documents = render(values)
        for one in documents:
            template = one.get("spec", {}).get("template")
            if template is not None:
                # What has no digest by itself is the user's to name.
                template["spec"]["containers"][0]["image"] = f"gradwatch@sha256:{'0' * 64}"
                template["spec"]["containers"][0]["imagePullPolicy"] = "Always"
        (tmp_path / f"{name.replace(' ', '-')}.yaml").write_text(yaml.safe_dump_all(documents))
    checkov = [command("checkov"), "--framework", "kubernetes", "--directory", tmp_path, "--output", "json"]
    checkov += ["--skip-download", "--skip-check", "CKV_K8S_11,CKV_K8S_15"]
    done = subprocess.run(checkov, capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    found = {(one["check_id"], one["check_name"], one["file_path"]) for one in results["failed_checks"]}
    # Whoever switches the NetworkPolicy off has none.
    assert {one for one in found if one[::2] != ("CKV2_K8S_6", "/as-little-as-possible.yaml")} == set()
    assert {one["check_id"] for one in results["passed_checks"]} >= CHECKS


def test_the_readme_is_made_from_the_values():
    command = [sys.executable, "-m", "scripts.chart_readme", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what the manifests say


def collector_of(values="{}"):
    pod = the(render(values), "StatefulSet")["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_the_collector_is_started_with_files_that_are_mounted():
    for values in (MATRIX["defaults"], MATRIX["everything"], MATRIX["identities alone"]):
        pod, container = collector_of(values)
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounted.values())
        for argument in container["args"]:
            _, _, path = argument.partition("=/")
            if path:
                assert any(f"/{path}".startswith(mount) for mount in mounted), argument


def test_the_collector_runs_under_the_restricted_pod_security_standard():
    pod, container = collector_of()
    security = container["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]} <= {
        "configMap", "emptyDir", "persistentVolumeClaim", "secret",
    }  # fmt: skip


def test_a_policy_is_a_folder_so_that_a_change_arrives_without_a_restart():
    _, container = collector_of(MATRIX["everything"])
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "policy"]
    assert "subPath" not in mount
    assert the(render(MATRIX["everything"]), "ConfigMap", "gw-gradwatch-policy")["data"] == {
        "policy.yaml": POLICY.strip() + "\n"
    }


def test_rules_and_dashboards_are_embedded_as_they_are():
    manifests = render(MATRIX["everything"])
    text = (CHART / "rules" / "gradwatch.rules.yaml").read_text()
    (default,) = parse(text)
    shown = "prometheusRule: {enabled: true}"
    assert the(render(shown), "PrometheusRule")["spec"] == default
    (published,) = parse(re.sub(r"https://\S+/runbooks/", "https://runbooks.example/gradwatch/", text))
    assert the(manifests, "PrometheusRule")["spec"] == published != default
    for path in (CHART / "dashboards").glob("*.json"):
        kept = [one["data"] for one in manifests if one["kind"] == "ConfigMap" and path.name in one["data"]]
        assert [json.loads(data[path.name]) for data in kept] == [json.loads(path.read_text())]


def test_prometheus_trusts_the_collectors_ca_and_shows_its_token():
    (endpoint,) = the(render(MATRIX["everything"]), "ServiceMonitor")["spec"]["endpoints"]
    certificate = the(render(MATRIX["everything"]), "Certificate")["spec"]
    assert endpoint["tlsConfig"]["serverName"] in certificate["dnsNames"]
    assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": certificate["secretName"], "key": "ca.crt"}
    assert endpoint["authorization"]["credentials"] == {"name": "gw-gradwatch-token", "key": "token"}


def test_the_token_is_long_and_another_one_for_each_release():
    secrets = [
        the(render(MATRIX["defaults"], major=major), "Secret", "gw-gradwatch-token") for major in MAJORS
    ]
    tokens = {secret["data"]["token"] for secret in secrets}
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 64
    assert {secret["metadata"]["annotations"]["helm.sh/resource-policy"] for secret in secrets} == {"keep"}


def test_without_the_collector_there_is_nothing_but_templates():
    assert render(MATRIX["templates alone"]) == []


def test_every_flag_of_the_collector_is_one_that_it_has():
    help_ = subprocess.run(
        [sys.executable, "-m", "gradwatch.cli", "collector", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    _, container = collector_of(MATRIX["everything of yours"].replace("fullnameOverride: watcher", ""))
    flags = {argument.partition("=")[0] for argument in container["args"]}
    assert {flag for flag in flags if flag not in help_} == set()
