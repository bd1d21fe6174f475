"""tools/replay.py: padding adds nothing, recordings give the same numbers, on a GPU and without."""
import copy
from functools import partial
from unittest import mock

import pytest
import torch

import facet
import train_small
from tests.test_train import copper, file_of, frames_of, run, short
from tools import replay
from tools.batches import Samples
from tools.check import MODELS, SMALL, TRICLINIC, batch_of, build, differ, same
from tools.frames import BadInput
from tools.labels import TABLE
from tools.properties import random_alloy
from tools.run import filled
from tools.statistics import statistics

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine")
CUDA = pytest.param("cuda", marks=needs_cuda)


class Again:
    """A graph for machines without a GPU: it runs the function again and writes to its results."""

    def __init__(self, function):
        self.function = function
        self.out = function()

    def replay(self):
        for name, value in self.function().items():
            self.out[name].copy_(value)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """A device with recordings."""
    if request.param == "cpu":
        def record(function, pool):
            graph = Again(function)
            return graph, graph.out

        monkeypatch.setattr(replay, "record", record)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None, raising=False)
    return request.param


def test_rooms_grow_by_at_most_a_half():
    rooms = [replay.room(n) for n in range(1, 3000)]
    assert sorted(set(rooms))[:7] == [8, 12, 16, 24, 32, 48, 64]
    for n, found in enumerate(rooms, 1):
        assert n <= found <= max(8, 1.5 * n)


@pytest.mark.parametrize("name", MODELS)
def test_padding_adds_nothing(name):
    """All results of two crystals, in a place that held a larger one before."""
    model = build(**MODELS[name])
    large = batch_of(model, TRICLINIC, TRICLINIC, SMALL, SMALL)
    small = batch_of(model, SMALL, TRICLINIC)
    shape = replay.shape_for(large)
    padding = replay.empty_batch(*shape, model.config, large.vectors)
    place = replay.empty_batch(*shape, model.config, large.vectors)
    for batch in (large, small):
        replay.fill_batch(place, padding, batch)
        found, wanted = model(place), model(batch)
        for key, value in wanted.items():
            same(key, found[key][:len(value)], value)
            assert len(found[key]) > len(value), "nothing is padded"
    differ("forces of the two", wanted["forces"][:2], model(large)["forces"][:2])


def test_replayed_model_is_the_model(device):
    """For crystals of other sizes, one after the other, through the calculator; and a copy."""
    calculator = facet.FacetCalculator(build(species=("C", "Si", "O")), device, torch.float64)
    wanted = calculator.model
    calculator.model = replay.Replayed(wanted)
    for atoms in (random_alloy(8), random_alloy(27), random_alloy(8), SMALL):
        calculator.calculate(atoms)
        crystal = facet.find_neighbours(atoms, wanted.config)
        for key, value in facet.evaluate(wanted, [crystal])[0].items():
            same(key, calculator.results[key], value)
    assert len(calculator.model.recordings) == 3

    before = calculator.results["forces"]
    with torch.no_grad():
        wanted.readout *= 2
    calculator.calculate(SMALL)
    same("forces after the weights have changed", calculator.results["forces"], before)
    differ("forces of the changed model", facet.evaluate(wanted, [crystal])[0]["forces"], before)


def test_large_batches_are_not_replayed(device, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 4)
    model = copy.deepcopy(build()).to(device)
    replayed = replay.Replayed(model)
    batch = batch_of(model, TRICLINIC)
    same("forces", replayed(batch)["forces"], model(batch)["forces"])
    assert not replayed.recordings


