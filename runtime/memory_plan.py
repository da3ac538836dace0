"""What an artifact takes of a device's memory: planned from its manifest, before anything is loaded.

Anonymous memory counts against the budget: the system cannot take it back. Weights that are mapped and the tables'
pages in the system's cache are stated beside it: they are clean copies of files, which the system drops where it must.

The figures are those of Linux on x86-64 with CPython 3.11 and onnxruntime 1.32; `tests/runtime/test_memory_plan.py`
holds them to what a child process is measured to take.
"""

import bisect
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from profiles import MAX_DRAFT_TOKENS, DeviceProfile, threads_of
from runtime.activations import FLOAT_BYTES, forward_bytes, scratch_bytes
from runtime.errors import MemoryBudgetError, RequestError
from runtime.kv_cache import full_bytes_per_token, sliding_bytes, window_copy_bytes
from runtime.kv_rows import KVDtype, choose_kv_dtype
from runtime.layout import DECODER, DECODER_DATA, DRAFTER, DRAFTER_DATA, Layout
from runtime.manifest import TOKENIZER, Manifest
from runtime.model_config import ModelConfig
from runtime.prefix import MAX_PARKED
from runtime.tables import CACHED_TABLE_BYTES

Kind = Literal["anonymous", "mapped", "cached"]

LEAST_TOKENS = 512  # of a context that is worth loading for
LEAST_CHUNK = 64
FEWEST_BITS = 4
MIB = 1 << 20
INTERPRETER_BYTES = 38 * MIB  # interpreter, numpy, onnxruntime and this package, at work (measured 33 to 37)
THREAD_BYTES = MIB // 4  # of a thread of each session
# a tokenizer in memory, relative to its compact file (measured 7.75, while it loads 13.8)
TOKENIZER_FACTOR, TOKENIZER_LOAD_FACTOR = 7.85, 14.5
GRAPH_FACTOR = 8  # a session relative to its graph's file, without packed weights
TOKEN_BYTES = 240  # of a prompt's token ids and their lookup (measured 225)
# Drawing from the whole vocabulary (top_k 0): logits, order, probabilities and their sums, as float64 and int64.
SAMPLING_BYTES = 64
SPARE = 0.02  # of everything: what the heap cannot give back between blocks in use
# Beside a block's codes onnxruntime packs its float16 scale as float32 and keeps sums and a widened copy: measured.
PACKED_SCALE_BYTES = 12
FLOAT_WEIGHTS_FACTOR = 1.6  # where the manifest describes no blocks: of the data files, as measured in blocks of 32
# portable attention: scores, their masks and what the arena keeps of shorter ones (measured on E2B, 2,000 and 6,000
# tokens)
SCORE_COPIES = 6


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One use of memory. "mapped" is weights that are read where they lie, "cached" pages of tables, at most."""

    name: str
    num_bytes: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What loading an artifact on a device takes; amounts in bytes.

    Args:
        model: what was planned
        profile: the device
        bits: of the weight matrices
        context_tokens: the planned context
        max_context_tokens: the longest that fits, up to the model's and, where none is asked for, the profile's
        budget_bytes: anonymous memory that the device grants
        load_peak_bytes: the most anonymous memory while it loads
        kv_bytes_per_token: KV rows that each token of context adds
        table_bytes: the PLE table's file
        parts: what takes how much with a full context
    """

    model: str
    profile: str
    layout: Layout
    kv_dtype: KVDtype
    bits: int
    has_drafter: bool
    context_tokens: int
    max_context_tokens: int
    prefill_chunk_tokens: int
    budget_bytes: int
    load_peak_bytes: int
    kv_bytes_per_token: int
    table_bytes: int
    parts: tuple[MemoryPart, ...]

    @property
    def anonymous_bytes(self) -> int:
        """The most anonymous memory behind loading: a full context, and a forward at work."""
        return self._total("anonymous")

    @property
    def peak_bytes(self) -> int:
        """The most anonymous memory at any time."""
        return max(self.load_peak_bytes, self.anonymous_bytes)

    @property
    def parked_bytes(self) -> int:
        """Anonymous memory beside the peak that rows of other conversations may take, at most."""
        return max(0, min(self.budget_bytes - self.peak_bytes, MAX_PARKED * self.cache_bytes))

    @property
    def cache_bytes(self) -> int:
        """KV rows of a full context, windows and their copies."""
        return sum(part.num_bytes for part in self.parts if part.name.startswith("KV "))

    @property
    def mapped_bytes(self) -> int:
        """Weights that are read where they are mapped."""
        return self._total("mapped")

    @property
    def table_cache_bytes(self) -> int:
        """Pages of the PLE table that stay in the system's cache, at most."""
        return self._total("cached")

    def _total(self, kind: Kind) -> int:
        return sum(part.num_bytes for part in self.parts if part.kind == kind)


