"""Train a Facet, test it, draw what it learned; leave it running overnight.

    python train_small.py                                   # embedded data (EMT metals), 2 to 3 minutes on 2 CPU cores
    python train_small.py --train si_train.extxyz --test si_test.extxyz --name si          # 10 minutes on 2 CPU cores
    python train_small.py --train MPtrj_2022.9_full.json --species all --channels 64 --minutes 6000 --name mptrj
    torchrun --nproc_per_node=4 train_small.py --train …    # four GPUs (or four processes on CPU), the same global batches
    python train_small.py --resume runs/si                  # goes on where a kill, Ctrl-C or a full disk stopped it

Reads what ASE reads (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz, globs) with energy (eV), forces (eV/Å) and, if there,
stress (eV/Å³); JSON in the layout of MPtrj, of any size; and lists of pymatgen-style structures. Writes to runs/<name>/:
model.pt, checkpoint.pt, metrics.csv, result.json, report.png. `--minutes` is a budget: the learning rate follows the clock
and is down to zero when it is spent; `--steps` counts steps instead, for runs that can be repeated bit by bit.
"""
from __future__ import annotations

import argparse
import copy
import csv
import errno
import glob
import gzip
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import ase.build
import ase.io
import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.spatial.transform import Rotation
from torch.nn.functional import smooth_l1_loss

import facet

