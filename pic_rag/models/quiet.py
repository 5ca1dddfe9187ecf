"""Other libraries' bars and warnings while we load models: they follow the rule of our own.

transformers draws a bar for every load, on a terminal or not, and peft warns of names that transformers is about to
change: neither is anything a user of pic-rag can act on.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_one_at_a_time = threading.RLock()  # what is changed below is the process's


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Bars on a terminal only and after a second, no FutureWarnings; then all is as before. One thread at a time."""
    from transformers.utils.logging import set_tqdm_hook

    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        previous = set_tqdm_hook(_bar)
        try:
            yield
        finally:
            set_tqdm_hook(previous)


def _bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - tqdm, or its empty twin
    return factory(*args, **{"disable": None, "delay": 1.0, **kwargs})
