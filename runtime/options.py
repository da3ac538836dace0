"""Options of a generation, the same for prompts, chats and conversations: their defaults and their ranges."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from profiles import MAX_DRAFT_TOKENS, DeviceProfile
from runtime.errors import RequestError
from runtime.grammar import Grammar
from runtime.sampling import SamplingParams
from runtime.turns import ContextPolicy


class OptionArguments(TypedDict, total=False):
    """Keyword arguments of everything that generates; `GenerationOptions` says what each means."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]
    num_draft_tokens: int | None
    context_policy: ContextPolicy
    thinking_budget: int | None
    grammar: Grammar | None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a text is generated.

    Args:
        max_tokens: tokens to generate at most, thoughts included; None for as many as the context holds
        temperature: 0 is greedy; None, here and for `top_p` and `top_k`, is the checkpoint's own value
        top_p: probability that the likeliest tokens which are drawn from must sum to
        top_k: how many of the likeliest tokens are drawn from; 0 for all
        seed: makes sampling repeatable where `num_draft_tokens` is given too
        stop: strings that end the text in front of them
        num_draft_tokens: so many drafts of the drafter in every round, 0 for none; None for as many, of the drafter or
            of what the text repeats, as pay by what stood so far, up to the profile's number
        context_policy: what happens where the context is full. "stop": the generation ends. "slide": the oldest
            turns of a chat are dropped, and what remains is prefilled again, so that the text goes on as that of
            the shortened conversation. The system's turn stays, and all from the last user turn on. So many turns
            go that there is room for `max_tokens` or a quarter of the context, whichever is less, or else as much
            as there can be; the same for a prompt that leaves less room than that. Where nothing more can be
            dropped, as in plain text, the generation ends. In a chat turns go by quarters of the context, so that the
            next turns find what is kept of them in the KV cache.
        thinking_budget: tokens of thoughts, all together, behind which the answer must begin; None for any number
        grammar: what the text, behind the thoughts, must match: see `json_schema`, `regex`, `choice`, `lark`
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    num_draft_tokens: int | None = None
    context_policy: ContextPolicy = "stop"
    thinking_budget: int | None = None
    grammar: Grammar | None = None

    def check(self) -> None:
        """Raises RequestError where a value is out of its range; those that need the model are checked with it."""
        _check_count("max_tokens", self.max_tokens, least=1)
        _check_count("seed", self.seed, least=0)
        _check_count("thinking_budget", self.thinking_budget, least=0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            found = reprlib.repr(self.grammar)
            raise RequestError(f"grammar is {found}, expected one of json_schema, regex, choice or lark")

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """How tokens are drawn; raises RequestError where that is out of range."""
        params = SamplingParams(
            defaults["temperature"] if self.temperature is None else self.temperature,
            defaults["top_k"] if self.top_k is None else self.top_k,
            defaults["top_p"] if self.top_p is None else self.top_p,
        )
        params.check()
        return params

    def draft_limit(self, profile: DeviceProfile) -> int:
        """The most drafts of a round; raises RequestError where the profile grants none."""
        num_drafts = self.num_draft_tokens
        if num_drafts is None:
            return profile.num_draft_tokens
        if type(num_drafts) is not int or not 0 <= num_drafts <= MAX_DRAFT_TOKENS:
            found = reprlib.repr(num_drafts)
            raise RequestError(f"num_draft_tokens is {found}, expected an integer 0-{MAX_DRAFT_TOKENS}")
        if num_drafts and not profile.num_draft_tokens:
            raise RequestError(
                f"num_draft_tokens is {num_drafts}, profile {profile.name} grants 0, so no drafter was loaded; load "
                "with a profile that grants more"
            )
        return num_drafts


def _check_count(name: str, value: int | None, *, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise RequestError(f"{name} is {reprlib.repr(value)}, expected an integer >= {least}")
