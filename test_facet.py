"""The properties of an interatomic potential, as functions for any ASE calculator, and the tests.

    python test_facet.py                                        is everything right? 15 s
    python test_facet.py --calculator runs/si/model.pt          a trained model
    python test_facet.py --calculator ase.calculators.emt:EMT   any calculator: module:callable,
        --calculator chgnet.model:CHGNetCalculator use_device=cpu --atoms crystal.cif
    python test_facet.py --bugs                                 the planted bugs, and what notices

    pytest                          profile "ci": the same examples every time
    pytest -k rotation              or reflection, permutation, forces, stress, cutoff, neighbour …
    FACET_PROFILE=fast pytest       a few examples; deep: many, and new ones every time
    pytest -s -k ladder             the largest difference to reference_numpy.py, stage by stage

Part 1 holds the properties, the table that `python test_facet.py` prints, and the ladder to
reference_numpy.py. Part 2 holds the tests: each is named after what is true, and each has a
control, which shows that it can fail. Part 3 plants bugs: each replaces a function or a method of
facet.py, and a named row of the table has to notice.

Every tolerance stands in TOL with its reason. Models are in float64, every weight is random and
none is zero, no rotation is a multiple of 90° about anything.
"""
import argparse
import ast
import copy
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import combinations_with_replacement, product
from math import isqrt
from pathlib import Path
from timeit import repeat
from typing import NamedTuple
from unittest import mock

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y

import facet
import reference_numpy

HERE = Path(__file__).resolve().parent

common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=4, derandomize=True, **common)
settings.register_profile("ci", max_examples=20, derandomize=True, **common)
settings.register_profile("deep", max_examples=300, **common)
settings.load_profile(os.environ.get("FACET_PROFILE", "ci"))

TOL = {  # largest allowed error, in units of the largest wanted value (of 1, if that is smaller)
    "exact": 0,              # the same numbers, to the last bit
    "formula": 1e-12,        # one formula against another, float64, no layers in between
    "rounding": 1e-10,       # the same sums in another order, float64, through three layers
    "slope": 1e-6,           # central differences; third derivatives jump at a knot of a spline
    "cutoff": 1e-4,          # what is left 1e-3 Å inside; a jump would be at least 1e-2
    "silu grid": 1e-8,       # SiLU is no polynomial: what the largest rule leaves, three layers
    "silu": 0.05,            # and what the default rule leaves
    "drift": 0.02,           # total energy in a short NVE, over the kinetic energy at the start
    "float32 formula": 1e-6, # one formula against another in float32
    "float32": 1e-4,         # 7 digits; layers and sums over neighbours cost one or two of them
    "float32 slope": 2e-2,   # a step of 0.01 Å, so that seven digits of energy make a slope
    "float32 cutoff": 1e-2,  # what is left where seven digits begin to see the neighbour
    "text file": 1e-6,       # files of text hold eight decimals
    "meV": 1e-3,             # an energy difference in eV, however large the energies
    "spline fit": 0.02,      # what 24 splines leave of a sine-Bessel function
    "moment": 0.25,          # of features made from unit variance: sampling, and no factor of 2
    "bfloat16": 5e-3,        # Muon makes its steps rotations in bfloat16: twenty of them
    "control": 1e-2,         # what a control must at least differ by
}

# ─── Part 1: properties of any calculator ────────────────────────────────────────────────────────
#
# A property takes an ASE calculator and a crystal, which it copies, and returns an error: how far
# the calculator is from having the property. `of` says in what: "energy" (eV per atom), "forces"
# (eV/Å), "stress" (eV/Å³), or several of them: then the largest error.

ALL = ("energy", "forces", "stress")
GENERIC, IMPROPER = Rotation.from_rotvec([[0.4, -1.1, 0.7], [-1.3, 0.2, 0.9]]).as_matrix()
IMPROPER = -IMPROPER  # a rotation after an inversion: a mirror image, turned


class NotApplicable(Exception):
    """The property says nothing about this calculator or this crystal."""


def value(calculator, atoms: Atoms, of: str) -> np.ndarray:
    """Energy per atom [1] eV, forces [N, 3] eV/Å or stress [3, 3] eV/Å³."""
    atoms = atoms.copy()
    atoms.calc = calculator
    if of == "energy":
        return np.array([atoms.get_potential_energy()]) / len(atoms)
    if of == "forces":
        return np.array(atoms.get_forces(), float)
    return np.array(atoms.get_stress(voigt=False), float)


def difference(calculator, before: Atoms, after: Atoms, of, R=None, order=slice(None)) -> float:
    """Largest error of what `after` should have, the crystal `before` after the rotation R; `order`
    says which atom of `before` each atom of `after` is."""
    R = np.eye(3) if R is None else R
    parts = (of,) if isinstance(of, str) else of
    wanted = {name: value(calculator, before, name) for name in parts}
    if "forces" in wanted:
        wanted["forces"] = wanted["forces"][order] @ R.T
    if "stress" in wanted:
        wanted["stress"] = R @ wanted["stress"] @ R.T

    errors = [np.abs(value(calculator, after, name) - wanted[name]).max() for name in parts]
    return float(np.max(errors))  # nan stays nan


def rotated(atoms: Atoms, R: np.ndarray) -> Atoms:
    """Positions and cell after the rotation (or any deformation) R [3, 3]."""
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ R.T)
    other.set_positions(atoms.positions @ R.T)
    return other


def rotation(calculator, atoms: Atoms, R: np.ndarray = GENERIC, of="forces") -> float:
    """A rotated crystal has the same energy, rotated forces, rotated stress. Units as `of`."""
    return difference(calculator, atoms, rotated(atoms, np.asarray(R)), of, np.asarray(R))


def reflection(calculator, atoms: Atoms, R: np.ndarray = IMPROPER, of="forces") -> float:
    """A mirror image has the same energy, mirrored forces and stress. Units as `of`."""
    return rotation(calculator, atoms, R, of)


def translation(calculator, atoms: Atoms, shift=(1.3, -17.1, 5.9), of="forces") -> float:
    """Nothing depends on where the crystal is; shift in Å. Units as `of`."""
    other = atoms.copy()
    other.translate(shift)
    return difference(calculator, atoms, other, of)


def permutation(calculator, atoms: Atoms, seed: int = 0, of="forces") -> float:
    """Nothing depends on the order of the atoms. Units as `of`."""
    order = np.random.default_rng(seed).permutation(len(atoms))
    return difference(calculator, atoms, atoms[order], of, order=order)


def other_cell(calculator, atoms: Atoms, seed: int = 0, of="forces") -> float:
    """Nothing depends on which vectors describe a lattice: rows of the cell are added to each other
    and turned round, and the cell becomes left-handed if it was not. Units as `of`."""
    periodic = np.flatnonzero(atoms.pbc)
    if len(periodic) == 0:
        raise NotApplicable("the crystal repeats nowhere")
    rng = np.random.default_rng(seed)
    cell = atoms.cell.array.copy()
    for i in periodic:
        for j in periodic:
            if i != j and rng.random() < 0.7:
                cell[i] += rng.choice([-1, 1]) * cell[j]
    cell[periodic[0]] *= -1
    other = atoms.copy()
    other.set_cell(cell)
    return difference(calculator, atoms, other, of)


def supercell(calculator, atoms: Atoms, times=(1, 2, 2), of="forces") -> float:
    """A supercell has the energy of its copies, their forces, the same stress. Units as `of`."""
    times = np.where(atoms.pbc, times, 1)
    if times.prod() == 1:
        raise NotApplicable("the crystal repeats nowhere")
    order = np.tile(np.arange(len(atoms)), times.prod())
    return difference(calculator, atoms, atoms.repeat(times), of, order=order)


def folding(calculator, atoms: Atoms, seed: int = 0, of="forces") -> float:
    """Nothing depends on whether atoms lie inside the cell or lattice vectors away. As `of`."""
    if not atoms.pbc.any():
        raise NotApplicable("the crystal repeats nowhere")
    rng = np.random.default_rng(seed)
    other = atoms.copy()
    other.positions += (rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array
    return difference(calculator, atoms, other, of)


def force_slope(calculator, atoms: Atoms, seed: int = 0, step: float = 2e-5) -> float:
    """Forces are minus the slope of the energy: along a random direction of all atoms, of unit
    length, by central differences with `step` Å. eV/Å."""
    push = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    push /= np.linalg.norm(push)
    energy = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions += sign * step * push
        energy.append(len(atoms) * value(calculator, moved, "energy")[0])
    slope = (energy[0] - energy[1]) / (2 * step)
    return float(abs(slope + (value(calculator, atoms, "forces") * push).sum()))


def stress_slope(calculator, atoms: Atoms, seed: int = 0, step: float = 2e-5) -> float:
    """Stress is the slope of the energy over the volume: along a random symmetric strain of unit
    size, by central differences. eV/Å³."""
    strain = np.random.default_rng(seed).normal(size=(3, 3))
    strain = strain + strain.T
    strain /= np.linalg.norm(strain)
    stress = value(calculator, atoms, "stress")
    energy = []
    for sign in (1, -1):
        strained = rotated(atoms, np.eye(3) + sign * step * strain)
        energy.append(len(atoms) * value(calculator, strained, "energy")[0])
    slope = (energy[0] - energy[1]) / (2 * step) / abs(atoms.cell.volume)
    return float(abs(slope - (stress * strain).sum()))


def leaving(atoms: Atoms):
    """A function distance (Å) → Atoms: the first atom of a crystal, its three nearest neighbours,
    and one more atom at that distance from it, on the side where nobody stands."""
    i, j, vectors = neighbor_list("ijD", atoms, 6.0)
    near = np.flatnonzero(i == 0)
    near = near[np.argsort(np.linalg.norm(vectors[near], axis=1))][:3]
    away = np.array([0.2, -0.3, 0.6]) - vectors[near].sum(0)
    away /= np.linalg.norm(away)
    numbers = [atoms.numbers[0], *atoms.numbers[j[near]], atoms.numbers[-1]]

    def cluster(distance: float) -> Atoms:
        places = np.vstack([np.zeros(3), vectors[near], distance * away])
        return Atoms(numbers, places + 20, cell=[70, 71, 72], pbc=True)
    return cluster


def cutoff_continuity(calculator, atoms: Atoms, of="energy", noise: float = 1e-9) -> float:
    """Energy (eV) and forces (eV/Å) do not jump where a leaving atom is lost from sight.

    That place is searched by halving: beyond it the energy is what it is 30 Å away, to `noise` eV
    per atom. Just inside, energy and forces should be those far away, too.
    """
    cluster = leaving(atoms)
    far = value(calculator, cluster(30.0), "energy")
    if abs(value(calculator, cluster(27.0), "energy") - far) > noise:
        raise NotApplicable("atoms see each other beyond 27 Å")
    inside, outside = 2.0, 27.0  # Å
    if abs(value(calculator, cluster(inside), "energy") - far) <= noise:
        raise NotApplicable("atoms 2 Å apart do not see each other")
    while outside - inside > 1e-6:
        middle = (inside + outside) / 2
        if abs(value(calculator, cluster(middle), "energy") - far) > noise:
            inside = middle
        else:
            outside = middle
    return difference(calculator, cluster(inside), cluster(30.0), of)


def isolated_atom(calculator, atoms: Atoms, expected: dict | None = None, of="energy") -> float:
    """An atom of each element, alone in a large cell, has the energy `expected` ({symbol: eV}; of
    a Facet: E0; else the same in two cells), no forces, no stress. Units as `of`."""
    if isinstance(calculator, facet.FacetCalculator) and expected is None:
        config = calculator.model.config
        E0 = config.reference_energies or [0.0] * len(config.species)
        expected = dict(zip(config.species, E0, strict=True))
    worst = 0.0
    for symbol in sorted(set(atoms.symbols)):
        alone = Atoms(symbol, [[1, 2, 3]], cell=[21, 22, 23], pbc=True)
        got = value(calculator, alone, of)
        wanted = 0.0
        if of == "energy":
            larger = Atoms(symbol, [[1, 2, 3]], cell=[31, 27, 29], pbc=True)
            wanted = expected[symbol] if expected else value(calculator, larger, "energy")
        worst = max(worst, float(np.abs(got - wanted).max()))
    return worst


def alone_or_in_a_batch(calculator, atoms: Atoms, of="forces") -> float:
    """For a FacetCalculator: a crystal has the same results alone and between others. As `of`."""
    if not isinstance(calculator, facet.FacetCalculator):
        raise NotApplicable("this calculator takes one crystal at a time")
    model = calculator.model
    dense = rotated(atoms, 0.85 * GENERIC)
    single = atoms[:1]
    crystals = [facet.find_neighbours(a, model.config) for a in (dense, atoms, single, atoms)]
    together = facet.evaluate(model, crystals, batch_atoms=10 ** 6)
    worst = 0.0
    for crystal, result in zip(crystals, together, strict=True):
        alone, = facet.evaluate(model, [crystal])
        error = np.abs(np.asarray(result[of]) - alone[of]).max()
        worst = max(worst, float(error) / (len(crystal.species) if of == "energy" else 1))
    return worst


def conservation(calculator, atoms: Atoms, kelvin: float = 300, steps: int = 200,
                 femtoseconds: float = 1.0, seed: int = 0) -> dict:
    """A short molecular dynamics at constant energy (velocity Verlet), from `kelvin` on.

    Returns time_ps [steps+1], energy_meV_per_atom [steps+1], the total energy from its start, and
    drift_meV_per_atom_per_ps, the slope of a line through it. The temperature falls to about half
    if the crystal starts at rest.
    """
    atoms = atoms.copy()
    atoms.calc = calculator
    speeds = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    momenta = speeds * np.sqrt(units.kB * kelvin * atoms.get_masses())[:, None]
    if len(atoms) > 1:
        momenta -= momenta.mean(0)
    atoms.set_momenta(momenta)
    dynamics = VelocityVerlet(atoms, femtoseconds * units.fs)
    energy = []
    dynamics.attach(lambda: energy.append(atoms.get_total_energy()))
    dynamics.run(steps)
    time_ps = np.arange(len(energy)) * femtoseconds / 1000
    change = 1000 * (np.array(energy) - energy[0]) / len(atoms)
    drift = np.polyfit(time_ps, change, 1)[0]
    return {"time_ps": time_ps, "energy_meV_per_atom": change,
            "drift_meV_per_atom_per_ps": float(drift)}


def conservation_error(calculator, atoms: Atoms, kelvin: float = 300, **more) -> float:
    """Spread of the total energy in `conservation`, over the kinetic energy at its start."""
    kinetic = 1000 * 1.5 * units.kB * kelvin  # meV per atom
    energy = conservation(calculator, atoms, kelvin, **more)["energy_meV_per_atom"]
    return float(np.ptp(energy) / kinetic)


def wigner(R, L: int) -> torch.Tensor:
    """The matrix D [M, M] with Y(R u) = D Y(u) for every u: by least squares over directions, so
    there is no formula to get wrong."""
    directions = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 3)))  # [300, 3]
    directions /= directions.norm(dim=1, keepdim=True)
    R = torch.as_tensor(R, dtype=torch.float64)
    before = facet.harmonics(directions, L)  # [300, M]
    after = facet.harmonics(directions @ R.T, L)  # [300, M]
    return torch.linalg.lstsq(before, after).solution.T


def random_alloy(atoms: int, seed: int = 0) -> Atoms:
    """A rattled silicon-like crystal of about that many atoms, half of them carbon."""
    rng = np.random.default_rng(seed)
    n = round((atoms / 8) ** (1 / 3))
    crystal = ase.build.bulk("Si", cubic=True) * (n, n, n)
    crystal.symbols = rng.choice(["Si", "C"], len(crystal))
    crystal.positions += rng.normal(0, 0.1, (len(crystal), 3))
    return crystal


