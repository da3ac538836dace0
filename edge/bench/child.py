"""Load and memory, each measured in a fresh process: `python -m edge.bench.child load|memory OPTIONS`.

OPTIONS is one JSON object; so is what is printed. An error a user can mend is one line, as of any command here.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge.bench.drafting import GREEDY
from edge.bench.memory_curve import END, MemoryCurve, mark_phase
from edge.bench.opened import OpenedArtifact, drop_pages
from edge.command import EXIT_INTERRUPTED, run_command
from profiles import DeviceProfile
from runtime import native
from runtime.drafting import DraftCounts
from runtime.engine import Runtime
from runtime.errors import EdgeError
from runtime.manifest import Manifest
from runtime.memory import MemoryUsage, PeakMemory, memory_usage
from runtime.tokenizer import Tokenizer

NAME = "edge-bench"
SAMPLE_SECONDS = 0.003
SETTLED_SECONDS = 2.5  # younger files' digests are not remembered: their clocks are too coarse


def measure(
    kind: str,
    artifact: Path,
    profile: DeviceProfile,
    budget: str | None,
    *,
    curve: MemoryCurve | None = None,
    **sizes: int,
) -> dict[str, Any]:
    """Runs one measurement in a fresh process and returns what it found; EdgeError with its line where it failed.

    The native ops use the same instruction set there as in this process. `curve` takes the process's memory meanwhile.
    """
    options = {"artifact": str(artifact), "profile": asdict(profile), "memory_budget": budget, **sizes}
    options["instruction_set"] = native.instruction_set()
    path = os.pathsep.join(entry for entry in (str(Path(__file__).parents[2]), *sys.path) if entry)
    command = [sys.executable, "-m", "edge.bench.child", kind, json.dumps(options)]
    result = _run(command, os.environ | {"PYTHONPATH": path}, curve)
    if result.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"ended with {result.returncode}"]
        raise EdgeError(f"measuring {kind}: {lines[-1].removeprefix(f'{NAME}: ')}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _run(
    command: Sequence[str], environment: Mapping[str, str], curve: MemoryCurve | None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with a look at the process's memory from here every few milliseconds."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            with curve.watching(process.pid) if curve else contextlib.nullcontext():
                out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def let_settle(artifact: Path, manifest: Manifest) -> None:
    """Waits until the artifact's files are old enough for their digests to be remembered."""
    youngest = max((artifact / name).stat().st_ctime for name in manifest.files)
    time.sleep(min(max(0.0, youngest + SETTLED_SECONDS - time.time()), SETTLED_SECONDS))


def evict(artifact: Path, manifest: Manifest) -> bool:
    """Drops the artifact's clean pages from the system's cache; False where the system cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for name in manifest.files:
        descriptor = os.open(artifact / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages would stay
            drop_pages(descriptor)
        finally:
            os.close(descriptor)
    return True


class SampledPeak:
    """The largest usage that a thread sees, which looks every few milliseconds: within a forward too."""

    def __init__(self) -> None:
        self._peak = PeakMemory()
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

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._peak.sample()


def measure_load(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds until the artifact is loaded and until it has computed a first token; those of the tokenizer alone."""
    start = time.perf_counter()
    with _load(options) as runtime:
        loaded = time.perf_counter() - start
        runtime.generate([runtime.manifest.model.bos_token_id], max_tokens=1, temperature=0.0)
        first_token = time.perf_counter() - start
    start = time.perf_counter()
    Tokenizer.load(Path(options["artifact"]) / "tokenizer.json", bos_token_id=runtime.manifest.model.bos_token_id)
    return {"load_s": loaded, "first_token_s": first_token, "tokenizer_s": time.perf_counter() - start}


def measure_memory(options: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory of loading, of prefill and of decode behind it with the profile's drafts; when each began."""
    before = memory_usage()
    phases = [mark_phase("load")]
    with SampledPeak() as peak, _load(options) as runtime:
        loading, loaded = peak.take(), memory_usage()
        opened = OpenedArtifact(runtime)
        num_tokens = options["memory_tokens"]
        context = min(options["memory_context"], runtime.context_tokens - 2 * num_tokens)
        token_ids = opened.token_ids(seed=0)
        phases.append(mark_phase("prefill"))
        opened.prefill(token_ids.take(context - 1))
        prefill = peak.take()
        first = token_ids.take(1)[0]
        phases.append(mark_phase("decode"))
        for _ in opened.rounds(opened.target, opened.drafter, first, num_tokens + 1, GREEDY, DraftCounts()):
            pass
        decode = peak.take()
        phases.append(mark_phase(END))
    return {
        "context": context,
        "imported_anonymous": before.anonymous_bytes,
        "loading_anonymous": loading.anonymous_bytes,
        "loaded_anonymous": loaded.anonymous_bytes,
        "prefill_anonymous": prefill.anonymous_bytes,
        "decode_anonymous": decode.anonymous_bytes,
        "decode_mapped": decode.mapped_bytes,
        "phases": phases,
    }


def _load(options: Mapping[str, Any]) -> Runtime:
    native.force_instruction_set(options["instruction_set"])
    profile = DeviceProfile(**options["profile"] | {"providers": tuple(options["profile"]["providers"])})
    return Runtime.load(options["artifact"], profile=profile, memory_budget=options["memory_budget"])


def main() -> int:
    """Entry point; returns the exit code."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    measurements = {"load": measure_load, "memory": measure_memory}
    return run_command(NAME, lambda: print(json.dumps(measurements[kind](options))))


if __name__ == "__main__":
    sys.exit(main())
