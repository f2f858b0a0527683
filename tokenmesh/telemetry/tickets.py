"""Spans of the owner of KV blocks: one per ticket, from its opening to its settlement."""

from __future__ import annotations

from tokenmesh.kv.settling import Outcome
from tokenmesh.rpc.errors import Reason
from tokenmesh.telemetry import span_names as names
from tokenmesh.telemetry.tracing import Span, Value, enabled, start
from tokenmesh.v1 import kv_pb2


def receipt_attributes(receipt: kv_pb2.KvReceipt) -> dict[str, Value]:
    """What was moved, as span attributes."""
    return {
        names.KV_BYTES: receipt.bytes,
        names.KV_WIRE_SECONDS: receipt.seconds,
        names.KV_TRANSPORT: receipt.transport,
    }


class TicketSpans:
    """Of one owner."""

    def __init__(self) -> None:
        self._open: dict[bytes, Span] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, transfer_id: bytes, blocks: int, rank: int) -> None:
        """A ticket was opened, on behalf of the current work."""
        if enabled():
            name = names.transfer_name(transfer_id)
            attributes: dict[str, Value] = {names.TRANSFER_ID: name, names.KV_BLOCKS: blocks, names.RANK: rank}
            self._open[transfer_id] = start(names.KV_RECEIVE, attributes)

    def close(self, transfer_id: bytes, outcome: Outcome) -> None:
        """It was settled. Unknown: nothing."""
        span = self._open.pop(transfer_id, None)
        if span is not None:
            span.set(receipt_attributes(outcome.receipt))
            if not outcome.complete:
                span.fail(Reason.KV_TRANSFER_FAILED.value, outcome.error)
            span.end()

    def close_all(self, reason: str) -> None:
        """The owner lets everything go."""
        for transfer_id in list(self._open):
            self.close(transfer_id, Outcome(False, reason, kv_pb2.KvReceipt()))
