"""Properties of an interatomic potential, as functions for any ASE calculator.

    from tools.properties import rotation
    rotation(calculator, atoms)             eV/Å by which the forces fail to turn along

A property takes an ASE calculator and a crystal, which it copies, and returns an error: how far the
calculator is from having the property. `of` says in what: "energy" (eV per atom), "forces" (eV/Å)
or "stress" (eV/Å³); for several of them an array of errors comes back. Whether an error is small
enough is for tools/check.py to say, which prints all of them as a table, and for test_facet.py,
which tests them on random crystals. No rotation here is a multiple of 90° about anything.
"""
from __future__ import annotations

import ase.build
import numpy as np
import torch
from ase import Atoms, units
from ase.data import atomic_numbers, covalent_radii, vdw_radii
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from scipy.spatial.transform import Rotation

import facet

ALL = ("energy", "forces", "stress")
NO_METALS = {*"HBCNOFPSI", "Si", "Cl", "Ge", "As", "Se", "Br", "Sb", "Te"}
NOBLE = ("He", "Ne", "Ar", "Kr", "Xe", "Rn")
STRANGERS = ("Au", "Cu", "Al", "O", "H")  # tried beside a crystal of one element
GENERIC, IMPROPER = Rotation.from_rotvec([[0.4, -1.1, 0.7], [-1.3, 0.2, 0.9]]).as_matrix()
IMPROPER = -IMPROPER  # a rotation after an inversion: a mirror image, turned


class NotApplicable(Exception):
    """The property says nothing about this calculator or this crystal."""


class Fault(Exception):
    """The calculator has not the property, and no number says by how much."""


class NothingToSee(NotApplicable):
    """It would say something, but all that it compares is zero."""


def facet_of(calculator) -> facet.Facet | None:
    """The model of a calculator that is a Facet, perhaps a watched one."""
    model = getattr(calculator, "model", None)
    return model if isinstance(model, facet.Facet) else None


def value(calculator, atoms: Atoms, of: str) -> np.ndarray:
    """Energy per atom [1] eV, forces [N, 3] eV/Å or stress [3, 3] eV/Å³."""
    atoms = atoms.copy()
    atoms.calc = calculator
    if of == "energy":
        return np.array([atoms.get_potential_energy()]) / len(atoms)
    if of == "forces":
        return np.array(atoms.get_forces(), float)
    return np.array(atoms.get_stress(voigt=False), float)


def parts_of(of) -> tuple[str, ...]:
    """The names in `of`, which is one of them or several."""
    return (of,) if isinstance(of, str) else tuple(of)


def as_asked(errors: dict, of):
    """The error of a name, or an array of errors for several names."""
    return float(errors[of]) if isinstance(of, str) else np.array([errors[name] for name in of])


def difference(calculator, before: Atoms, after: Atoms, of, R=None, order=slice(None)):
    """Largest error of what `after` should have, the crystal `before` after the rotation R.

    order says which atom of `before` each atom of `after` is. Units as `of`: a number for a name,
    an array for several.
    """
    R = np.eye(3) if R is None else R
    parts = parts_of(of)

    # What the first crystal has, turned and reordered
    wanted = {name: value(calculator, before, name) for name in parts}
    if "forces" in wanted:
        wanted["forces"] = wanted["forces"][order] @ R.T
    if "stress" in wanted:
        wanted["stress"] = R @ wanted["stress"] @ R.T

    errors = {}
    for name in parts:
        errors[name] = np.abs(value(calculator, after, name) - wanted[name]).max()
    return as_asked(errors, of)


def rotated(atoms: Atoms, R: np.ndarray) -> Atoms:
    """Positions and cell after the rotation (or any deformation) R [3, 3]."""
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ R.T)
    other.set_positions(atoms.positions @ R.T)
    return other


# ─── Symmetries ──────────────────────────────────────────────────────────────────────────────────


