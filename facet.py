"""Facet: an E(3)-equivariant interatomic potential in one readable file.

[F]  N. Miklaucic et al., "Facet: highly efficient E(3)-equivariant networks for interatomic potentials", 2025,
     arXiv 2509.08418. Three ideas: splines as radial functions, a grid layer as non-linearity, a lean network around both.
[B]  I. Batatia et al., "MACE", 2022, arXiv 2206.07697: density projections, normalisation by a mean neighbour count.
[L]  V. I. Lebedev, D. N. Laikov, Doklady Mathematics 59, 477 (1999): quadrature on the sphere.
[D]  C. de Boor, "A Practical Guide to Splines", 2001, ch. IX: B-splines.

    crystal ─ neighbours ─┬─ radial splines φ_b(r)  (§2) ┐
              (§1)        └─ harmonics Y_lm(r̂)      (§3) ┴─ density ─ mix ─ + skip ─ grid layer ─ … ─ energy ─ forces, stress
                                                            (§5)     (§6)    (§6)     (§7)          (§8)      (§9)
                                                            └───────── one layer, repeated ───────┘

Glossary
    N  atoms in the batch                     C  channels: copies of every feature
    K  neighbours, padded to the largest      H  hidden channels of the grid layer
    S  crystals in the batch                  B  radial functions of one layer
    E  edges, before padding                  T  layers
    L  highest degree l of a feature          R  B-splines on the radial axis
    M  (L+1)², number of (l, m)               P  points of the Lebedev grid
    Q  paths (l1, l2, l3) of a layer          Z  chemical species

Conventions
    units       Å, eV, eV/Å, eV/Å³
    cell        rows are the lattice vectors; left-handed cells are fine, volume = |det cell|
    edge        dst i ◄────── src j        r_ij = x_j + shift·cell − x_i;  i receives
    features    [N, M, C], degree l in rows l² … (l+1)²−1, m = −l … l
    harmonics   real, mean of Y² over the sphere = 1, l = 1 is √3 (y, z, x)
    parity      degree l has parity (−1)^l, so only couplings with even l1 + l2 + l3 exist: the group is O(3), not SO(3)
    stress      +(1/volume) ∂E/∂strain, as ASE: positive means that the crystal wants to shrink

It does not include: charges, spins, long-range forces, odd-parity couplings, dispersion, uncertainties.
`python facet.py` checks what you changed.
"""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from math import factorial, pi, sqrt
from pathlib import Path
from typing import NamedTuple

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import atomic_numbers
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.integrate import lebedev_rule
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn.functional import relu, silu


@dataclass(frozen=True)
class Config:
    """Everything needed to build the model; a checkpoint stores it beside the tensors."""
    species: tuple[str, ...]           # chemical symbols the model knows, in the order of its tables
    cutoff: float = 5.0                # Å; atoms further apart do not see each other within one layer
    degree: int = 2                    # L; 0 gives an invariant network, 1 is fast, 2 accurate, 3 for hard cases
    channels: int = 32                 # C; the width, cost grows about linearly up to 64
    layers: int = 3                    # T; the first takes scalars, the last gives scalars: 3 holds one full layer
    functions: int = 8                 # B; learned radial functions per layer
    splines: int = 24                  # R; B-splines per radial function, 0.24 Å apart by default
    first_knot: float = 0.0            # Å; where the radial axis begins, best just below the shortest distance
    activation: str = "product"        # of the grid layer: "product" (exactly equivariant) or "silu" (the paper's)
    grid_degree: int = 0               # degree the grid integrates exactly; 0: 3L for product, 15 for silu
    mean_neighbours: float = 30.0      # of the training set; sums over neighbours are divided by its root
    energy_scale: float = 1.0          # eV; force RMS of the training set times 1 Å
    reference_energies: tuple[float, ...] = ()  # eV per species, E0; empty: zeros


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
        return Batch(*(t.to(device, non_blocking=True) for t in self))


