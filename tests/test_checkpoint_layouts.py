"""The same weights in another layout of the checkpoint make the same artifact, byte for byte."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.pipeline import export_artifact, open_source
from quant.recipe import make_recipe
from tests.checkpoints import TinyCheckpoint

BITS = 4
SAME_FILES = ("decoder.onnx", "decoder.onnx.data", "token_table.bin", "ple_table.bin", "embed.onnx")


def assert_same_artifact(checkpoint: Path, artifact: Path) -> None:
    made = checkpoint.parent / "made"
    source = open_source(checkpoint, None)
    export_artifact(source, made, make_recipe(BITS), layout="portable", show_progress=False)
    for name in SAME_FILES:
        assert (made / name).read_bytes() == (artifact / name).read_bytes(), name


def copy_text_files(source: Path, folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shape", ["wide", "narrow", "one_shared"])
def test_config_before_per_layer_config(
    shape: str, tiny_checkpoint: Callable[[str], TinyCheckpoint], tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(shape).target
    config = json.loads((source / "config.json").read_text())
    assert {layer["head_dim"] for layer in config.pop("per_layer_config").values()} == {32}
    copy_text_files(source, tmp_path / "old", config | {"global_head_dim": 32, "num_global_key_value_heads": None})
    shutil.copyfile(source / "model.safetensors", tmp_path / "old" / "model.safetensors")
    assert_same_artifact(tmp_path / "old", tiny_artifact(shape, BITS))


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_multimodal_checkpoint(
    shape: str, tiny_checkpoint: Callable[[str], TinyCheckpoint], tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(shape).target
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "gemma4", "text_config": text, "vision_config": {"model_type": "gemma4_vision"}}
    copy_text_files(source, tmp_path / "multimodal", config)
    tensors = load_file(source / "model.safetensors")
    save_in_two_shards(tmp_path / "multimodal", as_multimodal(tensors, first_shared=text["num_hidden_layers"] // 2))
    assert_same_artifact(tmp_path / "multimodal", tiny_artifact(shape, BITS))


def as_multimodal(tensors: dict[str, torch.Tensor], first_shared: int) -> dict[str, torch.Tensor]:
    """Nested names, the tensors of other modalities, and the k and v projections that shared layers never use."""
    nested = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    nested["model.vision_tower.patch_embedder.input_proj.weight"] = torch.full((8, 12), float("nan"))
    nested["model.embed_vision.embedding_projection.weight"] = torch.ones(8, 8)
    for part in ("k_proj", "v_proj", "k_norm"):
        owned, unused = (f"model.language_model.layers.{i}.self_attn.{part}.weight" for i in (0, first_shared))
        assert unused not in nested
        nested[unused] = torch.full_like(nested[owned], torch.nan)
    return nested


def save_in_two_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names, weight_map = sorted(tensors), {}
    for index, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{index:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
