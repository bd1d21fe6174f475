"""Any file to checked ase.Atoms: the one place where layouts, label names, units and checks live.

    python -m tools.frames si_train.extxyz              # what a data set holds, what looks wrong
    python -m tools.frames train.xyz --energy REF_energy --forces REF_forces --stress REF_virial

    from tools import frames
    train = frames.read(["runs/emt.extxyz"])            # files, globs, databases of tools.database
    rest, held = frames.split(train, seed=0)            # whole materials on one side or the other

Every frame is an ase.Atoms with its labels in atoms.calc.results: "energy" (eV), "forces" (eV/Å)
and, if there is one, "stress" (six numbers in ASE's order and sign, eV/Å³). atoms.info says where
it comes from ("source"), of which material it is ("material") and to which group of its data set
it belongs ("group", from config_type or group in the file). A frame may lack energy or forces.

What ASE reads is read (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz). Besides, JSON as MPtrj,
MatPES and mlearn have it (see Layout): tools.database turns that into a database.
"""
from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import shlex
import sqlite3
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ase.db
import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, chemical_symbols
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

from tools import emt, suspicions

# VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³
KBAR = -0.1 * units.GPa

# a lone atom whose images are all farther away than this is a free atom, Å
FREE = 10.0

# info of a frame that names its material, if a file has it
MATERIAL_KEYS = ("mptrj_traj_id", "material_id", "material")

# columns that ask for weights: there are none here, every frame counts the same
WEIGHTS = ("config_weight", "config_energy_weight", "config_forces_weight", "config_stress_weight",
           "config_virials_weight", "energy_weight", "force_weight", "forces_weight",
           "stress_weight", "virial_weight", "virials_weight", "weight")

# numbers that differ by less are equal: files keep about eight digits
EQUAL = 2e-6

NONE = ("0",)  # of --valid and --test: no such set


class BadInput(ValueError):
    """Input that cannot be used: one sentence with the file, the frame and the cure."""


class Names(NamedTuple):
    """Names of the labels in the files, compared without regard to case; "": the usual ones.

    A stress with "virial" in its name (but not "stress") is a virial in eV.
    """
    energy: str = ""
    forces: str = ""
    stress: str = ""

    def virial(self) -> bool:
        """Whether the name of the stress is that of a virial."""
        name = self.stress.lower()
        return "virial" in name and "stress" not in name


USUAL = Names()
LABELS = ("energy", "forces", "stress")


def print_to_stderr(text: str) -> None:
    """Say it where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


def keep_quiet(text: str) -> None:
    """Say nothing."""


# ─── One frame ───────────────────────────────────────────────────────────────────────────────────

def labelled(atoms: Atoms, energy: float | None, forces: np.ndarray | None,
             stress: np.ndarray | None = None, source: str = "here", material: str = "",
             group: str = "") -> Atoms:
    """A frame: the geometry of `atoms`, and nothing else of it, with labels.

    energy eV, forces [N, 3] eV/Å, stress [6] eV/Å³ in ASE's order; None where there is none.
    Constraints are dropped: they would set forces to zero. Without a material, the frame is one of
    its own.
    """
    frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    results = {}
    if energy is not None:
        results["energy"] = float(energy)
    if forces is not None:
        results["forces"] = np.array(forces, float)
    if stress is not None:
        results["stress"] = np.array(stress, float)
    frame.calc = SinglePointCalculator(frame, **results)
    frame.info = {"source": source, "material": material or source, "group": group}
    return frame


def check(atoms: Atoms) -> Atoms:
    """The frame, if it can be trained on. Raises BadInput."""
    source = atoms.info["source"]
    results = atoms.calc.results
    if len(atoms) == 0:
        raise BadInput(f"{source}: has no atoms; remove the frame")

    forces = results.get("forces", np.zeros((len(atoms), 3)))
    if forces.shape != (len(atoms), 3):
        raise BadInput(f"{source}: {len(atoms)} atoms, but forces of shape {forces.shape}; three "
                       f"numbers for each atom are needed")

    # everything is a finite number
    for what, value in (("an energy", results.get("energy", 0.0)), ("a force", forces),
                        ("a position", atoms.positions), ("a cell vector", atoms.cell.array),
                        ("a component of the stress", results.get("stress", 0.0))):
        if not np.isfinite(value).all():
            raise BadInput(f"{source}: {what} is NaN or infinite; remove the frame or compute it "
                           f"again")

    periodic = atoms.cell.array[atoms.pbc]
    if np.linalg.matrix_rank(periodic) < len(periodic):
        raise BadInput(f"{source}: periodic, but its cell has no volume; remove the frame, or "
                       f"set its pbc to F F F")
    return atoms


def is_free(atoms: Atoms) -> bool:
    """Whether this is one atom without neighbours: no periodic image of it is near."""
    if len(atoms) != 1 or (atoms.cell.lengths()[atoms.pbc] < FREE).any():
        return False
    return len(neighbor_list("i", atoms, FREE)) == 0


def look_up(labels: dict, name: str):
    """The label of that name, or of that name in other capitals; None if there is none."""
    if labels.get(name) is not None:
        return labels[name]
    for other, value in labels.items():
        if isinstance(other, str) and other.lower() == name.lower() and value is not None:
            return value
    return None


def numbers_in(value, what: str, source: str) -> np.ndarray:
    """The label as an array. Raises BadInput if it holds anything but numbers."""
    try:
        return np.array(value, float)
    except (TypeError, ValueError):
        raise BadInput(f"{source}: {what} is not made of numbers, but "
                       f"{str(value)[:40]!r}") from None


def one_number(value, what: str, source: str) -> float:
    """The label as a float. Raises BadInput if it is not one number."""
    found = numbers_in(value, what, source)
    if found.size != 1:
        raise BadInput(f"{source}: {what} has {found.size} numbers, one is needed")
    return float(found.reshape(()))


def six_numbers(value, order: str, source: str) -> np.ndarray | None:
    """A stress of nine or six numbers as [6] in ASE's order, xx yy zz yz xz xy.

    order: that of six numbers in the file; "" if nobody knows. None for a stress that is all NaN.
    Raises BadInput for any other count, and for six numbers in an unknown order.
    """
    found = numbers_in(value, "the stress", source)
    if np.isnan(found).all():
        return None
    if found.size == 9:
        return full_3x3_to_voigt_6_stress(found.reshape(3, 3))
    if found.size != 6:
        raise BadInput(f"{source}: the stress has {found.size} numbers; nine are needed, or six")
    if not order:
        raise BadInput(f"{source}: six numbers of stress in an order that the file does not tell "
                       f"(VASP's xx yy zz xy yz xz or ASE's xx yy zz yz xz xy?); give all nine, "
                       f"or mark MatPES' layout by matpes_id, mlearn's by the name virial_stress")
    components = order.split()
    found = found.ravel()
    return np.array([found[components.index(pair)] for pair in ASE_ORDER.split()])


def word(name) -> str:
    """The name as text that does not look like a number: ASE's databases refuse that as a text."""
    text = str(name)
    if text in ("True", "False"):
        return "#" + text
    try:
        float(text)
    except ValueError:
        return text
    return "#" + text


