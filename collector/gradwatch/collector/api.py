"""The HTTP side: JSON API, metrics, probes for a supervisor, and the page."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry

from gradwatch.collector import document, schema
from gradwatch.collector.access import asking
from gradwatch.collector.access.asking import Who
from gradwatch.collector.access.door import Door
from gradwatch.collector.access.identity import Identity
from gradwatch.collector.access.sight import seen_by
from gradwatch.collector.boundary import BoundaryDocument
from gradwatch.collector.engine import Engine
from gradwatch.collector.errors import OperatorError, StoreError
from gradwatch.collector.metrics import exposition
from gradwatch.collector.model import Incident
from gradwatch.collector.notify.webhook import Notifier
from gradwatch.collector.page import assets
from gradwatch.collector.picture.drawings import Drawings
from gradwatch.collector.picture.schema import PictureDocument
from gradwatch.collector.policy.decision_document import as_document
from gradwatch.collector.version import collector_version

JobFilter = Annotated[str | None, Query(description="Only of this job.")]
StatusFilter = Annotated[
    Literal["suspected", "confirmed", "closed", "open"] | None,
    Query(description="Only in this status; open stands for suspected and confirmed."),
]
Limit = Annotated[int, Query(ge=1, le=10_000)]
Operator = Annotated[
    str, Header(alias="X-Gradwatch-Operator", min_length=1, max_length=200, description="Who asks for it.")
]
After = Annotated[int, Query(ge=0, description="Only those whose id is above this one.")]


def new_app(
    engine: Engine,
    door: Door,
    notifier: Notifier | None = None,
    max_series: int = exposition.MAX_SERIES,
) -> FastAPI:
    """The application on an engine that is running, to lie behind a `HttpGate`.

    Args:
        engine: whose state is shown.
        door: tells whether what it was given is in force.
        notifier: whose counts are told to Prometheus.
        max_series: at most so many series are.
    """
    app = FastAPI(
        title="Gradwatch",
        version=collector_version(),
        description="Who was first: incidents of non-finite gradients, by job.",
        docs_url=None,
        redoc_url=None,
    )

    @app.exception_handler(StoreError)
    async def _unavailable(_request: Request, error: StoreError) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=503)

    source = exposition.Source(
        state=lambda: engine.state,
        dossiers=lambda: engine.dossiers,
        policies_reloaded=lambda: engine.policies.last_reload_successful,
        access_reloaded=lambda: door.last_reload_successful,
        store_writable=lambda: engine.healthy,
        clock=engine.clock,
        notifications=dict if notifier is None else lambda: notifier.counts,
    )
    # Pictures of large jobs are long, and say the same again and again.
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=3)
    app.include_router(asking.router)
    app.include_router(assets.router())
    app.include_router(_probes(engine, exposition.new_registry(source, max_series)))
    app.include_router(_jobs(engine))
    app.include_router(_incidents(engine))
    return app


def _probes(engine: Engine, registry: CollectorRegistry) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics(accept: Annotated[str | None, Header()] = None) -> Response:
        text, content_type = exposition.render(registry, accept)
        return Response(text, headers={"Content-Type": content_type})

    @router.get("/-/healthy", response_class=PlainTextResponse)
    async def get_healthy() -> str:
        return "healthy\n"

    @router.get("/-/ready", response_class=PlainTextResponse)
    async def get_ready() -> Response:
        if engine.healthy:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("the store cannot be written\n", status_code=503)

    return router


def _jobs(engine: Engine) -> APIRouter:
    router = APIRouter(prefix="/api/v1/jobs")
    drawings = Drawings(engine)

    @router.get("")
    async def get_jobs(who: Who) -> list[schema.JobDocument]:
        return document.jobs(seen_by(who, engine.state), engine.books)

    # A job's name may contain slashes: what can follow it is matched first.
    @router.get("/{job:path}/events")
    async def get_events(
        job: str, who: Who, after: After = 0, limit: Limit = 1000
    ) -> list[schema.EventDocument]:
        _must_know(engine, job, who)
        return [document.event(row) for row in await engine.events(job, after=after, limit=limit)]

    @router.get("/{job:path}/audit")
    async def get_audit(
        job: str, who: Who, after: After = 0, limit: Limit = 1000
    ) -> list[schema.AuditDocument]:
        _must_know(engine, job, who)
        return [document.audit(row) for row in await engine.audit(job, after=after, limit=limit)]

    @router.get("/{job:path}/picture", response_model=PictureDocument)
    async def get_picture(
        job: str, who: Who, if_none_match: Annotated[str | None, Header()] = None
    ) -> Response:
        _must_know(engine, job, who)
        drawn = drawings.of(job)
        headers = {"ETag": drawn.etag, "Cache-Control": "no-cache"}
        if if_none_match == drawn.etag:
            return Response(status_code=304, headers=headers)
        return Response(drawn.json, media_type="application/json", headers=headers)

    # The header keeps web pages of others out: a browser asks before it sends one.
    @router.post("/{job:path}/rollback", status_code=202)
    async def post_rollback(
        job: str, wanted: schema.RollbackRequest, operator: Operator, who: Who
    ) -> dict[str, Any]:
        _must_know(engine, job, who)
        try:
            # Whoever has proved a name is called by it, whatever the header says.
            decision = await engine.roll_back(job, who.name or operator)
        except OperatorError as error:
            raise HTTPException(
                409, f"job {job!r} cannot go back to the {wanted.to} checkpoint: {error}"
            ) from None
        return as_document(decision)

    @router.get("/{job:path}")
    async def get_job(job: str, who: Who) -> schema.JobDocument:
        _must_know(engine, job, who)
        return document.job(engine.state, job, engine.books)

    return router


def _incidents(engine: Engine) -> APIRouter:
    router = APIRouter(prefix="/api/v1/incidents")

    @router.get("")
    async def get_incidents(
        who: Who, job: JobFilter = None, status: StatusFilter = None, limit: Limit = 100
    ) -> list[schema.IncidentDocument]:
        seen = seen_by(who, engine.state)
        return document.incidents(seen, engine.books, job=job, status=status, limit=limit)

    @router.get("/{incident}")
    async def get_incident(incident: str, who: Who) -> schema.IncidentDocument:
        return document.incident(_known(engine, incident, who), engine.books)

    @router.get("/{incident}/boundary")
    async def get_boundary(incident: str, who: Who) -> BoundaryDocument:
        return await engine.boundary(_known(engine, incident, who))

    return router


def _known(engine: Engine, incident: str, who: Identity) -> Incident:
    known = seen_by(who, engine.state).incidents.get(incident)
    if known is None:
        raise HTTPException(404, f"no incident {incident!r}; /api/v1/incidents lists them")
    return known


def _must_know(engine: Engine, job: str, who: Identity) -> None:
    jobs = seen_by(who, engine.state).jobs
    if job not in jobs:
        known = ", ".join(sorted(jobs)[:10]) or "none yet"
        raise HTTPException(404, f"no job {job!r} has reported here; known jobs: {known}")
