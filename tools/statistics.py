"""What a model must know of its training set before the first step: E0, cores, scales, species.

train_small.py asks for it, and benchmarks do.
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

import facet
from tools.frames import BadInput, Frames, neighbours, print_to_stderr, sample
from tools.suspicions import robust_fit, robust_scale

if TYPE_CHECKING:
    from train_small import Settings

MPTRJ = [s for s in chemical_symbols[1:95] if s not in ("Po", "At", "Rn", "Fr", "Ra")]  # its 89


def elements(s: Settings, found: list[int]) -> tuple[dict[int, float], np.ndarray]:
    """What --E0 gives, {atomic number: eV}, and the elements of --species, else those found; [Z].

    Raises BadInput.
    """
    symbols = s.species.split(",") if s.species else [chemical_symbols[z] for z in found]
    if s.species == "all":
        symbols = MPTRJ
    try:
        pairs = [pair.split("=") for pair in s.E0.split(",") if pair]
        given = {atomic_numbers[symbol]: float(energy) for symbol, energy in pairs}
        numbers = np.array(sorted(atomic_numbers[symbol] for symbol in symbols))  # [Z]
    except (KeyError, ValueError):
        raise BadInput(f"--E0 {s.E0} --species {s.species}: must look like --E0 Si=-0.79,O=-1.56 "
                       "--species Si,O") from None

    for flag, value, doubled in (("E0", s.E0, len(given) < len(pairs)),
                                 ("species", s.species, len(set(symbols)) < len(symbols))):
        if doubled:
            raise BadInput(f"--{flag} {value}: names an element twice")
    if not np.isfinite(list(given.values())).all():
        raise BadInput(f"--E0 {s.E0}: energies must be finite numbers")
    beside = [chemical_symbols[z] for z in given if z not in numbers]
    if beside:
        print_to_stderr(f"note: --E0 names {', '.join(beside)}, which the model does not know")
    return given, numbers


def statistics(frames: Frames, s: Settings) -> tuple[facet.Config, dict[tuple[int, int], float]]:
    """Config with what a new model must know of the training set, and its shortest distances.

    Raises BadInput.
    """
    found = frames.elements()  # atomic numbers
    given, numbers = elements(s, found)
    some = list(sample(frames))
    forces = [atoms.calc.results["forces"] for atoms in some if "forces" in atoms.calc.results]
    scale = robust_scale(forces or [np.zeros((1, 3))])  # eV/Å
    config = s.config(tuple(chemical_symbols[z] for z in numbers))
    config = replace(config, energy_scale=scale or 1.0)
    check_species(frames, config)
    unseen = [symbol for z, symbol in zip(numbers, config.species) if z not in found]
    if unseen and s.species != "all":
        print_to_stderr(f"note: no frame holds {', '.join(unseen)}: nothing is learned of them")

    # Neighbours: how many there are, and how close they come
    graphs = [neighbours(atoms, config) for atoms in some]
    edges = sum(len(graph.dst) for graph in graphs)
    if edges == 0:
        raise BadInput(f"no atom of the training set has a neighbour within {s.cutoff} Å: are "
                       "positions in Å? Or raise --cutoff")
    shortest = shortest_distances(graphs)
    E0 = reference_energies(frames, numbers, given, s.cutoff)
    return replace(
        config,
        mean_neighbours=max(1.0, edges / sum(len(atoms) for atoms in some)),
        first_knot=0.7 * min(*shortest.values(), s.cutoff / 2),
        reference_energies=tuple(E0.tolist()),
        core=tuple(core_radii(shortest, numbers, s.cutoff).tolist())), shortest


def statistics_of(base: facet.Facet, frames: Frames, s: Settings):
    """As `statistics`, for a model that begins as `base`: its Config but for E0.

    E0 is given, or that of a free atom, or fitted to what the model leaves of the energies. The
    fit is of the change of E0, and the smallest one: elements that the frames do not hold keep
    theirs. Raises BadInput for an element that the model does not know.
    """
    config = base.config
    own = [atomic_numbers[symbol] for symbol in config.species]
    given, numbers = elements(s, own)
    if set(numbers) != set(own):
        raise BadInput(f"--species {s.species}: the model {s.init} knows "
                       f"{','.join(config.species)}; leave --species out")
    check_species(frames, config, s.init)

    some = sample(frames)
    graphs = [neighbours(atoms, config) for atoms in some]
    before = np.array(config.reference_energies or np.zeros(len(own)))  # [Z]
    total = np.array([result["energy"] for result in facet.evaluate(base, graphs)])  # [F]
    learned = total - some.compositions(own) @ before  # [F]
    given = {**free_energies(frames, config.cutoff), **given}
    E0 = reference_energies(some, np.array(own), given, config.cutoff, learned, before)
    return replace(config, reference_energies=tuple(E0.tolist())), shortest_distances(graphs)


def check_species(frames: Frames, config: facet.Config, init: str = "") -> None:
    """Raise BadInput if a frame holds an element that the model, begun from init, does not know."""
    numbers = np.array([atomic_numbers[symbol] for symbol in config.species])  # [Z]
    unknown = frames.atom_counts() - frames.compositions(numbers).sum(1)  # [F] atoms
    if unknown.any():
        atoms = frames[int(unknown.argmax())]
        names = sorted(set(atoms.symbols) - set(config.species))
        raise BadInput(f"{atoms.info['source']}: holds {', '.join(names)}, which "
                       f"{init or 'the training set, or --species,'} does not: "
                       f"{' '.join(config.species)}")


def free_energies(frames: Frames, cutoff: float) -> dict[int, float]:
    """{atomic number: eV} of frames that are one atom without a neighbour, the first of each."""
    energy = frames.energies()  # [F] nan where there is none
    found = {}
    for i in np.flatnonzero(frames.atom_counts() == 1):
        atom = frames[int(i)]
        try:
            dst, *_ = facet.neighbour_list(atom.positions, atom.cell.array, atom.pbc, cutoff)
        except ValueError as error:
            raise BadInput(f"{atom.info['source']}: {error}") from None
        if len(dst) == 0 and np.isfinite(energy[i]):
            found.setdefault(int(atom.numbers[0]), float(energy[i]))
    return found


def reference_energies(frames: Frames, numbers: np.ndarray, given: dict, cutoff: float,
                       learned: np.ndarray | float = 0.0, before: np.ndarray | None = None):
    """E0 per species, [Z] eV: the energy that composition alone explains, by robust least squares.

    numbers [Z]; given: {atomic number: eV}, which stay. Where the data hold a free atom (one atom
    that has no neighbour), its energy is E0: nothing else is the limit of large distances.
    learned [F] eV: what a model explains besides; before [Z]: E0 that is changed as little as
    possible, else zero.
    """
    counts = frames.compositions(numbers)  # [F, Z]
    atoms = frames.atom_counts()  # [F]
    energy = frames.energies() - learned  # [F] nan where there is none
    given = {**free_energies(frames, cutoff), **given}
    before = np.zeros(len(numbers)) if before is None else before  # [Z]

    E0 = np.array([given.get(int(z), old) for z, old in zip(numbers, before)])  # [Z]
    fitted = ~np.isin(numbers, list(given))  # [Z]
    if not fitted.any():
        return E0

    # Per atom: every frame counts the same, whatever its size
    known = np.isfinite(energy)
    share = counts[known] / atoms[known, None]  # [F, Z]
    target = energy[known] / atoms[known] - share @ E0  # [F]
    change, _, rank = robust_fit(share[:, fitted], target)
    E0[fitted] += change

    present = int((counts.sum(0)[fitted] > 0).sum())
    if rank < present:
        print(f"note: these compositions determine only {rank} of {present} reference energies; "
              "the smallest are taken")
    return E0


def core_radii(shortest: dict, numbers: np.ndarray, cutoff: float) -> np.ndarray:
    """[Z] Å: the core of two atoms ends below their shortest distance in the data.

    shortest: {(i, j): Å} for pairs of species. The repulsion is zero wherever there are data.
    """
    covalent = covalent_radii[numbers]  # [Z]
    # With 0.75 times, two silicon atoms attract each other a little at the edge of their core
    radii = np.minimum(0.85 * covalent, cutoff / 2)  # [Z]
    for (i, j), distance in shortest.items():
        for z in (i, j):
            share = covalent[z] / (covalent[i] + covalent[j])
            radii[z] = min(radii[z], 0.97 * distance * share)
    return radii


def shortest_distances(graphs: list[facet.Neighbours]) -> dict[tuple[int, int], float]:
    """The shortest distance, Å, of each pair of species that are neighbours anywhere."""
    shortest: dict[tuple[int, int], float] = {}
    for graph in graphs:
        r = np.linalg.norm(graph.vectors, axis=1)  # [E]
        pair = np.stack([graph.species[graph.dst], graph.species[graph.src]], 1)  # [E, 2]
        pair = np.sort(pair, 1)  # [E, 2]
        for i, j in np.unique(pair, axis=0).tolist():
            distance = float(r[(pair == (i, j)).all(1)].min())
            shortest[i, j] = min(distance, shortest.get((i, j), np.inf))
    return shortest
