"""Facet: an E(3)-equivariant interatomic potential in one readable file.

[F]  N. Miklaucic et al., "Facet: highly efficient E(3)-equivariant networks for interatomic potentials", 2025,
     arXiv 2509.08418. Three ideas: splines as radial functions, a grid layer as non-linearity, a lean network around both.
[B]  I. Batatia et al., "MACE", 2022, arXiv 2206.07697: density projections, normalisation by a mean neighbour count.
[L]  V. I. Lebedev, D. N. Laikov, Doklady Mathematics 59, 477 (1999): quadrature on the sphere.
[D]  C. de Boor, "A Practical Guide to Splines", 2001, ch. IX: B-splines.
[Z]  J. F. Ziegler, J. P. Biersack, U. Littmark, "The Stopping and Range of Ions in Solids", 1985: screened nuclei.

    crystal ─ neighbours ─┬─ radial splines φ_b(r)  (§2) ┐
              (§1)        └─ harmonics Y_lm(r̂)      (§3) ┴─ density ─ mix ─ + skip ─ grid layer ─ … ─ energy ─ forces, stress
                                                            (§5)     (§6)    (§6)     (§7)                   (§8)
                                                            └───────── one layer, repeated ───────┘

Glossary
    N  atoms in the batch                     C  channels: copies of every feature
    K  neighbours, padded to the largest      B  groups of channels; a group shares its radial functions
    S  crystals in the batch                  c  channel within its group, C/B of them
    E  edges, before padding                  T  layers
    L  highest degree l of a feature          R  B-splines on the radial axis
    M  (L+1)², number of (l, m)               P  points of the Lebedev grid
    Q  paths (l1, l2, l3) of a layer          Z  chemical species
    A  rows N·B, one per atom and group (§5)  X  whatever a row holds, (l1 m1 c)

Conventions
    units       Å, eV, eV/Å, eV/Å³
    cell        rows are the lattice vectors; left-handed cells are fine, volume = |det cell|
    edge        dst i ◄────── src j        r_ij = x_j + shift·cell − x_i;  i receives
    features    [N, M, C], degree l in rows l² … (l+1)²−1, m = −l … l
    harmonics   real, mean of Y² over the sphere = 1, l = 1 is √3 (y, z, x)
    parity      degree l has parity (−1)^l, so only couplings with even l1 + l2 + l3 exist: the group is O(3), not SO(3)
    stress      +(1/volume) ∂E/∂strain, as ASE: positive means that the crystal wants to shrink

It does not include charges, spins, long-range forces, odd-parity couplings. `python facet.py` checks what you changed.
"""
from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass, fields
from math import factorial, isqrt, sqrt
from pathlib import Path
from timeit import repeat
from typing import Iterator, NamedTuple

import ase.build
import numpy as np
import torch
from ase import units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, covalent_radii
from ase.optimize import FIRE
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from scipy.integrate import lebedev_rule
from scipy.linalg import expm, expm_frechet
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn.functional import embedding, silu


@dataclass(frozen=True)
class Config:
    """Everything needed to build the model; a checkpoint stores it beside the tensors."""
    species: tuple[str, ...]           # chemical symbols the model knows, in the order of its tables
    cutoff: float = 5.0                # Å; atoms further apart do not see each other within one layer
    degree: int = 2                    # L; 0 gives an invariant network, 1 is fast, 2 accurate, 3 for hard cases
    channels: int = 32                 # C; the width, cost grows about linearly up to 64
    layers: int = 3                    # T; the first takes scalars, the last gives scalars: 3 holds one full layer
    groups: int = 8                    # B; channels of a group share radial functions, one per harmonic degree
    splines: int = 24                  # R; B-splines per radial function, 0.21 Å apart by default
    first_knot: float = 0.0            # Å; where the radial axis begins, best below the shortest distance
    activation: str = "product"        # of the grid layer: "product" (exactly equivariant) or "silu" (the paper's)
    grid_degree: int = 0               # that the grid integrates exactly; 0: 3L for product (less is not exact), 15 for silu
    mean_neighbours: float = 30.0      # of the training set; sums over neighbours are divided by its root
    energy_scale: float = 1.0          # eV; force RMS of the training set times 1 Å
    reference_energies: tuple[float, ...] = ()  # eV per species, E0; empty: zeros
    core: tuple[float, ...] = ()       # Å per species; two atoms closer than the sum of theirs repel; empty: ¾ covalent radius

    def __post_init__(self):
        """Raise ValueError, in one sentence, for what cannot be built. NumPy numbers become plain ones, fit to be saved."""
        for field in fields(self):
            value, many = getattr(self, field.name), field.name in ("species", "reference_energies", "core")
            object.__setattr__(self, field.name, tuple(np.asarray(value).tolist()) if many else type(field.default)(value))
        if not self.species or len(atomic_numbers.keys() & self.species) < len(self.species):
            raise ValueError(f"species must be different chemical symbols, such as ('Si', 'O'), not {self.species}")
        if min(self.layers, self.groups) < 1 or min(self.degree, self.grid_degree) < 0 or self.splines < 4:
            raise ValueError("layers and groups must be at least 1, degree and grid_degree at least 0, splines at least 4")
        if self.channels < 1 or self.channels % self.groups:
            raise ValueError(f"channels ({self.channels}) must be a multiple of groups ({self.groups})")
        if self.activation not in ("product", "silu"):
            raise ValueError(f'activation must be "product" or "silu", not "{self.activation}"')
        if not (0 <= self.first_knot < self.cutoff and self.mean_neighbours > 0):
            raise ValueError(f"first_knot must lie between 0 and the cutoff ({self.cutoff} Å), mean_neighbours above 0")
        if {len(self.reference_energies), len(self.core)} - {0, len(self.species)}:
            raise ValueError("reference_energies and core need one number per species, or none at all")


# ─── §1 Crystals to neighbours ─────────────────────────────────────────────────────────────────────────────────────────
class Neighbours(NamedTuple):
    """One crystal as the model sees it, in NumPy, sorted by dst. Made once, batched many times."""
    species: np.ndarray                # [N] index into config.species
    dst: np.ndarray                    # [E] atom that receives
    src: np.ndarray                    # [E] atom that is seen
    vectors: np.ndarray                # [E, 3] Å, from dst to the image of src
    volume: float                      # Å³; nan where the cell does not span space, so stress is not defined


