from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import profiles
from profiles import ProfileError, available_profiles, budget_bytes, device, load_profile, parse_bytes

GIB = 2**30
LINES = {
    "description": '"mine"',
    "memory_budget": '"6 GiB"',
    "providers": '["CPUExecutionProvider"]',
    "num_threads": "0",
    "kv_dtype": '"auto"',
    "context_tokens": "8192",
    "prefill_chunk_tokens": "512",
    "num_draft_tokens": "3",
}


def write(folder: Path, **changes: str | None) -> Path:
    """A profile whose keys are changed, added or (None) left out."""
    lines = {key: value for key, value in (LINES | changes).items() if value is not None}
    path = folder / "mine.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()), encoding="utf-8")
    return path


def refuses(path: Path | str, match: str) -> None:
    with pytest.raises(ProfileError, match=match) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


# Profiles of the package


def test_all_names_are_exported() -> None:
    assert all(hasattr(profiles, name) for name in profiles.__all__)


def test_every_profile_loads_and_is_named_like_its_file() -> None:
    assert available_profiles() == ("gpu", "laptop", "phone-arm")
    assert tuple(load_profile(name).name for name in available_profiles()) == available_profiles()


def test_what_the_profiles_grant() -> None:
    laptop, phone, gpu = (load_profile(name) for name in ("laptop", "phone-arm", "gpu"))
    assert (laptop.memory_fraction, phone.memory_budget_bytes, gpu.memory_fraction) == (0.5, 2 * GIB, 0.8)
    assert (laptop.num_threads, phone.num_threads) == (0, 4)
    assert [profile.context_tokens for profile in (laptop, phone, gpu)] == [8192, 4096, 32768]
    assert [profile.prefill_chunk_tokens for profile in (laptop, phone, gpu)] == [512, 128, 1024]
    assert [profile.num_draft_tokens for profile in (laptop, phone, gpu)] == [7, 7, 7]
    assert laptop.providers == phone.providers == ("CPUExecutionProvider",)
    assert gpu.providers == ("WebGpuExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def test_a_name_that_is_unknown() -> None:
    refuses("laptob", "unknown profile 'laptob', did you mean 'laptop'.; known profiles are gpu, laptop, phone-arm")
    refuses("zzz", "unknown profile 'zzz'; known profiles are gpu, laptop, phone-arm, or give the path")
    refuses("", "unknown profile ''")


# Profiles of the user


def test_a_profile_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path, memory_budget="1_000_000", description='"größer"')
    profile = load_profile(path)
    assert load_profile(str(path)) == profile
    assert (profile.name, profile.memory_budget_bytes, profile.description) == ("mine", 1_000_000, "größer")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    refuses(tmp_path / "absent.toml", "absent.toml: no such profile file; known profiles are gpu")
    refuses(tmp_path, "no such profile file")
    refuses("absent.toml", "no such profile file")
    refuses("a\0.toml", "no such profile file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "profile mine.toml: key 'description' is missing"),
        (b"\xff", "profile mine.toml: not UTF-8 at byte 0"),
        (b"num_threads = 1\nnum_threads = 2\n", "a key is there twice: Cannot overwrite a value .at line 2"),
        (b"num_threads: 1", "profile mine.toml: not TOML"),
        (b"a = " + b"[" * 50_000, "profile mine.toml: not TOML"),
        (b"#" * 65_537, "65,537 bytes, expected at most 65,536"),
    ],
)
def test_content_that_is_no_profile(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    refuses(tmp_path / "mine.toml", match)


@pytest.mark.parametrize("key", [key for key in LINES if key != "memory_budget"])
def test_a_key_that_is_missing(tmp_path: Path, key: str) -> None:
    refuses(write(tmp_path, **{key: None}), f"profile mine.toml: key '{key}' is missing")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_thread": "4"}, "unknown key 'num_thread', did you mean 'num_threads'"),
        ({"gamma": "4"}, "unknown key 'gamma'; known keys are description, memory_budget, memory_fraction, prov"),
        ({"name": '"x"'}, "unknown key 'name'"),
        ({"memory_fraction": "0.5"}, "both of memory_budget and memory_fraction"),
        ({"memory_budget": None}, "neither of memory_budget and memory_fraction is given; give exactly one"),
        ({"memory_budget": "0"}, "memory budget is 0, expected bytes above 0"),
        ({"memory_budget": "-1"}, "memory budget is -1, expected bytes above 0"),
        ({"memory_budget": "true"}, "memory budget is True"),
        ({"memory_budget": "1.5"}, "memory budget is 1.5"),
        ({"memory_budget": '"0 GiB"'}, "memory budget is '0 GiB'"),
        ({"memory_budget": '"lots"'}, "'lots' is no amount of memory; write it like '6 GiB'"),
        ({"memory_budget": None, "memory_fraction": "0"}, "memory_fraction is 0, expected a number above 0 and at"),
        ({"memory_budget": None, "memory_fraction": "1.1"}, "memory_fraction is 1.1"),
        ({"memory_budget": None, "memory_fraction": "nan"}, "memory_fraction is nan"),
        ({"memory_budget": None, "memory_fraction": "true"}, "memory_fraction is True"),
        ({"memory_budget": None, "memory_fraction": '"half"'}, "memory_fraction is 'half'"),
        ({"num_threads": "-1"}, "num_threads is -1, expected an integer of 0 to 1,024"),
        ({"num_threads": "1000000"}, "num_threads is 1000000, expected an integer of 0 to 1,024"),
        ({"num_threads": '"abc"'}, "num_threads is 'abc', expected an integer"),
        ({"num_threads": "true"}, "num_threads is True, expected an integer"),
        ({"num_threads": "4.0"}, "num_threads is 4.0, expected an integer"),
        ({"kv_dtype": '"int4"'}, "kv_dtype is 'int4', expected one of auto, float32, float16, int8"),
        ({"kv_dtype": "8"}, "kv_dtype is 8, expected one of auto"),
        ({"context_tokens": "0"}, "context_tokens is 0, expected an integer of 1 to 16,777,216"),
        ({"context_tokens": "1e3"}, "context_tokens is 1000.0, expected an integer"),
        ({"prefill_chunk_tokens": "0"}, "prefill_chunk_tokens is 0, expected an integer of 1 to 65,536"),
        ({"num_draft_tokens": "-1"}, "num_draft_tokens is -1, expected an integer of 0 to 16"),
        ({"description": "5"}, "description is 5, expected a string"),
        ({"providers": "[]"}, r"providers is \(\), expected a list of names"),
        ({"providers": '"CPUExecutionProvider"'}, "providers is 'CPUExecutionProvider', expected a list of names"),
        ({"providers": "[5]"}, r"providers is \(5,\), expected a list of names"),
        (
            {"providers": '["CUDAExecutionProvder"]'},
            "unknown provider 'CUDAExecutionProvder', did you mean 'CUDAExecutionProvider'",
        ),
        (
            {"providers": '["CPUExecutionProvider", "CPUExecutionProvider"]'},
            "provider 'CPUExecutionProvider' is there 2 times, expected once",
        ),
    ],
)
def test_a_value_that_is_not_usable(tmp_path: Path, changes: dict[str, str | None], match: str) -> None:
    refuses(write(tmp_path, **changes), f"profile mine.toml: {match}")