def neighbour_list(positions: np.ndarray, cell: np.ndarray, pbc, cutoff: float):
    """All pairs closer than the cutoff, periodic images (of an atom itself too) included.

    positions [N, 3] Å, cell [3, 3] Å (rows), pbc: three booleans, cutoff Å.
    Returns dst [E], src [E], shift [E, 3] (integers), vectors [E, 3] Å: x_src + shift·cell − x_dst, sorted by dst.

    Every atom is folded into the cell; copies that come within the cutoff of it ("ghosts") are listed axis by axis, and one
    KD-tree finds the pairs. Raises ValueError for a flat cell and for two atoms on one spot.
    """
    positions, cell = np.asarray(positions, float), np.asarray(cell, float)
    pbc = np.broadcast_to(np.asarray(pbc, bool), 3)
    if not np.isfinite(positions).all() or not np.isfinite(cell).all():
        raise ValueError("a position or a cell vector is NaN or infinite")
    if (pbc & ~np.any(cell, axis=1)).any():
        raise ValueError("the crystal is periodic along an axis whose cell vector is zero: set the cell, or pbc=False")
    cell = ase.cell.Cell(cell).complete()  # axes without a vector get a unit one: nothing repeats along them
    volume = abs(np.linalg.det(cell))
    faces = np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)  # [3] Å²
    if not volume > 1e-6 * np.linalg.norm(cell, axis=1).prod():
        raise ValueError(f"the cell has no volume ({volume:.1e} Å³): its lattice vectors lie in one plane")
    reach = cutoff * faces / volume  # [3] the cutoff as a fraction of the distance between lattice planes
    fractional = positions @ np.linalg.inv(cell)  # [N, 3]
    fold = np.where(pbc, -np.floor(fractional), 0)  # [N, 3] moves an atom into the cell
    ghost, shift = np.arange(len(positions)), fold  # [G], [G, 3]
    for axis in np.flatnonzero(pbc):
        n = int(np.ceil(reach[axis]))
        image = np.arange(-n, n + 1)
        place = fractional[ghost, axis, None] + shift[:, axis, None] + image  # [G, images]
        row, column = np.nonzero((place >= -reach[axis]) & (place < 1 + reach[axis]))
        ghost, shift = ghost[row], shift[row]
        shift[:, axis] += image[column]
    home = positions + fold @ cell  # [N, 3]
    places = positions[ghost] + shift @ cell  # [G, 3]
    pairs = cKDTree(home).sparse_distance_matrix(cKDTree(places), cutoff, output_type="ndarray")
    dst, other = pairs["i"], pairs["j"]
    keep = (ghost[other] != dst) | (shift[other] != fold[dst]).any(1)  # an atom is not its own neighbour, its images are
    dst, other = dst[keep], other[keep]
    order = np.argsort(dst, kind="stable")
    dst, other = dst[order], other[order]
    src = ghost[other]
    vectors = places[other] - home[dst]  # [E, 3]
    touching = np.flatnonzero((vectors ** 2).sum(1) < 1e-6)
    if len(touching):
        raise ValueError(f"atoms {dst[touching[0]]} and {src[touching[0]]} sit on one spot (closer than 0.001 Å)")
    return dst, src, (shift[other] - fold[dst]).astype(int), vectors


def find_neighbours(atoms: ase.Atoms, config: Config) -> Neighbours:
    """ASE crystal to Neighbours. Raises ValueError for an element the model does not know and for broken geometry."""
    number = {atomic_numbers[symbol]: z for z, symbol in enumerate(config.species)}
    try:
        species = np.array([number[a] for a in atoms.numbers], int)
    except KeyError as unknown:
        raise ValueError(f"element {ase.data.chemical_symbols[unknown.args[0]]} is not among those the model knows: "
                         f"{' '.join(config.species)}") from None
    dst, src, _, vectors = neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, config.cutoff)
    return Neighbours(species, dst, src, vectors, abs(np.linalg.det(atoms.cell.array)) or np.nan)


def make_batch(crystals: list[Neighbours], cutoff: float, dtype=torch.float32) -> Batch:
    """Crystals to one padded batch. Shapes as in Batch."""
    first = np.cumsum([0] + [len(c.species) for c in crystals])  # [S+1] where each crystal's atoms begin
    dst = np.concatenate([c.dst + f for c, f in zip(crystals, first)])  # [E]
    N = first[-1]
    count = np.bincount(dst, minlength=N)  # [N]
    slot = np.arange(len(dst)) - np.repeat(np.cumsum(count) - count, count)  # [E] dst is sorted: position in its row
    src = np.zeros((N, count.max(initial=0)), int)  # [N, K]
    src[dst, slot] = np.concatenate([c.src + f for c, f in zip(crystals, first)])
    vectors = np.zeros((*src.shape, 3))  # [N, K, 3]
    vectors[:, :, 0] = 2 * cutoff  # padding: there φ and its derivatives are exactly zero, so no mask is needed
    vectors[dst, slot] = np.concatenate([c.vectors for c in crystals])
    return Batch(torch.from_numpy(np.concatenate([c.species for c in crystals])), torch.from_numpy(src),
                 torch.from_numpy(vectors).to(dtype),
                 torch.from_numpy(np.repeat(np.arange(len(crystals)), np.diff(first))),
                 torch.tensor([c.volume for c in crystals], dtype=torch.float64))


