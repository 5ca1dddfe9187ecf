"""The report: rows out of samples, as JSON and as Markdown tables. This file does not know how anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pic_rag.benchmark.cases import Case, Sample
from pic_rag.benchmark.compression import Compression
from pic_rag.benchmark.splice import Splice
from pic_rag.reporting import markdown_table, write_json


@dataclass(frozen=True)
class BenchRow:
    """A case over all its repetitions: medians, times in seconds.

    Attributes:
        system: see `pic_rag.benchmark.suite.SYSTEMS`.
        ratio: text tokens per memory token.
        cache: where memories came from, see `Sample`.
        context_tokens: text tokens of a question's documents.
        batch_size: questions asked at once.
        repeats: measured so often.
        skipped: why there is no answer; what was measured before that is there.
        shown_tokens: of the passages, as the generator reads them: what a shortener made of the ratio it was given.
        prompt_tokens: rows of the prompt, question and markers included.
        cached_tokens: rows of them whose keys and values were kept.
        prepare_s: compressing, reading from the store or shortening.
        prepare_tokens_per_s: text tokens over that time: for memories compressed now, compress tokens a second.
        memory_bytes: of a document's memory at rest.
        first_token_s: from the documents to the first token, preparing included.
        total_s: from the documents to the end of the answer.
        decode_tokens_per_s: after the first token, all answers together.
        kv_cache_bytes: keys and values of all prompts and answers.
        first_token_sooner: the full text's `first_token_s` over this one's, in the same repetition.
        faster: the same for `total_s`.
        break_even_queries: questions that each document must be asked until preparing it once has paid, when what
            was prepared is kept; None when it never does.
    """

    system: str
    ratio: int | None
    cache: str | None
    context_tokens: int
    batch_size: int
    repeats: int
    skipped: str | None
    shown_tokens: float | None
    prompt_tokens: float | None
    cached_tokens: float | None
    prepare_s: float | None
    prepare_tokens_per_s: float | None
    memory_bytes: float | None
    first_token_s: float | None
    total_s: float | None
    decode_tokens_per_s: float | None
    kv_cache_bytes: float | None
    first_token_sooner: float | None
    faster: float | None
    break_even_queries: float | None


@dataclass(frozen=True)
class Repetition:
    """What one repetition measured: samples by case, and the full text's sample of every context and batch."""

    samples: Mapping[Case, Sequence[Sample]]

    def find(self, case: Case, cache: str | None) -> Sample | None:
        """A case's sample, if it was measured."""
        return next((sample for sample in self.samples.get(case, ()) if sample.cache == cache), None)

    def text(self, case: Case) -> Sample | None:
        """The full text's sample that a case is compared with."""
        return self.find(Case("text", None, case.context_tokens, case.batch_size), None)


