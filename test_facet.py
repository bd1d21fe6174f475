"""The properties of an interatomic potential, as functions for any ASE calculator, and the tests.

    python test_facet.py                                        is everything right? 15 s
    python test_facet.py --calculator runs/si/model.pt          a trained model
    python test_facet.py --calculator ase.calculators.emt:EMT   any calculator: module:callable,
        --calculator chgnet.model:CHGNetCalculator use_device=cpu --atoms crystal.cif
    python test_facet.py --bugs                                 the planted bugs, and what notices

    pytest                          profile "ci": the same examples every time
    pytest -k rotation              also reflection, permutation, forces, stress, cutoff, neighbour …
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
import csv
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
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
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
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
import train_small

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
    "slope": 1e-6,           # central differences; a third derivative may jump at a knot of a spline
    "cutoff": 1e-4,          # what is left 1e-3 Å inside; a jump would be at least 1e-2
    "silu grid": 1e-8,       # SiLU is no polynomial: what the largest rule leaves, three layers
    "silu": 0.05,            # and what the default rule leaves
    "drift": 0.02,           # total energy in a short NVE, over the kinetic energy at the start
    "float32": 1e-4,         # 7 digits; layers and sums over neighbours cost one or two of them
    "float32 slope": 2e-2,   # a step of 0.01 Å, so that seven digits of energy make a slope
    "float32 cutoff": 1e-2,  # what is left where seven digits begin to see the neighbour
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
    """An atom of each element, alone in a large cell, has the energy `expected` ({symbol: eV};
    without, the same in two cells), no forces, no stress. Units as `of`."""
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
    directions = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)  # [300, 3]
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


def one_for_each(function):
    """A property with a number for energy, forces and stress → a function that gives all three."""
    def errors(calculator, atoms, **more):
        found = []
        for name in ALL:
            try:
                found.append(function(calculator, atoms, of=name, **more))
            except (PropertyNotImplementedError, NotImplementedError):
                found.append(None)
        return tuple(found)
    return errors


def slopes(calculator, atoms, **more):
    found = [None, force_slope(calculator, atoms, **more)]
    try:
        found.append(stress_slope(calculator, atoms, **more))
    except (PropertyNotImplementedError, NotImplementedError, ValueError):  # no stress, no volume
        found.append(None)
    return tuple(found)


def jumps(calculator, atoms, **more):
    return (cutoff_continuity(calculator, atoms, "energy", **more),
            cutoff_continuity(calculator, atoms, "forces", **more), None)


def free_atoms(calculator, atoms):
    expected = None
    if isinstance(calculator, facet.FacetCalculator):
        config = calculator.model.config
        expected = dict(zip(config.species, config.reference_energies or [0.0] * 99, strict=False))
    return one_for_each(partial(isolated_atom, expected=expected))(calculator, atoms)


def short_dynamics(calculator, atoms):
    return (conservation_error(calculator, atoms, steps=50, femtoseconds=0.5), None, None)


PROPERTIES = {  # name: (errors of a calculator and a crystal, tolerance)
    "rotation": (one_for_each(rotation), "rounding"),
    "reflection": (one_for_each(reflection), "rounding"),
    "translation": (one_for_each(translation), "rounding"),
    "permutation": (one_for_each(permutation), "rounding"),
    "another cell of the lattice": (one_for_each(other_cell), "rounding"),
    "supercell": (one_for_each(supercell), "rounding"),
    "atoms folded or not": (one_for_each(folding), "rounding"),
    "alone or in a batch": (one_for_each(alone_or_in_a_batch), "rounding"),
    "slope of the energy": (slopes, "slope"),
    "jump at the cutoff": (jumps, "cutoff"),
    "isolated atom": (free_atoms, "rounding"),
    "conservation, part of kinetic": (short_dynamics, "drift"),
}


def property_row(name: str, calculator, atoms: Atoms, precision: str = "float64") -> Row:
    """One line of the table. What a calculator cannot do is noted; Facet has to do everything."""
    errors, tolerance = PROPERTIES[name]
    more = {}
    if precision == "float32":
        more = {"slope": {"step": 0.01}, "cutoff": {"noise": 1e-5}}.get(tolerance, {})
        tolerance = {"rounding": "float32", "slope": "float32 slope",
                     "cutoff": "float32 cutoff"}.get(tolerance, tolerance)
    ours = isinstance(calculator, facet.FacetCalculator)
    if ours and calculator.model.config.activation == "silu" and name in ("rotation", "reflection"):
        tolerance = "silu"
    try:
        size = 1.0
        if tolerance != "drift":
            size = max(1.0, float(np.abs(value(calculator, atoms, "forces")).max()))
        return Row(name, errors(calculator, atoms, **more), TOL[tolerance] * size)
    except NotApplicable as reason:
        return Row(name, (None, None, None), 0.0, f"not applicable: {reason}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}".split("\n")[0][:60]
        return Row(name, (None, None, None), -1.0 if ours else 0.0, text)


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
        densities = [largest(a.reshape(b.shape), b)[0]
                     for a, b in zip(found[t, "density"], want["A"][t], strict=True)]
        steps[f"layer {t} density"] = max(densities)
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
    return Row("equals reference_numpy.py", (max(steps.values()), None, None), TOL["rounding"], note)


def weight_row(activation: str) -> Row:
    model = copy.deepcopy(build(activation=activation, core=WIDE_CORE))
    batch = batch_of(model, TRICLINIC, SMALL)
    errors = tuple(weight_slope(model, batch, of) for of in ("energy", "forces", "virial"))
    return Row(f"gradients for weights, {activation}", errors, TOL["slope"])


def empty_row() -> Row:
    error = empty_places(build(**GUARD), TRICLINIC)
    return Row("empty places", (None, error, None), TOL["rounding"])


PARTS = {  # rows about Facet's own parts
    "reference": ladder_row,
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
        text = f"{type(error).__name__}: {error}".split("\n")[0][:60]
        return Row(name, (None, None, None), -1.0, text)


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
    if not row.wrong and all(error is None for error in row.errors):
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
        try:
            return [(f"{spec}, {name}", facet.FacetCalculator(spec, dtype=getattr(torch, name)), name)
                    for name in ([dtype] if dtype else ["float64", "float32"])]
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None

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
        text = str(error).split("\n")[0]
        raise SystemExit(f"error: {spec} cannot be made: {type(error).__name__}: {text}") from None
    if not hasattr(calculator, "get_property"):
        raise SystemExit(f"error: {spec} makes no ASE calculator")
    return [(f"{spec}, limits of {dtype or 'float32'}", calculator, dtype or "float32")]


def check_calculator(words: list[str], dtype: str, file: str, species: list[str]) -> int:
    """`python test_facet.py --calculator …`; returns how many rows are wrong."""
    wrong = 0
    for title, calculator, precision in given_calculator(words, dtype):
        known = calculator.model.config.species if hasattr(calculator, "model") and isinstance(
            calculator, facet.FacetCalculator) else ("Cu", "Al")
        try:
            atoms = ase.io.read(file) if file else random_crystal(species or known)
            value(calculator, atoms, "energy")
        except Exception as error:
            text = str(error).split("\n")[0]
            where = file or f"a crystal of {' '.join(species or known)} (try --species or --atoms)"
            raise SystemExit(f"error: no energy of {where}: {type(error).__name__}: {text}") from None
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
    parser.add_argument("--atoms", default="", help="file with the crystal; default: a built-in one")
    parser.add_argument("--species", nargs="+", default=[], help="elements of the built-in crystal")
    parser.add_argument("--dtype", default="", choices=["float32", "float64"],
                        help="precision of the calculator, default: both of a checkpoint; float32")
    parser.add_argument("--bugs", action="store_true", help="count the planted bugs that are caught")
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
    batch = facet.make_batch(neighbours, model.config.cutoff, model.readout.dtype)
    return batch.to(model.readout.device)


def outputs(model, *crystals: Atoms) -> dict[str, np.ndarray]:
    """What the model says of a batch, as NumPy."""
    out = model(batch_of(model, *crystals))
    return {name: tensor.cpu().numpy() for name, tensor in out.items()}


def features(model, atoms: Atoms) -> dict:
    """What the parts of every layer put out: (t, part) → [N, M, C]; for a density a list."""
    found, hooks = {}, []
    for t, layer in enumerate(model.layers):
        for part in ("density", "mix", "skip", "grid"):
            def keep(module, inputs, output, key=(t, part)):
                if key[1] == "density":
                    found[key] = [a.detach() for a in output]
                else:
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


@planted("harmonics", "reference")
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


@planted("RadialSplines.basis", "reference")
def wrong_piece_of_the_spline(right, self, r):
    """Four cubes make a B-spline: (2 − |t|)³ − 4 (1 − |t|)³, over 6."""
    k = torch.arange(-1, len(self.coefficients) - 1)
    t = ((r[..., None] - self.first_knot) / self.spacing - k).abs()
    return ((2 - t).clamp(min=0) ** 3 - 3 * (1 - t).clamp(min=0) ** 3) / 6


@planted("Linear.forward", "rotation")
def bias_on_every_degree(right, self, x):
    return right(self, x) + 0.1


@planted("neighbour_list", "reference")
def shift_with_the_wrong_sign(right, positions, cell, pbc, cutoff):
    dst, src, shift, vectors = right(positions, cell, pbc, cutoff)
    return dst, src, shift, vectors - 2 * shift @ np.asarray(cell)


@planted("neighbour_list", "reference")
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


@planted("Repulsion.forward", "reference")
def core_counted_twice(right, self, *arguments):
    return 2 * right(self, *arguments)


@planted("Repulsion.forward", "reference")
def core_of_the_wrong_neighbour(right, self, r, species, src):
    itself = torch.arange(len(src))[:, None].expand_as(src)
    return right(self, r, species, itself)


@planted("Repulsion.forward", "reference")
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


@planted("Skip.forward", "reference")
def skip_connection_blind_to_species(right, self, h, species):
    return right(self, h, 0 * species)


@planted("Density.forward", "reference")
def groups_mixed_up(right, self, h, index, phi, Y):
    return right(self, h, index, phi.flip(1), Y)


@planted("NeighbourDot.backward", "gradients for weights, product")
def wrong_second_derivative(right, *arguments):
    edge, h, *rest = right(*arguments)
    return edge, -h, *rest


@planted("chunks", "supercell")
def last_row_of_a_chunk_lost(right, *arguments):
    return [slice(rows.start, rows.stop - 1) for rows in right(*arguments)]


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
