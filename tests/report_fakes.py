"""A memory plan with made-up numbers, and profiles whose speeds are stated."""

from pathlib import Path
from typing import Any

from profiles import DeviceProfile
from runtime.errors import MemoryBudgetError
from runtime.memory_plan import MemoryPart, MemoryPlan

MIB = 1 << 20


def fake_plan(
    source: str | Path,
    profile: DeviceProfile,
    *,
    bits: int | None = None,
    block_size: int = 32,
    layout: Any = None,
    context_tokens: int | None = None,
    memory_budget: int | None = None,
) -> MemoryPlan:
    """A plan of E2B's order of size, KV rows of 6 KiB a token; raises where the budget is below 150 MiB."""
    budget = memory_budget or profile.memory_budget_bytes or 8192 * MIB
    rows, fixed = 6 * 1024, 150 * MIB
    largest = max(min((budget - fixed) // rows, 131_072), 0)
    context = min(profile.context_tokens, largest) if context_tokens is None else context_tokens
    names = ("interpreter and libraries", "tokenizer", "graphs", "activations", "KV windows")
    sizes = (33, 45, 16, 50, 6)
    parts = (
        *(MemoryPart(name, size * MIB, "anonymous") for name, size in zip(names, sizes, strict=True)),
        MemoryPart("KV rows", context * rows, "anonymous"),
        MemoryPart("weights", 1430 * MIB, "mapped"),
        MemoryPart("PLE rows", 40 * MIB, "cached"),
    )
    plan = MemoryPlan(
        model="E2B" if isinstance(source, str) else source.name,
        profile=profile.name,
        layout=layout or "native",
        kv_dtype="float16",
        bits=4 if bits is None else bits,
        has_drafter=True,
        context_tokens=context,
        max_context_tokens=largest,
        prefill_chunk_tokens=profile.prefill_chunk_tokens,
        budget_bytes=budget,
        load_peak_bytes=120 * MIB,
        kv_bytes_per_token=rows,
        table_bytes=1320 * MIB,
        parts=parts,
    )
    if budget < fixed:
        raise MemoryBudgetError(f"{profile.name}: needs 150 MiB, has {budget // MIB} MiB; <raise> the budget", plan)
    return plan


def stated_profile(name: str, **values: Any) -> DeviceProfile:
    """A profile of a device with these stated values; nothing is stated unless it is given."""
    given: dict[str, Any] = {
        "name": name,
        "description": f"a {name}",
        "device_memory_bytes": None,
        "memory_budget_bytes": 2048 * MIB,
        "memory_fraction": None,
        "providers": ("CPUExecutionProvider",),
        "num_threads": 4,
        "kv_dtype": "auto",
        "context_tokens": 4096,
        "prefill_chunk_tokens": 128,
        "num_draft_tokens": 7,
        "model": "E2B",
        "weight_bits": 4,
        "memory_gb_per_s": None,
        "int8_tops": None,
        "storage_gb_per_s": None,
    }
    return DeviceProfile(**given | values)
