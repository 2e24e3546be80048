"""API keys: if a server has any, every route needs one, except those that only report the state of the server.

vLLM itself asks for its key on routes under `/v1`, `/v2`, `/inference` and `/cohere`, and leaves others open, one of
which generates text. Here every route that is not listed in `OPEN` needs a key, also one that a later vLLM adds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError

#: vLLM's environment variable with keys, one a line
KEYS = "VLLM_API_KEY"
#: environment variable with the SHA-256 of each key: a server compares these, and never has the keys themselves
DIGESTS = "TARDIS_API_KEY_DIGESTS"
#: paths that need no key
OPEN = frozenset({"/health", "/metrics", "/ping", "/version"})

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def digest(key: str) -> str:
    """The SHA-256 of an API key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(text: str, source: str) -> list[str]:
    """The keys in a text, one a line.

    Args:
        text: the keys; blank lines are skipped.
        source: the option, file or variable that the text is from, for errors.

    Raises:
        InvalidInputError: there is no key, or one that an HTTP header cannot carry.
    """
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise InvalidInputError(f"{source} has no API key in it. Put one there, or leave it out to serve without keys.")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise InvalidInputError(
            f"{source} has an API key with spaces, control characters or letters beyond ASCII, which clients cannot "
            "send. Make one with `openssl rand -hex 32`."
        )
    return keys


def gather_digests(given: Sequence[str], file: Path | None, environment: Mapping[str, str]) -> list[str]:
    """The digests of all keys that a server is given; an empty list if it is to need none.

    Args:
        given: keys on the command line.
        file: a file with keys, one a line; None without.
        environment: environment variables. Digests in it always count, keys only if there are no others, as in vLLM.

    Raises:
        InvalidInputError: the file cannot be read, or has no key or one that an HTTP header cannot carry.
    """
    keys = [key for each in given for key in read_keys(each, "--api-key")]
    if file is not None:
        keys += read_keys(_read(file), f"--api-key-file {file}")
    found = [*environment.get(DIGESTS, "").split(), *map(digest, keys)]
    if not found and KEYS in environment:
        found = [*map(digest, read_keys(environment[KEYS], f"the environment variable {KEYS}"))]
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidInputError(f"cannot read --api-key-file {file}: {reason}. Check the path.") from error


def without_keys(command: Sequence[str]) -> list[str]:
    """A command line without `--api-key` and its value."""
    kept, skip = [], False
    for part in command:
        if not skip and part != "--api-key" and not part.startswith("--api-key="):
            kept.append(part)
        skip = not skip and part == "--api-key"
    return kept


class RequireKey:
    """ASGI middleware for vLLM's `--middleware`: answers 401 to requests that need a key and have none.

    Clients send a key as `Authorization: Bearer KEY`. Valid are the keys of `tardis serve` and those of vLLM itself.

    Args:
        app: the ASGI application to protect.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._digests: frozenset[str] | None = None

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "an API key is needed"})
        else:
            await _refuse(send)

    def _has_key(self, scope: _Scope) -> bool:
        if self._digests is None:
            self._digests = frozenset(_expected(scope))
        return not self._digests or any(sent in self._digests for sent in _sent(scope))


def _is_open(scope: _Scope) -> bool:
    """Whether a request needs no key: it has an open path, or is a browser's preflight request."""
    names = {name for name, _ in scope["headers"]}
    if scope.get("method") == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names:
        return True  # vLLM's CORS middleware answers it, so it reaches no route
    root = scope.get("root_path", "").rstrip("/")
    return scope["type"] == "http" and scope["path"] in {*OPEN, *(root + path for path in OPEN)}


def _sent(scope: _Scope) -> Iterable[str]:
    """Digests of the keys in a request. The time that comparing digests takes reveals nothing of a key."""
    for name, value in scope["headers"]:
        scheme, _, key = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            yield hashlib.sha256(key.strip()).hexdigest()


def _expected(scope: _Scope) -> list[str]:
    """Digests of the valid keys: those of `tardis serve` and of vLLM's command line, or else those of `KEYS`."""
    arguments = getattr(getattr(scope.get("app"), "state", None), "args", None)
    given = getattr(arguments, "api_key", None) or []
    found = [*os.environ.get(DIGESTS, "").split(), *map(digest, given)]
    return found or [*map(digest, os.environ.get(KEYS, "").split())]


async def _refuse(send: _Send) -> None:
    message = "This needs an API key; send it as `Authorization: Bearer KEY`."
    error = {"message": message, "type": "Unauthorized", "param": None, "code": 401}
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