def group_of(info: dict) -> str:
    """What the file calls the group of the frame."""
    for key in ("config_type", "group"):
        found = look_up(info, key)
        if found is not None:
            return word(found)
    return ""


# ─── What ASE reads ──────────────────────────────────────────────────────────────────────────────

ASE_ORDER = "xx yy zz yz xz xy"
VASP_ORDER = "xx yy zz xy yz xz"


def images(path: str) -> Iterator[Atoms]:
    """Everything in a file, as ASE reads it; an @ in the name is no index."""
    if not path.lower().endswith(".db"):
        yield from ase.io.iread(path, index=":", do_not_split_by_at_sign=True)
        return

    # a database that tools.database did not make: labels may be among its key-value pairs or data
    with ase.db.connect(path, type="db", use_lock_file=False, serial=True) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            atoms.info.update(row.data)
            yield atoms


class Runs:
    """Numbers for runs of frames: what is of one run is of one material.

    Consecutive frames of one formula are a run. A frame that goes on where an earlier run of its
    formula ended (suspicions.alike: same cell, atoms near) belongs to that: trajectories may be
    written alternately. Only the last hundred runs are remembered.
    """

    def __init__(self):
        self.count = 0
        self.recent = deque(maxlen=100)  # formula, number and last frame of each run, latest last

    def number(self, atoms: Atoms) -> int:
        """The number of the run that the next frame of a file belongs to."""
        formula = str(atoms.symbols)
        found = None
        for run in reversed(self.recent):
            if run[0] == formula and (run is self.recent[-1] or suspicions.alike(run[2], atoms)):
                found = run
                break

        if found is None:
            self.count += 1
            number = self.count
        else:
            number = found[1]
            self.recent.remove(found)
        self.recent.append((formula, number, atoms))
        return number


def has_a_label(energy, forces, names: Names, labels: Iterable[str], source: str) -> None:
    """Raise BadInput if there is neither energy nor forces."""
    if energy is None and forces is None:
        raise BadInput(f"{source}: has no {names.energy or 'energy'} and no "
                       f"{names.forces or 'forces'}; it has {', '.join(map(str, labels))}. Tell "
                       f"names by --energy and --forces, or remove the frame")


def labels_of(atoms: Atoms) -> dict:
    """Everything that a frame has beside its geometry, by name."""
    labels = {**atoms.info, **atoms.arrays}
    for name in ("numbers", "positions"):
        del labels[name]
    if atoms.calc is not None:
        labels.update(atoms.calc.results)
    return labels


def frames_of_ase(path: str, names: Names, ignored: set[str]) -> Iterator[Atoms]:
    """Frames of any file that ASE reads. Raises BadInput for a frame without labels.

    A frame's material is what its info names, else its run (see Runs). One atom alone needs no
    forces: they are zero. A frame without a volume has no stress.
    """
    runs = Runs()
    for i, atoms in enumerate(images(path)):
        source = f"{path}, frame {i}"
        labels = labels_of(atoms)
        ignored.update(name for name in labels if str(name).lower() in WEIGHTS)

        energy = look_up(labels, names.energy or "energy")
        forces = look_up(labels, names.forces or "forces")
        stress = look_up(labels, names.stress or "stress")
        has_a_label(energy, forces, names, labels, source)
        if energy is not None:
            energy = one_number(energy, "the energy", source)
        if forces is None and len(atoms) == 1:
            forces = np.zeros((1, 3))
        if forces is not None:
            forces = numbers_in(forces, "forces", source)

        # a virial (eV) is minus the volume times the stress
        if stress is not None and names.virial() and atoms.cell.rank < 3:
            stress = None
        if stress is not None:
            stress = six_numbers(stress, ASE_ORDER, source)
        if stress is not None and names.virial():
            stress = -stress / atoms.get_volume()

        # the material: its name, or its run
        material = f"{path}: {atoms.symbols}, run {runs.number(atoms)}"
        for key in MATERIAL_KEYS:
            if key in atoms.info:
                material = word(atoms.info[key])
                break

        yield labelled(atoms, energy, forces, stress, source, material, group_of(atoms.info))


# ─── JSON ────────────────────────────────────────────────────────────────────────────────────────

class Layout(NamedTuple):
    """What a JSON file calls its labels, the first that is there counts, and the order of a stress
    of six numbers. Stresses are in kbar with VASP's sign in every layout."""
    energy: tuple[str, ...]
    forces: tuple[str, ...]
    stress: tuple[str, ...]
    order: str


# {material: {frame: {structure, corrected_total_energy, force, stress 3 × 3}}}
MPTRJ = Layout(("corrected_total_energy", "energy"), ("force", "forces"), ("stress",), "")

# [{structure, energy, forces, stress of six, matpes_id}]
MATPES = Layout(("energy",), ("forces",), ("stress",), ASE_ORDER)

# [{structure, group, description, outputs: {energy, forces, virial_stress of six}}]
MLEARN = Layout(("energy",), ("forces",), ("virial_stress",), VASP_ORDER)

# a list of structures with labels; only a stress of nine numbers says what it means
LIST = Layout(("energy",), ("forces",), ("stress",), "")

# hydrogen under names that ASE does not know: an isotope has the same forces
ISOTOPES = {"D": "H", "T": "H"}