def rotation(calculator, atoms: Atoms, R: np.ndarray = GENERIC, of="forces"):
    """A rotated crystal has the same energy, rotated forces, rotated stress. Units as `of`."""
    return difference(calculator, atoms, rotated(atoms, np.asarray(R)), of, np.asarray(R))


def reflection(calculator, atoms: Atoms, R: np.ndarray = IMPROPER, of="forces"):
    """A mirror image has the same energy, mirrored forces and stress. Units as `of`."""
    return rotation(calculator, atoms, R, of)


def translation(calculator, atoms: Atoms, shift=(1.3, -17.1, 5.9), of="forces"):
    """Nothing depends on where the crystal is; shift in Å. Units as `of`."""
    other = atoms.copy()
    other.translate(shift)
    return difference(calculator, atoms, other, of)


def permutation(calculator, atoms: Atoms, seed: int = 0, of="forces"):
    """Nothing depends on the order of the atoms. Units as `of`."""
    order = np.random.default_rng(seed).permutation(len(atoms))
    return difference(calculator, atoms, atoms[order], of, order=order)


def other_cell(calculator, atoms: Atoms, seed: int = 0, of="forces"):
    """Nothing depends on which vectors describe a lattice: rows of the cell are added to each
    other, twice over, and turned round, and the cell becomes left-handed if it was not. Units as
    `of`."""
    periodic = np.flatnonzero(atoms.pbc)
    if len(periodic) == 0:
        raise NotApplicable("the crystal repeats nowhere")

    # Each vector that repeats gets, by chance, some of the others added or taken away
    rng = np.random.default_rng(seed)
    cell = atoms.cell.array.copy()
    for i in [*periodic, *periodic]:
        for j in periodic:
            if i != j and rng.random() < 0.7:
                cell[i] += rng.choice([-1, 1]) * cell[j]
    cell[periodic[0]] *= -1

    other = atoms.copy()
    other.set_cell(cell)
    return difference(calculator, atoms, other, of)


def open_axis(calculator, atoms: Atoms, of="forces"):
    """Along an axis that does not repeat, nothing depends on the cell. Where it does, atoms have
    neighbours on the other side, and the energy is another. The last axis that repeats is opened.
    Units as `of`, which has no stress.

    A calculator that takes no slabs is not asked.
    """
    if not atoms.pbc.any():
        raise NotApplicable("the crystal repeats nowhere")
    axis = np.flatnonzero(atoms.pbc)[-1]

    # A slab, and the same slab in a cell whose last vector is longer and leans
    slab = atoms.copy()
    slab.pbc[axis] = False
    other = slab.copy()
    cell = atoms.cell.array.copy()
    cell[axis] = 1.7 * cell[axis] + 0.3 * cell[axis - 1]
    other.set_cell(cell)
    try:
        errors = difference(calculator, slab, other, of)
        energy = value(calculator, slab, "energy") - value(calculator, atoms, "energy")
    except Exception as error:
        raise NotApplicable(f"it takes no slab: {error}".split("\n")[0][:90]) from error

    # Bonds across that axis count
    i, j, shift, r = neighbor_list("ijSd", atoms, 4.0)
    touch = 1.3 * (covalent_radii[atoms.numbers[i]] + covalent_radii[atoms.numbers[j]])  # Å
    if ((shift[:, axis] != 0) & (r < touch)).any() and not energy.any():
        raise Fault("a crystal that repeats along an axis has the energy of one that does not")
    return errors


