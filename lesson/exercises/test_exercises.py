"""Checks of the exercises in README.md: of the reader's own facet.py, of the model solutions, and of wrong ones.

    pytest -k exercise_03     your facet.py; skipped until it holds the names that exercise 3 asks for
    pytest -k solution_03     facet.py with solutions/03.patch applied in memory, by the same check
    pytest -k wrong_03        the solution with one line spoilt: the check must reject it

Everything in float64, with random weights, none of them zero. Every comparison goes through `same`, or for a control
through `differ`; every tolerance stands in TOL with its reason.
"""
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms, units
from scipy.spatial.transform import Rotation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # facet.py is not installed
import facet as yours

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait

TOL = {  # largest allowed difference, in units of the largest wanted value (of 1, if that is smaller)
    "exact": 0,             # the same numbers, to the last bit
    "formula": 1e-12,       # one formula against another, float64, no layers in between
    "rounding": 1e-10,      # the same sums in another order, float64, through three layers
    "differences": 1e-6,    # central differences; a third derivative may jump at a knot of a spline
    "cutoff": 1e-4,         # 1e-6 Å inside, the curvature has not quite gone; a jump would be at least 1e-2
    "fit": 0.03,            # functions of size 1 that oscillate, fitted by twelve others
    "control": 1e-3,        # what a control must at least differ by
}

# no multiples of 90° about anything: a Lebedev grid has the symmetry of a cube, and they would prove nothing
ROTATION, REFLECTION = Rotation.from_rotvec([[0.4, -1.1, 0.7], [-1.3, 0.2, 0.9]]).as_matrix() * [[[1]], [[-1]]]
CRYSTAL = Atoms("SiOCuSiO", cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]], pbc=True, positions=[
    [0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3], [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]])  # chiral
MOLECULE = Atoms(CRYSTAL.symbols, CRYSTAL.positions)
ALONG_AXES = Atoms("SiOCuSi", [[0, 0, 0], [0, 0, 1.9], [2.1, 0, 0], [0, -2.3, 0]])
CUTOFF = 3.5
CONFIG = dict(species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3, splines=12,
              mean_neighbours=8.0, energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5))


# ─── Helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def numbers(values) -> np.ndarray:
    return np.asarray(values.detach() if isinstance(values, torch.Tensor) else values, float)


