"""Train a Facet on a laptop in minutes, or leave it running on GPUs overnight.

    python train_small.py                       # embedded data (EMT metals), 2 minutes on 2 cores
    python train_small.py --train si_train.extxyz --test si_test.extxyz --name si    # your own data
    python -m tools.database MPtrj_2022.9_full.json mptrj.db    # large sets become an ASE database
    python train_small.py --train mptrj.db --species all --channels 64 --minutes 6000 --name mptrj
    torchrun --nproc_per_node=4 train_small.py --train …         # four processes, the same batches
    python train_small.py --resume runs/si     # goes on after a kill, Ctrl-C or a full disk

Reads what ASE reads (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz, globs): energy in eV, forces in
eV/Å and, where there is one, stress in eV/Å³. JSON in other layouts is converted by tools.database.
Writes to runs/<name>/: model.pt, checkpoint.pt, metrics.csv, result.json, report.png.

A run is a number of epochs: the same seed and number of threads give the same model on the same
machine, however busy it is. A tenth of the training materials is set aside for validation, which
the log watches; the test set is looked at once, in the end. --minutes makes a run end by the clock.
"""
from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import chain, count, islice
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.stress import voigt_6_to_full_3x3_stress
from torch.nn.functional import smooth_l1_loss

import facet
from tools import report
from tools.frames import BadInput, Frames, load, neighbours, print_to_stderr, sample
from tools.suspicions import robust_fit, robust_scale

EPOCHS = 40          # times through the data, unless told otherwise …
STEPS = 10_000       # … and for molecules, whose frames are small, at least so many steps
MPTRJ = [s for s in chemical_symbols[1:95] if s not in ("Po", "At", "Rn", "Fr", "Ra")]  # its 89
WEIGHT_DECAY = 1e-3  # of AdamW
CLIP = 1.0           # longest gradient allowed
SAVE_SECONDS = 300   # a checkpoint at least this often, and with every line of the log
KEPT = 10 ** 7       # neighbours that are kept in memory, about 0.5 GB; beyond, they are made anew
PADDING = 0.15       # of the neighbours in batches may be padding, because frames differ in crowd
WATCHED = 50         # validation frames that the log looks at


