"""edge-chat: scripts of messages and commands through a pipe, and Ctrl-C through a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge import chat_cli
from edge.terminal import DIM, PLAIN, Entry, Terminal
from runtime.response import Piece
from runtime.stream import GenerationStream
from tests.commands import Capture, assert_fails, run

ROOT = Path(__file__).parents[2]
SHORT = ["--max-tokens", "8", "--temperature", "0"]
Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def artifact(demo_artifact: Callable[..., Path]) -> Path:
    return demo_artifact(4)


@pytest.fixture
def script(artifact: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> Script:
    """script(text, *options): exit code, standard output and error of a chat that is given this text."""

    def chat(text: str, *options: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = run(chat_cli.main, [artifact, *SHORT, *options])
        return code, *capfd.readouterr()

    return chat


# Scripts


def test_messages_from_a_pipe_are_answered_without_prompts(script: Script) -> None:
    code, out, err = script("Hello\n\nHow are you?")
    assert (code, err) == (0, "")
    assert out.count("[--max-tokens reached]\n") == 2
    assert "> " not in out
    assert "\x1b" not in out


def test_the_end_of_input_ends_the_chat(script: Script) -> None:
    assert script("") == (0, "", "")
    assert script("/quit\nHello\n") == (0, "", "")


def test_an_answer_goes_on_from_what_is_cached(script: Script) -> None:
    _, out, _ = script("/stats\nHello\nHow are you?\n/stats\n")
    assert out.startswith("no answer yet\ncontext   0 of 1,024 tokens\n")
    match = re.search(r"answer +8 tokens, ([\d.]+) tokens/s.*\ndrafts +\d+ of \d+ acc.*\nprompt +(\d+) tokens reu", out)
    assert match
    assert float(match[1]) > 0
    assert int(match[2]) > 8
    assert re.search(r"context   \d\d of 1,024 tokens\nmemory    \d+ MiB anonymous, \d+ MiB mapped\n$", out)


def test_lines_that_go_on(script: Script) -> None:
    _, out, _ = script('first \\\nsecond\n/switch\n"""/third\n  fourth"""\n/switch\n"""fifth"""\n/switch\n"""open')
    assert re.findall("last: (.*)", out) == ["first second", "/third fourth", "fifth"]
    assert out.count("[--max-tokens reached]\n") == 4


def test_undo_makes_the_answer_again(script: Script) -> None:
    _, out, _ = script("Hello\n/undo\nHello\n")
    first, again = re.split(r"\[--max-tokens reached\]\n(?:forgot 2 messages\n)?", out)[:2]
    assert first == again != ""


def test_forks_go_their_own_ways(script: Script) -> None:
    _, out, err = script("Hello\n/fork\nBye\n/switch 1\n/undo\n/switch 2\n/switch\n/switch 3\n/switch x\n")
    assert "this is conversation 2, /switch 1 goes back" in out
    assert "* 1: 2 messages, last: Hello\n  2: 4 messages, last: Bye\n" in out
    assert out.endswith("  1: 0 messages\n* 2: 4 messages, last: Bye\n" * 2)
    assert err.splitlines() == [
        "edge-chat: there is no conversation '3', expected one of 1, 2",
        "edge-chat: there is no conversation 'x', expected one of 1, 2",
    ]


