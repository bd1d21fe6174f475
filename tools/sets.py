"""Many frames: in memory or in a database on the disk, as one sequence; splits, equal frames.

tools.frames.read makes them from files.
"""
from __future__ import annotations

import os
import re
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ase.db
import numpy as np
from ase import Atoms

from tools import suspicions
from tools.labels import LABELS, USUAL, BadInput, Names, is_free, labelled

# numbers that differ by less are equal: files keep about eight digits
EQUAL = 2e-6

# labels that ASE's databases have a column for; others are in the column data
COLUMNS = ("energy", "forces", "stress", "dipole", "magmom", "magmoms", "charges")

# of fewer frames than this, one is held back; of fewer materials, none as a whole
FEW = 20

# a material without a name in its file is a run of frames, which the reader numbers
RUN = re.compile(r": \w+, run \d+$")


# ─── Sets of frames ───────────────────────────────────────────────────────────────────────────────


class InMemory:
    """Frames as a list of Atoms, of a file if they have a path."""

    def __init__(self, images: Iterable[Atoms], path: str = ""):
        self.images = list(images)
        self.path = path

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
        counts = np.zeros((len(self), len(numbers)), np.int32)
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

    def named(self) -> Iterator[bool]:
        for atoms in self.images:
            material = atoms.info["material"]
            yield material != atoms.info["source"] and not RUN.search(material)

    def groups(self) -> Iterator[str]:
        for atoms in self.images:
            yield atoms.info.get("group", "")

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

    def __init__(self, path: str, names: Names = USUAL, without: Sequence[str] = ()):
        """without: labels that are not read."""
        self.path = os.path.abspath(path)
        self.read = [name for name in LABELS if name not in without]
        self.owner = None
        self.database = None

        made = self.connection().metadata["facet"]
        if not made["complete"]:
            raise BadInput(f"{path}: is not complete; give the command that makes it once more")
        if names not in (USUAL, Names(*made["names"][:len(LABELS)])):
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
        there = found.data if set(self.read) - set(COLUMNS) else {}
        labels = {name: found.get(name) if name in COLUMNS else there.get(name)
                  for name in self.read}
        return labelled(atoms, **labels, source=found.source, material=found.material,
                        group=found.get("group", ""))

    def atom_counts(self) -> np.ndarray:
        return self.column("SELECT natoms FROM systems ORDER BY id", int)

    def elements(self) -> np.ndarray:
        return self.column("SELECT DISTINCT Z FROM species ORDER BY Z", int)

    def compositions(self, numbers: np.ndarray) -> np.ndarray:
        fields = [("id", int), ("Z", int), ("n", int)]
        found = np.fromiter(self.select("SELECT id, Z, n FROM species"), fields)
        counts = np.zeros((len(self), len(numbers)), np.int32)
        for k, number in enumerate(numbers):
            here = found[found["Z"] == number]
            counts[np.searchsorted(self.ids, here["id"]), k] = here["n"]
        return counts

    def energies(self) -> np.ndarray:
        # SQLite has no nan, but infinity
        found = self.column("SELECT COALESCE(energy, 9e999) FROM systems ORDER BY id", float)
        return np.where(np.isfinite(found), found, np.nan)

    def labels(self) -> np.ndarray:
        found = np.zeros((len(self), len(LABELS)), bool)
        for number, name in enumerate(LABELS):
            has = f"{name} IS NOT NULL"
            if name not in COLUMNS:
                has = f"instr(data, CAST('\"{name}\"' AS BLOB)) > 0"  # a key of what is in there
            if name in self.read:
                found[:, number] = self.column(f"SELECT {has} FROM systems ORDER BY id", bool)
        return found

    def volumes(self) -> np.ndarray:
        return self.column("SELECT COALESCE(volume, 0) FROM systems ORDER BY id", float)

    def materials(self) -> Iterator[str]:
        command = "SELECT value FROM text_key_values WHERE key = 'material' ORDER BY id"
        for value, in self.select(command):
            yield value

    def named(self) -> Iterator[bool]:
        for material in self.materials():
            yield not RUN.search(material)

    def groups(self) -> Iterator[str]:
        named = dict(self.select("SELECT id, value FROM text_key_values WHERE key = 'group'"))
        for number in self.ids.tolist():
            yield named.get(number, "")

    def checksums(self) -> np.ndarray:
        if self.sums is not None:
            return self.sums
        of_labels = [name if name in COLUMNS else "data" for name in self.read]
        columns = ", ".join(["numbers", "positions", "cell", "pbc", *dict.fromkeys(of_labels)])
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

    def files(self) -> dict[str, int]:
        """How many of these frames are of each file."""
        found = {}
        for number, part in enumerate(self.parts):
            count = int((self.rows[:, 0] == number).sum())
            if count and part.path:
                found[part.path] = found.get(part.path, 0) + count
        return found

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
        empty = np.zeros((0, len(numbers)), np.int32)
        return self.gather([empty] + [part.compositions(numbers) for part in self.parts])

    def energies(self) -> np.ndarray:
        """Energy of every frame, eV, [F]; nan where there is none."""
        return self.gather([np.zeros(0)] + [part.energies() for part in self.parts])

    def labels(self) -> np.ndarray:
        """Whether every frame has each of LABELS, [F, 3] of bool."""
        empty = np.zeros((0, len(LABELS)), bool)
        return self.gather([empty] + [part.labels() for part in self.parts])

    def volumes(self) -> np.ndarray:
        """Volume of every cell, Å³, [F]; 0 where it does not span space."""
        return self.gather([np.zeros(0)] + [part.volumes() for part in self.parts])

    def numbered(self, names: Callable[..., Iterable[str]]) -> tuple[np.ndarray, list[str]]:
        """A number for the name of every frame, [F], and the names: in order of appearance.

        names: of the frames of a part.
        """
        columns = [np.zeros(0, int)]
        known = {}
        for part in self.parts:
            numbers = (known.setdefault(name, len(known)) for name in names(part))
            columns.append(np.fromiter(numbers, int, len(part)))
        return self.gather(columns), list(known)

    def materials(self) -> np.ndarray:
        """A number for the material of every frame, [F]."""
        return self.numbered(lambda part: part.materials())[0]

    def named(self) -> np.ndarray:
        """Whether a file names the material of every frame, [F] of bool."""
        columns = [np.fromiter(part.named(), bool, len(part)) for part in self.parts]
        return self.gather([np.zeros(0, bool)] + columns)

    def groups(self) -> tuple[np.ndarray, list[str]]:
        """A number for the group of every frame, [F], and the groups' names."""
        return self.numbered(lambda part: part.groups())

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


