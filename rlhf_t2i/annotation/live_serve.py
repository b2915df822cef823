"""The page of live votes over HTTP, beside the training that it teaches. A vote is on disk before the response.

    POST /enter    {"annotator", "token"}                returns the state; a token is stored as a cookie
    POST /vote     {"annotator", "shown", "vote"}        returns the next state
    POST /pause    {"annotator", "paused"}               pauses or continues training
    GET  /state?annotator=NAME, /image/NAME

`shown` is that of the question, or for the vote "undo" the `undo` of the state. A state is {"annotator", "question":
{"shown", "prompt", "images", "step"} or null, "kind", "votes", "own_votes", "undo", "message", "training": {...}}. An
error is {"error": "the reason"}; with status 409, if the vote cannot count any more, {"error", "state"}.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from rlhf_t2i.annotation.answers import StaleError
from rlhf_t2i.annotation.http import HEADERS, EnterRequest, TokenGuard, make_app
from rlhf_t2i.annotation.live_records import VoteKey
from rlhf_t2i.annotation.live_votes import LiveVotes
from rlhf_t2i.annotation.questions import image_path
from rlhf_t2i.annotation.records import annotator_name
from rlhf_t2i.http_server import listens_on_loopback, make_server
from rlhf_t2i.report.templating import STYLES, load_template

_HERE = Path(__file__).parent
_LAST_VOTES = 50
"""Votes of which the page says how many the reward model foresaw."""
_FAREWELL_SECONDS = 4.0
"""Time after the end for which the page is served, so that open browsers learn of it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Images of the same prompt and seed before training, after the last step but one, and now."""

    prompt: str
    images: tuple[str, str, str]
    better_than_start: float
    """Probability, by the reward model, that the image of now is preferred to that before training."""
    better_than_last: float


@dataclass(slots=True)
class TrainingState:
    """What the page says about training; changed in the training's thread, but for `paused_by`."""

    phase: str = "starting"
    step: int = 0
    num_steps: int = 0
    paused_by: str | None = None
    failure: str | None = None
    has_ended: bool = False
    certainty: float | None = None
    """Mean probability of the preference that the reward model expects between two images of this step."""
    progress: list[Progress] = field(default_factory=list[Progress])


class VoteRequest(BaseModel):
    """The body of POST /vote."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    shown: str
    vote: VoteKey


class PauseRequest(BaseModel):
    """The body of POST /pause."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    paused: bool


class LiveService(TokenGuard):
    """The endpoints of the page."""

    def __init__(self, votes: LiveVotes, training: TrainingState, *, secret: str | None, guideline: str = "") -> None:
        """`guideline` is plain text that tells annotators how to choose; its empty lines separate paragraphs."""
        super().__init__(secret)
        self.votes, self.training = votes, training
        self.last_request = -math.inf
        """Time, on the monotonic clock, at which a browser last asked for the state."""
        self.guideline = [part.strip() for part in guideline.split("\n\n") if part.strip()]

    def page(self) -> Response:
        """Return the page; it holds no data and needs no token."""
        text = _PAGE.render(
            styles=STYLES, wants_token=self.secret is not None, guideline=self.guideline, kind=self.votes.kind
        )
        return HTMLResponse(text, headers=HEADERS)

    def enter(self, entry: EnterRequest, request: Request) -> Response:
        """Return the state for an annotator, on arrival and after a reload."""
        return self.entered(entry, request, lambda: self._state(annotator_name(entry.annotator)))

    def state(self, annotator: str, request: Request) -> Response:
        """Return the state for an annotator, which the page asks for every second."""
        self.check_token(request)
        return self._state(annotator_name(annotator))

    def vote(self, body: VoteRequest, request: Request) -> Response:
        """Record a vote and return the next state."""
        self.check_token(request)
        annotator = annotator_name(body.annotator)
        try:
            message = self.votes.vote(annotator, shown=body.shown, key=body.vote)
        except StaleError as error:
            return JSONResponse({"error": str(error), "state": self.state_of(annotator)}, 409)
        return self._state(annotator, message)

    def pause(self, body: PauseRequest, request: Request) -> Response:
        """Pause training after its current step, or let it go on; anybody may do both."""
        self.check_token(request)
        annotator = annotator_name(body.annotator)
        self.training.paused_by = annotator if body.paused else None
        return self._state(annotator)

    def image(self, name: str, request: Request) -> Response:
        """Return an image of a question or of the progress."""
        self.check_token(request)
        if not name.isalnum() or not image_path(self.votes.folder, name).is_file():
            raise HTTPException(404, "There is no image of this name.")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(image_path(self.votes.folder, name), media_type="image/png", headers=headers)

    def _state(self, annotator: str, message: str = "") -> JSONResponse:
        return JSONResponse(self.state_of(annotator, message), headers={"Cache-Control": "no-store"})

    def state_of(self, annotator: str, message: str = "") -> dict[str, Any]:
        """Return the state for an annotator, with a message to show."""
        self.last_request = time.monotonic()
        shown = None if self.training.has_ended or self.training.failure else self.votes.shown(annotator)
        hits, total = self.votes.foreseen(last=_LAST_VOTES)
        question = None if shown is None else {
            "shown": shown.token, "prompt": str(shown.question.prompt), "images": shown.images,
            "step": shown.question.step,
        }  # fmt: skip
        return {
            "annotator": annotator, "question": question, "kind": self.votes.kind, "votes": self.votes.num_votes,
            "own_votes": self.votes.votes_of(annotator), "undo": self.votes.last_vote(annotator),
            "message": message,
            "training": {**asdict(self.training), "foreseen": hits, "foreseen_of": total},
        }  # fmt: skip


def create_app(service: LiveService, *, loopback: bool = True) -> FastAPI:
    """Return the server as an ASGI application; with `loopback` it answers to the names of its own machine only."""
    return make_app(
        loopback=loopback,
        script="live.js",
        get={"/": service.page, "/state": service.state, "/image/{name}": service.image},
        post={"/enter": service.enter, "/vote": service.vote, "/pause": service.pause},
    )


@contextmanager
def serving(service: LiveService, listener: socket) -> Iterator[str]:
    """Serve the page in a thread of its own within the context; yields its address.

    If the context ends with an error, or at its end, the page says so for some seconds to those whose browsers are
    open.
    """
    server = make_server(
        create_app(service, loopback=listens_on_loopback(listener)), log_level="warning", timeout_graceful_shutdown=2
    )
    listener.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        service.training.has_ended = True
    except BaseException as error:
        service.training.failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise
    finally:
        service.votes.withdraw_all()
        if time.monotonic() - service.last_request < _FAREWELL_SECONDS:
            time.sleep(_FAREWELL_SECONDS)
        server.should_exit = True
        thread.join(timeout=10)


_PAGE = load_template(_HERE / "live.html")
