"""A profile that is put together or changed by a program is checked like one from a file."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from profiles import DeviceProfile, ProfileError, available_profiles, load_profile

GIB = 2**30


@pytest.mark.parametrize("name", available_profiles())
def test_a_profile_is_its_values(name: str) -> None:
    profile = load_profile(name)
    assert DeviceProfile(**asdict(profile)) == profile


def test_options_that_replace_values_are_checked_too() -> None:
    laptop = load_profile("laptop")
    assert replace(laptop, num_threads=2).num_threads == 2
    assert replace(laptop, num_draft_tokens=0).num_draft_tokens == 0
    with pytest.raises(ProfileError, match="num_threads is -1, expected an integer of 0 to 1,024"):
        replace(laptop, num_threads=-1)
    with pytest.raises(ProfileError, match="prefill_chunk_tokens is 512, context_tokens 100; lower prefill_chunk_tok"):
        replace(laptop, context_tokens=100)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"memory_budget_bytes": 0}, "memory_budget is 0 bytes, expected an integer above 0"),
        ({"memory_budget_bytes": 1.5}, "memory_budget is 1.5 bytes, expected an integer above 0"),
        ({"memory_budget_bytes": 2**63}, "memory_budget is 9223372036854775808 bytes, expected an integer above 0"),
        ({"device_memory_bytes": -1}, "device_memory is -1 bytes, expected an integer above 0"),
        ({"device_memory_bytes": "6 GiB"}, "device_memory is '6 GiB' bytes, expected an integer above 0"),
        ({"memory_budget_bytes": 8 * GIB}, "memory_budget is 8,192 MiB, device_memory 6,144 MiB; lower memory_budget"),
        ({"memory_fraction": 0.5}, "both of memory_budget and memory_fraction is given"),
        ({"name": "a\nb"}, r"name is 'a\\nb', expected a string of one line"),
        ({"description": None}, "description is None, expected a string of one line"),
        ({"providers": ["CPUExecutionProvider"]}, r"providers is \['CPUExecutionProvider'\], expected a list of names"),
        ({"kv_dtype": []}, r"kv_dtype is \[\], expected one of auto"),
        ({"weight_bits": True}, "weight_bits is True, expected one of 4, 8"),
        ({"context_tokens": 1 << 20_000}, "context_tokens is an integer of 20,001 bits, expected an integer of 1 to"),
        ({"int8_tops": True}, "int8_tops is True, expected a number above 0"),
    ],
)
def test_a_value_that_is_not_usable(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ProfileError, match=f"^{match}"):
        replace(load_profile("phone-arm"), **changes)


def test_a_budget_of_all_the_memory_is_none_above_it() -> None:
    assert replace(load_profile("phone-arm"), memory_budget_bytes=6 * GIB).memory_budget_bytes == 6 * GIB
