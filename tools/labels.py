"""One frame: its labels, their names and orders, and what is checked of it.

A frame is an ase.Atoms with labels in atoms.calc.results: "energy" (eV), "forces" (eV/Å), "stress"
(six numbers in ASE's order and sign, eV/Å³). tools.frames is where files become frames.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

from tools import suspicions

# VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³
KBAR = -0.1 * units.GPa

# a lone atom whose images are all farther away than this is a free atom, Å
FREE = 10.0

# info of a frame that names its material, if a file has it
MATERIAL_KEYS = ("mptrj_traj_id", "material_id", "material")

# columns that ask for weights: there are none here, every frame counts the same
WEIGHTS = ("config_weight", "config_energy_weight", "config_forces_weight", "config_stress_weight",
           "config_virials_weight", "energy_weight", "force_weight", "forces_weight",
           "stress_weight", "virial_weight", "virials_weight", "weight")


class BadInput(ValueError):
    """Input that cannot be used: one sentence with the file, the frame and the cure."""


class Names(NamedTuple):
    """Names of the labels in the files, compared without regard to case; "": the usual ones.

    A stress with "virial" in its name (but not "stress") is a virial in eV.
    """
    energy: str = ""
    forces: str = ""
    stress: str = ""

    def virial(self) -> bool:
        """Whether the name of the stress is that of a virial."""
        name = self.stress.lower()
        return "virial" in name and "stress" not in name


USUAL = Names()
LABELS = ("energy", "forces", "stress")


def labelled(atoms: Atoms, energy: float | None, forces: np.ndarray | None,
             stress: np.ndarray | None = None, source: str = "here", material: str = "",
             group: str = "") -> Atoms:
    """A frame: the geometry of `atoms`, and nothing else of it, with labels.

    energy eV, forces [N, 3] eV/Å, stress [6] eV/Å³ in ASE's order; None where there is none.
    Constraints are dropped: they would set forces to zero. Without a material, the frame is one of
    its own.
    """
    frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    results = {}
    if energy is not None:
        results["energy"] = float(energy)
    if forces is not None:
        results["forces"] = np.array(forces, float)
    if stress is not None:
        results["stress"] = np.array(stress, float)
    frame.calc = SinglePointCalculator(frame, **results)
    frame.info = {"source": source, "material": material or source, "group": group}
    return frame


def check(atoms: Atoms) -> Atoms:
    """The frame, if it can be trained on. Raises BadInput."""
    source = atoms.info["source"]
    results = atoms.calc.results
    if len(atoms) == 0:
        raise BadInput(f"{source}: has no atoms; remove the frame")

    forces = results.get("forces", np.zeros((len(atoms), 3)))
    if forces.shape != (len(atoms), 3):
        raise BadInput(f"{source}: {len(atoms)} atoms, but forces of shape {forces.shape}; three "
                       f"numbers for each atom are needed")

    # everything is a finite number
    for what, value in (("an energy", results.get("energy", 0.0)), ("a force", forces),
                        ("a position", atoms.positions), ("a cell vector", atoms.cell.array),
                        ("a component of the stress", results.get("stress", 0.0))):
        if not np.isfinite(value).all():
            raise BadInput(f"{source}: {what} is NaN or infinite; remove the frame or compute it "
                           f"again")

    periodic = atoms.cell.array[atoms.pbc]
    if np.linalg.matrix_rank(periodic) < len(periodic):
        raise BadInput(f"{source}: periodic, but its cell has no volume; remove the frame, or "
                       f"set its pbc to F F F")
    return atoms


def is_free(atoms: Atoms) -> bool:
    """Whether this is one atom without neighbours: no periodic image of it is near."""
    if len(atoms) != 1 or (atoms.cell.lengths()[atoms.pbc] < FREE).any():
        return False
    return len(neighbor_list("i", atoms, FREE)) == 0


def look_up(labels: dict, name: str):
    """The label of that name, or of that name in other capitals; None if there is none."""
    if labels.get(name) is not None:
        return labels[name]
    for other, value in labels.items():
        if isinstance(other, str) and other.lower() == name.lower() and value is not None:
            return value
    return None


def numbers_in(value, what: str, source: str) -> np.ndarray:
    """The label as an array. Raises BadInput if it holds anything but numbers."""
    try:
        return np.array(value, float)
    except (TypeError, ValueError):
        raise BadInput(f"{source}: {what} is not made of numbers, but "
                       f"{str(value)[:40]!r}") from None


def one_number(value, what: str, source: str) -> float:
    """The label as a float. Raises BadInput if it is not one number."""
    found = numbers_in(value, what, source)
    if found.size != 1:
        raise BadInput(f"{source}: {what} has {found.size} numbers, one is needed")
    return float(found.reshape(()))


def six_numbers(value, order: str, source: str) -> np.ndarray | None:
    """A stress of nine or six numbers as [6] in ASE's order, xx yy zz yz xz xy.

    order: that of six numbers in the file; "" if nobody knows. None for a stress that is all NaN.
    Raises BadInput for any other count, and for six numbers in an unknown order.
    """
    found = numbers_in(value, "the stress", source)
    if np.isnan(found).all():
        return None
    if found.size == 9:
        return full_3x3_to_voigt_6_stress(found.reshape(3, 3))
    if found.size != 6:
        raise BadInput(f"{source}: the stress has {found.size} numbers; nine are needed, or six")
    if not order:
        raise BadInput(f"{source}: six numbers of stress in an order that the file does not tell "
                       f"(VASP's xx yy zz xy yz xz or ASE's xx yy zz yz xz xy?); give all nine, "
                       f"or mark MatPES' layout by matpes_id, mlearn's by the name virial_stress")
    components = order.split()
    found = found.ravel()
    return np.array([found[components.index(pair)] for pair in ASE_ORDER.split()])


def word(name) -> str:
    """The name as text that does not look like a number: ASE's databases refuse that as a text."""
    text = str(name)
    if text in ("True", "False"):
        return "#" + text
    try:
        float(text)
    except ValueError:
        return text
    return "#" + text


