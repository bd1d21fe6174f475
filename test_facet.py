"""Tests of facet.py and train_small.py with pytest and hypothesis; models in float64, every weight random, none zero.

    pytest                          profile "ci": the same examples every time
    FACET_PROFILE=fast pytest       a few examples; FACET_PROFILE=deep: many, and new ones every time
    pytest -s -k ladder             prints the largest difference to reference_numpy.py, stage by stage

Each test is named after the mistake it would catch. Every comparison goes through `same`, or for a control through
`differ`; every tolerance stands in TOL with its reason. The planted bugs at the end change a line of facet.py and
require that a named test, or a check that tests share, then fails: so the tests can fail, and each such line matters.
"""
import ast
import copy
import csv
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations_with_replacement, product
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
import ase.build
import ase.io
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.data import chemical_symbols
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.linalg import logm
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y
from sympy.physics.wigner import real_gaunt

import facet
import reference_numpy
import train_small

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the models are tiny: a second thread would only wait

common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fast", max_examples=4, derandomize=True, **common)
settings.register_profile("ci", max_examples=25, derandomize=True, **common)
settings.register_profile("deep", max_examples=300, **common)
settings.load_profile(os.environ.get("FACET_PROFILE", "ci"))

TOL = {  # largest allowed difference, in units of the largest wanted value (of 1, if that is smaller)
    "exact": 0,             # the same numbers, to the last bit
    "rounding": 1e-10,      # the same sums in another order, float64, through three layers
    "formula": 1e-12,       # one formula against another, float64, no layers in between
    "differences": 1e-6,    # central differences; a third derivative may jump at a knot of a spline
    "float32": 1e-5,        # float32 has 7 digits, the layers and the sums over neighbours cost one or two of them
    "silu grid": 1e-8,      # SiLU is no polynomial: what the largest rule leaves of the error, through three layers
    "cutoff": 1e-4,         # 1e-6 Å inside, the curvature has not quite gone; a jump would be at least 1e-2
    "relaxation": 1e-8,     # some fifty steps of FIRE multiply the rounding; float64
    "bfloat16": 5e-3,       # Muon turns its steps into rotations in bfloat16: what rounding does to them in 20 steps
    "drift": 3e-3,          # total energy in 100 Verlet steps of 0.5 fs, over the kinetic energy at the start
    "control": 1e-2,        # what a control must at least differ by
}


def largest(got, want) -> tuple[float, tuple]:
    """Largest difference, in the units of TOL, and where. nan equals only nan (stress without a volume)."""
    got, want = (np.asarray(a.detach().cpu() if isinstance(a, torch.Tensor) else a, float) for a in (got, want))
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    error = np.where(np.isnan(got) & np.isnan(want), 0, np.abs(got - want))
    error = np.where(np.isnan(error), np.inf, error) / max(1, np.nanmax(np.abs(want), initial=0))
    return (error.max(), np.unravel_index(error.argmax(), error.shape)) if error.size else (0.0, ())


def same(what: str, got, want, tol: str = "rounding") -> float:
    error, where = largest(got, want)
    assert error <= TOL[tol], f"{what}: off by {error:.1e} at {(*map(int, where),)}, allowed {TOL[tol]:.0e} ({tol})"
    return error


def differ(what: str, got, want) -> None:
    error, _ = largest(got, want)
    assert error > TOL["control"], f"{what}: differs by only {error:.1e}, so this check proves nothing"


# ─── Models, crystals, rotations ──────────────────────────────────────────────────────────────────────────────────────

CUTOFF = 3.5
CONFIG = facet.Config(species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3, splines=12,
                      mean_neighbours=8.0, energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5))
MODELS = {
    "L=2": {}, "L=1, one layer": dict(degree=1, layers=1), "L=3, first knot": dict(degree=3, first_knot=1.0),
    "L=0": dict(degree=0), "L=4, two layers": dict(degree=4, layers=2, channels=4, groups=4),
    "atoms within the core": dict(core=(1.3, 1.2, 1.1)),
    "silu": dict(activation="silu"), "silu, fine": dict(activation="silu", grid_degree=131),
}


