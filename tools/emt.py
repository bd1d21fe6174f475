"""The embedded data set: random crystals of seven metals and their alloys, labelled by ASE's EMT.

EMT is a classical potential: the labels cost nothing, so that a first training needs no download.

    from tools import emt
    emt.write("runs/emt.extxyz")
"""
from __future__ import annotations

import os
from pathlib import Path

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

# fcc lattice constants, Å
METALS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}

# no crystal of this composition is in the set: it is there to be relaxed in the end
HELD_OUT = "Cu3Au"


def random_crystal(rng: np.random.Generator) -> Atoms:
    """One metal or a random alloy of two: strained, rattled, perhaps with a vacancy or surface."""
    metals = rng.choice(list(METALS), rng.integers(1, 3), replace=False)
    structure = rng.choice(["fcc", "fcc", "bcc", "hcp"])

    # the lattice constant that gives every structure the mean volume of its metals
    volume = np.mean([METALS[metal] ** 3 / 4 for metal in metals])  # Å³ per atom
    volumes_per_cell = {"fcc": 4, "bcc": 2, "hcp": np.sqrt(2)}
    a = (volume * volumes_per_cell[structure]) ** (1 / 3)

    if structure == "hcp":
        atoms = ase.build.bulk("Cu", "hcp", a=a, covera=np.sqrt(8 / 3)) * (2, 2, 1)
    elif structure == "bcc":
        atoms = ase.build.bulk("Cu", "bcc", a=a, cubic=True) * (2, 2, 1)
    else:
        atoms = ase.build.bulk("Cu", "fcc", a=a, cubic=True) * (2, 1, 1)
    atoms.symbols = rng.choice(metals, len(atoms))

    # a vacancy, a surface
    if rng.random() < 0.15:
        del atoms[rng.integers(len(atoms))]
    if rng.random() < 0.15:
        atoms.center(vacuum=rng.uniform(2, 5), axis=2)

    # strain and rattling
    strain = rng.normal(0, 0.015, (3, 3)) + rng.normal(0, 0.025) * np.eye(3)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rng.choice([0.02, 0.08, 0.15]), (len(atoms), 3))
    return atoms


def write(path: str | Path, count: int = 1000) -> None:
    """Write `count` random crystals with EMT's energy, forces and stress to an extxyz file.

    The same crystals every time. The file gets its name when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {count} random crystals of {' '.join(METALS)}, labelled by EMT → {path}",
          flush=True)

    rng = np.random.default_rng(0)
    held_out = Atoms(HELD_OUT).symbols.formula.format("hill")
    images = []
    while len(images) < count:
        atoms = random_crystal(rng)
        reduced, _ = atoms.symbols.formula.reduce()
        if reduced.format("hill") == held_out:
            continue

        # what was rattled too hard is left out
        atoms.calc = EMT()
        if np.abs(atoms.get_forces()).max() < 5 and np.isfinite(atoms.get_stress()).all():
            # Labels alone: EMT's energies of single atoms are none
            labels = {name: atoms.calc.results[name] for name in ("energy", "forces", "stress")}
            atoms.calc = SinglePointCalculator(atoms, **labels)
            images.append(atoms)

    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    ase.io.write(part, images, format="extxyz")
    os.replace(part, path)


def held_out_start() -> Atoms:
    """A strained, rattled cell of Cu3Au (L1₂), which relaxation should turn into the cubic one."""
    atoms = ase.build.bulk("Cu", a=3.75, cubic=True)
    atoms.symbols = ["Au", "Cu", "Cu", "Cu"]
    strain = np.array([[0.03, 0.02, 0.0], [0.0, -0.03, 0.0], [0.01, 0.0, 0.04]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(0.05, seed=0)
    return atoms
