"""Ray Train jobs: watched and rolled back as torchrun's are, on a local Ray and on a cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from gradwatch.cli.launcher import collector_state
from tests.agent.test_bitwise import same_bits
from tests.cli.command import gradwatch, processes_with, until
from tests.e2e.jobs import Job, verdict
from tests.ranks import REPOSITORY
from tests.ray_jobs import (
    POLLS_OFTEN,
    RAY,
    TRAINING,
    bare_environment,
    poisoned,
    ray_cluster,
    starts_of,
    train,
)
from tests.recovery import write_policy
from tests.s3 import s3_bucket

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# A run's own folder below its storage.
RUN = "run"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("s3") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def cluster(bucket):
    with ray_cluster(**bucket.environ) as made:
        yield made.address


def without_launcher(address, storage, *script, **env):
    """Run the training as any driver is run; what it said."""
    done = train(address, storage, *script, **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


class RayJob:
    """A training of `tests/training/ray_run.py` under `gradwatch run`."""

    def __init__(self, folder, *script, flags=(), **env):
        self.storage = folder / "storage"
        self.storage.mkdir(parents=True)
        self.job = Job(folder, [*TRAINING, self.storage, *script], *flags, **RAY, **env)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.job.kill()

    def finish(self):
        result = self.job.finish(300)
        assert result.returncode == 0, result.stderr
        return result

    @property
    def starts(self):
        """The steps that the train function went on from."""
        return [step for step, _ in starts_of(self.storage)]


def actors(name):
    """The processes of a kind of Ray actor."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
    return found


def test_an_unmodified_script_on_a_local_ray_is_watched(tmp_path):
    # Whatever other cluster was left on this host.
    with RayJob(tmp_path, "--strike", 12, RAY_ADDRESS="local") as run:
        run.finish()
        report = run.job.report
    assert verdict(report) == (1, 12, "2.bias")
    assert (report["ranks_watched"], report["world_size"]) == (2, 2)


def test_on_a_cluster_nothing_is_lost_when_what_is_ours_is_killed(tmp_path, cluster):
    with RayJob(tmp_path, "--strike", 80, "--steps", 90, "--sleep", 0.1, RAY_ADDRESS=cluster) as run:
        until((run.storage / "began").exists, 120)
        for name in ("Attendant", "Relay"):
            (killed,) = actors(name)
            killed.kill()
            until(lambda name=name, dead=killed.pid: {one.pid for one in actors(name)} - {dead}, 60)
        (attendant,) = actors("Attendant")
        until(attendant.children, 60)
        (sidecar,) = attendant.children()
        sidecar.kill()
        until(lambda: {one.pid for one in attendant.children()} - {sidecar.pid}, 60)
        run.finish()
        report = run.job.report
    assert verdict(report) == (1, 80, "2.bias")
    assert report["ranks_watched"] == 2
    assert run.starts == [0]


def test_a_killed_worker_and_a_killed_node_cost_their_workers_and_no_verdict(tmp_path):
    script = ["--strike", 120, "--steps", 140, "--sleep", 0.1, "--save-every", 20]
    with ray_cluster() as cluster, RayJob(tmp_path, *script, RAY_ADDRESS=cluster.address) as run:
        until((run.storage / "began").exists, 120)
        actors("RayTrainWorker")[0].kill()
        until(lambda: len(run.starts) > 1, 120)
        cluster.kill_second_node()
        run.finish()
        report = run.job.report
    assert verdict(report) == (1, 120, "2.bias")
    assert (report["generations"], report["ranks_watched"]) == (3, 2)


def test_a_rollback_and_a_crash_before_the_next_report_go_on_from_the_last_good_checkpoint(tmp_path, cluster):
    policy = write_policy(tmp_path / "policy.yaml", tmp_path / "storage" / RUN)
    weights = tmp_path / "weights.pt"
    script = ["--strike", 12, "--steps", 60, "--sleep", 0.02, "--save-every", 1]
    script += ["--crash", "--weights", weights]
    with RayJob(tmp_path, *script, flags=["--policy", policy], RAY_ADDRESS=cluster, **POLLS_OFTEN) as run:
        run.finish()
        report = run.job.report
    assert run.starts == [0, 11, 11]
    assert all(value.isfinite().all() for value in torch.load(weights).values())
    (decision,) = (one for one in report["decisions"] if one["action"] == "rollback")
    assert (decision["outcome"], decision["checkpoint"]["step"]) == ("performed", 11)
    registered = {str(run.storage / RUN / name) for name in poisoned(run.storage / RUN)}
    assert registered
    assert registered <= set(decision["quarantine"])
    # Only marked: Ray would not find its own way without them.
    assert all(os.path.isdir(path) for path in decision["quarantine"])  # noqa: PTH112
    assert report["generations"] == 3
    resumed = {**decision["checkpoint"], "generation": 1, "honoured": None}
    assert report["resume"] == resumed


def test_checkpoints_on_object_storage_are_judged_there_and_gone_back_to(tmp_path, cluster, bucket):
    root = f"{bucket.url}/storage/{RUN}"
    policy = write_policy(tmp_path / "policy.yaml", root)
    script = ["--url", f"{bucket.url}/storage", "--strike", 12, "--steps", 30, "--sleep", 0.1]
    with RayJob(tmp_path, *script, flags=["--policy", policy], RAY_ADDRESS=cluster, **bucket.environ) as run:
        run.finish()
        report = run.job.report
    (decision,) = report["decisions"]
    assert (decision["outcome"], decision["checkpoint"]["step"], run.starts) == ("performed", 10, [0, 10])
    assert decision["checkpoint"]["path"].startswith(f"{root}/checkpoint_")