def test_a_saved_conversation_goes_on(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "a chat.edge"
    code, out, err = script(f"Hello\n/save {file}\nBye\n/load {file}\nBye\n/switch\n", "--system", "Be brief.")
    assert (code, err) == (0, "")
    assert f"saved 3 messages to {file}\n" in out
    assert "loaded 3 messages; this is conversation 2, /switch 1 goes back\n" in out
    assert "  1: 5 messages, last: Bye\n* 2: 5 messages, last: Bye\n" in out
    answers = re.split(r"\[--max-tokens reached\]\n", out)
    assert answers[1].rpartition("\n")[0].endswith(answers[2].partition("goes back\n")[2].rstrip("\n"))
    _, out, _ = script("/system\nBye\n/stats\n", "--resume", file)
    assert out.startswith("Be brief.\n")
    reused = re.search(r"prompt +(\d+) tokens reused, (\d+) prefilled", out)
    assert reused
    assert int(reused[1]) > int(reused[2])


def test_a_system_message_is_exchanged(script: Script, tmp_path: Path) -> None:
    text = (
        f"/system\n/system Be kind.\n/save {tmp_path / 'empty'}\nHello\n/system Be brief.\n/system\n/switch\n/reset\n"
    )
    code, out, err = script(f"{text}/switch\n/system\n")
    assert (code, err) == (0, "")
    assert out.startswith("no system message\nthe system message is exchanged")
    assert out.endswith(
        "Be brief.\n* 1: 3 messages, last: Hello\nthe conversation is empty\n* 1: 1 message\nBe brief.\n"
    )


def test_thinking_is_switched(script: Script) -> None:
    code, out, err = script("/think on\nHello\n/think off\n/think maybe\n", "--think", "--thinking-budget", 4)
    assert code == 0
    assert out.startswith("thinking is on\n")
    assert out.endswith("thinking is off\n")
    assert err == "edge-chat: /think needs on or off, got 'maybe'\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "unknown command /nonsense; /help lists them"),
        ("/save", "/save needs FILE"),
        ("/save /none/chat", "/none/chat: /none is not a folder; create it or save elsewhere"),
        ("/load /none", "/none cannot be read: No such file"),
        ("/undo", "the conversation has no user's message to undo"),
        ("/quit now", "/quit takes nothing behind it, got 'now'"),
        ("word " * 2000, "the prompt has [0-9,]+ tokens"),
        ("\udcff", "character [0-9]+ is a lone surrogate"),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on(script: Script, line: str, message: str) -> None:
    code, out, err = script(f"{line}\n/think on\n")
    assert (code, out) == (0, "thinking is on\n")
    assert re.search(f"^edge-chat: .*{message}", err)
    assert err.count("\n") == 1


def test_help_lists_every_command(script: Script) -> None:
    _, out, _ = script("/help\n")
    commands = ["help", "save", "load", "fork", "switch", "undo", "stats", "think", "system", "reset", "quit"]
    assert re.findall(r"^/(\w+)", out, re.MULTILINE) == commands


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--resume", "/none"], "^edge-chat: /none cannot be read: "),
        (["--resume", "a", "--system", "b"], "argument --system: not allowed with argument --resume"),
        (["--profile", "labtop"], "unknown profile 'labtop'"),
    ],
)
def test_what_cannot_be_started(artifact: Path, options: list[str], match: str, capfd: Capture) -> None:
    assert_fails(chat_cli.main, [artifact, *options], match, capfd)
    assert_fails(chat_cli.main, ["/none"], "^edge-chat: /none", capfd)


@pytest.mark.parametrize(("redirection", "code"), [("<&-", 0), ("</dev/null >&-", 0), ("2>&1 >/dev/full", 1)])
def test_standard_streams_that_are_not_there(artifact: Path, redirection: str, code: int) -> None:
    command = f"echo /help | {{ '{sys.executable}' -m edge.chat_cli '{artifact}' {redirection}; }}"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (code, "")
    assert result.stdout == ("edge-chat: input/output: No space left on device\n" if code else "")


# Dimmed thoughts


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, **environment: str) -> str:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    terminal = Terminal()
    for text, kind in (("why", "thinking"), (" not", "thinking"), ("be\x1b[2Jcause", "text")):
        terminal.piece(Piece(text, kind))  # type: ignore[arg-type]
    terminal.end_answer()
    terminal.note("[cancelled]")
    return out.getvalue()


def test_thoughts_are_dimmed_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "<thinking>\nwhy not\n</thinking>\nbe{}[2Jcause\n[cancelled]\n"
    assert shown(monkeypatch, io.StringIO()) == marked.format("\x1b")
    for off in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert shown(monkeypatch, FakeTerminal(), **off) == marked.format("")
    dimmed = f"{DIM}why not{PLAIN}\nbe[2Jcause\n{DIM}[cancelled]{PLAIN}\n"
    assert shown(monkeypatch, FakeTerminal(), NO_COLOR="") == dimmed