# ─── §2 Radial functions ───────────────────────────────────────────────────────────────────────────────────────────────

class RadialSplines(nn.Module):
    """`count` learned functions of the distance, each a uniform cubic B-spline. [F §3.1], [D]

        φ_b(r) = Σ_k coefficients[k, b] · N(t − k),     t = (r − first_knot)/h,   k = −1 … R−2

    N is the cubic B-spline centred on 0: four cubic pieces on [−2, 2] that join with two continuous derivatives. A spline
    is a look-up table with smooth interpolation: at any r four entries count. The last N ends at the cutoff, so value,
    slope and curvature of φ vanish there and it is exactly zero beyond: no cutoff function is needed. Below first_knot the
    splines run out in the same way, so φ is smooth and finite down to r = 0.
    φ is linear in its coefficients: it can be made to imitate any function by least squares (see `fit`).
    """

    def __init__(self, count: int, config: Config):
        super().__init__()
        self.cutoff, self.first = config.cutoff, config.first_knot
        self.spacing = (config.cutoff - config.first_knot) / config.splines  # h, Å
        pieces = torch.tensor([[1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1]], dtype=torch.float64) / 6
        self.register_buffer("pieces", pieces.T.contiguous(), persistent=False)  # [power, piece]
        self.coefficients = nn.Parameter(torch.zeros(config.splines, count, dtype=torch.float64))  # [R, count]
        frequencies = torch.arange(count) // (config.degree + 1) % config.functions + 1  # each layer starts the same
        self.fit(lambda r: self.sine_bessel(r, frequencies))

    def sine_bessel(self, r: Tensor, n: Tensor) -> Tensor:
        """sin(nπ r/r_cut)/r · (1 − x⁶ …), of mean square 1 in the ball of radius r_cut; r [...], n [count] → [..., count]."""
        def raw(r):
            x = r[..., None] / self.cutoff
            return n * torch.sinc(n * x) * relu(1 - x) ** 3 * (1 + x * (3 + x * (6 + x * (10 + x * (15 + x * 21)))))
        x = torch.linspace(0, self.cutoff, 513, dtype=r.dtype)  # [513]
        mean_square = (x[:, None] ** 2 * raw(x) ** 2).sum(0) / (x ** 2).sum()  # [count]
        return raw(r) / mean_square.sqrt()

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
        if distances is None:
            r = torch.linspace(self.first, self.cutoff, 1024, dtype=torch.float64)
            weight = r / self.cutoff  # √ of the shell's volume
        else:
            r = distances.double()
            weight = torch.ones_like(r)
        target = f(r).double() * weight[:, None]  # [n, count]
        design = self.basis(r) * weight[:, None]  # [n, R]
        fitted = torch.linalg.lstsq(design, target, driver="gelsd").solution  # [R, count]
        self.coefficients.copy_(fitted)
        return ((design @ fitted - target) ** 2).mean(0).sqrt()


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


def span(degrees) -> slice:
    """Rows of a run of degrees."""
    degrees = list(degrees)
    return slice(min(degrees) ** 2, (max(degrees) + 1) ** 2)


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
    degree l1 + l2 + l3, so the Lebedev rule makes no error. For odd l1 + l2 + l3 the integral is 0: see "parity".
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

