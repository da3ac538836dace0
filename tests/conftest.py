"""Tiny checkpoints, the artifacts made of them, and models opened on those; made once a session, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from profiles import DeviceProfile
from quant.recipe import make_recipe
from runtime import native
from runtime.layout import Layout
from tests.layouts import each_layout
from tests.models import ONE_THREAD, TinyModels, open_models

if TYPE_CHECKING:
    from edge import Runtime
    from tests.checkpoints import TinyCheckpoint
    from tests.faulty import Pair
    from tests.lasting import Load
    from tests.layouts import ExportBoth, Exported


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what the runtime remembers of artifacts out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def one_thread() -> DeviceProfile:
    """A profile of one thread and small sizes."""
    return ONE_THREAD


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyCheckpoint]:
    """tiny_checkpoint(shape): folders of a target and its assistant; `checkpoints.SHAPES` has the shapes' names."""
    from tests import checkpoints  # only here, as it imports torch

    checkpoints.torch.set_num_threads(1)
    tokenizer = checkpoints.make_tokenizer()

    @cache
    def make(shape: str) -> TinyCheckpoint:
        return checkpoints.save_pair(checkpoints.SHAPES[shape], tokenizer, tmp_path_factory.mktemp(shape))

    return make


@pytest.fixture(scope="session")
def tiny_artifact(
    tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """tiny_artifact(shape, bits=32, activations="int8", layout="portable"): an artifact's folder, for reading only."""
    from export.pipeline import export_artifact, open_source

    @cache
    def make(shape: str, bits: int = 32, activations: str = "int8", layout: Layout = "portable") -> Path:
        pair = tiny_checkpoint(shape)
        folder = tmp_path_factory.mktemp(f"{shape}-{bits}-{layout}") / "artifact"
        recipe = make_recipe(bits, activations=activations)  # type: ignore[arg-type]
        source = open_source(pair.target, pair.assistant)
        export_artifact(source, folder, recipe, layout=layout, show_progress=False)
        return folder

    return make


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """demo_artifact(bits, layout=None): the bundled pair as the export makes it, for reading only."""
    from export.pipeline import export_artifact, open_source
    from export.source import resolve_source

    @cache
    def make(bits: int, layout: Layout | None = None) -> Path:
        folder = tmp_path_factory.mktemp("demo") / f"bits{bits}"
        source = open_source(*resolve_source("demo", None))
        export_artifact(source, folder, make_recipe(bits), layout=layout, show_progress=False)
        return folder

    return make


@pytest.fixture(scope="session")
def both_layouts(
    tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> ExportBoth:
    """both_layouts(shape, bits=4, block_size=32): folders of an artifact with drafter by layout, for reading only."""
    from tests.layouts import export_both

    @cache
    def make(shape: str, bits: int = 4, block_size: int = 32) -> Exported:
        folder = tmp_path_factory.mktemp(f"{shape}-{bits}-layouts")
        return export_both(tiny_checkpoint(shape), folder, bits=bits, block_size=block_size)

    return make


@pytest.fixture
def best_instruction_set() -> Iterator[str]:
    """The one that the native ops use unless a test forces another, and use again behind the test."""
    native.force_instruction_set(None)
    native.unusable_because.cache_clear()
    yield native.instruction_set()
    native.force_instruction_set(None)
    native.unusable_because.cache_clear()


@pytest.fixture
def open_tiny(tiny_artifact: Callable[..., Path]) -> Iterator[Callable[..., TinyModels]]:
    """open_tiny(*arguments of tiny_artifact, **options of open_models): opened, cache empty."""
    opened: list[TinyModels] = []

    def open_one(*artifact: object, **options: Any) -> TinyModels:
        opened.append(open_models(tiny_artifact(*artifact), **options))
        return opened[-1]

    yield open_one
    for models in opened:
        models.close()


@pytest.fixture
def pair(tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Pair:
    """Copies of a small target and its assistant, to put faults into."""
    from tests.faulty import copied_pair

    return copied_pair(tiny_checkpoint("one_shared"), tmp_path, capfd)


@pytest.fixture(scope="session", params=each_layout)
def lasting_artifact(request: pytest.FixtureRequest, tiny_artifact: Callable[..., Path]) -> Path:
    """An artifact whose tokens do not depend on how many are drafted: native as it ships, portable of float weights."""
    return tiny_artifact("wide", 4, "int8", "native") if request.param == "native" else tiny_artifact("wide")


@pytest.fixture
def load(lasting_artifact: Path) -> Iterator[Load]:
    """load(folder=None, **fields): a runtime of the `lasting_artifact` or another one."""
    from tests.lasting import PROFILE, open_runtime

    loaded: list[Runtime] = []

    def load_one(folder: Path | None = None, **fields: Any) -> Runtime:
        loaded.append(open_runtime(folder or lasting_artifact, replace(PROFILE, **fields)))
        return loaded[-1]

    yield load_one
    for runtime in loaded:
        runtime.close()


@pytest.fixture(scope="session")
def plain(lasting_artifact: Path) -> list[int]:
    """What a fresh runtime generates, one token a step."""
    from tests.lasting import greedy, open_runtime

    with open_runtime(lasting_artifact) as runtime:
        return greedy(runtime, num_draft_tokens=0).token_ids


@pytest.fixture(scope="session")
def lasting(lasting_artifact: Path) -> Iterator[Runtime]:
    """What `runtime` gives to all tests."""
    from tests.lasting import open_runtime

    with open_runtime(lasting_artifact) as runtime:
        yield runtime


@pytest.fixture
def runtime(lasting: Runtime, plain: list[int]) -> Iterator[Runtime]:
    """One runtime for all tests: whatever a test did to it, it generates afterwards as a fresh one."""
    from tests.lasting import greedy

    yield lasting
    assert greedy(lasting, max_tokens=8).token_ids == plain[:8]
