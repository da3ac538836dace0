"""What the command lines share: one line for an error a user can mend, exit codes, signals, output that breaks off."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from profiles import ProfileError
from runtime.errors import EdgeError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
MAX_LINE_CHARS = 2000  # a message may quote a file's content


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 1, as those of the command itself."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        sys.exit(report_error(self.prog, f"{message}; see {self.prog} --help"))


def run_command(name: str, body: Callable[[], None]) -> int:
    """Runs a command; a user's error becomes one line on standard error, a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        body()
        print(end="", flush=True)  # here, where it can still be told that the disk is full
    except (EdgeError, ProfileError) as error:
        return report_error(name, str(error))
    except BrokenPipeError:
        _drop_output()
        return EXIT_ERROR  # the reader of our output has gone; say nothing
    except OSError as error:
        _drop_output()
        return report_error(name, f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        report_error(name, "interrupted")
        return EXIT_INTERRUPTED
    except SystemExit as ending:
        if ending.code == EXIT_TERMINATED:
            report_error(name, "terminated")
        raise
    return 0


def _drop_output() -> None:
    """Sends what is still buffered nowhere; the interpreter would try to write it again, and complain, as it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_error(name: str, message: str) -> int:
    """Prints one line on standard error; returns the exit code."""
    line = " ".join(message.split())
    print(f"{name}: {line[:MAX_LINE_CHARS]}", file=sys.stderr)
    return EXIT_ERROR
