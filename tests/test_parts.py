"""Tests of the parts of facet.py: against SciPy, SymPy, the periodic table, differences.

What the whole potential must have is in test_facet.py, files and the calculator in test_use.py.
"""
import copy
from dataclasses import replace
from itertools import combinations_with_replacement, product
from math import isqrt
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from scipy.interpolate import BSpline
from scipy.special import sph_harm_y

import facet
import reference_numpy
from test_facet import PINNED
from tools.check import (
    CONFIG,
    CUTOFF,
    SMALL,
    TOL,
    TRICLINIC,
    WIDE_CORE,
    batch_of,
    build,
    differ,
    features,
    ladder,
    largest,
    outputs,
    same,
    weight_slope,
)
from tools.properties import GENERIC, IMPROPER, random_alloy, wigner

# ─── Radial functions ───────────────────────────────────────────────────────────────────────────

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
    splines = facet.RadialSplines(9, CONFIG)
    known = facet.RadialSplines(9, CONFIG)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shape = known.coefficients.shape
        known.coefficients += torch.randn(shape, dtype=torch.float64, generator=g)
    differ("coefficients before", splines.coefficients, known.coefficients)
    same("error where an exact fit exists", splines.fit(known), torch.zeros(9), "formula")
    same("coefficients", splines.coefficients, known.coefficients)

    def waves(r):
        return torch.sin(2 * torch.arange(1, 10) * r[:, None]) * (CUTOFF - r[:, None]) ** 3

    # The error of each function, where distances are as frequent as in a uniform medium
    error = splines.fit(waves)
    differ("error of the fastest wave", error[-1], 0)
    assert error[0] < error[-1] / 10, "a slow wave should fit better than a fast one"
    middles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    evenly = CUTOFF * middles
    uniform = CUTOFF * middles ** (1 / 3)
    errors = []
    for r in (uniform, evenly):
        errors.append((splines(r) - waves(r)).square().mean(0).sqrt())
    volume = 3 ** 0.5  # r²/cutoff² has a mean of a third
    same("reported error", error * volume / errors[0], np.ones(9), "spline fit")
    differ("reported error, evenly", error * volume / errors[1], np.ones(9))


# ─── The core ───────────────────────────────────────────────────────────────────────────────────

def test_core_repels_ever_more_and_ends_smoothly():
    """From where the core begins down to nothing; there it ends with two derivatives."""
    core = facet.Repulsion(facet.Config(species=("H", "O", "Si", "Cu", "U"))).double()
    for i, j in combinations_with_replacement(range(5), 2):
        end = float(core.core[i] + core.core[j])

        def energy(r, i=i, j=j):
            r = torch.as_tensor(r, dtype=torch.float64)[:, None]  # [n, 1] each atom sees the last
            species = torch.tensor([i] * (len(r) - 1) + [j])
            return core(r, species, torch.full((len(r), 1), len(r) - 1))[:-1]

        r = torch.linspace(0.02, 0.98, 200, dtype=torch.float64) * end
        V = energy(torch.cat([r, r[:1]]))
        assert (V.diff() < 0).all() and (V > 0).all() and V[0] > 100
        inside = energy([end - 1e-4, end - 1e-3, 1.0])
        outside = energy([end, end + 0.01, 10, 1.0])
        same("beyond the core", outside, np.zeros(3), "exact")
        assert 0 < inside[0] < 1.1e-3 * inside[1], "does not vanish as a third power"
    wide = outputs(build(core=WIDE_CORE), PINNED["collinear"])
    none = outputs(build(core=(0.1, 0.1, 0.1)), PINNED["collinear"])
    differ("energy with the core", wide["energy"], none["energy"])


@pytest.mark.parametrize("cutoff", (1.5, 2.0, 2.7, 3.3, 4.1, 5.0, 6.0))
def test_core_of_every_element_ends_within_the_cutoff(cutoff):
    """H to Lr, each beside each: exactly nothing from the cutoff on; control: something within."""
    config = facet.Config(tuple(chemical_symbols[1:104]), cutoff=cutoff)
    usual = 0.75 * covalent_radii[1:104]
    species = torch.arange(103)
    src = species.expand(103, 103)
    for dtype in (torch.float32, torch.float64):
        core = facet.Repulsion(config)
        same("default core", core.core, np.minimum(usual, cutoff / 2), "exact")
        core.to(dtype)
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


