"""What a trained model is worth: test errors beside simple baselines, physics, pictures.

    python -m tools.report runs/si          # reads the data again, prints, draws runs/si/report.png

train_small.py does this at the end of a training. Errors come for the whole test set, for each
group (config_type) that the files name, for each element and by the size of the force. The
baselines are one energy per species, and one pair potential for all species. The physics: energy
against volume, the drift of the energy in molecular dynamics, the forces of a turned crystal.
"""
from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import ase
import numpy as np
import torch

import facet
from tools import panels, physics
from tools.evaluate import (
    constant_baseline,
    errors,
    errors_by_group,
    labels,
    predict,
    print_table,
    tell_broken,
)
from tools.frames import (
    BadInput,
    Frames,
    load_model,
    load_sets,
    neighbours,
    print_to_stderr,
    sample,
)
from tools.run import check_data, check_files, checkpoint

SAMPLE = 5000  # test structures, evenly spread, that stand for all in a large test set


# ─── Errors ──────────────────────────────────────────────────────────────────────────────────────


def force_errors(predictions: list[dict], frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every atom with a labelled force: its symbol, |F| and |ΔF| in eV/Å; [N] each.

    |ΔF| is nan where the model gives no number.
    """
    symbols = [np.array([], str)]
    size = [[]]
    error = [[]]
    for found, atoms in zip(predictions, frames, strict=True):
        wanted = labels(atoms)["forces"]  # [N, 3]
        symbols.append(np.array(atoms.get_chemical_symbols()))
        size.append(np.linalg.norm(wanted, axis=1))
        error.append(np.linalg.norm(found["forces"] - wanted, axis=1))
    symbols, size, error = np.concatenate(symbols), np.concatenate(size), np.concatenate(error)
    known = np.isfinite(size)
    return symbols[known], size[known], error[known]


def errors_by_element(symbols: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """Mean |ΔF| of each element in eV/Å, the largest first."""
    table = {}
    for symbol in np.unique(symbols):
        table[str(symbol)] = float(error[symbols == symbol].mean())
    return dict(sorted(table.items(), key=lambda item: -item[1]))


def errors_by_size(size: np.ndarray, error: np.ndarray) -> list[tuple[float, float]]:
    """Mean |F| and mean |ΔF|, eV/Å, in up to twelve portions with as many atoms each."""
    portions = np.array_split(np.argsort(size), max(1, min(12, len(size))))
    return [(float(size[p].mean()), float(error[p].mean())) for p in portions if len(p)]


# ─── Baselines ───────────────────────────────────────────────────────────────────────────────────


class PairPotential:
    """One spline V(r) for all pairs, E = Σ E0 + ½ Σ_ij V(r_ij), fitted by least squares."""

    def __init__(self, config: facet.Config):
        self.config = config
        self.spline = facet.RadialSplines(1, config).double()

    def rows(self, atoms: ase.Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energy [Z+R], forces [3N, Z+R], stress [9, Z+R], linear in the E0 and the spline."""
        graph = neighbours(atoms, self.config)
        Z = len(self.config.species)

        # the B-splines and their slopes at all distances
        r = torch.from_numpy(np.linalg.norm(graph.vectors, axis=1))  # [E]
        one = torch.ones_like(r)
        value, slope = torch.autograd.functional.jvp(self.spline.basis, (r,), (one,))  # [E, R] each
        pull = (slope / r[:, None]).numpy()[:, None] * graph.vectors[:, :, None]  # [E, 3, R]

        # sums over pairs
        R = value.shape[1]
        energy = np.concatenate([np.bincount(graph.species, minlength=Z), value.numpy().sum(0) / 2])
        forces = np.zeros((len(atoms), 3, R))
        np.add.at(forces, graph.dst, pull)
        stress = np.einsum("ea,ebr->abr", graph.vectors, pull) / 2 / graph.volume  # [3, 3, R]

        # the E0 exert no forces
        beside = [(0, 0), (Z, 0)]
        return energy, np.pad(forces.reshape(-1, R), beside), np.pad(stress.reshape(9, R), beside)

    def fit(self, train) -> PairPotential:
        """Energies per atom and forces of some thousand atoms: plenty for so few numbers."""
        design = []
        target = []
        every = 1 + int(train.atom_counts().sum()) // 5000
        for i in range(0, len(train), every):
            atoms = train[i]
            wanted = labels(atoms)
            energy, forces, _ = self.rows(atoms)
            design.extend([energy[None] / len(atoms), forces])
            target.extend([[wanted["energy"] / len(atoms)], wanted["forces"].ravel()])
        design = np.concatenate(design)  # [rows, Z+R]
        target = np.concatenate(target)  # [rows]
        known = np.isfinite(target)
        self.fitted = np.linalg.lstsq(design[known], target[known], rcond=None)[0]  # [Z+R]
        return self

    def predict(self, frames) -> list[dict]:
        """As `predict`."""
        predictions = []
        for atoms in frames:
            energy, forces, stress = self.rows(atoms)
            predictions.append(
                {
                    "energy": float(energy @ self.fitted),
                    "forces": (forces @ self.fitted).reshape(-1, 3),
                    "stress": (stress @ self.fitted).reshape(3, 3),
                }
            )
        return predictions


# ─── Report ──────────────────────────────────────────────────────────────────────────────────────


def print_physics(found: dict) -> None:
    """One line; and one for the alloy that the embedded set leaves out."""
    drift = found["energy_drift"]
    errors = []
    for dtype, values in found["equivariance_error"].items():
        errors.append(f"{max(values):.0e} ({dtype})")
    print(
        f"\ntotal energy in molecular dynamics at {drift['kelvin']:.0f} K: "
        f"{drift['drift_meV_per_atom_per_ps']:.2g} meV/atom/ps; "
        f"equivariance error of forces: {', '.join(errors)}"
    )
    if relaxation := found.get("relaxation"):
        wanted = relaxation["emt"]
        ours = relaxation["facet"]
        change = 100 * (ours["lattice_constant_A"] / wanted["lattice_constant_A"] - 1)
        print(
            f"\n{relaxation['structure']}, relaxed by FIRE with FrechetCellFilter: "
            f"EMT a = {wanted['lattice_constant_A']:.4f} Å in {wanted['steps']} steps, "
            f"Facet a = {ours['lattice_constant_A']:.4f} Å in {ours['steps']} steps "
            f"({change:+.2f} %)"
        )


def read_run(folder: Path) -> tuple[facet.Facet, SimpleNamespace, tuple[Frames, ...]]:
    """The trained model, the settings of its training, and its training, validation and test set.

    Raises BadInput, also where the sets are not what they were.
    """
    content = checkpoint(folder, SimpleNamespace)
    settings = SimpleNamespace(**content["settings"])
    device = "cpu"
    if settings.device != "cpu" and torch.cuda.is_available():
        device = settings.device or "cuda"
    model = load_model(folder / "model.pt", device)

    check_files(settings)
    sets = load_sets(settings, folder.parent, say=None)
    check_data(dict(zip(("train", "valid", "test"), sets, strict=True)), content)
    return model, settings, sets


def report(folder: str | Path) -> dict:
    """Print the test table with its baselines and some physics, draw report.png; the numbers.

    Raises BadInput where the folder or the data it was trained on cannot be read, or have changed.
    """
    folder = Path(folder)
    model, settings, (train, valid, everything) = read_run(folder)

    # errors on the test set
    test = list(sample(everything, SAMPLE))
    predictions = predict(model, test)
    tell_broken(predictions, test, print_to_stderr)
    groups = errors_by_group(predictions, test)
    symbols, size, error = force_errors(predictions, test)
    rows = {"Facet": errors(predictions, test)}
    if test:
        pair = PairPotential(model.config).fit(train).predict(test)
        constant = constant_baseline(test, model.config)
        rows["mean pair potential (one spline)"] = errors(pair, test)
        rows["constant per species"] = errors(constant, test)
        if len(test) < len(everything):
            print(f"\n{len(test)} of the {len(everything)} test structures, evenly spread, count")
        print_table(f"{len(test)} test structures", rows, groups)
    else:
        print("\nThere is no test set, so no errors are given.")

    # physics, on a structure that was not trained on if there is one
    some = list(sample(everything or valid or train, 500))
    found = physics.all_of_it(model, some)
    if not settings.train:
        found["relaxation"] = physics.relax_held_out(model)
    print_physics(found)

    # pictures
    result = {
        **rows.pop("Facet"),
        "baselines": rows,
        "by_group": groups,
        "by_element_eV_per_A": errors_by_element(symbols, error),
        "by_size_eV_per_A": errors_by_size(size, error),
        "physics": found,
    }
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    wanted = [labels(atoms) for atoms in test]
    panels.draw(folder / "report.png", model, result, test, predictions, wanted, log)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="runs/NAME", type=Path, help="that of a training")
    args = parser.parse_args(arguments)
    try:
        report(args.folder)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{args.folder / 'report.png'}")


if __name__ == "__main__":
    main()
