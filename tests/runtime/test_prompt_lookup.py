import time

import numpy as np
import pytest

from runtime.prompt_lookup import MAX_MATCH, MIN_MATCH, NUM_PLACES, Match, PromptLookup


def by_scan(token_ids: list[int], num_tokens: int) -> Match:
    """The same by trying every place, latest first."""
    end = len(token_ids)
    for length in range(min(MAX_MATCH, end - 1), MIN_MATCH - 1, -1):
        for place in range(end - 1, length - 1, -1):
            if token_ids[place - length : place] == token_ids[end - length :]:
                return Match(token_ids[place : place + num_tokens], length)
    return Match([], 0)


@pytest.mark.parametrize("vocab_size", [4, 12, 50])
def test_it_finds_what_a_scan_finds(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.prompt_lookup.MAX_PLACES", 1000)
    token_ids: list[int] = np.random.default_rng(vocab_size).integers(vocab_size, size=300).tolist()
    token_ids += token_ids[20:120]
    lookup = PromptLookup(token_ids[:5])
    for end in range(5, len(token_ids)):
        assert lookup.find(6) == by_scan(token_ids[:end], 6)
        lookup.extend([token_ids[end]])


def test_of_the_longest_matches_the_latest() -> None:
    lookup = PromptLookup([1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 9, 2, 3])
    assert lookup.find(2) == Match([60, 8], 3)
    assert PromptLookup([2, 3, 50, 7, 2, 3, 60, 8, 2, 3]).find(1) == Match([60], 2)


def test_a_repetition_goes_on_over_its_own_end() -> None:
    lookup = PromptLookup([7, 8, 9, 7, 8])
    assert lookup.find(7) == Match([9, 7, 8], 2)  # as far as there is text
    lookup.extend([9, 7])
    assert lookup.find(2).token_ids == [8, 9]


@pytest.mark.parametrize("token_ids", [[], [1], [1, 1], [1, 2], [1, 2, 3, 4, 2], [3, 4, 5, 1, 4, 4]])
def test_without_an_earlier_pair_nothing_is_found(token_ids: list[int]) -> None:
    assert PromptLookup(token_ids).find(5) == Match([], 0)


def test_places_are_by_length() -> None:
    assert Match([], 0).first_place == Match([4], MIN_MATCH).first_place == 0
    assert Match([4], MAX_MATCH).first_place == NUM_PLACES - 1


def test_a_long_monotonous_text_takes_no_longer() -> None:
    def seconds(num_tokens: int) -> float:
        lookup, times = PromptLookup([5, 6] * (num_tokens // 2)), []
        for _ in range(20):
            start = time.perf_counter()
            lookup.find(7)
            lookup.extend([5, 6])
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(100_000) < 1e-3  # 2 us; a scan in Python takes milliseconds
