"""Ends a job of several processes one of which stands still, as after SIGSTOP or on a file system that hangs."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar, runtime_checkable

from rlhf_t2i.errors import exit_with

Value = TypeVar("Value", int, str)
_NO_BEAT = "0 0 unknown unknown"


@runtime_checkable
class Store(Protocol):
    """What the processes write to one another; torch's TCPStore is one."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class Watch:
    """One process's watch over all.

    A thread writes a heartbeat, and the number of `tick`s of the process's work. A process stands still if its
    heartbeat has not changed for `seconds`, as when it is stopped, or if no process has ticked for as long and it has
    ticked less often than another, which waits for it.
    """

    def __init__(
        self, store: Store, *, rank: int, num_processes: int, seconds: float, end: Callable[[str], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`end` is called with a sentence about the process that stands still, and should not return."""
        self._store, self._rank, self._seconds, self._end, self._now = store, rank, seconds, end, now
        self._others = [other for other in range(num_processes) if other != rank]
        self._num_beats = self._num_ticks = 0
        self._beats: dict[int, tuple[str, float]] = {}
        self._ticks: dict[int, tuple[int, float]] = {}
        self._last = now()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Write the first heartbeat and start the thread."""
        self.beat()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Tell the others that this process is no longer to be watched, and stop the thread."""
        self._stopped.set()
        self._write("ended")

    def tick(self) -> None:
        """Count a part of the work; a collective call is counted before it, so that who waits in it has counted it."""
        self._num_ticks += 1

    def beat(self) -> None:
        """Write this process's heartbeat and read the others'."""
        now, self._num_beats = self._now(), self._num_beats + 1
        if now - self._last > self._seconds / 2:  # this process has slept itself, perhaps with all others
            self._beats.clear()
            self._ticks.clear()
        self._last = now
        self._write(self._heartbeat())
        self._note(self._ticks, self._rank, self._num_ticks)
        running = dict[int, str]()
        for rank in self._others:
            text = self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else _NO_BEAT
            if text != "ended":
                self._note(self._beats, rank, text)
                self._note(self._ticks, rank, int(text.split()[1]))
                running[rank] = text
        self._check(running)

    def _check(self, running: dict[int, str]) -> None:
        silent = [rank for rank in running if self._is_old(self._beats[rank][1])]
        ticks = {rank: self._ticks[rank] for rank in (*running, self._rank)}
        if not silent and all(self._is_old(at) for _, at in ticks.values()):
            most = max(count for count, _ in ticks.values())
            silent = [rank for rank, (count, _) in ticks.items() if count < most]
        if silent:
            first = min(silent, key=lambda rank: ticks[rank][0])
            _, _, process, machine = running.get(first, self._heartbeat()).split()
            self._end(
                f"Rank {first} (process {process} on {machine}) has stood still for {self._seconds:g} s "
                f"(stall_timeout), so the job is ended. Its last checkpoint is complete: continue with --resume."
            )

    def _heartbeat(self) -> str:
        return f"{self._num_beats} {self._num_ticks} {os.getpid()} {platform.node()}"

    def _is_old(self, at: float) -> bool:
        return self._now() - at > self._seconds

    def _note(self, seen: dict[int, tuple[Value, float]], rank: int, value: Value) -> None:
        if rank not in seen or seen[rank][0] != value:
            seen[rank] = value, self._now()

    def _write(self, text: str) -> None:
        self._store.set(str(self._rank), text)

    def _run(self) -> None:
        while not self._stopped.wait(min(5.0, self._seconds / 10)):
            try:
                self.beat()
            except RuntimeError:  # the store has ended, and the job with it
                return


def end_job(text: str) -> NoReturn:
    """End this process, and with it the job, from a thread while its work waits for another process."""
    try:
        exit_with(text)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
