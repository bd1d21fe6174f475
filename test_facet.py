"""Tests of facet.py with pytest and hypothesis, in float64, with every weight random and none zero.

    pytest                          profile "ci": the same examples every time
    FACET_PROFILE=fast pytest       a few examples; FACET_PROFILE=deep: many, and new ones every time
    pytest -s -k ladder             prints the largest difference to reference_numpy.py, stage by stage

What must hold stands in functions check_…(crystal, …) that raise AssertionError. The tests, each named after the mistake it
would catch, call them on random crystals and on pinned ones. The planted bugs at the end change one line of facet.py and
require that a named check then fails: they show that the checks can fail, and what each of those lines is for.
Every comparison goes through `same`, or for a control through `differ`; every tolerance stands in TOL with its reason.
"""
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import ase
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y
from sympy.physics.wigner import real_gaunt

import facet
import reference_numpy

THIS = sys.modules[__name__]  # where the planted bugs put a changed facet

common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("fast", max_examples=4, derandomize=True, **common)
settings.register_profile("ci", max_examples=16, derandomize=True, **common)
settings.register_profile("deep", max_examples=300, **common)
settings.load_profile(os.environ.get("FACET_PROFILE", "ci"))

TOL = {  # largest allowed difference, in units of the largest wanted value (of 1, if that is smaller)
    "exact": 0,             # the same numbers, to the last bit
    "rounding": 1e-10,      # the same sums in another order, float64, through three layers
    "formula": 1e-12,       # one formula against another, float64, no layers in between
    "differences": 1e-6,    # central differences; a third derivative may jump at a knot of a spline
    "float32": 3e-5,        # float32 has 7 digits, the layers and the sums over neighbours cost two of them
    "silu grid": 3e-6,      # SiLU is no polynomial: what the 47-degree rule leaves of it, through three layers
    "cutoff": 1e-3,         # at 1e-6 Å inside, the curvature has not quite gone; a jump would be a thousand times larger
    "drift": 1e-3,          # of the energy in 60 Verlet steps of 0.5 fs, as a part of the kinetic energy
    "control": 1e-2,        # what a control must at least differ by
}


def largest(got, want) -> tuple[float, tuple]:
    """Largest difference, in the units of TOL, and where it is. nan equals nan (stress without a volume), and nothing else."""
    got, want = (np.asarray(a.detach().cpu() if isinstance(a, torch.Tensor) else a, float) for a in (got, want))
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    error = np.where(np.isnan(got) & np.isnan(want), 0, np.abs(got - want)) / max(1, np.abs(want).max(initial=0))
    error = np.where(np.isnan(error), np.inf, error)
    return (error.max(), np.unravel_index(error.argmax(), error.shape)) if error.size else (0, ())


def same(what: str, got, want, tol: str) -> float:
    error, where = largest(got, want)
    assert error <= TOL[tol], f"{what}: differs by {error:.1e} at {tuple(map(int, where))}, allowed is {TOL[tol]:.0e} ({tol})"
    return error


def differ(what: str, got, want, tol: str = "control") -> None:
    error, _ = largest(got, want)
    assert error > TOL[tol], f"{what}: differs by only {error:.1e}, so this check proves nothing"


# ─── Crystals, rotations, models ───────────────────────────────────────────────────────────────────────────────────────

CUTOFF = 3.5
CONFIG = facet.Config(species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3, splines=12,
                      mean_neighbours=8.0, energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5))
MODELS = {
    "L=2": {}, "L=1, one layer": dict(degree=1, layers=1), "L=3, first knot": dict(degree=3, first_knot=1.0),
    "L=0": dict(degree=0), "L=4, two layers": dict(degree=4, layers=2, channels=4, groups=4),
    "silu": dict(activation="silu", grid_degree=47),
}


@cache
def built(module: ModuleType, dtype: torch.dtype, seed: int, config: tuple) -> "facet.Facet":
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = module.Facet(module.Config(**dict(config)), dtype)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                weights += 0.3 * torch.randn(weights.shape, dtype=torch.float64).to(dtype)
    return model


def build(dtype=torch.float64, seed=0, **changes) -> "facet.Facet":
    """A tiny model, the same for the same arguments; do not train it."""
    return built(facet, dtype, seed, tuple(asdict(replace(CONFIG, **changes)).items()))


def batch_of(model, *crystals):
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    return facet.make_batch(neighbours, model.config.cutoff, model.readout.dtype).to(model.readout.device)


def evaluate(model, *crystals) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in model(batch_of(model, *crystals)).items()}


def matrix(*rotation_vector, improper=False) -> np.ndarray:
    return Rotation.from_rotvec(rotation_vector).as_matrix() * (-1 if improper else 1)


GENERIC, IMPROPER = matrix(0.4, -1.1, 0.7), matrix(-1.3, 0.2, 0.9, improper=True)  # no multiples of 90° about anything
TRICLINIC = ase.Atoms("SiOCuSiO", cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]], pbc=True, positions=[
    [0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3], [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]])