@cache
def build(dtype=torch.float64, seed=0, **changes) -> "facet.Facet":
    """A tiny model, one and the same for the same arguments: copy it before you change it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = facet.Facet(replace(CONFIG, **changes), dtype)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                weights += 0.1 * torch.randn(weights.shape, dtype=torch.float64).to(dtype)
    return model


def batch_of(model, *crystals):
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    return facet.make_batch(neighbours, model.config.cutoff, model.readout.dtype).to(model.readout.device)


def evaluate(model, *crystals) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in model(batch_of(model, *crystals)).items()}


# no multiples of 90° about anything
GENERIC, IMPROPER = Rotation.from_rotvec([[0.4, -1.1, 0.7], [-1.3, 0.2, 0.9]]).as_matrix() * [[[1]], [[-1]]]
TRICLINIC = Atoms("SiOCuSiO", cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]], pbc=True, positions=[
    [0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3], [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]])
HELIX = [(r * np.cos(a + 2 * np.pi / 3 * n), r * np.sin(a + 2 * np.pi / 3 * n), z + 1.6 * n)  # around a 3₁ screw axis
         for r, a, z in ((1.1, 0.0, 0.0), (2.0, 0.6, 0.9)) for n in range(3)]


def with_cell(atoms: Atoms, cell, pbc=True) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions, cell=cell, pbc=pbc)


PINNED = {
    "triclinic": TRICLINIC,
    "left-handed": with_cell(TRICLINIC, TRICLINIC.cell.array[[1, 0, 2]]),
    "slab": with_cell(TRICLINIC, TRICLINIC.cell, (True, True, False)),
    "slab without third vector": with_cell(TRICLINIC, TRICLINIC.cell.array * [[1], [1], [0]], (True, True, False)),
    "wire": with_cell(TRICLINIC, TRICLINIC.cell, (False, True, False)),
    "molecule": with_cell(TRICLINIC, np.zeros((3, 3)), False),
    "far outside the cell": Atoms("SiOCu", [[9.1, -7, 3], [-20, 0.3, 14], [0, 31, 2]], cell=TRICLINIC.cell, pbc=True),
    "isolated atom": Atoms("O", [[0.3, 0.2, 0.1]]),
    "dimer at the cutoff": Atoms("SiO", [[0, 0, 0], [0, 0, CUTOFF]]),
    "collinear": Atoms("SiOCu", np.outer([0, 1, 2.2], [0.6, 1.2, 1.1])),
    "planar": Atoms("SiOCuO", [[0, 0, 0], [1.6, 0.2, 0], [0.4, 1.9, 0], [2.1, 2.2, 0]]),
    "one atom and its images": Atoms("Cu", [[1, 1, 1]], cell=[[2.3, 0.2, 0], [0.1, 2.5, 0], [0.5, 0.4, 2.1]], pbc=True),
    "skewed": Atoms("SiO", [[0, 0, 0], [1, 1.2, 1.1]], cell=[[2.6, 0, 0], [7.3, 2.5, 0], [-5.1, 6.4, 2.4]], pbc=True),
    "chiral": Atoms("Si3O3", HELIX, cell=[[5.2, 0, 0], [-2.6, 2.6 * 3 ** 0.5, 0], [0, 0, 4.8]], pbc=True),
}


@st.composite
def crystals(draw) -> Atoms:
    """1-12 atoms, 0-3 periodic axes (some of the others without a cell vector), any handedness, atoms outside the cell.

    Atoms lie near points of a mesh whose planes are at least 1.7 Å apart, so they and their images keep 1.1 Å by
    construction. Most cells are smaller than the cutoff.
    """
    rng, N = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1))), draw(st.integers(1, 12))
    pbc, no_vector = (np.array(draw(st.tuples(*[st.booleans()] * 3))) for _ in range(2))
    cell = rng.uniform(2.3, 4.5, (3, 1)) * (np.eye(3) + np.tril(rng.uniform(-0.5, 0.5, (3, 3)), -1))
    cell = (cell @ Rotation.random(rng=rng).as_matrix())[draw(st.permutations(range(3)))]  # odd ones are left-handed
    mesh = np.zeros(3, int)
    while mesh.prod() < N:
        cell *= 1.05
        mesh = np.maximum(1, np.floor(1 / np.linalg.norm(np.linalg.inv(cell), axis=0) / 1.7)).astype(int)
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


# ─── Symmetries ───────────────────────────────────────────────────────────────────────────────────────────────────────

def turned(values, R, order=1):
    """Vectors [..., 3] or, of order 2, matrices [..., 3, 3] after the rotation R."""
    return values @ R.T if order == 1 else R @ values @ R.T


def rotated(atoms: Atoms, R) -> Atoms:
    return Atoms(atoms.symbols, turned(atoms.positions, R), cell=turned(atoms.cell.array, R), pbc=atoms.pbc)


def wigner(R, L: int) -> np.ndarray:
    """D with Y(R u) = D Y(u) for every u, by least squares over directions: no formula to get wrong. [M, M]"""
    u = np.random.default_rng(0).normal(size=(300, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    before, after = (facet.harmonics(torch.from_numpy(a), L).numpy() for a in (u, u @ R.T))
    return np.linalg.lstsq(before, after)[0].T


def features(model, atoms: Atoms) -> dict:
    """What the parts of every layer put out: (t, part) → [N, M, C]; for a density the list that Density describes."""
    found, hooks = {}, []
    for t, layer in enumerate(model.layers):
        for part in ("density", "mix", "skip", "grid", ""):  # "" is the layer itself
            def keep(module, inputs, output, key=(t, part)):
                found.setdefault(key, [a.detach() for a in output] if key[1] == "density" else output.detach().numpy()[:len(atoms)])
            hooks.append(layer.get_submodule(part).register_forward_hook(keep))
    evaluate(model, atoms)
    for hook in hooks:
        hook.remove()
    return found


def same_crystal(after: dict, before: dict, R=np.eye(3), order=slice(None), tol="rounding") -> None:
    times = len(after["energies"]) / len(before["energies"])
    same("energy", after["energy"], before["energy"] * times, tol)
    same("energies", after["energies"], before["energies"][order], tol)
    same("forces", after["forces"], turned(before["forces"], R)[order], tol)
    same("stress", after["stress"], turned(before["stress"], R, order=2), tol)
    same("virial", after["virial"], turned(before["virial"], R, order=2) * times, tol)


def check_rotation(atoms, R=GENERIC, tol="rounding", **config):
    """Energy, forces, stress, and the features of every layer."""
    model, other = build(**config), rotated(atoms, R)
    same_crystal(evaluate(model, other), evaluate(model, atoms), R, tol=tol)
    D, before, after = wigner(R, model.config.degree), features(model, atoms), features(model, other)
    for (t, part), x in before.items():
        if part != "density":
            M = x.shape[1]
            same(f"features of layer {t} {part}", after[t, part], np.einsum("ab,nbc->nac", D[:M, :M], x), tol)


@everywhere
def test_orientation_in_space_matters(atoms, R, seed):
    check_rotation(atoms, R)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu"])
@pytest.mark.parametrize("R", (GENERIC, IMPROPER), ids=("proper", "improper"))
def test_equivariance_only_for_the_default_config(name, R):
    check_rotation(TRICLINIC, R, "silu grid" if "silu" in name else "rounding", **MODELS[name])


def described(how: str, atoms: Atoms, rng) -> tuple[Atoms, np.ndarray]:
    """The same crystal described in another way, and which atom of the old description each atom is."""
    other, order, periodic, U = atoms.copy(), np.arange(len(atoms)), np.flatnonzero(atoms.pbc), np.eye(3, dtype=int)
    if how == "moved":
        other.translate(rng.uniform(-20, 20, 3))
    elif how == "in another order":
        order = rng.permutation(len(atoms))
        other = atoms[order]
    elif how == "as a supercell":
        times = np.where(atoms.pbc, rng.permutation([1, 2, 2]), 1)
        other, order = atoms.repeat(times), np.tile(order, times.prod())
    elif how == "in another cell":  # rows mixed by integers, axes turned round, atoms moved by lattice vectors
        for _ in periodic:
            i, j = rng.choice(periodic, 2)
            U[i] += (i != j) * rng.choice([-1, 1]) * U[j]
            U[j] *= rng.choice([-1, 1])
        other.set_cell(U @ atoms.cell.array)
        other.positions += rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc @ atoms.cell.array
    return other, order


@pytest.mark.parametrize("how", ("moved", "in another order", "as a supercell", "in another cell"))
@everywhere
def test_result_depends_on_how_a_crystal_is_described(how, atoms, R, seed):
    other, order = described(how, atoms, np.random.default_rng(seed))
    same_crystal(evaluate(build(), other), evaluate(build(), atoms), order=order)


def check_batch(atoms):
    several = [PINNED["chiral"], atoms, PINNED["isolated atom"], TRICLINIC, atoms]
    together, first = evaluate(build(), *several), 0
    for s, crystal in enumerate(several):
        own = {name: a[s:s + 1] if name in ("energy", "virial", "stress") else a[first:first + len(crystal)]
               for name, a in together.items()}
        same_crystal(own, evaluate(build(), crystal))
        first += len(crystal)


@everywhere
def test_crystals_of_a_batch_see_each_other(atoms, R, seed):
    check_batch(atoms)


def handedness(atoms) -> float:
    """A number that does not depend on orientation but changes sign in a mirror: triple products of weighted sums."""
    dst, _, _, r = facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    sums = np.zeros((3, len(atoms), 3))
    for n in range(3):
        np.add.at(sums[n], dst, r * (CUTOFF - np.linalg.norm(r, axis=1, keepdims=True)) ** (n + 1))
    return np.sum(np.cross(sums[0], sums[1]) * sums[2])


@pytest.mark.parametrize("name", ("triclinic", "chiral", "molecule"))
def test_mirror_image_has_another_energy(name):
    """The group is O(3): one energy for a crystal and its mirror image, although (control) they are not one crystal."""
    atoms, mirror = PINNED[name], np.diag([1, 1, -1]) @ GENERIC
    differ("handedness, zero if the crystal is not chiral", handedness(atoms), 0)
    same("handedness after a rotation", handedness(rotated(atoms, GENERIC)), handedness(atoms))
    same("handedness of the mirror image", handedness(rotated(atoms, mirror)), -handedness(atoms))
    check_rotation(atoms, mirror)


def test_symmetry_checks_compare_constants():
    """Control of all of the above: what they compare is not zero, and changes when it is not transformed along."""
    other = rotated(TRICLINIC, GENERIC)
    out, after = evaluate(build(), TRICLINIC), evaluate(build(), other)
    for name in ("forces", "stress", "virial"):
        differ(f"{name} of a rotated crystal", after[name], out[name])
    before, after = features(build(), TRICLINIC), features(build(), other)
    for (t, part), l in product(((0, "mix"), (0, "grid"), (1, "mix"), (1, "skip"), (1, "grid")), (1, 2)):
        x, y = (f[t, part][:, facet.degree(l)] for f in (before, after))
        differ(f"features of layer {t} {part}, degree {l}", y, x)
    differ("energies in another order", out["energies"][::-1], out["energies"])
    for what, deform in (("strain", np.eye(3) * 1.05), ("matrix that is no rotation", GENERIC + np.diag([0, 0, 0.05]))):
        differ(what, evaluate(build(), rotated(TRICLINIC, deform))["energy"], out["energy"])


# ─── Derivatives ──────────────────────────────────────────────────────────────────────────────────────────────────────

def check_slopes(atoms, **config):
    """Forces, virial and stress against central differences of the energy, all of them in one batch."""
    model, step, changed = build(**config), 2e-5, []
    for n, sign in product(range(3 * len(atoms)), (step, -step)):
        changed.append(atoms.copy())
        changed[-1].positions.flat[n] += sign
    for n, sign in product(range(9), (step, -step)):
        strain = sign * np.eye(9)[n].reshape(3, 3)
        changed.append(rotated(atoms, np.eye(3) + (strain + strain.T) / 2))
    out, energy = evaluate(model, atoms), evaluate(model, *changed)["energy"]
    slopes, volume = (energy[::2] - energy[1::2]) / (2 * step), abs(np.linalg.det(atoms.cell)) or np.nan
    same("forces", out["forces"].ravel(), -slopes[:-9], "differences")
    same("virial", out["virial"].ravel(), slopes[-9:], "differences")
    same("stress", out["stress"], out["virial"] / volume, "formula")


@everywhere
def test_forces_or_stress_are_not_slopes_of_the_energy(atoms, R, seed):
    check_slopes(atoms)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu, fine"])
def test_derivatives_only_for_the_default_config(name):
    check_slopes(TRICLINIC, **MODELS[name])


@pytest.mark.parametrize("config", (dict(), dict(first_knot=1.2), dict(activation="silu")), ids=str)
def test_energy_has_a_kink_at_the_cutoff(config):
    """Energy, slope and curvature on a line along which an atom leaves the sight of another; distance = cutoff + s."""
    model, direction = build(**config), np.array([2, -3, 6]) / 7

    def along(*s):
        out = evaluate(model, *(Atoms("SiOCu", [[0, 0, 0], [-1.1, 1.2, -0.9], (CUTOFF + t) * direction]) for t in s))
        slope = -out["forces"].reshape(-1, 3, 3)[:, 2] @ direction
        return {"energy": out["energy"], "slope": slope, "curvature": np.diff(slope) / np.diff(s)}
    inside, outside = along(-1.5e-6, -0.5e-6), along(0.5e-6, 1.5e-6)
    beyond, control = along(0.5, 0.6), along(-1.5, -1.499)
    for name in inside:
        same(f"{name} just inside the cutoff", inside[name], outside[name], "cutoff")
        same(f"{name} just outside", outside[name], beyond[name], "exact")
        differ(f"{name} well inside", control[name], outside[name])


@pytest.mark.parametrize("first_knot", (0.0, 1.5))
@pytest.mark.parametrize("axis", ((0, 0, 1), (1, 0, 0), (2, -3, 6)), ids=str)
def test_derivatives_are_not_finite_for_close_atoms(first_knot, axis):
    model = build(first_knot=first_knot)
    for distance in (0.002, 0.03, 1.3):
        batch = batch_of(model, Atoms("SiO", [[0, 0, 0], distance * np.array(axis) / np.linalg.norm(axis)]))
        hessian = torch.autograd.functional.hessian(
            lambda vectors: model.atomic_energies(batch._replace(vectors=vectors)).sum(), batch.vectors)
        out = model(batch, training=True)
        gradients = torch.autograd.grad(out["forces"].square().sum() + out["energy"].sum(), [*model.parameters()])
        for values in (out["energy"], out["forces"], hessian, *gradients):
            same("finite", values.isfinite(), torch.ones_like(values), "exact")
    differ("second derivatives at the last distance", hessian, 0 * hessian)


def test_isolated_atom_has_a_learned_energy():
    """Without neighbours an atom has its reference energy and nothing else: alone, in a large cell, out of reach."""
    cell, near = Atoms("Cu", cell=[9.0, 8, 7], pbc=True), Atoms("SiO", [[0, 0, 0], [0, 0, 2.0]])
    for crystal, E0 in ((PINNED["isolated atom"], [2.0]), (PINNED["dimer at the cutoff"], [-1.0, 2.0]), (cell, [0.5])):
        for config in (dict(), dict(activation="silu"), dict(degree=0), dict(layers=1)):
            for several in ([crystal], [crystal, TRICLINIC]):
                out = evaluate(build(**config), *several)
                same("energies", out["energies"][:len(E0)], E0, "formula")
                same("forces", out["forces"][:len(E0)], np.zeros((len(E0), 3)), "exact")
                same("stress", out["stress"][0], np.full((3, 3), 0 if crystal.cell.volume else np.nan), "exact")
    differ("energies in reach", evaluate(build(), near)["energies"], [-1.0, 2.0])
    differ("forces in reach", evaluate(build(), near)["forces"], np.zeros((2, 3)))


def test_sum_over_neighbours_has_a_wrong_derivative():
    """The three sums over neighbours are each other's derivatives, to second order, however they are cut in chunks."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(6, (6, 4), generator=g)
    edge, h, D = (torch.randn(6, *s, dtype=torch.float64, generator=g).requires_grad_() for s in ((3, 4), (5,), (3, 5)))
    whole = torch.einsum("amk,akx->amx", edge, h[index])
    by_edge, by_h = torch.autograd.grad(whole, (edge, h), D, retain_graph=True)
    for rows in (1, 4, 6):
        with mock.patch.object(facet, "chunks", lambda index, X: [slice(a, a + rows) for a in range(0, 6, rows)]):
            for f, a, b, want in ((facet.NeighbourSum, edge, h, whole), (facet.NeighbourDot, D, h, by_edge),
                                  (facet.NeighbourSpread, D, edge, by_h)):
                same(f"{f.__name__} in chunks of {rows}", f.apply(a, b, index), want, "formula")
                for test in (torch.autograd.gradcheck, torch.autograd.gradgradcheck) if rows == 4 else ():
                    fine = test(lambda a, b: f.apply(a, b, index), (a, b), raise_exception=False)
                    assert fine, f"{test.__name__} of {f.__name__}"
    pieces = facet.chunks(torch.zeros(1000, 50, dtype=int), 300)
    assert len(pieces) > 3, "this index should need several chunks"
    same("rows in all chunks", np.concatenate([np.arange(1000)[piece] for piece in pieces]), np.arange(1000), "exact")


# ─── Neighbours and padding ───────────────────────────────────────────────────────────────────────────────────────────

def check_neighbours(atoms, cutoff=CUTOFF):
    """The same pairs as ASE's list, with shifts and vectors. A pair exactly at the cutoff adds nothing and may miss."""
    found = []
    for i, j, S, r in (facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff),
                       neighbor_list("ijSD", atoms, cutoff)):
        assert (np.diff(i) >= 0).all(), "not sorted by dst"
        inside = np.linalg.norm(r, axis=1) < cutoff - 1e-9
        order = np.lexsort((*S[inside].T, j[inside], i[inside]))
        found.append((np.c_[i, j, S][inside][order], r[inside][order]))
    same("dst, src, shift", found[0][0], found[1][0], "exact")
    same("vectors", found[0][1], found[1][1], "formula")


@everywhere
def test_neighbour_is_missed_or_counted_twice(atoms, R, seed):
    for pbc in product((False, True), repeat=3) if atoms.cell.rank == 3 else [atoms.pbc]:
        check_neighbours(with_cell(atoms, atoms.cell, pbc), np.random.default_rng(seed).uniform(1.5, 6.0))


def test_padding_adds_something():
    """Beside a denser crystal there are empty places: they change no energy and receive no gradient whatsoever."""
    model, sparse = build(), PINNED["planar"]
    batch = batch_of(model, sparse, PINNED["skewed"])
    empty = (batch.vectors == batch.vectors.new_tensor([2 * CUTOFF, 0, 0])).all(-1)
    assert 50 < empty[:len(sparse)].sum() < empty.numel(), "this batch should have much padding"
    vectors = batch.vectors.clone().requires_grad_()
    energies = model.atomic_energies(batch._replace(vectors=vectors))
    first = torch.autograd.grad(energies.sum(), vectors, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), vectors)[0]
    same("energies", energies[:len(sparse)], evaluate(model, sparse)["energies"], "formula")
    for what, values in (("gradient", first), ("gradient of its square", second)):
        same(f"{what} at padding", values[empty], torch.zeros_like(values[empty]), "exact")
        differ(f"{what} at neighbours", values[~empty], torch.zeros_like(values[~empty]))


# ─── Radial functions, harmonics, coupling, density, grid ─────────────────────────────────────────────────────────────

def test_splines_differ_from_scipy():
    for first_knot in (0.0, 1.2):
        splines, h = build(first_knot=first_knot).splines, (CUTOFF - first_knot) / CONFIG.splines
        c = np.pad(splines.coefficients.detach().numpy(), ((3, 3), (0, 0)))  # with zeros: splines run out
        r = np.linspace(max(0, first_knot - 3 * h), CUTOFF, 997)
        want = BSpline(first_knot + h * np.arange(-6, CONFIG.splines + 4), c, 3)(r)
        same("splines", splines(torch.from_numpy(r)), want, "formula")
        beyond = splines(torch.linspace(CUTOFF, 9, 50, dtype=torch.float64))
        same("splines beyond the cutoff", beyond, 0 * beyond, "exact")
        differ("splines", want, 0 * want)


