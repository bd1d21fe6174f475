"""Facet: an E(3)-equivariant interatomic potential in one readable file.

[F]        N. Miklaucic et al., "Facet: highly efficient E(3)-equivariant networks for interatomic
           potentials", 2025, arXiv 2509.08418: splines, the grid layer, the lean network.
[MACE]     I. Batatia et al., 2022, arXiv 2206.07697: density projections, normalisation by a mean
           neighbour count.
[NequIP]   S. Batzner et al., 2021, arXiv 2101.03164: gates made from scalars.
[Eq3]      Y.-L. Liao et al., "EquiformerV3", 2026, arXiv 2604.09130: products on the sphere.
[Lebedev]  V. I. Lebedev, D. N. Laikov, Doklady Mathematics 59, 477, 1999: sphere quadrature.
[deBoor]   C. de Boor, "A Practical Guide to Splines", 2001, ch. IX: B-splines.
[ZBL]      J. F. Ziegler, J. P. Biersack, U. Littmark, "The Stopping and Range of Ions in Solids",
           1985: screened nuclei.

    crystal → neighbours (§1) ─┬→ radial splines φ_b(r)  (§2) ┐
                               └→ harmonics Y_lm(r̂)      (§3) ┤
                                                              ↓
    species → embedding (§6) → features h ────────────→ density (§5) → mix (§6) → + skip (§6)
                                       ↑                                             ↓
                                       └─────────── one layer, repeated ─── grid layer (§7)
                                                                                     ↓
              forces, stress ← one gradient ← energy (§8) ← readout of the scalars ←─┘

Glossary
    N  atoms in the batch                     C  channels: copies of every feature
    K  neighbours, padded to the largest      B  groups of channels; a group shares radial functions
    S  crystals in the batch                  c  channel within its group, C/B of them
    E  edges, before padding                  T  layers
    L  highest degree l of a feature          R  B-splines on the radial axis
    M  (L+1)², number of (l, m)               P  points of the Lebedev grid
    Q  paths (l1, l2, l3) of a layer          Z  chemical species that the model knows
    X  what a row of h holds, (c, l1 m1)      U  chemical species that are present in the batch
    J  rows (l3, m3, path) of a density: Σ (2·l3 + 1) Q_l3, Q_l3 the paths that end in l3

Conventions
    units       Å, eV, eV/Å, eV/Å³
    cell        rows are the lattice vectors; left-handed cells are fine, volume = |det cell|
    edge        dst i ◄────── src j        r_ij = x_j + shift·cell − x_i;  i receives, j is seen
    features    [N, M, C], degree l in rows l² … (l+1)²−1, m = −l … l
    harmonics   real, mean of Y² over the sphere = 1; l = 1, m = −1 0 1 is √3 (y, z, x)
    parity      degree l has parity (−1)^l, so only couplings with even l1 + l2 + l3 exist:
                the group is O(3), not SO(3)
    stress      +(1/volume) ∂energy/∂strain, as ASE: positive means that the crystal wants to shrink

It does not include charges, spins, long-range forces, odd-parity couplings.
`python test_facet.py` checks what you changed.
"""
from __future__ import annotations

import io
import os
import threading
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache, reduce
from math import factorial, sqrt
from pathlib import Path
from typing import NamedTuple

import ase
import numpy as np
import torch
from ase import units
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_numbers, covalent_radii
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.integrate import lebedev_rule
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, silu


