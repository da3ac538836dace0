from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from export.demo import train_drafter
from export.demo.continuations import ROW_TOKENS, continuations
from export.demo.train_target import target_config

WINDOW = 4


@pytest.fixture(scope="module")
def pair() -> tuple[Gemma4ForCausalLM, Gemma4AssistantForCausalLM]:
    torch.manual_seed(0)
    config = target_config()
    config.sliding_window = WINDOW
    target = Gemma4ForCausalLM(config).float().eval()
    return target, train_drafter.initial_drafter(target, seed=0).eval()


def stream(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 2048, num_tokens)


def test_the_token_ordering_holds_every_token_once(pair: Any) -> None:
    ordering = pair[1].masked_embedding.token_ordering
    assert ordering.sort().values.tolist() == list(range(2048))


def test_input_and_output_tables_of_the_drafter_are_one(pair: Any) -> None:
    drafter = pair[1]
    assert drafter.lm_head.weight.data_ptr() == drafter.model.embed_tokens.weight.data_ptr()


def test_masks_show_only_rows_before_the_position() -> None:
    masks = train_drafter.draft_masks(num_positions=9, num_rows=12, sliding_window=WINDOW)
    for position in range(1, 10):
        full = (masks["full_attention"][0, 0, position - 1] == 0).nonzero().flatten().tolist()
        sliding = (masks["sliding_attention"][0, 0, position - 1] == 0).nonzero().flatten().tolist()
        assert full == list(range(position))
        assert sliding == full[-(WINDOW + 1) :]


@pytest.mark.parametrize("num_prompt_tokens", [3, 11])
def test_training_feeds_what_generation_feeds(pair: Any, num_prompt_tokens: int) -> None:
    """The states that transformers' generation computes in its first burst are those of `unroll` at that position."""
    target, drafter = pair
    seen: list[Tensor] = []
    hook = drafter.model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.last_hidden_state))
    drafter.generation_config.num_assistant_tokens = 3
    drafted: list[Tensor] = []
    heads = drafter.register_forward_hook(lambda _, __, outputs: drafted.append(outputs.logits.argmax(-1)))
    prompt = torch.from_numpy(stream(num_prompt_tokens))[None]
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=drafter,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    hook.remove()
    heads.remove()

    first = output[:, : num_prompt_tokens + 1]
    rows = torch.cat([first, *drafted[:3]], dim=1)
    reading = train_drafter.read_target(target, rows)
    with torch.no_grad():
        states = [hidden[:, num_prompt_tokens - 1] for hidden in train_drafter.unroll(drafter, reading, 3)]
    for step in range(3):
        # float32 sums in another order, through the norms of an untrained model: 5e-5 seen; a row too many gives 3
        torch.testing.assert_close(states[step], seen[step][:, 0], atol=1e-3, rtol=0)


def test_a_row_of_real_text_and_own_text_begins_with_bos() -> None:
    own = torch.full((5, ROW_TOKENS), 7)
    for batch_size, num_tokens in ((8, 256), (2, 1024)):
        rows = train_drafter.mixed_rows(stream(5000), own, batch_size, num_tokens, np.random.default_rng(0))
        assert rows.shape == (batch_size, num_tokens)
        assert (rows[:, 0] == 2).all()
        assert (rows[batch_size // 2 :, 1:] == 7).all()


def test_training_changes_every_weight_and_leaves_the_target_alone(pair: Any) -> None:
    target, _ = pair
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    own = continuations(target, stream(5000), num_rows=2, seed=0)
    trained = train_drafter.train_drafter(target, stream(5000), own, num_steps=2, seed=0)
    fresh = train_drafter.initial_drafter(target, seed=0)
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    for (name, old), new in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(old, new), name
