"""`stare-megatron plan`: what a run takes of each GPU, and how long a step is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stare_megatron import config as configuration
from stare_megatron.config import Config, SftConfig
from stare_megatron.errors import UserError
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan import display, hardware, lengths, supervised
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.estimate import Given, make
from stare_megatron.plan.search import search
from stare_megatron.plan.timing import Machine


@dataclass(frozen=True)
class Options:
    """What the command line says beside the run's file. Lengths in tokens, 0: assumed; `run`: one whose lengths to
    take; `kept`: share of the groups that dynamic sampling keeps."""

    gpu: str = "h100"
    nodes: int = 0
    layers: Layers = Layers.ENGINE
    response: float = 0.0
    prompt: float = 0.0
    run: Path | None = None
    kept: float = 1.0
    constants: Path | None = None
    search: bool = False
    as_json: bool = False


def main(args: argparse.Namespace, settings: Sequence[str], console: Console) -> tuple[int, str]:
    """What the command line asks for. Returns the exit code and what is to be printed, "" where it is shown already.

    Raises:
        UserError: as `run`; a calibration without a GPU, or a plan without a run.
    """
    if args.calibrate:
        from stare_megatron.plan.calibrate import calibrate

        measured = calibrate(lambda line: console.print(line, markup=False, highlight=False))
        hardware.write_constants(args.calibrate, measured)
        return 0, f"wrote {args.calibrate}; plan with --constants {args.calibrate}"
    if not settings:
        raise UserError("plan: name the TOML file of a run, or --calibrate FILE")
    options = Options(
        gpu=args.gpu,
        nodes=args.nodes,
        layers=Layers(args.layers),
        response=args.response,
        prompt=args.prompt,
        run=args.lengths,
        kept=args.kept,
        constants=args.constants,
        search=args.search,
        as_json=args.json,
    )
    return run(settings, options, console)


def run(settings: Sequence[str], options: Options, console: Console) -> tuple[int, str]:
    """Plan the run of `settings`, its file and overrides. Returns the exit code, 1 where it does not fit, and the JSON,
    "" unless it is asked for.

    Raises:
        UserError: settings, model or options cannot be read.
    """
    config = configuration.load_run(Path(settings[0]), list(settings[1:]))
    if isinstance(config, SftConfig):
        return _run_supervised(config, options, console)
    shape = read_hf_config(config.model.path)
    given = given_of(config, options)
    plan = make(config, shape, given)
    found = search(config, shape, given) if options.search else []
    code = int(bool(plan.violations) and not found)
    if options.as_json:
        return code, json.dumps(display.as_json(plan, found), indent=2)
    display.show(plan, console)
    if options.search:
        console.print()
        display.show_search(found, console)
    return code, ""


def _run_supervised(config: SftConfig, options: Options, console: Console) -> tuple[int, str]:
    """As `run`. Raises: UserError: as it; an option that is of engines."""
    if options.search or options.kept != 1:
        raise UserError("--search and --kept are of runs with engines; a supervised run has none")
    machine = machine_of(options)
    lengths = supervised.batch_lengths(config, options.prompt, options.response, options.run)
    shape = read_hf_config(config.model.path)
    plan = supervised.make(config, shape, Given(machine, lengths, nodes=options.nodes))
    code = int(bool(plan.violations))
    if options.as_json:
        return code, json.dumps(display.supervised_json(plan), indent=2)
    display.show_supervised(plan, console)
    return code, ""


def machine_of(options: Options) -> Machine:
    """Raises: UserError: an unknown GPU, or a value out of its range."""
    if min(options.nodes, options.response, options.prompt) < 0:
        raise UserError("--nodes, --response and --prompt are not below 0")
    constants = hardware.read_constants(options.constants) if options.constants else hardware.CONSTANTS
    return Machine(hardware.find(options.gpu), constants, options.layers)


def given_of(config: Config, options: Options) -> Given:
    """Raises: UserError: as `machine_of`."""
    if not 0 < options.kept <= 1:
        raise UserError(f"--kept {options.kept:g}: a share of the groups, above 0 and at most 1")
    machine = machine_of(options)
    r, longest_prompt = config.rollout, config.data.max_prompt_tokens
    count = r.prompts_per_step * r.group_size
    if options.run:
        found = lengths.of_run(options.run, count, longest=r.max_response_tokens, longest_prompt=longest_prompt)
    else:
        found = lengths.assumed(
            count,
            longest=r.max_response_tokens,
            longest_prompt=longest_prompt,
            response=options.response,
            prompt=options.prompt,
        )
    return Given(machine, found, nodes=options.nodes, kept=options.kept)
