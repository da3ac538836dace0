"""What a report is about: an artifact, or a model of which there are only sizes."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from edge.bench.workload import Workload
from edge.measured import artifact_folder, refuse_recipe_options
from export.hf_config import model_config
from export.released import RELEASED
from quant.recipe import RecipeError, make_recipe
from runtime.errors import EdgeError
from runtime.layout import Layout
from runtime.manifest import Manifest, read_manifest
from runtime.memory_plan import MemoryPlan
from runtime.model_config import ModelConfig

INT8_BITS = (4, 8)  # products of these weights are computed in int8


@dataclass(frozen=True, slots=True)
class Subject:
    """`source` is what a memory plan is made of; without a `manifest` there are no weights to measure."""

    kind: str  # "artifact", "dummy" or "model"
    title: str
    source: str | Path
    model: ModelConfig
    manifest: Manifest | None
    bits: int | None = None
    block_size: int = 32
    layout: Layout | None = None

    @property
    def artifact(self) -> Path:
        """The folder; only where there are weights."""
        assert isinstance(self.source, Path)
        return self.source

    def workload(self, plan: MemoryPlan) -> Workload:
        """Bytes and operations of a forward, from the files where there are any, else from the sizes."""
        if self.manifest is not None:
            return Workload.of(self.manifest)
        return Workload.of_sizes(self.model, plan.bits, self.block_size)

    def is_int8(self, plan: MemoryPlan) -> bool:
        """Whether its products are computed in int8, so that a device's int8 rate bounds them."""
        activations = "int8" if self.manifest is None else self.manifest.recipe.get("activations")
        return plan.bits in INT8_BITS and activations == "int8"


def subject_of(options: argparse.Namespace) -> Subject:
    """What the command line names; makes the artifact of `--dummy` where it is not in the cache.

    Raises:
        EdgeError: there is no such artifact, or an option is for something else.
    """
    if options.model is not None:
        return _model(options)
    if options.artifact is not None:
        refuse_recipe_options(options)
    folder = artifact_folder(options)
    manifest = read_manifest(folder)
    if options.dummy is None:
        return Subject("artifact", folder.resolve().name, folder, manifest.model, manifest)
    return Subject("dummy", f"{options.dummy} with random weights", folder, manifest.model, manifest)


def _model(options: argparse.Namespace) -> Subject:
    block_size = 32 if options.block_size is None else options.block_size
    try:
        make_recipe(4 if options.bits is None else options.bits, block_size)
    except RecipeError as error:
        raise EdgeError(str(error)) from error
    model = model_config(RELEASED[options.model].target, options.model)
    return Subject("model", options.model, options.model, model, None, options.bits, block_size, options.layout)