KBAR = -0.1 * units.GPa  # VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³
MPTRJ = [s for s in chemical_symbols[1:95] if s not in ("Po", "At", "Rn", "Fr", "Ra")]  # the 89 elements of MPtrj


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter, and what the command line shows of it."""
    train: tuple[str, ...] = setting((), "files or globs to train on; none: an embedded set of EMT metals")
    test: tuple[str, ...] = setting((), "files or globs to test on; none: a tenth of the training materials, set aside")
    name: str = setting("", "results go to runs/NAME; by default the name of the training file, and never over old results")
    minutes: float = setting(0.0, "training time; 0: 9.5, or 1.75 for the embedded set")
    steps: int = setting(0, "number of steps, instead of minutes")
    epochs: float = setting(40.0, "with --minutes: at most so many times through the data, so that a small set is not learned by heart")
    seed: int = setting(0, "of the weights, the order of the data and the split")
    device: str = setting("", "cpu, cuda, cuda:1, …; by default cuda if there is one")
    threads: int = setting(0, "CPU threads; 0: as PyTorch chooses")
    workers: int = setting(-1, "processes that make neighbour lists; -1: none while the lists fit in memory, else all cores but one")
    energy: str = setting("", "name of the energy in the files; by default corrected_total_energy in MPtrj's JSON, else energy")
    forces: str = setting("", "name of the forces; by default force in MPtrj's JSON, else forces")
    stress: str = setting("", "name of the stress (or, if virial is in the name, of the virial in eV); by default stress")
    E0: str = setting("", "energies of free atoms in eV, such as Si=-0.79,O=-1.56; those not given are fitted to the data")
    species: str = setting("", "elements the model shall know, such as Si,O, or all for the 89 of MPtrj; by default those of the data")
    cutoff: float = setting(5.0, "Å, how far an atom sees in one layer")
    degree: int = setting(2, "L, highest degree of the features")
    channels: int = setting(32, "C, copies of every feature")
    groups: int = setting(8, "B, groups of channels with radial functions of their own")
    layers: int = setting(3, "T, number of message-passing layers")
    splines: int = setting(24, "R, B-splines per radial function")
    activation: str = setting("product", "of the grid layer: product or silu")
    batch_atoms: int = setting(0, "atoms per step at mean density (what is bounded are neighbours, so memory); 0: ten structures, at most 256")
    lr: float = setting(5e-3, "highest learning rate of AdamW; warm-up, then a cosine to zero")
    weight_decay: float = setting(1e-3, "of AdamW")
    muon_lr: float = setting(1e-2, "highest learning rate of Muon, which trains the matrices that mix paths")
    muon_decay: float = setting(1.0, "weight decay of Muon, against learning the training set by heart")
    clip: float = setting(1.0, "longest gradient allowed")
    ema: float = setting(0.99, "averaging of the weights; the averaged ones are tested and saved")
    energy_start: float = setting(0.05, "weight of the energy loss at first …")
    energy_end: float = setting(1.0, "… and in the end; forces have weight 1")
    stress_weight: float = setting(0.1, "weight of the stress loss; 0: stress labels are not used")
    huber: float = setting(0.1, "errors beyond this fraction of the force RMS count linearly")
    save_minutes: float = setting(5.0, "a checkpoint at least this often, and with every line of the log")
    overfit: int = setting(0, "train and test on the first N structures only: errors must go to zero, or something is wrong")


class BadInput(ValueError):
    """Input that cannot be used; the message names file, frame and cure."""


class Team(NamedTuple):
    """The processes that train together: which one this is, and how many there are. The first one speaks and writes."""
    rank: int = 0
    size: int = 1

    def say(self, *words) -> None:
        if self.rank == 0:
            print(*words, flush=True)


ALONE = Team()


# ─── Data: files to records ────────────────────────────────────────────────────────────────────────────────────────────

class Record(NamedTuple):
    """One labelled structure as it was read."""
    numbers: np.ndarray                 # [N]
    positions: np.ndarray               # [N, 3] Å
    cell: np.ndarray                    # [3, 3] Å, rows
    pbc: np.ndarray                     # [3]
    energy: float                       # eV
    forces: np.ndarray                  # [N, 3] eV/Å
    stress: np.ndarray | None           # [3, 3] eV/Å³
    name: str                           # within its file
    material: str                       # frames of one material stay on one side of a split


def read_ase(path: str, s: Settings) -> Iterator[Record]:
    """Frames of any file that ASE reads; consecutive frames of one formula count as one material.

    Labels are taken as they stand in the file, under ASE's names or any other: constraints, which would set forces of
    fixed atoms to zero, are ignored.
    """
    run, formula = 0, None
    for i, atoms in enumerate(ase.io.iread(path, index=":")):
        found = {**atoms.info, **atoms.arrays, **(atoms.calc.results if atoms.calc else {})}
        for name in (s.energy or "energy", s.forces or "forces"):
            if found.get(name) is None:
                raise BadInput(f"{path}, frame {i}: has no {name}; a frame needs energy and forces, under the names that ASE gives "
                               f"them or under those of --energy and --forces")
        stress = found.get(s.stress or "stress")
        if stress is not None:
            stress = np.reshape(stress, (3, 3)) if np.size(stress) == 9 else voigt_6_to_full_3x3_stress(stress)
            stress = -stress / atoms.get_volume() if "virial" in s.stress else stress
        run, formula = run + (str(atoms.symbols) != formula), str(atoms.symbols)
        yield Record(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, float(found[s.energy or "energy"]),
                     np.array(found[s.forces or "forces"]), stress, str(i), str(run))


def stream(file, size: int = 2 ** 22) -> Iterator[tuple[list[str], dict]]:
    """The objects in [{…}, …] or {key: {key: {…}, …}, …} one after another, each with its keys; never the whole text at once.

    JSON is read from one buffer. A value that is cut off by the buffer's end is tried again with twice as much text.
    """
    decoder, text, at, keys, depth = json.JSONDecoder(), file.read(size), 0, [], 0

    def decode():
        nonlocal text, at
        more = size
        while True:
            try:
                value, at = decoder.raw_decode(text, at)
                return value
            except json.JSONDecodeError:
                new = file.read(more)
                if not new:
                    raise
                text, at, more = text[at:] + new, 0, 2 * more

    def next_token() -> str:
        nonlocal text, at
        while True:
            while at < len(text) and text[at] in " \t\r\n,:":
                at += 1
            if at < len(text):
                return text[at]
            text, at = file.read(size), 0
            if not text:
                return ""
    array = next_token() == "["
    while (token := next_token()):
        if token in "]}":
            at, depth = at + 1, depth - 1
            del keys[max(depth - 1, 0):]
            if depth == 0:
                return
        elif array and depth == 1 or depth == 2 and len(keys) == 2:
            yield keys, decode()
            del keys[1:]
        elif token in "[{":
            at, depth = at + 1, depth + 1
        else:
            keys.append(decode())
            if len(keys) == 2 and next_token() != "{":
                raise ValueError(f"{keys[0]}, {keys[1]} is no structure; MPtrj has {{material: {{frame: {{…}}}}}}")
    raise EOFError("the file ends too early")


def read_json(path: str, s: Settings) -> Iterator[Record]:
    """Frames of {material: {frame: {structure, corrected_total_energy, force, stress (kbar)}}}, the layout of MPtrj, or of a list
    [{structure, energy, forces, virial_stress (kbar, xx yy zz xy yz zx)}], as in mlearn, labels perhaps under "outputs".
    """
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for i, (keys, frame) in enumerate(stream(file)):
            name = keys[-1] if keys else str(i)
            labels = {**frame, **frame.get("outputs", {})}
            energy, forces, stress = (next((labels[key] for key in ([given] if given else usual) if labels.get(key) is not None), None)
                                      for given, usual in ((s.energy, ("corrected_total_energy", "energy")), (s.forces, ("force", "forces")),
                                                           (s.stress, ("stress", "virial_stress"))))
            for what, value in (("structure", frame.get("structure")), (s.energy or "energy", energy), (s.forces or "forces", forces)):
                if value is None:
                    raise BadInput(f"{path}, frame {name}: has no {what}; it has {', '.join(labels)}")
            cell, sites = np.array(frame["structure"]["lattice"]["matrix"], float), frame["structure"]["sites"]
            if any(len(site["species"]) != 1 for site in sites):
                raise BadInput(f"{path}, frame {name}: a site is shared by several elements; only ordered crystals can be trained on")
            numbers = np.array([atomic_numbers[site["species"][0]["element"]] for site in sites])
            positions = np.array([site["xyz"] for site in sites] if "xyz" in sites[0] else [site["abc"] for site in sites] @ cell)
            if stress is not None:
                xx, yy, zz, xy, yz, zx = stress if len(stress) == 6 else [None] * 6
                stress = KBAR * np.array(stress if xx is None else [[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])
            yield Record(numbers, positions, cell, np.ones(3, bool), float(energy), np.array(forces, float), stress, name,
                         keys[0] if keys else str(frame.get("group", "")) + str(frame.get("description", i)))


def check(record: Record, path: str) -> Record:
    """The record, if its numbers can be trained on. Raises BadInput."""
    name, N = f"{path}, frame {record.name}", len(record.numbers)
    if N == 0:
        raise BadInput(f"{name}: has no atoms")
    for label, value in (("an energy", record.energy), ("a force", record.forces), ("a position", record.positions), ("a cell vector", record.cell)):
        if not np.isfinite(value).all():
            raise BadInput(f"{name}: {label} is NaN or infinite; remove the frame or compute it again")
    if record.forces.shape != (N, 3) or record.positions.shape != (N, 3):
        raise BadInput(f"{name}: {N} atoms, but forces of shape {record.forces.shape}")
    if record.stress is not None:
        if np.isinf(record.stress).any() or np.isnan(record.stress).any() and not np.isnan(record.stress).all():
            raise BadInput(f"{name}: a component of the stress is NaN or infinite; remove the frame or compute it again")
        if np.abs(record.stress).max() > 1 and ".json" not in path:  # units of JSON are known
            raise BadInput(f"{name}: a stress of {np.abs(record.stress).max():.0f} eV/Å³ looks like kbar; multiply VASP's kbar by "
                           f"{KBAR:.4e} to get ASE's eV/Å³, or leave stress out with --stress_weight 0")
    return record


# ─── Data: records to flat arrays ──────────────────────────────────────────────────────────────────────────────────────

COLUMNS = {  # of a table: dtype, shape of a row; the first three have a row per atom, the last one per letter, others per frame
    "numbers": ("u1", ()), "positions": ("f8", (3,)), "forces": ("f4", (3,)),
    "cell": ("f8", (3, 3)), "pbc": ("?", (3,)), "energy": ("f8", ()), "stress": ("f4", (3, 3)),
    "material": ("i4", ()), "atoms_end": ("i8", ()), "name_end": ("i8", ()), "name": ("u1", ())}
BLOCK = 5000                            # frames that are packed at a time
CACHED = 10 ** 8                        # bytes of a JSON file from which on it is converted once, to flat arrays on the disk


def pack(records: Iterable[Record], path: str) -> Iterator[dict[str, np.ndarray]]:
    """Checked records as tables of flat arrays, block by block; counts go on from block to block."""
    records, materials, atoms_end, name_end = iter(records), {}, 0, 0
    while block := [check(record, path) for record in islice(records, BLOCK)]:
        names = [record.name.encode() for record in block]
        rows = {"numbers": np.concatenate([r.numbers for r in block]), "positions": np.concatenate([r.positions for r in block]),
                "forces": np.concatenate([r.forces for r in block]), "cell": [r.cell for r in block], "pbc": [r.pbc for r in block],
                "energy": [r.energy for r in block], "stress": [np.full((3, 3), np.nan) if r.stress is None else r.stress for r in block],
                "material": [materials.setdefault(r.material, len(materials)) for r in block],
                "atoms_end": atoms_end + np.cumsum([len(r.numbers) for r in block]), "name_end": name_end + np.cumsum([*map(len, names)]),
                "name": np.frombuffer(b"".join(names), "u1")}
        atoms_end, name_end = rows["atoms_end"][-1], rows["name_end"][-1]
        yield {key: np.asarray(value, COLUMNS[key][0]) for key, value in rows.items()}


def convert(path: str, folder: Path, origin: dict, s: Settings) -> None:
    """Stream a JSON file into raw arrays in `folder`, in little memory. The folder gets its name when it is whole and on the
    disk: an interrupted conversion leaves only a folder with another name, which the next one removes."""
    for leftover in folder.parent.glob(f"{folder.name}.part*"):
        shutil.rmtree(leftover)
    part, start, frames = Path(f"{folder}.part{os.getpid()}"), time.perf_counter(), 0
    part.mkdir(parents=True)
    files = {key: open(part / key, "wb") for key in COLUMNS}
    try:
        for table in pack(read_json(path, s), path):
            for key, rows in table.items():
                files[key].write(rows.tobytes())
            frames += len(table["energy"])
            print(f"\r{path}: {frames} frames converted, {frames / (time.perf_counter() - start):.0f} frames/s → {folder}", end="", flush=True)
        print()
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        (part / "whole.json").write_text(json.dumps({**origin, "bytes": {key: (part / key).stat().st_size for key in COLUMNS}}))
        part.rename(folder)
    finally:
        for file in files.values():
            file.close()
        shutil.rmtree(part, ignore_errors=True)


def mapped(path: str, out: Path, s: Settings) -> dict[str, np.ndarray]:
    """The table of a large JSON file, mapped from its cache beside it (under `out` if that folder cannot be written)."""
    stat, keys = os.stat(path), [s.energy, s.forces, s.stress]
    origin = {"format": 1, "size": stat.st_size, "modified": stat.st_mtime, "labels": keys}
    beside = Path(path).parent if os.access(Path(path).parent, os.W_OK) else out
    folder = beside / f"{Path(path).name}.cache{zlib.crc32(json.dumps([keys, os.path.abspath(path)]).encode()):08x}"
    try:
        whole = json.loads((folder / "whole.json").read_text())
        fits = {**origin, "bytes": {key: (folder / key).stat().st_size for key in COLUMNS}} == whole
    except (OSError, ValueError):
        fits = False
    if not fits:
        shutil.rmtree(folder, ignore_errors=True)
        convert(path, folder, origin, s)
    def column(key):
        dtype, shape = COLUMNS[key]
        return np.memmap(folder / key, dtype, "r").reshape(-1, *shape)
    return {key: column(key) for key in COLUMNS}


@dataclass
class Frame:
    """One labelled structure, looked at."""
    atoms: Atoms
    energy: float                       # eV
    forces: np.ndarray                  # [N, 3] eV/Å
    stress: np.ndarray                  # [3, 3] eV/Å³; nan where there is none
    name: str                           # file and frame, for messages
    material: int                       # the same number: the same material


class Frames(Sequence):
    """Labelled structures in flat arrays, in memory or mapped from the disk: millions cost nothing until they are looked at."""

    def __init__(self, tables: list[tuple[str, dict]], rows: np.ndarray | None = None):
        """tables: path and flat arrays; rows [F, 2]: table and row of each frame, by default all."""
        self.tables = tables
        self.rows = rows if rows is not None else np.concatenate(
            [np.stack([np.full(len(t["energy"]), n), np.arange(len(t["energy"]))], 1) for n, (_, t) in enumerate(tables)])
        self.graphs: dict[int, facet.Neighbours] | None = None  # neighbours of each frame, if they are kept
        self.config: facet.Config | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        n, row = self.rows[i]
        path, table = self.tables[n]
        def part(end, *columns):
            here = slice(table[end][row - 1] if row else 0, table[end][row])
            return [np.array(table[column][here]) for column in columns]
        numbers, positions, forces = part("atoms_end", "numbers", "positions", "forces")
        name, = part("name_end", "name")
        return Frame(Atoms(numbers, positions, cell=table["cell"][row], pbc=table["pbc"][row]), float(table["energy"][row]),
                     forces, np.array(table["stress"][row]), f"{path}, frame {name.tobytes().decode()}", int(table["material"][row]))

    def take(self, chosen) -> Frames:
        """Some of the frames, as Frames."""
        some = Frames(self.tables, self.rows[chosen])
        some.config = self.config
        some.graphs = None if self.graphs is None else {k: self.graphs[i] for k, i in enumerate(chosen) if i in self.graphs}
        return some

    def gather(self, look, dtype, shape=()) -> np.ndarray:
        """What look(table, rows) finds for every frame, [F, …]."""
        out = np.empty((len(self), *shape), dtype)
        for n, (_, table) in enumerate(self.tables):
            here = self.rows[:, 0] == n
            out[here] = look(table, self.rows[here, 1])
        return out

    def column(self, key: str) -> np.ndarray:
        """A column that has a row per frame, [F, …]."""
        return self.gather(lambda table, rows: table[key][rows], *COLUMNS[key])

    def atoms(self) -> np.ndarray:
        """Atoms of every frame, [F]."""
        return self.gather(lambda table, rows: table["atoms_end"][rows] - np.where(rows > 0, table["atoms_end"][rows - 1], 0), int)

    def counts(self, numbers: np.ndarray) -> np.ndarray:
        """Atoms of each element, [F, Z]."""
        def look(table, rows):
            first = np.concatenate([[0], table["atoms_end"][:-1]])
            return np.stack([np.add.reduceat(table["numbers"] == number, first, dtype=np.int16)[rows] for number in numbers], 1)
        return self.gather(look, np.int16, (len(numbers),))

    def graph(self, i: int) -> facet.Neighbours:
        """Neighbours of a frame, made now or kept. Raises BadInput for a geometry that cannot be used."""
        if self.graphs is not None and i in self.graphs:
            return self.graphs[i]
        frame = self[i]
        try:
            graph = facet.find_neighbours(frame.atoms, self.config)
        except ValueError as error:
            raise BadInput(f"{frame.name}: {error}") from None
        if self.graphs is not None:
            self.graphs[i] = graph
        return graph


def read(patterns: Sequence[str], s: Settings = Settings(), out: Path = Path("runs")) -> Frames:
    """All frames of files and globs, checked. Raises BadInput."""
    tables = []
    for pattern in patterns:
        paths = sorted(path for path in glob.glob(pattern) if not Path(path).is_dir()) if not Path(pattern).exists() else [pattern]
        if not paths:
            raise BadInput(f"{pattern}: no such file")
        for path in paths:
            is_json = path.removesuffix(".gz").endswith(".json")
            try:
                if is_json and os.stat(path).st_size > CACHED:
                    table = mapped(path, out, s)
                else:
                    blocks = list(pack((read_json if is_json else read_ase)(path, s), path))
                    table = {key: np.concatenate([block[key] for block in blocks]) for key in COLUMNS} if blocks else None
            except (BadInput, KeyboardInterrupt):
                raise
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES):
                    raise BadInput(f"{path}: its cache cannot be written or the file not read ({error.strerror})") from error
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise BadInput(f"{path}: cannot be read, is it complete and in a format that ASE knows? ({reason})") from error
            if table is None or not len(table["energy"]):
                raise BadInput(f"{path}: holds no structures")
            if s.stress_weight == 0:
                table["stress"] = np.broadcast_to(np.float32(np.nan), table["stress"].shape)
            tables.append((path, table))
    return Frames(tables)


def split(frames: Frames, seed: int) -> tuple[Frames, Frames]:
    """A tenth of the materials (of the frames, if there are few materials) is set aside for testing."""
    key = frames.rows[:, 0] * 2 ** 32 + frames.column("material")
    if len(np.unique(key)) < 10:
        key = np.arange(len(frames))
    names = np.random.default_rng(seed).permutation(np.unique(key))
    held = np.isin(key, names[:max(1, len(names) // 10)])
    if held.all():
        raise BadInput(f"{frames[0].name}: one structure cannot be split in training and test; give more, or --test")
    return frames.take(np.flatnonzero(~held)), frames.take(np.flatnonzero(held))


# ─── The embedded set: EMT metals ──────────────────────────────────────────────────────────────────────────────────────

METALS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}  # fcc lattice constants, Å
HELD_OUT = "Cu3Au"  # no crystal of this composition is in the set: it is relaxed in the end


def random_crystal(rng: np.random.Generator) -> Atoms:
    """One of the metals or a random alloy of two: strained, rattled, at times with a vacancy or a surface."""
    metals = rng.choice(list(METALS), rng.integers(1, 3), replace=False)
    structure = rng.choice(["fcc", "fcc", "bcc", "hcp"])
    volume = np.mean([METALS[m] ** 3 / 4 for m in metals])  # Å³ per atom
    a = (volume * {"fcc": 4, "bcc": 2, "hcp": np.sqrt(2)}[structure]) ** (1 / 3)
    shape, repeat = ({"covera": np.sqrt(8 / 3)}, (2, 2, 1)) if structure == "hcp" else ({"cubic": True}, (2, 1, 1))
    atoms = ase.build.bulk("Cu", structure, a=a, **shape) * (repeat if structure != "bcc" else (2, 2, 1))
    atoms.symbols = rng.choice(metals, len(atoms))
    if rng.random() < 0.15:
        del atoms[rng.integers(len(atoms))]
    if rng.random() < 0.15:
        atoms.center(vacuum=rng.uniform(2, 5), axis=2)
    strain = rng.normal(0, 0.015, (3, 3)) + rng.normal(0, 0.025) * np.eye(3)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rng.choice([0.02, 0.08, 0.15]), (len(atoms), 3))
    return atoms


def embedded_set(out: Path, count: int = 1000) -> Frames:
    """Random crystals labelled by ASE's EMT calculator, made once and kept in runs/emt.extxyz."""
    path = out / "emt.extxyz"
    if not path.exists():
        print(f"making {count} random crystals of {' '.join(METALS)}, labelled by EMT → {path}", flush=True)
        rng, images = np.random.default_rng(0), []
        while len(images) < count:
            atoms = random_crystal(rng)
            if atoms.symbols.formula.reduce()[0].format("hill") == Atoms(HELD_OUT).symbols.formula.format("hill"):
                continue
            atoms.calc = EMT()
            if np.abs(atoms.get_forces()).max() < 5 and np.isfinite(atoms.get_stress()).all():
                images.append(atoms)
        part = out / "emt.part.extxyz"
        ase.io.write(part, images)
        os.replace(part, path)
    return read((str(path),))

