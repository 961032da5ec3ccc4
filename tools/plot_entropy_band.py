"""Draw docs/images/entropy_band.png, the README's picture of the result, from the committed runs.

    python tools/plot_entropy_band.py

Thin lines and dots are the runs of three seeds, thick lines their means. Only the reward is smoothed, over ten steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stare_megatron.compare.align import moving_average
from stare_megatron.compare.load import Run, load_all
from stare_megatron.compare.stats import TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples/entropy_band/results"
TARGET = 0.2  # H_tgt of the study, nats
LINES = {
    "grpo_ds": ("GRPO-ds", "#c0392b"),
    "stare_o1": ("STARE-O1", "#2f6db5"),
    "adaptive_entropy": ("adaptive entropy bonus", "#8a8f98"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/entropy_band.png", help="PNG to write")
    out = parser.parse_args(argv).out

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stare_megatron.metrics.plot import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        entropy, reward, end = figure.subplots(1, 3)
        low, high = TARGET * (1 - TOLERANCE), TARGET * (1 + TOLERANCE)
        entropy.axhspan(low, high, color="#dfe9f5", label="target ± 30 %")
        for name, (label, colour) in LINES.items():
            runs = load_all(sorted(RESULTS.glob(f"{name}-seed*")), now=0.0)
            _lines(entropy, [run.series["policy/entropy"] for run in runs], label, colour)
            _lines(reward, [moving_average(run.series["reward/mean"], 10) for run in runs], label, colour)
            points = np.array([_last_evaluation(run) for run in runs])
            end.scatter(points[:, 0], points[:, 1], s=36, color=colour, label=label)
        entropy.set(title="Entropy, nats per token", xlabel="step", ylim=(0, 0.6))
        reward.set(title="Reward, mean of 10 steps", xlabel="step", ylim=(0, 1))
        end.set(title="Held out, after 160 steps", xlabel="avg@32", xlim=(0.4, 1), ylim=(0, 10))
        end.set_ylabel("distinct right answers of 32")
        entropy.legend(loc="upper right")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Software": None})
    print(out)
    return 0


def _lines(ax: Axes, curves: list[np.ndarray], label: str, colour: str) -> None:
    """`curves`: float64 [steps] for each seed."""
    for curve in curves:
        ax.plot(np.arange(1, len(curve) + 1), curve, color=colour, linewidth=0.6, alpha=0.45)
    mean = np.mean(curves, axis=0)
    ax.plot(np.arange(1, len(mean) + 1), mean, color=colour, linewidth=2.2, label=label)


def _last_evaluation(run: Run) -> tuple[float, float]:
    """avg@32 and distinct right answers per prompt of the last evaluation."""
    row = json.loads((run.folder / "eval.jsonl").read_text().splitlines()[-1])
    return row["eval/test/avg@32"], row["eval/test/distinct_correct"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
