"""The export: a checkpoint and its drafter become an artifact folder, all of it or nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.decoder_graph import DecoderGraph
from export.drafter_graph import DrafterGraph
from export.errors import CheckpointError
from export.graph import DataFile, Graph
from export.hf_config import drafter_config, model_config
from export.layers import LayerEmitter
from export.linear import Matrix, PortableProduct, Progress, TensorRows
from export.staging import staged_folder
from export.tables import StoredTable, embedding_multiplier, write_embed_graph, write_table
from quant.recipe import Recipe
from runtime.manifest import FORMAT_VERSION, MANIFEST, Manifest, file_entry
from runtime.model_config import DrafterConfig, ModelConfig

PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")
GENERATION_DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: the target, its drafter if there is one, and where their tensors' names begin."""

    target: Checkpoint
    model: ModelConfig
    prefix: str
    drafter: Checkpoint | None
    drafter_config: DrafterConfig | None

    def num_weights(self) -> int:
        """Weights that will be stored, for the progress bar."""
        names = [name for name in self.target.names() if name.startswith(self.prefix) and not self._is_unused(name)]
        total = sum(self.target.num_elements(name) for name in names)
        if self.drafter:
            total += sum(self.drafter.num_elements(name) for name in self.drafter.names())
        return total

    def _is_unused(self, name: str) -> bool:
        """k and v projections that checkpoints ship for layers which share KV."""
        parts = name.removeprefix(self.prefix).split(".")
        if parts[0] != "layers" or len(parts) < 4 or not parts[1].isdigit():
            return False
        index = int(parts[1])
        return index >= self.model.num_owned_layers and parts[3] in ("k_proj", "v_proj", "k_norm", "v_norm")


def open_source(target: Path, drafter: Path | None) -> Source:
    """Opens and checks a target and its drafter; CheckpointError names what does not fit."""
    checkpoint = Checkpoint(target)
    model = model_config(checkpoint.config, str(target / "config.json"))
    prefix = _tensor_prefix(checkpoint)
    if drafter is None:
        return Source(checkpoint, model, prefix, None, None)
    drafter_checkpoint = Checkpoint(drafter)
    config = drafter_config(drafter_checkpoint.config, model, str(drafter / "config.json"))
    _check_same_tokenizer(target, drafter)
    return Source(checkpoint, model, prefix, drafter_checkpoint, config)


def export_artifact(source: Source, destination: Path, recipe: Recipe, *, show_progress: bool = True) -> Manifest:
    """Writes the artifact folder `destination` and returns its manifest.

    Everything is written to a temporary sibling and renamed into place, so `destination` is complete or absent.

    Raises:
        CheckpointError: the source does not hold what its configuration says.
        ExportError: the destination cannot be used.
    """
    folders = [source.target.folder] + ([source.drafter.folder] if source.drafter else [])
    with staged_folder(destination, sources=folders) as folder, _progress(source, show_progress) as progress:
        token_table = _write_token_table(source, folder, recipe, progress)
        ple_table = _write_ple_table(source, folder, recipe, progress)
        write_embed_graph(folder / "embed.onnx", token_table, ple_table)
        _write_decoder(source, folder, recipe, token_table, progress)
        if source.drafter and source.drafter_config:
            _write_drafter(source.drafter, source.drafter_config, folder, recipe, progress)
        generation = _generation_config(source)
        _copy_text_files(source.target, folder)
        manifest = _manifest(source, folder, recipe, token_table, ple_table, generation)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


@contextmanager
def _progress(source: Source, show: bool) -> Iterator[Progress]:
    total = source.num_weights()
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="export", disable=not show) as bar:

        def advance(num_weights: int) -> None:
            bar.update(num_weights)

        yield advance


def _write_token_table(source: Source, folder: Path, recipe: Recipe, progress: Progress) -> StoredTable:
    model = source.model
    rows = (TensorRows(f"{source.prefix}embed_tokens.weight", 0, model.vocab_size),)
    matrix = Matrix("token_table", source.target, rows, model.hidden_size)
    multiplier = embedding_multiplier(model.hidden_size)
    # MatMulNBits, which reads the same scales for the logits, takes float32 only
    return write_table(folder / "token_table.bin", matrix, recipe.token_table, np.float32, multiplier, progress)


