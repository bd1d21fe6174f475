"""Any file to checked ase.Atoms, and data sets to training, validation and test sets.

    python -m tools.frames si_train.extxyz              # what a data set holds, what looks wrong
    python -m tools.frames train.xyz --energy REF_energy --forces REF_forces --stress REF_virial

    from tools import frames
    train = frames.read(["runs/emt.extxyz"])            # files, globs, databases of tools.database
    rest, held = frames.split(train, seed=0)            # a tenth of the frames is held

Every frame is an ase.Atoms with its labels in atoms.calc.results: "energy" (eV), "forces" (eV/Å)
and, if there is one, "stress" (six numbers in ASE's order and sign, eV/Å³). atoms.info says where
it comes from ("source"), of which material it is ("material") and to which group of its data set
it belongs ("group", from config_type or group in the file). A frame may lack energy or forces.

What ASE reads is read (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz). Besides, JSON and JSON
Lines as MPtrj, MatPES and mlearn have them: tools.database turns these into a database.

files.py opens files, for every tool; labels.py has one frame, its label names and checks;
json_layouts.py the layouts of JSON; sets.py many frames, in memory or in a database, and how they
are split; suspicions.py what looks wrong.
"""
from __future__ import annotations

import argparse
import glob
import io
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.data import chemical_symbols

import facet
from tools import emt, suspicions
from tools.files import WARNING, in_one_sentence, is_json, keep_quiet, read_atoms, refuse_foreign
from tools.json_layouts import frames_of_json, open_text, stream
from tools.labels import (
    ASE_ORDER,
    LABELS,
    TABLE,
    USUAL,
    WEIGHTS,
    BadInput,
    Names,
    Runs,
    Unread,
    check,
    find_labels,
    group_of,
    labelled,
    material_in,
    name_help,
    read_labels,
)
from tools.sets import (
    Frames,
    InMemory,
    OnDisk,
    free_atoms,
    made_here,
    neighbouring,
    sample,
    shortcomings,
    split,
    together,
    twins,
)
from tools.sets import in_memory as in_memory  # for those who have Atoms already

NONE = ("0",)  # of --valid and --test: no such set
PATIENCE = 2.0  # seconds until checks that take long say so
USES = {"valid": "to validate", "test": "to test"}


def print_to_stderr(text: str) -> None:
    """Say it where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


# ─── Any file ─────────────────────────────────────────────────────────────────────────────────────


def labels_of(atoms: Atoms) -> dict:
    """Everything that a frame has beside its geometry, by name."""
    labels = {**atoms.info, **atoms.arrays}
    for name in ("numbers", "positions"):
        del labels[name]
    if atoms.calc is not None:
        labels.update(atoms.calc.results)
    return labels


def frames_of_ase(path: str, names: Names, unread: Unread, bare: bool,
                  say: Callable[[str], None]) -> Iterator[Atoms]:
    """Frames of any file that ASE reads; see `iread`. Raises BadInput.

    A frame's material is what its info names, else its run (see Runs). One atom alone needs no
    forces: they are zero. A frame without a volume has no stress.
    """
    runs = Runs()
    for i, atoms in enumerate(read_atoms(path, say)):
        source = f"{path}, frame {i}"
        found = find_labels(labels_of(atoms), names, {}, source, unread, bare)

        # only ASE itself tells the order of six numbers
        stress = atoms.calc.results.get("stress") if atoms.calc is not None else None
        order = ASE_ORDER if found["stress"] is stress else ""
        results = read_labels(found, atoms, names.virial(), source, unread, order)

        material = material_in(atoms.info)
        if not material and not bare:
            material = f"{path}: {atoms.symbols}, run {runs.number(atoms)}"
        yield labelled(atoms, **results, source=source, material=material,
                       group=group_of(atoms.info))


def iread(path: str | Path, names: Names = USUAL, unread: Unread | None = None,
          bare: bool = False, say: Callable[[str], None] = keep_quiet) -> Iterator[Atoms]:
    """The frames of one file, checked, one after another in little memory.

    unread: gets the names of what is in the file and is not read; bare: frames may lack all labels,
    and runs are not told apart; say: told what is doubtful about the file. Raises BadInput: for a
    file that cannot be read, that ends too early or holds nothing, for a frame without labels, and
    for all that `check` refuses.
    """
    path = str(path)
    unread = unread or Unread()
    count = 0
    try:
        refuse_foreign(path)
        if made_here(path):
            found = gather_files([path], names)
        elif is_json(path):
            found = frames_of_json(path, names, unread, bare)
        else:
            found = frames_of_ase(path, names, unread, bare, say)
        for atoms in found:
            yield check(atoms)
            count += 1
    except Exception as error:
        raise in_one_sentence(error, path, count) from error
    if count == 0:
        raise BadInput(f"{path}: holds no structures")


def neighbours(atoms: Atoms, config: facet.Config) -> facet.Neighbours:
    """facet.find_neighbours, with the frame's name in the message. Raises BadInput."""
    try:
        return facet.find_neighbours(atoms, config)
    except ValueError as error:
        name = atoms.info.get("source", atoms.symbols)
        raise BadInput(f"{name}: {error}") from None


