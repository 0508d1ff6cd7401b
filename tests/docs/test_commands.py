"""Each command of the README and the docs is run, beside a job that trains, or it is said why not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.blocks import ELSEWHERE, PAGES, commands, elsewhere, hidden
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.docs.blocks import Command

BIN = Path(sys.executable).parent
# Their collectors are others than the one that stands.
WITH_ITS_OWN_COLLECTOR = {"security.md", "notifications.md"}
JOB = "llm-7b"
OF_THE_README = (
    f"gradwatch run --job {JOB} --policy policy.yaml -- "
    "torchrun --nproc-per-node 4 train.py --resume '{resume}'"
)
# What has been run; the world begins with these.
ONCE = {OF_THE_README, "gradwatch collector"}

# A collector is started beside what follows; what it says is waited for.
PRELUDE = """
set -euo pipefail
trap 'for pid in $(cat pids 2>/dev/null); do kill $pid || true; done; wait || true; rm -f pids' EXIT
gradwatch() {
  if [ "$1" = collector ]; then
    command gradwatch "$@" 2> collector.log &
    echo $! >> pids
    until grep -q "metrics at" collector.log; do
      kill -0 $! || { cat collector.log >&2; return 1; }
      sleep 0.1
    done
  else
    command gradwatch "$@"
  fi
}
"""


@dataclass(frozen=True)
class World:
    """Where the commands are run: a folder, and a machine whose ports nobody else has."""

    folder: Path
    namespace: str
    incident: str = ""

    def environment(self, **more: str) -> dict[str, str]:
        known = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
        return known | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(REPOSITORY),
            "GRADWATCH_STATE_DIR": str(self.folder / "state"),
            **more,
        }

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[World]:
    """A network of its own, in which node0 and node1 are this machine."""
    name = f"gwdocs{random.randrange(16**6):06x}"
    hosts = Path("/etc/netns") / name
    hosts.mkdir(parents=True)
    (hosts / "hosts").write_text(f"127.0.0.1 localhost node0 node1 {socket.gethostname()}\n")
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        folder.mkdir(exist_ok=True)
        for entry in ("examples", "helm", "tests", "scripts", "benchmarks", "protos"):
            (folder / entry).symlink_to(REPOSITORY / entry)
        (folder / "train.py").symlink_to(REPOSITORY / "tests/docs/train.py")
        (folder / "checkpoints").mkdir()
        policy = (REPOSITORY / "examples/policy.yaml").read_text().replace("mode: dry_run", "mode: enforce")
        (folder / "policy.yaml").write_text(policy.replace("/tmp/checkpoints", str(folder / "checkpoints")))
        yield World(folder, name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        (hosts / "hosts").unlink()
        hosts.rmdir()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The README's collector that stands, and its job with a policy, which has had an incident."""
    folder = tmp_path_factory.mktemp("docs") / "world"
    with machine(folder) as it, contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "world.log").open("w"))

        def start(*command: str, **more: str) -> subprocess.Popen[bytes]:
            running = subprocess.Popen(
                it.command(*command), cwd=folder, env=it.environment(**more), stdout=log, stderr=log
            )
            stack.callback(running.wait, 60)
            return running

        collector = start("gradwatch", "collector")
        stack.callback(collector.terminate)
        until(lambda: "metrics at" in (folder / "world.log").read_text())
        start("bash", "-c", OF_THE_README, FOREVER=str(folder / "stop"), CHECKPOINTS="checkpoints")
        stack.callback((folder / "stop").touch)
        until((folder / "checkpoints" / "step_40.pt").exists)
        incident = until(lambda: _incident(it))
        yield World(it.folder, it.namespace, incident)


def _incident(it: World) -> str:
    asked = it.command("gradwatch", "incidents", "--json", "--job", JOB)
    told = subprocess.run(asked, cwd=it.folder, env=it.environment(), capture_output=True, check=True).stdout
    known = json.loads(told)
    return str(known[0]["id"]) if known else ""


def until(look, *, seconds: float = 120):
    """Ask until the answer is true; the deadline is for a broken test only."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds")


def made_real(text: str, it: World) -> str:
    """A command with the page's placeholders filled in."""
    for word, real in (
        ("ID", it.incident),
        ("JOB", JOB),
        ("DIR", str(it.folder / "checkpoints")),
        ("/ckpts", str(it.folder / "checkpoints")),
        ("URL", "http://127.0.0.1:7701"),
        ("POLICY", "policy.yaml"),
        ("EVENTS", "events"),
    ):
        text = re.sub(rf"(?<![\w/]){re.escape(word)}(?![\w/-])", real, text)
    # Each job of a machine has a port of its own for the rendezvous.
    port = 29520 + len(ONCE)
    text = text.replace("torchrun … ", "torchrun --nproc-per-node 2 ")
    return text.replace("torchrun ", f"torchrun --master-port {port} ")


def to_run(page: Path) -> list[Command]:
    return [one for one in commands(page) if elsewhere(one) is None]


@pytest.mark.e2e
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_do_what_they_say(page: Path, world: World, tmp_path: Path):
    with contextlib.ExitStack() as stack:
        alone = page.name in WITH_ITS_OWN_COLLECTOR
        it = stack.enter_context(machine(tmp_path / "machine")) if alone else world
        lines = []
        for command in to_run(page):
            # The same again says nothing new.
            if command.text in ONCE and not alone:
                continue
            ONCE.add(command.text)
            lines.append(made_real(command.text, it))
        if not lines:
            return
        done = subprocess.run(
            it.command("bash", "-c", PRELUDE + "set -x\n" + "\n".join(lines)),
            cwd=it.folder,
            env=it.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{page.name}:\n{done.stdout}\n{done.stderr}"


def test_what_is_run_elsewhere_is_run_there():
    used = {elsewhere(command) for page in PAGES for command in commands(page)}
    for one in ELSEWHERE:
        assert one in used, f"nobody writes {one.command} any more"
        if one.by is not None:
            file, word = one.by
            assert word.format("test") in (REPOSITORY / file).read_text(), one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_is_in_a_block_that_is_not_looked_at(page):
    assert list(hidden(page)) == []
