"""How many tokens to draft next, and from which source: what the evidence so far and the costs of this device favour.

Knows no models, clocks or random numbers: equal costs and outcomes give equal choices, and a seed equal samples.

Source: Leviathan et al., arXiv 2211.17192, section 3 (expected tokens of a verify step, for one acceptance rate).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Source = Literal["plain", "drafter", "lookup"]

FIRST_GUESS = 0.5  # acceptance of a source's first draft before any evidence
PRIOR_ROUNDS = 2.0  # rounds of evidence that this guess counts as
# A round's evidence counts for half after 14 further rounds and for all rounds together at most 20: long enough that
# chance moves the length by about one, short enough to follow the text from prose into a table.
MEMORY = 0.95
# What is known of drafts that did not pay is old once they are probed and counts as this many rounds: with more it
# takes long to believe in a change, with less one lucky probe does.
OLD_EVIDENCE_ROUNDS = 3.0
# A position is believed to do as well as the one before it, as strongly as this many rounds of its own evidence.
NEIGHBOUR_ROUNDS = 1.0
# The time that probing may take. A probe is one draft more than pays, and is due once this share of the time since the
# last one covers what it is expected to lose: a first draft that costs 4 % of a step is probed every 5 steps, one that
# costs 70 % every 95. It is one draft because where little stands only the first one of a probe can teach anything.
PROBE_SHARE = 0.0075
# A probe that stood although that was less likely than this is followed by another at no charge: the text has changed.
# Chance so repeats a probe at most 1 / (1 - 0.6) times on average, so that probing stays below 2 % in all.
SURPRISE = 0.6


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a round takes on a device, in seconds or any other unit.

    Args:
        verify_seconds: of a forward of the target over 1, 2, ... tokens; beyond the last it grows as at the end.
        draft_seconds: of each drafted token; None where there is no drafter that works.
        overhead_seconds: of the host, each round.
    """

    verify_seconds: tuple[float, ...]
    draft_seconds: float | None
    overhead_seconds: float = 0.0

    def round_seconds(self, source: Source, num_drafts: int) -> float:
        """Of drafting a number of tokens and verifying them."""
        drafting = num_drafts * (self.draft_seconds or 0.0) if source == "drafter" else 0.0
        return self.overhead_seconds + drafting + self._verify_seconds(num_drafts + 1)

    def _verify_seconds(self, num_tokens: int) -> float:
        known = self.verify_seconds
        if num_tokens <= len(known):
            return known[num_tokens - 1]
        slope = (known[-1] - known[0]) / max(len(known) - 1, 1)
        return known[-1] + slope * (num_tokens - len(known))


class Offer(NamedTuple):
    """What a source can give in a round: at most `num_drafts`, the first of them at a place of its own scale.

    Drafts behind each other are at places behind each other, and evidence is kept by place. A drafter's first draft is
    always at 0; a lookup's is the further the longer its match, as the second token behind a short match is as good as
    the first behind one that is a token longer.
    """

    num_drafts: int
    first_place: int = 0


class Choice(NamedTuple):
    """What to draft in a round."""

    source: Source
    num_drafts: int
    first_place: int = 0


PLAIN = Choice("plain", 0)


class Acceptance:
    """What is believed of one source: the probability that its draft at a place stands, given all before it stood."""

    def __init__(self, num_places: int) -> None:
        """The last place stands for all behind it too."""
        self._stood = [0.0] * num_places
        self._rounds = [0.0] * num_places
        self._stood[0], self._rounds[0] = PRIOR_ROUNDS * FIRST_GUESS, PRIOR_ROUNDS

    def rates(self, offer: Offer) -> list[float]:
        """Of each draft of an offer. A place without evidence of its own takes the rate of the one before it."""
        rate, rates = self._stood[0] / self._rounds[0], []
        for place, (stood, rounds) in enumerate(zip(self._stood, self._rounds, strict=True)):
            if place:
                rate = (stood + NEIGHBOUR_ROUNDS * rate) / (rounds + NEIGHBOUR_ROUNDS)
            if place >= offer.first_place:
                rates.append(rate)
        return (rates + [rate] * offer.num_drafts)[: offer.num_drafts]

    def observe(self, choice: Choice, num_accepted: int) -> None:
        """Notes a round; of the drafts behind the first rejected one nothing is learned."""
        for place, rounds in enumerate(self._rounds):
            self._weigh(place, max(MEMORY * rounds, OLD_EVIDENCE_ROUNDS))
        for index in range(min(num_accepted + 1, choice.num_drafts)):
            place = self._place(choice.first_place + index)
            self._rounds[place] += 1
            self._stood[place] += index < num_accepted

    def doubt(self, place: int) -> None:
        """Lets the evidence of a place count as old."""
        self._weigh(self._place(place), OLD_EVIDENCE_ROUNDS)

    def _weigh(self, place: int, most: float) -> None:
        """Lets the evidence of a place count as `most` rounds at most; what it says stays."""
        if (rounds := self._rounds[place]) > most:
            self._stood[place] *= most / rounds
            self._rounds[place] = most

    def _place(self, place: int) -> int:
        return min(place, len(self._rounds) - 1)