HELIX = [(r * np.cos(a + 2.0944 * n), r * np.sin(a + 2.0944 * n), z + 1.6 * n)  # 3₁ screw axis, each atom off every other axis
         for r, a, z in ((1.1, 0.0, 0.0), (2.0, 0.6, 0.9)) for n in range(3)]


def with_cell(atoms: ase.Atoms, cell=None, pbc=True) -> ase.Atoms:
    return ase.Atoms(atoms.symbols, atoms.positions, cell=atoms.cell if cell is None else cell, pbc=pbc)


PINNED = {
    "triclinic": TRICLINIC,
    "left-handed": with_cell(TRICLINIC, TRICLINIC.cell.array[[1, 0, 2]]),
    "slab": with_cell(TRICLINIC, pbc=(True, True, False)),
    "slab without third vector": with_cell(TRICLINIC, TRICLINIC.cell.array * [[1], [1], [0]], (True, True, False)),
    "wire": with_cell(TRICLINIC, pbc=(False, True, False)),
    "molecule": with_cell(TRICLINIC, np.zeros((3, 3)), False),
    "far outside the cell": ase.Atoms("SiOCu", [[9.1, -7, 3], [-20, 0.3, 14], [0, 31, 2]], cell=TRICLINIC.cell, pbc=True),
    "isolated atom": ase.Atoms("O", [[0.3, 0.2, 0.1]]),
    "dimer at the cutoff": ase.Atoms("SiO", [[0, 0, 0], [0, 0, CUTOFF]]),
    "collinear": ase.Atoms("SiOCu", [[0, 0, 0], [0.6, 1.2, 1.1], [1.3, 2.6, 2.3833333]]),
    "planar": ase.Atoms("SiOCuO", [[0, 0, 0], [1.6, 0.2, 0], [0.4, 1.9, 0], [2.1, 2.2, 0]]),
    "one atom and its images": ase.Atoms("Cu", [[1, 1, 1]], cell=[[2.3, 0.2, 0], [0.1, 2.5, 0], [0.5, 0.4, 2.1]], pbc=True),
    "skewed": ase.Atoms("SiO", [[0, 0, 0], [1, 1.2, 1.1]], cell=[[2.6, 0, 0], [7.3, 2.5, 0], [-5.1, 6.4, 2.4]], pbc=True),
    "chiral": ase.Atoms("Si3O3", HELIX, cell=[[5.2, 0, 0], [-2.6, 4.503332, 0], [0, 0, 4.8]], pbc=True),
}


