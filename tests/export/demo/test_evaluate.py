from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from export.demo.evaluate import Acceptance, CountingGenerator, Round, measure_acceptance
from export.demo.train_drafter import initial_drafter
from export.demo.train_target import target_config

PROMPTS = [[2, 300, 400, 500], [2, 600, 700]]


def test_rates_follow_from_the_rounds() -> None:
    found = Acceptance((Round(3, 3, True), Round(3, 1, False), Round(1, 0, False), Round(3, 0, True)))
    assert (found.drafted, found.accepted, found.rate) == (10, 4, 0.4)
    assert found.rate_by_position == (2 / 4, 1 / 3, 1 / 3)
    assert found.mean_acceptance_length == 2.0
    assert found.first_rounds().rate == 0.5


def test_no_round_is_a_rate_of_zero() -> None:
    found = Acceptance(())
    assert (found.rate, found.rate_by_position, found.mean_acceptance_length) == (0.0, (), 1.0)


class Script:
    """Drafts 7, 8, 9 after every text."""

    def __init__(self) -> None:
        self.model_kwargs_overrides: dict[str, Any] = {}
        self.offers = True

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        if not self.offers:
            return input_ids, None
        return torch.cat([input_ids, torch.tensor([[7, 8, 9]])], dim=1), torch.zeros(1, 3, 10)

    def update_candidate_strategy(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("added", "num_accepted"),
    [([7, 8, 9, 1], 3), ([7, 8, 5], 2), ([5], 0), ([7], 1), ([6, 8, 9], 0)],
    ids=["all and a bonus", "two and a correction", "none", "cut at an end of text that was drafted", "wrong first"],
)
def test_accepted_are_the_drafts_at_the_head_of_what_was_added(added: list[int], num_accepted: int) -> None:
    generator = CountingGenerator(Script(), is_lossless=False)
    text = torch.tensor([[1, 2]])
    generator.get_candidates(text)
    generator.update_candidate_strategy(torch.cat([text, torch.tensor([added])], dim=1), torch.zeros(1), 0)
    assert generator.rounds == [Round(3, num_accepted, is_first=True)]


def test_a_step_without_drafts_is_no_round() -> None:
    script = Script()
    script.offers = False
    generator = CountingGenerator(script, is_lossless=False)
    generator.get_candidates(torch.tensor([[1, 2]]))
    generator.update_candidate_strategy(torch.tensor([[1, 2, 3]]), torch.zeros(1), 0)
    assert generator.rounds == []


def test_the_lossless_rule_hides_the_scores_of_the_drafts() -> None:
    assert CountingGenerator(Script(), is_lossless=True).get_candidates(torch.tensor([[1]]))[1] is None


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    torch.manual_seed(0)
    target = Gemma4ForCausalLM(target_config()).float().eval()
    return SimpleNamespace(target=target, drafter=initial_drafter(target, seed=0).eval())


@pytest.mark.parametrize("do_sample", [False, True])
def test_every_drafted_token_is_counted_and_the_target_left_as_it_was(pair: SimpleNamespace, do_sample: bool) -> None:
    offered: list[int] = []
    hook = pair.drafter.register_forward_hook(lambda *_: offered.append(1))
    found = measure_acceptance(pair.target, pair.drafter, PROMPTS, 2, 6, do_sample)
    hook.remove()
    assert found.drafted == len(offered) > 0
    assert sum(r.is_first for r in found.rounds) == len(PROMPTS)
    assert "_get_candidate_generator" not in vars(pair.target)


def test_counted_greedy_generation_is_plain_greedy_generation(pair: SimpleNamespace) -> None:
    """A round that accepts n drafts adds n + 1 tokens: the counts explain the length of the output."""
    pair.target.generation_config.eos_token_id = None
    found = measure_acceptance(pair.target, pair.drafter, PROMPTS[:1], 3, 9, do_sample=False)
    # the prefill yields one token; the last may come from a step without drafts
    assert 1 + sum(r.num_accepted + 1 for r in found.rounds) in (8, 9)