def setting(default, text: str, least: float | None = None, above: float | None = None):
    """A field of Settings, with what --help says of it.

    A number must not be below `least`, or must be larger than `above`.
    """
    return field(default=default, metadata={"help": text, "least": least, "above": above})


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter, and what the command line shows of it."""

    # Data
    train: tuple[str, ...] = setting((), "files to train on; none: an embedded set of EMT metals")
    valid: tuple[str, ...] = setting((), "files to validate on; none: a tenth of train; 0: nothing")
    test: tuple[str, ...] = setting((), "files to test on; none: a tenth of train; 0: nothing")
    energy: str = setting("", "name of the energy in the files; by default energy")
    forces: str = setting("", "name of the forces; by default forces")
    stress: str = setting("", "name of the stress (if virial is in it: of the virial in eV)")
    E0: str = setting("", "eV of free atoms, such as Si=-0.79,O=-1.56; others are fitted")
    species: str = setting("", "elements to know, such as Si,O, or all; by default those of train")
    strict: bool = setting(False, "warnings about the data are errors")

    # Run
    name: str = setting("", "results go to runs/NAME; by default the name of the first file")
    epochs: float = setting(0.0, "times through the data; 0: 40, more for molecules", 0)
    steps: int = setting(0, "number of steps, instead of epochs", 0)
    minutes: float = setting(0.0, "end by the clock, if epochs do not end before; 0: never", 0)
    seed: int = setting(0, "of the weights, the order of the data and the splits", 0)
    device: str = setting("", "cpu, cuda, cuda:1, …; by default cuda if there is one")
    threads: int = setting(0, "CPU threads; 0: as PyTorch chooses", 0)
    workers: int = setting(-1, "processes that make neighbour lists; -1: as many as it takes", -1)

    # Model
    cutoff: float = setting(5.0, "Å, how far an atom sees in one layer", above=0)
    degree: int = setting(2, "L, highest degree of the features", 0)
    channels: int = setting(32, "C, copies of every feature", 1)
    groups: int = setting(8, "B, groups of channels with radial functions of their own", 1)
    layers: int = setting(3, "T, number of message-passing layers", 1)
    activation: str = setting("product", "of the grid layer: product or silu")

    # Optimisation
    batch_atoms: int = setting(0, "atoms per step; 0: those of ten structures, at most 256", 0)
    lr: float = setting(5e-3, "highest learning rate of AdamW", above=0)
    muon_lr: float = setting(1e-2, "highest learning rate of Muon, for matrices that mix", above=0)
    muon_decay: float = setting(5.0, "weight decay of Muon over a whole run, in powers of e", 0)
    ema: float = setting(0.99, "averaging of the weights that are tested and saved, below 1", 0)
    energy_weight: float = setting(1.0, "of the energy loss in the end; forces have 1", above=0)
    stress_weight: float = setting(0.1, "of the stress loss; 0: labels are not used", 0)
    huber: float = setting(0.1, "errors count linearly beyond this times the force RMS", above=0)

    def __post_init__(self):
        """Raise ValueError, in one sentence, for a value out of range."""
        for f in fields(self):
            value = getattr(self, f.name)
            least = f.metadata["least"]
            above = f.metadata["above"]
            if type(f.default) in (int, float) and not isinstance(value, Real):
                raise ValueError(f"--{f.name} {value!r}: must be a number")
            if least is not None and not least <= value < math.inf:
                raise ValueError(f"--{f.name} {value}: must be a number from {least} on")
            if above is not None and not above < value < math.inf:
                raise ValueError(f"--{f.name} {value}: must be a number above {above}")
            if type(f.default) is int and value != int(value):
                raise ValueError(f"--{f.name} {value}: must be a whole number")
        if self.ema >= 1:
            raise ValueError(f"--ema {self.ema}: must be below 1")
        if self.seed >= 2 ** 63:
            raise ValueError(f"--seed {self.seed}: must be below 2⁶³")
        if self.channels % self.groups:
            raise ValueError(f"--groups {self.groups}: must divide --channels {self.channels}")
        if self.activation not in ("product", "silu"):
            raise ValueError(f"--activation {self.activation}: must be product or silu")


class Team(NamedTuple):
    """The processes that train together. The first one speaks and writes."""

    rank: int = 0
    size: int = 1

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


ALONE = Team()


# ─── Statistics of the training set ───────────────────────────────────────────────────────────────


def reference_energies(frames: Frames, numbers: np.ndarray, given: dict, cutoff: float):
    """E0 per species, [Z] eV: the energy that composition alone explains, by robust least squares.

    numbers [Z]; given: {atomic number: eV}, which stay. Where the data hold a free atom (one atom
    that has no neighbour), its energy is E0: nothing else is the limit of large distances.
    """
    counts = frames.compositions(numbers)  # [F, Z]
    atoms = frames.atom_counts()  # [F]
    energy = frames.energies()  # [F] nan where there is none

    for i in np.flatnonzero(atoms == 1):
        atom = frames[int(i)]
        dst, *_ = facet.neighbour_list(atom.positions, atom.cell.array, atom.pbc, cutoff)
        if len(dst) == 0 and np.isfinite(energy[i]):
            given = {int(atom.numbers[0]): float(energy[i]), **given}

    E0 = np.array([given.get(int(number), 0.0) for number in numbers])  # [Z]
    fitted = ~np.isin(numbers, list(given))  # [Z]
    if not fitted.any():
        return E0

    # Per atom: every frame counts the same, whatever its size
    known = np.isfinite(energy)
    share = counts[known] / atoms[known, None]  # [F, Z]
    target = energy[known] / atoms[known] - share @ E0  # [F]
    E0[fitted], _, rank = robust_fit(share[:, fitted], target)

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


def statistics(frames: Frames, s: Settings) -> facet.Config:
    """Config with what the model must know of the training set. Raises BadInput."""
    found = frames.elements()  # atomic numbers
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

    some = list(sample(frames))
    forces = [atoms.calc.results["forces"] for atoms in some if "forces" in atoms.calc.results]
    scale = robust_scale(forces or [np.zeros((1, 3))])  # eV/Å
    config = facet.Config(
        species=tuple(chemical_symbols[z] for z in numbers),
        cutoff=s.cutoff, degree=s.degree, channels=s.channels, layers=s.layers, groups=s.groups,
        activation=s.activation, energy_scale=scale or 1.0)
    check_species(frames, config)
    unseen = [symbol for z, symbol in zip(numbers, config.species) if z not in found]
    if unseen and s.species != "all":
        print_to_stderr(f"note: no frame holds {', '.join(unseen)}: nothing is learned of them")
    beside = [chemical_symbols[z] for z in given if z not in numbers]
    if beside:
        print_to_stderr(f"note: --E0 names {', '.join(beside)}, which the model does not know")

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
        core=tuple(core_radii(shortest, numbers, s.cutoff).tolist()))


def check_species(frames: Frames, config: facet.Config) -> None:
    """Raise BadInput if a frame holds an element that the model does not know."""
    numbers = np.array([atomic_numbers[symbol] for symbol in config.species])  # [Z]
    unknown = frames.atom_counts() - frames.compositions(numbers).sum(1)  # [F] atoms
    if unknown.any():
        atoms = frames[int(unknown.argmax())]
        names = sorted(set(atoms.symbols) - set(config.species))
        raise BadInput(f"{atoms.info['source']}: holds {', '.join(names)}, which the training set, "
                       f"or --species, does not: {' '.join(config.species)}")


# ─── Batches ──────────────────────────────────────────────────────────────────────────────────────


class Samples(torch.utils.data.Dataset):
    """Batches of frames, ready for the model, with their labels.

    Neighbour lists are made here, by loader processes if there are any.
    """

    def __init__(self, frames: Frames, config: facet.Config, team: Team = ALONE):
        self.frames = frames
        self.config = config
        self.team = team
        self.atoms = frames.atom_counts()  # [F]
        many = self.atoms.sum() * config.mean_neighbours > KEPT
        self.graphs = None if many else {}

    def graph(self, i: int) -> facet.Neighbours:
        """Neighbours of a frame, made now or kept. Raises BadInput for broken geometry."""
        if self.graphs is None:
            return neighbours(self.frames[i], self.config)
        if i not in self.graphs:
            self.graphs[i] = neighbours(self.frames[i], self.config)
        return self.graphs[i]

    def crowd(self) -> np.ndarray:
        """Neighbours of each frame's most crowded atom, [F]; where frames are many, a guess."""
        if self.graphs is not None:
            found = [np.bincount(self.graph(i).dst, minlength=1) for i in range(len(self.atoms))]
            return np.array([neighbours_of.max() for neighbours_of in found])

        mean = self.config.mean_neighbours
        volume = self.frames.volumes()  # [F] Å³, 0 without a cell
        density = np.divide(self.atoms, volume, out=np.zeros(len(volume)), where=volume > 0)
        guess = density * 4 / 3 * np.pi * self.config.cutoff ** 3  # [F]
        return np.where(volume > 0, np.clip(guess, mean / 4, 8 * mean), mean)

    def __getitem__(self, rows: np.ndarray):
        """rows, batch and target of this process' share of them; or rows, what is wrong, None.

        target: energy [S] eV, forces [N, 3] eV/Å and virial [S, 3, 3] eV, nan where there is no
        label; atoms [S]; count [3], how many energies, forces and virials are labelled; edges.
        """
        share = rows[self.team.rank::self.team.size]
        idle = len(share) == 0  # more processes than frames: this one computes, but counts nothing
        share = rows[:1] if idle else share
        try:
            graphs = [self.graph(int(i)) for i in share]
        except BadInput as error:  # an exception would not leave a loader process in one piece
            return rows, str(error), None

        energy, forces, virial = [], [], []
        for i, graph in zip(share, graphs):
            labels = self.frames[int(i)].calc.results
            energy.append(labels.get("energy", np.nan))
            forces.append(labels.get("forces", np.full((len(graph.species), 3), np.nan)))
            stress = voigt_6_to_full_3x3_stress(labels.get("stress", np.full(6, np.nan)))
            virial.append(stress * graph.volume)  # [3, 3]

        target = {
            "energy": torch.tensor(energy, dtype=torch.float64),
            "forces": torch.from_numpy(np.concatenate(forces)).float(),
            "virial": torch.from_numpy(np.stack(virial)).float(),
        }
        if idle:
            target = {name: torch.full_like(label, np.nan) for name, label in target.items()}
        target["count"] = torch.stack([label.isfinite().sum() for label in target.values()])
        target["atoms"] = torch.tensor([len(graph.species) for graph in graphs])
        target["edges"] = torch.tensor(sum(len(graph.dst) for graph in graphs))
        return rows, facet.make_batch(graphs, self.config.cutoff), target


