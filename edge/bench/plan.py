"""What a run measures and how often."""

from dataclasses import dataclass

VERIFY_SIZES = tuple(range(1, 9))
ROOM_TOKENS = 32  # of context behind what is measured: for a forward and its drafts


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in tokens. A pass takes each figure once or more; figures are medians over all passes."""

    prompts: tuple[int, ...] = (128, 512, 2048)
    decode_contexts: tuple[int, ...] = (128, 2048, 8192)
    verify_contexts: tuple[int, ...] = (128, 2048)
    first_token_prompts: tuple[int, ...] = (512,)
    memory_context: int = 2048
    memory_tokens: int = 32
    drafting_context: int = 128
    drafter_steps: int = 4
    num_passes: int = 5
    num_repeats: int = 3
    num_loads: int = 3
    outside_tokens: int = 16
    fixed_drafts: int = 3
    assumed_tokens: int = 96
    stream_bytes: int = 1 << 30
    acceptances: tuple[float, ...] = ()
    prompt_texts: tuple[str, ...] = ()
    text_tokens: int = 96

    @property
    def longest(self) -> int:
        """Tokens that the largest measurement puts into the context before it generates."""
        return max((*self.contexts, *self.prompts, *self.first_token_prompts, self.drafting_context))

    @property
    def contexts(self) -> tuple[int, ...]:
        """All contexts at which single forwards are timed."""
        return tuple(sorted({*self.decode_contexts, *self.verify_contexts}))


def quick() -> Plan:
    """Every figure, from as few samples as give a median."""
    return Plan(
        num_passes=2,
        num_repeats=1,
        num_loads=1,
        memory_tokens=8,
        outside_tokens=8,
        assumed_tokens=16,
        stream_bytes=1 << 28,
        text_tokens=32,
    )
