"""`pic-rag ask`: one question, answered from the user's documents."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pic_rag.cli.console import calm_libraries, say, status
from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    add_ratio,
    loading,
    named_path,
    positive,
    progress,
    share,
    show_bars,
)

if TYPE_CHECKING:
    from pic_rag.rag import Answer, PicRag

MODES = ("pic", "text", "none", "truncate")


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "ask",
        help="answer a question from documents",
        description="Answer a question from text, Markdown and PDF files. Files that cannot be read are named on "
        "standard error; the answer is given from the others.",
    )
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--docs", nargs="+", default=[], metavar="PATH", help="files, and folders of files")
    parser.add_argument(
        "--index",
        type=named_path,
        metavar="DIR",
        help="keep passages, memories and --compressor here, and use what is",
    )
    add_ratio(parser, ranked=True)
    parser.add_argument(
        "--min-fidelity",
        type=share,
        metavar="X",
        help="0 to 1: the highest ratio (up to --ratio) that keeps so much of a passage, else its raw text",
    )
    parser.add_argument("--top-k", type=positive, default=3, metavar="N", help="passages shown to the generator")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="pic",
        help="what the generator reads: memories (pic), the full text, nothing, or text cut to as many tokens",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, documents, tokens, times")
    add_model_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Index what is new, then ask."""
    _check_options(args)
    rag = _open(args)
    if not len(rag.retriever):
        raise ValueError("--docs must name at least one document that can be read, got none.")
    stream = rag.stream(
        args.question,
        top_k=args.top_k,
        ratio=args.ratio,
        min_fidelity=args.min_fidelity,
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        progress=progress(args),
    )
    live = sys.stdout.isatty() and not args.json
    printed = False
    while True:
        try:
            piece = next(stream)
        except StopIteration as done:
            answer: Answer = done.value
            break
        if live:
            print(piece if printed else piece.lstrip(), end="", flush=True)
            printed = printed or bool(piece.strip())
    if args.json:
        as_it_is = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        print(json.dumps(answer.to_dict(), ensure_ascii=not as_it_is, indent=2))
        return 0
    print("" if live else answer.answer, flush=True)
    if not args.quiet:
        say(_cost(answer, args.mode))
        if args.mode == "pic" and (note := rag.compressor.checkpoint.quality):
            say(f"note: {note}")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Leave with a usage error where something is missing or contradicts something else."""
    if not args.docs and not _is_index(args.index):
        args.usage_error("name documents with --docs, or an index that exists with --index")
    if args.index is not None and args.index.is_file():
        args.usage_error(f"--index must be a folder, got the file {str(args.index)!r}")
    if not args.question.strip():
        args.usage_error("QUESTION must hold at least one word, got none")
    if args.min_fidelity is not None and args.mode != "pic":
        args.usage_error(f"--min-fidelity is about memories, which --mode {args.mode} does not read: leave one out")


def _is_index(folder: Path | None) -> bool:
    return folder is not None and (folder / "pic_rag.json").is_file()


def _open(args: argparse.Namespace) -> PicRag:
    with status("Loading the models", quiet=args.quiet):
        from pic_rag.rag import PicRag
        from pic_rag.retrieval.index_folder import updating

        calm_libraries(bars=show_bars(args))
    changes = args.index is not None and args.docs
    with updating(args.index) if changes else nullcontext():  # two at once: one after the other
        with status("Loading the models", quiet=args.quiet):
            known = _is_index(args.index)
            rag = PicRag.load(args.index, **loading(args)) if known else PicRag.from_pretrained(**loading(args))
        before = rag.retriever.passages
        rag.add_files(args.docs, progress=progress(args))
        if args.index is not None and (rag.retriever.passages != before or args.compressor is not None):
            rag.save(args.index)
    return rag


def _cost(answer: Answer, mode: str) -> str:
    """One line: what the answer was given from, and what it cost."""
    sources = list(dict.fromkeys(document.source for document in answer.documents))
    read = f"the generator read {answer.prompt_tokens} tokens"
    if mode != "text":
        read += f" in place of {answer.text_prompt_tokens}"
    seconds = answer.latency_ms["total"] / 1000
    given = f"from {', '.join(sources)}" if mode != "none" else "from no document"
    return f"{given}; {read}; {seconds:.1f} s"
