"""What a machine grants the runtime: memory, threads, providers and the sizes that follow from them.

Knows nothing of a model; whether one fits into the budget is the runtime's to say.
"""

from dataclasses import dataclass

from profiles.amounts import MAX_BYTES
from profiles.errors import ProfileError, nearest, shown

# onnxruntime.get_all_providers() of 1.31; a misspelt one would silently leave the work to the CPU
_PROVIDERS = tuple(
    f"{name}ExecutionProvider"
    for name in (
        *("CPU", "CUDA", "WebGpu", "CoreML", "Dml", "QNN", "Xnnpack", "Nnapi", "OpenVINO", "Tensorrt", "MIGraphX"),
        *("Dnnl", "VitisAI", "VSINPU", "Js", "Rknpu", "WebNN", "CANN", "Azure"),
    )
)
_CPU = "CPUExecutionProvider"
MAX_DRAFT_TOKENS = 16
KV_DTYPES = ("auto", "float32", "float16", "int8")
MODELS = ("E2B", "E4B")
WEIGHT_BITS = (4, 8)
_CHOICES: dict[str, tuple[str | int, ...]] = {"kv_dtype": KV_DTYPES, "model": MODELS, "weight_bits": WEIGHT_BITS}
_RANGES = {
    "num_threads": (0, 1024),
    "context_tokens": (1, 2**24),
    "prefill_chunk_tokens": (1, 65_536),
    "num_draft_tokens": (0, MAX_DRAFT_TOKENS),
}
_SPEEDS = ("memory_gb_per_s", "int8_tops", "storage_gb_per_s")
_MAX_SPEED = 1_000_000


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device grants, and what it is like where it is not this machine.

    Exactly one of `memory_budget_bytes` and `memory_fraction` is not None. The speeds are stated, never measured:
    projections for a device that is not this machine use them and say so; None where nothing is stated.

    Args:
        name: the TOML file's name without its suffix
        description: one line
        device_memory_bytes: memory that such a device has; None where the profile is for this machine alone
        memory_budget_bytes: anonymous memory that the runtime may take
        memory_fraction: the same as a share, above 0 and at most 1, of the memory available at load time; of
            `device_memory_bytes` where a device is planned for
        providers: ONNX Runtime's names in order of preference; the CPU's is the last
        num_threads: threads that compute; 0 for the performance cores available to the process
        kv_dtype: type of the KV cache's elements, one of `KV_DTYPES`; "auto" is that of the artifact's layout
        context_tokens: tokens that prompt and answer have together, at most
        prefill_chunk_tokens: tokens of a prompt in one forward
        num_draft_tokens: as many tokens as pay are drafted in a round, up to this number; 0 drafts none
        model: the model that suits the device, one of `MODELS`; planning takes it when nothing else is said
        weight_bits: bits of its weights that suit the device, one of `WEIGHT_BITS`
        memory_gb_per_s: what the CPU's cores together read from memory, in 10^9 bytes a second
        int8_tops: what they multiply in int8, in 10^12 operations a second; a multiplication and an addition are two
        storage_gb_per_s: what the device reads from its storage, in 10^9 bytes a second

    Raises:
        ProfileError: a value of a wrong type or out of its range, or two that contradict each other.
    """

    name: str
    description: str
    device_memory_bytes: int | None
    memory_budget_bytes: int | None
    memory_fraction: float | None
    providers: tuple[str, ...]
    num_threads: int
    kv_dtype: str
    context_tokens: int
    prefill_chunk_tokens: int
    num_draft_tokens: int
    model: str
    weight_bits: int
    memory_gb_per_s: float | None
    int8_tops: float | None
    storage_gb_per_s: float | None

    def __post_init__(self) -> None:
        """Raises ProfileError for the first value that is not usable."""
        for key in ("name", "description"):
            value = getattr(self, key)
            if not isinstance(value, str) or len(value.splitlines()) > 1:
                raise ProfileError(f"{key} is {shown(value)}, expected a string of one line")
        self._check_memory()
        self._check_providers()
        self._check_numbers()
        self._check_contradictions()

    def _check_memory(self) -> None:
        budget, fraction = self.memory_budget_bytes, self.memory_fraction
        for key, value in (("memory_budget", budget), ("device_memory", self.device_memory_bytes)):
            if value is not None and (type(value) is not int or not 0 < value <= MAX_BYTES):
                raise ProfileError(f"{key} is {shown(value)} bytes, expected an integer above 0")
        if fraction is not None and (type(fraction) not in (int, float) or not 0 < fraction <= 1):
            raise ProfileError(f"memory_fraction is {shown(fraction)}, expected a number above 0 and at most 1")
        if (budget is None) == (fraction is None):
            found = "neither" if budget is None else "both"
            raise ProfileError(f"{found} of memory_budget and memory_fraction is given; give exactly one")

    def _check_providers(self) -> None:
        names = self.providers
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            raise ProfileError(f"providers is {shown(names)}, expected a list of names such as {_CPU!r}")
        known = ", ".join(_PROVIDERS)
        for name in names:
            if name not in _PROVIDERS:
                meant = nearest(name, _PROVIDERS)
                raise ProfileError(f"providers: unknown provider {shown(name)}{meant}; known ones are {known}")
            if names.count(name) > 1:
                raise ProfileError(f"providers: {name!r} is there {names.count(name)} times, expected once")

    def _check_numbers(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if type(value) is not type(choices[0]) or value not in choices:
                raise ProfileError(f"{key} is {shown(value)}, expected one of {', '.join(map(str, choices))}")
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise ProfileError(f"{key} is {shown(value)}, expected an integer of {low:,} to {high:,}")
        for key in _SPEEDS:
            value = getattr(self, key)
            if value is not None and (type(value) not in (int, float) or not 0 < value <= _MAX_SPEED):
                raise ProfileError(f"{key} is {shown(value)}, expected a number above 0 and at most {_MAX_SPEED:,}")

    def _check_contradictions(self) -> None:
        budget, memory = self.memory_budget_bytes, self.device_memory_bytes
        if budget is not None and memory is not None and budget > memory:
            raise ProfileError(
                f"memory_budget is {budget / 2**20:,.0f} MiB, device_memory {memory / 2**20:,.0f} MiB; lower "
                "memory_budget or leave device_memory out"
            )
        # ONNX Runtime gives a node to the first provider that has it, and the CPU's has all
        if self.providers[-1] != _CPU:
            found = ", ".join(self.providers)
            raise ProfileError(
                f"providers is {found}, expected {_CPU} as the last: what no other one computes is left to it"
            )
        context = self.context_tokens
        for key, least in (("prefill_chunk_tokens", 0), ("num_draft_tokens", 1)):  # drafts follow a token
            value = getattr(self, key)
            if value + least > context:
                most = context - least
                raise ProfileError(f"{key} is {value:,}, context_tokens {context:,}; lower {key} to {most:,} at most")