class Batch(NamedTuple):
    """Crystals side by side, neighbours padded to K. Padding lies beyond the cutoff and so adds exactly nothing."""
    species: Tensor                    # [N]
    src: Tensor                        # [N, K]
    vectors: Tensor                    # [N, K, 3] Å
    crystal: Tensor                    # [N] which crystal the atom belongs to
    volume: Tensor                     # [S] Å³

    def to(self, device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def neighbour_list(positions: np.ndarray, cell: np.ndarray, pbc, cutoff: float):
    """All pairs no further apart than the cutoff, periodic images (of an atom itself too) included.

    positions [N, 3] Å, cell [3, 3] Å (rows), pbc: three booleans, cutoff Å.
    Returns dst [E], src [E], shift [E, 3] (integers), vectors [E, 3] Å: x_src + shift·cell − x_dst, sorted by dst.

    Every atom is folded into the cell; copies that come within the cutoff of it ("ghosts") are listed axis by axis, and one
    KD-tree finds the pairs. Raises ValueError for a flat cell and for two atoms on one spot.
    """
    positions, cell, pbc = np.asarray(positions, float), np.asarray(cell, float), np.broadcast_to(np.asarray(pbc, bool), 3)
    if not np.isfinite(positions).all() or not np.isfinite(cell).all():
        raise ValueError("a position or a cell vector is NaN or infinite")
    if (pbc & ~np.any(cell, axis=1)).any():
        raise ValueError("the crystal is periodic along an axis whose cell vector is zero: set the cell, or pbc=False")
    cell = ase.cell.Cell(cell).complete()  # axes without a vector get a unit one: nothing repeats along them
    if not abs(np.linalg.det(cell)) > 1e-6 * np.linalg.norm(cell, axis=1).prod():  # of a right-angled cell with these edges
        raise ValueError("the cell has no volume: its lattice vectors lie in one plane")
    inverse = np.linalg.inv(cell)
    reach = cutoff * np.linalg.norm(inverse, axis=0)  # [3] the cutoff over the distances between lattice planes
    fractional = positions @ inverse  # [N, 3]
    fold = np.where(pbc, -np.floor(fractional), 0)  # [N, 3] moves an atom into the cell
    ghost, shift = np.arange(len(positions)), fold  # [ghosts], [ghosts, 3]
    for axis in np.flatnonzero(pbc):
        n = int(np.ceil(reach[axis]))
        image = np.arange(-n, n + 1)
        place = fractional[ghost, axis, None] + shift[:, axis, None] + image  # [ghosts, images]
        row, column = np.nonzero((place >= -reach[axis]) & (place < 1 + reach[axis]))
        ghost, shift = ghost[row], shift[row]
        shift[:, axis] += image[column]
    home = positions + fold @ cell  # [N, 3]
    places = positions[ghost] + shift @ cell  # [ghosts, 3]
    pairs = cKDTree(home).sparse_distance_matrix(cKDTree(places), cutoff, output_type="ndarray")
    pairs = pairs[np.argsort(pairs["i"], kind="stable")]
    itself = (ghost[pairs["j"]] == pairs["i"]) & (shift[pairs["j"]] == fold[pairs["i"]]).all(1)  # its images stay
    dst, other = pairs["i"][~itself], pairs["j"][~itself]  # [E], [E]
    src, vectors = ghost[other], places[other] - home[dst]  # [E], [E, 3]
    touching = np.flatnonzero((vectors ** 2).sum(1) < 1e-6)  # Å²
    if len(touching):
        raise ValueError(f"atoms {dst[touching[0]]} and {src[touching[0]]} sit on one spot (closer than 0.001 Å)")
    return dst, src, (shift[other] - fold[dst]).astype(int), vectors


def find_neighbours(atoms: ase.Atoms, config: Config) -> Neighbours:
    """ASE crystal to Neighbours. Raises ValueError for an element the model does not know and for broken geometry."""
    if unknown := set(atoms.symbols) - set(config.species):
        raise ValueError(f"element {min(unknown)} is not among those the model knows: {' '.join(config.species)}")
    species = np.array([config.species.index(symbol) for symbol in atoms.symbols], int)  # [N]
    dst, src, _, vectors = neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, config.cutoff)
    return Neighbours(species, dst, src, vectors, abs(np.linalg.det(atoms.cell.array)) or np.nan)


def make_batch(crystals: list[Neighbours], cutoff: float, dtype=torch.float32) -> Batch:
    """Crystals to one padded batch. Shapes as in Batch."""
    first = np.cumsum([0] + [len(c.species) for c in crystals])  # [S+1] where each crystal's atoms begin
    dst = np.concatenate([c.dst + f for c, f in zip(crystals, first)])  # [E]
    count = np.bincount(dst, minlength=first[-1])  # [N]
    slot = np.arange(len(dst)) - np.repeat(np.cumsum(count) - count, count)  # [E] dst is sorted: position in its row
    src = np.arange(len(count))[:, None].repeat(count.max(initial=1), 1)  # [N, K], K at least 1; padding: the atom itself
    src[dst, slot] = np.concatenate([c.src + f for c, f in zip(crystals, first)])
    vectors = np.tile([2 * cutoff, 0, 0], (*src.shape, 1))  # [N, K, 3] padding: φ and its derivatives are exactly zero there
    vectors[dst, slot] = np.concatenate([c.vectors for c in crystals])
    return Batch(torch.from_numpy(np.concatenate([c.species for c in crystals])), torch.from_numpy(src),
                 torch.from_numpy(vectors).to(dtype), torch.from_numpy(np.repeat(np.arange(len(crystals)), np.diff(first))),
                 torch.tensor([c.volume for c in crystals], dtype=torch.float64))