@pytest.mark.parametrize("first_knot", (0.0, 1.5))
def test_second_derivatives_are_finite_for_close_atoms(first_knot):
    """Of pairs along an axis or none, in one batch: pairs do not see each other."""
    model = build(first_knot=first_knot)
    pairs = []
    for axis in ((0, 0, 1), (1, 0, 0), (2, -3, 6)):
        for distance in (0.002, 0.03, 1.3):
            other = distance * np.array(axis) / np.linalg.norm(axis)
            pairs.append(Atoms("SiO", [[0, 0, 0], other]))

    # Energy, its slope and curvature for every component of either atom's vector
    batch = batch_of(model, *pairs)
    vectors = batch.vectors.clone().requires_grad_()  # [18, 1, 3]
    energies = model.atomic_outputs(batch._replace(vectors=vectors))["energies"]  # [18]
    slope, = torch.autograd.grad(energies.sum(), vectors, create_graph=True)  # [18, 1, 3]
    curvature = []
    for atom, axis in np.ndindex(2, 3):
        total = slope[atom::2, :, axis].sum()
        curvature += torch.autograd.grad(total, vectors, retain_graph=True)  # [18, 1, 3]

    # What training needs
    out = model(batch, differentiable=True)
    total = out["forces"].square().sum() + out["energy"].sum()
    gradients = torch.autograd.grad(total, [*model.parameters()])
    for values in (energies, slope, *curvature, *gradients):
        same("finite", values.isfinite(), torch.ones_like(values), "exact")
    far = torch.stack(curvature).view(6, 3, 3, 2, 3)[:, :, -1]  # of pairs 1.3 Å apart
    for n in range(3):
        differ("second derivatives at the last distance", far[:, n], 0 * far[:, n])



# ─── Harmonics, grid points, coupling ───────────────────────────────────────────────────────────

def test_harmonics_equal_those_of_scipy(L=6):
    """The poles included. Orthonormality by Gauss-Legendre in z and equidistant angles."""
    z, weights = np.polynomial.legendre.leggauss(L + 1)
    angles = np.arange(2 * L + 2) * np.pi / (L + 1)
    z, angle = (a.ravel() for a in np.meshgrid(z, angles, indexing="ij"))
    rho = np.sqrt(1 - z ** 2)
    u = np.vstack([np.stack([rho * np.cos(angle), rho * np.sin(angle), z], -1),
                   np.eye(3), -np.eye(3)])

    # SciPy's are complex, of norm 1, and have the Condon-Shortley sign
    theta = np.arccos(u[:, 2])
    angle = np.arctan2(u[:, 1], u[:, 0])
    want = []
    for l in range(L + 1):
        for m in range(-l, l + 1):
            wave = np.sqrt(4 * np.pi) * (-1) ** m * sph_harm_y(l, abs(m), theta, angle)
            want.append(wave.real if m == 0 else 2 ** 0.5 * (wave.real if m > 0 else wave.imag))
    Y = facet.harmonics(torch.from_numpy(u), L).numpy()
    same("harmonics", Y, np.stack(want, -1), "formula")

    # Means over the sphere, without the poles
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
        mean = weights @ facet.harmonics(points, degree + 1)
        M = (degree + 1) ** 2
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


