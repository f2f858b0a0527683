"""The ranks of a decode group, as its root tells about them, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from tokenmesh.v1 import admin_pb2


@dataclass(frozen=True)
class RankLine:
    """One rank at one moment."""

    rank: int
    worker: str
    """host:port of its service; empty for the root."""
    attached: bool
    blocks_free: int
    blocks_total: int
    context_tokens: int
    sequences: int
    step_share: float
    """Part of recent steps' time spent in its attention kernel."""
    transport: str
    error: str

    @classmethod
    def from_proto(cls, status: admin_pb2.RankStatus) -> RankLine:
        """As the root tells it."""
        return cls(
            rank=status.rank,
            worker=status.address,
            attached=status.attached,
            blocks_free=status.blocks_free,
            blocks_total=status.blocks_total,
            context_tokens=status.context_tokens,
            sequences=status.sequences,
            step_share=status.step_share,
            transport=status.exchange_transport,
            error=status.error,
        )

    @property
    def state(self) -> str:
        """attached or not, and why not."""
        return "attached" if self.attached else f"detached ({self.error.rpartition(': ')[2]})"

    def figures(self) -> list[str]:
        """Blocks, context tokens, sequences, step share."""
        share = f"{100 * self.step_share:.0f} %" if self.step_share else "-"
        blocks = f"{self.blocks_free}/{self.blocks_total}" if self.blocks_total else "-"
        return [blocks, str(self.context_tokens), str(self.sequences), share, self.transport or "-"]


def ranks_of(statuses: Iterable[admin_pb2.RankStatus]) -> tuple[RankLine, ...]:
    """All ranks of a root's status."""
    return tuple(map(RankLine.from_proto, statuses))


def to_table(groups: Sequence[tuple[str, Sequence[RankLine]]]) -> Table:
    """For terminals: (name of the root, its ranks)."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("rank", "worker"):
        table.add_column(name, no_wrap=True)
    table.add_column("state", overflow="fold")
    for name in ("blocks\nfree/all", "context\ntokens", "seqs", "step\nshare"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rows", overflow="fold")
    for root, ranks in groups:
        for line in ranks:
            state = Text(line.state, style="green" if line.attached else "red")
            table.add_row(f"{root} / {line.rank}", line.worker or "-", state, *line.figures())
    return table


def to_line(root: str, line: RankLine) -> str:
    """For pipes and logs."""
    names = ("blocks", "context", "sequences", "step share", "rows")
    parts = [f"{root}/rank-{line.rank}", line.worker or "-", line.state]
    return "  ".join(parts + [f"{name} {value}" for name, value in zip(names, line.figures(), strict=True)])
