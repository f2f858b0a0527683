"""The plan of a step: which sequences of a rank attend, in deltas against what the rank already knows.

The root keeps, per rank, a mirror of the block tables that the rank holds. Rows are compared with it, so only blocks
that are new cross the wire, and no request has to be named: a row is whatever its blocks and lengths say. The version
counts plans; a rank that finds anything at odds with its own state refuses the plan.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_HEADER = struct.Struct("<IIIIII")
HEADER_BYTES = _HEADER.size
_MAGIC = 0x504B5432


class PlanMismatchError(Exception):
    """A plan does not fit what the rank knows; root and rank must start over."""


class StepPlan:
    """One step of one rank, decoded.

    `query_lens`, `seq_lens`: int32 [rows], tokens. `block_table`: int32 [rows, width], local block ids, a view that
    lasts until the next plan.
    """

    __slots__ = ("block_table", "query_lens", "seq_lens", "version")

    def __init__(self, version: int, query_lens: IntArray, seq_lens: IntArray, block_table: IntArray) -> None:
        self.version = version
        self.query_lens = query_lens
        self.seq_lens = seq_lens
        self.block_table = block_table

    @property
    def tokens(self) -> int:
        """Rows of q, k and v that come with each layer."""
        return int(self.query_lens.sum())


class _Table:
    """Block tables by row, as both ends hold them."""

    def __init__(self, rows: int, width: int) -> None:
        self.blocks = np.zeros((rows, width), dtype=np.int32)
        self.known = np.zeros(rows, dtype=np.int32)
        """Leading blocks of each row that are valid."""


class PlanWriter:
    """The root's end for one rank."""

    def __init__(self, rows: int, width: int, block_size: int) -> None:
        """`rows` sequences at most in a step, `width` blocks at most in a sequence."""
        self._table = _Table(rows, width)
        self._block_size = block_size
        self.version = 0

    def write(self, query_lens: IntArray, seq_lens: IntArray, block_table: IntArray) -> tuple[bytes, bytes]:
        """(header, body) of the next plan. Block ids are local to the rank; a row counts as far as seq_lens says."""
        rows = len(query_lens)
        table, width = self._table, block_table.shape[1]
        needed = -(-seq_lens // self._block_size)
        columns = np.arange(width)
        same = (block_table == table.blocks[:rows, :width]) | (columns >= table.known[:rows, None])
        # The first column that differs; what lies behind the known part is new in any case.
        agree = np.where(same.all(axis=1), width, same.argmin(axis=1))
        first = np.minimum(np.minimum(agree, table.known[:rows]), needed).astype(np.int32)
        new = (columns >= first[:, None]) & (columns < needed[:, None])
        table.blocks[:rows, :width][new] = block_table[new]
        table.known[:rows] = needed
        body = b"".join(
            array.astype(np.int32, copy=False).tobytes() for array in (query_lens, seq_lens, first, block_table[new])
        )
        self.version += 1
        header = _HEADER.pack(_MAGIC, self.version & 0xFFFFFFFF, rows, int(new.sum()), width, len(body))
        return header, body


class PlanReader:
    """The rank's end."""

    def __init__(self, rows: int, width: int, block_size: int, blocks: int) -> None:
        """`blocks` are the rank's own; the rest as for the writer."""
        self._table = _Table(rows, width)
        self._block_size = block_size
        self._blocks = blocks
        self.version = 0

    @staticmethod
    def body_bytes(header: Bytes) -> int:
        """Length of the body that follows a header. Raises PlanMismatchError if it is no header."""
        magic, *_, length = _HEADER.unpack(header.tobytes())
        if magic != _MAGIC:
            raise PlanMismatchError("not a plan")
        return int(length)

    def read(self, header: Bytes, body: Bytes) -> StepPlan:
        """Applies a plan to the tables and returns it. Raises PlanMismatchError, after which nothing here is valid."""
        _, version, rows, new, width, _ = _HEADER.unpack(header.tobytes())
        table = self._table
        if version != (self.version + 1) & 0xFFFFFFFF:
            raise PlanMismatchError(f"plan {version} came after plan {self.version}")
        if rows > len(table.known) or width > table.blocks.shape[1] or len(body) != 4 * (3 * rows + new):
            raise PlanMismatchError(f"plan {version} has {rows} rows and {len(body)} bytes")
        query_lens, seq_lens, first, ids = np.split(body.view(np.int32), (rows, 2 * rows, 3 * rows))
        needed = -(-seq_lens // self._block_size)
        if (
            (query_lens < 1).any()
            or (seq_lens < query_lens).any()
            or (needed > width).any()
            or (first < 0).any()
            or (first > np.minimum(table.known[:rows], needed)).any()
            or int((needed - first).sum()) != new
            or ((ids < 0) | (ids >= self._blocks)).any()
        ):
            raise PlanMismatchError(f"plan {version} does not fit the rank's tables")
        columns = np.arange(width)
        table.blocks[:rows, :width][(columns >= first[:, None]) & (columns < needed[:, None])] = ids
        table.known[:rows] = needed
        self.version = version
        return StepPlan(version, query_lens, seq_lens, table.blocks[:rows, :width])