def plan_memory(
    manifest: Manifest,
    profile: DeviceProfile,
    budget_bytes: int,
    *,
    context_tokens: int | None = None,
    model: str = "the model",
) -> MemoryPlan:
    """Plans an artifact on a device.

    Args:
        context_tokens: tokens of context it must hold; None for as many as fit, up to the profile's
        model: what a message calls it

    Raises:
        MemoryBudgetError: it does not fit; names the nearest options that do, and has the `plan` that does not.
        ProfileError: the layout has no KV rows of the profile's type.
    """
    plan = _plan(manifest, profile, budget_bytes, context_tokens, model)
    if plan.peak_bytes > budget_bytes:
        raise MemoryBudgetError(_shortfall(manifest, profile, plan, context_tokens), plan)
    return plan


def max_new_tokens(profile: DeviceProfile) -> int:
    """The most tokens one forward appends: a chunk of a prompt, or drafts behind the last token."""
    return max(profile.prefill_chunk_tokens, MAX_DRAFT_TOKENS + 1)


def _plan(
    manifest: Manifest, profile: DeviceProfile, budget_bytes: int, context_tokens: int | None, model: str
) -> MemoryPlan:
    """As `plan_memory`, but of the least context where nothing fits."""
    _check_context(manifest, context_tokens)
    layout, kv_dtype = manifest.layout, choose_kv_dtype(profile, manifest.layout)
    wanted = min(profile.context_tokens if context_tokens is None else context_tokens, manifest.model.context_tokens)
    num_threads = threads_of(profile)  # asks the system, which need not be asked for every context that is tried

    def parts_of(num_tokens: int) -> tuple[MemoryPart, ...]:
        return _parts(manifest, profile, num_tokens, num_threads)

    contexts = range(1, wanted + 1)
    fitting = bisect.bisect_right(contexts, budget_bytes, key=lambda num_tokens: _anonymous(parts_of(num_tokens)))
    planned = context_tokens or max(fitting, min(wanted, LEAST_TOKENS))
    parts = parts_of(planned)
    return MemoryPlan(
        model=model,
        profile=profile.name,
        layout=layout,
        kv_dtype=kv_dtype,
        bits=manifest.token_table.bits,
        has_drafter=has_drafter(manifest, profile),
        context_tokens=planned,
        max_context_tokens=fitting,
        prefill_chunk_tokens=profile.prefill_chunk_tokens,
        budget_bytes=budget_bytes,
        load_peak_bytes=_load_peak(manifest, parts),
        kv_bytes_per_token=full_bytes_per_token(manifest.model, kv_dtype),
        table_bytes=manifest.files[manifest.ple_table.file].size_bytes,
        parts=parts,
    )


def _check_context(manifest: Manifest, context_tokens: int | None) -> None:
    most = manifest.model.context_tokens
    if context_tokens is not None and (type(context_tokens) is not int or not 1 <= context_tokens <= most):
        raise RequestError(
            f"context_tokens is {reprlib.repr(context_tokens)}, expected an integer of 1 to {most:,}, the model's own"
        )


def has_drafter(manifest: Manifest, profile: DeviceProfile) -> bool:
    """Whether a drafter is loaded: there is one, and the profile grants drafts."""
    return manifest.drafter is not None and profile.num_draft_tokens > 0