def test_fit_does_not_fit_or_reports_another_error():
    splines, known, g = facet.RadialSplines(9, CONFIG), facet.RadialSplines(9, CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        known.coefficients += torch.randn(known.coefficients.shape, dtype=torch.float64, generator=g)
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


def test_atoms_fall_into_each_other():
    """Two atoms repel ever more, from where the core begins down to nothing; there it ends with two derivatives; beyond it is zero."""
    config = facet.Config(species=("H", "O", "Si", "Cu", "U"))
    core = facet.Core(config).double()
    for i, j in combinations_with_replacement(range(5), 2):
        end = float(core.table[2, i] + core.table[2, j])

        def energy(r, i=i, j=j):
            r = torch.as_tensor(r, dtype=torch.float64)[:, None]  # [n, 1]: n atoms, each sees the last one
            return core(r, torch.tensor([i] * (len(r) - 1) + [j]), torch.full((len(r), 1), len(r) - 1))[:-1]
        r = torch.linspace(0.02, 0.98, 200, dtype=torch.float64) * end
        V = energy(torch.cat([r, r[:1]]))
        assert (V.diff() < 0).all() and (V > 0).all() and V[0] > 100
        inside, outside = energy([end - 1e-4, end - 1e-3, 1.0]), energy([end, end + 0.01, 10.0, 1.0])
        same("beyond the core", outside, np.zeros(3), "exact")
        assert 0 < inside[0] < 1.1e-3 * inside[1], "does not vanish as the third power of the distance to its end"


def check_core():
    """The crystal has atoms within each other's core."""
    facet_energy = check_ladder(SMALL, core=(1.3, 1.2, 1.1))
    differ("energy without the core", evaluate(build(core=(1.3, 1.2, 1.1)), SMALL)["energy"], evaluate(build(core=(0.1, 0.1, 0.1)), SMALL)["energy"])
    return facet_energy


def test_harmonics_differ_from_scipy(L=6):
    """The poles included. Orthonormality by Gauss-Legendre in z and equidistant angles."""
    z, weights = np.polynomial.legendre.leggauss(L + 1)
    z, angle = (a.ravel() for a in np.meshgrid(z, np.arange(2 * L + 2) * np.pi / (L + 1), indexing="ij"))
    rings = np.stack([np.sqrt(1 - z ** 2) * np.cos(angle), np.sqrt(1 - z ** 2) * np.sin(angle), z], -1)
    u = np.vstack([rings, np.eye(3), -np.eye(3)])
    theta, angle, want = np.arccos(u[:, 2]), np.arctan2(u[:, 1], u[:, 0]), []
    for l, m in ((l, m) for l in range(L + 1) for m in range(-l, l + 1)):
        wave = np.sqrt(4 * np.pi) * (-1) ** m * sph_harm_y(l, abs(m), theta, angle)
        want.append(wave.real if m == 0 else 2 ** 0.5 * (wave.real if m > 0 else wave.imag))
    Y = facet.harmonics(torch.from_numpy(u), L).numpy()
    same("harmonics", Y, np.stack(want, -1), "formula")
    weights = np.repeat(weights, 2 * L + 2) / (4 * L + 4)
    same("means of products", (weights * Y[:-6].T) @ Y[:-6], np.eye((L + 1) ** 2), "formula")
    same("degree 1", Y[:, facet.degree(1)], np.sqrt(3) * u[:, [1, 2, 0]], "formula")


def test_lebedev_rule_is_not_exact():
    for degree in (3, 7, 9, 15):
        points, weights = facet.lebedev(degree)
        mean, M = weights @ facet.harmonics(points, degree + 1), (degree + 1) ** 2
        same(f"means of harmonics, degree {degree}", mean[:M], np.eye(1, M)[0], "formula")
        differ("means one degree higher", mean[M:], 0 * mean[M:])


def test_coupling_differs_from_sympy():
    """Up to one factor for each (l1, l2, l3)."""
    triangles = {p for p in product(range(3), repeat=3) if sum(p) % 2 == 0 and 2 * max(p) <= sum(p)}
    assert sorted(facet.paths(2, 2, 2)) == sorted(triangles)
    for l1, l2, l3 in triangles | {(1, 2, 3), (3, 3, 2)}:
        G = facet.gaunt(l1, l2, l3)
        ms = product(*(range(-l, l + 1) for l in (l1, l2, l3)))
        want = np.array([float(real_gaunt(l1, l2, l3, *m)) for m in ms])
        same("sum of squares for each m3", G.square().sum((0, 1)), torch.ones(2 * l3 + 1), "formula")
        same(f"coupling {l1} {l2} {l3}", G.flatten(), want * ((2 * l3 + 1) / (want ** 2).sum()) ** 0.5, "formula")


@pytest.mark.parametrize("L", (0, 1, 2, 3))
def test_summing_first_differs_from_coupling_first(L):
    """Sum over neighbours, then couple = couple edge by edge, then sum."""
    N, K, C, B, M, g = 5, 4, CONFIG.channels, CONFIG.groups, (L + 1) ** 2, torch.Generator().manual_seed(1)
    shapes = (N, M, C), (N, B, L + 1, K), (N, M, K)
    h, phi, Y = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)
    src, density = torch.randint(N, (N, K), generator=g), build(degree=L).layers[1].density
    A = density(h, (src[:, None] * B + torch.arange(B)[:, None]).flatten(0, 1), phi, Y)
    for l3, found in enumerate(A):
        by_path = [torch.einsum("nck,abd,nbk,nkac->ndc", phi[:, :, l2].repeat_interleave(C // B, 1),
                                facet.gaunt(l1, l2, l3), Y[:, facet.degree(l2)], h[src][:, :, facet.degree(l1)])
                   for l1, l2, l in density.paths if l == l3]
        want = torch.cat(by_path, -1) / CONFIG.mean_neighbours ** 0.5
        same(f"density of degree {l3}", found.view(want.shape), want, "formula")
        differ(f"density of degree {l3}", want, 0 * want)


def grid_error(L: int, R=GENERIC, **config) -> float:
    """How much it matters whether features are rotated before or after the grid layer, over the largest feature."""
    layer, D = build(degree=L, layers=2, **config).layers[0].grid, torch.from_numpy(wigner(R, L))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(9, (L + 1) ** 2, CONFIG.channels, dtype=torch.float64, generator=g)
    differ("grid layer", layer(x), x)
    return largest(layer(torch.einsum("ab,nbc->nac", D, x)), torch.einsum("ab,nbc->nac", D, layer(x)))[0]


def test_product_is_not_exact_or_needs_no_grid():
    for L, R in product((1, 2, 3, 4), (GENERIC, IMPROPER)):
        same(f"error on the default grid, L = {L}", grid_error(L, R), 0, "formula")
        same(f"error on a finer grid, L = {L}", grid_error(L, R, grid_degree=3 * L + 4), 0, "formula")
    for L in (2, 3, 4):  # the smallest rule of all has degree 3 and is right for L = 1
        differ(f"error on a grid that is too coarse, L = {L}", grid_error(L, grid_degree=3 * L - 2), 0)


def test_silu_does_not_gain_from_a_finer_grid():
    errors = [grid_error(2, activation="silu", grid_degree=degree) for degree in (7, 15, 23, 35, 47, 71)]
    assert all(b < a / 2 for a, b in zip(errors, errors[1:])), f"errors should fall with the degree: {errors}"
    same("error on the default grid", grid_error(2, activation="silu"), errors[1], "exact")


# ─── The reference ladder ─────────────────────────────────────────────────────────────────────────────────────────────

SMALL = Atoms("SiO", [[0, 0, 0], [1.4, 1.1, 1.3]], cell=[[3.4, 0.2, 0], [0.6, 3.5, 0.3], [-0.4, 0.1, 3.3]], pbc=True)


def check_ladder(atoms, derivatives=False, **config) -> dict[str, float]:
    """Every stage against the NumPy reference; gives the largest difference of each."""
    model = build(**config)
    crystal = (asdict(model.config), {name: w.numpy() for name, w in model.state_dict().items()},
               [*atoms.symbols], atoms.positions, atoms.cell.array, atoms.pbc)
    out, found, want = evaluate(model, atoms), features(model, atoms), reference_numpy.evaluate(*crystal)
    *edges, vectors = facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    edges, wanted = (np.c_[*e] for e in (edges, (want["dst"], want["src"], want["shift"])))  # [E, 5]
    order, other = np.lexsort(edges.T), np.lexsort(wanted.T)
    r = torch.from_numpy(vectors[order])
    phi = model.splines(r.norm(dim=1)).reshape(want["phi"].shape)
    Y = facet.harmonics(r / r.norm(dim=1, keepdim=True), model.config.degree)
    ladder = {"edges": same("edges", edges[order], wanted[other], "exact")}
    for name, values in (("vectors", r), ("phi", phi), ("Y", Y)):
        ladder[name] = same(name, values, want[name][other])
    for t in range(model.config.layers):
        pairs = zip(found[t, "density"], want["A"][t], strict=True)
        ladder[f"layer {t} density"] = max(same(f"density {t}", a.reshape(b.shape), b) for a, b in pairs)
        for part, name in (("mix", "message"), ("skip", "skip"), ("grid", "h")):
            ladder[f"layer {t} {part}"] = same(f"layer {t} {part}", found[t, part], want[name][t])
    ladder["energies"] = same("energies", out["energies"], want["energies"])
    ladder["energy"] = same("energy", out["energy"], [want["energy"]])
    if derivatives:
        ladder["forces"] = same("forces", out["forces"], reference_numpy.forces(*crystal), "differences")
        ladder["stress"] = same("stress", out["stress"][0], reference_numpy.stress(*crystal), "differences")
    return ladder


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu, fine"])
def test_ladder_to_the_reference_breaks(name):
    print(f"\n{name}: largest difference to reference_numpy.py")
    for stage, error in check_ladder(SMALL, derivatives=name in ("L=1, one layer", "L=0"), **MODELS[name]).items():
        print(f"    {stage:16} {error:.1e}")


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
@example(atoms=PINNED["isolated atom"])
@example(atoms=PINNED["slab without third vector"])
def test_reference_differs_on_random_crystals(atoms):
    check_ladder(atoms, layers=2, channels=4, groups=2)


# ─── Use ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def energy_drift(step=0.5, wrong=0.0) -> float:
    """Spread of the total energy in 100 steps of `step` fs, over the kinetic energy; forces may be wrong by a part."""
    class Wrong(facet.FacetCalculator):
        def calculate(self, *args, **kwargs):
            super().calculate(*args, **kwargs)
            self.results["forces"] = self.results["forces"] * (1 + wrong)
    atoms, total, momenta = TRICLINIC.copy(), [], np.random.default_rng(0).normal(size=(5, 3))
    atoms.calc = Wrong(build(energy_scale=0.2), device="cpu", dtype=torch.float64)
    atoms.set_momenta(momenta * np.sqrt(600 * units.kB * atoms.get_masses())[:, None])
    kinetic, dynamics = atoms.get_kinetic_energy(), VelocityVerlet(atoms, step * units.fs)
    dynamics.attach(lambda: total.append(atoms.get_total_energy()))
    dynamics.run(100)
    return np.ptp(total) / kinetic


def test_molecular_dynamics_heats_or_cools():
    same("drift", energy_drift(), 0, "drift")
    differ("drift with forces 10 % too large", energy_drift(wrong=0.1), 0)
    differ("drift with steps five times too long", energy_drift(step=2.5), 0)


def test_training_cannot_overfit_one_crystal():
    """Labels from other weights; the loss on forces and stress is differentiated twice."""
    model, batch = copy.deepcopy(build(seed=1)), batch_of(build(), TRICLINIC)
    want, losses = build()(batch), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        out = model(batch, training=True)
        loss = sum((out[name] - want[name]).square().mean() for name in ("energy", "forces", "stress"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(w.grad is not None and w.grad.any() for w in model.parameters()), "a weight that nothing depends on"
    assert losses[-1] < losses[0] / 50, f"the loss only fell from {losses[0]:.3g} to {losses[-1]:.3g}"


def test_saved_model_is_another_model(tmp_path):
    path, model = tmp_path / "model.pt", build()
    facet.save(model, path, step=3)
    loaded, want = facet.load(path, dtype=torch.float64), evaluate(model, TRICLINIC)["energy"]
    assert loaded.config == model.config and torch.load(path, weights_only=True)["step"] == 3
    same("energy", evaluate(loaded, TRICLINIC)["energy"], want, "exact")
    same("energy", [facet.FacetCalculator(path, "cpu", torch.float64).get_potential_energy(TRICLINIC)], want, "exact")
    differ("energy of another model", evaluate(build(seed=1), TRICLINIC)["energy"], want)


def test_interrupted_save_leaves_half_a_file(tmp_path):
    facet.save(build(), tmp_path / "model.pt")
    for name in ("model.pt", "new.pt"):
        for place, moment in ((torch, "save"), (os, "fsync"), (Path, "replace")):
            with mock.patch.object(place, moment, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                facet.save(build(seed=1), tmp_path / name)
    assert [*tmp_path.iterdir()] == [tmp_path / "model.pt"]
    same("readout of the old model", facet.load(tmp_path / "model.pt").readout, build().readout, "float32")


def test_broken_checkpoint_ends_in_a_riddle(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        facet.load(tmp_path / "model.pt")
    facet.save(build(), tmp_path / "model.pt")
    whole, state = (tmp_path / "model.pt").read_bytes(), build().state_dict()
    torch.save({"config": asdict(replace(CONFIG, channels=12)), "state": state}, tmp_path / "other shapes")
    torch.save({"state": state}, tmp_path / "no config")
    torch.save([1, 2], tmp_path / "list")
    for name, content in {"empty": b"", "truncated": whole[:len(whole) // 2], "text": b"not a model\n"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("other shapes", "no config", "list", "empty", "truncated", "text"):
        with pytest.raises(ValueError, match=f"{name} is not a Facet checkpoint, or it is damaged") as error:
            facet.load(tmp_path / name)
        assert "\n" not in str(error.value), "one sentence"


def test_calculator_differs_from_the_model():
    model, atoms, voigt = build(), TRICLINIC.copy(), ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
    want = evaluate(model, atoms)
    for dtype, tol in ((torch.float64, "exact"), (torch.float32, "float32")):
        original = copy.deepcopy(model)
        atoms.calc = facet.FacetCalculator(original, device="cpu", dtype=dtype)
        with torch.no_grad():
            original.readout.zero_()  # later training does not reach the calculator
        same("energy", [atoms.get_potential_energy()], want["energy"], tol)
        same("free energy", [atoms.get_potential_energy(force_consistent=True)], want["energy"], tol)
        same("energies", atoms.get_potential_energies(), want["energies"], tol)
        same("forces", atoms.get_forces(), want["forces"], tol)
        same("stress", atoms.get_stress(), want["stress"][0][voigt], tol)
        moved = atoms.copy()
        moved.positions[0] += 0.2
        differ("forces of the next crystal", atoms.calc.get_forces(moved), want["forces"])
    for name in ("molecule", "slab without third vector"):
        same("forces", atoms.calc.get_forces(PINNED[name]), evaluate(model, PINNED[name])["forces"], "float32")
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_stress(PINNED[name])


@pytest.mark.parametrize("batch_atoms", (1, 12, 1000))
def test_evaluate_mixes_crystals_up(batch_atoms):
    """Whatever the batches, in the order given: those of a batch are alike, not adjacent. Stress only where there is a volume."""
    several = [*PINNED.values()]
    found = facet.evaluate(build(), [facet.find_neighbours(atoms, CONFIG) for atoms in several], batch_atoms)
    for atoms, got in zip(several, found, strict=True):
        want = evaluate(build(), atoms)
        for name, value in (("energy", want["energy"][0]), ("free_energy", want["energy"][0]), ("energies", want["energies"]),
                            ("forces", want["forces"])):
            same(name, got[name], value)
        assert ("stress" in got) == np.isfinite(want["stress"]).all()
        if "stress" in got:
            same("stress", got["stress"], want["stress"][0][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]])
    differ("energies of two crystals", found[0]["energy"], found[-1]["energy"])
    assert facet.evaluate(build(), []) == []


@pytest.mark.parametrize("message, atoms", (
    ("element Xe is not among those the model knows: Si O Cu", Atoms("SiXe", [[0, 0, 0], [0, 0, 2]])),
    ("NaN or infinite", Atoms("Si", [[0, np.nan, 0]])),
    ("NaN or infinite", Atoms("Si", cell=[[np.inf, 0, 0], [0, 3, 0], [0, 0, 3]], pbc=True)),
    ("no volume", Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True)),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [0, 0, 1e-5]])),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [4, 4, -8]], cell=[4, 4, 4], pbc=True)),
    ("cell vector is zero", Atoms("Si", cell=[3, 3, 0], pbc=True)),
), ids=str)
def test_broken_crystal_gets_an_energy(message, atoms):
    with pytest.raises(ValueError, match=message):
        facet.find_neighbours(atoms, CONFIG)