@st.composite
def crystals(draw) -> ase.Atoms:
    """1-12 atoms, 0-3 periodic axes (some of the others without a cell vector), any handedness, atoms outside the cell.

    Atoms lie near different points of a mesh whose planes are at least 1.7 Å apart, so they and their images keep 1.1 Å
    without a single rejected draw. Most cells are smaller than the cutoff.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    pbc = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    lengths = np.array(draw(st.tuples(*[st.floats(2.3, 6.5)] * 3)))
    a, b, c = draw(st.tuples(*[st.floats(-0.5, 0.5)] * 3))
    cell = lengths[:, None] * [[1, 0, 0], [a, 1, 0], [b, c, 1]] @ Rotation.random(rng=rng).as_matrix()
    if draw(st.booleans()):
        cell = cell[[1, 0, 2]]
    mesh = np.maximum(1, np.floor(1 / np.linalg.norm(np.linalg.inv(cell), axis=0) / 1.7)).astype(int)  # [3]
    sites = rng.permutation([*np.ndindex(*mesh)])[:draw(st.integers(1, 12))]  # [N, 3]
    images = rng.integers(-1, 2, sites.shape) * (pbc | draw(st.booleans()))
    positions = (sites / mesh + images) @ cell + rng.uniform(-0.15, 0.15, sites.shape)
    cell[~pbc & np.array(draw(st.tuples(*[st.booleans()] * 3)))] = 0
    return ase.Atoms(rng.choice(CONFIG.species, len(sites)), positions, cell=cell, pbc=pbc)


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


# ─── Symmetries ────────────────────────────────────────────────────────────────────────────────────────────────────────

def turned(values, R, order=1):
    """Vectors [..., 3] or, of order 2, matrices [..., 3, 3] after the rotation R."""
    return values @ R.T if order == 1 else R @ values @ R.T


def rotated(atoms: ase.Atoms, R) -> ase.Atoms:
    return ase.Atoms(atoms.symbols, turned(atoms.positions, R), cell=turned(atoms.cell.array, R), pbc=atoms.pbc)


def wigner(R, L: int) -> np.ndarray:
    """D with Y(R u) = D Y(u) for every u, by least squares over directions: no formula to get wrong. [(L+1)², (L+1)²]"""
    u = np.random.default_rng(0).normal(size=(300, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    before, after = (facet.harmonics(torch.from_numpy(a), L).numpy() for a in (u, turned(u, R)))
    return np.linalg.lstsq(before, after)[0].T


def features(model, atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """Output of every layer and of the parts of every layer: names → [N, M, C], and A of the densities as a list."""
    found, hooks = {}, []
    for t, layer in enumerate(model.layers):
        for part in ("density", "mix", "skip", "grid", ""):
            def keep(module, inputs, output, name=f"layer {t} {part}".strip()):
                found[name] = [a.detach().numpy() for a in output] if name.endswith("density") else output.detach().numpy()
            hooks.append(layer.get_submodule(part).register_forward_hook(keep))
    evaluate(model, atoms)
    for hook in hooks:
        hook.remove()
    return found


def same_crystal(before: dict, after: dict, tol="rounding", R=np.eye(3), order=slice(None)) -> None:
    """The results of a crystal, after it was rotated by R and its atoms were taken in another order."""
    same("energy", after["energy"], before["energy"], tol)
    same("energies", after["energies"], before["energies"][order], tol)
    same("forces", after["forces"], turned(before["forces"], R)[order], tol)
    same("stress", after["stress"], turned(before["stress"], R, order=2), tol)


def check_rotation(atoms, R, tol="rounding", **config):
    model = build(**config)
    same_crystal(evaluate(model, atoms), evaluate(model, rotated(atoms, R)), tol, R)


def check_features(atoms, R, tol="rounding", **config):
    model = build(**config)
    D = wigner(R, model.config.degree)
    before, after = features(model, atoms), features(model, rotated(atoms, R))
    for name, x in before.items():
        if not name.endswith("density"):
            same(name, after[name], np.einsum("ab,nbc->nac", D[:x.shape[1], :x.shape[1]], x), tol)


def check_translation(atoms, by):
    moved = atoms.copy()
    moved.translate(by)
    same_crystal(evaluate(build(), atoms), evaluate(build(), moved))


def check_permutation(atoms, order):
    same_crystal(evaluate(build(), atoms), evaluate(build(), atoms[order]), order=order)


def check_lattice(atoms, rng):
    """The same crystal in another cell: rows mixed by integers, an axis turned round, atoms moved by lattice vectors."""
    U, periodic = np.eye(3, dtype=int), np.flatnonzero(atoms.pbc)
    for _ in range(3):
        if len(periodic) > 1:
            i, j = rng.permutation(periodic)[:2]
            U[i] += rng.choice([-1, 1]) * U[j]
        if len(periodic):
            U[rng.choice(periodic)] *= -1
    other = with_cell(atoms, U @ atoms.cell.array, atoms.pbc)
    other.positions += rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc @ atoms.cell.array
    same_crystal(evaluate(build(), atoms), evaluate(build(), other))


def check_supercell(atoms, rng):
    times = np.where(atoms.pbc, rng.permutation([1, 2, 3]), 1)
    one, many = evaluate(build(), atoms), evaluate(build(), atoms.repeat(times))
    n = times.prod()
    same("energy", many["energy"], n * one["energy"], "rounding")
    same("energies", many["energies"], np.tile(one["energies"], n), "rounding")
    same("forces", many["forces"], np.tile(one["forces"], (n, 1)), "rounding")
    same("stress", many["stress"], one["stress"], "rounding")


def check_batch(atoms):
    several = [PINNED["chiral"], atoms, PINNED["isolated atom"], TRICLINIC, atoms]
    together, first = evaluate(build(), *several), 0
    for s, crystal in enumerate(several):
        own = slice(first, first := first + len(crystal))
        same_crystal(evaluate(build(), crystal), {name: a[s:s + 1] if name in ("energy", "stress") else a[own]
                                                  for name, a in together.items()})


def handedness(atoms) -> float:
    """A number that does not depend on orientation, but changes sign in a mirror: triple products of weighted sums."""
    dst, _, _, r = facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    sums = np.zeros((3, len(atoms), 3))
    for n in range(3):
        np.add.at(sums[n], dst, r * (CUTOFF - np.linalg.norm(r, axis=1, keepdims=True)) ** (n + 1))
    return np.einsum("na,na->n", np.cross(sums[0], sums[1]), sums[2]).sum()


def check_mirror(atoms):
    """No odd-parity coupling: a crystal and its mirror image have the same energy although they are not the same crystal."""
    mirror = np.diag([1, 1, -1]) @ GENERIC
    differ("handedness (0 if the crystal is not chiral)", handedness(atoms), 0)
    same("handedness of the mirror image", handedness(rotated(atoms, mirror)), -handedness(atoms), "formula")
    same("handedness after a rotation", handedness(rotated(atoms, GENERIC)), handedness(atoms), "formula")
    check_rotation(atoms, mirror)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("R", (GENERIC, IMPROPER), ids=("proper", "improper"))
def test_equivariance_only_for_the_default_config(name, R):
    tol = "silu grid" if name == "silu" else "rounding"
    check_rotation(TRICLINIC, R, tol, **MODELS[name])
    check_features(TRICLINIC, R, tol, **MODELS[name])


@everywhere
def test_orientation_in_space_matters(atoms, R, seed):
    check_rotation(atoms, R)


@everywhere
def test_features_mix_degrees_or_lose_parity(atoms, R, seed):
    check_features(atoms, R)


@everywhere
def test_place_in_space_matters(atoms, R, seed):
    check_translation(atoms, np.random.default_rng(seed).uniform(-20, 20, 3))


@everywhere
def test_order_of_atoms_matters(atoms, R, seed):
    check_permutation(atoms, np.random.default_rng(seed).permutation(len(atoms)))


@everywhere
def test_choice_of_cell_matters(atoms, R, seed):
    check_lattice(atoms, np.random.default_rng(seed))


@settings(max_examples=settings().max_examples // 2)
@everywhere
def test_energy_is_not_extensive(atoms, R, seed):
    check_supercell(atoms, np.random.default_rng(seed))


@everywhere
def test_crystals_of_a_batch_see_each_other(atoms, R, seed):
    check_batch(atoms)


@pytest.mark.parametrize("name", ("triclinic", "chiral", "molecule"))
def test_mirror_image_has_another_energy(name):
    check_mirror(PINNED[name])


def test_symmetry_checks_compare_constants():
    """Control of all of the above: what they compare does change, if it is not transformed along."""
    out, after = evaluate(build(), TRICLINIC), evaluate(build(), rotated(TRICLINIC, GENERIC))
    for name in ("forces", "stress"):
        differ(f"{name} of a rotated crystal", after[name], out[name])
    before, after = features(build(), TRICLINIC), features(build(), rotated(TRICLINIC, GENERIC))
    for t in range(2):
        for part in (" mix", " skip", " grid", "")[:4 if t else 1]:  # skip of the first layer has only scalars
            for l in (1, 2):
                x, y = (f[f"layer {t}{part}"][:, facet.degree(l)] for f in (before, after))
                differ(f"layer {t}{part}, degree {l}", y, x)
    differ("energies in another order", out["energies"][::-1], out["energies"])
    differ("strained crystal", evaluate(build(), with_cell(TRICLINIC, TRICLINIC.cell * 1.02))["energy"], out["energy"])
    stretched = rotated(TRICLINIC, np.diag([1, 1, 1.02]))
    differ("a matrix that is no rotation", evaluate(build(), stretched)["energy"], out["energy"])
    differ("a species changed", evaluate(build(), ase.Atoms("Si2CuSiO", TRICLINIC.positions, cell=TRICLINIC.cell,
                                                             pbc=True))["energy"], out["energy"])
    differ("the energies of a batch", evaluate(build(), TRICLINIC, PINNED["slab"])["energy"][::1], [out["energy"][0]] * 2)


# ─── Derivatives ───────────────────────────────────────────────────────────────────────────────────────────────────────

def slopes(model, changed, count: int, step=2e-5) -> np.ndarray:
    """Central differences of the energy of changed(n, ±step), n = 0 … count−1, all in one batch."""
    energy = evaluate(model, *(changed(n, sign * step) for n in range(count) for sign in (1, -1)))["energy"]
    return (energy[::2] - energy[1::2]) / (2 * step)


def check_forces(atoms, **config):
    model = build(**config)

    def moved(n, step):
        other = atoms.copy()
        other.positions.flat[n] += step
        return other
    forces = evaluate(model, atoms)["forces"]
    same("forces", forces, -slopes(model, moved, 3 * len(atoms)).reshape(-1, 3), "differences")
    differ("forces", forces, 0 * forces)


def check_stress(atoms, **config):
    model = build(**config)

    def strained(n, step):
        deform = np.eye(3)
        deform.flat[n] += step
        return rotated(atoms, deform)
    stress = evaluate(model, atoms)["stress"][0]
    same("stress", stress, slopes(model, strained, 9).reshape(3, 3) / abs(np.linalg.det(atoms.cell)), "differences")
    differ("stress", stress, 0 * stress)


@pytest.mark.parametrize("name", ("triclinic", "left-handed", "slab", "wire", "molecule", "skewed", "chiral"))
def test_forces_are_not_the_slope_of_the_energy(name):
    check_forces(PINNED[name])


@pytest.mark.parametrize("name", ("triclinic", "left-handed", "slab", "wire", "one atom and its images", "skewed", "chiral"))
def test_stress_is_not_the_slope_of_the_energy(name):
    check_stress(PINNED[name])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "L=2"])
def test_derivatives_only_for_the_default_config(name):
    check_forces(TRICLINIC, **MODELS[name])
    check_stress(TRICLINIC, **MODELS[name])


def check_cutoff(**config):
    """Energy, slope and curvature along a line on which an atom leaves the sight of another. Distances: cutoff + s."""
    model, direction = build(**config), np.array([2, -3, 6]) / 7

    def along(*s):
        out = evaluate(model, *(ase.Atoms("SiOCu", [[0, 0, 0], [-1.1, 1.2, -0.9], (CUTOFF + t) * direction]) for t in s))
        slope = -out["forces"].reshape(-1, 3, 3)[:, 2] @ direction
        return out["energy"], slope, np.diff(slope) / np.diff(s)
    inside, outside, control = along(-1.5e-6, -0.5e-6), along(0.5e-6, 1.5e-6), along(-0.6, -0.599)
    for n, name in enumerate(("energy", "slope", "curvature")):
        same(f"{name} just inside the cutoff", inside[n], outside[n], "cutoff")
        same(f"{name} outside", outside[n], along(0.5, 0.6)[n], "exact")
        differ(f"{name} well inside", control[n], outside[n][:len(control[n])])


@pytest.mark.parametrize("config", (dict(), dict(first_knot=1.2), dict(activation="silu")), ids=str)
def test_energy_has_a_kink_at_the_cutoff(config):
    check_cutoff(**config)


@pytest.mark.parametrize("first_knot", (0.0, 1.5))
@pytest.mark.parametrize("distance", (0.002, 0.03, 1.0))
@pytest.mark.parametrize("axis", ((0, 0, 1), (1, 0, 0), (2, -3, 6)), ids=str)
def test_derivatives_are_infinite_for_close_atoms(first_knot, distance, axis):
    model = build(first_knot=first_knot)
    dimer = ase.Atoms("SiO", [[0, 0, 0], distance * np.array(axis) / np.linalg.norm(axis)])
    batch = batch_of(model, dimer)
    hessian = torch.autograd.functional.hessian(lambda v: model.atomic_energies(batch._replace(vectors=v)).sum(), batch.vectors)
    out = model(batch, training=True)
    gradients = torch.autograd.grad(out["forces"].square().sum() + out["energy"].sum(), list(model.parameters()))
    for values in (out["energy"], out["forces"], hessian, *gradients):
        same("not finite", values.isfinite(), torch.ones_like(values), "exact")
    if distance > first_knot - 1:  # below, splines have run out
        differ("second derivatives", hessian, 0 * hessian)


def check_isolated():
    """An atom without neighbours has its reference energy and nothing else, alone, in a large cell, or just out of reach."""
    far = ase.Atoms("Cu", cell=[9.0, 8, 7], pbc=True)
    alone = [PINNED["isolated atom"], PINNED["dimer at the cutoff"], ase.Atoms("SiO", [[0, 0, 0], [0, 5.0, 1]]), far]
    E0 = [2.0, -1.0, 2.0, -1.0, 2.0, 0.5]
    for model in (build(), build(activation="silu"), build(degree=0)):
        for several in [[atoms] for atoms in alone] + [alone, [*alone, TRICLINIC]]:
            out, n = evaluate(model, *several), sum(map(len, several)) - (len(TRICLINIC) if TRICLINIC in several else 0)
            start = sum(map(len, alone[:alone.index(several[0])]))
            same("energies", out["energies"][:n], E0[start:start + n], "exact")
            same("forces", out["forces"][:n], np.zeros((n, 3)), "exact")
        same("stress", evaluate(model, far)["stress"], np.zeros((1, 3, 3)), "exact")
    differ("a dimer in reach", evaluate(build(), ase.Atoms("SiO", [[0, 0, 0], [0, 0, 2.0]]))["energies"], E0[1:3])


def test_isolated_atom_has_a_learned_energy():
    check_isolated()


def check_gradients():
    """The three sums over neighbours are each other's derivatives, to second order, however they are cut in chunks."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(6, (6, 4), generator=g)
    edge, h, D = (torch.randn(6, *shape, dtype=torch.float64, generator=g).requires_grad_() for shape in ((3, 4), (5,), (3, 5)))
    with mock.patch.object(facet, "chunks", lambda index, X: [slice(0, 4), slice(4, 9)]):
        for f, a, b in ((facet.NeighbourSum, edge, h), (facet.NeighbourDot, D, h), (facet.NeighbourSpread, D, edge)):
            for test in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                assert test(lambda a, b: f.apply(a, b, index), (a, b), raise_exception=False), f"{test.__name__} of {f.__name__}"
    whole = torch.einsum("amk,akx->amx", edge, h[index])
    for rows in (1, 4, 6):
        with mock.patch.object(facet, "chunks", lambda index, X: [slice(a, a + rows) for a in range(0, 6, rows)]):
            same(f"sum in chunks of {rows}", facet.NeighbourSum.apply(edge, h, index), whole, "formula")
            spread = facet.NeighbourSpread.apply(D, edge, index)
            same(f"spread in chunks of {rows}", spread, torch.autograd.grad(whole, h, D, retain_graph=True)[0], "formula")
    pieces = facet.chunks(torch.zeros(1000, 50, dtype=int), 300)
    assert len(pieces) > 3 and np.array_equal(np.r_[tuple(np.r_[:1000][p] for p in pieces)], np.r_[:1000]), "rows left out"


