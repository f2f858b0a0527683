"""Which GPUs a service sees, and what moves KV between them."""

from __future__ import annotations

import os

from tokenmesh.config import ConfigError, KvTransferConfig
from tokenmesh.cpus import parse_cpus


def show_gpus(text: str | None, count: int, replica: int) -> None:
    """Has this process, and all that it starts, see only the `count` GPUs of its replica; None: no change.

    `text`: those of all replicas, as a list such as ``0-3,8``, by CUDA's numbers. Must come before CUDA starts. Raises
    ValueError if they are too few.
    """
    if text is None:
        return
    mine = sorted(parse_cpus(text))[replica * count : (replica + 1) * count]
    if len(mine) < count:
        raise ValueError(f"gpus {text} are too few for replica {replica}, which needs {count}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))


def check_device_transfer(transfer: KvTransferConfig, name: str) -> None:
    """Raises ConfigError for what does not move KV between GPUs. `name`: of the section it stands in."""
    if transfer.transport == "shm":
        raise ConfigError(f"{name}.kv_transfer.transport: shm reaches no GPU; set it to auto")
    if transfer.codec == "lossless":
        raise ConfigError(f"{name}.kv_transfer.codec: lossless works in CPU memory only; set it to none")
