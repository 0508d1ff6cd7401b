"""Who asks, for the HTTP application."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from gradwatch.collector.access.http_gate import IDENTITY
from gradwatch.collector.access.identity import ME, Identity


class MeDocument(BaseModel):
    """Who asks, and what that allows; no name where the shared token was shown, or nothing is wanted."""

    identity: str | None
    role: Literal["agent", "viewer", "operator"]
    jobs: list[str]


def _who(request: Request) -> Identity:
    # Never absent behind the gate; without one, nobody is let in.
    identity: Identity = request.scope[IDENTITY]
    return identity


Who = Annotated[Identity, Depends(_who)]

router = APIRouter()


@router.get(ME)
async def get_me(who: Who) -> MeDocument:
    """Tell who asks."""
    return MeDocument(identity=who.name, role=who.role.value, jobs=list(who.jobs))
