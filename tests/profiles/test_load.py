"""Profiles from files: what comes with the package, and what a user's file may and may not say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import profiles
from profiles import MODELS, WEIGHT_BITS, available_profiles, load_profile
from tests.profile_files import LINES, refuses, write

GIB = 2**30


# Profiles of the package


def test_all_names_are_exported() -> None:
    assert all(hasattr(profiles, name) for name in profiles.__all__)


def test_the_package_needs_psutil_and_the_standard_library_alone() -> None:
    program = "import sys, profiles; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert {"profiles", "psutil"} <= found
    assert not {"numpy", "onnxruntime", "runtime", "edge", "torch", "onnx"} & found


def test_every_profile_loads_and_is_named_like_its_file() -> None:
    assert available_profiles() == ("gpu", "laptop", "laptop-small", "phone-arm", "raspberry-pi", "workstation")
    assert tuple(load_profile(name).name for name in available_profiles()) == available_profiles()


def test_what_the_profiles_grant() -> None:
    laptop, phone, gpu = (load_profile(name) for name in ("laptop", "phone-arm", "gpu"))
    assert (laptop.memory_fraction, phone.memory_budget_bytes, gpu.memory_fraction) == (0.5, GIB, 0.8)
    assert [profile.context_tokens for profile in (laptop, phone, gpu)] == [8192, 4096, 32768]
    assert [profile.prefill_chunk_tokens for profile in (laptop, phone, gpu)] == [512, 128, 1024]
    assert laptop.providers == phone.providers == ("CPUExecutionProvider",)
    assert gpu.providers == ("WebGpuExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def test_what_the_devices_are_like() -> None:
    memory = {"gpu": 32, "laptop": 16, "laptop-small": 8, "phone-arm": 6, "raspberry-pi": 8, "workstation": 64}
    for name, gib in memory.items():
        profile = load_profile(name)
        assert profile.device_memory_bytes == gib * GIB
        assert (profile.num_threads, profile.kv_dtype, profile.num_draft_tokens) == (0, "auto", 7)
        assert profile.model in MODELS
        assert profile.weight_bits in WEIGHT_BITS
        assert profile.memory_gb_per_s
        assert profile.int8_tops
        assert profile.storage_gb_per_s


def test_the_speeds_stated_of_a_raspberry_pi_agree_with_published_ones() -> None:
    """LiteRT-LM there: 7.6 tokens/s of decode, 133 and 51 of prefill with E2B and E4B; a bound is above, not far."""
    board = load_profile("raspberry-pi")
    assert board.memory_gb_per_s is not None
    assert board.int8_tops is not None
    # E2B reads 1.3 GB for a token in 4 bits; to prefill one takes 1.14e9 operations, of E4B 4.6e9
    assert 7.6 <= board.memory_gb_per_s / 1.3 <= 1.5 * 7.6
    assert 133 <= board.int8_tops * 1e12 / 1.14e9 <= 2 * 133
    assert 51 <= board.int8_tops * 1e12 / 4.6e9 <= 2 * 51


def test_a_name_that_is_unknown() -> None:
    refuses(
        "laptob",
        "unknown profile 'laptob', did you mean 'laptop'.; known profiles are gpu, laptop, laptop-small, phone",
    )
    refuses("zzz", "unknown profile 'zzz'; known profiles are gpu, .*workstation, or give the path")
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
        ({"gamma": "4"}, "unknown key 'gamma'; known keys are description, device_memory, memory_budget, memory_frac"),
        ({"name": '"x"'}, "unknown key 'name'"),
        ({"memory_fraction": "0.5"}, "both of memory_budget and memory_fraction"),
        ({"memory_budget": None}, "neither of memory_budget and memory_fraction is given; give exactly one"),
        ({"memory_budget": "0"}, "memory_budget is 0, expected bytes above 0"),
        ({"memory_budget": "-1"}, "memory_budget is -1, expected bytes above 0"),
        ({"memory_budget": "true"}, "memory_budget is True"),
        ({"memory_budget": "1.5"}, "memory_budget is 1.5"),
        ({"memory_budget": '"0 GiB"'}, "memory_budget is '0 GiB'"),
        ({"memory_budget": '"lots"'}, "memory_budget: 'lots' is no amount of memory; write it like '6 GiB'"),
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
        ({"device_memory": "0"}, "device_memory is 0, expected bytes above 0 or an amount like '6 GiB'"),
        ({"device_memory": '"6 G"'}, "device_memory: '6 G' is no amount of memory; write it like '6 GiB'"),
        ({"model": '"E3B"'}, "model is 'E3B', expected one of E2B, E4B"),
        ({"weight_bits": "16"}, "weight_bits is 16, expected one of 4, 8"),
        ({"weight_bits": "4.0"}, "weight_bits is 4.0, expected one of 4, 8"),
        ({"memory_gb_per_s": "0"}, "memory_gb_per_s is 0, expected a number above 0 and at most 1,000,000"),
        ({"int8_tops": "inf"}, "int8_tops is inf, expected a number above 0 and at most 1,000,000"),
        ({"storage_gb_per_s": '"1"'}, "storage_gb_per_s is '1', expected a number above 0 and at most 1,000,000"),
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
            "providers: unknown provider 'CUDAExecutionProvder', did you mean 'CUDAExecutionProvider'",
        ),
        (
            {"providers": '["CPUExecutionProvider", "CPUExecutionProvider"]'},
            "providers: 'CPUExecutionProvider' is there 2 times, expected once",
        ),
    ],
)
def test_a_value_that_is_not_usable(tmp_path: Path, changes: dict[str, str | None], match: str) -> None:
    refuses(write(tmp_path, **changes), f"profile mine.toml: {match}")


@pytest.mark.parametrize(  # 52
    ("changes", "match"),
    [
        (
            {"device_memory": '"2 GiB"', "memory_budget": '"3 GiB"'},
            "memory_budget is 3,072 MiB, device_memory 2,048 MiB; lower memory_budget or leave device_memory out",
        ),
        (
            {"context_tokens": "256", "prefill_chunk_tokens": "257"},
            "prefill_chunk_tokens is 257, context_tokens 256; lower prefill_chunk_tokens to 256 at most",
        ),
        (
            {"context_tokens": "3", "prefill_chunk_tokens": "1"},
            "num_draft_tokens is 3, context_tokens 3; lower num_draft_tokens to 2 at most",
        ),
        ({"prefill_chunk_tokens": "0", "num_draft_tokens": "3"}, "prefill_chunk_tokens is 0, expected an integer of 1"),
        (
            {"providers": '["CUDAExecutionProvider"]'},
            "providers is CUDAExecutionProvider, expected CPUExecutionProvider as the last: what no other one computes",
        ),
        (
            {"providers": '["CPUExecutionProvider", "CUDAExecutionProvider"]'},
            "providers is CPUExecutionProvider, CUDAExecutionProvider, expected CPUExecutionProvider as the last",
        ),
    ],
)
def test_values_that_contradict_each_other(tmp_path: Path, changes: dict[str, str | None], match: str) -> None:
    refuses(write(tmp_path, **changes), f"profile mine.toml: {match}")


def test_values_that_just_agree(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        device_memory='"6 GiB"',
        context_tokens="8",
        prefill_chunk_tokens="8",
        num_draft_tokens="7",
        providers='["CUDAExecutionProvider", "CPUExecutionProvider"]',
        memory_gb_per_s="17",
        int8_tops="0.5",
        storage_gb_per_s="1e-3",
    )
    profile = load_profile(path)
    assert (profile.device_memory_bytes, profile.memory_budget_bytes) == (6 * GIB, 6 * GIB)
    assert (profile.memory_gb_per_s, profile.int8_tops, profile.storage_gb_per_s) == (17, 0.5, 0.001)


def test_what_may_be_left_out_is_none(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path))
    stated = (profile.device_memory_bytes, profile.memory_gb_per_s, profile.int8_tops, profile.storage_gb_per_s)
    assert stated == (None,) * 4
