"""What looks wrong in a data set: units, signs, outliers. frames.warnings asks all of it.

Every check gives a list of sentences, empty if all is well, and names the frames it means. Frames
without the label in question are passed over. Free atoms are left out beforehand. Limits are
generous: they are there for absurd values, not for rare ones. Real pressures of hundreds of GPa,
surfaces, and molecules beside crystals pass.

Besides, two statistics for the trainer that a few absurd frames do not move: `robust_fit` of the
reference energies and `robust_scale` of the forces. Without such frames they are what least squares
and the RMS over all frames give, to the last bit.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.stress import voigt_6_to_full_3x3_stress

import facet

ENERGY = 1.0            # eV/atom: an energy that is nearer to the fit is never an outlier …
SPREADS = 25            # … nor one within so many times the typical distance from it
FORCE = 100.0           # eV/Å: larger ones are named; MPtrj reaches 83
LARGE = 10.0            # eV/Å, RMS of a frame: smaller ones always count for the scale of forces
SHORT = 0.4             # shortest distance over the sum of covalent radii: named below this
SHORT_SET = 0.6         # the same, if most frames are below it
NM_SET = 0.25           # the same, if they are so far below it that positions may be in nm
LONG_SET = 1.4          # the same, if most frames are above it: hot metals have 0.8, Tl 1.2
REACHES = (0.1, NM_SET, SHORT, SHORT_SET, 0.8, 1.0, 1.2, LONG_SET)  # where atoms are looked for
WORK = 50.0             # eV/atom, stress times volume: 1 TPa is 30 in dense matter, kbar hundreds
FORCE_WORK = 30 * 2.5   # Å: the same in terms of forces; a hot dense crystal has less
TINY = 0.002            # strain: cells that differ by less count as equal
NOBLE = (2, 10, 18, 36, 54, 86)


# ─── Robust statistics ───────────────────────────────────────────────────────────────────────────

def least_squares(shares: np.ndarray, energies: np.ndarray,
                  rcond: float = 1e-9) -> tuple[np.ndarray, int]:
    """E0 [Z] and the rank, by the normal equations; the smallest E0 where they are not unique."""
    # the copy: NumPy rounds a product of one array with itself in another way
    squares = shares.T @ shares.copy("K")  # [Z, Z]
    E0, _, rank, _ = np.linalg.lstsq(squares, shares.T @ energies, rcond=rcond)
    return E0, int(rank)


def robust_fit(shares: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """E0 [Z], what they leave of each energy [F] (eV/atom), and the rank of the fit.

    shares [F, Z] of each element in a frame, energies [F] in eV/atom. Least squares without the
    outliers; these are found by a fit of least absolute errors, made of weighted least squares.
    """
    E0, rank = least_squares(shares, energies)
    for _ in range(20):
        error = np.abs(energies - shares @ E0)  # [F]
        root = 1 / np.sqrt(np.maximum(error, 1e-3))  # [F], 1e-3 eV/atom counts as none
        E0, _ = least_squares(shares * root[:, None], energies * root, 1e-13)  # rare elements count

    # outliers go, unless an element would go with them
    error = np.abs(energies - shares @ E0)
    kept = error <= max(ENERGY, SPREADS * 1.4826 * np.median(error)) if len(error) else error > 0
    E0, rank = least_squares(shares, energies)
    if not kept.all():
        without, rank_without = least_squares(shares[kept], energies[kept])
        if rank_without == rank:
            E0 = without
    return E0, energies - shares @ E0, rank


def far_above(values: np.ndarray, least: float) -> np.ndarray:
    """Which of these positive values [F] are above `least` and far above the others.

    That is thirty times their median, up to a thousand times if they are spread widely; the median
    of those that matter: a relaxed crystal's forces may be nothing but rounding.
    """
    some = values[values > 1e-3 * np.quantile(values, 0.9)] if len(values) else values
    if len(some) == 0:
        return np.zeros(len(values), bool)
    logs = np.log(some)
    middle = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - middle))
    limit = np.exp(middle + np.clip(6 * spread, np.log(30), np.log(1000)))
    return values > max(limit, least)


def rms(forces: list[np.ndarray]) -> np.ndarray:
    """RMS of the components of each frame's forces, [F] eV/Å."""
    return np.array([np.sqrt(np.mean(of ** 2)) for of in forces])