def _parts(manifest: Manifest, profile: DeviceProfile, context_tokens: int, num_threads: int) -> tuple[MemoryPart, ...]:
    """What takes memory with a full context of so many tokens."""
    model = manifest.model
    num_new, kv_dtype = min(max_new_tokens(profile), context_tokens), choose_kv_dtype(profile, manifest.layout)
    is_native, drafts = manifest.layout == "native", has_drafter(manifest, profile)
    graphs = [name for name in (DECODER, DRAFTER) if drafts or name != DRAFTER]
    anonymous = {
        "interpreter and libraries": INTERPRETER_BYTES + THREAD_BYTES * num_threads * len(graphs),
        "tokenizer": int(TOKENIZER_FACTOR * manifest.files[TOKENIZER].size_bytes),
        "graphs": GRAPH_FACTOR * sum(manifest.files[name].size_bytes for name in graphs),
        "packed weights": 0 if is_native else _packed_bytes(manifest),
        "logits": _output_bytes(model, drafts=profile.num_draft_tokens > 0),
        "drafter": _drafter_bytes(manifest) if drafts else 0,
        "activations": _activation_bytes(manifest, num_new),
        "scratch of the native ops": scratch_bytes(model, num_new, num_threads) if is_native else 0,
        "KV window copies": window_copy_bytes(model, kv_dtype, context_tokens),
        "KV windows": sliding_bytes(model, kv_dtype, max_new_tokens(profile), context_tokens),
    }
    anonymous["heap between blocks"] = int(SPARE * sum(anonymous.values()))
    kv_bytes = full_bytes_per_token(model, kv_dtype)
    anonymous["KV rows"] = context_tokens * kv_bytes
    anonymous["attention and token ids"] = context_tokens * (_bytes_per_token(manifest, profile) - kv_bytes)
    weights = _weight_bytes(manifest, drafts=drafts) if is_native else 0
    parts = (
        *(MemoryPart(name, num_bytes, "anonymous") for name, num_bytes in anonymous.items()),
        MemoryPart("weights", weights, "mapped"),
        MemoryPart("PLE rows", CACHED_TABLE_BYTES, "cached"),
    )
    return tuple(part for part in parts if part.num_bytes)


def _anonymous(parts: tuple[MemoryPart, ...]) -> int:
    return sum(part.num_bytes for part in parts if part.kind == "anonymous")


def _bytes_per_token(manifest: Manifest, profile: DeviceProfile) -> int:
    """Anonymous memory that each token of context adds."""
    model = manifest.model
    rows = full_bytes_per_token(model, choose_kv_dtype(profile, manifest.layout)) + TOKEN_BYTES
    if manifest.layout == "native":
        return rows
    return rows + FLOAT_BYTES * max_new_tokens(profile) * (SCORE_COPIES * model.num_heads + 2)


def _load_peak(manifest: Manifest, parts: tuple[MemoryPart, ...]) -> int:
    """Reading the tokenizer is the most that loading takes; packing weights comes behind it."""
    at_rest = {part.name: part.num_bytes for part in parts}
    return at_rest["interpreter and libraries"] + int(TOKENIZER_LOAD_FACTOR * manifest.files[TOKENIZER].size_bytes)


def _output_bytes(model: ModelConfig, *, drafts: bool) -> int:
    """Logits and hidden states of a step's tokens."""
    return FLOAT_BYTES * (MAX_DRAFT_TOKENS + 1 if drafts else 1) * (model.vocab_size + model.hidden_size)


def _drafter_bytes(manifest: Manifest) -> int:
    """Outputs of a draft step, and the distributions that a round's drafts are drawn from."""
    assert manifest.drafter is not None
    return 8 * 2 * (MAX_DRAFT_TOKENS + 1) * manifest.drafter.num_candidates


def _activation_bytes(manifest: Manifest, num_new: int) -> int:
    """Of the largest forward: a chunk of a prompt, or a step that draws from the whole vocabulary behind it."""
    model, step = manifest.model, MAX_DRAFT_TOKENS + 1
    drawing = forward_bytes(model, step, step) + SAMPLING_BYTES * model.vocab_size
    if manifest.layout == "native":
        return max(forward_bytes(model, num_new, 1), drawing)
    widest = max(layer.intermediate_size for layer in model.layers)
    values = num_new * (4 * widest + 4 * len(model.layers) * model.ple_size + 8 * model.hidden_size)
    return max(FLOAT_BYTES * (values + step * model.vocab_size), drawing)


