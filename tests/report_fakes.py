"""A memory plan with made-up numbers behind the real interface, and profiles whose speeds are stated."""

import sys
from dataclasses import dataclass, fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from profiles import DeviceProfile
from runtime.errors import MemoryBudgetError

MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPart:
    """A part of a plan."""

    name: str
    num_bytes: int
    kind: str


@dataclass(frozen=True)
class MemoryPlan:
    """As runtime.memory_plan has it."""

    model: str
    layout: str
    kv_dtype: str
    bits: int
    context_tokens: int
    max_context_tokens: int
    prefill_chunk_tokens: int
    budget_bytes: int
    load_peak_bytes: int
    table_bytes: int
    kv_bytes_per_token: int
    parts: tuple[MemoryPart, ...]

    def _sum(self, kind: str) -> int:
        return sum(part.num_bytes for part in self.parts if part.kind == kind)

    @property
    def anonymous_bytes(self) -> int:
        return self._sum("anonymous")

    @property
    def peak_bytes(self) -> int:
        return max(self.anonymous_bytes, self.load_peak_bytes)

    @property
    def mapped_bytes(self) -> int:
        return self._sum("mapped")

    @property
    def table_cache_bytes(self) -> int:
        return self._sum("cached")


def fake_plan(
    source: str | Path,
    profile: DeviceProfile,
    *,
    bits: int | None = None,
    block_size: int = 32,
    layout: str = "native",
    context_tokens: int | None = None,
    **_: Any,
) -> MemoryPlan:
    """A plan of E2B's order of size, KV rows of 6 KiB a token; raises where the budget is below 150 MiB."""
    budget = profile.memory_budget_bytes or 8192 * MIB
    rows, fixed = 6 * 1024, 150 * MIB
    largest = max(min((budget - fixed) // rows, 131_072), 0)
    context = min(profile.context_tokens, largest) if context_tokens is None else context_tokens
    names = ("interpreter and libraries", "tokenizer", "graphs", "activations", "KV windows")
    sizes = (33, 45, 16, 50, 6)
    anonymous = [MemoryPart(name, size * MIB, "anonymous") for name, size in zip(names, sizes, strict=True)]
    parts = (
        *anonymous,
        MemoryPart("KV rows", context * rows, "anonymous"),
        MemoryPart("weights", 1430 * MIB, "mapped"),
        MemoryPart("PLE rows", 40 * MIB, "cached"),
    )
    plan = MemoryPlan(
        "E2B" if isinstance(source, str) else source.name,
        layout,
        "float16",
        4 if bits is None else bits,
        context,
        largest,
        profile.prefill_chunk_tokens,
        budget,
        120 * MIB,
        1320 * MIB,
        rows,
        parts,
    )
    if budget < fixed:
        error = MemoryBudgetError(f"{profile.name}: needs 150 MiB, has {budget // MIB} MiB; <raise> the budget")
        error.plan = plan  # type: ignore[attr-defined, unused-ignore]
        raise error
    return plan


def install_plan() -> None:
    """Makes `edge.planning` importable where it is not there yet."""
    if find_spec("edge.planning") is None:
        module = ModuleType("edge.planning")
        module.plan = fake_plan  # type: ignore[attr-defined]
        sys.modules["edge.planning"] = module


STATED = {
    "device_memory_bytes": (int | None, None),
    "model": (str, "E2B"),
    "weight_bits": (int, 4),
    "memory_gb_per_s": (float | None, None),
    "int8_tops": (float | None, None),
    "storage_gb_per_s": (float | None, None),
}
_own = {field.name for field in fields(DeviceProfile)}
_missing = [(name, kind, default) for name, (kind, default) in STATED.items() if name not in _own]
StatedProfile: Any = (
    make_dataclass("StatedProfile", _missing, bases=(DeviceProfile,), frozen=True) if _missing else DeviceProfile
)


def stated_profile(name: str, **values: Any) -> Any:
    """A profile of a device with these stated values; nothing is stated unless it is given."""
    given = {
        "name": name,
        "description": f"a {name}",
        "memory_budget_bytes": 2048 * MIB,
        "memory_fraction": None,
        "providers": ("CPUExecutionProvider",),
        "num_threads": 4,
        "kv_dtype": "auto",
        "context_tokens": 4096,
        "prefill_chunk_tokens": 128,
        "num_draft_tokens": 7,
    }
    return StatedProfile(**given | {name: default for name, (_, default) in STATED.items()} | values)
