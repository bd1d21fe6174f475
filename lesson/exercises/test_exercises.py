"""Checks of the exercises in README.md: of the reader's own facet.py, of the model solutions, and
of wrong ones.

    pytest -k exercise_03     your facet.py; skipped until it holds what exercise 3 asks for
    pytest -k solution_03     facet.py with solutions/03.patch applied in memory, by the same check
    pytest -k wrong_03        the solution with one line spoilt: the check must reject it

Exercises 1 to 16 change facet.py alone. 17 and 18 change tools/labels.py too: their checks run in a
copy of the whole tree, whose modules take the place of yours meanwhile.

What you call things is up to you: a check finds your work by what it does (LOOKED_FOR). All is in
float64, with random weights, none of them zero. Every comparison goes through `same`, or for a
control through `differ`; every tolerance stands in TOL with its reason.
"""
import ast
import copy
import csv
import inspect
import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_properties
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

import facet as yours
import tools.relax
from tools.properties import wigner

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

TOL = {  # largest allowed difference, in units of the largest wanted value (of 1, if smaller)
    "exact": 0,             # the same numbers, to the last bit
    "formula": 1e-12,       # one formula against another, float64, no layers in between
    "rounding": 1e-10,      # the same sums in another order, float64, through three layers
    "differences": 1e-6,    # central differences; a third derivative may jump at a knot of a spline
    "cutoff": 1e-4,         # 1e-6 Å inside, the curvature has not quite gone; a jump is above 1e-2
    "fit": 0.03,            # functions of size 1 that oscillate, fitted by twelve others
    "training": 0.2,        # fifty steps leave less than a twentieth of either loss
    "screen": 1e-4,         # four digits after the point
    "file": 1e-6,           # an extxyz file has eight digits
    "control": 1e-3,        # what a control must at least differ by
}

# No multiples of 90° about anything: a Lebedev grid has a cube's symmetry, they would prove nothing
ROTATION = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
REFLECTION = -Rotation.from_rotvec([-1.3, 0.2, 0.9]).as_matrix()

CUTOFF = 3.5
CONFIG = dict(species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3,
              splines=12, mean_neighbours=8.0, energy_scale=1.5,
              reference_energies=(-1.0, 2.0, 0.5))

CRYSTAL = Atoms(  # chiral
    "SiOCuSiO",
    positions=[[0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3], [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]],
    cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]],
    pbc=True,
)
MOLECULE = Atoms(CRYSTAL.symbols, CRYSTAL.positions)
ALONG_AXES = Atoms("SiOCuSi", [[0, 0, 0], [0, 0, 1.9], [2.1, 0, 0], [0, -2.3, 0]])
CHAIN = Atoms(  # an atom sees only those next to it
    "SiOCuSiO",
    [[0, 0, 0], [1.9, 0.6, 0.2], [3.7, 0.2, 0.9], [5.6, 0.8, 0.7], [7.5, 0.4, 1.3]],
)


# ─── Helpers ──────────────────────────────────────────────────────────────────────────────────────