@dataclass(frozen=True)
class Config:
    """Everything needed to build the model; a checkpoint stores it beside the tensors.

    If you add a field, say in `upgrade` (§9) what it is for models that were saved without it.
    """

    species: tuple[str, ...]    # chemical symbols the model knows, in the order of its tables
    cutoff: float = 5.0         # Å; atoms further apart do not see each other within one layer
    degree: int = 2             # L; 0 is an invariant network, 1 fast, 2 accurate, 3 for hard cases
    channels: int = 32          # C; the width, cost grows about linearly up to 64
    layers: int = 3             # T; the first takes scalars, the last gives them: of 3 one is full
    groups: int = 8             # B; channels of a group share radial functions, one per degree
    splines: int = 24           # R; B-splines per radial function, 0.21 Å apart by default
    first_knot: float = 0.0     # Å; the radial axis begins here, best below the shortest distance
    activation: str = "product" # of the grid layer: "product" (exact) or "silu" (the paper's)
    grid_degree: int = 0        # the grid is exact up to it; 0: that of the activation, see §7
    mean_neighbours: float = 30.0  # of the training set; sums over neighbours are divided by its √
    energy_scale: float = 1.0   # eV; force RMS of the training set times 1 Å
    reference_energies: tuple[float, ...] = ()  # eV per species, E0; empty: zeros
    core: tuple[float, ...] = ()   # Å per species; atoms closer than the sum of theirs repel each
                                   # other; empty: ¾ of the covalent radii, at most cutoff/2

    def __post_init__(self):
        """Raise ValueError, in one sentence, for what cannot be built."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain(field, getattr(self, field.name)))

        numbers = (self.cutoff, self.mean_neighbours, self.energy_scale,
                   *self.reference_energies, *self.core)
        known = set(self.species) & atomic_numbers.keys() - {"X"}  # ASE's name for no element
        per_species = len(self.reference_energies), len(self.core)
        by_default = 3 * self.degree if self.activation == "product" else 15 * self.degree // 2
        exact_degree = self.grid_degree or by_default

        # All conditions are evaluated, whatever the others say
        for wrong, sentence in (
                (not np.isfinite(numbers).all(),
                 f"every number must be finite, but there are {numbers}"),
                (not self.species or len(known) < len(self.species),
                 "species must be different chemical symbols, such as ('Si', 'O'), "
                 f"not {self.species}"),
                (min(self.layers, self.groups) < 1 or min(self.degree, self.grid_degree) < 0,
                 "layers and groups must be at least 1, degree and grid_degree at least 0"),
                (exact_degree > 131, f"no Lebedev rule has degree {exact_degree}, the largest has "
                 "131; lower degree or grid_degree"),
                (self.splines < 4, f"splines must be at least 4, not {self.splines}"),
                (self.channels < 1 or self.channels % max(1, self.groups),
                 f"channels ({self.channels}) must be a multiple of groups ({self.groups})"),
                (self.activation not in ("product", "silu"),
                 f'activation must be "product" or "silu", not "{self.activation}"'),
                (not 0 <= self.first_knot < self.cutoff,
                 f"first_knot must lie between 0 and the cutoff ({self.cutoff} Å)"),
                (min(self.mean_neighbours, self.energy_scale) <= 0,
                 "mean_neighbours and energy_scale must be above 0"),
                (not set(per_species) <= {0, len(self.species)},
                 "reference_energies and core need one number per species, or none at all"),
                (any(not 0 <= radius <= self.cutoff / 2 for radius in self.core),
                 f"core {self.core} must lie between 0 and half the cutoff ({self.cutoff} Å), "
                 "beyond which atoms do not see each other")):
            if wrong:
                raise ValueError(sentence)


def plain(field, value):
    """The value of a field of Config in plain Python, fit to be saved, whatever NumPy made of it.

    Raises ValueError where that would change it: 16.9 channels are not 16.
    """
    if isinstance(field.default, tuple) or field.name == "species":
        if np.ndim(value) != 1:  # a text has none
            raise ValueError(f"{field.name} must be a tuple of items, not {value!r}")
        return tuple(np.asarray(value, str if field.name == "species" else float).tolist())

    kind = type(field.default)
    try:
        converted = kind(value)
        if converted == value:  # nan is not equal to itself
            return converted
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{field.name} must be of type {kind.__name__}, not {value!r}")


# ─── §1 Crystals to neighbours ───


class Neighbours(NamedTuple):
    """One crystal as the model sees it, in NumPy, sorted by dst. Made once, batched many times."""

    species: np.ndarray  # [N] index into config.species
    dst: np.ndarray      # [E] atom that receives
    src: np.ndarray      # [E] atom that is seen
    vectors: np.ndarray  # [E, 3] Å, from dst to the image of src
    volume: float        # Å³, periodic or not; nan where the cell spans no space: no stress there


class Batch(NamedTuple):
    """Crystals side by side, neighbours padded to K.

    Padding lies beyond the cutoff and so adds exactly nothing.
    """

    species: Tensor  # [N] index into config.species
    src: Tensor      # [N, K]
    vectors: Tensor  # [N, K, 3] Å
    crystal: Tensor  # [N] which crystal the atom belongs to
    volume: Tensor   # [S] Å³
    present: Tensor  # [U] the species that occur, sorted

    def to(self, device) -> Batch:
        """The batch on another device; what uses it there waits for it, the caller does not."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def neighbour_list(positions: np.ndarray, cell: np.ndarray, pbc, cutoff: float):
    """All pairs no further apart than the cutoff, images of an atom itself included.

    positions [N, 3] Å, cell [3, 3] Å (rows), pbc: three booleans, cutoff Å.
    Returns dst [E], src [E], shift [E, 3] (integers), vectors [E, 3] Å, sorted by dst:
    vectors = x_src + shift·cell − x_dst.

    Every atom is folded into the cell; copies that come within the cutoff of the cell ("ghosts")
    are listed axis by axis, and one KD-tree finds the pairs.
    Raises ValueError for a flat cell and for two atoms on one spot.
    """
    positions = np.asarray(positions, float)
    cell = np.asarray(cell, float)
    pbc = np.broadcast_to(np.asarray(pbc, bool), 3)

    if not np.isfinite(positions).all() or not np.isfinite(cell).all():
        raise ValueError("a position or a cell vector is NaN or infinite")
    if (pbc & ~np.any(cell, axis=1)).any():
        raise ValueError("the crystal is periodic along an axis whose cell vector is zero: "
                         "set the cell, or pbc=False")

    # Axes without a vector get a unit one: nothing repeats along them
    cell = ase.cell.Cell(cell).complete()
    box = np.linalg.norm(cell, axis=1).prod()  # Å³, volume of a right-angled cell with these edges
    if not abs(np.linalg.det(cell)) > 1e-6 * box:
        raise ValueError("the cell has no volume: its lattice vectors lie in one plane")

    # Fold every atom into the cell; the reach is the cutoff over the distance of lattice planes
    inverse = np.linalg.inv(cell)
    reach = cutoff * np.linalg.norm(inverse, axis=0)  # [3]
    fractional = positions @ inverse  # [N, 3]
    fold = np.where(pbc, -np.floor(fractional), 0)  # [N, 3]

    # Ghosts: images of the atoms whose fractional coordinates lie within reach of the cell
    ghost = np.arange(len(positions))  # [ghosts] which atom it is an image of
    shift = fold.copy()  # [ghosts, 3]
    for axis in np.flatnonzero(pbc):
        n = int(np.ceil(reach[axis]))
        image = np.arange(-n, n + 1)
        place = fractional[ghost, axis] + shift[:, axis]  # [ghosts]
        place = place[:, None] + image  # [ghosts, images]
        row, column = np.nonzero((place >= -reach[axis]) & (place < 1 + reach[axis]))
        ghost = ghost[row]
        shift = shift[row]
        shift[:, axis] += image[column]

    # Pairs of a folded atom and a ghost
    home = positions + fold @ cell  # [N, 3]
    places = positions[ghost] + shift @ cell  # [ghosts, 3]
    tree = cKDTree(home)
    pairs = tree.sparse_distance_matrix(cKDTree(places), cutoff, output_type="ndarray")
    pairs = pairs[np.argsort(pairs["i"], kind="stable")]
    dst = pairs["i"]
    other = pairs["j"]

    # An atom does not see itself, but it sees its images
    itself = (ghost[other] == dst) & (shift[other] == fold[dst]).all(1)
    dst = dst[~itself]  # [E]
    other = other[~itself]  # [E]
    src = ghost[other]  # [E]
    vectors = places[other] - home[dst]  # [E, 3]

    touching = np.flatnonzero((vectors ** 2).sum(1) < 1e-6)  # Å²
    if len(touching):
        first = touching[0]
        raise ValueError(f"atoms {dst[first]} and {src[first]} sit on one spot "
                         "(closer than 0.001 Å)")
    return dst, src, (shift[other] - fold[dst]).astype(int), vectors


def find_neighbours(atoms: ase.Atoms, config: Config) -> Neighbours:
    """ASE crystal to Neighbours.

    Raises ValueError for no atoms, for an element the model does not know and for broken geometry.
    """
    if len(atoms) == 0:
        raise ValueError("there are no atoms")
    unknown = set(atoms.symbols) - set(config.species)
    if unknown:
        raise ValueError(f"element {min(unknown)} is not among those the model knows: "
                         f"{' '.join(config.species)}")

    species = np.array([config.species.index(symbol) for symbol in atoms.symbols], int)  # [N]
    cell = atoms.cell.array
    dst, src, _, vectors = neighbour_list(atoms.positions, cell, atoms.pbc, config.cutoff)
    volume = abs(np.linalg.det(cell)) or np.nan
    return Neighbours(species, dst, src, vectors, volume)


def make_batch(crystals: list[Neighbours], cutoff: float, dtype=torch.float32) -> Batch:
    """Crystals to one padded batch. Shapes as in Batch."""
    # Number the atoms through: each crystal's atoms begin at `first`
    sizes = [len(crystal.species) for crystal in crystals]
    first = np.cumsum([0] + sizes)  # [S+1]
    species = np.concatenate([crystal.species for crystal in crystals])  # [N]
    dst = np.concatenate([crystal.dst + f for crystal, f in zip(crystals, first)])  # [E]
    src = np.concatenate([crystal.src + f for crystal, f in zip(crystals, first)])  # [E]

    # Edges are sorted by dst: the slot of an edge is its place among those of its atom
    count = np.bincount(dst, minlength=len(species))  # [N]
    slot = np.arange(len(dst)) - np.repeat(np.cumsum(count) - count, count)  # [E]
    K = count.max(initial=1)

    # Padding: an atom sees itself, at twice the cutoff, where φ and its derivatives are zero
    padded_src = np.arange(len(species))[:, None].repeat(K, 1)  # [N, K]
    padded_src[dst, slot] = src
    vectors = np.tile([2 * cutoff, 0, 0], (len(species), K, 1))  # [N, K, 3]
    vectors[dst, slot] = np.concatenate([crystal.vectors for crystal in crystals])

    return Batch(
        species=torch.from_numpy(species),
        src=torch.from_numpy(padded_src),
        vectors=torch.from_numpy(vectors).to(dtype),
        crystal=torch.from_numpy(np.repeat(np.arange(len(crystals)), sizes)),
        volume=torch.tensor([crystal.volume for crystal in crystals], dtype=torch.float64),
        present=torch.from_numpy(np.unique(species)),
    )


# ─── §2 Radial functions ───


