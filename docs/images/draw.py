"""Draw the pictures of README and docs from the ledger and from checkpoints.

python docs/images/draw.py                         # results.png, from results/runs
python docs/images/draw.py TEACHER.pt KD.pt NORMKD.pt   # also softening.png and correlation.png
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from mdistiller_norm.cli import execute

HERE = Path(__file__).parent
METHODS = {
    "vanilla_resnet8": "student alone",
    "kd": "KD",
    "normkd": "NormKD",
    "dkd": "DKD",
    "dkd_normkd": "DKD+NormKD",
}
T_NORM = {
    "t_norm_0.75": 0.75,
    "t_norm_1": 1.0,
    "t_norm_1.5": 1.5,
    "normkd": 2.0,
    "t_norm_3": 3.0,
    "t_norm_4": 4.0,
}
BLUE, GREY = "#2a6fb0", "#8a8f98"


def read_runs(study: str) -> dict[str, list[float]]:
    """Return config name -> top-1 of the last epoch of its runs."""
    runs = defaultdict(list)
    for path in sorted((HERE.parents[1] / "results/runs").glob("*.json")):
        record = json.loads(path.read_text())
        config = Path(record["config_file"])
        if config.parent.name == study:
            runs[config.stem].append(record["last"]["top1"])
    return runs


def draw_results() -> None:
    """Plot the methods of the short study, and the top-1 against NormKD's T_norm."""
    runs = read_runs("short")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained"
    )
    for row, name in enumerate(METHODS):
        values = runs[name]
        color = BLUE if "normkd" in name else GREY
        mean, std = statistics.mean(values), statistics.stdev(values)
        left.errorbar(mean, row, xerr=std, fmt="o", color=color, capsize=3, markersize=7)
        left.plot(values, [row + 0.25] * len(values), ".", color=color, alpha=0.5)
        left.annotate(
            f"{mean:.2f} (n = {len(values)})",
            (mean, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    left.set(
        yticks=range(len(METHODS)),
        yticklabels=METHODS.values(),
        ylim=(4.5, -0.7),
        xlim=(47.5, 53.5),
        xlabel="test top-1 (%)",
    )
    left.set_title("resnet20 -> resnet8, CIFAR-100, 12 epochs", fontsize=10)
    means = [statistics.mean(runs[name]) for name in T_NORM]
    stds = [statistics.stdev(runs[name]) for name in T_NORM]
    right.errorbar(T_NORM.values(), means, yerr=stds, fmt="o-", color=BLUE, capsize=3)
    right.set(xlabel="T_norm", ylabel="test top-1 (%)")
    right.set_title("NormKD, n = 3", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is left else "y", alpha=0.3)
    figure.savefig(HERE / "results.png", dpi=130)


def main() -> None:
    """Draw the pictures."""
    draw_results()
    if len(sys.argv) > 1:
        teacher, kd, normkd = sys.argv[1:]
        out = str(HERE / "softening")
        execute(["visualize", "logits", "-c", teacher, "--sample", "7", "--out", out])
        names = ["--names", "KD", "NormKD", "--out", str(HERE / "correlation")]
        execute(["visualize", "correlation", "-t", teacher, "-c", kd, normkd, *names])


if __name__ == "__main__":
    main()
