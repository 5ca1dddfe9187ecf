"""What keeps a run whole: one writer a folder, no interrupt inside a step or a save, no weights that are no numbers."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from pic_rag.training.config import TrainConfig

LOCK_FILE = "run.lock"
_LOCK_TIMEOUT_S = 10.0  # workers of a run that was killed may hold its lock until they notice


@contextmanager
def sole_writer(out: Path, *, main_process: bool) -> Iterator[None]:
    """Hold a run's folder, which is made if it is not there; of several devices' processes the main one does.

    Raises:
        ValueError: when another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE, timeout=_LOCK_TIMEOUT_S)
    try:
        if main_process:
            lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"out must be a folder that no other run writes to, got {str(out)!r}: another run is writing here. "
            "Wait for it, or choose another out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def launched(accelerator: Accelerator) -> int:
    """Processes that a launcher started together, this one included, whether they train together or not."""
    return max(accelerator.num_processes, int(os.environ.get("WORLD_SIZE") or 1))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until a step is taken, or a checkpoint written; a second one ends the process at once."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in own.items() if callable(handler)}
    came: list[int] = []

    def hold_back(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in handlers:
        signal.signal(number, hold_back)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send, does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def ignore_interrupts(_: int) -> None:
    """In a worker of a `DataLoader`: signals reach it too, and it is the main process that says when to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def room_for_workers() -> Iterator[None]:
    """Raise OSError that says what to do where shared memory is too full for the workers of a `DataLoader`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            "Shared memory (/dev/shm) must have room for the workers that build batches, got none left. "
            "Set workers: 0 in the configuration, or enlarge it."
        ) from error


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all values are; the device is waited for once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def require_finite(what: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless all values are finite; the message names the tensor."""
    for name, tensor in weights.items():
        if not are_finite([tensor]):
            raise ValueError(
                f"{what} must hold finite weights, got others in {name!r}: its training diverged. "
                "Train it again with a lower learning_rate."
            )


def diverged(what: str, step: int, config: TrainConfig) -> ValueError:
    """The error of a run whose loss, gradient or weights are no numbers any more."""
    return ValueError(
        f"learning_rate must be low enough for {what} to stay finite, got {config.learning_rate:g}: at step {step} "
        f"they are not. Lower it and choose another out; the last checkpoint in {config.out!r}, if any, is kept."
    )
