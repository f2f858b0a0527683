"""vLLM's own front end over a mesh: everything between an OpenAI request and tokens is stock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import grpc
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from services.gateway.mesh_core import MeshCore
from services.gateway.pulse import Pulse
from services.gateway.router import Router
from tokenmesh.config import GatewayConfig
from tokenmesh.lifecycle import RequestState, RequestTable
from tokenmesh.rpc.errors import MeshError, Reason, unavailable

_HTTP = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.ALREADY_EXISTS: HTTPStatus.CONFLICT,
}

LIFE_S = 1.0


class MeshEngineClient(AsyncLLM):
    """AsyncLLM whose engine core is a mesh. Holds a tokenizer and no weights."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: GatewayConfig,
        model_name: str,
        pulse: Pulse,
        router: Router,
        requests: RequestTable,
    ) -> None:
        # Not super().__init__(): it would start an engine process. What follows is the rest of it.
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        self.log_requests = False
        self.log_stats = True
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer, log_stats=True, stream_interval=vllm_config.scheduler_config.stream_interval
        )
        self._router = router
        self._requests = requests
        self.engine_core = MeshCore(config, model_name, pulse, router, requests, self._refused)
        self.logger_manager = StatLoggerManager(
            vllm_config=vllm_config, engine_idxs=[0], custom_stat_loggers=[], enable_default_loggers=False
        )
        self._show_load()
        self.output_handler: asyncio.Task[None] | None = None
        self.profiler = None
        self._client_count = 1

    def _show_load(self) -> None:
        """Answers for vLLM's gauges of a scheduler, which nobody would set: routers and autoscalers read them."""
        (logger,) = (each for each in self.logger_manager.stat_loggers if isinstance(each, PrometheusStatLogger))
        logger.gauge_scheduler_running[0].set_function(lambda: self._requests.count(RequestState.RUNNING))
        logger.gauge_scheduler_waiting[0].set_function(
            lambda: len(self._requests) - self._requests.count(RequestState.RUNNING)
        )
        logger.gauge_kv_cache_usage[0].set_function(self._router.entry.kv_usage)

    def _refused(self, request_id: str, error: MeshError) -> None:
        """Ends a sequence with an error that vLLM's handlers turn into the right response."""
        state = self.output_processor.request_states.get(request_id)
        if state is None or state.queue is None:
            return
        queue, parent = state.queue, state.parent_req
        exception: VLLMClientError | GracefulHTTPError
        if error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
            exception = VLLMValidationError(error.message, parameter=error.metadata.get("param"))
        else:
            exception = GracefulHTTPError(error.message, _HTTP.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR))
        # For the gRPC front, which has more to tell than HTTP.
        exception.__cause__ = error
        # One refused choice of several refuses the request: its siblings must not run on unseen.
        family = list(parent.child_requests) if parent is not None else [request_id]
        self.engine_core.cancel([r for r in family if r != request_id])
        self.output_processor.abort_requests([request_id if parent is None else parent.request_id], internal=True)
        queue.put(exception)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Ends requests that nobody waits for any more."""
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        self.engine_core.cancel(self.output_processor.abort_requests(ids, internal))

    @property
    def draining(self) -> bool:
        """No request is taken any more."""
        return self._requests.draining

    @property
    def errored(self) -> bool:
        """Never: who cannot be served is refused by `check_admission`, with a reason."""
        return False

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Waits for `stop`. Raises EngineDeadError once outputs are no longer read, for a fault in what reads them."""
        while not stop.is_set():
            if not self.is_running:
                raise EngineDeadError()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LIFE_S)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuses before a stream has begun. Raises GracefulHTTPError 503, or 429 for more than fit."""
        try:
            if not self.is_running:
                raise unavailable(Reason.ENGINE_DEAD, "the gateway must be started anew")
            # More than there ever is room for: a mistake of the request's, which is told as such when it is looked at.
            self._requests.check_room(n if n <= self._requests.limit else 1)
        except MeshError as error:
            raise GracefulHTTPError(error.message, _HTTP[error.code]) from error
        if not self._router.entry.usable():
            raise GracefulHTTPError(f"no {self._router.entry.kind} is available", HTTPStatus.SERVICE_UNAVAILABLE)

    async def check_health(self) -> None:
        """Raises EngineDeadError, which /health turns into 503, while no request could be served."""
        if not self.is_running or self._requests.draining or not self._router.entry.usable():
            raise EngineDeadError()

    async def is_tracing_enabled(self) -> bool:
        """vLLM's own tracing is off; trace context travels in gRPC metadata."""
        return False

    def get_kv_event_sources(self) -> dict[int, Any]:
        """None: blocks are the services'."""
        return {}

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Prefix caches belong to the services."""
        return False
