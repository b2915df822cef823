"""Random changes of bytes, as a broken transfer or an ill-meaning hand would make them."""

from __future__ import annotations

import random

_TOKENS = (
    b"null", b"NaN", b"-1", b"1e999", b"true", b'"', b"{", b"[" * 50, b"]", b"}", b",", b"\0", b"\xff\xfe", b"\n",
    b"\r", b"9" * 400, b"../../x", b"\xed\xa0\x80", b"&a [*a,*a]", b"!!python/object:os.system x", b"-0.0",
)  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return bytes after one to four random changes: bits, bytes, parts cut, moved or doubled, and hostile tokens."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        end = min(end, at + rng.choice((1, 8, 64, 4096)))
        match rng.randrange(7):
            case 0 if data:
                at = min(at, len(data) - 1)
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.randbytes(end - at)
            case 4:
                data[at:end] = rng.choice(_TOKENS)
            case 5:
                data[at:at] = rng.choice(_TOKENS)
            case _:
                del data[at + rng.choice((0, 1, 16, 1024)) :]
    return bytes(data)
