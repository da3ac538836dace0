"""Memory of this process while something runs: the peak, and a curve over time with its phases marked.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, memory.current; memory.usage_in_bytes of version 1.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.memory import MemoryUsage, PeakMemory

SAMPLE_SECONDS = 0.003
MAX_POINTS = 240


@dataclass(frozen=True, slots=True)
class _Sample:
    seconds: float
    anonymous: int
    mapped: int
    cgroup: int | None


class SampledPeak:
    """The largest usage that a thread sees, which looks every few milliseconds: within a forward too."""

    def __init__(self) -> None:
        self._peak = PeakMemory()
        self._samples: list[_Sample] = []
        self._phases: list[tuple[str, float]] = []
        self._cgroup_file = _cgroup_file()
        self._start = time.perf_counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "SampledPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def take(self) -> MemoryUsage:
        """The peak so far; the next one starts anew."""
        self._peak.sample()
        peak, self._peak = self._peak, PeakMemory()
        return peak.usage

    def begin(self, phase: str) -> None:
        """Marks where a phase of the curve begins."""
        self._phases.append((phase, time.perf_counter() - self._start))

    def curve(self) -> dict[str, Any]:
        """Seconds, bytes by kind, and the phases with their beginnings; `cgroup` is None without a control group.

        Of several samples that make one point each kind keeps its largest, so that no peak is lost.
        """
        samples = self._samples
        names = ("seconds", "anonymous", "mapped", "cgroup")
        columns: dict[str, Any] = {name: thinned([getattr(sample, name) for sample in samples]) for name in names}
        return columns | {"phases": [{"name": name, "seconds": start} for name, start in self._phases]}

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            usage = self._peak.sample()
            seconds, cgroup = time.perf_counter() - self._start, _read_bytes(self._cgroup_file)
            self._samples.append(_Sample(seconds, usage.anonymous_bytes, usage.mapped_bytes, cgroup))


def thinned(values: list[Any]) -> list[Any] | None:
    """At most MAX_POINTS values, each the largest of a run of neighbours; None where one of them is."""
    if any(value is None for value in values):
        return None
    parts = np.array_split(np.array(values), min(MAX_POINTS, len(values)) or 1)
    return [part.max().item() for part in parts if len(part)]


def _cgroup_file(root: Path = Path("/")) -> Path | None:
    """What says how many bytes this process's control group takes, page cache included."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if not controllers or "memory" in controllers.split(","):
            mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            file = "memory.usage_in_bytes" if controllers else "memory.current"
            for folder in (mounted / path.lstrip("/"), mounted):  # a container sees its own group as the mount
                if _read_bytes(folder / file) is not None:
                    return folder / file
    return None


def _read_bytes(file: Path | None) -> int | None:
    try:
        return None if file is None else int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