@pytest.mark.parametrize("message, change", (
    ("chemical symbols", dict(species=("Si", "Qq", "Cu"))), ("chemical symbols", dict(species=())),
    ("multiple of groups", dict(channels=7)), ("activation", dict(activation="relu")), ("at least", dict(layers=0)),
    ("first_knot", dict(first_knot=3.5)), ("first_knot", dict(cutoff=-1.0)), ("at least", dict(groups=0)),
    ("at least", dict(degree=-1)), ("at least", dict(splines=3)), ("no Lebedev rule", dict(grid_degree=132)),
    ("one number per species", dict(reference_energies=(1.0,))), ("mean_neighbours", dict(mean_neighbours=0.0)),
), ids=str)
def test_broken_config_builds_a_model(message, change):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_import_changes_global_state():
    state = ("(torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), "
             "torch.get_float32_matmul_precision(), torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(), "
             "numpy.geterr(), numpy.get_printoptions())")
    code = f"import numpy, torch\nnumpy.random.seed(1)\nbefore = {state}\nimport facet\nassert before == {state}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(facet.__file__).parent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype, tol", ((torch.float64, "rounding"), (torch.float32, "float32")), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuda_differs_from_cpu(name, dtype, tol):
    crystals = TRICLINIC, PINNED["skewed"], PINNED["isolated atom"]
    want = evaluate(build(**MODELS[name]), *crystals)
    for what, value in evaluate(copy.deepcopy(build(dtype, **MODELS[name])).cuda(), *crystals).items():
        same(what, value, want[what], tol)


# ─── Relaxation ───────────────────────────────────────────────────────────────────────────────────────────────────────

def strained(symbols: str, repeat=(1, 1, 1), a=3.6) -> Atoms:
    """A cubic or primitive face-centred crystal, rattled, its cell pulled in all directions. Takes build() to a minimum."""
    rng, crystal = np.random.default_rng(1), ase.build.bulk("Cu", a=a, cubic=len(Atoms(symbols)) > 1)
    crystal.symbols = symbols
    crystal *= repeat
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))), scale_atoms=True)
    crystal.positions += rng.normal(0, 0.05, (len(crystal), 3))
    return crystal


MOVING = strained("Si3O"), strained("Si3O", (2, 1, 1)), strained("Si", (2, 1, 1)), strained("Si3O", a=4.8), strained("Si", a=4.2)


def ase_fire(atoms: Atoms, fmax: float, steps: int, cell: bool) -> tuple[Atoms, FIRE, bool]:
    atoms = atoms.copy()
    atoms.calc = facet.FacetCalculator(build(), device="cpu", dtype=torch.float64)
    optimizer = FIRE(FrechetCellFilter(atoms) if cell else atoms, logfile=None)
    return atoms, optimizer, optimizer.run(fmax=fmax, steps=steps)


@pytest.mark.parametrize("steps", (0, 1, 45))
@pytest.mark.parametrize("cell", (True, False), ids=("cell", "fixed cell"))
def test_relaxation_takes_other_steps_than_ase(cell, steps):
    crystals = [*MOVING]
    if not cell:
        crystals += [PINNED["slab without third vector"], TRICLINIC, Atoms("SiO", [[0, 0, 0], [0.2, 0.1, 1.9]])]
    before = [atoms.copy() for atoms in crystals]
    relaxed = facet.relax(build(), crystals, fmax=0.05, steps=steps, cell=cell, batch_atoms=10)
    for got, start, atoms in zip(relaxed, before, crystals, strict=True):
        want, optimizer, converged = ase_fire(start, 0.05, steps, cell)
        assert (got.info["steps"], got.info["converged"]) == (optimizer.nsteps, converged), start
        same("positions", got.positions, want.positions, "relaxation")
        same("cell", got.cell.array, want.cell.array, "relaxation")
        same("energy", got.get_potential_energy(), want.get_potential_energy(), "relaxation")
        same("forces", got.get_forces(), want.get_forces(), "relaxation")
        if np.isfinite(facet.find_neighbours(start, CONFIG).volume):
            same("stress", got.get_stress(), want.get_stress(), "relaxation")
        assert atoms == start and atoms.info == {}, "the crystals themselves do not change"
    if steps > 1:
        assert len({atoms.info["steps"] for atoms in relaxed}) > 2, "some finish before others"
        for got, start in zip(relaxed[:3], before):
            differ("positions", got.positions, start.positions)
            if cell:
                differ("cell", got.cell.array, start.cell.array)


@pytest.mark.parametrize("batch_atoms", (6, 1000))
def test_finished_crystals_are_evaluated_again_or_batches_grow(batch_atoms, monkeypatch):
    seen, make_batch = [], facet.make_batch

    def counted(graphs, *more):
        seen.append([len(graph.species) for graph in graphs])
        return make_batch(graphs, *more)

    monkeypatch.setattr(facet, "make_batch", counted)
    relaxed = facet.relax(build(), MOVING, fmax=0.05, steps=45, batch_atoms=batch_atoms)
    steps = [atoms.info["steps"] for atoms in relaxed]
    assert sum(map(len, seen)) == sum(s + 1 for s in steps) < len(steps) * (max(steps) + 1)
    assert max(map(sum, seen)) < batch_atoms + max(map(len, MOVING))
    if batch_atoms == 1000:
        assert len(seen) == max(steps) + 1, "one batch a step"
    assert facet.relax(build(), []) == []


@pytest.mark.parametrize("breaks", ("at first", "later"))
def test_broken_crystal_spoils_the_others(breaks, monkeypatch):
    """The broken one comes first: were padding to point at its first atom, everybody would get its NaN."""
    model, find, seen = copy.deepcopy(build()), facet.find_neighbours, []

    def find_and_break(atoms, config):
        if "Cu" in atoms.symbols:
            seen.append(atoms.positions)
            if breaks == "later" and len(seen) > 3:
                raise ValueError("atoms 0 and 1 sit on one spot")
        return find(atoms, config)

    want = facet.relax(model, MOVING, fmax=0.05, steps=12)
    monkeypatch.setattr(facet, "find_neighbours", find_and_break)
    if breaks == "at first":
        with torch.no_grad():
            model.embedding[CONFIG.species.index("Cu")] = np.nan
    bad, *got = facet.relax(model, [strained("CuSi3"), *MOVING], fmax=0.05, steps=12)
    for one, other in zip(got, want, strict=True):
        assert one.info == other.info
        same("positions", one.positions, other.positions, "relaxation")
        same("energy", one.get_potential_energy(), other.get_potential_energy(), "relaxation")
    assert not bad.info["converged"]
    if breaks == "at first":
        assert bad.calc is None and bad.info["steps"] == 0
    else:
        assert bad.info["steps"] == 2 and np.isfinite(bad.get_forces()).all()
        same("positions, those of step 2", bad.positions, seen[2], "exact")
        differ("positions, not those of the start", bad.positions, seen[0])


def test_collapsing_crystal_is_followed_for_ever():
    """Under a stress that never ends, of either sign, the cell shrinks or grows e-fold at most."""
    for stress in (1, -1):
        for step, atoms in enumerate(facet.fire(TRICLINIC, fmax=0.02, steps=300, cell=True)):
            atoms.calc = SinglePointCalculator(atoms, forces=np.zeros((5, 3)), stress=np.array([stress] * 3 + [0] * 3))
        F = np.linalg.solve(TRICLINIC.cell.array, atoms.cell.array).T
        assert not atoms.info["converged"] and atoms.info["steps"] == step < 300
        same("log F, at most", np.maximum(1, np.abs(logm(F)).max()), 1, "relaxation")
        assert np.sign(logm(F)[0, 0]) == -stress
        differ("cell", F, np.eye(3))


