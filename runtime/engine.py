"""The runtime: loads an artifact, generates text from prompts and chats, one generation at a time."""

import os
import reprlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from profiles import MAX_DRAFT_TOKENS, DeviceProfile, budget_bytes, load_profile, threads_of
from runtime import native
from runtime.budget import context_that_fits, max_new_tokens
from runtime.chat import ChatTemplate, plain_messages
from runtime.draft_policy import StepCosts
from runtime.drafter import DrafterModel
from runtime.errors import ArtifactError, BusyError, ClosedError, InferenceError, RequestError
from runtime.generation import Request
from runtime.kv_cache import KVCache
from runtime.kv_rows import KVDtype, choose_kv_dtype
from runtime.layout import DECODER, DRAFTER, Layout
from runtime.manifest import Manifest, check_files, read_manifest, verify_digests
from runtime.memory import keep_large_blocks_apart
from runtime.page_cache import read_ahead
from runtime.portable_copy import portable_copy
from runtime.sampling import SamplingParams
from runtime.session import check_signature, new_run_options, open_session
from runtime.signature import Signature, decoder_signature, drafter_signature
from runtime.step_costs import costs_record, measure_step_costs, recall_costs, remember_costs
from runtime.stream import Generation, GenerationRun, GenerationStream
from runtime.tables import RowTable
from runtime.target import TargetModel
from runtime.tokenizer import Tokenizer
from runtime.turns import ContextPolicy, room_in_context, sliding_of
from runtime.verified_cache import user_cache_folder

BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but no tokens


@dataclass(slots=True)
class _Loaded:
    """What an open runtime holds."""

    target: TargetModel
    drafter: DrafterModel | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    costs: StepCosts | None = None  # None where the profile grants no drafts

    def close(self) -> None:
        self.target.token_table.close()
        self.target.ple_table.close()


