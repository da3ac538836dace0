"""What transformers computes for a tiny pair, in float32 and in float64, and the tolerance that follows from the two.

The tolerance: both the runtime and the reference compute in float32, and these random nets amplify rounding. float64
stands for the exact result, so what transformers' float32 is off by on the same input is what float32 can be held to;
where that is small, 1e-4 of the values' spread, which is a thousand roundings of the largest.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from tests.checkpoints import TinyCheckpoint

LEAST = 1e-4
EVERY = slice(None)

Float64 = npt.NDArray[np.float64]
SharedKV = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Expected:
    """transformers' array in float32 and in float64, and how far the runtime may be from the former."""

    single: npt.NDArray[np.float32]
    exact: Float64
    tolerance: float

    def check(self, found: npt.NDArray[np.float32], rows: slice | npt.NDArray[np.int64] = EVERY) -> None:
        """Fails where `found` is not the chosen rows of transformers' float32 array within the tolerance."""
        np.testing.assert_allclose(found, self.single[rows], rtol=0, atol=self.tolerance)


@dataclass(frozen=True, slots=True)
class TargetResult:
    """Logits [num_tokens, vocab_size], hidden states behind the final norm, and the KV rows that a drafter reads."""

    logits: torch.Tensor
    hidden: torch.Tensor
    shared_kv: SharedKV


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One step of a burst: logits [vocab_size] (constant off the candidates) and projected state [hidden_size]."""

    logits: torch.Tensor
    state: torch.Tensor


class Pair:
    """A target and its assistant in one precision."""

    def __init__(self, checkpoint: TinyCheckpoint, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.target = Gemma4ForCausalLM.from_pretrained(checkpoint.target, dtype=dtype).eval()
        self.assistant = Gemma4AssistantForCausalLM.from_pretrained(checkpoint.assistant, dtype=dtype).eval()

    def run_target(self, token_ids: Sequence[int]) -> TargetResult:
        """A forward of the whole text."""
        with _computing_in(self.dtype):
            out = self.target(torch.tensor([token_ids]), output_hidden_states=True, return_shared_kv_states=True)
        assert out.logits.dtype == self.dtype
        return TargetResult(out.logits[0], out.hidden_states[-1][0], out.shared_kv_states)

    def run_assistant(self, seen: TargetResult, last_token_id: int, num_steps: int) -> list[DraftStep]:
        """A burst behind `last_token_id`, as `SinglePositionMultiTokenCandidateGenerator` runs it."""
        position = torch.tensor([[len(seen.hidden)]])
        state, token_id, steps = seen.hidden[None, -1:], last_token_id, []
        for _ in range(num_steps):
            with _computing_in(self.dtype):
                row = self.target.get_input_embeddings()(torch.tensor([[token_id]]))
                out = self.assistant(
                    inputs_embeds=torch.cat([row, state], dim=-1),
                    position_ids=position,
                    shared_kv_states=seen.shared_kv,
                )
            steps.append(DraftStep(out.logits[0, 0], out.last_hidden_state[0, 0]))
            state, token_id = out.last_hidden_state, int(out.logits.argmax())
        return steps


class Reference:
    """Expected results of one checkpoint pair."""

    def __init__(self, checkpoint: TinyCheckpoint) -> None:
        self.single = Pair(checkpoint, torch.float32)
        self.double = Pair(checkpoint, torch.float64)
        self._results = cache(self._run)

    def logits(self, token_ids: Sequence[int]) -> Expected:
        """[num_tokens, vocab_size]"""
        return expected(*(result.logits for result in self._results(tuple(token_ids))))

    def hidden(self, token_ids: Sequence[int]) -> Expected:
        """[num_tokens, hidden_size], behind the final norm"""
        return expected(*(result.hidden for result in self._results(tuple(token_ids))))

    def burst(self, token_ids: Sequence[int], last_token_id: int, num_steps: int) -> list[tuple[Expected, Expected]]:
        """(logits, projected state) of each draft step behind `last_token_id`, whose KV is not there yet."""
        single, double = self._results(tuple(token_ids))
        runs = zip(
            self.single.run_assistant(single, last_token_id, num_steps),
            self.double.run_assistant(double, last_token_id, num_steps),
            strict=True,
        )
        return [(expected(one.logits, two.logits), expected(one.state, two.state)) for one, two in runs]

    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """What transformers generates."""
        prompt = torch.tensor([token_ids])
        out = self.single.target.generate(prompt, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1)
        tokens: list[int] = out[0, len(token_ids) :].tolist()
        return tokens

    def _run(self, token_ids: tuple[int, ...]) -> tuple[TargetResult, TargetResult]:
        return self.single.run_target(token_ids), self.double.run_target(token_ids)


def expected(single: torch.Tensor, double: torch.Tensor) -> Expected:
    """transformers' results with their tolerance."""
    exact = double.numpy()
    own_error = np.abs(single.numpy() - exact).max()
    return Expected(single.numpy(), exact, max(own_error, LEAST * np.ptp(exact)))


@contextmanager
def _computing_in(dtype: torch.dtype) -> Iterator[None]:
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(Gemma4RMSNorm, "forward", _norm_without_casts)
        yield


def _norm_without_casts(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`Gemma4RMSNorm.forward` without its casts to float32."""
    normed: torch.Tensor = norm._norm(x)
    return normed * norm.weight if norm.with_scale else normed