def test_sum_over_neighbours_has_a_wrong_derivative():
    check_gradients()


# ─── Neighbours and padding ────────────────────────────────────────────────────────────────────────────────────────────

def check_neighbours(atoms, cutoff=CUTOFF):
    """The same pairs as ASE's list, with the same shifts and vectors; a pair exactly at the cutoff adds nothing and may miss."""
    ours = facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    assert (np.diff(ours[0]) >= 0).all(), "not sorted by dst"
    for name, (i, j, S, r) in zip(("ours", "ase"), found := [ours, neighbor_list("ijSD", atoms, cutoff)]):
        inside = np.linalg.norm(r, axis=1) < cutoff - 1e-9
        order = np.lexsort((*S[inside].T, j[inside], i[inside]))
        found[name == "ase"] = [np.asarray(a)[inside][order] for a in (i, j, S, r)]
    for what, mine, theirs in zip(("dst", "src", "shift"), *found):
        same(what, mine, theirs, "exact")
    same("vectors", found[0][3], found[1][3], "formula")


@everywhere
def test_neighbour_is_missed_or_counted_twice(atoms, R, seed):
    check_neighbours(atoms, np.random.default_rng(seed).uniform(1.5, 6.0))


@pytest.mark.parametrize("pbc", product((False, True), repeat=3), ids=str)
@given(atoms=crystals().filter(lambda atoms: atoms.cell.rank == 3))
@example(atoms=TRICLINIC)
@example(atoms=PINNED["skewed"])
@example(atoms=PINNED["left-handed"])
def test_neighbours_along_the_wrong_axes(pbc, atoms):
    check_neighbours(with_cell(atoms, pbc=pbc))


