"""What is drafted in each round: so many tokens of the drafter, or what the policy picks of drafter and lookup."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.draft_policy import PLAIN, DraftPolicy, Offer, Source, StepCosts
from runtime.drafter import Draft
from runtime.errors import InferenceError
from runtime.prefix import Reuse
from runtime.prompt_lookup import NUM_PLACES, PromptLookup
from runtime.sampling import Distribution, SamplingParams

Float32 = npt.NDArray[np.float32]


class Drafter(Protocol):
    """What the loop needs of a drafter."""

    def draft(
        self,
        last_token_id: int,
        hidden: Float32,
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        """At most `num_draft_tokens` tokens behind `last_token_id`."""
        ...


class Drafting(Protocol):
    """Proposes drafts for each verify step and is told what became of them."""

    def begin(self, token_ids: Sequence[int]) -> None:
        """Goes on behind these tokens, those of a prefill and the first one behind it, and behind no others."""
        ...

    def propose(self, last_token_id: int, hidden: Float32, num_room: int) -> list[Draft]:
        """At most `num_room` drafts behind `last_token_id`, which `hidden` predicted."""
        ...

    def observe(self, block: Sequence[int], num_accepted: int) -> Source:
        """Takes the outcome of the step, its tokens, and says where its drafts came from."""
        ...


@dataclass(slots=True)
class DraftCounts:
    """What the loop did; `accepted_histogram[n]` counts the verify steps that accepted n drafts.

    `drafted_histogram[n]` counts those that n drafts were given to. A slide is where turns of the prompt were dropped.
    Reused tokens were cached, recomputed ones, which count as prefilled, were too, but for the windows behind them.
    """

    num_drafted: int = 0
    num_accepted: int = 0
    num_verify_steps: int = 0
    num_drafter_faults: int = 0
    num_prefilled_tokens: int = 0
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_slides: int = 0
    num_dropped_tokens: int = 0
    accepted_histogram: list[int] = field(default_factory=list)
    drafted_histogram: list[int] = field(default_factory=list)
    num_steps: dict[Source, int] = field(default_factory=lambda: dict.fromkeys(("plain", "drafter", "lookup"), 0))
    _num_reached: list[int] = field(default_factory=list)  # by position: steps whose drafts stood up to there

    def count_prefill(self, num_tokens: int, reuse: Reuse) -> None:
        """Counts the prefill of a prompt of `num_tokens`."""
        self.num_prefilled_tokens += num_tokens - reuse.num_tokens
        self.num_reused_tokens += reuse.num_tokens
        self.num_recomputed_tokens += reuse.num_common - reuse.num_tokens

    def count(self, num_drafted: int, num_accepted: int, source: Source = "drafter") -> None:
        """Counts one forward of the target behind the prefill."""
        self.num_verify_steps += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_steps[source if num_drafted else "plain"] += 1
        _increment(self.accepted_histogram, num_accepted)
        _increment(self.drafted_histogram, num_drafted)
        for position in range(min(num_accepted + 1, num_drafted)):
            _increment(self._num_reached, position)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 where nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens each verify step yields: 1 + accepted / verify steps."""
        return 1 + self.num_accepted / self.num_verify_steps if self.num_verify_steps else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """At each position, of the drafts before which all stood, the share that stood too."""
        return [sum(self.accepted_histogram[place + 1 :]) / num for place, num in enumerate(self._num_reached)]


class LastingDrafter:
    """A drafter of one generation: what fails in it is counted, and once its session has failed it is left out."""

    def __init__(
        self,
        drafter: Drafter | None,
        params: SamplingParams,
        rng: np.random.Generator,
        counts: DraftCounts,
        cancelled: Callable[[], bool],
    ) -> None:
        self._drafter = drafter
        self._params = params
        self._rng = rng
        self._counts = counts
        self._cancelled = cancelled

    @property
    def is_there(self) -> bool:
        """Whether there is one that has not failed."""
        return self._drafter is not None

    def draft(self, last_token_id: int, hidden: Float32, num_draft_tokens: int) -> list[Draft]:
        """At most `num_draft_tokens` drafts; none where there is no drafter or it fails."""
        if self._drafter is None or num_draft_tokens == 0:
            return []
        try:
            drafts = self._drafter.draft(last_token_id, hidden, num_draft_tokens, self._params, self._rng)
        except InferenceError:
            if not self._cancelled():  # a terminated run fails
                self._counts.num_drafter_faults += 1
                self._drafter = None
            return []
        self._counts.num_drafter_faults += len(drafts) < num_draft_tokens
        return drafts


class FixedDrafting:
    """As many tokens of the drafter as were asked for, in every round."""

    def __init__(self, drafter: LastingDrafter, num_draft_tokens: int) -> None:
        self._drafter = drafter
        self._num_draft_tokens = num_draft_tokens

    def begin(self, token_ids: Sequence[int]) -> None:
        """As `Drafting`."""

    def propose(self, last_token_id: int, hidden: Float32, num_room: int) -> list[Draft]:
        """As `Drafting`."""
        return self._drafter.draft(last_token_id, hidden, min(self._num_draft_tokens, num_room))

    def observe(self, block: Sequence[int], num_accepted: int) -> Source:
        """As `Drafting`."""
        return "drafter"


class AdaptiveDrafting:
    """What pays best by this device's costs and by what stood so far: a burst of the drafter, a lookup or nothing."""

    def __init__(
        self,
        drafter: LastingDrafter,
        num_draft_tokens: int,
        costs: StepCosts,
        params: SamplingParams,
    ) -> None:
        self._drafter = drafter
        self._params = params
        self._can_draft = costs.draft_seconds is not None
        self._limit = num_draft_tokens
        self._policy = DraftPolicy(costs, num_draft_tokens, NUM_PLACES)
        self._lookup = PromptLookup()
        self._choice = PLAIN

    def begin(self, token_ids: Sequence[int]) -> None:
        """As `Drafting`; what stood so far still counts, as the text is of the same kind."""
        self._lookup = PromptLookup(token_ids)

    def propose(self, last_token_id: int, hidden: Float32, num_room: int) -> list[Draft]:
        """As `Drafting`; `last_token_id` is the one that the last `observe` ended with."""
        most = min(self._limit, num_room)
        match = self._lookup.find(most)
        offers: dict[Source, Offer] = {"lookup": Offer(len(match.token_ids), match.first_place)}
        if self._can_draft and self._drafter.is_there:
            offers["drafter"] = Offer(most)
        self._choice = self._policy.choose(offers)
        if self._choice.source == "drafter":
            return self._drafter.draft(last_token_id, hidden, self._choice.num_drafts)
        return [self._certain(token_id) for token_id in match.token_ids[: self._choice.num_drafts]]

    def observe(self, block: Sequence[int], num_accepted: int) -> Source:
        """As `Drafting`."""
        self._policy.observe(self._choice, num_accepted)
        self._lookup.extend(block)
        return self._choice.source

    def _certain(self, token_id: int) -> Draft:
        """A draft with all probability: the usual verification accepts it as often as the target would draw it."""
        if self._params.is_greedy:
            return Draft(token_id, None)
        return Draft(token_id, Distribution(np.array([token_id], np.int64), np.ones(1)))


def _increment(counts: list[int], place: int) -> None:
    counts += [0] * (place + 1 - len(counts))
    counts[place] += 1