def load_model(path: str | Path, device: str = "cpu") -> facet.Facet:
    """facet.load. Raises BadInput."""
    try:
        return facet.load(path, device)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from None


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


def what_there_is(path: str) -> str:
    """The names of all that the first frame of a file has beside its geometry."""
    if is_json(path):
        with open_text(path) as file:
            _, frame = next(stream(file))
        found = {**frame, **(frame.get("outputs") or {})}
    else:
        found = labels_of(next(read_atoms(path)))
    return ", ".join(map(str, found)) or "nothing"


def check_labels(names: Names, found: set[str], paths: Sequence[str]) -> None:
    """Raise BadInput for a label that no frame has, if its name was given, or if it is expected
    and seems to be there under another name. found: the labels that any frame has."""
    for label, name in zip(TABLE, names, strict=True):
        if label.name in found or not (label.expected or name):
            continue
        there = what_there_is(paths[0])
        others = [other for other in there.lower().split(", ")
                  if label.name.removesuffix("s") in other
                  and other not in (*WEIGHTS, "free_energy", "energies")]
        if not name and not others:
            continue  # a set without energies, or without forces
        volume = ", or none has a volume" if label.name == "stress" and names.virial() else ""
        raise BadInput(f"no frame of {', '.join(paths)} has {label.name} under the name "
                       f"{name or label.name!r}{volume}; the first has {there}. Tell the name by "
                       f"--{label.name}")


def gather_files(paths: list[str], names: Names, without: Sequence[str] = (),
                 say: Callable[[str], None] = keep_quiet, bare: bool = False) -> Frames:
    """The frames of these files, each of them a part. Raises BadInput.

    bare: frames may lack all labels; other arguments as for `read`.
    """
    parts = []
    labels = set(without)  # those that there are; nobody misses the others
    unread = Unread()
    for path in paths:
        if made_here(path):
            parts.append(OnDisk(path, names, without))
            labels.update(LABELS)  # tools.database has seen to the names
            continue

        found = []
        for atoms in iread(path, names, unread, bare, say):
            labels.update(atoms.calc.results)
            for name in without:
                atoms.calc.results.pop(name, None)
            found.append(atoms)
        parts.append(InMemory(found, path))

    # frames without labels miss none, unless their names are given
    if any(names) or not bare or labels > set(without):
        check_labels(names, labels, paths)
    for text in unread.notes(", ".join(paths), without):
        say(text)
    return Frames(parts)


def read(patterns: Sequence[str], names: Names = USUAL, without: Sequence[str] = (),
         say: Callable[[str], None] = keep_quiet) -> Frames:
    """All frames of files and globs, checked; databases stay on the disk.

    without: labels that are not read; say: told what else is not. Raises BadInput, also for JSON
    of pymatgen's structures, which belongs into a database, and for a name of a label that no frame
    has.
    """
    paths = expand(patterns)
    for path in paths:
        if is_json(path):
            out = Path(path).name.split(".")[0] + ".db"
            raise BadInput(f"{path}: convert first: python -m tools.database "
                           f"{shlex.quote(path)} {shlex.quote(out)}")
    return gather_files(paths, names, without, say)


