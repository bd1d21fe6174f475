"""Tests of train_small.py: what a training writes, repeats, refuses and survives.

    pytest tools/test_train_small.py

Reports are not drawn here, models are tiny and trainings short. Comparisons and tolerances are
those of test_facet.py.
"""
import copy
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations_with_replacement, islice
from pathlib import Path
from unittest import mock

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

import facet
import train_small
from test_facet import (  # one_thread is a fixture that holds for every test here
    ALL,
    build,
    differ,
    largest,
    one_thread,  # noqa: F401
    same,
)

HERE = Path(__file__).resolve().parent.parent

SHORT = {"channels": 8, "batch_atoms": 16, "threads": 1, "workers": 0, "steps": 12, "name": "a"}
VOIGT_OF_9 = [0, 5, 4, 5, 1, 3, 4, 3, 2]  # of 3 × 3 elements, where they are among ASE's six
TIMES = ("seconds", "structures_per_s")  # columns of metrics.csv that depend on the machine


@pytest.fixture(autouse=True, scope="module")
def no_report():
    """Training draws no report: tools/test_report.py tests that."""
    with mock.patch.object(train_small.report, "report", lambda folder: {}):
        yield


def copper(count: int = 12, first: int = 0) -> list[Atoms]:
    """Rattled copper of four and eight atoms, some of it alloyed with gold, with EMT's labels;
    others for another `first`."""
    crystals = []
    for i in range(first, first + count):
        atoms = ase.build.bulk("Cu", cubic=True, a=3.7) * (1 + i % 2, 1, 1)
        atoms.symbols[0] = ("Cu", "Au")[i % 3 == 1]
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
                  "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        crystals.append(atoms)
    return crystals


def file_of(folder: Path, crystals: list[Atoms], name: str = "data.extxyz") -> str:
    ase.io.write(folder / name, crystals)
    return str(folder / name)


def frames_of(folder: Path, crystals: list[Atoms]):
    return train_small.load(train_small.Settings(
        train=(file_of(folder, crystals),), valid=("0",), test=("0",)), folder)[0]


def run(folder: Path, out: str = "runs", resume: bool = False, **changes) -> dict:
    """A short training on the file in the folder, in folder/out/a."""
    s = train_small.Settings(**{**SHORT, "train": (str(folder / "data.extxyz"),), **changes})
    return train_small.main(s, folder / out, folder / out / "a" if resume else None)


def metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def outcome(folder: Path) -> tuple:
    """Weights, and what metrics.csv says but for the times."""
    rows = [{name: cell for name, cell in row.items() if name not in TIMES}
            for row in metrics(folder)]
    state = facet.load(folder / "model.pt").state_dict()
    return {name: weights.tolist() for name, weights in state.items()}, rows


def test_training_learns_and_writes_its_files(tmp_path):
    file_of(tmp_path, copper(24))
    result, folder = run(tmp_path, steps=80), tmp_path / "runs" / "a"
    log = metrics(folder)
    assert [int(row["step"]) for row in log] == [*range(4, 81, 4)]
    assert tuple(log[0]) == ("step", "seconds", "loss", "loss_energy", "loss_forces", "loss_stress",
                             "energy_mae_meV_per_atom", "force_mae_meV_per_A", "stress_mae_GPa",
                             "lr", "gradient", "structures_per_s")
    for name in ("loss", "force_mae_meV_per_A"):
        assert float(log[-1][name]) < 0.6 * float(log[0][name]), f"{name} did not fall"
    saved = json.loads((folder / "result.json").read_text())
    assert saved == json.loads(json.dumps(result)) and saved["steps"] == 80
    assert saved["settings"]["channels"] == 8 and saved["torch_threads"] == 1
    assert sum(saved["time"].values()) == pytest.approx(1) and min(saved["time"].values()) >= 0
    assert 0 <= saved["padding"] < 0.5
    model = facet.load(folder / "model.pt")
    assert sum(p.numel() for p in model.parameters()) == saved["parameters"]
    assert model.config == facet.Config(**saved["config"]) and model.config.species == ("Cu", "Au")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == 80
    for name, averaged in content["averaged"].items():
        same(name, model.state_dict()[name], averaged, "exact")
    assert largest(content["state"]["embedding"], model.embedding)[0] > 1e-6, "no average"


