"""Layers one by one compute what transformers' whole model computes."""

import numpy as np
import pytest
import torch
from transformers import Gemma4ForCausalLM

from export.calibration import Calibration
from export.expected import decoder_matrices
from export.layerwise import LayerwiseTarget, windows_of
from export.pipeline import open_source
from export.reference import record_of, reference_hidden


@pytest.fixture
def target(tiny_checkpoint):
    source = open_source(tiny_checkpoint("wide").target, None)
    return LayerwiseTarget(source.target, source.prefix, source.model)


@pytest.fixture
def token_ids():
    return torch.from_numpy(np.random.default_rng(0).integers(3, 400, size=(2, 96)))


@pytest.fixture
def expected(tiny_checkpoint, token_ids):
    model = Gemma4ForCausalLM.from_pretrained(tiny_checkpoint("wide").target, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids).logits


def test_logits_are_those_of_the_whole_model(target, token_ids, expected):
    hidden = reference_hidden(target, token_ids, None, lambda _: None)
    found = target.logits(hidden.flatten(0, 1)).reshape(expected.shape)
    # both in float32 with sums in another order, on an ill-conditioned random net
    assert (found - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())


def test_an_interrupted_reference_goes_on(target, token_ids, tmp_path):
    record = tmp_path / "record.npz"

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_hidden(target, token_ids, record, interrupt)
    steps = []
    resumed = reference_hidden(target, token_ids, record, steps.append)
    assert steps[0] == 1
    assert sum(steps) == len(target.model.layers)
    torch.testing.assert_close(resumed, reference_hidden(target, token_ids, None, steps.append), rtol=0, atol=0)
    record.write_bytes(record.read_bytes()[:100])
    torch.testing.assert_close(reference_hidden(target, token_ids, record, steps.append), resumed, rtol=0, atol=0)


def test_another_text_has_another_record(tiny_checkpoint, token_ids, tmp_path):
    checkpoint = open_source(tiny_checkpoint("wide").target, None).target
    assert record_of(tmp_path, checkpoint, token_ids) != record_of(tmp_path, checkpoint, token_ids + 1)


def test_moments_are_those_of_the_inputs(target, token_ids):
    calibration = Calibration(target, token_ids)
    names = [shape.name for shape in decoder_matrices(target.model)]
    assert all(calibration.has(name) for name in names)
    assert not calibration.has("token_table")
    embeds = target.start(token_ids).embeds.flatten(0, 1)
    torch.testing.assert_close(calibration.moment(names[0]), embeds.T @ embeds / len(embeds))
    for shape in decoder_matrices(target.model):
        squares = calibration.mean_squares(shape.name)
        moment = calibration.moment(shape.name)
        assert moment.shape == (shape.width, shape.width)
        np.testing.assert_allclose(squares, moment.diagonal(), rtol=1e-6)


def test_windows_begin_with_bos():
    assert list(windows_of([5, 6, 7, 8], 2, 3)) == [[2, 5, 6], [2, 7, 8]]
    assert list(windows_of([5], 2, 3)) == [[2, 5]]
