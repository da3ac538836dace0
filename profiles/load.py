"""Profiles from TOML files: those that come with this package, and the user's own."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from profiles.amounts import amount_bytes
from profiles.device import DeviceProfile
from profiles.errors import ProfileError, nearest, shown

_FOLDER = Path(__file__).parent
_MAX_FILE_BYTES = 65_536
_AMOUNTS = ("device_memory", "memory_budget")  # in the file an amount such as "6 GiB", in the profile `..._bytes`
_OPTIONAL = (*_AMOUNTS, "memory_fraction", "memory_gb_per_s", "int8_tops", "storage_gb_per_s")


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
        raise ProfileError(f"profile {_one_line(path.name)}: {error}") from error


def _find(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        path = Path(name_or_path)
        if not _is_file(path):
            known = ", ".join(available_profiles())
            raise ProfileError(f"{_one_line(str(path))}: no such profile file; known profiles are {known}")
        return path
    names = available_profiles()
    if name_or_path not in names:
        known = f"known profiles are {', '.join(names)}, or give the path of a .toml file"
        raise ProfileError(f"unknown profile {shown(name_or_path)}{nearest(name_or_path, names)}; {known}")
    return _FOLDER / f"{name_or_path}.toml"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows, or a folder that may not be searched
        return False


def _one_line(name: str) -> str:
    """A path's name as it is, or escaped where a message of one line could not hold it."""
    return name if len(name.splitlines()) <= 1 else ascii(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ProfileError(f"{path.stat().st_size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
    try:
        return _parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"not UTF-8 at byte {error.start}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"not TOML, or a key is there twice: {error}") from error
    except ValueError as error:  # an integer of more digits than Python converts; tomllib does not say which
        longest = max(text.splitlines(), key=len)
        raise ProfileError(f"{shown(longest)} has a number of too many digits") from error


def _from_toml(name: str, values: dict[str, Any]) -> DeviceProfile:
    keys = [field.name.removesuffix("_bytes") for field in fields(DeviceProfile) if field.name != "name"]
    for key in values:
        if key not in keys:
            raise ProfileError(f"unknown key {shown(key)}{nearest(key, keys)}; known keys are {', '.join(keys)}")
    for key in keys:
        if key not in values and key not in _OPTIONAL:
            raise ProfileError(f"key {key!r} is missing; add it")
    providers = values["providers"]
    own: dict[str, Any] = dict.fromkeys(_OPTIONAL) | values
    own |= {"name": name, "providers": tuple(providers) if isinstance(providers, list) else providers}
    for key in _AMOUNTS:
        value = own.pop(key)
        own[f"{key}_bytes"] = None if value is None else amount_bytes(value, key)
    return DeviceProfile(**own)
