"""Any file to ase.Atoms as they stand in it: the one place that opens files, for every tool.

`read_atoms` reads what ASE reads, and JSON of pymatgen's structures. It asks for no labels and
checks none; tools.frames.iread makes frames of what it gives. What ASE would misunderstand is put
right or refused here: names that it takes for slices, patterns or addresses; sites that are
occupied in part; labels and elements that it fills in; keys of extended XYZ in small letters; files
of which it reads a part and says nothing; databases with numbers of 32 bits.
"""
from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.db.sqlite import SQLite3Database
from ase.io.extxyz import key_val_str_to_dict
from ase.io.formats import filetype, get_compression, open_with_compression

from tools.json_layouts import ORDERED_ONLY, open_text, structures_of_json
from tools.labels import BadInput

WARNING = "warning: "  # lines that begin so are errors with --strict

# labels that ASE's reader of a format fills in where the file has none
INVENTED = {"lammps-dump-text": ("energy",), "lammps-dump-binary": ("energy",)}

# names under which extended XYZ of others has its cell, which ASE takes from Lattice alone
CELLS = ("cell", "box", "unit_cell", "cell_vectors")

# what stands near the end of a calculation's output, if that has come to its end
LAST_WORDS = {"vasp-xml": "</modeling>", "vasp-out": "General timing and accounting"}

# NELM in both, and in an OUTCAR the iterations of the electrons, step(iteration)
MOST_ITERATIONS = re.compile(r'NELM(?: *=|">) *(\d+)')
ITERATION = re.compile(r"- Iteration +\d+\( *(\d+)\)")

# numbers that ASE's reader of a format does not turn into eV and Å
UNCONVERTED = {"qbox": "Hartree and Bohr", "dlp4": "10 J/mol/Å"}

# files of others: ending, or what is in a folder or at the beginning → what it is
FOREIGN = {
    "set.000": "a folder of deepmd; convert it to extxyz, for example with dpdata",
    "type.raw": "a folder of deepmd; convert it to extxyz, for example with dpdata",
    "BEGIN_CFG": "a file of MLIP's configurations, which ASE does not know; convert it to extxyz",
    ".npy": "one array of NumPy, as in a folder of deepmd; convert that folder to extxyz, for "
            "example with dpdata",
    ".npz": "arrays of NumPy, whose names and units differ from set to set; write them as extxyz",
    ".h5": "HDF5, whose names and units differ from set to set; write it as extxyz",
    ".hdf5": "HDF5, whose names and units differ from set to set; write it as extxyz",
    ".parquet": "a Parquet table; write its rows as extxyz",
    ".lmdb": "an LMDB database, as of fairchem; write its frames as extxyz",
    ".pkl": "a pickle, which may run code of others; write its frames as extxyz",
    ".pickle": "a pickle, which may run code of others; write its frames as extxyz",
    ".pckl": "a pickle, which may run code of others; write its frames as extxyz",
    ".gzip": "a compressed pickle, as of pacemaker, which may run code of others; write its frames "
             "as extxyz",
    ".pt": "a file of PyTorch; write its frames as extxyz",
}


def keep_quiet(text: str) -> None:
    """Say nothing."""


# ─── Kinds of files ───────────────────────────────────────────────────────────────────────────────


def plain_name(path: str) -> str:
    """The name in small letters, without the ending of a compressed file."""
    return get_compression(path.lower())[0]


def is_json(path: str) -> bool:
    """Whether this is JSON of pymatgen's structures, which tools.database converts.

    ASE's own JSON is not: ASE reads it.
    """
    return plain_name(path).endswith((".json", ".jsonl", ".ndjson")) and not is_ase_json(path)


def is_ase_json(path: str) -> bool:
    """Whether ase.io.write or `ase db` has written this JSON: rows under numbers, with arrays."""
    if not plain_name(path).endswith(".json") or not Path(path).is_file():
        return False
    with open_text(path) as file:
        begin = file.read(2 ** 16)
    return bool(re.match(r'\s*\{\s*"\d+"\s*:\s*\{', begin)) and '"__ndarray__"' in begin