# ─── Statistics of the training set ────────────────────────────────────────────────────────────────────────────────────

KEPT = 10 ** 7                          # neighbours, of training and test set together, that are kept in memory: about 0.5 GB
SAMPLE = 5000                           # frames that stand for all where looking at each would take too long


def sample(frames: Frames, count: int = SAMPLE) -> Frames:
    """At most `count` frames, evenly spread."""
    return frames.take(np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)))


def suspicions(frames: Frames) -> list[str]:
    """What looks wrong with units or labels, in words."""
    some, found = sample(frames), []
    numbers = np.unique(np.concatenate([frame.atoms.numbers for frame in some]))
    counts, energy = some.counts(numbers).astype(float), some.column("energy")  # [F, Z], [F]
    atoms = counts.sum(1)  # [F]

    def unexplained(y):
        return np.std(y - counts / atoms[:, None] @ np.linalg.lstsq(counts / atoms[:, None], y, rcond=None)[0])
    if np.ptp(atoms) > 0.5 * atoms.min() and unexplained(energy) < 0.5 * unexplained(energy / atoms):
        found.append(f"the energies ({energy[0]:.3f} eV for {atoms[0]:.0f} atoms in {some[0].name}) do not grow with the number of "
                     "atoms: are they energies per atom? Totals are meant")
    net = np.array([np.abs(frame.forces.sum(0)).max() for frame in some]) / np.sqrt(atoms)  # [F] eV/Å
    limit = 0.02 + 0.1 * np.sqrt(np.mean([np.mean(frame.forces ** 2) for frame in some]))
    if (net > limit).any():
        found.append(f"in {(net > limit).sum()} of {len(some)} frames the forces do not sum to zero, most of all in {some[int(net.argmax())].name} "
                     f"(sum {net.max() * np.sqrt(atoms[net.argmax()]):.2f} eV/Å): were constraints applied to them?")
    stress = np.abs(some.column("stress")).max((1, 2))
    if np.nanmax(stress, initial=0) > 1:
        found.append(f"stresses reach {np.nanmax(stress):.1f} eV/Å³ in {some[int(np.nanargmax(stress))].name}; is that frame sound?")
    return found