def test_a_policy_that_halts_ends_the_run_and_ray_does_not_start_it_again(tmp_path, cluster):
    policy = write_policy(tmp_path / "policy.yaml", tmp_path / "storage" / RUN)
    policy.write_text(policy.read_text().replace("action: rollback", "action: halt"))
    script = ["--strike", 12, "--steps", 2000, "--sleep", 0.1]
    with RayJob(tmp_path, *script, flags=["--policy", policy], RAY_ADDRESS=cluster) as run:
        result = run.job.finish(300)
        report = run.job.report
    assert (result.returncode, run.starts) == (93, [0])
    (decision,) = report["decisions"]
    assert (decision["action"], decision["outcome"]) == ("halt", "performed")


def test_without_restarts_left_a_rollback_is_refused_and_the_training_goes_on(tmp_path, cluster):
    policy = write_policy(tmp_path / "policy.yaml", tmp_path / "storage" / RUN)
    script = ["--strike", 12, "--steps", 40, "--sleep", 0.1, "--max-failures", 0]
    with RayJob(tmp_path, *script, flags=["--policy", policy], RAY_ADDRESS=cluster) as run:
        result = run.finish()
        report = run.job.report
    (decision,) = report["decisions"]
    assert (decision["outcome"], run.starts) == ("refused", [0])
    assert "max_failures" in decision["concluded"]
    assert "(refused): go-back: there is an incident" in result.stderr


def test_weights_are_the_same_bits_without_us_and_the_script_may_say_it_itself(tmp_path, cluster):
    bare, watched = tmp_path / "bare.pt", tmp_path / "watched.pt"
    assert "gradwatch" not in without_launcher(cluster, tmp_path / "bare", "--weights", bare)
    state = {"GRADWATCH_STATE_DIR": str(tmp_path / "state")}
    said = without_launcher(cluster, tmp_path / "watched", "--weights", watched, "--callback", **state)
    # Nothing to be told, and nothing left unshipped.
    assert "gradwatch:" not in said
    assert not [*(tmp_path / "state" / "spool").iterdir()]
    assert same_bits(torch.load(bare), torch.load(watched))


def test_the_collector_of_a_cluster_is_started_again_and_follows_the_policy_of_the_callback(tmp_path):
    state_dir, storage = tmp_path / "collector", tmp_path / "storage"
    with ray_cluster() as cluster, ThreadPoolExecutor() as threads:
        address = cluster.address
        for _ in range(2):
            flags = ["--state-dir", state_dir, "--max-series", 150]
            made = gradwatch("collector", "--on-ray", *flags, RAY_ADDRESS=address, **RAY)
            assert (made.returncode, str(state_dir) in made.stderr) == (0, True), made.stderr
        policy = write_policy(tmp_path / "policy.yaml", storage / RUN)
        script = ["--strike", 60, "--steps", 70, "--sleep", 0.1, "--callback", "--policy", policy, "--ask"]
        env = {"GRADWATCH_STATE_DIR": str(tmp_path / "state")}
        run = threads.submit(without_launcher, address, storage, *script, **env)
        until((storage / "began").exists, 120)
        (collector,) = processes_with(str(state_dir))
        assert "--max-series 150" in " ".join(collector.cmdline())
        collector.parent().kill()
        said = run.result()
        told = gradwatch("incidents", "--state-dir", state_dir, "--json")
    assert [step for step, _ in starts_of(storage)] == [0, 55]
    (incident,) = told.json
    assert (incident["first"]["rank"], incident["step"]) == (1, 60)
    # No launcher is there to tell it.
    assert f"gradwatch: incident {incident['id']}: Rank 1 " in said


def test_the_collector_of_a_cluster_comes_back_elsewhere_when_its_node_dies(tmp_path):
    state_dir, storage = tmp_path / "collector", tmp_path / "storage"
    script = ["--strike", 100, "--steps", 120, "--sleep", 0.1, "--save-every", 20, "--callback"]
    with ray_cluster() as cluster, ThreadPoolExecutor() as threads:
        env = bare_environment() | {"RAY_ADDRESS": cluster.address}
        start = [sys.executable, "-m", "tests.training.ray_collector", state_dir]
        subprocess.run(start, env=env, cwd=REPOSITORY, check=True)
        first = until(lambda: collector_state.ready(state_dir), 60)
        state = {"GRADWATCH_STATE_DIR": str(tmp_path / "state")}
        run = threads.submit(without_launcher, cluster.address, storage, *script, **state)
        until((storage / "began").exists, 120)
        cluster.kill_second_node()
        run.result()
        second = until(lambda: collector_state.ready(state_dir), 60)
        told = gradwatch("incidents", "--url", second.http, "--json")
    assert (second.id, second.pid != first.pid) == (first.id, True)
    (incident,) = told.json
    assert (incident["first"]["rank"], incident["step"]) == (1, 100)


def test_a_cluster_without_gradwatch_in_its_image_trains_on_and_says_so(tmp_path):
    blocker = "import sys\nsys.modules['gradwatch'] = sys.modules['gradwatch.agent'] = None\n"
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "sitecustomize.py").write_text(blocker)
    image = f"{tmp_path / 'image'}{os.pathsep}{REPOSITORY}"
    # Where it is not installed, torch does not look for it.
    env = {"PYTHONPATH": image, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with ray_cluster(**env) as cluster, RayJob(tmp_path, RAY_ADDRESS=cluster.address) as run:
        result = run.finish()
    assert run.starts == [0]
    said = result.stdout + result.stderr
    assert "NOT WATCHED" in said
    assert "gradwatch is not installed in" in said
