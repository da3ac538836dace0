"""The runtime: loads an artifact, generates text from prompts and chats, one generation at a time."""

import os
import reprlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from profiles import MAX_DRAFT_TOKENS, DeviceProfile, budget_bytes, load_profile
from runtime import native
from runtime.chat import plain_messages
from runtime.drafter import DrafterModel
from runtime.errors import BusyError, ClosedError, RequestError
from runtime.generation import Request
from runtime.kv_rows import choose_kv_dtype
from runtime.loading import Loaded, load_planned
from runtime.manifest import Manifest, read_manifest
from runtime.memory import keep_large_blocks_apart, memory_usage
from runtime.memory_plan import INTERPRETER_BYTES, MemoryPlan, plan_memory
from runtime.portable_copy import portable_copy
from runtime.sampling import SamplingParams
from runtime.session import new_run_options
from runtime.stream import Generation, GenerationRun, GenerationStream
from runtime.target import TargetModel
from runtime.turns import ContextPolicy, room_in_context, sliding_of

BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but no tokens


class Runtime:
    """A loaded artifact. Use `Runtime.load`; close it, or use it as a context manager."""

    def __init__(self, manifest: Manifest, profile: DeviceProfile, plan: MemoryPlan, loaded: Loaded) -> None:
        """Made by `load`."""
        self.manifest = manifest
        self.profile = profile
        self.plan = plan
        self.context_tokens = plan.context_tokens
        self._loaded: Loaded | None = loaded
        self._process = os.getpid()
        self._claim_lock = threading.Lock()
        self._step_lock = threading.Lock()
        self._current: GenerationRun | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        profile: str | Path | DeviceProfile = "laptop",
        memory_budget: int | str | None = None,
        context_tokens: int | None = None,
    ) -> Self:
        """Opens an artifact within the memory that the profile grants: what it takes is planned before it is loaded.

        Every file is checked against the manifest; digests are computed when a file is first seen or has changed. The
        first load, and once a day a later one, measures for a part of a second what drafting costs on this machine.
        Where the native ops of a native artifact cannot be used, a portable copy is made in the user's cache.

        Args:
            path: an artifact folder, as `edge-export` makes it
            profile: a built-in profile's name, a TOML file or a profile
            memory_budget: anonymous memory to stay within, in bytes or as "2 GiB", instead of the profile's
            context_tokens: tokens of context that must fit; None for as many as do, up to the profile's

        Raises:
            ArtifactError: a file is damaged, missing or of another version.
            DestinationError: a portable copy is needed and cannot be made.
            MemoryBudgetError: the budget leaves no room for the context; names what would fit.
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
        held_bytes = min(memory_usage().anonymous_bytes, INTERPRETER_BYTES)
        budget = budget_bytes(device, memory_budget, held_bytes=held_bytes)
        plan = plan_memory(manifest, device, budget, context_tokens=context_tokens, model=folder.resolve().name)
        return cls(manifest, device, plan, load_planned(folder, manifest, device, plan))

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

    def _open_or_raise(self) -> Loaded:
        self._check_process()
        if self._loaded is None:
            raise ClosedError("the runtime is closed; load the artifact again")
        return self._loaded

    def _prompt_ids(self, loaded: Loaded, prompt: str | Sequence[int]) -> list[int]:
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
        if num_draft_tokens and not self.profile.num_draft_tokens:
            raise RequestError(
                f"num_draft_tokens is {num_draft_tokens}, profile {self.profile.name} grants 0, so no drafter was "
                "loaded; load with a profile that grants more"
            )
        return num_draft_tokens


def _token_limit(max_tokens: int | None) -> int | None:
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise RequestError(f"max_tokens is {reprlib.repr(max_tokens)}, expected an integer >= 1")
    return max_tokens


def _token_id(value: Any, place: int, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < vocab_size:
        raise RequestError(f"prompt token {place} is {reprlib.repr(value)}, expected an integer 0-{vocab_size - 1:,}")
    return int(value)
