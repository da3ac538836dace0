"""Memory of another process over time, with its phases marked.

Looked at from outside: while a tokenizer loads, no thread of that process's own Python runs for seconds.

Source: https://docs.kernel.org/filesystems/proc.html, RssAnon, RssFile and RssShmem of /proc/PID/status;
https://docs.kernel.org/admin-guide/cgroup-v2.html, memory.current; memory.usage_in_bytes of version 1.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_SECONDS = 0.005
MAX_POINTS = 240
END = "end"  # the phase that nothing is told of: the process frees what it has
_RESIDENT = re.compile(r"^Rss(Anon|File|Shmem):\s*(\d+) kB$", re.M)


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident bytes at a moment of the system's monotonic clock; `cgroup` is None without a control group."""

    seconds: float
    anonymous: int
    mapped: int
    cgroup: int | None


class MemoryCurve:
    """Samples of a process's memory; none where the system does not tell anonymous memory apart."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Samples the process every few milliseconds until the block ends."""
        stopped = threading.Event()
        thread = threading.Thread(target=self._watch, args=(pid, stopped), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def to_json(self, phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Seconds since the first phase began, bytes by kind, and where each phase begins.

        Of several samples that make one point each kind keeps its largest, so that no peak is lost.
        """
        start = phases[0]["clock_s"]
        stop = next((phase["clock_s"] for phase in phases if phase["name"] == END), float("inf"))
        kept = [sample for sample in self.samples if start <= sample.seconds < stop]
        return {
            "seconds": thinned([sample.seconds - start for sample in kept]),
            "anonymous": thinned([sample.anonymous for sample in kept]),
            "mapped": thinned([sample.mapped for sample in kept]),
            "cgroup": thinned([sample.cgroup for sample in kept]),
            "phases": [
                {"name": phase["name"], "seconds": phase["clock_s"] - start} for phase in phases if phase["name"] != END
            ],
        }

    def peak_anonymous(self, start: float, stop: float) -> int:
        """The largest anonymous memory between two moments of the clock; 0 without a sample."""
        return max((sample.anonymous for sample in self.samples if start <= sample.seconds < stop), default=0)

    def _watch(self, pid: int, stopped: threading.Event) -> None:
        status, group = Path(f"/proc/{pid}/status"), cgroup_file()
        while not stopped.wait(SAMPLE_SECONDS):
            try:
                pages = {name: int(size) * 1024 for name, size in _RESIDENT.findall(status.read_text(encoding="utf-8"))}
            except (OSError, ValueError):
                return  # it has ended, or the system has no such file
            if len(pages) == 3:  # a process that ends has none any more
                mapped = pages["File"] + pages["Shmem"]
                self.samples.append(Sample(time.monotonic(), pages["Anon"], mapped, read_bytes(group)))


def mark_phase(name: str) -> dict[str, Any]:
    """A phase that begins now, by the clock that all processes of the system share."""
    return {"name": name, "clock_s": time.monotonic()}


def thinned(values: Sequence[float | None]) -> list[Any] | None:
    """At most MAX_POINTS values, each the largest of a run of neighbours; None where one of them is."""
    if any(value is None for value in values):
        return None
    parts = np.array_split(np.array(values), max(min(MAX_POINTS, len(values)), 1))
    return [part.max().item() for part in parts if len(part)]


def cgroup_file(root: Path = Path("/")) -> Path | None:
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
                if read_bytes(folder / file) is not None:
                    return folder / file
    return None


def read_bytes(file: Path | None) -> int | None:
    """The number in a control group's file; None where it cannot be read."""
    try:
        return None if file is None else int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