# ─── §2 Radial functions ───────────────────────────────────────────────────────────────────────────────────────────────
class RadialSplines(nn.Module):
    """`count` learned functions of the distance, each a uniform cubic B-spline. [F §3.1], [D]

        φ_b(r) = Σ_k coefficients[k, b] · N(t − k),     t = (r − first_knot)/h,   k = −1 … R−2

    N is the cubic B-spline centred on 0: four cubic pieces on [−2, 2] that join with two continuous derivatives. A spline
    is a look-up table with smooth interpolation: at any r four entries count. The last N ends at the cutoff, so value,
    slope and curvature of φ vanish there and it is exactly zero beyond: no cutoff function is needed. Below first_knot the
    splines run out in the same way, so φ is smooth and finite down to r = 0. The functions start as √5/2
    (1 − x²) sin(nπx)/x, x = r/cutoff: sine-Bessel functions that end smoothly, of mean square about 1 in the ball.
    """
    def __init__(self, count: int, config: Config):
        super().__init__()
        self.cutoff, self.first = config.cutoff, config.first_knot
        self.spacing = (config.cutoff - config.first_knot) / config.splines  # h, Å
        pieces = torch.tensor([[1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1]], dtype=torch.float64) / 6
        self.register_buffer("pieces", pieces.T.contiguous(), persistent=False)  # [power, piece]
        self.coefficients = nn.Parameter(torch.zeros(config.splines, count, dtype=torch.float64))  # [R, count]
        n = torch.arange(count) // (config.degree + 1) % config.groups + 1  # [count] one frequency per group
        self.fit(lambda r: sqrt(5) / 2 * torch.pi * n * torch.sinc(n * r[:, None] / self.cutoff) * (1 - (r[:, None] / self.cutoff) ** 2))

    def basis(self, r: Tensor) -> Tensor:
        """The R B-splines at r [...] Å → [..., R]."""
        R = self.coefficients.shape[0]
        t = ((r - self.first) / self.spacing).clamp(-3, R)  # [...]
        k = t.detach().floor()  # [...]
        x = t - k  # [...] in [0, 1)
        four = torch.stack([torch.ones_like(x), x, x * x, x * x * x], -1) @ self.pieces.to(r)  # [..., 4] the non-zero ones
        column = k.long()[..., None] + torch.arange(3, 7, device=r.device)  # [..., 4], 3 to the right
        wide = four.new_zeros(*r.shape, R + 7).scatter(-1, column, four)  # [..., R+7] margins catch what lies outside
        return wide[..., 3:R + 3]  # [..., R]

    def forward(self, r: Tensor) -> Tensor:
        """r [...] Å → [..., count]."""
        return self.basis(r) @ self.coefficients  # [..., count]

    @torch.no_grad()
    def fit(self, f, distances: Tensor | None = None) -> Tensor:
        """Set the coefficients by least squares so that φ(r) ≈ f(r); f maps r [n] to [n, count] and is 0 beyond r_cut.
        distances [n] Å are those that occur (an MLP is to be imitated where it is used); without, the whole axis counts
        as in a uniform medium. Returns the root mean square error of each function, [count].
        """
        r = torch.linspace(self.first, self.cutoff, 1024, dtype=torch.float64) if distances is None else distances.double()
        weight = r / self.cutoff if distances is None else torch.ones_like(r)  # √ of the shell's volume, or what occurs
        target = f(r).double() * weight[:, None]  # [n, count]
        design = self.basis(r) * weight[:, None]  # [n, R]
        fitted = torch.linalg.lstsq(design, target, driver="gelsd").solution  # [R, count]
        self.coefficients.copy_(fitted)
        return ((design @ fitted - target) ** 2).mean(0).sqrt()


class Core(nn.Module):
    """Repulsion of atoms that come closer than any in the training data, half of V to either atom. [Z]

        V(r) = k Z_i Z_j / r · ξ(r/a) · (1 − (r/ρ)⁶)³    for r < ρ = core_i + core_j, zero with two derivatives beyond

    Below the shortest distance that it was trained on, a network may say anything; two nuclei, screened by their
    electrons (ξ, a: Ziegler, Biersack and Littmark), say clearly what is right. V falls all the way from infinity to 0.
    """
    def __init__(self, config: Config):
        super().__init__()
        Z = np.array([atomic_numbers[symbol] for symbol in config.species])  # [Z]
        table = np.stack([Z, Z ** 0.23 / 0.4685, np.asarray(config.core or 0.75 * covalent_radii[Z])])
        self.register_buffer("table", torch.from_numpy(table), persistent=False)  # [3, Z] charge, 1/a (1/Å), core (Å)
        xi = torch.tensor([[3.1998, 0.94229, 0.4029, 0.20162], [0.18175, 0.50986, 0.28022, 0.02817]], dtype=torch.float64)
        self.register_buffer("xi", xi, persistent=False)  # [2, 4] exponents and weights

    def forward(self, r: Tensor, species: Tensor, src: Tensor) -> Tensor:
        """r [N, K] Å, species [N], src [N, K] → [N] eV."""
        here = self.table[:, species]  # [3, N]
        charge, core = here[0][:, None] * here[0][src], here[2][:, None] + here[2][src]  # 2 × [N, K]
        x = r * (here[1][:, None] + here[1][src])  # [N, K] r/a
        screening = torch.exp(-x[..., None] * self.xi[0]) @ self.xi[1] * (1 - (r / core) ** 6).clamp(min=0) ** 3  # [N, K]
        return (units.Hartree * units.Bohr / 2 * charge / r * screening).sum(1)  # [N]


# ─── §3 Real spherical harmonics ───────────────────────────────────────────────────────────────────────────────────────
def harmonics(unit: Tensor, L: int) -> Tensor:
    """Real spherical harmonics of degree 0 … L of unit vectors: [..., 3] → [..., (L+1)²]. Mean of Y² over the sphere: 1.

        Y_l,±m = √((2l+1) (2 − δ_m0) (l−m)!/(l+m)!) · P_l^m(z) · {Re, Im} (x + iy)^m

    P_l^m is the Legendre function over sin^m θ, a polynomial in z, so nothing is singular at the poles. Each degree comes
    from the two before: (l−m) P_l^m = (2l−1) z P_{l−1}^m − (l+m−1) P_{l−2}^m. No Condon-Shortley sign: either choice is
    right as long as everything uses the same; this one makes l = 1 simply √3 (y, z, x).
    """
    x, y, z = unit.unbind(-1)  # [...]
    Y = [None] * (L + 1) ** 2
    real, imaginary = torch.ones_like(x), None  # of (x + iy)^m
    for m in range(L + 1):
        before, now = 0.0, float(np.prod(np.arange(1, 2 * m, 2)))  # P_m^m = (2m−1)!!
        for l in range(m, L + 1):
            norm = sqrt((2 * l + 1) * (2 if m else 1) * factorial(l - m) / factorial(l + m))
            Y[l * l + l + m] = norm * now * real
            if m:
                Y[l * l + l - m] = norm * now * imaginary
            before, now = now, (2 * l + 1) / (l - m + 1) * now * z - (l + m) / (l - m + 1) * before
        real, imaginary = (x * real - y * imaginary, x * imaginary + y * real) if m else (x, y)
    return torch.stack(Y, -1)  # [..., M]