def random_crystal(species, seed: int = 0) -> Atoms:
    """Eight atoms of these elements, at least one of each if there are no more, in a strained
    (triclinic) and rattled face-centred lattice."""
    rng = np.random.default_rng(seed)
    kinds = list(species)[:8]
    symbols = kinds + list(rng.choice(kinds, 8 - len(kinds)))
    radius = np.mean([covalent_radii[atomic_numbers[symbol]] for symbol in symbols])
    crystal = ase.build.bulk("Cu", cubic=True, a=2.2 * radius * 2 ** 0.5) * (1, 1, 2)
    crystal.symbols = rng.permutation(symbols)
    strain = np.eye(3) + rng.uniform(-0.06, 0.06, (3, 3))
    crystal.set_cell(crystal.cell.array @ strain, scale_atoms=True)
    crystal.positions += rng.normal(0, 0.08, (len(crystal), 3))
    return crystal


# ─── The table: python test_facet.py ─────────────────────────────────────────────────────────────

class Row(NamedTuple):
    """A line of the table. An error is None where there is nothing to measure."""
    name: str
    errors: tuple                      # of energy eV/atom, forces eV/Å, stress eV/Å³
    limit: float                       # what they should be below
    note: str = ""

    @property
    def wrong(self) -> bool:
        for error in self.errors:
            if error is not None and not error <= self.limit:  # nan is wrong, too
                return True
        return self.limit < 0  # an exception where none belongs


def slope(calculator, atoms: Atoms, of: str, step: float = 2e-5) -> float:
    """force_slope or stress_slope, as `of` says."""
    function = force_slope if of == "forces" else stress_slope
    return function(calculator, atoms, step=step)


def short_dynamics(calculator, atoms: Atoms, of: str) -> float:
    """25 fs, in shorter steps if the atoms are too fast: forces that are no slopes do not mind."""
    for steps in (50, 100, 200):
        error = conservation_error(calculator, atoms, steps=steps, femtoseconds=25 / steps)
        if error < TOL["drift"]:
            break
    return error


PROPERTIES = {  # name: (function, what it is measured in, tolerance)
    "rotation": (rotation, ALL, "rounding"),
    "reflection": (reflection, ALL, "rounding"),
    "translation": (translation, ALL, "rounding"),
    "permutation": (permutation, ALL, "rounding"),
    "another cell of the lattice": (other_cell, ALL, "rounding"),
    "supercell": (supercell, ALL, "rounding"),
    "atoms folded or not": (folding, ALL, "rounding"),
    "alone or in a batch": (alone_or_in_a_batch, ALL, "rounding"),
    "slope of the energy": (slope, ("forces", "stress"), "slope"),
    "jump at the cutoff": (cutoff_continuity, ("energy", "forces"), "cutoff"),
    "isolated atom": (isolated_atom, ALL, "rounding"),
    "conservation, part of kinetic": (short_dynamics, ("energy",), "drift"),
}
FLOAT32 = {  # tolerance in float64: (in float32, what the function must know of it)
    "rounding": ("float32", {}),
    "slope": ("float32 slope", {"step": 0.01}),
    "cutoff": ("float32 cutoff", {"noise": 1e-5}),
    "drift": ("drift", {}),
}
NOTHING = (None, None, None)


def property_row(name: str, calculator, atoms: Atoms, precision: str = "float64") -> Row:
    """One line of the table. What a calculator cannot do is noted; Facet has to do everything."""
    function, parts, tolerance = PROPERTIES[name]
    more = {}
    if precision == "float32":
        tolerance, more = FLOAT32[tolerance]
    ours = isinstance(calculator, facet.FacetCalculator)
    if ours and calculator.model.config.activation == "silu" and name in ("rotation", "reflection"):
        tolerance = "silu"

    errors = []
    try:
        size = 1.0
        if tolerance != "drift":
            size = max(1.0, float(np.abs(value(calculator, atoms, "forces")).max()))
        for of in ALL:
            try:
                measured = of in parts and not (of == "stress" and atoms.cell.rank < 3)
                errors.append(function(calculator, atoms, of=of, **more) if measured else None)
            except (PropertyNotImplementedError, NotImplementedError):
                if ours:
                    raise
                errors.append(None)
        return Row(name, tuple(errors), TOL[tolerance] * size)
    except NotApplicable as reason:
        return Row(name, NOTHING, 0.0, f"not applicable: {reason}")
    except Exception as error:
        return Row(name, NOTHING, -1.0 if ours else 0.0, in_short(error))


def in_short(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:90]


def ladder(model, atoms: Atoms, derivatives: bool = False) -> dict[str, float]:
    """Every stage of the model against reference_numpy.py: the largest error of each, over the
    largest value of the stage or 1. Forces and stress (slow) if `derivatives`."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    crystal = (asdict(model.config), state, [*atoms.symbols],
               atoms.positions, atoms.cell.array, atoms.pbc)
    want = reference_numpy.evaluate(*crystal)
    out = outputs(model, atoms)
    found = features(model, atoms)

    # Edges in one order, then what belongs to each edge.
    dst, src, shift, vectors = facet.neighbour_list(
        atoms.positions, atoms.cell.array, atoms.pbc, model.config.cutoff)
    edges = np.c_[dst, src, shift]  # [E, 5]
    wanted = np.c_[want["dst"], want["src"], want["shift"]]  # [E, 5]
    order, other = np.lexsort(edges.T), np.lexsort(wanted.T)
    steps = {"edges": largest(edges[order], wanted[other])[0]}
    if steps["edges"]:
        return steps  # the rest cannot be compared
    r = torch.from_numpy(vectors[order])  # [E, 3]
    phi = model.splines(r.norm(dim=1)).reshape(want["phi"].shape)
    Y = facet.harmonics(r / r.norm(dim=1, keepdim=True), model.config.degree)
    steps["vectors"] = largest(r, want["vectors"][other])[0]
    steps["phi"] = largest(phi, want["phi"][other])[0]
    steps["Y"] = largest(Y, want["Y"][other])[0]

    # Layer by layer.
    for t in range(model.config.layers):
        shape = len(atoms), -1, model.config.channels  # [N, m3 Q, C]
        A = np.concatenate([a.reshape(shape) for a in want["A"][t]], 1)  # [N, l3 m3 Q, C]
        steps[f"layer {t} density"] = largest(found[t, "density"], A)[0]
        for part, name in (("mix", "message"), ("skip", "skip"), ("grid", "h")):
            steps[f"layer {t} {part}"] = largest(found[t, part], want[name][t])[0]

    # What comes out.
    steps["energies"] = largest(out["energies"], want["energies"])[0]
    steps["energy"] = largest(out["energy"], [want["energy"]])[0]
    if derivatives:
        steps["forces"] = largest(out["forces"], reference_numpy.forces(*crystal))[0]
        steps["stress"] = largest(out["stress"][0], reference_numpy.stress(*crystal))[0]
    return steps


def weight_slope(model, batch, of: str, seed: int = 0, step: float = 1e-6) -> float:
    """The gradient of an output for the weights is its slope: along a random direction of all
    weights, for a random sum over the output's elements; relative to the slope."""
    generator = torch.Generator().manual_seed(seed)
    weights = list(model.parameters())
    direction = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in weights]
    factors = torch.randn(model(batch)[of].shape, dtype=torch.float64, generator=generator)

    def total(differentiable=False):
        return (factors * model(batch, differentiable=differentiable)[of]).sum()

    gradient = torch.autograd.grad(total(True), weights, allow_unused=True)
    got = 0.0
    for g, d in zip(gradient, direction, strict=True):
        got += 0 if g is None else float((g * d).sum())
    values = []
    with torch.no_grad():
        for change in (step, -2 * step):
            for w, d in zip(weights, direction, strict=True):
                w += change * d
            values.append(float(total()))
        for w, d in zip(weights, direction, strict=True):
            w += step * d
    wanted = (values[0] - values[1]) / (2 * step)
    return abs(got - wanted) / max(1.0, abs(wanted))


def empty_places(model, atoms: Atoms) -> float:
    """Places beyond the cutoff, as padding has them, add nothing to energies and forces. eV/Å."""
    batch = batch_of(model, atoms)
    N = len(batch.species)
    wider = batch._replace(
        src=torch.cat([batch.src, torch.arange(N)[:, None].expand(N, 5)], 1),
        vectors=torch.cat([batch.vectors, batch.vectors.new_tensor([0, 2 * model.config.cutoff, 0])
                           .expand(N, 5, 3)], 1))
    before, after = model(batch), model(wider)
    return max(largest(after[name], before[name])[0] for name in ("energies", "forces"))


def moments(model, atoms: Atoms) -> list[str]:
    """Second moments of the features after each stage, one line a layer, l = 0 1 2 …"""
    found = features(model, atoms)
    lines = []
    for t in range(model.config.layers):
        stages = []
        for part in ("mix", "skip", "grid"):
            if (t, part) not in found:
                continue  # a layer of yours may lack one
            x = found[t, part]
            by_degree = [np.square(x[:, facet.rows_of(l)]).mean() for l in range(isqrt(x.shape[1]))]
            stages.append(part + "".join(f" {moment:5.2f}" for moment in by_degree))
        lines.append(f"  layer {t}  " + "   ".join(f"{stage:23}" for stage in stages).rstrip())
    return lines


GUARD = {"cutoff": 5.0, "channels": 32, "groups": 8, "splines": 24, "mean_neighbours": 30.0,
         "energy_scale": 0.03, "core": (1.0, 0.9, 0.8)}  # Facet's default sizes
WIDE_CORE = (1.3, 1.2, 1.1)  # Å; the crystals below have atoms within each other's core


def guard_calculator() -> "facet.FacetCalculator":
    return facet.FacetCalculator(build(**GUARD), device="cpu", dtype=torch.float64)


def ladder_row() -> Row:
    steps = ladder(build(**{**GUARD, "core": WIDE_CORE}), SMALL)
    broken = [name for name, error in steps.items() if not error <= TOL["rounding"]]
    note = f"breaks at {broken[0]}" if broken else f"{len(steps)} stages"
    errors = (max(steps.values()), None, None)
    return Row("equals reference_numpy.py", errors, TOL["rounding"], note)


def weight_row(activation: str) -> Row:
    model = copy.deepcopy(build(activation=activation, core=WIDE_CORE))
    batch = batch_of(model, TRICLINIC, SMALL)
    errors = tuple(weight_slope(model, batch, of) for of in ("energy", "forces", "virial"))
    return Row(f"gradients for weights, {activation}", errors, TOL["slope"])


def empty_row() -> Row:
    error = empty_places(build(**GUARD), TRICLINIC)
    return Row("empty places", (None, error, None), TOL["rounding"])


PARTS = {  # rows about Facet's own parts
    "equals reference_numpy.py": ladder_row,
    "gradients for weights, product": partial(weight_row, "product"),
    "gradients for weights, silu": partial(weight_row, "silu"),
    "empty places": empty_row,
}


def guard_row(name: str) -> Row:
    """One row of `python test_facet.py`; an exception is an error, too."""
    try:
        if name in PROPERTIES:
            return property_row(name, guard_calculator(), TRICLINIC)
        return PARTS[name]()
    except Exception as error:
        return Row(name, NOTHING, -1.0, in_short(error))


def guard() -> list[Row]:
    """The wrong rows of `python test_facet.py`: none if all is right."""
    rows = [guard_row(name) for name in (*PROPERTIES, *PARTS)]
    return [row for row in rows if row.wrong]


HEADER = f"{'property':33}{'energy':>9}{'forces':>9}{'stress':>9}  should be"


def line(row: Row) -> str:
    """A row as text."""
    cells = []
    for error in row.errors:
        cells.append(f"{'-':>9}" if error is None else f"{error:9.1e}")
    limit = f"below {row.limit:.0e}" if row.limit > 0 else ""
    verdict = "WRONG" if row.wrong else "ok"
    if not row.wrong and row.errors == NOTHING:
        verdict = "-"
    return f"{row.name:33}{''.join(cells)}  {limit:12}  {verdict:5}  {row.note}".rstrip()


def table(title: str, rows) -> int:
    """Print rows as they come; returns how many are wrong."""
    print(title)
    print(HEADER)
    wrong = 0
    for row in rows:
        print(line(row), flush=True)
        wrong += row.wrong
    return wrong


def check_facet() -> int:
    """`python test_facet.py`: the table for a Facet with random weights, and what it costs."""
    print(f"Facet on CPU, threads: {torch.get_num_threads()}, torch {torch.__version__}")
    wrong = table("float64, random weights, errors in eV per atom, eV/Å, eV/Å³",
                  (guard_row(name) for name in (*PROPERTIES, *PARTS)))
    print(f"{wrong} wrong" if wrong else "all is right")

    # What is not right or wrong: sizes of signals, parameters, speed.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = facet.Facet(facet.Config(("C", "Si"), mean_neighbours=28.0), torch.float64)
    print("second moments of a fresh model's features, l = 0 1 2: near 1 where signals neither die "
          "nor explode")
    for text in moments(fresh, random_alloy(64)):
        print(text)
    model = copy.deepcopy(fresh).float()
    print("parameters", sum(p.numel() for p in model.parameters()))
    for atoms in (8, 64, 512):
        neighbours = facet.find_neighbours(random_alloy(atoms), model.config)
        batch = facet.make_batch([neighbours], model.config.cutoff)
        seconds = repeat(partial(model, batch), number=1, repeat=4)[1:]
        print(f"speed {atoms:4d} atoms, float32: {1000 * np.median(seconds):.1f} ms")
    return wrong


def given_calculator(words: list[str], dtype: str):
    """The calculators that the words after --calculator name: [(title, calculator, precision)].

    Raises SystemExit with one sentence if there are none.
    """
    spec, *options = words
    if spec.endswith(".pt"):
        if options:
            raise SystemExit(f"error: a checkpoint takes no {options[0]}")
        found = []
        for name in [dtype] if dtype else ["float64", "float32"]:
            try:
                calculator = facet.FacetCalculator(spec, dtype=getattr(torch, name))
            except (OSError, ValueError) as error:
                raise SystemExit(f"error: {error}") from None
            found.append((f"{spec}, {name}", calculator, name))
        return found

    # Keyword arguments are numbers, True, False, None or text.
    keywords = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise SystemExit(f"error: {option} is not key=value")
        try:
            keywords[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            keywords[key] = text
    module, colon, name = spec.partition(":")
    if not colon:
        raise SystemExit(f"error: {spec} is neither a .pt file nor module:callable, such as "
                         "ase.calculators.emt:EMT")
    try:
        calculator = getattr(importlib.import_module(module), name)(**keywords)
    except Exception as error:
        raise SystemExit(f"error: {spec} cannot be made: {in_short(error)}") from None
    if not hasattr(calculator, "get_property"):
        raise SystemExit(f"error: {spec} makes no ASE calculator")
    return [(f"{spec}, limits of {dtype or 'float32'}", calculator, dtype or "float32")]


def check_calculator(words: list[str], dtype: str, file: str, species: list[str]) -> int:
    """`python test_facet.py --calculator …`; returns how many rows are wrong."""
    wrong = 0
    for title, calculator, precision in given_calculator(words, dtype):
        if isinstance(calculator, facet.FacetCalculator):
            known = species or calculator.model.config.species
        else:
            known = species or ("Cu", "Al")
        try:
            atoms = ase.io.read(file) if file else random_crystal(known)
            value(calculator, atoms, "energy")
        except Exception as error:
            where = file or f"a crystal of {' '.join(known)} (try --species or --atoms)"
            raise SystemExit(f"error: no energy of {where}: {in_short(error)}") from None
        wrong += table(f"{title}, {atoms.symbols}; errors in eV per atom, eV/Å, eV/Å³",
                       (property_row(name, calculator, atoms, precision) for name in PROPERTIES))
        print()
    print(f"{wrong} wrong" if wrong else "all is right")
    return wrong


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check Facet, or any ASE calculator.")
    parser.add_argument("--calculator", nargs="+", metavar="SPEC", help="a .pt file, or "
                        "module:callable and key=value for its keyword arguments")
    parser.add_argument("--atoms", default="", metavar="FILE",
                        help="file with the crystal, which ASE reads; default: a built-in one")
    parser.add_argument("--species", nargs="+", default=[], help="elements of the built-in crystal")
    parser.add_argument("--dtype", default="", choices=["float32", "float64"],
                        help="precision to judge by; default: both for a .pt file, else float32")
    parser.add_argument("--bugs", action="store_true", help="count planted bugs that are caught")
    arguments = parser.parse_args()
    if arguments.bugs:
        return count_bugs()
    if arguments.calculator:
        wrong = check_calculator(arguments.calculator, arguments.dtype, arguments.atoms,
                                 arguments.species)
    else:
        wrong = check_facet()
    return int(wrong > 0)


# ─── What checks and tests share ─────────────────────────────────────────────────────────────────

def largest(got, want) -> tuple[float, tuple]:
    """Largest error, in the units of TOL, and where. nan equals only nan (no volume, no stress)."""
    got, want = (np.asarray(a.detach().cpu() if isinstance(a, torch.Tensor) else a, float)
                 for a in (got, want))
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    if got.size == 0:
        return 0.0, ()
    error = np.where(np.isnan(got) & np.isnan(want), 0, np.abs(got - want))
    error = np.where(np.isnan(error), np.inf, error) / max(1, np.nanmax(np.abs(want), initial=0))
    where = np.unravel_index(error.argmax(), error.shape)
    return float(error.max()), tuple(int(i) for i in where)


def same(what: str, got, want, tol: str = "rounding") -> float:
    """Fail unless got is want; returns the error."""
    error, where = largest(got, want)
    allowed = f"allowed {TOL[tol]:.0e} ({tol})"
    assert error <= TOL[tol], f"{what}: off by {error:.1e} at {where}, {allowed}"
    return error


def differ(what: str, got, want) -> None:
    """A control: fail if got is want, or nearly."""
    error, where = largest(got, want)
    assert error > TOL["control"], (f"{what}: differs by only {error:.1e}, at {where}, so this "
                                    "check proves nothing")


CUTOFF = 3.5
CONFIG = facet.Config(
    species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3, splines=12,
    mean_neighbours=8.0, energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5))
