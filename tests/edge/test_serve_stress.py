"""A minute of fifty clients, and a thousand that go away: the server's memory and threads stay as they were.

The server is a process of its own: the clients take more memory than it does.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI

from tests.serving import connect, raw_request, started

pytestmark = pytest.mark.stress

NUM_CLIENTS, SECONDS, NUM_CANCELLED = 50, 60, 1000
MIB = 1 << 20


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def streamed(client: AsyncOpenAI, number: int) -> str:
    chunks = await client.chat.completions.create(
        model="bits4", messages=user(f"def number_{number}("), stream=True, temperature=0, max_tokens=24
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def figure(url: str, name: str) -> int:
    text = httpx.get(f"{url}/metrics").text
    return int(float(re.findall(rf"^edge_{re.escape(name)} (\S+)$", text, re.MULTILINE)[0]))


def settled(url: str, pid: int) -> tuple[int, int]:
    """Anonymous bytes and threads of the server once it generates nothing."""
    end = time.monotonic() + 10
    while figure(url, "generations_in_progress") or figure(url, "requests_queued"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return figure(url, 'memory_bytes{kind="anonymous"}'), psutil.Process(pid).num_threads()


async def ask_for_a_while(url: str) -> tuple[list[int], list[float]]:
    """How often each client was answered, and how long each answer took."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        expected = [await streamed(client, number) for number in range(NUM_CLIENTS)]
        end = time.monotonic() + SECONDS
        waits: list[float] = []

        async def ask(number: int) -> int:
            num_asked = 0
            while (began := time.monotonic()) < end:
                assert await streamed(client, number) == expected[number]
                waits.append(time.monotonic() - began)
                num_asked += 1
            return num_asked

        return await asyncio.gather(*map(ask, range(NUM_CLIENTS))), sorted(waits)


def test_fifty_clients_for_a_minute(demo_artifact: Callable[..., Path]) -> None:
    with started(demo_artifact(4), "--queue", str(NUM_CLIENTS)) as (process, url):
        settled(url, process.pid)
        httpx.post(f"{url}/v1/completions", json={"prompt": "def ", "max_tokens": 500})
        before = settled(url, process.pid)
        counts, waits = asyncio.run(ask_for_a_while(url))
        behind = settled(url, process.pid)
    print(
        f"\n{sum(counts):,} answers, {min(counts)} to {max(counts)} a client; waits: median "
        f"{waits[len(waits) // 2]:.2f} s, most {waits[-1]:.2f} s; anonymous MiB {before[0] / MIB:.1f}, then "
        f"{behind[0] / MIB:.1f}; threads {before[1]}, then {behind[1]}"
    )
    assert min(counts) > 0.7 * max(counts)  # first come, first served
    assert behind[0] - before[0] < 8 * MIB  # buffers of fifty connections, and a heap of many sizes


def test_a_thousand_cancelled_requests(demo_artifact: Callable[..., Path]) -> None:
    rng = random.Random(0)

    def cancel(times: int) -> None:
        for number in range(times):
            body = {"messages": user(f"{number} " * 20), "stream": number % 2 == 0}
            with connect(int(url.rpartition(":")[2])) as connection:
                connection.sendall(raw_request(int(url.rpartition(":")[2]), json.dumps(body).encode()))
                time.sleep(rng.random() * 0.03)

    with started(demo_artifact(4)) as (process, url):
        cancel(300)
        series = [settled(url, process.pid)]
        for _ in range(5):
            cancel(NUM_CANCELLED // 5)
            series.append(settled(url, process.pid))
    print("\nMiB and threads:", ", ".join(f"{used / MIB:.1f} {threads}" for used, threads in series))
    assert series[-1][0] - series[0][0] < 8 * MIB  # the heap's slack: 2 to 5 MiB; a lost request holds some 20 KiB
    assert series[-1][1] <= series[0][1] + 4
