"""The export: a checkpoint and its drafter become an artifact folder, all of it or nothing."""

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
from export.errors import CheckpointError, ExportError
from export.graph import DataFile, Graph
from export.hf_config import drafter_config, generation_defaults, model_config
from export.layers import LayerEmitter
from export.linear import Matrix, PortableProduct, Progress, TensorRows
from export.stack import StackWeights
from export.staging import staged_folder
from export.tables import StoredTable, embedding_multiplier, write_embed_graph, write_table
from export.text_files import GENERATION_CONFIG, check_same_tokenizer, check_text_files, copy_text_files
from quant.recipe import Recipe
from runtime.manifest import FORMAT_VERSION, MANIFEST, Manifest, file_entry
from runtime.model_config import DrafterConfig, ModelConfig

PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: the target, its sampling defaults, its drafter if there is one. `prefix` leads tensor names."""

    target: Checkpoint
    model: ModelConfig
    prefix: str
    generation: dict[str, Any]
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
    given = checkpoint.optional_json(GENERATION_CONFIG)
    generation = generation_defaults(given, model, str(target / GENERATION_CONFIG))
    check_text_files(checkpoint, model)
    if drafter is None:
        return Source(checkpoint, model, prefix, generation, None, None)
    drafter_checkpoint = Checkpoint(drafter)
    config = drafter_config(drafter_checkpoint.config, model, str(drafter / "config.json"))
    check_same_tokenizer(checkpoint, drafter_checkpoint)
    return Source(checkpoint, model, prefix, generation, drafter_checkpoint, config)


def export_artifact(source: Source, destination: Path, recipe: Recipe, *, show_progress: bool = True) -> Manifest:
    """Writes the artifact folder `destination` and returns its manifest.

    Everything is written to a temporary sibling and renamed into place, so `destination` is complete or absent.

    Raises:
        CheckpointError: the source does not hold what its configuration says.
        ExportError: the destination cannot be used, or the disk is full.
    """
    folders = [source.target.folder] + ([source.drafter.folder] if source.drafter else [])
    try:
        with staged_folder(destination, sources=folders) as folder, _progress(source, show_progress) as progress:
            return _write(source, folder, recipe, progress)
    except OSError as error:
        reason = f"{error.filename or destination}: {error.strerror or error}"
        raise ExportError(f"{reason}; the export was given up, mend that and export again") from error


def _write(source: Source, folder: Path, recipe: Recipe, progress: Progress) -> Manifest:
    token_table = _write_token_table(source, folder, recipe, progress)
    ple_table = _write_ple_table(source, folder, recipe, progress)
    write_embed_graph(folder / "embed.onnx", token_table, ple_table)
    _write_decoder(source, folder, recipe, token_table, progress)
    if source.drafter and source.drafter_config:
        _write_drafter(source.drafter, source.drafter_config, folder, recipe, progress)
    copy_text_files(source.target, folder)
    manifest = _manifest(source, folder, recipe, token_table, ple_table)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


@contextmanager
def _progress(source: Source, show: bool) -> Iterator[Progress]:
    total = source.num_weights()
    # None: off where standard error is no terminal
    disable = None if show else True
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="export", disable=disable) as bar:

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
        weights = StackWeights(source.target, source.prefix, source.model, recipe.matrices, data, progress)
        emitter = LayerEmitter(graph, weights, product)
        DecoderGraph(emitter, source.model, recipe.ple_projections).emit(token_table.stored)
    graph.save(folder / "decoder.onnx")


def _write_drafter(
    checkpoint: Checkpoint, config: DrafterConfig, folder: Path, recipe: Recipe, progress: Progress
) -> None:
    with DataFile(folder / "drafter.onnx.data") as data:
        graph = Graph("drafter", data)
        product = PortableProduct(recipe.activations)
        weights = StackWeights(checkpoint, "model.", config, recipe.drafter, data, progress)
        emitter = LayerEmitter(graph, weights, product)
        DrafterGraph(emitter, config).emit()
    graph.save(folder / "drafter.onnx")


def _manifest(
    source: Source, folder: Path, recipe: Recipe, token_table: StoredTable, ple_table: StoredTable
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
        generation=source.generation,
        files={name: file_entry(folder / name) for name in names},
    )


def _tensor_prefix(checkpoint: Checkpoint) -> str:
    """What leads the text model's tensor names: multimodal checkpoints nest it deeper."""
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in checkpoint:
            return prefix
    raise CheckpointError(f"{checkpoint.folder}: no tensor embed_tokens.weight; not a Gemma 4 text or multimodal model")