# ─── The sum over neighbours ────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("L", (0, 1, 2, 3))
def test_summing_neighbours_first_equals_coupling_first(L):
    """Sum over neighbours, then couple = couple edge by edge, then sum."""
    N, K, C, B = 5, 4, CONFIG.channels, CONFIG.groups
    g = torch.Generator().manual_seed(1)
    shapes = ((N, (L + 1) ** 2, C), (N, B, K, L + 1), (N, K, (L + 1) ** 2))
    h, phi, Y = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)
    src = torch.randint(N, (N, K), generator=g)
    density = build(degree=L).layers[1].density
    index = src[:, None] * B + torch.arange(B)[:, None]
    A = density(h, index, phi, Y)  # [N, J, C]
    widths = [(2 * l + 1) * Q for l, Q in enumerate(density.counts)]

    # Edge by edge, one path after the other
    for l3, found in enumerate(A.split(widths, 1)):
        by_path = []
        for l1, l2, l in density.paths:
            if l == l3:
                by_path.append(torch.einsum(
                    "nck,abd,nkb,nkac->ndc", phi[..., l2].repeat_interleave(C // B, 1),
                    facet.gaunt(l1, l2, l3), Y[..., facet.rows_of(l2)],
                    h[src][:, :, facet.rows_of(l1)]))
        want = torch.cat(by_path, -1) / CONFIG.mean_neighbours ** 0.5
        same(f"density of degree {l3}", found.reshape(want.shape), want, "formula")
        differ(f"density of degree {l3}", want, 0 * want)


def sums(phi, Y, h, index, G, of_degree) -> torch.Tensor:
    """What facet.NeighbourSum computes, in one einsum: [Q, N+U, b c]."""
    N, B, K = index.shape
    M1 = G.shape[1] // Y.shape[3]
    there = h[index].view(N, B, K, -1, M1)
    G = G.view(len(G), M1, -1)
    A = torch.einsum("qam,nsbkl,lm,nskm,nbkca->qnbc", G, phi, of_degree, Y, there)
    alone = len(h) // B - N  # the last atoms see nothing
    return torch.nn.functional.pad(A.flatten(2), (0, 0, 0, alone))


def derivatives(A: torch.Tensor, inputs, order: int = 3) -> list[torch.Tensor]:
    """Gradients of a sum of squares, of a sum of their squares, and so on; of each order three."""
    found = []
    values = [A]
    for _ in range(order):
        total = sum((value * torch.arange(value.numel()).view_as(value).sin() * value).sum()
                    for value in values)
        values = torch.autograd.grad(total, inputs, create_graph=True)
        found += values
    return found


@pytest.mark.parametrize("terms", (1, 2))
def test_sums_over_neighbours_and_three_derivatives_equal_those_of_an_einsum(terms):
    """However the atoms are cut in chunks; one atom has no neighbours, some edges go one way."""
    g = torch.Generator().manual_seed(0)
    L, N, B, K, c, M1, Q = 1, 5, 2, 3, 2, 4, 6
    inputs = [torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_() for shape in
              ((N, terms, B, K, L + 1), (N, terms, K, 4), ((N + 1) * B, c * M1))]
    G = torch.randn(Q, M1 * 4, dtype=torch.float64, generator=g)
    index = torch.randint((N + 1) * B, (N, B, K), generator=g)
    constants = index, G, facet.Density(L, L, facet.Config(("Si",), degree=L)).of_degree

    whole = sums(*inputs, *constants)
    want = derivatives(whole, inputs)
    for atoms in (1, 3, 5):
        pieces = [slice(a, min(a + atoms, N)) for a in range(0, N, atoms)]
        with mock.patch.object(facet, "chunks", lambda index, X, pieces=pieces: pieces):
            A, *_ = facet.NeighbourSum.apply(*inputs, None, *constants)
            same(f"sums in chunks of {atoms}", A, whole, "formula")
            for n, found in enumerate(derivatives(A, inputs)):
                order, name = n // 3 + 1, ("φ", "Y", "h")[n % 3]
                same(f"derivative {order} for {name} in chunks of {atoms}", found, want[n])
                differ(f"derivative {order} for {name}", want[n], 0 * want[n])


@pytest.mark.parametrize("needed", ("φ", "Y", "h", "φY", "φh", "Yh"))
def test_sums_over_neighbours_are_differentiated_for_some_inputs_alone(needed):
    g = torch.Generator().manual_seed(0)
    N, B, K = 4, 2, 3
    shapes = {"φ": (N, 1, B, K, 2), "Y": (N, 1, K, 4), "h": ((N + 1) * B, 8)}
    inputs = {name: torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_(
        name in needed) for name, shape in shapes.items()}
    G = torch.randn(6, 16, dtype=torch.float64, generator=g)
    index = torch.randint((N + 1) * B, (N, B, K), generator=g)
    constants = index, G, facet.Density(1, 1, facet.Config(("Si",), degree=1)).of_degree

    some = [inputs[name] for name in needed]
    want = derivatives(sums(*inputs.values(), *constants), some)
    A, *_ = facet.NeighbourSum.apply(*inputs.values(), None, *constants)
    for n, found in enumerate(derivatives(A, some)):
        name = f"derivative {n // len(some) + 1} for {needed[n % len(some)]}"
        same(name, found, want[n])
        differ(name, want[n], 0 * want[n])


class PlainSum:
    """`sums` in the place of facet.NeighbourSum; its derivatives are autograd's."""

    @staticmethod
    def apply(phi, Y, h, grad_A, *constants):
        return [sums(phi, Y, h, *constants)]


@pytest.mark.parametrize("weights", ("readout", "layers.1.mix.W.1"))
def test_forces_by_weights_by_places_equal_those_of_plain_sums(weights):
    """The forces are linear in these weights: some sums get no gradient from those after them."""
    model = build()
    batch = batch_of(model, TRICLINIC)
    g = torch.Generator().manual_seed(0)
    line = torch.randn(batch.vectors.shape, dtype=torch.float64, generator=g)

    thirds = []
    for kind in (facet.NeighbourSum, PlainSum):
        with mock.patch.object(facet, "NeighbourSum", kind):
            vectors = batch.vectors.clone().requires_grad_()
            energies = model.atomic_outputs(batch._replace(vectors=vectors))["energies"]
            slopes, = torch.autograd.grad(energies.sum(), vectors, create_graph=True)
            along = (slopes * line).sum()
            by_weights, = torch.autograd.grad(
                along, model.get_parameter(weights), create_graph=True)
            thirds += torch.autograd.grad(by_weights.sum(), vectors)
    same(f"forces by {weights} by places", *thirds)
    differ(f"forces by {weights} by places", thirds[1], 0 * thirds[1])


def test_chunks_hold_every_atom_once():
    pieces = facet.chunks(torch.zeros(1000, 2, 50, dtype=int), 10 ** 6)
    assert len(pieces) > 3, "this index should need several chunks"
    atoms = np.concatenate([np.arange(1000)[piece] for piece in pieces])
    same("atoms in all chunks", atoms, np.arange(1000), "exact")
    one_by_one = [slice(n, n + 1) for n in range(3)]
    assert facet.chunks(torch.zeros(3, 2, 50, dtype=int), 10 ** 9) == one_by_one


class Along:
    """The energy of a crystal along a line of all its r_ij, and its derivatives."""

    def __init__(self, activation: str):
        self.model = build(activation=activation, core=WIDE_CORE)
        atoms = TRICLINIC.copy()
        atoms.rattle(0.05, seed=0)  # no distance is the sum of two cores, where the third jumps
        self.batch = batch_of(self.model, atoms)
        g = torch.Generator().manual_seed(0)
        self.line = torch.randn(self.batch.vectors.shape, dtype=torch.float64, generator=g) / 10

    def derivatives(self, place: float, order: int) -> list[torch.Tensor]:
        """Energy and its first `order` derivatives at `place`, in units of the line."""
        s = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        vectors = self.batch.vectors + s * self.line
        energies = self.model.atomic_outputs(self.batch._replace(vectors=vectors))["energies"]
        found = [energies.sum()]
        for _ in range(order):
            found += torch.autograd.grad(found[-1], s, create_graph=True)
        return found


@pytest.mark.parametrize("activation", ("product", "silu"))
def test_third_derivatives_of_the_energy_are_slopes_of_the_second(activation):
    """Where no distance passes a knot of the splines within the step. (There the third jumps.)"""
    along, step = Along(activation), 1e-6
    first, second = (along.derivatives(sign * step, 2) for sign in (1, -1))
    _, _, curvature, third = along.derivatives(0.0, 3)
    slope = (first[2] - second[2]) / (2 * step)
    same("third derivative", third / slope, 1.0, "slope")
    differ("third derivative", third, 0)
    differ("third derivative", third / curvature, 1.0)


@pytest.mark.parametrize("activation", ("product", "silu"))
def test_gradients_of_a_loss_on_curvatures_are_slopes(activation):
    """What training on Hessians needs, along a random direction of all weights."""
    along, step = Along(activation), 1e-6
    along.model = copy.deepcopy(along.model)
    weights = list(along.model.parameters())
    g = torch.Generator().manual_seed(1)
    line = [torch.randn(w.shape, dtype=torch.float64, generator=g) for w in weights]
    gradient = torch.autograd.grad(along.derivatives(0.0, 2)[2], weights, allow_unused=True)
    got = sum(float((a * b).sum()) for a, b in zip(gradient, line, strict=True) if a is not None)

    curvatures = []
    for change in (step, -2 * step):
        with torch.no_grad():
            torch._foreach_add_(weights, line, alpha=change)
        curvatures.append(float(along.derivatives(0.0, 2)[2].detach()))
    slope = (curvatures[0] - curvatures[1]) / (2 * step)
    same("gradient of a curvature", got / slope, 1.0, "slope")
    differ("slope of a curvature", slope, 0)


def test_torch_func_says_why_it_cannot_differentiate():
    """And not in silence, or wrongly."""
    model = build()
    batch = batch_of(model, SMALL)

    def energy(vectors):
        return model.atomic_outputs(batch._replace(vectors=vectors))["energies"].sum()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(energy)(batch.vectors)


def test_padded_neighbours_get_no_gradient():
    """Beside a denser crystal there are empty places; that they add nothing is in the table."""
    model = build()
    sparse = PINNED["planar"]
    batch = batch_of(model, sparse, PINNED["skewed"])
    empty = batch.vectors.norm(dim=-1) >= 2 * CUTOFF - 1e-9
    assert 50 < empty[:len(sparse)].sum() < empty.numel(), "this batch should have much padding"
    vectors = batch.vectors.clone().requires_grad_()
    energies = model.atomic_outputs(batch._replace(vectors=vectors))["energies"]
    first = torch.autograd.grad(energies.sum(), vectors, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), vectors)[0]
    for what, values in (("gradient", first), ("gradient of its square", second)):
        same(f"{what} at padding", values[empty], 0 * values[empty], "exact")
        differ(f"{what} at neighbours", values[~empty], 0 * values[~empty])


