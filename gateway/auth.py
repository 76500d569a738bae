"""API keys. Every route asks for one, unknown routes too; only the probes answer without.

Keys are compared as SHA-256 digests with hmac.compare_digest, all of them each time, so neither the time nor the answer
tells how close a guess was.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from ..core.errors import Unauthorized
from .call import Handler, current_call

OPEN_ROUTES = frozenset({"/health", "/live", "/ready"})
MAX_KEY_CHARS = 512


class KeyRing:
    """The accepted keys, as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    @property
    def is_empty(self) -> bool:
        return not self._digests

    @property
    def has_tenants(self) -> bool:
        return len(self._digests) > 1

    def tenant(self, key: str) -> str | None:
        """A name for the owner of `key` that does not give the key away; None for an unknown key."""
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known
        return None if found is None else hashlib.sha256(b"tenant" + found).hexdigest()[:16]


def bearer_key(request: web.Request) -> str:
    """The key in `Authorization: Bearer`, or Unauthorized."""
    header = request.headers.get(hdrs.AUTHORIZATION, "")
    scheme, _, key = header.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("no API key; send the header 'Authorization: Bearer <key>'")
    if len(key) > MAX_KEY_CHARS:
        raise Unauthorized(f"the API key has {len(key)} characters, the longest possible has {MAX_KEY_CHARS}")
    return key


def auth_middleware(keys: KeyRing, open_routes: frozenset[str]) -> Middleware:
    """Refuse what has no known key. `open_routes` are compared with the matched resource, never with the raw path."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        is_open = resource is not None and resource.canonical in open_routes
        if not is_open and not keys.is_empty:
            tenant = keys.tenant(bearer_key(request))
            if tenant is None:
                raise Unauthorized("unknown API key; check the key and that it belongs to this server")
            if keys.has_tenants:
                current_call().tenant = tenant
        return await handler(request)

    return middleware
