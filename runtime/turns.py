"""What of a conversation may be dropped where the context is full: its oldest turns, found in token ids.

The system's turn and what stands before it always stay, and so does everything from the last user turn on. Turns are
dropped in whole exchanges, a user's turn with all that answers it, so that what follows the system's turn is a user's.
Where a template has no system turn and writes the system's words into the first user turn, they go with it.
Nothing here moves KV rows: what is kept is prefilled again, as the prompt of the shortened conversation would be.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from runtime.chat import ChatTemplate
from runtime.errors import RequestError
from runtime.tokenizer import Tokenizer

ContextPolicy = Literal["stop", "slide"]

FREE_SHARE = 4  # of the context, the part that is made free: prefilling the other three quarters is paid that seldom
ROLE_TOKENS = 16  # a role's name is no longer, even in single characters
SYSTEM_ROLES = ("system", "developer")  # of messages; templates may call both by one name
PROBE = "qzx"  # content that no template writes of itself


@dataclass(frozen=True, slots=True)
class Sliding:
    """Where a prompt may be shortened: its first `num_head` tokens stay, behind them one of `droppable` may go.

    `droppable` holds numbers of tokens, ascending: the oldest exchange, the two oldest, and so on. What goes is counted
    in steps: within one, a prompt that grows turn by turn loses the same turns, and what is cached of it serves again.
    """

    context_tokens: int
    num_head: int
    droppable: tuple[int, ...] = ()
    step_tokens: int = 1

    @property
    def most_droppable(self) -> int:
        """Tokens of all that may be dropped."""
        return self.droppable[-1] if self.droppable else 0

    def num_dropped(self, num_tokens: int, num_left: int) -> int:
        """How many tokens of the prompt go: as few as leave room for a quarter of the context, else all that may.

        Args:
            num_tokens: of the whole prompt and of what was generated so far
            num_left: tokens that are still to be generated; where they are fewer than a quarter, they are the room
        """
        room = min(num_left, max(self.context_tokens // FREE_SHARE, 1))
        missing = num_tokens + room - self.context_tokens
        if missing <= 0:
            return 0
        missing = -(-missing // self.step_tokens) * self.step_tokens
        return next((num for num in self.droppable if num >= missing), self.most_droppable)

    def kept(self, prompt_ids: Sequence[int], num_dropped: int) -> list[int]:
        """The prompt without so many tokens behind its head."""
        return [*prompt_ids[: self.num_head], *prompt_ids[self.num_head + num_dropped :]]


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """How a chat template begins turns: a special token, then the role's name and a line break."""

    start_id: int
    user_role: str
    system_roles: frozenset[str]

    def sliding(self, prompt_ids: Sequence[int], tokenizer: Tokenizer, context_tokens: int) -> Sliding:
        """Where this prompt may be shortened; nowhere where it has no turns or no second user turn."""
        starts = [place for place, token_id in enumerate(prompt_ids) if token_id == self.start_id]
        roles = [_role(tokenizer, prompt_ids[start + 1 : start + 1 + ROLE_TOKENS]) for start in starts]
        num_system = next((num for num, role in enumerate(roles) if role not in self.system_roles), len(roles))
        num_head = [*starts, len(prompt_ids)][num_system]
        users = [start for start, role in zip(starts, roles, strict=True) if role == self.user_role]
        return Sliding(context_tokens, num_head, tuple(start - num_head for start in users if start > num_head))


def turn_format(template: ChatTemplate, tokenizer: Tokenizer) -> TurnFormat | None:
    """Reads off a rendered conversation how turns begin; None where no special token begins a user's."""
    ids = _ids_before_content(template, tokenizer, "user")
    special = [token_id for token_id in ids if not tokenizer.decode([token_id])]  # they alone have no text
    user_role = _role_behind(special[-1], ids, tokenizer) if special else ""
    if not user_role:  # behind BOS, where a template has no turns
        return None
    befores = (_ids_before_content(template, tokenizer, role) for role in SYSTEM_ROLES)
    system_roles = frozenset(_role_behind(special[-1], before, tokenizer) for before in befores)
    # a template that has no system turn refuses one, or writes it into the user's
    return TurnFormat(special[-1], user_role, system_roles - {"", user_role})


def sliding_of(
    policy: ContextPolicy,
    prompt_ids: Sequence[int],
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    context_tokens: int,
    *,
    is_chat: bool = False,
) -> Sliding | None:
    """Where a prompt may be shortened; None where the policy is that it must not be.

    Args:
        is_chat: whether further prompts that begin alike will come: then turns go a quarter of the context at a time

    Raises:
        RequestError: there is no such policy.
    """
    if not isinstance(policy, str) or policy not in get_args(ContextPolicy):
        raise RequestError(f'context_policy is {reprlib.repr(policy)}, expected "stop" or "slide"')
    if policy == "stop":
        return None
    turns = turn_format(template, tokenizer) if template is not None else None
    if turns is None:
        return Sliding(context_tokens, len(prompt_ids))
    step_tokens = max(context_tokens // FREE_SHARE, 1) if is_chat else 1
    return replace(turns.sliding(prompt_ids, tokenizer, context_tokens), step_tokens=step_tokens)


def room_in_context(num_prompt_tokens: int, context_tokens: int, sliding: Sliding | None) -> int:
    """Tokens that can be generated until the context is full and nothing may be dropped from it any more.

    Raises:
        RequestError: there is no room for one.
    """
    least = num_prompt_tokens - (sliding.most_droppable if sliding else 0)
    if least < context_tokens:
        return context_tokens - least
    found = f"the prompt has {num_prompt_tokens:,} tokens"
    needed = f"the context holds {context_tokens:,} and needs room for one more"
    if sliding is None:
        raise RequestError(
            f"{found}, {needed}; shorten the prompt or load with a larger context or memory budget, or, in a chat, "
            'drop its oldest turns with context_policy="slide"'
        )
    raise RequestError(
        f"{found}, {least:,} of them outside the turns that may be dropped, {needed}; shorten the system's or the last "
        "user's turn or load with a larger context or memory budget"
    )


def _ids_before_content(template: ChatTemplate, tokenizer: Tokenizer, role: str) -> list[int]:
    """What a conversation that begins with a role's turn holds before that turn's content; [] where it is refused."""
    messages = [{"role": role, "content": PROBE}, {"role": "user", "content": ""}]
    try:
        text = template.render(messages[:1] if role == "user" else messages)
    except RequestError:
        return []
    return tokenizer.encode(text.partition(PROBE)[0], add_bos=False)


def _role_behind(start_id: int, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The role that the last turn begins with; "" where there is no turn."""
    starts = [place for place, token_id in enumerate(token_ids) if token_id == start_id]
    return _role(tokenizer, token_ids[starts[-1] + 1 :]) if starts else ""


def _role(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The first line of a turn."""
    return tokenizer.decode(token_ids).partition("\n")[0].strip()