def test_log_watches_validation_by_the_saved_model_and_never_the_test_set(tmp_path):
    """The last line's errors, by hand; another test set changes nothing."""
    crystals = copper(16)
    file_of(tmp_path, crystals[:10])
    valid = file_of(tmp_path, crystals[10:], "valid.extxyz")
    run(tmp_path, valid=(valid,), test=("0",))
    calculator, errors = facet.FacetCalculator(tmp_path / "runs" / "a" / "model.pt", "cpu"), []
    for atoms in crystals[10:]:
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

    for name, others in (("same", copper(6, 100)), ("other", copper(3, 200))):
        test = file_of(tmp_path, others, f"{name}.extxyz")
        run(tmp_path, name, valid=(valid,), test=(test,))
        assert outcome(tmp_path / name / "a") == outcome(tmp_path / "runs" / "a")
    run(tmp_path, "blind", valid=("0",), test=("0",))
    weights, rows = outcome(tmp_path / "blind" / "a")
    assert weights == outcome(tmp_path / "runs" / "a")[0]
    assert all(row["force_mae_meV_per_A"] == "nan" for row in rows)


def test_same_seed_gives_the_same_numbers_on_a_busy_machine(tmp_path):
    """The clock jumps about two minutes whenever somebody looks; and another seed: control."""
    file_of(tmp_path, copper())
    run(tmp_path)
    clock = iter(np.cumsum(np.random.default_rng(0).uniform(0, 200, 10 ** 5)))
    with mock.patch.object(train_small.time, "perf_counter", lambda: next(clock)):
        run(tmp_path, "busy")
    assert outcome(tmp_path / "busy" / "a") == outcome(tmp_path / "runs" / "a")
    seconds = [float(metrics(tmp_path / name / "a")[-1]["seconds"]) for name in ("busy", "runs")]
    assert seconds[0] > 100 * seconds[1], "the clock was not patched"
    run(tmp_path, "control", seed=1)
    assert outcome(tmp_path / "control" / "a")[0] != outcome(tmp_path / "runs" / "a")[0]


def test_minutes_end_a_run_by_the_clock_and_a_resumed_run_goes_on_with_it(tmp_path):
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


def test_learning_rate_and_weights_of_the_losses_follow_their_schedules(tmp_path):
    """Warm-up, then a cosine to nothing; the energy's weight grows from a twentieth."""
    file_of(tmp_path, copper(4))
    run(tmp_path, steps=100, lr=2e-3, energy_weight=3.0, stress_weight=0.3, valid=("0",),
        test=("0",))
    for row in metrics(tmp_path / "runs" / "a"):
        step, progress = int(row["step"]), (int(row["step"]) - 1) / 100
        cosine = 0.5 * (1 + np.cos(np.pi * progress))
        same("rate", float(row["lr"]) / 2e-3, min(1, step / 50) * cosine, "formula")
        energy, forces, stress = (float(row[f"loss_{of}"]) for of in ALL)
        loss = 3.0 * 0.05 ** (1 - progress) * energy + forces + 0.3 * stress
        same("loss", float(row["loss"]) / loss, 1, "float32 formula")


def test_average_of_the_weights_equals_that_by_hand(tmp_path):
    """average += (1 − min(ema, n/(n + 9))) (weights − average) after step n; all 20 are saved."""
    file_of(tmp_path, copper(4))
    save, saved = facet.save, []

    def keep(model, path, **more):
        if "averaged" in more:
            averaged = more["averaged"]["embedding"].clone()
            saved.append((more["step"], model.embedding.detach().clone(), averaged))
        save(model, path, **more)
    with mock.patch.object(facet, "save", keep):
        run(tmp_path, steps=20, ema=0.6, lr=0.1)
    assert [step for step, _, _ in saved] == [*range(21)]
    average = saved[0][1]
    for step, weights, averaged in saved[1:]:
        average = average + (1 - min(0.6, step / (step + 9))) * (weights - average)
        same(f"average after step {step}", averaged, average, "float32 formula")
    differ("average", average, saved[0][1])


