"""Access to the HTTP servers of this package: the address that they listen on, and their token."""

from __future__ import annotations

import ipaddress
import os
import socket

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


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; raises SystemExit with the reason if that is impossible.

    Binding before rewards are loaded reports a port in use at once.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SystemExit(
            f"error: cannot listen on {host}, port {port}: {error.strerror}. Stop the program that uses the port, or "
            f"choose another --port (0 is any free port) or --host."
        ) from error
    return listener
