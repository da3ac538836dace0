"""Opens what a runtime holds: files checked, weights read ahead, sessions, KV cache, tables, tokenizer, step costs."""

from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from profiles import DeviceProfile, threads_of
from runtime.chat import ChatTemplate
from runtime.constraints import Constraints
from runtime.draft_policy import StepCosts
from runtime.drafter import DrafterModel
from runtime.errors import ArtifactError, InferenceError
from runtime.kv_cache import KVCache
from runtime.layout import DECODER, DRAFTER, DRAFTER_DATA, Layout
from runtime.manifest import TOKENIZER, Manifest, check_files, verify_digests
from runtime.memory_plan import MemoryPlan, max_new_tokens
from runtime.page_cache import read_ahead
from runtime.prompts import Prompts
from runtime.response import ResponseFormat
from runtime.session import check_signature, open_session
from runtime.signature import Signature, decoder_signature, drafter_signature
from runtime.step_costs import costs_record, measure_step_costs, recall_costs, remember_costs
from runtime.tables import CACHED_TABLE_BYTES, RowTable
from runtime.target import TargetModel
from runtime.tokenizer import Tokenizer
from runtime.verified_cache import user_cache_folder


@dataclass(slots=True)
class Loaded:
    """What an open runtime holds."""

    target: TargetModel
    drafter: DrafterModel | None
    tokenizer: Tokenizer
    prompts: Prompts
    constraints: Constraints
    costs: StepCosts | None = None  # None where the profile grants no drafts

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, None where the artifact has none."""
        return self.prompts.template

    def close(self) -> None:
        """Closes the tables' files."""
        self.target.token_table.close()
        self.target.ple_table.close()


def load_planned(folder: Path, manifest: Manifest, profile: DeviceProfile, plan: MemoryPlan) -> Loaded:
    """Opens an artifact as it was planned.

    Raises:
        ArtifactError: a file is damaged or missing.
        InferenceError: the model does not run.
        MemoryBudgetError: the system does not grant the KV cache's addresses.
    """
    if manifest.layout == "native":  # else the sessions read all weights once and keep them repacked
        check_files(folder, manifest)
        weights = {matrix.file for matrix in manifest.matrices} - (set() if plan.has_drafter else {DRAFTER_DATA})
        read_ahead([folder / name for name in sorted(weights)])
    verify_digests(folder, manifest, cache=user_cache_folder())
    loaded = _open(folder, manifest, profile, plan)
    if profile.num_draft_tokens > 0:
        loaded.costs = _step_costs(folder, loaded, profile)
    return loaded


def _open(folder: Path, manifest: Manifest, profile: DeviceProfile, plan: MemoryPlan) -> Loaded:
    model, layout = manifest.model, manifest.layout
    tokenizer = Tokenizer.load(folder / "tokenizer.json", bos_token_id=model.bos_token_id)
    template = _chat_template(folder, manifest, tokenizer)
    target = TargetModel(
        _open_graph(folder / DECODER, profile, layout, decoder_signature(model, layout)),
        model,
        KVCache(model, plan.kv_dtype, max_tokens=plan.context_tokens, max_new_tokens=max_new_tokens(profile)),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table, cached_bytes=CACHED_TABLE_BYTES),
        layout,
    )
    drafter = None
    if manifest.drafter is not None and plan.has_drafter:
        session = _open_graph(folder / DRAFTER, profile, layout, drafter_signature(manifest.drafter, layout))
        drafter = DrafterModel(session, manifest.drafter, target)
    target.parked.max_bytes, target.parked.spare_bytes = plan.parked_bytes, plan.budget_bytes - plan.peak_bytes
    form = ResponseFormat.of(tokenizer)
    constraints = Constraints(folder / TOKENIZER, model, form, target.parked)
    return Loaded(target, drafter, tokenizer, Prompts(template, tokenizer, form), constraints)


def _step_costs(folder: Path, loaded: Loaded, profile: DeviceProfile) -> StepCosts:
    """What rounds cost on this machine: remembered, or measured now."""
    target, drafter, cache = loaded.target, loaded.drafter, user_cache_folder()
    record = costs_record(cache, folder / "manifest.json", threads_of(profile)) if cache is not None else None
    if record is not None and (costs := recall_costs(record, has_drafter=drafter is not None)) is not None:
        return costs
    try:
        costs = measure_step_costs(target, drafter, target.model.bos_token_id, target.cache.max_tokens)
    except InferenceError:
        loaded.close()
        raise
    target.cache.clear()
    if record is not None and (costs.draft_seconds is None) == (drafter is None):
        remember_costs(record, costs)
    return costs


def _open_graph(path: Path, profile: DeviceProfile, layout: Layout, signature: Signature) -> ort.InferenceSession:
    session = open_session(path, profile, layout)
    check_signature(path, session, signature)
    return session


def _chat_template(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.name not in manifest.files:
        return None
    bos, eos = manifest.model.bos_token_id, manifest.generation["eos_token_ids"][0]
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8 at byte {error.start:,}; re-export the model") from error
    return ChatTemplate(source, {"bos_token": tokenizer.token(bos), "eos_token": tokenizer.token(eos)})
