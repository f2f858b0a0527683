"""The live page in a browser, over the session's mesh under load. TOKENMESH_SCREENSHOTS=docs keeps the pictures."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import httpx
import pytest

from tests.conftest import RunningMesh
from tests.mesh.test_failover import prompt
from tests.page.browser import look, needs_browser


async def load(mesh: RunningMesh, seconds: float) -> None:
    """Short and long prompts, four at a time, until the time is up."""
    end = asyncio.get_running_loop().time() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=mesh.rest_url, timeout=60) as http:
            while asyncio.get_running_loop().time() < end:
                number += 4
                body = {"model": mesh.config.model_name, "max_tokens": 40, "ignore_eos": True}
                text = "The sky is" if number % 3 == 0 else prompt(200 + 40 * (number % 5), seed=number)
                (await http.post("/v1/completions", json=body | {"prompt": text})).raise_for_status()

    await asyncio.gather(*(client(number) for number in range(4)))


@needs_browser
@pytest.mark.timeout(240)
async def test_the_page_under_load(mesh: RunningMesh, tmp_path: Path) -> None:
    # 1. Somebody looks while the mesh works.
    working = asyncio.create_task(load(mesh, 25))
    await asyncio.sleep(6)
    seen = await look(mesh.rest_url, tmp_path)
    await working
    # 2. All services and both ranks are there, and the page is without error.
    assert seen["problems"] == []
    names = [text.split("\n")[0] for text in seen["services"]]
    assert names == ["gateway-0", "prefill-0", "decode-root-0", "decode-worker-0"]
    assert seen["meters"] == 4
    assert "disaggregated" in seen["decisions"]
    # 3. A click on a request leads to what happened for it on the root.
    spans = [name.strip() for name in seen["waterfall"]]
    assert spans[0] == "POST /v1/completions"
    assert {"route", "DecodeService/Generate", "first_token", "decode"} <= set(spans)
    if folder := os.environ.get("TOKENMESH_SCREENSHOTS"):
        for name in ("dashboard", "waterfall"):
            shutil.copy(tmp_path / f"{name}.png", Path(folder) / f"{name}.png")