def test_every_setting_of_the_optimisation_changes_the_weights(tmp_path):
    frames = frames_of(tmp_path, copper())
    base = train_small.Settings(**{**SHORT, "steps": 6})
    config, number = train_small.statistics(frames, base), iter(range(100))

    def weights(**changes):
        s, folder = replace(base, **changes), tmp_path / str(next(number))
        folder.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = facet.Facet(config)
        averaged, _ = train_small.train(model, frames, frames[:0], s, folder)
        return torch.cat([w.flatten() for w in averaged.parameters()])
    first = weights()
    same("weights of the same settings", weights(), first, "exact")
    for change in ({"lr": 1e-3}, {"muon_lr": 1e-3}, {"muon_decay": 5.0}, {"ema": 0.1}, {"seed": 1},
                   {"energy_weight": 9.0}, {"stress_weight": 9.0}, {"huber": 0.001},
                   {"batch_atoms": 30}, {"steps": 7}):
        assert largest(weights(**change), first)[0] > 1e-6, f"{change} changes nothing"
    for name in ("CLIP", "WEIGHT_DECAY"):
        with mock.patch.object(train_small, name, 0.1):
            assert largest(weights(), first)[0] > 1e-6, f"{name} changes nothing"


def test_batches_neither_lose_nor_double_a_frame_and_are_bounded():
    rng = np.random.default_rng(0)
    atoms, crowd = rng.integers(1, 101, 500), rng.choice([10, 20, 45, 90], 500)
    seen = []
    for batches in islice(train_small.epochs(atoms, crowd, 5000.0, seed=0), 2):
        assert sorted(np.concatenate(batches)) == list(range(500))
        cost = [atoms[b].sum() * crowd[b].max() for b in batches]
        assert all(c <= 6250 or len(b) == 1 for c, b in zip(cost, batches, strict=True))
        used = sum((atoms[b] * crowd[b]).sum() for b in batches)
        assert used > 0.85 * sum(cost), "padding"
        assert used > 0.7 * 5000 * len(batches), "batches that are not full"
        seen.append({tuple(b) for b in batches if len(b) > 2})
    shuffled = np.array_split(rng.permutation(500), 50)  # control: without sorting there is padding
    assert used < 0.75 * sum(atoms[b].sum() * crowd[b].max() for b in shuffled)
    assert len(seen[0]) > 20 and not seen[0] & seen[1], "two epochs with the same batches"
    for seed in (0, 1):
        first = next(train_small.epochs(atoms, crowd, 5000.0, seed))
        assert ({tuple(b) for b in first if len(b) > 2} == seen[0]) == (seed == 0)
    large = train_small.plan(np.array([1000, 1]), np.array([50, 50]), 10.0, rng)
    assert len(large) == 2, "a frame larger than a batch is a batch"


def test_labels_that_a_frame_lacks_are_not_counted(tmp_path):
    crystals = copper(5)
    del crystals[1].calc.results["stress"]
    frames = frames_of(tmp_path, crystals)
    config = train_small.statistics(frames, train_small.Settings(**SHORT))
    _, batch, target = train_small.Samples(frames, config)[np.array([0, 1, 2])]
    assert target["atoms"].tolist() == [4, 8, 4] and target["count"].tolist() == [3, 48, 18]
    assert target["virial"].isnan().all((1, 2)).tolist() == [False, True, False]
    for s in (0, 2):
        stress = crystals[s].get_stress(voigt=False) * crystals[s].get_volume()
        same("virial", target["virial"][s], stress, "float32")
    same("energy", target["energy"], [c.get_potential_energy() for c in crystals[:3]], "float32")
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
    # Quadratic up to 0.1, for energies 0.01: x²/2β; beyond: x − β/2.
    energy = (0.005 ** 2 / 0.02 + 1 - 0.005) / 2
    forces = (0.05 ** 2 / 0.2 + 2 - 0.05) / 9
    want = [energy, forces, (0.05 ** 2 / 0.2) / 9]
    same("losses", train_small.losses(out, target, count, 2.0, 0.1), want, "float32")
    assert not train_small.losses(zero, target, count, 2.0, 0.1).any()
    differ("losses", want, [0, 0, 0])


