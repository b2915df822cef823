"""A page of all runs under a folder, served while they train: `python -m rlhf_t2i.report --runs FOLDER --serve`.

GET /            the runs, newest first; the page loads itself again every 10 seconds
GET /run/NAME    the report of one run, made anew from its files
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from rlhf_t2i.output.run_folder import LOCK, REPORT, RUN_INFO, is_reward_model, is_search, read_config, read_run_info
from rlhf_t2i.report.checks import findings
from rlhf_t2i.report.page import render_report, state
from rlhf_t2i.report.templating import TEMPLATES, load_template, typeset
from rlhf_t2i.training.changes import reward_changes
from rlhf_t2i.training.metrics import by_step, read_metrics, trained_rewards

try:
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, PlainTextResponse, Response

    from rlhf_t2i.http_server import Guard
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; --serve needs: pip install 'rlhf-t2i[serve]'") from error

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
REFRESH_SECONDS = 10
"""Time after which the page of all runs loads itself again."""
_MAX_DEPTH = 3
"""Folders below the given one in which runs are looked for."""
_WITHOUT_TRAINING = {"evaluation", "reward_model_evaluation", "preferences"}
"""Recipes of runs that train and search nothing."""
_SHOWN_IN_RUNS = {"images", "checkpoints", "pairs"}
"""Folders of a run that hold no further runs."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One row of the page."""

    name: str
    recipe: str
    started: str
    state: str
    is_alive: bool
    """True if a process holds the run folder's lock."""
    rewards: str = ""
    """Rewards that are trained on."""
    changes: tuple[str, ...] = ()
    """The change of each evaluated reward."""
    warnings: tuple[str, ...] = ()
    error: str = ""
    """Why the run could not be read, such as a file that is half written."""

    has_page: bool = True
    """True if the run has a report that can be shown."""

    @property
    def link(self) -> str:
        return f"/run/{quote(self.name)}"


def find_runs(root: Path) -> dict[str, Path]:
    """Return the run folders under `root`, by their path relative to it; links to folders are not followed."""
    found: dict[str, Path] = {}
    for text, folders, files in os.walk(root):
        folder = Path(text)
        if RUN_INFO in files:
            found[folder.relative_to(root).as_posix()] = folder
        is_deep = len(folder.relative_to(root).parts) >= _MAX_DEPTH
        folders[:] = [] if is_deep else sorted(one for one in folders if one not in _SHOWN_IN_RUNS and one[0] != ".")
    return found


def summary(name: str, folder: Path) -> Summary:
    """Return the row of a run; a folder that cannot be read, or not yet, has an error instead of an exception."""
    try:
        run = read_run_info(folder)
        started, alive = f"{datetime.fromisoformat(run['started']):%Y-%m-%d %H:%M}", is_alive(folder)
        short = Summary(name, run["recipe"], started, "Running" if alive else "Ended", alive)
        if _has_finished_page(folder):
            return replace(short, has_page=(folder / REPORT).is_file())
        rows, config = read_metrics(folder), read_config(folder)
        changes = tuple(typeset(f"{c.name} {c.before} to {c.after}, z {c.z_text}") for c in reward_changes(rows))
        warnings = tuple(one.summary or one.title for one in findings(rows, config) if one.state == "warning")
        now = state(rows, config)
        now += "" if now.startswith("Finished") or alive or not by_step(rows, "train") else ", not running"
        rewards = ", ".join(trained_rewards(rows))
        return replace(short, state=now, rewards=rewards, changes=changes, warnings=warnings)
    except Exception as error:  # damaged and half-written files fail in as many ways as there are files
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Summary(name, "unknown", "", "Not readable", is_alive=False, error=text[:300])


def _has_finished_page(folder: Path) -> bool:
    """Return True for a run whose page, if any, is the file in its folder, and not made anew from its metrics."""
    return is_search(folder) or is_reward_model(folder) or read_run_info(folder)["recipe"] in _WITHOUT_TRAINING


def is_alive(folder: Path) -> bool:
    """Return True if the process that claimed a run folder, on this machine, still lives.

    The lock itself is not tried: for an instant that would keep a run from starting.
    """
    try:
        words = (folder / LOCK).read_text(encoding="utf-8").split()
        process = next(int(word) for word in words if word.isdecimal())
        if platform.node() not in words:
            return False
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except (OSError, ValueError, StopIteration):
        return False
    return True


def render_overview(root: Path, runs: Sequence[Summary]) -> str:
    """Return the page of all runs."""
    return _PAGE.render(root=root, runs=runs, seconds=REFRESH_SECONDS, run={"recipe": "Runs"}, started=str(root))


def create_app(root: Path, *, loopback: bool = True, secret: str | None = None) -> FastAPI:
    """Return the server as an ASGI application; with a `secret` it asks for it as the password of any user name."""

    def allow(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given).decode().partition(":")[2]
        if secret and not hmac.compare_digest(given.encode(), secret.encode()):
            raise HTTPException(401, "The token is not that of this server.", {"WWW-Authenticate": "Basic"})

    def overview(request: Request) -> Response:
        allow(request)
        runs = [summary(name, folder) for name, folder in find_runs(root).items()]
        runs.sort(key=lambda one: one.started, reverse=True)
        return HTMLResponse(render_overview(root, runs), headers=_HEADERS)

    def run(name: str, request: Request) -> Response:
        """Only names that a search of the folder finds are joined to a path, so nothing else can be read."""
        allow(request)
        folder = find_runs(root).get(name)
        if folder is None:
            raise HTTPException(404, "There is no run of this name.")
        if _has_finished_page(folder):
            if not (folder / REPORT).is_file():
                raise HTTPException(404, "The run has no report.")
            return HTMLResponse((folder / REPORT).read_text(encoding="utf-8"), headers=_HEADERS)
        return HTMLResponse(render_report(folder), headers=_HEADERS)

    app = FastAPI(openapi_url=None, exception_handlers={HTTPException: _refuse, Exception: _refuse})
    app.add_middleware(Guard, loopback=loopback, max_body_bytes=2**10)
    app.add_api_route("/", overview, response_model=None)
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), response_model=None)
    app.add_api_route("/run/{name:path}", run, response_model=None)
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    """Answer with the reason; a file that is half written fails in as many ways as there are files."""
    status = error.status_code if isinstance(error, HTTPException) else 503
    text = error.detail if isinstance(error, HTTPException) else f"The run cannot be shown now: {error}"
    return PlainTextResponse(text, status, headers=getattr(error, "headers", None))


_PAGE = load_template(TEMPLATES / "overview.html")