def plan(atoms: np.ndarray, crowd: np.ndarray, budget: float, rng: np.random.Generator):
    """One epoch: every frame in one batch, in random order; little of what they hold is padding.

    atoms, crowd [F], budget in padded neighbours → a list of arrays of frame numbers. A batch costs
    time and memory for atoms × neighbours of its most crowded atom. As many frames are taken as
    fit, at least one; a quarter more than the budget may be, lest two of half of it be parted.

    Frames are drawn at random in portions and sorted by crowd within each. The portions are as
    small as they can be: frames that are equally crowded are often alike, and batches of frames
    that are alike train badly (silicon in one portion: forces 3 % worse).
    """
    order = rng.permutation(len(atoms))
    used = (atoms * crowd).sum()  # neighbours without padding
    mean = (atoms * crowd).mean()

    for several in (1, 2, 4, 8, 16, 32, 64):  # batches in a portion
        portion = max(1, round(several * budget / mean))  # frames
        batches = []
        for part in np.split(order, range(portion, len(order), portion)):
            batch, size = [], 0
            for i in part[np.argsort(crowd[part], kind="stable")]:
                if batch and (size + atoms[i]) * max(crowd[i], 1) > 1.25 * budget:
                    batches.append(np.array(batch))
                    batch, size = [], 0
                batch.append(i)
                size += atoms[i]
            batches.append(np.array(batch))

        padded = sum(atoms[batch].sum() * crowd[batch].max() for batch in batches)
        if used > (1 - PADDING) * padded and used > 0.75 * len(batches) * budget:
            break  # little padding, and the batches are full
    return [batches[i] for i in rng.permutation(len(batches))]


