"""Options of commands that listen on an address."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.access import TOKEN_VARIABLE, is_loopback, token
from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.ranges import Port


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings, group="system"):
    """The address of an HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; any but the loopback addresses needs a token in the environment variable RLHF_T2I_TOKEN."""
    port: Port = 8000
    """Port to listen on; 0 is any free port."""

    require_token: bool = False
    """Serve only with a token in RLHF_T2I_TOKEN, on loopback addresses too, to which other users of the machine may
    connect."""

    def rules(self) -> list[Rule]:
        alone = f"127.0.0.1, ::1 or localhost unless the environment variable {TOKEN_VARIABLE} has a token"
        needs = f"false unless the environment variable {TOKEN_VARIABLE} has a token"
        return [
            *super().rules(),
            ("require_token", not self.require_token or token() is not None, needs),
            ("host", is_loopback(self.host) or token() is not None, alone),
        ]