@dataclass(slots=True)
class _Source:
    """What the policy keeps of a source."""

    acceptance: Acceptance
    round_seconds: list[float]  # of 0, 1, ... drafts
    credit: float  # seconds saved up for a probe
    surprising: Choice | None = None  # a probe under way that would surprise if it stood


class DraftPolicy:
    """Chooses for one generation; `observe` follows each `choose`."""

    def __init__(self, costs: StepCosts, limit: int, num_places: int = 1) -> None:
        """Knows nothing of the text yet, and has credit for a first probe.

        Args:
            costs: of this device
            limit: the most drafts of a round
            num_places: at which a lookup's drafts may be
        """
        self.costs = costs
        self.limit = limit
        self._plain_seconds = costs.round_seconds("plain", 0)
        self._sources = {
            "drafter": self._source("drafter", max(limit, 1)),
            "lookup": self._source("lookup", num_places),
        }

    def choose(self, offers: Mapping[Source, Offer]) -> Choice:
        """The source and number of drafts with the most expected tokens per second, or a probe that is due."""
        best, seconds, tokens = PLAIN, self._plain_seconds, 1.0
        expected = {name: self._expected_tokens(name, offer) for name, offer in offers.items() if offer.num_drafts > 0}
        for name, values in expected.items():
            costs = self._sources[name].round_seconds
            for num_drafts in range(1, len(values)):
                if values[num_drafts] * seconds > tokens * costs[num_drafts]:
                    best = Choice(name, num_drafts, offers[name].first_place)
                    seconds, tokens = costs[num_drafts], values[num_drafts]
        for name, values in expected.items():
            self._sources[name].credit += PROBE_SHARE * seconds
            probe = Choice(name, 1 + (best.num_drafts if name == best.source else 0), offers[name].first_place)
            if self._can_probe(probe, values, seconds / tokens):
                return probe
        return best

    def observe(self, choice: Choice, num_accepted: int) -> None:
        """Notes how many of the drafts that were asked for stood; one that was not given counts as rejected."""
        if choice.source == "plain":
            return
        source = self._sources[choice.source]
        source.acceptance.observe(choice, num_accepted)
        if choice == source.surprising and num_accepted == choice.num_drafts:
            source.credit = math.inf
        source.surprising = None

    def _source(self, name: Source, num_places: int) -> _Source:
        round_seconds = [self.costs.round_seconds(name, num_drafts) for num_drafts in range(self.limit + 1)]
        return _Source(Acceptance(num_places), round_seconds, credit=self._plain_seconds)

    def _expected_tokens(self, name: Source, offer: Offer) -> list[float]:
        """Of a round of 0, 1, ... drafts of a source."""
        all_stand, tokens = 1.0, [1.0]
        for rate in self._sources[name].acceptance.rates(offer)[: self.limit]:
            all_stand *= rate
            tokens.append(tokens[-1] + all_stand)
        return tokens

    def _can_probe(self, probe: Choice, expected_tokens: list[float], seconds_per_token: float) -> bool:
        """Whether the credit covers what a probe is expected to lose; uses it up."""
        if probe.num_drafts >= len(expected_tokens):
            return False
        source = self._sources[probe.source]
        loss = source.round_seconds[probe.num_drafts] - expected_tokens[probe.num_drafts] * seconds_per_token
        if source.credit < loss:
            return False
        source.credit = 0.0
        if probe.num_drafts == 1:
            source.acceptance.doubt(probe.first_place)
        stands = expected_tokens[probe.num_drafts] - expected_tokens[probe.num_drafts - 1]
        source.surprising = probe if stands < SURPRISE else None
        return True
