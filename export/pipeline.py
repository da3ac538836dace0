"""The export: a checkpoint and its drafter become an artifact folder, all of it or nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.decoder_graph import DecoderGraph
from export.drafter_graph import DrafterGraph
from export.errors import CheckpointError, ExportError
from export.expected import matrices
from export.graph import DataFile, Graph
from export.hf_config import drafter_config, generation_defaults, model_config
from export.layers import LayerEmitter
from export.linear import Matrix, PortableProduct, Progress, Quantizer, StoredMatrix, TensorRows, WeightStore
from export.native_layers import NativeLayerEmitter
from export.quantizer import RecipeQuantizer
from export.stack import Emitter, StackWeights
from export.tables import StoredTable, embedding_multiplier, write_embed_graph, write_table
from export.text_files import GENERATION_CONFIG, check_same_tokenizer, check_text_files, copy_text_files
from quant.recipe import DRAFTER as DRAFTER_SCOPE
from quant.recipe import NATIVE_BLOCK_SIZE, Recipe, RecipeError
from runtime.layout import DECODER, DECODER_DATA, DRAFTER, DRAFTER_DATA, EMBED, Layout, graph_file
from runtime.manifest import FORMAT_VERSION, MANIFEST, Manifest, file_entry
from runtime.model_config import DrafterConfig, ModelConfig
from runtime.staging import staged_folder

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

    def matrix_names(self) -> list[str]:
        """What a recipe calls the matrices that an export stores."""
        return [matrix.name for matrix in matrices(self.model, self.drafter_config)]

    def quantizer(self, recipe: Recipe, calibration: Path | None) -> Quantizer:
        """What turns its matrices into codes."""
        moments = None
        if calibration is not None:
            from export.calibration import calibration_of

            moments = calibration_of(self.target, self.prefix, self.model, calibration)
        return RecipeQuantizer(recipe, moments)

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


def export_artifact(
    source: Source,
    destination: Path,
    recipe: Recipe,
    *,
    layout: Layout | None = None,
    calibration: Path | None = None,
    show_progress: bool = True,
) -> Manifest:
    """Writes the artifact folder `destination` and returns its manifest.

    Everything is written to a temporary sibling and renamed into place, so `destination` is complete or absent.

    Args:
        layout: native where the recipe allows it, if None
        calibration: a text that tells which weights matter, for methods that ask

    Raises:
        CheckpointError: the source does not hold what its configuration says.
        DestinationError: the destination cannot be used.
        ExportError: the recipe does not allow the layout, needs a text or cannot use it, or the disk is full.
    """
    layouts = emitted_layouts(recipe, source)
    layout = layout or layouts[-1]
    if layout not in layouts:
        raise ExportError(
            f"--layout {layout}: only 4- and 8-bit weights in blocks of a multiple of {NATIVE_BLOCK_SIZE} with int8 "
            f"activations have it, this is {_described(recipe, source)}; change that or export with --layout portable"
        )
    folders = [source.target.folder] + ([source.drafter.folder] if source.drafter else [])
    try:
        with staged_folder(destination, sources=folders) as folder, _progress(source, show_progress) as progress:
            quantizer = source.quantizer(recipe, calibration)
            return _Export(source, recipe, layout, layouts, folder, quantizer, progress).write()
    except OSError as error:
        reason = f"{error.filename or destination}: {error.strerror or error}"
        raise ExportError(f"{reason}; the export was given up, mend that and export again") from error


def emitted_layouts(recipe: Recipe, source: Source) -> tuple[Layout, ...]:
    """Layouts whose graphs an artifact of the recipe holds; the last one is the default.

    Raises:
        ExportError: the recipe cannot be used for a matrix of the source.
    """
    # in this order, whatever the artifact's own layout, so that matrices are stored in one order
    try:
        return ("portable", "native") if recipe.allows_native(source.matrix_names()) else ("portable",)
    except RecipeError as error:
        raise ExportError(str(error)) from error


def _described(recipe: Recipe, source: Source) -> str:
    if recipe.activations != "int8":
        return f"one with {recipe.activations} activations"
    forms = {name: recipe.choose(name).form for name in source.matrix_names() if name != "ple_table"}
    name, form = next((name, form) for name, form in forms.items() if not form.allows_native)
    return f"{form} for {name}"


@contextmanager
def _progress(source: Source, show: bool) -> Iterator[Progress]:
    total = source.num_weights()
    # None: off where standard error is no terminal
    disable = None if show else True
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="export", disable=disable) as bar:

        def advance(num_weights: int) -> None:
            bar.update(num_weights)

        yield advance


@dataclass(frozen=True, slots=True)
class _Export:
    """One export into a staged folder: weights once, in `layout`, and graphs for each of `layouts`."""

    source: Source
    recipe: Recipe
    layout: Layout
    layouts: tuple[Layout, ...]
    folder: Path
    quantizer: Quantizer
    progress: Progress

    def write(self) -> Manifest:
        """Writes every file, the manifest last."""
        source = self.source
        token_table, ple_table = self._write_tables()
        write_embed_graph(self._graph_path(EMBED, "portable"), token_table, ple_table)
        matrices = [token_table.stored, *self._write_decoder(token_table.stored)]
        if source.drafter and source.drafter_config:
            matrices += self._write_drafter(source.drafter, source.drafter_config)
        copy_text_files(source.target, self.folder)
        manifest = self._manifest(token_table, ple_table, matrices)
        (self.folder / MANIFEST).write_bytes(manifest.to_bytes())
        return manifest

    def _write_tables(self) -> tuple[StoredTable, StoredTable]:
        model = self.source.model
        tables = []
        # the PLE table is never multiplied: rows are what its reader wants, whatever the artifact's layout
        for name, tensor, width, size, layout in (
            ("token_table", "embed_tokens", model.hidden_size, model.hidden_size, self.layout),
            ("ple_table", "embed_tokens_per_layer", len(model.layers) * model.ple_size, model.ple_size, "portable"),
        ):
            rows = (TensorRows(f"{self.source.prefix}{tensor}.weight", 0, model.vocab_size),)
            matrix = Matrix(name, self.source.target, rows, width)
            path = self.folder / f"{name}.bin"
            tables.append(write_table(path, matrix, layout, embedding_multiplier(size), self._store))
        return tables[0], tables[1]

    def _write_decoder(self, lm_head: StoredMatrix) -> list[StoredMatrix]:
        source, model = self.source, self.source.model
        with DataFile(self.folder / DECODER_DATA) as data:
            store = self._store(data, self.layout)
            weights = StackWeights(source.target, source.prefix, model, store)
            for layout in self.layouts:
                graph = Graph("decoder")
                DecoderGraph(self._emitter(layout, graph, weights), model).emit(lm_head)
                graph.save(self._graph_path(DECODER, layout))
        return store.matrices

    def _write_drafter(self, checkpoint: Checkpoint, config: DrafterConfig) -> list[StoredMatrix]:
        with DataFile(self.folder / DRAFTER_DATA) as data:
            store = self._store(data, self.layout, DRAFTER_SCOPE)
            weights = StackWeights(checkpoint, "model.", config, store)
            for layout in self.layouts:
                graph = Graph("drafter")
                DrafterGraph(self._emitter(layout, graph, weights), config).emit()
                graph.save(self._graph_path(DRAFTER, layout))
        return store.matrices

    def _store(self, data: DataFile, layout: Layout, scope: str = "") -> WeightStore:
        return WeightStore(data, layout, self.recipe, self.quantizer, self.progress, scope)

    def _emitter(self, layout: Layout, graph: Graph, weights: StackWeights) -> Emitter:
        if layout == "native":
            return NativeLayerEmitter(graph, weights)
        return LayerEmitter(graph, weights, PortableProduct(self.recipe.activations))

    def _graph_path(self, graph: str, works_on: Layout) -> Path:
        return self.folder / graph_file(graph, works_on, self.layout)

    def _manifest(self, token_table: StoredTable, ple_table: StoredTable, matrices: list[StoredMatrix]) -> Manifest:
        source = self.source
        sources = {f"target/{name}": digest for name, digest in source.target.digests().items()}
        if source.drafter:
            sources |= {f"drafter/{name}": digest for name, digest in source.drafter.digests().items()}
        names = sorted(file.name for file in self.folder.iterdir() if not file.name.startswith("."))
        return Manifest(
            format_version=FORMAT_VERSION,
            layout=self.layout,
            producer=f"gemma-edge {version('gemma-edge')}",
            model=source.model,
            drafter=source.drafter_config,
            token_table=token_table.spec,
            ple_table=ple_table.spec,
            matrices=tuple(matrix.spec for matrix in matrices) if len(self.layouts) > 1 else (),
            recipe=self.recipe.to_json() | {"tensors": self.quantizer.tensors()},
            sources=sources,
            generation=source.generation,
            files={name: file_entry(self.folder / name) for name in names},
        )


def _tensor_prefix(checkpoint: Checkpoint) -> str:
    """What leads the text model's tensor names: multimodal checkpoints nest it deeper."""
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in checkpoint:
            return prefix
    raise CheckpointError(f"{checkpoint.folder}: no tensor embed_tokens.weight; not a Gemma 4 text or multimodal model")
