"""Sessions run on the CPU, and over a growing KV cache they do not grow themselves."""

from dataclasses import replace

import onnxruntime as ort
import pytest

from profiles import cores
from runtime import native
from runtime.memory import memory_usage
from runtime.session import CPU, open_session


def test_memory_of_a_long_decode_is_the_cache_alone(open_tiny):
    target = open_tiny("wide", max_tokens=800).target
    for token in range(100):
        target.forward([token], 1)
    before, cache_before = memory_usage().anonymous_bytes, target.cache.nbytes
    for token in range(600):
        target.forward([token], 1)
    grown = memory_usage().anonymous_bytes - before - (target.cache.nbytes - cache_before)
    # onnxruntime's memory patterns alone took 9 MB here; the arena may still round up for longer attention scores
    assert grown < 3e6


def test_a_gpu_provider_never_gets_the_kv_cache(tiny_artifact, one_thread, monkeypatch):
    asked = []
    monkeypatch.setattr(ort, "InferenceSession", lambda path, options, providers: asked.append(providers))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    both = replace(one_thread, providers=("CUDAExecutionProvider", CPU))
    open_session(tiny_artifact("wide") / "decoder.onnx", both)
    assert asked == [[CPU]]


@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_threads_are_those_of_the_profile(tiny_artifact, one_thread, num_threads):
    session = open_session(tiny_artifact("wide") / "decoder.onnx", replace(one_thread, num_threads=num_threads))
    assert session.get_session_options().intra_op_num_threads == num_threads  # 48: more than the machine has, too


def test_threads_are_as_many_as_performance_cores(tiny_artifact, one_thread, monkeypatch):
    monkeypatch.setattr(cores, "performance_cores", lambda: 3)
    session = open_session(tiny_artifact("wide") / "decoder.onnx", replace(one_thread, num_threads=0))
    assert session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize(("layout", "keeps"), [("portable", True), ("native", False)])
def test_only_portable_sessions_keep_what_they_freed(tiny_artifact, one_thread, layout, keeps):
    if layout == "native" and native.unusable_because():
        pytest.skip("the native ops are not usable")
    session = open_session(tiny_artifact("wide") / "decoder.onnx", one_thread, layout)
    assert session.get_session_options().enable_cpu_mem_arena == keeps
