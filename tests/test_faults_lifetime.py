"""Generations that are cancelled, abandoned or run side by side, and runtimes that are closed under them.

The runtime then gives the tokens of a fresh one. The numbers are those of the list of faults.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge import BusyError, ClosedError, EdgeError, Generation, GenerationStream, Runtime
from tests.lasting import PROMPT, Load, greedy, hooked

ROOT = Path(__file__).parents[1]
LONG_PROMPT = [2, *range(20, 80)]  # four prefill chunks
PLACES = [("target", "forward", 2), ("drafter", "draft", 2), ("target", "forward", 6)]  # prefill, draft, verify


@pytest.mark.parametrize(("owner", "name", "number"), PLACES)
def test_cancelled_by_the_runtime(  # 70
    runtime: Runtime, owner: str, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked(getattr(runtime._loaded, owner), name, number, runtime.cancel, monkeypatch)
    generation = greedy(runtime, LONG_PROMPT, num_draft_tokens=3)
    assert generation.finish_reason == "cancelled"
    assert len(generation.token_ids) < 40
    assert generation.stats.num_drafter_faults == 0


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 8, 20, 40])
def test_cancelled_at_any_moment(runtime: Runtime, delay_ms: int) -> None:  # 70
    timer = threading.Timer(delay_ms / 1e3, runtime.cancel)
    timer.start()
    generation = greedy(runtime, LONG_PROMPT)
    timer.join()
    assert generation.finish_reason == ("length" if len(generation.token_ids) == 40 else "cancelled")


def test_a_cancel_with_nothing_to_cancel(runtime: Runtime) -> None:
    runtime.cancel()
    greedy(runtime)
    runtime.cancel()


def test_a_consumer_that_raises(runtime: Runtime, plain: list[int]) -> None:  # 70
    stream = runtime.stream(PROMPT, temperature=0.0)
    try:
        for _ in stream:
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert greedy(runtime).token_ids == plain  # while the traceback still holds the stream
    assert list(stream) == []
    assert stream.finish().finish_reason == "cancelled"


@pytest.mark.parametrize("end", ["drop", "close", "cancel", "runtime.cancel", "nothing"])
def test_an_abandoned_stream(runtime: Runtime, plain: list[int], end: str) -> None:  # 70
    stream = runtime.stream(PROMPT, temperature=0.0)
    next(stream)
    if end == "drop":
        del stream
    elif end == "runtime.cancel":
        runtime.cancel()
    elif end != "nothing":
        getattr(stream, end)()
    assert greedy(runtime).token_ids == plain


def test_a_stream_that_never_began(runtime: Runtime, plain: list[int]) -> None:  # 70
    stream = runtime.stream(PROMPT, max_tokens=40, temperature=0.0)
    assert greedy(runtime).token_ids == plain
    assert stream.finish().token_ids == plain


def test_a_stream_whose_thread_has_ended(runtime: Runtime, plain: list[int]) -> None:  # 70, 71
    streams: list[GenerationStream] = []

    def begin() -> None:
        streams.append(runtime.stream(PROMPT, temperature=0.0))
        next(streams[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(60)
    assert greedy(runtime).token_ids == plain
    assert streams[0].finish().finish_reason == "cancelled"


def test_a_stream_handed_to_another_thread(runtime: Runtime, plain: list[int]) -> None:
    stream = runtime.stream(PROMPT, max_tokens=len(plain), temperature=0.0)
    next(stream)
    finished: list[Generation] = []
    thread = threading.Thread(target=lambda: finished.append(stream.finish()))
    thread.start()
    thread.join(60)
    assert [generation.token_ids for generation in finished] == [plain]


# Threads


class Blocked:
    """A generation of another thread that stands in its forward of some number until it may go on."""

    def __init__(self, runtime: Runtime, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.result: Generation | BaseException | None = None
        self._begun, self._go_on = threading.Event(), threading.Event()
        self._runtime = runtime
        hooked(runtime._loaded.target, "forward", number, self._stand, monkeypatch)
        self._thread = threading.Thread(target=self._generate)
        self._thread.start()
        assert self._begun.wait(60)

    def _stand(self) -> None:
        self._begun.set()
        assert self._go_on.wait(60)

    def _generate(self) -> None:
        try:
            self.result = greedy(self._runtime)
        except BaseException as error:
            self.result = error

    def go_on(self) -> None:
        self._go_on.set()

    def finish(self) -> Generation:
        self.go_on()
        self._thread.join(60)
        assert isinstance(self.result, Generation), self.result
        return self.result


@pytest.mark.parametrize("number", [1, 3])
def test_another_thread_is_told_that_it_is_busy(  # 71
    runtime: Runtime, plain: list[int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Blocked(runtime, number, monkeypatch)
    stream = runtime.stream(PROMPT)
    for call in (
        lambda: greedy(runtime),
        lambda: next(stream),
        lambda: runtime.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(
            BusyError, match=r"another thread's generation is in progress; wait for it or cancel\(\) it"
        ):
            call()
    assert runtime.count_tokens("text") > 1  # needs no model
    assert other.finish().token_ids == plain


def test_a_generation_after_a_cancelled_one_waits_for_its_last_step(  # 70, 71
    runtime: Runtime, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Blocked(runtime, 3, monkeypatch)
    runtime.cancel()
    timer = threading.Timer(0.05, other.go_on)
    timer.start()
    assert greedy(runtime).token_ids == plain
    timer.join()
    assert other.finish().finish_reason == "cancelled"


def test_of_many_threads_each_is_served_or_told(runtime: Runtime, plain: list[int]) -> None:  # 71
    results: list[object] = []

    def generate() -> None:
        try:
            results.append(greedy(runtime).token_ids == plain)
        except BusyError as error:
            results.append(type(error))

    threads = [threading.Thread(target=generate) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 8
    assert set(results) <= {True, BusyError}
    assert True in results


def test_runtimes_side_by_side_generate_as_one_alone(load: Load) -> None:  # 71
    prompts = [[2, *range(start, start + 30)] for start in (10, 200, 400)]

    def all_of(runtime: Runtime) -> list[object]:
        made = [greedy(runtime, prompt) for prompt in prompts]
        made += [runtime.generate(prompt, max_tokens=30, seed=seed) for seed, prompt in enumerate(prompts)]
        return [(one.token_ids, one.text, one.stats.accepted_histogram) for one in made]

    alone = all_of(load())
    runtimes = [load() for _ in range(3)]
    found: dict[int, list[object]] = {}
    threads = [
        threading.Thread(target=lambda index=index, runtime=runtime: found.update({index: all_of(runtime)}))  # type: ignore[misc]
        for index, runtime in enumerate(runtimes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {0: alone, 1: alone, 2: alone}


# Closed


def test_a_closed_runtime(load: Load) -> None:  # 72
    runtime = load()
    begun, fresh = runtime.stream(PROMPT, temperature=0.0), runtime.stream(PROMPT, temperature=0.0)
    next(begun)
    runtime.close()
    runtime.close()
    runtime.cancel()
    calls: list[Callable[[], object]] = [
        lambda: greedy(runtime),
        lambda: runtime.stream(PROMPT),
        lambda: runtime.chat([{"role": "user", "content": "x"}]),
        lambda: runtime.chat_prompt([{"role": "user", "content": "x"}]),
        lambda: runtime.count_tokens("x"),
        lambda: next(fresh),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="the runtime is closed; load the artifact again"):
            call()
    assert list(begun) == []
    assert begun.finish().finish_reason == "cancelled"


def test_a_with_statement_closes(load: Load) -> None:  # 72
    with pytest.raises(ZeroDivisionError), load() as runtime:
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        greedy(runtime)


def test_closed_while_another_thread_generates(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:  # 72
    runtime = load()
    other = Blocked(runtime, 3, monkeypatch)
    closing = threading.Thread(target=runtime.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive()  # nothing is freed under a running step
    generation = other.finish()
    closing.join(60)
    assert not closing.is_alive()
    assert generation.finish_reason == "cancelled"
    assert len(generation.token_ids) < 40


def test_closed_within_its_own_step(load: Load, plain: list[int], monkeypatch: pytest.MonkeyPatch) -> None:  # 72
    """As a signal handler may do; and one that generates is told that it cannot."""
    runtime = load()

    def handler() -> None:
        with pytest.raises(BusyError):
            greedy(runtime)
        runtime.close()
        runtime.close()

    hooked(runtime._loaded.target, "forward", 3, handler, monkeypatch)
    generation = greedy(runtime)
    assert generation.finish_reason == "cancelled"
    assert generation.token_ids == plain[: len(generation.token_ids)]
    with pytest.raises(ClosedError):
        greedy(runtime)


def test_closed_as_a_generation_begins(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:  # 72
    runtime = load()
    stream = runtime.stream(PROMPT, temperature=0.0)
    open_or_raise, closing = runtime._open_or_raise, threading.Thread(target=runtime.close)

    def find_it_open() -> object:
        loaded = open_or_raise()
        closing.start()
        closing.join(0.05)  # it cannot end yet
        return loaded

    monkeypatch.setattr(runtime, "_open_or_raise", find_it_open)
    assert stream.finish().finish_reason == "cancelled"
    closing.join(60)
    assert not closing.is_alive()


def test_closed_at_any_moment(load: Load, plain: list[int]) -> None:  # 72
    for delay_ms in (0, 0.2, 0.5, 1, 2, 5, 10):
        runtime, results = load(), []

        def generate(runtime: Runtime = runtime, results: list[object] = results) -> None:
            try:
                results.append(greedy(runtime))
            except EdgeError as error:
                results.append(error)

        threads = [threading.Thread(target=generate) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(delay_ms / 1e3)
        runtime.close()
        for thread in threads:
            thread.join(60)
        assert len(results) == 2
        for result in results:
            assert isinstance(result, Generation | ClosedError | BusyError)
            if isinstance(result, Generation):
                assert result.token_ids == plain[: len(result.token_ids)]


# Processes

FORKS = """
import multiprocessing, os, signal, sys, threading
from pathlib import Path
from edge import ClosedError, Runtime