# ─── What is held back ────────────────────────────────────────────────────────────────────────────


def free_atoms(frames: Frames) -> np.ndarray:
    """Which frames are free atoms, [F] of bool."""
    free = np.zeros(len(frames), bool)
    for row in np.flatnonzero(frames.atom_counts() == 1):
        free[row] = is_free(frames[row])
    return free


def tenth(count: int) -> float:
    """Of so many frames; one frame of few."""
    return count / 10 if count >= FEW else 1.0


def reduced_formulas(frames: Frames) -> np.ndarray:
    """A number for the reduced formula of every frame, [F]: Si2 and Si64 have the same."""
    counts = frames.compositions(frames.elements())  # [F, Z]
    reduced = counts // np.gcd.reduce(counts, axis=1)[:, None]  # [F, Z]
    return np.unique(reduced, axis=0, return_inverse=True)[1].ravel()


def is_trajectory(frames: Frames) -> bool:
    """Whether consecutive frames of these, which have the same atoms, are nearer than others.

    At thirty places the next frame is compared with one at random.
    """
    places = np.unique(np.linspace(0, len(frames) - 2, 30).astype(int))
    others = np.random.default_rng(0).permutation(places)
    near = []
    far = []
    for k, other in zip(places, others, strict=True):
        here = frames[k]
        near.append(suspicions.apart(here, frames[k + 1]))
        far.append(suspicions.apart(here, frames[other]))
    return bool(np.median(near) < 0.5 * np.median(far))


