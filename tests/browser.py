"""Headless Chromium, controlled over chromedriver's HTTP protocol (W3C WebDriver) without a library."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.servers import free_port

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = "no browser: chromium and chromedriver are not installed (apt-get install chromium chromium-driver)"
KEYS = {"left": "\ue012", "right": "\ue014", "enter": "\ue007"}


@dataclass
class Browser:
    client: httpx.Client
    session: str

    def call(self, path: str, **body: Any) -> Any:
        reply = self.client.post(f"/session/{self.session}/{path}", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]

    def open(self, address: str) -> None:
        self.call("url", url=address)

    def run(self, script: str) -> Any:
        return self.call("execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        """Press and release each key, without a pause."""
        events = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("actions", actions=[{"type": "key", "id": "keyboard", "actions": events}])

    def type_in(self, field: str, text: str) -> None:
        """Type into a field of a page that gives it the focus."""
        self.until(f"document.activeElement === document.getElementById('{field}')")
        self.press(*text)

    def until(self, script: str, *, seconds: float = 20.0) -> None:
        """Wait until an expression is true on the page, for `seconds` at most."""
        deadline = time.monotonic() + seconds
        while not self.run(f"return Boolean({script})"):
            assert time.monotonic() < deadline, (
                f"{script} is not true on a page with the text: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)

    def emulate(self, *, width: int, height: int, dark: bool = False) -> None:
        """Emulate a screen of this size and its colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.call("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def screenshot(self, path: Path) -> None:
        reply = self.client.get(f"/session/{self.session}/screenshot")
        path.write_bytes(base64.b64decode(reply.json()["value"]))

    def console(self) -> list[str]:
        """Warnings and errors since the last call."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """A new browser with further arguments, closed at the end; needs CHROMIUM and DRIVER."""
    assert CHROMIUM
    assert DRIVER
    number = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={number}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = {
        "binary": CHROMIUM,
        "args": [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-proxy-server",
            *arguments,
        ],
    }
    wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{number}", trust_env=False, timeout=60) as client:
            deadline = time.monotonic() + 30
            while True:
                try:
                    reply = client.post("/session", json={"capabilities": wanted})
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            assert reply.status_code == 200, reply.text
            session = reply.json()["value"]["sessionId"]
            yield Browser(client, session)
            client.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait()