class RadialSplines(nn.Module):
    """`count` learned functions of the distance, each a uniform cubic B-spline. [F §3.1], [deBoor]

        φ_b(r) = Σ_k coefficients[k, b] · bump(t − k),  t = (r − first_knot)/spacing,  k = −1 … R−2

    bump is the cubic B-spline centred on 0: four cubic pieces on [−2, 2] that join with two
    continuous derivatives. A spline is a look-up table with smooth interpolation: at any r four
    entries count. The last bump ends at the cutoff, so value, slope and curvature of φ vanish there
    and it is exactly zero beyond: no cutoff function is needed. Below first_knot the splines run
    out in the same way, so φ is smooth and finite down to r = 0.

    The functions start as √5/2 (1 − x²) sin(nπx)/x, x = r/cutoff: sine-Bessel functions that end
    smoothly. Averaged over the ball of radius cutoff, their square is about 1.

    Two derivatives are continuous. The third, which derivatives of Hessians contain, is piecewise
    constant: it jumps where r passes a knot.
    """

    def __init__(self, count: int, config: Config):
        super().__init__()
        self.cutoff = config.cutoff
        self.first_knot = config.first_knot
        self.spacing = (config.cutoff - config.first_knot) / config.splines  # Å

        # The four cubic pieces of the bump, from right to left, as polynomials in x = t − floor t
        pieces = torch.tensor([[1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1]])
        pieces = pieces.double() / 6  # [piece, power]
        self.register_buffer("pieces", pieces.T.contiguous(), persistent=False)  # [power, piece]

        coefficients = torch.zeros(config.splines, count, dtype=torch.float64)  # [R, count]
        self.coefficients = nn.Parameter(coefficients)

        # The columns are (layer, group, degree). One frequency per group, the same for all layers
        # and degrees; R splines follow those up to about 2R/3
        frequency = torch.arange(count) // (config.degree + 1) % config.groups + 1  # [count]

        def bessel(r: Tensor) -> Tensor:
            x = r[:, None] / self.cutoff  # [n, 1]
            wave = frequency * torch.sinc(frequency * x)  # [n, count] sin(nπx)/(πx), float64
            return sqrt(5) / 2 * torch.pi * wave * (1 - x ** 2)  # [n, count]

        self.fit(bessel)

    def basis(self, r: Tensor) -> Tensor:
        """The R B-splines at r [...] Å → [..., R]."""
        R = self.coefficients.shape[0]
        t = ((r - self.first_knot) / self.spacing).clamp(-3, R)  # [...]
        k = t.detach().floor()  # [...]
        x = t - k  # [...] in [0, 1)

        # The four bumps that are not zero here, and the columns that they belong in
        powers = torch.stack([torch.ones_like(x), x, x * x, x * x * x], -1)  # [..., 4]
        four = powers @ self.pieces.to(r)  # [..., 4]
        column = k.long()[..., None] + torch.arange(3, 7, device=r.device)  # [..., 4]

        # Margins on both sides catch what lies outside of the axis
        wide = four.new_zeros(*r.shape, R + 7).scatter(-1, column, four)  # [..., R+7]
        return wide[..., 3:R + 3]  # [..., R]

    def forward(self, r: Tensor) -> Tensor:
        """r [...] Å → [..., count]."""
        return self.basis(r) @ self.coefficients  # [..., count]

    @torch.no_grad()
    def fit(self, f) -> Tensor:
        """Set the coefficients by least squares so that φ(r) ≈ f(r).

        f maps r [n] Å to [n, count] and is 0 beyond the cutoff. Distances count as often as they
        occur in a uniform medium. Returns the root mean square error of each function, [count].
        """
        r = torch.linspace(self.first_knot, self.cutoff, 1024, dtype=torch.float64)  # [n]
        weight = r / self.cutoff  # [n] √ of the shell's volume
        target = f(r).double() * weight[:, None]  # [n, count]
        design = self.basis(r) * weight[:, None]  # [n, R]
        fitted = torch.linalg.lstsq(design, target, driver="gelsd").solution  # [R, count]
        self.coefficients.copy_(fitted)
        return ((design @ fitted - target) ** 2).mean(0).sqrt()  # [count]


class Repulsion(nn.Module):
    """Repulsion of atoms that come closer than any in the training data. [ZBL]

        V(r) = k q_i q_j / r · ξ(r/a) · (1 − (r/ρ)⁶)³    for r < ρ = core_i + core_j, else 0

    q are the nuclear charges and 1/a = (q_i^0.23 + q_j^0.23)/0.4685 Å. V ends at ρ with two
    derivatives. Each of the two atoms gets half of V. Below the shortest distance that it was
    trained on, a network may predict anything; two nuclei, screened by their electrons (ξ), repel.
    """

    def __init__(self, config: Config):
        super().__init__()
        charge = np.array([atomic_numbers[symbol] for symbol in config.species], float)  # [Z]
        usual = np.minimum(0.75 * covalent_radii[charge.astype(int)], config.cutoff / 2)  # [Z] Å
        core = np.asarray(config.core or usual)  # [Z] Å
        screening = charge ** 0.23 / 0.4685  # [Z] 1/Å

        # A row of each table for every pair of species
        end = np.add.outer(core, core).clip(1e-3)  # [Z, Z] Å, ρ; 0.001: no two atoms reach it
        inverse_a = np.add.outer(screening, screening)  # [Z, Z] 1/Å
        half_k = units.Hartree * units.Bohr / 2  # eV Å
        half_k_qq = half_k * np.multiply.outer(charge, charge)  # [Z, Z] eV Å
        pairs = np.stack([end, inverse_a, half_k_qq])  # [3, Z, Z]
        exponents = -torch.tensor([3.1998, 0.94229, 0.4029, 0.20162], dtype=torch.float64)  # of ξ
        weights = torch.tensor([0.18175, 0.50986, 0.28022, 0.02817], dtype=torch.float64)  # of ξ

        self.register_buffer("core", torch.from_numpy(core), persistent=False)
        self.register_buffer("pairs", torch.from_numpy(pairs), persistent=False)
        self.register_buffer("exponents", exponents, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, r: Tensor, species: Tensor, src: Tensor) -> Tensor:
        """r [N, K] Å, species [N], src [N, K] → [N] eV."""
        end, inverse_a, half_k_qq = self.pairs[:, species[:, None], species[src]]  # 3 × [N, K]
        # As a rule no atoms come that close. `.all()` makes the CPU wait for a GPU: not in training
        if not self.training and (r >= end).all():
            return r.new_zeros(len(r))

        xi = torch.exp((r * inverse_a)[..., None] * self.exponents) @ self.weights  # [N, K]
        switch = (1 - (r / end) ** 6).clamp(min=0) ** 3  # [N, K]
        return (half_k_qq / r * (xi * switch)).sum(1)  # [N]


# ─── §3 Real spherical harmonics ───


def harmonics(unit: Tensor, L: int) -> Tensor:
    """Real spherical harmonics of degree 0 … L of unit vectors: [..., 3] → [..., (L+1)²].

        Y_l,±m = √((2l+1) (2 − δ_m0) (l−m)!/(l+m)!) · P_l^m(z) · {Re, Im} (x + iy)^m

    The mean of Y² over the sphere is 1. P_l^m is the Legendre function over sin^m θ, a polynomial
    in z, so nothing is singular at the poles. Each degree comes from the two before:

        (l−m) P_l^m = (2l−1) z P_{l−1}^m − (l+m−1) P_{l−2}^m

    No Condon-Shortley sign: either choice is right as long as everything uses the same; this one
    makes l = 1 simply √3 (y, z, x).
    """
    x, y, z = unit.unbind(-1)  # [...]
    Y = [None] * (L + 1) ** 2
    real, imaginary = torch.ones_like(x), None  # of (x + iy)^m

    for m in range(L + 1):
        P_mm = float(np.prod(np.arange(1, 2 * m, 2)))  # P_m^m = (2m−1)!!
        ratio = {m: 1.0, m + 1: (2 * m + 1) * z}  # P_l^m / P_m^m, by l
        for l in range(m + 2, L + 1):
            two_terms = (2 * l - 1) * z * ratio[l - 1] - (l + m - 1) * ratio[l - 2]
            ratio[l] = two_terms / (l - m)

        for l in range(m, L + 1):
            signs = 2 if m else 1  # +m and −m share the norm
            norm = sqrt((2 * l + 1) * signs * factorial(l - m) / factorial(l + m))
            scaled = norm * P_mm * ratio[l]
            Y[l * l + l + m] = scaled * real
            if m:
                Y[l * l + l - m] = scaled * imaginary

        if m == 0:
            real, imaginary = x, y
        else:
            real, imaginary = x * real - y * imaginary, x * imaginary + y * real
    return torch.stack(Y, -1)  # [..., M]


