"""Progress bars, silent where standard error is no terminal."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

from tqdm import tqdm

__all__ = ["progress_bar", "stages"]


def progress_bar(what: str, total: int, done: int = 0, shown: bool = True) -> "tqdm[NoReturn]":
    """Return a bar on standard error that appears after two seconds; never where it is not to be `shown`."""
    return tqdm(desc=what, total=total, initial=done, disable=None if shown else True, delay=2, dynamic_ncols=True)


@contextlib.contextmanager
def stages(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback (done, total, stage); every new stage gets a bar of its own."""
    bar: tqdm[NoReturn] | None = None
    current = None

    def progress(done: int, total: int, stage: str) -> None:
        nonlocal bar, current
        if bar is None or stage != current:
            if bar is not None:
                bar.close()
            bar, current = progress_bar(f"{what}: {stage}", total), stage
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