def test_replayed_gradient_is_the_gradient(device, tmp_path):
    """Of all weights, for batches of other sizes; missing labels count as before."""
    frames = frames_of(tmp_path, copper(6))
    config, _ = statistics(frames, short())
    torch.manual_seed(0)
    model = facet.Facet(config).to(device)
    trained = list(model.parameters())
    samples = Samples(frames, config)

    find_gradient = partial(
        train_small.gradient_of, model, scale=config.energy_scale, huber=0.1)
    replayed = replay.ReplayedGradient(find_gradient, model)
    found = []
    for rows in ([0, 1], [2, 3, 4], [5], [0, 1]):
        _, batch, target = samples[torch.tensor(rows).numpy()]
        target = {name: value.to(device) for name, value in target.items()}
        target["weights"] = filled([1.0, 2.0, 3.0][:len(TABLE)], device)
        target["forces"][0] = torch.nan
        batch = batch.to(device)
        parts = replayed(batch, target).clone()
        gradients = [weights.grad.clone() for weights in trained]
        same("losses", parts, find_gradient(batch, target), "float32")
        for weights, gradient in zip(trained, gradients, strict=True):
            same("gradient", gradient, weights.grad, "float32")
        found.append(gradients[0])
    differ("gradients of two batches", 100 * found[0], 100 * found[1])


def test_model_that_cannot_be_recorded_is_trained_all_the_same(monkeypatch):
    """With one warning; a full memory is another matter."""
    def fail(error):
        def record(function, pool):
            raise error
        return record

    batch = batch_of(build(), SMALL)
    zeros = {label.output: torch.zeros(len(batch.species) if label.per_atom else 1)
             for label in TABLE}
    target = {**zeros, "atoms": torch.tensor([2]), "count": torch.ones(3),
              "weights": torch.ones(3)}
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None, raising=False)
    replayed = replay.ReplayedGradient(lambda batch, target: "plain", build())
    monkeypatch.setattr(replay, "record", fail(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(batch, target)
    monkeypatch.setattr(replay, "record", fail(RuntimeError("a tensor of the CPU\nmore")))
    with pytest.warns(UserWarning, match="cannot be recorded .*.a tensor of the CPU.; its") as told:
        assert [replayed(batch, target) for _ in range(3)] == ["plain"] * 3
    assert len(told) == 1


# ─── Training on a GPU ──────────────────────────────────────────────────────────────────────────


class Stop(Exception):
    """Ends a training where a kill would."""


def weights_of(path) -> torch.Tensor:
    return torch.cat([weights.detach().flatten() for weights in facet.load(path).parameters()])


@needs_cuda
def test_training_on_a_gpu_is_that_on_the_cpu(tmp_path):
    """Eight steps in one go, and runs that change the device in the middle, both ways."""
    file_of(tmp_path, copper(6))
    found = {}
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        run(tmp_path, out=device, device=device, steps=8)
        found[device] = weights_of(tmp_path / device / "a" / "model.pt")
        weights = [train_small.loss_weights(short(), step / 8) for step in range(4)]
        with mock.patch.object(train_small, "loss_weights", side_effect=[*weights, Stop]):
            with pytest.raises(Stop):
                run(tmp_path, out=f"{device} first", device=device, steps=8)
        run(tmp_path, out=f"{device} first", resume=True, device=other, steps=8)
        found[f"{device} first"] = weights_of(tmp_path / f"{device} first" / "a" / "model.pt")
    for name, weights in found.items():
        same(name, weights, found["cpu"], "float32 slope")


@needs_cuda
def test_full_memory_of_a_gpu_is_a_sentence(tmp_path):
    """For the trainer and for the calculator; with more memory both go on."""
    file_of(tmp_path, copper(6))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    calculator = facet.FacetCalculator(build(species=("C", "Si", "O")), "cuda")
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2e7) / total)
    try:
        with pytest.raises(MemoryError, match="8000 atoms at once need more memory than cuda:0"):
            calculator.calculate(random_alloy(8000))
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_allocated() + 4e6) / total)
        with pytest.raises(BadInput, match="memory than cuda:0 .* with a --batch_atoms below"):
            run(tmp_path, device="cuda", channels=64, batch_atoms=5000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    calculator.calculate(random_alloy(8000))
    run(tmp_path, out="again", device="cuda")
