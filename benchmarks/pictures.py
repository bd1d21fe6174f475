"""Draw the pictures of benchmarks/results/*.json, into benchmarks/figures/.

    python benchmarks/pictures.py                # all whose results are there; measures nothing
    python benchmarks/pictures.py speed relax    # some

The scripts that measure call `draw_results` at their end. The pictures have no background, grey
ink and colours of middling brightness: they can be read on light and on dark pages.
"""
from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from common import FIGURES, RESULTS, atoms_in, command_line, read_results
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from summary import ERRORS, WAYS, ablation_errors, both_there, updates_by_degree

WIDTH = 9.0  # inches: a page shows a picture about as wide as this at 100 dots per inch
BLUE, ORANGE, GREEN, RED = "#3b8eea", "#e0752d", "#2ea06b", "#e0524d"
PURPLE, BROWN, PINK, GREY = "#9d72e3", "#b0862b", "#d565a6", "#808080"
PEERS = {
    "Facet": BLUE, "MACE 64x0e+64x1o": ORANGE, "MACE 128x0e": RED, "MACE 128x0e+128x1o": BROWN,
    "SevenNet-0": PURPLE, "NequIP": GREEN, "NequIP compiled": PINK}
MARKERS = "osD^v"
FAINT = "#80808055"  # lines of a grid

STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.facecolor": "none", "legend.edgecolor": FAINT, "text.color": GREY,
    "axes.labelcolor": GREY, "axes.titlecolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "grid.color": FAINT, "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY]),
    "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9, "figure.titlesize": 11,
    "lines.linewidth": 1.5, "savefig.dpi": 130}


def plain_numbers(axis) -> None:
    """Few ticks with plain numbers, for logarithmic axes that span less than a decade."""
    axis.set_major_locator(MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


# ─── The pictures ────────────────────────────────────────────────────────────────────────────────


def paint_speed(figure: Figure, results: dict) -> None:
    """ms of the bare model against atoms, a panel per number of threads; the training step."""
    runs = results["runs"]
    most = max(run["species"] for run in runs.values())
    chosen = {name.split(", ")[1]: run for name, run in runs.items() if run["species"] == most}
    *axes, last = figure.subplots(1, len(chosen) + 1, squeeze=False)[0]

    for axis, (title, run) in zip(axes, chosen.items(), strict=True):
        crystals = [crystal for crystal in run["bare"] if crystal.startswith("Si")]
        for peer, colour in PEERS.items():
            measured = [crystal for crystal in crystals if peer in run["bare"][crystal]]
            atoms = [atoms_in(crystal) for crystal in measured]
            ms = [run["bare"][crystal][peer]["ms"] for crystal in measured]
            if atoms:
                width = 3 if peer == "Facet" else 1.3
                axis.loglog(atoms, ms, "o-", color=colour, label=peer, markersize=4,
                            linewidth=width)
        axis.set(title=f"energy, forces, stress: {title}", xlabel="silicon atoms", ylabel="ms")
        axis.grid()

    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    title, run = next(iter(chosen.items()))
    bars = run["train"]["4 x Si 64"]
    ms = [one["ms"] for one in bars.values()]
    drawn = last.barh(list(bars), ms, color=[PEERS.get(peer, GREY) for peer in bars])
    last.bar_label(drawn, fmt=" {:,.0f}")
    last.set(title=f"training step: {title}", xlabel="ms, 4 × 64 silicon atoms")
    last.margins(x=0.18)
    last.xaxis.set_major_locator(MaxNLocator(4))
    last.invert_yaxis()


def paint_accuracy(figure: Figure, results: dict) -> None:
    """Errors against CPU-seconds, a column per set."""
    sets = {name: results["against_time"][name] for name in both_there()}
    axes = figure.subplots(2, len(sets), squeeze=False, sharex="col")
    for column, (name, content) in zip(axes.T, sets.items(), strict=True):
        for axis, (key, text) in zip(column, ERRORS.items(), strict=True):
            for model, run in content["mace"].items():
                seconds, errors = run["curve"]["cpu_seconds"], run["curve"][key]
                colour = PEERS.get(model, GREY)
                axis.loglog(seconds[1:], errors[1:], color=colour, label=model)
            runs = sorted(content["facet"].items(), key=lambda run: float(run[0]))
            for (share, run), marker in zip(runs, MARKERS, strict=False):
                axis.loglog(run["curve"]["cpu_seconds"], run["curve"][key], marker + "-",
                            color=BLUE, markersize=4, label=f"Facet, {share} of its usual steps")
            axis.set(ylabel=text)
            low, high = axis.get_ylim()
            if high < 5 * low:
                plain_numbers(axis.yaxis)
            axis.grid()
        column[0].set_title(name)
        column[1].set_xlabel("CPU-seconds of training")
    lines, words = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, words, loc="outside lower center", ncols=3, frameon=False)


