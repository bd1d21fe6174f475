"""Tests of facet.py in use: training, files, the calculator, modes and threads of torch, Config.

What the potential must have is in test_facet.py, its parts are tested in test_parts.py.
"""
import copy
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

import facet
from test_facet import PINNED, outputs_of_pinned
from tools.check import (
    CONFIG,
    MODELS,
    SMALL,
    TOL,
    TRICLINIC,
    WIDE_CORE,
    batch_of,
    build,
    differ,
    outputs,
    same,
)
from tools.properties import ALL, GENERIC, rotated

HERE = Path(__file__).resolve().parent

def test_package_needs_what_requirements_say_and_no_test_tools():
    """`pip install .` installs facet.py with these; its bounds are those of requirements.txt."""
    text = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"dependencies = \[(.*?)\]", text).group(1)
    found = re.findall(r'"(.*?)"', listed)
    wanted = (HERE.parent / "requirements.txt").read_text(encoding="utf-8").split()
    tools = [line for line in wanted if line.startswith(("pytest", "hypothesis"))]
    assert found == [line for line in wanted if line not in tools] and len(tools) == 2


# ─── Training and checkpoints ───────────────────────────────────────────────────────────────────

def test_training_overfits_one_crystal():
    """Labels from other weights; the loss on forces and stress is differentiated twice."""
    model = copy.deepcopy(build(seed=1))
    batch = batch_of(model, TRICLINIC)
    want = build()(batch)
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        out = model(batch, differentiable=True)
        loss = sum((out[name] - want[name]).square().mean() for name in ALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(w.grad is not None and w.grad.any() for w in model.parameters()), "a useless weight"
    assert losses[-1] < losses[0] / 50, f"the loss fell from {losses[0]} to {losses[-1]} only"


def test_saved_model_is_the_same_model(tmp_path):
    path = tmp_path / "model.pt"
    model = build()
    want = outputs(model, TRICLINIC)["energy"]
    facet.save(model, path, step=3)
    loaded = facet.load(path, dtype=torch.float64)
    assert loaded.config == model.config and torch.load(path, weights_only=True)["step"] == 3
    same("energy", outputs(loaded, TRICLINIC)["energy"], want, "exact")
    calculator = facet.FacetCalculator(path, "cpu", torch.float64)
    same("energy", [calculator.get_potential_energy(TRICLINIC)], want, "exact")
    differ("energy of another model", outputs(build(seed=1), TRICLINIC)["energy"], want)


@pytest.mark.parametrize("activation, of_grid", (
    ("product", ("b", "Ws", "W3.W", "W12.W")), ("silu", ("b", "W1.W", "W3.W"))))
def test_names_and_shapes_of_the_tensors_in_a_checkpoint_stay(activation, of_grid, tmp_path):
    """Checkpoints that exist have these and no others: C = 6 channels, 3 species, 12 splines,
    3 layers · 3 groups · 3 degrees of radial functions."""
    facet.save(build(activation=activation), tmp_path / "model.pt")
    shapes = {"readout": (6,), "embedding.W": (3, 6), "splines.coefficients": (12, 27)}
    for t, (l_in, l_out, paths) in enumerate(((0, 2, (1, 1, 1)), (2, 2, (3, 4, 4)), (2, 0, (3,)))):
        for l3, Q in enumerate(paths):
            shapes[f"layers.{t}.mix.W.{l3}"] = (6 * Q, 6)
        shapes[f"layers.{t}.skip.a.W"] = (3, 6)
        shapes[f"layers.{t}.skip.linear.W"] = (min(l_in, l_out) + 1, 6, 6)
        for name in of_grid:
            width = 12 if name == "W12.W" else 6
            shapes[f"layers.{t}.grid.{name}"] = {
                "b": (6,), "Ws": (6, 6)}.get(name, (l_out + 1, 6, width))

    state = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


class Trap:
    """What runs code, here a harmless one, in the program that unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ("state", "config", "origin", "more"))
def test_code_in_a_checkpoint_is_not_run(part, tmp_path):
    """Wherever in the file it is; control: Python would run it."""
    model = copy.copy(build())
    facet.save(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content.setdefault(part, {})["readout"] = Trap(tmp_path / "caught")
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is not a Facet checkpoint, or it is damaged"):
        facet.load(tmp_path / "model.pt")
    assert not (tmp_path / "caught").exists(), "code of the file was run"
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "caught").exists(), "this trap catches nobody"


def test_interrupted_save_leaves_the_old_file(tmp_path):
    facet.save(build(), tmp_path / "model.pt")
    for name in ("model.pt", "new.pt"):
        for place, moment in ((torch, "save"), (os, "fsync"), (Path, "replace")):
            with mock.patch.object(place, moment, side_effect=KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    facet.save(build(seed=1), tmp_path / name)
    assert [*tmp_path.iterdir()] == [tmp_path / "model.pt"]
    same("readout", facet.load(tmp_path / "model.pt").readout, build().readout, "float32")
    differ("readout of the other model", build(seed=1).readout, build().readout)


def test_broken_checkpoint_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        facet.load(tmp_path / "model.pt")
    facet.save(build(), tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    torch.save({"state": build().state_dict()}, tmp_path / "no config")
    torch.save([1, 2], tmp_path / "list")
    for name, origin in (("no origin", None), ("words", "by hand")):
        model = copy.copy(build())
        model.origin = origin
        facet.save(model, tmp_path / name)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "truncated").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text").write_bytes(b"not a model\n")
    for name in ("no config", "list", "empty", "truncated", "text", "no origin", "words"):
        with pytest.raises(ValueError, match=f"{name} is not a Facet checkpoint") as error:
            facet.load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("message, part, changes", (  # one for each way in which it may not fit
    ('Missing key(s) in state_dict: "layers.1.mix.W.2"', "state", {"layers.1.mix.W.2": None}),
    ('Unexpected key(s) in state_dict: "dipole"', "state", {"dipole": torch.ones(6)}),
    ("size mismatch for readout", "state", {"readout": torch.tensor(1.0)}),
    ("has no field cutoff", "config", {"cutoff": None}),
    ("has a field speed that this version does not know", "config", {"speed": 3}),
    ("activation must be", "config", {"activation": "relu"}),
), ids=str)
def test_checkpoint_of_another_version_says_what_does_not_fit(message, part, changes, tmp_path):
    path = tmp_path / "model.pt"
    facet.save(build(), path)
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[part][name] = value
        if value is None:
            del content[part][name]
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        facet.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoint_of_format_1_is_still_read():
    """Its numbers are those that the code that wrote it gave; it does not say where it is from."""
    model = facet.load(HERE / "format_1.pt", dtype=torch.float64)
    out = outputs(model, TRICLINIC)
    same("energy", out["energy"], [-2.07339324], "text file")
    same("forces", out["forces"][0], [-0.30781496, -0.12836032, 0.42060934], "text file")
    same("stress", np.diag(out["stress"][0]), [0.23339426, 0.06455869, 0.05353727], "text file")
    assert model.origin == {} and len(model.layers) == 2


def test_checkpoint_of_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    facet.save(build(), path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "facet": facet.FORMAT + 1}, path)
    with pytest.raises(ValueError, match="is of format 3, and this version") as error:
        facet.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_origin_of_a_model_is_kept_and_close_atoms_are_warned_of_once(tmp_path):
    """Control: nothing is said of the distances of the training itself, or without an origin."""
    model = copy.deepcopy(build())
    model.origin = {"command": "by hand",
                    "shortest": {"Si-O": 1.6, "Cu-Cu": 2.0, "Si-Xe": 9.0}}
    facet.save(model, tmp_path / "model.pt")
    assert facet.load(tmp_path / "model.pt").origin == model.origin
    far = Atoms("SiOCu", [[0, 0, 0], [0, 0, 1.6], [0, 1.1, 0]])
    near = Atoms("SiOCu", [[0, 0, 0], [0, 0, 1.55], [0, 1.1, 0]])
    for source in (model, tmp_path / "model.pt"):
        calculator = facet.FacetCalculator(source, "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            calculator.get_forces(far)
            facet.FacetCalculator(build(), "cpu").get_forces(near)
        with pytest.warns(UserWarning, match="and .* are 1.55 Å apart, closer than .*1.60 Å"):
            calculator.get_forces(near)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            near.positions[1, 2] -= 0.01
            calculator.get_forces(near)
            near.positions[1, 2] += 0.01


# ─── The calculator ─────────────────────────────────────────────────────────────────────────────

VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])  # of 3 × 3 elements, those of ASE's six


def test_calculator_gives_the_energy_forces_and_stress_of_the_model():
    model = build()
    atoms = TRICLINIC.copy()
    want = outputs(model, atoms)
    for dtype, tol in ((torch.float64, "exact"), (torch.float32, "float32")):
        original = copy.deepcopy(model)
        atoms.calc = facet.FacetCalculator(original, device="cpu", dtype=dtype)
        with torch.no_grad():
            original.readout.zero_()  # later training does not reach the calculator

        same("energy", [atoms.get_potential_energy()], want["energy"], tol)
        free_energy = atoms.get_potential_energy(force_consistent=True)
        same("free energy", [free_energy], want["energy"], tol)
        same("energies", atoms.get_potential_energies(), want["energies"], tol)
        same("forces", atoms.get_forces(), want["forces"], tol)
        same("stress", atoms.get_stress(), want["stress"][0][VOIGT], tol)
        assert atoms.get_forces().dtype == atoms.get_stress().dtype == np.float64
        moved = atoms.copy()
        moved.positions[0] += 0.2
        differ("forces of the next crystal", atoms.calc.get_forces(moved), want["forces"])

    # Where there is no volume there is no stress
    for name in ("molecule", "slab without third vector"):
        forces = outputs(model, PINNED[name])["forces"]
        same("forces", atoms.calc.get_forces(PINNED[name]), forces, "float32")
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_stress(PINNED[name])


@pytest.mark.parametrize("name", ("a.extxyz", "a.traj", "a.json", "a.db"))
def test_results_are_the_same_after_writing_and_reading(name, tmp_path):
    """A crystal and a molecule, for which there is no stress."""
    for n, atoms in enumerate((TRICLINIC, PINNED["molecule"])):
        atoms = atoms.copy()
        atoms.calc = facet.FacetCalculator(build(), "cpu")
        atoms.get_forces()
        want = {**atoms.calc.results}

        ase.io.write(tmp_path / f"{n}{name}", atoms)
        read = ase.io.read(tmp_path / f"{n}{name}")
        assert str(read.symbols) == str(atoms.symbols) and (read.pbc == atoms.pbc).all()
        same("energy", read.get_potential_energy(), want["energy"], "text file")
        same("forces", read.get_forces(), want["forces"], "text file")
        if n == 0:
            same("stress", read.get_stress(), want["stress"], "text file")
        else:
            assert "stress" not in read.calc.results


@pytest.mark.parametrize("message, change", (
    ("there are no atoms", lambda atoms: atoms.__delitem__(slice(None))),
    ("a position or a cell vector is NaN", lambda atoms: atoms.positions.__setitem__(2, np.nan)),
    ("element Xe is not among", lambda atoms: atoms.symbols.__setitem__(1, "Xe")),
))
def test_calculator_refuses_a_broken_crystal_every_time(message, change):
    """In one sentence, also when asked again: no result of before is left."""
    atoms = TRICLINIC.copy()
    atoms.calc = facet.FacetCalculator(build(), "cpu")
    atoms.get_forces()
    change(atoms)
    for ask in (atoms.get_potential_energy, atoms.get_forces, atoms.get_forces):
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", (
    lambda atoms: atoms.symbols.__setitem__(0, "Cu"), lambda atoms: atoms.set_pbc(False),
    lambda atoms: atoms.positions.__setitem__((0, 2), 0.3),
    lambda atoms: atoms.cell.__setitem__((1, 1), 4.2),
), ids=("species", "pbc", "positions", "cell"))
def test_calculator_notices_what_is_changed_in_place(change):
    atoms = TRICLINIC.copy()
    atoms.calc = facet.FacetCalculator(build(), "cpu", torch.float64)
    before = atoms.get_forces()
    change(atoms)
    differ("forces", atoms.get_forces(), before)
    same("forces", atoms.get_forces(), outputs(build(), atoms)["forces"], "exact")


def test_calculator_calculates_when_and_what_ase_expects():
    """Everything at once, once, and only if it is allowed; results are handed out as copies."""
    atoms = TRICLINIC.copy()
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    assert calculator.calculation_required(atoms, ["energy"])
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None

    with mock.patch.object(facet, "evaluate", wraps=facet.evaluate) as evaluated:
        found = {name: calculator.get_property(name, atoms)
                 for name in calculator.implemented_properties}
        assert len(evaluated.mock_calls) == 1
        for name, wanted in outputs(build(), atoms).items():
            if name in ("energies", "forces"):
                same(name, found[name], wanted, "exact")
        assert not calculator.calculation_required(atoms, ["energy", "forces", "stress"])
        found["forces"][:] = 0
        differ("forces after their copy was changed", calculator.get_forces(atoms), found["forces"])
        assert len(evaluated.mock_calls) == 1

        # Another crystal
        atoms.positions[0] += 0.1
        assert calculator.calculation_required(atoms, ["energy"])
        assert calculator.get_property("forces", atoms, allow_calculation=False) is None
        calculator.get_property("stress", atoms)
        assert len(evaluated.mock_calls) == 2

    for name in ("magmom", "charges", "dipole"):
        with pytest.raises(PropertyNotImplementedError):
            calculator.get_property(name, atoms)
    with pytest.raises(TypeError, match="dtyp"):
        facet.FacetCalculator(build(), dtyp=torch.float64)


@pytest.mark.parametrize("batch_atoms", (1, 12, 1000))
def test_evaluate_keeps_the_order_whatever_the_batches(batch_atoms):
    """Those of a batch are alike, not adjacent. Stress only where there is a volume."""
    several = [*PINNED.values()]
    alone = [outputs_of_pinned(name) for name in PINNED]
    neighbours = [facet.find_neighbours(atoms, CONFIG) for atoms in several]
    with mock.patch.object(facet, "make_batch", wraps=facet.make_batch) as made:
        found = facet.evaluate(build(), neighbours, batch_atoms)
    sizes = [sum(len(crystal.species) for crystal in call.args[0]) for call in made.mock_calls]
    largest_crystal = max(len(atoms) for atoms in several)
    assert max(sizes) < batch_atoms + largest_crystal, "memory is not bounded"
    assert len(sizes) <= 1 + 2 * sum(sizes) // batch_atoms, "batches are not full"

    for want, got in zip(alone, found, strict=True):
        for name in ("energy", "free_energy", "energies", "forces"):
            wanted = want[name.removeprefix("free_")]
            same(name, got[name], wanted[0] if "energy" in name else wanted)
        assert ("stress" in got) == np.isfinite(want["stress"]).all()
        if "stress" in got:
            same("stress", got["stress"], want["stress"][0][VOIGT])
    differ("energies of two crystals", found[0]["energy"], found[-1]["energy"])
    assert facet.evaluate(build(), []) == []


class Charged(facet.Facet):
    """A student's model that says two more things of each atom, and has dropout."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__(config, dtype)
        self.dropout = torch.nn.Dropout(0.5)

    def atomic_outputs(self, batch):
        out = super().atomic_outputs(batch)
        near = torch.exp(-batch.vectors.square().sum(-1))  # [N, K]
        out["charges"] = self.dropout(1 + near.sum(1))  # [N]
        out["my_dipole"] = (batch.vectors * near[..., None]).sum(1)  # [N, 3]
        return out


def test_new_outputs_reach_the_calculator_split_by_crystal(tmp_path):
    model = Charged(CONFIG, torch.float64)
    model.load_state_dict(build().state_dict())
    several = [TRICLINIC, PINNED["molecule"], SMALL]
    found = facet.evaluate(model.eval(), [facet.find_neighbours(a, CONFIG) for a in several])
    for atoms, result in zip(several, found, strict=True):
        atoms, want = atoms.copy(), outputs(model, atoms)
        atoms.calc = facet.FacetCalculator(model, "cpu", torch.float64)
        same("energy", atoms.get_potential_energy(), want["energy"][0], "exact")
        for name, shape in (("charges", (len(atoms),)), ("my_dipole", (len(atoms), 3))):
            for values in (result[name], atoms.calc.results[name]):
                assert values.shape == shape and values.dtype == np.float64
            same(name, atoms.calc.results[name], want[name], "exact")
        same("charges in the batch", result["charges"], want["charges"])
        same("energy, as without them", outputs(build(), atoms)["energy"], want["energy"], "exact")

        # Files and dynamics take the known ones and do not mind the others.
        for name in ("a.extxyz", "a.traj"):
            ase.io.write(tmp_path / name, atoms)
            read = ase.io.read(tmp_path / name)
            same("energy read", read.get_potential_energy(), want["energy"][0], "float32")
    differ("charges of two atoms", found[0]["charges"][0], found[0]["charges"][1])


def test_calculator_and_load_are_in_eval_mode(tmp_path):
    """A student's dropout is off; control: in training it drops a charge or doubles it."""
    model = Charged(CONFIG, torch.float64).eval()
    batch = batch_of(model, TRICLINIC)
    right = model(batch)["charges"]
    model.train()
    with torch.random.fork_rng(devices=[]):
        dropped = model(batch)["charges"]
    assert (dropped != right).all(), "this dropout does nothing"

    calculator = facet.FacetCalculator(model, "cpu")
    assert not any(part.training for part in calculator.model.modules())
    assert model.training, "the model itself stays as it was"
    facet.save(build(), tmp_path / "model.pt")
    assert not any(part.training for part in facet.load(tmp_path / "model.pt").modules())


def test_atoms_within_their_core_are_the_same_in_eval_and_in_training():
    """Through the calculator, alone and in a batch; control: they repel each other, and a pair
    beyond its core does not."""
    model = build(core=WIDE_CORE)
    crystals = []
    for share in (0.1, 0.6, 0.95, 1.001):
        end = WIDE_CORE[0] + WIDE_CORE[1]
        places = [[0, 0, 0], share * end * np.array([2, -3, 6]) / 7, [0, 3.4, 0]]
        crystals.append(Atoms("SiOCu", places, cell=[9, 8, 7], pbc=True))

    calculator = facet.FacetCalculator(model, "cpu", torch.float64)
    assert model.training and not calculator.model.training
    neighbours = [facet.find_neighbours(atoms, CONFIG) for atoms in crystals]
    together = facet.evaluate(calculator.model, neighbours)
    for n, atoms in enumerate(crystals):
        want = outputs(model, atoms)
        repulsion = want["energies"] - outputs(build(core=(0.0,) * 3), atoms)["energies"]
        assert (repulsion[:2] > TOL["meV"]).all() == (n < 3)
        for name in ("energies", "forces"):
            same(name, calculator.get_property(name, atoms), want[name])
            same(f"{name} in a batch", together[n][name], want[name])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_outputs_have_their_shapes_and_dtypes(dtype):
    model = build(dtype)
    shapes = {"energy": (2,), "energies": (7,), "forces": (7, 3), "virial": (2, 3, 3),
              "stress": (2, 3, 3)}
    batch = batch_of(model, TRICLINIC, SMALL)
    out = model(batch)
    assert not batch.vectors.requires_grad, "the batch was changed"
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == shapes
    assert out["energy"].dtype == out["energies"].dtype == torch.float64
    assert out["forces"].dtype == out["stress"].dtype == out["virial"].dtype == dtype
    assert {tensor.device for tensor in out.values()} == {model.readout.device}
    assert not any(tensor.requires_grad for tensor in out.values())
    out = model(batch_of(model, TRICLINIC, SMALL), differentiable=True)
    assert all(tensor.requires_grad for tensor in out.values())
    same("energy", outputs(model, SMALL)["energy"], outputs(build(), SMALL)["energy"], "float32")

    # Results are float64 whatever the dtype
    calculator = facet.FacetCalculator(build(), "cpu", dtype)
    calculator.calculate(TRICLINIC)
    results, = facet.evaluate(model, [facet.find_neighbours(TRICLINIC, CONFIG)])
    assert calculator.model.readout.dtype == dtype
    for found in (calculator.results, results):
        assert found.keys() == {"energy", "free_energy", "energies", "forces", "stress"}
        for name, values in found.items():
            assert np.asarray(values).dtype == np.float64, name



# ─── Modes of torch, copies, threads, processes, devices ────────────────────────────────────────

@contextmanager
def default_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad, default_float64, deterministic,
         partial(torch.autocast, "cpu", torch.bfloat16))