def blocks(frames: Frames, least: float) -> np.ndarray:
    """A number for the block of every frame, [F]: consecutive frames of a trajectory.

    A trajectory, which is of one file, material and group, is cut into at most twenty blocks, of
    `least` frames or more. Any other frame is a block of its own.
    """
    counts = frames.compositions(frames.elements())  # [F, Z]
    group, _ = frames.groups()
    kinds = np.stack([frames.rows[:, 0], frames.materials(), group], 1)  # [F, 3]
    kind = np.unique(kinds, axis=0, return_inverse=True)[1].ravel()

    begins = np.arange(len(frames))  # the first frame of the block of each
    order = np.argsort(kind, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        if len(rows) < 4 or (counts[rows] != counts[rows[0]]).any():
            continue
        if is_trajectory(frames.take(rows)):
            pieces = min(20, int(len(rows) / least))
            for block in np.array_split(rows, max(1, pieces)):
                begins[block] = block[0]
    return np.unique(begins, return_inverse=True)[1]


def units(frames: Frames) -> tuple[np.ndarray, np.ndarray, str]:
    """What every frame is held back with and a group it belongs to, numbers [F]; and how, in words.

    Whole materials, if there are twenty and none has more than a tenth of the frames: those that
    the files name, or else reduced formulas. Else blocks of trajectories and single frames, whose
    groups are those of the files.
    """
    material = frames.materials()
    bare = np.flatnonzero(~frames.named())
    if len(bare):
        material[bare] = -1 - reduced_formulas(frames.take(bare))
    _, material, sizes = np.unique(material, return_inverse=True, return_counts=True)
    if len(sizes) >= FEW and sizes.max() <= len(frames) / 10:
        what = "material or reduced formula" if len(bare) < len(frames) else "reduced formula"
        what = what if len(bare) else "material"
        return material, np.zeros(len(frames), int), f"by {what} ({len(sizes)})"

    wanted = round(tenth(len(frames)))
    block = blocks(frames, wanted if wanted < 10 else 5)
    sizes = np.bincount(block)
    what = []
    if (sizes > 1).any():
        what.append(f"in blocks of consecutive frames ({(sizes > 1).sum()})")
    if (sizes == 1).any():
        what.append(f"by single frames ({(sizes == 1).sum()})")
    return block, frames.groups()[0], " and ".join(what)


def deal(unit: np.ndarray, group: np.ndarray, parts: int, rng: np.random.Generator) -> np.ndarray:
    """The part of every frame, [F]: 1 … parts, or 0, which keeps most.

    unit, group [F]: numbers. Each part but 0 gets a tenth of the frames, in whole units: of every
    group with enough units at least one, and the same share if that can be.
    """
    size = np.bincount(unit)  # [U] frames
    first = np.unique(unit, return_index=True)[1]  # [U]
    goal = tenth(len(unit))
    found = np.zeros(len(size), int)  # [U]
    missed = (np.inf, np.inf)

    # large units may not add up to a tenth in every order, and one should not be half of a part
    for _ in range(20):
        # groups in random order, units in random order within each, dealt to the parts by turns
        of = rng.permutation(group.max() + 1)[group[first]]  # [U] group
        order = np.lexsort((rng.random(len(size)), of))
        of = of[order]
        begin = np.searchsorted(of, of)  # place in the order of the group's first
        end = np.searchsorted(of, of, side="right")
        place = np.arange(len(order))
        turn = (place - begin + of) % parts

        # the emptiest group goes first, and the last unit of a group last
        ahead = np.append(0, np.cumsum(size[order]))  # frames in the units before
        dealt = ahead[begin + (place - begin) // parts * parts] - ahead[begin]  # of the group
        share = dealt / (ahead[end] - ahead[begin]) + (place == end - 1)
        queue = np.lexsort((rng.random(len(size)), share))

        # each part takes what brings it nearer to a tenth
        part = np.zeros(len(size), int)
        off = 0.0
        for number in range(parts):
            total = 0
            for k in order[queue[turn[queue] == number]]:
                if total >= goal:
                    break
                if abs(total + size[k] - goal) < abs(total - goal):
                    part[k] = number + 1
                    total += size[k]
            off = max(off, abs(total - goal))
        miss = (max(0.0, off - 0.1 * goal), size[part > 0].max(initial=0))
        if miss < missed:
            missed = miss
            found = part
        if missed <= (0.0, goal / 2):
            break
    return found[unit]


def some_of(words: Sequence[str]) -> str:
    """The first eight, and how many more there are."""
    more = [f"{len(words) - 8} more groups"] if len(words) > 8 else []
    return ", ".join([*words[:8], *more])


def counts_of_groups(frames: Frames) -> dict[str, int]:
    """How many frames each group has that any frame of these files is in, the largest first."""
    number, names = frames.groups()
    counts = np.bincount(number, minlength=len(names))
    return {names[k]: int(counts[k]) for k in np.argsort(-counts, kind="stable")}


def described(frames: Frames, use: str) -> str:
    """Such as: 21 to test (Vacancy 12, Elastic 9)."""
    groups = counts_of_groups(frames)
    if len(groups) < 2:
        return f"{len(frames)} {use}"
    found = [f"{name or 'no group'} {count}" for name, count in groups.items() if count]
    return f"{len(frames)} {use} ({some_of(found)})"


def shortcomings(parts: dict[str, Frames]) -> list[str]:
    """What there is to say against parts that `split` has made, a sentence each.

    parts: the first one to train, by their use. Parts of fewer than ten frames, and groups of
    training that another part has nothing of.
    """
    cure = "give more, or other files by --valid and --test"
    found = []
    small = [f"{len(frames)} {use}" for use, frames in parts.items() if len(frames) < 10]
    if small:
        found.append(f"few frames ({', '.join(small)}): errors of so few are a matter of luck; "
                     f"{cure}")

    (_, train), *others = parts.items()
    bound = counts_of_groups(train.take(np.flatnonzero(~free_atoms(train))))
    for use, frames in others:
        here = counts_of_groups(frames)
        missing = [name or "no group" for name, count in bound.items() if count and not here[name]]
        if missing:
            found.append(f"no frames {use} of the groups {some_of(missing)}; {cure}")
    return found


def split(frames: Frames, seed: int, uses: Sequence[str] = ("to test",),
          say: Callable[[str], None] | None = None) -> list[Frames]:
    """The frames to train on, and a tenth of all for each of `uses`.

    Free atoms are trained on: nothing else tells their energies. say: told how the frames were
    split, in a line. Raises BadInput if there are too few.
    """
    bound = np.flatnonzero(~free_atoms(frames))
    if len(bound) <= len(uses):
        first = frames[0].info["source"] if len(frames) else "no frames"
        raise BadInput(f"{first}: so few structures cannot be split into training, validation and "
                       f"test; give more, or files for each")

    unit, group, how = units(frames.take(bound))
    part = np.zeros(len(frames), int)
    part[bound] = deal(unit, group, len(uses), np.random.default_rng(seed))
    found = [frames.take(np.flatnonzero(part == number)) for number in range(len(uses) + 1)]
    if say is not None:
        counts = [described(*pair) for pair in zip(found, ("to train", *uses), strict=True)]
        say(f"note: held back {how}: {', '.join(counts)}")
    return found


def together(*sets: Frames) -> Frames:
    """The frames of all sets, one after the other."""
    parts = []
    rows = [np.zeros((0, 2), int)]
    for frames in sets:
        rows.append(frames.rows + [len(parts), 0])
        parts += frames.parts
    return Frames(parts, np.concatenate(rows))


def like_any(some: Frames, others: Frames) -> np.ndarray:
    """Which of some have the number of atoms and the energy of any of the others, [F] of bool."""
    atoms = some.atom_counts()
    energy = np.nan_to_num(some.energies(), nan=np.inf)  # those without one are alike
    found = np.zeros(len(some), bool)
    other_atoms = others.atom_counts()
    other_energy = np.nan_to_num(others.energies(), nan=np.inf)
    for number in np.intersect1d(atoms, other_atoms):
        rows = np.flatnonzero(atoms == number)
        near = np.sort(other_energy[other_atoms == number])
        first = np.searchsorted(near, energy[rows] - EQUAL)
        last = np.searchsorted(near, energy[rows] + EQUAL, side="right")
        found[rows] = first < last
    return found


def twins(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """For every frame an earlier one that is equal, and one of the same geometry but another
    energy; [F] each, -1 where there is none.

    In memory, numbers are equal within EQUAL; wrapped or moved copies are not found. In databases,
    frames are equal if their checksums, atoms and energies are. One in memory and one in a database
    are compared as two in memory, if their energies are equal.
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
    there = np.flatnonzero(~disk[frames.rows[:, 0]])
    beside = rows[like_any(stored, frames.take(there))]
    alike = {}
    for row in (*there, *beside):
        number, place = frames.rows[row]
        atoms = frames[row] if disk[number] else frames.parts[number].images[place]
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
                    equal[late] = early if equal[late] < 0 else min(early, equal[late])
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
