"""Any file to checked ase.Atoms: the one place where layouts, label names, units and checks live.

    python -m tools.frames si_train.extxyz              # what a data set holds, what looks wrong
    python -m tools.frames train.xyz --energy REF_energy --forces REF_forces --stress REF_virial

    from tools import frames
    train = frames.read(["runs/emt.extxyz"])            # files, globs, databases of tools.database
    rest, held = frames.split(train, seed=0)            # whole materials on one side or the other

Every frame is an ase.Atoms with its labels in atoms.calc.results: "energy" (eV), "forces" (eV/Å)
and, if there is one, "stress" (six numbers in ASE's order and sign, eV/Å³). atoms.info says where
it comes from ("source"), of which material it is ("material") and to which group of its data set
it belongs ("group", from config_type or group in the file).

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
from collections.abc import Iterable, Iterator, Sequence
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

from tools import emt

# VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³
KBAR = -0.1 * units.GPa

# a lone atom whose images are all farther away than this is a free atom, Å
FREE = 10.0

# info of a frame that names its material, if a file has it
MATERIAL_KEYS = ("mptrj_traj_id", "material_id", "material")

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

# ─── One frame ───────────────────────────────────────────────────────────────────────────────────

def labelled(atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray | None = None,
             source: str = "here", material: str = "", group: str = "") -> Atoms:
    """A frame: the geometry of `atoms`, and nothing else of it, with labels.

    energy eV, forces [N, 3] eV/Å, stress [6] eV/Å³ in ASE's order or None. Constraints are dropped:
    they would set forces to zero. Without a material, the frame is one of its own.
    """
    frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    results = {"energy": energy, "forces": np.array(forces, float)}
    if stress is not None:
        results["stress"] = np.array(stress, float)
    frame.calc = SinglePointCalculator(frame, **results)
    frame.info = {"source": source, "material": material or source, "group": group}
    return frame


def check(atoms: Atoms, units_known: bool = False) -> Atoms:
    """The frame, if it can be trained on. Raises BadInput."""
    source = atoms.info["source"]
    results = atoms.calc.results
    if len(atoms) == 0:
        raise BadInput(f"{source}: has no atoms; remove the frame")

    if results["forces"].shape != (len(atoms), 3):
        raise BadInput(f"{source}: {len(atoms)} atoms, but forces of shape "
                       f"{results['forces'].shape}; three numbers for each atom are needed")

    # everything is a finite number
    for what, value in (("an energy", results["energy"]), ("a force", results["forces"]),
                        ("a position", atoms.positions), ("a cell vector", atoms.cell.array),
                        ("a component of the stress", results.get("stress", 0.0))):
        if not np.isfinite(value).all():
            raise BadInput(f"{source}: {what} is NaN or infinite; remove the frame or compute it "
                           f"again")

    periodic = atoms.cell.array[atoms.pbc]
    if np.linalg.matrix_rank(periodic) < len(periodic):
        raise BadInput(f"{source}: periodic, but its cell has no volume; remove the frame, or "
                       f"set its pbc to F F F")

    # VASP's stresses under ASE's name; where the layout tells the unit, there is no doubt
    largest = np.abs(results.get("stress", [0.0])).max()
    if largest > 1 and not units_known:
        raise BadInput(f"{source}: a stress of {largest:.0f} eV/Å³ looks like kbar; multiply "
                       f"VASP's kbar by {KBAR:.4e} to get ASE's eV/Å³, or leave stress out with "
                       f"--stress_weight 0")
    return atoms


def is_free(atoms: Atoms) -> bool:
    """Whether this is one atom without neighbours: no periodic image of it is near."""
    if len(atoms) != 1:
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


def frames_of_ase(path: str, names: Names) -> Iterator[Atoms]:
    """Frames of any file that ASE reads. Raises BadInput for a frame without labels.

    Consecutive frames of one formula count as one material, unless their info names it. One atom
    alone needs no forces: they are zero. A frame without a volume has no stress.
    """
    run = 0
    formula = None
    for i, atoms in enumerate(images(path)):
        source = f"{path}, frame {i}"
        labels = {**atoms.info, **atoms.arrays}
        if atoms.calc is not None:
            labels.update(atoms.calc.results)

        energy = look_up(labels, names.energy or "energy")
        forces = look_up(labels, names.forces or "forces")
        stress = look_up(labels, names.stress or "stress")
        if forces is None and len(atoms) == 1:
            forces = np.zeros((1, 3))
        for name, label in ((names.energy or "energy", energy), (names.forces or "forces", forces)):
            if label is None:
                raise BadInput(f"{source}: has no {name}; a frame needs energy and forces, under "
                               f"the names that ASE gives them or those of --energy and --forces")

        # a virial (eV) is minus the volume times the stress
        if stress is not None and names.virial() and atoms.cell.rank < 3:
            stress = None
        if stress is not None:
            stress = six_numbers(stress, ASE_ORDER, source)
        if stress is not None and names.virial():
            stress = -stress / atoms.get_volume()

        # the material: its name, or how many formulas came before
        if str(atoms.symbols) != formula:
            run += 1
            formula = str(atoms.symbols)
        material = f"{path}: {formula}, run {run}"
        for key in MATERIAL_KEYS:
            if key in atoms.info:
                material = word(atoms.info[key])
                break

        yield labelled(atoms, one_number(energy, "the energy", source),
                       numbers_in(forces, "forces", source), stress,
                       source, material, group_of(atoms.info))


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


def frame_of_json(keys: list[str], frame: dict, names: Names, source: str) -> Atoms:
    """One frame of a JSON file. Raises BadInput, and KeyError or the like for what is no frame."""
    if not isinstance(frame, dict):
        raise BadInput(f"{source}: is no structure with labels, but {str(frame)[:40]!r}")
    labels = {**frame, **(frame.get("outputs") or {})}
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

    structure = frame.get("structure")
    for name, value in (("structure", structure), (names.energy or "energy", found["energy"])):
        if value is None:
            raise BadInput(f"{source}: has no {name}; it has {', '.join(labels)}")

    atoms = crystal(structure, source)
    if found["forces"] is None and len(atoms) == 1:
        found["forces"] = np.zeros((1, 3))
    if found["forces"] is None:
        raise BadInput(f"{source}: has no {names.forces or 'forces'}; it has {', '.join(labels)}")

    # the layout tells the order of its own stress, not that of another name
    stress = None
    order = layout.order if not names.stress or names.stress in layout.stress else ""
    if found["stress"] is not None and not (names.virial() and atoms.cell.rank < 3):
        stress = six_numbers(found["stress"], order, source)
    if stress is not None:
        stress = stress * (-1 / atoms.get_volume() if names.virial() else KBAR)

    return labelled(atoms, one_number(found["energy"], "the energy", source),
                    numbers_in(found["forces"], "forces", source), stress,
                    source, material_of(keys, frame, source), group_of(frame))


def frames_of_json(path: str, names: Names) -> Iterator[Atoms]:
    """Frames of a JSON file, streamed. Raises BadInput for a frame that is not understood."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:  # -sig: a byte-order mark is skipped
        for i, (keys, frame) in enumerate(stream(file)):
            source = f"{path}, frame {keys[1] if keys else i}"
            try:
                yield frame_of_json(keys, frame, names, source)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise BadInput(f"{source}: is no structure as pymatgen writes it "
                               f"({type(error).__name__}: {error})") from error