def refuse_foreign(path: str) -> None:
    """Raise BadInput for a file that is not there, or that is of a kind that nobody reads here."""
    if not Path(path).exists():
        raise BadInput(f"{path}: no such file")
    found = Path(plain_name(path)).suffix
    if Path(path).is_dir():
        inside = os.listdir(path)
        found = next((name for name in FOREIGN if name in inside), "")
        if not found and "metadata.json" not in inside:  # which ASE's bundles of frames have
            raise BadInput(f"{path}: is a folder; name the files in it")
    elif found not in FOREIGN:
        with open_with_compression(path, "rb") as file:
            found = file.read(100).decode(errors="replace").strip().partition("\n")[0].strip()
    if found in FOREIGN:
        raise BadInput(f"{path}: is {FOREIGN[found]}")


# ─── Reading ──────────────────────────────────────────────────────────────────────────────────────


def read_atoms(path: str | Path, say: Callable[[str], None] = keep_quiet) -> Iterator[Atoms]:
    """Everything in a file, one structure after another, as it stands there.

    The name is that of a file, whatever characters are in it. Labels are where ASE's reader leaves
    them: in atoms.calc.results, info or arrays; those of JSON (pymatgen's structures) are not
    read. Constraints stay.

    say: told what is doubtful about the file, a line each. Raises BadInput: for a file that is not
    there, cannot be read, ends too early or holds nothing, and for a site that is shared or
    occupied in part.
    """
    path = str(path)
    count = 0
    try:
        refuse_foreign(path)
        for atoms in structures_of_json(path) if is_json(path) else atoms_of_ase(path, say):
            check_occupancies(atoms, f"{path}, frame {count}")
            yield atoms
            count += 1
    except Exception as error:  # whatever ASE's many readers stumble over
        raise in_one_sentence(error, path, count) from error
    if count == 0:
        raise BadInput(f"{path}: holds no structures")


def in_one_sentence(error: Exception, path: str, count: int) -> BadInput:
    """An exception of a reader, after so many frames."""
    if isinstance(error, BadInput):
        return error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    cure = "is it complete and in a format that ASE knows?"
    if "OUTCAR" in path:
        cure = "try the vasprun.xml of the same calculation;"
    return BadInput(f"{path}, frame {count}: cannot be read, {cure} ({reason})")


def atoms_of_ase(path: str, say: Callable[[str], None]) -> Iterator[Atoms]:
    """What ASE reads of a file, and what it would misunderstand put right."""
    name = plain_name(path)
    if name.endswith(".db") or is_ase_json(path):
        yield from rows_of(path)
        return

    # an absolute name is no option, no address of a server and no standard input
    full = os.path.abspath(path)
    kind = "extxyz" if name.endswith((".xyz", ".extxyz")) else filetype(full)
    options = {"properties_parser": comment_line} if kind == "extxyz" else {}
    if kind == "extxyz":
        refuse_gaps(path)
    if kind == "res":
        full = glob.escape(full)  # whose reader takes the name for a pattern

    images = ase.io.iread(full, index=":", format=kind, do_not_split_by_at_sign=True, **options)
    counts = counts_of_dump(path) if kind == "lammps-dump-text" else None
    for i, atoms in enumerate(images):
        if i == 0:
            tell_doubts(atoms, kind, path, say)
            tell_early_end(kind, path, say)
        if counts and (count := next(counts)) != len(atoms):
            raise EOFError(f"{count} atoms are announced, {len(atoms)} are there")
        for label in INVENTED.get(kind, ()):
            if atoms.calc is not None:
                atoms.calc.results.pop(label, None)
        yield atoms


# ─── What ASE would misunderstand ─────────────────────────────────────────────────────────────────