def rows_of(l: int) -> slice:
    """Rows of degree l in a feature [N, M, C]."""
    return slice(l * l, (l + 1) ** 2)


def degree_of_row(L: int) -> Tensor:
    """The degree l of each of the (L+1)² rows, [M]: 0 1 1 1 2 2 2 2 2 …"""
    return torch.arange(L + 1).repeat_interleave(2 * torch.arange(L + 1) + 1)  # [M]


# ─── §4 The grid and the coupling ───


def lebedev(exact_degree: int) -> tuple[Tensor, Tensor]:
    """Smallest Lebedev rule that integrates every polynomial of exact_degree. [Lebedev]

    Returns points [P, 3] and weights [P] of sum 1. A constant needs one point.
    Raises ValueError beyond degree 131, the largest rule there is.
    """
    if exact_degree == 0:
        return torch.tensor([[0.0, 0, 1]]).double(), torch.ones(1).double()  # [1, 3], [1]

    for tabulated in (*range(3, 32, 2), *range(35, 132, 6)):
        if tabulated >= exact_degree:
            points, weights = lebedev_rule(tabulated)  # [3, P], [P]
            return torch.from_numpy(points.T.copy()), torch.from_numpy(weights / weights.sum())
    raise ValueError(f"no Lebedev rule has degree {exact_degree}; the largest is 131")


@cache  # most of the time that it takes to build a model
def gaunt(l1: int, l2: int, l3: int) -> Tensor:
    """Coupling coefficients [2·l1+1, 2·l2+1, 2·l3+1]: degrees l1 and l2 combined to l3. [F §3.3]

        G[m1, m2, m3] ∝ mean over the sphere of Y_l1m1 Y_l2m2 Y_l3m3,   Σ_m1,m2 G² = 1 for every m3

    The scale lets independent inputs of unit variance give an output of unit variance. The
    integrand is a polynomial of degree l1 + l2 + l3, so the Lebedev rule makes no error. For odd
    l1 + l2 + l3 the mean is 0 (see "parity"), and G is nan.
    """
    points, weights = lebedev(l1 + l2 + l3)
    Y = harmonics(points, max(l1, l2, l3))  # [P, M]
    Y1 = Y[:, rows_of(l1)]  # [P, 2·l1+1]
    Y2 = Y[:, rows_of(l2)]  # [P, 2·l2+1]
    Y3 = Y[:, rows_of(l3)]  # [P, 2·l3+1]
    G = torch.einsum("p,pa,pb,pc->abc", weights, Y1, Y2, Y3)  # [2·l1+1, 2·l2+1, 2·l3+1]
    return G * sqrt((2 * l3 + 1) / (G ** 2).sum())  # [2·l1+1, 2·l2+1, 2·l3+1]


def paths(l_in: int, l_out: int, L: int) -> list[tuple[int, int, int]]:
    """All (l1, l2, l3): feature l1 ≤ l_in times harmonic l2 ≤ L gives l3 ≤ l_out.

    Only those of natural parity that satisfy the triangle rule |l1 − l2| ≤ l3 ≤ l1 + l2.
    """
    found = []
    for l1 in range(l_in + 1):
        for l2 in range(L + 1):
            for l3 in range(l_out + 1):
                triangle = abs(l1 - l2) <= l3 <= l1 + l2
                if triangle and (l1 + l2 + l3) % 2 == 0:
                    found.append((l1, l2, l3))
    return found


# ─── §5 Density: sum over neighbours first ───


