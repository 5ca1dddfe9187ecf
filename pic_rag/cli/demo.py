"""`pic-rag demo`: questions about a small corpus, answered from memories and from full text side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pic_rag.cli.console import calm_libraries, status
from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    add_ratio,
    loading,
    positive,
    progress,
    show_bars,
)
from pic_rag.questions import read_questions

if TYPE_CHECKING:
    from pic_rag.rag import Answer, PicRag

CORPUS = Path(__file__).parents[1] / "demo"


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        help="answer questions about a small corpus, from memories and from full text",
        description="Answer ten questions about eight short documents twice: from memories and from the full text. "
        "For each: the answer, and the tokens the generator read for it.",
    )
    add_ratio(parser, ranked=True)
    parser.add_argument("--top-k", type=positive, default=3, metavar="N", help="passages shown to the generator")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask every question twice."""
    questions = list(islice(read_questions(CORPUS / "questions.jsonl"), args.limit))
    with status("Loading the models", quiet=args.quiet):
        from pic_rag.rag import PicRag

        calm_libraries(bars=show_bars(args))
        rag = PicRag.from_pretrained(**loading(args))
    files = sorted(CORPUS.glob("*.md"))
    rag.add_files(files, progress=progress(args))
    _print_head(rag, len(files), args)
    pairs = []
    for number, asked in enumerate(questions, start=1):
        memories, text = _ask_twice(rag, asked.question, args)
        print(f"\n{number}. {asked.question}  (expected: {asked.answers[0]})")
        print(_line("memories", memories))
        print(_line("full text", text), flush=True)
        pairs.append((memories, text, asked.answers))
    print(f"\n{_summary(pairs)}")
    return 0


def _print_head(rag: PicRag, files: int, args: argparse.Namespace) -> None:
    from pic_rag.compression.ratios import ratio_of_each

    ratios = ratio_of_each(args.ratio, args.top_k, rag.compressor.config.check_ratio)
    each = ", ".join(map(str, dict.fromkeys(ratios)))
    print(f"{files} documents in {len(rag.retriever)} passages; each answer is given from the {args.top_k} best,")
    print(f"read as memory tokens ({each} text tokens each) and as full text.")
    print(f"Generator: {rag.generator.model_id.partition('@')[0]}")
    if note := rag.compressor.checkpoint.quality:
        print(f"Note: {note}")


def _ask_twice(rag: PicRag, question: str, args: argparse.Namespace) -> tuple[Answer, Answer]:
    memories = rag.ask(question, top_k=args.top_k, ratio=args.ratio, progress=progress(args))
    return memories, rag.ask(question, top_k=args.top_k, ratio=args.ratio, mode="text")


def _line(name: str, answer: Answer) -> str:
    return f"   {name:<9} {answer.prompt_tokens:>5} tokens   {' '.join(answer.answer.split())}"


def _summary(pairs: Sequence[tuple[Answer, Answer, Sequence[str]]]) -> str:
    """What it cost and what it brought, in one line."""
    from pic_rag.evaluation.metrics import contains_answer

    memory_tokens = fmean(memories.prompt_tokens for memories, _, _ in pairs)
    text_tokens = fmean(text.prompt_tokens for _, text, _ in pairs)
    from_memories = sum(contains_answer(memories.answer, answers) for memories, _, answers in pairs)
    from_text = sum(contains_answer(text.answer, answers) for _, text, answers in pairs)
    return (
        f"{len(pairs)} questions: {memory_tokens:.0f} tokens a question from memories, {text_tokens:.0f} from full "
        f"text ({text_tokens / memory_tokens:.1f} times as many); the expected answer is in {from_memories:.0f} "
        f"answers from memories and in {from_text:.0f} from full text."
    )
