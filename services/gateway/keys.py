"""Who may ask what of a gateway."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Any

import grpc

from tokenmesh.config import GatewayConfig
from tokenmesh.rpc.errors import MeshError, Reason


class Keys:
    """Bearer keys, any of which opens the door; none: the door is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def of_clients(cls, config: GatewayConfig) -> Keys:
        """For requests."""
        return cls(config.api_keys)

    @classmethod
    def of_operators(cls, config: GatewayConfig) -> Keys:
        """For looking at the mesh: the admin key if there is one, else as for requests."""
        return cls((config.admin_key,) if config.admin_key else config.api_keys)

    def fit(self, authorization: str) -> bool:
        """Whether a header's value, ``Bearer KEY``, is good."""
        scheme, _, key = authorization.partition(" ")
        # Every key is compared, so that timing tells nothing.
        matches = [hmac.compare_digest(key.encode(), known) for known in self._keys]
        return not self._keys or (scheme.lower() == "bearer" and any(matches))

    def check(self, context: Any) -> None:
        """The same for a gRPC call. Raises MeshError UNAUTHENTICATED (BAD_API_KEY)."""
        given = next((str(v) for k, v in context.invocation_metadata() or () if k == "authorization"), "")
        if not self.fit(given):
            raise MeshError(grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_API_KEY, "the API key is missing or wrong")