@dataclass(frozen=True)
class Report:
    """The rows of a run, and everything needed to repeat it."""

    rows: list[BenchRow]
    compression: Compression
    splice: Splice
    config: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.md and report.png into a folder, and return it.

        Raises:
            ImportError: without matplotlib, when the other two are written.
        """
        from pic_rag.benchmark.plot import draw

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "report.json", self.to_dict())
        (target / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        draw(self.rows).savefig(target / "report.png")
        return target

    def to_markdown(self) -> str:
        """The tables."""
        compression, splice = self.compression, self.splice
        speed = []
        for ratio, over in compression.over_floor.items():
            with_slots = compression.over_floor_with_slots[ratio]
            speed.append([f"compress at ratio {ratio}, over the floor of its text", f"{over:.2f}"])
            speed.append([f"compress at ratio {ratio}, over the floor of text and slots", f"{with_slots:.2f}"])
        speed += [
            ["a document four times longer, time a token", f"{compression.growth:.2f}"],
            ["a corpus of mixed lengths, over the floor", f"{compression.mixed_over_floor:.2f}"],
            ["padding there", f"{compression.padding:.1%}"],
            ["operations there, of a matrix product's", f"{compression.mfu:.1%}"],
            [f"{splice.documents} documents at ratio {splice.ratio}, from disk", f"{splice.read_ms:.2f} ms"],
            ["spliced into the prompt", f"{splice.splice_ms:.2f} ms"],
        ]
        machine = ", ".join(f"{name}: {value}" for name, value in self.hardware.items() if value is not None)
        return "\n".join(
            [
                machine + "\n",
                markdown_table(list(_COLUMNS), [[show(row) for show in _COLUMNS.values()] for row in self.rows]),
                *_skipped_lines(self.rows),
                markdown_table(["compressor", ""], speed),
            ]
        )


def make_rows(
    repetitions: Sequence[Repetition], cases: Iterable[Case], *, new_tokens: int, kv_bytes: int
) -> Iterable[BenchRow]:
    """A row for every case and kind of cache, in the order of the cases.

    Args:
        repetitions: of one run.
        cases: that were to be measured.
        new_tokens: of every answer.
        kv_bytes: keys and values of one token.
    """
    for case in cases:
        caches = dict.fromkeys(sample.cache for run in repetitions for sample in run.samples.get(case, ()))
        for cache in caches:
            yield _row(repetitions, case, cache, new_tokens, kv_bytes)


def _row(repetitions: Sequence[Repetition], case: Case, cache: str | None, new_tokens: int, kv_bytes: int) -> BenchRow:
    runs = [(run, sample) for run in repetitions if (sample := run.find(case, cache)) is not None]
    samples = [sample for _, sample in runs]
    prompt_tokens = _median(sample.prompt_tokens for sample in samples)
    prepared = _median(sample.prepare_s or None for sample in samples)
    tokens = case.context_tokens * case.batch_size
    break_even = _median(_break_even(run, case, cache) for run, _ in runs)
    return BenchRow(
        **asdict(case),
        cache=cache,
        repeats=len(samples),
        skipped=next((sample.skipped for sample in samples if sample.skipped), None),
        shown_tokens=_median(sample.shown_tokens for sample in samples),
        prompt_tokens=prompt_tokens,
        cached_tokens=_median(sample.cached_tokens for sample in samples),
        prepare_s=prepared,
        prepare_tokens_per_s=None if prepared is None or case.system == "text" else tokens / prepared,
        memory_bytes=_median(sample.memory_bytes for sample in samples),
        first_token_s=_median(sample.until_first_s for sample in samples),
        total_s=_median(sample.total_s for sample in samples),
        decode_tokens_per_s=_median(sample.decode_tokens_per_s for sample in samples),
        kv_cache_bytes=None if prompt_tokens is None else kv_bytes * (prompt_tokens + new_tokens) * case.batch_size,
        first_token_sooner=_median(_over(run.text(case), sample, "until_first_s") for run, sample in runs),
        faster=_median(_over(run.text(case), sample, "total_s") for run, sample in runs),
        break_even_queries=break_even if break_even is not None and math.isfinite(break_even) else None,
    )


def _break_even(run: Repetition, case: Case, cache: str | None) -> float | None:
    """What preparing costs over what an answer from what was prepared saves; infinite when that is nothing.

    Memories that were kept are read from the store for every question; shortened text that was kept costs nothing.
    """
    text, prepared = run.text(case), run.find(case, cache)
    kept = run.find(case, "hit") if cache == "miss" else prepared
    if cache not in (None, "miss") or case.system in ("text", "longllmlingua"):  # shortened for one question only
        return None
    if text is None or prepared is None or kept is None or text.total_s is None or kept.answer_s is None:
        return None
    saved = text.total_s - (kept.answer_s + (kept.prepare_s if cache == "miss" else 0.0))
    return prepared.prepare_s / saved if saved > 0 else math.inf


def _over(text: Sample | None, sample: Sample, name: str) -> float | None:
    whole, own = (None if each is None else getattr(each, name) for each in (text, sample))
    return None if whole is None or own is None else whole / own


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _number(name: str, form: str, scale: float = 1) -> Callable[[BenchRow], str]:
    def show(row: BenchRow) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value if scale == 1 else value * scale, form)

    return show


def _skipped_lines(rows: Iterable[BenchRow]) -> Iterator[str]:
    """Each reason once, with the rows that it left out."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped:
            at = "" if row.ratio is None else f" at ratio {row.ratio}"
            reasons.setdefault(row.skipped, []).append(f"{row.system}{at}, {row.context_tokens} x {row.batch_size}")
    for reason, left_out in reasons.items():
        yield f"Not measured: {'; '.join(left_out)}. {reason}\n"


def _show_break_even(row: BenchRow) -> str:
    measured = row.faster is not None and row.cache in (None, "miss") and row.system not in ("text", "longllmlingua")
    return _number("break_even_queries", ".1f")(row) or ("never" if measured else "")


_COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "system": lambda row: f"{row.system}, {row.cache}" if row.cache else row.system,
    "ratio": _number("ratio", ""),
    "context": _number("context_tokens", ""),
    "batch": _number("batch_size", ""),
    "shown": _number("shown_tokens", ".0f"),
    "prepare s": _number("prepare_s", ".3f"),
    "prepare tokens/s": _number("prepare_tokens_per_s", ".0f"),
    "first token s": _number("first_token_s", ".3f"),
    "sooner": _number("first_token_sooner", ".2f"),
    "total s": _number("total_s", ".3f"),
    "faster": _number("faster", ".2f"),
    "decode tokens/s": _number("decode_tokens_per_s", ".1f"),
    "KV MB": _number("kv_cache_bytes", ".1f", 1e-6),
    "memory kB": _number("memory_bytes", ".1f", 1e-3),
    "break-even": _show_break_even,
}
