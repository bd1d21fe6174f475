"""Draw the pictures of benchmarks/results/*.json, each for light and for dark pages: figures/NAME.png, figures/NAME_dark.png.

    python benchmarks/pictures.py                # all whose results are there; measures nothing
    python benchmarks/pictures.py speed relax    # some

The scripts that measure call `draw_results` at their end; lesson.py draws the README's tour with the same `draw`.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from common import FIGURES, RESULTS, atoms_in, read_results

WIDTH = 9.0  # inches: GitHub shows a picture about as wide as this at 100 dots per inch, so 10 points stay readable
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY = (f"C{i}" for i in range(8))
PEERS = {"Facet": BLUE, "MACE 64x0e+64x1o": ORANGE, "MACE 128x0e": RED, "MACE 128x0e+128x1o": BROWN, "SevenNet-0": PURPLE,
         "NequIP": GREEN, "NequIP compiled": PINK}
THEMES = {  # suffix of the file: page, ink, faint lines, and the colours above
    "": ("#ffffff", "#1f2328", "#d1d9e0", "#0969da #d9600b #1a7f37 #cf222e #8250df #7d4e00 #bf3989 #6e7781"),
    "_dark": ("#0d1117", "#e6edf3", "#3d444d", "#58a6ff #f0883e #3fb950 #ff7b72 #bc8cff #d4a72c #f778ba #9198a1")}


def style(page: str, ink: str, faint: str, colours: str) -> dict:
    """Matplotlib's settings for one page colour."""
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "axes.titlecolor")
    return {**dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), page),
            **dict.fromkeys(inked, ink), "grid.color": faint, "legend.edgecolor": faint, "axes.prop_cycle": cycler(color=colours.split()),
            "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9,
            "figure.titlesize": 11, "savefig.dpi": 160, "lines.linewidth": 1.5, "axes.linewidth": 0.8}


