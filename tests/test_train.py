"""Tests of train_small.py: what a training writes, repeats, refuses and survives.

    pytest tests/test_train.py

Models are tiny and trainings short; what is looked at by several tests is trained once (`whole`,
`base`). Reports and suspicions have tests of their own: here there are none. Comparisons and
tolerances are those of test_facet.py.
"""
import copy
import csv
import errno
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime, timezone
from functools import cache, partial
from itertools import combinations_with_replacement, count, islice
from pathlib import Path
from unittest import mock

import ase
import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from torch.utils._python_dispatch import TorchDispatchMode

import facet
import train_small
from tools import batches, database, options, statistics
from tools import frames as of_frames
from tools import run as of_run
from tools.check import build, differ, largest, same
from tools.frames import in_memory, load_sets
from tools.labels import labelled
from tools.properties import ALL
from tools.report import read_run
from tools.run import checkpoint as read_checkpoint

HERE = Path(__file__).resolve().parent.parent

SHORT = {"channels": 8, "layers": 1, "degree": 1, "cutoff": 3.2, "batch_atoms": 16, "threads": 1,
         "workers": 0, "steps": 8, "name": "a", "device": "cpu"}
VOIGT_OF_9 = [0, 5, 4, 5, 1, 3, 4, 3, 2]  # of 3 × 3 elements, where they are among ASE's six
TIMES = ("seconds", "structures_per_s")  # columns of metrics.csv that depend on the machine


@pytest.fixture(autouse=True, scope="module")
def only_training():
    """No report and no suspicions: tests/test_report.py and tests/test_frames.py test those."""
    with mock.patch.object(train_small.report, "report", lambda folder: {}):
        with mock.patch.object(of_frames, "look_at", lambda given, say: None):
            yield


@cache
def crystal(i: int) -> Atoms:
    """Rattled copper of four or eight atoms, a third of it alloyed with gold, with EMT's labels."""
    atoms = ase.build.bulk("Cu", cubic=True, a=3.7) * (1 + i % 2, 1, 1)
    atoms.symbols[0] = ("Cu", "Au")[i % 3 == 1]
    atoms.rattle(0.1, seed=i)
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
              "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def copper(count: int = 12, first: int = 0) -> list[Atoms]:
    """So many of them, the reader's own; others for another `first`."""
    return [copy.deepcopy(crystal(i)) for i in range(first, first + count)]


def file_of(folder: Path, crystals: list[Atoms], name: str = "data.extxyz") -> str:
    ase.io.write(folder / name, crystals)
    return str(folder / name)


def frames_of(folder: Path, crystals: list[Atoms]):
    return load_sets(train_small.Settings(
        train=(file_of(folder, crystals),), valid=("0",), test=("0",)), folder)[0]


def short(**changes) -> train_small.Settings:
    return train_small.Settings(**{**SHORT, **changes})


def seeded(config: facet.Config) -> facet.Facet:
    """The same first weights every time, and global random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return facet.Facet(config)


def run(folder: Path, out: str = "runs", resume: bool = False, **changes) -> dict:
    """A short training on the file in the folder, in folder/out/a."""
    s = short(**{"train": (str(folder / "data.extxyz"),), **changes})
    return train_small.main(s, folder / out, folder / out / "a" if resume else None)


def checkpoint(folder: Path) -> dict:
    return read_checkpoint(folder, train_small.Settings)


def metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def outcome(folder: Path) -> tuple:
    """Weights, and what metrics.csv says but for the times."""
    rows = [{name: cell for name, cell in row.items() if name not in TIMES}
            for row in metrics(folder)]
    state = facet.load(folder / "model.pt").state_dict()
    return {name: weights.tolist() for name, weights in state.items()}, rows


@contextmanager
def at_step(number: int, what: Callable):
    """While this step, counted from one, computes its losses, `what` is called."""
    losses, calls = train_small.losses, []

    def watched(*arguments):
        calls.append(1)
        if len(calls) == number:
            what()
        return losses(*arguments)
    with mock.patch.object(train_small, "losses", watched):
        yield


def kill():
    """As a kill would: nothing is saved any more."""
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of copper() that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    file_of(folder, copper())
    run(folder)
    return folder / "runs" / "a"


def test_training_learns_and_writes_its_files(tmp_path):
    file_of(tmp_path, copper())
    result, folder = run(tmp_path, steps=60), tmp_path / "runs" / "a"
    log = metrics(folder)
    assert [int(row["step"]) for row in log] == [*range(3, 61, 3)]
    assert tuple(log[0]) == ("step", "seconds", "loss", "loss_energy", "loss_forces", "loss_stress",
                             "energy_mae_meV_per_atom", "force_mae_meV_per_A", "stress_mae_GPa",
                             "lr", "gradient", "structures_per_s")
    for name in ("loss", "force_mae_meV_per_A"):
        assert float(log[-1][name]) < 0.6 * float(log[0][name]), f"{name} did not fall"
    saved = json.loads((folder / "result.json").read_text())
    assert saved == json.loads(json.dumps(result)) and saved["steps"] == 60
    assert saved["settings"]["channels"] == 8 and saved["torch_threads"] == 1
    assert sum(saved["time"].values()) == pytest.approx(1) and min(saved["time"].values()) >= 0
    assert 0 <= saved["padding"] < 0.5
    model = facet.load(folder / "model.pt")
    assert sum(p.numel() for p in model.parameters()) == saved["parameters"]
    assert model.config == facet.Config(**saved["config"]) and model.config.species == ("Cu", "Au")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == 60
    for name, averaged in content["averaged"].items():
        same(name, model.state_dict()[name], averaged, "exact")
    assert largest(content["state"]["embedding.W"], model.embedding.W)[0] > 1e-6, "no average"


def test_log_watches_validation_by_the_saved_model_and_never_the_test_set(tmp_path):
    """The last line's errors, by hand; another test set changes nothing."""
    crystals = copper(9)
    file_of(tmp_path, crystals[:6])
    valid = file_of(tmp_path, crystals[6:], "valid.extxyz")
    run(tmp_path, valid=(valid,), test=("0",), steps=2)
    calculator, errors = facet.FacetCalculator(tmp_path / "runs" / "a" / "model.pt", "cpu"), []
    for atoms in crystals[6:]:
        stress = calculator.get_stress(atoms) - atoms.get_stress()
        energy = calculator.get_potential_energy(atoms) - atoms.get_potential_energy()
        forces = calculator.get_forces(atoms) - atoms.get_forces()
        errors.append((1000 * abs(energy) / len(atoms), 1000 * np.abs(forces), stress))
    last = metrics(tmp_path / "runs" / "a")[-1]
    energy, forces = np.mean([e for e, _, _ in errors]), np.concatenate([f for _, f, _ in errors])
    same("energy MAE", float(last["energy_mae_meV_per_atom"]) / energy, 1, "float32")
    same("force MAE", float(last["force_mae_meV_per_A"]) / forces.mean(), 1, "float32")
    stress = np.mean([np.abs(s[VOIGT_OF_9]).mean() for _, _, s in errors]) / units.GPa
    same("stress MAE", float(last["stress_mae_GPa"]) / stress, 1, "float32")

    for name, others in (("same", copper(2, 100)), ("other", copper(1, 200))):
        test = file_of(tmp_path, others, f"{name}.extxyz")
        run(tmp_path, name, valid=(valid,), test=(test,), steps=2)
        assert outcome(tmp_path / name / "a") == outcome(tmp_path / "runs" / "a")
    run(tmp_path, "blind", valid=("0",), test=("0",), steps=2)
    weights, rows = outcome(tmp_path / "blind" / "a")
    assert weights == outcome(tmp_path / "runs" / "a")[0]
    assert all(row["force_mae_meV_per_A"] == "nan" for row in rows)


def test_screen_has_a_title_above_every_number(tmp_path, capsys):
    """The layout, to the character."""
    log = train_small.Log(tmp_path, frames_of(tmp_path, copper(2))[:0], 0)
    row = dict.fromkeys(log.columns, 2.5)
    with mock.patch.object(log, "errors", lambda model: {}):
        log.line(None, 90.0, {**row, "step": 7})
    title, line = capsys.readouterr().out.splitlines()
    assert title == ("   step    loss  (energy  forces  stress)   energy MAE    force MAE"
                     "   stress MAE        lr  structures/s      left")
    assert line == ("      7  2.5000 (2.50000  2.5000  2.5000)     2.50 meV     2.5 meV/Å"
                    "    2.500 GPa   2.5e+00           2.5      90 s")


def test_line_of_the_log_names_every_column(tmp_path):
    """One that is missing or too many is an error, not a shift of the others."""
    log = train_small.Log(tmp_path, frames_of(tmp_path, copper(2)), 0)
    row = dict.fromkeys(log.columns, 1.5)
    log.write(dict(reversed(row.items())))
    assert metrics(tmp_path) == [dict.fromkeys(log.columns, "1.5")]
    for wrong in ({**row, "loss_charges": 2.5}, {name: 1.5 for name in row if name != "lr"}):
        with pytest.raises(ValueError, match="^columns .*, not "):
            log.write(wrong)
    assert len(metrics(tmp_path)) == 1


def test_losses_are_told_apart_by_their_names(tmp_path):
    """In another order they weigh and log the same; one that nobody knows ends the training."""
    right = train_small.losses
    file_of(tmp_path, copper(4))
    run(tmp_path, steps=2)
    with mock.patch.object(train_small, "losses", lambda *a: dict(reversed(right(*a).items()))):
        run(tmp_path, "turned", steps=2)
    turned, straight = (metrics(tmp_path / out / "a")[-1] for out in ("turned", "runs"))
    for name in ("loss", "loss_energy", "loss_forces", "loss_stress"):
        same(name, float(turned[name]), float(straight[name]), "float32")
    with mock.patch.object(train_small, "losses", lambda *a: {
            "charges": torch.tensor(5.0), **right(*a)}):
        with pytest.raises(KeyError, match="charges"):
            run(tmp_path, "fourth", steps=2)
    assert metrics(tmp_path / "fourth" / "a") == []


def test_label_that_the_model_does_not_predict_is_refused(tmp_path):
    """A label too many in the table, or an output too few."""
    file_of(tmp_path, copper())
    forward = facet.Facet.forward

    def without_virial(self, *arguments, **more):
        out = forward(self, *arguments, **more)
        del out["virial"]
        return out
    with mock.patch.object(facet.Facet, "forward", without_virial):
        with pytest.raises(train_small.BadInput, match="stress is a label, but .* output virial"):
            run(tmp_path)
    assert not list((tmp_path / "runs").iterdir()), "something was written"
    run(tmp_path, steps=1)