@pytest.mark.parametrize("message, wrong", (
    ("crystal 1 has constraints, or lacks", Atoms("Si", cell=[3, 3, 3], pbc=True, constraint=FixAtoms([0]))),
    ("crystal 1 .* lacks the three lattice vectors", PINNED["slab without third vector"]),
    ("crystal 1 .* lacks the three lattice vectors", PINNED["molecule"]),
    ("crystal 1: element Xe is not among", Atoms("Xe", cell=[3, 3, 3], pbc=True)),
    ("crystal 1: atoms 0 and 1 sit on one spot", Atoms("Si2", cell=[3, 3, 3], pbc=True)),
), ids=lambda value: value if isinstance(value, str) else "")
def test_relaxation_ignores_what_it_cannot_do(message, wrong):
    with pytest.raises(ValueError, match=message) as error:
        facet.relax(build(), [TRICLINIC, wrong])
    assert "\n" not in str(error.value), "one sentence"


# ─── train_small.py ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which a short training on a small embedded set has run: runs/emt/."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "runs").mkdir()
    train_small.embedded_set(folder / "runs", count=120)
    train_small.main(train_small.Settings(steps=250, channels=16, batch_atoms=100), out=folder / "runs")
    return folder


def test_training_leaves_out_a_file_or_a_number(trained):
    run = trained / "runs" / "emt"
    result, log = json.loads((run / "result.json").read_text()), list(csv.DictReader(open(run / "metrics.csv")))
    assert {"energy_mae_meV_per_atom", "force_mae_eV_per_A", "stress_mae_GPa", "energy_rmse_meV_per_atom", "force_rmse_eV_per_A",
            "stress_rmse_GPa", "parameters", "train_seconds", "steps", "device", "torch_threads", "command", "settings"} <= set(result)
    assert all((run / name).stat().st_size > 10_000 for name in ("model.pt", "checkpoint.pt", "report.png"))
    assert [int(row["step"]) for row in log] == sorted({int(row["step"]) for row in log}) and int(log[-1]["step"]) == 250
    assert sum(result["time"].values()) == pytest.approx(1) and min(result["time"].values()) >= 0 and 0 <= result["padding"] < 0.25
    physics = result["physics"]
    assert abs(physics["energy_drift"]["drift_meV_per_atom_per_ps"]) < 1 and max(physics["equivariance_error"]["float64"]) < TOL["rounding"]
    assert physics["equation_of_state"]["stress_against_energy_GPa"] < 1  # differences over 1 % of the volume
    assert sum(p.numel() for p in facet.load(run / "model.pt").parameters()) == result["parameters"]


def test_training_learns_less_than_a_constant(trained):
    result = json.loads((trained / "runs" / "emt" / "result.json").read_text())
    constant = result["baselines"]["constant per species"]
    for key in ("energy_mae_meV_per_atom", "force_mae_eV_per_A", "stress_mae_GPa"):
        assert result[key] < 0.6 * constant[key], key  # 250 small steps; the full run is far better
    assert abs(result["relaxation"]["facet"]["lattice_constant_A"] / result["relaxation"]["emt"]["lattice_constant_A"] - 1) < 0.1


def test_reported_errors_are_not_those_of_the_saved_model(trained):
    run = trained / "runs" / "emt"
    result, calculator = json.loads((run / "result.json").read_text()), facet.FacetCalculator(run / "model.pt", device="cpu")
    _, test = train_small.split(train_small.embedded_set(trained / "runs"), 0)
    errors = []
    for frame in test:
        frame.atoms.calc = calculator
        errors.append((frame.atoms.get_forces() - frame.forces).ravel())
    same("force MAE", np.abs(np.concatenate(errors)).mean(), result["force_mae_eV_per_A"], "float32")


def test_same_seed_gives_another_training(trained, tmp_path):
    logs = []
    for seed in (0, 0, 1):
        train_small.main(train_small.Settings(train=(str(trained / "runs" / "emt.extxyz"),), steps=3, channels=8, seed=seed, name="a"),
                         out=tmp_path)
        rows = csv.DictReader(open(sorted(tmp_path.glob("a*/metrics.csv"), key=os.path.getmtime)[-1]))
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "structures_per_s")} for row in rows])
    assert logs[0] == logs[1] and logs[0] != logs[2]
    assert len(list(tmp_path.glob("a*"))) == 3, "old results were overwritten"


def test_batches_lose_or_double_a_frame():
    rng = np.random.default_rng(0)
    atoms, crowd = rng.integers(1, 101, 500), rng.choice([10, 20, 45, 90], 500)
    for epoch in range(2):
        batches = train_small.plan(atoms, crowd, 5000.0, np.random.default_rng([0, epoch]))
        assert sorted(np.concatenate(batches)) == list(range(500))
        cost = [atoms[b].sum() * crowd[b].max() for b in batches]
        assert all(c <= 6250 or len(b) == 1 for c, b in zip(cost, batches)) and max(map(len, batches)) > 3
        used = sum((atoms[b] * crowd[b]).sum() for b in batches)
        assert used > 0.85 * sum(cost) and used > 0.7 * 5000 * len(batches), "padding, or batches that are not full"
        shuffled = np.array_split(rng.permutation(500), 50)  # control: without sorting there is padding
        assert used < 0.75 * sum(atoms[b].sum() * crowd[b].max() for b in shuffled)
    other = {tuple(b) for b in train_small.plan(atoms, crowd, 5000.0, np.random.default_rng([0, 0])) if len(b) > 2}
    assert len(other) > 20 and not other & {tuple(b) for b in batches}, "two epochs with the same batches"
    assert len(train_small.plan(np.array([1000, 1]), np.array([50, 50]), 10.0, rng)) == 2, "a frame larger than a batch is a batch"


def test_split_separates_frames_of_one_material(trained):
    frames = train_small.embedded_set(trained / "runs")
    train, test = train_small.split(frames, 0)
    assert len(train) + len(test) == len(frames) and len(test) > 5
    assert not {f.material for f in train} & {f.material for f in test}, "a material is on both sides"


def test_processes_lose_or_double_a_frame(trained):
    frames = train_small.embedded_set(trained / "runs")
    train_small.configure(frames, frames[:1], train_small.Settings())
    rows = np.arange(7)
    whole = train_small.Samples(frames)[rows][2]
    shares = [train_small.Samples(frames, train_small.Team(rank, 3))[rows][2] for rank in range(3)]
    assert sorted(e for share in shares for e in share["energy"].tolist()) == sorted(whole["energy"].tolist())
    model = facet.Facet(frames.config)
    parts = [train_small.losses(model, *train_small.Samples(frames, train_small.Team(rank, 3))[rows][1:], 0.1) for rank in range(3)]
    same("loss", sum(parts), train_small.losses(model, *train_small.Samples(frames)[rows][1:], 0.1), "float32")
    nothing = train_small.losses(model, *train_small.Samples(frames, train_small.Team(2, 3))[rows[:2]][1:], 0.1)
    assert not nothing.any(), "a process without a share adds to the loss"


def test_pair_baseline_misses_a_pair_potential():
    frames = []
    for i in range(24):
        atoms = ase.build.bulk("Ar", cubic=True, a=5.0 + 0.025 * i) * (2, 1, 1)
        atoms.rattle(0.15, seed=i)
        atoms.calc = LennardJones(sigma=3.0, epsilon=0.1, rc=5.0, ro=4.0, smooth=True)
        frames.append(atoms)
    frames = packed(frames)
    test, train = frames[2::4], frames.take([i for i in range(24) if i % 4 != 2])
    config = train_small.configure(train, test, train_small.Settings())
    pair = train_small.errors(train_small.pair_baseline(train, test, config), test)
    constant = train_small.errors(train_small.constant_baseline(train, test, config), test)
    for key in ("energy_mae_meV_per_atom", "force_mae_eV_per_A", "stress_mae_GPa"):
        assert pair[key] < 0.02 * constant[key], key


def packed(crystals: list[Atoms]) -> "train_small.Frames":
    """Crystals with a calculator, as a training set."""
    records = [train_small.Record(a.numbers, a.positions, a.cell.array, a.pbc, a.get_potential_energy(), a.get_forces(),
                                  a.get_stress(voigt=False) if a.pbc.all() else None, str(i), str(i)) for i, a in enumerate(crystals)]
    return train_small.Frames([("here", table) for table in train_small.pack(records, "here")])


def labelled(folder: Path, change=lambda frames: None, count=12) -> str:
    """An extxyz file of rattled copper with EMT labels, after `change`."""
    frames = []
    for i in range(count):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        atoms.get_forces(), atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in atoms.calc.results.items() if k in ("energy", "forces", "stress")})
        frames.append(atoms)
    change(frames)
    ase.io.write(folder / "data.extxyz", frames)
    return str(folder / "data.extxyz")


def set_label(name, value):
    return lambda frames: frames[3].calc.results.update({name: value})


BAD_FRAMES = {
    "energy is NaN": set_label("energy", float("nan")),
    "force is NaN or infinite": set_label("forces", np.full((4, 3), np.inf)),
    "looks like kbar": set_label("stress", np.array([12.0, 30.0, 5.0, 0.0, 0.0, 1.0])),
    "has no forces": lambda frames: frames[3].calc.results.pop("forces"),
    "has no energy": lambda frames: setattr(frames[3], "calc", None),
    "position is NaN": lambda frames: frames[3].positions.fill(np.nan),
    "sit on one spot": lambda frames: frames[3].positions.__setitem__(0, frames[3].positions[1]),
    "has no volume": lambda frames: frames[3].set_cell([[4, 0, 0], [0, 4, 0], [4, 4, 0]]),
}


@pytest.mark.parametrize("message", BAD_FRAMES)
def test_bad_frame_is_trained_on(message, tmp_path):
    path = labelled(tmp_path, BAD_FRAMES[message])
    with pytest.raises(train_small.BadInput, match=f"data.extxyz, frame 3.*{message}"):
        train_small.main(train_small.Settings(train=(path,), test=(path,), steps=1), out=tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir()), "something was written"
    good = train_small.read((labelled(tmp_path),))
    assert len(good) == 12 and np.isfinite(good[3].stress).all()