MODELS = {
    "L=2": {},
    "L=1, one layer": {"degree": 1, "layers": 1},
    "L=3, first knot": {"degree": 3, "first_knot": 1.0},
    "L=0": {"degree": 0},
    "L=4, two layers": {"degree": 4, "layers": 2, "channels": 4, "groups": 4},
    "atoms within the core": {"core": (1.3, 1.2, 1.1)},
    "no core": {"core": (0.0, 0.0, 0.0)},
    "silu": {"activation": "silu"},
    "silu, fine": {"activation": "silu", "grid_degree": 131},
}


@cache
def build(dtype=torch.float64, seed=0, **changes) -> "facet.Facet":
    """A tiny model, the same one for the same arguments: copy it before you change it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = facet.Facet(replace(CONFIG, **changes), dtype)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                noise = torch.randn(weights.shape, dtype=torch.float64)
                weights += 0.1 * noise.to(dtype)
    return model


def batch_of(model, *crystals: Atoms) -> "facet.Batch":
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    weights = next(model.parameters())
    return facet.make_batch(neighbours, model.config.cutoff, weights.dtype).to(weights.device)


def outputs(model, *crystals: Atoms) -> dict[str, np.ndarray]:
    """What the model says of a batch, as NumPy."""
    out = model(batch_of(model, *crystals))
    return {name: tensor.cpu().numpy() for name, tensor in out.items()}


def features(model, atoms: Atoms) -> dict:
    """What the parts of every layer put out: (t, part) → [N, M, C], a density [N, l3 m3 Q, C]."""
    found, hooks = {}, []
    for t, layer in enumerate(model.layers):
        for part in ("density", "mix", "skip", "grid"):
            def keep(module, inputs, output, key=(t, part)):
                found[key] = output.detach().numpy()[:len(atoms)]
            hooks.append(getattr(layer, part).register_forward_hook(keep))
    outputs(model, atoms)
    for hook in hooks:
        hook.remove()
    return found


TRICLINIC = Atoms("SiOCuSiO", [[0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3],
                               [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]],
                  cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]], pbc=True)
SMALL = Atoms("SiO", [[0, 0, 0], [1.4, 1.1, 1.3]],
              cell=[[3.4, 0.2, 0], [0.6, 3.5, 0.3], [-0.4, 0.1, 3.3]], pbc=True)


# ─── Part 2: tests. Crystals and rotations ───────────────────────────────────────────────────────

def with_cell(atoms: Atoms, cell, pbc=True) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions, cell=cell, pbc=pbc)


HELIX = []  # two atoms, three times around a 3₁ screw axis
for radius, angle, height in ((1.1, 0.0, 0.0), (2.0, 0.6, 0.9)):
    for n in range(3):
        turn = angle + 2 * np.pi / 3 * n
        HELIX.append((radius * np.cos(turn), radius * np.sin(turn), height + 1.6 * n))

PINNED = {
    "triclinic": TRICLINIC,
    "left-handed": with_cell(TRICLINIC, TRICLINIC.cell.array[[1, 0, 2]]),
    "slab": with_cell(TRICLINIC, TRICLINIC.cell, (True, True, False)),
    "slab without third vector": with_cell(
        TRICLINIC, TRICLINIC.cell.array * [[1], [1], [0]], (True, True, False)),
    "wire": with_cell(TRICLINIC, TRICLINIC.cell, (False, True, False)),
    "molecule": with_cell(TRICLINIC, np.zeros((3, 3)), False),
    "far outside the cell": Atoms("SiOCu", [[9.1, -7, 3], [-20, 0.3, 14], [0, 31, 2]],
                                  cell=TRICLINIC.cell, pbc=True),
    "isolated atom": Atoms("O", [[0.3, 0.2, 0.1]]),
    "dimer at the cutoff": Atoms("SiO", [[0, 0, 0], [0, 0, CUTOFF]]),
    "collinear": Atoms("SiOCu", np.outer([0, 1, 2.2], [0.6, 1.2, 1.1])),
    "planar": Atoms("SiOCuO", [[0, 0, 0], [1.6, 0.2, 0], [0.4, 1.9, 0], [2.1, 2.2, 0]]),
    "one atom and its images": Atoms("Cu", [[1, 1, 1]], pbc=True,
                                     cell=[[2.3, 0.2, 0], [0.1, 2.5, 0], [0.5, 0.4, 2.1]]),
    "skewed": Atoms("SiO", [[0, 0, 0], [1, 1.2, 1.1]], pbc=True,
                    cell=[[2.6, 0, 0], [7.3, 2.5, 0], [-5.1, 6.4, 2.4]]),
    "chiral": Atoms("Si3O3", HELIX, pbc=True,
                    cell=[[5.2, 0, 0], [-2.6, 2.6 * 3 ** 0.5, 0], [0, 0, 4.8]]),
}


@st.composite
def crystals(draw) -> Atoms:
    """1-12 atoms, 0-3 periodic axes (some of the others without a cell vector), any handedness,
    atoms outside the cell; most cells are smaller than the cutoff.

    Atoms lie near points of a mesh whose planes are at least 1.7 Å apart, so that they and their
    images keep 1.1 Å by construction.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    N = draw(st.integers(1, 12))
    pbc = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    no_vector = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    cell = np.eye(3) + np.tril(rng.uniform(-0.5, 0.5, (3, 3)), -1)
    cell = rng.uniform(2.3, 4.5, (3, 1)) * cell @ Rotation.random(rng=rng).as_matrix()
    cell = cell[draw(st.permutations(range(3)))]  # odd permutations are left-handed
    mesh = np.zeros(3, int)
    while mesh.prod() < N:
        cell *= 1.05
        planes = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)  # Å between lattice planes
        mesh = np.maximum(1, np.floor(planes / 1.7)).astype(int)
    sites = rng.permutation([*np.ndindex(*mesh)])[:N]  # [N, 3]
    outside = rng.integers(-1, 2, sites.shape) * (pbc | draw(st.booleans()))
    positions = (sites / mesh + outside) @ cell + rng.uniform(-0.15, 0.15, sites.shape)
    cell[~pbc & no_vector] = 0
    return Atoms(rng.choice(CONFIG.species, len(sites)), positions, cell=cell, pbc=pbc)


@st.composite
def rotations(draw) -> np.ndarray:
    """Elements of O(3): proper rotations, and rotations after an inversion."""
    quaternion = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4)))
    assume(np.linalg.norm(quaternion) > 0.1)
    return Rotation.from_quat(quaternion).as_matrix() * draw(st.sampled_from((1, -1)))


def everywhere(test):
    """Run a test(atoms, R, seed) on random crystals and on every pinned one."""
    for n, atoms in enumerate(PINNED.values()):
        test = example(atoms=atoms, R=(GENERIC, IMPROPER)[n % 2], seed=n)(test)
    return given(atoms=crystals(), R=rotations(), seed=st.integers(0, 999))(test)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tiny_calculator(**changes) -> "facet.FacetCalculator":
    return facet.FacetCalculator(build(**changes), device="cpu", dtype=torch.float64)


def holds(function, atoms: Atoms, tol: str = "rounding", calculator=None, **more) -> None:
    """The property has no error, in units of the largest force: for energy, forces and, where there
    is a volume, stress."""
    calculator = calculator or tiny_calculator()
    parts = ALL if atoms.cell.rank == 3 else ALL[:2]
    size = max(1, np.abs(value(calculator, atoms, "forces")).max())
    if function not in (force_slope, stress_slope):
        more["of"] = parts
    try:
        error = function(calculator, atoms, **more)
    except NotApplicable:
        return
    same(function.__name__, error / size, 0.0, tol)


# ─── Symmetries ──────────────────────────────────────────────────────────────────────────────────

@everywhere
def test_energy_is_invariant_and_forces_and_stress_turn_under_rotation(atoms, R, seed):
    holds(rotation, atoms, R=R)


@everywhere
def test_energy_and_forces_and_stress_are_invariant_under_translation(atoms, R, seed):
    holds(translation, atoms, shift=np.random.default_rng(seed).uniform(-20, 20, 3))


@everywhere
def test_forces_follow_a_permutation_of_the_atoms(atoms, R, seed):
    holds(permutation, atoms, seed=seed)


@everywhere
def test_another_cell_of_the_lattice_changes_nothing(atoms, R, seed):
    holds(other_cell, atoms, seed=seed)


@everywhere
def test_supercell_has_the_energy_of_its_copies(atoms, R, seed):
    holds(supercell, atoms, times=np.random.default_rng(seed).permutation([1, 2, 2]))


@everywhere
def test_folding_atoms_into_the_cell_changes_nothing(atoms, R, seed):
    holds(folding, atoms, seed=seed)


@everywhere
def test_crystals_of_a_batch_do_not_see_each_other(atoms, R, seed):
    """Every output, of neighbours of several sizes."""
    several = [PINNED["chiral"], atoms, PINNED["isolated atom"], TRICLINIC, atoms]
    together, first = outputs(build(), *several), 0
    for s, crystal in enumerate(several):
        alone = outputs(build(), crystal)
        for name, found in together.items():
            rows = slice(first, first + len(crystal))
            if name in facet.PER_CRYSTAL:
                rows = slice(s, s + 1)
            same(name, found[rows], alone[name])
        first += len(crystal)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu"])
@pytest.mark.parametrize("R", (GENERIC, IMPROPER), ids=("rotation", "reflection"))
def test_every_feature_of_every_layer_turns_under(name, R):
    model, other = build(**MODELS[name]), rotated(TRICLINIC, R)
    tol = "silu grid" if "silu" in name else "rounding"
    check_features(model, TRICLINIC, other, R, tol)
    before, after = outputs(model, TRICLINIC), outputs(model, other)
    same("energies", after["energies"], before["energies"], tol)
    same("forces", after["forces"], before["forces"] @ R.T, tol)
    same("virial", after["virial"], R @ before["virial"] @ R.T, tol)


def check_features(model, atoms, other, R, tol="rounding"):
    D, before, after = wigner(R, model.config.degree).numpy(), *(features(model, a)
                                                                for a in (atoms, other))
    for (t, part), x in before.items():
        if part != "density":
            M = x.shape[1]
            turned = np.einsum("ab,nbc->nac", D[:M, :M], x)
            same(f"features of layer {t} {part}", after[t, part], turned, tol)


def handedness(atoms) -> float:
    """A number that does not depend on orientation but changes sign in a mirror: triple products
    of sums over neighbours with three different weights."""
    cell = atoms.cell.array
    dst, _, _, r = facet.neighbour_list(atoms.positions, cell, atoms.pbc, CUTOFF)
    weight = CUTOFF - np.linalg.norm(r, axis=1, keepdims=True)
    sums = np.zeros((3, len(atoms), 3))
    for n in range(3):
        np.add.at(sums[n], dst, r * weight ** (n + 1))
    return np.sum(np.cross(sums[0], sums[1]) * sums[2])


@pytest.mark.parametrize("name", ("triclinic", "chiral", "molecule"))
def test_mirror_image_has_the_same_energy_under_reflection(name):
    """The group is O(3); control: crystal and mirror image are not one crystal."""
    atoms, mirror = PINNED[name], np.diag([1, 1, -1]) @ GENERIC
    differ("handedness, zero if the crystal is not chiral", handedness(atoms), 0)
    same("handedness after a rotation", handedness(rotated(atoms, GENERIC)), handedness(atoms))
    same("handedness of the mirror image", handedness(rotated(atoms, mirror)), -handedness(atoms))
    holds(reflection, atoms, R=mirror)
    check_features(build(), atoms, rotated(atoms, mirror), mirror)


def test_rotation_permutation_and_strain_change_what_is_not_turned_along():
    """Control of all of the above: what they compare is not zero, and not constant."""
    other = rotated(TRICLINIC, GENERIC)
    out, after = outputs(build(), TRICLINIC), outputs(build(), other)
    for name in ("forces", "stress", "virial"):
        differ(f"{name} of a rotated crystal", after[name], out[name])
    before, after = features(build(), TRICLINIC), features(build(), other)
    for t, part in ((0, "mix"), (0, "grid"), (1, "mix"), (1, "skip"), (1, "grid")):
        for l in (1, 2):
            rows = facet.rows_of(l)
            differ(f"features of layer {t} {part}, degree {l}",
                   after[t, part][:, rows], before[t, part][:, rows])
    differ("energies in another order", out["energies"][::-1], out["energies"])
    for deform in (1.05 * np.eye(3), GENERIC + np.diag([0, 0, 0.05])):  # no rotations
        differ("energy", outputs(build(), rotated(TRICLINIC, deform))["energy"], out["energy"])
    right = wigner
    with mock.patch.object(sys.modules[__name__], "wigner", lambda R, L: right(R.T, L)):
        with pytest.raises(AssertionError, match="features of layer"):
            check_features(build(), TRICLINIC, other, GENERIC)


class Crooked(EMT):
    """Wrong in every respect: it depends on place, direction, order and cell, and jumps."""

    def calculate(self, atoms=None, *arguments):
        super().calculate(atoms, *arguments)
        x = atoms.positions
        self.results["energy"] += 0.1 * (x[:, 0] * np.arange(len(x))).sum() + 0.1 * x[0, 2]
        self.results["energy"] += atoms.cell.array[0, 0] + float(np.ptp(x) < 4)
        self.results["forces"] = self.results["forces"] + 0.1 * x
        self.results["stress"] = self.results["stress"] + 0.1 * np.arange(6) + 0.1 * x[0, 0]


class Forceful(EMT):
    """Energy and forces, but no stress."""

    implemented_properties = ["energy", "free_energy", "forces"]