def test_log_watches_fifty_frames_from_all_of_validation(tmp_path):
    """The same ones in every run of these data."""
    atom = Atoms("Cu", cell=[9, 9, 9], pbc=True)
    frames = in_memory(labelled(atom, float(i), source=f"frame {i}") for i in range(120))
    one, two = (train_small.Log(tmp_path, frames, 0).watched for _ in range(2))
    numbers = [int(atoms.info["source"].split()[-1]) for atoms in one]
    assert len(set(numbers)) == 50 and one.fingerprint() == two.fingerprint()
    for third in range(3):
        assert 8 < sum(n // 40 == third for n in numbers) < 26, "a third is not seen"
    assert len(train_small.Log(tmp_path, frames[:20], 0).watched) == 20


def test_length_of_a_training(tmp_path):
    frames = frames_of(tmp_path, copper(6))
    for train, epochs, want in ((("data.extxyz",), 0.0, 0), ((), 0.0, 25), ((), 3.0, 3)):
        s = train_small.Settings(train=train, epochs=epochs, name="e")
        parts = (frames, frames[:0], frames[:0])
        with mock.patch.object(of_run, "load_sets", lambda *_, parts=parts: parts), \
                mock.patch.object(train_small, "train", side_effect=KeyboardInterrupt) as called:
            with pytest.raises(KeyboardInterrupt):
                train_small.main(s, tmp_path / "runs")
        assert called.call_args.args[3].epochs == want
    result = run(tmp_path, steps=0, epochs=2.5, batch_atoms=1000, valid=("0",), test=("0",))
    assert result["steps"] == 3

    # Molecules are small: an epoch of them is short, and they get many
    s = train_small.Settings()
    assert train_small.length_of(frames, s, 7) == 40 * 7
    assert train_small.length_of(frames, train_small.Settings(epochs=2.0), 7) == 14
    assert train_small.length_of(frames, train_small.Settings(epochs=2.0, steps=3), 7) == 3
    crystals = copper(6)
    for crystal in crystals:
        crystal.pbc = False
    molecules = frames_of(tmp_path, crystals)
    assert train_small.length_of(molecules, s, 7) == 10_000
    assert train_small.length_of(molecules, s, 1000) == 40_000
    assert train_small.length_of(molecules, train_small.Settings(epochs=2.0), 7) == 14


def test_padding_equals_that_by_hand(tmp_path):
    """Neighbours by ASE of the frames in each batch, over the places that the batch has."""
    crystals, loader = copper(9), train_small.loader
    crystals[0].set_cell(crystals[0].cell.array * 1.6, scale_atoms=True)
    crystals[0].calc = SinglePointCalculator(crystals[0], energy=0.0, forces=np.zeros((4, 3)))
    file_of(tmp_path, crystals)
    places, neighbours = [], []

    def watched(*arguments):
        for rows, batch, target in loader(*arguments):
            places.append(batch.src.numel())
            neighbours.append(sum(len(neighbor_list("i", crystals[i], 5.0)) for i in rows))
            yield rows, batch, target
    with mock.patch.object(train_small, "loader", watched):
        result = run(tmp_path, steps=7, valid=("0",), test=("0",), batch_atoms=30, cutoff=5.0)
    assert len(places) == 7
    same("padding", result["padding"], 1 - sum(neighbours) / sum(places), "formula")
    assert result["padding"] > 0.01, "there is none"


def test_same_seed_gives_the_same_numbers_on_a_busy_machine(whole, tmp_path):
    """The clock jumps about two minutes whenever somebody looks; and another seed: control."""
    file_of(tmp_path, copper())
    clock = iter(np.cumsum(np.random.default_rng(0).uniform(0, 200, 10 ** 5)))
    with mock.patch.object(train_small.time, "perf_counter", lambda: next(clock)):
        run(tmp_path, "busy")
    busy = tmp_path / "busy" / "a"
    assert outcome(busy) == outcome(whole)
    seconds = [float(metrics(folder)[-1]["seconds"]) for folder in (busy, whole)]
    assert seconds[0] > 100 * seconds[1], "the clock was not patched"
    run(tmp_path, "control", seed=1)
    assert outcome(tmp_path / "control" / "a")[0] != outcome(whole)[0]


def test_minutes_end_of_run_by_the_clock_and_a_resumed_run_goes_on_with_it(tmp_path):
    file_of(tmp_path, copper())
    clock = iter(range(10 ** 6))  # a second passes whenever somebody looks
    with mock.patch.object(train_small.time, "perf_counter", lambda: float(next(clock))):
        first = run(tmp_path, steps=500, minutes=1)
        assert 3 < first["steps"] < 60 <= first["train_seconds"] < 80
        again = run(tmp_path, resume=True, steps=500, minutes=1)
        assert again["steps"] == first["steps"], "its time was over"
        more = run(tmp_path, resume=True, steps=500, minutes=2)
        assert 1.5 * first["steps"] < more["steps"] < 2.5 * first["steps"]
    rates = [float(row["lr"]) for row in metrics(tmp_path / "runs" / "a")]
    assert rates[-1] < max(rates), "the schedule follows the clock"


def test_learning_rates_and_weights_of_the_losses_follow_their_schedules(tmp_path):
    """Warm-up to the fiftieth step, and a cosine to nothing; the energy's weight grows from a
    twentieth. In the log, and at each of 60 steps as the optimisers and the gradient see them."""
    file_of(tmp_path, copper(4))
    rates = {torch.optim.AdamW: [], torch.optim.Muon: []}
    weights, losses = {name: [] for name in ALL}, train_small.losses

    def watch(kind):
        step = kind.step

        def watched(self, *arguments):
            rates[kind].append(self.param_groups[0]["lr"])
            return step(self, *arguments)
        return mock.patch.object(kind, "step", watched)

    def watched(*arguments):
        parts = losses(*arguments)
        for name, part in parts.items():
            part.register_hook(lambda gradient, name=name: weights[name].append(float(gradient)))
        return parts
    with watch(torch.optim.AdamW), watch(torch.optim.Muon):
        with mock.patch.object(train_small, "losses", watched):
            run(tmp_path, steps=60, lr=2e-3, muon_lr=7e-3, energy_weight=3.0, stress_weight=0.7,
                valid=("0",), test=("0",))
    wanted = []
    for step in range(1, 61):
        progress = (step - 1) / 60
        cosine = 0.5 * (1 + np.cos(np.pi * progress))
        rate, of_energy = min(1, step / 50) * cosine, 3.0 * 0.05 ** (1 - progress)
        wanted.append((rate, of_energy))
        same(f"AdamW {step}", rates[torch.optim.AdamW][step - 1] / 2e-3, rate, "formula")
        same(f"Muon {step}", rates[torch.optim.Muon][step - 1] / 7e-3, rate, "formula")
        found = [weights[name][step - 1] for name in ("energy", "forces", "stress")]
        same(f"weights {step}", found, [of_energy, 1, 0.7], "float32 formula")
    assert {*map(len, weights.values()), *map(len, rates.values())} == {60}
    same("energy at first", weights["energy"][0], 3.0 / 20, "float32 formula")
    same("warm-up is over", rates[torch.optim.Muon][49] / 7e-3,
         (1 + np.cos(np.pi * 49 / 60)) / 2, "formula")

    log = metrics(tmp_path / "runs" / "a")
    assert len(log) == 20
    for row in log:
        rate, of_energy = wanted[int(row["step"]) - 1]
        same("rate", float(row["lr"]) / 2e-3, rate, "formula")
        energy, forces, stress = (float(row[f"loss_{of}"]) for of in ALL)
        loss = of_energy * energy + forces + 0.7 * stress
        same("loss", float(row["loss"]) / loss, 1, "float32 formula")


def test_seed_gives_the_first_weights(tmp_path):
    sets = dict.fromkeys(("train", "valid", "test"), frames_of(tmp_path, copper(4)))
    one, two, other = (
        train_small.first_model(short(seed=seed), sets, None, None, "", train_small.ALONE)
        for seed in (0, 0, 1))
    same("first weights of one seed", one.embedding.W, two.embedding.W, "exact")
    differ("first weights of another seed", one.embedding.W, other.embedding.W)


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique",
         "_unique", "repeat_interleave.Tensor")  # operators whose result the CPU must know
READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class Waits(TorchDispatchMode):
    """Counts where the CPU would wait for a GPU, while `on`: operators, and methods of tensors.

    On the CPU .tolist() is no operator; so both are looked at, and .item() counts twice.
    """

    def __init__(self):
        super().__init__()
        self.on, self.found = False, []
        self.methods = []

    def __torch_dispatch__(self, operator, types, arguments=(), more=None):
        name = operator.name().removeprefix("aten::")
        masks = [i for some in arguments[1:2] if isinstance(some, (list, tuple)) for i in some
                 if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        if self.on and (name.startswith(WAITS) or name.startswith("index") and masks):
            self.found.append(name)
        return operator(*arguments, **(more or {}))

    def __enter__(self):
        def watched(name):
            method = getattr(torch.Tensor, name)

            def call(*arguments, **more):
                if self.on:
                    self.found.append(name)
                return method(*arguments, **more)
            return mock.patch.object(torch.Tensor, name, call)
        self.methods = [watched(name) for name in READS]
        for method in self.methods:
            method.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        for method in self.methods:
            method.__exit__(*error)
        return super().__exit__(*error)


def waits_of_a_step(model: facet.Facet, frames, folder: Path) -> list[str]:
    """Where the CPU would wait for a GPU in the third step of a training, in order.

    What prepares batches, on the CPU anyway, is not watched, nor AdamW: its counters of steps are
    on the CPU everywhere.
    """
    waits, loader, steps = Waits(), train_small.loader, count(1)
    adamw, to = torch.optim.AdamW.step, facet.Batch.to

    def watched_loader(*arguments):
        for batch in loader(*arguments):
            yield batch
            if waits.on:
                return  # that was enough

    def watched_to(batch, device):
        waits.on = next(steps) == 3
        return to(batch, device)

    def unwatched_step(*arguments):
        on, waits.on = waits.on, False
        adamw(*arguments)
        waits.on = on
    with mock.patch.object(train_small, "loader", watched_loader), \
            mock.patch.object(facet.Batch, "to", watched_to), \
            mock.patch.object(torch.optim.AdamW, "step", unwatched_step):
        with waits, pytest.raises(StopIteration):
            train_small.train(model, frames, frames[:0], short(steps=240), folder)
    return waits.found


def test_step_waits_once_for_the_device(tmp_path):
    """For the losses, the gradient and the clock, in one .tolist(); another one is counted."""
    frames = frames_of(tmp_path, copper(4))
    config, _ = train_small.statistics(frames, short())
    model = seeded(replace(config, layers=3, degree=2))
    small = seeded(config)
    for one in (model, small):
        assert waits_of_a_step(one, frames, tmp_path) == ["tolist"]
    losses = train_small.losses
    for read in (lambda part: part.item(), lambda part: bool(part > 0),
                 lambda part: part[part > 0], lambda part: part.nonzero(),
                 lambda part: part.register_hook(lambda of: of.sum().item() and None)):
        def reads(*arguments, read=read):
            parts = losses(*arguments)
            read(parts["forces"])
            return parts
        with mock.patch.object(train_small, "losses", reads):
            assert len(waits_of_a_step(small, frames, tmp_path)) > 1, "a wait is not counted"


def test_average_of_the_weights_equals_that_by_hand(tmp_path):
    """average += (1 − min(ema, n/(n + 9))) (weights − average) after step n; all are saved."""
    file_of(tmp_path, copper(4))
    save, saved = facet.save, []

    def keep(model, path, **more):
        if "averaged" in more:
            averaged = more["averaged"]["embedding.W"].clone()
            saved.append((more["step"], model.embedding.W.detach().clone(), averaged))
        save(model, path, **more)
    with mock.patch.object(facet, "save", keep):
        run(tmp_path, ema=0.3, lr=0.1)
    assert [step for step, _, _ in saved] == [*range(9)]
    average = saved[0][1]
    for step, weights, averaged in saved[1:]:
        average = average + (1 - min(0.3, step / (step + 9))) * (weights - average)
        same(f"average after step {step}", averaged, average, "float32 formula")
    differ("average", average, saved[0][1])


def test_gradient_is_clipped_to_one_and_logged_as_it_was(tmp_path):
    """Losses a thousand times as large have gradients far above; their direction stays."""
    frames = frames_of(tmp_path, copper(4))
    model = seeded(train_small.statistics(frames, short())[0])
    losses, step, lengths = train_small.losses, torch.optim.AdamW.step, []

    def watched(*arguments):
        gradients = [weights.grad.flatten() for weights in model.parameters()]
        lengths.append(float(torch.cat(gradients).norm()))
        return step(*arguments)
    with mock.patch.object(torch.optim.AdamW, "step", watched), \
            mock.patch.object(train_small, "losses", lambda *a: {
                name: 1000 * part for name, part in losses(*a).items()}):
        train_small.train(model, frames, frames[:0], short(steps=3), tmp_path)
    for length, row in zip(lengths, metrics(tmp_path), strict=True):
        same("length", length, 1.0, "float32 formula")
        assert float(row["gradient"]) > 10


def test_each_parameter_is_in_exactly_one_optimiser(tmp_path):
    """Muon has the matrices that mix paths, AdamW all else."""
    model = seeded(replace(train_small.statistics(frames_of(tmp_path, copper(4)), short())[0],
                           layers=3, degree=2))
    names = {id(weights): name for name, weights in model.named_parameters()}
    found = {}
    for optimiser in train_small.optimizers(model, short(), 100):
        weights, = (group["params"] for group in optimiser.param_groups)
        found[type(optimiser)] = [names[id(one)] for one in weights]
    assert sorted(sum(found.values(), [])) == sorted(names.values())
    muon = found[torch.optim.Muon]
    assert muon == [name for name in names.values() if ".mix.W" in name] and len(muon) >= 3


@pytest.mark.parametrize("steps", (60, 120))
def test_decay_of_muon_over_a_whole_run_is_its_setting(steps, tmp_path):
    """Where no loss has a gradient, the matrices shrink by exp(−3) but for the warm-up. By hand:
    the mean rate of a cosine is a half, so a step at the rate r forgets 3 r over steps/2 rates."""
    frames = frames_of(tmp_path, copper(4))
    model = seeded(train_small.statistics(frames, short())[0])
    before = copy.deepcopy(dict(model.named_parameters()))
    losses = train_small.losses
    with mock.patch.object(train_small, "losses", lambda *a: {
            name: 0 * part for name, part in losses(*a).items()}):
        s = short(steps=steps, muon_lr=0.2, muon_decay=3.0)
        train_small.train(model, frames, frames[:0], s, tmp_path)

    step = np.arange(steps)
    cosine = (1 + np.cos(np.pi * step / steps)) / 2
    rate = np.minimum(1, (step + 1) / 50) * cosine
    for name, weights in model.named_parameters():
        if ".mix.W" in name:
            kept = weights.norm() / before[name].norm()
            same(name, kept, np.prod(1 - 3 * rate / (steps / 2)), "float32 formula")
    whole = np.sum(3 * cosine / (steps / 2))
    assert whole == pytest.approx(3, rel=0.02), "the formula is not what the setting says"


def test_every_setting_of_the_optimisation_changes_the_weights(tmp_path):
    frames = frames_of(tmp_path, copper())
    model = seeded(train_small.statistics(frames, short())[0])

    def weights(**changes):
        s = short(**{"steps": 3, **changes})
        averaged, _ = train_small.train(copy.deepcopy(model), frames, frames[:0], s, tmp_path)
        return torch.cat([w.flatten() for w in averaged.parameters()])
    first = weights()
    same("weights of the same settings", weights(), first, "exact")
    for change in ({"lr": 1e-3}, {"muon_lr": 1e-3}, {"muon_decay": 0.0}, {"ema": 0.1}, {"seed": 1},
                   {"energy_weight": 9.0}, {"stress_weight": 9.0}, {"huber": 0.001},
                   {"batch_atoms": 30}, {"steps": 4}):
        assert largest(weights(**change), first)[0] > 1e-6, f"{change} changes nothing"
    for name in ("CLIP", "WEIGHT_DECAY"):
        with mock.patch.object(train_small, name, 0.1):
            assert largest(weights(), first)[0] > 1e-6, f"{name} changes nothing"


def test_batches_neither_lose_nor_double_a_frame_and_are_bounded():
    rng = np.random.default_rng(0)
    atoms, crowd = rng.integers(1, 101, 500), rng.choice([10, 20, 45, 90], 500)
    seen = []
    for plan in islice(batches.epochs(atoms, crowd, 5000.0, seed=0), 2):
        assert sorted(np.concatenate(plan)) == list(range(500))
        cost = [atoms[b].sum() * crowd[b].max() for b in plan]
        assert all(c <= 6250 or len(b) == 1 for c, b in zip(cost, plan, strict=True))
        used = sum((atoms[b] * crowd[b]).sum() for b in plan)
        assert used > 0.85 * sum(cost), "padding"
        assert used > 0.7 * 5000 * len(plan), "batches that are not full"
        seen.append({tuple(b) for b in plan if len(b) > 2})
    shuffled = np.array_split(rng.permutation(500), 50)  # control: without sorting there is padding
    assert used < 0.75 * sum(atoms[b].sum() * crowd[b].max() for b in shuffled)
    assert len(seen[0]) > 20 and not seen[0] & seen[1], "two epochs with the same batches"
    for seed in (0, 1):
        first = next(batches.epochs(atoms, crowd, 5000.0, seed))
        assert ({tuple(b) for b in first if len(b) > 2} == seen[0]) == (seed == 0)
    large = batches.plan(np.array([1000, 1]), np.array([50, 50]), 10.0, rng)
    assert len(large) == 2, "a frame larger than a batch is a batch"


def test_batches_of_an_epoch_come_in_random_order():
    """Crowded ones are followed by less crowded ones as often as by more crowded ones. The
    control: in the order in which they are made, sorted within portions, they seldom are."""
    rng = np.random.default_rng(0)
    atoms = rng.integers(1, 101, 500)
    crowd = rng.uniform(10, 90, 500)
    for order, least, most in (("random", 0.45, 0.55), ("made", 0.0, 0.4)):
        falls = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            if order == "made":
                rng = mock.Mock(permutation=lambda what, rng=rng: (
                    rng.permutation(what) if what == 500 else np.arange(what)))
            plan = batches.plan(atoms, crowd, 5000.0, rng)
            assert len(plan) > 100
            falls.extend(np.diff([crowd[batch].mean() for batch in plan]) < 0)
        assert least < np.mean(falls) < most


def test_real_batches_are_near_the_budget_beside_one_dense_frame(tmp_path):
    """Of 48 atoms at the mean number of neighbours, by ASE; one frame has three times as many."""
    crystals = copper(60)
    crystals[7].set_cell(crystals[7].cell.array * 0.7, scale_atoms=True)
    for atoms in crystals:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    frames = frames_of(tmp_path, crystals)
    s = short(cutoff=5.0, batch_atoms=48)
    config, _ = train_small.statistics(frames, s)
    stream, in_epoch = train_small.endless_batches(train_small.Samples(frames, config), s)
    epoch = list(islice(stream, in_epoch))
    assert sorted(np.concatenate(epoch)) == list(range(60))

    size = np.array([len(atoms) for atoms in crystals])
    crowd = np.array([np.bincount(neighbor_list("i", atoms, 5.0)).max() for atoms in crystals])
    assert crowd[7] > 2.5 * np.delete(crowd, 7).max()
    budget = 48 * crowd.mean()
    cost = [size[batch].sum() * crowd[batch].max() for batch in epoch]
    assert max(cost) <= 1.25 * budget and np.median(cost) > 0.7 * budget
    used = [(size[batch] * crowd[batch]).sum() for batch in epoch]
    assert sum(used) > 0.85 * sum(cost), "the dense frame makes the others' padding"


def test_batch_holds_ten_structures_of_mean_size_at_most_256_atoms(tmp_path):
    crystals = copper(6)  # four and eight atoms by turns
    assert train_small.ten_structures(frames_of(tmp_path, crystals)) == 60
    large = [atoms * (3, 3, 3) for atoms in crystals]
    for atoms in large:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    assert train_small.ten_structures(frames_of(tmp_path, large)) == 256


def test_neighbours_of_a_large_set_are_made_anew_and_its_crowd_is_guessed(tmp_path):
    """By the density: within a factor of the truth, in order; molecules count as the mean."""
    crystals = copper(8)
    for i, atoms in enumerate(crystals):
        atoms.set_cell(atoms.cell.array * (1 + 0.05 * i), scale_atoms=True)
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    molecule = ase.build.molecule("CO")
    molecule.symbols = "CuAu"
    molecule.calc = SinglePointCalculator(molecule, energy=0.0, forces=np.zeros((2, 3)))
    frames = frames_of(tmp_path, [*crystals, molecule])
    config, _ = train_small.statistics(frames, short(cutoff=5.0))
    kept = train_small.Samples(frames, config)
    truth = kept.crowd()
    with mock.patch.object(batches, "KEPT", 10):
        large = train_small.Samples(frames, config)
        guess = large.crowd()
    assert kept.graphs and large.graphs is None
    assert (np.diff(guess[:8]) < 0).all(), "thinner crystals have fewer neighbours"
    assert (np.abs(np.log(guess[:8] / truth[:8])) < np.log(1.5)).all(), guess[:8] / truth[:8]
    same("molecule", guess[8], config.mean_neighbours, "formula")
    rows = np.array([0, 3, 8])
    for one, two in zip(kept[rows][1], large[rows][1], strict=True):
        same("batch", two.nan_to_num(-1), one.nan_to_num(-1), "exact")  # a molecule has no volume


def test_labels_that_a_frame_lacks_are_not_counted(tmp_path):
    crystals = copper(5)
    del crystals[1].calc.results["stress"]
    frames = frames_of(tmp_path, crystals)
    config, _ = train_small.statistics(frames, short())
    _, batch, target = train_small.Samples(frames, config)[np.array([0, 1, 2])]
    assert target["atoms"].tolist() == [4, 8, 4] and target["count"].tolist() == [3, 48, 18]
    assert target["virial"].isnan().all((1, 2)).tolist() == [False, True, False]
    for s in (0, 2):
        stress = crystals[s].get_stress(voigt=False) * crystals[s].get_volume()
        same("virial", target["virial"][s], stress, "float32")
    energies = [c.get_potential_energy() for c in crystals[:3]]
    same("energy in float64", target["energy"] * 1e6, np.array(energies) * 1e6, "rounding")
    same("forces", target["forces"][4:12], crystals[1].get_forces(), "float32")
    assert batch.src.shape[0] == 16


def test_losses_equal_those_by_hand():
    """Two frames of different sizes; errors in the quadratic and in the linear range of Huber."""
    count = torch.tensor([2, 9, 9])  # the second frame has no stress
    zero = {"energy": torch.zeros(2, dtype=torch.float64), "forces": torch.zeros(3, 3),
            "virial": torch.zeros(2, 3, 3)}
    target = {**copy.deepcopy(zero), "atoms": torch.tensor([2, 1])}
    target["virial"][1] = torch.nan
    out = copy.deepcopy(zero)
    out["energy"] += torch.tensor([0.02, -2.0])
    out["forces"][0, 1], out["forces"][2, 2] = 0.1, -4.0
    out["virial"][0, 0, 0], out["virial"][1] = 0.2, 100.0
    # Over atoms and a scale of 2: energies 0.005 and 1, forces 0.05 and 2, virial 0.05.
    # Quadratic up to 0.1, for energies 0.1/3.2 = 0.03125: x²/2β; beyond: x − β/2.
    energy = (0.005 ** 2 / 0.0625 + 1 - 0.015625) / 2
    forces = (0.05 ** 2 / 0.2 + 2 - 0.05) / 9
    want = [energy, forces, (0.05 ** 2 / 0.2) / 9]
    found = train_small.losses(out, target, count, 2.0, 0.1)
    same("losses", [found[name] for name in ("energy", "forces", "stress")], want, "float32")
    assert not any(train_small.losses(zero, target, count, 2.0, 0.1).values())
    differ("losses", want, [0, 0, 0])


def test_processes_neither_lose_nor_double_a_frame(tmp_path):
    frames = frames_of(tmp_path, copper(7))
    config, _ = train_small.statistics(frames, short())
    model, rows = facet.Facet(config), np.arange(7)

    def part(rows, team, count=None):
        _, batch, target = train_small.Samples(frames, config, team)[rows]
        out = model(batch, differentiable=True)
        count = target["count"] if count is None else count
        parts = train_small.losses(out, target, count, config.energy_scale, 0.1)
        return target, torch.stack(list(parts.values()))
    whole, want = part(rows, train_small.ALONE)
    found = [part(rows, train_small.Team(rank, 3), whole["count"]) for rank in range(3)]
    energies = torch.cat([target["energy"] for target, _ in found])
    same("energies", energies.sort().values, whole["energy"].sort().values, "exact")
    same("losses", sum(loss for _, loss in found), want, "float32")
    idle, nothing = part(rows[:2], train_small.Team(2, 3))
    assert not nothing.any() and not idle["count"].any(), "a process without a share counts"


# ─── The trainer: statistics ─────────────────────────────────────────────────────────────────────

def alloys(count: int = 9) -> list[Atoms]:
    """Copper and oxygen at random, far more than 0.1 Å apart; the energy knows composition only."""
    rng, crystals = np.random.default_rng(0), []
    for _ in range(count):
        places = rng.permutation([*np.ndindex(2, 2, 2)])[:6] * 2.0
        atoms = Atoms(rng.choice(["Cu", "O"], 6), places, cell=[4, 4, 4], pbc=True)
        energy = float(np.where(atoms.numbers == 8, -5.0, -3.0).sum())
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((6, 3)),
                                           stress=np.zeros(6))
        crystals.append(atoms)
    return crystals


