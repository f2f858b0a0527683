"""The life of a request: which state may follow which, and a table that never forgets to let go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing

import grpc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tokenmesh.lifecycle import InvalidTransitionError, LiveRequest, RequestState, RequestTable
from tokenmesh.rpc.errors import MeshError, Reason

S = RequestState

ALLOWED: dict[RequestState, set[RequestState]] = {
    # Staying is always allowed.
    S.ACCEPTED: {S.ACCEPTED, S.AWAITING_KV, S.RUNNING, S.FINISHED, S.ABORTED, S.FAILED},
    # With its KV in place, or after a failed hand-off, a request runs. It cannot finish without having run.
    S.AWAITING_KV: {S.AWAITING_KV, S.RUNNING, S.ABORTED, S.FAILED},
    S.RUNNING: {S.RUNNING, S.FINISHED, S.ABORTED, S.FAILED},
    S.FINISHED: {S.FINISHED},
    S.ABORTED: {S.ABORTED},
    S.FAILED: {S.FAILED},
}


def refused(admission: AbstractContextManager[LiveRequest]) -> MeshError:
    """What an admission is refused with."""
    with pytest.raises(MeshError) as caught, admission:
        pytest.fail("the request was admitted")
    return caught.value


def live(table: RequestTable, *states: RequestState, ending: BaseException | None = None) -> LiveRequest:
    """A request's whole life: through these states, to this end."""
    with table.admit(LiveRequest("r", owner="x")) as request:
        for state in states:
            request.enter(state)
        if ending is not None:
            raise ending
    return request


def assert_idle(table: RequestTable) -> None:
    """Nothing and nobody is left, not even an owner's zero."""
    assert len(table) == 0
    assert not table._owners
    assert sum(table.count(state) for state in S) == 0
    assert table.tokens_before(S.FAILED) == 0


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in S for b in S], ids=lambda state: state.name)
def test_a_request_goes_where_it_may_and_nowhere_else(before: RequestState, after: RequestState) -> None:
    # 1. A request stands somewhere; that is terminal exactly when the table above leaves no way out.
    request = LiveRequest("r", state=before)
    assert before.terminal == (ALLOWED[before] == {before})
    if after in ALLOWED[before]:
        # 2. It goes where it may.
        request.enter(after)
        assert request.state is after
    else:
        # 3. Where it may not go, it does not go; the error names request and states.
        with pytest.raises(InvalidTransitionError, match=f"r: {before.name} → {after.name}"):
            request.enter(after)
        assert request.state is before


def test_an_admitted_request_is_live_until_its_block_ends() -> None:
    table = RequestTable(2)
    # 1. Inside the block the request can be found and counts.
    with table.admit(LiveRequest("r", prompt_tokens=5)) as request:
        assert table.get("r") is request
        assert (len(table), table.count(S.ACCEPTED), table.tokens_before(S.RUNNING)) == (1, 1, 5)
        # 2. Its tokens count as waiting only until it runs.
        request.enter(S.RUNNING)
        assert (table.count(S.ACCEPTED), table.count(S.RUNNING), table.tokens_before(S.RUNNING)) == (0, 1, 0)
    # 3. Afterwards it is gone.
    assert_idle(table)


def test_an_id_is_unique_among_the_living_only() -> None:
    table = RequestTable(2)
    with table.admit(LiveRequest("r")) as first:
        # 1. A second request of that name is refused, and does not disturb the first.
        error = refused(table.admit(LiveRequest("r")))
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST)
        assert table.get("r") is first
    # 2. Once the first has ended, the name is free.
    with table.admit(LiveRequest("r")):
        assert len(table) == 1
    assert_idle(table)


def test_no_more_than_the_limit_are_admitted() -> None:
    table = RequestTable(2)
    with table.admit(LiveRequest("a")):
        # 1. The third of two is refused.
        with table.admit(LiveRequest("b")):
            error = refused(table.admit(LiveRequest("c")))
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
        # 2. An end makes room.
        with table.admit(LiveRequest("c")):
            assert len(table) == 2
    assert_idle(table)


def test_an_owner_cannot_use_up_the_credits_of_another() -> None:
    table = RequestTable(10, limit_per_owner=1)
    with table.admit(LiveRequest("a", owner="x")):
        # 1. Its second request is refused, and the message says whose credit it was.
        error = refused(table.admit(LiveRequest("b", owner="x")))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.NO_CREDIT)
        assert "'x'" in error.message
        # 2. Another owner still has credit.
        with table.admit(LiveRequest("b", owner="y")):
            assert len(table) == 2
    # 3. An end returns the credit.
    live(table)
    assert_idle(table)


def test_draining_refuses_the_new_and_keeps_the_old() -> None:
    table = RequestTable(10)
    with table.admit(LiveRequest("old")) as old:
        # 1. From now on new requests are sent elsewhere.
        table.draining = True
        error = refused(table.admit(LiveRequest("new")))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING)
        with pytest.raises(MeshError, match="shutting down"):
            table.check_open()
        # 2. The old one goes on and ends as it would have; the refused one never lived, so it has no outcome.
        old.enter(S.RUNNING)
    assert table.outcomes == {"finished": 1}
    assert_idle(table)


def test_a_pause_refuses_for_a_moment_and_does_not_close() -> None:
    table = RequestTable(10)
    table.paused = True
    assert refused(table.admit(LiveRequest("early"))).reason is Reason.DRAINING
    table.check_open()
    table.paused = False
    live(table)
    assert_idle(table)


