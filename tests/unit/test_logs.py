"""Log lines: JSON that says whose request it is, and nothing of what was in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SETUP = """
import logging, structlog
from tokenmesh.logs import setup_logging, setup_inherited_logging
from tokenmesh.context import WorkContext, bind
setup_logging({level!r}, "json", role="prefill", replica=1)
log = structlog.get_logger()
work = WorkContext("r-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
"""


def lines(code: str, level: str = "info", **environment: str) -> list[dict[str, Any]]:
    """What a process that is set up so logs, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(level=level) + code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_says_who_did_what_for_whom() -> None:
    # 1. Work for a request, and work for nobody; ours, and the standard library's, as vLLM's.
    first, second, third = lines(
        "with bind(work): log.info('kv arrived', bytes=7); logging.getLogger('vllm.x').warning('slow %s', 'step')\n"
        "log.info('idle')"
    )
    # 2. Each says what and who.
    assert (first["event"], first["bytes"], first["level"]) == ("kv arrived", 7, "info")
    assert second["event"] == "slow step"
    for line in (first, second, third):
        assert (line["role"], line["replica"]) == ("prefill", 1)
        assert line["timestamp"].endswith("Z")
    # 3. And for whom, if for anybody: the same ids as in the trace.
    for line in (first, second):
        assert (line["request_id"], line["trace_id"]) == ("r-1", "a" * 32)
    assert "trace_id" not in third


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_decides(level: str, expected: int) -> None:
    assert len(lines("for name in ('debug', 'info', 'warning', 'error'): getattr(log, name)('x')", level)) == expected


def test_an_exception_is_one_line() -> None:
    # 1. A traceback has many.
    (line,) = lines("try: 1 / 0\nexcept ZeroDivisionError: log.exception('broken')")
    # 2. It is in the line, as a value.
    assert line["event"] == "broken"
    assert "ZeroDivisionError" in line["exception"]


def test_children_log_as_their_service_does() -> None:
    # 1. A child process with a name of its own.
    (line,) = lines("setup_inherited_logging(process='mover'); structlog.get_logger().info('up')")
    # 2. It says both.
    assert (line["role"], line["process"]) == ("prefill", "mover")


def test_prompts_are_logged_only_when_asked_for() -> None:
    # 1. A gateway's server, told to or not, at the most talkative level; and a request as vLLM would log it.
    code = """
from services.gateway.rest import log_prompts, server_args
from tokenmesh.config import MeshConfig
from vllm.entrypoints.serve.utils.request_logger import RequestLogger
for asked in (False, True):
    mesh = MeshConfig(log={"prompts": asked})
    args = server_args(mesh, "model")
    log_prompts(mesh.log.prompts)
    if args.enable_log_requests:
        secret = f"my secret {asked}"
        RequestLogger(max_log_len=None).log_inputs("r", secret, [1, 2], None, None, None)
"""
    told = " ".join(str(line["event"]) for line in lines(code, "debug"))
    # 2. The text is there only if it was asked for.
    assert "my secret True" in told
    assert "my secret False" not in told