def test_options_that_replace_values_are_checked_too() -> None:
    laptop = load_profile("laptop")
    assert replace(laptop, num_threads=2).num_threads == 2
    assert replace(laptop, num_draft_tokens=0).num_draft_tokens == 0
    with pytest.raises(ProfileError, match="num_threads is -1, expected an integer of 0 to 1,024"):
        replace(laptop, num_threads=-1)
    assert replace(laptop, context_tokens=100).prefill_chunk_tokens == 512  # a chunk is never longer than the prompt


# Amounts


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4096", 4096),
        ("4096 B", 4096),
        ("6 GiB", 6 * GIB),
        ("6gib", 6 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("0.1 GiB", 107_374_182),
        ("2,560 MiB", 2560 * 2**20),
        (" 800 MB ", 800_000_000),
        ("2 kB", 2000),
        ("2 KiB", 2048),
        ("1 TiB", 2**40),
        ("9007199254740993", 2**53 + 1),  # no way through a float
    ],
)
def test_amounts(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1 GiB", "1,5 GiB", "1e9", "6 G", "6 GiBs", "nan", "0x10", "6  GiB", "٦ GiB", "9" * 5000, "6\n7"],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ProfileError, match="is no amount of memory; write it like '6 GiB', '512 MiB' or '4096'"):
        parse_bytes(text)


# The budget


@pytest.mark.parametrize(
    ("granted", "limit", "available", "expected"),
    [
        ({"memory_budget_bytes": 2 * GIB}, None, 12 * GIB, 2 * GIB),
        ({"memory_budget_bytes": 8 * GIB}, 4 * GIB, 12 * GIB, 4 * GIB),
        ({"memory_budget_bytes": 8 * GIB}, 4 * GIB, 3 * GIB, 3 * GIB),
        ({"memory_budget_bytes": 99 * GIB}, None, 99 * GIB, 16 * GIB),
        ({"memory_fraction": 0.5}, None, 12 * GIB, 8 * GIB),
        ({"memory_fraction": 0.5}, 4 * GIB, 12 * GIB, 2 * GIB),  # half of what the group has, not of the machine
        ({"memory_fraction": 0.5}, 99 * GIB, 12 * GIB, 8 * GIB),
        ({"memory_fraction": 1}, None, 1 * GIB, 1 * GIB),
    ],
)
def test_the_smallest_counts(
    granted: dict[str, Any], limit: int | None, available: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, limit, available)
    none = {"memory_budget_bytes": None, "memory_fraction": None}
    assert budget_bytes(replace(load_profile("laptop"), **none | granted)) == expected


@pytest.mark.parametrize(("override", "expected"), [(GIB, GIB), ("3 GiB", 3 * GIB), ("5 GiB", 4 * GIB), (1, 1)])
def test_an_override_replaces_the_profile_only(
    override: int | str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, limit=4 * GIB, available=12 * GIB)
    assert budget_bytes(load_profile("phone-arm"), override) == expected


@pytest.mark.parametrize("override", [0, -1, True, "0", "much", 2**63, 1.5])
def test_an_override_that_is_none(override: Any) -> None:
    with pytest.raises(ProfileError, match=r"memory budget is|no amount of memory"):
        budget_bytes(load_profile("laptop"), override)


def machine(monkeypatch: pytest.MonkeyPatch, limit: int | None, available: int) -> None:
    """A machine of 16 GiB."""
    memory = SimpleNamespace(total=16 * GIB, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(device, "cgroup_limit_bytes", lambda: limit)
