"""Checks everything under deploy/ and examples/ that no test runs: schemas, meshes, container files.

Usage: python deploy/check_manifests.py

Prints one line per problem and exits with 1 if there is any. Nothing is built or applied and no cluster is asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenmesh.config import ConfigError  # noqa: E402
from tokenmesh.mesh_file import load_config  # noqa: E402

KUBERNETES = "1.33"
COMPOSE = ROOT / "deploy" / "compose.yaml"
KUSTOMIZATIONS = sorted(path.parent for path in (ROOT / "deploy" / "kustomize").rglob("kustomization.yaml"))
MESHES = sorted([*(ROOT / "deploy").rglob("mesh.yaml"), *(ROOT / "examples").glob("*.yaml")])
CONTAINER_FILES = sorted([*(ROOT / "deploy").rglob("*Containerfile"), *(ROOT / "services").rglob("Containerfile")])


@dataclass
class Report:
    """What was checked and what was wrong."""

    passed: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, problem: str | None) -> None:
        """Counts one check; a problem is cut to one line."""
        if problem is None:
            self.passed += 1
        else:
            self.problems.append(f"{what}: {' '.join(problem.split())}")


def tool(name: str) -> str | None:
    """A program beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def run(*command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command at the repository root; 127 if it never ends."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return 127, "", "took longer than 120 s"
    return done.returncode, done.stdout, done.stderr


def relative(path: Path) -> str:
    """For people: a path from the repository root."""
    return str(path.relative_to(ROOT))


def schema_problem(document: dict[str, Any]) -> str | None:
    """What a Kubernetes API server of this version would refuse by schema."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(str(part) for part in error.path) or 'top level'}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return None


def documents(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Kubernetes document, rendered where kubectl can do it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        print("note: no kubectl on PATH: overlays are not rendered, only the files of base are checked, one by one")
        for path in sorted((ROOT / "deploy" / "kustomize" / "base").glob("*.yaml")):
            if path.name not in ("kustomization.yaml", "mesh.yaml"):
                yield from ((relative(path), doc) for doc in yaml.safe_load_all(path.read_text()) if doc)
        return
    for folder in KUSTOMIZATIONS:
        code, out, err = run(kubectl, "kustomize", str(folder))
        report.add(relative(folder), None if code == 0 else f"does not render: {err}")
        if code == 0:
            yield from ((relative(folder), doc) for doc in yaml.safe_load_all(out) if doc)


def check_kubernetes(report: Report) -> None:
    """Schemas, strictly: an unknown key is a problem."""
    for where, document in documents(report):
        kind, name = document.get("kind"), document.get("metadata", {}).get("name")
        report.add(f"{where} {kind}/{name}", schema_problem(document))


def check_compose(report: Report) -> None:
    """The compose specification's schema, as check-jsonschema bundles it."""
    checker = tool("check-jsonschema")
    if checker is None:
        report.add(relative(COMPOSE), "check-jsonschema is not installed")
        return
    code, out, err = run(checker, "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    report.add(relative(COMPOSE), None if code == 0 else out + err)


def check_meshes(report: Report) -> None:
    """Every mesh file loads, by itself: overrides of the caller's environment are set aside."""
    for key in [key for key in os.environ if key.startswith("TOKENMESH_")]:
        del os.environ[key]
    for path in MESHES:
        problem = None
        try:
            load_config(path)
        except ConfigError as error:
            problem = str(error)
        report.add(relative(path), problem)


def check_container_files(report: Report) -> None:
    """hadolint finds nothing, hints included."""
    hadolint = tool("hadolint")
    for path in CONTAINER_FILES:
        if hadolint is None:
            report.add(relative(path), "hadolint is not installed")
            continue
        code, out, err = run(hadolint, "--no-color", relative(path))
        report.add(relative(path), None if code == 0 else out + err)


def main() -> int:
    """All checks; the exit code."""
    report = Report()
    for check in (check_kubernetes, check_compose, check_meshes, check_container_files):
        check(report)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    print(f"{report.passed} checks passed" + (f", {len(report.problems)} failed" if report.problems else ""))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
