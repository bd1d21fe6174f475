"""Does anything fall together or fly apart? Dimers down to 0.3 Å, and dynamics at 2,000 K.

    python benchmarks/short_range.py --model runs/si/model.pt --name Si
    python benchmarks/short_range.py --model runs/crystals/model.pt --name crystals \\
        --structure CuAu.cif

No training set holds such dimers; a network may say anything about them, and the repulsion
(facet.py §2) must win. Every pair of elements is scanned; what is heated is by default 64 atoms of
the first element's crystal. Adds to benchmarks/results/short_range.json under NAME, and draws its
picture for all that is there.
"""
import time
from itertools import combinations_with_replacement
from pathlib import Path

import ase.build
import ase.io
import common
import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin
from common import command_line, read_results, write_results
from pictures import draw_results

import facet

NEAREST = 0.3  # Å
CURVES = 12  # pairs whose energies are kept, at most
DRAWN = slice(None, 136, 2)  # of the distances of a dimer: to 3 Å, every 0.04 Å
POINTS = 100  # of a trace in time that are kept, at least


def pairs_of(model: facet.Facet) -> list[tuple[int, int]]:
    """All pairs of species, by number."""
    return list(combinations_with_replacement(range(len(model.config.species)), 2))


def name_of(model: facet.Facet, i: int, j: int) -> str:
    return f"{model.config.species[i]}-{model.config.species[j]}"


def dimer(model: facet.Facet, i: int, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances up to the cutoff (Å), energy (eV, over that of free atoms), force (eV/Å).

    A positive force pushes the two atoms apart.
    """
    config = model.config
    r = np.arange(NEAREST, config.cutoff, 0.02)
    graphs = []
    for x in r:
        atoms = Atoms([config.species[i], config.species[j]], [[0, 0, 0], [x, 0, 0]])
        graphs.append(facet.find_neighbours(atoms, config))
    results = facet.evaluate(model, graphs)
    E0 = config.reference_energies[i] + config.reference_energies[j]
    energy = np.array([one["energy"] for one in results]) - E0
    force = np.array([one["forces"][1, 0] for one in results])
    return r, energy, force


def scan(model: facet.Facet) -> dict:
    """Every pair of elements: where, within the core, atoms attract each other; the least energy.

    The core of a pair ends at the sum of its radii.
    """
    core = model.repulsion.core.cpu().numpy()  # [Z] Å
    attracting = {}
    nearest = np.inf
    weakest = np.inf
    for i, j in pairs_of(model):
        r, energy, force = dimer(model, i, j)
        inside = r < core[i] + core[j]
        nearest = min(nearest, energy[0])
        weakest = min(weakest, force[inside].min())
        pulled = r[inside][force[inside] < 0]
        if len(pulled):
            attracting[name_of(model, i, j)] = [float(pulled[0]), float(pulled[-1])]
    return {
        "pairs": len(pairs_of(model)), "attracting": attracting,
        "least_energy_at_0.3_A_eV": nearest, "weakest_force_in_the_core_eV_per_A": weakest}


def hot(model: facet.Facet, atoms: Atoms, kelvin: float, picoseconds: float) -> dict:
    """Langevin dynamics at constant cell; what temperature, distances and forces came to."""
    atoms = atoms.copy()
    atoms.calc = facet.FacetCalculator(model)
    rng = np.random.default_rng(0)
    speed = np.sqrt(units.kB * kelvin / atoms.get_masses())[:, None]
    atoms.set_velocities(rng.normal(size=(len(atoms), 3)) * speed)
    dynamics = Langevin(
        atoms, 1.0 * units.fs, temperature_K=kelvin, friction=0.01 / units.fs, fixcm=False,
        rng=np.random.RandomState(0))
    looks = []

    def look():
        vectors = facet.find_neighbours(atoms, model.config).vectors  # [E, 3]
        looks.append((
            dynamics.get_time() / (1000 * units.fs), atoms.get_temperature(),
            np.linalg.norm(vectors, axis=1).min(), np.abs(atoms.get_forces()).max()))

    start = time.perf_counter()
    dynamics.attach(look, 20)
    dynamics.run(round(1000 * picoseconds))
    return {
        "structure": str(atoms.symbols), "kelvin": kelvin, "picoseconds": picoseconds,
        "seconds": time.perf_counter() - start, **summed_up(np.array(looks))}


def summed_up(looks: np.ndarray) -> dict:
    """What is kept of the looks [n, 4] of `hot`: extremes of all, and some of them to draw.

    A distance that is drawn is the shortest until the next that is drawn.
    """
    t, kelvin, distance, force = looks.T
    drawn = np.arange(0, len(looks), max(1, len(looks) // POINTS))
    return {
        "mean_temperature_K": kelvin[len(kelvin) // 4 :].mean(),  # without the beginning
        "least_distance_A": distance.min(), "largest_force_eV_per_A": force.max(),
        "time_ps": t[drawn], "temperature_K": kelvin[drawn].round().astype(int).tolist(),
        "shortest_distance_A": np.minimum.reduceat(distance, drawn).round(2)}


def curves(model: facet.Facet) -> dict:
    """Energies of some pairs, evenly spread."""
    pairs = pairs_of(model)
    energies = {}
    for i, j in pairs[:: -(-len(pairs) // CURVES)]:
        r, energy, _ = dimer(model, i, j)
        energies[name_of(model, i, j)] = energy[DRAWN].round(2)
    return {"distance_A": r[DRAWN], "energy_eV": energies}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model.pt of train_small.py")
    parser.add_argument("--name", required=True, help="what the results are kept under")
    parser.add_argument("--structure", type=Path, help="a file with what is heated")
    parser.add_argument("--kelvin", type=float, default=2000.0)
    parser.add_argument("--picoseconds", type=float, default=10.0)
    args = parser.parse_args()
    model = facet.load(args.model, dtype=torch.float64)

    # Dimers
    found = scan(model)
    print(
        f"{args.name}: {found['pairs']} pairs, within the core attracting: "
        f"{found['attracting'] or 'none'}; at {NEAREST} Å at least "
        f"{found['least_energy_at_0.3_A_eV']:.0f} eV; weakest force in the core "
        f"{found['weakest_force_in_the_core_eV_per_A']:.2g} eV/Å", flush=True)

    # Dynamics
    if args.structure:
        atoms = ase.io.read(args.structure)
    else:
        atoms = ase.build.bulk(model.config.species[0], cubic=True)
    while len(atoms) < 50:
        shortest = np.arange(3) == atoms.cell.lengths().argmin()
        atoms = atoms.repeat(np.where(shortest, 2, 1))
    md = hot(facet.load(args.model), atoms, args.kelvin, args.picoseconds)
    print(
        f"{md['structure']}, {args.picoseconds:g} ps at {args.kelvin:g} K: temperature "
        f"{md['mean_temperature_K']:.0f} K, shortest distance {md['least_distance_A']:.2f} Å, "
        f"largest force {md['largest_force_eV_per_A']:.1f} eV/Å, {md['seconds']:.0f} s")

    content = {"models": {}} | read_results("short_range")
    content["models"][args.name] = {
        "hardware": common.hardware(), "scan": found, "hot": md, "curves": curves(model)}
    write_results("short_range", content)
    draw_results("short_range")


if __name__ == "__main__":
    main()