def epochs(atoms: np.ndarray, crowd: np.ndarray, budget: float, seed: int) -> Iterator[list]:
    """Plans without end, from the seed alone.

    So step n of a run, resumed or not, on any number of processes, sees batch n.
    """
    for epoch in count():
        yield plan(atoms, crowd, budget, np.random.default_rng([seed, epoch]))


def loader(samples: Samples, batches: Iterable[np.ndarray], workers: int, cuda: bool):
    """Prepares batches ahead, in `workers` processes; in this one if there are none."""
    return torch.utils.data.DataLoader(
        samples, batch_size=None, sampler=batches, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=cuda, worker_init_fn=ignore_interrupts)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the trainer ends its step first, and needs its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ─── Losses ───────────────────────────────────────────────────────────────────────────────────────


def losses(out: dict, target: dict, count: torch.Tensor, scale: float, huber: float):
    """Huber losses of energy per atom, forces, and virial per atom, in units of the scale; [3].

    out: of the model; target: as Samples gives it; count [3]: how many labels all processes have.
    Each is a sum over this process' share, divided by what all have: summed over the processes it
    is the mean. Where there is no label the error counts as zero.
    """
    atoms = target["atoms"]  # [S]
    total = []
    for name, per, beta in (("energy", atoms, huber / 10), ("forces", 1, huber),
                            ("virial", atoms[:, None, None], huber)):
        labelled = target[name].isfinite()
        error = (out[name] - target[name].nan_to_num()) / per / scale
        loss = smooth_l1_loss(error, torch.zeros_like(error), beta=beta, reduction="none")
        total.append((loss * labelled).sum().float())
    return torch.stack(total) / count.clamp(min=1)  # [3]


# ─── Training ─────────────────────────────────────────────────────────────────────────────────────