def difference(got, want) -> float:
    got, want = numbers(got), numbers(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    return np.nan_to_num(np.abs(got - want), nan=np.inf).max(initial=0) / max(1, np.abs(want).max(initial=0))


def same(what: str, got, want, tol: str = "rounding") -> None:
    error = difference(got, want)
    assert error <= TOL[tol], f"{what}: off by {error:.1e}, allowed {TOL[tol]:.0e} ({tol})"


def differ(what: str, got, want) -> None:
    error = difference(got, want)
    assert error > TOL["control"], f"{what}: differs by only {error:.1e}"


def build(facet, **changes):
    """A tiny model in float64, one and the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = facet.Facet(facet.Config(**CONFIG | changes), torch.float64)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                weights += 0.1 * torch.randn(weights.shape, dtype=torch.float64)
    return model


def random_features(atoms: int, L: int, channels: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(L).normal(size=(atoms, (L + 1) ** 2, channels)))  # [N, M, C]


def outputs(facet, model, *crystals) -> dict[str, np.ndarray]:
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    return {name: numbers(value) for name, value in model(facet.make_batch(neighbours, CUTOFF, torch.float64)).items()}


def rotated(atoms: Atoms, R) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions @ R.T, cell=atoms.cell.array @ R.T, pbc=atoms.pbc)


def check_rotation(facet, model, R) -> None:
    """Energies and forces turn with the crystal."""
    here, there = outputs(facet, model, CRYSTAL), outputs(facet, model, rotated(CRYSTAL, R))
    same("energies of the turned crystal", there["energies"], here["energies"])
    same("forces of the turned crystal", there["forces"], here["forces"] @ R.T)


def check_forces(calculate, atoms: Atoms, step: float = 1e-5) -> None:
    """calculate(atoms) → energy, forces. Moving every atom at random, by central differences."""
    push = np.random.default_rng(1).normal(size=(len(atoms), 3))  # [N, 3] Å
    moved = [atoms.copy() for _ in range(2)]
    for copy, sign in zip(moved, (1, -1)):
        copy.positions += sign * step * push
    after, before = (calculate(copy)[0] for copy in moved)
    slope = -np.sum(calculate(atoms)[1] * push)
    differ("slope of the energy, and zero", slope, 0)
    same("forces against central differences", slope, (after - before) / (2 * step), "differences")


def check_model(facet, model) -> None:
    """What must hold whatever was changed: symmetry, and forces that are slopes of the energy."""
    def calculate(atoms):
        out = outputs(facet, model, atoms)
        return out["energy"].sum(), out["forces"]
    for R in (ROTATION, REFLECTION):
        check_rotation(facet, model, R)
    check_forces(calculate, CRYSTAL)


def check_end(splines) -> None:
    """At the cutoff value, slope and curvature of the radial functions are zero, beyond it exactly; 1 Å inside they are not."""
    r = torch.tensor([CUTOFF - 1e-6, CUTOFF + 1e-6, 2 * CUTOFF, CUTOFF - 1], dtype=torch.float64, requires_grad=True)
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
        D = facet.rotation_of_rows(torch.from_numpy(R), L)
        same(f"turned features after the grid layer, L = {L}", layer(D @ x), D @ layer(x))


def check_density(facet, kind, atoms: Atoms, degree: int) -> None:
    """A class that may stand for Density: same numbers in every layer, same energy and forces, without NeighbourSum."""
    model, seen, degrees = build(facet, degree=degree), [], ((0, degree), (degree, degree), (degree, 0))
    for layer, (l_in, l_out) in zip(model.layers, degrees):
        layer.density = facet.Density(l_in, l_out, model.config).double()  # even where the new class is in use already
        layer.density.register_forward_hook(lambda _, inputs, A: seen.append((inputs, A)))
    want = outputs(facet, model, atoms)
    with mock.patch.object(facet, "NeighbourSum", None):
        for t, (l_in, l_out) in enumerate(degrees):
            density = kind(l_in, l_out, model.config).double()
            for l, (got, A) in enumerate(zip(density(*seen[t][0]), seen[t][1], strict=True)):
                same(f"A of layer {t}, l = {l}", got, A)
                differ(f"A of layer {t}, l = {l}, and zero", A, torch.zeros_like(A))
            model.layers[t].density = density
        got = outputs(facet, model, atoms)
    same("energy", got["energy"], want["energy"])
    same("forces", got["forces"], want["forces"])


# ─── The exercises ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_exercise_01(facet):
    """The Gaussians asked for, smooth at the cutoff, able to start as sine-Bessel functions."""
    model = build(facet, first_knot=0.5)
    assert isinstance(model.splines, facet.Gaussians), "Facet does not use the Gaussians"
    r, h = np.linspace(0, 2 * CUTOFF, 301), 3 / 12
    t = (r[:, None] - 0.5) / h - np.arange(12)
    want = np.exp(-t ** 2 / 2) * np.where(r < CUTOFF, 1 - (r / CUTOFF) ** 2, 0)[:, None] ** 3
    same("Gaussians", model.splines.basis(torch.from_numpy(r)), want, "formula")
    fresh = facet.Gaussians(9, facet.Config(**CONFIG))
    r, n = np.linspace(0.8, CUTOFF, 99), np.repeat([1, 2, 3], 3)
    start = np.sqrt(5) / 2 * np.sin(n * np.pi * r[:, None] / CUTOFF) / (r[:, None] / CUTOFF) * (1 - (r[:, None] / CUTOFF) ** 2)
    same("functions at the start", fresh(torch.from_numpy(r)), start, "fit")
    check_end(model.splines)
    check_model(facet, model)


def test_exercise_02(facet):
    """L = 3 by default, exactly equivariant on its grid; the cost agrees with a count on paper."""
    Z, C, T, B, R = 3, CONFIG["channels"], CONFIG["layers"], CONFIG["groups"], CONFIG["splines"]
    assert facet.Config(("Si",)).degree == 3, "L = 3 is not the default yet"
    for L, points in enumerate((6, 6, 26, 38, 74)):  # of the Lebedev rules of degree 3, 3, 7, 9, 13
        ends = [(l1, l3) for l1, l2, l3 in product(range(L + 1), repeat=3)
                if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0]
        parameters = T * B * (L + 1) * R + Z * C + C
        for l_in, l_out in ((0, L), (L, L), (L, 0)):
            paths = sum(l1 <= l_in and l3 <= l_out for l1, l3 in ends)
            parameters += paths * C * C + Z * C + (min(l_in, l_out) + 1) * C * C + 3 * (l_out + 1) * C * C + C * C + C
        cost = facet.cost(facet.Config(**CONFIG | dict(degree=L)))
        assert cost == dict(points=points, paths=len(ends), parameters=parameters), f"cost of L = {L}"
    check_grid(facet, build(facet, degree=3).layers[0].grid, 3)
    with pytest.raises(AssertionError, match="turned features"):
        check_grid(facet, build(facet, degree=3, grid_degree=7).layers[0].grid, 3)  # the 26 points of L = 2
    check_rotation(facet, build(facet, degree=3), REFLECTION)


def test_exercise_03(facet):
    """Exactly equivariant on a rule of degree 4L, not on one of degree 3L; no linear map; makes new degrees."""
    model = build(facet, activation="cubic")
    assert all(isinstance(layer.grid, facet.CubicGrid) for layer in model.layers), "the layers do not use CubicGrid"
    for L in (1, 2, 3):
        check_grid(facet, build(facet, activation="cubic", degree=L).layers[0].grid, L)
    with pytest.raises(AssertionError, match="turned features"):
        check_grid(facet, build(facet, activation="cubic", grid_degree=6).layers[0].grid, 2)
    grid, x = model.layers[0].grid, random_features(4, 2, CONFIG["channels"])
    differ("grid layer of 2x, and twice that of x", grid(2 * x), 2 * grid(x))
    small, large = ((grid(factor * x) - factor * x).norm() for factor in (1, 1000))
    assert large < 5000 * small, "updates grow faster than the features: crystals unlike the training set will blow up"
    x[:, :1], x[:, 4:] = 0, 0  # vectors only
    for l in (0, 2):
        differ(f"degree {l} made from vectors, and zero", grid(x)[:, facet.degree(l)], 0 * x[:, facet.degree(l)])
    with pytest.raises(ValueError):
        facet.Config(("Si",), activation="quartic")
    check_model(facet, model)


def test_exercise_04(facet):
    """Rotations still hold, reflections no longer; without the cross product they do."""
    model = build(facet)
    check_rotation(facet, model, ROTATION)
    G, signs = numbers(facet.gaunt(1, 1, 1)), np.linalg.det(np.eye(3)[np.indices((3, 3, 3)).reshape(3, -1).T]).reshape(3, 3, 3)
    same("size of the coupling", (G ** 2).sum((0, 1)), np.ones(3), "formula")
    same("coupling and the sign of a permutation, up to one sign", G * np.sign(G[0, 1, 2]), signs / np.sqrt(2), "formula")
    here, mirrored = (outputs(facet, model, atoms)["energy"] for atoms in (CRYSTAL, rotated(CRYSTAL, REFLECTION)))
    differ("energy of the mirror image", mirrored, here)
    every = facet.paths
    with mock.patch.object(facet, "paths", lambda *ls: [path for path in every(*ls) if sum(path) % 2 == 0]):
        check_rotation(facet, build(facet), REFLECTION)


def test_exercise_05(facet):
    """One row of `receiver` concerns the atoms of its species only, as receivers; equal numbers scale the splines."""
    model = build(facet, layers=1)
    receiver, before = model.layers[0].receiver, outputs(facet, model, CRYSTAL)["energies"]
    assert receiver.shape == (3, CONFIG["channels"])
    for z, symbol in enumerate(CONFIG["species"]):
        with torch.no_grad():
            receiver[z] += 1
        after = outputs(facet, model, CRYSTAL)["energies"]
        for i, other in enumerate(CRYSTAL.symbols):
            (differ if symbol == other else same)(f"energy of {other} after a change for {symbol}", after[i], before[i])
        before = after
    model, scaled = build(facet), build(facet)
    with torch.no_grad():
        for layer, other in zip(model.layers, scaled.layers):
            layer.receiver.fill_(1)
            other.receiver.fill_(0.7)
        model.splines.coefficients *= 0.7
    by_receiver, by_spline = (outputs(facet, m, CRYSTAL)["energies"] for m in (scaled, model))
    same("energies after all messages were scaled, by receiver or by spline", by_receiver, by_spline)
    check_model(facet, build(facet))


def test_exercise_06(facet):
    """One number per atom, the same in every orientation, that follows its atom through order, batch and calculator."""
    model, order = build(facet), [3, 0, 4, 2, 1]
    moments = outputs(facet, model, CRYSTAL)["magmoms"]
    for R in (ROTATION, REFLECTION):
        same("magmoms of the turned crystal", outputs(facet, model, rotated(CRYSTAL, R))["magmoms"], moments)
    same("magmoms in another order", outputs(facet, model, CRYSTAL[order])["magmoms"], moments[order])
    differ("magmoms in a wrong order", moments[::-1], moments)
    pushed = CRYSTAL.copy()
    pushed.positions[1] += [0.1, -0.2, 0.1]
    differ("magmoms after a neighbour has moved", outputs(facet, model, pushed)["magmoms"][0], moments[0])
    results = facet.evaluate(model, [facet.find_neighbours(atoms, model.config) for atoms in (MOLECULE[:2], CRYSTAL)])
    same("magmoms by evaluate", results[1]["magmoms"], moments)
    atoms = CRYSTAL.copy()
    atoms.calc = facet.FacetCalculator(model, device="cpu", dtype=torch.float64)
    same("magmoms by ASE", atoms.get_magnetic_moments(), moments)
    check_model(facet, model)


def test_exercise_07(facet):
    """A vector for each atom that turns as positions do, reflections included; zero where no direction is special."""
    model = build(facet)
    dipoles = outputs(facet, model, CRYSTAL)["dipoles"]
    for R in (ROTATION, REFLECTION):
        turned = outputs(facet, model, rotated(CRYSTAL, R))["dipoles"]
        same("dipoles of the turned crystal", turned, dipoles @ R.T)
        differ("dipoles of the turned crystal, not turned along", turned, dipoles)
    same("dipole of an isolated atom", outputs(facet, model, MOLECULE[:1])["dipoles"], np.zeros((1, 3)))
    along = np.array([0.6, -1.1, 1.3])
    pair = outputs(facet, model, Atoms("SiO", [0 * along, along]))["dipoles"]
    same("part of a pair's dipoles across its axis", np.cross(pair, along), np.zeros((2, 3)))
    differ("part of a pair's dipoles along its axis, and zero", pair @ along, np.zeros(2))
    check_model(facet, model)


def test_exercise_08(facet):
    """The splines reach the cutoff complete, a fixed function ends them, and the energy feels no neighbour crossing it."""
    x = torch.linspace(0, 2, 41, dtype=torch.float64)
    ending = facet.cutoff_function(x * CUTOFF, CUTOFF)
    same("cutoff function at 0", ending[0], 1, "formula")
    same("cutoff function beyond the cutoff", ending[x > 1], np.zeros(20), "exact")
    for first_knot in (0.0, 1.0):
        model = build(facet, first_knot=first_knot)
        r = torch.linspace(0.6 * CUTOFF, 1.2 * CUTOFF, 50, dtype=torch.float64)
        same("sum of the splines", model.splines.basis(r).sum(1), facet.cutoff_function(r, CUTOFF), "formula")
        check_end(model.splines)

    def crossing(distance):  # of the third atom, from the first
        return outputs(facet, model, Atoms("SiOCu", [[0, 0, 0], [0.9, 1.2, 1.1], np.array([0.48, 0.6, 0.64]) * distance]))
    inside, outside, well_inside = (crossing(CUTOFF + step) for step in (-1e-6, 1e-6, -1))
    for name in ("energy", "forces"):
        same(f"{name} when a neighbour crosses the cutoff", inside[name], outside[name], "cutoff")
        differ(f"{name} with the neighbour 1 Å inside", well_inside[name], outside[name])
    check_model(facet, model)


def test_exercise_09(facet):
    """EdgeDensity gives what Density gives, and its gradients."""
    for L in (1, 2, 3):
        check_density(facet, facet.EdgeDensity, CRYSTAL, L)


def test_exercise_10(facet):
    """The energy is the mean of the members, their standard deviation the uncertainty; free atoms are certain."""
    model, crystals = build(facet), (CRYSTAL, MOLECULE[:4])
    out = outputs(facet, model, *crystals)
    H = out["members"].shape[1]
    assert H > 1, "a committee of one"
    same("energy", out["energy"], out["members"].sum(1) / H)
    same("uncertainty", out["uncertainty"] ** 2 * (H - 1), ((out["members"].T - out["energy"]) ** 2).sum(0))
    differ("uncertainty, and zero", out["uncertainty"], np.zeros(2))
    turned = outputs(facet, model, rotated(CRYSTAL, REFLECTION))["uncertainty"]
    same("uncertainty of the turned crystal", turned, out["uncertainty"][:1])
    free = outputs(facet, model, MOLECULE[:1])
    same("energies of a free atom", free["members"], np.full((1, H), CONFIG["reference_energies"][0]))
    same("uncertainty of a free atom", free["uncertainty"], np.zeros(1))
    check_model(facet, model)
    with torch.no_grad():
        model.readout[:] = model.readout[:, 2:3].clone()  # all members become the third
    alike = outputs(facet, model, *crystals)
    same("energy of the third member", alike["energy"], out["members"][:, 2])
    same("uncertainty of a committee of one mind", alike["uncertainty"], np.zeros(2))


def test_exercise_11(facet):
    """SO2Density gives what Density gives, and its gradients, with nothing but m2 = 0 of the coupling."""
    def frugal(l_in, l_out, config):
        density = facet.SO2Density(l_in, l_out, config)
        rows = torch.arange((config.degree + 1) ** 2)  # [M]
        l = torch.sqrt(rows).long()  # [M]
        if hasattr(density, "G"):
            density.G.view(len(density.G), len(rows), -1)[:, rows != l * l + l] = 0  # all m2 but 0
        return density
    for l1, l2, l3 in facet.paths(3, 3, 3):
        m1, _, m3 = torch.nonzero(facet.gaunt(l1, l2, l3)[:, l2:l2 + 1].abs() > TOL["formula"]).T
        assert (m1 - l1 == m3 - l3).all(), "where m2 = 0, m1 and m3 are the same"
    for atoms, L in ((CRYSTAL, 1), (CRYSTAL, 2), (ALONG_AXES, 2), (CRYSTAL, 3)):
        check_density(facet, frugal, atoms, L)


def test_exercise_12(facet):
    """What is added to FacetCalculator is Coulomb's law at any distance; forces are its slopes; periodic crystals are refused."""
    model, charges = build(facet), {"Si": 1.2, "O": -0.7, "Cu": 0.4}

    def calculate(atoms, *arguments):
        atoms = atoms.copy()
        kind = facet.CoulombCalculator if arguments else facet.FacetCalculator
        atoms.calc = kind(model, *arguments, device="cpu", dtype=torch.float64)
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_potential_energies()
    for atoms in (MOLECULE, rotated(MOLECULE, REFLECTION), Atoms("SiO", [[0, 0, 0], [3, 4, 12]])):
        energy, _, energies = calculate(atoms, charges)
        want = sum(units.Hartree * units.Bohr * charges[a.symbol] * charges[b.symbol] / np.linalg.norm(a.position - b.position)
                   for a in atoms for b in atoms if a.index < b.index)
        same("energy beyond that of the network", energy - calculate(atoms)[0], want)
        same("sum of the atoms' energies", energies.sum(), energy)
        check_forces(lambda atoms: calculate(atoms, charges), atoms)
    with pytest.raises(ValueError):
        calculate(CRYSTAL, charges)


# ─── Whose facet.py is checked ────────────────────────────────────────────────────────────────────────────────────────

def has(name: str):
    return lambda facet: hasattr(facet, name)


def puts_out(name: str):
    return lambda facet: name in outputs(facet, build(facet), MOLECULE)


ASKED = {  # exercise: what it asks for, and whether a facet.py has it
    1: ("class Gaussians", has("Gaussians")),
    2: ("function cost", has("cost")),
    3: ("class CubicGrid", has("CubicGrid")),
    4: ("path (1, 1, 1) in paths(1, 1, 1)", lambda facet: (1, 1, 1) in facet.paths(1, 1, 1)),
    5: ("attribute receiver in its layers", lambda facet: hasattr(build(facet).layers[0], "receiver")),
    6: ('output "magmoms"', puts_out("magmoms")),
    7: ('output "dipoles"', puts_out("dipoles")),
    8: ("function cutoff_function", has("cutoff_function")),
    9: ("class EdgeDensity", has("EdgeDensity")),
    10: ('output "uncertainty"', puts_out("uncertainty")),
    11: ("class SO2Density", has("SO2Density")),
    12: ("class CoulombCalculator", has("CoulombCalculator")),
}

WRONG = {  # exercise: what is spoilt in its patch, the line's old and new text, what the check must say
    1: ("Gaussians that end with a kink", ".clamp(min=0) ** 3", ".clamp(min=0)", "Gaussians"),
    2: ("points and rows mixed up", "len(layer.grid.to_grid)", "len(layer.grid.to_rows)", "cost of L"),
    3: ("a rule of degree 3L", "least_degree = 4", "least_degree = 3", "turned features"),
    4: ("another product of two vectors", "torch.linalg.cross(e[:, None], e[None]) / sqrt(2)",
        "e[:, None] * e[None] * sqrt(1)", "energies of the turned crystal"),
    5: ("blind to species", "self.receiver[species[:N], None]", "self.receiver[species[:N] * 0, None]", "after a change for"),
    6: ("shifted by the isolated atoms", "h[:N, 0] @ self.moment", "h[-N:, 0] @ self.moment", "magmoms"),
    7: ("(y, z, x) taken for (x, y, z)", "[:, [2, 0, 1]]", "[:, [0, 1, 2]]", "dipoles of the turned crystal"),
    8: ("a curvature that jumps", "1 - x ** 3 * (10 - 15 * x + 6 * x ** 2)", "1 - x ** 2 * (3 - 2 * x)", "curvature just inside"),
    9: ("neighbours and groups mixed up", "[:, 0] // B", "[:, 0] % N", "A of layer"),
    10: ("error of the mean taken for that of a member", "members.std(1)", "members.std(1) / 8 ** 0.5", "uncertainty"),
    11: ("z and −z taken for the same", " * sign ** l)", " * sign ** (0 * l))", "A of layer"),
    12: ("a force that falls off as 1/r", "half / distance ** 2", "half / distance", "central differences"),
}


def patch_of(N: int) -> str:
    return (HERE / f"solutions/{N:02}.patch").read_text(encoding="utf-8")


def apply_patch(patch: str, source: str) -> str:
    """The source after a unified diff: lines that stay or go must stand there exactly, and once, wherever that is."""
    for hunk in re.split(r"(?m)^@@ .* @@\n", patch)[1:]:
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in kept) for kept in (" -", " +"))
        if ("\n" + source).count("\n" + old) != 1:
            raise ValueError(f"should stand in facet.py exactly once:\n{old}")
        source = source.replace(old, new)
    return source


