"""Does anything fall together or fly apart? Dimers of every pair of elements down to 0.3 Å, and some ps of molecular dynamics at 2,000 K.

    python benchmarks/short_range.py --model runs/si/model.pt --name Si        # 64 atoms of the first element's crystal
    python benchmarks/short_range.py --model runs/crystals/model.pt --name crystals --structure CuAu.cif

No training set holds such dimers; a network may say anything about them, and the core (facet.py §2) must win. Adds to
benchmarks/results/short_range.json under NAME, draws figures/short_range.png for all that is there.
"""
import argparse
import time
from itertools import combinations_with_replacement
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin

import common
import facet
from common import read_results, write_results
from pictures import draw_results

NEAREST = 0.3  # Å


def dimer(model: facet.Facet, i: int, j: int) -> dict:
    """Energy (eV, over that of free atoms) and force (eV/Å, positive pushes apart) of two atoms at distances up to the cutoff."""
    config = model.config
    r = np.arange(NEAREST, config.cutoff, 0.02)
    pair = [Atoms([config.species[i], config.species[j]], [[0, 0, 0], [x, 0, 0]]) for x in r]
    results = facet.evaluate(model, [facet.find_neighbours(atoms, config) for atoms in pair])
    E0 = config.reference_energies[i] + config.reference_energies[j]
    return {"r": r, "energy": np.array([x["energy"] for x in results]) - E0, "force": np.array([x["forces"][1, 0] for x in results])}


def scan(model: facet.Facet) -> dict:
    """Every pair of elements: where, within the core, atoms attract each other, and the energy at the nearest distance."""
    species, core = model.config.species, model.core.table[2].cpu().numpy()
    pairs, attracting = list(combinations_with_replacement(range(len(species)), 2)), {}
    nearest, weakest = np.inf, np.inf
    for i, j in pairs:
        d = dimer(model, i, j)
        inside = d["r"] < core[i] + core[j]
        nearest, weakest = min(nearest, d["energy"][0]), min(weakest, d["force"][inside].min())
        if (d["force"][inside] < 0).any():
            attracting[f"{species[i]}-{species[j]}"] = [float(r) for r in d["r"][inside][d["force"][inside] < 0][[0, -1]]]
    return {"pairs": len(pairs), "attracting": attracting, "least_energy_at_0.3_A_eV": float(nearest), "weakest_force_in_the_core_eV_per_A": float(weakest)}


def hot(model: facet.Facet, atoms: Atoms, kelvin: float, picoseconds: float) -> dict:
    """Langevin dynamics at constant cell; what temperature, distances and forces came to."""
    atoms = atoms.copy()
    atoms.calc = facet.FacetCalculator(model)
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * np.sqrt(units.kB * kelvin / atoms.get_masses())[:, None])
    dynamics = Langevin(atoms, 1.0 * units.fs, temperature_K=kelvin, friction=0.01 / units.fs, fixcm=False, rng=np.random.RandomState(0))
    rows, start = [], time.perf_counter()

    def look():
        graph = facet.find_neighbours(atoms, model.config)
        r = np.linalg.norm(graph.vectors, axis=1)
        rows.append([dynamics.get_time() / (1000 * units.fs), atoms.get_temperature(), r.min(), np.abs(atoms.get_forces()).max(),
                     np.bincount(graph.dst[r < 1.3 * r.min()], minlength=len(atoms)).min(), atoms.get_potential_energy() / len(atoms)])
    dynamics.attach(look, 20)
    dynamics.run(round(1000 * picoseconds))
    table = np.array(rows)
    return {"structure": str(atoms.symbols), "kelvin": kelvin, "picoseconds": picoseconds, "seconds": time.perf_counter() - start,
            "time_ps": table[:, 0].tolist(), "temperature_K": table[:, 1].tolist(), "shortest_distance_A": table[:, 2].tolist(),
            "largest_force_eV_per_A": table[:, 3].tolist(), "energy_eV_per_atom": table[:, 5].tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--structure", type=Path, help="what is heated; by default 64 atoms or so of the first element's crystal")
    parser.add_argument("--kelvin", type=float, default=2000.0)
    parser.add_argument("--picoseconds", type=float, default=10.0)
    args = parser.parse_args()
    model = facet.load(args.model, dtype=torch.float64)
    atoms = ase.io.read(args.structure) if args.structure else ase.build.bulk(model.config.species[0], cubic=True)
    while len(atoms) < 50:
        atoms = atoms.repeat(np.where(np.arange(3) == atoms.cell.lengths().argmin(), 2, 1))
    found = scan(model)
    print(f"{args.name}: {found['pairs']} pairs, within the core attracting: {found['attracting'] or 'none'}; at {NEAREST} Å at least "
          f"{found['least_energy_at_0.3_A_eV']:.0f} eV; weakest force in the core {found['weakest_force_in_the_core_eV_per_A']:.2g} eV/Å", flush=True)
    md = hot(facet.load(args.model), atoms, args.kelvin, args.picoseconds)
    print(f"{md['structure']}, {args.picoseconds:g} ps at {args.kelvin:g} K: temperature {np.mean(md['temperature_K'][len(md['temperature_K']) // 4:]):.0f} K, shortest distance "
          f"{min(md['shortest_distance_A']):.2f} Å, largest force {max(md['largest_force_eV_per_A']):.1f} eV/Å, {md['seconds']:.0f} s")
    kept, species = {"models": {}} | read_results("short_range"), model.config.species
    some = list(combinations_with_replacement(range(len(species)), 2))
    curves = {f"{species[i]}-{species[j]}": {k: np.round(v, 4).tolist() for k, v in dimer(model, i, j).items() if k != "force"} for i, j in some[::1 + len(some) // 30]}
    kept["models"][args.name] = {"hardware": common.hardware(), "scan": found, "hot": md, "curves": curves}
    write_results("short_range", kept)
    draw_results("short_range")


if __name__ == "__main__":
    main()