def test_table_finds_what_is_wrong_with_any_calculator():
    """Every property of EMT holds, none of a crooked one; where there is no stress, a dash."""
    atoms = random_crystal(("Cu", "Al"))
    several = [name for name in PROPERTIES if name != "alone or in a batch"]
    for name in several:
        right = property_row(name, EMT(), atoms, "float32")
        assert not right.wrong and right.errors != NOTHING, line(right)
        wrong = property_row(name, Crooked(), atoms, "float32")
        assert wrong.wrong or "not applicable" in wrong.note, line(wrong)
        without = property_row(name, Forceful(), atoms, "float32")
        assert not without.wrong and without.errors[2] is None, line(without)
    row = property_row("alone or in a batch", EMT(), atoms)
    assert not row.wrong and "not applicable" in row.note


def run_main(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["test_facet.py", *words])
    code = main()
    return code, capsys.readouterr().out


def test_command_prints_the_table_and_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    facet.save(build(energy_scale=0.2), tmp_path / "model.pt")  # forces as those of a crystal
    code, text = run_main(monkeypatch, capsys, "--calculator", str(tmp_path / "model.pt"))
    assert code == 0 and "all is right" in text and text.count("rotation ") == 2
    ase.io.write(tmp_path / "crystal.xyz", TRICLINIC)
    with with_bug("bias_on_every_degree"):
        code, text = run_main(monkeypatch, capsys, "--calculator", str(tmp_path / "model.pt"),
                              "--dtype", "float64", "--atoms", str(tmp_path / "crystal.xyz"))
    assert code == 1 and "SiOCuSiO" in text and "WRONG" in text
    code, text = run_main(monkeypatch, capsys, "--calculator", "ase.calculators.lj:LennardJones",
                          "sigma=2.3", "rc=6.0", "smooth=True", "--species", "Ar", "Kr")
    assert code == 0 and "Kr" in text and "WRONG" not in text


@pytest.mark.parametrize("words, message", (
    (["nothing"], "neither a .pt file nor module:callable"),
    (["nothing:x"], "cannot be made: ModuleNotFoundError"),
    (["ase.calculators.emt:EMX"], "has no attribute 'EMX'"),
    (["ase.calculators.emt:EMT", "fast"], "fast is not key=value"),
    (["os:getcwd"], "makes no ASE calculator"),
    (["absent.pt"], "absent.pt: no such checkpoint"),
    (["ase.calculators.emt:EMT", "--species", "Xe"], "no energy of a crystal of Xe"),
    (["ase.calculators.emt:EMT", "--atoms", "absent.cif"], "no energy of absent.cif"),
), ids=str)
def test_bad_calculator_gets_one_sentence(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=message) as error:
        run_main(monkeypatch, capsys, "--calculator", *words)
    assert "\n" not in str(error.value)


# ─── Derivatives ─────────────────────────────────────────────────────────────────────────────────

@everywhere
def test_forces_are_minus_the_slope_of_the_energy(atoms, R, seed):
    holds(force_slope, atoms, "slope", seed=seed)


@everywhere
def test_stress_is_the_slope_of_the_energy_over_the_volume(atoms, R, seed):
    assume(atoms.cell.rank == 3)
    holds(stress_slope, atoms, "slope", seed=seed)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu, fine"])
def test_every_component_of_forces_and_stress_is_a_slope(name):
    model, step, changed = build(**MODELS[name]), 2e-5, []
    for n in range(3 * len(TRICLINIC)):
        for sign in (step, -step):
            moved = TRICLINIC.copy()
            moved.positions.flat[n] += sign
            changed.append(moved)
    for n in range(9):
        for sign in (step, -step):
            strain = sign * np.eye(9)[n].reshape(3, 3)
            changed.append(rotated(TRICLINIC, np.eye(3) + (strain + strain.T) / 2))
    out, energy = outputs(model, TRICLINIC), outputs(model, *changed)["energy"]
    slopes = (energy[::2] - energy[1::2]) / (2 * step)
    same("forces", out["forces"].ravel(), -slopes[:-9], "slope")
    same("virial", out["virial"].ravel(), slopes[-9:], "slope")
    same("stress", out["stress"], out["virial"] / TRICLINIC.get_volume(), "formula")
    differ("forces", out["forces"], 0 * out["forces"])


@pytest.mark.parametrize("activation", ("product", "silu"))
@pytest.mark.parametrize("of", ("energy", "energies", "forces", "virial"))
def test_gradients_for_the_weights_are_slopes(of, activation):
    """With core and without; control: a gradient that is detached somewhere is seen."""
    for core in ((), WIDE_CORE):
        model = copy.deepcopy(build(activation=activation, core=core))
        batch = batch_of(model, TRICLINIC, PINNED["planar"], SMALL)
        for seed in range(3):
            same(f"slope of {of}", weight_slope(model, batch, of, seed), 0, "slope")
    right = facet.Linear.forward
    with mock.patch.object(facet.Linear, "forward", lambda self, x: right(self, x.detach())):
        differ("slope, once detached", weight_slope(model, batch, of), 0)


@pytest.mark.parametrize("changes", ({}, {"first_knot": 1.2}, {"activation": "silu"}), ids=str)
def test_energy_slope_and_curvature_are_continuous_at_the_cutoff(changes):
    """On a line along which an atom leaves the sight of another; distance = cutoff + s."""
    model, direction = build(**changes), np.array([2, -3, 6]) / 7

    def along(*s):
        clusters = [Atoms("SiOCu", [[0, 0, 0], [-1.1, 1.2, -0.9], (CUTOFF + t) * direction])
                    for t in s]
        out = outputs(model, *clusters)
        slope = -out["forces"].reshape(-1, 3, 3)[:, 2] @ direction
        return {"energy": out["energy"], "slope": slope, "curvature": np.diff(slope) / np.diff(s)}
    inside, outside = along(-1.5e-6, -0.5e-6), along(0.5e-6, 1.5e-6)
    beyond, control = along(0.5, 0.6), along(-1.5, -1.499)
    for name in inside:
        same(f"{name} just inside the cutoff", inside[name], outside[name], "cutoff")
        same(f"{name} just outside", outside[name], beyond[name], "exact")
        differ(f"{name} well inside", control[name], outside[name])


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
def test_energy_and_forces_do_not_jump_at_the_cutoff_of_any_crystal(atoms):
    assume(len(neighbor_list("i", atoms, 3.0)))
    for of in ("energy", "forces"):
        try:
            error = cutoff_continuity(tiny_calculator(), atoms, of)
        except NotApplicable:
            error = 0.0  # the last atom is hidden in the core of others
        same(f"jump of {of}", error / 10, 0, "cutoff")


@pytest.mark.parametrize("first_knot", (0.0, 1.5))
@pytest.mark.parametrize("axis", ((0, 0, 1), (1, 0, 0), (2, -3, 6)), ids=str)
def test_second_derivatives_are_finite_for_close_atoms(first_knot, axis):
    model = build(first_knot=first_knot)
    for distance in (0.002, 0.03, 1.3):
        other = distance * np.array(axis) / np.linalg.norm(axis)
        batch = batch_of(model, Atoms("SiO", [[0, 0, 0], other]))

        def energy(vectors, batch=batch):
            return model.atomic_outputs(batch._replace(vectors=vectors))["energies"].sum()
        hessian = torch.autograd.functional.hessian(energy, batch.vectors)
        out = model(batch, differentiable=True)
        total = out["forces"].square().sum() + out["energy"].sum()
        gradients = torch.autograd.grad(total, [*model.parameters()])
        for values in (out["energy"], out["forces"], hessian, *gradients):
            same("finite", values.isfinite(), torch.ones_like(values), "exact")
    differ("second derivatives at the last distance", hessian, 0 * hessian)


def test_isolated_atom_has_its_reference_energy_and_no_forces():
    """Alone, in a large cell, out of reach; whatever else is in the batch."""
    cell = Atoms("Cu", cell=[9.0, 8, 7], pbc=True)
    lonely = ((PINNED["isolated atom"], [2.0]), (PINNED["dimer at the cutoff"], [-1.0, 2.0]),
              (cell, [0.5]))
    for changes in ({}, {"activation": "silu"}, {"degree": 0}, {"layers": 1}):
        for crystal, E0 in lonely:
            for several in ([crystal], [crystal, TRICLINIC]):
                out = outputs(build(**changes), *several)
                no_stress = np.full((3, 3), 0 if crystal.cell.volume else np.nan)
                same("energies", out["energies"][:len(E0)], E0, "formula")
                same("forces", out["forces"][:len(E0)], np.zeros((len(E0), 3)), "exact")
                same("stress", out["stress"][0], no_stress, "exact")
    near = outputs(build(), Atoms("SiO", [[0, 0, 0], [0, 0, 2.0]]))
    differ("energies in reach", near["energies"], [-1.0, 2.0])
    differ("forces in reach", near["forces"], np.zeros((2, 3)))


def test_large_reference_energies_stay_exact_in_float32():
    E0 = (-2000.123456789, -433.987654321, 0.5)
    large, none = (build(torch.float32, reference_energies=given) for given in (E0, ()))
    same("isolated atom", outputs(large, PINNED["isolated atom"])["energy"], [E0[1]], "exact")
    crystal = SMALL * (4, 4, 4)
    energy = outputs(large, crystal)["energy"] - 64 * (E0[0] + E0[1])
    same("the rest of a large crystal", energy, outputs(none, crystal)["energy"], "rounding")
    differ("the rest", energy, [0.0])


def test_energy_differences_of_a_large_crystal_are_right_in_float32():
    """1,000 atoms of −2,000 eV: one is moved, one is strained away, one is replaced."""
    several = [SMALL * (5, 10, 10) for _ in range(4)]
    several[1].positions[7] += 0.3
    several[2].set_cell(several[2].cell.array * [[1], [1], [1.001]], scale_atoms=True)
    several[3].symbols[500] = "Cu"
    energies = []
    for dtype in (torch.float64, torch.float32):
        model = build(dtype, reference_energies=(-2000.0, -2010.0, -1990.0), layers=2)
        energies.append(np.concatenate([outputs(model, atoms)["energy"] for atoms in several]))
    want, found = (energy[1:] - energy[0] for energy in energies)
    differ("energy differences", want, 0 * want)
    for n in range(3):
        same(f"error of difference {n}, eV", found[n] - want[n], 0, "meV")
    rounded = energies[0].astype(np.float32)
    error = np.abs(rounded[1:] - rounded[0] - want).max()
    assert error > TOL["meV"], "a sum in float32 would do as well"


def test_only_species_that_are_present_matter():
    """A crystal has the same energy whether other species are in the batch or in the table."""
    assert batch_of(build(), SMALL).present.tolist() == [0, 1]
    copper = PINNED["one atom and its images"]
    assert batch_of(build(), copper).present.tolist() == [2]
    assert batch_of(build(), copper, SMALL).present.tolist() == [0, 1, 2]
    rows, reference = [0, 1], CONFIG.reference_energies[:2]
    few = facet.Facet(replace(CONFIG, species=("Si", "O"), reference_energies=reference),
                      torch.float64)
    state = dict(build().state_dict())
    tables = {name for name, part in few.named_modules() if isinstance(part, facet.SpeciesTable)}
    for name in tables:  # the same rows, of another W
        table = build().get_submodule(name)(torch.tensor(rows))  # [2, C]
        state[f"{name}.W"] = torch.linalg.solve(few.get_submodule(name).root, table)
    few.load_state_dict(state)
    want = outputs(build(), SMALL)
    for name, found in outputs(few, SMALL).items():
        same(name, found, want[name])
    for crystal in (Atoms("Si", [[0, 0, 0]]), copper):
        both = outputs(build(), SMALL, crystal)
        same("energy beside another", both["energy"][0], want["energy"][0])
    differ("energy of another species", outputs(build(), Atoms("Cu2", SMALL.positions, pbc=True,
           cell=SMALL.cell))["energy"], want["energy"])


def test_sums_over_neighbours_and_their_derivatives():
    """To second order, however the atoms are cut in chunks, one of them without neighbours."""
    g = torch.Generator().manual_seed(0)
    L, N, B, K, c, M1, Q = 1, 5, 2, 3, 2, 4, 6
    phi, Y, h, A = (torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()
                    for shape in ((N, B, L + 1, K), (N, 4, K), ((N + 1) * B, c * M1),
                                  (Q, B * c, N + 1)))
    A = A.detach().mT.requires_grad_()  # [Q, N+1, b c], in another order in memory
    G = torch.randn(Q, M1 * 4, dtype=torch.float64, generator=g)
    index = torch.randint((N + 1) * B, (N, B, K), generator=g)
    degree = facet.degree_of_row(L)

    there = h[index].view(N, B, K, c, M1)
    whole = torch.einsum("qam,nbmk,nmk,nbkca->qnbc", G.view(Q, M1, 4), phi[:, :, degree], Y, there)
    whole = torch.nn.functional.pad(whole.flatten(2), (0, 0, 0, 1))  # [Q, N+1, b c]
    slopes = torch.autograd.grad(whole, (phi, Y, h), A, retain_graph=True)
    for atoms in (1, 3, 5):
        pieces = [slice(a, min(a + atoms, N)) for a in range(0, N, atoms)]
        with mock.patch.object(facet, "chunks", lambda index, X, pieces=pieces: pieces):
            def sums(phi, Y, h):
                return facet.NeighbourSum.apply(phi, Y, h, index, G, degree)

            def grad(A, phi, Y, h):
                return facet.NeighbourGrad.apply(A, phi, Y, h, index, G, degree, True)

            same(f"sums in chunks of {atoms}", sums(phi, Y, h), whole, "formula")
            for name, found, want in zip(("φ", "Y", "h"), grad(A, phi, Y, h), slopes):
                same(f"gradient for {name} in chunks of {atoms}", found, want, "formula")
            checks = ((torch.autograd.gradcheck, sums, (phi, Y, h)),
                      (torch.autograd.gradgradcheck, sums, (phi, Y, h)),
                      (torch.autograd.gradcheck, grad, (A, phi, Y, h)))
            for check, f, inputs in checks:
                fine = atoms != 3 or check(f, inputs, raise_exception=False)
                assert fine, f"{check.__name__} of {f.__name__}"
    pieces = facet.chunks(torch.zeros(1000, 2, 50, dtype=int), 10 ** 6)
    assert len(pieces) > 3, "this index should need several chunks"
    atoms = np.concatenate([np.arange(1000)[piece] for piece in pieces])
    same("atoms in all chunks", atoms, np.arange(1000), "exact")
    assert facet.chunks(torch.zeros(3, 2, 50, dtype=int), 10 ** 9) == [slice(n, n + 1) for n in
                                                                       range(3)]


def backwards(model, batch) -> dict[str, torch.Tensor]:
    """All outputs, and the gradients for all weights of a sum of their squares."""
    out = model(batch, differentiable=True)
    total = sum(out[name].square().sum() for name in ("energies", "forces", "virial"))
    names = [name for name, _ in model.named_parameters()]
    return {**out, **dict(zip(names, torch.autograd.grad(total, [*model.parameters()])))}


@pytest.mark.parametrize("atoms", (1, 4))
def test_layers_in_chunks_of_atoms_equal_those_in_one_piece(atoms):
    """Energies, forces, virials, gradients for weights."""
    def cut(index, X):
        return [slice(a, min(a + atoms, len(index))) for a in range(0, len(index), atoms)]

    model = build(layers=2, cutoff=3.4)
    batch = batch_of(model, SMALL * (1, 2, 3), TRICLINIC)
    assert len(batch.species) % 4, "the last chunk of four should be a smaller one"
    with mock.patch.object(facet, "chunks", cut):
        found = backwards(model, batch)
    with mock.patch.object(facet, "chunks", lambda index, X: [slice(0, len(index))]):
        want = backwards(model, batch)
    for name in want:
        same(name, found[name], want[name])
        if name != "stress":
            differ(name, want[name], 0 * want[name])


@pytest.mark.parametrize("times", ((1, 1, 2), (2, 2, 2), (3, 4, 5), (5, 10, 10)), ids=str)
@pytest.mark.parametrize("activation", ("product", "silu"))
def test_supercell_of_up_to_500_atoms_has_the_energy_of_its_copies(times, activation):
    single = PINNED["one atom and its images"]
    calculator = tiny_calculator(activation=activation, layers=2)
    holds(supercell, single, calculator=calculator, times=times)
    differ("stress", value(calculator, single, "stress"), np.zeros((3, 3)))