def test_what_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('a\\\n/b\n/c d\n"""\n/e\n"""\n""""""\nf\\'))
    entries = list(iter(Terminal().read, None))
    assert entries == [
        Entry("a\n/b", False),
        Entry("/c d", True),
        Entry("\n/e\n", False),
        Entry("", False),
        Entry("f\n", False),
    ]


# Ctrl-C


def test_ctrl_c_does_not_wait_for_the_forward(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    is_cancelled = threading.Event()
    draw = GenerationStream.__next__

    def long_forward(stream: GenerationStream) -> Piece:
        is_in_forward.set()
        assert is_cancelled.wait(30)
        return draw(stream)

    def interrupt() -> None:
        assert is_in_forward.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    is_in_forward = threading.Event()
    monkeypatch.setattr(GenerationStream, "__next__", long_forward)
    monkeypatch.setattr(GenerationStream, "cancel", lambda stream: (stream._run.cancel(), is_cancelled.set()))
    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, err = script("Hello\n/switch\n")
    thread.join()
    assert (code, err) == (0, "")
    assert out == "[cancelled before it began; the message is not kept]\n* 1: 0 messages\n"


# The chat with a model that knows no end: an answer is as long as the context.
ENDLESS = """if True:
    import sys
    from edge import Runtime, chat_cli
    load = Runtime.load
    def endless(*arguments, **options):
        runtime = load(*arguments, **options)
        runtime.manifest.generation["eos_token_ids"] = []
        return runtime
    Runtime.load = endless
    sys.exit(chat_cli.main())
"""


class Typist:
    """A chat in a terminal of its own."""

    def __init__(self, artifact: Path, *options: str) -> None:
        self._master, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(artifact), *options],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb", "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: os.login_tty(0),
        )
        os.close(terminal)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C a moment after the prompt: Python's line editor misses what comes just before it begins to wait."""
        self.expect("> ")
        self.type("x")
        self.expect("x")
        time.sleep(0.3)
        self.type("\x03")

    def expect(self, pattern: str) -> str:
        """What the chat shows up to where this matches."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self._seen, re.DOTALL)):
            assert time.monotonic() < deadline, self._seen
            if select.select([self._master], [], [], 1)[0]:
                self._seen += self._read()
        seen, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return seen

    def finish(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + 60
        while (code := self.process.poll()) is None and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.05)[0]:
                self._seen += self._read()
        assert code is not None, self._seen
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> str:
        try:
            return os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            time.sleep(0.05)
            return ""


@pytest.fixture
def typist(artifact: Path) -> Iterator[Typist]:
    typist = Typist(artifact, "--num-draft-tokens", "0", "--seed", "1")
    yield typist
    typist.close()


def test_ctrl_c_ends_the_answer_and_not_the_chat(typist: Typist) -> None:
    typist.expect("Ctrl-D ends\r\n> ")
    typist.type("Hello\n")
    typist.expect(r"Hello\r\n\S[^\n]{4}")
    typist.type("\x03")
    typist.expect(r"\[cancelled\]\r\n> ")
    typist.type("/switch\n")
    typist.expect(r"\* 1: 2 messages, last: Hello\r\n> ")  # the partial answer stays
    typist.type("/stats\n")
    assert re.search(r"answer +\d{1,3} tokens", typist.expect("MiB mapped\r\n> "))
    typist.type("Bye\n")
    typist.expect(r"Bye\r\n\S[^\n]{4}")
    typist.type("\x03")
    typist.expect(r"\[cancelled\]\r\n> ")
    typist.type("\x04")
    assert typist.finish() == 0


def test_ctrl_c_twice_where_there_is_no_answer_ends_the_chat(typist: Typist) -> None:
    typist.interrupt_prompt()
    typist.expect("Ctrl-C again, or Ctrl-D, ends the chat\r\n> ")
    typist.type("/undo\n")
    typist.expect("no user's message to undo\r\n")
    typist.interrupt_prompt()
    typist.expect("Ctrl-C again, or Ctrl-D, ends the chat\r\n")
    typist.interrupt_prompt()
    assert typist.finish() == 0