def chunks(index: Tensor, width: int):
    """Slices of the rows of index [A, K] such that a chunk of neighbours [rows, K, width] stays in the processor's cache."""
    rows = max(1, (2 ** 26 if index.is_cuda else 2 ** 17) // max(1, index.shape[1] * width))
    return [slice(i, i + rows) for i in range(0, len(index), rows)]


class NeighbourSum(torch.autograd.Function):
    """D[a, m, x] = Σ_k edge[a, m, k] h[index[a, k], x]: what the neighbours hold, weighted by where they are.

    The scalar Σ edge·h[index]·D is linear in edge, in h and in D; the gradient with respect to one is a product of the
    other two. So three functions are one another's derivatives, to any order, and no neighbour's features are ever stored.
    """

    @staticmethod
    def forward(ctx, edge, h, index):  # [A, M, K], [A', X], [A, K] → [A, M, X]
        ctx.save_for_backward(edge, h, index)
        D = edge.new_empty(*edge.shape[:2], h.shape[1])
        for i in chunks(index, h.shape[1]):
            torch.bmm(edge[i], gather(h, index[i]), out=D[i])
        return D

    @staticmethod
    def backward(ctx, D):
        edge, h, index = ctx.saved_tensors
        return NeighbourDot.apply(D, h, index), NeighbourSpread.apply(D, edge, index, len(h)), None


class NeighbourDot(torch.autograd.Function):
    """edge[a, m, k] = Σ_x D[a, m, x] h[index[a, k], x]."""

    @staticmethod
    def forward(ctx, D, h, index):  # [A, M, X], [A', X], [A, K] → [A, M, K]
        ctx.save_for_backward(D, h, index)
        edge = D.new_empty(*D.shape[:2], index.shape[1])
        for i in chunks(index, h.shape[1]):
            torch.bmm(D[i], gather(h, index[i]).mT, out=edge[i])
        return edge

    @staticmethod
    def backward(ctx, edge):
        D, h, index = ctx.saved_tensors
        return NeighbourSum.apply(edge, h, index), NeighbourSpread.apply(D, edge, index, len(h)), None


class NeighbourSpread(torch.autograd.Function):
    """h[x'] = Σ over all a, k with index[a, k] = x' of Σ_m D[a, m, x] edge[a, m, k]."""

    @staticmethod
    def forward(ctx, D, edge, index, rows):  # [A, M, X], [A, M, K], [A, K] → [A', X]
        ctx.save_for_backward(D, edge, index)
        h = D.new_zeros(rows, D.shape[2])
        for i in chunks(index, h.shape[1]):
            h.index_add_(0, index[i].flatten(), torch.bmm(edge[i].mT, D[i]).flatten(0, 1))
        return h

    @staticmethod
    def backward(ctx, h):
        D, edge, index = ctx.saved_tensors
        return NeighbourSum.apply(edge, h, index), NeighbourDot.apply(D, h, index), None, None


def gather(h: Tensor, index: Tensor) -> Tensor:
    return h.index_select(0, index.flatten()).view(*index.shape, -1)  # [A, K, X]


class Density(nn.Module):
    """TODO doc
    """

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.paths = sorted(paths(l_in, l_out, config.degree), key=lambda path: path[2])
        self.counts = [sum(l3 == l for *_, l3 in self.paths) for l in range(l_out + 1)]  # Q_l
        self.scale = 1 / sqrt(config.mean_neighbours)
        G = torch.zeros(len(self.paths), 2 * l_out + 1, (config.degree + 1) ** 2, (l_in + 1) ** 2, dtype=torch.float64)
        for q, (l1, l2, l3) in enumerate(self.paths):
            G[q, :2 * l3 + 1, degree(l2), degree(l1)] = gaunt(l1, l2, l3).permute(2, 1, 0)  # [m3, m2, m1]
        rows = [(q, m3) for l in range(l_out + 1) for m3 in range(2 * l + 1) for q, (*_, l3) in enumerate(self.paths) if l3 == l]
        G = torch.stack([G[q, m3] for q, m3 in rows])  # [rows, M, M1]
        self.register_buffer("G", G.flatten(1), persistent=False)
        self.register_buffer("degree_of_row", torch.tensor([l for l in range(config.degree + 1) for _ in range(2 * l + 1)]), persistent=False)

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> list[Tensor]:
        """h [N, (l_in+1)², C], src [N, K], phi [N, B (L+1), K], Y [N, M, K] → for each l3 a tensor [N·(2·l3+1), Q_l3·C]."""
        (NB, K), (N, M1, C), M = index.shape, h.shape, Y.shape[1]
        B = NB // N
        phi = phi.view(N, B, -1, K).index_select(2, self.degree_of_row)  # [N, B, M, K]
        edge = (phi * (self.scale * Y)[:, None]).flatten(0, 1)  # [NB, M, K]
        h = h.reshape(N, M1, B, -1).transpose(1, 2).reshape(NB, -1)  # [NB, m1 c]
        D = NeighbourSum.apply(edge, h, index).view(N, B, M * M1, -1).transpose(1, 2).reshape(N, M * M1, C)  # [N, m2 m1, C]
        A = (self.G @ D).split([(2 * l + 1) * Q for l, Q in enumerate(self.counts)], 1)  # [N, l3 m3 Q, C]
        return [a.reshape(-1, Q * C) for a, Q in zip(A, self.counts)]


# ─── §6 Mixing and skip connection ─────────────────────────────────────────────────────────────────────────────────────

def randn(*shape: int, fan_in: int = 1) -> nn.Parameter:
    """Random weights of variance 1/fan_in: inputs of unit variance give outputs of unit variance."""
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / sqrt(fan_in))


