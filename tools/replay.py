"""CUDA graphs: kernels are recorded once and replayed, which a GPU needs where crystals are small.

    calculator = FacetCalculator("runs/si/model.pt", "cuda")
    calculator.model = Replayed(calculator.model)    # for dynamics, relaxations and phonons

A call is some 500 kernels, a training step 1,500. On a few hundred atoms each of them takes
microseconds, and the CPU needs longer to launch it than the GPU to run it. A recorded graph is
launched as a whole. It has fixed shapes, so batches are padded to one of a few: atoms that nobody
sees, neighbours beyond the cutoff, and labels that are missing add exactly nothing. The trainer and
tools.relax do this by themselves on a GPU. `benchmarks/gpu.py` measures what it gives.
"""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import facet
from tools.labels import TABLE

MOST = 2048  # atoms; with more of them the GPU is busy anyway, and the padding would cost time


# ─── Padding ─────────────────────────────────────────────────────────────────────────────────────


def room(n: int) -> int:
    """The smallest of 8, 12, 16, 24, 32, 48, … that is at least n: at most a third is padding."""
    power = 8
    while power < n:
        power *= 2
    return power * 3 // 4 if 8 < n <= power * 3 // 4 else power


def shape_for(batch: facet.Batch) -> tuple[int, int, int]:
    """Room for its atoms N, neighbours K and crystals S, and for one crystal of padding."""
    N, K = batch.src.shape
    return room(N), room(K), room(len(batch.volume) + 1)


def empty_batch(N: int, K: int, S: int, config: facet.Config, like: Tensor) -> facet.Batch:
    """N atoms with K places for neighbours: all of it padding, of the last of S crystals.

    Every species that the model knows is present, so that U is fixed. dtype and device as `like`.
    """
    atoms = torch.arange(N)  # [N]
    beyond = torch.tensor([2 * config.cutoff, 0.0, 0.0], dtype=like.dtype)  # [3] Å
    batch = facet.Batch(
        species=torch.zeros(N, dtype=torch.long),
        src=atoms[:, None].repeat(1, K),  # [N, K]
        vectors=beyond.repeat(N, K, 1),  # [N, K, 3]
        crystal=torch.full((N,), S - 1),  # [N]
        volume=torch.ones(S, dtype=torch.float64),
        present=torch.arange(len(config.species)),  # [U]
    )
    return batch.to(like.device)


def fill_batch(place: facet.Batch, padding: facet.Batch, batch: facet.Batch) -> None:
    """Put a batch into a larger place, and padding around it."""
    N, K = batch.src.shape
    for there, nothing in zip(place, padding, strict=True):
        there.copy_(nothing)
    place.species[:N] = batch.species
    place.src[:N, :K] = batch.src
    place.vectors[:N, :K] = batch.vectors
    place.crystal[:N] = batch.crystal
    place.volume[:len(batch.volume)] = batch.volume