class Log:
    """A line per interval on the screen and in metrics.csv; on a terminal, a line of progress."""

    columns = ("step seconds loss loss_energy loss_forces loss_stress energy_mae_meV_per_atom "
               "force_mae_meV_per_A stress_mae_GPa lr gradient structures_per_s").split()

    def __init__(self, folder: Path, valid: Frames, length: int):
        """length: bytes of metrics.csv that a resumed run keeps; what follows is done again."""
        self.path = folder / "metrics.csv"
        self.watched = valid.take(np.random.default_rng(0).permutation(len(valid))[:WATCHED])
        self.shown = 0.0
        self.path.touch()
        os.truncate(self.path, length)
        if length == 0:
            self.write(self.columns)
        print("   step    loss  (energy  forces  stress)   energy MAE    force MAE   stress MAE"
              "        lr  structures/s      left", flush=True)

    def write(self, row: list) -> None:
        """A line that is on the disk when this returns."""
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def errors(self, model: facet.Facet) -> list[float]:
        """MAE on the watched frames: meV/atom, meV/Å, GPa; nan where there are no labels."""
        if len(self.watched) == 0:
            return [math.nan] * 3
        e = report.errors(report.predict(model, self.watched), self.watched)
        found = [e["energy_mae_meV_per_atom"], e["force_mae_eV_per_A"], e["stress_mae_GPa"]]
        energy, forces, stress = (math.nan if mae is None else mae for mae in found)
        return [energy, 1000 * forces, stress]

    def line(self, model, step, seconds, left, losses, lr, gradient, rate) -> None:
        """losses: in all, of energy, forces, stress; left: seconds; rate: structures per second."""
        mae = self.errors(model)
        self.write([step, f"{seconds:.1f}", *losses, *mae, lr, gradient, f"{rate:.1f}"])
        self.show("{:7d} {:7.4f} ({:7.5f} {:7.4f} {:7.4f}) {:8.2f} meV {:7.1f} meV/Å {:8.3f} GPa "
                  "{:9.1e} {:13.1f} {:>9}".format(step, *losses, *mae, lr, rate, duration(left)))

    def progress(self, step: int, steps: int, left: float) -> None:
        """On a terminal only, twice a second: a line that the next one overwrites."""
        if sys.stdout.isatty() and time.perf_counter() > self.shown + 0.5:
            self.shown = time.perf_counter()
            self.show(f"step {step} of {steps}, {duration(left)} left", end="")

    def show(self, text: str, end: str = "\n") -> None:
        over = "\r\033[K" if sys.stdout.isatty() else ""
        print(over + text, end=end, flush=True)


def duration(seconds: float) -> str:
    """90 → 1.5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM (a batch system's notice) fill a list, so that a step can be ended.

    A second one ends at once.
    """
    caught = []

    def notice(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, notice)
    except ValueError:
        pass  # not the main thread, which alone gets signals
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def optimizers(model: facet.Facet, s: Settings, steps: int) -> list[torch.optim.Optimizer]:
    """Muon, which turns its steps into rotations, for matrices that mix paths; AdamW for others.

    What Muon's decay forgets in a run is the same for any number of steps, for short runs less: at
    2,000 steps of silicon 0.5 per unit of learning rate is best, at 10,000 of molecules 0.1.
    """
    matrices = [p for name, p in model.named_parameters() if ".mix.W" in name]
    others = [p for name, p in model.named_parameters() if ".mix.W" not in name]
    decay = min(1, s.muon_decay / (s.muon_lr * steps / 2))  # the cosine's mean is a half
    return [torch.optim.AdamW(others, lr=s.lr, weight_decay=WEIGHT_DECAY),
            torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=decay)]