def chunks(index: Tensor, X: int) -> list[slice]:
    """Atoms of index [N, B, K] in portions n for which X numbers [n, B, K, X] fit the cache.

    Threads wait for each other after every chunk, so several threads get larger ones. On a GPU
    smaller ones are slower and larger ones no faster. (benchmarks/density.py --chunks, gpu.py)
    """
    numbers = 2 ** 26 if index.is_cuda else 2 ** 18 * torch.get_num_threads() ** 2
    n = max(1, numbers // max(1, index[0].numel() * X))
    N = len(index)
    return [slice(start, min(start + n, N)) for start in range(0, N, n)]


class NeighbourSum(torch.autograd.Function):
    """A[p m3, n, bc] = Σ_m1,m2 G[p m3, m1 m2] Σ_k w[n,b,k,m2] h[index[n,b,k], c m1]

        w[n,b,k,m2] = Σ_t φ[n,t,b,k,l2] Y[n,t,k,m2]

    Group b of an atom sees group b of its neighbours: the rows of h are (atom, group). The model
    has one term t; the derivative of φ Y has two.

    Autograd could do it. Written by hand, the largest tensors (w, and h of every neighbour) exist
    for one cache-sized chunk of atoms at a time and are never kept; benchmarks/density.py --sums
    measures what that saves. The gradients are sums of the same kind, so they can be differentiated
    again, any number of times. torch.func cannot do that: it needs `setup_context`, which inspects
    signatures at every call and is slower.
    """

    @staticmethod
    def forward(ctx, phi, Y, h, grad_A, index, G, of_degree, wants_A=True, wants_h=False, fixed=0):
        """phi [N, terms, B, K, L+1], Y [N, terms, K, M], h [(N+U)·B, c m1], grad_A as A or None,
        index [N, B, K], G [J, m1 m2], of_degree [L+1, M], 1 where a row of Y has that degree.

        Returns A [J, N+U, b c], if it is wanted, and, if there is a grad_A, the derivatives of
        Σ grad_A · A for φ, Y and, if it is wanted, h; None for the others. The last U atoms have no
        neighbours, so their A is 0. Those for the first `fixed` terms of φ and the last of Y are
        not computed but left 0, because nobody needs them.
        """
        ctx.save_for_backward(phi, Y, h, grad_A, index, G, of_degree)
        ctx.set_materialize_grads(False)
        N, B, K = index.shape
        M, X = Y.shape[3], h.shape[1]
        last = Y.shape[1] - fixed

        A = to_phi = to_Y = to_h = None
        if wants_A:
            c = X * M // G.shape[1]  # X = c·m1, and G has m1·m2 columns
            A = h.new_zeros(len(G), len(h) // B, B * c)  # [J, N+U, b c]
        if grad_A is not None:
            to_phi, to_Y = torch.zeros_like(phi), torch.zeros_like(Y)
        if wants_h:
            to_h = torch.zeros_like(h)

        atoms = chunks(index, X + M)  # X numbers of each neighbour for h, M for w
        memory = h.new_empty(index[atoms[0]].numel(), X)  # of one chunk after the other
        for n in atoms:
            at = index[n].flatten()  # [n b K]
            there = torch.index_select(h, 0, at, out=memory[:len(at)])  # [n b K, c m1]
            there = there.view(-1, K, X)  # [n b, K, c m1]
            radial = phi[n] @ of_degree  # [n, terms, b, K, M]
            y = Y[n, :, None]  # [n, terms, 1, K, M]
            w = reduce(torch.add, (radial * y).unbind(1)).flatten(0, 1)  # [n b, K, M]

            if wants_A:
                D = torch.bmm(there.mT, w)  # [n b, c m1, m2]
                D = D.view(-1, G.shape[1])  # [n b c, m1 m2]
                torch.mm(G, D.T, out=A[:, n].view(len(G), -1))  # [J, n b c]

            # What a neighbour's weight w is worth, and φ and Y in it
            if grad_A is not None:
                grad_D = (grad_A[:, n].flatten(1).T @ G).view(-1, X, M)  # [n b, c m1, m2]
                worth = torch.bmm(there, grad_D).view_as(radial[:, :1])  # [n, 1, b, K, M]
                to_phi[n, fixed:] = (worth * y[:, fixed:]) @ of_degree.T  # [n, terms, b, K, L+1]
                torch.sum(worth * radial[:, :last], 2, out=to_Y[n, :last])  # [n, terms, K, M]

            # What its features are worth, in their place: they are not needed any more
            if wants_h:
                to_there = torch.bmm(w, grad_D.mT, out=there)  # [n b, K, c m1]
                to_h.index_add_(0, at, to_there.flatten(0, 1))
        return A, to_phi, to_Y, to_h

    @staticmethod
    def backward(ctx, of_A, dphi, dY, dh):
        """The arguments are the gradients of A, to_phi, to_Y and to_h, None for what is not used.

        With sum(w, h) for A the derivatives are those of

            dφ·to_φ + dY·to_Y + dh·to_h = grad_A · [sum(dw, h) + sum(w, dh)],   dw = dφ·Y + φ·dY
        """
        phi, Y, h, grad_A, *constants = ctx.saved_tensors
        parts = [(None,) * 4]  # of the gradients for φ, Y, h and grad_A
        if of_A is not None:
            wants_h = ctx.needs_input_grad[2]
            slopes = NeighbourSum.apply(phi, Y, h, of_A, *constants, False, wants_h)[1:]
            parts.append((*slopes, None))

        # sum(dw, h): dw has twice the terms of w, φ in the second half of them, Y in the first
        if dphi is not None or dY is not None:
            dphi = torch.zeros_like(phi) if dphi is None else dphi
            dY = torch.zeros_like(Y) if dY is None else dY
            two_phi = torch.cat([dphi, phi], 1)  # [N, 2·terms, B, K, L+1]
            two_Y = torch.cat([Y, dY], 1)  # [N, 2·terms, K, M]
            terms = phi.shape[1]
            A, to_phi, to_Y, to_h = NeighbourSum.apply(
                two_phi, two_Y, h, grad_A, *constants, True, True, terms)
            parts.append((to_phi[:, terms:], to_Y[:, :terms], to_h, A))

        # sum(w, dh)
        if dh is not None:
            A, to_phi, to_Y, _ = NeighbourSum.apply(phi, Y, dh, grad_A, *constants)
            parts.append((to_phi, to_Y, None, A))

        totals = []
        for found in zip(*parts):
            found = [part for part in found if part is not None]
            totals.append(reduce(torch.add, found) if found else None)
        return *totals, None, None, None, None, None, None


class Density(nn.Module):
    """What the neighbours send to atom i along path p = (l1, l2, l3), for channel c of group b.

        A[i,p,m3,bc] = Σ_j φ_b,l2(r_ij) Σ_m1,m2 G[m1,m2,m3] Y_l2m2(r̂_ij) h[j,l1m1,bc]
                       / √mean_neighbours                                                [F §3.2]

    Read as written, this makes a tensor of edges × paths × channels. But G knows no j, so the sum
    over neighbours goes first, and the coupling is done once per atom, not once per edge:

        D[i,bc,m1,m2] = Σ_j (φ_b Y_l2m2)(r_ij) h[j,l1m1,bc]
        A[i,p,m3,bc]  = Σ_m1,m2 G[m1,m2,m3] D[i,bc,m1,m2] / √mean_neighbours

    D takes a matrix product for each atom and group. A takes one product for all atoms.

    The sum is a matrix product because the channels of a group share φ. With a function for every
    channel the order still holds, but each channel is a sum of its own. Little is lost by sharing:
    the mixing before and after (§6) lets every channel use the functions of every group.
    """

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        L = config.degree
        self.paths = paths(l_in, l_out, L)

        # A row of G for each (l3, m3, path that ends in l3), in this order
        G = []
        self.counts = []  # Q_l3, the number of paths that end in l3
        for l in range(l_out + 1):
            ending = [path for path in self.paths if path[2] == l]
            self.counts.append(len(ending))
            for m3 in range(2 * l + 1):
                for l1, l2, l3 in ending:
                    row = torch.zeros((l_in + 1) ** 2, (L + 1) ** 2).double()  # [m1, m2]
                    row[rows_of(l1), rows_of(l2)] = gaunt(l1, l2, l3)[:, :, m3]
                    G.append(row.flatten())  # [m1 m2]
        G = torch.stack(G) / sqrt(config.mean_neighbours)  # [J, m1 m2]
        self.register_buffer("G", G, persistent=False)
        of_degree = degree_of_row(L) == torch.arange(L + 1)[:, None]  # [L+1, M]
        self.register_buffer("of_degree", of_degree.double(), persistent=False)

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> Tensor:
        """The messages of all atoms: [N+U, J, C].

        h [N+U, (l_in+1)², C] features, index [N, B, K] the neighbours' rows in h [(N+U)·B, …],
        phi [N, B, K, L+1] radial functions, Y [N, K, M] harmonics. The last U atoms have no
        neighbours.
        """
        B = index.shape[1]
        h = h.transpose(1, 2).reshape(len(h) * B, -1)  # [(N+U)·B, c m1] a row per group
        A, *_ = NeighbourSum.apply(
            phi[:, None], Y[:, None], h, None, index, self.G, self.of_degree)  # [J, N+U, C]
        return A.transpose(0, 1)  # [N+U, J, C]


# ─── §6 Mixing, species and skip connection ───


def randn(*shape: int, fan_in: int = 1) -> nn.Parameter:
    """Random weights of variance 1/fan_in, so that unit variance stays unit variance."""
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / sqrt(fan_in))


class Mix(nn.Module):
    """message[i, l3 m3] = A[i, p, m3, c] W_l3[pc, c'], summed over channels c and paths p to l3.

    One product for each row (l3, m3, p) of A, then a sum over p.
    """

    def __init__(self, counts: list[int], channels: int):
        super().__init__()
        matrices = [randn(Q * channels, channels, fan_in=Q * channels) for Q in counts]
        self.W = nn.ParameterList(matrices)  # for each l3 [Q C, C]

        # Of each row (l3, m3, path) of A: its path, and the row (l3, m3) that it adds to
        path, row = [], []
        for l3, Q in enumerate(counts):
            for m3 in range(2 * l3 + 1):
                path += range(sum(counts[:l3]), sum(counts[:l3 + 1]))
                row += [l3 * l3 + m3] * Q
        total = torch.eye(len(counts) ** 2, dtype=torch.float64)[:, row]  # [M, J] of 0 and 1
        self.register_buffer("path", torch.tensor(path), persistent=False)  # [J]
        self.register_buffer("total", total, persistent=False)

    def forward(self, A: Tensor) -> Tensor:
        """[N, J, C] as Density returns it → [N, (l_out+1)², C]."""
        N, _, C = A.shape
        by_path = torch.cat([W.view(-1, C, C) for W in self.W])  # [paths, C, C]
        W = by_path.index_select(0, self.path)  # [J, C, C]
        mixed = torch.bmm(A.transpose(0, 1), W)  # [J, N, C]
        message = self.total @ mixed.flatten(1)  # [M, N C]
        return message.view(-1, N, C).transpose(0, 1)  # [N, M, C]


class Linear(nn.Module):
    """y[i, lm, c'] = Σ_c x[i, lm, c] W_l[c, c']: mixes channels, never m.

    It has no bias: for l > 0 a bias would be a direction in space that nothing has chosen.
    """

    def __init__(self, L: int, fan_in: int, fan_out: int):
        super().__init__()
        self.W = randn(L + 1, fan_in, fan_out, fan_in=fan_in)  # [L+1, fan_in, fan_out]
        self.register_buffer("degree_of_row", degree_of_row(L), persistent=False)  # [M]

    def forward(self, x: Tensor) -> Tensor:
        """[N, (L+1)², fan_in] → [N, (L+1)², fan_out]."""
        W = self.W.index_select(0, self.degree_of_row)  # [M, fan_in, fan_out]
        return torch.bmm(x.transpose(0, 1), W).transpose(0, 1)  # [N, M, fan_out]


def kinship(symbols: tuple[str, ...]) -> Tensor:
    """How alike elements are, by their places in the periodic table and their radii: [Z, Z].

        K[z, z'] = 0.9 exp(−(Δgroup² + (Δperiod/4)² + (Δradius/0.3 Å)²)/2) + 0.1 [z = z']

    The diagonal is 1. An element resembles those of its column most; the f-block is one column.
    """
    number = np.array([atomic_numbers[symbol] for symbol in symbols], int)  # [Z]
    noble = np.array([0, 2, 10, 18, 36, 54, 86, 118])  # a period ends with each
    period = np.searchsorted(noble, number)  # [Z] 1 … 7
    place = number - noble[period - 1]  # [Z] from the left …
    left = noble[period] - number  # [Z] … and from the right, 0 for noble gases
    group = np.where((place <= 2) & (left > 0), place, np.maximum(3, 18 - left))  # [Z]

    where = np.stack([group, period / 4, covalent_radii[number] / 0.3], 1)  # [Z, 3]
    distance = ((where[:, None] - where) ** 2).sum(2)  # [Z, Z] squared
    return torch.from_numpy(0.9 * np.exp(-distance / 2) + 0.1 * np.eye(len(number)))


class SpeciesTable(nn.Module):
    """C numbers for each species: the rows of √K W, with K of `kinship`.

    W starts random, of unit variance. The rows then have unit variance, too, and the covariance K:
    elements that are alike begin alike, and a step of W moves them together. Few data tell much of
    a rare element; this lets it learn from those above and below it in the periodic table. The 0.1
    is what an element has to itself.
    """

    def __init__(self, config: Config):
        super().__init__()
        value, vector = torch.linalg.eigh(kinship(config.species))  # [Z], [Z, Z]
        root = (vector * value.sqrt()) @ vector.T  # [Z, Z], symmetric: root² = K
        self.register_buffer("root", root, persistent=False)
        self.W = randn(len(config.species), config.channels)  # [Z, C]

    def forward(self, species: Tensor) -> Tensor:
        """species [N] → [N, C]."""
        return embedding(species, self.root @ self.W)  # [N, C]


class Skip(nn.Module):
    """An atom's own features, carried past the neighbours: (h ⊙ a_z) W_l for species z."""

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        shared = min(l_in, l_out)
        self.a = SpeciesTable(config)
        self.linear = Linear(shared, config.channels, config.channels)
        self.shared = (shared + 1) ** 2  # rows that h and the result both have
        self.missing = (l_out + 1) ** 2 - self.shared  # rows that h does not have yet

    def forward(self, h: Tensor, species: Tensor) -> Tensor:
        """h [N, (l_in+1)², C], species [N] → [N, (l_out+1)², C]."""
        own = h[:, :self.shared] * self.a(species)[:, None]  # [N, ≤ M, C]
        own = self.linear(own)  # [N, ≤ M, C]
        return pad(own, (0, 0, 0, self.missing)) if self.missing else own  # [N, M, C]


# ─── §7 Grid layer ───


class GridLayer(nn.Module):
    """A non-linearity for features that rotate: x → x + f W₃. [F §3.3]

    x[i, lm, c] are the coefficients of a function on the sphere, x(Ω, c) = Σ_lm Y_lm(Ω) x[lm, c].
    Rotating x rotates the function, and whatever is done point by point commutes with that. So:
    evaluate the function on the points of a Lebedev grid, apply the same network to the channels at
    every point, project back with f[lm] = Σ_p weight_p Y_lm(Ω_p) f(Ω_p).

    A grid has only the symmetry of a cube: what it integrates exactly is equivariant exactly, the
    rest approximately.
    """

    def __init__(self, L: int, exact_degree: int):
        super().__init__()
        # A scalar is the same function at every point: for L = 0 one point will do
        points, weights = lebedev(exact_degree if L else 0)
        to_grid = harmonics(points, L)  # [P, M]
        to_rows = (weights[:, None] * to_grid).T.contiguous()  # [M, P]
        self.register_buffer("to_grid", to_grid, persistent=False)
        self.register_buffer("to_rows", to_rows, persistent=False)

    def on_grid(self, x: Tensor) -> Tensor:
        """[N, M, C] → [P, N, C]."""
        values = self.to_grid @ x.transpose(0, 1).flatten(1)  # [P, N C]
        return values.view(-1, len(x), x.shape[2])  # [P, N, C]

    def from_grid(self, values: Tensor) -> Tensor:
        """[P, N, C] → [N, M, C]."""
        f = self.to_rows @ values.flatten(1)  # [M, N C]
        return f.view(-1, *values.shape[1:]).transpose(0, 1)  # [N, M, C]


class ProductGrid(GridLayer):
    """x + f W₃ with a product of two functions: exactly equivariant. [Eq3], [NequIP]

        f[lm] = gate ⊙ Σ_p weight_p Y_lm(Ω_p) u(Ω_p) ⊙ v(Ω_p) / spread_l  +  [l = 0] silu(s)
        u = x W₁,    v = x W₂,    s = x[00] W_s + b,    gate = σ(s) / √((1 + mean v²)/2)
        spread_l² = Σ_ab ⟨Y_lm Y_a Y_b⟩², the same for every m   (⟨⟩: mean over the sphere)

    u ⊙ v projected on degree L is the integral of a polynomial of degree 3L: with a rule of degree
    3L it is exact, and so is equivariance. Divided by its spread it has unit variance again where u
    and v have. The gate comes from scalars and is the same for all points, so it changes nothing.
    The length of v that divides it makes f grow like x, not like x²: features that are larger than
    those in training do not grow from layer to layer.
    """

    def __init__(self, L: int, config: Config):
        super().__init__(L, config.grid_degree or 3 * L)
        C = config.channels
        self.W12 = Linear(L, C, 2 * C)
        self.W3 = Linear(L, C, C)
        self.Ws = randn(C, C, fan_in=C)
        self.b = nn.Parameter(torch.zeros(C, dtype=torch.float64))

        to_grid = self.to_grid
        triple = torch.einsum("mp,pa,pb->mab", self.to_rows, to_grid, to_grid)  # [M, M, M]
        spread = triple.square().sum((1, 2)).sqrt()[:, None]  # [M, 1]
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("scalar", (degree_of_row(L) == 0).double()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        # The product, point by point
        u, v = self.W12(x).chunk(2, -1)  # 2 × [N, M, C]
        f = self.from_grid(self.on_grid(u) * self.on_grid(v)) / self.spread  # [N, M, C]

        # The length of v and the scalars decide how much of it passes
        mean_square = v.square().mean((1, 2))  # [N]
        s = torch.addmm(self.b, x[:, 0], self.Ws)  # [N, C]
        gate = torch.sigmoid(s) * ((1 + mean_square) / 2).rsqrt()[:, None]  # [N, C]

        # The scalars go on by themselves, too
        f = torch.addcmul(self.scalar * silu(s)[:, None], f, gate[:, None])  # [N, M, C]
        return x + self.W3(f)  # [N, M, C]


class SiluGrid(GridLayer):
    """x + f W₃ with f = silu(x(Ω) W₁ + b), as in the paper. [F §3.3]

    SiLU is not a polynomial: this layer is equivariant only as far as the grid is fine. The default
    degree is our choice, 15 (86 points) at L = 2; benchmarks/equivariance.py has the error of this
    grid and of others.
    """

    def __init__(self, L: int, config: Config):
        super().__init__(L, config.grid_degree or 15 * L // 2)
        C = config.channels
        self.W1 = Linear(L, C, C)
        self.W3 = Linear(L, C, C)
        self.b = nn.Parameter(torch.zeros(C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        values = silu(self.on_grid(self.W1(x)) + self.b)  # [P, N, C]
        return x + self.W3(self.from_grid(values))  # [N, M, C]


# ─── §8 The network ───


class Layer(nn.Module):
    """h ← grid layer of (mixed density of the neighbours + skip)/√2.

    Features of degrees 0 … l_in come in, those of degrees 0 … l_out go out.
    """

    def __init__(self, l_in: int, l_out: int, config: Config):
        super().__init__()
        self.density = Density(l_in, l_out, config)
        self.mix = Mix(self.density.counts, config.channels)
        self.skip = Skip(l_in, l_out, config)
        grid_layer = ProductGrid if config.activation == "product" else SiluGrid
        self.grid = grid_layer(l_out, config)

    def forward(self, h: Tensor, species: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> Tensor:
        """h [N+U, (l_in+1)², C], species [N+U] → [N+U, (l_out+1)², C]; the rest as in Density.

        The last U atoms are alone: they have no neighbours and get no message.
        """
        message = self.mix(self.density(h, index, phi, Y))  # [N+U, M, C]
        return self.grid((message + self.skip(h, species)) / sqrt(2))  # [N+U, M, C]


class Facet(nn.Module):
    """The interatomic potential. Build with `Facet(config)`, call with a Batch.

        energy = Σ_i E0[z_i] + energy_scale · (h_i − h_alone[z_i]) · readout + repulsion_i

    The first layer takes scalars (the embedded species), the last gives scalars (the energy), those
    between carry degrees 0 … L. Each layer sees one cutoff further. What the network makes of an
    atom without neighbours, h_alone, is subtracted, so that an isolated atom has E0: a lone atom of
    each species that is present rides along in every batch.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.origin = {}  # how it was trained, in plain Python: filled by the trainer
        Z, C, T, L = len(config.species), config.channels, config.layers, config.degree

        self.splines = RadialSplines(T * config.groups * (L + 1), config)
        self.repulsion = Repulsion(config)
        self.embedding = SpeciesTable(config)
        l = [0] + [L] * (T - 1) + [0]
        self.layers = nn.ModuleList(Layer(l[t], l[t + 1], config) for t in range(T))
        self.readout = randn(C, fan_in=C)  # [C]
        self.to(dtype)  # all of it was made in float64, so that constants are exact in any dtype

        # Total energies reach 10⁵ eV and differ by meV: E0 and its sums stay in float64
        E0 = torch.tensor(config.reference_energies or [0.0] * Z, dtype=torch.float64)
        self.register_buffer("E0", E0, persistent=False)  # [Z]

    def atomic_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the network says of each atom, by name; differentiable in batch.vectors.

        "energies" [N] eV, float64, is what forces and stress are made from. Any tensor [N, …] that
        is added here goes on to `evaluate` and to the calculator's results, split by crystal. ASE
        hands it out when FacetCalculator.implemented_properties names it, too. It is trained when
        TABLE in tools/labels.py has a label of that name.
        """
        N, K = batch.src.shape
        B, L = self.config.groups, self.config.degree
        U = len(batch.present)

        # How far the neighbours are, and in what direction
        r = batch.vectors.norm(dim=-1)  # [N, K]
        phi = self.splines(r).view(N, K, -1, B, L + 1)  # [N, K, T, B, L+1]
        phi = phi.permute(2, 0, 3, 1, 4).contiguous()  # [T, N, B, K, L+1]
        Y = harmonics(batch.vectors / r[..., None], L)  # [N, K, M]

        # Group b of an atom sees group b of its neighbours
        group = torch.arange(B, device=r.device)[:, None]  # [B, 1]
        index = batch.src[:, None] * B + group  # [N, B, K]

        # A lone atom of each species that is present follows the N real ones
        species = torch.cat([batch.species, batch.present])  # [N+U]
        h = self.embedding(species)[:, None]  # [N+U, 1, C]
        for layer, phi_t in zip(self.layers, phi):
            h = layer(h, species, index, phi_t, Y)  # [N+U, M, C], the last [N+U, 1, C]

        # Less what a lone atom of the same species has
        of_atom, of_lone = (h[:, 0] @ self.readout).split([N, U])  # [N], [U]
        which = torch.searchsorted(batch.present, batch.species)  # [N], for `present` is sorted
        alone = of_lone[which]  # [N]
        learned = (of_atom - alone).double() * self.config.energy_scale  # [N]

        repulsion = self.repulsion(r, batch.species, batch.src)  # [N]
        return {"energies": learned + self.E0[batch.species] + repulsion}

    def forward(self, batch: Batch, differentiable: bool = False) -> dict[str, Tensor]:
        """All outputs by name: those of `atomic_outputs`, and

        energy [S] eV, forces [N, 3] eV/Å, virial [S, 3, 3] eV, and stress [S, 3, 3] eV/Å³, its
        quotient by the volume (nan where there is none). One gradient, that for the r_ij, makes
        them all. (An energy that is made from anything else, such as a pressure times the volume or
        a second list of neighbours, needs gradient, forces and virial of its own, here and in
        tools/lammps.py.)

            force_i = Σ_j ∂energy/∂r_ij − Σ_k ∂energy/∂r_ki,   because r_ij = x_j − x_i
            virial = Σ_ij r_ij ⊗ ∂energy/∂r_ij,   because a strain ε moves r_ij by ε r_ij

        The symmetric part of the virial is taken. The other part is the torque on the crystal: for
        the product grid only rounding, for SiLU an error of the grid.
        differentiable=True keeps the graph, so that a loss on forces and stress can be trained.
        """
        S = len(batch.volume)
        vectors = batch.vectors.detach().requires_grad_()  # [N, K, 3]
        with torch.enable_grad():
            out = self.atomic_outputs(batch._replace(vectors=vectors))
            total = out["energies"].sum()
            gradient, = torch.autograd.grad(
                total, vectors, create_graph=differentiable)  # [N, K, 3]

        # Forces: what the edges pull at the atoms that receive, and at those that are seen
        seen = batch.src.flatten()  # [N K]
        forces = gradient.sum(1).index_add(0, seen, -gradient.flatten(0, 1))  # [N, 3]

        # Virial and stress
        virial = vectors.mT @ gradient  # [N, 3, 3] of each atom
        virial = (virial + virial.mT) / 2  # [N, 3, 3]
        virial = virial.new_zeros(S, 3, 3).index_add(0, batch.crystal, virial)  # [S, 3, 3]
        stress = virial / batch.volume[:, None, None].to(virial)  # [S, 3, 3]

        energies = out["energies"]  # [N]
        out["energy"] = energies.new_zeros(S).index_add(0, batch.crystal, energies)  # [S]
        out.update(forces=forces, virial=virial, stress=stress)
        if differentiable:
            return out
        return {name: value.detach() for name, value in out.items()}


# ─── §9 Use: files and the ASE calculator ───


PER_CRYSTAL = ("energy", "virial", "stress")  # outputs with a row per crystal; others: per atom
FORMAT = 2  # of the checkpoints that `save` writes
BUILDING = threading.RLock()


def save(model: Facet, path: str | Path, **more) -> None:
    """Write tensors, the plain config, the model's origin and `more` to path.

    A temporary file, safe on the disk, is renamed into place: path always holds the old checkpoint
    or the new one. Raises OSError when the disk is full or path cannot be written.
    """
    content = {**more, "facet": FORMAT, "config": asdict(model.config),
               "state": model.state_dict(), "origin": model.origin}
    memory = io.BytesIO()  # errors of the disk should come from the disk, not from torch.save
    torch.save(content, memory)

    temporary = Path(f"{path}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def upgrade(content: dict) -> dict:
    """A checkpoint of an older format in the present one: the one place that knows how they differ.

    Format 1 did not say where a model comes from.
    """
    return {"origin": {}, **content}


def read_checkpoint(path: str | Path) -> dict:
    """What `save` wrote, in the present format, on the CPU. Code in the file is not run.

    Raises ValueError for a file that is no Facet checkpoint, or is of a newer format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        number = content["facet"]
        if number <= FORMAT:
            content = upgrade(content)
            for name in ("config", "state", "origin"):
                content[name] = dict(content[name])
    except Exception as error:
        raise ValueError(f"{path} is not a Facet checkpoint, or it is damaged "
                         f"({type(error).__name__})") from error
    if number > FORMAT:
        raise ValueError(f"{path}: is of format {number}, and this version of facet.py knows those "
                         f"up to {FORMAT}; use a newer facet.py")
    return content


def untrained(kind: type, config: Config, dtype: torch.dtype) -> Facet:
    """A model whose weights will be replaced: the global random numbers stay as they are.

    They are saved and restored, which two threads must not do at the same time.
    """
    with BUILDING, torch.random.fork_rng(devices=[]):
        return kind(config, dtype)


@torch.inference_mode(False)  # weights made in that mode could never be differentiated
def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Facet:
    """The model that `save` wrote, ready for use (`.eval()`); its `origin` says how it was made.

    Raises FileNotFoundError, and ValueError for a file that is no Facet checkpoint, is of a newer
    format, or has other fields or tensors than this version: it says which.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train_small.py writes "
                                "runs/<name>/model.pt")
    content = read_checkpoint(path)
    known = {field.name for field in fields(Config)}
    for name in sorted(known ^ content["config"].keys()):
        what = "no field {}" if name in known else "a field {} that this version does not know"
        raise ValueError(f"{path}: has {what.format(name)}")
    try:
        model = untrained(Facet, Config(**content["config"]), dtype)
        model.load_state_dict(content["state"])
    except (ValueError, RuntimeError) as error:  # torch names every tensor that does not fit
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    model.origin = content["origin"]
    return model.to(device).eval()


@torch.inference_mode(False)  # forces are a gradient, whatever mode the caller is in
def evaluate(model: Facet, crystals: list[Neighbours], batch_atoms: int = 256) -> list[dict]:
    """Results of each crystal under ASE's names, float64, in the order given.

    energy and free_energy (the same, eV), energies [N] (eV), forces [N, 3] (eV/Å), and, where the
    cell spans space, stress [6] (eV/Å³, Voigt). Batches of about batch_atoms bound the memory.
    Raises MemoryError if a batch does not fit on the GPU.
    """
    results = [{} for _ in crystals]
    sizes = np.array([len(crystal.species) for crystal in crystals], int)  # [S]

    # Crystals with about as many neighbours go into one batch: little padding
    mean_neighbours = [len(crystal.dst) / len(crystal.species) for crystal in crystals]
    order = np.argsort(mean_neighbours)  # [S]
    number = np.cumsum(sizes[order]) // batch_atoms  # [S] of the batch

    for n in np.unique(number):
        group = order[number == n]
        weights = next(model.parameters())
        several = [crystals[s] for s in group]
        batch = make_batch(several, model.config.cutoff, weights.dtype).to(weights.device)
        ends = np.cumsum(sizes[group])

        try:
            with torch.autocast(weights.device.type, enabled=False):
                out = model(batch)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{len(batch.species)} atoms at once need more memory than "
                              f"{weights.device} has left; lower batch_atoms, or take a smaller "
                              "crystal") from error
        for name, values in out.items():
            values = values.double().cpu().numpy()  # [S, …] or [N, …]
            parts = values if name in PER_CRYSTAL else np.split(values, ends[:-1])
            for s, part in zip(group, parts):
                results[s][name] = part

    for crystal, result in zip(crystals, results):
        result["free_energy"] = result["energy"]
        stress = result.pop("stress")  # [3, 3]
        del result["virial"]
        if np.isfinite(crystal.volume):
            result["stress"] = full_3x3_to_voigt_6_stress(stress)  # [6]
    return results


class FacetCalculator(Calculator):
    """ASE calculator: `atoms.calc = FacetCalculator("runs/si/model.pt")`.

    It gives everything that `evaluate` does, float64 numbers whatever the model's dtype.
    device: "cuda" if there is one, unless given. dtype: torch.float64 for phonons and tight
    relaxations. A model, not a path, is copied, so that later training does not change the
    calculator.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    @torch.inference_mode(False)
    def __init__(self, model: Facet | str | Path, device=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(model, Facet):
            self.model = untrained(type(model), model.config, dtype).to(device).eval()
            self.model.load_state_dict(model.state_dict())
            self.model.origin = dict(model.origin)
        else:
            self.model = load(model, device, dtype)
        self.model.requires_grad_(False)

        # Å, the shortest distance of each pair of species in the training data, 0 if unknown
        species = self.model.config.species
        self.shortest = np.zeros((len(species), len(species)))  # [Z, Z]
        for pair, distance in self.model.origin.get("shortest", {}).items():
            if set(pair.split("-")) <= set(species):
                i, j = (species.index(symbol) for symbol in pair.split("-"))
                self.shortest[i, j] = self.shortest[j, i] = distance

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        crystal = find_neighbours(self.atoms, self.model.config)
        self.warn_of_close_atoms(crystal)
        self.results, = evaluate(self.model, [crystal])

    def warn_of_close_atoms(self, crystal: Neighbours) -> None:
        """Warn, once, of two atoms that are closer than any of their species in the training."""
        i = crystal.species[crystal.dst]  # [E]
        j = crystal.species[crystal.src]  # [E]
        r = np.linalg.norm(crystal.vectors, axis=1)  # [E]
        close = np.flatnonzero(r < self.shortest[i, j] - 1e-3)
        if len(close) == 0:
            return

        e = close[0]
        i, j = i[e], j[e]
        one, other = self.model.config.species[i], self.model.config.species[j]
        seen = self.shortest[i, j]
        self.shortest = np.zeros_like(self.shortest)  # no further warnings
        warnings.warn(f"{one} and {other} are {r[e]:.2f} Å apart, closer than in the training data "
                      f"({seen:.2f} Å): do not trust what Facet says of them", stacklevel=2)
