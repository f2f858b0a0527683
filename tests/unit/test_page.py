"""The live page in a browser, over a mesh that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.gateway.dashboard.app import dashboard
from services.gateway.keys import Keys
from tests.page.browser import look, needs_browser
from tests.page.made_up import MadeUpWatcher
from tokenmesh.rpc.http import HttpServer, bind
from tokenmesh.telemetry.span_store import SpanStore


@needs_browser
@pytest.mark.parametrize("key", ["", "root"], ids=["open", "with a key"])
async def test_the_page_by_mouse_by_keyboard_and_on_a_phone(tmp_path: Path, key: str) -> None:
    # 1. Somebody looks at it.
    store = SpanStore(100)
    watcher: Any = MadeUpWatcher(store)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    async with HttpServer(dashboard(watcher, store, Keys([key] if key else [])), listener, grace=1):
        seen = await look(f"http://127.0.0.1:{port}", tmp_path, key)
    # 2. No error, no request to another host, and nothing that a client sent became markup.
    assert seen["problems"] == []
    # 3. Every service, with its trouble; KV and context of both ranks; decisions.
    assert [text.split("\n")[0] for text in seen["services"]] == [
        "gateway-0",
        "prefill-0",
        "decode-root-0",
        "decode-worker-0",
    ]
    assert "connection refused" in seen["services"][3]
    assert seen["meters"] == 4
    assert "too short" in seen["decisions"]
    # 4. A click leads to the waterfall, parents first, and another one to what is known of a span.
    assert [name.strip() for name in seen["waterfall"]] == [
        "POST /v1/completions",
        "DecodeService/Generate",
        "remote_prefill",
        "kv_receive",
        "kv_push",
        "decode",
    ]
    assert "service" in seen["details"]
    # 5. Without a mouse as well, and updates do not take the focus away.
    assert seen["closed"]
    assert seen["openedByKey"]
    assert seen["focusKept"]
    # 6. On 360 pixels nothing is cut off.
    assert seen["phoneWidth"] == 360
    assert seen["phoneDialogWidth"] <= 360
    assert {file.name for file in tmp_path.iterdir()} == {
        "dashboard.png",
        "waterfall.png",
        "phone.png",
        "phone-waterfall.png",
    }
