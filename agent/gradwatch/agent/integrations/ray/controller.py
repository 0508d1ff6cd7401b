"""What is done about a run in the process of Ray Train's controller.

The controller is the job's launch: it tells the collector of every worker group, a generation each, and obeys
its orders: to stop a group is to tell Ray that it has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwatch.agent.integrations.ray import known, lifecycle, policy, told
from gradwatch.agent.integrations.ray.budget import Budget
from gradwatch.agent.integrations.ray.collector import ensure_collector
from gradwatch.agent.integrations.ray.lifecycle import Act
from gradwatch.agent.integrations.ray.nodes import Nodes
from gradwatch.agent.integrations.ray.relay import Relay
from gradwatch.agent.launch import resume
from gradwatch.agent.launch.journal import Commanded, LaunchJournal
from gradwatch.agent.probe.spool import STATUS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gradwatch.agent.launch.orders import Order

# Workers that do not answer in this time are Ray's trouble, and it will say so.
_PREPARE_SECONDS = 60.0
_TICK_SECONDS = 0.05
# A collector that was started with the run may still be on its way up when a short run ends.
_DRAIN_SECONDS = 30.0
_FAILED = 1


class HaltedError(RuntimeError):
    """The policy ends the run: Ray must not restart it."""

    # Let through by the callback, which else keeps every error of ours from Ray.
    gradwatch_meant = True


# Ray's controller has a process of its own, for one run.
_begun = False


def begin(driver: Mapping[str, Any], run: Any) -> Controller | None:
    """The run's `Controller`; None when it has one: `gradwatch run` and the script both may say it.

    Raises:
        OSError: the spool cannot be written.
        ray.exceptions.RayError: no sidecar, or no collector, can be started.
    """
    global _begun  # noqa: PLW0603
    if _begun:
        return None
    _begun = True
    return Controller(driver, run)


class Controller:
    """Sees to it that every worker group is watched, and starts from where it should.

    Args:
        driver: what the callback was told in the driver's process.
        run: Ray Train's `TrainRunContext`.
    """

    def __init__(self, driver: Mapping[str, Any], run: Any) -> None:
        self._environ: dict[str, str] = dict(driver["environ"])
        self._relay: Any = None
        self._launched = False
        name = str(run.run_config.name)
        self._job = driver["job"] or self._environ.get("GRADWATCH_JOB") or name
        # The launcher has one of its own, or none.
        self._policy = None if self._environ.get("GRADWATCH_SPOOL") else driver["policy"]
        if self._policy is not None:
            self._environ |= policy.variables(self._policy)
        self._nodes, self._spool = self._place(run)
        self._budget = Budget(int(run.run_config.failure_config.max_failures))
        policy_hash = self._environ.get("GRADWATCH_POLICY_HASH")
        self._rules = lifecycle.Rules(obeys=policy_hash is not None)
        generation = int(self._environ.get("GRADWATCH_GENERATION") or 0)
        self._life = lifecycle.begin(generation, time.monotonic())
        self._words: tuple[int, ...] = ()
        self._heard_at = 0.0
        self._told: frozenset[str] = frozenset()
        self._journal = LaunchJournal(
            self._spool,
            job=self._job,
            generation=generation,
            command=("ray.train", name),
            policy_hash=policy_hash,
            whole_job=True,
        )
        self._journal.take_command(Commanded.RUNNING)
        self._unknown = None if driver["asks_for_checkpoint"] else known.why_unknown(ray.__version__)
        if self._rules.obeys and (why := self._no_restart()):
            say(f"a rollback will be refused: {why}")

    def _place(self, run: Any) -> tuple[Nodes, Path]:
        """Where this run's spools are, on its nodes and on this one: the launcher's, if we are under one."""
        here = ray.get_runtime_context().get_node_id()
        launched = self._environ.get("GRADWATCH_SPOOL", "")
        self._launched = bool(launched) and Path(launched).is_dir()
        if self._launched:
            spool = Path(launched)
            state_dir, run_id = spool.parent.parent, spool.name
            own = {here: launched}
        else:
            state_dir = Path(self._environ.get("GRADWATCH_STATE_DIR") or _default_state_dir())
            run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            own = {}
        settings = {"job": self._job, "state_dir": str(state_dir), "run_id": run_id}
        settings["drain_seconds"] = _DRAIN_SECONDS
        if self._policy is not None:
            settings["flags"] = policy.sidecar_flags(self._policy)
        nodes = Nodes(own, lambda: self._collector(here, state_dir, run), settings)
        found = nodes.spools([here])[here]
        if isinstance(found, Exception):
            raise found
        return nodes, Path(found)

    def _collector(self, here: str, state_dir: Path, run: Any) -> Any:
        """The collector's address, or the actor that carries connections to it."""
        address = self._environ.get("GRADWATCH_COLLECTOR")
        if address:
            return address
        if not self._launched:
            collector = ensure_collector(_on_storage(run) or state_dir)
            if self._policy is not None:
                taken = collector.take_policy.remote(self._job, self._policy["text"])
                ray.get(taken, timeout=_PREPARE_SECONDS)
            return collector
        if self._relay is None:
            place = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
            actor = ray.remote(num_cpus=0, max_restarts=-1)(Relay)
            self._relay = actor.options(scheduling_strategy=place).remote(str(state_dir))
        return self._relay

    def group_starts(self, _context: Any) -> None:
        """Ray is about to start a worker group: wait for what it is to start from.

        Raises:
            HaltedError: it is not to start.
        """
        while True:
            order, now = self._order(), time.monotonic()
            self._life, act = lifecycle.between(
                self._life, order, self._rules, heard_at=self._heard(now), now=now
            )
            if act is Act.REPORT:
                stopped_for = self._life.order
                self._journal.command_stopped(
                    self._life.generation,
                    "" if stopped_for is None else stopped_for.id,
                    _FAILED if stopped_for is None else None,
                    restarts=True,
                )
            elif act is Act.HALT:
                self._halt()
            elif act is Act.START:
                break
            else:
                time.sleep(_TICK_SECONDS)
        self._say_start()

    def prepare(self, workers: Any, on_worker: Callable[[Mapping[str, str]], str | None]) -> None:
        """Put the probe into the workers.

        Args:
            workers: Ray Train's.
            on_worker: does it, in a worker's process; returns why it could not.
        """
        environ = {name: value for name, value in self._environ.items() if name not in resume.VARIABLES}
        environ |= {"GRADWATCH_JOB": self._job, "GRADWATCH_GENERATION": str(self._life.generation)}
        environ |= resume.variables(self._life.order or self._life.pin)
        # Before any rank of it says hello.
        self._journal.command_started(self._life.generation, self._no_restart() or "")
        spools = self._nodes.spools(one.metadata.node_id for one in workers)
        asked = []
        for one in workers:
            spool = spools[one.metadata.node_id]
            if isinstance(spool, Exception):
                say(
                    f"NOT WATCHED: workers on {one.metadata.hostname}: no sidecar runs there: {_brief(spool)}"
                )
            else:
                asked.append(one.execute_async(on_worker, environ | {"GRADWATCH_SPOOL": spool}))
        for why in sorted({text for text in ray.get(asked, timeout=_PREPARE_SECONDS) if text}):
            say(why)

    def polled(self, status: Any) -> None:
        """Ray has asked the workers how they are.

        Raises:
            HaltedError: the run is to end.
        """
        self._nodes.look_after()
        self._tell_news()
        # What Ray would not start again is not stopped, whoever orders it.
        rules = dataclasses.replace(self._rules, obeys=self._rules.obeys and not self._no_restart())
        self._life, act = lifecycle.polled(self._life, self._order(), rules)
        order = self._life.order
        if act is Act.HALT:
            self._halt()
        elif act is Act.FAIL and order is not None:
            say(_because("rolling back: Ray Train restarts the workers", order))
            if not status.errors:
                rank = min(status.worker_statuses)
                status.worker_statuses[rank].error = RuntimeError(
                    _because("gradwatch rolls the run back", order)
                )

    def state_changed(self, _before: Any, now: Any) -> None:
        """The run goes on, or ends."""
        self._budget.state_changed(now)
        if now.is_terminal():
            ended_by = type(now).__name__.removesuffix("State").lower()
            failed = ended_by != "finished"
            self._journal.end(self._life.generation, _FAILED if failed else 0, ended_by)
            for spool in self._nodes.drain():
                say(f"not shipped to the collector: what is in {spool}; the next run there ships it")
            self._tell_news()
            self._nodes.end()

    def _tell_news(self) -> None:
        """What a launcher would tell, where there is none."""
        if not self._launched:
            with contextlib.suppress(OSError):
                document = (self._spool / STATUS).read_bytes()
                self._told, lines = told.news(document, self._told)
                for line in lines:
                    say(line)

    def _no_restart(self) -> str | None:
        """Why no rollback is possible now."""
        if self._budget.left == 0:
            return (
                "FailureConfig(max_failures=…) of this run allows no more failures, so Ray Train would end "
                "it instead of restarting its workers; give it some more"
            )
        return self._unknown

    def _order(self) -> Order | None:
        return self._journal.order()

    def _heard(self, now: float) -> float:
        words = self._journal.word_times()
        if words != self._words:
            self._words, self._heard_at = words, now
        return self._heard_at

    def _halt(self) -> None:
        order = self._life.order
        text = "halted" if order is None else _because("halted", order)
        say(text)
        self._journal.take_command(Commanded.HALTED)
        raise HaltedError(f"gradwatch: {text}")

    def _say_start(self) -> None:
        order, generation = self._life.order, self._life.generation
        if order is not None and order.resume_path:
            step = "step not known" if order.resume_step is None else f"step {order.resume_step}"
            say(f"resuming from {order.resume_path} ({step}) in generation {generation}")


def say(text: str) -> None:
    """Tell the user: Ray shows it where the driver runs."""
    print(f"gradwatch: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _default_state_dir() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gradwatch"


def _on_storage(run: Any) -> Path | None:
    """A state folder beside the run on its storage; None where that is no folder of a file system."""
    path = str(run.run_config.storage_path or "")
    return Path(path) / ".gradwatch" if path.startswith("/") else None


def _brief(error: Exception) -> str:
    """The last line that says something: Ray's errors begin with a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _because(what: str, order: Order) -> str:
    return f"{what}: {order.reason}" if order.reason else what
