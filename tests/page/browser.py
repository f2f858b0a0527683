"""Runs look.mjs in headless Chromium, where there is one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("node") and (HERE / "node_modules" / "playwright-core").exists()),
    reason="needs chromium, node, and `npm ci` in tests/page",
)


async def look(url: str, folder: Path, key: str = "") -> dict[str, Any]:
    """What was seen. Pictures go into `folder`."""
    arguments = [str(HERE / "look.mjs"), url, str(folder), *([key] if key else [])]
    process = await asyncio.create_subprocess_exec(
        "node",
        *arguments,
        env=os.environ | {"CHROMIUM": str(CHROMIUM)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    seen: dict[str, Any] = json.loads(out)
    return seen
