"""The page behind HTTP: who asks is shown the open pair, and every answer is on the disk before the next pair comes.

    POST /enter    {"annotator", "token"}            the open pair; the token, where there is one, becomes a cookie
    POST /answer   {"annotator", "shown", "answer"}  the next pair; `shown` is what came with the one that is answered
    GET  /image/NAME, /results

A pair is {"annotator", "shown", "prompt", "left", "right", "following", "answered", "total"}. What goes wrong is
answered {"error": "the reason"}; with 409, where the pair was not the open one, {"error", "pair"}.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from rlhf_t2i.annotation.agreement import Choices, between_annotators, duels, with_reward
from rlhf_t2i.annotation.answers import Answers, Key, StaleError, annotator_name
from rlhf_t2i.annotation.questions import image_path
from rlhf_t2i.report import HEAD, STYLES

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
    from pydantic import BaseModel, ConfigDict
    from starlette.exceptions import HTTPException
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the page needs: pip install 'rlhf-t2i[serve]'") from error

_LOG = logging.getLogger("uvicorn.error")
_HERE = Path(__file__).parent
_COOKIE = "token"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Entry(BaseModel):
    """Who wants to answer."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    token: str = ""


class Reply(BaseModel):
    """What was pressed, and of which showing."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    shown: str
    answer: Key


class Service:
    """What the server does with each request."""

    def __init__(
        self, answers: Answers, *, secret: str | None, judge: tuple[str, Float[Tensor, "N 2"]] | None = None
    ) -> None:
        """`llava_reward` is a name, and its scores of both images of each question."""
        self.answers, self.secret, self.judge = answers, secret, judge
        self.images = {name for question in answers.questions for name in question.images}

    def page(self) -> Response:
        """The page that asks; it holds no data, so that who opens it need not know the token."""
        return HTMLResponse(_PAGE.render(styles=STYLES, wants_token=self.secret is not None), headers=_HEADERS)

    def script(self) -> Response:
        """What the page does."""
        return FileResponse(_HERE / "page.js", media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    def enter(self, entry: Entry, request: Request) -> Response:
        """The pair that is open for an annotator, on arrival and after a reload."""
        if not (knows := entry.token and self._is_token(entry.token)):
            self.check_token(request)
        response = self._pair(annotator_name(entry.annotator))
        if knows:
            response.set_cookie(_COOKIE, entry.token, httponly=True, samesite="strict")
        return response

    def answer(self, reply: Reply, request: Request) -> Response:
        """Take an answer; the next pair."""
        self.check_token(request)
        annotator = annotator_name(reply.annotator)
        try:
            self.answers.give(annotator, shown=reply.shown, key=reply.answer)
        except StaleError as error:
            return JSONResponse({"error": str(error), "pair": self.pair(annotator)}, 409)
        return self._pair(annotator)

    def image(self, name: str, request: Request) -> Response:
        """An image of a question. Names are looked up, never joined to a path: nothing else can be read."""
        self.check_token(request)
        if name not in self.images:
            raise HTTPException(404, "No question has an image of this name.")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(image_path(self.answers.folder, name), media_type="image/png", headers=headers)

    def results(self, request: Request) -> Response:
        """Who answered what, and who agrees."""
        self.check_token(request)
        standing, questions = self.answers.standing(), self.answers.questions
        choices: dict[str, Choices] = {
            annotator: {given.question: given.choice for given in own} for annotator, own in standing.items() if own
        }
        page = _RESULTS.render(
            run={"recipe": "Preferences"},
            started=self.answers.folder.name,
            standing={annotator: own for annotator, own in standing.items() if own},
            total=len(questions),
            duels=duels(standing, questions),
            between=between_annotators(choices),
            judged=with_reward(choices, self.judge[1], judge=self.judge[0]) if self.judge else [],
            judge=self.judge[0] if self.judge else None,
        )
        return HTMLResponse(page, headers={**_HEADERS, "Cache-Control": "no-store"})

    def pair(self, annotator: str) -> Mapping[str, Any]:
        """All that a browser is told: nothing in it says where an image came from."""
        showing, questions = self.answers.showing(annotator), self.answers.questions
        pair: dict[str, Any] = {
            "annotator": annotator,
            "shown": showing.token,
            "answered": showing.num_answered,
            "total": len(questions),
            "prompt": None,
            "following": list(questions[showing.following].images) if showing.following is not None else [],
        }
        if showing.question is None:
            return pair
        question = questions[showing.question]
        left, right = question.images if showing.first_on_left else reversed(question.images)
        # Sorted, because the order in which images are fetched ahead would tell which one was the first.
        return {**pair, "prompt": question.prompt, "left": left, "right": right, "following": sorted(pair["following"])}

    def _pair(self, annotator: str) -> JSONResponse:
        return JSONResponse(dict(self.pair(annotator)), headers={"Cache-Control": "no-store"})

    def check_token(self, request: Request) -> None:
        """Refuse who does not know the token; it comes as a cookie from browsers, as a header from scripts."""
        given = request.cookies.get(_COOKIE) or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.secret and not self._is_token(given):
            raise HTTPException(401, "The token is not this server's (RLHF_T2I_TOKEN).")

    def _is_token(self, given: str) -> bool:
        return self.secret is not None and hmac.compare_digest(given.encode(), self.secret.encode())


def create_app(service: Service) -> FastAPI:
    """The server as an ASGI application."""
    kinds = (HTTPException, RequestValidationError, ValueError, OSError)
    app = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(kinds, _refuse))
    app.add_api_route("/", service.page, response_model=None)
    app.add_api_route("/page.js", service.script, response_model=None)
    app.add_api_route("/enter", service.enter, methods=["POST"], response_model=None)
    app.add_api_route("/answer", service.answer, methods=["POST"], response_model=None)
    app.add_api_route("/image/{name}", service.image, response_model=None)
    app.add_api_route("/results", service.results, response_model=None)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    match error:
        case HTTPException():
            return JSONResponse({"error": error.detail}, error.status_code)
        case RequestValidationError():
            flaws = "; ".join(f"{flaw['loc'][-1]}: {flaw['msg']}" for flaw in error.errors())
            return JSONResponse({"error": f"The request cannot be understood: {flaws}."}, 422)
        case ValueError():
            return JSONResponse({"error": str(error)}, 422)
        case _:
            _LOG.error("An answer could not be kept.", exc_info=error)
            return JSONResponse({"error": f"The answer could not be kept: {error}"}, 507)


_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined)
_PAGE = _ENVIRONMENT.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
_RESULTS = _ENVIRONMENT.from_string(HEAD + (_HERE / "results.html").read_text(encoding="utf-8"))