def paint_relaxation(figure: Figure, results: dict) -> None:
    """Seconds per crystal and milliseconds per step, against the number of atoms."""
    left, right = figure.subplots(1, 2)
    table = results["relaxations"]
    atoms = np.array(table["atoms"])
    for name, colour in (("mace", ORANGE), ("facet", BLUE)):
        if name not in table:
            continue
        seconds = np.array(table[name]["seconds"])
        done = np.array(table[name]["converged"])
        step = 1000 * seconds / np.array(table[name]["evaluations"])  # ms
        for axis, y in ((left, seconds), (right, step)):
            axis.plot(atoms[done], y[done], "o", markersize=5, color=colour, label=WAYS[name])
            axis.plot(atoms[~done], y[~done], "o", markersize=5, color=colour, fillstyle="none")

    groups = results["groups"]
    for axis, key in ((left, "seconds_per_crystal"), (right, "ms_per_evaluation")):
        axis.plot(groups["mean_atoms"], groups[key], "s-", markersize=6, color=GREEN,
                  label=WAYS["batched"])
        axis.set(xscale="log", yscale="log", xlabel="atoms")
        axis.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid()
    left.set(ylabel="seconds per crystal", title="relaxation (open: not converged)")
    right.set(ylabel="ms per crystal and step", title="one step")
    right.legend()


def paint_ablations(figure: Figure, results: dict) -> None:
    """Force MAE against the time of a training step: a column per set, a row per group."""
    titles = {
        "radial": ("radial functions", ORANGE), "update": ("node update", PURPLE),
        "size": ("size of the model", GREEN)}
    variants = results["timings"]["variants"]
    group_of = dict(zip(variants["variant"], variants["group"], strict=True))
    panels = {}  # set: {variant: (ms, error, spread)}
    for name, errors in ablation_errors(results).items():
        ms = dict(zip(variants["variant"], variants["step_ms"][name], strict=True))
        panels[name] = {v: (ms[v], np.mean(values), np.std(values, ddof=len(values) > 1))
                        for v, values in errors.items() if np.isfinite(values).all()}
    panels = {name: points for name, points in panels.items() if len(points) > 1}
    groups = [g for g in titles if any(group_of[v] == g for one in panels.values() for v in one)]

    axes = figure.subplots(len(groups), len(panels), squeeze=False)
    for (i, j), axis in np.ndenumerate(axes):
        name, points = list(panels.items())[j]
        title, colour = titles[groups[i]]
        axis.set(xscale="log", yscale="log", title=f"{name}: {title}")
        shown = [v for v in points if group_of[v] in (groups[i], "default")]
        shown.sort(key=lambda v: points[v][1])
        if shown == ["default"]:
            axis.set_visible(False)
            continue
        for variant, height in zip(shown, np.linspace(0, 1, len(shown)), strict=True):
            ms, error, spread = points[variant]
            ink = BLUE if variant == "default" else colour
            axis.errorbar(ms, error, spread, fmt="o", color=ink, markersize=5, elinewidth=1)
            line = {"arrowstyle": "-", "color": FAINT, "shrinkA": 0, "relpos": (0, 0.5)}
            axis.annotate(variant, (ms, error), (1.05, height), textcoords="axes fraction",
                          va="center", color=ink, arrowprops={**line, "zorder": 0})
        for side in (axis.xaxis, axis.yaxis):
            plain_numbers(side)
        if j == 0:
            axis.set_ylabel("force MAE (meV/Å)")
    for column in axes.T:
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.set_xlabel("training step (ms)")
    figure.suptitle("test error after training against time of a step")