# ─── Any file ────────────────────────────────────────────────────────────────────────────────────

def is_json(path: str) -> bool:
    """Whether the name is that of a JSON file, perhaps compressed."""
    return path.lower().removesuffix(".gz").endswith(".json")


def iread(path: str | Path, names: Names = USUAL) -> Iterator[Atoms]:
    """The frames of one file, checked, one after another in little memory.

    Raises BadInput: for a file that cannot be read, that ends too early or holds nothing, for a
    frame without labels, and for all that `check` refuses.
    """
    path = str(path)
    units_known = is_json(path) or made_here(path)
    count = 0
    try:
        if is_json(path):
            found = frames_of_json(path, names)
        elif made_here(path):
            found = gather_files([path], names, use_stress=True)
        else:
            found = frames_of_ase(path, names)
        for atoms in found:
            yield check(atoms, units_known)
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
        return np.array([atoms.calc.results["energy"] for atoms in self.images], float)

    def volumes(self) -> np.ndarray:
        return np.array([atoms.cell.volume for atoms in self.images], float)

    def materials(self) -> Iterator[str]:
        for atoms in self.images:
            yield atoms.info["material"]

    def checksums(self) -> np.ndarray:
        sums = np.zeros(len(self), np.uint32)
        for row, atoms in enumerate(self.images):
            results = atoms.calc.results
            parts = [atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc,
                     np.array(results["energy"]), results["forces"]]
            if "stress" in results:
                parts.append(results["stress"])
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
        return labelled(atoms, found.energy, found.forces, stress,
                        found.source, found.material, found.get("group", ""))

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
        return self.column("SELECT energy FROM systems ORDER BY id", float)

    def volumes(self) -> np.ndarray:
        return self.column("SELECT COALESCE(volume, 0) FROM systems ORDER BY id", float)

    def materials(self) -> Iterator[str]:
        command = "SELECT value FROM text_key_values WHERE key = 'material' ORDER BY id"
        for value, in self.select(command):
            yield value

    def checksums(self) -> np.ndarray:
        columns = "numbers, positions, cell, pbc, energy, forces"
        if self.use_stress:
            columns += ", stress"
        sums = np.zeros(len(self), np.uint32)
        for row, values in enumerate(self.select(f"SELECT {columns} FROM systems ORDER BY id")):
            for value in values:
                part = value if isinstance(value, bytes) else repr(value).encode()
                sums[row] = zlib.crc32(part, int(sums[row]))
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
        """Energy of every frame, eV, [F]."""
        return self.gather([np.zeros(0)] + [part.energies() for part in self.parts])

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

    def fingerprint(self) -> int:
        """A number that changes with every label, every position, every cell and their order."""
        sums = self.gather([np.zeros(0, np.uint32)] + [part.checksums() for part in self.parts])
        return zlib.crc32(sums.tobytes())


