"""Every metric that the collector exports. The reference in the docs is made from this.

Leaf module. No label takes a step, a path, an id or a parameter's name: the number of series is bounded.
None is called `job`, `instance`, `node`, `namespace` or `pod`, which a Prometheus server sets itself.
"""

import enum
from dataclasses import dataclass


class Kind(str, enum.Enum):
    """How a metric moves."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """A family of series.

    Attributes:
        name: as a query has it, a counter's `_total` included.
        unwatched: why no alert and no dashboard asks for it; empty when one does.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unwatched: str = ""


def _counter(name: str, help_: str, *labels: str, unwatched: str = "") -> Metric:
    return Metric(name, Kind.COUNTER, help_, labels, unwatched)


def _gauge(name: str, help_: str, *labels: str, unwatched: str = "") -> Metric:
    return Metric(name, Kind.GAUGE, help_, labels, unwatched)


# ---------------------------------------------------------------- of a job

NONFINITE_EVENTS = _counter(
    "gradwatch_nonfinite_events_total",
    "Reports of non-finite local gradients, by cause.",
    *("training_job", "cause"),
)
INCIDENTS = _counter(
    "gradwatch_incidents_total",
    "Confirmed incidents, by cause. The exemplar is the newest incident's id.",
    *("training_job", "cause"),
)
INCIDENTS_OPEN = _gauge(
    "gradwatch_incidents_open",
    "Incidents that are suspected or confirmed, and not closed.",
    "training_job",
)
INCIDENT_FIRST_RANK = _gauge(
    "gradwatch_incident_first_rank",
    "The rank that was first, while an incident is open.",
    "training_job",
)
WARNINGS = _counter(
    "gradwatch_warnings_total",
    "Early warnings, by kind: `exploding` of gradients that are finite still and grow far beyond what they "
    "usually are, `loss` of a loss that is not finite though all gradients are.",
    *("training_job", "kind"),
)
JOB_RUNNING = _gauge(
    "gradwatch_job_running", "1 while the job's run goes on, 0 once it has ended.", "training_job"
)
JOB_STEP = _gauge("gradwatch_job_step", "The newest step that a rank has reached.", "training_job")
JOB_SLOWEST_STEP = _gauge(
    "gradwatch_job_slowest_step", "The step of the rank that is behind.", "training_job"
)
JOB_GENERATION = _gauge(
    "gradwatch_job_generation",
    "How often the job was started again by Gradwatch or under its eyes, counted from 0.",
    "training_job",
)
JOB_RANKS = _gauge(
    "gradwatch_job_ranks",
    "Ranks of the world: watched, ended, or missing since no process said it was that rank.",
    *("training_job", "state"),
)
JOB_SILENT_SECONDS = _gauge(
    "gradwatch_job_silent_seconds",
    "Seconds since any rank of a running job last came further.",
    "training_job",
)
UNWATCHED = _gauge(
    "gradwatch_job_unwatched_processes",
    "Processes of the job's run that train, and in which nothing is watched.",
    "training_job",
)
OVERHEAD = _gauge(
    "gradwatch_agent_overhead_ratio",
    "The probe's own time as a share of the training's, on the rank where it is largest.",
    "training_job",
)
EVENTS_DROPPED = _counter(
    "gradwatch_events_dropped_total",
    "What was reported and is not, or not wholly, taken in; no training_job where that is not known.",
    *("training_job", "reason"),
)

# ---------------------------------------------------------------- of decisions and checkpoints

DECISIONS = _counter(
    "gradwatch_decisions_total",
    "Decisions of policy or of an operator, by what was decided and what has become of it.",
    *("training_job", "action", "outcome"),
)
ROLLBACKS = _counter(
    "gradwatch_rollbacks_total",
    "Rollbacks, by what has become of them.",
    *("training_job", "outcome"),
)
CHECKPOINTS = _gauge(
    "gradwatch_checkpoints",
    "Checkpoints that are there: good, bad (non-finite), not known to be good, or set aside in quarantine.",
    *("training_job", "verdict"),
)
LAST_GOOD_STEP = _gauge(
    "gradwatch_last_good_checkpoint_step",
    "The step of the newest checkpoint that is known good.",
    "training_job",
)
LAST_GOOD_TIME = _gauge(
    "gradwatch_last_good_checkpoint_timestamp_seconds",
    "When the newest checkpoint that is known good was written, in seconds since the epoch.",
    "training_job",
)

# ---------------------------------------------------------------- of single ranks

RANK_NONFINITE_EVENTS = _counter(
    "gradwatch_rank_nonfinite_events_total",
    "Reports of non-finite local gradients by a rank; only ranks that ever had one.",
    *("training_job", "rank", "host"),
)
RANK_INCIDENTS = _counter(
    "gradwatch_rank_incidents_total",
    "Confirmed incidents in which the rank was first; only ranks that ever were.",
    *("training_job", "rank", "host"),
)
RANK_LAST_INCIDENT = _gauge(
    "gradwatch_rank_last_incident_timestamp_seconds",
    "When the newest incident in which the rank was first was confirmed, in seconds since the epoch.",
    *("training_job", "rank", "host"),
)
RANK_SILENT_SECONDS = _gauge(
    "gradwatch_rank_silent_seconds",
    "Seconds since a rank of a running job last came further; only the 16 longest above 60 s.",
    *("training_job", "rank", "host"),
)

# ---------------------------------------------------------------- of the collector

POLICY_RELOADED = _gauge(
    "gradwatch_policy_last_reload_successful",
    "1 while every policy file is the one in force, 0 when one of them does not load.",
)
ACCESS_RELOADED = _gauge(
    "gradwatch_access_last_reload_successful",
    "1 while certificates and identities are those of their files, 0 when a changed file does not load.",
)
STORE_WRITABLE = _gauge(
    "gradwatch_store_writable",
    "1 while what is reported can be stored; 0 when it cannot, and nothing is acknowledged.",
)
NOTIFICATIONS = _counter(
    "gradwatch_notifications_total",
    "Incidents that the webhook was told of, by what became of it; only with a webhook.",
    "outcome",
)
SERIES_DROPPED = _counter(
    "gradwatch_series_dropped_total",
    "Series left out of answers to scrapes since there would be too many, summed over scrapes.",
)
BUILD_INFO = _gauge(
    "gradwatch_build_info",
    "1, with the collector's version.",
    "version",
)

ALL: tuple[Metric, ...] = tuple(value for value in dict(globals()).values() if isinstance(value, Metric))
