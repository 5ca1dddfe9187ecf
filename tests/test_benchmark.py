"""Every row of a small benchmark on real tiny models: what is counted, compared, and said to be missing."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import venv
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pic_rag.benchmark.cases import Case, CaseTimer, Sample
from pic_rag.benchmark.compression import measure_compression
from pic_rag.benchmark.measure import TokenClock, kv_bytes
from pic_rag.benchmark.plot import draw
from pic_rag.benchmark.report import BenchRow, Repetition, Report, make_rows
from pic_rag.benchmark.runner import benchmark, plan
from pic_rag.benchmark.suite import SUITES, SYSTEMS, Suite
from pic_rag.benchmark.workload import Workload
from pic_rag.cli import main
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.evaluation.lingua import PYTHON_VARIABLE, Lingua, LinguaError
from pic_rag.evaluation.shortening import Shortener
from pic_rag.evaluation.systems import Systems
from pic_rag.generation.generator import Generator

SMALL = Suite(
    contexts=(128, 3000),
    ratios=(4, 8),
    batch_sizes=(1, 2),
    repeats=2,
    new_tokens=4,
    document_tokens=64,
    compress_tokens=4096,
    most_tokens=4096,
    lingua_tokens=200,
)


@pytest.fixture(scope="module")
def folder(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    """A tiny generator and an untrained compressor for it."""
    root = tmp_path_factory.mktemp("models")
    tiny_model.save_pretrained(root / "tiny")
    tiny_tokenizer.save_pretrained(root / "tiny")
    config = PicConfig(ratios=(4, 8), segment_tokens=64, encoder_layers=2, lora_rank=2)
    made = Compressor.from_base(root / "tiny", config=config, device="cpu", dtype="float32")
    made.save_pretrained(root / "compressor")
    return root


@pytest.fixture(scope="module")
def systems(folder: Path) -> Systems:
    compressor = Compressor.from_pretrained(folder / "compressor", device="cpu", dtype="float32")
    return Systems(compressor, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def report(systems: Systems) -> Report:
    return benchmark(systems, SMALL, progress=False)


@pytest.fixture
def workload(tiny_tokenizer: PreTrainedTokenizerFast) -> Workload:
    return Workload(Shortener(tiny_tokenizer))


def find(report: Report, system: str, context_tokens: int = 128, batch_size: int = 1, **wanted: object) -> BenchRow:
    wanted |= {"system": system, "context_tokens": context_tokens, "batch_size": batch_size}
    [row] = [row for row in report.rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


# The workload


@pytest.mark.parametrize("tokens", [1, 20, 64, 1000, 20_000])
def test_a_document_has_exactly_its_tokens(systems: Systems, workload: Workload, tokens: int) -> None:
    document = workload.document(tokens)
    assert len(systems.plain.tokenizer(document, add_special_tokens=False).input_ids) == tokens
    assert systems.compressor.compress([document], 4)[0].text_tokens == tokens


def test_a_context_is_cut_into_documents_and_none_comes_twice(workload: Workload) -> None:
    asked = workload.questions(3, 150, 64) + workload.questions(3, 150, 64)
    sizes = [[len(context.document.encode()) for context in one.contexts] for one in asked]
    assert sizes == [[64, 64, 22]] * 6
    documents = [context.document for one in asked for context in one.contexts]
    assert len(set(documents)) == len(documents)


# The clock


def test_the_clock_has_a_time_for_every_token_and_no_answer_ends_early(tiny_model, tiny_tokenizer) -> None:
    generator = Generator(tiny_model, tiny_tokenizer, name="tiny")
    before = generator.generate("Bees", max_new_tokens=6)[0].token_ids
    with TokenClock(generator) as clock:
        answer = generator.generate("Bees", max_new_tokens=6)[0]
    assert answer.completion_tokens == len(clock.times) == 6
    assert tiny_tokenizer.eos_token_id not in answer.token_ids
    assert clock.times == sorted(clock.times)
    assert generator.generate("Bees", max_new_tokens=6)[0].token_ids == before


def test_keys_and_values_are_counted_as_the_model_keeps_them(tiny_model: LlamaForCausalLM) -> None:
    layers, both, heads, width, float32_bytes = 4, 2, 2, 16, 4
    assert kv_bytes(tiny_model) == layers * both * heads * width * float32_bytes


# The rows


def test_every_case_has_its_rows_and_memories_have_one_for_each_kind_of_cache(report: Report) -> None:
    assert {row.system for row in report.rows} == set(SYSTEMS)
    for case in plan(SMALL):
        caches = [
            row.cache for row in report.rows if Case(row.system, row.ratio, row.context_tokens, row.batch_size) == case
        ]
        over = case.context_tokens * case.batch_size > SMALL.most_tokens
        assert caches == (["miss", "hit", "prefix"] if case.system == "pic" and not over else [None])


def test_a_row_says_what_the_generator_read(report: Report, tiny_model: LlamaForCausalLM) -> None:
    text, cut = find(report, "text"), find(report, "truncate", ratio=4)
    memory = find(report, "pic", ratio=4, cache="hit")
    assert (text.shown_tokens, cut.shown_tokens, memory.shown_tokens) == (128, 32, 32)
    assert text.prompt_tokens - text.shown_tokens == memory.prompt_tokens - memory.shown_tokens
    assert text.kv_cache_bytes == kv_bytes(tiny_model) * (text.prompt_tokens + SMALL.new_tokens)
    assert find(report, "text", batch_size=2).kv_cache_bytes > text.kv_cache_bytes
    assert memory.memory_bytes > 16 * 64 * 2  # of a document: 16 vectors of width 64 in bfloat16, and a header


def test_kinds_of_cache_differ_in_what_they_spare(report: Report) -> None:
    miss, hit, prefix = (find(report, "pic", ratio=4, cache=cache) for cache in ("miss", "hit", "prefix"))
    assert miss.prepare_s > hit.prepare_s == prefix.prepare_s
    assert miss.prepare_tokens_per_s == pytest.approx(128 / miss.prepare_s)
    assert miss.cached_tokens == hit.cached_tokens == 0
    assert 32 < prefix.cached_tokens < prefix.prompt_tokens
    assert miss.decode_tokens_per_s == hit.decode_tokens_per_s  # one answer, counted twice
    assert {row.repeats for row in (miss, hit, prefix)} == {SMALL.repeats}


def test_times_are_of_the_same_answer_and_add_up(systems: Systems, workload: Workload) -> None:
    case = Case("pic", 4, 128, 2)
    for sample in CaseTimer(systems, 4).measure(case, workload.questions(2, 128, 64)):
        assert 0 < sample.first_token_s < sample.answer_s
        assert sample.until_first_s == sample.prepare_s + sample.first_token_s
        decoding_s = 2 * 3 / sample.decode_tokens_per_s  # two answers of three tokens after the first
        assert sample.first_token_s + decoding_s <= sample.answer_s


# What is compared


def test_ratios_and_break_even_are_to_the_text_of_the_same_repetition() -> None:
    text, memories = Case("text", None, 100, 1), Case("pic", 4, 100, 1)

    def run(text_s: float, factor: float) -> Repetition:
        whole = Sample(None, 0.0, first_token_s=text_s, answer_s=2 * text_s)
        hit = Sample("hit", 0.0, first_token_s=text_s / factor, answer_s=text_s)
        return Repetition({text: [whole], memories: [replace(hit, cache="miss", prepare_s=3.0), hit]})

    runs = [run(1.0, 4.0), run(100.0, 5.0), run(2.0, 6.0)]
    miss, hit = list(make_rows(runs, [text, memories], new_tokens=2, kv_bytes=1))[1:]
    assert hit.first_token_sooner == 5.0  # the median of the ratios, not the ratio of the medians: 2 / (1 / 4)
    assert hit.faster == 2.0
    assert miss.break_even_queries == 1.5  # the median of 3 / 1, 3 / 100 and 3 / 2
    assert hit.break_even_queries is None


def test_preparing_that_saves_nothing_never_breaks_even() -> None:
    text, cut = Case("text", None, 100, 1), Case("truncate", 4, 100, 1)
    samples = {
        text: [Sample(None, 0.0, first_token_s=1.0, answer_s=2.0)],
        cut: [Sample(None, 1.0, first_token_s=1.0, answer_s=2.0)],
    }
    row = list(make_rows([Repetition(samples)], [text, cut], new_tokens=2, kv_bytes=1))[1]
    assert row.break_even_queries is None
    assert row.faster == pytest.approx(2 / 3)


# What is missing


def test_a_skipped_row_says_why(report: Report) -> None:
    long = find(report, "text", context_tokens=3000)
    assert "do not fit the context of 2048 of the generator" in long.skipped
    assert long.total_s is None
    both = find(report, "text", context_tokens=3000, batch_size=2)
    assert both.skipped == "6000 text tokens at once are over --most-tokens 4096"
    assert (
        find(report, "llmlingua", batch_size=2, ratio=4).skipped
        == "256 text tokens at once are over --lingua-tokens 200"
    )
    assert "must be the folder or hub id of a token classifier" in find(report, "llmlingua2", ratio=4).skipped
    memories = find(report, "pic", context_tokens=3000, ratio=4, cache="hit")
    assert memories.skipped is None
    assert memories.total_s > 0
    assert memories.faster is None  # nothing to compare with


def test_without_llmlingua_its_rows_say_what_to_install(systems: Systems, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    bare = tmp_path / "bare" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    with pytest.raises(LinguaError, match="No module named 'llmlingua'.*pip install llmlingua==0.2.2 transformers=="):
        Lingua("any", python=bare)
    with pytest.raises(LinguaError, match="ended with exit code"):
        Lingua("any", python=shutil.which("false"))
    with pytest.raises(LinguaError, match="python must be an interpreter, got .*nowhere"):
        Lingua("any", python=tmp_path / "nowhere")


@pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no Python with llmlingua")
def test_llmlingua_shortens_more_where_less_is_wanted(folder: Path, systems: Systems, workload: Workload) -> None:
    lingua = Lingua(folder / "tiny")
    count = Shortener(systems.plain.tokenizer).count_tokens
    assert lingua.versions["llmlingua"] == "0.2.2"
    for question in (None, "Who built the tower?"):
        shortened = [count(lingua.shorten([workload.document(300)], tokens, question)) for tokens in (30, 100)]
        assert 0 < shortened[0] < shortened[1] < 300


# The compressor's own speed, and the report


def test_all_the_text_that_is_reported_is_compressed(systems: Systems, workload: Workload, monkeypatch) -> None:
    compress = Compressor.compress
    compressed = []

    def count(compressor, documents, *arguments, **options):
        made = compress(compressor, documents, *arguments, **options)
        compressed.append(sum(memory.text_tokens for memory in made))
        return made

    monkeypatch.setattr(Compressor, "compress", count)
    measured = measure_compression(systems.compressor, workload, (4,), 5 * 64, 1)
    assert measured.text_tokens == 4 * 64  # an even number of segments: documents have two
    long, short, _, documents, _ = compressed
    assert long == documents == 4 * short == measured.text_tokens


def test_compression_counts_padding_and_operations(systems: Systems, workload: Workload) -> None:
    measured = measure_compression(systems.compressor, workload, (4, 8), 4096, 1)
    assert measured.text_tokens == 4096
    assert set(measured.over_floor) == set(measured.compress_s) == {4, 8}
    assert measured.over_floor[4] == measured.compress_s[4] / measured.floor_s
    assert set(measured.over_floor_with_slots) == {4, 8}
    assert all(measured.over_floor_with_slots[ratio] != measured.over_floor[ratio] for ratio in (4, 8))
    assert 0 <= measured.padding < 0.5
    assert measured.mfu > 0
    assert measured.growth > 0


def test_the_report_is_json_with_hardware_versions_and_settings(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written) == ["rows", "compression", "splice", "config", "hardware", "versions"]
    assert len(written["rows"]) == len(report.rows)
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["cores"] == os.cpu_count()
    assert written["hardware"]["threads"] == torch.get_num_threads()
    assert (written["config"]["dtype"], written["config"]["device"]) == ("float32", "cpu")
    assert written["config"]["contexts"] == [128, 3000]
    assert written["splice"]["documents"] == 5
    tables = (tmp_path / "report.md").read_text()
    assert tables.count("\n| ") > len(report.rows)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_a_line_for_every_system_that_answered(report: Report) -> None:
    panels = draw(report.rows).axes
    assert len(panels) == 4  # two batch sizes; first token and whole answer
    wanted = {(row.system, row.ratio, row.cache) for row in report.rows if row.batch_size == 1 and row.total_s}
    assert len(panels[0].lines) == len(wanted)


def test_the_command_writes_the_report_it_prints(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ["--contexts", "64", "--ratios", "8", "--batch-sizes", "1", "--systems", "pic", "--repeats", "1"]
    sizes = ["--new-tokens", "2", "--document-tokens", "64", "--compress-tokens", "256"]
    models = ["--compressor", str(folder / "compressor"), "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", "--quiet", "--out", "figures", *grid, *sizes, *models]) == 0
    assert capsys.readouterr().out == (tmp_path / "figures" / "report.md").read_text()
    rows = json.loads((tmp_path / "figures" / "report.json").read_text())["rows"]
    assert [(row["system"], row["cache"]) for row in rows] == [
        ("text", None),
        ("pic", "miss"),
        ("pic", "hit"),
        ("pic", "prefix"),
    ]


def test_the_gpu_suite_is_the_whole_grid() -> None:
    suite = SUITES["gpu"]
    assert (suite.contexts, suite.ratios, suite.batch_sizes) == ((1024, 4096, 16384, 65536), (4, 16, 64), (1, 32))
    assert suite.most_tokens >= 32 * 65536


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": ()}, "contexts must hold at least one whole number"),
        ({"repeats": 0}, "repeats must be a number above 0, got 0"),
        ({"patience_s": float("inf")}, "patience_s must be a number above 0, got inf"),
        ({"new_tokens": 1}, "new_tokens must be at least 2 to time decoding, got 1"),
        ({"systems": ("text", "magic")}, "systems must be some of text, .* got 'magic'"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Suite(**settings)


def test_a_ratio_that_the_compressor_does_not_serve_is_refused_before_anything_is_measured(systems: Systems) -> None:
    with pytest.raises(ValueError, match="ratio must be one of 4, 8 "):
        benchmark(systems, replace(SMALL, ratios=(5,)))


def test_a_run_that_is_out_of_time_says_what_it_left_out(systems: Systems) -> None:
    report = benchmark(systems, SMALL, minutes=1e-9, progress=False)
    assert {row.skipped for row in report.rows} == {"there was no time left"}
    assert len(report.rows) == len(list(plan(SMALL)))
    assert report.compression.floor_s > 0
    assert "there was no time left" in report.to_markdown()


@pytest.mark.slow
def test_repetitions_stop_when_the_time_is_over(systems: Systems, monkeypatch) -> None:
    ticks = SimpleNamespace(monotonic=count().__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("pic_rag.benchmark.runner.time", ticks)
    suite = replace(SMALL, contexts=(128,), ratios=(4,), batch_sizes=(1,), systems=("text", "truncate"), repeats=4)
    report = benchmark(systems, suite, minutes=0.1, progress=False)  # six ticks
    assert 1 <= min(row.repeats for row in report.rows) <= max(row.repeats for row in report.rows) < 4
    assert not any(row.skipped for row in report.rows)