def changed_lines(patch: str) -> int:
    """Lines that a unified diff adds or removes, blank ones not counted."""
    lines = patch.partition("\n@@")[2].splitlines()
    return sum(line.startswith(("+", "-")) and line[1:].strip() != "" for line in lines)


@cache
def solved_by_you() -> list[int]:
    return [N for N, (_, solved) in ASKED.items() if solved(yours)]


def patched(patch: str) -> ModuleType:
    """facet.py with a patch, as a module. Two solutions would get in each other's way, so yours must not be there."""
    if solved_by_you():
        pytest.skip(f"this needs facet.py as it came; yours solves exercises {solved_by_you()}")
    module = ModuleType("facet")
    source = apply_patch(patch, Path(yours.__file__).read_text(encoding="utf-8"))
    exec(compile(source, "facet.py with a patch", "exec"), module.__dict__)
    return module


def check_of(N: int):
    return globals()[f"test_exercise_{N:02}"]


@pytest.fixture
def facet(request):
    """The reader's own facet.py, as soon as it holds what the exercise asks for."""
    N = int(request.node.name[-2:])
    what, _ = ASKED[N]
    if N not in solved_by_you():
        pytest.skip(f"exercise {N} is not solved yet: facet.py has no {what} (see benchmarks/exercises/README.md)")
    return yours