def degree(l: int) -> slice:
    """Rows of degree l in a feature [N, M, C]."""
    return slice(l * l, (l + 1) ** 2)


def degree_of_row(L: int) -> Tensor:
    """The degree l of each of the (L+1)² rows, [M]: 0 1 1 1 2 2 2 2 2 …"""
    return torch.arange(L + 1).repeat_interleave(2 * torch.arange(L + 1) + 1)  # [M]


# ─── §4 The grid and the coupling ──────────────────────────────────────────────────────────────────────────────────────
def lebedev(exact_degree: int) -> tuple[Tensor, Tensor]:
    """Smallest Lebedev rule that integrates every polynomial of exact_degree: points [P, 3], weights [P] of sum 1. [L]"""
    for degree in (*range(3, 32, 2), *range(35, 132, 6)):
        if degree >= exact_degree:
            points, weights = lebedev_rule(degree)  # [3, P], [P]
            return torch.from_numpy(points.T.copy()), torch.from_numpy(weights / weights.sum())
    raise ValueError(f"no Lebedev rule has degree {exact_degree}; the largest is 131")


def gaunt(l1: int, l2: int, l3: int) -> Tensor:
    """Coupling coefficients [2·l1+1, 2·l2+1, 2·l3+1] that combine degrees l1 and l2 into l3. [F §3.3]

        G[m1, m2, m3] = mean over the sphere of Y_l1m1 Y_l2m2 Y_l3m3, scaled so that Σ G² over m1, m2 is 1 for every m3

    The scale lets independent inputs of unit variance give an output of unit variance. The integrand is a polynomial of
    degree l1 + l2 + l3, so the Lebedev rule makes no error. For odd l1 + l2 + l3 it is 0 (see "parity"), and G nan.
    """
    points, weights = lebedev(l1 + l2 + l3)
    Y = harmonics(points, max(l1, l2, l3))  # [P, M]
    G = torch.einsum("p,pa,pb,pc->abc", weights, Y[:, degree(l1)], Y[:, degree(l2)], Y[:, degree(l3)])
    return G * sqrt((2 * l3 + 1) / (G ** 2).sum())  # [2·l1+1, 2·l2+1, 2·l3+1]