# ─── Grid layers ────────────────────────────────────────────────────────────────────────────────

def grid_error(L: int, R=GENERIC, **changes) -> float:
    """How much it matters whether features are rotated before or after the grid layer."""
    layer = build(degree=L, layers=2, **changes).layers[0].grid
    D = wigner(R, L)
    g = torch.Generator().manual_seed(2)
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
        default = build(degree=L, activation="silu").layers[0].grid
        assert len(default.to_grid) == len(facet.lebedev(int(7.5 * L))[0])


def test_scalar_layer_needs_one_grid_point():
    g = torch.Generator().manual_seed(4)
    for activation in ("product", "silu"):
        last = build(activation=activation, grid_degree=9).layers[-1].grid
        finer = copy.deepcopy(last)
        assert len(last.to_grid) == 1
        points, weights = facet.lebedev(9)
        finer.to_grid = torch.ones(len(points), 1, dtype=torch.float64)
        finer.to_rows = weights[None]
        x = torch.randn(4, 1, CONFIG.channels, dtype=torch.float64, generator=g)
        same(activation, last(x), finer(x), "formula")


# ─── Moments, weights ───────────────────────────────────────────────────────────────────────────

def wide_model(fan_in: int | None = None) -> facet.Facet:
    """A fresh model, wide enough for means; fan_in, if given, replaces that of every weight."""
    right = facet.randn

    def randn(*shape, **given):
        return right(*shape, fan_in=fan_in) if fan_in else right(*shape, **given)

    config = replace(CONFIG, channels=64, groups=4, splines=24, mean_neighbours=40.0,
                     species=tuple(chemical_symbols[1:31]), reference_energies=())
    with torch.random.fork_rng(devices=[]), mock.patch.object(facet, "randn", randn):
        torch.default_generator.manual_seed(3)
        return facet.Facet(config, torch.float64).requires_grad_(False)


