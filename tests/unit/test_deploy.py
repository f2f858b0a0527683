"""What the deployment files promise: no root, nothing writable, probes, pinned images, ports and names that agree."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.decode.worker.main import DRAIN_S
from tokenmesh.config import DecodeWorkerConfig, EngineConfig, MeshConfig
from tokenmesh.mesh_file import load_config
from tokenmesh.rpc.server import LIVE

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "kustomize" / "base"
GPU = ROOT / "deploy" / "kustomize" / "overlays" / "gpu"
MESHES = sorted([*(ROOT / "deploy").rglob("mesh.yaml"), *(ROOT / "examples").glob("*.yaml")])
CONTAINER_FILES = sorted([*(ROOT / "deploy").rglob("*Containerfile"), *(ROOT / "services").rglob("Containerfile")])
UID = 10001
POD_IP = "10.1.2.3"

Doc = dict[str, Any]

DOCUMENTS: list[Doc] = [
    doc
    for path in sorted(BASE.glob("*.yaml"))
    if path.name not in ("kustomization.yaml", "mesh.yaml")
    for doc in yaml.safe_load_all(path.read_text())
]
WORKLOADS = [doc for doc in DOCUMENTS if doc["kind"] in ("Deployment", "StatefulSet")]
COMPOSE: Doc = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, Doc] = COMPOSE["services"]

DEFAULTS = MeshConfig()
GRPC_PORTS = {
    "gateway": DEFAULTS.gateway.grpc_port,
    "prefill": DEFAULTS.prefill_service.port,
    "decode-root": DEFAULTS.decode_service.port,
    "decode-worker": DEFAULTS.decode_worker.port,
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides of the caller's shell must not reach the files under test."""
    for key in [key for key in os.environ if key.startswith("TOKENMESH_")]:
        monkeypatch.delenv(key)


def role(workload: Doc) -> str:
    return str(workload["metadata"]["name"]).removeprefix("tokenmesh-")


def container(workload: Doc) -> Doc:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(only)


def of_kind(kind: str) -> dict[str, Doc]:
    return {role(doc): doc for doc in DOCUMENTS if doc["kind"] == kind}


def section(mesh: MeshConfig, name: str) -> EngineConfig | DecodeWorkerConfig:
    """Of a role that owns KV."""
    if name == "decode-worker":
        return mesh.decode_worker
    return mesh.prefill_service if name == "prefill" else mesh.decode_service


def ports(mesh: MeshConfig, name: str) -> dict[str, int]:
    """What a role listens on, in the order in which its files list them."""
    if name == "gateway":
        return {"http": mesh.gateway.port, "grpc": mesh.gateway.grpc_port}
    here = section(mesh, name)
    found = {"grpc": here.port, "kv": here.kv_transfer.port, "metrics": here.metrics_port}
    return {**found, "rows": mesh.decode_worker.exchange_port} if name == "decode-worker" else found


def gibibytes(quantity: str) -> float:
    match = re.fullmatch(r"(\d+)(Mi|Gi|gb)", quantity)
    assert match, quantity
    return int(match[1]) / (1024 if match[2] == "Mi" else 1)


each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=role)
each_service = pytest.mark.parametrize("name", SERVICES)


def test_every_role_is_deployed() -> None:
    assert {role(w) for w in WORKLOADS} == set(GRPC_PORTS)
    assert set(SERVICES) == {*GRPC_PORTS, "shm"}


# Kubernetes