def layout_of(keys: list[str], labels: dict) -> Layout:
    """The layout, from what sets it apart."""
    if keys:
        return MPTRJ
    if "matpes_id" in labels:
        return MATPES
    if "virial_stress" in labels:
        return MLEARN
    return LIST


class Text:
    """JSON text of a file of any size: a buffer that is filled as it is read."""

    def __init__(self, file, size: int):
        self.file = file
        self.size = size
        self.text = ""
        self.at = 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, comma or colon. Raises EOFError."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n,:":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            self.text = self.file.read(self.size)
            self.at = 0
            if not self.text:
                raise EOFError("the file ends too early")

    def skip(self) -> None:
        """Go on behind the next character."""
        self.peek()
        self.at += 1

    def value(self):
        """The next value, whole. One that the buffer cuts off is tried again with twice the text.

        Raises json.JSONDecodeError.
        """
        self.peek()
        more = self.size
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # a mistake far from the end of the buffer is no cut
                far = len(self.text) - error.pos > 2 ** 20
                new = "" if far else self.file.read(more)
                if not new:
                    raise
                self.text = self.text[self.at:] + new
                self.at = 0
                more *= 2


def stream(file, size: int = 2 ** 22) -> Iterator[tuple[list[str], dict]]:
    """The objects of [{…}, …], or of {key: {key: {…}, …}, …} with their two keys, one by one.

    Never is the whole text in memory. Raises EOFError, ValueError.
    """
    text = Text(file, size)
    if text.peek() == "[":
        text.skip()
        while text.peek() != "]":
            yield [], text.value()
        return

    if text.peek() != "{":
        raise ValueError(f"begins with {text.peek()!r}, not with a list or an object")
    text.skip()
    while text.peek() != "}":
        material = text.value()
        if text.peek() != "{":
            raise ValueError(f"{material} holds no frames; MPtrj has "
                             f"{{material: {{frame: {{…}}}}}}")
        text.skip()
        while text.peek() != "}":
            frame = text.value()
            if text.peek() != "{":
                raise ValueError(f"{material}, {frame} is no structure; MPtrj has "
                                 f"{{material: {{frame: {{…}}}}}}")
            yield [material, frame], text.value()
        text.skip()


def crystal(structure: dict, source: str) -> Atoms:
    """A pymatgen Structure or Molecule, as JSON, as Atoms. Raises BadInput for a disordered one."""
    numbers = []
    for site in structure["sites"]:
        if len(site["species"]) != 1:
            raise BadInput(f"{source}: a site is shared by several elements; only ordered crystals "
                           f"can be trained on")
        species = site["species"][0]
        occupancy = species.get("occu", 1)
        if abs(occupancy - 1) > 1e-6:
            raise BadInput(f"{source}: a site is occupied to {occupancy:g}; only ordered crystals "
                           f"can be trained on")
        symbol = ISOTOPES.get(species["element"], species["element"])
        if symbol not in atomic_numbers:
            raise BadInput(f"{source}: {symbol!r} is no element")
        numbers.append(atomic_numbers[symbol])

    # a molecule has no lattice
    lattice = structure.get("lattice")
    if not lattice:
        return Atoms(numbers, [site["xyz"] for site in structure["sites"]])

    pbc = lattice.get("pbc") or [True, True, True]
    if all("xyz" in site for site in structure["sites"]):
        positions = [site["xyz"] for site in structure["sites"]]
        return Atoms(numbers, positions, cell=lattice["matrix"], pbc=pbc)
    positions = [site["abc"] for site in structure["sites"]]
    return Atoms(numbers, scaled_positions=positions, cell=lattice["matrix"], pbc=pbc)


def material_of(keys: list[str], frame: dict, source: str) -> str:
    """MPtrj's key, a name in the frame, or mlearn's group and description; else the frame's own."""
    if keys:
        return word(keys[0])
    for key in MATERIAL_KEYS:
        if frame.get(key) is not None:
            return word(frame[key])
    original = (frame.get("provenance") or {}).get("original_mp_id")
    if original is not None:
        return word(original)
    if "description" in frame:
        return word(f"{frame.get('group', '')}{frame['description']}")
    return source


def frame_of_json(keys: list[str], frame: dict, names: Names, source: str,
                  ignored: set[str]) -> Atoms:
    """One frame of a JSON file. Raises BadInput, and KeyError or the like for what is no frame."""
    if not isinstance(frame, dict):
        raise BadInput(f"{source}: is no structure with labels, but {str(frame)[:40]!r}")
    labels = {**frame, **(frame.get("outputs") or {})}
    ignored.update(name for name in labels if name.lower() in WEIGHTS)
    layout = layout_of(keys, labels)

    # each label under the name that was given, or under the first usual one that is there
    found = {}
    for what, given, usual in (("energy", names.energy, layout.energy),
                               ("forces", names.forces, layout.forces),
                               ("stress", names.stress, layout.stress)):
        found[what] = None
        for name in ([given] if given else usual):
            if found[what] is None:
                found[what] = look_up(labels, name)

    if frame.get("structure") is None:
        raise BadInput(f"{source}: has no structure; it has {', '.join(labels)}")
    atoms = crystal(frame["structure"], source)
    energy = found["energy"]
    forces = found["forces"]
    has_a_label(energy, forces, names, labels, source)
    if energy is not None:
        energy = one_number(energy, "the energy", source)
    if forces is None and len(atoms) == 1:
        forces = np.zeros((1, 3))
    if forces is not None:
        forces = numbers_in(forces, "forces", source)

    # the layout tells the order of its own stress, not that of another name
    stress = None
    order = layout.order if not names.stress or names.stress in layout.stress else ""
    if found["stress"] is not None and not (names.virial() and atoms.cell.rank < 3):
        stress = six_numbers(found["stress"], order, source)
    if stress is not None:
        stress = stress * (-1 / atoms.get_volume() if names.virial() else KBAR)

    return labelled(atoms, energy, forces, stress, source, material_of(keys, frame, source),
                    group_of(frame))


