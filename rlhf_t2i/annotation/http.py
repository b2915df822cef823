"""What the annotation pages share: their headers, scripts, the token, the entrance, and answers to wrong requests."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse
    from pydantic import BaseModel, ConfigDict
    from starlette.exceptions import HTTPException

    from rlhf_t2i.http_server import Guard
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the annotation page needs: pip install 'rlhf-t2i[serve]'") from error

_LOG = logging.getLogger("uvicorn.error")
_COOKIE = "token"
_MAX_BODY_BYTES = 2**16
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class EnterRequest(BaseModel):
    """The body of POST /enter."""

    model_config = ConfigDict(extra="forbid")
    annotator: str
    token: str = ""


class TokenGuard:
    """Endpoints behind the token of the server, if it has one."""

    def __init__(self, secret: str | None) -> None:
        self.secret = secret

    def entered(self, entry: EnterRequest, request: Request, respond: Callable[[], Response]) -> Response:
        """Return the response to somebody with the token, who gets it as a cookie; raises HTTPException 401 else."""
        if not (has_token := entry.token and self._is_token(entry.token)):
            self.check_token(request)
        response = respond()
        if has_token:
            response.set_cookie(_COOKIE, entry.token, httponly=True, samesite="strict")
        return response

    def check_token(self, request: Request) -> None:
        """Raise HTTPException 401 for a wrong token; browsers send it as a cookie, scripts as a header."""
        given = request.cookies.get(_COOKIE) or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.secret and not self._is_token(given):
            raise HTTPException(401, "The token is not that of this server (RLHF_T2I_TOKEN).")

    def _is_token(self, given: str) -> bool:
        return self.secret is not None and hmac.compare_digest(given.encode(), self.secret.encode())


def make_app(
    *, loopback: bool, script: str, get: Mapping[str, Callable[..., Any]], post: Mapping[str, Callable[..., Any]]
) -> FastAPI:
    """Return endpoints, and the script of a page, as an ASGI application.

    With `loopback` it answers to the names of its own machine only.
    """
    kinds = (HTTPException, RequestValidationError, ValueError, OSError)
    app = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(kinds, _refuse))
    app.add_middleware(Guard, loopback=loopback, max_body_bytes=_MAX_BODY_BYTES)
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), response_model=None)
    for name in ("shared.js", script):
        app.add_api_route(f"/{name}", partial(_script, name), response_model=None)
    for method, endpoints in (("GET", get), ("POST", post)):
        for path, endpoint in endpoints.items():
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


def _script(name: str) -> Response:
    path = Path(__file__).parent / name
    return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "no-cache"})


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    match error:
        case HTTPException():
            return JSONResponse({"error": error.detail}, error.status_code)
        case RequestValidationError():
            flaws = "; ".join(f"{flaw['loc'][-1]}: {flaw['msg']}" for flaw in error.errors())
            return JSONResponse({"error": f"The request is invalid: {flaws}."}, 422)
        case ValueError():
            return JSONResponse({"error": str(error)}, 422)
        case _:
            _LOG.error("An answer could not be saved.", exc_info=error)
            return JSONResponse({"error": f"The answer could not be saved: {error}"}, 507)