def test_reference_energies_are_fitted_given_or_those_of_free_atoms(tmp_path):
    numbers, crystals = np.array([8, 29]), alloys()
    frames = frames_of(tmp_path, crystals)
    same("fit", statistics.reference_energies(frames, numbers, {}, 5.0), [-5, -3], "slope")
    given = statistics.reference_energies(frames, numbers, {29: -1.0}, 5.0)
    same("given", given[1], -1.0, "exact")
    differ("fit of the other then", given[0], -5.0)
    other = statistics.reference_energies(frames, np.array([8, 29, 79]), {}, 5.0)
    same("an element that does not occur", other, [-5, -3, 0], "slope")
    free = Atoms("O", cell=[20, 20, 20], pbc=True)
    free.calc = SinglePointCalculator(free, energy=-1.5, forces=np.zeros((1, 3)))
    frames = frames_of(tmp_path, [*crystals, free])
    found = statistics.reference_energies(frames, numbers, {}, 5.0)
    same("free atom", found[0], -1.5, "float32")
    alike = frames_of(tmp_path, [crystals[0]] * 3)
    assert np.isfinite(statistics.reference_energies(alike, numbers, {}, 5.0)).all()


def test_given_energies_are_subtracted_before_the_others_are_fitted(tmp_path):
    """Given what they are, or wrong by 2 eV: the rest explains what is left, in any order."""
    numbers, crystals = np.array([6, 8, 29]), alloys(30)
    for k, atoms in enumerate(crystals):
        atoms.symbols[:k % 3] = "C"
        atoms.calc.results["energy"] = float(np.select(
            [atoms.numbers == 6, atoms.numbers == 8], [-7.0, -5.0], -3.0).sum())
    frames = frames_of(tmp_path, crystals)
    want = [-7, -5, -3]
    for given in ({}, {8: -5.0}, {8: -5.0, 29: -3.0}, {6: -7.0, 8: -5.0, 29: -3.0}):
        found = statistics.reference_energies(frames, numbers, given, 5.0)
        same("right ones given", found, want, "slope")
    found = statistics.reference_energies(frames, numbers, {8: -3.0}, 5.0)
    share = frames.compositions(numbers) / 6
    left = share @ want - share[:, 1] * -3.0
    fit, *_ = np.linalg.lstsq(share[:, [0, 2]], left, rcond=None)
    same("a wrong one given", found, [fit[0], -3.0, fit[1]], "slope")
    differ("a wrong one given", found, want)
    for species in ("Cu,O,C", "C,Cu,O", "O,C,Cu"):
        s = short(species=species, E0="O=-5")
        config, _ = train_small.statistics(frames, s)
        assert config.species == ("C", "O", "Cu")
        same(species, config.reference_energies, want, "slope")


def test_given_energy_goes_before_that_of_a_free_atom(tmp_path):
    free = Atoms("O", cell=[20, 20, 20], pbc=True)
    free.calc = SinglePointCalculator(free, energy=-1.5, forces=np.zeros((1, 3)))
    crowded = Atoms("Cu", cell=[2.5, 2.5, 2.5], pbc=True)  # one atom, but not alone
    crowded.calc = SinglePointCalculator(crowded, energy=7.0, forces=np.zeros((1, 3)))
    frames = frames_of(tmp_path, [*alloys(), free])
    found = statistics.reference_energies(frames, np.array([8, 29]), {8: 4.0}, 5.0)
    same("given", found[0], 4.0, "exact")
    frames = frames_of(tmp_path, [*alloys(60), crowded])
    found = statistics.reference_energies(frames, np.array([8, 29]), {}, 5.0)
    assert found[1] != 7.0 and found[1] < -2.5, "a crystal of one atom is no free atom"


def test_statistics_see_every_one_of_many_frames(tmp_path):
    """Of three hundred, the closest pair of gold is in the middle and that of copper in the last
    one; the largest forces are in the last one, too."""
    crystals = []
    for i in range(300):
        atoms = Atoms("Cu2Au2", cell=[9 + 0.01 * i, 9, 12], pbc=True)  # no two are equal
        atoms.positions[:, 2] = np.cumsum([0, 2.4 - 0.3 * (i == 299), 3.0, 2.6 - 0.2 * (i == 149)])
        forces = np.full((4, 3), 1.0 + (i == 299))
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces)
        crystals.append(atoms)
    frames = frames_of(tmp_path, crystals)
    config, shortest = train_small.statistics(frames, short(cutoff=4.4))
    assert len(frames) == 300
    assert config.species == ("Cu", "Au")
    for pair, want in (((0, 0), 2.1), ((1, 1), 2.4), ((0, 1), 3.0)):
        same(f"shortest distance of {pair}", shortest[pair], want, "float32")
    same("first knot", config.first_knot, 0.7 * 2.1, "float32")
    assert 2 * config.core[0] <= 2.1 and 2 * config.core[1] <= 2.4
    same("force RMS", config.energy_scale, np.sqrt((299 + 4) / 300), "float32")


def test_absurd_frame_does_not_move_the_statistics(tmp_path):
    """One of 40 has an energy of +10⁵ eV and forces of 10⁴ eV/Å."""
    crystals, s = copper(40), short()
    rest, _ = train_small.statistics(frames_of(tmp_path, crystals[:17] + crystals[18:]), s)
    crystals[17].calc.results["energy"] = 1e5
    crystals[17].calc.results["forces"] = np.full((len(crystals[17]), 3), 1e4)
    config, _ = train_small.statistics(frames_of(tmp_path, crystals), s)
    same("E0", config.reference_energies, rest.reference_energies, "float32")
    same("force RMS", config.energy_scale, rest.energy_scale, "float32")
    kept = np.concatenate([a.get_forces() for a in crystals[:17] + crystals[18:]])
    same("force RMS by hand", config.energy_scale, np.sqrt((kept ** 2).mean()), "float32")


def test_statistics_do_not_see_validation_or_test(tmp_path):
    """What training begins with is the same for other held-out sets; other data change it."""
    train = file_of(tmp_path, copper(8))
    found = []
    for first, scale in ((100, 1.0), (200, 1.3)):
        others = copper(8, first)
        for atoms in others:
            forces = atoms.get_forces()
            atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
            atoms.calc = SinglePointCalculator(atoms)
            atoms.calc.results = {"energy": scale * -50.0, "forces": forces * scale}
        held = [(file_of(tmp_path, part, f"{first} {k}.extxyz"),)
                for k, part in enumerate((others[:4], others[4:]))]
        run(tmp_path, str(first), train=(train,), valid=held[0], test=held[1], steps=1, cutoff=5.0)
        found.append(facet.load(tmp_path / str(first) / "a" / "model.pt").config)
    assert found[0] == found[1]
    run(tmp_path, "control", train=held[0], valid=(train,), test=("0",), steps=1, cutoff=5.0)
    other = facet.load(tmp_path / "control" / "a" / "model.pt").config
    for name in ("reference_energies", "energy_scale", "first_knot", "mean_neighbours"):
        assert getattr(other, name) != getattr(found[0], name), name


