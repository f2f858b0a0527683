"""The root's view of ranks on other GPUs: announces steps, exchanges rows, and notices when one has gone.

A kernel that waits for rows of a dead rank would wait for ever, and whoever waits for the kernel with it. So a thread
watches the ranks' control connections, and aborts the exchange of one that is lost. What its kernels leave behind is
rubbish; the loss is reported together with the step, whose tokens of that rank are then dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait

import structlog
import torch

from tokenmesh.engine.gpu.pair import NcclPair, new_id
from tokenmesh.parallel.device_step import STEP_BYTES, DeviceStep
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.ucx_exchange import UcxExchange, UcxLoop

log = structlog.get_logger()

ANSWER_BYTES = 8
"""Of a rank's host: it has taken the last message."""
CONNECT_S = 10.0
MEET_S = 60.0
"""For NCCL to connect two GPUs, the first time kernels and libraries are loaded."""
WATCH_S = 0.01
"""Between two looks at the control connections."""


class GpuPeer:
    """One rank on another GPU. All but the pair's verbs: under the watch's lock."""

    def __init__(self, rank: int, epoch: int, control: UcxExchange) -> None:
        """Tells the rank how to meet us. Raises PeerLostError."""
        self.rank = rank
        self.epoch = epoch
        self.pair: NcclPair
        self._control = control
        self._unique_id = new_id()
        control.send(torch.frombuffer(bytearray(self._unique_id), dtype=torch.uint8))
        control.flush()
        self._answer = torch.zeros(ANSWER_BYTES, dtype=torch.uint8)
        self._answered = control.start_receive(self._answer)
        self._head = torch.zeros(STEP_BYTES, dtype=torch.uint8)
        self._version = 0
        self._unanswered: deque[float] = deque()
        self.lost = ""
        """Why the rank is of no more use."""

    def meet(self, device: torch.device) -> Future[NcclPair]:
        """Begins to make the pair, in a thread: NCCL has no deadline, and waits for ever for a rank that has died."""
        meeting: Future[NcclPair] = Future()

        def make() -> None:
            try:
                torch.cuda.set_device(device)
                meeting.set_result(NcclPair(self._unique_id, True, device))
            except BaseException as error:  # noqa: BLE001 - told to who waits
                meeting.set_exception(error)

        threading.Thread(target=make, name="nccl-meet", daemon=True).start()
        return meeting

    def announce(self, rows: int, tokens: int, max_query_len: int, max_seq_len: int, width: int, graph: bool) -> None:
        """Tells the rank's host of a step, by DeviceStep's arguments. Raises PeerLostError."""
        self._version = (self._version + 1) & 0xFFFFFFFF
        step = DeviceStep(self._version, rows, tokens, max_query_len, max_seq_len, width, graph)
        self._head.copy_(torch.frombuffer(bytearray(step.to_bytes()), dtype=torch.uint8))
        self._control.send(self._head)
        self._control.flush()
        self._unanswered.append(time.monotonic())

    def look(self, deadline_s: float) -> str:
        """Why the rank must be given up, or nothing."""
        try:
            while self._answered.completed:
                self._control.finish(self._answered)
                self._answered = self._control.start_receive(self._answer)
                if self._unanswered:
                    self._unanswered.popleft()
            if not self._control.alive:
                return "its connection has ended"
        except PeerLostError as error:
            return str(error)
        if self._unanswered and time.monotonic() - self._unanswered[0] > deadline_s:
            return f"silent for {deadline_s:g} s"
        return ""

    def close(self) -> None:
        """Ends the connection; the pair is closed before."""
        self._control.close()


