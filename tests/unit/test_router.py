"""The gateway's choice: the idlest service, unless another has seen the prompt's beginning and is about as idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from services.gateway.router import AFFINITY_ENTRIES, AFFINITY_SLACK, Pool, Router
from tokenmesh.config import MeshConfig
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import sampling_pb2

A, B, C = "root-a:1", "root-b:1", "root-c:1"
P, Q = "prefill-p:1", "prefill-q:1"
AFFINITY_TOKENS = 4
PROMPT = [1, 2, 3, 4, 5]
SHORT = [1, 2, 3]

MakeRouter = Callable[..., Router]


@pytest.fixture
async def make() -> AsyncIterator[MakeRouter]:
    """Routers whose peers are all up, though nobody polls them."""
    made: list[Router] = []

    def router(roots: tuple[str, ...] = (A, B, C), prefills: tuple[str, ...] = (P, Q), **gateway: Any) -> Router:
        gateway = {"prefix_affinity_tokens": AFFINITY_TOKENS, **gateway}
        gateway = {"decode_roots": roots, "prefills": prefills, **gateway}
        made.append(Router(MeshConfig(gateway=gateway, decode_service={"remote_prefill_min_tokens": 1})))
        for pool in (made[-1].roots, made[-1].prefills):
            for peer in pool.peers:
                peer.up = True
        return made[-1]

    yield router
    for each in made:
        await each.__aexit__()


def set_loads(pool: Pool, **loads: int) -> None:
    """Sets what polls would have found, by the letter of a peer: a=1 for root-a."""
    for peer in pool.peers:
        peer.queued = loads.get(peer.address[-3], 0)


def ranking(pool: Pool, prefix: int | None = None) -> list[str]:
    return [peer.address for peer in pool.ranked(prefix)]


def pick(router: Router, tokens: list[int], salt: str = "", avoid: set[str] | None = None) -> str:
    """Where a request that ends at once would have gone."""
    with router.route(tokens, salt, avoid or set()) as route:
        return route.entry.address


def in_flight(router: Router) -> dict[str, int]:
    """Requests counted now, by address; none where there are none."""
    return {p.address: p.in_flight for pool in (router.roots, router.prefills) for p in pool.peers if p.in_flight}


async def test_the_idlest_comes_first(make: MakeRouter) -> None:
    router = make()
    # 1. Polls found three loads.
    set_loads(router.roots, a=3, b=1, c=2)
    # 2. The ranking is by load.
    assert ranking(router.roots) == [B, C, A]
    assert pick(router, SHORT) == B


async def test_the_load_is_what_we_or_others_put_there(make: MakeRouter) -> None:
    (peer, *_) = make().roots.peers
    # 1. Polls lag behind our own requests, and see those of others: whichever is more counts.
    for ours, polled in ((0, 5), (5, 0), (3, 4)):
        peer.in_flight, peer.queued = ours, polled
        assert peer.load == max(ours, polled)


async def test_who_does_not_answer_is_not_used(make: MakeRouter) -> None:
    router = make()
    # 1. The idlest does not answer polls.
    set_loads(router.roots, b=1, c=2)
    router.roots.peers[0].up = False
    # 2. It is not in the ranking at all.
    assert ranking(router.roots) == [B, C]


async def test_a_prefix_returns_to_who_has_seen_it(make: MakeRouter) -> None:
    router = make()
    # 1. A prompt goes to the idlest.
    set_loads(router.roots, a=1, b=0, c=1)
    assert pick(router, PROMPT) == B
    # 2. That one is now busier than others, yet within the slack: the same beginning goes there again.
    set_loads(router.roots, b=AFFINITY_SLACK)
    assert pick(router, [*PROMPT[:AFFINITY_TOKENS], 99]) == B
    # 3. The rest is ranked by load as ever.
    assert ranking(router.roots)[-1] == B


async def test_beyond_the_slack_load_wins(make: MakeRouter) -> None:
    router = make(roots=(A, B))
    # 1. A prompt was seen by a root that is now too busy.
    assert pick(router, PROMPT) == A
    set_loads(router.roots, a=AFFINITY_SLACK + 1)
    # 2. It goes to the idle one, which has now seen it too.
    assert pick(router, PROMPT) == B
    set_loads(router.roots)
    assert pick(router, PROMPT) == B


@pytest.mark.parametrize(
    ("tokens", "salt"),
    [
        pytest.param([9, *PROMPT[1:]], "", id="another beginning"),
        pytest.param(PROMPT, "salt", id="another salt"),
        pytest.param(SHORT, "", id="too short"),
    ],
)
async def test_what_shares_no_blocks_has_no_favourite(make: MakeRouter, tokens: list[int], salt: str) -> None:
    router = make(roots=(A, B))
    # 1. A prompt was seen by a root that is now a little busier.
    assert pick(router, PROMPT) == A
    set_loads(router.roots, a=1)
    # 2. A prompt that could not use that cache goes by load.
    assert pick(router, tokens, salt) == B


async def test_affinity_can_be_switched_off(make: MakeRouter) -> None:
    router = make(roots=(A, B), prefix_affinity_tokens=0)
    # 1. The same prompt twice, the second time with its root a little busier.
    assert pick(router, PROMPT) == A
    set_loads(router.roots, a=1)
    # 2. Load alone decides, and nothing is remembered.
    assert pick(router, PROMPT) == B
    assert not router.roots.affinity


async def test_the_oldest_prefixes_are_forgotten(make: MakeRouter) -> None:
    pool = make().roots
    # 1. As many prefixes as fit; the first is used once more.
    for prefix in range(AFFINITY_ENTRIES):
        pool.remember(prefix, A)
    pool.remember(0, B)
    # 2. One more pushes out the one that was unused for longest, and only that.
    pool.remember(AFFINITY_ENTRIES, C)
    assert len(pool.affinity) == AFFINITY_ENTRIES
    assert pool.affinity[0] == B
    assert 1 not in pool.affinity
    assert 2 in pool.affinity


async def test_who_refused_is_avoided(make: MakeRouter) -> None:
    router = make()
    # 1. The best two have refused this request, one of them with its prefix.
    set_loads(router.roots, b=1, c=2)
    assert pick(router, PROMPT) == A
    # 2. It goes to the third.
    assert pick(router, PROMPT, avoid={A, B}) == C


@pytest.mark.parametrize("why", ["all down", "all avoided", "none configured"])
async def test_without_a_usable_root_a_request_is_refused(make: MakeRouter, why: str) -> None:
    router = make(roots=() if why == "none configured" else (A, B))
    # 1. No root is left.
    for peer in router.roots.peers:
        peer.up = why != "all down"
    avoid = {A, B} if why == "all avoided" else set()
    # 2. The caller may try again later; nothing is counted anywhere.
    with pytest.raises(MeshError) as caught, router.route(PROMPT, "", avoid):
        pytest.fail("a root was found")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_DECODE_ROOT)
    assert not in_flight(router)


async def test_requests_count_while_they_run(make: MakeRouter) -> None:
    router = make(roots=(A, B), prefills=(P, Q))
    # 1. Two requests at a time spread over roots, and over prefill services.
    with router.route(SHORT, "", set()) as first:
        assert in_flight(router) == {A: 1, P: 1}
        assert first.candidates == [P, Q]
        with router.route(SHORT, "", set()) as second:
            assert in_flight(router) == {A: 1, P: 1, B: 1, Q: 1}
            assert (first.entry.address, second.entry.address, second.candidates) == (A, B, [Q, P])
        # 2. Each is uncounted as it ends.
        assert in_flight(router) == {A: 1, P: 1}
    assert not in_flight(router)


@pytest.mark.parametrize("ending", [ValueError("x"), asyncio.CancelledError(), GeneratorExit()], ids=repr)
async def test_requests_that_fail_are_uncounted_as_well(make: MakeRouter, ending: BaseException) -> None:
    router = make()

    def fail() -> None:
        with router.route(PROMPT, "", set()):
            assert in_flight(router) == {A: 1, P: 1}
            raise ending

    # 1. The block ends with an exception, which goes on.
    with pytest.raises(type(ending)):
        fail()
    # 2. Nothing is counted any more.
    assert not in_flight(router)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
async def test_only_unified_mode_has_prefill_candidates(make: MakeRouter, mode: str) -> None:
    router = make(mode=mode)
    # 1. In the other modes nobody is asked to prefill for another, and no prefill service is charged for it.
    with router.route(PROMPT, "", set()) as route:
        assert route.candidates == []
        assert in_flight(router) == {route.entry.address: 1}


async def test_mode_prefill_enters_through_prefill_services(make: MakeRouter) -> None:
    router = make(mode="prefill")
    # 1. Roots are idle, prefill services are not; requests go to prefill services nevertheless.
    set_loads(router.prefills, p=2, q=1)
    assert pick(router, SHORT) == Q
    # 2. Without them a request is refused, roots or not.
    with pytest.raises(MeshError, match="no prefill is available"):
        pick(router, SHORT, avoid={P, Q})


async def test_without_prefill_services_the_root_gets_no_candidates(make: MakeRouter) -> None:
    router = make()
    # 1. No prefill service answers; requests are served all the same.
    for peer in router.prefills.peers:
        peer.up = False
    with router.route(PROMPT, "", set()) as route:
        assert (route.entry.address, route.candidates, route.local_reason) == (A, [], None)


async def test_a_long_prefill_queue_sends_prompts_to_the_root(make: MakeRouter) -> None:
    router = make(roots=(A,), prefills=(P,), local_prefill_penalty=1.5)
    prompt = list(range(100))
    with ExitStack() as stack:
        # 1. The first prompt is prefilled remotely; then 200 queued there are more than 1.5 times 100 here.
        reasons = [stack.enter_context(router.route(prompt, "", set())).local_reason for _ in range(6)]
        busy = sampling_pb2.PREFILL_DECISION_PREFILL_BUSY
        assert reasons == [None, busy, None, None, busy, None]
        # 2. Tokens are counted where they are computed.
        assert router.prefills.peers[0].pending_tokens == 400
        assert router.roots.peers[0].pending_tokens == 200
    # 3. And no longer.
    assert router.prefills.peers[0].pending_tokens == router.roots.peers[0].pending_tokens == 0


async def test_a_computed_prompt_no_longer_counts_as_queued(make: MakeRouter) -> None:
    router = make(roots=(A,), prefills=(P,))
    with router.route(PROMPT, "", set()) as route:
        assert router.prefills.peers[0].pending_tokens == len(PROMPT)
        # 1. The first token has come, perhaps twice.
        route.prompt_done()
        route.prompt_done()
        assert router.prefills.peers[0].pending_tokens == 0
    assert router.prefills.peers[0].pending_tokens == 0


async def test_a_service_that_is_back_shares_the_prompts(make: MakeRouter) -> None:
    router = make(roots=(A,), prefills=(P, Q), local_prefill_penalty=0)
    router.prefills.peers[1].up = False
    with ExitStack() as stack:
        # 1. One service has computed twenty prompts that decode now; then the other comes back.
        for _ in range(20):
            stack.enter_context(router.route(PROMPT, "", set())).prompt_done()
        assert in_flight(router) == {A: 20}
        router.prefills.peers[1].up = True
        # 2. The next ones are spread: what has left a service is no load there.
        prompts = [list(range(n, n + 100)) for n in range(20)]
        routes = [stack.enter_context(router.route(prompt, "", set())) for prompt in prompts]
        assert in_flight(router) == {A: 40, P: 10, Q: 10}
    assert {route.candidates[0] for route in routes} == {P, Q}
    assert not in_flight(router)


async def test_a_favourite_with_too_much_to_do_is_passed_over(make: MakeRouter) -> None:
    router = make(roots=(A,), prefills=(P, Q), local_prefill_penalty=1.5)
    prompt = list(range(100))
    with ExitStack() as stack:
        # 1. A prefix has its favourite, which is busy with three prompts; the other service is idle.
        for _ in range(3):
            router.prefills.remember(router._prefix(prompt, ""), P)
            router.prefills.peers[0].pending_tokens = 300
        # 2. The idle one computes the next, not the root.
        assert stack.enter_context(router.route(prompt, "", set())).candidates == [Q, P]


async def test_without_a_penalty_prompts_wait_for_prefill_services(make: MakeRouter) -> None:
    router = make(roots=(A,), prefills=(P,), local_prefill_penalty=0)
    with ExitStack() as stack:
        routes = [stack.enter_context(router.route(PROMPT, "", set())) for _ in range(20)]
    assert all(route.candidates == [P] for route in routes)
