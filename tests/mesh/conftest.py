"""Tests here run against the session's mesh, and leave it idle; or against one of their own."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import grpc
import httpx
import openai
import pytest

from tests.conftest import RunningMesh
from tests.mesh.exact import Truth
from tests.refusals import inference
from tokenmesh.v1 import inference_pb2, inference_pb2_grpc

LOG_LINES = 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests."""
    for item in items:
        if "tests/mesh" in str(item.path):
            item.add_marker(pytest.mark.mesh)


@pytest.fixture(autouse=True)
def idle_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Proves after a test on the session's mesh that no request, block or transfer is left in it."""
    mesh: RunningMesh | None = request.getfixturevalue("mesh") if "mesh" in request.fixturenames else None
    yield
    if mesh is not None:
        assert not any(mesh.wait_idle().values()), mesh.held()


@pytest.fixture
def client(mesh: RunningMesh) -> Iterator[openai.OpenAI]:
    """An SDK client that never repeats a request."""
    with openai.OpenAI(base_url=f"{mesh.rest_url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.fixture
def http(mesh: RunningMesh) -> Iterator[httpx.Client]:
    """What the SDK does not reach: headers and vLLM's own paths."""
    with httpx.Client(base_url=mesh.rest_url, timeout=30) as plain:
        yield plain


@pytest.fixture
def model(mesh: RunningMesh) -> str:
    """The served model's name."""
    return mesh.config.model_name


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A plain engine's answers; the first test that asks waits for them."""
    return Truth(tmp_path_factory.mktemp("truth"))


@pytest.fixture(scope="module")
def serves_on(mesh: RunningMesh) -> Iterator[None]:
    """After all refusals a good request is answered as before, over both front ends."""
    yield
    body = {"model": mesh.config.model_name, "prompt": "The sky is", "max_tokens": 2, "temperature": 0}
    rest = httpx.post(f"{mesh.rest_url}/v1/completions", json=body, timeout=30)
    assert rest.status_code == 200, rest.text
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        whole = inference_pb2.InferenceServiceGenerateRequest(request=inference())
        reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(whole, timeout=30)
    assert reply.choices[0].text == rest.json()["choices"][0]["text"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows with a failure what the session's mesh logged last: the cause is rarely in the test."""
    report = yield
    logs = getattr(item, "funcargs", {}).get("mesh_logs")
    if report.failed and logs is not None:
        for log in sorted(logs.glob("*.log")):
            report.sections.append((f"end of {log.name}", "\n".join(log.read_text().splitlines()[-LOG_LINES:])))
    return report