def _write_ple_table(source: Source, folder: Path, recipe: Recipe, progress: Progress) -> StoredTable:
    model = source.model
    rows = (TensorRows(f"{source.prefix}embed_tokens_per_layer.weight", 0, model.vocab_size),)
    matrix = Matrix("ple_table", source.target, rows, len(model.layers) * model.ple_size)
    multiplier = embedding_multiplier(model.ple_size)
    return write_table(folder / "ple_table.bin", matrix, recipe.ple_table, np.float16, multiplier, progress)


def _write_decoder(source: Source, folder: Path, recipe: Recipe, token_table: StoredTable, progress: Progress) -> None:
    with DataFile(folder / "decoder.onnx.data") as data:
        graph = Graph("decoder", data)
        product = PortableProduct(recipe.activations)
        emitter = LayerEmitter(graph, source.target, source.prefix, source.model, product, recipe.matrices, progress)
        DecoderGraph(emitter, source.model, recipe.ple_projections).emit(token_table.stored)
    graph.save(folder / "decoder.onnx")


def _write_drafter(
    checkpoint: Checkpoint, config: DrafterConfig, folder: Path, recipe: Recipe, progress: Progress
) -> None:
    with DataFile(folder / "drafter.onnx.data") as data:
        graph = Graph("drafter", data)
        product = PortableProduct(recipe.activations)
        emitter = LayerEmitter(graph, checkpoint, "model.", config, product, recipe.drafter, progress)
        DrafterGraph(emitter, config).emit()
    graph.save(folder / "drafter.onnx")


def _generation_config(source: Source) -> dict[str, Any]:
    """Sampling defaults and every end-of-sequence id, from generation_config.json over config.json."""
    given = source.target.optional_json("generation_config.json")
    values = {name: given.get(name, default) for name, default in GENERATION_DEFAULTS.items()}
    eos = given.get("eos_token_id", list(source.model.eos_token_ids))
    eos = [eos] if isinstance(eos, int) else eos
    return {
        "temperature": float(values["temperature"]) if values["do_sample"] else 0.0,
        "top_k": int(values["top_k"] or 0),
        "top_p": float(values["top_p"]),
        "eos_token_ids": sorted(set(eos)),
    }


def _copy_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{checkpoint.folder}: tokenizer.json is missing; save the tokenizer beside the weights")
    for name in ("tokenizer.json", "generation_config.json"):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if template := _chat_template(checkpoint):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _chat_template(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's own template: a file of its own, or inside tokenizer_config.json as older ones have it."""
    file = checkpoint.folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = checkpoint.optional_json("tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _manifest(
    source: Source, folder: Path, recipe: Recipe, token_table: StoredTable, ple_table: StoredTable, generation: Any
) -> Manifest:
    sources = {f"target/{name}": digest for name, digest in source.target.digests().items()}
    if source.drafter:
        sources |= {f"drafter/{name}": digest for name, digest in source.drafter.digests().items()}
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    return Manifest(
        format_version=FORMAT_VERSION,
        producer=f"gemma-edge {version('gemma-edge')}",
        model=source.model,
        drafter=source.drafter_config,
        token_table=token_table.spec,
        ple_table=ple_table.spec,
        recipe=recipe.to_json(),
        sources=sources,
        generation=generation,
        files={name: file_entry(folder / name) for name in names},
    )


def _tensor_prefix(checkpoint: Checkpoint) -> str:
    """What leads the text model's tensor names: multimodal checkpoints nest it deeper."""
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in checkpoint:
            return prefix
    raise CheckpointError(f"{checkpoint.folder}: no tensor embed_tokens.weight; not a Gemma 4 text or multimodal model")


def _check_same_tokenizer(target: Path, drafter: Path) -> None:
    """A drafter that ships a tokenizer must ship the target's."""
    mine, theirs = target / "tokenizer.json", drafter / "tokenizer.json"
    if not (mine.is_file() and theirs.is_file()):
        return
    if json.loads(mine.read_bytes())["model"] != json.loads(theirs.read_bytes())["model"]:
        raise CheckpointError(f"{theirs}: differs from {mine}; pass the assistant that belongs to this model")