@cache
def fresh(activation: str, dtype: torch.dtype) -> facet.Facet:
    """A model as it is at the start of a training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return facet.Facet(replace(CONFIG, activation=activation), dtype)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: getattr(mode, "__name__", "autocast"))
def test_model_and_calculator_are_the_same_in_any_mode_of_torch(mode, tmp_path):
    """Weights, constants and the batch; forces. Neither the calculator nor load draws numbers."""
    for activation, dtype in product(("product", "silu"), (torch.float32, torch.float64)):
        want = fresh(activation, dtype)
        with mode():
            model = fresh.__wrapped__(activation, dtype)  # another one
            batch = batch_of(want, TRICLINIC)
        for a, b in zip([*model.parameters(), *model.buffers()],
                        [*want.parameters(), *want.buffers()], strict=True):
            assert a.dtype == b.dtype
            same("weights", a, b, "exact")
        assert batch.vectors.dtype == dtype and batch.volume.dtype == torch.float64

    want = facet.FacetCalculator(build(), "cpu").get_forces(TRICLINIC)
    facet.save(build(), tmp_path / "model.pt")
    before = torch.get_rng_state()
    for model in (build(), tmp_path / "model.pt"):
        with mode():
            calculator = facet.FacetCalculator(model, "cpu")
            same("forces", calculator.get_forces(TRICLINIC), want, "exact")
            same("forces again", calculator.get_forces(rotated(TRICLINIC, GENERIC)) @ GENERIC,
                 want, "float32")
    same("state of the random numbers", torch.get_rng_state(), before, "exact")


def test_calculator_and_model_survive_pickle_and_deepcopy():
    """What comes back is the same, and apart from the original."""
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    want = calculator.get_forces(TRICLINIC)
    for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        other, model = again(calculator), again(build())
        assert model.config == CONFIG and other.model.config == CONFIG
        same("forces of the model", outputs(model, TRICLINIC)["forces"], want, "exact")
        other.reset()
        same("forces", other.get_forces(TRICLINIC), want, "exact")
        with torch.no_grad():
            other.model.readout.zero_()
            model.readout.zero_()
        other.reset()
        differ("forces of a changed copy", other.get_forces(TRICLINIC), want)
    calculator.reset()
    same("forces afterwards", calculator.get_forces(TRICLINIC), want, "exact")
    same("forces of the model", outputs(build(), TRICLINIC)["forces"], want, "exact")


def test_threads_do_not_disturb_each_other():
    """One model, and one calculator for each thread."""
    several = [TRICLINIC, SMALL, PINNED["skewed"], PINNED["molecule"]]
    want = [outputs(build(), atoms)["forces"] for atoms in several] * 4

    def by_model(atoms):
        result, = facet.evaluate(build(), [facet.find_neighbours(atoms, CONFIG)])
        return result["forces"]

    def by_calculator(atoms):
        return facet.FacetCalculator(build(), "cpu", torch.float64).get_forces(atoms)
    build()
    random_numbers = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        for function in (by_model, by_calculator):
            for wanted, found in zip(want, threads.map(function, several * 4), strict=True):
                same("forces", found, wanted, "exact")
    same("state of the random numbers", torch.get_rng_state(), random_numbers, "exact")


@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(),
                    reason="no fork on Windows, nor of a process that used a GPU")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_calculator_works_in_a_forked_process():
    """Sent there, after it was used here."""
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    want = calculator.get_forces(TRICLINIC)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        found = processes.submit(calculator.get_forces, rotated(TRICLINIC, GENERIC)).result(60)
    same("forces", found @ GENERIC, want)


NEW_PROCESS = """
import pickle
import re
import sys
import warnings