def draw(name: str, height: float, paint: Callable[..., None], *content, folder: Path = FIGURES) -> None:
    """Let paint(figure, *content) draw on a figure of README width, once for each page colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, theme in THEMES.items():
        with matplotlib.rc_context(style(*theme)):
            figure = Figure((WIDTH, height), layout="constrained")
            paint(figure, *content)
            figure.savefig(folder / f"{name}{suffix}.png")
    print(f"{folder.name}/{name}.png, {name}_dark.png")


def setting(name: str) -> str:
    """A colour of the page that is being drawn."""
    return matplotlib.rcParams[name]


ERRORS = {"force_mae_eV_per_A": "force MAE (eV/Å)", "energy_mae_meV_per_atom": "energy MAE (meV/atom)"}


def full_name(model: str) -> str:
    """mace_train.py calls the smallest MACE "MACE 64"."""
    return model.replace("MACE 64", "MACE 64x0e+64x1o")


def speed(figure: Figure, results: dict) -> None:
    """ms of the bare model against atoms, one panel per number of threads, and the training step beside."""
    most = max(run["species"] for run in results["runs"].values())
    titles, chosen = zip(*((name.split(", ")[1], run) for name, run in results["runs"].items() if run["species"] == most))  # "89 species, 1 thread"
    names = dict.fromkeys(name for run in chosen for part in ("bare", "train") for row in run[part].values() for name in row)
    spare = iter(f"C{i % 8}" for i in range(8, 99))
    colours = {name: PEERS.get(name) or next(spare) for name in names}
    *axes, last = figure.subplots(1, len(chosen) + 1, squeeze=False)[0]
    for axis, run, title in zip(axes, chosen, titles):
        sizes = sorted((crystal for crystal in run["bare"] if crystal.startswith("Si")), key=atoms_in)
        for peer, colour in colours.items():
            points = [(atoms_in(crystal), run["bare"][crystal][peer]["ms"]) for crystal in sizes if peer in run["bare"][crystal]]
            if points:
                axis.loglog(*zip(*points), "o-", color=colour, markersize=4, label=peer, linewidth=3 if peer == "Facet" else 1.3)
        axis.set(title=f"energy, forces, stress: {title}", xlabel="silicon atoms", ylabel="ms")
        axis.grid(linewidth=0.5)
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    bars = next(iter(chosen[0]["train"].values()))
    drawn = last.barh(list(bars), [numbers["ms"] for numbers in bars.values()], color=[colours[peer] for peer in bars])
    last.bar_label(drawn, fmt=" {:,.0f}")
    last.set(title=f"training step: {titles[0]}", xlabel="ms, 4 × 64 silicon atoms")
    last.margins(x=0.18)
    last.xaxis.set_major_locator(MaxNLocator(4))
    last.invert_yaxis()


def time_to_accuracy(figure: Figure, results: dict) -> None:
    """Errors against CPU-seconds, a column per set."""
    axes = figure.subplots(2, len(results["facet"]), squeeze=False, sharex="col")
    for column, (name, runs) in zip(axes.T, results["facet"].items()):
        for axis, (key, text) in zip(column, ERRORS.items()):
            for run in (m for m in results["mace"] if m["set"] == name):
                label = full_name(run["model"])
                axis.loglog([p["cpu_seconds"] for p in run["curve"][1:]], [p[key] for p in run["curve"][1:]], color=PEERS.get(label, GREY), label=label)
            axis.loglog([r["cpu_seconds"] for r in runs], [r[key] for r in runs], "o", color=BLUE, label="Facet, whole trainings")
            axis.set(ylabel=text)
            if axis.get_ylim()[1] < 5 * axis.get_ylim()[0]:  # less than a decade: plain numbers
                axis.yaxis.set_major_locator(MaxNLocator(5))
                axis.yaxis.set_major_formatter(ScalarFormatter())
                axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(True, linewidth=0.5)
        column[0].set_title(name)
        column[0].legend()
        column[1].set_xlabel("CPU-seconds of training")


def relax(figure: Figure, results: dict) -> None:
    """Seconds per crystal and milliseconds per step, against the number of atoms."""
    left, right = figure.subplots(1, 2)
    for name, label, colour in (("mace", "MACE, ASE", ORANGE), ("facet", "Facet, ASE", BLUE)):
        chosen = [row for row in results["relaxations"] if name in row]
        atoms = np.array([row["atoms"] for row in chosen])
        seconds, done = (np.array([row[name][key] for row in chosen]) for key in ("seconds", "converged"))
        evaluations = np.array([row[name]["evaluations"] for row in chosen])
        for axis, y in ((left, seconds), (right, 1000 * seconds / evaluations)) if chosen else ():
            axis.plot(atoms[done], y[done], "o", markersize=5, color=colour, label=label)
            axis.plot(atoms[~done], y[~done], "o", markersize=5, color=colour, markerfacecolor=setting("axes.facecolor"))
    atoms = [group["mean_atoms"] for group in results["groups"]]
    for axis, key in ((left, "seconds_per_crystal"), (right, "ms_per_evaluation")):
        axis.plot(atoms, [group[key] for group in results["groups"]], "s-", markersize=6, color=GREEN, label="Facet, facet.relax")
        axis.set(xscale="log", yscale="log", xlabel="atoms")
        axis.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid(linewidth=0.5)
    left.set(ylabel="seconds per crystal", title="relaxation (open: not converged)")
    right.set(ylabel="ms per crystal and step", title="one step")
    right.legend()


def ablations(figure: Figure, results: dict) -> None:
    """Force MAE against the time of a training step: a column per set, a row per group; the front of all in grey."""
    titles = {"radial": ("radial functions", ORANGE), "update": ("node update", PURPLE), "density": ("density", RED), "size": ("size of the model", GREEN)}
    panels = results["picture"]  # set: {"front": …, "groups": {group: {variant: [ms, error, spread]}}}
    groups = [group for group in titles if any(group in one["groups"] for one in panels.values())]
    for (i, j), axis in np.ndenumerate(figure.subplots(len(groups), len(panels), squeeze=False)):
        name, content = list(panels.items())[j]
        points, (title, shade) = content["groups"].get(groups[i], {}), titles[groups[i]]
        axis.set(xscale="log", yscale="log")
        order = sorted(points, key=lambda variant: points[variant][1])
        for variant, height in zip(order, np.linspace(0, 1, len(order))):
            ms, error, spread = points[variant]
            colour = BLUE if variant == "default" else shade
            axis.errorbar(ms, error, spread, fmt="o", color=colour, markersize=5, elinewidth=1)
            axis.annotate(variant, (ms, error), (1.05, height), textcoords="axes fraction", va="center", color=colour,
                          arrowprops={"arrowstyle": "-", "color": setting("grid.color"), "shrinkA": 0, "relpos": (0, 0.5), "zorder": 0})
        limits = axis.get_xlim(), axis.get_ylim()
        ms, error = zip(*content["front"], (limits[0][1], content["front"][-1][1]))
        axis.step(ms, error, where="post", color=setting("grid.color"), linewidth=4, zorder=-1)
        axis.set(xlim=limits[0], ylim=limits[1], title=f"{name}: {title}", ylabel="" if j else "force MAE (meV/Å)",
                 xlabel="training step (ms)" if i == len(groups) - 1 else "")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(5))
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(ScalarFormatter())
    figure.suptitle(f"test error after {results['steps']} steps against time of a step; grey: front of all variants")


def sevennet_trim(figure: Figure, results: dict) -> None:
    """Energy and force errors against parameters; what changes nothing has no place on a logarithmic axis."""
    whole, = (row["parameters"] / 1000 for row in results["rows"] if row["variant"] == "SevenNet-0")
    rows = [row for row in results["rows"] if row["variant"] not in ("SevenNet-0", "exact folds only")]
    axes = figure.subplots(1, 2, sharex=True)
    for axis, name, text in zip(axes, ("energy", "force"), ("energy MAE, meV/atom", "force MAE, meV/Å")):
        for i, row in enumerate(rows):
            tuned, bessel, folds = (word in row["variant"] for word in ("tuned", "Bessel", "fold"))
            axis.plot(row["parameters"] / 1000, row[name]["mae"], "*" if tuned else "s" if bessel else "o", markersize=14 if tuned else 8,
                      color=GREEN if tuned else GREY if bessel else BLUE if folds else ORANGE, label=f"{i + 1}  {row['variant']}", zorder=3)
            axis.annotate(str(i + 1), (row["parameters"] / 1000, row[name]["mae"]), xytext=(-19, -7) if tuned else (8, 2),
                          textcoords="offset points", fontsize=11)
        goal, = (float(entry["goal"].split()[-1]) for goal, entry in results["goals"].items() if goal.startswith(f"tuned: {name}"))
        axis.axhline(goal, color=RED, linewidth=1, linestyle="--")
        axis.axvline(0.75 * whole, color=RED, linewidth=1, linestyle="--")
        axis.set(yscale="log", xlabel=f"thousand parameters (SevenNet-0: {whole:.0f})", title=text)
        axis.grid(linewidth=0.5)
        axis.margins(0.1)
    figure.suptitle("SevenNet-0 with splines for radial MLPs: difference from the original on unseen rattled crystals\n"
                    "dashed: a quarter of the parameters less, and the errors wanted; stars: tuned on SevenNet-0's own outputs")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def short_range(figure: Figure, results: dict) -> None:
    """Dimers, temperature and shortest distance of every model."""
    models = results["models"]
    for row, (name, one) in zip(figure.subplots(len(models), 3, squeeze=False), models.items()):
        colours = matplotlib.colormaps["viridis"](np.linspace(0.4, 0.85, len(one["curves"])))
        for colour, d in zip(colours, one["curves"].values()):
            row[0].plot(d["r"], d["energy"], linewidth=0.8, color=colour)
        pairs, md = one["scan"]["pairs"], one["hot"]
        row[0].set(title=f"{name}: dimers, {pairs} pair{'s' * (pairs > 1)}", ylabel="energy (eV)", ylim=(-5, 50), xlim=(0, 4))
        row[1].plot(md["time_ps"], md["temperature_K"], linewidth=0.8, color=ORANGE)
        row[1].set(title=f"{md['structure']} at {md['kelvin']:.0f} K", ylabel="temperature (K)", ylim=(0, None))
        row[2].plot(md["time_ps"], md["shortest_distance_A"], linewidth=0.8, color=BLUE)
        row[2].set(title="shortest distance", ylabel="Å", ylim=(0, None))
    for axis, text in zip(row, ("r (Å)", "time (ps)", "time (ps)")):
        axis.set_xlabel(text)


def equivariance(figure: Figure, r: dict) -> None:
    """Six panels: error by grid and by size of the input, cost, error in training, energy, angular momentum."""
    colour = dict(zip(r["models"], (BLUE, ORANGE, RED)))
    label = {name: f"{name.split('-')[0].replace('silu', 'SiLU')}, {m['points']} points" for name, m in r["models"].items()}
    error, amplitude, cost, during, energy, momentum = figure.subplots(2, 3).flat
    for name in r["models"]:
        for when, dots in (("before", "o--"), ("after", "o-")):
            line = {"color": colour[name], "markersize": 4, "alpha": 0.5 if when == "before" else 1}
            rows = r["rotation"][name][f"amplitude_{when}"]
            amplitude.loglog([row["input_rms"] for row in rows], [row["relative"] for row in rows], dots[1:], **line)
            here, = (row for row in rows if row["amplitude"] == 1)
            amplitude.plot(here["input_rms"], here["relative"], "o", **line)
            if name != "silu-26":  # the weights of "silu" before training, and much like them after it
                rows = r["rotation"][name][when]
                error.loglog([row["points"] for row in rows], [row["force_relative"] for row in rows], dots, **line)
        rows = r["rotation"][name]["during"]
        during.semilogy([row["step"] for row in rows], [row["force_relative"] for row in rows], color=colour[name], label=label[name])
        trace = r["crystal"][f"{name} float32"]
        energy.plot(trace["trace_ps"], trace["trace_meV_per_atom"], color=colour[name], linewidth=0.9)
        for dtype, dashes in (("float32", "-"), ("float64", ":")):
            trace = r["cluster"][f"{name} {dtype}"]
            momentum.semilogy(trace["trace_ps"][1:], trace["trace_angular_momentum"][1:], dashes, color=colour[name])
    for name, t in r["time"].items():
        cost.plot(t["points"], t["ms"], "o-", color=colour[name], markersize=4)
    figure.legend(*during.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    ticks = [p for p in (14, 26, 50, 86, 146, 302) if p in r["time"]["product"]["points"]]
    error.set(title="error of forces under rotation", xlabel="grid points (dashed: before training)", xticks=ticks, xticklabels=ticks)
    error.minorticks_off()
    amplitude.set(title="error of one layer alone", xlabel="rms of its input (dot: as it is)")
    cost.set(title="one evaluation, 64 atoms (ms)", xlabel="grid points", ylim=(0, None))
    during.set(title="error of forces in training", xlabel="step")
    energy.set(title="crystal: energy (meV/atom)", xlabel="time (ps), float32")
    momentum.set(title="cluster: angular momentum", xlabel="time (ps); dotted: float64")


PICTURES = {speed: 4.3, time_to_accuracy: 5.6, relax: 4.0, ablations: 7.0, sevennet_trim: 5.2, short_range: 7.2, equivariance: 6.0}  # inches high


def draw_results(name: str, folder: Path = FIGURES, results: dict | None = None) -> None:
    """figures/NAME.png from results/NAME.json, or from results; a name may end in _cuda."""
    paint, = (paint for paint in PICTURES if paint.__name__ == name.removesuffix("_cuda"))
    draw(name, PICTURES[paint], paint, results or read_results(name), folder=folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [path.stem for path in sorted(RESULTS.glob("*.json")) if path.stem.removesuffix("_cuda") in {paint.__name__ for paint in PICTURES}]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names
    if wrong := set(names) - set(known):
        parser.error(f"{min(wrong)}: no such results; there are {' '.join(known)}")
    for name in names or known:
        draw_results(name)


if __name__ == "__main__":
    main()
