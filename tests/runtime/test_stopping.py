"""How text is cut into pieces never matters, and nothing of a stop string is emitted."""

import itertools
import random
import re
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.stopping import StopScanner


def scan(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """All text that a user sees, and whether a stop string ended it."""
    scanner = StopScanner(stops)
    emitted = ""
    for piece in pieces:
        text, stopped = scanner.push(piece)
        emitted += text
        if stopped:
            return emitted, True
    return emitted + scanner.finish(), False


def by_definition(stops: list[str], text: str) -> tuple[str, bool]:
    """Reads `text` a character at a time, ends where one or more stop strings end, and cuts off the longest."""
    for end in range(len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def cuts(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    inner = range(1, len(text))
    chosen = itertools.chain.from_iterable(itertools.combinations(inner, num) for num in range(len(text)))
    return [[text[a:b] for a, b in itertools.pairwise((0, *places, len(text)))] for places in chosen]


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["<end>"], "ab<end>cd"),
        (["<end>"], "<en<end>"),
        (["<end>"], "ab<en"),
        (["aab"], "aaaab"),
        (["abc", "b"], "xabcx"),
        (["b", "abc"], "xabcx"),
        (["abcd", "cd", "d"], "xxabcdx"),
        (["\n\n", "\n#"], "a\n#\n\nb"),
        (["é€"], "aé€b"),
        ([], "abc"),
    ],
)
def test_every_cut_gives_the_same(stops: list[str], text: str) -> None:
    expected = by_definition(stops, text)
    assert {scan(stops, pieces) for pieces in cuts(text)} == {expected}


def test_random_stops_texts_and_cuts() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        places = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[a:b] for a, b in itertools.pairwise((0, *places, len(text)))]
        assert scan(stops, pieces) == by_definition(stops, text), (stops, pieces)


def test_no_more_than_a_beginning_is_held_back() -> None:
    scanner = StopScanner(["stop!", "stand"])
    assert scanner.push("it st") == ("it ", False)
    assert scanner.push("o") == ("", False)
    assert scanner.push("re s") == ("store ", False)
    assert scanner.finish() == "s"
    assert scanner.finish() == ""


def test_after_the_stop_nothing_comes() -> None:
    scanner = StopScanner(["X"])
    assert scanner.push("aXb") == ("a", True)
    assert scanner.push("c") == ("", True)
    assert scanner.finish() == ""


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["a", ""], "stop 1 must be a non-empty string, got ''"),
        ([b"a"], "stop 0 must be a non-empty string, got b'a'"),
        ([None], "stop 0 must be a non-empty string, got None"),
        ("abc", "stop must be a list of strings, got 'abc'"),
        (7, "stop must be a list of strings, got 7"),
    ],
)
def test_unusable_stops_are_refused(stops: Any, message: str) -> None:
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        StopScanner(stops)
