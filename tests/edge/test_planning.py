"""Plans from an artifact, a configuration or a name, without weights; and what refuses them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import edge
from export.errors import CheckpointError
from export.released import RELEASED
from profiles import ProfileError, load_profile
from runtime.errors import ArtifactError, MemoryBudgetError, RequestError

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def test_an_artifact_and_its_configuration_agree(tiny_artifact, tiny_checkpoint, one_thread):
    folder = tiny_artifact("wide", 4, "int8", "native")
    config = tiny_checkpoint("wide").target
    one = edge.plan(folder, one_thread, has_drafter=False)
    other = edge.plan(config, one_thread, bits=4, has_drafter=False)
    assert edge.plan(config / "config.json", one_thread, bits=4, has_drafter=False) == other
    assert (one.mapped_bytes, one.table_bytes) == (other.mapped_bytes, other.table_bytes)
    assert one.kv_bytes_per_token == other.kv_bytes_per_token
    # what is estimated: files of tokenizer and graphs
    assert abs(one.anonymous_bytes - other.anonymous_bytes) < 4 * MIB


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    plan = edge.plan(name, "laptop", bits=4)
    assert plan.model == f"{name} at 4 bits"
    assert (plan.bits, plan.layout, plan.has_drafter) == (4, "native", True)
    assert plan.kv_bytes_per_token == {"E2B": 3 * 2 * 512 * 2, "E4B": 4 * 2 * 2 * 512 * 2}[name]
    assert plan.max_context_tokens == plan.context_tokens == load_profile("laptop").context_tokens
    assert plan.peak_bytes < 500 * MIB < plan.mapped_bytes < plan.table_bytes * 2


# "On the native path, anonymous memory with the drafter loaded stays under": the plan's own figures
@pytest.mark.parametrize(
    ("name", "context_tokens", "kv_dtype", "most"),
    [
        ("E2B", 8192, "float16", 400 * MIB),
        ("E2B", 32_768, "int8", 600 * MIB),
        ("E2B", 131_072, "int8", 1024 * MIB),
        ("E4B", 32_768, "int8", 1024 * MIB),
    ],
)
def test_long_contexts_fit_where_they_must(name, context_tokens, kv_dtype, most):
    plan = edge.plan(name, "workstation", bits=4, context_tokens=context_tokens, kv_dtype=kv_dtype)
    assert plan.has_drafter
    assert plan.peak_bytes < most


def test_a_fine_tune_is_planned_with_the_released_drafter(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(RELEASED["E2B"].target)), encoding="utf-8")
    mine, theirs = edge.plan(tmp_path, "phone-arm"), edge.plan("E2B", "phone-arm")
    assert mine.model == f"{tmp_path.name} at 4 bits"
    assert replace(mine, model=theirs.model) == theirs


def test_the_profile_says_how_many_bits(tmp_path):
    profile = replace(load_profile("laptop"), weight_bits=8)
    assert edge.plan("E2B", profile).bits == 8
    assert edge.plan("E2B", profile, bits=4).bits == 4
    assert edge.plan("E2B", profile).mapped_bytes > 1.5 * edge.plan("E2B", profile, bits=4).mapped_bytes


def test_the_device_counts_not_this_machine(monkeypatch):
    monkeypatch.setattr("profiles.budget._available_bytes", lambda: 1 << 20)
    laptop = load_profile("laptop")
    assert edge.plan("E2B", "laptop").budget_bytes == int(laptop.device_memory_bytes * laptop.memory_fraction)
    with pytest.raises(MemoryBudgetError):  # a profile without a device of its own is of this machine
        edge.plan("E2B", replace(laptop, device_memory_bytes=None))


def test_too_little_memory_says_what_fits():
    with pytest.raises(
        MemoryBudgetError, match=r"phone-arm: E4B at 4 bits needs [\d,]+ MiB for 131,072 tokens"
    ) as caught:
        edge.plan("E4B", "phone-arm", bits=4, context_tokens=131_072)
    assert "context_tokens " in str(caught.value)
    plan = caught.value.plan
    assert plan.context_tokens == 131_072
    assert plan.peak_bytes > plan.budget_bytes
    fitting = edge.plan("E4B", "phone-arm", bits=4, context_tokens=plan.max_context_tokens)
    assert fitting.peak_bytes <= plan.budget_bytes


REFUSED = {
    "no such source": (
        lambda folder: edge.plan(folder / "none"),
        ArtifactError,
        "no artifact, no config.json and none of",
    ),
    "other name": (
        lambda folder: edge.plan("E3B"),
        ArtifactError,
        "E3B: no artifact, no config.json and none of E2B, E4B",
    ),
    "bits": (lambda folder: edge.plan("E2B", bits=5), RequestError, "--bits 5: choose one of"),
    "block size": (lambda folder: edge.plan("E2B", block_size=7), RequestError, "--block-size 7: choose one of"),
    "layout": (lambda folder: edge.plan("E2B", layout="dense"), RequestError, "layout is 'dense'"),
    "native floats": (
        lambda folder: edge.plan("E2B", bits=16, layout="native"),
        RequestError,
        "16 bits in blocks of 32",
    ),
    "profile": (lambda folder: edge.plan("E2B", "phone-arn"), ProfileError, "did you mean 'phone-arm'"),
    "kv_dtype": (lambda folder: edge.plan("E2B", kv_dtype="int4"), ProfileError, "kv_dtype is 'int4'"),
    "budget": (lambda folder: edge.plan("E2B", memory_budget="much"), ProfileError, "no amount of memory"),
    "context": (lambda folder: edge.plan("E2B", context_tokens=0), RequestError, "expected an integer of 1 to 131,072"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned(case, tmp_path):
    call, kind, match = REFUSED[case]
    with pytest.raises(kind, match=match) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[]", "expected an object"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"model_type": "gemma4_assistant"}', "is an assistant's"),
        (b'{"model_type": "llama"}', "config.json"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_configurations_that_are_none(content, match, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        edge.plan(tmp_path)
    assert "\n" not in str(caught.value)


def test_options_of_an_artifact_are_its_own(tiny_artifact):
    folder = tiny_artifact("wide", 4, "int8", "native")
    with pytest.raises(RequestError, match="an artifact has its own bits and layout"):
        edge.plan(folder, bits=4)


def test_planning_needs_neither_torch_nor_onnx():
    code = "import sys, edge; edge.plan('E2B', 'phone-arm'); print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