class Mix(nn.Module):
    """A linear map of the channels for each degree: y[l, m] = x[l, m] W_l / √fan-in. No bias: only l = 0 could have one."""

    def __init__(self, L: int, fan_in: int, fan_out: int):
        super().__init__()
        self.W = randn(L + 1, fan_in, fan_out, fan_in=fan_in)  # [L+1, C, fan_out]
        self.register_buffer("degree_of_row", torch.tensor([l for l in range(L + 1) for _ in range(2 * l + 1)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, (L+1)², fan_in] → [N, (L+1)², fan_out]."""
        W = self.W.index_select(0, self.degree_of_row)
        return torch.bmm(x.transpose(0, 1), W).transpose(0, 1)


class MixPaths(nn.Module):
    def __init__(self, fan_in: list[int], fan_out: int):
        super().__init__()
        self.W = nn.ParameterList(randn(n, fan_out, fan_in=n) for n in fan_in)  # one per degree

    def forward(self, x: list[Tensor], N) -> Tensor:
        """A list over degrees of [N, 2l+1, fan_in] → [N, (l_out+1)², fan_out]."""
        return torch.cat([(x_l @ W).view(N, -1, W.shape[1]) for x_l, W in zip(x, self.W)], 1)


class Skip(nn.Module):
    """Carries an atom's own features past the neighbours, scaled by the species of the atom: (h ⊙ a_z) W_l."""

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.L = min(l_in, l_out)
        self.a = randn(len(config.species), config.channels)  # [Z, C]
        self.mix = Mix(self.L, config.channels, config.channels)

    def forward(self, h: Tensor, species: Tensor) -> Tensor:
        """h [N, (l_in+1)², C], species [N] → [N, (L+1)², C] with L the smaller of l_in and l_out."""
        return self.mix(h[:, :(self.L + 1) ** 2] * self.a[species][:, None])


# ─── §7 Grid layer ─────────────────────────────────────────────────────────────────────────────────────────────────────

class GridLayer(nn.Module):
    """A non-linearity for features that rotate: x → x + f(x), f acting on the function on the sphere that x stands for.

        g(Ω_p, c) = Σ_lm Y_lm(Ω_p) x[lm, c]          to the Lebedev grid
        f = W₃ · (σ(s) ⊙ (g W₁) ⊙ (g W₂))            at every grid point, back to lm:  Σ_p weight_p Y_lm(Ω_p) f(Ω_p, c)

    Rotating x rotates g, whatever is done point by point commutes with that, but a grid is not rotation symmetric: only
    what the rule integrates exactly is exactly equivariant. The product of two functions of degree L, projected on degree
    L, is a polynomial of degree 3L, so a rule of degree ≥ 3L makes no error at all. The gate σ(s) depends on the scalars
    s = x[00] W_s + b, the same at every point, and silu(s) is added to the scalars. [F §3.3] with EquiformerV3's product.
    """

    def __init__(self, L: int, config: Config):
        super().__init__()
        C, self.L = config.channels, L
        points, weights = lebedev(config.grid_degree or 3 * L)
        Y = harmonics(points, L)  # [P, M]
        self.register_buffer("to_grid", Y, persistent=False)
        variance = torch.einsum("p,pm,pa,pb->mab", weights, Y, Y, Y).square().sum((1, 2))  # [M] of a product of two inputs
        self.register_buffer("from_grid", (weights[:, None] * Y / variance.sqrt()).T.contiguous(), persistent=False)  # [M, P]
        self.W12, self.W3 = Mix(L, C, 2 * C), Mix(L, C, C)
        self.Ws, self.b = randn(C, C, fan_in=C), nn.Parameter(torch.zeros(C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        g1, g2 = torch.tensordot(self.to_grid, self.W12(x), ([1], [1])).chunk(2, -1)  # [P, N, C]
        product = torch.tensordot(self.from_grid, g1 * g2, ([1], [0])).transpose(0, 1)  # [N, M, C]
        s = torch.addmm(self.b, x[:, 0], self.Ws)  # [N, C]
        f = product * torch.sigmoid(s)[:, None]  # [N, M, C]
        f = torch.cat([f[:, :1] + silu(s)[:, None], f[:, 1:]], 1)  # [N, M, C]
        return x + self.W3(f)


# ─── §8 The network ────────────────────────────────────────────────────────────────────────────────────────────────────

class Layer(nn.Module):
    """h → grid layer of (mixed density of the neighbours + skip), [N, (l_in+1)², C] → [N, (l_out+1)², C]."""

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.density = Density(l_in, l_out, config)
        self.mix = MixPaths([Q * config.channels for Q in self.density.counts], config.channels)
        self.skip = Skip(l_in, l_out, config)
        self.grid = GridLayer(l_out, config)

    def forward(self, h, species, index, phi, Y):
        message = self.mix(self.density(h, index, phi, Y), len(h))  # [N, (l_out+1)², C]
        own = self.skip(h, species)  # [N, ≤ (l_out+1)², C]
        missing = message.shape[1] - own.shape[1]
        return self.grid((message + nn.functional.pad(own, (0, 0, 0, missing))) / sqrt(2))


class Facet(nn.Module):
    """Energy, forces and stress of crystals. [F §3]"""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, T = config, config.layers
        self.splines = RadialSplines(T * config.functions * (config.degree + 1), config)
        self.embedding = randn(len(config.species), config.channels)  # [Z, C]
        l = [0] + [config.degree] * (T - 1) + [0]
        self.layers = nn.ModuleList(Layer(l[t], l[t + 1], config) for t in range(T))
        self.readout = randn(config.channels, fan_in=config.channels)  # [C]
        E0 = config.reference_energies or [0.0] * len(config.species)
        self.register_buffer("E0", torch.tensor(E0, dtype=torch.float64), persistent=False)
        self.to(dtype)
        self.E0 = self.E0.double()

    def atomic_energies(self, batch: Batch) -> Tensor:
        """Energy of each atom, [N] eV in float64; differentiable with respect to batch.vectors."""
        r = batch.vectors.norm(dim=-1)  # [N, K]
        phi = self.splines(r).mT.contiguous().split(self.config.functions * (self.config.degree + 1), 1)  # T times [N, B, K]
        Y = harmonics(batch.vectors / r[..., None], self.config.degree).mT.contiguous()  # [N, M, K]
        B = self.config.functions
        index = (batch.src[:, None] * B + torch.arange(B, device=r.device)[:, None]).flatten(0, 1)  # [N B, K]
        h = self.embedding[batch.species][:, None]  # [N, 1, C]
        for layer, phi_t in zip(self.layers, phi):
            h = layer(h, batch.species, index, phi_t, Y)  # [N, M, C], the last [N, 1, C]
        e = h[:, 0] @ self.readout  # [N]
        return e.double() * self.config.energy_scale + self.E0[batch.species]  # [N]

    def forward(self, batch: Batch, training: bool = False) -> dict[str, Tensor]:
        """Energy, forces, stress"""
        vectors = batch.vectors.detach().requires_grad_()
        S = len(batch.volume)
        with torch.enable_grad():
            energies = self.atomic_energies(batch._replace(vectors=vectors))  # [N]
            energy = energies.new_zeros(S).index_add(0, batch.crystal, energies)  # [S]
            g = torch.autograd.grad(energies.sum(), vectors, create_graph=training)[0]  # [N, K, 3]
        forces = g.sum(1).index_add(0, batch.src.flatten(), -g.flatten(0, 1))  # [N, 3]
        virial = torch.einsum("nka,nkb->nab", vectors, g)  # [N, 3, 3]
        virial = virial.new_zeros(S, 3, 3).index_add(0, batch.crystal, virial)  # [S, 3, 3]
        stress = (virial + virial.mT) / (2 * batch.volume.to(g)[:, None, None])  # [S, 3, 3]
        out = {"energy": energy, "energies": energies, "forces": forces, "stress": stress}
        return out if training else {k: v.detach() for k, v in out.items()}