def test_neighbour_check_sees_no_images():
    """Control: the pinned crystals have image neighbours, and an atom's own images among them."""
    i, j, S, _ = facet.neighbour_list(TRICLINIC.positions, TRICLINIC.cell.array, True, CUTOFF)
    assert S.any(1).sum() > 50 and (i == j).sum() > 3 and len(set(map(tuple, S))) > 10


def check_padding():
    """A crystal beside a denser one gets empty places; they change no energy, not by rounding, and receive no gradient."""
    model, sparse, dense = build(), PINNED["planar"], PINNED["skewed"]
    alone, batch = evaluate(model, sparse)["energies"], batch_of(model, sparse, dense)
    empty = (batch.vectors == torch.tensor([2 * CUTOFF, 0, 0])).all(-1)
    assert empty.sum() > 100 > 3 * len(sparse) >= (~empty[:len(sparse)]).sum()
    vectors = batch.vectors.clone().requires_grad_()
    energies = model.atomic_energies(batch._replace(vectors=vectors))
    gradient = torch.autograd.grad(energies.sum(), vectors, create_graph=True)[0]
    curvature = torch.autograd.grad(gradient.square().sum(), vectors)[0]
    same("energies beside a denser crystal", energies[:len(sparse)], alone, "formula")
    for what, values in (("gradient", gradient), ("curvature", curvature)):
        same(f"{what} at padding", values[empty], torch.zeros(int(empty.sum()), 3), "exact")
        differ(f"{what} at neighbours", values[~empty], torch.zeros(int((~empty).sum()), 3))