def test_cores_of_a_training_set_end_below_every_pair_in_it(tmp_path):
    """Three species against the distances of all pairs by ASE, and at most half the cutoff."""
    rng, crystals = np.random.default_rng(1), []
    for _ in range(12):
        places = rng.permutation([*np.ndindex(2, 2, 2)])[:7] * 2.2 + rng.normal(0, 0.15, (7, 3))
        atoms = Atoms(rng.choice(["C", "Si", "Cu"], 7), places, cell=[4.4] * 3, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=rng.normal(size=(7, 3)))
        crystals.append(atoms)
    numbers = np.array([6, 14, 29])
    for cutoff in (4.0, 2.0):
        s = short(cutoff=cutoff)
        frames = frames_of(tmp_path, crystals)
        config, _ = train_small.statistics(frames, s)
        lists = [neighbor_list("ijd", atoms, cutoff) for atoms in crystals]
        z = [np.searchsorted(numbers, atoms.numbers) for atoms in crystals]
        a, b, d = (np.concatenate(x) for x in zip(
            *((k[i], k[j], d) for k, (i, j, d) in zip(z, lists)), strict=True))
        want = {}
        for i, j in combinations_with_replacement(range(3), 2):
            of_pair = d[(a == i) & (b == j)]
            if len(of_pair):
                want[i, j] = of_pair.min()
        graphs = [facet.find_neighbours(atoms, config) for atoms in crystals]
        found = statistics.shortest_distances(graphs)
        assert set(found) == set(want)
        for pair, distance in want.items():
            same(f"shortest distance of {pair}", found[pair], distance, "float32")
            assert config.core[pair[0]] + config.core[pair[1]] < distance
        assert max(config.core) <= cutoff / 2 and min(config.core) > 0.2
        assert 0 < config.first_knot < min(want.values())


def test_sparse_or_calm_data_have_sound_statistics(tmp_path):
    """Atoms 4.5 Å apart, and without any force: the radial axis begins where bonds may be."""
    crystals = copper(4)
    for atoms in crystals:
        atoms.set_cell(atoms.cell.array * 1.8, scale_atoms=True)
        atoms.calc.results["forces"] = np.zeros((len(atoms), 3))
    config, _ = train_small.statistics(frames_of(tmp_path, crystals), short(cutoff=5.0))
    assert config.energy_scale == 1.0
    same("first knot", config.first_knot, 0.7 * 2.5, "formula")


@pytest.mark.parametrize("kind", ("extxyz", "db"))
def test_no_material_is_on_two_sides(kind, tmp_path):
    """Three frames a material, interleaved; every frame is on one side."""
    crystals = copper(60)
    for i, atoms in enumerate(crystals):
        atoms.info["material_id"] = f"m-{i % 20}"
    path = file_of(tmp_path, crystals)
    if kind == "db":
        database.convert([path], str(tmp_path / "data.db"))
        path = str(tmp_path / "data.db")
    sides, sizes = [], []
    for seed in range(4):
        s = train_small.Settings(train=(path,), seed=seed)
        parts = load_sets(s, tmp_path, None)
        names = [{atoms.info["material"] for atoms in part} for part in parts]
        assert [len(part) for part in parts] == [3 * len(of) for of in names]
        assert sum(map(len, parts)) == 60 and len(set.union(*names)) == 20
        assert min(map(len, names)) >= 1, "a side is empty"
        sides.append((tuple(sorted(names[1])), tuple(sorted(names[2]))))
        sizes.append(sum(map(len, names)))
    assert sizes == [20] * 4, "a material is on two sides"
    assert len({valid for valid, _ in sides}) > 1 and len({test for _, test in sides}) > 1
    alone = [load_sets(train_small.Settings(train=(path,), test=("0",), seed=seed),
                              tmp_path, None)[1].fingerprint() for seed in range(3)]
    assert len(set(alone)) == 3, "every seed sets aside the same for validation"


def test_core_ends_below_the_shortest_distance_of_every_pair():
    """Three species; within half the cutoff; 0.85 covalent radii where the data say nothing."""
    numbers, rng = np.array([8, 14, 29]), np.random.default_rng(0)
    free = 0.85 * covalent_radii[numbers]
    same("without data", statistics.core_radii({}, numbers, 5.0), free, "exact")
    same("short cutoff", statistics.core_radii({}, numbers, 1.0), np.full(3, 0.5), "exact")
    for _ in range(20):
        shortest = {pair: rng.uniform(0.8, 3.0) for pair in combinations_with_replacement(
            range(3), 2)}
        radii = statistics.core_radii(shortest, numbers, 5.0)
        for (i, j), distance in shortest.items():
            assert radii[i] + radii[j] <= 0.97 * distance + 1e-12, "a core reaches into the data"
        assert (radii <= free).all() and (radii > 0.2).all()


def test_statistics_are_those_of_the_training_set(tmp_path):
    crystals = copper()
    s = short(cutoff=4.5)
    config, _ = train_small.statistics(frames_of(tmp_path, crystals), s)
    lists = [neighbor_list("ijd", atoms, 4.5) for atoms in crystals]
    edges, atoms = sum(len(i) for i, _, _ in lists), sum(len(a) for a in crystals)
    forces = np.concatenate([a.get_forces() for a in crystals])
    same("neighbours", config.mean_neighbours, edges / atoms, "formula")
    same("force RMS", config.energy_scale, np.sqrt((forces ** 2).mean()), "float32")
    shortest = min(d.min() for _, _, d in lists)
    same("first knot", config.first_knot, 0.7 * shortest, "float32")
    assert config.species == ("Cu", "Au") and len(config.core) == 2
    assert config.cutoff == 4.5 and config.channels == 8
    for order in ("Au,Cu,O", "O,Cu,Au"):
        more, _ = train_small.statistics(frames_of(tmp_path, crystals), replace(
            s, species=order, E0="O=-1.5,Cu=2"))
        assert more.species == ("O", "Cu", "Au") and more.reference_energies[:2] == (-1.5, 2.0)
    with pytest.raises(train_small.BadInput, match="are positions in Å"):
        train_small.statistics(frames_of(tmp_path, crystals), replace(s, cutoff=0.5))


@pytest.mark.parametrize("change, message", (
    ({"E0": "Cu"}, "must look like --E0"), ({"E0": "Qq=1"}, "must look like --E0"),
    ({"E0": "Cu=x"}, "must look like --E0"), ({"E0": "Cu=1=2"}, "must look like --E0"),
    ({"species": "Cu,Qq"}, "must look like --E0"), ({"species": "cu,Au"}, "must look like --E0"),
    ({"species": "Cu,X"}, "species must be different chemical symbols"),
    ({"E0": "Cu=-1,Cu=-2"}, "^--E0 Cu=-1,Cu=-2: names an element twice"),
    ({"E0": "Cu=1,Au=2,Cu=1"}, "^--E0 .*: names an element twice"),
    ({"species": "Cu,Au,Cu"}, "^--species Cu,Au,Cu: names an element twice"),
    ({"E0": "Cu=nan"}, "^--E0 Cu=nan: energies must be finite"),
    ({"E0": "Cu=1,Au=-inf"}, "^--E0 .*: energies must be finite"),
    ({"species": "Cu"}, "frame .: holds Au, which the training set, or --species, does not: Cu$"),
), ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_elements_of_the_command_line_are_known_and_named_once(change, message, tmp_path):
    s = short(**change)
    with pytest.raises(train_small.BadInput, match=message) as error:
        train_small.statistics(frames_of(tmp_path, copper(4)), s)
    assert "\n" not in str(error.value)


def test_elements_that_are_not_in_the_data_are_named(tmp_path, capsys):
    frames = frames_of(tmp_path, copper(4))
    train_small.statistics(frames, short(species="Cu,Au,O,Zn"))
    assert "no frame holds O, Zn: nothing is learned of them" in capsys.readouterr().err
    train_small.statistics(frames, short(E0="Cu=-1,Co=-2,C=3"))
    assert "--E0 names Co, C, which the model does not know" in capsys.readouterr().err
    train_small.statistics(frames, short(E0="Cu=-1"))
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ("valid", "test"))
def test_unknown_element_in_validation_or_test_is_refused(part, tmp_path):
    crystals = copper(9, 100)
    crystals[7].symbols[2] = "Zn"
    file_of(tmp_path, copper(9))
    other = file_of(tmp_path, crystals, "other.extxyz")
    with pytest.raises(train_small.BadInput, match="other.extxyz, frame 7: holds Zn, which the"):
        run(tmp_path, **{part: (other,)})
    assert not list((tmp_path / "runs").iterdir()), "something was written"


# ─── The trainer: from a trained model ────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """model.pt of a training on copper()."""
    folder = tmp_path_factory.mktemp("base")
    file_of(folder, copper())
    run(folder, steps=60, valid=("0",), test=("0",))
    return folder / "runs" / "a" / "model.pt"


def begun(frames, init: Path, **changes) -> facet.Facet:
    """The model with which a run from `init` begins."""
    s = short(init=str(init), **changes)
    sets = {"train": frames, "valid": frames[:0], "test": frames[:0]}
    return train_small.first_model(s, sets, facet.load(init), None, "", train_small.ALONE)


def labels_by(model, crystals: list[Atoms]) -> list[dict]:
    graphs = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    return facet.evaluate(model, graphs)