def reference_energies(frames: Frames, numbers: np.ndarray, given: dict[int, float]) -> np.ndarray:
    """E0 per species, eV: the part of the energy that composition alone explains, by least squares over all frames.

    Given energies stay, and where the data hold a free atom its energy is E0: nothing else is the limit of large distances.
    """
    counts, energy = frames.counts(numbers), frames.column("energy")  # [F, Z], [F]
    atoms = counts.sum(1)  # [F]
    for i in np.flatnonzero((atoms == 1) & ~frames.column("pbc").any(1)):
        given = {int(frames[int(i)].atoms.numbers[0]): float(energy[i]), **given}
    known = np.isin(numbers, list(given))
    E0 = np.array([given.get(int(number), 0.0) for number in numbers])  # [Z]
    squares, right, free = np.zeros((len(numbers), len(numbers))), np.zeros(len(numbers)), ~known
    for part in np.array_split(np.arange(len(frames)), 1 + len(frames) // 100_000):
        share = counts[part] / atoms[part, None]  # [F, Z] every frame counts the same, whatever its size
        squares += share.T @ share
        right += share.T @ (energy[part] / atoms[part] - share @ E0)
    E0[free], _, rank, _ = np.linalg.lstsq(squares[np.ix_(free, free)], right[free], rcond=1e-9) if free.any() else (0, 0, 0, 0)
    if rank < min(free.sum(), (counts.sum(0)[free] > 0).sum()):
        print(f"note: these compositions determine only {rank} of {free.sum()} reference energies; the smallest are taken")
    return E0


def core_radii(shortest: dict[tuple[int, int], float], numbers: np.ndarray) -> np.ndarray:
    """Å per species: ρ_i + ρ_j stays below the shortest distance of i and j in the data, so the core is zero wherever there are data."""
    R = covalent_radii[numbers]  # [Z]
    radii = 0.85 * R  # with 0.75, as Config has it, two silicon atoms attract each other a little at its edge
    for (i, j), d in shortest.items():
        for z in (i, j):
            radii[z] = min(radii[z], 0.97 * d * R[z] / (R[i] + R[j]))
    return radii


def configure(train: Frames, test: Frames, s: Settings) -> facet.Config:
    """Config with the statistics of the training set; from now on the frames know their neighbours. Raises BadInput."""
    found = np.unique(np.concatenate([np.flatnonzero(np.bincount(table["numbers"])) for _, table in train.tables]))
    found = found[train.counts(found).any(0)]  # a table may hold test frames, too
    symbols = {"": [chemical_symbols[z] for z in found], "all": MPTRJ}.get(s.species) or s.species.split(",")
    try:
        given = {atomic_numbers[pair.split("=")[0]]: float(pair.split("=")[1]) for pair in s.E0.split(",") if pair}
        numbers = np.array(sorted(atomic_numbers[symbol] for symbol in symbols))
    except (KeyError, ValueError, IndexError):
        raise BadInput(f"--E0 {s.E0} --species {s.species}: must look like --E0 Si=-0.79,O=-1.56 --species Si,O") from None
    species = tuple(chemical_symbols[z] for z in numbers)
    scale = float(np.sqrt(np.mean(np.concatenate([frame.forces.ravel() for frame in sample(train)]) ** 2))) or 1.0
    config = facet.Config(species, s.cutoff, s.degree, s.channels, s.layers, s.groups, s.splines, activation=s.activation,
                          energy_scale=scale, reference_energies=tuple(reference_energies(train, numbers, given).tolist()))
    for frames in (train, test):
        frames.config = config
        other = frames.atoms() - frames.counts(numbers).sum(1)  # [F] atoms that the model does not know
        if other.any():
            frame = frames[int(other.argmax())]
            unknown = sorted(set(frame.atoms.symbols) - set(species))
            raise BadInput(f"{frame.name}: holds {', '.join(unknown)}, which the training set, or --species, does not: {' '.join(species)}")
    few = sample(train, 100)
    edges = np.mean([len(few.graph(i).dst) for i in range(len(few))]) / few.atoms().mean()
    if (train.atoms().sum() + test.atoms().sum()) * edges < KEPT:
        for frames in (train, test):
            frames.graphs = {}
            for i in range(len(frames)):
                frames.graph(i)
    some = sample(train)
    graphs = [some.graph(i) for i in range(len(some))]
    edges = sum(len(g.dst) for g in graphs) / some.atoms().sum()
    if not edges:
        raise BadInput(f"no atom of the training set has a neighbour within {s.cutoff} Å: are positions in Å? Or raise --cutoff")
    shortest: dict[tuple[int, int], float] = {}
    for g in graphs:
        r, pair = np.linalg.norm(g.vectors, axis=1), np.sort(np.stack([g.species[g.dst], g.species[g.src]], 1), 1)  # [E], [E, 2]
        for i, j in np.unique(pair, axis=0).tolist():
            shortest[i, j] = min(shortest.get((i, j), np.inf), float(r[(pair == (i, j)).all(1)].min()))
    train.config = test.config = replace(
        config, mean_neighbours=max(1.0, edges), first_knot=0.7 * min(*shortest.values(), s.cutoff / 2),
        core=tuple(core_radii(shortest, numbers).tolist()))
    return train.config


# ─── Batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def sizes(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """Atoms [F] and neighbours of an atom [F] (of the one with most, or estimated from the density) of every frame."""
    atoms = frames.atoms()  # [F]
    if frames.graphs is not None:
        return atoms, np.array([np.bincount(frames.graph(i).dst, minlength=1).max() for i in range(len(frames))])
    volume = np.abs(np.linalg.det(frames.column("cell")))  # [F]
    mean = frames.config.mean_neighbours
    dense = np.divide(atoms, volume, out=np.zeros(len(atoms)), where=volume > 0) * 4 / 3 * np.pi * frames.config.cutoff ** 3
    return atoms, np.where(volume > 0, np.clip(dense, mean / 4, 8 * mean), mean)


def ten_structures(frames: Frames) -> int:
    """Atoms in a batch of ten structures of mean size, at most 256."""
    return int(min(256, 10 * frames.atoms().mean()))


PADDING = 0.15                          # of the neighbours in a batch may belong to no atom because frames are crowded differently


def plan(atoms: np.ndarray, crowd: np.ndarray, budget: float, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch: every frame in one batch, in random order; little of what the batches hold is padding.

    A batch costs time and memory for atoms × neighbours of the most crowded atom; as many frames are taken as fit, at least
    one; a quarter more than the budget may be, lest two frames of about half of it be parted. Frames are drawn at random in
    portions and sorted by crowd within each. The portions are as small as they can be: frames that are equally crowded are often
    alike, and batches of frames that are alike train badly (silicon in one portion: forces 3 % worse).
    """
    order, mean = rng.permutation(len(atoms)), (atoms * crowd).mean()
    for several in (1, 2, 4, 8, 16, 32, 64):  # batches in a portion
        batches, portion = [], max(1, round(several * budget / mean))
        for part in np.split(order, range(portion, len(order), portion)):
            batch, size = [], 0
            for i in part[np.argsort(crowd[part], kind="stable")]:
                if batch and (size + atoms[i]) * max(crowd[i], 1) > 1.25 * budget:
                    batches.append(np.array(batch))
                    batch, size = [], 0
                batch.append(i)
                size += atoms[i]
            batches.append(np.array(batch))
        used = (atoms * crowd).sum()
        if used > (1 - PADDING) * sum(atoms[batch].sum() * crowd[batch].max() for batch in batches) and used > 0.75 * len(batches) * budget:
            break  # little padding, and batches are full
    return [batches[i] for i in rng.permutation(len(batches))]


def epochs(atoms: np.ndarray, crowd: np.ndarray, budget: float, seed: int) -> Iterator[list[np.ndarray]]:
    """Plans without end. They follow from the seed alone: step n of a run, resumed or not, on any number of processes, sees batch n."""
    for epoch in count():
        yield plan(atoms, crowd, budget, np.random.default_rng([seed, epoch]))


class Samples(torch.utils.data.Dataset):
    """Batches ready for the model, with their labels; neighbour lists are made here, by loader processes if there are any."""

    def __init__(self, frames: Frames, team: Team = ALONE):
        self.frames, self.team = frames, team

    def __getitem__(self, rows: np.ndarray):
        """rows, batch, and labels of this process' share: energy [S] eV, forces [N, 3] eV/Å, virial [S, 3, 3] eV (nan where there
        is none), atoms [S], weight (0 where no share is left), and count [3]: how many energies, forces and virials all have."""
        mine, frames = rows[self.team.rank::self.team.size], self.frames
        share = (mine if len(mine) else rows[:1]).tolist()
        try:
            frame, graphs = [frames[i] for i in share], [frames.graph(i) for i in share]
        except BadInput as error:
            return rows, str(error), None  # an exception would not leave a loader process in one piece
        batch, everyone = facet.make_batch(graphs, frames.config.cutoff), frames.take(rows)
        virial = np.stack([f.stress for f in frame]).astype("f8") * np.array([g.volume for g in graphs])[:, None, None]
        labelled = np.isfinite(everyone.column("stress")) & (np.linalg.det(everyone.column("cell")) != 0)[:, None, None]  # [S, 3, 3]
        number = [len(rows), 3 * everyone.atoms().sum(), labelled.sum()]
        return rows, batch, {"energy": torch.tensor([f.energy for f in frame], dtype=torch.float64),
                             "forces": torch.from_numpy(np.concatenate([f.forces for f in frame])), "virial": torch.from_numpy(virial).float(),
                             "atoms": torch.tensor([len(f.atoms) for f in frame]), "weight": float(len(mine) > 0), "edges": sum(len(g.dst) for g in graphs),
                             "count": torch.tensor(number).clamp(min=1)}


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the trainer ends its step first, and needs its loaders for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(frames: Frames, batches: Iterable[np.ndarray], workers: int, team: Team = ALONE, cuda: bool = False):
    """Prepares batches ahead, in `workers` processes; in this one if there are none."""
    return torch.utils.data.DataLoader(Samples(frames, team), batch_size=None, sampler=batches, num_workers=workers,
                                       prefetch_factor=4 if workers else None, pin_memory=cuda, worker_init_fn=ignore_interrupts)


def losses(model, batch: facet.Batch, target: dict, huber: float) -> torch.Tensor:
    """Huber losses of energy per atom, forces and virial per atom, all in units of the force scale; [3].

    Each is a sum over this process' share, divided by what all processes have together: summed over processes it is the mean.
    """
    facet_model = getattr(model, "module", model)  # DistributedDataParallel wraps it
    scale, device = facet_model.config.energy_scale, facet_model.readout.device
    target = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in target.items()}
    out = model(batch.to(device), training=True)
    error = [(out["energy"] - target["energy"]) / target["atoms"] / scale,  # [S]
             (out["forces"] - target["forces"]) / scale]  # [N, 3]
    virial = (out["virial"] - target["virial"]) / target["atoms"][:, None, None] / scale  # [S, 3, 3]
    error.append(virial[torch.isfinite(target["virial"])])  # [≤ 9 S]
    total = [smooth_l1_loss(e, torch.zeros_like(e), beta=beta, reduction="sum").float()
             for e, beta in zip(error, (huber / 10, huber, huber))]
    return target["weight"] * torch.stack(total) / target["count"]


def predict(model: facet.Facet, frames: Frames, atoms: int) -> list[dict[str, np.ndarray]]:
    """Energy, forces and stress ([3, 3]; nan where there is no volume) of every frame, in order."""
    out = []
    for start in range(0, len(frames), 1000):
        some = range(start, min(start + 1000, len(frames)))
        for result in facet.evaluate(model, [frames.graph(i) for i in some], atoms):
            stress = voigt_6_to_full_3x3_stress(result["stress"]) if "stress" in result else np.full((3, 3), np.nan)
            out.append({"energy": float(result["energy"]), "forces": result["forces"], "stress": stress})
    return out


def errors(predictions: list[dict], frames: Sequence[Frame]) -> dict[str, float]:
    """MAE and RMSE of energy (meV/atom), forces (eV/Å, over components) and stress (GPa; None without labels)."""
    pairs = list(zip(predictions, frames, strict=True))
    energy = np.array([1000 * (p["energy"] - f.energy) / len(f.atoms) for p, f in pairs])
    forces = np.concatenate([(p["forces"] - f.forces).ravel() for p, f in pairs])
    stress = np.concatenate([(p["stress"] - f.stress).ravel() / units.GPa for p, f in pairs])
    stress = stress[np.isfinite(stress)]
    table = {}
    for name, error in (("energy_{}_meV_per_atom", energy), ("force_{}_eV_per_A", forces), ("stress_{}_GPa", stress)):
        table[name.format("mae")] = float(np.abs(error).mean()) if len(error) else None
        table[name.format("rmse")] = float(np.sqrt((error ** 2).mean())) if len(error) else None
    return table


# ─── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Log:
    """One line per interval on the screen and in metrics.csv."""
    columns = ("step seconds loss loss_energy loss_forces loss_stress energy_mae_meV_per_atom force_mae_meV_per_A "
               "stress_mae_GPa lr gradient structures_per_s").split()

    def __init__(self, folder: Path, test: Frames, length: int = 0):
        """length: bytes of metrics.csv that belong to the checkpoint a run goes on from; what came after is run again."""
        self.folder, self.path = folder, folder / "metrics.csv"
        self.watched = test.take(np.random.default_rng(0).permutation(len(test))[:50])
        self.path.touch()
        os.truncate(self.path, length)
        if not length:
            self.write(self.columns)
        print("   step    loss  (energy  forces  stress)   energy MAE   force MAE   stress MAE        lr  structures/s    left", flush=True)

    def write(self, row: list) -> None:
        """A line, on the disk when this returns."""
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def line(self, model: facet.Facet, step: int, seconds: float, left: float, losses: list, lr: float, gradient: float, rate: float):
        e = errors(predict(model, self.watched, 256), self.watched)
        mae = [e["energy_mae_meV_per_atom"], 1000 * e["force_mae_eV_per_A"], np.nan if e["stress_mae_GPa"] is None else e["stress_mae_GPa"]]
        total, energy, forces, stress = losses
        print(f"{step:7d} {total:7.4f} ({energy:7.5f} {forces:7.4f} {stress:7.4f}) {mae[0]:8.2f} meV {mae[1]:7.1f} meV/Å "
              f"{mae[2]:8.3f} GPa {lr:9.1e} {rate:13.1f} {left:6.0f} s", flush=True)
        self.write([step, f"{seconds:.1f}", *losses, *mae, lr, gradient, f"{rate:.1f}"])


class Weights:
    """The model, its optimisers and its averaged copy."""

    def __init__(self, model: facet.Facet, s: Settings):
        self.model, self.s, self.averaged = model, s, copy.deepcopy(model).requires_grad_(False)
        matrices = [p for name, p in model.named_parameters() if ".mix.W" in name]  # Muon turns their steps into rotations
        others = [p for name, p in model.named_parameters() if ".mix.W" not in name]
        self.optimizers = [torch.optim.AdamW(others, lr=s.lr, weight_decay=s.weight_decay),
                           torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.muon_decay)]

    def step(self, schedule: float, step: int) -> None:
        """One step of both optimisers along the gradients that are there, and of the average."""
        for optimizer, highest in zip(self.optimizers, (self.s.lr, self.s.muon_lr)):
            optimizer.param_groups[0]["lr"] = highest * schedule
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - min(self.s.ema, step / (step + 9)))

    def state(self) -> dict:
        return {"averaged": self.averaged.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def restore(self, content: dict) -> None:
        self.model.load_state_dict(content["state"])
        self.averaged.load_state_dict(content["averaged"])
        for optimizer, state in zip(self.optimizers, content["optimizers"]):
            optimizer.load_state_dict(state)


@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM (a batch system's notice) fill the list that this gives, so that a step can be ended; twice ends at once."""
    caught = []

    def notice(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    try:
        before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone gets signals
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def culprits(model: facet.Facet, frames: Frames, rows: np.ndarray, s: Settings) -> list[str]:
    """Names of the frames of a batch whose own loss or gradient is not finite."""
    found = []
    for i in rows:
        _, batch, target = Samples(frames)[np.array([i])]
        total = losses(model, batch, target, s.huber).sum()
        gradient = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)  # without waking DDP's hooks
        if not all(torch.isfinite(x).all() for x in (total, *gradient) if x is not None):
            found.append(frames[int(i)].name)
    return found


class Run:
    """A training under way.

    What `save` writes is all it takes to go on as if nothing had happened: weights, averaged weights, optimisers, step and time. The
    order of the data follows from seed and step, the schedule from step (or time), and nothing else is random.
    """

    def __init__(self, model: facet.Facet, train: Frames, test: Frames, s: Settings, folder: Path, team: Team, resumed: dict | None):
        self.model, self.train, self.s, self.folder, self.team = model, train, s, folder, team
        self.data = fingerprint(train)
        self.weights, self.step, self.before = Weights(model, s), 0, 0.0  # s of training in earlier lives
        if resumed:
            self.weights.restore(resumed)
            self.step, self.before = resumed["step"], resumed["seconds"]
        self.engine = torch.nn.parallel.DistributedDataParallel(model) if team.size > 1 else model
        self.log = Log(folder, test, resumed["log"] if resumed else 0) if team.rank == 0 else None
        atoms, crowd = sizes(train)
        budget = s.batch_atoms * crowd.mean()  # padded neighbours per step
        self.epoch = len(next(epochs(atoms, crowd, budget, s.seed)))  # steps
        workers = s.workers if s.workers >= 0 else 0 if train.graphs is not None else max(1, (os.cpu_count() or 2) // team.size - 1)
        batches = islice(chain.from_iterable(epochs(atoms, crowd, budget, s.seed)), self.step, None)
        self.stream = iter(loader(train, batches, workers, team, model.readout.is_cuda))
        self.seen, self.filled, self.waited, self.testing = 0, np.zeros(2), 0.0, 0.0
        self.start = time.perf_counter()
        self.progress = self.begun = self.done(self.before)
        self.saved, self.shown = self.before, int(20 * self.progress)

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.start

    def done(self, seconds: float) -> float:
        """How much of the training is over, 0 … 1."""
        s = self.s
        return min(1.0, self.step / s.steps if s.steps else max(seconds / (60 * s.minutes), self.step / (s.epochs * self.epoch)))

    def save(self) -> None:
        """model.pt and checkpoint.pt."""
        self.saved = self.elapsed()
        if self.team.rank == 0:
            facet.save(self.weights.averaged, self.folder / "model.pt")
            facet.save(self.model, self.folder / "checkpoint.pt", **self.weights.state(), step=self.step, seconds=self.saved,
                       settings=asdict(self.s), log=os.path.getsize(self.log.path), data=self.data)

    def shared(self, values: torch.Tensor) -> list[float]:
        """Sum over the processes."""
        if self.team.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def advance(self, stop: bool) -> bool:
        """One step of training; True if a process was told to stop. Raises BadInput when the loss is not finite."""
        moment, s, progress = time.perf_counter(), self.s, self.progress
        rows, batch, target = next(self.stream)
        if isinstance(batch, str):
            raise BadInput(batch)
        self.waited += time.perf_counter() - moment
        parts = losses(self.engine, batch, target, s.huber)  # [3]
        factors = parts.new_tensor([s.energy_start * (s.energy_end / s.energy_start) ** progress, 1, s.stress_weight])  # [3]
        self.model.zero_grad()
        (self.team.size * (factors * parts).sum()).backward()  # DDP takes the mean over processes: so this is their sum
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        mine = torch.tensor([self.elapsed() * (self.team.rank == 0), stop], dtype=torch.float64, device=parts.device)
        *parts, length, seconds, stop = self.shared(torch.cat([parts.detach(), gradient.detach()[None] / self.team.size, mine]))
        if not np.isfinite([*parts, length]).all():
            self.give_up(rows)
        schedule = min(1, (self.step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))  # warm-up, then a cosine
        self.step += 1
        self.weights.step(schedule, self.step)
        self.seen, self.filled = self.seen + len(rows), self.filled + [target["edges"], batch.src.numel()]
        self.progress = self.done(seconds)
        self.last = [sum(f * p for f, p in zip(factors.tolist(), parts)), *parts], s.lr * schedule, length
        return bool(stop)

    def give_up(self, rows: np.ndarray) -> None:
        """Raise BadInput with the names of the frames that are to blame."""
        names = culprits(self.model, self.train, rows[self.team.rank::self.team.size], self.s)
        if self.team.size > 1:
            everyone = [None] * self.team.size
            dist.all_gather_object(everyone, names)
            names = sum(everyone, [])
        cause = f"because of {', '.join(names)}; look at it" if names else "on frames that are sound one by one; lower --lr"
        raise BadInput(f"the loss became nan or infinite at step {self.step}, {cause}. {self.folder}/model.pt holds the weights before")

    def write(self, stop: bool) -> None:
        """A line of the log at every twentieth of the run; a checkpoint then, and every save_minutes, and before a stop."""
        seconds, twentieth = self.elapsed(), int(20 * self.progress)
        if twentieth == self.shown and seconds - self.saved < 60 * self.s.save_minutes and not stop:
            return
        if twentieth > self.shown and self.log:
            left = (seconds - self.before) * (1 - self.progress) / max(self.progress - self.begun, 1e-9)
            self.log.line(self.weights.averaged, self.step, seconds, left, *self.last, self.seen / (seconds - self.before - self.testing))
        self.shown = twentieth
        self.save()
        self.testing += self.elapsed() - seconds

    def summary(self) -> dict:
        """What the time went into."""
        spent = self.elapsed() - self.before
        return {"train_seconds": self.elapsed(), "steps": self.step, "padding": 1 - self.filled[0] / max(1, self.filled[1]),
                "time": {"model and optimisers": 1 - (self.waited + self.testing) / spent, "waiting for data": self.waited / spent,
                         "tests and checkpoints": self.testing / spent}}


def train_model(model: facet.Facet, train: Frames, test: Frames, s: Settings, folder: Path, team: Team = ALONE,
                resumed: dict | None = None) -> tuple[facet.Facet, dict]:
    """Trains; returns the model with averaged weights, and what the time went into. Writes model.pt, checkpoint.pt and metrics.csv."""
    run = Run(model, train, test, s, folder, team, resumed)
    with interruptible() as interrupted:
        if not resumed:
            run.save()
        while run.progress < 1:
            stop = run.advance(bool(interrupted))
            run.write(stop)
            if stop and run.progress < 1:
                raise KeyboardInterrupt
    return run.weights.averaged, run.summary()


def fingerprint(frames: Frames) -> int:
    """A number that changes when the training set does."""
    return zlib.crc32(frames.column("energy").tobytes())


# ─── Baselines ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def constant_baseline(train: Frames, test: Frames, config: facet.Config) -> list[dict]:
    """What E0 per species alone predicts: no forces, no stress."""
    E0 = np.array(config.reference_energies)
    return [{"energy": E0[test.graph(i).species].sum(), "forces": np.zeros_like(frame.forces), "stress": np.zeros((3, 3))}
            for i, frame in enumerate(test)]


def pair_baseline(train: Frames, test: Frames, config: facet.Config) -> list[dict]:
    """One spline V(r) for all pairs, E = Σ E0 + ½ Σ_ij V(r_ij), fitted to energies and forces by least squares."""
    spline, Z = facet.RadialSplines(1, config).double(), len(config.species)

    def rows(graph: facet.Neighbours):
        """Energy [Z+R], forces [3N, Z+R] and stress [9, Z+R] as linear functions of E0 and the spline's coefficients."""
        r = torch.from_numpy(np.linalg.norm(graph.vectors, axis=1))
        value, (_, slope) = spline.basis(r).numpy(), torch.func.jvp(spline.basis, (r,), (torch.ones_like(r),))  # [E, R]
        counts = np.bincount(graph.species, minlength=Z)
        pull = (slope.numpy() / r.numpy()[:, None])[:, None] * graph.vectors[:, :, None]  # [E, 3, R]
        force = np.zeros((len(graph.species), 3, value.shape[1]))
        np.add.at(force, graph.dst, pull)
        stress = np.einsum("ea,ebr->abr", graph.vectors, pull) / 2 / graph.volume
        pad = [(0, 0), (Z, 0)]
        return np.concatenate([counts, value.sum(0) / 2]), np.pad(force.reshape(-1, value.shape[1]), pad), np.pad(stress.reshape(9, -1), pad)

    atoms = train.atoms()
    some = np.arange(len(train))[::1 + atoms.sum() // 5000]  # some thousand atoms are plenty for so few numbers
    linear = [(rows(train.graph(int(i))), train[int(i)]) for i in some]
    design = np.concatenate([np.concatenate([e[None] / len(f.atoms), F]) for (e, F, _), f in linear])
    target = np.concatenate([np.append(f.energy / len(f.atoms), f.forces) for _, f in linear])
    fitted = np.linalg.lstsq(design, target, rcond=None)[0]
    return [{"energy": e @ fitted, "forces": (F @ fitted).reshape(-1, 3), "stress": (W @ fitted).reshape(3, 3)}
            for e, F, W in (rows(test.graph(i)) for i in range(len(test)))]


# ─── Physics: what a test error does not tell ──────────────────────────────────────────────────────────────────────────

def calmest(test: Frames) -> Atoms:
    """The test structure with the smallest largest force, a dense crystal if there is one, repeated to at least 30 atoms."""
    some = sample(test, 500)
    crowd = np.array([len(some.graph(i).dst) for i in range(len(some))]) / some.atoms()  # [F]
    rank = [(not frame.atoms.pbc.all(), crowd[i] < 0.9 * np.median(crowd), np.abs(frame.forces).max() + 10 * np.abs(np.nan_to_num(frame.stress)).max())
            for i, frame in enumerate(some)]
    atoms = some[min(range(len(some)), key=rank.__getitem__)].atoms
    while atoms.pbc.all() and len(atoms) < 30:
        atoms = atoms.repeat(np.where(np.arange(3) == atoms.cell.lengths().argmin(), 2, 1))
    return atoms


def equation_of_state(model: facet.Facet, atoms: Atoms) -> dict:
    """Energy (eV/atom) against volume (Å³/atom), −15 to +15 %, and the largest |P + dE/dV| (GPa): stress against energy."""
    scale = np.linspace(0.85, 1.15, 31)
    cells = [atoms.copy() for _ in scale]
    for cell, s in zip(cells, scale):
        cell.set_cell(atoms.cell.array * s ** (1 / 3), scale_atoms=True)
    results = facet.evaluate(model, [facet.find_neighbours(cell, model.config) for cell in cells])
    volume, energy = atoms.get_volume() * scale, np.array([r["energy"] for r in results])
    pressure = [-r["stress"][:3].mean() for r in results]
    slope = -np.gradient(energy, volume, edge_order=2)
    return {"volume_A3_per_atom": (volume / len(atoms)).tolist(), "energy_eV_per_atom": (energy / len(atoms)).tolist(),
            "stress_against_energy_GPa": float(np.abs(slope - pressure)[1:-1].max() / units.GPa)}


def energy_drift(model: facet.Facet, atoms: Atoms, kelvin: float = 300.0, steps: int = 400, femtoseconds: float = 1.0) -> dict:
    """Molecular dynamics at constant energy: total energy (meV/atom) over time (ps), and its slope."""
    atoms = atoms.copy()
    atoms.calc = facet.FacetCalculator(model, device=model.readout.device)
    speed = np.sqrt(2 * kelvin * units.kB / atoms.get_masses())[:, None]  # [N, 1] half of that temperature becomes potential energy
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * speed)
    energy = []
    dynamics = VelocityVerlet(atoms, femtoseconds * units.fs)
    dynamics.attach(lambda: energy.append(1000 * atoms.get_total_energy() / len(atoms)))
    dynamics.run(steps)
    time_ps = np.arange(len(energy)) * femtoseconds / 1000
    return {"time_ps": time_ps.tolist(), "energy_meV_per_atom": (np.array(energy) - energy[0]).tolist(), "kelvin": kelvin,
            "drift_meV_per_atom_per_ps": float(np.polyfit(time_ps, energy, 1)[0])}


def equivariance_error(model: facet.Facet, test: Frames) -> dict[str, list[float]]:
    """Forces of rotated, reflected structures against rotated, reflected forces; largest difference over the force RMS."""
    R = -Rotation.from_euler("xyz", [0.4, 1.1, 2.3]).as_matrix()  # generic and improper: on multiples of 90° any grid looks exact
    some, found = [test.graph(i) for i in range(min(10, len(test)))], {}
    for dtype in (torch.float32, torch.float64):
        precise = facet.Facet(model.config, dtype)
        precise.load_state_dict(model.state_dict())
        here, there = (facet.evaluate(precise, [g._replace(vectors=g.vectors @ turn) for g in some]) for turn in (np.eye(3), R.T))
        found[str(dtype).removeprefix("torch.")] = [float(np.abs(b["forces"] - a["forces"] @ R.T).max() / model.config.energy_scale)
                                                    for a, b in zip(here, there)]
    return found


def relax_held_out(model: facet.Facet) -> dict:
    """Relax a strained, rattled cell of an alloy that was not trained on, with EMT and with Facet; compare the lattices."""
    start = ase.build.bulk("Cu", a=3.75, cubic=True)
    start.symbols = ["Au", "Cu", "Cu", "Cu"]
    start.set_cell(start.cell.array @ (np.eye(3) + [[0.03, 0.02, 0], [0, -0.03, 0], [0.01, 0, 0.04]]), scale_atoms=True)
    start.rattle(0.05, seed=0)
    result = {"structure": f"{HELD_OUT} (L1₂), strained and rattled"}
    for name, calculator in (("emt", EMT()), ("facet", facet.FacetCalculator(model))):
        atoms = start.copy()
        atoms.calc = calculator
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        converged = optimizer.run(fmax=0.01, steps=500)
        result[name] = {"lattice_constant_A": float(atoms.get_volume() ** (1 / 3)), "steps": optimizer.nsteps,
                        "converged": bool(converged), "energy_eV_per_atom": float(atoms.get_potential_energy() / len(atoms))}
    return result


# ─── Report ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def plot_parity(axes, predictions: list[dict], test: Frames, table: dict) -> None:
    """Predicted against reference energies, forces and stresses of the test set."""
    atoms = np.array([len(f.atoms) for f in test])
    energy = np.array([f.energy for f in test]) / atoms
    panels = [("energy − mean", "eV/atom", energy - energy.mean(), np.array([p["energy"] for p in predictions]) / atoms - energy.mean(),
               f"{table['energy_mae_meV_per_atom']:.2f} meV/atom"),
              ("force", "eV/Å", np.concatenate([f.forces.ravel() for f in test]),
               np.concatenate([p["forces"].ravel() for p in predictions]), f"{1000 * table['force_mae_eV_per_A']:.1f} meV/Å")]
    if table["stress_mae_GPa"] is not None:
        panels.append(("stress", "GPa", np.concatenate([f.stress.ravel() for f in test]) / units.GPa,
                       np.concatenate([p["stress"].ravel() for p in predictions]) / units.GPa, f"{table['stress_mae_GPa']:.3f} GPa"))
    for axis, (name, unit, x, y, mae) in zip(axes, panels):
        limits = [np.nanmin(x), np.nanmax(x)]
        axis.plot(limits, limits, color="0.6", linewidth=0.8)
        axis.plot(x, y, ".", markersize=3 if len(x) > 300 else 6, color="tab:blue", rasterized=True)
        axis.set(xlabel=f"reference {name} ({unit})", ylabel=f"Facet {name} ({unit})", title=f"{name.split(' ')[0]}: MAE {mae}")
    for axis in axes[len(panels):]:
        axis.set_axis_off()


def plot_errors(by_species, by_size, predictions: list[dict], test: Frames) -> None:
    """Force errors by element and by the length of the force."""
    length = np.concatenate([np.linalg.norm(f.forces, axis=1) for f in test])  # [N]
    error = np.concatenate([np.linalg.norm(p["forces"] - f.forces, axis=1) for p, f in zip(predictions, test)])  # [N]
    symbols = np.concatenate([f.atoms.symbols for f in test])
    names = sorted(set(symbols), key=lambda name: -error[symbols == name].mean())[:20]
    by_species.bar(names, [1000 * error[symbols == name].mean() for name in names], color="tab:blue")
    by_species.set(title="force error by element" + (" (the 20 worst)" if len(set(symbols)) > 20 else ""), ylabel="mean |ΔF| (meV/Å)")
    bins = np.array_split(np.argsort(length), min(12, len(length)))
    by_size.loglog([max(length[b].mean(), 1e-4) for b in bins], [max(error[b].mean(), 1e-5) for b in bins], "o-", color="tab:blue")
    by_size.set(title="force error by size of the force", xlabel="|F| (eV/Å)", ylabel="mean |ΔF| (eV/Å)")


def plot_splines(axes, before: torch.Tensor, model: facet.Facet) -> None:
    """The learned radial functions of each degree (colours: layers), and what they were before training (grey)."""
    config = model.config
    T, L, B = config.layers, config.degree, config.groups
    r = torch.linspace(max(0.0, config.first_knot - 0.3), config.cutoff, 300)
    old, new = ((model.splines.cpu().basis(r) @ c.cpu()).view(len(r), T, B, L + 1).numpy() for c in (before, model.splines.coefficients.detach()))
    for l, axis in zip(range(L + 1), axes):
        axis.plot(r, old[:, 0, :, l], color="0.8", linewidth=0.8)
        for t in range(T):
            axis.plot(r, new[:, t, :, l], color=f"C{t}", linewidth=0.9, label=[f"layer {t + 1}", *["_"] * (B - 1)])
        axis.set(title=f"radial functions, l = {l} (grey: before)", xlabel="r (Å)")
        axis.legend(fontsize="x-small")
    for axis in axes[L + 1:]:
        axis.set_axis_off()


def plot_physics(axes, physics: dict, log: list[dict]) -> None:
    """Equation of state, energy drift, equivariance error, and the test errors during training."""
    if eos := physics["equation_of_state"]:
        axes[0].plot(eos["volume_A3_per_atom"], eos["energy_eV_per_atom"], "-", color="tab:blue")
        axes[0].set(title=f"{physics['structure']}: equation of state", xlabel="volume (Å³/atom)", ylabel="energy (eV/atom)")
    else:
        axes[0].set_axis_off()
    drift = physics["energy_drift"]
    axes[1].plot(drift["time_ps"], drift["energy_meV_per_atom"], linewidth=0.8, color="tab:blue")
    axes[1].set(title=f"NVE at {drift['kelvin']:.0f} K: drift {drift['drift_meV_per_atom_per_ps']:.3g} meV/atom/ps", xlabel="time (ps)",
                ylabel="total energy (meV/atom)")
    for dtype, values in physics["equivariance_error"].items():
        axes[2].semilogy(np.maximum(values, 1e-17), "o", label=dtype)
    axes[2].set(title="equivariance error, trained", xlabel="test structure", ylabel="largest error of forces / force RMS")
    axes[2].legend(fontsize="small")
    for key, name in (("energy_mae_meV_per_atom", "energy, meV/atom"), ("force_mae_meV_per_A", "force, meV/Å")):
        axes[3].semilogy([int(row["step"]) for row in log], [float(row[key]) for row in log], "o-", markersize=3, label=name)
    axes[3].set(title="test MAE while training", xlabel="step")
    axes[3].legend(fontsize="small")


def report(model: facet.Facet, before: torch.Tensor, train: Frames, test: Frames, s: Settings, folder: Path) -> dict:
    """Print the test table with its baselines and some physics, draw report.png; returns the numbers."""
    from matplotlib.figure import Figure  # slow to import; Figure without pyplot needs no display and keeps no state
    everything, test = len(test), sample(test)
    predictions = predict(model, test, 256)
    rows = {"Facet": errors(predictions, test),
            "mean pair potential (one spline)": errors(pair_baseline(train, test, model.config), test),
            "constant per species": errors(constant_baseline(train, test, model.config), test)}
    if len(test) < everything:
        print(f"\n{len(test)} of the {everything} test structures, evenly spread, are taken", end="")
    print(f"\n{len(test)} test structures               energy MAE (RMSE) meV/atom    force MAE (RMSE) eV/Å    stress MAE (RMSE) GPa")
    for name, e in rows.items():
        stress = "       –" if e["stress_mae_GPa"] is None else f"{e['stress_mae_GPa']:10.3f} ({e['stress_rmse_GPa']:.3f})"
        print(f"  {name:34s} {e['energy_mae_meV_per_atom']:12.2f} ({e['energy_rmse_meV_per_atom']:.2f}) "
              f"{e['force_mae_eV_per_A']:18.4f} ({e['force_rmse_eV_per_A']:.4f}) {stress}")
    atoms = calmest(test)
    physics = {"structure": f"{atoms.symbols} of the test set", "energy_drift": energy_drift(model, atoms),
               "equation_of_state": equation_of_state(model, atoms) if atoms.pbc.all() else None,
               "equivariance_error": equivariance_error(model, test)}
    print(f"\ntotal energy in molecular dynamics at 300 K: {physics['energy_drift']['drift_meV_per_atom_per_ps']:.2g} meV/atom/ps; equivariance "
          "error of forces: " + ", ".join(f"{max(values):.0e} ({dtype})" for dtype, values in physics["equivariance_error"].items()))
    figure = Figure((16, 12), layout="constrained")
    axes = figure.subplots(3, 4).ravel()
    plot_parity(axes[:3], predictions, test, rows["Facet"])
    plot_errors(axes[3], axes[4], predictions, test)
    plot_splines(axes[5:8], before, copy.deepcopy(model))
    plot_physics(axes[8:], physics, list(csv.DictReader(open(folder / "metrics.csv"))))
    figure.savefig(folder / "report.png", dpi=80)
    return {**rows["Facet"], "baselines": {name: e for name, e in rows.items() if name != "Facet"}, "physics": physics}


# ─── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────────

def new_folder(out: Path, name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where that holds results already."""
    folder, n = out / name, 1
    while folder.exists():
        n += 1
        folder = out / f"{name}-{n}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def team_of(s: Settings):
    """This process' place among those that torchrun started; alone without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Team()
        return
    if "cuda" in s.device:
        torch.cuda.set_device(s.device)
    dist.init_process_group("nccl" if "cuda" in s.device else "gloo", timeout=timedelta(hours=12))  # as long as a conversion may take
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def load_data(s: Settings, out: Path, team: Team) -> tuple[Frames, Frames]:
    """Training and test set. The first process goes ahead, so that whatever must be made or converted is made once."""
    for turn in (team.rank == 0, team.rank != 0):
        if turn:
            frames = read(s.train, s, out) if s.train else embedded_set(out)
            train, test = (frames, read(s.test, s, out)) if s.test else split(frames, s.seed)
        if team.size > 1:
            dist.barrier()
    if s.overfit:
        train = test = train.take(np.arange(min(s.overfit, len(train))))
    return train, test


def checkpoint(folder: Path) -> dict:
    """What `train_model` left in a folder. Raises BadInput."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise BadInput(f"{folder}: holds no checkpoint.pt to go on from" + ("" if folder.exists() else "; there is no such folder"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"] = {key: tuple(value) if isinstance(value, list) else value for key, value in content["settings"].items()}
        return content
    except Exception as error:
        raise BadInput(f"{path}: is damaged, or was written by another version of train_small.py ({type(error).__name__})") from error


def main(s: Settings, command: str = "", out: Path = Path("runs"), resume: Path | None = None) -> dict:
    """Read, train, test, draw; returns what result.json holds (an empty dict on all processes but the first). Raises BadInput.

    With `resume`, the run in that folder goes on; s are its settings.
    """
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    s = replace(s, minutes=s.minutes or (9.5 if s.train else 1.75), device=s.device or (local if torch.cuda.is_available() else "cpu"),
                name=s.name or (Path(s.train[0].replace("*", "")).name.split(".")[0] if s.train else "emt"))
    with team_of(s) as team:
        return train_and_report(s, command, out, resume, team)


def train_and_report(s: Settings, command: str, out: Path, resume: Path | None, team: Team) -> dict:
    """What main does, as one of a team."""
    began, resumed = time.perf_counter(), checkpoint(resume) if resume else None
    out.mkdir(parents=True, exist_ok=True)
    train, test = load_data(s, out, team)
    if resumed and resumed["data"] != fingerprint(train):
        raise BadInput(f"{resume}: the training set is not the one that this run began with; begin a new run")
    s = replace(s, batch_atoms=s.batch_atoms or ten_structures(train))
    if team.rank == 0:
        for text in suspicions(train):
            print(f"warning: {text}", file=sys.stderr, flush=True)
    torch.manual_seed(s.seed)
    config = configure(train, test, s)
    if resumed:
        train.config = test.config = config = facet.Config(**resumed["config"])  # the same, but for rounding
    model = facet.Facet(config).to(s.device)
    before, parameters = model.splines.coefficients.detach().clone(), sum(p.numel() for p in model.parameters())
    folder = resume or (new_folder(out, s.name) if team.rank == 0 else out)
    team.say(f"{len(train)} structures to train on, {len(test)} to test; {train.atoms().sum()} atoms of {' '.join(config.species)}; "
             f"{config.mean_neighbours:.1f} neighbours each, splines from {config.first_knot:.2f} to {config.cutoff:g} Å; "
             f"force RMS {config.energy_scale:.2f} eV/Å\n"
             f"Facet with {parameters} parameters, on {s.device}, " + (f"{team.size} processes, " if team.size > 1 else "")
             + f"{torch.get_num_threads()} threads, batches of {s.batch_atoms} atoms, "
             + (f"{s.steps} steps" if s.steps else f"{s.minutes:g} minutes, at most {s.epochs:g} epochs") + f" → {folder}/" + (f" from step {resumed['step']}" if resumed else ""))
    try:
        model, trained = train_model(model, train, test, s, folder, team, resumed)
    except KeyboardInterrupt:
        team.say(f"\nstopped. model.pt holds the averaged weights; go on with: python train_small.py --resume {folder}")
        raise
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error}). What was saved before is whole; when that is mended, "
                       f"go on with: python train_small.py --resume {folder}") from error
    if team.rank:
        return {}
    result = {**report(model, before, train, test, s, folder), "parameters": parameters, **trained}
    if not s.train:
        result["relaxation"] = relax = relax_held_out(model)
        a, b = relax["emt"], relax["facet"]
        print(f"\n{relax['structure']}, relaxed by FIRE with FrechetCellFilter: EMT a = {a['lattice_constant_A']:.4f} Å in {a['steps']} steps, "
              f"Facet a = {b['lattice_constant_A']:.4f} Å in {b['steps']} steps ({100 * (b['lattice_constant_A'] / a['lattice_constant_A'] - 1):+.2f} %)")
    result.update(device=torch.cuda.get_device_name() if "cuda" in s.device else "cpu", torch_threads=torch.get_num_threads(),
                  processes=team.size, torch=torch.__version__, command=command, settings=asdict(s), config=asdict(config),
                  total_seconds=time.perf_counter() - began)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    shares = ", ".join(f"{100 * share:.1f} % {what}" for what, share in trained["time"].items())
    print(f"\ntime in training: {shares}; {100 * trained['padding']:.0f} % of the neighbours in the batches are padding\n"
          f"{folder}/: model.pt, checkpoint.pt, metrics.csv, result.json, report.png; {result['total_seconds']:.0f} s in all")
    return result


LATER = ("minutes", "steps", "epochs", "device", "threads", "workers", "save_minutes")  # what may change when a run goes on


def parse(arguments: list[str]) -> tuple[Settings, Path | None]:
    """Settings from the command line, and the run to resume; a wrong flag ends the program with one sentence and code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        many = isinstance(f.default, tuple)
        shown = "" if f.default in ((), "", 0, -1) else f" (default {f.default})"
        parser.add_argument(f"--{f.name}", metavar=f.name.upper() if f.default == "" else "FILE" if many else "X",
                            help=(f.metadata["help"] + shown).replace("%", "%%"), **({"nargs": "+"} if many else {"type": type(f.default)}))
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder, with its own settings; "
                        f"of them only {', '.join(LATER)} can be changed")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(arguments)).items()}
    resume = given.pop("resume", None)
    if resume:
        if wrong := set(given) - set(LATER):
            parser.error(f"--{min(wrong)} cannot be changed when a run goes on; begin a new run")
        given = {**checkpoint(resume)["settings"], **given}
    s = Settings(**given)
    if s.test and not s.train:
        parser.error("--test without --train: say what to train on")
    for name in ("minutes", "steps", "epochs", "lr", "batch_atoms", "cutoff", "stress_weight", "energy_start", "energy_end", "huber", "overfit", "save_minutes"):
        if getattr(s, name) < 0 or (getattr(Settings, name) > 0 and name != "stress_weight" and getattr(s, name) == 0):
            parser.error(f"--{name} {getattr(s, name)}: must be positive")
    try:
        torch.empty(0, device=s.device or "cpu")
    except (RuntimeError, AssertionError):
        parser.error(f"--device {s.device}: PyTorch has no such device here; try --device cpu")
    return s, resume


if __name__ == "__main__":
    try:
        settings, going_on = parse(sys.argv[1:])
        if settings.threads:
            torch.set_num_threads(settings.threads)
        main(settings, shlex.join(["python", *sys.argv]), resume=going_on)
    except (BadInput, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
