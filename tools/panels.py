"""The panels of report.png: one figure for a whole training. tools/report.py has the numbers."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ase import units

import facet

BLUE = "tab:blue"
BARS = 20  # elements at most


def draw(
    path: Path,
    model: facet.Facet,
    result: dict,
    test: list,
    predictions: list[dict],
    wanted: list[dict],
    log: list[dict],
) -> None:
    """All panels, as a PNG. result: of tools.report.report; wanted: labels; log: of metrics.csv."""
    from matplotlib.figure import Figure  # slow to import; needs no display, keeps no state

    figure = Figure((16, 12), layout="constrained")
    axes = figure.subplots(3, 4).ravel()
    atoms = np.array([len(one) for one in test])
    parity_panels(axes[:3], result, atoms, predictions, wanted)
    error_panels(axes[3], axes[4], result)
    spline_panels(axes[5:8], model)
    physics_panels(axes[8:11], result["physics"])
    log_panel(axes[11], log)
    for axis in axes:
        if not axis.has_data():
            axis.set_axis_off()
    figure.savefig(path, dpi=80)


def parity_panels(axes, result: dict, atoms: np.ndarray, predictions, wanted) -> None:
    """Predicted against labelled energies, forces and stresses of the test set."""
    if not len(atoms):
        return

    def both(name: str) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([np.ravel(one[name]) for one in wanted])
        y = np.concatenate([np.ravel(one[name]) for one in predictions])
        return x, y

    # energies per atom, from their mean
    x, y = both("energy")
    if np.isfinite(x).any():
        mean = np.nanmean(x / atoms)
        title = f"energy: MAE {result['energy_mae_meV_per_atom']:.2f} meV/atom"
        parity(axes[0], x / atoms - mean, y / atoms - mean, "energy − mean (eV/atom)", title)

    x, y = both("forces")
    if np.isfinite(x).any():
        title = f"force: MAE {1000 * result['force_mae_eV_per_A']:.1f} meV/Å"
        parity(axes[1], x, y, "force (eV/Å)", title)

    x, y = both("stress")
    if np.isfinite(x).any():
        title = f"stress: MAE {result['stress_mae_GPa']:.3f} GPa"
        parity(axes[2], x / units.GPa, y / units.GPa, "stress (GPa)", title)


def parity(axis, x: np.ndarray, y: np.ndarray, name: str, title: str) -> None:
    """Points, and the line on which they should lie."""
    limits = [np.nanmin(x), np.nanmax(x)]
    axis.plot(limits, limits, color="0.6", linewidth=0.8)
    axis.plot(x, y, ".", markersize=3 if len(x) > 300 else 6, color=BLUE, rasterized=True)
    axis.set(xlabel=f"reference {name}", ylabel=f"Facet {name}", title=title)


def error_panels(by_element, by_size, result: dict) -> None:
    """Force errors by element and by the length of the force."""
    if not result["by_size_eV_per_A"]:
        return
    elements = result["by_element_eV_per_A"]
    names = list(elements)[:BARS]
    by_element.bar(names, [1000 * elements[name] for name in names], color=BLUE)
    title = "force error by element"
    if len(elements) > BARS:
        title += f" (the {BARS} worst)"
    by_element.set(title=title, ylabel="mean |ΔF| (meV/Å)")

    size, error = np.transpose(result["by_size_eV_per_A"])
    by_size.loglog(np.maximum(size, 1e-4), np.maximum(error, 1e-5), "o-", color=BLUE)
    by_size.set(
        title="force error by size of the force", xlabel="|F| (eV/Å)", ylabel="mean |ΔF| (eV/Å)"
    )


def spline_panels(axes, model: facet.Facet) -> None:
    """The learned radial functions of each degree (colours: layers); grey: before training."""
    config = model.config
    T = config.layers
    B = config.groups
    L = config.degree
    r = torch.linspace(max(0.0, config.first_knot - 0.3), config.cutoff, 300)
    fresh = facet.Facet(config)  # splines do not start at random

    curves = []
    for one in (fresh, model):
        coefficients = one.splines.coefficients.detach().cpu()
        values = fresh.splines.basis(r) @ coefficients  # [300, T B (L+1)]
        curves.append(values.view(len(r), T, B, L + 1).numpy())
    old, new = curves

    for degree, axis in enumerate(axes[: L + 1]):
        axis.plot(r, old[:, 0, :, degree], color="0.8", linewidth=0.8)
        for t in range(T):
            names = [f"layer {t + 1}"] + ["_"] * (B - 1)
            axis.plot(r, new[:, t, :, degree], color=f"C{t}", linewidth=0.9, label=names)
        axis.set(title=f"radial functions, l = {degree} (grey: before)", xlabel="r (Å)")
        axis.legend(fontsize="x-small")


def physics_panels(axes, physics: dict) -> None:
    """Equation of state, energy drift, equivariance error."""
    if eos := physics["equation_of_state"]:
        axes[0].plot(eos["volume_A3_per_atom"], eos["energy_eV_per_atom"], "-", color=BLUE)
        axes[0].set(
            title=f"{physics['structure']}: equation of state",
            xlabel="volume (Å³/atom)",
            ylabel="energy (eV/atom)",
        )

    drift = physics["energy_drift"]
    axes[1].plot(drift["time_ps"], drift["energy_meV_per_atom"], linewidth=0.8, color=BLUE)
    axes[1].set(
        title=f"NVE at {drift['kelvin']:.0f} K: drift "
        f"{drift['drift_meV_per_atom_per_ps']:.3g} meV/atom/ps",
        xlabel="time (ps)",
        ylabel="total energy (meV/atom)",
    )

    for dtype, values in physics["equivariance_error"].items():
        axes[2].semilogy(np.maximum(values, 1e-17), "o", label=dtype)
    axes[2].set(
        title="equivariance error, trained",
        xlabel="structure",
        ylabel="largest error of forces / force RMS",
    )
    axes[2].legend(fontsize="small")


def log_panel(axis, log: list[dict]) -> None:
    """The errors that were watched during the training; nothing where nothing was watched."""
    for key, name in (
        ("energy_mae_meV_per_atom", "energy, meV/atom"),
        ("force_mae_meV_per_A", "force, meV/Å"),
    ):
        steps = []
        values = []
        for row in log:
            if row.get(key) and np.isfinite(float(row[key])):
                steps.append(int(row["step"]))
                values.append(float(row[key]))
        if steps:
            axis.semilogy(steps, values, "o-", markersize=3, label=name)
            axis.set(title="validation MAE while training", xlabel="step")
            axis.legend(fontsize="small")