def test_model_says_where_it_comes_from(tmp_path):
    """Whatever is saved as model.pt carries it, and so does what is begun from that."""
    crystals = copper(30)
    file_of(tmp_path, crystals)
    database.convert([file_of(tmp_path, copper(6, 100), "more.extxyz")], str(tmp_path / "more.db"))
    paths = tuple(str(tmp_path / name) for name in ("data.extxyz", "more.db"))
    sums = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
    save, found = facet.save, []

    def keep(model, path, **more):
        if Path(path).name == "model.pt":
            found.append(model.origin)
        save(model, path, **more)
    s = short(train=paths, test=("0",), species="Au,Cu,O", steps=2)
    with mock.patch.object(facet, "save", keep):
        train_small.main(s, tmp_path / "runs", command="python train_small.py --train …")
    first = found[0]
    assert len(found) > 2 and all(origin == first for origin in found)
    saved = facet.load(tmp_path / "runs" / "a" / "model.pt")
    assert saved.origin == first, "not what facet.save was given"
    assert json.loads(json.dumps(first)) == first, "it is plain"
    assert first["command"] == "python train_small.py --train …" and "init" not in first
    assert set(first["versions"]) == {"python", "torch", "numpy", "scipy", "ase"}
    assert first["versions"]["ase"] == ase.__version__ and first["units"]["forces"] == "eV/Å"
    date = datetime.fromisoformat(first["date"])
    assert abs((datetime.now(timezone.utc) - date).total_seconds()) < 300

    # Files with their checksums; the validation set was taken from them
    assert set(first["data"]) == {"train", "valid", "test"} and first["data"]["test"] == []
    frames = dict.fromkeys(paths, 0)
    for part in ("train", "valid"):
        for entry in first["data"][part]:
            assert entry["sha256"] == sums[entry["file"]]
            frames[entry["file"]] += entry["frames"]
    assert frames == dict(zip(paths, (30, 6), strict=True))

    # Shortest distances, in the order of the config's species
    train, _, _ = load_sets(s, tmp_path, None)
    shortest = {}
    for atoms in train:
        i, j, distance = neighbor_list("ijd", atoms, s.cutoff)
        names = np.array(atoms.get_chemical_symbols())
        for a, b, d in zip(names[i], names[j], distance, strict=True):
            pair = "-".join(sorted((a, b), key=("O", "Cu", "Au").index))
            shortest[pair] = min(d, shortest.get(pair, np.inf))
    assert first["shortest"].keys() == shortest.keys() <= {"Cu-Cu", "Cu-Au", "Au-Au"}
    for pair, distance in shortest.items():
        same(pair, first["shortest"][pair], distance, "float32")

    found.clear()
    init = str(tmp_path / "runs" / "a" / "model.pt")
    load, closer = facet.load, {"O-Au": 2.0, "Cu-Cu": 1.0, "Cu-Au": 9.0}

    def with_origin(path, *arguments):
        model = load(path, *arguments)
        model.origin = {"shortest": closer}  # it has seen other data before
        return model
    with mock.patch.object(facet, "save", keep), mock.patch.object(facet, "load", with_origin):
        run(tmp_path, "next", init=init, steps=1)
    now = found[0]["shortest"]
    assert now["O-Au"] == 2.0 and now["Cu-Cu"] == 1.0 and now["Cu-Au"] < 3.0
    assert found[0]["init"] == {
        "file": init, "sha256": hashlib.sha256(Path(init).read_bytes()).hexdigest()}


def test_zero_steps_from_a_model_on_its_old_data_change_nothing(base, tmp_path):
    """With its own E0: to the last bit. Fitted anew: only energies, by a sum over the atoms."""
    old, crystals = facet.load(base), copper()
    frames = frames_of(tmp_path, crystals)
    E0 = dict(zip(old.config.species, old.config.reference_energies, strict=True))
    given = ",".join(f"{symbol}={energy!r}" for symbol, energy in E0.items())
    again = begun(frames, base, E0=given)
    fitted = begun(frames, base)
    fresh = seeded(old.config)
    assert again.config == old.config
    assert replace(fitted.config, reference_energies=old.config.reference_energies) == old.config

    left = {"old": [], "fitted": []}  # eV/atom
    for atoms, was, same_E0, new_E0, other in zip(
            crystals, *(labels_by(m, crystals) for m in (old, again, fitted, fresh)), strict=True):
        for name in ("energy", "forces", "stress"):
            same(name, same_E0[name], was[name], "exact")
        differ("forces of a fresh model", other["forces"], was["forces"])
        same("forces", new_E0["forces"], was["forces"], "exact")
        same("stress", new_E0["stress"], was["stress"], "exact")
        change = sum(
            energy - E0[symbol] for symbol, energy in
            ((s, dict(zip(old.config.species, fitted.config.reference_energies))[s])
             for s in atoms.symbols))
        same("energy", new_E0["energy"] - was["energy"], change, "rounding")
        wanted = atoms.get_potential_energy()
        left["old"].append((was["energy"] - wanted) / len(atoms))
        left["fitted"].append((new_E0["energy"] - wanted) / len(atoms))
    rms = {name: np.sqrt(np.mean(np.square(errors))) for name, errors in left.items()}
    assert rms["fitted"] < 0.9 * rms["old"], "no better than before"


def test_reference_energies_stay_where_the_model_explains_all(base, tmp_path):
    """Labels of its own, or E0 fitted before: fitted again, they are the same."""
    old = facet.load(base)
    crystals = copper()
    own = [labelled(atoms, result["energy"], result["forces"])
           for atoms, result in zip(crystals, labels_by(old, crystals), strict=True)]
    s = train_small.Settings()
    config, _ = statistics.statistics_of(old, in_memory(own), s)
    same("E0 of its own labels", config.reference_energies, old.config.reference_energies, "slope")

    frames = frames_of(tmp_path, crystals)
    once, _ = statistics.statistics_of(old, frames, s)
    model = facet.Facet(once)
    model.load_state_dict(old.state_dict())
    twice, _ = statistics.statistics_of(model, frames, s)
    same("E0 fitted twice", twice.reference_energies, once.reference_energies, "slope")
    differ("E0 fitted once", once.reference_energies, old.config.reference_energies)


def test_begun_from_a_model_on_other_data(base, tmp_path):
    """An element that they lack keeps its E0; another level of theory shifts E0, not the forces."""
    old = facet.load(base)
    pure = [atoms for atoms in copper() if "Au" not in atoms.symbols]
    shifted = [labelled(atoms, atoms.get_potential_energy() + 7.0 * len(atoms), atoms.get_forces())
               for atoms in pure]
    s = train_small.Settings()
    config, shortest = statistics.statistics_of(old, in_memory(shifted), s)
    plain, _ = statistics.statistics_of(old, frames_of(tmp_path, pure), s)
    cu, au = (config.species.index(symbol) for symbol in ("Cu", "Au"))
    assert config.reference_energies[au] == old.config.reference_energies[au]
    same("E0", config.reference_energies[cu] - plain.reference_energies[cu], 7.0, "slope")
    assert set(shortest) == {(cu, cu)}
    free = labelled(Atoms("Au", cell=[30] * 3, pbc=True), -1.5, np.zeros((1, 3)))
    config, _ = statistics.statistics_of(old, in_memory([*shifted, free]), s)
    assert config.reference_energies[au] == -1.5, "a free atom"
    config, _ = statistics.statistics_of(old, in_memory(shifted), replace(s, E0="Cu=-2.5"))
    assert config.reference_energies[cu] == -2.5, "given"


