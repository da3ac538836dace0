"""The chat page in a headless Chromium: it asks, streams, stops, and inserts text as text."""

import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser, open_browser
from tests.serving import Script, Served, serving

PAGE = resources.files("edge.serve").joinpath("page.html").read_text(encoding="utf-8")
LAST = "document.querySelector('article.assistant:last-of-type')"
IS_OVER = f"{LAST} && !{LAST}.classList.contains('busy')"

with_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def served(demo_artifact: Callable[..., Path]) -> Iterator[Served]:
    with serving(demo_artifact(4)) as served:
        served.runtime.manifest.generation["eos_token_ids"] = []
        yield served


@pytest.fixture
def browser(served: Served) -> Iterator[Browser]:
    with open_browser() as browser:
        browser.open(served.url)
        browser.wait("document.title === 'bits4'")
        yield browser


def say(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('words').focus()")
    browser.type(text)
    browser.press_enter()


def test_the_page_needs_nothing_else() -> None:
    assert not re.search(r"https?://|//[a-z]|@import|url\(|innerHTML|document\.write|eval", PAGE)
    assert not re.search(r"<[^>]+ (on\w+|style)=", PAGE)
    with Script().test_client() as client:
        response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@with_browser
def test_a_chat_on_the_page(browser: Browser) -> None:
    say(browser, "What does <b>zip</b> do? <img src=x onerror='document.title=1'>")
    browser.wait(IS_OVER)
    assert browser.run("document.querySelector('.user .text').children.length") == 0
    assert browser.run(f"{LAST}.querySelector('.text').textContent.length") > 100
    figures = browser.run(f"{LAST}.querySelector('.figures').textContent")
    drafts, reused = r"\d+ % of drafts accepted", r"\d+ of \d+ prompt tokens reused"
    assert re.fullmatch(rf"[\d.]+ tokens/s · {drafts} · \d+ tokens · {reused} · \d+ MiB of memory", figures)
    assert browser.run("document.title") == "bits4"
    assert not [event for event in browser.events if event.get("method") == "Log.entryAdded"]  # such as of the policy


@with_browser
def test_the_stop_button_ends_the_answer(served: Served, browser: Browser) -> None:
    for turn in (1, 2):  # and the chat goes on
        say(browser, "hello")
        browser.wait(f"document.querySelectorAll('.assistant').length === {turn}")
        browser.wait(f"{LAST}.querySelector('.text').textContent.length > 0")
        browser.run("document.getElementById('stop').click()")
        browser.wait(IS_OVER)
        assert browser.run(f"{LAST}.querySelector('.figures').textContent") == "stopped"
    browser.wait("!document.getElementById('go').hidden")


@with_browser
def test_the_page_asks_for_the_key(served: Served, demo_artifact: Callable[..., Path]) -> None:
    with serving(demo_artifact(4), api_key="secret") as locked, open_browser() as browser:
        browser.open(locked.url)
        for key in ("wrong", "secret"):
            browser.wait("document.getElementById('ask').open")
            browser.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
            browser.type(key)
            browser.press_enter()
        browser.wait("document.title === 'bits4'")
