"""Backend `edge` of optimum's TasksManager: names the exporter of each model type and task.

Importing the module registers it. Does not know how an artifact is made; `export.pipeline` does.

Source: optimum 2.3 `exporters/tasks.py`, `exporters/base.py`.
"""

from pathlib import Path

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DummyTextInputGenerator
from optimum.utils.normalized_config import NormalizedTextConfig
from transformers import AutoConfig

from export import pipeline
from export.pipeline import Source
from quant.recipe import Recipe
from runtime.layout import Layout
from runtime.manifest import Manifest

BACKEND = "edge"
TASK = "text-generation"

_register = TasksManager.create_register(BACKEND)


@_register("gemma4_text", TASK)
class Gemma4TextEdgeConfig(ExporterConfig):  # type: ignore[misc]  # optimum ships no types
    """Exporter of a text-only checkpoint."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """What the artifact takes: the token ids of one prompt, of any length."""
        return {"input_ids": {1: "sequence_length"}}

    def export(
        self,
        source: Source,
        destination: Path,
        recipe: Recipe,
        *,
        layout: Layout | None = None,
        calibration: Path | None = None,
        show_progress: bool = True,
    ) -> Manifest:
        """Writes the artifact folder; as `export.pipeline.export_artifact`."""
        return pipeline.export_artifact(
            source, destination, recipe, layout=layout, calibration=calibration, show_progress=show_progress
        )


@_register("gemma4", TASK)
class Gemma4EdgeConfig(Gemma4TextEdgeConfig):
    """Exporter of the text model in a multimodal checkpoint."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig.with_args(vocab_size="text_config.vocab_size")


def export_artifact(
    source: Source,
    destination: Path,
    recipe: Recipe,
    *,
    layout: Layout | None = None,
    calibration: Path | None = None,
    show_progress: bool = True,
) -> Manifest:
    """As `export.pipeline.export_artifact`, through the exporter that TasksManager has for the source's model type."""
    config = AutoConfig.from_pretrained(source.target.folder)
    constructor = TasksManager.get_exporter_config_constructor(
        BACKEND, model_type=config.model_type, task=TASK, library_name="transformers"
    )
    exporter: Gemma4TextEdgeConfig = constructor(config)
    return exporter.export(
        source, destination, recipe, layout=layout, calibration=calibration, show_progress=show_progress
    )
