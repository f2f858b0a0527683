"""Token parallelism: what a decode root and the ranks of its group agree on.

A rank owns KV blocks and attends; only rank 0, the root, has weights. Once a step the root plans (`plan`), then layer
by layer rows go out and attention comes back (`rows`, over an `exchange`), computed at the other end (`rank`). Where a
sequence lives is decided by `placement` and written into its block ids (`ids`).

Nothing here imports vLLM at import time: a rank must start fast and stay small.
"""