def open_text(path: str):
    """A JSON file as text, perhaps compressed."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: a byte-order mark is skipped


def frames_of_json(path: str, names: Names, ignored: set[str]) -> Iterator[Atoms]:
    """Frames of a JSON file, streamed. Raises BadInput for a frame that is not understood."""
    runs = Runs()
    with open_text(path) as file:
        for i, (keys, frame) in enumerate(stream(file)):
            source = f"{path}, frame {keys[1] if keys else i}"
            try:
                atoms = frame_of_json(keys, frame, names, source, ignored)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise BadInput(f"{source}: is no structure as pymatgen writes it "
                               f"({type(error).__name__}: {error})") from error
            if atoms.info["material"] == source:  # no name of it
                atoms.info["material"] = f"{path}: {atoms.symbols}, run {runs.number(atoms)}"
            yield atoms


# ─── Any file ────────────────────────────────────────────────────────────────────────────────────

def is_json(path: str) -> bool:
    """Whether the name is that of a JSON file, perhaps compressed."""
    return path.lower().removesuffix(".gz").endswith(".json")


def iread(path: str | Path, names: Names = USUAL,
          ignored: set[str] | None = None) -> Iterator[Atoms]:
    """The frames of one file, checked, one after another in little memory.

    ignored: gets the names of columns that ask for weights. Raises BadInput: for a file that cannot
    be read, that ends too early or holds nothing, for a frame without labels, and for all that
    `check` refuses.
    """
    path = str(path)
    ignored = set() if ignored is None else ignored
    count = 0
    try:
        if is_json(path):
            found = frames_of_json(path, names, ignored)
        elif made_here(path):
            found = gather_files([path], names, use_stress=True)
        else:
            found = frames_of_ase(path, names, ignored)
        for atoms in found:
            yield check(atoms)
            count += 1
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        cure = "is it complete and in a format that ASE knows?"
        if "OUTCAR" in path:
            cure = "try the vasprun.xml of the same calculation;"
        raise BadInput(f"{path}, frame {count}: cannot be read, {cure} ({reason})") from error
    if count == 0:
        raise BadInput(f"{path}: holds no structures")


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """The files that are meant, each once. A file of that very name goes before a glob; ** is any
    depth of folders. Raises BadInput where there is none."""
    paths = []
    for pattern in map(str, patterns):
        if Path(pattern).exists():
            paths.append(pattern)
            continue
        found = [path for path in sorted(glob.glob(pattern, recursive=True))
                 if not Path(path).is_dir()]
        if not found:
            raise BadInput(f"{pattern}: no such file")
        paths += found

    # the same file under two names is one file
    once = {}
    for path in paths:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


# ─── Many frames ─────────────────────────────────────────────────────────────────────────────────

class InMemory:
    """Frames as a list of Atoms."""

    def __init__(self, images: Iterable[Atoms]):
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def frame(self, row: int) -> Atoms:
        """A copy: what is done to it does not change the set."""
        atoms = self.images[row].copy()
        atoms.calc = self.images[row].calc
        return atoms

    def atom_counts(self) -> np.ndarray:
        return np.array([len(atoms) for atoms in self.images], int)

    def elements(self) -> np.ndarray:
        return np.unique(np.concatenate([atoms.numbers for atoms in self.images]))

    def compositions(self, numbers: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(self), len(numbers)), np.int16)
        for row, atoms in enumerate(self.images):
            counts[row] = (atoms.numbers[:, None] == numbers).sum(0)
        return counts

    def energies(self) -> np.ndarray:
        return np.array([atoms.calc.results.get("energy", np.nan) for atoms in self.images], float)

    def labels(self) -> np.ndarray:
        found = np.zeros((len(self), len(LABELS)), bool)
        for row, atoms in enumerate(self.images):
            found[row] = [name in atoms.calc.results for name in LABELS]
        return found

    def volumes(self) -> np.ndarray:
        return np.array([atoms.cell.volume for atoms in self.images], float)

    def materials(self) -> Iterator[str]:
        for atoms in self.images:
            yield atoms.info["material"]

    def checksums(self) -> np.ndarray:
        sums = np.zeros(len(self), np.uint32)
        for row, atoms in enumerate(self.images):
            results = atoms.calc.results
            parts = [atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc]
            for name in LABELS:
                if name in results:
                    parts.append(np.array(results[name]))
            for part in parts:
                sums[row] = zlib.crc32(np.ascontiguousarray(part).tobytes(), int(sums[row]))
        return sums


def made_here(path: str) -> bool:
    """Whether this is a database of tools.database: its frames are checked, their names settled."""
    if not path.lower().endswith(".db") or not Path(path).is_file():
        return False
    try:
        return "facet" in ase.db.connect(path, type="db", use_lock_file=False).metadata
    except sqlite3.DatabaseError:
        return False


class OnDisk:
    """Frames in a database of tools.database, read when they are asked for.

    Every process, and every thread, opens a connection of its own: nothing open is inherited by
    fork or sent along by pickle. Raises BadInput for a database that is not complete, or that was
    made with other names of labels.
    """

    def __init__(self, path: str, names: Names = USUAL, use_stress: bool = True):
        self.path = os.path.abspath(path)
        self.use_stress = use_stress
        self.owner = None
        self.database = None

        made = self.connection().metadata["facet"]
        if not made["complete"]:
            raise BadInput(f"{path}: is not complete; give the command that makes it once more")
        if names != USUAL and list(names) != made["names"]:
            raise BadInput(f"{path}: has its labels already; names of labels are given to "
                           f"tools.database, which makes it")
        self.ids = self.column("SELECT id FROM systems ORDER BY id", int)
        self.sums = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "owner": None, "database": None}

    def connection(self):
        """The ase.db database, connected in this process and thread."""
        owner = (os.getpid(), threading.get_ident())
        if self.owner != owner:
            self.owner = owner
            self.database = ase.db.connect(self.path, type="db", use_lock_file=False, serial=True)
            self.database.__enter__()  # one connection for all rows, instead of one for each
        return self.database

    def select(self, command: str) -> sqlite3.Cursor:
        return self.connection().connection.execute(command)

    def column(self, command: str, dtype) -> np.ndarray:
        """What a SELECT of one column gives, as an array."""
        return np.fromiter((row[0] for row in self.select(command)), dtype)

    def __len__(self) -> int:
        return len(self.ids)

    def frame(self, row: int) -> Atoms:
        found = self.connection().get(int(self.ids[row]))
        atoms = Atoms(found.numbers, found.positions, cell=found.cell, pbc=found.pbc)
        stress = found.get("stress") if self.use_stress else None
        return labelled(atoms, found.get("energy"), found.get("forces"), stress, found.source,
                        found.material, found.get("group", ""))

    def atom_counts(self) -> np.ndarray:
        return self.column("SELECT natoms FROM systems ORDER BY id", int)

    def elements(self) -> np.ndarray:
        return self.column("SELECT DISTINCT Z FROM species ORDER BY Z", int)

    def compositions(self, numbers: np.ndarray) -> np.ndarray:
        fields = [("id", int), ("Z", int), ("n", int)]
        found = np.fromiter(self.select("SELECT id, Z, n FROM species"), fields)
        counts = np.zeros((len(self), len(numbers)), np.int16)
        for k, number in enumerate(numbers):
            here = found[found["Z"] == number]
            counts[np.searchsorted(self.ids, here["id"]), k] = here["n"]
        return counts

    def energies(self) -> np.ndarray:
        # SQLite has no nan, but infinity
        found = self.column("SELECT COALESCE(energy, 9e999) FROM systems ORDER BY id", float)
        return np.where(np.isfinite(found), found, np.nan)

    def labels(self) -> np.ndarray:
        columns = []
        for name in LABELS:
            command = f"SELECT {name} IS NOT NULL FROM systems ORDER BY id"
            columns.append(self.column(command, bool))
        columns[2] &= self.use_stress
        return np.stack(columns, 1)

    def volumes(self) -> np.ndarray:
        return self.column("SELECT COALESCE(volume, 0) FROM systems ORDER BY id", float)

    def materials(self) -> Iterator[str]:
        command = "SELECT value FROM text_key_values WHERE key = 'material' ORDER BY id"
        for value, in self.select(command):
            yield value

    def checksums(self) -> np.ndarray:
        if self.sums is not None:
            return self.sums
        columns = "numbers, positions, cell, pbc, energy, forces"
        if self.use_stress:
            columns += ", stress"
        sums = np.zeros(len(self), np.uint32)
        for row, values in enumerate(self.select(f"SELECT {columns} FROM systems ORDER BY id")):
            for value in values:
                part = value if isinstance(value, bytes) else repr(value).encode()
                sums[row] = zlib.crc32(part, int(sums[row]))
        self.sums = sums
        return sums


class Frames(Sequence):
    """Frames of one or several files: frames[i] is an Atoms, frames[a:b] are Frames again.

    Large sets stay on the disk (a database of tools.database); others are lists in memory.
    """

    def __init__(self, parts: Sequence[InMemory | OnDisk], rows: np.ndarray | None = None):
        """rows [F, 2]: the part and the row in it of each frame; None: all."""
        self.parts = list(parts)
        if rows is None:
            every = [np.zeros((0, 2), int)]
            for number, part in enumerate(self.parts):
                every.append(np.stack([np.full(len(part), number), np.arange(len(part))], 1))
            rows = np.concatenate(every)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        number, row = self.rows[i]
        return self.parts[number].frame(row)

    def take(self, chosen) -> Frames:
        """Some of the frames: their indices, as Frames."""
        return Frames(self.parts, self.rows[np.asarray(chosen, int)])

    def gather(self, columns: list[np.ndarray]) -> np.ndarray:
        """The column [F, …] from those of all parts."""
        first = np.cumsum([0] + [len(part) for part in self.parts])  # row of each part's first
        return np.concatenate(columns)[first[self.rows[:, 0]] + self.rows[:, 1]]

    def atom_counts(self) -> np.ndarray:
        """Atoms of every frame, [F]."""
        empty = np.zeros(0, int)
        return self.gather([empty] + [part.atom_counts() for part in self.parts])

    def compositions(self, numbers: Sequence[int]) -> np.ndarray:
        """Atoms of each element, by atomic number, in every frame, [F, Z]."""
        numbers = np.asarray(numbers, int)
        empty = np.zeros((0, len(numbers)), np.int16)
        return self.gather([empty] + [part.compositions(numbers) for part in self.parts])

    def energies(self) -> np.ndarray:
        """Energy of every frame, eV, [F]; nan where there is none."""
        return self.gather([np.zeros(0)] + [part.energies() for part in self.parts])

    def labels(self) -> np.ndarray:
        """Whether every frame has energy, forces and stress, [F, 3] of bool."""
        return self.gather([np.zeros((0, 3), bool)] + [part.labels() for part in self.parts])

    def volumes(self) -> np.ndarray:
        """Volume of every cell, Å³, [F]; 0 where it does not span space."""
        return self.gather([np.zeros(0)] + [part.volumes() for part in self.parts])

    def materials(self) -> np.ndarray:
        """A number for the material of every frame, [F]: in order of appearance in the files."""
        columns = [np.zeros(0, int)]
        known = {}
        for part in self.parts:
            numbers = np.zeros(len(part), int)
            for row, name in enumerate(part.materials()):
                numbers[row] = known.setdefault(name, len(known))
            columns.append(numbers)
        return self.gather(columns)

    def elements(self) -> np.ndarray:
        """Atomic numbers that occur in these frames, ascending."""
        if len(self) == 0:
            return np.zeros(0, int)
        every = np.unique(np.concatenate([part.elements() for part in self.parts]))
        return every[self.compositions(every).any(0)]

    def checksums(self) -> np.ndarray:
        """A number for all that every frame holds, [F]; frames of another kind of file differ."""
        return self.gather([np.zeros(0, np.uint32)] + [part.checksums() for part in self.parts])

    def fingerprint(self) -> int:
        """A number that changes with every label, every position, every cell and their order."""
        return zlib.crc32(self.checksums().tobytes())


def in_memory(images: Iterable[Atoms]) -> Frames:
    """Labelled Atoms as Frames (see `labelled`)."""
    return Frames([InMemory(images)])


def what_there_is(path: str) -> str:
    """The names of all that the first frame of a file has beside its geometry."""
    if is_json(path):
        with open_text(path) as file:
            _, frame = next(stream(file))
        found = {**frame, **(frame.get("outputs") or {})}
    else:
        found = labels_of(next(iter(images(path))))
    return ", ".join(map(str, found)) or "nothing"


def check_names(names: Names, found: np.ndarray, paths: Sequence[str]) -> None:
    """Raise BadInput for a label that no frame has, if its name was given, or forces or energy
    seem to be there under another name. found [3]: whether any frame has energy, forces, stress.
    """
    for number, (what, name) in enumerate(zip(LABELS, names)):
        if found[number] or what == "stress" and not name:
            continue
        there = what_there_is(paths[0])
        others = [other for other in there.lower().split(", ")
                  if what.removesuffix("s") in other
                  and other not in (*WEIGHTS, "free_energy", "energies")]
        if not name and not others:
            continue  # a set without energies, or without forces
        volume = ", or none has a volume" if names.virial() and what == "stress" else ""
        raise BadInput(f"no frame of {', '.join(paths)} has {what} under the name "
                       f"{name or what!r}{volume}; the first has {there}. Tell the name by "
                       f"--{what}")


def gather_files(paths: list[str], names: Names, use_stress: bool,
                 say: Callable[[str], None] = keep_quiet) -> Frames:
    """The frames of these files, each of them a part. Raises BadInput."""
    parts = []
    labels = np.zeros(len(LABELS), bool)
    ignored = set()
    for path in paths:
        if made_here(path):
            parts.append(OnDisk(path, names, use_stress))
            labels |= True  # tools.database has seen to the names
            continue

        found = []
        for atoms in iread(path, names, ignored):
            labels |= [name in atoms.calc.results for name in LABELS]
            if not use_stress:
                atoms.calc.results.pop("stress", None)
            found.append(atoms)
        parts.append(InMemory(found))

    check_names(names, labels | [False, False, not use_stress], paths)
    if ignored:
        say(f"note: {', '.join(sorted(ignored))} of {', '.join(paths)} are ignored: every frame "
            f"counts the same")
    return Frames(parts)


def read(patterns: Sequence[str], names: Names = USUAL, use_stress: bool = True,
         say: Callable[[str], None] = keep_quiet) -> Frames:
    """All frames of files and globs, checked; databases stay on the disk.

    say: told what is ignored. Raises BadInput, also for JSON files, which belong into a database,
    and for a name of a label that no frame has.
    """
    paths = expand(patterns)
    for path in paths:
        if is_json(path):
            out = Path(path).name.split(".")[0] + ".db"
            raise BadInput(f"{path}: convert first: python -m tools.database "
                           f"{shlex.quote(path)} {shlex.quote(out)}")
    return gather_files(paths, names, use_stress, say)


# ─── Training, validation, test ──────────────────────────────────────────────────────────────────

def free_atoms(frames: Frames) -> np.ndarray:
    """Which frames are free atoms, [F] of bool."""
    free = np.zeros(len(frames), bool)
    for row in np.flatnonzero(frames.atom_counts() == 1):
        free[row] = is_free(frames[row])
    return free


def blocks(frames: Frames) -> np.ndarray:
    """For every frame the row that begins its block, [F]: what a split leaves together.

    A material whose frames are a trajectory, consecutive ones nearer to each other than others, is
    cut into twenty blocks; any other frame is a block of its own.
    """
    begins = np.arange(len(frames))
    material = frames.materials()
    counts = frames.compositions(frames.elements())  # [F, Z]
    for number in np.unique(material):
        rows = np.flatnonzero(material == number)
        if len(rows) < 4 or (counts[rows] != counts[rows[0]]).any():
            continue

        # a hundred places along the material: the next frame there, and one far away
        near = []
        far = []
        half = len(rows) // 2
        for k in np.unique(np.linspace(0, half - 1, 100).astype(int)):
            here = frames[rows[k]]
            near.append(suspicions.apart(here, frames[rows[k + 1]]))
            far.append(suspicions.apart(here, frames[rows[k + half]]))
        if np.median(near) < 0.5 * np.median(far):
            length = -(-len(rows) // 20)
            begins[rows] = rows[np.arange(len(rows)) // length * length]
    return begins


def split(frames: Frames, seed: int, share: float = 0.1) -> tuple[Frames, Frames]:
    """Two parts: the rest, and a share of the materials, or of blocks if materials are few.

    Free atoms stay in the rest: nothing else tells their energies. Raises BadInput for one frame.
    """
    fixed = free_atoms(frames)
    key = frames.materials()
    if len(np.unique(key[~fixed])) < 10:
        key = blocks(frames)

    names = np.random.default_rng(seed).permutation(np.unique(key[~fixed]))
    held = np.isin(key, names[:max(1, int(share * len(names)))]) & ~fixed
    if held[~fixed].all() or not held.any():
        first = frames[0].info["source"] if len(frames) else "no frames"
        raise BadInput(f"{first}: so few structures cannot be split into training, validation and "
                       f"test; give more, or files for each")
    return frames.take(np.flatnonzero(~held)), frames.take(np.flatnonzero(held))


def together(*sets: Frames) -> Frames:
    """The frames of all sets, one after the other."""
    parts = []
    rows = [np.zeros((0, 2), int)]
    for frames in sets:
        rows.append(frames.rows + [len(parts), 0])
        parts += frames.parts
    return Frames(parts, np.concatenate(rows))


def twins(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """For every frame an earlier one that is equal, and one of the same geometry but another
    energy; [F] each, -1 where there is none.

    In memory, numbers are equal within EQUAL; wrapped or moved copies are not found. In databases,
    frames are equal if their checksums, atoms and energies are.
    """
    equal = np.full(len(frames), -1)
    contrary = np.full(len(frames), -1)

    # databases: checksums only if any energies are the same
    disk = np.array([isinstance(part, OnDisk) for part in frames.parts], bool)
    rows = np.flatnonzero(disk[frames.rows[:, 0]])
    stored = frames.take(rows)
    columns = [stored.atom_counts(), stored.energies()]
    if len(np.unique(np.array(columns), axis=1)[0]) < len(rows):
        columns.append(stored.checksums())
        _, first, same = np.unique(np.array(columns), axis=1, return_index=True,
                                   return_inverse=True)
        earlier = rows[first[same.ravel()]]
        equal[rows] = np.where(earlier < rows, earlier, -1)

    # in memory: frames of the same atoms, along a projection of their geometry
    alike = {}
    for row in np.flatnonzero(~disk[frames.rows[:, 0]]):
        number, place = frames.rows[row]
        atoms = frames.parts[number].images[place]
        alike.setdefault((atoms.numbers.tobytes(), atoms.pbc.tobytes()), []).append((row, atoms))
    for members in alike.values():
        if len(members) == 1:
            continue
        geometry = np.stack([np.append(atoms.positions, atoms.cell.array) for _, atoms in members])
        along = geometry @ np.cos(np.arange(geometry.shape[1]))
        order = np.argsort(along, kind="stable")
        width = EQUAL * geometry.shape[1]
        for a, i in enumerate(order):
            for j in order[a + 1:]:
                if along[j] - along[i] > width:
                    break
                if np.abs(geometry[i] - geometry[j]).max() > EQUAL:
                    continue
                (early, left), (late, right) = sorted((members[i], members[j]),
                                                      key=lambda member: member[0])
                if equal_labels(left, right):
                    equal[late] = early
                elif abs(left.calc.results.get("energy", np.nan)
                         - right.calc.results.get("energy", np.nan)) > 0.01 * len(left):
                    contrary[late] = early
    return equal, contrary


def equal_labels(a: Atoms, b: Atoms) -> bool:
    """Whether two frames have the same labels, with the same values."""
    left = a.calc.results
    right = b.calc.results
    if left.keys() != right.keys():
        return False
    return all(np.abs(left[name] - right[name]).max() <= EQUAL for name in left)


def without_copies(train: Frames, say: Callable[[str], None]) -> Frames:
    """The frames, each once."""
    equal, _ = twins(train)
    copies = np.flatnonzero(equal >= 0)
    if len(copies) == 0:
        return train
    late = train[copies[0]].info["source"]
    early = train[equal[copies[0]]].info["source"]
    say(f"note: {len(copies)} of {len(train)} frames to train on are there twice and dropped, the "
        f"first of them {late}, which equals {early}")
    return train.take(np.flatnonzero(equal < 0))


def without_those_of(held: Frames, what: str, train: Frames, say: Callable[[str], None]) -> Frames:
    """The training set without the frames of another set, free atoms excepted. Raises BadInput."""
    equal, _ = twins(together(held, train))
    equal = equal[len(held):]
    known = (equal >= 0) & (equal < len(held)) & ~free_atoms(train)
    shared = np.flatnonzero(known)
    if len(shared) == 0:
        return train
    late = train[shared[0]].info["source"]
    early = held[equal[shared[0]]].info["source"]
    if known.all():
        raise BadInput(f"every frame to train on is also in the {what} set ({late} equals "
                       f"{early}); give other files, or leave out --{what}")
    say(f"note: {len(shared)} of {len(train)} frames to train on are also in the {what} set and "
        f"stay there alone, the first of them {late}, which equals {early}")
    return train.take(np.flatnonzero(~known))


def tell_labels(frames: Frames, what: str, say: Callable[[str], None]) -> None:
    """Say how many frames lack an energy or forces."""
    labels = frames.labels()
    for number, name in enumerate(LABELS[:2]):
        lacking = np.flatnonzero(~labels[:, number])
        if len(lacking):
            say(f"note: {len(lacking)} of {len(frames)} frames {what} have no {name}, the first of "
                f"them {frames[lacking[0]].info['source']}; their other labels count")


def load(settings, folder: str | Path,
         say: Callable[[str], None] | None = print_to_stderr) -> tuple[Frames, Frames, Frames]:
    """Training, validation and test set, as the settings name them. Raises BadInput.

    settings: train, valid, test (tuples of files; none of train: the embedded set, made in
    `folder`; ("0",) of the others: no such set), seed, energy, forces, stress (names of labels),
    stress_weight (0: stresses are not read), strict (warnings are errors). Without a test set a
    tenth of the materials is set aside, then without a validation set a tenth of what is left.

    Equal frames count once; those that are in a test or validation file, too, are not trained on.
    say: told so, a line each, and what looks wrong; None: that is not looked for.
    """
    names = Names(settings.energy, settings.forces, settings.stress)
    use_stress = settings.stress_weight != 0
    tell = say or keep_quiet

    # what the files hold
    paths = settings.train
    if not paths:
        embedded = Path(folder) / "emt.extxyz"
        if not embedded.exists():
            emt.write(embedded)
        paths = [str(embedded)]
        names = USUAL
    train = read(paths, names, use_stress, tell)
    given = {"training": train}
    for what, patterns in (("test", settings.test), ("valid", settings.valid)):
        if patterns == NONE:
            given[what] = train[:0]
        elif patterns:
            given[what] = read(patterns, names, use_stress, tell)

    # what looks wrong in them
    if say is not None:
        look_at(given, say, getattr(settings, "strict", False))

    # nothing twice
    train = without_copies(train, tell)
    for what in ("test", "valid"):
        if what in given:
            train = without_those_of(given[what], what, train, tell)

    # what is not given is set aside
    if "test" not in given:
        train, given["test"] = split(train, settings.seed)
    if "valid" not in given:
        train, given["valid"] = split(train, settings.seed)
    return train, given["valid"], given["test"]


def look_at(given: dict[str, Frames], say: Callable[[str], None], strict: bool) -> None:
    """Say which labels lack, where free atoms are, and what looks wrong, in the sets as given.

    Raises BadInput if something looks wrong, and strict.
    """
    found = []
    for what, frames in given.items():
        tell_labels(frames, f"of the {what} set", say)
        free = np.flatnonzero(free_atoms(frames))
        if what != "training" and len(free):
            say(f"note: {len(free)} free atoms of the {what} set stay there and are not trained "
                f"on, the first of them {frames[free[0]].info['source']}")
        for text in warnings(frames):
            say(f"warning: {text}")
            found.append(text)
    if found and strict:
        raise BadInput(f"{len(found)} warnings, which --strict turns into errors; the first: "
                       f"{found[0]}")


def sample(frames: Frames, count: int = 5000) -> Frames:
    """At most `count` frames, evenly spread."""
    rows = np.linspace(0, len(frames) - 1, min(count, len(frames)))
    return frames.take(np.unique(rows.astype(int)))


def neighbouring(frames: Frames, count: int = 2000) -> list[tuple[Atoms, Atoms]]:
    """At most `count` pairs of consecutive frames of a material, evenly spread."""
    material = frames.materials()
    order = np.argsort(material, kind="stable")
    first = np.flatnonzero(material[order[:-1]] == material[order[1:]])
    chosen = np.unique(np.linspace(0, len(first) - 1, min(count, len(first))).astype(int))
    return [(frames[order[k]], frames[order[k + 1]]) for k in first[chosen]]


def contradictions(frames: Frames) -> list[str]:
    """Frames of the same geometry with another energy."""
    _, contrary = twins(frames)
    late = np.flatnonzero(contrary >= 0)
    if len(late) == 0:
        return []
    a, b = frames[late[0]], frames[contrary[late[0]]]
    return [f"{len(late)} frames have the geometry of another but a different energy, such as "
            f"{a.info['source']} ({a.calc.results['energy']:.6g} eV) that of {b.info['source']} "
            f"({b.calc.results['energy']:.6g} eV)"]


def warnings(frames: Frames) -> list[str]:
    """What looks wrong with units, signs or labels, a sentence each; see tools/suspicions.py."""
    frames = frames.take(np.flatnonzero(~free_atoms(frames)))
    if len(frames) == 0:
        return []
    some = sample(frames)
    found = suspicions.energies_per_atom(some) + suspicions.outlying_energies(frames)
    crystals = list(some)
    for look in suspicions.WARNINGS:
        found += look(crystals)
    return found + suspicions.slopes(neighbouring(frames)) + contradictions(frames)


# ─── Command ─────────────────────────────────────────────────────────────────────────────────────

def shortest_distance(crystals: list[Atoms], cutoff: float = 4.0) -> tuple[float, str]:
    """The shortest distance between two atoms (Å) and its frame; infinity if none is in cutoff."""
    shortest = (np.inf, "")
    for atoms in crystals:
        distances = neighbor_list("d", atoms, cutoff)
        if len(distances) and distances.min() < shortest[0]:
            shortest = (float(distances.min()), atoms.info["source"])
    return shortest


def spread(values: np.ndarray, digits: int) -> str:
    """Smallest, median and largest, in words."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.{digits}f} to {high:.{digits}f}, median {middle:.{digits}f}"