def paint_updates(figure: Figure, results: dict) -> None:
    """Time and memory of the node update alone against the degree L."""
    titles = ("a call (ms)", "with its gradients (ms)", "kept for the gradients (MB)")
    degrees = updates_by_degree(results)
    for i, (axis, title) in enumerate(zip(figure.subplots(1, 3), titles, strict=True)):
        for kind in degrees[1]:
            values = [degree[kind][i] for degree in degrees.values()]
            width = 3 if kind == "product grid" else 1.3
            axis.semilogy(list(degrees), values, "o-", markersize=4, linewidth=width, label=kind)
        axis.set(title=title, xlabel="degree L", xticks=list(degrees))
        axis.grid()
    lines, words = axis.get_legend_handles_labels()
    figure.legend(lines, words, loc="outside lower center", ncols=3, frameon=False)


def paint_sevennet_trim(figure: Figure, results: dict) -> None:
    """Energy and force errors against parameters, of what changes something."""
    rows = results["rows"]
    whole = rows["parameters"][rows["variant"].index("SevenNet-0")] / 1000
    chosen = [
        i for i, name in enumerate(rows["variant"])
        if name not in ("SevenNet-0", "exact folds only")]
    axes = figure.subplots(1, 2, sharex=True)
    errors = {"energy_meV_per_atom": "energy MAE, meV/atom", "force_meV_per_A": "force MAE, meV/Å"}
    for axis, (key, text) in zip(axes, errors.items(), strict=True):
        for number, i in enumerate(chosen, 1):
            name, point = rows["variant"][i], (rows["parameters"][i] / 1000, rows[key][i])
            tuned = "tuned" in name
            marker = "*" if tuned else "s" if "Bessel" in name else "o"
            colour = BLUE if "fold" in name else ORANGE
            colour = GREEN if tuned else GREY if "Bessel" in name else colour
            axis.plot(*point, marker, markersize=14 if tuned else 8, color=colour, zorder=3,
                      linestyle="none", label=f"{number}  {name}")
            axis.annotate(str(number), point, xytext=(-19, -7) if tuned else (8, 2),
                          textcoords="offset points", fontsize=11)
        axis.axvline(0.75 * whole, color=RED, linewidth=1, linestyle="--")
        axis.set(yscale="log", xlabel=f"thousand parameters (SevenNet-0: {whole:.0f})", title=text)
        axis.grid()
        axis.margins(0.1)
    figure.suptitle(
        "difference from SevenNet-0 on unseen rattled crystals\n"
        "dashed: a quarter of the parameters less; stars: tuned on SevenNet-0's own outputs")
    lines, words = axes[0].get_legend_handles_labels()
    figure.legend(lines, words, loc="outside lower center", ncols=3, frameon=False)


def paint_short_range(figure: Figure, results: dict) -> None:
    """Dimers, temperature and shortest distance of every model."""
    models = results["models"]
    rows = figure.subplots(len(models), 3, squeeze=False)
    for row, (name, one) in zip(rows, models.items(), strict=True):
        curves = one["curves"]["energy_eV"]
        colours = matplotlib.colormaps["viridis"](np.linspace(0.35, 0.8, len(curves)))
        for colour, energy in zip(colours, curves.values(), strict=True):
            row[0].plot(one["curves"]["distance_A"], energy, linewidth=0.8, color=colour)
        pairs, hot = one["scan"]["pairs"], one["hot"]
        title = f"{name}: dimers, {len(curves)} of {pairs}"
        row[0].set(title=title, ylabel="energy (eV)", ylim=(-5, 50), xlim=(0, 3))
        row[1].plot(hot["time_ps"], hot["temperature_K"], linewidth=0.8, color=ORANGE)
        title = f"{hot['structure']} at {hot['kelvin']:.0f} K"
        row[1].set(title=title, ylabel="temperature (K)", ylim=(0, None))
        row[2].plot(hot["time_ps"], hot["shortest_distance_A"], linewidth=0.8, color=BLUE)
        row[2].set(title="shortest distance", ylabel="Å", ylim=(0, None))
    for axis, text in zip(rows[-1], ("r (Å)", "time (ps)", "time (ps)"), strict=True):
        axis.set_xlabel(text)


