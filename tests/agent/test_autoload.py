"""What `import torch` costs and brings with the entry point installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import timeit
import zipfile

import pytest

from gradwatch.agent.probe.autoload import autoload
from tests.ranks import REPOSITORY, environment
from tests.torch_alone import link_torch


def python(code, *arguments, **env):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean | env,
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )


def test_torch_finds_the_entry_point():
    (entry,) = [
        entry
        for entry in importlib.metadata.entry_points(group="torch.backends")
        if entry.name == "gradwatch"
    ]
    assert entry.load() is autoload


def test_without_a_spool_it_adds_less_than_five_milliseconds(monkeypatch):
    monkeypatch.delenv("GRADWATCH_SPOOL", raising=False)
    loading = (
        "import torch, sys, time\n"
        "before = set(sys.modules)\n"
        "began = time.perf_counter()\n"
        "from gradwatch.agent.probe.autoload import autoload\n"
        "autoload()\n"
        "print(time.perf_counter() - began, *sorted(set(sys.modules) - before))"
    )
    runs = [python(loading, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.split() for _ in range(3)]
    assert min(float(took) for took, *_ in runs) < 0.005
    assert runs[0][1:] == [
        "gradwatch",
        "gradwatch.agent",
        "gradwatch.agent.probe",
        "gradwatch.agent.probe.autoload",
    ]
    assert timeit.timeit(autoload, number=1000) / 1000 < 0.001


def test_with_a_spool_the_process_is_active_but_no_rank(tmp_path):
    code = "import torch; from gradwatch.agent.probe.activate import active; assert active() is not None"
    python(code, GRADWATCH_SPOOL=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["autoloaded"]


def test_a_broken_environment_is_said_and_never_raised(tmp_path):
    result = python("import torch", GRADWATCH_SPOOL=str(tmp_path), GRADWATCH_GENERATION="seven")
    assert result.stderr.count("gradwatch:") == 1
    assert "is not watched" in result.stderr


def test_a_watched_rank_under_torchrun_has_neither_grpc_nor_protobuf(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.training.modules"),
    ]
    env = environment(0, 2, 0, tmp_path)
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "[]", ""]
    assert len(list(tmp_path.glob("rank*.jsonl"))) == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize("how", ["unpacked on PYTHONPATH", "pip install --no-deps"])
def test_the_probe_alone_is_enough_in_a_training_image(wheel, how, tmp_path):
    """An image with torch and none of our dependencies: -S leaves the site packages out."""
    target, spool = tmp_path / "target", tmp_path / "spool"
    spool.mkdir()
    if how.startswith("pip"):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
        ]
        subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    else:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    image = tmp_path / "image"
    image.mkdir()
    link_torch(image)
    code = (
        "import torch, sys, gradwatch.agent\n"
        "from gradwatch.agent.probe.activate import active\n"
        "assert active() is not None\n"
        "assert gradwatch.agent.watch().active\n"
        "print(gradwatch.agent.__file__, 'typer' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": f"{target}:{image}", "GRADWATCH_SPOOL": str(spool), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(target / "gradwatch" / "agent" / "__init__.py"), "False"]


def test_nobody_put_an_init_into_the_namespace_package(wheel):
    assert not list(REPOSITORY.glob("*/gradwatch/__init__.py"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "gradwatch/__init__.py" not in names
    for part in ("agent", "collector", "cli", "protos"):
        assert any(name.startswith(f"gradwatch/{part}/") for name in names)
