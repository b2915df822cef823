"""Start scripts in processes of their own without importing torch, diffusers and transformers again in each of them.

A server process imports these once and forks a child for each request. A child runs a script or module as `python`
would, with the arguments, environment, folder and files of the request. `accelerate launch` runs in such a child too:
accelerate reads its config file and torch's agent starts and watches the processes as always, except that a process is
a fork. `start(...)` and `run(...)` take the arguments of `subprocess.Popen` and `subprocess.run` that the tests use.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parent.parent
SERVER = "RLHF_T2I_TEST_SERVER"
"""Environment variable with the server's socket and the process that it ends with, as JSON."""
_MAX_REQUEST = 2**20
_PRELOADED = (
    "accelerate.commands.launch", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.run",
    "trl.trainer.reward_trainer",
    "transformers:CLIPTextModel", "transformers:CLIPTokenizerFast", "transformers:T5EncoderModel",
    "transformers:LlavaForConditionalGeneration", "diffusers:StableDiffusionPipeline",
    "diffusers:StableDiffusionXLPipeline", "diffusers:StableDiffusion3Pipeline", "diffusers:FluxPipeline",
    "diffusers:ZImagePipeline", "rlhf_t2i.models.load", "rlhf_t2i.report", "rlhf_t2i.rewards.llava_reward",
    "rlhf_t2i.training.trainer",
)  # fmt: skip
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


# --- the server -------------------------------------------------------------------------------------


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
                [sys.executable, "-m", "tests.processes", name, str(owner)],
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


def serve(address: str, owner: int) -> None:
    """Import what the scripts need, then answer each connection with a fork until the process `owner` has ended."""
    _preload()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        Path(f"{address}.new").rename(address)
        listener.settimeout(1.0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while _is_alive(owner):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                _watch(connection)
            connection.close()


def _preload() -> None:
    """Import the libraries and the project; nothing is computed, so that no thread exists when the server forks."""
    for name in _PRELOADED:
        module, _, part = name.partition(":")
        getattr(import_module(module), part or "__name__")  # diffusers and transformers import their parts on demand


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _watch(connection: socket.socket) -> NoReturn:
    """Fork the requested process, send its id, then its exit status as `subprocess` gives it; end with the client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, handles, _, _ = socket.recv_fds(connection, 8, 2)
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size:
        message += connection.recv(_MAX_REQUEST)
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(request, *handles)
    for handle in handles:
        os.close(handle)
    connection.sendall(f"{pid}\n".encode())
    with selectors.DefaultSelector() as selector:
        selector.register(ended := os.pidfd_open(pid), selectors.EVENT_READ)
        selector.register(connection, selectors.EVENT_READ)
        while ended not in (ready := {key.fd for key, _ in selector.select()}):
            if ready and not connection.recv(1):
                os._exit(0)  # the client has ended, which a script learns from the end of its parent
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Turn this fork into the requested process and run its script to the end."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    if request["new_session"]:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    subprocess.Popen = subprocess_handler.Popen = start  # type: ignore[assignment, misc]
    arguments = [argument for argument in request["arguments"] if argument != "-u"]
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    is_script = arguments[0] not in ("-m", "-c")
    sys.path[:] = [str(Path(arguments[0]).parent) if is_script else os.getcwd(), *path, *_BASE_PATH]
    sys.argv = arguments if is_script else arguments[1:]
    try:
        if arguments[:2] == ["-m", "accelerate.commands.launch"]:
            launch.main()  # as a module it would be executed a second time
        elif arguments[0] == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(0)


_BASE_PATH = [entry for entry in sys.path if entry not in ("", str(ROOT))]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
