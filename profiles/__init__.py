"""Device profiles: what a machine grants the runtime."""

from profiles.device import (
    KV_DTYPES,
    MAX_DRAFT_TOKENS,
    DeviceProfile,
    ProfileError,
    available_profiles,
    budget_bytes,
    load_profile,
    parse_bytes,
)
from profiles.limits import cgroup_limit_bytes

__all__ = [
    "KV_DTYPES",
    "MAX_DRAFT_TOKENS",
    "DeviceProfile",
    "ProfileError",
    "available_profiles",
    "budget_bytes",
    "cgroup_limit_bytes",
    "load_profile",
    "parse_bytes",
]
