"""The command line: `stare-megatron train run.toml key.sub=value ...`.

Exit codes: 0 done; 1 the run had to stop; 2 the user's configuration, files or machine; 75 it had to stop since
processes were lost, and may be started again; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import platform
import sys
from collections.abc import Callable
from typing import Any

from stare_megatron import __version__
from stare_megatron.errors import RunError, UserError, ending
from stare_megatron.host import completion, paths, program

Handler = Callable[[argparse.Namespace, list[str]], int]


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron import config

    overrides = [*args.overrides, *rest]
    resolved = config.load(args.config, overrides)
    if args.print_config:
        return _show(resolved)
    from stare_megatron.run.train import train

    return train(resolved, quiet=args.quiet, command=["stare-megatron", "train", str(args.config), *overrides])


def _show(resolved: Any) -> int:
    from stare_megatron.run.folder import to_toml

    print(to_toml(resolved), end="")
    return 0


def _sft(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron import config

    overrides = [*args.overrides, *rest]
    resolved = config.load_sft(args.config, overrides)
    if args.print_config:
        return _show(resolved)
    from stare_megatron.sft.start import sft

    return sft(resolved, quiet=args.quiet, command=["stare-megatron", "sft", str(args.config), *overrides])


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron import config

    resolved = config.load(args.config, [*args.overrides, *rest])
    from stare_megatron.run.eval import evaluate

    evaluate(resolved, model=args.model, out=args.out)
    return 0


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from stare_megatron.doctor import command

    return command.run([*args.settings, *rest], Console())


def _launch(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.launch import command

    print(command.run(args, rest))
    return 0


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from stare_megatron.plan import command

    code, text = command.main(args, [*args.settings, *rest], Console())
    if text:
        print(text)
    return code


def _plot(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.metrics.plot import plot

    print(plot(args.run))
    return 0


def _trace(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.metrics.trace import parse_steps, write_chrome

    out = args.out or args.run / "trace.json"
    steps = write_chrome(args.run, out, parse_steps(args.steps))
    print(f"{out}: {steps} step(s); open it at https://ui.perfetto.dev or chrome://tracing")
    return 0


def _study(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.study import command

    how = {"form": args.form, "only": args.only, "jobs": args.jobs, "folder": args.dir, "dry_run": args.dry_run}
    return command.run(args.study, **how)


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
    out = args.out or args.runs[0].with_name(f"{args.runs[0].name}-report")
    report, *others = compare(args.runs, out, options)
    print(f"open {report}")
    for file in others if args.verbose else ():
        print(file)
    return 0


def _scale(args: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from stare_megatron.scaling import command
    from stare_megatron.scaling.records import Axis

    by = tuple(args.by)
    options = command.Options(Axis(args.axis), args.benchmark, args.skip, by, args.title, args.out, args.json)
    study = command.StudyOptions(args.form, tuple(args.only), args.jobs, args.dry_run)
    return command.run(args.runs, options, study, Console())


def _watch(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.compare import watch

    if args.once is not None:
        print(f"open {watch.once(args.run, args.once)}")
        return 0
    watch.watch(args.run, args.host, args.port, lambda line: print(line, flush=True))
    return 0


def _sample(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.chat import command

    screen = command.Screen(
        write=lambda text: print(text, end="", flush=True), say=lambda text: print(text, file=sys.stderr)
    )
    return command.run(args, screen)


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.convert import command

    return command.convert(args)


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.convert import command

    return command.inspect(args)


def _config(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.config.describe import describe

    print(describe(args.key))
    return 0


def _methods(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.config.describe import methods

    for name, meaning in methods().items():
        print(f"{name:<20}{meaning}")
    return 0


def _version(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.run.folder import hardware, package_versions

    for name, version in package_versions().items():
        print(f"{name:<20}{version}")
    print(f"{'python':<20}{platform.python_version()}\n{'hardware':<20}{hardware()}")
    return 0


def _completion(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.config import all_keys
    from stare_megatron.host.shipped import shipped

    keys = all_keys()
    tables = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    pages = {name: shipped(folder, "").split() for name, folder in (("docs", "docs"), ("example", "examples"))}
    pages["config"] = [*tables, *keys]
    print(completion.script(_parser(), args.shell, keys, pages), end="")
    return 0


def _shipped(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.host.shipped import shipped

    print(shipped(args.folder, args.name).rstrip())
    return 0


def _make_tiny_model(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.tasks import command

    print(command.run(args))
    return 0


def _prepare_data(args: argparse.Namespace, rest: list[str]) -> int:
    from stare_megatron.data.prepare import command

    print(command.run(args, lambda line: print(line, file=sys.stderr)))
    return 0


_START = """start here, on a machine without a GPU:
  {called} make-tiny-model --out .cache/demo
  {called} example demo_cpu/run.toml > demo.toml
  {called} train demo.toml