@pytest.mark.parametrize("state", [S.ACCEPTED, S.AWAITING_KV, S.RUNNING])
@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (ValueError("x"), "failed"),
        (asyncio.CancelledError(), "aborted"),
        (GeneratorExit(), "aborted"),
        (KeyboardInterrupt(), "aborted"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_ends_the_block_decides_the_outcome(state: RequestState, ending: BaseException, outcome: str) -> None:
    table = RequestTable(1)
    # 1. The block ends with an exception, from any live state; the exception goes on unchanged.
    with pytest.raises(type(ending)) as caught:
        live(table, state, ending=ending)
    assert caught.value is ending
    # 2. The outcome is noted once, and nothing is left.
    assert table.outcomes == {outcome: 1}
    assert_idle(table)


@pytest.mark.parametrize("state", [S.ACCEPTED, S.RUNNING])
def test_a_block_that_simply_ends_has_finished(state: RequestState) -> None:
    table = RequestTable(1)
    # 1. Nothing goes wrong, so the request has finished.
    assert live(table, state).state is S.FINISHED
    assert table.outcomes == {"finished": 1}


def test_an_outcome_that_was_entered_inside_stays() -> None:
    table = RequestTable(1)
    # 1. The block calls itself aborted before the exception that ends it; that does not make it a failure.
    with pytest.raises(ValueError, match="late"):
        live(table, S.ABORTED, ending=ValueError("late"))
    assert table.outcomes == {"aborted": 1}


def test_finishing_without_having_run_is_a_failure() -> None:
    table = RequestTable(1)
    # 1. The block ends while the prompt is still on its way, which is a bug and not hidden as a success.
    with pytest.raises(InvalidTransitionError):
        live(table, S.AWAITING_KV)
    assert table.outcomes == {"failed": 1}


async def test_a_cancelled_task_lets_go() -> None:
    table, inside = RequestTable(1), asyncio.Event()

    async def work() -> None:
        with table.admit(LiveRequest("r")):
            inside.set()
            await asyncio.Event().wait()

    # 1. A handler works, and is cancelled by its client.
    task = asyncio.create_task(work())
    await inside.wait()
    assert len(table) == 1
    task.cancel()
    # 2. The request has been aborted.
    with pytest.raises(asyncio.CancelledError):
        await task
    assert table.outcomes == {"aborted": 1}


async def test_a_dropped_stream_lets_go() -> None:
    table = RequestTable(1)

    async def stream() -> AsyncGenerator[int, None]:
        with table.admit(LiveRequest("r")):
            yield 1
            yield 2

    # 1. A client takes one message of two; the request has been aborted.
    async with aclosing(stream()) as items:
        assert await anext(items) == 1
        assert len(table) == 1
    assert table.outcomes == {"aborted": 1}
    assert_idle(table)


class TableMachine(RuleBasedStateMachine):
    """A table of 4 with 2 credits for each owner, against a plain dictionary."""

    LIMIT, CREDITS = 4, 2
    living = Bundle("living")

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable(self.LIMIT, self.CREDITS)
        self.model: dict[str, LiveRequest] = {}
        self.blocks: dict[str, AbstractContextManager[LiveRequest]] = {}
        self.outcomes: Counter[str] = Counter()

    def expected_refusal(self, request: LiveRequest) -> Reason | None:
        """Why the model would refuse, in the order that is promised."""
        if self.table.draining:
            return Reason.DRAINING
        if request.request_id in self.model:
            return Reason.DUPLICATE_REQUEST
        if len(self.model) == self.LIMIT:
            return Reason.QUEUE_FULL
        owned = sum(other.owner == request.owner for other in self.model.values())
        return Reason.NO_CREDIT if owned == self.CREDITS else None

    @rule(target=living, name=st.sampled_from("abcdef"), owner=st.sampled_from("xyz"), tokens=st.integers(0, 9))
    def admit(self, name: str, owner: str, tokens: int) -> str:
        request = LiveRequest(name, owner, tokens)
        block, expected = self.table.admit(request), self.expected_refusal(request)
        if expected is None:
            self.model[name], self.blocks[name] = block.__enter__(), block
        else:
            assert refused(block).reason is expected
        return name

    @rule(name=living, state=st.sampled_from([S.AWAITING_KV, S.RUNNING]))
    def advance(self, name: str, state: RequestState) -> None:
        request = self.model.get(name)
        if request is not None and state in ALLOWED[request.state]:
            request.enter(state)

    @rule(name=consumes(living), ending=st.sampled_from([None, ValueError(), asyncio.CancelledError()]))
    def end(self, name: str, ending: BaseException | None) -> None:
        if name not in self.model:
            return
        request, block = self.model.pop(name), self.blocks.pop(name)
        if ending is None and request.state is S.AWAITING_KV:
            request.enter(S.RUNNING)
        assert not block.__exit__(type(ending) if ending else None, ending, None)
        outcome = S.FINISHED if ending is None else S.FAILED if isinstance(ending, Exception) else S.ABORTED
        assert request.state is outcome
        self.outcomes[outcome.name.lower()] += 1

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.table.draining = draining

    @invariant()
    def bounded_and_counted(self) -> None:
        table = self.table
        assert len(table) == len(self.model) <= self.LIMIT
        assert all(table.get(name) is request for name, request in self.model.items())
        owned = Counter(request.owner for request in self.model.values())
        assert table._owners == owned
        assert max(owned.values(), default=0) <= self.CREDITS
        assert sum(table.count(state) for state in S) == len(table)
        waiting = [r.prompt_tokens for r in self.model.values() if r.state < S.RUNNING]
        assert table.tokens_before(S.RUNNING) == sum(waiting)
        assert table.outcomes == self.outcomes

    def teardown(self) -> None:
        for name in list(self.model):
            self.end(name, asyncio.CancelledError())
        self.bounded_and_counted()
        assert_idle(self.table)


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_order_of_events = TableMachine.TestCase
