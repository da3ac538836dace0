"""A chat window that stays responsive: the runtime works in a thread, and the window polls a queue of what it says.

python -m edge.examples.chat_window ARTIFACT
"""

import argparse
import queue
import threading
import tkinter as tk
from collections.abc import Sequence
from tkinter.scrolledtext import ScrolledText

import edge

POLL_MS = 15
MIB = 1 << 20


Event = edge.Piece | edge.Generation | edge.EdgeError | edge.ProfileError | None


class Worker:
    """The runtime and one conversation in a thread of their own, with a queue of messages and one of events.

    Events are: None once the model is loaded; for each message pieces and the result, or an error instead.
    """

    def __init__(self, artifact: str, options: edge.OptionArguments) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stream: edge.GenerationStream | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, args=(artifact, options))
        self._thread.start()

    def send(self, message: str) -> None:
        """Asks for the answer to a message; one at a time."""
        self._is_stopped = False
        self._messages.put(message)

    def stop(self) -> None:
        """Ends the answer in progress; what was said so far stays in the conversation."""
        self._is_stopped = True
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Ends the answer in progress and frees the runtime."""
        self._messages.put(None)
        self.stop()
        self._thread.join()

    def _run(self, artifact: str, options: edge.OptionArguments) -> None:
        try:
            with edge.Runtime.load(artifact) as runtime:
                conversation = runtime.conversation(**options)
                self.events.put(None)
                while (message := self._messages.get()) is not None:
                    self._answer(conversation, message)
        except (edge.EdgeError, edge.ProfileError) as error:
            self.events.put(error)

    def _answer(self, conversation: edge.Conversation, message: str) -> None:
        try:
            with conversation.stream(message) as stream:
                self._stream = stream
                if self._is_stopped:  # before there was a stream to cancel
                    stream.cancel()
                for piece in stream:
                    self.events.put(piece)
                self.events.put(stream.finish())
        except edge.EdgeError as error:
            self.events.put(error)


class ChatWindow:
    """Text, an entry, two buttons and a status line. All of it is touched by the main thread alone."""

    def __init__(self, root: tk.Tk, worker: Worker) -> None:
        self.root = root
        self.worker = worker
        self._is_loaded = False
        root.title("gemma-edge")
        self.status = tk.StringVar(value="loading ...")
        tk.Label(root, textvariable=self.status, anchor="w").pack(side="bottom", fill="x")
        row = tk.Frame(root)
        row.pack(side="bottom", fill="x")
        self.entry = tk.Entry(row)
        self.entry.pack(side="left", fill="x", expand=True)
        self.entry.bind("<Return>", lambda event: self.send())
        self.send_button = tk.Button(row, text="Send", command=self.send, state="disabled")
        self.stop_button = tk.Button(row, text="Stop", command=worker.stop, state="disabled")
        self.send_button.pack(side="left")
        self.stop_button.pack(side="left")
        self.text = ScrolledText(root, wrap="word", state="disabled")
        self.text.tag_configure("thinking", foreground="gray")
        self.text.tag_configure("user", font=("TkDefaultFont", 10, "bold"))
        self.text.pack(side="top", fill="both", expand=True)
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._polling = root.after(POLL_MS, self._poll)

    def send(self) -> None:
        """Sends what was entered, unless an answer is in progress or the model is not loaded yet."""
        message = self.entry.get().strip()
        if message and self.send_button["state"] == "normal":
            self.entry.delete(0, "end")
            self._append(f"{message}\n", "user")
            self._allow(self.stop_button)
            self.worker.send(message)

    def close(self) -> None:
        """Ends the answer and closes the window."""
        self.worker.stop()
        self.root.after_cancel(self._polling)
        self.root.destroy()

    def _poll(self) -> None:
        for _ in range(self.worker.events.qsize()):  # not what comes meanwhile, which may be as fast as this
            self._show(self.worker.events.get())
        self._polling = self.root.after(POLL_MS, self._poll)

    def _show(self, event: Event) -> None:
        if isinstance(event, edge.Piece):
            self._append(event, event.kind)
            return
        if event is None:
            self._is_loaded = True
            self.status.set("ready")
        elif isinstance(event, edge.Generation):
            self._append("\n\n", "text")
            self.status.set(_figures(event))
        else:
            self.status.set(str(event))
        self._allow(self.send_button if self._is_loaded else None)

    def _append(self, text: str, tag: str) -> None:
        self.text.configure(state="normal")
        self.text.insert("end", text, tag)
        self.text.configure(state="disabled")
        self.text.see("end")

    def _allow(self, allowed: tk.Button | None) -> None:
        for button in (self.send_button, self.stop_button):
            button.configure(state="normal" if button is allowed else "disabled")


def _figures(answer: edge.Generation) -> str:
    stats = answer.stats
    return (
        f"{answer.finish_reason}: {stats.num_generated_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s, "
        f"{stats.acceptance_rate:.0%} of drafts accepted, {stats.peak_anonymous_bytes / MIB:.0f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="A chat window over an edge artifact.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder made by edge-export")
    options = parser.parse_args(arguments)
    root = tk.Tk()
    worker = Worker(options.artifact, {"context_policy": "slide"})
    try:
        ChatWindow(root, worker)
        root.mainloop()
    finally:
        worker.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