@pytest.mark.parametrize("name", [f"solution_{N:02}" for N in ASKED])
def test_solution(name):
    N = int(name[-2:])
    module = patched(patch_of(N))
    assert ASKED[N][1](module), f"the solution has no {ASKED[N][0]}"
    check_of(N)(module)


@pytest.mark.parametrize("name", [f"wrong_{N:02}" for N in WRONG])
def test_wrong_solution_is_rejected(name):
    N = int(name[-2:])
    what, old, new, complaint = WRONG[N]
    assert patch_of(N).count(old) == 1, f"the solution of exercise {N} should contain {old!r} once: bring WRONG up to date"
    with pytest.raises(AssertionError, match=complaint) as caught:
        check_of(N)(patched(patch_of(N).replace(old, new)))
    print(f"\n{what}: {caught.value}")


def test_readme_tells_other_sizes_or_forgets_an_exercise():
    """Changed lines, in each exercise and in the last table, are those of the patches; at most 15 for the short ones."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    sizes = {N: changed_lines(patch_of(N)) for N in ASKED}
    told = re.findall(r"(?ms)^## (\d+)\. .*?Model solution: (\d+) changed lines.*?`pytest -k exercise_(\d+)`", text)
    assert [tuple(map(int, numbers)) for numbers in told] == [(N, size, N) for N, size in sizes.items()]
    assert {int(N): int(size) for N, size in re.findall(r"(?m)^\| (\d+) \|.*\| (\d+) \|$", text)} == sizes
    assert max(sizes[N] for N in (1, 3, 6, 7)) <= 15
    told = re.search(r"another radial\s+basis takes (\d+)\s+changed\s+lines, a\s+third\s+activation\s+(\d+), a\s+scalar\s+for\s+every\s+atom, "
                     r"up\s+to\s+ASE, (\d+), a\s+vector\s+for\s+every\s+atom\s+(\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert told and tuple(map(int, told.groups())) == tuple(sizes[N] for N in (1, 3, 6, 7))
