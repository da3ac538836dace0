"""`edge-chat`: a chat in the terminal, or with messages from a pipe."""

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Self

from edge.chat_commands import Chat
from edge.command import CommandParser, report_error, run_command
from edge.generation_arguments import add_device_arguments, add_generation_arguments, given_options
from edge.terminal import Terminal
from runtime.engine import Runtime
from runtime.errors import EdgeError
from runtime.stream import Generation, GenerationStream

NAME = "edge-chat"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(NAME, lambda: _chat(options))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog=NAME, description="Chat with an edge artifact; /help lists commands.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder made by edge-export")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--system", metavar="TEXT", help="what stands before all messages")
    start.add_argument("--resume", metavar="FILE", help="go on in a conversation that /save wrote")
    parser.add_argument("--think", action="store_true", help="let the model think first")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="tokens of thoughts at most (default: any)")
    add_generation_arguments(parser, context_policy="slide")
    add_device_arguments(parser)
    return parser


def _chat(options: argparse.Namespace) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer refuses what is no text, in one line
    with Runtime.load(options.artifact, profile=options.profile, memory_budget=options.memory_budget) as runtime:
        chat = Chat(runtime, given_options(options))
        if options.resume is None:
            chat.begin(options.system, thinking=options.think)
        else:
            chat.resume(options.resume)
            chat.conversation.thinking |= options.think
        terminal = Terminal()
        if terminal.is_interactive:
            terminal.note("/help lists commands, Ctrl-D ends")
        with _Interrupts() as interrupts:
            _talk(chat, terminal, interrupts)


def _talk(chat: Chat, terminal: Terminal, interrupts: "_Interrupts") -> None:
    """Until the end of input, /quit, or a second Ctrl-C where there is no answer to end."""
    has_interrupted = False
    while not chat.is_over:
        try:
            if not _turn(chat, terminal, interrupts):
                break
            has_interrupted = False
        except KeyboardInterrupt:
            if not terminal.is_interactive:
                raise
            print()
            if has_interrupted:
                break
            has_interrupted = True
            terminal.note("Ctrl-C again, or Ctrl-D, ends the chat")


def _turn(chat: Chat, terminal: Terminal, interrupts: "_Interrupts") -> bool:
    """Serves one entry; False at the end of input."""
    entry = terminal.read()
    if entry is None:
        if terminal.is_interactive:
            print()
        return False
    try:
        if entry.is_command:
            if said := chat.run(entry.text):
                terminal.note(said)
        elif entry.text.strip():
            _answer(chat, terminal, interrupts, entry.text)
    except EdgeError as error:
        report_error(NAME, str(error))
    return True


def _answer(chat: Chat, terminal: Terminal, interrupts: "_Interrupts", message: str) -> None:
    # another thread draws: signals are served by this one, which would be in a forward else
    with ThreadPoolExecutor(1) as drawing, chat.stream(message) as stream:
        interrupts.stream = stream
        try:
            while (piece := drawing.submit(next, stream, None).result()) is not None:
                terminal.piece(piece)
        finally:
            interrupts.stream = None
            terminal.end_answer()
        chat.last = stream.finish()
    for said in _remarks(chat.last):
        terminal.note(said)


def _remarks(answer: Generation) -> list[str]:
    """What the text alone does not tell."""
    calls = [f"[calls {call.name}({call.arguments}), which is not run here]" for call in answer.tool_calls]
    if answer.finish_reason == "cancelled":
        return [*calls, "[cancelled]" if answer.token_ids else "[cancelled before it began; the message is not kept]"]
    if answer.finish_reason == "length":
        full = "[the context is full; /undo, /reset, or --context-policy slide]"
        return [*calls, full if answer.context_full else "[--max-tokens reached]"]
    return calls


class _Interrupts:
    """Ctrl-C while it is entered: cancels `stream`, the answer in progress, or else raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.stream: GenerationStream | None = None

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # else it is ignored, or another's
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.stream is None:
            raise KeyboardInterrupt
        self.stream.cancel()


if __name__ == "__main__":
    sys.exit(main())
