"""What a machine grants the runtime: memory, threads, providers and the sizes that follow from them.

Knows nothing of a model; whether one fits into the budget is the runtime's to say.
"""

import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil

from profiles.limits import cgroup_limit_bytes

_FOLDER = Path(__file__).parent
_MAX_FILE_BYTES = 65_536
_MAX_BYTES = 2**63 - 1
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_AMOUNT = re.compile(r"((?:[0-9]{1,19}|[0-9]{1,3}(?:,[0-9]{3}){1,6})(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")
# onnxruntime.get_all_providers() of 1.31; a misspelt one would silently leave the work to the CPU
_PROVIDERS = tuple(
    f"{name}ExecutionProvider"
    for name in (
        *("CPU", "CUDA", "WebGpu", "CoreML", "Dml", "QNN", "Xnnpack", "Nnapi", "OpenVINO", "Tensorrt", "MIGraphX"),
        *("Dnnl", "VitisAI", "VSINPU", "Js", "Rknpu", "WebNN", "CANN", "Azure"),
    )
)
MAX_DRAFT_TOKENS = 16
KV_DTYPES = ("auto", "float32", "float16", "int8")
_RANGES = {
    "num_threads": (0, 1024),
    "context_tokens": (1, 2**24),
    "prefill_chunk_tokens": (1, 65_536),
    "num_draft_tokens": (0, MAX_DRAFT_TOKENS),
}


class ProfileError(ValueError):
    """A profile, or an option that stands in for one of its values, cannot be used."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device grants. Exactly one of `memory_budget_bytes` and `memory_fraction` is not None.

    `providers` are ONNX Runtime's names, in order of preference. `num_threads` 0 means all physical cores
    available to the process. `kv_dtype` is one of `KV_DTYPES`, the type of the KV cache's elements; "auto" is that of
    the artifact's layout. `num_draft_tokens` is the most that are drafted in a round, 0 means no drafting.
    """

    name: str
    description: str
    memory_budget_bytes: int | None
    memory_fraction: float | None
    providers: tuple[str, ...]
    num_threads: int
    kv_dtype: str
    context_tokens: int
    prefill_chunk_tokens: int
    num_draft_tokens: int

    def __post_init__(self) -> None:
        """Raises ProfileError for the first value of a wrong type or out of its range."""
        for key in ("name", "description"):
            if not isinstance(getattr(self, key), str):
                raise ProfileError(f"{key} is {getattr(self, key)!r}, expected a string")
        self._check_memory()
        self._check_providers()
        if self.kv_dtype not in KV_DTYPES:
            raise ProfileError(f"kv_dtype is {self.kv_dtype!r}, expected one of {', '.join(KV_DTYPES)}")
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise ProfileError(f"{key} is {value!r}, expected an integer of {low:,} to {high:,}")

    def _check_memory(self) -> None:
        budget, fraction = self.memory_budget_bytes, self.memory_fraction
        if (budget is None) == (fraction is None):
            found = "neither" if budget is None else "both"
            raise ProfileError(f"{found} of memory_budget and memory_fraction is given; give exactly one")
        if budget is not None and (type(budget) is not int or not 0 < budget <= _MAX_BYTES):
            raise ProfileError(f"memory_budget is {budget!r} bytes, expected an integer above 0")
        if fraction is not None and (type(fraction) not in (int, float) or not 0 < fraction <= 1):
            raise ProfileError(f"memory_fraction is {fraction!r}, expected a number above 0 and at most 1")

    def _check_providers(self) -> None:
        names = self.providers
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            raise ProfileError(f"providers is {names!r}, expected a list of names such as 'CPUExecutionProvider'")
        known = ", ".join(_PROVIDERS)
        for name in names:
            if name not in _PROVIDERS:
                raise ProfileError(f"unknown provider {name!r}{_nearest(name, _PROVIDERS)}; known ones are {known}")
            if names.count(name) > 1:
                raise ProfileError(f"provider {name!r} is there {names.count(name)} times, expected once")


def available_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with this package."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """The named profile of this package, or the one in a TOML file (a Path, or a string that looks like one).

    Raises:
        ProfileError: there is no such profile, or a key of it is unknown, missing, twice there or not usable.
    """
    path = _find(name_or_path)
    try:
        return _from_toml(path.stem, _read(path))
    except ProfileError as error:
        raise ProfileError(f"profile {path.name}: {error}") from error


def budget_bytes(profile: DeviceProfile, override: int | str | None = None) -> int:
    """Bytes the runtime may use now: the smallest of its budget, the control group's limit and the free memory.

    Args:
        profile: its budget, or its fraction of the memory that machine and control group have.
        override: budget instead of the profile's, in bytes or as `parse_bytes` reads it.
    """
    memory = psutil.virtual_memory()
    limit = cgroup_limit_bytes()
    total = int(memory.total) if limit is None else min(int(memory.total), limit)
    if override is not None:
        granted = _budget(override)
    elif profile.memory_budget_bytes is not None:
        granted = profile.memory_budget_bytes
    else:
        assert profile.memory_fraction is not None
        granted = int(total * profile.memory_fraction)
    return min(granted, total, int(memory.available))


def parse_bytes(text: str) -> int:
    """Bytes of "1.5 GiB", "2,560 MiB", "800 MB" or "4096"; KiB to TiB count in 1024, kB to TB in 1000.

    Raises:
        ProfileError: anything else.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ProfileError(f"{reprlib.repr(text)} is no amount of memory; write it like '6 GiB', '512 MiB' or '4096'")
    return int(Decimal(match[1].replace(",", "")) * unit)


def _budget(value: object) -> int:
    amount = parse_bytes(value) if isinstance(value, str) else value
    if type(amount) is not int or not 0 < amount <= _MAX_BYTES:
        raise ProfileError(f"memory budget is {value!r}, expected bytes above 0 or an amount like '6 GiB'")
    return amount


def _find(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise ProfileError(f"{path}: no such profile file; known profiles are {', '.join(available_profiles())}")
        return path
    names = available_profiles()
    if name_or_path not in names:
        known = f"known profiles are {', '.join(names)}, or give the path of a .toml file"
        raise ProfileError(f"unknown profile {name_or_path!r}{_nearest(name_or_path, names)}; {known}")
    return _FOLDER / f"{name_or_path}.toml"


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ProfileError(f"{size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"not UTF-8 at byte {error.start}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"not TOML, or a key is there twice: {error}") from error


def _from_toml(name: str, values: dict[str, Any]) -> DeviceProfile:
    keys = [field.name.removesuffix("_bytes") for field in fields(DeviceProfile) if field.name != "name"]
    budgets = ("memory_budget", "memory_fraction")
    for key in values:
        if key not in keys:
            raise ProfileError(f"unknown key {key!r}{_nearest(key, keys)}; known keys are {', '.join(keys)}")
    for key in keys:
        if key not in values and key not in budgets:
            raise ProfileError(f"key {key!r} is missing; add it")
    providers = values["providers"]
    own = {
        "name": name,
        "memory_budget_bytes": _budget(values["memory_budget"]) if "memory_budget" in values else None,
        "memory_fraction": values.get("memory_fraction"),
        "providers": tuple(providers) if isinstance(providers, list) else providers,
    }
    return DeviceProfile(**{key: value for key, value in values.items() if key != "memory_budget"} | own)
