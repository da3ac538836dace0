"""How long a context the memory budget leaves room for."""

from profiles import MAX_DRAFT_TOKENS, DeviceProfile
from runtime.errors import MemoryBudgetError
from runtime.kv_cache import GROWTH_TOKENS, full_bytes_per_token, sliding_bytes
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

# onnxruntime packs quantized weights into heap memory and widens their scales to float32 beside it: together up to this
# many times the file (measured, 4 bits, block 32)
PREPACK_FACTOR = 1.6
SESSION_BYTES = 96 << 20  # interpreter, libraries and graphs: anonymous memory of an idle runtime, rounded up
# attention scores, their masks and what the arena keeps of shorter ones (measured on E2B, 2,000 and 6,000 tokens)
SCORE_COPIES = 6


def context_that_fits(manifest: Manifest, profile: DeviceProfile, budget_bytes: int) -> int:
    """Tokens of context within the budget, the profile's cap and the model's own limit.

    Raises:
        MemoryBudgetError: not even one growth step of the cache fits.
    """
    wanted = min(profile.context_tokens, manifest.model.context_tokens)
    least = min(wanted, GROWTH_TOKENS)
    needed = planned_bytes(manifest, profile, least)
    if needed > budget_bytes:
        raise MemoryBudgetError(
            f"{profile.name}: the model needs {_mib(needed)} for {least:,} tokens of context, the budget is "
            f"{_mib(budget_bytes)}; raise memory_budget or export with fewer bits"
        )
    left = budget_bytes - planned_bytes(manifest, profile, 0)
    return min(wanted, left // _bytes_per_token(manifest.model, profile))


def planned_bytes(manifest: Manifest, profile: DeviceProfile, context_tokens: int) -> int:
    """An upper estimate of anonymous memory with a full context: packed weights, one chunk's activations, KV rows."""
    model, num_new = manifest.model, max_new_tokens(profile)
    fixed = _weight_bytes(manifest) + SESSION_BYTES + activation_bytes(model, num_new) + sliding_bytes(model, num_new)
    return fixed + context_tokens * _bytes_per_token(model, profile)


def _bytes_per_token(model: ModelConfig, profile: DeviceProfile) -> int:
    """Bytes that each token of context adds: KV rows, and attention scores of one chunk."""
    return full_bytes_per_token(model) + 4 * max_new_tokens(profile) * (SCORE_COPIES * model.num_heads + 2)


def max_new_tokens(profile: DeviceProfile) -> int:
    """The most tokens one forward appends: a chunk of a prompt, or drafts behind the last token."""
    return max(profile.prefill_chunk_tokens, MAX_DRAFT_TOKENS + 1)


def activation_bytes(model: ModelConfig, num_tokens: int) -> int:
    """An upper estimate of one forward's activations, without attention scores."""
    widest = max(layer.intermediate_size for layer in model.layers)
    ple = len(model.layers) * model.ple_size
    return 4 * (num_tokens * (4 * widest + 3 * ple + 8 * model.hidden_size) + 2 * model.vocab_size)


def _weight_bytes(manifest: Manifest) -> int:
    names = ("decoder.onnx.data", "drafter.onnx.data", manifest.token_table.file)
    return int(PREPACK_FACTOR * sum(manifest.files[name].size_bytes for name in names if name in manifest.files))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
