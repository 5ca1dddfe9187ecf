"""`pic-rag train`: a training run from its configuration file."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from typing import Any

from pic_rag.cli.console import calm_libraries
from pic_rag.cli.options import Commands, add_command, minutes, new_folder, progress, show_bars
from pic_rag.config import PicConfig
from pic_rag.training.config import CONFIGS, Stage, TrainConfig, find_config


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        help="train a compressor",
        description="Run a training configuration to its end, from its last checkpoint if there is one, and print the "
        "folder of the compressor. On several GPUs: accelerate launch -m pic_rag train CONFIG; in N processes without "
        "GPUs: ACCELERATE_USE_CPU=true torchrun --nproc-per-node N -m pic_rag train CONFIG.",
    )
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument("config", metavar="CONFIG", help=f"YAML file of the run, or a shipped one: {shipped}")
    parser.add_argument("--fields", action=_Explain, nargs=0, help="explain the fields of a configuration, and exit")
    parser.add_argument("--minutes", type=minutes, metavar="M", help="stop after M minutes, to be resumed later")
    parser.add_argument(
        "--finish", action="store_true", help="end the run within --minutes: cut or extend its last stages to fit"
    )
    parser.add_argument(
        "--out", type=new_folder, metavar="DIR", help="folder of the run, in place of the configuration's"
    )
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Train."""
    if args.finish and args.minutes is None:
        args.usage_error("--finish must come with --minutes, the time there is")
    from accelerate import PartialState

    from pic_rag.training.guards import sigterm_interrupts
    from pic_rag.training.loop import train

    overrides = {} if args.out is None else {"out": str(args.out)}
    config = TrainConfig.load(find_config(args.config), **overrides)
    calm_libraries(bars=show_bars(args))
    with sigterm_interrupts():
        folder = train(config, minutes=args.minutes, finish=args.finish, progress=progress(args))
    if PartialState().is_main_process:
        print(folder)
    return 0


class _Explain(argparse.Action):
    """Print what the fields of a training configuration mean, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:  # noqa: ANN401 - argparse passes more
        """Print the fields of a run, of a stage and of `pic`."""
        explained = {
            "A configuration": TrainConfig,
            "Each of `stages`": Stage,
            "`pic`, besides `preset` (pic, local or global)": PicConfig,
        }
        for title, config in explained.items():
            print(f"{title}:")
            for field in fields(config):
                print(f"  {field.name}: {field.metadata['help']}{_default(field)}")
        parser.exit()


def _default(field: Any) -> str:  # noqa: ANN401 - dataclasses.Field of anything
    """What a field is where the file does not set it."""
    if field.default_factory is not MISSING or isinstance(field.default, PicConfig):
        return ""
    return " (needed)" if field.default is MISSING else f" (default: {json.dumps(field.default)})"
