"""Rules of the repository that no linter of ours knows."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_LINES = 420
HOMES = ("root", "work", "home")
"""Roots under which a developer's files lie; nothing in the repository may depend on one."""
NOBODYS_HOME = f"/{HOMES[-1]}/someone"
"""A made-up person's home, which may stand in a test."""


def repository() -> list[Path]:
    """Every file that is or may be committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        timeout=30,
    )
    return sorted(path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file())


FILES = repository()
PYTHON = [path for path in FILES if path.suffix == ".py" and path.parent != ROOT / "tokenmesh" / "v1"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def swallowed(source: str) -> list[int]:
    """Lines of handlers that catch everything, or anything by hand, and do nothing at all."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    return [handler.lineno for handler in handlers if all(isinstance(s, ast.Pass) or _bare(s) for s in handler.body)]


def _bare(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def absolute_homes(text: str) -> list[str]:
    """Absolute paths under a home, though not the tails of longer paths or of URLs."""
    found = re.findall(rf"(?<![\w./}}-])/(?:{'|'.join(HOMES)})/[\w.-]*", text)
    return [path for path in found if path != NOBODYS_HOME]


def entry_points() -> dict[str, str]:
    """Where each script and plug-in of the package leads."""
    groups = [PROJECT.get("scripts", {}), *PROJECT.get("entry-points", {}).values()]
    return {f"{key} = {target}": target for group in groups for key, target in group.items()}


def test_the_repository_was_found() -> None:
    # 1. The rules below are of no use on an empty list.
    assert {"pyproject.toml", "Makefile", "tokenmesh/config.py", "tests/unit/test_layout.py"} <= set(map(name, FILES))


def test_no_module_is_too_long() -> None:
    # 1. Generated stubs apart, every Python file can be read in one sitting.
    lengths = {name(path): len(path.read_text().splitlines()) for path in PYTHON}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_service_has_a_container() -> None:
    # 1. A folder under services/ with a main.py is a service.
    mains = [path for path in PYTHON if name(path).startswith("services/") and path.name == "main.py"]
    services = {name(path.parent) for path in mains}
    assert services >= {f"services/{s}" for s in ("gateway", "prefill", "decode/root", "decode/worker")}
    # 2. Each brings its Containerfile, and there are no others.
    assert {name(path.parent) for path in FILES if path.name == "Containerfile"} == services


def test_comments_in_protos_are_linted() -> None:
    # 1. `make lint` runs buf, which asks for a comment on everything that a client sees.
    rules = set(yaml.safe_load((ROOT / "protos" / "buf.yaml").read_text())["lint"]["use"])
    assert rules >= {"STANDARD", "COMMENT_ENUM", "COMMENT_MESSAGE", "COMMENT_RPC", "COMMENT_SERVICE"}
    assert "buf lint protos" in (ROOT / "Makefile").read_text()


def test_no_exception_is_swallowed() -> None:
    # 1. Who means to ignore an exception says so with contextlib.suppress, or does something.
    found = [f"{name(path)}:{line}" for path in PYTHON for line in swallowed(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("body", "lines"),
    [("pass", [3]), ("'why not'", [3]), ("...", [3]), ("x = 1", []), ("raise", []), ("pass\n    x = 1", [])],
)
def test_a_swallowed_exception_is_recognised(body: str, lines: list[int]) -> None:
    # 1. The rule above finds what it is meant to find.
    assert swallowed(f"try:\n    f()\nexcept ValueError:\n    {body}\n") == lines


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_names_the_two_commands(command: str) -> None:
    # 1. As a whole line of an example, not in passing.
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert command in lines
    # 2. And the Makefile has the target.
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", entry_points().values(), ids=entry_points().keys())
def test_every_entry_point_leads_somewhere(target: str) -> None:
    # 1. Import it as pip's wrapper or vLLM's plug-in loader would.
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    # 2. Both call it.
    assert callable(found)


def test_no_file_depends_on_somebodys_home() -> None:
    # 1. Binary files apart, no path of the machine that a file was written on.
    found: dict[str, list[str]] = {}
    for path in FILES:
        try:
            homes = absolute_homes(path.read_text())
        except UnicodeDecodeError:
            continue
        if homes:
            found[name(path)] = homes
    assert found == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("see {}/x.py", 1), ('"{}/x"', 1), ("A={}/x:{}/y", 2), ("{}/", 1)),
        *(("http://host{}/x", 0), ("a{}/x", 0), (".{}/x", 0), ("$HOME{}/x", 0)),
    ],
)
@pytest.mark.parametrize("home", HOMES)
def test_an_absolute_path_is_recognised(text: str, count: int, home: str) -> None:
    # 1. The rule above finds what it is meant to find, and leaves relative paths and URLs alone.
    assert len(absolute_homes(text.replace("{}", "/" + home))) == count
