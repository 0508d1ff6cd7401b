"""The HTTP side: JSON API, metrics, probes for a supervisor, and the page."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from gradwatch.collector import document, metrics, page, schema
from gradwatch.collector.engine import Engine
from gradwatch.collector.errors import OperatorError, StoreError
from gradwatch.collector.policy.decision_document import as_document
from gradwatch.collector.version import collector_version

_PAGE_INCIDENTS = 50

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


def new_app(engine: Engine) -> FastAPI:
    """The application on an engine that is running."""
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

    app.include_router(_pages(engine))
    app.include_router(_jobs(engine))
    app.include_router(_incidents(engine))
    return app


def _pages(engine: Engine) -> APIRouter:
    router = APIRouter()
    registry = metrics.new_registry(lambda: engine.state, lambda: engine.dossiers, engine.policies)

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> Response:
        incidents = document.incidents(engine.state, engine.books, limit=_PAGE_INCIDENTS)
        html = page.render(document.jobs(engine.state, engine.books), incidents)
        return HTMLResponse(html, headers={"Content-Security-Policy": page.CONTENT_SECURITY_POLICY})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        return Response(metrics.render(registry), headers={"Content-Type": metrics.CONTENT_TYPE})

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

    @router.get("")
    async def get_jobs() -> list[schema.JobDocument]:
        return document.jobs(engine.state, engine.books)

    # A job's name may contain slashes: what can follow it is matched first.
    @router.get("/{job:path}/events")
    async def get_events(job: str, after: After = 0, limit: Limit = 1000) -> list[schema.EventDocument]:
        _must_know(engine, job)
        return [document.event(row) for row in await engine.events(job, after=after, limit=limit)]

    @router.get("/{job:path}/audit")
    async def get_audit(job: str, after: After = 0, limit: Limit = 1000) -> list[schema.AuditDocument]:
        _must_know(engine, job)
        return [document.audit(row) for row in await engine.audit(job, after=after, limit=limit)]

    # The header keeps web pages of others out: a browser asks before it sends one.
    @router.post("/{job:path}/rollback", status_code=202)
    async def post_rollback(job: str, wanted: schema.RollbackRequest, operator: Operator) -> dict[str, Any]:
        _must_know(engine, job)
        try:
            decision = await engine.roll_back(job, operator)
        except OperatorError as error:
            raise HTTPException(
                409, f"job {job!r} cannot go back to the {wanted.to} checkpoint: {error}"
            ) from None
        return as_document(decision)

    @router.get("/{job:path}")
    async def get_job(job: str) -> schema.JobDocument:
        _must_know(engine, job)
        return document.job(engine.state, job, engine.books)

    return router


def _incidents(engine: Engine) -> APIRouter:
    router = APIRouter(prefix="/api/v1/incidents")

    @router.get("")
    async def get_incidents(
        job: JobFilter = None, status: StatusFilter = None, limit: Limit = 100
    ) -> list[schema.IncidentDocument]:
        return document.incidents(engine.state, engine.books, job=job, status=status, limit=limit)

    @router.get("/{incident}")
    async def get_incident(incident: str) -> schema.IncidentDocument:
        known = engine.state.incidents.get(incident)
        if known is None:
            raise HTTPException(404, f"no incident {incident!r}; /api/v1/incidents lists them")
        return document.incident(known, engine.books)

    return router


def _must_know(engine: Engine, job: str) -> None:
    if job not in engine.state.jobs:
        known = ", ".join(sorted(engine.state.jobs)[:10]) or "none yet"
        raise HTTPException(404, f"no job {job!r} has reported here; known jobs: {known}")
