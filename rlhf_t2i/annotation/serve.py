"""The annotation page over HTTP. An answer is on disk before the response with the next pair.

    POST /enter    {"annotator", "token"}            returns the open pair; a token is stored as a cookie
    POST /answer   {"annotator", "shown", "answer"}  returns the next pair; `shown` is that of the answered pair
    GET  /image/NAME, /results, /answers.csv

A pair is {"annotator", "shown", "prompt", "left", "right", "following", "answered", "total", "criterion", "can_undo",
"seconds_per_answer"}, and "message" with the known answer after a question of the training round. An error is
{"error": "the reason"}; with status 409, if the pair is no longer open, {"error", "state"}.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from torch import Tensor

from rlhf_t2i.annotation.agreement import (
    Choices,
    between_annotators,
    disagreements,
    pairwise_win_rates,
    passed,
    with_reward,
)
from rlhf_t2i.annotation.answers import Answers, StaleError
from rlhf_t2i.annotation.http import HEADERS, EnterRequest, TokenGuard, make_app
from rlhf_t2i.annotation.questions import image_path
from rlhf_t2i.annotation.records import Key, annotator_name, seconds_per_answer
from rlhf_t2i.report.templating import STYLES, load_template, typeset

_HERE = Path(__file__).parent
_COLUMNS = (
    "annotator", "question", "prompt", "criterion", "choice", "first", "second", "first_on_left", "time", "role",
)  # fmt: skip
"""Columns of answers.csv."""
_NUM_DISAGREEMENTS = 24
"""Disagreements of annotators that the results page shows with their images."""


class AnswerRequest(BaseModel):
    """The body of POST /answer."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    shown: str
    answer: Key


