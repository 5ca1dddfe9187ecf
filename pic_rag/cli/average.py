"""`pic-rag average`: the mean of checkpoints of one training run."""

from __future__ import annotations

import argparse

from pic_rag.cli.options import Commands, add_command, named_path


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "average",
        help="average checkpoints of a training run",
        description="Write the mean of compressors that began with the same weights: often better than each of them, "
        "as if the learning rate had been lowered to zero.",
    )
    parser.add_argument("compressors", nargs="+", metavar="NAME", help="folders or hub ids, two or more")
    parser.add_argument("--out", type=named_path, required=True, metavar="FOLDER", help="of the mean")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Average."""
    from pic_rag.training.averaging import average

    print(average(args.compressors, args.out))
    return 0