class Runtime:
    """A loaded artifact. Use `Runtime.load`; close it, or use it as a context manager."""

    def __init__(self, manifest: Manifest, profile: DeviceProfile, context_tokens: int, loaded: _Loaded) -> None:
        """Made by `load`."""
        self.manifest = manifest
        self.profile = profile
        self.context_tokens = context_tokens
        self._loaded: _Loaded | None = loaded
        self._process = os.getpid()
        self._claim_lock = threading.Lock()
        self._step_lock = threading.Lock()
        self._current: GenerationRun | None = None

    @classmethod
    def load(
        cls, path: str | Path, *, profile: str | Path | DeviceProfile = "laptop", memory_budget: int | str | None = None
    ) -> Self:
        """Opens an artifact within the memory that the profile grants.

        Every file is checked against the manifest; digests are computed when a file is first seen or has changed. The
        first load, and once a day a later one, measures for a part of a second what drafting costs on this machine.
        Where the native ops of a native artifact cannot be used, a portable copy is made in the user's cache.

        Args:
            path: an artifact folder, as `edge-export` makes it
            profile: a built-in profile's name, a TOML file or a profile
            memory_budget: anonymous memory to stay within, in bytes or as "2 GiB", instead of the profile's

        Raises:
            ArtifactError: a file is damaged, missing or of another version.
            DestinationError: a portable copy is needed and cannot be made.
            MemoryBudgetError: the budget leaves no room for a context.
            ProfileError: the profile is unknown or not usable, or its KV rows are none that the graphs can read.
            InferenceError: the model does not run.
        """
        keep_large_blocks_apart()
        folder = Path(path)
        device = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
        manifest = read_manifest(folder)
        if manifest.layout == "native" and (reason := native.unusable_because()):
            choose_kv_dtype(device, "portable", reason)  # before a copy is made in vain
            folder = portable_copy(folder, manifest, reason)
            manifest = read_manifest(folder)
        kv_dtype = choose_kv_dtype(device, manifest.layout)
        context_tokens = context_that_fits(manifest, device, budget_bytes(device, memory_budget))
        if manifest.layout == "native":  # else the sessions read all weights once and keep them repacked
            check_files(folder, manifest)
            read_ahead([folder / name for name in sorted({matrix.file for matrix in manifest.matrices})])
        verify_digests(folder, manifest, cache=user_cache_folder())
        loaded = _open(folder, manifest, device, context_tokens, kv_dtype)
        if device.num_draft_tokens > 0:
            loaded.costs = _step_costs(folder, loaded, device)
        return cls(manifest, device, context_tokens, loaded)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        num_draft_tokens: int | None = None,
        context_policy: ContextPolicy = "stop",
    ) -> Generation:
        """Generates until an end-of-sequence token, a stop string, `max_tokens` or the end of the context.

        Defaults come from the checkpoint's generation configuration; temperature 0 is greedy. Drafting changes the
        speed, never the distribution. Without a drafter the artifact drafts only what the text repeats.

        Args:
            prompt: text, before which BOS is put, or token ids, taken as they are
            num_draft_tokens: so many drafts of the drafter in every round, 0 for none; None for as many, of the drafter
                or of what the text repeats, as pay by what stood so far, up to the profile's number
            context_policy: what happens where the context is full. "stop": the generation ends. "slide": the oldest
                turns of a chat are dropped, and what remains is prefilled again, so that the text goes on as that of
                the shortened conversation. The system's turn stays, and all from the last user turn on. So many turns
                go that there is room for `max_tokens` or a quarter of the context, whichever is less, or else as much
                as there can be; the same for a prompt that leaves less room than that. Where nothing more can be
                dropped, as in plain text, the generation ends.

        Raises:
            RequestError: the prompt or an option cannot be served.
            BusyError: another generation is in progress.
            ClosedError: the runtime is closed or belongs to another process.
            InferenceError: the model produced NaN or infinite numbers.
        """
        stream = self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            num_draft_tokens=num_draft_tokens,
            context_policy=context_policy,
        )
        return stream.finish()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        num_draft_tokens: int | None = None,
        context_policy: ContextPolicy = "stop",
    ) -> GenerationStream:
        """As `generate`, but yields pieces of text as they become certain; its `generation` holds the result.

        The stream is the runtime's one generation from its first piece until it ends, is closed or dropped, or the
        same thread begins another one, which cancels it. Other threads get BusyError meanwhile.
        """
        loaded = self._open_or_raise()
        prompt_ids = self._prompt_ids(loaded, prompt)
        sliding = sliding_of(context_policy, prompt_ids, loaded.template, loaded.tokenizer, self.context_tokens)
        room = room_in_context(len(prompt_ids), self.context_tokens, sliding)
        wanted = _token_limit(max_tokens)
        params = self._sampling_params(temperature, top_p, top_k)
        request = Request(
            prompt_ids=prompt_ids,
            max_tokens=room if wanted is None else min(wanted, room),
            params=params,
            num_draft_tokens=self._num_draft_tokens(num_draft_tokens),
            prefill_chunk_tokens=self.profile.prefill_chunk_tokens,
            costs=loaded.costs if num_draft_tokens is None else None,
            sliding=sliding,
            fills_context=wanted is None or wanted > room,
        )
        if seed is not None and (type(seed) is not int or seed < 0):
            raise RequestError(f"seed is {reprlib.repr(seed)}, expected an integer >= 0")
        eos_ids = frozenset(self.manifest.generation["eos_token_ids"])
        run = GenerationRun(self, request, np.random.default_rng(seed), loaded.tokenizer, eos_ids, stop)
        return GenerationStream(run)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        num_draft_tokens: int | None = None,
        context_policy: ContextPolicy = "stop",
    ) -> Generation:
        """Renders messages ({"role", "content"}) with the checkpoint's chat template and generates the answer.

        Options are those of `generate`. To stream an answer: `runtime.stream(runtime.chat_prompt(messages))`.
        """
        return self.generate(
            self.chat_prompt(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            num_draft_tokens=num_draft_tokens,
            context_policy=context_policy,
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the model's turn begins."""
        loaded = self._open_or_raise()
        if loaded.template is None:
            raise RequestError("the artifact has no chat template; use generate() with a prompt of your own")
        plain = plain_messages(messages)
        for message in plain:
            if message["role"] not in ("assistant", "model"):  # only the model's own turns may hold special tokens
                message["content"] = loaded.tokenizer.literal(message["content"])
        return loaded.tokenizer.encode(loaded.template.render(plain), add_bos=True)

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes as a prompt, BOS included."""
        return len(self._open_or_raise().tokenizer.encode(text, add_bos=True))

    def cancel(self) -> None:
        """Ends the generation in progress, from any thread; it returns what it has with finish reason "cancelled"."""
        if self._current is not None:
            self._current.cancel()

    def close(self) -> None:
        """Ends a generation in progress and frees everything; a second call does nothing."""
        if os.getpid() != self._process:  # after a fork the locks may never be released
            return
        with self._claim_lock:  # a generation either is there to be cancelled or will find the runtime closed
            loaded, self._loaded = self._loaded, None
        self.cancel()
        if self._current is not None and self._current.is_in_use:
            return  # within a step of this thread, as in a signal handler: what it uses goes with the last reference
        with self._step_lock:
            if loaded is not None:
                loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # for streams

    def claim(self, run: GenerationRun) -> tuple[TargetModel, DrafterModel | None]:
        """Makes a generation the one in progress, on an empty cache; an abandoned one before it ends as cancelled.

        Raises:
            BusyError: another thread's generation is in progress.
        """
        self._check_process()
        with self._claim_lock:
            if self._current is not None:
                if self._current.is_in_use:
                    raise BusyError("another thread's generation is in progress; wait for it or cancel() it")
                self._current.cancel()
            loaded = self._open_or_raise()
            self._current = run
        with self._step_lock:  # the one that was cancelled may be in its last step
            loaded.target.cache.clear()
            loaded.target.run_options = new_run_options()
        return loaded.target, loaded.drafter

    @contextmanager
    def step(self) -> Iterator[None]:
        """Held while a step runs: closing, and a generation that takes over, wait for it."""
        self._check_process()
        with self._step_lock:
            yield

    # checks

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError(
                f"the runtime was loaded in process {self._process} and cannot be used after a fork in {os.getpid()}; "
                "load it in the child, or start children with the spawn method"
            )

    def _open_or_raise(self) -> _Loaded:
        self._check_process()
        if self._loaded is None:
            raise ClosedError("the runtime is closed; load the artifact again")
        return self._loaded

    def _prompt_ids(self, loaded: _Loaded, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = loaded.tokenizer.encode(prompt, add_bos=True) if prompt else []
        elif isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            raise RequestError(f"the prompt is {reprlib.repr(prompt)}, expected text or a list of token ids")
        ids = [_token_id(value, place, self.manifest.model.vocab_size) for place, value in enumerate(prompt)]
        if not ids:
            raise RequestError("the prompt is empty; pass at least one token")
        return ids

    def _sampling_params(self, temperature: float | None, top_p: float | None, top_k: int | None) -> SamplingParams:
        defaults = self.manifest.generation
        params = SamplingParams(
            defaults["temperature"] if temperature is None else temperature,
            defaults["top_k"] if top_k is None else top_k,
            defaults["top_p"] if top_p is None else top_p,
        )
        params.check()
        return params

    def _num_draft_tokens(self, num_draft_tokens: int | None) -> int:
        if num_draft_tokens is None:
            return self.profile.num_draft_tokens
        if type(num_draft_tokens) is not int or not 0 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
            found = reprlib.repr(num_draft_tokens)
            raise RequestError(f"num_draft_tokens is {found}, expected an integer 0-{MAX_DRAFT_TOKENS}")
        return num_draft_tokens


def _open(folder: Path, manifest: Manifest, profile: DeviceProfile, context_tokens: int, kv_dtype: KVDtype) -> _Loaded:
    model, layout = manifest.model, manifest.layout
    tokenizer = Tokenizer.load(folder / "tokenizer.json", bos_token_id=model.bos_token_id)
    template = _chat_template(folder, manifest, tokenizer)
    target = TargetModel(
        _open_graph(folder / DECODER, profile, layout, decoder_signature(model, layout)),
        model,
        KVCache(model, kv_dtype, max_tokens=context_tokens, max_new_tokens=max_new_tokens(profile)),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table),
        layout,
    )
    drafter = None
    if manifest.drafter is not None:
        session = _open_graph(folder / DRAFTER, profile, layout, drafter_signature(manifest.drafter, layout))
        drafter = DrafterModel(session, manifest.drafter, target)
    return _Loaded(target, drafter, tokenizer, template)


def _step_costs(folder: Path, loaded: _Loaded, profile: DeviceProfile) -> StepCosts:
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


def _token_limit(max_tokens: int | None) -> int | None:
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise RequestError(f"max_tokens is {reprlib.repr(max_tokens)}, expected an integer >= 1")
    return max_tokens


def _token_id(value: Any, place: int, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < vocab_size:
        raise RequestError(f"prompt token {place} is {reprlib.repr(value)}, expected an integer 0-{vocab_size - 1:,}")
    return int(value)