def robust_scale(forces: list[np.ndarray]) -> float:
    """RMS of all components, eV/Å, without frames whose forces are far above those of others.

    forces: [N, 3] of every frame.
    """
    absurd = far_above(rms(forces), LARGE)
    kept = [of for of, left_out in zip(forces, absurd, strict=True) if not left_out]
    return float(np.sqrt(np.mean(np.concatenate(kept) ** 2)))


# ─── How far frames are apart ────────────────────────────────────────────────────────────────────

def deformation(a: Atoms, b: Atoms) -> np.ndarray:
    """Strain [3, 3] that turns the cell of a into that of b; zeros without cells."""
    if a.cell.rank < 3 or b.cell.rank < 3:
        return np.zeros((3, 3))
    change = np.linalg.solve(a.cell.array, b.cell.array)
    return (change + change.T) / 2 - np.eye(3)


def displacements(a: Atoms, b: Atoms) -> np.ndarray:
    """How the atoms of a move to become b, without the strain and the drift of all, [N, 3] Å."""
    if a.cell.rank < 3 or b.cell.rank < 3:
        moved = b.positions - a.positions
    else:
        moved = b.get_scaled_positions(wrap=False) - a.get_scaled_positions(wrap=False)
        moved -= np.where(a.pbc, np.round(moved), 0.0)
        moved = moved @ (a.cell.array + b.cell.array) / 2
    return moved - moved.mean(0)


def apart(a: Atoms, b: Atoms) -> float:
    """RMS distance between two configurations of the same atoms, Å; molecules may have turned."""
    if a.cell.rank == 3 and b.cell.rank == 3:
        return float(np.sqrt((displacements(a, b) ** 2).sum(1).mean()))

    # the rotation that brings them closest follows from singular values (Kabsch)
    left = a.positions - a.positions.mean(0)
    right = b.positions - b.positions.mean(0)
    u, together, vt = np.linalg.svd(left.T @ right)
    together[2] *= np.sign(np.linalg.det(u) * np.linalg.det(vt))  # a mirror is no rotation
    square = (left ** 2).sum() + (right ** 2).sum() - 2 * together.sum()  # Å²
    return float(np.sqrt(max(square, 0.0) / len(a)))


def same_atoms(a: Atoms, b: Atoms) -> bool:
    """Whether two frames have the same elements in the same order, periodic in the same way."""
    return (np.array_equal(a.numbers, b.numbers) and np.array_equal(a.pbc, b.pbc)
            and a.cell.rank == b.cell.rank)


def alike(a: Atoms, b: Atoms) -> bool:
    """Whether two frames could be of one trajectory: same atoms and cell, and near each other."""
    if not same_atoms(a, b) or np.abs(deformation(a, b)).max() > TINY:
        return False
    return apart(a, b) < 0.5


# ─── Checks ──────────────────────────────────────────────────────────────────────────────────────

def named(rows: np.ndarray, crystals: Sequence[Atoms]) -> str:
    """The first three of these frames by name, and how many more there are."""
    names = [crystals[row].info["source"] for row in rows[:3]]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return "; ".join(names) + more


def label(crystals: list[Atoms], name: str) -> tuple[list[int], list]:
    """Rows of the frames that have this label, and their labels."""
    rows = [i for i, atoms in enumerate(crystals) if name in atoms.calc.results]
    return rows, [crystals[i].calc.results[name] for i in rows]