def test_kinship_follows_the_periodic_table():
    """All elements, against the printed table; √K is its root; columns are nearer than rows."""
    every = tuple(chemical_symbols[1:])
    root = reference_numpy.species_table(every, np.eye(len(every)))
    K = facet.kinship(every).numpy()
    same("K", K, root @ root)
    same("K of itself", np.diag(K), np.ones(len(every)))
    same("K both ways", K, K.T)
    differ("K of strangers", K, np.eye(len(every)))
    of = dict(zip(every, K))
    number = atomic_numbers
    for one, near, far in (("Nb", "Ta", "Mo"), ("Cl", "Br", "S"), ("La", "Ce", "Hf"),
                           ("Mg", "Ca", "Na"), ("He", "Ne", "Be"), ("Al", "Ga", "Mg")):
        assert of[one][number[near] - 1] > of[one][number[far] - 1], f"{one}, {near}, {far}"

    # The table of a model: rows in the order of its species, whose covariance is K
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        table = facet.SpeciesTable(facet.Config(("Ta", "O", "Nb"), channels=4096))
    rows = table(torch.tensor([0, 1, 2, 2])).detach().numpy()  # [4, C]
    want = facet.kinship(("Ta", "O", "Nb", "Nb")).numpy()
    want[2, 3] = want[3, 2] = 1.0  # the same species
    assert np.abs(rows @ rows.T / 4096 - want).max() < 0.1
    assert want[0, 2] > 0.8 and want[0, 1] < 0.1


@pytest.mark.parametrize("count", (1, 3, 89))
def test_any_number_of_species_is_told_apart(count):
    """Each has its own embedding, skip, core and reference energy, also in the reference."""
    species = tuple(chemical_symbols[1:count + 1])
    model = build(species=species, reference_energies=tuple(np.arange(count) - 3.5), layers=2)
    crystal = random_crystal(species[-8:])
    for stage, error in ladder(model, crystal).items():
        same(stage, error, 0)
    lonely = [Atoms(symbol, [[0, 0, 0]]) for symbol in species]
    same("lonely atoms", outputs(model, *lonely)["energy"], np.arange(count) - 3.5, "formula")

    # The same two atoms of every kind: no two kinds have the same energy
    pairs = [Atoms([symbol, species[0]], [[0, 0, 0], [0.3, 0.4, 2.3]]) for symbol in species]
    energy = outputs(build(species=species, reference_energies=(), layers=2), *pairs)["energy"]
    apart = np.diff(np.sort(energy))
    assert (apart > TOL["rounding"]).all(), "two species are one"
    out = outputs(model, *pairs)
    one = outputs(model, pairs[-1])
    same("the last pair, alone", out["forces"][-2:], one["forces"])


def test_energy_is_conserved_in_molecular_dynamics():
    class Wrong(facet.FacetCalculator):
        def calculate(self, *arguments, **keywords):
            super().calculate(*arguments, **keywords)
            self.results["forces"] = 1.1 * self.results["forces"]
    model = build(energy_scale=0.2)
    error = partial(conservation_error, atoms=TRICLINIC, kelvin=600, steps=100)
    right = facet.FacetCalculator(model, "cpu", torch.float64)
    same("spread of the energy", error(right, femtoseconds=0.5), 0, "drift")
    wrong = Wrong(model, "cpu", torch.float64)
    assert error(wrong, femtoseconds=0.5) > 2 * TOL["drift"], "forces 10 % too large"
    assert error(right, femtoseconds=4.0) > 2 * TOL["drift"], "steps eight times too long"


def test_conservation_reports_time_energy_and_drift():
    class Leaking(EMT):  # loses 1 meV per atom each femtosecond, whatever the atoms do
        steps = 0

        def calculate(self, atoms=None, *arguments):
            super().calculate(atoms, *arguments)
            self.results["energy"] -= 0.001 * len(atoms) * self.steps
            self.steps += 1
    atoms = ase.build.bulk("Cu", cubic=True)
    for calculator, drift in ((EMT(), 0.0), (Leaking(), -1000.0)):
        found = conservation(calculator, atoms, kelvin=50, steps=20, femtoseconds=1.0)
        same("time", found["time_ps"], np.arange(21) / 1000, "formula")
        assert len(found["energy_meV_per_atom"]) == 21 and found["energy_meV_per_atom"][0] == 0
        assert abs(found["drift_meV_per_atom_per_ps"] - drift) < 2  # meV/atom/ps
    assert atoms.calc is None and not atoms.get_momenta().any(), "the crystal was changed"


# ─── Neighbours and padding ──────────────────────────────────────────────────────────────────────

@everywhere
def test_neighbour_list_equals_that_of_ase(atoms, R, seed):
    """Pairs, shifts, vectors. A pair exactly at the cutoff adds nothing and may miss."""
    cutoff = np.random.default_rng(seed).uniform(1.5, 6.0)
    for pbc in product((False, True), repeat=3) if atoms.cell.rank == 3 else [atoms.pbc]:
        crystal, found = with_cell(atoms, atoms.cell, pbc), []
        for i, j, S, r in (facet.neighbour_list(crystal.positions, crystal.cell.array, pbc, cutoff),
                           neighbor_list("ijSD", crystal, cutoff)):
            assert (np.diff(i) >= 0).all(), "not sorted by dst"
            inside = np.linalg.norm(r, axis=1) < cutoff - 1e-9
            order = np.lexsort((*S[inside].T, j[inside], i[inside]))
            found.append((np.c_[i, j, S][inside][order], r[inside][order]))
        same("dst, src, shift", found[0][0], found[1][0], "exact")
        same("vectors", found[0][1], found[1][1], "formula")


def test_neighbour_is_seen_one_way_as_the_conventions_say():
    """i receives, j is seen, r = x_j + shift·cell − x_i."""
    dst, src, shift, r = facet.neighbour_list(SMALL.positions, SMALL.cell.array, True, CUTOFF)
    assert len(dst) > 10 and shift.any()
    want = SMALL.positions[src] + shift @ SMALL.cell.array - SMALL.positions[dst]
    same("vectors", r, want, "formula")
    differ("vectors the other way", -r, want)


def test_padded_neighbours_add_nothing_and_get_no_gradient():
    """Beside a denser crystal there are empty places."""
    model, sparse = build(), PINNED["planar"]
    batch = batch_of(model, sparse, PINNED["skewed"])
    empty = batch.vectors.norm(dim=-1) >= 2 * CUTOFF - 1e-9
    assert 50 < empty[:len(sparse)].sum() < empty.numel(), "this batch should have much padding"
    vectors = batch.vectors.clone().requires_grad_()
    energies = model.atomic_outputs(batch._replace(vectors=vectors))["energies"]
    first = torch.autograd.grad(energies.sum(), vectors, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), vectors)[0]
    same("energies", energies[:len(sparse)], outputs(model, sparse)["energies"], "formula")
    for what, values in (("gradient", first), ("gradient of its square", second)):
        same(f"{what} at padding", values[empty], 0 * values[empty], "exact")
        differ(f"{what} at neighbours", values[~empty], 0 * values[~empty])
    same("energies and forces with empty places", empty_places(model, TRICLINIC), 0)


NOT_FINITE = []  # 3 × 3 numbers, one of which is not finite
for place in np.ndindex(3, 3):
    NOT_FINITE.append(5 * np.eye(3))
    NOT_FINITE[-1][place] = (np.nan, np.inf, -np.inf)[sum(place) % 3]


@pytest.mark.parametrize("message, atoms", (
    ("element Xe is not among those the model knows: Si O Cu",
     Atoms("SiXe", [[0, 0, 0], [0, 0, 2]])),
    ("NaN or infinite", Atoms("Si", [[0, np.nan, 0]])),
    ("NaN or infinite", Atoms("Si", cell=[[np.inf, 0, 0], [0, 3, 0], [0, 0, 3]], pbc=True)),
    ("no volume", Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True)),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [0, 0, 1e-5]])),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [4, 4, -8]], cell=[4, 4, 4], pbc=True)),
    ("cell vector is zero", Atoms("Si", cell=[3, 3, 0], pbc=True)),
    ("there are no atoms", Atoms(cell=[3, 3, 3], pbc=True)), ("there are no atoms", Atoms()),
    *[("NaN or infinite", Atoms("SiO", bad[:2])) for bad in NOT_FINITE[:6]],
    *[("NaN or infinite", Atoms("Si", cell=bad, pbc=True)) for bad in NOT_FINITE],
    *[("cell vector is zero", Atoms("Si", cell=5 * np.eye(3) * [[a], [b], [c]], pbc=True))
      for a, b, c in ((0, 1, 1), (1, 0, 1), (1, 1, 0))],
    *[("cell vector is zero", Atoms("Si", cell=5 * np.diag(1 - axis), pbc=axis))
      for axis in np.eye(3)],
    *[("no volume", Atoms("Si", cell=np.roll([[3, 1, 0], [3, 1, 1e-7], [0, 1, 3]], n, (0, 1)),
                          pbc=np.roll((False, False, True), n))) for n in range(3)],
    ("no volume", Atoms("Si", cell=[[3, 1, 0], [6, 2, 0], [0, 0, 0]], pbc=(True, True, False))),
    *[("sit on one spot", Atoms("SiO", [[0, 0, 0], 9e-4 * axis])) for axis in np.eye(3)],
    *[("sit on one spot", Atoms("SiO", [[1, 1, 1], 1 + 4 * axis], cell=[4, 4, 4], pbc=axis))
      for axis in np.eye(3)],
), ids=lambda value: value if isinstance(value, str) else str(value.symbols))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_broken_crystal_is_refused(message, atoms):
    with pytest.raises(ValueError, match=message) as error:
        facet.find_neighbours(atoms, CONFIG)
    assert "\n" not in str(error.value)


def test_odd_but_sound_crystals_are_accepted():
    """Control of the above: nearly as bad, yet they have an energy and finite forces."""
    for atoms in (
            Atoms("SiO", [[0, 0, 0], [0, 0, 1.2e-3]]),
            Atoms("Si", cell=[[3, 0, 0], [3, 0.01, 0], [0, 0, 3]], pbc=(True, False, True)),
            Atoms("Si", cell=[[3, 0, 0], [0, 0, 0], [0, 0, 3]], pbc=(True, False, True)),
            Atoms("SiO", [[1, 1, 1], [1, 1, 5]], cell=[4, 4, 4], pbc=(True, True, False))):
        forces = outputs(build(core=(0.0,) * 3), atoms)["forces"]
        same("finite", np.isfinite(forces), np.ones_like(forces), "exact")


# ─── Radial functions, harmonics, coupling, density, grid ────────────────────────────────────────

def test_splines_equal_those_of_scipy():
    for first_knot in (0.0, 1.2):
        splines = build(first_knot=first_knot).splines
        h = (CUTOFF - first_knot) / CONFIG.splines
        c = np.pad(splines.coefficients.detach().numpy(), ((3, 3), (0, 0)))  # splines run out
        r = np.linspace(max(0, first_knot - 3 * h), CUTOFF, 997)
        want = BSpline(first_knot + h * np.arange(-6, CONFIG.splines + 4), c, 3)(r)
        same("splines", splines(torch.from_numpy(r)), want, "formula")
        beyond = splines(torch.linspace(CUTOFF, 9, 50, dtype=torch.float64))
        same("splines beyond the cutoff", beyond, 0 * beyond, "exact")
        differ("splines", want, 0 * want)


@pytest.mark.parametrize("first_knot", (0.0, 0.8, 1.5))
@pytest.mark.parametrize("degree", (0, 2))
def test_splines_start_as_smooth_waves(first_knot, degree):
    """√5/2 (1 − x²) sin(nπx)/x, one n for each group, the same for all layers and degrees, of mean
    square about 1 in the ball; below the first knot they run out within three spacings."""
    config = replace(CONFIG, splines=24, first_knot=first_knot, degree=degree)
    columns = 2 * 3 * (degree + 1)  # layers, groups, degrees
    splines = facet.RadialSplines(columns, config)
    r = torch.linspace(max(0.01, first_knot), CUTOFF, 400, dtype=torch.float64)
    x = r[:, None] / CUTOFF
    inside = slice(0 if first_knot else 20, None)  # the tip of the ball hardly counts in the fit
    for column in range(columns):
        n = column // (degree + 1) % 3 + 1
        wave = 5 ** 0.5 / 2 * (1 - x ** 2) * torch.sin(n * torch.pi * x) / x
        found = splines(r)[:, column]
        same(f"wave {n} of column {column}", found[inside], wave[inside, 0], "spline fit")
        if first_knot == 0:
            mean = float((3 * x ** 2 * wave.square()).mean())  # weights of shells in the ball
            same("mean square", mean, 1.0, "moment")

    # Below: the same coefficients, where the bumps of knots that do not exist are missing
    h = (CUTOFF - first_knot) / 24
    c = np.pad(splines.coefficients.detach().numpy(), ((3, 3), (0, 0)))
    below = np.linspace(max(0, first_knot - 4 * h), first_knot, 50)
    below = below[below > first_knot - 3 * h]
    want = BSpline(first_knot + h * np.arange(-6, 28), c, 3)(below)
    same("below the first knot", splines(torch.from_numpy(below)), want, "formula")
    gone = splines(torch.linspace(0, 1, 50).double() * (first_knot - 3.001 * h))
    if first_knot:
        same("further below", gone, 0 * gone, "exact")


def test_fit_finds_the_best_splines_and_reports_the_error():
    splines, known = facet.RadialSplines(9, CONFIG), facet.RadialSplines(9, CONFIG)
    with torch.no_grad():
        shape, g = known.coefficients.shape, torch.Generator().manual_seed(0)
        known.coefficients += torch.randn(shape, dtype=torch.float64, generator=g)
    differ("coefficients before", splines.coefficients, known.coefficients)
    same("error where an exact fit exists", splines.fit(known), torch.zeros(9), "formula")
    same("coefficients", splines.coefficients, known.coefficients)

    def waves(r):
        return torch.sin(2 * torch.arange(1, 10) * r[:, None]) * (CUTOFF - r[:, None]) ** 3
    r = torch.linspace(1.5, 3.4, 70, dtype=torch.float64)
    error = splines.fit(waves, r)
    same("reported error", error, (splines(r) - waves(r)).square().mean(0).sqrt(), "formula")
    differ("error of the fastest wave", error[-1], 0)
    assert error[0] < error[-1] / 10, "a slow wave should fit better than a fast one"

    # Without distances they are those of a uniform medium: as many as the shells have volume.
    r = torch.linspace(0.7, CUTOFF, 50, dtype=torch.float64)
    fits = []
    for distances in (None, CUTOFF * torch.linspace(0, 1, 10_001).double() ** (1 / 3),
                      torch.linspace(0, CUTOFF, 1024)):
        splines.fit(waves, distances)
        fits.append(splines(r))
    right, wrong = largest(fits[0], fits[1])[0], largest(fits[0], fits[2])[0]
    assert right < wrong / 10, "not weighted by the volume of the shells"


