"""Fork a child for each request of tests/processes.py: `python -m tests.process_server SOCKET OWNER`.

A child runs a script or module as `python` would, with the arguments, environment, folder and files of the request.
`accelerate launch` runs in such a child too: accelerate reads its config file and torch's agent starts and watches the
processes as always, except that a process is a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import ROOT, start

_MAX_REQUEST = 2**20
_PRELOADED = (
    "accelerate.commands.launch", "deepspeed.runtime.zero.muon.muon_optimizer", "diffusers.pipelines.onnx_utils",
    "diffusers.schedulers.scheduling_unipc_multistep", "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion", "torch.distributed.run", "transformers.models.llama.modeling_llama",
    "trl.trainer.reward_trainer", "transformers:CLIPTextModel", "transformers:CLIPTokenizerFast",
    "transformers:T5EncoderModel", "transformers:LlavaForConditionalGeneration", "diffusers:StableDiffusionPipeline",
    "diffusers:StableDiffusionXLPipeline", "diffusers:StableDiffusion3Pipeline", "diffusers:FluxPipeline",
    "diffusers:ZImagePipeline", "reward_model.backbones.llava", "rlhf_t2i.models.stable_diffusion", "rlhf_t2i.report",
    "rlhf_t2i.rewards.builtin", "rlhf_t2i.rewards.llava_reward",
    *(f"recipes.{path.stem}" for path in sorted((ROOT / "recipes").glob("*.py"))),
)  # fmt: skip


def serve(address: str, owner: int) -> None:
    """Import what the scripts need, then answer each connection with a fork until the process `owner` has ended."""
    _preload()
    gc.freeze()  # or a child copies the memory of all these objects when it looks for garbage
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
    code = 1
    try:
        if arguments[:2] == ["-m", "accelerate.commands.launch"]:
            launch.main()  # as a module it would be executed a second time
        elif arguments[0] == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End as the interpreter does, but without taking apart all that the server has imported, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


_BASE_PATH = [entry for entry in sys.path if entry not in ("", str(ROOT))]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
