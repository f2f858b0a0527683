"""What vLLM loads in each of its processes through the entry point group ``vllm.general_plugins``."""

from __future__ import annotations

import logging
import multiprocessing

from tokenmesh.engine.compile_cache import find_it_again
from tokenmesh.heap import leave_heap_at_exit
from tokenmesh.logs import setup_inherited_logging


def register() -> None:
    """Makes TokenParallelKVConnector known by name, and logs readable. Idempotent: vLLM calls it in every process."""
    if not logging.getLogger().handlers:
        # An engine process: its service has set up the parent's logging only.
        setup_inherited_logging(process=multiprocessing.current_process().name)
    # vLLM makes its frozen heap collectable again before its engine core ends.
    leave_heap_at_exit()
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TokenParallelKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "TokenParallelKVConnector", "tokenmesh.engine.connector", "TokenParallelKVConnector"
        )
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        find_it_again()