import numpy
import torch

def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
            torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
            torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(), numpy.geterr(),
            numpy.get_printoptions())

numpy.random.seed(1)
before = state()
import facet
assert state() == before
import tools.check, tools.physics
assert state() == before

with open(sys.argv[1], "rb") as file:
    calculator, atoms = pickle.load(file)
numpy.save(sys.argv[2], calculator.get_forces(atoms))
assert state() == before

tests = {"pytest", "hypothesis", "tests", "test_facet"} & sys.modules.keys()
assert not tests, tests
"""


def test_new_process_runs_a_calculator_and_changes_nothing_global(tmp_path):
    """One that was used here and pickled; importing facet.py and the table needs no test."""
    calculator = facet.FacetCalculator(build(), "cpu", torch.float64)
    want = calculator.get_forces(TRICLINIC)
    with open(tmp_path / "calculator", "wb") as file:
        pickle.dump((calculator, rotated(TRICLINIC, GENERIC)), file)
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, tmp_path / "calculator",
                    tmp_path / "forces.npy"], check=True, cwd=root)
    same("forces", np.load(tmp_path / "forces.npy") @ GENERIC, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype, tol", ((torch.float64, "rounding"), (torch.float32, "float32")),
                         ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuda_gives_the_numbers_of_the_cpu(name, dtype, tol):
    several = TRICLINIC, PINNED["skewed"], Atoms("O", cell=[9, 8, 7])
    want = outputs(build(**MODELS[name]), *several)
    model = copy.deepcopy(build(dtype, **MODELS[name])).cuda()
    for what, found in outputs(model, *several).items():
        same(what, found, want[what], tol)


# ─── What is refused ────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("message, change", (  # one for each condition, and each part of it
    ("species must be a tuple of items", {"species": "SiO"}),
    ("core must be a tuple of items, not 1.0", {"core": 1.0}),
    ("could not convert string to float", {"reference_energies": ("a", "b", "c")}),
    ("channels must be of type int, not 6.5", {"channels": 6.5}),
    ("groups must be of type int, not 'three'", {"groups": "three"}),
    ("degree must be of type int, not None", {"degree": None}),
    ("channels must be of type int, not inf", {"channels": np.inf}),
    ("cutoff must be of type float, not nan", {"cutoff": np.nan}),
    ("activation must be of type str, not 3", {"activation": 3}),
    ("must be finite", {"cutoff": np.inf}), ("must be finite", {"mean_neighbours": np.inf}),
    ("must be finite", {"energy_scale": np.inf}),
    ("must be finite", {"reference_energies": (1.0, np.nan, 1.0)}),
    ("must be finite", {"core": (None, 1.0, 1.0)}),
    ("chemical symbols", {"species": ()}), ("chemical symbols", {"species": ("Si", "Qq", "Cu")}),
    ("chemical symbols", {"species": ("Si", "Si", "Cu")}),
    ("chemical symbols", {"species": ("X", "Si")}),
    ("at least", {"layers": 0}), ("at least", {"groups": 0}), ("at least", {"degree": -1}),
    ("at least", {"grid_degree": -1}), ("at least", {"splines": 3}),
    ("multiple of groups", {"channels": 7}), ("multiple of groups", {"channels": 0}),
    ("activation must be", {"activation": "relu"}),
    ("first_knot", {"first_knot": -0.1}), ("first_knot", {"first_knot": 3.5}),
    ("mean_neighbours", {"mean_neighbours": 0.0}), ("energy_scale", {"energy_scale": -1.0}),
    ("one number per species", {"reference_energies": (1.0,)}),
    ("one number per species", {"core": (1.0,) * 4}),
    ("half the cutoff", {"core": (1.0, -0.1, 1.0)}), ("half the cutoff", {"core": (1.0, 1.0, 1.8)}),
    ("no Lebedev rule", {"grid_degree": 132}), ("no Lebedev rule", {"degree": 44}),
    ("no Lebedev rule", {"degree": 18, "activation": "silu"}),
), ids=str)
def test_config_refuses_what_cannot_be_built(message, change):
    with pytest.raises(ValueError, match=message) as error:
        facet.Facet(replace(CONFIG, **change))
    assert "\n" not in str(error.value)


def test_config_takes_numpy_numbers_and_stays_plain(tmp_path):
    config = replace(CONFIG, cutoff=np.float32(4), channels=np.int64(6),
                     reference_energies=np.array([1.0, 2, 3]), species=np.array(["Si", "O", "Cu"]))
    assert type(config.cutoff) is float and type(config.channels) is int
    assert config.reference_energies == (1.0, 2.0, 3.0) and config.species == CONFIG.species
    facet.save(facet.Facet(config), tmp_path / "model.pt")
    assert facet.load(tmp_path / "model.pt").config == config


@pytest.mark.parametrize("message, atoms", (  # one for each condition, and each part of it
    ("there are no atoms", Atoms(cell=[3, 3, 3], pbc=True)),
    ("element Xe is not among those the model knows: Si O Cu",
     Atoms("SiXe", [[0, 0, 0], [0, 0, 2]])),
    ("NaN or infinite", Atoms("Si", [[0, np.nan, 0]])),
    ("NaN or infinite", Atoms("Si", cell=[[np.inf, 0, 0], [0, 3, 0], [0, 0, 3]], pbc=True)),
    ("cell vector is zero", Atoms("Si", cell=[3, 3, 0], pbc=True)),
    ("no volume", Atoms("Si", cell=[[3, 1, 0], [3, 1, 1e-7], [0, 1, 3]], pbc=True)),
    ("no volume", Atoms("Si", cell=[[3, 1, 0], [6, 2, 0], [0, 0, 0]], pbc=(True, True, False))),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [0, 0, 9e-4]])),
    ("sit on one spot", Atoms("SiO", [[0, 0, 0], [4, 4, -8]], cell=[4, 4, 4], pbc=True)),
), ids=lambda value: value if isinstance(value, str) else str(value.symbols))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_broken_crystal_is_refused(message, atoms):
    with pytest.raises(ValueError, match=message) as error:
        facet.find_neighbours(atoms, CONFIG)
    assert "\n" not in str(error.value)


def test_odd_but_sound_crystals_are_accepted():
    """Control of the above: nearly as bad, yet they have an energy and finite forces."""
    for atoms in (
            Atoms("SiO", [[0, 0, 0], [0, 0, 1.2e-3]]),
            Atoms("Si", cell=[[3, 0, 0], [3, 0.01, 0], [0, 0, 3]], pbc=(True, False, True)),
            Atoms("Si", cell=[[3, 0, 0], [0, 0, 0], [0, 0, 3]], pbc=(True, False, True)),
            Atoms("SiO", [[1, 1, 1], [1, 1, 5]], cell=[4, 4, 4], pbc=(True, True, False))):
        forces = outputs(build(core=(0.0,) * 3), atoms)["forces"]
        same("finite", np.isfinite(forces), np.ones_like(forces), "exact")