def train(model: facet.Facet, frames: Frames, valid: Frames, s: Settings, folder: Path,
          team: Team = ALONE, resumed: dict | None = None) -> tuple[facet.Facet, dict]:
    """Trains; returns the model with averaged weights, and what the time went into.

    Writes model.pt, checkpoint.pt and metrics.csv. A checkpoint holds all it takes to go on as if
    nothing had happened: the order of the data follows from seed and step, nothing else is random.
    Raises BadInput when the loss is not finite, KeyboardInterrupt when it was told to stop.
    """
    device = next(model.parameters()).device
    averaged = copy.deepcopy(model).requires_grad_(False)

    # Batches: as many neighbours as ten structures have, or batch_atoms at mean density
    samples = Samples(frames, model.config, team)
    atoms, crowd = samples.atoms, samples.crowd()  # [F], [F]
    budget = (s.batch_atoms or ten_structures(frames)) * crowd.mean()
    plans = epochs(atoms, crowd, budget, s.seed)
    in_epoch = len(next(epochs(atoms, crowd, budget, s.seed)))
    steps = length_of(frames, s, in_epoch)

    adamw, muon = optimizers(model, s, steps)
    step, earlier = 0, 0.0  # steps and seconds of earlier lives
    if resumed:
        model.load_state_dict(resumed["state"])
        averaged.load_state_dict(resumed["averaged"])
        adamw.load_state_dict(resumed["optimizers"][0])
        muon.load_state_dict(resumed["optimizers"][1])
        step, earlier = resumed["step"], resumed["seconds"]
    first = step
    engine = torch.nn.parallel.DistributedDataParallel(model) if team.size > 1 else model

    workers = s.workers
    if workers < 0:
        workers = 0 if samples.graphs is not None else max(1, os.cpu_count() // team.size - 1)
    batches = islice(chain.from_iterable(plans), first, None)
    stream = iter(loader(samples, batches, workers, device.type == "cuda"))

    log = Log(folder, valid, resumed["log"] if resumed else 0) if team.rank == 0 else None
    data = frames.fingerprint()
    start = time.perf_counter()
    seen, edges, slots = 0, 0, 0  # structures, neighbours, neighbours with padding
    waited, watching = 0.0, 0.0  # seconds

    def elapsed() -> float:
        return earlier + time.perf_counter() - start

    def done(seconds: float) -> float:
        """How much of the training is over, 0 … 1."""
        clock = seconds / (60 * s.minutes) if s.minutes else 0.0
        return min(1.0, max(step / steps, clock))

    def save() -> float:
        if team.rank == 0:
            facet.save(averaged, folder / "model.pt")
            facet.save(model, folder / "checkpoint.pt", averaged=averaged.state_dict(),
                       optimizers=[adamw.state_dict(), muon.state_dict()], step=step,
                       seconds=elapsed(), settings=asdict(s), log=os.path.getsize(log.path),
                       data=data)
        return elapsed()

    progress = done(earlier)
    origin = earlier, progress  # from where the time left is reckoned
    saved = earlier if resumed else save()
    with interruptible() as interrupted:
        while progress < 1:
            # A batch; the first steps tell how long it will take
            moment = time.perf_counter()
            rows, batch, target = next(stream)
            if isinstance(batch, str):
                raise BadInput(batch)
            edges += int(target["edges"])
            slots += batch.src.numel()
            batch = batch.to(device)
            target = {name: label.to(device, non_blocking=True) for name, label in target.items()}
            waited += time.perf_counter() - moment

            # Forward: three losses, the energy's weight grows from a twentieth
            labelled = team.sum(target["count"].clone())  # [3]
            out = engine(batch, differentiable=True)
            parts = losses(out, target, labelled, model.config.energy_scale, s.huber)  # [3]
            weights = s.energy_weight * 0.05 ** (1 - progress), 1.0, s.stress_weight
            loss = sum(weight * part for weight, part in zip(weights, parts))

            # Backward; DistributedDataParallel takes the mean over processes, and we want the sum
            model.zero_grad()
            (team.size * loss).backward()
            gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)

            # All processes learn the same: losses, the first one's clock, whether to stop
            clock = elapsed() if team.rank == 0 else 0.0
            mine = torch.tensor([clock, len(interrupted)], dtype=torch.float64, device=device)
            news = torch.cat([parts.detach(), gradient.detach()[None] / team.size, mine])  # [6]
            *parts, gradient, seconds, stop = team.sum(news).tolist()
            if not np.isfinite([*parts, gradient]).all():
                give_up(model, samples, rows, s, f"at step {step} of {folder}", team)

            # Step: warm-up, then a cosine to zero; the average of the weights follows
            schedule = min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            for optimizer, highest in ((adamw, s.lr), (muon, s.muon_lr)):
                optimizer.param_groups[0]["lr"] = highest * schedule
                optimizer.step()
            step += 1
            seen += len(rows)
            with torch.no_grad():
                share = 1 - min(s.ema, step / (step + 9))
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)

            # Log twenty times; save then, and every few minutes, and before a stop
            before, progress = progress, done(seconds)
            total = sum(weight * part for weight, part in zip(weights, parts))
            if step == first + 5:
                origin = seconds, progress  # the first steps are slow
            left = (seconds - origin[0]) * (1 - progress) / max(progress - origin[1], 1e-9)
            twentieth = int(20 * progress) > int(20 * before)
            if log:
                log.progress(step, steps, left)
                if step == first + 15:
                    log.show(f"{steps} steps, {in_epoch} an epoch: about {duration(left)}")
            if twentieth or stop or seconds > saved + SAVE_SECONDS:
                moment = time.perf_counter()
                if log and twentieth:
                    rate = seen / (seconds - earlier - watching)
                    log.line(averaged, step, seconds, left, [total, *parts], s.lr * schedule,
                             gradient, rate)
                saved = save()
                watching += time.perf_counter() - moment
            if stop and progress < 1:
                raise KeyboardInterrupt

    spent = elapsed() - earlier or 1.0
    return averaged, {
        "train_seconds": elapsed(), "steps": step, "padding": 1 - edges / max(1, slots),
        "time": {"model and optimisers": 1 - (waited + watching) / spent,
                 "waiting for data": waited / spent, "tests and checkpoints": watching / spent}}


