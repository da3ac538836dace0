"""Whole folders of checkpoints that are stored quantized: exported, loaded, and computing what transformers computes.

A recipe whose format holds the stored codes takes them over, and the artifact then has the weights that the library
dequantizes to.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma4ForCausalLM

from edge import Runtime
from edge.bench.opened import OpenedArtifact
from export.pipeline import export_artifact, open_source
from profiles import DeviceProfile
from quant.blockwise import BlockFormat, dequantize, quantize_rows
from quant.recipe import Recipe, read_recipe
from quant.scale_search import search_rows
from tests.checkpoints import SHAPES, make_target, make_tokenizer
from tests.quantized_files import BNB, Float32, Tensors, library_values, save_bnb, save_packed

RECIPES = {"nf4": "nf4", "nf4-nested": "nf4", "int8": "int8", "packed": "int4"}
PROMPT = [2, 17, 300, 301, 5, 77, 130, 444, 9, 12, 13, 14, 200, 201, 202, 203, 3, 4, 8, 11, 100, 101]
MATRICES = {"embed_tokens": "token_table", "embed_tokens_per_layer": "ple_table"}

pytestmark = pytest.mark.parametrize("kind", RECIPES)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """stored(kind): a checkpoint's folder."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "target"
        save_packed(folder) if kind == "packed" else save_bnb(folder, BNB[kind])
        make_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    return make


def rounded(weights: Float32, recipe: Recipe, name: str) -> Float32:
    """What is not stored quantized becomes what the recipe says."""
    part = name.removeprefix("model.").removesuffix(".weight")
    if part == "per_layer_model_projection":
        part += ".0"
    choice = recipe.choose(MATRICES.get(part, part))
    form = BlockFormat(weights.shape[1], choice.form.bits, choice.form.block_size)
    quantize = quantize_rows if choice.method == "nearest" else search_rows
    return dequantize(quantize(weights, form), form)


def unquantized() -> Gemma4ForCausalLM:
    """The model that is stored: its weights in bfloat16, its frequencies not."""
    model = make_target(SHAPES["wide"])
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    return model


@torch.no_grad()
def reference(tensors: Tensors, recipe: Recipe) -> Gemma4ForCausalLM:
    """Transformers' model of the weights that the artifact is to have."""
    model = unquantized()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            found = library_values(tensors, name)
            is_nf4 = recipe.name == "nf4" and "per_layer" in name
            if found is None or is_nf4:  # the recipe has 8 bits for what the checkpoint has as NF4
                found = rounded(weight.numpy() if found is None else found, recipe, name)
            weight.copy_(torch.from_numpy(found))
    return model


def test_stored_codes_are_taken_over(
    kind: str, stored: Callable[[str], Path], tmp_path: Path, one_thread: DeviceProfile
) -> None:
    recipe = read_recipe(RECIPES[kind])
    manifest = export_artifact(open_source(stored(kind), None), tmp_path / "out", recipe, show_progress=False)
    assert manifest.layout == ("portable" if recipe.name == "nf4" else "native")
    others = ("token_table", "ple_table") if kind == "int8" else ("token_table", "ple_table", "per_layer")
    for name, entry in manifest.recipe["tensors"].items():
        is_taken_over = not any(other in name for other in others)
        assert (entry["method"] == "taken over") is is_taken_over, name
        assert (entry["relative_error"] == 0) is is_taken_over, name
    with Runtime.load(tmp_path / "out", profile=one_thread) as runtime:
        assert len(runtime.generate(PROMPT, max_tokens=8, temperature=0).token_ids) == 8


def test_logits_are_those_of_the_dequantized_weights(
    kind: str, stored: Callable[[str], Path], tmp_path: Path, one_thread: DeviceProfile
) -> None:
    recipe = replace(read_recipe(RECIPES[kind]), activations="float32")
    export_artifact(open_source(stored(kind), None), tmp_path / "out", recipe, show_progress=False)
    with Runtime.load(tmp_path / "out", profile=one_thread) as runtime:
        found = OpenedArtifact(runtime).target.forward(PROMPT, num_kept=len(PROMPT)).logits.copy()
    prompt = torch.tensor([PROMPT])
    expected = reference(load_file(stored(kind) / "model.safetensors"), recipe)(prompt).logits[0].detach().numpy()
    before = unquantized()(prompt).logits[0].detach().numpy()
    # as in test_quantized_parity
    assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)
    assert np.abs(found - before).max() > 1e-2 * np.ptp(expected), "quantization must be visible for this to mean much"