def in_memory(images: Iterable[Atoms]) -> Frames:
    """Labelled Atoms as Frames (see `labelled`)."""
    return Frames([InMemory(images)])


def gather_files(paths: list[str], names: Names, use_stress: bool) -> Frames:
    """The frames of these files, each of them a part. Raises BadInput."""
    parts = []
    stresses = not names.stress
    for path in paths:
        if made_here(path):
            parts.append(OnDisk(path, names, use_stress))
            stresses = True  # tools.database has seen to the name
            continue

        found = []
        for atoms in iread(path, names):
            stresses |= "stress" in atoms.calc.results
            if not use_stress:
                atoms.calc.results.pop("stress", None)
            found.append(atoms)
        parts.append(InMemory(found))

    # energies and forces that are missing stop at the first frame; a stress may be missing
    if use_stress and not stresses:
        raise BadInput(no_stress(names, paths))
    return Frames(parts)


def no_stress(names: Names, paths: list[str]) -> str:
    """What to say when a name of the stress was given and no frame has it."""
    return (f"no frame of {', '.join(paths)} has a stress from {names.stress!r}: the name is in "
            f"none of them, or none has a volume; look with python -m tools.frames, or leave "
            f"--stress out")


def read(patterns: Sequence[str], names: Names = USUAL, use_stress: bool = True) -> Frames:
    """All frames of files and globs, checked; databases stay on the disk.

    Raises BadInput, also for JSON files, which belong into a database, and for a name of the
    stress that no frame has.
    """
    paths = expand(patterns)
    for path in paths:
        if is_json(path):
            out = Path(path).name.split(".")[0] + ".db"
            raise BadInput(f"{path}: convert first: python -m tools.database "
                           f"{shlex.quote(path)} {shlex.quote(out)}")
    return gather_files(paths, names, use_stress)


def free_atoms(frames: Frames) -> np.ndarray:
    """Which frames are free atoms, [F] of bool."""
    free = np.zeros(len(frames), bool)
    for row in np.flatnonzero(frames.atom_counts() == 1):
        free[row] = is_free(frames[row])
    return free


def split(frames: Frames, seed: int, share: float = 0.1) -> tuple[Frames, Frames]:
    """Two parts: the rest, and a share of the materials (of the frames, if materials are few).

    Free atoms stay in the rest: nothing else tells their energies. Raises BadInput for one frame.
    """
    fixed = free_atoms(frames)
    key = frames.materials()
    if len(np.unique(key[~fixed])) < 10:
        key = np.arange(len(frames))

    names = np.random.default_rng(seed).permutation(np.unique(key[~fixed]))
    held = np.isin(key, names[:max(1, int(share * len(names)))]) & ~fixed
    if held.all() or not held.any():
        first = frames[0].info["source"] if len(frames) else "no frames"
        raise BadInput(f"{first}: so few structures cannot be split into training, validation and "
                       f"test; give more, or files for each")
    return frames.take(np.flatnonzero(~held)), frames.take(np.flatnonzero(held))


