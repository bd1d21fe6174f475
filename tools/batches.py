"""Frames to batches: which frames train together, in what order, prepared ahead of the model.

The order follows from the seed alone. So step n of a run sees batch n, resumed or not, on any
number of processes.
"""
from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np
import torch

import facet
from tools.frames import BadInput, Frames, neighbours, sample
from tools.labels import TABLE, Label
from tools.run import ALONE, Progress, Team

if TYPE_CHECKING:
    from train_small import Settings

EPOCHS = 40          # times through the data, unless told otherwise …
STEPS = 10_000       # … and for molecules, whose frames are small, at least so many steps
KEPT = 10 ** 7       # neighbours that are kept in memory, about 0.5 GB; beyond, they are made anew
PADDING = 0.15       # of the neighbours in batches may be padding, because frames differ in crowd


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

        target: what each output of the model should be, energy [S] eV, forces [N, 3] eV/Å and
        virial [S, 3, 3] eV, nan where there is no label; atoms [S]; count [3], how many numbers
        of each label there are; edges.
        """
        share = rows[self.team.rank::self.team.size]
        idle = len(share) == 0  # more processes than frames: this one computes, but counts nothing
        share = rows[:1] if idle else share
        try:
            graphs = [self.graph(int(i)) for i in share]
        except BadInput as error:  # an exception would not leave a loader process in one piece
            return rows, str(error), None

        found = [self.frames[int(i)].calc.results for i in share]
        target = {label.output: target_of(label, found, graphs) for label in TABLE}
        if idle:
            target = {name: torch.full_like(label, np.nan) for name, label in target.items()}
        target["count"] = torch.stack([label.isfinite().sum() for label in target.values()])
        target["atoms"] = torch.tensor([len(graph.species) for graph in graphs])
        target["edges"] = torch.tensor(sum(len(graph.dst) for graph in graphs))
        return rows, facet.make_batch(graphs, self.config.cutoff), target


def target_of(label: Label, found: list[dict], graphs: list[facet.Neighbours]) -> torch.Tensor:
    """What the model's output should be for these frames, nan where there is no label.

    found: the labels of each frame. Shape [N, …] if there is a row for each atom, else [S, …].
    """
    values = []
    for results, graph in zip(found, graphs, strict=True):
        value = label.array(results, len(graph.species))  # [n, …] or […]
        values.append(value * graph.volume if label.per_volume else value)
    joined = np.concatenate(values) if label.per_atom else np.stack(values)

    # Totals reach 10⁵ eV and differ by meV
    return torch.from_numpy(joined).to(torch.float64 if label.extensive else torch.float32)


def ten_structures(frames: Frames) -> int:
    """Atoms in a batch of ten structures of mean size, at most 256."""
    return int(min(256, 10 * frames.atom_counts().mean()))


def length_of(frames: Frames, s: Settings, in_epoch: int) -> int:
    """Steps of a training, of which an epoch has `in_epoch`."""
    if s.steps or s.epochs:
        return s.steps or math.ceil(s.epochs * in_epoch)
    molecules = not any(atoms.pbc.any() for atoms in sample(frames))
    return max(EPOCHS * in_epoch, STEPS if molecules else 0)


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


def endless_batches(samples: Samples, s: Settings) -> tuple[Iterator[np.ndarray], int]:
    """The batches of all epochs, one after the other, and how many the first epoch has.

    As many neighbours as ten structures have, or batch_atoms at mean density.
    """
    crowd = samples.crowd()  # [F]
    budget = (s.batch_atoms or ten_structures(samples.frames)) * crowd.mean()
    plans = epochs(samples.atoms, crowd, budget, s.seed)
    first = next(plans)
    return chain(first, chain.from_iterable(plans)), len(first)


def epochs(atoms: np.ndarray, crowd: np.ndarray, budget: float, seed: int) -> Iterator[list]:
    """Plans without end, from the seed alone.

    So step n of a run, resumed or not, on any number of processes, sees batch n.
    """
    for epoch in count():
        yield plan(atoms, crowd, budget, np.random.default_rng([seed, epoch]))


def loader(samples: Samples, batches: Iterable[np.ndarray], workers: int, cuda: bool):
    """Prepares batches ahead, in `workers` processes; in this one if there are none.

    -1: none if neighbours are kept in memory, else one less than there are cores.
    """
    if workers < 0:
        cores = os.cpu_count() // samples.team.size
        workers = 0 if samples.graphs is not None else max(1, cores - 1)
    return torch.utils.data.DataLoader(
        samples, batch_size=None, sampler=batches, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=cuda, worker_init_fn=ignore_interrupts)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the trainer ends its step first, and needs its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def fetch(stream, device: torch.device, p: Progress):
    """The next batch, on the device: its rows, itself, its labels. Raises BadInput."""
    moment = time.perf_counter()
    rows, batch, target = next(stream)
    if isinstance(batch, str):  # what is wrong with a frame
        raise BadInput(batch)
    p.edges += int(target["edges"])
    p.slots += batch.src.numel()
    batch = batch.to(device)
    target = {name: label.to(device, non_blocking=True) for name, label in target.items()}
    p.waited += time.perf_counter() - moment
    return rows, batch, target


def check_outputs(model: facet.Facet, frames: Frames) -> None:
    """Raise BadInput if there is a label that the model does not predict."""
    device = next(model.parameters()).device
    graph = neighbours(frames[0], model.config)
    out = model(facet.make_batch([graph], model.config.cutoff).to(device))
    for label in TABLE:
        if label.output not in out:
            raise BadInput(f"{label.name} is a label, but the model has no output "
                           f"{label.output} to learn it: add it to Facet.atomic_outputs, or take "
                           "the label out of tools/labels.py")
