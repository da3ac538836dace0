"""What the command lines share: one line for an error a user can mend, exit codes, signals."""

import sys
from collections.abc import Callable

from profiles import ProfileError
from runtime.errors import EdgeError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def run_command(name: str, body: Callable[[], None]) -> int:
    """Runs a command; a user's error becomes one line on standard error, a bug keeps its traceback."""
    try:
        body()
    except (EdgeError, ProfileError) as error:
        return _fail(name, str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; say nothing
        return EXIT_ERROR
    except OSError as error:
        return _fail(name, f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail(name, "interrupted")
        return EXIT_INTERRUPTED
    return 0


def _fail(name: str, message: str) -> int:
    line = " ".join(message.split())
    print(f"{name}: {line}", file=sys.stderr)
    return EXIT_ERROR