@pytest.mark.parametrize("change, message", (
    ({"cutoff": 4.0}, "^--cutoff 4.0: the model .* has 3.2; leave it out"),
    ({"channels": 16}, "^--channels 16: the model .* has 8; leave it out"),
    ({"species": "Cu"}, "^--species Cu: the model .* knows Cu,Au; leave --species out"),
    ({"init": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
), ids=str)
def test_settings_that_contradict_the_model_are_refused(change, message, base, tmp_path, capsys):
    file_of(tmp_path, copper())
    words = ["--init", str(base), "--train", "x"]
    s, _ = train_small.parse([*words, "--cutoff", "3.2"])
    assert (s.cutoff, s.channels, s.layers) == (3.2, 8, 1), "those of the model"
    with pytest.raises(train_small.BadInput, match=message) as error:
        run(tmp_path, **{"init": str(base), **change})
    assert "\n" not in str(error.value) and not list((tmp_path / "runs").iterdir())
    if "species" not in change:
        with pytest.raises(SystemExit):
            train_small.parse([*words, *(f"--{name}={value}" for name, value in change.items())])
        last = capsys.readouterr().err.splitlines()[-1]
        assert message.split()[0].strip("^:") in last
    with pytest.raises(SystemExit):  # said, though it is the default
        train_small.parse([*words, "--cutoff", "5.0"])


def test_element_that_the_model_does_not_know_is_refused(base, tmp_path):
    crystals = copper()
    crystals[5].symbols[2] = "Zn"
    file_of(tmp_path, crystals)
    with pytest.raises(train_small.BadInput, match="frame 5: holds Zn, which .*model.pt does not"):
        run(tmp_path, init=str(base))


def test_run_from_a_model_learns_faster_and_resumes_to_the_last_bit(base, tmp_path):
    init = Path(shutil.copy(base, tmp_path / "init.pt"))
    file_of(tmp_path, copper(12, 50))
    own = {name: getattr(facet.Config, name) for name in options.MODEL}  # not said: the model's
    run(tmp_path, "whole", init=str(init), **own)
    run(tmp_path, "fresh", steps=1)
    first = {name: float(metrics(tmp_path / name / "a")[0]["loss_forces"])
             for name in ("whole", "fresh")}
    assert first["whole"] < 0.5 * first["fresh"]
    with at_step(5, partial(signal.raise_signal, signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run(tmp_path, init=str(init), **own)
    init.rename(tmp_path / "elsewhere.pt")  # the checkpoint has all of it
    s, resume = train_small.parse(["--resume", str(tmp_path / "runs" / "a")])
    train_small.main(s, resume=resume)
    assert outcome(tmp_path / "runs" / "a") == outcome(tmp_path / "whole" / "a")


@pytest.mark.parametrize("free", (("readout",), ("layers.0.mix.W",), ("readout", "layers.0.mix.W")),
                         ids=str)
def test_weights_without_a_gradient_are_left_alone(free, tmp_path):
    """By AdamW and by Muon, also where either has none left."""
    frames = frames_of(tmp_path, copper())
    s = short(steps=2, layers=2)
    config, _ = train_small.statistics(frames, s)
    model = seeded(config)
    before = copy.deepcopy(model.state_dict())
    for name, weights in model.named_parameters():
        weights.requires_grad_(name.startswith(free))
    averaged, _ = train_small.train(model, frames, frames[:0], s, tmp_path)
    for name, weights in averaged.state_dict().items():
        if name.startswith(free):
            assert largest(weights, before[name])[0] > 1e-6, f"{name} was not trained"
        else:
            same(name, weights, before[name], "exact")


def test_page_shows_how_all_but_the_readout_is_frozen(base, tmp_path, monkeypatch):
    """The code of tools/README.md, as it stands there."""
    page = (HERE / "tools" / "README.md").read_text(encoding="utf-8")
    code, = (block for block in re.findall(r"```python\n(.*?)```", page, re.S)
             if "requires_grad_" in block)
    (tmp_path / "runs" / "emt").mkdir(parents=True)
    shutil.copy(base, tmp_path / "runs" / "emt" / "model.pt")
    file_of(tmp_path, copper(4), "new.extxyz")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    before = facet.load("runs/emt/model.pt").state_dict()
    for name, weights in facet.load("runs/readout/model.pt").state_dict().items():
        if name == "readout":
            assert largest(weights, before[name])[0] > 1e-6, "nothing was trained"
        else:
            same(name, weights, before[name], "exact")


def test_model_without_free_weights_is_refused(tmp_path):
    frames = frames_of(tmp_path, copper())
    s = short()
    model = facet.Facet(train_small.statistics(frames, s)[0]).requires_grad_(False)
    with pytest.raises(train_small.BadInput, match="nothing to train"):
        train_small.train(model, frames, frames[:0], s, tmp_path)


# ─── The trainer: processes ──────────────────────────────────────────────────────────────────────

# What PyTorch imports takes longer than all the rest: so one process imports it, and forks
PROCESSES = """
import json, os, pathlib, runpy, signal, sys
import torch
import train_small
from tools import frames, panels, physics

short, changes, port, program = json.loads(sys.argv[1])
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one imports much
frames.look_at = panels.draw = lambda *arguments: None
physics.STEPS = 2

def process(name, work):
    if os.fork() == 0:
        text = os.open(name + ".txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(text, 1)
        os.dup2(text, 2)
        work()
        sys.exit()

def killed():
    fsync, calls = os.fsync, []

    def until(descriptor):
        calls.append(1)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = until
    sys.argv = [program, "--train", short["train"][0]]
    for name, setting in short.items():
        if name != "train":
            sys.argv += ["--" + name, str(setting)]
    runpy.run_path(program, run_name="__main__")

def one_of_two(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    s = train_small.Settings(**{**short, **changes})
    if train_small.main(s, pathlib.Path("two")):  # the first one
        of_tests = ("pytest", "hypothesis", "test_facet", "tests")
        print("imported:", [name for name in of_tests if name in sys.modules])

process("killed", killed)
process("first", lambda: one_of_two(0))
process("second", lambda: one_of_two(1))
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)]
print(sorted(codes))
"""
PAIR = {"batch_atoms": 30, "steps": 3, "layers": 2}
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """Where two processes have trained as torchrun starts them, in two/a, and where one that trains
    by the command line was killed, in runs/a; what they said is in first.txt, second.txt and
    killed.txt."""
    folder = tmp_path_factory.mktemp("processes")
    s = {**SHORT, "train": [file_of(folder, copper())]}
    words = json.dumps([s, PAIR, 20000 + os.getpid() % 20000, str(HERE / "train_small.py")])
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}, timeout=120)
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    assert done.stdout == "[-9, 0, 0]\n", (done.stdout, done.stderr, texts)
    return folder


@needs_fork
def test_two_processes_train_as_one_and_need_no_test(processes, tmp_path):
    """As torchrun starts them: the same batches, so the same losses and the same steps. Neither the
    training nor its report imports a test, or what only tests need."""
    file_of(tmp_path, copper())
    run(tmp_path, **PAIR)
    said = [(processes / name).read_text(encoding="utf-8") for name in ("first.txt", "second.txt")]
    said = [re.sub(r"(?m)^\[Gloo\].*\n", "", text) for text in said]  # torch 2.9 does
    assert "2 processes" in said[0] and said[1] == "", "only the first one speaks"
    assert "test structures" in said[0] and said[0].splitlines()[-1] == "imported: []"
    assert [path.name for path in (processes / "two").iterdir()] == ["a"]
    (one, rows), (two, rows2) = outcome(tmp_path / "runs" / "a"), outcome(processes / "two" / "a")
    for key in ("loss_energy", "loss_forces", "loss_stress", "gradient"):
        same(key, float(rows2[0][key]) / float(rows[0][key]), 1.0, "float32")
    for name in one:
        same(name, two[name], one[name], "bfloat16")
    run(tmp_path, "control", **PAIR, seed=1)
    differ("weights of another seed", outcome(tmp_path / "control" / "a")[0]["embedding.W"],
           one["embedding.W"])


@needs_fork
def test_killed_run_resumes_to_the_last_bit(whole, processes, tmp_path):
    """SIGKILL while the program writes the checkpoint of step 4: the metrics have that step
    already, and the checkpoint of step 3 is whole. What went before is not done again."""
    file_of(tmp_path, copper())
    folder = tmp_path / "runs" / "a"
    shutil.copytree(processes / "runs" / "a", folder)
    assert checkpoint(folder)["step"] == 3 and len(metrics(folder)) == 4
    assert [path.name for path in folder.glob("*.part")] == ["checkpoint.pt.part"]
    with mock.patch.object(train_small, "losses", wraps=train_small.losses) as counted:
        run(tmp_path, resume=True)
    assert counted.call_count == 8 - 3
    assert outcome(folder) == outcome(whole)
    assert len(metrics(folder)) == 8 and not list(folder.glob("*.part"))


# ─── The trainer: runs that are stopped ──────────────────────────────────────────────────────────

@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=("Ctrl-C", "batch system"))
def test_run_told_to_stop_ends_its_step_and_resumes_to_the_last_bit(number, whole, tmp_path):
    """8 steps = 5 steps, Ctrl-C or what a batch system sends, 3 steps."""
    file_of(tmp_path, copper())
    caught, folder = [], tmp_path / "runs" / "a"

    def handler(*_):
        caught.append(1)
    before = signal.signal(number, handler)
    try:
        with at_step(5, partial(signal.raise_signal, number)), pytest.raises(KeyboardInterrupt):
            run(tmp_path)
        assert signal.getsignal(number) is handler and not caught
    finally:
        signal.signal(number, before)
    assert checkpoint(folder)["step"] == 5, "the step is ended"
    run(tmp_path, resume=True)
    assert outcome(folder) == outcome(whole)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run of one step on copper(5)."""
    folder = tmp_path_factory.mktemp("done")
    file_of(folder, copper(5))
    run(folder, steps=1, valid=("0",), test=("0",))
    return folder / "runs" / "a"


@pytest.mark.parametrize("what", ("energy", "force", "stress", "position", "cell", "pbc", "element",
                                  "no stress", "one less", "another"))
def test_run_is_not_resumed_on_data_that_differ_in(what, done, tmp_path):
    crystals = copper(5)
    s = short(train=(file_of(tmp_path, crystals),), steps=1, valid=("0",), test=("0",))
    shutil.copytree(done, tmp_path / "a")
    train_small.main(s, resume=tmp_path / "a")  # control: the same data in another file
    atoms = crystals[3]
    changes = {
        "energy": lambda: atoms.calc.results.update(energy=atoms.calc.results["energy"] + 1e-5),
        "force": lambda: atoms.calc.results["forces"].__setitem__((2, 1), 1.0),
        "stress": lambda: atoms.calc.results["stress"].__setitem__(4, 1e-3),
        "no stress": lambda: atoms.calc.results.pop("stress"),
        "position": lambda: atoms.positions.__setitem__((1, 2), atoms.positions[1, 2] + 1e-5),
        "cell": lambda: atoms.cell.__setitem__((2, 1), 1e-5),
        "pbc": lambda: atoms.set_pbc((True, True, False)),
        "element": lambda: atoms.numbers.__setitem__(1, 79),
        "one less": lambda: crystals.pop(0),
        "another": lambda: crystals.__setitem__(4, crystals[0])}
    calculator = atoms.calc
    changes[what]()
    calculator.atoms = atoms.copy()  # or ASE would not write labels of another geometry
    file_of(tmp_path, crystals)
    with pytest.raises(train_small.BadInput, match="not the one that this run began with"):
        train_small.main(s, resume=tmp_path / "a")


def test_run_is_not_judged_by_files_that_have_changed(tmp_path, monkeypatch):
    """Neither resumed nor reported on; control: with the files as they were, read again."""
    monkeypatch.setattr(train_small.report, "report", lambda folder: {})
    file_of(tmp_path, copper(5))
    held = {"valid": file_of(tmp_path, copper(3, first=20), "valid.extxyz"),
            "test": file_of(tmp_path, copper(3, first=30), "test.extxyz")}
    sets = {name: (path,) for name, path in held.items()}
    run(tmp_path, steps=1, **sets)
    done = run(tmp_path, resume=True, steps=1, **sets)
    assert done["padding"] == 0, "of no batches"
    for path, what in ((held["valid"], "validation"), (held["test"], "test")):
        before = Path(path).read_text()
        Path(path).write_text(before + before)
        message = f"of the {what} set, is not the file that this run began with"
        with pytest.raises(train_small.BadInput, match=message):
            run(tmp_path, resume=True, steps=1, **sets)
        with pytest.raises(train_small.BadInput, match=message):
            read_run(tmp_path / "runs" / "a")
        Path(path).write_text(before)
    read_run(tmp_path / "runs" / "a")


def test_checkpoint_is_written_by_the_clock(tmp_path):
    """Thousands of steps between lines of the log; two minutes pass whenever somebody looks."""
    file_of(tmp_path, copper(4))
    clock = iter(range(0, 10 ** 9, 120))
    with at_step(7, kill), pytest.raises(KeyboardInterrupt):
        with mock.patch.object(train_small.time, "perf_counter", lambda: float(next(clock))):
            run(tmp_path, steps=10 ** 5, valid=("0",), test=("0",))
    folder = tmp_path / "runs" / "a"
    assert checkpoint(folder)["step"] >= 4 and len(metrics(folder)) == 0


def test_rate_is_that_of_this_life_without_the_log(tmp_path):
    """Two structures a step, which looks three times at a clock that ticks with every look."""
    file_of(tmp_path, copper(4))
    clock, rates = iter(range(10 ** 6)), []
    with mock.patch.object(train_small.time, "perf_counter", lambda: float(next(clock))):
        for steps in (40, 60):
            run(tmp_path, resume=steps > 40, steps=steps, valid=("0",), test=("0",))
            rates.append(float(metrics(tmp_path / "runs" / "a")[-1]["structures_per_s"]))
    assert rates[0] == pytest.approx(2 / 3, abs=0.1) and rates[1] == pytest.approx(2 / 3, abs=0.1)


# ─── The trainer: devices ────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("given, cuda, rank, want", (
    ("", True, None, "cuda:0"), ("", True, "3", "cuda:3"), ("", False, "3", "cpu"),
    ("cuda", True, None, "cuda:0"), ("cuda", True, "2", "cuda:2"), ("cpu", True, "2", "cpu"),
    ("cuda:1", True, None, "cuda:1"), ("cuda:1", True, "2", "cuda:1"), ("mps", False, None, "mps"),
))
def test_every_process_finds_its_own_device(given, cuda, rank, want, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", "5")  # of another machine: not the number of a device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    s = train_small.Settings(device=given)
    assert train_small.device_of(s.device) == want
    assert s.device == given


def test_device_is_not_stored_and_of_run_of_a_gpu_goes_on_without_one(whole, tmp_path, capsys):
    """What stands for the GPU is the CPU: so the run ends as one that was never interrupted."""
    file_of(tmp_path, copper())
    with mock.patch.object(train_small, "device_of", lambda s: "cpu"), \
            at_step(5, kill), pytest.raises(KeyboardInterrupt):
        run(tmp_path, device="cuda")
    folder = tmp_path / "runs" / "a"
    content = checkpoint(folder)
    assert content["settings"]["device"] == "cuda" and content["step"] == 4
    assert checkpoint(whole)["settings"]["device"] == "cpu"

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            train_small.parse(["--resume", str(folder)])
        assert "no such device here; try --device cpu" in capsys.readouterr().err
    s, resume = train_small.parse(["--resume", str(folder), "--device", "cpu"])
    train_small.main(s, resume=resume)
    assert json.loads((folder / "result.json").read_text())["device"] == "cpu"
    assert outcome(folder) == outcome(whole)


def test_full_disk_ends_in_one_sentence_and_the_run_can_go_on(whole, tmp_path):
    file_of(tmp_path, copper())
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)
    message = "cannot be written .No space left.*--resume .*runs/a"
    with mock.patch.object(os, "fsync", full):
        with pytest.raises(train_small.BadInput, match=message):
            run(tmp_path)
    assert 0 < checkpoint(tmp_path / "runs" / "a")["step"] < 8
    run(tmp_path, resume=True)
    assert outcome(tmp_path / "runs" / "a") == outcome(whole)


def test_loss_that_is_nan_names_the_frame(tmp_path):
    right = train_small.losses
    bad = frames_of(tmp_path, copper())[3].calc.results["energy"]

    def losses(out, target, *arguments):
        factor = float("nan") if (target["energy"] == bad).any() else 1
        parts = right(out, target, *arguments)
        return {**parts, "forces": parts["forces"] * factor}
    message = "the loss became nan or infinite at step .*because of .*data.extxyz, frame 3; look"
    with mock.patch.object(train_small, "losses", losses):
        with pytest.raises(train_small.BadInput, match=message) as error:
            run(tmp_path, valid=("0",), test=("0",))
    assert "frame 2" not in str(error.value) and "frame 4" not in str(error.value)

    def infinite(*arguments):
        return {name: part * np.inf for name, part in right(*arguments).items()}
    with mock.patch.object(train_small, "losses", infinite):
        with pytest.raises(train_small.BadInput, match="nan or infinite at step 0"):
            run(tmp_path, "other")


def test_failed_report_leaves_the_training_whole(tmp_path, capsys):
    """Bad input and a full disk are told in a sentence, a mistake in a program by its traceback."""
    file_of(tmp_path, copper())
    for name, error in (("bad", train_small.BadInput("no")), ("full", OSError("no"))):
        with mock.patch.object(train_small.report, "report", side_effect=error):
            run(tmp_path, name, steps=1)
        assert "the report failed (no); the training is whole" in capsys.readouterr().err
        assert json.loads((tmp_path / name / "a" / "result.json").read_text())["steps"] == 1
    with mock.patch.object(train_small.report, "report", side_effect=ZeroDivisionError("no")):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, "mistake", steps=1)
    assert json.loads((tmp_path / "mistake" / "a" / "result.json").read_text())["steps"] == 1


def test_old_results_are_never_overwritten(tmp_path):
    file_of(tmp_path, copper())
    for _ in range(3):
        run(tmp_path, steps=1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a", "a-2", "a-3"]


# ─── The trainer: command line ───────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("words, message", (
    (["--trian", "x"], "unrecognized arguments: --trian"),
    (["--lr", "fast"], "invalid float value: 'fast'"), (["--lr", "-1"], "must be a number above 0"),
    (["--lr", "nan"], "must be a number above 0"), (["--huber", "0"], "must be a number above 0"),
    (["--channels", "0"], "channels"), (["--ema", "1"], "must be below 1"),
    (["--epochs", "-1"], "must be a number from 0 on"),
    (["--epochs", "nan"], "must be a number from 0 on"), (["--minutes", "inf"], "from 0 on"),
    (["--activation", "relu"], "activation"), (["--channels", "12"], "groups"),
    (["--test", "x"], "--test without --train"), (["--device", "cdua"], "no such device"),
    (["--resume", "a", "--lr", "1e-3"], "--lr cannot be changed"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--size", "large", "--resume", "a"], "--size cannot be changed"),
    (["--size", "large", "--init", "a"], "leave it out, and give its rates: --lr 0.002 --muon_lr"),
), ids=" ".join)
def test_wrong_command_gets_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        train_small.parse(words)
    text = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and message in text[-1] and text[-1].count("error:") == 1


NUMBERS = [f for f in fields(train_small.Settings) if type(f.default) in (int, float)]
LEAST = {"cutoff": 1e-9, "degree": 0, "channels": 1, "groups": 1, "layers": 1}  # facet.Config's


def ends(f) -> tuple[list, list]:
    """Values of a numeric flag just outside of its range, and just inside."""
    step = 1 if isinstance(f.default, int) else 1e-9
    least = LEAST.get(f.name, f.metadata["least"])
    if least is not None:
        outside, inside = [least - step], [least]
    else:
        outside, inside = [f.metadata["above"]], [f.metadata["above"] + step]
    last = {"ema": (1.0, 1 - 1e-9), "seed": (2 ** 63, 2 ** 63 - 1), "degree": (44, 43)}
    beyond, largest = last.get(f.name, (float("inf"), 10 ** 6))
    return [*outside, beyond, float("inf"), float("nan")], [*inside, type(f.default)(largest)]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_number_has_a_range_on_the_command_line_and_in_python(f, capsys):
    """Those of the model are checked by facet.Config, whose sentences name them without dashes."""
    ranges = [f.metadata["least"], f.metadata["above"], LEAST.get(f.name)]
    assert ranges.count(None) == 2, "a range is missing, or there are two"
    name = f"^--{f.name} .*must be [^\n]*$"
    if f.name in LEAST:
        name = f"{f.name}|every number must be finite"
    outside, inside = ends(f)
    for value in outside:
        with pytest.raises(train_small.BadInput, match=name):
            train_small.Settings(**{f.name: value})
        with pytest.raises(SystemExit) as error:
            train_small.parse([f"--{f.name}={value}"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and last.count("error:") == 1
        assert f.name in last or f.name in LEAST and "every number must be finite" in last
    for value in inside:
        fitting = {"channels": {"groups": 1}, "groups": {"channels": value}}.get(f.name, {})
        given = {f.name: value, **fitting}
        s, _ = train_small.parse([f"--{name}={x}" for name, x in given.items()])
        assert s == train_small.Settings(**given)
        assert getattr(s, f.name) == value
    number = "" if f.name in LEAST else " .*must be a number$"
    for value in ("x", None, [1]):
        with pytest.raises(train_small.BadInput, match=f"{f.name}{number}"):
            train_small.Settings(**{f.name: value})
    if isinstance(f.default, int):
        whole = "" if f.name in LEAST else " 2.5: must be a whole number$"
        with pytest.raises(train_small.BadInput, match=f"{f.name}{whole}"):
            train_small.Settings(**{f.name: 2.5})


def test_model_has_the_settings_and_the_defaults_of_facet_config():
    s = train_small.Settings(channels=16, groups=4, cutoff=4)
    assert s.config(("Si",)) == facet.Config(("Si",), channels=16, groups=4, cutoff=4.0)
    for name in options.MODEL:
        assert getattr(train_small.Settings(), name) == getattr(facet.Config(("Si",)), name)


def test_command_line_gives_the_settings(tmp_path, capsys):
    s, resume = train_small.parse(["--train", "a b.xyz", "c.db", "--valid", "0", "--channels", "16",
                                   "--lr", "0.001", "--species", "Si,O"])
    assert s == train_small.Settings(train=("a b.xyz", "c.db"), valid=("0",), channels=16,
                                     lr=0.001, species="Si,O") and resume is None
    with pytest.raises(SystemExit) as error:
        train_small.parse(["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0
    for name in train_small.Settings.__dataclass_fields__:
        assert f"--{name} " in text


def test_size_sets_what_is_not_given():
    parameters = []
    rates = []
    for size, numbers in options.SIZES.items():
        s, _ = train_small.parse(["--size", size])
        assert s == train_small.Settings(**numbers)
        model = facet.Facet(s.config(("Si",)))
        parameters.append(sum(p.numel() for p in model.parameters()))
        rates.append((s.lr, s.muon_lr))
    assert parameters == sorted(set(parameters)), "each is larger than the one before"
    assert rates == sorted(set(rates), reverse=True), "and learns more slowly"
    assert train_small.parse([])[0] == train_small.parse(["--size", "medium"])[0]
    s, _ = train_small.parse(["--size", "large", "--degree", "1", "--lr", "0.1"])
    assert s == train_small.Settings(**{**options.SIZES["large"], "degree": 1, "lr": 0.1})


def test_resume_refuses_what_it_cannot_use(tmp_path):
    def refused(message):
        with pytest.raises(train_small.BadInput, match=message) as error:
            train_small.parse(["--resume", str(tmp_path / "a")])
        assert "\n" not in str(error.value)
    refused("there is no such folder")
    (tmp_path / "a").mkdir()
    refused(f"^{tmp_path}/a: holds no checkpoint.pt of a training$")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"rubbish")
    refused("is not a Facet checkpoint, or it is damaged")
    facet.save(build(), tmp_path / "a" / "checkpoint.pt", settings={"speed": 3})
    refused("was written by another version of train_small.py")
    content = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    torch.save({**content, "facet": facet.FORMAT + 1}, tmp_path / "a" / "checkpoint.pt")
    refused("is of format 3, and this version of facet.py")


def test_resume_from_another_folder_says_where_it_looked(done, tmp_path, monkeypatch):
    """Files are named as the run was told; in their own folder they are found."""
    s = checkpoint(done)["settings"]
    shutil.copytree(done, tmp_path / "runs" / "a")
    there = replace(short(), **{**s, "train": ("data.extxyz",)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    where = f"^data.extxyz: no such file .looked for in {tmp_path}/elsewhere; a run names "
    with pytest.raises(train_small.BadInput, match=where):
        train_small.main(there, resume=tmp_path / "runs" / "a")
    with pytest.raises(train_small.BadInput, match=f"^{tmp_path}/elsewhere/runs/a: holds no"):
        train_small.parse(["--resume", "runs/a"])
    file_of(tmp_path, copper(5))
    monkeypatch.chdir(tmp_path)
    train_small.main(there, resume=tmp_path / "runs" / "a")


def program(*words: str) -> None:
    """`python train_small.py` with these words, in this process."""
    with mock.patch.object(sys, "argv", ["train_small.py", *words]):
        runpy.run_path(str(HERE / "train_small.py"), run_name="__main__")


def test_program_ends_with_a_sentence_not_a_traceback(tmp_path, monkeypatch):
    """Python shows the text of a SystemExit, and ends with code 1."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: nowhere.extxyz: no such file.*$"):
        program("--train", "nowhere.extxyz")
    assert not list(tmp_path.glob("runs/*"))


def test_program_shows_the_traceback_of_a_mistake(tmp_path, monkeypatch):
    """A ValueError that nobody meant for the user leaves the program as it is."""
    monkeypatch.chdir(tmp_path)
    path = file_of(tmp_path, copper(4))
    with mock.patch.object(statistics, "reference_energies", side_effect=ValueError("a mistake")):
        with pytest.raises(ValueError, match="^a mistake$") as error:
            program("--train", path, "--valid", "0", "--test", "0")
    assert error.type is ValueError
