"""The commands of `edge-chat`: what each does to the conversations of one runtime. Reads and prints nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.conversation import Conversation
from runtime.engine import Runtime
from runtime.errors import RequestError
from runtime.memory import memory_usage
from runtime.options import OptionArguments
from runtime.stream import Generation, GenerationStream

MIB = 1 << 20
DEFAULTS = OptionArguments(context_policy="slide")  # a chat is to go on


class Chat:
    """Conversations by number, one of them the present one."""

    def __init__(self, runtime: Runtime, given: OptionArguments) -> None:
        """`given` goes before the options of every conversation, those of a session file too."""
        self.last: Generation | None = None
        self.is_over = False
        self._runtime = runtime
        self._given = given
        self._conversations: dict[int, Conversation] = {}
        self._number = 0

    @property
    def conversation(self) -> Conversation:
        """The present one."""
        return self._conversations[self._number]

    def begin(self, system: str | None = None, *, thinking: bool = False) -> None:
        """Goes on in a new conversation."""
        options = DEFAULTS.copy()
        options.update(self._given)
        self._add(self._runtime.conversation(system=system, thinking=thinking, **options))

    def resume(self, path: str) -> None:
        """Goes on in a conversation from a session file; raises SessionError where it holds none."""
        self._add(self._runtime.resume(_path(path)))

    def stream(self, message: str) -> GenerationStream:
        """The answer to a message in the present conversation."""
        return self.conversation.stream(message, **self._given)

    def run(self, line: str) -> str:
        """Runs a command line, "/name argument"; returns what is to be said of it.

        Raises:
            EdgeError: there is no such command, or what it does cannot be done.
        """
        name, _, argument = line.removeprefix("/").partition(" ")
        if name not in COMMANDS:
            raise RequestError(f"unknown command /{name:.40}; /help lists them")
        command, argument = COMMANDS[name], argument.strip()
        if command.usage and not command.usage.startswith("[") and not argument:
            raise RequestError(f"/{name} needs {command.usage}")
        if argument and not command.usage:
            raise RequestError(f"/{name} takes nothing behind it, got {argument!r:.40}")
        return command.body(self, argument)

    def help(self, argument: str) -> str:
        """All commands."""
        rows = [(f"/{name} {command.usage}".strip(), command.effect) for name, command in COMMANDS.items()]
        width = max(len(usage) for usage, _ in rows)
        lines = [f"{usage:{width}}  {effect}" for usage, effect in rows]
        more = (
            'A message goes on behind a backslash at the end of a line, or between """ and """. Ctrl-C ends an answer.'
        )
        return "\n".join([*lines, more])

    def save(self, argument: str) -> str:
        """Writes a session file."""
        self.conversation.save(_path(argument))
        return f"saved {_count(self.conversation.messages)} to {argument}"

    def load(self, argument: str) -> str:
        """Resumes from a session file; the present conversation is kept."""
        before = self._number
        self.resume(argument)
        said = _count(self.conversation.messages)
        return f"loaded {said}; this is conversation {self._number}, /switch {before} goes back"

    def fork(self, argument: str) -> str:
        """Goes on in a copy."""
        before = self._number
        self._add(self.conversation.fork())
        return f"this is conversation {self._number}, /switch {before} goes back to where it began"

    def switch(self, argument: str) -> str:
        """Goes to another conversation, or lists them."""
        if argument:
            number = int(argument) if argument.isascii() and argument.isdigit() else 0
            if number not in self._conversations:
                known = ", ".join(map(str, self._conversations))
                raise RequestError(f"there is no conversation {argument!r:.40}, expected one of {known}")
            self._number = number
        rows = self._conversations.items()
        return "\n".join(f"{'*' if number == self._number else ' '} {number}: {_shown(one)}" for number, one in rows)

    def undo(self, argument: str) -> str:
        """Forgets the last message and its answer."""
        return f"forgot {_count(self.conversation.undo())}"

    def stats(self, argument: str) -> str:
        """Figures of the last answer, and what is taken."""
        memory = memory_usage()
        anonymous, mapped = memory.anonymous_bytes / MIB, memory.mapped_bytes / MIB
        answer = ["no answer yet"] if self.last is None else _figures(self.last)
        return "\n".join(
            [
                *answer,
                f"context   {self.conversation.num_tokens:,} of {self._runtime.context_tokens:,} tokens",
                f"memory    {anonymous:,.0f} MiB anonymous, {mapped:,.0f} MiB mapped",
            ]
        )

    def think(self, argument: str) -> str:
        """Lets the model think first, or not."""
        if argument not in ("on", "off"):
            raise RequestError(f"/think needs on or off, got {argument!r:.40}")
        self.conversation.thinking = argument == "on"
        return f"thinking is {argument}"

    def system(self, argument: str) -> str:
        """Shows or exchanges what stands before all messages."""
        present = self._system()
        if not argument:
            return "no system message" if present is None else present
        messages = [message for message in self.conversation.messages if message["role"] != "system"]
        self._replace(messages, argument)
        return "the system message is exchanged, for what was said already too"

    def reset(self, argument: str) -> str:
        """Forgets all but the system message."""
        self._replace([], self._system())
        return "the conversation is empty"

    def quit(self, argument: str) -> str:
        """Ends the chat."""
        self.is_over = True
        return ""

    def _add(self, conversation: Conversation) -> None:
        self._number = max(self._conversations, default=0) + 1
        self._conversations[self._number] = conversation

    def _replace(self, messages: Sequence[dict[str, Any]], system: str | None) -> None:
        present = self.conversation
        self._conversations[self._number] = self._runtime.conversation(
            system=system,
            messages=messages,
            thinking=present.thinking,
            tools=present.tools,
            **present.options,
        )

    def _system(self) -> str | None:
        first = self.conversation.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else None


@dataclass(frozen=True, slots=True)
class Command:
    """What a command takes, where it needs not in brackets, what it does, and how."""

    usage: str
    effect: str
    body: Callable[[Chat, str], str]


COMMANDS = {
    "help": Command("", "this list", Chat.help),
    "save": Command("FILE", "write the conversation to a file", Chat.save),
    "load": Command("FILE", "go on in the conversation of a file", Chat.load),
    "fork": Command("", "go on in a copy; the present conversation is kept under its number", Chat.fork),
    "switch": Command("[N]", "go to conversation N; alone, list them", Chat.switch),
    "undo": Command("", "forget the last message and its answer", Chat.undo),
    "stats": Command("", "speed, acceptance and memory of the last answer", Chat.stats),
    "think": Command("on|off", "whether the model thinks first", Chat.think),
    "system": Command("[TEXT]", "exchange the system message; alone, show it", Chat.system),
    "reset": Command("", "forget everything but the system message", Chat.reset),
    "quit": Command("", "end; so do Ctrl-D and Ctrl-C twice", Chat.quit),
}


def _figures(answer: Generation) -> list[str]:
    stats = answer.stats
    return [
        f"answer    {stats.num_generated_tokens:,} tokens, {stats.decode_tokens_per_second:.1f} tokens/s, the first "
        f"after {stats.time_to_first_token_ms:.0f} ms",
        f"drafts    {stats.num_accepted:,} of {stats.num_drafted:,} accepted ({stats.acceptance_rate:.0%})",
        f"prompt    {stats.num_reused_tokens:,} tokens reused, {stats.num_prefilled_tokens:,} prefilled, "
        f"{stats.num_dropped_tokens:,} dropped",
    ]


def _path(text: str) -> Path:
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def _count(messages: Sequence[Any]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _shown(conversation: Conversation) -> str:
    users = [str(message["content"]) for message in conversation.messages if message["role"] == "user"]
    last = f", last: {' '.join(users[-1].split())[:60]}" if users else ""
    return f"{_count(conversation.messages)}{last}"
