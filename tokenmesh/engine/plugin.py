"""What vLLM loads in each of its processes through the entry point group ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Makes TokenParallelKVConnector known by name. Idempotent: vLLM calls it in every process, perhaps twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TokenParallelKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "TokenParallelKVConnector", "tokenmesh.engine.connector", "TokenParallelKVConnector"
        )
