"""Drafts that cost nothing: where the text repeats its prompt or itself, what followed there may follow here.

Knows token ids only. Lookup and growth take constant time, whatever the length of the text.

Source: Saxena, "Prompt Lookup Decoding", https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

# Two tokens in a row are the fewest that say where in the text one is; a match of one is mostly chance.
MIN_MATCH = 2
# The longer the match, the more of what follows is the same: in Python code 40 % of the first tokens behind a match of
# 2 tokens, 57 % of 4, 82 % of 8 and more. Among places that match this far the latest wins.
MAX_MATCH = 8
# Places of the last two tokens that are compared, latest first: bounds the work where a pair is everywhere.
MAX_PLACES = 16
NUM_PLACES = MAX_MATCH - MIN_MATCH + 1  # lengths of match between which the policy tells


class Match(NamedTuple):
    """What followed where the last tokens stood before, and how many of them are the same there, up to `MAX_MATCH`."""

    token_ids: list[int]
    length: int

    @property
    def first_place(self) -> int:
        """Of `draft_policy.Offer`."""
        return max(self.length - MIN_MATCH, 0)


class PromptLookup:
    """Finds where the last tokens stood before; of the longest matches the most recent."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        """Begins with a prompt."""
        self._token_ids: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # pair of tokens -> place behind its last occurrence
        self._before = array("q")  # place -> place behind the occurrence before that one; 0 where there is none
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends tokens to the text."""
        ids, latest, before = self._token_ids, self._latest, self._before
        for token_id in token_ids:
            place = len(ids)
            if place < MIN_MATCH:
                before.append(0)
            else:
                # the pair in front of the new token: one at the end of the text is not yet there to be found
                pair = (ids[-2], ids[-1])
                before.append(latest.get(pair, 0))
                latest[pair] = place
            ids.append(token_id)

    def find(self, num_tokens: int) -> Match:
        """At most `num_tokens` tokens behind the latest of the longest matches; none where there is no match."""
        ids = self._token_ids
        place = self._latest.get((ids[-2], ids[-1]), 0) if len(ids) > MIN_MATCH else 0
        found = longest = 0
        for _ in range(MAX_PLACES):
            if not place or longest == MAX_MATCH:
                break
            if (length := self._match_length(place)) > longest:
                found, longest = place, length
            place = self._before[place]
        return Match(ids[found : found + num_tokens] if longest else [], longest)

    def _match_length(self, place: int) -> int:
        ids, end = self._token_ids, len(self._token_ids)
        most = min(MAX_MATCH, place)
        length = MIN_MATCH
        while length < most and ids[place - length - 1] == ids[end - length - 1]:
            length += 1
        return length