def check_occupancies(atoms: Atoms, source: str) -> None:
    """Raise BadInput for a crystal that is disordered: readers tell occupancies, and go on."""
    values = []

    # CIF: {kind of site: {element: occupancy}}
    kinds = atoms.info.get("occupancy")
    for site in kinds.values() if isinstance(kinds, dict) else ():
        if len(site) > 1:
            raise BadInput(f"{source}: a site is shared by several elements; {ORDERED_ONLY}")
        values += site.values()

    # others have a number for each atom; where nobody filled it in, it is zero
    for name in ("occupancy", "occupancies"):
        values += [value for value in atoms.arrays.get(name, ()) if value]
    for value in values:
        if abs(value - 1) > 1e-6:
            raise BadInput(f"{source}: a site is occupied to {value:g}; {ORDERED_ONLY}")


def refuse_gaps(path: str) -> None:
    """Raise BadInput for extended XYZ that goes on behind an empty line, where ASE ends."""
    with open_with_compression(path) as file:
        line = file.readline()
        frame = 0
        while line.strip().isdigit():
            for _ in islice(file, int(line) + 1):
                pass
            line = file.readline()
            while line.lstrip().startswith("VEC"):
                line = file.readline()
            frame += 1
        if not line.strip() and any(rest.strip() for rest in file):
            raise BadInput(f"{path}, frame {frame}: stands behind an empty line, where ASE ends "
                           f"reading; remove that line")


def counts_of_dump(path: str) -> Iterator[int]:
    """How many atoms each frame of a dump of LAMMPS should have; ASE takes those that there are."""
    with open_with_compression(path) as file:
        for line in file:
            if line.startswith("ITEM: NUMBER OF ATOMS"):
                yield int(next(file, "0"))


def tell_doubts(atoms: Atoms, kind: str, path: str, say: Callable[[str], None]) -> None:
    """Say it if elements are nothing but the numbers of LAMMPS' types, if units are doubtful, and
    if a cell has a name that ASE does not know.

    atoms: the first of the file. Raises BadInput for a dump that names its units, and ASE ignores
    them.
    """
    named = atoms.has("masses")  # of lammps-data: elements are told from them
    if kind == "lammps-dump-text":
        lines = header_of_dump(path)
        columns = lines[-1].split()
        named = "element" in columns or "mass" in columns
        units = lines[lines.index("ITEM: UNITS") + 1] if "ITEM: UNITS" in lines else "metal"
        if units != "metal":
            raise BadInput(f"{path}: is a dump in units {units}; ASE takes all for metal (Å, eV): "
                           f"write it again, or convert it")
    if kind in UNCONVERTED and atoms.calc is not None:
        say(f"{WARNING}{path}: ASE takes the numbers as they are, which may be in "
            f"{UNCONVERTED[kind]}: convert them")
    cells = [str(name) for name in atoms.info if str(name).lower() in CELLS]
    if kind == "extxyz" and atoms.cell.rank == 0 and cells:
        say(f"{WARNING}{path} has {', '.join(cells)}, but no Lattice, which is the name of a cell "
            f"in extended XYZ: its frames are read without a cell, as molecules")
    if kind.startswith("lammps-d") and not named:
        say(f"{WARNING}{path} has no names of elements; ASE takes the types 1, 2, … for H, He, …, "
            f"so that this is {atoms.symbols.formula.format('reduce')}: dump the column element")


def tell_early_end(kind: str, path: str, say: Callable[[str], None]) -> None:
    """Say it if a calculation of VASP was stopped, or if its electrons did not converge.

    ASE reads all steps that are whole. VASP 5 writes "EDIFF is reached" even if it is not.
    """
    words = LAST_WORDS.get(kind)
    if words is None:
        return

    # How many iterations the electrons took in each step, and how many they may
    most = 0
    taken = [0]
    ended = False
    with open_with_compression(path) as file:
        for line in file:
            ended = ended or words in line
            if found := MOST_ITERATIONS.search(line):
                most = int(found[1])
            elif found := ITERATION.search(line):
                taken += [0] if found[1] == "1" else []
                taken[-1] = int(found[1])
            elif kind == "vasp-xml":
                taken += [0] * line.count("<calculation")
                taken[-1] += line.count("<scstep")

    if not ended:
        say(f"note: {path} ends before its calculation has; the steps that are whole are read")
    beyond = sum(n >= most for n in taken[1:]) if most > 1 else 0  # 1: there is nothing to iterate
    if beyond:
        say(f"{WARNING}{path}: in {beyond} of {len(taken) - 1} steps the electrons had not "
            f"converged after {most} iterations (NELM): their energies and forces are no labels")