def length_of(frames: Frames, s: Settings, in_epoch: int) -> int:
    """Steps of a training, of which an epoch has `in_epoch`."""
    if s.steps or s.epochs:
        return s.steps or math.ceil(s.epochs * in_epoch)
    molecules = not any(atoms.pbc.any() for atoms in sample(frames))
    return max(EPOCHS * in_epoch, STEPS if molecules else 0)


def ten_structures(frames: Frames) -> int:
    """Atoms in a batch of ten structures of mean size, at most 256."""
    return int(min(256, 10 * frames.atom_counts().mean()))


def give_up(model: facet.Facet, samples: Samples, rows, s: Settings, where: str, team: Team):
    """Raise BadInput with the names of the frames whose own loss or gradient is not finite."""
    alone = Samples(samples.frames, samples.config)
    device = next(model.parameters()).device
    names = []
    for i in rows[team.rank::team.size]:
        _, batch, target = alone[np.array([i])]
        target = {name: label.to(device) for name, label in target.items()}
        out = model(batch.to(device), differentiable=True)
        parts = losses(out, target, target["count"], model.config.energy_scale, s.huber)  # [3]
        gradient = torch.autograd.grad(parts.sum(), list(model.parameters()), allow_unused=True)
        values = [parts, *(g for g in gradient if g is not None)]
        if not all(value.isfinite().all() for value in values):
            names.append(alone.frames[int(i)].info["source"])

    everyone = [names]
    if team.size > 1:
        everyone = [None] * team.size
        dist.all_gather_object(everyone, names)
    guilty = ", ".join(chain.from_iterable(everyone))
    cause = f"because of {guilty}; look at it" if guilty else "on sound frames; lower --lr"
    raise BadInput(f"the loss became nan or infinite {where}, {cause}. model.pt holds the weights "
                   "before")


# ─── Command line ─────────────────────────────────────────────────────────────────────────────────