def test_processes_neither_lose_nor_double_a_frame(tmp_path):
    frames = frames_of(tmp_path, copper(7))
    config = train_small.statistics(frames, train_small.Settings(**SHORT))
    model, rows = facet.Facet(config), np.arange(7)

    def part(rows, team, count=None):
        _, batch, target = train_small.Samples(frames, config, team)[rows]
        out = model(batch, differentiable=True)
        count = target["count"] if count is None else count
        return target, train_small.losses(out, target, count, config.energy_scale, 0.1)
    whole, want = part(rows, train_small.ALONE)
    found = [part(rows, train_small.Team(rank, 3), whole["count"]) for rank in range(3)]
    energies = torch.cat([target["energy"] for target, _ in found])
    same("energies", energies.sort().values, whole["energy"].sort().values, "exact")
    same("losses", sum(loss for _, loss in found), want, "float32")
    idle, nothing = part(rows[:2], train_small.Team(2, 3))
    assert not nothing.any() and not idle["count"].any(), "a process without a share counts"


PAIR = """
import os, sys, json, pathlib, train_small
train_small.report.report = lambda folder: {}
s = train_small.Settings(**json.loads(sys.argv[1]))
train_small.main(s, pathlib.Path(sys.argv[2]))
"""


def test_two_processes_train_as_one(tmp_path):
    """As torchrun starts them: the same batches, so the same losses and the same steps."""
    s = {**SHORT, "train": [file_of(tmp_path, copper())], "batch_atoms": 30}
    run(tmp_path, batch_atoms=30)
    processes = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
                       "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", PAIR, json.dumps(s), tmp_path / "two"], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes), texts
    assert "2 processes" in texts[0] and texts[1] == "", "only the first one speaks"
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["a"]
    (one, rows), (two, rows2) = (outcome(tmp_path / name / "a") for name in ("runs", "two"))
    for key in ("loss_energy", "loss_forces", "loss_stress", "gradient"):
        same(key, float(rows2[0][key]) / float(rows[0][key]), 1.0, "float32")
    for name in one:
        same(name, two[name], one[name], "bfloat16")
    run(tmp_path, "control", batch_atoms=30, seed=1)
    differ("weights of another seed", outcome(tmp_path / "control" / "a")[0]["embedding"],
           one["embedding"])


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
    same("fit", train_small.reference_energies(frames, numbers, {}, 5.0), [-5, -3], "slope")
    given = train_small.reference_energies(frames, numbers, {29: -1.0}, 5.0)
    same("given", given[1], -1.0, "exact")
    differ("fit of the other then", given[0], -5.0)
    other = train_small.reference_energies(frames, np.array([8, 29, 79]), {}, 5.0)
    same("an element that does not occur", other, [-5, -3, 0], "slope")
    free = Atoms("O", cell=[20, 20, 20], pbc=True)
    free.calc = SinglePointCalculator(free, energy=-1.5, forces=np.zeros((1, 3)))
    frames = frames_of(tmp_path, [*crystals, free])
    found = train_small.reference_energies(frames, numbers, {}, 5.0)
    same("free atom", found[0], -1.5, "float32")
    alike = frames_of(tmp_path, [crystals[0]] * 3)
    assert np.isfinite(train_small.reference_energies(alike, numbers, {}, 5.0)).all()


