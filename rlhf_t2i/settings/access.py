"""Who may reach a server: this machine, and those who have its token."""

from __future__ import annotations

import ipaddress
import os

TOKEN_VARIABLE = "RLHF_T2I_TOKEN"


def token() -> str | None:
    """Return the token in the environment variable RLHF_T2I_TOKEN; None if it is not set.

    Raises ValueError, without showing the token, if an HTTP header cannot carry it.
    """
    secret = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in secret):
        raise ValueError(f"The environment variable {TOKEN_VARIABLE} has blanks or letters beyond ASCII within it.")
    return secret or None


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach what listens on an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
