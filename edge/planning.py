"""Plans before anything is loaded or even downloaded: from an artifact, a `config.json` or a released model's name."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.errors import CheckpointError
from export.expected import expected_manifest, matrices
from export.hf_config import drafter_config, model_config
from export.released import RELEASED
from profiles import DeviceProfile, load_profile, stated_budget_bytes
from quant.recipe import RecipeError, make_recipe
from runtime.errors import ArtifactError, RequestError
from runtime.layout import LAYOUTS, Layout
from runtime.manifest import MANIFEST, Manifest, read_manifest
from runtime.memory_plan import MemoryPlan, plan_memory

CONFIG = "config.json"
DRAFTER_TYPE = "gemma4_assistant"
_MAX_CONFIG_BYTES = 16 * 2**20


def plan(
    source: str | Path,
    profile: str | Path | DeviceProfile = "laptop",
    *,
    bits: int | None = None,
    block_size: int = 32,
    layout: Layout | None = None,
    context_tokens: int | None = None,
    kv_dtype: str | None = None,
    has_drafter: bool | None = None,
    memory_budget: int | str | None = None,
) -> MemoryPlan:
    """What a model takes of a device's memory and how long a context it holds there; loads nothing.

    The device is the one that the profile describes: its own budget counts, and this machine's memory only where the
    profile states none (see `profiles.stated_budget_bytes`). `Runtime.load` holds a plan against this machine.

    Args:
        source: an artifact folder; a config.json or a checkpoint folder with one; or "E2B" or "E4B"
        profile: a built-in profile's name, a TOML file or a profile
        bits: of the weights that an export of a configuration would have; None for those that suit the profile
        block_size: weights that share a scale there
        layout: of its files; None for native where the choice of bits and blocks has it
        context_tokens: tokens of context that must fit; None for as many as do, up to the profile's
        kv_dtype: instead of the profile's
        has_drafter: False to plan without drafts; None for what profile and source have
        memory_budget: anonymous memory to stay within, in bytes or as "2 GiB", instead of the profile's

    Raises:
        MemoryBudgetError: it does not fit; the message names need, budget and the nearest options that fit, and the
            error's `plan` is the plan that does not.
        ArtifactError, CheckpointError: the source is none, or is damaged.
        ProfileError: the profile or an option that stands in for one of its values is not usable.
        RequestError: an option is not usable.
    """
    device = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    if kv_dtype is not None:
        device = replace(device, kv_dtype=kv_dtype)
    if has_drafter is False:
        device = replace(device, num_draft_tokens=0)
    manifest, name = _described(source, device, bits, block_size, layout)
    if has_drafter and manifest.drafter is None:
        raise RequestError(f"{source}: has no drafter; export the model with --drafter, or plan without one")
    budget = stated_budget_bytes(device, memory_budget)
    return plan_memory(manifest, device, budget, context_tokens=context_tokens, model=name)


def _described(
    source: str | Path, profile: DeviceProfile, bits: int | None, block_size: int, layout: Layout | None
) -> tuple[Manifest, str]:
    """The manifest that the source has or would get, and what to call it."""
    path = Path(source)
    if (path / MANIFEST).is_file() or path.name == MANIFEST:
        if bits is not None or layout is not None:
            raise RequestError(f"{source}: an artifact has its own bits and layout; leave them out")
        folder = path.parent if path.name == MANIFEST else path
        return read_manifest(folder), folder.resolve().name
    chosen = profile.weight_bits if bits is None else bits
    if str(source) in RELEASED:
        released = RELEASED[str(source)]
        name, target, assistant = released.name, released.target, released.assistant
        return _expected(name, target, assistant, chosen, block_size, layout), f"{name} at {chosen} bits"
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(
            f"{source}: no artifact, no {CONFIG} and none of {', '.join(RELEASED)}; pass one of these, or the folder "
            "of a checkpoint"
        )
    target, where = _read(file), str(file)
    expected = _expected(where, target, _assistant_of(target, where), chosen, block_size, layout)
    return expected, f"{file.resolve().parent.name} at {chosen} bits"


def _assistant_of(target: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """That of the released model of these sizes, whose fine-tune the target may be; None where there is none."""
    layers = model_config(target, where).layers
    for released in RELEASED.values():
        if model_config(released.target, released.name).layers == layers:
            return released.assistant
    return None


def _expected(
    where: str,
    target: Mapping[str, Any],
    assistant: Mapping[str, Any] | None,
    bits: int,
    block_size: int,
    layout: Layout | None,
) -> Manifest:
    try:
        recipe = make_recipe(bits, block_size)
    except RecipeError as error:
        raise RequestError(str(error)) from error
    model = model_config(target, where)
    drafter = drafter_config(assistant, model, where) if assistant else None
    allows_native = recipe.allows_native(matrix.name for matrix in matrices(model, drafter))
    if layout not in (None, *LAYOUTS) or (layout == "native" and not allows_native):
        raise RequestError(f"layout is {layout!r}; {bits} bits in blocks of {block_size} do not have it")
    chosen = layout or ("native" if allows_native else "portable")
    return expected_manifest(model, drafter, recipe, chosen, tokenizer_bytes=None)


def _read(file: Path) -> dict[str, Any]:
    """A config.json; CheckpointError where it is none."""
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, expected a {CONFIG} of a model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: no JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected an object, as a {CONFIG} is; download it again")
    if content.get("model_type") == DRAFTER_TYPE:
        raise CheckpointError(f"{file}: is an assistant's; pass the {CONFIG} of the model that it drafts for")
    return content