def test_padding_adds_something():
    check_padding()


# ─── Radial functions, harmonics, coupling, density, grid ──────────────────────────────────────────────────────────────

def check_splines():
    for first_knot in (0.0, 1.2):
        splines = build(first_knot=first_knot).splines
        c, h = splines.coefficients.detach().numpy(), (CUTOFF - first_knot) / 12
        theirs = BSpline(first_knot + h * np.arange(-6, 16), np.pad(c, ((3, 3), (0, 0))), 3)  # zeros: splines run out
        r = np.linspace(max(0, first_knot - 3 * h), CUTOFF, 997)
        same("splines", splines(torch.from_numpy(r)), theirs(r), "formula")
        beyond = torch.linspace(CUTOFF, 9, 50, dtype=torch.float64)
        same("splines beyond the cutoff", splines(beyond), torch.zeros(50, c.shape[1]), "exact")
        same("basis in the middle", splines.basis(torch.tensor([2.0, 2.1]).double()).sum(-1), [1, 1], "formula")
        differ("splines", theirs(r), 0 * theirs(r))


def test_splines_differ_from_scipy():
    check_splines()


def test_fit_does_not_fit_or_reports_another_error():
    splines, known = facet.RadialSplines(9, CONFIG), facet.RadialSplines(9, CONFIG)
    with torch.no_grad():
        known.coefficients += torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differ("coefficients before", splines.coefficients, known.coefficients)
    same("error of a function that splines can represent", splines.fit(known), torch.zeros(9), "formula")
    same("its coefficients", splines.coefficients, known.coefficients, "rounding")

    def wave(r):
        return torch.sin(torch.arange(1, 10) * r[:, None] * 2) * (CUTOFF - r[:, None]) ** 3
    r = torch.linspace(1.5, 3.4, 70, dtype=torch.float64)
    error = splines.fit(wave, r)
    same("reported error", error, (splines(r) - wave(r)).square().mean(0).sqrt(), "formula")
    differ("error of the fastest wave", error[-1], 0)
    assert error[0] < error[-1] / 10, "a slow wave fits better than a fast one"
    differ("coefficients after", splines.coefficients, known.coefficients)