def write_whole(path: Path, crystals: Sequence[Atoms]) -> None:
    """Extended XYZ: a part file, renamed into place once it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        ase.io.write(part, crystals, format="extxyz")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def comes_back(atoms: Atoms) -> bool:
    """Whether extended XYZ holds the crystal and all that is in its info and arrays."""
    file = io.StringIO()
    try:
        ase.io.write(file, atoms, format="extxyz")
        file.seek(0)
        again, = ase.io.read(file, index=":", format="extxyz")
        pairs = [(atoms.cell.array, again.cell.array), (atoms.pbc, again.pbc)]
        for here, there in ((atoms.info, again.info), (atoms.arrays, again.arrays)):
            pairs += [(value, there[name]) for name, value in here.items()]
        return all(as_it_was(*pair) for pair in pairs)
    except Exception:  # whatever ASE's writer and reader stumble over
        return False


def as_it_was(value, again) -> bool:
    """Whether an entry is what it was; or the number that a text tells, the text of an object."""
    if value is None:
        return False
    if isinstance(value, str):
        return value == again or not isinstance(again, str)
    value = np.asarray(value)
    if value.dtype.kind in "biuf":
        return value.shape == np.shape(again) and np.allclose(value, again, 1e-6, 1e-6, True)
    return True


def leave_out(atoms: Atoms) -> set[str]:
    """Remove from info and arrays what extended XYZ cannot hold. Returns the names of that."""
    lost = set()
    if comes_back(atoms):
        return lost
    for place in (atoms.info, atoms.arrays):
        for name in set(place) - {"numbers", "positions"}:
            alone = Atoms(atoms.numbers, cell=atoms.cell, pbc=atoms.pbc)
            where = alone.info if place is atoms.info else alone.arrays
            where[name] = place[name]
            if not comes_back(alone):
                lost.add(str(name))
                del place[name]
    return lost


# ─── Training, validation, test ───────────────────────────────────────────────────────────────────


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
    """Say how many frames lack a label that is expected: an energy, or forces."""
    labels = frames.labels()
    for number, label in enumerate(TABLE):
        lacking = np.flatnonzero(~labels[:, number])
        if label.expected and len(lacking):
            say(f"note: {len(lacking)} of {len(frames)} frames {what} have no {label.name}, the "
                f"first of them {frames[lacking[0]].info['source']}; their other labels count")


def load_sets(settings, folder: str | Path,
              say: Callable[[str], None] | None = print_to_stderr) -> tuple[Frames, Frames, Frames]:
    """Training, validation and test set, as the settings name them. Raises BadInput.

    settings: train, valid, test (tuples of files; none of train: the embedded set, made in
    `folder`; ("0",) of the others: no such set), seed, a name for each label, such as energy, a
    weight for some, such as stress_weight (0: stresses are not read), strict (warnings are
    errors). A test or validation set that is not given is a tenth of the frames, by `split`.

    Equal frames count once; those that are in a test or validation file, too, are not trained on.
    say: told so, a line each, and what looks wrong; None: that is not looked for.
    """
    names = Names(*[getattr(settings, name, "") for name in LABELS])
    without = [name for name in LABELS if getattr(settings, f"{name}_weight", 1) == 0]
    doubts = []

    def tell(text: str) -> None:
        """Say it, and keep what is a warning."""
        if text.startswith(WARNING):
            doubts.append(text.removeprefix(WARNING))
        if say is not None:
            say(text)

    # what the files hold
    paths = settings.train
    if not paths:
        embedded = Path(folder) / "emt.extxyz"
        if not embedded.exists():
            emt.write(embedded)
        paths = [str(embedded)]
        names = USUAL
    train = read(paths, names, without, tell)
    given = {"training": train}
    for what, patterns in (("test", settings.test), ("valid", settings.valid)):
        if patterns == NONE:
            given[what] = train[:0]
        elif patterns:
            given[what] = read(patterns, names, without, tell)

    # what looks wrong in them
    if say is not None:
        look_at(given, tell)

    # nothing twice
    train = without_copies(train, tell)
    for what in ("test", "valid"):
        if what in given:
            train = without_those_of(given[what], what, train, tell)

    # what is not given is held back
    uses = {what: use for what, use in USES.items() if what not in given}
    if uses:
        train, *held = split(train, settings.seed, list(uses.values()), tell)
        given.update(zip(uses, held, strict=True))
        if say is not None:
            parts = zip(["to train", *uses.values()], [train, *held], strict=True)
            for text in shortcomings(dict(parts)):
                tell(WARNING + text)
    if say is not None and doubts and getattr(settings, "strict", False):
        raise BadInput(f"{len(doubts)} warnings, which --strict turns into errors; the first: "
                       f"{doubts[0]}")
    return train, given["valid"], given["test"]


class Patience:
    """While something takes longer than two seconds: a line now and then that says what is done."""

    def __init__(self, what: str, say: Callable[[str], None]):
        self.what = what
        self.say = say
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.tell, daemon=True)

    def tell(self) -> None:
        start = time.monotonic()
        wait = PATIENCE
        while not self.over.wait(wait):
            self.say(f"{self.what}, {time.monotonic() - start:.0f} s so far")
            wait *= 2

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


def look_at(given: dict[str, Frames], say: Callable[[str], None]) -> None:
    """Say which labels lack, where free atoms are, and what looks wrong, in the sets as given."""
    for what, frames in given.items():
        tell_labels(frames, f"of the {what} set", say)
        free = np.flatnonzero(free_atoms(frames))
        if what != "training" and len(free):
            say(f"note: {len(free)} free atoms of the {what} set stay there and are not trained "
                f"on, the first of them {frames[free[0]].info['source']}")
        with Patience(f"checking {len(frames)} frames of the {what} set", say):
            found = warnings(frames)
        for text in found:
            say(WARNING + text)


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


# ─── Command ──────────────────────────────────────────────────────────────────────────────────────


def shortest_distance(crystals: list[Atoms]) -> tuple[float, str]:
    """The shortest distance between two atoms (Å) and its frame; infinity if none is in 4 Å."""
    shortest = (np.inf, "")
    for atoms in crystals:
        halves = np.full(len(atoms), 0.5)  # the sum of two is 1 Å
        distance = suspicions.closest(atoms, halves, (0.25, 0.5, 1.0, 2.0, 3.0, 4.0))
        if distance < shortest[0]:
            shortest = (distance, atoms.info["source"])
    return shortest


def spread(values: np.ndarray, digits: int) -> str:
    """Smallest, median and largest, in words."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.{digits}f} to {high:.{digits}f}, median {middle:.{digits}f}"