def history(calculator, atoms: Atoms, of="forces"):
    """A crystal has the same results before and after others: one of the same atoms, denser and
    rattled, and one of half of them. Self-consistent fields leave a little. Units as `of`."""
    forget = getattr(calculator, "forget", lambda: None)
    parts = parts_of(of)
    forget()
    before = {name: value(calculator, atoms, name) for name in parts}

    denser = rotated(atoms, 0.97 * np.eye(3))
    denser.positions += np.random.default_rng(0).normal(0, 0.03, (len(atoms), 3))
    worst = dict.fromkeys(parts, 0.0)
    for other in (denser, atoms[:(len(atoms) + 1) // 2]):
        try:
            value(calculator, other, "forces")
        except Exception:  # half a crystal is no crystal to some
            if other is denser:
                raise
        forget()
        for name in parts:
            error = np.abs(value(calculator, atoms, name) - before[name]).max()
            worst[name] = np.maximum(worst[name], error)  # nan stays nan
    forget()
    return as_asked(worst, of)


def supercell(calculator, atoms: Atoms, times=(1, 2, 2), of="forces"):
    """A supercell has the energy of its copies, their forces, the same stress. Units as `of`."""
    times = np.where(atoms.pbc, times, 1)
    if times.prod() == 1:
        raise NotApplicable("the crystal repeats nowhere")
    order = np.tile(np.arange(len(atoms)), times.prod())
    return difference(calculator, atoms, atoms.repeat(times), of, order=order)


def folding(calculator, atoms: Atoms, seed: int = 0, of="forces"):
    """Nothing depends on whether atoms lie inside the cell or lattice vectors away. As `of`."""
    if not atoms.pbc.any():
        raise NotApplicable("the crystal repeats nowhere")
    rng = np.random.default_rng(seed)
    other = atoms.copy()
    other.positions += (rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array
    return difference(calculator, atoms, other, of)


def alone_or_in_a_batch(calculator, atoms: Atoms, of="forces"):
    """For a FacetCalculator: a crystal has the same results alone and between others. As `of`."""
    model = facet_of(calculator)
    if model is None:
        raise NotApplicable("this calculator takes one crystal at a time")

    # Others of more neighbours and of fewer, so that there is padding
    dense = rotated(atoms, 0.85 * GENERIC)
    single = atoms[:1]
    crystals = [facet.find_neighbours(a, model.config) for a in (dense, atoms, single, atoms)]
    together = facet.evaluate(model, crystals, batch_atoms=10 ** 6)

    worst = dict.fromkeys(parts_of(of), 0.0)
    for crystal, result in zip(crystals, together, strict=True):
        alone, = facet.evaluate(model, [crystal])
        for name in worst:
            error = np.abs(np.asarray(result[name]) - alone[name]).max()
            size = len(crystal.species) if name == "energy" else 1
            worst[name] = np.maximum(worst[name], error / size)  # nan stays nan
    return as_asked(worst, of)


# ─── Slopes and smoothness ───────────────────────────────────────────────────────────────────────


def direction(shape, seed: int) -> np.ndarray:
    """A random direction of unit length in which no component is small."""
    rng = np.random.default_rng(seed)
    found = rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape)
    return found / np.linalg.norm(found)


def force_slope(calculator, atoms: Atoms, seed: int = 0, step: float = 2e-5) -> float:
    """Forces are minus the slope of the energy: along a random direction of all atoms, of unit
    length, by central differences with `step` Å. eV/Å."""
    push = direction((len(atoms), 3), seed)
    forces = value(calculator, atoms, "forces")  # [N, 3]

    energy = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions += sign * step * push
        energy.append(len(atoms) * value(calculator, moved, "energy")[0])
    slope = (energy[0] - energy[1]) / (2 * step)
    return float(abs(slope + (forces * push).sum()))


def stress_slope(calculator, atoms: Atoms, seed: int = 0, step: float = 2e-5) -> float:
    """Stress is the slope of the energy over the volume: along a random symmetric strain of unit
    size, by central differences. eV/Å³."""
    strain = direction((3, 3), seed)
    strain = np.triu(strain) + np.triu(strain, 1).T
    strain /= np.linalg.norm(strain)
    stress = value(calculator, atoms, "stress")  # [3, 3]

    energy = []
    for sign in (1, -1):
        strained = rotated(atoms, np.eye(3) + sign * step * strain)
        energy.append(len(atoms) * value(calculator, strained, "energy")[0])
    slope = (energy[0] - energy[1]) / (2 * step) / abs(atoms.cell.volume)
    return float(abs(slope - (stress * strain).sum()))


def radius(symbol: str) -> float:
    """Half the distance of two atoms that touch, Å: covalent, or of noble gases van der Waals."""
    number = atomic_numbers[symbol]
    return float(vdw_radii[number] if symbol in NOBLE else covalent_radii[number])


def alone_in_space(atoms: Atoms, symbols, places) -> Atoms:
    """Atoms far from their images where `atoms` repeat, and without a cell where they do not."""
    if not atoms.pbc.any():
        return Atoms(symbols, places)
    return Atoms(symbols, np.array(places) + 20, cell=[70, 71, 72], pbc=True)


def leaving(atoms: Atoms):
    """A function distance (Å) → Atoms: the first atom of a crystal, its three nearest neighbours,
    and one more atom at that distance from it, on the side where nobody stands."""
    i, j, vectors = neighbor_list("ijD", atoms, 6.0)
    near = np.flatnonzero(i == 0)
    near = near[np.argsort(np.linalg.norm(vectors[near], axis=1))][:3]
    symbols = [atoms.symbols[n] for n in (0, *j[near], -1)]

    # Of many directions the one that keeps away from all three; they may lie opposite each other
    directions = np.random.default_rng(0).normal(size=(500, 3))  # [500, 3]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    units_of = vectors[near] / np.linalg.norm(vectors[near], axis=1, keepdims=True)  # [3, 3]
    away = directions[(directions @ units_of.T).max(1, initial=-1).argmin()]

    def cluster(distance: float) -> Atoms:
        return alone_in_space(atoms, symbols, [np.zeros(3), *vectors[near], distance * away])

    return cluster


def cutoff_continuity(calculator, atoms: Atoms, of="energy", noise: float = 1e-9,
                      small: float = 1e-4):
    """Energy (eV) and forces (eV/Å) do not jump where a leaving atom is lost from sight.

    That place is searched by halving, from atoms that touch on: beyond it the energy is what it is
    30 Å away, to `noise` eV per atom. Just inside, energy and forces should be those far away, too.
    An error above `small` is looked at with less noise: a step stays, what is left of a steep onset
    shrinks. Where it does, the error is what remains in the limit (Aitken's, of three values).
    """
    cluster = leaving(atoms)
    far = value(calculator, cluster(30.0), "energy")

    def change(distance: float) -> float:
        return abs(value(calculator, cluster(distance), "energy") - far)[0]

    symbols = cluster(30.0).symbols
    inside = radius(symbols[0]) + radius(symbols[-1])  # Å
    if change(27.0) > noise:
        raise NotApplicable("atoms see each other beyond 27 Å")
    if change(inside) <= noise:
        raise NothingToSee(f"atoms {inside:.2f} Å apart do not see each other")

    errors = []
    for smaller in (1, 10, 100):
        outside = 27.0
        if change(outside) > noise / smaller:
            break

        # Halve the distance between the two until they meet; nan is inside, and then is the error
        while outside - inside > 1e-8:
            middle = (inside + outside) / 2
            if change(middle) <= noise / smaller:
                outside = middle
            else:
                inside = middle
        errors.append(np.array(difference(calculator, cluster(inside), cluster(30.0), of)))
        if not np.max(errors[-1]) > small:  # or nan
            break

    # Does it shrink at all?
    remains = errors[-1]
    if len(errors) == 3:
        first, second, third = errors
        with np.errstate(invalid="ignore", divide="ignore"):
            limit = third - (third - second) ** 2 / (third - 2 * second + first)
        onset = third < first / 2
        remains = np.where(onset, np.clip(np.nan_to_num(limit), 0, third), third)
    return remains if remains.ndim else float(remains)


def far_sight(calculator, atoms: Atoms) -> float:
    """By how much the energy changes when an atom goes on from 27 to 30 Å, eV per atom: dispersion
    and charges reach that far. 0 of a calculator that has no energy of such a cluster."""
    cluster = leaving(atoms)
    try:
        return float(difference(calculator, cluster(27.0), cluster(30.0), "energy"))
    except Exception:  # rows that are about clusters will say so
        return 0.0


def isolated_atom(calculator, atoms: Atoms, expected: dict | None = None, of="energy"):
    """An atom of each element, alone in a large cell, or without one if the atoms have none, has
    the energy `expected` ({symbol: eV}; of a Facet: E0; else the same in two cells or places), no
    forces, no stress. Units as `of`."""
    # What a Facet should say is known
    model = facet_of(calculator)
    if model and expected is None:
        E0 = model.config.reference_energies or [0.0] * len(model.config.species)
        expected = dict(zip(model.config.species, E0, strict=True))

    worst = dict.fromkeys(parts_of(of), 0.0)
    for symbol in sorted(set(atoms.symbols)):
        alone = Atoms(symbol, [[1, 2, 3]])
        other = Atoms(symbol, [[4, -1, 2]])
        if atoms.pbc.any():
            alone = Atoms(symbol, [[1, 2, 3]], cell=[21, 22, 23], pbc=True)
            other = Atoms(symbol, [[1, 2, 3]], cell=[31, 27, 29], pbc=True)
        for name in worst:
            wanted = 0.0
            if name == "energy":
                wanted = expected[symbol] if expected else value(calculator, other, "energy")
            error = np.abs(value(calculator, alone, name) - wanted).max()
            worst[name] = np.maximum(worst[name], error)  # nan stays nan
    return as_asked(worst, of)


def cluster_of(symbol: str) -> np.ndarray:
    """Places of some atoms of one element: eight of a metal, else two. [N, 3] Å"""
    if symbol not in NO_METALS and symbol not in NOBLE:
        return random_crystal([symbol]).positions
    return 2.2 * radius(symbol) * np.array([[0, 0, 0], [0.6, 0, 0.8]])


def strangers(calculator, atoms: Atoms, of="energy"):
    """Atoms of one element and one of another, 30 Å away, know nothing of each other: the energy is
    that of both parts (eV), and forces stay what they are (eV/Å). For the first two elements of the
    crystal, both ways; a crystal of one gets a second that the calculator takes."""
    kinds = [*dict.fromkeys(atoms.symbols)][:2]
    far = [[30, 3, 2]]
    parts = parts_of(of)

    def what_it_says(symbols, places) -> dict:
        several = alone_in_space(atoms, symbols, places)
        return {name: value(calculator, several, name) for name in parts}

    # The first element alone, and then by a calculator that has not seen it first
    places = cluster_of(kinds[0])
    before = what_it_says([kinds[0]] * len(places), places)
    getattr(calculator, "renew", lambda: None)()
    others = [symbol for symbol in STRANGERS if symbol != kinds[0]]
    for symbol in (*others, kinds[0]):
        if len(kinds) == 2:
            break
        try:
            what_it_says([kinds[0]] * len(places) + [symbol], np.concatenate([places, far]))
            kinds.append(symbol)
        except Exception:  # it does not take this element
            continue

    worst = dict.fromkeys(parts, 0.0)
    for one, other in (kinds, kinds[::-1]):
        places = cluster_of(one)
        N = len(places)
        together = what_it_says([one] * N + [other], np.concatenate([places, far]))
        several = before if one == kinds[0] else what_it_says([one] * N, places)
        single = what_it_says([other], far)

        for name in parts:
            if name == "energy":
                error = abs((N + 1) * together[name] - N * several[name] - single[name]).max()
            else:
                wanted = np.concatenate([several[name], single[name]])
                error = np.abs(together[name] - wanted).max()
            worst[name] = np.maximum(worst[name], error)  # nan stays nan
    return as_asked(worst, of)


# ─── Dynamics ────────────────────────────────────────────────────────────────────────────────────


def dynamics(calculator, atoms: Atoms, kelvin: float, steps: int, femtoseconds: float,
             seed: int) -> np.ndarray:
    """Total and kinetic energy (eV) after each step of velocity Verlet, [steps+1, 2]; at the start
    the atoms have random speeds of that temperature."""
    # The crystal as a whole stays where it is
    atoms = atoms.copy()
    atoms.calc = calculator
    speeds = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    momenta = speeds * np.sqrt(units.kB * kelvin * atoms.get_masses())[:, None]
    if len(atoms) > 1:
        momenta -= momenta.mean(0)
    atoms.set_momenta(momenta)

    energies = []
    verlet = VelocityVerlet(atoms, femtoseconds * units.fs)
    verlet.attach(lambda: energies.append((atoms.get_total_energy(), atoms.get_kinetic_energy())))
    verlet.run(steps)
    return np.array(energies)


def conservation(calculator, atoms: Atoms, kelvin: float = 300, steps: int = 200,
                 femtoseconds: float = 1.0, seed: int = 0) -> dict:
    """A short molecular dynamics at constant energy (velocity Verlet), from `kelvin` on.

    Returns time_ps [steps+1], energy_meV_per_atom [steps+1], the total energy from its start, and
    drift_meV_per_atom_per_ps, the slope of a line through it. The temperature falls to about half
    if the crystal starts at rest.
    """
    energy = dynamics(calculator, atoms, kelvin, steps, femtoseconds, seed)[:, 0]
    time_ps = np.arange(len(energy)) * femtoseconds / 1000
    change = 1000 * (energy - energy[0]) / len(atoms)
    drift = np.polyfit(time_ps, change, 1)[0]
    return {
        "time_ps": time_ps,
        "energy_meV_per_atom": change,
        "drift_meV_per_atom_per_ps": float(drift),
    }


def time_step(calculator, atoms: Atoms, move: float = 0.004) -> float:
    """Femtoseconds, at most 0.5, in which the largest force moves an atom of the lightest mass by
    about `move` Å from rest."""
    force = np.abs(value(calculator, atoms, "forces")).max()
    if not force > 0:
        return 0.5
    acceleration = force / atoms.get_masses().min()  # eV/Å/u
    return min(0.5, float(np.sqrt(2 * move / acceleration) / units.fs))


def conservation_error(calculator, atoms: Atoms, kelvin: float = 300, steps: int = 200,
                       femtoseconds: float = 1.0, seed: int = 0) -> float:
    """Spread of the total energy in a short molecular dynamics, over the largest kinetic energy on
    the way, but at least that of `kelvin`."""
    total, kinetic = dynamics(calculator, atoms, kelvin, steps, femtoseconds, seed).T
    return float(np.ptp(total) / max(kinetic.max(), 1.5 * units.kB * kelvin * len(atoms)))


# ─── Harmonics that turn, and crystals to try ────────────────────────────────────────────────────


def wigner(R, L: int) -> torch.Tensor:
    """The matrix D [M, M] with Y(R u) = D Y(u) for every u: by least squares over directions, so
    there is no formula to get wrong."""
    directions = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 3)))  # [300, 3]
    directions /= directions.norm(dim=1, keepdim=True)
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

    # Neighbours 2.2 mean covalent radii apart, noble gases where they touch
    sizes = [radius(symbol) / (1.1 if symbol in NOBLE else 1) for symbol in symbols]
    crystal = ase.build.bulk("Cu", cubic=True, a=2.2 * np.mean(sizes) * 2 ** 0.5) * (1, 1, 2)
    crystal.symbols = rng.permutation(symbols)

    strain = np.eye(3) + rng.uniform(-0.06, 0.06, (3, 3))
    crystal.set_cell(crystal.cell.array @ strain, scale_atoms=True)
    crystal.positions += rng.normal(0, 0.08, (len(crystal), 3))
    return crystal
