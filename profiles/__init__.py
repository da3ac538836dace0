"""Device profiles: what a machine grants the runtime."""

from profiles.amounts import parse_bytes
from profiles.budget import budget_bytes, stated_budget_bytes
from profiles.cores import performance_cores, threads_of
from profiles.detect import detect_profile
from profiles.device import KV_DTYPES, MAX_DRAFT_TOKENS, MODELS, WEIGHT_BITS, DeviceProfile
from profiles.errors import ProfileError
from profiles.limits import cgroup_available_bytes, cgroup_limit_bytes
from profiles.load import available_profiles, load_profile

__all__ = [
    "KV_DTYPES",
    "MAX_DRAFT_TOKENS",
    "MODELS",
    "WEIGHT_BITS",
    "DeviceProfile",
    "ProfileError",
    "available_profiles",
    "budget_bytes",
    "cgroup_available_bytes",
    "cgroup_limit_bytes",
    "detect_profile",
    "load_profile",
    "parse_bytes",
    "performance_cores",
    "stated_budget_bytes",
    "threads_of",
]