def report(frames: Frames, doubts: Sequence[str] = ()) -> str:
    """A page on a data set: what it holds, from where to where its labels reach, what looks wrong.

    doubts: warnings of its files. Labels, groups and distances of more than 5000 frames are those
    of a sample, evenly spread.
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
    labels = some.labels().sum(0)  # frames with each
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
    for label, count in zip(TABLE, labels, strict=True):
        if not label.expected:
            lines.append(f"{label.name:<20}in {count} of {len(some)} frames")
    if stresses:
        lines.append(f"max |stress|, GPa   {spread(np.array(stresses), 2)}")

    distance, source = shortest_distance(crystals)
    if source:
        lines.append(f"shortest distance   {distance:.3f} Å, in {source}")
    else:
        lines.append("shortest distance   above 4 Å")

    found = [*doubts, *warnings(frames)]
    for text in found:
        lines.append(WARNING + text)
    if not found:
        lines.append("no warnings")
    return "\n".join(lines)


def add_names(parser: argparse.ArgumentParser) -> None:
    """The options that name labels."""
    for label in TABLE:
        parser.add_argument(f"--{label.name}", default="", help=name_help(label))


def names_in(options: argparse.Namespace) -> Names:
    """What they say."""
    return Names(*[getattr(options, name) for name in LABELS])


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, or 1 for bad input, which is said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m tools.frames", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or globs")
    add_names(parser)
    options = parser.parse_args(arguments)
    doubts = []

    def say(text: str) -> None:
        """Warnings belong on the page, notes do not."""
        if text.startswith(WARNING):
            doubts.append(text.removeprefix(WARNING))
        else:
            print_to_stderr(text)

    try:
        found = gather_files(expand(options.files), names_in(options), say=say)
        with Patience(f"looking at {len(found)} frames", print_to_stderr):
            page = report(found, doubts)
        print(page)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
