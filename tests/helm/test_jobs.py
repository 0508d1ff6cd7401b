"""The sidecar's templates, used by another chart, and the examples that are made with them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from scripts.chart_examples import FOLDER, rendered
from scripts.chart_tools import helm
from tests.helm.rendering import (
    CHART,
    MAJORS,
    SCHEMAS,
    RefusedError,
    has_schema,
    parse,
    problems,
    problems_of_jobset_spec,
    render,
    the,
)
from tests.ranks import REPOSITORY

EXAMPLES = sorted(path.name for path in FOLDER.glob("*.yaml"))
GIVEN = {"image": "gradwatch:1", "collector": "c:7700", "accessSecret": "access", "runAsUser": 1000}

POD = """\
apiVersion: v1
kind: Pod
metadata: {name: job}
spec:
  initContainers:
    {{- include "gradwatch.initContainers" .Values.job | nindent 4 }}
  containers:
    - name: trainer
      image: train:1
      env:
        {{- include "gradwatch.env" .Values.job | nindent 8 }}
      volumeMounts:
        {{- include "gradwatch.volumeMounts" .Values.job | nindent 8 }}
  volumes:
    {{- include "gradwatch.volumes" .Values.job | nindent 4 }}
"""


@pytest.fixture(scope="module")
def their_chart(tmp_path_factory):
    """A chart that depends on ours, and wants the templates alone."""
    folder = tmp_path_factory.mktemp("theirs")
    shutil.copytree(CHART, folder / "gradwatch")
    theirs = folder / "theirs"
    (theirs / "templates").mkdir(parents=True)
    (theirs / "templates" / "pod.yaml").write_text(POD)
    dependency = {"name": "gradwatch", "version": "0.1.0", "repository": "file://../gradwatch"}
    chart = {"apiVersion": "v2", "name": "theirs", "version": "1.0.0", "dependencies": [dependency]}
    (theirs / "Chart.yaml").write_text(yaml.safe_dump(chart))
    subprocess.run([helm(4), "dependency", "update", theirs], check=True, capture_output=True)
    return theirs


def pod_of(chart, *, major=4, without=(), **more):
    job = {key: value for key, value in (GIVEN | more).items() if key not in without}
    values = yaml.safe_dump({"gradwatch": {"collector": {"enabled": False}}, "job": job})
    (pod,) = render(values, major=major, chart=chart)
    return pod["spec"]


@pytest.mark.parametrize("major", MAJORS)
def test_another_chart_gives_its_pods_a_sidecar(their_chart, major):
    pod = pod_of(their_chart, major=major)
    bring, sidecar = pod["initContainers"]
    assert bring["command"][-1] == "/gradwatch/"
    # A native sidecar: it starts before the training, after the init container, and ends last.
    assert sidecar["restartPolicy"] == "Always"
    assert "restartPolicy" not in bring
    assert sidecar["securityContext"]["runAsUser"] == 1000
    assert [one["name"] for one in pod["volumes"]] == ["gradwatch", "gradwatch-access"]
    (trainer,) = pod["containers"]
    assert [one["name"] for one in trainer["volumeMounts"]] == ["gradwatch"], (
        "the token is not the training's"
    )
    state = {"name": "GRADWATCH_STATE_DIR", "value": "/gradwatch/state"}
    assert state in trainer["env"]
    assert state in sidecar["env"]


def test_a_sidecar_looks_after_checkpoints_where_they_are_mounted(their_chart):
    mount = {"name": "ckpts", "mountPath": "/ckpts"}
    checkpoints = {"root": "/ckpts/llm", "layout": "dcp", "volumeMounts": [mount]}
    _, sidecar = pod_of(their_chart, checkpoints=checkpoints)["initContainers"]
    assert {"--checkpoints-root=/ckpts/llm", "--checkpoints-layout=dcp"} <= set(sidecar["args"])
    assert mount in sidecar["volumeMounts"]


def test_a_policy_is_mounted_for_the_launcher(their_chart):
    pod = pod_of(their_chart, policy="a-policy")
    (trainer,) = pod["containers"]
    assert {"name": "gradwatch-policy", "configMap": {"name": "a-policy"}} in pod["volumes"]
    assert "/etc/gradwatch/policy" in {one["mountPath"] for one in trainer["volumeMounts"]}


def test_a_training_that_is_root_has_a_sidecar_that_is_root(their_chart):
    for container in pod_of(their_chart, runAsUser=0)["initContainers"]:
        assert container["securityContext"]["runAsUser"] == 0
        assert container["securityContext"]["runAsNonRoot"] is False


@pytest.mark.parametrize("key", GIVEN)
def test_what_cannot_be_left_out_is_named(their_chart, key):
    with pytest.raises(RefusedError, match=f'templates want "{key}"'):
        pod_of(their_chart, without=[key])


def flags_of(*command):
    """All that a command has, by its help."""
    help_ = [sys.executable, "-m", "gradwatch.cli", *command, "--help"]
    shown = subprocess.run(help_, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z-]+", shown))


def test_every_flag_is_one_that_the_command_has(their_chart):
    _, sidecar = pod_of(their_chart, checkpoints={"root": "/ckpts"})["initContainers"]
    assert {word.partition("=")[0] for word in sidecar["args"]} <= flags_of(*sidecar["command"][1:])
    (job,) = parse((FOLDER / "job.yaml").read_text())
    (ray,) = parse((FOLDER / "rayjob.yaml").read_text())
    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    for words in (trainer["command"], ray["spec"]["entrypoint"].split()):
        ours = words[: words.index("--")]
        assert ours[0].endswith("gradwatch")
        assert {word.partition("=")[0] for word in ours[2:]} <= flags_of(ours[1])


# ---------------------------------------------------------------- examples


def test_the_examples_are_made_from_the_chart():
    command = [sys.executable, "-m", "scripts.chart_examples", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_both_versions_of_helm_make_the_same_examples():
    made = [{name: parse(text) for name, text in rendered(major).items()} for major in MAJORS]
    assert made[0] == made[1]
    assert sorted(made[0]) == EXAMPLES


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no CRD schemas in {SCHEMAS}")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_have_no_unknown_field(name):
    for one in parse((FOLDER / name).read_text()):
        if one["kind"] == "TrainingRuntime":
            # There is no schema of it; most of it is a JobSet.
            assert problems_of_jobset_spec(one["spec"]["template"]["spec"]) == []
        elif one["kind"] != "Job":
            assert has_schema(one)
            assert problems(one) == []


def test_halted_is_never_started_again_and_due_always_where_a_kind_can_tell():
    """93 fails the Job, 75 does not count: in that order, and of the training's container alone."""
    jobs = {
        "job.yaml": lambda one: [one["spec"]],
        "jobset.yaml": lambda one: [job["template"]["spec"] for job in one["spec"]["replicatedJobs"]],
        "trainingruntime.yaml": lambda one: [
            job["template"]["spec"] for job in one["spec"]["template"]["spec"]["replicatedJobs"]
        ],
    }
    for name, of in jobs.items():
        (one,) = parse((FOLDER / name).read_text())
        for job in of(one):
            (container,) = job["template"]["spec"]["containers"]
            halted, due, *_ = job["podFailurePolicy"]["rules"]
            assert (halted["action"], halted["onExitCodes"]["values"]) == ("FailJob", [93])
            assert (due["action"], due["onExitCodes"]["values"]) == ("Ignore", [75])
            for rule in (halted, due):
                assert rule["onExitCodes"]["containerName"] == container["name"]
            # Kubernetes takes a podFailurePolicy with no other.
            assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_jobset_tells_a_halted_job_from_one_that_crashed():
    for name, of in (
        ("jobset.yaml", lambda one: one["spec"]),
        ("trainingruntime.yaml", lambda one: one["spec"]["template"]["spec"]),
    ):
        spec = of(parse((FOLDER / name).read_text())[0])
        (rule,) = spec["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        assert all(job["template"]["spec"]["backoffLimit"] == 0 for job in spec["replicatedJobs"])


def test_kinds_that_cannot_tell_start_nothing_again():
    (ray,) = parse((FOLDER / "rayjob.yaml").read_text())
    assert ray["spec"]["backoffLimit"] == ray["spec"]["submitterConfig"]["backoffLimit"] == 0
    (pytorch,) = parse((FOLDER / "pytorchjob.yaml").read_text())
    replicas = pytorch["spec"]["pytorchReplicaSpecs"].values()
    assert {one["restartPolicy"] for one in replicas} == {"ExitCode"}


def test_the_collector_of_the_examples_is_the_charts_with_its_access():
    """Their names are those that the notes of an installation of the name `gradwatch` tell to make."""
    service = the(render("fullnameOverride: gradwatch"), "Service", "gradwatch")["metadata"]
    (job,) = parse((FOLDER / "job.yaml").read_text())
    _, sidecar = job["spec"]["template"]["spec"]["initContainers"]
    assert f"--collector={service['name']}.{service['namespace']}.svc:7700" in sidecar["args"]