def shares_and_energies(frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the frames with an energy: rows, shares of the elements [F, Z] and eV/atom [F].

    frames: a frames.Frames, of which only columns are read.
    """
    energies = frames.energies()
    atoms = frames.atom_counts()
    rows = np.flatnonzero(np.isfinite(energies))
    shares = frames.compositions(frames.elements())[rows] / atoms[rows, None]
    return rows, shares, energies[rows] / atoms[rows]


def energies_per_atom(frames) -> list[str]:
    """Whether the energies look like energies per atom: composition explains those better."""
    rows, shares, per_atom = shares_and_energies(frames)
    if len(rows) == 0:
        return []
    atoms = frames.atom_counts()[rows]

    def unexplained(y: np.ndarray) -> float:
        """Spread of what a sum over elements leaves."""
        return np.std(y - shares @ np.linalg.lstsq(shares, y, rcond=None)[0])

    if np.ptp(atoms) <= 0.5 * atoms.min():
        return []
    if unexplained(per_atom * atoms) >= 0.5 * unexplained(per_atom):
        return []
    first = frames[rows[0]]
    return [f"the energies ({first.calc.results['energy']:.3f} eV for {len(first)} atoms in "
            f"{first.info['source']}) do not grow with the number of atoms: are they energies per "
            f"atom? Totals are meant"]


def outlying_energies(frames) -> list[str]:
    """Energies per atom far from what the composition explains in the other frames."""
    rows, shares, per_atom = shares_and_energies(frames)
    if len(rows) < 5:
        return []
    _, error, _ = robust_fit(shares, per_atom)
    typical = 1.4826 * np.median(np.abs(error))
    far = np.abs(error) > max(ENERGY, SPREADS * typical)
    if not far.any():
        return []
    found = np.flatnonzero(far)
    found = found[np.argsort(-np.abs(error[found]), kind="stable")]
    return [f"energies far from all others of their composition, in {far.sum()} of {len(rows)} "
            f"frames: {named(rows[found], frames)} (by {error[found[0]]:+.4g} eV/atom, where "
            f"{typical:.2g} is usual): converged, in eV, and totals?"]


def net_forces(crystals: list[Atoms]) -> list[str]:
    """Whether forces do not sum to zero, as constraints or missing atoms make them do."""
    rows, forces = label(crystals, "forces")
    if not rows:
        return []
    sums = np.array([np.abs(of.sum(0)).max() for of in forces])  # eV/Å
    squares = rms(forces) ** 2

    # rounding of N forces adds up to √N times as much
    net = sums / np.sqrt([len(of) for of in forces])
    limit = 0.02 + 0.1 * np.sqrt(squares[~far_above(np.sqrt(squares), LARGE)].mean())
    if not (net > limit).any():
        return []
    worst = int(net.argmax())
    return [f"in {(net > limit).sum()} of {len(rows)} frames the forces do not sum to zero, most "
            f"of all in {crystals[rows[worst]].info['source']} (sum {sums[worst]:.2f} eV/Å): were "
            f"constraints applied to them?"]


def large_forces(crystals: list[Atoms]) -> list[str]:
    """Forces beyond what atoms exert on each other, or far above those of all other frames."""
    rows, forces = label(crystals, "forces")
    if not rows:
        return []
    largest = np.array([np.linalg.norm(of, axis=1).max() for of in forces])  # eV/Å
    far = np.flatnonzero((largest > FORCE) | far_above(rms(forces), LARGE))
    if len(far) == 0:
        return []
    far = far[np.argsort(-largest[far], kind="stable")]
    return [f"very large forces in {len(far)} of {len(rows)} frames: "
            f"{named(np.array(rows)[far], crystals)} (up to {largest[far[0]]:.4g} eV/Å, where "
            f"{np.median(largest):.2g} is usual): is the geometry sound, the unit eV/Å?"]


def closest(atoms: Atoms, sizes: np.ndarray, reaches: Sequence[float]) -> float:
    """Smallest distance of two atoms over the sum of their sizes [N], images included.

    Infinity if it is above the last of the reaches. These rise: pairs are only looked for as far
    as it takes, so that time and memory grow as the number of atoms. Atoms on one spot: 0.
    """
    cell = np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)  # [3, 3], the others do not matter
    for reach in reaches:
        cutoff = 2 * reach * sizes.max()
        try:
            i, j, _, vectors = facet.neighbour_list(atoms.positions, cell, atoms.pbc, cutoff)
        except ValueError:  # the geometry was checked: two atoms sit on one spot
            return 0.0
        ratio = np.linalg.norm(vectors, axis=1) / (sizes[i] + sizes[j])
        if (ratio < reach).any():
            return float(ratio.min())
    return np.inf


def nearest(atoms: Atoms, within: float) -> float:
    """Shortest distance over the sum of covalent radii; infinity if it is not within this."""
    reaches = [reach for reach in REACHES if reach <= within]
    return closest(atoms, covalent_radii[atoms.numbers], reaches)


def distances(crystals: list[Atoms]) -> list[str]:
    """Shortest distances against covalent radii: in nm, Bohr or pm they are off in most frames."""
    several = [i for i, atoms in enumerate(crystals) if len(atoms) > 1]
    if not several:
        return []

    # some frames tell the unit
    some = [several[k] for k in np.unique(np.linspace(0, len(several) - 1, 60).astype(int))]
    ratio = np.array([nearest(crystals[i], LONG_SET) for i in some])
    middle = np.median(ratio)
    for limit, question in ((NM_SET, "are positions in nm?"),
                            (SHORT_SET, "were positions turned from Bohr into Å twice?")):
        if middle < limit:
            example = crystals[some[int(ratio.argmin())]]
            return [f"atoms are too close in most frames, such as {example.info['source']}: "
                    f"shortest distances are {middle:.2g} times what covalent radii add up to: "
                    f"{question}"]

    # noble gases never come close
    bonded = [not np.isin(crystals[i].numbers, NOBLE).all() for i in some]
    far = np.flatnonzero(bonded & np.isinf(ratio))
    if len(far) > sum(bonded) / 2:
        return [f"atoms are far apart in most frames, such as "
                f"{crystals[some[far[0]]].info['source']}: shortest distances are above {LONG_SET} "
                f"times what covalent radii add up to: are positions in Bohr or pm?"]

    # single frames
    known = dict(zip(some, ratio))
    ratio = np.array([known[i] if i in known else nearest(crystals[i], SHORT) for i in several])
    short = np.flatnonzero(ratio < SHORT)
    if len(short) == 0:
        return []
    short = short[np.argsort(ratio[short], kind="stable")]
    return [f"atoms almost on each other in {len(short)} of {len(several)} frames: "
            f"{named(np.array(several)[short], crystals)} ({ratio[short[0]]:.2f} times what "
            f"covalent radii add up to)"]


def stresses(crystals: list[Atoms]) -> list[str]:
    """Stresses that look like kbar: volume times stress beside energies, forces, other frames."""
    rows = []
    work = []
    forces = []
    for i, atoms in enumerate(crystals):
        if "stress" in atoms.calc.results and atoms.cell.rank == 3:
            rows.append(i)
            largest = np.abs(atoms.calc.results["stress"]).max()
            work.append(largest * atoms.get_volume() / len(atoms))  # eV/atom
            forces.append(atoms.calc.results.get("forces", np.zeros((1, 3))))
    if not rows:
        return []
    work = np.array(work)
    large = (work > WORK) | far_above(work, WORK / 10)
    large = np.flatnonzero(large & (work > FORCE_WORK * rms(forces)))
    if len(large) == 0:
        return []
    large = large[np.argsort(-work[large], kind="stable")]
    return [f"stresses look like kbar in {len(large)} of {len(rows)} frames: "
            f"{named(np.array(rows)[large], crystals)} (times the volume {work[large[0]]:.4g} "
            f"eV/atom): multiply VASP's kbar by -6.2415e-4 to get eV/Å³ in ASE's sign, or leave "
            f"stress out with --stress_weight 0"]


WARNINGS = (net_forces, large_forces, distances, stresses)


# ─── Checks of neighbouring frames ───────────────────────────────────────────────────────────────

def slope(work: np.ndarray, change: np.ndarray) -> float:
    """The factor b of change ≈ b · work [P] by least absolute errors; nan if it fits badly."""
    some = np.abs(work) > 1e-9
    work = work[some]
    change = change[some]
    if len(work) < 8 or not change.any():
        return np.nan
    ratio = change / work
    order = np.argsort(ratio)
    weight = np.cumsum(np.abs(work[order]))
    factor = ratio[order][np.searchsorted(weight, weight[-1] / 2)]
    missed = np.abs(change - factor * work).sum() / np.abs(change).sum()
    return float(factor) if missed < 0.3 else np.nan


def slope_beside(work: np.ndarray, other: np.ndarray, change: np.ndarray) -> float:
    """The factor b of change ≈ b · work + c · other [P] by least absolute errors.

    nan if it fits badly, or if b · work is little of the change.
    """
    if len(work) < 8 or np.abs(work).mean() <= 1e-4 * np.abs(change).mean():
        return np.nan  # rounding of positions that have not moved
    columns = np.stack([work, other], 1)  # [P, 2]
    columns = columns / np.maximum(np.abs(columns).mean(0), 1e-9)  # [P, 2]
    missed = np.abs(change)  # [P]
    for _ in range(30):
        root = 1 / np.sqrt(np.maximum(missed, 1e-6 * np.abs(change).max()))  # [P]
        factors = np.linalg.lstsq(columns * root[:, None], change * root, rcond=1e-9)[0]  # [2]
        missed = np.abs(change - columns @ factors)

    little = 0.3 * np.abs(change).mean()
    if missed.mean() > little or abs(factors[0]) < little:
        return np.nan
    return float(factors[0] / np.abs(work).mean())


CURES = ((-1.0, "is the sign the other one, as of gradients?"),
         (51.42, "are they in Hartree/Bohr?"),
         (25.0, "are the energies in kcal/mol, or forces in Rydberg/Bohr or Hartree/Å?"),
         (0.04, "are the energies in Hartree, or forces in kcal/mol/Å?"),
         (10.0, "are positions in nm?"),
         (0.529, "are positions in Bohr?"),
         (1.89, "are energies and forces in Hartree and Hartree/Bohr?"),
         (6.2415e-4, "are they in kbar?"),
         (-6.2415e-4, "are they in kbar, with VASP's sign?"),
         (0.00624, "are they in GPa?"))


def wrong_factor(what: str, factor: float, example: Atoms) -> list[str]:
    """A sentence if the energies change by a factor far from 1 of what forces or stresses tell."""
    if np.isnan(factor) or 1 / 1.7 < factor < 1.7:
        return []
    distance = [abs(np.log(factor / usual)) if factor * usual > 0 else np.inf for usual, _ in CURES]
    best = int(np.argmin(distance))
    cure = CURES[best][1] if distance[best] < 0.3 else "check units and signs"
    return [f"from frame to frame, energies change by {factor:.3g} times what the {what} tell, for "
            f"example from {example.info['source']} on: {cure}"]


def slopes(pairs: list[tuple[Atoms, Atoms]]) -> list[str]:
    """Forces, then stresses, against differences of energies of frames that are near each other.

    With the displacements u and the strain ε between two frames, ΔE ≈ -F·u + V σ·ε, with the means
    of both. Frames of equal cells tell about forces, the others about stresses, and about forces
    beside these, as in molecular dynamics at constant pressure.
    """
    of_forces = []
    of_stresses = []
    of_both = []
    first = {}
    for a, b in pairs:
        left, right = a.calc.results, b.calc.results
        if not {"energy", "forces"} <= left.keys() & right.keys() or not same_atoms(a, b):
            continue
        moved = displacements(a, b)
        strain = deformation(a, b)
        if np.sqrt((moved ** 2).sum(1).mean()) > 0.5 or np.abs(strain).max() > 0.1:
            continue

        change = right["energy"] - left["energy"]
        work = -((left["forces"] + right["forces"]) / 2 * moved).sum()
        if np.abs(strain).max() < TINY / 2:
            of_forces.append((work, change))
            first.setdefault("forces", a)
        elif "stress" in left and "stress" in right:
            tension = (a.get_volume() * voigt_6_to_full_3x3_stress(left["stress"])
                       + b.get_volume() * voigt_6_to_full_3x3_stress(right["stress"])) / 2
            of_stresses.append(((tension * strain).sum(), change - work))
            of_both.append((work, (tension * strain).sum(), change))
            first.setdefault("stresses", a)

    found = []
    for what, points in (("forces", of_forces), ("stresses", of_stresses)):
        if points:
            work, change = np.array(points).T
            found += wrong_factor(what, slope(work, change), first[what])
    if of_both and not found:
        factor = slope_beside(*np.array(of_both).T)
        found += wrong_factor("forces", factor, first["stresses"])
    return found
