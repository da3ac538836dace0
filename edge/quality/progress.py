"""Progress of a measurement on a terminal: a bar for each of its stages, as the export has one."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from edge.quality.measure import Progress


@contextmanager
def stage_bars(*, is_quiet: bool) -> Iterator[Progress]:
    """Yields what hears of a stage what is done of how much; a stage's first call opens its bar, the last closes it."""
    disable = True if is_quiet else None  # None: off where standard error is no terminal
    bars: dict[str, tqdm] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, disable=disable)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars.pop(stage).close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