def group_of(info: dict) -> str:
    """What the file calls the group of the frame."""
    for key in ("config_type", "group"):
        found = look_up(info, key)
        if found is not None:
            return word(found)
    return ""


ASE_ORDER = "xx yy zz yz xz xy"
VASP_ORDER = "xx yy zz xy yz xz"


class Runs:
    """Numbers for runs of frames: what is of one run is of one material.

    Consecutive frames of one formula are a run. A frame that goes on where an earlier run of its
    formula ended (suspicions.alike: same cell, atoms near) belongs to that: trajectories may be
    written alternately. Only the last hundred runs are remembered.
    """

    def __init__(self):
        self.count = 0
        self.recent = deque(maxlen=100)  # formula, number and last frame of each run, latest last

    def number(self, atoms: Atoms) -> int:
        """The number of the run that the next frame of a file belongs to."""
        formula = str(atoms.symbols)
        found = None
        for run in reversed(self.recent):
            if run[0] == formula and (run is self.recent[-1] or suspicions.alike(run[2], atoms)):
                found = run
                break

        if found is None:
            self.count += 1
            number = self.count
        else:
            number = found[1]
            self.recent.remove(found)
        self.recent.append((formula, number, atoms))
        return number


def has_a_label(energy, forces, names: Names, labels: Iterable[str], source: str) -> None:
    """Raise BadInput if there is neither energy nor forces."""
    if energy is None and forces is None:
        raise BadInput(f"{source}: has no {names.energy or 'energy'} and no "
                       f"{names.forces or 'forces'}; it has {', '.join(map(str, labels))}. Tell "
                       f"names by --energy and --forces, or remove the frame")