class Service(TokenGuard):
    """The endpoints of the page."""

    def __init__(
        self,
        answers: Answers,
        *,
        secret: str | None,
        reward: tuple[str, Float[Tensor, "N 2"]] | None = None,
        guideline: str = "",
    ) -> None:
        """`reward` is the name of a reward and its scores of both images of each question, for the results page.

        `guideline` is plain text that tells annotators how to choose; its empty lines separate paragraphs.
        """
        self.guideline = [part.strip() for part in guideline.split("\n\n") if part.strip()]
        super().__init__(secret)
        self.answers, self.reward = answers, reward
        self.images = {name for question in answers.questions for name in question.images}

    def page(self) -> Response:
        """Return the page; it holds no data and needs no token."""
        return HTMLResponse(
            _PAGE.render(styles=STYLES, wants_token=self.secret is not None, guideline=self.guideline), headers=HEADERS
        )

    def enter(self, entry: EnterRequest, request: Request) -> Response:
        """Return the open pair of an annotator, on arrival and after a reload."""
        return self.entered(entry, request, lambda: self._pair(annotator_name(entry.annotator)))

    def answer(self, body: AnswerRequest, request: Request) -> Response:
        """Record an answer and return the next pair."""
        self.check_token(request)
        annotator = annotator_name(body.annotator)
        try:
            self.answers.record(annotator, shown=body.shown, key=body.answer)
        except StaleError as error:
            return JSONResponse({"error": str(error), "state": self.pair(annotator)}, 409)
        known = "" if body.answer in ("skip", "undo") else self.answers.known_answer(annotator)
        told = {"message": known} if known else {}
        return JSONResponse({**self.pair(annotator), **told}, headers={"Cache-Control": "no-store"})

    def image(self, name: str, request: Request) -> Response:
        """Return an image of a question; only names in the list are joined to a path, so nothing else can be read."""
        self.check_token(request)
        if name not in self.images:
            raise HTTPException(404, "No question has an image of this name.")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(image_path(self.answers.folder, name), media_type="image/png", headers=headers)

    def results(self, request: Request) -> Response:
        """Return the page with counts, win rates and agreement; while people still answer, only if asked with ?show=1.

        Whoever sees the answers of others, or the sources of images, no longer answers for themselves.
        """
        self.check_token(request)
        questions = self.answers.questions
        unfinished = [name for name, own in self.answers.current().items() if 0 < len(own) < len(questions)]
        if unfinished and request.query_params.get("show") != "1":
            return HTMLResponse(
                _WAIT.render(run={"recipe": "Preferences"}, started=self.answers.folder.name, unfinished=unfinished),
                headers={**HEADERS, "Cache-Control": "no-store"},
            )
        everything = {annotator: own for annotator, own in self.answers.current().items() if own}
        answers = {
            name: [one for one in own if questions[one.question].role == "question"] for name, own in everything.items()
        }
        checks = {
            role: {name: passed(own, questions, role=role) for name, own in everything.items()}
            for role in ("training", "check")
            if any(question.role == role for question in questions)
        }
        choices: dict[str, Choices] = {
            annotator: {answer.question: answer.choice for answer in own} for annotator, own in answers.items()
        }
        page = _RESULTS.render(
            run={"recipe": "Preferences"},
            started=self.answers.folder.name,
            answers=answers,
            total=sum(question.role == "question" for question in questions),
            checks=checks,
            win_rates=pairwise_win_rates(answers, questions),
            questions=questions,
            own_images=True,
            disagreements=list(disagreements(choices).items())[:_NUM_DISAGREEMENTS],
            num_disagreements=len(disagreements(choices)),
            pace={name: seconds_per_answer(own) for name, own in answers.items()},
            between=between_annotators(choices),
            with_reward=with_reward(choices, self.reward[1], reward=self.reward[0]) if self.reward else [],
            reward=self.reward[0] if self.reward else None,
        )
        return HTMLResponse(page, headers={**HEADERS, "Cache-Control": "no-store"})

    def download(self, request: Request) -> Response:
        """Return all current answers as a table."""
        self.check_token(request)
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(_COLUMNS)
        for name, own in self.answers.current().items():
            for one in own:
                question = self.answers.questions[one.question]
                row = [name, one.question, question.prompt, question.criterion or "", one.choice]
                row += [*question.sources, one.first_on_left, one.time.isoformat() if one.time else "", question.role]
                table.writerow([_cell(value) for value in row])
        headers = {"Cache-Control": "no-store", "Content-Disposition": 'attachment; filename="answers.csv"'}
        return Response(text.getvalue(), media_type="text/csv; charset=utf-8", headers=headers)

    def pair(self, annotator: str) -> Mapping[str, Any]:
        """Return the open pair as the browser gets it, without the sources of its images."""
        open_pair, questions = self.answers.open_pair(annotator), self.answers.questions
        pair: dict[str, Any] = {
            "annotator": annotator,
            "shown": open_pair.token,
            "answered": open_pair.num_answered,
            "total": len(questions),
            "prompt": None,
            "criterion": None,
            "can_undo": open_pair.can_undo,
            "seconds_per_answer": seconds_per_answer(self.answers.current().get(annotator, [])),
            "following": list(questions[open_pair.following].images) if open_pair.following is not None else [],
        }
        if open_pair.question is None:
            return pair
        question = questions[open_pair.question]
        left, right = question.images if open_pair.first_on_left else reversed(question.images)
        # Sorted, because the order of prefetching would reveal which image is the first of its question.
        shown = {"prompt": question.prompt, "criterion": question.criterion, "left": left, "right": right}
        return {**pair, **shown, "following": sorted(pair["following"])}

    def _pair(self, annotator: str) -> JSONResponse:
        return JSONResponse(dict(self.pair(annotator)), headers={"Cache-Control": "no-store"})


def create_app(service: Service, *, loopback: bool = True) -> FastAPI:
    """Return the server as an ASGI application; with `loopback` it answers to the names of its own machine only."""
    return make_app(
        loopback=loopback,
        script="page.js",
        get={
            "/": service.page, "/image/{name}": service.image, "/results": service.results,
            "/answers.csv": service.download,
        },
        post={"/enter": service.enter, "/answer": service.answer},
    )  # fmt: skip


def _cell(value: object) -> str:
    """Return a value as text that a spreadsheet does not take for a formula."""
    text = str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined)
_PAGE = _ENVIRONMENT.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
_RESULTS = load_template(_HERE / "results.html", typeset=typeset)
_WAIT = load_template(_HERE / "wait.html")