def load(settings, folder: str | Path) -> tuple[Frames, Frames, Frames]:
    """Training, validation and test set, as the settings name them. Raises BadInput.

    settings: train, valid, test (tuples of files; none of train: the embedded set, made in
    `folder`; ("0",) of the others: no such set), seed, energy, forces, stress (names of labels),
    stress_weight (0: stresses are not read). Without a test set a tenth of the materials is set
    aside, then without a validation set a tenth of what is left.
    """
    names = Names(settings.energy, settings.forces, settings.stress)
    use_stress = settings.stress_weight != 0

    if settings.train:
        train = read(settings.train, names, use_stress)
    else:
        path = Path(folder) / "emt.extxyz"
        if not path.exists():
            emt.write(path)
        train = read([str(path)], use_stress=use_stress)

    nothing = train[:0]
    if settings.test == NONE:
        test = nothing
    elif settings.test:
        test = read(settings.test, names, use_stress)
    else:
        train, test = split(train, settings.seed)

    if settings.valid == NONE:
        valid = nothing
    elif settings.valid:
        valid = read(settings.valid, names, use_stress)
    else:
        train, valid = split(train, settings.seed)
    return train, valid, test


def sample(frames: Frames, count: int = 5000) -> Frames:
    """At most `count` frames, evenly spread."""
    rows = np.linspace(0, len(frames) - 1, min(count, len(frames)))
    return frames.take(np.unique(rows.astype(int)))


# ─── What looks wrong ────────────────────────────────────────────────────────────────────────────

def energies_per_atom(some: Frames, crystals: list[Atoms]) -> list[str]:
    """Whether the energies look like energies per atom: composition explains those better."""
    counts = some.compositions(some.elements()).astype(float)  # [F, Z]
    atoms = counts.sum(1)
    energies = some.energies()
    fractions = counts / atoms[:, None]

    def unexplained(y: np.ndarray) -> float:
        """Spread of what a sum over elements leaves."""
        return np.std(y - fractions @ np.linalg.lstsq(fractions, y, rcond=None)[0])

    if np.ptp(atoms) <= 0.5 * atoms.min():
        return []
    if unexplained(energies) >= 0.5 * unexplained(energies / atoms):
        return []
    return [f"the energies ({energies[0]:.3f} eV for {atoms[0]:.0f} atoms in "
            f"{crystals[0].info['source']}) do not grow with the number of atoms: are they "
            f"energies per atom? Totals are meant"]


def net_forces(some: Frames, crystals: list[Atoms]) -> list[str]:
    """Whether forces do not sum to zero, as constraints or missing atoms make them do."""
    sums = np.zeros(len(some))  # eV/Å
    squares = np.zeros(len(some))
    for i, atoms in enumerate(crystals):
        forces = atoms.calc.results["forces"]
        sums[i] = np.abs(forces.sum(0)).max()
        squares[i] = np.mean(forces ** 2)

    # rounding of N forces adds up to √N times as much
    net = sums / np.sqrt(some.atom_counts())
    limit = 0.02 + 0.1 * np.sqrt(squares.mean())
    if not (net > limit).any():
        return []
    worst = int(net.argmax())
    return [f"in {(net > limit).sum()} of {len(some)} frames the forces do not sum to zero, most "
            f"of all in {crystals[worst].info['source']} (sum {sums[worst]:.2f} eV/Å): were "
            f"constraints applied to them?"]


def large_stresses(some: Frames, crystals: list[Atoms]) -> list[str]:
    """Whether stresses are above 1 eV/Å³, 160 GPa."""
    largest = np.zeros(len(some))
    for i, atoms in enumerate(crystals):
        largest[i] = np.abs(atoms.calc.results.get("stress", [0.0])).max()
    if largest.max() <= 1:
        return []
    worst = int(largest.argmax())
    return [f"stresses reach {largest[worst]:.1f} eV/Å³ in {crystals[worst].info['source']}; "
            f"is that frame sound?"]


WARNINGS = (energies_per_atom, net_forces, large_stresses)


def warnings(frames: Frames) -> list[str]:
    """What looks wrong with units or labels, a sentence each: the functions of WARNINGS in turn."""
    if len(frames) == 0:
        return []
    some = sample(frames)
    crystals = list(some)
    found = []
    for look in WARNINGS:
        found += look(some, crystals)
    return found


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
    numbers = frames.elements()
    counts = frames.compositions(numbers)  # [F, Z]
    some = sample(frames)
    crystals = list(some)
    materials = len(np.unique(frames.materials()))
    lines = [f"frames              {len(frames)}, of {materials} materials",
             f"atoms               {spread(atoms, 0)} per frame, {atoms.sum()} in all"]
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
    lines.append(f"energy, eV/atom     {spread(frames.energies() / atoms, 3)}")
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
        print(report(gather_files(expand(options.files), names, use_stress=True)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
