"""Physics of a trained model: what a test error does not tell. tools/report.py prints and draws it.

Energy against volume, the drift of the energy in molecular dynamics, the forces of a turned
crystal, and, for the embedded data, the lattice of an alloy that was not trained on.
"""
from __future__ import annotations

import ase
import numpy as np
import torch
from ase import units
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

import facet
from tools import emt
from tools.frames import BadInput, neighbours
from tools.properties import conservation, reflection

STEPS = 400  # of 1 fs, in molecular dynamics
FMAX = 0.01  # eV/Å, where the relaxation ends


def all_of_it(model: facet.Facet, some: list[ase.Atoms]) -> dict:
    """On the calmest of these labelled structures, and, for equivariance, on the first ten."""
    atoms = calmest(some, model.config)
    return {
        "structure": str(atoms.symbols),
        "energy_drift": energy_drift(model, atoms),
        "equation_of_state": equation_of_state(model, atoms) if atoms.pbc.all() else None,
        "equivariance_error": equivariance_error(model, some[:10]),
    }


def calculator_of(model: facet.Facet, dtype: torch.dtype = torch.float32) -> facet.FacetCalculator:
    """On the model's device, and silent about atoms that are close: here they may be."""
    calculator = facet.FacetCalculator(model, next(model.parameters()).device, dtype)
    calculator.shortest[:] = 0
    return calculator


def calmest(some: list[ase.Atoms], config: facet.Config) -> ase.Atoms:
    """The structure nearest to rest, periodic and dense if there is one, of at least 30 atoms.

    Raises BadInput, with the frame's name, for broken geometry.
    """
    crowd = []  # neighbours of an atom, in each structure
    for atoms in some:
        crowd.append(len(neighbours(atoms, config).dst) / len(atoms))

    def unrest(i: int) -> tuple:
        wanted = some[i].calc.results
        size = np.abs(wanted.get("forces", 0)).max()  # eV/Å
        size += 10 * np.abs(wanted.get("stress", 0)).max()  # 0.1 eV/Å³ count as 1 eV/Å
        return not some[i].pbc.all(), crowd[i] < 0.9 * np.median(crowd), size

    atoms = some[min(range(len(some)), key=unrest)].copy()
    while atoms.pbc.all() and len(atoms) < 30:
        shortest = np.arange(3) == atoms.cell.lengths().argmin()
        atoms = atoms.repeat(np.where(shortest, 2, 1))
    return atoms


def equation_of_state(model: facet.Facet, atoms: ase.Atoms) -> dict:
    """Energy (eV/atom) against volume (Å³/atom), −15 to +15 %; the stress against its slope.

    stress_against_energy_GPa: the largest |P + dE/dV|.
    """
    scale = np.linspace(0.85, 1.15, 31)  # of the volume
    graphs = []
    for s in scale:
        cell = atoms.copy()
        cell.set_cell(atoms.cell.array * s ** (1 / 3), scale_atoms=True)
        graphs.append(facet.find_neighbours(cell, model.config))
    results = facet.evaluate(model, graphs)

    volume = atoms.get_volume() * scale  # [31] Å³
    energy = np.array([r["energy"] for r in results])  # [31] eV
    pressure = np.array([-r["stress"][:3].mean() for r in results])  # [31] eV/Å³
    slope = -np.gradient(energy, volume, edge_order=2)  # [31] eV/Å³
    return {
        "volume_A3_per_atom": (volume / len(atoms)).tolist(),
        "energy_eV_per_atom": (energy / len(atoms)).tolist(),
        "stress_against_energy_GPa": float(np.abs(slope - pressure)[1:-1].max() / units.GPa),
    }


def energy_drift(model: facet.Facet, atoms: ase.Atoms, kelvin: float = 300.0) -> dict:
    """Total energy (meV/atom) over time (ps) in molecular dynamics without thermostat."""
    calculator = calculator_of(model)
    # half of what the atoms move with at first becomes potential energy
    try:
        found = conservation(calculator, atoms, kelvin=2 * kelvin, steps=STEPS)
    except ValueError as error:  # of facet.find_neighbours, for atoms that have flown apart or met
        raise BadInput(f"{atoms.symbols} in molecular dynamics of this model: {error}") from error
    table = {"kelvin": kelvin}
    for name, value in found.items():
        table[name] = np.asarray(value).tolist()
    return table


def equivariance_error(model: facet.Facet, some: list[ase.Atoms]) -> dict[str, list[float]]:
    """Forces of turned, mirrored structures against turned forces: largest error / force RMS."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        calculator = calculator_of(model, dtype)
        name = str(dtype).removeprefix("torch.")
        found[name] = []
        for atoms in some:
            error = reflection(calculator, atoms)  # eV/Å
            found[name].append(float(error / model.config.energy_scale))
    return found


def relax_held_out(model: facet.Facet) -> dict:
    """Relax an alloy that was not trained on with EMT and with Facet; compare the lattices."""
    start = emt.held_out_start()
    table = {"structure": f"{emt.HELD_OUT} (L1₂), strained and rattled"}
    calculators = {"emt": EMT(), "facet": calculator_of(model)}
    for name, calculator in calculators.items():
        atoms = start.copy()
        atoms.calc = calculator
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        try:
            converged = optimizer.run(fmax=FMAX, steps=500)
        except ValueError as error:
            raise BadInput(f"{atoms.symbols}, relaxed by {name}: {error}") from error
        table[name] = {
            "lattice_constant_A": float(atoms.get_volume() ** (1 / 3)),
            "steps": optimizer.nsteps,
            "converged": bool(converged),
            "energy_eV_per_atom": float(atoms.get_potential_energy() / len(atoms)),
        }
    return table