def report(frames: Frames) -> str:
    """A page on a data set: what it holds, from where to where its labels reach, what looks wrong.

    Labels, groups and distances of more than 5000 frames are those of a sample, evenly spread.
    """
    atoms = frames.atom_counts()
    copies = int((twins(frames)[0] >= 0).sum())
    numbers = frames.elements()
    counts = frames.compositions(numbers)  # [F, Z]
    some = sample(frames)
    crystals = list(some)
    materials = len(np.unique(frames.materials()))
    lines = [f"frames              {len(frames)}, of {materials} materials",
             f"atoms               {spread(atoms, 0)} per frame, {atoms.sum()} in all"]
    if copies:
        lines.append(f"equal frames        {copies} that are there already")
    if len(some) < len(frames):
        lines.append(f"looked at           {len(some)} frames, evenly spread, for what follows")

    lines.append("elements            frames     atoms")
    for k, number in enumerate(numbers):
        lines.append(f"  {chemical_symbols[number]:<18}{(counts[:, k] > 0).sum():>6}"
                     f"{counts[:, k].sum():>10}")

    groups = {}
    periodic = np.zeros(4, int)  # frames with 0 … 3 periodic axes
    forces = []
    stresses = []
    for frame in crystals:
        groups[frame.info["group"]] = groups.get(frame.info["group"], 0) + 1
        periodic[frame.pbc.sum()] += 1
        if "forces" in frame.calc.results:
            forces.append(np.linalg.norm(frame.calc.results["forces"], axis=1))
        if "stress" in frame.calc.results:
            stresses.append(np.abs(frame.calc.results["stress"]).max() / units.GPa)
    if set(groups) != {""}:
        lines.append("groups              frames")
        for group, count in groups.items():
            lines.append(f"  {group or '(none)':<18}{count:>6}")

    axes = [f"{count} along {number} axes" for number, count in enumerate(periodic) if count]
    lines.append(f"periodic            {', '.join(axes)}")
    lines.append(f"free atoms          {int(free_atoms(frames).sum())}")
    known = np.isfinite(frames.energies())
    if not known.all():
        lines.append(f"energy              in {known.sum()} of {len(frames)} frames")
    if len(forces) < len(some):
        lines.append(f"forces              in {len(forces)} of {len(some)} frames")
    if known.any():
        lines.append(f"energy, eV/atom     {spread((frames.energies() / atoms)[known], 3)}")
    if forces:
        lines.append(f"|force|, eV/Å       {spread(np.concatenate(forces), 3)}")
    lines.append(f"stress              in {len(stresses)} of {len(some)} frames")
    if stresses:
        lines.append(f"max |stress|, GPa   {spread(np.array(stresses), 2)}")

    distance, source = shortest_distance(crystals)
    if source:
        lines.append(f"shortest distance   {distance:.3f} Å, in {source}")
    else:
        lines.append("shortest distance   above 4 Å")

    found = warnings(frames)
    for text in found:
        lines.append(f"warning: {text}")
    if not found:
        lines.append("no warnings")
    return "\n".join(lines)


def add_names(parser: argparse.ArgumentParser) -> None:
    """The options that name labels."""
    parser.add_argument("--energy", default="", help="name of the energy (eV) in the files")
    parser.add_argument("--forces", default="", help="name of the forces (eV/Å)")
    parser.add_argument("--stress", default="", help="name of the stress (eV/Å³), or of the virial "
                                                     "(eV) if virial is in the name")


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, or 1 for bad input, which is said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m tools.frames", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or globs")
    add_names(parser)
    options = parser.parse_args(arguments)

    names = Names(options.energy, options.forces, options.stress)
    try:
        found = gather_files(expand(options.files), names, use_stress=True, say=print_to_stderr)
        print(report(found))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