ARTIFACT = sys.argv[1]

def generate(queue):
    with Runtime.load(ARTIFACT) as runtime:
        queue.put(runtime.generate([2, 45], max_tokens=4, temperature=0.0).token_ids)

def in_fork(call):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            call()
            os._exit(0)
        except ClosedError as error:
            os._exit(10 if f"cannot be used after a fork in {os.getpid()}; load it in the child" in str(error) else 11)
        except BaseException:
            os._exit(12)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if __name__ == "__main__":
    runtime = Runtime.load(ARTIFACT)
    tokens = runtime.generate([2, 45], max_tokens=4, temperature=0.0).token_ids
    fresh, begun = runtime.stream([2, 45]), runtime.stream([2, 45], temperature=0.0)
    next(begun)
    chat = runtime.conversation()
    refused = (lambda: runtime.generate([2]), lambda: runtime.stream([2]), lambda: runtime.count_tokens("x"),
               lambda: next(fresh), lambda: next(begun), lambda: chat.send("x"), lambda: chat.save("never"))
    print([in_fork(call) for call in refused])
    print([in_fork(call) for call in (begun.close, begun.cancel, runtime.cancel, runtime.close, runtime.close)])
    standing, go_on = threading.Event(), threading.Event()
    forward = runtime._loaded.target.forward
    def stand(*args, **options):
        standing.set()
        go_on.wait(60)
        return forward(*args, **options)
    runtime._loaded.target.forward = stand
    thread = threading.Thread(target=lambda: runtime.generate([2, 45], max_tokens=4))
    begun.close()
    thread.start()
    standing.wait(60)
    print([in_fork(call) for call in (runtime.close, runtime.cancel, lambda: runtime.generate([2]))])
    go_on.set()
    thread.join()
    runtime._loaded.target.forward = forward
    queue = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=generate, args=(queue,))
    child.start()
    print(queue.get(timeout=60) == tokens)
    child.join()
    print(runtime.generate([2, 45], max_tokens=4, temperature=0.0).token_ids == tokens)
"""


def test_a_fork_is_refused_and_a_spawn_works(lasting_artifact: Path, tmp_path: Path) -> None:  # 73
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    command = [sys.executable, "-W", "error", script, lasting_artifact]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    refused, ended, while_busy, spawned, afterwards = done.stdout.splitlines()
    assert refused == "[10, 10, 10, 10, 10, 10, 10]"
    assert ended == "[0, 0, 0, 0, 0]"
    assert while_busy == "[0, 0, 10]"
    assert (spawned, afterwards) == ("True", "True")
