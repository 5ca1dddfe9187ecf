"""`pic-rag eval`: systems answer a file of questions and are scored."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    count,
    load_compressor,
    names,
    new_file,
    positive,
    progress,
    ratios,
    share,
)
from pic_rag.evaluation.report import report_table
from pic_rag.questions import Question, pick, read_questions, read_rows

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor

_SYSTEMS = ("pic", "text", "none", "truncate", "pool")


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "eval",
        help="score systems on a file of questions",
        description="Let systems answer the questions of a JSONL file whose lines are "
        '{"id", "question", "answers": [...], "contexts": [{"title", "text", "is_gold"}]}, print their scores and '
        "write them with configuration and versions as JSON. A question that does not fit the generator's context "
        "scores 0 and is counted as too long.",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="questions, .jsonl or .jsonl.gz or SQuAD's .json")
    parser.add_argument(
        "--systems",
        type=names,
        metavar="A,B",
        help="of pic, text, none, truncate, pool, extract (default: the first five); pic@bf16, pic@int8, pic@int4: "
        "memories as a store of that precision gives them back; llmlingua, longllmlingua, llmlingua2: text shortened "
        "by what PIC_RAG_LLMLINGUA_PYTHON names; and text+reader, truncate+reader, extract+reader, ...: the same text "
        "read with the compressor's reader on",
    )
    parser.add_argument(
        "--ratios",
        type=_ratios,
        default=(4, 16, 64),
        metavar="N,M",
        help="text tokens per memory token (4,16,64); 2+16 among them: 2 for a question's first document, 16 for the "
        "others",
    )
    parser.add_argument(
        "--floors",
        type=_floors,
        metavar="X,Y",
        help="values of min_fidelity: in place of systems, compare single ratios with the mixture that each of these "
        "picks, and say how well fidelity predicts wrong answers",
    )
    parser.add_argument("--json", required=True, type=new_file, metavar="OUT", help="file to write")
    parser.add_argument("--predictions", type=new_file, metavar="OUT", help="JSONL file to write every answer to")
    _add_data_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    _check_options(args)
    questions, data = _questions(args)
    compressor = load_compressor(args)
    if args.floors:
        return _run_floors(args, compressor, questions, data)
    from pic_rag.evaluation.runner import evaluate

    report = evaluate(
        questions,
        args.systems or _SYSTEMS,
        args.ratios,
        compressor=compressor,
        task=args.task,
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        predictions=args.predictions,
        data=data,
        progress=progress(args),
    )
    report.save(args.json)
    print(report_table(report.to_dict()), end="")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Leave with a usage error where options contradict each other, before anything is read."""
    if args.floors:
        if not all(isinstance(ratio, int) for ratio in args.ratios):
            args.usage_error("--ratios must be single numbers with --floors, got ratios by rank: leave those out")
        given = {name: getattr(args, name) for name in ("systems", "predictions", "examples", "prompt")}
        for option in (name for name, value in given.items() if value):
            args.usage_error(f"--floors compares ratios of pic on questions: leave --{option} out")
        if args.task != "questions":
            args.usage_error(f"--floors compares ratios of pic on questions: leave --task {args.task} out")
    if args.retrieve and args.examples:
        args.usage_error("--retrieve and --examples both say which documents are shown: leave one out")
    written = [Path(name).resolve() for name in (args.json, args.predictions) if name]
    read = {Path(name).resolve() for name in (args.data, args.examples) if name}
    if len({*written} - read) < len(written):
        args.usage_error("--json and --predictions must be files of their own, and not those that are read")


def _run_floors(
    args: argparse.Namespace, compressor: Compressor, questions: list[Question], data: dict[str, Any]
) -> int:
    """The same for single and mixed ratios."""
    from pic_rag.evaluation.fidelity import evaluate_fidelity
    from pic_rag.generation.generator import Generator

    report = evaluate_fidelity(
        questions,
        args.ratios,
        args.floors,
        compressor=compressor,
        generator=Generator.from_checkpoint(compressor.checkpoint, device=args.device, dtype=args.dtype),
        max_new_tokens=args.max_new_tokens or 32,
        batch_size=args.batch_size,
        data=data,
    )
    report.save(args.json)
    print(report_table(report.to_dict()), end="")
    print(f"AUROC over all ratios: {'-' if report.auroc is None else f'{report.auroc:.2f}'}")
    return 0


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Which questions are asked, with which documents."""
    data = parser.add_argument_group("questions and documents")
    data.add_argument("--every", type=positive, default=1, metavar="N", help="one question of every N only")
    data.add_argument("--offset", type=count, default=0, metavar="K", help="leave out the first K questions")
    data.add_argument("--limit", type=positive, metavar="N", help="at most N questions")
    shown = data.add_mutually_exclusive_group()
    shown.add_argument("--gold-only", action="store_true", help="only the documents that hold the answer")
    shown.add_argument(
        "--retrieve",
        type=positive,
        metavar="K",
        help="open retrieval: the K best of all passages of FILE in place of those that come with a question",
    )
    data.add_argument(
        "--task",
        choices=("questions", "gsm8k"),
        default="questions",
        help="gsm8k: problems to solve; the final number is scored (default: questions)",
    )
    data.add_argument(
        "--prompt",
        type=lambda text: text.replace("\\n", "\n"),
        metavar="TEXT",
        help="a user's message with {context} and {question}, as your application has it, \\n for a line break "
        "(default: the task's own)",
    )
    data.add_argument("--examples", metavar="FILE", help="gsm8k: solved problems, with rationale, to show as documents")
    data.add_argument("--shots", type=positive, default=8, metavar="N", help="gsm8k: how many of them are shown (8)")
    data.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (32; gsm8k: 256)")
    data.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts decoded together (8)")


def _questions(args: argparse.Namespace) -> tuple[list[Question], dict[str, Any]]:
    """The questions asked, and how the report names them."""
    chosen = ("every", "offset", "limit", "gold_only", "retrieve")
    data = {"file": args.data.rpartition("/")[2], **{name: getattr(args, name) for name in chosen}}
    source = read_questions(args.data, gold_only=args.gold_only)
    questions = pick(source, every=args.every, offset=args.offset, limit=args.limit)
    if not questions:
        raise ValueError(
            f"{args.data} must hold a question with an answer after the first {args.offset}, got none. "
            "Lower --offset, or name another file."
        )
    if args.retrieve:
        from pic_rag.evaluation.retrieval import retrieve

        pool = map(Question.from_row, read_rows(args.data))
        found = retrieve(questions, pool, args.retrieve, progress=progress(args))
        data |= {"passages": found.passages, "recall": found.recall, "recall_all": found.recall_all}
        questions = found.questions
    if args.examples:
        from pic_rag.evaluation.tasks import with_examples

        questions = list(with_examples(questions, args.examples, args.shots))
        data |= {"examples": args.examples.rpartition("/")[2], "shots": args.shots}
    return questions, data


def _floors(text: str) -> tuple[float, ...]:
    return tuple(map(share, names(text)))


def _ratios(text: str) -> tuple[int | tuple[int, ...], ...]:
    return tuple(map(ratios, names(text)))
