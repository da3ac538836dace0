"""A session file whose checksums are right may still hold anything: it is read as a conversation or refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import EdgeError, Runtime
from runtime.session_file import read_session, write_session
from tests.lasting import PROFILE

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=5),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=8), one, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def runtime(demo_artifact: Callable[..., Path]) -> Iterator[Runtime]:
    profile = replace(PROFILE, context_tokens=300, prefill_chunk_tokens=48)
    with Runtime.load(demo_artifact(4, "native"), profile=profile) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def saved(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "chat.session"
    chat = runtime.conversation(system="Be brief.", temperature=0, max_tokens=8)
    chat.send("What does zip() do?")
    chat.save(path)
    return path


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_resumed_or_refused_in_one_line(
    runtime: Runtime, saved: Path, tmp_path: Path, data: st.DataObject
) -> None:
    file = read_session(saved)
    header, arrays = dict(file.header), dict(file.arrays)
    fields = sorted(set(header) - {"identity"})
    for field in data.draw(st.lists(st.sampled_from(fields), max_size=2)):
        header[field] = data.draw(PLAIN)
    name = data.draw(st.sampled_from(sorted(arrays)))
    change = data.draw(st.sampled_from(["none", "drop", "empty", "shorter", "random"]))
    if change == "drop":
        del arrays[name]
    elif change != "none":
        new = {"empty": arrays[name][:0], "shorter": arrays[name][:-1], "random": np.full_like(arrays[name], 255)}
        arrays[name] = new[change]
    path = tmp_path / "changed.session"
    try:
        write_session(path, header, arrays)
        runtime.resume(path).send("And map()?", max_tokens=2, temperature=0)
    except EdgeError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("messages", [{"role": "nobody", "content": ""}], "role 'nobody' is unknown"),
        ("messages", 5, "not a conversation of this version"),
        ("windows", [[0, 10_000]], r"window 0 is \[0, 10000\) of"),
        ("options", {"max_tokens": 0}, "max_tokens is 0"),
        ("options", {"max_token": 3}, "not a conversation of this version: .*max_token"),
        ("identity", {}, "its KV rows have layout None"),
    ],
)
def test_what_is_wrong_is_said(
    runtime: Runtime, saved: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    file = read_session(saved)
    write_session(tmp_path / "changed.session", {**file.header, field: value}, file.arrays)
    with pytest.raises(EdgeError, match=message):
        runtime.resume(tmp_path / "changed.session")
    assert runtime.resume(saved).send("And map()?", max_tokens=2, temperature=0).token_ids
