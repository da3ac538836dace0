"""The runtime: loads an artifact, generates text from prompts and chats, one generation at a time."""

import os
import reprlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from profiles import DeviceProfile, budget_bytes, load_profile
from runtime import native
from runtime.conversation import Conversation
from runtime.drafter import DrafterModel
from runtime.errors import BusyError, ClosedError, RequestError
from runtime.generation import Request
from runtime.kv_rows import choose_kv_dtype
from runtime.loading import Loaded, load_planned
from runtime.manifest import Manifest, read_manifest
from runtime.memory import keep_large_blocks_apart, memory_usage
from runtime.memory_plan import INTERPRETER_BYTES, MemoryPlan, plan_memory
from runtime.options import GenerationOptions, OptionArguments
from runtime.portable_copy import portable_copy
from runtime.prefix import Parked
from runtime.prompts import Prompts
from runtime.response import ResponseScanner
from runtime.saved_conversation import read_conversation
from runtime.session import new_run_options
from runtime.stream import Generation, GenerationRun, GenerationStream
from runtime.target import TargetModel
from runtime.tools import ToolLike, tools_of, with_functions
from runtime.turns import room_in_context, sliding_of

BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but no tokens
WAIT_SECONDS = 0.05  # until a generation that waits looks again whether the one in progress was abandoned


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
        self._claim_lock = threading.RLock()  # the collector may end a dropped stream within it
        self._released = threading.Condition(self._claim_lock)
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

    def generate(self, prompt: str | Sequence[int], **options: Unpack[OptionArguments]) -> Generation:
        """Generates until an end-of-sequence token, a stop string, `max_tokens` or the end of the context.

        Drafting changes the speed, never the distribution. Without a drafter the artifact drafts only what the text
        repeats. What the KV cache holds of the prompt from before is not computed again.

        Args:
            prompt: text, before which BOS is put, or token ids, taken as they are
            options: see `GenerationOptions`

        Raises:
            RequestError: the prompt or an option cannot be served.
            BusyError: another generation is in progress.
            ClosedError: the runtime is closed or belongs to another process.
            InferenceError: the model produced NaN or infinite numbers.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[OptionArguments]) -> GenerationStream:
        """As `generate`, but yields pieces of text as they become certain; its `generation` holds the result.

        The stream is the runtime's one generation from its first piece until it ends, is closed or dropped, or the
        same thread begins another one, which cancels it. Other threads get BusyError meanwhile.
        """
        return GenerationStream(self._run(self._prompt_ids(prompt), GenerationOptions(**options)))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[ToolLike] = (),
        thinking: bool = False,
        **options: Unpack[OptionArguments],
    ) -> Generation:
        """Generates the answer to messages ({"role", "content"}), in the checkpoint's chat format.

        Args:
            messages: roles are system, user, assistant and tool; an assistant's may have "tool_calls"
            tools: functions or JSON schemas that the model may call; it says so in `tool_calls` of the answer
            thinking: whether the model may think first; thoughts are in `thinking` of the answer
            options: see `GenerationOptions`

        Raises:
            ToolCallError: the model wrote a tool call that is none; has its text.
            RequestError, BusyError, ClosedError, InferenceError: as `generate`.
        """
        return self.stream_chat(messages, tools=tools, thinking=thinking, **options).finish()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[ToolLike] = (),
        thinking: bool = False,
        **options: Unpack[OptionArguments],
    ) -> GenerationStream:
        """As `chat`, but yields pieces, whose `kind` is "thinking" or "text"."""
        known = tools_of(tools)
        prompt_ids = self.prompts.chat_ids(messages, known, thinking=thinking)
        run = self._run(prompt_ids, GenerationOptions(**options), is_chat=True, thinking=thinking)
        return GenerationStream(run)

    def conversation(
        self,
        *,
        system: str | None = None,
        tools: Sequence[ToolLike] = (),
        thinking: bool = False,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Unpack[OptionArguments],
    ) -> Conversation:
        """A conversation that remembers its messages; any number of them share the runtime.

        Args:
            system: what stands before all messages
            messages: what was said already
            options: defaults of its answers, see `GenerationOptions`
        """
        first = [{"role": "system", "content": system}] if system is not None else []
        return Conversation(self, [*first, *messages], tools_of(tools), thinking, options)

    def resume(self, path: str | Path, *, tools: Sequence[ToolLike] = ()) -> Conversation:
        """A conversation that was saved with `Conversation.save`; goes on as it would have, without a prefill.

        Args:
            tools: functions for the tools that it was saved with, by name; those without one are schemas

        Raises:
            SessionError: the file is damaged, or of another model, tokenizer, template or type of KV rows.
        """
        with self._idle():
            target = self._open_or_raise().target
            target.give_way()  # its rows, what is read and what becomes of it must not be there at once
            most_bytes = (self.plan.cache_bytes + self.plan.budget_bytes - self.plan.peak_bytes) // 2
            saved = read_conversation(Path(path), self.identity, target.cache.empty_snapshot(), most_bytes)
            if len(saved.rows.token_ids) < self.context_tokens:  # else they are computed again
                target.adopt(saved.rows)
        return Conversation(
            self,
            saved.messages,
            with_functions(saved.tools, tools_of(tools)),
            saved.thinking,
            saved.options,
            token_ids=saved.rows.token_ids,
        )

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[ToolLike] = (), thinking: bool = False
    ) -> list[int]:
        """Token ids of a conversation up to where the model's turn begins."""
        return self.prompts.chat_ids(messages, tools_of(tools), thinking=thinking)

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
        """Makes a generation the one in progress; an abandoned one before it ends as cancelled.

        Raises:
            BusyError: another thread's generation is in progress, and this one does not wait.
        """
        self._check_process()
        with self._released:
            while self._current is not None and self._current.is_in_use and not run.is_cancelled:
                if not run.waits or self._current.is_own:  # in a signal handler it would wait for itself
                    raise BusyError("another thread's generation is in progress; wait for it or cancel() it")
                self._open_or_raise()
                self._released.wait(WAIT_SECONDS)
            loaded = self._open_or_raise()
            if run.is_cancelled:
                return loaded.target, loaded.drafter
            if self._current is not None:
                self._current.cancel()
            self._current = run
        with self._step_lock:  # the one that was cancelled may be in its last step
            loaded.target.run_options = new_run_options()
        return loaded.target, loaded.drafter

    def release(self, run: GenerationRun) -> None:
        """Lets the next generation that waits begin."""
        with self._released:
            self._released.notify_all()

    @contextmanager
    def rows_of(self, token_ids: Sequence[int]) -> Iterator[Parked]:
        """Rows of as many of the first of these tokens as the KV cache knows; within, nothing changes them."""
        with self._idle():
            yield self._open_or_raise().target.rows_of(token_ids)

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Held while the KV cache is read or exchanged; BusyError where a generation is in progress."""
        self._check_process()
        with self._claim_lock:
            if self._current is not None and self._current.generation is None:
                if self._current.is_in_use:
                    raise BusyError("another thread's generation is in progress; wait for it or cancel() it")
                self._current.cancel()
            with self._step_lock:
                yield

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

    @property
    def prompts(self) -> Prompts:
        """How messages become token ids."""
        return self._open_or_raise().prompts

    @property
    def identity(self) -> dict[str, Any]:
        """What rows of this runtime's KV cache depend on."""
        files = self.manifest.files
        return {
            "files": {name: files[name].sha256 for name in sorted(files)},
            "layout": self.manifest.layout,
            "kv_dtype": self.plan.kv_dtype,
        }

    def answer(
        self, prompt_ids: list[int], options: GenerationOptions, thinking: bool, on_end: Callable[[Generation], None]
    ) -> GenerationStream:
        """A conversation's answer to a prompt; waits for other generations."""
        run = self._run(prompt_ids, options, is_chat=True, thinking=thinking, waits=True)
        return GenerationStream(run, on_end)

    def _run(
        self,
        prompt_ids: list[int],
        options: GenerationOptions,
        *,
        is_chat: bool = False,
        thinking: bool = False,
        waits: bool = False,
    ) -> GenerationRun:
        """A generation that is yet to begin."""
        loaded = self._open_or_raise()
        options.check()
        sliding = sliding_of(
            options.context_policy,
            prompt_ids,
            loaded.template,
            loaded.tokenizer,
            self.context_tokens,
            is_chat=is_chat,
        )
        room = room_in_context(len(prompt_ids), self.context_tokens, sliding)
        eos_ids = list(self.manifest.generation["eos_token_ids"])
        form = loaded.prompts.response_format if is_chat else None
        if form is not None and form.result_start is not None:
            eos_ids.append(form.result_start)
        request = Request(
            prompt_ids=prompt_ids,
            max_tokens=room if options.max_tokens is None else min(options.max_tokens, room),
            params=options.sampling_params(self.manifest.generation),
            num_draft_tokens=options.draft_limit(self.profile),
            prefill_chunk_tokens=self.profile.prefill_chunk_tokens,
            costs=loaded.costs if options.num_draft_tokens is None else None,
            sliding=sliding,
            fills_context=options.max_tokens is None or options.max_tokens > room,
            constraint=loaded.constraints.of(options, thinking=thinking),
        )
        scanner = ResponseScanner(loaded.tokenizer, options.stop, form)
        rng = np.random.default_rng(options.seed)
        return GenerationRun(self, request, rng, frozenset(eos_ids), scanner, waits=waits)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._open_or_raise().tokenizer.encode(prompt, add_bos=True) if prompt else []
        elif isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            raise RequestError(f"the prompt is {reprlib.repr(prompt)}, expected text or a list of token ids")
        ids = [_token_id(value, place, self.manifest.model.vocab_size) for place, value in enumerate(prompt)]
        if not ids:
            raise RequestError("the prompt is empty; pass at least one token")
        return ids


def _token_id(value: Any, place: int, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < vocab_size:
        raise RequestError(f"prompt token {place} is {reprlib.repr(value)}, expected an integer 0-{vocab_size - 1:,}")
    return int(value)
