"""Forks: a lock that no child inherits from another thread.

A child has only the thread that forked. A lock that another one held at that moment stays locked in it for good, so
every store's lock is held over every fork. Standard library only.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref


class SurvivesForks:
    """Base of a store with a lock, `_lock`: whoever forks waits until no other thread holds it."""

    def __init__(self) -> None:
        """Make the lock."""
        self._lock = threading.RLock()
        _survive_forks()
        with _forking:
            _stores.add(self)

    def _before_fork(self) -> None:
        """Let go of what a child must not inherit; the lock is held."""


_stores: weakref.WeakSet[SurvivesForks] = weakref.WeakSet()
_forking = threading.Lock()  # so that of two threads that fork at once neither lets go of the other's locks
_held: list[SurvivesForks] = []  # while a thread forks


@functools.cache
def _survive_forks() -> None:
    """See to every fork from now on, once; Windows has none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)


def _before() -> None:
    _forking.acquire()
    for store in list(_stores):
        store._lock.acquire()
        _held.append(store)
        store._before_fork()


def _after() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()
