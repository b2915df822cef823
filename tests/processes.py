"""Start scripts in processes of their own without importing torch, diffusers and transformers again in each of them.

The server of tests/process_server.py imports these once and forks a child for each request. `start(...)` and `run(...)`
take the arguments of `subprocess.Popen` and `subprocess.run` that the tests use.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
SERVER = "RLHF_T2I_TEST_SERVER"
"""Environment variable with the server's socket and the process that it ends with, as JSON."""
_Popen = subprocess.Popen


class Process:
    """A forked process with the interface of `subprocess.Popen` as far as the tests and torch's agent use it."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        self.args, self.returncode = list(arguments), None
        self.stdout, out = _output(stdout, 1, text=text)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _output(stderr, 2, text=text)
        request = {
            "arguments": [str(argument) for argument in arguments[1:]],
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": start_new_session,
        }
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_address())
        message = json.dumps(request).encode()
        socket.send_fds(self._socket, [len(message).to_bytes(8, "big")], [out, err])
        self._socket.sendall(message)
        self._answers = self._socket.makefile("r")
        self.pid = int(self._answers.readline())
        for handle, given in ((out, stdout), (err, stderr)):
            if given == subprocess.PIPE:
                os.close(handle)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(self._answers.readline())
            self._disconnect()
        return self.returncode

    def _disconnect(self) -> None:
        self._answers.close()
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_answers"):
            self._disconnect()

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read both outputs to their end, then wait. Only one of them may be a pipe."""
        texts: list[Any] = []
        for stream in (self.stdout, self.stderr):
            texts.append(stream.read() if stream and not stream.closed else None)
            if stream:
                stream.close()
        self.wait(timeout)
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def start(args: Sequence[str], **options: Any) -> Any:
    """`subprocess.Popen`; a Python script or `-m module` is forked from the server."""
    return Process(args, **options) if _can_fork(args) else _Popen(args, **options)


def run(
    arguments: Sequence[str],
    *,
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text. The project is importable in it, and no model hub is asked."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(env or {})}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(arguments, cwd=cwd, env=environment, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


def _can_fork(arguments: Sequence[Any]) -> bool:
    """True for `python [-u] SCRIPT.py ...`, `python [-u] -m MODULE ...` and `python -c CODE`."""
    rest = [str(argument) for argument in arguments]
    if not rest or rest[0] != sys.executable:
        return False
    rest = [argument for argument in rest[1:3] if argument != "-u"]
    return bool(rest) and (rest[0] in ("-m", "-c") or rest[0].endswith(".py"))


def _output(given: int | IO[Any] | None, default: int, *, text: bool) -> tuple[IO[Any] | None, int]:
    """Return the stream to read from, if the output is a pipe, and the file descriptor for the child."""
    match given:
        case subprocess.PIPE:
            read, write = os.pipe()
            return os.fdopen(read, "r" if text else "rb"), write
        case subprocess.DEVNULL:
            return None, os.open(os.devnull, os.O_WRONLY)
        case None:
            return None, default
        case int():
            return None, given
        case _:
            return None, given.fileno()


def reserve_server() -> None:
    """Name the server of this test run, which it ends with; workers that are started later share it."""
    folder = tempfile.mkdtemp(prefix="rlhf-t2i-")
    os.environ[SERVER] = json.dumps([f"{folder}/server", os.getpid()])


def _address() -> str:
    """Return the socket of the running server; the first that asks for it starts it."""
    if SERVER not in os.environ:
        reserve_server()
    name, owner = json.loads(os.environ[SERVER])
    address, server = Path(name), None
    if not address.exists():
        with contextlib.suppress(FileExistsError):  # another worker is starting it
            address.with_name("starting").touch(exist_ok=False)
            server = _Popen(
                [sys.executable, "-m", "tests.process_server", name, str(owner)],
                cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        deadline = time.monotonic() + 240
        while not address.exists():
            if time.monotonic() > deadline or (server is not None and server.poll() is not None):
                raise RuntimeError("The server of test processes did not start.")
            time.sleep(0.05)
        if server is not None:
            server.returncode = 0  # it ends with the test run, not with this object
    return name
