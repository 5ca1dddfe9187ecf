"""A run: every case once in each repetition, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch

from pic_rag.benchmark.cases import Case, CaseTimer, Sample
from pic_rag.benchmark.compression import measure_compression
from pic_rag.benchmark.measure import hardware, kv_bytes, load_average
from pic_rag.benchmark.report import Repetition, Report, make_rows
from pic_rag.benchmark.splice import measure_splice
from pic_rag.benchmark.suite import Suite
from pic_rag.benchmark.workload import Workload
from pic_rag.evaluation.lingua import LinguaError
from pic_rag.evaluation.shortening import Shortener
from pic_rag.evaluation.systems import LINGUA_SYSTEMS, RATIO_SYSTEMS, Systems
from pic_rag.progress import progress_bar
from pic_rag.questions import Question
from pic_rag.reporting import versions

SPLICE_RATIO = 16


def benchmark(systems: Systems, suite: Suite, *, minutes: float | None = None, progress: bool | None = None) -> Report:
    """Measure everything that a suite names.

    Args:
        systems: over the compressor and its generator, on the device to be measured.
        suite: what to measure, and how often.
        minutes: begin no case after that long; the report says what was left out. None: there is time for all.
        progress: True shows a bar, False none; None shows one on a terminal once it takes over a second.

    Raises:
        ValueError: when the compressor does not serve a ratio.
    """
    for ratio in suite.ratios:
        systems.compressor.config.check_ratio(ratio)
    stop = math.inf if minutes is None else time.monotonic() + 60 * minutes
    workload = Workload(Shortener(systems.plain.tokenizer))
    load = load_average()
    cases = list(plan(suite))
    compression = measure_compression(systems.compressor, workload, suite.ratios, suite.compress_tokens, suite.repeats)
    splice = measure_splice(systems, workload, SPLICE_RATIO if SPLICE_RATIO in suite.ratios else suite.ratios[0])
    repetitions = _repeat(CaseTimer(systems, suite.new_tokens), suite, cases, workload, stop, progress)
    model = systems.plain.model
    device = torch.device(model.device)
    rows = list(make_rows(repetitions, cases, new_tokens=suite.new_tokens, kv_bytes=kv_bytes(model)))
    config: dict[str, Any] = {
        **asdict(suite),
        "generator": systems.reading.model_id,
        "fingerprint": systems.compressor.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "pic": systems.compressor.config.to_dict(),
    }
    return Report(
        rows=rows,
        compression=compression,
        splice=splice,
        config=config,
        hardware={**hardware(device), "load_before": load, "load_after": load_average()},
        versions={**versions(), **_lingua_versions(systems, suite)},
    )


def plan(suite: Suite) -> Iterator[Case]:
    """All cases of a suite; full text before what is compared with it."""
    for batch_size in suite.batch_sizes:
        for context_tokens in suite.contexts:
            for system in dict.fromkeys(("text", *suite.systems)):
                for ratio in suite.ratios if system in RATIO_SYSTEMS else (None,):
                    yield Case(system, ratio, context_tokens, batch_size)


def _lingua_versions(systems: Systems, suite: Suite) -> dict[str, str]:
    """Of LLMLingua and what it runs on, if it runs."""
    for name in LINGUA_SYSTEMS.keys() & suite.systems:
        try:
            return {f"llmlingua's {package}": known for package, known in systems.lingua(name).versions.items()}
        except LinguaError:
            continue
    return {}


def _repeat(
    timer: CaseTimer, suite: Suite, cases: list[Case], workload: Workload, stop: float, progress: bool | None
) -> list[Repetition]:
    """Measure all cases, again and again until `stop`; those that cannot be answered, or take long, once."""
    again = set(cases)
    repetitions: list[Repetition] = []
    with progress_bar(progress, total=len(cases) * suite.repeats, desc="bench", unit="case") as bar:
        _warm_up(timer, suite, cases, workload)
        for _ in range(suite.repeats):
            samples: dict[Case, list[Sample]] = {}
            for size, group in groupby(cases, key=_size):
                questions = _questions(suite, workload, *size) if time.monotonic() < stop else []
                for case in group:
                    bar.set_postfix_str(f"{case.system} {case.context_tokens} x {case.batch_size}")
                    if time.monotonic() >= stop:
                        samples[case] = [] if repetitions else [Sample(None, 0.0, skipped="there was no time left")]
                    elif case in again:
                        begin = time.perf_counter()
                        samples[case] = _measure(timer, suite, case, questions)
                        if time.perf_counter() - begin > suite.patience_s or _is_missing(samples[case]):
                            again.discard(case)
                    bar.update()
            repetitions.append(Repetition(samples))
    return repetitions


def _warm_up(timer: CaseTimer, suite: Suite, cases: list[Case], workload: Workload) -> None:
    """Let libraries choose their kernels before anything counts."""
    smallest = min(map(_size, cases), key=math.prod)
    questions = _questions(suite, workload, *smallest)
    for case in cases:
        if _size(case) == smallest and case.system not in LINGUA_SYSTEMS:
            _measure(timer, suite, case, questions)


def _size(case: Case) -> tuple[int, int]:
    return case.context_tokens, case.batch_size


def _questions(suite: Suite, workload: Workload, context_tokens: int, batch_size: int) -> list[Question]:
    """The same for all systems of one repetition; none where nothing would be measured with them."""
    number = batch_size if context_tokens * batch_size <= suite.most_tokens else 0
    return workload.questions(number, context_tokens, suite.document_tokens)


def _measure(timer: CaseTimer, suite: Suite, case: Case, questions: Sequence[Question]) -> list[Sample]:
    tokens = math.prod(_size(case))
    for name in ("most_tokens", "lingua_tokens") if case.system in LINGUA_SYSTEMS else ("most_tokens",):
        if tokens > getattr(suite, name):
            option = name.replace("_", "-")
            return [
                Sample(None, 0.0, skipped=f"{tokens} text tokens at once are over --{option} {getattr(suite, name)}")
            ]
    return timer.measure(case, questions)


def _is_missing(samples: Sequence[Sample]) -> bool:
    return all(sample.skipped and sample.memory_bytes is None for sample in samples)
