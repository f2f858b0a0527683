"""The rank's end of a UCX exchange, in a process of its own: ``python -m tests.unit.ucx_rank TRANSPORT TOKEN SIZES``.

Prints its port, then echoes one message of each size, every byte plus one, and waits to be left.
"""

from __future__ import annotations

import sys

import torch

from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.ucx_exchange import UcxLoop


def main() -> None:
    """Entry point."""
    transport, token, sizes = sys.argv[1], bytes.fromhex(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")]
    loop = UcxLoop(transport)
    print(loop.listen(0), flush=True)
    pair = loop.accept(token, 60)
    if pair is None:
        print("nobody came", flush=True)
        return
    print("accepted", flush=True)
    try:
        for size in sizes:
            data = torch.zeros(size, dtype=torch.uint8)
            pair.receive(data)
            pair.send(data + 1)
        print("echoed", flush=True)
        pair.receive(torch.zeros(1, dtype=torch.uint8))
    except PeerLostError:
        print("left", flush=True)
    pair.close()
    loop.close()


if __name__ == "__main__":
    main()
