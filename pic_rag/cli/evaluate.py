"""`pic-rag eval`: systems answer a file of questions and are scored."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import TYPE_CHECKING

from pic_rag.cli.options import Commands, add_command, add_model_options, load_compressor, positive, progress

if TYPE_CHECKING:
    from pic_rag.evaluation.runner import Row

_COLUMNS = "| {:<11} | {:>5} | {:>5} | {:>5} | {:>8} | {:>9} | {:>13} | {:>11} | {:>7} |"  # a Markdown table
_NAMES = ("system", "ratio", "F1", "EM", "contains", "agreement", "prompt tokens", "text tokens", "seconds")


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "eval",
        help="score systems on a file of questions",
        description="Let systems answer the questions of a JSONL file whose lines are "
        '{"id", "question", "answers": [...], "contexts": [{"title", "text", "is_gold"}]}, print their scores and '
        "write them with configuration and versions as JSON.",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="questions, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--systems",
        type=_names,
        default=_names("pic,text,none,truncate,pool"),
        metavar="A,B",
        help="of pic, text, none, truncate, pool, extract, text+reader (default: the first five)",
    )
    parser.add_argument(
        "--ratios", type=_ratios, default=(4, 16, 64), metavar="N,M", help="text tokens per memory token (4,16,64)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")
    parser.add_argument("--json", required=True, metavar="OUT", help="file to write")
    parser.add_argument("--predictions", metavar="OUT", help="JSONL file to write every answer to")
    add_model_options(parser, generator=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from pic_rag.questions import read_questions

    questions = list(islice(read_questions(args.data), args.limit))
    compressor = load_compressor(args)
    from pic_rag.evaluation.runner import evaluate

    report = evaluate(
        questions,
        args.systems,
        args.ratios,
        compressor=compressor,
        device=args.device,
        dtype=args.dtype,
        predictions=args.predictions,
        progress=progress(args),
    )
    report.save(args.json)
    print(_COLUMNS.format(*_NAMES))
    print("|".join(["", " --- ", *[" ---: "] * (len(_NAMES) - 1), ""]))
    for row in report.rows:
        print(_line(row))
    return 0


def _line(row: Row) -> str:
    scores = [f"{100 * score:.1f}" for score in (row.f1, row.em, row.contains_answer, row.agreement)]
    ratio = "" if row.ratio is None else row.ratio
    tokens = [f"{row.prompt_tokens_mean:.1f}", f"{row.text_tokens_mean:.1f}"]
    return _COLUMNS.format(row.system, ratio, *scores, *tokens, f"{row.seconds:.1f}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _ratios(text: str) -> tuple[int, ...]:
    return tuple(positive(name) for name in _names(text))
