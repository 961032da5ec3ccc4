"""The command line: `stare-megatron train run.toml key.sub=value ...`.

Exit codes: 0 done; 1 the run had to stop; 2 the user's configuration, files or machine; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from stare_megatron import __version__
from stare_megatron.convert import arguments
from stare_megatron.errors import RunError, UserError


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron import config

    overrides = [*args.overrides, *rest]
    resolved = config.load(args.config, overrides)
    if args.print_config:
        from stare_megatron.run.folder import to_toml

        print(to_toml(resolved), end="")
        return 0
    from stare_megatron.run.train import train

    command = ["stare-megatron", "train", str(args.config), *overrides]
    return train(resolved, quiet=args.quiet, command=command)


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron import config

    resolved = config.load(args.config, [*args.overrides, *rest])
    from stare_megatron.run.eval import evaluate

    evaluate(resolved, model=args.model, out=args.out)
    return 0


def _plot(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.metrics.plot import plot

    print(plot(args.run))
    return 0


def _study(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.study import command

    return command.run(args.study, form=args.form, only=args.only, jobs=args.jobs, folder=args.dir)


def _compare(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.compare.align import Align
    from stare_megatron.compare.report import Options, compare

    options = Options(
        align=Align(args.align),
        window=args.smooth,
        last=args.last,
        target=args.target,
        ignore=tuple(args.ignore),
        title=args.title,
        samples=args.samples,
        png=args.png,
        json_file=args.json,
    )
    for file in compare(args.runs, args.out, options):
        print(file)
    return 0


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.convert import command

    return command.convert(args)


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.convert import command

    return command.inspect(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stare-megatron", description="Reinforcement learning of language models with STARE."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a policy", description="Train a policy.")
    train.add_argument("config", type=Path, help="TOML file; every key is in docs/configuration.md")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the file")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    train.add_argument("--quiet", action="store_true", help="one plain line a step instead of the live display")
    train.set_defaults(handler=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a policy on held-out prompts",
        description="avg@k and pass@k of a policy on the prompts of eval.benchmarks.",
    )
    evaluate.add_argument("config", type=Path, help="TOML file of a run")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the file")
    evaluate.add_argument(
        "--model", type=Path, help="Hugging Face folder, training checkpoint or run folder; else the file's model.path"
    )
    evaluate.add_argument("--out", type=Path, help="new folder for the results; else RUN.DIR/RUN.NAME-eval")
    evaluate.set_defaults(handler=_eval)

    plot = commands.add_parser("plot", help="draw a run's curves", description="Draw a run's curves from its metrics.")
    plot.add_argument("run", type=Path, help="run folder")
    plot.set_defaults(handler=_plot)

    study = commands.add_parser(
        "study",
        help="run several variants over seeds and compare them",
        description="Run what a study file says and is not done yet; called again, it goes on where it stopped.",
    )
    study.add_argument("study", type=Path, help="TOML file, see docs/studies.md")
    study.add_argument("--form", default="", metavar="NAME", help="a smaller form of the study, e.g. quick")
    study.add_argument("--dir", type=Path, metavar="FOLDER", help="where run folders go; default: the study's dir")
    study.add_argument("--only", default="*", metavar="PATTERN", help="only runs whose name matches, e.g. 'stare*'")
    study.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time; default: as the machine bears")
    study.set_defaults(handler=_study)
    _add_compare(commands)

    about = "Turn a Hugging Face checkpoint into a Megatron-Core one, or a Megatron-Core or training checkpoint back."
    convert = commands.add_parser("convert", help="convert a checkpoint", description=about)
    arguments.add_convert(convert)
    convert.set_defaults(handler=_convert)

    about = "Tell what a checkpoint holds, or how two differ."
    inspect = commands.add_parser("inspect", help="look into a checkpoint, or compare two", description=about)
    arguments.add_inspect(inspect)
    inspect.set_defaults(handler=_inspect)
    return parser


def _add_compare(commands: Any) -> None:
    text = "Lay runs side by side: one HTML report that needs no network, PNGs and the numbers."
    compare = commands.add_parser("compare", help="compare runs in one report", description=text)
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, wandb folder, or one of such")
    compare.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where report.html and png/ go")
    compare.add_argument("--align", choices=("step", "tokens", "time"), default="step", help="x axis (default: step)")
    compare.add_argument("--smooth", type=int, default=1, metavar="N", help="moving average of N steps (default: none)")
    compare.add_argument("--last", type=int, default=10, metavar="N", help="steps end values average (default: 10)")
    compare.add_argument("--target", type=float, metavar="NATS", help="H_tgt for methods that do not act on one")
    compare.add_argument("--ignore", action="append", default=[], metavar="KEY", help="key that does not part groups")
    compare.add_argument("--title", default="", help="title of the report")
    compare.add_argument("--samples", type=int, default=3, metavar="N", help="files of samples a run (default: 3)")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the table's numbers there")
    compare.add_argument("--no-png", dest="png", action="store_false", help="the report only")
    compare.set_defaults(handler=_compare)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    # argparse takes a list of positionals in one piece only; overrides after an option are what is left over.
    args, rest = parser.parse_known_args(argv)
    if rest and (args.handler not in (_train, _eval) or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.handler(args, rest)
    except UserError as e:
        print(f"stare-megatron: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"stare-megatron: the run stopped: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stare-megatron: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