class PeerWatch:
    """All ranks on other GPUs, and the thread that watches them. Methods are for the thread that runs the model."""

    def __init__(self, device: torch.device, transport: str, deadline_s: float) -> None:
        """`transport`: UCX's, of control messages; `deadline_s`: after which a silent rank is lost."""
        self._device = device
        self._deadline_s = deadline_s
        self._loop = UcxLoop(transport)
        self.lock = threading.RLock()
        """Held while nobody may look: UCX is used by one thread at a time, and a capture suffers no other's calls. Who
        holds it for a capture may lose a rank within it."""
        self._closed = threading.Event()
        self.peers: dict[int, GpuPeer] = {}
        self._lost: dict[tuple[int, int], str] = {}
        self._steps: deque[tuple[torch.cuda.Event, float]] = deque()
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def connect(self, rank: int, epoch: int, address: tuple[str, int], token: bytes) -> str:
        """Meets a rank; returns what carries its control messages. Raises PeerLostError, soon if the rank dies."""
        with self.lock:
            control = self._loop.connect(*address, token, CONNECT_S)
            try:
                peer = GpuPeer(rank, epoch, control)
            except PeerLostError:
                control.close()
                raise
        # Takes seconds, and no lock: others are watched meanwhile.
        meeting = peer.meet(self._device)
        try:
            peer.pair = self._met(peer, meeting)
        except PeerLostError:
            meeting.add_done_callback(_close)
            with self.lock:
                peer.close()
            raise
        with self.lock:
            self.peers[rank] = peer
            return control.transport

    def _met(self, peer: GpuPeer, meeting: Future[NcclPair]) -> NcclPair:
        deadline = time.monotonic() + MEET_S
        while not wait([meeting], WATCH_S).done:
            with self.lock:
                reason = peer.look(self._deadline_s)
            if reason or time.monotonic() > deadline:
                raise PeerLostError(reason or f"no NCCL pair within {MEET_S:g} s")
        if error := meeting.exception():
            raise PeerLostError(f"{type(error).__name__}: {error}") from error
        return meeting.result()

    @property
    def stale(self) -> bool:
        """Some peer is lost; `retire` takes it out."""
        return any(peer.lost for peer in self.peers.values())

    def retire(self) -> list[GpuPeer]:
        """Takes those out that are lost. They are to be buried once no graph holds their pairs."""
        with self.lock:
            return [self.peers.pop(rank) for rank, peer in list(self.peers.items()) if peer.lost]

    def bury(self, gone: Iterable[GpuPeer]) -> None:
        """Frees what ranks leave that were taken out."""
        for peer in gone:
            peer.pair.close()
            with self.lock:
                peer.close()

    def drop(self, rank: int, epoch: int | None) -> None:
        """Gives a rank up, unless another epoch of it is here by now."""
        with self.lock:
            # Whoever is to know of its loss does by now.
            for gone in [key for key in self._lost if key[0] == rank and epoch in (None, key[1])]:
                del self._lost[gone]
            peer = self.peers.get(rank)
            if peer is not None and epoch in (None, peer.epoch) and not peer.lost:
                # The step under way still counts on it; only its graph must not see it again.
                peer.lost = "dropped"

    def announce(self, rank: int, step: tuple[int, int, int, int, int, bool], *plan: torch.Tensor) -> None:
        """Tells a rank of a step, by DeviceStep's arguments, and sends what its kernels need to know.

        One that cannot be told is lost, and the kernels that wait for it end with rubbish.
        """
        peer = self.peers[rank]
        try:
            with self.lock:
                peer.announce(*step)
            peer.pair.send(*plan)
        except PeerLostError as error:
            self.lose(peer, str(error))

    def stepped(self) -> None:
        """Notes the end of a step's kernels on the current stream: they are to come to one."""
        event = torch.cuda.Event()
        event.record()
        self._steps.append((event, time.monotonic()))

    def lost(self) -> dict[tuple[int, int], str]:
        """(rank, epoch) → why, of those lost and not dropped yet.

        Told with every step until then: the next step has been launched when the tokens of one are looked at, and each
        must say that some of its own are rubbish.
        """
        with self.lock:
            return dict(self._lost)

    def lose(self, peer: GpuPeer, reason: str) -> None:
        """Gives a rank up that failed."""
        with self.lock:
            self._lose(peer, reason)

    def _lose(self, peer: GpuPeer, reason: str) -> None:
        if peer.pair.aborted:
            return
        log.warning("rank lost", rank=peer.rank, error=reason)
        # Noted before its kernels end, so that who finds them ended finds the note as well.
        self._lost[peer.rank, peer.epoch] = peer.lost = reason
        peer.pair.abort()

    def _watch(self) -> None:
        torch.cuda.set_device(self._device)
        while not self._closed.wait(WATCH_S):
            with self.lock:
                self._loop.worker.progress()
                for peer in self.peers.values():
                    reason = "" if peer.pair.aborted else peer.look(self._deadline_s)
                    if reason:
                        self._lose(peer, reason)
                self._check_steps()

    def _check_steps(self) -> None:
        """Hosts that answer may have GPUs that do not. Whose it is nobody can tell, so all are given up."""
        while self._steps and self._steps[0][0].query():
            self._steps.popleft()
        if self._steps and time.monotonic() - self._steps[0][1] > 2 * self._deadline_s:
            self._steps.clear()
            for peer in self.peers.values():
                self._lose(peer, f"a step has not ended for {2 * self._deadline_s:g} s")

    def close(self) -> None:
        """Lets every rank go. No graph may hold them any more."""
        self._closed.set()
        self._thread.join()
        self.bury(self.peers.values())
        self.peers.clear()
        self._loop.close()


def _close(meeting: Future[NcclPair]) -> None:
    """Of a pair that was given up before it was made."""
    if meeting.exception() is None:
        meeting.result().close()
