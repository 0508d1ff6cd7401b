"""Where the jobs of a campaign run: on this machine, or on two nodes that report to one collector."""

from __future__ import annotations

import json
import ssl
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trustme

from tests.campaign.network import JOB_INTERFACE, MASTER_ADDRESS, Network
from tests.cli.command import GRADWATCH, until
from tests.ranks import REPOSITORY, free_port
from tests.recovery import STANDALONE, TORCHRUN, embedded, environment, write_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Self

_TOKEN = "0123456789abcdef-of-the-campaign"
_END_SECONDS = 120.0


@dataclass
class RunningJob:
    """The launchers of one job.

    Attributes:
        url: gives the address of the collector.
    """

    commands: list[list[str]]
    env: dict[str, str]
    folder: Path
    url: Callable[[], str | None]
    launchers: list[subprocess.Popen[bytes]] = field(init=False)

    def __post_init__(self) -> None:
        self.launchers = [self._start(number) for number in range(len(self.commands))]

    @property
    def runs(self) -> bool:
        """Whether a launcher lives."""
        return any(launcher.poll() is None for launcher in self.launchers)

    def kill_a_launcher_and_start_it_again(self) -> None:
        """The last node's, as a supervisor there would."""
        self.launchers[-1].kill()
        self.launchers[-1].wait()
        self.launchers[-1] = self._start(len(self.launchers) - 1)

    def finish(self) -> list[int]:
        """The exit codes, once all have ended."""
        return [launcher.wait(timeout=_END_SECONDS) for launcher in self.launchers]

    def kill(self) -> None:
        """End what still runs."""
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()
        for launcher in self.launchers:
            launcher.wait(timeout=_END_SECONDS)

    def report(self) -> dict[str, Any]:
        """Of the first launcher; with no decisions when there is none."""
        path = self.folder / "report-0.json"
        return json.loads(path.read_text()) if path.exists() else {"decisions": []}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        with (self.folder / f"node-{number}.log").open("ab") as log:
            return subprocess.Popen(
                self.commands[number],
                env=self.env,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


class Cluster(Protocol):
    """Where jobs can run.

    Attributes:
        ranks: in all.
        credentials: for `Gate`.
        policy: where the policy of the next job is written, before that is started.
    """

    ranks: int
    credentials: dict[str, Any]
    policy: Path

    def job(self, name: str, folder: Path, script: Sequence[object]) -> RunningJob:
        """Start a job; `script` is what torchrun runs, with its arguments."""


class OneNode:
    """This machine; each job has a collector of its own."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.ranks = ranks
        self.policy = folder / "policy.yaml"
        self.credentials: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left over."""

    def job(self, name: str, folder: Path, script: Sequence[object]) -> RunningJob:
        command = _run(name, folder, self.policy, 0, [], [*STANDALONE, self.ranks, *script])
        return RunningJob([command], environment(), folder, embedded(folder / "state-0"))


class TwoNodes:
    """Two network namespaces with host names of their own; beside them a collector with TLS and a token."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.ranks = ranks
        self.credentials: dict[str, Any] = {}
        self.policy = folder / "policy.yaml"
        self._folder = folder
        self._network = Network()
        self._collector: subprocess.Popen[bytes] | None = None
        self._grpc, self._http = free_port(), free_port()

    def __enter__(self) -> Self:
        self._network.__enter__()
        try:
            self._start_collector()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._collector is not None:
            self._collector.terminate()
            self._collector.wait(timeout=_END_SECONDS)
        self._network.__exit__()

    def job(self, name: str, folder: Path, script: Sequence[object]) -> RunningJob:
        commands = []
        for node in self._network.nodes:
            access = [
                *("--collector", f"{node.machine_address}:{self._grpc}"),
                *("--tls-ca", self._folder / "ca.pem", "--token-file", self._folder / "token"),
            ]
            torchrun = [
                *(*TORCHRUN, "--nnodes", 2, "--node-rank", node.rank),
                *("--nproc-per-node", self.ranks // 2),
                *("--master-addr", MASTER_ADDRESS, "--master-port", 29500),
                *script,
            ]
            commands.append(node.command(_run(name, folder, self.policy, node.rank, access, torchrun)))
        return RunningJob(commands, environment(GLOO_SOCKET_IFNAME=JOB_INTERFACE), folder, self._url)

    def _url(self) -> str:
        return f"https://{self._network.nodes[0].machine_address}:{self._http}"

    def _start_collector(self) -> None:
        folder = self._folder
        authority = trustme.CA()
        made = authority.issue_cert(*(node.machine_address for node in self._network.nodes))
        authority.cert_pem.write_to_path(folder / "ca.pem")
        made.private_key_pem.write_to_path(folder / "key.pem")
        made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(_TOKEN)
        self.credentials = {
            "token": _TOKEN,
            "tls": ssl.create_default_context(cafile=str(folder / "ca.pem")),
        }
        command = [
            *(*GRADWATCH, "collector", "--state-dir", folder / "collector"),
            *("--grpc", f"0.0.0.0:{self._grpc}", "--http", f"0.0.0.0:{self._http}"),
            *("--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem", "--token-file", token),
            *("--policy", write_policy(self.policy, folder)),
        ]
        with (folder / "collector.log").open("ab") as log:
            self._collector = subprocess.Popen(
                [str(part) for part in command], env=environment(), cwd=folder, stdout=log, stderr=log
            )
        until(embedded(folder / "collector"))


def _run(
    name: str, folder: Path, policy: Path, node: int, access: Sequence[object], command: Sequence[object]
) -> list[str]:
    flags = [
        *("--job", name, "--policy", policy, "--state-dir", folder / f"state-{node}"),
        *("--report", folder / f"report-{node}.json"),
    ]
    return [str(part) for part in (*GRADWATCH, "run", *flags, *access, "--", *command)]
