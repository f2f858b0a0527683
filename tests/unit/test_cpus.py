"""Lists of cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tokenmesh.config import ConfigError, MeshConfig
from tokenmesh.cpus import LEAST_WEIGHT, confine, parse_cpus, stand_back
from tokenmesh.mesh_file import load_config


@pytest.mark.parametrize(
    ("text", "cores"), [("0", {0}), ("0-3", {0, 1, 2, 3}), ("1,3-4, 9", {1, 3, 4, 9}), ("2-2", {2})]
)
def test_lists(text: str, cores: set[int]) -> None:
    assert parse_cpus(text) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "0-99999999", "1.5"])
def test_what_is_no_list_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="no list of cores"):
        parse_cpus(text)


def test_a_bad_list_names_its_key(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("prefill_service: {cpus: all}\n")
    with pytest.raises(ConfigError, match=r"prefill_service\.cpus"):
        load_config(file)
    assert MeshConfig(decode_service={"cpus": "0-1"}).decode_service.cpus == "0-1"


def test_a_process_is_confined_with_all_that_it_starts() -> None:
    core = min(os.sched_getaffinity(0))
    code = (
        "import os, subprocess, sys; from tokenmesh.cpus import confine; confine(sys.argv[1]);"
        "subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'], check=True)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(core)], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == str({core})


def test_cores_that_are_not_there_are_refused() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="none of the cores"):
        confine("60000")
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("bind", "narrower"), [("CORE|CORE", True), ("auto", False), ("60000", False)])
def test_one_thread_stands_back_and_no_other(bind: str, narrower: bool) -> None:
    mine = os.sched_getaffinity(0)
    core = min(mine)
    seen: list[tuple[int, set[int]]] = []

    def spin() -> None:
        stand_back(bind.replace("CORE", str(core)))
        seen.append((os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)))

    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()
    assert seen == [(LEAST_WEIGHT, {core} if narrower else mine)]
    assert os.getpriority(os.PRIO_PROCESS, 0) < LEAST_WEIGHT
    assert os.sched_getaffinity(0) == mine