def header_of_dump(path: str) -> list[str]:
    """The lines of a dump of LAMMPS up to the one that names the columns."""
    lines = []
    with open_with_compression(path) as file:
        for line in file:
            lines.append(line.strip())
            if line.startswith("ITEM: ATOMS"):
                return lines
    raise EOFError("the dump ends before its atoms")


# a key that stands before a value of nothing, a value in quotes or brackets (left alone), a key
WORDS = re.compile(r"""(?P<empty>=\s*(?:""|''|\{\}|\[\])(?=\s|$)|=\s*$|=(?=\s+[^\s=]+\s*=))"""
                   r"""|"(?:\\.|[^"\\])*"|'[^']*'|\{[^}]*\}|\[[^]]*\]"""
                   r"""|(?P<key>[^\s="'{\[]+)(?=\s*=)""")
NAMES = ("Lattice", "Properties", "pbc")
NINE = ("Stress", "Virial")  # ASE reads these in small letters, and only if they have nine numbers


def comment_line(line: str) -> dict:
    """The second line of a frame in extended XYZ → {key: value}, as ASE's reader wants it.

    Lattice, Properties and pbc are taken in any capitals: GPUMD writes small ones. So are the
    columns species and pos. A key without a value (`config_type= energy=-1`) has none; ASE would
    give it the next key. Six numbers of stress or virial get a name that ASE does not know.
    """
    there = {found["key"] for found in WORDS.finditer(line)}

    def parsed(names: tuple[str, ...]) -> dict:
        right = {name.lower(): name for name in names if name not in there}

        def corrected(found: re.Match) -> str:
            if found["empty"]:
                return r'="_JSON \"\""'
            return right.get((found["key"] or "").lower(), found[0])

        return key_val_str_to_dict(WORDS.sub(corrected, line))

    try:
        info = parsed(NAMES)
    except ValueError:
        info = parsed(NAMES + NINE)

    # the columns that every frame has
    if isinstance(info.get("Properties"), str):
        info["Properties"] = re.sub(r"\b(species|pos)(?=:)", lambda found: found[0].lower(),
                                    info["Properties"], flags=re.IGNORECASE)
    return info


class Rows(SQLite3Database):
    """An ASE database whose arrays may have numbers of 32 bits, which ASE writes but misreads."""

    def deblob(self, buf, dtype=float, shape=None):
        """The array, [N, 3] if a shape is asked for; without one, what has no 64 bits."""
        if dtype is float and shape == (-1, 3) and len(buf or b"") == 12 * self.atoms:
            return np.frombuffer(buf, "<f4").reshape(shape).astype(float)
        array = super().deblob(buf, dtype, shape)
        if dtype is np.int32 and shape is None:
            self.atoms = len(array)  # the atomic numbers come first
        return array


def rows_of(path: str) -> Iterator[Atoms]:
    """A database of others, also ASE's JSON: labels may be among key-value pairs or data."""
    options = {"use_lock_file": False, "serial": True}
    if not plain_name(path).endswith(".db"):
        with open_text(path) as file:
            yield from atoms_of(ase.db.connect(file, type="json", **options))
        return
    with Rows(os.path.abspath(path), **options) as database:
        if not database.metadata.get("facet", {}).get("complete", True):
            raise BadInput(f"{path}: is not complete; give the command that makes it once more")
        yield from atoms_of(database)


def atoms_of(database) -> Iterator[Atoms]:
    """The structures of its rows."""
    for row in database.select():
        atoms = row.toatoms()
        atoms.info.update(row.key_value_pairs)
        atoms.info.update(row.data)
        stress = row.get("stress")
        if stress is not None and stress.size == 3:  # six numbers of 32 bits
            atoms.calc.results["stress"] = stress.view("<f4").astype(float)
        yield atoms
