"""Turns: many threads, one runner. Who is next runs for all who wait and may be run together with it.

There is no thread of its own: a lone caller runs in its own thread, as if there were no queue. This file knows threads;
it does not know what is run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Request(Protocol):
    """What a thread wants to have run."""

    @property
    def started(self) -> bool:
        """Whether something of it is out already, so that it cannot be run again."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: done, or no longer wanted."""


R = TypeVar("R", bound=Request)


class _Ticket(Generic[R]):
    def __init__(self, request: R) -> None:
        self.request = request
        self.alone = False  # a group it was in has failed
        self.done = False
        self.error: Exception | None = None

    @property
    def settled(self) -> bool:
        return self.done or self.request.finished


class Turns(Generic[R]):
    """Requests of many threads, run one group at a time, the oldest first.

    Args:
        run: runs a group until every request in it is finished. A request may be finished before the others; after
            `wake` its thread goes on at once, unless it is the one that runs the group.
        joins: whether a request may be run together with a group, which is never empty.
    """

    def __init__(self, run: Callable[[list[R]], None], joins: Callable[[R, Sequence[R]], bool]) -> None:
        self._run = run
        self._joins = joins
        self._lock = threading.Lock()  # taken as it is: an interrupt could fall into the condition's own `with`
        self._changed = threading.Condition(self._lock)
        self._waiting: list[_Ticket[R]] = []
        self._group: list[_Ticket[R]] = []  # that runs now; the first one's thread runs it

    def take(self, request: R) -> None:
        """Wait for a turn, and return when the request is finished.

        A group that fails is run again one request at a time, but for those that have started: an error is raised
        where it belongs.

        Raises:
            Exception: what `run` raised for this request.
        """
        ticket = _Ticket(request)
        try:
            with self._lock:
                self._waiting.append(ticket)
            while not ticket.settled:
                if group := self._wait(ticket):
                    self._lead(group)
        finally:
            self._leave(ticket)
        if ticket.error is not None:
            raise ticket.error

    def wake(self) -> None:
        """Tell waiting threads that a request is finished."""
        with self._lock:
            self._changed.notify_all()

    def _leave(self, ticket: _Ticket[R]) -> None:
        """Wait and lead no more, wherever the thread was interrupted."""
        with self._lock:
            if self._group[:1] == [ticket]:
                self._waiting[:0] = [other for other in self._group if not other.settled and other not in self._waiting]
                self._group = []
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    def _wait(self, ticket: _Ticket[R]) -> list[_Ticket[R]]:
        """The group to run; empty when the ticket was settled by another thread meanwhile."""
        with self._lock:
            self._changed.wait_for(lambda: ticket.settled or (not self._group and self._waiting[0] is ticket))
            if ticket.settled:
                return []
            group = [ticket]
            for other in self._waiting[1:]:
                if self._may_join(other, group):
                    group.append(other)
            self._waiting, self._group = [other for other in self._waiting if other not in group], group
            return group

    def _may_join(self, other: _Ticket[R], group: Sequence[_Ticket[R]]) -> bool:
        if other.settled or other.alone or group[0].alone:
            return False
        return self._joins(other.request, [ticket.request for ticket in group])

    def _lead(self, group: list[_Ticket[R]]) -> None:
        try:
            self._run([ticket.request for ticket in group])
            self._settle(group)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt is for this thread, whose caller sees it
                self._settle(group, RuntimeError("The thread that ran this request was interrupted. Ask again."))
                raise
            self._settle(group, error)
        finally:
            with self._lock:
                self._group = []
                self._changed.notify_all()

    def _settle(self, group: list[_Ticket[R]], error: Exception | None = None) -> None:
        """Mark a group as done, but for requests that have a second try after an error."""
        with self._lock:
            again = [
                ticket
                for ticket in group
                # one that is no longer wanted may have no thread any more that would take its turn
                if error and len(group) > 1 and not ticket.request.started and not ticket.request.finished
            ]
            self._waiting[:0] = again
            for ticket in group:
                ticket.alone = ticket in again
                ticket.done = not ticket.alone
                ticket.error = None if ticket.alone or ticket.request.finished else error