def empty_target(N: int, S: int, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Room for the labels of N atoms and S crystals; the rest of `target` keeps its shape.

    target: "atoms" [S], "count" [3], "weights" [3] and, by the name of an output, each label.
    """
    place = {}
    for label in TABLE:
        given = target[label.output]
        place[label.output] = given.new_empty(N if label.per_atom else S, *given.shape[1:])
    place["atoms"] = target["atoms"].new_empty(S)  # [S]
    for name in ("count", "weights"):
        place[name] = torch.empty_like(target[name])  # [3]
    return place


def fill_target(place: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Put labels into a larger place. Padding has none: they are nan there."""
    for name, there in place.items():
        given = target[name]
        if len(there) > len(given):
            there.fill_(1 if name == "atoms" else torch.nan)
        there[:len(given)] = given


# ─── Recording ───────────────────────────────────────────────────────────────────────────────────


class Recording(NamedTuple):
    """A function of fixed shapes: what is filled in, how it is run, what it writes."""

    place: facet.Batch
    padding: facet.Batch
    target: dict[str, Tensor]  # of a training step
    graph: torch.cuda.CUDAGraph
    out: dict[str, Tensor]


def record(function: Callable, pool) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """The kernels of function() as a graph, and the tensors that it returned.

    pool: memory that is shared with other graphs; only one of them runs at a time.
    """
    # What is done only at the first call must not be recorded
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()
    return graph, out


class Replayed(nn.Module):
    """A copy of a Facet on a GPU that takes the same batches and gives the same numbers, sooner.

    It is for evaluation: nothing can be differentiated, and weights that change later do not count.
    A shape that is new costs three calls, for the recording.
    """

    def __init__(self, model: facet.Facet):
        super().__init__()
        # In training mode no result decides what is computed, which a recording could not know
        self.model = copy.deepcopy(model).requires_grad_(False).train()
        self.config = model.config
        self.recordings = {}  # by shape_for
        self.pool = torch.cuda.graph_pool_handle()

    def train(self, mode: bool = True) -> Replayed:
        """Nothing changes: the copy stays in the mode that can be recorded."""
        return self

    def forward(self, batch: facet.Batch) -> dict[str, Tensor]:
        """As Facet.forward, detached."""
        N, S = len(batch.species), len(batch.volume)
        if N > MOST:
            return self.model(batch)

        shape = shape_for(batch)
        if shape not in self.recordings:
            padding = empty_batch(*shape, self.config, batch.vectors)
            place = empty_batch(*shape, self.config, batch.vectors)
            graph, out = record(lambda: self.model(place), self.pool)
            self.recordings[shape] = Recording(place, padding, {}, graph, out)
        recording = self.recordings[shape]
        fill_batch(recording.place, recording.padding, batch)
        recording.graph.replay()

        # The next replay writes to the same places
        found = {}
        for name, value in recording.out.items():
            found[name] = value[:S if name in facet.PER_CRYSTAL else N].clone()
        return found


class ReplayedGradient:
    """The first half of a training step on a GPU, sooner: gradient(batch, target) → losses [3].

    gradient leaves the gradient of the losses in .grad of the model's weights, and so does this. A
    model that cannot be recorded, because it reads numbers of the CPU or waits for results, is
    trained without recordings: a warning says so.
    """

    def __init__(self, gradient: Callable, model: facet.Facet):
        self.gradient = gradient
        self.model = model
        self.trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.recordings = {}  # by shape_for
        self.pool = torch.cuda.graph_pool_handle()
        self.most = MOST

    def __call__(self, batch: facet.Batch, target: dict[str, Tensor]) -> Tensor:
        if len(batch.species) > self.most:
            return self.gradient(batch, target)

        shape = shape_for(batch)
        if shape not in self.recordings:
            try:
                self.recordings[shape] = self.record(shape, batch, target)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.most = 0
                reason = str(error).splitlines()[0]
                warnings.warn(f"this model cannot be recorded as a CUDA graph ({reason}); its "
                              "training steps take several times as long", stacklevel=2)
                return self.gradient(batch, target)
        recording = self.recordings[shape]
        fill_batch(recording.place, recording.padding, batch)
        fill_target(recording.target, target)
        recording.graph.replay()

        # Each recording has gradients of its own
        for name, weights in self.trained.items():
            weights.grad = recording.out[name]
        return recording.out["losses"]

    def record(self, shape: tuple[int, int, int], batch: facet.Batch, target: dict) -> Recording:
        config = self.model.config
        padding = empty_batch(*shape, config, batch.vectors)
        place = empty_batch(*shape, config, batch.vectors)
        labels = empty_target(shape[0], shape[2], target)
        fill_target(labels, target)

        def step() -> dict[str, Tensor]:
            found = self.gradient(place, labels)
            gradients = {name: weights.grad for name, weights in self.trained.items()}
            return {"losses": found, **gradients}

        graph, out = record(step, self.pool)
        return Recording(place, padding, labels, graph, out)