def new_folder(out: Path, name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where that holds results already."""
    for n in count(1):
        folder = out / (name if n == 1 else f"{name}-{n}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def device_of(s: Settings) -> str:
    """The device of this process. Every process finds its own; it is stored nowhere."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not s.device:
        return local if torch.cuda.is_available() else "cpu"
    return local if s.device == "cuda" else s.device


@contextmanager
def team_of(device: str):
    """This process' place among those that torchrun started; alone without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def checkpoint(folder: Path) -> dict:
    """What `train` left in a folder. Raises BadInput."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        there = "" if folder.exists() else "; there is no such folder"
        raise BadInput(f"{folder}: holds no checkpoint.pt to go on from{there}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings = content["settings"]
        for name in ("train", "valid", "test"):
            settings[name] = tuple(settings[name])
        Settings(**settings)
        return content
    except Exception as error:
        raise BadInput(f"{path}: is damaged, or was written by another version of train_small.py "
                       f"({type(error).__name__})") from error


def main(s: Settings, out: Path = Path("runs"), resume: Path | None = None,
         command: str = "") -> dict:
    """Read, train, test, draw; returns what result.json holds (other processes: nothing).

    With `resume`, the run in that folder goes on; s are its settings. Raises BadInput.
    """
    device = device_of(s)
    with team_of(device) as team:
        return train_and_report(s, out, resume, command, device, team)


def train_and_report(s: Settings, out: Path, resume: Path | None, command: str, device: str,
                     team: Team) -> dict:
    """What main does, as one of a team."""
    began = time.perf_counter()
    resumed = checkpoint(resume) if resume else None
    out = resume.parent if resume else out
    out.mkdir(parents=True, exist_ok=True)
    s = replace(s, epochs=s.epochs or (0 if s.train else 25),
                name=s.name or (Path(s.train[0].replace("*", "")).stem if s.train else "emt"))

    # Data; the first process goes ahead, so that whatever must be made is made once
    for turn in (team.rank == 0, team.rank != 0):
        if turn:
            speak = team.rank == 0 and not resumed  # one process, once
            frames, valid, test = load(s, out, print_to_stderr if speak else None)
        if team.size > 1:
            dist.barrier()
    if resumed and resumed["data"] != frames.fingerprint():
        raise BadInput(f"{resume}: the training set is not the one that this run began with; "
                       "begin a new run")

    # Statistics and model
    config = facet.Config(**resumed["config"]) if resumed else statistics(frames, s)
    check_species(valid, config)
    check_species(test, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        model = facet.Facet(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    folder = resume or (new_folder(out, s.name) if team.rank == 0 else out)
    together = f"{team.size} processes, " if team.size > 1 else ""
    from_step = f" from step {resumed['step']}" if resumed else ""
    team.say(
        f"{len(frames)} structures to train on, {len(valid)} to validate, {len(test)} to test; "
        f"{frames.atom_counts().sum()} atoms of {' '.join(config.species)}; "
        f"{config.mean_neighbours:.1f} neighbours each, splines from {config.first_knot:.2f} to "
        f"{config.cutoff:g} Å; force RMS {config.energy_scale:.2f} eV/Å\n"
        f"Facet with {parameters} parameters, on {device}, {together}{torch.get_num_threads()} "
        f"threads, batches of {s.batch_atoms or ten_structures(frames)} atoms → {folder}/"
        f"{from_step}")

    # Training
    try:
        model, trained = train(model, frames, valid, s, folder, team, resumed)
    except KeyboardInterrupt:
        team.say("\nstopped. model.pt holds the averaged weights; go on with: "
                 f"python train_small.py --resume {folder}")
        raise
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error}). What was saved "
                       "before is whole; when that is mended, go on with: python train_small.py "
                       f"--resume {folder}") from error
    if team.rank:
        return {}

    # Test, once; whatever happens there, the training is kept
    result = {
        "parameters": parameters, **trained, "command": command, "settings": asdict(s),
        "config": asdict(config), "processes": team.size, "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"}
    try:
        result.update(report.report(folder))
    except Exception as error:
        print(f"the report failed ({type(error).__name__}: {error}); the training is whole. Try "
              f"again with: python -m tools.report {folder}", file=sys.stderr)
    result["total_seconds"] = time.perf_counter() - began
    (folder / "result.json").write_text(json.dumps(result, indent=1))

    shares = ", ".join(f"{100 * share:.1f} % {what}" for what, share in trained["time"].items())
    print(f"\ntime in training: {shares}; {100 * trained['padding']:.0f} % of the neighbours in "
          f"the batches are padding\n{folder}/: model.pt, checkpoint.pt, metrics.csv, result.json, "
          f"report.png; {result['total_seconds']:.0f} s in all")
    return result


LATER = ("minutes", "steps", "epochs", "device", "threads", "workers")  # may change when resumed


def parse(arguments: list[str]) -> tuple[Settings, Path | None]:
    """Settings from the command line, and the run to resume.

    A wrong flag ends the program with one sentence and code 2.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        shown = "" if f.default in ((), "", 0, -1) else f" (default {f.default})"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        if isinstance(f.default, tuple):
            parser.add_argument(f"--{f.name}", metavar="FILE", nargs="+", help=text)
        elif isinstance(f.default, bool):
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            metavar = f.name.upper() if f.default == "" else "X"
            parser.add_argument(f"--{f.name}", metavar=metavar, type=type(f.default), help=text)
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="go on with the run in this folder, with its own settings; of them "
                        f"only {', '.join(LATER)} can be changed")

    given = vars(parser.parse_args(arguments))
    for name in ("train", "valid", "test"):
        if name in given:
            given[name] = tuple(given[name])

    resume = given.pop("resume", None)
    if resume:
        wrong = sorted(set(given) - set(LATER))
        if wrong:
            parser.error(f"--{wrong[0]} cannot be changed when a run goes on; begin a new run")
        given = {**checkpoint(resume)["settings"], **given}
    try:
        s = Settings(**given)
    except ValueError as error:
        parser.error(str(error))
    if s.test not in ((), ("0",)) and not s.train:
        parser.error("--test without --train: say what to train on")
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
        words = shlex.join(["python", *sys.argv])
        main(settings, resume=going_on, command=words)
    except (BadInput, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
