"""How many blocks of a group's KV cache each rank holds."""

from __future__ import annotations


def split_blocks(total: int, ranks: int, root_share: float = 1.0) -> list[int]:
    """Blocks per rank, rank 0 first, adding up to `total`.

    `root_share` is the root's part relative to a worker's: 1 splits evenly, less leaves the root's memory to its
    weights. What does not divide goes to the first ranks, one block each.

    Raises ValueError if a rank would get nothing.
    """
    if ranks < 1 or not 0 < root_share <= 1:
        raise ValueError(f"cannot split over {ranks} ranks with a root share of {root_share:g}")
    # Alone, or with an equal part, the root is like any other rank.
    first = int(root_share < 1 and ranks > 1)
    root = int(total * root_share / (root_share + ranks - 1)) if first else 0
    each, remainder = divmod(total - root, ranks - first)
    blocks = [root] * first + [each + (i < remainder) for i in range(ranks - first)]
    if not all(blocks):
        raise ValueError(f"{total} blocks are too few for {ranks} ranks")
    return blocks


def local_blocks(total: int, ranks: int, root_share: float = 1.0) -> list[int]:
    """Blocks per rank where all ranks share tensors of `total` blocks, rank 0 first, adding up to `total`.

    The root's include the one that vLLM sets aside, and it has at least one other, however small its share.

    Raises ValueError if a rank would get nothing.
    """
    if root_share == 1 or ranks == 1:
        root, *others = split_blocks(total - 1, ranks)
    else:
        root = max(1, int((total - 1) * root_share / (root_share + ranks - 1)))
        others = split_blocks(total - 1 - root, ranks - 1)
    return [root + 1, *others]