def paths(l_in: int, l_out: int, L: int) -> list[tuple[int, int, int]]:
    """All (l1, l2, l3): feature l1 ≤ l_in times harmonic l2 ≤ L gives l3 ≤ l_out, of natural parity."""
    return [(l1, l2, l3) for l1 in range(l_in + 1) for l2 in range(L + 1) for l3 in range(l_out + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0]


# ─── §5 Density: sum over neighbours first ─────────────────────────────────────────────────────────────────────────────
def chunks(index: Tensor, X: int) -> list[slice]:
    """Rows of index [A, K] in portions whose gathered features [rows, K, X] fit the processor's cache (or a GPU's memory)."""
    rows = max(1, (2 ** 26 if index.is_cuda else 2 ** 17) // max(1, index.shape[1] * X))
    return [slice(a, a + rows) for a in range(0, len(index), rows)]


class NeighbourSum(torch.autograd.Function):
    """D[a, m, x] = Σ_k edge[a, m, k] h[index[a, k], x]: what the neighbours hold, weighted by where they are.

    The number Σ edge·h[index]·D is linear in each of edge, h and D, and its derivative with respect to one of them is a
    product of the other two. So this function and the next two are each other's derivatives, to any order. Written that
    way, features of neighbours, the largest tensor of all, exist for one cache-sized chunk at a time and are never kept.
    A = N·B rows: group b of atom i sees group b of its neighbours.
    """
    @staticmethod
    def forward(ctx, edge, h, index):
        """edge [A, M, K], h [A, X], index [A, K] → [A, M, X]."""
        ctx.save_for_backward(edge, h, index)
        D = edge.new_empty(*edge.shape[:2], h.shape[1])  # [A, M, X]
        for a in chunks(index, h.shape[1]):
            torch.bmm(edge[a], embedding(index[a], h), out=D[a])  # embedding is h[index[a]] [rows, K, X], only faster
        return D
    @staticmethod
    def backward(ctx, D):
        edge, h, index = ctx.saved_tensors
        return NeighbourDot.apply(D, h, index), NeighbourSpread.apply(D, edge, index) if ctx.needs_input_grad[1] else None, None


class NeighbourDot(torch.autograd.Function):
    """edge[a, m, k] = Σ_x D[a, m, x] h[index[a, k], x]."""
    @staticmethod
    def forward(ctx, D, h, index):
        """D [A, M, X], h [A, X], index [A, K] → [A, M, K]."""
        ctx.save_for_backward(D, h, index)
        edge = D.new_empty(*D.shape[:2], index.shape[1])  # [A, M, K]
        for a in chunks(index, h.shape[1]):
            torch.bmm(D[a], embedding(index[a], h).mT, out=edge[a])
        return edge
    @staticmethod
    def backward(ctx, edge):
        D, h, index = ctx.saved_tensors
        return NeighbourSum.apply(edge, h, index), NeighbourSpread.apply(D, edge, index), None


class NeighbourSpread(torch.autograd.Function):
    """h[x'] = Σ of Σ_m D[a, m, x] edge[a, m, k] over all a, k with index[a, k] = x'."""
    @staticmethod
    def forward(ctx, D, edge, index):
        """D [A, M, X], edge [A, M, K], index [A, K] → [A, X]."""
        ctx.save_for_backward(D, edge, index)
        h = D.new_zeros(len(D), D.shape[2])  # [A, X]
        for a in chunks(index, h.shape[1]):
            h.index_add_(0, index[a].flatten(), torch.bmm(edge[a].mT, D[a]).flatten(0, 1))
        return h
    @staticmethod
    def backward(ctx, h):
        D, edge, index = ctx.saved_tensors
        return NeighbourSum.apply(edge, h, index), NeighbourDot.apply(D, h, index), None


class Density(nn.Module):
    """What the neighbours send to atom i along path p = (l1, l2, l3), for channel c of group b. [F §3.2]

        A[i,p,m3,bc] = Σ_j φ_b,l2(r_ij) Σ_m1,m2 G[m1,m2,m3] Y_l2m2(r̂_ij) h[j,l1m1,bc] / √mean_neighbours

    Read as written, this makes a tensor of edges × paths × channels, and most codes evaluate it so, because their radial
    functions differ from channel to channel. Ours are shared by the C/B channels of a group and G knows no j, so the sum
    over neighbours goes first and the coupling is done once per atom, not once per edge:

        D[i,b,m2,m1,c] = Σ_j (φ_b Y_l2m2)(r_ij) h[j,l1m1,bc]     one matrix product per atom and group
        A[i,p,m3,bc]   = Σ_m1,m2 G[m1,m2,m3] D[i,b,m2,m1,c]      one matrix product per atom

    Little is lost by sharing: the mixing before and after (§6) lets every channel use the functions of every group.
    """
    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        L = config.degree
        self.paths = paths(l_in, l_out, L)
        self.counts = [sum(l3 == l for *_, l3 in self.paths) for l in range(l_out + 1)]  # Q_l, paths that end in l
        self.scale = 1 / sqrt(config.mean_neighbours)
        G = torch.zeros(len(self.paths), (l_out + 1) ** 2, (L + 1) ** 2, (l_in + 1) ** 2, dtype=torch.float64)
        for q, (l1, l2, l3) in enumerate(self.paths):
            G[q, degree(l3), degree(l2), degree(l1)] = gaunt(l1, l2, l3).permute(2, 1, 0)  # [m3, m2, m1]
        rows = [(l * l + m, q) for l in range(l_out + 1) for m in range(2 * l + 1)
                for q, (*_, l3) in enumerate(self.paths) if l3 == l]  # what comes out, ordered by l3, m3, path
        self.register_buffer("G", torch.stack([G[q, lm] for lm, q in rows]).flatten(1), persistent=False)  # [l3 m3 Q, m2 m1]
        self.register_buffer("degree_of_row", degree_of_row(L), persistent=False)  # [M]

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> list[Tensor]:
        """h [N, (l_in+1)², C], index [N·B, K], phi [N, B, L+1, K], Y [N, M, K] → A, for each l3 [N·(2·l3+1), Q_l3·C]."""
        (N, M1, C), B, M = h.shape, phi.shape[1], Y.shape[1]
        edge = phi.index_select(2, self.degree_of_row) * (self.scale * Y)[:, None]  # [N, B, M, K]
        h = h.reshape(N, M1, B, -1).transpose(1, 2).reshape(N * B, -1)  # [N B, m1 c]
        D = NeighbourSum.apply(edge.flatten(0, 1), h, index)  # [N B, m2, m1 c]
        D = D.view(N, B, M * M1, -1).transpose(1, 2).reshape(N, M * M1, C)  # [N, m2 m1, C]
        A = (self.G @ D).split([(2 * l + 1) * Q for l, Q in enumerate(self.counts)], 1)  # [N, m3 Q, C] for each l3
        return [a.reshape(-1, Q * C) for a, Q in zip(A, self.counts)]  # [N m3, Q C] for each l3


# ─── §6 Mixing and skip connection ─────────────────────────────────────────────────────────────────────────────────────
def randn(*shape: int, fan_in: int = 1) -> nn.Parameter:
    """Random weights of variance 1/fan_in: inputs of unit variance give outputs of unit variance."""
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / sqrt(fan_in))


class Mix(nn.Module):
    """message[i, l3 m3] = A[i, p, m3, c] W_l3[pc, c'], summed over paths p that end in l3 and channels c."""
    def __init__(self, counts: list[int], channels: int):
        super().__init__()
        self.W = nn.ParameterList(randn(Q * channels, channels, fan_in=Q * channels) for Q in counts)

    def forward(self, A: list[Tensor], N: int) -> Tensor:
        """A as Density returns it → [N, (l_out+1)², C]."""
        return torch.cat([(a @ W).view(N, -1, W.shape[1]) for a, W in zip(A, self.W)], 1)  # [N, M, C]


class Linear(nn.Module):
    """y[i, lm, c'] = Σ_c x[i, lm, c] W_l[c, c']: mixes channels, never m. No bias: it would point somewhere if l > 0."""
    def __init__(self, L: int, fan_in: int, fan_out: int):
        super().__init__()
        self.W = randn(L + 1, fan_in, fan_out, fan_in=fan_in)  # [L+1, fan_in, fan_out]
        self.register_buffer("degree_of_row", degree_of_row(L), persistent=False)  # [M]

    def forward(self, x: Tensor) -> Tensor:
        """[N, (L+1)², fan_in] → [N, (L+1)², fan_out]."""
        W = self.W.index_select(0, self.degree_of_row)  # [M, fan_in, fan_out]
        return torch.bmm(x.transpose(0, 1), W).transpose(0, 1)  # [N, M, fan_out]


class Skip(nn.Module):
    """Carries an atom's own features past the neighbours, scaled by the atom's species z: (h ⊙ a_z) W_l."""
    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.a = randn(len(config.species), config.channels)  # [Z, C]
        self.linear = Linear(min(l_in, l_out), config.channels, config.channels)
        self.missing = (l_out + 1) ** 2 - (min(l_in, l_out) + 1) ** 2  # degrees that h does not have yet

    def forward(self, h: Tensor, species: Tensor) -> Tensor:
        """h [N, (l_in+1)², C], species [N] → [N, (l_out+1)², C]."""
        own = self.linear(h[:, :len(self.linear.degree_of_row)] * self.a[species][:, None])  # [N, ≤ M, C]
        return nn.functional.pad(own, (0, 0, 0, self.missing))  # [N, M, C]


# ─── §7 Grid layer ─────────────────────────────────────────────────────────────────────────────────────────────────────
class GridLayer(nn.Module):
    """A non-linearity for features that rotate: x → x + f(x). [F §3.3]

    x[i, lm, c] are the coefficients of a function on the sphere, g(Ω, c) = Σ_lm Y_lm(Ω) x[lm, c]. Rotating x rotates g,
    and whatever is done point by point commutes with that. So: evaluate g on the points of a Lebedev grid, apply the same
    network to the channels at every point, project back with f[lm] = Σ_p weight_p Y_lm(Ω_p) f(Ω_p).
    A grid has only the symmetry of a cube: what it integrates exactly is equivariant exactly, the rest approximately.
    """
    least_degree: float  # of the rule, over L

    def __init__(self, L: int, config: Config):
        super().__init__()
        points, weights = lebedev(config.grid_degree or int(self.least_degree * L))
        self.register_buffer("to_grid", harmonics(points, L), persistent=False)  # [P, M]
        self.register_buffer("to_rows", (weights[:, None] * self.to_grid).T.contiguous(), persistent=False)  # [M, P]

    def on_grid(self, x: Tensor) -> Tensor:
        return torch.tensordot(self.to_grid, x, ([1], [1]))  # [N, M, C] → [P, N, C]

    def from_grid(self, g: Tensor) -> Tensor:
        return torch.tensordot(self.to_rows, g, ([1], [0])).transpose(0, 1)  # [P, N, C] → [N, M, C]


class ProductGrid(GridLayer):
    """f = W₃ (σ(s) ⊙ u(Ω) ⊙ v(Ω)) with u, v = g W₁, g W₂ and gates from the scalars, s = x[00] W_s + b.

    u ⊙ v projected on degree L is the integral of a polynomial of degree 3L: with a rule of degree 3L it is exact, and so
    is equivariance. A gate is one number for all points, so it changes nothing. silu(s) is added to the scalars.
    v is first divided by √((1 + mean v²)/2), one number per atom too: so f grows like x, not like x², and crystals unlike
    those in the training set do not blow up from layer to layer (energies of unknown compositions: a quarter better).
    Product of functions on the sphere: EquiformerV3. Gates from the scalars: NequIP.
    """
    least_degree = 3

    def __init__(self, L: int, config: Config):
        super().__init__(L, config)
        C = config.channels
        self.W12, self.W3 = Linear(L, C, 2 * C), Linear(L, C, C)
        self.Ws, self.b = randn(C, C, fan_in=C), nn.Parameter(torch.zeros(C, dtype=torch.float64))
        triple = torch.einsum("mp,pa,pb->mab", self.to_rows, self.to_grid, self.to_grid)  # [M, M, M]
        self.to_rows /= triple.square().sum((1, 2), keepdim=True)[:, 0].sqrt()  # so that u ⊙ v has unit variance again

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        u, v = self.W12(x).chunk(2, -1)  # 2 × [N, M, C]
        v = v * ((1 + v.square().mean((1, 2), keepdim=True)) / 2).rsqrt()  # [N, M, C]
        u, v = self.on_grid(torch.cat([u, v], -1)).chunk(2, -1)  # 2 × [P, N, C]
        s = torch.addmm(self.b, x[:, 0], self.Ws)  # [N, C]
        f = self.from_grid(u * v) * torch.sigmoid(s)[:, None]  # [N, M, C]
        f = torch.cat([f[:, :1] + silu(s)[:, None], f[:, 1:]], 1)  # [N, M, C]
        return x + self.W3(f)


class SiluGrid(GridLayer):
    """f = W₃ silu(g W₁ + b), as in the paper. Not a polynomial: equivariant only as far as the grid is fine."""
    least_degree = 7.5  # 15 for L = 2: 86 points

    def __init__(self, L: int, config: Config):
        super().__init__(L, config)
        C = config.channels
        self.W1, self.W3 = Linear(L, C, C), Linear(L, C, C)
        self.b = nn.Parameter(torch.zeros(C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        return x + self.W3(self.from_grid(silu(self.on_grid(self.W1(x)) + self.b)))


# ─── §8 The network ────────────────────────────────────────────────────────────────────────────────────────────────────
class Layer(nn.Module):
    """h ← grid layer of (mixed density of the neighbours + skip) / √2. Degrees 0 … l_in become 0 … l_out."""
    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.density = Density(l_in, l_out, config)
        self.mix = Mix(self.density.counts, config.channels)
        self.skip = Skip(l_in, l_out, config)
        self.grid = {"product": ProductGrid, "silu": SiluGrid}[config.activation](l_out, config)

    def forward(self, h: Tensor, species: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> Tensor:
        """h [N+Z, (l_in+1)², C] → [N+Z, (l_out+1)², C]; the rest as in Density. The last Z rows have no neighbours."""
        N, Z = len(phi), len(h) - len(phi)
        message = self.mix(self.density(h[:N], index, phi, Y), N)  # [N, M, C]
        message = nn.functional.pad(message, (0, 0, 0, 0, 0, Z))  # [N+Z, M, C]
        return self.grid((message + self.skip(h, species)) / sqrt(2))  # [N+Z, M, C]


class Facet(nn.Module):
    """The interatomic potential. Build with `Facet(config)`, call with a Batch, or use FacetCalculator.

        E = Σ_i E0[z_i] + energy_scale · (h_i − h_alone[z_i]) · readout + core_i

    The first layer takes scalars (the embedded species), the last gives scalars (the energy), those between carry degrees
    0 … L. Each layer sees one cutoff further. What the network makes of an atom without neighbours is subtracted, so that
    the energy of an isolated atom is E0: one atom of each species rides along in every batch, after the N real ones.
    """
    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        Z, C, T, L = len(config.species), config.channels, config.layers, config.degree
        self.splines, self.core = RadialSplines(T * config.groups * (L + 1), config), Core(config)
        self.embedding = randn(Z, C)  # [Z, C]
        l = [0] + [L] * (T - 1) + [0]
        self.layers = nn.ModuleList(Layer(l[t], l[t + 1], config) for t in range(T))
        self.readout = randn(C, fan_in=C)  # [C]
        self.to(dtype)  # everything above is made in float64, so that constants are exact in any dtype
        self.register_buffer("E0", torch.tensor(config.reference_energies or [0.0] * Z, dtype=torch.float64), persistent=False)

    def atomic_energies(self, batch: Batch) -> Tensor:
        """Energy of each atom, [N] eV, float64. Differentiable with respect to batch.vectors."""
        (N, K), B, L = batch.src.shape, self.config.groups, self.config.degree
        r = batch.vectors.norm(dim=-1)  # [N, K]
        phi = self.splines(r).view(N, K, -1, B, L + 1).permute(2, 0, 3, 4, 1).contiguous()  # [T, N, B, L+1, K]
        Y = harmonics(batch.vectors / r[..., None], L).mT.contiguous()  # [N, M, K]
        index = (batch.src[:, None] * B + torch.arange(B, device=r.device)[:, None]).flatten(0, 1)  # [N B, K]
        species = torch.cat([batch.species, torch.arange(len(self.embedding), device=r.device)])  # [N+Z]
        h = self.embedding[species][:, None]  # [N+Z, 1, C]
        for layer, phi_t in zip(self.layers, phi):
            h = layer(h, species, index, phi_t, Y)  # [N+Z, M, C], the last [N+Z, 1, C]
        e, alone = (h[:, 0] @ self.readout).split([N, len(self.embedding)])  # [N], [Z]
        learned = (e - alone[batch.species]).double() * self.config.energy_scale  # [N]
        return learned + self.E0[batch.species] + self.core(r, batch.species, batch.src)  # [N]

    def forward(self, batch: Batch, training: bool = False) -> dict[str, Tensor]:
        """Energy [S] eV, energies [N] eV per atom, forces [N, 3] eV/Å, virial [S, 3, 3] eV and stress [S, 3, 3] eV/Å³, its
        quotient by the volume (nan where there is none).

        One gradient g_ij = ∂E/∂r_ij gives both: r_ij = x_j − x_i, so F_i = Σ_j g_ij − Σ_k g_ki, and a strain ε moves r_ij
        by ε r_ij, so virial = Σ_ij r_ij ⊗ g_ij, made symmetric against rounding.
        training=True keeps the graph, so that a loss on forces and stress can be differentiated.
        """
        S, vectors = len(batch.volume), batch.vectors.detach().requires_grad_()
        with torch.enable_grad():
            energies = self.atomic_energies(batch._replace(vectors=vectors))  # [N]
            g = torch.autograd.grad(energies.sum(), vectors, create_graph=training)[0]  # [N, K, 3]
        energy = energies.new_zeros(S).index_add(0, batch.crystal, energies)  # [S]
        forces = g.sum(1).index_add(0, batch.src.flatten(), -g.flatten(0, 1))  # [N, 3]
        virial = vectors.mT @ g  # [N, 3, 3]
        virial = virial.new_zeros(S, 3, 3).index_add(0, batch.crystal, (virial + virial.mT) / 2)  # [S, 3, 3]
        stress = virial / batch.volume[:, None, None].to(g)  # [S, 3, 3]
        out = {"energy": energy, "energies": energies, "forces": forces, "virial": virial, "stress": stress}
        return out if training else {name: value.detach() for name, value in out.items()}


# ─── §9 Use: files and the ASE calculator ──────────────────────────────────────────────────────────────────────────────
def save(model: Facet, path: str | Path, **more) -> None:
    """Write tensors and the plain config to path. A temporary file, safe on the disk, is renamed into place: whatever happens,
    path holds the old checkpoint or the new one. Raises OSError when the disk is full or the folder cannot be written."""
    temporary, content = Path(f"{path}.part"), io.BytesIO()  # torch.save itself would hide what is wrong with a disk
    torch.save({"facet": 1, "config": asdict(model.config), "state": model.state_dict(), **more}, content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Facet:
    """The model that `save` wrote. Raises FileNotFoundError, or ValueError for a file that is not a Facet checkpoint."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train_small.py writes runs/<name>/model.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = Facet(Config(**content["config"]), dtype)
        model.load_state_dict(content["state"])
    except Exception as error:
        raise ValueError(f"{path} is not a Facet checkpoint, or it is damaged ({type(error).__name__})") from error
    return model.to(device)


def evaluate(model: Facet, crystals: list[Neighbours], batch_atoms: int = 256) -> list[dict]:
    """Results of each crystal under ASE's names: energy, free_energy (the same, eV), energies [N] (eV per atom), forces [N, 3]
    (eV/Å) and, if the cell spans space, stress [6] (eV/Å³, Voigt). In batches of about batch_atoms, which bounds the memory."""
    results, size = [{}] * len(crystals), np.array([len(c.species) for c in crystals], int)  # size [S]
    alike = np.argsort([len(c.dst) / len(c.species) for c in crystals])  # [S] of similar K: little padding
    portion = np.cumsum(size[alike]) // batch_atoms  # [S]
    for group in (alike[portion == p] for p in np.unique(portion)):
        batch = make_batch([crystals[s] for s in group], model.config.cutoff, model.readout.dtype).to(model.readout.device)
        out, ends = {name: value.cpu().numpy() for name, value in model(batch).items()}, np.cumsum(size[group])
        energies, forces = np.split(out["energies"], ends), np.split(out["forces"], ends)
        for i, s in enumerate(group):
            results[s] = dict(energy=out["energy"][i], free_energy=out["energy"][i], energies=energies[i], forces=forces[i])
            if np.isfinite(crystals[s].volume):
                results[s]["stress"] = full_3x3_to_voigt_6_stress(out["stress"][i])
    return results


class FacetCalculator(Calculator):
    """ASE calculator: `atoms.calc = FacetCalculator("runs/si/model.pt")`, for the properties that `evaluate` names.

    device: "cuda" if there is one, unless given. dtype: torch.float64 for phonons and tight relaxations.
    The model is copied, so that later training does not change the calculator.
    """
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(self, model: Facet | str | Path, device=None, dtype: torch.dtype = torch.float32, **kwargs):
        super().__init__(**kwargs)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(model, Facet):
            self.model = Facet(model.config, dtype).to(device)
            self.model.load_state_dict(model.state_dict())
        else:
            self.model = load(model, device, dtype)
        self.model.requires_grad_(False)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results, = evaluate(self.model, [find_neighbours(self.atoms, self.model.config)])


def fire(atoms: ase.Atoms, fmax: float, steps: int, cell: bool) -> Iterator[ase.Atoms]:
    """ASE's FIRE(FrechetCellFilter(atoms)), or FIRE(atoms) without cell: yields crystals, goes on once they have results.

        x = (X, N U):  positions = X Fᵀ,  cell = cell₀ Fᵀ,  F = exp U;    f = −∂E/∂x = (forces F, −(∂F/∂U)ᵀ [virial F⁻ᵀ] / N)

    ASE's FIRE moves x as if it were N + 3 atoms. ASE's filter gives the same numbers, in ten times the time.
    """
    N, cell0 = len(atoms), atoms.cell.array
    x = ase.Atoms(f"X{N + 3}", np.concatenate([atoms.positions, np.zeros((3, 3))]))  # [N+3, 3]
    optimizer = FIRE(x, logfile=None)
    for step in range(steps + 1):
        U, pull = x.positions[N:] / N, np.zeros((3, 3))  # [3, 3], [3, 3]
        if np.abs(U).max() > 1:  # stretched or shrunk e-fold: that is no relaxation any more
            return
        F, atoms = expm(U), atoms.copy()  # [3, 3]
        atoms.set_cell(cell0 @ F.T)
        atoms.positions = x.positions[:N] @ F.T  # [N, 3]
        atoms.info.update(steps=step, converged=False)
        yield atoms
        if cell:
            virial = atoms.get_volume() * voigt_6_to_full_3x3_stress(atoms.calc.results["stress"])  # [3, 3]
            pull = -expm_frechet(U.T, virial @ np.linalg.inv(F.T), compute_expm=False) / N  # [3, 3]
        f = np.concatenate([atoms.calc.results["forces"] @ F, pull])  # [N+3, 3]
        atoms.info["converged"] = bool(np.linalg.norm(f, axis=1).max() < fmax)
        if atoms.info["converged"]:
            return
        x.calc = SinglePointCalculator(x, forces=f)
        optimizer.step()


def relax(model: Facet, crystals: list[ase.Atoms], fmax: float = 0.02, steps: int = 500, cell: bool = True,
          batch_atoms: int = 256) -> list[ase.Atoms]:
    """Relax many crystals at once, atoms and, if `cell`, lattice vectors: each takes the steps of ASE's FIRE (see `fire`).

    Returns copies with energy, forces and stress, and in atoms.info "steps" and "converged": no force, and no row of the
    cell's, reaches fmax (eV/Å). Converged crystals leave the batch; one that breaks (NaN, atoms on one spot, a cell stretched or
    shrunk e-fold) stops where it was last sound, and the others do not notice.
    Raises ValueError for constraints, for a cell that cannot relax and for what find_neighbours refuses.
    """
    for s, atoms in enumerate(crystals):
        if atoms.constraints or cell and atoms.cell.rank < 3:
            raise ValueError(f"crystal {s} has constraints, or lacks the three lattice vectors that cell=True needs")
    runs = [fire(atoms, fmax, steps, cell) for atoms in crystals]
    relaxed = [next(run) for run in runs]
    moving = dict(enumerate(relaxed))
    while moving:
        graphs, after = {}, {}
        for s, atoms in moving.items():
            try:
                graphs[s] = find_neighbours(atoms, model.config)
            except ValueError as error:
                if atoms.info["steps"] == 0:
                    raise ValueError(f"crystal {s}: {error}") from None
        for s, results in zip(graphs, evaluate(model, [*graphs.values()], batch_atoms)):
            if all(np.isfinite(value).all() for value in results.values()):
                relaxed[s] = moving[s]
                relaxed[s].calc = SinglePointCalculator(relaxed[s], **results)
                after[s] = next(runs[s], None)
        moving = {s: atoms for s, atoms in after.items() if atoms}
    return relaxed


# ─── §10 Self-check: python facet.py ───────────────────────────────────────────────────────────────────────────────────
def rotation_of_rows(R: Tensor, L: int) -> Tensor:
    """The matrix D [M, M] with Y(R r) = D Y(r), block-diagonal in l; solved from the values at enough directions."""
    points, _ = lebedev(2 * L + 1)
    return torch.linalg.lstsq(harmonics(points, L), harmonics(points @ R.T, L)).solution.T  # [M, M]


def random_alloy(atoms: int, seed: int = 0) -> ase.Atoms:
    """A rattled silicon-like crystal, half of it carbon."""
    rng, n = np.random.default_rng(seed), round((atoms / 8) ** (1 / 3))
    crystal = ase.build.bulk("Si", cubic=True) * (n, n, n)
    crystal.symbols = rng.choice(["Si", "C"], len(crystal))
    crystal.positions += rng.normal(0, 0.1, (len(crystal), 3))
    return crystal


def self_check() -> None:
    """Print what a reader who changed the file wants to know, within seconds."""
    print(f"Facet on CPU, threads: {torch.get_num_threads()}, torch {torch.__version__}; float64 but for the speed")
    torch.manual_seed(0)
    R = -np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]  # generic, improper: multiples of 90° prove nothing
    D, x = rotation_of_rows(torch.from_numpy(R), 2), torch.randn(50, 9, 16, dtype=torch.float64)
    for kind, exact in (ProductGrid, 5), (ProductGrid, 6), (SiluGrid, 6), (SiluGrid, 15), (SiluGrid, 29):
        layer = kind(2, Config(("Si",), channels=16, grid_degree=exact)).double()
        error = (D @ layer(x) - layer(D @ x)).norm() / layer(x).norm()
        print(f"{kind.__name__:12s} {len(layer.to_grid):3d} points  equivariance error, L = 2 {error:.1e}")
    model = Facet(Config(("C", "Si"), mean_neighbours=28.0), torch.float64)
    graph, t, strain = find_neighbours(random_alloy(64), model.config), 1e-5, np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]]) / 10
    push = np.random.default_rng(1).normal(size=(64, 3))  # [N, 3] Å
    path = graph.vectors @ strain + push[graph.src] - push[graph.dst]  # [E, 3] how the edges change with atoms and cell
    here, there, after, before = evaluate(model, [graph._replace(vectors=vectors) for vectors in (
        graph.vectors, graph.vectors @ R.T, graph.vectors + t * path, graph.vectors - t * path)])
    slope = graph.volume * (voigt_6_to_full_3x3_stress(here["stress"]) * strain).sum() - (here["forces"] * push).sum()  # eV
    print(f"symmetry                energy {abs(there['energy'] - here['energy']):.1e} eV, "
          f"forces {abs(there['forces'] - here['forces'] @ R.T).max():.1e} eV/Å")
    print(f"central differences     forces and stress {abs((after['energy'] - before['energy']) / (2 * t) - slope):.1e} eV")
    print("second moments of the features, layer by layer, l = 0 1 2 …: near 1 where signals neither die nor explode")

    def show(stage, _, x):
        print(f"    {type(stage).__name__:12s}", *(f"{x[:, degree(l)].square().mean():8.2f}" for l in range(isqrt(x.shape[1]))))
    for stage in (stage for layer in model.layers for stage in (layer.mix, layer.skip, layer.grid)):
        stage.register_forward_hook(show)
    evaluate(model, [graph])
    print("parameters             ", sum(p.numel() for p in model.parameters()))
    model = Facet(model.config)
    for atoms in (8, 64, 512):
        batch = make_batch([find_neighbours(random_alloy(atoms), model.config)], model.config.cutoff)
        times = repeat(lambda: model(batch), number=1, repeat=8)[2:]  # s
        print(f"speed                   {atoms:4d} atoms, {batch.src.shape[1]} neighbours: {1000 * np.median(times):.1f} ms")


if __name__ == "__main__":
    self_check()
