"""What a service tells the connector inside its engine processes, through vLLM's kv_connector_extra_config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tokenmesh.kv.messages import Destination
from tokenmesh.parallel.placement import Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ConnectorSettings(msgspec.Struct, frozen=True):
    """Plain values, since they cross process boundaries inside VllmConfig."""

    hub: str
    """ZeroMQ address of the service's LinkHub."""
    host: str
    """Address at which peers reach the movers' UCX listeners."""
    port: int
    """UCX port of shard 0; 0 picks free ones."""
    transport: str
    chunk_bytes: int
    window: int
    cpus: list[int]
    """Cores of the service."""
    device: bool = False
    """The cache is on a GPU, which the host runs ahead of."""
    remote_prefill_min_tokens: int = 1
    """Consumers only: fewer missing prompt tokens are computed locally."""
    placement: Policy = "balance"
    """Consumers only: how sequences are spread over ranks."""
    ranks: int = 1
    """Consumers only: ranks of the group, the root included."""
    device_ranks: int = 1
    """Consumers only: ranks that share the root's GPU and its KV tensors, the root included."""
    root_share: float = 1.0
    """Consumers only, with `device_ranks`: the root's part of the blocks relative to another rank's."""

    layerwise: bool = False
    """Producers: layers are told of one by one."""

    def to_extra_config(self) -> dict[str, Any]:
        """As kv_connector_extra_config."""
        return {"tokenmesh": msgspec.to_builtins(self)}

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> ConnectorSettings:
        """Reads them back in an engine process."""
        return cls.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)

    @classmethod
    def from_extra_config(cls, extra: dict[str, Any]) -> ConnectorSettings:
        """Reads them back from kv_connector_extra_config."""
        return msgspec.convert(extra["tokenmesh"], cls)


class SendTo(msgspec.Struct, frozen=True):
    """A KvTarget as a prefill service hands it to its scheduler, inside the request's kv_transfer_params."""

    transfer_id: bytes
    destinations: list[list[Destination]]
    """Where each of our tensor-parallel shards sends which of its heads."""
    start_token: int
    num_blocks: int
    codec: str = "none"

    KEY = "tokenmesh_send"


class FetchFrom(msgspec.Struct, frozen=True):
    """Marks a request of a decode root whose prompt may be prefilled remotely, inside its kv_transfer_params."""

    request_id: str
    """The id under which the service knows the request."""

    KEY = "tokenmesh_fetch"