def numbers(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach()
    return np.asarray(values, float)


def difference(got, want) -> float:
    got = numbers(got)
    want = numbers(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    error = np.nan_to_num(np.abs(got - want), nan=np.inf).max(initial=0)
    return error / max(1, np.abs(want).max(initial=0))


def same(what: str, got, want, tol: str = "rounding") -> None:
    error = difference(got, want)
    assert error <= TOL[tol], f"{what}: off by {error:.1e}, allowed {TOL[tol]:.0e} ({tol})"


def differ(what: str, got, want) -> None:
    error = difference(got, want)
    assert error > TOL["control"], f"{what}: differs by only {error:.1e}"


def new_model(facet, **changes):
    """A tiny model in float64, one and the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = facet.Facet(facet.Config(**CONFIG | changes), torch.float64)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                weights += 0.1 * torch.randn(weights.shape, dtype=torch.float64)
    return model.eval()


build = cache(new_model)  # copy what it gives before you change it


@cache
def usual_outputs(facet) -> dict[str, np.ndarray]:
    """What a model says of two crystals of 5 and 4 atoms."""
    return outputs(facet, build(facet), CRYSTAL, MOLECULE[:4])


def random_features(atoms: int, L: int, channels: int) -> torch.Tensor:
    """[N, M, C]"""
    values = np.random.default_rng(L).normal(size=(atoms, (L + 1) ** 2, channels))
    return torch.from_numpy(values)


def outputs(facet, model, *crystals) -> dict[str, np.ndarray]:
    """What the model says of a batch of crystals."""
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    batch = facet.make_batch(neighbours, CUTOFF, torch.float64)
    return {name: numbers(value) for name, value in model(batch).items()}


def rotated(atoms: Atoms, R) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions @ R.T, cell=atoms.cell.array @ R.T, pbc=atoms.pbc)


def check_rotation(facet, model, R) -> None:
    """Energies and forces turn with the crystal."""
    here = outputs(facet, model, CRYSTAL)
    there = outputs(facet, model, rotated(CRYSTAL, R))
    same("energies of the turned crystal", there["energies"], here["energies"])
    same("forces of the turned crystal", there["forces"], here["forces"] @ R.T)


def check_forces(calculate, atoms: Atoms, step: float = 1e-5) -> None:
    """calculate(atoms) → energy, forces. Moving every atom at random, by central differences."""
    push = np.random.default_rng(1).normal(size=(len(atoms), 3))  # [N, 3] Å
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions += sign * step * push
        energies.append(calculate(moved)[0])

    slope = -np.sum(calculate(atoms)[1] * push)
    differ("slope of the energy, and zero", slope, 0)
    same("forces against central differences", slope,
         (energies[0] - energies[1]) / (2 * step), "differences")


def check_model(facet, model) -> None:
    """What must hold whatever was changed: symmetry, and forces that are slopes of the energy."""
    for R in (ROTATION, REFLECTION):
        check_rotation(facet, model, R)

    def calculate(atoms):
        out = outputs(facet, model, atoms)
        return out["energy"].sum(), out["forces"]

    check_forces(calculate, CRYSTAL)


def check_end(splines) -> None:
    """Radial functions end at the cutoff with value, slope and curvature, and are 0 beyond it."""
    r = torch.tensor([CUTOFF - 1e-6, CUTOFF + 1e-6, 2 * CUTOFF, CUTOFF - 1], dtype=torch.float64,
                     requires_grad=True)
    derivative = splines(r)[:, 0]
    for name in ("value", "slope", "curvature"):
        same(f"{name} just inside the cutoff", derivative[0], 0, "cutoff")
        same(f"{name} beyond the cutoff", derivative[1:3], np.zeros(2), "exact")
        differ(f"{name} 1 Å inside the cutoff, and zero", derivative[3], 0)
        derivative, = torch.autograd.grad(derivative.sum(), r, create_graph=True)


def check_grid(facet, layer, L: int) -> None:
    """A grid layer commutes with rotations and reflections."""
    x = random_features(4, L, CONFIG["channels"])
    for R in (ROTATION, REFLECTION):
        turn = wigner(torch.from_numpy(R), L)  # [M, M]
        same(f"turned features after the grid layer, L = {L}", layer(turn @ x), turn @ layer(x))


def check_density(facet, kind, atoms: Atoms, degree: int) -> None:
    """A class that may stand for Density: the same numbers in every layer, without NeighbourSum.

    And the same energy and forces, so its gradients are right too.
    """
    model = copy.deepcopy(build(facet, degree=degree))
    degrees = ((0, degree), (degree, degree), (degree, 0))
    seen = []

    def keep(density, inputs, A):
        seen.append((inputs, A))

    for layer, (l_in, l_out) in zip(model.layers, degrees):  # even where the new class is in use
        layer.density = facet.Density(l_in, l_out, model.config).double()
        layer.density.register_forward_hook(keep)
    want = outputs(facet, model, atoms)

    with mock.patch.object(facet, "NeighbourSum", None):
        for t, (l_in, l_out) in enumerate(degrees):
            inputs, right = seen[t]
            density = kind(l_in, l_out, model.config).double()
            same(f"A of layer {t}", density(*inputs), right)
            rows = [(2 * l + 1) * Q for l, Q in enumerate(density.counts)]
            for l, A in enumerate(right.split(rows, 1)):
                differ(f"A of layer {t}, l = {l}, and zero", A, torch.zeros_like(A))
            model.layers[t].density = density
        got = outputs(facet, model, atoms)

    same("energy", got["energy"], want["energy"])
    same("forces", got["forces"], want["forces"])


def check_on_the_way(facet, model, name: str) -> None:
    """An output of each atom follows it through order, batch, calculator, relaxation and a file."""
    values = outputs(facet, model, CRYSTAL)[name]
    order = [3, 0, 4, 2, 1]
    same(f"{name} in another order", outputs(facet, model, CRYSTAL[order])[name], values[order])
    differ(f"{name} in a wrong order", values[::-1], values)

    pushed = CRYSTAL.copy()
    pushed.positions[1] += [0.1, -0.2, 0.1]
    after = outputs(facet, model, pushed)[name]
    differ(f"{name} after a neighbour has moved", after[0], values[0])

    graphs = [facet.find_neighbours(atoms, model.config) for atoms in (MOLECULE[:2], CRYSTAL)]
    results = facet.evaluate(model, graphs)
    same(f"{name} by evaluate, in a batch", results[1][name], values)

    atoms = CRYSTAL.copy()
    atoms.calc = facet.FacetCalculator(model, device="cpu", dtype=torch.float64)
    atoms.get_potential_energy()
    same(f"{name} in atoms.calc.results", atoms.calc.results[name], values)
    if name in all_properties:
        same(f"{name} by ASE", atoms.calc.get_property(name, atoms), values)

    with mock.patch.object(tools.relax, "facet", facet):
        relaxed, = tools.relax.relax(model, [CRYSTAL], fmax=1e-9, steps=2)
    differ("positions after two steps of relaxation", relaxed.positions, CRYSTAL.positions)
    same(f"{name} of the relaxed crystal", relaxed.calc.results[name],
         outputs(facet, model, relaxed)[name])
    ase.io.write(io.StringIO(), relaxed, format="extxyz")


# ─── The exercises: how your solution is found, and what it must do ───────────────────────────────


def your_basis(facet):
    """The radial functions of a model, where they are not the B-splines that facet.py came with.

    Returns them, and how many are not zero at a point in the middle of the axis.
    """
    splines = build(facet, first_knot=0.5).splines
    r = np.linspace(0.5, 1.2 * CUTOFF, 50)
    t = (r[:, None] - 0.5) * 12 / (CUTOFF - 0.5) - np.arange(-1, 11)
    bump = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    as_it_came = np.nan_to_num(bump(t))
    basis = numbers(splines.basis(torch.from_numpy(r)))
    if basis.shape == as_it_came.shape and np.abs(basis - as_it_came).max() < 1e-9:
        return None, 0

    middle = torch.tensor([2.0], dtype=torch.float64)
    return splines, int(np.count_nonzero(numbers(splines.basis(middle))))


def find_01(facet):
    splines, at_once = your_basis(facet)
    return splines if at_once > 4 else None


def check_01(facet, splines):
    """The Gaussians asked for, smooth at the cutoff, able to start as sine-Bessel functions."""
    r = np.linspace(0, 2 * CUTOFF, 301)
    t = (r[:, None] - 0.5) / (3 / 12) - np.arange(12)
    ending = np.where(r < CUTOFF, 1 - (r / CUTOFF) ** 2, 0)[:, None] ** 3
    same("Gaussians", splines.basis(torch.from_numpy(r)), np.exp(-t ** 2 / 2) * ending, "formula")

    fresh = type(splines)(9, facet.Config(**CONFIG))
    r = np.linspace(0.8, CUTOFF, 99)
    x = r[:, None] / CUTOFF
    n = np.repeat([1, 2, 3], 3)
    start = np.sqrt(5) / 2 * np.sin(n * np.pi * x) / x * (1 - x ** 2)
    same("functions at the start", fresh(torch.from_numpy(r)), start, "fit")

    check_end(splines)
    check_model(facet, build(facet, first_knot=0.5))


def functions_of_a_config(facet) -> dict:
    """What functions of one argument in facet.py return for a Config, if they take one."""
    returned = {}
    for name, function in inspect.getmembers(facet, inspect.isfunction):
        if len(inspect.signature(function).parameters) != 1:
            continue
        try:
            returned[name] = function(facet.Config(("Si",)))
        except Exception:
            continue
    return returned


def find_02(facet):
    for name, values in functions_of_a_config(facet).items():
        if isinstance(values, (dict, tuple, list)) and len(values) == 3:
            return getattr(facet, name)
    if facet.Config(("Si",)).degree == 3:
        return "nothing but the default"
    return None


def check_02(facet, cost):
    """L = 3 by default, exactly equivariant on its grid; the cost agrees with a count on paper."""
    assert facet.Config(("Si",)).degree == 3, "L = 3 is not the default yet"
    assert callable(cost), f"L = 3 is the default; but there is no {LOOKED_FOR[2]}"
    Z = 3
    C = CONFIG["channels"]
    T = CONFIG["layers"]
    B = CONFIG["groups"]
    R = CONFIG["splines"]

    for L, points in enumerate((1, 6, 26, 38, 74)):  # of the rules of degree 0, 3, 7, 9, 13
        ends = []
        for l1, l2, l3 in product(range(L + 1), repeat=3):
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0:
                ends.append((l1, l3))

        parameters = T * B * (L + 1) * R + Z * C + C
        for l_in, l_out in ((0, L), (L, L), (L, 0)):
            paths = sum(l1 <= l_in and l3 <= l_out for l1, l3 in ends)
            parameters += paths * C * C                                 # mix
            parameters += Z * C + (min(l_in, l_out) + 1) * C * C        # skip
            parameters += 3 * (l_out + 1) * C * C + C * C + C           # grid layer

        told = cost(facet.Config(**CONFIG | dict(degree=L)))
        told = sorted(told.values() if isinstance(told, dict) else told)
        want = sorted((points, len(ends), parameters))
        assert told == want, f"cost of L = {L}: {told}, not {want}"

    check_grid(facet, build(facet, degree=3).layers[0].grid, 3)
    with pytest.raises(AssertionError, match="turned features"):
        coarse = build(facet, degree=3, grid_degree=7)  # the 26 points of L = 2
        check_grid(facet, coarse.layers[0].grid, 3)
    check_rotation(facet, build(facet, degree=3), REFLECTION)


def find_03(facet):
    """A word in facet.py that Config takes for an activation and that makes another grid layer."""
    source = getattr(facet, "SOURCE", None) or Path(facet.__file__).read_text(encoding="utf-8")
    texts = {node.value for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for word in sorted(texts):
        if not re.fullmatch(r"[\w²³-]+", word):
            continue
        try:
            config = facet.Config(("Si",), channels=2, groups=2, layers=1, activation=word)
            kind = type(facet.Facet(config).layers[0].grid)
        except Exception:
            continue
        if kind not in (facet.ProductGrid, facet.SiluGrid):
            return word
    return None


def check_03(facet, word):
    """Exactly equivariant from degree 4L on, not with 3L; no linear map; makes new degrees."""
    for L in (1, 2, 3):
        check_grid(facet, build(facet, activation=word, degree=L).layers[0].grid, L)
        exact = build(facet, activation=word, degree=L, grid_degree=4 * L)
        check_grid(facet, exact.layers[0].grid, L)
    with pytest.raises(AssertionError, match="turned features"):
        coarse = build(facet, activation=word, grid_degree=6)
        check_grid(facet, coarse.layers[0].grid, 2)

    model = build(facet, activation=word)
    grid = model.layers[0].grid
    x = random_features(4, 2, CONFIG["channels"])
    differ("grid layer of 2x, and twice that of x", grid(2 * x), 2 * grid(x))
    small = (grid(x) - x).norm()
    large = (grid(1000 * x) - 1000 * x).norm()
    assert large < 5000 * small, ("updates grow faster than the features: "
                                  "crystals unlike the training set will blow up")
    x[:, :1] = 0
    x[:, 4:] = 0  # vectors only
    for l in (0, 2):
        made = grid(x)[:, facet.rows_of(l)]
        differ(f"degree {l} made from vectors, and zero", made, 0 * made)
    with pytest.raises(ValueError):
        facet.Config(("Si",), activation="quartic")
    check_model(facet, model)


def find_04(facet):
    if (1, 1, 1) in facet.paths(1, 1, 1):
        return (1, 1, 1)
    return None


def check_04(facet, path):
    """Rotations still hold, reflections no longer; without the cross product they do."""
    model = build(facet)
    check_rotation(facet, model, ROTATION)

    G = numbers(facet.gaunt(1, 1, 1))
    signs = np.zeros((3, 3, 3))
    for even in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        signs[even] = 1
        signs[even[::-1]] = -1
    same("size of the coupling", (G ** 2).sum((0, 1)), np.ones(3), "formula")
    same("coupling and the sign of a permutation, up to one sign", G * np.sign(G[0, 1, 2]),
         signs / np.sqrt(2), "formula")

    here = outputs(facet, model, CRYSTAL)["energies"]
    mirrored = outputs(facet, model, rotated(CRYSTAL, REFLECTION))["energies"]
    differ("energies of the mirror image", mirrored, here)

    every = facet.paths

    def natural(*degrees):
        return [path for path in every(*degrees) if sum(path) % 2 == 0]

    with mock.patch.object(facet, "paths", natural):
        check_rotation(facet, new_model(facet), REFLECTION)


AS_IT_CAME = (r"splines\.coefficients|embedding\.W|readout|"
              r"layers\.\d+\.(mix\.W\.\d+|skip\.a\.W|skip\.linear\.W|grid\.(W12|W1|W3)\.W|grid\.(Ws|b))")
FIVE = dict(species=("Si", "O", "Cu", "H", "He"), reference_energies=(-1.0, 2.0, 0.5, 0.0, 0.0))


def per_species(model) -> list[tuple[torch.Tensor, list[int]]]:
    """New parameters with axes of Z, and which axes these are."""
    found = []
    for name, weights in model.named_parameters():
        axes = [axis for axis, size in enumerate(weights.shape) if size == len(FIVE["species"])]
        if axes and not re.fullmatch(AS_IT_CAME, name):
            found.append((weights, axes))
    return found


def receivers(model) -> list[torch.Tensor]:
    """New parameters with a row for each species, the species first."""
    return [weights.movedim(axes[0], 0) for weights, axes in per_species(model) if len(axes) == 1]


def check_scaling(facet, new, kind: str) -> None:
    """Equal numbers in the new parameters, which `new` finds, scale messages as splines would."""
    by_spline = copy.deepcopy(build(facet, **FIVE))
    by_table = copy.deepcopy(by_spline)
    with torch.no_grad():
        for weights in new(by_spline):
            weights.fill_(1)
        for weights in new(by_table):
            weights.fill_(0.7)
        by_spline.splines.coefficients *= 0.7
    same(f"energies after all messages were scaled, by {kind} or by spline",
         outputs(facet, by_table, CRYSTAL)["energies"],
         outputs(facet, by_spline, CRYSTAL)["energies"])


def find_05(facet):
    return receivers(build(facet, **FIVE)) or None


def check_05(facet, found):
    """A species' row concerns the atoms of that species, as receivers; equal numbers scale φ."""
    model = copy.deepcopy(build(facet, layers=1, **FIVE))
    before = outputs(facet, model, CRYSTAL)["energies"]
    for z, symbol in enumerate(FIVE["species"]):
        with torch.no_grad():
            for weights in receivers(model):
                weights[z] += 1
        after = outputs(facet, model, CRYSTAL)["energies"]
        for i, other in enumerate(CRYSTAL.symbols):
            compare = differ if symbol == other else same
            compare(f"energy of {other} after a change for {symbol}", after[i], before[i])
        before = after

    check_scaling(facet, receivers, "receiver")
    check_model(facet, build(facet))


def new_outputs(facet, *shapes: tuple[int, ...]) -> list[str]:
    """Names of outputs that facet.py did not come with, for two crystals of 5 and 4 atoms."""
    known = ("energy", "energies", "forces", "virial", "stress")
    found = []
    for name, values in usual_outputs(facet).items():
        if name not in known and values.shape in shapes:
            found.append(name)
    return found


def sums_to_zero(facet, name: str) -> bool:
    """Do the numbers of a crystal's atoms sum to 0, as the charges of exercise 14 do?"""
    values = outputs(facet, build(facet), CRYSTAL)[name]
    return abs(values.sum()) < 1e-9 * np.abs(values).max()


def find_06(facet):
    for name in new_outputs(facet, (9,), (9, 1)):
        if not sums_to_zero(facet, name):
            return name
    return None


def check_06(facet, name):
    """One number per atom, the same in every orientation, that follows its atom everywhere."""
    model = build(facet)
    values = outputs(facet, model, CRYSTAL)[name]
    for R in (ROTATION, REFLECTION):
        turned = outputs(facet, model, rotated(CRYSTAL, R))[name]
        same(f"{name} of the turned crystal", turned, values)
    check_on_the_way(facet, model, name)
    check_model(facet, model)


def find_07(facet):
    return next(iter(new_outputs(facet, (9, 3))), None)


def check_07(facet, name):
    """A vector per atom that turns as positions do; zero where no direction is special."""
    model = build(facet)
    vectors = outputs(facet, model, CRYSTAL)[name]
    for R in (ROTATION, REFLECTION):
        turned = outputs(facet, model, rotated(CRYSTAL, R))[name]
        same(f"{name} of the turned crystal", turned, vectors @ R.T)
        differ(f"{name} of the turned crystal, not turned along", turned, vectors)

    alone = outputs(facet, model, MOLECULE[:1])[name]
    same(f"{name} of an isolated atom", alone, np.zeros((1, 3)))
    along = np.array([0.6, -1.1, 1.3])
    pair = outputs(facet, model, Atoms("SiO", [0 * along, along]))[name]
    same(f"part of a pair's {name} across its axis", np.cross(pair, along), np.zeros((2, 3)))
    differ(f"part of a pair's {name} along its axis, and zero", pair @ along, np.zeros(2))

    check_on_the_way(facet, model, name)
    check_model(facet, model)


def find_08(facet):
    splines, at_once = your_basis(facet)
    return splines if 0 < at_once <= 4 else None


def check_08(facet, splines):
    """The splines reach the cutoff complete, and one fixed function of r/cutoff ends them all."""
    r = torch.linspace(1.0, 1.2 * CUTOFF, 50, dtype=torch.float64)
    ending = build(facet, first_knot=0.0).splines.basis(r).sum(1)
    for first_knot in (0.0, 0.5, 1.0):
        model = build(facet, first_knot=first_knot)
        same("sum of the splines, wherever they begin", model.splines.basis(r).sum(1), ending,
             "formula")
        check_end(model.splines)
    start = build(facet, first_knot=0.0).splines.basis(torch.zeros(1, dtype=torch.float64))
    same("cutoff function at 0", start.sum(), 1, "formula")

    def crossing(distance):  # of the third atom, from the first
        third = np.array([0.48, 0.6, 0.64]) * distance
        return outputs(facet, model, Atoms("SiOCu", [[0, 0, 0], [0.9, 1.2, 1.1], third]))

    inside = crossing(CUTOFF - 1e-6)
    outside = crossing(CUTOFF + 1e-6)
    well_inside = crossing(CUTOFF - 1)
    for name in ("energy", "forces"):
        same(f"{name} when a neighbour crosses the cutoff", inside[name], outside[name], "cutoff")
        differ(f"{name} with the neighbour 1 Å inside", well_inside[name], outside[name])
    check_model(facet, model)


def frugal(facet, kind):
    """Make the class `kind` with couplings that are zero wherever m2 is not."""
    every = facet.gaunt

    def only_m2_0(l1, l2, l3):
        G = torch.zeros_like(every(l1, l2, l3))
        G[:, l2] = every(l1, l2, l3)[:, l2]
        return G

    def make(l_in, l_out, config):
        with mock.patch.object(facet, "gaunt", only_m2_0):
            return kind(l_in, l_out, config)

    return make


def densities(facet) -> list:
    """Classes beside Density with a forward of the same arguments; does each need all m2?

    Of a class that does not run that is not known: None.
    """
    arguments = list(inspect.signature(facet.Density.forward).parameters)
    config = facet.Config(**CONFIG)
    h = random_features(4, 2, 6)  # of three atoms in a circle, and one alone
    index = torch.tensor([2, 0, 1])[:, None, None] * 3 + torch.arange(3)[:, None]  # [N, B, K]
    phi = torch.ones(3, 3, 1, 3, dtype=torch.float64)
    Y = facet.harmonics(torch.tensor([[0.48, 0.6, 0.64]], dtype=torch.float64), 2)  # [1, M]
    Y = Y.expand(3, 1, 9)  # [N, K, M]

    found = []
    for _, kind in inspect.getmembers(facet, inspect.isclass):
        if not issubclass(kind, torch.nn.Module) or kind is facet.Density:
            continue
        if list(inspect.signature(kind.forward).parameters) != arguments:
            continue
        try:
            all_m2 = kind(2, 2, config).double()(h, index, phi, Y)
            some_m2 = frugal(facet, kind)(2, 2, config).double()(h, index, phi, Y)
            needs_all = bool(difference(all_m2, some_m2) > 1e-9)
        except Exception:
            needs_all = None
        found.append((kind, needs_all))
    return found


def find_09(facet):
    for kind, needs_all in densities(facet):
        if needs_all is not False:
            return kind
    return None


def check_09(facet, kind):
    """It gives what Density gives, and its gradients."""
    for L in (1, 2, 3):
        check_density(facet, kind, CRYSTAL, L)


def turns(facet, name: str) -> bool:
    """Is an output another one where the crystal is turned?"""
    model = build(facet)
    here = outputs(facet, model, CRYSTAL)[name]
    there = outputs(facet, model, rotated(CRYSTAL, ROTATION))[name]
    return difference(there, here) > 1e-9


def find_10(facet):
    spread = next(iter(new_outputs(facet, (2,))), None)
    members = None
    for name, values in usual_outputs(facet).items():
        if values.ndim == 2 and len(values) == 2 and not turns(facet, name):
            members = name
    return (members, spread) if members or spread else None


def check_10(facet, found):
    """The energy is the mean of the members, their spread the uncertainty; free atoms are sure."""
    assert None not in found, f"there is only {found}, not both: {LOOKED_FOR[10]}"
    members, spread = found
    model = copy.deepcopy(build(facet))
    crystals = (CRYSTAL, MOLECULE[:4])
    out = outputs(facet, model, *crystals)
    H = out[members].shape[1]
    assert H > 1, "a committee of one"
    same("energy", out["energy"], out[members].mean(1))
    off = out[members] - out["energy"][:, None]
    same("uncertainty", out[spread] ** 2 * (H - 1), (off ** 2).sum(1))
    differ("uncertainty, and zero", out[spread], np.zeros(2))

    turned = outputs(facet, model, rotated(CRYSTAL, REFLECTION))[spread]
    same("uncertainty of the turned crystal", turned, out[spread][:1])
    free = outputs(facet, model, MOLECULE[:1])
    E0 = CONFIG["reference_energies"][0]
    same("energies of a free atom", free[members], np.full((1, H), E0))
    same("uncertainty of a free atom", free[spread], np.zeros(1))

    atoms = CRYSTAL.copy()
    atoms.calc = facet.FacetCalculator(model, device="cpu", dtype=torch.float64)
    atoms.get_potential_energy()
    same("uncertainty in atoms.calc.results", atoms.calc.results[spread], out[spread][0])
    check_model(facet, model)

    # All members become the third
    with torch.no_grad():
        for weights in model.parameters():
            if H in weights.shape:
                axis = weights.shape.index(H)
                third = weights.select(axis, 2).unsqueeze(axis)
                weights.copy_(third.expand_as(weights).clone())
    alike = outputs(facet, model, *crystals)
    same("energy of the third member", alike["energy"], out[members][:, 2])
    same("uncertainty of a committee of one mind", alike[spread], np.zeros(2))


def find_11(facet):
    for kind, needs_all in densities(facet):
        if not needs_all:
            return kind
    return None


def check_11(facet, kind):
    """It gives what Density gives, with nothing but m2 = 0 of the coupling."""
    for l1, l2, l3 in facet.paths(3, 3, 3):
        column = facet.gaunt(l1, l2, l3)[:, l2]
        m1, m3 = torch.nonzero(column.abs() > TOL["formula"]).T
        assert (m1 - l1 == m3 - l3).all(), "where m2 = 0, m1 and m3 are the same"

    def with_m2_0_only(l_in, l_out, config):
        return frugal(facet, kind)(l_in, l_out, config)

    for atoms, L in ((CRYSTAL, 1), (CRYSTAL, 2), (ALONG_AXES, 2), (CRYSTAL, 3)):
        check_density(facet, with_m2_0_only, atoms, L)


def takes_models(facet, kind) -> bool:
    """Can a calculator be made with a list of models, as that of exercise 15 is?"""
    models = [build(facet), build(facet, layers=2)]
    try:
        kind(models, device="cpu", dtype=torch.float64)
    except Exception:
        return False
    return True


def find_12(facet):
    for _, kind in inspect.getmembers(facet, inspect.isclass):
        if not issubclass(kind, facet.FacetCalculator) or kind is facet.FacetCalculator:
            continue
        if not takes_models(facet, kind):
            return kind
    return None


def check_12(facet, kind):
    """What is added is Coulomb's law at any distance; forces are slopes; no periodic crystals."""
    model = build(facet)
    charges = {"Si": 1.2, "O": -0.7, "Cu": 0.4}

    def calculate(atoms, *arguments):
        atoms = atoms.copy()
        maker = kind if arguments else facet.FacetCalculator
        atoms.calc = maker(model, *arguments, device="cpu", dtype=torch.float64)
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_potential_energies()

    for atoms in (MOLECULE, rotated(MOLECULE, REFLECTION), Atoms("SiO", [[0, 0, 0], [3, 4, 12]])):
        energy, _, energies = calculate(atoms, charges)
        want = 0.0
        for i in range(len(atoms)):
            for j in range(i):
                product_of_charges = charges[atoms[i].symbol] * charges[atoms[j].symbol]
                want += units.Hartree * units.Bohr * product_of_charges / atoms.get_distance(i, j)
        same("energy beyond that of the network", energy - calculate(atoms)[0], want)
        same("sum of the atoms' energies", energies.sum(), energy)
        check_forces(lambda moved: calculate(moved, charges), atoms)
    with pytest.raises(ValueError):
        calculate(CRYSTAL, charges)


def pairs(model) -> list[torch.Tensor]:
    """New parameters with a number for each pair of species, the two species first."""
    return [weights.movedim(axes, (0, 1)) for weights, axes in per_species(model) if len(axes) == 2]


def find_13(facet):
    return pairs(build(facet, **FIVE)) or None


def check_13(facet, found):
    """The number of a pair of species concerns edges between these two; equal numbers scale φ.

    Whether it matters who of the two receives, is left open: z, w and w, z change together.
    """
    model = copy.deepcopy(build(facet, layers=1, **FIVE))
    graph = facet.find_neighbours(CHAIN, model.config)
    sees = [set(CHAIN.symbols[graph.src[graph.dst == i]]) for i in range(len(CHAIN))]
    before = outputs(facet, model, CHAIN)["energies"]
    for z, one in enumerate(FIVE["species"]):
        for w, other in enumerate(FIVE["species"][:z + 1]):
            with torch.no_grad():
                for numbers_of_pairs in pairs(model):
                    for a, b in {(z, w), (w, z)}:
                        numbers_of_pairs[a, b] += 1
            after = outputs(facet, model, CHAIN)["energies"]
            for i, symbol in enumerate(CHAIN.symbols):
                concerned = symbol == one and other in sees[i] or symbol == other and one in sees[i]
                compare = differ if concerned else same
                compare(f"energy of atom {i} ({symbol}, sees {', '.join(sorted(sees[i]))}) after a "
                        f"change for {one} and {other}", after[i], before[i])
            before = after

    check_scaling(facet, pairs, "pair")
    start = facet.Facet(facet.Config(**CONFIG | FIVE), torch.float64)
    for numbers_of_pairs in pairs(start):
        same("numbers of pairs at the start", numbers_of_pairs, np.ones(numbers_of_pairs.shape),
             "exact")
    check_model(facet, build(facet))


def find_14(facet):
    for name in new_outputs(facet, (9,), (9, 1)):
        if sums_to_zero(facet, name):
            return name
    return None


def check_14(facet, name):
    """Charges sum to the total of each crystal, in a batch too; all atoms are shifted alike."""
    model = build(facet)
    crystals = [CRYSTAL.copy(), MOLECULE[:4], MOLECULE[1:4], MOLECULE[:1]]
    totals = [1.5, 0.0, -1.0, 2.0]
    for atoms, total in zip(crystals, totals):
        if total:
            atoms.info["charge"] = total  # without one it is 0
    charges = outputs(facet, model, *crystals)[name].ravel()
    parts = np.split(charges, np.cumsum([len(atoms) for atoms in crystals])[:-1])
    same(f"sums of {name} of crystals in one batch", [part.sum() for part in parts], totals)

    neutral = outputs(facet, model, CRYSTAL)[name].ravel()
    same(f"{name}, those of the neutral crystal, and a fifth of the total", parts[0],
         neutral + totals[0] / 5)
    differ(f"{name} of the neutral crystal, and zero", neutral, np.zeros(5))
    differ(f"{name} of two atoms of one species", neutral[3], neutral[0])
    for R in (ROTATION, REFLECTION):
        turned = outputs(facet, model, rotated(CRYSTAL, R))[name].ravel()
        same(f"{name} of the turned crystal", turned, neutral)

    charged = crystals[0].copy()
    charged.calc = facet.FacetCalculator(model, device="cpu", dtype=torch.float64)
    charged.get_potential_energy()
    same(f"{name} of the charged crystal in atoms.calc.results",
         charged.calc.results[name].ravel(), parts[0])
    check_on_the_way(facet, model, name)
    check_model(facet, model)


def find_15(facet):
    for _, kind in inspect.getmembers(facet, inspect.isclass):
        if not issubclass(kind, Calculator) or kind in (Calculator, facet.FacetCalculator):
            continue
        if takes_models(facet, kind):
            return kind
    return None


def check_15(facet, kind):
    """Means over the models, of forces too, and two spreads, over H − 1, that are invariant."""
    def results(maker, model, atoms) -> dict:
        atoms = atoms.copy()
        atoms.calc = maker(model, device="cpu", dtype=torch.float64)
        atoms.get_potential_energy()
        return atoms.calc.results

    def by_committee(models, atoms):
        return results(kind, models, atoms)

    # Two models that differ by the energies of free atoms only: they agree on forces
    twins = by_committee([build(facet), build(facet, reference_energies=(0, 0, 0))], CRYSTAL)
    by_one = results(facet.FacetCalculator, build(facet), CRYSTAL)
    spreads = [name for name in twins if name not in by_one and np.ndim(twins[name]) == 0]
    assert len(spreads) == 2, f"new numbers in the results are {spreads}, not two spreads"
    of_forces, of_energy = sorted(spreads, key=lambda name: twins[name])
    same("spread of forces of models that differ by E0 only", twins[of_forces], 0)
    differ("spread of energies of models that differ by E0 only, and zero", twins[of_energy], 0)

    # They need not have the same cutoff or the same order of species
    models = [build(facet, degree=1, cutoff=3.2), build(facet),
              build(facet, layers=2, species=("Cu", "Si", "O"))]
    H = len(models)
    for atoms in (CRYSTAL, MOLECULE):
        out = by_committee(models, atoms)
        each = [results(facet.FacetCalculator, model, atoms) for model in models]
        for name in ("energy", "free_energy", "energies", "forces", "stress"):
            assert (name in out) == (name in each[0]), f"{name} in the results of {atoms}"
            if name in out:
                same(f"{name}, a mean over the models", out[name],
                     np.mean([one[name] for one in each], axis=0))

        for R in (ROTATION, REFLECTION):
            turned = by_committee(models, rotated(atoms, R))
            for name in spreads:
                same(f"{name} of the turned crystal", turned[name], out[name])

        energies = np.array([one["energy"] for one in each])  # [H]
        off = energies - energies.mean()
        same("spread of energies, squared", out[of_energy] ** 2, (off ** 2).sum() / (H - 1))
        forces = np.array([one["forces"] for one in each])  # [H, N, 3]
        off = forces - forces.mean(0)
        of_atom = (off ** 2).sum((0, 2)) / (H - 1)  # [N]
        same("largest spread of forces, squared", out[of_forces] ** 2, of_atom.max())
        differ("spreads of forces of the atoms", of_atom, np.roll(of_atom, 1))

    def calculate(atoms):
        out = by_committee(models, atoms)
        return out["energy"], out["forces"]

    check_forces(calculate, CRYSTAL)


def find_16(facet):
    for name in new_outputs(facet, (2, 3)):
        if turns(facet, name):
            return name
    return None


def check_16(facet, name):
    """A vector per crystal that turns along, a sum over its atoms; it can be trained."""
    model = build(facet)
    pair = Atoms("SiO", [[0, 0, 0], [0.6, -1.1, 1.3]])
    crystals = (CRYSTAL, pair, MOLECULE[:4])
    vectors = outputs(facet, model, *crystals)[name]
    for R in (ROTATION, REFLECTION):
        turned = outputs(facet, model, *[rotated(atoms, R) for atoms in crystals])[name]
        same(f"{name} of the turned crystals", turned, vectors @ R.T)
        differ(f"{name} of the turned crystals, not turned along", turned, vectors)

    for s, atoms in enumerate(crystals):
        alone = outputs(facet, model, atoms)[name]
        same(f"{name} of a crystal by itself", alone, vectors[s:s + 1])
        differ(f"{name}, and zero", alone, np.zeros((1, 3)))
    same(f"{name} of an isolated atom", outputs(facet, model, MOLECULE[:1])[name], np.zeros((1, 3)))
    same(f"part of a pair's {name} across its axis", np.cross(vectors[1], pair.positions[1]),
         np.zeros(3))
    far = pair.copy()
    far.positions += 10 * CUTOFF
    both = outputs(facet, model, MOLECULE[:4] + far)[name]
    same(f"{name} of two molecules that do not see each other", both, [vectors[1] + vectors[2]])

    graphs = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    for s, result in enumerate(facet.evaluate(model, graphs)):
        same(f"{name} by evaluate, in a batch", result[name], vectors[s])
    atoms = CRYSTAL.copy()
    atoms.calc = facet.FacetCalculator(model, device="cpu", dtype=torch.float64)
    atoms.get_potential_energy()
    same(f"{name} in atoms.calc.results", atoms.calc.results[name], vectors[0])
    if name in all_properties:
        same(f"{name} by ASE", atoms.calc.get_property(name, atoms), vectors[0])

    check_dipoles_are_learned(facet, name)
    check_model(facet, model)


def check_dipoles_are_learned(facet, name: str) -> None:
    """Train a tiny model on energies and dipoles of random molecules: both losses must fall."""
    charges = {"Si": 0.6, "O": -0.8, "Cu": 0.3}  # e
    rng = np.random.default_rng(3)
    corners = np.array([[0, 0, 0], [2.1, 0, 0], [0, 2.1, 0], [0, 0, 2.1]])  # Å
    molecules = []
    energies = []
    dipoles = []
    for _ in range(8):
        atoms = Atoms(rng.choice(list(charges), 4), corners + rng.uniform(-0.3, 0.3, (4, 3)))
        charge = np.array([charges[symbol] for symbol in atoms.symbols])  # [N]
        distance = atoms.get_all_distances()[np.triu_indices(4, 1)]  # of the pairs
        molecules.append(atoms)
        energies.append(-np.exp(1 - distance / 2).sum())
        dipoles.append((charge - charge.mean()) @ atoms.positions)  # no net charge, so no origin

    model = copy.deepcopy(build(facet, reference_energies=(0, 0, 0)))
    graphs = [facet.find_neighbours(atoms, model.config) for atoms in molecules]
    batch = facet.make_batch(graphs, CUTOFF, torch.float64)
    wanted = {"energy": torch.tensor(energies), name: torch.from_numpy(np.array(dipoles))}

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(50):
        out = model(batch, differentiable=True)
        losses = {key: (out[key] - label).square().mean() for key, label in wanted.items()}
        assert losses[name].requires_grad, f"no gradient of the loss of {name} reaches the weights"
        history.append({key: float(loss.detach()) for key, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    for key in wanted:
        left = history[-1][key] / history[0][key]
        assert left < TOL["training"], f"{left:.2f} of the loss of {key} is left after training"


LOOKED_FOR = {  # exercise: what tells that facet.py holds a solution, under whatever name
    1: "radial basis of which more than four functions are not zero at one distance",
    2: "function of a Config that returns three numbers: points, paths, parameters",
    3: "word that Config takes for `activation` and that makes another kind of grid layer",
    4: "path (1, 1, 1) in paths(1, 1, 1)",
    5: "new parameter of the model with a row for each species",
    6: "new output of the model with one number for each atom",
    7: "new output of the model with three numbers for each atom",
    8: "radial basis of splines that are not those facet.py came with",
    9: "class whose forward takes what Density.forward takes",
    10: "pair of new outputs of the model for each crystal: one number, and one for each member",
    11: "class whose forward takes what Density.forward takes, and needs G with m2 = 0 alone",
    12: "subclass of FacetCalculator",
    13: "new parameter of the model with two axes of Z, a number for each pair of species",
    14: "new output of the model with one number for each atom, of sum 0 where no total is given",
    15: "calculator that can be made with a list of models, device and dtype",
    16: "new output of the model for each crystal, three numbers that turn with it",
}

WRONG = {  # exercise: what is spoilt in its patch, old and new text, what the check must say
    1: ("Gaussians that end with a kink", ".clamp(min=0) ** 3", ".clamp(min=0)", "Gaussians"),
    2: ("points and rows mixed up", "len(layer.grid.to_grid)", "len(layer.grid.to_rows)",
        "cost of L"),
    3: ("the length of one row", "u.square().mean", "u[:, -1:].square().mean", "turned features"),
    4: ("another product of two vectors", "torch.linalg.cross(e[:, None], e[None]) / sqrt(2)",
        "e[:, None] * e[None] * sqrt(1)", "energies of the turned crystal"),
    5: ("blind to species", "self.receiver[species]", "self.receiver[species * 0]",
        "after a change for"),
    6: ("shifted by the lone atoms", "h[:N, 0] @ self.moment", "h[-N:, 0] @ self.moment",
        "magmoms"),
    7: ("(y, z, x) taken for (x, y, z)", "[:, [2, 0, 1]]", "[:, [0, 1, 2]]",
        "dipoles of the turned crystal"),
    8: ("a curvature that jumps", "1 - x ** 3 * (10 - 15 * x + 6 * x ** 2)",
        "1 - x ** 2 * (3 - 2 * x)", "curvature just inside"),
    9: ("neighbours and groups mixed up", "[:, 0] // B", "[:, 0] % N", "A of layer"),
    10: ("error of the mean taken for that of a member", '["members"].std(1)',
         '["members"].std(1) / 8 ** 0.5', "uncertainty"),
    11: ("z and −z taken for the same", "* sign ** l", "* sign ** (0 * l)", "A of layer"),
    12: ("a force that falls off as 1/r", "half / distance ** 2", "half / distance",
         "central differences"),
    13: ("the receiver taken for the sender", "batch.species[batch.src]]",
         "batch.species[:, None]]", "after a change for Si and Si"),
    14: ("crystals of a batch mixed up", "raw + share[batch.crystal]", "raw + missing.sum() / N",
         "crystals in one batch"),
    15: ("the largest component taken for a length", "np.linalg.norm(spread, axis=1).max()",
         "spread.max()", "of the turned crystal"),
    16: ("cut off from the weights", '.pop("arrows")', '.pop("arrows").detach()',
         "reaches the weights"),
}


# ─── Whose facet.py is checked ────────────────────────────────────────────────────────────────────


def find(N: int, facet):
    return globals()[f"find_{N:02}"](facet)


def check(N: int, facet) -> None:
    found = find(N, facet)
    assert found is not None, f"not found: {LOOKED_FOR[N]}"
    globals()[f"check_{N:02}"](facet, found)


@cache
def solved_by_you() -> list[int]:
    return [N for N in LOOKED_FOR if find(N, yours) is not None]


def patch_of(N: int) -> str:
    return (HERE / "solutions" / f"{N:02}.patch").read_text(encoding="utf-8")


def apply_patch(patch: str, source: str) -> str:
    """The source after a unified diff; ValueError where a hunk does not fit exactly once."""
    for hunk in re.split(r"(?m)^@@ .* @@.*\n", patch)[1:]:
        lines = hunk.splitlines(True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if ("\n" + source).count("\n" + old) != 1:
            raise ValueError(f"should stand in facet.py exactly once:\n{old}")
        source = ("\n" + source).replace("\n" + old, "\n" + new)[1:]
    return source


def changed_lines(patch: str) -> int:
    """Lines that a unified diff adds or removes, blank ones not counted."""
    count = 0
    for line in patch.splitlines():
        if line.startswith(("+", "-")) and line[1:].strip():
            count += not line.startswith(("+++ ", "--- "))  # the name of a file
    return count


@cache
def edited(name: str = "facet.py") -> bool:
    """Is this file not the one that this checkout came with?"""
    command = ["git", "diff", "--quiet", "HEAD", "--", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0


def patched(patch: str) -> ModuleType:
    """facet.py with a patch, as a module. Two solutions would get in each other's way."""
    if solved_by_you():
        pytest.skip(f"needs facet.py as it came; yours solves exercise {solved_by_you()}")
    try:
        source = apply_patch(patch, Path(yours.__file__).read_text(encoding="utf-8"))
    except ValueError as error:
        if edited():
            pytest.skip("the model solution does not fit your facet.py any more")
        raise AssertionError(f"the patch does not fit facet.py; it {error}") from None

    module = ModuleType("facet")
    module.SOURCE = source
    exec(compile(source, "facet.py with a patch", "exec"), module.__dict__)
    module.gaunt = cache(module.gaunt)  # most of the time of making a model
    return module


@pytest.mark.parametrize("name", [f"exercise_{N:02}" for N in LOOKED_FOR])
def test_yours(name):
    N = int(name[-2:])
    if N not in solved_by_you():
        pytest.skip(f"exercise {N} is not solved yet; looked for in facet.py: a {LOOKED_FOR[N]}")
    check(N, yours)


@pytest.mark.parametrize("name", [f"solution_{N:02}" for N in LOOKED_FOR])
def test_model(name):
    N = int(name[-2:])
    check(N, patched(patch_of(N)))


@pytest.mark.parametrize("name", [f"wrong_{N:02}" for N in WRONG])
def test_rejected(name):
    N = int(name[-2:])
    what, old, new, complaint = WRONG[N]
    patch = patch_of(N)
    assert patch.count(old) == 1, f"{old!r} should stand once in solution {N}: change WRONG"
    module = patched(patch.replace(old, new))
    with pytest.raises(AssertionError, match=complaint) as caught:
        check(N, module)
    print(f"\n{what}: {caught.value}")


OTHER_NAMES = {  # exercise: names of its model solution that a reader may choose otherwise
    1: {"Gaussians": "Bells"},
    2: {"cost": "price", "points": "grid_points"},
    3: {"CubicGrid": "ThirdPower", "cubic": "third-power"},
    5: {"receiver": "gain"},
    6: {"moment": "q", "magmoms": "charges_of_atoms"},
    7: {"dipoles": "arrows", "dipole": "arrow"},
    8: {"cutoff_function": "envelope"},
    9: {"EdgeDensity": "Slow"},
    10: {"members": "votes", "uncertainty": "doubt"},
    11: {"SO2Density": "Aligned"},
    12: {"CoulombCalculator": "Charged"},
    13: {"pair": "gain"},
    14: {"charges": "portions"},
    15: {"CommitteeCalculator": "Panel", "energy_std": "doubt", "force_std": "worst"},
    16: {"dipole": "arrow", "arrows": "shares"},
}


@pytest.mark.parametrize("name", [f"renamed_{N:02}" for N in OTHER_NAMES])
def test_other_names_are_found(name):
    """Nothing hangs on names: the solution is found, and by its own exercise only."""
    N = int(name[-2:])
    lines = patch_of(N).splitlines(True)
    for old, new in OTHER_NAMES[N].items():
        for i, line in enumerate(lines):
            if line.startswith("+"):
                lines[i] = re.sub(rf"\b{old}\b", new, line)
    assert lines != patch_of(N).splitlines(True)
    module = patched("".join(lines))
    assert [other for other in LOOKED_FOR if find(other, module) is not None] == [N]


@pytest.mark.parametrize("shape, use", [
    ("Z, 1, C", "self.receiver[species]"),
    ("Z, 1", "self.receiver[species][:, None]"),
    ("C, Z", "self.receiver[:, species].T[:, None]"),
])
def test_exercise_5_accepts_every_right_shape(shape, use):
    """That of the solution, [Z, C], is checked with it."""
    shape = shape.replace("Z", "len(config.species)").replace("C", "config.channels")
    patch = patch_of(5).replace("len(config.species), config.channels", shape)
    check(5, patched(patch.replace("self.receiver[species][:, None]", use)))


@pytest.mark.parametrize("shape, use", [
    ("Z, Z, 1, config.groups, L + 1", "self.pair"),  # one table for all layers
    ("Z, Z, 1, 1, 1", "((self.pair + self.pair.transpose(0, 1)) / 2)"),  # unordered pairs
    ("T, config.groups, L + 1, Z, Z", "self.pair.permute(3, 4, 0, 1, 2)"),
])
def test_exercise_13_accepts_every_right_shape(shape, use):
    patch = patch_of(13).replace("Z, Z, T, config.groups, L + 1", shape)
    check(13, patched(patch.replace("self.pair[", f"{use}[")))


# ─── A new label: exercises 17 and 18, in a copy of the tree ──────────────────────────────────────


SHAPES = {17: (), 18: (3,)}  # exercise: shape of the label of one atom
SMALL = {"channels": 8, "layers": 2, "degree": 1, "cutoff": CUTOFF}  # the model that is trained

WRONG_LABELS = {  # as WRONG
    17: ("a number for each crystal", ", per_atom=True", "", "magmoms has 4 numbers, one is need"),
    18: ("(y, z, x) taken for (x, y, z)", "[:, [2, 0, 1]]", "[:, [0, 1, 2]]",
         "dipoles of the turned crystal"),
}

def of_neighbours(atoms: Atoms, shape: tuple[int, ...]) -> np.ndarray:
    """A label that can be learned: a sum over neighbours of charges, or of their directions."""
    i, j, r = neighbor_list("ijD", atoms, CUTOFF)
    charge = np.where(atoms.symbols == "Au", 1.0, -0.3)[j] * np.exp(-(r ** 2).sum(1) / 4)
    terms = charge[:, None] * r if shape else charge
    values = np.zeros((len(atoms), *shape))
    np.add.at(values, i, terms)
    return values


def write_labelled(path: Path, shape: tuple[int, ...], name: str, first: int) -> None:
    """Eight rattled crystals of copper and gold with EMT's labels and a column REF_name."""
    crystals = []
    for k in range(first, first + 8):
        atoms = ase.build.bulk("Cu", cubic=True, a=3.7)
        atoms.symbols[k % 4] = "Au"
        atoms.rattle(0.2, seed=k)
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        atoms.arrays[f"REF_{name}"] = of_neighbours(atoms, shape)
        crystals.append(atoms)
    ase.io.write(path, crystals)


def new_label(shape: tuple[int, ...], source: str) -> str | None:
    """Name of the last label in the table, if it is new and has such a row for each atom."""
    module = ModuleType("labels")
    sys.modules["labels"] = module  # dataclasses look their module up there
    exec(compile(source, "tools/labels.py", "exec"), module.__dict__)
    del sys.modules["labels"]
    label = module.TABLE[-1]
    old = ("energy", "forces", "stress")
    return label.name if label.name not in old and label.shape == shape else None


def copied(folder: Path, patch: str = "") -> Path:
    """The tree, with a patch."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    if patch:
        done = subprocess.run(["git", "apply"], cwd=folder, input=patch, capture_output=True,
                              text=True)
        if done.returncode and (edited("facet.py") or edited("tools/labels.py")):
            pytest.skip("the model solution does not fit your files any more")
        assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def modules_of(folder: Path):
    """Inside, `import` finds facet, train_small and tools in this tree, which is where we are."""
    def ours() -> list[str]:
        return [name for name in sys.modules
                if name.partition(".")[0] in ("facet", "train_small", "tools")]
    before = {name: sys.modules.pop(name) for name in ours()}
    place = os.getcwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(place)
        sys.path.remove(str(folder))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def check_label(folder: Path, shape: tuple[int, ...], capsys) -> None:
    """From a column of an extxyz file through training to atoms.calc.results."""
    name = new_label(shape, (folder / "tools/labels.py").read_text(encoding="utf-8"))
    assert name is not None, "not found: a new label with a row for each atom in tools/labels.py"
    write_labelled(folder / "new.extxyz", shape, name, 0)
    write_labelled(folder / "valid.extxyz", shape, name, 100)
    with modules_of(folder):
        frames = check_files(name, shape)
        check_calculator(name, shape, frames)
        check_training(name, capsys)


def check_files(name: str, shape: tuple[int, ...]):
    """A database holds the label; who does not want it, does not read it. Returns the frames."""
    from tools import database, frames, labels
    names = labels.Names(**{name: "REF_" + name})
    try:
        plain = frames.read(["new.extxyz"], names)
    except frames.BadInput as error:
        raise AssertionError(str(error)) from error
    database.convert(["new.extxyz"], "new.db", names)
    stored = frames.read(["new.db"])
    bare = frames.read(["new.db"], without=[name])
    for one, two in zip(stored, plain, strict=True):
        same(f"{name} in a database", one.calc.results[name], two.calc.results[name], "exact")
    assert stored.labels()[:, -1].all() and plain.labels()[:, -1].all() and len(plain) == 8
    first = ase.io.read("new.extxyz", 0)
    same(name, plain[0].calc.results[name], of_neighbours(first, shape), "file")
    assert not bare.labels()[:, -1].any() and name not in bare[0].calc.results
    assert stored.fingerprint() != bare.fingerprint()
    return plain


def check_calculator(name: str, shape: tuple[int, ...], frames) -> None:
    """The calculator's results: a row for each atom, a scalar or a vector, by any weights."""
    import facet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = facet.Facet(facet.Config(("Cu", "Au"), **SMALL))
    calculator = facet.FacetCalculator(model, "cpu", torch.float64)

    def predicted(atoms: Atoms) -> np.ndarray:
        atoms = atoms.copy()
        atoms.calc = calculator
        atoms.get_potential_energy()
        return atoms.calc.get_property(name, atoms)
    atoms = frames[0].copy()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ ROTATION.T, scale_atoms=True)
    values = predicted(atoms)  # [N] or [N, 3]
    want = values @ ROTATION.T if shape else values
    same(f"{name} of the turned crystal", predicted(turned), want)
    backwards = predicted(atoms[::-1])
    same(f"{name} of the atoms in another order", backwards, values[::-1])
    differ(f"{name} of the atoms in another order, not put in order", backwards, values)


def check_training(name: str, capsys) -> None:
    """It is learned; the log, the report and the program's sentences know it."""
    import facet
    import train_small
    from tools import frames, panels, physics
    s = train_small.Settings(
        train=("new.extxyz",), valid=("valid.extxyz",), test=("valid.extxyz",), name="new",
        steps=40, lr=0.02, muon_lr=0.04, batch_atoms=16, threads=1, workers=0, **SMALL,
        **{name: "REF_" + name, name + "_weight": 1.0})

    # A label that the table knows and the model does not is refused, before anything is written
    forward = facet.Facet.forward

    def without(self, *arguments, **more):
        out = forward(self, *arguments, **more)
        del out[name]
        return out
    with mock.patch.object(facet.Facet, "forward", without), \
            mock.patch.object(frames, "look_at"):
        message = f"{name} is a label, but the model has no output {name} .*$"
        with pytest.raises(train_small.BadInput, match=message):
            train_small.main(s)
    assert not Path("runs/new").exists()

    # Pictures and suspicions take longer than all the rest
    capsys.readouterr()
    with mock.patch.object(panels, "draw"), mock.patch.object(frames, "look_at"), \
            mock.patch.object(physics, "STEPS", 2):
        result = train_small.main(s)
    lines = capsys.readouterr().out.splitlines()

    # The log, on the screen and in metrics.csv, with as many numbers as there are titles
    title, = (line for line in lines if line.startswith("   step"))
    assert f"{name} MAE" in title and title.partition(")")[0].endswith(f" {name}")
    line, = (line for line in lines if line.startswith("     40 "))
    with open("runs/new/metrics.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    mae, = (key for key in log[0] if key.startswith(f"{name}_mae_"))
    shown = line.partition("(")[2].partition(")")[0].split()[-1]
    same("loss on the screen", float(shown), float(log[-1][f"loss_{name}"]), "screen")
    assert f"{float(log[-1][mae]):.4f} " in line
    fallen = float(log[-1][f"loss_{name}"]) / float(log[0][f"loss_{name}"])
    assert fallen < 0.5, f"{fallen:.2f} of the loss of {name} is left after training"

    # The report: its table, and result.json
    heading, = (line for line in lines if "test structures " in line)
    assert f"{name} MAE (RMSE)" in heading
    table = json.loads(Path("runs/new/result.json").read_text())
    row, = (line for line in lines if line.startswith("  Facet "))
    for kind in ("mae", "rmse"):
        key = mae.replace("_mae_", f"_{kind}_")
        assert table[key] == result[key] and f"{table[key]:.4f}" in row
        assert table["baselines"]["constant per species"][key] is None

    # The model that was trained and saved predicts what the report tells
    calculator = facet.FacetCalculator("runs/new/model.pt", "cpu")
    errors = []
    for atoms in ase.io.iread("valid.extxyz"):
        calculator.get_potential_energy(atoms)
        errors.append(calculator.get_property(name, atoms) - atoms.arrays[f"REF_{name}"])
    same(f"MAE of {name}", np.abs(np.concatenate(errors)).mean() / result[mae], 1, "screen")


@pytest.mark.filterwarnings("ignore:.*closer than ever")
@pytest.mark.parametrize("name", [f"exercise_{N:02}" for N in SHAPES])
def test_your_label(name, tmp_path, capsys):
    shape = SHAPES[int(name[-2:])]
    if new_label(shape, (ROOT / "tools/labels.py").read_text(encoding="utf-8")) is None:
        pytest.skip(f"not solved yet; looked for in tools/labels.py: a label of shape {shape} last")
    check_label(copied(tmp_path), shape, capsys)


@pytest.mark.filterwarnings("ignore:.*closer than ever")
@pytest.mark.parametrize("name", [f"solution_{N:02}" for N in SHAPES])
def test_model_label(name, tmp_path, capsys):
    N = int(name[-2:])
    check_label(copied(tmp_path, patch_of(N)), SHAPES[N], capsys)


@pytest.mark.parametrize("name", [f"wrong_{N:02}" for N in WRONG_LABELS])
def test_rejected_label(name, tmp_path, capsys):
    N = int(name[-2:])
    what, old, new, complaint = WRONG_LABELS[N]
    patch = patch_of(N)
    assert patch.count(old) == 1, f"{old!r} should stand once in solution {N}: change WRONG_LABELS"
    with pytest.raises(AssertionError, match=complaint) as caught:
        check_label(copied(tmp_path, patch.replace(old, new)), SHAPES[N], capsys)
    print(f"\n{what}: {caught.value}")


# ─── The page ─────────────────────────────────────────────────────────────────────────────────────


def test_page_tells_the_sizes_of_the_solutions():
    """Changed lines, in each exercise and in the last table, are those of the patches."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    sizes = {N: changed_lines(patch_of(N)) for N in [*LOOKED_FOR, *SHAPES]}
    for N, size in sizes.items():
        section = re.search(rf"(?ms)^## {N}\. .*?(?=^## )", text)[0]
        assert f"{size} changed lines" in section, f"exercise {N}: {size} changed lines"
        assert f"`pytest -k exercise_{N:02}`" in section, f"exercise {N} does not name its check"
        assert re.search(rf"(?m)^\| {N} \|.*\| {size} \|$", text), f"{N}: {size}, in the table"
    assert sizes[6] <= 10 and sizes[7] <= 10 and sizes[10] <= 15
    for N in SHAPES:
        assert sizes[N] <= 15 and patch_of(N).count("\ndiff --git") < 3, "lines, and files"


@pytest.mark.parametrize("N", [*LOOKED_FOR, *SHAPES])
def test_git_applies_the_solution(N, tmp_path):
    if edited() or edited("tools/labels.py"):
        pytest.skip("your files are not those that the model solutions were made for")
    copied(tmp_path)
    done = subprocess.run(["git", "apply", str(HERE / "solutions" / f"{N:02}.patch")],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "facet.py").read_bytes() != (ROOT / "facet.py").read_bytes()