def test_core_repels_ever_more_and_ends_smoothly():
    """From where the core begins down to nothing; there it ends with two derivatives."""
    core = facet.Repulsion(facet.Config(species=("H", "O", "Si", "Cu", "U"))).double()
    same("default core", core.core, 0.75 * covalent_radii[[1, 8, 14, 29, 92]], "exact")
    short = facet.Repulsion(facet.Config(species=("H", "U"), cutoff=2.0)).core
    same("core within half the cutoff", short, [0.75 * covalent_radii[1], 1.0], "exact")
    for i, j in combinations_with_replacement(range(5), 2):
        end = float(core.core[i] + core.core[j])

        def energy(r, i=i, j=j):
            r = torch.as_tensor(r, dtype=torch.float64)[:, None]  # [n, 1] each atom sees the last
            species = torch.tensor([i] * (len(r) - 1) + [j])
            return core(r, species, torch.full((len(r), 1), len(r) - 1))[:-1]
        r = torch.linspace(0.02, 0.98, 200, dtype=torch.float64) * end
        V = energy(torch.cat([r, r[:1]]))
        assert (V.diff() < 0).all() and (V > 0).all() and V[0] > 100
        inside, outside = energy([end - 1e-4, end - 1e-3, 1.0]), energy([end, end + 0.01, 10, 1.0])
        same("beyond the core", outside, np.zeros(3), "exact")
        assert 0 < inside[0] < 1.1e-3 * inside[1], "does not vanish as a third power"
    wide = outputs(build(core=WIDE_CORE), PINNED["collinear"])
    none = outputs(build(core=(0.1, 0.1, 0.1)), PINNED["collinear"])
    differ("energy with the core", wide["energy"], none["energy"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("cutoff", (1.5, 2.0, 2.7, 3.3, 4.1, 5.0, 6.0))
def test_core_of_every_element_ends_within_the_cutoff(cutoff, dtype):
    """H to Lr, each beside each: exactly nothing from the cutoff on; control: something within."""
    config = facet.Config(species=tuple(chemical_symbols[1:104]), cutoff=cutoff)
    core = facet.Repulsion(config)
    assert float(core.core.max()) <= cutoff / 2 and float(core.core.min()) > 0
    core.to(dtype)
    species = torch.arange(103)
    src = species.expand(103, 103)
    for factor in (1.0, 1.0 + 1e-6, 1.5):
        r = torch.full((103, 103), factor * cutoff, dtype=dtype)
        same("energy beyond", core(r, species, src), torch.zeros(103), "exact")
    within = 0.5 * (core.core[:, None] + core.core)
    assert (core(within, species, src) > 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_no_core_is_no_repulsion(dtype):
    """core = 0: finite, and only what the network says; one of two may have a core."""
    close = Atoms("SiO", [[0, 0, 0], [0, 0.02, 0.01]])
    for core in ((0.0,) * 3, (0.0, 1.0, 0.0)):
        out = outputs(build(dtype, core=core), close)
        for name in ("energies", "forces"):
            same(name, np.isfinite(out[name]), np.ones_like(out[name]), "exact")
        part = facet.Repulsion(replace(CONFIG, core=core)).to(dtype)
        r = torch.tensor([[0.02], [0.02]], dtype=dtype)
        energy = part(r, torch.tensor([0, 1]), torch.tensor([[1], [0]]))
        assert bool((energy == 0).all()) == (sum(core) == 0)


def test_harmonics_equal_those_of_scipy(L=6):
    """The poles included. Orthonormality by Gauss-Legendre in z and equidistant angles."""
    z, weights = np.polynomial.legendre.leggauss(L + 1)
    angles = np.arange(2 * L + 2) * np.pi / (L + 1)
    z, angle = (a.ravel() for a in np.meshgrid(z, angles, indexing="ij"))
    rho = np.sqrt(1 - z ** 2)
    u = np.vstack([np.stack([rho * np.cos(angle), rho * np.sin(angle), z], -1),
                   np.eye(3), -np.eye(3)])
    theta, angle, want = np.arccos(u[:, 2]), np.arctan2(u[:, 1], u[:, 0]), []
    for l in range(L + 1):
        for m in range(-l, l + 1):
            wave = np.sqrt(4 * np.pi) * (-1) ** m * sph_harm_y(l, abs(m), theta, angle)
            want.append(wave.real if m == 0 else 2 ** 0.5 * (wave.real if m > 0 else wave.imag))
    Y = facet.harmonics(torch.from_numpy(u), L).numpy()
    same("harmonics", Y, np.stack(want, -1), "formula")
    weights = np.repeat(weights, 2 * L + 2) / (4 * L + 4)
    same("means of products", (weights * Y[:-6].T) @ Y[:-6], np.eye((L + 1) ** 2), "formula")
    same("degree 1", Y[:, facet.rows_of(1)], np.sqrt(3) * u[:, [1, 2, 0]], "formula")
    same("degrees", facet.degree_of_row(2), [0, 1, 1, 1, 2, 2, 2, 2, 2], "exact")
    differ("degree 1 in another order", Y[:, facet.rows_of(1)], np.sqrt(3) * u)


def test_lebedev_rule_is_exact_up_to_its_degree():
    points, weights = facet.lebedev(0)
    assert points.shape == (1, 3) and weights.tolist() == [1.0], "one point for a constant"
    with pytest.raises(ValueError, match="no Lebedev rule has degree 132"):
        facet.lebedev(132)
    sizes = {1: 6, 2: 6, 3: 6, 4: 14, 6: 26, 7: 26, 9: 38, 12: 74, 15: 86, 22: 194, 31: 350,
             32: 434, 35: 434, 125: 5294, 131: 5810}
    for degree, P in sizes.items():
        assert len(facet.lebedev(degree)[0]) == P, f"not the smallest rule of degree {degree}"
    for degree in (3, 7, 9, 15):
        points, weights = facet.lebedev(degree)
        mean, M = weights @ facet.harmonics(points, degree + 1), (degree + 1) ** 2
        same(f"means of harmonics, degree {degree}", mean[:M], np.eye(1, M)[0], "formula")
        same("lengths", points.norm(dim=1), torch.ones(len(points)), "formula")
        differ("means one degree higher", mean[M:], 0 * mean[M:])


def test_coupling_equals_that_of_sympy():
    """Up to one factor for each (l1, l2, l3)."""
    wigner_module = pytest.importorskip("sympy.physics.wigner")
    triangles = set()
    for path in product(range(3), repeat=3):
        if sum(path) % 2 == 0 and 2 * max(path) <= sum(path):
            triangles.add(path)
    assert sorted(facet.paths(2, 2, 2)) == sorted(triangles)
    for l1, l2, l3 in triangles | {(1, 2, 3), (3, 3, 2)}:
        G = facet.gaunt(l1, l2, l3)
        ms = product(*(range(-l, l + 1) for l in (l1, l2, l3)))
        want = np.array([float(wigner_module.real_gaunt(l1, l2, l3, *m)) for m in ms])
        same("sum of squares for m3", G.square().sum((0, 1)), torch.ones(2 * l3 + 1), "formula")
        factor = ((2 * l3 + 1) / (want ** 2).sum()) ** 0.5
        same(f"coupling {l1} {l2} {l3}", G.flatten(), want * factor, "formula")


@pytest.mark.parametrize("L", (0, 1, 2, 3))
def test_summing_neighbours_first_equals_coupling_first(L):
    """Sum over neighbours, then couple = couple edge by edge, then sum."""
    N, K, C, B = 5, 4, CONFIG.channels, CONFIG.groups
    g = torch.Generator().manual_seed(1)
    h, phi, Y = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in (
        (N, (L + 1) ** 2, C), (N, B, L + 1, K), (N, (L + 1) ** 2, K)))
    src = torch.randint(N, (N, K), generator=g)
    density = build(degree=L).layers[1].density
    index = src[:, None] * B + torch.arange(B)[:, None]
    A = density(h, index, phi, Y)  # [N, l3 m3 Q, C]
    for l3, found in enumerate(A.split([(2 * l + 1) * Q for l, Q in enumerate(density.counts)], 1)):
        by_path = []
        for l1, l2, l in density.paths:
            if l == l3:
                by_path.append(torch.einsum(
                    "nck,abd,nbk,nkac->ndc", phi[:, :, l2].repeat_interleave(C // B, 1),
                    facet.gaunt(l1, l2, l3), Y[:, facet.rows_of(l2)],
                    h[src][:, :, facet.rows_of(l1)]))
        want = torch.cat(by_path, -1) / CONFIG.mean_neighbours ** 0.5
        same(f"density of degree {l3}", found.reshape(want.shape), want, "formula")
        differ(f"density of degree {l3}", want, 0 * want)


def grid_error(L: int, R=GENERIC, **changes) -> float:
    """How much it matters whether features are rotated before or after the grid layer."""
    layer = build(degree=L, layers=2, **changes).layers[0].grid
    D, g = wigner(R, L), torch.Generator().manual_seed(2)
    x = torch.randn(9, (L + 1) ** 2, CONFIG.channels, dtype=torch.float64, generator=g)
    differ("grid layer", layer(x), x)
    return largest(layer(D @ x), D @ layer(x))[0]


def test_product_grid_is_exact_under_rotation_and_reflection():
    for L, R in product((1, 2, 3, 4), (GENERIC, IMPROPER)):
        same(f"default grid, L = {L}", grid_error(L, R), 0, "formula")
        same(f"finer grid, L = {L}", grid_error(L, R, grid_degree=3 * L + 4), 0, "formula")
    for L in (2, 3, 4):  # the smallest rule of all has degree 3 and is right for L = 1
        differ(f"grid too coarse, L = {L}", grid_error(L, grid_degree=3 * L - 2), 0)


def test_silu_grid_gains_from_a_finer_grid_under_rotation():
    errors = [grid_error(2, activation="silu", grid_degree=degree)
              for degree in (7, 15, 23, 35, 47, 71)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine < coarse / 2, f"errors should fall with the degree: {errors}"
    same("error on the default grid", grid_error(2, activation="silu"), errors[1], "formula")
    for L in (1, 2, 3, 4):
        default, points = build(degree=L, activation="silu").layers[0].grid, int(7.5 * L)
        assert len(default.to_grid) == len(facet.lebedev(points)[0])


def test_scalar_layer_needs_one_grid_point():
    for activation in ("product", "silu"):
        last = build(activation=activation, grid_degree=9).layers[-1].grid
        finer = copy.deepcopy(last)
        assert len(last.to_grid) == 1
        points, weights = facet.lebedev(9)
        finer.to_grid = torch.ones(len(points), 1, dtype=torch.float64)
        finer.to_rows = weights[None]
        x = torch.randn(4, 1, CONFIG.channels, dtype=torch.float64)
        same(activation, last(x), finer(x), "formula")


def start_moments(fan_in=None) -> dict[str, np.ndarray]:
    """Second moments, per degree, of what every stage of a fresh model makes of unit variance;
    fan_in, if given, replaces that of every weight."""
    g = torch.Generator().manual_seed(3)
    right = facet.randn

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def randn(*shape, **given):
        return right(*shape, fan_in=fan_in) if fan_in else right(*shape, **given)

    def moment(x):
        l = range(isqrt(x.shape[1]))
        return np.array([float(x[:, facet.rows_of(n)].square().mean()) for n in l])
    found = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(3)
        with mock.patch.object(facet, "randn", randn):
            model = facet.Facet(replace(CONFIG, channels=64, groups=4, splines=24,
                                        species=tuple(chemical_symbols[1:31]),
                                        reference_energies=(), mean_neighbours=40.0), torch.float64)
        N, K, C, M = 300, 40, 64, 9
        found["embedding"] = moment(model.embedding(torch.arange(30))[:, None])
        x = draw(N, M, C)
        found["readout"] = moment((x[:, :1] @ model.readout)[..., None])
        species = torch.randint(30, (N,), generator=g)
        for t, layer in enumerate(model.layers):
            out, seen = isqrt(layer.skip.shared + layer.skip.missing), isqrt(layer.skip.shared)
            skip = layer.skip(draw(N, (1, M, M)[t], C), species)[:, :seen ** 2]
            found[f"layer {t} skip"] = moment(skip)
            widths = [(2 * l + 1) * Q for l, Q in enumerate(layer.density.counts)]
            found[f"layer {t} mix"] = moment(layer.mix(draw(N, sum(widths), C)))

            # Neighbours everywhere in the ball, as many as the mean: a density of unit variance
            r = draw(N, K, 3)
            unit = r / r.norm(dim=-1, keepdim=True)
            distance = CUTOFF * torch.rand(N, K, dtype=torch.float64, generator=g) ** (1 / 3)
            phi = model.splines(distance).view(N, K, 3, 4, 3)[:, :, t].permute(0, 2, 3, 1)
            index = torch.randint(N, (N, 1, K), generator=g) * 4 + torch.arange(4)[:, None]
            A = layer.density(draw(N, (1, M, M)[t], C), index, phi, facet.harmonics(unit, 2).mT)
            by_degree = [float(a.square().mean()) for a in A.split(widths, 1)]
            found[f"layer {t} density"] = np.array(by_degree)

            # The grid: what goes there, the product that comes back, the scalars that go on
            y, grid = x[:, :out ** 2], layer.grid
            u, v = grid.W12(y).chunk(2, -1)
            found[f"layer {t} W1"], found[f"layer {t} W2"] = moment(u), moment(v)
            found[f"layer {t} W3"] = moment(grid.W3(y))
            found[f"layer {t} Ws"] = moment((y[:, 0] @ grid.Ws)[:, None])
            squares = grid.from_grid(grid.on_grid(y) * grid.on_grid(draw(*y.shape)))
            found[f"layer {t} product"] = moment(squares)
    return found


def test_every_stage_keeps_unit_variance_at_the_start():
    """Per degree; control: with another fan-in, the same for all weights, no stage does."""
    for stage, moment in start_moments().items():
        same(f"moments of {stage}, by degree", moment, np.ones_like(moment), "moment")
    for stage, moment in start_moments(fan_in=150).items():
        if "density" not in stage and "product" not in stage:
            error, _ = largest(moment, np.ones_like(moment))
            assert error > TOL["moment"], f"{stage} does not notice"


@pytest.mark.parametrize("activation", ("product", "silu"))
def test_features_of_a_fresh_model_neither_die_nor_explode(activation):
    """What `python test_facet.py` prints; degrees that skip past a layer are not there yet."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = facet.Config(("C", "Si"), mean_neighbours=28.0, activation=activation)
        model = facet.Facet(config, torch.float64)
    found = features(model, random_alloy(8))
    for t, part in product(range(3), ("mix", "grid")):
        x = found[t, part]
        for l in range(isqrt(x.shape[1])):
            moment = np.square(x[:, facet.rows_of(l)]).mean()
            assert 0.03 < moment < 5, f"layer {t} {part}, degree {l}: second moment {moment:.3f}"


# ─── The reference ladder ────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu, fine"])
def test_ladder_to_the_reference_holds(name):
    derivatives = name in ("L=1, one layer", "L=0")
    print(f"\n{name}: largest error against reference_numpy.py")
    for stage, error in ladder(build(**MODELS[name]), SMALL, derivatives).items():
        print(f"    {stage:16} {error:.1e}")
        same(stage, error, 0, "slope" if stage in ("forces", "stress") else "rounding")


@pytest.mark.parametrize("activation", ("product", "silu"))
@pytest.mark.parametrize("L", (0, 1, 2, 3, 4))
def test_ladder_and_slopes_hold_for_every_degree_and_activation(L, activation):
    sizes = {"degree": L, "activation": activation, "channels": 4, "groups": 2, "first_knot": 0.6}
    for stage, error in ladder(build(**sizes), SMALL).items():
        same(stage, error, 0)
    calculator = tiny_calculator(**sizes)
    for slope_of in (force_slope, stress_slope):
        holds(slope_of, TRICLINIC, "slope", calculator)
    tol = "rounding" if activation == "product" or L == 0 else "silu"
    for R in (GENERIC, IMPROPER):
        holds(rotation, TRICLINIC, tol, calculator, R=R)


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
@example(atoms=PINNED["isolated atom"])
@example(atoms=PINNED["slab without third vector"])
def test_ladder_to_the_reference_holds_on_random_crystals(atoms):
    for stage, error in ladder(build(layers=2, channels=4, groups=2), atoms).items():
        same(stage, error, 0)


def test_ladder_breaks_where_the_model_is_another():
    """Control: other weights in one layer, and the ladder says where."""
    model = copy.deepcopy(build())
    want = reference_numpy.evaluate
    with torch.no_grad():
        model.layers[1].skip.a.W[0] += 0.5
    with mock.patch.object(reference_numpy, "evaluate", lambda config, state, *crystal: want(
            config, {n: w.numpy() for n, w in build().state_dict().items()}, *crystal)):
        steps = ladder(model, SMALL)
    broken = [stage for stage, error in steps.items() if error > TOL["control"]]
    assert broken[0] == "layer 1 skip" and "energy" in steps and steps["layer 1 mix"] < 1e-10


# ─── Use ─────────────────────────────────────────────────────────────────────────────────────────

def test_training_overfits_one_crystal():
    """Labels from other weights; the loss on forces and stress is differentiated twice."""
    model, batch = copy.deepcopy(build(seed=1)), batch_of(build(), TRICLINIC)
    want, losses = build()(batch), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        out = model(batch, differentiable=True)
        loss = sum((out[name] - want[name]).square().mean() for name in ALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(w.grad is not None and w.grad.any() for w in model.parameters()), "a useless weight"
    assert losses[-1] < losses[0] / 50, f"the loss fell from {losses[0]} to {losses[-1]} only"


def test_saved_model_is_the_same_model(tmp_path):
    path, model = tmp_path / "model.pt", build()
    facet.save(model, path, step=3)
    loaded, want = facet.load(path, dtype=torch.float64), outputs(model, TRICLINIC)["energy"]
    assert loaded.config == model.config and torch.load(path, weights_only=True)["step"] == 3
    same("energy", outputs(loaded, TRICLINIC)["energy"], want, "exact")
    calculator = facet.FacetCalculator(path, "cpu", torch.float64)
    same("energy", [calculator.get_potential_energy(TRICLINIC)], want, "exact")
    differ("energy of another model", outputs(build(seed=1), TRICLINIC)["energy"], want)


def test_interrupted_save_leaves_the_old_file(tmp_path):
    facet.save(build(), tmp_path / "model.pt")
    for name in ("model.pt", "new.pt"):
        for place, moment in ((torch, "save"), (os, "fsync"), (Path, "replace")):
            with mock.patch.object(place, moment, side_effect=KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    facet.save(build(seed=1), tmp_path / name)
    assert [*tmp_path.iterdir()] == [tmp_path / "model.pt"]
    same("readout", facet.load(tmp_path / "model.pt").readout, build().readout, "float32")
    differ("readout of the other model", build(seed=1).readout, build().readout)


def test_broken_checkpoint_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        facet.load(tmp_path / "model.pt")
    facet.save(build(), tmp_path / "model.pt")
    whole, state = (tmp_path / "model.pt").read_bytes(), build().state_dict()
    torch.save({"state": state}, tmp_path / "no config")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "truncated").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text").write_bytes(b"not a model\n")
    for name in ("no config", "list", "empty", "truncated", "text"):
        with pytest.raises(ValueError, match=f"{name} is not a Facet checkpoint") as error:
            facet.load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("message, part, changes", (
    ("has no tensor readout", "state", {"readout": None}),
    ("has no tensor layers.1.mix.W.2", "state", {"layers.1.mix.W.2": None}),
    ("has a tensor dipole that this version does not know", "state", {"dipole": torch.ones(6)}),
    ("tensor embedding.W has shape [4, 6], not [3, 6]", "state", {"embedding.W": torch.ones(4, 6)}),
    ("tensor readout has shape [], not [6]", "state", {"readout": torch.tensor(1.0)}),
    ("tensor readout has shape [12], not [6]", "state", {"readout": torch.ones(12)}),
    ("has no field cutoff", "config", {"cutoff": None}),
    ("has a field speed that this version does not know", "config", {"speed": 3}),
    ("has shape [12, 27], not [13, 27]", "config", {"splines": 13}),
    ("activation must be", "config", {"activation": "relu"}),
    ("channels must be of type int, not 'six'", "config", {"channels": "six"}),
), ids=str)
def test_checkpoint_of_another_version_says_what_does_not_fit(message, part, changes, tmp_path):
    path = tmp_path / "model.pt"
    facet.save(build(), path)
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[part][name] = value
        if value is None:
            del content[part][name]
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        facet.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])  # of 3 × 3 elements, those of ASE's six


def test_calculator_gives_the_energy_forces_and_stress_of_the_model():
    model, atoms = build(), TRICLINIC.copy()
    want = outputs(model, atoms)
    for dtype, tol in ((torch.float64, "exact"), (torch.float32, "float32")):
        original = copy.deepcopy(model)
        atoms.calc = facet.FacetCalculator(original, device="cpu", dtype=dtype)
        with torch.no_grad():
            original.readout.zero_()  # later training does not reach the calculator
        same("energy", [atoms.get_potential_energy()], want["energy"], tol)
        free_energy = atoms.get_potential_energy(force_consistent=True)
        same("free energy", [free_energy], want["energy"], tol)
        same("energies", atoms.get_potential_energies(), want["energies"], tol)
        same("forces", atoms.get_forces(), want["forces"], tol)
        same("stress", atoms.get_stress(), want["stress"][0][VOIGT], tol)
        assert atoms.get_forces().dtype == atoms.get_stress().dtype == np.float64
        moved = atoms.copy()
        moved.positions[0] += 0.2
        differ("forces of the next crystal", atoms.calc.get_forces(moved), want["forces"])
    for name in ("molecule", "slab without third vector"):
        forces = outputs(model, PINNED[name])["forces"]
        same("forces", atoms.calc.get_forces(PINNED[name]), forces, "float32")
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_stress(PINNED[name])


@contextmanager
def default_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad, default_float64, deterministic,
         partial(torch.autocast, "cpu", torch.bfloat16))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("activation", ("product", "silu"))
def test_model_is_built_alike_in_any_mode_of_torch(mode, activation):
    """Whatever the dtype: parameters, constants, and what comes out in training."""
    config = replace(CONFIG, activation=activation)
    for dtype in (torch.float32, torch.float64):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            want = facet.Facet(config, dtype)
            torch.default_generator.manual_seed(5)
            with mode():
                model = facet.Facet(config, dtype)
        for a, b in zip([*model.parameters(), *model.buffers()],
                        [*want.parameters(), *want.buffers()], strict=True):
            assert a.dtype == b.dtype
            same("weights", a, b, "exact")
        with mode():
            batch = batch_of(want, TRICLINIC)
        assert batch.vectors.dtype == dtype and batch.volume.dtype == torch.float64


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_calculator_gives_the_same_forces_in_any_mode_of_torch(mode, tmp_path):
    """And it draws no random numbers, nor does load; it refuses words that it does not know."""
    want = facet.FacetCalculator(build(), "cpu").get_forces(TRICLINIC)
    facet.save(build(), tmp_path / "model.pt")
    before = torch.get_rng_state()
    for model in (build(), tmp_path / "model.pt"):
        with mode():
            calculator = facet.FacetCalculator(model, "cpu")
            same("forces", calculator.get_forces(TRICLINIC), want, "exact")
            same("forces again", calculator.get_forces(rotated(TRICLINIC, GENERIC)) @ GENERIC,
                 want, "float32")
    same("state of the random numbers", torch.get_rng_state(), before, "exact")
    with pytest.raises(TypeError, match="dtyp"):
        facet.FacetCalculator(build(), dtyp=torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_results_are_float64_whatever_the_dtype(dtype):
    calculator = facet.FacetCalculator(build(), "cpu", dtype)
    calculator.calculate(TRICLINIC)
    results, = facet.evaluate(build(dtype), [facet.find_neighbours(TRICLINIC, CONFIG)])
    assert calculator.model.readout.dtype == dtype
    for found in (calculator.results, results):
        assert found.keys() == {"energy", "free_energy", "energies", "forces", "stress"}
        for name, values in found.items():
            assert np.asarray(values).dtype == np.float64, name


def test_calculator_and_model_survive_pickle_and_deepcopy():
    """What comes back is the same, and apart from the original."""
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    want = calculator.get_forces(TRICLINIC)
    for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        other, model = again(calculator), again(build())
        assert model.config == CONFIG and other.model.config == CONFIG
        same("forces of the model", outputs(model, TRICLINIC)["forces"], want, "exact")
        other.reset()
        same("forces", other.get_forces(TRICLINIC), want, "exact")
        with torch.no_grad():
            other.model.readout.zero_()
            model.readout.zero_()
        other.reset()
        differ("forces of a changed copy", other.get_forces(TRICLINIC), want)
    calculator.reset()
    same("forces afterwards", calculator.get_forces(TRICLINIC), want, "exact")
    same("forces of the model", outputs(build(), TRICLINIC)["forces"], want, "exact")


def test_threads_do_not_disturb_each_other():
    """One model, and one calculator for each thread."""
    several = [TRICLINIC, SMALL, PINNED["skewed"], PINNED["molecule"]] * 6
    want = [outputs(build(), atoms)["forces"] for atoms in several]

    def by_model(atoms):
        result, = facet.evaluate(build(), [facet.find_neighbours(atoms, CONFIG)])
        return result["forces"]

    def by_calculator(atoms):
        return facet.FacetCalculator(build(), "cpu", torch.float64).get_forces(atoms)
    build()
    with ThreadPoolExecutor(2) as threads:
        for function in (by_model, by_calculator):
            for wanted, found in zip(want, threads.map(function, several), strict=True):
                same("forces", found, wanted, "exact")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.parametrize("method", ("fork", "spawn"))
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_calculator_works_in_another_process(method):
    """Sent there, after it was used here."""
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    want = calculator.get_forces(TRICLINIC)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        found = processes.submit(calculator.get_forces, rotated(TRICLINIC, GENERIC)).result(60)
    same("forces", found @ GENERIC, want)


@pytest.mark.parametrize("name", ("a.extxyz", "a.traj", "a.json", "a.db"))
def test_results_are_the_same_after_writing_and_reading(name, tmp_path):
    """A crystal and a molecule, for which there is no stress."""
    for n, atoms in enumerate((TRICLINIC, PINNED["molecule"])):
        atoms = atoms.copy()
        atoms.calc = facet.FacetCalculator(build(), "cpu")
        atoms.get_forces()
        want = {**atoms.calc.results}

        ase.io.write(tmp_path / f"{n}{name}", atoms)
        read = ase.io.read(tmp_path / f"{n}{name}")
        assert str(read.symbols) == str(atoms.symbols) and (read.pbc == atoms.pbc).all()
        same("energy", read.get_potential_energy(), want["energy"], "text file")
        same("forces", read.get_forces(), want["forces"], "text file")
        if n == 0:
            same("stress", read.get_stress(), want["stress"], "text file")
        else:
            assert "stress" not in read.calc.results


@pytest.mark.parametrize("message, change", (
    ("there are no atoms", lambda atoms: atoms.__delitem__(slice(None))),
    ("a position or a cell vector is NaN", lambda atoms: atoms.positions.__setitem__(2, np.nan)),
    ("element Xe is not among", lambda atoms: atoms.symbols.__setitem__(1, "Xe")),
))
def test_calculator_refuses_a_broken_crystal_every_time(message, change):
    """In one sentence, also when asked again: no result of before is left."""
    atoms = TRICLINIC.copy()
    atoms.calc = facet.FacetCalculator(build(), "cpu")
    atoms.get_forces()
    change(atoms)
    for ask in (atoms.get_potential_energy, atoms.get_forces, atoms.get_forces):
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", (
    lambda atoms: atoms.symbols.__setitem__(0, "Cu"), lambda atoms: atoms.set_pbc(False),
    lambda atoms: atoms.positions.__setitem__((0, 2), 0.3),
    lambda atoms: atoms.cell.__setitem__((1, 1), 4.2),
), ids=("species", "pbc", "positions", "cell"))
def test_calculator_notices_what_is_changed_in_place(change):
    atoms = TRICLINIC.copy()
    atoms.calc = facet.FacetCalculator(build(), "cpu", torch.float64)
    before = atoms.get_forces()
    change(atoms)
    differ("forces", atoms.get_forces(), before)
    same("forces", atoms.get_forces(), outputs(build(), atoms)["forces"], "exact")


def test_calculator_calculates_when_and_what_ase_expects():
    """Everything at once, once, and only if it is allowed; results are handed out as copies."""
    atoms = TRICLINIC.copy()
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    assert calculator.calculation_required(atoms, ["energy"])
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None
    with mock.patch.object(facet, "evaluate", wraps=facet.evaluate) as evaluated:
        found = {name: calculator.get_property(name, atoms)
                 for name in calculator.implemented_properties}
        assert len(evaluated.mock_calls) == 1
        for name, wanted in outputs(build(), atoms).items():
            if name in ("energies", "forces"):
                same(name, found[name], wanted, "exact")
        assert not calculator.calculation_required(atoms, ["energy", "forces", "stress"])
        found["forces"][:] = 0
        differ("forces after their copy was changed", calculator.get_forces(atoms), found["forces"])
        assert len(evaluated.mock_calls) == 1
        atoms.positions[0] += 0.1
        assert calculator.calculation_required(atoms, ["energy"])
        assert calculator.get_property("forces", atoms, allow_calculation=False) is None
        calculator.get_property("stress", atoms)
        assert len(evaluated.mock_calls) == 2
    for name in ("magmom", "charges", "dipole"):
        with pytest.raises(PropertyNotImplementedError):
            calculator.get_property(name, atoms)


@pytest.mark.parametrize("batch_atoms", (1, 12, 1000))
def test_evaluate_keeps_the_order_whatever_the_batches(batch_atoms):
    """Those of a batch are alike, not adjacent. Stress only where there is a volume."""
    several = [*PINNED.values()]
    neighbours = [facet.find_neighbours(atoms, CONFIG) for atoms in several]
    with mock.patch.object(facet, "make_batch", wraps=facet.make_batch) as made:
        found = facet.evaluate(build(), neighbours, batch_atoms)
    sizes = [sum(len(crystal.species) for crystal in call.args[0]) for call in made.mock_calls]
    largest_crystal = max(len(atoms) for atoms in several)
    assert max(sizes) < batch_atoms + largest_crystal, "memory is not bounded"
    assert len(sizes) <= 1 + 2 * sum(sizes) // batch_atoms, "batches are not full"
    for atoms, got in zip(several, found, strict=True):
        want = outputs(build(), atoms)
        for name in ("energy", "free_energy", "energies", "forces"):
            wanted = want[name.removeprefix("free_")]
            same(name, got[name], wanted[0] if "energy" in name else wanted)
        assert ("stress" in got) == np.isfinite(want["stress"]).all()
        if "stress" in got:
            same("stress", got["stress"], want["stress"][0][VOIGT])
    differ("energies of two crystals", found[0]["energy"], found[-1]["energy"])
    assert facet.evaluate(build(), []) == []


class Charged(facet.Facet):
    """A student's model that says two more things of each atom, and has dropout."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__(config, dtype)
        self.dropout = torch.nn.Dropout(0.5)

    def atomic_outputs(self, batch):
        out = super().atomic_outputs(batch)
        near = torch.exp(-batch.vectors.square().sum(-1))  # [N, K]
        out["charges"] = self.dropout(1 + near.sum(1))  # [N]
        out["my_dipole"] = (batch.vectors * near[..., None]).sum(1)  # [N, 3]
        return out


def test_new_outputs_reach_the_calculator_split_by_crystal(tmp_path):
    model = Charged(CONFIG, torch.float64)
    model.load_state_dict(build().state_dict())
    several = [TRICLINIC, PINNED["molecule"], SMALL]
    found = facet.evaluate(model.eval(), [facet.find_neighbours(a, CONFIG) for a in several])
    for atoms, result in zip(several, found, strict=True):
        atoms, want = atoms.copy(), outputs(model, atoms)
        atoms.calc = facet.FacetCalculator(model, "cpu", torch.float64)
        same("energy", atoms.get_potential_energy(), want["energy"][0], "exact")
        for name, shape in (("charges", (len(atoms),)), ("my_dipole", (len(atoms), 3))):
            for values in (result[name], atoms.calc.results[name]):
                assert values.shape == shape and values.dtype == np.float64
            same(name, atoms.calc.results[name], want[name], "exact")
        same("charges in the batch", result["charges"], want["charges"])
        same("energy, as without them", outputs(build(), atoms)["energy"], want["energy"], "exact")

        # Files and dynamics take the known ones and do not mind the others.
        for name in ("a.extxyz", "a.traj"):
            ase.io.write(tmp_path / name, atoms)
            read = ase.io.read(tmp_path / name)
            same("energy read", read.get_potential_energy(), want["energy"][0], "float32")
    differ("charges of two atoms", found[0]["charges"][0], found[0]["charges"][1])


def test_calculator_and_load_are_in_eval_mode(tmp_path):
    """A student's dropout is off; control: in training it is on."""
    model = Charged(CONFIG, torch.float64).train()
    batch = batch_of(model, TRICLINIC)
    differ("charges with dropout", model(batch)["charges"], model(batch)["charges"])
    calculator = facet.FacetCalculator(model, "cpu")
    assert not any(part.training for part in calculator.model.modules())
    assert model.training, "the model itself stays as it was"
    facet.save(build(), tmp_path / "model.pt")
    assert not any(part.training for part in facet.load(tmp_path / "model.pt").modules())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_outputs_have_their_shapes_and_dtypes(dtype):
    model = build(dtype)
    shapes = {"energy": (2,), "energies": (7,), "forces": (7, 3), "virial": (2, 3, 3),
              "stress": (2, 3, 3)}
    batch = batch_of(model, TRICLINIC, SMALL)
    out = model(batch)
    assert not batch.vectors.requires_grad, "the batch was changed"
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == shapes
    assert out["energy"].dtype == out["energies"].dtype == torch.float64
    assert out["forces"].dtype == out["stress"].dtype == out["virial"].dtype == dtype
    assert {tensor.device for tensor in out.values()} == {model.readout.device}
    assert not any(tensor.requires_grad for tensor in out.values())
    out = model(batch_of(model, TRICLINIC, SMALL), differentiable=True)
    assert all(tensor.requires_grad for tensor in out.values())
    same("energy, float32", outputs(build(torch.float32), SMALL)["energy"],
         outputs(build(), SMALL)["energy"], "float32")


@pytest.mark.parametrize("message, change", (
    ("chemical symbols", {"species": ("Si", "Qq", "Cu")}), ("chemical symbols", {"species": ()}),
    ("chemical symbols", {"species": ("Si", "Si", "Cu")}),
    ("multiple of groups", {"channels": 7}), ("multiple of groups", {"channels": 0}),
    ("activation", {"activation": "relu"}), ("at least", {"layers": 0}),
    ("at least", {"groups": 0}), ("at least", {"degree": -1}), ("at least", {"splines": 3}),
    ("at least", {"grid_degree": -1}), ("no Lebedev rule", {"grid_degree": 132}),
    ("first_knot", {"first_knot": 3.5}), ("first_knot", {"cutoff": -1.0}),
    ("first_knot", {"first_knot": -0.1}), ("mean_neighbours", {"mean_neighbours": 0.0}),
    ("one number per species", {"reference_energies": (1.0,)}),
    ("one number per species", {"core": (1.0, 1.0)}),
    ("half the cutoff", {"core": (1.0, 1.0, 1.8)}), ("half the cutoff", {"core": (1.0, -0.1, 1.0)}),
    ("must be a tuple of items", {"species": "SiO"}), ("must be of type int", {"channels": 6.5}),
    ("must be of type float", {"cutoff": np.nan}), ("must be finite", {"cutoff": np.inf}),
    ("must be finite", {"energy_scale": np.inf}), ("must be finite", {"core": (1.0, np.nan, 1.0)}),
    ("must be finite", {"reference_energies": (1.0, np.nan, 1.0)}),
    ("must be finite", {"mean_neighbours": np.inf}), ("must be finite", {"cutoff": -np.inf}),
    ("must be finite", {"core": (None, 1.0, 1.0)}),
    ("could not convert string to float", {"reference_energies": ("a", "b", "c")}),
    ("first_knot", {"first_knot": np.inf}), ("first_knot", {"cutoff": 0.0}),
    ("mean_neighbours", {"mean_neighbours": -3.0}), ("multiple of groups", {"channels": -6}),
    ("energy_scale", {"energy_scale": 0.0}), ("energy_scale", {"energy_scale": -1.0}),
    ("at least", {"layers": -2}), ("one number per species", {"core": (1.0,) * 4}),
    ("core must be a tuple of items, not 1.0", {"core": 1.0}),
    ("reference_energies must be a tuple of items, not '12'", {"reference_energies": "12"}),
    ("species must be a tuple of items", {"species": (("Si", "O"), ("Cu", "H"))}),
    ("species must be a tuple of items", {"species": None}),
    ("chemical symbols", {"species": (14, 8, 29)}), ("chemical symbols", {"species": ("X", "Si")}),
    ("channels must be of type int, not inf", {"channels": np.inf}),
    ("layers must be of type int, not nan", {"layers": np.nan}),
    ("groups must be of type int, not '3'", {"groups": "3"}),
    ("degree must be of type int, not None", {"degree": None}),
    ("cutoff must be of type float, not", {"cutoff": (5.0, 6.0)}),
    ("energy_scale must be of type float, not nan", {"energy_scale": np.nan}),
    ("activation must be of type str, not 3", {"activation": 3}),
    *[("half the cutoff", {"core": tuple(np.roll((1.8, 1.0, 1.0), n))}) for n in range(3)],
    *[("half the cutoff", {"core": tuple(np.roll((-0.1, 1.0, 1.0), n))}) for n in range(3)],
), ids=str)
def test_config_refuses_what_cannot_be_built(message, change):
    with pytest.raises(ValueError, match=message) as error:
        facet.Facet(replace(CONFIG, **change))
    assert "\n" not in str(error.value)


def test_config_takes_numpy_numbers_and_stays_plain(tmp_path):
    config = replace(CONFIG, cutoff=np.float32(4), channels=np.int64(6),
                     reference_energies=np.array([1.0, 2, 3]), species=np.array(["Si", "O", "Cu"]))
    assert type(config.cutoff) is float and type(config.channels) is int
    assert config.reference_energies == (1.0, 2.0, 3.0) and config.species == CONFIG.species
    facet.save(facet.Facet(config), tmp_path / "model.pt")
    assert facet.load(tmp_path / "model.pt").config == config


def test_import_leaves_global_state_alone():
    """Of facet.py, and of this file: tools import it for its properties."""
    state = ("(torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), "
             "torch.is_grad_enabled(), torch.get_float32_matmul_precision(), "
             "torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(), numpy.geterr(), "
             "numpy.get_printoptions())")
    code = (f"import numpy, torch\nnumpy.random.seed(1)\nbefore = {state}\nimport facet\n"
            f"assert before == {state}\nimport test_facet\nassert before == {state}")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype, tol", ((torch.float64, "rounding"), (torch.float32, "float32")),
                         ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuda_gives_the_numbers_of_the_cpu(name, dtype, tol):
    several = TRICLINIC, PINNED["skewed"], PINNED["isolated atom"]
    want = outputs(build(**MODELS[name]), *several)
    model = copy.deepcopy(build(dtype, **MODELS[name])).cuda()
    for what, found in outputs(model, *several).items():
        same(what, found, want[what], tol)


# ─── Part 3: planted bugs ────────────────────────────────────────────────────────────────────────
#
# Each takes the right function or method, and its arguments, and does something that looks right.

PLANTED = {}  # name: (function or method of facet.py, what is put in its place, row that notices)


def planted(target: str, row: str):
    def keep(wrong):
        PLANTED[wrong.__name__] = (target, wrong, row)
        return wrong
    return keep


@contextmanager
def with_bug(name: str):
    """facet.py with one bug, and no model that was built without it."""
    target, wrong, _ = PLANTED[name]
    owner = facet
    *path, attribute = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    right = getattr(owner, attribute)

    def call(*arguments, **keywords):
        return wrong(right, *arguments, **keywords)
    static = isinstance(vars(owner)[attribute], staticmethod)
    with mock.patch.object(owner, attribute, staticmethod(call) if static else call):
        build.cache_clear()
        try:
            yield
        finally:
            build.cache_clear()


@planted("Facet.forward", "slope of the energy")
def src_and_dst_swapped_in_the_forces(right, self, *arguments, **keywords):
    out = right(self, *arguments, **keywords)
    return {**out, "forces": -out["forces"]}


@planted("Facet.forward", "slope of the energy")
def sign_of_the_stress(right, self, *arguments, **keywords):
    out = right(self, *arguments, **keywords)
    return {**out, "virial": -out["virial"], "stress": -out["stress"]}


@planted("find_neighbours", "another cell of the lattice")
def volume_with_a_sign(right, atoms, config):
    return right(atoms, config)._replace(volume=np.linalg.det(atoms.cell.array))


@planted("harmonics", "equals reference_numpy.py")
def lost_root_of_2l_plus_1(right, unit, L):
    return right(unit, L) / (2 * facet.degree_of_row(L) + 1).sqrt()


@planted("harmonics", "rotation")
def lost_root_of_two(right, unit, L):
    Y = right(unit, L).clone()
    for l in range(L + 1):
        Y[..., l * l + l] *= 2 ** 0.5  # m = 0, as if the others had lost it
    return Y


@planted("RadialSplines.__init__", "jump at the cutoff")
def spline_that_ends_behind_the_cutoff(right, self, count, config):
    right(self, count, config)
    self.spacing = (config.cutoff - config.first_knot) / (config.splines - 1)


@planted("RadialSplines.basis", "equals reference_numpy.py")
def wrong_piece_of_the_spline(right, self, r):
    """Four cubes make a B-spline: (2 − |t|)³ − 4 (1 − |t|)³, over 6."""
    k = torch.arange(-1, len(self.coefficients) - 1)
    t = ((r[..., None] - self.first_knot) / self.spacing - k).abs()
    return ((2 - t).clamp(min=0) ** 3 - 3 * (1 - t).clamp(min=0) ** 3) / 6


@planted("Linear.forward", "rotation")
def bias_on_every_degree(right, self, x):
    return right(self, x) + 0.1


@planted("neighbour_list", "equals reference_numpy.py")
def shift_with_the_wrong_sign(right, positions, cell, pbc, cutoff):
    dst, src, shift, vectors = right(positions, cell, pbc, cutoff)
    return dst, src, shift, vectors - 2 * shift @ np.asarray(cell)


@planted("neighbour_list", "equals reference_numpy.py")
def columns_as_lattice_vectors(right, positions, cell, pbc, cutoff):
    return right(positions, np.asarray(cell).T, pbc, cutoff)


@planted("neighbour_list", "supercell")
def own_images_dropped(right, positions, cell, pbc, cutoff):
    edges = right(positions, cell, pbc, cutoff)
    kept = edges[0] != edges[1]
    return tuple(array[kept] for array in edges)


@planted("neighbour_list", "atoms folded or not")
def too_few_images(right, positions, cell, pbc, cutoff):
    edges = right(positions, cell, pbc, cutoff)
    kept = (np.abs(edges[2]) <= 1).all(1)
    return tuple(array[kept] for array in edges)


@planted("Density.__init__", "reflection")
def odd_parity_coupling_let_in(right, self, l_in, l_out, config):
    """l = 1 × l = 1 → l = 1 is the cross product."""
    paths, gaunt = facet.paths, facet.gaunt
    cross = torch.linalg.cross(torch.eye(3)[:, None], torch.eye(3)[None], dim=-1).double()
    odd = [(1, 1, 1)] if min(l_in, l_out, config.degree) >= 1 else []
    with mock.patch.object(facet, "paths", lambda *ls: paths(*ls) + odd), mock.patch.object(
            facet, "gaunt", lambda *ls: cross if ls == (1, 1, 1) else gaunt(*ls)):
        right(self, l_in, l_out, config)


@planted("Density.forward", "jump at the cutoff")
def mean_over_the_actual_neighbours(right, self, h, index, phi, Y):
    count = phi[:, 0, 0].ne(0).sum(1).clamp(min=1)  # [N]
    return right(self, h, index, phi / count[:, None, None, None], Y)


@planted("Density.forward", "empty places")
def mean_over_the_padded_neighbours(right, self, h, index, phi, Y):
    return right(self, h, index, phi / phi.shape[-1], Y)


@planted("make_batch", "alone or in a batch")
def padding_inside_the_cutoff(right, crystals, cutoff, dtype=torch.float32):
    return right(crystals, cutoff / 4, dtype)


@planted("make_batch", "alone or in a batch")
def neighbours_in_another_crystal(right, crystals, cutoff, dtype=torch.float32):
    batch = right(crystals, cutoff, dtype)
    first = torch.searchsorted(batch.crystal, batch.crystal)  # where the atom's crystal begins
    return batch._replace(src=batch.src - first[:, None])


@planted("Facet.forward", "alone or in a batch")
def energies_to_another_crystal(right, self, batch, *arguments, **keywords):
    return right(self, batch._replace(crystal=batch.crystal.flip(0)), *arguments, **keywords)


@planted("GridLayer.__init__", "rotation")
def grid_too_coarse(right, self, L, exact_degree):
    right(self, L, min(exact_degree, 2 * L))


@planted("ProductGrid.forward", "rotation")
def gate_from_degree_one(right, self, x):
    gate = torch.sigmoid(x[:, x.shape[1] // 3])[:, None]
    return x + (right(self, x) - x) * gate


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_counted_twice(right, self, *arguments):
    return 2 * right(self, *arguments)


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_of_the_wrong_neighbour(right, self, r, species, src):
    itself = torch.arange(len(src))[:, None].expand_as(src)
    return right(self, r, species, itself)


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_with_a_kink(right, self, r, species, src):
    """(1 − (r/reach)⁶) instead of its cube, neighbour by neighbour."""
    energy = 0.0
    for k in range(src.shape[1]):
        reach = self.core[species] + self.core[species[src[:, k]]]
        factor = (1 - (r[:, k] / reach) ** 6).clamp(min=1e-3)
        energy = energy + right(self, r[:, k:k + 1], species, src[:, k:k + 1]) / factor ** 2
    return energy


@planted("Facet.atomic_outputs", "isolated atom")
def reference_energy_forgotten(right, self, batch):
    out = right(self, batch)
    E0 = batch.volume.new_tensor(self.config.reference_energies)
    return {**out, "energies": out["energies"] - E0[batch.species]}


@planted("kinship", "equals reference_numpy.py")
def elements_are_strangers(right, symbols):
    return right(symbols) * torch.eye(len(symbols), dtype=torch.float64)


@planted("Skip.forward", "equals reference_numpy.py")
def skip_connection_blind_to_species(right, self, h, species):
    return right(self, h, 0 * species)


@planted("Density.forward", "equals reference_numpy.py")
def groups_mixed_up(right, self, h, index, phi, Y):
    return right(self, h, index, phi.flip(1), Y)


@planted("NeighbourGrad.backward", "gradients for weights, product")
def wrong_second_derivative(right, *arguments):
    A, phi, Y, h, *rest = right(*arguments)
    return A, phi, Y, -h, *rest


@planted("chunks", "supercell")
def last_atom_of_a_chunk_lost(right, *arguments):
    return [slice(atoms.start, atoms.stop - 1) for atoms in right(*arguments)]


def count_bugs() -> int:
    """`python test_facet.py --bugs`: how many planted bugs the table notices, and by which rows."""
    caught = 0
    for name in PLANTED:
        with with_bug(name):
            wrong = guard()
        caught += len(wrong) > 0
        print(f"{name:36} {', '.join(row.name for row in wrong) or 'NOT CAUGHT'}", flush=True)
    print(f"{caught} of {len(PLANTED)} planted bugs are caught")
    return int(caught < len(PLANTED))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug):
    """The row that the bug names is right without it, and wrong with it."""
    row = PLANTED[bug][2]
    assert not row_without_bugs(row).wrong
    with with_bug(bug):
        caught = guard_row(row)
    print(f"\n{bug}: {line(caught)}")
    assert caught.wrong, f"{row} does not notice"


@cache
def row_without_bugs(row: str) -> Row:
    return guard_row(row)


def test_table_has_no_wrong_row():
    assert not guard()


if __name__ == "__main__":
    sys.exit(main())