def _weight_bytes(manifest: Manifest, *, drafts: bool) -> int:
    names = (DECODER_DATA, manifest.token_table.file, *([DRAFTER_DATA] if drafts else []))
    return sum(manifest.files[name].size_bytes for name in names)


def _packed_bytes(manifest: Manifest) -> int:
    """Weights that onnxruntime copies to the heap."""
    if manifest.matrices:
        return sum(
            matrix.padded_rows * matrix.num_blocks * (matrix.block_bytes + PACKED_SCALE_BYTES)
            for matrix in manifest.matrices
        )
    names = (DECODER_DATA, DRAFTER_DATA, manifest.token_table.file)
    sizes = (manifest.files[name].size_bytes for name in names if name in manifest.files)
    return int(FLOAT_WEIGHTS_FACTOR * sum(sizes))


def _shortfall(manifest: Manifest, profile: DeviceProfile, plan: MemoryPlan, context_tokens: int | None) -> str:
    """Need, have, and the nearest way out."""
    need = f"{plan.model} needs {mib(plan.peak_bytes)} for {plan.context_tokens:,} tokens of context"
    have = f"the budget is {mib(plan.budget_bytes)}"
    return f"{profile.name}: {need}, {have}; {_way_out(_Choice(manifest, profile), plan, context_tokens)}"


class _Choice(NamedTuple):
    """What a plan is made of."""

    manifest: Manifest
    profile: DeviceProfile


def _way_out(choice: _Choice, plan: MemoryPlan, context_tokens: int | None) -> str:
    """A shorter context and the changes that fit, each alone; else several together, or how much is the least."""
    is_shorter_enough = plan.max_context_tokens >= LEAST_TOKENS and plan.load_peak_bytes <= plan.budget_bytes
    fitting = [f"context_tokens {plan.max_context_tokens:,}"] if is_shorter_enough else []
    together, texts, needed = choice, [], plan.peak_bytes
    changes = list(_changes(choice))
    for text, change in changes:
        alone = _plan(*change(choice), plan.budget_bytes, context_tokens, plan.model).peak_bytes
        if alone <= plan.budget_bytes:
            fitting.append(f"{text} ({mib(alone)})")
    for text, change in [] if fitting else changes:
        together = change(together)
        texts.append(text)
        needed = _plan(*together, plan.budget_bytes, context_tokens, plan.model).peak_bytes
        if needed <= plan.budget_bytes:
            fitting.append(f"{' with '.join(texts)} ({mib(needed)})")
            break
    if fitting:
        return f"what fits: {', or '.join(fitting)}; or raise memory_budget"
    fewer_bits = ", export with 4 bits" if choice.manifest.layout == "portable" and plan.bits > FEWEST_BITS else ""
    with_all = f" with {', '.join(texts)}" if texts else ""
    return f"the least is {mib(needed)}{with_all}; raise memory_budget to that{fewer_bits} or use a smaller model"


def _changes(choice: _Choice) -> Iterator[tuple[str, Callable[[_Choice], _Choice]]]:
    """What takes less memory, what costs the user least first."""
    manifest, profile = choice

    def with_profile(**values: Any) -> Callable[[_Choice], _Choice]:
        return lambda choice: choice._replace(profile=replace(choice.profile, **values))

    if manifest.layout == "native" and choose_kv_dtype(profile, "native") != "int8":
        yield "kv_dtype int8", with_profile(kv_dtype="int8")
    if profile.prefill_chunk_tokens > LEAST_CHUNK:
        yield f"prefill_chunk_tokens {LEAST_CHUNK}", with_profile(prefill_chunk_tokens=LEAST_CHUNK)
    if profile.num_draft_tokens:
        yield "num_draft_tokens 0 (no drafter)", with_profile(num_draft_tokens=0)
    if manifest.layout == "portable" and manifest.matrices and profile.kv_dtype == "auto":
        yield "the native layout", lambda choice: choice._replace(manifest=replace(manifest, layout="native"))


def mib(num_bytes: int) -> str:
    """An amount in MiB."""
    return f"{num_bytes / MIB:,.0f} MiB"