def paint_equivariance(figure: Figure, results: dict) -> None:
    """Error by grid and by size of the input, cost, error in training, energy, momentum."""
    colours = dict(zip(results["models"], (BLUE, ORANGE, RED), strict=True))
    error, amplitude, cost, during, energy, momentum = figure.subplots(2, 3).flat

    for name, model in results["models"].items():
        colour, rotation = colours[name], results["rotation"][name]
        for when, line, alpha in (("before", "--", 0.5), ("after", "-", 1)):
            table = rotation[f"amplitude_{when}"]
            x, y = table["input_rms"], table["relative"]
            as_it_is = table["amplitude"].index(1)
            amplitude.loglog(x, y, line, color=colour, alpha=alpha)
            amplitude.plot(x[as_it_is], y[as_it_is], "o", color=colour, markersize=4, alpha=alpha)
            if name != "silu-26":  # the weights of "silu" before training, and much like them after
                table = rotation[when]
                error.loglog(table["points"], table["force_relative"], f"o{line}", color=colour,
                             markersize=4, alpha=alpha)

        kind = name.split("-")[0].replace("silu", "SiLU")
        label = f"{kind}, {model['points']} points"
        table = rotation["during"]
        during.semilogy(table["step"], table["force_relative"], color=colour, label=label)
        trace = results["crystal"][f"{name} float32"]
        energy.plot(trace["trace_ps"], trace["trace_meV_per_atom"], color=colour, linewidth=0.9)
        for dtype, line in (("float32", "-"), ("float64", ":")):
            trace = results["cluster"][f"{name} {dtype}"]
            x, y = trace["trace_ps"], trace["trace_angular_momentum"]
            momentum.semilogy(x[1:], y[1:], line, color=colour)

    for name, table in results["time"].items():
        cost.plot(table["points"], table["ms"], "o-", color=colours[name], markersize=4)

    lines, words = during.get_legend_handles_labels()
    figure.legend(lines, words, loc="outside upper center", ncols=3, frameon=False)
    grids = results["time"]["product"]["points"]
    ticks = [p for p in (14, 26, 50, 86, 146, 302) if p in grids]
    error.set(title="error of forces under rotation", xlabel="grid points (dashed: untrained)",
              xticks=ticks, xticklabels=ticks)
    error.minorticks_off()
    amplitude.set(title="error of one layer alone", xlabel="rms of its input (dot: as it is)")
    cost.set(title="one evaluation, 64 atoms (ms)", xlabel="grid points", ylim=(0, None))
    during.set(title="error of forces in training", xlabel="step")
    energy.set(title="crystal: energy (meV/atom)", xlabel="time (ps), float32")
    momentum.set(title="cluster: angular momentum", xlabel="time (ps); dotted: float64")


# ─── Files ───────────────────────────────────────────────────────────────────────────────────────

PICTURES = {  # of each results file, and how many inches high
    "speed": (paint_speed, 4.3), "accuracy": (paint_accuracy, 5.6),
    "relax": (paint_relaxation, 4.0), "ablations": (paint_ablations, 5.6),
    "updates": (paint_updates, 3.8),
    "sevennet_trim": (paint_sevennet_trim, 5.2), "short_range": (paint_short_range, 6.6),
    "equivariance": (paint_equivariance, 6.0)}


def known() -> list[str]:
    """Results that have a picture; a name may end in _cuda."""
    paths = sorted(RESULTS.glob("*.json"))
    return [path.stem for path in paths if path.stem.removesuffix("_cuda") in PICTURES]


def draw_results(name: str, folder: Path = FIGURES, results: dict | None = None) -> None:
    """figures/NAME.png from results/NAME.json, or from results."""
    paint, height = PICTURES[name.removesuffix("_cuda")]
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), layout="constrained")
        paint(figure, results or read_results(name))
        figure.savefig(folder / f"{name}.png")
    print(folder / f"{name}.png")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known()))
    names = parser.parse_args().names
    wrong = sorted(set(names) - set(known()))
    if wrong:
        parser.error(f"{wrong[0]}: no such results; there are {' '.join(known())}")
    for name in names or known():
        draw_results(name)


if __name__ == "__main__":
    main()