def test_core_ends_below_the_shortest_distance_of_every_pair():
    """Three species; within half the cutoff; 0.85 covalent radii where the data say nothing."""
    numbers, rng = np.array([8, 14, 29]), np.random.default_rng(0)
    free = 0.85 * covalent_radii[numbers]
    same("without data", train_small.core_radii({}, numbers, 5.0), free, "exact")
    same("short cutoff", train_small.core_radii({}, numbers, 1.0), np.full(3, 0.5), "exact")
    for _ in range(20):
        shortest = {pair: rng.uniform(0.8, 3.0) for pair in combinations_with_replacement(
            range(3), 2)}
        radii = train_small.core_radii(shortest, numbers, 5.0)
        for (i, j), distance in shortest.items():
            assert radii[i] + radii[j] <= 0.97 * distance + 1e-12, "a core reaches into the data"
        assert (radii <= free).all() and (radii > 0.2).all()


def test_statistics_are_those_of_the_training_set(tmp_path):
    crystals = copper()
    s = train_small.Settings(**SHORT, cutoff=4.5)
    config = train_small.statistics(frames_of(tmp_path, crystals), s)
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
        more = train_small.statistics(frames_of(tmp_path, crystals), replace(
            s, species=order, E0="O=-1.5,Cu=2"))
        assert more.species == ("O", "Cu", "Au") and more.reference_energies[:2] == (-1.5, 2.0)
    for wrong in ({"E0": "Cu"}, {"E0": "Qq=1"}, {"E0": "Cu=x"}, {"species": "Cu,Qq"}):
        with pytest.raises(train_small.BadInput, match="must look like --E0"):
            train_small.statistics(frames_of(tmp_path, crystals), replace(s, **wrong))
    with pytest.raises(train_small.BadInput, match="are positions in Å"):
        train_small.statistics(frames_of(tmp_path, crystals), replace(s, cutoff=0.5))


@pytest.mark.parametrize("part", ("valid", "test"))
def test_unknown_element_in_validation_or_test_is_refused(part, tmp_path):
    crystals = copper(9, 100)
    crystals[7].symbols[2] = "Zn"
    file_of(tmp_path, copper(9))
    other = file_of(tmp_path, crystals, "other.extxyz")
    with pytest.raises(train_small.BadInput, match="other.extxyz, frame 7: holds Zn, which the"):
        run(tmp_path, **{part: (other,)})
    assert not list((tmp_path / "runs").iterdir()), "something was written"


# ─── The trainer: runs that are stopped ──────────────────────────────────────────────────────────

@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_run_resumes_to_the_last_bit(tmp_path):
    """SIGKILL after some lines of the log; what went before is not done again."""
    file_of(tmp_path, copper())
    words = ["--train", str(tmp_path / "data.extxyz")]
    for name, setting in {**SHORT, "steps": 80}.items():
        words += [f"--{name}", str(setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, HERE / "train_small.py", *words], cwd=tmp_path,
                               env=environment, stdout=subprocess.DEVNULL)
    log, folder = tmp_path / "runs" / "a" / "metrics.csv", tmp_path / "runs" / "a"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.005)
    process.kill()
    process.wait()
    step = train_small.checkpoint(folder)["step"]
    assert 0 < step < 80, "the run ended before it was killed"
    with mock.patch.object(train_small, "losses", wraps=train_small.losses) as counted:
        run(tmp_path, resume=True, steps=80)
    assert counted.call_count == 80 - step
    run(tmp_path, "whole", steps=80)
    assert outcome(folder) == outcome(tmp_path / "whole" / "a")
    assert len(metrics(folder)) == 20 and not list(folder.glob("*.part"))


