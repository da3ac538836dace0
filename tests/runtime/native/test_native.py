"""Whether the native ops may be used: the self-test, and what happens where it does not pass."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import native
from tests.layouts import needs_native
from tests.runtime.native import make_self_test

pytestmark = needs_native


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    """Asks anew for each test, and leaves no answer of a test behind."""
    native.unusable_because.cache_clear()
    yield
    native.unusable_because.cache_clear()


def test_the_self_test_is_the_one_that_its_script_makes() -> None:
    assert native.SELF_TEST.read_bytes() == make_self_test.model_bytes()


def test_the_built_library_passes() -> None:
    assert native.unusable_because() is None
    assert native.instruction_set() != "none"


def test_every_instruction_set_of_this_processor_passes() -> None:
    best = native.instruction_set()
    passed = []
    try:
        for name in native.INSTRUCTION_SETS:
            if native.force_instruction_set(name):
                native.unusable_because.cache_clear()
                assert native.unusable_because() is None, name
                assert native.instruction_set() == name
                passed.append(name)
    finally:
        assert native.force_instruction_set(None)
    assert native.instruction_set() == best
    assert "scalar" in passed


def test_an_unknown_instruction_set_is_not_there() -> None:
    assert not native.force_instruction_set("mmx")


def test_the_names_are_those_of_the_sources() -> None:
    sources = Path(native.__file__).parent.glob("src/kernels_*.cpp")
    found = [re.search(r'Kernels table\b[^;]*?"([a-z0-9-]+)"', source.read_text(), re.S) for source in sources]
    assert sorted(name[1] if name else "" for name in found) == sorted(native.INSTRUCTION_SETS)


def test_what_this_processor_runs(best_instruction_set: str) -> None:
    names = native.runnable_instruction_sets()
    assert names[0] == best_instruction_set
    assert "scalar" in names
    assert all(native.force_instruction_set(name) == (name in names) for name in native.INSTRUCTION_SETS)
    for name in names:
        native.force_instruction_set(name)
        assert native.runnable_instruction_sets() == names
        assert native.instruction_set() == name


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)
    assert "not built" in (native.unusable_because() or "")
    native._library.cache_clear()
    try:
        assert native.runnable_instruction_sets() == ()
    finally:
        native._library.cache_clear()


def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "edge_ops.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "edge_ops.so")
    assert "refuses them" in (native.unusable_because() or "")
    native._library.cache_clear()
    try:
        assert native.instruction_set() == "none"
    finally:
        native._library.cache_clear()


def test_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = native._run_self_test(native.library_path() or Path())
    outputs["total"] = outputs["total"] + 0.01
    monkeypatch.setattr(native, "_run_self_test", lambda path: outputs)
    assert "self-test fails: total" in (native.unusable_because() or "")
