"""`optimum-cli export edge` makes what `edge-export` makes, and TasksManager's exporter describes it truly."""

import filecmp
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig, Gemma4Config, PretrainedConfig

from edge import Runtime
from export.optimum_backend import BACKEND, TASK, Gemma4TextEdgeConfig
from profiles import DeviceProfile
from tests.checkpoints import TinyCheckpoint

EDGE_EXPORT = (sys.executable, "-m", "edge.export_cli")
OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def exporter_for(config: PretrainedConfig) -> Gemma4TextEdgeConfig:
    constructor = TasksManager.get_exporter_config_constructor(
        BACKEND, model_type=config.model_type, task=TASK, library_name="transformers"
    )
    exporter = constructor(config)
    assert isinstance(exporter, Gemma4TextEdgeConfig)
    return exporter


def test_optimum_cli_writes_the_bytes_that_edge_export_writes(
    tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path: Path
) -> None:
    pair = tiny_checkpoint("wide")
    text = tmp_path / "text.txt"
    text.write_text("any words will do to measure on " * 100, encoding="utf-8")
    recipe = ("--bits", "8", "--block-size", "16")
    options = ("--drafter", pair.assistant, *recipe, "--evaluate", text, "--quiet")
    direct = run(*EDGE_EXPORT, pair.target, tmp_path / "direct", *options)
    optimum = run(*OPTIMUM_CLI, "export", "edge", pair.target, tmp_path / "optimum", *options)
    assert (direct.returncode, optimum.returncode) == (0, 0), direct.stderr + optimum.stderr
    assert "\nKL divergence, mean" in direct.stdout
    assert optimum.stdout == direct.stdout.replace("direct", "optimum")
    names = sorted(file.name for file in (tmp_path / "direct").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "optimum").iterdir())
    same, _, _ = filecmp.cmpfiles(tmp_path / "direct", tmp_path / "optimum", names, shallow=False)
    assert same == names


def test_a_users_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = run(*OPTIMUM_CLI, "export", "edge", tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"optimum-cli export edge: {tmp_path / 'nowhere'}: no such folder")


def test_the_dummy_inputs_are_a_prompt_that_the_artifact_takes(
    tiny_checkpoint: Callable[[str], TinyCheckpoint], tiny_artifact: Callable[..., Path], one_thread: DeviceProfile
) -> None:
    exporter = exporter_for(AutoConfig.from_pretrained(tiny_checkpoint("wide").target))
    inputs = exporter.generate_dummy_inputs(framework="np", batch_size=1, sequence_length=9)
    assert list(inputs) == list(exporter.inputs)
    with Runtime.load(tiny_artifact("wide"), profile=one_thread) as runtime:
        generation = runtime.generate(inputs["input_ids"][0].tolist(), max_tokens=2)
    assert generation.stats.num_prompt_tokens == 9


def test_a_multimodal_checkpoint_has_its_text_models_vocabulary() -> None:
    exporter = exporter_for(Gemma4Config(text_config={"vocab_size": 7}))
    ids = exporter.generate_dummy_inputs(framework="np", batch_size=1, sequence_length=200)["input_ids"]
    assert set(ids[0].tolist()) == set(range(7))


def test_another_architecture_is_not_offered() -> None:
    with pytest.raises(KeyError, match="gemma3n is not supported yet"):
        TasksManager.get_supported_tasks_for_model_type("gemma3n", BACKEND, library_name="transformers")
