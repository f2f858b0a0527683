"""The codec of each link of a decode root: the one configured, or with `auto` the one that was chosen for it."""

from __future__ import annotations

import asyncio

import structlog

from tokenmesh.kv.codecs.base import NONE
from tokenmesh.kv.codecs.choice import Speed, choose, measure
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError

log = structlog.get_logger()

AUTO = "auto"


class LinkCodecs:
    """By the address of the prefill service."""

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self._chosen: dict[str, str] = {}
        self._speeds: dict[str, Speed] | None = None

    def of(self, address: str) -> str:
        """The codec to ask this service for. With `auto`, blocks go as cached until the link is known."""
        return self._chosen.get(address, NONE) if self._configured == AUTO else self._configured

    async def learn(self, address: str, goodput: float, geometry: BlockGeometry) -> None:
        """Chooses for a link that was measured at so many bytes per second, the first time it is."""
        if self._configured != AUTO or address in self._chosen:
            return
        if self._speeds is None:
            try:
                self._speeds = await asyncio.to_thread(measure, geometry)
            except GeometryMismatchError as error:
                log.warning("kv codecs not measured", error=str(error))
                self._speeds = {}
        choice = choose(goodput, self._speeds)
        self._chosen[address] = choice.codec
        log.info("kv codec chosen", prefill=address, codec=choice.codec, why=choice.why)
