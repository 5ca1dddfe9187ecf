"""Many threads, one runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from pic_rag.generation.turns import Turns


class Job:
    """Runs when told to; jobs of one kind go together."""

    def __init__(self, kind: str, error: Exception | None = None) -> None:
        self.kind = kind
        self.error = error
        self.started = self.finished = False
        self.thread: str | None = None


class Line:
    """A runner that records its groups and can be held."""

    def __init__(self, at_most: int = 8) -> None:
        self.groups: list[list[Job]] = []
        self.go = threading.Event()
        self.go.set()
        self.turns = Turns(self.run, lambda job, group: job.kind == group[0].kind and len(group) < at_most)
        self.threads = ThreadPoolExecutor(16)

    def run(self, group: list[Job]) -> None:
        self.groups.append(list(group))
        assert self.go.wait(10)
        for job in group:
            job.thread = threading.current_thread().name
            if job.error:
                raise job.error
        for job in group:
            job.finished = True

    def submit(self, jobs: Sequence[Job]) -> list[Future[None]]:
        """Every job in its own thread, in this order."""
        futures = []
        for job in jobs:
            known = len(self.turns._waiting) + len(self.groups)
            futures.append(self.threads.submit(self.turns.take, job))
            wait_for(lambda known=known: len(self.turns._waiting) + len(self.groups) > known)
        return futures

    def submit_behind(self, jobs: Sequence[Job]) -> list[Future[None]]:
        """The jobs wait in this order while another, the first one, is running."""
        self.go.clear()
        first = self.submit([Job("first")])
        return first + self.submit(jobs)


def wait_for(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def line() -> Line:
    return Line()


def test_a_lone_job_runs_in_its_callers_thread(line: Line) -> None:
    job = Job("a")
    line.turns.take(job)
    assert (job.finished, job.thread) == (True, threading.current_thread().name)


def test_jobs_that_wait_go_together_with_the_oldest_of_their_kind(line: Line) -> None:
    futures = line.submit_behind([Job("a"), Job("b"), Job("a"), Job("b"), Job("c")])
    line.go.set()
    for future in futures:
        future.result(10)
    assert [[job.kind for job in group] for group in line.groups] == [["first"], ["a", "a"], ["b", "b"], ["c"]]


def test_a_group_is_bounded() -> None:
    line = Line(at_most=2)
    futures = line.submit_behind([Job("a") for _ in range(5)])
    line.go.set()
    for future in futures:
        future.result(10)
    assert [len(group) for group in line.groups] == [1, 2, 2, 1]


def test_an_error_is_raised_only_where_it_belongs(line: Line) -> None:
    jobs = [Job("a"), Job("a", ValueError("bad job")), Job("a")]
    _, good, bad, fine = line.submit_behind(jobs)
    line.go.set()
    with pytest.raises(ValueError, match="bad job"):
        bad.result(10)
    assert [good.result(10), fine.result(10)] == [None, None]
    assert [len(group) for group in line.groups] == [1, 3, 1, 1, 1]


def test_a_started_job_is_not_run_again(line: Line) -> None:
    jobs = [Job("a"), Job("a", ValueError("bad job"))]
    jobs[0].started = True
    _, started, bad = line.submit_behind(jobs)
    line.go.set()
    for future in (started, bad):
        with pytest.raises(ValueError, match="bad job"):
            future.result(10)
    assert not jobs[0].finished


@pytest.mark.parametrize("step", ["_run", "_lead"])
def test_an_interrupt_is_for_the_thread_that_runs_and_the_others_go_on(line: Line, step: str) -> None:
    """Ctrl-C comes at any moment: while a group runs, or when it was taken out of the line and does not run yet."""
    jobs = [Job("a"), Job("a")]
    go_on = getattr(line.turns, step)

    def interrupt_first(group: list) -> None:
        if getattr(group[0], "request", group[0]) is jobs[0]:
            raise KeyboardInterrupt
        go_on(group)

    setattr(line.turns, step, interrupt_first)
    first, hit, other = line.submit_behind(jobs)
    line.go.set()
    assert [first.result(10), other.result(10)] == [None, None]
    with pytest.raises(KeyboardInterrupt):
        hit.result(10)
    assert [job.finished for job in jobs] == [False, True]
    line.turns.take(Job("b"))


def test_a_job_that_is_no_longer_wanted_is_not_run(line: Line) -> None:
    jobs = [Job("a"), Job("a")]
    _, gone, wanted = line.submit_behind(jobs)
    jobs[0].finished = True
    line.go.set()
    assert [gone.result(10), wanted.result(10)] == [None, None]
    assert line.groups[1:] == [[jobs[1]]]


def test_a_job_that_is_finished_early_lets_its_thread_go(line: Line) -> None:
    jobs = [Job("a"), Job("a")]
    _, leader, early = line.submit_behind(jobs)
    done = threading.Event()

    def finish_one(group: list[Job]) -> None:
        group[-1].finished = True
        line.turns.wake()
        assert done.wait(10)
        group[0].finished = True

    line.turns._run = finish_one  # the first job is running already
    line.go.set()
    early.result(10)
    assert not leader.done()
    done.set()
    leader.result(10)


def test_a_job_that_has_left_a_group_that_fails_holds_up_nobody(line: Line) -> None:
    """Its thread is gone: were it put back in line, nobody would take its turn."""
    jobs = [Job("a"), Job("a")]
    _, leader, gone = line.submit_behind(jobs)
    left = threading.Event()

    def fail(group: list[Job]) -> None:
        jobs[1].finished = True
        line.turns.wake()
        assert left.wait(10)
        raise ValueError("bad group")

    line.turns._run = fail
    line.go.set()
    gone.result(10)
    left.set()
    with pytest.raises(ValueError, match="bad group"):
        leader.result(10)
    line.turns._run = line.run
    later = Job("b")
    line.threads.submit(line.turns.take, later).result(10)
    assert later.finished