def test_broken_file_ends_in_a_traceback(tmp_path):
    text = Path(labelled(tmp_path)).read_text()
    for name, content, message in (("cut.extxyz", text[:len(text) // 2 + 40], "complete"), ("empty.extxyz", "", "cannot be read"),
                                   ("cut.json", '{"mp-1": {"a": {"structure": ', "complete"), ("none.json", "{}", "holds no structures")):
        (tmp_path / name).write_text(content)
        with pytest.raises(train_small.BadInput, match=f"{name}: .*{message}"):
            train_small.read((str(tmp_path / name),))
    with pytest.raises(train_small.BadInput, match="no such file"):
        train_small.read((str(tmp_path / "absent*"),))


def test_mptrj_units_or_sign_are_taken_for_ase(tmp_path):
    sites = [{"species": [{"element": "Si", "occu": 1}], "xyz": [0, 0, z], "abc": [0, 0, 0]} for z in (0.0, 2.0)]
    frame = {"structure": {"lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 5]]}, "sites": sites}, "corrected_total_energy": -3.0,
             "force": [[0, 0, 1], [0, 0, -1]], "stress": [[10, 1, 2], [1, 20, 3], [2, 3, 30]]}
    (tmp_path / "m.json").write_text(json.dumps({"mp-1": {"mp-1-0": frame}, "mp-2": {"mp-2-0": frame}}))
    frames = train_small.read((str(tmp_path / "m.json"),))
    assert frames[0].material != frames[1].material and frames[0].name.endswith("m.json, frame mp-1-0")
    same("VASP kbar → ASE eV/Å³", frames[0].stress, -np.array(frame["stress"]) / 1602.1766208, "float32")
    assert frames[0].atoms.get_volume() == pytest.approx(80) and frames[0].atoms.pbc.all() and frames[0].energy == -3


def mptrj_like(path: Path, materials: int, seed: int = 0) -> Path:
    """A file in the layout of MPtrj: random crystals, random labels."""
    rng, content = np.random.default_rng(seed), {}
    for m in range(materials):
        for f in range(rng.integers(1, 4)):
            n = int(rng.integers(1, 6))
            sites = [{"species": [{"element": str(rng.choice(["Li", "O", "Fe"])), "occu": 1}], "xyz": xyz} for xyz in (4 * rng.random((n, 3)) + 5 * np.eye(3)[rng.integers(3, size=n)]).tolist()]
            content.setdefault(f"mp-{m}", {})[f"mp-{m}-{f} [}}{{\"\u00e5"] = {
                "structure": {"lattice": {"matrix": (10 * np.eye(3)).tolist()}, "sites": sites}, "corrected_total_energy": float(-3 * n - rng.random()),
                "uncorrected_total_energy": -1.0, "force": rng.normal(size=(n, 3)).tolist(), "stress": [[1, 2, 3], [2, 4, 5], [3, 5, 6]], "magmom": None}
    path.write_text(json.dumps(content))
    return path


def test_streaming_differs_from_reading_at_once(tmp_path):
    text = mptrj_like(tmp_path / "m.json", 5).read_text()
    want = [([material, key], frame) for material, frames in json.loads(text).items() for key, frame in frames.items()]
    for size in (1, 7, 100, 2 ** 20):
        with open(tmp_path / "m.json", encoding="utf-8") as file:
            assert [(list(keys), frame) for keys, frame in train_small.stream(file, size)] == want, size
    for cut in (5, len(text) // 2, len(text) - 1):
        (tmp_path / "cut.json").write_text(text[:cut])
        with open(tmp_path / "cut.json", encoding="utf-8") as file, pytest.raises((json.JSONDecodeError, EOFError)):
            list(train_small.stream(file, 50))


def test_converted_file_differs_or_half_a_cache_is_used(tmp_path, monkeypatch):
    path = mptrj_like(tmp_path / "m.json", 12)
    plain = train_small.read((str(path),))
    monkeypatch.setattr(train_small, "CACHED", 0)
    monkeypatch.setattr(train_small, "BLOCK", 4)
    with monkeypatch.context() as broken:
        broken.setattr(train_small.Path, "rename", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_small.read((str(path),))

    def compare(frames):
        assert len(frames) == len(plain) and [f.name for f in frames] == [f.name for f in plain]
        for a, b in zip(frames, plain):
            assert a.atoms == b.atoms and a.energy == b.energy and a.material == b.material
            same("labels", np.concatenate([a.forces, a.stress]), np.concatenate([b.forces, b.stress]), "exact")
    mapped = train_small.read((str(path),))
    assert isinstance(mapped.tables[0][1]["positions"], np.memmap)
    compare(mapped)
    with mock.patch.object(train_small, "convert", side_effect=AssertionError("converted twice")):
        compare(train_small.read((str(path),)))
    cache, = (folder for folder in tmp_path.glob("m.json.cache*") if "part" not in folder.name)
    Path(f"{cache}.part1").mkdir()  # what a killed conversion leaves
    os.truncate(cache / "energy", 8)  # as a full disk or a bad copy would leave it
    compare(train_small.read((str(path),)))
    mptrj_like(path, 12, seed=1)  # another file under the same name
    assert train_small.read((str(path),))[0].energy != plain[0].energy
    assert not list(tmp_path.glob("*part*")), "rubbish is left"


def test_structures_in_a_list_lose_their_units(tmp_path):
    structure = {"lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 5]]}, "sites": [{"species": [{"element": "Si", "occu": 1}], "abc": [0, 0.25, 0.4]}]}
    labels = {"energy": -3.0, "forces": [[0, 0, 1]], "virial_stress": [10, 20, 30, 1, 2, 3]}  # xx yy zz xy yz zx
    (tmp_path / "l.json").write_text(json.dumps([{"structure": structure, "outputs": labels}, {"structure": structure, **labels}]))
    for frame in train_small.read((str(tmp_path / "l.json"),)):
        same("VASP kbar → ASE eV/Å³", frame.stress, -np.array([[10, 1, 3], [1, 20, 2], [3, 2, 30]]) / 1602.1766208, "float32")
        same("positions", frame.atoms.positions, [[0, 1, 2]])
    for name, wrong, message in (("energy", "total", "has no total; it has structure, "), ("energy", "", None)):
        s = train_small.Settings(**{name: wrong})
        if message:
            with pytest.raises(train_small.BadInput, match=f"l.json, frame 0: {message}"):
                train_small.read((str(tmp_path / "l.json"),), s)
    structure["sites"][0]["species"].append({"element": "C", "occu": 0.5})
    (tmp_path / "l.json").write_text(json.dumps([{"structure": structure, **labels}]))
    with pytest.raises(train_small.BadInput, match="several elements"):
        train_small.read((str(tmp_path / "l.json"),))


@pytest.mark.parametrize("name", ["data.traj", "data.db", "data.extxyz.gz", "data*.extxyz"])
def test_format_loses_frames_or_labels(name, tmp_path):
    want = train_small.read((labelled(tmp_path),))
    images = ase.io.read(tmp_path / "data.extxyz", ":")
    if "*" not in name:
        for atoms in images:
            atoms.set_constraint(FixAtoms([0]))  # must not set labels to zero
        ase.io.write(tmp_path / name, images)
    frames = train_small.read((str(tmp_path / name),))
    for a, b in zip(frames, want, strict=True):
        same("labels", np.concatenate([a.forces, a.stress]), np.concatenate([b.forces, b.stress]), "float32")
        same("energy", [a.energy], [b.energy])
        assert np.abs(a.forces[0]).max() > 0 and a.stress is not None


def test_other_names_of_labels_are_not_found(tmp_path):
    frames = ase.io.read(labelled(tmp_path), ":")
    want = [(a.get_potential_energy(), a.get_forces(), a.get_stress(voigt=False)) for a in frames]
    for atoms, (energy, forces, stress) in zip(frames, want):
        atoms.calc = None
        atoms.info.update(REF_energy=energy, REF_virial=-atoms.get_volume() * stress)
        atoms.arrays["REF_forces"] = forces
    ase.io.write(tmp_path / "ref.extxyz", frames)
    s = train_small.Settings(energy="REF_energy", forces="REF_forces", stress="REF_virial")
    for frame, (energy, forces, stress) in zip(train_small.read((str(tmp_path / "ref.extxyz"),), s), want):
        same("labels", np.concatenate([frame.forces, frame.stress]), np.concatenate([forces, stress]), "float32")
    with pytest.raises(train_small.BadInput, match="frame 0: has no energy.*--energy"):
        train_small.read((str(tmp_path / "ref.extxyz"),))


def test_suspicious_labels_pass_without_a_word(tmp_path):
    def labels(atoms, energy, push=0.0):
        atoms, forces, stress = atoms.copy(), atoms.get_forces(), atoms.get_stress()
        forces[0] += push
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
        return atoms
    crystals = []
    for i in range(12):
        atoms = ase.build.bulk("Cu", cubic=True) * (1 + i % 3, 1, 1)
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        crystals.append(labels(atoms, atoms.get_potential_energy() - 3.5 * len(atoms)))
    assert not train_small.suspicions(packed(crystals))
    wrong = [labels(atoms, atoms.get_potential_energy() / len(atoms)) for atoms in crystals]
    assert ["per atom" in text for text in train_small.suspicions(packed(wrong))] == [True]
    text, = train_small.suspicions(packed([labels(atoms, atoms.get_potential_energy(), float(i == 5)) for i, atoms in enumerate(crystals)]))
    assert "1 of 12 frames" in text and "here, frame 5" in text and "sum to zero" in text


def test_reference_energies_are_not_those_of_free_atoms():
    rng, crystals = np.random.default_rng(0), []
    for _ in range(9):
        atoms = Atoms(rng.choice(["Cu", "O"], 6), rng.random((6, 3)), cell=[4, 4, 4], pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=float(np.where(atoms.numbers == 8, -5.0, -3.0).sum()), forces=np.zeros((6, 3)), stress=np.zeros(6))
        crystals.append(atoms)
    numbers = np.array([8, 29])
    same("fit", train_small.reference_energies(packed(crystals), numbers, {}), [-5.0, -3.0], "differences")
    same("given", train_small.reference_energies(packed(crystals), numbers, {29: -1.0})[1], -1.0, "exact")
    free = Atoms("O")
    free.calc = SinglePointCalculator(free, energy=-1.5, forces=np.zeros((1, 3)))
    same("free atom", train_small.reference_energies(packed([*crystals, free]), numbers, {})[0], -1.5, "exact")
    alike = [crystals[0]] * 3
    assert np.isfinite(train_small.reference_energies(packed(alike), numbers, {})).all()


def test_unknown_element_is_tested_on(tmp_path):
    path, other = labelled(tmp_path), tmp_path / "other.extxyz"
    images = ase.io.read(path, ":")
    images[7].symbols[2] = "Zn"
    ase.io.write(other, images)
    with pytest.raises(train_small.BadInput, match="other.extxyz, frame 7: holds Zn, which the training set"):
        train_small.main(train_small.Settings(train=(path,), test=(str(other),), steps=1), out=tmp_path / "runs")


# ─── Runs that are stopped ─────────────────────────────────────────────────────────────────────────────────────────────

SHORT = dict(channels=8, batch_atoms=16, threads=1, workers=0)


def outcome(folder: Path) -> tuple:
    """Weights, and what metrics.csv says but for the times."""
    rows = list(csv.reader(open(folder / "metrics.csv")))
    kept = [i for i, name in enumerate(rows[0]) if name not in ("seconds", "structures_per_s")]
    return {name: w.tolist() for name, w in facet.load(folder / "model.pt").state_dict().items()}, [[row[i] for i in kept] for row in rows]


def killed_again_and_again(settings: "train_small.Settings", out: Path, waits) -> set[int]:
    """Start the run, or go on with it, and kill it some time after it wrote its first checkpoint; then let it end.

    Returns the steps of the checkpoints that the kills left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_small"])
    folder, path, left = out / settings.name, out / settings.name / "checkpoint.pt", set()
    for wait in [*waits, None]:
        before = path.stat().st_mtime_ns if path.exists() else None
        process = context.Process(target=train_small.main, args=(settings, "", out, folder if before else None))
        process.start()
        while wait is not None and process.is_alive() and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.001)
        process.join(wait)
        if wait is not None:
            assert process.exitcode is None, "the run ended before it was killed"
            process.kill()
            process.join()
            left.add(train_small.checkpoint(folder)["step"])
    assert process.exitcode == 0
    return left


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_run_loses_or_repeats_something(tmp_path, monkeypatch):
    """SIGKILL at 20 random moments, many of them in the midst of writing: a checkpoint is written at every step."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # for the fork server
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: other numbers of threads round otherwise
    path, rng = labelled(tmp_path), np.random.default_rng(0)
    s = train_small.Settings(train=(path,), steps=300, save_minutes=1e-9, name="a", **SHORT)
    train_small.main(s, out=tmp_path / "whole")
    assert len(killed_again_and_again(s, tmp_path / "killed", rng.uniform(0, 0.3, 20))) >= 10
    folder = tmp_path / "killed" / "a"
    weights, metrics = outcome(folder)
    wanted, metrics_wanted = outcome(tmp_path / "whole" / "a")
    assert metrics == metrics_wanted and len(metrics) == 21
    assert weights == wanted
    assert not list(folder.glob("*.part"))


def test_resumed_run_is_another_run(tmp_path):
    """12 steps = 5 steps, Ctrl-C, 7 steps, to the last bit; and what may not change does not."""
    s, out = train_small.Settings(train=(labelled(tmp_path),), steps=12, name="a", **SHORT), tmp_path / "runs"
    train_small.main(s, out=tmp_path / "whole")
    step, handler = train_small.Weights.step, signal.getsignal(signal.SIGINT)  # a shell may have started this with Ctrl-C ignored

    def interrupted(self, schedule, number):
        step(self, schedule, number)
        if number == 5:
            signal.raise_signal(signal.SIGINT)
    with mock.patch.object(train_small.Weights, "step", interrupted), pytest.raises(KeyboardInterrupt):
        train_small.main(s, out=out)
    assert signal.getsignal(signal.SIGINT) is handler
    assert train_small.checkpoint(out / "a")["step"] == 6, "the step that was under way is ended, and one more"
    train_small.main(s, out=out, resume=out / "a")
    assert outcome(out / "a") == outcome(tmp_path / "whole" / "a")
    train_small.main(replace(s, seed=1), out=tmp_path / "control")
    assert outcome(tmp_path / "control" / "a")[0] != outcome(out / "a")[0]
    frames = ase.io.read(s.train[0], ":")
    ase.io.write(s.train[0], frames[1:])
    with pytest.raises(train_small.BadInput, match="not the one that this run began with"):
        train_small.main(s, out=out, resume=out / "a")


def test_resume_takes_what_it_cannot_use(tmp_path):
    def ends(*arguments):
        done = subprocess.run([sys.executable, HERE / "train_small.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]
    assert "no such folder" in ends("--resume", "nowhere")
    (tmp_path / "a").mkdir()
    assert "no checkpoint.pt" in ends("--resume", "a")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"rubbish")
    assert "is damaged" in ends("--resume", "a")
    assert "--lr cannot be changed" in ends("--resume", "a", "--lr", "1e-3")
    (tmp_path / "runs").write_text("a file where a folder should be")
    assert ends("--steps", "1").startswith("error: ")


def test_full_disk_ends_in_a_traceback_or_damage(tmp_path, monkeypatch):
    s, out = train_small.Settings(train=(labelled(tmp_path),), steps=40, name="a", **SHORT), tmp_path / "runs"
    syncs, fsync = 0, os.fsync

    def full(descriptor):
        nonlocal syncs
        syncs += 1
        if syncs > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)
    with monkeypatch.context() as broken, pytest.raises(train_small.BadInput, match="cannot be written .No space left.*--resume .*runs/a"):
        broken.setattr(os, "fsync", full)
        train_small.main(s, out=out)
    assert 0 < train_small.checkpoint(out / "a")["step"] < 40
    train_small.main(s, out=out, resume=out / "a")
    train_small.main(s, out=tmp_path / "whole")
    assert outcome(out / "a") == outcome(tmp_path / "whole" / "a")


def test_nan_is_trained_on(tmp_path, monkeypatch):
    path, right = labelled(tmp_path), train_small.losses
    bad = train_small.read((path,))[3].energy

    def losses(model, batch, target, huber):
        return right(model, batch, target, huber) * (float("nan") if (target["energy"] == bad).any() else 1)
    monkeypatch.setattr(train_small, "losses", losses)
    with pytest.raises(train_small.BadInput, match="the loss became nan or infinite at step .*because of .*data.extxyz, frame 3;") as error:
        train_small.main(train_small.Settings(train=(path,), test=(path,), steps=9, **SHORT), out=tmp_path / "runs")
    assert "frame 2" not in str(error.value) and "frame 4" not in str(error.value)
    monkeypatch.setattr(train_small, "losses", lambda *a: right(*a) * float("inf"))
    with pytest.raises(train_small.BadInput, match="because of"):
        train_small.main(train_small.Settings(train=(path,), test=(path,), steps=9, **SHORT), out=tmp_path / "runs")


def test_overfitting_on_purpose_takes_all_frames(tmp_path, capsys):
    result = train_small.main(train_small.Settings(train=(labelled(tmp_path),), overfit=2, steps=150, **SHORT), out=tmp_path / "runs")
    assert "2 structures to train on, 2 to test; 8 atoms" in capsys.readouterr().out
    assert result["force_mae_eV_per_A"] < 0.1 * result["baselines"]["constant per species"]["force_mae_eV_per_A"]


def test_two_processes_train_another_model(tmp_path):
    """torchrun with two processes and one process: the same batches, so the same losses and the same steps."""
    path = labelled(tmp_path)
    words = ["train_small.py", "--train", path, "--steps", "20", "--channels", "8", "--batch_atoms", "28", "--threads", "1"]
    for name, start in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        done = subprocess.run([*start, HERE / words[0], *words[1:], "--name", name], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    (one, rows), (two, rows2) = (outcome(tmp_path / "runs" / name) for name in ("one", "two"))
    assert len(list((tmp_path / "runs").iterdir())) == 2 and "2 processes" in done.stdout and done.stdout.count("time in training") == 1
    first, first2 = (dict(zip(r[0], map(float, r[1]))) for r in (rows, rows2))
    for key in ("loss_energy", "loss_forces", "loss_stress", "gradient"):
        same(key, first2[key] / first[key], 1.0, "float32")
    for name in one:
        same(name, two[name], one[name], "bfloat16")
    differ("weights of another run", facet.load(tmp_path / "runs" / "one" / "model.pt").embedding, facet.Facet(facet.load(tmp_path / "runs" / "one" / "model.pt").config).embedding)


@pytest.mark.parametrize("arguments, message", [
    (["--trian", "x"], "unrecognized arguments: --trian"), (["--lr", "fast"], "invalid float value: 'fast'"), (["--lr", "-1"], "must be positive"),
    (["--test", "x"], "--test without --train"), (["--device", "cdua"], "no such device"), (["--train", "nowhere.extxyz"], "error: nowhere.extxyz: no such file")])
def test_wrong_command_runs(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, HERE / "train_small.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))


# ─── Shape comments ───────────────────────────────────────────────────────────────────────────────────────────────────

def commented(source: str) -> dict[tuple[str, int], tuple]:
    """(function, line) → what is assigned there (nothing: returned), the shapes that its comment claims, whether each element of a
    list has the one shape, and what shape the last round of a loop may have instead."""
    found, lines = {}, source.splitlines()
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            claim = re.search(r"  # ((?:\d × )?\[[^\]]*\](?:, \[[^\]]*\])*)(?! →)(.*)", lines[node.lineno - 1]) if isinstance(node, ast.stmt) else None
            if not claim or node.lineno != node.end_lineno or not isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
                continue
            if isinstance(node, ast.Expr):  # self.register_buffer("name", …)
                if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "self.register_buffer"):
                    continue
                targets = [f"self.{node.value.args[0].value}"]
            elif isinstance(node, ast.Return):
                targets = []
            else:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                targets = [ast.unparse(t) for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            shapes = re.findall(r"\[([^\]]*)\]", claim[1])
            shapes = shapes * int(claim[1][0]) if claim[1][0].isdigit() else shapes
            last = re.findall(r"the last \[([^\]]*)\]", claim[2])
            found[function.name, node.lineno] = targets, shapes, "for each" in claim[2], last
    return found


def fits(shape: tuple, claim: str, known: dict[str, int]) -> bool:
    """Does a shape fit the claim? A letter that is not known yet is from now on; dimensions of several words are their product."""
    dims = [d.strip() for d in claim.split(",")]
    if dims[0] == "...":
        dims, shape = dims[1:], shape[len(shape) - len(dims) + 1:]
    if len(dims) != len(shape):
        return False
    for dim, size in zip(dims, shape):
        if dim.startswith("≤ "):
            bound = known.get(dim[2:])
            if bound is not None and size > bound:
                return False
            continue
        words = re.sub(r"²", "**2", dim.replace("·", "*")).split(" ")
        names = {name for word in words for name in re.findall(r"[A-Za-z_]\w*", word)}
        if names & {"m1", "m2", "m3", "ghosts", "images"}:  # those of a loop, and ghosts, which become more from axis to axis
            continue
        if len(words) == 1 and dim not in known and re.fullmatch(r"\w+", dim) and not dim.isdigit():
            known[dim] = size
        elif names <= set(known) and np.prod([eval(word, {}, known) for word in words]) != size:
            return False
    return True


def check_shapes(source: str) -> int:
    """Run facet.py with sizes that differ from one another and compare what its comments say, line by line; the number of lines seen."""
    code, claims, wrong, seen = ModuleType("facet"), commented(source), [], set()
    documented = {min([node.lineno, *(d.lineno for d in node.decorator_list)]): ast.get_docstring(node) or ""
                  for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    sizes = dict(C=14, B=7, R=13, Z=17, T=4)

    def trace(frame, event, value, known, last):
        """Called before every line, and when a function returns: looks at the line before."""
        claim = claims.get((frame.f_code.co_name, last[0]))
        if claim and (event == "return") == (not claim[0]) and not (event == "return" and value is None):
            targets, shapes, each, of_last = claim
            known.update({k: v for k, v in frame.f_locals.items() if type(v) is int and re.fullmatch(r"[A-Z]\d?|fan_\w+|count|l_\w+|l\d", k)})
            values = [eval(t, frame.f_globals, frame.f_locals) for t in targets] if targets else [value] if len(shapes) == 1 or each else list(value)
            if each:
                values = [list(v) for v in values][0]
                shapes = shapes * len(values)
            elif len(shapes) == 2 and len(values) == 1:
                values, shapes = values, shapes[:1]
            for v, shape in zip(values, shapes):
                local = dict(known) if each else known
                if hasattr(v, "shape") and not any(fits(tuple(v.shape), one, local) for one in (shape, *of_last)):
                    wrong.append(f"line {last[0]}: # [{shape}], but {tuple(v.shape)} with {known}")
            seen.add(last[0])
        last[0] = frame.f_lineno

    def tracer(frame, event, argument):
        if frame.f_code.co_filename != "facet.py with other shapes" or frame.f_code.co_name.startswith("<"):
            return None
        known, last = dict(sizes), [frame.f_lineno]
        if "batch" in frame.f_locals and hasattr(frame.f_locals["batch"], "src"):
            batch = frame.f_locals["batch"]
            known.update(N=batch.src.shape[0], K=batch.src.shape[1], S=len(batch.volume))
        for name, shape in re.findall(r"(\w+) \[([^\]]*)\]", documented.get(frame.f_code.co_firstlineno, "")):
            argument = frame.f_locals.get(name)
            if hasattr(argument, "shape") and not fits(tuple(argument.shape), shape, known):
                wrong.append(f"docstring of {frame.f_code.co_name}: {name} [{shape}], but {tuple(argument.shape)}")

        def local(frame, event, value):
            if event in ("line", "return"):
                trace(frame, event, value, known, last)
            return local
        return local
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        exec(compile(source, "facet.py with other shapes", "exec"), code.__dict__)
        for activation in ("product", "silu"):
            config = code.Config(tuple(chemical_symbols[1:18]), 3.5, 2, 14, 4, 7, 13, activation=activation)
            model = code.Facet(config)
            crystals = [TRICLINIC.copy(), ase.build.bulk("Si", cubic=True), ase.build.bulk("Al") * (1, 1, 3)]
            for atoms in crystals:
                atoms.symbols = ["Si"] * len(atoms)
            code.evaluate(model, [code.find_neighbours(atoms, config) for atoms in crystals])
            model(code.make_batch([code.find_neighbours(atoms, config) for atoms in crystals], 3.5), training=True)["forces"].square().sum().backward()
        code.relax(model, crystals[1:2], steps=2)
    finally:
        sys.settrace(before)
    assert not wrong, f"{len(wrong)} wrong shape comments: " + "; ".join(dict.fromkeys(wrong))
    assert len(seen) >= 0.85 * len([c for (name, _), c in claims.items() if name not in ("self_check", "rotation_of_rows", "gaunt")]), "lines never run"
    return len(seen)


def test_shape_comments_are_wrong():
    source = Path(facet.__file__).read_text(encoding="utf-8")
    glossary = set(re.findall(r"(?:^ {4}|  )([A-Z])  \S", facet.__doc__.partition("Glossary")[2].partition("Conventions")[0], re.M))
    letters = {letter for _, shapes, *_ in commented(source).values() for shape in shapes for letter in re.findall(r"\b[A-Z]\b", shape)}
    assert letters <= glossary and len(letters) > 10, f"not in the glossary: {letters - glossary}"
    print(check_shapes(source), "shape comments hold")
    for right, lie in (("  # [N, m2 m1, C]", "  # [N, C, m2 m1]"), ("  # [N B, m2, m1 c]", "  # [N, m2, m1 c]"), ("  # [S, 3, 3]\n        stress", "  # [N, 3, 3]\n        stress"),
                       ("  # [N, K, 3] padding", "  # [K, N, 3] padding"), ("  # [N B, K]", "  # [N, K]"), ("  # [N+Z]\n", "  # [N]\n"), ("# [A, X]", "# [X, A]")):
        assert right in source
        with pytest.raises(AssertionError, match="wrong shape comments"):
            check_shapes(source.replace(right, lie))


def test_file_is_too_long_for_one_sitting():
    source = Path(facet.__file__).read_text(encoding="utf-8")
    functions = [node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert len(source.splitlines()) <= 800 and max(functions) <= 50 and np.median(functions) <= 20


# ─── README ────────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGES = [HERE / "README.md", HERE / "benchmarks" / "README.md", HERE / "benchmarks" / "exercises" / "README.md"]


def test_readme_code_does_not_run_or_prints_something_else(trained, monkeypatch, capsys):
    """What stands behind an arrow is what the block prints."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 10
    monkeypatch.chdir(trained)
    for block in blocks:
        with torch.random.fork_rng(devices=[]):
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
        printed, promised = capsys.readouterr().out.splitlines(), re.findall(r"# → (.*)", block)
        assert not promised or [line.strip() for line in printed] == promised, f"{printed} instead of {promised} in\n{block}"
        assert promised or "runs/emt" in block, f"prints what nobody checks:\n{block}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_links_lead_nowhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for image, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
            assert not image or len(words) > 20, f"{page}: {target} needs an alternative text"
            file, _, place = target.partition("#")
            path = page.parent / file if file else page
            assert "://" in file or path.exists(), f"{page}: {target}"
            if re.fullmatch(r"L\d+", place):
                line = path.read_text(encoding="utf-8").splitlines()[int(place[1:]) - 1]
                named = line.startswith((f"# ─── {words} ", f"class {words.strip('`')}("))
                assert named or place == "L1", f"{page}: {target} is not {words}, but {line}"
            elif place and "://" not in file:
                assert place in anchors(path), f"{page}: {target}"


def test_readme_pictures_are_missing_or_have_no_words():
    """Each picture is there for light and dark pages and has an alternative text; none is left over, but for those made on a GPU."""
    text = PAGES[0].read_text(encoding="utf-8")
    pictures = re.findall(r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="figures/(\w+)_dark.png"><img src="figures/(\w+).png" alt="(.+?)"></picture>', text)
    assert len(pictures) == text.count("<img") == text.count("<picture>") > 10
    for dark, light, words in pictures:
        assert dark == light and len(words) > 20, (dark, light, words)
    there = {path.stem for path in (HERE / "figures").glob("*.png") if "_cuda" not in path.stem}
    assert there == {light + suffix for _, light, _ in pictures for suffix in ("", "_dark")}


def test_readme_names_an_option_that_does_not_exist():
    """Of train_small.py in the README, of every script in the commands of the other pages."""
    known = {f"--{name}" for name in train_small.Settings.__dataclass_fields__} | {"--resume", "--help"}
    text = PAGES[0].read_text(encoding="utf-8").partition("## Train on your own data")[2].partition("## Relax a crystal")[0]
    told = set(re.findall(r"`(--\w+)", text)) | {option for line in text.splitlines() for option in re.findall(r"--\w+", line.partition("train_small.py")[2])}
    assert len(told) > 10 and told <= known, told - known
    for script, rest in re.findall(r"benchmarks/(\w+\.py)([^`|]*)`", PAGES[1].read_text(encoding="utf-8")):
        source = (HERE / "benchmarks" / script).read_text(encoding="utf-8")
        options = set(re.findall(r'"(--\w+)"', source)) | ({"--mace", "--sevenn", "--nequip"} if 'f"--{peer}"' in source else set())
        assert set(re.findall(r"--\w+", rest)) <= options, (script, rest)


def test_readme_names_a_function_that_does_not_exist():
    """The table of equations: each has a function here, one in the reference, a test, and all of facet.py's sections are there."""
    rows = re.findall(r"^\| \*\*.*$", PAGES[0].read_text(encoding="utf-8"), re.M)
    for row in rows:
        for kind, module in {"facet": facet, "reference": reference_numpy, "test": sys.modules[__name__]}.items():
            names = [name for line in re.findall(rf"{kind}: (.*?)(?:<br>| \|)", row) for name in re.findall(r"`(\w+)`", line)]
            assert names and all(hasattr(module, name) for name in names), (kind, names)
    assert {section for row in rows for section in re.findall("§(\\d)", row)} == set("12345678")


def test_readme_numbers_are_not_those_measured():
    """The accuracy table is what benchmarks/accuracy.py wrote, other tables what summary.py prints, captions what the results say."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (HERE / "benchmarks" / "results").glob("*.json")}
    assert all({"hardware", "versions", "command"} <= run.keys() for content in results.values() for run in content["made"] or [{}])
    text = PAGES[0].read_text(encoding="utf-8")
    for name, content in results["accuracy"]["sets"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        for key, digits in {"energy_mae_meV_per_atom": 2, "force_mae_eV_per_A": 4, "stress_mae_GPa": 2}.items():
            mean, std = content["summary"][key].values()
            assert f"| {mean:.{digits}f}" + f" ± {std:.{digits}f}" * (len(content["runs"]) > 1) + " |" in row, row
        assert f"| {round(np.mean([run['steps'] for run in content['runs']]))} |" in row, row
    done = subprocess.run([sys.executable, HERE / "benchmarks" / "summary.py"], capture_output=True, encoding="utf-8", check=True)
    tables = done.stdout.split("\n\n")
    assert len(tables) == 3 and len(tables[2].splitlines()) > 10
    for table, page in zip(tables, (PAGES[0], PAGES[0], PAGES[1])):
        assert len(table.splitlines()) > 5 and table.strip() in page.read_text(encoding="utf-8"), "run benchmarks/summary.py --write"
    assert f"Relaxation of {len(results['relax']['relaxations'])} crystals" in text
    silicon = results["ablations"]["answers"]["Si"]
    worse, mlp = silicon["linear only"]["steps"], silicon["MLP, edge-wise"]
    assert f"by {1000 * worse['difference']:.0f} ± {1000 * worse['spread']:.0f} meV/Å" in text
    assert round(1 / mlp["step"], 1) == 0.5 and round(1 / mlp["memory"], 1) == 0.2 and round(silicon["tensor product"]["step"], 1) == 1.1


def test_self_check_prints_an_error_or_not_what_the_readme_says():
    done = subprocess.run([sys.executable, HERE / "facet.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"\s+(\d\.\de[+-]\d+)"
    exact = [float(x) for x in re.findall(rf"(?:ProductGrid\s+26 points.*L = 2|energy|forces){number}", done.stdout)]
    slope, = (float(x) for x in re.findall(f"forces and stress{number}", done.stdout))
    assert len(exact) == 3 and max(exact) < TOL["rounding"], done.stdout
    assert slope < 10 * TOL["differences"], done.stdout  # of some 100 eV
    told, = re.findall(r"```text\n(Facet on .*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)

    def words(text):
        """All but the numbers that depend on rounding and on the machine."""
        return [re.sub(r"\s+", " ", re.sub(r"\d+\.\d\S*|threads: \d+|torch \S+", "…", line)).strip() for line in text.strip().splitlines()]

    def moments(text):
        return np.array([float(x) for line in re.findall(r"(?m)^    \w+ +(.*)$", text) for x in line.split()])
    assert words(done.stdout) == words(told)
    assert len(moments(told)) == 21 and np.allclose(moments(done.stdout), moments(told), atol=0.02)


# ─── Planted bugs ─────────────────────────────────────────────────────────────────────────────────────────────────────

CROSS = "torch.linalg.cross(torch.eye(3)[:, None], torch.eye(3)[None]).double()"  # l = 1 × l = 1 → l = 1, of odd parity
PLANTED = {  # what is broken: the test or check that must notice, its arguments, {code in facet.py: what replaces it}
    "src and dst swapped in the forces": (check_slopes, [TRICLINIC], {
        "g.sum(1).index_add(0, batch.src.flatten(), -g": "(-g.sum(1)).index_add(0, batch.src.flatten(), g"}),
    "sign of the stress": (check_slopes, [TRICLINIC], {"virial = vectors.mT @ g": "virial = -vectors.mT @ g"}),
    "volume with a sign": (check_slopes, [PINNED["left-handed"]], {"vectors, abs(np.linalg": "vectors, (np.linalg"}),
    "lost √(2l+1)": (test_harmonics_differ_from_scipy, [], {"sqrt((2 * l + 1) * (2 if m": "sqrt((2 if m"}),
    "lost √2 for m > 0": (check_rotation, [TRICLINIC], {"(2 if m else 1) *": "1 *"}),
    "spline that ends behind the cutoff": (test_energy_has_a_kink_at_the_cutoff, [{}], {
        "first_knot) / config.splines": "first_knot) / (config.splines - 1)"}),
    "wrong piece of the spline": (test_splines_differ_from_scipy, [], {"[4, 0, -6, 3]": "[4, 0, -6, 2]"}),
    "bias on l > 0": (check_rotation, [TRICLINIC], {"bmm(x.transpose(0, 1), W)": "bmm(x.transpose(0, 1), W).add(0.1)"}),
    "shift with the wrong sign": (check_neighbours, [TRICLINIC], {"[ghost] + shift @ cell": "[ghost] - shift @ cell"}),
    "columns as lattice vectors": (check_neighbours, [TRICLINIC], {"ghost] + shift @ cell": "ghost] + shift @ cell.T"}),
    "own images dropped": (check_neighbours, [PINNED["one atom and its images"]], {
        ' & (shift[pairs["j"]] == fold[pairs["i"]]).all(1)': ""}),
    "too few images": (check_neighbours, [TRICLINIC], {"int(np.ceil(reach[axis]))": "int(reach[axis])"}),
    "odd-parity coupling let in": (test_mirror_image_has_another_energy, ["triclinic"], {
        "% 2 == 0]": "% 2 == 0 or l1 == l2 == l3 == 1]",
        "return G * sqrt": f"return {CROSS} if l1 * l2 * l3 == 1 else G * sqrt"}),
    "mean over the actual neighbours": (test_energy_has_a_kink_at_the_cutoff, [{}], {
        "(self.scale * Y)[:, None]": "(Y / phi[:, 0, 0].ne(0).sum(1).clamp(min=1)[:, None, None])[:, None]"}),
    "mean over the padded neighbours": (test_padding_adds_something, [], {"(self.scale * Y)": "(Y / Y.shape[2])"}),
    "padding inside the cutoff": (check_batch, [TRICLINIC], {"[2 * cutoff, 0, 0]": "[0.5 * cutoff, 0, 0]"}),
    "neighbours in another crystal": (check_batch, [TRICLINIC], {"c.src + f for": "c.src for"}),
    "energies to another crystal": (check_batch, [TRICLINIC], {"crystal, energies)": "crystal.flip(0), energies)"}),
    "grid too coarse": (test_product_is_not_exact_or_needs_no_grid, [], {"least_degree = 3\n": "least_degree = 2\n"}),
    "gate from l = 1": (test_product_is_not_exact_or_needs_no_grid, [], {
        "x[:, 0], self.Ws": "x[:, x.shape[1] // 2], self.Ws"}),
    "core counted twice": (check_core, [], {"units.Bohr / 2 *": "units.Bohr *"}),
    "core of the wrong neighbour": (check_core, [], {"here[0][:, None] * here[0][src]": "here[0][:, None] ** 2 * (src >= 0)"}),
    "core with a kink": (test_atoms_fall_into_each_other, [], {".clamp(min=0) ** 3": ".clamp(min=0)"}),
    "reference energy forgotten": (test_isolated_atom_has_a_learned_energy, [], {" + self.E0[batch.species]": ""}),
    "skip connection blind to species": (check_ladder, [SMALL], {"self.a[species]": "self.a[species * 0]"}),
    "groups mixed up": (check_ladder, [SMALL], {"arange(B, device=r.device)[": "arange(B, device=r.device).flip(0)["}),
    "wrong second derivative": (test_sum_over_neighbours_has_a_wrong_derivative, [], {
        "(edge, h, index), NeighbourS": "(edge, h, index), -NeighbourS"}),
    "last row of a chunk lost": (test_sum_over_neighbours_has_a_wrong_derivative, [], {
        "slice(a, a + rows)": "slice(a, a + rows - 1)"}),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted(bug, monkeypatch):
    check, arguments, changes = PLANTED[bug]
    check(*arguments)
    source = Path(facet.__file__).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert source.count(old) == 1, f"facet.py should contain {old!r} once: bring this table up to date"
        source = source.replace(old, new)
    broken = ModuleType("facet")
    exec(compile(source, "broken facet.py", "exec"), broken.__dict__)
    monkeypatch.setattr(sys.modules[__name__], "facet", broken)
    monkeypatch.setattr(sys.modules[__name__], "build", cache(build.__wrapped__))  # builds no model of the right facet
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    assert "proves nothing" not in str(caught.value), "a control failed, not what it controls"
    print(f"\n{bug}: {check.__name__}: {caught.value}")


def test_planted_in_this_file(monkeypatch):
    """A helper may be wrong too: a transposed rotation."""
    right = wigner
    monkeypatch.setattr(sys.modules[__name__], "wigner", lambda R, L: right(R, L).T)
    with pytest.raises(AssertionError, match="features of layer"):
        check_rotation(TRICLINIC)