def sphere(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre in z, equidistant angles: points [P, 3], weights [P] of sum 1; exact for polynomials below degree 2n."""
    z, weights = np.polynomial.legendre.leggauss(n)
    angle = np.arange(2 * n) * np.pi / n
    x, y = (np.sqrt(1 - z ** 2)[:, None] * f(angle) for f in (np.cos, np.sin))
    return np.stack([x, y, np.broadcast_to(z[:, None], x.shape)], -1).reshape(-1, 3), np.repeat(weights / 4 / n, 2 * n)


def check_harmonics(L=6):
    poles = np.vstack([np.eye(3), -np.eye(3)])
    points, weights = sphere(L + 1)
    u = np.vstack([points, poles])
    theta, angle, theirs = np.arccos(u[:, 2]), np.arctan2(u[:, 1], u[:, 0]), []
    for l in range(L + 1):
        for m in range(-l, l + 1):
            complex_ = np.sqrt(4 * np.pi) * (-1) ** m * sph_harm_y(l, abs(m), theta, angle)
            theirs.append(complex_.real if m == 0 else np.sqrt(2) * (complex_.real if m > 0 else complex_.imag))
    ours = facet.harmonics(torch.from_numpy(u), L).numpy()
    same("harmonics", ours, np.stack(theirs, -1), "formula")
    same("means of products", (ours[:-6].T * weights) @ ours[:-6], np.eye((L + 1) ** 2), "formula")
    same("degree 1", ours[:, 1:4], np.sqrt(3) * u[:, [1, 2, 0]], "formula")


def test_harmonics_differ_from_scipy():
    check_harmonics()


@pytest.mark.parametrize("degree", (3, 7, 9, 15))
def test_lebedev_rule_is_not_exact(degree):
    points, weights = facet.lebedev(degree)
    mean = weights @ facet.harmonics(points, degree)
    same("means of harmonics", mean, np.eye(len(mean))[0], "formula")
    differ("control: one even degree more", weights @ facet.harmonics(points, degree + 1), np.eye((degree + 2) ** 2)[0])


def check_coupling():
    """Against sympy's Gaunt coefficients, up to one factor for each (l1, l2, l3)."""
    for l1, l2, l3 in facet.paths(2, 2, 2) + [(1, 2, 3), (3, 3, 2)]:
        ms = (range(-l, l + 1) for l in (l1, l2, l3))
        theirs = np.array([float(real_gaunt(l1, l2, l3, *m)) for m in product(*ms)])
        ours = facet.gaunt(l1, l2, l3)
        same("sum of squares for each m3", ours.square().sum((0, 1)), torch.ones(2 * l3 + 1), "formula")
        theirs *= np.sqrt((2 * l3 + 1) / (theirs ** 2).sum())
        same(f"coupling {l1} {l2} {l3}", ours.flatten(), theirs, "formula")


def test_coupling_differs_from_sympy():
    check_coupling()
    assert set(facet.paths(2, 2, 2)) == {p for p in product(range(3), repeat=3) if sum(p) % 2 == 0 and 2 * max(p) <= sum(p)}


def check_density(degree=2):
    """Sum over neighbours first = couple edge by edge, then sum."""
    model, N, K, C = build(degree=degree), 5, 4, CONFIG.channels
    density, M, B, g = model.layers[1].density, (degree + 1) ** 2, CONFIG.groups, torch.Generator().manual_seed(1)
    h, phi, Y = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((N, M, C), (N, B, degree + 1, K), (N, M, K)))
    src = torch.randint(N, (N, K), generator=g)
    A = density(h, (src[:, None] * B + torch.arange(B)[:, None]).flatten(0, 1), phi, Y)
    for l3, found in enumerate(A):
        by_path = []
        for l1, l2, _ in (p for p in density.paths if p[2] == l3):
            radial = phi[:, :, l2].repeat_interleave(C // B, 1)  # [N, C, K]
            by_path.append(torch.einsum("nck,abd,nbk,nkac->ndc", radial, facet.gaunt(l1, l2, l3), Y[:, facet.degree(l2)],
                                        h[src][:, :, facet.degree(l1)]) / CONFIG.mean_neighbours ** 0.5)
        same(f"density of degree {l3}", found.view(N, 2 * l3 + 1, -1), torch.cat(by_path, -1), "formula")


@pytest.mark.parametrize("degree", (0, 1, 2, 3))
def test_swapped_sums_differ_from_edges(degree):
    check_density(degree)


def grid_error(L: int, R=GENERIC, **config) -> float:
    """How much it matters whether features are rotated before or after the grid layer, relative to the largest feature."""
    layer = build(degree=L, layers=2, **config).layers[0].grid
    x = torch.randn(9, (L + 1) ** 2, CONFIG.channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    D = torch.from_numpy(wigner(R, L))
    with torch.no_grad():
        before, after = layer(torch.einsum("ab,nbc->nac", D, x)), torch.einsum("ab,nbc->nac", D, layer(x))
        differ("the grid layer", layer(x), x)
    return largest(before, after)[0]


def check_grid():
    for L in (1, 2, 3, 4):
        for R in (GENERIC, IMPROPER):
            same(f"product on its default grid, L = {L}", grid_error(L, R), 0, "formula")
            same(f"product on a finer grid, L = {L}", grid_error(L, R, grid_degree=3 * L + 4), 0, "formula")
    for L in (2, 3, 4):
        differ(f"product on a grid that is too coarse, L = {L}", grid_error(L, grid_degree=3 * L - 2), 0)


def test_grid_layer_is_not_equivariant():
    check_grid()
    errors = [grid_error(2, activation="silu", grid_degree=degree) for degree in (7, 11, 15, 23, 35)]
    assert all(b < a / 3 for a, b in zip(errors, errors[1:])), f"SiLU's errors should fall with the degree: {errors}"
    same("silu on its default grid", grid_error(2, activation="silu"), errors[2], "exact")


# ─── The reference ladder ──────────────────────────────────────────────────────────────────────────────────────────────

def check_ladder(atoms, derivatives=False, **config) -> dict[str, float]:
    """Every stage against the NumPy reference; returns the largest difference of each."""
    model = build(**config)
    crystal = (asdict(model.config), {name: w.numpy() for name, w in model.state_dict().items()},
               list(atoms.symbols), atoms.positions, atoms.cell.array, atoms.pbc)
    want, found = reference_numpy.evaluate(*crystal), features(model, atoms)
    dst, src, shift, vectors = facet.neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    order, other = (np.lexsort((*s.T, j, i)) for i, j, s in ((dst, src, shift), (want["dst"], want["src"], want["shift"])))
    same("edges", np.c_[dst, src, shift][order], np.c_[want["dst"], want["src"], want["shift"]][other], "exact")
    r = torch.from_numpy(vectors)
    phi = model.splines(r.norm(dim=1)).reshape(want["phi"].shape)
    Y = facet.harmonics(r / r.norm(dim=1, keepdim=True), model.config.degree)
    ladder = {"vectors": same("vectors", vectors[order], want["vectors"][other], "formula"),
              "splines": same("splines", phi[order], want["phi"][other], "rounding"),
              "harmonics": same("harmonics", Y[order], want["Y"][other], "rounding")}
    for t in range(model.config.layers):
        pairs = zip(found[f"layer {t} density"], want["A"][t], strict=True)
        ladder[f"layer {t} density"] = max(same(f"layer {t} A", a.reshape(b.shape), b, "rounding") for a, b in pairs)
        for stage, name in ((" mix", "message"), (" skip", "skip"), ("", "h")):
            ladder[f"layer {t}{stage}"] = same(f"layer {t}{stage}", found[f"layer {t}{stage}"], want[name][t], "rounding")
    out = evaluate(model, atoms)
    ladder["energies"] = same("energies", out["energies"], want["energies"], "rounding")
    ladder["energy"] = same("energy", out["energy"][0], want["energy"], "rounding")
    if derivatives:
        ladder["forces"] = same("forces", out["forces"], reference_numpy.forces(*crystal), "differences")
        ladder["stress"] = same("stress", out["stress"][0], reference_numpy.stress(*crystal), "differences")
    return ladder


@pytest.mark.parametrize("name", MODELS)
def test_ladder_to_the_reference_breaks(name):
    small = ase.Atoms("SiO", [[0, 0, 0], [1.4, 1.1, 1.3]], cell=[[3.4, 0.2, 0], [0.6, 3.5, 0.3], [-0.4, 0.1, 3.3]], pbc=True)
    config = {**MODELS[name], **(dict(grid_degree=9) if name == "silu" else {})}  # fewer points: the reference is slow
    print(f"\n{name}: largest difference to reference_numpy.py")
    for stage, error in check_ladder(small, derivatives=name in ("L=1, one layer", "L=0"), **config).items():
        print(f"    {stage:16} {error:.1e}")


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
@example(atoms=PINNED["isolated atom"])
@example(atoms=PINNED["slab without third vector"])
def test_reference_differs_on_random_crystals(atoms):
    check_ladder(atoms, layers=2, channels=4, groups=2)
