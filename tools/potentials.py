"""Potentials of any kind for tools.check: how they are named, counted, and given crystals to judge.

A calculator is what ASE uses as one: it has get_potential_energy(atoms) and get_forces(atoms).
"""
from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from functools import partial, reduce
from pathlib import Path
from time import monotonic

import ase.build
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.collections import g2
from ase.data import atomic_numbers, covalent_radii, reference_states

import facet
from tools.files import read_atoms
from tools.properties import NO_METALS, Fault, random_crystal, value

LARGEST = 40.0  # eV/Å; a crystal with such forces is nowhere near its equilibrium
KEPT = 50  # structures whose results are remembered


class CannotBegin(Exception):
    """There is nothing to judge: one sentence."""


def in_short(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:90]


# ─── Calculators ─────────────────────────────────────────────────────────────────────────────────


class Watched:
    """A calculator that counts its calls, says how far it is, and keeps results until `forget`.

    It has what Atoms asks a calculator for, and `model`, which is that of a FacetCalculator.
    """

    def __init__(self, calculator, make=None):
        self.calculator = calculator
        self.make = make  # makes another one
        self.model = getattr(calculator, "model", None)
        self.kept = {}  # results by structure
        self.last = {}  # by name: what the calculator returned last, and a copy
        self.calls = 0
        self.doing = ""
        self.start = self.told = monotonic()

    def forget(self) -> None:
        """The next structure is calculated, even if it was before."""
        self.kept.clear()

    def renew(self) -> None:
        """Go on with a new calculator, which has seen nothing yet, if one can be made."""
        if self.make:
            self.calculator = self.make()
            self.forget()

    def ask(self, name: str, atoms: Atoms) -> np.ndarray:
        """What get_<name> of atoms with this calculator returns."""
        numbers = (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
        structure = b"".join(np.ascontiguousarray(array).tobytes() for array in numbers)

        # A new structure is a call; the oldest makes room
        if structure not in self.kept:
            self.calls += 1
            self.tell()
            if len(self.kept) == KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[structure] = {}

        results = self.kept[structure]
        if name not in results:
            if not hasattr(self.calculator, f"get_{name}"):
                raise PropertyNotImplementedError(f"the calculator has no {name}")
            own = atoms.copy()
            own.calc = self.calculator  # some calculators learn of the atoms here
            try:
                given = getattr(own, f"get_{name}")()
            except SystemExit as end:
                raise RuntimeError(f"it ends the program with {end}") from None
            if not (np.array_equal(own.positions, atoms.positions)
                    and np.array_equal(own.cell.array, atoms.cell.array)):
                raise Fault("it changes the atoms that it is given")

            # Whoever kept the results before still has them
            found = np.array(given, float)
            before, copied = self.last.get(name, (given, found))
            self.last[name] = given, found
            if not np.array_equal(np.array(before, float), copied, equal_nan=True):
                raise Fault(f"its next {name} overwrite those that it gave before")
            results[name] = found
        return results[name].copy()

    def tell(self) -> None:
        """A line on stderr, every three seconds where somebody looks and else every ten."""
        now = monotonic()
        if now - self.told > (3 if sys.stderr.isatty() else 10):
            self.told = now
            print(f"… {self.doing}: {self.calls} calls, {now - self.start:.0f} s",
                  file=sys.stderr, flush=True)

    def get_potential_energy(self, atoms: Atoms, force_consistent: bool = False) -> float:
        return self.ask("potential_energy", atoms).item()

    def get_forces(self, atoms: Atoms) -> np.ndarray:
        return self.ask("forces", atoms)

    def get_stress(self, atoms: Atoms) -> np.ndarray:
        return self.ask("stress", atoms)


def literal(text: str):
    """A Python literal (number, True, None, list, dict), or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def maker(spec: str):
    """The callable that module:function, module:Class.method or path/to/file.py:function names."""
    place, _, dotted = spec.rpartition(":")
    if not place.endswith(".py"):
        module = importlib.import_module(place)
    else:
        if not Path(place).is_file():
            raise FileNotFoundError(f"{place}: no such file")
        description = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(description)
        description.loader.exec_module(module)
    return reduce(getattr, dotted.split("."), module)


def given_calculators(words: list[str], dtype: str, device: str) -> list[tuple]:
    """The calculators that the words after --calculator name: [(title, Watched, precision)].

    Raises CannotBegin with one sentence if there are none.
    """
    # A checkpoint, in each precision
    spec, *options = words
    if spec.endswith(".pt"):
        if options:
            raise CannotBegin(f"a checkpoint takes no {options[0]}")
        found = []
        for name in [dtype] if dtype else ["float64", "float32"]:
            try:
                calculator = facet.FacetCalculator(spec, device, getattr(torch, name))
            except (OSError, ValueError) as error:
                raise CannotBegin(str(error)) from None
            found.append((f"{spec}, {name}", Watched(calculator), name))
        return found

    keywords = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise CannotBegin(f"{option} is not key=value")
        keywords[key] = literal(text)

    # Whatever the callable makes of them
    if ":" not in spec:
        raise CannotBegin(f"{spec} is neither a .pt file nor module:callable, such as "
                          "ase.calculators.emt:EMT, nor path/to/file.py:function")
    try:
        make = partial(maker(spec), **keywords)
        calculator = make()
    except (Exception, SystemExit) as error:  # a script may end itself when it is imported
        raise CannotBegin(f"{spec} cannot be made: {in_short(error)}") from None
    for method in ("get_potential_energy", "get_forces"):
        if not callable(getattr(calculator, method, None)):
            raise CannotBegin(f"{spec} makes no ASE calculator: what it makes has no {method}")
    precision = dtype or "float32"
    return [(f"{spec}, limits of {precision}", Watched(calculator, make), precision)]


# ─── Crystals that suit ──────────────────────────────────────────────────────────────────────────


ANIONS = {*"NOFPSI", "Cl", "Se", "Br", "Te"}
THIRD_GROUP = {"B", "Al", "Ga", "In"}
ORGANIC = {*"HCNOFS", "Cl"}
SUITABLE = {  # what is tried if no elements are given; of each kind the first that has an energy
    "metal": ["Cu Al", "Cu", "Al", "Fe", "W", "Ni", "Ag", "Au"],
    "molecule": ["C H O", "H O", "C H", "N H"],
    "ionic": ["Mg O", "Na Cl", "Li F"],
    "covalent": ["Si", "C", "Si C", "Ga N"],
    "molecule in a box": ["C H O", "H O", "C H", "N H"],
}


def shaken(atoms: Atoms, seed: int = 0) -> Atoms:
    """Rattled by 0.05 Å and, where it repeats, strained by 3 %; of two atoms if it had one."""
    rng = np.random.default_rng(seed)
    other = atoms.copy()
    if len(atoms) == 1 and atoms.pbc.any():
        other *= np.where(np.arange(3) == atoms.pbc.argmax(), 2, 1)
    if atoms.pbc.any():
        strain = rng.uniform(-0.03, 0.03, (3, 3)) * np.outer(atoms.pbc, atoms.pbc)
        other.set_cell(other.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    other.positions += rng.normal(0, 0.05, other.positions.shape)
    return other


def molecules_of(elements: set) -> list[Atoms]:
    """Molecules of at most nine atoms that ASE knows of just these elements, large ones first."""
    found = [ase.build.molecule(name) for name in g2.names]
    found = [atoms for atoms in found if len(atoms) <= 9 and {*atoms.symbols} == elements]
    return sorted(found, key=len, reverse=True)


def crystal_of(elements: list[str]) -> Atoms:
    """Of these elements, about as they are found: an element's own lattice, rock salt, zinc
    blende, else a random alloy; rattled and strained."""
    kinds = [*dict.fromkeys(elements)]

    # An element has a lattice of its own
    if len(kinds) == 1:
        state = reference_states[atomic_numbers[kinds[0]]] or {}
        if state.get("symmetry") in ("fcc", "bcc", "diamond"):
            crystal = ase.build.bulk(kinds[0], cubic=True)
            return shaken(crystal * (1, 1, 2) if len(crystal) == 2 else crystal)
        if state.get("symmetry") == "hcp":
            return shaken(ase.build.bulk(kinds[0], orthorhombic=True))

    # Of two elements the electronegative one is last
    if len(kinds) == 2:
        kinds.sort(key=lambda kind: kind in ANIONS)
        bond = sum(covalent_radii[atomic_numbers[kind]] for kind in kinds)
        if {*kinds} <= NO_METALS or (kinds[0] in THIRD_GROUP and kinds[1] in NO_METALS - {"O"}):
            return shaken(ase.build.bulk("".join(kinds), "zincblende", a=4 * bond / 3 ** 0.5,
                                         cubic=True))
        if kinds[1] in ANIONS:
            return shaken(ase.build.bulk("".join(kinds), "rocksalt", a=2.05 * bond, cubic=True))
    return random_crystal(elements)


def boxed(molecule: Atoms) -> Atoms:
    """The molecule in a periodic box, 4 Å from its images."""
    other = molecule.copy()
    other.center(vacuum=2.0)
    other.pbc = True
    return other


def candidates(species: list[str]) -> dict[str, list[Atoms]]:
    """Kinds of structures, each with those that may do: the first will be taken."""
    asked = {"crystal": [" ".join(species)]} if species else SUITABLE
    found = {}
    for kind, alternatives in asked.items():
        for elements in alternatives:
            elements = elements.split()
            molecules = []
            if {*elements} <= ORGANIC and elements != ["C"] and kind != "covalent":
                molecules = [shaken(atoms) for atoms in molecules_of({*elements})]
            if not molecules:
                crystal = crystal_of(elements)
                larger = [crystal * (2, 2, 2)] if species else []  # for those that need many atoms
                found.setdefault(kind, []).extend([crystal, *larger])
            if "box" not in kind:
                found.setdefault("molecule", []).extend(molecules)
            if kind != "molecule":
                found.setdefault("molecule in a box", []).extend(boxed(m) for m in molecules)
    return found


def structures(calculator, files: list[str], species: list[str], every: bool) -> list[tuple]:
    """What a calculator is judged on: [(Atoms, how it was made)]. By default one crystal and one
    molecule at most; raises CannotBegin if it has no energy and forces of any."""
    unknown = [symbol for symbol in species if not atomic_numbers.get(symbol)]
    if unknown:
        raise CannotBegin(f"{unknown[0]!r} is no element; --species takes symbols between spaces")

    # What the user has; forces must not be zero by symmetry
    found = []
    for file in files:
        try:
            atoms = next(read_atoms(file))
            atoms.set_constraint()
            calm = np.abs(value(calculator, atoms, "forces")).max() < 0.1  # eV/Å
            value(calculator, atoms, "energy")
        except Exception as error:
            raise CannotBegin(f"no energy and forces of {file}: {in_short(error)}") from None
        strained = " and strained by 3 %" if atoms.pbc.any() else ""
        how = f"at rest in {file}, so rattled by 0.05 Å{strained}" if calm else file
        found.append((shaken(atoms) if calm else atoms, how))
    if files:
        return found

    # What suits; what pushes its atoms apart is only taken where there is nothing else
    failed = ""
    hopeless = []
    for kind, alternatives in candidates(species).items():
        if not every and len(found) == 2:
            break
        for atoms in alternatives:
            try:
                value(calculator, atoms, "energy")
                force = np.abs(value(calculator, atoms, "forces")).max()
            except Exception as error:
                failed = failed or in_short(error)
                continue
            if force < LARGEST:
                found.append((atoms, kind))
                break
            hopeless.append((atoms, kind))
    found = found or hopeless[:1]
    if not found:
        what = " ".join(species) or "any element that was tried"
        raise CannotBegin(f"no energy and forces of a crystal of {what} "
                          f"(try --species or --atoms): {failed or 'it is no number'}")
    return found