def test_interrupted_run_resumes_to_the_last_bit_and_changed_data_are_refused(tmp_path):
    """12 steps = 5 steps, Ctrl-C, 7 steps."""
    crystals, handler = copper(), signal.getsignal(signal.SIGINT)
    file_of(tmp_path, crystals)
    run(tmp_path, "whole")
    losses, calls = train_small.losses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return losses(*arguments)
    with mock.patch.object(train_small, "losses", interrupted), pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert train_small.checkpoint(tmp_path / "runs" / "a")["step"] == 5, "the step is ended"
    run(tmp_path, resume=True)
    assert outcome(tmp_path / "runs" / "a") == outcome(tmp_path / "whole" / "a")
    for changed in (crystals[1:], [*crystals[:11], crystals[0]]):
        file_of(tmp_path, changed)
        with pytest.raises(train_small.BadInput, match="not the one that this run began with"):
            run(tmp_path, resume=True)


def test_full_disk_ends_in_one_sentence_and_the_run_can_go_on(tmp_path):
    file_of(tmp_path, copper())
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)
    message = "cannot be written .No space left.*--resume .*runs/a"
    with mock.patch.object(os, "fsync", full):
        with pytest.raises(train_small.BadInput, match=message):
            run(tmp_path, steps=20)
    assert 0 < train_small.checkpoint(tmp_path / "runs" / "a")["step"] < 20
    run(tmp_path, resume=True, steps=20)
    run(tmp_path, "whole", steps=20)
    assert outcome(tmp_path / "runs" / "a") == outcome(tmp_path / "whole" / "a")


def test_loss_that_is_nan_names_the_frame(tmp_path):
    right = train_small.losses
    bad = frames_of(tmp_path, copper())[3].calc.results["energy"]

    def losses(out, target, *arguments):
        factor = float("nan") if (target["energy"] == bad).any() else 1
        return right(out, target, *arguments) * factor
    message = "the loss became nan or infinite at step .*because of .*data.extxyz, frame 3; look"
    with mock.patch.object(train_small, "losses", losses):
        with pytest.raises(train_small.BadInput, match=message) as error:
            run(tmp_path, valid=("0",), test=("0",))
    assert "frame 2" not in str(error.value) and "frame 4" not in str(error.value)
    with mock.patch.object(train_small, "losses", lambda *a: right(*a) * float("inf")):
        with pytest.raises(train_small.BadInput, match="nan or infinite at step 0"):
            run(tmp_path, "other")


def test_failed_report_leaves_the_training_whole(tmp_path, capsys):
    file_of(tmp_path, copper())
    with mock.patch.object(train_small.report, "report", side_effect=ZeroDivisionError("no")):
        run(tmp_path)
    text = capsys.readouterr().err
    assert "the report failed (ZeroDivisionError: no); the training is whole" in text
    assert json.loads((tmp_path / "runs" / "a" / "result.json").read_text())["steps"] == 12


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
    (["--channels", "0"], "must be a number from 1 on"), (["--ema", "1"], "must be below 1"),
    (["--epochs", "-1"], "must be a number from 0 on"),
    (["--epochs", "nan"], "must be a number from 0 on"), (["--minutes", "inf"], "from 0 on"),
    (["--activation", "relu"], "must be product or silu"),
    (["--test", "x"], "--test without --train"), (["--device", "cdua"], "no such device"),
    (["--resume", "a", "--lr", "1e-3"], "--lr cannot be changed"),
), ids=" ".join)
def test_wrong_command_gets_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        train_small.parse(words)
    text = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and message in text[-1] and text[-1].count("error:") == 1


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


def test_resume_refuses_what_it_cannot_use(tmp_path):
    def refused(message):
        with pytest.raises(train_small.BadInput, match=message) as error:
            train_small.parse(["--resume", str(tmp_path / "a")])
        assert "\n" not in str(error.value)
    refused("there is no such folder")
    (tmp_path / "a").mkdir()
    refused("holds no checkpoint.pt to go on from$")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"rubbish")
    refused("is damaged, or was written by another version")
    facet.save(build(), tmp_path / "a" / "checkpoint.pt", settings={"speed": 3})
    refused("is damaged, or was written by another version")


def test_program_ends_with_a_sentence_not_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, HERE / "train_small.py", "--train", "nowhere.extxyz"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: nowhere.extxyz: no such file")
    assert not list(tmp_path.glob("runs/*"))