"""


def _parser() -> argparse.ArgumentParser:
    from stare_megatron.chat import arguments as chat_arguments
    from stare_megatron.compare import arguments as compare_arguments
    from stare_megatron.convert import arguments
    from stare_megatron.data.prepare import arguments as prepare_data
    from stare_megatron.scaling import arguments as scale_arguments
    from stare_megatron.study import arguments as study_arguments
    from stare_megatron.tasks import arguments as tasks_arguments

    parser = argparse.ArgumentParser(
        prog="stare-megatron",
        description="Reinforcement learning of language models with STARE.",
        epilog=_START.format(called=program.called()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_runs(commands)
    study = _command(commands, "study", _study, study_arguments.ABOUT, *study_arguments.EXAMPLES)
    study_arguments.add_study(study)
    compare = _command(commands, "compare", _compare, compare_arguments.ABOUT, *compare_arguments.EXAMPLES)
    compare_arguments.add_compare(compare)
    watch = _command(commands, "watch", _watch, compare_arguments.WATCH, *compare_arguments.WATCH_EXAMPLES)
    compare_arguments.add_watch(watch)
    scale_arguments.add_scale(_command(commands, "scale", _scale, scale_arguments.ABOUT, *scale_arguments.EXAMPLES))
    sample = _command(commands, "sample", _sample, chat_arguments.ABOUT, *chat_arguments.EXAMPLES)
    chat_arguments.add_sample(sample)

    about = "turn a Hugging Face checkpoint into a Megatron-Core one, or a Megatron-Core or training checkpoint back"
    arguments.add_convert(_command(commands, "convert", _convert, about, "convert Qwen3-8B Qwen3-8B-mcore"))
    about = "show what a checkpoint contains, or how two differ"
    arguments.add_inspect(
        _command(commands, "inspect", _inspect, about, "inspect Qwen3-8B", "inspect runs/demo Qwen3-8B")
    )
    tiny = _command(commands, "make-tiny-model", _make_tiny_model, tasks_arguments.ABOUT, tasks_arguments.EXAMPLE)
    tasks_arguments.add_make_tiny_model(tiny)
    prepare = _command(commands, "prepare-data", _prepare_data, prepare_data.ABOUT, *prepare_data.EXAMPLES)
    prepare_data.add_prepare_data(prepare)
    add = _command(
        commands, "config", _config, "explain a key of the configuration", "config", "config trainer.scoring"
    ).add_argument
    add("key", nargs="?", default="", help="a key or a table; without it, the tables")
    _command(commands, "methods", _methods, "list the methods of algorithm.method", "methods")
    for name, folder, what in (("docs", "docs", "a page of the documentation"), ("example", "examples", "an example")):
        add = _command(
            commands, name, _shipped, f"print {what}", name, f"{name} {_SHIPPED[name]}", folder=folder
        ).add_argument
        add("name", nargs="?", default="", help="without it, the names")
    shell = _command(commands, "completion", _completion, completion.ABOUT, *completion.EXAMPLES)
    shell.add_argument("shell", choices=completion.SHELLS)
    _command(commands, "version", _version, "versions of this package and of what it runs on", "version")
    return parser


_SHIPPED = {"docs": "checkpoints", "example": "demo_cpu/run.toml > demo.toml"}


def _command(commands: Any, name: str, handler: Handler, about: str, *examples: str, **defaults: str) -> Any:
    """Add a command; returns its parser."""
    called = program.called()
    lines = "\n".join(f"  {called} {example}" for example in examples)
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler, **defaults)
    return parser


def _add_runs(commands: Any) -> None:
    from stare_megatron.launch import arguments as launch_arguments
    from stare_megatron.plan.arguments import ABOUT, EXAMPLES, add_plan
    from stare_megatron.run import arguments as run_arguments

    run_arguments.add_train(_command(commands, "train", _train, run_arguments.TRAIN, *run_arguments.TRAIN_EXAMPLES))
    run_arguments.add_train(_command(commands, "sft", _sft, run_arguments.SFT, *run_arguments.SFT_EXAMPLES))
    run_arguments.add_eval(_command(commands, "eval", _eval, run_arguments.EVAL, *run_arguments.EVAL_EXAMPLES))

    about = "check the machines a run would use: versions, GPUs, network, shared folder, limits; names the cure"
    examples = ("doctor run.toml", "doctor run.toml cluster.address=auto", "doctor cluster.address=HOST:6379", "doctor")
    add = _command(commands, "doctor", _doctor, about, *examples).add_argument
    settings = "TOML file of a run and overrides, or cluster.address=... alone; without any: this machine"
    add("settings", nargs="*", metavar="run.toml key.sub=value", help=settings)

    about = "write what each process of a run did when, for Perfetto or Chrome"
    add = _command(commands, "trace", _trace, about, "trace runs/demo", "trace runs/demo --steps 3-5").add_argument
    add("run", type=paths.argument, help="run folder")
    add("--steps", default="", metavar="A-B", help="only these steps, e.g. 7 or 3-5")
    add("--out", type=paths.argument, metavar="FILE", help="file to write (default: RUN/trace.json)")

    add_plan(_command(commands, "plan", _plan, ABOUT, *EXAMPLES))
    launch = _command(commands, "launch", _launch, launch_arguments.ABOUT, *launch_arguments.EXAMPLES)
    launch_arguments.add_launch(launch)

    add = _command(commands, "plot", _plot, "draw a run's curves from its metrics", "plot runs/demo").add_argument
    add("run", type=paths.argument, help="run folder")


def main(argv: list[str] | None = None) -> int:
    what = "the command"
    try:  # of all that takes time, imports included
        parser = _parser()
        completion.check_command(parser, sys.argv[1:] if argv is None else argv)
        # argparse takes a list of positionals in one piece only; overrides after an option are what is left over.
        args, rest = parser.parse_known_args(argv)
        takes = args.handler in (_train, _sft, _eval, _plan, _launch)
        if rest and (not takes or any(item.startswith("-") for item in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        what = {_train: "the run", _sft: "the run", _eval: "the evaluation"}.get(args.handler, what)
        takes_long = args.handler in (_train, _sft, _eval, _study, _scale)
        with program.taking_long() if takes_long else contextlib.nullcontext():
            return args.handler(args, rest)
    except (UserError, RunError, KeyboardInterrupt) as e:
        return _stopped(e, *ending(e, what))
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = f"{e.filename or 'a file'}: its disk is full ({e.strerror}); free some room and start again"
        return _stopped(e, full, 1)
    finally:
        if argv is None:
            program.leave()


def _stopped(error: BaseException, text: str, code: int) -> int:
    """Print what ended the command and what there is to say below it; returns `code`."""
    print("\n".join([f"stare-megatron: {text}", *vars(error).get("__notes__", [])]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