@each_workload
def test_pod_is_confined(workload: Doc) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "injected TOKENMESH_*_PORT variables would read as configuration"
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == UID
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(workload)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@each_workload
def test_pod_has_bounds(workload: Doc) -> None:
    resources = container(workload)["resources"]
    for kind in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= resources[kind].keys()
    volumes = {v["name"]: v for v in workload["spec"]["template"]["spec"]["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in container(workload)["volumeMounts"]}
    # A decode worker has no model to keep.
    cache = set() if role(workload) == "decode-worker" else {"/var/cache/tokenmesh"}
    assert mounts.keys() == {"/etc/tokenmesh", "/tmp", "/dev/shm"} | cache
    for path in mounts.keys() - {"/etc/tokenmesh"}:
        assert "sizeLimit" in volumes[mounts[path]]["emptyDir"], path
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/etc/tokenmesh"]]["configMap"]["name"] == "tokenmesh-mesh"


@each_workload
def test_probes_ask_the_grpc_port(workload: Doc) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        # A gateway is ready while there is a decode root; it must not be killed for want of one.
        alive = {"service": LIVE} if role(workload) == "gateway" and probe != "readinessProbe" else {}
        assert container(workload)[probe]["grpc"] == {"port": GRPC_PORTS[role(workload)], **alive}, probe


@each_workload
def test_old_work_may_finish(workload: Doc) -> None:
    hook = container(workload)["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert hook.rstrip('"').endswith(f":{GRPC_PORTS[role(workload)]}")
    drain = int(re.search(r"timeout (\d+) tokenmesh drain", hook)[1])  # type: ignore[index]
    delay = re.match(r"sleep (\d+);", hook)
    longest = load_config(BASE / "mesh.yaml").gateway.request_timeout_s
    grace = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    if role(workload) == "decode-worker":
        # No request ends here: the root takes its sequences back, after SIGTERM.
        assert drain + DRAIN_S < grace
        return
    assert longest < drain
    assert drain + int(delay[1] if delay else 0) < grace


@each_workload
def test_selectors_meet(workload: Doc) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    spread = workload["spec"]["template"]["spec"]["topologySpreadConstraints"][0]
    selectors = [
        workload["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
        of_kind("Service")[role(workload)]["spec"]["selector"],
        of_kind("PodDisruptionBudget")[role(workload)]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)


@each_workload
def test_ports_are_the_configs(workload: Doc) -> None:
    expected = ports(load_config(BASE / "mesh.yaml"), role(workload))
    assert {p["name"]: p["containerPort"] for p in container(workload)["ports"]} == expected
    assert {p["name"]: p["port"] for p in of_kind("Service")[role(workload)]["spec"]["ports"]} == expected


def test_a_mesh_of_another_overlay_listens_where_the_base_says() -> None:
    # An overlay replaces the base's mesh and keeps its Services and their ports.
    base = load_config(BASE / "mesh.yaml")
    for path in sorted(BASE.parent.glob("overlays/*/mesh.yaml")):
        mesh = load_config(path)
        assert ports(mesh, "gateway") == ports(base, "gateway"), path
        for name in ("decode-root", *(("prefill",) if mesh.prefill_service.replicas else ())):
            unused = {"kv": 0} if section(mesh, name).kv_transfer.transport == "none" else {}
            assert ports(mesh, name) == ports(base, name) | unused, path
        assert mesh.telemetry.gateway == base.telemetry.gateway, path


def test_pods_announce_their_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for workload in WORKLOADS:
        names = [variable["name"] for variable in container(workload)["env"]]
        for variable in container(workload)["env"]:
            if "$(POD_IP)" in variable.get("value", ""):
                assert names.index("POD_IP") < names.index(variable["name"]), "expanded only from what stands above"
                monkeypatch.setenv(variable["name"], variable["value"].replace("$(POD_IP)", POD_IP))
    mesh = load_config(BASE / "mesh.yaml")
    for name in of_kind("StatefulSet"):
        found = section(mesh, name)
        assert (found.host, found.kv_transfer.host) == (POD_IP, POD_IP), name


def test_api_keys_come_from_an_optional_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    (variable,) = (v for v in container(of_kind("Deployment")["gateway"])["env"] if "API_KEYS" in v["name"])
    assert variable["valueFrom"]["secretKeyRef"]["optional"] is True
    monkeypatch.setenv(variable["name"], json.dumps(["one", "two"]))
    assert load_config(BASE / "mesh.yaml").gateway.api_keys == ("one", "two")


@pytest.mark.parametrize("path", sorted(BASE.parent.rglob("mesh.yaml")), ids=lambda p: p.parent.name)
def test_mesh_names_the_stateful_pods(path: Path) -> None:
    mesh = load_config(path)
    overlay = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
    counts = {replicas["name"]: replicas["count"] for replicas in overlay.get("replicas", [])}
    pods = {
        name: tuple(
            f"tokenmesh-{name}-{i}.{s['spec']['serviceName']}:{GRPC_PORTS[name]}"
            for i in range(counts.get(s["metadata"]["name"], s["spec"]["replicas"]))
        )
        for name, s in of_kind("StatefulSet").items()
    }
    assert mesh.gateway.decode_roots == pods["decode-root"]
    assert mesh.gateway.prefills == mesh.decode_service.prefills == pods["prefill"]
    # Every worker is a rank of the one root.
    assert len(pods["decode-root"]) == 1
    assert mesh.worker_addresses(0) == pods["decode-worker"]
    assert mesh.decode_service.token_parallel_size == 1 + len(pods["decode-worker"])
    for name in pods:
        assert of_kind("Service")[name]["spec"]["clusterIP"] == "None"


def test_gpus_are_for_engines() -> None:
    overlay = yaml.safe_load((GPU / "kustomization.yaml").read_text())
    patched = {
        patch["path"]: {role(w) for w in WORKLOADS if re.fullmatch(patch["target"]["name"], w["metadata"]["name"])}
        for patch in overlay["patches"]
    }
    assert patched == {
        "engine.yaml": {"prefill", "decode-root"},
        "models.yaml": {"gateway", "prefill", "decode-root"},
    }
    assert {image["name"] for image in overlay["images"]} == {"tokenmesh/prefill", "tokenmesh/decode-root"}


def test_every_manifest_and_image_is_listed() -> None:
    base = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert {*base["resources"], "kustomization.yaml", "mesh.yaml"} == {path.name for path in BASE.glob("*.yaml")}
    images = {f"{image['name']}:{image['newTag']}" for image in base["images"]}
    assert images == {container(w)["image"] for w in WORKLOADS}


def test_shared_memory_holds_the_kv_cache() -> None:
    kubernetes, compose = load_config(BASE / "mesh.yaml"), load_config(ROOT / "deploy" / "mesh.yaml")
    owners = of_kind("StatefulSet")
    for name, workload in owners.items():
        (shm,) = (v for v in workload["spec"]["template"]["spec"]["volumes"] if v["name"] == "shm")
        held = (section(kubernetes, name).kv_cache_memory_bytes or 0) / 2**30
        assert held < gibibytes(shm["emptyDir"]["sizeLimit"])
        # Twice: it is copied there once it has been allocated.
        assert 2 * held < gibibytes(container(workload)["resources"]["limits"]["memory"])
    together = sum(section(compose, name).kv_cache_memory_bytes or 0 for name in owners)
    assert together / 2**30 < gibibytes(SERVICES["shm"]["shm_size"])


# Compose


@each_service
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == f"{UID}:{UID}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pull_policy"] == "never"
    assert not {"privileged", "cap_add", "devices"} & service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["stop_grace_period"]


@pytest.mark.parametrize("name", GRPC_PORTS)
def test_health_is_asked_where_the_service_listens(name: str) -> None:
    address = SERVICES[name]["healthcheck"]["test"][-1]
    mesh = load_config(ROOT / "deploy" / "mesh.yaml")
    if name == "gateway":
        assert (mesh.gateway.host, address) == ("0.0.0.0", f"127.0.0.1:{mesh.gateway.grpc_port}")
        return
    found = section(mesh, name)
    assert found.host == found.kv_transfer.host == SERVICES[name]["hostname"] == name
    assert address == f"{name}:{found.port}"
    assert SERVICES[name]["expose"] == [str(port) for port in ports(mesh, name).values()]


def test_mesh_names_the_services_of_compose() -> None:
    mesh = load_config(ROOT / "deploy" / "mesh.yaml")
    assert mesh.gateway.decode_roots == mesh.decode_addresses() == (f"decode-root:{GRPC_PORTS['decode-root']}",)
    assert mesh.gateway.prefills == mesh.decode_service.prefills == mesh.prefill_addresses()
    assert mesh.prefill_addresses() == (f"prefill:{GRPC_PORTS['prefill']}",)
    assert mesh.worker_addresses(0) == (f"decode-worker:{GRPC_PORTS['decode-worker']}",)
    assert mesh.decode_service.token_parallel_size == 2


def test_nobody_waits_for_the_decode_worker() -> None:
    assert [name for name, service in SERVICES.items() if "decode-worker" in service.get("depends_on", {})] == []
    # And it keeps nothing.
    assert SERVICES["decode-worker"]["volumes"] == ["./mesh.yaml:/etc/tokenmesh/mesh.yaml:ro"]


def test_owners_of_kv_share_ipc_and_pid_namespaces() -> None:
    assert SERVICES["shm"]["ipc"] == "shareable"
    for name in of_kind("StatefulSet"):
        assert SERVICES[name]["ipc"] == SERVICES[name]["pid"] == "service:shm"
        assert SERVICES[name]["depends_on"] == {"shm": {"condition": "service_healthy"}}


# Images and meshes


def test_images_are_pinned() -> None:
    images = [container(w)["image"] for w in WORKLOADS] + [s["image"] for s in SERVICES.values()]
    for path in CONTAINER_FILES:
        images += re.findall(r"^ARG \w+_IMAGE=(\S+)$", path.read_text(), re.MULTILINE)
    assert len(images) == len(WORKLOADS) + len(SERVICES) + len(CONTAINER_FILES)
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+[\w.-]*$", image), image


@pytest.mark.parametrize("path", CONTAINER_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_container_file_does_not_end_as_root(path: Path) -> None:
    text = path.read_text()
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    if path.name == "base.Containerfile":
        assert users[-1] == f"{UID}:{UID}"
        assert "STOPSIGNAL SIGTERM" in text
    else:
        assert not users, "inherited"
        assert "HEALTHCHECK" in text
        name = "-".join(path.parent.relative_to(ROOT / "services").parts)
        assert f"$(hostname):{GRPC_PORTS[name]}" in text
        assert f'CMD ["serve", "{name}", ' in text


def test_the_worker_needs_neither_compiler_nor_cache() -> None:
    text = (ROOT / "services" / "decode" / "worker" / "Containerfile").read_text()
    assert "ARG BASE_IMAGE=tokenmesh/base:" in text
    # Importing torch makes this folder, which must be possible without the cache volume.
    assert "ENV TORCHINDUCTOR_CACHE_DIR=/tmp/" in text


def test_the_guide_builds_every_image() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text()
    (folders,) = re.findall(r"for s in (.*); do", guide)
    assert {f"tokenmesh/{s.replace('/', '-')}:0.1.0" for s in folders.split()} == {
        container(w)["image"] for w in WORKLOADS
    }
    assert all((ROOT / "services" / s / "Containerfile").is_file() for s in folders.split())


def test_torch_is_the_same_everywhere() -> None:
    pin = re.search(r"^torch==\S+$", (ROOT / "requirements" / "cpu.in").read_text(), re.MULTILINE)
    assert pin
    assert f"{pin[0]} " in (ROOT / "deploy" / "containers" / "base.Containerfile").read_text()


@pytest.mark.parametrize("path", MESHES, ids=lambda p: str(p.relative_to(ROOT)))
def test_mesh_keeps_the_usual_ports_and_shards_that_fit(path: Path) -> None:
    mesh = load_config(path)
    assert (mesh.gateway.port, mesh.gateway.grpc_port) == (DEFAULTS.gateway.port, DEFAULTS.gateway.grpc_port)
    assert (mesh.prefill_service.port, mesh.decode_service.port) == (GRPC_PORTS["prefill"], GRPC_PORTS["decode-root"])
    if mesh.decode_service.kv_transfer.transport == "none":
        assert mesh.prefill_service.replicas == 0
        assert mesh.gateway.mode == "decode"
        return
    assert mesh.prefill_service.kv_transfer.port in (0, 9150)
    assert mesh.decode_service.kv_transfer.port == 9250
    # Shards of one side have whole shards of the other's heads.
    few, many = sorted((mesh.prefill_service.tensor_parallel_size, mesh.decode_service.tensor_parallel_size))
    assert many % few == 0


@pytest.mark.parametrize("path", MESHES, ids=lambda p: str(p.relative_to(ROOT)))
def test_mesh_has_as_many_workers_as_ranks(path: Path) -> None:
    mesh = load_config(path)
    size, worker = mesh.decode_service.token_parallel_size, mesh.decode_worker
    if "gpu_memory_utilization" in path.read_text():
        # On GPUs ranks share the root's, or are workers over NCCL.
        nccl = mesh.decode_service.group.exchange == "nccl"
        assert len(mesh.worker_addresses(0)) == (size - 1 if nccl else 0)
        return
    assert len(mesh.worker_addresses(0)) == size - 1
    assert size > 1
    assert {address.rpartition(":")[2] for address in mesh.worker_addresses(0)} == {str(GRPC_PORTS["decode-worker"])}
    assert (worker.port, worker.kv_transfer.port, worker.exchange_port) == (GRPC_PORTS["decode-worker"], 9350, 9390)
