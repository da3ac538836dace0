"""Whether a subject fits a device: the memory plan of each profile, and what of it a report tells."""

from dataclasses import asdict, dataclass
from typing import Any

from edge.planning import plan as memory_plan
from edge.report.subject import Subject
from profiles import DeviceProfile
from runtime.errors import MemoryBudgetError
from runtime.memory_plan import MemoryPlan

RESERVE_PART = 0.25


@dataclass(frozen=True, slots=True)
class Fit:
    """A profile's plan; `reason` is the error's line where it does not fit."""

    profile: DeviceProfile
    plan: MemoryPlan
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether the planned context is within the budget."""
        return not self.reason


def fit(
    subject: Subject,
    profile: DeviceProfile,
    *,
    context_tokens: int | None = None,
    memory_budget: int | None = None,
) -> Fit:
    """Plans a subject for a profile; what does not fit is a result too.

    Raises:
        EdgeError: the plan cannot be made.
    """
    try:
        plan = memory_plan(
            subject.source,
            profile,
            bits=subject.bits,
            block_size=subject.block_size,
            layout=subject.layout,
            context_tokens=context_tokens,
            memory_budget=memory_budget,
        )
        return Fit(profile, plan)
    except MemoryBudgetError as error:
        if error.plan is None:
            raise
        return Fit(profile, error.plan, str(error))


def plan_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan's numbers, bytes as integers, and its parts in their order."""
    return {
        "bits": plan.bits,
        "layout": plan.layout,
        "kv_dtype": plan.kv_dtype,
        "context_tokens": plan.context_tokens,
        "max_context_tokens": plan.max_context_tokens,
        "prefill_chunk_tokens": plan.prefill_chunk_tokens,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "anonymous_bytes": plan.anonymous_bytes,
        "load_peak_bytes": plan.load_peak_bytes,
        "mapped_bytes": plan.mapped_bytes,
        "table_bytes": plan.table_bytes,
        "table_cache_bytes": plan.table_cache_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "parts": [asdict(part) for part in plan.parts],
    }


def residency(entry: Fit) -> dict[str, Any]:
    """Whether mapped weights stay in the device's memory beside what the runtime allocates and the system's reserve.

    `stays` is None where the profile states no memory: then they are taken to stay.
    """
    memory, plan = entry.profile.device_memory_bytes, entry.plan
    found: dict[str, Any] = {"device_memory_bytes": memory, "weight_bytes": plan.mapped_bytes, "stays": None}
    if memory is None:
        return found | {"note": "device memory is not stated: weights are taken to stay in it; add device_memory"}
    reserve = int(RESERVE_PART * memory)
    room = max(memory - reserve - plan.anonymous_bytes, 0)
    missing = max(plan.mapped_bytes - room, 0)
    note = f"{missing / 1e6:,.0f} MB of weights do not stay in memory" if missing else "weights stay in memory"
    return found | {
        "stays": missing == 0,
        "reserve_bytes": reserve,
        "room_bytes": room,
        "missing_bytes": missing,
        "note": note,
    }