def moments_by_degree(x: torch.Tensor) -> np.ndarray:
    """Second moments of features [N, M, C] for l = 0, 1, …"""
    degrees = range(isqrt(x.shape[1]))
    return np.array([float(x[:, facet.rows_of(l)].square().mean()) for l in degrees])


def start_moments(model: facet.Facet) -> dict[str, np.ndarray]:
    """Second moments, per degree, of what every stage of a wide model makes of unit variance."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    N, K, C, M = 300, 40, 64, 9
    found = {"embedding": moments_by_degree(model.embedding(torch.arange(30))[:, None])}
    x = draw(N, M, C)
    found["readout"] = moments_by_degree((x[:, :1] @ model.readout)[..., None])
    species = torch.randint(30, (N,), generator=g)
    for t, layer in enumerate(model.layers):
        M_in = (1, M, M)[t]
        seen = isqrt(layer.skip.shared) ** 2
        skip = layer.skip(draw(N, M_in, C), species)[:, :seen]
        found[f"layer {t} skip"] = moments_by_degree(skip)
        widths = [(2 * l + 1) * Q for l, Q in enumerate(layer.density.counts)]
        found[f"layer {t} mix"] = moments_by_degree(layer.mix(draw(N, sum(widths), C)))

        # Neighbours everywhere in the ball, as many as the mean: a density of unit variance
        r = draw(N, K, 3)
        unit = r / r.norm(dim=-1, keepdim=True)
        distance = CUTOFF * torch.rand(N, K, dtype=torch.float64, generator=g) ** (1 / 3)
        phi = model.splines(distance).view(N, K, 3, 4, 3)[:, :, t].transpose(1, 2)
        index = torch.randint(N, (N, 1, K), generator=g) * 4 + torch.arange(4)[:, None]
        A = layer.density(draw(N, M_in, C), index, phi, facet.harmonics(unit, 2))
        by_degree = [float(a.square().mean()) for a in A.split(widths, 1)]
        found[f"layer {t} density"] = np.array(by_degree)

        # The grid: what goes there, the product that comes back, the scalars that go on
        y = x[:, :layer.skip.shared + layer.skip.missing]
        grid = layer.grid
        u, v = grid.W12(y).chunk(2, -1)
        found[f"layer {t} W1"] = moments_by_degree(u)
        found[f"layer {t} W2"] = moments_by_degree(v)
        found[f"layer {t} W3"] = moments_by_degree(grid.W3(y))
        found[f"layer {t} Ws"] = moments_by_degree((y[:, 0] @ grid.Ws)[:, None])
        squares = grid.from_grid(grid.on_grid(y) * grid.on_grid(draw(*y.shape))) / grid.spread
        found[f"layer {t} product"] = moments_by_degree(squares)
    return found


def test_every_stage_keeps_unit_variance_at_the_start():
    """Per degree; control: with another fan-in, the same for all weights, no stage does."""
    for stage, moment in start_moments(wide_model()).items():
        same(f"moments of {stage}, by degree", moment, np.ones_like(moment), "moment")
    for stage, moment in start_moments(wide_model(fan_in=150)).items():
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


@pytest.mark.parametrize("activation", ("product", "silu"))
@pytest.mark.parametrize("of", ("energy", "energies", "forces", "virial"))
def test_gradients_for_the_weights_are_slopes(of, activation):
    """With core and without; control: a gradient that is detached somewhere is seen."""
    for seed, core in enumerate(((), WIDE_CORE)):
        model = copy.deepcopy(build(activation=activation, core=core))
        batch = batch_of(model, TRICLINIC, PINNED["planar"], SMALL)
        same(f"slope of {of}", weight_slope(model, batch, of, seed), 0, "slope")
    right = facet.Linear.forward
    with mock.patch.object(facet.Linear, "forward", lambda self, x: right(self, x.detach())):
        differ("slope, once detached", weight_slope(model, batch, of), 0)


# ─── Species ────────────────────────────────────────────────────────────────────────────────────

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
    """Each has its own embedding, skip, core and reference energy.

    The last twenty of them in the reference, too, whose table takes long for many.
    """
    species = tuple(chemical_symbols[1:count + 1])
    E0 = tuple(np.arange(count) - 3.5)
    model = build(species=species, reference_energies=E0, layers=2)
    few = build(species=species[-20:], reference_energies=E0[-20:], layers=2)
    crystal = TRICLINIC.copy()
    crystal.symbols = [species[-1 - n % count] for n in range(len(crystal))]
    for stage, error in ladder(few, crystal).items():
        same(stage, error, 0)
    lonely = [Atoms(symbol, [[0, 0, 0]]) for symbol in species]
    same("lonely atoms", outputs(model, *lonely)["energy"], E0, "formula")

    # The same two atoms of every kind: no two kinds have the same energy
    pairs = [Atoms([symbol, species[0]], [[0, 0, 0], [0.3, 0.4, 2.3]]) for symbol in species]
    energy = outputs(build(species=species, reference_energies=(), layers=2), *pairs)["energy"]
    apart = np.diff(np.sort(energy))
    assert (apart > TOL["rounding"]).all(), "two species are one"
    out = outputs(model, *pairs)
    one = outputs(model, pairs[-1])
    same("the last pair, alone", out["forces"][-2:], one["forces"])


def test_only_species_that_are_present_matter():
    """A crystal has the same energy whether other species are in the batch or in the table."""
    assert batch_of(build(), SMALL).present.tolist() == [0, 1]
    copper = PINNED["one atom and its images"]
    assert batch_of(build(), copper).present.tolist() == [2]
    assert batch_of(build(), copper, SMALL).present.tolist() == [0, 1, 2]

    # A model of two species with the same weights
    rows = [0, 1]
    reference = CONFIG.reference_energies[:2]
    few = copy.deepcopy(build(species=("Si", "O"), reference_energies=reference))
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


# ─── Large energies in float32 ──────────────────────────────────────────────────────────────────

def test_energies_of_large_crystals_are_exact_in_float32():
    """A model with large E0 says the sum of E0 and what the model without says."""
    E0 = (-2000.123456789, -433.987654321, 0.5)
    large = build(torch.float32, reference_energies=E0)
    none = build(torch.float32, reference_energies=())
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
